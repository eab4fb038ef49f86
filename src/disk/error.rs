//! [`ImageError`]: reasons why a disk image is refused.

use std::io;
use std::path::{Path, PathBuf};

use super::detect::Format;
use super::length::Short;
use super::partition;
use crate::error::{Error, ErrorKind};
use crate::tool::{ToolError, confine};

/// The most levels of a chain; VMware's 32 and nightly snapshots need fewer.
pub(super) const MAX_LEVELS: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("{} does not exist", path.display())]
    NotFound { path: PathBuf },
    #[error("{}, which {} needs, does not exist", path.display(), needed_by.display())]
    PartMissing { path: PathBuf, needed_by: PathBuf },
    #[error("{} is a directory, not a disk image", path.display())]
    Directory { path: PathBuf },
    #[error("{} is neither a file nor a block device", path.display())]
    NotAFile { path: PathBuf },
    #[error("{} is empty (0 bytes)", path.display())]
    Empty { path: PathBuf },
    #[error("no permission to open {}", path.display())]
    Permission { path: PathBuf },
    #[error("the name of {} is not valid UTF-8, which {what} needs", path.display())]
    NotUtf8 { path: PathBuf, what: &'static str },
    #[error("{} is in use by another process", path.display())]
    InUse { path: PathBuf },
    #[error("{} is in use by {user}", path.display())]
    InKernel {
        path: PathBuf,
        user: String,
        remedy: String,
    },
    #[error("{} is locked by VMware: {} is there", path.display(), lock.display())]
    VmwareLock { path: PathBuf, lock: PathBuf },
    #[error("{} was changed by another program during this run: {what}", path.display())]
    Changed { path: PathBuf, what: String },
    #[error("{} cannot be looked at any more: {what}", path.display())]
    Unreachable { path: PathBuf, what: String },
    #[error("{} is damaged or incomplete: {reason}", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("{} is cut short: {short}", path.display())]
    Short {
        path: PathBuf,
        short: Short,
        /// Whether the partition table shows it.
        table: bool,
    },
    #[error("{} is a {what}, not a disk image", path.display())]
    Packed { path: PathBuf, what: &'static str },
    #[error("{} cannot be read: {reason}", path.display())]
    Unsupported {
        path: PathBuf,
        reason: String,
        remedy: &'static str,
    },
    #[error("unknown image format \"{name}\"")]
    UnknownFormat { name: String },
    #[error("{} refers to {target}, which is outside its directory", path.display())]
    Outside { path: PathBuf, target: String },
    #[error("{} refers to \"{target}\", which is not a file name", path.display())]
    NotAFileName { path: PathBuf, target: String },
    #[error("the backing files of {} form a loop or are more than {MAX_LEVELS}", path.display())]
    TooDeep { path: PathBuf },
    #[error(transparent)]
    Tool(#[from] ToolError),
    #[error("reading {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

pub type Result<T, E = ImageError> = std::result::Result<T, E>;

impl ImageError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::PartMissing { .. } => "copy all files of the disk into one directory".into(),
            Self::Permission { path } => format!(
                "make {} readable for this user, or run as its owner",
                path.display()
            ),
            Self::InUse { .. } => "shut the VM down first".into(),
            Self::InKernel { remedy, .. } => remedy.clone(),
            Self::VmwareLock { lock, .. } => format!(
                "power the VM off in VMware; if it is off on every host, the lock was left behind: remove {}",
                lock.display()
            ),
            Self::Changed { .. } => {
                "see that no VM or backup writes to it, and run this again".into()
            }
            Self::Unreachable { .. } => {
                "see that the line and the server are up, and start again".into()
            }
            Self::Damaged { .. } => "copy or export the disk again and compare checksums".into(),
            Self::Short { table: true, .. } => partition::SHORT_HINT.into(),
            Self::Short { table: false, .. } => {
                "copy or export the disk again and compare sizes and checksums".into()
            }
            Self::Packed { .. } => "unpack it and name the disk image inside".into(),
            Self::Unsupported { remedy, .. } => (*remedy).to_owned(),
            Self::UnknownFormat { .. } => format!("known are: {}", Format::NAMES),
            Self::Outside { .. } => "if you trust the image, allow that directory with --allow-backing, or put its files into one directory".into(),
            Self::NotAFileName { .. } => {
                "make a stand-alone copy with `qemu-img convert`, if you trust the image".into()
            }
            Self::NotFound { .. } => "check the path".into(),
            Self::Directory { .. } | Self::NotAFile { .. } => "name the disk image itself".into(),
            Self::Empty { .. } => "copy or export the disk again".into(),
            Self::NotUtf8 { .. } => "rename it, or name another output directory with -o".into(),
            Self::TooDeep { .. } => "merge the snapshots on the old host, and copy the disk again".into(),
            Self::Tool(_) | Self::Io { .. } => return None,
        })
    }

    /// Converts an operating system error into the reason.
    pub(crate) fn from_io(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound { path },
            io::ErrorKind::PermissionDenied => Self::Permission { path },
            _ => Self::Io { path, source },
        }
    }

    /// Converts QEMU's output into the reason.
    pub(super) fn from_tool(path: &Path, error: ToolError) -> Self {
        let Some(stderr) = error.stderr() else {
            return Self::Tool(error);
        };
        let path = path.to_owned();
        if stderr.contains("log that needs to be replayed") {
            Self::Unsupported {
                path,
                reason:
                    "it was not closed: its log contains writes that are not in their places yet"
                        .into(),
                remedy: "shut the VM down and copy the disk again; after a crash, replay the log on a copy: qemu-img check -r all COPY.vhdx",
            }
        } else if stderr.contains(" allocate ") {
            Self::Unsupported {
                path,
                reason: format!(
                    "its tables need more than the {} MiB of memory that QEMU has here",
                    confine::IMAGE_MEMORY >> 20
                ),
                remedy: "copy it into a format with small tables: qemu-img convert -O qcow2 IMAGE COPY",
            }
        } else if stderr.contains("Failed to get") && stderr.contains("lock") {
            Self::InUse { path }
        } else if stderr.contains("Permission denied") || stderr.contains("Operation not permitted")
        {
            Self::Permission { path }
        } else if stderr.contains("Could not open") || stderr.contains("--blockdev") {
            // The specification does not help the user; the reason follows it.
            let line = stderr.lines().last().unwrap_or_default();
            let reason = line
                .rfind("}': ")
                .map_or(line, |at| &line[at + 4..])
                .to_owned();
            if reason.contains("Unsupported image type") {
                return Self::Unsupported {
                    path,
                    reason,
                    remedy: "make an ordinary disk of it with VMware: vmware-vdiskmanager -r DISK.vmdk -t 0 COPY.vmdk, \
                             or vmkfstools -i on ESXi",
                };
            }
            Self::Damaged { path, reason }
        } else if stderr.contains("Check failed") {
            let reason = stderr.lines().next().unwrap_or_default();
            let reason = reason.trim_start_matches("ERROR: ").to_owned();
            Self::Damaged { path, reason }
        } else {
            Self::Tool(error)
        }
    }
}

