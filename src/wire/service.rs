//! Files of the other side, read through the cache and over all connections.
//!
//! A large read is divided into pieces over several connections. A small one fetches only the bytes
//! it needs: `inspect` must not cost more than it reads. Data is fetched ahead if it was announced
//! ([`Service::expect`]). So is the next part of a long stream, a sixteenth of its length so far.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use super::Ranges;
use super::cache::{Cache, SECTOR};
use super::error::{Result, WireError};
use super::pool::{Output, Pending, Pool, Task};
use super::upstream::{Meter, PIECE, RemoteFile, Wanted};
use super::url::Location;
use super::{Identity, Listed};

/// The length from which sequential reads are a stream.
const STREAM: u64 = 8 << 20;
/// The part of a stream's length so far that is read ahead without an announcement.
const AHEAD_PART: u64 = 16;
/// The distance from the end of the previous request at which a request still belongs to its
/// stream.
const NEAR: u64 = 4 << 20;
/// The length of a stream after which its data is not cached.
const NOT_KEPT: u64 = 64 << 20;
/// The most announced ranges that are fetched ahead.
pub(super) const MAX_EXPECTED: usize = 1 << 20;

/// An open file, and its read pattern.
pub(super) struct Opened {
    pub(super) target: Arc<RemoteFile>,
    flow: Mutex<Flow>,
}

/// The order of reads.
#[derive(Default)]
struct Flow {
    /// The end of the last read, and the present length of the stream.
    next: u64,
    run: u64,
    expected: Vec<(u64, u64)>,
    /// The first range in `expected`, and the offset in it, that was not requested yet.
    at: (usize, u64),
    ahead: BTreeMap<u64, Ahead>,
    /// The offset up to which the stream was read ahead.
    ahead_end: u64,
}

/// A piece that was fetched, or is being fetched, ahead.
struct Ahead {
    length: u64,
    left: u64,
    piece: Arc<Mutex<Piece>>,
}

enum Piece {
    Coming(Pending),
    Here(Arc<Vec<u8>>),
    Failed,
}

impl Piece {
    fn bytes(&mut self) -> Option<Arc<Vec<u8>>> {
        if let Self::Coming(pending) = self {
            *self = match pending.wait() {
                Ok(Output::Bytes(bytes)) => Self::Here(Arc::new(bytes)),
                _ => Self::Failed,
            };
        }
        match self {
            Self::Here(bytes) => Some(bytes.clone()),
            _ => None,
        }
    }
}

/// A part of the bytes of a piece, without a copy.
pub(super) struct Answer {
    bytes: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl Answer {
    /// Empty if the range does not lie in the bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(self.range.clone()).unwrap_or_default()
    }
}

impl From<Vec<u8>> for Answer {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            range: 0..bytes.len(),
            bytes: Arc::new(bytes),
        }
    }
}

pub(super) struct Service {
    pool: Pool,
    meter: Arc<Meter>,
    cache: Mutex<Cache>,
    files: RwLock<HashMap<String, Arc<Opened>>>,
    next_id: AtomicU64,
    /// Ranges of files that are being fetched.
    claims: Mutex<Vec<(u64, u64, u64)>>,
    released: Condvar,
    /// Bytes fetched ahead and not read yet.
    ahead: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unexpected(at: &Location) -> WireError {
    WireError::failed(at, "an answer of another kind", "")
}

impl Service {
    pub(super) fn new(pool: Pool, meter: Arc<Meter>, cache: File) -> Self {
        Self {
            pool,
            meter,
            cache: Mutex::new(Cache::new(cache)),
            files: RwLock::default(),
            next_id: AtomicU64::new(1),
            claims: Mutex::default(),
            released: Condvar::new(),
            ahead: AtomicU64::new(0),
        }
    }

    pub(super) fn meter(&self) -> &Meter {
        &self.meter
    }

    pub(super) fn connect(&self) -> Result<()> {
        self.pool.call(Task::Connect).map(drop)
    }

    pub(super) fn identify(&self, at: &Location) -> Result<Identity> {
        match self.pool.call(Task::Identify(at.clone()))? {
            Output::Identity(identity) => Ok(identity),
            _ => Err(unexpected(at)),
        }
    }

