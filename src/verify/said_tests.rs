//! What checks say of a guest: each text with its evidence.

use super::super::{verify_written, walk_all};
use super::*;
use crate::actions::Walked;
use crate::inspect::HiveName;
use crate::registry::walk;

/// The text and the evidence of a check of a sound guest after a change.
fn said(version: WinVersion, id: &str, change: impl FnOnce(&mut MemoryGuest)) -> [String; 2] {
    let mut guest = converted(version);
    change(&mut guest);
    let checks = guest.verify(&WANTED);
    let check = checks.into_iter().find(|check| check.id == id).unwrap();
    [check.message, check.evidence]
}

#[test]
fn a_fault_is_told_once_with_every_controller_that_has_it() {
    let key = format!("{SET}\\Services\\disk");
    let [text, evidence] = said(Win10, "volume-drivers", |g| {
        g.system.dword(&key, "Start", 4);
    });
    assert_eq!(text.matches("disk").count(), 1, "{text}");
    assert_eq!(
        evidence,
        format!("SYSTEM\\{SET}, sata, virtio-blk, virtio-scsi")
    );
    let [text, evidence] = said(Win10, "controller-service", |g| {
        g.system.dword(&service("viostor"), "Start", 3);
    });
    assert!(text.contains("viostor"), "{text}");
    assert_eq!(evidence, format!("SYSTEM\\{SET}, virtio-blk"));
    let [text, _] = said(Win7, "controller-bound", |g| {
        forget_id(g, "ven_1af4&dev_1042")
    });
    assert!(
        text.contains("no driver is bound to PCI\\VEN_1AF4&DEV_1042"),
        "{text}"
    );
}

/// The disk is behind VirtIO; the class of the old controllers is not on the way to it.
#[test]
fn a_dead_filter_of_a_class_that_no_disk_needs_stops_nothing() {
    const HDC: &str = "{4d36e96a-e325-11ce-bfc1-08002be10318}";
    let mut guest = converted(Win10);
    let key = format!("{SET}\\Control\\Class\\{HDC}");
    let names = RegData::MultiSz(vec!["gone".into()]);
    guest.system.set(&key, "UpperFilters", names);
    for (controller, fine) in [(DiskBus::VirtioBlk, true), (DiskBus::Sata, false)] {
        let checks = guest.verify(&[controller]);
        let check = checks.iter().find(|check| check.id == "class-filters");
        assert_eq!(check.unwrap().ok, fine, "{controller:?}");
    }
}

#[test]
fn device_filters_are_told_with_their_device_and_only_dead_ones() {
    let filter = |guest: &mut MemoryGuest, n: usize, name: &str| {
        let names = RegData::MultiSz(vec!["disk".into(), name.into()]);
        let key = format!("{SET}\\Enum\\ROOT\\Device{n}\\0000");
        guest.system.set(&key, "LowerFilters", names);
    };
    let [text, _] = said(Win10, "device-filters", |g| filter(g, 1, "partmgr"));
    assert_eq!(text, "no device filter names a dead service");
    let [text, evidence] = said(Win10, "device-filters", |g| filter(g, 1, "gone"));
    assert!(text.contains("missing or disabled"), "{text}");
    assert_eq!(evidence, "ROOT\\Device1\\0000 LowerFilters: gone");
    // The first ones stand for all.
    let [_, evidence] = said(Win10, "device-filters", |g| {
        for n in 1..=9 {
            let names = RegData::MultiSz(vec!["gone".into()]);
            let key = format!("{SET}\\Enum\\A\\B{n}\\C");
            g.system.set(&key, "LowerFilters", names);
        }
    });
    let devices: Vec<_> = evidence.split("; ").collect();
    assert_eq!(devices.len(), 8, "{evidence}");
    assert_eq!(devices[7], "A\\B8\\C LowerFilters: gone");
    // Both lists of a device, the upper one first.
    let [_, evidence] = said(Win10, "device-filters", |g| {
        filter(g, 1, "gone");
        let key = format!("{SET}\\Enum\\ROOT\\Device1\\0000");
        let names = RegData::MultiSz(vec!["lost".into(), "partmgr".into()]);
        g.system.set(&key, "UpperFilters", names);
    });
    let device = "ROOT\\Device1\\0000";
    assert_eq!(
        evidence,
        format!("{device} UpperFilters: lost; {device} LowerFilters: gone")
    );
    // An override that this Windows uses is as good as the value itself.
    let [_, evidence] = said(Win10, "device-filters", |g| {
        filter(g, 1, "switched");
        let key = service("switched");
        g.system.dword(&key, "Type", 1).dword(&key, "Start", 0);
        g.system.dword(&format!("{key}\\StartOverride"), "0", 4);
    });
    assert_eq!(evidence, "ROOT\\Device1\\0000 LowerFilters: switched");
    // A key without a driver is no service.
    let [_, evidence] = said(Win10, "device-filters", |g| {
        filter(g, 1, "hollow");
        g.system.key_mut(&service("hollow"));
    });
    assert_eq!(evidence, "ROOT\\Device1\\0000 LowerFilters: hollow");
}

