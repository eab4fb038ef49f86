//! `--in-place`, `rollback`, and runs that are killed at every step: the source is unchanged, or
//! can be restored.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hyper2kvm::demo::{Firmware, GuestSpec, WinVersion};
use serde_json::Value;
use support::{
    Lab, Run, TOOLS, binary, finish, h2k, have, names, processes_naming, sha256, text, tool,
    virtio_win,
};

fn lab(firmware: Firmware) -> Lab {
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = 512 << 20;
    spec.recovery = false;
    spec.firmware = firmware;
    Lab::new(spec)
}

/// `convert` into `out` with a failpoint.
fn command(lab: &Lab, source: &Path, more: &[&str], point: &str) -> Command {
    let mut command = Command::new(binary());
    command
        .arg("convert")
        .arg(source)
        .arg("--virtio-iso")
        .arg(virtio_win())
        .arg("-o")
        .arg(lab.path("out"))
        .args(more)
        .env("HYPER2KVM_FAILPOINT", point);
    command
}

fn in_place(lab: &Lab, source: &Path, more: &[&str], point: &str) -> Run {
    let mut args = vec!["--in-place"];
    args.extend(more);
    finish(command(lab, source, &args, point))
}

fn journal(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("journal.json")).unwrap()).unwrap()
}

/// The same disk contents, whatever the format does around them.
struct Contents {
    disk: PathBuf,
    digest: String,
    copy: Option<PathBuf>,
}

impl Contents {
    fn of(lab: &Lab, disk: &Path) -> Self {
        let copy = (disk.extension().unwrap() != "raw").then(|| {
            let copy = lab.path("before.copy");
            fs::copy(disk, &copy).unwrap();
            copy
        });
        Self {
            disk: disk.to_path_buf(),
            digest: sha256(disk),
            copy,
        }
    }

    /// For raw disks every byte of the file, for others every byte the guest sees.
    fn same(&self) -> bool {
        match &self.copy {
            None => sha256(&self.disk) == self.digest,
            Some(copy) => {
                let qemu_img = hyper2kvm::tool::find("qemu-img").unwrap();
                let done = Command::new(qemu_img)
                    .args(["compare", "-q"])
                    .args([copy, &self.disk])
                    .status();
                done.unwrap().success()
            }
        }
    }
}

#[test]
fn there_and_back() {
    if !have(&TOOLS) {
        return;
    }
    for firmware in [Firmware::Uefi, Firmware::Bios] {
        let lab = lab(firmware);
        let qcow2 = lab.in_format("qcow2", "", "guest.qcow2");
        for disk in [lab.raw.clone(), qcow2] {
            eprintln!("{firmware:?} {}", disk.display());
            there_and_back_on(&lab, &disk);
        }
    }
}

fn there_and_back_on(lab: &Lab, disk: &Path) {
    let before = Contents::of(lab, disk);
    let out = lab.path("out");
    let folder = text(&out);
    in_place(lab, disk, &[], "").expect(0);
    assert!(!before.same());
    let verify = [
        "verify",
        text(disk),
        "--controller",
        "sata",
        "--controller",
        "virtio-blk",
    ];
    h2k(verify).expect(0);
    if before.copy.is_some() {
        tool("qemu-img", &["check", "-q", text(disk)]);
    }
    let xml = fs::read_to_string(out.join("guest-final.xml")).unwrap();
    assert!(xml.contains(text(disk)), "{xml}");
    assert!(!out.join("guest.qcow2").exists() && !out.join("guest.raw").exists());

    // The directory with the undo log is never replaced.
    let refused = in_place(lab, disk, &["--force"], "").expect(1);
    assert!(refused.stderr.contains("rollback"), "{}", refused.stderr);

    // A second run plans nothing and writes nothing.
    let digest = sha256(disk);
    let second = lab.path("second");
    let again = h2k([
        "convert",
        text(disk),
        "--virtio-iso",
        text(virtio_win()),
        "--in-place",
        "-o",
        text(&second),
        "--json",
    ])
    .expect(0)
    .json();
    assert_eq!(again["bytes"]["written"], 0);
    let done: Vec<_> = again["actions"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|a| a["state"] != "skipped")
        .collect();
    assert!(done.is_empty(), "{done:?}");
    assert_eq!(sha256(disk), digest);
    let nothing = h2k(["rollback", text(&second)]).expect(1);
    assert!(
        nothing.stderr.contains("nothing to undo"),
        "{}",
        nothing.stderr
    );
    assert_eq!(sha256(disk), digest);
    fs::remove_dir_all(&second).unwrap();

    for round in ["first", "second"] {
        h2k(["rollback", folder]).expect(0);
        assert!(before.same(), "after the {round} rollback");
    }
    assert_eq!(journal(&out)["state"], "rolled-back");

    // Somebody else writes to a block that hyper2kvm wrote: nothing is rolled back without --force.
    in_place(lab, disk, &["--force"], "").expect(0);
    let range = journal(&out)["undo"]["ranges"][0]["offset"]
        .as_u64()
        .unwrap();
    write_to(disk, range);
    let digest = sha256(disk);
    let refused = h2k(["rollback", folder]).expect(7);
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    assert_eq!(sha256(disk), digest);
    h2k(["rollback", folder, "--force"]).expect(0);
    assert!(before.same(), "after the forced rollback");
    fs::remove_dir_all(&out).unwrap();
}

