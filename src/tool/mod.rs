//! Running other programs: one wrapper, [`Cmd`], and one file per tool with its argument builder
//! and the pure parser of its output.
//!
//! - [`appliance`]: the environment of libguestfs' programs.
//! - [`cmd`]: argument list, no shell, fixed locale, limited output, stderr tail in the error.
//! - [`confine`]: access of a child: files, network, system calls.
//! - [`launcher`]: starts children so that they die with this process, even on SIGKILL.
//! - [`pass`]: open files passed to a child.
//! - [`privileges`]: root's capabilities that a child keeps: none.
//! - [`spec`]: the files that a QEMU program opens.
//! - [`probe`]: the version of a tool.
//! - [`host`]: the tools on this host, and the packages of missing ones.

pub mod appliance;
mod calls;
pub(crate) mod cmd;
pub(crate) mod confine;
pub(crate) mod guestfish;
pub mod host;
pub mod launcher;
pub(crate) mod pass;
pub(crate) mod privileges;
pub(crate) mod probe;
pub mod qemu_img;
pub(crate) mod qsd;
mod seccomp;
pub(crate) mod spec;
pub(crate) mod virsh;
pub(crate) mod virt_v2v;

pub use cmd::{Child, Cmd, Output, clean};

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use crate::error::{Error, ErrorKind};
use crate::stop;

#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error("{tool} is not installed")]
    NotFound { tool: String, hint: String },
    #[error("{tool} failed ({status}): {stderr}")]
    Failed {
        tool: String,
        status: ExitStatus,
        /// The last lines of the program on stderr, control characters removed.
        stderr: String,
    },
    #[error("{tool} did not finish within {} s", after.as_secs_f32())]
    TimedOut { tool: String, after: Duration },
    #[error("{tool} wrote more than {limit} bytes")]
    TooMuchOutput { tool: String, limit: usize },
    /// The program succeeded, but its output has an unexpected form.
    #[error("the output of {tool} is not understood: {reason}")]
    Output { tool: String, reason: String },
    #[error("{0}")]
    Interrupted(#[from] stop::Interrupted),
    #[error("running {tool}")]
    Io {
        tool: String,
        #[source]
        source: io::Error,
    },
}

pub type Result<T, E = ToolError> = std::result::Result<T, E>;

impl ToolError {
    pub(crate) fn output(tool: &str, reason: impl ToString) -> Self {
        Self::Output {
            tool: tool.to_owned(),
            reason: reason.to_string(),
        }
    }

    /// The program's stderr, if it ran and failed.
    pub fn stderr(&self) -> Option<&str> {
        match self {
            Self::Failed { stderr, .. } => Some(stderr),
            _ => None,
        }
    }
}

impl From<ToolError> for Error {
    fn from(e: ToolError) -> Self {
        let kind = match &e {
            ToolError::NotFound { .. } => ErrorKind::MissingTool,
            ToolError::Interrupted(_) => ErrorKind::Interrupted,
            _ => ErrorKind::Failed,
        };
        let mut error = Self::new(kind, e.to_string());
        match e {
            ToolError::NotFound { hint, .. } => error = error.hint(hint),
            ToolError::Io { source, .. } => error = error.because(source),
            _ => {}
        }
        error
    }
}

/// Directories searched after `PATH`: those that an ordinary user's `PATH` often lacks.
const EXTRA_FOLDERS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// The program's full path. A name with a slash is only checked.
pub fn find(name: impl AsRef<OsStr>) -> Option<PathBuf> {
    let name = name.as_ref();
    if name.as_encoded_bytes().contains(&b'/') {
        return is_program(Path::new(name)).then(|| name.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    std::env::split_paths(&path)
        // A relative directory in PATH would make the result depend on the working directory.
        .filter(|folder| folder.is_absolute())
        .chain(EXTRA_FOLDERS.iter().map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    file.metadata()
        .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_programs() {
        assert!(find("sh").is_some_and(|p| p.is_absolute()));
        assert_eq!(find("/bin/sh"), Some("/bin/sh".into()));
        assert_eq!(find("/etc/passwd"), None);
        assert_eq!(find("no-such-program-here"), None);
        assert_eq!(find(""), None);
    }

    #[test]
    fn error_kinds() {
        let e = Error::from(ToolError::NotFound {
            tool: "x".into(),
            hint: "install x".into(),
        });
        assert_eq!(
            (e.kind, e.hints),
            (ErrorKind::MissingTool, vec!["install x".to_owned()])
        );
        assert_eq!(
            Error::from(ToolError::from(stop::Interrupted)).kind,
            ErrorKind::Interrupted
        );
    }
}
