//! Whole conversions that QEMU takes part in. What is fixed in place, what stays on its source,
//! what passes of a sync have copied. Where QEMU is missing, its stand-in of the tests takes part.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::in_place::restore;
use super::job::{Copying, Job};
use super::plain_tests::{
    LOADER, MANAGER, all, contents, fixed, interrupted, open, read, same_files, unchanged,
    without_loader,
};
use super::sync::{Order, SyncState};
use super::testing::{Plain, SIZE, data, names, ui};
use super::*;
use crate::block::BlockRead;
use crate::demo::Role;
use crate::disk::Image;
use crate::disk::empty::create_qcow2;
use crate::disk::export::Export;
use crate::disk::{detect, stand_in};
use crate::domain::DiskFormat;
use crate::fix::journal::{FILE_NAME, Journal, JournalState};
use crate::later::Record;

pub(super) fn qcow2(path: &Path) -> Vec<u8> {
    let image = Image::open_info(path, Some("qcow2"), &[]).unwrap();
    let export = Export::<dyn BlockRead>::open_readonly(&image).unwrap();
    let mut bytes = vec![0; usize::try_from(image.virtual_size()).unwrap()];
    export.disk().read_at(0, &mut bytes).unwrap();
    export.close().unwrap();
    bytes
}

fn in_place_job(lab: &Plain, out: &str) -> Job {
    let mut job = lab.job();
    job.copy.method = Copying::InPlace;
    job.output.folder = Some(lab.path(out));
    job
}

#[test]
fn a_fix_in_place_is_written_to_its_disk_and_undone_to_the_byte() {
    let lab = without_loader();
    let before = contents(&lab);
    let job = in_place_job(&lab, "out");
    let report = convert_job(&job, &ui(), &all).unwrap();
    assert!(report.ready);
    assert_eq!(unchanged(&lab, &before), [false, true]);
    assert_eq!(report.outputs.disks, [lab.windows(), lab.data()]);
    let bytes = &report.bytes;
    assert!((1..1 << 20).contains(&bytes.written), "{bytes:?}");
    let figures = (bytes.virtual_size, bytes.skipped, bytes.read, bytes.left);
    assert_eq!(figures, (SIZE, SIZE - bytes.written, 0, 0));
    let guest = open(&lab.windows());
    let loader = read(&guest, Role::Esp, LOADER);
    assert!(loader.is_some() && loader == read(&guest, Role::Esp, MANAGER));
    drop(guest);
    let mut journal = Journal::load(&lab.path("out").join(FILE_NAME)).unwrap();
    assert_eq!(journal.doc.state, JournalState::Committed);
    assert!(journal.needs_undo() && journal.doc.disk.in_place);
    drop(job);
    let images = [Image::open_info(&lab.windows(), Some("raw"), &[]).unwrap()];
    let restored = restore(&images, &mut journal, false).unwrap();
    assert_eq!(restored, bytes.written);
    assert_eq!(journal.doc.state, JournalState::RolledBack);
    assert_eq!(unchanged(&lab, &before), [true, true]);
}

/// Makes a block of what was written neither the old nor the new one.
fn half_written(folder: &Path, disk: &Path) {
    let journal = Journal::load(&folder.join(FILE_NAME)).unwrap();
    let at = journal.doc.changed()[0].1.ranges[0].offset;
    let disk = fs::File::options().write(true).open(disk).unwrap();
    disk.write_all_at(&[0x5a; 512], at).unwrap();
}

/// Nobody else has what undoes it.
#[test]
fn a_disk_that_was_written_is_restored_where_a_later_step_fails() {
    let lab = without_loader();
    let before = contents(&lab);
    for lost in [false, true] {
        let job = in_place_job(&lab, "out");
        let error = fixed(
            &job,
            |_| {},
            |run, prepared, fixed| {
                let disks = in_place(&run, fixed.unwrap()).unwrap();
                assert_eq!(unchanged(&lab, &before), [false, true]);
                // In the way of the report.
                fs::create_dir(run.folder.path().join("report.html")).unwrap();
                if lost {
                    fs::remove_dir_all(run.folder.path().join("backup")).unwrap();
                } else {
                    half_written(run.folder.path(), &lab.windows());
                }
                finish::finish(run, &prepared, disks).map(drop).unwrap_err()
            },
        );
        let kind = match lost {
            true => ErrorKind::NotRolledBack,
            false => ErrorKind::RolledBack,
        };
        assert_eq!(error.kind, kind, "{error}");
        assert_eq!(unchanged(&lab, &before), [!lost, true]);
        // What may still undo it stays.
        assert_eq!(lab.path(".out.partial").exists(), lost);
        assert!(!lab.path("out").exists());
    }
}

