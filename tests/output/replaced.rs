//! The files that `--force` replaces, and those that it keeps.

use super::*;

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
    create_overlay(base, "qcow2", &overlay);
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
