//! The output directory: what `--force` replaces and what it leaves alone, two runs at once, kills while a
//! result is replaced, and who may read what is written.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod support;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{
    Lab, LoopOver, Mounted, Paused, Run, TOOLS, binary, finish, h2k, have, names, sha256, skip,
    text, tool, virtio_win,
};

fn command(source: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = support::command("convert", source, more);
    command.arg("-o").arg(out);
    command
}

fn convert(source: &Path, out: &Path, more: &[&str]) -> Run {
    finish(command(source, out, more))
}

/// A whole result: its disk is one that `verify` accepts.
#[track_caller]
fn whole(out: &Path, name: &str) {
    h2k(["verify", text(&out.join(format!("{name}.qcow2")))]).expect(0);
    assert!(out.join("report.json").exists());
}

struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Holds an image as a running VM does.
fn hold(disk: &Path) -> Holder {
    let start = Instant::now();
    loop {
        let mut command = Command::new("qemu-io");
        let child = command
            .args(["-f", "qcow2"])
            .arg(disk)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let holder = Holder(child);
        // Who looks has the image open too: a qemu-io that comes at that moment stays without it.
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(250));
            let mut info = Command::new("qemu-img");
            if !info
                .arg("info")
                .arg(disk)
                .output()
                .unwrap()
                .status
                .success()
            {
                return holder;
            }
        }
        assert!(start.elapsed() < Duration::from_secs(60), "nobody holds it");
    }
}

#[test]
fn force_leaves_alone_what_is_needed() {
    if !have(&TOOLS) || !have(&["qemu-io"]) {
        return;
    }
    let lab = Lab::small();
    let out = lab.path("guest-kvm");
    convert(&lab.raw, &out, &[]).expect(0);
    let disk = out.join("guest.qcow2");
    let refused = |says: &[&str]| {
        let before = sha256(&disk);
        let run = convert(&lab.raw, &out, &["--force"]).expect(1);
        for says in says {
            assert!(run.stderr.contains(says), "{says}: {}", run.stderr);
        }
        assert!(run.stderr.contains("hint: "), "{}", run.stderr);
        assert_eq!(sha256(&disk), before);
        assert!(!lab.path(".guest-kvm.partial").exists());
    };
    eprintln!("a running VM");
    let holder = hold(&disk);
    let run = convert(&lab.raw, &out, &["--force"]).expect(1);
    assert!(run.stderr.contains("in use"), "{}", run.stderr);
    eprintln!("the same by --batch");
    let list = lab.path("fleet.yaml");
    let text_of_list = format!(
        "defaults: {{virtio-iso: {}}}\nmachines: [{{source: guest.raw}}]\n",
        virtio_win().display()
    );
    fs::write(&list, text_of_list).unwrap();
    let run = h2k(["convert", "--batch", text(&list), "--force"]).expect(101);
    assert!(run.stdout.contains("in use") || run.stderr.contains("in use"));
    drop(holder);
    whole(&out, "guest");

    eprintln!("a disk that was written to");
    let kept = lab.path("kept.qcow2");
    tool("cp", &["-p", text(&disk), text(&kept)]);
    tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 1 300M 4k", text(&disk)],
    );
    refused(&["has changed since its report"]);
    fs::remove_file(&disk).unwrap();
    fs::rename(&kept, &disk).unwrap();
    refused(&["is another file"]);
    fs::remove_dir_all(&out).unwrap();

    eprintln!("a VM past its switch");
    convert(&lab.raw, &out, &[]).expect(0);
    let record = |phase: &str| {
        json!({"schema": "hyper2kvm/boot/1", "version": "0", "phase": phase, "uri": "qemu:///system",
               "name": "guest", "uuid": "00000000-0000-0000-0000-000000000001", "bootstrap": null,
               "proof": null, "final": null, "protected": [], "evidence": [], "warnings": [],
               "next_commands": []})
    };
    for (phase, says) in [("done", "past its switch"), ("bootstrap", "has started")] {
        fs::write(out.join("boot.json"), record(phase).to_string()).unwrap();
        fs::set_permissions(out.join("boot.json"), Permissions::from_mode(0o600)).unwrap();
        refused(&[says, "virsh -c qemu:///system undefine --nvram guest"]);
    }
    fs::remove_file(out.join("boot.json")).unwrap();

    eprintln!("files of the user");
    fs::write(out.join("notes.txt"), "mine").unwrap();
    let run = convert(&lab.raw, &out, &["--force", "--json"]).expect(0);
    assert_eq!(fs::read_to_string(out.join("notes.txt")).unwrap(), "mine");
    assert!(run.json()["warnings"].to_string().contains("notes.txt"));
    whole(&out, "guest");
    let listed: Vec<String> = run.json()["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["path"].as_str().unwrap().to_owned())
        .collect();
    for file in ["guest.qcow2", "plan.json", "report.html", "journal.json"] {
        assert!(listed.iter().any(|f| f == file), "{file}: {listed:?}");
    }
}

