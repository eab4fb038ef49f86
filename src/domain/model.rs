//! The model of a converted VM.
//!
//! One [`Machine`] describes both stages. [`Stage::Bootstrap`] is the first boot on an emulated
//! controller with a virtio probe beside it; [`Stage::Final`] is production on virtio. Everything
//! that Windows could notice between the two (identity, slots, firmware, CPU) is the same by
//! construction, because it is stored once.

use std::fmt;
use std::path::PathBuf;

use clap::ValueEnum;

use crate::types::{Arch, DiskBus, MacAddr};
use serde::Serialize;
use uuid::Uuid;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Free text, which [`crate::domain::xml::domain_name`] turns into a libvirt name.
    pub name: String,
    /// The name of the source, if `name` shows nothing of it.
    pub title: Option<String>,
    pub uuid: Uuid,
    /// SMBIOS system serial number, if the source had one (licences are bound to it).
    pub serial: Option<String>,
    /// VM generation id, if the source had one.
    pub genid: Option<Uuid>,
    pub memory_mib: u64,
    pub vcpus: u32,
    /// `None`: one socket with all vCPUs as cores, since client Windows limits sockets.
    pub topology: Option<Topology>,
    pub firmware: Firmware,
    /// Whether there is a TPM 2.0; only written for UEFI guests.
    pub tpm: bool,
    pub system: System,
    /// Whether `RealTimeIsUniversal` is set, so the RTC runs in UTC.
    pub clock_utc: bool,
    /// The disks. Exactly one has the system, and exactly one is first in the boot order; mostly
    /// the same.
    pub disks: Vec<Disk>,
    pub nics: Vec<Nic>,
    /// The controller of the final stage.
    pub bus: DiskBus,
    /// The controller of the boot disk in the first boot; `None` without such a stage.
    pub bootstrap: Option<DiskBus>,
    /// The blank qcow2 disk of the first boot, which makes Windows bind the virtio storage driver.
    pub probe: Option<PathBuf>,
    pub driver_iso: Option<PathBuf>,
    pub domain_type: DomainType,
    pub cpu: CpuMode,
    /// The VM's own copy of the UEFI variables; without it libvirt uses its default path.
    pub nvram: Option<PathBuf>,
    pub drivers: Drivers,
    /// The emulator that replaces libvirt's choice.
    pub emulator: Option<PathBuf>,
    /// The file for COM1, which is emptied at each start; without it, a pty.
    pub serial_log: Option<PathBuf>,
    /// Whether the guest keeps COM1 for itself, so there is a COM2.
    pub second_serial: bool,
    pub graphics: Graphics,
    pub video: Video,
    /// QEMU's machine type as chosen by the user, e.g. `pc-q35-8.2`; otherwise the family of the
    /// chipset.
    pub machine_type: Option<String>,
}

impl Machine {
    /// The chipset of both stages. Unless the user has chosen one, NT 5 (no AHCI driver, no PCIe)
    /// and a bootstrap disk on IDE get i440fx. All others get q35.
    pub fn chipset(&self) -> Chipset {
        match &self.machine_type {
            Some(asked) if asked.contains("q35") => Chipset::Q35,
            Some(_) => Chipset::Pc,
            None if self.system.nt5() || self.bootstrap == Some(DiskBus::Ide) => Chipset::Pc,
            None => Chipset::Q35,
        }
    }

    pub fn machine_type(&self) -> &str {
        match &self.machine_type {
            Some(asked) => asked,
            None => self.chipset().as_str(),
        }
    }

    /// Whether Windows gets Hyper-V enlightenments. Under software emulation they gain nothing, on
    /// UEFI before 8 Windows hangs with them, and NT 5 does not support them.
    pub fn enlightened(&self) -> bool {
        let System::Windows(windows) = &self.system else {
            return false;
        };
        self.domain_type == DomainType::Kvm
            && !windows.nt5()
            && (windows.at_least_8() || self.firmware == Firmware::Bios)
    }

