//! The plan for each Windows as text: a changed decision shows as a change of these files.

use crate::actions::{Action, EditHive, PatchBootSector};
use crate::boot_path::BootFault;
use crate::check::{Check, CheckState};
use crate::convert::prepare;
use crate::demo::guest::GuestFile;
use crate::demo::{GuestSpec, Role, WinVersion};
use crate::drivers::Catalogue;
use crate::error::Blocker;
use crate::firstboot;
use crate::guest::{FsKind, GuestPath, GuestRead, Volume};
use crate::ids::Accepted;
use crate::inspect::model::Fallback;
use crate::inspect::{Finding, Firmware, HiveName, Hives, Severity};
use crate::registry::{HiveError, RegData, RegEdits, RegOp};
use crate::report::text;
use crate::testing::{self, MemoryGuest, bootstrap, driver_source};
use crate::types::DiskBus;

use super::firstboot::Preferences;
use super::{At, Draft, Options, Part, Present, copy_files, decide, missing_folders, remaining};

/// All versions except Vista, for which the driver source has no drivers.
fn versions() -> impl Iterator<Item = WinVersion> {
    let all = WinVersion::ALL.into_iter();
    all.filter(|version| *version != WinVersion::Vista)
}

#[test]
fn plans_of_every_windows() {
    let driver_source = driver_source();
    for version in versions() {
        let guest = MemoryGuest::of(GuestSpec::new(version));
        let prepared = guest.prepare(&driver_source, Some(bootstrap(version)));
        assert_eq!(prepared.plan.blockers, [], "{version:?}");
        insta::assert_snapshot!(
            format!("{version:?}"),
            text::plan(&prepared.plan, None).plain()
        );
    }
}

/// One Windows with an IDE bootstrap, one with the CriticalDeviceDatabase, one with the DriverDatabase.
#[test]
fn registry_edits_of_three_generations() {
    let driver_source = driver_source();
    for version in [WinVersion::Xp, WinVersion::Win7, WinVersion::Win10] {
        let guest = MemoryGuest::of(GuestSpec::new(version));
        let prepared = guest.prepare(&driver_source, Some(bootstrap(version)));
        for action in &prepared.plan.actions {
            let Action::EditHive(EditHive { hive, edits, .. }) = action else {
                continue;
            };
            let name = format!("{version:?}-{}", hive.file_name().to_lowercase());
            insta::assert_snapshot!(name, edits.to_reg_text().replace("\r\n", "\n"));
        }
    }
}

/// Another controller is a remedy for a driver of this one, and none for a driver that all of them
/// need.
#[test]
fn no_other_controller_is_proposed_for_a_driver_of_every_controller() {
    let driver_source = driver_source();
    for (service, elsewhere) in [("partmgr", false), ("storahci", true)] {
        let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        for set in ["ControlSet001", "ControlSet002"] {
            guest.system.remove(&format!("{set}\\Services\\{service}"));
        }
        let plan = guest
            .prepare(&driver_source, Some(bootstrap(WinVersion::Win10)))
            .plan;
        let mut missing = plan.blockers.iter();
        let missing = missing.find(|b| b.code == "boot-driver-missing");
        let remedy = &missing.expect(service).remedy;
        let proposes = remedy.contains("convert with --bootstrap");
        let explains = remedy.contains("on every controller");
        assert_eq!((proposes, explains), (elsewhere, !elsewhere), "{remedy}");
    }
}

#[test]
fn a_second_plan_has_nothing_to_do() {
    let driver_source = driver_source();
    for version in versions() {
        let mut guest = MemoryGuest::of(GuestSpec::new(version));
        let first = guest.prepare(&driver_source, Some(bootstrap(version)));
        guest.apply(&first, &driver_source);
        let second = guest.prepare(&driver_source, Some(bootstrap(version)));
        assert_eq!(second.plan.actions, [], "{version:?}");
    }
}

