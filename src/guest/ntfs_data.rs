//! The contents of NTFS files: plain, compressed by NTFS (LZNT1) or by CompactOS (WOF).
//!
//! Encrypted files and other reparse points are not supported: reading such a file is an error, and
//! never returns its raw clusters. A piece of a compressed file is read by unpacking the units it
//! touches. Nothing is cached, because drivers and hives are read as a whole or only at their
//! start.

use super::ntfs_read::{Fallible, NtfsVolume, Stream, StreamData, unreadable};
use super::ntfs_record::{self as rec, ClusterRun};
use super::unpack::lznt1;
use super::wof::{self, Chunks};
use super::{GuestError, GuestPath, IO_REPARSE_TAG_WOF};
use crate::memory::FileBytes;

const MAX_REPARSE: u64 = 16 << 10;
/// The largest unit: Windows makes units of 16 clusters of up to 4 KiB.
const MAX_UNIT: u64 = 1 << 20;
const LZNT1: u16 = 1;

enum Contents {
    Plain(Stream),
    /// Compressed by NTFS, in units of so many bytes.
    Units(Stream, u64),
    /// Compressed by CompactOS.
    Chunks(Stream, Chunks),
}

impl Contents {
    fn size(&self) -> u64 {
        match self {
            Self::Plain(stream) | Self::Units(stream, _) => stream.size(),
            Self::Chunks(_, chunks) => chunks.size,
        }
    }

    /// The number of bytes unpacked at a time.
    fn step(&self) -> u64 {
        match self {
            Self::Plain(_) => u64::MAX,
            Self::Units(_, unit) => *unit,
            Self::Chunks(_, chunks) => chunks.algorithm.chunk_size(),
        }
    }
}

impl NtfsVolume {
    fn contents(&self, path: &GuestPath) -> Result<Contents, GuestError> {
        let (found, record) = self.existing(path)?;
        if record.is_dir() {
            return Err(GuestError::wrong_kind(path, "file"));
        }
        let stream = |name: &[u16]| {
            self.stream(found.record, &record, rec::AT_DATA, name)
                .map_err(|e| e.at(path))
        };
        let tag = self
            .reparse_tag(found.record, &record)
            .map_err(|e| e.at(path))?;
        let data = stream(&[])?.unwrap_or(Stream {
            flags: 0,
            data: StreamData::Resident(Vec::new()),
        });
        if data.flags & rec::ENCRYPTED != 0 {
            return Err(unreadable(path, "it is encrypted (EFS)"));
        }
        match tag {
            None => {}
            Some(IO_REPARSE_TAG_WOF) => {
                let point = self
                    .stream(found.record, &record, rec::AT_REPARSE_POINT, &[])
                    .map_err(|e| e.at(path))?
                    .ok_or_else(|| unreadable(path, "its reparse point is gone"))?;
                let point = self
                    .read_all(&point, MAX_REPARSE, "its reparse point is too large")
                    .map_err(|e| e.at(path))?;
                let algorithm = wof::algorithm(&point).map_err(|e| unreadable(path, e))?;
                let name: Vec<u16> = wof::STREAM.encode_utf16().collect();
                let packed = stream(&name)?
                    .filter(|packed| packed.flags & (rec::COMPRESSED | rec::ENCRYPTED) == 0)
                    .ok_or_else(|| unreadable(path, "its compressed data (CompactOS) is gone"))?;
                let chunks = Chunks {
                    algorithm,
                    size: data.size(),
                    packed: packed.size(),
                };
                return Ok(Contents::Chunks(packed, chunks));
            }
            Some(tag) => {
                let reason = format!("it is a reparse point (tag {tag:#010x})");
                return Err(unreadable(path, reason));
            }
        }
        match (data.flags & rec::COMPRESSED, &data.data) {
            // The flag of a resident attribute applies only to its future contents.
            (0, _) | (_, StreamData::Resident(_)) => Ok(Contents::Plain(data)),
            (LZNT1, StreamData::Runs { unit, .. }) => {
                let unit = u64::from(self.facts.cluster_size)
                    .checked_mul(1u64.checked_shl(u32::from(*unit)).unwrap_or(0))
                    .filter(|bytes| *unit > 0 && (4096..=MAX_UNIT).contains(bytes))
                    .ok_or_else(|| {
                        unreadable(path, "it is compressed by NTFS (LZNT1) in invalid units")
                    })?;
                Ok(Contents::Units(data, unit))
            }
            _ => Err(unreadable(
                path,
                "it is compressed by NTFS in an unknown way",
            )),
        }
    }

