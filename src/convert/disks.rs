//! A disk on its way from the source to the new VM.

use std::path::PathBuf;

use crate::disk::chain::Image;
use crate::domain::{self, Backing, DiskFormat};
use crate::error::{Error, Result};
use crate::guest::DiskId;
use crate::session::vm::VmDisks;

/// The origin of one disk of the new VM.
pub(super) struct Disk {
    pub(super) id: DiskId,
    /// An overlay of this run, or the source itself.
    pub(super) image: Image,
    pub(super) sector_size: u32,
    /// Whether the guest's system is on this disk.
    pub(super) system: bool,
    pub(super) boot_order: Option<u32>,
}

impl Disk {
    pub(super) fn new(disks: &VmDisks, id: DiskId, image: Image, sector_size: u32) -> Self {
        Self {
            id,
            image,
            sector_size,
            system: disks.is_system(id),
            boot_order: disks.boot_order(id),
        }
    }

    /// Creates the disk of a Linux guest. Its firmware starts from the system disk.
    pub(super) fn of_linux(disks: &VmDisks, id: DiskId, image: Image, sector_size: u32) -> Self {
        let disk = Self::new(disks, id, image, sector_size);
        Self {
            boot_order: disk.system.then_some(1),
            ..disk
        }
    }

    /// Creates a disk of the new VM: an overlay on `backing`, or a standalone image if `backing` is
    /// empty.
    pub(super) fn at(
        &self,
        path: PathBuf,
        format: DiskFormat,
        backing: Vec<Backing>,
    ) -> domain::Disk {
        domain::Disk {
            path,
            format,
            serial: None,
            sector_size: self.sector_size,
            system: self.system,
            boot_order: self.boot_order,
            size_bytes: self.image.virtual_size(),
            backing,
        }
    }
}

/// Returns the format if KVM can run a VM from it; other formats have to be converted.
pub(super) fn in_place_format(image: &Image) -> Result<DiskFormat> {
    match image.format().driver() {
        "qcow2" => Ok(DiskFormat::Qcow2),
        "raw" => Ok(DiskFormat::Raw),
        other => Err(Error::usage(format!(
            "--in-place works on qcow2 and raw disks, and this is {other}"
        ))
        .hint("convert without --in-place: the source is not changed then")),
    }
}
