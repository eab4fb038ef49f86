//! Disks of which an input says only what differs from a sound one, so that a small input is a whole
//! file system and most mutations hit metadata.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, OnceLock, RwLock};

use hyper2kvm::block::{BlockRead, BlockWrite, check_range};
use hyper2kvm::disk::layout::{DiskLayout, Scheme};

const PAGE: usize = 4096;
const MAX_PATCHES: usize = 64;
const MAX_PATCH: usize = 4096;

/// An image under `images/`, with the pages of it that are not empty.
pub struct Base {
    bytes: Vec<u8>,
    used: Vec<u16>,
}

impl Base {
    pub fn new(bytes: Vec<u8>) -> Self {
        let empty = |page: &[u8]| page.iter().all(|b| *b == page[0]);
        let pages = bytes.chunks(PAGE).enumerate();
        let used = pages.filter(|(_, page)| !empty(page));
        let used = used.filter_map(|(i, _)| u16::try_from(i).ok()).collect();
        Self { bytes, used }
    }

    pub fn load(name: &str) -> Self {
        // The tests of the program take this file in too.
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = match root.join("fuzz").is_dir() {
            true => root.join("fuzz"),
            false => root.to_owned(),
        };
        let path = root.join("images").join(name);
        let packed = std::fs::read(path).expect("an image of the repository");
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(&packed[..])
            .read_to_end(&mut bytes)
            .expect("a gz file");
        Self::new(bytes)
    }

    /// The patch that puts `len` bytes at `offset` to what they are: something to mutate.
    pub fn patch(&self, offset: usize, len: usize) -> Vec<u8> {
        self.try_patch(offset, len).expect("a page in use")
    }

    /// `None` for a page that is not in use.
    pub fn try_patch(&self, offset: usize, len: usize) -> Option<Vec<u8>> {
        let page = u16::try_from(offset / PAGE).ok()?;
        let page = self.used.binary_search(&page).ok()? as u16;
        let mut patch = Vec::new();
        for number in [page, (offset % PAGE) as u16, len as u16] {
            patch.extend(number.to_le_bytes());
        }
        patch.extend(&self.bytes[offset..offset + len]);
        Some(patch)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// A base with patches: each is the index of a page in use, the offset in it and the length (16 bits
/// each), and the bytes.
pub struct Patched {
    base: &'static Base,
    pages: RwLock<BTreeMap<usize, Vec<u8>>>,
}

impl Patched {
    pub fn new(base: &'static Base, mut input: &[u8]) -> Arc<Self> {
        let disk = Self {
            base,
            pages: RwLock::default(),
        };
        for _ in 0..MAX_PATCHES {
            let Some((&[p0, p1, o0, o1, l0, l1], rest)) = input.split_first_chunk() else {
                break;
            };
            let number = |low, high| usize::from(u16::from_le_bytes([low, high]));
            let page = usize::from(base.used[number(p0, p1) % base.used.len()]);
            let at = page * PAGE + number(o0, o1) % PAGE;
            let len = (number(l0, l1) % (MAX_PATCH + 1))
                .min(rest.len())
                .min(base.bytes.len() - at);
            let (bytes, rest) = rest.split_at(len);
            disk.put(at, bytes);
            input = rest;
        }
        Arc::new(disk)
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        let mut pages = self.pages.write().expect("no panic while held");
        let (mut at, mut bytes) = (at, bytes);
        while !bytes.is_empty() {
            let (page, offset) = (at / PAGE, at % PAGE);
            let len = bytes.len().min(PAGE - offset);
            let page = pages.entry(page).or_insert_with(|| {
                let end = ((page + 1) * PAGE).min(self.base.bytes.len());
                self.base.bytes[page * PAGE..end].to_vec()
            });
            page[offset..offset + len].copy_from_slice(&bytes[..len]);
            (at, bytes) = (at + len, &bytes[len..]);
        }
    }
}

impl BlockRead for Patched {
    fn size(&self) -> u64 {
        self.base.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        let at = offset as usize;
        buf.copy_from_slice(&self.base.bytes[at..at + buf.len()]);
        let pages = self.pages.read().expect("no panic while held");
        let end = at + buf.len();
        for (page, bytes) in pages.range(at / PAGE..end.div_ceil(PAGE)) {
            let (from, to) = ((page * PAGE).max(at), (page * PAGE + bytes.len()).min(end));
            buf[from - at..to - at].copy_from_slice(&bytes[from - page * PAGE..to - page * PAGE]);
        }
        Ok(())
    }
}

impl BlockWrite for Patched {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len() as u64, self.size())?;
        self.put(offset as usize, data);
        Ok(())
    }

    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.size())?;
        self.put(offset as usize, &vec![0; len as usize]);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes at the start and at the end of a disk that is empty between them.
pub struct Ends {
    pub size: u64,
    pub head: Vec<u8>,
    pub tail: Vec<u8>,
}

impl BlockRead for Ends {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        let tail = self.size - self.tail.len() as u64;
        for (i, byte) in buf.iter_mut().enumerate() {
            let at = offset + i as u64;
            let from = match at.checked_sub(tail) {
                Some(at) => self.tail.get(at as usize),
                None => self.head.get(at as usize),
            };
            *byte = from.copied().unwrap_or(0);
        }
        Ok(())
    }
}

/// One file system from the first byte to the last.
pub fn bare() -> DiskLayout {
    DiskLayout {
        scheme: Scheme::None,
        sector_size: 512,
        disk_id: None,
        partitions: Vec::new(),
    }
}

/// Loads an image once.
pub fn base(cell: &'static OnceLock<Base>, name: &str) -> &'static Base {
    cell.get_or_init(|| Base::load(name))
}
