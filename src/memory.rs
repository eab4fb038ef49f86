//! Large buffers in huge pages of memory. Touching 40 MB for the first time costs 10,000 page
//! faults in pages of 4 KiB. In pages of 2 MiB it costs 20. If the kernel has no huge pages to
//! give, small ones are used.

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};

use memmap2::{Advice, MmapMut};

/// The size of a huge page.
pub const LARGE_PAGE: usize = 2 << 20;

/// Zeroed memory.
pub fn zeroed(len: usize) -> io::Result<MmapMut> {
    let memory = MmapMut::map_anon(len)?;
    let _ = memory.advise(Advice::HugePage);
    Ok(memory)
}

/// The contents of a file.
pub struct FileBytes {
    memory: Memory,
    len: usize,
}

enum Memory {
    Small(Vec<u8>),
    Large(MmapMut),
}

impl FileBytes {
    /// Creates a buffer of `len` zeroes.
    pub fn zeroed(len: usize) -> Self {
        let large = |len: usize| zeroed(len.checked_next_multiple_of(LARGE_PAGE)?).ok();
        let memory = match len >= LARGE_PAGE {
            true => large(len),
            false => None,
        };
        let memory = memory.map_or_else(|| Memory::Small(vec![0; len]), Memory::Large);
        Self { memory, len }
    }

    /// Appends zeroes up to that length; a longer buffer is unchanged.
    pub fn grow(&mut self, len: usize) {
        if len <= self.len {
            return;
        }
        match &mut self.memory {
            Memory::Small(bytes) if len < LARGE_PAGE => bytes.resize(len, 0),
            // Memory behind the end was never written.
            Memory::Large(map) if len <= map.len() => {}
            _ => {
                let mut larger = Self::zeroed(len);
                larger[..self.len].copy_from_slice(self);
                self.memory = larger.memory;
            }
        }
        self.len = len;
    }
}

impl From<Vec<u8>> for FileBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            len: bytes.len(),
            memory: Memory::Small(bytes),
        }
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.memory {
            Memory::Small(bytes) => bytes,
            Memory::Large(map) => &map[..self.len],
        }
    }
}

impl DerefMut for FileBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Small(bytes) => bytes,
            Memory::Large(map) => &mut map[..self.len],
        }
    }
}

impl Clone for FileBytes {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl PartialEq for FileBytes {
    fn eq(&self, other: &Self) -> bool {
        self[..] == other[..]
    }
}

impl Eq for FileBytes {}

impl fmt::Debug for FileBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stay_while_the_buffer_grows_over_every_kind_of_memory() {
        let sizes = [
            0,
            1,
            LARGE_PAGE - 1,
            LARGE_PAGE,
            LARGE_PAGE + 5,
            3 * LARGE_PAGE,
            7 * LARGE_PAGE + 1,
        ];
        for (i, from) in sizes.iter().enumerate() {
            let mut bytes = FileBytes::zeroed(*from);
            bytes.fill(7);
            let was = bytes.clone();
            for to in &sizes[i..] {
                bytes.grow(*to);
                assert_eq!(bytes.len(), *to);
                assert!(bytes[..*from] == was[..] && bytes[*from..].iter().all(|b| *b == 0));
            }
            bytes.grow(*from);
            assert_eq!(bytes.len(), 7 * LARGE_PAGE + 1, "it never shrinks");
        }
    }

    #[test]
    fn a_copy_and_what_was_a_vector_are_equal() {
        let vector = vec![3; LARGE_PAGE + 1];
        let bytes = FileBytes::from(vector.clone());
        assert_eq!(bytes.clone(), bytes);
        assert_eq!(bytes[..], vector[..]);
        assert_ne!(FileBytes::zeroed(vector.len()), bytes);
    }
}
