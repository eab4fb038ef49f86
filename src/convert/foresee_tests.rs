//! What a plan gathers besides the guest: the options, the VM, the other disks and the host. Windows is in
//! memory, and its disks are empty files.

use std::path::PathBuf;

use super::super::job::Copying;
use super::super::testing::job;
use super::*;
use crate::demo::WinVersion;
use crate::disk::detect::Format;
use crate::domain::Emit;
use crate::drivers::driver_source::{DriverFile, DriverSourceError, Memory};
use crate::guest::FsKind;
use crate::inspect::fake::FakeGuest;
use crate::inspect::{InspectOptions, inspect};
use crate::testing::{MemoryGuest, driver_source as drivers};
use crate::types::DiskBus;

#[test]
fn every_refusal_is_a_blocker_and_of_other_errors_the_first_is_kept() {
    let refused = |codes: &[&'static str]| {
        let blockers = codes
            .iter()
            .map(|code| Blocker::new(*code, "", ""))
            .collect();
        Err(Error::refused("no", blockers))
    };
    let failed = |text: &str| Err(Error::failed(text));
    for (results, codes, error) in [
        ([Ok(()), Ok(()), Ok(())], &["before"][..], None),
        ([refused(&["a"]), Ok(()), Ok(())], &["before", "a"], None),
        ([Ok(()), refused(&["b"]), Ok(())], &["before", "b"], None),
        (
            [refused(&["a"]), Ok(()), refused(&["b", "c"])],
            &["before", "a", "b", "c"],
            None,
        ),
        (
            [failed("first"), refused(&["b"]), failed("second")],
            &["before", "b"],
            Some("first"),
        ),
        ([Ok(()), Ok(()), failed("last")], &["before"], Some("last")),
    ] {
        let known = "before";
        let mut limits = vec![Blocker::new(known, "", "")];
        let failed = shown(results, &mut limits);
        let found: Vec<_> = limits.iter().map(|b| b.code.to_string()).collect();
        assert_eq!(found, codes);
        assert_eq!(failed.map(|e| e.message).as_deref(), error);
    }
}

/// A Windows, its driver source, and the files of two disks.
struct World {
    guest: MemoryGuest,
    driver_source: Memory,
    dir: tempfile::TempDir,
    free: Option<u64>,
    /// What else of the guest is not as the demo has it.
    change: fn(&mut FakeGuest),
}

impl World {
    fn new() -> Self {
        let world = Self {
            guest: MemoryGuest::new(WinVersion::Win10),
            driver_source: drivers(),
            dir: tempfile::tempdir().unwrap(),
            free: None,
            change: |_| {},
        };
        for path in world.disks() {
            std::fs::write(path, vec![0; 1 << 20]).unwrap();
        }
        world
    }

    fn disks(&self) -> [PathBuf; 2] {
        ["windows.raw", "data.raw"].map(|name| self.dir.path().join(name))
    }

    fn job(&self) -> Job {
        let mut job = job(&self.disks(), &self.dir.path().join("out"));
        job.vm.machine.portable = true;
        job
    }

