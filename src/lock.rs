//! Locks between runs: a locked file, not the existence of one.
//!
//! The lock ends with the process that has it, even on SIGKILL. Only the holder may remove its
//! file, and a process that gets a lock checks that the file still has its name. Otherwise a run
//! that waited on a removed file and a run that created a new one would both hold "the" lock.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, FlockOperation, Mode, OFlags, fcntl_lock, flock, fstat, fsync, openat, statat,
    unlinkat,
};
use rustix::io::Errno;

use crate::error::Error;
use crate::failpoint;
use crate::fix::trusted::{self, TrustError};

/// The most attempts; in each, another run has removed the file in between.
const ROUNDS: usize = 1000;
/// The time for a program to be executed. If a run was starting it when it was killed, it has the
/// lock's descriptor until then.
const PATIENCE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(20);
/// The size limit of a lock file's note, which has a few lines.
const MAX_NOTE: u64 = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("{} is locked by another run", path.display())]
    Held { path: PathBuf },
    #[error(transparent)]
    Untrusted(#[from] TrustError),
    #[error("the file system of {} has no file locks", path.display())]
    Unsupported {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("locking {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A lock that is held until it is dropped.
#[derive(Debug)]
pub struct FileLock {
    file: File,
    folder: OwnedFd,
    name: OsString,
    path: PathBuf,
}

impl FileLock {
    /// Takes the lock `name` in an open directory, or fails immediately. `shown` is the directory's
    /// path. `create` makes a missing file; without it, `None` means that there is none.
    pub fn take(
        folder: impl AsFd,
        name: &OsStr,
        shown: &Path,
        create: bool,
    ) -> Result<Option<Self>, LockError> {
        let path = shown.join(name);
        let failed = |e: Errno| LockError::Io {
            path: path.clone(),
            source: e.into(),
        };
        let mut flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        if create {
            flags |= OFlags::CREATE;
        }
        for _ in 0..ROUNDS {
            let file = match openat(&folder, name, flags, Mode::RUSR | Mode::WUSR) {
                Ok(fd) => File::from(fd),
                Err(Errno::NOENT) if !create => return Ok(None),
                Err(e) => return Err(failed(e)),
            };
            trusted::check_file(&file, &path)?;
            if !lock(&file, &path)? {
                return Err(LockError::Held { path });
            }
            let held = fstat(&file).map_err(failed)?;
            match statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(there) if (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino) => {
                    let folder = folder.as_fd().try_clone_to_owned();
                    return Ok(Some(Self {
                        file,
                        folder: folder.map_err(|source| LockError::Io {
                            path: path.clone(),
                            source,
                        })?,
                        name: name.to_owned(),
                        path,
                    }));
                }
                // Removed by the run that held it.
                Ok(_) | Err(Errno::NOENT) => {}
                Err(e) => return Err(failed(e)),
            }
        }
        Err(LockError::Held { path })
    }

    /// Takes the lock with a short wait.
    pub fn take_patiently(
        folder: impl AsFd,
        name: &OsStr,
        shown: &Path,
        create: bool,
    ) -> Result<Option<Self>, LockError> {
        let begin = Instant::now();
        loop {
            match Self::take(&folder, name, shown, create) {
                Err(LockError::Held { .. }) if begin.elapsed() < PATIENCE => thread::sleep(LOOK),
                done => return done,
            }
        }
    }

    /// Takes the lock `name` in the directory, creating its file. `busy` describes what another
    /// holder does.
    pub fn of_directory(
        folder: &Path,
        name: &str,
        busy: impl FnOnce() -> Error,
    ) -> Result<Self, Error> {
        let failed =
            |e: anyhow::Error| Error::failed(format!("locking {}", folder.display())).because(e);
        let open = File::open(folder).map_err(|e| failed(e.into()))?;
        match Self::take_patiently(&open, name.as_ref(), folder, true) {
            Ok(Some(lock)) => Ok(lock),
            Ok(None) | Err(LockError::Held { .. }) => Err(busy()),
            Err(LockError::Untrusted(e)) => Err(e.into()),
            Err(other) => Err(failed(other.into())),
        }
    }

    /// The note in the file, from this run or an earlier one.
    pub fn note(&self) -> io::Result<String> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(0))?;
        let mut text = String::new();
        file.take(MAX_NOTE).read_to_string(&mut text)?;
        Ok(text)
    }

    /// Writes a note for the next run; durable when this returns.
    pub fn set_note(&self, text: &str) -> io::Result<()> {
        let mut file = &self.file;
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        Ok(fsync(&self.folder)?)
    }

    /// Removes the file and releases the lock.
    pub fn remove(self) {
        if let Err(error) = unlinkat(&self.folder, &self.name, AtFlags::empty()) {
            tracing::debug!("removing {}: {error}", self.path.display());
        }
    }
}

