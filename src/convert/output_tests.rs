use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use serde_json::{Value, json};

use super::super::exchange::repair;
use super::super::testing::names;
use super::*;
use crate::error::ErrorKind;

pub(super) const FORCE: FolderOptions = FolderOptions {
    force: true,
    undo: false,
    resume: false,
    sync: false,
    sources: None,
};

pub(super) fn create(target: &Path, preference: &FolderOptions) -> Result<OutputFolder> {
    OutputFolder::create(target, preference)
}

pub(super) fn plain(target: &Path) -> Result<OutputFolder> {
    create(target, &FolderOptions::default())
}

fn refusal(target: &Path, preference: &FolderOptions) -> Error {
    create(target, preference).map(drop).unwrap_err()
}

/// A result with one disk; the disk's contents identify it.
pub(super) fn fill(folder: &OutputFolder, contents: &str) {
    fs::write(folder.path().join("vm.qcow2"), contents).unwrap();
    fs::create_dir_all(folder.path().join("backup")).unwrap();
    fs::write(folder.path().join("backup/SYSTEM"), contents).unwrap();
    let files = folder.settle().unwrap();
    let report = json!({
        "schema": "hyper2kvm/report/1", "name": "vm", "files": files,
        "outputs": {"disks": [folder.target().join("vm.qcow2")]},
    });
    let path = folder.path().join(MARK);
    fs::write(&path, report.to_string()).unwrap();
    // The test does not depend on its umask.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn result(target: &Path, contents: &str) {
    let mut folder = plain(target).unwrap();
    fill(&folder, contents);
    folder.complete().unwrap();
}

pub(super) fn disk(target: &Path) -> String {
    fs::read_to_string(target.join("vm.qcow2")).unwrap()
}

#[test]
fn appears_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let folder = plain(&target).unwrap();
    fs::write(folder.path().join("x"), "1").unwrap();
    assert_eq!(names(dir.path()), [".vm-kvm.lock", ".vm-kvm.partial"]);
    let second = refusal(&target, &FolderOptions::default());
    assert!(second.message.contains("another conversion"), "{second}");
    drop(folder);
    assert!(names(dir.path()).is_empty());

    // The next run removes the leftovers of a killed run.
    fs::create_dir(dir.path().join(".vm-kvm.partial")).unwrap();
    fs::write(dir.path().join(".vm-kvm.partial/half"), "").unwrap();
    fs::set_permissions(
        dir.path().join(".vm-kvm.partial"),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    let mut folder = plain(&target).unwrap();
    assert!(!folder.path().join("half").exists());
    fill(&folder, "first");
    folder.complete().unwrap();
    drop(folder);
    assert_eq!(names(dir.path()), ["vm-kvm"]);

    assert_eq!(
        refusal(&target, &FolderOptions::default()).kind,
        ErrorKind::Failed
    );
    let mut folder = create(&target, &FORCE).unwrap();
    fill(&folder, "second");
    folder.complete().unwrap();
    drop(folder);
    assert_eq!(names(dir.path()), ["vm-kvm"]);
    assert_eq!(disk(&target), "second");

    // A directory not created by hyper2kvm is never replaced.
    fs::write(target.join(MARK), "{}").unwrap();
    assert!(create(&target, &FORCE).is_err());
}

#[test]
fn an_undo_log_is_never_removed() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let disk = journal::DiskRef {
        path: "/disk".into(),
        format: "raw".into(),
        size_bytes: 1,
        in_place: true,
    };
    for (state, kept) in [
        (journal::JournalState::Verified, false),
        (journal::JournalState::RolledBack, false),
        (journal::JournalState::Committing, true),
    ] {
        let folder = plain(&target).unwrap();
        let partial = folder.path().to_path_buf();
        let mut journal = Journal::create(&partial, disk.clone(), vec![], vec![]).unwrap();
        journal.set_state(state).unwrap();
        drop(folder);
        assert_eq!(partial.exists(), kept, "{state:?}");
    }
    assert_eq!(refusal(&target, &FORCE).kind, ErrorKind::NotRolledBack);
    fs::remove_dir_all(dir.path().join(".vm-kvm.partial")).unwrap();

    // The same in a finished result, even if the journal is unreadable.
    result(&target, "in place");
    let mut journal = Journal::create(&target, disk, vec![], vec![]).unwrap();
    journal.set_state(journal::JournalState::Committed).unwrap();
    assert!(
        refusal(&target, &FORCE)
            .message
            .contains("undoes a fix in place")
    );
    fs::write(target.join("journal.json"), "damaged").unwrap();
    fs::write(target.join("backup/blocks.before"), "old bytes").unwrap();
    assert!(refusal(&target, &FORCE).message.contains("saved blocks"));
}