#[test]
fn a_device_that_was_here_before_is_told_with_its_state_and_what_that_does() {
    let device = "PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01\\3&1&0&20";
    let key = format!("{SET}\\Enum\\{device}");
    for (service, flags, state) in [
        (Some("other"), 0, ", with the driver other"),
        (None, 0, ", without a driver"),
        (Some("viostor"), 1, " and is switched off"),
    ] {
        let [text, _] = said(Win10, "device-instances", |g| {
            let class = "{4d36e97b-e325-11ce-bfc1-08002be10318}";
            g.system.sz(&key, "ClassGUID", class);
            g.system.dword(&key, "ConfigFlags", flags);
            if let Some(service) = service {
                g.system.sz(&key, "Service", service);
            }
        });
        let wanted = format!(
            "{device} was here before{state}: Windows uses that driver again when it is in the same place"
        );
        assert_eq!(text, wanted);
    }
}

/// A driver of two packages is one driver, however it is spelt; every controller that is wanted is looked at.
#[test]
fn rivals_are_different_drivers_and_are_told_for_each_controller() {
    let configuration = "DriverDatabase\\DriverPackages\\rival\\Configurations\\one";
    let [text, evidence] = said(Win10, "storage-rivals", |g| {
        rival(g);
        g.system.sz(configuration, "Service", "VioStor");
    });
    assert_eq!(
        [text.as_str(), evidence.as_str()],
        ["one driver for each controller", ""]
    );
    // The second form of the device counts as the first does.
    let scsi = "VEN_1AF4&DEV_1004&SUBSYS_00081AF4&REV_00";
    let [_, evidence] = said(Win10, "storage-rivals", |g| {
        rival(g);
        let package = "DriverDatabase\\DriverPackages\\rival2";
        let ids = format!("DriverDatabase\\DeviceIds\\PCI\\{scsi}");
        let data = RegData::Binary(vec![1, 0xff, 0, 0]);
        let file = "DriverDatabase\\DriverInfFiles\\rival2.inf";
        g.system
            .set(&ids, "rival2.inf", data)
            .sz(file, "Active", "rival2")
            .sz(
                &format!("{package}\\Descriptors\\PCI\\{scsi}"),
                "Configuration",
                "two",
            )
            .sz(
                &format!("{package}\\Configurations\\two"),
                "Service",
                "viostor",
            );
    });
    let [blk, other] = evidence.split("; ").collect::<Vec<_>>()[..] else {
        panic!("{evidence}");
    };
    assert_eq!(
        blk,
        "PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01: viostor, vioscsi"
    );
    assert_eq!(other, format!("PCI\\{scsi}: vioscsi, viostor"));
}

/// The limit is for all devices of the hive together.
#[test]
fn too_many_devices_are_not_looked_through() {
    let with = |more: bool| {
        let [found, _] = said(Win10, "device-filters", |g| {
            let tree = g.system.key_mut(&format!("{SET}\\Enum"));
            tree.keys.clear();
            for device in 0..500 {
                let key = tree.key_mut(&format!("B\\D{device}"));
                for instance in 0..100 {
                    key.key_mut(&instance.to_string());
                }
            }
            if more {
                tree.key_mut("B\\D9\\last");
            }
        });
        found
    };
    assert_eq!(with(false), "no device filter names a dead service");
    assert_eq!(with(true), "could not be checked: too many devices");
}

