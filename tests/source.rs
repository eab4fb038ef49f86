//! The source is opened once, held until the result exists, and checked again before that. A change
//! by others during the run ends it with exit 1 and nothing left. Signals and closed streams end it
//! as documented.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::{
    Lab, LoopOver, Mounted, Paused, TOOLS, binary, create_overlay, finish, h2k, have, names, said,
    sha256, skip, text, tool, virtio_win,
};

/// `O_EXCL`, which the kernel refuses for a block device that is in use.
const EXCLUSIVE: i32 = rustix::fs::OFlags::EXCL.bits().cast_signed();

/// [`support::command`] with the output directory of the lab.
fn command(lab: &Lab, verb: &str, source: &Path, more: &[&str]) -> Command {
    let mut command = support::command(verb, source, more);
    if verb == "convert" {
        command.arg("-o").arg(lab.path("out"));
    }
    command
}

/// Whether QEMU may write to the file now, like a VM that starts on it.
fn a_vm_can_start(file: &Path) -> bool {
    let out = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write -q -P 0 0 0", text(file)])
        .output()
        .unwrap();
    let locked = String::from_utf8_lossy(&out.stderr).contains("lock");
    assert!(out.status.success() || locked, "{out:?}");
    !locked
}

/// A byte in the middle of a file, as a VM would write it.
fn scribble(file: &Path) {
    let file = File::options().write(true).open(file).unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    file.write_all_at(b"somebody else", middle).unwrap();
}

/// The images of a lab in several kinds: the named file, and the file with the data.
fn images(lab: &Lab) -> Vec<(PathBuf, PathBuf)> {
    let flat = lab.in_format("vmdk", "subformat=monolithicFlat", "flat.vmdk");
    let base = lab.in_format("qcow2", "", "base.qcow2");
    let overlay = lab.path("overlay.qcow2");
    create_overlay("base.qcow2", "qcow2", &overlay);
    vec![
        (lab.raw.clone(), lab.raw.clone()),
        (flat, lab.path("flat-flat.vmdk")),
        (overlay, base),
    ]
}

fn nothing_left(lab: &Lab) {
    let left: Vec<_> = names(lab.dir.path())
        .into_iter()
        .filter(|name| name.contains("out"))
        .collect();
    assert_eq!(left, Vec::<String>::new());
}

#[test]
fn the_source_is_held_until_the_result_is_there() {
    if !have(&TOOLS) || !have(&["qemu-io"]) {
        return;
    }
    let lab = Lab::small();
    for (named, data) in images(&lab) {
        let before = (sha256(&named), sha256(&data));
        for (verb, point) in [
            ("inspect", "looked"),
            ("plan", "looked"),
            ("verify", "looked"),
            ("convert", "fixed"),
            ("convert", "before-rename"),
        ] {
            eprintln!("{} {verb} {point}", named.display());
            assert!(a_vm_can_start(&data));
            let run = Paused::at(point, command(&lab, verb, &named, &[]));
            assert!(!a_vm_can_start(&data), "not held");
            run.go_on().expect(if verb == "verify" { 4 } else { 0 });
            let _ = fs::remove_dir_all(lab.path("out"));
        }
        assert_eq!((sha256(&named), sha256(&data)), before, "its digest");
    }
}

#[test]
fn a_change_during_a_run_is_exit_1_and_leaves_nothing() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    for (named, data) in images(&lab) {
        for (verb, point) in [
            ("inspect", "looked"),
            ("plan", "looked"),
            ("verify", "looked"),
            ("convert", "inspected"),
            ("convert", "before-rename"),
        ] {
            eprintln!("{} {verb} {point}", named.display());
            let run = Paused::at(point, command(&lab, verb, &named, &[]));
            scribble(&data);
            let run = run.go_on().expect(1);
            assert!(run.stderr.contains(text(&data)), "{}", run.stderr);
            assert!(run.stderr.contains("was changed by"), "{}", run.stderr);
            assert!(run.stderr.contains("hint:"), "{}", run.stderr);
            nothing_left(&lab);
        }
        // A new owner or mode is no change: libvirt changes the owner of files.
        let run = Paused::at("before-rename", command(&lab, "convert", &named, &[]));
        fs::set_permissions(&data, fs::Permissions::from_mode(0o640)).unwrap();
        run.go_on().expect(0);
        fs::remove_dir_all(lab.path("out")).unwrap();
    }
}

