//! What each step says when it finds something: the fault as the plan takes it, and nothing besides.

use super::loader_tests::{Guest, SET, TEN, XP, service};
use super::*;
use crate::registry::RegData;

use DiskBus::{Ide, VirtioBlk};

const SIX: (u32, u32) = (6, 0);

/// Returns the faults that a change of a guest has caused.
pub(super) fn new_faults(guest: &Guest, controller: DiskBus) -> Vec<BootFault> {
    let known = Guest::new(guest.nt).evaluate(controller).faults;
    let faults = guest.evaluate(controller).faults.into_iter();
    faults.filter(|fault| !known.contains(fault)).collect()
}

#[test]
fn a_fault_is_told_once_with_what_the_repair_needs() {
    let name = || "disk".to_string();
    for (nt, change, faults, ready) in [
        (
            TEN,
            (|g| {
                g.tree.sz(&service("disk"), "Start", "0");
            }) as fn(&mut Guest),
            vec![BootFault::Mistyped {
                service: name(),
                value: "Start",
            }],
            false,
        ),
        (
            TEN,
            |g| {
                g.tree.dword(&service("disk"), "Start", 3);
            },
            vec![BootFault::NotBootStart {
                service: name(),
                start: 3,
                start_override: None,
            }],
            false,
        ),
        (
            TEN,
            |g| {
                let key = format!("{}\\StartOverride", service("disk"));
                g.tree.dword(&key, "0", 4);
            },
            vec![BootFault::NotBootStart {
                service: name(),
                start: 0,
                start_override: Some(4),
            }],
            false,
        ),
        // NT 5 does not look at it.
        (
            XP,
            |g| {
                let key = format!("{}\\StartOverride", service("disk"));
                g.tree.dword(&key, "0", 4);
            },
            vec![BootFault::IdleOverride {
                service: name(),
                value: 4,
            }],
            true,
        ),
        (
            TEN,
            |g| {
                g.tree.dword(&service("disk"), "DeleteFlag", 1);
            },
            vec![BootFault::Deleted { service: name() }],
            false,
        ),
        (
            TEN,
            |g| {
                g.tree.dword(&service("disk"), "Type", 16);
            },
            vec![BootFault::NotADriver {
                service: name(),
                kind: 16,
            }],
            false,
        ),
        // A file system driver is one too.
        (
            TEN,
            |g| {
                g.tree.dword(&service("disk"), "Type", 2);
            },
            vec![],
            true,
        ),
    ] {
        let mut guest = Guest::new(nt);
        change(&mut guest);
        let path = guest.evaluate(VirtioBlk);
        assert_eq!(new_faults(&guest, VirtioBlk), faults, "{nt:?}");
        assert_eq!(path.ready, ready, "{nt:?} {faults:?}");
    }
    // A driver that the controller and its channels need alike.
    let mut guest = Guest::new(XP);
    guest.tree.dword(&service("atapi"), "Start", 3);
    let id = format!("{SET}\\Control\\CriticalDeviceDatabase\\PCI#VEN_8086&DEV_7010");
    guest.tree.sz(&id, "Service", "ATAPI");
    assert_eq!(guest.evaluate(Ide).faults.len(), 1);
}

#[test]
fn a_dead_filter_is_told_with_its_class_and_list() {
    for (class, name, decides) in [
        (DISK_DRIVE, "DiskDrive", true),
        (VOLUME, "Volume", true),
        (SYSTEM, "System", true),
        (SCSI_ADAPTER, "SCSIAdapter", true),
        (HDC, "hdc", false),
    ] {
        assert_eq!(class_guid(name), Some(class));
        for list in ["UpperFilters", "LowerFilters"] {
            let mut guest = Guest::new(TEN);
            let key = format!("{SET}\\Control\\Class\\{class}");
            let names = RegData::MultiSz(vec!["disk".into(), "gone".into()]);
            guest.tree.set(&key, list, names);
            let path = guest.evaluate(VirtioBlk);
            let fault = BootFault::DeadFilter {
                class: name,
                list,
                service: "gone".into(),
                decides,
            };
            assert_eq!(new_faults(&guest, VirtioBlk), [fault]);
            assert_eq!(path.ready, !decides, "{name} {list}");
        }
    }
    assert_eq!(class_guid("Net"), None);
}

