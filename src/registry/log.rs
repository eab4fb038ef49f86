//! The transaction logs beside a hive (`.LOG`, `.LOG1`, `.LOG2`).
//!
//! Parses and checks them; [`super::recover`] decides which log applies to which hive. Follows the
//! "Windows registry file format specification" (msuhanov/regf). Two formats:
//!
//! * **entries** (Windows 8.1 and later, base block type 6). A chain of `HvLE` entries, each with
//!   its own sequence number and two hashes.
//! * **pages** (up to Windows 8, type 1, or 2 on Windows 2000). A `DIRT` bitmap and the dirty
//!   512-byte pages, without any hash.
//!
//! Entries of earlier cycles follow the live entries in the same file, with valid hashes. Only the
//! sequence number distinguishes them.

use super::base::{BaseBlock, FileType};
use super::marvin::marvin32;
use crate::bytes::{le32, le64};

/// The part of the base block that is copied to a log.
pub const HEADER_SIZE: usize = 512;
/// The unit of everything in a log.
const SECTOR: usize = 512;
/// The unit in which hive bins grow.
pub const BIN_ALIGN: u32 = 4096;
/// The highest bit of a cell offset means volatile storage, so bins on disk stay below it.
pub const MAX_BINS_SIZE: u32 = 0x7fff_f000;

const ENTRY_HEADER: usize = 40;
const PAGE_REF: usize = 8;

/// How far sequence number `a` is ahead of `b`; negative if it is behind. The numbers wrap.
pub fn seq_ahead(a: u32, b: u32) -> i32 {
    a.wrapping_sub(b) as i32
}

/// The reason why a log file cannot be used with any hive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    #[error("the log is empty")]
    Empty,
    #[error("the log has no base block")]
    NoBaseBlock,
    #[error("the base block of the log has a wrong checksum")]
    Checksum,
    #[error("the log was being written: sequence numbers {primary} and {secondary} differ")]
    MidUpdate { primary: u32, secondary: u32 },
    #[error("file type {0} is not that of a log")]
    FileType(u32),
    #[error("the hive bins size {0:#x} in the log is not possible")]
    BinsSize(u32),
    #[error("the log has no bitmap of dirty pages")]
    NoBitmap,
    #[error("the log ends before its last dirty page: {have} bytes, {want} needed")]
    Truncated { have: usize, want: usize },
}

/// A run of bytes to write into the hive bins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page<'b> {
    /// From the start of the hive bins.
    pub offset: u32,
    pub data: &'b [u8],
}

/// A log with a valid base block.
#[derive(Debug, Clone)]
pub struct Log<'b> {
    pub base: BaseBlock,
    bytes: &'b [u8],
}

impl<'b> Log<'b> {
    pub fn parse(bytes: &'b [u8]) -> Result<Self, LogError> {
        // Windows preallocates logs, and an unused one may be all zeroes.
        if bytes.iter().take(HEADER_SIZE).all(|b| *b == 0) {
            return Err(LogError::Empty);
        }
        let base = BaseBlock::parse(bytes).map_err(|_| LogError::NoBaseBlock)?;
        if !base.checksum_ok() {
            return Err(LogError::Checksum);
        }
        match base.file_type {
            FileType::OldLog(_) | FileType::NewLog => {}
            FileType::Primary => return Err(LogError::FileType(0)),
            FileType::Unknown(n) => return Err(LogError::FileType(n)),
        }
        if base.is_dirty() {
            return Err(LogError::MidUpdate {
                primary: base.primary_sequence,
                secondary: base.secondary_sequence,
            });
        }
        if !bins_size_ok(base.bins_size) {
            return Err(LogError::BinsSize(base.bins_size));
        }
        Ok(Self { base, bytes })
    }

    pub fn has_entries(&self) -> bool {
        self.base.file_type == FileType::NewLog
    }

