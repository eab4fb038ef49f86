//! Disk images: block access, partition tables, overlays and copies.

pub mod block;
pub mod layout;
