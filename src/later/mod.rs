//! VMs whose disks are still to be copied: overlays on the source's chain.
//!
//! `convert --copy later` leaves such a directory, complete and bootable. [`Record`] (`later.json`) says what
//! each disk is on and how the files of the source looked. They are compared at every `boot`, `serve` and
//! `pull`: an overlay over something else is no disk. [`crate::pull`] copies what is left, until the disks
//! stand alone, or gives the VM up.

pub(crate) mod chain;
pub(crate) mod holes;
pub(crate) mod record;
pub(crate) mod serve;
pub(crate) mod whole;
pub(crate) mod wire;

pub(crate) use record::Record;

/// What reports of a VM on a source of another host warn of besides.
pub(crate) const ON_WIRE: &str = "the source is on another host: the VM runs only while `hyper2kvm serve` runs for this directory (boot starts it) and the line is up";

/// What every report of such a VM warns of, until everything is pulled.
pub(crate) const WARNING: &str = "the disks are overlays on the source: it must stay where it is and must not change until `hyper2kvm pull` has copied what is left";
