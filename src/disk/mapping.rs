//! [`Mapping`]: which cluster of a disk is where in a qcow2 that is being filled.
//!
//! Tables are kept in memory and written by a flush, or when there are many. Compressed clusters
//! follow each other without regard to the clusters of the file. Several of them then share one of
//! those, whose reference count is their number.
//!
//! In an image that is not compressed only clusters of one byte are ([`super::fill`]). All those of
//! a byte that are written between two flushes lead to the same compressed data.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::os::unix::fs::FileExt;

use super::clusters::{Clusters, read_table, write_table};
use super::direct::read_at;
use super::empty::{CLUSTER, CLUSTER_BITS, COUNT_BLOCK, LEVEL_1, first_free};
use super::fill::{self, Content};
use super::qcow2::{COPIED, OFFSET, Packed};
use crate::transfer::Extents;

/// Entries of a second-level table, and of the table of counts.
const ENTRIES: u64 = CLUSTER / 8;
/// Tables in memory, 8 MiB: 64 GiB of a disk. Those of a copy are contiguous.
const MOST_TABLES: usize = 128;

pub(super) struct Mapping {
    /// The offsets of the second-level tables, as in the file.
    level_1: Vec<u64>,
    level_1_changed: bool,
    /// The second-level tables by their index in the first level.
    level_2: BTreeMap<usize, Table>,
    pub(super) clusters: Clusters,
    /// The end of the compressed data in the last cluster of the file; 0 without any. The count of
    /// that cluster is not in the file yet.
    packed_end: u64,
    /// The compressed data of clusters of one byte. Its count is not in the file yet.
    filled: BTreeMap<u8, Packed>,
    /// Whether contents were copied within the file. They must be durable before the tables are.
    moved: bool,
}

/// What a cluster of the disk has in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClusterPlace {
    Nothing,
    At(u64),
    Filled(Packed),
}

/// A part of the data of a request, and its offset in the file.
pub(super) struct Run {
    pub(super) range: Range<usize>,
    pub(super) host: u64,
}

impl Run {
    /// Adds a part, which may continue the last run.
    pub(super) fn add(runs: &mut Vec<Self>, range: Range<usize>, host: u64) {
        match runs.last_mut() {
            Some(last)
                if last.range.end == range.start && last.host + last.range.len() as u64 == host =>
            {
                last.range.end = range.end;
            }
            _ => runs.push(Self { range, host }),
        }
    }
}

/// The compressed data of an entry as it is written here.
pub(super) fn packed(entry: u64) -> Option<Packed> {
    Packed::of(entry, CLUSTER_BITS).filter(|_| entry & COPIED == 0)
}

/// The clusters of the file that contain the data.
fn clusters(data: Packed) -> RangeInclusive<u64> {
    data.at / CLUSTER..=(data.at + data.len - 1) / CLUSTER
}

/// A table of the second level.
struct Table {
    entries: Vec<u64>,
    changed: bool,
}

pub(super) fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

impl Mapping {
    /// Reads the tables, and recounts the references of the file. `None` if they differ from the
    /// form written here. Of a compressed image only the clusters in `kept` stay: the data of the
    /// others may be missing.
    pub(super) fn read(
        file: &File,
        entries: u64,
        kept: Option<&Extents>,
    ) -> io::Result<Option<Self>> {
        let length = file.metadata()?.len().div_ceil(CLUSTER);
        file.set_len(length * CLUSTER)?;
        let mut tables = Self {
            level_1: read_table(file, LEVEL_1, entries)?,
            level_1_changed: false,
            level_2: BTreeMap::new(),
            clusters: Clusters::of(file, CLUSTER, length)?,
            packed_end: 0,
            filled: BTreeMap::new(),
            moved: false,
        };
        let mut used = Used(vec![0; length as usize]);
        for cluster in 0..first_free(entries) / CLUSTER {
            used.set(cluster);
        }
        // The first block is among those.
        let (first, others) = tables.clusters.blocks.split_first_mut().unzip();
        let understood = first.is_some_and(|first| *first == COUNT_BLOCK)
            && used.take(others.unwrap_or_default(), 0, length)
            && used.take(&mut tables.level_1, COPIED, length);
        if !understood {
            return Ok(None);
        }
        for (i, at) in tables
            .level_1
            .iter()
            .enumerate()
            .filter(|(_, at)| **at != 0)
        {
            let before = read_table(file, at & OFFSET, ENTRIES)?;
            let mut entries = before.clone();
            match kept {
                Some(kept) => keep(&mut entries, i as u64 * ENTRIES, kept),
                None if drop_lost(file, &mut entries)? => {}
                None => return Ok(None),
            }
            let packed = |entry: &u64| packed(*entry);
            let shared = entries
                .iter()
                .filter_map(packed)
                .all(|data| used.share(data));
            let whole = entries.iter_mut().filter(|entry| packed(entry).is_none());
            if !shared || !used.take(whole, COPIED, length) {
                return Ok(None);
            }
            if entries != before {
                let changed = true;
                tables.level_2.insert(i, Table { entries, changed });
            }
        }
        if kept.is_some() {
            // What was dropped was written last.
            tables.clusters.cut(file, used.end())?;
        }
        tables.count(file, &used)?;
        Ok(Some(tables))
    }

