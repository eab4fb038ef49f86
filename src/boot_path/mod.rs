//! Determines whether Windows would start with its system disk on a controller.
//!
//! [`evaluate`] follows the boot loader and the Plug and Play manager. From the id of the
//! controller it finds the service bound to it, its effective start and its file. Then come the
//! bus, disk and volume drivers of every boot, and the class filters, which must not name a dead
//! service. It looks keys up directly and never walks the hive. Of `Enum` it reads the virtio and
//! bootstrap devices only. Other records of the old VM do not apply to the new one.
//!
//! A driver is loaded with its imports, those with theirs, and so on. The kernel and the driver of
//! the boot file system are loaded in the same way ([`loader`]). A loader of the NT 5 family was
//! observed to find an imported file only beside the file that imports it. Later loaders also
//! search `System32\drivers` and `System32`.
//!
//! The list of bus and volume drivers was determined from real hives (Windows 7 x86, Windows 10
//! x64): `pci acpi partmgr volmgr volmgrx mountmgr disk volsnap` are boot-start in both, `volume`
//! only in 10. From NT 6.0 on, a missing service key of the list is a fault. The exception is
//! `volume`, which older builds of NT 6 lack. NT 5 has `ftdisk` for `volmgr` and may lack `acpi`
//! and `volsnap`, so an absent key is ignored there.
//!
//! virtio devices are evaluated in their form on q35: modern only. The transitional id is a
//! separate step that does not decide. NT 5 is the exception: its VM is i440fx, and its drivers
//! support no other id.

mod binding;
mod loader;
mod pe;
pub mod pending;
mod service;
mod walk;

pub use crate::types::DiskBus;
pub use binding::rivals;
pub use loader::Missing;
pub use pe::{Image, ImageState, image};
pub use service::{BOOT_START, Service};
pub use walk::{DEVICE_OFF, IDE_CHANNELS, KERNEL, NTFS};

use std::collections::BTreeMap;

use serde::Serialize;

use crate::guest::GuestPath;
use crate::registry::HiveView;
use crate::registry::error::Result;
use crate::text::guest_text;
use crate::types::{Arch, ControlSet};
use walk::Walk;

/// The verdict on one controller; the reason is the first fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BootPath {
    pub ready: bool,
    /// The driver service at the end of the chain, if one was found.
    pub service: Option<String>,
    pub reason: String,
    /// Every step, in order, for people. A step that is not `ok` on a ready controller is advice.
    pub steps: Vec<Step>,
    /// The typed faults for `plan`: the steps that are not `ok`.
    #[serde(skip)]
    pub faults: Vec<BootFault>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    pub ok: bool,
    pub text: String,
}

impl Step {
    /// Creates a step. Names of services, INFs and files are from the guest.
    fn new(ok: bool, text: &str) -> Self {
        Self {
            ok,
            text: guest_text(text).unwrap_or_default(),
        }
    }
}

/// A fault that keeps Windows from booting, or may do so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootFault {
    /// No driver is bound to a device with these ids (most specific first).
    NotBound {
        ids: Vec<String>,
        /// False for a form of the device that the new VM does not have.
        decides: bool,
        /// A matching driver of this Windows whose file exists.
        spare: Option<&'static str>,
    },
    /// No service key, or one without `Start` and `Type`.
    NotInstalled {
        service: String,
        /// Whether the drivers include a file of that name.
        file: bool,
    },
    /// `Start` is not 0, or `StartOverride` has a value other than 0.
    NotBootStart {
        service: String,
        start: u32,
        start_override: Option<u32>,
    },
    /// `Type` is not that of a driver.
    NotADriver { service: String, kind: u32 },
    /// A value of the service key has a type that Windows does not accept.
    Mistyped {
        service: String,
        value: &'static str,
    },
    /// The service has a `DeleteFlag`.
    Deleted { service: String },
    /// The boot loader of this Windows does not accept the form of `ImagePath`.
    PathForm {
        service: String,
        /// The file it names.
        path: GuestPath,
        /// False if the loader may accept the form.
        decides: bool,
    },
    /// The file is missing, unusable, or for another processor.
    Image {
        service: String,
        path: Option<GuestPath>,
        state: ImageState,
    },
    /// A file that the driver's file imports, directly or not, is missing or unusable.
    Import { service: String, missing: Missing },
    /// Windows deletes the driver's file at its next start (`PendingFileRenameOperations`).
    FileDeleted { service: String, path: GuestPath },
    /// A class filter list names a service that does not exist or never starts.
    DeadFilter {
        class: &'static str,
        /// `UpperFilters` or `LowerFilters`.
        list: &'static str,
        service: String,
        /// False for a class without a device between Windows and the disk.
        decides: bool,
    },
    /// `StartOverride` on a Windows that ignores it.
    IdleOverride { service: String, value: u32 },
    /// An earlier device of this kind was configured with another driver, or none.
    Instance {
        /// The path below `Enum`.
        path: String,
        service: Option<String>,
    },
    /// An earlier device of this kind is disabled.
    DeviceDisabled {
        /// The path below `Enum`.
        path: String,
        flags: u32,
    },
    /// A needed part of the hive is unreadable.
    Damaged(String),
}

