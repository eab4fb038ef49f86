//! Permissions for a result, and files that others planted in its place.

use super::*;

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
    // The undo log of a fix in place must not be writable by others.
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

/// Anybody who can write to the directory determines what root's libvirt runs.
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
    // Others could exchange the disks while they are moved.
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
