//! The GUID partition table, UEFI 2.10 chapter 5: the header, its backup, and the entries.

use std::io;

use uuid::Uuid;

use super::layout::{DiskLayout, Partition, Scheme};
use super::sector::read_up_to;
use crate::block::BlockRead;
use crate::bytes::layout;
use crate::bytes::le16;

/// The largest partition entry array that is read; the usual one has 16 KiB.
const MAX_TABLE: u64 = 1 << 20;

pub(super) const SIGNATURE: [u8; 8] = *b"EFI PART";

layout! {
    /// The header of a table (UEFI 2.10, table 5.5): at LBA 1, and once more at the end of the disk.
    Header[92] {
        /// [`SIGNATURE`].
        0 => signature: [u8; 8],
        /// 0x00010000.
        8 => revision: u32,
        /// Length of the header in bytes, at least 92, at most a sector.
        12 => header_size: u32,
        /// CRC-32 of the header, with this field as 0.
        16 => header_crc: u32,
        /// The LBA of this copy.
        24 => own_lba: u64,
        /// The LBA of the other copy.
        32 => backup: u64,
        /// The first sector that partitions may use.
        40 => first_usable: u64,
        /// The last sector that partitions may use.
        48 => last_usable: u64,
        /// Identifies the disk.
        56 => disk_id: Uuid,
        /// The LBA of the first entry.
        72 => table: u64,
        /// The number of entries, used or not.
        80 => entries: u32,
        /// Size of an entry in bytes: 128 times a power of two.
        84 => entry_size: u32,
        /// CRC-32 of all entries.
        88 => table_crc: u32,
    }
}

layout! {
    /// An entry of the table (UEFI 2.10, table 5.6).
    Entry[128] {
        /// The type of the partition; zero for an unused entry.
        0 => kind: Uuid,
        /// Identifies the partition.
        16 => id: Uuid,
        /// Its first sector.
        32 => first: u64,
        /// Its last sector, inclusive.
        40 => last: u64,
        /// Bit 2: BIOS starts from it; others restrict what systems do with it (table 5.7).
        48 => attributes: u64,
        /// UTF-16, zero-terminated if it is shorter.
        56 => name: [u8; 72],
    }
}

/// Reads the primary table, or the backup if the primary is damaged.
pub(super) fn read(disk: &dyn BlockRead, sector_size: u32) -> io::Result<Option<DiskLayout>> {
    let last = (disk.size() / u64::from(sector_size)).saturating_sub(1);
    let mut places = vec![1, last];
    // On an enlarged disk the backup is not at the end.
    let head = read_up_to(disk, u64::from(sector_size), Header::LEN)?;
    let found = Header::read(&head).filter(|h| h.signature == SIGNATURE);
    places.extend(found.map(|header| header.backup));
    for lba in places {
        let Some(header) = read_header(disk, lba, sector_size)? else {
            continue;
        };
        // Of two sector sizes, only the right one has the other header at the recorded LBA.
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

/// The LBA of the backup according to a sound primary GPT header.
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
    let header = Header::read(sector)?;
    let size = header.header_size as usize;
    if header.signature != SIGNATURE || size < Header::LEN {
        return None;
    }
    let mut bytes = sector.get(..size)?.to_vec();
    let unsummed = Header {
        header_crc: 0,
        ..header.clone()
    };
    unsummed.write(&mut bytes)?;
    (crc32(&bytes) == header.header_crc && header.own_lba == lba).then_some(header)
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
    if (header.entry_size as usize) < Entry::LEN || len > MAX_TABLE || offset >= disk.size() {
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
    let entry = Entry::read(entry)?;
    if entry.kind.is_nil() {
        return None;
    }
    let sectors = entry.last.checked_sub(entry.first)?.checked_add(1)?;
    let start_bytes = entry.first.saturating_mul(sector_size);
    let size_bytes = sectors.saturating_mul(sector_size);
    let name: Vec<u16> = entry
        .name
        .chunks_exact(2)
        .filter_map(|c| le16(c, 0))
        .take_while(|&c| c != 0)
        .collect();
    let name = crate::tool::clean(String::from_utf16_lossy(&name).as_bytes()).replace('\n', " ");
    Some(Partition {
        index,
        type_id: entry.kind.to_string(),
        start_bytes,
        size_bytes,
        guid: Some(entry.id.to_string()),
        name: (!name.is_empty()).then_some(name),
        active: entry.attributes & LEGACY_BOOT != 0,
    })
}

/// CRC-32 as in zip and Ethernet. Tables are small, so no lookup table is needed.
pub(super) fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}
