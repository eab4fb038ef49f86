//! [`Transfer`]: the copy loop.
//!
//! Workers take pieces of the ranges; each reads its piece and writes the parts that are not zero.
//! The calling thread keeps the journal: it collects the pieces written since, flushes the target
//! and records them. Workers wait when too much is written and not recorded yet
//! ([`Transfer::window`]), so a kill costs no more than that. Each piece is sent to the device
//! immediately, by direct I/O or at the kernel's request. A flush then has little to do.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::extents::Extents;
use super::journal::{ExtentJournal, JournalFault};
use super::pace::Pace;
use memmap2::MmapMut;

use crate::block::{ALIGN, BlockRead, BlockWrite, is_zero};
use crate::failpoint;
use crate::memory::{self, LARGE_PAGE};
use crate::stop;

/// The size of a worker's read. Its source sends that in several requests.
const PIECE: u64 = 4 << 20;
/// The unit in which zeroes are detected: a cluster of a qcow2.
const GRAIN: usize = 64 << 10;
/// Pieces in progress: one is read while another is written.
const WORKERS: usize = 3;
/// Limits of [`Transfer::window`].
const LEAST_WINDOW: u64 = 32 << 20;
const MOST_WINDOW: u64 = 512 << 20;
/// The interval of progress reports.
const TICK: Duration = Duration::from_millis(100);

/// The handling of zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zeroes {
    /// The target already reads as zeroes.
    Leave,
    /// The target may contain anything.
    Write,
}

/// The record that shows after a kill which ranges need not be copied again.
#[derive(Debug)]
pub(crate) enum Checkpoint<'a> {
    /// Nothing: the target is flushed once, at the end.
    Never,
    /// The target's own allocation map; the target is flushed as often as a journal would be
    /// written.
    Target,
    /// A journal, written after each flush. Its ranges are skipped.
    Journal(&'a mut ExtentJournal),
}

