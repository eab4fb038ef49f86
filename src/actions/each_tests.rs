//! What each action does, says and compares.

use super::*;

#[test]
fn files_of_the_drivers_are_copied_after_their_directories_and_what_they_replace_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = FakeGuest::default();
    before.file(2, "\\Windows\\old.sys", b"another".to_vec());
    before.file(2, "\\a\\old.sys", b"older".to_vec());
    let file = |to: &str, replaces| FileCopy {
        to: path(to),
        from: "new.sys".into(),
        size: 3,
        replaces,
    };
    let mut copy = CopyFiles {
        id: "files-x".into(),
        title: "Install x".into(),
        folders: vec![path("\\a"), path("\\a\\b")],
        files: vec![
            file("\\a\\b\\new.sys", false),
            file("\\Windows\\old.sys", true),
            file("\\a\\old.sys", true),
        ],
    };
    let applied = apply(&copy, &before, hives(hive(3)), given(&hive(0)), dir.path());
    let written: Vec<_> = applied
        .log
        .iter()
        .map(|(how, volume, to, bytes)| (*how, *volume, to.as_str(), &bytes[..]))
        .collect();
    let wanted = [
        ("dir", WINDOWS, "\\a", &b""[..]),
        ("dir", WINDOWS, "\\a\\b", b""),
        ("file", WINDOWS, "\\a\\b\\new.sys", b"new"),
        ("file", WINDOWS, "\\Windows\\old.sys", b"new"),
        ("file", WINDOWS, "\\a\\old.sys", b"new"),
    ];
    assert_eq!(written, wanted);
    let changes = applied.result.unwrap();
    let backups: Vec<_> = changes
        .iter()
        .map(|change| change.backup.as_deref())
        .collect();
    // Two files of one name are kept as two.
    let kept = ["backup/files/Windows/old.sys", "backup/files/a/old.sys"];
    assert_eq!(backups, [None, None, None, Some(kept[0]), Some(kept[1])]);
    let originals = kept.map(|kept| fs::read(dir.path().join(kept)).unwrap());
    assert_eq!(originals, [&b"another"[..], b"older"]);
    for change in &changes[2..] {
        assert_eq!(change.after.as_ref().unwrap().sha256, sha256_hex(b"new"));
    }

    assert_eq!(copy.id(), "files-x");
    copy.files[1].size = 4 << 20;
    assert_eq!(
        copy.describe(),
        "Install x: 3 files (4.0 MiB), 2 new directories"
    );
    let all = hives(hive(3));
    let writes = |copy: &CopyFiles| {
        let writes = copy.writes(&all);
        let sizes: Vec<_> = writes.files.iter().map(|(_, size)| *size).collect();
        (writes.folders, sizes)
    };
    assert_eq!(writes(&copy), (Some(2), vec![3, 4 << 20, 3]));
    assert_eq!(
        (copy.volume(), copy.fail_point()),
        (None, Some("file-written"))
    );
    let with_folders = copy.overlay_bytes();
    copy.folders.clear();
    // The directories that are there already take many files.
    assert_eq!(writes(&copy).0, Some(0));
    assert_eq!(with_folders - copy.overlay_bytes(), 2 << 16);
    assert!(!copy.describe().contains("director"));

    let verified = |guest: &FakeGuest, driver_source: &Memory| {
        let hives = hives(hive(3));
        copy.verify(&Converted {
            volume: WINDOWS,
            guest,
            hives: &hives,
            driver_source,
        })
    };
    let driver_source = Memory::new([("new.sys".to_string(), b"new".to_vec())]);
    assert!(
        verified(&before, &driver_source)
            .unwrap_err()
            .contains("new.sys")
    );
    before.file(2, "\\a\\b\\new.sys", b"new".to_vec());
    before.file(2, "\\Windows\\old.sys", b"neW".to_vec());
    let said = verified(&before, &driver_source).unwrap_err();
    assert!(said.contains("old.sys differs from new.sys"), "{said}");
    before.file(2, "\\Windows\\old.sys", b"new".to_vec());
    before.file(2, "\\a\\old.sys", b"new".to_vec());
    assert_eq!(verified(&before, &driver_source), Ok(3));
    assert!(verified(&before, &Memory::new([])).is_err());
}

