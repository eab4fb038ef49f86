//! The output folder: complete, or not there.
//!
//! Work happens in `.NAME.partial` beside the final place and is renamed at the end. Beside it lies
//! `.NAME.lock`, locked from the first look to after the rename, so there is one run per target. What
//! stands in the way is looked at twice, at the start and right before the rename ([`super::replace`]).
//!
//! To replace an earlier result the two directories are exchanged in one step, then what the user had put
//! into the old one is moved over and the rest removed. That takes several steps, and on a file system
//! without the exchange (NFS, CIFS) the old result is renamed to `.NAME.replaced` first. So the intent is
//! noted in the lock file before, and a run that finds one finishes or undoes what was begun
//! ([`repair`]).

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, Stat, XattrFlags};
use rustix::fs::{Gid, Uid, openat, renameat, renameat_with, statat};
use rustix::fs::{fchmod, fchown, fgetxattr, fremovexattr, fsetxattr, fstat, fsync, mkdirat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::files::{PASSAGE, create_parents, rename_new, rename_new_at};
use crate::fix::journal::{self, Journal, JournalError, sync_folder};
use crate::fix::trusted::{TrustError, TrustedFolder};
use crate::lock::{FileLock, LockError};
use crate::report::OutputFile;

use super::replace::{self, Earlier, MARK, Situation, Terms, inside};

const ACLS: [&str; 2] = ["system.posix_acl_access", "system.posix_acl_default"];
/// A target may be changed by others that often while it is being replaced.
const ROUNDS: usize = 8;

/// What may stand in the way, and what the folder will hold.
#[derive(Default)]
pub struct Preference<'a> {
    /// Replace an earlier result.
    pub force: bool,
    /// It will hold what undoes a fix in place.
    pub undo: bool,
    /// Lists the files of the source; asked only when something is to be removed.
    pub sources: Option<&'a dyn Fn() -> Vec<PathBuf>>,
}

/// The names of one target in its directory, which stays open.
#[derive(Debug)]
struct Place {
    parent: OwnedFd,
    target: PathBuf,
    name: OsString,
    partial: OsString,
    replaced: OsString,
}

/// What a run was about to do when it was killed.
#[derive(Debug, Serialize, Deserialize)]
struct Intent {
    schema: String,
    /// Inode numbers of the two directories.
    new: u64,
    old: u64,
}

const INTENT: &str = "hyper2kvm/replacing/1";

/// The partial folder; removed when dropped before [`OutputFolder::complete`].
pub struct OutputFolder {
    place: Place,
    partial: PathBuf,
    force: bool,
    sources: Vec<PathBuf>,
    /// There was a directory at the start.
    existed: bool,
    lock: TargetLock,
    done: bool,
}

impl OutputFolder {
    /// Whether [`OutputFolder::create`] would take this folder, as far as can be known without writing;
    /// its absolute path.
    pub fn check(target: &Path, preference: &Preference) -> Result<PathBuf> {
        let absolute = std::path::absolute(target)
            .map_err(|e| Error::usage("the output folder has no absolute path").because(e))?;
        if absolute.parent().is_some_and(|parent| !parent.exists()) {
            return Ok(absolute);
        }
        let place = Place::open(&absolute, false)?;
        // Given up at once: a conversion that starts now must not fail for it.
        drop(place.lock_if_there()?);
        let sources = place.sources(preference);
        let terms = Terms {
            force: preference.force,
            sources: &sources,
            last: false,
        };
        replace::look(&place.parent, &place.target, &terms)?;
        place.check_dead(&sources)?;
        Ok(absolute)
    }

