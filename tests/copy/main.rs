//! The copy contains only what Windows needs, verified with ntfs-3g's own tools.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // skips must be seen

#[path = "../support/mod.rs"]
mod support;

mod devices;
mod faults;
mod resume;
mod resume_campaign;
mod scale;
mod sync;
mod sync_campaign;
mod sync_nbd;
mod sync_time;
mod sync_wire;

use std::fs::{self, File};
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper2kvm::block::FileDisk;
use hyper2kvm::demo::{DemoVolume, ExtraFile, GuestSpec, Role, WinVersion, guest};
use hyper2kvm::disk::layout::{DiskLayout, Scheme};
use hyper2kvm::disk::partition;
use hyper2kvm::guest::ntfs3g::MountOptions;
use hyper2kvm::guest::{EmbeddedWriter, GuestPath, GuestRead, GuestWrite, VolumeId, embedded};
use serde_json::Value;
use support::{Lab, TOOLS, h2k, have, sha256, tool, virtio_win};

const MIB: u64 = 1 << 20;
const PAGEFILE: u64 = 24 * MIB;
const DELETED: u64 = 48 * MIB;
/// The start of every 4 KiB in a file that is deleted later.
const MARK: &[u8; 16] = b"DELETED-DATA-H2K";

/// Bytes that differ from file to file.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| next()).collect();
    bytes.truncate(len);
    bytes
}

/// A populated Windows 10 whose volume also has 48 MiB of deleted data, in one block and in gaps
/// between existing files.
fn populated() -> Lab {
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = 1 << 30;
    spec.pagefile_size = PAGEFILE;
    for i in 0..120u64 {
        let place = if i % 40 == 0 {
            DemoVolume::Boot
        } else {
            DemoVolume::Windows
        };
        spec.extra_files.push(ExtraFile {
            place,
            path: format!("Data\\{}\\file {i}.bin", i % 7),
            contents: noise((i * i * 37 % 300_000) as usize, i + 1),
        });
    }
    let lab = Lab::new(spec);
    let layout = guest::layout(&lab.spec);
    let volume = VolumeId::new(lab.spec.partition(Role::Windows).unwrap().index);
    leave_deleted_data(&lab.raw, &layout, volume);
    let disk = File::options().write(true).open(&lab.raw).unwrap();
    for (i, gap) in gaps(&lab).iter().enumerate() {
        // Away from the partition table, which lies in the first and the last 17 KiB.
        let middle = (gap.start + gap.end) / 2 / 512 * 512;
        disk.write_all_at(&noise(8 << 10, 77 + i as u64), middle)
            .unwrap();
    }
    lab
}

/// The ranges outside of partitions: before the first one, and behind the last.
fn gaps(lab: &Lab) -> [Range<u64>; 2] {
    let parts = lab.spec.partitions();
    let start = parts.iter().map(|p| p.start).min().unwrap();
    let end = parts.iter().map(|p| p.start + p.size).max().unwrap();
    [0..start, end..lab.spec.disk_size]
}

fn bytes_at(disk: &Path, range: &Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    File::open(disk)
        .unwrap()
        .read_exact_at(&mut bytes, range.start)
        .unwrap();
    bytes
}

fn writer(disk: &Path, layout: &DiskLayout) -> Box<EmbeddedWriter> {
    let disk = Arc::new(FileDisk::open_rw(disk).unwrap());
    Box::new(EmbeddedWriter::new(disk, layout, MountOptions::default()))
}

fn path(text: &str) -> GuestPath {
    GuestPath::parse(text).unwrap()
}

fn leave_deleted_data(disk: &Path, layout: &DiskLayout, volume: VolumeId) {
    let mut writer = writer(disk, layout);
    let mut junk = vec![0x5a; MIB as usize];
    for block in junk.chunks_mut(4096) {
        block[..MARK.len()].copy_from_slice(MARK);
    }
    for i in 0..DELETED / MIB {
        let name = path(&format!("junk{i}"));
        writer.write_file(volume, &name, &junk).unwrap();
        let stays = path(&format!("stays{i}"));
        writer
            .write_file(volume, &stays, &noise(5000, 900 + i))
            .unwrap();
    }
    for i in 0..DELETED / MIB {
        writer
            .remove_file(volume, &path(&format!("junk{i}")))
            .unwrap();
    }
    writer.close().unwrap();
}

