//! The data by which Windows finds the driver of a boot device: `DriverDatabase` (8 and later) and
//! `CriticalDeviceDatabase` (7 and older), with the ids of the real `mshdc.inf` and related INFs.
//!
//! The shapes are those of real hives (DeviceIds -> DriverInfFiles -> DriverPackages). On 8.1 and
//! later the drivers that are not needed to boot are in a separate hive, `DRIVERS`.

use uuid::{Uuid, uuid};

use super::{Arch, GuestSpec, Leftovers};
use crate::registry::KeyTree;
use crate::registry::RegData;

pub(super) const NET: Uuid = uuid!("4d36e972-e325-11ce-bfc1-08002be10318");
pub(super) const HDC: Uuid = uuid!("4d36e96a-e325-11ce-bfc1-08002be10318");
pub(super) const SCSI_ADAPTER: Uuid = uuid!("4d36e97b-e325-11ce-bfc1-08002be10318");
pub(super) const SYSTEM: Uuid = uuid!("4d36e97d-e325-11ce-bfc1-08002be10318");
pub(super) const DISK_DRIVE: Uuid = uuid!("4d36e967-e325-11ce-bfc1-08002be10318");
pub(super) const VOLUME: Uuid = uuid!("71a27cdd-812a-11d0-bec7-08002be2092f");
pub(super) const DISPLAY: Uuid = uuid!("4d36e968-e325-11ce-bfc1-08002be10318");
const PORTS: Uuid = uuid!("4d36e978-e325-11ce-bfc1-08002be10318");

/// 2006-06-21, Microsoft's date of all its inbox drivers.
const INBOX_DATE: u64 = 0x01c6_94c5_a38c_8000;
/// 2019-07-31.
const OEM_DATE: u64 = 0x01d5_4735_1c3b_0000;

/// An install section, its service and its devices.
struct Section {
    name: &'static str,
    service: &'static str,
    ids: &'static [&'static str],
}

struct Package {
    /// The INF's own name.
    inf: &'static str,
    /// The published name, unless it is part of Windows.
    oem: Option<u32>,
    class: Uuid,
    sections: &'static [Section],
}

impl Package {
    fn published(&self) -> String {
        match self.oem {
            Some(n) => format!("oem{n}.inf"),
            None => self.inf.to_string(),
        }
    }
}

/// The devices of Intel's IDE controllers up to ICH8, and PIIX3 and PIIX4, which QEMU and VMware
/// emulate.
const INTELIDE_IDS: &[&str] = &[
    "PCI\\VEN_8086&DEV_1222",
    "PCI\\VEN_8086&DEV_1230",
    "PCI\\VEN_8086&DEV_2411",
    "PCI\\VEN_8086&DEV_2421",
    "PCI\\VEN_8086&DEV_244A",
    "PCI\\VEN_8086&DEV_244B",
    "PCI\\VEN_8086&DEV_24CB",
    "PCI\\VEN_8086&DEV_24DB",
    "PCI\\VEN_8086&DEV_2651&CC_0101",
    "PCI\\VEN_8086&DEV_266F",
    "PCI\\VEN_8086&DEV_27C0",
    "PCI\\VEN_8086&DEV_27DF",
    "PCI\\VEN_8086&DEV_2820",
    "PCI\\VEN_8086&DEV_2850",
    "PCI\\VEN_8086&DEV_7010",
    "PCI\\VEN_8086&DEV_7111",
    "PCI\\VEN_8086&DEV_7199",
];
const CHANNEL_IDS: &[&str] = &[
    "Internal_IDE_Channel",
    "Primary_IDE_Channel",
    "Secondary_IDE_Channel",
];
const LSI_SAS_IDS: &[&str] = &[
    "PCI\\VEN_1000&DEV_0050",
    "PCI\\VEN_1000&DEV_0054",
    "PCI\\VEN_1000&DEV_0056",
    "PCI\\VEN_1000&DEV_0058",
    "PCI\\VEN_1000&DEV_0062",
];

