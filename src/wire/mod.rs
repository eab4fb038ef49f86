//! Sources on the wire: files and NBD exports of other hosts, read without copying them first.
//!
//! A child process (`hyper2kvm __wire`) makes the connections. It gets its order over a socket,
//! gives up unneeded rights, and connects. It serves every file it opens as an export of one
//! read-only NBD server on a Unix socket. This process, and QEMU's programs, see only that socket.
//! The child ends when the last [`Wire`] is dropped, and dies with its parent.
//!
//! - [`url`]: the user's names of sources; [`error`]: errors
//! - [`control`]: the protocol of parent and child; [`child`]: the child's side
//! - [`server`]: the NBD server; [`service`]: files behind it, through the [`cache`]
//! - [`pool`]: connections and their requests; [`upstream`]: the interface of a transport
//! - [`ssh`] and [`sftp`], [`https`] with [`listing`], [`nbd`], [`tls`]; [`dial`] selects one
//!
//! If the launcher is not enabled (unit tests), a thread takes the role of the child.

mod cache;
mod child;
mod control;
mod dial;
mod dirty;
mod error;
pub mod fuzz;
mod https;
mod limit;
mod listing;
mod nbd;
pub(crate) mod nbd_protocol;
mod pool;
mod server;
mod service;
mod sftp;
mod ssh;
#[cfg(test)]
mod tests;
mod tls;
mod upstream;
mod url;

use std::fmt;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::files::Scratch;
use crate::stop;
use crate::tool::{Child, Cmd, launcher};
pub use child::run_if_asked;
use control::{Answer, Order, Password, Request, Status};
pub(crate) use error::{Result, WireError};
pub(crate) use url::{Location, Transport};

const VERB: &str = "__wire";
/// The interval at which the stop flag is checked while the child is silent.
const TICK: Duration = Duration::from_millis(100);
/// The time that the child may take for one answer in addition to its own limit.
const GRACE: Duration = Duration::from_secs(120);
/// The time for which a read waits for a broken connection: Windows gives up a disk after 20 s.
const PATIENCE: Duration = Duration::from_secs(18);
const MAX_PASSWORD: u64 = 4096;

/// The options for reaching sources: those of the command line, the same for the whole run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Access {
    /// The user name that replaces that in the URL.
    pub(crate) user: Option<String>,
    /// `-` is stdin, which is read once.
    pub(crate) password_file: Option<PathBuf>,
    pub(crate) ssh_identity: Option<PathBuf>,
    pub(crate) ssh_known_hosts: Option<PathBuf>,
    pub(crate) tls_ca: Option<PathBuf>,
    /// `sha256:HEX` of the server's own certificate.
    pub(crate) tls_fingerprint: Option<String>,
    /// [`Access::connections`] has the default.
    pub(crate) connections: Option<u32>,
    /// The number of retries of a request.
    pub(crate) retries: u32,
    pub(crate) source_command: Option<String>,
    /// The time for which a read waits for a broken connection before it fails. At most the default
    /// if a VM runs on the source.
    pub(crate) patience: Duration,
    /// The socket of the NBD server, if it is not in a private directory.
    pub(crate) socket: Option<PathBuf>,
}

impl Access {
    /// The limit of connections. A client of ssh handles 2 MiB per round trip, so a distant server
    /// needs more of them. Servers of other protocols limit sessions.
    fn connections(&self, server: &url::Server) -> u32 {
        let usual = match server {
            url::Server::Ssh { .. } => 12,
            _ => 8,
        };
        self.connections.unwrap_or(usual)
    }
}

impl Default for Access {
    fn default() -> Self {
        Self {
            user: None,
            password_file: None,
            ssh_identity: None,
            ssh_known_hosts: None,
            tls_ca: None,
            tls_fingerprint: None,
            connections: None,
            retries: 10,
            source_command: None,
            patience: PATIENCE,
            socket: None,
        }
    }
}

/// The data by which an unchanged file is recognised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) size: u64,
    /// Seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) modified: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) etag: Option<String>,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.size)?;
        if let Some(modified) = self.modified {
            write!(f, ", modified at {modified} s since 1970")?;
        }
        self.etag
            .as_ref()
            .map_or(Ok(()), |etag| write!(f, ", ETag {etag}"))
    }
}

