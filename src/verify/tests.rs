//! A guest in memory for each check to fail, and the other checks that may fail with it.

use std::sync::Arc;

use crate::actions::{Action, Converted};
use crate::check::{Check, CheckState, is_ready};
use crate::convert::prepare::Prepared;
use crate::demo::guest::GuestFile;
use crate::demo::pe::{self, Subsystem};
use crate::demo::{Arch, GuestSpec, Role, WinVersion, hives};
use crate::disk::layout::Scheme;
use crate::drivers::driver_source::Memory;
use crate::guest::GuestPath;
use crate::inspect::{Finding, Severity, Survey};
use crate::registry::{RegData, base};
use crate::testing::{MemoryGuest, bootstrap, driver_source};
use crate::types::DiskBus;

use super::{CHECKS, Outcome, hives::Walks, planned, predict, result, verify};

const SET: &str = "ControlSet001";
const DISK_CLASS: &str = "{4d36e967-e325-11ce-bfc1-08002be10318}";
const WANTED: [DiskBus; 3] = [DiskBus::Sata, DiskBus::VirtioBlk, DiskBus::VirtioScsi];

/// Checks that need the sectors of a disk; `src/inspect/boot_sector.rs` has the cases.
const NEEDS_SECTORS: [&str; 1] = ["boot-sector"];

struct Row {
    version: WinVersion,
    /// The expected faults, the subject of the row first.
    faults: &'static [&'static str],
    change: fn(&mut MemoryGuest),
}

fn service(name: &str) -> String {
    format!("{SET}\\Services\\{name}")
}

/// Gives the key of that name a list of subkeys outside of the hive.
fn damage(bytes: &mut [u8], name: &str) {
    let at = bytes
        .windows(name.len())
        .rposition(|w| w == name.as_bytes());
    let key = at.unwrap() - 0x4c;
    assert_eq!(bytes[key..key + 2], *b"nk");
    bytes[key + 20..key + 24].copy_from_slice(&9u32.to_le_bytes());
    bytes[key + 28..key + 32].copy_from_slice(&0x7fff_fff0u32.to_le_bytes());
}

/// Leaves the hive in the state after a power cut in the middle of a write.
fn dirty(bytes: &mut [u8]) {
    bytes[4] ^= 1;
    base::update_checksum(bytes).unwrap();
}

/// Adds a boot-start driver whose file is missing.
fn missing_driver(guest: &mut MemoryGuest, error_control: u32) {
    let key = service("gone");
    guest.system.dword(&key, "Start", 0);
    guest.system.dword(&key, "Type", 1);
    guest.system.dword(&key, "ErrorControl", error_control);
    guest
        .system
        .sz(&key, "ImagePath", "System32\\drivers\\gone.sys");
}

fn dead_filter(guest: &mut MemoryGuest) {
    let key = format!("{SET}\\Control\\Class\\{DISK_CLASS}");
    let names = RegData::MultiSz(vec!["gone".into()]);
    guest.system.set(&key, "UpperFilters", names);
}

fn forget_id(guest: &mut MemoryGuest, id: &str) {
    let key = format!("{SET}\\Control\\CriticalDeviceDatabase");
    let entries = &mut guest.system.key_mut(&key).keys;
    entries.retain(|name, _| !name.to_lowercase().contains(id));
}

/// Binds vioscsi to a device of viostor by a second package of a lower rank.
fn rival(guest: &mut MemoryGuest) {
    let ids = "DriverDatabase\\DeviceIds\\PCI";
    let known = &guest.system.get(ids).unwrap().keys;
    let id = known
        .keys()
        .find(|id| id.to_uppercase() == "VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01");
    let id = id.unwrap().clone();
    let data = RegData::Binary(vec![1, 0xff, 0, 0]);
    guest.system.set(&format!("{ids}\\{id}"), "rival.inf", data);
    let file = "DriverDatabase\\DriverInfFiles\\rival.inf";
    guest.system.sz(file, "Active", "rival");
    let package = "DriverDatabase\\DriverPackages\\rival";
    let descriptor = format!("{package}\\Descriptors\\PCI\\{id}");
    guest.system.sz(&descriptor, "Configuration", "one");
    let configuration = format!("{package}\\Configurations\\one");
    guest.system.sz(&configuration, "Service", "vioscsi");
}

use WinVersion::{Win7, Win10};

