//! Fixes the guest on overlays and verifies the result. Everything is read back before anything is
//! copied.

use std::collections::BTreeMap;
use std::thread::JoinHandle;

use crate::actions::{Backups, Converted, Walked, Walking};
use crate::check::Check;
use crate::disk::chain::Image;
use crate::drivers::driver_source::DriverSource;
use crate::error::{Error, Result};
use crate::fix::apply::{self, Fix};
use crate::fix::journal::{self, Journal, JournalError, JournalState};
use crate::fix::trim::DataMap;
use crate::guest::ntfs3g::MountOptions;
use crate::guest::{DiskId, FsKind, GuestRead, Volume, VolumeId};
use crate::inspect::{Hives, Inspection, Severity, Survey};
use crate::later::holes;
use crate::report::DiskTrim;
use crate::threads;
use crate::timeline;
use crate::ui::{Ui, count};
use crate::verify;

use super::copy;
use super::in_place::journal_disks;
use super::job::Copying;
use super::prepare::Prepared;
use super::resume::Resumed;
use super::run::{Run, decided};
use super::steps::{Fixed, point, stopped};
use crate::session::engine::Engine;
use crate::session::vm::{ChangedDisk, OpenDisk, VmSession};
use crate::session::{Disk, Session, read_only};

/// The inputs of a fix.
pub(super) struct Fixing<'a> {
    pub(super) run: &'a Run<'a>,
    pub(super) prepared: &'a Prepared,
    pub(super) driver_source: &'a dyn DriverSource,
    /// The backups started while the plan was made.
    pub(super) backups: Option<Backups>,
}

/// Overlays with a fix that has not been read back yet.
struct Unverified {
    /// The engine that wrote the fix.
    engine: Engine,
    /// The engine that reads it back.
    reader: Engine,
    /// The images of the disks that the fix may have changed.
    images: BTreeMap<DiskId, Image>,
    journal: Journal,
    before: Inspection,
    trim: Vec<DiskTrim>,
    /// The hives that were written; other threads are still walking them in memory.
    written: Vec<Walking>,
}

fn keeping(error: JournalError) -> Error {
    Error::failed("keeping the journal").because(error)
}

