//! `convert`: inspect -> plan -> fix on an overlay -> verify -> copy -> domain XML -> report.
//!
//! Nothing is copied before the fix has been read back and proved. The source is only read; with
//! `--in-place` the overlay's blocks are committed to it at the end, after an undo log is on disk.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::actions::{self, Converted, Walked, Walking};
use crate::boot_path::Controller;
use crate::check::{Check, CheckState};
use crate::disk::chain::Image;
use crate::domain::{DiskFormat, Emit, Patch, kubevirt};
use crate::drivers::catalogue::Catalogue;
use crate::drivers::media::Media;
use crate::drivers::origin;
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::fix::apply::{self, Fix, FixError};
use crate::fix::journal::{self, Journal, State};
use crate::fix::trim::DataMap;
use crate::guest::ntfs3g::MountOptions;
use crate::guest::{DiskId, FsKind, GuestRead, Volume, VolumeId};
use crate::ids::Accepted;
use crate::inspect::{Inspection, OsFamily, Severity, Survey};
use crate::later::holes;
use crate::plan::firstboot::{GENERATED, Wishes};
use crate::plan::outlook::Outlook;
use crate::plan::{self, Plan};
use crate::report::{self, Bytes, DiskTrim, Report, Request, Timings};
use crate::source::mirror;
use crate::stop;
use crate::text;
use crate::transfer::Pace;
use crate::ui::{Ui, count, document};
use crate::verify;

use super::copy::{self, Arriving, Begun};
use super::devices::Devices;
use super::finish::finish;
use super::foresee::{self, Seen};
use super::in_place::{in_place, in_place_format, journal_disks, roll_back_after};
use super::later::{self, Copying};
use super::linux;
use super::machine::{MachineOptions, TargetDisk};
use super::name::safe_name;
use super::output::{OutputFolder, Preference};

use super::prepare::{self, Prepared};
use super::resume::{self, Resumed};
use super::sync::Last;
use crate::boot::in_use;
use crate::session::engine::Engine;
use crate::session::vm::{ChangedDisk, OpenDisk, Opening, VmDisks, VmSession};
use crate::session::{Names, Session, Source, SourceMachine, first, looked, read_only};

/// Where packages of the virtio-win project put the ISO.
pub const DEFAULT_ISO: &str = "/usr/share/virtio-win/virtio-win.iso";

/// What is only needed while working, below the partial folder.
pub(super) const WORK: &str = ".work";

/// What is written to the disk with Windows.
const OVERLAY: &str = ".overlay.qcow2";
/// What is written to another disk that its boot files are on; below [`WORK`].
const BOOT_OVERLAY: &str = "boot.qcow2";

/// Everything the user decided.
pub struct Job {
    pub source: SourceMachine,
    pub engine: Engine,
    /// A Linux guest needs none.
    pub media_path: Option<PathBuf>,
    pub driver_config: Vec<PathBuf>,
    /// `None`: not asked for.
    pub bootstrap: Option<Option<Controller>>,
    pub output: Option<PathBuf>,
    pub format: DiskFormat,
    pub compress: bool,
    /// `--copy`.
    pub copying: Copying,
    pub in_place: bool,
    /// Block devices to copy to instead of files, one per disk, the one Windows is on first.
    pub devices: Vec<PathBuf>,
    /// They read as zeroes.
    pub target_is_zero: bool,
    /// Refuse drivers whose catalogue is not in order, instead of warning.
    pub require_signed: bool,
    /// Leave out what nobody needs: free space, page files.
    pub trim: bool,
    /// Compare source and copy after the copy.
    pub verify_copy: bool,
    pub force: bool,
    /// Goes on with an interrupted copy.
    pub resume: bool,
    pub(crate) pace: Option<Pace>,
    /// Makes the last pass of a sync.
    pub from_sync: bool,
    /// Seconds that may take.
    pub budget: Option<u64>,
    /// `--repair-bcd`.
    pub repair_bcd: bool,
    /// Leave the old hypervisor's services as they are.
    pub keep_tools: bool,
    pub firstboot: Wishes,
    /// Who makes a Linux guest ready.
    pub linux: plan::linux::Preference,
    /// Paths in it are filled in by the conversion.
    pub machine: MachineOptions,
    /// Goes into the report as it is.
    pub request: Request,
    /// Besides the domain XML.
    pub emit: Vec<Emit>,
    pub kubevirt: kubevirt::Options,
    /// What may keep Windows from starting and does not stop the conversion.
    pub accept: Accepted,
    pub xml_patch: Option<Patch>,
}

