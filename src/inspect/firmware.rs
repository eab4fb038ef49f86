//! Determines whether the disk boots by UEFI or BIOS, from its contents and not from a VM's
//! settings.
//!
//! The boot files may lie on another disk than Windows; [`detect`] decides which disk boots.
//!
//! UEFI: a FAT volume with `\EFI\Microsoft\Boot\bootmgfw.efi`. BIOS: an active MBR partition with
//! `\bootmgr` or `\ntldr`. If both or neither exist, the partition table decides.

use crate::disk::layout::{DiskLayout, GPT_ESP, Scheme};
use crate::guest::{DiskId, FsKind, GuestPath, GuestRead, Volume};

use super::findings;
use super::model::{BootFiles, Finding, Firmware};
use super::{Disk, bcd};

/// The boot files that start the Windows on the disk `system`, the first of `disks` by default.
///
/// Those on its own disk are preferred, unless only another disk's boot configuration names
/// Windows. Otherwise they are those of the first disk, by number, that has any.
pub fn detect(guest: &dyn GuestRead, disks: &[Disk], system: Option<DiskId>) -> BootFiles {
    let Some(main) = disks
        .iter()
        .find(|d| Some(d.id) == system)
        .or(disks.first())
    else {
        return BootFiles::default();
    };
    let own = on_disk(guest, main);
    let mut others: Vec<BootFiles> = disks
        .iter()
        .filter(|d| d.id != main.id)
        .map(|d| on_disk(guest, d))
        .filter(BootFiles::found)
        .collect();
    others.sort_by_key(|boot| boot.disk);
    let starts = |boot: &BootFiles| bcd::starts(guest, boot, disks, main);
    if own.found() && (others.is_empty() || starts(&own)) {
        return own;
    }
    match others.iter().position(starts) {
        Some(i) => others.swap_remove(i),
        None if own.found() || others.is_empty() => own,
        None => others.swap_remove(0),
    }
}

fn on_disk(guest: &dyn GuestRead, disk: &Disk) -> BootFiles {
    let layout = &disk.layout;
    let has = |volume: &Volume, path: &str| {
        GuestPath::parse(path).is_ok_and(|p| matches!(guest.stat(volume.id, &p), Ok(Some(_))))
    };
    let volumes = || guest.volumes().iter().filter(|v| v.id.disk == disk.id);
    let esp = volumes()
        .filter(|v| v.kind == FsKind::Fat)
        .filter(|v| has(v, "EFI\\Microsoft\\Boot\\bootmgfw.efi"))
        // The loader of a recovery stick on a data partition must not be preferred to the real one.
        .max_by_key(|v| is_esp(&v.partition.type_id))
        .map(|v| v.id);
    let boot_volume = volumes()
        .filter(|v| v.partition.active && matches!(v.kind, FsKind::Ntfs | FsKind::Fat))
        .find(|v| has(v, "bootmgr") || has(v, "ntldr"))
        .filter(|_| layout.scheme == Scheme::Mbr)
        .map(|v| v.id);
    let firmware = match (esp, boot_volume, layout.scheme) {
        (Some(_), None, _) => Some(Firmware::Uefi),
        (None, Some(_), _) => Some(Firmware::Bios),
        (_, _, Scheme::Gpt) => Some(Firmware::Uefi),
        (_, _, Scheme::Mbr) => Some(Firmware::Bios),
        (_, _, Scheme::None) => None,
    };
    BootFiles {
        disk: disk.id,
        firmware,
        esp,
        boot_volume,
    }
}

fn is_esp(type_id: &str) -> bool {
    type_id.eq_ignore_ascii_case(GPT_ESP) || type_id.eq_ignore_ascii_case("0xef")
}

/// Problems with the boot files of a disk with Windows.
pub fn findings(
    guest: &dyn GuestRead,
    layout: &DiskLayout,
    boot: &BootFiles,
    findings: &mut Vec<Finding>,
) {
    if boot.esp.is_some() && boot.boot_volume.is_some() {
        findings
            .push(findings::FIRMWARE_BOTH.found(format!("partition table {:?}", layout.scheme)));
    }
    if !boot.found() {
        findings.push(findings::NO_BOOT_MANAGER.found("no \\EFI\\Microsoft\\Boot\\bootmgfw.efi on a FAT volume, no \\bootmgr or \\ntldr on an active partition"));
        return;
    }
    if let Some(system) = boot.esp
        && layout.scheme == Scheme::Gpt
        && let Some(blank) =
            (1..system.partition).find(|slot| layout.partitions.iter().all(|p| p.index != *slot))
    {
        findings.push(findings::GPT_BLANK_ENTRY.found(format!(
            "entry {blank} is blank, the EFI system partition is entry {}",
            system.partition
        )));
    }
    let (volume, stores): (_, &[&str]) = match (boot.firmware, boot.esp, boot.boot_volume) {
        (Some(Firmware::Uefi), Some(esp), _) => (esp, &["EFI\\Microsoft\\Boot\\BCD"]),
        (Some(Firmware::Bios), _, Some(boot)) => (boot, &["Boot\\BCD", "boot.ini"]),
        _ => return,
    };
    let there = stores.iter().any(|path| {
        GuestPath::parse(path).is_ok_and(|p| matches!(guest.stat(volume, &p), Ok(Some(_))))
    });
    if !there {
        let evidence = format!("no \\{} on {volume}", stores[0]);
        // NTLDR works without boot.ini: it starts \WINDOWS on the first partition.
        let ntldr =
            GuestPath::parse("ntldr").is_ok_and(|p| matches!(guest.stat(volume, &p), Ok(Some(_))));
        findings.push(if ntldr {
            findings::NO_BOOT_INI.found(evidence)
        } else {
            findings::NO_BCD.found(evidence)
        });
    }
}
