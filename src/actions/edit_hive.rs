//! Merges registry edits into one hive.
//!
//! A hive whose transaction logs were replayed in memory is written as recovered. Then `reset_logs`
//! are emptied, so that Windows cannot replay old pages over it.

use serde::Serialize;

use crate::guest::{GuestPath, VolumeId};
use crate::inspect::{HiveName, Hives};
use crate::registry::load::log_reset;
use crate::registry::{HiveError, HiveView, RegEdits};
use crate::ui::count;

use super::act::{Act, Converted, Kind, OVERLAY_CLUSTER, Work, Writes};
use super::change::{Change, FileFacts};
use super::error::Result;
use super::merge::Merging;
use super::preview::Preview;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EditHive {
    pub id: String,
    pub title: String,
    pub hive: HiveName,
    #[serde(flatten)]
    pub volume: VolumeId,
    pub path: GuestPath,
    pub edits: RegEdits,
    pub reset_logs: Vec<GuestPath>,
}

/// The growth of a hive by a merge, which never reuses what it frees inside a hive.
const MERGE: u64 = 64 << 10;

impl EditHive {
    fn text_bytes(&self) -> u64 {
        2 * self.edits.to_reg_text().len() as u64
    }
}

impl Act for EditHive {
    fn id(&self) -> &str {
        &self.id
    }

    fn describe(&self) -> String {
        let replayed = match self.reset_logs.is_empty() {
            true => "",
            false => ", transaction logs replayed and reset",
        };
        let edits = count(self.edits.ops.len(), "edit");
        format!("{}: {edits} in {}{replayed}", self.title, self.path)
    }

    fn volume(&self) -> Option<VolumeId> {
        Some(self.volume)
    }

    fn writes<'a>(&'a self, hives: &'a Hives) -> Writes<'a> {
        let Some(loaded) = hives.get(self.hive) else {
            return Writes::default();
        };
        let size = loaded.bytes.len() as u64;
        Writes {
            folders: None,
            files: vec![(&self.path, size + self.text_bytes() + MERGE)],
            originals: size,
        }
    }

    fn overlay_bytes(&self) -> u64 {
        // An edit changes some values in a few of its blocks.
        (self.edits.ops.len() as u64 + 2) * OVERLAY_CLUSTER + self.text_bytes()
    }

    fn foresee<'a>(&'a self, preview: &mut Preview<'a>) -> Result<(), HiveError> {
        preview.edited(self.hive, self.volume, &self.path, &self.edits)?;
        for log in &self.reset_logs {
            preview.bytes_of(self.volume, log, Vec::new());
        }
        Ok(())
    }

    fn prepare(&self, merging: &mut Merging<'_>) -> Result<()> {
        let at = (self.volume, &self.path);
        merging.add(self.hive, at, &self.edits, &self.reset_logs)
    }

    fn apply(&self, work: &mut Work<'_>) -> Result<Vec<Change>> {
        let hive = work.hives.take(self.hive)?;
        let writer = work.writer.as_mut();
        match hive.whole {
            true => writer.write_file(self.volume, &self.path, &hive.bytes)?,
            false => {
                let size = hive.bytes.len() as u64;
                writer.patch_file(self.volume, &self.path, size, &hive.extents)?;
            }
        }
        let written = hive.written(self.volume, &self.path);
        let mut changes = vec![Change::file(
            &self.path,
            Some(written.original),
            written.facts,
        )];
        for log in &written.logs {
            let Some(reset) = log_reset(&log.original) else {
                continue;
            };
            writer.write_file(self.volume, &log.path, &reset)?;
            let original = (FileFacts::of(&log.original), log.backup.clone());
            let facts = FileFacts::of(&reset);
            changes.push(Change::file(&log.path, Some(original), facts));
        }
        work.walking.push(written.walking);
        Ok(changes)
    }

    fn fail_point(&self) -> Option<&'static str> {
        Some("hive-written")
    }

    fn kind(&self) -> Kind {
        Kind::Registry
    }

    fn verify(&self, after: &Converted<'_>) -> Result<usize, String> {
        let loaded = after.hives.get(self.hive).ok_or("the hive was not read")?;
        let pending = HiveView::new(&loaded.bytes)
            .and_then(|view| self.edits.pending(&view.root()?))
            .map_err(|e| format!("{}: {e}", loaded.path))?;
        match pending.ops.first() {
            Some(op) => Err(format!("{}: {} is not as planned", loaded.path, op.key())),
            None => Ok(self.edits.ops.len()),
        }
    }
}
