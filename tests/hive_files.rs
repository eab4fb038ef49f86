//! Real hives, logs and boot stores. Replay is verified against Windows' own results for the same
//! hives and against msuhanov/yarp, an independent implementation (run manually on the same files;
//! its numbers are asserted here).

#[path = "../src/skip.rs"]
mod skip;

use std::sync::Arc;

use hyper2kvm::registry::load::load;
use hyper2kvm::registry::recover::{Recovery, pending, recover};
use hyper2kvm::registry::{BaseBlock, Bcd, BcdDevice, HiveView, Key};
use sha2::{Digest, Sha256};
use skip::corpus;

/// Hive, LOG1 and LOG2 of a corpus directory.
fn with_logs(hive: &str, logs: [&str; 2]) -> Option<[Vec<u8>; 3]> {
    Some([corpus(hive)?, corpus(logs[0])?, corpus(logs[1])?])
}

fn new_1() -> Option<[Vec<u8>; 3]> {
    let hive = "logs-NewDirtyHive1/NewDirtyHive";
    with_logs(hive, [&format!("{hive}.LOG1"), &format!("{hive}.LOG2")])
}

fn new_2() -> Option<[Vec<u8>; 3]> {
    let hive = "logs-NewDirtyHive2/NewDirtyHive";
    with_logs(hive, [&format!("{hive}.LOG1"), &format!("{hive}.LOG2")])
}

fn old() -> Option<[Vec<u8>; 3]> {
    let hive = "logs-OldDirtyHive/OldDirtyHive";
    with_logs(hive, [&format!("{hive}.LOG1"), &format!("{hive}.LOG2")])
}

fn ntuser() -> Option<[Vec<u8>; 3]> {
    with_logs(
        "logs-ntuser/transactions_NTUSER.DAT",
        [
            "logs-ntuser/transactions_ntuser.dat.log1",
            "logs-ntuser/transactions_ntuser.dat.log2",
        ],
    )
}

fn replay(files: &[Vec<u8>; 3]) -> Recovery<'_> {
    let logs = [("LOG1", &files[1][..]), ("LOG2", &files[2][..])];
    let result = recover(&files[0], &logs).unwrap();
    // The assignment of file names must not matter.
    let swapped = recover(&files[0], &[logs[1], logs[0]]).unwrap();
    assert!(result.bytes == swapped.bytes && result.applied == swapped.applied);
    result
}

fn applied(result: &Recovery) -> Vec<(String, u32, u32, u32)> {
    let logs = result.applied.iter();
    logs.map(|l| (l.name.clone(), l.entries, l.first_seq, l.last_seq))
        .collect()
}

