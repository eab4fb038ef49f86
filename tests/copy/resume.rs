//! An interrupted copy continues with `--resume`, and nothing else does.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hyper2kvm::demo::{DemoVolume, ExtraFile, GuestSpec, WinVersion};

use super::support::{
    self, Lab, Mounted, Run, TOOLS, binary, finish, have, names, processes_naming, sha256, text,
    tool, virtio_win,
};
use super::{MIB, live_files_are_the_same, machine, noise, number};

/// A guest with so many MiB of data.
pub(super) fn with_data(mib: u64) -> Lab {
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = 512 * MIB;
    spec.recovery = false;
    spec.pagefile_size = 0;
    spec.extra_files.push(ExtraFile {
        place: DemoVolume::Windows,
        path: "Data\\noise.bin".into(),
        contents: noise((mib * MIB) as usize, 3),
    });
    Lab::new(spec)
}

pub(super) fn convert(source: &Path, out: &Path, more: &[&str], point: &str) -> Command {
    let mut command = Command::new(binary());
    command
        .args(["convert", "--json"])
        .arg(source)
        .arg("--virtio-iso")
        .arg(virtio_win())
        .arg("-o")
        .arg(out)
        .args(more)
        .env("HYPER2KVM_FAILPOINT", point);
    command
}

/// The number of bytes recorded in a copy's journal.
pub(super) fn recorded(partial: &Path, disk: usize) -> u64 {
    let ranges = recorded_ranges(partial, disk);
    ranges.into_iter().map(|[_, length]| length).sum()
}

/// Each an offset and a length.
pub(super) fn recorded_ranges(partial: &Path, disk: usize) -> Vec<[u64; 2]> {
    let path = partial.join(format!(".work/copy-{disk}.journal"));
    let text = fs::read_to_string(path).unwrap();
    let pairs = |line: &str| serde_json::from_str::<Vec<[u64; 2]>>(&line[9..]).unwrap();
    text.lines().skip(1).flat_map(pairs).collect()
}

/// A search path on which QEMU was built without zstd.
fn without_zstd(lab: &Lab) -> String {
    let bin = lab.path("bin");
    fs::create_dir(&bin).unwrap();
    let real = hyper2kvm::tool::find("qemu-img").unwrap();
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *compression_type=zstd*) exit 1;; esac\nexec {} \"$@\"\n",
        text(&real)
    );
    let program = bin.join("qemu-img");
    fs::write(&program, script).unwrap();
    fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:{}", text(&bin), std::env::var("PATH").unwrap())
}

#[test]
fn a_killed_copy_goes_on() {
    if !have(&TOOLS) {
        return;
    }
    let lab = with_data(60);
    let source = sha256(&lab.raw);
    let (out, partial) = (lab.path("out"), lab.path(".out.partial"));
    let without_zstd = without_zstd(&lab);
    for (format, compressed) in [
        ("qcow2", None),
        ("qcow2", Some("zstd")),
        ("qcow2", Some("zlib")),
        ("raw", None),
    ] {
        let mut options = vec!["--format", format];
        options.extend(compressed.map(|_| "--compress"));
        let run = |more: &[&str], point: &str| {
            let all = [options.as_slice(), more].concat();
            let mut command = convert(&lab.raw, &out, &all, point);
            if compressed == Some("zlib") {
                command.env("PATH", &without_zstd);
            }
            finish(command)
        };
        // Each run is killed once it has recorded one batch.
        run(&[], "copy-recorded=kill").expect(-1);
        assert!(!out.exists());
        let mut before = recorded(&partial, 0);
        assert!(before >= 8 * MIB, "{before}");
        for _ in 0..2 {
            run(&["--resume"], "copy-recorded=kill").expect(-1);
            let now = recorded(&partial, 0);
            assert!(now > before, "{before} then {now}");
            before = now;
        }
        // The last one copies the rest. It carries out no action and starts no writer.
        let steps = lab.path("steps");
        let point = format!("*=record:{}", text(&steps));
        let report = run(&["--resume", "--verify-copy"], &point).expect(0).json();
        assert_eq!(
            number(&report, "resumed"),
            before,
            "{format} {compressed:?}"
        );
        assert!(report["checks"].to_string().contains("copy-identical"));
        assert_eq!(report["ready"], true);
        assert!(report["actions"].as_array().unwrap().len() > 3);
        assert!(!report["trim"].as_array().unwrap().is_empty());
        let steps = fs::read_to_string(steps).unwrap();
        for step in [" action ", "__ntfs"] {
            assert!(!steps.contains(step), "{step}: {steps}");
        }
        assert!(!partial.exists() && !out.join(".work").exists());
        let target = out.join(format!("guest.{format}"));
        if let Some(compressed) = compressed {
            let said = tool("qemu-img", &["info", "--output=json", text(&target)]);
            let said = String::from_utf8(said).unwrap();
            let kind = format!("\"compression-type\": \"{compressed}\"");
            assert!(said.contains(&kind), "{said}");
            tool("qemu-img", &["check", "-q", text(&target)]);
            // Most of it is noise. What a killed run wrote and did not record takes no room.
            let (read, written) = (number(&report, "read"), number(&report, "written"));
            assert!(written < read + MIB, "{written} of {read}");
        }
        let raw = lab.raw_result(&target);
        assert!(live_files_are_the_same(&lab, &raw, 0) > 20);
        fs::remove_dir_all(&out).unwrap();
        fs::remove_file(lab.path("steps")).unwrap();
    }
    assert_eq!(sha256(&lab.raw), source);
    assert!(processes_naming(lab.dir.path()).is_empty());
}

