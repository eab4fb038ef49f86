//! Driver sources, directories, permissions, full disks, images in use, missing programs.

use super::*;

#[test]
fn a_driver_source_that_cannot_be_used() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(small(WinVersion::Win10));
    let digest = sha256(&lab.raw);
    fs::create_dir(lab.path("empty")).unwrap();
    fs::write(lab.path("not.iso"), "milk, eggs\n".repeat(40000)).unwrap();
    fs::write(lab.path("empty.iso"), "").unwrap();
    // Drivers for other Windows versions only.
    let only = lab.path("only-xp");
    tool(
        "cp",
        &["-r", virtio_win().to_str().unwrap(), only.to_str().unwrap()],
    );
    for driver in fs::read_dir(&only).unwrap() {
        let driver = driver.unwrap().path();
        for folder in [
            "w10", "w11", "2k16", "2k19", "2k22", "2k25", "w8.1", "w8", "2k12R2", "2k12",
        ] {
            let _ = fs::remove_dir_all(driver.join(folder));
        }
    }
    // Storage drivers whose file is not there.
    let holes = lab.path("holes");
    tool(
        "cp",
        &[
            "-r",
            virtio_win().to_str().unwrap(),
            holes.to_str().unwrap(),
        ],
    );
    fs::remove_file(holes.join("viostor/w10/amd64/viostor.sys")).unwrap();
    for (driver_source, code, says) in [
        ("nowhere.iso", 1, "nowhere.iso"),
        ("not.iso", 1, "not.iso"),
        ("empty.iso", 1, "empty.iso"),
        ("empty", 1, "empty"),
        ("/etc", 1, "/etc is no virtio-win driver source"),
        ("only-xp", 3, "viostor"),
        ("holes", 3, "viostor"),
    ] {
        eprintln!("== driver source {driver_source}");
        for verb in ["convert", "plan"] {
            let args = [verb, "guest.raw", "--virtio-iso", driver_source];
            fails_with(&lab, &args, &[], code, &[says]);
        }
    }
    fails_with(&lab, &["drivers", "not.iso"], &[], 1, &["not.iso"]);
    let says = ["no virtio-win driver source", "drivers --where"];
    fails_with(&lab, &["drivers", "/etc"], &[], 1, &says);
    if !Path::new("/usr/share/virtio-win/virtio-win.iso").exists() {
        let says = [
            "--virtio-iso",
            "https://fedorapeople.org/",
            "drivers --where",
        ];
        fails_with(&lab, &["convert", "guest.raw"], &[], 2, &says);
    }
    let closed = lab.path("closed");
    tool(
        "cp",
        &[
            "-r",
            virtio_win().to_str().unwrap(),
            closed.to_str().unwrap(),
        ],
    );
    if as_nobody(&lab).is_some() {
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
        let run = as_nobody(&lab).unwrap()(&["convert", "guest.raw", "--virtio-iso", "closed"]);
        let run = run.expect(5);
        assert!(run.stderr.contains("closed"), "{}", run.stderr);
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let driver_source = virtio_win().to_str().unwrap();
    for (text, says) in [
        ("windows:\n  - id: x\n    folders: [", "bad.yaml, line"),
        ("drivers: 7\n", "bad.yaml, line"),
        ("\u{0}\u{1}", "bad.yaml"),
        ("- just\n- a list\n", "bad.yaml, line"),
        ("nonsense: true\n", "bad.yaml, line"),
    ] {
        fs::write(lab.path("bad.yaml"), text).unwrap();
        let args = [
            "convert",
            "guest.raw",
            "--virtio-iso",
            driver_source,
            "--driver-config",
            "bad.yaml",
        ];
        fails_with(&lab, &args, &[], 2, &[says]);
    }
    fails_with(
        &lab,
        &[
            "convert",
            "guest.raw",
            "--virtio-iso",
            driver_source,
            "--driver-config",
            "none.yaml",
        ],
        &[],
        2,
        &["none.yaml"],
    );
    assert_eq!(sha256(&lab.raw), digest);
}

type AsNobody<'l> = Box<dyn Fn(&[&str]) -> Run + 'l>;

/// Runs as an ordinary user, when we are one who can.
fn as_nobody(lab: &Lab) -> Option<AsNobody<'_>> {
    if !have(&["setpriv"]) {
        return None;
    }
    if !rustix::process::geteuid().is_root() {
        skip("root", "permissions are only tested as root");
        return None;
    }
    Some(Box::new(|args| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(support::binary())
            .args(args)
            .current_dir(lab.dir.path());
        support::finish(command)
    }))
}

