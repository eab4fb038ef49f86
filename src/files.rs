//! Creates new names without replacing others, and restricts access to created files.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Once;
use std::time::Duration;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, RenameFlags, Stat, fchmod, flock,
    fstat, fsync, linkat, mkdirat, openat, renameat, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::geteuid;
use uuid::Uuid;

/// The mode of directories that QEMU's user must pass through; nobody else lists them.
pub const PASSAGE: u32 = 0o711;

/// Makes this process, and every program it starts, create files for their owner alone.
pub fn create_for_owner_only() {
    rustix::process::umask(Mode::from_raw_mode(0o077));
}

/// Creates the missing directories above `path`. QEMU's user must be able to pass through them.
pub fn create_parents(path: &Path) -> io::Result<()> {
    match path.parent().filter(|p| !p.as_os_str().is_empty()) {
        Some(parent) => create_passage(parent),
        None => Ok(()),
    }
}

/// Creates a missing directory and its parents, which QEMU's user can pass through.
pub fn create_passage(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    create_parents(folder)?;
    if folder.symlink_metadata().is_ok() {
        return there(folder);
    }
    // Complete when it has its name: another run may use it immediately.
    let hidden = folder.with_file_name(format!(".{}", Uuid::new_v4()));
    let fd = open_new_directory(CWD, &hidden)?;
    let named = fchmod(fd, Mode::from_raw_mode(PASSAGE))
        .map_err(io::Error::from)
        .and_then(|()| rename_new(&hidden, folder));
    named.or_else(|error| {
        // It is empty.
        let _ = fs::remove_dir(&hidden);
        match error.kind() {
            io::ErrorKind::AlreadyExists => there(folder),
            _ => Err(error),
        }
    })
}

/// Accepts an existing directory: another run was first.
fn there(folder: &Path) -> io::Result<()> {
    match folder.is_dir() {
        true => Ok(()),
        false => Err(Errno::EXIST.into()),
    }
}

/// Creates a directory for the caller alone and opens it.
pub fn open_new_directory(parent: impl AsFd, name: &Path) -> io::Result<OwnedFd> {
    mkdirat(&parent, name, Mode::RWXU)?;
    open_created(parent, name)
}

/// Opens a created directory. Somebody with write access above it can replace it, so it must belong
/// to the caller and be empty.
fn open_created(parent: impl AsFd, name: &Path) -> io::Result<OwnedFd> {
    let fd = open_directory(parent, name)?;
    let exchanged = || {
        let shown = name.display();
        io::Error::other(format!("{shown} was replaced right after it was created"))
    };
    if fstat(&fd)?.st_uid != geteuid().as_raw() {
        return Err(exchanged());
    }
    for entry in Dir::read_from(&fd)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Err(exchanged());
        }
    }
    Ok(fd)
}

/// Opens a directory; a link is an error.
pub fn open_directory(parent: impl AsFd, name: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(openat(parent, name, flags, Mode::empty())?)
}

/// The entries of an open directory, sorted by name.
pub fn entries(folder: &OwnedFd) -> io::Result<Vec<(OsString, Stat)>> {
    let mut found = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            let stat = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
            found.push((name.to_owned(), stat));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

pub fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// Creates a directory and its parents for the caller alone.
pub fn create_private(folder: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
}

/// Renames to a free name.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    rename_new_at(CWD, from, CWD, to)
}

/// Renames to a free name, relative to open directories.
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
    // The file system has no such rename. A second link to a file never replaces another one.
    match linkat(&from_folder, from, &to_folder, to, AtFlags::empty()) {
        Ok(()) => return Ok(unlinkat(from_folder, from, AtFlags::empty())?),
        Err(Errno::EXIST) => return Err(Errno::EXIST.into()),
        // A directory, or a file system without links.
        Err(_) => {}
    }
    match statat(&to_folder, to, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(renameat(from_folder, from, to_folder, to)?),
        Ok(_) => Err(Errno::EXIST.into()),
        Err(e) => Err(e.into()),
    }
}

/// The result of a removal; nothing need be removed that is gone already.
pub(crate) fn removed(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Exchanges the names of two files in one step. Fails if one of them is missing, or if the file
/// system has no such step.
pub(crate) fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
}

/// Makes the contents of a file, or the names in a directory, durable.
pub(crate) fn sync(file: impl AsFd, path: &Path) -> io::Result<()> {
    order::note("sync", path);
    Ok(fsync(file)?)
}

/// Gives a file another name, also over what has that.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    order::note("rename", to);
    fs::rename(from, to)
}

/// Tests ask in which order this thread made things durable and gave them names: what survives a loss of power.
pub(crate) mod order {
    use std::path::Path;

    #[cfg(test)]
    thread_local! {
        static SEEN: std::cell::RefCell<Vec<String>> = const { std::cell::RefCell::new(Vec::new()) };
    }

    #[cfg(not(test))]
    pub(crate) fn note(_: &str, _: &Path) {}

    #[cfg(test)]
    pub(crate) fn note(what: &str, path: &Path) {
        let name = path.file_name().unwrap_or(path.as_os_str());
        let line = format!("{what} {}", name.to_string_lossy());
        SEEN.with(|seen| seen.borrow_mut().push(line));
    }

    /// Returns and forgets the notes so far.
    #[cfg(test)]
    pub(crate) fn seen() -> Vec<String> {
        SEEN.with(std::cell::RefCell::take)
    }
}

pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Whether a path is that of a device. `/dev/shm` holds files in memory.
pub(crate) fn names_a_device(path: &Path) -> bool {
    path.starts_with("/dev") && !path.starts_with("/dev/shm")
}

