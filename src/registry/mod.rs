//! Registry hives: reading, edits as `.reg` text.

pub mod edit;
pub mod hive;

pub use edit::{RegData, RegEdits, RegOp};
pub use hive::{HiveError, HiveView, Key, Value};
