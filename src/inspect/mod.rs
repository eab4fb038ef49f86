//! Facts about the guest. Takes a [`crate::guest::GuestRead`], so it cannot write.

pub mod model;

pub use model::*;
