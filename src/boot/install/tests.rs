//! Moves between directories and file systems, including interrupted ones.

use super::*;
use crate::skip::skip;

#[test]
fn pools() {
    let pool =
        |kind: &str, target: &str| format!("<pool type='{kind}'><name>p</name>{target}</pool>");
    let path = "<target><path>/var/lib/x y</path></target>";
    assert_eq!(
        pool_folder("p", &pool("dir", path)).unwrap(),
        Path::new("/var/lib/x y")
    );
    for xml in [pool("logical", path), pool("dir", ""), "<".to_owned()] {
        assert!(pool_folder("p", &xml).is_err(), "{xml}");
    }
}

fn moved(from: PathBuf, to: PathBuf) -> Installing {
    Installing {
        moves: vec![Moved {
            from,
            to,
            copy: None,
        }],
    }
}

/// Between file systems, and again after an interruption.
#[test]
fn a_file_crosses_file_systems() {
    let (here, there) = (
        tempfile::tempdir().unwrap(),
        tempfile::tempdir_in("/dev/shm"),
    );
    let Ok(there) = there else {
        return skip("dev-shm", "no /dev/shm");
    };
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    if device(here.path()) == device(there.path()) {
        return skip("dev-shm", "/dev/shm is no file system of its own");
    }
    let (from, to) = (here.path().join("a disk"), there.path().join("a disk"));
    fs::write(&from, "contents").unwrap();
    let dead = there
        .path()
        .join(format!(".a disk.{}.partial", uuid::Uuid::new_v4()));
    fs::create_dir(&dead).unwrap();
    fs::set_permissions(&dead, Permissions::from_mode(0o700)).unwrap();
    fs::write(dead.join("disk"), "of a killed run").unwrap();
    fs::write(there.path().join("a disk.partial"), "of the user").unwrap();
    Work::remove_dead(&to);
    let mut state = moved(from.clone(), to.clone());
    for _ in 0..2 {
        state.moves[0].check(&Value::Null, &[]).unwrap();
        put(here.path(), &mut state, 0).unwrap();
        assert!(from.exists(), "the original goes last");
        assert_eq!(fs::read_to_string(&to).unwrap(), "contents");
        state = Installing::load(here.path()).unwrap();
    }
    state.moves[0].remove_original().unwrap();
    assert!(!from.exists());
    let mut names: Vec<_> = fs::read_dir(there.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["a disk", "a disk.partial"]);
    let mut warnings = Vec::new();
    prepare(&state.moves[0], &Value::Null, None, &mut warnings).unwrap();
    assert_eq!(fs::metadata(&to).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn a_name_that_is_taken_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("disk"), dir.path().join("there"));
    fs::write(&from, "mine").unwrap();
    let mut state = moved(from.clone(), to.clone());
    state.moves[0].check(&Value::Null, &[]).unwrap();
    // It appears after the check.
    fs::write(&to, "another's").unwrap();
    let error = put(dir.path(), &mut state, 0).unwrap_err();
    assert!(error.message.ends_with("exists already"), "{error}");
    assert!(state.moves[0].check(&Value::Null, &[]).is_err());
    state.moves[0].take_back(&Value::Null);
    state.moves[0].remove_original().unwrap();
    assert_eq!(fs::read_to_string(&from).unwrap(), "mine");
    assert_eq!(fs::read_to_string(&to).unwrap(), "another's");
    // Missing variables must not become those of another VM.
    fs::remove_file(&from).unwrap();
    assert!(state.moves[0].check(&Value::Null, &[]).is_err());
}

#[test]
fn only_what_was_put_there_is_given_away() {
    let dir = tempfile::tempdir().unwrap();
    let [from, to, victim] = ["disk", "there", "victim"].map(|name| dir.path().join(name));
    for file in [&from, &victim] {
        fs::write(file, "x").unwrap();
        fs::set_permissions(file, Permissions::from_mode(0o644)).unwrap();
    }
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    let mut state = moved(from.clone(), to.clone());
    put(dir.path(), &mut state, 0).unwrap();
    let give = || prepare(&state.moves[0], &Value::Null, None, &mut Vec::new());
    fs::remove_file(&to).unwrap();
    std::os::unix::fs::symlink(&victim, &to).unwrap();
    assert!(give().is_err());
    fs::remove_file(&to).unwrap();
    fs::hard_link(&victim, &to).unwrap();
    assert!(give().is_err());
    assert_eq!((mode(&victim), mode(&from)), (0o644, 0o644));
    fs::remove_file(&to).unwrap();
    fs::hard_link(&from, &to).unwrap();
    give().unwrap();
    assert_eq!(mode(&from), 0o600);
}

#[test]
fn a_disk_that_is_nowhere_is_not_put() {
    let dir = tempfile::tempdir().unwrap();
    let [from, to] = ["disk", "there"].map(|name| dir.path().join(name));
    let one = &moved(from.clone(), to.clone()).moves[0];
    let error = one.check(&Value::Null, &[]).unwrap_err();
    assert!(error.message.contains(to.to_str().unwrap()), "{error}");
    assert_eq!(error.hints.len(), 1);
    for nvram in [&from, &to] {
        one.check(&Value::Null, std::slice::from_ref(nvram))
            .unwrap();
    }
    std::os::unix::fs::symlink("/dev/null", &from).unwrap();
    let error = one.check(&Value::Null, &[]).unwrap_err();
    assert!(error.message.contains("no file itself"), "{error}");
}

#[test]
fn the_report_knows_what_was_moved() {
    let dir = tempfile::tempdir().unwrap();
    let [from, to] = ["disk", "there"].map(|name| dir.path().join(name));
    fs::write(&to, "x").unwrap();
    let one = &moved(from.clone(), to.clone()).moves[0];
    let found = fs::metadata(&to).unwrap();
    let listed = |path: &Path| {
        let entry = OutputFile::of(path.into(), &found);
        serde_json::json!({"files": [entry], "outputs": {"disks": [to]}})
    };
    for (path, known) in [
        (Path::new("disk"), true),
        (&to, true),
        (Path::new("other"), false),
    ] {
        assert_eq!(one.check(&listed(path), &[]).is_ok(), known, "{path:?}");
    }
    // A VM has run from it since.
    let report = listed(&to);
    fs::write(&to, "changed").unwrap();
    one.check(&report, &[]).unwrap();
    assert!(one.check(&listed(Path::new("disk")), &[]).is_err());
    // Both exist: one of them is somebody else's.
    fs::write(&from, "x").unwrap();
    assert!(one.check(&report, &[]).is_err());
}

#[test]
fn folders_of_others_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = rustix::process::geteuid().is_root();
    for (mode, fine) in [
        (0o755, true),
        (0o711, true),
        (0o775, !root),
        (0o757, false),
        (0o1777, true),
    ] {
        fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
        let found = refuse_others(dir.path());
        assert_eq!(found.is_ok(), fine, "{mode:o}");
        assert!(
            found
                .err()
                .is_none_or(|e| e.hints[0].starts_with("chmod go-w"))
        );
    }
    if root {
        std::os::unix::fs::chown(dir.path(), Some(12345), None).unwrap();
        let error = refuse_others(dir.path()).unwrap_err();
        assert!(error.message.contains("belongs to user 12345"), "{error}");
    }
}
