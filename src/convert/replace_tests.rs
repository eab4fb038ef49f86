//! What of an earlier result is removed, kept or refused, beside the cases of the output directory's tests.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::super::exchange::{INTENT, lock_of_partial, repair};
use super::super::output::{FolderOptions, OutputFolder};
use super::super::place::{OutputPlace, inside};
use super::super::testing::names;
use super::*;
use crate::boot::record::{Phase, Record};
use crate::error::ErrorKind;
use crate::report::OutputFile;

fn force() -> FolderOptions<'static> {
    FolderOptions {
        force: true,
        ..FolderOptions::default()
    }
}

/// A result with these files, and its report; `change` sees the report before it is written.
fn result(target: &Path, files: &[&str], change: impl FnOnce(&mut Value)) {
    let mut folder = OutputFolder::create(target, &FolderOptions::default()).unwrap();
    fill(&folder, files);
    let files = folder.settle().unwrap();
    let mut report = json!({
        "schema": "hyper2kvm/report/1", "name": "vm", "files": files,
        "outputs": {"disks": [target.join("vm.qcow2")]},
    });
    change(&mut report);
    write(&folder.path().join(MARK), &report.to_string());
    folder.complete().unwrap();
}

fn fill(folder: &OutputFolder, files: &[&str]) {
    for name in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        write(&path, name);
    }
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// Replaces it by a result with these files.
fn replaced(target: &Path, files: &[&str]) -> Result<Vec<String>> {
    let mut folder = OutputFolder::create(target, &force())?;
    fill(&folder, files);
    let notes = folder.notes()?;
    folder.complete()?;
    Ok(notes)
}

fn refused(target: &Path) -> Error {
    OutputFolder::create(target, &force())
        .map(drop)
        .unwrap_err()
}

/// Somebody who wrote a report of their own would have files elsewhere removed.
#[test]
fn a_report_that_lists_files_elsewhere_removes_none_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let (target, victim) = (dir.path().join("vm-kvm"), dir.path().join("victim"));
    write(&victim, "theirs");
    for name in [
        "../victim",
        victim.to_str().unwrap(),
        "backup/../../victim",
        "",
    ] {
        result(&target, &["vm.qcow2", "backup/x"], |report| {
            let mut entry = report["files"][0].clone();
            entry["path"] = name.into();
            report["files"].as_array_mut().unwrap().push(entry);
        });
        replaced(&target, &["new.qcow2"]).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "theirs", "{name}");
        assert_eq!(names(&target), ["new.qcow2"], "{name}");
        fs::remove_dir_all(&target).unwrap();
    }
}

/// NVRAM, probe disk, disks: whichever was written to, a VM ran from it.
#[test]
fn any_image_of_a_result_that_was_written_to_keeps_it() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let files = [
        "vm.qcow2",
        "vm-1.raw",
        "a.img",
        "vm-nvram.fd",
        "vm-final.xml",
    ];
    for (i, name) in files.iter().enumerate() {
        result(&target, &files, |_| {});
        let path = target.join(name);
        write(&path, "Windows wrote");
        if *name == "vm-final.xml" {
            drop(OutputFolder::create(&target, &force()).unwrap());
        } else {
            let error = refused(&target);
            assert!(
                error.message.contains("has changed since"),
                "{name}: {error}"
            );
            assert!(error.message.contains(name), "{name}: {error}");
            // Taken away by the user: nothing is lost.
            fs::remove_file(&path).unwrap();
            drop(OutputFolder::create(&target, &force()).unwrap());
            fs::create_dir(&path).unwrap();
            let error = refused(&target);
            assert!(error.message.contains("no regular file"), "{i}: {error}");
        }
        fs::remove_dir_all(&target).unwrap();
    }
}

#[test]
fn a_file_is_another_one_by_its_size_its_time_and_its_inode() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, "disk").unwrap();
    let found = fs::metadata(&path).unwrap();
    let was = OutputFile::of("disk".into(), &found).unwrap();
    assert_eq!(difference(&was, &found), None);
    for (change, says) in [
        (
            (|file| file.size_bytes += 1) as fn(&mut OutputFile),
            "bytes",
        ),
        (|file| file.modified_ns += 1, "written to"),
        (|file| file.inode += 1, "another file"),
    ] {
        let mut was = was.clone();
        change(&mut was);
        assert!(difference(&was, &found).unwrap().contains(says), "{says}");
    }
}

