//! Requirements of a boot loader and a kernel beyond a service that starts. Each row is a problem
//! that kept a real loader or kernel from starting a disk that was reported as ready.

use std::collections::BTreeMap;

use super::*;
use crate::registry::{KeyTree, RegData};

pub(super) const SET: &str = "ControlSet001";
pub(super) const XP: (u32, u32) = (5, 1);
pub(super) const SEVEN: (u32, u32) = (6, 1);
pub(super) const TEN: (u32, u32) = (10, 0);

/// A guest that is ready for every controller it has drivers for.
pub(super) struct Guest {
    pub(super) nt: (u32, u32),
    pub(super) tree: KeyTree,
    /// By lower-case path below the directory of Windows.
    pub(super) files: BTreeMap<String, Image>,
}

fn image(arch: Arch, imports: &[&str]) -> Image {
    Image {
        state: ImageState::Present {
            machine: Some(arch.pe_machine()),
        },
        imports: imports.iter().map(ToString::to_string).collect(),
    }
}

impl Guest {
    pub(super) fn new(nt: (u32, u32)) -> Self {
        let mut guest = Self {
            nt,
            tree: KeyTree::new("ROOT"),
            files: BTreeMap::new(),
        };
        let port = if nt.0 < 6 {
            "SCSIPORT.SYS"
        } else {
            "storport.sys"
        };
        let kernel = ["hal.dll", "KDCOM.dll", "ext-ms-win-ntos-tm-l1-1-0.dll"];
        let kernel = &kernel[..if nt.0 < 6 { 2 } else { 3 }];
        guest.file("system32\\ntoskrnl.exe", kernel);
        guest.file("system32\\hal.dll", &["ntoskrnl.exe"]);
        guest.file("system32\\kdcom.dll", &["ntoskrnl.exe", "HAL.dll"]);
        for name in ["ntfs", "pciidex", "wmilib", "classpnp"] {
            guest.file(&format!("system32\\drivers\\{name}.sys"), &["ntoskrnl.exe"]);
        }
        guest.file(
            &format!("system32\\drivers\\{}", port.to_lowercase()),
            &["ntoskrnl.exe", "WMILIB.SYS"],
        );
        for (service, _) in system_drivers(nt.0) {
            guest.service(service, &["ntoskrnl.exe"]);
        }
        guest.service("disk", &["CLASSPNP.SYS"]);
        guest.service("intelide", &["PCIIDEX.SYS"]);
        guest.service("atapi", &["hal.dll"]);
        guest.service("viostor", &[port, "ntoskrnl.exe"]);
        if nt == TEN {
            guest.bind("VEN_8086&DEV_7010", "intelide", HDC);
            guest.bind("VEN_1AF4&DEV_1042", "viostor", SCSI_ADAPTER);
        } else {
            for (id, service, class) in [
                ("PCI#VEN_8086&DEV_7010", "intelide", HDC),
                ("Primary_IDE_Channel", "atapi", HDC),
                ("PCI#VEN_1AF4&DEV_1001", "viostor", SCSI_ADAPTER),
                ("PCI#VEN_1AF4&DEV_1042", "viostor", SCSI_ADAPTER),
            ] {
                let key = format!("{SET}\\Control\\CriticalDeviceDatabase\\{id}");
                guest.tree.sz(&key, "Service", service);
                guest.tree.sz(&key, "ClassGUID", class);
            }
        }
        for (guid, _) in CLASSES {
            guest
                .tree
                .key_mut(&format!("{SET}\\Control\\Class\\{guid}"));
        }
        guest
    }

    fn arch(&self) -> Arch {
        if self.nt == TEN {
            Arch::Amd64
        } else {
            Arch::X86
        }
    }

    pub(super) fn file(&mut self, path: &str, imports: &[&str]) {
        let arch = self.arch();
        self.files.insert(path.to_lowercase(), image(arch, imports));
    }

    fn service(&mut self, name: &str, imports: &[&str]) {
        let key = service(name);
        self.tree.dword(&key, "Start", 0).dword(&key, "Type", 1);
        self.tree.dword(&key, "ErrorControl", 1);
        self.tree.sz(&key, "Group", "System Bus Extender");
        let path = format!("system32\\drivers\\{name}.sys");
        self.tree
            .set(&key, "ImagePath", RegData::ExpandSz(path.clone()));
        self.file(&path, imports);
    }

