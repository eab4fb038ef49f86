//! [`Mapping`]: which cluster of a disk is where in a qcow2 that is being filled.
//!
//! Tables are kept in memory and written by a flush, or when there are many.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::clusters::{Clusters, read_table, write_table};
use super::empty::{CLUSTER, COUNT_BLOCK, LEVEL_1, first_free};
use super::qcow2::{COPIED, OFFSET};

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
    clusters: Clusters,
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
    /// form written here.
    pub(super) fn read(file: &File, entries: u64) -> io::Result<Option<Self>> {
        let length = file.metadata()?.len().div_ceil(CLUSTER);
        file.set_len(length * CLUSTER)?;
        let mut tables = Self {
            level_1: read_table(file, LEVEL_1, entries)?,
            level_1_changed: false,
            level_2: BTreeMap::new(),
            clusters: Clusters::of(file, CLUSTER, length)?,
        };
        let mut used = Used(vec![0; length.div_ceil(64) as usize]);
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
            if !used.take(&mut entries, COPIED, length) {
                return Ok(None);
            }
            if entries != before {
                let changed = true;
                tables.level_2.insert(i, Table { entries, changed });
            }
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
                counts.extend(u16::from(used.has(cluster)).to_be_bytes());
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

    /// The offset in the file of a cluster of the disk.
    pub(super) fn place(
        &mut self,
        file: &File,
        cluster: u64,
        allocate: bool,
    ) -> io::Result<Option<u64>> {
        let (i, entry) = ((cluster / ENTRIES) as usize, (cluster % ENTRIES) as usize);
        let Some(table) = self.table(file, i, allocate)? else {
            return Ok(None);
        };
        let at = table.entries[entry] & OFFSET;
        if at != 0 || !allocate {
            return Ok(Some(at).filter(|at| *at != 0));
        }
        let at = self.clusters.take()?;
        if let Some(table) = self.table(file, i, true)? {
            table.entries[entry] = at | COPIED;
            table.changed = true;
        }
        Ok(Some(at))
    }

    /// Writes all changes.
    pub(super) fn write(&mut self, file: &File) -> io::Result<()> {
        self.clusters.write(file)?;
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

/// One bit for each cluster of the file.
struct Used(Vec<u64>);

impl Used {
    fn has(&self, cluster: u64) -> bool {
        let word = self.0.get((cluster / 64) as usize).copied();
        word.unwrap_or_default() >> (cluster % 64) & 1 == 1
    }

    /// Marks a cluster. Returns whether it is new.
    fn set(&mut self, cluster: u64) -> bool {
        let new = !self.has(cluster);
        if let Some(word) = self.0.get_mut((cluster / 64) as usize) {
            *word |= 1 << (cluster % 64);
        }
        new
    }

    /// Marks the clusters of the entries. An entry that leads past the end is dropped: no flush has
    /// ended since it was written. `false` if the entries differ from the form written here.
    fn take(&mut self, entries: &mut [u64], flags: u64, length: u64) -> bool {
        entries.iter_mut().filter(|e| **e != 0).all(|entry| {
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