impl Job {
    pub(super) fn name(&self) -> String {
        safe_name(&self.machine.name)
    }

    fn target_folder(&self) -> PathBuf {
        self.output
            .clone()
            .unwrap_or_else(|| PathBuf::from(format!("{}-kvm", self.name())))
    }

    /// What may stand where the result goes. `sources` lists the files of the source.
    fn preference<'s>(&self, sources: &'s dyn Fn() -> Vec<PathBuf>) -> Preference<'s> {
        Preference {
            force: self.force,
            undo: self.in_place,
            resume: self.resume,
            sync: self.from_sync,
            sources: Some(sources),
        }
    }

    pub fn catalogue(&self) -> Result<Catalogue> {
        let mut catalogue = Catalogue::builtin();
        for file in &self.driver_config {
            catalogue.merge_file(file).map_err(|e| {
                Error::usage(format!("reading the driver catalogue {}", file.display()))
                    .because(e)
                    .hint("hyper2kvm docs drivers describes the format")
            })?;
        }
        Ok(catalogue)
    }

    /// The drivers, when some were named; whether that is an error comes out when the guest is known.
    fn media_if_named(&self) -> Result<Option<Box<dyn Media>>> {
        self.media_path.as_ref().map(|_| self.media()).transpose()
    }

    pub fn media(&self) -> Result<Box<dyn Media>> {
        let Some(path) = &self.media_path else {
            let error = Error::usage("no virtio-win drivers were named");
            return Err(origin::hints(DEFAULT_ISO)
                .into_iter()
                .fold(error, Error::hint));
        };
        origin::open(path, &self.catalogue()?)
    }
}

/// What `convert` would do.
pub struct Planned {
    pub inspection: Inspection,
    pub plan: Plan,
    /// What that leaves where, when the documents of the VM can be written.
    pub outlook: Option<Outlook>,
}

/// `plan`: the same reading and deciding as `convert`, on the source opened read-only.
pub fn plan_only(job: &Job, ui: &Ui) -> Result<Planned> {
    let catalogue = job.catalogue()?;
    let media = job.media_if_named()?;
    let sources = || source_files(job);
    let target = OutputFolder::check(&job.target_folder(), &job.preference(&sources))?;
    // Who only asks may stand anywhere.
    if job.output.is_some() {
        OutputFolder::check_writable(&target)?;
    }
    ui.status("Inspecting", &job.source.path.display().to_string());
    let work = Names::new();
    let disks = job.source.disks(work.folder())?;
    check_in_place(job, &disks)?;
    Devices::claim(job, &disks, false)?;
    disks.check_kernel()?;
    Last::look(job, ui, &target, &disks)?;
    let (session, survey) = VmSession::open(job.engine, &disks, ui, read_only)?;
    if survey.inspection.os.family == OsFamily::Linux {
        session.close()?;
        let mut inspection = survey.inspection;
        let (plan, outlook) = linux::decide(job, ui, &disks, &mut inspection, &target)?;
        job.source.opened.check_unchanged()?;
        return Ok(Planned {
            inspection,
            plan,
            outlook,
        });
    }
    let media = media.map_or_else(|| job.media(), Ok)?;
    let seen = Seen {
        survey: &survey,
        guest: &session.reader(),
        look: &|guest| session.inspect_through(guest),
        disks: &disks,
        engine: session.engine,
        target: &target,
    };
    let prepared = foresee::plan_for(job, &seen, media.as_ref(), &catalogue)?;
    session.close()?;
    if prepared.plan.blockers.is_empty() {
        actions::check_edits(&prepared.edited).map_err(FixError::from)?;
    }
    looked()?;
    job.source.opened.check_unchanged()?;
    Ok(Planned {
        inspection: survey.inspection,
        plan: prepared.plan,
        outlook: prepared.outlook,
    })
}

