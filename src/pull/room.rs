//! Checks whether the remaining data fits beside the overlays.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::disk::copy::free_space;
use crate::error::{Error, Result};
use crate::ui;

/// Fails if a file system has less space than remains to be copied to it. Zeroes in it take none,
/// so it may fit nevertheless.
pub(super) fn check<'a>(left: impl IntoIterator<Item = (&'a Path, u64)>) -> Result<()> {
    let mut wanted: BTreeMap<u64, (PathBuf, u64)> = BTreeMap::new();
    for (disk, bytes) in left {
        let folder = disk.parent().unwrap_or(Path::new("/"));
        // The copy reports what is inaccessible here.
        let Ok(found) = std::fs::metadata(folder) else {
            continue;
        };
        let entry = wanted.entry(found.dev());
        entry.or_insert_with(|| (folder.to_owned(), 0)).1 += bytes;
    }
    for (folder, bytes) in wanted.into_values() {
        let free = free_space(&folder)?;
        if free < bytes {
            return Err(Error::failed(format!(
                "{} are left to copy, and {} are free in {}",
                ui::bytes(bytes),
                ui::bytes(free),
                folder.display()
            ))
            .hint("free some space there, then run the same command again"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_numbers_are_said() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        let free = free_space(dir.path()).unwrap();
        assert!(check([(&*one, 4096), (&*two, 4096)]).is_ok());
        // Together they do not fit.
        let error = check([(&*one, free / 4 * 3), (&*two, free / 4 * 3)]).unwrap_err();
        assert!(error.message.contains("are free in"), "{error}");
        assert!(error.hints[0].contains("free some space"), "{error:?}");
    }
}
