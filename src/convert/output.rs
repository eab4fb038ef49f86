//! The output directory: either complete or absent.
//!
//! Work happens in `.NAME.partial` beside the final path, which is renamed at the end. Beside it
//! lies `.NAME.lock`, which is locked from the first check until after the rename, so there is one
//! run per target. The existing target is checked twice, at the start and right before the rename
//! ([`super::replace`]).
//!
//! To replace an earlier result, the two directories are exchanged in one step. Then the user's own
//! files are moved over and the rest is removed. That takes several steps. On a file system without
//! the exchange (NFS, CIFS) the old result is first renamed to `.NAME.replaced`. So the intent is
//! noted in the lock file before. A run that finds one finishes or undoes the replacement
//! ([`super::exchange`]).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Access, FileType, Mode, OFlags, access, fchmod, fstat, fsync, openat, renameat};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::failpoint;
use crate::files::{self, entries, is_directory, open_directory, order, rename_new_at};
use crate::fix::journal::{self, Journal, JournalError};
use crate::report::OutputFile;
use crate::timeline;

use super::exchange::{INTENT, Intent, repair_locked};
use super::job::Job;
use super::place::{OutputPlace, TargetLock, cannot_write, needs_undo};
use super::replace::{self, Earlier, MARK, ReplaceOptions, Situation};
use super::work::{OVERLAY, WORK, resume_file};

/// Attempts to replace a target that other processes change in the meantime.
const ROUNDS: usize = 8;

/// What the run may replace, and what the directory will contain.
#[derive(Default)]
pub struct FolderOptions<'a> {
    /// Replace an earlier result.
    pub force: bool,
    /// The directory will contain the undo log of a fix in place.
    pub undo: bool,
    /// Take over the files of an interrupted copy.
    pub resume: bool,
    /// Finish a synced directory.
    pub sync: bool,
    /// Lists the files of the source; called only before something is removed.
    pub sources: Option<&'a dyn Fn() -> Vec<PathBuf>>,
}

impl<'a> FolderOptions<'a> {
    fn replace_options<'s>(&self, sources: &'s [PathBuf]) -> ReplaceOptions<'s> {
        ReplaceOptions {
            force: self.force,
            sources,
            sync: self.sync,
            last: false,
        }
    }

    /// The preference of a job; `sources` lists the files of the source.
    pub(super) fn of(job: &Job, sources: &'a dyn Fn() -> Vec<PathBuf>) -> Self {
        Self {
            force: job.output.force,
            undo: job.copy.is_in_place(),
            resume: job.output.resume,
            sync: job.output.from_sync,
            sources: Some(sources),
        }
    }
}

/// The partial directory; removed when dropped before [`OutputFolder::complete`].
pub struct OutputFolder {
    place: OutputPlace,
    partial: PathBuf,
    /// The partial directory itself, even after its name has changed.
    fd: OwnedFd,
    force: bool,
    sync: bool,
    sources: Vec<PathBuf>,
    /// Whether the directory existed at the start.
    existed: bool,
    lock: TargetLock,
    done: bool,
    taken_over: bool,
    /// Whether it contains an interrupted copy that a later run can continue.
    kept: AtomicBool,
}

/// Refuses a path that is not text: the descriptions of the VM are text and contain it.
fn refuse_unless_text(target: &Path) -> Result<()> {
    if target.to_str().is_some() {
        return Ok(());
    }
    let shown = crate::text::of_path(target);
    Err(Error::usage(format!(
        "the output directory {shown} has a name that is not valid UTF-8, and the VM's description must name it"
    ))
    .hint("name another directory with --output-dir"))
}

/// The nearest existing directory in which `target` is, or will be.
fn nearest(target: &Path) -> Option<&Path> {
    target.ancestors().skip(1).find(|parent| parent.exists())
}

