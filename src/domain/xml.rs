//! Writes libvirt domain XML from a [`Machine`].
//!
//! Follows <https://libvirt.org/formatdomain.html>. Both stages use the same code. They differ in
//! the controller of the disks, and in the model of the NIC while netkvm is missing. The probe disk
//! and the driver ISO are only in the first boot.
//!
//! Choices that are not obvious:
//! - The probe of a virtio-blk VM has the PCI address of the later boot disk. A virtio-scsi
//!   controller is the same device in both stages. So the driver that Windows binds in the first
//!   boot is bound for exactly the device from which it boots next.
//! - On the virtio-scsi bus the probe has a target number of its own. So nothing Windows records
//!   about the probe (offline policy, for one) applies to a real disk.
//! - Windows before 8 has no xHCI and no 82574L driver: it gets EHCI and `e1000`; NT 5 UHCI and
//!   `rtl8139`.
//! - No Hyper-V enlightenments on NT 5, under software emulation, or on UEFI before Windows 8
//!   (which hangs with them). The panic device needs them: Windows reports a crash through Hyper-V
//!   registers. It has no driver for the ISA panic device, which is used under emulation only.
//! - Data disks that do not fit on the bus of the first boot are on VirtIO at once, at their final
//!   address: Windows finds them as soon as the probe has bound the driver.
//! - QEMU's SATA and IDE disks have 512-byte sectors: a data disk of 4096 is left out of the first
//!   boot.
//! - A domain has an element in [`HYPER2KVM_NS`], so that hyper2kvm never changes a domain it did
//!   not define.

use std::path::Path;

use super::check::{DomainError, check, path_text};
use super::element::Element;
use super::firmware::FirmwareChoice;
use super::model::{
    Backing, Bridge, Chipset, CpuMode, Disk, DomainType, Firmware, Graphics, Machine, Nic,
    NicSource, Stage, System, Video,
};
use super::slots::{PciAddress, Role, Slots};
use crate::files::names_a_device;
use crate::types::DiskBus;

/// Namespace of the metadata element that marks a domain as defined by hyper2kvm: `<conversion
/// stage='...'/>`.
pub const HYPER2KVM_NS: &str = "urn:hyper2kvm:domain:1";

const OSINFO_NS: &str = "http://libosinfo.org/xmlns/libvirt/domain/1.0";
const SATA_PORTS: usize = 6;
const MAX_SATA_CONTROLLERS: usize = 3;
const IDE_UNITS: usize = 4;

/// The number of disks on a bus, if it differs from the number of PCI slots.
fn units(bus: DiskBus) -> Option<usize> {
    match bus {
        DiskBus::Sata => Some(SATA_PORTS * MAX_SATA_CONTROLLERS),
        DiskBus::Ide => Some(IDE_UNITS),
        DiskBus::VirtioBlk | DiskBus::VirtioScsi => None,
    }
}

/// The domain XML of one stage.
pub fn to_xml(
    machine: &Machine,
    stage: Stage,
    firmware: &FirmwareChoice,
) -> Result<String, DomainError> {
    Ok(to_element(machine, stage, firmware)?.to_document())
}

/// The domain XML of one stage as a tree, for callers that patch it before writing.
pub fn to_element(
    machine: &Machine,
    stage: Stage,
    firmware: &FirmwareChoice,
) -> Result<Element, DomainError> {
    check(machine, stage, firmware)?;
    let data_disks = machine.disks.len() - 1;
    let chipset = machine.chipset();
    let nics = machine.nics.len();
    let slots = Slots::new(chipset, nics, data_disks)
        // On virtio-scsi all disks are behind one device.
        .or_else(|full| match machine.bus {
            DiskBus::VirtioScsi => Slots::new(chipset, nics, 0),
            DiskBus::VirtioBlk | DiskBus::Sata | DiskBus::Ide => Err(full),
        })
        .map_err(|(needed, max)| DomainError::TooManyDevices {
            chipset: chipset.as_str(),
            needed,
            max,
        })?;
    Builder {
        machine,
        stage,
        firmware,
        slots,
    }
    .domain()
}