#[test]
fn a_loop_device_over_a_result() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let out = lab.path("out");
    convert(&lab.raw, &out, &["--format", "raw"]).expect(0);
    let (disk, images) = (out.join("guest.raw"), lab.path("images"));
    fs::create_dir(&images).unwrap();
    // It takes no lock, and writes nothing yet.
    let Some(device) = LoopOver::file(&disk, &[]) else {
        return;
    };
    for run in [
        convert(&lab.raw, &out, &["--format", "raw", "--force"]),
        finish(install(&out, &images, "")),
    ] {
        let says = format!("is in use by the loop device {}", device.0.display());
        assert!(run.stderr.contains(&says), "{}", run.stderr);
        assert_eq!(run.code, 1);
        assert!(disk.exists() && names(&images).is_empty());
    }
    drop(device);
    convert(&lab.raw, &out, &["--format", "raw", "--force"]).expect(0);
}

#[test]
fn the_source_in_the_target_is_kept() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let out = lab.path("out");
    convert(&lab.raw, &out, &["--name", "vm"]).expect(0);
    let disk = out.join("vm.qcow2");
    let before = sha256(&disk);
    let overlay = lab.path("overlay.qcow2");
    let base = text(&disk);
    tool(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            base,
            text(&overlay),
        ],
    );
    for source in [&disk, &overlay] {
        let run = convert(
            source,
            &out,
            &["--force", "--name", "vm", "--allow-backing", text(&out)],
        )
        .expect(1);
        assert!(
            run.stderr.contains("would be replaced by the result"),
            "{}",
            run.stderr
        );
        assert_eq!(sha256(&disk), before);
    }
    whole(&out, "vm");
}

/// Waits until the run has begun, and puts a file into its target.
fn meanwhile(lab: &Lab, out: &Path, act: impl Fn()) -> Run {
    let mut command = command(&lab.raw, out, &[]);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let name = format!(".{}.partial", out.file_name().unwrap().to_str().unwrap());
    let start = Instant::now();
    while !out.with_file_name(&name).exists() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "it does not begin"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    act();
    let out = child.wait_with_output().unwrap();
    Run {
        code: out.status.code().unwrap_or(-1),
        stdout: String::from_utf8(out.stdout).unwrap(),
        stderr: String::from_utf8(out.stderr).unwrap(),
    }
}

#[test]
fn what_appears_during_the_run_stays() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let out = lab.path("out");
    fs::create_dir(&out).unwrap();
    meanwhile(&lab, &out, || {
        fs::write(out.join("thesis.odt"), "years").unwrap()
    })
    .expect(0);
    assert_eq!(fs::read_to_string(out.join("thesis.odt")).unwrap(), "years");
    whole(&out, "guest");
    fs::remove_dir_all(&out).unwrap();

    let run = meanwhile(&lab, &out, || fs::create_dir(&out).unwrap()).expect(1);
    assert!(
        run.stderr.contains("appeared during the run"),
        "{}",
        run.stderr
    );
    assert_eq!(names(lab.dir.path()), ["guest.raw", "out"]);
}

#[test]
fn two_runs_on_one_target() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let out = lab.path("out");
    let start = Instant::now();
    convert(&lab.raw, &out, &[]).expect(0);
    let took = start.elapsed();
    fs::remove_dir_all(&out).unwrap();
    for pair in 0..10u32 {
        let runs: Vec<_> = ["a", "b"]
            .map(|name| {
                let mut command = command(&lab.raw, &out, &["--name", name]);
                command.stdout(Stdio::null()).stderr(Stdio::piped());
                let child = command.spawn().unwrap();
                // The second starts ever nearer to the end of the first.
                std::thread::sleep(took * pair / 9);
                (name, child)
            })
            .into_iter()
            .map(|(name, child)| (name, child.wait_with_output().unwrap()))
            .collect();
        let done: Vec<_> = runs
            .iter()
            .filter(|(_, run)| run.status.success())
            .collect();
        assert_eq!(done.len(), 1, "{pair}: {runs:?}");
        for (name, run) in &runs {
            let stderr = String::from_utf8_lossy(&run.stderr);
            let refused = stderr.contains("another conversion") || stderr.contains("exists");
            assert!(run.status.success() || refused, "{name}: {stderr}");
        }
        whole(&out, done[0].0);
        assert_eq!(names(lab.dir.path()), ["guest.raw", "out"]);
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn links_and_mount_points_are_noticed_before_the_start() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let real = lab.path("real");
    fs::create_dir(&real).unwrap();
    let link = lab.path("link");
    symlink(&real, &link).unwrap();
    let refused = |out: &Path, says: &str| {
        let run = convert(&lab.raw, out, &[]).expect(1);
        assert!(run.stderr.contains(says), "{}", run.stderr);
        assert!(!run.stderr.contains("Fixing"), "{}", run.stderr);
    };
    refused(&link, "is a symbolic link");
    assert!(link.is_symlink() && names(&real).is_empty());
    let mount = lab.path("mount");
    fs::create_dir(&mount).unwrap();
    let mut tmpfs = Command::new("mount");
    tmpfs.args(["-t", "tmpfs", "-o", "size=4m", "none"]);
    if let Some(_mounted) = Mounted::at(&mount, tmpfs) {
        refused(&mount, "is a mount point");
        assert!(names(&mount).is_empty());
    }
    // The same file system at another place.
    let mut bind = Command::new("mount");
    bind.arg("--bind").arg(&real);
    if let Some(_mounted) = Mounted::at(&mount, bind) {
        refused(&mount, "is a mount point");
    }
    let mut read_only = Command::new("mount");
    read_only.args(["-t", "tmpfs", "-o", "ro", "tmpfs"]);
    if let Some(_mounted) = Mounted::at(&mount, read_only) {
        for more in [&["--dry-run"][..], &[]] {
            let run = convert(&lab.raw, &mount.join("a/b"), more).expect(1);
            assert!(
                run.stderr.contains("cannot write"),
                "{more:?}: {}",
                run.stderr
            );
        }
    }
}