#[test]
fn an_action_says_what_it_does_and_what_it_takes() {
    let (plain, replayed) = (edit(&[]), edit(&[LOG]));
    assert_eq!(plain.describe(), format!("Drivers: 1 edit in {SYSTEM}"));
    assert!(
        replayed
            .describe()
            .ends_with(", transaction logs replayed and reset")
    );
    let text = plain.edits.to_reg_text().len() as u64;
    assert!(text > 40, "{text}");
    // Three clusters, and the text in UTF-16.
    assert_eq!(plain.overlay_bytes(), (3 << 16) + 2 * text);
    // Each edit may be in a cluster of its own.
    let mut three = plain.clone();
    three
        .edits
        .ops
        .extend([plain.edits.ops[0].clone(), plain.edits.ops[0].clone()]);
    let text = three.edits.to_reg_text().len() as u64;
    assert_eq!(three.overlay_bytes(), (5 << 16) + 2 * text);
    let text = plain.edits.to_reg_text().len() as u64;
    let all = hives(hive(3));
    let size = all.system.bytes.len() as u64;
    let writes = plain.writes(&all);
    assert_eq!(
        writes.files,
        [(&path(SYSTEM), size + 2 * text + (64 << 10))]
    );
    assert_eq!((writes.folders, writes.originals), (None, size));

    let mut copy = CopyInGuest {
        id: "uefi-fallback".into(),
        title: "Loader".into(),
        volume: OTHER,
        folder: None,
        from: path("\\a.efi"),
        to: path("\\b.efi"),
        size: 1,
        replaces: false,
    };
    let sector = PatchBootSector {
        id: "boot-sector".into(),
        title: "Numbers".into(),
        volume: OTHER,
        fields: vec![SectorField {
            name: "heads",
            offset: 26,
            old: vec![0, 0],
            new: vec![255, 0],
        }],
    };
    assert_eq!(sector.describe(), format!("Numbers: heads on {OTHER}"));
    assert_eq!(sector.overlay_bytes(), 1 << 16);
    // A cluster of data, and two of what names it.
    assert_eq!(copy.overlay_bytes(), 3 << 16);
    assert_eq!(copy.describe(), "Loader: \\a.efi to \\b.efi");
    for replaces in [true, false] {
        copy.replaces = replaces;
        let writes = copy.writes(&all);
        assert_eq!(writes.files, [(&path("\\b.efi"), 1)]);
        assert_eq!((writes.folders, writes.originals), (None, 0));
    }
    let writes = sector.writes(&all);
    assert_eq!((writes.files, writes.originals), (vec![], 0));
    let actions = [
        Action::EditHive(plain),
        Action::CopyInGuest(copy),
        Action::PatchBootSector(sector),
    ];
    let known: Vec<_> = actions
        .iter()
        .map(|a| (a.id(), a.volume(), a.fail_point()))
        .collect();
    let wanted = [
        ("hive-system", Some(WINDOWS), Some("hive-written")),
        ("uefi-fallback", Some(OTHER), None),
        ("boot-sector", Some(OTHER), None),
    ];
    assert_eq!(known, wanted);
    let kinds: Vec<_> = actions.iter().map(|action| action.kind()).collect();
    assert_eq!(kinds, [Kind::Registry, Kind::Files, Kind::Files]);
}

