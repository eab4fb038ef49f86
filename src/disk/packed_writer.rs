//! [`PackedWriter`]: writes the compressed qcow2 of a copy without a storage daemon.
//!
//! Each cluster of the disk is written once, and as a whole. Compressed clusters follow each other
//! in the file; a cluster that does not become smaller is written as it is. Specification: "Compressed
//! Clusters Descriptor" in `docs/interop/qcow2.rst` of QEMU.
//!
//! After a kill the clusters that were recorded stay, and the others are dropped
//! ([`super::mapping`]). Their data may be missing, and they are copied again.

use std::fs::File;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use zstd::bulk::{Compressor, Decompressor};

use super::direct::DirectFile;
use super::empty::{CLUSTER, CLUSTER_BITS};
use super::mapping::{Mapping, Run, invalid, packed};
use super::qcow2::{COPIED, OFFSET, Packed};
use super::writer;
use crate::block::{BlockRead, BlockWrite, check_range};
use crate::transfer::Extents;

/// The level of zstd that QEMU uses.
const LEVEL: i32 = 3;
const CLUSTER_LEN: usize = CLUSTER as usize;

/// A compressed qcow2 that is being filled.
pub(super) struct PackedWriter {
    file: DirectFile,
    size: u64,
    tables: Mutex<Mapping>,
    /// One for each thread that has written.
    packers: Mutex<Vec<Packer>>,
}

/// Compresses the clusters of a write.
struct Packer {
    context: Compressor<'static>,
    /// The compressed clusters, one directly after the other.
    bytes: Vec<u8>,
    used: usize,
}

impl Packer {
    fn new() -> io::Result<Self> {
        Ok(Self {
            context: Compressor::new(LEVEL)?,
            bytes: Vec::new(),
            used: 0,
        })
    }

    /// The compressed length of each cluster; `None` for one that does not become smaller.
    fn pack(&mut self, data: &[u8]) -> Vec<Option<u64>> {
        self.used = 0;
        self.bytes
            .resize(data.len().next_multiple_of(CLUSTER_LEN), 0);
        data.chunks(CLUSTER_LEN)
            .map(|cluster| {
                let room = &mut self.bytes[self.used..][..CLUSTER_LEN - 1];
                let whole: Vec<u8>;
                let cluster = match cluster.len() {
                    CLUSTER_LEN => cluster,
                    // The end of the disk.
                    len => {
                        whole = [cluster, &vec![0; CLUSTER_LEN - len]].concat();
                        &whole
                    }
                };
                // The only error is that there is too little room.
                let len = self.context.compress_to_buffer(cluster, room).ok()?;
                self.used += len;
                Some(len as u64)
            })
            .collect()
    }
}

/// What is written where.
struct Places {
    /// The beginning of the compressed data.
    packed: Option<u64>,
    /// What is written as it is.
    whole: Vec<Run>,
}

impl PackedWriter {
    /// Opens an image that a copy continues to fill, of which `kept` is recorded. `None` if
    /// hyper2kvm has not written it; QEMU may still support it.
    pub(super) fn open(file: File, size: u64, kept: &Extents) -> io::Result<Option<Self>> {
        // Recorded is everything up to the end of the disk, which may be within a cluster.
        let kept = kept.on_grains(CLUSTER, u64::MAX);
        let mapping = writer::open(&file, size, Some(&kept))?;
        Ok(mapping.map(|mapping| Self {
            file: DirectFile::new(file),
            size,
            tables: Mutex::new(mapping),
            packers: Mutex::default(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Mapping> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn packers(&self) -> MutexGuard<'_, Vec<Packer>> {
        self.packers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocates the places of clusters with these compressed lengths.
    fn place(&self, first: u64, lens: &[Option<u64>]) -> io::Result<Places> {
        let mut tables = self.lock();
        for i in 0..lens.len() as u64 {
            if tables.entry(self.file.file(), first + i)? != 0 {
                return Err(invalid("a compressed cluster is written once"));
            }
        }
        let packed_lens: Vec<u64> = lens.iter().copied().flatten().collect();
        // All of them are allocated before a table is written, with the counts as they are then.
        let mut packed = tables.pack(&packed_lens)?.into_iter();
        let mut places = Places {
            packed: packed.as_slice().first().map(|data| data.at),
            whole: Vec::new(),
        };
        let mut entries = Vec::with_capacity(lens.len());
        for (i, len) in lens.iter().enumerate() {
            if let Some(data) = len.and_then(|_| packed.next()) {
                entries.push(data.entry(CLUSTER_BITS));
                continue;
            }
            let at = tables.clusters.take()?;
            entries.push(at | COPIED);
            let range = i * CLUSTER_LEN..(i + 1) * CLUSTER_LEN;
            Run::add(&mut places.whole, range, at);
        }
        for (cluster, entry) in (first..).zip(entries) {
            tables.set(self.file.file(), cluster, entry)?;
        }
        Ok(places)
    }

    /// Reads a cluster of the disk.
    fn cluster(&self, cluster: u64) -> io::Result<Vec<u8>> {
        let entry = self.lock().entry(self.file.file(), cluster)?;
        let read = |at, len| {
            let mut bytes = vec![0; len];
            self.file.read_at(&mut bytes, at).map(|()| bytes)
        };
        match packed(entry) {
            None if entry & OFFSET == 0 => Ok(vec![0; CLUSTER_LEN]),
            None => read(entry & OFFSET, CLUSTER_LEN),
            Some(Packed { at, len }) => {
                let bytes = read(at, len as usize)?;
                // Other data may follow in the last sector.
                let frame = zstd::zstd_safe::find_frame_compressed_size(&bytes)
                    .map_err(|_| invalid("compressed data without an end"))?;
                Decompressor::new()?.decompress(&bytes[..frame], CLUSTER_LEN)
            }
        }
    }
}

impl BlockRead for PackedWriter {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let inside = (at % CLUSTER) as usize;
            let bytes = self.cluster(at / CLUSTER)?;
            let (now, later) = rest.split_at_mut((CLUSTER_LEN - inside).min(rest.len()));
            now.copy_from_slice(&bytes[inside..][..now.len()]);
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }
}

impl BlockWrite for PackedWriter {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len() as u64, self.size)?;
        let end = offset + data.len() as u64;
        if !offset.is_multiple_of(CLUSTER) || !(end.is_multiple_of(CLUSTER) || end == self.size) {
            return Err(invalid("a compressed cluster is written as a whole"));
        }
        let packer = self.packers().pop();
        let mut packer = packer.map_or_else(Packer::new, Ok)?;
        let lens = packer.pack(data);
        let places = self.place(offset / CLUSTER, &lens)?;
        if let Some(at) = places.packed {
            let bytes = &packer.bytes[..packer.used];
            self.file.write_all_at(bytes, at)?;
            self.file.start_writeback(at, bytes.len() as u64);
        }
        self.packers().push(packer);
        for Run { range, host } in places.whole {
            let bytes = &data[range.start..range.end.min(data.len())];
            self.file.write_all_at(bytes, host)?;
            self.file.start_writeback(host, bytes.len() as u64);
        }
        Ok(())
    }

    /// Clusters that were never written are zero, and no other can become so.
    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.size)?;
        for cluster in offset / CLUSTER..(offset + len).div_ceil(CLUSTER) {
            if self.lock().entry(self.file.file(), cluster)? != 0 {
                return Err(invalid("a compressed cluster is written once"));
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.lock().write(self.file.file())?;
        self.file.sync_data()
    }
}

#[cfg(test)]
#[path = "packed_writer_tests.rs"]
mod tests;