/// NTFS by FUSE renames neither with an exchange nor to a free name only, like many network file systems.
#[test]
fn a_file_system_without_an_exchange() {
    if !have(&TOOLS) || !have(&["ntfs-3g"]) {
        return;
    }
    let lab = Lab::small();
    let (image, mount) = (lab.path("ntfs"), lab.path("mnt"));
    File::create(&image).unwrap().set_len(256 << 20).unwrap();
    tool("mkntfs", &["-F", "-Q", "-q", text(&image)]);
    fs::create_dir(&mount).unwrap();
    let mut fuse = Command::new("ntfs-3g");
    fuse.args(["-o", "permissions"]).arg(&image);
    let Some(_mounted) = Mounted::at(&mount, fuse) else {
        return;
    };
    let out = mount.join("out");
    convert(&lab.raw, &out, &["--name", "old"]).expect(0);
    fs::write(out.join("notes.txt"), "mine").unwrap();
    let mut killed = command(&lab.raw, &out, &["--name", "new", "--force"]);
    // Reached only where the two directories cannot be exchanged in one step.
    let between = "between renames of the output directory #1=kill";
    killed.env("HYPER2KVM_FAILPOINT", between);
    assert_eq!(finish(killed).code, -1);
    assert!(!out.exists());
    // The result is back for whatever verb comes next.
    h2k(["rollback", text(&out)]).expect(1);
    whole(&out, "new");
    assert_eq!(fs::read_to_string(out.join("notes.txt")).unwrap(), "mine");
    convert(&lab.raw, &out, &["--name", "newer", "--force"]).expect(0);
    whole(&out, "newer");
    assert_eq!(fs::read_to_string(out.join("notes.txt")).unwrap(), "mine");
    assert_eq!(names(&mount), ["out"]);
    // A name that is taken is not replaced there either.
    let images = mount.join("images");
    fs::create_dir(&images).unwrap();
    fs::write(images.join("newer.qcow2"), "theirs").unwrap();
    let run = finish(install(&out, &images, "")).expect(1);
    assert!(run.stderr.contains("exists already"), "{}", run.stderr);
    let theirs = fs::read_to_string(images.join("newer.qcow2")).unwrap();
    assert_eq!(theirs, "theirs");
    whole(&out, "newer");
}