#[test]
fn the_finished_plan_has_the_blockers_of_every_source() {
    let driver_source = driver_source();
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Xp));
    let prepared = guest.prepare_with(&driver_source, Some(bootstrap(WinVersion::Xp)), |seen| {
        seen.options.require_signed = true;
        seen.options.storage = DiskBus::VirtioScsi;
        seen.limits
            .push(Blocker::new("guest-space", "no room", "make some"));
        Accepted::default()
    });
    let plan = prepared.plan;
    let codes: Vec<_> = plan.blockers.iter().map(|b| b.code.as_str()).collect();
    assert_eq!(codes, ["storage-driver", "driver-signature", "guest-space"]);
    assert!(!plan.ready);
}

#[test]
fn a_fault_that_was_accepted_is_a_warning_and_not_ready() {
    let driver_source = driver_source();
    let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    guest.without("storahci.sys");
    let sata = Some(bootstrap(WinVersion::Win10));
    let refused = guest.prepare(&driver_source, sata).plan;
    assert_eq!(refused.blockers[0].code, "boot-driver-file");
    let accept = |codes: &[&str]| {
        let codes: Vec<String> = codes.iter().map(|code| (*code).to_string()).collect();
        let plan = guest.prepare_with(&driver_source, sata, |_| Accepted::parse(&codes).unwrap());
        plan.plan
    };
    // By its own code, or by that of the check that fails because of it.
    for code in ["boot-driver-file", "boot-path"] {
        let plan = accept(&[code]);
        assert_eq!(plan.blockers, [], "{code}");
        assert_eq!(plan.accepted, ["boot-driver-file"], "{code}");
        assert!(plan.checks.iter().any(|c| !c.ok && c.accepted), "{code}");
        assert!(!plan.ready, "{code}");
    }
    let unused = accept(&["boot-driver-file", "transitional-ids"]);
    let last = unused.warnings.last().unwrap();
    assert!(last.contains("--accept transitional-ids"), "{last}");
}

#[test]
fn a_volume_with_a_hibernated_session_is_not_written() {
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    let codes = |force_dirty, state: fn(&mut Volume)| {
        let mut volumes = guest.look(&[], |guest, _| guest.volumes().to_vec());
        let esp = volumes.iter_mut().find(|v| v.kind == FsKind::Fat).unwrap();
        // On the boot volume of a BIOS guest.
        esp.kind = FsKind::Ntfs;
        let volume = esp.id;
        state(esp);
        let options = Options {
            force_dirty,
            ..testing::options(None)
        };
        let action = Action::PatchBootSector(PatchBootSector {
            id: "boot-sector".into(),
            title: "patch".into(),
            volume,
            fields: Vec::new(),
        });
        guest.look(&[], |_, survey| {
            let found = decide::unsafe_volumes(&[action], &options, &survey.inspection, &volumes);
            found.into_iter().map(|b| b.code).collect::<Vec<_>>()
        })
    };
    assert_eq!(codes(false, |_| {}), [""; 0]);
    assert_eq!(
        codes(true, |v| v.state.hibernated = true),
        ["volume-unsafe"]
    );
    assert_eq!(codes(true, |v| v.state.cached = true), ["volume-unsafe"]);
    assert_eq!(codes(false, |v| v.state.dirty = true), ["volume-unsafe"]);
    assert_eq!(codes(true, |v| v.state.dirty = true), [""; 0]);
}

/// The edit of the SYSTEM hive.
fn system_action(guest: &MemoryGuest, version: WinVersion) -> (RegEdits, Vec<GuestPath>) {
    let prepared = guest.prepare(&driver_source(), Some(bootstrap(version)));
    let mut actions = prepared.plan.actions.into_iter();
    let found = actions.find_map(|action| match action {
        Action::EditHive(edit) if edit.hive == HiveName::System => {
            Some((edit.edits, edit.reset_logs))
        }
        _ => None,
    });
    found.unwrap()
}

