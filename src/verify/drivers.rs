//! Checks of the drivers that Windows needs to reach its disk. They must be bound, boot-start,
//! present and for the right processor. Their stacks must contain nothing dead, and no two of them
//! may compete for a device.

use super::{Context, Outcome};
use crate::boot_path::{self, BOOT_START, BootFault, ImageState, Service};
use crate::inspect::WindowsFacts;
use crate::registry::error::Result;
use crate::registry::hive::Key;
use crate::types::Arch;

pub fn boot_path(c: &Context<'_>) -> Outcome {
    if c.inspection.controllers.is_empty() {
        return Outcome::CouldNotRun("no boot path was evaluated".into());
    }
    let mut faults = Vec::new();
    for controller in c.wanted {
        match c.inspection.controllers.get(controller) {
            Some(path) if path.ready => {}
            Some(path) => faults.push(format!("{}: {}", controller.name(), path.reason)),
            None => faults.push(format!("{}: not evaluated", controller.name())),
        }
    }
    let names: Vec<_> = c.wanted.iter().map(|w| w.name()).collect();
    if faults.is_empty() {
        Outcome::Ok(format!("ready: {}", names.join(", ")))
    } else {
        Outcome::Fault(faults.join("; "), names.join(", "))
    }
}

fn nt(c: &Context<'_>) -> (u32, u32) {
    let windows = c.inspection.windows.as_ref();
    windows.map_or((10, 0), |w| (w.target.major, w.target.minor))
}

fn unbound(ids: &[String]) -> String {
    let id = ids.first().map_or("", String::as_str);
    let channel = id == boot_path::IDE_CHANNELS[0];
    match channel {
        true => format!(
            "no driver is bound to the IDE channels ({})",
            ids.join(", ")
        ),
        false => format!("no driver is bound to PCI\\{id}"),
    }
}

/// Devices without a driver: the deciding ones, or the others.
fn without_driver(c: &Context<'_>, deciding: bool, fine: &str) -> Outcome {
    let pick = |_, fault: &BootFault| match fault {
        BootFault::NotBound { ids, decides, .. } if *decides == deciding => Some(unbound(ids)),
        _ => None,
    };
    c.faults(pick, fine)
}

pub fn bound(c: &Context<'_>) -> Outcome {
    without_driver(c, true, "every controller has a driver bound to it")
}

/// Machine types older than q35 have the transitional virtio device.
pub fn transitional(c: &Context<'_>) -> Outcome {
    without_driver(c, false, "both forms of the virtio devices are known")
}

/// Whether a service is a bus or volume driver, which have checks of their own.
fn is_system(c: &Context<'_>, service: &str) -> bool {
    boot_path::system_drivers(nt(c).0)
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case(service))
}

/// Describes a fault of a service.
fn service_fault(fault: &BootFault) -> Option<(&str, String)> {
    Some(match fault {
        BootFault::NotInstalled { service, .. } => (service, format!("{service} is not installed")),
        BootFault::NotBootStart {
            service,
            start,
            start_override,
        } => (
            service,
            match start_override {
                Some(v) => {
                    format!("{service} does not start at boot (Start={start}, StartOverride={v})")
                }
                None => format!("{service} does not start at boot (Start={start})"),
            },
        ),
        BootFault::NotADriver { service, kind } => {
            (service, format!("{service} is not a driver (Type={kind})"))
        }
        BootFault::Mistyped { service, value } => (
            service,
            format!("{value} of {service} is of the wrong type: Windows drops the driver"),
        ),
        BootFault::Deleted { service } => (
            service,
            format!("{service} is marked for deletion (DeleteFlag)"),
        ),
        BootFault::PathForm {
            service,
            decides: true,
            ..
        } => (
            service,
            format!("the ImagePath of {service} is not relative to the directory of Windows"),
        ),
        _ => return None,
    })
}