#[test]
fn disks_that_were_moved_elsewhere_stay_there_and_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (target, moved) = (dir.path().join("vm-kvm"), dir.path().join("moved.qcow2"));
    let make = || {
        write(&moved, "moved");
        result(&target, &["vm.qcow2"], |report| {
            report["outputs"]["disks"] = json!([&moved, target.join("vm.qcow2")]);
        });
    };
    make();
    let notes = replaced(&target, &["new.qcow2"]).unwrap();
    assert_eq!(notes.len(), 1);
    assert!(notes[0].contains("stay where they are") && notes[0].contains("moved.qcow2"));
    assert_eq!(fs::read_to_string(&moved).unwrap(), "moved");
    fs::remove_dir_all(&target).unwrap();
    // It is in use.
    make();
    let user = File::open(&moved).unwrap();
    rustix::fs::flock(&user, rustix::fs::FlockOperation::LockShared).unwrap();
    assert!(refused(&target).message.contains("in use"));
    // By this very run, which reads it.
    let sources = || vec![moved.clone()];
    let reading = FolderOptions {
        sources: Some(&sources),
        ..force()
    };
    drop(OutputFolder::create(&target, &reading).unwrap());
    // One that is gone is nobody's.
    drop(user);
    fs::remove_file(&moved).unwrap();
    assert_eq!(replaced(&target, &["new.qcow2"]).unwrap(), [""; 0]);
}

#[test]
fn a_result_that_boot_works_in_or_has_started_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    result(&target, &["vm.qcow2"], |_| {});
    let folder = File::open(&target).unwrap();
    let lock = FileLock::take_patiently(&folder, crate::boot::LOCK.as_ref(), &target, true);
    let lock = lock.unwrap().unwrap();
    assert!(refused(&target).message.contains("is at work"));
    lock.remove();
    for (phase, switched) in [
        (Phase::New, None),
        (Phase::Bootstrap, Some(false)),
        (Phase::Protecting, Some(true)),
        (Phase::Final, Some(true)),
        (Phase::Restoring, Some(true)),
        (Phase::Done, Some(true)),
    ] {
        let mut record = Record::new("qemu:///system", "vm", uuid::Uuid::nil());
        record.phase = phase;
        record.save(&target).unwrap();
        match switched {
            None => drop(OutputFolder::create(&target, &force()).unwrap()),
            Some(switched) => {
                let error = refused(&target);
                assert_eq!(
                    error.message.contains("past its switch"),
                    switched,
                    "{error}"
                );
                assert!(error.hints[1].contains("undefine --nvram vm"), "{error:?}");
            }
        }
    }
    write(&target.join("boot.json"), "{");
    assert!(refused(&target).message.contains("record cannot be used"));
}

#[test]
fn what_an_old_result_without_a_list_wrote_is_known_by_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let own = [
        "report.html",
        "plan.json",
        "journal.json",
        "registry/SYSTEM.reg",
        "backup/a/b",
        "generated/x",
        "vm-probe.qcow2",
        "vm.qcow2",
        "vm-bootstrap.xml",
        "vm-final.xml",
        "vm-qemu.sh",
    ];
    result(&target, &own, |report| {
        report.as_object_mut().unwrap().remove("files");
        // The directory was renamed since.
        let old = |name: &str| json!(Path::new("/old/vm-kvm").join(name));
        report["outputs"] = json!({
            "disks": [old("vm.qcow2")], "emitted": [old("vm-qemu.sh"), old("gone.sh")],
            "bootstrap_xml": old("vm-bootstrap.xml"), "final_xml": old("vm-final.xml"),
        });
    });
    write(&target.join("notes.txt"), "mine");
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(3);
    let report = File::options().write(true).open(target.join(MARK)).unwrap();
    report.set_modified(later).unwrap();
    replaced(&target, &["new.qcow2"]).unwrap();
    assert_eq!(names(&target), ["new.qcow2", "notes.txt"]);
}

/// The directory that it lay in is made for it.
#[test]
fn a_file_of_the_user_is_moved_with_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    result(&target, &["vm.qcow2", "backup/deep/SYSTEM"], |_| {});
    write(&target.join("backup/deep/mine"), "mine");
    replaced(&target, &["new.qcow2"]).unwrap();
    assert_eq!(names(&target), ["backup", "new.qcow2"]);
    assert_eq!(names(&target.join("backup/deep")), ["mine"]);
    let mode = fs::metadata(target.join("backup"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o077, 0);
    assert_eq!(names(dir.path()), ["vm-kvm"]);
}

