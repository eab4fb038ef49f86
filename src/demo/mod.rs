//! Generated guests with the shape of Windows: for `hyper2kvm demo`, and for the tests.
//!
//! A [`GuestSpec`] specifies the Windows and its disk; [`hives`] and [`bcd`] make its registry,
//! [`pe`] its programs, and [`guest`] the disk. The result has the shape of a real installation,
//! derived from real hives, in all places that this program reads. It has nothing else, and does
//! not boot. The hives are the same bytes for the same specification; the file systems are not
//! (their tools choose serial numbers).

pub mod bcd;
pub mod bitlocker;
pub mod cat;
pub(crate) mod driver_database;
pub mod guest;
pub mod hives;
mod network;
pub mod pack;
pub mod pe;
mod services;
pub mod virtio_win;

use std::net::Ipv6Addr;
use std::path::PathBuf;

use uuid::{Uuid, uuid};

pub use crate::drivers::Arch;
use crate::error::Error;
use crate::guest::{GuestError, PathError};
pub use crate::inspect::Firmware;
use crate::tool::ToolError;

/// The available Windows versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WinVersion {
    Xp,
    Server2003,
    Vista,
    Win7,
    Server2008R2,
    Win81,
    Server2012R2,
    Win10,
    Server2016,
    Server2019,
    Win11,
    Server2022,
    Server2025,
}

/// A version's values in the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VersionFacts {
    pub nt: (u32, u32),
    pub build: u32,
    /// Update build revision, Windows 8.1 and later.
    pub revision: u32,
    /// Windows' own value: Windows 11 still has 10.
    pub product_name: &'static str,
    /// `DisplayVersion`, or `ReleaseId` on versions with only that.
    pub release: Option<&'static str>,
    pub edition: &'static str,
    pub service_pack: Option<&'static str>,
}

impl WinVersion {
    pub const ALL: [WinVersion; 13] = [
        WinVersion::Xp,
        WinVersion::Server2003,
        WinVersion::Vista,
        WinVersion::Win7,
        WinVersion::Server2008R2,
        WinVersion::Win81,
        WinVersion::Server2012R2,
        WinVersion::Win10,
        WinVersion::Server2016,
        WinVersion::Server2019,
        WinVersion::Win11,
        WinVersion::Server2022,
        WinVersion::Server2025,
    ];

    #[allow(clippy::too_many_lines, reason = "a table, a row per version")]
    pub fn facts(self) -> VersionFacts {
        let (nt, build, revision, product_name, release, edition, service_pack) = match self {
            Self::Xp => (
                (5, 1),
                2600,
                0,
                "Microsoft Windows XP",
                None,
                "",
                Some("Service Pack 3"),
            ),
            Self::Server2003 => (
                (5, 2),
                3790,
                0,
                "Microsoft Windows Server 2003",
                None,
                "",
                Some("Service Pack 2"),
            ),
            Self::Vista => (
                (6, 0),
                6002,
                0,
                "Windows Vista (TM) Business",
                None,
                "Business",
                Some("Service Pack 2"),
            ),
            Self::Win7 => (
                (6, 1),
                7601,
                0,
                "Windows 7 Professional",
                None,
                "Professional",
                Some("Service Pack 1"),
            ),
            Self::Server2008R2 => (
                (6, 1),
                7601,
                0,
                "Windows Server 2008 R2 Standard",
                None,
                "ServerStandard",
                Some("Service Pack 1"),
            ),
            Self::Win81 => (
                (6, 3),
                9600,
                20671,
                "Windows 8.1 Pro",
                None,
                "Professional",
                None,
            ),
            Self::Server2012R2 => (
                (6, 3),
                9600,
                21620,
                "Windows Server 2012 R2 Standard",
                None,
                "ServerStandard",
                None,
            ),
            Self::Win10 => (
                (10, 0),
                19045,
                3803,
                "Windows 10 Pro",
                Some("22H2"),
                "Professional",
                None,
            ),
            Self::Server2016 => (
                (10, 0),
                14393,
                6529,
                "Windows Server 2016 Standard",
                Some("1607"),
                "ServerStandard",
                None,
            ),
            Self::Server2019 => (
                (10, 0),
                17763,
                5206,
                "Windows Server 2019 Standard",
                Some("1809"),
                "ServerStandard",
                None,
            ),
            Self::Win11 => (
                (10, 0),
                22631,
                2861,
                "Windows 10 Pro",
                Some("23H2"),
                "Professional",
                None,
            ),
            Self::Server2022 => (
                (10, 0),
                20348,
                2159,
                "Windows Server 2022 Standard",
                Some("21H2"),
                "ServerStandard",
                None,
            ),
            Self::Server2025 => (
                (10, 0),
                26100,
                1742,
                "Windows Server 2025 Standard",
                Some("24H2"),
                "ServerStandard",
                None,
            ),
        };
        VersionFacts {
            nt,
            build,
            revision,
            product_name,
            release,
            edition,
            service_pack,
        }
    }