#[test]
fn in_place_commits_nothing_over_a_change() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let qcow2 = lab.in_format("qcow2", "", "guest.qcow2");
    for disk in [lab.raw.clone(), qcow2] {
        for point in ["inspected", "fixed", "undo-log"] {
            eprintln!("{} {point}", disk.display());
            let run = Paused::at(point, command(&lab, "convert", &disk, &["--in-place"]));
            assert!(!a_vm_can_start(&disk));
            scribble(&disk);
            let theirs = sha256(&disk);
            let run = run.go_on().expect(1);
            assert!(run.stderr.contains("was changed by"), "{}", run.stderr);
            assert_eq!(sha256(&disk), theirs);
            nothing_left(&lab);
        }
        finish(command(&lab, "convert", &disk, &["--in-place"])).expect(0);
        let out = lab.path("out");
        rollback_wants_the_disk_for_itself(&disk, &out);
        fs::remove_dir_all(out).unwrap();
    }
}

fn rollback_wants_the_disk_for_itself(disk: &Path, out: &Path) {
    let fixed = sha256(disk);
    let mut reader = Command::new(binary());
    reader.arg("inspect").arg(disk);
    let reader = Paused::at("looked", reader);
    let refused = h2k(["rollback", text(out)]).expect(1);
    assert!(refused.stderr.contains("in use"), "{}", refused.stderr);
    assert_eq!(sha256(disk), fixed);
    reader.go_on().expect(0);
    h2k(["rollback", text(out)]).expect(0);
    assert_ne!(sha256(disk), fixed);
}

/// As root, a file in somebody else's directory becomes a link to one that only root may read.
#[test]
fn a_file_that_becomes_a_link_after_the_check() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let secret = lab.path("secret");
    let mark = b"for root's eyes only";
    fs::write(&secret, mark.repeat(64 << 10)).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    for (named, data) in images(&lab).into_iter().skip(1) {
        let kept = lab.path("kept");
        for point in [
            "before qemu-img info #2",
            "before qemu-img check #1",
            "inspected",
        ] {
            eprintln!("{} {point}", named.display());
            let flat = named.extension().unwrap() == "vmdk";
            if flat && point.ends_with("#2") {
                continue;
            }
            let run = Paused::at(
                point,
                command(&lab, "convert", &named, &["--format", "raw"]),
            );
            fs::rename(&data, &kept).unwrap();
            symlink(&secret, &data).unwrap();
            let run = run.go_on();
            let what = format!("{} {}", run.code, run.stderr);
            fs::remove_file(&data).unwrap();
            fs::rename(&kept, &data).unwrap();
            assert_eq!(run.code, 1, "{what}");
            assert!(what.contains("took its name"), "{what}");
            nothing_left(&lab);
        }
        // It leads out of the directory from the start.
        let elsewhere = tempfile::tempdir().unwrap();
        let hidden = elsewhere.path().join("hidden");
        tool("cp", &["--sparse=always", text(&data), text(&hidden)]);
        fs::rename(&data, &kept).unwrap();
        symlink(&hidden, &data).unwrap();
        let run = h2k(["inspect", text(&named)]).expect(1);
        assert!(
            run.stderr.contains("outside its directory"),
            "{}",
            run.stderr
        );
        fs::remove_file(&data).unwrap();
        fs::rename(&kept, &data).unwrap();
    }
}

#[test]
fn what_vmware_has_locked_is_refused() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    lab.in_format("vmdk", "subformat=monolithicFlat", "vm.vmdk");
    let vmx = lab.path("vm.vmx");
    fs::write(
        &vmx,
        "displayName = \"vm\"\nscsi0.present = \"TRUE\"\nscsi0:0.present = \"TRUE\"\n\
         scsi0:0.fileName = \"vm.vmdk\"\n",
    )
    .unwrap();
    let (disk, inode) = (lab.path("vm.vmdk"), |name: &str| {
        std::os::unix::fs::MetadataExt::ino(&lab.path(name).metadata().unwrap())
    });
    let nfs = format!(".lck-{:016x}", inode("vm-flat.vmdk").swap_bytes());
    for (lock, sources) in [
        ("vm.vmdk.lck/M123.lck", vec![&disk, &vmx]),
        ("vm-flat.vmdk.lck/M123.lck", vec![&disk, &vmx]),
        ("vm.vmx.lck/M123.lck", vec![&vmx]),
        (&*nfs, vec![&disk, &vmx]),
    ] {
        let lock = lab.path(lock);
        fs::create_dir_all(lock.parent().unwrap()).unwrap();
        fs::write(&lock, "host 4711").unwrap();
        for source in sources {
            for (verb, more) in [
                ("inspect", &[][..]),
                ("plan", &[]),
                ("verify", &[]),
                ("convert", &[]),
                ("convert", &["--dry-run"]),
            ] {
                eprintln!("{} {verb} {}", lock.display(), source.display());
                let run = finish(command(&lab, verb, source, more)).expect(1);
                assert!(run.stderr.contains("VMware"), "{}", run.stderr);
                assert!(run.stderr.contains("power the VM off"), "{}", run.stderr);
                assert!(run.stderr.contains(".lck"), "{}", run.stderr);
                nothing_left(&lab);
            }
        }
        fs::remove_file(&lock).unwrap();
    }
    // Leftovers of a crash: empty directories, and the lock of another file.
    let other = format!(".lck-{:016x}", inode("guest.raw").swap_bytes());
    fs::write(lab.path(&other), "").unwrap();
    h2k(["inspect", text(&vmx)]).expect(0);
}

