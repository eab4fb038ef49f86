//! Refuses tables of a qcow2 that QEMU would read for hours. Many entries of a first table may lead
//! to one second table, or snapshots may be excessive. They are checked before QEMU opens the
//! image.
//!
//! Specification: QEMU's `docs/interop/qcow2.txt`, "Two-level lookup" and "Snapshots". In the first
//! table of a disk or snapshot no second table occurs twice: each has one reference from there.

use std::io;

use super::detect::read_up_to;
use super::qcow2::{Header, OFFSET, SnapshotHeader};
use super::remote::ReadAt;
use crate::bytes::be64;

/// The largest first table; QEMU refuses larger ones.
const MAX_FIRST_TABLE: u64 = 32 << 20;
/// The most snapshots: nightly ones for eleven years. QEMU accepts 65,536, and needs 10 s to list
/// them.
const MAX_SNAPSHOTS: u64 = 4096;
/// The most entries in the first tables of all snapshots: 500 TiB, each block counted as often as
/// it is used. QEMU reads a second table for each.
const MAX_ENTRIES: u64 = 1_000_000;
/// The same including empty entries: 2,048 snapshots of a disk of 8 TiB. All of them are read,
/// however few bytes of the file they take.
const MAX_DECLARED: u64 = 32 << 20;
/// The largest list of their headers, with names and identifiers.
const MAX_LIST: u64 = 8 << 20;

/// A fault of such tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TableFault {
    /// A shared table, which no sound image has.
    Shared {
        table: u64,
    },
    Snapshots {
        count: u64,
        limit: u64,
    },
    Entries {
        count: u64,
        limit: u64,
    },
    Declared {
        count: u64,
        limit: u64,
    },
}

impl std::fmt::Display for TableFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shared { table } => write!(
                f,
                "two entries of its first table lead to the second table at byte {table}"
            ),
            Self::Snapshots { count, limit } => {
                write!(
                    f,
                    "it has {count} internal snapshots, and at most {limit} are read"
                )
            }
            Self::Entries { count, limit } => write!(
                f,
                "its internal snapshots have {count} tables of blocks, and at most {limit} are read"
            ),
            Self::Declared { count, limit } => write!(
                f,
                "its internal snapshots have first tables of {count} entries, and at most {limit} are read"
            ),
        }
    }
}

/// The second tables named in a first one, each once; `Err` has one that is named twice.
fn second_tables(
    file: &dyn ReadAt,
    size: u64,
    (at, entries): (u64, u32),
) -> io::Result<Result<u64, TableFault>> {
    let bytes = u64::from(entries) * 8;
    if bytes > MAX_FIRST_TABLE {
        return Ok(Ok(0));
    }
    let table = read_up_to(file, at, bytes as usize, size)?;
    let entries = table.chunks_exact(8).filter_map(|entry| be64(entry, 0));
    let mut tables: Vec<u64> = entries.map(|e| e & OFFSET).filter(|e| *e != 0).collect();
    tables.sort_unstable();
    if let Some(pair) = tables.windows(2).find(|pair| pair[0] == pair[1]) {
        return Ok(Err(TableFault::Shared { table: pair[0] }));
    }
    Ok(Ok(tables.len() as u64))
}

/// Offset and number of entries of the first table of each snapshot in the list.
fn first_tables(list: &[u8], count: u32) -> Vec<(u64, u32)> {
    let (mut rest, mut found) = (list, Vec::new());
    for _ in 0..count {
        let Some(header) = SnapshotHeader::read(rest) else {
            break;
        };
        found.push((header.l1.0, header.l1_entries.0));
        let names = usize::from(header.id_len.0) + usize::from(header.name_len.0);
        let len = (names + header.extra_len.0 as usize).next_multiple_of(8);
        rest = rest.get(SnapshotHeader::LEN + len..).unwrap_or_default();
    }
    found
}

/// The size of the reference counts of all clusters, which `qemu-img check` keeps in memory; 0 for
/// another format.
pub fn reference_counts(file: &dyn ReadAt, size: u64) -> io::Result<u64> {
    let head = read_up_to(file, 0, Header::LEN, size)?;
    let Some(header) = Header::of(&head) else {
        return Ok(0);
    };
    let clusters = size >> header.cluster_bits.0.clamp(9, 21);
    Ok((clusters << header.count_order.0.min(6)) / 8)
}