/// Ranges of a file, each an offset and a length.
pub(crate) type Ranges = Vec<(u64, u64)>;

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) is_directory: bool,
    pub(crate) size: Option<u64>,
    /// Seconds since 1970.
    pub(crate) modified: Option<u64>,
}

/// A connected server. Clones share one child, which ends with the last.
#[derive(Debug, Clone)]
pub(crate) struct Wire {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    server: url::Server,
    patience: Duration,
    talk: Mutex<Talk>,
    /// As last reported by the server.
    fetched: AtomicU64,
    _directory: Option<Scratch>,
}

/// The conversation with the child.
#[derive(Debug)]
struct Talk {
    stream: BufReader<Patient>,
    child: Option<Child>,
    /// The failure of the child or its protocol.
    broken: Option<WireError>,
}

/// A file of the other host, exported on the Unix socket.
#[derive(Debug, Clone)]
pub(crate) struct Remote {
    pub(crate) location: Location,
    pub(crate) socket: PathBuf,
    /// Its name on the NBD server behind `socket`.
    pub(crate) export: String,
    pub(crate) size: u64,
    pub(crate) identity: Identity,
    wire: Wire,
}

impl Wire {
    /// Starts the child and connects.
    pub(crate) fn connect(at: &Location, access: &Access) -> Result<Self> {
        let failed = |doing: &str, error: &io::Error| WireError::host(at, doing, error, "");
        let (socket, directory) = match &access.socket {
            Some(socket) => (socket.clone(), None),
            None => {
                let directory =
                    Scratch::new().map_err(|e| failed("making a private directory", &e))?;
                (directory.path().join("nbd.sock"), Some(directory))
            }
        };
        let password = match &access.password_file {
            Some(file) => Some(password(file)?),
            None => None,
        };
        let order = Order {
            server: at.server.clone(),
            access: access.clone(),
            password,
            socket: socket.clone(),
        };
        let (ours, theirs) =
            UnixStream::pair().map_err(|e| failed("making a pair of sockets", &e))?;
        let stream = Patient::new(ours, access.patience + GRACE)
            .map_err(|e| failed("preparing a socket", &e))?;
        let child = start(theirs).map_err(|e| failed("starting the child that dials", &e))?;
        let wire = Self {
            shared: Arc::new(Shared {
                socket,
                server: at.server.clone(),
                patience: access.patience,
                talk: Mutex::new(Talk {
                    stream: BufReader::new(stream),
                    child,
                    broken: None,
                }),
                fetched: AtomicU64::new(0),
                _directory: directory,
            }),
        };
        wire.call(&Request::Start(Box::new(order)))?;
        Ok(wire)
    }

    /// Whether a file is on the connected server.
    pub(crate) fn reaches(&self, at: &Location) -> bool {
        self.shared.server == at.server
    }

    /// Exports the file on the Unix socket.
    pub(crate) fn open(&self, at: &Location) -> Result<Remote> {
        self.check(at)?;
        let identity = self.identity(&Request::Open(at.clone()))?;
        Ok(Remote {
            location: at.clone(),
            socket: self.shared.socket.clone(),
            export: at.export(),
            size: identity.size,
            identity,
            wire: self.clone(),
        })
    }

    /// Size and time of a file, without opening it.
    pub(crate) fn identify(&self, at: &Location) -> Result<Identity> {
        self.check(at)?;
        self.identity(&Request::Identify(at.clone()))
    }

    /// The entries of a directory; [`WireError::CannotList`] if the protocol or the server has no
    /// listing.
    pub(crate) fn list(&self, directory: &Location) -> Result<Vec<Listed>> {
        self.check(directory)?;
        match self.call(&Request::List(directory.clone()))?.0 {
            Answer::Listed(listed) => Ok(listed),
            _ => Err(self.nonsense()),
        }
    }

    /// Reads a small file as a whole; a larger one than `most` is an error.
    pub(crate) fn read_whole(&self, at: &Location, most: u64) -> Result<Vec<u8>> {
        self.check(at)?;
        let at = at.clone();
        Ok(self.call(&Request::ReadWhole { at, most })?.1)
    }