    fn bind(&mut self, id: &str, service: &str, class: &str) {
        let package = format!("{service}.inf_amd64_0011223344556677");
        let key = format!("DriverDatabase\\DriverPackages\\{package}");
        let mut version = vec![0; 48];
        let guid: uuid::Uuid = class.parse().unwrap();
        version[8..24].copy_from_slice(&guid.to_bytes_le());
        self.tree
            .set(&key, "Version", RegData::Binary(version))
            .sz(&format!("{key}\\Configurations\\i"), "Service", service)
            .sz(
                &format!("{key}\\Descriptors\\PCI\\{id}"),
                "Configuration",
                "i",
            )
            .sz(
                &format!("DriverDatabase\\DriverInfFiles\\{service}.inf"),
                "Active",
                &package,
            )
            .sz(
                &format!("DriverDatabase\\DeviceIds\\PCI\\{id}"),
                &format!("{service}.inf"),
                "",
            );
    }

    pub(super) fn evaluate(&self, controller: DiskBus) -> BootPath {
        self.evaluate_in(&ControlSet::new(1), controller)
    }

    pub(super) fn evaluate_in(&self, set: &ControlSet, controller: DiskBus) -> BootPath {
        let hive = self.tree.to_bytes("SYSTEM");
        let system = HiveView::new(&hive).unwrap();
        let root = GuestPath::parse("\\Windows").unwrap();
        let ctx = BootContext {
            system: &system,
            control_set: set,
            windows_root: &root,
            nt: self.nt,
            arch: self.arch(),
            image: &|path| {
                let key = path.key();
                let below = key.strip_prefix(&format!("{}\\", root.key()));
                let file = below.and_then(|below| self.files.get(below));
                file.cloned().unwrap_or(ImageState::Missing.into())
            },
        };
        evaluate(&ctx, controller)
    }
}

pub(super) fn service(name: &str) -> String {
    format!("{SET}\\Services\\{name}")
}

fn text(guest: &mut Guest, name: &str, value: &str, data: &str) {
    guest.tree.sz(&service(name), value, data);
}

fn remove(guest: &mut Guest, file: &str) {
    guest.files.remove(file).unwrap();
}

fn other_processor(guest: &mut Guest, file: &str) {
    let mut found = guest.files.get(file).unwrap().clone();
    found.state = ImageState::Present {
        machine: Some(Arch::Arm64.pe_machine()),
    };
    guest.files.insert(file.into(), found);
}

type Change = fn(&mut Guest);
/// The versions, the controller, the expected text, and the change to the guest.
type Row<'r, S> = (&'r [(u32, u32)], DiskBus, S, Change);

const BLK: DiskBus = DiskBus::VirtioBlk;
const IDE: DiskBus = DiskBus::Ide;

#[test]
fn the_guests_are_ready_unchanged() {
    for nt in [XP, SEVEN, TEN] {
        for controller in [BLK, IDE] {
            let path = Guest::new(nt).evaluate(controller);
            assert!(path.ready, "{nt:?} {controller:?}: {}", path.reason);
        }
    }
}