fn sha256(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The hive bins, which contain everything, including key timestamps.
fn bins(hive: &[u8]) -> &[u8] {
    let size = BaseBlock::parse(hive).unwrap().bins_size as usize;
    &hive[4096..4096 + size]
}

/// Keys, values, and a digest over a line for each of them in stored order.
fn content(hive: &[u8]) -> (usize, usize, String) {
    fn walk(key: &Key, path: &str, counts: &mut (usize, usize), dump: &mut Vec<u8>) {
        counts.0 += 1;
        dump.extend(format!("K\t{path}\n").bytes());
        for (name, value) in key.values().unwrap() {
            counts.1 += 1;
            let data: String = value.data.iter().map(|b| format!("{b:02x}")).collect();
            dump.extend(format!("V\t{path}\t{name}\t{}\t{data}\n", value.ty).bytes());
        }
        for key in key.keys().unwrap() {
            let path = format!("{path}\\{}", key.name().unwrap());
            walk(&key, &path, counts, dump);
        }
    }
    let mut counts = (0, 0);
    let mut dump = Vec::new();
    let view = HiveView::new(hive).unwrap();
    walk(&view.root().unwrap(), "", &mut counts, &mut dump);
    (counts.0, counts.1, sha256(&dump))
}

/// The differences of two byte strings, as (first, last) with gaps below 8 bytes closed.
fn differences(a: &[u8], b: &[u8]) -> Vec<(usize, usize)> {
    assert_eq!(a.len(), b.len());
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for i in (0..a.len()).filter(|i| a[*i] != b[*i]) {
        match runs.last_mut() {
            Some(run) if i - run.1 < 8 => run.1 = i,
            _ => runs.push((i, i)),
        }
    }
    runs
}

#[test]
fn equals_windows_10_to_the_byte() {
    let (Some(files), Some(windows)) = (
        new_1(),
        corpus("logs-NewDirtyHive1/RecoveredHive_Windows10"),
    ) else {
        return;
    };
    let result = replay(&files);
    assert_eq!(
        applied(&result),
        [("LOG1".into(), 1, 2, 2), ("LOG2".into(), 3, 3, 5)]
    );
    assert!(result.was_dirty && result.usable && result.warnings.is_empty());
    assert!(result.bytes == windows, "base block included");

    // The same logs over a hive that has the first of them already.
    let Some(files) = new_2() else { return };
    let result = replay(&files);
    assert_eq!(applied(&result), [("LOG2".into(), 3, 3, 5)]);
    assert_eq!(
        result.skipped[0].reason.to_string(),
        "its changes are already in the hive: it starts at 2, the hive is at 3"
    );
    assert!(result.bytes == windows);
}

#[test]
fn equals_windows_7() {
    let (Some(files), Some(windows)) = (old(), corpus("logs-OldDirtyHive/RecoveredHive_Windows7"))
    else {
        return;
    };
    let result = replay(&files);
    assert_eq!(applied(&result), [("LOG1".into(), 1, 5, 5)]);
    assert!(result.usable && result.warnings.is_empty());
    assert_eq!(
        content(&result.bytes),
        (
            5003,
            1,
            "87f07a53663826553dfe21ccedc16fdaaa482ed39be8c64674f087fb1ccbaae5".into()
        )
    );
    assert_eq!(content(&result.bytes), content(&windows));
    // Windows wrote to the hive once more, from another path:
    assert_eq!(
        differences(&result.bytes, &windows),
        [
            (4, 16),            // sequence numbers 7, the time of that write
            (48, 82),           // the path
            (508, 511),         // hence the checksum
            (4116, 4120),       // that time again in the first hive bin
            (0x6bdc8, 0x6bdc8), // "longest value name" of a key, a derived number it corrected
        ]
    );
}

#[test]
fn equals_yarp_on_a_user_hive() {
    let Some(files) = ntuser() else { return };
    let result = replay(&files);
    assert_eq!(applied(&result), [("LOG1".into(), 23, 566, 588)]);
    assert_eq!(result.skipped.len(), 1, "LOG2 is stale");
    let base = BaseBlock::parse(&result.bytes).unwrap();
    assert_eq!((base.bins_size, base.primary_sequence), (925_696, 589));
    assert_eq!(
        content(&result.bytes),
        (
            3105,
            4695,
            "1d3580c33304a7c4131d6cd3b24325c454a9e7b0ba21e7b749af069b3a8b8cc6".into()
        )
    );
    assert_eq!(
        sha256(bins(&result.bytes)),
        "9c5e83727e19ff8f7fd95b73ba006dbc20dffbeead9ace35a88753f3fc7e4299"
    );
    // The input of an editor that ignores the logs.
    let (keys, values, _) = content(&files[0]);
    assert_eq!((keys, values), (2590, 4119));
}

#[test]
fn all_dirty_hives_load() {
    for files in [new_1(), new_2(), ntuser(), old()].into_iter().flatten() {
        let logs = [("LOG1", &files[1][..]), ("LOG2", &files[2][..])];
        let hive = load("HIVE", Arc::new(files[0].clone().into()), &logs).unwrap();
        assert!(hive.dirty && hive.replayed.is_some() && hive.warnings.is_empty());
    }
    let Some(stale) = corpus("win10-vmware/SYSTEM") else {
        return;
    };
    let hive = load("SYSTEM", Arc::new(stale.clone().into()), &[]).unwrap();
    assert!(hive.dirty && hive.replayed.is_none() && hive.bytes[..] == stale);
    assert_eq!(hive.warnings.len(), 1);
}

/// A log truncated anywhere: exactly the complete entries are replayed.
#[test]
fn every_truncation_replays_a_prefix() {
    let sets = [new_1(), new_2(), ntuser(), old()];
    for files in sets.iter().flatten() {
        for cut_log in 1..=2 {
            let whole = &files[cut_log];
            let mut results: Vec<(u32, String)> = Vec::new();
            // Not 0: without its base block the log counts as absent, and the other one is used.
            for len in (512..=whole.len()).step_by(512) {
                let mut logs = [("LOG1", &files[1][..]), ("LOG2", &files[2][..])];
                logs[cut_log - 1].1 = &whole[..len];
                let count = pending(&files[0], &logs);
                // One full replay for each outcome; the entries are checked every time.
                if results.last().is_none_or(|(last, _)| *last != count) {
                    let result = recover(&files[0], &logs).unwrap();
                    assert_eq!(result.usable, count > 0);
                    assert_eq!(result.entries(), count);
                    results.push((count, sha256(&result.bytes)));
                }
            }
            let counts: Vec<u32> = results.iter().map(|(count, _)| *count).collect();
            assert!(counts.is_sorted(), "{counts:?}");
            let logs = [("LOG1", &files[1][..]), ("LOG2", &files[2][..])];
            let all = pending(&files[0], &logs);
            assert_eq!(counts.last().copied().unwrap_or(all), all);
        }
    }
}

/// Expected values decoded manually from the output of `hivexregedit --export`.
#[test]
fn boot_store_of_an_installed_windows() {
    let Some(bytes) = corpus("bcd/BCD") else {
        return;
    };
    let bcd = Bcd::parse(&HiveView::new(&bytes).unwrap()).unwrap();
    assert_eq!(bcd.objects.len(), 17);
    let disk = "0b2394a9-095e-487d-8d48-719ecd4d78ca";
    let esp = BcdDevice::Gpt {
        disk: disk.into(),
        partition: "36be3955-63bf-4068-a6ab-00195cca3a22".into(),
    };
    assert_eq!(bcd.boot_device, Some(esp));
    assert!(bcd.graphics_mode_disabled.is_empty());

    let windows = BcdDevice::Gpt {
        disk: disk.into(),
        partition: "8e0f2c38-e4ea-47ba-b7fc-9d8c74dccf0b".into(),
    };
    let loader = bcd.default_loader().unwrap();
    assert_eq!(loader.id, "{733b62e5-f608-11eb-825c-c112f60133ab}");
    assert_eq!(loader.description.as_deref(), Some("Windows 10"));
    assert_eq!(
        loader.path.as_deref(),
        Some("\\Windows\\system32\\winload.efi")
    );
    assert_eq!(loader.system_root.as_deref(), Some("\\Windows"));
    assert_eq!(loader.device, Some(windows.clone()));
    assert_eq!(loader.os_device, Some(windows));
    assert!(!loader.is_transient());

    let others: Vec<_> = bcd.loaders.iter().filter(|l| l.id != loader.id).collect();
    assert_eq!(others.len(), 1);
    assert_eq!(
        others[0].description.as_deref(),
        Some("Windows Recovery Environment")
    );
    assert_eq!(others[0].os_device, Some(BcdDevice::Ramdisk));
    assert!(others[0].is_transient());
}

#[test]
fn boot_store_of_setup_media() {
    let Some(bytes) = corpus("bcd/BCD-winpe") else {
        return;
    };
    let bcd = Bcd::parse(&HiveView::new(&bytes).unwrap()).unwrap();
    assert_eq!((bcd.objects.len(), bcd.loaders.len()), (9, 1));
    assert_eq!(bcd.boot_device, None);
    let loader = bcd.default_loader().unwrap();
    assert_eq!(loader.description.as_deref(), Some("Windows Setup"));
    assert_eq!(
        loader.path.as_deref(),
        Some("\\windows\\system32\\boot\\winload.efi")
    );
    assert!(loader.win_pe && loader.is_transient());
}
