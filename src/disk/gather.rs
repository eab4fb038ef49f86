//! Gathers small writes. A file system driver writes the same few records again and again. Every
//! write would be a round trip to the storage daemon.
//!
//! Written bytes are kept in memory. They are passed on in order of offset, with neighbours joined,
//! on a [`BlockWrite::flush`] or when there are too many. Reads see them. A failure is then
//! reported by the call that passed the bytes on, not by the original write. Bytes that could not
//! be passed on are kept: the next attempt fails again instead of silently leaving them out.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::block::{BlockRead, BlockWrite, check_range};

/// The number of gathered bytes at which they are passed on.
const LIMIT: u64 = 8 << 20;

#[derive(Debug)]
pub struct Gathered<D> {
    disk: D,
    size: u64,
    runs: Mutex<Runs>,
}

/// The written bytes by offset. Runs neither overlap nor touch.
#[derive(Debug, Default)]
struct Runs {
    by_start: BTreeMap<u64, Vec<u8>>,
    bytes: u64,
}

impl Runs {
    fn write(&mut self, offset: u64, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let end = offset + data.len() as u64;
        // A run that begins at or before the new one and reaches it absorbs it.
        let before = self.by_start.range(..=offset).next_back();
        let start = match before {
            Some((&at, run)) if at + run.len() as u64 >= offset => at,
            _ => offset,
        };
        let mut run = self.by_start.remove(&start).unwrap_or_default();
        self.bytes -= run.len() as u64;
        let inside = (offset - start) as usize;
        let shared = data.len().min(run.len() - inside);
        run[inside..inside + shared].copy_from_slice(&data[..shared]);
        run.extend_from_slice(&data[shared..]);
        // Runs that it now reaches are older: only their bytes behind the new ones remain.
        while let Some((&at, _)) = self.by_start.range(offset..=end).next() {
            let older = self.by_start.remove(&at).unwrap_or_default();
            self.bytes -= older.len() as u64;
            let hidden = (start + run.len() as u64 - at).min(older.len() as u64);
            run.extend_from_slice(&older[hidden as usize..]);
        }
        self.bytes += run.len() as u64;
        self.by_start.insert(start, run);
    }

    /// Puts the written bytes over those read from the disk.
    fn apply(&self, offset: u64, buf: &mut [u8]) {
        let end = offset + buf.len() as u64;
        let first = self.by_start.range(..=offset).next_back();
        let rest = self.by_start.range(offset.saturating_add(1)..);
        for (&at, run) in first.into_iter().chain(rest) {
            if at >= end {
                break;
            }
            let (from, to) = (at.max(offset), (at + run.len() as u64).min(end));
            if from < to {
                buf[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&run[(from - at) as usize..(to - at) as usize]);
            }
        }
    }

    fn hand_on(&mut self, disk: &impl BlockWrite) -> io::Result<()> {
        disk.write_runs(&self.by_start)?;
        *self = Self::default();
        Ok(())
    }
}

