//! Which keys unlock a BitLocker volume, as far as its clear-text metadata says.
//!
//! Reads the protectors and nothing else: no key is looked at, nothing is decrypted. Follows the layout
//! of the libbde documentation ("BitLocker Drive Encryption format"): the volume header gives the places
//! of three equal metadata blocks (that of Vista the first one, as a cluster; the block has the others); a
//! block is a list of entries, and each "volume master key" entry says what protects it. A volume whose key is protected by a clear key is suspended: still encrypted, but
//! open to everybody.

use super::fs::{le16, le64};
use crate::disk::block::BlockRead;

const SIGNATURE: &[u8] = b"-FVE-FS-";
/// Where the volume header keeps the offsets of the metadata blocks: Windows 7 and later; To Go.
const OFFSETS: [usize; 2] = [176, 440];
const VISTA_BOOT: &[u8] = b"\xeb\x52\x90-FVE-FS-";
const BLOCK_BYTES: usize = 64 << 10;
const FIRST_ENTRY: usize = 64 + 48;
const ENTRY_VMK: u16 = 2;
/// More protectors than this cannot be made.
const MAX_ENTRIES: usize = 256;

pub const CLEAR_KEY: &str = "clear key";

fn name(protection: u16) -> &'static str {
    match protection {
        0x0000 => CLEAR_KEY,
        0x0100 => "TPM",
        0x0200 => "startup key",
        0x0500 => "TPM and PIN",
        0x0800 => "recovery password",
        0x2000 => "password",
        _ => "another protector",
    }
}

/// The protectors of the volume at that place; empty when the metadata is not where it should be.
pub fn protectors(disk: &dyn BlockRead, start: u64, len: u64) -> Vec<String> {
    let read = |offset: u64, wanted: usize| {
        let room = len.saturating_sub(offset).min(wanted as u64);
        let mut bytes = vec![0; room as usize];
        let at = start.checked_add(offset)?;
        disk.read_at(at, &mut bytes).ok()?;
        Some(bytes)
    };
    let Some(header) = read(0, 512).filter(|h| h.len() == 512) else {
        return Vec::new();
    };
    let block = |offset: u64| {
        // The metadata is never in the header itself.
        let inside = (512..len).contains(&offset);
        let block = inside.then(|| read(offset, BLOCK_BYTES))??;
        (block.starts_with(SIGNATURE) && block.len() >= FIRST_ENTRY).then_some(block)
    };
    let offsets = OFFSETS
        .iter()
        .flat_map(|table| [0, 8, 16].map(|copy| le64(&header, table + copy)));
    let vista = header
        .starts_with(VISTA_BOOT)
        .then(|| vista_offset(&header));
    offsets
        .chain(vista.flatten())
        .find_map(block)
        .map(|block| entries(&block))
        .unwrap_or_default()
}

/// The header of Vista is that of NTFS, with the first metadata block's cluster in the place of the MFT
/// mirror's.
fn vista_offset(header: &[u8]) -> Option<u64> {
    let cluster = u64::from(le16(header, 11)).checked_mul(u64::from(header[13]))?;
    le64(header, 56).checked_mul(cluster)
}

fn entries(block: &[u8]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut at = FIRST_ENTRY;
    for _ in 0..MAX_ENTRIES {
        let Some(entry) = block.get(at..).filter(|e| e.len() >= 8) else {
            break;
        };
        let size = usize::from(le16(entry, 0));
        if size < 8 || size > entry.len() {
            break;
        }
        // After the entry's header: identifier, time, two bytes, protection.
        if le16(entry, 2) == ENTRY_VMK && size >= 8 + 28 {
            let name = name(le16(entry, 8 + 26)).to_string();
            if !found.contains(&name) {
                found.push(name);
            }
        }
        at += size;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::block::FileDisk;

    fn volume(keys: &[u16]) -> Vec<u8> {
        let mut bytes = vec![0; 64 << 10];
        bytes[3..11].copy_from_slice(SIGNATURE);
        bytes[176..184].copy_from_slice(&0x4000u64.to_le_bytes());
        let block = &mut bytes[0x4000..];
        block[..8].copy_from_slice(SIGNATURE);
        let mut at = FIRST_ENTRY;
        // Something else first.
        block[at..at + 4].copy_from_slice(&[16, 0, 7, 0]);
        at += 16;
        for key in keys {
            block[at..at + 6].copy_from_slice(&[80, 0, 2, 0, 8, 0]);
            block[at + 34..at + 36].copy_from_slice(&key.to_le_bytes());
            at += 80;
        }
        bytes
    }

    #[test]
    fn keys() {
        let read = |bytes: Vec<u8>| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &bytes).unwrap();
            let disk = FileDisk::open(file.path()).unwrap();
            protectors(&disk, 0, bytes.len() as u64)
        };
        assert_eq!(
            read(volume(&[0x100, 0x800, 0x800])),
            ["TPM", "recovery password"]
        );
        assert_eq!(read(volume(&[0])), [CLEAR_KEY]);
        assert_eq!(read(volume(&[0x7777])), ["another protector"]);
        let mut outside = volume(&[0]);
        outside[176..184].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(read(outside), [""; 0]);
        let mut endless = volume(&[0]);
        endless[0x4000 + FIRST_ENTRY] = 0;
        assert_eq!(read(endless), [""; 0]);
        assert_eq!(read(vec![0; 100]), [""; 0]);

        let mut vista = volume(&[0x800, 0]);
        vista[176..184].fill(0);
        assert_eq!(read(vista.clone()), [""; 0]);
        vista[..3].copy_from_slice(b"\xeb\x52\x90");
        vista[11..14].copy_from_slice(&[0, 2, 8]);
        vista[56] = 4;
        assert_eq!(read(vista.clone()), ["recovery password", CLEAR_KEY]);
        for cluster in [0, 5, u64::MAX, u64::MAX / 4096] {
            vista[56..64].copy_from_slice(&cluster.to_le_bytes());
            assert_eq!(read(vista.clone()), [""; 0], "{cluster:#x}");
        }
    }
}
