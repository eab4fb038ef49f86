//! Runs libhivex in a separate process that has access to the hive alone.
//!
//! The library is C and parses data from a foreign disk. The child is this program again
//! (`hyper2kvm __hive PARENT EDITS`). It reads the edits, loads the library, and gives up files,
//! network, programs and threads ([`crate::tool::confine::editor`]). Only then does it read the
//! hive: a file in memory, its stdin, to which the result is written too. A crash, a hang and a
//! lack of memory are ordinary errors. The child dies with its parent.
//!
//! If the launcher is not enabled (unit tests, examples), the library runs in this process instead.

mod child;

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::MemfdFlags;

pub use child::run_if_asked;

use super::edit::RegEdits;
use super::libhivex::{self, HivexError};
use crate::memory::FileBytes;
use crate::stop;
use crate::tool::pass::{self, Passed};
use crate::tool::{Cmd, ToolError, cmd, launcher};

const VERB: &str = "__hive";
/// The failpoint in the child before it opens the hive.
const FAILPOINT: &str = "hive-child";
/// The time limit for the edits of one hive: the largest real one takes a second.
const LIMIT: Duration = Duration::from_secs(120);

/// The library allocates memory for the hive with malloc, which uses large pages if configured so
/// (glibc 2.35).
const MALLOC: (&str, &str) = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1");

#[derive(Debug, thiserror::Error)]
pub enum HiveEditError {
    #[error("libhivex is not installed")]
    Missing,
    #[error("{0}")]
    Interrupted(#[from] stop::Interrupted),
    /// An error of libhivex.
    #[error("libhivex: {0}")]
    Library(String),
    #[error("the confined hive editor {0}")]
    Child(String),
    #[error("{doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
}

type Result<T> = std::result::Result<T, HiveEditError>;

/// Whether libhivex is installed.
pub(crate) fn is_available() -> bool {
    libhivex::is_available()
}

/// A file in memory that passes a hive to the child and back.
pub(crate) struct HiveFile(File);

impl HiveFile {
    pub(crate) fn new(hive: &[u8]) -> Result<Self> {
        memory_file("hive", hive).map(Self)
    }

    /// Applies the edits. After an error the file is useless.
    pub(crate) fn edit(&mut self, edits: &RegEdits) -> Result<()> {
        if !is_available() {
            return Err(HiveEditError::Missing);
        }
        match launcher::is_enabled() {
            true => in_child(&self.0, edits),
            false => in_this_process(&self.0, edits),
        }
    }

    pub(crate) fn bytes(&self) -> io::Result<FileBytes> {
        let size = self.0.metadata()?.len();
        let mut bytes = FileBytes::zeroed(usize::try_from(size).unwrap_or(0));
        self.0.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// A reader from the start of the hive.
    pub(crate) fn reader(&self) -> impl io::Read {
        Reader {
            file: &self.0,
            at: 0,
        }
    }
}

/// A reader from the start of the file, with a position of its own.
struct Reader<'f> {
    file: &'f File,
    at: u64,
}

impl io::Read for Reader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.file.read_at(buf, self.at)?;
        self.at += len as u64;
        Ok(len)
    }
}

/// Returns a hive with the edits.
#[cfg(test)]
pub(crate) fn edited(hive: &[u8], edits: &RegEdits) -> Result<Vec<u8>> {
    let mut file = HiveFile::new(hive)?;
    file.edit(edits)?;
    let bytes = file.bytes().map_err(io_error("reading the edited hive"))?;
    Ok(bytes.to_vec())
}

fn memory_file(name: &str, bytes: &[u8]) -> Result<File> {
    let made = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).map_err(io::Error::from);
    let filled = made.map(File::from).and_then(|mut file| {
        file.write_all(bytes)?;
        file.rewind()?;
        Ok(file)
    });
    filled.map_err(io_error("writing a file in memory"))
}

fn in_child(hive: &File, edits: &RegEdits) -> Result<()> {
    let hive = hive
        .try_clone()
        .map_err(io_error("handing the hive to the confined editor"))?;
    let edits = serde_json::to_vec(edits)
        .map_err(|e| HiveEditError::Child(format!("gets no edits: {e}")))?;
    let edits = memory_file("edits", &edits)?;
    let edits = Passed::new(Arc::new(edits), Path::new("the edits"), false);
    let done = Cmd::own(VERB)
        .arg(edits.name())
        .pass(&[edits])
        .env(MALLOC.0, MALLOC.1)
        .stdin(hive)
        .timeout(LIMIT.min(cmd::silence()))
        .run();
    done.map(drop).map_err(why_it_failed)
}

fn why_it_failed(error: ToolError) -> HiveEditError {
    let first = |text: &str| text.lines().next().unwrap_or_default().to_string();
    match error {
        ToolError::Interrupted(stopped) => stopped.into(),
        ToolError::TimedOut { after, .. } => HiveEditError::Child(format!(
            "hung and was killed after {} s",
            after.as_secs_f32()
        )),
        ToolError::Failed { status, stderr, .. } => match status.signal() {
            Some(signal) => HiveEditError::Child(format!("crashed (signal {signal})")),
            None => HiveEditError::Library(first(&stderr)),
        },
        other => HiveEditError::Child(format!("did not run: {other}")),
    }
}

fn in_this_process(hive: &File, edits: &RegEdits) -> Result<()> {
    let name = CString::new(pass::name(hive)).map_err(|e| HiveEditError::Library(e.to_string()))?;
    libhivex::edit(&name, edits).map_err(|error| match error {
        HivexError::Missing => HiveEditError::Missing,
        other => HiveEditError::Library(chain(&other)),
    })
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> HiveEditError {
    move |source| HiveEditError::Io { doing, source }
}

#[cfg(test)]
mod tests;
