//! What can go wrong with a source on the wire. It crosses the socket between child and parent, so
//! every field is text or a number.

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind};

/// Why a source on the wire could not be reached, read or trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum WireError {
    /// The URL or an option of it cannot be meant.
    #[error("{reason}")]
    Usage { reason: String, hint: String },
    #[error("{at}: there is no such file")]
    NotFound { at: String },
    /// The other side refuses: a wrong password, a file of somebody else's.
    #[error("{at}: {reason}")]
    Denied {
        at: String,
        reason: String,
        hint: String,
    },
    /// The host key or the certificate is not the one that was expected.
    #[error("{at} did not prove its identity: it shows {shown}, expected is {expected}")]
    Untrusted {
        at: String,
        shown: String,
        expected: String,
        hint: String,
    },
    #[error("{at} changed while it was read: {was} before, {now} now")]
    Changed {
        at: String,
        was: String,
        now: String,
    },
    /// The protocol has no listing, or the server gives none.
    #[error("{at}: {reason}")]
    CannotList { at: String, reason: String },
    #[error("{at} has {size} bytes, at most {most} are read of such a file")]
    TooLarge { at: String, size: u64, most: u64 },
    #[error("{at}: {reason}")]
    Failed {
        at: String,
        reason: String,
        hint: String,
    },
    #[error("{tool} is not installed")]
    MissingTool { tool: String, hint: String },
    #[error("interrupted")]
    Interrupted,
}

pub(crate) type Result<T, E = WireError> = std::result::Result<T, E>;

impl WireError {
    pub(crate) fn usage(reason: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage {
            reason: reason.into(),
            hint: hint.into(),
        }
    }

    pub(crate) fn failed(
        at: impl ToString,
        reason: impl ToString,
        hint: impl Into<String>,
    ) -> Self {
        Self::Failed {
            at: at.to_string(),
            reason: reason.to_string(),
            hint: hint.into(),
        }
    }

    /// Whether the same might succeed a little later.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }

    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Usage { .. } => ErrorKind::Usage,
            Self::MissingTool { .. } => ErrorKind::MissingTool,
            Self::Interrupted => ErrorKind::Interrupted,
            _ => ErrorKind::Failed,
        }
    }

    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Usage { hint, .. }
            | Self::Denied { hint, .. }
            | Self::Untrusted { hint, .. }
            | Self::Failed { hint, .. }
            | Self::MissingTool { hint, .. } => hint.clone(),
            Self::NotFound { .. } => {
                "check the path; it is percent-encoded, and capitals matter".into()
            }
            Self::Changed { .. } => {
                "power the VM off (or name its newest snapshot) and start again".into()
            }
            Self::CannotList { .. } => "name the .vmx or the disk itself".into(),
            Self::TooLarge { .. } => "name the disk or the machine file itself".into(),
            Self::Interrupted => String::new(),
        };
        (!hint.is_empty()).then_some(hint)
    }
}

impl From<WireError> for Error {
    fn from(error: WireError) -> Self {
        let made = Self::new(error.kind(), error.to_string());
        match error.hint() {
            Some(hint) => made.hint(hint),
            None => made,
        }
    }
}