    fn seen<T>(&self, job: &Job, then: impl FnOnce(&Seen<'_>) -> T) -> T {
        self.seen_with(job, None, then)
    }

    fn seen_with<T>(
        &self,
        job: &Job,
        saver: Option<&Saver>,
        then: impl FnOnce(&Seen<'_>) -> T,
    ) -> T {
        self.guest.look(&[], |guest, survey| {
            let mut guest: FakeGuest = guest.clone();
            let system = survey.inspection.windows.as_ref().unwrap().system_volume;
            guest.free = self.free.map(|free| (system, free));
            (self.change)(&mut guest);
            then(&Seen {
                survey,
                guest: &guest,
                look: &|preview| {
                    let options = InspectOptions::default();
                    Ok(inspect(preview, &[self.guest.disk()], &options).unwrap())
                },
                disks: &job.source.disks(self.dir.path()).unwrap(),
                engine: Engine::EMBEDDED,
                target: &job.target_folder(),
                saver,
                has: &is_there,
            })
        })
    }

    fn foresee(&self, job: &Job) -> (Prepared, Option<Error>) {
        let catalogue = Catalogue::builtin();
        self.seen(job, |seen| {
            foreseen(job, seen, &self.driver_source, &catalogue).unwrap()
        })
    }

    fn codes(&self, change: impl FnOnce(&mut Job)) -> Vec<String> {
        let mut job = self.job();
        change(&mut job);
        let (prepared, failed) = self.foresee(&job);
        assert!(failed.is_none(), "{failed:?}");
        let blockers = prepared.plan.blockers.iter();
        blockers.map(|blocker| blocker.code.to_string()).collect()
    }
}

#[test]
fn every_option_of_the_command_line_that_the_plan_needs_reaches_it() {
    let world = World::new();
    let given = |change: fn(&mut Job)| {
        let mut job = world.job();
        // Otherwise it is as `--keep-tools` has it.
        job.guest.keep_tools = false;
        change(&mut job);
        world.seen(&job, |seen| {
            let windows = seen.survey.inspection.windows.as_ref().unwrap();
            options(&job, seen.survey, windows)
        })
    };
    let base = plan::Options {
        bootstrap: Some(DiskBus::Sata),
        repair_bcd: false,
        keep_tools: false,
        storage: DiskBus::VirtioBlk,
        require_signed: false,
        force_dirty: false,
    };
    type Given = (fn(&mut Job), fn(&mut plan::Options));
    let cases: [Given; 8] = [
        (|_| {}, |_| {}),
        (|j| j.guest.bootstrap = Some(None), |o| o.bootstrap = None),
        (
            |j| j.guest.bootstrap = Some(Some(DiskBus::Ide)),
            |o| o.bootstrap = Some(DiskBus::Ide),
        ),
        (|j| j.guest.repair_bcd = true, |o| o.repair_bcd = true),
        (|j| j.guest.keep_tools = true, |o| o.keep_tools = true),
        (
            |j| j.vm.machine.storage = DiskBus::VirtioScsi,
            |o| o.storage = DiskBus::VirtioScsi,
        ),
        (
            |j| j.drivers.require_signed = true,
            |o| o.require_signed = true,
        ),
        (
            |j| j.source.access.inspect.force_dirty = true,
            |o| o.force_dirty = true,
        ),
    ];
    for (i, (change, wanted)) in cases.into_iter().enumerate() {
        let mut options = base;
        wanted(&mut options);
        assert_eq!(given(change), options, "{i}");
    }
}

/// Drivers on an image with names of 8.3 characters only.
struct Short<'a>(&'a Memory);

impl DriverSource for Short<'_> {
    fn describe(&self) -> String {
        "the ISO".into()
    }
    fn files(&self) -> &[DriverFile] {
        self.0.files()
    }
    fn read(&self, path: &str) -> Result<Vec<u8>, DriverSourceError> {
        self.0.read(path)
    }
    fn has_short_names(&self) -> bool {
        true
    }
}

#[test]
fn warnings_about_the_source_the_drivers_the_vm_and_the_copy_are_all_told() {
    let world = World::new();
    let mut job = world.job();
    let told = |job: &Job, driver_source: &dyn DriverSource| {
        world.seen(job, |seen| {
            let catalogue = Catalogue::builtin();
            foreseen(job, seen, driver_source, &catalogue).unwrap().0
        })
    };
    let count = |prepared: &Prepared, part: &str| {
        let warnings = prepared.plan.warnings.iter();
        warnings.filter(|warning| warning.contains(part)).count()
    };
    let parts = [
        "a note of the source",
        "names of 8.3 characters",
        "the source VM has BIOS",
        crate::later::WARNING,
    ];
    let before = told(&job, &world.driver_source);
    for part in parts {
        assert_eq!(count(&before, part), 0, "{part}");
    }
    job.source.vm.notes.push("a note of the source".into());
    job.source.vm.firmware = Some(crate::inspect::Firmware::Bios);
    job.copy.method = Copying::Later;
    let after = told(&job, &Short(&world.driver_source));
    for part in parts {
        assert_eq!(count(&after, part), 1, "{part}");
    }
}

