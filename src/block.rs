//! Random access to the bytes of a disk, and cursors over a part of it.
//!
//! [`BlockRead`] cannot write: code that gets only that cannot change the disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use rustix::fs::{Advice, SeekFrom as Offset, fadvise, seek};
use rustix::io::Errno;

use crate::threads::joined;

/// The alignment of memory for writes past the page cache.
pub(crate) const ALIGN: usize = 4096;

/// Read-only access to a disk of fixed size.
pub trait BlockRead: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Fills `buf` from `offset`; reading past the end is an error.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Announces that these ranges will be read, in this order.
    fn expect(&self, _ranges: &[Range<u64>]) {}
}

/// Write access to a disk of fixed size.
pub trait BlockWrite: BlockRead {
    /// Writes all of `data` at `offset`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Writes several runs of bytes, each at its offset. After an error any of them may be written.
    fn write_runs(&self, runs: &BTreeMap<u64, Vec<u8>>) -> io::Result<()> {
        let mut runs = runs.iter();
        runs.try_for_each(|(offset, data)| self.write_at(*offset, data))
    }
    /// Makes a range read as zeroes, deallocating it if the format supports that.
    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes all completed writes durable.
    fn flush(&self) -> io::Result<()>;
    /// Starts to make a range durable, so that a flush has less to wait for.
    fn start_writeback(&self, _offset: u64, _len: u64) {}
}

/// Makes the kernel start to write that range of a file to its device. If that is impossible, a
/// flush does all of it.
pub(crate) fn start_writeback(file: &File, offset: u64, len: u64) {
    // It starts writing dirty pages without waiting; `sync_file_range` has no safe binding.
    let _ = fadvise(file, offset, NonZeroU64::new(len), Advice::DontNeed);
}

/// Passes the ranges of a part of a file that have data to `found`.
pub(crate) fn file_data(
    file: &File,
    part: Range<u64>,
    found: &mut dyn FnMut(Range<u64>),
) -> io::Result<()> {
    let (mut at, size) = (part.start, part.end);
    while at < size {
        let start = match seek(file, Offset::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            // The file system does not report holes: all of it may be data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(e) => return Err(e.into()),
        };
        if start >= size {
            return Ok(());
        }
        let end = match seek(file, Offset::Hole(start)) {
            Ok(end) => end.min(size),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => size,
            Err(e) => return Err(e.into()),
        };
        if end <= start {
            return Ok(());
        }
        found(start..end);
        at = end;
    }
    Ok(())
}

/// Whether all bytes are zero. Compares block by block, which uses `memcmp`.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    const ZEROES: [u8; 4096] = [0; 4096];
    let blocks = bytes.chunks(ZEROES.len());
    blocks.into_iter().all(|b| *b == ZEROES[..b.len()])
}

/// A disk in memory, for tests.
#[cfg(test)]
impl BlockRead for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        buf.copy_from_slice(&self[offset as usize..][..buf.len()]);
        Ok(())
    }
}

/// The size from which two threads read in parallel.
const LARGE: usize = 4 << 20;

/// A raw image file or block device, opened directly.
pub struct FileDisk {
    file: File,
    size: u64,
}

impl FileDisk {
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::from_file(File::open(path)?)
    }

    pub fn open_rw(path: &Path) -> io::Result<Self> {
        Self::from_file(File::options().read(true).write(true).open(path)?)
    }

    pub fn from_file(mut file: File) -> io::Result<Self> {
        // Seeking works for block devices too, where metadata().len() is 0.
        let size = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, size })
    }
}

impl BlockRead for FileDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if buf.len() <= LARGE {
            return self.file.read_exact_at(buf, offset);
        }
        // Copying a hive out of the page cache takes longer than its processing.
        let half = buf.len() / 2;
        let (first, second) = buf.split_at_mut(half);
        thread::scope(|scope| {
            let second = thread::Builder::new().spawn_scoped(scope, || {
                self.file.read_exact_at(second, offset + half as u64)
            })?;
            let first = self.file.read_exact_at(first, offset);
            first.and(joined(second.join()))
        })
    }
}

impl BlockWrite for FileDisk {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len() as u64, self.size)?;
        self.file.write_all_at(data, offset)
    }

    fn zero_at(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        check_range(offset, len, self.size)?;
        let zeroes = vec![0u8; len.min(1 << 20) as usize];
        while len > 0 {
            let n = len.min(zeroes.len() as u64);
            self.file.write_all_at(&zeroes[..n as usize], offset)?;
            offset += n;
            len -= n;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Refuses a range that does not lie inside `size` bytes.
pub fn check_range(offset: u64, len: u64, size: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("range {offset}+{len} is outside the disk of {size} bytes"),
        )),
    }
}

/// A `Read + Seek` (and `Write`, over a [`BlockWrite`]) cursor over `start..start + len` of a disk.
pub struct Window<D: ?Sized> {
    disk: Arc<D>,
    start: u64,
    len: u64,
    pos: u64,
}

impl<D: BlockRead + ?Sized> Window<D> {
    /// Creates a window; its part outside the disk is cut off.
    pub fn new(disk: Arc<D>, start: u64, len: u64) -> Self {
        let len = len.min(disk.size().saturating_sub(start));
        Self {
            disk,
            start,
            len,
            pos: 0,
        }
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn available(&self, want: usize) -> usize {
        (want as u64).min(self.len.saturating_sub(self.pos)) as usize
    }
}

impl<D: BlockRead + ?Sized> Read for Window<D> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.available(buf.len());
        if n > 0 {
            self.disk.read_at(self.start + self.pos, &mut buf[..n])?;
            self.pos += n as u64;
        }
        Ok(n)
    }
}

impl<D: BlockRead + ?Sized> Seek for Window<D> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(n) => Some(n),
            SeekFrom::End(d) => self.len.checked_add_signed(d),
            SeekFrom::Current(d) => self.pos.checked_add_signed(d),
        };
        self.pos = target.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "seek to a negative position")
        })?;
        Ok(self.pos)
    }
}

impl<D: BlockWrite + ?Sized> Write for Window<D> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let n = self.available(data.len());
        if n > 0 {
            self.disk.write_at(self.start + self.pos, &data[..n])?;
            self.pos += n as u64;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk.flush()
    }
}