    /// The model of NIC for which Windows has a driver in that stage.
    pub fn nic_model(&self, stage: Stage) -> &'static str {
        if stage == Stage::Final || self.drivers.netkvm {
            "virtio"
        } else if self.system.is_recent() {
            "e1000e"
        } else if self.system.nt5() {
            "rtl8139"
        } else {
            "e1000"
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    pub sockets: u32,
    pub cores: u32,
    pub threads: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    Bios,
    Uefi { secure_boot: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chipset {
    Pc,
    Q35,
}

impl Chipset {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pc => "pc",
            Self::Q35 => "q35",
        }
    }
}

/// The operating system of the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum System {
    Windows(WindowsFacts),
    Linux {
        arch: Arch,
        /// The libosinfo id, if it is known.
        osinfo_id: Option<String>,
    },
}

impl System {
    pub fn arch(&self) -> Arch {
        match self {
            Self::Windows(windows) => windows.arch,
            Self::Linux { arch, .. } => *arch,
        }
    }

    /// Whether this is XP, Server 2003 or older.
    pub fn nt5(&self) -> bool {
        matches!(self, Self::Windows(windows) if windows.nt5())
    }

    /// Whether USB 3 and the Intel 82574L work without extra drivers.
    pub fn is_recent(&self) -> bool {
        match self {
            Self::Windows(windows) => windows.at_least_8(),
            Self::Linux { .. } => true,
        }
    }

