//! The partition table of the MBR, and the chain of extended ones, parsed like in Linux
//! (`block/partitions/msdos.c`). The extended partition itself is not listed.

use std::io;

use super::layout::Partition;
use super::sector::read_up_to;
use crate::block::BlockRead;
use crate::bytes::layout;

/// The most logical partitions: more than Windows has drive letters.
pub(super) const MAX_LOGICAL: u32 = 128;

pub(super) const TYPE_PROTECTIVE: u8 = 0xee;

layout! {
    /// The first sector of a disk, or that before a logical partition (UEFI 2.10, table 5.1).
    Sector[512] {
        /// Identifies the disk to Windows; unused before a logical partition.
        440 => disk_id: u32,
        /// Four of [`Slot`]; before a logical partition, two count.
        446 => slots: [u8; 64],
        /// 0x55, 0xaa.
        510 => signature: [u8; 2],
    }
}

layout! {
    /// An entry of the table (UEFI 2.10, table 5.2). Addresses in cylinders, heads and sectors are
    /// ignored.
    Slot[16] {
        /// 0x80 if BIOS starts from it, otherwise 0; any other value is no partition entry.
        0 => flag: u8,
        /// The type of the partition; 0 for an unused entry.
        4 => kind: u8,
        /// Its first sector, counted from the start of the disk or of the extended partition.
        8 => start: u32,
        /// Its number of sectors.
        12 => sectors: u32,
    }
}

pub(super) struct MbrEntry {
    pub active: bool,
    pub kind: u8,
    pub start: u32,
    pub sectors: u32,
}

/// The four entries of an MBR, or of the EBR before a logical partition.
pub(super) struct Mbr {
    pub signature: u32,
    pub entries: [MbrEntry; 4],
}

impl Mbr {
    pub fn parse(sector: &[u8]) -> Option<Self> {
        let sector = Sector::read(sector).filter(|s| s.signature == [0x55, 0xaa])?;
        let entry = |i: usize| {
            let slot = Slot::read(sector.slots.get(i * Slot::LEN..)?)?;
            let valid = matches!(slot.flag, 0 | 0x80);
            Some(MbrEntry {
                active: slot.flag == 0x80,
                kind: if valid { slot.kind } else { 0 },
                start: slot.start,
                sectors: slot.sectors,
            })
        };
        Some(Self {
            signature: sector.disk_id,
            entries: [entry(0)?, entry(1)?, entry(2)?, entry(3)?],
        })
    }

    pub fn is_protective(&self) -> bool {
        self.entries.iter().any(|e| e.kind == TYPE_PROTECTIVE)
    }

    pub fn used(&self) -> impl Iterator<Item = (u32, &MbrEntry)> {
        (1..)
            .zip(&self.entries)
            .filter(|(_, e)| e.kind != 0 && e.sectors != 0)
    }
}

fn is_extended(kind: u8) -> bool {
    matches!(kind, 0x05 | 0x0f | 0x85)
}

/// Start and length of the extended partitions of an MBR, in sectors.
pub(super) fn extended(disk: &dyn BlockRead) -> io::Result<Vec<(u64, u64)>> {
    let mbr = Mbr::parse(&read_up_to(disk, 0, 512)?);
    let entries = mbr.iter().flat_map(Mbr::used);
    Ok(entries
        .filter(|(_, e)| is_extended(e.kind))
        .map(|(_, e)| (u64::from(e.start), u64::from(e.sectors)))
        .collect())
}

pub(super) fn partitions(
    disk: &dyn BlockRead,
    mbr: &Mbr,
    sector_size: u64,
) -> io::Result<Vec<Partition>> {
    let partition = |index: u32, entry: &MbrEntry, start: u64| Partition {
        index,
        type_id: format!("0x{:02x}", entry.kind),
        start_bytes: start * sector_size,
        size_bytes: u64::from(entry.sectors) * sector_size,
        guid: None,
        name: None,
        active: entry.active,
    };
    let mut partitions = Vec::new();
    let mut logical = Vec::new();
    for (index, entry) in mbr.used() {
        // A partition at sector 0 would contain the table.
        if entry.start == 0 {
            continue;
        }
        if !is_extended(entry.kind) {
            partitions.push(partition(index, entry, u64::from(entry.start)));
            continue;
        }
        let base = u64::from(entry.start);
        let mut seen = Vec::new();
        let mut next = Some(base);
        while let Some(ebr_at) = next.take() {
            if seen.contains(&ebr_at) || seen.len() as u32 >= MAX_LOGICAL {
                break;
            }
            seen.push(ebr_at);
            let sector = read_up_to(disk, ebr_at * sector_size, 512)?;
            let Some(ebr) = Mbr::parse(&sector) else {
                break;
            };
            for (_, entry) in ebr.used() {
                if is_extended(entry.kind) {
                    next = next.or(Some(base + u64::from(entry.start)));
                } else if (logical.len() as u32) < MAX_LOGICAL && entry.start != 0 {
                    let index = 5 + logical.len() as u32;
                    logical.push(partition(index, entry, ebr_at + u64::from(entry.start)));
                }
            }
        }
    }
    partitions.append(&mut logical);
    Ok(partitions)
}