const BOOT_PACKAGES: &[Package] = &[
    Package {
        inf: "mshdc.inf",
        oem: None,
        class: HDC,
        sections: &[
            Section {
                name: "atapi_Inst",
                service: "atapi",
                ids: CHANNEL_IDS,
            },
            Section {
                name: "pciide_Inst",
                service: "pciide",
                ids: &["PCI\\CC_0101"],
            },
            Section {
                name: "intelide_Inst",
                service: "intelide",
                ids: INTELIDE_IDS,
            },
            // The section kept its name when the driver became storahci.
            Section {
                name: "msahci_Inst",
                service: "storahci",
                ids: &["ACPI\\CLS_0001&SUBCLS_0006&PI_01", "PCI\\CC_010601"],
            },
        ],
    },
    Package {
        inf: "stornvme.inf",
        oem: None,
        class: SCSI_ADAPTER,
        sections: &[Section {
            name: "Stornvme_Inst",
            service: "stornvme",
            ids: &["PCI\\CC_010802"],
        }],
    },
    Package {
        inf: "lsi_sas.inf",
        oem: None,
        class: SCSI_ADAPTER,
        sections: &[Section {
            name: "LSI_SAS_Inst",
            service: "LSI_SAS",
            ids: LSI_SAS_IDS,
        }],
    },
    Package {
        inf: "pci.inf",
        oem: None,
        class: SYSTEM,
        sections: &[
            Section {
                name: "PCI_ROOT",
                service: "pci",
                ids: &["*PNP0A03", "*PNP0A08"],
            },
            Section {
                name: "PCI_BRIDGE",
                service: "pci",
                ids: &["PCI\\CC_0604"],
            },
        ],
    },
    Package {
        inf: "acpi.inf",
        oem: None,
        class: SYSTEM,
        sections: &[Section {
            name: "ACPI_Inst.NT",
            service: "ACPI",
            ids: &["*pnp0c08", "pnp0c08"],
        }],
    },
    Package {
        inf: "disk.inf",
        oem: None,
        class: DISK_DRIVE,
        sections: &[Section {
            name: "disk_install.NT",
            service: "disk",
            ids: &["GenDisk"],
        }],
    },
    Package {
        inf: "volmgr.inf",
        oem: None,
        class: SYSTEM,
        sections: &[Section {
            name: "Volmgr",
            service: "volmgr",
            ids: &["Root\\VOLMGR"],
        }],
    },
    Package {
        inf: "volume.inf",
        oem: None,
        class: VOLUME,
        sections: &[Section {
            name: "volume_install.NT",
            service: "volume",
            ids: &["STORAGE\\Volume"],
        }],
    },
    Package {
        inf: "wvmbus.inf",
        oem: None,
        class: SYSTEM,
        sections: &[Section {
            name: "VMBus_Device.NT",
            service: "vmbus",
            ids: &["ACPI\\VMBus"],
        }],
    },
    Package {
        inf: "wstorvsc.inf",
        oem: None,
        class: SCSI_ADAPTER,
        sections: &[Section {
            name: "wstorvsc_inst",
            service: "storvsc",
            ids: &["VMBUS\\{ba6163d9-04a1-4d29-b605-72e2ffb1dc7f}"],
        }],
    },
    Package {
        inf: "msports.inf",
        oem: None,
        class: PORTS,
        sections: &[Section {
            name: "ComPort.NT",
            service: "Serial",
            ids: &["*PNP0500", "*PNP0501"],
        }],
    },
];

const VMWARE_PACKAGES: &[Package] = &[
    Package {
        inf: "vmci.inf",
        oem: Some(0),
        class: SYSTEM,
        sections: &[Section {
            name: "vmci.install.x64.NT",
            service: "vmci",
            ids: &[
                "PCI\\VEN_15AD&DEV_0740&SUBSYS_074015AD",
                "PCI\\VEN_15AD&DEV_0740",
            ],
        }],
    },
    // Staged and never bound: no Configurations, no Descriptors.
    Package {
        inf: "pvscsi.inf",
        oem: Some(3),
        class: SCSI_ADAPTER,
        sections: &[],
    },
];

