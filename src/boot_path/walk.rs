//! The steps of [`evaluate`](super::evaluate). Each one adds a text for people and, for a problem,
//! a typed fault.

use std::collections::BTreeSet;

use super::binding::{self, Binding, Lookup};
use super::pending::Pending;
use super::service::{self, PathForm, Service};
use super::{
    BootContext, BootFault, BootPath, CLASSES, DISK_DRIVE, DiskBus, HDC, ImageState, SCSI_ADAPTER,
    SYSTEM, Step, VOLUME, loader, system_drivers,
};
use crate::guest::GuestPath;
use crate::registry::error::Result;
use crate::registry::hive::Key;
use crate::text::guest_text;
use crate::types::{Arch, PciId};

/// The ids of an IDE controller's channels, most specific first.
pub const IDE_CHANNELS: [&str; 4] = [
    "Intel-PIIX3",
    "Primary_IDE_Channel",
    "Internal_IDE_Channel",
    "*PNP0600",
];

/// The most filters in a list; real lists have a handful.
const MAX_FILTERS: usize = 64;

pub(super) struct Walk<'w, 'a> {
    ctx: &'w BootContext<'a>,
    service: Option<String>,
    steps: Vec<Step>,
    faults: Vec<BootFault>,
    reason: Option<String>,
    /// The class of the controller.
    class: String,
    /// Files already examined as imports.
    files: BTreeSet<String>,
    /// Drivers already examined.
    drivers: BTreeSet<String>,
    pending: Pending,
}

/// The driver of the boot file system.
pub const NTFS: &str = "Ntfs";
/// The name of the kernel in faults.
pub const KERNEL: &str = "the kernel";

impl<'w, 'a> Walk<'w, 'a> {
    pub fn new(ctx: &'w BootContext<'a>) -> Self {
        Self {
            ctx,
            service: None,
            steps: Vec::new(),
            faults: Vec::new(),
            reason: None,
            class: String::new(),
            files: BTreeSet::new(),
            drivers: BTreeSet::new(),
            pending: Pending::default(),
        }
    }

    pub fn finish(self) -> BootPath {
        BootPath {
            ready: self.reason.is_none(),
            reason: self.reason.unwrap_or_else(|| {
                let first = self.steps.first().map(|s| s.text.clone());
                first.unwrap_or_default()
            }),
            service: self.service,
            steps: self.steps,
            faults: self.faults,
        }
    }
}