impl Fixing<'_> {
    /// Carries out the plan on the overlays of the session, and verifies them.
    pub(super) fn fix(mut self, session: VmSession, survey: Survey) -> Result<Fixed> {
        stopped()?;
        let backups = self.backups.take();
        let (job, disks) = (self.run.job, &self.run.disks);
        let plan = &self.prepared.plan;
        let maps = self.map_data();
        let (disk, others) = journal_disks(disks, job.copy.is_in_place())?;
        let (engine, reader) = (session.engine, self.second_reader(&session));
        let folder = self.run.folder.path();
        let mut journal =
            Journal::create(folder, disk, others, apply::records(plan)).map_err(keeping)?;
        let walking = match survey.hives {
            Some(hives) if !plan.actions.is_empty() => {
                self.apply(&session, (hives, backups), &mut journal)?
            }
            _ => Vec::new(),
        };
        let changed = session.into_changed()?;
        let trim = trimmed(self.run.ui, maps, &changed)?;
        let mut images = BTreeMap::new();
        for disk in changed {
            let image = disk.export.image().clone();
            {
                let _span = timeline::span("close the overlay");
                disk.export.close()?;
            }
            if job.copy.method == Copying::Later {
                holes::mark(&image)?;
            }
            images.insert(disk.id, image);
        }
        self.verify(Unverified {
            engine,
            reader,
            images,
            journal,
            before: survey.inspection,
            trim,
            written: walking,
        })
    }

    fn apply(
        &self,
        session: &VmSession,
        (hives, backups): (Hives, Option<Backups>),
        journal: &mut Journal,
    ) -> Result<Vec<Walking>> {
        let actions = &self.prepared.plan.actions;
        self.run.ui.status(
            "Fixing",
            &format!("{} on an overlay", count(actions.len(), "action")),
        );
        let options = MountOptions {
            force_dirty: self.run.disks.options.force_dirty,
        };
        let fix = Fix {
            actions,
            volume: self.prepared.basis.windows.system_volume,
            driver_source: self.driver_source,
            before: &session.reader(),
            edited: &self.prepared.edited,
            saver: self.run.saver(),
            backups,
            journal,
        };
        fix.apply(hives, || Ok(session.writer(options)))
            .map_err(Error::from)
    }

    /// Starts to map the data of the changed disks while the fix runs. In-place conversions copy
    /// nothing and need no map.
    fn map_data(&self) -> Vec<(&Disk, MapThread)> {
        let (job, disks) = (self.run.job, &self.run.disks);
        let mut maps = Vec::new();
        if job.copy.trim && !job.copy.is_in_place() {
            for source in disks.iter().filter(|d| disks.is_changed(d.id)) {
                let image = source.image.clone();
                let map = move || {
                    let _span = timeline::span("map the source");
                    DataMap::of(&image)
                };
                maps.push((source, std::thread::spawn(map)));
            }
        }
        maps
    }

    fn second_reader(&self, session: &VmSession) -> Engine {
        let system = self.prepared.basis.windows.system_volume;
        second_reader(session.reader().volumes(), system)
    }

    /// Verifies the overlays of an interrupted run again, without fixing anything.
    pub(super) fn fixed_before(
        &self,
        session: VmSession,
        survey: Survey,
        resumed: &Resumed,
    ) -> Result<Fixed> {
        stopped()?;
        resumed.check_plan(&decided(&self.prepared.plan))?;
        let folder = &self.run.folder;
        let journal = Journal::load(&folder.path().join(journal::FILE_NAME))
            .map_err(|e| Error::failed("reading the journal of the interrupted run").because(e))?;
        let (engine, reader) = (session.engine, self.second_reader(&session));
        session.close()?;
        let disks = &self.run.disks;
        let mut images = BTreeMap::new();
        for (i, source) in disks.iter().enumerate() {
            if let Some(overlay) = resumed.overlay(folder, i)
                && disks.is_changed(source.id)
            {
                images.insert(source.id, source.image.with_overlay(&overlay)?);
            }
        }
        self.verify(Unverified {
            engine,
            reader,
            images,
            journal,
            before: survey.inspection,
            trim: resumed.trim(),
            // The interrupted run walked the hives in memory; here they are walked again.
            written: Vec::new(),
        })
    }

    /// Opens the overlays again with the second reader, read-only, and runs every check.
    fn verify(&self, fix: Unverified) -> Result<Fixed> {
        point("fixed")?;
        stopped()?;
        let Prepared { plan, basis, .. } = self.prepared;
        self.run.ui.status("Verifying", "reading the result back");
        let open = |engine: Engine, source: &Disk| match fix.images.get(&source.id) {
            Some(overlay) => Ok(OpenDisk::Read(Session::read_by(engine, source, overlay)?)),
            None => read_only(engine, source),
        };
        let known: Vec<_> = fix.written.iter().map(|w| w.file().clone()).collect();
        let (session, survey) = {
            let _span = timeline::span("read back");
            let disks = (&self.run.disks, &known[..]);
            VmSession::open_knowing(fix.reader, disks, self.run.ui, open)?
        };
        let written = joined(fix.written);
        let _span = timeline::span("check");
        let reader = session.reader();
        let mut checks = verify::verify_written(&survey, &written, &reader, &basis.wanted());
        let after = survey.hives.as_ref().map(|hives| Converted {
            volume: basis.windows.system_volume,
            guest: &reader,
            hives,
            driver_source: self.driver_source,
        });
        checks.extend(verify::planned(&plan.actions, after.as_ref()));
        session.close()?;
        accept(&mut checks, &plan.checks);
        if !crate::check::is_ready_but_for_accepted(&checks) {
            return Err(not_ready(&checks));
        }
        let mut journal = fix.journal;
        journal.set_state(JournalState::Verified).map_err(keeping)?;
        let mut after = survey.inspection;
        after.source = fix.before.source.clone();
        Ok(Fixed {
            images: fix.images,
            journal,
            before: fix.before,
            after,
            checks,
            trim: fix.trim,
            engine: fix.engine,
        })
    }
}

/// The error of a fix after which checks fail that the user has not accepted.
fn not_ready(checks: &[Check]) -> Error {
    let error =
        Error::failed("the fix did not make this disk boot-ready; the disk itself was not changed");
    (checks.iter().filter(|c| !c.ok && !c.accepted)).fold(error, |error, check| {
        error.hint(format!("[{}] {}", check.id, check.message))
    })
}

/// Waits for the threads that walk the written hives.
fn joined(walking: Vec<Walking>) -> Vec<Walked> {
    let _span = timeline::span("wait for the walks");
    walking.into_iter().map(Walking::join).collect()
}