    /// Checks that `target` may be made and starts the partial folder.
    pub fn create(target: &Path, preference: &Preference) -> Result<Self> {
        let place = Place::open(target, true)?;
        let lock = place.lock()?;
        repair_locked(&place, &lock)?;
        let sources = place.sources(preference);
        let terms = Terms {
            force: preference.force,
            sources: &sources,
            last: false,
        };
        let situation = replace::look(&place.parent, &place.target, &terms)?;
        place.remove_dead(&sources)?;
        let fd = place.create_partial()?;
        let folder = Self {
            partial: place.path(&place.partial),
            force: preference.force,
            sources,
            existed: !matches!(situation, Situation::Free),
            lock,
            done: false,
            place,
        };
        if folder.existed {
            folder.place.check_attributes(&fd, preference.undo)?;
        }
        Ok(folder)
    }

    /// Where the work happens.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Where the result will be.
    pub fn target(&self) -> &Path {
        &self.place.target
    }

    /// The journal of the work, wherever the folder is by now.
    pub fn journal(&self) -> Result<Journal, JournalError> {
        Journal::load(&self.partial.join(journal::FILE_NAME))
            .or_else(|_| Journal::load(&self.place.target.join(journal::FILE_NAME)))
    }

    /// Closes everything to others, whatever created it, and lists it for the report.
    pub fn settle(&self) -> Result<Vec<OutputFile>> {
        let mut list = Vec::new();
        settle(&self.partial, Path::new(""), &mut list)
            .map_err(|e| Error::failed(format!("listing {}", self.partial.display())).because(e))?;
        list.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(list)
    }

    /// What the report has to say about an earlier result that is to be replaced.
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
                "kept in the output folder although hyper2kvm did not write it: {}",
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

    /// Renames the partial folder to its final name.
    pub fn complete(&mut self) -> Result<()> {
        let shown = self.place.target.display().to_string();
        let failed = |e: io::Error| Error::failed(format!("completing {shown}")).because(e);
        let fd = self
            .place
            .directory(&self.place.partial)
            .map_err(|e| failed(e.into()))?;
        fsync(&fd).map_err(|e| failed(e.into()))?;
        for _ in 0..ROUNDS {
            let mut earlier = match self.look_again()? {
                Situation::Free => match self.rename(&fd, false) {
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists && self.existed => continue,
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                        return Err(self.appeared());
                    }
                    done => return done.map_err(failed),
                },
                Situation::Empty => match self.rename(&fd, true) {
                    // Something was put into it just now.
                    Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => continue,
                    done => return done.map_err(failed),
                },
                Situation::Result(earlier) => earlier,
            };
            return self.replace(&fd, &mut earlier);
        }
        Err(self.appeared())
    }

    fn appeared(&self) -> Error {
        Error::failed(format!(
            "{} appeared during the run and is not replaced",
            self.place.target.display()
        ))
        .hint("see what put it there; --output-dir chooses another folder")
    }

    /// The same look as at the start. What was put into an empty directory meanwhile is kept like
    /// anything else that hyper2kvm did not write.
    fn look_again(&self) -> Result<Situation> {
        let terms = Terms {
            force: self.force,
            sources: &self.sources,
            last: true,
        };
        if !self.existed {
            return Ok(Situation::Free);
        }
        let target = &self.place.target;
        let earlier = target.join(MARK).symlink_metadata().is_ok();
        match replace::look(&self.place.parent, target, &terms) {
            Err(_) if !earlier && self.place.is_plain_directory() => {
                Ok(Situation::Result(Box::new(Earlier::of(target)?)))
            }
            found => found,
        }
    }

    /// To a free name, or over an empty directory.
    fn rename(&mut self, fd: &OwnedFd, over: bool) -> io::Result<()> {
        let place = &self.place;
        if over {
            place.keep_attributes(fd)?;
        }
        failpoint::step("before", "rename of the output folder")?;
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
        failpoint::step("after", "rename of the output folder")?;
        Ok(fsync(&place.parent)?)
    }

    fn replace(&mut self, fd: &OwnedFd, earlier: &mut Earlier) -> Result<()> {
        let place = &self.place;
        let failed = |e: io::Error| {
            Error::failed(format!("completing {}", place.target.display())).because(e)
        };
        for path in earlier.refuse_collisions(&self.partial)? {
            tracing::info!("kept: {}", place.target.join(path).display());
        }
        place.keep_attributes(fd).map_err(failed)?;
        // The old result goes: the new one must survive a loss of power.
        sync_all(&self.partial).map_err(failed)?;
        let old = place
            .inode(&place.name)
            .ok_or_else(|| failed(Errno::NOENT.into()))?;
        let intent = Intent {
            schema: INTENT.to_owned(),
            new: fstat(fd).map_err(|e| failed(e.into()))?.st_ino,
            old,
        };
        let lock = &self.lock;
        failpoint::step("before", "note of the replacement")
            .and_then(|()| lock.set_note(&serde_json::json!(intent).to_string()))
            .and_then(|()| failpoint::step("after", "note of the replacement"))
            .map_err(failed)?;
        let swapped = place.exchange();
        if let Err(error) = swapped {
            if place.inode(&place.name) != Some(intent.new) {
                // Nothing has happened, or it was undone.
                lock.set_note("").map_err(failed)?;
                return Err(failed(error));
            }
            self.done = true;
            return Err(failed(error));
        }
        self.done = true;
        // The result is in place: what it replaced may be in the way, but is no failure.
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
        if !self.done {
            self.discard();
        }
        // The lock goes last.
    }
}