#[test]
fn of_two_runs_in_place_one_goes_on() {
    concurrent_runs_on_one_source(3);
}

/// `HYPER2KVM_PAIRS=200 cargo test --test source -- --ignored pairs_of_runs_on_one_source`
#[test]
#[ignore = "a campaign"]
fn pairs_of_runs_on_one_source() {
    let pairs = std::env::var("HYPER2KVM_PAIRS").ok();
    concurrent_runs_on_one_source(pairs.and_then(|n| n.parse().ok()).unwrap_or(200));
}

/// Pairs of runs on one source, the second one slightly later each time: two that change it, and
/// one that changes and one that reads it. In the end the disk is unchanged, or fixed once and can
/// be rolled back.
fn concurrent_runs_on_one_source(pairs: u32) {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    // Compared with it byte for byte, which is quicker than a digest.
    let before = lab.path("before.raw");
    tool("cp", &["--sparse=always", text(&lab.raw), text(&before)]);
    let (mut both, mut one, mut none) = (0, 0, 0);
    for pair in 0..pairs {
        let (a, b) = (lab.path("a"), lab.path("b"));
        let start = |out: &Path, more: &[&str]| {
            let mut command = Command::new(binary());
            command.arg("convert").arg(&lab.raw).args(more);
            command.arg("--virtio-iso").arg(virtio_win());
            command.arg("-o").arg(out).stderr(Stdio::piped());
            command.stdout(Stdio::null()).spawn().unwrap()
        };
        let first = start(&a, &["--in-place"]);
        std::thread::sleep(Duration::from_millis(u64::from(pair % 40) * 10));
        let reads = pair % 2 == 1;
        let second = start(&b, if reads { &[] } else { &["--in-place"] });
        // Both end before anything else looks at the disk.
        let runs = [(&a, first, true), (&b, second, !reads)];
        let runs =
            runs.map(|(out, run, in_place)| (out, run.wait_with_output().unwrap(), in_place));
        let mut fixed = Vec::new();
        let mut done = 0;
        for (out, run, in_place) in runs {
            let stderr = String::from_utf8_lossy(&run.stderr).into_owned();
            match run.status.code() {
                Some(0) => {
                    done += 1;
                    if in_place {
                        let report = fs::metadata(out.join("report.json")).unwrap();
                        fixed.push((report.modified().unwrap(), out));
                    }
                }
                Some(1) => {
                    assert!(stderr.contains("in use"), "{pair}: {stderr}");
                    assert!(!out.exists(), "{pair}");
                }
                code => panic!("{pair}: {code:?} {stderr}"),
            }
        }
        // The last one first. It may have found a disk that was ready.
        fixed.sort();
        let ready = fixed.len() == 2;
        for (at, (_, out)) in fixed.into_iter().enumerate().rev() {
            h2k(["verify", text(&lab.raw)]).expect(0);
            let undone = h2k(["rollback", text(out)]);
            if undone.code != 0 {
                let nothing = undone.stderr.contains("nothing to undo");
                assert!(ready && at == 1 && nothing, "{pair}: {}", undone.stderr);
            }
        }
        tool("cmp", &[text(&lab.raw), text(&before)]);
        for out in [&a, &b] {
            let _ = fs::remove_dir_all(out);
        }
        match done {
            0 => none += 1,
            1 => one += 1,
            _ => both += 1,
        }
        if pair % 20 == 19 {
            eprintln!("pair {}: {both} both, {one} one, {none} none", pair + 1);
        }
    }
    eprintln!("{pairs} pairs: {both} both, {one} one, {none} none");
    assert!(both + one > none, "{both} {one} {none}");
}