#[test]
fn the_control_set_windows_last_ran_with_is_written_too() {
    let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win7));
    let mut second = guest.system.get("ControlSet001").unwrap().clone();
    second.name = "ControlSet002".into();
    *guest.system.key_mut("ControlSet002") = second;
    for (current, sets) in [
        (1, &["ControlSet001"][..]),
        (2, &["ControlSet001", "ControlSet002"]),
        // It is not there.
        (3, &["ControlSet001"]),
    ] {
        guest.system.dword("Select", "Current", current);
        let (edits, _) = system_action(&guest, WinVersion::Win7);
        for set in ["ControlSet001", "ControlSet002", "ControlSet003"] {
            for service in ["viostor", firstboot::SERVICE] {
                let key = format!("{set}\\Services\\{service}");
                let written = edits.ops.iter().any(|op| op.key() == key);
                assert_eq!(written, sets.contains(&set), "{current} {key}");
            }
        }
    }
}

#[test]
fn logs_of_an_edited_hive_are_emptied() {
    let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    let (_, logs) = system_action(&guest, WinVersion::Win10);
    assert_eq!(logs, []);
    let log = GuestPath::parse("\\Windows\\System32\\config\\SYSTEM.LOG1").unwrap();
    let mut bytes = guest.system.to_bytes("SYSTEM");
    bytes.truncate(512);
    bytes.extend([0xff; 512]);
    guest.files.push(GuestFile {
        role: Role::Windows,
        path: log.clone(),
        contents: bytes,
    });
    let (_, logs) = system_action(&guest, WinVersion::Win10);
    assert_eq!(logs, [log]);
}

#[test]
fn a_hive_that_cannot_be_read_to_its_end_is_a_blocker() {
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    let sata = Some(bootstrap(WinVersion::Win10));
    let prepared = guest.prepare_with(&driver_source(), sata, |seen| {
        seen.after = Err(HiveError::NoKey("Select".into()));
        Accepted::default()
    });
    let plan = prepared.plan;
    let codes: Vec<_> = plan.blockers.iter().map(|b| b.code.as_str()).collect();
    assert_eq!(codes, ["hive-damaged"]);
    assert!(plan.blockers[0].reason.contains("Select"));
    assert!(!plan.ready);
}

/// libhivex would write such a value in a form that Windows cannot read.
#[test]
fn a_value_that_cannot_be_written_anew_is_a_blocker() {
    for (size, blocked) in [(16344, false), (16345, true)] {
        let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        let large = RegData::Binary(vec![7; size]);
        // The plan marks the numbers of the drivers beside it.
        guest.system.set("DriverDatabase", "Large", large);
        let sata = Some(bootstrap(WinVersion::Win10));
        let plan = guest.prepare(&driver_source(), sata).plan;
        let found = plan.blockers.iter().find(|b| b.code == "hive-value-large");
        assert_eq!(found.is_some(), blocked, "{size}");
        if let Some(blocker) = found {
            assert!(blocker.reason.contains("\"Large\" of 16345 bytes"));
        }
    }
    // In every hive that is edited, and beside an edit only.
    for (key, blocked) in [
        ("Microsoft\\Windows\\CurrentVersion", true),
        ("Other", false),
    ] {
        let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        let mut tree = crate::demo::hives::software_tree(&guest.spec);
        tree.set(key, "Large", RegData::Binary(vec![7; 16345]));
        *guest.file("SOFTWARE") = tree.to_bytes("SOFTWARE");
        let plan = guest.prepare(&driver_source(), Some(DiskBus::Sata)).plan;
        let found = codes(&plan).contains(&"hive-value-large");
        assert_eq!(found, blocked, "{key}");
    }
}