/// Somebody may have put another directory there since the exchange.
#[test]
fn only_the_directory_that_was_replaced_is_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    result(&old, &["vm.qcow2", "generated/firstboot.cmd"], |_| {});
    write(&old.join("mine"), "mine");
    write(&old.join("generated/mine"), "mine");
    fs::create_dir(&new).unwrap();
    let mut earlier = Earlier::of(&old).unwrap();
    let inode = fs::metadata(&old).unwrap().ino();
    let there = names(&old);
    let error = earlier.clear(&old, inode + 1, &new).unwrap_err();
    assert!(error.to_string().contains("another directory"), "{error}");
    assert_eq!(names(&old), there);
    assert!(names(&new).is_empty());
    earlier.clear(&old, inode, &new).unwrap();
    assert!(!old.exists());
    assert_eq!(names(&new), ["generated", "mine"]);
    assert_eq!(names(&new.join("generated")), ["mine"]);
}

#[test]
fn a_file_is_inside_by_its_name_or_by_where_that_leads() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, other) = (dir.path().join("folder"), dir.path().join("other"));
    for path in [&folder, &other] {
        fs::create_dir(path).unwrap();
        fs::write(path.join("file"), "").unwrap();
    }
    let link = |to: &Path, name: PathBuf| std::os::unix::fs::symlink(to, name).unwrap();
    link(&folder.join("file"), other.join("into"));
    link(&other.join("file"), folder.join("out"));
    link(&folder, dir.path().join("alias"));
    let cases = [
        (folder.join("file"), true),
        (folder.join("missing"), true),
        (other.join("into"), true),
        (folder.join("out"), true),
        (dir.path().join("alias/file"), true),
        (dir.path().join("alias/out"), true),
        (dir.path().join("alias/missing"), true),
        (other.join("file"), false),
        (other.join("missing"), false),
        (dir.path().join("folder-2/file"), false),
    ];
    for (file, is) in cases {
        let files = [other.join("file"), file.clone()];
        let found = inside(&folder, &files);
        assert_eq!(found, is.then_some(&file), "{file:?}");
    }
}

#[test]
fn who_only_asks_leaves_nothing_and_is_told_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let check = |target: &Path, preference: &FolderOptions| OutputFolder::check(target, preference);
    assert_eq!(check(&target, &FolderOptions::default()).unwrap(), target);
    assert!(names(dir.path()).is_empty());
    let deep = dir.path().join("a/b/vm-kvm");
    assert_eq!(check(&deep, &FolderOptions::default()).unwrap(), deep);
    assert!(names(dir.path()).is_empty());
    result(&target, &["vm.qcow2"], |_| {});
    let error = check(&target, &FolderOptions::default()).unwrap_err();
    assert!(error.message.ends_with("exists"), "{error}");
    check(&target, &force()).unwrap();
    assert_eq!(names(dir.path()), ["vm-kvm"]);
    // While another run is at work.
    let folder = OutputFolder::create(&target, &force()).unwrap();
    let error = check(&target, &force()).unwrap_err();
    assert!(error.message.contains("another conversion"), "{error}");
    drop(folder);
    use std::os::unix::ffi::OsStrExt;
    let odd = dir.path().join(std::ffi::OsStr::from_bytes(b"vm\xff"));
    let asked = check(&odd, &FolderOptions::default()).map(drop);
    let made = OutputFolder::create(&odd, &FolderOptions::default()).map(drop);
    for refused in [asked, made] {
        assert_eq!(refused.unwrap_err().kind, ErrorKind::Usage);
    }
    assert!(OutputPlace::open(Path::new("/"), false).is_err());
}

/// A note decides what is done to the directories: somebody else's would exchange them.
#[test]
fn a_note_of_another_kind_or_another_directory_moves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let beside = |end: &str| dir.path().join(format!(".vm-kvm.{end}"));
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    for (schema, old_off, new_off) in [
        ("hyper2kvm/replacing/9", 0, 0),
        (INTENT, 1, 0),
        (INTENT, 0, 1),
    ] {
        for end in ["partial", "replaced"] {
            fs::create_dir(beside(end)).unwrap();
            fs::set_permissions(beside(end), fs::Permissions::from_mode(0o700)).unwrap();
            write(&beside(end).join("x"), end);
        }
        let note = json!({
            "schema": schema, "new": inode(&beside("partial")) + new_off,
            "old": inode(&beside("replaced")) + old_off,
        });
        write(&beside("lock"), &note.to_string());
        repair(&target).unwrap();
        let there = match (schema == INTENT, old_off) {
            // The old result is the one that is sure.
            (true, 0) | (false, _) => Some("replaced"),
            _ => None,
        };
        let found = fs::read_to_string(target.join("x")).ok();
        assert_eq!(found.as_deref(), there, "{schema} {old_off} {new_off}");
        for path in [target.clone(), beside("partial"), beside("replaced")] {
            let _ = fs::remove_dir_all(path);
        }
        let _ = fs::remove_file(beside("lock"));
    }
}

