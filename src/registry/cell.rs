//! Cells of a hive: bounds-checked access to the bytes of keys, values and lists.
//!
//! Specification: msuhanov/regf. An offset counts from the first hive bin; a cell's size is
//! negative if the cell is in use.

use super::layout::{nk, vk};

pub const PAGE: usize = 4096;
pub const BASE_BLOCK_SIZE: usize = 4096;
pub const BIN_HEADER: usize = 32;
/// Data bytes in one segment of big data.
pub const SEGMENT: usize = 16344;
/// Depth above which Windows refuses a tree.
pub const MAX_DEPTH: usize = 512;
/// The offset that points nowhere.
pub const NONE: u32 = u32::MAX;
/// The flag in the size field of a value whose data is in the offset field.
pub const INLINE: u32 = 1 << 31;

/// A violation of the format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("hive is damaged at byte {offset}: {structure}: expected {expected}, found {actual}")]
pub struct CellFault {
    /// From the start of the file.
    pub offset: u64,
    pub structure: &'static str,
    pub expected: String,
    pub actual: String,
}

impl CellFault {
    /// Creates a fault at `offset` from the first bin.
    pub fn in_bins(
        offset: impl TryInto<u64>,
        structure: &'static str,
        expected: impl ToString,
        actual: impl ToString,
    ) -> Self {
        let offset = offset.try_into().unwrap_or(u64::MAX);
        let offset = offset.saturating_add(BASE_BLOCK_SIZE as u64);
        Self::in_file(offset, structure, expected, actual)
    }

    pub fn in_file(
        offset: u64,
        structure: &'static str,
        expected: impl ToString,
        actual: impl ToString,
    ) -> Self {
        Self {
            offset,
            structure,
            expected: expected.to_string(),
            actual: actual.to_string(),
        }
    }
}

/// The contents of a cell in use; reading outside of them is a fault.
#[derive(Debug, Clone, Copy)]
pub struct Cell<'b> {
    pub offset: u32,
    pub data: &'b [u8],
}

impl<'b> Cell<'b> {
    /// The cell at `offset`, for a reader that has not scanned the bins from their start.
    pub fn at(bins: &'b [u8], offset: u32) -> Result<Self, CellFault> {
        let fault = |actual: String| CellFault::in_bins(offset, "cell", "one in use", actual);
        let end = || fault(format!("{} bytes of bins", bins.len()));
        if !offset.is_multiple_of(8) {
            return Err(fault("a place between cells".to_string()));
        }
        let rest = bins.get(offset as usize..).ok_or_else(end)?;
        let (size, rest) = rest.split_first_chunk::<4>().ok_or_else(end)?;
        let size = i32::from_le_bytes(*size);
        let len = size.unsigned_abs() as usize;
        if size >= 0 || !len.is_multiple_of(8) {
            return Err(fault(format!("the size {size}")));
        }
        let data = rest.get(..len - 4).ok_or_else(end)?;
        Ok(Self { offset, data })
    }

    #[inline(always)]
    pub fn slice(&self, at: usize, len: usize) -> Result<&'b [u8], CellFault> {
        match self.data.get(at..at.saturating_add(len)) {
            Some(bytes) => Ok(bytes),
            None => Err(self.too_short(at, len)),
        }
    }

    #[cold]
    fn too_short(&self, at: usize, len: usize) -> CellFault {
        let (has, needs) = (self.data.len(), at.saturating_add(len));
        let expected = format!("{needs} bytes for its contents");
        CellFault::in_bins(self.offset, "cell", expected, format!("{has}: too short"))
    }

    #[inline(always)]
    pub fn u16(&self, at: usize) -> Result<u16, CellFault> {
        let b = self.slice(at, 2)?;
        Ok(u16::from_le_bytes([b[0], b[1]]))
    }

    #[inline(always)]
    pub fn u32(&self, at: usize) -> Result<u32, CellFault> {
        let b = self.slice(at, 4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    #[inline(always)]
    pub fn expect(self, signature: &[u8; 2]) -> Result<Self, CellFault> {
        match self.data {
            [a, b, ..] if [*a, *b] == *signature => Ok(self),
            _ => Err(self.signed_otherwise(signature)),
        }
    }

    #[cold]
    fn signed_otherwise(&self, signature: &[u8; 2]) -> CellFault {
        let found = self.data.get(..2).unwrap_or(self.data);
        let (expected, found) = (signature.escape_ascii(), found.escape_ascii());
        CellFault::in_bins(self.offset, "signature", expected, found)
    }

    /// The name of a key (`nk`).
    #[inline(always)]
    pub fn key_name(&self) -> Result<Name<'b>, CellFault> {
        Ok(Name {
            bytes: self.slice(nk::NAME, usize::from(self.u16(nk::NAME_LEN)?))?,
            compressed: self.u16(nk::FLAGS)? & nk::COMPRESSED_NAME != 0,
        })
    }

    /// The name of a value (`vk`).
    pub fn value_name(&self) -> Result<Name<'b>, CellFault> {
        Ok(Name {
            bytes: self.slice(vk::NAME, usize::from(self.u16(vk::NAME_LEN)?))?,
            compressed: self.u16(vk::FLAGS)? & vk::COMPRESSED_NAME != 0,
        })
    }
}

/// A name as stored: Latin-1 or UTF-16.
#[derive(Debug, Clone, Copy)]
pub struct Name<'b> {
    bytes: &'b [u8],
    compressed: bool,
}

impl<'b> Name<'b> {
    /// The bytes of a name stored as plain ASCII, like nearly all names.
    #[inline(always)]
    pub fn as_ascii(&self) -> Option<&'b [u8]> {
        (self.compressed && self.bytes.is_ascii()).then_some(self.bytes)
    }

    /// Whether the name equals one that [`super::name::fold`] converted to upper case.
    pub fn matches(&self, folded: &str) -> bool {
        match self.as_ascii() {
            Some(ascii) => ascii.eq_ignore_ascii_case(folded.as_bytes()),
            None => super::name::fold(&self.to_text()) == folded,
        }
    }

    pub fn to_text(self) -> String {
        if self.compressed {
            return self.bytes.iter().copied().map(char::from).collect();
        }
        utf16(self.bytes)
    }
}

/// Decodes UTF-16 text, with a replacement character for invalid units; a last odd byte is ignored.
pub fn utf16(data: &[u8]) -> String {
    let units = data
        .chunks_exact(2)
        .map(|b| u16::from_le_bytes([b[0], b[1]]));
    char::decode_utf16(units)
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}
