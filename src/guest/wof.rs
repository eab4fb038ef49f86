//! Files compressed by CompactOS (the Windows Overlay Filter, file provider). A reparse point names
//! the algorithm, and the stream `WofCompressedData` has the chunks. The unnamed stream is a hole
//! of the file's size.
//!
//! The stream has the layout of a resource of a WIM archive: a table, then the chunks. The table
//! has the end of every chunk except the last, counted from the end of the table. A chunk that
//! would not shrink is stored uncompressed. Layout: `wofapi.h`, and wimlib for the stream.

use super::IO_REPARSE_TAG_WOF;
use super::fs::le32;
use super::unpack::{lzx, xpress};

/// A fault. The text is fixed: no part of it is from the guest.
type Fault = &'static str;

pub const STREAM: &str = "WofCompressedData";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    Xpress4K,
    Lzx,
    Xpress8K,
    Xpress16K,
}

impl Algorithm {
    /// `FILE_PROVIDER_COMPRESSION_*`.
    fn from_id(id: u32) -> Option<Self> {
        [Self::Xpress4K, Self::Lzx, Self::Xpress8K, Self::Xpress16K]
            .get(id as usize)
            .copied()
    }

    pub fn id(self) -> u32 {
        self as u32
    }

    pub fn chunk_size(self) -> u64 {
        match self {
            Self::Xpress4K => 4 << 10,
            Self::Xpress8K => 8 << 10,
            Self::Xpress16K => 16 << 10,
            Self::Lzx => 32 << 10,
        }
    }

    /// Unpacks a chunk of `size` bytes.
    pub fn unpack(self, packed: Vec<u8>, size: usize) -> Result<Vec<u8>, Fault> {
        if packed.len() == size {
            return Ok(packed);
        }
        let out = match self {
            Self::Lzx => lzx::unpack(&packed, size),
            _ => xpress::unpack(&packed, size),
        };
        out.ok_or("its compressed data (CompactOS) is damaged")
    }
}

/// The algorithm in the reparse point of a file, which starts with its tag.
pub fn algorithm(reparse: &[u8]) -> Result<Algorithm, Fault> {
    const PROVIDER_WIM: u32 = 1;
    const PROVIDER_FILE: u32 = 2;
    if reparse.len() < 24 || le32(reparse, 8) != 1 {
        return Err("its CompactOS reparse point is damaged");
    }
    match le32(reparse, 12) {
        PROVIDER_FILE if le32(reparse, 16) == 1 => Algorithm::from_id(le32(reparse, 20))
            .ok_or("it is compressed by CompactOS with an unknown algorithm"),
        PROVIDER_WIM => Err("its contents are in a WIM archive elsewhere (WIMBoot)"),
        _ => Err("it is compressed by an unknown provider of CompactOS"),
    }
}

/// The reparse point of a file compressed with this algorithm.
pub fn reparse_point(algorithm: Algorithm) -> Vec<u8> {
    let words = [IO_REPARSE_TAG_WOF, 16, 1, 2, 1, algorithm.id()];
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// The location of the chunks of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunks {
    pub algorithm: Algorithm,
    /// Size of the file.
    pub size: u64,
    /// Size of the stream.
    pub packed: u64,
}

impl Chunks {
    pub fn count(&self) -> u64 {
        self.size.div_ceil(self.algorithm.chunk_size())
    }

    /// Size of a table entry in bytes.
    fn entry(&self) -> u64 {
        if self.size > u64::from(u32::MAX) {
            8
        } else {
            4
        }
    }

    fn table(&self) -> Result<u64, Fault> {
        (self.count().saturating_sub(1))
            .checked_mul(self.entry())
            .filter(|table| *table <= self.packed)
            .ok_or("its compressed data (CompactOS) is shorter than its table")
    }

