//! A running conversion: its open resources and its state.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::Value;

use crate::actions::Saver;
use crate::error::{Error, Result};
use crate::inspect::{Inspection, Survey};
use crate::plan::Plan;
use crate::plan::firstboot::GENERATED;
use crate::report::{self, Timings};
use crate::timeline;
use crate::ui::{Ui, document};

use super::devices::Devices;
use super::disks::in_place_format;
use super::job::{Copying, Job};
use super::output::{FolderOptions, OutputFolder, save_json, work_file};
use super::prepare::{self, Prepared};
use super::resume::{self, Resumed};
use super::steps::point;
use super::sync::Last;
use super::work::{BOOT_OVERLAY, OVERLAY, WORK};
use crate::boot::in_use;
use crate::session::engine::Engine;
use crate::session::vm::{OpenDisk, Opening, VmDisks, VmSession};
use crate::session::{Disk, Session, read_only};

/// Size from which the cluster map of a disk takes 8 MiB, with clusters of 4 KiB.
const LARGE: u64 = 256 << 30;

/// A running conversion. Fields are dropped in order: the directory is removed after the files in
/// it are closed.
pub(super) struct Run<'a> {
    pub(super) job: &'a Job,
    pub(super) ui: &'a Ui,
    pub(super) resumed: Option<Resumed>,
    pub(super) last: Option<Last>,
    pub(super) devices: Devices,
    pub(super) disks: VmDisks,
    pub(super) folder: OutputFolder,
    pub(super) clock: Clock,
}

impl<'a> Run<'a> {
    /// Creates the output directory, opens the disks and claims the target devices.
    pub(super) fn open(job: &'a Job, ui: &'a Ui) -> Result<Self> {
        let clock = Clock::start();
        let sources = || job.source_files();
        let mut folder =
            OutputFolder::create(&job.target_folder(), &FolderOptions::of(job, &sources))?;
        resume::refuse_packed(job, &mut folder)?;
        let disks = job.source.disks(&folder.path().join(WORK))?;
        check_in_place(job, &disks)?;
        let devices = Devices::claim(job, &disks, true)?;
        disks.check_kernel()?;
        let last = Last::look(job, ui, folder.target(), &disks)?;
        let resumed = Resumed::take(job, ui, &mut folder, &disks)?;
        Ok(Self {
            job,
            ui,
            resumed,
            last,
            devices,
            disks,
            folder,
            clock,
        })
    }

    /// Opens the guest, over overlays if its engine needs them to read.
    pub(super) fn inspect(&self) -> Result<(VmSession, Survey)> {
        let _span = timeline::span("inspect");
        let source = self.disks.system()?;
        self.ui
            .status("Inspecting", &source.path.display().to_string());
        let open = |engine: Engine, source: &Disk| {
            if self.resumed.is_some() || engine.reads_directly(&source.image)? {
                return read_only(engine, source);
            }
            let overlay = self.overlay(source)?;
            // Exists if another engine has already examined the guest.
            let _ = std::fs::remove_file(&overlay);
            let session = Session::overlay(engine, source, &overlay)?;
            Ok(OpenDisk::Write(session))
        };
        VmSession::open(self.job.engine, &self.disks, self.ui, open)
    }

    /// The overlay that takes the writes to a disk.
    fn overlay(&self, source: &Disk) -> Result<PathBuf> {
        match self.disks.is_system(source.id) {
            true => Ok(self.folder.path().join(OVERLAY)),
            false => work_file(&self.folder, BOOT_OVERLAY),
        }
    }

    /// Starts to open the overlays for the fix and to mount the volume of Windows in them. A
    /// resumed run already has them.
    pub(super) fn open_overlays(
        &self,
        session: &VmSession,
        inspection: &Inspection,
    ) -> Result<Opening> {
        let windows = inspection.windows.as_ref();
        let system = windows.map(|windows| windows.system_volume);
        match &self.resumed {
            Some(_) => Ok(Opening::default()),
            None => session.open_overlays((&self.disks, system), |source| self.overlay(source)),
        }
    }

    /// The saver for the originals of the changed files.
    pub(super) fn saver(&self) -> Saver {
        Saver {
            folder: self.folder.path().to_path_buf(),
            durably: self.job.copy.is_in_place(),
        }
    }

    /// Refuses a blocked plan; otherwise saves the plan beside the result.
    pub(super) fn keep_plan(&self, prepared: &Prepared, inspection: &Inspection) -> Result<()> {
        let plan = &prepared.plan;
        if !plan.blockers.is_empty() {
            return Err(prepare::refused(inspection, plan.blockers.clone()));
        }
        self.save_plan(report::plan_document(
            plan,
            prepared.outlook.as_ref(),
            inspection,
        ))?;
        save_generated(self.folder.path(), prepared)?;
        point("inspected")
    }