    pub(super) fn dirty(&self, at: &Location) -> Result<Option<Ranges>> {
        self.pool.dirty(at)
    }

    pub(super) fn list(&self, at: &Location) -> Result<Vec<Listed>> {
        match self.pool.call(Task::List(at.clone()))? {
            Output::Listed(listed) => Ok(listed),
            _ => Err(unexpected(at)),
        }
    }

    /// The file of that export, if it is open.
    pub(super) fn file(&self, export: &str) -> Option<Arc<Opened>> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        let found = files.get(export);
        // A VM is given a socket, and uses no name if there is a single file.
        let only = || {
            let mut all = files.values();
            all.next().filter(|_| export.is_empty() && files.len() == 1)
        };
        found.or_else(only).cloned()
    }

    /// Opens the file; one that is already open must be unchanged.
    pub(super) fn open(&self, at: &Location) -> Result<Arc<Opened>> {
        let identity = self.identify(at)?;
        let export = at.export();
        if let Some(open) = self.file(&export) {
            if open.target.identity == identity {
                return Ok(open);
            }
            return Err(WireError::Changed {
                at: at.to_string(),
                was: open.target.identity.to_string(),
                now: identity.to_string(),
            });
        }
        let opened = Arc::new(Opened {
            target: Arc::new(RemoteFile {
                id: self.next_id.fetch_add(1, Ordering::Relaxed),
                at: at.clone(),
                identity,
            }),
            flow: Mutex::default(),
        });
        let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        files.insert(export, opened.clone());
        Ok(opened)
    }

    /// Reads a file of at most `most` bytes.
    pub(super) fn read_whole(&self, at: &Location, most: u64) -> Result<Vec<u8>> {
        let file = self.open(at)?;
        let size = file.target.identity.size;
        let length = usize::try_from(size).ok().filter(|_| size <= most);
        match length {
            Some(length) => Ok(self.read(&file, 0, length)?.bytes().to_vec()),
            None => Err(WireError::TooLarge {
                at: at.to_string(),
                size,
                most,
            }),
        }
    }

    /// Announces that much of the file will be read: connections are opened in the meantime.
    pub(super) fn prepare(&self, at: &Location) -> Result<()> {
        let file = self.file(&at.export()).ok_or_else(|| unexpected(at))?;
        self.pool.prepare(&file.target);
        Ok(())
    }

    /// Announces that these ranges will be read, in this order.
    pub(super) fn expect(&self, at: &Location, ranges: Vec<(u64, u64)>) -> Result<()> {
        let file = self.file(&at.export()).ok_or_else(|| unexpected(at))?;
        let size = file.target.identity.size;
        let inside = |&(offset, length): &(u64, u64)| {
            length > 0 && offset.checked_add(length).is_some_and(|end| end <= size)
        };
        if ranges.len() > MAX_EXPECTED || !ranges.iter().all(inside) {
            return Err(WireError::usage(
                format!("{at}: a range that is announced lies outside"),
                "",
            ));
        }
        let mut flow = lock(&file.flow);
        self.forget(&file, &mut flow);
        flow.at = (0, 0);
        flow.expected = ranges;
        Ok(())
    }

    /// Records a read, in the order of requests, and fetches ahead.
    pub(super) fn note(&self, file: &Opened, offset: u64, length: u64) {
        let mut flow = lock(&file.flow);
        let near = offset.saturating_add(NEAR) >= flow.next && offset <= flow.next + PIECE;
        if near {
            flow.run += length;
            flow.next = flow.next.max(offset + length);
        } else {
            (flow.run, flow.next) = (length, offset + length);
            flow.ahead_end = 0;
            if flow.expected.is_empty() {
                self.forget(file, &mut flow);
            }
        }
        if flow.expected.is_empty() {
            self.ahead_of_stream(file, &mut flow);
        } else {
            self.ahead_as_expected(file, &mut flow, offset + length);
        }
    }