/// How much deleted data an image still has.
fn deleted_bytes(raw: &Path) -> u64 {
    let mut file = File::open(raw).unwrap();
    let mut chunk = vec![0; MIB as usize];
    let mut found = 0;
    loop {
        let n = file.read(&mut chunk).unwrap();
        if n == 0 {
            return found;
        }
        let blocks = chunk[..n].chunks(4096);
        found += 4096 * blocks.filter(|b| b.starts_with(MARK)).count() as u64;
    }
}

fn number(report: &Value, name: &str) -> u64 {
    report["bytes"][name].as_u64().unwrap()
}

fn trimmed<'r>(report: &'r Value, lab: &Lab, role: Role) -> &'r Value {
    let index = lab.spec.partition(role).unwrap().index;
    let volumes = report["trim"][0]["volumes"].as_array().unwrap();
    volumes.iter().find(|v| v["partition"] == index).unwrap()
}

/// Compares every file of the Windows volume except those that the fix changes, with ntfs-3g's
/// tools; the ESP with the other reader. Returns their number.
fn live_files_are_identical(lab: &Lab, target: &Path) -> usize {
    live_files_are_the_same(lab, target, DELETED / MIB)
}

/// The same for a volume with so many files that were left between deleted ones.
fn live_files_are_the_same(lab: &Lab, target: &Path, stays: u64) -> usize {
    let old = fs::rename(lab.volume(&lab.raw), lab.path("old.ntfs")).map(|()| lab.path("old.ntfs"));
    let (old, new) = (old.unwrap(), lab.volume(target));
    let mut names: Vec<(Role, String)> = guest::files(&lab.spec)
        .unwrap()
        .into_iter()
        .map(|f| (f.role, f.path.to_slashes()))
        .collect();
    names.extend((0..stays).map(|i| (Role::Windows, format!("stays{i}"))));
    let layout = partition::read_layout(&FileDisk::open(&lab.raw).unwrap()).unwrap();
    let open = |p: &Path| embedded::open(Arc::new(FileDisk::open(p).unwrap()), &layout).unwrap();
    let (source, result) = (open(&lab.raw), open(target));
    let mut count = 0;
    for (role, name) in names {
        let changed = name.ends_with("config/SYSTEM")
            || name.ends_with("config/SOFTWARE")
            || name.ends_with("config/DRIVERS")
            || name == "pagefile.sys";
        if changed {
            continue;
        }
        count += 1;
        if role == Role::Windows {
            assert!(
                lab.ntfscat(&old, &name) == lab.ntfscat(&new, &name),
                "{name}"
            );
        }
        let volume = VolumeId::new(lab.spec.partition(role).unwrap().index);
        let read = |guest: &dyn GuestRead| guest.read(volume, &path(&name), 1 << 30).unwrap();
        assert!(read(&source) == read(&result), "{role:?} {name}");
    }
    count
}

