//! Directories and files that a later run acts on, opened so that nobody else can have put them
//! there.
//!
//! A journal names a disk and the bytes to write to it. In a shared directory (`/tmp`, an NFS
//! export) anybody can create one under the expected name. So directory, journal and saved blocks
//! must belong to the caller or to root. Nobody else may be able to write to them. All of that is
//! read from open descriptors. Every name is opened below the descriptor of its directory, and no
//! symbolic link is followed. So the checked file is the one that is read.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, Stat, fstat, openat, stat};
use rustix::process::geteuid;

/// The size limit: records are some MiB at most.
const MAX_FILE: u64 = 256 << 20;

#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    #[error("{} belongs to user {owner}, not to you (user {caller}) or root", path.display())]
    Foreign {
        path: PathBuf,
        owner: u32,
        caller: u32,
    },
    #[error("{} can be written by others (mode {mode:04o})", path.display())]
    Writable { path: PathBuf, mode: u32 },
    #[error("{} is a symbolic link", path.display())]
    Link { path: PathBuf },
    #[error("{} is not a {wanted}", path.display())]
    Kind { path: PathBuf, wanted: &'static str },
    #[error("opening {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

type Result<T, E = TrustError> = std::result::Result<T, E>;

impl From<TrustError> for crate::error::Error {
    fn from(error: TrustError) -> Self {
        let remedy = error.remedy();
        let mut edge = Self::failed(error.to_string());
        if let TrustError::Io { source, .. } = error {
            edge = edge.because(source);
        }
        remedy.into_iter().fold(edge, Self::hint)
    }
}

impl TrustError {
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// A remedy for the user.
    pub fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::Foreign { path, .. } => format!(
                "run this as the owner of {0}, or read it, and take it over: chown -R root {0}",
                crate::text::shell_word(&path.display().to_string())
            ),
            Self::Writable { path, .. } => format!(
                "read it, then close it to others: chmod go-w {}",
                crate::text::shell_word(&path.display().to_string())
            ),
            Self::Link { .. } => "name the file or directory itself".to_owned(),
            Self::Kind { .. } | Self::Io { .. } => return None,
        })
    }
}

/// An open directory that only the caller or root can write to.
#[derive(Debug)]
pub struct TrustedFolder {
    path: PathBuf,
    fd: OwnedFd,
}

impl TrustedFolder {
    /// Opens a directory. It must not be a link itself; links above it are followed.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_below(CWD, path, path)
    }

    fn open_below(parent: impl std::os::fd::AsFd, name: &Path, shown: &Path) -> Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = openat(parent, name, flags, Mode::empty()).map_err(|e| failed(e, shown))?;
        check(&fstat(&fd).map_err(|e| failed(e, shown))?, shown)?;
        Ok(Self {
            path: shown.to_path_buf(),
            fd,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a file below the directory for reading. The directories in between are checked too.
    pub fn file(&self, relative: &Path) -> Result<File> {
        let shown = self.path.join(relative);
        let parts: Option<Vec<&Path>> = relative
            .components()
            .map(|part| match part {
                Component::Normal(name) => Some(Path::new(name)),
                _ => None,
            })
            .collect();
        let wanted = "name below the directory of its journal";
        let Some((last, folders)) = parts.as_deref().and_then(<[_]>::split_last) else {
            return Err(TrustError::Kind {
                path: relative.to_path_buf(),
                wanted,
            });
        };
        let mut below: Option<Self> = None;
        for name in folders {
            let at = below.as_ref().unwrap_or(self);
            below = Some(Self::open_below(&at.fd, name, &at.path.join(name))?);
        }
        let at = below.as_ref().unwrap_or(self);
        // Opening a FIFO must not block the run.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = openat(&at.fd, *last, flags, Mode::empty()).map_err(|e| failed(e, &shown))?;
        let found = fstat(&fd).map_err(|e| failed(e, &shown))?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            return Err(TrustError::Kind {
                path: shown,
                wanted: "file",
            });
        }
        check(&found, &shown)?;
        Ok(File::from(fd))
    }

    /// The contents of a file below the directory.
    pub fn read(&self, relative: &Path) -> Result<Vec<u8>> {
        contents(self.file(relative)?, &self.path.join(relative))
    }

    /// Whether `path` still leads to this directory.
    pub fn is_at(&self, path: &Path) -> bool {
        let same = |a: &Stat, b: &Stat| (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino);
        matches!((fstat(&self.fd), stat(path)), (Ok(held), Ok(there)) if same(&held, &there))
    }
}

