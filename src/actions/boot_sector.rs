//! Sets numbers in the boot sector of a BIOS boot volume.

use serde::Serialize;

use crate::guest::{Extent, GuestPath, VolumeId};
use crate::inspect::{Hives, SectorField};
use crate::registry::HiveError;

use super::act::{Act, Converted, Kind, OVERLAY_CLUSTER, Work, Writes};
use super::change::{Change, FileFacts};
use super::error::Result;
use super::preview::Preview;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PatchBootSector {
    pub id: String,
    pub title: String,
    #[serde(flatten)]
    pub volume: VolumeId,
    pub fields: Vec<SectorField>,
}

const SECTOR: usize = 512;

/// The file as which NTFS presents its boot sector.
fn path() -> GuestPath {
    GuestPath::parse("$Boot").unwrap_or_default()
}

impl PatchBootSector {
    /// Applies the numbers, which were planned from this very sector; the writer refuses a shorter
    /// one.
    fn patched(&self, mut sector: Vec<u8>) -> Vec<u8> {
        for field in &self.fields {
            let start = usize::from(field.offset);
            if let Some(bytes) = sector.get_mut(start..start + field.new.len()) {
                bytes.copy_from_slice(&field.new);
            }
        }
        sector
    }
}

impl Act for PatchBootSector {
    fn id(&self) -> &str {
        &self.id
    }

    fn describe(&self) -> String {
        let names: Vec<_> = self.fields.iter().map(|f| f.name).collect();
        format!("{}: {} on {}", self.title, names.join(", "), self.volume)
    }

    fn volume(&self) -> Option<VolumeId> {
        Some(self.volume)
    }

    fn writes<'a>(&'a self, _: &'a Hives) -> Writes<'a> {
        Writes::default()
    }

    fn overlay_bytes(&self) -> u64 {
        OVERLAY_CLUSTER
    }

    fn foresee<'a>(&'a self, preview: &mut Preview<'a>) -> Result<(), HiveError> {
        // An unreadable sector is shown unchanged.
        if let Ok(sector) = preview.guest().read_at(self.volume, &path(), 0, SECTOR) {
            preview.bytes_of(self.volume, &path(), self.patched(sector));
        }
        Ok(())
    }

    fn apply(&self, work: &mut Work<'_>) -> Result<Vec<Change>> {
        let original = work.before.read_at(self.volume, &path(), 0, SECTOR)?;
        let backup = "backup/boot-sector".to_string();
        work.saver.save(&backup, &original)?;
        let extents: Vec<Extent> = (self.fields.iter())
            .map(|field| Extent {
                offset: field.offset.into(),
                data: field.new.clone(),
            })
            .collect();
        let before = FileFacts::of(&original);
        let after = FileFacts::of(&self.patched(original));
        work.writer.patch_boot_sector(self.volume, &extents)?;
        Ok(vec![Change::file(&path(), Some((before, backup)), after)])
    }

    fn kind(&self) -> Kind {
        Kind::Files
    }

    fn verify(&self, after: &Converted<'_>) -> Result<usize, String> {
        for field in &self.fields {
            let (offset, len) = (field.offset.into(), field.new.len());
            let found = after
                .guest
                .read_at(self.volume, &path(), offset, len)
                .map_err(|e| format!("{}: {e}", path()))?;
            if found != field.new {
                return Err(format!("{} of the boot sector differs", field.name));
            }
        }
        // A sector is no file.
        Ok(0)
    }
}