/// The first fault of a qcow2's tables. Other invalid contents are left to QEMU.
pub fn qcow2(file: &dyn ReadAt, size: u64) -> io::Result<Option<TableFault>> {
    let head = read_up_to(file, 0, Header::LEN, size)?;
    let Some(header) = Header::of(&head) else {
        return Ok(None);
    };
    if let Err(fault) = second_tables(file, size, (header.l1.0, header.l1_entries.0))? {
        return Ok(Some(fault));
    }
    let count = header.snapshots.0;
    if u64::from(count) > MAX_SNAPSHOTS {
        return Ok(Some(TableFault::Snapshots {
            count: count.into(),
            limit: MAX_SNAPSHOTS,
        }));
    }
    let list = read_up_to(
        file,
        header.snapshot_list.0,
        MAX_LIST as usize,
        if count == 0 { 0 } else { size },
    )?;
    let first_tables = first_tables(&list, count);
    // Checked before any is read: in a file with holes they cost nothing to make.
    let declared = (first_tables.iter())
        .map(|(_, entries)| u64::from(*entries))
        .sum();
    if declared > MAX_DECLARED {
        return Ok(Some(TableFault::Declared {
            count: declared,
            limit: MAX_DECLARED,
        }));
    }
    let mut entries = 0;
    for first in first_tables {
        match second_tables(file, size, first)? {
            Ok(tables) => entries += tables,
            Err(fault) => return Ok(Some(fault)),
        }
        if entries > MAX_ENTRIES {
            return Ok(Some(TableFault::Entries {
                count: entries,
                limit: MAX_ENTRIES,
            }));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use std::fs::File;

    use super::*;

    /// A head whose first table is at byte 4096, and whose snapshots are at byte 8192.
    fn image(first: &[u64], snapshots: u32, list: &[u8]) -> (File, u64) {
        let mut bytes = vec![0; 8192];
        bytes[..4].copy_from_slice(b"QFI\xfb");
        bytes[36..40].copy_from_slice(&(first.len() as u32).to_be_bytes());
        bytes[40..48].copy_from_slice(&4096u64.to_be_bytes());
        bytes[60..64].copy_from_slice(&snapshots.to_be_bytes());
        bytes[64..72].copy_from_slice(&8192u64.to_be_bytes());
        for (i, entry) in first.iter().enumerate() {
            bytes[4096 + i * 8..][..8].copy_from_slice(&entry.to_be_bytes());
        }
        bytes.extend(list);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        (file, bytes.len() as u64)
    }

    fn snapshot(at: u64, entries: u32) -> [u8; 40] {
        let mut header = [0; 40];
        header[..8].copy_from_slice(&at.to_be_bytes());
        header[8..12].copy_from_slice(&entries.to_be_bytes());
        header
    }

    #[test]
    fn a_second_table_is_named_once() {
        const USED: u64 = 1 << 63;
        let fault = |first: &[u64], snapshots, list: &[u8]| {
            let (file, size) = image(first, snapshots, list);
            qcow2(&file, size).unwrap()
        };
        assert_eq!(fault(&[], 0, &[]), None);
        assert_eq!(fault(&[USED | 0x10000, 0, 0, USED | 0x20000], 0, &[]), None);
        let shared = Some(TableFault::Shared { table: 0x10000 });
        assert_eq!(fault(&[USED | 0x10000, 0, 0x10000], 0, &[]), shared);
        // A snapshot shares tables with the disk, but not with itself.
        let list = snapshot(4096, 2);
        assert_eq!(fault(&[0x10000, 0x20000], 1, &list), None);
        let list = [snapshot(4096, 1), snapshot(4096, 2)].concat();
        assert_eq!(fault(&[0x10000], 2, &list), None);
        let list = [snapshot(0, 0), snapshot(8192 + 80, 2)].concat();
        let twice = [0x10000u64.to_be_bytes(), 0x10000u64.to_be_bytes()].concat();
        assert_eq!(fault(&[], 2, &[&list[..], &twice].concat()), shared);
    }

    #[test]
    fn first_tables_of_holes_have_an_end() {
        // All of them have one, which is a hole.
        let (file, size) = image(&[], 4096, &snapshot(1 << 20, 4 << 20).repeat(4096));
        file.set_len(size + (64 << 20)).unwrap();
        let fault = qcow2(&file, size + (64 << 20)).unwrap().unwrap();
        assert_eq!(
            fault.to_string(),
            "its internal snapshots have first tables of 17179869184 entries, and at most 33554432 are read"
        );
        // A disk of 8 TiB every night for five years.
        let list = snapshot(1 << 40, 16_384).repeat(2048);
        let (file, size) = image(&[], 2048, &list);
        assert_eq!(qcow2(&file, size).unwrap(), None);
    }

    #[test]
    fn reference_counts_of_every_cluster() {
        let of = |bits: u32, version: u32, order: u32, size| {
            let mut head = vec![0; 104];
            head[..4].copy_from_slice(b"QFI\xfb");
            head[4..8].copy_from_slice(&version.to_be_bytes());
            head[20..24].copy_from_slice(&bits.to_be_bytes());
            head[96..100].copy_from_slice(&order.to_be_bytes());
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&head).unwrap();
            file.set_len(size).unwrap();
            reference_counts(&file, size).unwrap()
        };
        assert_eq!(of(16, 2, 0, 1 << 40), 32 << 20);
        assert_eq!(of(16, 3, 4, 1 << 40), 32 << 20);
        assert_eq!(of(12, 3, 4, 1 << 40), 512 << 20);
        assert_eq!(of(9, 3, 6, 1 << 40), 16 << 30);
        // QEMU refuses invalid contents.
        assert_eq!(of(u32::MAX, u32::MAX, u32::MAX, 1 << 30), 4096);
        let (file, size) = (tempfile::tempfile().unwrap(), 0);
        assert_eq!(reference_counts(&file, size).unwrap(), 0);
    }

    #[test]
    fn snapshots_have_an_end() {
        let (file, size) = image(&[], 65_536, &[]);
        let fault = qcow2(&file, size).unwrap().unwrap();
        assert_eq!(
            fault.to_string(),
            "it has 65536 internal snapshots, and at most 4096 are read"
        );
        // Every one with all entries of a large table.
        let mut file = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; 104];
        bytes[..4].copy_from_slice(b"QFI\xfb");
        bytes[60..64].copy_from_slice(&100u32.to_be_bytes());
        bytes[64..72].copy_from_slice(&104u64.to_be_bytes());
        bytes.extend(snapshot(104 + 4000, 20_000).repeat(100));
        bytes.extend((1..=20_000u64).flat_map(|table| (table << 16).to_be_bytes()));
        file.write_all(&bytes).unwrap();
        let fault = qcow2(&file, bytes.len() as u64).unwrap();
        assert!(
            matches!(
                fault,
                Some(TableFault::Entries {
                    count: 1_020_000,
                    ..
                })
            ),
            "{fault:?}"
        );
    }
}
