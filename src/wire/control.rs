//! The protocol of parent and child on their socket. There is one line of JSON in each direction,
//! and the bytes of a file follow the line that announces them. Secrets are sent over it too, never
//! by argument or environment.

use std::io::{self, BufRead, Read, Write};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::Ranges;
use super::error::WireError;
use super::url::{Location, Server};
use super::{Access, Identity, Listed};

/// The longest line: a listing of a large directory.
const MAX_LINE: u64 = 64 << 20;

/// The server and the options for the child.
#[derive(Serialize, Deserialize)]
pub(super) struct Order {
    pub(super) server: Server,
    pub(super) access: Access,
    pub(super) password: Option<Password>,
    /// The socket of its NBD server.
    pub(super) socket: PathBuf,
}

/// Erased when dropped; never shown.
#[derive(Clone)]
pub(super) struct Password(Zeroizing<String>);

impl Password {
    pub(super) fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    pub(super) fn text(&self) -> &str {
        &self.0
    }
}

impl Serialize for Password {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Password {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}

impl std::fmt::Debug for Password {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Password(..)")
    }
}

#[derive(Serialize, Deserialize)]
pub(super) enum Request {
    /// The first request.
    Start(Box<Order>),
    /// Exports the file, and returns its identity.
    Open(Location),
    /// Returns the present identity.
    Identify(Location),
    List(Location),
    /// Returns the contents of an export's dirty bitmaps.
    Dirty(Location),
    ReadWhole {
        at: Location,
        most: u64,
    },
    /// Announces that much of an open file will be read.
    Prepare(Location),
    /// Announces ranges of an open file that will be read in this order, each an offset and a
    /// length.
    Expect {
        at: Location,
        ranges: Vec<(u64, u64)>,
    },
    Status,
}

#[derive(Serialize, Deserialize)]
pub(super) enum Answer {
    Done,
    Identity(Identity),
    Listed(Vec<Listed>),
    Dirty(Option<Ranges>),
    /// That many bytes follow the line.
    Bytes(u64),
    Status(Status),
    Failed(WireError),
}

/// The child's statistics so far.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Status {
    pub(super) fetched: u64,
    /// The reason why the last read failed, or is being retried.
    pub(super) trouble: Option<WireError>,
}

pub(super) fn send(stream: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = Zeroizing::new(serde_json::to_vec(message)?);
    line.push(b'\n');
    stream.write_all(&line)
}

pub(super) fn receive<T: DeserializeOwned>(stream: &mut impl BufRead) -> io::Result<T> {
    let mut line = Zeroizing::new(Vec::new());
    stream
        .by_ref()
        .take(MAX_LINE)
        .read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&line)?)
}
