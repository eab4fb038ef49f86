//! Evidence on the disk after the first boot: whether Windows found the VirtIO controller and bound
//! its driver. It is read while the VM is off, by hyper2kvm's own readers, and nothing is written.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::drivers::Catalogue;
use crate::drivers::catalogue::{Role, VirtioDevice};
use crate::error::{Error, Result};
use crate::guest::keys::Keys;
use crate::guest::{DiskId, GuestPath, GuestRead};
use crate::inspect::{Survey, WindowsFacts};
use crate::registry::HiveView;
use crate::session::{Access, Session};
use crate::types::{ControlSet, DiskBus};

const VENDOR: &str = "VEN_1AF4";
const MAX_LOG: u64 = 64 << 20;
const SHOWN_ERRORS: usize = 5;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Every VirtIO device that Windows has seen, with the service bound to it.
    pub devices: Vec<Device>,
    /// Whether the storage driver of the final stage is bound to a device.
    pub bound: bool,
    /// Whether Windows wrote its registry back when it was shut down.
    pub clean_shutdown: bool,
    /// Errors of these drivers in `setupapi.dev.log`.
    pub setup_errors: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The name below `Enum\PCI`, e.g. `VEN_1AF4&DEV_1001&SUBSYS_00021AF4&REV_00\3&...`.
    pub instance: String,
    pub service: Option<String>,
}

impl Proof {
    /// Sentences about missing evidence, each with its consequence.
    pub fn doubts(&self, bus: DiskBus) -> Vec<String> {
        let mut doubts = Vec::new();
        if !self.bound {
            doubts.push(format!(
                "Windows has not bound {} to a VirtIO controller in the first boot: whether it starts from one is only known when it does",
                service(bus)
            ));
        }
        if !self.clean_shutdown {
            doubts.push(
                "Windows did not write its registry back: it was not shut down cleanly".into(),
            );
        }
        for line in &self.setup_errors {
            doubts.push(format!("setupapi.dev.log: {line}"));
        }
        doubts
    }
}

/// The service that must drive the controller of the final stage.
fn service(bus: DiskBus) -> String {
    let device = match bus {
        DiskBus::VirtioBlk => VirtioDevice::Blk,
        DiskBus::VirtioScsi => VirtioDevice::Scsi,
        // Only Linux VMs have that bus in the end, and they are not watched.
        DiskBus::Sata | DiskBus::Ide => return "storahci".into(),
    };
    let catalogue = Catalogue::builtin();
    catalogue.service_of(device).unwrap_or_default().into()
}

/// Words by which a section of the log concerns a VirtIO device, or a driver of a disk or NIC.
fn words() -> Vec<String> {
    let catalogue = Catalogue::builtin();
    let drivers = catalogue.drivers.iter();
    drivers
        .filter(|d| matches!(d.role, Role::Storage | Role::Network))
        .flat_map(|d| d.services.iter())
        .map(|service| service.to_lowercase())
        .chain([VENDOR.to_lowercase()])
        .collect()
}

/// The disk of a VM that is off.
pub struct GuestDisk<'a> {
    pub path: PathBuf,
    pub format: String,
    pub keys: &'a Keys,
    /// The files below it, if it is an overlay.
    pub source: &'a [PathBuf],
}

/// Opens the disk read-only and passes its file systems to `read`.
pub fn with_disk<T>(
    disk: &GuestDisk<'_>,
    read: impl FnOnce(&Survey, &dyn GuestRead) -> Result<T>,
) -> Result<T> {
    let access = Access {
        allow_backing: disk.source.to_vec(),
        keys: disk.keys.clone(),
        ..Access::default()
    };
    let opened = access.disk(DiskId::ONLY, &disk.path, Some(&disk.format))?;
    let session = Session::read(&opened)?;
    let result = session
        .inspect()
        .and_then(|survey| read(&survey, session.guest.reader.as_ref()));
    session.close()?;
    access.opened.check_unchanged()?;
    result
}

/// Reads the evidence for the bus of the final stage.
pub fn read(disk: &GuestDisk<'_>, bus: DiskBus) -> Result<Proof> {
    with_disk(disk, |survey, guest| {
        let (Some(hives), Some(windows)) = (&survey.hives, &survey.inspection.windows) else {
            return Err(Error::failed("no Windows was found on the disk"));
        };
        let mut proof = devices(&hives.system.bytes, &windows.control_set, bus)
            .map_err(|e| Error::failed("reading the SYSTEM hive").because(e))?;
        proof.clean_shutdown = !hives.system.replayed && !hives.software.replayed;
        proof.setup_errors = setup_log(guest, windows).map_or_else(Vec::new, |text| errors(&text));
        Ok(proof)
    })
}

