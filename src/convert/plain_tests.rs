//! Whole conversions that need no program: a Windows that has its drivers already, on raw disks of this host. What it
//! lacks is a file of its boot partition, which is FAT.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use serde_json::{Value, json};

use super::fixing::Fixing;
use super::foresee::Seen;
use super::job::{Copying, Job};
use super::prepare::Prepared;
use super::steps::Fixed;
use super::testing::{Plain, SIZE, data, names, spec, ui};
use super::*;
use crate::block::{BlockRead, BlockWrite, FileDisk};
use crate::demo::Role;
use crate::disk::partition;
use crate::domain::DiskFormat;
use crate::error::ErrorKind;
use crate::fix::commit;
use crate::fix::journal::{ActionState, FILE_NAME, Journal, JournalState};
use crate::guest::{EmbeddedReader, GuestPath, VolumeId, embedded};
use crate::types::DiskBus;

pub(super) const LOADER: &str = r"\EFI\Boot\bootx64.efi";
pub(super) const MANAGER: &str = r"\EFI\Microsoft\Boot\bootmgfw.efi";

pub(super) fn all(_: &str) -> bool {
    true
}

fn convert_plain(job: &Job) -> Result<Report> {
    convert_job(job, &ui(), &all)
}

/// The steps of a conversion up to its fix; `change` is made to the plan.
pub(super) fn fixed<T>(
    job: &Job,
    change: impl FnOnce(&mut Prepared),
    then: impl FnOnce(Run<'_>, Prepared, Result<Fixed>) -> T,
) -> T {
    let ui = ui();
    let run = Run::open(job, &ui).unwrap();
    let (mut session, survey) = run.inspect().unwrap();
    let opening = run.open_overlays(&session, &survey.inspection).unwrap();
    let driver_source = job.drivers.source().unwrap();
    let saver = run.resumed.is_none().then(|| run.saver());
    let seen = Seen {
        survey: &survey,
        guest: &session.reader(),
        look: &|guest| session.inspect_through(guest),
        disks: &run.disks,
        engine: session.engine,
        target: run.folder.target(),
        saver: saver.as_ref(),
        has: &all,
    };
    let catalogue = job.drivers.catalogue().unwrap();
    let mut prepared = foresee::plan_for(job, &seen, driver_source.as_ref(), &catalogue).unwrap();
    let backups = prepared.backups.take();
    change(&mut prepared);
    run.keep_plan(&prepared, &survey.inspection).unwrap();
    session.take_overlays(opening).unwrap();
    let fixing = Fixing {
        run: &run,
        prepared: &prepared,
        backups,
        driver_source: &prepared.basis.driver_source(driver_source.as_ref()),
    };
    let fixed = match &run.resumed {
        Some(resumed) => fixing.fixed_before(session, survey, resumed),
        None => fixing.fix(session, survey),
    };
    then(run, prepared, fixed)
}

/// A Windows without its fall-back loader.
pub(super) fn without_loader() -> Plain {
    Plain::with(|guest| guest.without("bootx64.efi"))
}

pub(super) fn open(disk: &Path) -> EmbeddedReader {
    let disk = Arc::new(FileDisk::open(disk).unwrap());
    let layout = partition::read_layout(disk.as_ref()).unwrap();
    embedded::open(disk, &layout).unwrap()
}

pub(super) fn volume(role: Role) -> VolumeId {
    VolumeId::new(spec().partition(role).unwrap().index)
}

pub(super) fn read(guest: &EmbeddedReader, role: Role, path: &str) -> Option<Vec<u8>> {
    let path = GuestPath::parse(path).unwrap();
    guest.stat(volume(role), &path).unwrap()?;
    Some(guest.read(volume(role), &path, 64 << 20).unwrap())
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The blocks that are not zero of the disk with Windows and of the one with data.
pub(super) fn contents(lab: &Plain) -> [Vec<(u64, Vec<u8>)>; 2] {
    [lab.windows(), lab.data()].map(|path| {
        // Past its lock: a run may hold the disk.
        let file = fs::File::open(path).unwrap();
        let mut all = Vec::new();
        let mut at = 0;
        while let Ok(start) = seek(&file, SeekFrom::Data(at)) {
            at = seek(&file, SeekFrom::Hole(start)).unwrap();
            let mut bytes = vec![0; (at - start) as usize];
            file.read_exact_at(&mut bytes, start).unwrap();
            let blocks = (start..).step_by(4096).zip(bytes.chunks(4096));
            let data = blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0));
            all.extend(data.map(|(at, block)| (at, block.to_vec())));
        }
        all
    })
}