/// Turns free text into a name valid for libvirt. It is not empty and has no `/` and no control
/// characters. It is short enough for the file names that libvirt derives from it.
pub fn domain_name(name: &str) -> String {
    let mut clean: String = name
        .chars()
        .filter(|c| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}'))
        .map(|c| if c == '/' { '-' } else { c })
        .collect();
    let mut end = clean.len().min(200);
    while !clean.is_char_boundary(end) {
        end -= 1;
    }
    clean.truncate(end);
    match clean.trim() {
        "" | "." | ".." => "vm".to_owned(),
        trimmed => trimmed.to_owned(),
    }
}

/// The target names `vda`, ... `vdz`, `vdaa`, ...
pub(crate) fn target_name(prefix: &str, index: usize) -> String {
    let mut letters = Vec::new();
    let mut n = index;
    loop {
        letters.push(b'a' + (n % 26) as u8);
        n /= 26;
        if n == 0 {
            break;
        }
        n -= 1;
    }
    let letters: String = letters.iter().rev().map(|b| *b as char).collect();
    format!("{prefix}{letters}")
}

fn agent_channel() -> Element {
    el("channel")
        .with("type", "unix")
        .child(
            el("target")
                .with("type", "virtio")
                .with("name", "org.qemu.guest_agent.0"),
        )
        .child(
            el("address")
                .with("type", "virtio-serial")
                .with("controller", "0")
                .with("bus", "0")
                .with("port", "1"),
        )
}

/// COM1 is port 0.
fn serial_port(serial: Element, port: u32) -> Element {
    serial.child(
        el("target")
            .with("type", "isa-serial")
            .with("port", port.to_string())
            .child(el("model").with("name", "isa-serial")),
    )
}

fn el(name: &str) -> Element {
    Element::new(name)
}

fn value(name: &str, text: impl AsRef<str>) -> Element {
    el(name).text(text)
}

fn on(name: &str) -> Element {
    el(name).with("state", "on")
}

fn drive_address(controller: usize, bus: usize, target: usize, unit: usize) -> Element {
    el("address")
        .with("type", "drive")
        .with("controller", controller.to_string())
        .with("bus", bus.to_string())
        .with("target", target.to_string())
        .with("unit", unit.to_string())
}

struct Builder<'a> {
    machine: &'a Machine,
    stage: Stage,
    firmware: &'a FirmwareChoice,
    slots: Slots,
}

