//! Hives that were not saved completely, with their logs and without.

use std::fs;

use hyper2kvm::demo::{DemoVolume, WinVersion};
use hyper2kvm::registry::base::{set_clean, update_checksum};
use hyper2kvm::registry::marvin::marvin32;

use crate::support::{TOOLS, export, have, tool};
use crate::{Guest, config, tree};

/// Marks a hive as not saved completely.
pub fn dirty(mut hive: Vec<u8>) -> Vec<u8> {
    set_clean(&mut hive, 7).unwrap();
    hive[4..8].copy_from_slice(&8u32.to_le_bytes());
    update_checksum(&mut hive).unwrap();
    hive
}

/// A log in the new format with one entry that brings all bins of `hive`.
pub fn entry_log(hive: &[u8]) -> Vec<u8> {
    let bins = &hive[4096..];
    let mut log = hive[..512].to_vec();
    log[28..32].copy_from_slice(&6u32.to_le_bytes());
    set_clean(&mut log, 7).unwrap();
    let mut body: Vec<u8> = [0, bins.len() as u32]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect();
    body.extend(bins);
    body.resize((40 + body.len()).next_multiple_of(512) - 40, 0);
    let mut entry = b"HvLE".to_vec();
    for field in [40 + body.len() as u32, 0, 7, bins.len() as u32, 1] {
        entry.extend(field.to_le_bytes());
    }
    entry.extend(marvin32(&body).to_le_bytes());
    entry.extend(marvin32(&entry).to_le_bytes());
    log.extend(entry);
    log.extend(body);
    log
}

/// A log of the old format that brings all bins of `hive`.
fn page_log(hive: &[u8]) -> Vec<u8> {
    let bins = &hive[4096..];
    let mut log = hive[..512].to_vec();
    log[28..32].copy_from_slice(&1u32.to_le_bytes());
    set_clean(&mut log, 7).unwrap();
    log.extend(b"DIRT");
    log.extend(vec![0xff; bins.len() / 4096]);
    log.resize(log.len().next_multiple_of(512), 0);
    log.extend(bins);
    log
}

/// The second reader is `hivexregedit`. What it exports from the converted hive must be what it exports from
/// the recovered one after merging our `.reg` file.
#[test]
fn logs_are_replayed_before_the_edit() {
    if !have(&TOOLS) {
        return;
    }
    // Windows 7 has logs of the old format, and no DRIVERS hive.
    let all = ["SYSTEM", "SOFTWARE", "DRIVERS"];
    replayed(WinVersion::Win10, &all, entry_log);
    replayed(WinVersion::Win7, &all[..2], page_log);
}

fn replayed(version: WinVersion, names: &[&str], make_log: fn(&[u8]) -> Vec<u8>) {
    let guest = Guest::new(version);
    let mut recovered = Vec::new();
    for name in names {
        let stale = guest.hive(name);
        let mut newer = tree(&stale);
        newer.sz("Only in the log", "value", name);
        let newer = newer.to_bytes(name);
        guest.write(DemoVolume::Windows, &config(name), &dirty(stale));
        let log = config(&format!("{name}.LOG1"));
        guest.write(DemoVolume::Windows, &log, &make_log(&newer));
        recovered.push((name, newer));
    }
    guest.finding("hive-replayed");
    guest.check("hives-clean", "fault", 0);
    let (report, out) = guest.converted(&[]);
    let seen = &report["inspection"]["hives"]["system"];
    assert_eq!(seen["log_entries_replayable"], 1);
    for (name, newer) in recovered {
        let (expected, found) = (guest.path("expected"), guest.path("found"));
        fs::write(&expected, newer).unwrap();
        let bytes = out.hive(name);
        assert_eq!(bytes[4..8], bytes[8..12], "{name} is still dirty");
        fs::write(&found, bytes).unwrap();
        let reg = guest.path(&format!("out/registry/{name}.reg"));
        let prefix = format!("HKEY_LOCAL_MACHINE\\{name}");
        let merge = ["--merge", "--prefix", &prefix];
        let files = [expected.to_str().unwrap(), reg.to_str().unwrap()];
        tool("hivexregedit", &[&merge[..], &files[..]].concat());
        let both = [&expected, &found].map(|p| export(p, &prefix, "\\"));
        assert!(both[0] == both[1], "{name}");
        assert!(both[1].contains("Only in the log"), "{name}");
        assert_eq!(
            out.read(DemoVolume::Windows, &config(&format!("{name}.LOG1"))),
            b""
        );
    }
    out.check("hives-clean", "ok", 0);
}

#[test]
fn hives_without_usable_logs() {
    if !have(&TOOLS) {
        return;
    }
    for name in ["SYSTEM", "SOFTWARE", "DRIVERS"] {
        eprintln!("sound: {name}");
        let guest = Guest::new(WinVersion::Win10);
        let stale = dirty(guest.hive(name));
        guest.write(DemoVolume::Windows, &config(name), &stale);
        guest.accepted("hive-stale");
        guest.check("logs-harmless", "fault", 0);
        let (report, out) = guest.converted(&[]);
        assert_eq!(report["ready"], true);
        let hive = out.hive(name);
        assert_eq!(hive[4..8], hive[8..12], "{name}");
    }

    eprintln!("unsound");
    let guest = Guest::new(WinVersion::Win10);
    let mut bad = dirty(guest.hive("SYSTEM"));
    let at = bad.windows(2).skip(4096 + 200).position(|w| w == b"nk");
    let at = at.unwrap() + 4096 + 200;
    bad[at..at + 2].copy_from_slice(b"xx");
    guest.write(DemoVolume::Windows, &config("SYSTEM"), &bad);
    guest.refused("hive-damaged");

    eprintln!("logs ahead of a clean hive");
    let guest = Guest::new(WinVersion::Win10);
    let mut hive = guest.hive("SYSTEM");
    let log = entry_log(&hive);
    set_clean(&mut hive, 5).unwrap();
    guest.write(DemoVolume::Windows, &config("SYSTEM"), &hive);
    guest.write(DemoVolume::Windows, &config("SYSTEM.LOG2"), &log);
    guest.accepted("hive-log-lost");

    eprintln!("missing");
    let guest = Guest::new(WinVersion::Win10);
    guest.remove(DemoVolume::Windows, &config("SYSTEM"));
    guest.refused("hive-missing");
}

#[test]
fn select_names_no_control_set() {
    if !have(&TOOLS) {
        return;
    }
    let guest = Guest::new(WinVersion::Win10);
    // What runs now does not count: the boot loader sets it.
    guest.edit_hive("SYSTEM", |system| {
        system.dword("Select", "Current", 9);
    });
    guest.check("control-sets", "ok", 0);
    guest.edit_hive("SYSTEM", |system| {
        system.dword("Select", "Default", 9);
        system.dword("Select", "Current", 1);
    });
    guest.refused("default-control-set");
    guest.check("control-sets", "fault", 4);
}
