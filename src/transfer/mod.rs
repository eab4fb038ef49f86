//! Copies ranges of a disk in a form that survives any end of the process.
//!
//! [`Transfer`] reads in parallel, skips zeroes, observes a [`Pace`] and records the durable ranges
//! of the target in an [`ExtentJournal`]. After a kill, the next run reads the journal and copies
//! the rest. [`Extents`] is the arithmetic of ranges.

mod extents;
mod journal;
mod pace;
mod run;

pub(crate) use extents::Extents;
pub(crate) use journal::{ExtentJournal, Foundation, JournalFault};
pub(crate) use pace::Pace;
pub(crate) use run::{Checkpoint, Step, Transfer, TransferError, Zeroes};