/// Packages that are not needed to start the VM: in the `DRIVERS` hive.
const OTHER_PACKAGES: &[Package] = &[
    Package {
        inf: "net1ic64.inf",
        oem: None,
        class: NET,
        sections: &[Section {
            name: "E10D3.10.0.1",
            service: "e1i65x64",
            ids: &["PCI\\VEN_8086&DEV_10D3"],
        }],
    },
    Package {
        inf: "wnetvsc.inf",
        oem: None,
        class: NET,
        sections: &[Section {
            name: "netvsc_Device.NT",
            service: "netvsc",
            ids: &["VMBUS\\{f8615163-df3e-46c5-913f-f2d2f965ed0e}"],
        }],
    },
];
const VMWARE_OTHER_PACKAGES: &[Package] = &[Package {
    inf: "vm3d.inf",
    oem: Some(1),
    class: DISPLAY,
    sections: &[Section {
        name: "vm3d.install",
        service: "vm3dmp",
        ids: &["PCI\\VEN_15AD&DEV_0405"],
    }],
}];

/// `DriverDatabase` of the SYSTEM hive.
pub(super) fn system(spec: &GuestSpec, root: &mut KeyTree) {
    header(spec, root);
    for package in BOOT_PACKAGES.iter().filter(|p| belongs(spec, p)) {
        write(spec, root, package);
    }
    if spec.leftovers == Leftovers::Vmware {
        VMWARE_PACKAGES.iter().for_each(|p| write(spec, root, p));
    }
}

/// `DriverDatabase` of the DRIVERS hive.
pub(super) fn drivers(spec: &GuestSpec, root: &mut KeyTree) {
    header(spec, root);
    OTHER_PACKAGES.iter().for_each(|p| write(spec, root, p));
    if spec.leftovers == Leftovers::Vmware {
        let packages = VMWARE_OTHER_PACKAGES.iter();
        packages.for_each(|p| write(spec, root, p));
    }
}

fn belongs(spec: &GuestSpec, package: &Package) -> bool {
    match package.inf {
        "lsi_sas.inf" => spec.arch != Arch::Arm64,
        "volume.inf" => spec.version.nt_at_least(10, 0),
        _ => true,
    }
}

fn header(spec: &GuestSpec, root: &mut KeyTree) {
    let (major, minor) = spec.version.facts().nt;
    let architecture = match spec.arch {
        Arch::X86 => 0,
        Arch::Amd64 => 9,
        Arch::Arm64 => 12,
    };
    // oem0, oem1, oem3 are in use; the bit of the removed oem2 stays set.
    let oem_map = match spec.leftovers {
        Leftovers::Vmware => 0xf0,
        _ => 0,
    };
    let key = "DriverDatabase";
    root.dword(key, "Architecture", architecture);
    root.set(key, "OemInfMap", RegData::Binary(vec![oem_map]));
    root.dword(key, "SchemaVersion", 0x0001_0000);
    root.dword(key, "SetupStatus", 0);
    root.dword(key, "Version", major << 24 | minor << 16);
    for sub in [
        "DeviceIds",
        "DriverFiles",
        "DriverInfFiles",
        "DriverPackages",
    ] {
        root.key_mut(&format!("{key}\\{sub}"));
    }
}

/// The directory of the driver store, e.g. `mshdc.inf_amd64_18632ebfbf46b676`.
fn folder(spec: &GuestSpec, inf: &str) -> String {
    let arch = match spec.arch {
        Arch::X86 => "x86",
        Arch::Amd64 => "amd64",
        Arch::Arm64 => "arm64",
    };
    // FNV-1a of the properties that distinguish packages.
    let text = format!("{inf}/{arch}/{}", spec.version.facts().build);
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    // Before Windows 8 the language was part of the name.
    let language = if spec.version.has_driver_database() {
        ""
    } else {
        "neutral_"
    };
    format!("{inf}_{arch}_{language}{hash:016x}")
}