/// The undo log may appear while the run that would replace it is working.
#[test]
fn what_is_in_the_way_is_looked_at_again() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    type Change = fn(&Path);
    let changes: [(&str, Change); 4] = [
        ("undoes a fix", |target| {
            let disk = journal::DiskRef {
                path: "/disk".into(),
                format: "raw".into(),
                size_bytes: 1,
                in_place: true,
            };
            let mut journal = Journal::create(target, disk, vec![], vec![]).unwrap();
            journal.set_state(journal::JournalState::Committed).unwrap();
        }),
        ("has changed since", |target| {
            fs::write(target.join("vm.qcow2"), "Windows wrote to it").unwrap();
        }),
        ("past its switch", |target| {
            let mut record =
                crate::boot::record::Record::new("qemu:///system", "vm", uuid::Uuid::nil());
            record.phase = crate::boot::record::Phase::Done;
            record.save(target).unwrap();
        }),
        ("was not written by hyper2kvm", |target| {
            fs::write(target.join("new.qcow2"), "of the user").unwrap();
        }),
    ];
    for (says, change) in changes {
        result(&target, "old");
        let mut folder = create(&target, &FORCE).unwrap();
        fill(&folder, "new");
        fs::write(folder.path().join("new.qcow2"), "of the new result").unwrap();
        change(&target);
        let error = folder.complete().unwrap_err();
        assert!(error.message.contains(says), "{says}: {error}");
        drop(folder);
        assert!(target.join("vm.qcow2").exists());
        assert_eq!(names(dir.path()), ["vm-kvm"]);
        if says != "was not written by hyper2kvm" {
            assert!(create(&target, &FORCE).is_err(), "{says}: at the start");
        }
        fs::remove_dir_all(&target).unwrap();
    }
}

#[test]
fn only_what_the_report_lists_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    result(&target, "old");
    fs::write(target.join("notes.txt"), "mine").unwrap();
    fs::write(target.join("backup/mine"), "mine").unwrap();
    fs::create_dir(target.join("folder")).unwrap();
    fs::write(target.join("folder/x"), "mine").unwrap();
    symlink("/nowhere", target.join("link")).unwrap();
    let mut folder = create(&target, &FORCE).unwrap();
    fill(&folder, "new");
    let notes = folder.notes().unwrap();
    assert_eq!(notes.len(), 1);
    assert!(
        notes[0].ends_with("backup/mine, folder, link, notes.txt"),
        "{notes:?}"
    );
    folder.complete().unwrap();
    drop(folder);
    assert_eq!(disk(&target), "new");
    for file in ["notes.txt", "backup/mine", "folder/x"] {
        assert_eq!(
            fs::read_to_string(target.join(file)).unwrap(),
            "mine",
            "{file}"
        );
    }
    assert!(target.join("link").is_symlink());
    assert_eq!(names(dir.path()), ["vm-kvm"]);
}

#[test]
fn an_old_report_without_a_list() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let old = || {
        result(&target, "old");
        let text = fs::read_to_string(target.join(MARK)).unwrap();
        let mut report: Value = serde_json::from_str(&text).unwrap();
        report.as_object_mut().unwrap().remove("files");
        fs::write(target.join(MARK), report.to_string()).unwrap();
    };
    old();
    fs::write(target.join("notes.txt"), "mine").unwrap();
    let mut folder = create(&target, &FORCE).unwrap();
    fill(&folder, "new");
    folder.complete().unwrap();
    drop(folder);
    assert_eq!(
        names(&target),
        ["backup", MARK, "vm.qcow2", "notes.txt"]
            .map(String::from)
            .into_iter()
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect::<Vec<_>>()
    );
    fs::remove_dir_all(&target).unwrap();
    old();
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
    let file = File::options()
        .write(true)
        .open(target.join("vm.qcow2"))
        .unwrap();
    file.set_modified(later).unwrap();
    assert!(refusal(&target, &FORCE).message.contains("has changed"));
}

