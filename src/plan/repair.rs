//! Plans the changes that Windows needs to boot, besides the virtio drivers. They concern the
//! bootstrap controller, the bus and volume drivers of every boot, and class filters that name dead
//! services.
//!
//! The edits follow from the faults of the boot path; nothing is assumed. A fault that no edit
//! repairs remains in the preview of the plan. [`super::remaining`] turns it into a blocker before
//! anything is written.

use std::collections::BTreeSet;

use crate::actions::{Action, PatchBootSector};
use crate::boot_path::pending::Pending;
use crate::boot_path::{self, BootFault, DEVICE_OFF, class_guid};
use crate::error::Blocker;
use crate::guest::GuestPath;
use crate::inspect::HiveName;
use crate::inspect::SectorField;
use crate::registry::HiveError;
use crate::registry::{HiveView, RegData, RegOp};
use crate::types::{ControlSet, DiskBus, KeyPath};

use super::{Inputs, Layout};

const HDC_CLASS: &str = "{4d36e96a-e325-11ce-bfc1-08002be10318}";

/// Adds the edits and blockers to `layout`.
pub fn bootable(inputs: &Inputs<'_>, sets: &[ControlSet], layout: &mut Layout) {
    let virtio: BTreeSet<String> = inputs
        .digests
        .keys()
        .map(|name| name.to_lowercase())
        .collect();
    let mut faults: Vec<(DiskBus, &BootFault)> = Vec::new();
    for (controller, path) in &inputs.inspection.controllers {
        let is_virtio = matches!(controller, DiskBus::VirtioBlk | DiskBus::VirtioScsi);
        if !is_virtio && Some(*controller) != inputs.options.bootstrap {
            continue;
        }
        for fault in &path.faults {
            // The driver packages install these.
            let ours = match fault {
                BootFault::NotBound { .. } => is_virtio,
                BootFault::NotInstalled { service, .. }
                | BootFault::NotBootStart { service, .. }
                | BootFault::NotADriver { service, .. }
                | BootFault::Mistyped { service, .. }
                | BootFault::PathForm { service, .. }
                | BootFault::Image { service, .. } => virtio.contains(&service.to_lowercase()),
                _ => false,
            };
            if !ours && !faults.iter().any(|(_, known)| *known == fault) {
                faults.push((*controller, fault));
            }
        }
    }
    let deleted = faults.iter().filter_map(|(_, fault)| match fault {
        BootFault::FileDeleted { path, .. } => Some(path.clone()),
        _ => None,
    });
    match unmarked(inputs, sets, deleted.collect()) {
        Ok(ops) if ops.is_empty() => {}
        Ok(ops) => layout
            .edits
            .entry(HiveName::System)
            .or_default()
            .extend(ops),
        Err(error) => layout.blockers.push(unreadable(&error)),
    }
    for (controller, fault) in &faults {
        if let BootFault::Instance { path, service } = fault {
            layout
                .warnings
                .push(met_before(*controller, path, service.as_deref()));
        }
    }
    for (_, fault) in faults {
        match repair(inputs, sets, fault) {
            Ok(ops) if ops.is_empty() => {}
            Ok(ops) => {
                layout
                    .edits
                    .entry(HiveName::System)
                    .or_default()
                    .extend(ops);
            }
            Err(error) => layout.blockers.push(unreadable(&error)),
        }
    }
}

fn unreadable(error: &dyn std::fmt::Display) -> Blocker {
    Blocker::new(
        "hive-damaged",
        format!("the SYSTEM hive cannot be read: {error}"),
        "start the guest once on its old hypervisor and shut it down cleanly",
    )
}