/// A byte that is neither the old nor the new one.
fn write_to(disk: &Path, offset: u64) {
    if disk.extension().unwrap() == "raw" {
        let file = fs::File::options().write(true).open(disk).unwrap();
        file.write_all_at(b"somebody else was here", offset)
            .unwrap();
    } else {
        let write = format!("write -q -P 0x5c {offset} 512");
        tool("qemu-io", &["-f", "qcow2", "-c", &write, text(disk)]);
    }
}

#[test]
fn failures_in_place() {
    if !have(&TOOLS) {
        return;
    }
    let lab = lab(Firmware::Bios);
    let before = Contents::of(&lab, &lab.raw);
    // Before the commit nothing was changed; after its start the disk is restored.
    for (point, code) in [
        ("inspected", 1),
        ("backed-up", 1),
        ("file-written", 1),
        ("hive-written", 1),
        ("fixed", 1),
        ("undo-log", 1),
        ("committing", 6),
        ("written", 6),
        ("copied", 6),
        ("before-rename", 6),
    ] {
        eprintln!("{point}");
        let run = in_place(&lab, &lab.raw, &[], &format!("{point}=fail")).expect(code);
        assert!(run.stderr.contains(point), "{}", run.stderr);
        assert!(before.same(), "{point}: the disk was changed");
        assert_eq!(names(lab.dir.path()), ["guest.raw"], "{point}");
    }
    // Neither committed nor restored.
    let partial = lab.path(".out.partial");
    let mut broken = command(&lab, &lab.raw, &["--in-place"], "committing=wait");
    let mut child = broken.stderr(Stdio::piped()).spawn().unwrap();
    wait_until(|| journal_state(&partial).as_deref() == Some("committing"));
    fs::write(partial.join("backup/blocks.before"), "rats ate it").unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let lost = h2k(["rollback", "--journal", text(&partial.join("journal.json"))]).expect(7);
    assert!(lost.stderr.contains("blocks.before"), "{}", lost.stderr);
}

fn journal_state(folder: &Path) -> Option<String> {
    let bytes = fs::read(folder.join("journal.json")).ok()?;
    let doc: Value = serde_json::from_slice(&bytes).ok()?;
    Some(doc["state"].as_str()?.to_string())
}

