//! What can be known before the first write: the one place where `plan` and `convert` decide whether a
//! conversion goes on.
//!
//! The guest is inspected and verified as the plan will leave it ([`Preview`]), every disk is opened, every
//! document of the VM is written to nowhere, and the host is asked for the programs the fix runs. What
//! speaks against the conversion becomes a blocker; `--accept` takes those that only keep Windows from
//! starting.

use std::collections::BTreeSet;
use std::path::Path;

use crate::boot_path::Controller;
use crate::check::Check;
use crate::domain::StorageBus;
use crate::drivers::media::Media;
use crate::error::{Blocker, Error, ErrorKind, Result};
use crate::fix::edited::EditedHives;
use crate::guest::{FsKind, GuestRead, VolumeId};
use crate::ids::{self, Accepted};
use crate::inspect::{Inspection, Severity, Survey};
use crate::plan::{self, Action, Plan, Preview, PreviewHives, Remaining};
use crate::registry::{self, HiveView};
use crate::tool::{self, host, qemu_img, qsd};
use crate::verify;

use super::finish;
use super::in_place::{data_sector_size, in_place_format};
use super::later;
use super::prepare::{self, Prepared};
use super::run::Job;
use super::space::{self, Needs};
use crate::session::Source;
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
    /// The output folder.
    pub(super) target: &'a Path,
}

