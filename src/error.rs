//! One error type for the whole program: its kind (hence the exit code), its reason, and its
//! remedy.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use crate::stop;

/// The exit codes of the program, as documented in `--help`, the man page and the README.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    Failed,
    Usage,
    Refused,
    NotReady,
    MissingTool,
    RolledBack,
    NotRolledBack,
    Internal,
    /// The number of several VMs that failed.
    SomeFailed(usize),
    Interrupted,
}

impl ErrorKind {
    pub fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Refused => 3,
            Self::NotReady => 4,
            Self::MissingTool => 5,
            Self::RolledBack => 6,
            Self::NotRolledBack => 7,
            Self::Internal => 70,
            // Ends before 123: from there on, xargs, timeout and the shell have meanings of their
            // own.
            Self::SomeFailed(count) => 100 + u8::try_from(count.clamp(1, 20)).unwrap_or(20),
            Self::Interrupted => 130,
        }
    }

    /// The meaning of a confined child's exit code.
    pub fn from_code(code: u8) -> Self {
        match code {
            2 => Self::Usage,
            3 => Self::Refused,
            4 => Self::NotReady,
            5 => Self::MissingTool,
            6 => Self::RolledBack,
            7 => Self::NotRolledBack,
            70 => Self::Internal,
            130 => Self::Interrupted,
            _ => Self::Failed,
        }
    }
}

/// The reason why a guest cannot be converted in its present state, and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Blocker {
    /// Stable identifier, e.g. `volume-hibernated`.
    pub code: String,
    pub reason: String,
    pub remedy: String,
}

impl Blocker {
    pub fn new(
        code: impl Into<String>,
        reason: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            code: code.into(),
            reason: reason.into(),
            remedy: remedy.into(),
        }
    }
}

/// The cause of an error whose text already has the words of the operating system, such as one of a
/// child.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{}", io::Error::from_raw_os_error(self.0))]
pub struct Errno(pub i32);

#[derive(Debug)]
pub struct Error {
    pub kind: ErrorKind,
    pub message: String,
    /// The chain of causes, each with its type.
    pub source: Option<anyhow::Error>,
    pub hints: Vec<String>,
    pub blockers: Vec<Blocker>,
    /// Whether the JSON document of the command already contains it: there is no separate error
    /// document.
    pub reported: bool,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
            hints: Vec::new(),
            blockers: Vec::new(),
            reported: false,
        }
    }

    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Failed, message)
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    pub fn missing_tool(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::MissingTool, message)
    }

    pub fn refused(message: impl Into<String>, blockers: Vec<Blocker>) -> Self {
        Self {
            blockers,
            ..Self::new(ErrorKind::Refused, message)
        }
    }

    #[must_use]
    pub fn because(mut self, source: impl Into<anyhow::Error>) -> Self {
        self.source = Some(source.into());
        self
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// Adds a cause from another program, or one without a type.
    #[must_use]
    pub fn because_of(self, text: impl Into<String>) -> Self {
        self.because(anyhow::Error::msg(text.into()))
    }

    /// The errors below this one, outermost first.
    fn chain(&self) -> impl Iterator<Item = &(dyn StdError + 'static)> {
        self.source.iter().flat_map(anyhow::Error::chain)
    }

    /// The messages below the first, outermost first.
    pub fn causes(&self) -> Vec<String> {
        let shown = self
            .chain()
            .filter(|e| !e.is::<stop::Interrupted>() && !e.is::<Errno>());
        shown.map(ToString::to_string).collect()
    }

    /// Whether [`stop::Interrupted`] is among the causes: a step was stopped in progress.
    pub fn is_interrupted(&self) -> bool {
        self.kind == ErrorKind::Interrupted
            || (self.kind == ErrorKind::Failed && self.chain().any(stop::is_interrupted))
    }

    /// The `errno` of this host's operating system among the causes.
    pub fn os_error(&self) -> Option<i32> {
        self.chain().find_map(|e| {
            let io = e.downcast_ref::<io::Error>();
            io.and_then(io::Error::raw_os_error)
                .or_else(|| {
                    e.downcast_ref()
                        .map(|e: &rustix::io::Errno| e.raw_os_error())
                })
                .or_else(|| e.downcast_ref().map(|e: &Errno| e.0))
        })
    }

    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.kind.code())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_of_this_host_is_known_by_its_number_and_not_by_words() {
        let full = || io::Error::from_raw_os_error(28);
        for (error, errno) in [
            (Error::failed("x").because(full()), Some(28)),
            (
                Error::failed("x").because(rustix::io::Errno::ACCESS),
                Some(13),
            ),
            (Error::failed("x").because(Errno(5)), Some(5)),
            (
                Error::failed("x").because(Error::failed("y").because(full())),
                Some(28),
            ),
            (Error::failed("a disk (os error 28)"), None),
            (Error::failed("x").because_of("(os error 28)"), None),
        ] {
            assert_eq!(error.os_error(), errno, "{error:?}");
        }
        assert!(Error::failed("x").because(Errno(5)).causes().is_empty());
    }

    #[test]
    fn an_error_named_interrupted_is_not_the_stop_flag() {
        let stopped = io::Error::from(stop::Interrupted);
        assert_eq!(stopped.to_string(), "interrupted");
        let error = Error::failed("reading").because(stopped);
        assert_eq!(error.causes(), ["interrupted"]);
        assert!(error.is_interrupted());
        for text in ["interrupted", "the VM was interrupted"] {
            assert!(!Error::failed("x").because_of(text).is_interrupted());
        }
    }
}
