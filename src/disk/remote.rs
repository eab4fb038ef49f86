//! Files on other hosts, and their local placeholders.
//!
//! A source on the wire is mirrored as a directory. Descriptions are copied into it, and a disk is
//! a sparse file of its name and length, its placeholder. Code that looks for files, their names
//! and their neighbours works on that directory as on any other. The contents of a placeholder are
//! fetched over the wire: [`of`] maps its device and inode to the file on the other host.
//!
//! QEMU's programs get a connected socket for such a file, not its name: they need no permission to
//! connect anywhere.

use std::collections::HashMap;
use std::fmt::Debug;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::cache::Cached;
use super::nbd::{Nbd, Patience};
use super::pool::Pool;
use crate::block::BlockRead;
use crate::stop;
use crate::text;

/// The time for which the local server may be silent; it gives up on the other host before.
const SILENCE: Duration = Duration::from_secs(90);
/// The time for which it may be silent after the run was asked to stop.
const STOPPING: Duration = Duration::from_millis(500);

/// The space that fetching a whole file leaves free for others.
const RESERVE: u64 = 256 << 20;

/// The bytes of a file, local or remote.
pub trait ReadAt: Send + Sync {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// The start of the first data at or behind that offset; everything before is zero.
    fn data_from(&self, at: u64) -> u64;
}

impl ReadAt for File {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, offset)
    }

    fn data_from(&self, at: u64) -> u64 {
        match rustix::fs::seek(self, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => u64::MAX,
            // A file system that does not report holes.
            Err(_) => at,
        }
    }
}

/// A file on another host, served by NBD on a private Unix socket.
pub trait RemoteFile: Debug + Send + Sync {
    /// The address in the form that users write.
    fn shown(&self) -> String;
    fn size(&self) -> u64;
    /// The time of its last change in milliseconds since 1970; 0 if the protocol does not provide
    /// it.
    fn modified_ms(&self) -> u64;
    /// A new connection to the server.
    fn connect(&self) -> io::Result<UnixStream>;
    /// The name of the export there.
    fn export(&self) -> &str;
    /// The other host's identifier of this state of the file, if it provides one.
    fn etag(&self) -> Option<String> {
        None
    }
    /// Announces that much of it will be read soon.
    fn prepare(&self) {}
    /// Announces that these ranges, offsets and lengths in order, will be read.
    fn expect(&self, _ranges: &[(u64, u64)]) {}
    /// The ranges written to, as offsets and lengths, from the dirty bitmaps of its server; `None`
    /// if there are none.
    fn dirty(&self) -> Result<Option<Vec<(u64, u64)>>, String> {
        Ok(None)
    }
    /// Fails if it may have changed since it was opened.
    fn check_unchanged(&self) -> Result<(), Doubt>;
}

/// The reason why a file may not be the one that was opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Doubt {
    #[error("{0}")]
    Changed(String),
    /// The connection or the server is down.
    #[error("it cannot be looked at any more: {0}")]
    Unreachable(String),
}

/// Reads a remote file through one connection, which is opened on first use.
#[derive(Debug)]
pub struct Remote {
    file: Arc<dyn RemoteFile>,
    /// Whether the placeholder has all of its contents.
    copied: bool,
    connection: Mutex<Option<Arc<Cached<Nbd>>>>,
}

impl Remote {
    pub fn new(file: Arc<dyn RemoteFile>) -> Arc<Self> {
        Arc::new(Self {
            file,
            copied: false,
            connection: Mutex::new(None),
        })
    }

    pub fn file(&self) -> &Arc<dyn RemoteFile> {
        &self.file
    }

    pub fn is_copied(&self) -> bool {
        self.copied
    }

    fn connection(&self) -> io::Result<Arc<Cached<Nbd>>> {
        let mut slot = lock(&self.connection);
        if let Some(connection) = &*slot {
            return Ok(connection.clone());
        }
        let connection = Arc::new(Cached::of_remote(self.connect()?));
        *slot = Some(connection.clone());
        Ok(connection)
    }

