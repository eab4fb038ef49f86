//! Replaces an earlier result by a new one, and recovers from a run that was killed during that.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{RenameFlags, renameat_with};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::failpoint;
use crate::files::{self, order, rename_new, rename_new_at};
use crate::fix::trusted::TrustedFolder;

use super::place::{OutputPlace, TargetLock, untrusted};
use super::replace::Earlier;

pub(super) const INTENT: &str = "hyper2kvm/replacing/1";

/// The intent of a run, noted before it starts to replace a result.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Intent {
    pub(super) schema: String,
    /// Inode numbers of the two directories.
    pub(super) new: u64,
    pub(super) old: u64,
}

impl OutputPlace {
    /// Puts the new directory under the name of the old one, in one step if the file system
    /// supports it.
    pub(super) fn exchange(&self) -> io::Result<()> {
        let (parent, partial, name) = (&self.parent, &*self.partial, &*self.name);
        failpoint::step("before", "rename of the output directory")?;
        order::note("exchange", &self.target);
        let exchanged = match failpoint::hit("exchange") {
            Ok(()) => renameat_with(parent, partial, parent, name, RenameFlags::EXCHANGE),
            Err(_) => Err(Errno::INVAL),
        };
        match exchanged {
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.exchange_in_steps()?,
            done => done?,
        }
        self.renamed();
        Ok(())
    }

    /// Records that the result has its final name. Later failures no longer undo anything.
    pub(super) fn renamed(&self) {
        let synced = files::sync(&self.parent, self.folder());
        let after = || failpoint::step("after", "rename of the output directory");
        if let Err(error) = synced.and_then(|()| after()) {
            tracing::warn!(
                "{} is complete, but a loss of power could still undo its rename: {error}",
                self.target.display()
            );
        }
    }

    pub(super) fn exchange_in_steps(&self) -> io::Result<()> {
        let parent = &self.parent;
        let rename = |from: &OsStr, to: &OsStr| {
            rename_new_at(parent, Path::new(from), parent, Path::new(to))
        };
        rename(&self.name, &self.replaced)?;
        let synced = files::sync(parent, self.folder());
        let second = synced
            .and_then(|()| failpoint::step("between", "renames of the output directory"))
            .and_then(|()| rename(&self.partial, &self.name));
        if let Err(error) = second {
            // Put the old result back; the first error is the one to report.
            let _ = rename(&self.replaced, &self.name);
            return Err(error);
        }
        Ok(())
    }

    /// The path of the old result after the exchange.
    pub(super) fn old(&self, inode: u64) -> Option<PathBuf> {
        let mut names = [&self.partial, &self.replaced].into_iter();
        let name = names.find(|name| self.inode(name) == Some(inode))?;
        Some(self.path(name))
    }

    /// Moves the user's files to the new result and removes the rest of the old one.
    pub(super) fn finish(&self, earlier: &mut Earlier, old: u64) -> io::Result<()> {
        let Some(path) = self.old(old) else {
            return Ok(());
        };
        earlier.clear(&path, old, &self.target)?;
        files::sync(&self.parent, self.folder())
    }

    /// Renames leftovers to a visible name that no run removes.
    pub(super) fn set_aside(&self, old: u64, error: &io::Error) {
        let Some(old) = self.old(old) else {
            return;
        };
        for number in 1..100 {
            let mut name = self.name.clone();
            name.push(format!(".kept-{number}"));
            let aside = self.path(&name);
            match rename_new(&old, &aside) {
                Ok(()) => {
                    tracing::warn!(
                        "files that hyper2kvm did not write are left in {}: {error}",
                        aside.display()
                    );
                    return;
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => {
                    tracing::warn!("{} is left: {e}", old.display());
                    return;
                }
            }
        }
    }
}

/// Finishes or undoes a replacement in which an earlier run was killed. Afterwards the result has
/// its name again. Does nothing while another run holds the lock.
pub fn repair(target: &Path) -> Result<()> {
    let Ok(place) = OutputPlace::open(target, false) else {
        return Ok(());
    };
    let mut name = OsString::from(".");
    name.push(&place.name);
    name.push(".lock");
    let noted = place.inode(&name).is_some() || place.inode(&place.replaced).is_some();
    if !noted {
        return Ok(());
    }
    let lock = place.lock()?;
    repair_locked(&place, &lock)
}

/// The lock of the conversion to which this partial directory belongs; `None` for any other
/// directory.
pub fn lock_of_partial(folder: &Path) -> Result<Option<TargetLock>> {
    let name = folder.file_name().and_then(OsStr::to_str);
    let name = name.and_then(|n| n.strip_prefix('.')?.strip_suffix(".partial"));
    match name {
        Some(name) => {
            let place = OutputPlace::open(&folder.with_file_name(name), false)?;
            place.lock().map(Some)
        }
        None => Ok(None),
    }
}

pub(super) fn repair_locked(place: &OutputPlace, lock: &TargetLock) -> Result<()> {
    let shown = place.target.display();
    let failed = |e: io::Error| {
        Error::failed(format!(
            "repairing {shown}, which a killed run was replacing"
        ))
        .because(e)
    };
    let note = lock.note().map_err(failed)?;
    let intent: Option<Intent> = serde_json::from_str(&note).ok();
    let intent = intent.filter(|i| i.schema == INTENT);
    let rename = |from: &OsStr, to: &OsStr| {
        let parent = &place.parent;
        rename_new_at(parent, Path::new(from), parent, Path::new(to))
            .and_then(|()| files::sync(parent, place.folder()))
    };
    if let Some(Intent { new, old, .. }) = intent {
        for name in [&place.partial, &place.replaced] {
            if place.stat(name).is_some() {
                TrustedFolder::open(&place.path(name)).map_err(untrusted)?;
            }
        }
        let at = |name: &OsStr| place.inode(name);
        if at(&place.name).is_none() && at(&place.replaced) == Some(old) {
            let back = match at(&place.partial) == Some(new) {
                true => &place.partial,
                false => &place.replaced,
            };
            rename(back, &place.name).map_err(failed)?;
        }
        if at(&place.name) == Some(new)
            && let Some(path) = place.old(old)
        {
            let mut earlier = Earlier::of(&path)?;
            if let Err(error) = place.finish(&mut earlier, old) {
                place.set_aside(old, &error);
            }
        }
        tracing::info!("{shown}: finished what a killed run had begun");
        return lock.set_note("").map_err(failed);
    }
    let Some(_) = place.stat(&place.replaced) else {
        return Ok(());
    };
    // Written by a version that noted no intent.
    let replaced = place.path(&place.replaced);
    TrustedFolder::open(&replaced).map_err(untrusted)?;
    if place.stat(&place.name).is_none() {
        return rename(&place.replaced, &place.name).map_err(failed);
    }
    Err(Error::failed(format!(
        "{} was left by a run that was killed while it replaced {shown}",
        replaced.display()
    ))
    .hint("compare the two and remove or rename the one that is of no use"))
}