#[test]
fn a_file_is_copied_unless_it_is_there_and_a_directory_in_its_place_is_a_blocker() {
    let path = |text: &str| GuestPath::parse(text).unwrap();
    let names = ["new", "same", "other", "folder"].map(|name| path(&format!("\\a\\b\\{name}")));
    let present: Present = [
        (names[1].clone(), At::SameFile),
        (names[2].clone(), At::OtherFile),
        (names[3].clone(), At::Folder),
    ]
    .into();
    let part = Part {
        id: "files".into(),
        title: "copy".into(),
        files: names.iter().map(|to| (to.clone(), "x".into(), 1)).collect(),
    };
    let mut draft = Draft::default();
    copy_files(&mut draft, part, &present, &mut Default::default());
    let [Action::CopyFiles(copy)] = &draft.actions[..] else {
        panic!("{:?}", draft.actions);
    };
    let copied: Vec<_> = (copy.files.iter())
        .map(|file| (file.to.clone(), file.replaces))
        .collect();
    assert_eq!(
        copied,
        [(names[0].clone(), false), (names[2].clone(), true)]
    );
    // Each after its parent, and once.
    assert_eq!(copy.folders, [path("\\a"), path("\\a\\b")]);
    let codes: Vec<_> = draft.blockers.iter().map(|b| b.code.as_str()).collect();
    assert_eq!(codes, ["path-taken"]);
    assert!(draft.blockers[0].reason.contains("\\a\\b\\folder"));
    // An existing or planned directory is not created again.
    let mut made = [path("\\a")].into();
    let present = [(path("\\a\\b"), At::Folder)].into();
    let missing = missing_folders(&path("\\a\\b\\c\\file"), &present, &mut made);
    assert_eq!(missing, [path("\\a\\b\\c")]);
}

/// A hive whose log was replayed is written, so that the guest is left in one state. The boot store
/// is left to Windows.
#[test]
fn a_recovered_hive_is_written_without_an_edit() {
    let driver_source = driver_source();
    for (version, hive, change) in [
        (
            WinVersion::Win10,
            HiveName::Software,
            (|hives| hives.software.replayed = true) as fn(&mut Hives),
        ),
        // Windows 8 needs no edit of it.
        (WinVersion::Win81, HiveName::Drivers, |hives| {
            let mut drivers = hives.software.clone();
            drivers.replayed = true;
            hives.drivers = Some(drivers);
        }),
        (WinVersion::Win10, HiveName::Bcd, |hives| {
            hives.bcd.as_mut().unwrap().replayed = true;
        }),
    ] {
        let mut guest = MemoryGuest::of(GuestSpec::new(version));
        let bootstrap = Some(bootstrap(version));
        let first = guest.prepare(&driver_source, bootstrap);
        guest.apply(&first, &driver_source);
        guest.look(&[], |fake, survey| {
            let mut survey = survey.clone();
            change(survey.hives.as_mut().unwrap());
            let (catalogue, preferences) = (Catalogue::builtin(), Preferences::default());
            let options = (testing::options(bootstrap), &preferences);
            let (draft, _) =
                prepare::draft(&survey, fake, &driver_source, &catalogue, options).unwrap();
            let written: Vec<_> = (draft.actions.iter())
                .map(|action| match action {
                    Action::EditHive(edit) => (edit.hive, edit.edits.ops.len()),
                    other => panic!("{other:?}"),
                })
                .collect();
            match hive {
                HiveName::Bcd => assert_eq!(written, []),
                _ => assert_eq!(written, [(hive, 0)], "{version:?}"),
            }
        });
    }
}

/// `--accept` covers only what may keep Windows from starting, whichever check names it.
#[test]
fn what_loses_data_is_not_accepted_by_the_name_of_a_check() {
    let driver_source = driver_source();
    let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    guest.volume = Some(|volume| volume.state.hibernated = true);
    let sata = Some(bootstrap(WinVersion::Win10));
    for accepted in [&[][..], &["no-blockers", "boot-path"]] {
        let plan = guest.prepare_with(&driver_source, sata, |_| Accepted::parse(accepted).unwrap());
        let codes: Vec<_> = (plan.plan.blockers.iter())
            .map(|b| b.code.as_str())
            .collect();
        assert_eq!(codes, ["volume-hibernated"], "{accepted:?}");
        assert_eq!(plan.plan.accepted, [""; 0], "{accepted:?}");
    }
}

