//! What every transport is behind: a dialler makes connections, a connection reads pieces of files.
//!
//! A connection is used by one thread. Several pieces may be under way on it; they arrive in any order.
//! The outer error of [`Connection::receive`] means that the connection is of no use any more, the inner
//! one that this piece cannot be had.

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

/// How long a connection may be silent while an answer is due.
pub(super) const STALL: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// A file that is open, as it was then.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) id: u64,
    pub(super) at: Location,
    pub(super) identity: Identity,
}

/// Bytes that are wanted of a file.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) target: Arc<Target>,
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

    /// How many pieces may be under way.
    fn depth(&self) -> usize;

    /// The shortest time in which the server has answered, where that is measured.
    fn answered_in(&self) -> Option<Duration> {
        None
    }

    /// Whether a piece can be asked for while others are under way.
    fn is_ready(&self, _wanted: &Wanted) -> bool {
        true
    }

    /// Makes the file ready to be read, where that takes a while.
    fn prepare(&mut self, _target: &Arc<Target>) -> Result<()> {
        Ok(())
    }

    /// Asks for a piece, which is known by `token` from now on.
    fn send(&mut self, token: u64, wanted: &Wanted) -> Result<()>;

    /// The next piece that is there.
    fn receive(&mut self) -> Result<(u64, Result<Vec<u8>>)>;
}

pub(super) trait Dial: Send + Sync {
    fn dial(&self) -> Result<Box<dyn Connection>>;

    /// Where the dirty bitmaps of the export at `at` say it was written to; `None` where it has none.
    fn dirty(&self, _at: &Location) -> Result<Option<Ranges>> {
        Ok(None)
    }

    /// Whether connections may be made before they are wanted: that takes long, and the server keeps them.
    fn may_prepare(&self) -> bool {
        false
    }

    /// What is asked for at a time when it is fetched ahead: more where a connection has one request under
    /// way, or a distant server would be waited for more than read.
    fn piece(&self) -> u64 {
        PIECE
    }

    /// What may be fetched ahead, of all files together: twice what is on its way from a server at 60 ms, so that
    /// no connection waits until a piece is used up.
    fn ahead(&self) -> u64 {
        64 << 20
    }
}

/// What is asked for at a time.
pub(super) const PIECE: u64 = 1 << 20;

/// What is counted and told about all connections.
#[derive(Debug, Default)]
pub(super) struct Meter {
    fetched: AtomicU64,
    trouble: Mutex<Trouble>,
}

/// What keeps reads from succeeding.
#[derive(Debug, Default)]
struct Trouble {
    what: Option<WireError>,
    /// A read was given up for it: no other that succeeds makes up for that.
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

    /// Something is being tried again.
    pub(super) fn note(&self, trouble: &WireError) {
        let mut noted = self.trouble();
        if !noted.lost {
            noted.what = Some(trouble.clone());
        }
    }

    /// A read that somebody waited for was given up.
    pub(super) fn lost(&self, trouble: &WireError) {
        *self.trouble() = Trouble {
            what: Some(trouble.clone()),
            lost: true,
        };
    }

    /// What was tried again has succeeded.
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
    /// By the identifier of the request.
    requests: BTreeMap<u64, Part>,
}

#[derive(Debug)]
struct Piece {
    bytes: Vec<u8>,
    open: usize,
    failed: Option<WireError>,
}

/// A part of a piece that was asked for.
#[derive(Debug, Clone)]
pub(super) struct Part {
    token: u64,
    /// In the piece.
    pub(super) start: usize,
    pub(super) length: usize,
    /// In the file.
    pub(super) offset: u64,
    pub(super) target: Arc<Target>,
}

impl Assembly {
    /// Divides a piece into about equal requests of at most `most` bytes, whole sectors where that allows it.
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

    /// The part that a request was for, which is answered now.
    pub(super) fn answered(&mut self, request: u64) -> Option<Part> {
        self.requests.remove(&request)
    }

    pub(super) fn bytes(&mut self, part: &Part) -> Option<&mut [u8]> {
        let piece = self.pieces.get_mut(&part.token)?;
        piece.bytes.get_mut(part.start..part.start + part.length)
    }

    /// Ends a part; the piece when it was the last one.
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