/// A device that Windows has set up is not looked up again; one without a class is.
#[test]
fn a_device_that_was_met_is_told_unless_it_has_this_driver_or_none_yet() {
    for (values, told) in [
        (&[][..], None),
        (&[("Service", "other")], None),
        (&[("ClassGUID", ""), ("Service", "other")], None),
        (&[("ClassGUID", "{x}"), ("Service", "VIOSTOR")], None),
        (
            &[("ClassGUID", "{x}"), ("Service", "other")],
            Some(Some("other")),
        ),
        (
            &[("Class", "SCSIAdapter"), ("Service", "other")],
            Some(Some("other")),
        ),
        (&[("ClassGUID", "{x}")], Some(None)),
        (&[("ClassGUID", "{x}"), ("Service", "")], Some(None)),
    ] {
        let mut guest = Guest::new(TEN);
        let device = "VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01\\3&1";
        let key = format!("{SET}\\Enum\\PCI\\{device}");
        guest.tree.key_mut(&key);
        for (name, text) in values {
            guest.tree.sz(&key, name, text);
        }
        let path = guest.evaluate(VirtioBlk);
        let expected = told.map(|service| BootFault::Instance {
            path: format!("PCI\\{device}"),
            service: service.map(str::to_string),
        });
        let found = new_faults(&guest, VirtioBlk);
        assert_eq!(found, Vec::from_iter(expected), "{values:?}");
        assert!(path.ready, "it is advice");
        // Of another controller it says nothing.
        assert_eq!(new_faults(&guest, Ide), [], "{values:?}");
    }
}

/// x86 has a kernel for each kind of memory map.
#[test]
fn the_kernel_of_x86_may_be_that_for_large_memory() {
    for (nt, ready) in [(XP, true), (TEN, false)] {
        let mut guest = Guest::new(nt);
        let kernel = guest.files.remove("system32\\ntoskrnl.exe").unwrap();
        guest.files.insert("system32\\ntkrnlpa.exe".into(), kernel);
        let path = guest.evaluate(VirtioBlk);
        assert_eq!(path.ready, ready, "{nt:?}: {}", path.reason);
    }
    let mut guest = Guest::new(XP);
    guest.files.remove("system32\\ntoskrnl.exe");
    assert!(!guest.evaluate(VirtioBlk).ready);
}

/// `ftdisk` became `volmgr` with Vista.
#[test]
fn the_drivers_of_every_boot_go_by_the_generation_of_windows() {
    let names = |major| system_drivers(major).iter().map(|(name, _)| *name);
    assert!(names(5).any(|name| name == "ftdisk") && !names(5).any(|name| name == "volmgr"));
    assert!(
        !names(SIX.0).any(|name| name == "ftdisk") && names(SIX.0).any(|name| name == "volmgr")
    );
    for (nt, service, needed) in [
        (XP, "acpi", false),
        (XP, "volsnap", false),
        (SIX, "acpi", true),
        (SIX, "volsnap", true),
        (SIX, "volume", false),
        (TEN, "volume", false),
        (TEN, "mountmgr", true),
    ] {
        let mut guest = Guest::new(nt);
        guest.tree.remove(&self::service(service));
        let faults = guest.evaluate(VirtioBlk).faults;
        let missing = BootFault::NotInstalled {
            service: service.into(),
            file: true,
        };
        assert_eq!(faults.contains(&missing), needed, "{nt:?} {service}");
    }
}

/// A name of a key in a hive is never used as a path.
#[test]
fn a_filter_named_like_a_path_is_no_service() {
    for name in ["disk\\..\\disk", "..\\Services\\disk"] {
        let mut guest = Guest::new(TEN);
        let key = format!("{SET}\\Control\\Class\\{DISK_DRIVE}");
        guest
            .tree
            .set(&key, "UpperFilters", RegData::MultiSz(vec![name.into()]));
        guest
            .tree
            .key_mut(&format!("{}\\..\\disk", service("disk")));
        assert!(!guest.evaluate(VirtioBlk).ready, "{name}");
    }
}