#[test]
fn what_lies_outside_of_the_guest_blocks_its_plan_too() {
    let mut world = World::new();
    assert_eq!(world.codes(|_| {}), [""; 0]);
    // Documents of others.
    let i440fx = |job: &mut Job| {
        job.vm.machine.machine_type = Some("pc".into());
        job.vm.emit = vec![Emit::Kubevirt];
    };
    assert_eq!(world.codes(i440fx), ["emit-limit"]);
    // The signatures of the drivers.
    let codes = world.codes(|job| job.drivers.require_signed = true);
    assert!(codes.iter().all(|c| c == "driver-signature") && !codes.is_empty());
    // The guest itself.
    world.free = Some(0);
    assert_eq!(world.codes(|_| {}), ["guest-space"]);
    let both = |job: &mut Job| {
        i440fx(job);
        job.vm.machine.storage = DiskBus::Sata;
    };
    assert_eq!(
        world.codes(both),
        ["storage-sata", "guest-space", "emit-limit"]
    );
    world.free = Some(u64::MAX);
    assert_eq!(world.codes(|_| {}), [""; 0]);
    // The output directory: nothing has room there.
    let mut job = world.job();
    job.output.folder = Some("/proc/vm-kvm".into());
    let failed = world.foresee(&job).1.unwrap();
    assert_eq!(failed.blockers[0].code, "output-space");
}

/// The index of the EFI system partition of the demo.
const ESP: u32 = 1;

/// Its writer would refuse that volume in the middle of the fix.
#[test]
fn the_state_of_a_volume_beside_that_of_windows_can_stop_the_plan() {
    let mut world = World::new();
    // What is missing is written there.
    world.guest.without("bootx64.efi");
    let is_unsafe = |world: &World, force: bool| {
        let codes = world.codes(|job| job.source.access.inspect.force_dirty = force);
        codes.contains(&"volume-unsafe".to_owned())
    };
    world.change = |guest| guest.volume_mut(ESP).kind = FsKind::Ntfs;
    assert!(!is_unsafe(&world, false));
    world.change = |guest| {
        let esp = guest.volume_mut(ESP);
        (esp.kind, esp.state.dirty) = (FsKind::Ntfs, true);
    };
    assert!(is_unsafe(&world, false) && !is_unsafe(&world, true));
}

/// How much room the fix needs is then not known.
#[test]
fn an_error_of_what_the_fix_needs_ends_the_plan() {
    let world = World::new();
    let job = world.job();
    let outside = world.seen(&job, |seen| {
        let windows = seen.survey.inspection.windows.as_ref().unwrap();
        let (draft, basis) = prepare::draft(
            seen.survey,
            seen.guest,
            &world.driver_source,
            &Catalogue::builtin(),
            (
                options(&job, seen.survey, windows),
                &preferences(&job, seen.survey),
            ),
        )
        .unwrap();
        let needs = || Err(Error::failed("looking for a file"));
        outside(&job, seen, (&draft, &basis), (needs(), Ok(()))).unwrap()
    });
    assert_eq!(outside.limits, []);
    assert_eq!(outside.failed.unwrap().message, "looking for a file");
}

