//! Verifies whether a disk would boot, from a fresh reading of it, never from what a fix assumes.
//!
//! One table of checks. Each check passes, reports a fault, or reports that it could not run, which
//! does not count as passed. The checks follow the chain of `docs/boot-path.md`: [`disk`] has
//! everything before Windows, [`hives`] the hives themselves, [`drivers`] their contents. If the
//! caller has the plan, its promises are checked too ([`planned`]).

mod disk;
mod drivers;
mod hives;
mod planned;
#[cfg(test)]
mod tests;

pub use hives::walk_all;
pub use planned::planned;

use crate::actions::Walked;
use crate::boot_path::BootFault;
use crate::check::{Check, CheckState};
use crate::guest::GuestRead;
use crate::inspect::{HiveName, Hives, Inspection, Severity, Survey, WindowsFacts};
use crate::registry::{HiveError, HiveView};
use crate::types::DiskBus;

/// The result of a check: message, then evidence.
enum Outcome {
    Ok(String),
    Fault(String, String),
    /// A fault that the inspection has already found.
    Found {
        message: String,
        evidence: String,
        findings: Vec<(&'static str, Severity)>,
    },
    CouldNotRun(String),
}

struct CheckDef {
    id: &'static str,
    /// The severity of a fault; a blocker makes the disk not ready.
    severity: Severity,
    run: fn(&Context<'_>) -> Outcome,
}

struct Context<'a> {
    inspection: &'a Inspection,
    hives: Option<&'a Hives>,
    /// The results of walking every hive from end to end.
    walks: hives::Walks,
    guest: &'a dyn GuestRead,
    wanted: &'a [DiskBus],
}

const BLOCKER: Severity = Severity::Blocker;
const WARNING: Severity = Severity::Warning;
const INFO: Severity = Severity::Info;

const fn check(id: &'static str, severity: Severity, run: fn(&Context<'_>) -> Outcome) -> CheckDef {
    CheckDef { id, severity, run }
}

const CHECKS: [CheckDef; 31] = [
    // Before Windows.
    check("firmware", BLOCKER, disk::firmware),
    check("boot-manager", BLOCKER, disk::boot_manager),
    check("uefi-fallback", BLOCKER, disk::uefi_fallback),
    check("partition-table", WARNING, disk::partition_table),
    check("boot-sector", WARNING, disk::boot_sector),
    check("bcd", WARNING, disk::bcd),
    check("windows-found", BLOCKER, disk::windows_found),
    check("volume-clean", WARNING, disk::volume_clean),
    check("no-blockers", BLOCKER, disk::no_blockers),
    // The hives.
    check("system-hive-sound", BLOCKER, |c| {
        hives::sound(c, HiveName::System)
    }),
    check("software-hive-sound", BLOCKER, |c| {
        hives::sound(c, HiveName::Software)
    }),
    check("drivers-hive-sound", WARNING, |c| {
        hives::sound(c, HiveName::Drivers)
    }),
    check("bcd-hive-sound", WARNING, |c| {
        hives::sound(c, HiveName::Bcd)
    }),
    check("hives-clean", WARNING, hives::clean),
    check("logs-harmless", WARNING, hives::logs_harmless),
    check("control-sets", BLOCKER, hives::control_sets),
    // The contents of the hives.
    check("boot-path", BLOCKER, drivers::boot_path),
    check("controller-bound", BLOCKER, drivers::bound),
    check("controller-service", BLOCKER, drivers::service),
    check("controller-image", BLOCKER, drivers::image),
    check("transitional-ids", INFO, drivers::transitional),
    check("bus-drivers", BLOCKER, drivers::bus),
    check("volume-drivers", BLOCKER, drivers::volume),
    check("kernel-files", BLOCKER, drivers::core),
    check("class-filters", BLOCKER, drivers::class_filters),
    check("idle-settings", WARNING, drivers::idle),
    check("device-instances", WARNING, drivers::instances),
    check("device-filters", WARNING, drivers::device_filters),
    check(
        "critical-boot-services",
        WARNING,
        drivers::critical_services,
    ),
    check("boot-services", WARNING, drivers::other_services),
    check("storage-rivals", WARNING, drivers::rivals),
];

/// Runs every check. `wanted` are the controllers from which the disk must boot.
pub fn verify(survey: &Survey, guest: &dyn GuestRead, wanted: &[DiskBus]) -> Vec<Check> {
    verify_written(survey, &[], guest, wanted)
}

/// Runs every check after a fix, which has walked the hives it wrote. The hives read back are
/// compared with those.
pub fn verify_written(
    survey: &Survey,
    written: &[Walked],
    guest: &dyn GuestRead,
    wanted: &[DiskBus],
) -> Vec<Check> {
    let walks = survey.hives.as_ref();
    let walks = walks.map(|hives| hives::walk_read_back(hives, written));
    run(survey, walks.unwrap_or_default(), guest, wanted)
}

