//! Whole drafts and whole plans as text: every action with its fields, every word to the user.

use super::*;
use crate::actions::PatchBootSector;
use crate::convert::prepare;
use crate::demo::{Arch, GuestSpec, Leftovers, WinVersion};
use crate::drivers::Catalogue;
use crate::drivers::driver_source::{DriverSource, Memory};
use crate::guest::{FsKind, GuestRead, Volume};
use crate::ids::Accepted;
use crate::inspect::model::{Fallback, Tool};
use crate::inspect::{Finding, SectorField, Severity, Survey};
use crate::plan::firstboot::Preferences;
use crate::registry::RegData;
use crate::testing::{self, MemoryGuest, driver_source};

fn guest(version: WinVersion, arch: Arch) -> MemoryGuest {
    MemoryGuest::of(GuestSpec {
        leftovers: Leftovers::Vmware,
        arch,
        ..GuestSpec::new(version)
    })
}

fn action(action: &Action) -> String {
    match action {
        Action::CopyFiles(copy) => {
            let mut text = format!("{}: {}\n", copy.id, copy.title);
            for folder in &copy.folders {
                text.push_str(&format!("  new {folder}\n"));
            }
            for file in &copy.files {
                let how = if file.replaces { "replaces" } else { "new" };
                text.push_str(&format!(
                    "  {} <- {} {} {how}\n",
                    file.to, file.from, file.size
                ));
            }
            text
        }
        Action::EditHive(edit) => {
            let mut text = format!(
                "{}: {} on {} at {}, logs {:?}\n",
                edit.id, edit.title, edit.volume, edit.path, edit.reset_logs
            );
            // One line for each edit, without the digits of long values.
            for op in &edit.edits.ops {
                let line: String = format!("{op:?}").chars().take(240).collect();
                text.push_str(&format!("  {line}\n"));
            }
            text
        }
        other => format!("{other:?}\n"),
    }
}

fn shown(guest: &MemoryGuest, options: Options, wishes: &Preferences) -> String {
    guest.look(&[], |fake, survey| {
        let catalogue = Catalogue::builtin();
        let drafted = prepare::draft(
            survey,
            fake,
            &driver_source(),
            &catalogue,
            (options, wishes),
        );
        let (draft, basis) = drafted.unwrap();
        let mut text: String = draft.actions.iter().map(action).collect();
        for skipped in &draft.skipped {
            text.push_str(&format!("already done {}: {}\n", skipped.id, skipped.title));
        }
        for driver in &draft.drivers {
            text.push_str(&format!("{driver:?}\n"));
        }
        for blocker in &draft.blockers {
            text.push_str(&format!("{blocker:?}\n"));
        }
        for warning in &draft.warnings {
            text.push_str(&format!("! {warning}\n"));
        }
        for (name, bytes) in &basis.generated {
            let script = String::from_utf8_lossy(bytes).replace('\r', "");
            // What follows the first label is the same in every script.
            let own = script.split("\n:say\n").next().unwrap_or_default();
            text.push_str(&format!("=== {name}\n{own}\n"));
        }
        text
    })
}

/// Two control sets, of which Windows last ran with the second.
fn with_two_sets(guest: &mut MemoryGuest) {
    let mut second = guest.system.get("ControlSet001").unwrap().clone();
    second.name = "ControlSet002".into();
    *guest.system.key_mut("ControlSet002") = second;
    guest.system.dword("Select", "Current", 2);
}

fn tools(survey: &mut Survey) {
    let windows = survey.inspection.windows.as_mut().unwrap();
    windows.tools = vec![Tool {
        id: "vmware-tools",
        name: "VMware Tools",
        version: None,
        services: Vec::new(),
        product_code: Some("{00000001-0000-0000-0000-000000000000}".into()),
    }];
}

