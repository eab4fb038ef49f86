//! The last pass: `convert --from-sync`.
//!
//! The fix works on an overlay over the source, as always. The result is what that overlay reads
//! as, and the copies of earlier passes already contain most of it. The last pass copies the
//! result's data that is not in the journal, and everything in the overlay itself. Other data in
//! the copy is zeroed, so the result equals that of a conversion in one run. Then the copy gets a
//! second name in the new output directory. Its first name is removed with the synced directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use crate::disk::{Image, ImageError, export};

use crate::disk::copy::{Copied, CopyError, CopyOptions};
use crate::disk::refill::{Refill, Work};
use crate::error::{Blocker, Error, Result};
use crate::text::shell_word;
use crate::tool::qemu_img;
use crate::transfer::{Extents, Pace};
use crate::ui::{Ui, bytes, count};

use super::super::job::Job;
use super::changes::Now;
use super::pass;
use super::state::{SyncState, SyncedDisk, comparison, projection};
use crate::session::Disk;

/// A synced directory whose VM is off.
pub(crate) struct Last {
    state: SyncState,
    folder: PathBuf,
    changed: Vec<Extents>,
    now: Vec<Now>,
    budget: Option<u64>,
    projected: f64,
    left: u64,
    copied: Arc<AtomicU64>,
}

/// The copy of one disk, and the ranges it lacks.
#[derive(Clone)]
pub struct Synced {
    disk: SyncedDisk,
    folder: PathBuf,
    rest: Arc<Rest>,
    copied: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Rest {
    /// The ranges of the copy that already match the result.
    done: Extents,
    work: Work,
}

impl Rest {
    /// Of a copy that is to hold `live`. `own` is what this run's overlay holds of it, `done` what
    /// the journal records, and `there` what the copy has data for.
    fn of(live: &Extents, own: &Extents, done: &Extents, there: &Extents) -> Self {
        let done = done.within(live).minus(own);
        let left = live.minus(&done);
        let work = Work {
            stale: there.minus(live),
            recorded: left.minus(own),
            unrecorded: left.within(own),
        };
        Self { done, work }
    }
}

impl Last {
    /// Determines the changes since the last pass, and refuses if copying them takes longer than
    /// the budget. Writes nothing. `disks` are those of the source, whole and locked.
    pub(crate) fn look(job: &Job, ui: &Ui, folder: &Path, disks: &[Disk]) -> Result<Option<Self>> {
        if !job.output.from_sync {
            return Ok(None);
        }
        let Some(state) = SyncState::load(folder)? else {
            let again = shell_word(&folder.display().to_string());
            return Err(
                Error::failed(format!("{} contains no synced VM", folder.display()))
                    .hint(format!("hyper2kvm sync SOURCE -o {again} makes one")),
            );
        };
        let images = in_order(job, disks);
        let sizes: Vec<u64> = images.iter().map(Image::virtual_size).collect();
        let now: Vec<Now> = images.iter().map(Now::of).collect::<Result<_>>()?;
        let changed = state.changes(&sizes, &now)?;
        let held: Vec<&Image> = images.iter().collect();
        state.check_sample(folder, &held, &now, &changed)?;
        let (mut left, mut all) = (0, 0);
        for ((disk, image), changed) in state.disks.iter().zip(&images).zip(&changed) {
            let done = disk.done(folder)?.minus(changed);
            let used = pass::used(image, changed, job.copy.trim)?;
            all += used.bytes();
            left += used.minus(&done).bytes();
        }
        let mut projected = projection(&state, left, job.copy.pace.as_ref().map(Pace::rate));
        if job.copy.verify {
            projected += comparison(&state, all);
        }
        let budget = job.output.budget;
        let budget = budget.map_or(String::new(), |budget| format!(", budget {budget} s"));
        ui.status(
            "Finishing",
            &format!(
                "a sync of {}; {} left, {projected:.1} s expected{budget}",
                count(state.passes.len(), "pass"),
                bytes(left)
            ),
        );
        check_budget(job.output.budget, projected, left)?;
        Ok(Some(Self {
            state,
            folder: folder.to_owned(),
            changed,
            now,
            budget: job.output.budget,
            projected,
            left,
            copied: Arc::default(),
        }))
    }

    /// From this point the copies follow the current source.
    pub(crate) fn begin(&mut self) -> Result<()> {
        self.state.follow(&self.folder, &self.changed, &self.now)
    }