/// A disabled filter of a class of disks stops the boot with 0x7B (docs/boot-path.md).
#[test]
fn a_filter_of_the_old_hypervisor_leaves_all_lists_when_its_service_is_disabled() {
    let (set, hdc) = ("ControlSet001", "{4d36e96a-e325-11ce-bfc1-08002be10318}");
    let class = format!("{set}\\Control\\Class\\{hdc}");
    let service = format!("{set}\\Services\\xenfilt");
    let lists = ["UpperFilters", "LowerFilters"];
    for keep_tools in [false, true] {
        let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        guest.system.dword(&service, "Type", 1);
        guest.system.dword(&service, "Start", 0);
        for list in lists {
            let names = RegData::MultiSz(vec!["XENFILT".into()]);
            guest.system.set(&class, list, names);
        }
        let (catalogue, preferences) = (Catalogue::builtin(), Preferences::default());
        let options = Options {
            keep_tools,
            ..testing::options(Some(bootstrap(WinVersion::Win10)))
        };
        let draft = guest.look(&[], |fake, survey| {
            prepare::draft(
                survey,
                fake,
                &driver_source(),
                &catalogue,
                (options, &preferences),
            )
        });
        let system = draft
            .unwrap()
            .0
            .actions
            .into_iter()
            .find_map(|action| match action {
                Action::EditHive(edit) if edit.hive == HiveName::System => Some(edit.edits),
                _ => None,
            });
        system.unwrap().apply(&mut guest.system);
        let start = if keep_tools { 0 } else { 4 };
        let found = guest.system.value(&service, "Start").unwrap();
        assert_eq!(found.as_dword(), Some(start));
        for list in lists {
            let there = guest.system.value(&class, list).is_some();
            assert_eq!(there, keep_tools, "{list}");
        }
    }
}

/// Some installers leave a key with one private value; only a driver with its file is left
/// unchanged.
#[test]
fn a_service_is_written_unless_the_guest_has_it_with_its_file() {
    for (service, values, written) in [
        ("netkvm", &[][..], true),
        ("netkvm", &["Private"], true),
        ("netkvm", &["Type"], true),
        ("netkvm", &["ImagePath"], true),
        ("netkvm", &["Type", "ImagePath"], false),
        // Its INF has it in this spelling.
        ("VirtioSerial", &["Type"], true),
        ("VirtioSerial", &["Type", "ImagePath"], false),
    ] {
        let key = &*format!("ControlSet001\\Services\\{service}");
        let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        for value in values {
            match *value {
                "ImagePath" => guest.system.sz(key, value, "System32\\drivers\\netkvm.sys"),
                value => guest.system.dword(key, value, 1),
            };
        }
        let (edits, _) = system_action(&guest, WinVersion::Win10);
        let found = edits.ops.iter().any(|op| op.key() == key);
        assert_eq!(found, written, "{service} {values:?}");
    }
}

/// A VM with UEFI has no IDE controller (docs/boot.md); a VM with BIOS may have one.
#[test]
fn ide_is_proposed_to_a_guest_with_bios_only() {
    for (firmware, proposed) in [(Firmware::Bios, true), (Firmware::Uefi, false)] {
        let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        let mut after = guest.look(&[], |_, survey| survey.inspection.clone());
        after.firmware = Some(firmware);
        for (controller, path) in &mut after.controllers {
            path.ready = *controller == DiskBus::Ide;
        }
        let sata = after.controllers.get_mut(&DiskBus::Sata).unwrap();
        sata.faults = vec![BootFault::NotBound {
            ids: vec!["VEN_8086&DEV_2922".into()],
            decides: true,
            spare: None,
        }];
        let left = remaining(&after, &[DiskBus::Sata], DiskBus::VirtioBlk);
        assert_eq!(left[0].blocker.code, "bootstrap-unbound");
        let remedy = &left[0].blocker.remedy;
        assert_eq!(remedy.contains("--bootstrap ide"), proposed, "{remedy}");
    }
}

