//! Gathers for [`plan::plan`] everything that can be known before the first write. The guest is
//! inspected and verified as the draft will leave it ([`actions::preview`]). Every disk is opened,
//! and every document of the VM is rendered. The host is searched for the programs that the fix
//! runs.

use std::path::Path;

use crate::actions::{self, Action, Backups, EditedHives, PreviewHives, Saver};
use crate::drivers::catalogue::Catalogue;
use crate::drivers::driver_source::{self, DriverSource};
use crate::drivers::signature;
use crate::error::{Blocker, Error, ErrorKind, Result};
use crate::fix::apply;
use crate::guest::GuestRead;
use crate::inspect::{Hives, Survey, WindowsFacts};
use crate::plan::firstboot::Preferences;
use crate::plan::outlook::Outlook;
use crate::plan::{self, After, Draft, Foreseen};
use crate::registry::{self, HiveError};
use crate::threads::{joined, side_by_side};
use crate::timeline;
use crate::tool::{self, host, qemu_img, qsd};
use crate::verify;

use super::disks::in_place_format;
use super::finish;
use super::in_place::data_sector_size;
use super::job::Job;
use super::later;
use super::machine;
use super::prepare::{self, Basis, Prepared};
use super::space::{self, Needs};
use crate::session::engine::Engine;
use crate::session::vm::VmDisks;

/// The opened source.
pub(super) struct Seen<'a> {
    pub(super) survey: &'a Survey,
    pub(super) guest: &'a dyn GuestRead,
    /// Inspects the same disks through another reader.
    pub(super) look: &'a dyn Fn(&dyn GuestRead) -> Result<Survey>,
    pub(super) disks: &'a VmDisks,
    pub(super) engine: Engine,
    /// The output directory.
    pub(super) target: &'a Path,
    /// Where the originals of hives are kept; `None` where nothing is to be written.
    pub(super) saver: Option<&'a Saver>,
    /// Whether this host has a program or library.
    pub(super) has: &'a dyn Fn(&str) -> bool,
}

/// Decides everything that `plan` and `convert` do with a Windows guest. Returns an error only for
/// problems that a plan cannot show.
pub(super) fn plan_for(
    job: &Job,
    seen: &Seen<'_>,
    driver_source: &dyn DriverSource,
    catalogue: &Catalogue,
) -> Result<Prepared> {
    let (prepared, failed) = foreseen(job, seen, driver_source, catalogue)?;
    // The blockers already name what to do first.
    if prepared.plan.blockers.is_empty() {
        let missing = || {
            missing(
                &prepared.plan.actions,
                seen.engine.writes_past_us(),
                seen.has,
            )
        };
        if let Some(error) = failed.or_else(missing) {
            return Err(error);
        }
    }
    Ok(prepared)
}

/// The plan, and the first of the errors that it cannot show.
fn foreseen(
    job: &Job,
    seen: &Seen<'_>,
    driver_source: &dyn DriverSource,
    catalogue: &Catalogue,
) -> Result<(Prepared, Option<Error>)> {
    let survey = seen.survey;
    let (windows, hives) = prepare::windows_or_refuse(survey)?;
    let options = options(job, survey, windows);
    let preferences = preferences(job, survey);
    let (draft, basis) = prepare::draft(
        survey,
        seen.guest,
        driver_source,
        catalogue,
        (options, &preferences),
    )?;
    let review = signature::review(&basis.drivers, driver_source)
        .map_err(|e| Error::failed("checking the signatures of the drivers").because(e))?;
    let edited = EditedHives::of(actions::edits(&draft.actions), hives);
    let backups = (seen.saver).and_then(|saver| backed_up(seen, &draft, hives, saver));
    let needs = Needs::of(
        &draft.actions,
        hives,
        basis.windows.system_volume,
        seen.guest,
    );
    let (disks, target) = (seen.disks, seen.target);
    let in_folder = || match &needs {
        Ok(needs) => space::in_folder(job, needs, disks, target),
        Err(_) => Ok(()),
    };
    // Reads what the copy of a disk will contain.
    let (after, room) = side_by_side(
        || after(seen, hives, (&draft, &basis), &edited, driver_source),
        in_folder,
    );
    let after = after?;
    let Outside {
        limits,
        outlook,
        failed,
    } = outside(job, seen, (&draft, &basis), (needs, room))?;
    let foreseen = Foreseen {
        options,
        before: &survey.inspection,
        hives,
        volumes: seen.guest.volumes(),
        after,
        wanted: basis.wanted(),
        signatures: review,
        notes: notes(job, seen, &basis, driver_source)?,
        limits,
    };
    let plan = plan::plan(draft, foreseen, &job.guest.accept)
        .map_err(|e| Error::failed("planning").because(e))?;
    let prepared = Prepared {
        plan,
        basis,
        edited,
        backups,
        outlook,
    };
    Ok((prepared, failed))
}

/// Begins to back up what the draft edits: the disk has time while the plan is made. A draft whose guest lacks what
/// that takes is not carried out; if it is, the fix says why.
fn backed_up(seen: &Seen<'_>, draft: &Draft, hives: &Hives, saver: &Saver) -> Option<Backups> {
    let begun = apply::back_up(&draft.actions, seen.guest, hives.clone(), saver);
    begun
        .inspect_err(|e| tracing::debug!("no backup before the plan: {e}"))
        .ok()
}