fn version_value(spec: &GuestSpec, package: &Package) -> Vec<u8> {
    let facts = spec.version.facts();
    let (flag, date, version) = match package.oem {
        Some(_) => (0x00, OEM_DATE, [1, 3, 15, 0]),
        None => {
            let (major, minor) = facts.nt;
            let parts = [major, minor, facts.build, facts.revision.max(1)];
            (0xff, INBOX_DATE, parts.map(|n| n as u16))
        }
    };
    let mut data = vec![flag, 0xff, 9, 0, 0, 0, 0, 0];
    data.extend(package.class.to_bytes_le());
    data.extend(date.to_le_bytes());
    for part in version.iter().rev() {
        data.extend(part.to_le_bytes());
    }
    data.extend([0; 8]);
    data
}

fn write(spec: &GuestSpec, root: &mut KeyTree, package: &Package) {
    let db = "DriverDatabase";
    let published = package.published();
    let folder = folder(spec, package.inf);

    let class = format!("{db}\\DeviceIds\\{}", package.class.braced());
    root.set(&class, &published, RegData::None(Vec::new()));
    let ids = package.sections.iter().flat_map(|s| s.ids);
    let staged: &[&str] = match package.inf {
        "pvscsi.inf" => &["PCI\\VEN_15AD&DEV_07C0"],
        _ => &[],
    };
    for id in ids.chain(staged) {
        // An id without revision beside a longer one ranks lower.
        let rank = if *id == "PCI\\VEN_15AD&DEV_0740" {
            2
        } else {
            1
        };
        let data = RegData::Binary(vec![rank, 0xff, 0, 0]);
        root.set(&format!("{db}\\DeviceIds\\{id}"), &published, data);
    }

    let inf_key = format!("{db}\\DriverInfFiles\\{published}");
    root.set(&inf_key, "", RegData::MultiSz(vec![folder.clone()]));
    root.sz(&inf_key, "Active", &folder);
    if !package.sections.is_empty() {
        let names = package.sections.iter().map(|s| s.name.to_string());
        root.set(
            &inf_key,
            "Configurations",
            RegData::MultiSz(names.collect()),
        );
    }

    let key = format!("{db}\\DriverPackages\\{folder}");
    root.sz(&key, "", &published);
    if package.oem.is_some() {
        let stem = package.inf.trim_end_matches(".inf");
        root.sz(&key, "Catalog", &format!("{stem}.cat"));
        let imported = (OEM_DATE + 0x00ab_0000_0000).to_le_bytes().to_vec();
        root.set(&key, "ImportDate", RegData::Binary(imported));
        root.sz(&key, "InfName", package.inf);
        let from = format!("C:\\Program Files\\Common Files\\VMware\\Drivers\\{stem}\\Win8");
        root.sz(&key, "OemPath", &from);
        root.sz(&key, "Provider", "VMware, Inc.");
        let signer = "Microsoft Windows Hardware Compatibility Publisher";
        root.sz(&key, "SignerName", signer);
        root.dword(&key, "SignerScore", 0x0d00_0005);
        let status = if package.sections.is_empty() {
            0x112
        } else {
            0x12
        };
        root.dword(&key, "StatusFlags", status);
    } else {
        root.sz(&key, "Provider", "Microsoft");
        root.dword(&key, "SignerScore", 0x0d00_0003);
        root.dword(&key, "StatusFlags", 0x12);
    }
    let version = RegData::Binary(version_value(spec, package));
    root.set(&key, "Version", version);

    for section in package.sections {
        let configuration = format!("{key}\\Configurations\\{}", section.name);
        root.dword(&configuration, "ConfigFlags", 0);
        root.dword(&configuration, "ConfigScope", 7);
        root.sz(&configuration, "Service", section.service);
        for id in section.ids {
            let descriptor = format!("{key}\\Descriptors\\{id}");
            let label = format!("{}.devicedesc", id.to_lowercase());
            root.sz(&descriptor, "Configuration", section.name);
            root.sz(&descriptor, "Description", &format!("%{label}%"));
            root.sz(&descriptor, "Manufacturer", "%mfg%");
            let strings = format!("{key}\\Strings");
            root.sz(&strings, &label, &format!("{} device", section.service));
            root.sz(&strings, "mfg", "Demo");
        }
    }
}

