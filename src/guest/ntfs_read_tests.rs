//! A volume in memory, made byte by byte according to the layouts of NTFS.

use std::sync::Arc;

use super::*;

const RECORD: usize = 1024;
const RECORDS: usize = 16;
/// Cluster of 1024 bytes where the MFT begins.
const MFT: u8 = 4;
const FILE: u64 = 12;

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn resident(kind: u32, name: &[u16], value: &[u8]) -> Vec<u8> {
    let value_at = (24 + name.len() * 2).next_multiple_of(8);
    let mut bytes = vec![0; (value_at + value.len()).next_multiple_of(8)];
    let len = bytes.len() as u32;
    put(&mut bytes, 0, &kind.to_le_bytes());
    put(&mut bytes, 4, &len.to_le_bytes());
    bytes[9] = name.len() as u8;
    put(&mut bytes, 10, &24u16.to_le_bytes());
    put(&mut bytes, 16, &(value.len() as u32).to_le_bytes());
    put(&mut bytes, 20, &(value_at as u16).to_le_bytes());
    for (i, unit) in name.iter().enumerate() {
        put(&mut bytes, 24 + i * 2, &unit.to_le_bytes());
    }
    put(&mut bytes, value_at, value);
    bytes
}

/// The data of the MFT: one run.
fn mft_data() -> Vec<u8> {
    let mut bytes = vec![0; 72];
    let size = (RECORDS * RECORD) as u64;
    put(&mut bytes, 0, &rec::AT_DATA.to_le_bytes());
    put(&mut bytes, 4, &72u32.to_le_bytes());
    bytes[8] = 1;
    put(&mut bytes, 24, &(RECORDS as u64 - 1).to_le_bytes());
    put(&mut bytes, 32, &64u16.to_le_bytes());
    for at in [40, 48, 56] {
        put(&mut bytes, at, &size.to_le_bytes());
    }
    put(&mut bytes, 64, &[0x11, RECORDS as u8, MFT]);
    bytes
}

fn record(sequence: u16, flags: u16, attribute: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; RECORD];
    let used = 56 + attribute.len() + 8;
    put(&mut bytes, 0, b"FILE");
    for (at, word) in [
        (4, 48),
        (6, 3),
        (16, sequence),
        (20, 56),
        (22, flags),
        (24, used as u16),
    ] {
        put(&mut bytes, at, &word.to_le_bytes());
    }
    put(&mut bytes, 56, attribute);
    put(&mut bytes, 56 + attribute.len(), &u32::MAX.to_le_bytes());
    // The update sequence number, at ends of sectors with zeroes.
    for at in [48, 510, 1022] {
        put(&mut bytes, at, &1u16.to_le_bytes());
    }
    bytes
}

/// A root directory with one file, named with that reference.
fn root(name: &str, reference: u64) -> Vec<u8> {
    let units: Vec<u16> = name.encode_utf16().collect();
    let mut key = vec![0; 66 + units.len() * 2];
    key[64] = units.len() as u8;
    for (i, unit) in units.iter().enumerate() {
        put(&mut key, 66 + i * 2, &unit.to_le_bytes());
    }
    let entry = (16 + key.len()).next_multiple_of(8);
    let used = 16 + entry + 16;
    let mut bytes = vec![0; 16 + used];
    put(&mut bytes, 0, &rec::AT_FILE_NAME.to_le_bytes());
    put(&mut bytes, 8, &4096u32.to_le_bytes());
    put(&mut bytes, 16, &16u32.to_le_bytes());
    put(&mut bytes, 20, &(used as u32).to_le_bytes());
    put(&mut bytes, 32, &reference.to_le_bytes());
    put(&mut bytes, 40, &(entry as u16).to_le_bytes());
    put(&mut bytes, 42, &(key.len() as u16).to_le_bytes());
    put(&mut bytes, 48, &key);
    put(&mut bytes, 32 + entry + 8, &16u16.to_le_bytes());
    put(&mut bytes, 32 + entry + 12, &2u16.to_le_bytes());
    bytes
}

/// A volume with the file `a`; its record and its directory entry have these sequence numbers.
fn volume(sequence: u16, named: u16) -> NtfsVolume {
    let mut disk = vec![0; 64 << 10];
    put(&mut disk, 3, b"NTFS    ");
    put(&mut disk, 11, &512u16.to_le_bytes());
    disk[13] = 2;
    put(&mut disk, 40, &128u64.to_le_bytes());
    disk[48] = MFT;
    disk[64] = 1;
    let reference = FILE | u64::from(named) << 48;
    let records = [
        (0, record(1, 1, &mft_data())),
        (
            FILE_ROOT,
            record(
                5,
                3,
                &resident(rec::AT_INDEX_ROOT, I30, &root("a", reference)),
            ),
        ),
        (
            FILE_UPCASE,
            record(10, 1, &resident(rec::AT_DATA, &[], &[])),
        ),
        (
            FILE,
            record(sequence, 1, &resident(rec::AT_DATA, &[], b"contents")),
        ),
    ];
    for (number, bytes) in records {
        put(
            &mut disk,
            usize::from(MFT) * 1024 + number as usize * RECORD,
            &bytes,
        );
    }
    let len = disk.len() as u64;
    NtfsVolume::open(Arc::new(disk), 0, len).unwrap()
}

#[test]
fn a_directory_entry_of_a_deleted_file_is_not_followed() {
    let path = GuestPath::parse("\\a").unwrap();
    let found = |sequence, named| {
        let found = volume(sequence, named).find(&path);
        found.map(|found| found.map(|found| found.record))
    };
    assert_eq!(found(7, 7).unwrap(), Some(FILE));
    // An entry without a number is from an old volume.
    assert_eq!(found(7, 0).unwrap(), Some(FILE));
    for (sequence, named) in [(8, 7), (7, 8), (1, 0xffff)] {
        let error = found(sequence, named).unwrap_err().to_string();
        assert!(error.contains("deleted"), "{sequence} {named}: {error}");
    }
}