#[test]
fn a_hive_is_as_planned_only_with_every_value_of_the_plan() {
    let mut action = edit(&[]);
    let type_of = |service: &str| {
        let key = format!("ControlSet001\\Services\\{service}");
        RegOp::set(key, "Type", RegData::Dword(7))
    };
    let verified = |action: &EditHive, bytes: Vec<u8>| {
        let (all, driver_source) = (hives(bytes), Memory::new([]));
        action.verify(&Converted {
            volume: WINDOWS,
            guest: &FakeGuest::default(),
            hives: &all,
            driver_source: &driver_source,
        })
    };
    assert_eq!(verified(&action, hive(0)), Ok(1));
    let said = verified(&action, hive(3)).unwrap_err();
    assert!(said.contains("viostor is not as planned"), "{said}");
    assert!(verified(&action, Vec::new()).is_err());
    // The first one in the order of the plan is named.
    action.edits.ops.extend(["one", "two"].map(type_of));
    let said = verified(&action, hive(0)).unwrap_err();
    assert!(said.contains("one is not as planned"), "{said}");
    // What is to go is looked for too.
    let key = || "ControlSet001\\Services\\other".to_string();
    let name = || "Start".to_string();
    for gone in [
        RegOp::DeleteValue {
            key: key(),
            name: name(),
        },
        RegOp::DeleteKey { key: key() },
    ] {
        let mut action = edit(&[]);
        action.edits.ops.push(gone);
        let said = verified(&action, super::tests::hive(0)).unwrap_err();
        assert!(said.contains("other is not as planned"), "{said}");
        let mut tree = tree(0);
        tree.remove(&key());
        assert_eq!(verified(&action, tree.to_bytes("SYSTEM")), Ok(2));
    }
    // Nothing is as planned in a hive that is not there any more.
    for hive in [HiveName::Drivers, HiveName::Bcd] {
        let action = EditHive {
            hive,
            ..action.clone()
        };
        let said = verified(&action, super::tests::hive(0)).unwrap_err();
        assert_eq!(said, "the hive was not read");
    }
}

/// In place the originals are all there is of the old guest. For a copy they become durable with
/// the rest of the directory.
#[test]
fn what_is_kept_is_durable_where_the_disk_itself_is_written() {
    use crate::files::order;
    let dir = tempfile::tempdir().unwrap();
    // The shorter ones replace what an earlier run has left.
    for (durably, len) in [(true, 2 << 20), (true, 5), (false, 2 << 20), (false, 5)] {
        let saver = Saver {
            folder: dir.path().join(format!("{durably}")),
            durably,
        };
        let bytes: Vec<u8> = (0..len).map(|i: u32| (i / 7) as u8).collect();
        order::seen();
        let path = saver.save("backup/files/kept", &bytes).unwrap();
        let synced = order::seen().contains(&"sync kept".to_string());
        assert_eq!(synced, durably, "{len}");
        assert_eq!(path, saver.folder.join("backup/files/kept"));
        assert!(fs::read(path).unwrap() == bytes, "{durably} {len}");
    }
}

/// Carries out actions in their order, with the hives as the editor gives them back.
fn apply_all(
    actions: &[Action],
    before: &FakeGuest,
    hives: Hives,
    edited: Vec<(HiveName, Edited)>,
    folder: &Path,
) -> Applied {
    let edited = EditedHives::done(edited);
    let saver = Saver {
        folder: folder.to_path_buf(),
        durably: false,
    };
    let log = Log::default();
    let mut merging = Merging::new(before, hives);
    for action in actions {
        action.prepare(&mut merging).unwrap();
    }
    let mut merges = merging.back_up(&saver).merge(&edited);
    merges.backed_up().unwrap();
    let mut work = Work {
        volume: WINDOWS,
        driver_source: &Memory::new([]),
        before,
        writer: Box::new(Writer(log.clone(), before.clone())),
        saver,
        hives: merges,
        walking: Vec::new(),
    };
    let changes = actions.iter().map(|action| action.apply(&mut work));
    let result = changes.collect::<Result<Vec<_>, _>>();
    let (places, walked) = walked(work.walking);
    let log = log.lock().unwrap().clone();
    Applied {
        result: result.map(|changes| changes.into_iter().flatten().collect()),
        log,
        places,
        walked,
    }
}