/// Whether the disk with Windows and the one with data are what they were.
pub(super) fn unchanged(lab: &Plain, before: &[Vec<(u64, Vec<u8>)>; 2]) -> [bool; 2] {
    let now = contents(lab);
    [0, 1].map(|i| now[i] == before[i])
}

/// Passes every file of the guest before and after, but for those that a trim empties.
pub(super) fn same_files(lab: &Plain, converted: &Path, more: &[&str]) {
    let (was, is) = (open(&lab.windows()), open(converted));
    let mut compared = 0;
    for file in &lab.guest.files {
        let path = file.path.to_string();
        let name = file.path.name().unwrap_or_default();
        if name.eq_ignore_ascii_case("pagefile.sys") || more.contains(&path.as_str()) {
            continue;
        }
        let before = read(&was, file.role, &path);
        assert!(
            before.is_some() && read(&is, file.role, &path) == before,
            "{path}"
        );
        compared += 1;
    }
    assert!(compared > 100, "{compared}");
}

#[test]
fn a_conversion_without_any_program_copies_what_was_fixed_and_says_all_of_it() {
    let lab = without_loader();
    let before = contents(&lab);
    let job = lab.job();
    let there = names(&lab.path(""));
    let planned = plan_job(&job, &ui(), &all).unwrap();
    assert_eq!(names(&lab.path("")), there, "a plan writes nothing");
    let ids: Vec<_> = planned
        .plan
        .actions
        .iter()
        .map(|action| action.id())
        .collect();
    assert_eq!(ids, ["uefi-fallback"]);
    let outlook = planned.outlook.unwrap();
    let disks: Vec<_> = (outlook.disks.iter())
        .map(|disk| {
            (
                disk.path.clone(),
                disk.virtual_size,
                disk.format,
                disk.later,
            )
        })
        .collect();
    let out = lab.path("out");
    let len = data().len() as u64;
    let wanted = [
        (out.join("vm.raw"), SIZE, DiskFormat::Raw, false),
        (out.join("vm-1.raw"), len, DiskFormat::Raw, false),
    ];
    assert_eq!(disks, wanted);
    // What the fix adds is on the disk with Windows.
    assert_eq!(outlook.disks[1].copied_at_most, len);
    assert!(outlook.disks[0].copied_at_most > 4 << 20);
    let report = convert_plain(&job).unwrap();
    assert_eq!(unchanged(&lab, &before), [true, true]);
    assert_eq!(report.outputs, outlook.outputs);
    let wanted = [
        "generated",
        "journal.json",
        "plan.json",
        "report.html",
        "report.json",
        "vm-1.raw",
        "vm-bootstrap.xml",
        "vm-final.xml",
        "vm-probe.qcow2",
        "vm.raw",
    ];
    assert_eq!(names(&out), wanted);
    // The disk with Windows is the first, whatever the source says.
    let windows = out.join("vm.raw");
    assert_eq!(
        report.outputs.disks,
        [windows.clone(), out.join("vm-1.raw")]
    );
    assert_eq!(
        report.outputs.bootstrap_xml,
        Some(out.join("vm-bootstrap.xml"))
    );
    assert_eq!(report.outputs.final_xml, Some(out.join("vm-final.xml")));
    assert_eq!(report.outputs.report, Some(out.join("report.json")));
    assert!(report.outputs.complete);
    for (document, bus) in [("vm-bootstrap.xml", "sata"), ("vm-final.xml", "virtio")] {
        let xml = fs::read_to_string(out.join(document)).unwrap();
        let at = |disk: &Path| xml.find(&format!("file=\"{}\"", disk.display()));
        let places = report.outputs.disks.iter().map(|disk| at(disk));
        let places: Vec<_> = places.map(|place| place.expect(document)).collect();
        assert!(places.is_sorted(), "{xml}");
        let target = xml[places[0]..].split("<target").nth(1).unwrap();
        let target = target.split('>').next().unwrap();
        assert!(target.contains(&format!("bus=\"{bus}\"")), "{xml}");
        assert_eq!(xml.matches("type=\"raw\"").count(), 2, "{xml}");
    }
    let html = fs::read_to_string(out.join("report.html")).unwrap();
    for part in [
        "vm.raw",
        "vm-1.raw",
        "uefi-fallback",
        "journal.json",
        "generated",
    ] {
        assert!(html.contains(part), "{part}");
    }
    assert!(fs::read(out.join("vm-1.raw")).unwrap() == data());
    same_files(&lab, &windows, &[]);
    let (was, is) = (open(&lab.windows()), open(&windows));
    assert_eq!(read(&was, Role::Esp, LOADER), None);
    let loader = read(&is, Role::Esp, LOADER);
    assert!(loader.is_some() && loader == read(&was, Role::Esp, MANAGER));

    assert_eq!((report.name.as_str(), report.engine), ("vm", "embedded"));
    assert!(report.ready && report.accepted.is_empty());
    let buses = [DiskBus::Sata, DiskBus::VirtioBlk, DiskBus::VirtioScsi];
    assert_eq!(report.boots_from, buses);
    assert!(buses.iter().all(|bus| report.controllers[bus].ready));
    assert_eq!(report.actions.len(), 1 + planned.plan.skipped.len());
    for (i, action) in report.actions.iter().enumerate() {
        let state = if i == 0 {
            ActionState::Done
        } else {
            ActionState::Skipped
        };
        assert_eq!(action.state, state, "{}", action.id);
    }
    assert_eq!(
        report.actions[0].description,
        planned.plan.actions[0].describe()
    );
    assert!(
        report.checks.iter().all(|check| check.ok),
        "{:?}",
        report.checks
    );
    for id in ["files-as-planned", "boot-path", "uefi-fallback"] {
        assert!(report.checks.iter().any(|check| check.id == id), "{id}");
    }
    assert_eq!(report.warnings, planned.plan.warnings);
    assert_eq!(
        report.inspection.source.path,
        lab.windows().display().to_string()
    );
    assert_eq!((report.transport, report.sync.is_none()), ("file", true));
    let timings = &report.timings;
    let steps = timings.inspect_s + timings.fix_s + timings.copy_s;
    let shortest = timings.inspect_s.min(timings.fix_s).min(timings.copy_s);
    assert!(shortest > 0.0 && timings.total_s >= steps, "{timings:?}");
    let whole = SIZE + data().len() as u64;
    let bytes = &report.bytes;
    assert_eq!(bytes.virtual_size, whole);
    assert_eq!(bytes.skipped, whole - bytes.read);
    assert!(
        (data().len() as u64..32 << 20).contains(&bytes.read),
        "{bytes:?}"
    );
    assert!(bytes.written > data().len() as u64, "{bytes:?}");
    assert_eq!((bytes.resumed, bytes.left, bytes.fetched), (0, 0, 0));

    let journal = Journal::load(&out.join(FILE_NAME)).unwrap().doc;
    assert_eq!(
        (journal.state, journal.others.len()),
        (JournalState::Verified, 0)
    );
    let disk = &journal.disk;
    assert_eq!((&disk.path, disk.size_bytes), (&lab.windows(), SIZE));
    assert!(disk.format == "raw" && !disk.in_place && journal.undo.is_none());
    let states: Vec<_> = journal.actions.iter().map(|action| action.state).collect();
    let said: Vec<_> = report.actions.iter().map(|action| action.state).collect();
    assert_eq!(states, said);
    let [change] = &journal.actions[0].changes[..] else {
        panic!("{:?}", journal.actions[0]);
    };
    assert_eq!(
        json!(change)["path"],
        json!(GuestPath::parse(r"\EFI\Boot\BOOTX64.EFI").unwrap())
    );
    let plan = json(&out.join("plan.json"));
    assert_eq!(plan["schema"], "hyper2kvm/plan/1");
    assert_eq!(plan["actions"][0]["id"], "uefi-fallback");
    assert_eq!(plan["outputs"]["disks"][0], windows.display().to_string());
    let file = json(&out.join("report.json"));
    assert_eq!(
        (&file["schema"], &file["bytes"]),
        (&json!("hyper2kvm/report/1"), &json!(bytes))
    );
    assert_eq!(names(&out.join("generated")), ["firstboot.cmd"]);
    let listed: Vec<_> = report.files.iter().map(|file| file.path.clone()).collect();
    for name in ["vm.raw", "vm-1.raw", "plan.json", "generated/firstboot.cmd"] {
        assert!(listed.contains(&name.into()), "{name}: {listed:?}");
    }
}