    /// Bytes of files that have crossed the wire so far. Does not wait while the child is busy.
    pub(crate) fn fetched(&self) -> u64 {
        self.status();
        self.shared.fetched.load(Ordering::Relaxed)
    }

    /// The reason why the last read over the NBD socket failed, or is being retried: its client
    /// sees only EIO.
    pub(crate) fn trouble(&self) -> Option<WireError> {
        self.status()?.trouble
    }

    /// The reason why the child that connects is unusable.
    pub(crate) fn broken(&self) -> Option<WireError> {
        self.status();
        let talk = self.shared.talk.try_lock().ok()?;
        talk.broken.clone()
    }

    fn status(&self) -> Option<Status> {
        let talk = self.shared.talk.try_lock().ok()?;
        match self.converse(talk, &Request::Status) {
            Ok((Answer::Status(status), _)) => {
                self.shared.fetched.store(status.fetched, Ordering::Relaxed);
                Some(status)
            }
            _ => None,
        }
    }

    fn check(&self, at: &Location) -> Result<()> {
        match self.reaches(at) {
            true => Ok(()),
            false => Err(WireError::usage(
                format!("{at} lies on another server than {}", self.shared.server),
                "name it by a URL of its own",
            )),
        }
    }

    fn identity(&self, request: &Request) -> Result<Identity> {
        match self.call(request)?.0 {
            Answer::Identity(identity) => Ok(identity),
            _ => Err(self.nonsense()),
        }
    }

    fn nonsense(&self) -> WireError {
        WireError::failed(
            &self.shared.server,
            "the child that dials talks nonsense",
            "",
        )
    }

    fn call(&self, request: &Request) -> Result<(Answer, Vec<u8>)> {
        let talk = self.shared.talk.lock();
        self.converse(talk.unwrap_or_else(PoisonError::into_inner), request)
    }

    /// An answer and the bytes after it.
    fn converse(
        &self,
        mut talk: std::sync::MutexGuard<'_, Talk>,
        request: &Request,
    ) -> Result<(Answer, Vec<u8>)> {
        if let Some(error) = &talk.broken {
            return Err(error.clone());
        }
        match talk.exchange(request) {
            Ok((Answer::Failed(error), _)) => Err(error),
            Ok(answer) => Ok(answer),
            Err(_) if stop::requested() => {
                talk.broken = Some(stop::Interrupted.into());
                Err(stop::Interrupted.into())
            }
            Err(error) => {
                let why = talk.why_it_ended(&error, self.shared.patience);
                let error = WireError::failed(&self.shared.server, why, "");
                talk.broken = Some(error.clone());
                Err(error)
            }
        }
    }
}

impl Remote {
    /// Fails unless size and time, or ETag, are those of the opened file.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        let now = self.wire.identify(&self.location)?;
        match now == self.identity {
            true => Ok(()),
            false => Err(WireError::Changed {
                at: self.location.to_string(),
                was: self.identity.to_string(),
                now: now.to_string(),
            }),
        }
    }

    /// The ranges that the export's dirty bitmaps show as written; `None` if it has none.
    pub(crate) fn dirty(&self) -> Result<Option<Ranges>> {
        match self.wire.call(&Request::Dirty(self.location.clone()))?.0 {
            Answer::Dirty(ranges) => Ok(ranges),
            _ => Err(WireError::failed(
                &self.location,
                "an answer of another kind",
                "",
            )),
        }
    }

    /// Announces that much of it will be read soon: the useful number of connections is opened in
    /// the meantime.
    pub(crate) fn prepare(&self) -> Result<()> {
        let request = Request::Prepare(self.location.clone());
        self.wire.call(&request).map(drop)
    }

    /// Announces that these ranges, each an offset and a length, will be read in this order. They
    /// are fetched ahead, and nothing between them is.
    pub(crate) fn expect(&self, ranges: &[(u64, u64)]) -> Result<()> {
        let request = Request::Expect {
            at: self.location.clone(),
            ranges: ranges.iter().take(service::MAX_EXPECTED).copied().collect(),
        };
        self.wire.call(&request).map(drop)
    }
}