#[test]
fn a_disk_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    result(&target, "old");
    let user = File::open(target.join("vm.qcow2")).unwrap();
    rustix::fs::flock(&user, rustix::fs::FlockOperation::LockShared).unwrap();
    let error = refusal(&target, &FORCE);
    assert!(error.message.contains("in use"), "{error}");
    drop(user);
    create(&target, &FORCE).map(drop).unwrap();
    assert_eq!(disk(&target), "old");
}

#[test]
fn the_source_is_not_replaced_by_its_result() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    result(&target, "old");
    symlink(&target, dir.path().join("link")).unwrap();
    let partial = dir.path().join(".vm-kvm.partial");
    for source in [
        target.join("vm.qcow2"),
        target.join("backing.qcow2"),
        dir.path().join("link/vm.qcow2"),
        target.join("../vm-kvm/vm.qcow2"),
    ] {
        let sources = || vec![source.clone()];
        let preference = FolderOptions {
            force: true,
            undo: false,
            resume: false,
            sync: false,
            sources: Some(&sources),
        };
        let error = refusal(&target, &preference);
        assert!(
            error.message.contains("would be replaced"),
            "{source:?}: {error}"
        );
    }
    // It is not removed with the leftovers of a killed run either.
    fs::remove_dir_all(&target).unwrap();
    fs::create_dir(&partial).unwrap();
    fs::set_permissions(&partial, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(partial.join("vm.qcow2"), "finished").unwrap();
    let sources = || vec![partial.join("vm.qcow2")];
    let preference = FolderOptions {
        sources: Some(&sources),
        ..FolderOptions::default()
    };
    let error = refusal(&target, &preference);
    assert!(error.message.contains("killed run left"), "{error}");
    assert!(partial.join("vm.qcow2").exists());
}

#[test]
fn what_is_put_into_an_empty_folder_stays() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    fs::create_dir(&target).unwrap();
    let mut folder = plain(&target).unwrap();
    fill(&folder, "new");
    fs::write(target.join("notes.txt"), "mine").unwrap();
    folder.complete().unwrap();
    drop(folder);
    assert_eq!(disk(&target), "new");
    assert_eq!(
        fs::read_to_string(target.join("notes.txt")).unwrap(),
        "mine"
    );
    assert_eq!(names(dir.path()), ["vm-kvm"]);
    fs::remove_dir_all(&target).unwrap();

    fs::create_dir(&target).unwrap();
    let mut folder = plain(&target).unwrap();
    fill(&folder, "new");
    fs::write(target.join("vm.qcow2"), "mine").unwrap();
    assert!(folder.complete().is_err());
    drop(folder);
    assert_eq!(disk(&target), "mine");
    assert_eq!(names(dir.path()), ["vm-kvm"]);
    assert_eq!(names(&target), ["vm.qcow2"]);
}

#[test]
fn a_target_that_appears_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    for filled in [false, true] {
        let mut folder = create(&target, &FORCE).unwrap();
        fill(&folder, "new");
        fs::create_dir(&target).unwrap();
        if filled {
            fs::write(target.join("x"), "mine").unwrap();
        }
        let error = folder.complete().unwrap_err();
        assert!(error.message.contains("appeared"), "{error}");
        drop(folder);
        assert_eq!(names(dir.path()), ["vm-kvm"]);
        assert_eq!(target.join("x").exists(), filled);
        fs::remove_dir_all(&target).unwrap();
    }
}

