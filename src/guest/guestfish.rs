//! The guestfish engine: the guest's file systems are mounted in libguestfs' appliance, a small VM,
//! and never on this host.
//!
//! One appliance serves one disk, for reading and then for writing. It is attached to hyper2kvm's
//! storage daemon over NBD. So it sees the same overlay as everything else, and opens no image file
//! itself. The state of a volume is read by the same code as in the embedded engine. It reads the
//! disk itself, or the device on which the appliance exposes its contents
//! ([`super::guestfish_mapped`]).
//!
//! ntfs-3g hides `$Boot`, which is therefore read from the disk.

use std::sync::Arc;

use super::guestfish_appliance::mount_point;
pub use super::guestfish_appliance::{Appliance, text};
pub use super::guestfish_boot::{Attach, start};
use super::guestfish_mapped as mapped;
use super::keys::Keys;
use super::{
    FileInfo, FileKind, FsKind, GuestError, GuestPath, GuestRead, Result, Volume, VolumeId,
    embedded,
};
use crate::block::BlockRead;
use crate::disk::layout::DiskLayout;
use crate::tool::guestfish::{Line, TOOL};

/// A disk whose volumes are read in the appliance.
pub struct GuestfishReader {
    appliance: Appliance,
    disk: Arc<dyn BlockRead>,
    volumes: Vec<Volume>,
}

/// Mounts every NTFS and FAT volume read-only in the appliance, including those that a key or the
/// appliance itself opens. A volume that cannot be mounted does not fail the disk.
pub fn open(
    appliance: Appliance,
    disk: Arc<dyn BlockRead>,
    layout: &DiskLayout,
    keys: &Keys,
) -> Result<GuestfishReader> {
    let mut volumes = embedded::open(disk.clone(), layout)?.volumes().to_vec();
    mapped::open(&appliance, &mut volumes, keys)?;
    appliance.with(|inner| {
        let feature = inner.one(Line::new("feature-available").arg("ntfs3g"))?;
        let ntfs = matches!(&feature, Ok(answer) if answer.starts_with(b"true"));
        for volume in &mut volumes {
            let options = match volume.kind {
                FsKind::Ntfs if !ntfs => return Err(no_ntfs()),
                FsKind::Ntfs => "ro",
                FsKind::Fat => "ro,utf8",
                _ => continue,
            };
            let made = inner.one(Line::new("mkmountpoint").arg(mount_point(volume.id)))?;
            let mounted = match made {
                Ok(_) => inner.mount(volume.id, volume.kind, options)?,
                Err(reason) => Err(reason),
            };
            if let Err(reason) = mounted {
                if reason.contains("unknown filesystem type") {
                    return Err(no_ntfs());
                }
                volume.state.unreadable.get_or_insert(reason);
            }
        }
        Ok(())
    })?;
    Ok(GuestfishReader {
        appliance,
        disk,
        volumes,
    })
}

/// The boot sectors of an NTFS volume, under the name that [`GuestPath::key`] returns.
const BOOT: &str = "\\$boot";
const BOOT_LEN: u64 = 8192;

impl GuestfishReader {
    /// The bytes of a volume: a disk, and the offset of the volume on it.
    fn block(&self, volume: VolumeId) -> Result<(Arc<dyn BlockRead>, u64)> {
        if let Some(block) = mapped::block(&self.appliance, volume)? {
            return Ok((block, 0));
        }
        let found = self.volumes.iter().find(|v| v.id == volume);
        let start = found
            .ok_or(GuestError::NoVolume(volume))?
            .partition
            .start_bytes;
        Ok((self.disk.clone(), start))
    }
}

fn no_ntfs() -> GuestError {
    GuestError::MissingTool {
        what: "NTFS in the libguestfs appliance".to_string(),
        hint: "install ntfs-3g (Debian, Ubuntu, openSUSE) or libguestfs-winsupport (RHEL), or use --engine embedded".to_string(),
    }
}

impl GuestRead for GuestfishReader {
    fn engine(&self) -> &'static str {
        TOOL
    }

    fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    fn stat(&self, volume: VolumeId, path: &GuestPath) -> Result<Option<FileInfo>> {
        self.appliance.with(|inner| {
            let Some(place) = inner.find(volume, path)? else {
                return Ok(None);
            };
            let Some(entry) = place.entry else {
                return Ok(None);
            };
            Ok(inner.describe(volume, vec![(place.real, entry)])?.pop())
        })
    }

    fn list(&self, volume: VolumeId, path: &GuestPath) -> Result<Vec<FileInfo>> {
        self.appliance.with(|inner| {
            let not_found = || GuestError::not_found(path);
            let place = inner.find(volume, path)?.ok_or_else(not_found)?;
            let entry = place.entry.ok_or_else(not_found)?;
            if entry.kind != FileKind::Dir {
                return Err(GuestError::WrongKind {
                    path: path.to_string(),
                    expected: "directory",
                });
            }
            let entries: Vec<_> = inner
                .folder(&place.real)?
                .values()
                .map(|entry| (format!("{}/{}", place.real, entry.name), entry.clone()))
                .collect();
            inner.describe(volume, entries)
        })
    }

    fn read_at(
        &self,
        volume: VolumeId,
        path: &GuestPath,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        if path.key() == BOOT
            && self
                .volumes
                .iter()
                .any(|v| v.id == volume && v.kind == FsKind::Ntfs)
        {
            let (block, start) = self.block(volume)?;
            let room = BOOT_LEN.saturating_sub(offset).min(len as u64);
            let mut bytes = vec![0; room as usize];
            block.read_at(start.saturating_add(offset), &mut bytes)?;
            return Ok(bytes);
        }
        self.appliance.with(|inner| {
            let (real, size) = inner.file_at(volume, path)?;
            let len = (len as u64).min(size.saturating_sub(offset));
            inner.download(&real, path, offset, len)
        })
    }

    fn read(&self, volume: VolumeId, path: &GuestPath, limit: u64) -> Result<Vec<u8>> {
        self.appliance.with(|inner| {
            let (real, size) = inner.file_at(volume, path)?;
            GuestError::check_size(path, size, limit)?;
            inner.download(&real, path, 0, size)
        })
    }
}
