//! Checks that the boot configuration leads to the Windows that is converted. It may be on another
//! disk of the VM.
//!
//! Examines the entry that the boot manager starts without a choice. This concerns the partitions
//! and the loader file it names, and whether that loader fits the firmware. On UEFI the fall-back
//! loader is examined too. The firmware of a new VM has no boot entries, so it starts
//! `\EFI\BOOT\BOOT*.EFI`, which has to be Windows' own boot manager.
//!
//! A problem that stops the boot manager is a blocker. A store that is unreadable here is a
//! warning, because the boot manager may read it. Entries that boot from a RAM disk, from a virtual
//! disk or from the boot manager's own device are not checked.

use uuid::Uuid;

use super::findings;
use super::model::{
    BootFacts, BootFiles, Fallback, Finding, Firmware, HiveState, LoadedBytes, Severity,
};
use super::{Disk, disk_of, hives};
use crate::disk::layout::{DiskLayout, Partition, Scheme};
use crate::drivers::pe::machine;
use crate::guest::{DiskId, GuestError, GuestPath, GuestRead, VolumeId};
use crate::registry::bcd::{APP_DEVICE, BcdError, Loader, OS_DEVICE};
use crate::registry::{Bcd, BcdDevice, HiveView, RegData, RegOp};
use crate::types::{Arch, KeyPath};

/// The size limit for boot managers, which have about 2 MB.
const MAX_LOADER: u64 = 64 << 20;

/// The results for plan and verify.
#[derive(Default)]
pub struct Store {
    pub hive: Option<LoadedBytes>,
    pub state: Option<HiveState>,
    pub facts: BootFacts,
}

/// The location of Windows.
pub struct Location<'p> {
    pub guest: &'p dyn GuestRead,
    pub disks: &'p [Disk],
    pub boot: &'p BootFiles,
    pub system: VolumeId,
    pub root: &'p GuestPath,
}

pub fn look(place: &Location<'_>, findings: &mut Vec<Finding>) -> Result<Store, GuestError> {
    let mut store = Store::default();
    if let (Some(Firmware::Uefi), Some(esp)) = (place.boot.firmware, place.boot.esp) {
        store.facts.fallback = fallback(place.guest, esp, findings)?;
    }
    let Some((volume, path)) = store_path(place.boot) else {
        return Ok(store);
    };
    let mut said = Vec::new();
    let Some(loaded) = hives::load(place.guest, volume, &path, &mut said)? else {
        // Reported by firmware::findings.
        return Ok(store);
    };
    findings.extend(said.into_iter().map(|finding| match finding.severity {
        Severity::Blocker => damaged(finding.evidence),
        _ => finding,
    }));
    store.state = Some(loaded.state);
    let Some(hive) = loaded.hive else {
        return Ok(store);
    };
    store.facts.store = Some(volume);
    if let Err(error) = entries(place, &hive, &mut store.facts, findings) {
        findings.push(damaged(error.to_string()));
    }
    store.hive = Some(hive);
    Ok(store)
}

fn store_path(boot: &BootFiles) -> Option<(VolumeId, GuestPath)> {
    let (volume, path) = match (boot.firmware, boot.esp, boot.boot_volume) {
        (Some(Firmware::Uefi), Some(esp), _) => (esp, "EFI\\Microsoft\\Boot\\BCD"),
        (Some(Firmware::Bios), _, Some(volume)) => (volume, "Boot\\BCD"),
        _ => return None,
    };
    Some((volume, GuestPath::parse(path).ok()?))
}

/// Whether the default entry of these boot files names a partition of that disk. An unreadable
/// store names none.
pub fn starts(guest: &dyn GuestRead, boot: &BootFiles, disks: &[Disk], system: &Disk) -> bool {
    let Some((volume, path)) = store_path(boot) else {
        return false;
    };
    let Ok(Some(loaded)) = hives::load(guest, volume, &path, &mut Vec::new()) else {
        return false;
    };
    let named = loaded.hive.and_then(|hive| {
        let view = HiveView::new(&hive.bytes).ok()?;
        let bcd = Bcd::parse(&view).ok()?;
        let device = bcd.default_loader()?.os_device.clone();
        match partition_of(disks, system.id, device.as_ref()) {
            LoaderTarget::Here(disk, _) => Some(disk),
            LoaderTarget::Gone(_) | LoaderTarget::Free => None,
        }
    });
    named == Some(system.id)
}

fn damaged(evidence: String) -> Finding {
    findings::BCD_DAMAGED.found(evidence)
}

