//! What the fuzz targets share: how one input becomes a hive and its logs, and putting checksums and
//! hashes right, without which a mutated log would never get past its first check.

pub mod disk;
pub mod guest;

use std::time::{Duration, Instant};

use hyper2kvm::demo::bitlocker::Reserved;
use hyper2kvm::registry::base::update_checksum;
use hyper2kvm::registry::marvin::marvin32;

/// The longest one input may take, with the sanitizers' slowness.
const LIMIT: Duration = Duration::from_secs(10);

/// Where the BitLocker volume of `images/fve.gz` has its own places.
pub const FVE_PLACES: Reserved = Reserved {
    copies: [256 << 10, 512 << 10, 768 << 10],
    moved: 320 << 10,
};

/// Runs a target and fails when it took too long. Memory is limited by `run.sh`.
pub fn bounded<T>(target: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = target();
    let took = start.elapsed();
    assert!(took < LIMIT, "took {took:?}");
    result
}

/// Sectors of an image, each as a length of 16 bits and the bytes that are not zero.
pub fn sectors(mut input: &[u8], size: usize) -> Vec<u8> {
    let mut image = Vec::new();
    while let Some((&[low, high], rest)) = input.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([low, high]))
            .min(size)
            .min(rest.len());
        let start = image.len();
        image.extend(&rest[..len]);
        image.resize(start + size, 0);
        input = &rest[len..];
    }
    image
}

/// The input that [`sectors`] takes apart.
pub fn from_sectors(image: &[u8], size: usize) -> Vec<u8> {
    let mut input = Vec::new();
    for sector in image.chunks(size) {
        let len = sector.iter().rposition(|b| *b != 0).map_or(0, |i| i + 1);
        input.extend((len as u16).to_le_bytes());
        input.extend(&sector[..len]);
    }
    input
}

/// Puts the checksums of tar headers right, as far as they follow each other.
pub fn seal_tar(archive: &mut [u8]) {
    let mut at = 0;
    while let Some(header) = archive.get_mut(at..at + 512) {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let digits = String::from_utf8_lossy(&header[124..135]).into_owned();
        let size = usize::from_str_radix(digits.trim(), 8).unwrap_or(0);
        let Some(next) = size.checked_next_multiple_of(512) else {
            return;
        };
        let Some(next) = at.checked_add(512).and_then(|at| at.checked_add(next)) else {
            return;
        };
        at = next;
    }
}

/// The size of the disk of the target `partitions`, and of one end of it that an input can say.
pub const DISK: u64 = 2 << 30;
pub const END: usize = 34 * 512;

/// Puts the two checksums of a GPT header at `at` and of the entries at `entries` right.
pub fn seal_gpt(end: &mut [u8], at: usize, entries: usize) {
    let Some(header) = end.get(at..at + 92).filter(|h| h.starts_with(b"EFI PART")) else {
        return;
    };
    let number =
        |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
    let len = u64::from(number(80)) * u64::from(number(84));
    let size = number(12) as usize;
    // What lies behind the end that the input says is zeroes.
    let Some(len) = usize::try_from(len).ok().filter(|len| *len <= 1 << 20) else {
        return;
    };
    let table: Vec<u8> = (entries..entries + len)
        .map(|i| end.get(i).copied().unwrap_or(0))
        .collect();
    end[at + 88..at + 92].copy_from_slice(&crc32(&table).to_le_bytes());
    end[at + 16..at + 20].fill(0);
    let Some(header) = at.checked_add(size).and_then(|to| end.get(at..to)) else {
        return;
    };
    let sum = crc32(header);
    end[at + 16..at + 20].copy_from_slice(&sum.to_le_bytes());
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// Set in the first byte: put checksums and hashes right before use.
pub const SEAL: u8 = 1;

/// An input: flags, pages of the hive, sectors of the first log; then hive, first log, second log.
pub struct Files {
    pub flags: u8,
    pub hive: Vec<u8>,
    pub logs: [Vec<u8>; 2],
}

impl Files {
    pub fn from_input(input: &[u8]) -> Option<Self> {
        let (&[flags, pages, sectors], rest) = input.split_first_chunk()?;
        let hive_len = usize::from(pages) * 4096;
        let (hive, rest) = rest.split_at(hive_len.min(rest.len()));
        let (log1, log2) = rest.split_at((usize::from(sectors) * 512).min(rest.len()));
        let mut files = Self {
            flags,
            hive: hive.to_vec(),
            logs: [log1.to_vec(), log2.to_vec()],
        };
        if flags & SEAL != 0 {
            files.seal();
        }
        Some(files)
    }

    /// The input that [`Files::from_input`] takes apart.
    pub fn to_input(&self) -> Vec<u8> {
        let pages = (self.hive.len() / 4096) as u8;
        let sectors = (self.logs[0].len() / 512) as u8;
        let mut input = vec![self.flags, pages, sectors];
        input.extend(&self.hive);
        input.extend(self.logs.concat());
        input
    }

    fn seal(&mut self) {
        let _ = update_checksum(&mut self.hive);
        for log in &mut self.logs {
            let _ = update_checksum(log);
            seal_entries(log);
        }
    }
}

/// Puts the two hashes of every entry right.
pub fn seal_entries(log: &mut [u8]) {
    let mut offset = 512;
    while let Some(entry) = log.get_mut(offset..) {
        let Some(size) = entry.get(4..8).filter(|_| entry.starts_with(b"HvLE")) else {
            return;
        };
        let size = u32::from_le_bytes([size[0], size[1], size[2], size[3]]) as usize;
        if size < 512 || size > entry.len() {
            return;
        }
        let hash = marvin32(&entry[40..size]);
        entry[24..32].copy_from_slice(&hash.to_le_bytes());
        let hash = marvin32(&entry[..32]);
        entry[32..40].copy_from_slice(&hash.to_le_bytes());
        offset += size;
    }
}