#[test]
fn the_whole_draft_of_a_windows_of_each_kind() {
    let wishes = Preferences {
        user_scripts: vec![b"echo 1\r\n".to_vec()],
        uninstall_tools: true,
        ..Preferences::default()
    };
    let none = Preferences {
        none: true,
        ..Preferences::default()
    };
    let options = |bootstrap, keep_tools| Options {
        keep_tools,
        ..testing::options(bootstrap)
    };
    let mut seven = guest(WinVersion::Win7, Arch::X86);
    with_two_sets(&mut seven);
    seven.survey = Some(tools);
    let text = shown(&seven, options(Some(DiskBus::Sata), false), &wishes);
    insta::assert_snapshot!("whole-7", text);
    let eight = guest(WinVersion::Win81, Arch::Amd64);
    let text = shown(&eight, options(Some(DiskBus::Sata), false), &wishes);
    insta::assert_snapshot!("whole-8.1", text);
    let xp = guest(WinVersion::Xp, Arch::X86);
    let text = shown(&xp, options(Some(DiskBus::Ide), false), &wishes);
    insta::assert_snapshot!("whole-xp", text);
    let mut ten = guest(WinVersion::Win10, Arch::Amd64);
    ten.survey = Some(|survey| {
        let boot = &mut survey.inspection.windows.as_mut().unwrap().boot;
        let field = |name| SectorField {
            name,
            offset: 0x1a,
            old: vec![1],
            new: vec![2],
        };
        (boot.heads, boot.hidden) = (Some(field("heads")), Some(field("hidden")));
        boot.text_mode = vec![RegOp::set("Objects\\x", "text", RegData::Dword(1))];
        boot.device_repair = vec![RegOp::set("Objects\\x", "device", RegData::Dword(1))];
        let at = |path| GuestPath::parse(path).unwrap();
        boot.fallback = Some(Fallback {
            volume: boot.store.unwrap(),
            from: at("\\EFI\\Microsoft\\Boot\\bootmgfw.efi"),
            to: at("\\EFI\\Boot\\bootx64.efi"),
            size: 7,
            replaces: false,
            folder: Some(at("\\EFI\\Boot")),
        });
    });
    let repair = Options {
        repair_bcd: true,
        ..options(None, true)
    };
    insta::assert_snapshot!("whole-10", shown(&ten, repair, &none));
}

/// Everything that may be in a plan but the actions.
fn plan_text(plan: &Plan) -> String {
    let mut text = format!("ready {}, accepted {:?}\n", plan.ready, plan.accepted);
    for blocker in &plan.blockers {
        text.push_str(&format!(
            "{}: {} -> {}\n",
            blocker.code, blocker.reason, blocker.remedy
        ));
    }
    for warning in &plan.warnings {
        text.push_str(&format!("! {warning}\n"));
    }
    for check in &plan.checks {
        text.push_str(&format!(
            "{} ok {} accepted {} {:?}: {} ({})\n",
            check.id, check.ok, check.accepted, check.severity, check.message, check.evidence
        ));
    }
    text
}

fn finding(id: &'static str, severity: Severity) -> Finding {
    Finding {
        id,
        severity,
        message: format!("{id} is so"),
        remedy: format!("help {id}"),
        evidence: String::new(),
    }
}

/// A guest with a fault of every kind: the order of the blockers, and what each of them says.
#[test]
fn the_whole_plan_of_a_guest_with_many_faults() {
    let mut guest = guest(WinVersion::Win10, Arch::Amd64);
    guest.without("storahci.sys");
    guest.system.remove("ControlSet001\\Services\\partmgr");
    let large = RegData::Binary(vec![7; 20_000]);
    guest.system.set("DriverDatabase", "Large", large);
    guest.survey = Some(|survey| {
        let findings = &mut survey.inspection.findings;
        findings.push(finding("volume-dirty", Severity::Blocker));
        findings.push(finding("compact-os", Severity::Warning));
        let boot = &mut survey.inspection.windows.as_mut().unwrap().boot;
        boot.text_mode = vec![RegOp::set("Objects\\x", "text", RegData::Dword(1))];
    });
    // The boot store is on a volume that is not to be written.
    let mut volumes = guest.look(&[], |fake, _| fake.volumes().to_vec());
    let esp = volumes.iter_mut().find(|v| v.kind == FsKind::Fat).unwrap();
    (esp.kind, esp.state.dirty) = (FsKind::Ntfs, true);
    let volumes: &'static [Volume] = volumes.leak();
    let accept: &[&str] = &["boot-driver-file", "compact-os", "bcd-device"];
    for (name, storage, required, accepted) in [
        ("many-faults", DiskBus::VirtioScsi, true, &[][..]),
        ("many-faults-accepted", DiskBus::VirtioBlk, false, accept),
        ("many-faults-sata", DiskBus::Sata, false, &["boot-path"]),
    ] {
        let prepared = guest.prepare_with(&driver_source(), Some(DiskBus::Sata), |seen| {
            seen.options.storage = storage;
            seen.options.require_signed = required;
            if storage == DiskBus::VirtioScsi {
                seen.wanted.retain(|bus| *bus != DiskBus::VirtioScsi);
                seen.volumes = volumes;
            }
            seen.notes = vec!["of the VM".into()];
            seen.limits = vec![Blocker::new("guest-space", "no room", "make some")];
            Accepted::parse(accepted).unwrap()
        });
        insta::assert_snapshot!(name, plan_text(&prepared.plan));
    }
}