    /// Writes the counts of all existing clusters.
    fn count(&mut self, file: &File, used: &Used) -> io::Result<()> {
        self.level_1_changed = true;
        self.clusters.blocks_changed = true;
        let (length, counted) = (self.clusters.end, self.clusters.per_block());
        for block in 0..length.div_ceil(counted) {
            let clusters = block * counted..(block * counted + counted).min(length);
            let mut counts: Vec<u8> = Vec::with_capacity(CLUSTER as usize);
            for cluster in clusters {
                counts.extend(used.count(cluster).to_be_bytes());
            }
            counts.resize(CLUSTER as usize, 0);
            // A lost block gets a new offset, whose own count is written by the next flush.
            let at = self.clusters.block(block)?;
            file.write_all_at(&counts, at)?;
        }
        self.write(file)
    }

    /// The second-level table; `None` if it does not exist and must not be created.
    fn table(&mut self, file: &File, i: usize, wanted: bool) -> io::Result<Option<&mut Table>> {
        let at = self.level_1.get(i).copied().unwrap_or_default() & OFFSET;
        if at == 0 && !wanted {
            return Ok(None);
        }
        if self.level_2.contains_key(&i) {
            return Ok(self.level_2.get_mut(&i));
        }
        if self.level_2.len() >= MOST_TABLES {
            self.write(file)?;
            self.level_2.clear();
        }
        let changed = at == 0;
        let entries = match changed {
            true => {
                let at = self.clusters.take()?;
                let slot = self.level_1.get_mut(i);
                *slot.ok_or_else(|| invalid("a cluster beyond the disk"))? = at | COPIED;
                self.level_1_changed = true;
                vec![0; ENTRIES as usize]
            }
            false => read_table(file, at, ENTRIES)?,
        };
        self.level_2.insert(i, Table { entries, changed });
        Ok(self.level_2.get_mut(&i))
    }

    /// The entry of a cluster of the disk; 0 without one.
    pub(super) fn entry(&mut self, file: &File, cluster: u64) -> io::Result<u64> {
        let table = self.table(file, (cluster / ENTRIES) as usize, false)?;
        Ok(table.map_or(0, |table| table.entries[(cluster % ENTRIES) as usize]))
    }

    /// Sets the entry of a cluster of the disk.
    pub(super) fn set(&mut self, file: &File, cluster: u64, entry: u64) -> io::Result<()> {
        if let Some(table) = self.table(file, (cluster / ENTRIES) as usize, true)? {
            table.entries[(cluster % ENTRIES) as usize] = entry;
            table.changed = true;
        }
        Ok(())
    }

    /// The place of a cluster of the disk in the file.
    pub(super) fn place(&mut self, file: &File, cluster: u64) -> io::Result<ClusterPlace> {
        let entry = self.entry(file, cluster)?;
        Ok(match packed(entry) {
            Some(data) => ClusterPlace::Filled(data),
            None if entry & OFFSET == 0 => ClusterPlace::Nothing,
            None => ClusterPlace::At(entry & OFFSET),
        })
    }

    /// The offset in the file of a cluster of the disk that is written, in part or as a `whole`.
    pub(super) fn allocate(&mut self, file: &File, cluster: u64, whole: bool) -> io::Result<u64> {
        let before = self.place(file, cluster)?;
        if let ClusterPlace::At(at) = before {
            return Ok(at);
        }
        let at = self.clusters.take()?;
        if let ClusterPlace::Filled(data) = before {
            if !whole {
                let byte = filled_with(file, data)?;
                file.write_all_at(&[byte; CLUSTER as usize], at)?;
                self.moved = true;
            }
            self.clusters.release(file, data.at / CLUSTER)?;
        }
        self.set(file, cluster, at | COPIED)?;
        Ok(at)
    }

    /// Fills a cluster of the disk with one byte. `false` if it has a place of its own, where it is
    /// to be written.
    pub(super) fn fill(&mut self, file: &File, cluster: u64, byte: u8) -> io::Result<bool> {
        match self.place(file, cluster)? {
            ClusterPlace::At(_) => return Ok(false),
            ClusterPlace::Filled(data) => self.clusters.release(file, data.at / CLUSTER)?,
            ClusterPlace::Nothing => {}
        }
        let known = self.filled.get(&byte).copied();
        let data = match known.filter(|data| self.clusters.share(data.at / CLUSTER)) {
            Some(data) => data,
            None => {
                let bytes = fill::compressed(byte)?;
                let (at, len) = (self.clusters.take()?, bytes.len() as u64);
                // Here, so that no other thread's flush records a cluster without its data.
                file.write_all_at(&bytes, at)?;
                let data = Packed { at, len };
                self.filled.insert(byte, data);
                data
            }
        };
        self.set(file, cluster, data.entry(CLUSTER_BITS))?;
        Ok(true)
    }

    /// Makes a whole cluster of the disk read as zeroes, if it has no place of its own.
    pub(super) fn empty(&mut self, file: &File, cluster: u64, data: Packed) -> io::Result<()> {
        self.clusters.release(file, data.at / CLUSTER)?;
        self.set(file, cluster, 0)
    }

