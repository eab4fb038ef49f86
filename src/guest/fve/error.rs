//! Errors of a BitLocker volume, or of the keys given for it.

use std::io;

use super::protection::Protection;

#[derive(Debug, thiserror::Error)]
pub enum FveError {
    #[error("BitLocker's {structure} at {offset:#x}: {field} is {actual}, expected {expected}")]
    Structure {
        structure: &'static str,
        /// The offset in the volume.
        offset: u64,
        field: &'static str,
        expected: String,
        actual: String,
    },
    #[error("no copy of BitLocker's metadata is sound: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    NoSoundCopy(Vec<FveError>),
    #[error(
        "the copies of BitLocker's metadata at {first:#x} and {other:#x} differ from byte {at:#x} on, and no two agree"
    )]
    CopiesDiffer { first: u64, other: u64, at: u64 },
    #[error("BitLocker is {0}")]
    Converting(String),
    #[error("{}", locked(.protectors))]
    Locked { protectors: Vec<Protection> },
    #[error("none of the {tried} keys given with --key opens it; it is unlocked by: {}", Protection::list(.protectors))]
    WrongKeys {
        tried: usize,
        protectors: Vec<Protection>,
    },
    #[error("the key given with --key looks like a recovery password, but {0}")]
    Mistyped(String),
    #[error(
        "BitLocker's metadata is not what the volume's key vouches for: SHA-256 {actual}, expected {expected}"
    )]
    Tampered { expected: String, actual: String },
    #[error("unsupported: {0}")]
    Unsupported(String),
    #[error("reading BitLocker's metadata")]
    Io(#[from] io::Error),
}

fn locked(protectors: &[Protection]) -> String {
    let list = Protection::list(protectors);
    match protectors.iter().any(|p| p.takes_key()) {
        true => format!("no key was given for it; it is unlocked by: {list}"),
        false => {
            format!("it is unlocked by {list} only, which no key given to this program replaces")
        }
    }
}

impl FveError {
    pub fn structure(
        structure: &'static str,
        offset: u64,
        field: &'static str,
        expected: impl ToString,
        actual: impl ToString,
    ) -> Self {
        Self::Structure {
            structure,
            offset,
            field,
            expected: expected.to_string(),
            actual: actual.to_string(),
        }
    }

    /// The text with its causes.
    pub fn reason(&self) -> String {
        match self {
            Self::Io(error) => format!("{self}: {error}"),
            other => other.to_string(),
        }
    }
}
