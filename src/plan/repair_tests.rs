//! Each fault the boot path finds, in both control sets of a guest, and the edit that repairs it.

use super::*;
use crate::convert::prepare;
use crate::demo::{Arch, GuestSpec, WinVersion};
use crate::drivers::Catalogue;
use crate::guest::VolumeId;
use crate::inspect::Survey;
use crate::plan::firstboot::Preferences;
use crate::plan::{Draft, Options};
use crate::registry::KeyTree;
use crate::testing::{self, MemoryGuest, bootstrap, driver_source};

use WinVersion::{Win7, Win10, Xp};

const SETS: [&str; 2] = ["ControlSet001", "ControlSet002"];

/// A guest whose two control sets, of which Windows runs with the second, have the same fault.
fn guest(version: WinVersion, change: impl Fn(&mut KeyTree)) -> MemoryGuest {
    let mut spec = GuestSpec::new(version);
    if version == Win7 {
        spec.arch = Arch::X86;
    }
    let mut guest = MemoryGuest::of(spec);
    let mut set = guest.system.get("ControlSet001").unwrap().clone();
    change(&mut set);
    for name in SETS {
        set.name = name.into();
        *guest.system.key_mut(name) = set.clone();
    }
    guest.system.dword("Select", "Current", 2);
    guest
}

fn draft(guest: &MemoryGuest, options: Options) -> Draft {
    guest.look(&[], |fake, survey| {
        let (catalogue, wishes) = (Catalogue::builtin(), Preferences::default());
        let drafted = prepare::draft(
            survey,
            fake,
            &driver_source(),
            &catalogue,
            (options, &wishes),
        );
        drafted.unwrap().0
    })
}

type Value = (&'static str, &'static str, Option<RegData>);

struct Row {
    version: WinVersion,
    change: fn(&mut KeyTree),
    /// Below either control set: key, value, and what it is after the fix.
    values: fn() -> Vec<Value>,
}

const DISK_CLASS: &str = "Control\\Class\\{4d36e967-e325-11ce-bfc1-08002be10318}";
const CDD: &str = "Control\\CriticalDeviceDatabase";
const SESSION: &str = "Control\\Session Manager";
const PENDING: &str = "PendingFileRenameOperations";
const MET: &str = "Enum\\PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01\\3&1&0&20";

fn sz(text: &str) -> Option<RegData> {
    Some(RegData::Sz(text.into()))
}

fn path(text: &str) -> Option<RegData> {
    Some(RegData::ExpandSz(text.into()))
}

fn multi(names: &[&str]) -> RegData {
    RegData::MultiSz(names.iter().map(ToString::to_string).collect())
}

fn dword(number: u32) -> Option<RegData> {
    Some(RegData::Dword(number))
}

/// Takes every entry that leads to a service out of the CriticalDeviceDatabase.
fn unbind(set: &mut KeyTree, service: &str) {
    let entries = &mut set.key_mut(CDD).keys;
    let leads = |entry: &KeyTree| {
        let found = entry.value("", "Service").and_then(|v| v.as_string());
        found.is_some_and(|name| name.eq_ignore_ascii_case(service))
    };
    let before = entries.len();
    entries.retain(|_, entry| !leads(entry));
    assert!(entries.len() < before, "{service}");
}