#[test]
fn output_folders() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(small(WinVersion::Win10));
    let driver_source = virtio_win().to_str().unwrap();
    let convert = |out: &'static str, more: &[&'static str]| {
        let mut args = vec![
            "convert",
            "guest.raw",
            "--virtio-iso",
            driver_source,
            "-o",
            out,
        ];
        args.extend(more);
        args
    };
    fs::create_dir(lab.path("theirs")).unwrap();
    fs::write(lab.path("theirs/thesis.odt"), "years of work").unwrap();
    fs::write(lab.path("file"), "x").unwrap();
    fails_with(
        &lab,
        &convert("theirs", &[]),
        &[],
        1,
        &["theirs exists and is not"],
    );
    fails_with(
        &lab,
        &convert("theirs", &["--force"]),
        &[],
        1,
        &["theirs exists and is not"],
    );
    fails_with(&lab, &convert("file", &["--force"]), &[], 1, &["file"]);
    fails_with(&lab, &convert("file/below", &[]), &[], 1, &["file"]);
    assert!(lab.path("theirs/thesis.odt").exists());
    fails_with(
        &lab,
        &convert("out", &["--compress", "--format", "raw"]),
        &[],
        2,
        &["compress"],
    );

    run_in(&lab, &convert("out", &[]), &[]).expect(0);
    fails_with(
        &lab,
        &convert("out", &[]),
        &[],
        1,
        &["out exists", "--force"],
    );
    fs::write(lab.path("out/extra"), "").unwrap();
    run_in(&lab, &convert("out", &["--force"]), &[]).expect(0);
    assert!(lab.path("out/extra").exists(), "it is the user's");
    let run = run_in(&lab, &["rollback", "out"], &[]).expect(1);
    assert!(run.stderr.contains("nothing to undo"), "{}", run.stderr);
    fails_with(&lab, &["rollback", "theirs"], &[], 1, &["theirs"]);
    fails_with(&lab, &["rollback", "nowhere"], &[], 1, &["nowhere"]);

    if let Some(run) = as_nobody(&lab) {
        fs::set_permissions(lab.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(
            virtio_win().parent().unwrap(),
            fs::Permissions::from_mode(0o755),
        )
        .unwrap();
        let denied = run(&convert("denied", &[])).expect(5);
        assert!(
            denied.stderr.contains("no permission to write"),
            "{}",
            denied.stderr
        );
        assert!(!lab.path("denied").exists());
        fs::set_permissions(&lab.raw, fs::Permissions::from_mode(0o600)).unwrap();
        let denied = run(&["inspect", "guest.raw"]).expect(5);
        assert!(
            denied.stderr.contains("Permission denied"),
            "{}",
            denied.stderr
        );
    }
}

/// Unmounts when it goes.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk() {
    if !have(&TOOLS) || !have(&["mount", "umount"]) {
        return;
    }
    let lab = Lab::new(small(WinVersion::Win10));
    let small_disk = lab.path("small");
    fs::create_dir(&small_disk).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=24m", "none"])
        .arg(&small_disk)
        .status();
    if !mounted.is_ok_and(|s| s.success()) {
        return skip("mount", "cannot mount a small tmpfs here");
    }
    let _mounted = Mounted(small_disk.clone());
    let digest = sha256(&lab.raw);
    let driver_source = virtio_win().to_str().unwrap();
    let args = [
        "convert",
        "guest.raw",
        "--virtio-iso",
        driver_source,
        "-o",
        "small/out",
    ];
    // From nearly full, where not even the overlay fits, on to where the copy does.
    let mut refused = 0;
    for filler in (0..=23_900u64).rev().step_by(1500) {
        eprintln!("== {filler} KiB taken");
        fs::write(small_disk.join("filler"), vec![1; (filler << 10) as usize]).unwrap();
        let run = run_in(&lab, &args, &[]);
        if run.code == 0 {
            break;
        }
        let run = run.expect(1);
        assert!(run.stderr.contains("space"), "{}", run.stderr);
        assert!(run.stderr.contains("hint: "), "{}", run.stderr);
        assert_plain(&run.stderr);
        assert_eq!(listing(&small_disk), ["filler"]);
        refused += 1;
    }
    assert!(refused > 2, "refused {refused} times");
    assert_eq!(sha256(&lab.raw), digest);
}

struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn images_others_write_to() {
    if !have(&TOOLS) || !have(&["qemu-io"]) {
        return;
    }
    let lab = Lab::new(small(WinVersion::Win10));
    let qcow2 = lab.in_format("qcow2", "", "guest.qcow2");
    for (image, format) in [(&lab.raw, "raw"), (&qcow2, "qcow2")] {
        let mut child = Command::new("qemu-io")
            .args(["-f", format])
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Its prompt comes after it has opened and locked the image.
        let mut prompt = [0];
        child
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"length\n")
            .unwrap();
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut prompt)
            .unwrap();
        let holder = Holder(child);
        let name = image.file_name().unwrap().to_str().unwrap();
        let driver_source = virtio_win().to_str().unwrap();
        for args in [
            vec!["inspect", name],
            vec!["convert", name, "--virtio-iso", driver_source],
            vec!["convert", name, "--virtio-iso", driver_source, "--in-place"],
        ] {
            let run = run_in(&lab, &args, &[]).expect(1);
            assert!(
                run.stderr.contains("in use by another process"),
                "{}",
                run.stderr
            );
            assert!(run.stderr.contains("shut the VM down"), "{}", run.stderr);
        }
        assert_eq!(listing(lab.dir.path()), ["guest.qcow2", "guest.raw"]);
        drop(holder);
    }
    h2k(["inspect", qcow2.to_str().unwrap()]).expect(0);
}

