//! The results of an inspection: the data for plan, report and `inspect --json`.
//!
//! [`Inspection`] serialises to the keys of `inspect --json`. Further facts for the plan are in
//! [`WindowsFacts`] (typed, not serialised). The bytes of the hives are in [`Hives`], so that they
//! are read from the disk once. Text from the guest is stripped of control characters and limited
//! in length ([`crate::text::guest_text`]) before it gets here.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::boot_path::BootPath;
use crate::disk::layout::Scheme;
use crate::drivers::{Arch, WindowsTarget};
use crate::error::Blocker;
use crate::guest::{DiskId, FsKind, GuestPath, VolumeId, VolumeState};
use crate::inspect::linux::LinuxFacts;
use crate::memory::FileBytes;
use crate::registry::RegOp;
pub use crate::types::Firmware;
use crate::types::{ControlSet, DiskBus};

/// The result of `inspect()`: the facts, and the hives from which they were read.
#[derive(Debug, Clone)]
pub struct Survey {
    pub inspection: Inspection,
    /// Set if a Windows was found and its hives could be loaded.
    pub hives: Option<Hives>,
}

/// The location of the boot manager for the firmware.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BootFiles {
    /// The disk from which the firmware starts.
    pub disk: DiskId,
    pub firmware: Option<Firmware>,
    pub esp: Option<VolumeId>,
    /// The active partition with the BIOS boot manager.
    pub boot_volume: Option<VolumeId>,
}

impl BootFiles {
    /// Whether the disk has a Windows boot manager.
    pub fn found(&self) -> bool {
        self.esp.is_some() || self.boot_volume.is_some()
    }
}

/// The hives as Windows would see them, log files replayed.
#[derive(Debug, Clone)]
pub struct Hives {
    pub system: LoadedBytes,
    pub software: LoadedBytes,
    /// `System32\config\DRIVERS`, Windows 8.1 and later.
    pub drivers: Option<LoadedBytes>,
    /// The boot configuration, on the boot volume.
    pub bcd: Option<LoadedBytes>,
}

/// One hive file in memory.
#[derive(Debug, Clone)]
pub struct LoadedBytes {
    pub path: GuestPath,
    /// The recovered image that Windows would use. Shared, so that a large hive is in memory only
    /// once.
    pub bytes: Arc<FileBytes>,
    /// Whether `bytes` differ from the file because log entries were applied.
    pub replayed: bool,
    /// The transaction logs beside it that are not empty (`.LOG1`, `.LOG2`, `.LOG`).
    pub logs: Vec<GuestPath>,
}

/// The origin of the bytes, provided by the caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SourceFacts {
    pub path: String,
    pub format: String,
    pub virtual_size_bytes: u64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    pub source: SourceFacts,
    /// The disk with Windows first, the others in the order of the source.
    pub disks: Vec<DiskFacts>,
    /// `None` without a UEFI or BIOS boot set-up.
    pub firmware: Option<Firmware>,
    pub os: OsFacts,
    pub hives: HiveFacts,
    /// Empty if no Windows could be examined.
    pub controllers: BTreeMap<DiskBus, BootPath>,
    pub drivers: DriverFacts,
    pub network: NetworkFacts,
    pub hypervisor_tools: Vec<String>,
    pub bitlocker: bool,
    pub hibernated: bool,
    pub volume_dirty: bool,
    pub vss_snapshots: bool,
    pub dynamic_disk: bool,
    pub compact_os: bool,
    pub pending_updates: bool,
    pub antivirus: Vec<String>,
    pub group_policy_device_restrictions: bool,
    pub findings: Vec<Finding>,
    /// Set if the guest is a Linux that could be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub linux: Option<LinuxFacts>,
    /// Facts for the plan that scripts do not need; set if the hives could be read.
    #[serde(skip)]
    pub windows: Option<WindowsFacts>,
}

impl Inspection {
    /// The sector size for which the partition table of that disk was written.
    pub fn sector_size(&self, disk: DiskId) -> u32 {
        let mut disks = self.disks.iter();
        disks
            .find(|d| d.index == disk.number())
            .map_or(512, |d| d.sector_size)
    }