impl OutputFolder {
    /// Checks, as far as possible without writing, that [`OutputFolder::create`] would accept this
    /// directory. Returns its absolute path.
    pub fn check(target: &Path, preference: &FolderOptions) -> Result<PathBuf> {
        let absolute = std::path::absolute(target)
            .map_err(|e| Error::usage("the output directory has no absolute path").because(e))?;
        refuse_unless_text(&absolute)?;
        if absolute.parent().is_some_and(|parent| !parent.exists()) {
            return Ok(absolute);
        }
        let place = OutputPlace::open(&absolute, false)?;
        // Released immediately: a conversion that starts now must not fail because of this lock.
        drop(place.lock_if_there()?);
        let sources = place.sources(preference);
        replace::look(
            &place.parent,
            &place.target,
            &preference.replace_options(&sources),
        )?;
        place.check_dead(&sources)?;
        Ok(absolute)
    }

    /// Checks that the directory can be created with the permissions of its parents.
    pub fn check_writable(target: &Path) -> Result<()> {
        let Some(there) = nearest(target) else {
            return Ok(());
        };
        access(there, Access::WRITE_OK | Access::EXEC_OK).map_err(|e| cannot_write(there, e.into()))
    }

    /// Whether the directory contains an interrupted copy that the next run can continue.
    pub(super) fn holds_a_copy(target: &Path) -> bool {
        let left = OutputPlace::open(target, false).and_then(|place| {
            let _lock = place.lock_if_there()?;
            place.left_copy(&[])
        });
        matches!(left, Ok(Some(_)))
    }

    /// Checks that `target` may be created, and creates the partial directory.
    pub fn create(target: &Path, preference: &FolderOptions) -> Result<Self> {
        if let Ok(absolute) = std::path::absolute(target) {
            refuse_unless_text(&absolute)?;
        }
        let place = OutputPlace::open(target, true)?;
        let lock = place.lock()?;
        repair_locked(&place, &lock)?;
        let sources = place.sources(preference);
        let options = preference.replace_options(&sources);
        let situation = replace::look(&place.parent, &place.target, &options)?;
        let left = match preference.resume {
            true => place.left_copy(&sources)?,
            false => None,
        };
        let taken_over = left.is_some();
        let fd = match left {
            Some(fd) => fd,
            None => {
                place.remove_dead(&sources)?;
                place.create_partial()?
            }
        };
        if preference.undo {
            // Its saved blocks must survive a loss of power.
            files::sync(&place.parent, place.folder())
                .map_err(|e| cannot_write(&place.target, e))?;
        }
        let folder = Self {
            partial: place.path(&place.partial),
            fd,
            force: preference.force,
            sync: preference.sync,
            sources,
            existed: !matches!(situation, Situation::Free),
            lock,
            done: false,
            taken_over,
            kept: AtomicBool::new(taken_over),
            place,
        };
        if folder.existed {
            folder.place.check_attributes(&folder.fd, preference.undo)?;
        }
        Ok(folder)
    }

    /// Whether the directory contains the files of an interrupted copy.
    pub(super) fn was_taken_over(&self) -> bool {
        self.taken_over
    }

    /// Removes the files of the interrupted copy.
    pub(super) fn start_over(&mut self) -> Result<()> {
        self.check_name()?;
        self.place.remove_dead(&self.sources)?;
        self.fd = self.place.create_partial()?;
        self.taken_over = false;
        self.keep(false);
        Ok(())
    }

    /// Sets whether the partial directory stays if this run fails, so that a later one can
    /// continue.
    pub(super) fn keep(&self, kept: bool) {
        self.kept.store(kept, Ordering::SeqCst);
    }

    pub(super) fn is_kept(&self) -> bool {
        self.kept.load(Ordering::SeqCst)
    }

    /// The partial directory, to be made durable later.
    pub(super) fn contents(&self) -> io::Result<Contents> {
        Ok(Contents {
            path: self.partial.clone(),
            fd: self.fd.try_clone()?,
            parent: self.place.parent.try_clone()?,
        })
    }

