//! [`Qcow2Writer`]: writes the qcow2 of a copy without a storage daemon.
//!
//! Specification: `docs/interop/qcow2.rst` of QEMU. The image was created by [`super::empty`] and
//! grows at its end. A cluster of the file is assigned to a cluster of the disk when that is first
//! written ([`super::mapping`]).
//!
//! A flush may write in any order: ranges that a killed run has written and not recorded are copied
//! again ([`crate::transfer`]). A reference count that was not written would let QEMU use a cluster
//! twice. [`Qcow2Writer::open`] corrects that by recounting from the tables. `qemu-img check`
//! verifies every result.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::direct::DirectFile;
use super::empty::{CLUSTER, PER_ENTRY, can_create, first_free, header};
use super::mapping::{Mapping, invalid};
use crate::block::{BlockRead, BlockWrite, check_range};
use crate::transfer::Extents;

/// A qcow2 that is being filled.
pub(super) struct Qcow2Writer {
    file: DirectFile,
    size: u64,
    tables: Mutex<Mapping>,
}

/// A part of a request that is contiguous in the file, or unallocated.
struct Part {
    host: Option<u64>,
    len: usize,
}

/// Reads the tables of an image that a copy continues to fill. One with `kept` is compressed.
pub(super) fn open(file: &File, size: u64, kept: Option<&Extents>) -> io::Result<Option<Mapping>> {
    if !can_create(size) || size == 0 {
        return Ok(None);
    }
    let entries = size.next_multiple_of(512).div_ceil(PER_ENTRY);
    let expected = header(size.next_multiple_of(512), entries, kept.is_some());
    let mut found = vec![0; expected.len()];
    if file.metadata()?.len() < first_free(entries) {
        return Ok(None);
    }
    file.read_exact_at(&mut found, 0)?;
    if found != expected {
        return Ok(None);
    }
    Mapping::read(file, entries, kept)
}

impl Qcow2Writer {
    /// Opens an image that a copy continues to fill. `None` if hyper2kvm has not written it; QEMU
    /// may still support it.
    pub(super) fn open(file: File, size: u64) -> io::Result<Option<Self>> {
        let mapping = open(&file, size, None)?;
        Ok(mapping.map(|mapping| Self {
            file: DirectFile::new(file),
            size,
            tables: Mutex::new(mapping),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Mapping> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
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
                // The last cluster of the file may be written in part.
                Some(host) => self.file.read_at(now, host)?,
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

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