/// Removes deletion marks. A driver that was once installed and is marked for deletion at the next
/// start would take the new one with it. The boot path does not show that as long as nothing leads
/// to the driver. `files` are those the boot path has examined.
fn unmarked(
    inputs: &Inputs<'_>,
    sets: &[ControlSet],
    mut files: Vec<GuestPath>,
) -> Result<Vec<RegOp>, HiveError> {
    let system = HiveView::new(&inputs.hives.system.bytes)?;
    let mut ops = Vec::new();
    let packages = inputs.drivers.packages.iter().filter(|p| super::is_boot(p));
    for package in packages {
        for (set, service) in sets
            .iter()
            .flat_map(|set| package.inf.services().map(move |service| (set, service)))
        {
            let key = set.service(&service.name);
            if system.key(&key)?.is_some() {
                ops.push(not_deleted(key));
            }
        }
        for file in package.images() {
            let path = format!("System32\\drivers\\{file}");
            files.extend(inputs.windows.root.join(&path).ok());
        }
    }
    for set in sets {
        let pending = Pending::read(&system, set)?;
        let gone: Vec<GuestPath> = files
            .iter()
            .filter(|f| pending.removes(f))
            .cloned()
            .collect();
        ops.extend(pending.without(set, &gone));
    }
    Ok(ops)
}

fn not_deleted(key: KeyPath) -> RegOp {
    RegOp::DeleteValue {
        key: key.into(),
        name: "DeleteFlag".into(),
    }
}

/// Windows reuses its configuration of a device that it has seen in the same place.
fn met_before(controller: DiskBus, path: &str, service: Option<&str>) -> String {
    let with = match service {
        Some(name) => format!("with the driver {name}"),
        None => "without a driver".into(),
    };
    format!(
        "the device {path} was here before, {with}: in the same place again Windows does not look for its new driver, and the boot from {} may stop with 0x7B; delete it below Enum in the guest first",
        controller.name()
    )
}

/// The edits of the BCD: text mode is always disabled, devices are repaired on request.
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

/// The edit of the boot sector: that of XP and 2003 is always repaired; the start of the partition
/// on request.
pub fn boot_sector(inputs: &Inputs<'_>) -> Option<Action> {
    let boot = &inputs.windows.boot;
    let hidden = boot.hidden.iter().filter(|_| inputs.options.repair_bcd);
    let fields: Vec<SectorField> = boot.heads.iter().chain(hidden).cloned().collect();
    let volume = inputs.windows.boot_volume.filter(|_| !fields.is_empty())?;
    Some(Action::PatchBootSector(PatchBootSector {
        id: "boot-sector".to_string(),
        title: "correct the boot sector".to_string(),
        volume,
        fields,
    }))
}

/// The edits that repair a fault; empty if there are none.
fn repair(
    inputs: &Inputs<'_>,
    sets: &[ControlSet],
    fault: &BootFault,
) -> Result<Vec<RegOp>, HiveError> {
    let everywhere = |edits: &dyn Fn(&ControlSet) -> Vec<RegOp>| -> Vec<RegOp> {
        sets.iter().flat_map(edits).collect()
    };
    Ok(match fault {
        BootFault::NotBootStart { service, .. } => everywhere(&|set| boot_start(set, service)),
        BootFault::NotBound { ids, spare, .. } => match spare {
            Some(driver) => everywhere(&|set| bind(set, ids, driver)),
            None => Vec::new(),
        },
        BootFault::NotInstalled { service, file } => match inbox(service).filter(|_| *file) {
            Some(driver) => everywhere(&|set| driver.service(set)),
            None => Vec::new(),
        },
        BootFault::DeadFilter { class, list, .. } => without_dead_filters(inputs, sets, class, list)?,
        BootFault::Mistyped { service, value } => {
            everywhere(&|set| vec![retyped(&set.service(service), service, value)])
        }
        BootFault::Deleted { service } => everywhere(&|set| vec![not_deleted(set.service(service))]),
        BootFault::PathForm { service, path, .. } => path_form(inputs, sets, service, path),
        BootFault::DeviceDisabled { path, flags } => switched_on(inputs, sets, path, *flags)?,
        // Together with those of the new drivers, because they are in one value: see `unmarked`.
        BootFault::FileDeleted { .. }
        // A fault that no edit repairs remains in the preview of the plan: see `remaining`.
        | BootFault::NotADriver { .. }
        | BootFault::Image { .. }
        | BootFault::Import { .. }
        | BootFault::IdleOverride { .. }
        | BootFault::Instance { .. }
        | BootFault::Damaged(_) => Vec::new(),
    })
}

