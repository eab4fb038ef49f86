//! The machine field of a PE image (Microsoft, "PE Format": `e_lfanew` at 0x3c, then `PE\0\0` and the COFF header).

use crate::bytes::{le16, le32};

/// Returns `IMAGE_FILE_MACHINE_*` of an image with these first bytes; `None` if it is not a PE
/// image. A header beyond the given bytes is not found: real drivers have it in the first 512.
pub fn machine(head: &[u8]) -> Option<u16> {
    let signature = le32(head, 0x3c)? as usize;
    let is_image = head.starts_with(b"MZ") && head.get(signature..)?.starts_with(b"PE\0\0");
    is_image.then(|| le16(head, signature + 4)).flatten()
}

#[cfg(test)]
pub(crate) fn head(machine: u16) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[..2].copy_from_slice(b"MZ");
    bytes[0x3c] = 0x80;
    bytes[0x80..0x84].copy_from_slice(b"PE\0\0");
    bytes[0x84..0x86].copy_from_slice(&machine.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Arch;

    #[test]
    fn machines_and_garbage() {
        for arch in Arch::ALL {
            let machine = machine(&head(arch.pe_machine()));
            assert_eq!(machine.and_then(Arch::of_pe), Some(arch));
        }
        assert_eq!(machine(&head(0x0200)), Some(0x0200));
        assert_eq!(Arch::of_pe(0x0200), None);
        let mut far = head(0x8664);
        far[0x3c..0x40].copy_from_slice(&u32::MAX.to_le_bytes());
        let whole = head(0x8664);
        let m = vec![b'M'; 0x40];
        let mut other = head(0x8664);
        other[0] = b'N';
        for bad in [
            &[][..],
            b"MZ",
            &m,
            &whole[..0x3f],
            &whole[..0x85],
            &far,
            &other,
        ] {
            assert_eq!(machine(bad), None);
        }
    }
}