    /// Starts the slow preparations of the copy while the fix runs.
    pub(super) fn prepare_copy(&self) {
        let method = self.job.copy.method;
        let read = self
            .disks
            .iter()
            .filter(|disk| is_read(method, disk.image.virtual_size()));
        read.for_each(|disk| disk.image.prepare());
    }

    pub(super) fn save_plan(&self, plan: Value) -> Result<()> {
        save_json(
            &self.folder.path().join("plan.json"),
            document("plan", plan),
        )
    }

    /// From this point the copies of a sync follow the source.
    pub(super) fn begin_copy(&mut self) -> Result<()> {
        self.last.as_mut().map_or(Ok(()), Last::begin)
    }

    /// The expected and the actual duration of the last pass of a sync.
    pub(super) fn sync_summary(&mut self) -> Option<Value> {
        let started = self.clock.started;
        self.last.take().map(|last| last.summary(started))
    }
}

/// The duration of each step.
pub(super) struct Clock {
    started: Instant,
    step: Instant,
    timings: Timings,
}

impl Clock {
    fn start() -> Self {
        let now = Instant::now();
        Self {
            started: now,
            step: now,
            timings: Timings::default(),
        }
    }

    pub(super) fn inspected(&mut self) {
        self.timings.inspect_s = self.lap();
    }

    pub(super) fn fixed(&mut self) {
        self.timings.fix_s = self.lap();
    }

    pub(super) fn copied(&mut self) {
        self.timings.copy_s = self.lap();
    }

    /// All timings until now.
    pub(super) fn timings(&self) -> Timings {
        Timings {
            total_s: self.started.elapsed().as_secs_f64(),
            ..self.timings.clone()
        }
    }

    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        let lap = now.duration_since(self.step).as_secs_f64();
        self.step = now;
        lap
    }
}

/// Whether the cluster map of a disk of this size is read. That of a large one is, even if the disk is not copied.
fn is_read(method: Copying, size: u64) -> bool {
    match method {
        Copying::Now => true,
        Copying::Later => size >= LARGE,
        Copying::InPlace => false,
    }
}

/// Refuses disks that cannot be changed in place, and locks them for writing.
pub(super) fn check_in_place(job: &Job, disks: &VmDisks) -> Result<()> {
    in_place_formats(job, disks)?;
    if job.copy.is_in_place() {
        // Locked from the start: a reader during the commit would see a mixture.
        for disk in disks.iter().filter(|disk| disks.is_changed(disk.id)) {
            disk.image.hold_for_writing()?;
            in_use::refuse_suspended(&disk.image)?;
        }
    }
    Ok(())
}

fn in_place_formats(job: &Job, disks: &VmDisks) -> Result<()> {
    let mut disks = disks.iter().filter(|_| job.copy.is_in_place());
    disks.try_for_each(|disk| in_place_format(&disk.image).map(drop))
}

/// The decisions that a run with the same options must repeat to continue this one.
pub(super) fn decided(plan: &Plan) -> Value {
    serde_json::json!(plan.actions)
}

