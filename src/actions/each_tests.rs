//! What each action does, says and compares.

use super::*;

#[test]
fn files_of_the_drivers_are_copied_after_their_directories_and_what_they_replace_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = FakeGuest::default();
    before.file(2, "\\Windows\\old.sys", b"another".to_vec());
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
    ];
    assert_eq!(written, wanted);
    let changes = applied.result.unwrap();
    let backups: Vec<_> = changes
        .iter()
        .map(|change| change.backup.as_deref())
        .collect();
    let kept = "backup/files/Windows/old.sys";
    assert_eq!(backups, [None, None, None, Some(kept)]);
    assert_eq!(fs::read(dir.path().join(kept)).unwrap(), b"another");
    for change in &changes[2..] {
        assert_eq!(change.after.as_ref().unwrap().sha256, sha256_hex(b"new"));
    }

    assert_eq!(copy.id(), "files-x");
    let said = copy.describe();
    for part in ["Install x: 2 files (", "2 new directories"] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(
        (copy.volume(), copy.fail_point()),
        (None, Some("file-written"))
    );
    let with_folders = copy.overlay_bytes();
    copy.folders.clear();
    assert_eq!(with_folders - copy.overlay_bytes(), 2 << 16);
    assert!(!copy.describe().contains("director"));

    let verified = |guest: &FakeGuest, media: &Memory| {
        let hives = hives(hive(3));
        copy.verify(&Converted {
            volume: WINDOWS,
            guest,
            hives: &hives,
            media,
        })
    };
    let media = Memory::new([("new.sys".to_string(), b"new".to_vec())]);
    assert!(verified(&before, &media).unwrap_err().contains("new.sys"));
    before.file(2, "\\a\\b\\new.sys", b"new".to_vec());
    before.file(2, "\\Windows\\old.sys", b"neW".to_vec());
    let said = verified(&before, &media).unwrap_err();
    assert!(said.contains("old.sys differs from new.sys"), "{said}");
    before.file(2, "\\Windows\\old.sys", b"new".to_vec());
    assert_eq!(verified(&before, &media), Ok(2));
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
    let all = hives(hive(3));
    let size = all.system.bytes.len() as u64;
    let writes = plain.writes(&all);
    assert_eq!(
        writes.files,
        [(&path(SYSTEM), size + 2 * text + (64 << 10))]
    );
    assert_eq!((writes.folders, writes.originals), (None, size));

    let copy = CopyInGuest {
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
    assert!(copy.overlay_bytes() > 1 << 16);
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
        let (all, media) = (hives(bytes), Memory::new([]));
        action.verify(&Converted {
            volume: WINDOWS,
            guest: &FakeGuest::default(),
            hives: &all,
            media: &media,
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
}

/// In place the originals are all there is of the old guest; for a copy they become durable with the rest of the directory.
#[test]
fn what_is_kept_is_durable_where_the_disk_itself_is_written() {
    use crate::files::order;
    let dir = tempfile::tempdir().unwrap();
    for (durably, len) in [(true, 5), (true, 2 << 20), (false, 5), (false, 2 << 20)] {
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