/// A hint of a refusal is the check that failed.
#[test]
fn a_fix_that_does_not_make_the_disk_ready_is_no_result_unless_that_was_accepted() {
    let lab = without_loader();
    let before = contents(&lab);
    let job = lab.job();
    let nothing = |prepared: &mut Prepared| prepared.plan.actions.clear();
    let error = fixed(&job, nothing, |_, _, fixed| fixed.map(drop).unwrap_err());
    assert_eq!(error.kind, ErrorKind::Failed);
    assert!(
        error.message.contains("did not make this disk boot-ready"),
        "{error}"
    );
    assert_eq!(error.hints.len(), 1, "{error:?}");
    assert!(error.hints[0].starts_with("[uefi-fallback] "), "{error:?}");
    assert_eq!(unchanged(&lab, &before), [true, true]);
    assert_eq!(names(&lab.path("")), ["data.raw", "drivers", "windows.raw"]);

    let accepted = |prepared: &mut Prepared| {
        prepared.plan.actions.clear();
        prepared.plan.accepted = vec!["uefi-fallback".into()];
        let mut checks = prepared.plan.checks.iter_mut();
        let check = checks.find(|check| check.id == "uefi-fallback").unwrap();
        check.accepted = true;
    };
    let report = fixed(&job, accepted, |mut run, prepared, fixed| {
        run.clock.fixed();
        let fixed = fixed.unwrap();
        assert_eq!(fixed.journal.doc.state, JournalState::Verified);
        let disks = copy::copy_disks(&run, fixed, &decided(&prepared.plan)).unwrap();
        finish::finish(run, &prepared, disks).unwrap()
    });
    assert!(!report.ready);
    assert_eq!(report.accepted, ["uefi-fallback"]);
    let failed: Vec<_> = report.checks.iter().filter(|check| !check.ok).collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert!(failed[0].id == "uefi-fallback" && failed[0].accepted);
    let states: Vec<_> = report.actions.iter().map(|action| action.state).collect();
    assert!(
        states.iter().all(|state| *state == ActionState::Skipped),
        "{states:?}"
    );
}

