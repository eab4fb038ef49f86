//! The main job: from a source machine to an output folder.

pub mod copy;
pub mod devices;
pub mod engine;
mod finish;
mod in_place;
mod in_use;
pub mod linux;
pub mod machine;
mod next;
pub mod output;
mod predict;
pub mod prepare;
mod replace;
pub mod run;
pub mod session;
mod space;
pub mod vm;

pub use in_place::{RestoreError, restore};

#[cfg(test)]
mod loader_tests;