impl<D: BlockWrite> Gathered<D> {
    pub fn new(disk: D) -> Self {
        Self {
            size: disk.size(),
            disk,
            runs: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Runs> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: BlockWrite> BlockRead for Gathered<D> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        let runs = self.lock();
        self.disk.read_at(offset, buf)?;
        runs.apply(offset, buf);
        Ok(())
    }
}

impl<D: BlockWrite> BlockWrite for Gathered<D> {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len() as u64, self.size)?;
        let mut runs = self.lock();
        if data.len() as u64 >= LIMIT {
            runs.hand_on(&self.disk)?;
            return self.disk.write_at(offset, data);
        }
        runs.write(offset, data);
        if runs.bytes >= LIMIT {
            runs.hand_on(&self.disk)?;
        }
        Ok(())
    }

    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.size)?;
        let mut runs = self.lock();
        runs.hand_on(&self.disk)?;
        self.disk.zero_at(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.lock().hand_on(&self.disk)?;
        self.disk.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk in memory that records its writes and can be made to fail.
    struct Memory {
        data: Mutex<Vec<u8>>,
        writes: Mutex<Vec<(u64, usize)>>,
        fail: Mutex<bool>,
    }

    impl Memory {
        fn new(size: usize) -> Self {
            Self {
                data: Mutex::new(vec![0; size]),
                writes: Mutex::default(),
                fail: Mutex::new(false),
            }
        }
    }

    impl BlockRead for Memory {
        fn size(&self) -> u64 {
            self.data.lock().unwrap().len() as u64
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            let at = offset as usize;
            buf.copy_from_slice(&self.data.lock().unwrap()[at..at + buf.len()]);
            Ok(())
        }
    }

    impl BlockWrite for Memory {
        fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            if *self.fail.lock().unwrap() {
                return Err(io::Error::other("told to fail"));
            }
            let at = offset as usize;
            self.data.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
            self.writes.lock().unwrap().push((offset, data.len()));
            Ok(())
        }
        fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
            self.write_at(offset, &vec![0; len as usize])
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn neighbours_go_together_and_in_order() {
        let disk = Gathered::new(Memory::new(10_000));
        for (offset, len) in [
            (5000, 10),
            (1000, 10),
            (1010, 10),
            (990, 10),
            (1005, 3),
            (5005, 20),
        ] {
            disk.write_at(offset, &vec![1; len]).unwrap();
        }
        assert!(disk.disk.writes.lock().unwrap().is_empty());
        assert!(disk.write_at(9_999, b"xx").is_err(), "outside");
        disk.flush().unwrap();
        assert_eq!(*disk.disk.writes.lock().unwrap(), [(990, 30), (5000, 25)]);
        assert_eq!(disk.lock().bytes, 0);
        disk.write_at(0, &[]).unwrap();
        disk.flush().unwrap();
    }

    #[test]
    fn same_as_the_disk_whatever_is_done() {
        const SIZE: u64 = 3000;
        let disk = Gathered::new(Memory::new(SIZE as usize));
        let mut want = vec![0; SIZE as usize];
        let mut random = 12345u64;
        let mut next = |limit: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) % limit
        };
        for round in 0..20_000 {
            let offset = next(SIZE);
            let len = next(120).min(SIZE - offset);
            let range = offset as usize..(offset + len) as usize;
            match next(200) {
                0 => disk.flush().unwrap(),
                1 => {
                    disk.zero_at(offset, len).unwrap();
                    want[range].fill(0);
                }
                2..80 => {
                    let data = vec![round as u8; len as usize];
                    disk.write_at(offset, &data).unwrap();
                    want[range].copy_from_slice(&data);
                }
                _ => {
                    let mut buf = vec![0; len as usize];
                    disk.read_at(offset, &mut buf).unwrap();
                    assert_eq!(buf, want[range], "{round}");
                }
            }
            let runs = disk.lock();
            let kept: u64 = runs.by_start.values().map(|r| r.len() as u64).sum();
            assert_eq!(runs.bytes, kept);
            let mut end = None;
            for (&at, run) in &runs.by_start {
                assert!(end.is_none_or(|end| end < at), "{round}: runs touch");
                end = Some(at + run.len() as u64);
            }
        }
        disk.flush().unwrap();
        assert_eq!(*disk.disk.data.lock().unwrap(), want);
    }

    #[test]
    fn it_does_not_grow() {
        let size = 3 * LIMIT;
        let disk = Gathered::new(Memory::new(size as usize));
        for i in 0..size / 4096 {
            disk.write_at(i * 4096, &[i as u8; 4096]).unwrap();
            assert!(disk.lock().bytes < LIMIT);
        }
        assert_eq!(disk.disk.writes.lock().unwrap().len(), 3);
        disk.write_at(5, &vec![7; LIMIT as usize]).unwrap();
        assert_eq!(disk.lock().bytes, 0);
    }

    #[test]
    fn what_failed_is_kept() {
        let disk = Gathered::new(Memory::new(100));
        disk.write_at(10, b"abc").unwrap();
        *disk.disk.fail.lock().unwrap() = true;
        assert!(disk.flush().is_err() && disk.flush().is_err());
        *disk.disk.fail.lock().unwrap() = false;
        disk.flush().unwrap();
        assert_eq!(disk.disk.data.lock().unwrap()[10..13], *b"abc");
    }
}