#[test]
fn windows_8_is_the_first_whose_drivers_are_bound_by_the_driver_database() {
    let unbound = |built_as, nt| {
        let mut guest = Guest::new(built_as);
        guest.nt = nt;
        let faults = guest.evaluate(VirtioBlk).faults;
        let decides =
            |fault: &BootFault| matches!(fault, BootFault::NotBound { decides: true, .. });
        faults.iter().any(decides)
    };
    for (nt, database) in [
        (SIX, false),
        ((6, 1), false),
        ((6, 2), true),
        ((6, 3), true),
        (TEN, true),
    ] {
        // One guest has only the DriverDatabase, the other only the CriticalDeviceDatabase.
        assert_eq!(unbound(TEN, nt), !database, "{nt:?}");
        assert_eq!(unbound((6, 1), nt), database, "{nt:?}");
    }
}

#[test]
fn the_driver_of_the_file_system_is_where_its_service_says() {
    let default = "system32\\drivers\\ntfs.sys";
    let own = "system32\\drivers\\own.sys";
    for (image_path, file, ready) in [
        (None, default, true),
        (None, own, false),
        (Some(default), default, true),
        (Some(default), own, false),
        (Some(own), own, true),
        (Some(own), default, false),
    ] {
        let mut guest = Guest::new(TEN);
        let driver = guest.files.remove(default).unwrap();
        guest.files.insert(file.into(), driver);
        let key = service(walk::NTFS);
        // The loader loads it whatever its start type is.
        guest.tree.dword(&key, "Start", 3).dword(&key, "Type", 2);
        if let Some(path) = image_path {
            let path = RegData::ExpandSz(path.into());
            guest.tree.set(&key, "ImagePath", path);
        }
        let path = guest.evaluate(VirtioBlk);
        assert_eq!(path.ready, ready, "{image_path:?} {file}: {}", path.reason);
        let missing = |fault: &BootFault| {
            matches!(fault, BootFault::Image { service, path: Some(path), .. }
                if service == walk::NTFS && path.key().ends_with(image_path.unwrap_or(default)))
        };
        let told = path.faults.iter().any(missing);
        assert_eq!(told, !ready, "{image_path:?} {file}");
    }
}

/// Verdict, service, reason and every step, as people read them.
fn shown(title: &str, path: &BootPath) -> String {
    let mut text = format!(
        "{title}\n  ready {}, service {:?}\n  {}\n",
        path.ready, path.service, path.reason
    );
    for step in &path.steps {
        let mark = if step.ok { "ok" } else { "--" };
        text.push_str(&format!("  {mark} {}\n", step.text));
    }
    text
}

#[test]
fn every_step_of_each_controller_in_its_order() {
    let mut text = String::new();
    for nt in [XP, (6, 1), TEN] {
        for controller in DiskBus::ALL {
            let mut guest = Guest::new(nt);
            for list in ["UpperFilters", "LowerFilters"] {
                let key = format!("{SET}\\Control\\Class\\{DISK_DRIVE}");
                guest
                    .tree
                    .set(&key, list, RegData::MultiSz(vec!["disk".into()]));
            }
            let title = format!("{nt:?} {}", controller.name());
            text.push_str(&shown(&title, &guest.evaluate(controller)));
        }
    }
    insta::assert_snapshot!("every-step", text);
}