#[test]
fn killed_while_a_result_is_replaced() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let out = lab.path("out");
    let log = lab.path("steps");
    let begin = || {
        let _ = fs::remove_dir_all(&out);
        convert(&lab.raw, &out, &["--name", "old"]).expect(0);
        fs::write(out.join("notes.txt"), "mine").unwrap();
    };
    let replace = |points: &str| {
        let mut command = command(&lab.raw, &out, &["--name", "new", "--force"]);
        command.env("HYPER2KVM_FAILPOINT", points);
        finish(command)
    };
    for without in ["", "exchange=fail,"] {
        begin();
        replace(&format!("{without}*=record:{}", text(&log))).expect(0);
        whole(&out, "new");
        let steps = fs::read_to_string(&log).unwrap();
        fs::remove_file(&log).unwrap();
        let wanted = [
            "of the output directory",
            "of the replacement",
            "of a kept file",
            "old result",
        ];
        let steps: Vec<&str> = steps
            .lines()
            .filter(|step| wanted.iter().any(|w| step.contains(w)))
            .collect();
        assert!(steps.len() >= 7, "{steps:?}");
        assert_eq!(
            !without.is_empty(),
            steps.iter().any(|s| s.contains("between"))
        );
        for step in steps {
            eprintln!("{without}{step}");
            begin();
            assert_eq!(replace(&format!("{without}{step}=kill")).code, -1);
            if without.is_empty() {
                assert!(out.join("report.json").exists(), "{step}: not in one step");
            }
            // The next run of whatever verb has the result back under its name.
            let run = convert(&lab.raw, &out, &["--name", "new"]).expect(1);
            assert!(run.stderr.contains("out exists"), "{step}: {}", run.stderr);
            let name = match out.join("new.qcow2").exists() {
                true => "new",
                false => "old",
            };
            whole(&out, name);
            assert_eq!(
                fs::read_to_string(out.join("notes.txt")).unwrap(),
                "mine",
                "{step}"
            );
            replace("").expect(0);
            whole(&out, "new");
            assert_eq!(names(lab.dir.path()), ["guest.raw", "out"], "{step}");
            assert_eq!(
                fs::read_to_string(out.join("notes.txt")).unwrap(),
                "mine",
                "{step}"
            );
        }
    }
}

/// The result has its name: what fails after that undoes nothing.
#[test]
fn a_fault_after_the_rename_is_a_warning() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let out = lab.path("out");
    let run = |more: &[&str], points: &str| {
        eprintln!("{more:?} {points}");
        let mut command = command(&lab.raw, &out, more);
        command.env("HYPER2KVM_FAILPOINT", points);
        finish(command)
    };
    let after = "after rename of the output directory #1=fail";
    let in_steps = format!("exchange=fail,{after}");
    for (name, more, points) in [
        ("a", &[][..], after),
        ("b", &["--force"], after),
        ("c", &["--force"], &in_steps),
    ] {
        let run = run(&[&["--name", name], more].concat(), points).expect(0);
        assert!(run.stderr.contains("loss of power"), "{}", run.stderr);
        whole(&out, name);
        assert_eq!(names(lab.dir.path()), ["guest.raw", "out"]);
    }
    // Between the two renames there is no result: the old one gets its name back at once.
    let between = "exchange=fail,between renames of the output directory #1=fail";
    run(&["--name", "d", "--force"], between).expect(1);
    whole(&out, "c");
    assert_eq!(names(lab.dir.path()), ["guest.raw", "out"]);
    // In place: what is under the partial name by then is the journal of another run.
    let before = sha256(&lab.raw);
    run(&["--in-place", "--force"], after).expect(0);
    assert_ne!(sha256(&lab.raw), before);
    h2k(["rollback", text(&out)]).expect(0);
    assert_eq!(sha256(&lab.raw), before);
}

/// The name of a result must not survive a loss of power that its files do not.
#[test]
fn files_are_synced_before_they_get_their_name() {
    if !have(&TOOLS) || Command::new("strace").arg("-V").output().is_err() {
        return;
    }
    let lab = Lab::small();
    let (out, log) = (lab.path("out"), lab.path("log"));
    // To a free name, and over an empty directory.
    for empty in [false, true] {
        if empty {
            fs::remove_dir_all(&out).unwrap();
            fs::create_dir(&out).unwrap();
        }
        let convert = command(&lab.raw, &out, &[]);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-y", "--seccomp-bpf", "-o"]).arg(&log);
        strace.args(["-e", "trace=fsync,fdatasync,renameat,renameat2"]);
        strace.arg(convert.get_program()).args(convert.get_args());
        finish(strace).expect(0);
        let calls = fs::read_to_string(&log).unwrap();
        let end = calls.find("\"out\"").expect("the rename");
        let synced = |name: &str| calls[..end].contains(&format!("/.out.partial/{name}>"));
        for file in report(&out)["files"].as_array().unwrap() {
            let name = file["path"].as_str().unwrap();
            assert!(synced(name), "{name}, empty: {empty}");
        }
        assert!(synced("report.json") && calls[..end].contains("/.out.partial>"));
    }
}

#[test]
fn without_locks_it_is_refused_before_the_start() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let out = lab.path("out");
    let run = |points: &str| {
        let mut command = command(&lab.raw, &out, &[]);
        command.env("HYPER2KVM_FAILPOINT", points);
        finish(command)
    };
    let refused = run("flock=fail,record-lock=fail").expect(1);
    assert!(
        refused.stderr.contains("no file locks"),
        "{}",
        refused.stderr
    );
    assert!(!refused.stderr.contains("Inspecting"), "{}", refused.stderr);
    assert!(!out.exists());
    // Some network file systems have record locks only.
    run("flock=fail").expect(0);
    whole(&out, "guest");
    assert!(!names(lab.dir.path()).contains(&".out.partial".to_owned()));
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// Every entry below a directory with its mode.
fn modes(folder: &Path, found: &mut Vec<(String, bool, u32)>) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let kind = entry.file_type().unwrap();
        found.push((
            entry.path().display().to_string(),
            kind.is_dir(),
            mode(&entry.path()),
        ));
        if kind.is_dir() {
            modes(&entry.path(), found);
        }
    }
}