const ROWS: &[Row] = &[
    Row {
        version: Win10,
        change: |set| {
            set.dword("Services\\disk", "Start", 3);
            set.dword("Services\\disk\\StartOverride", "0", 3);
        },
        values: || {
            vec![
                ("Services\\disk", "Start", dword(0)),
                ("Services\\disk\\StartOverride", "0", None),
            ]
        },
    },
    // A value of the wrong type is written as setup writes it.
    Row {
        version: Win10,
        change: |set| {
            for name in ["Start", "Type", "ErrorControl"] {
                set.sz("Services\\partmgr", name, "0");
            }
            set.dword("Services\\partmgr", "Group", 1);
            set.dword("Services\\VolMgr", "ImagePath", 1);
            set.dword("Services\\VolMgr", "Group", 1);
            // No group is known for this one: it starts after those that have one.
            set.dword("Services\\volsnap", "Group", 1);
        },
        values: || {
            vec![
                ("Services\\partmgr", "Start", dword(0)),
                ("Services\\partmgr", "Type", dword(1)),
                ("Services\\partmgr", "ErrorControl", dword(1)),
                ("Services\\partmgr", "Group", sz("Boot Bus Extender")),
                (
                    "Services\\volmgr",
                    "ImagePath",
                    path("System32\\drivers\\volmgr.sys"),
                ),
                ("Services\\volmgr", "Group", sz("System Bus Extender")),
                ("Services\\volsnap", "Group", None),
            ]
        },
    },
    Row {
        version: Win7,
        change: |set| {
            set.dword("Services\\msahci", "Start", 0);
            set.dword("Services\\msahci", "Group", 1);
        },
        values: || vec![("Services\\msahci", "Group", sz("SCSI Miniport"))],
    },
    Row {
        version: Win10,
        change: |set| {
            set.dword("Services\\storahci", "DeleteFlag", 1);
        },
        values: || vec![("Services\\storahci", "DeleteFlag", None)],
    },
    // What was marked for deletion before this driver came would take it along.
    Row {
        version: Win10,
        change: |set| {
            set.dword("Services\\viostor", "DeleteFlag", 1);
        },
        values: || {
            vec![
                ("Services\\viostor", "DeleteFlag", None),
                ("Services\\viostor", "Start", dword(0)),
            ]
        },
    },
    // As every loader understands it, with the rest of the path as it was.
    Row {
        version: Xp,
        change: |set| {
            let name = "\\??\\C:\\WINDOWS\\System32\\drivers\\disk.sys";
            set.sz("Services\\disk", "ImagePath", name);
            let name = "\\SystemRoot\\System32\\drivers\\ftdisk.sys";
            set.sz("Services\\ftdisk", "ImagePath", name);
        },
        values: || {
            vec![
                (
                    "Services\\disk",
                    "ImagePath",
                    path("System32\\drivers\\disk.sys"),
                ),
                (
                    "Services\\ftdisk",
                    "ImagePath",
                    path("System32\\drivers\\ftdisk.sys"),
                ),
            ]
        },
    },
    // Switched off and removed, of which neither stays; other flags do.
    Row {
        version: Win10,
        change: |set| {
            set.dword(MET, "ConfigFlags", 0x403);
        },
        values: || vec![(MET, "ConfigFlags", dword(0x400))],
    },
    Row {
        version: Win10,
        change: |set| {
            set.set(DISK_CLASS, "UpperFilters", multi(&["gone", "partmgr"]));
            set.set(DISK_CLASS, "LowerFilters", multi(&["GONE"]));
        },
        values: || {
            vec![
                (DISK_CLASS, "UpperFilters", Some(multi(&["partmgr"]))),
                (DISK_CLASS, "LowerFilters", None),
            ]
        },
    },
    // Of a list of moves those that hit a boot driver go, of this driver source or of Windows.
    Row {
        version: Win10,
        change: |set| {
            let gone = [
                "\\??\\C:\\Windows\\System32\\drivers\\viostor.sys",
                "",
                "\\??\\C:\\Temp\\x",
                "",
                "\\??\\C:\\Windows\\System32\\drivers\\disk.sys",
                "",
            ];
            set.set(SESSION, PENDING, multi(&gone));
        },
        values: || vec![(SESSION, PENDING, Some(multi(&["\\??\\C:\\Temp\\x", ""])))],
    },
    // AHCI on 7: setup only binds what the disk of the installation needed.
    Row {
        version: Win7,
        change: |set| unbind(set, "msahci"),
        values: || {
            let entry = "Control\\CriticalDeviceDatabase\\PCI#CC_0106";
            vec![
                (entry, "Service", sz("msahci")),
                (entry, "ClassGUID", sz(HDC_CLASS)),
                ("Services\\msahci", "Start", dword(0)),
            ]
        },
    },
    // IDE on XP that was installed on SCSI (Microsoft KB 314082).
    Row {
        version: Xp,
        change: |set| {
            set.remove(CDD);
            for service in ["atapi", "intelide", "pciide"] {
                set.remove(&format!("Services\\{service}"));
            }
        },
        values: || {
            let mut values = Vec::new();
            for (id, service) in [
                ("Primary_IDE_Channel", "atapi"),
                ("Secondary_IDE_Channel", "atapi"),
                ("Internal_IDE_Channel", "atapi"),
                ("Intel-PIIX3", "atapi"),
                ("*PNP0600", "atapi"),
                ("PCI#VEN_8086&DEV_7010", "intelide"),
            ] {
                let key: &'static str = format!("{CDD}\\{id}").leak();
                values.push((key, "Service", sz(service)));
                values.push((key, "ClassGUID", sz(HDC_CLASS)));
            }
            for (service, group, tag) in [
                ("atapi", "SCSI miniport", 0x19),
                ("intelide", "System Bus Extender", 4),
            ] {
                let key: &'static str = format!("Services\\{service}").leak();
                let file = format!("system32\\DRIVERS\\{service}.sys");
                values.extend([
                    (key, "Type", dword(1)),
                    (key, "Start", dword(0)),
                    (key, "ErrorControl", dword(1)),
                    (key, "Group", sz(group)),
                    (key, "Tag", dword(tag)),
                    (key, "ImagePath", path(&file)),
                ]);
            }
            values
        },
    },
];