#[test]
fn with_copy_later_every_disk_is_an_overlay_on_its_source() {
    let lab = without_loader();
    let before = contents(&lab);
    for trim in [true, false] {
        let mut job = lab.job();
        job.copy.method = Copying::Later;
        job.copy.format = DiskFormat::Qcow2;
        job.copy.trim = trim;
        let out = lab.path(&format!("out-{trim}"));
        job.output.folder = Some(out.clone());
        let outlook = plan_job(&job, &ui(), &all).unwrap().outlook.unwrap();
        assert!(
            outlook
                .disks
                .iter()
                .all(|disk| disk.later && disk.copied_at_most == 0)
        );
        stand_in::asked();
        let report = convert_job(&job, &ui(), &all).unwrap();
        assert!(report.ready);
        if stand_in::is_needed() {
            // The other disk has no hole.
            assert_eq!(stand_in::asked(), ["holes of .overlay.qcow2"], "{trim}");
        }
        assert_eq!(unchanged(&lab, &before), [true, true]);
        assert_eq!(report.outputs, outlook.outputs);
        assert!(!report.outputs.complete);
        let disks = ["vm.qcow2", "vm-1.qcow2"];
        assert_eq!(report.outputs.disks, disks.map(|name| out.join(name)));
        let record = Record::load(&out).unwrap().unwrap();
        let sources = [lab.windows(), lab.data()];
        let sizes = [SIZE, data().len() as u64];
        for (i, disk) in record.disks.iter().enumerate() {
            assert_eq!(
                (disk.file.as_str(), disk.virtual_size),
                (disks[i], sizes[i])
            );
            assert_eq!(disk.levels.len(), 1);
            let overlay = fs::File::open(out.join(disks[i])).unwrap();
            let len = overlay.metadata().unwrap().len();
            let below = detect::backing_name(&overlay, len).unwrap().unwrap();
            assert_eq!(below, sources[i].as_os_str().as_encoded_bytes());
            let level = &disk.levels[0];
            assert_eq!(
                (level.format.as_str(), &level.files[0].path),
                ("raw", &sources[i])
            );
        }
        assert_eq!(record.disks.len(), 2);
        let bytes = &report.bytes;
        let whole = sizes[0] + sizes[1];
        assert_eq!(
            (bytes.virtual_size, bytes.skipped),
            (whole, whole - bytes.left)
        );
        assert!((sizes[1]..48 << 20).contains(&bytes.left), "{bytes:?}");
        assert!(bytes.written > 0 && bytes.read == 0, "{bytes:?}");
        assert_eq!(report.trim.len(), if trim { 2 } else { 0 });
        let later = |warning: &String| warning == crate::later::WARNING;
        assert!(report.warnings.iter().any(later));
        let xml = fs::read_to_string(out.join("vm-final.xml")).unwrap();
        for source in &sources {
            assert!(xml.contains(source.to_str().unwrap()), "{xml}");
        }
        assert!(xml.contains("<backingStore type=\"file\""), "{xml}");
        assert!(!names(&out).iter().any(|name| name.starts_with('.')));
    }
}

