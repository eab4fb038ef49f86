//! hyper2kvm: makes a Windows VM disk boot on KVM with VirtIO.
//!
//! The pipeline is a chain of types, and the folders follow it:
//!
//! ```text
//!  SOURCE --disk--> BlockRead --guest--> GuestRead --inspect--> Inspection
//!                                                       |          |
//!                                  boot_path (ready?) <-+          v
//!  virtio-win ----drivers----> DriverSet ----------------------> plan --> Plan
//!                                                                          |
//!  overlay <---------- GuestWrite <---------- fix (journal, backup) <------+
//!     |                                        |
//!     +--disk::copy--> target                  +--> Receipt
//!                                              domain --> bootstrap.xml, final.xml
//!                                              report --> report.json, report.html
//! ```
//!
//! Dependencies point one way: cli -> inspect, plan, fix, domain, report -> boot_path, drivers
//! -> guest, registry, disk -> tool -> std. Nothing below `cli` prints or exits.

pub mod actions;
pub mod batch;
pub mod boot;
pub mod boot_path;
mod bytes;
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
pub mod registry;
pub(crate) mod rehearse;
pub mod report;
#[cfg(test)]
mod skip;
#[cfg(test)]
mod skip_tests;
pub mod source;
#[cfg(test)]
mod testing;
pub mod text;
pub mod tool;
mod transfer;
pub mod ui;
pub mod verify;
#[allow(
    dead_code,
    unused_imports,
    reason = "sources on the wire are used from the next change on"
)]
pub mod wire;
