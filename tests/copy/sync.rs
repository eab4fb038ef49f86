//! `sync` and the last pass on chains: with a VM that writes to the newest link, kills, merged
//! links, and a file system whose map of free clusters is older than its data.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use hyper2kvm::block::FileDisk;
use hyper2kvm::demo::{GuestSpec, Role, WinVersion, guest};
use hyper2kvm::guest::ntfs3g::MountOptions;
use hyper2kvm::guest::{EmbeddedWriter, GuestWrite, VolumeId};
use rustix::fs::SeekFrom;
use serde_json::Value;

use super::support::{
    Lab, Run, TOOLS, binary, create_overlay, finish, have, names, sha256, text, tool, virtio_win,
};
use super::{MIB, machine, noise, number, path};

pub(super) fn lab() -> Lab {
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = 512 * MIB;
    spec.recovery = false;
    spec.pagefile_size = 0;
    Lab::new(spec)
}

pub(super) fn run(verb: &str, source: &Path, out: &Path, more: &[&str], point: &str) -> Run {
    finish(command(verb, source, out, more, point))
}

pub(super) fn command(
    verb: &str,
    source: &Path,
    out: &Path,
    more: &[&str],
    point: &str,
) -> Command {
    let mut command = Command::new(binary());
    command
        .args([verb, "--json"])
        .arg(source)
        .arg("-o")
        .arg(out)
        .args(more)
        .env("HYPER2KVM_FAILPOINT", point);
    if matches!(verb, "convert" | "plan") {
        command.arg("--virtio-iso").arg(virtio_win());
    }
    command
}

pub(super) fn last_pass(run: &Run) -> Value {
    let document = run.json();
    let passes = document["sync"]["passes"].as_array().unwrap();
    passes.last().unwrap().clone()
}

/// A new link that reads as `now`, on the link that the VM wrote to before.
pub(super) fn link(lab: &Lab, name: &str, below: &Path, format: &str, now: &Path) -> PathBuf {
    let link = lab.path(name);
    create_overlay(text(now), "raw", &link);
    let rebase = [
        "rebase",
        "-f",
        "qcow2",
        "-F",
        format,
        "-b",
        text(below),
        text(&link),
    ];
    tool("qemu-img", &rebase);
    link
}

/// The disk as the VM has it now, changed in its file system.
pub(super) fn write(lab: &Lab, disk: &Path, name: &str, bytes: &[u8]) {
    let volume = VolumeId::new(lab.spec.partition(Role::Windows).unwrap().index);
    let file = Arc::new(FileDisk::open_rw(disk).unwrap());
    let layout = guest::layout(&lab.spec);
    let mut writer = Box::new(EmbeddedWriter::new(file, &layout, MountOptions::default()));
    writer.write_file(volume, &path(name), bytes).unwrap();
    writer.close().unwrap();
}

/// Has the link open like a VM that writes to it.
struct Running(Child);

impl Running {
    fn on(link: &Path) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", "qcow2", text(link)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"length\n")
            .unwrap();
        let mut answer = [0; 1];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut answer).unwrap();
        Self(child)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The contents of a file of the converted guest.
pub(super) fn file_in(lab: &Lab, disk: &Path, name: &str) -> Vec<u8> {
    let raw = lab.raw_result(disk);
    lab.ntfscat(&lab.volume(&raw), name)
}