#[test]
fn a_block_device_that_is_written_to() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let Some(device) = LoopOver::file(&lab.raw, &[]) else {
        return;
    };
    let device = &device.0;
    let run = Paused::at("before-rename", command(&lab, "convert", device, &[]));
    let file = File::options().write(true).open(device).unwrap();
    file.write_all_at(&[0x55; 4096], 256 << 20).unwrap();
    file.sync_all().unwrap();
    let run = run.go_on().expect(1);
    assert!(run.stderr.contains("was changed by"), "{}", run.stderr);
    nothing_left(&lab);
    finish(command(&lab, "convert", device, &[])).expect(0);
}

/// A loop device mounted over the source writes to it without a lock.
#[test]
fn a_source_under_a_loop_device_is_refused() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let other = lab.path("other.raw");
    fs::hard_link(&lab.raw, &other).unwrap();
    let before = sha256(&lab.raw);
    let refused = |verb: &str, more: &[&str], device: &Path| {
        let run = finish(command(&lab, verb, &lab.raw, more)).expect(1);
        let says = format!("in use by the loop device {}", device.display());
        assert!(run.stderr.contains(&says), "{verb}: {}", run.stderr);
        assert!(run.stderr.contains("losetup -d"), "{}", run.stderr);
        nothing_left(&lab);
    };
    // Attached by another name of the file.
    let Some(device) = LoopOver::file(&other, &[]) else {
        return;
    };
    for (verb, more) in [
        ("inspect", &[][..]),
        ("plan", &[]),
        ("verify", &[]),
        ("convert", &[]),
        ("convert", &["--in-place"]),
    ] {
        refused(verb, more, &device.0);
    }
    drop(device);
    // A read-only one conflicts with writers only.
    let Some(device) = LoopOver::file(&other, &["-r"]) else {
        return;
    };
    finish(command(&lab, "inspect", &lab.raw, &[])).expect(0);
    refused("convert", &["--in-place"], &device.0);
    assert_eq!(sha256(&lab.raw), before);
    drop(device);

    finish(command(&lab, "convert", &lab.raw, &["--in-place"])).expect(0);
    let fixed = sha256(&lab.raw);
    let Some(device) = LoopOver::file(&other, &[]) else {
        return;
    };
    let out = lab.path("out");
    let run = h2k(["rollback", text(&out)]).expect(1);
    assert!(run.stderr.contains("losetup -d"), "{}", run.stderr);
    assert_eq!(sha256(&lab.raw), fixed);
    drop(device);
    h2k(["rollback", text(&out)]).expect(0);
    assert_eq!(sha256(&lab.raw), before);
}

#[test]
fn a_mounted_block_device_is_refused() {
    if !have(&TOOLS) || !have(&["mkfs.ext4"]) {
        return;
    }
    let lab = Lab::small();
    let image = lab.path("ext4");
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    tool("mkfs.ext4", &["-q", text(&image)]);
    let Some(device) = LoopOver::file(&image, &[]) else {
        return;
    };
    let place = lab.path("mnt");
    fs::create_dir(&place).unwrap();
    let mut mount = Command::new("mount");
    mount.arg(&device.0);
    let Some(_mounted) = Mounted::at(&place, mount) else {
        return;
    };
    for (verb, more) in [
        ("inspect", &[][..]),
        ("plan", &[]),
        ("convert", &[]),
        ("convert", &["--in-place"]),
    ] {
        let run = finish(command(&lab, verb, &device.0, more)).expect(1);
        assert!(run.stderr.contains("it is mounted"), "{}", run.stderr);
        assert!(run.stderr.contains("unmount it first"), "{}", run.stderr);
        nothing_left(&lab);
    }
}

/// A block device that is changed in place cannot be mounted in the meantime.
#[test]
fn a_block_device_is_held_while_it_is_written() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let Some(device) = LoopOver::file(&lab.raw, &[]) else {
        return;
    };
    let exclusively = || {
        let mut options = File::options();
        let options = options.read(true).custom_flags(EXCLUSIVE);
        options.open(&device.0).is_ok()
    };
    assert!(exclusively());
    let run = Paused::at(
        "undo-log",
        command(&lab, "convert", &device.0, &["--in-place"]),
    );
    assert!(!exclusively());
    run.go_on().expect(0);
    assert!(exclusively());
}

