//! What is known about a Linux guest: the part of `inspect --json` below `linux`, and what the
//! conversion needs beyond it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::bootloader::Loader;
use crate::boot_path::Controller;
use crate::guest::{GuestPath, VolumeId};

#[derive(Debug, Clone, Default, Serialize)]
pub struct LinuxFacts {
    /// `ID` of os-release: `debian`, `rhel`, ...; empty when it has none.
    pub distribution: String,
    /// `ID_LIKE`.
    pub like: Vec<String>,
    /// `VERSION_ID`.
    pub version: Option<String>,
    /// Who read the files: `embedded` or `guestfish`.
    pub reader: &'static str,
    pub root: RootFacts,
    pub boot_loader: Loader,
    /// The one that starts by itself first.
    pub kernels: Vec<Kernel>,
    /// `\EFI\BOOT\BOOTX64.EFI` is there; `None` without an EFI system partition.
    pub fallback_loader: Option<bool>,
    /// What makes it be there.
    #[serde(skip)]
    pub fallback: Option<LoaderCopies>,
    /// Devices named by what they hang on.
    #[serde(skip)]
    pub names: Vec<DeviceName>,
    /// The hardware clock runs in local time (`/etc/adjtime`).
    pub clock_is_local: bool,
    pub sector_size: u32,
    /// Interface names made from a PCI slot, with the file that has them.
    pub interfaces: Vec<(String, String)>,
}

impl LinuxFacts {
    pub fn default_kernel(&self) -> Option<&Kernel> {
        self.kernels.iter().find(|k| k.default)
    }

    /// Whether every kernel that may start by itself finds its root on this controller.
    pub fn ready(&self, controller: Controller) -> bool {
        match self.default_kernel() {
            Some(kernel) => kernel.ready.contains(&controller),
            None => {
                !self.kernels.is_empty()
                    && self.kernels.iter().all(|k| k.ready.contains(&controller))
            }
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RootFacts {
    /// `disk 1, partition 2`, or the device in the appliance (`/dev/rhel/root`).
    pub place: String,
    pub filesystem: String,
    /// What lies between the partition and the file system: `lvm`, `raid`, `luks`.
    pub layers: Vec<&'static str>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Kernel {
    pub version: Option<String>,
    /// As the boot loader names it.
    pub image: String,
    pub initramfs: Vec<String>,
    /// The boot loader starts it by itself.
    pub default: bool,
    /// It is in the boot menu.
    pub in_menu: bool,
    /// `root=`.
    pub root: Option<String>,
    /// `builtin`, `initramfs` or `missing`, by module.
    pub drivers: BTreeMap<String, &'static str>,
    /// From these it finds its root file system.
    pub ready: Vec<Controller>,
    /// What is missing, by controller.
    pub missing: BTreeMap<Controller, String>,
    /// Why nothing could be told.
    pub problem: Option<String>,
}

/// A device that is named by what it hangs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceName {
    pub file: String,
    pub device: String,
    pub family: Family,
    /// The guest does not come up without it.
    pub needed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `/dev/sda`: SCSI, SATA.
    Scsi,
    /// `/dev/hda`: the old IDE drivers.
    Ide,
    /// `/dev/vda`.
    Virtio,
    /// `/dev/xvda`.
    Xen,
    /// NVMe, `by-path`, `by-id`: changes with any other hardware.
    Hardware,
}

impl Family {
    /// Whether a disk that had such a name has it on this controller too.
    pub fn stays(self, controller: Controller) -> bool {
        match self {
            Family::Scsi => controller != Controller::VirtioBlk,
            Family::Virtio => controller == Controller::VirtioBlk,
            Family::Ide | Family::Xen | Family::Hardware => false,
        }
    }
}

/// Files of the EFI system partition to copy so that firmware without boot entries finds a loader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoaderCopies {
    /// Index in the disks of the machine.
    pub disk: usize,
    pub volume: VolumeId,
    /// To make first, outermost first.
    pub folders: Vec<GuestPath>,
    pub copies: Vec<LoaderCopy>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoaderCopy {
    pub from: GuestPath,
    pub to: GuestPath,
    pub size: u64,
}