fn codes(plan: &super::Plan) -> Vec<&str> {
    plan.blockers.iter().map(|b| b.code.as_str()).collect()
}

#[test]
fn windows_is_never_left_on_sata_and_not_on_a_bus_without_a_driver() {
    let driver_source = driver_source();
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    use DiskBus::{Ide, Sata, VirtioBlk, VirtioScsi};
    for (storage, wanted, expected) in [
        (VirtioBlk, &[Sata, VirtioBlk][..], &[][..]),
        (VirtioScsi, &[Sata, VirtioScsi], &[]),
        (VirtioBlk, &[Sata, VirtioScsi], &["storage-driver"]),
        (VirtioScsi, &[Sata, VirtioBlk], &["storage-driver"]),
        (Sata, &[Sata, VirtioBlk, VirtioScsi], &["storage-sata"]),
        (Ide, &[Sata, VirtioBlk], &[]),
    ] {
        let plan = guest.prepare_with(&driver_source, Some(Sata), |seen| {
            seen.options.storage = storage;
            seen.wanted = wanted.to_vec();
            Accepted::default()
        });
        assert_eq!(codes(&plan.plan), expected, "{storage:?} {wanted:?}");
    }
}

/// Without `--require-signed` a driver that is not in order is a warning; who signed the others is kept.
#[test]
fn signatures_are_warnings_or_blockers_as_the_user_wants() {
    let driver_source = driver_source();
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    for require_signed in [false, true] {
        let plan = guest.prepare_with(&driver_source, Some(DiskBus::Sata), |seen| {
            seen.options.require_signed = require_signed;
            let signers = &mut seen.signatures.signers;
            signers.insert("viostor".into(), "Red Hat, Inc.".into());
            Accepted::default()
        });
        let plan = plan.plan;
        let warned = plan.warnings.iter().any(|w| w.contains("test mode"));
        let blocked = codes(&plan).contains(&"driver-signature");
        assert_eq!((warned, blocked), (!require_signed, require_signed));
        for driver in &plan.drivers {
            let known = (driver.driver == "viostor").then_some("Red Hat, Inc.");
            assert_eq!(driver.signer.as_deref(), known, "{}", driver.driver);
        }
    }
}

/// A fault that the fix repairs blocks nothing; one that only shows after it does.
#[test]
fn the_guest_as_the_plan_leaves_it_decides() {
    let driver_source = driver_source();
    let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    fn finding(id: &'static str) -> Finding {
        Finding {
            id,
            severity: Severity::Blocker,
            message: format!("{id} is so"),
            remedy: "r".into(),
            evidence: String::new(),
        }
    }
    guest.survey = Some(|survey| {
        let findings = &mut survey.inspection.findings;
        findings.push(finding("no-boot-manager"));
        findings.push(finding("bcd-device"));
    });
    for (after, expected) in [
        (&[][..], &[][..]),
        (&["no-boot-manager"], &["no-boot-manager"]),
        (
            &["bcd-device", "boot-manager-damaged"],
            &["bcd-device", "boot-manager-damaged"],
        ),
    ] {
        let plan = guest.prepare_with(&driver_source, Some(DiskBus::Sata), |seen| {
            let inspection = &mut seen.after.as_mut().unwrap().inspection;
            inspection.findings = after.iter().map(|id| finding(id)).collect();
            Accepted::default()
        });
        assert_eq!(codes(&plan.plan), expected, "{after:?}");
        assert_eq!(plan.plan.ready, expected.is_empty(), "{after:?}");
    }
}