fn check_in_place(job: &Job, disks: &VmDisks) -> Result<()> {
    if job.in_place {
        for disk in disks.iter() {
            in_place_format(&disk.image()?)?;
        }
        // From now on, and not only at the end: who reads it would read a mixture.
        for disk in disks.iter().filter(|disk| disks.is_changed(disk.id)) {
            let image = disk.image()?;
            image.hold_for_writing()?;
            in_use::refuse_suspended(&image)?;
        }
    }
    Ok(())
}

pub fn convert(job: &Job, ui: &Ui) -> Result<Report> {
    convert_job(job, ui).map_err(|error| match error.kind {
        // What fails because of a signal fails in many ways.
        ErrorKind::Failed if stop::requested() => Error::new(
            ErrorKind::Interrupted,
            "interrupted; the source is untouched",
        ),
        _ => error,
    })
}

fn convert_job(job: &Job, ui: &Ui) -> Result<Report> {
    let start = Instant::now();
    let catalogue = job.catalogue()?;
    let media = job.media_if_named()?;
    let sources = || source_files(job);
    let mut folder = OutputFolder::create(&job.target_folder(), &job.preference(&sources))?;
    resume::refuse_packed(job, &mut folder)?;
    let disks = job.source.disks(&folder.path().join(WORK))?;
    let source = first(&disks)?;
    check_in_place(job, &disks)?;
    let devices = Devices::claim(job, &disks, true)?;
    disks.check_kernel()?;

    let mut last = Last::look(job, ui, folder.target(), &disks)?;
    let changed = |disk: &Source| disks.is_changed(disk.id);
    let resumed = Resumed::take(job, ui, &mut folder, &disks, &changed)?;
    ui.status("Inspecting", &source.path.display().to_string());
    let overlay = |source: &Source| match disks.is_system(source.id) {
        true => Ok(folder.path().join(OVERLAY)),
        false => work_file(&folder, BOOT_OVERLAY),
    };
    let open = |engine: Engine, source: &Source| {
        let image = source.image()?;
        if resumed.is_some() || engine.reads_directly(&image)? {
            return read_only(engine, source);
        }
        let overlay = overlay(source)?;
        // There when another engine had a look already.
        let _ = std::fs::remove_file(&overlay);
        let session = Session::overlay(engine, source, &image, &overlay)?;
        Ok(OpenDisk::Write(session))
    };
    let (mut session, survey) = VmSession::open(job.engine, &disks, ui, open)?;
    if survey.inspection.os.family == OsFamily::Linux {
        session.close()?;
        let from = linux::Started {
            devices: &devices,
            resumed: resumed.as_ref(),
            last,
            at: start,
        };
        return linux::convert(job, ui, folder, &disks, survey.inspection, from);
    }
    // While the plan is made.
    let opening = match &resumed {
        Some(_) => Opening::default(),
        None => session.open_overlays(&disks, overlay)?,
    };
    let media = media.map_or_else(|| job.media(), Ok)?;
    let seen = Seen {
        survey: &survey,
        guest: &session.reader(),
        look: &|guest: &dyn GuestRead| session.inspect_through(guest),
        disks: &disks,
        engine: session.engine,
        target: folder.target(),
    };
    let prepared = foresee::plan_for(job, &seen, media.as_ref(), &catalogue)?;
    if !prepared.plan.blockers.is_empty() {
        return Err(prepare::refused(
            &survey.inspection,
            prepared.plan.blockers.clone(),
        ));
    }
    save_json(
        &folder.path().join("plan.json"),
        document(
            "plan",
            report::plan_document(
                &prepared.plan,
                prepared.outlook.as_ref(),
                &survey.inspection,
            ),
        ),
    )?;
    save_generated(folder.path(), &prepared)?;
    point("inspected")?;
    session.take_overlays(opening)?;
    let inspect_s = start.elapsed().as_secs_f64();

    let fix_start = Instant::now();
    let media = prepared.basis.media(media.as_ref());
    let fixed = match &resumed {
        Some(resumed) => fixed_before(
            ui, &folder, &disks, session, survey, &prepared, &media, resumed,
        )?,
        None => fix(job, ui, &folder, &disks, session, survey, &prepared, &media)?,
    };
    let fix_s = fix_start.elapsed().as_secs_f64();

    let copy_start = Instant::now();
    last.as_mut().map_or(Ok(()), Last::begin)?;
    let made = match job.copying {
        _ if job.in_place => in_place(ui, &disks, fixed)?,
        Copying::Later => later::keep_fixed(job, ui, &folder, &disks, fixed)?,
        Copying::Now => {
            let decided = decided(&prepared.plan);
            let begun = Begun {
                folder: &folder,
                devices: &devices,
                resumed: resumed.as_ref(),
                last: last.as_ref(),
                decided: &decided,
            };
            copy_disks(job, ui, &disks, fixed, &begun)?
        }
    };
    let copy_s = copy_start.elapsed().as_secs_f64();

    let timings = Timings {
        inspect_s,
        fix_s,
        copy_s,
        total_s: start.elapsed().as_secs_f64(),
    };
    let summary = last.map(|last| last.summary(start));
    match complete(
        job,
        &mut folder,
        &devices,
        &prepared,
        made,
        timings,
        summary,
    ) {
        // The disk is written already: it must not stay so without a folder that can undo it.
        Err(error) if job.in_place => Err(match folder.journal() {
            Ok(mut journal) => roll_back_after(&disks, &mut journal, error),
            Err(lost) => Error::new(
                ErrorKind::NotRolledBack,
                format!("the fix failed and the disk could NOT be restored: {lost}"),
            )
            .because(error),
        }),
        outcome => outcome,
    }
}

