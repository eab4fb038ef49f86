//! The changes of an action, and where the originals are kept.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::disk::direct;
use crate::files;
use crate::guest::{GuestPath, GuestRead, VolumeId};
use crate::text::sha256_hex;

use super::error::{Result, io_error};

/// One guest file or directory before and after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    pub path: String,
    pub kind: ChangeKind,
    /// `None`: the file did not exist.
    pub before: Option<FileFacts>,
    pub after: Option<FileFacts>,
    /// The original, relative to the journal's directory.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub backup: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeKind {
    File,
    Folder,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    pub size: u64,
    pub sha256: String,
}

impl FileFacts {
    pub fn of(bytes: &[u8]) -> Self {
        Self {
            size: bytes.len() as u64,
            sha256: sha256_hex(bytes),
        }
    }
}

impl Change {
    pub(super) fn folder(path: &GuestPath) -> Self {
        Self {
            path: path.to_string(),
            kind: ChangeKind::Folder,
            before: None,
            after: None,
            backup: None,
        }
    }

    /// A file that was written; `kept` has its former state and the path of the original.
    pub(super) fn file(
        path: &GuestPath,
        kept: Option<(FileFacts, String)>,
        after: FileFacts,
    ) -> Self {
        let (before, backup) = kept.unzip();
        Self {
            path: path.to_string(),
            kind: ChangeKind::File,
            before,
            after: Some(after),
            backup,
        }
    }
}

/// The size limit of a replaced file. Those that hyper2kvm replaces are drivers and boot loaders.
pub(super) const MAX_REPLACED: u64 = 256 << 20;

/// The size from which writing a file takes noticeable time.
const LARGE: usize = 1 << 20;

/// Writes files below the journal's directory.
#[derive(Clone)]
pub struct Saver {
    pub folder: PathBuf,
    pub durably: bool,
}

impl Saver {
    pub(super) fn save(&self, relative: &str, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.folder.join(relative);
        let doing = || format!("writing {}", path.display());
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_error(doing()))?;
        }
        let file = File::create(&path).and_then(|mut file| match bytes.len() >= LARGE {
            true => direct::write_new(file, bytes),
            false => file.write_all(bytes).map(|()| file),
        });
        let file = file.map_err(io_error(doing()))?;
        // Other files are made durable before the copy.
        if self.durably {
            files::sync(&file, &path).map_err(io_error(doing()))?;
        }
        Ok(path)
    }

    /// Keeps the file that an action replaces; returns its facts and the path of the original.
    pub(super) fn keep(
        &self,
        guest: &dyn GuestRead,
        volume: VolumeId,
        path: &GuestPath,
    ) -> Result<(FileFacts, String)> {
        let original = guest.read(volume, path, MAX_REPLACED)?;
        let backup = format!("backup/files/{}", path.to_slashes());
        self.save(&backup, &original)?;
        Ok((FileFacts::of(&original), backup))
    }
}