    /// The findings that stop a conversion.
    pub fn blockers(&self) -> Vec<Blocker> {
        self.findings
            .iter()
            .filter(|f| f.severity == Severity::Blocker)
            .map(|f| Blocker::new(f.id, f.message.clone(), f.remedy.clone()))
            .collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskFacts {
    /// The number of the disk in the VM, from 1 in the order of the source.
    pub index: u32,
    pub path: String,
    /// Whether Windows is on it.
    pub windows: bool,
    /// Whether the firmware starts from it: the Windows boot manager is on it.
    pub boot_files: bool,
    pub scheme: Scheme,
    pub sector_size: u32,
    pub disk_id: Option<String>,
    pub partitions: Vec<PartitionFacts>,
    /// Logical volumes and those of dynamic disks, if the engine opened them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<PartitionFacts>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PartitionFacts {
    pub index: u32,
    #[serde(rename = "type")]
    pub type_id: String,
    pub start_bytes: u64,
    pub size_bytes: u64,
    pub filesystem: FsKind,
    pub label: Option<String>,
    pub name: Option<String>,
    pub active: bool,
    /// `None` for a partition without a known file system.
    pub state: Option<VolumeState>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OsFamily {
    Windows,
    Linux,
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OsFacts {
    pub family: OsFamily,
    pub product_name: Option<String>,
    /// `22H2`, `1809`, `SP1`.
    pub display_version: Option<String>,
    pub build: Option<u32>,
    /// The update build revision (UBR).
    pub revision: Option<u32>,
    /// `EditionID`: `Professional`, `ServerStandard`, ...
    pub edition: Option<String>,
    /// `Client`, `Server`, `Server Core`, ...
    pub installation_type: Option<String>,
    pub arch: Option<Arch>,
    pub control_set: Option<ControlSet>,
    pub windows_root: Option<GuestPath>,
    pub hostname: Option<String>,
    /// Directories of the virtio-win ISO that fit this Windows, best first.
    pub driver_folders: Vec<String>,
}

impl OsFacts {
    pub fn unknown() -> Self {
        Self {
            family: OsFamily::Unknown,
            product_name: None,
            display_version: None,
            build: None,
            revision: None,
            edition: None,
            installation_type: None,
            arch: None,
            control_set: None,
            windows_root: None,
            hostname: None,
            driver_folders: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowsFacts {
    pub target: WindowsTarget,
    /// The volume of Windows itself.
    pub system_volume: VolumeId,
    /// E.g. `\Windows`, in the guest's own case.
    pub root: GuestPath,
    /// The control set that the boot loader uses, e.g. `ControlSet001`.
    pub control_set: ControlSet,
    /// Every control set of the hive, including the one above.
    pub control_sets: Vec<ControlSet>,
    /// The EFI system partition that boots this disk.
    pub esp: Option<VolumeId>,
    /// The BIOS boot volume: the active partition.
    pub boot_volume: Option<VolumeId>,
    pub boot: BootFacts,
    /// The disk from which the firmware starts; mostly that of `system_volume`.
    pub boot_disk: DiskId,
    pub sector_size: u32,
    /// `RealTimeIsUniversal`: whether the hardware clock runs in UTC.
    pub clock_is_utc: bool,
    /// The letter of the system volume in the running Windows, e.g. `C`.
    pub drive_letter: Option<char>,
    pub tools: Vec<Tool>,
    /// Windows' policy for disks that are new to it (`partmgr\Parameters\SanPolicy`): 1 brings all
    /// online, 2 and 4 leave those on a shared bus offline.
    pub san_policy: Option<u32>,
}

/// Boot files that may need changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootFacts {
    /// The volume with the BCD store.
    pub store: Option<VolumeId>,
    pub fallback: Option<Fallback>,
    /// Edits of the BCD that disable text mode.
    pub text_mode: Vec<RegOp>,
    /// Edits of the BCD that make the default entry name the partition of Windows; empty if it
    /// names an existing one.
    pub device_repair: Vec<RegOp>,
    /// Whether EMS or the kernel debugger owns COM1. Output for the host then goes to COM2.
    pub ems_on_com1: bool,
    /// The number of heads, if Windows XP and 2003 would stop because of it.
    pub heads: Option<SectorField>,
    /// The start of the partition, if the boot sector has another one.
    pub hidden: Option<SectorField>,
}

/// A number in the boot sector of the BIOS boot volume that should be different.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SectorField {
    pub name: &'static str,
    pub offset: u16,
    pub old: Vec<u8>,
    pub new: Vec<u8>,
}

/// A UEFI fall-back loader that is missing or not Windows' own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fallback {
    pub volume: VolumeId,
    /// Windows' own boot manager.
    pub from: GuestPath,
    pub to: GuestPath,
    pub size: u64,
    pub replaces: bool,
    /// The directory to create first.
    pub folder: Option<GuestPath>,
}

/// Guest software of a hypervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tool {
    /// Stable identifier: `vmware-tools`, `virtualbox-additions`, `hyper-v`, ...
    pub id: &'static str,
    pub name: &'static str,
    pub version: Option<String>,
    /// Its services, which a first-boot script stops or disables.
    pub services: Vec<String>,
    /// `UninstallString` of an MSI product, as its product code `{...}`.
    pub product_code: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct HiveFacts {
    pub system: Option<HiveState>,
    pub software: Option<HiveState>,
    pub drivers: Option<HiveState>,
    pub bcd: Option<HiveState>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HiveState {
    pub path: GuestPath,
    /// Whether the file alone differs from what Windows would see.
    pub dirty: bool,
    /// The number of entries in its logs that apply.
    pub log_entries_replayable: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DriverFacts {
    pub virtio: Vec<VirtioService>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VirtioService {
    pub service: String,
    pub start: Option<u32>,
    /// The first non-zero value below `StartOverride`.
    pub start_override: Option<u32>,
    pub image_present: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct NetworkFacts {
    pub adapters: Vec<Adapter>,
    /// The persistent IPv4 routes that are not a default route of an adapter. They belong to
    /// Windows, not to an adapter.
    pub routes: Vec<Route>,
}

/// A static route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Route {
    pub to: Cidr,
    pub gateway: IpAddr,
    /// `None`: Windows chooses.
    pub metric: Option<u32>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Adapter {
    /// Lower case, with braces.
    pub guid: String,
    /// Lower case, with colons.
    pub mac: Option<String>,
    /// The connection name: `Ethernet0`.
    pub name: Option<String>,
    pub dhcp: bool,
    /// The configured addresses, without those of a DHCP lease.
    pub addresses: Vec<Cidr>,
    pub gateways: Vec<IpAddr>,
    /// The metric of each gateway; `None`: Windows chooses.
    pub gateway_metrics: Vec<Option<u32>>,
    /// The configured DNS servers, without those of a DHCP lease.
    pub dns: Vec<IpAddr>,
    /// The connection's own DNS suffix.
    pub dns_suffix: Option<String>,
    pub wins: Vec<Ipv4Addr>,
    /// NetBIOS over TCP/IP: 1 on, 2 off; `None`: as set by DHCP.
    pub netbios: Option<u32>,
    /// Set only if it is below the NIC's maximum.
    pub mtu: Option<u32>,
    /// The metric of the interface; `None`: Windows chooses.
    pub metric: Option<u32>,
    /// Routes that belong to this adapter alone.
    pub routes: Vec<Route>,
    /// Whether it is enabled in the device manager.
    pub enabled: bool,
    /// The Plug and Play instance of the adapter: `PCI\VEN_15AD&DEV_07B0&...`.
    pub device: Option<String>,
}

/// An address with its prefix length, shown as `192.0.2.7/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    pub ip: IpAddr,
    pub prefix: u8,
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

impl Serialize for Cidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Info,
    Warning,
    Blocker,
}

/// A noteworthy fact with its consequence, its remedy and its evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable identifier, e.g. `volume-hibernated`.
    pub id: &'static str,
    pub severity: Severity,
    /// Names the consequence.
    pub message: String,
    pub remedy: String,
    /// The key, file or partition from which it was read.
    pub evidence: String,
}