const ROWS: &[Row] = &[
    Row {
        version: Win10,
        faults: &["boot-manager", "no-blockers"],
        change: |g| g.without("bootmgfw.efi"),
    },
    Row {
        version: Win10,
        faults: &["uefi-fallback"],
        change: |g| g.without("bootx64.efi"),
    },
    Row {
        version: Win7,
        faults: &["partition-table", "boot-manager", "no-blockers"],
        change: |g| {
            g.layout
                .partitions
                .iter_mut()
                .for_each(|p| p.active = false)
        },
    },
    Row {
        version: Win10,
        faults: &["bcd", "no-blockers"],
        change: |g| g.without("bcd"),
    },
    Row {
        version: Win10,
        faults: &["volume-clean"],
        change: |g| g.volume = Some(|volume| volume.state.dirty = true),
    },
    Row {
        version: Win10,
        faults: &["system-hive-sound"],
        change: |g| {
            g.system.key_mut("Unread");
            g.damage = Some(|bytes| damage(bytes, "Unread"));
        },
    },
    Row {
        version: Win10,
        faults: &["software-hive-sound"],
        change: |g| {
            let mut software = hives::software_tree(&g.spec);
            software.key_mut("Unread");
            *g.file("SOFTWARE") = software.to_bytes("SOFTWARE");
            damage(g.file("SOFTWARE"), "Unread");
        },
    },
    Row {
        version: Win10,
        faults: &["drivers-hive-sound"],
        change: |g| damage(g.file("DRIVERS"), "DeviceIds"),
    },
    Row {
        version: Win10,
        faults: &["bcd-hive-sound"],
        change: |g| damage(g.file("BCD"), "Description"),
    },
    Row {
        version: Win10,
        faults: &["control-sets", "no-blockers"],
        change: |g| {
            g.system.dword("Select", "Default", 7);
        },
    },
    Row {
        version: Win7,
        faults: &["controller-bound", "boot-path"],
        change: |g| forget_id(g, "ven_1af4&dev_1042"),
    },
    Row {
        version: Win7,
        faults: &["transitional-ids"],
        change: |g| forget_id(g, "ven_1af4&dev_1001"),
    },
    Row {
        version: Win10,
        faults: &["controller-service", "boot-path"],
        change: |g| {
            g.system.dword(&service("viostor"), "Start", 3);
        },
    },
    Row {
        version: Win10,
        faults: &["controller-image", "boot-path", "boot-services"],
        change: |g| g.without("vioscsi.sys"),
    },
    Row {
        version: Win10,
        faults: &["bus-drivers", "boot-path"],
        change: |g| {
            g.system.dword(&service("pci"), "Start", 3);
        },
    },
    Row {
        version: Win10,
        faults: &["volume-drivers", "boot-path"],
        change: |g| {
            g.system.dword(&service("volmgr"), "Start", 4);
        },
    },
    Row {
        version: Win10,
        faults: &["volume-drivers", "boot-path", "critical-boot-services"],
        change: |g| g.without("partmgr.sys"),
    },
    Row {
        version: Win10,
        faults: &["kernel-files", "boot-path"],
        change: |g| g.without("ntfs.sys"),
    },
    Row {
        version: Win10,
        faults: &["class-filters", "boot-path"],
        change: dead_filter,
    },
    Row {
        version: Win10,
        faults: &["idle-settings"],
        change: |g| {
            let path = "\\??\\C:\\Windows\\System32\\drivers\\disk.sys";
            g.system.sz(&service("disk"), "ImagePath", path);
        },
    },
    Row {
        version: Win10,
        faults: &["device-instances"],
        change: |g| {
            let key =
                format!("{SET}\\Enum\\PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01\\3&1&0&20");
            g.system
                .sz(&key, "ClassGUID", "{4d36e97b-e325-11ce-bfc1-08002be10318}");
            g.system.sz(&key, "Service", "other");
        },
    },
    Row {
        version: Win10,
        faults: &["device-filters"],
        change: |g| {
            let key = format!("{SET}\\Enum\\STORAGE\\Volume\\1");
            let names = RegData::MultiSz(vec!["gone".into()]);
            g.system.set(&key, "LowerFilters", names);
        },
    },
    Row {
        version: Win10,
        faults: &["device-filters"],
        change: |g| {
            g.system.dword(&service("off"), "Type", 1);
            g.system.dword(&service("off"), "Start", 4);
            let key = format!("{SET}\\Enum\\STORAGE\\Volume\\1");
            let names = RegData::MultiSz(vec!["off".into()]);
            g.system.set(&key, "UpperFilters", names);
        },
    },
    Row {
        version: Win10,
        faults: &["boot-services"],
        change: |g| {
            missing_driver(g, 1);
            g.files.push(GuestFile {
                role: Role::Windows,
                path: GuestPath::parse("\\Windows\\System32\\drivers\\gone.sys").unwrap(),
                contents: pe::image(Arch::X86, Subsystem::Native),
            });
        },
    },
    Row {
        version: Win10,
        faults: &["critical-boot-services"],
        change: |g| missing_driver(g, 3),
    },
    Row {
        version: Win10,
        faults: &["boot-services"],
        change: |g| missing_driver(g, 1),
    },
    // Severe is not critical: the loader skips it.
    Row {
        version: Win10,
        faults: &["boot-services"],
        change: |g| missing_driver(g, 2),
    },
    Row {
        version: Win10,
        faults: &["volume-clean"],
        change: |g| {
            g.survey = Some(|survey| {
                survey.inspection.findings.push(Finding {
                    id: "volume-dirty-forced",
                    severity: Severity::Warning,
                    message: "m".into(),
                    remedy: "r".into(),
                    evidence: "e".into(),
                })
            });
        },
    },
    Row {
        version: Win10,
        faults: &["storage-rivals"],
        change: rival,
    },
    // One that does not start at boot is none.
    Row {
        version: Win10,
        faults: &["controller-service", "boot-path"],
        change: |g| {
            rival(g);
            g.system.dword(&service("vioscsi"), "Start", 3);
        },
    },
    // What a driver imports is as good as a part of it.
    Row {
        version: Win10,
        faults: &["controller-image", "boot-path"],
        change: |g| {
            *g.file("viostor.sys") = pe::importing(Arch::Amd64, Subsystem::Native, &["gone.sys"]);
        },
    },
    Row {
        version: Win10,
        faults: &["kernel-files", "boot-path"],
        change: |g| {
            *g.file("ntfs.sys") = pe::importing(Arch::Amd64, Subsystem::Native, &["gone.sys"]);
        },
    },
    Row {
        version: Win10,
        faults: &["hives-clean"],
        change: |g| {
            g.survey = Some(|survey| {
                let hives = survey.hives.as_mut().unwrap();
                hives.drivers.as_mut().unwrap().replayed = true;
            });
        },
    },
    Row {
        version: Win10,
        faults: &["hives-clean"],
        change: |g| {
            g.survey = Some(|survey| {
                let hives = survey.hives.as_mut().unwrap();
                hives.bcd.as_mut().unwrap().replayed = true;
            });
        },
    },
    Row {
        version: Win10,
        faults: &["firmware", "boot-manager", "no-blockers"],
        change: |g| {
            g.layout.scheme = Scheme::None;
            g.without("bootmgfw.efi");
        },
    },
    Row {
        version: Win10,
        faults: &["windows-found", "no-blockers"],
        change: |g| g.damage = Some(Vec::clear),
    },
    Row {
        version: Win10,
        faults: &["logs-harmless", "hives-clean"],
        change: |g| g.damage = Some(|bytes| dirty(bytes)),
    },
    Row {
        version: Win10,
        faults: &["hives-clean"],
        change: |g| {
            g.survey = Some(|survey| survey.hives.as_mut().unwrap().software.replayed = true);
        },
    },
];