#[test]
fn a_vm_is_synced_while_it_runs_and_the_rest_is_copied_when_it_is_off() {
    if !have(&TOOLS) || !have(&["qemu-io"]) {
        return;
    }
    let lab = lab();
    let (out, data) = (lab.path("out"), noise(30 * MIB as usize, 1));
    write(&lab, &lab.raw, "first.bin", &data);
    let now = lab.path("now.raw");
    fs::copy(&lab.raw, &now).unwrap();
    let one = link(&lab, "one.qcow2", &lab.raw, "raw", &now);
    let running = Running::on(&one);
    // It cannot be converted now, but synced.
    let refused = run("convert", &one, &lab.path("other"), &[], "");
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    let pass = last_pass(&run("sync", &one, &out, &["--name", "guest"], "").expect(0));
    assert!(pass["copied"].as_u64().unwrap() > 30 * MIB, "{pass}");
    assert_eq!(
        names(&out),
        ["guest.sync.journal", "guest.sync.qcow2", "sync.json"]
    );
    drop(running);
    // Nothing has changed below the newest link: nothing is copied.
    let pass = last_pass(&run("sync", &one, &out, &[], "").expect(0));
    assert_eq!(pass["copied"], 0, "{pass}");
    // A second snapshot: only the data of the first is copied.
    write(&lab, &now, "second.bin", &noise(12 * MIB as usize, 2));
    fs::remove_file(&one).unwrap();
    let one = link(&lab, "one.qcow2", &lab.raw, "raw", &now);
    write(&lab, &now, "first.bin", &noise(9 * MIB as usize, 3));
    let two = link(&lab, "two.qcow2", &one, "qcow2", &now);
    let running = Running::on(&two);
    let pass = last_pass(&run("sync", &two, &out, &[], "").expect(0));
    let copied = pass["copied"].as_u64().unwrap();
    assert!((12 * MIB..20 * MIB).contains(&copied), "{pass}");
    drop(running);

    // A plain conversion does not go there, nor with --force.
    for more in [&[][..], &["--force"]] {
        let refused = run("convert", &two, &out, more, "").expect(1);
        assert!(refused.stderr.contains("--from-sync"), "{}", refused.stderr);
    }
    // No time is enough for that, and nothing is changed.
    let before = names(&out);
    let within = |verb: &str, seconds: &str| {
        let more = ["--from-sync", "--budget", seconds, "--name", "guest"];
        run(verb, &two, &out, &more, "")
    };
    for verb in ["plan", "convert"] {
        let refused = within(verb, "0").expect(3);
        let blocker = &refused.json()["error"]["blockers"][0];
        assert_eq!(blocker["code"], "sync-over-budget", "{verb}");
        assert!(
            blocker["reason"]
                .as_str()
                .unwrap()
                .contains("the budget is 0 s")
        );
    }
    let planned = within("plan", "600").expect(0);
    assert!(
        planned.stderr.contains("budget 600 s"),
        "{}",
        planned.stderr
    );
    assert_eq!(names(&out), before);
    let source = sha256(&two);
    let more = [
        "--from-sync",
        "--budget",
        "600",
        "--verify-copy",
        "--bandwidth",
        "8",
        "--progress",
        "json",
        "--name",
        "guest",
    ];
    let ended = run("convert", &two, &out, &more, "").expect(0);
    let report = ended.json();
    assert_eq!(report["sync"]["within_budget"], true);
    assert_eq!(report["sync"]["passes"].as_array().unwrap().len(), 3);
    assert!(report["checks"].to_string().contains("copy-identical"));
    let last = &report["sync"]["last"];
    let copied = last["copied"].as_u64().unwrap();
    assert!((9 * MIB..25 * MIB).contains(&copied), "{copied}");
    assert!(number(&report, "resumed") > 10 * MIB);
    // Measured by a pass without the limit of this one.
    let time = |name: &str| last[name].as_f64().unwrap();
    let (expected, met) = (time("projected_s"), time("seconds"));
    assert!(met > copied as f64 / (8 * MIB) as f64 - 0.2, "{met}");
    // How near both are, `the_projection_is_within_a_quarter_of_the_last_pass` tells, with the host to itself.
    let left = last["left"].as_u64().unwrap();
    assert!(
        expected > left as f64 / (8 * MIB) as f64,
        "{expected} {left}"
    );
    // The progress is that of this pass.
    let mut done = ended
        .stderr
        .lines()
        .filter(|l| l.contains("\"total_bytes\""));
    let done: Value = serde_json::from_str(done.next_back().unwrap()).unwrap();
    assert_eq!(
        (&done["total_bytes"], &done["done_bytes"]),
        (&last["copied"], &last["copied"])
    );
    assert!(!out.join("sync.json").exists() && !lab.path(".out.partial").exists());
    assert!(!names(&out).iter().any(|name| name.contains("sync")));
    let disk = out.join("guest.qcow2");
    assert!(file_in(&lab, &disk, "first.bin") == noise(9 * MIB as usize, 3));
    assert!(file_in(&lab, &disk, "second.bin") == noise(12 * MIB as usize, 2));
    assert_eq!(sha256(&two), source);
    super::support::h2k(["verify", text(&disk)]).expect(0);
}

