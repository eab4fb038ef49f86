//! A file from a writer of another format, and the reason why there is none.

use std::path::Path;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EmitError {
    #[error("{target} has no {what}")]
    Missing {
        what: &'static str,
        target: &'static str,
    },
    #[error(
        "{disks} disks do not fit: Proxmox VE has {max} places on {bus}, one for the driver ISO"
    )]
    TooManyDisks {
        bus: &'static str,
        disks: usize,
        max: usize,
    },
    #[error("writing YAML: {0}")]
    Yaml(String),
}

/// One file; its name is that of the VM followed by `suffix`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    pub suffix: String,
    pub text: String,
    /// Whether it is a shell script.
    pub script: bool,
}

/// The name of a file of the output directory; `None` for a path elsewhere.
pub(super) fn local<'p>(path: &'p Path, folder: &Path) -> Option<&'p str> {
    let name = path.file_name()?.to_str()?;
    (path.parent() == Some(folder)).then_some(name)
}