const SOFTWARE: &str = "\\Windows\\System32\\config\\SOFTWARE";
const BCD: &str = "\\EFI\\Microsoft\\Boot\\BCD";

/// An edit of another hive, on its volume.
fn edit_of(hive: HiveName, volume: VolumeId, at: &str) -> EditHive {
    EditHive {
        id: format!("hive-{}", hive.file_name().to_lowercase()),
        hive,
        volume,
        path: path(at),
        ..edit(&[])
    }
}

#[test]
fn each_hive_is_saved_edited_and_walked_as_itself() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = FakeGuest::default();
    let olds = [
        (HiveName::Software, WINDOWS, SOFTWARE, 9, 5),
        (HiveName::Bcd, OTHER, BCD, 8, 6),
        (HiveName::System, WINDOWS, SYSTEM, 3, 7),
    ];
    for (_, volume, at, was, _) in olds {
        before.file(volume.partition, at, hive(was)).compressed = true;
    }
    let all = Hives {
        bcd: Some(loaded(BCD, hive(8))),
        ..hives(hive(3))
    };
    let mut actions = Vec::new();
    let mut edited = Vec::new();
    for (name, volume, at, _, becomes) in olds {
        let mut action = edit_of(name, volume, at);
        action.edits.ops = vec![RegOp::set(
            "ControlSet001\\Services\\viostor",
            "Start",
            RegData::Dword(becomes),
        )];
        actions.push(Action::EditHive(action));
        edited.push((name, given(&hive(becomes))));
    }
    let applied = apply_all(&actions, &before, all, edited, dir.path());
    let changes = applied.result.unwrap();
    for (i, (name, volume, at, was, becomes)) in olds.into_iter().enumerate() {
        let (was, becomes) = (hive(was), hive(becomes));
        let (how, of, to, bytes) = &applied.log[i];
        assert_eq!((*how, *of, to.as_str()), ("file", volume, at));
        assert!(*bytes == becomes, "{at}");
        let change = &changes[i];
        let backup = format!("backup/{}", name.file_name());
        assert_eq!(change.backup.as_ref(), Some(&backup));
        assert!(fs::read(dir.path().join(backup)).unwrap() == was, "{at}");
        let digest = |facts: &Option<FileFacts>| facts.as_ref().unwrap().sha256.clone();
        assert_eq!(digest(&change.before), sha256_hex(&was), "{at}");
        assert_eq!(digest(&change.after), sha256_hex(&becomes), "{at}");
        let walked = &applied.walked[i];
        assert!(walked.hive == name && walked.bytes[..] == becomes[..]);
        let text = format!("registry/{}.reg", name.file_name());
        assert!(dir.path().join(text).exists(), "{at}");
    }
}

/// A hive of several blocks with a number in the first and in the last one.
fn long_hive(start: u32, number: u32) -> Vec<u8> {
    let mut tree = tree(start);
    tree.dword("ControlSet001\\Services\\viostor", "Tag", number);
    let old = RegData::Binary(vec![7; 12_000]);
    let last = RegData::Binary(number.to_le_bytes().repeat(3000));
    tree.set("ControlSet001", "Old", old)
        .set("Zz", "Last", last);
    tree.to_bytes("SYSTEM")
}

