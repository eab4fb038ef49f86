//! Disk images: block access, partition tables, overlays and copies.
//!
//! ```text
//!  Image (chain.rs)  --Export::open_readonly-->  Arc<dyn BlockRead>
//!    |   format and backing chain, all explicit
//!    |               --Export::open_overlay--->  Arc<dyn BlockWrite>, the source untouched
//!    |
//!    +-- with_overlay --copy.rs--> a new file
//!                     --device.rs--> a block device
//! ```

mod between;
pub(crate) mod bpb;
pub(crate) mod cache;
pub mod chain;
pub(crate) mod charset;
mod clusters;
pub(crate) mod compose;
pub mod copy;
pub mod detect;
pub(crate) mod device;
pub(crate) mod direct;
pub(crate) mod empty;
mod error;
pub(crate) mod export;
mod fill;
pub(crate) mod gather;
mod gpt;
mod headers;
pub(crate) mod hold;
pub(crate) mod kernel;
pub mod layout;
pub(crate) mod length;
mod level;
pub mod links;
mod mapping;
mod mbr;
mod merge;
pub mod nbd;
mod on_wire;
mod open;
mod overlay;
mod overlay_writer;
mod packed_writer;
pub mod partition;
mod pool;
mod qcow2;
mod references;
pub(crate) mod refill;
mod reflink;
pub(crate) mod remote;
mod sector;
#[cfg(test)]
mod short_tests;
#[cfg(test)]
pub(crate) mod stand_in;
pub(crate) mod superblock;
mod tables;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod vhd;
pub mod vmdk;
pub(crate) mod vmware;
pub(crate) mod whole;
mod writer;

pub use crate::block::{BlockRead, BlockWrite};
pub use chain::Image;
pub use error::ImageError;
pub use export::Export;
pub(crate) use level::Level;
pub(crate) use on_wire::named_backing;