    /// The bytes of `offset..offset + len`, which must lie inside the file.
    fn read_contents(&self, contents: &Contents, offset: u64, len: usize) -> Fallible<Vec<u8>> {
        if let Contents::Plain(stream) = contents {
            let mut bytes = vec![0; len];
            self.read_stream(stream, offset, &mut bytes)?;
            return Ok(bytes);
        }
        // Grows with the available data: sizes in a damaged volume cannot be trusted.
        let mut bytes = Vec::new();
        let step = contents.step();
        let end = offset + len as u64;
        let mut at = offset;
        while at < end {
            let index = at / step;
            let piece = match contents {
                Contents::Chunks(stream, chunks) => self.chunk(stream, chunks, index)?,
                Contents::Units(stream, unit) => self.unit(stream, *unit, index)?,
                Contents::Plain(_) => Vec::new(),
            };
            let start = index * step;
            let to = (end - start).min(step);
            let part = piece
                .get((at - start) as usize..to as usize)
                .ok_or("its compressed data is too short")?;
            bytes.extend_from_slice(part);
            at = start + to;
        }
        Ok(bytes)
    }

    fn chunk(&self, stream: &Stream, chunks: &Chunks, index: u64) -> Fallible<Vec<u8>> {
        let (at, len) = chunks.table_part(index)?;
        let mut part = vec![0; len];
        self.read_stream(stream, at, &mut part)?;
        let (at, len) = chunks.place(index, &part)?;
        let mut packed = vec![0; len];
        self.read_stream(stream, at, &mut packed)?;
        let size = chunks.unpacked(index) as usize;
        Ok(chunks.algorithm.unpack(packed, size)?)
    }

    /// Reads a compression unit. It has all its clusters (then it is uncompressed), some followed
    /// by a hole, or only a hole, which is zeroes.
    fn unit(&self, stream: &Stream, unit: u64, index: u64) -> Fallible<Vec<u8>> {
        let StreamData::Runs {
            runs,
            initialized,
            size,
            ..
        } = &stream.data
        else {
            return Err("a resident attribute has compression units".into());
        };
        let cluster = u64::from(self.facts.cluster_size);
        let (first, clusters) = (index * (unit / cluster), unit / cluster);
        let mut packed = Vec::new();
        let mut vcn = first;
        let mut next = runs.partition_point(|run| run.end() <= first);
        while let Some(&ClusterRun {
            vcn: start,
            lcn: Some(lcn),
            ..
        }) = runs.get(next)
            && vcn < first + clusters
        {
            let count = runs[next].end().min(first + clusters) - vcn;
            let from = packed.len();
            packed.resize(from + (count * cluster) as usize, 0);
            self.read_volume((lcn + (vcn - start)) * cluster, &mut packed[from..])?;
            vcn += count;
            next += 1;
        }
        let unit_size = unit as usize;
        let mut bytes = if packed.len() == unit_size {
            packed
        } else {
            lznt1::unpack(&packed, unit_size).ok_or("its compressed data (LZNT1) is damaged")?
        };
        bytes.resize(unit_size, 0);
        let valid = initialized.min(size).saturating_sub(index * unit);
        if valid < unit {
            bytes[valid as usize..].fill(0);
        }
        Ok(bytes)
    }

    pub fn read_at(
        &self,
        path: &GuestPath,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, GuestError> {
        let contents = self.contents(path)?;
        let len = contents.size().saturating_sub(offset).min(len as u64) as usize;
        if len == 0 {
            return Ok(Vec::new());
        }
        self.read_contents(&contents, offset, len)
            .map_err(|e| e.at(path))
    }

    pub fn read(&self, path: &GuestPath, limit: u64) -> Result<Vec<u8>, GuestError> {
        let (contents, len) = self.within(path, limit)?;
        self.read_contents(&contents, 0, len)
            .map_err(|e| e.at(path))
    }

    /// Reads a whole file into memory that will be kept.
    pub fn read_kept(&self, path: &GuestPath, limit: u64) -> Result<FileBytes, GuestError> {
        let (contents, len) = self.within(path, limit)?;
        let read = match &contents {
            Contents::Plain(stream) => {
                let mut bytes = FileBytes::zeroed(len);
                self.read_stream(stream, 0, &mut bytes).map(|()| bytes)
            }
            packed => self.read_contents(packed, 0, len).map(FileBytes::from),
        };
        read.map_err(|e| e.at(path))
    }

    /// The contents of a file of at most `limit` bytes, and their size.
    fn within(&self, path: &GuestPath, limit: u64) -> Result<(Contents, usize), GuestError> {
        let contents = self.contents(path)?;
        let size = contents.size();
        match usize::try_from(size) {
            Ok(len) if size <= limit => Ok((contents, len)),
            _ => Err(GuestError::TooLarge {
                path: path.to_string(),
                size,
                limit,
            }),
        }
    }
}
