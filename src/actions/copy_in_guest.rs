//! Copies a file of the guest to another path on the same volume.

use serde::Serialize;

use crate::guest::{GuestPath, VolumeId};
use crate::inspect::Hives;
use crate::registry::HiveError;

use super::act::{Act, Converted, Kind, Work, Writes, in_overlay};
use super::change::{Change, FileFacts, MAX_REPLACED};
use super::error::Result;
use super::preview::Preview;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CopyInGuest {
    pub id: String,
    pub title: String,
    #[serde(flatten)]
    pub volume: VolumeId,
    /// The directory to create first.
    pub folder: Option<GuestPath>,
    pub from: GuestPath,
    pub to: GuestPath,
    pub size: u64,
    /// Whether a different file of that name exists now.
    pub replaces: bool,
}

impl Act for CopyInGuest {
    fn id(&self) -> &str {
        &self.id
    }

    fn describe(&self) -> String {
        let replaced = match self.replaces {
            true => ", which is replaced",
            false => "",
        };
        format!("{}: {} to {}{replaced}", self.title, self.from, self.to)
    }

    fn volume(&self) -> Option<VolumeId> {
        Some(self.volume)
    }

    fn writes<'a>(&'a self, _: &'a Hives) -> Writes<'a> {
        Writes {
            files: vec![(&self.to, self.size)],
            ..Writes::default()
        }
    }

    fn overlay_bytes(&self) -> u64 {
        in_overlay(self.size)
    }

    fn foresee<'a>(&'a self, preview: &mut Preview<'a>) -> Result<(), HiveError> {
        preview.copied(self.volume, &self.to, &self.from, self.size);
        Ok(())
    }

    fn apply(&self, work: &mut Work<'_>) -> Result<Vec<Change>> {
        if let Some(folder) = &self.folder {
            work.writer.create_dir(self.volume, folder)?;
        }
        let contents = work.before.read(self.volume, &self.from, MAX_REPLACED)?;
        let kept = match self.replaces {
            true => Some(work.saver.keep(work.before, self.volume, &self.to)?),
            false => None,
        };
        work.writer.write_file(self.volume, &self.to, &contents)?;
        let facts = FileFacts::of(&contents);
        Ok(vec![Change::file(&self.to, kept, facts)])
    }

    fn kind(&self) -> Kind {
        Kind::Files
    }

    fn verify(&self, after: &Converted<'_>) -> Result<usize, String> {
        let read = |path| {
            let bytes = after.guest.read(self.volume, path, self.size);
            bytes.map_err(|e| format!("{path}: {e}"))
        };
        match read(&self.from)? == read(&self.to)? {
            true => Ok(1),
            false => Err(format!("{} differs from {}", self.to, self.from)),
        }
    }
}