    pub fn osinfo_id(&self) -> Option<String> {
        match self {
            Self::Windows(windows) => Some(windows.osinfo_id()),
            Self::Linux { osinfo_id, .. } => osinfo_id.clone(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowsFacts {
    pub major: u32,
    pub minor: u32,
    pub build: u32,
    pub arch: Arch,
    pub server: bool,
}

impl WindowsFacts {
    /// Whether this is XP, Server 2003 or older.
    pub fn nt5(&self) -> bool {
        self.major < 6
    }

    /// Whether this is 8 / Server 2012 or later: USB 3 and the Intel 82574L work without extra
    /// drivers.
    pub fn at_least_8(&self) -> bool {
        (self.major, self.minor) >= (6, 2)
    }

    /// The libosinfo id of this Windows.
    pub fn osinfo_id(&self) -> String {
        let short = match (self.major, self.minor, self.server) {
            (10.., _, false) if self.build >= 22000 => "11",
            (10.., _, false) => "10",
            (10.., _, true) => match self.build {
                26100.. => "2k25",
                20348.. => "2k22",
                17763.. => "2k19",
                _ => "2k16",
            },
            (6, 3, false) => "8.1",
            (6, 3, true) => "2k12r2",
            (6, 2, false) => "8",
            (6, 2, true) => "2k12",
            (6, 1, false) => "7",
            (6, 1, true) => "2k8r2",
            (6.., _, false) => "vista",
            (6.., _, true) => "2k8",
            // XP x64 is NT 5.2 like Server 2003, but not a server.
            (5, 1.., false) => "xp",
            (5, 1.., true) => "2k3",
            _ => "2k",
        };
        format!("http://microsoft.com/win/{short}")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Qcow2,
    Raw,
}

impl DiskFormat {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// The serial number of the system disk, by which `boot` finds it.
pub const SYSTEM_DISK: &str = "h2k-0";

/// The serial number of a disk at that position; the system's is the first.
pub fn disk_serial(position: usize) -> String {
    format!("h2k-{position}")
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Absolute; a path below `/dev` is a block device.
    pub path: PathBuf,
    pub format: DiskFormat,
    /// At most 20 of `[A-Za-z0-9_.+ -]`, the limit of virtio-blk and ATA.
    pub serial: Option<String>,
    /// Logical sector size: 512 or 4096.
    pub sector_size: u32,
    /// Whether the guest's system is on it.
    pub system: bool,
    /// Its position in the firmware's boot order, from 1. `None`: the firmware ignores it, and so
    /// do boot managers that read disks through the firmware.
    pub boot_order: Option<u32>,
    /// The size that the guest sees.
    pub size_bytes: u64,
    /// The chain below the disk, from the top; empty for a standalone disk.
    pub backing: Vec<Backing>,
}

/// One level below an overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Absolute; a path below `/dev` is a block device.
    pub path: PathBuf,
    /// The name of its format in QEMU and libvirt.
    pub format: String,
    /// Whether the path is a Unix socket on which an NBD server exports the level.
    pub socket: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    pub mac: MacAddr,
    /// The network for libvirt and QEMU, and for KubeVirt and Proxmox VE if no other is set.
    pub source: NicSource,
    pub link_up: bool,
    /// The name of its network on the source host.
    pub network: Option<String>,
    /// The network for KubeVirt.
    pub attachment: Option<Attachment>,
    /// The network for Proxmox VE.
    pub proxmox: Option<Bridge>,
    /// Whether Windows keeps a static address on it.
    pub keeps_address: bool,
}

impl Nic {
    pub fn new(mac: MacAddr, source: NicSource) -> Self {
        Self {
            mac,
            source,
            link_up: true,
            network: None,
            attachment: None,
            proxmox: None,
            keeps_address: false,
        }
    }
}

/// A bridge of the host, and the VLAN of a NIC on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    pub name: String,
    pub vlan: Option<u16>,
}

impl Bridge {
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            vlan: None,
        }
    }
}

impl fmt::Display for Bridge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vlan {
            Some(vlan) => write!(f, "{}@{vlan}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// A `NetworkAttachmentDefinition` of Multus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NicSource {
    Network(String),
    Bridge(Bridge),
    /// QEMU's own NAT: works without privileges, and is unreachable from outside.
    User,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DomainType {
    Kvm,
    // Software emulation, without Hyper-V enlightenments.
    Qemu,
}

/// The CPU under KVM; software emulation always provides every feature of QEMU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum CpuMode {
    #[default]
    HostPassthrough,
    // A model named by libvirt, so that the VM can move to a host with another CPU.
    HostModel,
}

/// The virtio drivers that Windows will have, beyond storage. A device without a driver is left
/// out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drivers {
    /// vioserial, and with it a guest agent channel.
    pub agent: bool,
    pub balloon: bool,
    pub rng: bool,
    pub netkvm: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Graphics {
    #[default]
    Vnc,
    Spice,
    None,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Video {
    #[default]
    Vga,
    Qxl,
    Virtio,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Bootstrap,
    Final,
}

impl Stage {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bootstrap => "bootstrap",
            Self::Final => "final",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn osinfo_ids() {
        for (major, minor, build, server, want) in [
            (5, 0, 2195, false, "2k"),
            (5, 1, 2600, false, "xp"),
            (5, 2, 3790, false, "xp"),
            (5, 2, 3790, true, "2k3"),
            (6, 0, 6002, false, "vista"),
            (6, 0, 6002, true, "2k8"),
            (6, 1, 7601, false, "7"),
            (6, 1, 7601, true, "2k8r2"),
            (6, 2, 9200, false, "8"),
            (6, 2, 9200, true, "2k12"),
            (6, 3, 9600, false, "8.1"),
            (6, 3, 9600, true, "2k12r2"),
            (10, 0, 14393, true, "2k16"),
            (10, 0, 17763, true, "2k19"),
            (10, 0, 20348, true, "2k22"),
            (10, 0, 26100, true, "2k25"),
            (10, 0, 19045, false, "10"),
            (10, 0, 22000, false, "11"),
            (10, 0, 26100, false, "11"),
        ] {
            let windows = WindowsFacts {
                major,
                minor,
                build,
                arch: Arch::Amd64,
                server,
            };
            let want = format!("http://microsoft.com/win/{want}");
            assert_eq!(windows.osinfo_id(), want);
        }
    }
}