/// A check that fails for a reason of its own is a blocker, with what it saw.
#[test]
fn a_failed_check_is_a_blocker_with_its_evidence() {
    let driver_source = driver_source();
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    for (severity, evidence, reason) in [
        (Severity::Blocker, "", Some("it is so")),
        (Severity::Blocker, "seen", Some("it is so (seen)")),
        (Severity::Warning, "seen", None),
    ] {
        let plan = guest.prepare_with(&driver_source, Some(DiskBus::Sata), |seen| {
            let check = Check {
                evidence: evidence.into(),
                ..Check::new("firmware", severity, CheckState::Fault, "it is so")
            };
            seen.after.as_mut().unwrap().checks.push(check);
            Accepted::default()
        });
        let found = plan.plan.blockers.iter().map(|b| (&*b.code, &*b.reason));
        let expected = reason.map(|reason| ("firmware", reason));
        assert_eq!(found.collect::<Vec<_>>(), Vec::from_iter(expected));
        assert_eq!(plan.plan.ready, reason.is_none(), "{severity:?}");
    }
}

#[test]
fn what_was_accepted_in_vain_is_told() {
    let driver_source = driver_source();
    let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    guest.survey = Some(|survey| {
        survey.inspection.findings.push(Finding {
            id: "compact-os",
            severity: Severity::Warning,
            message: "m".into(),
            remedy: "r".into(),
            evidence: String::new(),
        });
    });
    let plan = guest.prepare_with(&driver_source, Some(DiskBus::Sata), |_| {
        Accepted::parse(&["compact-os", "bcd-device"]).unwrap()
    });
    let warnings = &plan.plan.warnings;
    for text in [
        "--accept compact-os: this does not stop a conversion",
        "--accept bcd-device: this guest has no such fault",
    ] {
        assert!(warnings.iter().any(|w| w == text), "{text} in {warnings:?}");
    }
    assert!(plan.plan.ready);
}

/// The drivers that are not needed to boot are recorded in DRIVERS, or wait for the first boot.
#[test]
fn without_a_sound_drivers_hive_only_the_boot_drivers_are_installed() {
    let driver_source = driver_source();
    for (change, text) in [
        ((|_| {}) as fn(&mut MemoryGuest), None),
        (|g| g.without("DRIVERS"), Some("was not found")),
        (
            |g| {
                let bytes = g.file("DRIVERS");
                let at = bytes.windows(2).rposition(|w| w == b"nk").unwrap();
                bytes[at..at + 2].copy_from_slice(b"xx");
            },
            Some("is damaged"),
        ),
    ] {
        let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        change(&mut guest);
        let plan = guest.prepare(&driver_source, Some(DiskBus::Sata)).plan;
        let warning = plan
            .warnings
            .iter()
            .find(|w| w.contains("the DRIVERS hive"));
        assert_eq!(warning.is_some(), text.is_some(), "{text:?}");
        if let (Some(warning), Some(text)) = (warning, text) {
            assert!(warning.contains(text), "{warning}");
        }
        for driver in &plan.drivers {
            let expected = match (&*driver.driver, text) {
                ("viostor" | "vioscsi", _) => "boot",
                (_, None) => "installed",
                _ => "staged",
            };
            assert_eq!(driver.placement, expected, "{} {text:?}", driver.driver);
        }
    }
}