impl From<ImageError> for Error {
    fn from(e: ImageError) -> Self {
        let kind = match &e {
            ImageError::Permission { .. } => ErrorKind::MissingTool,
            ImageError::UnknownFormat { .. } => ErrorKind::Usage,
            ImageError::Tool(_) => {
                let ImageError::Tool(tool) = e else {
                    unreachable!()
                };
                return tool.into();
            }
            _ => ErrorKind::Failed,
        };
        let mut error = Self::new(kind, e.to_string());
        if let Some(hint) = e.hint() {
            error = error.hint(hint);
        }
        if let ImageError::Io { source, .. } = e {
            error = error.because(source);
        }
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_without_specification() {
        let fail = |stderr: &str| {
            use std::os::unix::process::ExitStatusExt;
            let error = ToolError::Failed {
                tool: "qemu-img".into(),
                status: std::process::ExitStatus::from_raw(256),
                stderr: stderr.into(),
            };
            ImageError::from_tool(Path::new("/d/x"), error)
        };
        let text = "qemu-img: Could not open 'json:{\"a\":{}}': File truncated";
        assert!(
            matches!(fail(text), ImageError::Damaged { reason, .. } if reason == "File truncated")
        );
        let text = "qemu-img: Could not open 'json:{}': Unsupported image type 'custom'";
        assert!(matches!(fail(text), ImageError::Unsupported { .. }));
        let text = "x: Failed to get shared \"write\" lock\nIs another process using it?";
        assert!(matches!(fail(text), ImageError::InUse { .. }));
        let text = "qemu-img: Could not open '/d/x': Permission denied";
        assert!(matches!(fail(text), ImageError::Permission { .. }));
        assert!(matches!(fail("qemu-img: odd"), ImageError::Tool(_)));
    }
}
