//! The main job: from a source machine to an output folder.

pub mod output;
