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
//!
//! A cluster of which all bytes are the same takes no place of its own ([`super::fill`]).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::direct::DirectFile;
use super::empty::{CLUSTER, PER_ENTRY, can_create, first_free, header};
use super::fill::byte_of;
use super::mapping::{ClusterPlace, Mapping, Run, filled_with};
use super::qcow2::Packed;
use crate::block::{BlockRead, BlockWrite, check_range};
use crate::transfer::Extents;

/// A qcow2 that is being filled.
pub(super) struct Qcow2Writer {
    file: DirectFile,
    size: u64,
    tables: Mutex<Mapping>,
}

/// A part of a request within one cluster of the disk.
#[derive(Clone)]
struct Part {
    cluster: u64,
    /// The offset of the part in that cluster.
    inside: u64,
    range: Range<usize>,
}

impl Part {
    fn add_to(&self, runs: &mut Vec<Run>, host: u64) {
        Run::add(runs, self.range.clone(), host + self.inside);
    }

    fn is_whole(&self) -> bool {
        self.range.len() as u64 == CLUSTER
    }
}

/// The parts of a request.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = Part> {
    let end = offset + len as u64;
    let clusters = offset / CLUSTER..end.div_ceil(CLUSTER);
    clusters.map(move |cluster| {
        let start = offset.max(cluster * CLUSTER);
        let stop = end.min((cluster + 1) * CLUSTER);
        Part {
            cluster,
            inside: start % CLUSTER,
            range: (start - offset) as usize..(stop - offset) as usize,
        }
    })
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

    /// The runs of a range that have a place of their own. The others are passed to `other`.
    fn runs(
        &self,
        offset: u64,
        len: usize,
        other: &mut dyn FnMut(&Part, Option<Packed>) -> io::Result<()>,
    ) -> io::Result<Vec<Run>> {
        check_range(offset, len as u64, self.size)?;
        let mut tables = self.lock();
        let mut runs = Vec::new();
        for part in parts(offset, len) {
            match tables.place(self.file.file(), part.cluster)? {
                ClusterPlace::At(host) => part.add_to(&mut runs, host),
                ClusterPlace::Filled(data) => other(&part, Some(data))?,
                ClusterPlace::Nothing => other(&part, None)?,
            }
        }
        Ok(runs)
    }

    /// Assigns clusters of the file to data, and returns what is to be written there.
    fn allocate(&self, offset: u64, data: &[u8]) -> io::Result<Vec<Run>> {
        check_range(offset, data.len() as u64, self.size)?;
        let bytes = parts(offset, data.len()).map(|part| byte_of(&data[part.range]));
        let bytes: Vec<_> = bytes.collect();
        let (mut tables, file) = (self.lock(), self.file.file());
        let mut runs = Vec::new();
        for (part, byte) in parts(offset, data.len()).zip(bytes) {
            if let Some(byte) = byte
                && tables.fill(file, part.cluster, byte)?
            {
                continue;
            }
            let host = tables.allocate(file, part.cluster, part.is_whole())?;
            part.add_to(&mut runs, host);
        }
        Ok(runs)
    }
}

impl BlockRead for Qcow2Writer {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let runs = self.runs(offset, buf.len(), &mut |part, filled| {
            let byte = filled.map(|data| filled_with(self.file.file(), data));
            buf[part.range.clone()].fill(byte.transpose()?.unwrap_or_default());
            Ok(())
        })?;
        for run in runs {
            // The last cluster of the file may be written in part.
            self.file.read_at(&mut buf[run.range], run.host)?;
        }
        Ok(())
    }
}

impl BlockWrite for Qcow2Writer {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        for run in self.allocate(offset, data)? {
            self.file.write_all_at(&data[run.range], run.host)?;
        }
        Ok(())
    }

    fn zero_at(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        check_range(offset, len, self.size)?;
        while len > 0 {
            let now = len.min(PER_ENTRY) as usize;
            let mut filled = Vec::new();
            let mut runs = self.runs(offset, now, &mut |part, data| {
                filled.extend(data.map(|data| (part.clone(), data)));
                Ok(())
            })?;
            let file = self.file.file();
            for (part, data) in filled {
                match part.is_whole() {
                    true => self.lock().empty(file, part.cluster, data)?,
                    false => {
                        let host = self.lock().allocate(file, part.cluster, false)?;
                        part.add_to(&mut runs, host);
                    }
                }
            }
            for run in runs {
                self.file.zero_at(run.host, run.range.len() as u64)?;
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
        let runs = self.runs(offset, len as usize, &mut |_, _| Ok(()));
        for run in runs.unwrap_or_default() {
            self.file.start_writeback(run.host, run.range.len() as u64);
        }
    }
}

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
