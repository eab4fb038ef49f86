//! Disks that are installed into a pool.

use super::*;

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