#[test]
fn nobody_else_reads_a_result() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    for (i, umask) in ["0000", "0022", "0077"].iter().enumerate() {
        let out = lab.path(&format!("{i}/deep/out"));
        let run = Command::new("sh")
            .args(["-c", "umask $0; exec \"$@\"", umask])
            .arg(binary())
            .args(["convert", "--virtio-iso"])
            .arg(virtio_win())
            .args(["--emit", "qemu,proxmox", "-o"])
            .arg(&out)
            .arg(&lab.raw)
            .output()
            .unwrap();
        assert!(
            run.status.success(),
            "{}",
            String::from_utf8_lossy(&run.stderr)
        );
        // QEMU's user gets through, and lists nothing.
        for above in [&out, out.parent().unwrap()] {
            assert_eq!(mode(above), 0o711, "{umask}: {}", above.display());
        }
        let mut found = Vec::new();
        modes(&out, &mut found);
        assert!(found.len() > 10);
        for (path, folder, mode) in found {
            let wanted = match folder || path.ends_with(".sh") {
                true => 0o700,
                false => 0o600,
            };
            assert_eq!(mode, wanted, "umask {umask}: {path}");
        }
        for folder in ["backup", "registry"] {
            assert!(out.join(folder).is_dir(), "{folder}");
        }
    }
}

#[test]
fn a_directory_that_is_there_keeps_its_owner_and_mode() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let out = lab.path("out");
    fs::create_dir(&out).unwrap();
    fs::set_permissions(&out, Permissions::from_mode(0o700)).unwrap();
    let root = rustix::process::geteuid().is_root();
    if root {
        chown(&out, Some(65534), Some(65534)).unwrap();
    }
    for more in [&[][..], &["--force"]] {
        convert(&lab.raw, &out, more).expect(0);
        assert_eq!(mode(&out), 0o700);
        assert_eq!(mode(&out.join("guest.qcow2")), 0o600);
        if root {
            assert_eq!(fs::metadata(&out).unwrap().uid(), 65534);
        }
    }
    // What undoes a fix in place must not lie where others can write.
    fs::remove_dir_all(&out).unwrap();
    fs::create_dir(&out).unwrap();
    fs::set_permissions(&out, Permissions::from_mode(0o777)).unwrap();
    let digest = sha256(&lab.raw);
    let run = convert(&lab.raw, &out, &["--in-place"]).expect(1);
    assert!(
        run.stderr.contains("can be written by others"),
        "{}",
        run.stderr
    );
    assert!(run.stderr.contains("chmod go-w"), "{}", run.stderr);
    assert_eq!(sha256(&lab.raw), digest);
}

/// A partial directory with a journal that would have chosen bytes written to a chosen file.
fn plant(partial: &Path, victim: &Path) {
    let old = fs::read(victim).unwrap();
    let evil = vec![b'!'; old.len()];
    let digest = |bytes: &[u8]| hyper2kvm::text::sha256_hex(bytes);
    fs::create_dir_all(partial.join("backup")).unwrap();
    fs::write(partial.join("backup/blocks.before"), &evil).unwrap();
    fs::write(partial.join("backup/blocks.after"), &old).unwrap();
    let journal = json!({
        "schema": "hyper2kvm/journal/1", "version": "0.1.0", "state": "committing",
        "disk": {"path": victim, "format": "raw", "size_bytes": old.len(), "in_place": true},
        "actions": [],
        "undo": {"before": "backup/blocks.before", "after": "backup/blocks.after", "ranges": [
            {"offset": 0, "len": old.len(), "before_sha256": digest(&evil), "after_sha256": digest(&old)}
        ]},
    });
    fs::write(partial.join("journal.json"), journal.to_string()).unwrap();
    tool("chmod", &["-R", "u=rwX,go=rX", text(partial)]);
}