/// Between the flush of a batch and its line, nothing records that it is there; after the line it
/// is not copied again.
#[test]
fn a_kill_beside_the_line_of_a_batch() {
    if !have(&TOOLS) {
        return;
    }
    let lab = with_data(120);
    let (out, partial) = (lab.path("out"), lab.path(".out.partial"));
    let run = |more: &[&str], point: &str| finish(convert(&lab.raw, &out, more, point));
    run(&[], "copy-flushed=kill").expect(-1);
    assert_eq!(recorded(&partial, 0), 0);
    // Nothing to continue: it begins with a new target.
    run(&["--resume"], "copy-recorded=kill").expect(-1);
    let first = recorded(&partial, 0);
    assert!(first >= 16 * MIB, "{first}");
    let written = || partial.join("guest.qcow2").metadata().unwrap().blocks() * 512;
    let before = written();
    run(&["--resume"], "copy-flushed=kill").expect(-1);
    assert_eq!(recorded(&partial, 0), first);
    assert!(written() >= before + 8 * MIB, "its batch is in the file");
    let report = run(&["--resume", "--verify-copy"], "").expect(0).json();
    assert_eq!(number(&report, "resumed"), first);
    assert!(report["checks"].to_string().contains("copy-identical"));
}

#[test]
fn a_plain_run_starts_over() {
    if !have(&TOOLS) {
        return;
    }
    let lab = with_data(30);
    let (out, partial) = (lab.path("out"), lab.path(".out.partial"));
    finish(convert(&lab.raw, &out, &[], "copy-recorded=kill")).expect(-1);
    assert!(recorded(&partial, 0) > 0);
    let report = finish(convert(&lab.raw, &out, &[], "")).expect(0).json();
    assert_eq!(number(&report, "resumed"), 0);
    assert!(!partial.exists());
    // With nothing to continue it is a plain run too, and prints that.
    let other = lab.path("other");
    let run = finish(convert(&lab.raw, &other, &["--resume"], "")).expect(0);
    assert!(
        run.stderr.contains("no copy was interrupted"),
        "{}",
        run.stderr
    );
    assert_eq!(number(&run.json(), "resumed"), 0);
}