/// Logs are emptied whether or not they applied: an old page must not be replayed over an edit.
#[test]
fn a_hive_is_written_whole_on_its_volume_and_every_log_of_it_is_saved_and_emptied() {
    const LOG2: &str = "\\Windows\\System32\\config\\SYSTEM.LOG2";
    for (replayed, compressed) in [(true, false), (false, false), (true, true)] {
        let at = format!("replayed: {replayed}, compressed: {compressed}");
        let dir = tempfile::tempdir().unwrap();
        // What the log has is in another block than the edit.
        let stored = long_hive(3, if replayed { 1 } else { 2 });
        let new = long_hive(0, 2);
        let mut before = FakeGuest::default();
        before.file(1, SYSTEM, stored.clone()).compressed = compressed;
        let logs = [
            ("\\empty.LOG", &b""[..]),
            (LOG, &b"pages"[..]),
            (LOG2, b"more pages"),
        ];
        for (log, was) in logs {
            before.file(1, log, was.to_vec());
        }
        let mut all = hives(long_hive(3, 2));
        all.system.replayed = replayed;
        let action = EditHive {
            volume: OTHER,
            ..edit(&logs.map(|(log, _)| log))
        };
        let applied = apply(&action, &before, all, given(&new), dir.path());
        let changes = applied.result.unwrap();
        let how = if compressed { "file" } else { "patch" };
        let (found, volume, to, bytes) = &applied.log[0];
        assert_eq!((*found, *volume, to.as_str()), (how, OTHER, SYSTEM), "{at}");
        assert!(*bytes == new, "{at}");
        assert!(applied.walked[0].walk.is_ok());
        assert_eq!(applied.places, [(OTHER, path(SYSTEM))]);
        let kept = changes[0].backup.as_ref().unwrap();
        assert!(fs::read(dir.path().join(kept)).unwrap() == stored, "{at}");
        // An empty one stays.
        for (i, (log, was)) in logs.into_iter().enumerate().skip(1) {
            let (how, volume, to, bytes) = &applied.log[i];
            let found = (*how, *volume, to.as_str(), bytes.len());
            assert_eq!(found, ("file", OTHER, log, 0), "{at}");
            let change = &changes[i];
            let backup = change.backup.as_ref().unwrap();
            assert_eq!(fs::read(dir.path().join(backup)).unwrap(), was);
            assert_eq!(change.before.as_ref().unwrap().size, was.len() as u64);
            assert_eq!(change.path, log);
        }
        assert_eq!((applied.log.len(), changes.len()), (3, 3), "{at}");
        emptied_in_the_preview(action, &before);
    }
}

fn emptied_in_the_preview(action: EditHive, before: &FakeGuest) {
    let (driver_source, all) = (Memory::new([]), hives(hive(3)));
    let seen = PreviewHives {
        before: &all,
        edited: &|_| None,
    };
    let logs = action.reset_logs.clone();
    let actions = [Action::EditHive(action)];
    let preview = preview(&actions, seen, WINDOWS, before, &driver_source).unwrap();
    for log in logs {
        assert_eq!(preview.read(OTHER, &log, 99).unwrap(), b"", "{log}");
        let info = preview.stat(OTHER, &log).unwrap().unwrap();
        assert_eq!(info.size, 0, "{log}");
    }
}

/// The hives are saved side by side, and the first write waits for all of them.
#[test]
fn one_hive_that_cannot_be_saved_keeps_all_from_being_written() {
    let names = [(HiveName::System, SYSTEM), (HiveName::Software, SOFTWARE)];
    for (unsaved, _) in names {
        let dir = tempfile::tempdir().unwrap();
        // A directory is where the original would be.
        let taken = format!("backup/{}", unsaved.file_name());
        fs::create_dir_all(dir.path().join(taken)).unwrap();
        let before = FakeGuest::default();
        let mut merging = Merging::new(&before, hives(hive(3)));
        for (name, at) in names {
            edit_of(name, WINDOWS, at).prepare(&mut merging).unwrap();
        }
        let saver = Saver {
            folder: dir.path().to_path_buf(),
            durably: false,
        };
        let edited = names.map(|(name, _)| (name, given(&hive(0))));
        let edited = EditedHives::done(edited);
        let mut merges = merging.back_up(&saver).merge(&edited);
        let error = merges.backed_up().unwrap_err();
        assert!(matches!(error, ActionError::Io { .. }), "{error}");
    }
}