impl Builder<'_> {
    fn uefi(&self) -> bool {
        matches!(self.machine.firmware, Firmware::Uefi { .. })
    }

    fn domain(&self) -> Result<Element, DomainError> {
        let m = self.machine;
        let kind = match m.domain_type {
            DomainType::Kvm => "kvm",
            DomainType::Qemu => "qemu",
        };
        let mut domain = el("domain")
            .with("type", kind)
            .child(value("name", domain_name(&m.name)))
            .child(value("uuid", m.uuid.to_string()));
        if let Some(genid) = m.genid {
            domain.push(value("genid", genid.to_string()));
        }
        if let Some(title) = &m.title {
            domain.push(value("title", title.replace(['\r', '\n'], " ")));
        }
        domain.push(self.metadata());
        // virt-xml takes every number here as KiB, whatever the unit is.
        let memory = m.memory_mib.saturating_mul(1024).to_string();
        domain.push(value("memory", &memory).with("unit", "KiB"));
        domain.push(value("currentMemory", &memory).with("unit", "KiB"));
        domain.push(value("vcpu", m.vcpus.to_string()).with("placement", "static"));
        if let Some(serial) = &m.serial {
            domain.push(
                el("sysinfo")
                    .with("type", "smbios")
                    .child(el("system").child(value("entry", serial).with("name", "serial"))),
            );
        }
        domain.push(self.os()?);
        domain.push(self.features());
        domain.push(self.cpu());
        domain.push(self.clock());
        domain.push(value("on_poweroff", "destroy"));
        domain.push(value("on_reboot", "restart"));
        // The first boot preserves a crashed VM with its stop screen for examination.
        domain.push(value(
            "on_crash",
            match self.stage {
                Stage::Bootstrap => "preserve",
                Stage::Final => "restart",
            },
        ));
        domain.push(
            el("pm")
                .child(el("suspend-to-mem").with("enabled", "no"))
                .child(el("suspend-to-disk").with("enabled", "no")),
        );
        domain.push(self.devices()?);
        Ok(domain)
    }

    fn metadata(&self) -> Element {
        let mut metadata = el("metadata");
        if let Some(id) = self.machine.system.osinfo_id() {
            metadata.push(
                el("libosinfo:libosinfo")
                    .with("xmlns:libosinfo", OSINFO_NS)
                    .child(el("libosinfo:os").with("id", id)),
            );
        }
        metadata.child(
            el("hyper2kvm:conversion")
                .with("xmlns:hyper2kvm", HYPER2KVM_NS)
                .with("stage", self.stage.as_str()),
        )
    }

    fn os(&self) -> Result<Element, DomainError> {
        let m = self.machine;
        let kind = value("type", "hvm")
            .with("arch", "x86_64")
            .with("machine", m.machine_type());
        let mut os = el("os");
        let nvram = m.nvram.as_deref().map(path_text).transpose()?;
        match self.firmware {
            FirmwareChoice::Bios => os.push(kind),
            FirmwareChoice::Portable { secure_boot } => {
                let enabled = if *secure_boot { "yes" } else { "no" };
                let feature = |name| el("feature").with("enabled", enabled).with("name", name);
                let mut features = el("firmware").child(feature("enrolled-keys"));
                // Not ruled out otherwise: RHEL has builds with Secure Boot only, and without keys
                // it stays off.
                if *secure_boot {
                    features.push(feature("secure-boot"));
                }
                os = os.with("firmware", "efi").child(kind).child(features);
                if let Some(nvram) = nvram {
                    os.push(value("nvram", nvram));
                }
            }
            FirmwareChoice::Images(images) => {
                let mut loader = value("loader", path_text(&images.code)?)
                    .with("readonly", "yes")
                    .with("type", "pflash");
                let mut vars = el("nvram").with("template", path_text(&images.vars)?);
                if images.smm {
                    loader = loader.with("secure", "yes");
                }
                // Older libvirt has no format here, and needs none for raw images.
                if images.code_format != "raw" {
                    loader = loader.with("format", &images.code_format);
                }
                if images.vars_format != "raw" {
                    vars = vars
                        .with("templateFormat", &images.vars_format)
                        .with("format", &images.vars_format);
                }
                os.push(kind);
                os.push(loader);
                os.push(vars.text(nvram.unwrap_or_default()));
            }
        }
        if m.serial.is_some() {
            os.push(el("smbios").with("mode", "sysinfo"));
        }
        Ok(os)
    }

    fn features(&self) -> Element {
        let mut features = el("features").child(el("acpi")).child(el("apic"));
        if self.machine.enlightened() {
            features.push(
                el("hyperv")
                    .child(on("relaxed"))
                    .child(on("vapic"))
                    .child(on("spinlocks").with("retries", "8191"))
                    .child(on("vpindex"))
                    .child(on("runtime"))
                    .child(on("synic"))
                    .child(on("stimer").child(on("direct")))
                    .child(on("frequencies"))
                    .child(on("tlbflush"))
                    .child(on("ipi")),
            );
        }
        features.push(el("vmport").with("state", "off"));
        let smm = match self.firmware {
            FirmwareChoice::Images(images) => images.smm,
            FirmwareChoice::Portable { secure_boot } => *secure_boot,
            FirmwareChoice::Bios => false,
        };
        if smm {
            features.push(on("smm"));
        }
        features
    }

    fn cpu(&self) -> Element {
        let m = self.machine;
        let cpu = match (m.domain_type, m.cpu) {
            (DomainType::Kvm, CpuMode::HostPassthrough) => el("cpu")
                .with("mode", "host-passthrough")
                .with("check", "none")
                .with("migratable", "on"),
            (DomainType::Kvm, CpuMode::HostModel) => el("cpu")
                .with("mode", "host-model")
                .with("check", "partial"),
            // qemu64 lacks SSE4.2, which Windows 11 24H2 requires.
            (DomainType::Qemu, _) => el("cpu").with("mode", "maximum").with("check", "none"),
        };
        let (sockets, cores, threads) = m
            .topology
            .map_or((1, m.vcpus, 1), |t| (t.sockets, t.cores, t.threads));
        cpu.child(
            el("topology")
                .with("sockets", sockets.to_string())
                .with("cores", cores.to_string())
                .with("threads", threads.to_string()),
        )
    }

    fn clock(&self) -> Element {
        let timer = |name: &str| el("timer").with("name", name);
        let offset = if self.machine.clock_utc {
            "utc"
        } else {
            "localtime"
        };
        let mut clock = el("clock")
            .with("offset", offset)
            .child(timer("rtc").with("tickpolicy", "catchup"))
            .child(timer("pit").with("tickpolicy", "delay"))
            .child(timer("hpet").with("present", "no"));
        if self.machine.enlightened() {
            clock.push(timer("hypervclock").with("present", "yes"));
        }
        clock
    }

    fn devices(&self) -> Result<Element, DomainError> {
        let m = self.machine;
        let mut devices = el("devices");
        if let Some(emulator) = &m.emulator {
            devices.push(value("emulator", path_text(emulator)?));
        }
        match self.stage {
            Stage::Bootstrap => self.bootstrap_disks(&mut devices)?,
            Stage::Final => self.final_disks(&mut devices)?,
        }
        self.controllers(&mut devices);
        for (n, nic) in m.nics.iter().enumerate() {
            devices.push(self.interface(n, nic));
        }
        devices.push(self.serial()?);
        if m.second_serial {
            devices.push(serial_port(el("serial").with("type", "pty"), 1));
        }
        if m.drivers.agent {
            devices.push(agent_channel());
        }
        // An absolute pointer keeps the mouse cursor aligned over VNC.
        devices.push(el("input").with("type", "tablet").with("bus", "usb"));
        if m.tpm && self.uefi() {
            devices.push(
                el("tpm").with("model", "tpm-crb").child(
                    el("backend")
                        .with("type", "emulator")
                        .with("version", "2.0"),
                ),
            );
        }
        self.display(&mut devices);
        devices.push(if m.drivers.balloon {
            el("memballoon")
                .with("model", "virtio")
                .child(self.slots.of(Role::Balloon).element())
        } else {
            el("memballoon").with("model", "none")
        });
        if m.drivers.rng {
            devices.push(
                el("rng")
                    .with("model", "virtio")
                    .child(value("backend", "/dev/urandom").with("model", "random"))
                    .child(self.slots.of(Role::Rng).element()),
            );
        }
        if self.machine.enlightened() {
            devices.push(el("panic").with("model", "hyperv"));
        } else if m.domain_type == DomainType::Qemu || matches!(m.system, System::Linux { .. }) {
            devices.push(el("panic").with("model", "isa"));
        }
        Ok(devices)
    }

    fn interface(&self, n: usize, nic: &Nic) -> Element {
        let (kind, name) = match &nic.source {
            NicSource::Network(name) => ("network", Some(name)),
            NicSource::Bridge(bridge) => ("bridge", Some(&bridge.name)),
            NicSource::User => ("user", None),
        };
        let mut interface = el("interface")
            .with("type", kind)
            .child(el("mac").with("address", nic.mac.to_string()));
        if let Some(name) = name {
            interface.push(el("source").with(kind, name));
        }
        if let NicSource::Bridge(Bridge {
            vlan: Some(vlan), ..
        }) = &nic.source
        {
            let tag = el("tag").with("id", vlan.to_string());
            interface.push(el("vlan").child(tag));
        }
        interface.push(el("model").with("type", self.machine.nic_model(self.stage)));
        if !nic.link_up {
            interface.push(el("link").with("state", "down"));
        }
        interface.push(self.slots.of(Role::Nic(n)).element());
        interface
    }

    fn serial(&self) -> Result<Element, DomainError> {
        let serial = match &self.machine.serial_log {
            Some(path) => el("serial").with("type", "file").child(
                el("source")
                    .with("path", path_text(path)?)
                    .with("append", "off"),
            ),
            None => el("serial").with("type", "pty"),
        };
        Ok(serial_port(serial, 0))
    }

    fn display(&self, devices: &mut Element) {
        let kind = match self.machine.graphics {
            Graphics::Vnc => "vnc",
            Graphics::Spice => "spice",
            Graphics::None => "",
        };
        if !kind.is_empty() {
            devices.push(
                el("graphics")
                    .with("type", kind)
                    .with("autoport", "yes")
                    .with("listen", "127.0.0.1"),
            );
        }
        let model = match self.machine.video {
            Video::Vga => el("model").with("type", "vga").with("vram", "16384"),
            Video::Qxl => el("model").with("type", "qxl"),
            Video::Virtio => el("model").with("type", "virtio"),
        };
        devices.push(
            el("video")
                .child(model.with("heads", "1").with("primary", "yes"))
                .child(self.slots.video().element()),
        );
    }

    fn controllers(&self, devices: &mut Element) {
        let m = self.machine;
        let controller = |kind: &str, index: u8| {
            el("controller")
                .with("type", kind)
                .with("index", index.to_string())
        };
        for pci in self.slots.controllers() {
            devices.push(pci);
        }
        let usb = |model: &str| controller("usb", 0).with("model", model);
        match m.chipset() {
            Chipset::Pc => {
                devices.push(usb("piix3-uhci").child(PciAddress::new(0, 1, 2).element()));
                devices.push(controller("ide", 0).child(PciAddress::new(0, 1, 1).element()));
            }
            Chipset::Q35 if m.system.is_recent() => {
                devices.push(usb("qemu-xhci").child(self.slots.of(Role::Usb).element()))
            }
            Chipset::Q35 => {
                devices.push(usb("ich9-ehci1").child(PciAddress::new(0, 0x1d, 7).element()));
                for n in 0..3u8 {
                    let address = PciAddress::new(0, 0x1d, n).element();
                    devices.push(
                        usb(&format!("ich9-uhci{}", n + 1))
                            .child(el("master").with("startport", (2 * n).to_string()))
                            .child(if n == 0 {
                                address.with("multifunction", "on")
                            } else {
                                address
                            }),
                    );
                }
            }
        }
        for index in 0..self.sata_controllers() {
            devices.push(controller("sata", index).child(self.slots.sata(index).element()));
        }
        if m.bus == DiskBus::VirtioScsi {
            devices.push(
                controller("scsi", 0)
                    .with("model", "virtio-scsi")
                    .child(self.slots.of(Role::Storage).element()),
            );
        }
        if m.drivers.agent {
            devices
                .push(controller("virtio-serial", 0).child(self.slots.of(Role::Serial).element()));
        }
    }

    /// Disks and the ISO on the bootstrap controller.
    fn bootstrap_units(&self) -> usize {
        self.bootstrap_disk_count() + self.iso_units()
    }

    fn iso_units(&self) -> usize {
        usize::from(self.machine.driver_iso.is_some())
    }

    /// The number of disks that fit on the bus of the first boot.
    fn bootstrap_disk_count(&self) -> usize {
        let units = self.machine.bootstrap.and_then(units).unwrap_or_default();
        let free = units.saturating_sub(self.iso_units());
        self.machine.disks.len().min(free)
    }

    fn sata_controllers(&self) -> u8 {
        let m = self.machine;
        let wanted = match (self.stage, m.bootstrap) {
            (Stage::Bootstrap, Some(DiskBus::Sata)) => self.bootstrap_units().div_ceil(SATA_PORTS),
            (Stage::Final, _) if m.bus == DiskBus::Sata => m.disks.len().div_ceil(SATA_PORTS),
            _ => 0,
        };
        let least = usize::from(m.chipset() == Chipset::Q35 || m.bootstrap == Some(DiskBus::Sata));
        u8::try_from(wanted.max(least).min(MAX_SATA_CONTROLLERS)).unwrap_or(u8::MAX)
    }

    /// The system disk first, at the address of the first boot's probe; the others in order.
    fn disks(&self) -> impl Iterator<Item = (usize, &Disk)> {
        let disks = &self.machine.disks;
        let system = disks.iter().filter(|d| d.system);
        system.chain(disks.iter().filter(|d| !d.system)).enumerate()
    }

    fn bootstrap_disks(&self, devices: &mut Element) -> Result<(), DomainError> {
        let m = self.machine;
        let bus = m.bootstrap.ok_or(DomainError::NoBootstrap)?;
        let on_bus = self.bootstrap_disk_count();
        for (n, disk) in self.disks().filter(|(_, d)| d.sector_size == 512) {
            if n < on_bus {
                devices.push(disk_element(disk, self.place(bus, n, 0), None)?);
            } else {
                devices.push(self.final_disk(n, disk)?);
            }
        }
        if let Some(iso) = &m.driver_iso {
            let (target, address) = self.place(bus, on_bus, 0);
            devices.push(
                source_element(iso, "cdrom")?
                    .child(target)
                    .child(el("readonly"))
                    .child(address),
            );
        }
        if let Some(probe) = &m.probe {
            let disk = Disk {
                path: probe.clone(),
                format: super::model::DiskFormat::Qcow2,
                serial: Some("h2k-probe".to_owned()),
                sector_size: 512,
                system: false,
                boot_order: None,
                size_bytes: 0,
                backing: Vec::new(),
            };
            let place = match m.bus {
                DiskBus::VirtioBlk => self.place(m.bus, 0, 0),
                // SATA and SCSI targets share the name space; Windows sees only the address.
                DiskBus::VirtioScsi => self.place(m.bus, m.disks.len(), self.iso_units()),
                // No probe is needed.
                DiskBus::Sata | DiskBus::Ide => return Ok(()),
            };
            devices.push(disk_element(&disk, place, None)?);
        }
        Ok(())
    }

    fn final_disks(&self, devices: &mut Element) -> Result<(), DomainError> {
        let m = self.machine;
        if let Some(max) = units(m.bus).filter(|max| m.disks.len() > *max) {
            return Err(DomainError::TooManyDisks {
                bus: m.bus.name(),
                disks: m.disks.len(),
                max,
            });
        }
        for (n, disk) in self.disks() {
            devices.push(self.final_disk(n, disk)?);
        }
        Ok(())
    }

    /// Disk `n`, counted from the boot disk, on the production bus.
    fn final_disk(&self, n: usize, disk: &Disk) -> Result<Element, DomainError> {
        // In the first boot the ISO has a name between those of the disks.
        let shift = match (self.stage, self.machine.bus) {
            (Stage::Bootstrap, DiskBus::VirtioScsi | DiskBus::Sata) => self.iso_units(),
            _ => 0,
        };
        let place = self.place(self.machine.bus, n, shift);
        let blockio = (disk.sector_size == 4096).then(|| {
            el("blockio")
                .with("logical_block_size", "4096")
                .with("physical_block_size", "4096")
        });
        disk_element(disk, place, blockio)
    }

    /// `<target>` and `<address>` of position `n` of a bus; its name is `shift` letters further in
    /// the alphabet.
    fn place(&self, bus: DiskBus, n: usize, shift: usize) -> (Element, Element) {
        let (prefix, address) = match (bus, n) {
            (DiskBus::VirtioBlk, 0) => ("vd", self.slots.of(Role::Storage).element()),
            (DiskBus::VirtioBlk, n) => ("vd", self.slots.of(Role::Data(n - 1)).element()),
            (DiskBus::VirtioScsi, n) => ("sd", drive_address(0, 0, n, 0)),
            (DiskBus::Sata, n) => ("sd", drive_address(n / SATA_PORTS, 0, 0, n % SATA_PORTS)),
            (DiskBus::Ide, n) => ("hd", drive_address(0, n / 2, 0, n % 2)),
        };
        let target = el("target")
            .with("dev", target_name(prefix, n + shift))
            .with("bus", bus.libvirt());
        (target, address)
    }
}