/// Describes a fault of its file.
fn image_fault<'f>(c: &Context<'_>, fault: &'f BootFault) -> Option<(&'f str, String)> {
    Some(match fault {
        BootFault::Image {
            service,
            path,
            state,
        } => {
            let what = match state {
                ImageState::Missing => "is missing",
                ImageState::Unreadable => "is not a usable driver file",
                ImageState::Present { .. } => "is for another processor",
            };
            let path = path.as_ref().map_or("its file".into(), |p| p.to_string());
            (service, format!("{service}: {path} {what}"))
        }
        BootFault::FileDeleted { service, path } => (
            service,
            format!("{service}: Windows deletes {path} at its next start"),
        ),
        BootFault::Import { service, missing } => {
            let arch = c.inspection.os.arch.unwrap_or(Arch::Amd64);
            (service, format!("{service}: {}", missing.text(arch)))
        }
        _ => return None,
    })
}

pub fn service(c: &Context<'_>) -> Outcome {
    let pick = |_, fault: &BootFault| {
        let (service, text) = service_fault(fault)?;
        (!is_system(c, service)).then_some(text)
    };
    c.faults(pick, "the drivers of the controllers start at boot")
}

pub fn image(c: &Context<'_>) -> Outcome {
    let pick = |_, fault: &BootFault| {
        let (service, text) = image_fault(c, fault)?;
        let own = !is_system(c, service) && !is_core(service);
        own.then_some(text)
    };
    c.faults(
        pick,
        "their files are there, with all they import, for this processor",
    )
}

const BUSES: [&str; 2] = ["pci", "acpi"];

fn system_drivers(c: &Context<'_>, buses: bool, fine: &str) -> Outcome {
    let pick = |_, fault: &BootFault| {
        let (service, text) = service_fault(fault).or_else(|| image_fault(c, fault))?;
        let is_bus = BUSES.iter().any(|b| b.eq_ignore_ascii_case(service));
        (is_system(c, service) && is_bus == buses).then_some(text)
    };
    c.faults(pick, fine)
}

pub fn bus(c: &Context<'_>) -> Outcome {
    system_drivers(c, true, "pci and acpi start at boot")
}

pub fn volume(c: &Context<'_>) -> Outcome {
    system_drivers(c, false, "the disk and volume drivers start at boot")
}

/// Whether this is the boot path's name of the kernel or the boot file system's driver.
fn is_core(service: &str) -> bool {
    [boot_path::KERNEL, boot_path::NTFS].contains(&service)
}

pub fn core(c: &Context<'_>) -> Outcome {
    let pick = |_, fault: &BootFault| {
        let (service, text) = image_fault(c, fault)?;
        is_core(service).then_some(text)
    };
    c.faults(
        pick,
        "the kernel and ntfs.sys are there, with all they import",
    )
}

/// Filters of a class without a device between Windows and the disk, and overrides that this
/// Windows ignores.
pub fn idle(c: &Context<'_>) -> Outcome {
    let pick = |_, fault: &BootFault| match fault {
        BootFault::DeadFilter {
            class,
            list,
            service,
            decides: false,
        } => Some(format!(
            "{list} of the class {class} names {service}, which is missing or disabled: devices of that class do not start"
        )),
        BootFault::IdleOverride { service, value } => Some(format!(
            "{service} has StartOverride={value}, which this Windows ignores"
        )),
        BootFault::PathForm {
            service,
            decides: false,
            ..
        } => Some(format!(
            "the ImagePath of {service} is not relative to the directory of Windows"
        )),
        _ => None,
    };
    c.faults(pick, "nothing else is odd")
}

/// Records of earlier devices.
pub fn instances(c: &Context<'_>) -> Outcome {
    let pick = |_, fault: &BootFault| match fault {
        BootFault::Instance {
            path,
            service: Some(service),
        } => Some(format!("{path} was here before, with the driver {service}")),
        BootFault::Instance {
            path,
            service: None,
        } => Some(format!("{path} was here before, without a driver")),
        BootFault::DeviceDisabled { path, .. } => {
            Some(format!("{path} was here before and is switched off"))
        }
        _ => None,
    };
    match c.faults(pick, "no device was here before with another driver") {
        Outcome::Fault(text, evidence) => Outcome::Fault(
            format!("{text}: Windows uses that driver again when it is in the same place"),
            evidence,
        ),
        other => other,
    }
}

pub fn class_filters(c: &Context<'_>) -> Outcome {
    let pick = |_, fault: &BootFault| match fault {
        BootFault::DeadFilter {
            class,
            list,
            service,
            decides: true,
        } => Some(format!(
            "{list} of the class {class} names {service}, which is missing or disabled: stop 0x7B"
        )),
        _ => None,
    };
    c.faults(pick, "no class filter names a dead service")
}

