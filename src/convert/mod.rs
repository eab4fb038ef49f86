//! The main job: from a source machine to an output folder.

pub mod copy;
pub mod devices;
pub mod engine;
mod finish;
mod in_place;
pub mod in_use;
pub mod linux;
pub mod machine;
mod next;
pub mod output;
mod predict;
pub mod prepare;
mod replace;
pub mod run;
pub mod session;
pub mod vm;

#[cfg(test)]
mod loader_tests;
