//! [`Qcow2Writer`]: writes the qcow2 of a copy without a storage daemon.
//!
//! Specification: `docs/interop/qcow2.rst` of QEMU. The image was created by [`super::empty`] and
//! grows at its end: a cluster of the file is assigned to a cluster of the disk when that is first
//! written. Tables are kept in memory and written by a flush, or when there are many.
//!
//! A flush may write in any order: ranges that a killed run has written and not recorded are copied
//! again ([`crate::transfer`]). A reference count that was not written would let QEMU use a cluster
//! twice. [`Qcow2Writer::open`] corrects that by recounting from the tables. `qemu-img check`
//! verifies every result.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::clusters::{Clusters, read_table, write_table};
use super::direct::DirectFile;
use super::empty::{CLUSTER, COUNT_BLOCK, LEVEL_1, PER_ENTRY, can_create, first_free, header};
use super::qcow2::{COPIED, OFFSET};
use crate::block::{BlockRead, BlockWrite, check_range};

/// Entries of a second-level table, and of the table of counts.
const ENTRIES: u64 = CLUSTER / 8;
/// Tables in memory, 8 MiB: 64 GiB of a disk. Those of a copy are contiguous.
const MOST_TABLES: usize = 128;

/// A qcow2 that is being filled.
pub(super) struct Qcow2Writer {
    file: DirectFile,
    size: u64,
    tables: Mutex<Tables>,
}

struct Tables {
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

/// A part of a request that is contiguous in the file, or unallocated.
struct Part {
    host: Option<u64>,
    len: usize,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

impl Qcow2Writer {
    /// Opens an image that a copy continues to fill. `None` if hyper2kvm has not written it; QEMU
    /// may still support it.
    pub(super) fn open(file: File, size: u64) -> io::Result<Option<Self>> {
        if !can_create(size) || size == 0 {
            return Ok(None);
        }
        let entries = size.next_multiple_of(512).div_ceil(PER_ENTRY);
        let expected = header(size.next_multiple_of(512), entries);
        let mut found = vec![0; expected.len()];
        if file.metadata()?.len() < first_free(entries) {
            return Ok(None);
        }
        file.read_exact_at(&mut found, 0)?;
        if found != expected {
            return Ok(None);
        }
        let Some(tables) = Tables::read(&file, entries)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            file: DirectFile::new(file),
            size,
            tables: Mutex::new(tables),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads bytes of the file; its last cluster may be written in part.
    fn read_file(&self, mut buf: &mut [u8], mut at: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.file.file().read_at(buf, at) {
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    buf = &mut buf[n..];
                    at += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The offsets of a range in the file; `allocate` assigns clusters to the parts without one.
    fn parts(&self, offset: u64, len: usize, allocate: bool) -> io::Result<Vec<Part>> {
        check_range(offset, len as u64, self.size)?;
        let mut tables = self.lock();
        let mut parts: Vec<Part> = Vec::new();
        let (mut at, end) = (offset, offset + len as u64);
        while at < end {
            let inside = at % CLUSTER;
            let len = (CLUSTER - inside).min(end - at) as usize;
            let host = tables.place(self.file.file(), at / CLUSTER, allocate)?;
            let host = host.map(|cluster| cluster + inside);
            match parts.last_mut() {
                Some(last) if last.host.map(|at| at + last.len as u64) == host => last.len += len,
                _ => parts.push(Part { host, len }),
            }
            at += len as u64;
        }
        Ok(parts)
    }
}

impl BlockRead for Qcow2Writer {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut rest = buf;
        for part in self.parts(offset, rest.len(), false)? {
            let (now, later) = rest.split_at_mut(part.len);
            match part.host {
                Some(host) => self.read_file(now, host)?,
                None => now.fill(0),
            }
            rest = later;
        }
        Ok(())
    }
}

impl BlockWrite for Qcow2Writer {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut rest = data;
        for part in self.parts(offset, data.len(), true)? {
            let host = part
                .host
                .ok_or_else(|| invalid("a cluster without a place"))?;
            let (now, later) = rest.split_at(part.len);
            self.file.write_all_at(now, host)?;
            rest = later;
        }
        Ok(())
    }

    fn zero_at(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        check_range(offset, len, self.size)?;
        while len > 0 {
            let now = len.min(PER_ENTRY) as usize;
            for part in self.parts(offset, now, false)? {
                if let Some(host) = part.host {
                    self.file.zero_at(host, part.len as u64)?;
                }
            }
            offset += now as u64;
            len -= now as u64;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.lock().write(self.file.file())?;
        self.file.sync_data()
    }

    fn start_writeback(&self, offset: u64, len: u64) {
        for part in self.parts(offset, len as usize, false).unwrap_or_default() {
            if let Some(host) = part.host {
                self.file.start_writeback(host, part.len as u64);
            }
        }
    }
}

impl Tables {
    /// Reads the tables, and recounts the references of the file. `None` if they differ from the
    /// form written here.
    fn read(file: &File, entries: u64) -> io::Result<Option<Self>> {
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
    fn place(&mut self, file: &File, cluster: u64, allocate: bool) -> io::Result<Option<u64>> {
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
    fn write(&mut self, file: &File) -> io::Result<()> {
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

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