#[test]
fn a_resume_with_other_options_is_refused() {
    if !have(&TOOLS) {
        return;
    }
    let lab = with_data(30);
    let (out, partial) = (lab.path("out"), lab.path(".out.partial"));
    let first = ["--memory", "4096", "--keep-tools"];
    finish(convert(&lab.raw, &out, &first, "copy-recorded=kill")).expect(-1);
    let before = recorded(&partial, 0);
    let other = ["--memory", "2048", "--resume"];
    let run = finish(convert(&lab.raw, &out, &other, "")).expect(2);
    for says in [
        "--memory: 4096 then, 2048 now",
        "--keep-tools: given then, not given now",
    ] {
        assert!(run.stderr.contains(says), "{}", run.stderr);
    }
    // It was not changed, and the method of copying may change.
    assert_eq!(recorded(&partial, 0), before);
    let again = [
        &first[..],
        &["--resume", "--bandwidth", "4000", "--verify-copy"],
    ]
    .concat();
    let report = finish(convert(&lab.raw, &out, &again, "")).expect(0).json();
    assert_eq!(number(&report, "resumed"), before);
}

#[test]
fn a_source_that_changed_is_copied_from_its_start() {
    if !have(&TOOLS) {
        return;
    }
    let lab = with_data(30);
    let data = lab.path("data.raw");
    fs::write(&data, noise(40 * MIB as usize, 5)).unwrap();
    let xml = machine(&lab, &[&lab.raw, &data]);
    let (out, partial) = (lab.path("out"), lab.path(".out.partial"));
    let run = |more: &[&str], point: &str| finish(convert(&xml, &out, more, point));
    let change = |file: &Path, at: u64| {
        let file = File::options().write(true).open(file).unwrap();
        file.write_all_at(b"changed since", at).unwrap();
    };
    // Both have recorded something by then.
    run(&[], "copied=kill").expect(-1);
    let before = recorded(&partial, 0);
    assert!(before > 0 && recorded(&partial, 1) == 40 * MIB);
    change(&data, 20 * MIB);
    let again = run(&["--resume", "--verify-copy"], "").expect(0);
    let says = format!("{} has changed since: disk 2", data.display());
    assert!(again.stderr.contains(&says), "{}", again.stderr);
    assert_eq!(number(&again.json(), "resumed"), before);
    let copied = lab.raw_result(&out.join("many-1.qcow2"));
    assert_eq!(sha256(&copied), sha256(&data));

    // The fix is on the Windows disk: nothing is left to continue.
    fs::remove_dir_all(&out).unwrap();
    run(&[], "copied=kill").expect(-1);
    change(&lab.raw, lab.spec.disk_size - 4096 - 512);
    let again = run(&["--resume"], "").expect(0);
    assert!(again.stderr.contains("starting over: "), "{}", again.stderr);
    assert_eq!(number(&again.json(), "resumed"), 0);
    // As is one whose target was exchanged.
    fs::remove_dir_all(&out).unwrap();
    run(&[], "copied=kill").expect(-1);
    let target = partial.join("many.qcow2");
    fs::copy(&target, lab.path("copy")).unwrap();
    fs::rename(lab.path("copy"), &target).unwrap();
    let again = run(&["--resume", "--verify-copy"], "").expect(0).json();
    assert_eq!(number(&again, "resumed"), 40 * MIB);
}

#[test]
fn a_full_disk_keeps_what_is_copied() {
    if !have(&TOOLS) || !have(&["mount", "umount"]) {
        return;
    }
    let lab = with_data(60);
    let small = lab.path("small");
    fs::create_dir(&small).unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=60m", "none"]);
    let Some(_mounted) = Mounted::at(&small, mount) else {
        return;
    };
    // The compression ratio is unknown, so the check before the copy passes.
    let (out, partial) = (small.join("out"), small.join(".out.partial"));
    let run = finish(convert(&lab.raw, &out, &["--compress"], "")).expect(1);
    for says in ["ran full", "hint: free some space", "--resume"] {
        assert!(run.stderr.contains(says), "{}", run.stderr);
    }
    let before = recorded(&partial, 0);
    assert!(before > 8 * MIB, "{before}");
    tool("mount", &["-o", "remount,size=200m", text(&small)]);
    let more = ["--compress", "--resume", "--verify-copy"];
    let report = finish(convert(&lab.raw, &out, &more, "")).expect(0).json();
    assert_eq!(number(&report, "resumed"), before);
    assert_eq!(names(&small), ["out"]);
}