fn boot_start(set: &ControlSet, service: &str) -> Vec<RegOp> {
    let key = set.service(service);
    vec![
        RegOp::set(key.clone(), "Start", RegData::Dword(0)),
        RegOp::DeleteKey {
            key: key.join("StartOverride").into(),
        },
    ]
}

/// A driver included in Windows 7 and older, with the service key that their setup writes
/// (Microsoft KB 314082 for IDE).
struct Inbox {
    name: &'static str,
    group: &'static str,
    tag: Option<u32>,
    /// The entries of the CriticalDeviceDatabase that lead to it.
    ids: &'static [&'static str],
}

const INBOX: [Inbox; 4] = [
    Inbox {
        name: "atapi",
        group: "SCSI miniport",
        tag: Some(0x19),
        ids: &[
            "Primary_IDE_Channel",
            "Secondary_IDE_Channel",
            "Internal_IDE_Channel",
            "*PNP0600",
        ],
    },
    Inbox {
        name: "intelide",
        group: "System Bus Extender",
        tag: Some(4),
        ids: &["PCI#VEN_8086&DEV_7010"],
    },
    Inbox {
        name: "pciide",
        group: "System Bus Extender",
        tag: Some(3),
        ids: &["PCI#VEN_8086&DEV_7010", "PCI#CC_0101"],
    },
    Inbox {
        name: "msahci",
        group: "SCSI Miniport",
        tag: None,
        ids: &["PCI#CC_0106"],
    },
];

fn inbox(service: &str) -> Option<&'static Inbox> {
    INBOX.iter().find(|d| d.name.eq_ignore_ascii_case(service))
}

impl Inbox {
    fn service(&self, set: &ControlSet) -> Vec<RegOp> {
        let key = set.service(self.name);
        let number = |name: &str, n| RegOp::set(key.clone(), name, RegData::Dword(n));
        let path = format!("system32\\DRIVERS\\{}.sys", self.name);
        let mut ops = vec![
            number("Type", 1),
            number("ErrorControl", 1),
            RegOp::set(key.clone(), "Group", RegData::Sz(self.group.into())),
            RegOp::set(key.clone(), "ImagePath", RegData::ExpandSz(path)),
        ];
        ops.extend(self.tag.map(|tag| number("Tag", tag)));
        ops.extend(boot_start(set, self.name));
        ops
    }
}

/// Binds a driver through the CriticalDeviceDatabase, up to Windows 7: AHCI on Vista and 7, IDE if
/// Windows was installed on SCSI.
fn bind(set: &ControlSet, ids: &[String], driver: &str) -> Vec<RegOp> {
    let Some(inbox) = inbox(driver) else {
        return Vec::new();
    };
    let own = ids
        .first()
        .filter(|id| boot_path::IDE_CHANNELS.contains(&id.as_str()));
    let mut ops = Vec::new();
    for id in inbox.ids.iter().copied().chain(own.map(String::as_str)) {
        let key = set.key("Control\\CriticalDeviceDatabase").join(id);
        ops.push(RegOp::set(
            key.clone(),
            "Service",
            RegData::Sz(driver.into()),
        ));
        ops.push(RegOp::set(key, "ClassGUID", RegData::Sz(HDC_CLASS.into())));
    }
    ops
}

