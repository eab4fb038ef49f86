//! Properties of every VM that starts on its source: the source stays unchanged, and after
//! everything is pulled the guest sees the same as after a plain conversion.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{as_raw, export, sha256, tree};

/// The digest and the time of each file of a source.
pub struct Untouched(Vec<(PathBuf, String, (i64, i64))>);

fn time(file: &Path) -> (i64, i64) {
    let found = fs::metadata(file).unwrap();
    (found.mtime(), found.mtime_nsec())
}

impl Untouched {
    pub fn of(files: &[&Path]) -> Self {
        let all = files
            .iter()
            .map(|file| (file.to_path_buf(), sha256(file), time(file)));
        Self(all.collect())
    }

    #[track_caller]
    pub fn check(&self) {
        for (file, digest, was) in &self.0 {
            assert_eq!(&sha256(file), digest, "{}", file.display());
            assert_eq!(time(file), *was, "{}", file.display());
        }
    }
}

/// Every live file, and both hives key by key: they have times in them.
#[track_caller]
pub fn same_guest(plain: &Path, pulled: &Path) {
    let scratch = tempfile::tempdir().unwrap();
    let [want, have] = [("plain.raw", plain), ("pulled.raw", pulled)].map(|(name, disk)| {
        let raw = scratch.path().join(name);
        as_raw(disk, &raw);
        let files = tree(&raw);
        fs::remove_file(&raw).unwrap();
        files
    });
    assert!(want.len() > 100);
    assert!(want.keys().eq(have.keys()));
    for (path, bytes) in &want {
        let is_hive = path.1.to_ascii_lowercase().contains("/config/");
        assert!(is_hive || have[path] == *bytes, "{path:?}");
    }
    for hive in ["SYSTEM", "SOFTWARE"] {
        let prefix = format!("HKEY_LOCAL_MACHINE\\{hive}");
        let [a, b] = [&want, &have].map(|tree| {
            let name = format!("/config/{hive}");
            let found = tree
                .iter()
                .find(|(path, _)| path.1.ends_with(&name))
                .unwrap();
            let file = scratch.path().join("hive");
            fs::write(&file, found.1.as_ref().unwrap()).unwrap();
            export(&file, &prefix, "\\")
        });
        assert!(a == b, "{hive} differs");
    }
}