/// The lock of one target, whose file goes with it.
pub struct TargetLock(Option<FileLock>);

impl TargetLock {
    fn note(&self) -> io::Result<String> {
        self.0.as_ref().map_or(Ok(String::new()), FileLock::note)
    }

    fn set_note(&self, text: &str) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |lock| lock.set_note(text))
    }
}

impl Drop for TargetLock {
    fn drop(&mut self) {
        // What is noted is for the next run.
        if self.note().is_ok_and(|note| note.is_empty())
            && let Some(lock) = self.0.take()
        {
            lock.remove();
        }
    }
}

impl OutputFolder {
    fn discard(&self) {
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

impl Place {
    /// `create`: the directories above the target too.
    fn open(target: &Path, create: bool) -> Result<Self> {
        let target = std::path::absolute(target)
            .map_err(|e| Error::usage("the output folder has no absolute path").because(e))?;
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(Error::usage(format!(
                "{} cannot be an output folder",
                target.display()
            )));
        };
        if create {
            create_parents(&target).map_err(|e| cannot_write(parent, e))?;
        }
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = openat(CWD, parent, flags, Mode::empty())
            .map_err(|e| cannot_write(parent, e.into()))?;
        let beside = |end: &str| {
            let mut hidden = OsString::from(".");
            hidden.push(name);
            hidden.push(end);
            hidden
        };
        Ok(Self {
            parent: fd,
            name: name.to_owned(),
            partial: beside(".partial"),
            replaced: beside(".replaced"),
            target,
        })
    }

    fn path(&self, name: &OsStr) -> PathBuf {
        self.target.with_file_name(name)
    }

    fn lock(&self) -> Result<TargetLock> {
        match self.take_lock(true)? {
            Some(lock) => Ok(TargetLock(Some(lock))),
            None => Err(self.taken()),
        }
    }

    /// Creates no file, and leaves one of a killed run.
    fn lock_if_there(&self) -> Result<Option<FileLock>> {
        self.take_lock(false)
    }

    fn taken(&self) -> Error {
        Error::failed(format!(
            "another conversion is writing {}",
            self.target.display()
        ))
        .hint("wait for it, or choose another folder with --output-dir")
    }

    fn take_lock(&self, create: bool) -> Result<Option<FileLock>> {
        let mut name = OsString::from(".");
        name.push(&self.name);
        name.push(".lock");
        let shown = self.target.parent().unwrap_or(Path::new("/"));
        match FileLock::take(&self.parent, &name, shown, create) {
            Ok(lock) => Ok(lock),
            Err(LockError::Held { .. }) => Err(self.taken()),
            Err(LockError::Io { source, .. }) => Err(cannot_write(shown, source)),
            Err(LockError::Untrusted(e)) => Err(untrusted(e)),
            Err(unsupported @ LockError::Unsupported { .. }) => {
                Err(Error::failed(format!("{} cannot be used", shown.display()))
                    .because(unsupported)
                    .hint("two runs could not be kept apart there: choose a folder on another file system with --output-dir"))
            }
        }
    }

    fn stat(&self, name: &OsStr) -> Option<Stat> {
        statat(&self.parent, name, AtFlags::SYMLINK_NOFOLLOW).ok()
    }

    fn inode(&self, name: &OsStr) -> Option<u64> {
        self.stat(name).map(|s| s.st_ino)
    }

    fn directory(&self, name: &OsStr) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        openat(&self.parent, name, flags, Mode::empty())
    }