/// Boot managers read hives of the old version only.
#[test]
fn a_preview_of_a_hive_has_the_version_of_its_readers() {
    let (guest, driver_source) = (FakeGuest::default(), Memory::new([]));
    let all = Hives {
        bcd: Some(loaded(BCD, hive(3))),
        drivers: Some(loaded("\\Windows\\System32\\config\\DRIVERS", hive(3))),
        ..hives(hive(3))
    };
    let drivers = "\\Windows\\System32\\config\\DRIVERS";
    for (action, minor) in [
        (edit_of(HiveName::System, WINDOWS, SYSTEM), 5),
        (edit_of(HiveName::Drivers, WINDOWS, drivers), 5),
        (edit_of(HiveName::Bcd, OTHER, BCD), 3),
    ] {
        let seen = PreviewHives {
            before: &all,
            edited: &|_| None,
        };
        let actions = [Action::EditHive(action.clone())];
        let preview = preview(&actions, seen, WINDOWS, &guest, &driver_source).unwrap();
        let bytes = preview.read(action.volume, &action.path, 1 << 20).unwrap();
        assert_eq!(bytes[24..28], [minor, 0, 0, 0], "{:?}", action.hive);
        assert!(
            action
                .edits
                .pending(&HiveView::new(&bytes).unwrap().root().unwrap())
                .unwrap()
                .ops
                .is_empty()
        );
        // On another volume there is no such file.
        let other = [WINDOWS, OTHER].into_iter().find(|v| *v != action.volume);
        assert!(preview.read(other.unwrap(), &action.path, 1 << 20).is_err());
    }
    // None of them is read again where nothing is edited.
    let seen = PreviewHives {
        before: &all,
        edited: &|_| None,
    };
    let unchanged = preview(&[], seen, WINDOWS, &guest, &driver_source).unwrap();
    for (at, bytes) in [
        (SYSTEM, &all.system.bytes),
        (SOFTWARE, &all.software.bytes),
        (drivers, &all.drivers.as_ref().unwrap().bytes),
    ] {
        let shared = unchanged.read_shared(WINDOWS, &path(at), 1 << 20).unwrap();
        assert!(Arc::ptr_eq(&shared, bytes), "{at}");
    }
    // A hive that the guest does not have is not made up.
    let none = hives(hive(3));
    let seen = PreviewHives {
        before: &none,
        edited: &|_| Some(hive(7).into()),
    };
    let actions = [Action::EditHive(edit_of(HiveName::Bcd, OTHER, BCD))];
    let preview = preview(&actions, seen, WINDOWS, &guest, &driver_source).unwrap();
    assert!(preview.stat(OTHER, &path(BCD)).unwrap().is_none());
}

/// The limit is for all that is in memory at once: the hives of the guest and the copy that is edited.
#[test]
fn a_very_large_hive_is_edited_later() {
    let of_size = |mib: usize| loaded(SOFTWARE, vec![0; mib << 20]);
    // The sizes of SYSTEM, SOFTWARE and DRIVERS.
    for (sizes, early) in [
        ([0, 200, 0], true),
        ([0, 230, 0], false),
        ([120, 170, 0], false),
        ([0, 170, 120], false),
    ] {
        let [system, software, drivers] = sizes.map(of_size);
        let all = Hives {
            system,
            software,
            drivers: Some(drivers).filter(|_| sizes[2] > 0),
            bcd: None,
        };
        let edits = edit(&[]).edits;
        let of_bcd = (HiveName::Bcd, &edits);
        let wanted = [(HiveName::Software, &edits), of_bcd];
        let edited = EditedHives::of(wanted.into_iter(), &all);
        let started = edited.take(HiveName::Software).map(|edit| edit.finished());
        assert_eq!(started.is_some(), early, "{sizes:?}");
        // There is none to edit.
        assert!(edited.take(HiveName::Bcd).is_none());
    }
    // A small one is edited beside a large one.
    let all = Hives {
        software: of_size(230),
        ..hives(hive(3))
    };
    let edits = edit(&[]).edits;
    let edited = EditedHives::of([(HiveName::System, &edits)].into_iter(), &all);
    assert!(edited.take(HiveName::System).is_some());
}