    pub fn is_server(self) -> bool {
        matches!(
            self,
            Self::Server2003
                | Self::Server2008R2
                | Self::Server2012R2
                | Self::Server2016
                | Self::Server2019
                | Self::Server2022
                | Self::Server2025
        )
    }

    pub fn nt_at_least(self, major: u32, minor: u32) -> bool {
        self.facts().nt >= (major, minor)
    }

    /// Whether boot devices are bound through `DriverDatabase` (Windows 8 and later), not through
    /// `CriticalDeviceDatabase`.
    pub fn has_driver_database(self) -> bool {
        self.nt_at_least(6, 2)
    }
}

/// The remains of the old hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leftovers {
    None,
    /// On an LSI SAS controller, with VMware Tools.
    Vmware,
    HyperV,
}

/// A network adapter with its settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterSpec {
    /// The interface GUID, in braces and upper case.
    pub guid: String,
    pub name: String,
    pub mac: [u8; 6],
    pub ip: IpSpec,
    pub more: MoreIp,
}

/// Settings that few adapters have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MoreIp {
    /// One for each gateway; 0, or too few: Windows chooses.
    pub gateway_metrics: Vec<u32>,
    pub ipv6: Vec<(Ipv6Addr, u8)>,
    /// Gateways with the metric, 0 for none.
    pub gateways6: Vec<(Ipv6Addr, u32)>,
    pub dns6: Vec<Ipv6Addr>,
    pub dns_suffix: String,
    pub wins: Vec<String>,
    /// `NetbiosOptions`
    pub netbios: u32,
    pub mtu: Option<u32>,
    pub metric: Option<u32>,
    /// `destination,mask,gateway,metric` in the list of persistent routes.
    pub routes: Vec<String>,
    /// Whether it is disabled in the device manager.
    pub disabled: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IpSpec {
    Dhcp,
    Static {
        /// Address and mask, dotted.
        addresses: Vec<(String, String)>,
        gateways: Vec<String>,
        dns: Vec<String>,
    },
}

/// The volume of the guest for a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DemoVolume {
    /// The volume Windows is on.
    Windows,
    /// The ESP, or the active partition on a BIOS guest.
    Boot,
}

/// A file on the disk besides those of Windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtraFile {
    pub place: DemoVolume,
    /// Directories are created as needed.
    pub path: String,
    pub contents: Vec<u8>,
}

#[derive(Debug, Clone)]
pub struct GuestSpec {
    pub version: WinVersion,
    pub arch: Arch,
    pub firmware: Firmware,
    /// 512 or 4096.
    pub sector_size: u32,
    /// NTFS cluster size in bytes, 512 to 65536; at least the sector size.
    pub cluster_size: u32,
    pub disk_size: u64,
    /// On BIOS, a "System Reserved" partition in front, which is then the active one.
    pub system_reserved: bool,
    /// A recovery partition at the end.
    pub recovery: bool,
    pub leftovers: Leftovers,
    /// The control set in use: 1 or 2. The hive has both.
    pub control_set: u32,
    /// Whether the bus driver `pci` is overridden, as on Hyper-V guests of generation 2.
    pub pci_overridden: bool,
    pub adapters: Vec<AdapterSpec>,
    pub hostname: String,
    /// The directory of Windows, usually `Windows`.
    pub windows_dir: String,
    pub pagefile_size: u64,
    /// Whether programs and drivers are compressed like by CompactOS.
    pub compact_os: bool,
    /// Bytes in place of the generated hive.
    pub system_hive: Option<Vec<u8>>,
    pub software_hive: Option<Vec<u8>>,
    pub extra_files: Vec<ExtraFile>,
}