/// The data of a file is in the frozen state, but neither its record nor its bits in the map of
/// clusters. These come later, in separate blocks; its data does not change any more.
#[test]
fn the_late_bitmap_trap() {
    if !have(&TOOLS) {
        return;
    }
    let lab = lab();
    let data = noise(8 * MIB as usize, 4);
    let now = lab.path("now.raw");
    fs::copy(&lab.raw, &now).unwrap();
    write(&lab, &now, "late.bin", &data);
    // The data alone goes into the frozen state.
    let chunks: std::collections::HashSet<&[u8]> = data.chunks(4096).collect();
    let (frozen, ahead) = (
        File::options().write(true).open(&lab.raw).unwrap(),
        File::open(&now).unwrap(),
    );
    let mut block = vec![0; 4096];
    let mut early = Vec::new();
    for at in (0..lab.spec.disk_size).step_by(4096) {
        ahead.read_exact_at(&mut block, at).unwrap();
        if chunks.contains(block.as_slice()) {
            frozen.write_all_at(&block, at).unwrap();
            early.push(at);
        }
    }
    assert_eq!(early.len() as u64, 8 * MIB / 4096);
    let top = link(&lab, "top.qcow2", &lab.raw, "raw", &now);
    let out = lab.path("out");
    run("sync", &top, &out, &["--name", "guest"], "").expect(0);
    // The trap: the pass considered it free, and the newest link does not have it.
    let map = tool(
        "qemu-img",
        &[
            "map",
            "--output=json",
            "-U",
            text(&out.join("guest.sync.qcow2")),
        ],
    );
    let map: Vec<Value> = serde_json::from_slice(&map).unwrap();
    let has_data = |at: u64| {
        map.iter().any(|e| {
            let (start, length) = (e["start"].as_u64().unwrap(), e["length"].as_u64().unwrap());
            e["data"] == true && (start..start + length).contains(&at)
        })
    };
    let copied = early.iter().filter(|at| has_data(**at)).count();
    assert!(copied < early.len() / 10, "{copied} of {}", early.len());
    let more = ["--from-sync", "--name", "guest"];
    run("convert", &top, &out, &more, "").expect(0);
    assert!(file_in(&lab, &out.join("guest.qcow2"), "late.bin") == data);
}

#[test]
fn a_killed_pass_goes_on_and_a_killed_last_pass_leaves_nothing_of_its_fix() {
    if !have(&TOOLS) {
        return;
    }
    let lab = lab();
    let name = &["--name", "guest"][..];
    write(&lab, &lab.raw, "first.bin", &noise(40 * MIB as usize, 1));
    let now = lab.path("now.raw");
    fs::copy(&lab.raw, &now).unwrap();
    let one = link(&lab, "one.qcow2", &lab.raw, "raw", &now);
    let out = lab.path("out");
    run("sync", &one, &out, name, "copy-recorded=kill").expect(-1);
    let rest = last_pass(&run("sync", &one, &out, name, "").expect(0));
    let rest = rest["copied"].as_u64().unwrap();
    let whole = last_pass(&run("sync", &one, &lab.path("whole"), name, "").expect(0));
    let whole = whole["copied"].as_u64().unwrap();
    assert!(rest < whole - 4 * MIB && rest > 0, "{rest} of {whole}");
    // Written over what was copied.
    write(&lab, &now, "first.bin", &noise(40 * MIB as usize, 5));
    fs::remove_file(&one).unwrap();
    let one = link(&lab, "one.qcow2", &lab.raw, "raw", &now);
    let two = link(&lab, "two.qcow2", &one, "qcow2", &now);
    run("sync", &two, &out, &[], "copy-recorded=kill").expect(-1);
    let pass = last_pass(&run("sync", &two, &out, &[], "").expect(0));
    assert!(pass["copied"].as_u64().unwrap() < 38 * MIB, "{pass}");
    // The killed pass had found the changes.
    assert!(pass["changed"].as_u64().unwrap() >= 40 * MIB, "{pass}");
    assert!(pass["change_rate"].as_f64().unwrap() > 0.0, "{pass}");

    // Both links are merged into one; later writes are in another.
    write(&lab, &now, "third.bin", &noise(12 * MIB as usize, 6));
    let before = lab.path("before.raw");
    fs::copy(&now, &before).unwrap();
    let merged = link(&lab, "merged.qcow2", &lab.raw, "raw", &now);
    write(&lab, &now, "fourth.bin", &noise(3 * MIB as usize, 7));
    let top = link(&lab, "top.qcow2", &merged, "qcow2", &now);
    let from_sync = &["--from-sync", "--verify-copy", "--name", "guest"][..];
    for point in ["copy-recorded=kill", "copied=kill", "before-rename=kill"] {
        run("convert", &top, &out, from_sync, point).expect(-1);
        assert!(out.join("sync.json").exists(), "{point}");
    }
    // After that the VM is reverted to the snapshot, and other data is written.
    fs::remove_file(&top).unwrap();
    write(&lab, &before, "fifth.bin", &noise(2 * MIB as usize, 8));
    let top = link(&lab, "top.qcow2", &merged, "qcow2", &before);
    let report = run("convert", &top, &out, from_sync, "").expect(0).json();
    assert!(number(&report, "resumed") > 30 * MIB);
    let disk = out.join("guest.qcow2");
    assert!(file_in(&lab, &disk, "first.bin") == noise(40 * MIB as usize, 5));
    assert!(file_in(&lab, &disk, "third.bin") == noise(12 * MIB as usize, 6));
    assert!(file_in(&lab, &disk, "fifth.bin") == noise(2 * MIB as usize, 8));
    assert!(!lab.path(".out.partial").exists() && !out.join("sync.json").exists());
}