/// Locks the file: with `flock`, otherwise with a record lock, which some network file systems have
/// instead. `false` if another process has it.
fn lock(file: &File, path: &Path) -> Result<bool, LockError> {
    let flocked = match failpoint::hit("flock") {
        Ok(()) => flock(file, FlockOperation::NonBlockingLockExclusive),
        Err(_) => Err(Errno::NOSYS),
    };
    match flocked {
        Ok(()) => return Ok(true),
        Err(Errno::WOULDBLOCK) => return Ok(false),
        Err(Errno::NOSYS | Errno::OPNOTSUPP | Errno::NOLCK | Errno::INVAL) => {}
        Err(e) => {
            return Err(LockError::Io {
                path: path.to_path_buf(),
                source: e.into(),
            });
        }
    }
    let recorded = match failpoint::hit("record-lock") {
        Ok(()) => fcntl_lock(file, FlockOperation::NonBlockingLockExclusive),
        Err(_) => Err(Errno::NOLCK),
    };
    match recorded {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK | Errno::ACCESS) => Ok(false),
        Err(e) => Err(LockError::Unsupported {
            path: path.to_path_buf(),
            source: e.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn take(dir: &Path) -> Result<Option<FileLock>, LockError> {
        let folder = File::open(dir).unwrap();
        FileLock::take(&folder, OsStr::new(".l"), dir, true)
    }

    #[test]
    fn one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = take(dir.path()).unwrap().unwrap();
        first.set_note("half way").unwrap();
        assert!(matches!(take(dir.path()), Err(LockError::Held { .. })));
        drop(first);
        let second = take(dir.path()).unwrap().unwrap();
        assert_eq!(second.note().unwrap(), "half way");
        second.set_note("").unwrap();
        assert_eq!(second.note().unwrap(), "");
        second.remove();
        assert!(!dir.path().join(".l").exists());
    }

    #[test]
    fn a_killed_run_may_hold_it_for_a_moment_more() {
        let dir = tempfile::tempdir().unwrap();
        let first = take(dir.path()).unwrap().unwrap();
        let busy = || Error::failed("busy");
        assert_eq!(
            FileLock::of_directory(dir.path(), ".l", busy)
                .unwrap_err()
                .message,
            "busy"
        );
        // A child's descriptors between its fork and its exec.
        let inherited = first.file.try_clone().unwrap();
        drop(first);
        assert!(matches!(take(dir.path()), Err(LockError::Held { .. })));
        let child = thread::spawn(move || {
            thread::sleep(PATIENCE / 4);
            drop(inherited);
        });
        FileLock::of_directory(dir.path(), ".l", busy).unwrap();
        child.join().unwrap();
    }

    /// A process that opened the file before its holder removed it must not end up with a lock on
    /// nothing.
    #[test]
    fn a_removed_file_is_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".l");
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let dir = dir.path().to_path_buf();
                thread::spawn(move || {
                    let mut taken = 0;
                    while taken < 200 {
                        if let Ok(Some(lock)) = take(&dir) {
                            let held = dir.join("held");
                            fs::File::create_new(&held).expect("two held it");
                            fs::remove_file(&held).unwrap();
                            lock.remove();
                            taken += 1;
                        }
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(!path.exists());
    }

    #[test]
    fn a_planted_lock_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".l");
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(take(dir.path()).is_err());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        assert!(matches!(take(dir.path()), Err(LockError::Untrusted(_))));
    }
}