/// The inputs of a verdict.
pub struct BootContext<'a> {
    pub system: &'a HiveView<'a>,
    /// The control set that boots: `ControlSet001`.
    pub control_set: &'a ControlSet,
    pub windows_root: &'a GuestPath,
    /// NT version: (6, 1) is Windows 7, (10, 0) is Windows 10 and 11.
    pub nt: (u32, u32),
    pub arch: Arch,
    /// Examines a file of the system volume. Called several times for the same file.
    pub image: &'a dyn Fn(&GuestPath) -> Image,
}

impl BootContext<'_> {
    /// A service of the control set that boots.
    pub fn service(&self, name: &str) -> Result<Option<Service>> {
        Service::read(
            self.system,
            self.control_set,
            self.windows_root,
            self.nt,
            name,
        )
    }
}

/// The verdict on every controller.
pub fn evaluate_all(ctx: &BootContext<'_>) -> BTreeMap<DiskBus, BootPath> {
    DiskBus::ALL
        .into_iter()
        .map(|controller| (controller, evaluate(ctx, controller)))
        .collect()
}

pub fn evaluate(ctx: &BootContext<'_>, controller: DiskBus) -> BootPath {
    let mut walk = Walk::new(ctx);
    if let Err(error) = walk.run(controller) {
        let text = format!("the SYSTEM hive cannot be read: {error}");
        walk.fail(BootFault::Damaged(error.to_string()), text);
    }
    walk.finish()
}

const SCSI_ADAPTER: &str = "{4d36e97b-e325-11ce-bfc1-08002be10318}";
const HDC: &str = "{4d36e96a-e325-11ce-bfc1-08002be10318}";
const DISK_DRIVE: &str = "{4d36e967-e325-11ce-bfc1-08002be10318}";
const VOLUME: &str = "{71a27cdd-812a-11d0-bec7-08002be2092f}";

const SYSTEM: &str = "{4d36e97d-e325-11ce-bfc1-08002be10318}";

const CLASSES: [(&str, &str); 5] = [
    (SCSI_ADAPTER, "SCSIAdapter"),
    (HDC, "hdc"),
    (DISK_DRIVE, "DiskDrive"),
    (VOLUME, "Volume"),
    // The PCI bus and its bridges.
    (SYSTEM, "System"),
];

/// The key below `Control\\Class` of a class that [`BootFault::DeadFilter`] names.
pub fn class_guid(class: &str) -> Option<&'static str> {
    CLASSES
        .iter()
        .find(|(_, name)| *name == class)
        .map(|(guid, _)| *guid)
}

/// Each service, and whether every Windows since NT 6.0 has it.
const SYSTEM_DRIVERS_NT6: [(&str, bool); 9] = [
    ("pci", true),
    ("acpi", true),
    ("partmgr", true),
    ("volmgr", true),
    ("volmgrx", true),
    ("mountmgr", true),
    ("disk", true),
    ("volsnap", true),
    ("volume", false),
];

const SYSTEM_DRIVERS_NT5: [(&str, bool); 7] = [
    ("pci", false),
    ("acpi", false),
    ("partmgr", false),
    ("ftdisk", false),
    ("mountmgr", false),
    ("disk", false),
    ("volsnap", false),
];

/// The bus, disk and volume drivers of every boot, and whether every Windows with that major
/// version has them.
pub fn system_drivers(nt_major: u32) -> &'static [(&'static str, bool)] {
    if nt_major < 6 {
        &SYSTEM_DRIVERS_NT5
    } else {
        &SYSTEM_DRIVERS_NT6
    }
}

#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod loader_tests;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod walk_tests;
