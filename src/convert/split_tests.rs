//! Whole conversions of a Windows whose boot files are on another disk, and of disks that go to devices.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::devices::Devices;
use super::foresee::is_there;
use super::in_place::restore;
use super::job::Copying;
use super::plain_tests::{
    LOADER, MANAGER, all, fixed, interrupted, open, read, same_files, without_loader,
};
use super::testing::{Plain, SIZE, data, names, spec, ui};
use super::*;
use crate::block::{BlockRead, FileDisk};
use crate::demo::Role;
use crate::demo::bitlocker::{self, Lock, Reserved};
use crate::disk::device::ClaimedDevice;
use crate::disk::{Image, stand_in};
use crate::domain::DiskFormat;
use crate::fix::journal::{FILE_NAME, Journal, JournalState};
use crate::guest::fve::cipher::Method;
use crate::guest::keys::Keys;
use crate::guest::{DiskId, FsKind};
use crate::session::Access;
use crate::tool::host;

fn split() -> Plain {
    Plain::split(|guest| guest.without("bootx64.efi"))
}

fn has_loader(disk: &Path) -> bool {
    let guest = open(disk);
    let loader = read(&guest, Role::Esp, LOADER);
    loader.is_some() && loader == read(&guest, Role::Esp, MANAGER)
}

