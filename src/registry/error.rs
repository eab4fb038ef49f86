//! Reasons why a hive cannot be read.

use super::cell::{CellFault, MAX_DEPTH};

#[derive(Debug, thiserror::Error)]
pub enum HiveError {
    #[error(
        "not a registry hive: {structure} at byte {offset}: expected {expected}, found {actual}"
    )]
    NotAHive {
        structure: &'static str,
        offset: u64,
        expected: String,
        actual: String,
    },
    #[error("keys are nested more than {MAX_DEPTH} deep")]
    TooDeep,
    #[error(transparent)]
    Damaged(#[from] CellFault),
    #[error("registry key {0} is not there")]
    NoKey(String),
}

pub type Result<T, E = HiveError> = std::result::Result<T, E>;
