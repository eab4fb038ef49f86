//! VMware's lock files: a VM that runs on another host holds no locks on this one.
//!
//! Workstation, Fusion and Player keep a directory `NAME.lck` beside each file in use, with a file
//! per holder in it. A crash leaves an empty directory, or the file of a dead holder. ESXi keeps
//! `.lck-HEX` beside the files of an NFS datastore. HEX is the inode of the file in use, its bytes
//! in ascending order (VMware KB 10051). Whether the holder still runs cannot be determined from
//! this host, so either lock is a reason to stop.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::error::{ImageError, Result};

/// The extensions of files that VMware locks.
const KINDS: [&str; 4] = ["vmdk", "vmx", "vmtx", "nvram"];
const NFS: &str = ".lck-";

/// Refuses a file of a VM that VMware has locked; `inode` is that of the open file.
pub fn refuse_if_locked(file: &Path, inode: u64) -> Result<()> {
    let kind = file.extension().unwrap_or_default().to_ascii_lowercase();
    if !KINDS.iter().any(|known| kind == *known) {
        return Ok(());
    }
    match folder_lock(file).or_else(|| nfs_lock(file, inode)) {
        None => Ok(()),
        Some(lock) => Err(ImageError::VmwareLock {
            path: file.into(),
            lock,
        }),
    }
}

fn folder_lock(file: &Path) -> Option<PathBuf> {
    let mut lock = file.as_os_str().to_owned();
    lock.push(".lck");
    let lock = PathBuf::from(lock);
    if !lock.symlink_metadata().ok()?.is_dir() {
        return Some(lock);
    }
    match fs::read_dir(&lock) {
        // An inaccessible directory may contain a holder.
        Err(_) => Some(lock),
        Ok(mut entries) => entries.next().map(|_| lock),
    }
}

/// The lock of this file, or one that belongs to no other existing file.
fn nfs_lock(file: &Path, inode: u64) -> Option<PathBuf> {
    let folder = file.parent()?;
    let entries: Vec<_> = fs::read_dir(folder).ok()?.flatten().collect();
    let named: Vec<(PathBuf, u64)> = entries
        .iter()
        .filter_map(|entry| {
            let name = entry.file_name();
            let hex = name.to_str()?.strip_prefix(NFS)?;
            Some((entry.path(), locked_inode(hex)?))
        })
        .collect();
    if named.is_empty() {
        return None;
    }
    let others: Vec<u64> = entries
        .iter()
        .filter_map(|entry| Some(entry.metadata().ok()?.ino()))
        .filter(|other| *other != inode)
        .collect();
    let locks = named.into_iter();
    let mut ours = locks.filter(|(_, locked)| !others.contains(locked));
    ours.next().map(|(lock, _)| lock)
}

fn locked_inode(hex: &str) -> Option<u64> {
    let number = u64::from_str_radix(hex, 16).ok()?;
    (hex.len() == 16).then(|| number.swap_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_of_workstation() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["vm.vmdk", "vm.vmx", "vm.qcow2"] {
            fs::write(at(name), "x").unwrap();
        }
        refuse_if_locked(&at("vm.vmdk"), 1).unwrap();
        // Left by a crash, or about to be removed.
        fs::create_dir(at("vm.vmdk.lck")).unwrap();
        refuse_if_locked(&at("vm.vmdk"), 1).unwrap();
        fs::write(at("vm.vmdk.lck").join("M34532.lck"), "host").unwrap();
        let e = refuse_if_locked(&at("vm.vmdk"), 1).unwrap_err();
        assert!(e.to_string().contains("vm.vmdk.lck"), "{e}");
        refuse_if_locked(&at("vm.vmx"), 1).unwrap();
        fs::write(at("vm.vmx.lck"), "").unwrap();
        assert!(refuse_if_locked(&at("vm.vmx"), 1).is_err());
        fs::write(at("vm.qcow2.lck"), "").unwrap();
        refuse_if_locked(&at("vm.qcow2"), 1).unwrap();
    }

    #[test]
    fn locks_of_esxi() {
        assert_eq!(locked_inode("3409000000000000"), Some(2356));
        assert_eq!(locked_inode("3409"), None);
        let dir = tempfile::tempdir().unwrap();
        let inode = |name: &str| {
            let path = dir.path().join(name);
            fs::write(&path, "x").unwrap();
            (path.clone(), path.metadata().unwrap().ino())
        };
        let ((disk, own), (_, other)) = (inode("vm-flat.vmdk"), inode("other-flat.vmdk"));
        let lock = |inode: u64| dir.path().join(format!("{NFS}{:016x}", inode.swap_bytes()));
        fs::write(dir.path().join(".lck-nonsense"), "").unwrap();
        fs::write(lock(other), "").unwrap();
        refuse_if_locked(&disk, own).unwrap();
        for locked in [own, 0x0123_4567_89ab_cdef] {
            fs::write(lock(locked), "").unwrap();
            assert!(refuse_if_locked(&disk, own).is_err());
            fs::remove_file(lock(locked)).unwrap();
        }
    }
}
