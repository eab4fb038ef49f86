//! Deletes a synced directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::failpoint;

use super::super::place::OutputPlace;
use super::state;

/// Removes the files written by syncs, `sync.json` last. So a killed run can be repeated, and a
/// damaged `sync.json` does not matter. Returns the files of somebody else.
pub(crate) fn release(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |path: &Path, e: io::Error| {
        Error::failed(format!("removing {}", path.display())).because(e)
    };
    let place = OutputPlace::open(folder, false)?;
    let _lock = place.lock()?;
    // A last pass that was killed has given the copies a second name.
    place.remove_dead(&[])?;
    let (mut kept, mut last) = (Vec::new(), None);
    for entry in fs::read_dir(folder).map_err(|e| failed(folder, e))? {
        let path = entry.map_err(|e| failed(folder, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match &*name {
            state::FILE => last = Some(path),
            name if state::is_copy(name) => fs::remove_file(&path).map_err(|e| failed(&path, e))?,
            _ => kept.push(path),
        }
        failpoint::hit("releasing").map_err(|e| failed(folder, io::Error::other(e.to_string())))?;
    }
    if let Some(last) = last {
        fs::remove_file(&last).map_err(|e| failed(&last, e))?;
    }
    if kept.is_empty() {
        fs::remove_dir(folder).map_err(|e| failed(folder, e))?;
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::super::super::testing::names;
    use super::super::SyncState;
    use super::*;

    #[test]
    fn what_syncs_wrote_is_removed_and_what_the_user_put_there_stays() {
        let own = [
            "vm.sync.qcow2",
            "vm-1.sync.qcow2",
            "vm.sync.journal",
            "vm.sync.journal.new",
        ];
        for mine in [&[][..], &["notes.txt", "vm.qcow2"]] {
            let dir = tempfile::tempdir().unwrap();
            let folder = dir.path().join("vm-kvm");
            fs::create_dir(&folder).unwrap();
            SyncState::new("vm", Path::new("/vm.vmx"))
                .save(&folder)
                .unwrap();
            for name in own.iter().chain(mine) {
                fs::write(folder.join(name), "x").unwrap();
            }
            let partial = dir.path().join(".vm-kvm.partial");
            fs::create_dir(&partial).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            fs::set_permissions(&partial, mode).unwrap();
            let kept = release(&folder).unwrap();
            assert_eq!(kept.len(), mine.len());
            assert!(!partial.exists());
            assert_eq!(folder.exists(), !mine.is_empty());
            if !mine.is_empty() {
                assert_eq!(names(&folder), mine);
            }
            assert!(!dir.path().join(".vm-kvm.lock").exists());
        }
    }

    /// A conversion at work has the copies under a second name.
    #[test]
    fn nothing_is_removed_while_a_conversion_is_at_work() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("vm-kvm");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("vm.sync.qcow2"), "x").unwrap();
        let place = OutputPlace::open(&folder, false).unwrap();
        let lock = place.lock().unwrap();
        let error = release(&folder).unwrap_err();
        assert!(error.message.contains("another conversion"), "{error}");
        assert_eq!(names(&folder), ["vm.sync.qcow2"]);
        drop(lock);
        release(&folder).unwrap();
        assert!(!folder.exists());
    }

    /// Without it the rest would be nobody's.
    #[test]
    fn the_state_is_removed_after_everything_that_it_names() {
        // Whatever the order in which the directory is read.
        for i in 0..8 {
            let dir = tempfile::tempdir().unwrap();
            let folder = dir.path().join("vm-kvm");
            let copy = folder.join(format!("{i}.sync.qcow2"));
            fs::create_dir_all(&copy).unwrap();
            let state = SyncState::new("vm", Path::new("/vm.vmx"));
            state.save(&folder).unwrap();
            // No file: it cannot be removed.
            let error = release(&folder).unwrap_err();
            assert!(error.message.contains("sync.qcow2"), "{error}");
            assert!(super::super::is_synced(&folder), "{i}");
        }
    }
}