impl<'a> From<Option<&'a mut ExtentJournal>> for Checkpoint<'a> {
    fn from(journal: Option<&'a mut ExtentJournal>) -> Self {
        journal.map_or(Self::Never, Self::Journal)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error("reading the source at byte {offset}")]
    Read {
        offset: u64,
        #[source]
        source: io::Error,
    },
    #[error("writing the copy at byte {offset}")]
    Write {
        offset: u64,
        #[source]
        source: io::Error,
    },
    #[error("flushing the copy")]
    Flush(#[source] io::Error),
    #[error(transparent)]
    Journal(#[from] JournalFault),
    #[error("keeping to the bandwidth")]
    Pace(#[source] io::Error),
    #[error("taking memory for the copy")]
    Memory(#[source] io::Error),
    #[error("{0}")]
    Interrupted(#[from] stop::Interrupted),
}

impl TransferError {
    /// The error of the operating system.
    pub(crate) fn cause(&self) -> Option<&io::Error> {
        match self {
            Self::Read { source, .. } | Self::Write { source, .. } => Some(source),
            Self::Flush(source) | Self::Pace(source) | Self::Memory(source) => Some(source),
            Self::Journal(fault) => Some(fault.cause()),
            Self::Interrupted(_) => None,
        }
    }

    /// Whether the target has no room for the copy.
    pub(crate) fn is_full(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        let full = |e: &io::Error| matches!(e.kind(), StorageFull | QuotaExceeded);
        !self.of_source() && self.cause().is_some_and(full)
    }

    /// Whether the source failed.
    fn of_source(&self) -> bool {
        matches!(self, Self::Read { .. })
    }
}

/// The result of a copy, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Read from the source.
    pub(crate) read: u64,
    /// Written bytes, without zeroes.
    pub(crate) written: u64,
    /// Skipped bytes that an earlier run has copied.
    pub(crate) resumed: u64,
}

/// The progress of a copy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    /// Finished bytes of the ranges, including those of an earlier run.
    pub(crate) done: u64,
}

/// A copy of ranges from one disk to another of at least its size.
pub(crate) struct Transfer<'a> {
    pub(crate) source: Arc<dyn BlockRead>,
    pub(crate) target: Arc<dyn BlockWrite>,
    /// The ranges to copy.
    pub(crate) ranges: &'a Extents,
    pub(crate) zeroes: Zeroes,
    pub(crate) checkpoint: Checkpoint<'a>,
    pub(crate) pace: Option<&'a Pace>,
    /// A flag that ends the copy.
    pub(crate) cancel: Option<Arc<AtomicBool>>,
}

/// The state shared by workers and the calling thread.
struct Shared {
    state: Mutex<State>,
    /// A piece was written, or a worker ended.
    written: Condvar,
    /// Pieces were recorded.
    recorded: Condvar,
}

struct State {
    queue: Pieces,
    /// Ranges written and not recorded.
    pending: Vec<Range<u64>>,
    pending_bytes: u64,
    /// Bytes assigned to workers and not recorded.
    open_bytes: u64,
    moved: Moved,
    workers: usize,
    error: Option<TransferError>,
}

/// The ranges, divided into pieces.
struct Pieces {
    ranges: VecDeque<Range<u64>>,
}

impl Pieces {
    fn next(&mut self) -> Option<Range<u64>> {
        let first = self.ranges.front_mut()?;
        // Pieces end at fixed borders, so that another run detects the same zeroes in a grain.
        let border = (first.start / PIECE + 1).saturating_mul(PIECE);
        let end = first.end.min(border);
        let piece = first.start..end;
        first.start = end;
        if first.is_empty() {
            self.ranges.pop_front();
        }
        Some(piece)
    }
}

impl Transfer<'_> {
    /// The limit of bytes assigned to workers and not recorded: 1/128 of the disk.
    fn window(&self) -> u64 {
        (self.target.size() / 128).clamp(LEAST_WINDOW, MOST_WINDOW)
    }

    /// Copies, and makes the copy durable. Ranges copied before an error are recorded too.
    pub(crate) fn run(mut self, progress: &mut dyn FnMut(Step)) -> Result<Moved, TransferError> {
        let left = match &self.checkpoint {
            Checkpoint::Journal(journal) => self.ranges.minus(journal.done()),
            Checkpoint::Target | Checkpoint::Never => self.ranges.clone(),
        };
        let before = self.ranges.bytes() - left.bytes();
        let workers = WORKERS.min(usize::try_from(left.bytes() / PIECE).unwrap_or(WORKERS) + 1);
        let shared = Shared {
            state: Mutex::new(State {
                queue: Pieces {
                    ranges: left.iter().collect(),
                },
                pending: Vec::new(),
                pending_bytes: 0,
                open_bytes: 0,
                moved: Moved {
                    resumed: before,
                    ..Moved::default()
                },
                workers,
                error: None,
            }),
            written: Condvar::new(),
            recorded: Condvar::new(),
        };
        let window = self.window();
        let mut checkpoint = std::mem::replace(&mut self.checkpoint, Checkpoint::Never);
        let limit = match checkpoint {
            Checkpoint::Never => u64::MAX,
            Checkpoint::Target | Checkpoint::Journal(_) => window,
        };
        let this = &self;
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| this.work(&shared, limit));
            }
            this.keep(&shared, window / 2, &mut checkpoint, &mut |bytes| {
                progress(Step {
                    done: before + bytes,
                });
            });
        });
        let state = shared.state.into_inner();
        let state = state.unwrap_or_else(PoisonError::into_inner);
        match state.error {
            None => Ok(state.moved),
            Some(error) => Err(error),
        }
    }

    fn ended(&self) -> bool {
        let raised = |flag: &Arc<AtomicBool>| flag.load(Ordering::SeqCst);
        stop::requested() || self.cancel.as_ref().is_some_and(raised)
    }

    /// Copies pieces until there are none left, or something failed.
    fn work(&self, shared: &Shared, limit: u64) {
        // Also after a panic: the thread that keeps the journal waits for the last worker.
        let _leaving = Leaving(shared);
        let mut buffer = Buffer::new().map_err(TransferError::Memory);
        while let Some(piece) = shared.take(limit) {
            let outcome = match (self.ended(), &mut buffer) {
                (true, _) => Err(stop::Interrupted.into()),
                (false, Ok(buffer)) => self.copy(piece.clone(), buffer),
                (false, Err(_)) => break,
            };
            let mut state = shared.lock();
            match outcome {
                Ok(written) => {
                    let len = piece.end - piece.start;
                    state.moved.read += len;
                    state.moved.written += written;
                    state.pending_bytes += len;
                    state.pending.push(piece);
                }
                Err(error) => state.fail(error),
            }
            drop(state);
            shared.written.notify_all();
            // After an error no worker waits for room any more.
            shared.recorded.notify_all();
        }
        if let Err(error) = buffer {
            shared.lock().fail(error);
            shared.recorded.notify_all();
        }
    }

    /// Copies one piece and returns the number of bytes that were not zero.
    fn copy(&self, piece: Range<u64>, buffer: &mut Buffer) -> Result<u64, TransferError> {
        let buffer = buffer.of(&piece);
        if let Some(pace) = self.pace {
            let turn = pace.take(buffer.len() as u64, &|| self.ended());
            if !turn.map_err(TransferError::Pace)? {
                return Err(stop::Interrupted.into());
            }
        }
        let offset = piece.start;
        let read = self.source.read_at(offset, buffer);
        read.map_err(|source| TransferError::Read { offset, source })?;
        let mut written = 0;
        for (range, zero) in runs(offset, buffer) {
            let at = offset + range.start as u64;
            let done = match zero {
                false => {
                    written += range.len() as u64;
                    self.target.write_at(at, &buffer[range])
                }
                true if self.zeroes == Zeroes::Write => self.target.zero_at(at, range.len() as u64),
                true => Ok(()),
            };
            done.map_err(|source| TransferError::Write { offset: at, source })?;
        }
        self.target.start_writeback(offset, piece.end - piece.start);
        Ok(written)
    }

    /// Flushes and records written pieces, `batch` bytes at a time, until the last worker has
    /// ended. Meanwhile the workers have the rest of the window, which is as large. So they do not
    /// wait for a flush that takes no longer than they do.
    fn keep(
        &self,
        shared: &Shared,
        batch: u64,
        checkpoint: &mut Checkpoint<'_>,
        progress: &mut dyn FnMut(u64),
    ) {
        let at_end = matches!(checkpoint, Checkpoint::Never);
        loop {
            let mut state = shared.lock();
            while state.workers > 0 && (at_end || state.pending_bytes < batch) {
                let read = state.moved.read;
                drop(state);
                progress(read);
                let waited = shared.written.wait_timeout(shared.lock(), TICK);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            let last = state.workers == 0;
            let is_complete = last && state.error.is_none();
            let pieces = std::mem::take(&mut state.pending);
            let bytes = std::mem::take(&mut state.pending_bytes);
            let read = state.moved.read;
            drop(state);
            progress(read);
            let flushed = self.target.flush().map_err(TransferError::Flush);
            // No error can be returned from here: the only choices are to wait or to abort.
            let _ = failpoint::hit("copy-flushed");
            let recorded = flushed.and_then(|()| match checkpoint {
                Checkpoint::Journal(journal) if is_complete && journal.is_needless() => Ok(()),
                Checkpoint::Journal(journal) => Ok(journal.append(&pieces, last)?),
                Checkpoint::Target | Checkpoint::Never => Ok(()),
            });
            let _ = failpoint::hit("copy-recorded");
            let mut state = shared.lock();
            state.open_bytes = state.open_bytes.saturating_sub(bytes);
            if let Err(error) = recorded {
                state.fail(error);
            }
            drop(state);
            shared.recorded.notify_all();
            if last {
                return;
            }
        }
    }
}