#[test]
fn a_trim_takes_page_files_and_free_space_and_nothing_else() {
    let lab = without_loader();
    let page_file = r"\pagefile.sys";
    let was = read(&open(&lab.windows()), Role::Windows, page_file).unwrap();
    assert!(was.len() > 1 << 20 && was.iter().all(|byte| *byte == 0xa5));
    // What a deleted file left, in the middle of the free space of either volume.
    let spec = spec();
    let left: Vec<_> = [Role::Windows, Role::Esp]
        .map(|role| spec.partition(role).unwrap())
        .map(|partition| partition.start + partition.size / 4 * 3 / (1 << 20) * (1 << 20))
        .into();
    let disk = FileDisk::open_rw(&lab.windows()).unwrap();
    left.iter()
        .for_each(|at| disk.write_at(*at, &vec![7; 1 << 20]).unwrap());
    let mut job = lab.job();
    let mut read_bytes = Vec::new();
    for trimmed in [true, false] {
        job.copy.trim = trimmed;
        job.output.folder = Some(lab.path(&format!("out-{trimmed}")));
        let report = convert_plain(&job).unwrap();
        let windows = report.outputs.disks[0].clone();
        same_files(&lab, &windows, &[]);
        let kept = read(&open(&windows), Role::Windows, page_file).unwrap();
        let zeroes = kept.iter().filter(|byte| **byte == 0).count();
        let copied = FileDisk::open(&windows).unwrap();
        for at in &left {
            let mut bytes = vec![1; 1 << 20];
            copied.read_at(*at, &mut bytes).unwrap();
            let wanted = if trimmed { 0 } else { 7 };
            assert!(bytes.iter().all(|byte| *byte == wanted), "{at} {trimmed}");
        }
        read_bytes.push(report.bytes.read);
        if !trimmed {
            assert!(kept == was && report.trim.is_empty());
            continue;
        }
        // Whole grains only.
        assert!(zeroes >= kept.len() - (128 << 10), "{zeroes}");
        let disks: Vec<_> = report.trim.iter().map(|trim| trim.disk.clone()).collect();
        assert_eq!(disks, [lab.windows(), lab.data()]);
        let volumes = &report.trim[0].volumes;
        let of = |role| {
            volumes
                .iter()
                .find(|v| v.partition == volume(role).partition)
                .unwrap()
        };
        let windows = of(Role::Windows);
        assert_eq!(windows.files.len(), 1);
        assert_eq!(windows.files[0].freed_bytes, zeroes as u64);
        assert_eq!(windows.freed_bytes, zeroes as u64 + (1 << 20));
        assert!(of(Role::Esp).freed_bytes >= 1 << 20 && of(Role::Msr).kept.is_some());
    }
    let freed = (2 << 20) + was.len() as u64;
    let less = read_bytes[1] - read_bytes[0];
    assert!(less > freed - (256 << 10), "{read_bytes:?}");
}

