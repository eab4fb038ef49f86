//! hyper2kvm: makes a Windows VM disk boot on KVM with VirtIO.
//!
//! The pipeline is a chain of types, and the directories follow it:
//!
//! ```text
//!  SOURCE --source--> SourceVm --disk--> BlockRead --guest--> GuestRead --inspect--> Inspection
//!                                                                 |              |
//!                                            boot_path (ready?) <-+              v
//!  virtio-win ---drivers---> DriverSet -------------------------------> plan --> Plan
//!                                                                                |
//!  overlay <------ GuestWrite <------ fix (journal, backup, undo log) <----------+
//!     |                                  |
//!     +--verify (read back)              +--> registry/*.reg, backup/
//!     +--disk::copy--> target            domain --> bootstrap.xml, final.xml     report --> report.json, .html
//! ```
//!
//! Dependencies point one way, down the table of directories in docs/architecture.md: the verbs (`cli`), whole
//! tasks (`convert`, `boot`, ...), results (`verify`, `report`), decisions (`fix`, `plan`), facts (`inspect`,
//! `boot_path`, `drivers`), access (`source`, `guest`, `disk`, `wire`, `registry`), and what all of them use
//! (`tool`, `ui`, `error`, ...). Nothing below `cli` prints or exits.

pub mod actions;
pub mod batch;
pub mod block;
pub mod boot;
pub mod boot_path;
mod bytes;
pub mod check;
pub mod cli;
pub mod convert;
pub mod demo;
pub mod disk;
pub mod domain;
pub mod drivers;
pub mod error;
pub mod evidence;
pub mod failpoint;
pub mod files;
pub mod firstboot;
pub mod fix;
pub mod guest;
pub mod ids;
pub mod inspect;
pub(crate) mod later;
pub mod linux;
pub mod lock;
pub mod plan;
pub(crate) mod pull;
pub mod registry;
pub(crate) mod rehearse;
pub mod report;
pub mod session;
#[cfg(test)]
mod skip;
#[cfg(test)]
mod skip_tests;
pub mod source;
pub mod stop;
#[cfg(test)]
mod testing;
pub mod text;
pub mod timeline;
pub mod tool;
mod transfer;
pub mod types;
pub mod ui;
pub mod verify;
#[allow(
    dead_code,
    unused_imports,
    reason = "sources on the wire are used from the next change on"
)]
pub mod wire;