    fn ahead_of_stream(&self, file: &Opened, flow: &mut Flow) {
        if flow.run < STREAM {
            return;
        }
        let most = (flow.run / AHEAD_PART).min(self.pool.ahead());
        let end = flow
            .next
            .saturating_add(most)
            .min(file.target.identity.size);
        let mut start = flow.ahead_end.max(flow.next);
        while start + PIECE <= end {
            let piece = self.pool.piece().min((end - start) / PIECE * PIECE);
            if self.ahead.load(Ordering::Relaxed) + piece > self.pool.ahead() {
                return;
            }
            self.fetch_ahead(file, flow, start, piece);
            start += piece;
            flow.ahead_end = start;
        }
    }

    fn ahead_as_expected(&self, file: &Opened, flow: &mut Flow, read: u64) {
        // The following range is already being read.
        while let Some(&(offset, length)) = flow.expected.get(flow.at.0) {
            if offset + length <= read {
                flow.at = (flow.at.0 + 1, 0);
                continue;
            }
            flow.at.1 = flow.at.1.max(read.saturating_sub(offset));
            break;
        }
        let most = self.pool.piece();
        while self.ahead.load(Ordering::Relaxed) + most <= self.pool.ahead() {
            let Some(&(offset, length)) = flow.expected.get(flow.at.0) else {
                return;
            };
            let piece = (length - flow.at.1).min(most);
            if piece == 0 {
                flow.at = (flow.at.0 + 1, 0);
                continue;
            }
            self.fetch_ahead(file, flow, offset + flow.at.1, piece);
            flow.at.1 += piece;
        }
    }

    fn fetch_ahead(&self, file: &Opened, flow: &mut Flow, offset: u64, length: u64) {
        if flow.ahead.contains_key(&offset) {
            return;
        }
        let wanted = Wanted {
            target: file.target.clone(),
            offset,
            length: length as usize,
        };
        self.ahead.fetch_add(length, Ordering::Relaxed);
        let pending = self.pool.ask(Task::Read(wanted), false);
        flow.ahead.insert(
            offset,
            Ahead {
                length,
                left: length,
                piece: Arc::new(Mutex::new(Piece::Coming(pending))),
            },
        );
    }

    /// Discards data fetched ahead and not read; what has arrived goes to the cache.
    fn forget(&self, file: &Opened, flow: &mut Flow) {
        for (offset, ahead) in std::mem::take(&mut flow.ahead) {
            self.ahead.fetch_sub(ahead.length, Ordering::Relaxed);
            // A reader that waits for one holds its lock.
            if let Ok(piece) = ahead.piece.try_lock()
                && let Piece::Here(bytes) = &*piece
            {
                let size = file.target.identity.size;
                lock(&self.cache).write(file.target.id, offset, bytes, size);
            }
        }
    }

    /// The pieces fetched ahead for a range; used ones no longer count.
    fn take_ahead(&self, file: &Opened, offset: u64, end: u64) -> Vec<Found> {
        let mut found = Vec::new();
        let mut used_up = Vec::new();
        let mut flow = lock(&file.flow);
        let first = offset.saturating_sub(self.pool.piece());
        for (&start, ahead) in flow.ahead.range_mut(first..end) {
            let (from, to) = (start.max(offset), (start + ahead.length).min(end));
            if from < to {
                ahead.left = ahead.left.saturating_sub(to - from);
                let piece = ahead.piece.clone();
                found.push(Found {
                    piece,
                    start,
                    range: from..to,
                });
                if ahead.left == 0 {
                    used_up.push(start);
                }
            }
        }
        for &start in &used_up {
            if let Some(ahead) = flow.ahead.remove(&start) {
                self.ahead.fetch_sub(ahead.length, Ordering::Relaxed);
            }
        }
        if !used_up.is_empty() {
            self.ahead_as_expected(file, &mut flow, 0);
        }
        found
    }