#[test]
fn every_fault_that_an_edit_repairs_is_repaired_in_both_control_sets() {
    for version in [Win10, Win7, Xp] {
        let rows = || ROWS.iter().filter(|row| row.version == version);
        let mut guest = guest(version, |set| rows().for_each(|row| (row.change)(set)));
        let first = Some(bootstrap(version));
        // A driver that is bound by one plan is looked at by the next.
        for left in [version != Win10, false] {
            let prepared = guest.prepare(&driver_source(), first);
            guest.apply(&prepared, &driver_source());
            if !left {
                assert_eq!(prepared.plan.blockers, [], "{version:?}");
                break;
            }
        }
        for set in SETS {
            for (key, name, expected) in rows().flat_map(|row| (row.values)()) {
                let key = format!("{set}\\{key}");
                let found = guest.system.value(&key, name);
                let expected = expected.map(|data| data.to_value());
                assert_eq!(found, expected.as_ref(), "{version:?}: {key} {name}");
            }
        }
    }
}

/// There is nothing that its service could load.
#[test]
fn a_driver_of_windows_gets_its_service_back_only_with_its_file() {
    for there in [true, false] {
        let mut guest = guest(Xp, |set| {
            set.remove("Services\\atapi").unwrap();
        });
        if !there {
            guest.without("atapi.sys");
        }
        let prepared = guest.prepare(&driver_source(), Some(bootstrap(Xp)));
        let refused: Vec<_> = prepared.plan.blockers.iter().map(|b| &b.code).collect();
        assert_eq!(refused.is_empty(), there, "{refused:?}");
        guest.apply(&prepared, &driver_source());
        for set in SETS {
            let start = guest
                .system
                .value(&format!("{set}\\Services\\atapi"), "Start");
            let wanted = there.then(|| RegData::Dword(0).to_value());
            assert_eq!(start, wanted.as_ref(), "{set}");
        }
    }
}

/// Windows starts without any other driver; the service manager removes what it was told to.
#[test]
fn a_mark_of_deletion_is_removed_from_drivers_that_boot_only() {
    let file = |name: &str| format!("\\??\\C:\\Windows\\System32\\drivers\\{name}.sys");
    let names = ["viostor", "netkvm"];
    let (boot, net) = (file(names[0]), file(names[1]));
    let mut guest = guest(Win10, |set| {
        for name in names {
            set.dword(&format!("Services\\{name}"), "DeleteFlag", 1);
        }
        set.set(SESSION, PENDING, multi(&[&boot, "", &net, ""]));
    });
    let prepared = guest.prepare(&driver_source(), Some(bootstrap(Win10)));
    guest.apply(&prepared, &driver_source());
    for set in SETS {
        let flags = names.map(|name| {
            let key = format!("{set}\\Services\\{name}");
            guest.system.value(&key, "DeleteFlag").is_some()
        });
        assert_eq!(flags, [false, true], "{set}");
        let moves = guest.system.value(&format!("{set}\\{SESSION}"), PENDING);
        assert_eq!(moves, Some(&multi(&[&net, ""]).to_value()), "{set}");
    }
}