    /// Returns the copy of a source disk that will read as `image` in these ranges. `image` is an
    /// overlay of this run, or the source itself.
    pub(crate) fn disk(
        &self,
        job: &Job,
        disk: &Disk,
        image: &Image,
        live: &Extents,
    ) -> Result<Option<Synced>> {
        let disk = position(job, disk).and_then(|i| self.state.disks.get(i));
        let Some(disk) = disk else { return Ok(None) };
        // The fix writes different bytes in each run, so they are not recorded.
        let own = match image.top().scratch {
            true => own(image)?,
            false => Extents::default(),
        };
        let there = Refill::data(&self.folder.join(&disk.file))?;
        let rest = Rest::of(live, &own, &disk.done(&self.folder)?, &there);
        Ok(Some(Synced {
            disk: disk.clone(),
            folder: self.folder.clone(),
            rest: Arc::new(rest),
            copied: self.copied.clone(),
        }))
    }

    /// The expected and the actual figures, for the report.
    pub(crate) fn summary(&self, start: Instant) -> Value {
        let seconds = start.elapsed().as_secs_f64();
        json!({
            "passes": self.state.passes,
            "last": {
                "left": self.left, "copied": self.copied.load(Ordering::Relaxed),
                "seconds": seconds, "projected_s": self.projected,
            },
            "budget_s": self.budget,
            "within_budget": self.budget.map(|budget| seconds <= budget as f64),
        })
    }
}

fn check_budget(budget: Option<u64>, projected: f64, left: u64) -> Result<()> {
    let Some(budget) = budget.filter(|budget| projected > *budget as f64) else {
        return Ok(());
    };
    let blocker = Blocker::new(
        "sync-over-budget",
        format!(
            "the last pass is expected to take {projected:.1} s, with {} left to copy; the budget is {budget} s",
            bytes(left)
        ),
        "start the VM again where it was, run hyper2kvm sync once more, and try again; or allow more with --budget",
    );
    let what = "the last pass would take too long";
    Err(Error::refused(what, vec![blocker]))
}

/// The images in the order of the source.
fn in_order(job: &Job, disks: &[Disk]) -> Vec<Image> {
    let mut images: Vec<Option<Image>> = vec![None; job.source.vm.disks.len()];
    for disk in disks {
        if let Some(place) = position(job, disk).and_then(|i| images.get_mut(i)) {
            *place = Some(disk.image.clone());
        }
    }
    images.into_iter().flatten().collect()
}

/// The index of a disk in the source.
fn position(job: &Job, disk: &Disk) -> Option<usize> {
    let disks = &job.source.vm.disks;
    disks.iter().position(|other| other.path == disk.path)
}

impl Synced {
    /// Bytes still to be copied.
    pub(crate) fn left(&self) -> u64 {
        self.rest.work.bytes()
    }

    /// Copies the rest of `image`, and gives the copy the name `target` too.
    pub(crate) fn finish(
        &self,
        image: &Image,
        target: &Path,
        how: &CopyOptions,
        progress: &mut dyn FnMut(f64),
    ) -> Result<Copied, CopyError> {
        let recorded = |e: Error| {
            CopyError::Image(ImageError::Io {
                path: self.folder.clone(),
                source: std::io::Error::other(e.to_string()),
            })
        };
        let Rest { done, work } = &*self.rest;
        let journal = self.disk.restart(&self.folder, done.clone());
        let mut journal = journal.map_err(recorded)?;
        let file = self.folder.join(&self.disk.file);
        let refill = Refill {
            source: image,
            target: &file,
            pace: how.pace.as_ref(),
            cancel: how.cancel.clone(),
        };
        let total = work.bytes();
        refill.run(work, &mut journal, &mut |bytes| {
            progress(bytes as f64 / total.max(1) as f64);
        })?;
        self.copied.fetch_add(total, Ordering::Relaxed);
        let written = refill.check(how)?;
        let link = std::fs::hard_link(&file, target);
        link.map_err(|source| CopyError::Io {
            path: target.to_owned(),
            source,
        })?;
        Ok(Copied {
            virtual_size: image.virtual_size(),
            written,
            resumed: done.bytes(),
            shared: 0,
        })
    }
}

/// The clusters that an overlay itself has.
fn own(overlay: &Image) -> Result<Extents, CopyError> {
    if let Some(own) = export::own_ranges(overlay) {
        let failed = |e| ImageError::from_io(overlay.path(), e);
        return Ok(own.map_err(failed)?);
    }
    let mut own = Extents::default();
    qemu_img::layers(&overlay.spec(), &mut |range, depth| {
        if depth == 0 {
            own.insert(range);
        }
    })?;
    Ok(own)
}

#[cfg(test)]
mod tests {
    use super::super::super::testing::job;
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn what_takes_longer_than_the_budget_is_refused_before_it_begins() {
        for (budget, projected, fine) in [
            (None, 1e9, true),
            (Some(10), 9.9, true),
            (Some(10), 10.0, true),
            (Some(10), 10.1, false),
            (Some(0), 0.5, false),
        ] {
            let checked = check_budget(budget, projected, 5);
            assert_eq!(checked.is_ok(), fine, "{budget:?} {projected}");
            if let Err(error) = checked {
                assert_eq!(error.kind, ErrorKind::Refused);
                assert_eq!(error.blockers[0].code, "sync-over-budget");
                let reason = &error.blockers[0].reason;
                for part in [
                    format!("{projected:.1} s"),
                    format!("{} left", bytes(5)),
                    format!("budget is {} s", budget.unwrap()),
                ] {
                    assert!(reason.contains(&part), "{part}: {reason}");
                }
            }
        }
    }