#[test]
fn images_that_point_elsewhere() {
    if !have(&TOOLS) {
        return;
    }
    let lab = empty_lab();
    let elsewhere = tempfile::tempdir().unwrap();
    let secret = elsewhere.path().join("secret");
    fs::write(&secret, vec![7; 1 << 20]).unwrap();
    let secret = secret.to_str().unwrap();
    let create = |name: &str, backing: &str| {
        let image = path(&lab, name);
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, &image, "64M",
        ];
        tool("qemu-img", &args);
    };
    create("shadow.qcow2", "/etc/shadow");
    create("secret.qcow2", secret);
    create("up.qcow2", "../../../../../../../../../../etc/passwd");
    create("url.qcow2", "nbd://127.0.0.1:1/x");
    create(
        "json.qcow2",
        "json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}",
    );
    create("self.qcow2", "self.qcow2");
    create("gone.qcow2", "gone-too.raw");
    for (name, says) in [
        ("shadow.qcow2", "outside its directory"),
        ("secret.qcow2", "outside its directory"),
        ("up.qcow2", "outside its directory"),
        ("url.qcow2", "not a file name"),
        ("json.qcow2", "not a file name"),
        ("self.qcow2", "loop"),
        ("gone.qcow2", "does not exist"),
    ] {
        unreadable(&lab, name, 1, &[says]);
    }
    let descriptor = |extent: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
             createType=\"monolithicFlat\"\n\nRW 2048 FLAT \"{extent}\" 0\n\nddb.adapterType = \"ide\"\n"
        )
    };
    for (extent, says) in [
        (secret, "outside its directory"),
        ("/etc/shadow", "outside its directory"),
        ("nbd://127.0.0.1:1/x", "does not exist"),
        ("gone-flat.vmdk", "does not exist"),
    ] {
        fs::write(lab.path("flat.vmdk"), descriptor(extent)).unwrap();
        unreadable(&lab, "flat.vmdk", 1, &[says]);
    }
}

/// A `PATH` with everything but one tool. Where that tool is in a directory that is always searched the
/// case cannot be made.
#[test]
fn missing_tools() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(small(WinVersion::Win10));
    let driver_source = virtio_win().to_str().unwrap();
    let bin = lab.path("bin");
    for missing in ["qemu-img", "qemu-storage-daemon"] {
        eprintln!("== without {missing}");
        let _ = fs::remove_dir_all(&bin);
        fs::create_dir(&bin).unwrap();
        for name in ["qemu-img", "qemu-storage-daemon"] {
            if name != missing {
                let real = hyper2kvm::tool::find(name).unwrap();
                std::os::unix::fs::symlink(real, bin.join(name)).unwrap();
            }
        }
        let env = [("PATH", bin.as_os_str())];
        let args = ["convert", "guest.raw", "--virtio-iso", driver_source];
        fails_with(&lab, &args, &env, 5, &[missing, "is not installed"]);
        let doctor = run_in(&lab, &["doctor", "--json"], &env).expect(5);
        assert!(doctor.stdout.contains(missing), "{}", doctor.stdout);
    }
}

/// The library's file is hidden in a mount namespace of the run.
#[test]
fn without_libhivex_nothing_is_written() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(small(WinVersion::Win10));
    let library = hyper2kvm::tool::host::find_library("libhivex.so").unwrap();
    let hide = format!(
        "mount --bind /dev/null {} && exec \"$@\"",
        fs::canonicalize(library).unwrap().display()
    );
    let hidden = |args: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &hide, "sh"]).args(args);
        command.current_dir(lab.dir.path());
        finish(command)
    };
    if hidden(&["true"]).code != 0 {
        return skip("mount", "no mount namespace of one's own");
    }
    let driver_source = virtio_win().to_str().unwrap();
    for verb in ["plan", "convert"] {
        let program = binary();
        let run = hidden(&[program, verb, "guest.raw", "--virtio-iso", driver_source]).expect(5);
        let says = "libhivex (edits hives) is not installed";
        assert!(run.stderr.contains(says), "{}", run.stderr);
        assert!(run.stderr.contains("libhivex0"), "{}", run.stderr);
    }
    assert!(!lab.path("guest-kvm").exists() && !lab.path(".guest-kvm.partial").exists());
}