/// The guest is not ready, with this reason, for every Windows in the row.
#[test]
fn what_stops_a_loader_is_not_ready() {
    let cases: &[Row<&str>] = &[
        // Port drivers, to the end of the chain.
        (
            &[XP],
            BLK,
            "SCSIPORT.SYS, which \\Windows\\system32\\drivers\\viostor.sys imports from, is missing",
            |g| remove(g, "system32\\drivers\\scsiport.sys"),
        ),
        (&[SEVEN, TEN], BLK, "storport.sys, which", |g| {
            remove(g, "system32\\drivers\\storport.sys");
        }),
        (&[SEVEN, TEN], BLK, "is for arm64", |g| {
            other_processor(g, "system32\\drivers\\storport.sys");
        }),
        (&[XP, SEVEN, TEN], BLK, "WMILIB.SYS, which", |g| {
            remove(g, "system32\\drivers\\wmilib.sys");
        }),
        (&[XP, SEVEN, TEN], IDE, "PCIIDEX.SYS, which", |g| {
            remove(g, "system32\\drivers\\pciidex.sys");
        }),
        (&[XP, SEVEN, TEN], BLK, "CLASSPNP.SYS, which", |g| {
            remove(g, "system32\\drivers\\classpnp.sys");
        }),
        // A loader of NT 5 searches only beside the driver.
        (&[XP], BLK, "SCSIPORT.SYS, which", |g| {
            remove(g, "system32\\drivers\\scsiport.sys");
            g.file("system32\\scsiport.sys", &[]);
        }),
        // Windows before 7 has no table of such names.
        (&[XP], BLK, "ext-ms-win-storage-l1.dll, which", |g| {
            g.file(
                "system32\\drivers\\viostor.sys",
                &["ext-ms-win-storage-l1.dll"],
            );
        }),
        // The kernel and the file system.
        (&[XP, SEVEN, TEN], BLK, "ntfs.sys is missing", |g| {
            remove(g, "system32\\drivers\\ntfs.sys");
        }),
        (&[XP, SEVEN, TEN], IDE, "ntfs.sys is for arm64", |g| {
            other_processor(g, "system32\\drivers\\ntfs.sys");
        }),
        (&[SEVEN, TEN], BLK, "ksecdd.sys, which", |g| {
            g.file("system32\\drivers\\ntfs.sys", &["ksecdd.sys"]);
        }),
        (&[XP, SEVEN, TEN], BLK, "ntoskrnl.exe is missing", |g| {
            remove(g, "system32\\ntoskrnl.exe");
        }),
        (&[XP, SEVEN, TEN], BLK, "hal.dll, which", |g| {
            remove(g, "system32\\hal.dll");
        }),
        (&[XP, SEVEN, TEN], BLK, "KDCOM.dll, which", |g| {
            remove(g, "system32\\kdcom.dll");
        }),
        // Forms of ImagePath.
        (
            &[XP],
            BLK,
            "is not relative to the directory of Windows",
            |g| {
                text(
                    g,
                    "viostor",
                    "ImagePath",
                    "\\SystemRoot\\system32\\drivers\\viostor.sys",
                );
            },
        ),
        (
            &[XP],
            BLK,
            "is not relative to the directory of Windows",
            |g| {
                text(
                    g,
                    "disk",
                    "ImagePath",
                    "%SystemRoot%\\system32\\drivers\\disk.sys",
                );
            },
        ),
        (
            &[XP],
            IDE,
            "is not relative to the directory of Windows",
            |g| {
                text(
                    g,
                    "atapi",
                    "ImagePath",
                    "\\??\\C:\\Windows\\system32\\drivers\\atapi.sys",
                );
            },
        ),
        // Values of the wrong type.
        (
            &[XP, SEVEN, TEN],
            BLK,
            "the value Group of the service viostor",
            |g| {
                g.tree.dword(&service("viostor"), "Group", 1);
            },
        ),
        (
            &[XP, SEVEN, TEN],
            BLK,
            "the value ErrorControl of the service pci",
            |g| {
                text(g, "pci", "ErrorControl", "1");
            },
        ),
        (
            &[XP, SEVEN, TEN],
            BLK,
            "the value Start of the service disk",
            |g| {
                g.tree
                    .set(&service("disk"), "Start", RegData::Binary(vec![0; 4]));
            },
        ),
        (
            &[XP, SEVEN, TEN],
            BLK,
            "the value Type of the service viostor",
            |g| {
                text(g, "viostor", "Type", "1");
            },
        ),
        (
            &[XP, SEVEN, TEN],
            BLK,
            "the value ImagePath of the service viostor",
            |g| {
                g.tree.dword(&service("viostor"), "ImagePath", 7);
            },
        ),
        // Marks.
        (
            &[XP, SEVEN, TEN],
            BLK,
            "viostor is marked for deletion",
            |g| {
                g.tree.dword(&service("viostor"), "DeleteFlag", 1);
            },
        ),
        // Windows writes 1; any other value counts as the mark too.
        (
            &[XP, SEVEN, TEN],
            BLK,
            "viostor is marked for deletion",
            |g| {
                g.tree.dword(&service("viostor"), "DeleteFlag", 2);
            },
        ),
        (
            &[XP, SEVEN, TEN],
            BLK,
            "viostor is marked for deletion",
            |g| {
                g.tree.sz(&service("viostor"), "DeleteFlag", "1");
            },
        ),
        (&[XP, SEVEN, TEN], IDE, "pci is marked for deletion", |g| {
            g.tree.dword(&service("pci"), "DeleteFlag", 1);
        }),
        (&[XP, SEVEN, TEN], BLK, "PendingFileRenameOperations", |g| {
            let list = ["\\??\\C:\\WINDOWS\\system32\\drivers\\viostor.sys", ""];
            g.tree.set(
                &format!("{SET}\\Control\\Session Manager"),
                "PendingFileRenameOperations",
                RegData::MultiSz(list.map(str::to_string).to_vec()),
            );
        }),
        (
            &[SEVEN, TEN],
            BLK,
            "names gone, which is marked for deletion",
            |g| {
                g.service("gone", &[]);
                g.tree.dword(&service("gone"), "DeleteFlag", 1);
                filter(g, DISK_DRIVE);
            },
        ),
        // Entries without a class.
        (
            &[XP],
            BLK,
            "(PCI#VEN_1AF4&DEV_1001 without ClassGUID)",
            |g| {
                without_class(g, "PCI#VEN_1AF4&DEV_1001");
            },
        ),
        (
            &[SEVEN],
            BLK,
            "(PCI#VEN_1AF4&DEV_1042 without ClassGUID)",
            |g| {
                without_class(g, "PCI#VEN_1AF4&DEV_1042");
            },
        ),
        (&[XP], IDE, "no driver is bound to the IDE channels", |g| {
            without_class(g, "Primary_IDE_Channel");
        }),
        // Filters between Windows and the disk.
        (
            &[XP, SEVEN, TEN],
            BLK,
            "UpperFilters of SCSIAdapter names gone",
            |g| filter(g, SCSI_ADAPTER),
        ),
        (
            &[XP, SEVEN, TEN],
            IDE,
            "UpperFilters of hdc names gone",
            |g| filter(g, HDC),
        ),
        (
            &[XP, SEVEN, TEN],
            BLK,
            "UpperFilters of System names gone",
            |g| filter(g, SYSTEM),
        ),
        (&[SEVEN, TEN], BLK, "StartOverride=3", |g| {
            g.tree.dword(&service("viostor\\StartOverride"), "0", 3);
        }),
    ];
    for (versions, controller, said, change) in cases {
        for nt in *versions {
            let mut guest = Guest::new(*nt);
            change(&mut guest);
            let path = guest.evaluate(*controller);
            assert!(!path.ready, "{nt:?}: {said}");
            assert!(
                path.reason.contains(said),
                "{nt:?}: {} / {said}",
                path.reason
            );
        }
    }
}

