//! [`Held`]: a file of a source, opened once and held until the end of the run.
//!
//! Every check uses the open descriptor, and this process and QEMU's programs read through that
//! descriptor ([`crate::tool::pass`]). So replacing a name by a link after the check gains an
//! attacker nothing. The file is locked like an image that QEMU reads, so no VM can start on it in
//! the meantime. A file in use by a VM is refused.
//!
//! QEMU announces its use of an image by read locks on single bytes of it (`block/file-posix.c`).
//! Byte `100 + n` means "this process does n", byte `200 + n` "nobody else may do n". A lock
//! belongs to the descriptor and is released with it. On a file system without locks, none are
//! found and none are taken.
//!
//! Locks exclude only QEMU. [`Held::check_unchanged`] detects writes by other programs.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::error::{ImageError, Result};
use super::remote::{self, Doubt, ReadAt, Remote};
use super::{kernel, vmware};
use crate::text::hex;
use crate::tool::pass::{self, Passed};

/// QEMU's `RAW_LOCK_PERM_BASE` and `RAW_LOCK_SHARED_BASE`, and its permissions.
const DOES: libc::off_t = 100;
const FORBIDS: libc::off_t = 200;
const READ: libc::off_t = 0;
const WRITE: libc::off_t = 1;
const RESIZE: libc::off_t = 3;

/// The time for which a starting program may keep the locks of a file that was closed.
const STARTING: Duration = Duration::from_millis(200);
/// The time for which a run that will be refused may block a writer.
const YIELD: Duration = Duration::from_secs(1);

/// The bytes compared at a file's start and at each further header.
const SAMPLE: usize = 4096;
const SAMPLES: [u64; 3] = [0, 64 << 10, 128 << 10];

/// The use of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    Read,
    Write,
}

impl Use {
    fn does(self) -> &'static [libc::off_t] {
        match self {
            Self::Read => &[READ],
            Self::Write => &[READ, WRITE, RESIZE],
        }
    }

    /// The uses that exclude this one. A writer also excludes all readers: QEMU admits readers of a
    /// raw image whose data this program must not change under them.
    fn conflicts(self) -> &'static [libc::off_t] {
        match self {
            Self::Read => &[DOES + WRITE, DOES + RESIZE, FORBIDS + READ],
            Self::Write => &[
                DOES + READ,
                DOES + WRITE,
                DOES + RESIZE,
                FORBIDS + READ,
                FORBIDS + WRITE,
                FORBIDS + RESIZE,
            ],
        }
    }
}

fn range(kind: i32, byte: libc::off_t) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// Takes QEMU's locks on an open file, all or none. `Ok(false)` if somebody else holds a
/// conflicting one.
pub(super) fn lock(file: &File, usage: Use) -> io::Result<bool> {
    let forbids = [WRITE, RESIZE].map(|n| FORBIDS + n);
    let bytes = usage.does().iter().map(|n| DOES + n).chain(forbids);
    for byte in bytes {
        let wanted = range(libc::F_RDLCK, byte);
        match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&wanted)) {
            Ok(_) => {}
            // Another process has an exclusive lock.
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
            Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS) => {
                return Ok(true);
            }
            Err(e) => return Err(e.into()),
        }
    }
    for byte in usage.conflicts() {
        let mut found = range(libc::F_WRLCK, *byte);
        fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut found)).map_err(io::Error::from)?;
        if i32::from(found.l_type) != libc::F_UNLCK {
            unlock_writing(file, usage);
            return Ok(false);
        }
    }
    Ok(true)
}

/// Releases the locks that only a writer holds.
fn unlock_writing(file: &File, usage: Use) {
    if usage == Use::Write {
        for n in [WRITE, RESIZE] {
            let gone = range(libc::F_UNLCK, DOES + n);
            let _ = fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&gone));
        }
    }
}