/// Saves the generated files for people to read and keep.
fn save_generated(folder: &Path, prepared: &Prepared) -> Result<()> {
    let folder = folder.join(GENERATED);
    let failed = |e: std::io::Error| Error::failed("writing the first-boot files").because(e);
    for (name, bytes) in &prepared.basis.generated {
        std::fs::create_dir_all(&folder).map_err(failed)?;
        std::fs::write(folder.join(name), bytes).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{job, names};
    use super::*;
    use crate::disk::chain::Image;
    use crate::guest::DiskId;

    #[test]
    fn a_map_is_read_where_the_disk_is_copied_or_its_map_is_large() {
        for (method, small, large) in [
            (Copying::Now, true, true),
            (Copying::Later, false, true),
            (Copying::InPlace, false, false),
        ] {
            assert_eq!(is_read(method, LARGE - 1), small, "{method:?}");
            assert_eq!(is_read(method, LARGE), large, "{method:?}");
        }
    }

    /// No other format can be written without a conversion.
    #[test]
    fn every_disk_of_a_fix_in_place_is_raw_or_qcow2() {
        use crate::disk::detect::Format;
        let dir = tempfile::tempdir().unwrap();
        let paths = [0, 1].map(|i| dir.path().join(format!("{i}.raw")));
        for path in &paths {
            std::fs::write(path, vec![0; 1 << 20]).unwrap();
        }
        let mut job = job(&paths, dir.path());
        for (format, in_place, fine) in [
            (Format::RAW, true, true),
            (Format::QCOW2, true, true),
            (Format::VHDX, true, false),
            (Format::VHDX, false, true),
        ] {
            for which in [0, 1] {
                let mut list = job.source.disks(dir.path()).unwrap().to_vec();
                list[which].image = list[which].image.clone().shown_as(format);
                let disks = VmDisks::with_roles(list, DiskId::nth(0, 2), DiskId::nth(0, 2));
                job.copy.method = if in_place {
                    Copying::InPlace
                } else {
                    Copying::Now
                };
                let checked = in_place_formats(&job, &disks);
                assert_eq!(checked.is_ok(), fine, "{format:?} {which}");
                if let Err(error) = checked {
                    assert_eq!(error.kind, crate::error::ErrorKind::Usage);
                }
            }
        }
    }

    /// A run with the same options that decides one thing otherwise cannot continue.
    #[test]
    fn what_was_decided_is_every_action_and_every_generated_file_is_saved() {
        use crate::demo::WinVersion;
        use crate::testing::{MemoryGuest, driver_source};
        use crate::types::DiskBus;
        let guest = MemoryGuest::new(WinVersion::Win10);
        let mut prepared = guest.prepare(&driver_source(), Some(DiskBus::Sata));
        let dir = tempfile::tempdir().unwrap();
        prepared.basis.generated = [("one.cmd", "1"), ("two.ps1", "2")]
            .map(|(name, text)| (name.to_owned(), text.into()))
            .into();
        save_generated(dir.path(), &prepared).unwrap();
        let folder = dir.path().join(GENERATED);
        assert_eq!(names(&folder), ["one.cmd", "two.ps1"]);
        assert_eq!(
            std::fs::read_to_string(folder.join("two.ps1")).unwrap(),
            "2"
        );
        let actions = prepared.plan.actions.len();
        assert!(actions > 2);
        let all = decided(&prepared.plan);
        for i in 0..actions {
            let mut plan = prepared.plan.clone();
            plan.actions.remove(i);
            assert_ne!(decided(&plan), all, "{i}");
        }
    }

    /// Of two disks each has an overlay of its own; the originals of a disk in place survive a loss of power.
    #[test]
    fn an_overlay_belongs_to_its_disk_and_originals_are_durable_where_nothing_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [0, 1].map(|i| dir.path().join(format!("{i}.raw")));
        for path in &paths {
            std::fs::write(path, vec![0; 1 << 20]).unwrap();
        }
        let mut job = job(&paths, &dir.path().join("out"));
        for in_place in [false, true] {
            if in_place {
                job.copy.method = Copying::InPlace;
            }
            let ui = super::super::testing::ui();
            let mut run = Run::open(&job, &ui).unwrap();
            // The first disk is taken for the one with the system until it is inspected.
            let held = paths
                .each_ref()
                .map(|path| Image::open_info(path, Some("raw"), &[]).is_err());
            assert_eq!(held, [in_place, false]);
            let list = run.disks.to_vec();
            run.disks = VmDisks::with_roles(list, DiskId::nth(0, 2), DiskId::nth(1, 2));
            let overlays = [0, 1].map(|i| run.overlay(&run.disks[i]).unwrap());
            let partial = dir.path().join(".out.partial");
            let wanted = [
                partial.join(".overlay.qcow2"),
                partial.join(".work/boot.qcow2"),
            ];
            assert_eq!(overlays, wanted);
            let saver = run.saver();
            assert_eq!((saver.folder, saver.durably), (partial, in_place));
        }
    }

    /// Another reader of a disk that is being changed would read a mixture.
    #[test]
    fn every_disk_that_is_changed_in_place_is_held_from_the_start() {
        for (in_place, held) in [(false, [false; 3]), (true, [true, false, true])] {
            let dir = tempfile::tempdir().unwrap();
            let paths = [0, 1, 2].map(|i| dir.path().join(format!("{i}.raw")));
            for path in &paths {
                std::fs::write(path, vec![0; 1 << 20]).unwrap();
            }
            let mut job = job(&paths, dir.path());
            if in_place {
                job.copy.method = Copying::InPlace;
            }
            let list = job.source.disks(dir.path()).unwrap().to_vec();
            let disks = VmDisks::with_roles(list, DiskId::nth(2, 3), DiskId::nth(0, 3));
            check_in_place(&job, &disks).unwrap();
            let refused = paths
                .each_ref()
                .map(|path| Image::open_info(path, Some("raw"), &[]).is_err());
            assert_eq!(refused, held, "in place: {in_place}");
        }
    }
}
