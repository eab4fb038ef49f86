//! `sync`: copies the disks of a VM that still runs, as far as nobody writes to them, and `convert
//! --from-sync` copies the rest once it is off.
//!
//! What a VM writes goes into the newest link of a chain (a snapshot); the links below it are frozen. Each
//! pass copies what they hold and the copy does not: what is used and was never copied, and what was
//! allocated in links above those of the pass before. The journal of a disk says what of the copy is as
//! the frozen links were; what has changed since is taken out of it before it is copied again.
//!
//! A running VM may have written data whose clusters its file system does not show as used yet. A pass
//! skips what looks free, so the last pass must not rely on "changed" alone: it copies whatever is used in
//! the end and not in the journal.

mod changes;
mod last;
mod pass;
mod release;
mod sample;
mod state;

pub(super) use last::{Last, Synced};
pub use pass::{Order, run};
pub(crate) use release::release;
pub use state::State;
pub(crate) use state::is_synced;
