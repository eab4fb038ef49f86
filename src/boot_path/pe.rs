//! Which processor a PE image is for: the `Machine` field of its COFF header, nothing else.
//!
//! Specification: Microsoft, "PE Format" (`e_lfanew` at 0x3c, then `PE\0\0`, then `Machine`).

use serde::Serialize;

use crate::guest::{GuestError, GuestPath, GuestRead, IO_REPARSE_TAG_WOF, VolumeId};

/// `IMAGE_FILE_MACHINE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Machine {
    I386,
    Amd64,
    Arm64,
    Other(u16),
}

impl Machine {
    pub fn name(self) -> &'static str {
        match self {
            Machine::I386 => "x86",
            Machine::Amd64 => "x86_64",
            Machine::Arm64 => "arm64",
            Machine::Other(_) => "another processor",
        }
    }
}

/// The machine of an image whose first bytes these are; `None` when it is not a PE image.
/// A header further in than the bytes given is not found: real drivers have it in the first 512.
pub fn machine(head: &[u8]) -> Option<Machine> {
    if head.get(..2)? != b"MZ" {
        return None;
    }
    let offset = u32::from_le_bytes(head.get(0x3c..0x40)?.try_into().ok()?) as usize;
    let coff = head.get(offset..offset.checked_add(6)?)?;
    if &coff[..4] != b"PE\0\0" {
        return None;
    }
    Some(match u16::from_le_bytes([coff[4], coff[5]]) {
        0x014c => Machine::I386,
        0x8664 => Machine::Amd64,
        0xaa64 => Machine::Arm64,
        other => Machine::Other(other),
    })
}

/// What is known about a driver's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageState {
    Missing,
    /// `machine` is `None` when the file is there but compressed in a way that only Windows reads.
    Present {
        machine: Option<Machine>,
    },
    /// There, but empty, encrypted, not a PE image or not readable.
    Unreadable,
}

const HEAD: usize = 4096;

/// Looks at a driver's file on a guest volume.
pub fn image_state(guest: &dyn GuestRead, volume: VolumeId, path: &GuestPath) -> ImageState {
    let info = match guest.stat(volume, path) {
        Ok(Some(info)) => info,
        Ok(None) => return ImageState::Missing,
        Err(_) => return ImageState::Unreadable,
    };
    if info.encrypted {
        return ImageState::Unreadable;
    }
    let compressed = info.reparse_tag == Some(IO_REPARSE_TAG_WOF) || info.compressed;
    match guest.read_at(volume, path, 0, HEAD) {
        Ok(head) => match machine(&head) {
            Some(machine) => ImageState::Present {
                machine: Some(machine),
            },
            None => ImageState::Unreadable,
        },
        Err(GuestError::Unreadable { .. }) if compressed => ImageState::Present { machine: None },
        Err(_) => ImageState::Unreadable,
    }
}

#[cfg(test)]
pub(crate) fn fake_pe(machine: u16) -> Vec<u8> {
    let mut bytes = vec![0u8; 512];
    bytes[..2].copy_from_slice(b"MZ");
    bytes[0x3c] = 0x80;
    bytes[0x80..0x84].copy_from_slice(b"PE\0\0");
    bytes[0x84..0x86].copy_from_slice(&machine.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_and_garbage() {
        assert_eq!(machine(&fake_pe(0x8664)), Some(Machine::Amd64));
        assert_eq!(machine(&fake_pe(0x014c)), Some(Machine::I386));
        assert_eq!(machine(&fake_pe(0xaa64)), Some(Machine::Arm64));
        assert_eq!(machine(&fake_pe(0x0200)), Some(Machine::Other(0x200)));
        let mut far = fake_pe(0x8664);
        far[0x3c..0x40].copy_from_slice(&u32::MAX.to_le_bytes());
        let whole = fake_pe(0x8664);
        for bad in [&[][..], b"MZ", &whole[..0x3f], &whole[..0x85], &far] {
            assert_eq!(machine(bad), None);
        }
    }
}