/// The user has removed or renamed the new result: the old one is all there is.
#[test]
fn an_old_result_is_not_cleared_where_the_new_one_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let partial = dir.path().join(".vm-kvm.partial");
    let above = format!("sync {}", dir.path().file_name().unwrap().to_string_lossy());
    for there in [false, true] {
        let _ = fs::remove_dir_all(&partial);
        result(&partial, &["vm.qcow2"], |_| {});
        fs::set_permissions(&partial, fs::Permissions::from_mode(0o700)).unwrap();
        let old = fs::metadata(&partial).unwrap().ino();
        let mut new = old + 1;
        if there {
            fs::create_dir(&target).unwrap();
            new = fs::metadata(&target).unwrap().ino();
        }
        let note = json!({"schema": INTENT, "new": new, "old": old});
        write(&dir.path().join(".vm-kvm.lock"), &note.to_string());
        repair(&target).unwrap();
        assert_eq!(partial.join("vm.qcow2").exists(), !there);
    }
    // What is put back stays there.
    fs::remove_dir(&target).unwrap();
    let replaced = dir.path().join(".vm-kvm.replaced");
    fs::create_dir(&replaced).unwrap();
    fs::set_permissions(&replaced, fs::Permissions::from_mode(0o700)).unwrap();
    crate::files::order::seen();
    repair(&target).unwrap();
    assert!(target.exists());
    assert_eq!(crate::files::order::seen(), [above]);
}

#[test]
fn a_result_is_durable_before_it_has_its_name_and_its_name_is_after() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let above = format!("sync {}", dir.path().file_name().unwrap().to_string_lossy());
    let order = crate::files::order::seen;
    let mut folder = OutputFolder::create(&target, &FolderOptions::default()).unwrap();
    order();
    folder.complete().unwrap();
    assert_eq!(
        order(),
        ["sync all of .vm-kvm.partial", "rename vm-kvm", &above]
    );
    drop(folder);
    fs::remove_dir_all(&target).unwrap();
    result(&target, &["vm.qcow2"], |_| {});
    let mut folder = OutputFolder::create(&target, &force()).unwrap();
    order();
    folder.complete().unwrap();
    let steps = [
        "sync all of .vm-kvm.partial",
        "exchange vm-kvm",
        &above,
        &above,
    ];
    assert_eq!(order(), steps);
    // The saved blocks of a fix in place must be found.
    let undo = FolderOptions {
        undo: true,
        ..FolderOptions::default()
    };
    let _folder = OutputFolder::create(&dir.path().join("other"), &undo).unwrap();
    assert_eq!(order(), [above]);
}

/// The note names what the next run has to finish.
#[test]
fn a_lock_with_a_note_outlives_its_run() {
    let dir = tempfile::tempdir().unwrap();
    let place = OutputPlace::open(&dir.path().join("vm-kvm"), false).unwrap();
    for (note, stays) in [("", false), ("what was begun", true), ("", false)] {
        let lock = place.lock().unwrap();
        lock.set_note(note).unwrap();
        drop(lock);
        assert_eq!(dir.path().join(".vm-kvm.lock").exists(), stays, "{note}");
    }
}

/// Whoever can write in it could have what they like made the result, or removed.
#[test]
fn what_a_killed_run_left_is_put_back_only_where_nobody_else_can_write_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let beside = |end: &str| dir.path().join(format!(".vm-kvm.{end}"));
    for noted in [true, false] {
        for open in ["partial", "replaced"] {
            for end in ["partial", "replaced"] {
                let mode = if end == open { 0o777 } else { 0o700 };
                fs::create_dir(beside(end)).unwrap();
                write(&beside(end).join("x"), end);
                fs::set_permissions(beside(end), fs::Permissions::from_mode(mode)).unwrap();
            }
            let inode = |path: &Path| fs::metadata(path).unwrap().ino();
            if noted {
                let note = json!({
                    "schema": INTENT, "new": inode(&beside("partial")),
                    "old": inode(&beside("replaced")),
                });
                write(&beside("lock"), &note.to_string());
            }
            let repaired = repair(&target);
            // Without a note nothing of the partial directory is used.
            let refused = noted || open == "replaced";
            assert_eq!(repaired.is_err(), refused, "{noted} {open}");
            assert_eq!(target.exists(), !refused, "{noted} {open}");
            if let Err(error) = repaired {
                let causes = error.causes().join(" ");
                assert!(causes.contains("written by others"), "{error} {causes}");
                assert!(beside("partial").exists() && beside("replaced").exists());
            }
            for path in [target.clone(), beside("partial"), beside("replaced")] {
                let _ = fs::remove_dir_all(path);
            }
            let _ = fs::remove_file(beside("lock"));
        }
    }
}