/// The contents of a file that only the caller or root can have written. Its directory may belong
/// to another user.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::RDONLY | OFlags::CLOEXEC;
    let fd = openat(CWD, path, flags, Mode::empty()).map_err(|e| failed(e, path))?;
    let file = File::from(fd);
    check_file(&file, path)?;
    contents(file, path)
}

fn contents(file: File, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MAX_FILE)
        .read_to_end(&mut bytes)
        .map_err(|source| TrustError::Io {
            path: path.to_path_buf(),
            source,
        })?;
    Ok(bytes)
}

/// The checks of [`read`] for a file opened by the caller.
pub fn check_file(file: &File, path: &Path) -> Result<()> {
    check(&fstat(file).map_err(|e| failed(e, path))?, path)
}

fn check(found: &Stat, path: &Path) -> Result<()> {
    let caller = geteuid().as_raw();
    if found.st_uid != caller && found.st_uid != 0 {
        return Err(TrustError::Foreign {
            path: path.to_path_buf(),
            owner: found.st_uid,
            caller,
        });
    }
    // The group bits also are the upper bound of an access control list.
    if found.st_mode & 0o022 != 0 {
        return Err(TrustError::Writable {
            path: path.to_path_buf(),
            mode: found.st_mode & 0o7777,
        });
    }
    Ok(())
}