/// A package of the driver store, for the disk.
pub(super) struct StoredPackage {
    pub folder: String,
    /// The name of its INF in `\Windows\INF`.
    pub published: String,
    pub files: Vec<String>,
}

/// The packages of the driver store.
pub(super) fn store(spec: &GuestSpec) -> Vec<StoredPackage> {
    let vmware = spec.leftovers == Leftovers::Vmware;
    let oem = VMWARE_PACKAGES.iter().chain(VMWARE_OTHER_PACKAGES);
    let inbox = BOOT_PACKAGES.iter().chain(OTHER_PACKAGES);
    let eight = spec.version.has_driver_database();
    inbox
        .filter(|p| belongs(spec, p))
        // Packages of Windows 8, or of the hypervisor's tools for it.
        .filter(|p| eight || matches!(p.inf, "mshdc.inf" | "lsi_sas.inf" | "disk.inf"))
        .chain(oem.filter(|_| vmware && eight))
        .map(|package| {
            let mut files = vec![package.inf.to_string()];
            for section in package.sections {
                let file = match section.service {
                    "storahci" if !eight => "msahci.sys".to_string(),
                    service => format!("{service}.sys"),
                };
                if !files.contains(&file) {
                    files.push(file);
                }
            }
            StoredPackage {
                folder: folder(spec, package.inf),
                published: package.published(),
                files,
            }
        })
        .collect()
}

/// `CriticalDeviceDatabase` below a control set, for Windows 7 and older.
pub(super) fn critical_devices(spec: &GuestSpec, set: &mut KeyTree) {
    let vista = spec.version.nt_at_least(6, 0);
    let mut entries: Vec<(&str, &str, Uuid, &str)> = Vec::new();
    for id in CHANNEL_IDS {
        entries.push((id, "atapi", HDC, "mshdc.inf"));
    }
    for id in INTELIDE_IDS {
        entries.push((id, "intelide", HDC, "mshdc.inf"));
    }
    entries.push(("PCI\\CC_0101", "pciide", HDC, "mshdc.inf"));
    entries.push(("PCI\\CC_0604", "pci", SYSTEM, "machine.inf"));
    entries.push(("*PNP0A03", "pci", SYSTEM, "machine.inf"));
    entries.push(("GenDisk", "disk", DISK_DRIVE, "disk.inf"));
    if vista {
        entries.push(("PCI\\CC_010601", "msahci", HDC, "mshdc.inf"));
        entries.push(("ROOT\\VOLMGR", "volmgr", SYSTEM, "machine.inf"));
        for id in LSI_SAS_IDS {
            entries.push((id, "LSI_SAS", SCSI_ADAPTER, "lsi_sas.inf"));
        }
    } else if spec.leftovers == Leftovers::Vmware {
        entries.push((
            "PCI\\VEN_1000&DEV_0030",
            "symmpi",
            SCSI_ADAPTER,
            "symmpi.inf",
        ));
    }
    for (id, service, class, inf) in entries {
        let mut id = id.replace('\\', "#");
        if !vista {
            id = id.to_lowercase();
        }
        let key = format!("Control\\CriticalDeviceDatabase\\{id}");
        set.sz(&key, "Service", service);
        set.sz(
            &key,
            "ClassGUID",
            &class.braced().to_string().to_uppercase(),
        );
        if vista {
            set.sz(&key, "DriverPackageId", &folder(spec, inf));
        }
    }
}