/// The files of the source, with what its images stand on as far as that can be read now.
fn source_files(job: &Job) -> Vec<PathBuf> {
    let mut files = vec![job.source.path.clone()];
    for disk in &job.source.vm.disks {
        files.push(disk.path.clone());
        let format = job.source.format.as_deref().or(disk.format.as_deref());
        if let Ok(image) = Image::open_info(&disk.path, format, &job.source.allow_backing) {
            files.extend(image.files().map(Path::to_path_buf));
        }
    }
    files
}

/// The last steps: domain XML, report, and the folder under its final name.
fn complete(
    job: &Job,
    folder: &mut OutputFolder,
    devices: &Devices,
    prepared: &Prepared,
    disks: Disks,
    timings: Timings,
    sync: Option<serde_json::Value>,
) -> Result<Report> {
    point("copied")?;
    let mut report = finish(job, folder, prepared, disks)?;
    report.timings = timings;
    report.sync = sync;
    save_report(job, folder, devices, &mut report, &prepared.plan)?;
    Ok(report)
}

/// Both forms of the report, and the folder under its final name.
pub(super) fn save_report(
    job: &Job,
    folder: &mut OutputFolder,
    devices: &Devices,
    report: &mut Report,
    plan: &Plan,
) -> Result<()> {
    report.warnings.extend(folder.notes()?);
    report.transport = mirror::transport(&job.source.path).name();
    report.bytes.fetched = mirror::fetched();
    let extras = super::page::extras(job, folder.path(), report);
    let page = text::called(&report::html::page(report, plan, &extras)).into_owned();
    let path = folder.path().join("report.html");
    std::fs::write(&path, page)
        .map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))?;
    remove_work_files(folder.path())?;
    report.files = folder.settle()?;
    save_json(
        &folder.path().join("report.json"),
        document("report", serde_json::json!(report)),
    )?;
    point("before-rename")?;
    stopped()?;
    // The last look before the result is there: what was read is what the source still holds.
    job.source.opened.check_unchanged()?;
    devices.finish()?;
    point("devices-finished")
        .and_then(|()| folder.complete())
        .inspect_err(|_| devices.give_up())
}

