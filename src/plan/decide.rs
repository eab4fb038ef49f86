//! The last step of planning: collects everything that prevents a conversion, applies `--accept`,
//! and decides whether the result starts.

use std::collections::BTreeSet;

use crate::actions::{self, Action};
use crate::check::Check;
use crate::drivers::signature::Review;
use crate::error::Blocker;
use crate::guest::{FsKind, Volume, VolumeId};
use crate::ids::{self, Accepted};
use crate::inspect::{Hives, Inspection, Severity};
use crate::registry::{HiveError, HiveView};
use crate::types::DiskBus;

use super::model::{Draft, Plan};
use super::{Options, Remaining, Result, remaining};

/// The result of a draft, and other facts about guest and host.
pub struct Foreseen<'a> {
    pub options: Options,
    /// The guest before the fix.
    pub before: &'a Inspection,
    pub hives: &'a Hives,
    pub volumes: &'a [Volume],
    /// The guest after the actions. An error is a hive that cannot be read from end to end.
    pub after: Result<After, HiveError>,
    /// The controllers from which the result must boot.
    pub wanted: Vec<DiskBus>,
    pub signatures: Review,
    /// Warnings about the VM and the driver source.
    pub notes: Vec<String>,
    /// Blockers from the other disks, the host and the documents of the VM.
    pub limits: Vec<Blocker>,
}

/// A guest after the fix.
pub struct After {
    pub inspection: Inspection,
    pub checks: Vec<Check>,
}

/// Completes a draft. Blockers are in the order in which a user should resolve them: the guest, the
/// options, the host.
pub fn plan(draft: Draft, seen: Foreseen<'_>, accepted: &Accepted) -> Result<Plan> {
    let mut plan = Plan {
        actions: draft.actions,
        skipped: draft.skipped,
        drivers: draft.drivers,
        blockers: draft.blockers,
        accepted: Vec::new(),
        warnings: draft.warnings,
        checks: Vec::new(),
        ready: false,
        linux: None,
    };
    plan.blockers
        .extend(without_driver(&seen.wanted, seen.options.storage));
    sign(&mut plan, &seen.signatures, seen.options.require_signed);
    plan.warnings.extend(seen.notes);
    let left = check_result(&mut plan, seen.before, seen.after, |after| {
        remaining(after, &seen.wanted, production(seen.options.storage))
    });
    let unsafe_volumes = unsafe_volumes(&plan.actions, &seen.options, seen.before, seen.volumes);
    plan.blockers.extend(unsafe_volumes);
    let large = too_large_values(&plan.actions, seen.hives)?;
    plan.blockers.extend(large);
    plan.blockers.extend(seen.limits);
    accept(accepted, seen.before, &mut plan, &left);
    Ok(plan)
}

/// Adds the problems of the guest after the actions. Returns those of its boot path.
fn check_result(
    plan: &mut Plan,
    before: &Inspection,
    after: Result<After, HiveError>,
    remaining: impl FnOnce(&Inspection) -> Vec<Remaining>,
) -> Vec<Remaining> {
    let left = match after {
        Ok(after) => {
            plan.checks = after.checks;
            repaired(plan, before, &after.inspection);
            remaining(&after.inspection)
        }
        Err(error) => {
            plan.blockers.push(Blocker::new(
                "hive-damaged",
                format!("a registry hive cannot be read from end to end: {error}"),
                "start the guest once on its old hypervisor and shut it down cleanly",
            ));
            Vec::new()
        }
    };
    for one in &left {
        if !plan.blockers.contains(&one.blocker) {
            plan.blockers.push(one.blocker.clone());
        }
    }
    let unexplained = unexplained(plan, &left);
    plan.blockers.extend(unexplained);
    left
}

fn production(storage: DiskBus) -> DiskBus {
    match storage {
        DiskBus::VirtioScsi => DiskBus::VirtioScsi,
        _ => DiskBus::VirtioBlk,
    }
}

/// The blocker for a production bus without a driver for this Windows.
fn without_driver(wanted: &[DiskBus], storage: DiskBus) -> Option<Blocker> {
    if storage == DiskBus::Sata {
        return Some(Blocker::new(
            "storage-sata",
            "--storage sata is for Linux guests without VirtIO drivers; Windows gets its drivers here",
            "leave --storage out; the first boot is on SATA anyway",
        ));
    }
    let bus = production(storage);
    (!wanted.contains(&bus)).then(|| {
        Blocker::new(
            "storage-driver",
            format!("there is no {} driver for this Windows", bus.name()),
            "leave --storage out, or name the other one",
        )
    })
}