#[test]
fn a_hive_without_services_or_devices_is_told_apart_from_a_sound_one() {
    let without = |id: &str, key: &str| {
        said(Win10, id, |g| {
            g.system.remove(&format!("{SET}\\{key}"));
            g.system.key_mut(SET);
        })[0]
            .clone()
    };
    let none = format!("could not be checked: no {SET}\\Services");
    assert_eq!(without("boot-services", "Services"), none);
    assert_eq!(without("critical-boot-services", "Services"), none);
    assert_eq!(without("device-filters", "Enum"), "there are no devices");
}

/// The drivers of every boot have their own checks, by the generation of Windows.
#[test]
fn a_fault_is_told_in_the_check_of_its_driver() {
    use WinVersion::Xp;
    type Change = fn(&mut MemoryGuest);
    let late: Change = |g| {
        g.system.dword(&service("ftdisk"), "Start", 3);
    };
    for (version, wanted, id, change, text) in [
        (
            Xp,
            DiskBus::Ide,
            "volume-drivers",
            late,
            "ftdisk does not start at boot (Start=3)",
        ),
        // Windows 10 has no such driver.
        (
            Win10,
            DiskBus::Sata,
            "volume-drivers",
            late,
            "the disk and volume drivers start at boot",
        ),
        (
            Win10,
            DiskBus::Sata,
            "bus-drivers",
            |g| g.without("pci.sys"),
            "pci: \\Windows\\System32\\drivers\\pci.sys is missing",
        ),
        (
            Win10,
            DiskBus::Sata,
            "bus-drivers",
            |g| *g.file("ACPI.sys") = b"MZ".to_vec(),
            "acpi: \\Windows\\System32\\drivers\\ACPI.sys is not a usable driver file",
        ),
        (
            Win10,
            DiskBus::VirtioBlk,
            "controller-image",
            |g| {
                g.system
                    .sz(&service("viostor"), "ImagePath", "..\\viostor.sys");
            },
            "viostor: its file is not a usable driver file",
        ),
        (
            Win10,
            DiskBus::VirtioBlk,
            "controller-image",
            |g| {
                let list = ["\\??\\C:\\Windows\\System32\\drivers\\viostor.sys", ""];
                g.system.set(
                    &format!("{SET}\\Control\\Session Manager"),
                    "PendingFileRenameOperations",
                    RegData::MultiSz(list.map(str::to_string).to_vec()),
                );
            },
            "viostor: Windows deletes \\Windows\\System32\\drivers\\viostor.sys at its next start",
        ),
        (
            Win10,
            DiskBus::VirtioBlk,
            "controller-service",
            |g| {
                let key = format!("{}\\StartOverride", service("viostor"));
                g.system.dword(&key, "0", 4);
            },
            "viostor does not start at boot (Start=0, StartOverride=4)",
        ),
        // A class without a device on the way to this disk.
        (
            Win10,
            DiskBus::VirtioBlk,
            "idle-settings",
            |g| {
                let key =
                    format!("{SET}\\Control\\Class\\{{4d36e96a-e325-11ce-bfc1-08002be10318}}");
                let names = RegData::MultiSz(vec!["gone".into()]);
                g.system.set(&key, "LowerFilters", names);
            },
            "LowerFilters of the class hdc names gone, which is missing or disabled: devices of that class do not start",
        ),
        (
            Xp,
            DiskBus::Ide,
            "idle-settings",
            |g| {
                let key = format!("{}\\StartOverride", service("disk"));
                g.system.dword(&key, "0", 3);
            },
            "disk has StartOverride=3, which this Windows ignores",
        ),
        // The processor of this Windows stands beside that of the file.
        (
            Xp,
            DiskBus::Ide,
            "kernel-files",
            |g| *g.file("hal.dll") = pe::image(Arch::Amd64, Subsystem::Native),
            "the kernel: HAL.dll, which \\WINDOWS\\System32\\ntoskrnl.exe imports from, is for x86_64 (\\WINDOWS\\System32\\HAL.dll), Windows is x86",
        ),
    ] {
        let mut guest = converted(version);
        change(&mut guest);
        let checks = guest.verify(&[wanted]);
        let check = checks.iter().find(|check| check.id == id).unwrap();
        assert_eq!(check.message, text, "{version:?} {id}");
    }
}

