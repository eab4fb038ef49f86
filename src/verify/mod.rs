//! Would this disk boot? Judged from a fresh reading of it, never from what a fix believes it did.
//!
//! One table of checks, each of which says ok, names a fault, or says that it could not run - which is
//! neither. What the fix planned is compared too when the caller has the plan ([`planned`]).

use crate::boot_path::Controller;
use crate::drivers::media::Media;
use crate::guest::{GuestRead, VolumeId};
use crate::inspect::{Hives, Inspection, LoadedBytes, Severity, Survey};
use crate::plan::model::{Action, HiveName, Plan};
use crate::registry::HiveView;
use crate::registry::base::BaseBlock;
use crate::registry::walk;
use crate::report::Check;

/// What a check found.
enum Outcome {
    Ok(String),
    Fault(String),
    CouldNotRun(String),
}

struct CheckDef {
    id: &'static str,
    /// How bad a fault is; a blocker makes the disk not ready.
    severity: Severity,
    run: fn(&Context<'_>) -> Outcome,
}

struct Context<'a> {
    inspection: &'a Inspection,
    hives: Option<&'a Hives>,
    wanted: &'a [Controller],
}

const CHECKS: [CheckDef; 7] = [
    CheckDef {
        id: "windows-found",
        severity: Severity::Blocker,
        run: windows_found,
    },
    CheckDef {
        id: "system-hive-sound",
        severity: Severity::Blocker,
        run: |c| hive_sound(c, HiveName::System),
    },
    CheckDef {
        id: "software-hive-sound",
        severity: Severity::Blocker,
        run: |c| hive_sound(c, HiveName::Software),
    },
    CheckDef {
        id: "hives-clean",
        severity: Severity::Warning,
        run: hives_clean,
    },
    CheckDef {
        id: "boot-path",
        severity: Severity::Blocker,
        run: boot_path,
    },
    CheckDef {
        id: "firmware",
        severity: Severity::Blocker,
        run: firmware,
    },
    CheckDef {
        id: "no-blockers",
        severity: Severity::Blocker,
        run: no_blockers,
    },
];

/// Runs every check. `wanted` are the controllers the disk must boot from.
pub fn verify(survey: &Survey, wanted: &[Controller]) -> Vec<Check> {
    let context = Context {
        inspection: &survey.inspection,
        hives: survey.hives.as_ref(),
        wanted,
    };
    // Side by side: walking a large SOFTWARE hive takes longer than all the rest.
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let threads: Vec<_> = CHECKS
            .iter()
            .map(|def| scope.spawn(|| (def.run)(&context)))
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
            .collect()
    });
    CHECKS
        .iter()
        .zip(outcomes)
        .map(|(def, outcome)| {
            let (ok, message) = match outcome {
                Outcome::Ok(message) => (true, message),
                Outcome::Fault(message) => (false, message),
                Outcome::CouldNotRun(why) => (false, format!("could not be checked: {why}")),
            };
            Check {
                id: def.id,
                severity: def.severity,
                ok,
                message,
            }
        })
        .collect()
}

/// Whether the checks allow to call the disk ready.
pub fn is_ready(checks: &[Check]) -> bool {
    checks
        .iter()
        .all(|c| c.ok || c.severity != Severity::Blocker)
}

fn windows_found(c: &Context<'_>) -> Outcome {
    match (&c.inspection.windows, &c.inspection.os.windows_root) {
        (Some(w), Some(root)) => Outcome::Ok(format!("{root}, {}", w.control_set)),
        _ => Outcome::Fault("no Windows installation could be examined".into()),
    }
}

fn loaded(hives: &Hives, hive: HiveName) -> Option<&LoadedBytes> {
    match hive {
        HiveName::System => Some(&hives.system),
        HiveName::Software => Some(&hives.software),
        HiveName::Drivers => hives.drivers.as_ref(),
    }
}

fn hive_sound(c: &Context<'_>, hive: HiveName) -> Outcome {
    let Some(loaded) = c.hives.and_then(|h| loaded(h, hive)) else {
        return Outcome::CouldNotRun("the hive was not read".into());
    };
    match walk::walk(&loaded.bytes) {
        Ok(s) => Outcome::Ok(format!(
            "{}: {} keys, {} values",
            loaded.path, s.keys, s.values
        )),
        Err(fault) => Outcome::Fault(format!("{}: {fault}", loaded.path)),
    }
}