fn filter(guest: &mut Guest, class: &str) {
    let key = format!("{SET}\\Control\\Class\\{class}");
    let names = RegData::MultiSz(vec!["gone".into()]);
    guest.tree.set(&key, "UpperFilters", names);
}

fn without_class(guest: &mut Guest, id: &str) {
    let key = format!("{SET}\\Control\\CriticalDeviceDatabase\\{id}");
    let key = guest.tree.key_mut(&key);
    key.values.retain(|(name, _)| name == "Service");
}

/// The guest is ready, with this advice; `None` for no advice.
#[test]
fn what_does_not_stop_it_is_advice_at_most() {
    let cases: &[Row<Option<&str>>] = &[
        (
            &[XP],
            BLK,
            Some("viostor has StartOverride=3, which this Windows ignores"),
            |g| {
                g.tree.dword(&service("viostor\\StartOverride"), "0", 3);
            },
        ),
        (
            &[XP, SEVEN, TEN],
            BLK,
            Some("UpperFilters of hdc names gone"),
            |g| filter(g, HDC),
        ),
        (
            &[XP, SEVEN, TEN],
            IDE,
            Some("UpperFilters of SCSIAdapter names gone"),
            |g| {
                filter(g, SCSI_ADAPTER);
            },
        ),
        (&[SEVEN, TEN], BLK, None, |g| {
            text(
                g,
                "viostor",
                "ImagePath",
                "\\SystemRoot\\System32\\drivers\\viostor.sys",
            );
        }),
        (
            &[SEVEN, TEN],
            BLK,
            Some("is not relative to the directory of Windows"),
            |g| {
                text(
                    g,
                    "viostor",
                    "ImagePath",
                    "\\??\\C:\\Windows\\System32\\drivers\\viostor.sys",
                );
            },
        ),
        // A package in the driver store finds its port driver among the others.
        (&[SEVEN, TEN], BLK, None, |g| {
            text(
                g,
                "viostor",
                "ImagePath",
                "System32\\DriverStore\\viostor.sys",
            );
            g.file("system32\\driverstore\\viostor.sys", &["storport.sys"]);
        }),
        (&[SEVEN, TEN], BLK, None, |g| {
            g.file(
                "system32\\drivers\\viostor.sys",
                &["ext-ms-win-storage-l1.dll"],
            );
        }),
        // The contents of the boot file system's key do not matter.
        (&[XP, SEVEN, TEN], BLK, None, |g| {
            g.tree
                .dword(&service("Ntfs"), "Start", 4)
                .dword(&service("Ntfs"), "Type", 2);
        }),
        (&[XP, SEVEN, TEN], BLK, None, |g| {
            g.tree.dword(&service("viostor"), "DeleteFlag", 0);
        }),
        // The other kernel of x86.
        (&[XP, SEVEN], BLK, None, |g| {
            let kernel = g.files.remove("system32\\ntoskrnl.exe").unwrap();
            g.files.insert("system32\\ntkrnlpa.exe".into(), kernel);
            for file in g.files.values_mut() {
                file.imports = [].into();
            }
        }),
        (
            &[XP, SEVEN, TEN],
            BLK,
            Some(
                "DEV_1042&SUBSYS_11001AF4&REV_01\\3&1&0&20 was here before, with the driver other",
            ),
            |g| {
                instance(g, &[("ClassGUID", SCSI_ADAPTER), ("Service", "other")], 0);
            },
        ),
        (
            &[XP, SEVEN, TEN],
            BLK,
            Some("was here before, without a driver"),
            |g| {
                instance(g, &[("ClassGUID", SCSI_ADAPTER)], 0);
            },
        ),
        (
            &[XP, SEVEN, TEN],
            BLK,
            Some("was here before and is switched off"),
            |g| {
                instance(g, &[("ClassGUID", SCSI_ADAPTER), ("Service", "VIOSTOR")], 1);
            },
        ),
        (&[XP, SEVEN, TEN], BLK, None, |g| {
            instance(
                g,
                &[("ClassGUID", SCSI_ADAPTER), ("Service", "VIOSTOR")],
                0x20,
            );
        }),
        // Never configured: Windows looks in the databases.
        (&[XP, SEVEN, TEN], BLK, None, |g| instance(g, &[], 0)),
        (&[XP, SEVEN, TEN], IDE, None, |g| {
            instance(g, &[("ClassGUID", SCSI_ADAPTER), ("Service", "other")], 1);
        }),
    ];
    for (versions, controller, said, change) in cases {
        for nt in *versions {
            let mut guest = Guest::new(*nt);
            let before = guest.evaluate(*controller).faults;
            change(&mut guest);
            let path = guest.evaluate(*controller);
            assert!(path.ready, "{nt:?} {said:?}: {}", path.reason);
            let new: Vec<_> = path.faults.iter().filter(|f| !before.contains(f)).collect();
            assert_eq!(
                new.len(),
                usize::from(said.is_some()),
                "{nt:?} {said:?}: {new:?}"
            );
            if let Some(said) = said {
                assert!(
                    path.steps.iter().any(|s| !s.ok && s.text.contains(said)),
                    "{nt:?} {said}: {:?}",
                    path.steps
                );
            }
        }
    }
}