    /// The copies have the order of the source, and a conversion that of the new VM.
    #[test]
    fn a_disk_is_known_by_its_place_in_the_source() {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (1..4u64).map(|i| dir.path().join(format!("{i}"))).collect();
        for (i, path) in paths.iter().enumerate() {
            std::fs::write(path, vec![0; (i + 1) << 20]).unwrap();
        }
        let job = job(&paths, dir.path());
        let mut disks = job.source.disks(dir.path()).unwrap().to_vec();
        disks.rotate_left(1);
        let sizes: Vec<_> = in_order(&job, &disks)
            .iter()
            .map(Image::virtual_size)
            .collect();
        assert_eq!(sizes, [1 << 20, 2 << 20, 3 << 20]);
        assert_eq!(position(&job, &disks[0]), Some(1));
        assert_eq!(position(&job, &disks[2]), Some(0));
    }

    /// The result is the same as that of a conversion in one go.
    #[test]
    fn the_last_pass_copies_what_is_missing_and_zeroes_what_is_stale() {
        let set = |ranges: &[[u64; 2]]| -> Extents { ranges.iter().map(|[a, b]| *a..*b).collect() };
        let rest = Rest::of(
            &set(&[[0, 40], [60, 70]]),
            &set(&[[10, 20]]),
            &set(&[[0, 30], [50, 55]]),
            &set(&[[0, 30], [50, 58], [65, 80]]),
        );
        // What this run's overlay holds is copied again, and not recorded.
        assert_eq!(rest.done, set(&[[0, 10], [20, 30]]));
        assert_eq!(rest.work.unrecorded, set(&[[10, 20]]));
        assert_eq!(rest.work.recorded, set(&[[30, 40], [60, 70]]));
        assert_eq!(rest.work.stale, set(&[[50, 58], [70, 80]]));
    }

    #[test]
    fn a_last_pass_needs_a_synced_directory() {
        let dir = tempfile::tempdir().unwrap();
        let mut job = job(&[dir.path().join("a")], dir.path());
        let ui = super::super::super::testing::ui();
        let look = |job: &Job| Last::look(job, &ui, dir.path(), &[]).map(|last| last.is_some());
        assert!(!look(&job).unwrap());
        job.output.from_sync = true;
        let error = look(&job).unwrap_err();
        assert!(error.message.contains("no synced VM"), "{error}");
        assert!(error.hints[0].contains("hyper2kvm sync"), "{error:?}");
    }