#[test]
fn rivals_and_boot_services_are_told_by_name_and_number() {
    let [text, evidence] = said(Win10, "storage-rivals", rival);
    assert!(text.starts_with("several boot-start drivers"), "{text}");
    let named = evidence.contains("viostor") && evidence.contains("vioscsi");
    assert!(
        evidence.starts_with("PCI\\VEN_1AF4&DEV_1042") && named,
        "{evidence}"
    );
    let sound = |id: &str| said(Win10, id, |_| {})[0].clone();
    let number = |text: &str| text.split(' ').next().unwrap().parse::<usize>().unwrap();
    let [more, _] = said(Win10, "boot-services", |g| {
        let key = service("another");
        for (name, value) in [("Start", 0), ("Type", 1), ("ErrorControl", 1)] {
            g.system.dword(&key, name, value);
        }
        g.system
            .sz(&key, "ImagePath", "System32\\drivers\\disk.sys");
    });
    assert_eq!(number(&more), number(&sound("boot-services")) + 1);
    // Each of them is of one kind or the other.
    let [none, one, two] = [&[][..], &["disk"], &["disk", "volmgr"]].map(|critical| {
        let [text, _] = said(Win10, "critical-boot-services", |g| {
            let services = format!("{SET}\\Services");
            for service in g.system.key_mut(&services).keys.values_mut() {
                let is_critical = critical
                    .iter()
                    .any(|c| c.eq_ignore_ascii_case(&service.name));
                service.dword("", "ErrorControl", if is_critical { 3 } else { 1 });
            }
        });
        text
    });
    assert_eq!(none, "0 boot-start drivers are there");
    assert_eq!(one, "1 boot-start driver is there");
    assert_eq!(two, "2 boot-start drivers are there");
    for (id, text) in [
        ("firmware", "uefi"),
        ("boot-manager", "the boot manager is there"),
        ("uefi-fallback", "the fall-back loader is Windows' own"),
        ("storage-rivals", "one driver for each controller"),
    ] {
        assert_eq!(sound(id), text, "{id}");
    }
    let [text, _] = said(Win7, "uefi-fallback", |_| {});
    assert_eq!(text, "not needed: BIOS");
}

/// Windows loads file systems at boot as it loads drivers, and nothing else.
#[test]
fn a_boot_start_driver_is_a_kernel_driver_or_a_file_system_that_starts_at_boot() {
    let sound = said(Win10, "boot-services", |_| {});
    let critical = said(Win10, "critical-boot-services", |_| {});
    for (kind, start, over, counted) in [
        (1, 0, None, true),
        (2, 0, None, true),
        (2, 0, Some(0), true),
        (4, 0, None, false),
        (8, 0, None, false),
        (16, 0, None, false),
        (32, 0, None, false),
        (1, 1, None, false),
        (2, 1, None, false),
        (2, 3, Some(0), false),
        (2, 0, Some(3), false),
        (2, 4, None, false),
    ] {
        let ids = [(1, "boot-services"), (3, "critical-boot-services")];
        // What is not counted is so for both.
        for (control, id) in ids.into_iter().take(if counted { 2 } else { 1 }) {
            let checks = |id: &str| {
                said(Win10, id, |g| {
                    missing_driver(g, control);
                    let key = service("gone");
                    g.system.dword(&key, "Type", kind);
                    g.system.dword(&key, "Start", start);
                    if let Some(over) = over {
                        let key = format!("{key}\\StartOverride");
                        g.system.dword(&key, "0", over);
                    }
                })
            };
            let at = format!("{kind} {start} {over:?} {control}");
            let (found, before) = match control {
                3 => (checks(id), &critical),
                _ => (checks(id), &sound),
            };
            if !counted {
                assert_eq!(found, *before, "{at}");
                continue;
            }
            let does = match control {
                3 => "stops at drivers it cannot load",
                _ => "passes over drivers it cannot load",
            };
            let wanted = [
                format!("the boot loader {does}: gone (file missing)"),
                format!("SYSTEM\\{SET}\\Services"),
            ];
            assert_eq!(found, wanted, "{at}");
        }
    }
}