/// Completes the plan with everything that speaks against it. An error is what no plan can show.
pub(super) fn complete(
    job: &Job,
    seen: &Seen<'_>,
    prepared: &mut Prepared,
    media: &dyn Media,
) -> Result<()> {
    let remaining = predict(job, seen, prepared, media)?;
    let listed = |plan: &Plan, one: &Remaining| plan.blockers.contains(&one.blocker);
    for one in &remaining {
        if !listed(&prepared.plan, one) {
            prepared.plan.blockers.push(one.blocker.clone());
        }
    }
    let unexplained = unexplained(&prepared.plan, &remaining);
    prepared.plan.blockers.extend(unexplained);
    let not_clean = unsafe_volumes(job, seen, prepared);
    prepared.plan.blockers.extend(not_clean);
    let large = too_large_values(seen, &prepared.plan)?;
    prepared.plan.blockers.extend(large);
    let images = later::images(seen.disks)?;
    prepared.plan.blockers.extend(later::blockers(job, &images));
    prepared.plan.warnings.extend(later::warnings(job, &images));
    let documents = finish::rehearse(
        job,
        seen.target,
        prepared,
        &seen.survey.inspection,
        seen.disks,
    );
    let documents = documents.map(|outlook| prepared.outlook = Some(outlook));
    let mut failed = None;
    for result in [
        documents,
        other_disks(job, seen.disks),
        room(job, seen, prepared),
    ] {
        match result {
            Ok(()) => {}
            Err(error) if error.kind == ErrorKind::Refused => {
                prepared.plan.blockers.extend(error.blockers);
            }
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    accept(
        &job.accept,
        &seen.survey.inspection,
        &mut prepared.plan,
        &remaining,
    );
    // The blockers say what to do first.
    if prepared.plan.blockers.is_empty() {
        if let Some(error) = failed {
            return Err(error);
        }
        programs(&prepared.plan, seen.engine)?;
    }
    Ok(())
}

/// Values that the registry writer cannot write anew beside an edit.
fn too_large_values(seen: &Seen<'_>, plan: &Plan) -> Result<Vec<Blocker>> {
    let Some(hives) = &seen.survey.hives else {
        return Ok(Vec::new());
    };
    let reading = |e| Error::failed("reading the registry").because(e);
    let mut blockers = Vec::new();
    for action in &plan.actions {
        let Action::EditHive { hive, edits, .. } = action else {
            continue;
        };
        let Some(loaded) = plan::hive_bytes(hives, *hive) else {
            continue;
        };
        let view = HiveView::new(&loaded.bytes).map_err(reading)?;
        let Some((key, name, size)) = edits.too_large(&view).map_err(reading)? else {
            continue;
        };
        blockers.push(Blocker::new(
            "hive-value-large",
            format!(
                "{key} has to be edited, and its value {name:?} of {size} bytes cannot be written anew beside that (libhivex writes 16344 at most)"
            ),
            "start the guest once on its old hypervisor, so that Windows works off what is pending, and shut it down",
        ));
    }
    Ok(blockers)
}

/// Volumes other than that of Windows which the plan writes to and the writer would refuse.
fn unsafe_volumes(job: &Job, seen: &Seen<'_>, prepared: &Prepared) -> Vec<Blocker> {
    let system = prepared.windows.system_volume;
    let written: BTreeSet<VolumeId> = (prepared.plan.actions.iter())
        .filter_map(Action::volume)
        .filter(|volume| *volume != system)
        .collect();
    let volumes = seen.guest.volumes().iter();
    volumes
        .filter(|volume| volume.kind == FsKind::Ntfs && written.contains(&volume.id))
        .filter_map(|volume| {
            let why = match &volume.state {
                s if s.hibernated => "holds a hibernated session of Windows",
                s if s.cached => "is partly in the memory of Fast Startup",
                s if s.dirty && !job.source.force_dirty => "was not unmounted cleanly",
                _ => return None,
            };
            let id = volume.id;
            Some(Blocker::new(
                "volume-unsafe",
                format!("the boot files on {id} have to be changed, and that volume {why}"),
                "start the guest on its old hypervisor and shut it down completely (shutdown /s /t 0)",
            ))
        })
        .collect()
}

/// Room for what the fix writes, in the guest and in the output folder.
fn room(job: &Job, seen: &Seen<'_>, prepared: &mut Prepared) -> Result<()> {
    let Some(hives) = &seen.survey.hives else {
        return Ok(());
    };
    let system = prepared.windows.system_volume;
    let needs = Needs::of(&prepared.plan, hives, system, seen.guest)?;
    let blockers = space::in_guest(&needs, seen.guest, seen.disks)?;
    prepared.plan.blockers.extend(blockers);
    space::in_folder(job, &needs, seen.disks, seen.target)
}

/// The checks of `verify` on the guest as the plan will leave it, and what is still wrong with its boot
/// path.
fn predict(
    job: &Job,
    seen: &Seen<'_>,
    prepared: &mut Prepared,
    media: &dyn Media,
) -> Result<Vec<Remaining>> {
    let Some(before) = &seen.survey.hives else {
        return Ok(Vec::new());
    };
    let wanted = prepare::wanted(prepared);
    let volume: VolumeId = prepared.windows.system_volume;
    let media = prepared.media(media);
    let edited = EditedHives::of(&prepared.plan, before);
    let seen_after = std::thread::scope(|scope| {
        // Takes as long as all the rest.
        let walks = scope.spawn(|| verify::walk_all(before));
        let hives = PreviewHives {
            before,
            edited: &|hive| edited.bytes(hive)?.ok(),
        };
        let preview = Preview::new(&prepared.plan, &hives, volume, seen.guest, &media);
        let preview = match preview {
            Ok(preview) => preview,
            Err(error) => return Ok(Err(error)),
        };
        let after = (seen.look)(&preview)?;
        let walks = walks
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let checks = verify::predict(&after, walks, &preview, &wanted);
        Ok::<_, Error>(Ok((after, checks)))
    })?;
    let (after, checks) = match seen_after {
        Ok(seen) => seen,
        Err(error) => {
            prepared.plan.blockers.push(Blocker::new(
                "hive-damaged",
                format!("a registry hive cannot be read from end to end: {error}"),
                "start the guest once on its old hypervisor and shut it down cleanly",
            ));
            return Ok(Vec::new());
        }
    };
    let production = match job.machine.storage {
        StorageBus::VirtioScsi => Controller::VirtioScsi,
        StorageBus::VirtioBlk | StorageBus::Sata => Controller::VirtioBlk,
    };
    prepared.edited = edited;
    prepared.plan.checks = checks;
    repaired(
        &mut prepared.plan,
        &seen.survey.inspection,
        &after.inspection,
    );
    Ok(plan::remaining(&after.inspection, &wanted, production))
}

/// What the plan repairs blocks nothing; what it brings to light does.
fn repaired(plan: &mut Plan, before: &Inspection, after: &Inspection) {
    let (before, after) = (before.blockers(), after.blockers());
    plan.blockers
        .retain(|b| !before.contains(b) || after.contains(b));
    for blocker in after {
        if !plan.blockers.contains(&blocker) {
            plan.blockers.push(blocker);
        }
    }
}

/// The checks that would fail for a reason that no blocker names yet.
fn unexplained(plan: &Plan, remaining: &[Remaining]) -> Vec<Blocker> {
    let failed = plan
        .checks
        .iter()
        .filter(|c| !c.ok && c.severity == Severity::Blocker);
    failed
        .filter(|check| !is_explained(check, plan, remaining))
        .map(|check| Blocker::new(check.id, reason(check), ids::remedy(check.id)))
        .collect()
}

fn reason(check: &Check) -> String {
    match check.evidence.is_empty() {
        true => check.message.clone(),
        false => format!("{} ({})", check.message, check.evidence),
    }
}

fn is_explained(check: &Check, plan: &Plan, remaining: &[Remaining]) -> bool {
    let named = |id: &str| plan.blockers.iter().any(|b| b.code == id);
    remaining.iter().any(|one| one.checks.contains(&check.id))
        || named(check.id)
        || (!check.findings.is_empty() && check.findings.iter().all(|id| named(id)))
}

/// Takes what was accepted out of the blockers. A blocker is accepted by its own code, or by that of a
/// check that fails because of it.
fn accept(accepted: &Accepted, inspection: &Inspection, plan: &mut Plan, remaining: &[Remaining]) {
    let by_check = |blocker: &Blocker| -> bool {
        let stake = ids::find(&blocker.code).map(|entry| entry.stake);
        if stake != Some(ids::Stake::Start) {
            return false;
        }
        let of_boot_path = remaining
            .iter()
            .filter(|one| one.blocker == *blocker)
            .flat_map(|one| &one.checks)
            .any(|check| accepted.has(check));
        let of_findings = plan
            .checks
            .iter()
            .filter(|c| !c.ok && c.findings.contains(&blocker.code.as_str()))
            .any(|c| accepted.has(c.id));
        of_boot_path || of_findings
    };
    let (taken, left): (Vec<Blocker>, Vec<Blocker>) = plan
        .blockers
        .iter()
        .cloned()
        .partition(|b| accepted.has(&b.code) || by_check(b));
    for blocker in &taken {
        if !plan.accepted.contains(&blocker.code) {
            plan.accepted.push(blocker.code.clone());
        }
        plan.warnings.push(format!(
            "accepted [{}]: {}; Windows may not start",
            blocker.code, blocker.reason
        ));
    }
    plan.blockers = left;
    if plan.blockers.is_empty() {
        for check in plan.checks.iter_mut().filter(|c| is_fault(c)) {
            check.accepted = true;
        }
    }
    plan.ready =
        plan.blockers.is_empty() && plan.accepted.is_empty() && verify::is_ready(&plan.checks);
    plan.warnings.extend(unused(accepted, inspection, plan));
}

fn is_fault(check: &Check) -> bool {
    !check.ok && check.severity == Severity::Blocker
}

/// What was accepted and is not so.
fn unused(accepted: &Accepted, inspection: &Inspection, plan: &Plan) -> Vec<String> {
    let stops = |id: &&str| {
        let failed = plan.checks.iter().any(|c| c.id == *id && is_fault(c));
        failed || plan.accepted.iter().any(|code| code == id)
    };
    accepted
        .iter()
        .filter(|id| !stops(id))
        .map(|id| match inspection.findings.iter().any(|f| f.id == id) {
            true => format!("--accept {id}: this does not stop a conversion"),
            false => format!("--accept {id}: this guest has no such fault"),
        })
        .collect()
}

/// The disks besides the one with Windows are opened and checked as the copy will.
fn other_disks(job: &Job, disks: &[Source]) -> Result<()> {
    for disk in disks.iter().skip(1) {
        let image = disk.image()?;
        if job.in_place {
            in_place_format(&image)?;
        }
        data_sector_size(&image)?;
    }
    Ok(())
}

/// The programs and libraries the fix uses.
fn programs(plan: &Plan, engine: Engine) -> Result<()> {
    let missing = |what: &str, tool: &str| {
        Error::missing_tool(format!("{what} is not installed")).hint(host::hint(tool))
    };
    // They may be started late: by then much was done.
    for tool in [qemu_img::TOOL, qsd::TOOL] {
        if tool::find(tool).is_none() {
            return Err(missing(tool, tool));
        }
    }
    let edits = |action: &Action| matches!(action, Action::EditHive { .. });
    if plan.actions.iter().any(edits) && !registry::confined::is_available() {
        return Err(missing("libhivex (edits hives)", host::LIBHIVEX));
    }
    let embedded = !engine.writes_past_us();
    if embedded && !plan.actions.is_empty() && host::find_library(host::LIBNTFS).is_none() {
        return Err(missing("libntfs-3g (writes NTFS)", host::LIBNTFS));
    }
    Ok(())
}