fn options(job: &Job, survey: &Survey, windows: &WindowsFacts) -> plan::Options {
    plan::Options {
        bootstrap: prepare::bootstrap(job.guest.bootstrap, windows, &survey.inspection),
        repair_bcd: job.guest.repair_bcd,
        keep_tools: job.guest.keep_tools,
        storage: job.vm.machine.storage,
        require_signed: job.drivers.require_signed,
        force_dirty: job.source.access.inspect.force_dirty,
    }
}

/// The decisions about the first boot, with the MACs that the NICs of the new VM have.
fn preferences(job: &Job, survey: &Survey) -> Preferences {
    Preferences {
        macs: machine::macs(&survey.inspection.network.adapters, &job.vm.machine),
        ..job.guest.firstboot.clone()
    }
}

/// Notes for the user about the VM and the driver source.
fn notes(
    job: &Job,
    seen: &Seen<'_>,
    basis: &Basis,
    driver_source: &dyn DriverSource,
) -> Result<Vec<String>> {
    let mut notes = job.source.vm.notes.clone();
    notes.extend(driver_source::short_names_warning(driver_source));
    notes.extend(machine::disagreements(
        &seen.survey.inspection,
        &basis.windows,
        &job.source.vm,
        &job.vm.machine,
    ));
    notes.extend(later::warnings(job, &later::images(seen.disks)));
    Ok(notes)
}

/// Results of the checks outside the guest.
struct Outside {
    limits: Vec<Blocker>,
    outlook: Option<Outlook>,
    /// An error that cannot be shown as a blocker.
    failed: Option<Error>,
}

fn outside(
    job: &Job,
    seen: &Seen<'_>,
    (draft, basis): (&Draft, &Basis),
    (needs, room): (Result<Needs>, Result<()>),
) -> Result<Outside> {
    let mut limits = later::blockers(job, &later::images(seen.disks));
    let inspection = &seen.survey.inspection;
    let mut outlook = None;
    let documents =
        finish::render_domains(job, seen.target, (draft, basis), inspection, seen.disks)
            .map(|written| outlook = Some(written));
    let room = needs.and_then(|needs| {
        limits.extend(space::in_guest(&needs, seen.guest, seen.disks)?);
        room
    });
    let failed = shown([documents, other_disks(job, seen.disks), room], &mut limits);
    Ok(Outside {
        limits,
        outlook,
        failed,
    })
}

/// Adds the blockers of refusals to `limits`. Returns the first error that is none.
fn shown(
    results: impl IntoIterator<Item = Result<()>>,
    limits: &mut Vec<Blocker>,
) -> Option<Error> {
    let mut failed = None;
    for result in results {
        match result {
            Ok(()) => {}
            Err(error) if error.kind == ErrorKind::Refused => limits.extend(error.blockers),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    failed
}

/// Inspects and verifies the guest as the draft leaves it.
fn after(
    seen: &Seen<'_>,
    before: &Hives,
    (draft, basis): (&Draft, &Basis),
    edited: &EditedHives,
    driver_source: &dyn DriverSource,
) -> Result<Result<After, HiveError>> {
    let driver_source = basis.driver_source(driver_source);
    let volume = basis.windows.system_volume;
    std::thread::scope(|scope| {
        // Takes as long as all the other checks together.
        let walks = scope.spawn(|| {
            let _span = timeline::span("walk the hives as they are");
            verify::walk_all(before)
        });
        let _span = timeline::span("inspect the preview");
        let hives = PreviewHives {
            before,
            edited: &|hive| edited.bytes(hive)?.ok(),
        };
        let preview =
            match actions::preview(&draft.actions, hives, volume, seen.guest, &driver_source) {
                Ok(preview) => preview,
                Err(error) => return Ok(Err(error)),
            };
        let after = (seen.look)(&preview)?;
        let walks = joined(walks.join());
        let checks = verify::predict(&after, walks, &preview, &basis.wanted());
        Ok(Ok(After {
            inspection: after.inspection,
            checks,
        }))
    })
}

/// Opens and checks the disks without Windows exactly as the copy will.
fn other_disks(job: &Job, disks: &VmDisks) -> Result<()> {
    for disk in disks.iter().filter(|disk| !disks.is_system(disk.id)) {
        if job.copy.is_in_place() {
            in_place_format(&disk.image)?;
        }
        data_sector_size(&disk.image)?;
    }
    Ok(())
}

/// The first of the programs and libraries for the fix that this host lacks. `appliance`: the
/// engine writes through one.
fn missing(actions: &[Action], appliance: bool, has: &dyn Fn(&str) -> bool) -> Option<Error> {
    let edits_hives = actions::edits(actions).next().is_some();
    let writes_ntfs = !appliance && !actions.is_empty();
    let needed = [
        // They may be started late in the run, after most of the work.
        (qemu_img::TOOL, qemu_img::TOOL, true),
        (qsd::TOOL, qsd::TOOL, true),
        ("libhivex (edits hives)", host::LIBHIVEX, edits_hives),
        ("libntfs-3g (writes NTFS)", host::LIBNTFS, writes_ntfs),
    ];
    let (what, tool, _) = (needed.into_iter()).find(|(_, tool, needed)| *needed && !has(tool))?;
    Some(Error::missing_tool(format!("{what} is not installed")).hint(host::hint(tool)))
}

/// Whether this host has a program or library.
pub(super) fn is_there(name: &str) -> bool {
    match name {
        host::LIBHIVEX => registry::confined::is_available(),
        host::LIBNTFS => host::find_library(name).is_some(),
        program => tool::find(program).is_some(),
    }
}

#[cfg(test)]
#[path = "foresee_tests.rs"]
mod tests;