/// Opens a file named in a description, but no pipe, which would block for ever.
pub(crate) fn open_file(path: &Path) -> io::Result<fs::File> {
    let kind = fs::metadata(path)?.file_type();
    if kind.is_file() || kind.is_dir() || kind.is_block_device() {
        fs::File::open(path)
    } else {
        Err(io::Error::other("neither a file nor a block device"))
    }
}

/// The prefix of the directories for a run's sockets and copies.
const SCRATCH: &str = "hyper2kvm-run-";
/// The age up to which a directory may not be locked yet.
const SCRATCH_AGE: Duration = Duration::from_secs(600);

/// A temporary directory that only this user can enter. It is removed at the end; after SIGKILL by
/// the next run.
#[derive(Debug)]
pub struct Scratch {
    directory: tempfile::TempDir,
    /// Its lock shows that the run is active.
    _held: File,
}

impl Scratch {
    pub fn new() -> io::Result<Self> {
        static SWEPT: Once = Once::new();
        SWEPT.call_once(|| remove_left(&std::env::temp_dir(), SCRATCH_AGE));
        let directory = tempfile::Builder::new()
            .prefix(SCRATCH)
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir()?;
        let held = File::open(directory.path())?;
        flock(&held, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self {
            directory,
            _held: held,
        })
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Removes it, and returns errors, which dropping it ignores.
    pub fn close(self) -> io::Result<()> {
        self.directory.close()
    }
}

/// Removes this user's directories without a running owner. Inaccessible ones stay.
fn remove_left(folder: &Path, age: Duration) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        if !entry.file_name().as_bytes().starts_with(SCRATCH.as_bytes()) {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(directory) = openat(CWD, entry.path(), flags, Mode::empty()) else {
            continue;
        };
        let is_ours = fstat(&directory).is_ok_and(|stat| stat.st_uid == geteuid().as_raw());
        let touched = entry.metadata().and_then(|data| data.modified());
        let is_old = touched.is_ok_and(|at| at.elapsed().is_ok_and(|since| since >= age));
        if is_ours
            && is_old
            && flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok()
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            tracing::debug!("removing {}: {error}", entry.path().display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_in_memory_below_dev_is_no_device() {
        for (path, is) in [
            ("/dev/vg/win10", true),
            ("/dev/shm", false),
            ("/dev/shm/win10.qcow2", false),
            ("/dev/shmem", true),
            ("/device/win10", false),
            ("dev/sda", false),
        ] {
            assert_eq!(names_a_device(Path::new(path)), is, "{path}");
        }
    }

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
    fn what_replaces_a_new_directory_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (victim, name) = (dir.path().join("victim"), dir.path().join("new"));
        fs::create_dir(&victim).unwrap();
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o750)).unwrap();
        std::os::unix::fs::symlink(&victim, &name).unwrap();
        assert!(open_created(CWD, &name).is_err());
        fs::remove_file(&name).unwrap();
        fs::write(victim.join("x"), "").unwrap();
        assert!(open_created(CWD, &victim).is_err());
        fs::remove_file(victim.join("x")).unwrap();
        open_created(CWD, &victim).unwrap();
        if geteuid().is_root() {
            std::os::unix::fs::chown(&victim, Some(12345), None).unwrap();
            assert!(open_created(CWD, &victim).is_err());
        }
        let mode = fs::metadata(&victim).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o750);
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

    /// Like two runs of a batch whose directory does not exist yet.
    #[test]
    fn two_runs_create_the_same_directory_and_use_it_at_once() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..500 {
            let shared = dir.path().join(round.to_string()).join("out");
            std::thread::scope(|scope| {
                for run in ["a", "b"] {
                    let own = shared.join(run);
                    scope.spawn(move || {
                        create_passage(&own).unwrap();
                        let above = fs::metadata(own.parent().unwrap()).unwrap();
                        assert_eq!(above.permissions().mode() & 0o777, PASSAGE, "{own:?}");
                    });
                }
            });
            let names: Vec<_> = fs::read_dir(&shared).unwrap().flatten().collect();
            assert_eq!(names.len(), 2, "{names:?}");
            let beside = fs::read_dir(shared.parent().unwrap()).unwrap().count();
            assert_eq!(beside, 1, "a name for a moment is left");
        }
    }

    #[test]
    fn what_a_killed_run_left_is_removed_and_nothing_else() {
        let place = tempfile::tempdir().unwrap();
        let make = |name: &str, days: u64| {
            let path = place.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("nbd.sock"), "").unwrap();
            let directory = File::open(&path).unwrap();
            let then = std::time::SystemTime::now() - Duration::from_secs(days * 86_400);
            directory.set_modified(then).unwrap();
            directory
        };
        make("hyper2kvm-run-left", 1);
        make("hyper2kvm-run-young", 0);
        make("hyper2kvm-other", 1);
        let held = make("hyper2kvm-run-held", 1);
        flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();
        std::os::unix::fs::symlink("hyper2kvm-other", place.path().join("hyper2kvm-run-link"))
            .unwrap();

        remove_left(place.path(), SCRATCH_AGE);
        let mut names: Vec<_> = fs::read_dir(place.path())
            .unwrap()
            .flatten()
            .collect::<Vec<_>>()
            .iter()
            .map(|e| e.file_name().into_string().unwrap())
            .collect();
        names.sort();
        let stay = [
            "hyper2kvm-other",
            "hyper2kvm-run-held",
            "hyper2kvm-run-link",
            "hyper2kvm-run-young",
        ];
        assert_eq!(names, stay);
        assert!(place.path().join("hyper2kvm-other/nbd.sock").exists());

        let scratch = Scratch::new().unwrap();
        let again = File::open(scratch.path()).unwrap();
        assert!(
            flock(&again, FlockOperation::NonBlockingLockExclusive).is_err(),
            "it is held"
        );
    }
}
