//! Linux guests: the installed distribution, its disks, and the firmware that starts it.
//!
//! ```text
//!  disks --tree (ext) or appliance (the rest)--> files --> Inspection { linux, findings }
//! ```
//!
//! Nothing is written here, and no program of the guest is run. Whether a Linux finds its disk on
//! another controller is not examined: `convert::linux` hands the guest to virt-v2v, or copies it
//! on the user's word.

pub mod appliance;
pub mod efi;
mod examine;
pub mod files;
pub mod tree;

pub use examine::{OpenDisk, examine};
