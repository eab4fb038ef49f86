//! The GUID partition table, UEFI 2.10 chapter 5: the header, its backup, and the entries.

use std::io;

use uuid::Uuid;

use super::layout::{DiskLayout, Partition, Scheme};
use super::sector::{guid_at, read_up_to, u16_at, u32_at, u64_at};
use crate::block::BlockRead;

/// Largest partition entry array read; the usual one has 16 KiB.
const MAX_TABLE: u64 = 1 << 20;

/// Where a table is and what it must look like.
struct Header {
    disk_id: Uuid,
    backup: u64,
    table: u64,
    entries: u32,
    entry_size: u32,
    table_crc: u32,
}

/// The primary table, or the backup when the primary is damaged.
pub(super) fn read(disk: &dyn BlockRead, sector_size: u32) -> io::Result<Option<DiskLayout>> {
    let last = (disk.size() / u64::from(sector_size)).saturating_sub(1);
    let mut places = vec![1, last];
    // On a disk that was enlarged the backup is not at its end.
    let head = read_up_to(disk, u64::from(sector_size), 92)?;
    if head.starts_with(b"EFI PART") {
        places.extend(u64_at(&head, 32));
    }
    for lba in places {
        let Some(header) = read_header(disk, lba, sector_size)? else {
            continue;
        };
        // Of two sector sizes only the right one has the other header where it says.
        if lba == 1 && header.backup <= 1 {
            continue;
        }
        if let Some(partitions) = read_table(disk, &header, sector_size)? {
            return Ok(Some(DiskLayout {
                scheme: Scheme::Gpt,
                sector_size,
                disk_id: Some(header.disk_id.to_string()),
                partitions,
            }));
        }
    }
    Ok(None)
}

/// Where a sound primary GPT header says its backup is, as an LBA.
pub(super) fn backup(disk: &dyn BlockRead, sector_size: u32) -> io::Result<Option<u64>> {
    Ok(read_header(disk, 1, sector_size)?.map(|header| header.backup))
}

fn read_header(disk: &dyn BlockRead, lba: u64, sector_size: u32) -> io::Result<Option<Header>> {
    let Some(offset) = lba.checked_mul(u64::from(sector_size)) else {
        return Ok(None);
    };
    let sector = read_up_to(disk, offset, sector_size as usize)?;
    Ok(parse_header(&sector, lba))
}

fn parse_header(sector: &[u8], lba: u64) -> Option<Header> {
    let size = u32_at(sector, 12)? as usize;
    if !sector.starts_with(b"EFI PART") || size < 92 {
        return None;
    }
    let mut header = sector.get(..size)?.to_vec();
    header.get_mut(16..20)?.fill(0);
    if crc32(&header) != u32_at(sector, 16)? || u64_at(sector, 24)? != lba {
        return None;
    }
    Some(Header {
        disk_id: guid_at(sector, 56)?,
        backup: u64_at(sector, 32)?,
        table: u64_at(sector, 72)?,
        entries: u32_at(sector, 80)?,
        entry_size: u32_at(sector, 84)?,
        table_crc: u32_at(sector, 88)?,
    })
}

fn read_table(
    disk: &dyn BlockRead,
    header: &Header,
    sector_size: u32,
) -> io::Result<Option<Vec<Partition>>> {
    let sector_size = u64::from(sector_size);
    let len = u64::from(header.entries) * u64::from(header.entry_size);
    let Some(offset) = header.table.checked_mul(sector_size) else {
        return Ok(None);
    };
    if header.entry_size < 128 || len > MAX_TABLE || offset >= disk.size() {
        return Ok(None);
    }
    let table = read_up_to(disk, offset, len as usize)?;
    if crc32(&table) != header.table_crc {
        return Ok(None);
    }
    let partitions = table
        .chunks_exact(header.entry_size as usize)
        .zip(1..)
        .filter_map(|(entry, index)| partition(entry, index, sector_size))
        .collect();
    Ok(Some(partitions))
}

pub(super) fn partition(entry: &[u8], index: u32, sector_size: u64) -> Option<Partition> {
    const LEGACY_BOOT: u64 = 1 << 2;
    let kind = guid_at(entry, 0)?;
    if kind.is_nil() {
        return None;
    }
    let (first, last) = (u64_at(entry, 32)?, u64_at(entry, 40)?);
    let sectors = last.checked_sub(first)?.checked_add(1)?;
    let start_bytes = first.saturating_mul(sector_size);
    let size_bytes = sectors.saturating_mul(sector_size);
    let name: Vec<u16> = entry
        .get(56..128)?
        .chunks_exact(2)
        .filter_map(|c| u16_at(c, 0))
        .take_while(|&c| c != 0)
        .collect();
    let name = crate::tool::clean(String::from_utf16_lossy(&name).as_bytes()).replace('\n', " ");
    Some(Partition {
        index,
        type_id: kind.to_string(),
        start_bytes,
        size_bytes,
        guid: Some(guid_at(entry, 16)?.to_string()),
        name: (!name.is_empty()).then_some(name),
        active: u64_at(entry, 48)? & LEGACY_BOOT != 0,
    })
}

/// CRC-32 as in zip and Ethernet. Tables are small: no lookup table needed.
pub(super) fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}
