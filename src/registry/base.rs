//! The base block of a hive or of one of its logs: the first 512 bytes.
//!
//! Specification: msuhanov/regf, "Base block". A hive is *dirty* when its two sequence numbers
//! differ **or** its checksum is wrong. A tool that writes equal numbers makes Windows ignore the
//! logs.

use super::error::{HiveError, Result};
use super::layout::base as layout;
use crate::bytes::{le32, le64};

const MIN_SIZE: usize = 512;

/// The kind of file that begins with this base block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    Primary,
    /// A log of up to Windows 8: `DIRT` bitmap and pages. The value is 1 or 2.
    OldLog(u32),
    /// A log of Windows 8.1 and later: `HvLE` entries.
    NewLog,
    Unknown(u32),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseBlock {
    pub primary_sequence: u32,
    pub secondary_sequence: u32,
    /// Time of the last write, as FILETIME.
    pub last_written: u64,
    pub major: u32,
    pub minor: u32,
    pub file_type: FileType,
    pub format: u32,
    /// Offset of the root key's cell from the first hive bin.
    pub root_cell: u32,
    pub bins_size: u32,
    pub clustering: u32,
    /// The tail of the path under which Windows last opened the hive; control characters removed.
    pub file_name: String,
    pub checksum_stored: u32,
    pub checksum_computed: u32,
}

fn no_hive(expected: String, actual: String) -> HiveError {
    HiveError::NotAHive {
        structure: "base block",
        offset: 0,
        expected,
        actual,
    }
}

impl BaseBlock {
    /// Parses the fields; only the signature and the length are checked.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let base = bytes
            .get(..MIN_SIZE)
            .ok_or_else(|| no_hive(format!("{MIN_SIZE} bytes"), bytes.len().to_string()))?;
        if !base.starts_with(b"regf") {
            let found = base[..4].escape_ascii().to_string();
            return Err(no_hive("regf".to_string(), found));
        }
        let at = |offset: usize| le32(base, offset).unwrap_or_default();
        Ok(Self {
            primary_sequence: at(layout::PRIMARY_SEQUENCE),
            secondary_sequence: at(layout::SECONDARY_SEQUENCE),
            last_written: le64(base, layout::LAST_WRITTEN).unwrap_or_default(),
            major: at(layout::MAJOR),
            minor: at(layout::MINOR),
            file_type: match at(layout::FILE_TYPE) {
                0 => FileType::Primary,
                n @ (1 | 2) => FileType::OldLog(n),
                6 => FileType::NewLog,
                n => FileType::Unknown(n),
            },
            format: at(layout::FORMAT),
            root_cell: at(layout::ROOT_CELL),
            bins_size: at(layout::BINS_SIZE),
            clustering: at(layout::CLUSTERING),
            file_name: file_name(&base[layout::FILE_NAME]),
            checksum_stored: at(layout::CHECKSUM),
            checksum_computed: checksum(base),
        })
    }

    pub fn checksum_ok(&self) -> bool {
        self.checksum_stored == self.checksum_computed
    }

    /// Whether the last write was not completed; the logs have the rest.
    pub fn is_dirty(&self) -> bool {
        self.primary_sequence != self.secondary_sequence || !self.checksum_ok()
    }
}

/// The XOR of the first 508 bytes as little-endian words. The two values that are never stored are
/// replaced as Windows does. A short slice counts as zero-filled.
pub fn checksum(base: &[u8]) -> u32 {
    let sum = (0..layout::CHECKSUM).step_by(4).fold(0, |sum, offset| {
        sum ^ le32(base, offset).unwrap_or_default()
    });
    match sum {
        0 => 1,
        u32::MAX => u32::MAX - 1,
        sum => sum,
    }
}

/// Sets both sequence numbers and the checksum, so that Windows loads the hive without recovery.
/// For hives that tests make.
pub fn set_clean(bytes: &mut [u8], sequence: u32) -> Result<()> {
    BaseBlock::parse(bytes)?;
    for at in [layout::PRIMARY_SEQUENCE, layout::SECONDARY_SEQUENCE] {
        bytes[at..at + 4].copy_from_slice(&sequence.to_le_bytes());
    }
    update_checksum(bytes)
}

/// Recomputes the checksum after a change in the base block.
pub fn update_checksum(bytes: &mut [u8]) -> Result<()> {
    let sum = BaseBlock::parse(bytes)?.checksum_computed;
    bytes[layout::CHECKSUM..MIN_SIZE].copy_from_slice(&sum.to_le_bytes());
    Ok(())
}

fn file_name(field: &[u8]) -> String {
    let units = field
        .chunks_exact(2)
        .map(|b| u16::from_le_bytes([b[0], b[1]]))
        .take_while(|&unit| unit != 0);
    char::decode_utf16(units)
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .filter(|c| !c.is_control())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::build::KeyTree;

    #[test]
    fn a_fresh_hive_is_clean() {
        let mut hive = KeyTree::new("R").to_bytes("\\SystemRoot\\System32\\Config\\SYSTEM");
        let base = BaseBlock::parse(&hive).unwrap();
        assert!(!base.is_dirty());
        assert_eq!(base.file_type, FileType::Primary);
        assert_eq!((base.major, base.minor, base.root_cell), (1, 5, 32));
        // The field holds 31 characters; Windows keeps the end of the path.
        assert_eq!(base.file_name, "stemRoot\\System32\\Config\\SYSTEM");

        hive[4] ^= 1;
        assert!(BaseBlock::parse(&hive).unwrap().is_dirty());
        set_clean(&mut hive, 77).unwrap();
        let base = BaseBlock::parse(&hive).unwrap();
        assert!(!base.is_dirty());
        assert_eq!((base.primary_sequence, base.secondary_sequence), (77, 77));

        hive[100] ^= 1;
        let base = BaseBlock::parse(&hive).unwrap();
        assert!(base.is_dirty() && !base.checksum_ok());
        assert_eq!(base.primary_sequence, base.secondary_sequence);
    }

    #[test]
    fn checksum_never_is_zero_or_all_ones() {
        assert_eq!(checksum(&[0; 512]), 1);
        let mut base = [0u8; 512];
        base[..4].fill(0xff);
        assert_eq!(checksum(&base), 0xffff_fffe);
        base[..4].copy_from_slice(b"regf");
        assert_eq!(checksum(&base), u32::from_le_bytes(*b"regf"));
    }

    #[test]
    fn what_is_not_a_hive_is_refused() {
        for bad in [&b""[..], b"regf", &[0; 4096]] {
            assert!(BaseBlock::parse(bad).is_err());
            assert!(set_clean(&mut bad.to_vec(), 1).is_err());
        }
    }
}
