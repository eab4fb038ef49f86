//! Would Windows start with its system disk on this controller?
//!
//! [`evaluate`] walks what the boot loader and the Plug and Play manager walk: the id of the
//! controller -> the service bound to it -> its effective start -> its file; then the bus, disk and
//! volume drivers every boot needs, and the class filters that must not name a dead service. It
//! looks keys up directly and never walks the hive. It does not look at `Enum`: what Windows knows
//! of the machine it leaves says nothing about the one it comes to.
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
mod pe;
mod service;

pub use binding::{Binding, PciDevice, rivals};
#[cfg(test)]
pub(crate) use pe::fake_pe;
pub use pe::{ImageState, Machine, image_state, machine};
pub use service::{BOOT_START, Service};

use std::collections::BTreeMap;

use serde::Serialize;

use crate::guest::GuestPath;
use crate::registry::HiveView;
use crate::registry::hive::Result;
use crate::text::guest_text;
use binding::Lookup;

/// A disk controller QEMU can show the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Controller {
    Sata,
    Ide,
    VirtioBlk,
    VirtioScsi,
}

impl Controller {
    pub const ALL: [Controller; 4] = [
        Controller::Sata,
        Controller::Ide,
        Controller::VirtioBlk,
        Controller::VirtioScsi,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Controller::Sata => "sata",
            Controller::Ide => "ide",
            Controller::VirtioBlk => "virtio-blk",
            Controller::VirtioScsi => "virtio-scsi",
        }
    }

    /// The PCI functions it can appear as; for virtio the modern one, then the transitional one.
    pub fn devices(self) -> Vec<PciDevice> {
        let pci = |vendor, device, subsystem, revision, class| PciDevice {
            vendor,
            device,
            subsystem,
            revision,
            class,
        };
        match self {
            Controller::Sata => vec![pci(0x8086, 0x2922, 0x1100_1af4, 2, 0x01_0601)],
            Controller::Ide => vec![pci(0x8086, 0x7010, 0x1100_1af4, 0, 0x01_0180)],
            Controller::VirtioBlk => vec![
                pci(0x1af4, 0x1042, 0x1100_1af4, 1, 0x01_0000),
                pci(0x1af4, 0x1001, 0x0002_1af4, 0, 0x01_0000),
            ],
            Controller::VirtioScsi => vec![
                pci(0x1af4, 0x1048, 0x1100_1af4, 1, 0x01_0000),
                pci(0x1af4, 0x1004, 0x0008_1af4, 0, 0x01_0000),
            ],
        }
    }
}

impl Controller {
    /// The ids of the function that decides: virtio as q35 shows it, or on NT 5 as i440fx does.
    pub fn decisive_ids(self, nt_major: u32) -> Vec<String> {
        let mut devices = self.devices();
        if nt_major < 6 {
            devices.reverse();
        }
        devices.first().map(PciDevice::ids).unwrap_or_default()
    }
}

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
    NotBound { ids: Vec<String> },
    /// No service key, or one without `Start` and `Type`.
    NotInstalled { service: String },
    /// `Start` is not 0, or `StartOverride` holds something else than 0.
    NotBootStart {
        service: String,
        start: u32,
        start_override: Option<u32>,
    },
    /// `Type` is not that of a driver.
    NotADriver { service: String, kind: u32 },
    /// The file is missing, unusable, or for another processor.
    Image {
        service: String,
        path: Option<GuestPath>,
        state: ImageState,
    },
    /// A class filter list names a service that is not there or never starts.
    DeadFilter {
        class: &'static str,
        /// `UpperFilters` or `LowerFilters`.
        list: &'static str,
        service: String,
    },
    /// The hive could not be read where it was needed.
    Damaged(String),
}

/// What the verdict is made from.
pub struct BootContext<'a> {
    pub system: &'a HiveView<'a>,
    /// The control set that boots: `ControlSet001`.
    pub control_set: &'a str,
    pub windows_root: &'a GuestPath,
    /// NT version: (6, 1) is Windows 7, (10, 0) is Windows 10 and 11.
    pub nt: (u32, u32),
    pub arch: Machine,
    /// Looks at a file of the system volume. Asked several times for the same file.
    pub image: &'a dyn Fn(&GuestPath) -> ImageState,
}

impl BootContext<'_> {
    /// A service of the control set that boots.
    pub fn service(&self, name: &str) -> Result<Option<Service>> {
        Service::read(self.system, self.control_set, self.windows_root, name)
    }
}

/// The verdict on every controller.
pub fn evaluate_all(ctx: &BootContext<'_>) -> BTreeMap<Controller, BootPath> {
    Controller::ALL
        .into_iter()
        .map(|controller| (controller, evaluate(ctx, controller)))
        .collect()
}

