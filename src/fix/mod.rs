//! Carries out a plan on a writable copy of the disk, and can roll it back.
//!
//! The fix never touches the user's disk: it works on an overlay ([`apply`]). `--in-place` then
//! commits the overlay's changed blocks to the disk ([`commit`]). Their old contents are saved to
//! an undo log before. So a rollback restores the disk byte for byte, whatever happened in between.

pub(crate) mod apply;
pub(crate) mod commit;
pub mod journal;
pub mod trim;
pub(crate) mod trusted;
