//! [`Overlay`]: an overlay of this run over a plain file, here or on another host, read without a
//! storage daemon.
//!
//! Specification: `docs/interop/qcow2.rst` of QEMU. The storage daemon has written the overlay and
//! has closed it. It is read here by other code, so faults in the daemon's tables show in the
//! verification. Only features of hyper2kvm's own overlays are supported. That is version 3, with
//! or without extended second-level entries, but no backing name, snapshots, encryption or
//! compression. Anything else, or anything inconsistent, is left to QEMU ([`Overlay::open`] returns
//! `None`).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::block::{BlockRead, FileDisk, check_range, file_data};
use crate::bytes::be64;

use super::qcow2::{COMPRESSED, EXTENDED_L2, Header, OFFSET, SUBCLUSTERS, ZERO};

/// The most pieces, which take 32 MiB of memory; QEMU reads an overlay with more.
const MOST_RUNS: usize = 1 << 20;
/// The bitmap of a cluster whose parts all read as zeroes.
const ALL_ZERO: u64 = 0xffff_ffff << SUBCLUSTERS;
/// The first level of 64 TiB in clusters of 64 KiB.
const MOST_TABLES: u32 = 128 << 10;

/// The contents of an overlay for a range of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Data from that offset of its file on.
    Data(u64),
    Zeroes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Run {
    range: Range<u64>,
    content: Content,
}

/// A disk composed of an overlay and the plain file below it.
pub(super) struct Overlay {
    file: FileDisk,
    below: Arc<dyn BlockRead>,
    size: u64,
    /// The sorted runs; ranges between them are read from below.
    runs: Vec<Run>,
}

impl Overlay {
    /// Opens an overlay; `None` if it has unsupported features.
    pub(super) fn open(overlay: &Path, below: Arc<dyn BlockRead>) -> io::Result<Option<Self>> {
        let file = File::open(overlay)?;
        let size = below.size();
        let Some(runs) = Tables::read(&file, size)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            file: FileDisk::from_file(file)?,
            below,
            size,
            runs,
        }))
    }

    /// Every range of the disk in order, with the overlay's contents for it.
    pub(super) fn parts(
        &self,
        range: Range<u64>,
    ) -> impl Iterator<Item = (Range<u64>, Option<Content>)> {
        let mut at = range.start;
        let mut next = self.runs.partition_point(|run| run.range.end <= at);
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let start = at;
            let run = self
                .runs
                .get(next)
                .filter(|run| run.range.start < range.end);
            Some(match run {
                Some(run) if run.range.start <= start => {
                    at = run.range.end.min(range.end);
                    next += 1;
                    let content = match run.content {
                        Content::Data(host) => Content::Data(host + (start - run.range.start)),
                        Content::Zeroes => Content::Zeroes,
                    };
                    (start..at, Some(content))
                }
                run => {
                    at = run.map_or(range.end, |run| run.range.start);
                    (start..at, None)
                }
            })
        })
    }
}

impl BlockRead for Overlay {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        let mut rest = buf;
        for (range, content) in self.parts(offset..offset + rest.len() as u64) {
            let (part, behind) = rest.split_at_mut((range.end - range.start) as usize);
            match content {
                None => self.below.read_at(range.start, part)?,
                Some(Content::Data(host)) => self.file.read_at(host, part)?,
                Some(Content::Zeroes) => part.fill(0),
            }
            rest = behind;
        }
        Ok(())
    }
}

/// The tables of a qcow2 during parsing.
struct Tables<'f> {
    file: &'f File,
    length: u64,
    size: u64,
    cluster: u64,
    extended: bool,
    runs: Vec<Run>,
}

impl<'f> Tables<'f> {
    fn read(file: &'f File, size: u64) -> io::Result<Option<Vec<Run>>> {
        let length = file.metadata()?.len();
        let mut head = [0; Header::LEN];
        if length < Header::LEN as u64 {
            return Ok(None);
        }
        file.read_exact_at(&mut head, 0)?;
        let known = |header: &Header| {
            let (backing, snapshots) = (header.backing.0, header.snapshots.0);
            header.version.0 == 3
                && (backing, header.encryption.0, snapshots) == (0, 0, 0)
                && (16..=21).contains(&header.cluster_bits.0)
                && header.size.0 == size
                && header.incompatible.0 & !EXTENDED_L2 == 0
                && header.l1_entries.0 <= MOST_TABLES
        };
        let Some(header) = Header::of(&head).filter(known) else {
            return Ok(None);
        };
        let mut tables = Self {
            file,
            length,
            size,
            cluster: 1 << header.cluster_bits.0,
            extended: header.incompatible.0 & EXTENDED_L2 != 0,
            runs: Vec::new(),
        };
        let understood = tables.first_level(header.l1.0, header.l1_entries.0)?;
        Ok(understood.then_some(tables.runs))
    }