fn failed(error: rustix::io::Errno, path: &Path) -> TrustError {
    let path = path.to_path_buf();
    let link = std::fs::symlink_metadata(&path).is_ok_and(|m| m.file_type().is_symlink());
    match error {
        rustix::io::Errno::LOOP => TrustError::Link { path },
        rustix::io::Errno::NOTDIR if link => TrustError::Link { path },
        rustix::io::Errno::NOTDIR => TrustError::Kind {
            path,
            wanted: "directory",
        },
        error => TrustError::Io {
            path,
            source: error.into(),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("f");
        fs::create_dir_all(folder.join("backup")).unwrap();
        fs::write(folder.join("backup/x"), "x").unwrap();
        let read = || {
            TrustedFolder::open(&folder)
                .and_then(|f| f.file(Path::new("backup/x")))
                .map(drop)
        };
        for path in ["", "backup", "backup/x"] {
            for (bits, fine) in [(0o755, true), (0o775, false), (0o757, false), (0o700, true)] {
                mode(&folder.join(path), bits);
                let refused =
                    matches!(read(), Err(TrustError::Writable { mode, .. }) if mode == bits);
                assert_eq!(refused, !fine, "{path} {bits:o}");
                assert_eq!(read().is_ok(), fine, "{path} {bits:o}");
            }
        }
        if geteuid().is_root() {
            for path in ["", "backup", "backup/x"] {
                chown(folder.join(path), Some(12345), None).unwrap();
                let error = read().unwrap_err();
                assert!(matches!(error, TrustError::Foreign { owner: 12345, .. }));
                chown(folder.join(path), Some(0), None).unwrap();
            }
        }
    }

    #[test]
    fn links_and_names_that_lead_out_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("f");
        fs::create_dir_all(folder.join("backup")).unwrap();
        fs::write(dir.path().join("out"), "x").unwrap();
        fs::write(folder.join("backup/x"), "x").unwrap();
        symlink(dir.path().join("out"), folder.join("file")).unwrap();
        symlink(folder.join("backup"), folder.join("folder")).unwrap();
        symlink(&folder, dir.path().join("link")).unwrap();
        let trusted = TrustedFolder::open(&folder).unwrap();
        for name in ["file", "folder/x"] {
            let error = trusted.file(Path::new(name)).unwrap_err();
            assert!(matches!(error, TrustError::Link { .. }), "{name}: {error}");
        }
        for name in ["../out", "/etc/passwd", "", "backup/../../out", "backup"] {
            let error = trusted.file(Path::new(name)).unwrap_err();
            assert!(matches!(error, TrustError::Kind { .. }), "{name}: {error}");
        }
        let error = TrustedFolder::open(&dir.path().join("out")).unwrap_err();
        let directory = |e: &TrustError| {
            matches!(
                e,
                TrustError::Kind {
                    wanted: "directory",
                    ..
                }
            )
        };
        assert!(directory(&error), "{error}");
        let error = TrustedFolder::open(&dir.path().join("link")).unwrap_err();
        assert!(matches!(error, TrustError::Link { .. }), "{error}");
        assert!(
            TrustedFolder::open(&dir.path().join("no"))
                .unwrap_err()
                .is_missing()
        );
        assert!(trusted.is_at(&folder) && !trusted.is_at(dir.path()));
        assert!(!trusted.is_at(&dir.path().join("gone")));
    }

    #[test]
    fn what_is_not_trusted_is_told_with_what_to_do() {
        use crate::error::Error;
        let path = || std::path::PathBuf::from("/tmp/a b");
        let owner = "run this as the owner of '/tmp/a b', or read it, and take it over: chown -R root '/tmp/a b'";
        for (error, text, hint) in [
            (
                TrustError::Foreign {
                    path: path(),
                    owner: 7,
                    caller: 8,
                },
                "/tmp/a b belongs to user 7, not to you (user 8) or root",
                Some(owner),
            ),
            (
                TrustError::Writable {
                    path: path(),
                    mode: 0o666,
                },
                "/tmp/a b can be written by others (mode 0666)",
                Some("read it, then close it to others: chmod go-w '/tmp/a b'"),
            ),
            (
                TrustError::Link { path: path() },
                "/tmp/a b is a symbolic link",
                Some("name the file or directory itself"),
            ),
            (
                TrustError::Kind {
                    path: path(),
                    wanted: "file",
                },
                "/tmp/a b is not a file",
                None,
            ),
            (
                TrustError::Io {
                    path: path(),
                    source: io::ErrorKind::PermissionDenied.into(),
                },
                "opening /tmp/a b",
                None,
            ),
        ] {
            let cause = matches!(error, TrustError::Io { .. });
            let error = Error::from(error);
            assert_eq!(error.message, text);
            let hints: Vec<_> = error.hints.iter().map(String::as_str).collect();
            assert_eq!(hints, Vec::from_iter(hint));
            assert_eq!(std::error::Error::source(&error).is_some(), cause, "{text}");
        }
    }

    /// The directory of such a file may be anybody's.
    #[test]
    fn a_single_file_is_read_whole_if_nobody_else_can_have_written_it() {
        let dir = tempfile::tempdir().unwrap();
        mode(dir.path(), 0o777);
        let file = dir.path().join("x");
        fs::write(&file, b"all of it").unwrap();
        mode(&file, 0o644);
        assert_eq!(read(&file).unwrap(), b"all of it");
        mode(&file, 0o664);
        let error = read(&file).unwrap_err();
        assert!(matches!(error, TrustError::Writable { mode: 0o664, .. }));
        mode(&file, 0o644);
        let link = dir.path().join("link");
        symlink(&file, &link).unwrap();
        assert!(matches!(read(&link).unwrap_err(), TrustError::Link { .. }));
        assert!(read(&dir.path().join("no")).unwrap_err().is_missing());
        mode(dir.path(), 0o755);
        let trusted = TrustedFolder::open(dir.path()).unwrap();
        assert_eq!(trusted.read(Path::new("x")).unwrap(), b"all of it");
    }
}