/// Calls [`lock`] for reading, with retries. A program that is just being started briefly has every
/// open file of this process. With a file that was closed since, it also has its locks.
fn lock_for_reading(file: &File) -> io::Result<bool> {
    let start = Instant::now();
    loop {
        if lock(file, Use::Read)? {
            return Ok(true);
        }
        if start.elapsed() > STARTING {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Calls [`lock`] for writing: of several runs that want to write, one succeeds.
pub(super) fn lock_for_writing(file: &File) -> io::Result<bool> {
    // Only runs of this program take this lock, one at a time.
    if let Err(rustix::io::Errno::WOULDBLOCK) =
        flock(file, FlockOperation::NonBlockingLockExclusive)
    {
        return Ok(false);
    }
    let start = Instant::now();
    loop {
        if lock(file, Use::Write)? {
            return Ok(true);
        }
        if start.elapsed() > YIELD {
            let _ = flock(file, FlockOperation::Unlock);
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A file found by its name but not opened yet. Opening a pipe would block for ever, and opening a
/// device may have side effects.
pub(super) struct Found {
    path: PathBuf,
    anchor: OwnedFd,
}

impl Found {
    pub fn by_name(path: &Path) -> io::Result<Self> {
        let anchor = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self {
            path: path.to_owned(),
            anchor,
        })
    }

    fn name(&self) -> String {
        format!("/proc/self/fd/{}", self.anchor.as_raw_fd())
    }

    /// The real path, with links resolved.
    pub fn real(&self) -> io::Result<PathBuf> {
        std::fs::read_link(self.name())
    }

    /// Opens and locks the file.
    pub fn hold(self) -> Result<Held> {
        self.open(true)
    }

    fn open(self, lock: bool) -> Result<Held> {
        let Self { path, anchor } = &self;
        let io_error = |e| ImageError::from_io(path, e);
        let meta = File::from(anchor.try_clone().map_err(io_error)?)
            .metadata()
            .map_err(io_error)?;
        let block_device = meta.file_type().is_block_device();
        if meta.is_dir() {
            return Err(ImageError::Directory { path: path.clone() });
        }
        if !meta.is_file() && !block_device {
            return Err(ImageError::NotAFile { path: path.clone() });
        }
        let mut file = File::open(self.name()).map_err(io_error)?;
        if lock && !lock_for_reading(&file).map_err(io_error)? {
            return Err(ImageError::InUse { path: path.clone() });
        }
        let origin = remote::origin(path, &meta);
        let remote = origin.as_ref().filter(|remote| !remote.is_copied());
        let size = match &remote {
            Some(remote) => remote.file().size(),
            None => io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(io_error)?,
        };
        let allocated = match &remote {
            // The size of its holes is unknown.
            Some(_) => size,
            None => meta.blocks().saturating_mul(512),
        };
        let facts = Facts::of(&file, block_device).map_err(io_error)?;
        Ok(Held(Arc::new(Inner {
            origin,
            path: self.path,
            file: Arc::new(file),
            block_device,
            size,
            allocated,
            facts,
            written: AtomicBool::new(false),
            exclusive: OnceLock::new(),
        })))
    }
}

/// An open file of a source. Clones share the descriptor and its locks.
#[derive(Debug, Clone)]
pub struct Held(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: Arc<File>,
    /// The remote file for which this one is the placeholder or a copy.
    origin: Option<Arc<Remote>>,
    block_device: bool,
    size: u64,
    allocated: u64,
    facts: Facts,
    /// Whether this run has written to it.
    written: AtomicBool,
    /// Keeps a block device that is written from being mounted.
    exclusive: OnceLock<File>,
}

impl Held {
    pub fn open(path: &Path) -> Result<Self> {
        Found::by_name(path)
            .map_err(|e| ImageError::from_io(path, e))?
            .hold()
    }

    /// Opens a file to which a VM may be writing, to read its backing file.
    pub(super) fn open_in_use(path: &Path) -> Result<Self> {
        Found::by_name(path)
            .map_err(|e| ImageError::from_io(path, e))?
            .open(false)
    }

    /// The path as named.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The real path, with links resolved.
    pub fn real(&self) -> io::Result<PathBuf> {
        std::fs::read_link(self.name())
    }

    pub fn file(&self) -> &File {
        &self.0.file
    }

    /// The remote file for which this one is the placeholder.
    pub fn remote(&self) -> Option<&Arc<Remote>> {
        let origin = self.0.origin.as_ref();
        origin.filter(|remote| !remote.is_copied())
    }

    /// The remote file for which this one is the placeholder or a copy.
    pub(crate) fn origin(&self) -> Option<&Arc<Remote>> {
        self.0.origin.as_ref()
    }

    /// Whether the file is on another host, or was copied from one by this run.
    pub(crate) fn is_on_wire(&self) -> bool {
        self.0.origin.is_some()
    }

    /// Its contents, here or on the wire.
    pub fn contents(&self) -> &dyn ReadAt {
        match self.remote() {
            Some(remote) => &**remote,
            None => &*self.0.file,
        }
    }

    pub fn is_block_device(&self) -> bool {
        self.0.block_device
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// Bytes that it takes on the host.
    pub fn allocated(&self) -> u64 {
        self.0.allocated
    }

    /// The time of its last change, in milliseconds since 1970.
    pub fn modified_ms(&self) -> u64 {
        if let Some(origin) = &self.0.origin {
            return origin.file().modified_ms();
        }
        let (seconds, nanoseconds) = self.0.facts.modified;
        let ms = seconds.saturating_mul(1000) + nanoseconds / 1_000_000;
        u64::try_from(ms).unwrap_or_default()
    }

    /// Whether a later run can find the file: a file unpacked by this run has only a link into
    /// `/proc`.
    pub(crate) fn has_a_name(&self) -> bool {
        let named = |path: PathBuf| {
            std::fs::metadata(path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.id())
        };
        self.check_name().is_ok() && self.real().is_ok_and(named)
    }

    /// The data by which a later run recognises an unchanged file.
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        let facts = &self.0.facts;
        let (seconds, nanoseconds) = facts.modified;
        Fingerprint {
            path: self.path().to_owned(),
            size_bytes: facts.size,
            modified_ns: seconds
                .saturating_mul(1_000_000_000)
                .saturating_add(nanoseconds),
            headers_sha256: hex(&facts.head),
        }
    }

    /// The digest of the headers in its contents, here or on the wire.
    pub(crate) fn headers_sha256(&self) -> io::Result<String> {
        Ok(hex(&headers(self.contents(), self.size())?))
    }

    /// The inode; 0 for a file on another host.
    pub fn inode(&self) -> u64 {
        if self.0.origin.is_some() {
            return 0;
        }
        self.0.facts.id.1
    }

    /// Device and inode.
    pub(super) fn id(&self) -> (u64, u64) {
        self.0.facts.id
    }

    /// Its name in this process and in a program that received the descriptor.
    pub fn name(&self) -> String {
        pass::name(&self.0.file)
    }

    pub fn passed(&self, writable: bool) -> Passed {
        Passed::new(self.0.file.clone(), &self.0.path, writable)
    }

    /// Locks it for writing: nobody else can read or write it.
    pub fn hold_for_writing(&self) -> Result<()> {
        self.check_kernel(Use::Write)?;
        match lock_for_writing(&self.0.file) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ImageError::InUse {
                path: self.path().into(),
            }),
            Err(e) => Err(ImageError::from_io(self.path(), e)),
        }
    }

    /// Fails if the kernel uses it in a way that conflicts with this use. A block device that will
    /// be written is then held, so that it cannot be mounted.
    pub fn check_kernel(&self, usage: Use) -> Result<()> {
        let in_kernel = |user: String, remedy: String| {
            Err(ImageError::InKernel {
                path: self.path().into(),
                user,
                remedy,
            })
        };
        if let Some(device) = kernel::loop_over(self.id())
            && !(usage == Use::Read && device.read_only)
        {
            let shown = device.path.display();
            return in_kernel(
                format!("the loop device {shown}"),
                format!("unmount what is on it and detach it first: losetup -d {shown}"),
            );
        }
        if !self.0.block_device || self.0.exclusive.get().is_some() {
            return Ok(());
        }
        let start = Instant::now();
        // Another run may just be checking.
        let file = loop {
            match kernel::exclusively(&self.name()) {
                Ok(None) if start.elapsed() < STARTING => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                tried => break tried.map_err(|e| ImageError::from_io(self.path(), e))?,
            }
        };
        match (file, usage) {
            (None, _) => in_kernel(
                "the kernel: it is mounted, or part of an array or a volume group".into(),
                "unmount it first; a snapshot of it can be converted meanwhile".into(),
            ),
            (Some(_), Use::Read) => Ok(()),
            (Some(file), Use::Write) => {
                self.0.exclusive.get_or_init(|| file);
                Ok(())
            }
        }
    }

    /// Fails if VMware uses the file: a VM on a VMware host leaves its locks as files beside it.
    pub(crate) fn refuse_if_vmware_has_it(&self) -> Result<()> {
        if self.0.block_device {
            return Ok(());
        }
        let inode = self.id().1;
        vmware::refuse_if_locked(self.path(), inode)?;
        // Behind a link, the lock is beside the real file.
        match self.real() {
            Ok(real) if real != self.path() => vmware::refuse_if_locked(&real, inode),
            _ => Ok(()),
        }
    }

    /// Records that this run writes to it.
    pub fn will_be_written(&self) {
        self.0.written.store(true, Ordering::SeqCst);
    }

    /// The identity of the file for a later run: its path, length, modification time and headers.
    /// Owner and inode change without its contents, so they are not included.
    pub(crate) fn identity(&self) -> Value {
        if let Some(origin) = &self.0.origin {
            // Its placeholder is another file in every run.
            return json!({
                "path": crate::text::called_path(self.path()),
                "size": origin.file().size(),
                "modified": origin.file().modified_ms(),
            });
        }
        let facts = &self.0.facts;
        json!({
            "path": crate::text::of_path(self.path()),
            "size": facts.size,
            "modified": [facts.modified.0, facts.modified.1],
            "head": hex(&facts.head),
            "writes": facts.writes.and_then(|writes| Some(json!([boot_id()?, writes.sectors]))),
        })
    }

    /// Fails if somebody else changed the file since it was opened. A new owner does not count:
    /// libvirt changes the owner of files.
    pub fn check_unchanged(&self) -> Result<()> {
        if self.0.written.load(Ordering::SeqCst) {
            return Ok(());
        }
        if let Some(origin) = &self.0.origin {
            let unchanged = origin.file().check_unchanged();
            let path = self.path().to_owned();
            return unchanged.map_err(|doubt| match doubt {
                Doubt::Changed(what) => ImageError::Changed { path, what },
                Doubt::Unreachable(what) => ImageError::Unreachable { path, what },
            });
        }
        let io_error = |e| ImageError::from_io(self.path(), e);
        let now = Facts::of(&self.0.file, self.0.block_device).map_err(io_error)?;
        let what = self
            .0
            .facts
            .difference(&now)
            .or_else(|| self.is_elsewhere().then(|| REPLACED.to_owned()));
        match what {
            None => Ok(()),
            Some(what) => Err(ImageError::Changed {
                path: self.path().into(),
                what,
            }),
        }
    }

    /// Fails unless the name still leads to this file: for the moment before a program is given the
    /// name.
    pub fn check_name(&self) -> Result<()> {
        let meta = std::fs::metadata(self.path());
        match meta.map_err(|e| ImageError::from_io(self.path(), e))? {
            meta if (meta.dev(), meta.ino()) == self.id() => Ok(()),
            _ => Err(ImageError::Changed {
                path: self.path().into(),
                what: REPLACED.into(),
            }),
        }
    }

    /// Whether the name leads to another file. A missing name does not matter, because the file was
    /// opened in time.
    fn is_elsewhere(&self) -> bool {
        std::fs::metadata(self.path()).is_ok_and(|meta| (meta.dev(), meta.ino()) != self.id())
    }
}

/// A file of a source at the end of one run, for the next. Owner, mode and inode are not included:
/// libvirt changes the owner of files, and a restored backup is the same disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fingerprint {
    #[serde(with = "crate::text::json_path")]
    pub(crate) path: PathBuf,
    pub(crate) size_bytes: u64,
    /// Nanoseconds since 1970; 0 for a block device, whose times have no meaning.
    pub(crate) modified_ns: i64,
    /// Digest of the parts in which formats have their headers and footers.
    pub(crate) headers_sha256: String,
}

impl Fingerprint {
    /// The first difference to the present file.
    pub(crate) fn difference(&self, now: &Self) -> Option<String> {
        if self.size_bytes != now.size_bytes {
            return Some(format!(
                "it was {} bytes long and is {} bytes now",
                self.size_bytes, now.size_bytes
            ));
        }
        if self.headers_sha256 != now.headers_sha256 {
            return Some("its header was overwritten".into());
        }
        (self.modified_ns != now.modified_ns).then(|| {
            let later = now.modified_ns.saturating_sub(self.modified_ns) / 1_000_000_000;
            format!("it was written to, {later} s after the time it had")
        })
    }
}

const REPLACED: &str = "another file took its name";

/// The id of this boot of the host, across which counters cannot be compared.
pub(crate) fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

/// The data by which a change is detected.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Facts {
    id: (u64, u64),
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    /// Digest of its headers.
    head: [u8; 32],
    /// For a block device, whose times have no meaning: the writes since the host started.
    writes: Option<Writes>,
}

impl Facts {
    fn of(file: &File, block_device: bool) -> io::Result<Self> {
        let meta = file.metadata()?;
        let size = match block_device {
            true => io::Seek::seek(&mut &*file, io::SeekFrom::End(0))?,
            false => meta.len(),
        };
        Ok(Self {
            id: (meta.dev(), meta.ino()),
            size,
            modified: match block_device {
                true => (0, 0),
                false => (meta.mtime(), meta.mtime_nsec()),
            },
            head: headers(file, size)?,
            writes: block_device.then(|| Writes::of(meta.rdev())).flatten(),
        })
    }

    fn difference(&self, now: &Self) -> Option<String> {
        if self.size != now.size {
            return Some(format!(
                "it was {} bytes long and is {} bytes now",
                self.size, now.size
            ));
        }
        if self.head != now.head {
            return Some("its header was overwritten".into());
        }
        if self.modified != now.modified {
            let ago = now.modified.0.saturating_sub(self.modified.0);
            return Some(format!(
                "it was written to, {ago} s after the time it had when it was opened"
            ));
        }
        match (self.writes, now.writes) {
            (Some(old), Some(new)) if old != new => Some(format!(
                "{} sectors were written to it",
                new.sectors.saturating_sub(old.sectors)
            )),
            _ => None,
        }
    }
}

/// Digest of the parts of a file in which formats have their headers and footers.
fn headers(file: &dyn ReadAt, size: u64) -> io::Result<[u8; 32]> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; SAMPLE];
    let end = size.saturating_sub(SAMPLE as u64);
    for offset in SAMPLES.into_iter().filter(|at| *at < end).chain([end]) {
        let len = (SAMPLE as u64).min(size.saturating_sub(offset)) as usize;
        let part = &mut buffer[..len];
        file.read_exact_at(part, offset)?;
        digest.update(part);
    }
    Ok(digest.finalize().into())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Writes {
    requests: u64,
    sectors: u64,
    discards: u64,
}