#[test]
fn what_blocks_a_plan_refuses_the_conversion_and_nothing_stays() {
    let lab = without_loader();
    let before = contents(&lab);
    let mut job = lab.job();
    let there = names(&lab.path(""));
    job.drivers.require_signed = true;
    let planned = plan_job(&job, &ui(), &all).unwrap();
    let codes = |list: &[crate::error::Blocker]| -> Vec<_> {
        list.iter()
            .map(|blocker| blocker.code.to_string())
            .collect()
    };
    assert!(!planned.plan.blockers.is_empty());
    let error = convert_plain(&job).map(drop).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Refused);
    assert_eq!(codes(&error.blockers), codes(&planned.plan.blockers));
    assert!(error.message.contains("windows.raw"), "{error}");
    // A program that is missing is said before anything is written.
    let job = lab.job();
    let none = |_: &str| false;
    let error = convert_job(&job, &ui(), &none).map(drop).unwrap_err();
    assert_eq!(error.kind, ErrorKind::MissingTool);
    let error = plan_job(&job, &ui(), &none).map(drop).unwrap_err();
    assert_eq!(error.kind, ErrorKind::MissingTool);
    assert_eq!(unchanged(&lab, &before), [true, true]);
    assert_eq!(names(&lab.path("")), there);
}