/// Each state of a volume besides that of Windows, with the words for it.
#[test]
fn a_volume_that_must_not_be_written_is_named_with_its_state() {
    let guest = guest(WinVersion::Win10, Arch::Amd64);
    let mut volumes = guest.look(&[], |fake, _| fake.volumes().to_vec());
    let esp = volumes.iter().position(|v| v.kind == FsKind::Fat).unwrap();
    volumes[esp].kind = FsKind::Ntfs;
    let id = volumes[esp].id;
    let patch = Action::PatchBootSector(PatchBootSector {
        id: "boot-sector".into(),
        title: "patch".into(),
        volume: id,
        fields: Vec::new(),
    });
    guest.look(&[], |_, survey| {
        let before = &survey.inspection;
        for (force_dirty, change, why) in [
            (
                false,
                (|v| (v.state.hibernated, v.state.cached) = (true, true)) as fn(&mut Volume),
                Some("holds a hibernated session of Windows"),
            ),
            (
                false,
                |v| (v.state.cached, v.state.dirty) = (true, true),
                Some("is partly in the memory of Fast Startup"),
            ),
            (
                false,
                |v| v.state.dirty = true,
                Some("was not unmounted cleanly"),
            ),
            (true, |v| v.state.dirty = true, None),
            (
                false,
                |v| (v.kind, v.state.dirty) = (FsKind::Fat, true),
                None,
            ),
        ] {
            let mut volumes = volumes.clone();
            change(&mut volumes[esp]);
            let options = Options {
                force_dirty,
                ..testing::options(None)
            };
            let actions = std::slice::from_ref(&patch);
            let found = decide::unsafe_volumes(actions, &options, before, &volumes);
            let expected = why.map(|why| {
                Blocker::new(
                    "volume-unsafe",
                    format!("the boot files on {id} have to be changed, and that volume {why}"),
                    "start the guest on its old hypervisor and shut it down completely (shutdown /s /t 0)",
                )
            });
            assert_eq!(found, Vec::from_iter(expected));
            assert_eq!(decide::unsafe_volumes(&[], &options, before, &volumes), []);
        }
    });
}

/// A driver of the old device only does not start the disk of a q35 machine.
#[test]
fn a_driver_without_the_modern_device_is_a_warning_of_the_draft() {
    let xp = guest(WinVersion::Xp, Arch::X86);
    let plan = xp.prepare(&driver_source(), Some(DiskBus::Ide)).plan;
    let told = plan.warnings.iter().any(|w| {
        w == "viostor 61.77.104.17300 does not list the modern virtio device, which is what q35 machines show"
    });
    assert!(told, "{:?}", plan.warnings);
}

/// The driver source after a change of each file; one without contents is left out.
fn driver_source_with(change: impl Fn(&str, Vec<u8>) -> Option<Vec<u8>>) -> Memory {
    let whole = driver_source();
    let files = whole.files().iter().filter_map(|file| {
        let bytes = change(&file.path, whole.read(&file.path).unwrap())?;
        Some((file.path.clone(), bytes))
    });
    Memory::new(files)
}