    /// The directory to work in.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// The final path of the result.
    pub fn target(&self) -> &Path {
        &self.place.target
    }

    /// Loads the journal of the work from the current path of the directory.
    pub fn journal(&self) -> Result<Journal, JournalError> {
        // After an exchange, the partial name belongs to the earlier result.
        let folder = match self.done {
            true => &self.place.target,
            false => &self.partial,
        };
        Journal::load(&folder.join(journal::FILE_NAME))
    }

    /// Restricts every file to its owner, whichever program created it, and lists the files for the
    /// report.
    pub fn settle(&self) -> Result<Vec<OutputFile>> {
        self.check_name()?;
        let mut list = Vec::new();
        settle(&self.fd, Path::new(""), &mut list)
            .map_err(|e| Error::failed(format!("listing {}", self.partial.display())).because(e))?;
        list.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(list)
    }

    /// Checks that the name still leads to this directory. Files are written by name, and somebody
    /// with write access beside it can exchange it.
    fn check_name(&self) -> Result<()> {
        if self.place.is_at(&self.place.partial, &self.fd) {
            return Ok(());
        }
        Err(Error::failed(format!(
            "{} was replaced by another program during this run",
            self.partial.display()
        ))
        .hint("choose a directory with --output-dir in which nobody else writes"))
    }

    /// Notes for the report about an earlier result that is replaced.
    pub fn notes(&self) -> Result<Vec<String>> {
        if self.place.inode(&self.place.name).is_none() {
            return Ok(Vec::new());
        }
        let earlier = Earlier::of(&self.place.target)?;
        let unknown = earlier
            .unknown()
            .map_err(|e| Error::failed("reading the earlier result").because(e))?;
        let shown = |list: &[PathBuf]| {
            let names: Vec<_> = list.iter().map(|p| p.display().to_string()).collect();
            names.join(", ")
        };
        let mut notes = Vec::new();
        if !unknown.is_empty() {
            notes.push(format!(
                "kept in the output directory although hyper2kvm did not write it: {}",
                shown(&unknown)
            ));
        }
        if !earlier.elsewhere.is_empty() {
            notes.push(format!(
                "disks of the replaced result stay where they are: {}",
                shown(&earlier.elsewhere)
            ));
        }
        Ok(notes)
    }