/// Starts the child, or a thread in its role.
fn start(theirs: UnixStream) -> io::Result<Option<Child>> {
    if launcher::is_enabled() {
        let child = Cmd::own(VERB)
            // Freed memory is returned: by default glibc keeps half as much again as is fetched
            // ahead.
            .env("MALLOC_MMAP_THRESHOLD_", "1000000")
            .stdin(OwnedFd::from(theirs))
            .spawn();
        return child.map(Some).map_err(io::Error::other);
    }
    std::thread::Builder::new()
        .name("wire".into())
        .spawn(move || {
            let _ = child::converse(theirs, child::Confined::No);
        })?;
    Ok(None)
}

impl Talk {
    fn exchange(&mut self, request: &Request) -> io::Result<(Answer, Vec<u8>)> {
        control::send(self.stream.get_mut(), request)?;
        let answer = control::receive(&mut self.stream)?;
        let mut bytes = Vec::new();
        if let Answer::Bytes(length) = answer {
            self.stream.by_ref().take(length).read_to_end(&mut bytes)?;
            if bytes.len() as u64 != length {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok((answer, bytes))
    }

    fn why_it_ended(&mut self, error: &io::Error, patience: Duration) -> String {
        let Some(child) = &mut self.child else {
            return format!("the thread that dials ended: {error}");
        };
        if error.kind() == io::ErrorKind::TimedOut {
            child.kill();
            let limit = (patience + GRACE).as_secs();
            return format!("the child that dials did not answer within {limit} s and was killed");
        }
        let ended = child.wait(Duration::from_secs(2));
        child.kill();
        match ended {
            Err(ended) => format!("the child that dials ended: {ended}"),
            Ok(()) => format!("the child that dials ended: {error}"),
        }
    }
}

/// A stream that neither blocks for ever nor misses a signal.
#[derive(Debug)]
struct Patient {
    stream: UnixStream,
    limit: Duration,
    since: Instant,
}

impl Patient {
    fn new(stream: UnixStream, limit: Duration) -> io::Result<Self> {
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(TICK))?;
        Ok(Self {
            stream,
            limit,
            since: Instant::now(),
        })
    }

    fn wait<T>(&mut self, mut once: impl FnMut(&mut UnixStream) -> io::Result<T>) -> io::Result<T> {
        loop {
            match once(&mut self.stream) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
            if stop::requested() {
                return Err(stop::Interrupted.into());
            }
            if self.since.elapsed() > self.limit {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
}

impl Read for Patient {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.wait(|stream| stream.read(buf));
        self.since = Instant::now();
        read
    }
}

impl Write for Patient {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.wait(|stream| stream.write(buf));
        self.since = Instant::now();
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// Reads the password from a file or stdin, without the line end.
fn password(file: &Path) -> Result<Password> {
    static STDIN: OnceLock<std::result::Result<Password, WireError>> = OnceLock::new();
    if file == Path::new("-") {
        let read = || read_password(&mut io::stdin().lock(), file);
        return STDIN.get_or_init(read).clone();
    }
    let opened = std::fs::File::options()
        .read(true)
        // A pipe without a writer must not block the run.
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(file)
        .map_err(|e| unreadable(file, &e))?;
    read_password(&mut &opened, file)
}

fn unreadable(file: &Path, error: &dyn fmt::Display) -> WireError {
    WireError::usage(
        format!("reading the password file {}: {error}", file.display()),
        "--password-file names a file with the password as its first line, or - for stdin",
    )
}

fn read_password(from: &mut dyn Read, file: &Path) -> Result<Password> {
    let mut text = String::new();
    from.take(MAX_PASSWORD + 1)
        .read_to_string(&mut text)
        .map_err(|e| unreadable(file, &e))?;
    let first = text.lines().next().unwrap_or_default().to_owned();
    zeroize::Zeroize::zeroize(&mut text);
    if first.is_empty() || first.len() as u64 > MAX_PASSWORD {
        return Err(unreadable(file, &"it has no password in its first line"));
    }
    Ok(Password::new(first))
}
