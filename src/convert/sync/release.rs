//! Deletes a synced directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::failpoint;

use super::super::place::Place;
use super::state;

/// Removes the files written by syncs, `sync.json` last. So a killed run can be repeated, and a
/// damaged `sync.json` does not matter. Returns the files of somebody else.
pub(crate) fn release(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |path: &Path, e: io::Error| {
        Error::failed(format!("removing {}", path.display())).because(e)
    };
    let place = Place::open(folder, false)?;
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