#[test]
fn a_disk_in_place_that_needs_nothing_is_not_written_and_belongs_to_the_vm() {
    let lab = Plain::new();
    let before = contents(&lab);
    let mut job = lab.job();
    job.copy.method = Copying::InPlace;
    let report = convert_plain(&job).unwrap();
    assert!(report.ready);
    assert_eq!(unchanged(&lab, &before), [true, true]);
    assert_eq!(report.outputs.disks, [lab.windows(), lab.data()]);
    assert!(report.outputs.complete && report.trim.is_empty());
    let bytes = &report.bytes;
    let figures = (bytes.virtual_size, bytes.written, bytes.skipped, bytes.read);
    assert_eq!(figures, (SIZE, 0, SIZE, 0));
    let out = lab.path("out");
    assert!(
        names(&out)
            .iter()
            .all(|name| !name.ends_with(".raw") && !name.starts_with('.'))
    );
    let journal = Journal::load(&out.join(FILE_NAME)).unwrap();
    assert_eq!(journal.doc.state, JournalState::Verified);
    assert!(journal.doc.disk.in_place && !journal.needs_undo());
    let xml = fs::read_to_string(out.join("vm-final.xml")).unwrap();
    assert!(xml.contains(lab.windows().to_str().unwrap()) && xml.contains("type=\"raw\""));
}

/// Both must be there before the first block is written.
#[test]
fn the_undo_log_has_the_old_and_the_new_blocks_of_all_that_the_overlay_changes() {
    let lab = without_loader();
    let mut job = lab.job();
    job.copy.method = Copying::InPlace;
    let before = contents(&lab);
    fixed(
        &job,
        |_| {},
        |run, _, fixed| {
            let mut fixed = fixed.unwrap();
            assert!(fixed.trim.is_empty(), "nothing is copied");
            let changed = in_place::save_undo_logs(&run.disks, &mut fixed).unwrap();
            let folder = run.folder.path().to_path_buf();
            let mut journal = Journal::load(&folder.join(FILE_NAME)).unwrap();
            let [(disk, log)] = &journal.doc.changed()[..] else {
                panic!("{:?}", journal.doc);
            };
            assert_eq!(disk.path, lab.windows());
            let total: u64 = log.ranges.iter().map(|range| range.len).sum();
            assert!(
                total == changed && (1..1 << 20).contains(&changed),
                "{changed}"
            );
            assert_eq!(journal.doc.state, JournalState::Verified);
            let windows = FileDisk::open_rw(&lab.windows()).unwrap();
            commit::commit(&mut journal, &[&windows]).unwrap();
            let guest = open(&lab.windows());
            assert_eq!(
                read(&guest, Role::Esp, LOADER),
                read(&guest, Role::Esp, MANAGER)
            );
            same_files(&lab, &lab.windows(), &[]);
            commit::rollback(&mut journal, &[&windows], false).unwrap();
            assert_eq!(unchanged(&lab, &before), [true, true]);
            run.folder.keep(false);
        },
    );
}

/// A conversion whose disks were copied and that ended there.
pub(super) fn interrupted(job: &Job) {
    fixed(
        job,
        |_| {},
        |run, prepared, fixed| {
            let copied = copy::copy_disks(&run, fixed.unwrap(), &decided(&prepared.plan));
            copied.map(drop).unwrap();
            run.folder.keep(true);
        },
    );
}