impl Writes {
    fn of(device: u64) -> Option<Self> {
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
        Self::parse(&text)
    }

    /// Parses the counters (`Documentation/block/stat.rst`).
    fn parse(text: &str) -> Option<Self> {
        let fields: Vec<u64> = text
            .split_whitespace()
            .map_while(|field| field.parse().ok())
            .collect();
        Some(Self {
            requests: *fields.get(4)?,
            sectors: *fields.get(6)?,
            // Old kernels do not count these.
            discards: fields.get(11).copied().unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn image() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.raw");
        std::fs::write(&path, vec![7; 300 << 10]).unwrap();
        (folder, path)
    }

    #[test]
    fn one_writer_or_many_readers() {
        let (_folder, path) = image();
        let (a, b) = (Held::open(&path).unwrap(), Held::open(&path).unwrap());
        assert!(matches!(
            a.hold_for_writing(),
            Err(ImageError::InUse { .. })
        ));
        // After the refusal, it is a reader as before.
        drop(b);
        let b = Held::open(&path).unwrap();
        drop(a);
        b.hold_for_writing().unwrap();
        b.hold_for_writing().unwrap();
        assert!(matches!(Held::open(&path), Err(ImageError::InUse { .. })));
        let clone = b.clone();
        drop(b);
        assert!(Held::open(&path).is_err(), "held by the clone");
        drop(clone);
        Held::open(&path).unwrap();
    }

    #[test]
    fn of_two_writers_one_goes_on() {
        let (_folder, path) = image();
        let (a, b) = (Held::open(&path).unwrap(), Held::open(&path).unwrap());
        std::thread::scope(|scope| {
            // It gives up when it sees the other one, which waits for that.
            let second = scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                b.hold_for_writing().unwrap_err();
            });
            a.hold_for_writing().unwrap();
            second.join().unwrap();
        });
    }