fn instance(guest: &mut Guest, values: &[(&str, &str)], flags: u32) {
    let id = "PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01\\3&1&0&20";
    let key = format!("{SET}\\Enum\\{id}");
    guest.tree.dword(&key, "ConfigFlags", flags);
    for (name, text) in values {
        guest.tree.sz(&key, name, text);
    }
}

/// A circular import ends.
#[test]
fn imports_in_a_ring() {
    let mut guest = Guest::new(TEN);
    guest.file(
        "system32\\drivers\\storport.sys",
        &["viostor.sys", "storport.sys"],
    );
    assert!(guest.evaluate(BLK).ready);
}

/// On a Windows installed on SCSI (Microsoft KB 314082), the driver for IDE is named so that the
/// plan can bind it.
#[test]
fn a_driver_that_could_be_bound_is_named() {
    for nt in [XP, SEVEN] {
        let mut guest = Guest::new(nt);
        guest
            .tree
            .remove(&format!("{SET}\\Control\\CriticalDeviceDatabase"));
        let spare = |guest: &Guest, controller| {
            let faults = guest.evaluate(controller).faults;
            faults.into_iter().find_map(|fault| match fault {
                BootFault::NotBound {
                    decides: true,
                    spare,
                    ..
                } => Some(spare),
                _ => None,
            })
        };
        assert_eq!(spare(&guest, IDE), Some(Some("intelide")), "{nt:?}");
        assert_eq!(spare(&guest, BLK), Some(None), "{nt:?}");
        guest.tree.remove(&service("atapi"));
        let missing = |guest: &Guest| {
            let faults = guest.evaluate(IDE).faults;
            faults.into_iter().find_map(|fault| match fault {
                BootFault::NotInstalled { service, file } => Some((service, file)),
                _ => None,
            })
        };
        assert_eq!(missing(&guest), Some(("atapi".into(), true)), "{nt:?}");
        // A file that no loader can load is as good as none.
        let file = "system32\\drivers\\intelide.sys";
        other_processor(&mut guest, file);
        assert_eq!(spare(&guest, IDE), Some(None), "{nt:?}");
        let unusable = ImageState::Unreadable.into();
        guest.files.insert(file.into(), unusable);
        assert_eq!(spare(&guest, IDE), Some(None), "{nt:?}");
        remove(&mut guest, file);
        assert_eq!(spare(&guest, IDE), Some(None), "{nt:?}");
        // The driver of controllers without one of their own.
        let pciide = "system32\\drivers\\pciide.sys";
        guest.file(pciide, &["ntoskrnl.exe"]);
        assert_eq!(spare(&guest, IDE), Some(Some("pciide")), "{nt:?}");
        remove(&mut guest, pciide);
        remove(&mut guest, "system32\\drivers\\atapi.sys");
        assert_eq!(spare(&guest, IDE), Some(None), "{nt:?}");
        assert_eq!(missing(&guest), Some(("atapi".into(), false)), "{nt:?}");
    }
}

