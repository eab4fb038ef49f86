//! The volumes of several disks as one guest: Windows on one disk, its boot files on another.
//!
//! Each disk keeps the engine that opened it. Volumes are named by disk and partition here, and by
//! the partition alone to the engine of the disk.

use super::{
    DiskId, Extent, FileInfo, GuestError, GuestPath, GuestRead, GuestWrite, Result, Volume,
    VolumeId,
};

/// Reads the disks of a VM.
pub struct JoinedReader<'g> {
    disks: Vec<(DiskId, &'g dyn GuestRead)>,
    volumes: Vec<Volume>,
}

impl<'g> JoinedReader<'g> {
    pub fn new(disks: Vec<(DiskId, &'g dyn GuestRead)>) -> Self {
        let mut volumes = Vec::new();
        for (disk, guest) in &disks {
            volumes.extend(guest.volumes().iter().map(|volume| Volume {
                id: VolumeId::of(*disk, volume.id.partition),
                ..volume.clone()
            }));
        }
        Self { disks, volumes }
    }

    fn of(&self, volume: VolumeId) -> Result<&'g dyn GuestRead> {
        let found = self.disks.iter().find(|(disk, _)| *disk == volume.disk);
        found
            .map(|(_, guest)| *guest)
            .ok_or(GuestError::NoVolume(volume))
    }
}

impl GuestRead for JoinedReader<'_> {
    fn engine(&self) -> &'static str {
        self.disks.first().map_or("none", |(_, g)| g.engine())
    }

    fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    fn stat(&self, volume: VolumeId, path: &GuestPath) -> Result<Option<FileInfo>> {
        self.of(volume)?.stat(volume.within(), path)
    }

    fn list(&self, volume: VolumeId, path: &GuestPath) -> Result<Vec<FileInfo>> {
        self.of(volume)?.list(volume.within(), path)
    }

    fn read_at(
        &self,
        volume: VolumeId,
        path: &GuestPath,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        self.of(volume)?.read_at(volume.within(), path, offset, len)
    }

    fn read(&self, volume: VolumeId, path: &GuestPath, limit: u64) -> Result<Vec<u8>> {
        self.of(volume)?.read(volume.within(), path, limit)
    }

    fn free_bytes(&self, volume: VolumeId) -> Result<Option<u64>> {
        self.of(volume)?.free_bytes(volume.within())
    }
}

/// Writes to the disks of a VM that have an overlay.
pub struct JoinedWriter {
    disks: Vec<(DiskId, Box<dyn GuestWrite>)>,
}

impl JoinedWriter {
    pub fn new(disks: Vec<(DiskId, Box<dyn GuestWrite>)>) -> Self {
        Self { disks }
    }

    fn of(&mut self, volume: VolumeId) -> Result<&mut dyn GuestWrite> {
        let found = self.disks.iter_mut().find(|(disk, _)| *disk == volume.disk);
        match found {
            Some((_, writer)) => Ok(writer.as_mut()),
            None => Err(GuestError::NoVolume(volume)),
        }
    }
}

impl GuestWrite for JoinedWriter {
    fn create_dir(&mut self, volume: VolumeId, path: &GuestPath) -> Result<()> {
        self.of(volume)?.create_dir(volume.within(), path)
    }

    fn write_file(&mut self, volume: VolumeId, path: &GuestPath, contents: &[u8]) -> Result<()> {
        self.of(volume)?.write_file(volume.within(), path, contents)
    }

    fn patch_file(
        &mut self,
        volume: VolumeId,
        path: &GuestPath,
        size: u64,
        extents: &[Extent],
    ) -> Result<()> {
        self.of(volume)?
            .patch_file(volume.within(), path, size, extents)
    }

    fn patch_boot_sector(&mut self, volume: VolumeId, extents: &[Extent]) -> Result<()> {
        self.of(volume)?.patch_boot_sector(volume.within(), extents)
    }

    fn remove_file(&mut self, volume: VolumeId, path: &GuestPath) -> Result<()> {
        self.of(volume)?.remove_file(volume.within(), path)
    }

    fn remove_dir(&mut self, volume: VolumeId, path: &GuestPath) -> Result<()> {
        self.of(volume)?.remove_dir(volume.within(), path)
    }

    /// Closes every disk, also after one could not be.
    fn close(self: Box<Self>) -> Result<()> {
        let mut outcome = Ok(());
        for (_, writer) in self.disks {
            outcome = outcome.and(writer.close());
        }
        outcome
    }
}