/// Runs every check on the guest after a plan. `before` are walks of the present hives: an edit
/// repairs nothing in them.
pub fn predict(
    after: &Survey,
    before: hives::Walks,
    preview: &dyn GuestRead,
    wanted: &[DiskBus],
) -> Vec<Check> {
    run(after, before, preview, wanted)
}

fn run(
    survey: &Survey,
    walks: hives::Walks,
    guest: &dyn GuestRead,
    wanted: &[DiskBus],
) -> Vec<Check> {
    let context = Context {
        inspection: &survey.inspection,
        hives: survey.hives.as_ref(),
        walks,
        guest,
        wanted,
    };
    CHECKS
        .iter()
        .map(|def| result(def, (def.run)(&context)))
        .collect()
}

fn result(def: &CheckDef, outcome: Outcome) -> Check {
    let mut severity = def.severity;
    let mut causes = Vec::new();
    let (state, message, evidence) = match outcome {
        Outcome::Ok(message) => (CheckState::Ok, message, String::new()),
        Outcome::Fault(message, evidence) => (CheckState::Fault, message, evidence),
        Outcome::Found {
            message,
            evidence,
            findings,
        } => {
            for (id, found) in findings {
                // A finding that stops a conversion makes a disk not ready too, except for
                // `volume-clean`.
                if def.severity == WARNING && def.id != "volume-clean" {
                    severity = severity.max(found);
                }
                causes.push(id);
            }
            (CheckState::Fault, message, evidence)
        }
        Outcome::CouldNotRun(why) => (
            CheckState::CouldNotRun,
            format!("could not be checked: {why}"),
            String::new(),
        ),
    };
    let message = crate::text::guest_text(&message).unwrap_or_default();
    Check {
        evidence: crate::text::guest_text(&evidence).unwrap_or_default(),
        findings: causes,
        ..Check::new(def.id, severity, state, message)
    }
}

impl<'a> Context<'a> {
    /// Reports any of these findings of the inspection as a fault.
    fn findings(&self, ids: &[&str], fine: &str) -> Outcome {
        let list = &self.inspection.findings;
        let found: Vec<_> = list.iter().filter(|f| ids.contains(&f.id)).collect();
        if found.is_empty() {
            return Outcome::Ok(fine.to_string());
        }
        let join = |part: fn(&crate::inspect::Finding) -> &str| {
            let parts: Vec<_> = found.iter().map(|f| part(f)).collect();
            parts.join("; ")
        };
        Outcome::Found {
            message: join(|f| &f.message),
            evidence: join(|f| &f.evidence),
            findings: found.iter().map(|f| (f.id, f.severity)).collect(),
        }
    }

    /// Runs `look` on the SYSTEM hive; an unreadable hive is no finding.
    fn system(
        &self,
        look: impl FnOnce(&HiveView<'a>, &'a WindowsFacts) -> Result<Outcome, HiveError>,
    ) -> Outcome {
        let (Some(hives), Some(windows)) = (self.hives, &self.inspection.windows) else {
            return Outcome::CouldNotRun("the SYSTEM hive was not read".into());
        };
        HiveView::new(&hives.system.bytes)
            .and_then(|view| look(&view, windows))
            .unwrap_or_else(|e| Outcome::CouldNotRun(format!("the SYSTEM hive: {e}")))
    }

    /// The faults of the wanted controllers that `pick` selects, each once.
    fn faults(&self, pick: impl Fn(DiskBus, &BootFault) -> Option<String>, fine: &str) -> Outcome {
        if self.inspection.controllers.is_empty() {
            return Outcome::CouldNotRun("no boot path was evaluated".into());
        }
        let mut texts: Vec<String> = Vec::new();
        let mut names: Vec<&str> = Vec::new();
        for controller in self.wanted {
            let Some(path) = self.inspection.controllers.get(controller) else {
                return Outcome::CouldNotRun(format!("{} was not evaluated", controller.name()));
            };
            for fault in &path.faults {
                if let Some(text) = pick(*controller, fault) {
                    if !texts.contains(&text) {
                        texts.push(text);
                    }
                    if !names.contains(&controller.name()) {
                        names.push(controller.name());
                    }
                }
            }
        }
        if texts.is_empty() {
            return Outcome::Ok(fine.to_string());
        }
        let set = self.inspection.os.control_set.as_deref();
        let evidence = format!("SYSTEM\\{}, {}", set.unwrap_or_default(), names.join(", "));
        Outcome::Fault(texts.join("; "), evidence)
    }
}
