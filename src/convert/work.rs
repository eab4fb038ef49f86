//! The names of files below the partial directory that are needed while a conversion works.

use std::path::{Path, PathBuf};

/// What is only needed while working, below the partial directory.
pub(super) const WORK: &str = ".work";

/// What is written to the disk with Windows.
pub(super) const OVERLAY: &str = ".overlay.qcow2";
/// What is written to another disk that its boot files are on; below [`WORK`].
pub(super) const BOOT_OVERLAY: &str = "boot.qcow2";

/// What an interrupted copy continues with; below [`WORK`].
pub(super) const RESUME: &str = "resume.json";

/// Where that is, below the partial directory.
pub(super) fn resume_file() -> PathBuf {
    Path::new(WORK).join(RESUME)
}