/// The attributes of `<driver>` for errors of a disk on a chain.
pub(crate) const POLICIES: [&str; 2] = ["error_policy", "rerror_policy"];

/// The chain below a disk, every level with its format, so that libvirt probes nothing. The source
/// keeps its owner and label.
fn backing_store(levels: &[Backing]) -> Result<Element, DomainError> {
    let Some((level, below)) = levels.split_first() else {
        return Ok(el("backingStore"));
    };
    let text = path_text(&level.path)?;
    let (kind, source) = match level.socket {
        true => {
            let host = el("host").with("transport", "unix").with("socket", text);
            ("network", el("source").with("protocol", "nbd").child(host))
        }
        false => {
            let (kind, attr) = kind_of(&level.path);
            let keeps = |model| el("seclabel").with("model", model).with("relabel", "no");
            let source = el("source").with(attr, text);
            (kind, source.child(keeps("dac")).child(keeps("selinux")))
        }
    };
    Ok(el("backingStore")
        .with("type", kind)
        .child(el("format").with("type", &level.format))
        .child(source)
        .child(backing_store(below)?))
}

/// `type` of a disk, and the attribute of its `<source>`.
fn kind_of(path: &Path) -> (&'static str, &'static str) {
    match names_a_device(path) {
        true => ("block", "dev"),
        false => ("file", "file"),
    }
}