#[test]
fn a_planted_journal_is_not_followed() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let (out, partial) = (lab.path("out"), lab.path(".out.partial"));
    let victim = lab.path("victim");
    fs::write(&victim, vec![b'v'; 4096]).unwrap();
    let journal = partial.join("journal.json");
    let refused = |says: &str| {
        let run = convert(&lab.raw, &out, &[]).expect(1);
        assert!(!run.stderr.contains("hyper2kvm rollback"), "{}", run.stderr);
        assert!(run.stderr.contains(says), "{says}: {}", run.stderr);
        assert!(journal.exists(), "it is not ours to remove");
        let run = h2k(["rollback", "--journal", text(&journal)]);
        assert!([1, 7].contains(&run.code), "{}", run.stderr);
        assert!(run.stderr.contains(says), "{says}: {}", run.stderr);
        assert_eq!(fs::read(&victim).unwrap(), vec![b'v'; 4096], "{says}");
    };
    plant(&partial, &victim);
    for path in ["", "journal.json"] {
        let path = partial.join(path);
        let was = mode(&path);
        fs::set_permissions(&path, Permissions::from_mode(was | 0o022)).unwrap();
        refused("can be written by others");
        fs::set_permissions(&path, Permissions::from_mode(was)).unwrap();
        if rustix::process::geteuid().is_root() {
            chown(&path, Some(65534), None).unwrap();
            refused("belongs to user 65534");
            chown(&path, Some(0), None).unwrap();
        }
    }
    // Saved blocks that others can write: rollback looks at each file it reads.
    for path in ["backup", "backup/blocks.before"] {
        let path = partial.join(path);
        let was = mode(&path);
        fs::set_permissions(&path, Permissions::from_mode(was | 0o002)).unwrap();
        let run = h2k(["rollback", "--journal", text(&journal)]).expect(7);
        assert!(
            run.stderr.contains("can be written by others"),
            "{}",
            run.stderr
        );
        assert_eq!(fs::read(&victim).unwrap(), vec![b'v'; 4096]);
        fs::set_permissions(&path, Permissions::from_mode(was)).unwrap();
    }
    // A link where the directory, the journal or the blocks should be.
    let moved = lab.path("moved");
    fs::rename(&partial, &moved).unwrap();
    symlink(&moved, &partial).unwrap();
    refused("symbolic link");
    fs::remove_file(&partial).unwrap();
    fs::rename(&moved, &partial).unwrap();
    fs::rename(&journal, &moved).unwrap();
    symlink(&moved, &journal).unwrap();
    refused("symbolic link");
    fs::remove_file(&journal).unwrap();
    fs::rename(&moved, &journal).unwrap();
    // A name that leads out of the directory.
    fs::rename(partial.join("backup/blocks.before"), lab.path("evil")).unwrap();
    let said = fs::read_to_string(&journal).unwrap();
    fs::write(&journal, said.replace("backup/blocks.before", "../evil")).unwrap();
    let run = h2k(["rollback", "--journal", text(&journal)]).expect(7);
    assert_eq!(
        fs::read(&victim).unwrap(),
        vec![b'v'; 4096],
        "{}",
        run.stderr
    );
}

#[test]
fn a_planted_record_of_boot_is_not_followed() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let out = lab.path("out");
    convert(&lab.raw, &out, &[]).expect(0);
    let record = out.join("boot.json");
    fs::write(&record, "{}").unwrap();
    fs::set_permissions(&record, Permissions::from_mode(0o666)).unwrap();
    let boot = ["boot", text(&out), "--connect", "test:///default"];
    let run = h2k(boot).expect(1);
    assert!(
        run.stderr.contains("can be written by others"),
        "{}",
        run.stderr
    );
}

/// Whoever can write the directory says what root's libvirt runs.
#[test]
fn a_folder_of_somebody_else_is_not_booted() {
    if !have(&TOOLS) || !have(&["virsh"]) {
        return;
    }
    let lab = Lab::small();
    let (out, images, victim) = (lab.path("out"), lab.path("images"), lab.path("victim"));
    fs::create_dir(&images).unwrap();
    convert(&lab.raw, &out, &["--name", "vm"]).expect(0);
    let refused = |says: &str| {
        let boot = ["boot", text(&out), "--connect", "test:///default"];
        let runs = [
            h2k(boot).expect(1),
            finish(install(&out, &images, "")).expect(1),
        ];
        for run in runs {
            assert!(run.stderr.contains(says), "{says}: {}", run.stderr);
            assert!(run.stderr.contains("hint:"), "{}", run.stderr);
        }
        assert!(!out.join("boot.json").exists() && names(&images).is_empty());
    };
    for folder in [lab.dir.path(), &images] {
        fs::set_permissions(folder, Permissions::from_mode(0o711)).unwrap();
    }
    let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    if rustix::process::geteuid().is_root() {
        for path in [
            out.clone(),
            out.join("vm-final.xml"),
            out.join("report.json"),
        ] {
            chown(&path, Some(12345), None).unwrap();
            refused("belongs to user 12345");
            chown(&path, Some(0), None).unwrap();
        }
    }
    for (path, closed) in [(out.clone(), 0o711), (out.join("vm-bootstrap.xml"), 0o600)] {
        mode(&path, closed | 0o002);
        refused("can be written by others");
        mode(&path, closed);
    }
    let xml = out.join("vm-final.xml");
    fs::rename(&xml, &victim).unwrap();
    symlink(&victim, &xml).unwrap();
    refused("symbolic link");
    fs::remove_file(&xml).unwrap();
    fs::rename(&victim, &xml).unwrap();
    // Where others could exchange the disks while they are moved.
    mode(&images, 0o777);
    let run = finish(install(&out, &images, "")).expect(1);
    assert!(
        run.stderr.contains("can be written by others"),
        "{}",
        run.stderr
    );
    assert!(names(&images).is_empty());
    // A link under the name of the domain that is watched.
    fs::write(&victim, "theirs").unwrap();
    symlink(&victim, out.join(".boot-domain.xml")).unwrap();
    let run = h2k([
        "boot",
        text(&out),
        "--connect",
        "test:///default",
        "--timeout",
        "1",
    ]);
    assert_eq!(fs::read_to_string(&victim).unwrap(), "theirs");
    assert!(out.join("boot.json").exists(), "{}", run.stderr);
}

