//! Linux guests: what is installed, and from which controllers it would start.
//!
//! ```text
//!  disks --tree (ext) or appliance (the rest)--> files --bootloader--> menu
//!                                                  |                    |
//!                                                  +---> kernels <------+   initramfs, modules
//!                                                           |
//!                                     Inspection { linux, controllers, findings }
//! ```
//!
//! Nothing is written and nothing of the guest is run here. What `convert` does with it is in
//! `convert::linux`.

pub mod appliance;
pub mod bootloader;
pub mod efi;
mod examine;
pub mod files;
pub mod initramfs;
pub mod kernels;
pub mod model;
pub mod modules;
pub mod tree;

pub use examine::{OpenDisk, examine};
pub use model::{Family, Kernel, LinuxFacts, LoaderCopies};