pub fn evaluate(ctx: &BootContext<'_>, controller: Controller) -> BootPath {
    let mut walk = Walk {
        ctx,
        service: None,
        steps: Vec::new(),
        faults: Vec::new(),
        reason: None,
    };
    if let Err(error) = walk.run(controller) {
        let text = format!("the SYSTEM hive cannot be read: {error}");
        walk.fail(Fault::Damaged(error.to_string()), text);
    }
    let ready = walk.reason.is_none();
    BootPath {
        ready,
        reason: walk.reason.unwrap_or_else(|| {
            let first = walk.steps.first().map(|s| s.text.clone());
            first.unwrap_or_default()
        }),
        service: walk.service,
        steps: walk.steps,
        faults: walk.faults,
    }
}

const SCSI_ADAPTER: &str = "{4d36e97b-e325-11ce-bfc1-08002be10318}";
const HDC: &str = "{4d36e96a-e325-11ce-bfc1-08002be10318}";
const DISK_DRIVE: &str = "{4d36e967-e325-11ce-bfc1-08002be10318}";
const VOLUME: &str = "{71a27cdd-812a-11d0-bec7-08002be2092f}";

const CLASSES: [(&str, &str); 4] = [
    (SCSI_ADAPTER, "SCSIAdapter"),
    (HDC, "hdc"),
    (DISK_DRIVE, "DiskDrive"),
    (VOLUME, "Volume"),
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

/// What an IDE controller's channels are called, most specific first.
const IDE_CHANNELS: [&str; 4] = [
    "Intel-PIIX3",
    "Primary_IDE_Channel",
    "Internal_IDE_Channel",
    "*PNP0600",
];

/// Real lists hold a handful.
const MAX_FILTERS: usize = 64;

struct Walk<'w, 'a> {
    ctx: &'w BootContext<'a>,
    service: Option<String>,
    steps: Vec<Step>,
    faults: Vec<Fault>,
    reason: Option<String>,
}

impl Walk<'_, '_> {
    fn run(&mut self, controller: Controller) -> Result<()> {
        self.controller(controller)?;
        if controller == Controller::Ide {
            self.driver("atapi")?;
            if self.ctx.nt.0 < 6 {
                self.ide_channels()?;
            }
        }
        for (name, always) in system_drivers(self.ctx.nt.0) {
            if *always || self.ctx.service(name)?.is_some() {
                self.driver(name)?;
            }
        }
        self.filters()
    }

    fn pass(&mut self, text: String) {
        self.steps.push(Step::new(true, &text));
    }

    /// Worth mending, but does not decide.
    fn advise(&mut self, fault: Fault, text: String) {
        self.steps.push(Step::new(false, &text));
        self.faults.push(fault);
    }

    fn fail(&mut self, fault: Fault, text: String) {
        self.reason
            .get_or_insert_with(|| guest_text(&text).unwrap_or_default());
        self.advise(fault, text);
    }

    fn uses_driver_database(&self) -> bool {
        self.ctx.nt >= (6, 2)
    }

    fn lookup(&self, device: &PciDevice) -> Result<Lookup> {
        if self.uses_driver_database() {
            binding::driver_database(self.ctx.system, device)
        } else {
            binding::critical_device(self.ctx.system, self.ctx.control_set, device)
        }
    }

    /// The device the disk hangs on, and the driver bound to it.
    fn controller(&mut self, controller: Controller) -> Result<()> {
        let mut devices = controller.devices();
        if self.ctx.nt.0 < 6 {
            devices.reverse();
        }
        for (i, device) in devices.iter().enumerate() {
            let decides = i == 0;
            match self.lookup(device)? {
                Lookup::Bound(found) => {
                    self.pass(bound_text(device, &found));
                    if decides {
                        self.driver(&found.service)?;
                        self.service = Some(found.service);
                    }
                }
                Lookup::Unbound { staged } => {
                    let mut text = format!(
                        "no driver is bound to PCI\\VEN_{:04X}&DEV_{:04X} in the {}",
                        device.vendor,
                        device.device,
                        if self.uses_driver_database() {
                            "DriverDatabase"
                        } else {
                            "CriticalDeviceDatabase"
                        }
                    );
                    if !staged.is_empty() {
                        text += &format!(" ({} staged only)", staged.join(", "));
                    }
                    let fault = Fault::NotBound { ids: device.ids() };
                    if decides {
                        self.fail(fault, text);
                    } else {
                        self.advise(fault, text);
                    }
                }
            }
        }
        Ok(())
    }

    /// A service that must be loaded by the boot loader.
    fn driver(&mut self, name: &str) -> Result<()> {
        let service = name.to_string();
        let state = match self.ctx.service(name)? {
            Some(state) if state.is_installed() => state,
            found => {
                let text = match found {
                    Some(_) => format!("the service key {name} is there but holds no driver"),
                    None => format!("the driver {name} is not installed"),
                };
                self.fail(Fault::NotInstalled { service }, text);
                return Ok(());
            }
        };
        let start = state.start.unwrap_or(service::DISABLED);
        let kind = state.kind.unwrap_or_default();
        if state.effective_start() != Some(service::BOOT_START) {
            let start_override = state.start_override();
            let text = match start_override {
                Some(v) if start == service::BOOT_START => {
                    format!("{name} does not start at boot (Start=0, but StartOverride={v})")
                }
                _ => format!("{name} does not start at boot (Start={start})"),
            };
            self.fail(
                Fault::NotBootStart {
                    service,
                    start,
                    start_override,
                },
                text,
            );
            return self.image(&state);
        }
        if !matches!(kind, 1 | 2) {
            let text = format!("{name} is not a kernel driver (Type={kind})");
            self.fail(Fault::NotADriver { service, kind }, text);
            return Ok(());
        }
        self.image(&state)
    }

    fn image(&mut self, state: &Service) -> Result<()> {
        let name = &state.name;
        let Ok(path) = &state.image else {
            let fault = Fault::Image {
                service: name.clone(),
                path: None,
                state: ImageState::Unreadable,
            };
            self.fail(fault, format!("the ImagePath of {name} is not a path"));
            return Ok(());
        };
        let image = (self.ctx.image)(path);
        let wrong = match image {
            ImageState::Missing => format!("{name}: {path} is missing"),
            ImageState::Unreadable => format!("{name}: {path} is not a usable driver file"),
            ImageState::Present { machine: Some(m) } if m != self.ctx.arch => format!(
                "{name}: {path} is for {}, Windows is {}",
                m.name(),
                self.ctx.arch.name()
            ),
            ImageState::Present { .. } => {
                if state.effective_start() == Some(service::BOOT_START) {
                    self.pass(format!("{name} starts at boot from {path}"));
                }
                return Ok(());
            }
        };
        let fault = Fault::Image {
            service: name.clone(),
            path: Some(path.clone()),
            state: image,
        };
        self.fail(fault, wrong);
        Ok(())
    }

    /// Installations on a SCSI disk leave these out (Microsoft KB 314082). Advice, because the
    /// channels of a machine that once had an IDE disk are known to Windows without them.
    fn ide_channels(&mut self) -> Result<()> {
        let names = IDE_CHANNELS.map(|n| (n.to_string(), n.to_string()));
        match binding::critical_service(self.ctx.system, self.ctx.control_set, names)? {
            Lookup::Bound(found) => {
                self.pass(format!("{} is driven by {}", found.id, found.service));
            }
            Lookup::Unbound { .. } => self.advise(
                Fault::NotBound {
                    ids: IDE_CHANNELS.map(str::to_string).to_vec(),
                },
                "no driver is bound to the IDE channels in the CriticalDeviceDatabase".into(),
            ),
        }
        Ok(())
    }

    fn filters(&mut self) -> Result<()> {
        for (guid, class) in CLASSES {
            let path = format!("{}\\Control\\Class\\{guid}", self.ctx.control_set);
            let Some(key) = self.ctx.system.key(&path)? else {
                continue;
            };
            for list in ["UpperFilters", "LowerFilters"] {
                let names = key.multi(list)?.unwrap_or_default();
                for name in names.into_iter().take(MAX_FILTERS) {
                    self.filter(class, list, name)?;
                }
            }
        }
        Ok(())
    }

    fn filter(&mut self, class: &'static str, list: &'static str, name: String) -> Result<()> {
        let dead = match self.ctx.service(&name)? {
            Some(state) if !state.is_installed() => "is not installed",
            Some(state) if state.is_disabled() => "is disabled",
            None => "is not installed",
            Some(_) => {
                self.pass(format!("{list} of {class}: {name}"));
                return Ok(());
            }
        };
        let text = format!("{list} of {class} names {name}, which {dead}: stop 0x7B");
        self.fail(
            Fault::DeadFilter {
                class,
                list,
                service: name,
            },
            text,
        );
        Ok(())
    }
}

fn bound_text(device: &PciDevice, found: &Binding) -> String {
    format!(
        "PCI\\VEN_{:04X}&DEV_{:04X} is driven by {} ({} in {})",
        device.vendor, device.device, found.service, found.id, found.origin
    )
}

#[cfg(test)]
pub(crate) mod tests;
