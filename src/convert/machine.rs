//! The libvirt machine of a converted guest: guest facts first, then what the user asked for.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::boot_path::Controller;
use crate::domain::{
    self, Bootstrap, Descriptors, Disk, DiskFormat, DomainType, Drivers, Firmware, FirmwareChoice,
    Graphics, MacAddr, Machine, Nic, NicSource, Stage, StorageBus, Topology, Video,
};
use crate::error::{Error, Result};
use crate::inspect::{self, Inspection, WindowsFacts};

/// Everything about the machine that is not read from the guest.
#[derive(Debug, Clone)]
pub struct MachineOptions {
    pub name: String,
    pub memory_mib: u64,
    pub vcpus: u32,
    pub storage: StorageBus,
    pub domain_type: DomainType,
    /// For the first network cards, in order.
    pub macs: Vec<MacAddr>,
    pub network: NicSource,
    /// The blank disk of the first boot.
    pub probe: PathBuf,
    /// Only an ISO can be shown to the guest as a CD.
    pub driver_iso: Option<PathBuf>,
    /// Which of the optional drivers the guest will have.
    pub drivers: Drivers,
    pub uuid: Option<Uuid>,
    pub serial: Option<String>,
    pub genid: Option<Uuid>,
    /// The source had one.
    pub tpm: bool,
    /// It was on in the source.
    pub secure_boot: bool,
    pub cores_per_socket: Option<u32>,
    pub nvram: PathBuf,
}

/// A converted disk.
#[derive(Debug, Clone)]
pub struct TargetDisk {
    pub path: PathBuf,
    pub format: DiskFormat,
    pub sector_size: u32,
    pub boot: bool,
}

pub fn machine(
    inspection: &Inspection,
    windows: &WindowsFacts,
    bootstrap: Option<Controller>,
    disks: &[TargetDisk],
    options: &MachineOptions,
) -> Machine {
    let arch = serde_json::json!(windows.target.arch);
    let windows_11 = windows.target.build >= 22000 && !windows.target.server;
    let firmware = match inspection.firmware {
        Some(inspect::Firmware::Uefi) => Firmware::Uefi {
            secure_boot: options.secure_boot,
        },
        _ => Firmware::Bios,
    };
    Machine {
        name: options.name.clone(),
        uuid: options.uuid.unwrap_or_else(Uuid::new_v4),
        serial: options.serial.clone(),
        genid: options.genid,
        memory_mib: options.memory_mib,
        vcpus: options.vcpus,
        topology: topology(options),
        firmware,
        tpm: (windows_11 || options.tpm) && firmware != Firmware::Bios,
        windows: domain::WindowsFacts {
            major: windows.target.major,
            minor: windows.target.minor,
            build: windows.target.build,
            arch: arch.as_str().unwrap_or_default().to_string(),
            server: windows.target.server,
        },
        clock_utc: windows.clock_is_utc,
        disks: disks
            .iter()
            .enumerate()
            .map(|(i, disk)| Disk {
                path: disk.path.clone(),
                format: disk.format,
                serial: Some(format!("h2k-{i}")),
                sector_size: disk.sector_size,
                boot: disk.boot,
            })
            .collect(),
        nics: nics(inspection, options),
        bus: options.storage,
        bootstrap: match bootstrap {
            Some(Controller::Sata) => Bootstrap::Sata,
            Some(Controller::Ide) => Bootstrap::Ide,
            _ => Bootstrap::None,
        },
        probe: bootstrap.map(|_| options.probe.clone()),
        driver_iso: options.driver_iso.clone(),
        domain_type: options.domain_type,
        nvram: (firmware != Firmware::Bios).then(|| options.nvram.clone()),
        drivers: options.drivers,
        emulator: None,
        serial_log: None,
        graphics: Graphics::default(),
        video: Video::default(),
    }
}

/// As in the source, where that adds up.
fn topology(options: &MachineOptions) -> Option<Topology> {
    let cores = options.cores_per_socket.filter(|c| *c > 0)?;
    options.vcpus.is_multiple_of(cores).then_some(Topology {
        sockets: options.vcpus / cores,
        cores,
        threads: 1,
    })
}

/// The cards Windows knows, with their MACs, so that licences and DHCP leases stay; `--mac` wins; one
/// card when nothing is known.
fn nics(inspection: &Inspection, options: &MachineOptions) -> Vec<Nic> {
    let known = inspection
        .network
        .adapters
        .iter()
        .filter(|a| a.device.is_some())
        .filter_map(|a| a.mac.as_deref()?.parse::<MacAddr>().ok());
    let mut macs: Vec<MacAddr> = if options.macs.is_empty() {
        known.collect()
    } else {
        options.macs.clone()
    };
    let mut seen = std::collections::BTreeSet::new();
    macs.retain(|mac| seen.insert(*mac));
    macs.truncate(8);
    if macs.is_empty() {
        let random = Uuid::new_v4();
        let [a, b, c, ..] = *random.as_bytes();
        // QEMU's own prefix.
        macs.extend(MacAddr::new([0x52, 0x54, 0x00, a, b, c]));
    }
    macs.into_iter()
        .map(|mac| Nic {
            mac,
            source: options.network.clone(),
            link_up: true,
        })
        .collect()
}

/// The firmware of this host; when it has none that fits, portable XML and a warning.
pub fn firmware(machine: &Machine) -> Result<(FirmwareChoice, Option<String>)> {
    let picked = Descriptors::of_host().and_then(|d| d.pick(machine.firmware, machine.chipset()));
    match picked {
        Ok(choice) => Ok((choice, None)),
        Err(error) => Ok((
            FirmwareChoice::Portable { secure_boot: false },
            Some(format!(
                "{error}; the domain XML leaves the choice to the host that defines it ({})",
                error.hint()
            )),
        )),
    }
}

/// The XML of one stage, written to `path`.
pub fn write_xml(
    machine: &Machine,
    stage: Stage,
    firmware: &FirmwareChoice,
    path: &Path,
) -> Result<()> {
    let xml = domain::to_xml(machine, stage, firmware)
        .map_err(|e| Error::failed(format!("writing the {} domain", stage.as_str())).because(e))?;
    std::fs::write(path, xml)
        .map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))
}
