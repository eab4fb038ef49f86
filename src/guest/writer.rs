//! The embedded writing engine: libntfs-3g (in a confined child) for NTFS, `fatfs` for the EFI
//! system partition.
//!
//! A volume is mounted at its first change or earlier, if its own metadata permits that.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::confined::ConfinedNtfs;
use super::embedded::{kind, partitions};
use super::fat_write::FatWriter;
use super::logfile::LogState;
use super::ntfs_read::NtfsVolume;
use super::ntfs3g::{MountOptions, Ntfs3g};
use super::{
    BOOT_SECTOR, Extent, FsKind, GuestError, GuestPath, GuestWrite, Result, VolumeId, check_extents,
};
use crate::block::{BlockRead, BlockWrite};
use crate::disk::layout::{DiskLayout, Partition};
use crate::tool::launcher;

enum Engine {
    Confined(Box<ConfinedNtfs>),
    /// In this process: only if it cannot start itself as a child.
    Ntfs(Ntfs3g),
    Fat(Box<FatWriter>),
}

/// Writes to the volumes of a disk, which nothing else may write to at the same time.
pub struct EmbeddedWriter {
    disk: Arc<dyn BlockWrite>,
    partitions: Vec<Partition>,
    options: MountOptions,
    engines: BTreeMap<VolumeId, Engine>,
    /// A volume that was mounted before its first change. If that failed, the first change does.
    early: Option<(VolumeId, Result<Box<ConfinedNtfs>>)>,
}

/// A writer whose volume is mounted already, for the thread that will write.
pub struct MountedWriter {
    disk: Arc<dyn BlockWrite>,
    partitions: Vec<Partition>,
    options: MountOptions,
    volume: VolumeId,
    ntfs: Result<Box<ConfinedNtfs>>,
}

impl From<MountedWriter> for EmbeddedWriter {
    fn from(mounted: MountedWriter) -> Self {
        Self {
            disk: mounted.disk,
            partitions: mounted.partitions,
            options: mounted.options,
            engines: BTreeMap::new(),
            early: Some((mounted.volume, mounted.ntfs)),
        }
    }
}

impl EmbeddedWriter {
    pub fn new(disk: Arc<dyn BlockWrite>, layout: &DiskLayout, options: MountOptions) -> Self {
        let partitions = partitions(disk.as_ref(), layout);
        Self {
            disk,
            partitions,
            options,
            engines: BTreeMap::new(),
            early: None,
        }
    }

    /// Mounts a volume before its first change, if a child does that. A failure is reported by the
    /// first change.
    pub fn mount_early(self, volume: VolumeId) -> Option<MountedWriter> {
        let partition = self.partition(volume).ok()?;
        if !launcher::is_enabled() || kind(self.disk.as_ref(), partition).ok()? != FsKind::Ntfs {
            return None;
        }
        let ntfs = self.mount_ntfs(partition.start_bytes, partition.size_bytes);
        Some(MountedWriter {
            ntfs,
            disk: self.disk.clone(),
            partitions: self.partitions.clone(),
            options: self.options,
            volume,
        })
    }

    /// Mounts an NTFS volume in a child.
    fn mount_ntfs(&self, start: u64, len: u64) -> Result<Box<ConfinedNtfs>> {
        check_ntfs(self.disk.clone(), start, len, self.options)?;
        ConfinedNtfs::mount(self.disk.clone(), start, len, self.options).map(Box::new)
    }

    fn engine(&mut self, volume: VolumeId) -> Result<&mut Engine> {
        if !self.engines.contains_key(&volume) {
            let engine = match self.early.take_if(|(mounted, _)| *mounted == volume) {
                Some((_, mounted)) => Engine::Confined(mounted?),
                None => self.mount(volume)?,
            };
            self.engines.insert(volume, engine);
        }
        self.engines
            .get_mut(&volume)
            .ok_or(GuestError::NoVolume(volume))
    }

    fn partition(&self, volume: VolumeId) -> Result<&Partition> {
        self.partitions
            .iter()
            .find(|p| p.index == volume.partition)
            .ok_or(GuestError::NoVolume(volume))
    }

    fn mount(&self, volume: VolumeId) -> Result<Engine> {
        let partition = self.partition(volume)?;
        let (start, len) = (partition.start_bytes, partition.size_bytes);
        match kind(self.disk.as_ref(), partition)? {
            FsKind::Ntfs if launcher::is_enabled() => {
                self.mount_ntfs(start, len).map(Engine::Confined)
            }
            FsKind::Ntfs => {
                check_ntfs(self.disk.clone(), start, len, self.options)?;
                Ntfs3g::mount(self.disk.clone(), start, len, self.options).map(Engine::Ntfs)
            }
            FsKind::Fat => FatWriter::mount(self.disk.clone(), start, len)
                .map(Box::new)
                .map(Engine::Fat),
            _ => Err(GuestError::NoVolume(volume)),
        }
    }
}