#[test]
fn owner_and_mode_of_a_folder_that_is_there_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    result(&target, "fresh");
    let mode = |path: &str| fs::symlink_metadata(target.join(path)).unwrap().mode() & 0o7777;
    assert_eq!(mode(""), 0o711);
    assert_eq!(
        (mode("vm.qcow2"), mode("backup"), mode("backup/SYSTEM")),
        (0o600, 0o700, 0o600)
    );
    let root = rustix::process::geteuid().is_root();
    for (bits, empty) in [
        (0o700, false),
        (0o2750, false),
        (0o700, true),
        (0o755, true),
    ] {
        if empty {
            fs::remove_dir_all(&target).unwrap();
            fs::create_dir(&target).unwrap();
        }
        if root {
            std::os::unix::fs::chown(&target, Some(12345), Some(54321)).unwrap();
        }
        fs::set_permissions(&target, fs::Permissions::from_mode(bits)).unwrap();
        let mut folder = create(&target, &FORCE).unwrap();
        fill(&folder, "new");
        folder.complete().unwrap();
        drop(folder);
        let meta = fs::metadata(&target).unwrap();
        assert_eq!(meta.mode() & 0o7777, bits);
        if root {
            assert_eq!((meta.uid(), meta.gid()), (12345, 54321));
        }
        assert_eq!(mode("vm.qcow2"), 0o600);
    }
}

/// The saved blocks of a disk that is fixed in place are written to it.
#[test]
fn a_directory_that_others_can_write_takes_no_undo_log() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    fs::create_dir(&target).unwrap();
    for (bits, undo, refused) in [
        (0o777, true, true),
        (0o775, true, true),
        (0o755, true, false),
        (0o777, false, false),
    ] {
        fs::set_permissions(&target, fs::Permissions::from_mode(bits)).unwrap();
        let preference = FolderOptions { undo, ..FORCE };
        let folder = create(&target, &preference);
        assert_eq!(folder.is_err(), refused, "{bits:o} {undo}");
        drop(folder);
        assert_eq!(names(dir.path()), ["vm-kvm"]);
    }
}

#[test]
fn a_link_or_mount_point_is_noticed_before_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let (real, link) = (dir.path().join("real"), dir.path().join("link"));
    fs::create_dir(&real).unwrap();
    symlink(&real, &link).unwrap();
    let error = refusal(&link, &FORCE);
    assert!(error.message.contains("symbolic link"), "{error}");
    assert!(error.hints[0].contains("real"), "{error:?}");
    symlink("nowhere", dir.path().join("dangling")).unwrap();
    assert!(
        refusal(&dir.path().join("dangling"), &FORCE)
            .message
            .contains("link")
    );
    fs::write(dir.path().join("file"), "").unwrap();
    assert!(
        refusal(&dir.path().join("file"), &FORCE)
            .message
            .contains("not a directory")
    );
    let error = refusal(Path::new("/proc"), &FORCE);
    // In a directory where this user may write beside it.
    if !error.message.contains("write") && !error.message.contains("cannot be used") {
        assert!(error.message.contains("mount point"), "{error}");
    }
    let mut left = names(dir.path());
    left.retain(|n| n.starts_with('.'));
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_partial_folder_of_somebody_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let partial = dir.path().join(".vm-kvm.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("x"), "").unwrap();
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::set_permissions(&elsewhere, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(elsewhere.join("x"), "").unwrap();
    let refused = |says: &str| {
        let error = refusal(&target, &FolderOptions::default());
        let causes = error.causes().join(" ");
        assert_eq!(error.kind, ErrorKind::Failed, "{error}");
        assert!(causes.contains(says), "{says}: {causes}");
    };
    fs::set_permissions(&partial, fs::Permissions::from_mode(0o777)).unwrap();
    refused("written by others");
    assert!(partial.join("x").exists());
    fs::set_permissions(&partial, fs::Permissions::from_mode(0o755)).unwrap();
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&partial, Some(12345), None).unwrap();
        refused("belongs to user 12345");
        assert!(partial.join("x").exists());
    }
    fs::remove_dir_all(&partial).unwrap();
    symlink(&elsewhere, &partial).unwrap();
    refused("symbolic link");
    assert!(elsewhere.join("x").exists());
}

