//! Reads FAT volumes (the EFI system partition) through the crate `fatfs`.
//!
//! `fatfs` requires a writable disk. Over a [`BlockRead`], [`FatDisk`] refuses writes and caches
//! blocks (the crate reads the table four bytes at a time). It limits how much one operation may
//! read, which ends a cyclic cluster chain. Panics of the crate on hostile volumes become errors.

use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fatfs::{DirEntry, FileSystem, FsOptions, ReadWriteSeek};

use super::{FileInfo, FileKind, GuestError, GuestPath, Result};
use crate::block::{BlockRead, BlockWrite};
use crate::error::Errno;

const BLOCK: u64 = 16 << 10;
const BLOCKS_KEPT: usize = 256;
/// The most bytes that one operation may read besides the requested data.
const BUDGET: u64 = 64 << 20;
/// The least cost of a read, so that many small ones end too.
const MIN_COST: u64 = 64;

/// A disk, with the difference between a writable one and a read-only one.
pub(super) trait Store: BlockRead {
    fn put(&self, at: u64, data: &[u8]) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;
}

impl Store for dyn BlockRead {
    fn put(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Store for dyn BlockWrite {
    fn put(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.write_at(at, data)
    }

    fn sync(&self) -> io::Result<()> {
        self.flush()
    }
}

/// A cursor over a volume, with a write-through cache of its blocks.
pub(super) struct FatDisk<D: ?Sized> {
    disk: Arc<D>,
    start: u64,
    len: u64,
    pos: u64,
    blocks: HashMap<u64, Vec<u8>>,
    shared: Arc<Shared>,
}

/// State shared by the volume and its cursor, to which `fatfs` gives no access.
#[derive(Default)]
struct Shared {
    budget: AtomicU64,
    /// Ends of this operation's writes at which a new directory may have ended.
    ends: Mutex<Vec<u64>>,
    /// Whether the disk was changed past the cursor, so that its cache is outdated.
    stale: AtomicBool,
}

/// The size of the first entries that `fatfs` writes to a new directory.
const DOTS: u64 = 128;
const ENDS_KEPT: usize = 256;

impl Shared {
    fn note_end(&self, at: u64) {
        // Clusters begin at sectors.
        if at % 512 == DOTS {
            let mut ends = self.ends();
            if ends.len() < ENDS_KEPT {
                ends.push(at);
            }
        }
    }

    fn ends(&self) -> MutexGuard<'_, Vec<u64>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Store + ?Sized> FatDisk<D> {
    fn block(&mut self, index: u64) -> io::Result<&mut Vec<u8>> {
        if self.shared.stale.swap(false, Ordering::Relaxed) {
            self.blocks.clear();
        }
        if self.blocks.len() >= BLOCKS_KEPT && !self.blocks.contains_key(&index) {
            self.blocks.clear();
        }
        match self.blocks.entry(index) {
            std::collections::hash_map::Entry::Occupied(entry) => Ok(entry.into_mut()),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let at = index * BLOCK;
                let mut bytes = vec![0; BLOCK.min(self.len - at) as usize];
                self.disk.read_at(self.start + at, &mut bytes)?;
                Ok(entry.insert(bytes))
            }
        }
    }

    fn spend(&self, bytes: usize) -> io::Result<()> {
        let cost = MIN_COST.max(bytes as u64);
        let left = self.shared.budget.load(Ordering::Relaxed);
        let left = left
            .checked_sub(cost)
            .ok_or_else(|| io::Error::other("the FAT volume is damaged: endless cluster chain"))?;
        self.shared.budget.store(left, Ordering::Relaxed);
        Ok(())
    }
}

impl<D: Store + ?Sized> Read for FatDisk<D> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.len.saturating_sub(self.pos).min(buf.len() as u64) as usize;
        self.spend(n)?;
        if n as u64 >= BLOCK {
            self.disk.read_at(self.start + self.pos, &mut buf[..n])?;
            self.pos += n as u64;
            return Ok(n);
        }
        if n == 0 {
            return Ok(0);
        }
        let from = (self.pos % BLOCK) as usize;
        let block = self.block(self.pos / BLOCK)?;
        let n = n.min(block.len() - from);
        buf[..n].copy_from_slice(&block[from..from + n]);
        self.pos += n as u64;
        Ok(n)
    }
}

impl<D: Store + ?Sized> Write for FatDisk<D> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let from = (self.pos % BLOCK) as usize;
        let n = self
            .len
            .saturating_sub(self.pos)
            .min(BLOCK - from as u64)
            .min(data.len() as u64) as usize;
        self.disk.put(self.start + self.pos, &data[..n])?;
        if let Some(block) = self.blocks.get_mut(&(self.pos / BLOCK)) {
            block[from..from + n].copy_from_slice(&data[..n]);
        }
        self.pos += n as u64;
        self.shared.note_end(self.pos);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        // fatfs flushes after every file; the flush on closing the volume is sufficient.
        Ok(())
    }
}

