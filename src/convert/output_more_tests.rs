//! More about the output directory: its journal, its list, its name.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use serde_json::{Value, json};

use super::super::testing::names;
use super::tests::{FORCE, create, disk, fill, plain};
use super::*;

/// Rollback needs it after the exchange too.
#[test]
fn the_journal_is_found_before_and_after_the_result_has_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let of = journal::DiskRef {
        path: "/disk".into(),
        format: "raw".into(),
        size_bytes: 1,
        in_place: false,
    };
    for earlier in [false, true] {
        let mut folder = create(&target, &FORCE).unwrap();
        fill(&folder, "new");
        let partial = folder.path().to_path_buf();
        assert!(folder.journal().is_err(), "{earlier}");
        Journal::create(&partial, of.clone(), vec![], vec![]).unwrap();
        let files = folder.settle().unwrap();
        let mut report: Value =
            serde_json::from_slice(&fs::read(partial.join(MARK)).unwrap()).unwrap();
        report["files"] = json!(files);
        fs::write(partial.join(MARK), report.to_string()).unwrap();
        assert_eq!(folder.journal().unwrap().doc.disk.path, Path::new("/disk"));
        folder.complete().unwrap();
        let found = folder.journal().unwrap();
        assert_eq!(found.path(), target.join(journal::FILE_NAME), "{earlier}");
        drop(folder);
        assert_eq!(disk(&target), "new");
        assert_eq!(names(dir.path()), ["vm-kvm"], "{earlier}");
    }
}

#[test]
fn the_files_of_a_result_are_listed_by_their_paths_and_closed_to_others() {
    let dir = tempfile::tempdir().unwrap();
    let folder = plain(&dir.path().join("vm-kvm")).unwrap();
    let mut wanted: Vec<_> = (0..40).map(|i| format!("{}-{i}", (i * 7) % 40)).collect();
    wanted.extend(["a/z".into(), "a/b".into(), "b/run.sh".into()]);
    for name in &wanted {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, name).unwrap();
        let mode = if name.ends_with(".sh") { 0o4755 } else { 0o666 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let list = folder.settle().unwrap();
    wanted.sort_by(|a, b| Path::new(a).cmp(Path::new(b)));
    let listed: Vec<_> = list
        .iter()
        .map(|file| file.path.to_str().unwrap())
        .collect();
    assert_eq!(listed, wanted);
    for file in &list {
        let meta = fs::metadata(folder.path().join(&file.path)).unwrap();
        let own = if file.path.ends_with("run.sh") {
            0o700
        } else {
            0o600
        };
        assert_eq!(meta.mode() & 0o7777, own, "{:?}", file.path);
        assert_eq!(meta.len(), file.size_bytes);
    }
    let mut files = Vec::new();
    // A link leads elsewhere.
    symlink("/nowhere", folder.path().join("link")).unwrap();
    open_all(&folder.fd, &mut files).unwrap();
    assert_eq!(files.len(), wanted.len() + 2, "with two directories");
}

/// Somebody with write access beside it can exchange it.
#[test]
fn a_run_starts_over_only_in_the_directory_that_is_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let mut folder = plain(&target).unwrap();
    fs::write(folder.path().join("half"), "").unwrap();
    folder.start_over().unwrap();
    assert!(folder.path().exists() && !folder.path().join("half").exists());
    fs::write(folder.path().join("new"), "").unwrap();
    assert_eq!(
        folder.settle().unwrap().len(),
        1,
        "the new one is worked in"
    );
    fs::rename(folder.path(), dir.path().join("away")).unwrap();
    fs::create_dir(folder.path()).unwrap();
    fs::write(folder.path().join("theirs"), "").unwrap();
    let error = folder.start_over().unwrap_err();
    assert!(error.message.contains("was replaced"), "{error}");
    assert!(folder.path().join("theirs").exists());
}

