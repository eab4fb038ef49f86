//! Registry hives: reading, edits as `.reg` text, transaction logs.

pub mod edit;
pub mod hive;
pub mod log;
pub mod marvin;
pub mod recover;

pub use edit::{RegData, RegEdits, RegOp};
pub use hive::{HiveError, HiveView, Key, Value};
