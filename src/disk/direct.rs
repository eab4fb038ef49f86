//! [`DirectFile`]: the file or device that receives a copy, written past the page cache if
//! possible.
//!
//! Data written directly is on the device when the write ends. Then a flush has nothing left to
//! wait for. No memory of the host is spent on data that nobody reads soon. Direct writes consist
//! of whole blocks ([`BLOCK`]). The rest goes through the page cache, and so does everything on a
//! file system without direct I/O. A block is written with one method at a time, so cached data
//! never overlaps data written past the cache.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, OFlags, fallocate};

use crate::block::{ALIGN, BlockRead, BlockWrite, check_range, start_writeback};
use crate::tool::pass;

/// The alignment of direct writes: more than any device requires, and a cluster of a qcow2.
const BLOCK: u64 = 64 << 10;

#[derive(Debug)]
pub(super) struct DirectFile {
    file: File,
    /// The same file, opened for direct I/O.
    direct: Option<File>,
    /// Whether the file was opened for direct I/O but refuses such writes.
    refused: AtomicBool,
}

impl DirectFile {
    pub(super) fn new(file: File) -> Self {
        let flags = OFlags::DIRECT.bits().cast_signed();
        let again = File::options()
            .write(true)
            .custom_flags(flags)
            .open(pass::name(&file));
        Self {
            file,
            direct: again.ok(),
            refused: AtomicBool::new(false),
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Reads bytes; those past the end of the file are zero.
    pub(super) fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        read_at(&self.file, buf, at)
    }

    pub(super) fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let lead = (offset.next_multiple_of(BLOCK) - offset).min(data.len() as u64);
        let (lead, rest) = data.split_at(lead as usize);
        let (blocks, tail) = rest.split_at(rest.len() - rest.len() % BLOCK as usize);
        let mut at = offset;
        for (part, whole) in [(lead, false), (blocks, true), (tail, false)] {
            if !(whole && self.write_direct(part, at)?) {
                self.file.write_all_at(part, at)?;
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes whole blocks past the page cache. Returns `false` if that is impossible.
    fn write_direct(&self, blocks: &[u8], offset: u64) -> io::Result<bool> {
        let aligned = blocks.as_ptr().addr().is_multiple_of(ALIGN);
        let refused = self.refused.load(Ordering::Relaxed);
        let Some(direct) = self.direct.as_ref().filter(|_| aligned && !refused) else {
            return Ok(false);
        };
        match direct.write_all_at(blocks, offset) {
            Ok(()) => Ok(true),
            // Refused by the file system, or by a device with larger sectors than any known one.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                self.refused.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// Makes a range read as zeroes. A hole or a discard is used if that leaves zeroes, otherwise
    /// writes of the device or the kernel.
    pub(super) fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        let discard = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        if [discard, zero]
            .iter()
            .any(|how| fallocate(&self.file, *how, offset, len).is_ok())
        {
            return Ok(());
        }
        let zeroes = vec![0; len.min(1 << 20) as usize];
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let n = (end - at).min(zeroes.len() as u64);
            self.file.write_all_at(&zeroes[..n as usize], at)?;
            at += n;
        }
        Ok(())
    }

    pub(super) fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Starts writing cached data to the device.
    pub(super) fn start_writeback(&self, offset: u64, len: u64) {
        start_writeback(&self.file, offset, len);
    }
}

/// Reads bytes of a file; those past its end are zero.
pub(super) fn read_at(file: &File, mut buf: &mut [u8], mut at: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match file.read_at(buf, at) {
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

/// Writes a new file past the page cache: nobody reads it soon, and the processor has other work in
/// the meantime.
pub(crate) fn write_new(file: File, bytes: &[u8]) -> io::Result<File> {
    let target = DirectFile::new(file);
    target.write_all_at(bytes, 0)?;
    // Data that has to go through the cache is on its way before the flush.
    target.start_writeback(0, bytes.len() as u64);
    Ok(target.file)
}

/// A raw target: its offsets are those of the file or device.
pub(super) struct RawTarget {
    file: DirectFile,
    size: u64,
}

impl RawTarget {
    pub(super) fn new(file: File, size: u64) -> Self {
        let file = DirectFile::new(file);
        Self { file, size }
    }
}

impl BlockRead for RawTarget {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        self.file.file().read_exact_at(buf, offset)
    }
}

impl BlockWrite for RawTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len() as u64, self.size)?;
        self.file.write_all_at(data, offset)
    }

    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.size)?;
        self.file.zero_at(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn start_writeback(&self, offset: u64, len: u64) {
        self.file.start_writeback(offset, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::pattern;

    /// Whether written by direct I/O, through the page cache or by both, the file has the same
    /// contents.
    #[test]
    fn what_is_written_past_the_page_cache_is_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            let mut options = File::options();
            options.read(true).write(true).create_new(true);
            let file = options.open(dir.path().join(name)).unwrap();
            file.set_len(4 << 20).unwrap();
            file
        };
        let (ours, plain) = (DirectFile::new(open("ours")), open("plain"));
        if ours.direct.is_none() {
            // Linux before 6.6 in a directory in memory.
            return crate::skip::skip("direct-io", "no direct I/O in the temporary directory");
        }
        let buffer = pattern((1 << 20) + ALIGN);
        let aligned = buffer.as_ptr().align_offset(ALIGN);
        for (at, len) in [
            (0u64, 1usize << 20),
            (64 << 10, 64 << 10),
            (100, 300_000),
            ((1 << 20) + 4096, (128 << 10) + 512),
            ((2 << 20) - 512, 1024),
            (3 << 20, 1),
        ] {
            // With the alignment of the file, and without.
            for shift in [(at % ALIGN as u64) as usize, 24] {
                let from = aligned + shift;
                let bytes = &buffer[from..(from + len).min(buffer.len())];
                ours.write_all_at(bytes, at).unwrap();
                plain.write_all_at(bytes, at).unwrap();
            }
        }
        ours.zero_at(70_000, 200_000).unwrap();
        plain.write_all_at(&[0; 200_000], 70_000).unwrap();
        ours.sync_data().unwrap();
        let read = |name| std::fs::read(dir.path().join(name)).unwrap();
        assert!(read("ours") == read("plain"));
        assert!(!ours.refused.load(Ordering::Relaxed), "it was used");
    }

    /// A kernel file for numbers returns the error of a file system without direct I/O.
    #[test]
    fn what_cannot_be_written_so_is_written_as_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path);
        let not_so = File::options().write(true).open("/proc/self/oom_score_adj");
        let file = DirectFile {
            file: file.unwrap(),
            direct: Some(not_so.unwrap()),
            refused: AtomicBool::new(false),
        };
        let bytes = pattern((192 << 10) + ALIGN);
        let aligned = bytes.as_ptr().align_offset(ALIGN);
        let bytes = &bytes[aligned..][..192 << 10];
        file.write_all_at(&bytes[..64 << 10], 0).unwrap();
        assert!(file.refused.load(Ordering::Relaxed));
        file.write_all_at(&bytes[64 << 10..], 64 << 10).unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes);
    }
}
