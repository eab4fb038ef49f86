//! Would Windows start with its system disk on this controller?
//!
//! [`evaluate`] walks what the boot loader and the Plug and Play manager walk: the id of the
//! controller -> the service bound to it -> its effective start -> its file; then the bus, disk and
//! volume drivers every boot needs, and the class filters that must not name a dead service. It
//! looks keys up directly and never walks the hive. Of `Enum` it looks at the virtio and bootstrap devices
//! only: what else Windows knows of the VM it leaves says nothing about the one it comes to.
//!
//! A driver is loaded with the files it imports from, those with theirs, and so on; the kernel and the
//! driver of the boot file system are loaded in the same way ([`loader`]). Where a loader looks for an
//! imported file was seen with a loader of the NT 5 family: beside the file that imports it, and nowhere
//! else. Later ones also find it in `System32\drivers` and `System32`.
//!
//! Which bus and volume drivers are looked for was read off real hives (Windows 7 x86, Windows 10
//! x64): `pci acpi partmgr volmgr volmgrx mountmgr disk volsnap` are boot-start in both, `volume`
//! only in 10. A driver of the list whose service key is not there at all is a fault only from
//! NT 6.0 on and not for `volume`, which older builds of NT 6 do not have; on NT 5, which has `ftdisk`
//! for `volmgr` and may lack `acpi` and `volsnap`, an absent key is left alone.
//!
//! virtio devices are judged as q35 shows them: modern only. The transitional id is a step of its
//! own that does not decide, except on NT 5, whose machine is i440fx and whose drivers know no other.

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

/// The verdict on one controller, with the first thing that is missing as the reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BootPath {
    pub ready: bool,
    /// The driver service the chain ends in, when one was found.
    pub service: Option<String>,
    pub reason: String,
    /// Every step that was looked at, in order, for people. A step that is not `ok` on a controller
    /// that is ready is advice.
    pub steps: Vec<Step>,
    /// What is wrong, for plan: the steps that are not `ok`, typed.
    #[serde(skip)]
    pub faults: Vec<Fault>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    pub ok: bool,
    pub text: String,
}

impl Step {
    /// Names of services, INFs and files come from the guest.
    fn new(ok: bool, text: &str) -> Self {
        Self {
            ok,
            text: guest_text(text).unwrap_or_default(),
        }
    }
}

/// Something that keeps Windows from booting, or may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// No driver is bound to a device with these ids (most specific first).
    NotBound {
        ids: Vec<String>,
        /// Not so for the form of the device that the new VM does not have.
        decides: bool,
        /// A driver of this Windows that fits and whose file is there.
        spare: Option<&'static str>,
    },
    /// No service key, or one without `Start` and `Type`.
    NotInstalled {
        service: String,
        /// Whether a file of that name is among the drivers.
        file: bool,
    },
    /// `Start` is not 0, or `StartOverride` holds something else than 0.
    NotBootStart {
        service: String,
        start: u32,
        start_override: Option<u32>,
    },
    /// `Type` is not that of a driver.
    NotADriver { service: String, kind: u32 },
    /// A value of the service key has a type Windows does not take.
    Mistyped {
        service: String,
        value: &'static str,
    },
    /// The service carries `DeleteFlag`.
    Deleted { service: String },
    /// `ImagePath` is of a form that the boot loader of this Windows does not take.
    PathForm {
        service: String,
        /// The file it names.
        path: GuestPath,
        /// Not so where the loader may know the form.
        decides: bool,
    },
    /// The file is missing, unusable, or for another processor.
    Image {
        service: String,
        path: Option<GuestPath>,
        state: ImageState,
    },
    /// A file that the driver's file imports from, directly or not, is missing or of no use.
    Import { service: String, missing: Missing },
    /// Windows deletes the driver's file at its next start (`PendingFileRenameOperations`).
    FileDeleted { service: String, path: GuestPath },
    /// A class filter list names a service that is not there or never starts.
    DeadFilter {
        class: &'static str,
        /// `UpperFilters` or `LowerFilters`.
        list: &'static str,
        service: String,
        /// Not so in a class that no device on the way to the disk is in.
        decides: bool,
    },
    /// `StartOverride` on a Windows that does not look at it.
    IdleOverride { service: String, value: u32 },
    /// A device of this kind was here before and is set up with another driver, or none.
    Instance {
        /// Below `Enum`.
        path: String,
        service: Option<String>,
    },
    /// The device was here before and is switched off.
    DeviceDisabled {
        /// Below `Enum`.
        path: String,
        flags: u32,
    },
    /// The hive could not be read where it was needed.
    Damaged(String),
}

/// What the verdict is made from.
pub struct BootContext<'a> {
    pub system: &'a HiveView<'a>,
    /// The control set that boots: `ControlSet001`.
    pub control_set: &'a ControlSet,
    pub windows_root: &'a GuestPath,
    /// NT version: (6, 1) is Windows 7, (10, 0) is Windows 10 and 11.
    pub nt: (u32, u32),
    pub arch: Arch,
    /// Looks at a file of the system volume. Asked several times for the same file.
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
        walk.fail(Fault::Damaged(error.to_string()), text);
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

/// The key below `Control\\Class` of a class that [`Fault::DeadFilter`] names.
pub fn class_guid(class: &str) -> Option<&'static str> {
    CLASSES
        .iter()
        .find(|(_, name)| *name == class)
        .map(|(guid, _)| *guid)
}

/// (service, known to be in every Windows since NT 6.0)
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

/// The bus, disk and volume drivers every boot needs, and whether each is in every Windows with that
/// major version.
pub fn system_drivers(nt_major: u32) -> &'static [(&'static str, bool)] {
    if nt_major < 6 {
        &SYSTEM_DRIVERS_NT5
    } else {
        &SYSTEM_DRIVERS_NT6
    }
}

#[cfg(test)]
mod loader_tests;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod walk_tests;