fn sign(plan: &mut Plan, review: &Review, required: bool) {
    match required {
        true => plan.blockers.extend(review.blockers()),
        false => plan.warnings.extend(review.warnings()),
    }
    for driver in &mut plan.drivers {
        driver.signer = review.signers.get(&driver.driver).cloned();
    }
}

/// Removes blockers that the plan repairs, and adds those that it causes.
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

/// Removes accepted blockers. A blocker is accepted by its own code, or by that of a check that
/// fails because of it.
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
        plan.blockers.is_empty() && plan.accepted.is_empty() && !plan.checks.iter().any(is_fault);
    plan.warnings.extend(unused(accepted, inspection, plan));
}

fn is_fault(check: &Check) -> bool {
    !check.ok && check.severity == Severity::Blocker
}

/// Warnings for `--accept` codes that match nothing.
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

/// Blockers for volumes besides that of Windows that the plan writes to and the writer would
/// refuse.
pub(super) fn unsafe_volumes(
    actions: &[Action],
    options: &Options,
    before: &Inspection,
    volumes: &[Volume],
) -> Vec<Blocker> {
    let system = before.windows.as_ref().map(|w| w.system_volume);
    let written: BTreeSet<VolumeId> = (actions.iter())
        .filter_map(|action| action.volume())
        .filter(|volume| Some(*volume) != system)
        .collect();
    volumes
        .iter()
        .filter(|volume| volume.kind == FsKind::Ntfs && written.contains(&volume.id))
        .filter_map(|volume| {
            let why = match &volume.state {
                s if s.hibernated => "holds a hibernated session of Windows",
                s if s.cached => "is partly in the memory of Fast Startup",
                s if s.dirty && !options.force_dirty => "was not unmounted cleanly",
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

/// Blockers for values that the registry writer cannot rewrite beside an edit.
fn too_large_values(actions: &[Action], hives: &Hives) -> Result<Vec<Blocker>> {
    let mut blockers = Vec::new();
    for (hive, edits) in actions::edits(actions) {
        let Some(loaded) = hives.get(hive) else {
            continue;
        };
        let view = HiveView::new(&loaded.bytes)?;
        let Some((key, name, size)) = edits.too_large(&view)? else {
            continue;
        };
        blockers.push(Blocker::new(
            "hive-value-large",
            format!(
                "{key} has to be edited, and its value {name:?} of {size} bytes cannot be rewritten beside that (libhivex writes 16344 at most)"
            ),
            "start the guest once on its old hypervisor, so that Windows works off what is pending, and shut it down",
        ));
    }
    Ok(blockers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::CheckState;

    /// A plan before the last step, with these blockers and checks.
    fn undecided(blockers: Vec<Blocker>, checks: Vec<Check>) -> Plan {
        Plan {
            actions: Vec::new(),
            skipped: Vec::new(),
            drivers: Vec::new(),
            blockers,
            accepted: Vec::new(),
            warnings: Vec::new(),
            checks,
            ready: false,
            linux: None,
        }
    }

    /// Otherwise, anything else found by the check would be silently overwritten.
    #[test]
    fn a_check_is_explained_when_a_blocker_names_each_of_its_findings() {
        let plan = |codes: &[&str]| {
            undecided(
                codes.iter().map(|c| Blocker::new(*c, "", "")).collect(),
                Vec::new(),
            )
        };
        let check = |findings: &[&'static str]| Check {
            findings: findings.to_vec(),
            ..Check::new("bcd", Severity::Blocker, CheckState::Fault, "m")
        };
        let boot_path = Remaining {
            blocker: Blocker::new("x", "", ""),
            checks: vec!["bcd"],
        };
        for (findings, blockers, explained) in [
            (&[][..], &[][..], false),
            (&["no-bcd"], &[], false),
            (&["no-bcd"], &["no-bcd"], true),
            (&["no-bcd", "bcd-device"], &["no-bcd"], false),
            (&["no-bcd", "bcd-device"], &["bcd-device", "no-bcd"], true),
            (&[], &["bcd"], true),
        ] {
            let mut plan = plan(blockers);
            let check = check(findings);
            let found = is_explained(&check, &plan, &[]);
            assert_eq!(found, explained, "{findings:?} {blockers:?}");
            assert!(is_explained(
                &check,
                &plan,
                std::slice::from_ref(&boot_path)
            ));
            plan.checks = vec![check];
            let named = unexplained(&plan, &[]);
            assert_eq!(named.len(), usize::from(!explained), "{named:?}");
        }
    }

    /// A blocker is accepted by the code of a check that fails because of it, and only of such a one.
    #[test]
    fn a_check_stands_for_the_findings_that_make_it_fail() {
        let guest = crate::testing::MemoryGuest::new(crate::demo::WinVersion::Win10);
        let inspection = guest.look(&[], |_, survey| survey.inspection.clone());
        for (state, findings, code, taken) in [
            (CheckState::Fault, &["no-bcd"][..], "bcd", true),
            (CheckState::Fault, &["no-bcd"], "firmware", false),
            (CheckState::Fault, &["bcd-device"], "bcd", false),
            (CheckState::Ok, &["no-bcd"], "bcd", false),
            (CheckState::Ok, &[], "no-bcd", true),
        ] {
            let mut plan = undecided(
                vec![Blocker::new("no-bcd", "why", "what helps")],
                vec![Check {
                    findings: findings.to_vec(),
                    ..Check::new("bcd", Severity::Blocker, state, "m")
                }],
            );
            let accepted = Accepted::parse(&[code]).unwrap();
            accept(&accepted, &inspection, &mut plan, &[]);
            let expected = if taken { 0 } else { 1 };
            assert_eq!(plan.blockers.len(), expected, "{findings:?} {code}");
            assert_eq!(plan.accepted.len(), 1 - expected, "{findings:?} {code}");
            assert!(!plan.ready);
        }
    }

    #[test]
    fn a_check_of_the_boot_path_stands_for_its_own_faults_only() {
        let guest = crate::testing::MemoryGuest::new(crate::demo::WinVersion::Win10);
        let inspection = guest.look(&[], |_, survey| survey.inspection.clone());
        let remaining = [
            ("boot-driver-start", "controller-service"),
            ("boot-driver-file", "controller-image"),
        ]
        .map(|(code, check)| Remaining {
            blocker: Blocker::new(code, "why", "what helps"),
            checks: vec![check],
        });
        let mut blockers: Vec<_> = remaining.iter().map(|one| one.blocker.clone()).collect();
        blockers.push(Blocker::new("no-bcd", "why", "what helps"));
        for (code, taken) in [
            ("controller-service", "boot-driver-start"),
            ("controller-image", "boot-driver-file"),
            ("boot-driver-file", "boot-driver-file"),
        ] {
            let mut plan = undecided(blockers.clone(), Vec::new());
            let accepted = Accepted::parse(&[code]).unwrap();
            accept(&accepted, &inspection, &mut plan, &remaining);
            assert_eq!(plan.accepted, [taken], "{code}");
            assert_eq!(plan.blockers.len(), 2, "{code}");
            assert!(plan.blockers.iter().all(|b| b.code != taken), "{code}");
        }
    }

    /// Inspection and the boot path may meet the same fault of the guest.
    #[test]
    fn a_blocker_that_inspection_and_boot_path_give_is_told_once() {
        let guest = crate::testing::MemoryGuest::new(crate::demo::WinVersion::Win10);
        let before = guest.look(&[], |_, survey| survey.inspection.clone());
        let mut after = before.clone();
        after.findings.push(crate::inspect::Finding {
            id: "hive-damaged",
            severity: Severity::Blocker,
            message: "why".into(),
            remedy: "what helps".into(),
            evidence: String::new(),
        });
        let shared = after.blockers().remove(0);
        let other = Blocker::new("hive-damaged", "another reason", "what helps");
        for known in [&[][..], std::slice::from_ref(&shared)] {
            let mut plan = undecided(known.to_vec(), Vec::new());
            let after = Ok(After {
                inspection: after.clone(),
                checks: Vec::new(),
            });
            let left = check_result(&mut plan, &before, after, |_| {
                let blockers = [shared.clone(), other.clone()].into_iter();
                let left = blockers.map(|blocker| Remaining {
                    blocker,
                    checks: vec!["boot-path"],
                });
                left.collect()
            });
            assert_eq!(left.len(), 2);
            assert_eq!(plan.blockers, [shared.clone(), other.clone()]);
        }
    }

    /// The user sees of every driver who signed it, however it comes into the guest.
    #[test]
    fn signers_are_told_of_drivers_at_boot_of_installed_and_of_staged_ones() {
        let placements = ["boot", "installed", "staged"];
        let mut plan = undecided(Vec::new(), Vec::new());
        plan.drivers = Vec::from_iter(placements.iter().chain(&["staged"]).enumerate().map(
            |(i, placement)| super::super::PlannedDriver {
                driver: format!("{i}"),
                role: crate::drivers::catalogue::Role::Storage,
                folder: String::new(),
                version: String::new(),
                placement,
                signer: Some("another".into()),
            },
        ));
        let mut review = Review::default();
        for i in 0..placements.len() {
            review.signers.insert(format!("{i}"), format!("of {i}"));
        }
        sign(&mut plan, &review, false);
        let told: Vec<_> = plan.drivers.iter().map(|d| d.signer.as_deref()).collect();
        assert_eq!(told, [Some("of 0"), Some("of 1"), Some("of 2"), None]);
    }
}