    fn is_plain_directory(&self) -> bool {
        self.directory(&self.name).is_ok()
    }

    /// Files of the source, where something is there that could be one.
    fn sources(&self, preference: &Preference) -> Vec<PathBuf> {
        let exists = |name: &OsStr| self.inode(name).is_some();
        match preference.sources {
            Some(list) if exists(&self.name) || exists(&self.partial) => list(),
            _ => Vec::new(),
        }
    }

    /// Refuses what a killed run left where it is somebody else's, needed, or the source of this run.
    fn check_dead(&self, sources: &[PathBuf]) -> Result<()> {
        let partial = self.path(&self.partial);
        if let Some(source) = inside(&partial, sources) {
            return Err(Error::failed(format!(
                "{} lies in what a killed run left, which this run would remove",
                source.display()
            ))
            .hint("move it to a folder of its own first"));
        }
        if let Some(journal) = needs_undo(&partial).map_err(untrusted)? {
            return Err(Error::new(
                ErrorKind::NotRolledBack,
                "an earlier fix in place was interrupted while it wrote the disk",
            )
            .hint(format!(
                "undo it first: hyper2kvm rollback --journal {}",
                crate::text::shell_word(&journal.path().display().to_string())
            )));
        }
        Ok(())
    }

    fn remove_dead(&self, sources: &[PathBuf]) -> Result<()> {
        if self.stat(&self.partial).is_none() {
            return Ok(());
        }
        self.check_dead(sources)?;
        let partial = self.path(&self.partial);
        tracing::info!("removing {}, left by a killed run", partial.display());
        fs::remove_dir_all(&partial).map_err(|e| cannot_write(&partial, e))
    }

    fn create_partial(&self) -> Result<OwnedFd> {
        let shown = self.path(&self.partial);
        let failed = |e: Errno| cannot_write(&shown, e.into());
        mkdirat(&self.parent, &self.partial, Mode::RWXU).map_err(failed)?;
        let fd = self.directory(&self.partial).map_err(failed)?;
        // What the directory above hands down would be on every file in it.
        for acl in ACLS {
            let _ = fremovexattr(&fd, acl);
        }
        fchmod(&fd, Mode::from_raw_mode(PASSAGE)).map_err(failed)?;
        Ok(fd)
    }

    /// Whether the new directory can get owner and mode of the one that is there: known now, not at the
    /// end.
    fn check_attributes(&self, fd: &OwnedFd, undo: bool) -> Result<()> {
        let Some(was) = self.stat(&self.name) else {
            return Ok(());
        };
        let shown = self.target.display();
        if undo {
            TrustedFolder::open(&self.target).map_err(untrusted)?;
        }
        let own = fstat(fd).map_err(|e| cannot_write(&self.target, e.into()))?;
        if (was.st_uid, was.st_gid) == (own.st_uid, own.st_gid) {
            return Ok(());
        }
        let given = set_owner(fd, &was).and_then(|()| set_owner(fd, &own));
        given.map_err(|e| {
            Error::missing_tool(format!(
                "{shown} belongs to user {} and group {}, which this user cannot give the result",
                was.st_uid, was.st_gid
            ))
            .because(io::Error::from(e))
            .hint("run this as root or as its owner, or choose another folder with --output-dir")
        })
    }

