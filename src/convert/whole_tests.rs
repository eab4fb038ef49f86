//! Whole conversions in this process, where the programs for it are installed: what stands where afterwards,
//! and what the source holds.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::in_place::roll_back_after;
use super::job::{Copying, Job};
use super::sync::{Order, SyncState};
use super::testing::{Lab, SIZE, data, names, spec, ui};
use super::*;
use crate::block::{BlockRead, BlockWrite, FileDisk};
use crate::check::CheckState;
use crate::demo::{Role, guest};
use crate::disk::export::Export;
use crate::disk::{Image, partition};
use crate::domain::{DiskFormat, Emit};
use crate::error::ErrorKind;
use crate::fix::journal::{ActionState, FILE_NAME, Journal, JournalState};
use crate::guest::{EmbeddedReader, GuestPath, VolumeId, embedded};
use crate::inspect::Severity;
use crate::later::Record;
use crate::report::Report;
use crate::text::sha256_hex;
use crate::tool::Cmd;
use crate::types::DiskBus;

fn contents(path: &Path, format: &str) -> Vec<u8> {
    let image = Image::open_info(path, Some(format), &[]).unwrap();
    let export = Export::<dyn BlockRead>::open_readonly(&image).unwrap();
    let mut bytes = vec![0; usize::try_from(export.disk().size()).unwrap()];
    export.disk().read_at(0, &mut bytes).unwrap();
    export.close().unwrap();
    bytes
}

fn embedded_guest(disk: Vec<u8>) -> EmbeddedReader {
    let layout = partition::read_layout(&disk).unwrap();
    embedded::open(Arc::new(disk), &layout).unwrap()
}

/// What the source holds, MiB by MiB.
struct Source([Vec<String>; 2]);

impl Source {
    fn of(lab: &Lab) -> Self {
        Self([lab.windows(), lab.data()].map(|path| {
            let disk = FileDisk::open(&path).unwrap();
            let mut chunk = vec![0; 1 << 20];
            let mut digest = |mib: u64| {
                disk.read_at(mib << 20, &mut chunk).unwrap();
                sha256_hex(&chunk)
            };
            (0..disk.size() >> 20).map(&mut digest).collect()
        }))
    }