    #[test]
    fn changes_are_noticed() {
        let (folder, path) = image();
        let write = |at: u64, bytes: &[u8]| {
            let file = File::options().write(true).open(&path).unwrap();
            file.write_all_at(bytes, at).unwrap();
            file
        };
        let changed = |held: &Held| match held.check_unchanged() {
            Ok(()) => String::new(),
            Err(e) => e.to_string(),
        };
        let held = Held::open(&path).unwrap();
        assert_eq!(changed(&held), "");
        // libvirt changes the owner of files and restores it.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o640);
        std::fs::set_permissions(&path, mode).unwrap();
        assert_eq!(changed(&held), "");
        write(200 << 10, b"x");
        assert!(changed(&held).contains("it was written to"));

        // A writer that resets the modification time.
        let held = Held::open(&path).unwrap();
        let old = path.metadata().unwrap().modified().unwrap();
        for place in [0, 64 << 10, (300 << 10) - 1] {
            let held = Held::open(&path).unwrap();
            write(place, b"y").set_modified(old).unwrap();
            assert!(changed(&held).contains("header"), "{place}");
        }
        assert!(changed(&held).contains("header"));

        let held = Held::open(&path).unwrap();
        File::options()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"z")
            .unwrap();
        assert!(changed(&held).contains("307200 bytes long and is 307201"));
        held.will_be_written();
        assert_eq!(changed(&held), "");