    fn connect(&self) -> io::Result<Nbd> {
        let patience = Patience {
            silence: SILENCE,
            stopping: STOPPING,
        };
        Nbd::handshake(self.file.connect()?, self.file.export(), patience)
    }

    /// A reader with that number of parallel connections.
    pub(super) fn for_copy(&self, connections: usize) -> io::Result<Pool> {
        let more = (0..connections).map(|_| self.connect());
        Ok(Pool::new(
            self.connection()?,
            more.collect::<io::Result<_>>()?,
        ))
    }
}

impl BlockRead for Remote {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let result = self.connection()?.read_at(offset, buf);
        // An error number is the server's answer; anything else ends the connection.
        if result.as_ref().is_err_and(|e| e.raw_os_error().is_none()) {
            *lock(&self.connection) = None;
        }
        result
    }
}

impl ReadAt for Remote {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_at(offset, buf)
    }

    fn data_from(&self, at: u64) -> u64 {
        at
    }
}

/// Copies the contents of a remote file into its placeholder, for programs that accept files only.
pub fn fetch(path: &Path, remote: &Remote) -> io::Result<()> {
    const CHUNK: u64 = 4 << 20;
    let size = remote.size();
    let free = rustix::fs::statvfs(path)?;
    let free = free.f_bavail.saturating_mul(free.f_frsize);
    if size > free.saturating_sub(RESERVE) {
        return Err(io::Error::other(format!(
            "it has to be fetched whole and has {} MiB, and {} MiB are free for temporary files (TMPDIR)",
            size >> 20,
            free >> 20
        )));
    }
    let copy = File::options().write(true).open(path)?;
    let mut at = 0;
    while at < size {
        if stop::requested() {
            return Err(stop::Interrupted.into());
        }
        let mut part = vec![0; CHUNK.min(size - at) as usize];
        remote.read_at(at, &mut part)?;
        copy.write_all_at(&part, at)?;
        at += part.len() as u64;
    }
    copy.set_len(size)?;
    register(&copy, remote.file.clone(), true).map(drop)
}

/// The placeholders and their remote files, one map for the process, because a file is looked up
/// where it is opened.
#[derive(Debug, Default)]
struct Known {
    /// Remote files by device and inode. The placeholder stays open, so that no other file gets its
    /// inode even if it is removed.
    files: HashMap<(u64, u64), (File, Arc<Remote>)>,
    /// Directories that mirror another host.
    roots: Vec<PathBuf>,
    /// Placeholders for names of backing files that are not paths.
    backings: HashMap<String, PathBuf>,
}

static KNOWN: Mutex<Option<Known>> = Mutex::new(None);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Registers an open file as the placeholder of a remote one. If it has all contents, it is a copy,
/// for which only changes on the other host count.
pub fn register(
    placeholder: &File,
    file: Arc<dyn RemoteFile>,
    copied: bool,
) -> io::Result<Arc<Remote>> {
    let remote = Arc::new(Remote {
        file,
        copied,
        connection: Mutex::new(None),
    });
    let (kept, place) = (placeholder.try_clone()?, place(&placeholder.metadata()?));
    let mut known = lock(&KNOWN);
    let known = known.get_or_insert_default();
    known.files.insert(place, (kept, remote.clone()));
    Ok(remote)
}

/// The remote file behind the file at `path`, if there is one.
pub fn of(path: &Path, meta: &Metadata) -> Option<Arc<Remote>> {
    origin(path, meta).filter(|remote| !remote.copied)
}

/// The remote file for which the file at `path` is the placeholder or a copy. Only in the
/// directories that mirror other hosts.
pub fn origin(path: &Path, meta: &Metadata) -> Option<Arc<Remote>> {
    let known = lock(&KNOWN);
    let known = known.as_ref()?;
    let mirrored = known.roots.iter().any(|root| path.starts_with(root));
    let (_, remote) = known.files.get(&place(meta)).filter(|_| mirrored)?;
    Some(remote.clone())
}