/// What a run with the same options must decide again to go on with this one.
fn decided(plan: &Plan) -> serde_json::Value {
    serde_json::json!(plan.actions)
}

/// The proved overlays and what is known of them.
pub(super) struct Fixed {
    /// Of the disks that may have been changed.
    pub(super) images: BTreeMap<DiskId, Image>,
    pub(super) journal: Journal,
    pub(super) before: Inspection,
    pub(super) after: Inspection,
    pub(super) checks: Vec<Check>,
    pub(super) trim: Vec<DiskTrim>,
    pub(super) engine: Engine,
}

#[expect(clippy::too_many_arguments)]
fn fix(
    job: &Job,
    ui: &Ui,
    folder: &OutputFolder,
    disks: &VmDisks,
    session: VmSession,
    survey: Survey,
    prepared: &Prepared,
    media: &dyn Media,
) -> Result<Fixed> {
    stopped()?;
    let plan = &prepared.plan;
    let volume = prepared.basis.windows.system_volume;
    // Not in place: there is no copy it could make shorter.
    let mut maps = Vec::new();
    if job.trim && !job.in_place {
        for source in disks.iter().filter(|d| disks.is_changed(d.id)) {
            let image = source.image()?;
            maps.push((source, std::thread::spawn(move || DataMap::of(&image))));
        }
    }
    let (disk, others) = journal_disks(disks, job.in_place)?;
    let check = second_reader(&session, volume);
    let failed = |e: journal::JournalError| Error::failed("keeping the journal").because(e);
    let mut journal =
        Journal::create(folder.path(), disk, others, apply::records(plan)).map_err(failed)?;
    let engine = session.engine;
    let Survey { inspection, hives } = survey;
    let mut walking = Vec::new();
    if let Some(hives) = hives
        && !plan.actions.is_empty()
    {
        ui.status(
            "Fixing",
            &format!("{} on an overlay", count(plan.actions.len(), "action")),
        );
        let fix = Fix {
            actions: &plan.actions,
            volume,
            media,
            before: &session.reader(),
            edited: &prepared.edited,
            journal: &mut journal,
        };
        let options = MountOptions {
            force_dirty: first(disks)?.force_dirty,
        };
        walking = fix
            .apply(hives, || Ok(session.writer(options)))
            .map_err(Error::from)?;
    }
    let changed = session.into_changed()?;
    let trim = trimmed(ui, maps, &changed)?;
    let mut images = BTreeMap::new();
    for disk in changed {
        let image = disk.export.image().clone();
        disk.export.close()?;
        if job.copying == Copying::Later {
            holes::mark(&image)?;
        }
        images.insert(disk.id, image);
    }
    let written = walking.into_iter().map(Walking::join).collect();
    let fixed = prove(
        ui, check, disks, images, journal, prepared, media, inspection, trim, written,
    )?;
    Ok(Fixed { engine, ..fixed })
}

/// What reads the result back.
fn second_reader(session: &VmSession, system: VolumeId) -> Engine {
    // BitLocker is opened in this process, whoever wrote to it.
    let contained = |v: &Volume| {
        let container = v.state.container;
        v.id == system && container.is_some_and(|kind| kind != FsKind::Bitlocker)
    };
    match session.reader().volumes().iter().any(contained) {
        true => Engine::OPENED,
        false => Engine::EMBEDDED,
    }
}

