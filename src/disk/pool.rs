//! [`Pool`]: several connections to one export, for copies.
//!
//! One connection answers in order: while it flushes, nothing is written, and while one piece is
//! sent nothing is read. A flush uses a connection of its own. A server that announces
//! `NBD_FLAG_CAN_MULTI_CONN` makes it cover the writes of the others.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::cache::Cached;
use super::nbd::Nbd;
use crate::block::{BlockRead, BlockWrite};

/// Connections besides the first one.
pub(super) const MORE: usize = 3;

pub(super) struct Pool {
    /// The connection for flushes, and for everything if there are no others.
    first: Arc<Cached<Nbd>>,
    more: Vec<Nbd>,
    next: AtomicUsize,
}

impl Pool {
    /// Creates a pool; `more` must be connections to the export of `first`.
    pub(super) fn new(first: Arc<Cached<Nbd>>, more: Vec<Nbd>) -> Self {
        Self {
            first,
            more,
            next: AtomicUsize::new(0),
        }
    }

    /// Announces the end of requests, except on the first connection.
    pub(super) fn disconnect(&self) {
        self.more.iter().for_each(Nbd::disconnect);
    }

    fn pick(&self) -> &dyn BlockWrite {
        if self.more.is_empty() {
            return &*self.first;
        }
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        &self.more[next % self.more.len()]
    }
}

impl BlockRead for Pool {
    fn size(&self) -> u64 {
        self.first.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.pick().read_at(offset, buf)
    }
}

impl BlockWrite for Pool {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.pick().write_at(offset, data)
    }

    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        self.pick().zero_at(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.first.flush()
    }
}
