//! Checks whether a disk is as long as its partition table and file systems require.
//!
//! A truncated copy reads well up to its end, and often Windows even starts from it. So the size of
//! the disk is compared with the ends of all partitions, the GPT's backup and the file systems.
//!
//! Three deviations are accepted. A table may be written for a smaller disk that was enlarged; the
//! backup is then where the primary header records it. File systems may be smaller than their
//! partitions. An old tool may have rounded an MBR partition up to a full cylinder. That is
//! accepted if the file system in it ends before the disk does.

use std::io;

use super::bpb::{FatBoot, NtfsBoot};
use super::layout::{self, DiskLayout, Partition, Scheme};
use super::length::Short;
use super::sector::{is_boot_sector, read_up_to};
use super::superblock::{
    BlockHeader, Btrfs, ExFatBoot, Ext, LvmLabel, LvmVolume, PLACES_OFFSET, Places, ReFsBoot,
    SIGNATURE, Xfs,
};
use super::{gpt, mbr};
use crate::block::BlockRead;

/// The largest possible cylinder: 255 heads and 63 sectors.
const CYLINDER: u64 = 255 * 63 * 512;
/// Partition types whose contents do not show their size. Microsoft's reserved partition may have
/// old contents, and a volume that spans disks begins in a part of it.
const PARTS: [&str; 7] = [
    layout::GPT_MSR,
    layout::GPT_LDM_METADATA,
    layout::GPT_LDM_DATA,
    layout::MBR_LDM,
    layout::GPT_STORAGE_SPACES,
    // RAID of Linux.
    "a19d880f-05fc-4d3b-a006-743f0f84911e",
    "0xfd",
];

/// Finds data behind the end of the disk. `claimed` is its layout without clipping.
pub fn check(disk: &dyn BlockRead, claimed: &DiskLayout) -> io::Result<Option<Short>> {
    let has = disk.size();
    let short = |what: String, needs: u64| Short { what, needs, has };
    for partition in &claimed.partitions {
        let file_system = match partition.type_id.as_str() {
            id if PARTS.contains(&id) => None,
            _ => file_system_end(disk, partition)?,
        };
        let late = file_system.filter(|(_, end)| *end > has);
        let end = partition.start_bytes.saturating_add(partition.size_bytes);
        let rounded = claimed.scheme == Scheme::Mbr
            && file_system.is_some()
            && late.is_none()
            && end.saturating_sub(has) < CYLINDER;
        if end > has && !rounded && claimed.scheme != Scheme::None {
            return Ok(Some(short(format!("partition {}", partition.index), end)));
        }
        if let Some((name, end)) = late {
            let what = format!("the {name} file system {}", of(partition));
            return Ok(Some(short(what, end)));
        }
    }
    match claimed.scheme {
        Scheme::Gpt => backup(disk, claimed.sector_size),
        Scheme::Mbr => extended(disk, claimed.sector_size),
        Scheme::None => Ok(None),
    }
}

fn of(partition: &Partition) -> String {
    match partition.index {
        0 => "of the whole disk".into(),
        n => format!("of partition {n}"),
    }
}

/// The backup of a GPT whose primary header is sound.
fn backup(disk: &dyn BlockRead, sector_size: u32) -> io::Result<Option<Short>> {
    let Some(lba) = gpt::backup(disk, sector_size)? else {
        return Ok(None);
    };
    let sector_size = u64::from(sector_size);
    let at = lba.saturating_mul(sector_size);
    let needs = at.saturating_add(sector_size);
    let has = disk.size();
    // Zeroes: the end was lost, and the file extended to its old length.
    let lost = needs <= has && !read_up_to(disk, at, 8)?.starts_with(&gpt::SIGNATURE);
    Ok((needs > has || lost).then(|| Short {
        what: if lost {
            format!("the backup of its GPT, of which nothing is at byte {at},")
        } else {
            "the backup of its GPT".into()
        },
        needs,
        has,
    }))
}

