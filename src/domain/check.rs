//! Conditions that a VM must fulfil before its XML is written.
//!
//! libvirt would refuse most violations too, but only on the host that defines the domain. Its
//! messages do not name the cause. No file is read here.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::firmware::FirmwareChoice;
use super::model::{Chipset, Disk, Firmware, Machine, Stage};
use crate::types::{Arch, DiskBus};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DomainError {
    #[error("this VM has no bootstrap stage")]
    NoBootstrap,
    #[error("{count} disks are marked as the boot disk, and it must be exactly one")]
    BootDisk { count: usize },
    #[error(
        "place {order} in the boot order is not one disk's: places count from 1, each for one disk"
    )]
    BootOrder { order: u32 },
    #[error(
        "{path} has {sector_size}-byte sectors, and QEMU's {bus} disks have 512: this disk cannot \
         boot there"
    )]
    SectorSize {
        path: PathBuf,
        sector_size: u32,
        bus: &'static str,
    },
    #[error("{path} has {sector_size}-byte sectors, and only UEFI firmware boots from such a disk")]
    BiosSectorSize { path: PathBuf, sector_size: u32 },
    #[error("{path}: a sector size of {sector_size} bytes is not 512 or 4096")]
    BadSectorSize { path: PathBuf, sector_size: u32 },
    #[error("{path} is not an absolute path, which libvirt requires")]
    RelativePath { path: PathBuf },
    #[error(
        "{path:?} cannot stand in libvirt's XML, which is text without control characters; rename it"
    )]
    UnwritablePath { path: PathBuf },
    #[error("disk serial {serial:?} is not 1 to 20 of letters, digits, blank and _ . + -")]
    Serial { serial: String },
    #[error("{disks} disks on the {bus} bus, and at most {max} fit")]
    TooManyDisks {
        bus: &'static str,
        disks: usize,
        max: usize,
    },
    #[error("the VM needs {needed} PCI slots, and {chipset} has {max}")]
    TooManyDevices {
        chipset: &'static str,
        needed: usize,
        max: usize,
    },
    #[error("{vcpus} vCPUs do not match {sockets} sockets x {cores} cores x {threads} threads")]
    Topology {
        vcpus: u32,
        sockets: u32,
        cores: u32,
        threads: u32,
    },
    #[error("{machine:?} is not a machine type of QEMU like q35, pc or pc-q35-8.2")]
    MachineType { machine: String },
    #[error("{machine} has no IDE controller for the first boot")]
    NoIde { machine: String },
    #[error("the VM has no {0}")]
    Nothing(&'static str),
    #[error("a guest for {arch} does not run on an x86_64 VM")]
    Arch { arch: Arch },
    #[error("the firmware chosen does not fit a {guest} guest")]
    Firmware { guest: &'static str },
}

pub(super) fn check(
    machine: &Machine,
    stage: Stage,
    firmware: &FirmwareChoice,
) -> Result<(), DomainError> {
    if stage == Stage::Bootstrap && machine.bootstrap.is_none() {
        return Err(DomainError::NoBootstrap);
    }
    if !matches!(machine.system.arch(), Arch::Amd64 | Arch::X86) {
        return Err(DomainError::Arch {
            arch: machine.system.arch(),
        });
    }
    if let Some(asked) = &machine.machine_type {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
        let known = ["q35", "pc", "pc-q35-", "pc-i440fx-"]
            .iter()
            .any(|family| family.ends_with('-') && asked.starts_with(family) || asked == family);
        if !known || !asked.bytes().all(plain) {
            return Err(DomainError::MachineType {
                machine: asked.clone(),
            });
        }
        if machine.chipset() == Chipset::Q35 && machine.bootstrap == Some(DiskBus::Ide) {
            return Err(DomainError::NoIde {
                machine: asked.clone(),
            });
        }
    }
    let count_of = |what: fn(&Disk) -> bool| machine.disks.iter().filter(|d| what(d)).count();
    for count in [
        count_of(|d| d.system),
        count_of(|d| d.boot_order == Some(1)),
    ] {
        if count != 1 {
            return Err(DomainError::BootDisk { count });
        }
    }
    let mut orders = BTreeSet::new();
    for order in machine.disks.iter().filter_map(|d| d.boot_order) {
        if order == 0 || !orders.insert(order) {
            return Err(DomainError::BootOrder { order });
        }
    }
    if machine.memory_mib == 0 {
        return Err(DomainError::Nothing("memory"));
    }
    if machine.vcpus == 0 {
        return Err(DomainError::Nothing("vCPUs"));
    }
    if let Some(t) = machine.topology {
        let product = [t.cores, t.threads]
            .iter()
            .try_fold(t.sockets, |product, n| product.checked_mul(*n));
        if product != Some(machine.vcpus) {
            return Err(DomainError::Topology {
                vcpus: machine.vcpus,
                sockets: t.sockets,
                cores: t.cores,
                threads: t.threads,
            });
        }
    }
    match (machine.firmware, firmware) {
        (Firmware::Bios, FirmwareChoice::Bios) => {}
        (Firmware::Uefi { secure_boot: want }, FirmwareChoice::Portable { secure_boot })
            if want == *secure_boot => {}
        (Firmware::Uefi { secure_boot: want }, FirmwareChoice::Images(images))
            if want == images.secure_boot => {}
        (Firmware::Bios, _) => return Err(DomainError::Firmware { guest: "BIOS" }),
        (Firmware::Uefi { secure_boot }, _) => {
            return Err(DomainError::Firmware {
                guest: if secure_boot {
                    "UEFI Secure Boot"
                } else {
                    "UEFI"
                },
            });
        }
    }
    machine
        .disks
        .iter()
        .try_for_each(|disk| check_disk(machine, stage, disk))
}

fn check_disk(machine: &Machine, stage: Stage, disk: &Disk) -> Result<(), DomainError> {
    let (path, sector_size) = (disk.path.clone(), disk.sector_size);
    let needed = disk.system || disk.boot_order == Some(1);
    if let Some(serial) = &disk.serial {
        let safe = |b: u8| b.is_ascii_alphanumeric() || b"-_.+ ".contains(&b);
        if serial.is_empty() || serial.len() > 20 || !serial.bytes().all(safe) {
            return Err(DomainError::Serial {
                serial: serial.clone(),
            });
        }
    }
    match sector_size {
        512 => return Ok(()),
        4096 => {}
        _ => return Err(DomainError::BadSectorSize { path, sector_size }),
    }
    if stage == Stage::Bootstrap {
        if !needed {
            // Left out of the first boot, which works without it.
            return Ok(());
        }
        let bus = machine.bootstrap.map_or("sata", DiskBus::libvirt);
        return Err(DomainError::SectorSize {
            path,
            sector_size,
            bus,
        });
    }
    if matches!(machine.bus, DiskBus::Sata | DiskBus::Ide) {
        return Err(DomainError::SectorSize {
            path,
            sector_size,
            bus: machine.bus.libvirt(),
        });
    }
    if needed && machine.firmware == Firmware::Bios {
        return Err(DomainError::BiosSectorSize { path, sector_size });
    }
    Ok(())
}

pub(super) fn path_text(path: &Path) -> Result<&str, DomainError> {
    if !path.is_absolute() {
        return Err(DomainError::RelativePath { path: path.into() });
    }
    path.to_str()
        .filter(|text| {
            !text
                .chars()
                .any(|c| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'))
        })
        .ok_or_else(|| DomainError::UnwritablePath { path: path.into() })
}
