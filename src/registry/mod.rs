//! Registry hives: reading, checking, building, edits as data and as `.reg` text, transaction logs, BCD.

pub mod base;
pub mod bcd;
pub mod build;
mod cell;
pub mod confined;
pub(crate) mod data;
#[cfg(test)]
mod differences;
pub(crate) mod edit;
pub mod error;
pub(crate) mod hive;
mod layout;
mod libhivex;
pub mod load;
pub mod log;
pub mod marvin;
pub(crate) mod name;
pub mod recover;
pub(crate) mod second_reader;
pub(crate) mod walk;

pub use base::BaseBlock;
pub use bcd::{Bcd, BcdDevice};
pub use build::KeyTree;
pub use data::RegData;
pub use edit::{RegEdits, RegOp};
pub use error::HiveError;
pub use hive::{HiveView, Key, Value};
pub use load::{LoadError, LoadWarning, LoadedHive, load_hive, log_reset};
pub use recover::{Recovery, recover};