#[test]
fn edits_are_those_of_the_hives_in_the_order_of_the_plan() {
    let files = Action::CopyFiles(CopyFiles {
        id: "files".into(),
        title: "copy".into(),
        folders: vec![],
        files: vec![],
    });
    let software = edit_of(HiveName::Software, WINDOWS, SOFTWARE);
    let actions = [
        Action::EditHive(software),
        files,
        Action::EditHive(edit(&[])),
    ];
    let found: Vec<_> = edits(&actions)
        .map(|(hive, edits)| (hive, edits.ops.len()))
        .collect();
    assert_eq!(found, [(HiveName::Software, 1), (HiveName::System, 1)]);
}

/// A sound edit of one hive says nothing of another.
#[test]
fn a_hive_without_its_edits_is_not_written_whichever_it_is() {
    let drivers = "\\Windows\\System32\\config\\DRIVERS";
    for (name, volume, at) in [
        (HiveName::System, WINDOWS, SYSTEM),
        (HiveName::Software, WINDOWS, SOFTWARE),
        (HiveName::Drivers, WINDOWS, drivers),
        (HiveName::Bcd, OTHER, BCD),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut before = FakeGuest::default();
        before.file(volume.partition, at, hive(3));
        let all = Hives {
            software: loaded(SOFTWARE, hive(3)),
            drivers: Some(loaded(drivers, hive(3))),
            bcd: Some(loaded(BCD, hive(3))),
            ..hives(hive(3))
        };
        let action = Action::EditHive(edit_of(name, volume, at));
        let edited = vec![(name, given(&hive(3)))];
        let applied = apply_all(&[action], &before, all, edited, dir.path());
        let Err(ActionError::Hive { hive, source }) = applied.result else {
            panic!("{at}: {:?}", applied.result);
        };
        assert_eq!(hive, name.file_name());
        let said = source.to_string();
        assert!(said.starts_with("1 edits are not there"), "{said}");
        assert_eq!(applied.log, [], "{at}");
    }
}

/// The editor gives each of them back in another size.
#[test]
fn a_hive_in_a_preview_has_its_own_size_and_is_read_up_to_a_limit_of_its_own() {
    let (guest, driver_source) = (FakeGuest::default(), Memory::new([]));
    let drivers = "\\Windows\\System32\\config\\DRIVERS";
    let all = Hives {
        software: loaded(SOFTWARE, Vec::new()),
        drivers: Some(loaded(drivers, hive(3))),
        bcd: Some(loaded(BCD, hive(3))),
        ..hives(hive(3))
    };
    let size = |hive| match hive {
        HiveName::System => 300,
        HiveName::Software => 500,
        HiveName::Drivers => 200,
        HiveName::Bcd => 400,
    };
    let places = [
        (HiveName::System, WINDOWS, SYSTEM),
        (HiveName::Software, WINDOWS, SOFTWARE),
        (HiveName::Drivers, WINDOWS, drivers),
        (HiveName::Bcd, OTHER, BCD),
    ];
    let actions = places.map(|(hive, volume, at)| Action::EditHive(edit_of(hive, volume, at)));
    let seen = PreviewHives {
        before: &all,
        edited: &|hive| Some(vec![7; size(hive)].into()),
    };
    let preview = preview(&actions, seen, WINDOWS, &guest, &driver_source).unwrap();
    for (hive, volume, at) in places {
        let (at, size) = (path(at), size(hive) as u64);
        let info = preview.stat(volume, &at).unwrap().unwrap();
        assert_eq!(info.size, size, "{at}");
        for (limit, fits) in [(size, true), (size - 1, false)] {
            let shared = preview.read_shared(volume, &at, limit);
            assert_eq!(shared.is_ok(), fits, "{at} {limit}");
            let read = preview.read(volume, &at, limit);
            assert_eq!(read.is_ok(), fits, "{at} {limit}");
        }
    }
}
