//! Errors of a source on the wire. They cross the socket between child and parent, so every field
//! is text or a number.

use std::io;

use serde::{Deserialize, Serialize};

use crate::error::{Errno, Error, ErrorKind};
use crate::stop;

/// The reason why a remote source could not be reached, read or trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum WireError {
    /// The URL or one of its options has no valid meaning.
    #[error("{reason}")]
    Usage { reason: String, hint: String },
    #[error("{at}: there is no such file")]
    NotFound { at: String },
    /// The other side refuses: a wrong password, a file of somebody else.
    #[error("{at}: {reason}")]
    Denied {
        at: String,
        reason: String,
        hint: String,
    },
    /// The host key or the certificate is not the expected one.
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
    /// The protocol has no listing, or the server provides none.
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
    /// The server has no such bytes of the file.
    #[error("{at}: the server answers HTTP 416")]
    OutOfRange { at: String, hint: String },
    /// This host refused something.
    #[error("{at}: {reason}")]
    Host {
        at: String,
        reason: String,
        hint: String,
        #[source]
        errno: Errno,
    },
    #[error("{tool} is not installed")]
    MissingTool { tool: String, hint: String },
    #[error("{0}")]
    Interrupted(#[from] stop::Interrupted),
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

    /// Creates [`WireError::failed`] with an error of this host.
    pub(crate) fn host(
        at: impl ToString,
        doing: &str,
        error: &io::Error,
        hint: impl Into<String>,
    ) -> Self {
        let reason = format!("{doing}: {error}");
        match error.raw_os_error() {
            Some(errno) => Self::Host {
                at: at.to_string(),
                reason,
                hint: hint.into(),
                errno: Errno(errno),
            },
            None => Self::failed(at, reason, hint),
        }
    }

    /// Whether the same request might succeed a little later.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Failed { .. } | Self::OutOfRange { .. } | Self::Host { .. }
        )
    }

    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Usage { .. } => ErrorKind::Usage,
            Self::MissingTool { .. } => ErrorKind::MissingTool,
            Self::Interrupted(_) => ErrorKind::Interrupted,
            _ => ErrorKind::Failed,
        }
    }

    /// A remedy, if there is one.
    pub(crate) fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Usage { hint, .. }
            | Self::Denied { hint, .. }
            | Self::Untrusted { hint, .. }
            | Self::Failed { hint, .. }
            | Self::OutOfRange { hint, .. }
            | Self::Host { hint, .. }
            | Self::MissingTool { hint, .. } => hint.clone(),
            Self::NotFound { .. } => {
                "check the path; it is percent-encoded, and capitals matter".into()
            }
            Self::Changed { .. } => {
                "power the VM off (or name its newest snapshot) and start again".into()
            }
            Self::CannotList { .. } => "name the .vmx or the disk itself".into(),
            Self::TooLarge { .. } => "name the disk or the file of the VM itself".into(),
            Self::Interrupted(_) => String::new(),
        };
        (!hint.is_empty()).then_some(hint)
    }
}

impl From<WireError> for Error {
    fn from(error: WireError) -> Self {
        let mut made = Self::new(error.kind(), error.to_string());
        if let WireError::Host { errno, .. } = error {
            made = made.because(errno);
        }
        match error.hint() {
            Some(hint) => made.hint(hint),
            None => made,
        }
    }
}