/// `Select\Default` may name any of them (docs/boot-path.md); the contents of the others do not
/// matter.
#[test]
fn only_the_control_set_that_boots_is_looked_at() {
    let second = ControlSet::new(2);
    for nt in [XP, SEVEN] {
        let mut guest = Guest::new(nt);
        let mut copy = guest.tree.get(SET).unwrap().clone();
        copy.name = second.to_string();
        *guest.tree.key_mut(&second) = copy;
        for key in [
            "Services",
            "Control\\CriticalDeviceDatabase",
            "Services\\viostor",
        ] {
            for (set, ready) in [(SET, true), (&*second, false)] {
                let mut tree = guest.tree.clone();
                tree.remove(&format!("{set}\\{key}")).unwrap();
                let files = guest.files.clone();
                let changed = Guest { nt, tree, files };
                let path = changed.evaluate_in(&second, DiskBus::VirtioBlk);
                assert_eq!(path.ready, ready, "{nt:?} {set} {key}: {}", path.reason);
                let path = changed.evaluate_in(&second, IDE);
                let ready = ready || key.ends_with("viostor");
                assert_eq!(path.ready, ready, "{nt:?} {set} {key}: {}", path.reason);
            }
        }
    }
}

/// A driver of another class than the controller's moves the controller to its own class.
#[test]
fn filters_of_the_class_that_the_driver_names_decide() {
    for (class, ready) in [(SCSI_ADAPTER, true), (HDC, false)] {
        let mut guest = Guest::new(TEN);
        guest.bind("VEN_1AF4&DEV_1042", "viostor", class);
        let key = format!("{SET}\\Control\\Class\\{HDC}");
        let names = RegData::MultiSz(vec!["gone".into()]);
        guest.tree.set(&key, "UpperFilters", names);
        let path = guest.evaluate(DiskBus::VirtioBlk);
        assert_eq!(path.ready, ready, "{class}: {}", path.reason);
    }
}

