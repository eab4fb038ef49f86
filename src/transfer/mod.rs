//! Copies ranges of a disk, so that the copy survives whatever ends it.
//!
//! [`Transfer`] reads in parallel, leaves zeroes out, keeps to a [`Pace`] and records in an
//! [`ExtentJournal`] what is durable on the target. A copy that was killed reads the journal and copies
//! the rest. [`Extents`] is the arithmetic of ranges.

mod extents;
mod journal;
mod pace;
mod run;

pub(crate) use extents::Extents;
pub(crate) use journal::{ExtentJournal, JournalFault, Opened};
pub(crate) use pace::Pace;
pub(crate) use run::{Checkpoint, Step, Transfer, TransferError, Zeroes};
