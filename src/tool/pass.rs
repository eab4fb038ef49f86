//! Descriptors passed to a program, which opens their files and not whatever a name leads to by
//! then.
//!
//! A descriptor keeps its number in the program, which reaches the file as `/proc/self/fd/N`.
//! Opening that makes a new file description of the same file, even after the name of the file has
//! changed.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An open file that a program may open again.
#[derive(Debug, Clone)]
pub struct Passed {
    file: Arc<File>,
    /// The path for people.
    shown: PathBuf,
    writable: bool,
}

impl Passed {
    pub fn new(file: Arc<File>, shown: &Path, writable: bool) -> Self {
        Self {
            file,
            shown: shown.to_owned(),
            writable,
        }
    }

    /// The path with which the program opens it.
    pub fn name(&self) -> String {
        name(&self.file)
    }

    /// The path of [`Self::name`], and the one for people.
    pub(super) fn shown_by_name(&self) -> (String, PathBuf) {
        (self.name(), self.shown.clone())
    }

    /// The descriptor's number in the program.
    pub fn number(&self) -> i32 {
        self.file.as_raw_fd()
    }

    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }
}

/// The path of an open file in this process, and in a program to which it is passed.
pub fn name(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Replaces the paths of descriptors in `text` by those for people.
pub(super) fn with_names(text: String, passed: &[(String, PathBuf)]) -> String {
    let mut text = text;
    for (name, shown) in passed {
        text = replace_name(&text, name, &shown.display().to_string());
    }
    text
}

/// Replaces `name` if no further digit follows it.
fn replace_name(text: &str, name: &str, by: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(name) {
        let (before, after) = (&rest[..at], &rest[at + name.len()..]);
        out.push_str(before);
        let longer = after.starts_with(|c: char| c.is_ascii_digit());
        out.push_str(if longer { name } else { by });
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_messages() {
        let passed = [
            ("/proc/self/fd/7".to_string(), PathBuf::from("/d/a.vmdk")),
            ("/proc/self/fd/71".to_string(), PathBuf::from("/d/b.vmdk")),
        ];
        let text = "'/proc/self/fd/7': x; '/proc/self/fd/71'; '/proc/self/fd/72' /proc/self/fd/7";
        assert_eq!(
            with_names(text.to_string(), &passed),
            "'/d/a.vmdk': x; '/d/b.vmdk'; '/proc/self/fd/72' /d/a.vmdk"
        );
    }
}