fn place(meta: &Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

/// Registers `root` as the mirror of a host, shown as `url`.
pub fn register_root(root: &Path, url: &str) {
    text::call(root, url);
    let mut known = lock(&KNOWN);
    known.get_or_insert_default().roots.push(root.to_owned());
}

/// Sets the `url` shown for a file of a mirror: complete, encoded and with its query, ready to be
/// used again.
pub fn show_as(path: &Path, url: &str) {
    if text::called(&path.to_string_lossy()) != url {
        text::call(path, url);
    }
}

/// Registers the file behind `placeholder` for images that name `name` as their backing file.
pub fn register_backing(name: &str, placeholder: &Path) {
    let mut known = lock(&KNOWN);
    let backings = &mut known.get_or_insert_default().backings;
    backings.insert(name.to_owned(), placeholder.to_owned());
}

/// The placeholder registered for a name of a backing file.
pub fn backing(name: &str) -> Option<PathBuf> {
    lock(&KNOWN).as_ref()?.backings.get(name).cloned()
}

/// Forgets every placeholder.
pub fn forget() {
    *lock(&KNOWN) = None;
}

/// The directory that mirrors the root of another host, for a path below it.
pub fn root_of(path: &Path) -> Option<PathBuf> {
    let known = lock(&KNOWN);
    let mut roots = known.as_ref()?.roots.iter();
    roots.find(|root| path.starts_with(root)).cloned()
}

/// The file that `name` in the file at `path` means. On another host it stays below the mirror of
/// that host, whatever the name.
pub fn resolve(path: &Path, name: &Path) -> PathBuf {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let Some(root) = root_of(path) else {
        return folder.join(name);
    };
    let start = match name.is_absolute() {
        true => root.clone(),
        false => folder.to_owned(),
    };
    name.components().fold(start, |mut at, part| {
        match part {
            Component::Normal(part) => at.push(part),
            Component::ParentDir if at != root => drop(at.pop()),
            _ => {}
        }
        at
    })
}

/// Resolves `name` in a description at `path`: an absolute path is one of the host of that
/// description.
pub fn absolute(path: &Path, name: &Path) -> PathBuf {
    match root_of(path) {
        Some(root) if name.is_absolute() => {
            let below = name
                .components()
                .filter(|part| matches!(part, Component::Normal(_)));
            root.join(below.collect::<PathBuf>())
        }
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::{Served, write};

    /// A file system reuses the number of a removed file for the next one.
    #[test]
    fn a_new_file_is_never_taken_for_a_placeholder_that_is_gone() {
        let host = tempfile::tempdir().unwrap();
        let far = Served::new(&write(host.path(), "disk", &[1; 512]));
        let here = tempfile::tempdir().unwrap();
        register_root(here.path(), "ssh://host");
        let path = here.path().join("disk");
        for _ in 0..20 {
            let placeholder = File::create(&path).unwrap();
            register(&placeholder, far.clone(), false).unwrap();
            assert!(of(&path, &path.metadata().unwrap()).is_some());
            drop(placeholder);
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, "new").unwrap();
            assert!(of(&path, &path.metadata().unwrap()).is_none());
        }
    }

    #[test]
    fn an_absolute_name_stays_on_its_host() {
        let root = Path::new("/tmp/hyper2kvm-mirror-of-a-test/0");
        register_root(root, "ssh://host");
        let at = root.join("vm/vm.qcow2");
        for (name, want) in [
            ("/etc/shadow", root.join("etc/shadow")),
            ("/../../etc/shadow", root.join("etc/shadow")),
            ("base.qcow2", PathBuf::from("base.qcow2")),
        ] {
            assert_eq!(absolute(&at, Path::new(name)), want, "{name}");
        }
        for (name, want) in [
            ("/etc/shadow", root.join("etc/shadow")),
            ("../../../etc/shadow", root.join("etc/shadow")),
            ("../base.qcow2", root.join("base.qcow2")),
            ("base.qcow2", root.join("vm/base.qcow2")),
        ] {
            assert_eq!(resolve(&at, Path::new(name)), want, "{name}");
        }
        let elsewhere = Path::new("/data/vm.qcow2");
        let name = Path::new("/data/base.qcow2");
        assert_eq!(absolute(elsewhere, name), name);
        let text = format!("opening {}: no", at.display());
        assert_eq!(text::called(&text), "opening ssh://host/vm/vm.qcow2: no");
    }
}