fn devices(
    system: &[u8],
    control_set: &ControlSet,
    bus: DiskBus,
) -> Result<Proof, crate::registry::HiveError> {
    let mut proof = Proof::default();
    let service = service(bus);
    let view = HiveView::new(system)?;
    let Some(pci) = view.key(&control_set.key("Enum\\PCI"))? else {
        return Ok(proof);
    };
    for device in pci.keys()? {
        let name = device.name()?;
        if !name.to_ascii_uppercase().starts_with(VENDOR) {
            continue;
        }
        for instance in device.keys()? {
            let found = instance.string("Service")?;
            proof.bound |= found
                .as_deref()
                .is_some_and(|s| s.eq_ignore_ascii_case(&service));
            proof.devices.push(Device {
                instance: format!("{name}\\{}", instance.name()?),
                service: found,
            });
        }
    }
    Ok(proof)
}

fn setup_log(guest: &dyn GuestRead, windows: &WindowsFacts) -> Option<String> {
    let path = setup_log_path(windows)?;
    let bytes = guest.read(windows.system_volume, &path, MAX_LOG).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

pub fn setup_log_path(windows: &WindowsFacts) -> Option<GuestPath> {
    windows.root.join("INF\\setupapi.dev.log").ok()
}

/// The `!!!` lines of the sections about VirtIO devices or drivers. A section starts with `>>>`
/// lines and ends with `<<<` ones.
fn errors(log: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut section: Vec<&str> = Vec::new();
    let words = words();
    for line in log.lines().chain(["<<<"]) {
        if line.starts_with("<<<") {
            let ours = section.iter().any(|l| {
                let lower = l.to_ascii_lowercase();
                words.iter().any(|word| lower.contains(word))
            });
            if ours {
                let bad = section.iter().filter(|l| l.starts_with("!!!"));
                found.extend(bad.map(|l| crate::ui::clean(l)));
            }
            section.clear();
        } else {
            section.push(line);
        }
    }
    found.truncate(SHOWN_ERRORS);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_our_sections_only() {
        let log = "[Device Install Log]\r\n\
            >>>  [Device Install (Hardware initiated) - PCI\\VEN_1AF4&DEV_1001]\r\n\
            >>>  Section start\r\n     dvi: fine\r\n!!!  sig: not\x1b[31m signed\r\n<<<  Section end\r\n\
            >>>  [Device Install - USB\\VID_1]\r\n!!!  other\r\n<<<  Section end\r\n\
            >>>  [Setup Import Driver Package - viostor.inf]\r\n!!!  cut off";
        assert_eq!(errors(log), ["!!!  sig: not[31m signed", "!!!  cut off"]);
        assert!(errors("").is_empty());
    }

    #[test]
    fn a_bound_driver_is_seen() {
        let mut tree = crate::registry::KeyTree::new("ROOT");
        let pci = "ControlSet001\\Enum\\PCI\\";
        let blk = format!("{pci}VEN_1AF4&DEV_1001&SUBSYS_00021AF4&REV_00\\3&1");
        tree.sz(&blk, "Service", "viostor");
        tree.key_mut(&format!("{pci}ven_1af4&DEV_1000\\3&2"));
        tree.sz(
            &format!("{pci}VEN_8086&DEV_2922\\3&3"),
            "Service",
            "storahci",
        );
        let hive = tree.to_bytes("SYSTEM");
        for (set, bus, count, bound) in [
            (1, DiskBus::VirtioBlk, 2, true),
            (1, DiskBus::VirtioScsi, 2, false),
            (2, DiskBus::VirtioBlk, 0, false),
        ] {
            let proof = devices(&hive, &ControlSet::new(set), bus).unwrap();
            assert_eq!((proof.devices.len(), proof.bound), (count, bound), "{set}");
        }
    }

    #[test]
    fn doubts_name_what_is_missing() {
        let mut proof = Proof {
            clean_shutdown: true,
            bound: true,
            ..Proof::default()
        };
        assert!(proof.doubts(DiskBus::VirtioBlk).is_empty());
        proof.bound = false;
        assert!(proof.doubts(DiskBus::VirtioScsi)[0].contains("vioscsi"));
    }
}