        let held = Held::open(&path).unwrap();
        std::fs::rename(&path, folder.path().join("old")).unwrap();
        assert_eq!(changed(&held), "", "gone, and still open");
        std::fs::copy(folder.path().join("old"), &path).unwrap();
        assert!(changed(&held).contains("took its name"));
    }

    #[test]
    fn neither_a_folder_nor_a_pipe() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        let (kind, mode) = (rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, kind, mode, 0).unwrap();
        let open = |path: &Path| Held::open(path).unwrap_err();
        assert!(matches!(open(folder.path()), ImageError::Directory { .. }));
        assert!(matches!(open(&fifo), ImageError::NotAFile { .. }));
        let none = folder.path().join("none");
        assert!(matches!(open(&none), ImageError::NotFound { .. }));
    }

    #[test]
    fn counters_of_a_block_device() {
        let text = "  1 2 3 4 500 6 7000 8 9 10 11 12 13 14 15 16 17\n";
        let seen = Writes::parse(text).unwrap();
        assert_eq!(
            (seen.requests, seen.sectors, seen.discards),
            (500, 7000, 12)
        );
        assert_eq!(Writes::parse("1 2 3 4 5 6 7").unwrap().discards, 0);
        assert_eq!(Writes::parse("1 2 3"), None);
    }
}