/// The blocks in which `now` differs from `before`, with their offsets. Reads only data.
pub(super) fn differences(before: &Path, now: &Path, block: usize) -> Vec<(u64, Vec<u8>)> {
    const CHUNK: usize = 1 << 20;
    let files = [before, now].map(|file| File::open(file).unwrap());
    let size = files[1].metadata().unwrap().len();
    // Where a file has data from there on.
    let data = |file: &File, at: u64| rustix::fs::seek(file, SeekFrom::Data(at)).unwrap_or(size);
    let [mut a, mut b] = [vec![0; CHUNK], vec![0; CHUNK]];
    let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut at = 0;
    loop {
        let next = files.iter().map(|file| data(file, at)).min().unwrap();
        at = next / CHUNK as u64 * CHUNK as u64;
        if next >= size {
            return runs;
        }
        let length = CHUNK.min((size - at) as usize);
        files[0].read_exact_at(&mut a[..length], at).unwrap();
        files[1].read_exact_at(&mut b[..length], at).unwrap();
        for from in (0..length).step_by(block) {
            let to = (from + block).min(length);
            if a[from..to] == b[from..to] {
                continue;
            }
            let place = at + from as u64;
            match runs.last_mut() {
                Some((start, bytes)) if *start + bytes.len() as u64 == place => {
                    bytes.extend_from_slice(&b[from..to]);
                }
                _ => runs.push((place, b[from..to].to_vec())),
            }
        }
        at += CHUNK as u64;
    }
}

/// Writes to an image what `now` has otherwise than `before`.
pub(super) fn write_differences(lab: &Lab, image: &Path, format: &str, before: &Path, now: &Path) {
    let mut script = String::new();
    let mut parts = Vec::new();
    for (at, bytes) in differences(before, now, 65536) {
        let part = lab.path(&format!("part-{at}"));
        fs::write(&part, &bytes).unwrap();
        script += &format!("write -s {} {at} {}\n", text(&part), bytes.len());
        parts.push(part);
    }
    let mut child = Command::new("qemu-io")
        .args(["-f", format, text(image)])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(script.as_bytes())
        .unwrap();
    assert!(child.wait().unwrap().success());
    parts.iter().for_each(|part| fs::remove_file(part).unwrap());
}

