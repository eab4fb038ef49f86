//! The last pass: `convert --from-sync`.
//!
//! The fix works on an overlay over the source, as always. What the overlay over the source reads as is
//! the result; the copies of the passes before are most of it already. Copied are what the result has
//! data for and the journal does not have, and everything that the overlay holds itself. What the copy
//! holds beside that is zeroed, so that the result is the same as that of a conversion in one go. Then
//! the copy gets a second name in the new output folder, and loses its first with the synced folder.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::disk::Image;
use crate::disk::chain::ImageError;
use crate::disk::copy::{Copied, CopyError, CopyOptions};
use crate::disk::refill::Refill;
use crate::error::{Blocker, Error, Result};
use crate::tool::qemu_img;
use crate::transfer::Extents;
use crate::ui::Ui;

use super::super::run::Job;
use super::super::session::Source;
use super::changes;
use super::state::{State, SyncedDisk};
use crate::fix::trim::DataMap;

/// Bytes a second, before anything was copied.
const ASSUMED_RATE: f64 = 100.0 * 1024.0 * 1024.0;
/// Seconds for the fix and the second reading, besides twice the reading of a pass.
const FIX: f64 = 1.0;

/// What the last pass takes: inspection, fix and verification, and the copy of what is left.
pub(super) fn projection(state: &State, left: u64) -> f64 {
    let overhead = state.passes.iter().map(|pass| pass.overhead_s);
    let overhead = overhead.fold(0.0, f64::max);
    FIX + 2.0 * overhead + left as f64 / state.rate().unwrap_or(ASSUMED_RATE)
}

/// A synced folder whose VM is off.
pub(crate) struct Last {
    state: State,
    folder: PathBuf,
    budget: Option<u64>,
    projected: f64,
    left: u64,
}

/// The copy of one disk.
#[derive(Clone)]
pub(crate) struct Synced {
    disk: SyncedDisk,
    folder: PathBuf,
}

impl Last {
    /// Looks at what has changed since the last pass. `disks` are those of the source, whole and held.
    pub(crate) fn open(job: &Job, ui: &Ui, folder: &Path, disks: &[Source]) -> Result<Option<Self>> {
        if !job.from_sync {
            return Ok(None);
        }
        let Some(state) = State::load(folder)? else {
            return Err(Error::failed(format!("{} holds no synced VM", folder.display()))
                .hint(format!(
                    "hyper2kvm sync SOURCE -o {} makes one",
                    crate::text::shell_word(&folder.display().to_string())
                )));
        };
        let mut images: Vec<Option<Image>> = vec![None; job.source.vm.disks.len()];
        for disk in disks {
            if let Some(place) = position(job, disk).and_then(|i| images.get_mut(i)) {
                *place = Some(disk.image()?);
            }
        }
        let images: Vec<Image> = images.into_iter().flatten().collect();
        let sizes: Vec<u64> = images.iter().map(Image::virtual_size).collect();
        let chains = images.iter().map(changes::links).collect::<Result<Vec<_>>>()?;
        let chains: Vec<_> = chains.iter().map(Vec::as_slice).collect();
        state.take_out(folder, &sizes, &chains)?;
        let mut left = 0;
        for (disk, image) in state.disks.iter().zip(&images) {
            let data = DataMap::of(image)?.extents(image.virtual_size());
            left += data.minus(&disk.done(folder)?).bytes();
        }
        let projected = projection(&state, left);
        ui.status(
            "Finishing",
            &format!("a sync of {} passes; {projected:.1} s expected", state.passes.len()),
        );
        if let Some(budget) = job.budget.filter(|budget| projected > *budget as f64) {
            let blocker = Blocker::new(
                "sync-over-budget",
                format!(
                    "the last pass is expected to take {projected:.1} s, with {} left to copy; the budget is {budget} s",
                    crate::ui::bytes(left)
                ),
                "start the VM again where it was, run hyper2kvm sync once more, and try again; or allow more with --budget",
            );
            return Err(Error::refused("the last pass would take too long", vec![blocker]));
        }
        Ok(Some(Self {
            state,
            folder: folder.to_owned(),
            budget: job.budget,
            projected,
            left,
        }))
    }

    /// The copy of a disk of the source.
    pub(crate) fn disk(&self, job: &Job, disk: &Source) -> Option<Synced> {
        let disk = self.state.disks.get(position(job, disk)?)?;
        Some(Synced {
            disk: disk.clone(),
            folder: self.folder.clone(),
        })
    }

    /// For the report: what was planned, and what came of it. `seconds` is how long all of it took.
    pub(crate) fn summary(&self, copied: u64, seconds: f64) -> Value {
        json!({
            "passes": self.state.passes,
            "last": {
                "left": self.left, "copied": copied, "seconds": seconds, "projected_s": self.projected,
            },
            "budget_s": self.budget,
            "within_budget": self.budget.map(|budget| seconds <= budget as f64),
        })
    }
}

/// Where a disk is in the source.
fn position(job: &Job, disk: &Source) -> Option<usize> {
    let disks = &job.source.vm.disks;
    disks.iter().position(|other| other.path == disk.path)
}

impl SyncedDisk {
    pub(super) fn done(&self, folder: &Path) -> Result<Extents> {
        let journal = self.journal(folder)?;
        Ok(journal.map_or_else(Extents::default, |journal| journal.done().clone()))
    }
}

impl Synced {
    /// Brings the copy up to what `image` reads as where `live` is, and names it `target` too. `image` is
    /// an overlay of this run, or the source itself.
    pub(crate) fn finish(
        &self,
        image: &Image,
        target: &Path,
        how: &CopyOptions,
        live: &Extents,
        progress: &mut dyn FnMut(f64),
    ) -> Result<Copied, CopyError> {
        let size = image.virtual_size();
        let own = match image.top().scratch {
            true => own(image)?,
            false => Extents::default(),
        };
        let recorded = |e: Error| {
            CopyError::Image(ImageError::Io {
                path: self.folder.clone(),
                source: std::io::Error::other(e.to_string()),
            })
        };
        let done = self.disk.done(&self.folder).map_err(recorded)?;
        let done = done.within(live).minus(&own);
        let mut journal = self.disk.restart(&self.folder, done.clone()).map_err(recorded)?;
        let file = self.folder.join(&self.disk.file);
        let ranges = live.minus(&done);
        let stale = Refill::allocated(&file)?.minus(live);
        let refill = Refill {
            source: image,
            target: &file,
            pace: how.pace.as_ref(),
            cancel: how.cancel.clone(),
        };
        let total = ranges.bytes().max(1) as f64;
        refill.run(&ranges, &stale, &mut journal, &mut |bytes| {
            progress(bytes as f64 / total);
        })?;
        let written = refill.check(how)?;
        let link = std::fs::hard_link(&file, target);
        link.map_err(|source| CopyError::Io {
            path: target.to_owned(),
            source,
        })?;
        Ok(Copied {
            virtual_size: size,
            written,
            resumed: done.bytes(),
        })
    }
}

/// What an overlay holds itself, whole clusters of it.
fn own(overlay: &Image) -> Result<Extents, CopyError> {
    let mut own = Extents::default();
    qemu_img::layers(&overlay.spec(), &mut |range, depth| {
        if depth == 0 {
            own.insert(range);
        }
    })?;
    Ok(own)
}