/// The overlays of an interrupted run, verified again. Nothing is fixed.
#[expect(clippy::too_many_arguments)]
fn fixed_before(
    ui: &Ui,
    folder: &OutputFolder,
    disks: &VmDisks,
    session: VmSession,
    survey: Survey,
    prepared: &Prepared,
    media: &dyn Media,
    resumed: &Resumed,
) -> Result<Fixed> {
    stopped()?;
    resumed.check_plan(&decided(&prepared.plan))?;
    let journal = Journal::load(&folder.path().join(journal::FILE_NAME))
        .map_err(|e| Error::failed("reading the journal of the interrupted run").because(e))?;
    let engine = session.engine;
    let check = second_reader(&session, prepared.basis.windows.system_volume);
    session.close()?;
    let mut images = BTreeMap::new();
    for (i, source) in disks.iter().enumerate() {
        if let Some(overlay) = resumed.overlay(folder, i)
            && disks.is_changed(source.id)
        {
            images.insert(source.id, source.image()?.with_overlay(&overlay)?);
        }
    }
    let (before, trim) = (survey.inspection, resumed.trim());
    // What the hives hold is known to the run that wrote them: here they are walked anew.
    let written = Vec::new();
    let fixed = prove(
        ui, check, disks, images, journal, prepared, media, before, trim, written,
    )?;
    Ok(Fixed { engine, ..fixed })
}

/// Takes out of the overlays what nobody needs.
fn trimmed(
    ui: &Ui,
    maps: Vec<(&Source, MapThread)>,
    changed: &[ChangedDisk],
) -> Result<Vec<DiskTrim>> {
    if maps.is_empty() {
        return Ok(Vec::new());
    }
    stopped()?;
    ui.status("Trimming", "free space and page files, on the overlay");
    let mut trimmed = Vec::new();
    for (source, map) in maps {
        let data = map
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        for disk in changed.iter().filter(|d| d.id == source.id) {
            let blocks = disk.export.disk();
            trimmed.push(copy::trim_session(&blocks, &disk.layout, source, &data)?);
        }
    }
    Ok(trimmed)
}

/// The map of the source is read while the fix is made.
type MapThread = std::thread::JoinHandle<Result<DataMap>>;

/// Opens the overlays again, read-only and with the other reader, and checks everything.
#[expect(clippy::too_many_arguments)]
fn prove(
    ui: &Ui,
    engine: Engine,
    disks: &VmDisks,
    overlays: BTreeMap<DiskId, Image>,
    mut journal: Journal,
    prepared: &Prepared,
    media: &dyn Media,
    before: Inspection,
    trim: Vec<DiskTrim>,
    written: Vec<Walked>,
) -> Result<Fixed> {
    point("fixed")?;
    stopped()?;
    ui.status("Verifying", "reading the result back");
    let (session, survey) = VmSession::open(engine, disks, ui, |e, source| {
        match overlays.get(&source.id) {
            Some(overlay) => Ok(OpenDisk::Read(Session::read_by(e, source, overlay)?)),
            None => read_only(e, source),
        }
    })?;
    let wanted = prepared.basis.wanted();
    let reader = session.reader();
    let mut checks = verify::verify_written(&survey, &written, &reader, &wanted);
    let after = survey.hives.as_ref().map(|hives| Converted {
        volume: prepared.basis.windows.system_volume,
        guest: &reader,
        hives,
        media,
    });
    checks.extend(verify::planned(&prepared.plan.actions, after.as_ref()));
    session.close()?;
    accept(&mut checks, &prepared.plan);
    if !crate::check::is_ready_but_for_accepted(&checks) {
        let mut error = Error::failed(
            "the fix did not make this disk boot-ready; the disk itself was not changed",
        );
        for check in checks.iter().filter(|c| !c.ok && !c.accepted) {
            error = error.hint(format!("[{}] {}", check.id, check.message));
        }
        return Err(error);
    }
    journal
        .set_state(State::Verified)
        .map_err(|e| Error::failed("keeping the journal").because(e))?;
    let mut after = survey.inspection;
    after.source = before.source.clone();
    Ok(Fixed {
        images: overlays,
        journal,
        before,
        after,
        checks,
        trim,
        engine,
    })
}