    /// Whether the disk with Windows and the one with data are what they were.
    fn is(&self, lab: &Lab) -> [bool; 2] {
        let now = Self::of(lab);
        [0, 1].map(|i| self.0[i] == now.0[i])
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The names in a directory with their modes.
fn listing(folder: &Path) -> BTreeMap<String, u32> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    let mode = |entry: &fs::DirEntry| entry.metadata().unwrap().permissions().mode() & 0o7777;
    let named = |entry: fs::DirEntry| (entry.file_name().into_string().unwrap(), mode(&entry));
    entries.map(named).collect()
}

/// Asserts that a converted VM boots from every controller.
fn ready(report: &Report) {
    assert!(report.ready, "{:?}", report.checks);
    let bad: Vec<_> = report.checks.iter().filter(|c| !c.ok).collect();
    assert!(bad.is_empty(), "{bad:?}");
    let buses = [DiskBus::Sata, DiskBus::VirtioBlk, DiskBus::VirtioScsi];
    assert_eq!(report.boots_from, buses);
    for bus in buses {
        assert!(report.controllers[&bus].ready, "{bus:?}");
    }
    assert!(!report.controllers_before[&DiskBus::VirtioBlk].ready);
    let path = report.checks.iter().find(|c| c.id == "boot-path").unwrap();
    for bus in buses {
        assert!(path.message.contains(bus.name()), "{}", path.message);
    }
    for id in ["files-as-planned", "registry-as-planned", "boot-path"] {
        assert!(report.checks.iter().any(|check| check.id == id), "{id}");
    }
    let done: Vec<_> = report.actions.iter().map(|action| action.state).collect();
    assert!(done.contains(&ActionState::Done), "{done:?}");
    let known = [ActionState::Done, ActionState::Skipped];
    assert!(done.iter().all(|state| known.contains(state)), "{done:?}");
}

#[test]
fn a_conversion_copies_every_disk_and_leaves_the_source_as_it_was() {
    let Some(lab) = Lab::new() else { return };
    let before = Source::of(&lab);
    let mut job = lab.job();
    job.copy.verify = true;
    job.vm.emit = vec![Emit::Qemu, Emit::Proxmox, Emit::Kubevirt];
    job.request.options = [("verify-copy".to_owned(), vec!["true".to_owned()])].into();
    let report = convert(&job, &ui()).unwrap();
    assert_eq!(before.is(&lab), [true, true], "the source");
    ready(&report);

    let out = lab.path("out");
    let modes = listing(&out);
    for (name, mode) in &modes {
        let wanted = match out.join(name).is_dir() || name.ends_with(".sh") {
            true => 0o700,
            false => 0o600,
        };
        // The report comes after all else was closed to others: its directory lets nobody list it.
        assert!(name == "report.json" || *mode == wanted, "{name} {mode:o}");
    }
    let wanted = [
        "backup",
        "generated",
        "journal.json",
        "plan.json",
        "registry",
        "report.html",
        "report.json",
        "vm-1.qcow2",
        "vm-bootstrap.xml",
        "vm-final.xml",
        "vm-kubevirt-bootstrap.yaml",
        "vm-kubevirt-final.yaml",
        "vm-probe.qcow2",
        "vm-proxmox.sh",
        "vm-qemu-bootstrap.sh",
        "vm-qemu-final.sh",
        "vm.qcow2",
    ];
    assert_eq!(modes.into_keys().collect::<Vec<_>>(), wanted);
    assert_eq!(
        names(out.parent().unwrap()),
        ["data.raw", "drivers", "out", "windows.raw"]
    );

    // The disk with Windows is the first, whatever the source says.
    assert_eq!(
        report.outputs.disks,
        [out.join("vm.qcow2"), out.join("vm-1.qcow2")]
    );
    assert!(report.outputs.complete);
    assert!(
        contents(&out.join("vm-1.qcow2"), "qcow2") == data(),
        "the data disk"
    );
    let windows = contents(&out.join("vm.qcow2"), "qcow2");
    assert_eq!(windows.len() as u64, SIZE);
    let bootstrap = fs::read_to_string(out.join("vm-bootstrap.xml")).unwrap();
    let last = fs::read_to_string(out.join("vm-final.xml")).unwrap();
    assert!(bootstrap.contains("vm-probe.qcow2") && bootstrap.contains("bus=\"sata\""));
    assert!(!last.contains("vm-probe.qcow2") && !last.contains("bus=\"sata\""));
    assert_eq!(
        report.outputs.bootstrap_xml,
        Some(out.join("vm-bootstrap.xml"))
    );
    assert_eq!(report.outputs.final_xml, Some(out.join("vm-final.xml")));
    assert_eq!(report.outputs.emitted.len(), 5);
    let probe = Image::open_info(&out.join("vm-probe.qcow2"), Some("qcow2"), &[]).unwrap();
    assert_eq!(probe.virtual_size(), 64 << 20);
    drop(probe);

    // Nothing of the guest got lost but what the trim took out.
    let guest = embedded_guest(windows);
    let spec = spec();
    let mut compared = 0;
    for file in guest::files(&spec).unwrap() {
        let name = file.path.name().unwrap_or_default().to_lowercase();
        let id = VolumeId::new(spec.partition(file.role).unwrap().index);
        let found = guest.read(id, &file.path, 64 << 20).unwrap();
        let edited =
            ["system", "software", "drivers", "bcd", "pagefile.sys"].contains(&name.as_str());
        assert!(edited || found == file.contents, "{}", file.path);
        compared += usize::from(!edited);
    }
    assert!(compared > 20, "{compared}");
    let driver = GuestPath::parse("\\Windows\\System32\\drivers\\viostor.sys").unwrap();
    let windows_volume = VolumeId::new(spec.partition(Role::Windows).unwrap().index);
    assert!(guest.stat(windows_volume, &driver).unwrap().is_some());

    // What it says of itself.
    let bytes = &report.bytes;
    assert_eq!(bytes.virtual_size, (SIZE) + data().len() as u64);
    assert_eq!(bytes.skipped, bytes.virtual_size - bytes.read);
    assert!(
        (data().len() as u64..64 << 20).contains(&bytes.read),
        "{bytes:?}"
    );
    assert!(bytes.written > 0 && (bytes.resumed, bytes.left, bytes.fetched) == (0, 0, 0));
    let trimmed: Vec<_> = report.trim.iter().map(|trim| trim.disk.clone()).collect();
    assert_eq!(trimmed, [lab.windows(), lab.data()]);
    let volumes = &report.trim[0].volumes;
    assert!(
        volumes
            .iter()
            .any(|v| v.files.iter().any(|f| f.freed_bytes > 0)),
        "{volumes:?}"
    );
    assert!(
        report
            .checks
            .iter()
            .any(|check| check.id == "copy-identical")
    );
    assert_eq!(report.request, job.request);
    assert_eq!(
        report.inspection.source.path,
        lab.windows().display().to_string()
    );
    let file = json(&out.join("report.json"));
    assert_eq!(
        (&file["schema"], &file["ready"]),
        (&"hyper2kvm/report/1".into(), &true.into())
    );
    let listed: Vec<_> = report.files.iter().map(|file| file.path.clone()).collect();
    for name in ["vm.qcow2", "vm-1.qcow2", "report.html", "backup/SYSTEM"] {
        assert!(listed.contains(&name.into()), "{name}: {listed:?}");
    }
    assert_eq!(json(&out.join("plan.json"))["schema"], "hyper2kvm/plan/1");

    // The originals of the hives, and the journal.
    let journal = Journal::load(&out.join(FILE_NAME)).unwrap();
    assert_eq!(journal.doc.state, JournalState::Verified);
    assert!(!journal.doc.disk.in_place && journal.doc.others.is_empty());
    assert_eq!(journal.doc.disk.path, lab.windows());
    let hives: Vec<_> = (journal.doc.actions.iter())
        .flat_map(|action| &action.changes)
        .filter_map(|change| Some((change.backup.as_ref()?, change.before.as_ref()?)))
        .collect();
    assert!(hives.len() >= 2, "{hives:?}");
    for (backup, was) in hives {
        let kept = fs::read(out.join(backup)).unwrap();
        assert_eq!(
            (kept.len() as u64, sha256_hex(&kept)),
            (was.size, was.sha256.clone())
        );
    }
    assert!(out.join("registry/SYSTEM.reg").is_file());

    // Once more into the same directory: not without --force, and then the result is another one.
    let again = convert(&job, &ui()).unwrap_err();
    assert!(again.message.ends_with("exists"), "{again}");
    job.output.force = true;
    job.copy.format = DiskFormat::Raw;
    job.copy.trim = false;
    let report = convert(&job, &ui()).unwrap();
    assert!(report.trim.is_empty());
    assert!(fs::read(out.join("vm-1.raw")).unwrap() == data());
    assert!(!out.join("vm.qcow2").exists() && !out.join("vm-qemu-final.sh.kept-1").exists());
}

#[test]
fn a_fix_in_place_is_undone_to_the_byte() {
    let Some(lab) = Lab::new() else { return };
    let before = Source::of(&lab);
    let mut job = lab.job();
    job.copy.method = Copying::InPlace;
    let report = convert(&job, &ui()).unwrap();
    ready(&report);
    // The other disk is not written to.
    assert_eq!(before.is(&lab), [false, true]);
    let out = lab.path("out");
    // Both belong to the VM, as they lie.
    assert_eq!(report.outputs.disks, [lab.windows(), lab.data()]);
    assert!(
        !names(&out)
            .iter()
            .any(|name| name.starts_with("vm.") || name.starts_with('.'))
    );
    assert!(report.bytes.written > 0 && report.bytes.written < 64 << 20);
    assert_eq!(report.bytes.virtual_size, SIZE);
    let mut journal = Journal::load(&out.join(FILE_NAME)).unwrap();
    assert_eq!(journal.doc.state, JournalState::Committed);
    assert!(journal.needs_undo() && journal.doc.disk.in_place);
    assert_eq!(journal.doc.disk.path, lab.windows());
    assert_eq!(report.trim, []);
    drop(job);
    let image = Image::open_info(&lab.windows(), Some("raw"), &[]).unwrap();
    restore(&[image], &mut journal, false).unwrap();
    assert_eq!(before.is(&lab), [true, true]);
    assert_eq!(journal.doc.state, JournalState::RolledBack);

    // Once more, and what comes after the commit fails.
    let stop = || Error::new(ErrorKind::Interrupted, "stop");
    for (i, (error, kind)) in [
        (Error::failed("no more"), ErrorKind::RolledBack),
        (stop(), ErrorKind::Interrupted),
    ]
    .into_iter()
    .enumerate()
    {
        let mut job = lab.job();
        job.copy.method = Copying::InPlace;
        job.output.folder = Some(lab.path(&format!("again-{i}")));
        convert(&job, &ui()).unwrap();
        assert_eq!(before.is(&lab), [false, true]);
        let path = lab.path(&format!("again-{i}")).join(FILE_NAME);
        let mut journal = Journal::load(&path).unwrap();
        drop(job);
        let job = lab.job();
        let disks = job.source.disks(&lab.path("work")).unwrap();
        let error = roll_back_after(&disks, &mut journal, error);
        assert_eq!(error.kind, kind, "{error}");
        assert_eq!(before.is(&lab), [true, true]);
    }
}

#[test]
fn a_fix_in_place_without_a_directory_for_its_undo_log_does_not_begin() {
    let Some(lab) = Lab::new() else { return };
    let before = Source::of(&lab);
    let mut job = lab.job();
    job.copy.method = Copying::InPlace;
    fs::create_dir(lab.path("out")).unwrap();
    fs::write(lab.path("out/mine"), "x").unwrap();
    let error = convert(&job, &ui()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Failed);
    assert_eq!(before.is(&lab), [true, true]);
    assert_eq!(names(&lab.path("out")), ["mine"]);
}

#[test]
fn with_copy_later_nothing_is_copied_and_the_disks_stand_on_the_source() {
    let Some(lab) = Lab::new() else { return };
    let before = Source::of(&lab);
    let mut job = lab.job();
    job.copy.method = Copying::Later;
    let report = convert(&job, &ui()).unwrap();
    ready(&report);
    assert_eq!(before.is(&lab), [true, true]);
    let out = lab.path("out");
    assert_eq!(
        report.outputs.disks,
        [out.join("vm.qcow2"), out.join("vm-1.qcow2")]
    );
    assert!(!report.outputs.complete);
    let record = Record::load(&out).unwrap().unwrap();
    let below: Vec<_> = (record.disks.iter())
        .map(|disk| (disk.file.clone(), disk.virtual_size, disk.levels.len()))
        .collect();
    let size = data().len() as u64;
    let wanted = [
        ("vm.qcow2".to_owned(), SIZE, 1),
        ("vm-1.qcow2".to_owned(), size, 1),
    ];
    assert_eq!(below, wanted);
    let bytes = &report.bytes;
    assert_eq!(bytes.virtual_size, (SIZE) + size);
    assert_eq!(bytes.skipped, bytes.virtual_size - bytes.left);
    // What is free of either disk is not left to be copied.
    assert!(
        (size + (1 << 20)..64 << 20).contains(&bytes.left),
        "{bytes:?}"
    );
    assert!(bytes.written > 0 && bytes.read == 0);
    assert!(
        report
            .warnings
            .iter()
            .any(|warning| warning == crate::later::WARNING)
    );
    let xml = fs::read_to_string(out.join("vm-final.xml")).unwrap();
    assert!(
        xml.contains("backingStore") && xml.contains("windows.raw"),
        "{xml}"
    );
    assert!(
        !names(&out)
            .iter()
            .any(|name| name.starts_with(".w") || name.starts_with(".o"))
    );
}

fn refused(job: &Job, says: &str) {
    let error = convert(job, &ui()).unwrap_err();
    let text = format!("{error} {:?} {:?}", error.hints, error.blockers);
    assert!(text.contains(says), "{says}: {text}");
}

#[test]
fn what_is_refused_leaves_nothing_behind() {
    let Some(lab) = Lab::new() else { return };
    let before = Source::of(&lab);
    let there = names(&lab.path(""));
    let mut job = lab.job();
    job.copy.devices = vec!["/dev/null".into()];
    refused(&job, "1 devices are named for 2 disks");
    let mut job = lab.job();
    job.drivers.source = None;
    refused(&job, "no virtio-win drivers");
    let mut job = lab.job();
    job.output.from_sync = true;
    refused(&job, "contains no synced VM");
    // What the disk holds is looked at, and cannot be converted.
    let mut job = lab.job();
    job.source.vm.disks.pop();
    job.vm.machine.name = "data alone".into();
    refused(&job, "no-partition-table");
    assert_eq!(before.is(&lab), [true, true]);
    assert_eq!(names(&lab.path("")), there);
}

/// The same reading and deciding, and nothing is written anywhere.
#[test]
fn a_plan_says_what_a_conversion_does_and_writes_nothing() {
    let Some(lab) = Lab::new() else { return };
    let before = Source::of(&lab);
    let there = names(&lab.path(""));
    let job = lab.job();
    let planned = plan_only(&job, &ui()).unwrap();
    assert_eq!(planned.plan.blockers, []);
    assert_eq!(before.is(&lab), [true, true]);
    assert_eq!(names(&lab.path("")), there);
    let report = convert(&job, &ui()).unwrap();
    let ids = |actions: &mut dyn Iterator<Item = String>| actions.collect::<Vec<_>>();
    let planned_ids = ids(&mut planned.plan.actions.iter().map(|a| a.id().to_owned()));
    let done = report
        .actions
        .iter()
        .filter(|a| a.state == ActionState::Done);
    assert_eq!(ids(&mut done.map(|a| a.id.clone())), planned_ids);
    let mut paths = serde_json::json!(planned.outlook.unwrap())["outputs"]["disks"].clone();
    let wanted: Vec<_> = report
        .outputs
        .disks
        .iter()
        .map(|d| d.display().to_string())
        .collect();
    assert_eq!(paths.take(), serde_json::json!(wanted));
    let blocking = |check: &&crate::check::Check| {
        check.severity == Severity::Blocker && check.state != CheckState::Ok
    };
    assert_eq!(
        report.checks.iter().find(blocking).map(|check| check.id),
        None
    );
}

/// Gives a disk a snapshot: what a VM writes from now on goes there.
fn snapshot(base: &Path) -> PathBuf {
    let snapshot = base.with_extension("snap.qcow2");
    Cmd::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([base, &snapshot])
        .run()
        .unwrap();
    snapshot
}

#[test]
fn a_sync_and_its_last_pass_have_what_the_vm_wrote_in_between() {
    let Some(lab) = Lab::new() else { return };
    let disks = [lab.data(), lab.windows()].map(|disk| snapshot(&disk));
    let mut job = super::testing::job(&disks, &lab.path("out"));
    job.drivers.source = Some(lab.path("drivers"));
    for disk in &mut job.source.vm.disks {
        disk.format = Some("qcow2".into());
    }
    let order = Order {
        source: disks[0].clone(),
        vm: job.source.vm.clone(),
        format: None,
        allow_backing: Vec::new(),
        folder: lab.path("out"),
        name: Some("vm".into()),
        pace: None,
    };
    let state = super::sync::run(&order, &ui()).unwrap();
    assert_eq!(state.passes.len(), 1);
    let first = &state.passes[0];
    assert!(
        first.copied > data().len() as u64 && first.changed == 0,
        "{first:?}"
    );
    // Nothing new: nothing is copied again.
    let state = super::sync::run(&order, &ui()).unwrap();
    assert_eq!((state.passes[1].copied, state.passes[1].changed), (0, 0));

    // The VM writes to its newest link.
    let mut wanted = data().to_vec();
    wanted[1 << 20..(1 << 20) + 4096].fill(0x5a);
    {
        let image = Image::open_info(&disks[0], Some("qcow2"), &[]).unwrap();
        let export = Export::<dyn BlockWrite>::open_writable(&image).unwrap();
        export.disk().write_at(1 << 20, &[0x5a; 4096]).unwrap();
        export.close().unwrap();
    }
    job.output.from_sync = true;
    job.copy.verify = true;
    let report = convert(&job, &ui()).unwrap();
    ready(&report);
    let out = lab.path("out");
    assert!(contents(&out.join("vm-1.qcow2"), "qcow2") == wanted);
    assert!(!out.join("sync.json").exists() && !out.join("vm.sync.qcow2").exists());
    assert!(SyncState::load(&out).unwrap().is_none());
    let sync = report.sync.unwrap();
    assert_eq!(sync["passes"].as_array().unwrap().len(), 2);
    // Of the disks little was left: the rest was there.
    let copied = sync["last"]["copied"].as_u64().unwrap();
    assert!(
        copied < data().len() as u64 + (32 << 20) && copied > 0,
        "{sync}"
    );
    assert!(report.bytes.resumed >= 2 << 20, "{:?}", report.bytes);
    let guest = embedded_guest(contents(&out.join("vm.qcow2"), "qcow2"));
    assert!(guest.volumes().len() > 1);
}