/// The reason, and the steps and faults that a change of the guest adds.
#[test]
fn what_is_said_of_each_fault() {
    type Change = fn(&mut Guest);
    let image = |state, imports: &[&str]| Image {
        state,
        imports: imports.iter().map(ToString::to_string).collect(),
    };
    let other = |machine| ImageState::Present {
        machine: Some(machine),
    };
    let set = |guest: &mut Guest, file: &str, image: Image| {
        guest.files.insert(format!("system32\\{file}"), image);
    };
    let mut text = String::new();
    for (nt, controller, what, change) in [
        (
            TEN,
            VirtioBlk,
            "deleted and mistyped",
            (|g| {
                g.tree
                    .dword(&service("disk"), "DeleteFlag", 1)
                    .dword(&service("disk"), "Group", 1)
                    .sz(&service("pci"), "Start", "0");
            }) as Change,
        ),
        (TEN, VirtioBlk, "not installed", |g| {
            g.tree.remove(&service("disk"));
            g.tree.key_mut(&service("pci")).values.clear();
        }),
        (TEN, VirtioBlk, "late", |g| {
            g.tree
                .dword(&service("disk"), "Start", 1)
                .dword(&format!("{}\\StartOverride", service("pci")), "1", 3)
                .dword(&service("viostor"), "Type", 16);
        }),
        (TEN, VirtioBlk, "late and overridden", |g| {
            g.tree.dword(&service("disk"), "Start", 3).dword(
                &format!("{}\\StartOverride", service("disk")),
                "0",
                4,
            );
        }),
        // Windows 8 and later have their own drivers bound.
        (TEN, Ide, "unbound", |g| {
            g.tree.remove("DriverDatabase\\DeviceIds");
            // The class is that of the controller as long as no driver names another.
            let key = format!("{SET}\\Control\\Class\\{HDC}");
            let names = RegData::MultiSz(vec!["gone".into()]);
            g.tree.set(&key, "UpperFilters", names);
        }),
        (XP, Ide, "spare, but late", |g| {
            g.tree
                .dword(&service("intelide"), "Start", 3)
                .remove(&format!("{SET}\\Control\\CriticalDeviceDatabase"));
            g.files.remove("system32\\drivers\\atapi.sys");
        }),
        // From Vista on the channels are not looked up.
        ((6, 1), Ide, "channels of NT 6", |g| {
            let database = format!("{SET}\\Control\\CriticalDeviceDatabase");
            g.tree.remove(&format!("{database}\\Primary_IDE_Channel"));
        }),
        (TEN, VirtioBlk, "imports in any case", |g| {
            for (file, imports) in [
                ("disk", &["GONE.SYS", "API-MS-Win-x.dll"][..]),
                ("pci", &["gone.sys", "EXT-ms.dll"]),
            ] {
                let path = format!("system32\\drivers\\{file}.sys");
                let imports = imports.iter().map(ToString::to_string).collect();
                g.files.get_mut(&path).unwrap().imports = imports;
            }
        }),
        (XP, Ide, "old overrides", |g| {
            g.tree
                .dword(&format!("{}\\StartOverride", service("pci")), "1", 3);
        }),
        (TEN, VirtioBlk, "paths", |g| {
            g.tree.sz(&service("disk"), "ImagePath", "..\\disk.sys").sz(
                &service("pci"),
                "ImagePath",
                "C:\\Windows\\system32\\drivers\\pci.sys",
            );
        }),
        (XP, VirtioBlk, "paths of NT 5", |g| {
            g.tree.sz(
                &service("pci"),
                "ImagePath",
                "\\SystemRoot\\system32\\drivers\\pci.sys",
            );
        }),
        (TEN, VirtioBlk, "filters", |g| {
            g.tree
                .dword(&service("off"), "Type", 1)
                .dword(&service("off"), "Start", 4)
                .dword(&service("marked"), "Type", 1)
                .dword(&service("marked"), "Start", 3)
                .dword(&service("marked"), "DeleteFlag", 1)
                .key_mut(&service("empty"));
            for (class, list) in [(DISK_DRIVE, "UpperFilters"), (HDC, "LowerFilters")] {
                let names = ["off", "marked", "empty", "gone", "pci"];
                g.tree.set(
                    &format!("{SET}\\Control\\Class\\{class}"),
                    list,
                    RegData::MultiSz(names.map(str::to_string).to_vec()),
                );
            }
        }),
        (TEN, VirtioBlk, "earlier devices", |g| {
            let bus = format!("{SET}\\Enum\\PCI\\VEN_1AF4&DEV_1042&SUBSYS_1");
            g.tree
                .dword(&format!("{bus}\\1"), "ConfigFlags", 3)
                .sz(&format!("{bus}\\2"), "Class", "x")
                .sz(&format!("{bus}\\3"), "ClassGUID", "x")
                .sz(&format!("{bus}\\3"), "Service", "other")
                .sz(&format!("{bus}\\4"), "ClassGUID", "x")
                .sz(&format!("{bus}\\4"), "Service", "VioStor");
            // The old form of the device counts, another device and one in another form do not.
            for device in [
                "ven_1af4&dev_1001&x",
                "VEN_1AF4&DEV_1048&X",
                "VEN_1AF4&DEV_1042",
            ] {
                let key = format!("{SET}\\Enum\\PCI\\{device}\\1");
                g.tree.dword(&key, "ConfigFlags", 1);
            }
        }),
        (TEN, VirtioBlk, "staged", |g| {
            g.tree.remove("DriverDatabase\\DriverInfFiles");
            let ids = "DriverDatabase\\DeviceIds\\PCI\\VEN_1AF4&DEV_1042";
            g.tree.sz(ids, "oem9.inf", "");
        }),
        ((6, 1), VirtioBlk, "no class", |g| {
            for id in ["1001", "1042", "1042&SUBSYS_11001AF4"] {
                let key = format!("{SET}\\Control\\CriticalDeviceDatabase\\PCI#VEN_1AF4&DEV_{id}");
                g.tree
                    .sz(&key, "ClassGUID", "")
                    .sz(&key, "Service", "viostor");
            }
        }),
        (XP, Ide, "no channels", |g| {
            g.tree
                .remove(&format!("{SET}\\Control\\CriticalDeviceDatabase"));
        }),
        (TEN, VirtioBlk, "pending", |g| {
            let list = ["\\??\\C:\\Windows\\system32\\drivers\\viostor.sys", ""];
            g.tree.set(
                &format!("{SET}\\Control\\Session Manager"),
                "PendingFileRenameOperations",
                RegData::MultiSz(list.map(str::to_string).to_vec()),
            );
        }),
    ] {
        let before = Guest::new(nt).evaluate(controller);
        let mut guest = Guest::new(nt);
        change(&mut guest);
        let mut path = guest.evaluate(controller);
        path.steps.retain(|step| !before.steps.contains(step));
        path.faults.retain(|fault| !before.faults.contains(fault));
        text.push_str(&shown(&format!("{what}: {nt:?} {controller:?}"), &path));
        text.push_str(&format!("  {:?}\n", path.faults));
    }
    for (what, file, found) in [
        (
            "missing",
            "drivers\\disk.sys",
            image(ImageState::Missing, &[]),
        ),
        (
            "unreadable",
            "drivers\\disk.sys",
            image(ImageState::Unreadable, &[]),
        ),
        ("for another", "drivers\\disk.sys", image(other(0x14c), &[])),
        (
            "for an unknown",
            "drivers\\disk.sys",
            image(other(0x200), &[]),
        ),
        (
            "import for another",
            "drivers\\classpnp.sys",
            image(other(0xaa64), &[]),
        ),
        (
            "import unreadable",
            "drivers\\classpnp.sys",
            image(ImageState::Unreadable, &[]),
        ),
        (
            "import missing",
            "drivers\\classpnp.sys",
            image(ImageState::Missing, &[]),
        ),
        (
            "import of an import",
            "drivers\\classpnp.sys",
            image(other(0x8664), &["b.sys", "a.sys"]),
        ),
        ("hal outside", "hal.dll", image(ImageState::Missing, &[])),
        (
            "only Windows reads it",
            "drivers\\disk.sys",
            image(ImageState::Present { machine: None }, &[]),
        ),
        (
            "import only Windows reads",
            "drivers\\classpnp.sys",
            image(ImageState::Present { machine: None }, &[]),
        ),
        ("kernel", "ntoskrnl.exe", image(ImageState::Unreadable, &[])),
        (
            "file system",
            "drivers\\ntfs.sys",
            image(ImageState::Missing, &[]),
        ),
    ] {
        let before = Guest::new(TEN).evaluate(VirtioBlk);
        let mut guest = Guest::new(TEN);
        set(&mut guest, file, found);
        let mut path = guest.evaluate(VirtioBlk);
        path.steps.retain(|step| !before.steps.contains(step));
        path.faults.retain(|fault| !before.faults.contains(fault));
        text.push_str(&shown(&format!("{what}: {file}"), &path));
        text.push_str(&format!("  {:?}\n", path.faults));
    }
    insta::assert_snapshot!("every-fault", text);
}