/// The engine that reads the result back.
fn second_reader(volumes: &[Volume], system: VolumeId) -> Engine {
    // BitLocker volumes are always opened in this process, whichever engine wrote to them.
    let contained = |v: &Volume| {
        let container = v.state.container;
        v.id == system && container.is_some_and(|kind| kind != FsKind::Bitlocker)
    };
    match volumes.iter().any(contained) {
        true => Engine::OPENED,
        false => Engine::EMBEDDED,
    }
}

/// Removes unneeded data from the overlays.
fn trimmed(
    ui: &Ui,
    maps: Vec<(&Disk, MapThread)>,
    changed: &[ChangedDisk],
) -> Result<Vec<DiskTrim>> {
    if maps.is_empty() {
        return Ok(Vec::new());
    }
    stopped()?;
    ui.status("Trimming", "free space and page files, on the overlay");
    let _span = timeline::span("trim");
    let mut trimmed = Vec::new();
    for (source, map) in maps {
        let data = threads::joined(map.join())?;
        for disk in changed.iter().filter(|d| d.id == source.id) {
            let blocks = disk.export.disk();
            trimmed.push(copy::trim_session(&blocks, &disk.layout, source, &data)?);
        }
    }
    Ok(trimmed)
}

/// A thread that reads the map of the source during the fix.
type MapThread = JoinHandle<Result<DataMap>>;

/// Accepts each failed check that the plan predicted and the user accepted.
fn accept(checks: &mut [Check], planned: &[Check]) {
    let foreseen = |id| planned.iter().any(|c| c.id == id && c.accepted);
    for check in checks.iter_mut().filter(|c| !c.ok) {
        check.accepted = check.severity == Severity::Blocker && foreseen(check.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::CheckState;

    /// A volume that an appliance opened is closed to the reader of this process.
    #[test]
    fn only_a_contained_volume_of_windows_is_read_back_through_an_appliance() {
        use crate::demo::WinVersion;
        use crate::testing::MemoryGuest;
        let guest = MemoryGuest::new(WinVersion::Win10);
        let reader = |container: Option<FsKind>, of_system: bool| {
            guest.look(&[], |fake, survey| {
                let mut fake = fake.clone();
                let system = survey.inspection.windows.as_ref().unwrap().system_volume;
                let mut others = fake.volumes().iter().map(|v| v.id);
                let other = others.find(|id| *id != system).unwrap();
                let changed = if of_system { system } else { other };
                fake.volume_mut(changed.partition).state.container = container;
                second_reader(fake.volumes(), system).access()
            })
        };
        use crate::disk::export::DaemonAccess::{Private, User};
        assert_eq!(reader(None, true), Private);
        assert_eq!(reader(Some(FsKind::Luks), true), User);
        assert_eq!(reader(Some(FsKind::Lvm), true), User);
        assert_eq!(reader(Some(FsKind::Bitlocker), true), Private);
        assert_eq!(reader(Some(FsKind::Luks), false), Private);
    }

    fn check(id: &'static str, severity: Severity, state: CheckState) -> Check {
        Check::new(id, severity, state, "")
    }

    /// Only checks predicted by the plan are accepted; any other failed check stops the conversion.
    #[test]
    fn only_a_blocker_that_was_foreseen_and_accepted_is_accepted_after_the_fix() {
        use CheckState::{CouldNotRun, Fault, Ok};
        use Severity::{Blocker, Warning};
        let mut foreseen = Vec::new();
        for (id, accepted) in [("bcd", true), ("boot-path", true), ("firmware", false)] {
            let mut one = check(id, Blocker, Fault);
            one.accepted = accepted;
            foreseen.push(one);
        }
        let mut checks = [
            check("boot-path", Blocker, Fault),
            check("boot-path", Blocker, CouldNotRun),
            check("boot-path", Blocker, Ok),
            check("bcd", Warning, Fault),
            check("firmware", Blocker, Fault),
            check("control-sets", Blocker, Fault),
        ];
        accept(&mut checks, &foreseen);
        let accepted = checks.each_ref().map(|check| check.accepted);
        assert_eq!(accepted, [true, true, false, false, false, false]);
        assert!(!crate::check::is_ready_but_for_accepted(&checks));
        assert!(crate::check::is_ready_but_for_accepted(&checks[..4]));
        // What was accepted is no reason.
        assert_eq!(
            not_ready(&checks).hints,
            ["[bcd] ", "[firmware] ", "[control-sets] "]
        );
    }
}