/// A disk of the source that only the copy would open, or that cannot stay where it is.
#[test]
fn each_disk_beside_windows_can_stop_the_plan() {
    let world = World::new();
    let catalogue = Catalogue::builtin();
    let foreseen = |method| {
        let mut job = world.job();
        job.copy.method = method;
        world.seen(&job, |seen| {
            let mut list = seen.disks.to_vec();
            list[1].image = list[1].image.clone().shown_as(Format::VHDX);
            let system = list[0].id;
            let seen = Seen {
                disks: &VmDisks::with_roles(list, system, system),
                ..*seen
            };
            let (prepared, failed) =
                foreseen(&job, &seen, &world.driver_source, &catalogue).unwrap();
            let blockers = prepared.plan.blockers.iter();
            let codes: Vec<_> = blockers.map(|b| b.code.to_string()).collect();
            (codes, failed.map(|error| error.message))
        })
    };
    let (codes, failed) = foreseen(Copying::InPlace);
    assert!(codes.is_empty() && failed.unwrap().contains("--in-place"));
    assert_eq!(foreseen(Copying::Later).0, ["copy-later"]);
}

/// An accepted blocker is none, and stands in the plan.
#[test]
fn what_the_user_accepts_does_not_block_the_plan() {
    let mut world = World::new();
    world.guest.without("bootmgfw.efi");
    let codes = world.codes(|_| {});
    assert!(!codes.is_empty());
    let mut job = world.job();
    job.guest.accept = crate::ids::Accepted::parse(&codes).unwrap();
    let plan = world.foresee(&job).0.plan;
    assert_eq!(plan.blockers, []);
    assert_eq!(plan.accepted, codes);
}

/// The guest after the draft decides, not the guest as it is.
#[test]
fn the_plan_is_judged_by_the_guest_that_it_leaves() {
    let world = World::new();
    let job = world.job();
    let (prepared, failed) = world.foresee(&job);
    assert!(failed.is_none() && prepared.plan.blockers.is_empty());
    assert!(prepared.plan.ready, "{:?}", prepared.plan.checks);
    assert!(prepared.plan.checks.iter().any(|c| c.id == "boot-path"));
    assert!(prepared.backups.is_none(), "nothing is to be written");
    assert!(std::fs::read_dir(world.dir.path()).unwrap().count() == 2);
    let ids: Vec<_> = prepared
        .plan
        .actions
        .iter()
        .map(|action| action.id())
        .collect();
    assert!(ids.contains(&"hive-system") && ids.contains(&"files-viostor"));
    // Every disk stands in the outlook, that of the system first.
    let outlook = prepared.outlook.unwrap();
    let out = world.dir.path().join("out");
    assert_eq!(
        outlook.outputs.disks,
        [out.join("vm.qcow2"), out.join("vm-1.qcow2")]
    );
    assert_eq!(outlook.outputs.report, Some(out.join("report.json")));
}

#[test]
fn the_first_boot_knows_the_addresses_of_the_new_vm_and_the_scripts_of_the_user() {
    let world = World::new();
    let mut job = world.job();
    let of = |job: &Job| world.seen(job, |seen| preferences(job, seen.survey));
    let known = of(&job).macs;
    assert!(!known.is_empty(), "those of the adapters of the guest");
    let mac = "00:0c:29:aa:bb:cc".parse().unwrap();
    job.vm.machine.macs = vec![mac];
    job.guest.firstboot.user_scripts = vec![b"echo once".to_vec()];
    job.guest.firstboot.uninstall_tools = true;
    let found = of(&job);
    assert_eq!(found.macs, [mac]);
    assert_eq!(found.user_scripts, job.guest.firstboot.user_scripts);
    assert!(found.uninstall_tools && !found.none);
    // They arrive in the script.
    let (prepared, _) = world.foresee(&job);
    let mut files = prepared.basis.generated.iter();
    assert!(files.any(|(name, text)| name == "user-1.cmd" && text == b"echo once"));
}

#[test]
fn originals_are_saved_before_the_plan_is_made_where_something_is_to_be_written() {
    let world = World::new();
    let job = world.job();
    let folder = world.dir.path().join("partial");
    std::fs::create_dir(&folder).unwrap();
    let saver = Saver {
        folder: folder.clone(),
        durably: false,
    };
    let catalogue = Catalogue::builtin();
    let prepared = world.seen_with(&job, Some(&saver), |seen| {
        let (prepared, _) = foreseen(&job, seen, &world.driver_source, &catalogue).unwrap();
        prepared
    });
    assert!(prepared.backups.is_some());
}