/// Without a libvirt: the files are moved before it is asked.
fn install(out: &Path, to: &Path, point: &str) -> Command {
    let mut command = Command::new(binary());
    command
        .arg("boot")
        .arg(out)
        .arg("--install-to")
        .arg(to)
        .args(["--connect", "test:///default"])
        .env("HYPER2KVM_FAILPOINT", point);
    command
}

fn report(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap()
}

fn disk(out: &Path) -> PathBuf {
    report(out)["outputs"]["disks"][0].as_str().unwrap().into()
}

/// The second install starts and ends while the first one copies, after it has seen that the name is free.
#[test]
fn two_installs_of_one_name_lose_nothing() {
    if !have(&TOOLS) || !have(&["virsh"]) {
        return;
    }
    let lab = Lab::small();
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let images = shm.path().join("images");
    fs::create_dir(&images).unwrap();
    if fs::metadata(&images).unwrap().dev() == fs::metadata(&lab.raw).unwrap().dev() {
        return skip("dev-shm", "/dev/shm is no file system of its own");
    }
    fs::set_permissions(shm.path(), Permissions::from_mode(0o711)).unwrap();
    let outs = ["a", "b"].map(|name| lab.path(name));
    for out in &outs {
        convert(&lab.raw, out, &["--name", "vm"]).expect(0);
    }
    // Tells the two apart.
    let mark = ["-f", "qcow2", "-c", "write -q -P 7 0 512"];
    tool("qemu-io", &[&mark[..], &[text(&disk(&outs[1]))]].concat());
    let digests = outs.each_ref().map(|out| sha256(&disk(out)));
    let first = Paused::at("install-copied", install(&outs[0], &images, ""));
    finish(install(&outs[1], &images, ""));
    assert_eq!(disk(&outs[1]), images.join("vm.qcow2"));
    let said = first.go_on().stderr;
    assert!(said.contains("exists already"), "{said}");
    for (out, digest) in outs.iter().zip(&digests) {
        assert_eq!(&sha256(&disk(out)), digest, "{}: {said}", out.display());
    }
    assert_eq!(disk(&outs[0]), outs[0].join("vm.qcow2"));
    assert!(!outs[1].join("vm.qcow2").exists());
    assert_eq!(names(&images), ["vm-probe.qcow2", "vm.qcow2"]);
}

/// The test driver of libvirt has the pools that a file names.
#[test]
fn a_pool_gets_new_names_only() {
    if !have(&TOOLS) || !have(&["virsh", "qemu-io"]) {
        return;
    }
    let lab = Lab::small();
    let (pool, node) = (lab.path("pool"), lab.path("node.xml"));
    fs::create_dir(&pool).unwrap();
    for folder in [lab.dir.path(), &pool] {
        fs::set_permissions(folder, Permissions::from_mode(0o711)).unwrap();
    }
    let xml = format!(
        "<node><pool type='dir'><name>images</name><target><path>{}</path></target></pool></node>",
        pool.display()
    );
    fs::write(&node, xml).unwrap();
    let outs = ["a", "b"].map(|name| lab.path(name));
    for out in &outs {
        convert(&lab.raw, out, &["--name", "vm"]).expect(0);
    }
    let digest = sha256(&disk(&outs[0]));
    let to_pool = |out: &Path| {
        let mut command = Command::new(binary());
        command.arg("boot").arg(out).args(["--pool", "images"]);
        command.arg("--connect");
        command.arg(format!("test://{}", node.display()));
        finish(command)
    };
    let refused = |out: &Path, says: &str| {
        let run = to_pool(out).expect(1);
        assert!(run.stderr.contains(says), "{says}: {}", run.stderr);
        assert!(run.stderr.contains("hint:"), "{}", run.stderr);
        assert_eq!(disk(out), out.join("vm.qcow2"));
        whole(out, "vm");
    };
    eprintln!("a file of the user");
    let theirs = pool.join("vm-probe.qcow2");
    fs::write(&theirs, "theirs").unwrap();
    refused(&outs[0], "vm-probe.qcow2 exists already");
    assert_eq!(fs::read_to_string(&theirs).unwrap(), "theirs");
    assert_eq!(names(&pool), ["vm-probe.qcow2"]);
    fs::rename(&theirs, pool.join("notes.txt")).unwrap();

    eprintln!("a disk in use");
    let holder = hold(&disk(&outs[0]));
    let run = to_pool(&outs[0]).expect(1);
    assert!(run.stderr.contains("is in use by"), "{}", run.stderr);
    assert!(run.stderr.contains("shut the VM down"), "{}", run.stderr);
    assert_eq!(names(&pool), ["notes.txt"]);
    drop(holder);

    eprintln!("two runs");
    to_pool(&outs[0]);
    assert_eq!(disk(&outs[0]), pool.join("vm.qcow2"));
    assert_eq!(sha256(&pool.join("vm.qcow2")), digest);
    refused(&outs[1], "vm.qcow2 exists already");
    assert_eq!(sha256(&pool.join("vm.qcow2")), digest);
    assert_eq!(names(&pool), ["notes.txt", "vm-probe.qcow2", "vm.qcow2"]);
}

