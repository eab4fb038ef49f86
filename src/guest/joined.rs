//! The volumes of several disks as one guest: Windows on one disk, its boot files on another.
//!
//! Each disk keeps the engine that opened it. Volumes are named by disk and partition here, and by
//! the partition alone to the engine of the disk.

use std::sync::Arc;

use super::{
    DiskId, Extent, FileInfo, GuestError, GuestPath, GuestRead, GuestWrite, Result, Volume,
    VolumeId,
};
use crate::memory::FileBytes;

/// A file whose written contents are in memory.
#[derive(Debug, Clone)]
pub struct KnownFile {
    pub volume: VolumeId,
    pub path: GuestPath,
    pub bytes: Arc<FileBytes>,
}

/// The number of bytes compared with a known file at a time.
const PIECE: usize = 4 << 20;

/// Reads the disks of a VM.
pub struct JoinedReader<'g> {
    disks: Vec<(DiskId, &'g dyn GuestRead)>,
    volumes: Vec<Volume>,
    known: &'g [KnownFile],
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
        Self {
            disks,
            volumes,
            known: &[],
        }
    }

    /// Reads these files without extra memory, as long as the disk has the same bytes.
    pub fn knowing(mut self, known: &'g [KnownFile]) -> Self {
        self.known = known;
        self
    }

    /// Reads a known file from the disk and compares every byte.
    fn is_on_disk(&self, known: &KnownFile, limit: u64) -> Result<bool> {
        let size = known.bytes.len() as u64;
        let found = self.stat(known.volume, &known.path)?;
        if size > limit || found.is_none_or(|info| info.size != size) {
            return Ok(false);
        }
        let mut offset = 0;
        for piece in known.bytes.chunks(PIECE) {
            if self.read_at(known.volume, &known.path, offset, piece.len())? != piece {
                return Ok(false);
            }
            offset += piece.len() as u64;
        }
        Ok(true)
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

    fn read_shared(
        &self,
        volume: VolumeId,
        path: &GuestPath,
        limit: u64,
    ) -> Result<Arc<FileBytes>> {
        let is_it = |k: &&KnownFile| k.volume == volume && k.path.key() == path.key();
        match self.known.iter().find(is_it) {
            // If it cannot be compared, reading it as a whole reports the reason.
            Some(known) if self.is_on_disk(known, limit).unwrap_or(false) => {
                Ok(known.bytes.clone())
            }
            _ => self.of(volume)?.read_shared(volume.within(), path, limit),
        }
    }

    fn free_bytes(&self, volume: VolumeId, enough: u64) -> Result<Option<u64>> {
        self.of(volume)?.free_bytes(volume.within(), enough)
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

    /// Closes every disk, even if one of them fails.
    fn close(self: Box<Self>) -> Result<()> {
        let mut outcome = Ok(());
        for (_, writer) in self.disks {
            outcome = outcome.and(writer.close());
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::fake::FakeGuest;

    /// The bytes in memory are returned only if the disk has exactly the same.
    #[test]
    fn a_known_file_is_compared_with_the_disk() {
        let same = vec![7; PIECE + 5];
        let change = |at: usize| {
            let mut other = same.clone();
            other[at] = 8;
            other
        };
        let (volume, path) = (VolumeId::new(1), GuestPath::parse("Windows/x").unwrap());
        let cases = [
            (same.clone(), true),
            (change(0), false),
            (change(PIECE + 4), false),
            (same[..PIECE].to_vec(), false),
            ([&same[..], &[7]].concat(), false),
        ];
        for (on_disk, is_same) in cases {
            let mut guest = FakeGuest::default();
            guest.file(1, "Windows/x", on_disk.clone());
            let known = [KnownFile {
                volume,
                path: GuestPath::parse("windows/X").unwrap(),
                bytes: Arc::new(same.clone().into()),
            }];
            let reader = JoinedReader::new(vec![(DiskId::ONLY, &guest)]).knowing(&known);
            let read = reader.read_shared(volume, &path, 1 << 30).unwrap();
            assert_eq!(read[..], on_disk[..]);
            assert_eq!(Arc::ptr_eq(&read, &known[0].bytes), is_same);
            let limited = reader.read_shared(volume, &path, 1 << 10);
            assert!(limited.is_err(), "the limit holds for what is in memory");
        }
    }
}