#[test]
fn every_controller_has_its_own_verdict() {
    let guest = Guest::new(TEN);
    let hive = guest.tree.to_bytes("SYSTEM");
    let root = GuestPath::parse("\\Windows").unwrap();
    let ctx = BootContext {
        system: &HiveView::new(&hive).unwrap(),
        control_set: &crate::types::ControlSet::new(1),
        windows_root: &root,
        nt: TEN,
        arch: Arch::Amd64,
        image: &|path| {
            let below = path.key().strip_prefix("\\windows\\").map(str::to_string);
            let file = below.and_then(|below| guest.files.get(&below));
            file.cloned().unwrap_or(ImageState::Missing.into())
        },
    };
    let all = evaluate_all(&ctx);
    assert_eq!(all.len(), DiskBus::ALL.len());
    for (controller, path) in all {
        assert_eq!(path, guest.evaluate(controller), "{controller:?}");
    }
}

/// The classes of devices between Windows and its disk, by the numbers Microsoft gave them.
#[test]
fn the_classes_have_their_own_keys() {
    for (name, guid) in [
        ("SCSIAdapter", "{4d36e97b-e325-11ce-bfc1-08002be10318}"),
        ("hdc", "{4d36e96a-e325-11ce-bfc1-08002be10318}"),
        ("DiskDrive", "{4d36e967-e325-11ce-bfc1-08002be10318}"),
        ("Volume", "{71a27cdd-812a-11d0-bec7-08002be2092f}"),
        ("System", "{4d36e97d-e325-11ce-bfc1-08002be10318}"),
    ] {
        assert_eq!(class_guid(name), Some(guid));
    }
    assert_eq!((NTFS, KERNEL, DEVICE_OFF), ("Ntfs", "the kernel", 3));
}