    fn entry_size(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Whether a part of the file exists completely.
    fn holds(&self, offset: u64, len: u64) -> bool {
        offset
            .checked_add(len)
            .is_some_and(|end| end <= self.length)
    }

    /// Reads the first level. Returns whether everything is supported.
    fn first_level(&mut self, offset: u64, entries: u32) -> io::Result<bool> {
        let covered = self.cluster / self.entry_size() * self.cluster;
        if u64::from(entries) < self.size.div_ceil(covered)
            || !self.holds(offset, u64::from(entries) * 8)
        {
            return Ok(false);
        }
        let mut level_1 = vec![0; entries as usize * 8];
        self.file.read_exact_at(&mut level_1, offset)?;
        for (i, entry) in level_1.chunks_exact(8).enumerate() {
            let at = be64(entry, 0).unwrap_or_default() & OFFSET;
            let start = i as u64 * covered;
            if at == 0 || start >= self.size {
                continue;
            }
            if !at.is_multiple_of(self.cluster) || !self.holds(at, self.cluster) {
                return Ok(false);
            }
            if !self.second_level(start, at)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads a table of the second level. That of a large disk has a few entries in megabytes, and
    /// is a hole where it has none.
    fn second_level(&mut self, start: u64, table: u64) -> io::Result<bool> {
        let mut written = Vec::new();
        file_data(self.file, table..table + self.cluster, &mut |range| {
            written.push(range);
        })?;
        for range in written {
            let first = (range.start - table) / self.entry_size();
            let from = table + first * self.entry_size();
            let mut entries = vec![0; (range.end - from) as usize];
            self.file.read_exact_at(&mut entries, from)?;
            if !self.entries(start + first * self.cluster, &entries) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn entries(&mut self, start: u64, entries: &[u8]) -> bool {
        let mut at = start;
        for entry in entries.chunks_exact(self.entry_size() as usize) {
            if at >= self.size {
                break;
            }
            if !self.entry(at, entry) || self.runs.len() > MOST_RUNS {
                return false;
            }
            at += self.cluster;
        }
        true
    }

    fn entry(&mut self, at: u64, entry: &[u8]) -> bool {
        let word = be64(entry, 0).unwrap_or_default();
        let host = word & OFFSET;
        let bitmap = be64(entry, 8);
        if word == 0 && bitmap.unwrap_or_default() == 0 {
            return true;
        }
        if word & COMPRESSED != 0 || !host.is_multiple_of(self.cluster) {
            return false;
        }
        match bitmap {
            None if word & ZERO != 0 => self.add(at, self.cluster, Content::Zeroes),
            None => host != 0 && self.add(at, self.cluster, Content::Data(host)),
            // There only the bitmap marks zeroes.
            Some(_) if word & ZERO != 0 => false,
            // The free space of a large disk.
            Some(ALL_ZERO) => self.add(at, self.cluster, Content::Zeroes),
            Some(bitmap) => {
                let size = self.cluster / SUBCLUSTERS;
                (0..SUBCLUSTERS).all(|i| {
                    let place = i * size;
                    let allocated = bitmap >> i & 1 == 1;
                    let zero = bitmap >> (SUBCLUSTERS + i) & 1 == 1;
                    match (allocated, zero) {
                        (false, false) => true,
                        (false, true) => self.add(at + place, size, Content::Zeroes),
                        (true, false) => {
                            host != 0 && self.add(at + place, size, Content::Data(host + place))
                        }
                        (true, true) => false,
                    }
                })
            }
        }
    }

    /// Adds a run after the previous ones; `false` if the file ends before it.
    fn add(&mut self, at: u64, len: u64, content: Content) -> bool {
        if let Content::Data(host) = content
            && !self.holds(host, len.min(self.size - at.min(self.size)))
        {
            return false;
        }
        let end = (at + len).min(self.size);
        if at >= end {
            return true;
        }
        if let Some(last) = self.runs.last_mut()
            && last.range.end == at
        {
            let joins = match (last.content, content) {
                (Content::Zeroes, Content::Zeroes) => true,
                (Content::Data(first), Content::Data(host)) => {
                    first + (last.range.end - last.range.start) == host
                }
                _ => false,
            };
            if joins {
                last.range.end = end;
                return true;
            }
        }
        self.runs.push(Run {
            range: at..end,
            content,
        });
        true
    }
}

#[cfg(test)]
#[path = "overlay_tests.rs"]
mod tests;
