//! One error type for the edge of the program: what kind (hence which exit code), why, and what to do.

use std::error::Error as StdError;
use std::fmt;
use std::process::ExitCode;

use serde::Serialize;

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
    /// So many of several machines failed.
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
            // Ends before 123: from there on xargs, timeout and the shell have meanings of their own.
            Self::SomeFailed(count) => 100 + u8::try_from(count.clamp(1, 20)).unwrap_or(20),
            Self::Interrupted => 130,
        }
    }

    /// What the exit code of a child of ours means.
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

/// Why a guest cannot be converted in its present state, and what to do about it.
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

#[derive(Debug)]
pub struct Error {
    pub kind: ErrorKind,
    pub message: String,
    pub source: Option<Box<dyn StdError + Send + Sync>>,
    pub hints: Vec<String>,
    pub blockers: Vec<Blocker>,
    /// The JSON document of the command says it already: none for the error.
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
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// The messages below the first, outermost first.
    pub fn causes(&self) -> Vec<String> {
        let mut causes = Vec::new();
        let mut next: Option<&(dyn StdError + 'static)> = self
            .source
            .as_deref()
            .map(|e| e as &(dyn StdError + 'static));
        while let Some(error) = next {
            causes.push(error.to_string());
            next = error.source();
        }
        causes
    }

    /// A step that was stopped half-way reports it as its cause.
    pub fn is_interrupted(&self) -> bool {
        self.kind == ErrorKind::Interrupted
            || (self.kind == ErrorKind::Failed
                && stop::requested()
                && self.causes().last().is_some_and(|c| c == "interrupted"))
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
