//! A read cache in front of a disk. File systems and hives are read in sectors and clusters. A
//! round trip to the storage daemon for each would cost more than the data.
//!
//! Blocks have 64 KiB, for a disk on another host 16 KiB; the least recently used one is evicted
//! first. Writes go through to the disk immediately and update the blocks they touch. Large reads
//! bypass the cache so that they do not flush it.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::block::{BlockRead, BlockWrite, check_range};

const BLOCK: u64 = 64 << 10;
/// The block size for a disk on another host, where each byte costs: inspection reads a few KiB
/// here and there.
const SMALL_BLOCK: u64 = 16 << 10;
/// The memory for all blocks together.
const MEMORY: u64 = 16 << 20;
/// Blocks read together when a file is read sequentially.
const AHEAD: u64 = 4;
/// Reads of this size and larger are not cached.
const LARGE: usize = 256 << 10;

#[derive(Debug)]
pub struct Cached<D> {
    disk: D,
    size: u64,
    block: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    blocks: HashMap<u64, Block>,
    clock: u64,
}

#[derive(Debug)]
struct Block {
    data: Vec<u8>,
    used: u64,
}

impl<D: BlockRead> Cached<D> {
    pub fn new(disk: D) -> Self {
        Self::with_blocks(disk, BLOCK)
    }

    /// Creates a cache for a disk on another host.
    pub fn of_remote(disk: D) -> Self {
        Self::with_blocks(disk, SMALL_BLOCK)
    }

    fn with_blocks(disk: D, block: u64) -> Self {
        Self {
            size: disk.size(),
            disk,
            block,
            state: Mutex::default(),
        }
    }

    pub fn inner(&self) -> &D {
        &self.disk
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a block from the cache or the disk. If it is read from the disk, the blocks up to
    /// `last` are read too.
    fn block<'a>(&self, state: &'a mut State, index: u64, last: u64) -> io::Result<&'a [u8]> {
        if !state.blocks.contains_key(&index) {
            let wanted = (index..=last).take_while(|i| !state.blocks.contains_key(i));
            let wanted = wanted.count() as u64;
            self.fill(state, index, wanted)?;
        }
        state.clock += 1;
        let used = state.clock;
        let block = state
            .blocks
            .get_mut(&index)
            .ok_or_else(|| io::Error::other("a block vanished from the cache"))?;
        block.used = used;
        Ok(&block.data)
    }

    /// Reads so many blocks, and some more if the preceding one was read too.
    fn fill(&self, state: &mut State, index: u64, wanted: u64) -> io::Result<()> {
        let sequential = index > 0 && state.blocks.contains_key(&(index - 1));
        let wanted = wanted.max(if sequential { AHEAD } else { 1 });
        let start = index * self.block;
        // The last block of a disk is shorter.
        let mut data = vec![0; (self.size - start).min(wanted * self.block) as usize];
        self.disk.read_at(start, &mut data)?;
        let most = (MEMORY / self.block) as usize;
        // The requested block last, so that the others do not evict it.
        for (i, data) in data.chunks(self.block as usize).enumerate().rev() {
            state.insert(index + i as u64, data, most);
        }
        Ok(())
    }
}

impl State {
    /// Adds a block unless it is cached, in place of the least recently used one.
    fn insert(&mut self, index: u64, data: &[u8], most: usize) {
        if self.blocks.contains_key(&index) {
            return;
        }
        if self.blocks.len() >= most {
            let oldest = self.blocks.iter().min_by_key(|(_, b)| b.used);
            if let Some(oldest) = oldest.map(|(&index, _)| index) {
                self.blocks.remove(&oldest);
            }
        }
        self.clock += 1;
        let block = Block {
            data: data.to_vec(),
            used: self.clock,
        };
        self.blocks.insert(index, block);
    }

    fn forget(&mut self, offset: u64, len: u64, block: u64) {
        let range = offset / block..(offset + len).div_ceil(block);
        self.blocks.retain(|index, _| !range.contains(index));
    }
}

/// Splits a range at block borders: index of the block, offset in it, offset in the range, length.
fn parts(offset: u64, len: usize, block: u64) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let inside = (at % block) as usize;
        let n = (block as usize - inside).min(len - done);
        let part = (at / block, inside, done, n);
        done += n;
        Some(part)
    })
}

impl<D: BlockRead> BlockRead for Cached<D> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        if buf.len() >= LARGE {
            return self.disk.read_at(offset, buf);
        }
        let mut state = self.lock();
        let last = (offset + buf.len() as u64).saturating_sub(1) / self.block;
        for (index, inside, done, n) in parts(offset, buf.len(), self.block) {
            let block = self.block(&mut state, index, last)?;
            buf[done..done + n].copy_from_slice(&block[inside..inside + n]);
        }
        Ok(())
    }
}