#[test]
fn every_disk_beside_that_of_the_system_is_opened_before_the_plan() {
    let world = World::new();
    let mut job = world.job();
    let disks = |job: &Job, then: &dyn Fn(&VmDisks)| world.seen(job, |seen| then(seen.disks));
    disks(&job, &|disks| other_disks(&job, disks).unwrap());
    job.copy.method = Copying::InPlace;
    disks(&job, &|disks| other_disks(&job, disks).unwrap());
    // In place only raw and qcow2 can be written; of the first disk another step says so.
    let found = |job: &Job, which: usize| {
        world.seen(job, |seen| {
            let mut list = seen.disks.to_vec();
            list[which].image = list[which].image.clone().shown_as(Format::VHDX);
            let system = list[0].id;
            other_disks(job, &VmDisks::with_roles(list, system, system))
        })
    };
    found(&job, 0).unwrap();
    let error = found(&job, 1).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Usage);
    assert!(error.message.contains("--in-place"), "{error}");
}

/// The plan ends with what it cannot show only where nothing else has to be done first.
#[test]
fn blockers_come_before_errors_and_errors_before_missing_programs() {
    let world = World::new();
    let catalogue = Catalogue::builtin();
    let planned = |job: &Job| {
        world.seen(job, |seen| {
            plan_for(job, seen, &world.driver_source, &catalogue).map(|prepared| prepared.plan)
        })
    };
    let mut job = world.job();
    job.vm.machine.machine_type = Some("nonsense".into());
    let error = planned(&job).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Usage, "{error}");
    job.vm.machine.storage = DiskBus::Sata;
    let plan = planned(&job).unwrap();
    assert_eq!(plan.blockers.len(), 1, "{:?}", plan.blockers);
    match planned(&world.job()) {
        Ok(plan) => assert!(plan.ready),
        Err(error) => assert_eq!(error.kind, ErrorKind::MissingTool, "{error}"),
    }
}

#[test]
fn only_what_the_fix_uses_has_to_be_on_this_host() {
    let world = World::new();
    let (prepared, _) = world.foresee(&world.job());
    let all = prepared.plan.actions;
    let copies: Vec<_> = all
        .iter()
        .filter(|action| action.id().starts_with("files"))
        .cloned()
        .collect();
    assert!(!copies.is_empty() && copies.len() < all.len());
    let everything = [qemu_img::TOOL, qsd::TOOL, host::LIBHIVEX, host::LIBNTFS];
    for (actions, appliance, needed) in [
        (&all[..], false, &everything[..]),
        (&all[..], true, &everything[..3]),
        (
            &copies[..],
            false,
            &[qemu_img::TOOL, qsd::TOOL, host::LIBNTFS],
        ),
        (&[], false, &everything[..2]),
    ] {
        for gone in everything {
            let lacks = missing(actions, appliance, &|name| name != gone);
            assert_eq!(lacks.is_some(), needed.contains(&gone), "{gone}");
            if let Some(error) = lacks {
                assert_eq!(error.kind, ErrorKind::MissingTool);
                let said = error.message.clone();
                assert!(said.contains(gone.trim_end_matches(".so")), "{said}");
                assert_eq!(error.hints, [host::hint(gone)]);
            }
        }
        let nothing = missing(actions, appliance, &|_| false).unwrap();
        assert!(nothing.message.contains(qemu_img::TOOL), "{nothing}");
        assert!(missing(actions, appliance, &|_| true).is_none());
    }
}

#[test]
fn a_program_is_there_where_a_file_of_it_can_be_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("program");
    std::fs::write(&path, "#!").unwrap();
    for (mode, there) in [(0o600, false), (0o700, true)] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(&path, mode).unwrap();
        assert_eq!(is_there(path.to_str().unwrap()), there);
    }
    assert!(!is_there("no-such-program-here"));
}