impl GuestSpec {
    /// A VMware guest with one adapter, on UEFI from Windows 10 on and on BIOS before.
    pub fn new(version: WinVersion) -> Self {
        let modern = version.nt_at_least(10, 0);
        Self {
            version,
            arch: if version.nt_at_least(6, 0) {
                Arch::Amd64
            } else {
                Arch::X86
            },
            firmware: if modern {
                Firmware::Uefi
            } else {
                Firmware::Bios
            },
            sector_size: 512,
            cluster_size: 4096,
            disk_size: 2 << 30,
            system_reserved: version.nt_at_least(6, 1),
            recovery: modern,
            leftovers: Leftovers::Vmware,
            control_set: 1,
            pci_overridden: false,
            adapters: vec![AdapterSpec {
                guid: "{5F3F359E-9D52-4566-9BEC-37EFDFB25ABE}".into(),
                name: "Ethernet0".into(),
                mac: [0x00, 0x0c, 0x29, 0xf3, 0xff, 0xde],
                ip: IpSpec::Static {
                    addresses: vec![("192.0.2.10".into(), "255.255.255.0".into())],
                    gateways: vec!["192.0.2.1".into()],
                    dns: vec![
                        "192.0.2.53".into(),
                        "198.51.100.53".into(),
                        "203.0.113.53".into(),
                    ],
                },
                more: MoreIp::default(),
            }],
            hostname: "DEMO-GUEST".into(),
            windows_dir: if version == WinVersion::Xp || version == WinVersion::Server2003 {
                "WINDOWS".into()
            } else {
                "Windows".into()
            },
            pagefile_size: 4 << 20,
            compact_os: false,
            system_hive: None,
            software_hive: None,
            extra_files: Vec::new(),
        }
    }

    /// The partitions in their order on the disk.
    pub fn partitions(&self) -> Vec<PartitionSpec> {
        const MIB: u64 = 1 << 20;
        // FAT32 needs 65525 clusters, and a cluster is no smaller than a sector.
        let esp = if self.sector_size == 4096 { 260 } else { 100 } * MIB;
        let recovery = if self.recovery { 64 * MIB } else { 0 };
        let mut parts = Vec::new();
        let mut next = MIB;
        let mut add = |role, size| {
            parts.push(PartitionSpec {
                role,
                index: parts.len() as u32 + 1,
                start: next,
                size,
            });
            next += size;
        };
        let end = self.disk_size.saturating_sub(MIB);
        let front = match self.firmware {
            Firmware::Uefi => {
                add(Role::Esp, esp);
                add(Role::Msr, 16 * MIB);
                esp + 16 * MIB
            }
            Firmware::Bios if self.system_reserved => {
                add(Role::SystemReserved, 64 * MIB);
                64 * MIB
            }
            Firmware::Bios => 0,
        };
        let windows = end.saturating_sub(MIB + front + recovery);
        add(Role::Windows, windows / MIB * MIB);
        if self.recovery {
            add(Role::Recovery, recovery);
        }
        parts
    }

    pub fn partition(&self, role: Role) -> Option<PartitionSpec> {
        self.partitions().into_iter().find(|p| p.role == role)
    }

    /// The partition with the boot manager and the BCD.
    pub fn boot_role(&self) -> Role {
        match self.firmware {
            Firmware::Uefi => Role::Esp,
            Firmware::Bios if self.system_reserved => Role::SystemReserved,
            Firmware::Bios => Role::Windows,
        }
    }
}

/// The purpose of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Esp,
    Msr,
    SystemReserved,
    Windows,
    Recovery,
}

impl Role {
    /// The unique GUID of the partition on a GPT disk.
    pub fn guid(self) -> Uuid {
        match self {
            Role::Esp => uuid!("36be3955-63bf-4068-a6ab-00195cca3a01"),
            Role::Msr => uuid!("36be3955-63bf-4068-a6ab-00195cca3a02"),
            Role::SystemReserved => uuid!("36be3955-63bf-4068-a6ab-00195cca3a03"),
            Role::Windows => uuid!("8e0f2c38-e4ea-47ba-b7fc-9d8c74dccf04"),
            Role::Recovery => uuid!("6cdfcd69-de75-4490-8f99-5a84bf264905"),
        }
    }
}

/// A partition of the guest, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartitionSpec {
    pub role: Role,
    /// The number in Linux.
    pub index: u32,
    pub start: u64,
    pub size: u64,
}

pub const DISK_GUID: Uuid = uuid!("0b2394a9-095e-487d-8d48-719ecd4d7801");
pub const MBR_SIGNATURE: u32 = 0xdf45_46ae;

#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error("a guest cannot be made like that: {0}")]
    Spec(&'static str),
    #[error("writing {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("writing the partition table: {0}")]
    Table(String),
    #[error("formatting the {role:?} partition")]
    Format {
        role: Role,
        #[source]
        source: std::io::Error,
    },
    #[error("formatting with NTFS")]
    Tool(#[from] ToolError),
    #[error("filling the guest's volumes")]
    Guest(#[from] GuestError),
    #[error("a path inside the guest")]
    Path(#[from] PathError),
}

impl From<DemoError> for Error {
    fn from(error: DemoError) -> Self {
        let what = "building the demo guest";
        match error {
            DemoError::Tool(tool) => tool.into(),
            DemoError::Guest(GuestError::MissingTool { what, hint }) => {
                Error::missing_tool(format!("{what} is not available on this host")).hint(hint)
            }
            DemoError::Spec(problem) => Error::usage(format!("{what}: {problem}")),
            error => Error::failed(what).because(error),
        }
    }
}