/// Creates a `<disk>` with its source; the path determines its type.
fn source_element(path: &Path, device: &str) -> Result<Element, DomainError> {
    let text = path_text(path)?;
    let (kind, attr) = kind_of(path);
    let driver = el("driver").with("name", "qemu");
    let driver = match device {
        "cdrom" => driver.with("type", "raw"),
        _ => driver,
    };
    Ok(el("disk")
        .with("type", kind)
        .with("device", device)
        .child(driver)
        .child(el("source").with(attr, text)))
}

fn disk_element(
    disk: &Disk,
    (target, address): (Element, Element),
    blockio: Option<Element>,
) -> Result<Element, DomainError> {
    let mut element = source_element(&disk.path, "disk")?;
    if let Some(driver) = element.children.first_mut() {
        // Linux AIO helps on block devices; on sparse files it blocks.
        let io = if names_a_device(&disk.path) {
            "native"
        } else {
            "threads"
        };
        for (key, value) in [
            ("type", disk.format.as_str()),
            ("cache", "none"),
            ("io", io),
            ("discard", "unmap"),
        ] {
            driver.attrs.push((key.to_owned(), value.to_owned()));
        }
        if !disk.backing.is_empty() {
            // An unreachable source pauses the VM; Windows would give up on an error.
            for key in POLICIES {
                driver.attrs.push((key.to_owned(), "stop".to_owned()));
            }
        }
    }
    if !disk.backing.is_empty() {
        element.push(backing_store(&disk.backing)?);
    }
    element.push(target);
    if let Some(blockio) = blockio {
        element.push(blockio);
    }
    if let Some(serial) = &disk.serial {
        element.push(value("serial", serial));
    }
    if let Some(order) = disk.boot_order {
        element.push(el("boot").with("order", order.to_string()));
    }
    element.push(address);
    Ok(element)
}
