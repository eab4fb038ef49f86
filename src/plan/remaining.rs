//! Finds what still keeps Windows from starting after the plan. The faults of the boot path in the
//! preview become blockers with remedies that help.

use crate::boot_path::{self, BootFault, BootPath, ImageState};
use crate::error::Blocker;
use crate::inspect::{Firmware, Inspection};
use crate::types::{Arch, DiskBus};

/// A fault that remains after the plan, and the checks of `verify` that fail because of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remaining {
    pub blocker: Blocker,
    pub checks: Vec<&'static str>,
}

/// The faults of the controllers from which the disk must boot. `after` is the inspection of the
/// preview.
pub fn remaining(after: &Inspection, wanted: &[DiskBus], production: DiskBus) -> Vec<Remaining> {
    let nt_major = after.windows.as_ref().map_or(10, |w| w.target.major);
    let mut list: Vec<Remaining> = Vec::new();
    for controller in wanted {
        let Some(path) = after.controllers.get(controller).filter(|p| !p.ready) else {
            continue;
        };
        let remedy = Remedy {
            after,
            controller: *controller,
            production,
        };
        let mut found = path
            .faults
            .iter()
            .filter_map(|fault| named(nt_major, *controller, fault, &remedy))
            .collect::<Vec<_>>();
        // A reason without a fault of its own is named too.
        if found.is_empty() {
            found.push(whole(*controller, path));
        }
        for one in found {
            if !list.iter().any(|known| known.blocker == one.blocker) {
                list.push(one);
            }
        }
    }
    list
}

fn whole(controller: DiskBus, path: &BootPath) -> Remaining {
    Remaining {
        blocker: Blocker::new(
            "boot-path",
            format!("{}: {}", controller.name(), path.reason),
            "repair Windows on its old host first",
        ),
        checks: vec!["boot-path"],
    }
}

struct Remedy<'a> {
    after: &'a Inspection,
    controller: DiskBus,
    production: DiskBus,
}

impl Remedy<'_> {
    /// Other methods for the first boot that would work, each preceded by `or`.
    fn other_bootstrap(&self) -> String {
        if !matches!(self.controller, DiskBus::Sata | DiskBus::Ide) {
            return String::new();
        }
        let ready = |c: DiskBus| self.after.controllers.get(&c).is_some_and(|p| p.ready);
        let bios = self.after.firmware != Some(Firmware::Uefi);
        let mut options = Vec::new();
        for (controller, usable) in [(DiskBus::Sata, true), (DiskBus::Ide, bios)] {
            if controller != self.controller && usable && ready(controller) {
                options.push(format!("--bootstrap {}", controller.name()));
            }
        }
        if ready(self.production) {
            options.push("--bootstrap none".to_string());
        }
        if options.is_empty() {
            return String::new();
        }
        format!(", or convert with {}", options.join(" or "))
    }

    /// The remedy for a fault of this service. Another controller helps only if the service belongs
    /// to one.
    fn of(&self, nt_major: u32, service: &str, repair: &str) -> String {
        if is_system(nt_major, service) {
            return format!("{repair}; Windows needs {service} on every controller");
        }
        format!("{repair}{}", self.other_bootstrap())
    }
}

fn is_system(nt_major: u32, service: &str) -> bool {
    boot_path::system_drivers(nt_major)
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case(service))
        || is_core(service)
}

fn is_core(service: &str) -> bool {
    [boot_path::KERNEL, boot_path::NTFS].contains(&service)
}

