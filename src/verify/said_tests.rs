//! What checks say of a guest: each text with its evidence.

use super::*;

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
        for (control, id) in [(1, "boot-services"), (3, "critical-boot-services")] {
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
