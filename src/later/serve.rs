//! `serve`: keeps the connection to a source on another host while a VM runs on it.
//!
//! ```text
//!  QEMU --socket beside the overlay--> child that dials (crate::wire), one for each disk --ssh, https, nbd--> host
//! ```
//!
//! A read without an answer waits for at most 18 s, because Windows gives up a disk after 20. Then
//! QEMU gets an I/O error and pauses the VM (`rerror_policy`). The children reconnect
//! automatically, and `pull::serve` resumes the VM once the source answers, unless it has changed.
//!
//! QEMU of libvirt 9 connects once, when the VM starts. So the server must outlive the VM, and a VM
//! whose server was killed has to be started again.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::record::{Disk, Record};
use super::whole::Daemon;
use super::wire::{Looks, OnWire};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::files::Scratch;
use crate::lock::{FileLock, LockError};
use crate::stop;
use crate::text::quote;
use crate::tool::launcher;
use crate::wire::{Access, Identity, Wire, WireError};

/// The lock of the process that serves a directory.
pub(crate) const LOCK: &str = ".serve.lock";
/// The log of a server left running by `boot`.
pub(crate) const LOG: &str = "serve.log";

/// The interval of checks whether such a server is ready.
const TICK: Duration = Duration::from_millis(250);
/// The time for such a server to connect.
const START: Duration = Duration::from_secs(120);
/// systemd's name of the variable.
const NOTIFY: &str = "NOTIFY_SOCKET";

/// The sockets of one directory, which are removed when this is dropped.
pub(crate) struct Server {
    lines: Vec<Line>,
    lock: Option<FileLock>,
}

/// One disk.
struct Line {
    was: OnWire,
    /// Serves the file, or only checks the files if the disk consists of several.
    wire: Wire,
    whole: Option<Daemon>,
}

impl Server {
    /// Connects and listens. `owner` is the user and group of the sockets.
    pub(crate) fn start(folder: &Path, record: &Record, owner: Option<(u32, u32)>) -> Result<Self> {
        let lock = lock(folder)?;
        let mut server = Self {
            lines: Vec::new(),
            lock: Some(lock),
        };
        hit("serve-locked")?;
        for was in record.disks.iter().filter_map(Disk::wire) {
            server.lines.push(Line::open(was, owner)?);
            hit("serve-listening")?;
        }
        Ok(server)
    }

    /// The sockets for QEMU.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = &Path> {
        self.lines.iter().map(|line| line.was.socket.as_path())
    }

    /// Bytes that have crossed the wire.
    pub(crate) fn fetched(&self) -> u64 {
        self.lines.iter().map(|line| line.wire.fetched()).sum()
    }

    /// Fails if a child that connects has ended, and its socket with it.
    pub(crate) fn check_children(&self) -> Result<()> {
        let gone = |line: &Line| {
            let wire = line.wire.broken().map(Error::from);
            wire.or_else(|| line.whole.as_ref()?.ended())
        };
        let ended = self.lines.iter().find_map(gone);
        match ended {
            None => Ok(()),
            Some(error) => Err(error
                .hint("start hyper2kvm serve again; a VM that is paused must then be started again (virsh destroy, virsh start)")),
        }
    }

    /// Fails unless every source answers, unchanged.
    pub(crate) fn answers(&self) -> Result<(), Trouble> {
        for line in &self.lines {
            for file in line.was.files() {
                let at = file.location().map_err(Trouble::Line)?;
                let now = line.wire.identify(&at).map_err(Trouble::Line)?;
                if let Some(what) = file.difference(&looks(now)) {
                    return Err(Trouble::Changed(format!("{}: {what}", file.url)));
                }
            }
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for line in self.lines.drain(..) {
            remove_sockets(&line.was.socket);
        }
        // After any failure here, the directory is in the state after SIGKILL.
        let _ = hit("serve-removed");
        // Last: a process that gets a new lock finds no socket of this run.
        if let Some(lock) = self.lock.take() {
            lock.remove();
        }
    }
}

/// The reason why a source is unreadable.
pub(crate) enum Trouble {
    Line(WireError),
    Changed(String),
}

fn looks(identity: Identity) -> Looks {
    Looks {
        size: identity.size,
        modified_ms: identity.modified.unwrap_or(0).saturating_mul(1000),
        etag: identity.etag,
    }
}

