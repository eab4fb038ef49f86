//! What the fuzz targets share: how one input becomes a hive and its logs, and putting checksums and
//! hashes right, without which a mutated log would never get past its first check.

use hyper2kvm::registry::base::update_checksum;
use hyper2kvm::registry::marvin::marvin32;

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
