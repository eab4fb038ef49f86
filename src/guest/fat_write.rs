//! Writes FAT volumes (the EFI system partition) through the crate `fatfs`.

use std::io::{self, Seek, SeekFrom, Write};
use std::sync::Arc;

use fatfs::{Dir, DirEntry, ReadWriteSeek};

use super::fat_read::{FatError, FatVolume, Fs, find};
use super::{Extent, GuestError, GuestPath, Result, check_extents};
use crate::block::BlockWrite;

/// The largest file: FAT stores the size in 32 bits.
const MAX_FILE: u64 = u32::MAX as u64;

pub struct FatWriter {
    volume: FatVolume<dyn BlockWrite>,
}

impl FatWriter {
    pub fn mount(disk: Arc<dyn BlockWrite>, start: u64, len: u64) -> Result<Self> {
        Ok(Self {
            volume: FatVolume::open(disk, start, len)?,
        })
    }

    pub fn close(self) -> Result<()> {
        self.volume.close()
    }

    fn run<T>(
        &self,
        op: &'static str,
        path: &GuestPath,
        bytes: u64,
        work: impl FnOnce(&Fs<dyn BlockWrite>) -> Result<T, FatError>,
    ) -> Result<T> {
        let result = self.volume.run(path, bytes.saturating_mul(2), work);
        result.map_err(|error| error.doing(op))
    }

    pub fn create_dir(&mut self, path: &GuestPath) -> Result<()> {
        const OP: &str = "creating the directory";
        self.run(OP, path, 0, |fs| {
            if find(fs, path)?.is_some() {
                return Err(taken(OP, path).into());
            }
            // A FAT directory takes a cluster immediately, and its parent may need one more.
            need_space(fs, path, 0, 2 * u64::from(fs.cluster_size()))?;
            let (parent, name) = parent(fs, path)?;
            parent.create_dir(name)?;
            self.volume.repair_dots(path.parts().len() == 1)?;
            Ok(())
        })
    }

    pub fn write_file(&mut self, path: &GuestPath, contents: &[u8]) -> Result<()> {
        self.change("writing", path, contents.len() as u64, |_| {
            vec![(0, contents)]
        })
    }

    pub fn patch_file(&mut self, path: &GuestPath, size: u64, extents: &[Extent]) -> Result<()> {
        const OP: &str = "changing";
        check_extents(OP, path, size, extents)?;
        if self.volume.stat(path)?.is_none() {
            return Err(GuestError::not_found(path));
        }
        self.change(OP, path, size, |old| {
            let mut parts: Vec<(u64, &[u8])> = Vec::new();
            // A file grows only by writing: gaps before its new end are zeroed.
            let mut at = old;
            while at < size {
                let n = (size - at).min(ZEROES.len() as u64);
                parts.push((at, &ZEROES[..n as usize]));
                at += n;
            }
            parts.extend(extents.iter().map(|e| (e.offset, e.data.as_slice())));
            parts
        })
    }

    fn change<'d>(
        &self,
        op: &'static str,
        path: &GuestPath,
        size: u64,
        parts: impl FnOnce(u64) -> Vec<(u64, &'d [u8])>,
    ) -> Result<()> {
        GuestError::check_size(path, size, MAX_FILE)?;
        self.run(op, path, size, |fs| {
            let old = match find(fs, path)? {
                Some(entry) if entry.is_dir() => {
                    return Err(GuestError::wrong_kind(path, "file").into());
                }
                Some(entry) => Some(entry),
                None => None,
            };
            let old_size = old.as_ref().map_or(0, DirEntry::len);
            // Checked before the first byte: a full volume would otherwise leave half a file.
            need_space(fs, path, old_size, size)?;
            let mut file = match old {
                Some(entry) => entry.to_file(),
                None => {
                    let (parent, name) = parent(fs, path)?;
                    parent.create_file(name)?
                }
            };
            for (offset, bytes) in parts(old_size) {
                file.seek(SeekFrom::Start(offset))?;
                file.write_all(bytes)?;
            }
            if size < old_size {
                file.seek(SeekFrom::Start(size))?;
                file.truncate()?;
            }
            file.flush()?;
            Ok(())
        })
    }

    pub fn remove_file(&mut self, path: &GuestPath) -> Result<()> {
        self.remove("removing", path, false)
    }

    /// Removes an empty directory.
    pub fn remove_dir(&mut self, path: &GuestPath) -> Result<()> {
        self.remove("removing the directory", path, true)
    }

    fn remove(&self, op: &'static str, path: &GuestPath, dir: bool) -> Result<()> {
        self.run(op, path, 0, |fs| {
            let entry = find(fs, path)?.ok_or_else(|| GuestError::not_found(path))?;
            if entry.is_dir() != dir {
                return Err(
                    GuestError::wrong_kind(path, if dir { "directory" } else { "file" }).into(),
                );
            }
            let (parent, name) = parent(fs, path)?;
            parent.remove(name)?;
            Ok(())
        })
    }
}

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

fn parent<'f, 'p, T: ReadWriteSeek>(
    fs: &'f fatfs::FileSystem<T>,
    path: &'p GuestPath,
) -> Result<(Dir<'f, T>, &'p str), FatError> {
    let (Some(parent), Some(name)) = (path.parent(), path.name()) else {
        return Err(GuestError::wrong_kind(path, "file").into());
    };
    if parent.is_root() {
        return Ok((fs.root_dir(), name));
    }
    match find(fs, &parent)? {
        Some(entry) if entry.is_dir() => Ok((entry.to_dir(), name)),
        Some(_) => Err(GuestError::wrong_kind(&parent, "directory").into()),
        None => Err(GuestError::not_found(&parent).into()),
    }
}

fn need_space(
    fs: &Fs<dyn BlockWrite>,
    path: &GuestPath,
    old: u64,
    new: u64,
) -> Result<(), FatError> {
    let stats = fs.stats()?;
    let clusters = |bytes: u64| bytes.div_ceil(u64::from(stats.cluster_size()));
    let more = clusters(new).saturating_sub(clusters(old));
    if more > u64::from(stats.free_clusters()) {
        return Err(GuestError::NoSpace {
            path: path.to_string(),
        }
        .into());
    }
    Ok(())
}

fn taken(op: &'static str, path: &GuestPath) -> GuestError {
    GuestError::Op {
        op,
        path: path.to_string(),
        reason: io::Error::from(io::ErrorKind::AlreadyExists).to_string(),
    }
}