    /// Renames the partial directory to its final name.
    pub fn complete(&mut self) -> Result<()> {
        let shown = self.place.target.display().to_string();
        let failed = |e: io::Error| Error::failed(format!("completing {shown}")).because(e);
        self.check_name()?;
        // A name that survives a loss of power must not lead to empty files.
        order::note("sync all of", &self.partial);
        sync_all(&self.fd).map_err(failed)?;
        for _ in 0..ROUNDS {
            let mut earlier = match self.look_again()? {
                Situation::Free => match self.rename(false) {
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists && self.existed => continue,
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                        return Err(self.appeared());
                    }
                    done => return done.map_err(failed),
                },
                Situation::Empty => match self.rename(true) {
                    // Another process has just created a file in it.
                    Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => continue,
                    done => return done.map_err(failed),
                },
                Situation::Result(earlier) => earlier,
            };
            return self.replace(&mut earlier);
        }
        Err(self.appeared())
    }

    fn appeared(&self) -> Error {
        Error::failed(format!(
            "{} appeared during the run and is not replaced",
            self.place.target.display()
        ))
        .hint("see what put it there; --output-dir chooses another directory")
    }

    /// Checks the target again, as at the start. Files that appeared in an empty directory in the
    /// meantime are kept, like all files not written by hyper2kvm.
    fn look_again(&self) -> Result<Situation> {
        let options = ReplaceOptions {
            force: self.force,
            sources: &self.sources,
            sync: self.sync,
            last: true,
        };
        if !self.existed {
            return Ok(Situation::Free);
        }
        let target = &self.place.target;
        let earlier = target.join(MARK).symlink_metadata().is_ok();
        match replace::look(&self.place.parent, target, &options) {
            Err(_) if !earlier && self.place.is_plain_directory() => {
                Ok(Situation::Result(Box::new(Earlier::of(target)?)))
            }
            found => found,
        }
    }

    /// Renames to a free name, or over an empty directory.
    fn rename(&mut self, over: bool) -> io::Result<()> {
        let place = &self.place;
        if over {
            place.keep_attributes(&self.fd)?;
        }
        failpoint::step("before", "rename of the output directory")?;
        order::note("rename", &place.target);
        match over {
            false => rename_new_at(
                &place.parent,
                Path::new(&place.partial),
                &place.parent,
                Path::new(&place.name),
            )?,
            true => renameat(&place.parent, &place.partial, &place.parent, &place.name)?,
        }
        self.done = true;
        place.renamed();
        Ok(())
    }

    fn replace(&mut self, earlier: &mut Earlier) -> Result<()> {
        let place = &self.place;
        let failed = |e: io::Error| {
            Error::failed(format!("completing {}", place.target.display())).because(e)
        };
        for path in earlier.refuse_collisions(&self.partial)? {
            tracing::info!("kept: {}", place.target.join(path).display());
        }
        place.keep_attributes(&self.fd).map_err(failed)?;
        let old = place
            .inode(&place.name)
            .ok_or_else(|| failed(Errno::NOENT.into()))?;
        let intent = Intent {
            schema: INTENT.to_owned(),
            new: fstat(&self.fd).map_err(|e| failed(e.into()))?.st_ino,
            old,
        };
        let lock = &self.lock;
        failpoint::step("before", "note of the replacement")
            .and_then(|()| lock.set_note(&serde_json::json!(intent).to_string()))
            .and_then(|()| failpoint::step("after", "note of the replacement"))
            .map_err(failed)?;
        if let Err(error) = place.exchange() {
            if place.inode(&place.name) == Some(old) {
                // Nothing has happened, or it was undone. Otherwise the next run undoes it.
                lock.set_note("").map_err(failed)?;
            }
            return Err(failed(error));
        }
        self.done = true;
        // The result is in place: leftovers of the old result may be in the way but are no failure.
        if let Err(error) = place.finish(earlier, old) {
            place.set_aside(old, &error);
        }
        if let Err(error) = lock.set_note("") {
            tracing::warn!("{error}");
        }
        Ok(())
    }
}

impl Drop for OutputFolder {
    fn drop(&mut self) {
        if !self.done && !self.is_kept() {
            self.discard();
        }
        // The lock is removed last.
    }
}

impl OutputFolder {
    fn discard(&self) {
        if !self.place.is_at(&self.place.partial, &self.fd) {
            if self.place.stat(&self.place.partial).is_none() {
                return;
            }
            let shown = self.partial.display();
            tracing::warn!("{shown} is not what this run created there, and is left alone");
            return;
        }
        match needs_undo(&self.partial) {
            Ok(None) => {}
            Ok(Some(journal)) => {
                tracing::warn!(
                    "the disk was changed; undo that with: hyper2kvm rollback --journal {}",
                    journal.path().display()
                );
                return;
            }
            Err(error) => {
                tracing::warn!("{} is kept: {error}", self.partial.display());
                for hint in &error.hints {
                    tracing::warn!("{hint}");
                }
                return;
            }
        }
        if let Err(error) = fs::remove_dir_all(&self.partial)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("removing {}: {error}", self.partial.display());
        }
    }
}

impl OutputPlace {
    /// The files of the source; listed only if the target contains something that could be one of
    /// them.
    fn sources(&self, preference: &FolderOptions) -> Vec<PathBuf> {
        let exists = |name: &OsStr| self.inode(name).is_some();
        match preference.sources {
            Some(list) if exists(&self.name) || exists(&self.partial) => list(),
            _ => Vec::new(),
        }
    }
}

/// The contents of a partial directory.
pub(super) struct Contents {
    path: PathBuf,
    fd: OwnedFd,
    parent: OwnedFd,
}

