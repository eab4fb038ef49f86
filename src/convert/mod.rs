//! The main job: from a source VM to an output directory.
//!
//! [`convert`] is the story: open -> inspect -> plan -> fix an overlay -> verify -> copy -> domain
//! XML -> report. Nothing is copied before the fix has been read back and verified. The source is
//! only read. `--in-place` commits the overlay's blocks to it at the end, after an undo log is on
//! disk.

pub mod copy;
pub mod devices;
mod disks;
pub mod exchange;
mod finish;
mod fixing;
mod foresee;
mod in_place;
pub mod job;
pub mod later;
pub mod linux;
pub mod machine;
pub mod name;
mod next;
pub mod output;
mod page;
pub mod place;
pub mod prepare;
mod replace;
mod resume;
mod run;
mod space;
mod steps;
pub mod sync;
mod work;

pub use in_place::{RestoreError, restore};

use crate::actions;
use crate::error::{Error, ErrorKind, Result};
use crate::fix::apply::FixError;
use crate::guest::GuestRead;
use crate::inspect::{Inspection, OsFamily};
use crate::plan::Plan;
use crate::plan::outlook::Outlook;
use crate::report::Report;
use crate::stop;
use crate::timeline;
use crate::ui::Ui;

use crate::session::vm::VmSession;
use crate::session::{self, Names, read_only};
use devices::Devices;
use fixing::Fixing;
use foresee::Seen;
use in_place::in_place;
use job::{Copying, Job};
use output::{FolderOptions, OutputFolder};
use run::{Run, check_in_place, decided};
use sync::Last;

/// The result of `plan`: what `convert` would do.
pub struct Planned {
    pub inspection: Inspection,
    pub plan: Plan,
    /// The files it would leave, if the documents of the VM can be rendered.
    pub outlook: Option<Outlook>,
}

/// `plan`: reads and decides like `convert`, on a source opened read-only.
pub fn plan_only(job: &Job, ui: &Ui) -> Result<Planned> {
    plan_job(job, ui, &foresee::is_there)
}

/// `has` is whether this host has a program or library.
fn plan_job(job: &Job, ui: &Ui, has: &dyn Fn(&str) -> bool) -> Result<Planned> {
    let catalogue = job.drivers.catalogue()?;
    let driver_source = job.drivers.source_if_named()?;
    let sources = || job.source_files();
    let target = OutputFolder::check(&job.target_folder(), &FolderOptions::of(job, &sources))?;
    // `plan` may run in any directory.
    if job.output.folder.is_some() {
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
        let (plan, outlook) = linux::decide((job, ui), &disks, &mut inspection, &target, has)?;
        job.source.access.opened.check_unchanged()?;
        return Ok(Planned {
            inspection,
            plan,
            outlook,
        });
    }
    let driver_source = driver_source.map_or_else(|| job.drivers.source(), Ok)?;
    let seen = Seen {
        survey: &survey,
        guest: &session.reader(),
        look: &|guest| session.inspect_through(guest),
        disks: &disks,
        engine: session.engine,
        target: &target,
        saver: None,
        has,
    };
    let prepared = foresee::plan_for(job, &seen, driver_source.as_ref(), &catalogue)?;
    session.close()?;
    if prepared.plan.blockers.is_empty() {
        actions::check_edits(&prepared.edited).map_err(FixError::from)?;
    }
    session::looked()?;
    job.source.access.opened.check_unchanged()?;
    Ok(Planned {
        inspection: survey.inspection,
        plan: prepared.plan,
        outlook: prepared.outlook,
    })
}

/// Converts a VM and returns the report.
pub fn convert(job: &Job, ui: &Ui) -> Result<Report> {
    convert_job(job, ui, &foresee::is_there).map_err(|error| explained(job, error))
}

/// The error of a conversion, with what it left.
fn explained(job: &Job, error: Error) -> Error {
    let error = match error.kind {
        // A signal can surface as many different errors.
        ErrorKind::Failed if stop::requested() => Error::new(
            ErrorKind::Interrupted,
            "interrupted; the source is untouched",
        ),
        _ => error,
    };
    let said = error
        .hints
        .iter()
        .any(|hint| hint.starts_with(resume::KEPT));
    match !said && job.output.resume && OutputFolder::holds_a_copy(&job.target_folder()) {
        true => error.hint(format!(
            "{}; it goes when the conversion starts over",
            resume::KEPT
        )),
        false => error,
    }
}

fn convert_job(job: &Job, ui: &Ui, has: &dyn Fn(&str) -> bool) -> Result<Report> {
    let catalogue = job.drivers.catalogue()?;
    let driver_source = job.drivers.source_if_named()?;

    let mut run = {
        let _span = timeline::span("open the source");
        Run::open(job, ui)?
    };
    let (mut session, survey) = run.inspect()?;
    if survey.inspection.os.family == OsFamily::Linux {
        session.close()?;
        return linux::convert(run, survey.inspection, has);
    }

    // Runs while the plan is made.
    let opening = run.open_overlays(&session, &survey.inspection)?;
    let driver_source = driver_source.map_or_else(|| job.drivers.source(), Ok)?;
    // A resumed run already has the originals.
    let saver = run.resumed.is_none().then(|| run.saver());
    let seen = Seen {
        survey: &survey,
        guest: &session.reader(),
        look: &|guest: &dyn GuestRead| session.inspect_through(guest),
        disks: &run.disks,
        engine: session.engine,
        target: run.folder.target(),
        saver: saver.as_ref(),
        has,
    };
    let mut prepared = {
        let _span = timeline::span("plan");
        foresee::plan_for(job, &seen, driver_source.as_ref(), &catalogue)?
    };
    run.keep_plan(&prepared, &survey.inspection)?;
    run.prepare_copy();
    {
        let _span = timeline::span("wait for the overlay");
        session.take_overlays(opening)?;
    }
    run.clock.inspected();

    let backups = prepared.backups.take();
    let fixing = Fixing {
        run: &run,
        prepared: &prepared,
        backups,
        driver_source: &prepared.basis.driver_source(driver_source.as_ref()),
    };
    let fixed = match &run.resumed {
        Some(resumed) => fixing.fixed_before(session, survey, resumed)?,
        None => fixing.fix(session, survey)?,
    };
    run.clock.fixed();

    run.begin_copy()?;
    let disks = match job.copy.method {
        Copying::InPlace => in_place(&run, fixed)?,
        Copying::Later => later::keep_fixed(&run, fixed)?,
        Copying::Now => copy::copy_disks(&run, fixed, &decided(&prepared.plan))?,
    };
    run.clock.copied();

    let _span = timeline::span("finish");
    finish::finish(run, &prepared, disks)
}

#[cfg(test)]
mod loader_tests;
#[cfg(test)]
mod plain_tests;
#[cfg(test)]
mod report_tests;
#[cfg(test)]
mod split_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod whole_tests;
#[cfg(test)]
mod written_tests;
