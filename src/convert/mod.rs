//! The main job: from a source machine to an output folder.

pub mod copy;
pub mod devices;
pub mod exchange;
mod finish;
mod foresee;
mod in_place;
pub mod later;
pub mod linux;
pub mod machine;
pub mod name;
mod next;
pub mod output;
mod page;
pub mod place;
pub mod prepare;
mod replace;
mod resume;
pub mod run;
mod space;
pub mod sync;

pub use in_place::{RestoreError, restore};

#[cfg(test)]
mod loader_tests;