impl Contents {
    /// Makes the directory, everything in it and its name durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        order::note("sync all of", &self.path);
        sync_all(&self.fd)?;
        files::sync(&self.parent, files::folder_of(&self.path))
    }
}

/// Restricts files and directories to their owner and lists the files.
fn settle(folder: &OwnedFd, below: &Path, list: &mut Vec<OutputFile>) -> io::Result<()> {
    for (name, _) in entries(folder)? {
        let relative = below.join(&name);
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = openat(folder, &name, flags, Mode::empty())?;
        let stat = fstat(&fd)?;
        let (mode, is_dir) = (stat.st_mode, is_directory(&stat));
        let wanted = match is_dir || mode & 0o100 != 0 {
            true => 0o700,
            false => 0o600,
        };
        if mode & 0o7777 != wanted {
            fchmod(&fd, Mode::from_raw_mode(wanted))?;
        }
        if is_dir {
            settle(&fd, &relative, list)?;
        } else if let Some(file) = OutputFile::of(relative, &File::from(fd).metadata()?) {
            list.push(file);
        }
    }
    Ok(())
}

/// Files made durable at a time: a journaling file system syncs them in one step.
const SYNCED_AT_ONCE: usize = 8;
/// Files open at a time for syncing.
const OPEN_AT_ONCE: usize = 128;

/// Makes everything in a directory durable.
fn sync_all(folder: &OwnedFd) -> io::Result<()> {
    let _span = timeline::span("make the output durable");
    let mut files = vec![folder.try_clone()?];
    open_all(folder, &mut files)?;
    sync_these(files)
}

fn sync_these(files: Vec<OwnedFd>) -> io::Result<()> {
    let files = Mutex::new(files);
    let work = || {
        loop {
            let next = files.lock().unwrap_or_else(PoisonError::into_inner).pop();
            match next {
                Some(file) => fsync(file)?,
                None => return Ok(()),
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..SYNCED_AT_ONCE).map(|_| scope.spawn(work)).collect();
        let ended = threads.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        ended.fold(Ok(()), io::Result::and)
    })
}

/// Opens every file and directory below a directory.
fn open_all(folder: &OwnedFd, files: &mut Vec<OwnedFd>) -> io::Result<()> {
    for (name, stat) in entries(folder)? {
        let name = Path::new(&name);
        if is_directory(&stat) {
            let below = open_directory(folder, name)?;
            open_all(&below, files)?;
            files.push(below);
        } else if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::RDONLY | OFlags::CLOEXEC;
            files.push(openat(folder, name, flags, Mode::empty())?);
        }
        if files.len() >= OPEN_AT_ONCE {
            sync_these(std::mem::take(files))?;
        }
    }
    Ok(())
}

/// The path of a file that is only needed during the conversion.
pub(super) fn work_file(folder: &OutputFolder, name: &str) -> Result<PathBuf> {
    let work = folder.path().join(WORK);
    std::fs::create_dir_all(&work)
        .map_err(|e| Error::failed(format!("creating {}", work.display())).because(e))?;
    Ok(work.join(name))
}

pub(super) fn save_json(path: &Path, value: serde_json::Value) -> Result<()> {
    std::fs::write(path, format!("{value:#}\n"))
        .map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))
}

/// Removes the files that are only needed during the conversion. The record of the copy goes first:
/// it names the others.
pub(super) fn remove_work_files(folder: &Path) -> Result<()> {
    files::removed(fs::remove_file(folder.join(resume_file())))
        .and_then(|()| files::removed(fs::remove_file(folder.join(OVERLAY))))
        .and_then(|()| files::removed(fs::remove_dir_all(folder.join(WORK))))
        .map_err(|e| Error::failed("removing work files").because(e))
}

#[cfg(test)]
#[path = "output_more_tests.rs"]
mod more_tests;
#[cfg(test)]
#[path = "output_tests.rs"]
mod tests;
