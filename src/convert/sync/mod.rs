//! `sync`: copies the disks of a running VM, as far as nobody writes to them. `convert --from-sync`
//! copies the rest after the VM is off.
//!
//! A VM with a snapshot writes to the newest link of a chain; the links below it are frozen. Each
//! pass copies their data that the copy lacks. This is used ranges that were never copied, and
//! ranges allocated in links above those of the previous pass. The journal of a disk records the
//! ranges in which the copy equals the frozen links. Changed ranges are removed from it before they
//! are copied again.
//!
//! A running VM may have written data to clusters that its file system does not show as used yet. A
//! pass skips what looks free, so the last pass must not rely on changes alone. It copies whatever
//! is used in the end and missing from the journal.

mod changes;
mod last;
mod pass;
mod release;
mod sample;
mod state;

pub(super) use last::{Last, Synced};
pub use pass::{Order, run};
pub(crate) use release::release;
pub use state::SyncState;
pub(crate) use state::is_synced;