/// A loader of NT 6 takes the first file it finds, whether it is of use or not.
#[test]
fn an_import_is_looked_for_beside_the_driver_then_among_the_drivers_then_in_system32() {
    let of = |arch: Arch| Image {
        state: ImageState::Present {
            machine: Some(arch.pe_machine()),
        },
        imports: [].into(),
    };
    for (good, bad, ready) in [
        ("store", "system32\\drivers", true),
        ("system32\\drivers", "store", false),
        ("system32\\drivers", "system32", true),
        ("system32", "system32\\drivers", false),
        ("system32", "elsewhere", true),
        ("elsewhere", "nowhere", false),
    ] {
        let mut guest = Guest::new(TEN);
        guest
            .tree
            .sz(&service("disk"), "ImagePath", "store\\disk.sys");
        let mut disk = of(Arch::Amd64);
        disk.imports = ["x.sys".to_string()].into();
        guest.files.insert("store\\disk.sys".into(), disk);
        guest
            .files
            .insert(format!("{good}\\x.sys"), of(Arch::Amd64));
        guest.files.insert(format!("{bad}\\x.sys"), of(Arch::X86));
        let path = guest.evaluate(VirtioBlk);
        assert_eq!(path.ready, ready, "{good} {bad}: {}", path.reason);
    }
}

