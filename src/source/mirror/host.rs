//! Files of another host: over the wire, or provided by a test.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};

use crate::disk::remote::{Doubt, RemoteFile};
use crate::wire::{self, Listed, Location, Wire, WireError};

type Result<T, E = WireError> = std::result::Result<T, E>;

/// The files of one remote host.
pub(crate) trait Host: Send + Sync {
    fn open(&self, at: &Location) -> Result<Arc<dyn RemoteFile>>;
    /// Reads a whole file; one that is larger than `most` is an error.
    fn read(&self, at: &Location, most: u64) -> Result<Vec<u8>>;
    fn list(&self, at: &Location) -> Result<Vec<Listed>>;
}

#[derive(Debug)]
struct OnWire(wire::Remote);

impl RemoteFile for OnWire {
    fn shown(&self) -> String {
        self.0.location.to_string()
    }

    fn size(&self) -> u64 {
        self.0.size
    }

    fn modified_ms(&self) -> u64 {
        self.0.identity.modified.unwrap_or(0).saturating_mul(1000)
    }

    fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(&self.0.socket)
    }

    fn export(&self) -> &str {
        &self.0.export
    }

    fn etag(&self) -> Option<String> {
        self.0.identity.etag.clone()
    }

    fn prepare(&self) {
        if let Err(e) = self.0.prepare() {
            tracing::debug!("{}: no connections are made ahead: {e}", self.0.location);
        }
    }

    fn expect(&self, ranges: &[(u64, u64)]) {
        if let Err(e) = self.0.expect(ranges) {
            tracing::debug!("{}: nothing is fetched ahead: {e}", self.0.location);
        }
    }

    fn dirty(&self) -> Result<Option<Vec<(u64, u64)>>, String> {
        self.0.dirty().map_err(|e| e.to_string())
    }

    fn check_unchanged(&self) -> Result<(), Doubt> {
        self.0.check_unchanged().map_err(|e| match e {
            WireError::Changed { was, now, .. } => {
                Doubt::Changed(format!("it had {was} and has {now} now"))
            }
            other if other.is_passing() => Doubt::Unreachable(other.to_string()),
            other => Doubt::Changed(format!("it cannot be looked at any more: {other}")),
        })
    }
}

impl Host for Wire {
    fn open(&self, at: &Location) -> Result<Arc<dyn RemoteFile>> {
        Ok(Arc::new(OnWire(Self::open(self, at)?)))
    }

    fn read(&self, at: &Location, most: u64) -> Result<Vec<u8>> {
        self.read_whole(at, most)
    }

    fn list(&self, at: &Location) -> Result<Vec<Listed>> {
        Self::list(self, at)
    }
}

/// A listed file, which is opened at its first read.
pub(super) struct Lazy {
    host: Arc<dyn Host>,
    at: Location,
    size: u64,
    modified_ms: u64,
    opened: OnceLock<Arc<dyn RemoteFile>>,
}

impl std::fmt::Debug for Lazy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lazy({})", self.at)
    }
}

impl Lazy {
    pub(super) fn new(host: Arc<dyn Host>, at: &Location, entry: &Listed) -> Self {
        Self {
            host,
            at: at.clone(),
            size: entry.size.unwrap_or(0),
            modified_ms: entry.modified.unwrap_or(0).saturating_mul(1000),
            opened: OnceLock::new(),
        }
    }

    fn file(&self) -> Result<Arc<dyn RemoteFile>> {
        if let Some(file) = self.opened.get() {
            return Ok(file.clone());
        }
        let file = self.host.open(&self.at)?;
        Ok(self.opened.get_or_init(|| file).clone())
    }
}

impl RemoteFile for Lazy {
    fn shown(&self) -> String {
        self.at.to_string()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn modified_ms(&self) -> u64 {
        self.modified_ms
    }

    fn connect(&self) -> io::Result<UnixStream> {
        self.file().map_err(io::Error::other)?.connect()
    }

    /// The export of a connected file.
    fn export(&self) -> &str {
        self.opened.get().map_or("", |file| file.export())
    }

    fn etag(&self) -> Option<String> {
        self.opened.get()?.etag()
    }

    fn prepare(&self) {
        if let Some(file) = self.opened.get() {
            file.prepare();
        }
    }

    fn expect(&self, ranges: &[(u64, u64)]) {
        if let Some(file) = self.opened.get() {
            file.expect(ranges);
        }
    }

    fn dirty(&self) -> Result<Option<Vec<(u64, u64)>>, String> {
        self.file().map_err(|e| e.to_string())?.dirty()
    }

    fn check_unchanged(&self) -> Result<(), Doubt> {
        let opened = self.opened.get();
        opened.map_or(Ok(()), |file| file.check_unchanged())
    }
}