    /// The first 512 bytes.
    pub fn header(&self) -> &'b [u8] {
        &self.bytes[..HEADER_SIZE]
    }

    /// The live entries of an entry log, and the reason why they end. An entry that needs hive bins
    /// larger than `limit` counts as damaged.
    pub fn entries(&self, limit: usize) -> (Vec<LogEntry<'b>>, Stop) {
        let mut entries = Vec::new();
        let mut offset = SECTOR;
        let mut seq = self.base.primary_sequence;
        loop {
            match LogEntry::parse(self.bytes, offset, seq, limit) {
                // Terminates because an entry is at least one sector long.
                Ok((entry, size)) => {
                    entries.push(entry);
                    offset += size;
                    seq = seq.wrapping_add(1);
                }
                Err(stop) => return (entries, stop),
            }
        }
    }

    /// All dirty pages of a page log, for hive bins up to `limit`. There is no hash; only the
    /// presence of all pages is checked.
    pub fn pages(&self, limit: usize) -> Result<Vec<Page<'b>>, LogError> {
        if self.base.bins_size as usize > limit {
            return Err(LogError::BinsSize(self.base.bins_size));
        }
        // Before Windows 8 the log's sector is that of the disk; later the factor is always 1.
        let sector = match self.base.clustering {
            n @ 1..=8 => n as usize * SECTOR,
            _ => SECTOR,
        };
        let bitmap_len = (self.base.bins_size / BIN_ALIGN) as usize;
        let bitmap = self
            .bytes
            .get(sector..)
            .and_then(|b| b.strip_prefix(b"DIRT"))
            .and_then(|b| b.get(..bitmap_len))
            .ok_or(LogError::NoBitmap)?;
        let first = (sector + 4 + bitmap_len).next_multiple_of(sector);
        let count: usize = bitmap.iter().map(|b| b.count_ones() as usize).sum();
        let want = first + count * SECTOR;
        let (sectors, _) = self
            .bytes
            .get(first..want)
            .ok_or(LogError::Truncated {
                have: self.bytes.len(),
                want,
            })?
            .as_chunks::<SECTOR>();
        let dirty = (0..self.base.bins_size / SECTOR as u32)
            .filter(|bit| bitmap[*bit as usize / 8] >> (bit % 8) & 1 == 1);
        Ok(dirty
            .zip(sectors)
            .map(|(bit, data)| Page {
                offset: bit * SECTOR as u32,
                data,
            })
            .collect())
    }
}

fn bins_size_ok(size: u32) -> bool {
    size != 0 && size.is_multiple_of(BIN_ALIGN) && size <= MAX_BINS_SIZE
}

/// One transaction of an entry log with valid hashes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry<'b> {
    pub seq: u32,
    pub flags: u32,
    pub bins_size: u32,
    pub pages: Vec<Page<'b>>,
}

/// The end of a chain of entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    #[error("there are no more entries")]
    End,
    /// A logged change is lost, unlike with [`Stop::End`].
    #[error("the entry with sequence number {seq} is damaged: {why}")]
    Damaged { seq: u32, why: &'static str },
}

impl<'b> LogEntry<'b> {
    /// Parses the entry at `offset` if it has the sequence number `seq`. Returns it and its size.
    fn parse(log: &'b [u8], offset: usize, seq: u32, limit: usize) -> Result<(Self, usize), Stop> {
        let damaged = |why| Stop::Damaged { seq, why };
        let rest = log.get(offset..).ok_or(Stop::End)?;
        let header = rest.get(..ENTRY_HEADER).ok_or(Stop::End)?;
        let field = |at| le32(header, at).ok_or(Stop::End);
        // Anything else here was left by an earlier cycle.
        if !header.starts_with(b"HvLE") || field(12)? != seq {
            return Err(Stop::End);
        }
        let size = field(4)? as usize;
        if size < SECTOR || !size.is_multiple_of(SECTOR) {
            return Err(damaged("its size is not possible"));
        }
        let body = rest
            .get(ENTRY_HEADER..size)
            .ok_or(damaged("it was not written to its end"))?;
        if le64(header, 32) != Some(marvin32(&header[..32])) {
            return Err(damaged("the hash of its header is wrong"));
        }
        if le64(header, 24) != Some(marvin32(body)) {
            return Err(damaged("the hash of its pages is wrong"));
        }
        let bins_size = field(16)?;
        if !bins_size_ok(bins_size) || bins_size as usize > limit {
            return Err(damaged("its hive bins size is not possible"));
        }
        let pages = read_pages(body, field(20)?, bins_size)
            .ok_or(damaged("its pages do not fit the hive or the entry"))?;
        let entry = Self {
            seq,
            flags: field(8)?,
            bins_size,
            pages,
        };
        Ok((entry, size))
    }
}

fn read_pages(body: &[u8], count: u32, bins_size: u32) -> Option<Vec<Page<'_>>> {
    let refs_len = (count as usize).checked_mul(PAGE_REF)?;
    let (refs, mut data) = body.split_at_checked(refs_len)?;
    let (refs, _) = refs.as_chunks::<PAGE_REF>();
    refs.iter()
        .map(|page| {
            let offset = le32(page, 0)?;
            let size = le32(page, 4)?;
            let end = offset.checked_add(size)?;
            let (this, rest) = data.split_at_checked(size as usize)?;
            data = rest;
            (end <= bins_size).then_some(Page { offset, data: this })
        })
        .collect()
}
