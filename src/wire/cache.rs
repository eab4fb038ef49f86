//! Caches fetched data in a file without a name, so that nothing small is fetched twice.
//!
//! 64 KiB slots with a bit for each 4 KiB; the least used one is replaced (second chance). Data
//! read in long streams is not cached, because it would replace data that is read again.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The smallest unit that is fetched.
pub(super) const SECTOR: u64 = 4096;
const SLOT: u64 = 64 << 10;
/// 256 MiB.
const SLOTS: u32 = 4096;

/// The file of the source, and the slot's number in it.
type Key = (u64, u64);

#[derive(Debug)]
pub(super) struct Cache {
    file: File,
    slots: Vec<Slot>,
    index: HashMap<Key, u32>,
    hand: usize,
}

#[derive(Debug)]
struct Slot {
    key: Key,
    /// A bit for each cached sector.
    valid: u16,
    /// Whether it was used since the hand last passed.
    used: bool,
}

impl Cache {
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            slots: Vec::new(),
            index: HashMap::new(),
            hand: 0,
        }
    }

    /// Copies cached data to `out`; returns the missing ranges, each an offset in `out` and a
    /// length.
    pub(super) fn read(&mut self, id: u64, offset: u64, out: &mut [u8]) -> Vec<(usize, usize)> {
        let mut gaps: Vec<(usize, usize)> = Vec::new();
        let end = offset + out.len() as u64;
        let mut at = offset;
        while at < end {
            let next = ((at / SECTOR + 1) * SECTOR).min(end);
            let (start, length) = ((at - offset) as usize, (next - at) as usize);
            if !self.sector(id, at, &mut out[start..start + length]) {
                match gaps.last_mut() {
                    Some(last) if last.0 + last.1 == start => last.1 += length,
                    _ => gaps.push((start, length)),
                }
            }
            at = next;
        }
        gaps
    }

    fn sector(&mut self, id: u64, at: u64, out: &mut [u8]) -> bool {
        let Some(&number) = self.index.get(&(id, at / SLOT)) else {
            return false;
        };
        let Some(slot) = self.slots.get_mut(number as usize) else {
            return false;
        };
        let bit = 1u16 << (at % SLOT / SECTOR);
        slot.used = true;
        slot.valid & bit != 0
            && self
                .file
                .read_exact_at(out, u64::from(number) * SLOT + at % SLOT)
                .is_ok()
    }

    /// Caches whole sectors; `size` is that of the file, whose last sector may be shorter.
    pub(super) fn write(&mut self, id: u64, offset: u64, bytes: &[u8], size: u64) {
        let end = offset + bytes.len() as u64;
        let mut at = offset.div_ceil(SECTOR) * SECTOR;
        while at < end {
            let next = (at + SECTOR).min(size);
            if next > end {
                break;
            }
            let sector = &bytes[(at - offset) as usize..(next - offset) as usize];
            if self.keep(id, at, sector).is_err() {
                return;
            }
            at += SECTOR;
        }
    }

    fn keep(&mut self, id: u64, at: u64, sector: &[u8]) -> io::Result<()> {
        let key = (id, at / SLOT);
        let number = match self.index.get(&key) {
            Some(&number) => number,
            None => self.room(key),
        };
        let place = u64::from(number) * SLOT + at % SLOT;
        self.file.write_all_at(sector, place)?;
        if let Some(slot) = self.slots.get_mut(number as usize) {
            slot.valid |= 1 << (at % SLOT / SECTOR);
        }
        Ok(())
    }

    /// A slot for that key: a new one, or the least used.
    fn room(&mut self, key: Key) -> u32 {
        let fresh = Slot {
            key,
            valid: 0,
            // It gets a second chance if it is read again.
            used: false,
        };
        let number = if self.slots.len() < SLOTS as usize {
            self.slots.push(fresh);
            self.slots.len() - 1
        } else {
            while std::mem::take(&mut self.slots[self.hand].used) {
                self.hand = (self.hand + 1) % self.slots.len();
            }
            let number = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let old = std::mem::replace(&mut self.slots[number], fresh);
            self.index.remove(&old.key);
            number
        };
        self.index.insert(key, number as u32);
        number as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> Cache {
        Cache::new(tempfile::tempfile().unwrap())
    }

    #[test]
    fn keeps_whole_sectors_and_knows_what_is_missing() {
        let mut cache = cache();
        let bytes: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
        // From the middle of a sector to the middle of another.
        cache.write(1, 100, &bytes, 1 << 20);
        let mut out = vec![0xee; 16384];
        assert_eq!(cache.read(1, 4096, &mut out), [(12288, 4096)]);
        assert_eq!(out[..12288], bytes[3996..16284]);
        assert_eq!(cache.read(1, 0, &mut [0; 10]), [(0, 10)]);
        assert_eq!(cache.read(2, 4096, &mut [0; 10]), [(0, 10)]);
        assert!(cache.read(1, 5000, &mut [0; 10]).is_empty());
        // The end of a file whose size is not a multiple of a sector.
        cache.write(3, 65536, &bytes[..5000], 65536 + 5000);
        assert!(cache.read(3, 65536 + 4096, &mut [0; 904]).is_empty());
    }

    #[test]
    fn gives_way_and_stays_bounded() {
        let mut cache = cache();
        for slot in 0..2 * u64::from(SLOTS) {
            cache.write(1, slot * SLOT, &[slot as u8; 4096], u64::MAX);
            // This one is read again and again.
            if slot > 0 && slot % 100 == 0 {
                assert!(cache.read(1, 0, &mut [9; 4096]).is_empty(), "{slot}");
            }
        }
        assert_eq!(cache.slots.len(), SLOTS as usize);
        assert_eq!(cache.index.len(), SLOTS as usize);
        let mut out = [0; 4096];
        let last = 2 * u64::from(SLOTS) - 1;
        assert!(cache.read(1, last * SLOT, &mut out).is_empty());
        assert_eq!(out, [last as u8; 4096]);
        assert!(!cache.read(1, 5 * SLOT, &mut out).is_empty());
    }
}