/// A copy that was compared is as good as its source, and the report says so.
#[test]
fn a_copy_as_qcow2_is_checked_and_compared_where_that_is_wanted() {
    let lab = without_loader();
    for verify in [true, false] {
        let mut job = lab.job();
        job.copy.format = DiskFormat::Qcow2;
        job.copy.verify = verify;
        let out = lab.path(&format!("out-{verify}"));
        job.output.folder = Some(out.clone());
        let report = convert_job(&job, &ui(), &all).unwrap();
        assert_eq!(
            report.outputs.disks,
            ["vm.qcow2", "vm-1.qcow2"].map(|name| out.join(name))
        );
        let compared = |check: &&crate::check::Check| check.id == "copy-identical";
        let check = report.checks.iter().find(compared);
        assert_eq!(check.is_some(), verify);
        if let Some(check) = check {
            assert!(
                check.ok && check.message.starts_with("2 copies compared"),
                "{check:?}"
            );
        }
        assert!(qcow2(&out.join("vm-1.qcow2")) == data());
        let raw = lab.path("vm.raw");
        fs::write(&raw, qcow2(&out.join("vm.qcow2"))).unwrap();
        same_files(&lab, &raw, &[]);
    }
}

/// An empty snapshot of a raw disk: the VM writes to it.
pub(super) fn snapshot(base: &Path) -> PathBuf {
    let snapshot = base.with_extension("snap.qcow2");
    create_qcow2(&snapshot, fs::metadata(base).unwrap().len()).unwrap();
    name_base(&snapshot, base);
    snapshot
}

/// Writes into a qcow2 that it stands on a raw disk.
pub(super) fn name_base(snapshot: &Path, base: &Path) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(snapshot)
        .unwrap();
    let mut length = [0; 4];
    file.read_exact_at(&mut length, 100).unwrap();
    // The format of the backing file, and the end of the list.
    let mut extension = vec![0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3];
    extension.extend(b"raw\0\0\0\0\0\0\0\0\0\0\0\0\0");
    file.write_all_at(&extension, u64::from(u32::from_be_bytes(length)))
        .unwrap();
    let name = base.to_str().unwrap().as_bytes();
    file.write_all_at(name, 512).unwrap();
    file.write_all_at(&512u64.to_be_bytes(), 8).unwrap();
    file.write_all_at(&(name.len() as u32).to_be_bytes(), 16)
        .unwrap();
}