#[test]
fn only_live_bytes_are_copied() {
    if !have(&TOOLS) {
        return;
    }
    let lab = populated();
    let digest = sha256(&lab.raw);
    // Some of it was overwritten by later files.
    let junk = deleted_bytes(&lab.raw);
    assert!(junk > DELETED * 9 / 10);

    let report = lab
        .convert(&lab.raw, &["--format", "raw", "--verify-copy"])
        .expect(0)
        .json();
    let disk = lab.path("out/guest.raw");
    assert!(live_files_are_identical(&lab, &disk) > 200);
    let volume = lab.volume(&disk);
    tool("ntfsfix", &["--no-action", volume.to_str().unwrap()]);
    let pagefile = lab.ntfscat(&volume, "pagefile.sys");
    assert_eq!(pagefile.len() as u64, PAGEFILE);
    // Up to the clusters of the overlay that the page file shares with others.
    let left = pagefile.iter().filter(|b| **b != 0).count();
    assert!(
        left < 256 << 10,
        "{left} bytes of the page file were copied"
    );
    // Data outside of partitions is copied to the last byte, including the partition table.
    for gap in gaps(&lab) {
        assert!(gap.end - gap.start > 64 << 10, "{gap:?}");
        assert!(bytes_at(&lab.raw, &gap) == bytes_at(&disk, &gap), "{gap:?}");
    }
    let deleted = deleted_bytes(&disk);
    assert!(deleted < DELETED / 8, "{deleted} deleted bytes were copied");

    let windows = trimmed(&report, &lab, Role::Windows);
    assert!(windows["kept"].is_null(), "{windows}");
    assert!(windows["freed_bytes"].as_u64().unwrap() > (DELETED + PAGEFILE) * 7 / 8);
    assert_eq!(windows["files"][0]["path"], "\\pagefile.sys");
    let (read, written) = (number(&report, "read"), number(&report, "written"));
    assert_eq!(
        read + number(&report, "skipped"),
        number(&report, "virtual")
    );
    assert!(written < read + 4 * MIB, "{written} of {read}: not sparse");
    assert_eq!(fs::metadata(&disk).unwrap().blocks() * 512, written);
    let checks = report["checks"].to_string();
    assert!(checks.contains("copy-identical"), "{checks}");

    // Without the trim everything is copied.
    let all = lab
        .convert(&lab.raw, &["--format", "raw", "--no-trim", "--force"])
        .expect(0)
        .json();
    assert_eq!(all["trim"], serde_json::json!([]));
    // The fix takes free clusters for its own files.
    assert!(deleted_bytes(&disk) > junk * 9 / 10);
    let pagefile = lab.ntfscat(&lab.volume(&disk), "pagefile.sys");
    assert!(pagefile.iter().all(|b| *b == 0xa5));
    assert!(number(&all, "read") > read + (DELETED + PAGEFILE) * 7 / 8);
    assert_eq!(sha256(&lab.raw), digest, "the source was changed");
}

#[test]
fn shadow_copies_are_left_alone() {
    if !have(&TOOLS) {
        return;
    }
    let lab = populated();
    let volume = VolumeId::new(lab.spec.partition(Role::Windows).unwrap().index);
    let mut writer = writer(&lab.raw, &guest::layout(&lab.spec));
    let folder = "System Volume Information";
    // Windows has already created it on some guests.
    let _ = writer.create_dir(volume, &path(folder));
    let store = "{5e7a3a04-32a5-11ef-9d2b-000c29f3ffde}{3808876b-c176-4e48-b7ae-04046e6cc752}";
    writer
        .write_file(
            volume,
            &path(&format!("{folder}\\{store}")),
            &noise(70_000, 7),
        )
        .unwrap();
    writer.close().unwrap();

    let report = lab.convert(&lab.raw, &["--format", "raw"]).expect(0).json();
    let windows = trimmed(&report, &lab, Role::Windows);
    let why = windows["kept"].as_str().unwrap();
    assert!(why.contains("shadow copies"), "{why}");
    assert_eq!(windows["freed_bytes"], 0);
    let disk = lab.path("out/guest.raw");
    assert!(deleted_bytes(&disk) > DELETED * 8 / 10);
    let pagefile = lab.ntfscat(&lab.volume(&disk), "pagefile.sys");
    assert!(pagefile.iter().all(|b| *b == 0xa5));
    assert!(trimmed(&report, &lab, Role::Esp)["kept"].is_null());
    nothing_was_zeroed(&lab, &disk);
}