#[test]
fn a_resumed_conversion_fixes_nothing_again_and_copies_what_is_missing() {
    let lab = without_loader();
    let mut job = lab.job();
    interrupted(&job);
    let partial = lab.path(".out.partial");
    job.output.resume = true;
    // It decides otherwise.
    job.guest.firstboot.user_scripts = vec![b"echo once".to_vec()];
    let error = convert_plain(&job).map(drop).unwrap_err();
    assert!(error.message.contains("decided otherwise"), "{error}");
    let error = explained(&job, error);
    let kept = |error: &Error| error.hints.iter().any(|hint| hint.contains("it goes when"));
    assert!(kept(&error), "{error:?}");
    // Said once.
    let hints = error.hints.clone();
    assert_eq!(explained(&job, error).hints, hints);
    job.guest.firstboot.user_scripts.clear();
    assert!(partial.join(super::work::OVERLAY).exists());

    let report = convert_plain(&job).unwrap();
    assert!(report.ready);
    let bytes = &report.bytes;
    // Whole grains are recorded.
    let all = bytes.resumed;
    assert!(
        all >= bytes.read && all < bytes.read + (16 << 20),
        "{bytes:?}"
    );
    assert_eq!(report.actions[0].state, ActionState::Done);
    assert_eq!(report.trim.len(), 2);
    let out = lab.path("out");
    let guest = open(&out.join("vm.raw"));
    assert_eq!(
        read(&guest, Role::Esp, LOADER),
        read(&guest, Role::Esp, MANAGER)
    );
    same_files(&lab, &out.join("vm.raw"), &[]);
    assert!(!partial.exists());
    assert!(
        !kept(&explained(&job, Error::failed("why"))),
        "nothing is left"
    );

    // The data disk is another one since: it is copied again, the other is not.
    job.output.folder = Some(lab.path("again"));
    job.output.resume = false;
    interrupted(&job);
    let mut other = data().to_vec();
    other[..1 << 20].fill(0x77);
    fs::write(lab.data(), &other).unwrap();
    job.source.access = crate::session::Access::default();
    job.output.resume = true;
    let report = convert_plain(&job).unwrap();
    let len = data().len() as u64;
    let bytes = &report.bytes;
    assert_eq!(bytes.resumed, all - len, "{bytes:?}");
    assert!(fs::read(lab.path("again/vm-1.raw")).unwrap() == other);
    // Nothing is resumed where nothing was left.
    job.output.folder = Some(lab.path("new"));
    assert_eq!(convert_plain(&job).unwrap().bytes.resumed, 0);
}

#[test]
fn an_error_without_a_signal_stays_as_it_is() {
    let job = super::testing::job(&["/a.raw".into()], Path::new("/out"));
    for kind in [ErrorKind::Failed, ErrorKind::Usage, ErrorKind::RolledBack] {
        let error = explained(&job, Error::new(kind, "why").hint("this"));
        assert_eq!((error.kind, error.message.as_str()), (kind, "why"));
        assert_eq!(error.hints, ["this"]);
    }
}