/// With space for one copy only, the space of an interrupted one is not required twice.
#[test]
fn a_resume_wants_room_for_the_rest_only() {
    if !have(&TOOLS) || !have(&["mount", "umount"]) {
        return;
    }
    let lab = with_data(120);
    let small = lab.path("small");
    fs::create_dir(&small).unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=20m", "none"]);
    let Some(_mounted) = Mounted::at(&small, mount) else {
        return;
    };
    let (out, partial) = (small.join("out"), small.join(".out.partial"));
    let run = |more: &[&str], point: &str| finish(convert(&lab.raw, &out, more, point));
    let refused = run(&[], "").expect(1).stderr;
    let needed = refused.split_once("bytes free, ").unwrap().1;
    let needed: u64 = needed.split(' ').next().unwrap().parse().unwrap();
    let size = format!("remount,size={}", needed + 20 * MIB);
    tool("mount", &["-o", &size, text(&small)]);
    run(&[], "copy-recorded=kill").expect(-1);
    let before = recorded(&partial, 0);
    assert!(before >= 16 * MIB, "{before}");
    // Somebody else has taken it in the meantime: nothing is lost, and that is reported.
    let taken = small.join("taken");
    fs::write(&taken, vec![1; 30 * MIB as usize]).unwrap();
    let refused = run(&["--resume"], "").expect(1).stderr;
    for says in ["bytes free", "what is copied is kept"] {
        assert!(refused.contains(says), "{refused}");
    }
    assert_eq!(recorded(&partial, 0), before);
    fs::remove_file(&taken).unwrap();
    let report = run(&["--resume", "--verify-copy"], "").expect(0).json();
    assert_eq!(number(&report, "resumed"), before);
}

/// Asked to end while it copies.
fn terminated(lab: &Lab, more: &[&str]) -> Run {
    let mut child = convert(&lab.raw, &lab.path("out"), more, "copy-recorded=wait")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stderr, mut said) = support::until_waiting(&mut child);
    tool("kill", &["-TERM", &child.id().to_string()]);
    std::io::Read::read_to_string(&mut stderr, &mut said).unwrap();
    Run {
        code: child.wait().unwrap().code().unwrap_or(-1),
        stdout: String::new(),
        stderr: said,
    }
}

#[test]
fn a_signal_keeps_the_copy_where_it_was_asked_for() {
    if !have(&TOOLS) {
        return;
    }
    let lab = with_data(60);
    let before = names(lab.dir.path());
    terminated(&lab, &[]).expect(130);
    assert_eq!(names(lab.dir.path()), before);
    let run = terminated(&lab, &["--resume"]).expect(130);
    assert!(run.stderr.contains("--resume continues"), "{}", run.stderr);
    let kept = recorded(&lab.path(".out.partial"), 0);
    assert!(kept > 0);
    let more = ["--resume", "--verify-copy"];
    let run = finish(convert(&lab.raw, &lab.path("out"), &more, "")).expect(0);
    assert_eq!(number(&run.json(), "resumed"), kept);
}

#[test]
fn a_planted_partial_directory_is_not_taken_over() {
    if !have(&TOOLS) || !rustix::process::geteuid().is_root() {
        return;
    }
    let lab = with_data(10);
    let (out, partial) = (lab.path("out"), lab.path(".out.partial"));
    finish(convert(&lab.raw, &out, &[], "copy-recorded=kill")).expect(-1);
    std::os::unix::fs::chown(&partial, Some(12345), None).unwrap();
    let run = finish(convert(&lab.raw, &out, &["--resume"], "")).expect(1);
    assert!(run.stderr.contains("12345"), "{}", run.stderr);
    assert!(!out.exists());
}