/// The groups of the drivers that every boot needs (docs/boot-path.md).
const GROUPS: [(&str, &str); 8] = [
    ("pci", "Boot Bus Extender"),
    ("acpi", "Boot Bus Extender"),
    ("partmgr", "Boot Bus Extender"),
    ("mountmgr", "System Bus Extender"),
    ("volmgr", "System Bus Extender"),
    ("volmgrx", "System Bus Extender"),
    ("ftdisk", "System Bus Extender"),
    ("storahci", "SCSI Miniport"),
];

/// The value as Windows' own setup writes it. An unknown group is removed: the driver is then
/// loaded after those that have one.
fn retyped(key: &str, service: &str, value: &str) -> RegOp {
    let known = GROUPS
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(service))
        .map(|(_, group)| *group)
        .or(inbox(service).map(|d| d.group));
    let data = match value {
        "Start" => RegData::Dword(0),
        "Type" | "ErrorControl" => RegData::Dword(1),
        "ImagePath" => RegData::ExpandSz(format!("System32\\drivers\\{service}.sys")),
        _ => match known {
            Some(group) => RegData::Sz(group.into()),
            None => {
                return RegOp::DeleteValue {
                    key: key.to_string(),
                    name: value.to_string(),
                };
            }
        },
    };
    RegOp::set(key, value, data)
}

/// The same file as a path that every loader accepts; `None` for a file outside the directory of
/// Windows.
fn path_form(
    inputs: &Inputs<'_>,
    sets: &[ControlSet],
    service: &str,
    path: &GuestPath,
) -> Vec<RegOp> {
    let root = &inputs.windows.root;
    let (file, folder) = (path.key(), root.key());
    // Not in `\Windows.old` either.
    let inside = file
        .strip_prefix(&folder)
        .is_some_and(|rest| rest.starts_with('\\'));
    let below = path.parts().get(root.parts().len()..).unwrap_or_default();
    if !inside {
        return Vec::new();
    }
    let relative = RegData::ExpandSz(below.join("\\"));
    let set = |set: &ControlSet| {
        let key = set.service(service);
        RegOp::set(key, "ImagePath", relative.clone())
    };
    sets.iter().map(set).collect()
}

/// Removes the mark from a device, in the control sets that contain it.
fn switched_on(
    inputs: &Inputs<'_>,
    sets: &[ControlSet],
    path: &str,
    flags: u32,
) -> Result<Vec<RegOp>, HiveError> {
    let system = HiveView::new(&inputs.hives.system.bytes)?;
    let mut ops = Vec::new();
    for set in sets {
        let key = set.key("Enum").join(path);
        if system.key(&key)?.is_some() {
            ops.push(RegOp::set(
                key,
                "ConfigFlags",
                RegData::Dword(flags & !DEVICE_OFF),
            ));
        }
    }
    Ok(ops)
}

/// The filter list of the class without its dead services; an empty list is deleted.
fn without_dead_filters(
    inputs: &Inputs<'_>,
    sets: &[ControlSet],
    class: &str,
    list: &str,
) -> Result<Vec<RegOp>, HiveError> {
    let faults = || {
        let paths = inputs.inspection.controllers.values();
        paths.flat_map(|path| &path.faults)
    };
    // A driver that this plan makes start is a filter that works.
    let repaired = |service: &str| {
        faults().any(|fault| match fault {
            BootFault::NotBootStart { service: s, .. }
            | BootFault::Mistyped { service: s, .. }
            | BootFault::Deleted { service: s } => s.eq_ignore_ascii_case(service),
            _ => false,
        })
    };
    let dead: Vec<&String> = faults()
        .filter_map(|fault| match fault {
            BootFault::DeadFilter {
                class: c,
                list: l,
                service,
                ..
            } if (*c, *l) == (class, list) && !repaired(service) => Some(service),
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
        let path = set.key("Control\\Class").join(guid);
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
                key: path.into(),
                name: list.to_string(),
            }
        } else {
            RegOp::set(path, list, RegData::MultiSz(alive))
        });
    }
    Ok(ops)
}

#[cfg(test)]
#[path = "repair_tests.rs"]
mod tests;