    /// A VM of one raw disk of 4 MiB, of which a pass has copied the first.
    fn synced(dir: &Path) -> (Job, crate::session::vm::VmDisks) {
        const MIB: u64 = 1 << 20;
        let disk = dir.join("disk.raw");
        std::fs::write(&disk, vec![7; 4 << 20]).unwrap();
        let mut job = job(std::slice::from_ref(&disk), &dir.join("out"));
        job.output.from_sync = true;
        let disks = job.source.disks(dir).unwrap();
        let folder = dir.join("out");
        std::fs::create_dir(&folder).unwrap();
        let mut state = SyncState::new("vm", &disk);
        let copy = SyncedDisk {
            size: 4 * MIB,
            file: "vm.sync.qcow2".into(),
            links: Now::of(&disks[0].image).unwrap().links,
        };
        std::fs::write(folder.join(&copy.file), "copy").unwrap();
        copy.restart(&folder, std::iter::once(0..MIB).collect())
            .unwrap();
        state.disks.push(copy);
        state.passes.push(super::super::state::Pass {
            at: 0,
            seconds: 3.0,
            overhead_s: 1.0,
            changed: 0,
            copied: 128 * MIB,
            left: 0,
            change_rate: 0.0,
            projected_s: 0.0,
            bandwidth: None,
        });
        state.save(&folder).unwrap();
        (job, disks)
    }

    #[test]
    fn a_last_pass_knows_what_is_left_and_how_long_that_takes() {
        let dir = tempfile::tempdir().unwrap();
        let (mut job, disks) = synced(dir.path());
        let ui = super::super::super::testing::ui();
        let folder = dir.path().join("out");
        let look = |job: &Job| Last::look(job, &ui, &folder, &disks);
        let mut last = look(&job).unwrap().unwrap();
        assert_eq!((last.left, last.budget), (3 << 20, None));
        // 64 MiB a second; a tenth for the fix, and four readings of a second.
        let seconds = 4.1 + 3.0 / 64.0;
        assert!(
            (last.projected - seconds).abs() < 0.001,
            "{}",
            last.projected
        );
        let summary = last.summary(Instant::now());
        assert_eq!(summary["last"]["left"], 3 << 20);
        assert_eq!(summary["last"]["copied"], 0);
        assert_eq!(summary["passes"].as_array().unwrap().len(), 1);
        assert!(summary["budget_s"].is_null() && summary["within_budget"].is_null());
        // It compares all of the disk, at the rate that is assumed at least.
        job.copy.verify = true;
        let compared = look(&job).unwrap().unwrap();
        assert!(
            (compared.projected - seconds - 0.04).abs() < 0.001,
            "{}",
            compared.projected
        );
        job.copy.verify = false;
        job.output.budget = Some(4);
        let error = look(&job).map(drop).unwrap_err();
        assert_eq!(error.blockers[0].code, "sync-over-budget");
        job.output.budget = Some(5);
        let summary = look(&job).unwrap().unwrap().summary(Instant::now());
        assert_eq!(summary["budget_s"], 5);
        assert_eq!(summary["within_budget"], true);
        // What this run is allowed to copy in a second counts.
        job.output.budget = None;
        job.copy.pace = Some(Pace::new(1 << 20));
        let slow = look(&job).unwrap().unwrap();
        assert!(
            (slow.projected - 4.1 - 3.0).abs() < 0.001,
            "{}",
            slow.projected
        );
        // Nothing is forgotten before the copy begins.
        let done = |last: &Last| last.state.disks[0].done(&folder).unwrap().bytes();
        assert_eq!(done(&last), 1 << 20);
        last.changed = vec![std::iter::once(0..64 << 10).collect()];
        last.begin().unwrap();
        assert_eq!(done(&last), (1 << 20) - (64 << 10));
        assert_eq!(SyncState::load(&folder).unwrap().unwrap().changed, 64 << 10);
    }

    /// A VM of two raw disks of 1 and 2 MiB, copied as far as `done`, whose order is another one now.
    fn synced_disks(dir: &Path, done: [Extents; 2]) -> (Job, Vec<Disk>, PathBuf) {
        let paths = [1u64, 2].map(|mib| {
            let path = dir.join(format!("{mib}.raw"));
            std::fs::write(&path, vec![mib as u8; (mib << 20) as usize]).unwrap();
            path
        });
        let folder = dir.join("out");
        std::fs::create_dir(&folder).unwrap();
        let mut job = job(&paths, &folder);
        job.output.from_sync = true;
        job.copy.trim = false;
        let mut disks = job.source.disks(dir).unwrap().to_vec();
        let mut state = SyncState::new("vm", &paths[0]);
        for (i, (disk, done)) in disks.iter().zip(done).enumerate() {
            let copy = SyncedDisk {
                size: disk.image.virtual_size(),
                file: super::super::state::copy_name("vm", i),
                links: Now::of(&disk.image).unwrap().links,
            };
            let file = folder.join(&copy.file);
            Refill::create(&file, copy.size).unwrap();
            let journal = &mut copy.restart(&folder, Extents::default()).unwrap();
            let refill = Refill {
                source: &disk.image,
                target: &file,
                pace: None,
                cancel: None,
            };
            let work = Work {
                recorded: done,
                ..Work::default()
            };
            refill.run(&work, journal, &mut |_| {}).unwrap();
            state.disks.push(copy);
        }
        state.save(&folder).unwrap();
        disks.reverse();
        (job, disks, folder)
    }