    /// The range of the table that locates chunk `index`: offset and length in the stream.
    pub fn table_part(&self, index: u64) -> Result<(u64, usize), Fault> {
        let table = self.table()?;
        let entry = self.entry();
        let from = index.saturating_sub(1).saturating_mul(entry).min(table);
        let to = (index.saturating_add(1)).saturating_mul(entry).min(table);
        Ok((from, (to - from) as usize))
    }

    /// The offset of chunk `index` in the stream, and its size there, from that part of the table.
    pub fn place(&self, index: u64, part: &[u8]) -> Result<(u64, usize), Fault> {
        const BAD: Fault = "the table of its compressed data (CompactOS) is damaged";
        let table = self.table()?;
        let mut ends = part.chunks_exact(self.entry() as usize).map(|bytes| {
            let mut wide = [0; 8];
            wide[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(wide)
        });
        let start = if index == 0 {
            0
        } else {
            ends.next().ok_or(BAD)?
        };
        let end = if index + 1 == self.count() {
            self.packed - table
        } else {
            ends.next().ok_or(BAD)?
        };
        let len = end
            .checked_sub(start)
            .filter(|len| *len > 0 && *len <= self.unpacked(index))
            .ok_or(BAD)?;
        if end > self.packed - table {
            return Err(BAD);
        }
        Ok((table + start, len as usize))
    }

    /// Size of chunk `index` in the file.
    pub fn unpacked(&self, index: u64) -> u64 {
        let chunk = self.algorithm.chunk_size();
        self.size
            .saturating_sub(index.saturating_mul(chunk))
            .min(chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reparse_points() {
        let point = |words: &[u32]| {
            let words = [0x8000_0017, 16].iter().chain(words);
            words.flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>()
        };
        for (id, expected) in [
            (0, Algorithm::Xpress4K),
            (1, Algorithm::Lzx),
            (2, Algorithm::Xpress8K),
            (3, Algorithm::Xpress16K),
        ] {
            let point = point(&[1, 2, 1, id]);
            assert_eq!(algorithm(&point), Ok(expected));
            assert_eq!(reparse_point(expected), point);
        }
        for (words, fault) in [
            (&[1, 2, 1][..], "damaged"),
            (&[2, 2, 1, 0], "damaged"),
            (&[1, 1, 1, 0], "WIMBoot"),
            (&[1, 3, 1, 0], "unknown provider"),
            (&[1, 2, 1, 4], "unknown algorithm"),
        ] {
            assert!(algorithm(&point(words)).unwrap_err().contains(fault));
        }
    }

    #[test]
    fn chunk_tables() {
        let chunks = Chunks {
            algorithm: Algorithm::Xpress4K,
            size: 9000,
            packed: 8 + 300,
        };
        let table: Vec<u8> = [100u32, 250].iter().flat_map(|w| w.to_le_bytes()).collect();
        let place = |index: u64, table: &[u8]| {
            let (at, len) = chunks.table_part(index).unwrap();
            chunks.place(index, &table[at as usize..at as usize + len])
        };
        assert_eq!(chunks.count(), 3);
        assert_eq!(place(0, &table), Ok((8, 100)));
        assert_eq!(place(1, &table), Ok((108, 150)));
        assert_eq!(place(2, &table), Ok((258, 50)));
        assert_eq!(chunks.unpacked(2), 9000 - 8192);
        for bad in [[250u32, 100], [100, 100], [100, 301], [5000, 5001]] {
            let table: Vec<u8> = bad.iter().flat_map(|w| w.to_le_bytes()).collect();
            let all: Result<Vec<_>, _> = (0..3).map(|i| place(i, &table)).collect();
            assert!(all.is_err(), "{bad:?}");
        }
        let short = Chunks {
            packed: 7,
            ..chunks
        };
        assert!(short.table_part(0).is_err());
        let huge = Chunks {
            size: u64::MAX,
            ..chunks
        };
        assert!(huge.table_part(u64::MAX).is_err());
    }
}