/// A plan and a conversion refuse the same, before anything is written.
#[test]
fn what_the_user_asks_for_is_checked_before_the_guest_is_read() {
    let lab = Plain::new();
    let there = names(&lab.path(""));
    type Case = (fn(&Plain, &mut Job), &'static str);
    let cases: [Case; 5] = [
        (
            |_, job| job.copy.devices = vec!["/dev/null".into()],
            "1 devices are named for 2 disks",
        ),
        (
            |_, job| job.drivers.source = None,
            "no virtio-win drivers were named",
        ),
        (
            |_, job| job.output.from_sync = true,
            "contains no synced VM",
        ),
        (
            |lab, job| job.output.folder = Some(lab.path("drivers")),
            "is not an output directory of this program",
        ),
        (
            |_, job| job.drivers.config = vec!["/no/such.yaml".into()],
            "reading the driver catalogue",
        ),
    ];
    for (change, says) in cases {
        let mut job = lab.job();
        change(&lab, &mut job);
        let errors = [
            plan_job(&job, &ui(), &all).map(drop).unwrap_err(),
            convert_plain(&job).map(drop).unwrap_err(),
        ];
        for error in errors {
            assert!(error.message.contains(says), "{says}: {error}");
        }
        assert_eq!(names(&lab.path("")), there, "{says}");
    }
    // A disk that another program writes to is not changed in place, and plans are made of it.
    let mut job = lab.job();
    job.copy.method = Copying::InPlace;
    let other = lab.job();
    let held = other.source.disks(&lab.path("work")).unwrap();
    held[0].image.hold_for_writing().unwrap();
    assert!(plan_job(&job, &ui(), &all).is_err() && convert_plain(&job).is_err());
    assert_eq!(names(&lab.path("")), there);
}

/// The result would be of two states.
#[test]
fn a_source_that_changes_during_a_conversion_has_no_result() {
    let lab = without_loader();
    let touch = |path: &Path| {
        let file = FileDisk::open_rw(path).unwrap();
        file.write_at(0, &[9; 512]).unwrap();
        drop(file);
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        fs::File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_modified(later)
            .unwrap();
    };
    let job = lab.job();
    let error = fixed(
        &job,
        |_| {},
        |mut run, prepared, fixed| {
            let disks = copy::copy_disks(&run, fixed.unwrap(), &decided(&prepared.plan)).unwrap();
            touch(&lab.data());
            run.clock.copied();
            finish::finish(run, &prepared, disks).map(drop).unwrap_err()
        },
    );
    assert!(error.to_string().contains("data.raw"), "{error}");
    assert!(!lab.path("out").exists());
    // It holds its disks.
    drop(job);

    let mut job = lab.job();
    job.copy.method = Copying::InPlace;
    job.output.folder = Some(lab.path("in-place"));
    let error = fixed(
        &job,
        |_| {},
        |run, _, fixed| {
            touch(&lab.windows());
            in_place(&run, fixed.unwrap()).map(drop).unwrap_err()
        },
    );
    assert!(error.to_string().contains("windows.raw"), "{error}");
    assert_eq!(error.kind, ErrorKind::Failed);
    assert_eq!(read(&open(&lab.windows()), Role::Esp, LOADER), None);
}

/// A blocked plan is not carried out, whoever made it.
#[test]
fn a_plan_with_a_blocker_is_not_kept() {
    let lab = without_loader();
    let job = lab.job();
    fixed(
        &job,
        |_| {},
        |run, mut prepared, fixed| {
            let before = fixed.unwrap().before;
            let folder = run.folder.path().to_path_buf();
            fs::remove_file(folder.join("plan.json")).unwrap();
            let blocker = crate::error::Blocker::new("guest-space", "full", "empty it");
            prepared.plan.blockers = vec![blocker.clone()];
            let error = run.keep_plan(&prepared, &before).unwrap_err();
            assert_eq!(
                (error.kind, error.blockers),
                (ErrorKind::Refused, vec![blocker])
            );
            assert!(!folder.join("plan.json").exists());
            prepared.plan.blockers.clear();
            run.keep_plan(&prepared, &before).unwrap();
            assert!(folder.join("plan.json").exists());
        },
    );
    assert!(!lab.path("out").exists() && !lab.path(".out.partial").exists());
}

/// A disk that was written must not lose the directory that can undo it.
#[test]
fn what_fails_after_a_fix_in_place_is_told_with_the_state_of_the_disk() {
    let lab = without_loader();
    for (in_place, journal, kind) in [
        (true, true, ErrorKind::Failed),
        (true, false, ErrorKind::NotRolledBack),
        (false, false, ErrorKind::Failed),
    ] {
        let mut job = lab.job();
        if in_place {
            job.copy.method = Copying::InPlace;
        }
        let error = fixed(
            &job,
            |_| {},
            |run, prepared, fixed| {
                let fixed = fixed.unwrap();
                let target = |disk: &crate::session::Disk| {
                    let (id, image) = (disk.id, disk.image.clone());
                    let of = disks::Disk::new(&run.disks, id, image, &fixed.before);
                    of.at(disk.path.clone(), DiskFormat::Raw, Vec::new())
                };
                let disks = steps::Disks {
                    targets: run.disks.iter().map(target).collect(),
                    bytes: crate::report::Bytes::default(),
                    fixed,
                };
                // In the way of the report.
                fs::create_dir(run.folder.path().join("report.html")).unwrap();
                if !journal {
                    fs::remove_file(run.folder.path().join(FILE_NAME)).unwrap();
                }
                finish::finish(run, &prepared, disks).map(drop).unwrap_err()
            },
        );
        assert_eq!(error.kind, kind, "{in_place} {journal}: {error}");
        let causes = error.causes().join(" ");
        assert!(
            format!("{error} {causes}").contains("report.html"),
            "{error} {causes}"
        );
        assert!(!lab.path("out").exists());
    }
}