fn entries(
    place: &Location<'_>,
    hive: &LoadedBytes,
    facts: &mut BootFacts,
    findings: &mut Vec<Finding>,
) -> Result<(), BcdError> {
    let view = HiveView::new(&hive.bytes)?;
    let bcd = Bcd::parse(&view)?;
    if !bcd.ems.is_empty() && bcd.ems_port.unwrap_or(1) <= 1 {
        facts.ems_on_com1 = true;
        findings.push(findings::EMS_COM1.found(format!("{}: {}", hive.path, bcd.ems.join(", "))));
    }
    let Some(loader) = bcd.default_loader() else {
        findings.push(findings::BCD_NO_DEFAULT.found(hive.path.to_string()));
        return Ok(());
    };
    if loader.is_transient() {
        findings.push(findings::BCD_TRANSIENT.found(format!("{}, {}", hive.path, loader.id)));
        return Ok(());
    }
    if bcd
        .debugger_port_number(&loader.id)
        .is_some_and(|port| port <= 1)
    {
        facts.ems_on_com1 = true;
        findings.push(findings::DEBUG_COM1.found(format!("{}, {}: debug", hive.path, loader.id)));
    }
    for (code, device, name) in [
        (APP_DEVICE, &loader.device, "device"),
        (OS_DEVICE, &loader.os_device, "osdevice"),
    ] {
        match partition_of(place.disks, place.system.disk, device.as_ref()) {
            LoaderTarget::Here(disk, p)
                if code == OS_DEVICE && VolumeId::of(disk, p.index) != place.system =>
            {
                findings.push(findings::BCD_OTHER_WINDOWS.found_with(
                    &[&VolumeId::of(disk, p.index)],
                    format!("{}, {}", hive.path, loader.id),
                ));
            }
            LoaderTarget::Here(..) | LoaderTarget::Free => {}
            LoaderTarget::Gone(what) => {
                let disks = match place.disks.len() {
                    1 => "this disk".to_string(),
                    n => format!("any of the {n} disks"),
                };
                findings.push(findings::BCD_DEVICE.found_with(
                    &[&name, &disks],
                    format!("{}, {}: {what}", hive.path, loader.id),
                ));
                facts
                    .device_repair
                    .extend(repair(place, &view, loader, code)?);
            }
        }
    }
    loader_file(place, hive, loader, findings);
    let text_mode = bcd
        .graphics_mode_disabled
        .iter()
        .filter(|key| key.to_lowercase().contains(&loader.id));
    if place.boot.firmware == Some(Firmware::Uefi) {
        facts.text_mode = text_mode
            .map(|key| RegOp::DeleteKey { key: key.clone() })
            .collect();
    }
    if !facts.text_mode.is_empty() {
        findings.push(findings::BCD_TEXT_MODE.found(format!(
            "{}, {}: graphicsmodedisabled",
            hive.path, loader.id
        )));
    }
    Ok(())
}

enum LoaderTarget<'l> {
    Here(DiskId, &'l Partition),
    Gone(String),
    /// A device that no partition table can disprove.
    Free,
}

/// Finds the partition of an entry. Copies of a disk share its identity, so the disk `first` is
/// searched before the others.
fn partition_of<'l>(
    disks: &'l [Disk],
    first: DiskId,
    device: Option<&BcdDevice>,
) -> LoaderTarget<'l> {
    let Some(device) = device else {
        return LoaderTarget::Gone("no such element".into());
    };
    let what = match device {
        BcdDevice::Gpt { disk, partition } => format!("partition {partition} of disk {disk}"),
        BcdDevice::Mbr { signature, offset } => format!("offset {offset} of disk {signature}"),
        BcdDevice::Boot | BcdDevice::Locate | BcdDevice::Ramdisk | BcdDevice::Other { .. } => {
            return LoaderTarget::Free;
        }
    };
    let named = |disk: &'l Disk| {
        let id = disk.layout.disk_id.as_deref().unwrap_or_default();
        let mut partitions = disk.layout.partitions.iter();
        let found = partitions.find(|p| device.is_partition(id, p.guid.as_deref(), p.start_bytes));
        found.map(|partition| LoaderTarget::Here(disk.id, partition))
    };
    disk_of(disks, first)
        .and_then(named)
        .or_else(|| disks.iter().find_map(named))
        .unwrap_or(LoaderTarget::Gone(what))
}

/// The element with the identity of the partition of Windows. `None` without an element to start
/// from, because options around the identity cannot be invented.
fn repair(
    place: &Location<'_>,
    view: &HiveView<'_>,
    loader: &Loader,
    code: &str,
) -> Result<Option<RegOp>, BcdError> {
    let key = KeyPath::new("Objects").join(&loader.id).join("Elements");
    let key = key.join(code);
    let Some(value) = view.key(&key)?.map(|k| k.value("Element")).transpose()? else {
        return Ok(None);
    };
    let mut bytes = value.map(|v| v.data).unwrap_or_default();
    let Some(Disk { layout, .. }) = disk_of(place.disks, place.system.disk) else {
        return Ok(None);
    };
    let mut partitions = layout.partitions.iter();
    let partition = partitions.find(|p| p.index == place.system.partition);
    Ok(partition
        .and_then(|p| set_identity(&mut bytes, layout, p))
        .map(|()| RegOp::set(key, "Element", RegData::Binary(bytes))))
}

