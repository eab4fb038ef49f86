//! Hives, logs and boot stores.

use hyper2kvm::registry::RegData;
use hyper2kvm::registry::base::{set_clean, update_checksum};
use hyper2kvm::registry::build::{Format, KeyTree};
use hyper2kvm_fuzz::{Files, SEAL, seal_entries};

use crate::{Result, Seeds};

fn put(bytes: &mut [u8], offset: usize, value: u32) {
    bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

fn system(value: u32) -> Vec<u8> {
    let mut tree = KeyTree::new("ROOT");
    tree.dword("Select", "Default", value);
    tree.to_bytes("SYSTEM")
}

fn dirty(mut hive: Vec<u8>, seq: u32) -> Vec<u8> {
    let _ = set_clean(&mut hive, seq);
    put(&mut hive, 4, seq + 1);
    let _ = update_checksum(&mut hive);
    hive
}

/// The first sector of a log of that type for `hive`.
fn log_base(hive: &[u8], seq: u32, file_type: u32) -> Vec<u8> {
    let mut log = hive[..512].to_vec();
    put(&mut log, 28, file_type);
    let _ = set_clean(&mut log, seq);
    log
}

/// An entry log that brings the pages of `hives`, one entry each.
fn entry_log(seq: u32, hives: &[Vec<u8>]) -> Vec<u8> {
    let mut log = log_base(&hives[0], seq, 6);
    for (i, hive) in hives.iter().enumerate() {
        let bins = &hive[4096..];
        let size = (48 + bins.len()).next_multiple_of(512);
        let start = log.len();
        log.extend(b"HvLE");
        let fields = [size as u32, 0, seq + i as u32, bins.len() as u32, 1];
        log.extend(fields.iter().flat_map(|f| f.to_le_bytes()));
        log.extend([0; 16]);
        log.extend([0, bins.len() as u32].iter().flat_map(|f| f.to_le_bytes()));
        log.extend(bins);
        log.resize(start + size, 0);
    }
    seal_entries(&mut log);
    log
}

fn page_log(seq: u32, hive: &[u8]) -> Vec<u8> {
    let mut log = log_base(hive, seq, 1);
    let bins = &hive[4096..];
    log.extend(b"DIRT");
    log.extend(vec![0xff; bins.len() / 4096]);
    log.resize(1024, 0);
    log.extend(bins);
    log
}

fn boot_store() -> Vec<u8> {
    const LOADER: &str = "{11111111-1111-1111-1111-111111111111}";
    const BOOTMGR: &str = "{9dea862c-5cdd-4e70-acc1-f32b344d4795}";
    let mut gpt = vec![0; 88];
    gpt[16] = 6;
    gpt[24] = 72;
    gpt[32..48].fill(1);
    gpt[56..72].fill(2);
    let sz = |text: &str| RegData::Sz(text.into());
    let elements = [
        (LOADER, "11000001", RegData::Binary(gpt.clone())),
        (LOADER, "12000002", sz("\\Windows\\system32\\winload.efi")),
        (LOADER, "12000004", sz("Windows")),
        (LOADER, "16000046", RegData::Binary(vec![1])),
        (LOADER, "21000001", RegData::Binary(gpt.clone())),
        (LOADER, "22000002", sz("\\Windows")),
        (BOOTMGR, "11000001", RegData::Binary(gpt)),
        (BOOTMGR, "23000003", sz(LOADER)),
        (BOOTMGR, "24000001", RegData::MultiSz(vec![LOADER.into()])),
    ];
    let mut store = KeyTree::new("NewStoreRoot");
    for (id, code) in [(LOADER, 0x1020_0003), (BOOTMGR, 0x1010_0002)] {
        store.dword(&format!("Objects\\{id}\\Description"), "Type", code);
    }
    for (id, code, data) in elements {
        store.set(&format!("Objects\\{id}\\Elements\\{code}"), "Element", data);
    }
    store.to_bytes_as("BCD", Format::V1_3)
}

pub fn write(seeds: &Seeds) -> Result<()> {
    let stale = dirty(system(1), 7);
    seeds.write("base_block", "clean", &system(1)[..512])?;
    seeds.write("base_block", "dirty", &stale[..512])?;
    seeds.write("base_block", "log", &entry_log(7, &[system(2)])[..512])?;

    let mut headless = stale.clone();
    put(&mut headless, 508, 0);
    let cases = [
        (
            "entries",
            SEAL,
            stale.clone(),
            [
                entry_log(9, &[system(4)]),
                entry_log(7, &[system(2), system(3)]),
            ],
        ),
        ("pages", SEAL, stale, [page_log(8, &system(2)), Vec::new()]),
        (
            "headless",
            0,
            headless,
            [entry_log(7, &[system(2)]), Vec::new()],
        ),
    ];
    for (name, flags, hive, logs) in cases {
        let files = Files { flags, hive, logs };
        seeds.write("log_replay", name, &files.to_input())?;
    }
    seeds.write("bcd", "gpt", &boot_store())?;
    Ok(())
}
