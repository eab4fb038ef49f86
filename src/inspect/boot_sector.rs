//! Checks the values in the partition table and NTFS boot sector with which a BIOS guest's boot
//! code finds its other parts.
//!
//! The boot code of NTFS reads "hidden sectors", the start of its partition, from its own boot
//! sector. Tools that move partitions forget to update it. That of Windows 2000, XP and 2003 also
//! relies on the number of heads there (`docs/guests.md`, "Number of heads").

use super::findings;
use super::model::{BootFacts, BootFiles, Finding, Firmware, SectorField};
use crate::disk::bpb::HIDDEN_SECTORS_OFFSET;
use crate::disk::layout::{DiskLayout, Scheme};
use crate::guest::{FsKind, GuestPath, GuestRead, VolumeId};

const HEADS_OFFSET: u16 = 26;

/// Examines the boot sector. `layout` is that of the disk with the boot files; `windows` is the
/// major version of NT and the size of that disk in bytes.
pub fn look(
    guest: &dyn GuestRead,
    layout: &DiskLayout,
    boot: &BootFiles,
    windows: (u32, u64),
    (facts, findings): (&mut BootFacts, &mut Vec<Finding>),
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
        findings.push(findings::BOOT_SECTOR_HIDDEN.found(format!(
            "{volume}: {hidden} in the boot sector, {start} in the partition table"
        )));
        facts.hidden = u32::try_from(start).ok().map(|start| SectorField {
            name: "hidden sectors",
            offset: HIDDEN_SECTORS_OFFSET as u16,
            old: hidden.to_le_bytes().to_vec(),
            new: start.to_le_bytes().to_vec(),
        });
    }
    let heads = u16::from_le_bytes([sector[26], sector[27]]);
    if windows.0 < 6 {
        facts.heads = heads_fix(heads, windows.1, volume, findings);
    }
}

/// The largest number of heads without translation. A disk partitioned with at most so many is
/// presented with them on IDE, and with others on virtio. This holds up to the largest size that
/// they can address.
const UNTRANSLATED_HEADS: u16 = 16;
const UNTRANSLATED_SIZE: u64 = 16383 * 16 * 63 * 512;

fn heads_fix(
    heads: u16,
    disk_size: u64,
    volume: VolumeId,
    findings: &mut Vec<Finding>,
) -> Option<SectorField> {
    let known = heads > UNTRANSLATED_HEADS || disk_size > UNTRANSLATED_SIZE;
    let expected = heads_for(disk_size).filter(|_| known);
    if expected == Some(heads) {
        return None;
    }
    let evidence = |expected: &str| format!("{volume}: {heads} heads, {expected}");
    let Some(expected) = expected else {
        findings.push(
            findings::BOOT_SECTOR_GEOMETRY.found(evidence(&format!("disk of {disk_size} bytes"))),
        );
        return None;
    };
    findings.push(findings::BOOT_SECTOR_HEADS.found(evidence(&format!("{expected} expected"))));
    Some(SectorField {
        name: "heads",
        offset: HEADS_OFFSET,
        old: heads.to_le_bytes().to_vec(),
        new: expected.to_le_bytes().to_vec(),
    })
}

/// The number of heads that SeaBIOS presents for a disk of that size, on IDE and on virtio. `None`
/// between the steps, where it depends on the controller and on the last sector. Also for disks too
/// small for Windows XP.
fn heads_for(disk_size: u64) -> Option<u16> {
    match disk_size {
        0x4400_0000..=0x7dff_ffff => Some(64),
        0x8000_0000..=0xfbff_ffff => Some(128),
        0x1_0000_0000.. => Some(255),
        _ => None,
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
    findings.push(if active.is_empty() {
        findings::ACTIVE_PARTITION_NONE.found("MBR without an active partition")
    } else {
        findings::ACTIVE_PARTITION_SEVERAL.found(format!("partitions {}", active.join(", ")))
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The steps of SeaBIOS 1.16, read with `int 13h, ah=8` under QEMU 10.0 for both controllers.
    #[test]
    fn heads() {
        let cases = [
            (1 << 29, 255, None, Some("boot-sector-geometry")),
            (1200 << 20, 255, Some(64), Some("boot-sector-heads")),
            (2_113_929_215, 64, None, None),
            (2_113_929_216, 64, None, Some("boot-sector-geometry")),
            (2 << 30, 255, Some(128), Some("boot-sector-heads")),
            (3 << 30, 128, None, None),
            (4_228_374_528, 128, None, Some("boot-sector-geometry")),
            (6 << 30, 240, Some(255), Some("boot-sector-heads")),
            (20 << 30, 255, None, None),
            (6 << 30, 16, None, Some("boot-sector-geometry")),
            (20 << 30, 16, Some(255), Some("boot-sector-heads")),
        ];
        for (size, heads, new, id) in cases {
            let mut findings = Vec::new();
            let field = heads_fix(heads, size, VolumeId::new(1), &mut findings);
            let found = field.map(|f| u16::from_le_bytes([f.new[0], f.new[1]]));
            assert_eq!(found, new, "{size}");
            assert_eq!(findings.first().map(|f| f.id), id, "{size}");
        }
    }
}