/// Every point at which a run without RENAME_EXCHANGE can be killed, as the next run finds it.
#[test]
fn a_replacement_that_was_interrupted_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let (partial, replaced) = (
        dir.path().join(".vm-kvm.partial"),
        dir.path().join(".vm-kvm.replaced"),
    );
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    // Columns: the names of the two results, and which one exists afterwards.
    for (new, old, after) in [
        (&partial, &target, "old"),
        (&partial, &replaced, "new"),
        (&target, &replaced, "new"),
        (&target, &partial, "new"),
    ] {
        let made = dir.path().join("new");
        result(&made, "new");
        result(&target, "old");
        fs::write(target.join("notes.txt"), "mine").unwrap();
        let note = json!({"schema": INTENT, "new": inode(&made), "old": inode(&target)});
        fs::write(dir.path().join(".vm-kvm.lock"), note.to_string()).unwrap();
        fs::set_permissions(
            dir.path().join(".vm-kvm.lock"),
            fs::Permissions::from_mode(0o600),
        )
        .unwrap();
        if old != &target {
            fs::rename(&target, old).unwrap();
        }
        fs::rename(&made, new).unwrap();
        // Recovery also happens when another run reads the result.
        repair(&target).unwrap();
        assert_eq!(disk(&target), after, "{new:?} {old:?}");
        assert_eq!(
            fs::read_to_string(target.join("notes.txt")).unwrap(),
            "mine"
        );
        let mut folder = create(&target, &FORCE).unwrap();
        fill(&folder, "later");
        folder.complete().unwrap();
        drop(folder);
        assert_eq!(disk(&target), "later");
        assert_eq!(names(dir.path()), ["vm-kvm"], "{new:?} {old:?}");
        fs::remove_dir_all(&target).unwrap();
    }
    // Written by a version that noted no intent.
    result(&target, "old");
    fs::rename(&target, &replaced).unwrap();
    assert!(
        refusal(&target, &FolderOptions::default())
            .message
            .ends_with("exists")
    );
    assert_eq!(disk(&target), "old");
    result(&dir.path().join("other"), "other");
    fs::rename(dir.path().join("other"), &replaced).unwrap();
    let error = refusal(&target, &FORCE);
    assert!(error.message.contains(".vm-kvm.replaced"), "{error}");
    assert_eq!(
        (disk(&target), disk(&replaced)),
        ("old".into(), "other".into())
    );
}

/// The journal is truncated, of a later version, or unreadable. The disk may still be half written.
#[test]
fn saved_blocks_with_an_unreadable_journal_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let of_later = r#"{"schema": "hyper2kvm/journal/9", "state": "committing"}"#;
    for (text, blocks) in [
        ("", "backup/blocks.before"),
        ("{\"schema\": \"hyper2kvm/jour", "backup/blocks.before"),
        // Saved blocks of the second disk alone.
        (of_later, "backup/blocks-2.before"),
        ("\u{0}", "backup/blocks.before"),
    ] {
        let folder = plain(&target).unwrap();
        let partial = folder.path().to_path_buf();
        fs::create_dir(partial.join("backup")).unwrap();
        fs::write(partial.join(journal::FILE_NAME), text).unwrap();
        fs::write(partial.join(blocks), "old bytes").unwrap();
        drop(folder);
        for preference in [&FORCE, &FolderOptions::default()] {
            let error = refusal(&target, preference);
            assert_eq!(error.kind, ErrorKind::NotRolledBack, "{text:?}: {error}");
            assert!(error.hints[0].contains("rollback --journal"), "{error:?}");
            let checked = OutputFolder::check(&target, preference).unwrap_err();
            assert_eq!(checked.kind, ErrorKind::NotRolledBack, "{text:?}");
        }
        let saved = fs::read_to_string(partial.join(blocks)).unwrap();
        assert_eq!(saved, "old bytes", "{text:?}");
        // Nothing to restore: the next run removes it.
        fs::remove_file(partial.join(blocks)).unwrap();
        drop(plain(&target).unwrap());
        assert!(names(dir.path()).is_empty(), "{text:?}");
    }
}