impl<D: Store + ?Sized> Seek for FatDisk<D> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(n) => Some(n),
            SeekFrom::End(d) => self.len.checked_add_signed(d),
            SeekFrom::Current(d) => self.pos.checked_add_signed(d),
        };
        self.pos = target.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.pos)
    }
}

pub(super) type Fs<D> = FileSystem<FatDisk<D>>;
type Entry<'f, D> = DirEntry<'f, FatDisk<D>>;

/// A FAT volume: over `dyn BlockRead` to read, over `dyn BlockWrite` to change.
pub(super) struct FatVolume<D: Store + ?Sized> {
    fs: Option<Fs<D>>,
    disk: Arc<D>,
    start: u64,
    shared: Arc<Shared>,
}

impl<D: Store + ?Sized> FatVolume<D> {
    pub fn open(disk: Arc<D>, start: u64, len: u64) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        shared.budget.store(BUDGET, Ordering::Relaxed);
        let cursor = FatDisk {
            len: len.min(disk.size().saturating_sub(start)),
            disk: disk.clone(),
            start,
            pos: 0,
            blocks: HashMap::new(),
            shared: shared.clone(),
        };
        let options = FsOptions::new().update_accessed_date(false);
        let fs = guarded(|| FileSystem::new(cursor, options))
            .map_err(|error| unreadable(&GuestPath::root(), &error))?;
        Ok(Self {
            fs: Some(fs),
            disk,
            start,
            shared,
        })
    }

    /// Runs one operation with a fresh budget, and adds `path` to its error.
    pub fn run<T>(
        &self,
        path: &GuestPath,
        bytes: u64,
        work: impl FnOnce(&Fs<D>) -> Result<T, FatError>,
    ) -> Result<T> {
        let budget = BUDGET.saturating_add(bytes);
        self.shared.budget.store(budget, Ordering::Relaxed);
        self.shared.ends().clear();
        let Some(fs) = &self.fs else {
            return Err(unreadable(path, &io::Error::other("the volume is closed")));
        };
        let result = guarded(|| Ok(work(fs))).unwrap_or_else(|error| Err(error.into()));
        result.map_err(|error| match error {
            FatError::Guest(error) => error,
            FatError::Io(error) if error.kind() == io::ErrorKind::NotFound => {
                GuestError::not_found(path)
            }
            FatError::Io(error) => unreadable(path, &error),
        })
    }

    /// Corrects the entries that `create_dir` has just written. fatfs 0.3 also gives `.` and `..`
    /// long names. In FAT32, its `..` to the root directory has the root's cluster instead of 0
    /// (rafalh/rust-fatfs#117, fixed only in the unreleased 0.4). `fsck.fat` reports both as
    /// damage.
    pub fn repair_dots(&self, parent_is_root: bool) -> io::Result<()> {
        const LONG_NAME: u8 = 0x0f;
        let ends = std::mem::take(&mut *self.shared.ends());
        for end in ends {
            let at = self.start + end - DOTS;
            let mut old = [0; DOTS as usize];
            self.disk.read_at(at, &mut old)?;
            let dots = old[11] == LONG_NAME
                && old[32..].starts_with(b".          \x10")
                && old[75] == LONG_NAME
                && old[96..].starts_with(b"..         \x10");
            if !dots {
                continue;
            }
            let mut new = [0; DOTS as usize];
            new[..32].copy_from_slice(&old[32..64]);
            new[32..64].copy_from_slice(&old[96..]);
            if parent_is_root {
                new[32 + 20..32 + 22].fill(0);
                new[32 + 26..32 + 28].fill(0);
            }
            self.disk.put(at, &new)?;
            self.shared.stale.store(true, Ordering::Relaxed);
            return Ok(());
        }
        Err(io::Error::other("the new directory is not as expected"))
    }

    /// Writes the allocation summary back and flushes the disk.
    pub fn close(mut self) -> Result<()> {
        self.shared.budget.store(BUDGET, Ordering::Relaxed);
        let fs = self.fs.take();
        guarded(|| fs.map_or(Ok(()), FileSystem::unmount))
            .and_then(|()| self.disk.sync())
            .map_err(|error| unreadable(&GuestPath::root(), &error).doing("unmounting"))
    }

    pub fn label(&self) -> Option<String> {
        let label = self
            .run(&GuestPath::root(), 0, |fs| {
                Ok(fs.read_volume_label_from_root_dir()?)
            })
            .ok()??;
        let label: String = label.chars().filter(|c| !c.is_control()).collect();
        let label = label.trim();
        (!label.is_empty() && label != "NO NAME").then(|| label.to_string())
    }

    pub fn cluster_size(&self) -> u32 {
        self.fs.as_ref().map_or(0, FileSystem::cluster_size)
    }

    pub fn free_bytes(&self) -> Result<u64> {
        self.run(&GuestPath::root(), 0, |fs| {
            let stats = fs.stats()?;
            Ok(u64::from(stats.free_clusters()) * u64::from(stats.cluster_size()))
        })
    }

    pub fn stat(&self, path: &GuestPath) -> Result<Option<FileInfo>> {
        if path.is_root() {
            return Ok(Some(info(String::new(), FileKind::Dir, 0)));
        }
        self.run(path, 0, |fs| Ok(find(fs, path)?.map(|e| entry_info(&e))))
    }

    pub fn list(&self, path: &GuestPath) -> Result<Vec<FileInfo>> {
        self.run(path, 0, |fs| {
            let dir = if path.is_root() {
                fs.root_dir()
            } else {
                let entry = find(fs, path)?.ok_or_else(|| GuestError::not_found(path))?;
                if !entry.is_dir() {
                    return Err(GuestError::wrong_kind(path, "directory").into());
                }
                entry.to_dir()
            };
            let mut entries = Vec::new();
            for entry in dir.iter() {
                let entry = entry_info(&entry?);
                if entry.name != "." && entry.name != ".." {
                    entries.push(entry);
                }
            }
            entries.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(entries)
        })
    }

    pub fn read_at(&self, path: &GuestPath, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.run(path, len as u64, |fs| {
            let entry = file(fs, path)?;
            let len = entry.len().saturating_sub(offset).min(len as u64);
            let mut bytes = vec![0; len as usize];
            if len > 0 {
                let mut file = entry.to_file();
                file.seek(SeekFrom::Start(offset))?;
                file.read_exact(&mut bytes)?;
            }
            Ok(bytes)
        })
    }

    pub fn read(&self, path: &GuestPath, limit: u64) -> Result<Vec<u8>> {
        self.run(path, limit, |fs| {
            let entry = file(fs, path)?;
            let size = entry.len();
            GuestError::check_size(path, size, limit)?;
            let mut bytes = vec![0; size as usize];
            entry.to_file().read_exact(&mut bytes)?;
            Ok(bytes)
        })
    }
}