/// Windows replaces a driver by moving the old file away and the new one to its place.
#[test]
fn a_file_that_windows_replaces_stays_in_the_list_of_moves() {
    let disk = "\\??\\C:\\Windows\\System32\\drivers\\disk.sys";
    let moves = [disk, "\\??\\C:\\Temp\\old", "\\??\\C:\\Temp\\new", disk];
    let viostor = "\\??\\C:\\Windows\\System32\\drivers\\viostor.sys";
    let of_both = [&moves[..], &[viostor, "!\\??\\C:\\Temp\\x"]].concat();
    let mut guest = guest(Win10, |set| {
        set.set(SESSION, PENDING, multi(&of_both));
    });
    let prepared = guest.prepare(&driver_source(), Some(bootstrap(Win10)));
    guest.apply(&prepared, &driver_source());
    for set in SETS {
        let found = guest.system.value(&format!("{set}\\{SESSION}"), PENDING);
        assert_eq!(found, Some(&multi(&moves).to_value()), "{set}");
    }
}

/// A disk without its partition manager has no volumes.
#[test]
fn a_filter_whose_service_is_repaired_stays_in_its_list() {
    for change in [
        (|set| {
            set.dword("Services\\partmgr", "Start", 4);
        }) as fn(&mut KeyTree),
        |set| {
            set.dword("Services\\partmgr", "DeleteFlag", 1);
        },
        |set| {
            set.sz("Services\\partmgr", "Type", "1");
        },
    ] {
        let mut guest = guest(Win10, |set| {
            change(set);
            set.set(DISK_CLASS, "UpperFilters", multi(&["gone", "PartMgr"]));
        });
        let prepared = guest.prepare(&driver_source(), Some(bootstrap(Win10)));
        assert_eq!(prepared.plan.blockers, []);
        guest.apply(&prepared, &driver_source());
        for set in SETS {
            let key = format!("{set}\\{DISK_CLASS}");
            let found = guest.system.value(&key, "UpperFilters").unwrap();
            assert_eq!(*found, multi(&["PartMgr"]).to_value());
        }
    }
}

/// A service of one control set is not written into the other.
#[test]
fn a_device_is_switched_on_only_where_it_is_known() {
    let mut guest = guest(Win10, |set| {
        set.dword(MET, "ConfigFlags", 1);
    });
    guest.system.remove("ControlSet002\\Enum");
    let prepared = guest.prepare(&driver_source(), Some(bootstrap(Win10)));
    guest.apply(&prepared, &driver_source());
    let flags = |set: &str| {
        let found = guest.system.value(&format!("{set}\\{MET}"), "ConfigFlags");
        found.and_then(|value| value.as_dword())
    };
    assert_eq!([flags(SETS[0]), flags(SETS[1])], [Some(0), None]);
}

/// A driver outside the directory of Windows is not moved: nothing is known of what else is there.
#[test]
fn a_path_outside_of_windows_is_no_edit_but_a_blocker() {
    for path in [
        "\\Tools\\disk.sys",
        // A directory whose name begins as that of Windows does.
        "\\WINDOWS.old\\System32\\drivers\\disk.sys",
        "\\WINDOWS2\\disk.sys",
    ] {
        let guest = guest(Xp, |set| {
            set.sz("Services\\disk", "ImagePath", path);
        });
        let plan = guest.prepare(&driver_source(), Some(bootstrap(Xp))).plan;
        let codes: Vec<_> = plan.blockers.iter().map(|b| b.code.as_str()).collect();
        assert!(codes.contains(&"boot-driver-file"), "{path}: {codes:?}");
        for action in &plan.actions {
            if let Action::EditHive(edit) = action {
                let moved = |op: &RegOp| matches!(op, RegOp::Set { key, name, .. } if key.ends_with("\\disk") && name == "ImagePath");
                assert!(!edit.edits.ops.iter().any(moved), "{path}");
            }
        }
    }
}

