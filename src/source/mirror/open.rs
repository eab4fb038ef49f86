//! The remote sources of this run: each server is connected to once, and each source is mirrored
//! once.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Mirror;
use crate::disk::remote;
use crate::files::Scratch;
use crate::wire::{Access, Location, Transport, Wire, WireError};

struct Opened {
    at: Location,
    path: PathBuf,
    wire: Wire,
    access: Access,
    /// The directory of the mirror.
    directory: Scratch,
}

static OPENED: Mutex<Vec<Opened>> = Mutex::new(Vec::new());

fn opened() -> MutexGuard<'static, Vec<Opened>> {
    OPENED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The local path that stands for a source until [`close`].
pub(crate) fn open(at: &Location, access: &Access) -> Result<PathBuf, WireError> {
    let mut all = opened();
    if let Some(known) = all.iter().find(|known| known.at == *at) {
        return Ok(known.path.clone());
    }
    let known = all.iter().find(|known| known.wire.reaches(at));
    let wire = match known {
        Some(known) => known.wire.clone(),
        None => Wire::connect(at, access)?,
    };
    let failed = |e: std::io::Error| {
        WireError::host(
            at,
            "making a directory for its descriptions",
            &e,
            "TMPDIR names another directory for temporary files",
        )
    };
    let directory = Scratch::new().map_err(failed)?;
    let root = directory.path().canonicalize().map_err(failed)?;
    let is_export = at.transport().is_export();
    if !is_export {
        let url = at.with_path("/").to_string();
        let url = url.split('?').next().unwrap_or_default();
        remote::register_root(&root, url.trim_end_matches('/'));
    }
    let path = Mirror::new(Arc::new(wire.clone()), &root).source(at)?;
    if is_export {
        remote::register_root(&path, &at.to_string());
    }
    crate::ui::count_fetched(fetched);
    all.push(Opened {
        at: at.clone(),
        path: path.clone(),
        wire,
        access: access.clone(),
        directory,
    });
    Ok(path)
}

/// Bytes that have crossed the wire so far, for all sources.
pub(crate) fn fetched() -> u64 {
    // Clones of one connection count the same bytes.
    let mut seen: Vec<Wire> = Vec::new();
    for known in opened().iter() {
        if !seen.iter().any(|wire| wire.reaches(&known.at)) {
            seen.push(known.wire.clone());
        }
    }
    seen.iter().map(Wire::fetched).sum()
}

/// The transport of the file at a path.
pub(crate) fn transport(path: &Path) -> Transport {
    let all = opened();
    let known = all.iter().find(|known| known.has(path));
    known.map_or(Transport::File, |known| known.at.transport())
}

/// The access options for the file at a path; `None` for a file of this host.
pub(crate) fn access(path: &Path) -> Option<Access> {
    let all = opened();
    let known = all.iter().find(|known| known.has(path));
    known.map(|known| known.access.clone())
}

impl Opened {
    fn has(&self, path: &Path) -> bool {
        let root = self.directory.path();
        path.starts_with(root) || path.starts_with(root.canonicalize().unwrap_or_default())
    }
}

/// The reason why a source is unreadable. Its readers got only an input error.
pub(crate) fn trouble() -> Option<WireError> {
    let wires: Vec<Wire> = opened().iter().map(|known| known.wire.clone()).collect();
    wires.iter().find_map(Wire::trouble)
}

/// The reason why the child that connects to the source at a path is unusable.
pub(crate) fn broken(path: &Path) -> Option<WireError> {
    let all = opened();
    all.iter().find(|known| known.has(path))?.wire.broken()
}

/// Disconnects, and removes the mirrors.
pub(crate) fn close() {
    remote::forget();
    opened().clear();
}
