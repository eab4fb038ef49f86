//! What must change besides the virtio drivers so that Windows boots: the bootstrap controller, the
//! bus and volume drivers every boot needs, and class filters that name dead services.
//!
//! Driven by the faults the boot path found; nothing is assumed. A fault that no edit repairs is still
//! there in the preview of the plan: [`super::remaining`] makes a blocker of it before anything is written.

use std::collections::BTreeSet;

use crate::boot_path::{Controller, Fault, class_guid};
use crate::error::Blocker;
use crate::inspect::SectorField;
use crate::registry::hive::HiveError;
use crate::registry::{HiveView, RegData, RegOp};

use super::{Action, HiveName, Inputs, Layout};

const HDC_CLASS: &str = "{4d36e96a-e325-11ce-bfc1-08002be10318}";

/// Adds the edits and blockers to `layout`.
pub fn bootable(inputs: &Inputs<'_>, sets: &[String], layout: &mut Layout) {
    let virtio: BTreeSet<String> = inputs
        .digests
        .keys()
        .map(|name| name.to_lowercase())
        .collect();
    let mut faults: Vec<(Controller, &Fault)> = Vec::new();
    for (controller, path) in &inputs.inspection.controllers {
        let is_virtio = matches!(controller, Controller::VirtioBlk | Controller::VirtioScsi);
        if !is_virtio && Some(*controller) != inputs.options.bootstrap {
            continue;
        }
        for fault in &path.faults {
            // The driver packages bring these.
            let ours = match fault {
                Fault::NotBound { .. } => is_virtio,
                Fault::NotInstalled { service }
                | Fault::NotBootStart { service, .. }
                | Fault::NotADriver { service, .. }
                | Fault::Image { service, .. } => virtio.contains(&service.to_lowercase()),
                _ => false,
            };
            if !ours && !faults.iter().any(|(_, known)| *known == fault) {
                faults.push((*controller, fault));
            }
        }
    }
    for (controller, fault) in faults {
        match repair(inputs, sets, controller, fault) {
            Ok(ops) if ops.is_empty() => {}
            Ok(ops) => {
                layout
                    .edits
                    .entry(HiveName::System)
                    .or_default()
                    .extend(ops);
            }
            Err(error) => layout.blockers.push(Blocker::new(
                "hive-damaged",
                format!("the SYSTEM hive cannot be read: {error}"),
                "start the guest once on its old hypervisor and shut it down cleanly",
            )),
        }
    }
}

/// The edits of the BCD: text mode always goes, devices are repaired on request.
pub fn boot_store(inputs: &Inputs<'_>, layout: &mut Layout) {
    let boot = &inputs.windows.boot;
    let mut ops = boot.text_mode.clone();
    if inputs.options.repair_bcd {
        ops.extend(boot.device_repair.iter().cloned());
    }
    if !ops.is_empty() {
        layout.edits.insert(HiveName::Bcd, ops);
    }
}

/// The boot sector of XP and 2003 is always mended; where the partition starts, on request.
pub fn boot_sector(inputs: &Inputs<'_>) -> Option<Action> {
    let boot = &inputs.windows.boot;
    let hidden = boot.hidden.iter().filter(|_| inputs.options.repair_bcd);
    let fields: Vec<SectorField> = boot.heads.iter().chain(hidden).cloned().collect();
    let volume = inputs.windows.boot_volume.filter(|_| !fields.is_empty())?;
    Some(Action::PatchBootSector {
        id: "boot-sector".to_string(),
        title: "correct the boot sector".to_string(),
        volume,
        fields,
    })
}

/// The edits that repair a fault; none where there are no such edits.
fn repair(
    inputs: &Inputs<'_>,
    sets: &[String],
    controller: Controller,
    fault: &Fault,
) -> Result<Vec<RegOp>, HiveError> {
    Ok(match fault {
        Fault::NotBootStart { service, .. } => sets
            .iter()
            .flat_map(|set| boot_start(set, service))
            .collect(),
        Fault::NotBound { .. } => bind_ahci(inputs, sets, controller).unwrap_or_default(),
        Fault::DeadFilter { class, list, .. } => without_dead_filters(inputs, sets, class, list)?,
        // What no edit repairs is still there in the preview of the plan: see `remaining`.
        Fault::NotInstalled { .. }
        | Fault::NotADriver { .. }
        | Fault::Image { .. }
        | Fault::Damaged(_) => Vec::new(),
    })
}

fn boot_start(set: &str, service: &str) -> Vec<RegOp> {
    let key = format!("{set}\\Services\\{service}");
    vec![
        RegOp::set(key.clone(), "Start", RegData::Dword(0)),
        RegOp::DeleteKey {
            key: format!("{key}\\StartOverride"),
        },
    ]
}

/// Vista and 7 keep AHCI in the CriticalDeviceDatabase, where an entry can be added. The driver was
/// not looked at while nothing led to it, so it is made boot-start too.
fn bind_ahci(inputs: &Inputs<'_>, sets: &[String], controller: Controller) -> Option<Vec<RegOp>> {
    let target = &inputs.windows.target;
    if controller != Controller::Sata || target.major != 6 || target.minor > 1 {
        return None;
    }
    let ops = sets.iter().flat_map(|set| {
        let key = format!("{set}\\Control\\CriticalDeviceDatabase\\PCI#CC_0106");
        [
            RegOp::set(key.clone(), "Service", RegData::Sz("msahci".into())),
            RegOp::set(key, "ClassGUID", RegData::Sz(HDC_CLASS.into())),
        ]
        .into_iter()
        .chain(boot_start(set, "msahci"))
    });
    Some(ops.collect())
}

/// The filter list of the class without its dead services; the value goes when nothing is left.
fn without_dead_filters(
    inputs: &Inputs<'_>,
    sets: &[String],
    class: &str,
    list: &str,
) -> Result<Vec<RegOp>, HiveError> {
    let dead: Vec<&String> = inputs
        .inspection
        .controllers
        .values()
        .flat_map(|path| &path.faults)
        .filter_map(|fault| match fault {
            Fault::DeadFilter {
                class: c,
                list: l,
                service,
            } if (*c, *l) == (class, list) => Some(service),
            _ => None,
        })
        .collect();
    let is_dead = |name: &String| dead.iter().any(|d| d.eq_ignore_ascii_case(name));
    let system = HiveView::new(&inputs.hives.system.bytes)?;
    let mut ops = Vec::new();
    for set in sets {
        let Some(guid) = class_guid(class) else {
            continue;
        };
        let path = format!("{set}\\Control\\Class\\{guid}");
        let Some(key) = system.key(&path)? else {
            continue;
        };
        let names = key.multi(list)?.unwrap_or_default();
        let alive: Vec<String> = names.iter().filter(|n| !is_dead(n)).cloned().collect();
        if alive.len() == names.len() {
            continue;
        }
        ops.push(if alive.is_empty() {
            RegOp::DeleteValue {
                key: path,
                name: list.to_string(),
            }
        } else {
            RegOp::set(path, list, RegData::MultiSz(alive))
        });
    }
    Ok(ops)
}