/// Each hive is edited where it lies, SYSTEM last: its services make Windows load the files.
#[test]
fn hives_are_edited_on_their_volumes_and_system_last() {
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    let (catalogue, wishes) = (Catalogue::builtin(), Preferences::default());
    let options = (testing::options(Some(DiskBus::Sata)), &wishes);
    guest.look(&[], |fake, survey| {
        let mut survey = survey.clone();
        let windows = survey.inspection.windows.as_mut().unwrap();
        windows.boot.text_mode = vec![RegOp::set("Objects\\x", "y", RegData::Dword(1))];
        let (store, system) = (windows.boot.store.unwrap(), windows.system_volume);
        let fallback = Fallback {
            volume: store,
            from: GuestPath::parse("\\EFI\\Microsoft\\Boot\\bootmgfw.efi").unwrap(),
            to: GuestPath::parse("\\EFI\\Boot\\bootx64.efi").unwrap(),
            size: 7,
            replaces: true,
            folder: GuestPath::parse("\\EFI\\Boot").ok(),
        };
        windows.boot.fallback = Some(fallback.clone());
        assert_ne!(store, system);
        let (draft, _) =
            prepare::draft(&survey, fake, &driver_source(), &catalogue, options).unwrap();
        let hives: Vec<_> = (draft.actions.iter())
            .filter_map(|action| match action {
                Action::EditHive(edit) => Some((edit.hive, edit.volume)),
                _ => None,
            })
            .collect();
        assert_eq!(
            hives,
            [
                (HiveName::Bcd, store),
                (HiveName::Software, system),
                (HiveName::Drivers, system),
                (HiveName::System, system),
            ]
        );
        let copied: Vec<_> = (draft.actions.iter())
            .filter_map(|action| match action {
                Action::CopyInGuest(copy) => Some(Fallback {
                    volume: copy.volume,
                    from: copy.from.clone(),
                    to: copy.to.clone(),
                    size: copy.size,
                    replaces: copy.replaces,
                    folder: copy.folder.clone(),
                }),
                _ => None,
            })
            .collect();
        assert_eq!(copied, [fallback]);
    });
}

/// An accepted blocker keeps its place among the warnings; a check that passes is not marked.
#[test]
fn what_was_accepted_is_told_once_with_its_reason() {
    let driver_source = driver_source();
    let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    guest.without("storahci.sys");
    for left in [&[][..], &["hive-damaged"]] {
        let plan = guest.prepare_with(&driver_source, Some(DiskBus::Sata), |seen| {
            if !left.is_empty() {
                let limit = Blocker::new("hive-damaged", "why", "what helps");
                seen.limits.push(limit);
            }
            Accepted::parse(&["boot-driver-file"]).unwrap()
        });
        let plan = plan.plan;
        assert_eq!(codes(&plan), left);
        let told = plan
            .warnings
            .iter()
            .filter(|w| w.starts_with("accepted [boot-driver-file]"));
        let told: Vec<_> = told.collect();
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains("storahci.sys is missing"), "{told:?}");
        assert_eq!(plan.accepted, ["boot-driver-file"]);
        for check in &plan.checks {
            let fault = !check.ok && check.severity == Severity::Blocker;
            assert_eq!(check.accepted, fault && left.is_empty(), "{}", check.id);
        }
        assert!(!plan.ready);
    }
}

/// Windows may be on another letter than C: when it runs, and writes that into what it records.
#[test]
fn the_letter_of_the_system_volume_is_the_guests_own() {
    for (letter, recorded) in [(Some('D'), "D:"), (None, "C:")] {
        let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
        guest.survey = match letter {
            Some(_) => Some(|survey| {
                survey.inspection.windows.as_mut().unwrap().drive_letter = Some('D');
            }),
            None => Some(|survey| {
                survey.inspection.windows.as_mut().unwrap().drive_letter = None;
            }),
        };
        let (edits, _) = system_action(&guest, WinVersion::Win10);
        let paths = edits.ops.iter().filter_map(|op| match op {
            RegOp::Set { name, data, .. } if name == "OemPath" => Some(data),
            _ => None,
        });
        let expected = RegData::Sz(format!("{recorded}\\Windows\\hyper2kvm\\drivers"));
        let paths: Vec<_> = paths.collect();
        assert!(
            !paths.is_empty() && paths.iter().all(|path| **path == expected),
            "{paths:?}"
        );
    }
}

/// An edit of both control sets that is of no control set stands once.
#[test]
fn no_edit_is_planned_twice() {
    let mut guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    let mut second = guest.system.get("ControlSet001").unwrap().clone();
    second.name = "ControlSet002".into();
    *guest.system.key_mut("ControlSet002") = second;
    guest.system.dword("Select", "Current", 2);
    let (edits, _) = system_action(&guest, WinVersion::Win10);
    let mut seen = std::collections::BTreeSet::new();
    for op in &edits.ops {
        assert!(seen.insert(format!("{op:?}")), "{op:?}");
    }
}