/// The layout is that of [`BcdDevice::parse`].
fn set_identity(bytes: &mut [u8], layout: &DiskLayout, partition: &Partition) -> Option<()> {
    let disk = layout.disk_id.as_deref()?;
    let mut identity = [0; 16];
    let mut parent = [0; 16];
    let scheme: u32 = match layout.scheme {
        Scheme::Gpt => {
            identity = Uuid::try_parse(partition.guid.as_deref()?)
                .ok()?
                .to_bytes_le();
            parent = Uuid::try_parse(disk).ok()?.to_bytes_le();
            0
        }
        Scheme::Mbr => {
            let signature = u32::from_str_radix(disk.strip_prefix("0x")?, 16).ok()?;
            identity[..8].copy_from_slice(&partition.start_bytes.to_le_bytes());
            parent[..4].copy_from_slice(&signature.to_le_bytes());
            1
        }
        Scheme::None => return None,
    };
    if bytes.len() < 72 {
        return None;
    }
    bytes[32..48].copy_from_slice(&identity);
    bytes[52..56].copy_from_slice(&scheme.to_le_bytes());
    bytes[56..72].copy_from_slice(&parent);
    Some(())
}

/// Checks that the loader exists and is for this firmware.
fn loader_file(
    place: &Location<'_>,
    hive: &LoadedBytes,
    loader: &Loader,
    findings: &mut Vec<Finding>,
) {
    let evidence = |what: &str| format!("{}, {}: {what}", hive.path, loader.id);
    let Some(text) = &loader.path else {
        findings.push(findings::BCD_LOADER_UNNAMED.found(evidence("no path")));
        return;
    };
    let extension = text.rsplit('.').next().unwrap_or_default().to_lowercase();
    let wanted = match place.boot.firmware {
        Some(Firmware::Uefi) => "efi",
        _ => "exe",
    };
    if extension != wanted {
        findings.push(findings::BCD_LOADER_FIRMWARE.found_with(&[text, &wanted], evidence(text)));
    }
    // If the entry leaves the choice to the boot manager, a loader may also be elsewhere.
    let device = loader.device.as_ref();
    let (volume, sure) = match partition_of(place.disks, place.system.disk, device) {
        LoaderTarget::Here(disk, partition) => (VolumeId::of(disk, partition.index), true),
        _ => (place.system, false),
    };
    let there = GuestPath::parse(text)
        .is_ok_and(|path| matches!(place.guest.stat(volume, &path), Ok(Some(_))));
    if !there {
        let severity = match sure {
            true => Severity::Blocker,
            false => Severity::Warning,
        };
        let finding = findings::BCD_LOADER.found_with(&[text], evidence(&volume.to_string()));
        findings.push(Finding {
            severity,
            ..finding
        });
    }
}

/// The fall-back loader that has to be written, if any.
fn fallback(
    guest: &dyn GuestRead,
    esp: VolumeId,
    findings: &mut Vec<Finding>,
) -> Result<Option<Fallback>, GuestError> {
    let path = |text: &str| GuestPath::parse(text).unwrap_or_default();
    let from = path("EFI\\Microsoft\\Boot\\bootmgfw.efi");
    let ours = match guest.read(esp, &from, MAX_LOADER) {
        Ok(bytes) => bytes,
        Err(error @ (GuestError::TooLarge { .. } | GuestError::Unreadable { .. })) => {
            findings.push(findings::BOOT_MANAGER_UNREAD.found(error.to_string()));
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let name = match machine(&ours).and_then(Arch::of_pe) {
        Some(Arch::Amd64) => "BOOTX64.EFI",
        Some(Arch::X86) => "BOOTIA32.EFI",
        Some(Arch::Arm64) => "BOOTAA64.EFI",
        _ => {
            findings.push(findings::BOOT_MANAGER_DAMAGED.found(from.to_string()));
            return Ok(None);
        }
    };
    let folder = path("EFI\\Boot");
    let to = folder.join(name).unwrap_or_default();
    let there = guest.stat(esp, &to)?;
    if let Some(info) = &there
        && info.size == ours.len() as u64
        && guest.read(esp, &to, MAX_LOADER)? == ours
    {
        return Ok(None);
    }
    let text = match there {
        Some(_) => findings::UEFI_FALLBACK_OTHER,
        None => findings::UEFI_FALLBACK_MISSING,
    };
    findings.push(text.found_with(&[&to], esp.to_string()));
    Ok(Some(Fallback {
        volume: esp,
        size: ours.len() as u64,
        replaces: there.is_some(),
        folder: guest.stat(esp, &folder)?.is_none().then_some(folder),
        from,
        to,
    }))
}