#[test]
fn a_listed_path_stays_in_its_directory_and_one_file_has_two_names() {
    for (path, is_plain) in [
        ("vm.qcow2", true),
        ("backup/files/x", true),
        ("", false),
        ("..", false),
        ("../x", false),
        ("backup/../../x", false),
        ("/etc/passwd", false),
        ("./x", false),
    ] {
        assert_eq!(plain(Path::new(path)), is_plain, "{path}");
    }
    let dir = tempfile::tempdir().unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|name| dir.path().join(name));
    write(&a, "a");
    write(&b, "a");
    fs::hard_link(&a, &c).unwrap();
    let none = dir.path().join("none");
    assert!(same_file(&a, &a) && same_file(&a, &c));
    assert!(!same_file(&a, &b) && !same_file(&a, &none) && !same_file(&none, &none));
}

/// On a file system that cannot exchange two names there is always one of the two results.
#[test]
fn without_an_exchange_the_old_result_is_put_back_if_the_new_one_cannot_take_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let place = OutputPlace::open(&target, false).unwrap();
    fs::create_dir(&target).unwrap();
    write(&target.join("x"), "old");
    place.exchange_in_steps().unwrap_err();
    assert_eq!(names(dir.path()), ["vm-kvm"]);
    assert_eq!(fs::read(target.join("x")).unwrap(), b"old");
    fs::create_dir(dir.path().join(".vm-kvm.partial")).unwrap();
    write(&dir.path().join(".vm-kvm.partial/x"), "new");
    crate::files::order::seen();
    place.exchange_in_steps().unwrap();
    // The first name is durable before the second is taken.
    let above = dir.path().file_name().unwrap().to_string_lossy();
    assert_eq!(crate::files::order::seen(), [format!("sync {above}")]);
    assert_eq!(names(dir.path()), [".vm-kvm.replaced", "vm-kvm"]);
    let read = |folder: &str| fs::read(dir.path().join(folder).join("x")).unwrap();
    assert_eq!(
        (read("vm-kvm"), read(".vm-kvm.replaced")),
        (b"new".to_vec(), b"old".to_vec())
    );
}

#[test]
fn what_is_left_of_an_old_result_gets_a_free_name_that_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let place = OutputPlace::open(&target, false).unwrap();
    let partial = dir.path().join(".vm-kvm.partial");
    let error = std::io::Error::other("why");
    for wanted in [&["vm-kvm.kept-1"][..], &["vm-kvm.kept-1", "vm-kvm.kept-2"]] {
        fs::create_dir(&partial).unwrap();
        write(&partial.join("mine"), "mine");
        let inode = fs::metadata(&partial).unwrap().ino();
        // Another directory is not what was replaced.
        place.set_aside(inode + 1, &error);
        assert!(partial.exists());
        place.set_aside(inode, &error);
        assert_eq!(names(dir.path()), wanted);
        let last = dir.path().join(wanted[wanted.len() - 1]);
        assert_eq!(names(&last), ["mine"]);
    }
}

#[test]
fn a_partial_directory_is_locked_by_its_conversion() {
    let dir = tempfile::tempdir().unwrap();
    for other in ["vm-kvm", ".vm-kvm", "vm-kvm.partial", ".vm-kvm.replaced"] {
        let lock = lock_of_partial(&dir.path().join(other)).unwrap();
        assert!(lock.is_none(), "{other}");
    }
    let partial = dir.path().join(".vm-kvm.partial");
    let lock = lock_of_partial(&partial).unwrap();
    assert!(lock.is_some());
    assert!(lock_of_partial(&partial).is_err());
    let target = dir.path().join("vm-kvm");
    let error = OutputFolder::create(&target, &force())
        .map(drop)
        .unwrap_err();
    assert!(error.message.contains("another conversion"), "{error}");
    drop(lock);
    OutputFolder::create(&target, &force()).map(drop).unwrap();
}