/// The check of `verify` for this service.
fn check_of(nt_major: u32, service: &str, otherwise: &'static str) -> &'static str {
    match is_system(nt_major, service) {
        true if is_core(service) => "kernel-files",
        true if ["pci", "acpi"]
            .iter()
            .any(|b| b.eq_ignore_ascii_case(service)) =>
        {
            "bus-drivers"
        }
        true => "volume-drivers",
        false => otherwise,
    }
}

const SFC: &str = "repair Windows on its old host first (sfc /scannow, or a repair installation)";

/// The blocker for a fault; `None` for advice, which is a flawed step that does not decide.
fn named(
    nt_major: u32,
    controller: DiskBus,
    fault: &BootFault,
    remedy: &Remedy<'_>,
) -> Option<Remaining> {
    let (blocker, check) = match fault {
        BootFault::NotBound { decides: false, .. }
        | BootFault::DeadFilter { decides: false, .. }
        | BootFault::PathForm { decides: false, .. }
        | BootFault::IdleOverride { .. }
        | BootFault::Instance { .. }
        | BootFault::DeviceDisabled { .. } => return None,
        BootFault::NotBound { ids, .. } => (not_bound(controller, ids, remedy), "controller-bound"),
        BootFault::DeadFilter {
            class,
            list,
            service,
            ..
        } => (
            Blocker::new(
                "class-filters",
                format!(
                    "{list} of the class {class} names {service}, which is missing or disabled: stop 0x7B"
                ),
                "remove the filter in the guest (uninstall the program it belongs to)",
            ),
            "class-filters",
        ),
        BootFault::Damaged(text) => (
            Blocker::new(
                "hive-damaged",
                format!("the SYSTEM hive cannot be read: {text}"),
                "start the guest once on its old hypervisor and shut it down cleanly",
            ),
            "boot-path",
        ),
        BootFault::NotInstalled { service, .. }
        | BootFault::NotBootStart { service, .. }
        | BootFault::NotADriver { service, .. }
        | BootFault::Mistyped { service, .. }
        | BootFault::Deleted { service } => {
            let (id, reason) = of_the_service(controller, fault)?;
            (
                Blocker::new(id, reason, remedy.of(nt_major, service, SFC)),
                check_of(nt_major, service, "controller-service"),
            )
        }
        BootFault::PathForm { service, .. }
        | BootFault::FileDeleted { service, .. }
        | BootFault::Import { service, .. }
        | BootFault::Image { service, .. } => {
            let file = of_the_file(fault, remedy.after)?;
            (
                Blocker::new(
                    "boot-driver-file",
                    file.reason,
                    remedy.of(nt_major, service, file.repair),
                ),
                check_of(nt_major, service, file.check),
            )
        }
    };
    let mut checks = vec![check];
    if check != "boot-path" {
        checks.push("boot-path");
    }
    Some(Remaining { blocker, checks })
}

/// The blocker for a controller without a driver.
fn not_bound(controller: DiskBus, ids: &[String], remedy: &Remedy<'_>) -> Blocker {
    let id = ids.first().map_or("", String::as_str);
    let reason = format!(
        "no driver of this Windows is bound to the {} controller ({id})",
        controller.name()
    );
    match controller {
        DiskBus::Sata | DiskBus::Ide => Blocker::new(
            "bootstrap-unbound",
            reason,
            match remedy.other_bootstrap().strip_prefix(", or ") {
                Some(other) => other.to_string(),
                None => format!("{SFC}: no other --bootstrap would do"),
            },
        ),
        DiskBus::VirtioBlk | DiskBus::VirtioScsi => Blocker::new(
            "virtio-unbound",
            reason,
            "use another release of virtio-win with --virtio-iso: this driver does not list the device",
        ),
    }
}

/// The blocker and its reason for a service with a wrong key.
fn of_the_service(controller: DiskBus, fault: &BootFault) -> Option<(&'static str, String)> {
    let bus = controller.name();
    Some(match fault {
        BootFault::NotInstalled { service, .. } => (
            "boot-driver-missing",
            format!("the driver {service}, which booting from {bus} needs, is not installed"),
        ),
        BootFault::NotBootStart { service, start, .. } => (
            "boot-driver-start",
            format!("the driver {service} would not start at boot (Start={start})"),
        ),
        BootFault::NotADriver { service, kind } => (
            "boot-driver-damaged",
            format!("the service {service} is not a kernel driver (Type={kind})"),
        ),
        BootFault::Mistyped { service, value } => (
            "boot-driver-damaged",
            format!(
                "{value} of the service {service} is of the wrong type: Windows drops the driver"
            ),
        ),
        BootFault::Deleted { service } => (
            "boot-driver-damaged",
            format!("the service {service} is marked for deletion (DeleteFlag)"),
        ),
        _ => return None,
    })
}

/// A fault in the file of a service.
struct FileFault {
    reason: String,
    repair: &'static str,
    check: &'static str,
}

fn of_the_file(fault: &BootFault, after: &Inspection) -> Option<FileFault> {
    let (reason, repair, check) = match fault {
        BootFault::PathForm { service, path, .. } => (
            format!(
                "{service}: {path} is not below the directory of Windows, as the boot loader of this Windows requires"
            ),
            "move the driver into System32\\drivers in the guest",
            "controller-service",
        ),
        BootFault::FileDeleted { service, path } => (
            format!("{service}: Windows deletes {path} at its next start"),
            "restart the guest once on its old host",
            "controller-image",
        ),
        BootFault::Import { service, missing } => (
            format!(
                "{service}: {}",
                missing.text(after.os.arch.unwrap_or(Arch::Amd64))
            ),
            SFC,
            "controller-image",
        ),
        BootFault::Image {
            service,
            path,
            state,
        } => (
            image_reason(service, path.as_ref(), *state),
            SFC,
            "controller-image",
        ),
        _ => return None,
    };
    Some(FileFault {
        reason,
        repair,
        check,
    })
}

fn image_reason(
    service: &str,
    path: Option<&crate::guest::GuestPath>,
    state: ImageState,
) -> String {
    let path = path.map_or("its file".to_string(), ToString::to_string);
    let what = match state {
        ImageState::Missing => "is missing",
        ImageState::Unreadable => "is not a usable driver file",
        ImageState::Present { .. } => "is for another processor",
    };
    format!("{service}: {path} {what}")
}

#[cfg(test)]
#[path = "remaining_tests.rs"]
mod tests;