fn taken(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn boot_files_on_another_disk_are_fixed_trimmed_and_copied_there() {
    let lab = split();
    // With room for more: a copy is never larger than its disk.
    let file = File::options().write(true).open(lab.data()).unwrap();
    file.set_len(64 << 20).unwrap();
    let job = lab.split_job();
    let outlook = plan_job(&job, &ui(), &all).unwrap().outlook.unwrap();
    // What the fix adds may be on either of its disks.
    let sources = [lab.windows(), lab.boot(), lab.data()];
    let more: Vec<_> = (outlook.disks.iter().zip(&sources))
        .map(|(disk, source)| disk.copied_at_most - taken(source))
        .collect();
    assert!(
        more[0] > 0 && more[0] == more[1] && more[2] == 0,
        "{more:?}"
    );
    let report = convert_job(&job, &ui(), &all).unwrap();
    assert!(report.ready);
    let out = lab.path("out");
    let disks = ["vm.raw", "vm-1.raw", "vm-2.raw"].map(|name| out.join(name));
    assert_eq!(report.outputs.disks, disks);
    assert!(has_loader(&disks[1]) && !has_loader(&lab.boot()));
    let trimmed: Vec<_> = report.trim.iter().map(|trim| &trim.disk).collect();
    assert_eq!(trimmed, sources.each_ref());
    // The page file is that of Windows.
    let files = |i: usize| {
        report.trim[i]
            .volumes
            .iter()
            .map(|v| v.files.len())
            .sum::<usize>()
    };
    assert_eq!([files(0), files(1)], [1, 0]);
    assert!(fs::read(&disks[2]).unwrap().starts_with(data()));
    same_files(&lab, &disks[0], &[]);
}

#[test]
fn both_disks_that_a_fix_may_change_are_written_in_place_and_undone() {
    let lab = split();
    let sources = [lab.windows(), lab.boot(), lab.data()];
    let mut job = lab.split_job();
    job.copy.method = Copying::InPlace;
    let report = convert_job(&job, &ui(), &all).unwrap();
    assert!(report.ready);
    assert_eq!(report.outputs.disks, sources);
    assert!(has_loader(&lab.boot()));
    let bytes = &report.bytes;
    let figures = (bytes.virtual_size, bytes.skipped);
    assert_eq!(figures, (2 * SIZE, 2 * SIZE - bytes.written));
    let mut journal = Journal::load(&lab.path("out").join(FILE_NAME)).unwrap();
    assert_eq!(journal.doc.state, JournalState::Committed);
    let changed: Vec<_> = journal
        .doc
        .changed()
        .iter()
        .map(|(disk, _)| disk.path.clone())
        .collect();
    assert_eq!(changed, [lab.boot()], "Windows needs nothing");
    drop(job);
    let images = [Image::open_info(&lab.boot(), Some("raw"), &[]).unwrap()];
    restore(&images, &mut journal, false).unwrap();
    assert!(!has_loader(&lab.boot()));
}

#[test]
fn the_holes_of_every_overlay_are_marked_where_nothing_is_copied() {
    let lab = split();
    // A hole in front of an empty volume.
    let files = [".overlay", "boot", "overlay-2"].map(|n| format!("holes of {n}.qcow2"));
    for trim in [true, false] {
        let mut job = lab.split_job();
        job.copy.method = Copying::Later;
        job.copy.format = DiskFormat::Qcow2;
        job.copy.trim = trim;
        job.output.folder = Some(lab.path(&format!("out-{trim}")));
        let file = File::options().write(true).open(lab.data()).unwrap();
        file.set_len(8 << 20).unwrap();
        stand_in::asked();
        let report = convert_job(&job, &ui(), &all).unwrap();
        assert!(report.ready && !report.outputs.complete);
        if stand_in::is_needed() {
            assert_eq!(stand_in::asked(), files, "{trim}");
        }
    }
}

/// A conversion of two overlays that was interrupted has both of them.
#[test]
fn the_fix_on_both_disks_is_taken_over_by_a_resumed_conversion() {
    let lab = split();
    let mut job = lab.split_job();
    interrupted(&job);
    job.output.resume = true;
    let report = convert_job(&job, &ui(), &all).unwrap();
    assert!(report.ready && report.bytes.resumed > 0);
    assert!(has_loader(&lab.path("out/vm-1.raw")));
    assert_eq!(report.trim.len(), 3);
    assert!(fs::read(lab.path("out/vm-2.raw")).unwrap() == data());
}

/// The plan, or what was fixed, would be of two states.
#[test]
fn no_disk_of_the_source_changes_while_it_is_planned_or_before_it_is_written() {
    let lab = without_loader();
    let longer = || {
        let file = File::options().write(true).open(lab.data()).unwrap();
        file.set_len(5 << 20).unwrap();
    };
    let changing = |_: &str| {
        longer();
        true
    };
    let planned = plan_job(&lab.job(), &ui(), &changing).map(drop);
    assert!(planned.unwrap_err().to_string().contains("data.raw"));
    fs::write(lab.data(), data()).unwrap();
    let mut job = lab.job();
    job.copy.method = Copying::InPlace;
    let error = fixed(
        &job,
        |_| {},
        |run, _, fixed| {
            longer();
            in_place::in_place(&run, fixed.unwrap())
                .map(drop)
                .unwrap_err()
        },
    );
    assert!(error.to_string().contains("data.raw"), "{error}");
    assert!(!has_loader(&lab.windows()));
}

/// The preview shows a name that is no text with a substitute; libhivex cannot read it.
#[test]
fn a_plan_whose_hive_cannot_be_edited_ends_as_its_conversion_would() {
    let lab = Plain::with(|guest| {
        let service = r"ControlSet001\Services\vioscsi";
        guest.system.dword(service, "Start", 4);
        guest.system.dword(service, "\u{4e2d}\u{6587}", 1);
        guest.damage = Some(|hive| {
            let name = [0x2d, 0x4e, 0x87, 0x65];
            let at = hive.windows(4).position(|bytes| bytes == name).unwrap();
            // Half of a pair.
            hive[at..at + 2].copy_from_slice(&[0x00, 0xd8]);
        });
    });
    let job = lab.job();
    let planned = plan_job(&job, &ui(), &all).map(drop).unwrap_err();
    let converted = convert_job(&job, &ui(), &all).map(drop).unwrap_err();
    let kind = match is_there(host::LIBHIVEX) {
        true => ErrorKind::Failed,
        false => ErrorKind::MissingTool,
    };
    for error in [planned, converted] {
        let said = format!("{error} {}", error.causes().join(" "));
        assert_eq!(
            (error.kind, said.contains("libhivex")),
            (kind, true),
            "{said}"
        );
    }
}

/// Which parts of it are free is known only to who can read it.
#[test]
fn an_encrypted_volume_is_trimmed_with_the_keys_of_its_disk() {
    let lab = Plain::new();
    let windows = spec().partition(Role::Windows).unwrap();
    let (start, size) = (windows.start, windows.size);
    let at = |eighths: u64| size / 8 * eighths / (1 << 20) * (1 << 20);
    let places = Reserved {
        copies: [5, 6, 7].map(at),
        moved: at(4),
    };
    let (guid, key) = ([5; 16], [9; 32]);
    let method = bitlocker::Spec::new(Method::XtsAes128, &[Lock::StartupKey { guid, key }], places);
    let path = lab.path("encrypted.raw");
    fs::copy(lab.windows(), &path).unwrap();
    let plain: Arc<dyn BlockRead> = Arc::new(FileDisk::open(&lab.windows()).unwrap());
    let disk = FileDisk::open_rw(&path).unwrap();
    bitlocker::encrypt(&plain, &disk, start, size, &method).unwrap();
    drop(disk);
    let file = lab.path("key.bek");
    fs::write(&file, bitlocker::startup_key_file(guid, &key)).unwrap();
    let (keys, _) = Keys::parse(&[format!("all:file:{}", file.display())]).unwrap();
    for (name, keys, kind, files) in [
        ("without", Keys::default(), FsKind::Bitlocker, 0),
        ("with", keys, FsKind::Ntfs, 1),
    ] {
        let access = Access {
            keys,
            ..Access::default()
        };
        let source = access.disk(DiskId::ONLY, &path, Some("raw")).unwrap();
        let overlay = lab.path(&format!("{name}.qcow2"));
        let trimmed = copy::trimmed_overlay(&source, &overlay).unwrap().1;
        let mut volumes = trimmed.volumes.iter();
        let volume = volumes.find(|v| v.partition == windows.index).unwrap();
        let found = (volume.filesystem, volume.files.len());
        assert_eq!(found, (kind, files), "{name}: {volume:?}");
        assert_eq!(
            volume.freed_bytes > 1 << 20,
            files == 1,
            "{name}: {volume:?}"
        );
    }
}

/// Without `--resume` the next run removes it.
#[test]
fn a_copy_that_is_left_is_named_only_to_who_wants_to_continue() {
    let lab = without_loader();
    let mut job = lab.job();
    interrupted(&job);
    for (resume, hints) in [(false, 0), (true, 1)] {
        job.output.resume = resume;
        let error = explained(&job, Error::failed("why"));
        assert_eq!(error.hints.len(), hints, "{resume}");
    }
}

#[test]
fn a_large_sparse_disk_needs_room_for_its_data_only() {
    let lab = without_loader();
    let file = File::options().write(true).open(lab.data()).unwrap();
    file.set_len(2 << 40).unwrap();
    let report = convert_job(&lab.job(), &ui(), &all).unwrap();
    let bytes = &report.bytes;
    assert_eq!(bytes.virtual_size, SIZE + (2 << 40));
    assert!(bytes.read < 64 << 20, "{bytes:?}");
    // Windows does not take a smaller one for a disk.
    let probe = lab.path("out/vm-probe.qcow2");
    let probe = Image::open_info(&probe, Some("qcow2"), &[]).unwrap();
    assert_eq!(probe.virtual_size(), 64 << 20);
}

/// The files in place of the devices, larger than the disks.
fn devices(run: &mut Run<'_>, paths: &[PathBuf]) {
    let device = |path: &PathBuf| {
        drop(File::create_new(path).unwrap());
        let file = File::options().read(true).write(true).open(path).unwrap();
        file.set_len(SIZE + (1 << 20)).unwrap();
        ClaimedDevice::of_file(path, file, None)
    };
    run.devices = Devices::of(paths.iter().map(device).collect());
}

const UNFINISHED: &[u8] = b"hyper2kvm: the copy to this device was not finished";

#[test]
fn disks_go_to_their_devices_and_are_disks_once_the_result_has_its_name() {
    let lab = without_loader();
    for in_the_way in [false, true] {
        let mut job = lab.job();
        // A device is raw, whatever files are.
        job.copy.format = DiskFormat::Qcow2;
        let out = lab.path(&format!("out-{in_the_way}"));
        job.output.folder = Some(out.clone());
        let paths = [1, 2].map(|i| lab.path(&format!("device-{i}-{in_the_way}")));
        let start = |i: usize| {
            let mut bytes = vec![0; UNFINISHED.len()];
            FileDisk::open(&paths[i])
                .unwrap()
                .read_at(0, &mut bytes)
                .unwrap();
            bytes
        };
        let report = fixed(
            &job,
            |_| {},
            |mut run, prepared, fixed| {
                devices(&mut run, &paths);
                let decided = decided(&prepared.plan);
                let disks = copy::copy_disks(&run, fixed.unwrap(), &decided).unwrap();
                assert_eq!([start(0), start(1)], [UNFINISHED; 2]);
                if in_the_way {
                    fs::create_dir(&out).unwrap();
                    fs::write(out.join("mine"), "").unwrap();
                }
                finish::finish(run, &prepared, disks)
            },
        );
        if in_the_way {
            assert!(report.is_err());
            assert_eq!([start(0), start(1)], [UNFINISHED; 2]);
            continue;
        }
        let report = report.unwrap();
        assert_eq!(report.outputs.disks, paths);
        assert!(
            names(&out)
                .iter()
                .all(|name| !name.starts_with("vm.") && !name.starts_with("vm-1"))
        );
        assert!(has_loader(&paths[0]));
        same_files(&lab, &paths[0], &[]);
        let bytes = FileDisk::open(&paths[1]).unwrap();
        let mut copied = vec![0; data().len()];
        bytes.read_at(0, &mut copied).unwrap();
        assert!(copied == data());
        let xml = fs::read_to_string(out.join("vm-final.xml")).unwrap();
        assert_eq!(xml.matches("type=\"raw\"").count(), 2, "{xml}");
        let bytes = &report.bytes;
        assert_eq!((bytes.written, bytes.resumed), (bytes.read, 0));
    }
}