    #[test]
    fn a_last_pass_counts_what_every_disk_lacks() {
        const GRAIN: u64 = 64 << 10;
        let dir = tempfile::tempdir().unwrap();
        let done = [GRAIN, 3 * GRAIN].map(Extents::whole);
        let (mut job, disks, folder) = synced_disks(dir.path(), done);
        let ui = super::super::super::testing::ui();
        let look = |job: &Job| Last::look(job, &ui, &folder, &disks).unwrap().unwrap();
        let last = look(&job);
        assert_eq!(last.left, (3 << 20) - 4 * GRAIN);
        job.copy.verify = true;
        // Nothing was measured: 100 MiB a second.
        let compared = look(&job).projected - last.projected;
        assert!((compared - 0.03).abs() < 0.001, "{compared}");
        // What changed since is missing again.
        let mut state = SyncState::load(&folder).unwrap().unwrap();
        let base = state.disks[1].links.clone();
        let newer = super::super::changes::Link {
            files: json!("snapshot"),
            ranges: vec![[GRAIN, GRAIN]],
        };
        state.disks[1].links.insert(0, newer);
        state.save(&folder).unwrap();
        let mut last = look(&job);
        assert_eq!(last.left, (3 << 20) - 3 * GRAIN);
        last.begin().unwrap();
        assert_eq!(last.state.disks[1].links, base);
    }

    /// A page file is of no use to the next start.
    #[test]
    fn a_last_pass_copies_what_a_trim_takes_only_where_nothing_is_trimmed() {
        let lab = super::super::super::testing::Plain::new();
        let folder = lab.path("out");
        std::fs::create_dir(&folder).unwrap();
        let mut job = job(&[lab.windows()], &folder);
        job.output.from_sync = true;
        let disks = job.source.disks(&folder).unwrap();
        let mut state = SyncState::new("vm", &lab.windows());
        let copy = SyncedDisk {
            size: disks[0].image.virtual_size(),
            file: "vm.sync.qcow2".into(),
            links: Now::of(&disks[0].image).unwrap().links,
        };
        std::fs::write(folder.join(&copy.file), "copy").unwrap();
        state.disks.push(copy);
        state.save(&folder).unwrap();
        let ui = super::super::super::testing::ui();
        let left = [false, true].map(|trim| {
            job.copy.trim = trim;
            Last::look(&job, &ui, &folder, &disks)
                .unwrap()
                .unwrap()
                .left
        });
        let (freed, page_file) = (left[0] - left[1], lab.guest.spec.pagefile_size);
        assert!(
            freed >= page_file - (128 << 10) && freed < page_file + (4 << 20),
            "{freed} {page_file}"
        );
    }