fn hives_clean(c: &Context<'_>) -> Outcome {
    let Some(hives) = c.hives else {
        return Outcome::CouldNotRun("the hives were not read".into());
    };
    let mut dirty = Vec::new();
    for loaded in [
        Some(&hives.system),
        Some(&hives.software),
        hives.drivers.as_ref(),
    ]
    .into_iter()
    .flatten()
    {
        match BaseBlock::parse(&loaded.bytes) {
            Ok(base) if !base.is_dirty() && !loaded.replayed => {}
            _ => dirty.push(loaded.path.to_string()),
        }
    }
    if dirty.is_empty() {
        Outcome::Ok("every hive was closed cleanly".into())
    } else {
        Outcome::Fault(format!("not closed cleanly: {}", dirty.join(", ")))
    }
}

fn boot_path(c: &Context<'_>) -> Outcome {
    if c.inspection.controllers.is_empty() {
        return Outcome::CouldNotRun("no boot path was evaluated".into());
    }
    let faults: Vec<String> = c
        .wanted
        .iter()
        .filter_map(
            |controller| match c.inspection.controllers.get(controller) {
                Some(path) if path.ready => None,
                Some(path) => Some(format!("{}: {}", controller.name(), path.reason)),
                None => Some(format!("{}: not evaluated", controller.name())),
            },
        )
        .collect();
    if faults.is_empty() {
        let names: Vec<_> = c.wanted.iter().map(|w| w.name()).collect();
        Outcome::Ok(format!("ready: {}", names.join(", ")))
    } else {
        Outcome::Fault(faults.join("; "))
    }
}

fn firmware(c: &Context<'_>) -> Outcome {
    match c.inspection.firmware {
        Some(firmware) => Outcome::Ok(format!("{firmware:?} boot files are there").to_lowercase()),
        None => Outcome::Fault("neither a UEFI nor a BIOS boot loader was found".into()),
    }
}

fn no_blockers(c: &Context<'_>) -> Outcome {
    let blockers: Vec<_> = c
        .inspection
        .findings
        .iter()
        .filter(|f| f.severity == Severity::Blocker)
        .map(|f| f.message.as_str())
        .collect();
    if blockers.is_empty() {
        Outcome::Ok("nothing that stops Windows from booting was found".into())
    } else {
        Outcome::Fault(blockers.join("; "))
    }
}

/// Compares the guest with what the plan promised: every file byte for byte, every registry value.
pub fn planned(
    plan: &Plan,
    survey: &Survey,
    guest: &dyn GuestRead,
    volume: VolumeId,
    media: &dyn Media,
) -> Vec<Check> {
    let check = |id, result: Result<String, String>| Check {
        id,
        severity: Severity::Blocker,
        ok: result.is_ok(),
        message: result.unwrap_or_else(|fault| fault),
    };
    vec![
        check("files-as-planned", files(plan, guest, volume, media)),
        check("registry-as-planned", edits(plan, survey)),
    ]
}

fn files(
    plan: &Plan,
    guest: &dyn GuestRead,
    volume: VolumeId,
    media: &dyn Media,
) -> Result<String, String> {
    let mut count = 0;
    for action in &plan.actions {
        let Action::CopyFiles { files, .. } = action else {
            continue;
        };
        for file in files {
            let wanted = media
                .read(&file.from)
                .map_err(|e| format!("{}: {e}", file.from))?;
            let found = guest
                .read(volume, &file.to, wanted.len() as u64)
                .map_err(|e| format!("{}: {e}", file.to))?;
            if found != wanted {
                return Err(format!("{} differs from {}", file.to, file.from));
            }
            count += 1;
        }
    }
    Ok(format!("{count} files read back identical"))
}

fn edits(plan: &Plan, survey: &Survey) -> Result<String, String> {
    let hives = survey.hives.as_ref().ok_or("the hives were not read")?;
    let mut count = 0;
    for action in &plan.actions {
        let Action::EditHive { hive, edits, .. } = action else {
            continue;
        };
        let loaded = loaded(hives, *hive).ok_or("the hive was not read")?;
        let pending = HiveView::new(&loaded.bytes)
            .and_then(|view| edits.pending(&view.root()?))
            .map_err(|e| format!("{}: {e}", loaded.path))?;
        if let Some(op) = pending.ops.first() {
            return Err(format!("{}: {} is not as planned", loaded.path, op.key()));
        }
        count += edits.ops.len();
    }
    Ok(format!("{count} registry edits read back"))
}
