//! What a BIOS guest's partition table and NTFS boot sector must say so that its boot code finds the
//! rest of it.
//!
//! The boot code of NTFS reads "hidden sectors", the start of its partition, from its own boot sector;
//! tools that move partitions forget it. Windows 2000, XP and 2003 also trust the number of heads there,
//! and SeaBIOS shows them a geometry that follows from the size of the disk (the same table as in
//! virt-v2v, which writes the field).

use super::firmware::BootFiles;
use super::model::{Finding, Firmware};
use crate::disk::layout::{DiskLayout, Scheme};
use crate::guest::{FsKind, GuestPath, GuestRead};

/// `windows` is the major version of NT and the size of the disk in bytes.
pub fn findings(
    guest: &dyn GuestRead,
    layout: &DiskLayout,
    boot: &BootFiles,
    windows: (u32, u64),
    findings: &mut Vec<Finding>,
) {
    if boot.firmware != Some(Firmware::Bios) || layout.scheme != Scheme::Mbr {
        return;
    }
    active_partitions(layout, findings);
    let Some(volume) = boot.boot_volume else {
        return;
    };
    let kind = guest.volumes().iter().find(|v| v.id == volume);
    let Some(partition) = kind
        .filter(|v| v.kind == FsKind::Ntfs)
        .map(|v| &v.partition)
    else {
        return;
    };
    let sector = GuestPath::parse("$Boot").map(|path| {
        guest
            .read_at(volume, &path, 0, 512)
            .ok()
            .filter(|s| s.len() == 512)
    });
    let Ok(Some(sector)) = sector else {
        return;
    };
    let hidden = u32::from_le_bytes([sector[28], sector[29], sector[30], sector[31]]);
    let start = partition.start_bytes / u64::from(layout.sector_size.max(1));
    if u64::from(hidden) != start {
        findings.push(Finding::warning(
            "boot-sector-hidden",
            "the boot sector does not know where its partition starts (hidden sectors): the BIOS boot code will not find bootmgr",
            "repair it from a Windows recovery disk: bootsect /nt60 ALL (NT 6) or fixboot (XP)",
            format!(
                "partition {}: {hidden} in the boot sector, {start} in the partition table",
                volume.0
            ),
        ));
    }
    let heads = u16::from_le_bytes([sector[26], sector[27]]);
    let expected = heads_for(windows.1);
    if windows.0 < 6 && heads != expected {
        findings.push(Finding::warning(
            "boot-sector-heads",
            "the boot sector has another number of heads than a KVM machine shows: Windows XP and 2003 stop with \"A disk read error occurred\"",
            format!("write {expected:#x} to bytes 26-27 of the boot sector (virt-v2v does), or run fixboot on the new machine"),
            format!("partition {}: {heads} heads", volume.0),
        ));
    }
}

/// What SeaBIOS shows a disk of that size to have.
fn heads_for(disk_size: u64) -> u16 {
    match disk_size {
        0..2_114_445_312 => 0x40,
        2_114_445_312..4_228_374_780 => 0x80,
        _ => 0xff,
    }
}

fn active_partitions(layout: &DiskLayout, findings: &mut Vec<Finding>) {
    let active: Vec<String> = layout
        .partitions
        .iter()
        .filter(|p| p.active)
        .map(|p| p.index.to_string())
        .collect();
    if active.len() == 1 {
        return;
    }
    let (message, evidence) = if active.is_empty() {
        (
            "no partition is active: a BIOS does not start this disk",
            "MBR without an active partition".to_string(),
        )
    } else {
        (
            "several partitions are active: a BIOS refuses such a partition table",
            format!("partitions {}", active.join(", ")),
        )
    };
    findings.push(Finding::warning(
        "active-partition",
        message,
        "mark exactly the system partition active (diskpart: select partition N, active)",
        evidence,
    ));
}
