//! New names that never replace others, and who may read what is created.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Mode, RenameFlags, linkat, renameat, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

/// Of directories that QEMU's user must get through; nobody else lists them.
pub const PASSAGE: u32 = 0o711;

/// From here on this process, and every program it starts, creates files for their owner alone.
pub fn create_for_owner_only() {
    rustix::process::umask(Mode::from_raw_mode(0o077));
}

/// Creates the directories above `path` that are missing. QEMU's user must get through them.
pub fn create_parents(path: &Path) -> io::Result<()> {
    match path.parent().filter(|p| !p.as_os_str().is_empty()) {
        Some(parent) => create_passage(parent),
        None => Ok(()),
    }
}

/// Creates a directory that is missing, and those above it, for QEMU's user to get through.
pub fn create_passage(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    create_parents(folder)?;
    match fs::create_dir(folder) {
        // Another run was first.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => Ok(()),
        Err(e) => Err(e),
        Ok(()) => fs::set_permissions(folder, fs::Permissions::from_mode(PASSAGE)),
    }
}

/// Creates a directory, and those above it, for the caller alone.
pub fn create_private(folder: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
}

/// Renames to a name that must be free.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    rename_new_at(CWD, from, CWD, to)
}

/// The same below open directories.
pub fn rename_new_at(
    from_folder: impl AsFd,
    from: &Path,
    to_folder: impl AsFd,
    to: &Path,
) -> io::Result<()> {
    match renameat_with(&from_folder, from, &to_folder, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        done => return Ok(done?),
    }
    // The file system has no such rename. A second link of a file is never made over another one.
    match linkat(&from_folder, from, &to_folder, to, AtFlags::empty()) {
        Ok(()) => return Ok(unlinkat(from_folder, from, AtFlags::empty())?),
        Err(Errno::EXIST) => return Err(Errno::EXIST.into()),
        // A directory, or no links there either.
        Err(_) => {}
    }
    match statat(&to_folder, to, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(renameat(from_folder, from, to_folder, to)?),
        Ok(_) => Err(Errno::EXIST.into()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_name_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&a, "a").unwrap();
        fs::write(&b, "b").unwrap();
        let error = rename_new(&a, &b).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&b).unwrap(), "b");
        fs::remove_file(&b).unwrap();
        rename_new(&a, &b).unwrap();
        assert_eq!(fs::read_to_string(&b).unwrap(), "a");
    }

    #[test]
    fn modes_whatever_the_umask() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b/c");
        create_parents(&deep).unwrap();
        create_private(&deep).unwrap();
        let mode = |path: &str| {
            let meta = fs::metadata(dir.path().join(path)).unwrap();
            meta.permissions().mode() & 0o777
        };
        assert_eq!(
            (mode("a"), mode("a/b"), mode("a/b/c")),
            (0o711, 0o711, 0o700)
        );
    }
}