    /// Allocates the places of compressed data, one directly after the other.
    pub(super) fn pack(&mut self, lens: &[u64]) -> io::Result<Vec<Packed>> {
        let len: u64 = lens.iter().sum();
        self.clusters.reserve(len.div_ceil(CLUSTER))?;
        let end = self.clusters.end * CLUSTER;
        let begun = self.packed_end.next_multiple_of(CLUSTER) == end;
        let mut at = if begun { self.packed_end } else { end };
        let more = (at + len).saturating_sub(end).div_ceil(CLUSTER);
        self.clusters.take_run(more)?;
        let place = |len: &u64| {
            let packed = Packed { at, len: *len };
            at += len;
            for cluster in clusters(packed) {
                *self.clusters.shared.entry(cluster).or_default() += 1;
            }
            packed
        };
        let places = lens.iter().map(place).collect();
        self.packed_end = at;
        Ok(places)
    }

    /// Writes all changes.
    pub(super) fn write(&mut self, file: &File) -> io::Result<()> {
        if self.moved {
            file.sync_data()?;
            self.moved = false;
        }
        self.clusters.write(file)?;
        self.packed_end = 0;
        self.filled.clear();
        for (i, table) in self.level_2.iter_mut().filter(|(_, table)| table.changed) {
            write_table(file, self.level_1[*i] & OFFSET, &table.entries)?;
            table.changed = false;
        }
        if std::mem::take(&mut self.level_1_changed) {
            write_table(file, LEVEL_1, &self.level_1)?;
        }
        Ok(())
    }
}

/// The byte of which a cluster consists.
pub(super) fn filled_with(file: &File, data: Packed) -> io::Result<u8> {
    match content(file, data)? {
        Content::Filled(byte) => Ok(byte),
        _ => Err(invalid("compressed data is not of one byte")),
    }
}

fn content(file: &File, data: Packed) -> io::Result<Content> {
    let mut bytes = vec![0; data.len as usize];
    read_at(file, &mut bytes, data.at)?;
    Ok(Content::of(&bytes))
}

/// Removes the entries of clusters of one byte whose data was not written: no flush has ended since
/// they were. `false` if compressed data is of another kind.
fn drop_lost(file: &File, entries: &mut [u64]) -> io::Result<bool> {
    let mut last = None;
    for entry in entries {
        let Some(data) = packed(*entry) else {
            continue;
        };
        let content = match last {
            Some((known, content)) if known == *entry => content,
            _ => content(file, data)?,
        };
        last = Some((*entry, content));
        match content {
            Content::Filled(_) => {}
            Content::Lost => *entry = 0,
            Content::Other => return Ok(false),
        }
    }
    Ok(true)
}

/// Removes the entries of clusters that are not wholly in `kept`. `first` is the first of them.
fn keep(entries: &mut [u64], first: u64, kept: &Extents) {
    for (i, entry) in entries.iter_mut().enumerate().filter(|(_, e)| **e != 0) {
        let start = (first + i as u64) * CLUSTER;
        let there: u64 = kept
            .parts_of(start..start + CLUSTER)
            .map(|part| part.end - part.start)
            .sum();
        if there < CLUSTER {
            *entry = 0;
        }
    }
}

/// The references to each cluster of the file.
struct Used(Vec<u16>);

impl Used {
    fn count(&self, cluster: u64) -> u16 {
        self.0.get(cluster as usize).copied().unwrap_or_default()
    }

    /// The end of the last used cluster, in clusters.
    fn end(&self) -> u64 {
        let last = self.0.iter().rposition(|count| *count > 0);
        last.map_or(0, |last| last as u64 + 1)
    }

    /// Marks a cluster. Returns whether it is new.
    fn set(&mut self, cluster: u64) -> bool {
        let new = self.count(cluster) == 0;
        if let Some(count) = self.0.get_mut(cluster as usize) {
            *count = 1;
        }
        new
    }

    /// Counts the clusters of compressed data. `false` if the data is outside the file.
    fn share(&mut self, data: Packed) -> bool {
        clusters(data).all(|cluster| {
            let count = self.0.get_mut(cluster as usize);
            let more = count.as_deref().and_then(|count| count.checked_add(1));
            more.zip(count).map(|(more, count)| *count = more).is_some()
        })
    }

    /// Marks the clusters of the entries. An entry that leads past the end is dropped: no flush has
    /// ended since it was written. `false` if the entries differ from the form written here.
    fn take<'e>(
        &mut self,
        entries: impl IntoIterator<Item = &'e mut u64>,
        flags: u64,
        length: u64,
    ) -> bool {
        let mut used = entries.into_iter().filter(|entry| **entry != 0);
        used.all(|entry| {
            let at = *entry & !flags;
            if *entry & flags != flags || at & !OFFSET != 0 || !at.is_multiple_of(CLUSTER) {
                return false;
            }
            if at / CLUSTER >= length {
                *entry = 0;
                return true;
            }
            self.set(at / CLUSTER)
        })
    }
}