#[test]
fn nobody_reads_what_is_said() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let qcow2 = lab.in_format("qcow2", "", "guest.qcow2");
    let none = lab.path("none.qcow2");
    let closed = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    for (verb, source, code) in [
        ("inspect", &qcow2, 0),
        ("convert", &qcow2, 0),
        ("convert", &none, 1),
        ("verify", &qcow2, 4),
    ] {
        for more in [&[][..], &["-vv"], &["--progress", "json"], &["--json"]] {
            let mut run = command(&lab, verb, source, more);
            run.stdout(closed()).stderr(closed());
            let status = run.status().unwrap();
            assert_eq!(status.code(), Some(code), "{verb} {more:?}");
            if code == 0 && verb == "convert" {
                fs::remove_dir_all(lab.path("out")).unwrap();
            }
            nothing_left(&lab);
        }
    }
    // A reader that has closed its end is no error; a lost result is.
    let mut full = command(&lab, "inspect", &qcow2, &["--json"]);
    full.stdout(File::options().write(true).open("/dev/full").unwrap());
    full.stderr(Stdio::piped());
    let out = full.output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(said.contains("standard output"), "{said}");
}

#[test]
fn a_signal_is_heard_while_the_storage_daemon_is_silent() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let qcow2 = lab.in_format("qcow2", "", "guest.qcow2");
    let bin = lab.path("bin");
    fs::create_dir(&bin).unwrap();
    let fake = bin.join("qemu-storage-daemon");
    fs::write(&fake, "#!/bin/sh\nexec sleep 600\n").unwrap();
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    for verb in ["inspect", "convert", "plan", "verify"] {
        let mut run = command(&lab, verb, &qcow2, &[]);
        run.env("PATH", &path).stderr(Stdio::piped());
        let mut run = run.stdout(Stdio::null()).spawn().unwrap();
        // It waits for the daemon by then.
        let sleeps = || children(run.id()).iter().any(|name| name == "sleep");
        let start = Instant::now();
        while !sleeps() {
            assert!(start.elapsed() < Duration::from_secs(60), "{verb}");
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(Duration::from_millis(200));
        let start = Instant::now();
        tool("kill", &["-TERM", &run.id().to_string()]);
        while run.try_wait().unwrap().is_none() {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "{verb}: not heard"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let status = run.wait().unwrap();
        assert_eq!(status.code(), Some(130), "{verb}: {}", said(&mut run));
        nothing_left(&lab);
    }
}

/// The names of the children of a process.
fn children(process: u32) -> Vec<String> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{process}/task"))
        .into_iter()
        .flatten()
    {
        let list = fs::read_to_string(task.unwrap().path().join("children"));
        for child in list.unwrap_or_default().split_whitespace() {
            let name = fs::read_to_string(format!("/proc/{child}/comm"));
            found.push(name.unwrap_or_default().trim().to_string());
        }
    }
    found
}

#[test]
fn what_is_missing_is_named() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let qcow2 = lab.in_format("qcow2", "", "guest.qcow2");
    let shell = |script: &str, verb: &str| {
        let mut run = command(&lab, verb, &qcow2, &[]);
        let mut shell = Command::new("bash");
        shell.args(["-c", &format!("{script}; exec \"$@\""), "bash"]);
        shell.arg(run.get_program()).args(run.get_args());
        run = shell;
        run.env_remove("HYPER2KVM_VIRTIO_ISO");
        finish(run)
    };
    // With less the program cannot even be loaded.
    let least = fs::metadata(binary()).unwrap().len() >> 10;
    for limit in [least, 100_000, 300_000] {
        let run = shell(&format!("ulimit -v {limit}"), "convert");
        if run.code == 0 {
            fs::remove_dir_all(lab.path("out")).unwrap();
            continue;
        }
        assert!(matches!(run.code, 1 | 5), "{} {}", run.code, run.stderr);
        assert!(run.stderr.contains("ulimit -v"), "{}", run.stderr);
        nothing_left(&lab);
    }
    let hides = Command::new("unshare")
        .args(["-m", "umount", "-l", "/proc"])
        .status();
    if !hides.is_ok_and(|status| status.success()) {
        return skip("mount", "/proc cannot be hidden");
    }
    for verb in ["inspect", "convert"] {
        let mut run = command(&lab, verb, &qcow2, &[]);
        let mut hidden = Command::new("unshare");
        hidden.args(["-m", "sh", "-c", "umount -l /proc; exec \"$@\"", "sh"]);
        hidden.arg(run.get_program()).args(run.get_args());
        run = hidden;
        let run = finish(run).expect(5);
        assert!(
            run.stderr.contains("/proc is not mounted"),
            "{}",
            run.stderr
        );
        nothing_left(&lab);
    }
}
