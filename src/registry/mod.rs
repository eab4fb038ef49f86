//! Registry hives: reading, checking, building, edits as `.reg` text.

pub mod base;
pub mod build;
mod cell;
pub mod edit;
pub mod hive;
pub mod walk;

pub use base::BaseBlock;
pub use build::KeyTree;
pub use edit::{RegData, RegEdits, RegOp};
pub use hive::{HiveError, HiveView, Key, Value};