    /// Reads a range inside the file.
    pub(super) fn read(&self, file: &Opened, offset: u64, length: usize) -> Result<Answer> {
        let target = &file.target;
        let size = target.identity.size;
        let end = offset.checked_add(length as u64).filter(|end| *end <= size);
        if end.is_none() {
            return Err(WireError::usage(
                format!("{}: bytes {offset}+{length} lie outside", target.at),
                "",
            ));
        }
        let run = lock(&file.flow).run;
        let end = offset + length as u64;
        let found = self.take_ahead(file, offset, end);
        if let [one] = &found[..]
            && one.range == (offset..end)
            && let Some(answer) = one.answer()
        {
            return Ok(answer);
        }
        let mut out = vec![0; length];
        let place =
            |range: Range<u64>| (range.start - offset) as usize..(range.end - offset) as usize;
        let mut at = offset;
        for one in found {
            let Some(answer) = one.answer() else {
                continue;
            };
            if one.range.start > at {
                let part = &mut out[place(at..one.range.start)];
                self.read_cached(target, at, part, run)?;
            }
            at = one.range.end;
            out[place(one.range)].copy_from_slice(answer.bytes());
        }
        if at < end {
            self.read_cached(target, at, &mut out[place(at..end)], run)?;
        }
        Ok(out.into())
    }

    fn read_cached(
        &self,
        target: &Arc<RemoteFile>,
        offset: u64,
        out: &mut [u8],
        run: u64,
    ) -> Result<()> {
        let (start, end) = sectors(offset, out.len() as u64, target.identity.size);
        // Other readers of the same data wait until it arrives.
        let claim = self.claim(target.id, start, end);
        let gaps = lock(&self.cache).read(target.id, offset, out);
        let mut pieces = Vec::new();
        for (at, length) in gaps {
            let (mut from, to) = sectors(offset + at as u64, length as u64, target.identity.size);
            while from < to {
                let next = (from + PIECE).min(to);
                let wanted = Wanted {
                    target: target.clone(),
                    offset: from,
                    length: (next - from) as usize,
                };
                pieces.push((from, self.pool.ask(Task::Read(wanted), true)));
                from = next;
            }
        }
        for (from, pending) in pieces {
            let Output::Bytes(bytes) = pending.wait()? else {
                return Err(unexpected(&target.at));
            };
            let until = from + bytes.len() as u64;
            let (first, last) = (from.max(offset), until.min(offset + out.len() as u64));
            out[(first - offset) as usize..(last - offset) as usize]
                .copy_from_slice(&bytes[(first - from) as usize..(last - from) as usize]);
            if run <= NOT_KEPT {
                lock(&self.cache).write(target.id, from, &bytes, target.identity.size);
            }
        }
        drop(claim);
        Ok(())
    }

    fn claim(&self, id: u64, start: u64, end: u64) -> Claim<'_> {
        let mut claims = lock(&self.claims);
        let overlaps =
            |&(other, from, to): &(u64, u64, u64)| other == id && from < end && start < to;
        while claims.iter().any(overlaps) {
            let woken = self.released.wait(claims);
            claims = woken.unwrap_or_else(PoisonError::into_inner);
        }
        claims.push((id, start, end));
        Claim {
            service: self,
            range: (id, start, end),
        }
    }
}

/// A piece that was fetched ahead, and its part of a range.
struct Found {
    piece: Arc<Mutex<Piece>>,
    /// The start of the piece.
    start: u64,
    range: Range<u64>,
}

impl Found {
    /// The piece, once it has arrived; `None` if it could not be fetched.
    fn answer(&self) -> Option<Answer> {
        let bytes = lock(&self.piece).bytes()?;
        let place = |at: u64| usize::try_from(at - self.start).ok();
        let range = place(self.range.start)?..place(self.range.end)?;
        bytes.get(range.clone())?;
        Some(Answer { bytes, range })
    }
}

/// Whole sectors around a range.
fn sectors(offset: u64, length: u64, size: u64) -> (u64, u64) {
    let end = (offset + length).div_ceil(SECTOR) * SECTOR;
    (offset / SECTOR * SECTOR, end.min(size))
}

/// A range that no other reader fetches at the same time.
struct Claim<'s> {
    service: &'s Service,
    range: (u64, u64, u64),
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut claims = lock(&self.service.claims);
        if let Some(at) = claims.iter().position(|claim| *claim == self.range) {
            claims.swap_remove(at);
        }
        self.service.released.notify_all();
    }
}

/// A file for [`Cache`], without a name.
pub(super) fn cache_file() -> io::Result<File> {
    tempfile::tempfile()
}