/// The most device instances read; real PCs have a few thousand.
const MAX_INSTANCES: usize = 50_000;

/// Filters of single devices. Those of the old VM's controllers do no harm on the new one, but
/// volumes and devices below `ROOT` stay.
pub fn device_filters(c: &Context<'_>) -> Outcome {
    c.system(|system, windows| {
        let Some(tree) = system.key(&windows.control_set.key("Enum"))? else {
            return Ok(Outcome::Ok("there are no devices".into()));
        };
        let mut dead = Vec::new();
        let mut seen = 0usize;
        for bus in tree.keys()? {
            for device in bus.keys()? {
                for instance in device.keys()? {
                    seen += 1;
                    if seen > MAX_INSTANCES {
                        return Ok(Outcome::CouldNotRun("too many devices".into()));
                    }
                    for list in ["UpperFilters", "LowerFilters"] {
                        for name in instance.multi(list)?.unwrap_or_default() {
                            if is_dead(system, windows, &name)? {
                                let path = [bus.name()?, device.name()?, instance.name()?];
                                dead.push(format!("{} {list}: {name}", path.join("\\")));
                            }
                        }
                    }
                }
            }
        }
        Ok(if dead.is_empty() {
            Outcome::Ok("no device filter names a dead service".into())
        } else {
            dead.truncate(8);
            Outcome::Fault(
                "device filters name services that are missing or disabled: those devices do not start"
                    .into(),
                dead.join("; "),
            )
        })
    })
}

fn is_dead(
    system: &crate::registry::HiveView<'_>,
    windows: &WindowsFacts,
    name: &str,
) -> Result<bool> {
    let service = Service::read(
        system,
        &windows.control_set,
        &windows.root,
        (windows.target.major, windows.target.minor),
        name,
    )?;
    Ok(service.is_none_or(|s| !s.is_installed() || s.is_disabled()))
}

/// The boot loader loads every boot-start driver. One that cannot be loaded stops it if its
/// `ErrorControl` is "critical", and is skipped otherwise. This check is no blocker. The drivers
/// that a boot needs are evaluated in `boot_path`. For the others a wrong verdict would refuse
/// guests that start. Whatever is missing here was missing on the old host too.
pub fn critical_services(c: &Context<'_>) -> Outcome {
    services(c, true, "the boot loader stops at drivers it cannot load")
}

pub fn other_services(c: &Context<'_>) -> Outcome {
    services(
        c,
        false,
        "the boot loader passes over drivers it cannot load",
    )
}

fn services(c: &Context<'_>, critical: bool, fault: &str) -> Outcome {
    let Some(arch) = c.inspection.os.arch else {
        return Outcome::CouldNotRun("the processor is not known".into());
    };
    c.system(|system, windows| {
        let path = windows.control_set.key("Services");
        let Some(services) = system.key(&path)? else {
            return Ok(Outcome::CouldNotRun(format!("no {path}")));
        };
        let (mut bad, mut count) = (Vec::new(), 0);
        for key in services.keys()? {
            let name = key.name()?;
            if is_critical(&key)? != critical {
                continue;
            }
            let Some(service) = boot_start(system, windows, &name)? else {
                continue;
            };
            count += 1;
            if let Some(what) = image_problem(c, windows, &service, arch) {
                bad.push(format!("{name} {what}"));
            }
        }
        Ok(if bad.is_empty() {
            Outcome::Ok(match count {
                1 => "1 boot-start driver is there".to_string(),
                n => format!("{n} boot-start drivers are there"),
            })
        } else {
            let evidence = format!("SYSTEM\\{path}");
            Outcome::Fault(format!("{fault}: {}", bad.join(", ")), evidence)
        })
    })
}

fn boot_start(
    system: &crate::registry::HiveView<'_>,
    windows: &WindowsFacts,
    name: &str,
) -> Result<Option<Service>> {
    let service = Service::read(
        system,
        &windows.control_set,
        &windows.root,
        (windows.target.major, windows.target.minor),
        name,
    )?;
    Ok(
        service
            .filter(|s| matches!(s.kind, Some(1 | 2)) && s.effective_start() == Some(BOOT_START)),
    )
}

