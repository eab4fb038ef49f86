//! The interface of every transport: a dialler opens connections, a connection reads pieces of
//! files.
//!
//! A connection is used by one thread. Several pieces may be in flight on it; they arrive in any
//! order. The outer error of [`Connection::receive`] means that the connection has failed, the
//! inner one that this piece is unavailable.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Ranges;
use super::cache::SECTOR;
use super::control::Status;
use super::error::{Result, WireError};
use super::url::Location;
use super::{Identity, Listed};

/// The time for which a connection may be silent while an answer is due.
pub(super) const STALL: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// An open file, in the state in which it was opened.
#[derive(Debug)]
pub(super) struct RemoteFile {
    pub(super) id: u64,
    pub(super) at: Location,
    pub(super) identity: Identity,
}

/// The requested bytes of a file.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) target: Arc<RemoteFile>,
    pub(super) offset: u64,
    pub(super) length: usize,
}

pub(super) trait Connection: Send {
    fn identify(&mut self, at: &Location) -> Result<Identity>;

    fn list(&mut self, directory: &Location) -> Result<Vec<Listed>> {
        Err(WireError::CannotList {
            at: directory.to_string(),
            reason: "this protocol has no listing of directories".into(),
        })
    }

    /// The number of pieces that may be in flight.
    fn depth(&self) -> usize;

    /// The shortest response time of the server, if it is measured.
    fn answered_in(&self) -> Option<Duration> {
        None
    }

    /// Whether a piece can be requested while others are in flight.
    fn is_ready(&self, _wanted: &Wanted) -> bool {
        true
    }

    /// Prepares the file for reading, if that takes time.
    fn prepare(&mut self, _target: &Arc<RemoteFile>) -> Result<()> {
        Ok(())
    }

    /// Requests a piece, identified by `token`.
    fn send(&mut self, token: u64, wanted: &Wanted) -> Result<()>;

    /// The next piece that has arrived.
    fn receive(&mut self) -> Result<(u64, Result<Vec<u8>>)>;
}

pub(super) trait Dial: Send + Sync {
    fn dial(&self) -> Result<Box<dyn Connection>>;

    /// The ranges that the dirty bitmaps of the export at `at` show as written; `None` if it has
    /// none.
    fn dirty(&self, _at: &Location) -> Result<Option<Ranges>> {
        Ok(None)
    }

    /// Whether connections may be opened before they are needed: that takes long, and the server
    /// keeps them.
    fn may_prepare(&self) -> bool {
        false
    }

    /// The size of one request when fetching ahead. It is larger if a connection has one request in
    /// flight. Otherwise most of the time with a distant server would be waiting.
    fn piece(&self) -> u64 {
        PIECE
    }

    /// The bytes that may be fetched ahead for all files together: twice the amount in transit from
    /// a server at 60 ms. So no connection waits until a piece is used up.
    fn ahead(&self) -> u64 {
        64 << 20
    }
}

/// The default size of one request.
pub(super) const PIECE: u64 = 1 << 20;

/// Counters and states of all connections.
#[derive(Debug, Default)]
pub(super) struct Meter {
    fetched: AtomicU64,
    trouble: Mutex<Trouble>,
}

/// The reason why reads do not succeed.
#[derive(Debug, Default)]
struct Trouble {
    what: Option<WireError>,
    /// Whether a read was given up because of it; no later success resets that.
    lost: bool,
}

impl Meter {
    pub(super) fn count(&self, bytes: usize) {
        self.fetched.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    fn trouble(&self) -> MutexGuard<'_, Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the reason for a retry.
    pub(super) fn note(&self, trouble: &WireError) {
        let mut noted = self.trouble();
        if !noted.lost {
            noted.what = Some(trouble.clone());
        }
    }

    /// Records that a read with a waiting reader was given up.
    pub(super) fn lost(&self, trouble: &WireError) {
        *self.trouble() = Trouble {
            what: Some(trouble.clone()),
            lost: true,
        };
    }

    /// Records that a retry has succeeded.
    pub(super) fn settled(&self) {
        let mut noted = self.trouble();
        if !noted.lost {
            noted.what = None;
        }
    }

    pub(super) fn status(&self) -> Status {
        Status {
            fetched: self.fetched(),
            trouble: self.trouble().what.clone(),
        }
    }
}

/// Pieces that arrive in answers to several requests each.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    pieces: BTreeMap<u64, Piece>,
    /// The parts by the identifier of the request.
    requests: BTreeMap<u64, Part>,
}

#[derive(Debug)]
struct Piece {
    bytes: Vec<u8>,
    open: usize,
    failed: Option<WireError>,
}

/// A requested part of a piece.
#[derive(Debug, Clone)]
pub(super) struct Part {
    token: u64,
    /// The offset in the piece.
    pub(super) start: usize,
    pub(super) length: usize,
    /// The offset in the file.
    pub(super) offset: u64,
    pub(super) target: Arc<RemoteFile>,
}

impl Assembly {
    /// Divides a piece into roughly equal requests of at most `most` bytes, whole sectors if
    /// possible.
    pub(super) fn divide(&mut self, token: u64, wanted: &Wanted, most: usize) -> Vec<Part> {
        let count = wanted.length.div_ceil(most.max(1)).max(1);
        let each = wanted
            .length
            .div_ceil(count)
            .next_multiple_of(SECTOR as usize);
        let each = each.min(most.max(1));
        let mut parts = Vec::with_capacity(count);
        let mut start = 0;
        while start < wanted.length {
            let length = each.min(wanted.length - start);
            parts.push(Part {
                token,
                start,
                length,
                offset: wanted.offset + start as u64,
                target: wanted.target.clone(),
            });
            start += length;
        }
        self.pieces.insert(
            token,
            Piece {
                bytes: vec![0; wanted.length],
                open: 0,
                failed: None,
            },
        );
        parts
    }

    pub(super) fn asked(&mut self, request: u64, part: Part) {
        if let Some(piece) = self.pieces.get_mut(&part.token) {
            piece.open += 1;
        }
        self.requests.insert(request, part);
    }

    /// Removes and returns the part of a request that is answered.
    pub(super) fn answered(&mut self, request: u64) -> Option<Part> {
        self.requests.remove(&request)
    }

    pub(super) fn bytes(&mut self, part: &Part) -> Option<&mut [u8]> {
        let piece = self.pieces.get_mut(&part.token)?;
        piece.bytes.get_mut(part.start..part.start + part.length)
    }

    /// Ends a part; returns the piece after its last one.
    pub(super) fn finish(
        &mut self,
        part: &Part,
        failed: Option<WireError>,
    ) -> Option<(u64, Result<Vec<u8>>)> {
        let piece = self.pieces.get_mut(&part.token)?;
        piece.failed = piece.failed.take().or(failed);
        piece.open = piece.open.saturating_sub(1);
        if piece.open > 0 {
            return None;
        }
        let piece = self.pieces.remove(&part.token)?;
        Some((
            part.token,
            match piece.failed {
                Some(error) => Err(error),
                None => Ok(piece.bytes),
            },
        ))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }
}