impl Walk<'_, '_> {
    pub fn run(&mut self, controller: DiskBus) -> Result<()> {
        self.class = match controller {
            DiskBus::Sata | DiskBus::Ide => HDC,
            DiskBus::VirtioBlk | DiskBus::VirtioScsi => SCSI_ADAPTER,
        }
        .to_string();
        self.pending = Pending::read(self.ctx.system, self.ctx.control_set)?;
        self.kernel();
        self.controller(controller)?;
        if controller == DiskBus::Ide {
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
        self.boot_file_system()?;
        self.filters()?;
        self.instances(controller)
    }

    fn pass(&mut self, text: String) {
        self.steps.push(Step::new(true, &text));
    }

    /// Adds advice: a fault worth a repair that does not decide.
    fn advise(&mut self, fault: BootFault, text: String) {
        self.steps.push(Step::new(false, &text));
        self.faults.push(fault);
    }

    pub fn fail(&mut self, fault: BootFault, text: String) {
        self.reason
            .get_or_insert_with(|| guest_text(&text).unwrap_or_default());
        self.advise(fault, text);
    }

    /// Fails if `decides`, otherwise adds advice.
    fn find(&mut self, decides: bool, fault: BootFault, text: String) {
        if decides {
            self.fail(fault, text);
        } else {
            self.advise(fault, text);
        }
    }

    fn uses_driver_database(&self) -> bool {
        self.ctx.nt >= (6, 2)
    }

    fn lookup(&self, device: &PciId) -> Result<Lookup> {
        if self.uses_driver_database() {
            binding::driver_database(self.ctx.system, device)
        } else {
            binding::critical_device(self.ctx.system, self.ctx.control_set, device)
        }
    }

    /// Evaluates the device to which the disk is attached, and the driver bound to it.
    fn controller(&mut self, controller: DiskBus) -> Result<()> {
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
                        if let Some(class) = &found.class {
                            self.class.clone_from(class);
                        }
                        self.driver(&found.service)?;
                        self.service = Some(found.service);
                    }
                }
                Lookup::Unbound {
                    staged,
                    without_class,
                } => {
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
                    if !without_class.is_empty() {
                        text += &format!(" ({} without ClassGUID)", without_class.join(", "));
                    }
                    let spare = self.spare(controller);
                    let ids = device.ids();
                    let fault = BootFault::NotBound {
                        ids,
                        decides,
                        spare,
                    };
                    self.find(decides, fault, text);
                    if let Some(spare) = spare.filter(|_| decides) {
                        self.driver(spare)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The driver of this Windows that could be bound to the controller, if its file exists.
    /// Versions with a DriverDatabase have them all bound.
    fn spare(&self, controller: DiskBus) -> Option<&'static str> {
        let names: &[&str] = match controller {
            _ if self.uses_driver_database() => &[],
            DiskBus::Ide => &["intelide", "pciide"],
            DiskBus::Sata if self.ctx.nt.0 == 6 => &["msahci"],
            _ => &[],
        };
        names.iter().copied().find(|name| self.has_file(name))
    }

    /// Whether the default file of one of Windows' drivers exists and is usable.
    fn has_file(&self, service: &str) -> bool {
        let path = format!("System32\\drivers\\{service}.sys");
        let image = self.ctx.windows_root.join(&path);
        image.is_ok_and(|path| match (self.ctx.image)(&path).state {
            ImageState::Present { machine } => {
                machine.is_none_or(|m| m == self.ctx.arch.pe_machine())
            }
            ImageState::Missing | ImageState::Unreadable => false,
        })
    }

    /// Evaluates a service that the boot loader must load.
    fn driver(&mut self, name: &str) -> Result<()> {
        if !self.drivers.insert(name.to_lowercase()) {
            return Ok(());
        }
        let service = name.to_string();
        let found = self.ctx.service(name)?;
        if let Some(state) = &found {
            self.marks(state);
        }
        let state = match found {
            Some(state) if state.is_installed() => state,
            // A value of the wrong type is already reported.
            Some(state) if !state.mistyped.is_empty() => return Ok(()),
            found => {
                let text = match found {
                    Some(_) => format!("the service key {name} exists but has no driver"),
                    None => format!("the driver {name} is not installed"),
                };
                let file = self.has_file(name);
                self.fail(BootFault::NotInstalled { service, file }, text);
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
                BootFault::NotBootStart {
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
            self.fail(BootFault::NotADriver { service, kind }, text);
            return Ok(());
        }
        self.image(&state)
    }

    /// Evaluates the marks that make Windows drop an installed service.
    fn marks(&mut self, state: &Service) {
        let name = &state.name;
        let service = || name.clone();
        for value in &state.mistyped {
            let text = format!(
                "the value {value} of the service {name} is of the wrong type: Windows drops the driver"
            );
            self.fail(
                BootFault::Mistyped {
                    service: service(),
                    value,
                },
                text,
            );
        }
        if state.deleted {
            let text = format!(
                "the service {name} is marked for deletion (DeleteFlag): Windows removes it at its next start"
            );
            self.fail(BootFault::Deleted { service: service() }, text);
        }
        if let Some(value) = state.idle_override() {
            let text = format!("{name} has StartOverride={value}, which this Windows ignores");
            self.advise(
                BootFault::IdleOverride {
                    service: service(),
                    value,
                },
                text,
            );
        }
    }

    fn image(&mut self, state: &Service) -> Result<()> {
        let name = &state.name;
        let Ok(path) = &state.image else {
            let fault = BootFault::Image {
                service: name.clone(),
                path: None,
                state: ImageState::Unreadable,
            };
            self.fail(fault, format!("the ImagePath of {name} is not a path"));
            return Ok(());
        };
        if let Some(decides) = self.odd_path(state) {
            let text = format!(
                "the ImagePath of {name} ({}) is not relative to the directory of Windows, as a boot loader requires",
                state.image_path.as_deref().unwrap_or_default()
            );
            let fault = BootFault::PathForm {
                service: name.clone(),
                path: path.clone(),
                decides,
            };
            self.find(decides, fault, text);
        }
        self.file(name, path, state.effective_start());
        Ok(())
    }

    /// Whether the loader may reject the form of an ImagePath, and if so whether it certainly does.
    fn odd_path(&self, state: &Service) -> Option<bool> {
        match state.path_form() {
            PathForm::Relative => None,
            PathForm::SystemRoot if self.ctx.nt.0 >= 6 => None,
            PathForm::SystemRoot | PathForm::Other => Some(self.ctx.nt.0 < 6),
        }
    }

    /// Evaluates a file that the boot loader loads, with all its imports.
    fn file(&mut self, name: &str, path: &GuestPath, start: Option<u32>) {
        let image = (self.ctx.image)(path).state;
        let wrong = match image {
            ImageState::Missing => format!("{name}: {path} is missing"),
            ImageState::Unreadable => format!("{name}: {path} is not a usable driver file"),
            ImageState::Present { machine: Some(m) } if m != self.ctx.arch.pe_machine() => format!(
                "{name}: {path} is for {}, Windows is {}",
                super::pe::processor(m),
                self.ctx.arch.name()
            ),
            ImageState::Present { .. } => {
                if start == Some(service::BOOT_START) {
                    self.pass(format!("{name} starts at boot from {path}"));
                }
                for missing in loader::missing_imports(self.ctx, path, &mut self.files) {
                    let text = format!("{name}: {}", missing.text(self.ctx.arch));
                    let service = name.to_string();
                    self.fail(BootFault::Import { service, missing }, text);
                }
                if self.pending.removes(path) {
                    let text = format!(
                        "{name}: Windows deletes {path} at its next start (PendingFileRenameOperations)"
                    );
                    let fault = BootFault::FileDeleted {
                        service: name.to_string(),
                        path: path.clone(),
                    };
                    self.fail(fault, text);
                }
                return;
            }
        };
        let fault = BootFault::Image {
            service: name.to_string(),
            path: Some(path.clone()),
            state: image,
        };
        self.fail(fault, wrong);
    }

    /// Evaluates the kernel, which is loaded first. x86 has one for each kind of memory map.
    fn kernel(&mut self) {
        let names: &[&str] = match self.ctx.arch {
            Arch::X86 => &["ntoskrnl.exe", "ntkrnlpa.exe"],
            _ => &["ntoskrnl.exe"],
        };
        let path = |name: &str| {
            self.ctx
                .windows_root
                .join(&format!("System32\\{name}"))
                .ok()
        };
        let there = names
            .iter()
            .filter_map(|name| path(name))
            .find(|path| (self.ctx.image)(path).state != ImageState::Missing);
        let Some(path) = there.or_else(|| path("ntoskrnl.exe")) else {
            return;
        };
        // Every driver and the files beside it import from it, by this name.
        self.files.insert("ntoskrnl.exe".into());
        self.file(KERNEL, &path, None);
    }

    /// Evaluates the driver of the file system that Windows is on. The loader loads it whatever its
    /// `Start` is.
    fn boot_file_system(&mut self) -> Result<()> {
        let found = self.ctx.service(NTFS)?;
        let image = found.and_then(|state| state.image.ok());
        let default = || {
            self.ctx
                .windows_root
                .join("System32\\drivers\\ntfs.sys")
                .ok()
        };
        if let Some(path) = image.or_else(default) {
            self.file(NTFS, &path, None);
        }
        Ok(())
    }

    /// Evaluates the IDE channels. Installations on a SCSI disk lack them (Microsoft KB 314082).
    fn ide_channels(&mut self) -> Result<()> {
        let names = IDE_CHANNELS.map(|n| (n.to_string(), n.to_string()));
        match binding::critical_service(self.ctx.system, self.ctx.control_set, names)? {
            Lookup::Bound(found) => {
                self.pass(format!("{} is driven by {}", found.id, found.service));
            }
            Lookup::Unbound { .. } => self.fail(
                BootFault::NotBound {
                    ids: IDE_CHANNELS.map(str::to_string).to_vec(),
                    decides: true,
                    spare: Some("atapi").filter(|name| self.has_file(name)),
                },
                "no driver is bound to the IDE channels in the CriticalDeviceDatabase".into(),
            ),
        }
        Ok(())
    }

    fn filters(&mut self) -> Result<()> {
        for (guid, class) in CLASSES {
            let path = self.ctx.control_set.key("Control\\Class").join(guid);
            let Some(key) = self.ctx.system.key(&path)? else {
                continue;
            };
            let decides = [&self.class, DISK_DRIVE, VOLUME, SYSTEM]
                .iter()
                .any(|on_the_way| on_the_way.eq_ignore_ascii_case(guid));
            for list in ["UpperFilters", "LowerFilters"] {
                let names = key.multi(list)?.unwrap_or_default();
                for name in names.into_iter().take(MAX_FILTERS) {
                    self.filter(class, list, name, decides)?;
                }
            }
        }
        Ok(())
    }

    fn filter(
        &mut self,
        class: &'static str,
        list: &'static str,
        name: String,
        decides: bool,
    ) -> Result<()> {
        let dead = match self.ctx.service(&name)? {
            Some(state) if !state.is_installed() => "is not installed",
            Some(state) if state.is_disabled() => "is disabled",
            Some(state) if state.deleted => "is marked for deletion",
            None => "is not installed",
            Some(_) => {
                self.pass(format!("{list} of {class}: {name}"));
                return Ok(());
            }
        };
        let then = if decides {
            "stop 0x7B"
        } else {
            "no device on the way to this disk is of that class"
        };
        let text = format!("{list} of {class} names {name}, which {dead}: {then}");
        let fault = BootFault::DeadFilter {
            class,
            list,
            service: name,
            decides,
        };
        self.find(decides, fault, text);
        Ok(())
    }

    /// Evaluates earlier devices of this kind. Windows reuses their configuration if the device is
    /// in the same place, and does not look in the databases.
    fn instances(&mut self, controller: DiskBus) -> Result<()> {
        let path = self.ctx.control_set.key("Enum\\PCI");
        let Some(bus) = self.ctx.system.key(&path)? else {
            return Ok(());
        };
        let wanted: Vec<String> = controller
            .devices()
            .iter()
            .map(|d| format!("VEN_{:04X}&DEV_{:04X}&", d.vendor, d.device))
            .collect();
        for device in bus.keys()?.into_iter().take(MAX_DEVICES) {
            let name = device.name()?;
            let ours = |id: &String| {
                let head = name.get(..id.len());
                head.is_some_and(|head| head.eq_ignore_ascii_case(id))
            };
            if !wanted.iter().any(ours) {
                continue;
            }
            for instance in device.keys()?.into_iter().take(MAX_DEVICES) {
                let path = format!("PCI\\{name}\\{}", instance.name()?);
                self.instance(&instance, path)?;
            }
        }
        Ok(())
    }

    fn instance(&mut self, instance: &Key<'_>, path: String) -> Result<()> {
        let flags = instance.dword("ConfigFlags")?.unwrap_or_default();
        if flags & DEVICE_OFF != 0 {
            let text = format!("the device {path} was here before and is switched off");
            let path = path.clone();
            self.advise(BootFault::DeviceDisabled { path, flags }, text);
        }
        let class = instance.string("ClassGUID")?.or(instance.string("Class")?);
        if class.is_none_or(|class| class.is_empty()) {
            // Windows looks in the databases.
            return Ok(());
        }
        let service = instance.string("Service")?.filter(|s| !s.is_empty());
        let same = match (&service, &self.service) {
            (Some(found), Some(bound)) => found.eq_ignore_ascii_case(bound),
            _ => false,
        };
        if same {
            self.pass(format!(
                "the device {path} was here before, with this driver"
            ));
            return Ok(());
        }
        let with = match &service {
            Some(name) => format!("with the driver {name}"),
            None => "without a driver".to_string(),
        };
        let text = format!(
            "the device {path} was here before, {with}: Windows uses that driver again when it is in the same place"
        );
        self.advise(BootFault::Instance { path, service }, text);
        Ok(())
    }
}

/// `CONFIGFLAG_DISABLED` and `CONFIGFLAG_REMOVED`.
pub const DEVICE_OFF: u32 = 3;

/// The most devices read; real PCs have a few hundred.
const MAX_DEVICES: usize = 4096;

fn bound_text(device: &PciId, found: &Binding) -> String {
    format!(
        "PCI\\VEN_{:04X}&DEV_{:04X} is driven by {} ({} in {})",
        device.vendor, device.device, found.service, found.id, found.origin
    )
}