/// The table of identifiers states what is at stake. A disk is not ready if Windows may not start
/// from it or data is lost, and only then. How bad the boot configuration is its findings say.
#[test]
fn a_check_is_a_blocker_when_something_is_at_stake() {
    for def in &CHECKS {
        let entry = crate::ids::find(def.id).unwrap();
        let at_stake = entry.stake != crate::ids::Stake::Nothing;
        let blocker = def.severity == Severity::Blocker;
        assert_eq!(blocker || def.id == "bcd", at_stake, "{}", def.id);
    }
}

fn converted(version: WinVersion) -> MemoryGuest {
    let mut guest = MemoryGuest::of(GuestSpec::new(version));
    let driver_source = driver_source();
    let prepared = guest.prepare(&driver_source, Some(bootstrap(version)));
    guest.apply(&prepared, &driver_source);
    guest
}

#[test]
fn each_check_fails_on_a_guest_with_that_fault() {
    let (mut seen, mut wrong) = (Vec::new(), Vec::new());
    let sound = [Win7, Win10].map(|version| (version, converted(version)));
    for (version, guest) in &sound {
        let checks = guest.verify(&WANTED);
        let bad: Vec<_> = checks.iter().filter(|c| !c.ok).collect();
        assert!(bad.is_empty(), "{version:?} {bad:?}");
    }
    for row in ROWS {
        let (_, guest) = sound.iter().find(|(v, _)| *v == row.version).unwrap();
        let mut guest = guest.clone();
        (row.change)(&mut guest);
        let checks = guest.verify(&WANTED);
        let mut bad: Vec<_> = checks
            .iter()
            .filter(|c| c.state == CheckState::Fault)
            .map(|c| c.id)
            .collect();
        let mut want = row.faults.to_vec();
        bad.sort_unstable();
        want.sort_unstable();
        if bad != want {
            wrong.push(format!("{want:?} wanted, not {bad:?}"));
        }
        let blocks = checks
            .iter()
            .any(|c| !c.ok && c.severity == crate::inspect::Severity::Blocker);
        assert_eq!(is_ready(&checks), !blocks, "{:?}", row.faults);
        seen.extend(row.faults);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let missing: Vec<_> = CHECKS
        .iter()
        .map(|def| def.id)
        .filter(|id| !seen.contains(id) && !NEEDS_SECTORS.contains(id))
        .collect();
    assert!(missing.is_empty(), "no guest fails {missing:?}");
}

#[test]
fn a_check_that_could_not_run_is_not_passed() {
    let check = |state| Check::new("x", Severity::Blocker, state, "");
    for (state, ready) in [
        (CheckState::Ok, true),
        (CheckState::Fault, false),
        (CheckState::CouldNotRun, false),
    ] {
        assert_eq!(is_ready(&[check(state)]), ready, "{state:?}");
    }
}

/// A finding that stops a conversion makes the disk not ready, whatever check reports it. The
/// exception is the state of the volume, which the fix itself decides about.
#[test]
fn a_check_is_as_severe_as_what_inspection_found() {
    let severity = |id: &str, found| {
        let def = CHECKS.iter().find(|def| def.id == id).unwrap();
        let [last, first] = [[Severity::Info, found], [found, Severity::Info]].map(|severities| {
            let outcome = Outcome::Found {
                message: "m\u{1b}[1m".into(),
                evidence: "e\u{7}\u{202e}".into(),
                findings: ["first", "second"].into_iter().zip(severities).collect(),
            };
            let check = result(def, outcome);
            assert_eq!(check.state, CheckState::Fault);
            assert_eq!(check.findings, ["first", "second"]);
            // The guest has written parts of both.
            let texts = [&check.message, &check.evidence];
            assert!(
                !texts
                    .iter()
                    .any(|text| text.contains(['\u{1b}', '\u{7}', '\u{202e}'])),
                "{check:?}"
            );
            check.severity
        });
        assert_eq!(last, first, "{id}");
        last
    };
    assert_eq!(severity("bcd", Severity::Blocker), Severity::Blocker);
    assert_eq!(severity("bcd", Severity::Info), Severity::Warning);
    assert_eq!(
        severity("volume-clean", Severity::Blocker),
        Severity::Warning
    );
    assert_eq!(
        severity("transitional-ids", Severity::Blocker),
        Severity::Info
    );
    for def in &CHECKS {
        let check = result(def, Outcome::CouldNotRun("why".into()));
        assert_eq!(
            (check.state, check.ok),
            (CheckState::CouldNotRun, false),
            "{}",
            def.id
        );
        assert_eq!(check.message, "could not be checked: why");
    }
}

/// The two checks that compare a guest with its plan.
fn compared(guest: &MemoryGuest, prepared: &Prepared, driver_source: &Memory) -> Vec<Check> {
    let driver_source = prepared.basis.driver_source(driver_source);
    let volume = prepared.basis.windows.system_volume;
    guest.look(&[], |read, survey| {
        let converted = Converted {
            volume,
            guest: read,
            hives: survey.hives.as_ref().unwrap(),
            driver_source: &driver_source,
        };
        planned(&prepared.plan.actions, Some(&converted))
    })
}

#[test]
fn what_is_not_as_planned_is_a_fault() {
    let driver_source = driver_source();
    let mut guest = MemoryGuest::of(GuestSpec::new(Win7));
    let prepared = guest.prepare(&driver_source, Some(bootstrap(Win7)));
    guest.apply(&prepared, &driver_source);
    let checks = |change: fn(&mut MemoryGuest)| {
        let mut changed = guest.clone();
        change(&mut changed);
        compared(&changed, &prepared, &driver_source)
    };
    let states = |change: fn(&mut MemoryGuest)| {
        let checks = checks(change);
        let [files, registry] = &checks[..] else {
            panic!("{checks:?}");
        };
        [files.state, registry.state]
    };
    let (ok, fault) = (CheckState::Ok, CheckState::Fault);
    assert_eq!(states(|_| {}), [ok, ok]);
    assert_eq!(states(|g| g.file("viostor.sys")[9] ^= 1), [fault, ok]);
    assert_eq!(states(|g| g.file("viostor.sys").push(0)), [fault, ok]);
    assert_eq!(states(|g| g.without("viostor.sys")), [fault, ok]);
    let start = |g: &mut MemoryGuest| {
        g.system.dword(&service("viostor"), "Start", 3);
    };
    assert_eq!(states(start), [ok, fault]);
    // How much was compared, and the first difference.
    let actions = &prepared.plan.actions;
    let count = |part: fn(&Action) -> usize| actions.iter().map(part).sum::<usize>();
    let files = count(|action| match action {
        Action::CopyFiles(copy) => copy.files.len(),
        Action::CopyInGuest(_) => 1,
        _ => 0,
    });
    let edits = count(|action| match action {
        Action::EditHive(edit) => edit.edits.ops.len(),
        _ => 0,
    });
    assert!(files > 1 && edits > 1);
    let said = |checks: Vec<Check>| -> Vec<_> {
        let told = |c: Check| (c.id, c.severity, c.message);
        checks.into_iter().map(told).collect()
    };
    let blocker = |id, text: String| (id, Severity::Blocker, text);
    let files = blocker(
        "files-as-planned",
        format!("{files} files read back identical"),
    );
    let edits = blocker(
        "registry-as-planned",
        format!("{edits} registry edits read back"),
    );
    assert_eq!(said(checks(|_| {})), [files.clone(), edits]);
    let told = said(checks(start));
    assert_eq!(told[0], files);
    assert!(told[1].2.ends_with("viostor is not as planned"), "{told:?}");
    let told = said(checks(|g| g.file("viostor.sys")[9] ^= 1));
    assert!(told[0].2.contains("viostor.sys differs from "), "{told:?}");
}

/// The states of the checks of a sound guest after a change of the survey.
fn states(change: fn(&mut Survey), walked: bool) -> impl Fn(&str) -> CheckState {
    let checks = converted(Win10).look(&[], |guest, survey| {
        let mut survey = survey.clone();
        change(&mut survey);
        match walked {
            true => verify(&survey, guest, &WANTED),
            false => predict(&survey, Walks::new(), guest, &WANTED),
        }
    });
    assert!(!is_ready(&checks));
    move |id| checks.iter().find(|c| c.id == id).unwrap().state
}

#[test]
fn what_was_not_read_is_not_passed() {
    let unwalked = states(|_| {}, false);
    for hive in ["system", "software", "drivers", "bcd"] {
        let id = format!("{hive}-hive-sound");
        assert_eq!(unwalked(&id), CheckState::CouldNotRun, "{id}");
    }
    let unreadable = states(
        |survey| survey.hives.as_mut().unwrap().system.bytes = Arc::new(Vec::new().into()),
        true,
    );
    for id in [
        "device-filters",
        "critical-boot-services",
        "boot-services",
        "storage-rivals",
    ] {
        assert_eq!(unreadable(id), CheckState::CouldNotRun, "{id}");
    }
    assert_eq!(unreadable("system-hive-sound"), CheckState::Fault);
}

#[test]
fn a_controller_that_was_not_evaluated_is_not_ready() {
    let one = states(
        |survey| drop(survey.inspection.controllers.remove(&DiskBus::VirtioScsi)),
        true,
    );
    let none = states(|survey| survey.inspection.controllers.clear(), true);
    assert_eq!(one("boot-path"), CheckState::Fault);
    assert_eq!(none("boot-path"), CheckState::CouldNotRun);
    for id in [
        "controller-bound",
        "controller-service",
        "controller-image",
        "bus-drivers",
        "volume-drivers",
        "kernel-files",
        "class-filters",
    ] {
        assert_eq!(one(id), CheckState::CouldNotRun, "{id}");
        assert_eq!(none(id), CheckState::CouldNotRun, "{id}");
    }
}

#[test]
fn without_hives_nothing_is_as_planned() {
    let guest = MemoryGuest::of(GuestSpec::new(Win7));
    let prepared = guest.prepare(&driver_source(), Some(bootstrap(Win7)));
    for actions in [&prepared.plan.actions[..], &[]] {
        let checks = planned(actions, None);
        let bad = checks.iter().all(|c| c.state == CheckState::Fault);
        assert!(checks.len() == 2 && bad, "{checks:?}");
        assert!(!is_ready(&checks));
    }
}

/// A finding of inspection about booting fails a check, so that neither the report nor `verify` passes it.
#[test]
fn what_inspection_finds_fails_the_check_of_it() {
    let rows: [(&str, &[&str]); 8] = [
        ("boot-manager", &["no-boot-manager", "boot-manager-damaged"]),
        ("uefi-fallback", &["uefi-fallback"]),
        ("partition-table", &["active-partition", "gpt-blank-entry"]),
        (
            "boot-sector",
            &[
                "boot-sector-hidden",
                "boot-sector-heads",
                "boot-sector-geometry",
            ],
        ),
        (
            "bcd",
            &[
                "no-bcd",
                "no-boot-ini",
                "boot-ini-device",
                "bcd-damaged",
                "bcd-no-default",
                "bcd-transient",
                "bcd-device",
                "bcd-loader",
                "bcd-loader-firmware",
                "bcd-text-mode",
            ],
        ),
        ("volume-clean", &["volume-dirty", "volume-dirty-forced"]),
        ("logs-harmless", &["hive-log-lost", "hive-stale"]),
        ("control-sets", &["default-control-set"]),
    ];
    let sound = converted(Win10);
    sound.look(&[], |guest, survey| {
        for (check, findings) in rows {
            for id in findings {
                let mut survey = survey.clone();
                survey.inspection.findings.push(Finding {
                    id,
                    severity: Severity::Warning,
                    message: "m".into(),
                    remedy: "r".into(),
                    evidence: "e".into(),
                });
                let checks = verify(&survey, guest, &WANTED);
                let bad: Vec<_> = checks.iter().filter(|c| !c.ok).map(|c| c.id).collect();
                assert_eq!(bad, [check], "{id}");
            }
        }
        // Whatever it is: a blocker is one of the disk too. What of the volume stops a conversion may be accepted.
        for (id, bad) in [
            ("pending-updates", &["no-blockers"][..]),
            ("volume-dirty", &["volume-clean"]),
        ] {
            let mut survey = survey.clone();
            survey.inspection.findings.push(Finding {
                id,
                severity: Severity::Blocker,
                message: "m".into(),
                remedy: "r".into(),
                evidence: "e".into(),
            });
            let checks = verify(&survey, guest, &WANTED);
            let found: Vec<_> = checks.iter().filter(|c| !c.ok).map(|c| c.id).collect();
            assert_eq!(found, bad, "{id}");
            assert_eq!(is_ready(&checks), id == "volume-dirty", "{id}");
        }
    });
}

/// The one that boots is looked at, whichever that is.
#[test]
fn device_filters_and_boot_services_are_those_of_the_control_set_that_boots() {
    for set in [1, 2] {
        let mut guest = MemoryGuest::of(GuestSpec {
            control_set: 2,
            ..GuestSpec::new(Win10)
        });
        let key = |path: &str| format!("ControlSet00{set}\\{path}");
        let names = RegData::MultiSz(vec!["nowhere".into()]);
        let volume = key("Enum\\STORAGE\\Volume\\1");
        guest.system.set(&volume, "LowerFilters", names);
        let gone = key("Services\\gone");
        for (name, number) in [("Start", 0), ("Type", 1), ("ErrorControl", 3)] {
            guest.system.dword(&gone, name, number);
        }
        let checks = guest.verify(&[]);
        for id in ["device-filters", "critical-boot-services"] {
            let found = checks.iter().find(|c| c.id == id).unwrap();
            assert_eq!(found.ok, set == 1, "{id} {set}: {found:?}");
        }
    }
}

#[path = "said_tests.rs"]
mod said;
