//! Checks whether a disk of an earlier result is in use, before anything replaces it.
//!
//! QEMU locks every image that it has open, so an exclusive lock on it fails while a VM runs. Held
//! until the result is replaced, that lock also keeps a VM from starting in between. A loop device
//! holds no lock, and neither does a VM that libvirt has suspended to disk. These are looked up by
//! path.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, fcntl_lock, flock, open};
use rustix::io::Errno;

use crate::boot::files;
use crate::disk::chain::Image;
use crate::disk::kernel;
use crate::error::{Error, Result};
use crate::tool::{self, virsh::Virsh};

/// Locks that keep a VM from starting on the disks; released when dropped.
#[derive(Debug, Default)]
pub struct Held(Vec<File>);

impl Held {
    /// Locks a file; otherwise returns its user, in words.
    pub fn hold(&mut self, path: &Path) -> Option<String> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let (file, writable) = match open(path, flags | OFlags::RDWR, Mode::empty()) {
            Ok(fd) => (File::from(fd), true),
            Err(Errno::NOENT) => return None,
            Err(Errno::TXTBSY | Errno::BUSY) => return Some("the kernel".to_owned()),
            Err(_) => match open(path, flags | OFlags::RDONLY, Mode::empty()) {
                Ok(fd) => (File::from(fd), false),
                // It belongs to QEMU's user, and is closed to this one.
                Err(e) => return Some(format!("somebody else ({e})")),
            },
        };
        if let Err(Errno::WOULDBLOCK) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            return Some("a process that has locked it".to_owned());
        }
        let locked = match writable {
            true => fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive),
            false => Ok(()),
        };
        let busy = match locked {
            Err(Errno::WOULDBLOCK | Errno::ACCESS) => true,
            _ => !writable && listed(&file),
        };
        if busy {
            return Some("a running VM or another program of QEMU".to_owned());
        }
        let over = file.metadata().ok();
        if let Some(device) = over.and_then(|m| kernel::loop_over((m.dev(), m.ino()))) {
            return Some(format!("the loop device {}", device.path.display()));
        }
        self.0.push(file);
        None
    }
}

/// Whether the kernel lists a lock on the file that is not a plain `flock`.
fn listed(file: impl AsFd) -> bool {
    let (Ok(stat), Ok(locks)) = (rustix::fs::fstat(file), fs::read_to_string("/proc/locks")) else {
        return false;
    };
    let inode = format!(":{}", stat.st_ino);
    locks.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.iter().any(|w| *w == "OFDLCK" || *w == "POSIX")
            && words.iter().any(|w| w.ends_with(&inode))
    })
}

/// Refuses to write to a disk of a domain that is suspended to disk. When it is resumed, its cached
/// data overwrites the disk. A running domain has locked the disk.
pub fn refuse_suspended(image: &Image) -> Result<()> {
    let files: Vec<PathBuf> = image.written().map(Path::to_path_buf).collect();
    match domain_of(&files, None) {
        None => Ok(()),
        Some(domain) => Err(Error::failed(format!(
            "{} is in use by {domain}, which runs or is suspended to disk",
            image.path().display()
        ))
        .hint("start it and shut it down first, or give up its memory: virsh managedsave-remove")),
    }
}

/// The domain of this host's libvirt that runs from one of the files, or is suspended to disk with
/// it.
pub fn domain_of(paths: &[PathBuf], uri: Option<&str>) -> Option<String> {
    tool::find("virsh")?;
    let mut uris: Vec<String> = uri.map(str::to_owned).into_iter().collect();
    let sockets = |folder: &Path| {
        ["libvirt-sock", "virtqemud-sock"]
            .iter()
            .any(|name| folder.join("libvirt").join(name).exists())
    };
    if sockets(Path::new("/run")) {
        uris.push("qemu:///system".to_owned());
    }
    // A query would start a daemon if none runs.
    if std::env::var_os("XDG_RUNTIME_DIR").is_some_and(|folder| sockets(Path::new(&folder))) {
        uris.push("qemu:///session".to_owned());
    }
    uris.dedup();
    let identity = |path: &Path| fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    let wanted: Vec<_> = paths.iter().filter_map(|path| identity(path)).collect();
    for uri in uris {
        let virsh = Virsh::new(&uri);
        let domains = match virsh.active() {
            Ok(domains) => domains,
            Err(error) => {
                tracing::debug!("{uri}: {error}");
                continue;
            }
        };
        for uuid in domains {
            let Ok((_, disks)) = virsh
                .xml(uuid, true)
                .map_err(Error::from)
                .and_then(|xml| files::identify(&xml))
            else {
                continue;
            };
            let uses = |path: &PathBuf| -> bool {
                paths.contains(path) || identity(path).is_some_and(|id| wanted.contains(&id))
            };
            // Below an overlay it is only read, and must not change either.
            if (disks.iter()).any(|disk| uses(&disk.path) || disk.below.iter().any(uses)) {
                return Some(format!("the domain {uuid} of {uri}"));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_of_another_kind_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, "x").unwrap();
        let mut held = Held::default();
        assert_eq!(held.hold(&path), None);
        drop(held);
        let other = File::open(&path).unwrap();
        flock(&other, FlockOperation::NonBlockingLockShared).unwrap();
        assert!(Held::default().hold(&path).is_some());
        drop(other);
        assert_eq!(Held::default().hold(&path), None);
        assert_eq!(Held::default().hold(&dir.path().join("none")), None);
    }
}
