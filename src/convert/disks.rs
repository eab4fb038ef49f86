//! A disk on its way from the source to the new VM.

use std::path::PathBuf;

use crate::disk::chain::Image;
use crate::domain::{self, Backing, DiskFormat};
use crate::error::{Error, Result};
use crate::guest::DiskId;
use crate::inspect::Inspection;
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
    pub(super) fn new(disks: &VmDisks, id: DiskId, image: Image, guest: &Inspection) -> Self {
        Self::with_sectors(disks, id, image, guest.sector_size(id))
    }

    fn with_sectors(disks: &VmDisks, id: DiskId, image: Image, sector_size: u32) -> Self {
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
        let disk = Self::with_sectors(disks, id, image, sector_size);
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

#[cfg(test)]
mod tests {
    use super::super::testing::job;
    use super::*;
    use crate::demo::WinVersion;
    use crate::testing::MemoryGuest;

    #[test]
    fn each_disk_of_the_new_vm_has_its_own_sectors_size_and_place() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [1, 2].map(|i| dir.path().join(format!("{i}.raw")));
        for (path, mib) in paths.iter().zip([1, 2]) {
            std::fs::write(path, vec![0; mib << 20]).unwrap();
        }
        let list = job(&paths, dir.path())
            .source
            .disks(dir.path())
            .unwrap()
            .to_vec();
        let id = |i| DiskId::nth(i, 2);
        let disks = VmDisks::with_roles(list, id(0), id(1));
        let mut guest =
            MemoryGuest::new(WinVersion::Win10).look(&[], |_, survey| survey.inspection.clone());
        let mut other = guest.disks[0].clone();
        for (disk, index, sectors) in [(&mut guest.disks[0], 1, 512), (&mut other, 2, 4096)] {
            (disk.index, disk.sector_size) = (index, sectors);
        }
        guest.disks.push(other);
        let made = |i: usize| {
            let disk = Disk::new(&disks, id(i), disks[i].image.clone(), &guest);
            disk.at("/out".into(), DiskFormat::Raw, Vec::new())
        };
        for (i, sectors, system, order) in [(0, 512, true, Some(2)), (1, 4096, false, Some(1))] {
            let disk = made(i);
            assert_eq!(
                (disk.sector_size, disk.system, disk.boot_order),
                (sectors, system, order)
            );
            assert_eq!(disk.size_bytes, (i as u64 + 1) << 20);
        }
        // Firmware starts a Linux from the disk with the system.
        let linux = |i: usize| Disk::of_linux(&disks, id(i), disks[i].image.clone(), 4096);
        let found = [0, 1].map(|i| (linux(i).boot_order, linux(i).sector_size));
        assert_eq!(found, [(Some(1), 4096), (None, 4096)]);
    }
}
