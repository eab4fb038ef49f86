//! The directory in which a result is made: the names beside the target, its lock, and the
//! leftovers of a killed run.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Stat, Uid, XattrFlags};
use rustix::fs::{fchmod, fchown, fgetxattr, fremovexattr, fsetxattr, fstat};
use rustix::fs::{openat, statat};
use rustix::io::Errno;

use super::work::resume_file;
use crate::error::{Error, ErrorKind, Result};
use crate::files::{PASSAGE, create_parents, open_new_directory};
use crate::fix::commit;
use crate::fix::journal::{self, Journal, JournalError};
use crate::fix::trusted::{TrustError, TrustedFolder};
use crate::lock::{FileLock, LockError};

const ACLS: [&str; 2] = ["system.posix_acl_access", "system.posix_acl_default"];

/// The names of one target in its open parent directory.
#[derive(Debug)]
pub(super) struct OutputPlace {
    pub(super) parent: OwnedFd,
    pub(super) target: PathBuf,
    pub(super) name: OsString,
    pub(super) partial: OsString,
    pub(super) replaced: OsString,
}

/// The lock of one target; its file is removed with it.
pub struct TargetLock(Option<FileLock>);

impl TargetLock {
    pub(super) fn note(&self) -> io::Result<String> {
        self.0.as_ref().map_or(Ok(String::new()), FileLock::note)
    }

    pub(super) fn set_note(&self, text: &str) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |lock| lock.set_note(text))
    }
}

impl Drop for TargetLock {
    fn drop(&mut self) {
        // Notes in the file are for the next run.
        if self.note().is_ok_and(|note| note.is_empty())
            && let Some(lock) = self.0.take()
        {
            lock.remove();
        }
    }
}