#[test]
fn a_device_that_was_met_before_is_a_warning_that_names_its_driver() {
    for (service, text) in [
        (Some("other"), "with the driver other"),
        (None, "without a driver"),
    ] {
        let guest = guest(Win10, |set| {
            set.sz(MET, "ClassGUID", "{4d36e97b-e325-11ce-bfc1-08002be10318}");
            if let Some(name) = service {
                set.sz(MET, "Service", name);
            }
        });
        let plan = guest.prepare(&driver_source(), Some(bootstrap(Win10))).plan;
        let mut warnings = plan
            .warnings
            .iter()
            .filter(|w| w.contains("was here before"));
        let warning = warnings.next().unwrap();
        assert!(warning.contains(text), "{warning}");
        assert!(warning.contains("the boot from virtio-blk"), "{warning}");
        assert_eq!(warnings.next(), None);
    }
}

/// A controller that is neither the first boot's nor a VirtIO one is left as it is.
#[test]
fn only_the_controllers_of_this_conversion_are_repaired() {
    for (first, repaired) in [(DiskBus::Sata, false), (DiskBus::Ide, true)] {
        let guest = guest(Win10, |set| {
            set.dword("Services\\atapi", "Start", 3);
        });
        let draft = draft(&guest, testing::options(Some(first)));
        let edits = draft.actions.iter().filter_map(|action| match action {
            Action::EditHive(edit) => Some(&edit.edits.ops),
            _ => None,
        });
        let mut keys = edits.flatten().map(RegOp::key);
        assert_eq!(
            keys.any(|key| key.ends_with("\\atapi")),
            repaired,
            "{first:?}"
        );
    }
}

/// An edit that a driver package or two controllers need is made once in each control set.
#[test]
fn no_value_is_written_twice_in_one_plan() {
    let guest = guest(Win7, |set| {
        set.dword("Services\\disk", "Start", 3);
        let bound = format!("{CDD}\\PCI#VEN_1AF4&DEV_1001");
        set.sz(&bound, "ClassGUID", HDC_CLASS);
        set.sz(&bound, "Service", "VioStor");
        set.dword("Services\\VioStor", "Type", 1);
        set.dword("Services\\VioStor", "Start", 3);
        set.sz(
            "Services\\VioStor",
            "ImagePath",
            "System32\\drivers\\viostor.sys",
        );
    });
    let draft = draft(&guest, testing::options(Some(DiskBus::Sata)));
    let edits = draft.actions.iter().filter_map(|action| match action {
        Action::EditHive(edit) if edit.hive == HiveName::System => Some(&edit.edits.ops),
        _ => None,
    });
    let mut values: Vec<_> = edits
        .flatten()
        .filter_map(|op| match op {
            RegOp::Set { key, name, .. } => Some(format!("{key} {name}").to_lowercase()),
            _ => None,
        })
        .collect();
    values.sort();
    for set in ["controlset001", "controlset002"] {
        for service in ["disk", "viostor"] {
            let start = format!("{set}\\services\\{service} start");
            assert!(values.contains(&start), "{start}");
        }
    }
    let twice: Vec<_> = values.windows(2).filter(|two| two[0] == two[1]).collect();
    assert!(twice.is_empty(), "{twice:?}");
}