    /// Owner, mode and access control lists of the directory that is there.
    fn keep_attributes(&self, fd: &OwnedFd) -> io::Result<()> {
        let old = match self.directory(&self.name) {
            Ok(old) => old,
            Err(Errno::NOENT) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let was = fstat(&old)?;
        let own = fstat(fd)?;
        if (was.st_uid, was.st_gid) != (own.st_uid, own.st_gid) {
            set_owner(fd, &was)?;
        }
        fchmod(fd, Mode::from_raw_mode(was.st_mode & 0o7777))?;
        for acl in ACLS {
            let mut bytes = vec![0u8; 64 << 10];
            if let Ok(len) = fgetxattr(&old, acl, &mut bytes) {
                fsetxattr(fd, acl, &bytes[..len], XattrFlags::empty())?;
            }
        }
        Ok(())
    }

    /// Puts the new directory under the name of the old one, in one step where the file system can.
    fn exchange(&self) -> io::Result<()> {
        let (parent, partial, name) = (&self.parent, &*self.partial, &*self.name);
        failpoint::step("before", "rename of the output folder")?;
        let exchanged = match failpoint::hit("exchange") {
            Ok(()) => renameat_with(parent, partial, parent, name, RenameFlags::EXCHANGE),
            Err(_) => Err(Errno::INVAL),
        };
        match exchanged {
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.exchange_in_steps()?,
            done => done?,
        }
        fsync(parent)?;
        failpoint::step("after", "rename of the output folder")
    }

    fn exchange_in_steps(&self) -> io::Result<()> {
        let parent = &self.parent;
        let rename = |from: &OsStr, to: &OsStr| {
            rename_new_at(parent, Path::new(from), parent, Path::new(to))
        };
        rename(&self.name, &self.replaced)?;
        fsync(parent)?;
        failpoint::step("between", "renames of the output folder")?;
        if let Err(error) = rename(&self.partial, &self.name) {
            // Put back what was there; the first error is the one to report.
            let _ = rename(&self.replaced, &self.name);
            return Err(error);
        }
        Ok(())
    }

    /// Where the old result is after the exchange.
    fn old(&self, inode: u64) -> Option<PathBuf> {
        let mut names = [&self.partial, &self.replaced].into_iter();
        let name = names.find(|name| self.inode(name) == Some(inode))?;
        Some(self.path(name))
    }

    /// Moves over what is the user's, and removes the rest of the old result.
    fn finish(&self, earlier: &mut Earlier, old: u64) -> io::Result<()> {
        let Some(old) = self.old(old) else {
            return Ok(());
        };
        earlier.clear(&old, &self.target)?;
        fsync(&self.parent)?;
        Ok(())
    }

    /// What could not be moved or removed is left under a name that is seen and no run removes.
    fn set_aside(&self, old: u64, error: &io::Error) {
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

/// Finishes or undoes a replacement that an earlier run was killed in, so that the result is under its
/// name again. Does nothing while another run is at work there.
pub fn repair(target: &Path) -> Result<()> {
    let Ok(place) = Place::open(target, false) else {
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

/// The lock of the conversion whose partial folder this is; `None` for any other folder.
pub fn lock_of_partial(folder: &Path) -> Result<Option<TargetLock>> {
    let name = folder.file_name().and_then(OsStr::to_str);
    let name = name.and_then(|n| n.strip_prefix('.')?.strip_suffix(".partial"));
    match name {
        Some(name) => {
            let place = Place::open(&folder.with_file_name(name), false)?;
            place.lock().map(Some)
        }
        None => Ok(None),
    }
}

fn repair_locked(place: &Place, lock: &TargetLock) -> Result<()> {
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
            .and_then(|()| Ok(fsync(parent)?))
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
    // Of a version that noted nothing.
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

/// The journal in a partial folder that is needed to undo what was done to a disk. An error: somebody
/// else can have written it.
fn needs_undo(partial: &Path) -> Result<Option<Journal>, TrustError> {
    let _folder = match TrustedFolder::open(partial) {
        Err(e) if e.is_missing() => return Ok(None),
        folder => folder?,
    };
    match Journal::load(&partial.join(journal::FILE_NAME)) {
        Ok(journal) => Ok(journal.needs_undo().then_some(journal)),
        Err(JournalError::Untrusted(e)) if !e.is_missing() => Err(e),
        Err(_) => Ok(None),
    }
}

fn untrusted(error: TrustError) -> Error {
    let remedy = error.remedy();
    let error = Error::failed("somebody else may have written what is in the place of the output")
        .because(error);
    let error = remedy.into_iter().fold(error, Error::hint);
    error.hint("or choose a folder with --output-dir in which nobody else writes")
}

fn set_owner(fd: &OwnedFd, like: &Stat) -> rustix::io::Result<()> {
    fchown(
        fd,
        Some(Uid::from_raw(like.st_uid)),
        Some(Gid::from_raw(like.st_gid)),
    )
}

/// Files for their owner alone, directories too; lists the files.
fn settle(top: &Path, below: &Path, list: &mut Vec<OutputFile>) -> io::Result<()> {
    for entry in fs::read_dir(top.join(below))? {
        let entry = entry?;
        let relative = below.join(entry.file_name());
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = openat(CWD, entry.path(), flags, Mode::empty())?;
        let mode = fstat(&fd)?.st_mode;
        let is_dir = entry.file_type()?.is_dir();
        let wanted = match is_dir || mode & 0o100 != 0 {
            true => 0o700,
            false => 0o600,
        };
        if mode & 0o7777 != wanted {
            fchmod(&fd, Mode::from_raw_mode(wanted))?;
        }
        if is_dir {
            settle(top, &relative, list)?;
        } else if let Some(file) = OutputFile::of(relative, &File::from(fd).metadata()?) {
            list.push(file);
        }
    }
    Ok(())
}

/// Makes everything in a directory durable.
fn sync_all(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => sync_all(&entry.path())?,
            false => File::open(entry.path())?.sync_all()?,
        }
    }
    sync_folder(folder)
}

fn cannot_write(path: &Path, error: io::Error) -> Error {
    let shown = path.display();
    if error.kind() == io::ErrorKind::PermissionDenied {
        return Error::missing_tool(format!("no permission to write {shown}"))
            .because(error)
            .hint("choose a folder you may write with --output-dir");
    }
    Error::failed(format!("cannot write {shown}"))
        .because(error)
        .hint("choose another folder with --output-dir")
}

/// A name fit for files and libvirt: letters, digits, `.`, `_`, `-`; never empty or hidden.
pub fn safe_name(name: &str) -> String {
    let mapped: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') {
                c
            } else {
                '-'
            }
        })
        .take(64)
        .collect();
    let trimmed = mapped.trim_matches(['-', '.']);
    if !trimmed.is_empty() {
        trimmed.to_string()
    } else if name.is_ascii() {
        "vm".to_string()
    } else {
        // Two names in another script are two VMs.
        use sha2::Digest as _;
        let digest = sha2::Sha256::digest(name.as_bytes());
        let hex: String = digest.iter().take(4).map(|b| format!("{b:02x}")).collect();
        format!("vm-{hex}")
    }
}

/// The name itself, where nothing of it is in the safe one.
pub fn title(name: &str) -> Option<String> {
    let lost = !name.is_ascii() && !name.contains(|c: char| c.is_ascii_alphanumeric() || c == '_');
    lost.then(|| name.to_string())
}

#[cfg(test)]
#[path = "output_tests.rs"]
mod tests;