impl State {
    /// Records the first error. No further piece is assigned.
    fn fail(&mut self, error: TransferError) {
        self.queue.ranges.clear();
        self.error.get_or_insert(error);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next piece, as soon as at most `limit` bytes are assigned and not recorded.
    fn take(&self, limit: u64) -> Option<Range<u64>> {
        let mut state = self.lock();
        while state.open_bytes >= limit && state.error.is_none() {
            let waited = self.recorded.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        let piece = state.queue.next()?;
        state.open_bytes += piece.end - piece.start;
        Some(piece)
    }
}

/// The buffer of a worker. If the target writes past the page cache, data is sent to the device
/// from here; fewer pages mean fewer requests.
struct Buffer(MmapMut);

impl Buffer {
    fn new() -> io::Result<Self> {
        memory::zeroed(PIECE as usize + LARGE_PAGE + ALIGN).map(Self)
    }

    /// Space for a piece, with the alignment that it has on the disk.
    fn of(&mut self, piece: &Range<u64>) -> &mut [u8] {
        let inside = (piece.start % ALIGN as u64) as usize;
        let start = self.0.as_ptr().align_offset(LARGE_PAGE).min(LARGE_PAGE) + inside;
        &mut self.0[start..][..(piece.end - piece.start) as usize]
    }
}

struct Leaving<'a>(&'a Shared);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.lock().workers -= 1;
        self.0.written.notify_all();
    }
}

/// Splits bytes at `offset` of a disk into runs of grains that are all zero or not.
fn runs(offset: u64, bytes: &[u8]) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    let mut start = 0;
    while start < bytes.len() {
        let inside = ((offset + start as u64) % GRAIN as u64) as usize;
        let end = (start + GRAIN - inside).min(bytes.len());
        let zero = is_zero(&bytes[start..end]);
        match runs.last_mut() {
            Some((range, kind)) if *kind == zero => range.end = end,
            _ => runs.push((start..end, zero)),
        }
        start = end;
    }
    runs
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