impl OutputPlace {
    /// Opens the parent directory. `create` also makes the directories above the target.
    pub(super) fn open(target: &Path, create: bool) -> Result<Self> {
        let target = std::path::absolute(target)
            .map_err(|e| Error::usage("the output directory has no absolute path").because(e))?;
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(Error::usage(format!(
                "{} cannot be an output directory",
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

    /// Returns the directory the target lies in.
    pub(super) fn folder(&self) -> &Path {
        self.target.parent().unwrap_or(Path::new("/"))
    }

    pub(super) fn path(&self, name: &OsStr) -> PathBuf {
        self.target.with_file_name(name)
    }

    pub(super) fn lock(&self) -> Result<TargetLock> {
        match self.take_lock(true)? {
            Some(lock) => Ok(TargetLock(Some(lock))),
            None => Err(self.taken()),
        }
    }

    /// Takes the lock only if its file exists; leaves the file of a killed run.
    pub(super) fn lock_if_there(&self) -> Result<Option<FileLock>> {
        self.take_lock(false)
    }

    pub(super) fn taken(&self) -> Error {
        Error::failed(format!(
            "another conversion is writing {}",
            self.target.display()
        ))
        .hint("wait for it, or choose another directory with --output-dir")
    }

    pub(super) fn take_lock(&self, create: bool) -> Result<Option<FileLock>> {
        let mut name = OsString::from(".");
        name.push(&self.name);
        name.push(".lock");
        let shown = self.folder();
        match FileLock::take_patiently(&self.parent, &name, shown, create) {
            Ok(lock) => Ok(lock),
            Err(LockError::Held { .. }) => Err(self.taken()),
            Err(LockError::Io { source, .. }) => Err(cannot_write(shown, source)),
            Err(LockError::Untrusted(e)) => Err(untrusted(e)),
            Err(unsupported @ LockError::Unsupported { .. }) => {
                Err(Error::failed(format!("{} cannot be used", shown.display()))
                    .because(unsupported)
                    .hint("two runs could not be kept apart there: choose a directory on another file system with --output-dir"))
            }
        }
    }

    pub(super) fn stat(&self, name: &OsStr) -> Option<Stat> {
        statat(&self.parent, name, AtFlags::SYMLINK_NOFOLLOW).ok()
    }

    pub(super) fn inode(&self, name: &OsStr) -> Option<u64> {
        self.stat(name).map(|s| s.st_ino)
    }

    pub(super) fn directory(&self, name: &OsStr) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        openat(&self.parent, name, flags, Mode::empty())
    }

    /// Whether a name still leads to this open directory. Somebody with write access above it can
    /// exchange it.
    pub(super) fn is_at(&self, name: &OsStr, fd: &OwnedFd) -> bool {
        match (self.stat(name), fstat(fd)) {
            (Some(there), Ok(held)) => (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino),
            _ => false,
        }
    }

    pub(super) fn is_plain_directory(&self) -> bool {
        self.directory(&self.name).is_ok()
    }

    /// Refuses leftovers of a killed run that belong to somebody else, are needed, or are the
    /// source of this run.
    pub(super) fn check_dead(&self, sources: &[PathBuf]) -> Result<()> {
        let partial = self.path(&self.partial);
        if let Some(source) = inside(&partial, sources) {
            return Err(Error::failed(format!(
                "{} lies in what a killed run left, which this run would remove",
                source.display()
            ))
            .hint("move it to a directory of its own first"));
        }
        if let Some(journal) = needs_undo(&partial)? {
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

    pub(super) fn remove_dead(&self, sources: &[PathBuf]) -> Result<()> {
        if self.stat(&self.partial).is_none() {
            return Ok(());
        }
        self.check_dead(sources)?;
        let partial = self.path(&self.partial);
        tracing::info!("removing {}, left by a killed run", partial.display());
        fs::remove_dir_all(&partial).map_err(|e| cannot_write(&partial, e))
    }

    /// The files of an interrupted copy, if only the caller or root can have written them.
    pub(super) fn left_copy(&self, sources: &[PathBuf]) -> Result<Option<OwnedFd>> {
        if self.stat(&self.partial).is_none() {
            return Ok(None);
        }
        self.check_dead(sources)?;
        let fd = match self.directory(&self.partial) {
            Ok(fd) => fd,
            Err(_) => return Ok(None),
        };
        let there = statat(&fd, resume_file(), AtFlags::SYMLINK_NOFOLLOW).is_ok();
        Ok(there.then_some(fd))
    }

    pub(super) fn create_partial(&self) -> Result<OwnedFd> {
        let shown = self.path(&self.partial);
        let failed = |e: Errno| cannot_write(&shown, e.into());
        let fd = open_new_directory(&self.parent, Path::new(&self.partial))
            .map_err(|e| cannot_write(&shown, e))?;
        // Every file in it would inherit them from the parent directory.
        for acl in ACLS {
            let _ = fremovexattr(&fd, acl);
        }
        fchmod(&fd, Mode::from_raw_mode(PASSAGE)).map_err(failed)?;
        Ok(fd)
    }

    /// Checks early that the new directory can get the owner and mode of the existing one.
    pub(super) fn check_attributes(&self, fd: &OwnedFd, undo: bool) -> Result<()> {
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
            .hint("run this as root or as its owner, or choose another directory with --output-dir")
        })
    }

    /// Copies owner, mode and access control lists of the existing directory.
    pub(super) fn keep_attributes(&self, fd: &OwnedFd) -> io::Result<()> {
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
}

/// The journal in a partial directory, if it is needed to undo changes to a disk. Fails if somebody
/// else can have written it, or if it is unreadable and saved blocks lie beside it.
pub(super) fn needs_undo(partial: &Path) -> Result<Option<Journal>> {
    let _folder = match TrustedFolder::open(partial) {
        Err(e) if e.is_missing() => return Ok(None),
        folder => folder.map_err(untrusted)?,
    };
    match Journal::load(&partial.join(journal::FILE_NAME)) {
        Ok(journal) => Ok(journal.needs_undo().then_some(journal)),
        Err(e) if e.is_missing() => Ok(None),
        Err(JournalError::Untrusted(e)) if !matches!(e, TrustError::Io { .. }) => Err(untrusted(e)),
        Err(error) if commit::holds_saved_blocks(partial) => Err(unreadable(partial, error)),
        Err(_) => Ok(None),
    }
}

/// The error for an unreadable journal. The disk may be half written, and the only copy of its old
/// blocks is here.
fn unreadable(partial: &Path, error: JournalError) -> Error {
    let folder = crate::text::shell_word(&partial.display().to_string());
    Error::new(
        ErrorKind::NotRolledBack,
        format!(
            "{} contains saved blocks of a disk ({}), and its journal cannot be read",
            partial.display(),
            commit::BEFORE_FILE
        ),
    )
    .because(error)
    .hint(format!(
        "keep a copy of it, make its {} readable and run: hyper2kvm rollback --journal {folder}/{}",
        journal::FILE_NAME,
        journal::FILE_NAME
    ))
    .hint(format!(
        "if no disk has to be restored from it: rm -r {folder}"
    ))
}

/// The first of `files` that lies in `folder`, by its name or by the target of a link.
pub(super) fn inside<'f>(folder: &Path, files: &'f [PathBuf]) -> Option<&'f PathBuf> {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let (named, is) = (folder, real(folder));
    files.iter().find(|file| {
        let absolute = std::path::absolute(file).unwrap_or_else(|_| file.to_path_buf());
        // The directory that contains a link counts as well as the link's target.
        let beside = absolute
            .parent()
            .map(|p| real(p).join(absolute.file_name().unwrap_or_default()));
        absolute.starts_with(named)
            || real(&absolute).starts_with(&is)
            || beside.is_some_and(|path| path.starts_with(&is))
    })
}

pub(super) fn untrusted(error: TrustError) -> Error {
    let remedy = error.remedy();
    let error = Error::failed("somebody else may have written what is in the place of the output")
        .because(error);
    let error = remedy.into_iter().fold(error, Error::hint);
    error.hint("or choose a directory with --output-dir in which nobody else writes")
}

fn set_owner(fd: &OwnedFd, like: &Stat) -> rustix::io::Result<()> {
    fchown(
        fd,
        Some(Uid::from_raw(like.st_uid)),
        Some(Gid::from_raw(like.st_gid)),
    )
}

pub(super) fn cannot_write(path: &Path, error: io::Error) -> Error {
    let shown = path.display();
    if error.kind() == io::ErrorKind::PermissionDenied {
        return Error::missing_tool(format!("no permission to write {shown}"))
            .because(error)
            .hint("choose a directory you may write with --output-dir");
    }
    Error::failed(format!("cannot write {shown}"))
        .because(error)
        .hint("choose another directory with --output-dir")
}