fn order(lab: &Plain) -> Order {
    let disks = [lab.data(), lab.windows()].map(|disk| snapshot(&disk));
    let mut job = super::testing::job(&disks, &lab.path("out"));
    for disk in &mut job.source.vm.disks {
        disk.format = Some("qcow2".into());
    }
    Order {
        source: disks[0].clone(),
        vm: job.source.vm,
        format: None,
        allow_backing: Vec::new(),
        folder: lab.path("out"),
        name: Some("vm".into()),
        pace: None,
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn passes_of_a_sync_copy_what_is_new_and_the_last_one_makes_the_result() {
    let lab = without_loader();
    let before = contents(&lab);
    let order = order(&lab);
    let out = lab.path("out");
    let state = super::sync::run(&order, &ui()).unwrap();
    assert_eq!(state.summary()["name"], "vm");
    let [first] = &state.passes[..] else {
        panic!("{:?}", state.passes);
    };
    let first = first.clone();
    let len = data().len() as u64;
    assert_eq!(
        (first.changed, first.change_rate, first.bandwidth),
        (0, 0.0, None)
    );
    assert!(
        (len + (2 << 20)..64 << 20).contains(&first.copied),
        "{first:?}"
    );
    assert!(
        first.at > 1_600_000_000 && first.seconds >= first.overhead_s && first.overhead_s > 0.0
    );
    // The snapshots are empty but for their tables.
    assert!((1..4 << 20).contains(&first.left), "{first:?}");
    assert!(first.projected_s > 0.0);
    let own = |stem: &str| [format!("{stem}.sync.journal"), format!("{stem}.sync.qcow2")];
    let [one, two] = [own("vm-1"), own("vm")];
    let mut wanted: Vec<_> = one.into_iter().chain(two).collect();
    wanted.insert(0, "sync.json".into());
    assert_eq!(names(&out), wanted);
    assert!(qcow2(&out.join("vm.sync.qcow2")) == data());
    // What a trim takes is left out; all else is there.
    let raw = lab.path("synced.raw");
    fs::write(&raw, qcow2(&out.join("vm-1.sync.qcow2"))).unwrap();
    same_files(&lab, &raw, &[]);
    let kept = json(&out.join("sync.json"));
    assert_eq!(kept["passes"][0]["copied"], first.copied);

    // Nothing is new.
    let state = super::sync::run(&order, &ui()).unwrap();
    assert_eq!(state.passes.len(), 2);
    assert_eq!((state.passes[1].copied, state.passes[1].changed), (0, 0));
    assert!(state.passes[1].at >= first.at);

    // The VM is off, and its snapshots are gone.
    for disk in &order.vm.disks {
        fs::remove_file(&disk.path).unwrap();
    }
    let mut job = lab.job();
    job.copy.format = DiskFormat::Qcow2;
    job.output.from_sync = true;
    job.output.budget = Some(1000);
    job.output.force = true;
    let report = convert_job(&job, &ui(), &all).unwrap();
    assert!(report.ready);
    assert_eq!(unchanged(&lab, &before), [true, true]);
    assert_eq!(
        report.outputs.disks,
        ["vm.qcow2", "vm-1.qcow2"].map(|name| out.join(name))
    );
    assert!(SyncState::load(&out).unwrap().is_none());
    let left = names(&out);
    assert!(!left.iter().any(|name| name.contains("sync")), "{left:?}");
    assert!(qcow2(&out.join("vm-1.qcow2")) == data());
    fs::write(&raw, qcow2(&out.join("vm.qcow2"))).unwrap();
    same_files(&lab, &raw, &[]);
    let guest = open(&raw);
    let loader = read(&guest, Role::Esp, LOADER);
    assert!(loader.is_some() && loader == read(&guest, Role::Esp, MANAGER));
    let sync = report.sync.unwrap();
    let copied = |i: usize| sync["passes"][i]["copied"].as_u64();
    assert_eq!(
        [copied(0), copied(1), copied(2)],
        [Some(first.copied), Some(0), None]
    );
    assert_eq!(
        (&sync["budget_s"], &sync["within_budget"]),
        (&json!(1000), &json!(true))
    );
    let last = &sync["last"];
    // What the fix wrote, and nothing else.
    let copied = last["copied"].as_u64().unwrap();
    assert!((1..2 << 20).contains(&copied), "{sync}");
    assert!(last["left"].as_u64().unwrap() < 1 << 20, "{sync}");
    let bytes = &report.bytes;
    // Whole grains are recorded.
    assert!(
        bytes.resumed <= first.copied && bytes.resumed + copied >= bytes.read,
        "{bytes:?} {sync}"
    );
    assert!(
        bytes.written > len && bytes.virtual_size == SIZE + len,
        "{bytes:?}"
    );
    // All that was read, whichever pass did.
    assert!(bytes.read > len + (2 << 20), "{bytes:?}");
}

/// Of an only disk, which took no time, nothing is recorded, and nothing waits for the disk of the host.
#[test]
fn the_record_of_a_copy_of_several_disks_is_durable_once_something_is_recorded() {
    let lab = without_loader();
    for (disks, verify, durable) in [(2, false, true), (1, false, false), (1, true, true)] {
        let mut job = lab.job();
        if disks == 1 {
            job = super::testing::job(&[lab.windows()], &lab.path("out"));
            job.drivers.source = Some(lab.path("drivers"));
            job.vm.machine.portable = true;
            job.copy.format = DiskFormat::Raw;
        }
        job.copy.verify = verify;
        job.output.folder = Some(lab.path(&format!("{disks}-{verify}")));
        interrupted(&job);
        let partial = lab.path(&format!(".{disks}-{verify}.partial"));
        let record = json(&partial.join(".work/resume.json"));
        assert_eq!(
            record["boot"].is_null(),
            durable,
            "{disks} {verify}: {record}"
        );
        assert_eq!(record["disks"].as_array().unwrap().len(), disks);
        // What is continued once may be needed after a restart of the host.
        job.output.resume = true;
        interrupted(&job);
        let record = json(&partial.join(".work/resume.json"));
        assert!(record["boot"].is_null(), "{disks} {verify}: {record}");
    }
}