#[test]
fn what_is_wrong_with_the_file_of_a_boot_start_driver_is_told() {
    let file = "\\Windows\\System32\\drivers\\gone.sys";
    let usable = || pe::image(Arch::Amd64, Subsystem::Native);
    for (path, contents, what) in [
        ("System32\\drivers\\gone.sys", None, Some("file missing")),
        (
            "System32\\drivers\\gone.sys",
            Some(b"MZ".to_vec()),
            Some("not a driver file"),
        ),
        (
            "System32\\drivers\\gone.sys",
            Some(pe::image(Arch::X86, Subsystem::Native)),
            Some("other processor"),
        ),
        ("System32\\drivers\\gone.sys", Some(usable()), None),
        (
            "\\SystemRoot\\System32\\drivers\\gone.sys",
            Some(usable()),
            None,
        ),
        (
            "1:\\Windows\\gone.sys",
            Some(usable()),
            Some("bad ImagePath"),
        ),
    ] {
        let [text, _] = said(Win10, "boot-services", |g| {
            missing_driver(g, 0);
            g.system.sz(&service("gone"), "ImagePath", path);
            g.files.extend(contents.clone().map(|contents| GuestFile {
                role: Role::Windows,
                path: GuestPath::parse(file).unwrap(),
                contents,
            }));
        });
        let wanted = what.map(|what| format!("gone ({what})"));
        let found = text
            .split_once("cannot load: ")
            .map(|(_, list)| list.to_owned());
        assert_eq!(found, wanted, "{path} {text}");
    }
    let [text, _] = said(Win10, "boot-services", |g| {
        for name in ["gone", "lost"] {
            for (value, number) in [("Start", 0), ("Type", 2), ("ErrorControl", 1)] {
                g.system.dword(&service(name), value, number);
            }
        }
    });
    assert!(
        text.ends_with("cannot load: gone (file missing), lost (file missing)"),
        "{text}"
    );
}

/// A file system starts at boot as a driver does.
#[test]
fn only_drivers_that_both_start_at_boot_compete() {
    for (kind, start, compete) in [(1, 0, true), (2, 0, true), (16, 0, false), (1, 3, false)] {
        let [_, evidence] = said(Win10, "storage-rivals", |g| {
            rival(g);
            g.system.dword(&service("vioscsi"), "Type", kind);
            g.system.dword(&service("vioscsi"), "Start", start);
        });
        assert_eq!(
            evidence.contains("vioscsi"),
            compete,
            "{kind} {start}: {evidence}"
        );
    }
}

/// Of every guest with a fault: what each check that fails says, with its evidence.
#[test]
fn every_fault_of_the_table_is_told_as_written() {
    let mut text = String::new();
    let sound = [Win7, Win10].map(|version| (version, converted(version)));
    for (i, row) in ROWS.iter().enumerate() {
        let (_, guest) = sound.iter().find(|(v, _)| *v == row.version).unwrap();
        let mut guest = guest.clone();
        (row.change)(&mut guest);
        text += &format!("{i} {}\n", row.faults[0]);
        for check in guest.verify(&WANTED).iter().filter(|check| !check.ok) {
            text += &format!(
                "  {} {:?} {:?} {:?}\n    {}\n    {}\n",
                check.id,
                check.severity,
                check.state,
                check.findings,
                check.message,
                check.evidence
            );
        }
    }
    insta::assert_snapshot!("faults", text);
}

/// Every check of a sound guest, whatever its firmware and registry.
#[test]
fn every_check_of_a_sound_guest_is_told_as_written() {
    let mut text = String::new();
    for version in [WinVersion::Xp, Win7, Win10] {
        for wanted in [&WANTED[..], &WANTED[..1]] {
            text += &format!("{version:?} {wanted:?}\n");
            for check in converted(version).verify(wanted) {
                text += &format!(
                    "  {} {:?} {:?}\n    {}\n    {}\n",
                    check.id, check.severity, check.state, check.message, check.evidence
                );
            }
        }
    }
    insta::assert_snapshot!("sound", text);
}