/// A check that the plan said would fail, and that was accepted then, is accepted now.
fn accept(checks: &mut [Check], plan: &Plan) {
    let foreseen = |id| plan.checks.iter().any(|c| c.id == id && c.accepted);
    for check in checks.iter_mut().filter(|c| !c.ok) {
        check.accepted = check.severity == Severity::Blocker && foreseen(check.id);
    }
}

/// The disks in their final state, and what it took.
pub(super) struct Disks {
    pub(super) targets: Vec<TargetDisk>,
    pub(super) bytes: Bytes,
    pub(super) fixed: Fixed,
}

fn copy_disks(
    job: &Job,
    ui: &Ui,
    disks: &VmDisks,
    mut fixed: Fixed,
    begun: &Begun<'_>,
) -> Result<Disks> {
    let folder = begun.folder;
    let mut arriving = Vec::new();
    for (i, disk) in disks.iter().enumerate() {
        stopped()?;
        let left = begun.resumed.and_then(|resumed| resumed.overlay(folder, i));
        let image = if let Some(image) = fixed.images.get(&disk.id) {
            image.clone()
        } else if let Some(overlay) = left {
            disk.image()?.with_overlay(&overlay)?
        } else if job.trim {
            let overlay = work_file(folder, &format!("overlay-{i}.qcow2"))?;
            let (image, trimmed) = copy::trimmed_overlay(disk, &overlay)?;
            fixed.trim.push(trimmed);
            image
        } else {
            disk.image()?
        };
        arriving.push(Arriving {
            image,
            sector_size: fixed.before.sector_size(disk.id),
            system: disks.is_system(disk.id),
            boot_order: disks.boot_order(disk.id),
            synced: begun.last.and_then(|last| last.disk(job, disk)),
        });
    }
    let (targets, bytes) = copy::to_targets(job, ui, arriving, &fixed.trim, begun)?;
    if job.verify_copy {
        fixed.checks.push(Check::new(
            "copy-identical",
            Severity::Blocker,
            CheckState::Ok,
            format!(
                "{} compared byte for byte with the source",
                count(targets.len(), "copy")
            ),
        ));
    }
    Ok(Disks {
        targets,
        bytes,
        fixed,
    })
}

/// The name of a file that is only needed while working.
pub(super) fn work_file(folder: &OutputFolder, name: &str) -> Result<PathBuf> {
    let work = folder.path().join(WORK);
    std::fs::create_dir_all(&work)
        .map_err(|e| Error::failed(format!("creating {}", work.display())).because(e))?;
    Ok(work.join(name))
}

/// The generated files, to be read and kept by people.
fn save_generated(folder: &Path, prepared: &Prepared) -> Result<()> {
    let folder = folder.join(GENERATED);
    let failed = |e: std::io::Error| Error::failed("writing the first-boot files").because(e);
    for (name, bytes) in &prepared.basis.generated {
        std::fs::create_dir_all(&folder).map_err(failed)?;
        std::fs::write(folder.join(name), bytes).map_err(failed)?;
    }
    Ok(())
}

pub(super) fn save_json(path: &Path, value: serde_json::Value) -> Result<()> {
    std::fs::write(path, format!("{value:#}\n"))
        .map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))
}

fn remove_work_files(folder: &Path) -> Result<()> {
    let failed = |e: std::io::Error| Error::failed("removing work files").because(e);
    let overlay = folder.join(OVERLAY);
    if overlay.exists() {
        std::fs::remove_file(overlay).map_err(failed)?;
    }
    match std::fs::remove_dir_all(folder.join(WORK)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(failed(e)),
        _ => Ok(()),
    }
}

pub(super) fn point(name: &str) -> Result<()> {
    failpoint::hit(name).map_err(|e| Error::failed("converting").because(e))
}

/// SIGINT and SIGTERM are honoured between steps; children are killed by the tool wrapper.
pub(super) fn stopped() -> Result<()> {
    if stop::requested() {
        return Err(Error::new(
            ErrorKind::Interrupted,
            "interrupted; the source is untouched",
        ));
    }
    Ok(())
}