/// Text mode keeps the script's screen from people and always goes. Where a disk or partition is
/// named wrongly, the user has the word.
#[test]
fn the_boot_store_and_the_boot_sector_are_repaired_as_far_as_was_asked() {
    let mut guest = guest(Win7, |_| {});
    fn op(name: &str) -> RegOp {
        RegOp::set("Objects\\x", name, RegData::Dword(1))
    }
    fn field(name: &'static str) -> SectorField {
        SectorField {
            name,
            offset: 0x1a,
            old: vec![1],
            new: vec![2],
        }
    }
    guest.survey = Some(|survey: &mut Survey| {
        let windows = survey.inspection.windows.as_mut().unwrap();
        let boot = &mut windows.boot;
        (boot.text_mode, boot.device_repair) = (vec![op("text")], vec![op("device")]);
        (boot.heads, boot.hidden) = (Some(field("heads")), Some(field("hidden")));
    });
    let volume = guest.look(&[], |_, survey| {
        survey.inspection.windows.as_ref().unwrap().boot_volume
    });
    for (repair_bcd, ops, fields) in [
        (false, &["text"][..], &["heads"][..]),
        (true, &["text", "device"], &["heads", "hidden"]),
    ] {
        let draft = draft(
            &guest,
            Options {
                repair_bcd,
                ..testing::options(Some(DiskBus::Sata))
            },
        );
        let (mut store, mut sector): (Vec<String>, Option<(VolumeId, Vec<&str>)>) =
            Default::default();
        for action in &draft.actions {
            match action {
                Action::EditHive(edit) if edit.hive == HiveName::Bcd => {
                    let names = edit.edits.ops.iter().map(|op| match op {
                        RegOp::Set { name, .. } => name.clone(),
                        other => panic!("{other:?}"),
                    });
                    store.extend(names);
                }
                Action::PatchBootSector(patch) => {
                    let names = patch.fields.iter().map(|f| f.name).collect();
                    sector = Some((patch.volume, names));
                }
                _ => {}
            }
        }
        assert_eq!(store, ops, "{repair_bcd}");
        assert_eq!(sector, Some((volume.unwrap(), fields.to_vec())));
    }
}

/// Each value of a service as setup writes it: the right group keeps the order in which drivers are loaded.
#[test]
fn a_value_of_the_wrong_type_is_written_as_setup_writes_it() {
    for (service, group) in [
        ("pci", Some("Boot Bus Extender")),
        ("ACPI", Some("Boot Bus Extender")),
        ("partmgr", Some("Boot Bus Extender")),
        ("MountMgr", Some("System Bus Extender")),
        ("volmgr", Some("System Bus Extender")),
        ("volmgrx", Some("System Bus Extender")),
        ("ftdisk", Some("System Bus Extender")),
        ("storahci", Some("SCSI Miniport")),
        ("atapi", Some("SCSI miniport")),
        ("intelide", Some("System Bus Extender")),
        ("pciide", Some("System Bus Extender")),
        ("MSAHCI", Some("SCSI Miniport")),
        ("disk", None),
    ] {
        let key = "ControlSet001\\Services\\x";
        let image = format!("System32\\drivers\\{service}.sys");
        for (value, data) in [
            ("Start", RegData::Dword(0)),
            ("Type", RegData::Dword(1)),
            ("ErrorControl", RegData::Dword(1)),
            ("ImagePath", RegData::ExpandSz(image)),
        ] {
            assert_eq!(retyped(key, service, value), RegOp::set(key, value, data));
        }
        let expected = match group {
            Some(group) => RegOp::set(key, "Group", RegData::Sz(group.into())),
            None => RegOp::DeleteValue {
                key: key.into(),
                name: "Group".into(),
            },
        };
        assert_eq!(retyped(key, service, "Group"), expected, "{service}");
    }
}