#[test]
fn only_a_run_that_writes_makes_the_directories_above_its_target() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("a/b/vm-kvm");
    assert!(OutputPlace::open(&target, false).is_err());
    assert!(!dir.path().join("a").exists());
    OutputFolder::check(&target, &FolderOptions::default()).unwrap();
    assert!(!dir.path().join("a").exists());
    OutputFolder::check_writable(&target).unwrap();
    OutputPlace::open(&target, true).unwrap();
    assert!(dir.path().join("a/b").is_dir() && !target.exists());
    OutputFolder::check_writable(&target).unwrap();
    // No directory can be made below a file, by whomever.
    fs::write(dir.path().join("file"), "").unwrap();
    let error = OutputFolder::check_writable(&dir.path().join("file/a/vm-kvm")).unwrap_err();
    assert!(error.to_string().contains("file"), "{error}");
}

#[test]
fn a_result_is_put_into_the_nearest_directory_that_exists() {
    let dir = tempfile::tempdir().unwrap();
    let there = dir.path().join("a");
    fs::create_dir_all(there.join("old-kvm")).unwrap();
    for target in ["a/old-kvm", "a/new-kvm", "a/b/c/new-kvm"] {
        let target = dir.path().join(target);
        assert_eq!(nearest(&target), Some(&*there), "{}", target.display());
    }
}

/// A file of the user in a directory of the old result, where the new one has a file of that name.
fn unmovable(target: &Path, folder: &OutputFolder) {
    fs::write(target.join("backup/mine"), "mine").unwrap();
    fs::write(folder.path().join("backup"), "a file now").unwrap();
}

fn kept(dir: &Path) {
    assert_eq!(names(dir), ["vm-kvm", "vm-kvm.kept-1"]);
    let left = dir.join("vm-kvm.kept-1");
    assert_eq!(
        fs::read_to_string(left.join("backup/mine")).unwrap(),
        "mine"
    );
    assert!(dir.join("vm-kvm/backup").is_file());
}

/// A later run removes what has a hidden name.
#[test]
fn files_of_the_user_that_cannot_be_moved_stay_beside_the_new_result() {
    for killed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("vm-kvm");
        let mut folder = plain(&target).unwrap();
        fill(&folder, "old");
        folder.complete().unwrap();
        drop(folder);
        let mut folder = create(&target, &FORCE).unwrap();
        unmovable(&target, &folder);
        if !killed {
            folder.complete().unwrap();
            drop(folder);
            kept(dir.path());
            continue;
        }
        // After the exchange, before anything of the old result was moved.
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        let note = json!({"schema": INTENT, "new": inode(folder.path()), "old": inode(&target)});
        let away = dir.path().join("away");
        fs::rename(folder.path(), &away).unwrap();
        drop(folder);
        fs::rename(&target, dir.path().join(".vm-kvm.partial")).unwrap();
        fs::rename(&away, &target).unwrap();
        let lock = dir.path().join(".vm-kvm.lock");
        fs::write(&lock, note.to_string()).unwrap();
        fs::set_permissions(&lock, fs::Permissions::from_mode(0o600)).unwrap();
        crate::convert::exchange::repair(&target).unwrap();
        kept(dir.path());
    }
}

/// Somebody could have it say that nothing has to be undone.
#[test]
fn a_journal_that_others_can_write_is_believed_in_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("vm-kvm");
    let partial = dir.path().join(".vm-kvm.partial");
    for (mode, refused) in [(0o666, true), (0o600, false)] {
        fs::create_dir_all(&partial).unwrap();
        fs::set_permissions(&partial, fs::Permissions::from_mode(0o700)).unwrap();
        let journal = partial.join(journal::FILE_NAME);
        fs::write(&journal, "{}").unwrap();
        fs::set_permissions(&journal, fs::Permissions::from_mode(mode)).unwrap();
        let made = plain(&target).map(drop);
        assert_eq!(made.is_err(), refused, "{mode:o}");
        assert_eq!(journal.exists(), refused, "{mode:o}");
        if let Err(error) = made {
            assert!(
                error.causes().join(" ").contains("written by others"),
                "{error:?}"
            );
        }
    }
}