/// Fails if a grain of the Windows volume with data reads as zeroes now.
fn nothing_was_zeroed(lab: &Lab, disk: &Path) {
    let part = lab.spec.partition(Role::Windows).unwrap();
    let mut had_data = 0;
    for at in (part.start..part.start + part.size).step_by(64 << 10) {
        let grain = at..(at + (64 << 10)).min(part.start + part.size);
        let empty = |disk| bytes_at(disk, &grain).iter().all(|b| *b == 0);
        if empty(&lab.raw) {
            continue;
        }
        had_data += 1;
        assert!(!empty(disk), "{grain:?}");
    }
    assert!(had_data * (64 << 10) > DELETED + PAGEFILE);
}

/// The description of a VM with these disks.
fn machine(lab: &Lab, disks: &[&Path]) -> PathBuf {
    let mut devices = String::new();
    for (file, letter) in disks.iter().zip('a'..) {
        devices += &format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/>\
             <source file='{}'/><target dev='sd{letter}' bus='sata'/></disk>",
            file.display()
        );
    }
    let xml = lab.path("machine.xml");
    let text = format!(
        "<domain type='kvm'><name>many</name><memory unit='MiB'>2048</memory>\
         <vcpu>2</vcpu><os><type arch='x86_64'>hvm</type></os><devices>{devices}</devices></domain>"
    );
    fs::write(&xml, text).unwrap();
    xml
}

#[test]
fn several_disks_are_copied_together() {
    if !have(&TOOLS) {
        return;
    }
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = 1 << 30;
    let lab = Lab::new(spec);
    // A disk without a partition table is one volume.
    let data = lab.path("data.raw");
    File::create(&data).unwrap().set_len(200 * MIB).unwrap();
    tool("mkntfs", &["-F", "-Q", "-q", data.to_str().unwrap()]);
    let layout = DiskLayout {
        scheme: Scheme::None,
        sector_size: 512,
        disk_id: None,
        partitions: Vec::new(),
    };
    leave_deleted_data(&data, &layout, VolumeId::new(0));
    let other = lab.path("other.raw");
    fs::write(&other, noise(3 * MIB as usize, 5)).unwrap();
    let xml = machine(&lab, &[&data, &lab.raw, &other]);
    let digests = [&lab.raw, &data, &other].map(|p| sha256(p));
    let out = lab.path("out");
    let run = h2k([
        "convert",
        xml.to_str().unwrap(),
        "--virtio-iso",
        virtio_win().to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
        "--json",
        "--progress",
        "json",
    ])
    .expect(0);
    let report = run.json();
    assert_eq!(report["outputs"]["disks"].as_array().unwrap().len(), 3);
    assert_eq!(digests, [&lab.raw, &data, &other].map(|p| sha256(p)));

    let result = lab.raw_result(&out.join("many-1.qcow2"));
    assert!(deleted_bytes(&result) < DELETED / 8);
    for i in 0..DELETED / MIB {
        let name = format!("stays{i}");
        assert!(
            lab.ntfscat(&result, &name) == lab.ntfscat(&data, &name),
            "{name}"
        );
    }
    // Data that is not a file system is copied to the last byte.
    assert_eq!(
        sha256(&lab.raw_result(&out.join("many-2.qcow2"))),
        digests[2]
    );

    let lines: Vec<Value> = run
        .stderr
        .lines()
        .filter(|l| l.starts_with('{'))
        .inspect(|l| assert!(l.starts_with("{\"version\":"), "{l}"))
        .map(|l| serde_json::from_str::<Value>(l).unwrap())
        .filter(|l| l["schema"] == "hyper2kvm/progress/1")
        .collect();
    // Five a second, and one at the end.
    let seconds = report["timings"]["copy_s"].as_f64().unwrap();
    assert!(lines.len() as f64 <= 2.0 + seconds * 5.0, "{}", run.stderr);
    for line in &lines {
        assert!(line["done_bytes"].as_u64() <= line["total_bytes"].as_u64());
        assert!(line["bytes_per_second"].is_u64() && !line["seconds_left"].is_string());
    }
    let last = lines.last().expect("no progress line");
    assert_eq!(last["done_bytes"], report["bytes"]["read"]);
    assert_eq!(last["total_bytes"], report["bytes"]["read"]);
    assert_eq!(last["skipped_bytes"], report["bytes"]["skipped"]);
}
