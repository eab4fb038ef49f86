//! The names of files below the partial directory that a conversion needs while it works.

use std::path::{Path, PathBuf};

/// The directory of temporary files, below the partial directory.
pub(super) const WORK: &str = ".work";

/// The overlay for the Windows disk.
pub(super) const OVERLAY: &str = ".overlay.qcow2";
/// The overlay for another disk with the boot files; below [`WORK`].
pub(super) const BOOT_OVERLAY: &str = "boot.qcow2";

/// The record that lets an interrupted copy continue; below [`WORK`].
pub(super) const RESUME: &str = "resume.json";

/// The path of [`RESUME`], relative to the partial directory.
pub(super) fn resume_file() -> PathBuf {
    Path::new(WORK).join(RESUME)
}