/// The service keys and the entries of the CriticalDeviceDatabase of Windows' own drivers.
#[test]
fn the_drivers_of_windows_are_written_as_its_setup_does() {
    let set = ControlSet::new(2);
    let mut text = String::new();
    for name in ["atapi", "IntelIde", "pciide", "msahci"] {
        let mut ops = inbox(name).unwrap().service(&set);
        ops.extend(bind(&set, &["VEN_8086&DEV_2922".into()], name));
        ops.iter()
            .for_each(|op| text.push_str(&format!("{op:?}\n")));
    }
    // A channel that was looked for is bound too; another id, or another driver, is not.
    let ids = ["Intel-PIIX3", "Primary_IDE_Channel"].map(str::to_string);
    let bound = bind(&set, &ids, "atapi");
    assert_eq!(bound.len(), 10);
    assert!(
        bound[8]
            .key()
            .ends_with("\\CriticalDeviceDatabase\\Intel-PIIX3")
    );
    assert_eq!(bind(&set, &ids, "storahci"), []);
    assert!(inbox("storahci").is_none());
    insta::assert_snapshot!("inbox", text);
    let start = boot_start(&set, "disk");
    let key = "ControlSet002\\Services\\disk";
    assert_eq!(
        start,
        [
            RegOp::set(key, "Start", RegData::Dword(0)),
            RegOp::DeleteKey {
                key: format!("{key}\\StartOverride")
            },
        ]
    );
}

#[test]
fn a_device_that_was_here_before_is_told_with_what_helps() {
    assert_eq!(
        met_before(DiskBus::VirtioScsi, "PCI\\X\\1", Some("other")),
        "the device PCI\\X\\1 was here before, with the driver other: in the same place again Windows does not look for its new driver, and the boot from virtio-scsi may stop with 0x7B; delete it below Enum in the guest first"
    );
    assert!(met_before(DiskBus::Ide, "x", None).contains("before, without a driver: in"));
    assert_eq!(
        unreadable(&"why"),
        Blocker::new(
            "hive-damaged",
            "the SYSTEM hive cannot be read: why",
            "start the guest once on its old hypervisor and shut it down cleanly",
        )
    );
}

/// The lists of two control sets may differ: each keeps what it has.
#[test]
fn each_control_set_keeps_its_own_lists() {
    let moves = |path: &str| format!("\\??\\C:\\{path}");
    let viostor = moves("Windows\\System32\\drivers\\viostor.sys");
    let (first, second) = (moves("Temp\\first"), moves("Temp\\second"));
    let mut guest = guest(Win10, |_| {});
    for (set, filters, file) in [
        (SETS[0], &["gone", "partmgr", "disk"][..], &first),
        (SETS[1], &["partmgr", "GONE"], &second),
    ] {
        let class = format!("{set}\\{DISK_CLASS}");
        let session = format!("{set}\\{SESSION}");
        guest
            .system
            .set(&class, "UpperFilters", multi(filters))
            .set(&session, PENDING, multi(&[file, "", &viostor, ""]));
    }
    let prepared = guest.prepare(&driver_source(), Some(bootstrap(Win10)));
    guest.apply(&prepared, &driver_source());
    for (set, filters, file) in [
        (SETS[0], &["partmgr", "disk"][..], &first),
        (SETS[1], &["partmgr"], &second),
    ] {
        let found = |key: &str, name: &str| guest.system.value(&format!("{set}\\{key}"), name);
        let left = multi(&[file, ""]).to_value();
        assert_eq!(found(SESSION, PENDING), Some(&left), "{set}");
        let left = multi(filters).to_value();
        assert_eq!(found(DISK_CLASS, "UpperFilters"), Some(&left), "{set}");
    }
}

/// A service of another control set is no driver of the Windows that boots.
#[test]
fn a_service_is_there_when_the_control_set_that_boots_has_it() {
    for set in SETS {
        let mut guest = MemoryGuest::of(GuestSpec {
            control_set: 2,
            ..GuestSpec::new(Win10)
        });
        let key = |set: &str| format!("{set}\\Services\\netkvm");
        guest.system.dword(&key(set), "Type", 1).sz(
            &key(set),
            "ImagePath",
            "System32\\drivers\\netkvm.sys",
        );
        let draft = draft(&guest, testing::options(Some(DiskBus::Sata)));
        let edits = draft.actions.iter().filter_map(|action| match action {
            Action::EditHive(edit) => Some(&edit.edits.ops),
            _ => None,
        });
        let mut keys = edits.flatten().map(RegOp::key);
        let written = keys.any(|found| found == key(SETS[1]));
        assert_eq!(written, set == SETS[0], "{set}");
    }
}