#[test]
fn a_device_goes_on_and_another_copy_on_it_does_not() {
    if !have(&TOOLS) || !have(&["losetup"]) {
        return;
    }
    let lab = with_data(60);
    let out = lab.path("out");
    let file = lab.path("device");
    let blank = |len: u64| File::create(&file).unwrap().set_len(len).unwrap();
    blank(lab.spec.disk_size);
    let Some(device) = support::LoopOver::file(&file, &[]) else {
        return;
    };
    let path = text(&device.0);
    for zero in [false, true] {
        let mut options = vec!["--output-device", path];
        options.extend(zero.then_some("--target-is-zero"));
        let run = |more: &[&str], point: &str| {
            let all = [options.as_slice(), more].concat();
            finish(convert(&lab.raw, &out, &all, point))
        };
        tool("blkdiscard", &["-z", path]);
        run(&[], "copy-recorded=kill").expect(-1);
        let first = recorded(&lab.path(".out.partial"), 0);
        run(&["--resume"], "copy-recorded=kill").expect(-1);
        assert!(recorded(&lab.path(".out.partial"), 0) > first);
        // Until the end it is no disk.
        assert_ne!(support::h2k(["verify", path]).code, 0);
        let report = run(&["--resume", "--verify-copy"], "").expect(0).json();
        assert!(report["checks"].to_string().contains("copy-identical"));
        support::h2k(["verify", path]).expect(0);
        fs::remove_dir_all(&out).unwrap();

        // Another copy was begun on it in the meantime, and the old data is useless.
        tool("blkdiscard", &["-z", path]);
        run(&[], "copy-recorded=kill").expect(-1);
        let kept = lab.path("kept");
        fs::rename(lab.path(".out.partial"), &kept).unwrap();
        tool("blkdiscard", &["-z", path]);
        let disk = File::options().write(true).open(path).unwrap();
        disk.write_all_at(&noise(MIB as usize, 9), 300 * MIB)
            .unwrap();
        drop(disk);
        run(&[], "copying=kill").expect(-1);
        fs::remove_dir_all(lab.path(".out.partial")).unwrap();
        fs::rename(&kept, lab.path(".out.partial")).unwrap();
        let report = run(&["--resume", "--verify-copy"], "").expect(0).json();
        assert_eq!(number(&report, "resumed"), 0);
        support::h2k(["verify", path]).expect(0);
        fs::remove_dir_all(&out).unwrap();
    }
}

/// The bandwidth limit applies to all disks of a run and all VMs of a batch together.
#[test]
fn a_bandwidth_is_shared() {
    if !have(&TOOLS) {
        return;
    }
    let lab = with_data(40);
    let data = lab.path("data.raw");
    fs::write(&data, noise(40 * MIB as usize, 5)).unwrap();
    let xml = machine(&lab, &[&lab.raw, &data]);
    let timed = |mut command: Command| {
        let start = Instant::now();
        command.env_remove("HYPER2KVM_FAILPOINT");
        let run = finish(command).expect(0);
        (start.elapsed(), run)
    };
    let one = convert(&xml, &lab.path("out"), &["--bandwidth", "40"], "");
    let (_, run) = timed(one);
    let report = run.json();
    let copy = report["timings"]["copy_s"].as_f64().unwrap();
    let expected = number(&report, "read") as f64 / (40 * MIB) as f64;
    assert!(
        expected > 2.0 && copy > expected - 0.3,
        "{copy} for {expected}"
    );
    assert!(report["request"]["options"]["bandwidth"].is_null());

    let list = lab.path("list.yaml");
    let machines: String = ["a", "b"]
        .map(|name| format!("  - {{source: {}, name: {name}}}\n", text(&lab.raw)))
        .concat();
    fs::write(&list, format!("machines:\n{machines}")).unwrap();
    let mut batch = Command::new(binary());
    batch
        .args([
            "convert",
            "--batch",
            text(&list),
            "--jobs",
            "2",
            "--virtio-iso",
        ])
        .arg(virtio_win())
        .args(["--bandwidth", "30", "-o"])
        .arg(lab.path("fleet"));
    let (took, _) = timed(batch);
    let bytes: u64 = ["a", "b"]
        .map(|name| {
            let file = lab.path(&format!("fleet/{name}-kvm/report.json"));
            let report = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
            number(&report, "read")
        })
        .iter()
        .sum();
    let expected = Duration::from_secs_f64(bytes as f64 / (30 * MIB) as f64 - 0.3);
    assert!(took > expected, "{took:?} for {expected:?}");
}
