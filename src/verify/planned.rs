//! Compares the guest with what the plan promised: every file byte for byte, every registry value.

use super::loaded;
use crate::check::{Check, CheckState};
use crate::drivers::media::Media;
use crate::guest::{GuestPath, GuestRead, VolumeId};
use crate::inspect::{Severity, Survey};
use crate::plan::model::{Action, Plan};
use crate::registry::HiveView;

pub fn planned(
    plan: &Plan,
    survey: &Survey,
    guest: &dyn GuestRead,
    volume: VolumeId,
    media: &dyn Media,
) -> Vec<Check> {
    let check = |id, result: Result<String, String>| {
        let state = match result {
            Ok(_) => CheckState::Ok,
            Err(_) => CheckState::Fault,
        };
        let message = result.unwrap_or_else(|fault| fault);
        Check::new(id, Severity::Blocker, state, message)
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
        match action {
            Action::CopyFiles { files, .. } => {
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
            Action::CopyInGuest {
                volume,
                from,
                to,
                size,
                ..
            } => {
                let read = |path| {
                    let bytes = guest.read(*volume, path, *size);
                    bytes.map_err(|e| format!("{path}: {e}"))
                };
                if read(from)? != read(to)? {
                    return Err(format!("{to} differs from {from}"));
                }
                count += 1;
            }
            Action::PatchBootSector { volume, fields, .. } => {
                for field in fields {
                    let path = GuestPath::parse("$Boot").map_err(|e| e.to_string())?;
                    let (offset, len) = (field.offset.into(), field.new.len());
                    let found = guest
                        .read_at(*volume, &path, offset, len)
                        .map_err(|e| format!("{path}: {e}"))?;
                    if found != field.new {
                        return Err(format!("{} of the boot sector differs", field.name));
                    }
                }
            }
            Action::EditHive { .. } => {}
        }
    }
    Ok(format!(
        "{} read back identical",
        crate::ui::count(count, "file")
    ))
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