#[track_caller]
fn wait_until(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "it never happened"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Children get their signal from the kernel, slightly later.
#[track_caller]
fn no_process_left(lab: &Lab) {
    wait_until(|| processes_naming(lab.dir.path()).is_empty());
}

#[test]
fn killed_in_place() {
    if !have(&TOOLS) {
        return;
    }
    let lab = lab(Firmware::Bios);
    let before = Contents::of(&lab, &lab.raw);
    let partial = lab.path(".out.partial");
    for (point, written) in [
        ("undo-log", false),
        ("committing", true),
        ("written", true),
        ("copied", true),
        ("before-rename", true),
    ] {
        eprintln!("{point}");
        in_place(&lab, &lab.raw, &[], &format!("{point}=kill")).expect(-1);
        no_process_left(&lab);
        assert!(!lab.path("out").exists());
        assert_eq!(before.same(), !written, "{point}");
        if written {
            let journal = partial.join("journal.json");
            for more in [&["--force"] as &[&str], &[]] {
                let next = in_place(&lab, &lab.raw, more, "").expect(7);
                assert!(
                    next.stderr
                        .contains(&format!("rollback --journal {}", journal.display())),
                    "{}",
                    next.stderr
                );
            }
            // A rollback that fails or is killed can be repeated.
            let rollback = ["rollback", "--journal", text(&journal)];
            for (action, code) in [("fail", 7), ("kill", -1)] {
                let mut broken = Command::new(binary());
                let point = format!("rolling-back={action}");
                broken.args(rollback).env("HYPER2KVM_FAILPOINT", point);
                finish(broken).expect(code);
            }
            h2k(rollback).expect(0);
            assert!(before.same(), "{point}: not restored");
        }
    }
    // Restored: the next run starts over.
    in_place(&lab, &lab.raw, &[], "").expect(0);
    assert_eq!(names(lab.dir.path()), ["guest.raw", "out"]);
}

const POINTS: [&str; 8] = [
    "inspected",
    "backed-up",
    "file-written",
    "hive-written",
    "fixed",
    "copying",
    "copied",
    "before-rename",
];

#[test]
fn killed() {
    if !have(&TOOLS) {
        return;
    }
    let lab = lab(Firmware::Uefi);
    let digest = sha256(&lab.raw);
    for point in POINTS {
        eprintln!("{point}");
        finish(command(&lab, &lab.raw, &[], &format!("{point}=kill"))).expect(-1);
        no_process_left(&lab);
        // Nothing that looks like a result.
        assert_eq!(
            names(lab.dir.path()),
            [".out.lock", ".out.partial", "guest.raw"],
            "{point}"
        );
        assert_eq!(sha256(&lab.raw), digest, "{point}");
    }
    finish(command(&lab, &lab.raw, &[], "")).expect(0);
    assert_eq!(names(lab.dir.path()), ["guest.raw", "out"]);
    // A run that replaces a directory leaves the old one complete until the end.
    finish(command(&lab, &lab.raw, &["--force"], "before-rename=kill")).expect(-1);
    assert!(lab.path("out/report.json").exists());
    finish(command(&lab, &lab.raw, &["--force"], "")).expect(0);
    assert_eq!(names(lab.dir.path()), ["guest.raw", "out"]);
    assert_eq!(sha256(&lab.raw), digest);
}

#[test]
fn failures_leave_nothing() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let digest = sha256(&lab.raw);
    for point in POINTS.into_iter().filter(|point| *point != "copying") {
        eprintln!("{point}");
        let run = finish(command(&lab, &lab.raw, &[], &format!("{point}=fail"))).expect(1);
        assert!(run.stderr.contains(point), "{}", run.stderr);
        assert_eq!(names(lab.dir.path()), ["guest.raw"], "{point}");
    }
    assert_eq!(sha256(&lab.raw), digest);
}

#[test]
fn verbs_that_only_read_leave_nothing() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let qcow2 = lab.in_format("qcow2", "", "guest.qcow2");
    let before = sha256(&qcow2);
    for verb in ["inspect", "plan", "verify"] {
        let command = |action: &str| {
            let mut command = support::command(verb, &qcow2, &[]);
            command.env("HYPER2KVM_FAILPOINT", format!("looked={action}"));
            command.current_dir(lab.dir.path());
            command
        };
        eprintln!("{verb}");
        finish(command("fail")).expect(1);
        interrupt(&mut command("wait"), "TERM").expect(130);
        finish(command("kill")).expect(-1);
        no_process_left(&lab);
        assert_eq!(names(lab.dir.path()), ["guest.qcow2", "guest.raw"]);
    }
    assert_eq!(sha256(&qcow2), before);
}

#[test]
fn interrupted() {
    if !have(&TOOLS) {
        return;
    }
    let lab = lab(Firmware::Uefi);
    let digest = sha256(&lab.raw);
    let signals = ["INT", "TERM", "HUP"];
    for (i, point) in POINTS.into_iter().enumerate() {
        let signal = signals[i % signals.len()];
        eprintln!("{point} {signal}");
        let mut command = command(&lab, &lab.raw, &["--json"], &format!("{point}=wait"));
        let run = interrupt(&mut command, signal).expect(130);
        assert_eq!(run.json()["error"]["code"], 130);
        assert_eq!(names(lab.dir.path()), ["guest.raw"], "{point}");
        assert_eq!(sha256(&lab.raw), digest, "{point}");
        assert!(processes_naming(lab.dir.path()).is_empty());
    }
    // While and after the disk itself is written: it is restored.
    for point in [
        "undo-log",
        "committing",
        "written",
        "copied",
        "before-rename",
    ] {
        eprintln!("{point} in place");
        let mut command = command(&lab, &lab.raw, &["--in-place"], &format!("{point}=wait"));
        interrupt(&mut command, "TERM").expect(130);
        assert_eq!(names(lab.dir.path()), ["guest.raw"], "{point}");
        assert_eq!(sha256(&lab.raw), digest, "{point}");
    }
}

/// Sends the signal when the failpoint is reached.
fn interrupt(command: &mut Command, signal: &str) -> Run {
    use std::io::Read;
    let mut child = command
        .env("NO_COLOR", "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stderr, mut said) = support::until_waiting(&mut child);
    tool("kill", &[&format!("-{signal}"), &child.id().to_string()]);
    stderr.read_to_string(&mut said).unwrap();
    let out = child.wait_with_output().unwrap();
    Run {
        code: out.status.code().unwrap_or(-1),
        stdout: String::from_utf8(out.stdout).unwrap(),
        stderr: said,
    }
}
