//! Why a hive cannot be read.

use super::cell::Fault;

#[derive(Debug, thiserror::Error)]
pub enum HiveError {
    #[error("not a registry hive: {0}")]
    NotAHive(&'static str),
    #[error(transparent)]
    Damaged(#[from] Fault),
    #[error("registry key {0} is not there")]
    NoKey(String),
}

pub type Result<T, E = HiveError> = std::result::Result<T, E>;