/// Refuses a volume that Windows has not released. `libntfs-3g` also checks the log and the
/// hibernation file, but not the dirty flag. Its reason is only a number.
pub(super) fn check_ntfs(
    disk: Arc<dyn BlockRead>,
    start: u64,
    len: u64,
    options: MountOptions,
) -> Result<()> {
    let root = GuestPath::root();
    let volume = NtfsVolume::open(disk, start, len).map_err(|e| e.at(&root))?;
    let refuse = |reason: &str| {
        Err(GuestError::Unsafe {
            reason: reason.to_string(),
        })
    };
    if volume.hibernated().map_err(|e| e.at(&root))? {
        return refuse("hiberfil.sys holds a hibernated session of Windows");
    }
    let log = volume.log_state().map_err(|e| e.at(&root))?;
    if log == LogState::Cached {
        return refuse("Fast Startup keeps parts of the volume in memory (log version 2.0)");
    }
    if options.force_dirty {
        return Ok(());
    }
    match log {
        LogState::Dirty => refuse("its log file is not clean: Windows was not shut down properly"),
        LogState::Damaged => refuse("its log file is damaged"),
        _ if volume.dirty_flag().map_err(|e| e.at(&root))? => {
            refuse("it is marked dirty: Windows will check it at the next start")
        }
        _ => Ok(()),
    }
}

impl GuestWrite for EmbeddedWriter {
    fn create_dir(&mut self, volume: VolumeId, path: &GuestPath) -> Result<()> {
        match self.engine(volume)? {
            Engine::Confined(v) => v.create_dir(path),
            Engine::Ntfs(v) => v.create_dir(path),
            Engine::Fat(v) => v.create_dir(path),
        }
    }

    fn write_file(&mut self, volume: VolumeId, path: &GuestPath, contents: &[u8]) -> Result<()> {
        match self.engine(volume)? {
            Engine::Confined(v) => v.write_file(path, contents),
            Engine::Ntfs(v) => v.write_file(path, contents),
            Engine::Fat(v) => v.write_file(path, contents),
        }
    }

    fn patch_file(
        &mut self,
        volume: VolumeId,
        path: &GuestPath,
        size: u64,
        extents: &[Extent],
    ) -> Result<()> {
        match self.engine(volume)? {
            Engine::Confined(v) => v.patch_file(path, size, extents),
            Engine::Ntfs(v) => v.patch_file(path, size, extents),
            Engine::Fat(v) => v.patch_file(path, size, extents),
        }
    }

    fn patch_boot_sector(&mut self, volume: VolumeId, extents: &[Extent]) -> Result<()> {
        check_extents("changing", &GuestPath::root(), BOOT_SECTOR, extents)?;
        // Mounting checks that the volume may be changed.
        self.engine(volume)?;
        let partition = self.partition(volume)?;
        let start = partition.start_bytes;
        for extent in extents {
            self.disk.write_at(start + extent.offset, &extent.data)?;
        }
        Ok(())
    }

    fn remove_file(&mut self, volume: VolumeId, path: &GuestPath) -> Result<()> {
        match self.engine(volume)? {
            Engine::Confined(v) => v.remove_file(path),
            Engine::Ntfs(v) => v.remove_file(path),
            Engine::Fat(v) => v.remove_file(path),
        }
    }

    fn remove_dir(&mut self, volume: VolumeId, path: &GuestPath) -> Result<()> {
        match self.engine(volume)? {
            Engine::Confined(v) => v.remove_dir(path),
            Engine::Ntfs(v) => v.remove_dir(path),
            Engine::Fat(v) => v.remove_dir(path),
        }
    }

    /// Unmounts every volume even if one of them fails, then returns the first failure.
    fn close(mut self: Box<Self>) -> Result<()> {
        let mut result = Ok(());
        for (_, engine) in std::mem::take(&mut self.engines) {
            let closed = match engine {
                Engine::Confined(v) => v.unmount(),
                Engine::Ntfs(v) => v.unmount(),
                Engine::Fat(v) => v.close(),
            };
            match (&result, closed) {
                (_, Ok(())) => {}
                (Ok(()), Err(error)) => result = Err(error),
                (Err(_), Err(error)) => tracing::error!("{error}"),
            }
        }
        result.and(self.disk.flush().map_err(GuestError::Io))
    }
}

impl Drop for EmbeddedWriter {
    fn drop(&mut self) {
        if !self.engines.is_empty() {
            // The engines unmount when they are dropped, and log failures.
            tracing::warn!("a guest volume was not closed: unmounting it now");
        }
    }
}
