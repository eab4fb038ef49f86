//! hyper2kvm: makes a Windows VM disk boot on KVM with VirtIO.
//!
//! The pipeline is a chain of types, and the directories follow it:
//!
//! ```text
//!  SOURCE --source--> SourceVm --disk--> BlockRead --guest--> GuestRead --inspect--> Inspection
//!                                                                 |              |
//!                                            boot_path (ready?) <-+              v
//!  virtio-win ---drivers---> DriverSet -------------------------------> plan --> Plan: actions
//!                                                                                |
//!  overlay <------ GuestWrite <------ fix (journal, backup, undo log) <----------+
//!     |                                  |
//!     +--verify (read back)              +--> registry/*.reg, backup/
//!     +--disk::copy--> target            domain --> bootstrap.xml, final.xml     report --> report.json, .html
//!  types: the words they share (processor, firmware, disk bus, control set, registry key, PCI id, ...)
//! ```
//!
//! Dependencies point one way, down the table of directories in docs/architecture.md. At the top
//! are the verbs (`cli`) and whole tasks (`convert`, `boot`, ...). Then come results (`verify`,
//! `report`), decisions (`fix`, `plan`, `actions`) and facts (`inspect`, `boot_path`, `drivers`).
//! Below are access (`source`, `guest`, `disk`, `wire`, `registry`) and common code (`tool`, `ui`,
//! `types`, `error`, ...). Nothing below `cli` prints or exits.

// The threshold is in clippy.toml. Tests are left out: a table of cases may be long.
#![cfg_attr(not(test), deny(clippy::too_many_lines))]

pub(crate) mod actions;
pub(crate) mod batch;
pub mod block;
pub mod boot;
pub(crate) mod boot_path;
mod bytes;
pub(crate) mod check;
pub mod cli;
pub(crate) mod convert;
pub mod demo;
pub mod disk;
pub mod domain;
pub mod drivers;
pub mod error;
pub(crate) mod evidence;
pub(crate) mod failpoint;
pub(crate) mod files;
pub mod firstboot;
pub mod fix;
pub mod guest;
pub(crate) mod ids;
pub mod inspect;
pub(crate) mod later;
pub mod linux;
pub(crate) mod lock;
pub mod memory;
pub(crate) mod plan;
pub(crate) mod pull;
pub mod registry;
pub(crate) mod rehearse;
pub(crate) mod report;
pub(crate) mod session;
#[cfg(test)]
mod skip;
#[cfg(test)]
mod skip_tests;
pub mod source;
pub(crate) mod stop;
#[cfg(test)]
mod testing;
pub mod text;
pub(crate) mod threads;
pub mod timeline;
pub mod tool;
mod transfer;
pub(crate) mod types;
pub(crate) mod ui;
pub(crate) mod verify;
pub mod wire;
pub(crate) mod yaml;