impl<D: Store + ?Sized> Drop for FatVolume<D> {
    fn drop(&mut self) {
        // Dropping the file system writes to it, and may panic on a damaged one.
        let fs = self.fs.take();
        if guarded(|| {
            drop(fs);
            Ok(())
        })
        .is_err()
        {
            tracing::warn!("closing a FAT volume failed");
        }
    }
}

/// An error of the crate, or one of this module that already names the path.
pub(super) enum FatError {
    Io(io::Error),
    Guest(GuestError),
}

impl From<io::Error> for FatError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<GuestError> for FatError {
    fn from(error: GuestError) -> Self {
        Self::Guest(error)
    }
}

fn guarded<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(io::Error::other("the FAT volume is damaged")))
}

/// Finds an entry by reading one directory after another: `fatfs` cannot look up an entry without
/// opening it.
pub(super) fn find<'f, T: ReadWriteSeek>(
    fs: &'f FileSystem<T>,
    path: &GuestPath,
) -> io::Result<Option<DirEntry<'f, T>>> {
    let mut dir = fs.root_dir();
    let mut parts = path.parts().iter().peekable();
    while let Some(part) = parts.next() {
        let wanted = part.to_lowercase();
        let mut found = None;
        for entry in dir.iter() {
            let entry = entry?;
            if entry.file_name().to_lowercase() == wanted
                || entry.short_file_name().to_lowercase() == wanted
            {
                found = Some(entry);
                break;
            }
        }
        match (found, parts.peek()) {
            (Some(entry), None) => return Ok(Some(entry)),
            (Some(entry), Some(_)) if entry.is_dir() => dir = entry.to_dir(),
            _ => return Ok(None),
        }
    }
    Ok(None)
}

fn file<'f, D: Store + ?Sized>(fs: &'f Fs<D>, path: &GuestPath) -> Result<Entry<'f, D>, FatError> {
    let entry = find(fs, path)?.ok_or_else(|| GuestError::not_found(path))?;
    if entry.is_dir() {
        return Err(GuestError::wrong_kind(path, "file").into());
    }
    Ok(entry)
}

fn entry_info<T: ReadWriteSeek>(entry: &DirEntry<'_, T>) -> FileInfo {
    if entry.is_dir() {
        info(entry.file_name(), FileKind::Dir, 0)
    } else {
        info(entry.file_name(), FileKind::File, entry.len())
    }
}

fn info(name: String, kind: FileKind, size: u64) -> FileInfo {
    FileInfo {
        name,
        kind,
        size,
        reparse_tag: None,
        compressed: false,
        encrypted: false,
    }
}

fn unreadable(path: &GuestPath, error: &io::Error) -> GuestError {
    let (path, reason) = (path.to_string(), error.to_string());
    match error.raw_os_error() {
        Some(errno) => GuestError::Host {
            op: "reading",
            path,
            reason,
            errno: Errno(errno),
        },
        None => GuestError::Unreadable { path, reason },
    }
}