/// The owner of the parent directory can exchange the partial one for a link to files of others.
#[test]
fn a_partial_folder_that_becomes_a_link_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let (victim, away) = (dir.path().join("victim"), dir.path().join("away"));
    fs::create_dir(&victim).unwrap();
    fs::write(victim.join("shared"), "theirs").unwrap();
    let open = fs::Permissions::from_mode(0o644);
    fs::set_permissions(victim.join("shared"), open).unwrap();
    for by_link in [true, false] {
        let mut folder = plain(&target).unwrap();
        fill(&folder, "new");
        fs::rename(folder.path(), &away).unwrap();
        match by_link {
            true => symlink(&victim, folder.path()).unwrap(),
            false => fs::rename(&victim, folder.path()).unwrap(),
        }
        let error = folder.settle().map(drop).unwrap_err();
        assert!(error.message.contains("was replaced"), "{error}");
        let error = folder.complete().unwrap_err();
        assert!(error.message.contains("was replaced"), "{error}");
        let there = folder.path().to_path_buf();
        drop(folder);
        assert!(!target.exists());
        let meta = fs::metadata(there.join("shared")).unwrap();
        assert_eq!(meta.mode() & 0o777, 0o644, "by link: {by_link}");
        match by_link {
            true => fs::remove_file(&there).unwrap(),
            false => fs::rename(&there, &victim).unwrap(),
        }
        fs::remove_dir_all(&away).unwrap();
    }
}

/// A report's list decides what is removed. So the report must belong to the caller or root, as
/// must the directories it names.
#[test]
fn a_report_that_others_can_write_replaces_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    result(&target, "old");
    let report = target.join(MARK);
    let refused = |says: &str| {
        let error = refusal(&target, &FORCE);
        let causes = error.causes().join(" ");
        assert!(causes.contains(says), "{says}: {error} {causes}");
        assert_eq!(error.kind, ErrorKind::Failed);
        assert_eq!(disk(&target), "old");
    };
    for bits in [0o620, 0o602, 0o666] {
        fs::set_permissions(&report, fs::Permissions::from_mode(bits)).unwrap();
        refused("written by others");
    }
    fs::set_permissions(&report, fs::Permissions::from_mode(0o600)).unwrap();
    if rustix::process::geteuid().is_root() {
        let give = |path: &Path, owner| std::os::unix::fs::chown(path, Some(owner), None).unwrap();
        give(&report, 12345);
        refused("belongs to user 12345");
        give(&report, 0);
        // Files in somebody else's directory do not count as the result's.
        give(&target.join("backup"), 12345);
        let mut folder = create(&target, &FORCE).unwrap();
        fill(&folder, "new");
        let error = folder.complete().unwrap_err();
        assert!(
            error.message.contains("not written by hyper2kvm"),
            "{error}"
        );
        drop(folder);
        assert!(target.join("backup/SYSTEM").exists());
        give(&target.join("backup"), 0);
    }
    drop(create(&target, &FORCE).unwrap());
}

/// Between the exchange and the removal, another user has put a link in place of the old
/// result.
#[test]
fn nothing_is_removed_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    let victim = dir.path().join("victim");
    for target in [&old, &new, &victim] {
        result(target, "result");
    }
    let mut earlier = Earlier::of(&old).unwrap();
    let inode = fs::metadata(&old).unwrap().ino();
    fs::rename(&old, dir.path().join("away")).unwrap();
    symlink(&victim, &old).unwrap();
    assert!(earlier.clear(&old, inode, &new).is_err());
    fs::remove_file(&old).unwrap();
    fs::rename(&victim, &old).unwrap();
    assert!(earlier.clear(&old, inode, &new).is_err());
    assert_eq!(names(&old), ["backup", MARK, "vm.qcow2"]);
    // One of its directories is a link.
    fs::remove_dir_all(&new).unwrap();
    fs::create_dir(&new).unwrap();
    let away = dir.path().join("away");
    fs::rename(away.join("backup"), dir.path().join("backup")).unwrap();
    symlink(old.join("backup"), away.join("backup")).unwrap();
    earlier.clear(&away, inode, &new).unwrap();
    assert!(new.join("backup").is_symlink());
    assert_eq!(names(&old.join("backup")), ["SYSTEM"]);
    assert!(!away.exists());
}
