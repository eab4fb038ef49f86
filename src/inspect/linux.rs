//! Facts about a Linux guest: the part of `inspect --json` below `linux`, and further facts that
//! the conversion needs.

use serde::Serialize;

use crate::guest::{GuestPath, VolumeId};

#[derive(Debug, Clone, Default, Serialize)]
pub struct LinuxFacts {
    /// `ID` of os-release: `debian`, `rhel`, ...; empty if it has none.
    pub distribution: String,
    /// `ID_LIKE`.
    pub like: Vec<String>,
    /// `VERSION_ID`.
    pub version: Option<String>,
    /// The engine that read the files: `embedded` or `guestfish`.
    pub reader: &'static str,
    pub root: RootFacts,
    /// Whether `\EFI\BOOT\BOOTX64.EFI` exists; `None` without an EFI system partition.
    pub fallback_loader: Option<bool>,
    /// The copies that create it.
    #[serde(skip)]
    pub fallback: Option<LoaderCopies>,
    /// Devices in `/etc/fstab` whose names depend on the hardware.
    pub device_names: Vec<String>,
    /// Whether the hardware clock runs in local time (`/etc/adjtime`).
    pub clock_is_local: bool,
    pub sector_size: u32,
    /// Interface names derived from a PCI slot, and the file that uses them.
    pub interfaces: Vec<(String, String)>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RootFacts {
    /// `disk 1, partition 2`, or the device in the appliance (`/dev/rhel/root`).
    pub place: String,
    pub filesystem: String,
    /// The layers between the partition and the file system: `lvm`, `raid`, `luks`.
    pub layers: Vec<&'static str>,
}

/// Files of the EFI system partition to copy so that firmware without boot entries finds a loader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoaderCopies {
    /// The index among the disks of the VM.
    pub disk: usize,
    pub volume: VolumeId,
    /// Directories to create first, outermost first.
    pub folders: Vec<GuestPath>,
    pub copies: Vec<LoaderCopy>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoaderCopy {
    pub from: GuestPath,
    pub to: GuestPath,
    pub size: u64,
}