/// The walk before a hive was written counts for the same bytes read back.
#[test]
fn a_hive_that_was_not_sound_when_it_was_written_is_not_sound() {
    converted(Win10).look(&[], |guest, survey| {
        let hives = survey.hives.as_ref().unwrap();
        let written = |hive| Walked {
            hive,
            bytes: Arc::clone(&hives.get(hive).unwrap().bytes),
            walk: Err(walk::CellFault {
                offset: 4096,
                structure: "cell",
                expected: "a cell".into(),
                actual: "none".into(),
            }),
        };
        for (hive, id) in [
            (HiveName::System, "system-hive-sound"),
            (HiveName::Software, "software-hive-sound"),
            (HiveName::Drivers, "drivers-hive-sound"),
            (HiveName::Bcd, "bcd-hive-sound"),
        ] {
            let checks = verify_written(survey, &[written(hive)], guest, &WANTED);
            let bad: Vec<_> = checks.iter().filter(|c| !c.ok).map(|c| c.id).collect();
            assert_eq!(bad, [id]);
            let before = [(hive, written(hive).walk)].into_iter();
            let walks = before.chain(
                walk_all(hives)
                    .into_iter()
                    .filter(|(other, _)| *other != hive),
            );
            let checks = predict(survey, walks.collect(), guest, &WANTED);
            let bad: Vec<_> = checks.iter().filter(|c| !c.ok).map(|c| c.id).collect();
            assert_eq!(bad, [id]);
        }
    });
}

/// Several findings of one check are one fault, in the order in which they were found.
#[test]
fn findings_of_one_check_are_told_together_and_those_of_others_are_not() {
    converted(Win10).look(&[], |guest, survey| {
        let mut survey = survey.clone();
        for (id, text) in [
            ("boot-sector-heads", "heads"),
            ("uefi-fallback", "loader"),
            ("boot-sector-hidden", "hidden"),
        ] {
            survey.inspection.findings.push(Finding {
                id,
                severity: Severity::Warning,
                message: format!("m {text}"),
                remedy: "r".into(),
                evidence: format!("e {text}"),
            });
        }
        let checks = verify(&survey, guest, &WANTED);
        let check = checks.iter().find(|c| c.id == "boot-sector").unwrap();
        assert_eq!(
            (check.message.as_str(), check.evidence.as_str()),
            ("m heads; m hidden", "e heads; e hidden")
        );
        assert_eq!(check.findings, ["boot-sector-heads", "boot-sector-hidden"]);
    });
}

/// The base block of each hive tells it, and one that cannot be read tells nothing better.
#[test]
fn every_hive_that_was_not_closed_cleanly_is_named_with_its_path() {
    type Change = fn(&mut Vec<u8>);
    let changes: [Change; 2] = [|bytes| dirty(bytes), |bytes| bytes.truncate(100)];
    converted(Win10).look(&[], |guest, survey| {
        let walks = || walk_all(survey.hives.as_ref().unwrap());
        for (i, change) in changes.into_iter().enumerate() {
            for hive in ["SYSTEM", "SOFTWARE", "DRIVERS", "BCD"] {
                let mut survey = survey.clone();
                let hives = survey.hives.as_mut().unwrap();
                let loaded = match hive {
                    "SYSTEM" => &mut hives.system,
                    "SOFTWARE" => &mut hives.software,
                    "DRIVERS" => hives.drivers.as_mut().unwrap(),
                    _ => hives.bcd.as_mut().unwrap(),
                };
                let mut bytes = loaded.bytes.to_vec();
                change(&mut bytes);
                loaded.bytes = Arc::new(bytes.into());
                let path = loaded.path.to_string();
                assert!(path.ends_with(hive), "{path}");
                let checks = predict(&survey, walks(), guest, &WANTED);
                let check = checks.iter().find(|c| c.id == "hives-clean").unwrap();
                let found = (check.state, check.evidence.as_str());
                assert_eq!(found, (CheckState::Fault, path.as_str()), "{i}");
            }
        }
    });
}