#[test]
fn killed_while_disks_are_installed() {
    if !have(&TOOLS) || !have(&["virsh"]) {
        return;
    }
    let lab = Lab::small();
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let there = |folder: &Path| fs::metadata(folder).unwrap().dev();
    if there(shm.path()) == there(lab.dir.path()) {
        return skip("dev-shm", "/dev/shm is no file system of its own");
    }
    let out = lab.path("out");
    for images in [lab.path("images"), shm.path().join("images")] {
        for point in [
            "installing",
            "install-copied",
            "installed",
            "install-removing",
            "install-removed",
        ] {
            eprintln!("{point} to {}", images.display());
            let _ = fs::remove_dir_all(&out);
            let _ = fs::remove_dir_all(&images);
            fs::create_dir(&images).unwrap();
            fs::set_permissions(&images, Permissions::from_mode(0o711)).unwrap();
            convert(&lab.raw, &out, &["--name", "vm"]).expect(0);
            let digest = sha256(&out.join("vm.qcow2"));
            let killed = finish(install(&out, &images, &format!("{point}=kill")));
            let copied = point != "install-copied" || images.starts_with("/dev/shm");
            assert_eq!(killed.code == -1, copied, "{}", killed.stderr);
            // What the report names is there, and the original as long as the report names it.
            assert_eq!(sha256(&disk(&out)), digest);
            finish(install(&out, &images, ""));
            assert_eq!(disk(&out), images.join("vm.qcow2"));
            assert_eq!(sha256(&disk(&out)), digest);
            assert!(
                !out.join("vm.qcow2").exists(),
                "the original goes last, but goes"
            );
            assert!(!out.join("install.json").exists());
            assert_eq!(names(&images), ["vm-probe.qcow2", "vm.qcow2"]);
        }
    }
    let images = lab.path("images");
    for point in ["installing", "installed"] {
        eprintln!("{point} where a file has one name only");
        let _ = fs::remove_dir_all(&out);
        let _ = fs::remove_dir_all(&images);
        fs::create_dir(&images).unwrap();
        fs::set_permissions(&images, Permissions::from_mode(0o711)).unwrap();
        convert(&lab.raw, &out, &["--name", "vm"]).expect(0);
        let digest = sha256(&out.join("vm.qcow2"));
        let arm = format!("install-link=fail,{point}=kill");
        assert_eq!(finish(install(&out, &images, &arm)).code, -1);
        if point == "installing" {
            // Not to another place, where it would be missing.
            let other = lab.path("other");
            fs::create_dir(&other).unwrap();
            let run = finish(install(&out, &other, "install-link=fail")).expect(1);
            assert!(run.stderr.contains("earlier run moved"), "{}", run.stderr);
            assert!(run.stderr.contains("--install-to /"), "{}", run.stderr);
            assert!(names(&other).is_empty());
        }
        finish(install(&out, &images, "install-link=fail"));
        assert_eq!(disk(&out), images.join("vm.qcow2"));
        assert_eq!(sha256(&disk(&out)), digest);
        assert!(!out.join("install.json").exists());
        assert_eq!(names(&images), ["vm-probe.qcow2", "vm.qcow2"]);
    }
    // To the directory they are in: nothing to move, and nothing removed.
    let _ = fs::remove_dir_all(&out);
    convert(&lab.raw, &out, &["--name", "vm"]).expect(0);
    let run = finish(install(&out, &out, "")).expect(2);
    assert!(run.stderr.contains("are there already"), "{}", run.stderr);
    whole(&out, "vm");
}