/// Windows starts without any other driver, and finds it later.
#[test]
fn only_a_driver_that_boots_needs_the_modern_device() {
    let changed = [
        ("viostor", "DEV_1042", "DEV_1001"),
        ("balloon", "DEV_1045", "DEV_1002"),
    ];
    let driver_source = driver_source_with(|path, bytes| {
        let of = |name: &str| path.ends_with(&format!("/w10/amd64/{name}.inf"));
        let Some((_, modern, old)) = changed.iter().find(|(name, ..)| of(name)) else {
            return Some(bytes);
        };
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains(modern), "{path}");
        Some(text.replace(modern, old).into_bytes())
    });
    let win10 = guest(WinVersion::Win10, Arch::Amd64);
    let prepared = win10.prepare(&driver_source, Some(DiskBus::Sata));
    for (name, ..) in changed {
        let package = prepared.basis.drivers.package(name).unwrap();
        assert!(!package.forms().modern, "{name}");
    }
    let modern = " does not list the modern virtio device";
    let told = prepared.plan.warnings.iter().filter(|w| w.contains(modern));
    let drivers: Vec<_> = told.filter_map(|w| w.split(' ').next()).collect();
    assert_eq!(drivers, ["viostor"]);
}

/// A map of numbers in a hive without an edit would be the only reason to write that hive.
#[test]
fn numbers_of_packages_are_marked_in_the_hives_that_record_packages() {
    let only_boot = driver_source_with(|path, bytes| {
        let boot = ["viostor/", "vioscsi/"].iter();
        boot.clone()
            .any(|folder| path.starts_with(folder))
            .then_some(bytes)
    });
    for (version, marked) in [
        (WinVersion::Win7, &[][..]),
        (WinVersion::Win81, &[HiveName::System]),
        (WinVersion::Win10, &[HiveName::System]),
    ] {
        let plan = guest(version, Arch::Amd64).prepare(&only_boot, Some(DiskBus::Sata));
        let mut maps = Vec::new();
        for action in &plan.plan.actions {
            let Action::EditHive(edit) = action else {
                continue;
            };
            let is_map = |op: &&RegOp| matches!(op, RegOp::Set { name, .. } if name == "OemInfMap");
            maps.extend(edit.edits.ops.iter().filter(is_map).map(|_| edit.hive));
        }
        assert_eq!(maps, marked, "{version:?}");
    }
}

/// Two drivers with different files of one name cannot lie in one directory.
#[test]
fn a_driver_that_is_staged_by_itself_is_told() {
    let whole = driver_source();
    let files = whole.files().iter().map(|f| f.path.clone());
    let files = files.map(|path| (path.clone(), whole.read(&path).unwrap()));
    let clash = [("NetKVM", 3), ("Balloon", 4)].map(|(driver, len)| {
        let path = format!("{driver}/w10/amd64/clash.dll");
        (path, vec![0; len])
    });
    let driver_source = Memory::new(files.chain(clash));
    let win10 = guest(WinVersion::Win10, Arch::Amd64);
    let plan = win10.prepare(&driver_source, Some(DiskBus::Sata)).plan;
    let told = |w: &&String| w.contains("is staged in a directory of its own: its clash.dll");
    assert_eq!(
        plan.warnings.iter().filter(told).count(),
        1,
        "{:?}",
        plan.warnings
    );
}

#[test]
fn the_controllers_that_must_boot_are_the_first_ones_and_those_with_a_driver() {
    use DiskBus::{Ide, Sata, VirtioBlk, VirtioScsi};
    for (version, arch, bootstrap, expected) in [
        (
            WinVersion::Win10,
            Arch::Amd64,
            Some(Sata),
            &[Sata, VirtioBlk, VirtioScsi][..],
        ),
        (
            WinVersion::Win10,
            Arch::Amd64,
            None,
            &[VirtioBlk, VirtioScsi],
        ),
        (WinVersion::Xp, Arch::X86, Some(Ide), &[Ide, VirtioBlk]),
    ] {
        let basis = guest(version, arch)
            .prepare(&driver_source(), bootstrap)
            .basis;
        assert_eq!(wanted(bootstrap, &basis.drivers), expected);
        for package in &basis.drivers.packages {
            let boot = ["viostor", "vioscsi"].contains(&&*package.driver);
            assert_eq!(is_boot(package), boot, "{}", package.driver);
        }
    }
}