/// Checks the extended partition, which is not in the list, and the chain in it.
fn extended(disk: &dyn BlockRead, sector_size: u32) -> io::Result<Option<Short>> {
    let sector_size = u64::from(sector_size);
    let has = disk.size();
    for (start, sectors) in mbr::extended(disk)? {
        let start = start.saturating_mul(sector_size);
        let end = start.saturating_add(sectors.saturating_mul(sector_size));
        if start >= has || end.saturating_sub(has) >= CYLINDER {
            return Ok(Some(Short {
                what: "the extended partition".into(),
                needs: end,
                has,
            }));
        }
    }
    Ok(None)
}

/// Name and end of a file system that records its size.
fn file_system_end(
    disk: &dyn BlockRead,
    partition: &Partition,
) -> io::Result<Option<(&'static str, u64)>> {
    let start = partition.start_bytes;
    let read = |offset: u64, len: usize| read_up_to(disk, start.saturating_add(offset), len);
    let boot = read(0, 512)?;
    let found = match windows_size(&boot) {
        Some(found) => Some(found),
        None if boot.get(3..11) == Some(b"-FVE-FS-") => bitlocker_size(disk, start, &boot)?,
        None => other_size(&boot, &read(512, 2048)?, &read(0x1_0000, 512)?),
    };
    Ok(found.map(|(name, size)| (name, start.saturating_add(size))))
}

fn windows_size(boot: &[u8]) -> Option<(&'static str, u64)> {
    let fat = FatBoot::read(boot)?;
    let sector = u64::from(fat.bytes_per_sector);
    match &fat.oem_id {
        b"NTFS    " => {
            let sectors = NtfsBoot::read(boot)?.total_sectors;
            Some(("NTFS", sectors.saturating_mul(sector)))
        }
        b"EXFAT   " => {
            let exfat = ExFatBoot::read(boot)?;
            let sector = 1 << exfat.sector_shift.min(12);
            Some(("exFAT", exfat.sectors.saturating_mul(sector)))
        }
        b"ReFS\0\0\0\0" => {
            let refs = ReFsBoot::read(boot)?;
            Some(("ReFS", refs.sectors.saturating_mul(refs.sector_size.into())))
        }
        b"-FVE-FS-" => None,
        _ if is_boot_sector(boot) => Some(("FAT", u64::from(fat.sectors()).saturating_mul(sector))),
        _ => None,
    }
}

/// The size of a BitLocker volume. Windows 7 and later write it into the first of three blocks of
/// metadata.
fn bitlocker_size(
    disk: &dyn BlockRead,
    start: u64,
    boot: &[u8],
) -> io::Result<Option<(&'static str, u64)>> {
    let Some(places) = boot.get(PLACES_OFFSET..).and_then(Places::read) else {
        return Ok(None);
    };
    let [first, ..] = places.copies;
    let bytes = read_up_to(disk, start.saturating_add(first), BlockHeader::LEN)?;
    let block = BlockHeader::read(&bytes);
    let block = block.filter(|block| block.signature == SIGNATURE && block.version == 2);
    Ok(block.map(|block| ("BitLocker", block.encrypted_bytes)))
}

/// The size of another file system. `after` follows the first sector, `far` is at 64 KiB.
fn other_size(boot: &[u8], after: &[u8], far: &[u8]) -> Option<(&'static str, u64)> {
    if let Some(xfs) = Xfs::read(boot).filter(|xfs| xfs.magic == *b"XFSB") {
        let block = u64::from(xfs.block.0);
        return Some(("XFS", xfs.blocks.0.saturating_mul(block)));
    }
    if let Some(label) = LvmLabel::read(after).filter(|label| label.id == *b"LABELONE") {
        let volume = LvmVolume::read(after.get(label.volume as usize..)?)?;
        return Some(("LVM", volume.size));
    }
    if let Some(btrfs) = Btrfs::read(far).filter(|btrfs| btrfs.magic == *b"_BHRfS_M") {
        return Some(("btrfs", btrfs.size));
    }
    const WIDE: u32 = 0x80;
    let ext = Ext::read(after.get(512..)?).filter(|ext| ext.magic == 0xef53)?;
    let high = match ext.incompatible & WIDE {
        0 => 0,
        _ => u64::from(ext.blocks_high) << 32,
    };
    let block = 1024u64.checked_shl(ext.block_shift)?;
    Some(("ext", (u64::from(ext.blocks) | high).saturating_mul(block)))
}