/// Every file that is missing has to come back, not only the first.
#[test]
fn all_files_that_a_driver_lacks_are_named() {
    let mut guest = Guest::new(TEN);
    guest.file(
        "system32\\drivers\\viostor.sys",
        &["a.sys", "storport.sys", "b.sys"],
    );
    guest.file("system32\\drivers\\storport.sys", &["c.sys"]);
    guest.file("system32\\drivers\\disk.sys", &["d.sys", "A.SYS"]);
    let faults = guest.evaluate(VirtioBlk).faults;
    let mut names: Vec<_> = (faults.iter())
        .filter_map(|fault| match fault {
            BootFault::Import { service, missing } => Some(format!("{service} {}", missing.name)),
            _ => None,
        })
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "disk d.sys",
            "viostor a.sys",
            "viostor b.sys",
            "viostor c.sys"
        ]
    );
}

/// Earlier devices, filters and files to delete are those of the control set that boots.
#[test]
fn what_else_a_control_set_has_counts_in_the_one_that_boots() {
    let second = crate::types::ControlSet::new(2);
    for nt in [XP, (6, 1), TEN] {
        let mut guest = Guest::new(nt);
        let mut copy = guest.tree.get(SET).unwrap().clone();
        copy.name = second.to_string();
        *guest.tree.key_mut(&second) = copy;
        for set in [SET, &*second] {
            let files = guest.files.clone();
            let tree = guest.tree.clone();
            let mut changed = Guest { nt, tree, files };
            let id = "PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01\\3&1&0&20";
            let list = ["\\??\\C:\\WINDOWS\\system32\\drivers\\disk.sys", ""];
            let names =
                |names: &[&str]| RegData::MultiSz(names.iter().map(ToString::to_string).collect());
            changed
                .tree
                .dword(&format!("{set}\\Enum\\{id}"), "ConfigFlags", 1)
                .set(
                    &format!("{set}\\Control\\Class\\{DISK_DRIVE}"),
                    "UpperFilters",
                    names(&["gone"]),
                )
                .set(
                    &format!("{set}\\Control\\Session Manager"),
                    "PendingFileRenameOperations",
                    names(&list),
                );
            let faults = changed.evaluate_in(&second, VirtioBlk).faults;
            let found = |is: fn(&BootFault) -> bool| faults.iter().any(is);
            let seen = [
                found(|fault| matches!(fault, BootFault::DeviceDisabled { .. })),
                found(|fault| matches!(fault, BootFault::DeadFilter { .. })),
                found(|fault| matches!(fault, BootFault::FileDeleted { .. })),
            ];
            assert_eq!(seen, [set == &*second; 3], "{nt:?} {set}: {faults:?}");
        }
    }
}

/// Server 2003 is NT 5.2: its VM and its loader are those of XP.
#[test]
fn server_2003_is_looked_at_as_xp_is() {
    for nt in [XP, (5, 2)] {
        let mut guest = Guest::new(nt);
        let database = format!("{SET}\\Control\\CriticalDeviceDatabase");
        guest
            .tree
            .remove(&format!("{database}\\PCI#VEN_1AF4&DEV_1042"));
        assert!(guest.evaluate(VirtioBlk).ready, "{nt:?}");
        guest
            .tree
            .remove(&format!("{database}\\PCI#VEN_1AF4&DEV_1001"));
        assert!(!guest.evaluate(VirtioBlk).ready, "{nt:?}");
        assert!(guest.evaluate(Ide).ready, "{nt:?}");
        guest
            .tree
            .remove(&format!("{database}\\Primary_IDE_Channel"));
        assert!(!guest.evaluate(Ide).ready, "{nt:?}");
        // Its loader looks for imports beside the driver only.
        let mut guest = Guest::new(nt);
        let port = guest
            .files
            .remove("system32\\drivers\\scsiport.sys")
            .unwrap();
        guest.files.insert("system32\\scsiport.sys".into(), port);
        assert!(!guest.evaluate(VirtioBlk).ready, "{nt:?}");
        let mut guest = Guest::new(nt);
        let key = format!("{}\\StartOverride", service("viostor"));
        guest.tree.dword(&key, "0", 4);
        assert!(guest.evaluate(VirtioBlk).ready, "{nt:?}");
    }
}
