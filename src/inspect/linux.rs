//! What is known about a Linux guest: the part of `inspect --json` below `linux`, and what the
//! conversion needs beyond it.

use serde::Serialize;

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
    /// `\EFI\BOOT\BOOTX64.EFI` is there; `None` without an EFI system partition.
    pub fallback_loader: Option<bool>,
    /// What makes it be there.
    #[serde(skip)]
    pub fallback: Option<LoaderCopies>,
    /// Devices of `/etc/fstab` whose names come from the hardware, and change with it.
    pub device_names: Vec<String>,
    /// The hardware clock runs in local time (`/etc/adjtime`).
    pub clock_is_local: bool,
    pub sector_size: u32,
    /// Interface names made from a PCI slot, with the file that has them.
    pub interfaces: Vec<(String, String)>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RootFacts {
    /// `disk 1, partition 2`, or the device in the appliance (`/dev/rhel/root`).
    pub place: String,
    pub filesystem: String,
    /// What lies between the partition and the file system: `lvm`, `raid`, `luks`.
    pub layers: Vec<&'static str>,
}

/// Files of the EFI system partition to copy so that firmware without boot entries finds a loader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoaderCopies {
    /// Index in the disks of the VM.
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