/// `CONFIGFLAG_DISABLED` is 1, `CONFIGFLAG_REMOVED` 2.
#[test]
fn a_device_that_was_disabled_or_removed_is_switched_off() {
    for (flags, off) in [(0, false), (1, true), (2, true), (3, true), (4, false)] {
        let mut guest = Guest::new(TEN);
        let key = format!("{SET}\\Enum\\PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01\\3&1");
        guest.tree.dword(&key, "ConfigFlags", flags);
        let path = guest.evaluate(DiskBus::VirtioBlk);
        let found = (path.faults.iter()).any(|f| matches!(f, BootFault::DeviceDisabled { .. }));
        assert_eq!(found, off, "{flags}");
    }
}

/// Windows skips such an entry (docs/boot-path.md).
#[test]
fn an_entry_of_the_critical_device_database_without_a_class_binds_nothing() {
    for nt in [XP, SEVEN] {
        let mut guest = Guest::new(nt);
        let id = if nt == XP { "1001" } else { "1042" };
        let key = format!("{SET}\\Control\\CriticalDeviceDatabase\\PCI#VEN_1AF4&DEV_{id}");
        assert!(guest.evaluate(DiskBus::VirtioBlk).ready);
        guest.tree.sz(&key, "ClassGUID", "");
        assert!(!guest.evaluate(DiskBus::VirtioBlk).ready, "{nt:?}");
    }
}

/// Windows 7 brought the table of such names, and msahci came with Vista.
#[test]
fn what_older_versions_do_not_know_does_not_help_them() {
    let named = |nt: (u32, u32)| {
        let path = Guest::new(nt).evaluate(DiskBus::VirtioBlk);
        let api = |f: &BootFault| matches!(f, BootFault::Import { missing, .. } if missing.name.starts_with("ext-"));
        path.faults.iter().any(api)
    };
    assert!(named((6, 0)) && !named(SEVEN) && !named(TEN));
    for (nt, wanted) in [
        (XP, None),
        ((6, 0), Some("msahci")),
        (SEVEN, Some("msahci")),
    ] {
        let mut guest = Guest::new(nt);
        guest.file("system32\\drivers\\msahci.sys", &["ntoskrnl.exe"]);
        let path = guest.evaluate(DiskBus::Sata);
        let spare = path.faults.iter().find_map(|f| match f {
            BootFault::NotBound { spare, .. } => *spare,
            _ => None,
        });
        assert_eq!(spare, wanted, "{nt:?}");
    }
}

/// The kernel has loaded these from System32; no driver brings its own.
#[test]
fn the_files_of_the_kernel_are_those_in_system32() {
    for name in ["hal.dll", "BOOTVID.dll", "kdcom.dll", "PSHED.dll"] {
        for nt in [XP, SEVEN, TEN] {
            for (folder, ready) in [("", true), ("drivers\\", false)] {
                let mut guest = Guest::new(nt);
                let system = guest
                    .files
                    .remove(&format!("system32\\{}", name.to_lowercase()));
                let file = system.unwrap_or_else(|| image(guest.arch(), &[]));
                let path = format!("system32\\{folder}{}", name.to_lowercase());
                guest.files.insert(path, file);
                guest.file("system32\\drivers\\disk.sys", &[name]);
                let path = guest.evaluate(BLK);
                assert_eq!(path.ready, ready, "{nt:?} {folder}{name}: {}", path.reason);
            }
        }
    }
}