impl<D: BlockWrite> BlockWrite for Cached<D> {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len() as u64, self.size)?;
        // Held during the write: no reader may fill a block with the old contents.
        let mut state = self.lock();
        if let Err(e) = self.disk.write_at(offset, data) {
            state.forget(offset, data.len() as u64, self.block);
            return Err(e);
        }
        for (index, inside, done, n) in parts(offset, data.len(), self.block) {
            if let Some(block) = state.blocks.get_mut(&index) {
                block.data[inside..inside + n].copy_from_slice(&data[done..done + n]);
            }
        }
        Ok(())
    }

    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.size)?;
        let mut state = self.lock();
        state.forget(offset, len, self.block);
        self.disk.zero_at(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A disk in memory that counts reads and can be made to fail.
    struct Memory {
        data: Mutex<Vec<u8>>,
        reads: AtomicUsize,
        fail: Mutex<bool>,
    }

    impl Memory {
        fn new(size: usize) -> Self {
            Self {
                data: Mutex::new((0..size).map(|i| (i / 251) as u8).collect()),
                reads: AtomicUsize::new(0),
                fail: Mutex::new(false),
            }
        }

        fn check(&self) -> io::Result<()> {
            if *self.fail.lock().unwrap() {
                return Err(io::Error::other("told to fail"));
            }
            Ok(())
        }
    }

    impl BlockRead for Memory {
        fn size(&self) -> u64 {
            self.data.lock().unwrap().len() as u64
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            self.check()?;
            self.reads.fetch_add(1, Ordering::Relaxed);
            let at = offset as usize;
            buf.copy_from_slice(&self.data.lock().unwrap()[at..at + buf.len()]);
            Ok(())
        }
    }

    impl BlockWrite for Memory {
        fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            let at = offset as usize;
            self.data.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
            self.check()
        }
        fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
            self.write_at(offset, &vec![0; len as usize])
        }
        fn flush(&self) -> io::Result<()> {
            self.check()
        }
    }

    #[test]
    fn small_reads_share_blocks() {
        let disk = Cached::new(Memory::new(300_000));
        let mut buf = [0; 512];
        for sector in 0..128 {
            disk.read_at(sector * 512, &mut buf).unwrap();
        }
        assert_eq!(disk.inner().reads.load(Ordering::Relaxed), 1);
        // The next ones are read together.
        for sector in 128..4 * 128 {
            disk.read_at(sector * 512, &mut buf).unwrap();
        }
        assert_eq!(disk.inner().reads.load(Ordering::Relaxed), 2);
        // Across a border, and at the short end.
        let mut buf = [0; 100_000];
        disk.read_at(200_000, &mut buf).unwrap();
        assert_eq!(buf[..], disk.inner().data.lock().unwrap()[200_000..]);
        assert!(disk.read_at(299_999, &mut [0; 2]).is_err());
        disk.read_at(300_000, &mut []).unwrap();
    }

    #[test]
    fn same_as_the_disk_whatever_is_done() {
        const BLOCKS: u64 = MEMORY / BLOCK;
        let size = (BLOCKS + 40) * BLOCK + 777;
        let disk = Cached::new(Memory::new(size as usize));
        let mut random = 12345u64;
        let mut next = |limit: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) % limit
        };
        for round in 0..3000 {
            let offset = next(size);
            let len = next(200_000).min(size - offset);
            match next(4) {
                0 => disk
                    .write_at(offset, &vec![round as u8; len as usize])
                    .unwrap(),
                1 if round % 10 == 0 => disk.zero_at(offset, len).unwrap(),
                _ => {
                    let mut buf = vec![0; len as usize];
                    disk.read_at(offset, &mut buf).unwrap();
                    let want = disk.inner().data.lock().unwrap();
                    assert!(
                        buf == want[offset as usize..(offset + len) as usize],
                        "{round}"
                    );
                }
            }
            assert!(disk.lock().blocks.len() as u64 <= BLOCKS);
        }
    }

    #[test]
    fn a_failed_write_is_not_remembered() {
        let disk = Cached::new(Memory::new(200_000));
        let mut buf = [0; 10];
        disk.read_at(70_000, &mut buf).unwrap();
        *disk.inner().fail.lock().unwrap() = true;
        assert!(disk.write_at(70_000, b"xxxxxxxxxx").is_err());
        assert!(
            disk.read_at(70_000, &mut buf).is_err(),
            "not from the cache"
        );
        *disk.inner().fail.lock().unwrap() = false;
        // The contents of the disk, in whatever state the failure left it.
        disk.read_at(70_000, &mut buf).unwrap();
        assert_eq!(&buf, b"xxxxxxxxxx");
    }
}