fn is_critical(key: &Key<'_>) -> Result<bool> {
    Ok(key.dword("ErrorControl")? == Some(3))
}

fn image_problem(
    c: &Context<'_>,
    windows: &WindowsFacts,
    service: &Service,
    arch: Arch,
) -> Option<&'static str> {
    let Ok(path) = &service.image else {
        return Some("(bad ImagePath)");
    };
    match boot_path::image(c.guest, windows.system_volume, path).state {
        ImageState::Missing => Some("(file missing)"),
        ImageState::Unreadable => Some("(not a driver file)"),
        ImageState::Present { machine: Some(m) } if m != arch.pe_machine() => {
            Some("(other processor)")
        }
        ImageState::Present { .. } => None,
    }
}

/// Two boot-start drivers bound to one device id: dates and versions determine which one gets it.
pub fn rivals(c: &Context<'_>) -> Outcome {
    c.system(|system, windows| {
        let mut texts = Vec::new();
        for device in c.wanted.iter().flat_map(|controller| controller.devices()) {
            let mut services: Vec<String> = Vec::new();
            let mut id = String::new();
            for binding in boot_path::rivals(system, &device)? {
                let known = services
                    .iter()
                    .any(|s| s.eq_ignore_ascii_case(&binding.service));
                if !known && boot_start(system, windows, &binding.service)?.is_some() {
                    services.push(binding.service);
                    id = binding.id;
                }
            }
            if services.len() > 1 {
                texts.push(format!("PCI\\{id}: {}", services.join(", ")));
            }
        }
        Ok(if texts.is_empty() {
            Outcome::Ok("one driver for each controller".into())
        } else {
            Outcome::Fault(
                "several boot-start drivers are bound to the same device".into(),
                texts.join("; "),
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::GuestPath;

    /// A fault of the boot path fails a check; advice does not.
    #[test]
    fn each_fault_of_a_service_that_decides_is_told_by_its_service() {
        let service = || "disk".to_string();
        let path = || GuestPath::parse("\\Windows\\disk.sys").unwrap();
        for (fault, told) in [
            (
                BootFault::NotInstalled {
                    service: service(),
                    file: true,
                },
                true,
            ),
            (
                BootFault::NotBootStart {
                    service: service(),
                    start: 3,
                    start_override: None,
                },
                true,
            ),
            (
                BootFault::NotADriver {
                    service: service(),
                    kind: 16,
                },
                true,
            ),
            (
                BootFault::Mistyped {
                    service: service(),
                    value: "Start",
                },
                true,
            ),
            (BootFault::Deleted { service: service() }, true),
            (
                BootFault::PathForm {
                    service: service(),
                    path: path(),
                    decides: true,
                },
                true,
            ),
            (
                BootFault::PathForm {
                    service: service(),
                    path: path(),
                    decides: false,
                },
                false,
            ),
            (
                BootFault::IdleOverride {
                    service: service(),
                    value: 3,
                },
                false,
            ),
            // That is of the file.
            (
                BootFault::FileDeleted {
                    service: service(),
                    path: path(),
                },
                false,
            ),
        ] {
            let found = service_fault(&fault);
            assert_eq!(
                found.as_ref().map(|(name, _)| *name),
                told.then_some("disk")
            );
            assert!(
                found.is_none_or(|(_, text)| text.contains("disk")),
                "{fault:?}"
            );
        }
    }

    #[test]
    fn a_device_without_a_driver_is_told_by_its_first_name_and_channels_by_all() {
        let told = |ids: &[&str]| unbound(&ids.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(
            told(&["VEN_1AF4&DEV_1042", "VEN_1AF4"]),
            "no driver is bound to PCI\\VEN_1AF4&DEV_1042"
        );
        assert_eq!(
            told(&boot_path::IDE_CHANNELS),
            format!(
                "no driver is bound to the IDE channels ({})",
                boot_path::IDE_CHANNELS.join(", ")
            )
        );
        let second = boot_path::IDE_CHANNELS[1];
        assert_eq!(
            told(&[second]),
            format!("no driver is bound to PCI\\{second}")
        );
    }
}
