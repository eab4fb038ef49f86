//! VMs whose disks are still to be copied: overlays on the source's chain.
//!
//! `convert --copy later` leaves such a directory, complete and bootable. [`Record`] (`later.json`)
//! has the chain below each disk and the facts about the source's files. They are compared at every
//! `boot`, `serve` and `pull`, because an overlay over other data is no disk. The module
//! [`crate::pull`] copies the rest until the disks stand alone, or deletes the VM.

pub(crate) mod chain;
pub(crate) mod holes;
pub(crate) mod record;
pub(crate) mod serve;
pub(crate) mod whole;
pub(crate) mod wire;

pub(crate) use record::Record;

/// The additional warning in reports of a VM on a source of another host.
pub(crate) const ON_WIRE: &str = "the source is on another host: the VM runs only while `hyper2kvm serve` runs for this directory (boot starts it) and the line is up";

/// The warning in every report of such a VM, until everything is pulled.
pub(crate) const WARNING: &str = "the disks are overlays on the source: it must stay where it is and must not change until `hyper2kvm pull` has copied what is left";