    fn noted(pace: &std::fs::File) -> u64 {
        let mut bytes = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(pace, &mut bytes, 0).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// The writes of a fix are copied, but not recorded: another run writes other bytes.
    #[test]
    fn a_copy_is_finished_with_what_the_overlay_of_this_run_has() {
        use crate::block::BlockWrite;
        use crate::disk::export::Export;
        use std::os::unix::fs::MetadataExt;
        const GRAIN: u64 = 64 << 10;
        let dir = tempfile::tempdir().unwrap();
        let (half, all) = (Extents::whole(512 << 10), Extents::whole(2 << 20));
        let (job, disks, folder) = synced_disks(dir.path(), [half.clone(), all.clone()]);
        let ui = super::super::super::testing::ui();
        let mut last = Last::look(&job, &ui, &folder, &disks).unwrap().unwrap();
        last.begin().unwrap();
        // The disk of 2 MiB, whose last 64 KiB are free after the fix.
        let overlay = dir.path().join("overlay.qcow2");
        let export = Export::<dyn BlockWrite>::open_overlay(&disks[0].image, &overlay).unwrap();
        export.disk().write_at(GRAIN, &[9; GRAIN as usize]).unwrap();
        let image = export.image().clone();
        export.close().unwrap();
        let live = Extents::whole((2 << 20) - GRAIN);
        let of = |i: usize, image: &Image, live: &Extents| {
            last.disk(&job, &disks[i], image, live).unwrap().unwrap()
        };
        let (changed, plain) = (of(0, &image, &live), of(1, &disks[1].image, &half));
        assert_eq!((changed.left(), plain.left()), (GRAIN, 0));
        let rest = of(1, &disks[1].image, &Extents::whole(1 << 20));
        assert_eq!(rest.left(), 512 << 10);
        let target = dir.path().join("result.qcow2");
        let stopped = CopyOptions {
            cancel: Some(Arc::new(true.into())),
            ..CopyOptions::default()
        };
        let cancelled = changed.finish(&image, &target, &stopped, &mut |_| {});
        assert!(cancelled.is_err() && !target.exists());
        // A pace that is shared with other runs notes in its file that bytes were taken.
        let shared = Pace::shareable().unwrap();
        let how = CopyOptions {
            pace: Some(Pace::new(1 << 40).with(shared.try_clone().unwrap())),
            ..CopyOptions::default()
        };
        let mut told = Vec::new();
        let copied = changed.finish(&image, &target, &how, &mut |part| told.push(part));
        let copied = copied.unwrap();
        let blocks = target.metadata().unwrap().blocks() * 512;
        assert_eq!((copied.virtual_size, copied.written), (2 << 20, blocks));
        assert_eq!(copied.resumed, (2 << 20) - 2 * GRAIN);
        assert_eq!(told.last(), Some(&1.0));
        assert_ne!(noted(&shared), 0);
        let mut wanted = vec![2; 2 << 20];
        wanted[GRAIN as usize..][..GRAIN as usize].fill(9);
        wanted[(2 << 20) - GRAIN as usize..].fill(0);
        assert!(super::super::super::written_tests::qcow2(&target) == wanted);
        let own: Extents = std::iter::once(GRAIN..2 * GRAIN).collect();
        let recorded = last.state.disks[1].done(&folder).unwrap();
        assert_eq!(recorded, live.minus(&own));
        rest.finish(
            &disks[1].image,
            &dir.path().join("other.qcow2"),
            &how,
            &mut |_| {},
        )
        .unwrap();
        // Of both disks.
        let summary = last.summary(Instant::now());
        assert_eq!(summary["last"]["copied"], GRAIN + (512 << 10));
        let recorded = last.state.disks[0].done(&folder).unwrap();
        assert_eq!(recorded, Extents::whole(1 << 20));
    }

    /// An expected time is no measure of the actual one.
    #[test]
    fn a_last_pass_is_within_its_budget_by_the_time_that_it_took() {
        let dir = tempfile::tempdir().unwrap();
        let (mut job, disks) = synced(dir.path());
        job.output.budget = Some(5);
        let ui = super::super::super::testing::ui();
        let last = Last::look(&job, &ui, &dir.path().join("out"), &disks);
        let last = last.unwrap().unwrap();
        let before = |seconds| Instant::now() - std::time::Duration::from_secs(seconds);
        for (seconds, within) in [(0, true), (60, false)] {
            let summary = last.summary(before(seconds));
            assert_eq!(summary["within_budget"], within, "{seconds}");
            assert!(summary["last"]["seconds"].as_f64().unwrap() >= seconds as f64);
        }
    }

    #[test]
    fn another_disk_than_was_synced_is_no_last_pass() {
        let dir = tempfile::tempdir().unwrap();
        let (job, _) = synced(dir.path());
        let ui = super::super::super::testing::ui();
        let codes = |bytes: usize| {
            std::fs::write(dir.path().join("disk.raw"), vec![8; bytes]).unwrap();
            let mut job = super::super::super::testing::job(
                &[dir.path().join("disk.raw")],
                &dir.path().join("out"),
            );
            job.output.from_sync = true;
            let disks = job.source.disks(dir.path()).unwrap();
            let folder = dir.path().join("out");
            let error = Last::look(&job, &ui, &folder, &disks)
                .map(drop)
                .unwrap_err();
            error.blockers[0].code.clone()
        };
        drop(job);
        // Its only link was written to.
        assert_eq!(codes(4 << 20), "sync-base-changed");
        assert_eq!(codes(5 << 20), "sync-disks-changed");
    }
}