#[test]
fn a_vmdk_chain_is_synced_as_a_qcow2_chain_is_and_given_up_by_release() {
    if !have(&TOOLS) || !have(&["qemu-io"]) {
        return;
    }
    let lab = lab();
    let (base, middle, top) = (
        lab.path("vm.vmdk"),
        lab.path("vm-000001.vmdk"),
        lab.path("vm-000002.vmdk"),
    );
    let raw = ["convert", "-f", "raw", "-O", "vmdk", text(&lab.raw)];
    tool("qemu-img", &[&raw[..], &[text(&base)]].concat());
    let delta = |below: &Path, link: &Path| {
        let create = ["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b"];
        tool(
            "qemu-img",
            &[&create[..], &[text(below), text(link)]].concat(),
        );
    };
    delta(&base, &middle);
    let out = lab.path("out");
    let name = &["--name", "guest"][..];
    let first = last_pass(&run("sync", &middle, &out, name, "").expect(0));
    let now = lab.path("now.raw");
    fs::copy(&lab.raw, &now).unwrap();
    write(&lab, &now, "second.bin", &noise(MIB as usize, 2));
    write_differences(&lab, &middle, "vmdk", &lab.raw, &now);
    delta(&middle, &top);
    let second = last_pass(&run("sync", &top, &out, &[], "").expect(0));
    let (first, second) = (
        first["copied"].as_u64().unwrap(),
        second["copied"].as_u64().unwrap(),
    );
    assert!((MIB..first / 2).contains(&second), "{second} of {first}");
    let last = lab.path("last.raw");
    fs::copy(&now, &last).unwrap();
    write(&lab, &last, "third.bin", &noise(MIB as usize, 3));
    write_differences(&lab, &top, "vmdk", &now, &last);
    // What was copied is given up, and copied again.
    super::support::h2k(["release", text(&out)]).expect(0);
    assert!(!out.exists());
    run("sync", &top, &out, name, "").expect(0);
    let from_sync = &["--from-sync", "--verify-copy", "--name", "guest"][..];
    run("convert", &top, &out, from_sync, "").expect(0);
    let disk = out.join("guest.qcow2");
    assert!(file_in(&lab, &disk, "second.bin") == noise(MIB as usize, 2));
    assert!(file_in(&lab, &disk, "third.bin") == noise(MIB as usize, 3));
}

#[test]
fn what_cannot_be_synced_is_refused() {
    if !have(&TOOLS) {
        return;
    }
    let lab = lab();
    let out = lab.path("out");
    // Nothing below it is frozen.
    let refused = run("sync", &lab.raw, &out, &[], "").expect(3);
    assert!(
        refused.stderr.contains("take a snapshot"),
        "{}",
        refused.stderr
    );
    assert!(!out.exists());
    let now = lab.path("now.raw");
    fs::copy(&lab.raw, &now).unwrap();
    let top = link(&lab, "top.qcow2", &lab.raw, "raw", &now);
    // No synced directory, and a directory of something else.
    let refused = run("convert", &top, &out, &["--from-sync"], "").expect(1);
    assert!(
        refused.stderr.contains("no synced VM"),
        "{}",
        refused.stderr
    );
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mine"), "mine").unwrap();
    run("sync", &top, &out, &[], "").expect(1);
    fs::remove_dir_all(&out).unwrap();
    run("sync", &top, &out, &[], "").expect(0);
    // The base was written to: the places are unknown.
    let disk = File::options().write(true).open(&lab.raw).unwrap();
    disk.write_all_at(b"changed", 100 * MIB).unwrap();
    drop(disk);
    for (verb, more) in [("sync", &[][..]), ("convert", &["--from-sync"])] {
        let refused = run(verb, &top, &out, more, "").expect(3);
        assert!(
            refused.stderr.contains("sync-base-changed"),
            "{}",
            refused.stderr
        );
        assert!(out.join("sync.json").exists());
    }
    // Another VM.
    let data = lab.path("data.qcow2");
    create_overlay(text(&lab.raw), "raw", &data);
    let xml = machine(&lab, &[&top, &data]);
    let xml_text = fs::read_to_string(&xml)
        .unwrap()
        .replace("type='raw'", "type='qcow2'");
    fs::write(&xml, xml_text).unwrap();
    let refused = run("sync", &xml, &out, &[], "").expect(3);
    assert!(
        refused.stderr.contains("sync-disks-changed"),
        "{}",
        refused.stderr
    );
}