impl Line {
    fn open(was: &OnWire, owner: Option<(u32, u32)>) -> Result<Self> {
        let at = was.location()?;
        // Nobody else has the lock, so these are of a killed run.
        remove_sockets(&was.socket);
        let default = Access::default();
        let mut access = Access {
            patience: default.patience,
            ..was.access.clone()
        };
        let whole = match &was.whole {
            Some(whole) => {
                access.connections = Some(1);
                Some(Daemon::start(was, whole)?)
            }
            None => {
                access.socket = Some(was.socket.clone());
                None
            }
        };
        let wire = Wire::connect(&at, &access)?;
        let line = Self {
            was: was.clone(),
            wire,
            whole,
        };
        if line.whole.is_none() {
            line.wire.open(&at)?;
        }
        if let Some((user, group)) = owner {
            chown(&was.socket, Some(user), Some(group)).map_err(|e| {
                Error::failed(format!("giving {} to user {user}", was.socket.display())).because(e)
            })?;
        }
        Ok(line)
    }
}

/// Removes a socket, and the one through which `ssh` asks for a password.
fn remove_sockets(socket: &Path) {
    let _ = fs::remove_file(socket);
    let _ = fs::remove_file(socket.with_extension("ask"));
}

/// Locks a directory, which one run at a time serves.
fn lock(folder: &Path) -> Result<FileLock> {
    FileLock::of_directory(folder, LOCK, || {
        Error::failed(format!("another hyper2kvm serves {}", folder.display())).hint(
            "one is enough: it continues until the disks stand alone, or until it is ended (SIGTERM)",
        )
    })
}

/// Whether a process serves the directory.
pub(crate) fn is_served(folder: &Path) -> Result<bool> {
    let open = File::open(folder)
        .map_err(|e| Error::failed(format!("opening {}", folder.display())).because(e))?;
    match FileLock::take(&open, LOCK.as_ref(), folder, false) {
        Ok(_) => Ok(false),
        Err(LockError::Held { .. }) => Ok(true),
        Err(e) => {
            Err(Error::failed(format!("looking at {LOCK} in {}", folder.display())).because(e))
        }
    }
}

/// A `serve` that continues after this process has ended.
pub(crate) struct Left(Child);

/// Starts a process that serves the directory and continues after this one, unless there is one
/// already.
pub(crate) fn leave(folder: &Path, uri: &str) -> Result<Option<Left>> {
    if is_served(folder)? {
        return Ok(None);
    }
    let path = folder.join(LOG);
    let failed = |e: io::Error| {
        Error::failed(format!("starting hyper2kvm serve for {}", folder.display())).because(e)
    };
    let log = File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(failed)?;
    let directory = Scratch::new().map_err(failed)?;
    let name = directory.path().join("notify");
    let socket = UnixDatagram::bind(&name).map_err(failed)?;
    socket.set_read_timeout(Some(TICK)).map_err(failed)?;
    let words: [&OsStr; 6] = [
        "serve".as_ref(),
        "--progress".as_ref(),
        "plain".as_ref(),
        "--connect".as_ref(),
        uri.as_ref(),
        folder.as_ref(),
    ];
    let mut child = launcher::detached(&words, (NOTIFY, &name), &log).map_err(failed)?;
    let begin = Instant::now();
    let mut message = [0; 64];
    loop {
        if socket.recv(&mut message).is_ok() {
            return Ok(Some(Left(child)));
        }
        if let Some(status) = child.try_wait().map_err(failed)? {
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            let said = fs::read_to_string(&path).unwrap_or_default();
            let kind = code.map_or(ErrorKind::Failed, ErrorKind::from_code);
            return Err(Error::new(kind, "hyper2kvm serve ended at once")
                .because_of(crate::tool::clean(said.trim().as_bytes()))
                .hint(format!(
                    "start it by hand: hyper2kvm serve {}",
                    quote(folder)
                )));
        }
        if stop::requested() || begin.elapsed() > START {
            Left(child).end();
            return Err(match stop::requested() {
                true => Error::new(ErrorKind::Interrupted, "interrupted"),
                false => Error::failed(format!(
                    "hyper2kvm serve did not connect within {} s",
                    START.as_secs()
                ))
                .hint(format!("see {}", path.display())),
            });
        }
    }
}

impl Left {
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// Ends it again: the VM does not run.
    pub(crate) fn end(mut self) {
        let id = i32::try_from(self.0.id()).ok();
        if let Some(id) = id.and_then(Pid::from_raw) {
            let _ = kill_process(id, Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

pub(crate) fn hit(point: &str) -> Result<()> {
    failpoint::hit(point).map_err(|e| Error::failed("serving").because(e))
}

/// Notifies systemd, or another waiting process, that the sockets exist (`sd_notify`).
pub(crate) fn notify(state: &str) -> io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::SocketAddr;
    let Some(name) = std::env::var_os(NOTIFY) else {
        return Ok(());
    };
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.send_to_addr(state.as_bytes(), &address).map(drop)
}
