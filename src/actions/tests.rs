//! Actions carried out on a guest in memory, foreseen and compared, without a program or a library.

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Arc, Mutex};

use super::change::FileFacts;
use super::edited::Edited;
use super::*;
use crate::drivers::driver_source::Memory;
use crate::guest::{
    Extent, FileKind, GuestError, GuestPath, GuestWrite, Result as GuestResult, VolumeId,
};
use crate::inspect::fake::FakeGuest;
use crate::inspect::{Hives, LoadedBytes, SectorField};
use crate::registry::confined::{HiveEditError, HiveFile};
use crate::registry::{HiveView, KeyTree, RegData, RegEdits, RegOp, base};
use crate::text::sha256_hex;

const WINDOWS: VolumeId = VolumeId::new(2);
const OTHER: VolumeId = VolumeId::new(1);

fn path(path: &str) -> GuestPath {
    GuestPath::parse(path).unwrap()
}

/// What was written, in order: how, to which volume, where, and with which contents.
type Log = Arc<Mutex<Vec<(&'static str, VolumeId, String, Vec<u8>)>>>;

/// Notes what is written to a guest; of a patched file, all it then holds.
struct Writer(Log, FakeGuest);

impl Writer {
    fn log(&self, how: &'static str, volume: VolumeId, path: &GuestPath, bytes: &[u8]) {
        let entry = (how, volume, path.to_string(), bytes.to_vec());
        self.0.lock().unwrap().push(entry);
    }
}

fn joined(extents: &[Extent]) -> Vec<u8> {
    extents.iter().flat_map(|e| e.data.clone()).collect()
}

impl GuestWrite for Writer {
    fn create_dir(&mut self, volume: VolumeId, path: &GuestPath) -> GuestResult<()> {
        self.log("dir", volume, path, b"");
        Ok(())
    }

    fn write_file(
        &mut self,
        volume: VolumeId,
        path: &GuestPath,
        contents: &[u8],
    ) -> GuestResult<()> {
        self.log("file", volume, path, contents);
        Ok(())
    }

    fn patch_file(
        &mut self,
        volume: VolumeId,
        path: &GuestPath,
        size: u64,
        extents: &[Extent],
    ) -> GuestResult<()> {
        let mut bytes = self.1.read(volume, path, 1 << 20)?;
        bytes.resize(size as usize, 0);
        for extent in extents {
            let start = extent.offset as usize;
            bytes[start..start + extent.data.len()].copy_from_slice(&extent.data);
        }
        self.log("patch", volume, path, &bytes);
        Ok(())
    }

    fn patch_boot_sector(&mut self, volume: VolumeId, extents: &[Extent]) -> GuestResult<()> {
        self.log("sector", volume, &path("$Boot"), &joined(extents));
        Ok(())
    }

    fn remove_file(&mut self, _: VolumeId, _: &GuestPath) -> GuestResult<()> {
        unreachable!()
    }

    fn remove_dir(&mut self, _: VolumeId, _: &GuestPath) -> GuestResult<()> {
        unreachable!()
    }

    fn close(self: Box<Self>) -> GuestResult<()> {
        Ok(())
    }
}

const SYSTEM: &str = "\\Windows\\System32\\config\\SYSTEM";
const LOG: &str = "\\Windows\\System32\\config\\SYSTEM.LOG1";

fn tree(start: u32) -> KeyTree {
    let mut tree = KeyTree::new("ROOT");
    tree.dword("Select", "Current", 1);
    tree.dword("ControlSet001\\Services\\viostor", "Start", start);
    tree.dword("ControlSet001\\Services\\viostor", "Type", 1);
    tree.dword("ControlSet001\\Services\\other", "Start", 2);
    tree
}

fn hive(start: u32) -> Vec<u8> {
    tree(start).to_bytes("SYSTEM")
}

fn loaded(path_of: &str, bytes: Vec<u8>) -> LoadedBytes {
    LoadedBytes {
        path: path(path_of),
        bytes: Arc::new(bytes.into()),
        replayed: false,
        logs: Vec::new(),
    }
}

fn hives(system: Vec<u8>) -> Hives {
    Hives {
        system: loaded(SYSTEM, system),
        software: loaded("\\Windows\\System32\\config\\SOFTWARE", hive(9)),
        drivers: None,
        bcd: None,
    }
}

fn edit(logs: &[&str]) -> EditHive {
    let start = RegOp::set(
        "ControlSet001\\Services\\viostor",
        "Start",
        RegData::Dword(0),
    );
    EditHive {
        id: "hive-system".into(),
        title: "Drivers".into(),
        hive: HiveName::System,
        volume: WINDOWS,
        path: path(SYSTEM),
        edits: RegEdits {
            ops: vec![start],
            ..RegEdits::new("HKEY_LOCAL_MACHINE\\SYSTEM")
        },
        reset_logs: logs.iter().map(|log| path(log)).collect(),
    }
}

/// The hive as the editor gives it back.
fn given(bytes: &[u8]) -> Edited {
    HiveFile::new(bytes)
}

struct Applied {
    result: Result<Vec<Change>, ActionError>,
    log: Vec<(&'static str, VolumeId, String, Vec<u8>)>,
    /// Where the walked hives were written to.
    places: Vec<(VolumeId, GuestPath)>,
    walked: Vec<Walked>,
}

fn walked(walking: Vec<Walking>) -> (Vec<(VolumeId, GuestPath)>, Vec<Walked>) {
    let place = |one: &Walking| (one.file().volume, one.file().path.clone());
    let places = walking.iter().map(place).collect();
    (places, walking.into_iter().map(Walking::join).collect())
}

/// Prepares and carries out one action; what is saved goes to `folder`.
fn apply(
    action: &dyn Act,
    before: &FakeGuest,
    hives: Hives,
    edited: Edited,
    folder: &Path,
) -> Applied {
    let edited = EditedHives::done([(HiveName::System, edited)]);
    let saver = Saver {
        folder: folder.to_path_buf(),
        durably: true,
    };
    let log = Log::default();
    let mut merging = Merging::new(before, hives);
    let prepared = action.prepare(&mut merging);
    let mut done = Default::default();
    let result = prepared.and_then(|()| {
        let mut merges = merging.back_up(&saver).merge(&edited);
        merges.backed_up()?;
        let mut work = Work {
            volume: WINDOWS,
            driver_source: &Memory::new([("new.sys".to_string(), b"new".to_vec())]),
            before,
            writer: Box::new(Writer(log.clone(), before.clone())),
            saver,
            hives: merges,
            walking: Vec::new(),
        };
        let changes = action.apply(&mut work)?;
        done = walked(work.walking);
        Ok(changes)
    });
    let log = log.lock().unwrap().clone();
    let (places, walked) = done;
    Applied {
        result,
        log,
        places,
        walked,
    }
}

use std::path::Path;

#[test]
fn an_edited_hive_is_saved_before_it_is_written_and_walked_as_it_was_written() {
    // Compressed by NTFS or not; replayed from its log or not.
    for (compressed, replayed) in [(false, false), (true, false), (false, true)] {
        let at = format!("compressed: {compressed}, replayed: {replayed}");
        let dir = tempfile::tempdir().unwrap();
        let on_disk = hive(if replayed { 4 } else { 3 });
        let mut before = FakeGuest::default();
        before.file(2, SYSTEM, on_disk.clone()).compressed = compressed;
        before.file(2, LOG, b"old pages".to_vec());
        before.file(2, "\\empty.LOG2", Vec::new());
        let logs: &[&str] = if replayed {
            &[LOG, "\\empty.LOG2"]
        } else {
            &[]
        };
        let action = edit(logs);
        let mut all = hives(hive(3));
        all.system.replayed = replayed;
        let new = hive(0);
        let applied = apply(&action, &before, all, given(&new), dir.path());
        let changes = applied.result.unwrap();

        let (how, volume, to, bytes) = &applied.log[0];
        assert_eq!((*volume, to.as_str()), (WINDOWS, SYSTEM), "{at}");
        assert_eq!(*how, if compressed { "file" } else { "patch" }, "{at}");
        assert!(bytes == &new, "{at}");
        // What was on the disk, not what was in memory.
        let kept = fs::read(dir.path().join("backup/SYSTEM")).unwrap();
        assert!(kept == on_disk, "{at}");
        let change = &changes[0];
        assert_eq!(change.backup.as_deref(), Some("backup/SYSTEM"), "{at}");
        let was = change.before.as_ref().unwrap();
        assert_eq!(
            (was.size, &was.sha256),
            (on_disk.len() as u64, &sha256_hex(&on_disk))
        );
        assert_eq!(
            change.after.as_ref().unwrap().sha256,
            sha256_hex(&new),
            "{at}"
        );
        let text = fs::read_to_string(dir.path().join("registry/SYSTEM.reg")).unwrap();
        assert!(text.contains("viostor"), "{text}");
        assert_eq!(applied.walked.len(), 1);
        assert!(applied.walked[0].walk.is_ok() && applied.walked[0].bytes[..] == new[..]);

        // The log that was replayed is emptied after the hive, and kept; an empty one stays.
        let rest: Vec<_> = applied.log[1..]
            .iter()
            .map(|(how, _, to, b)| (*how, to.as_str(), b.len()))
            .collect();
        let wanted: &[(&str, &str, usize)] = if replayed { &[("file", LOG, 0)] } else { &[] };
        assert_eq!(rest, wanted, "{at}");
        assert_eq!(changes.len(), 1 + wanted.len(), "{at}");
        if replayed {
            let kept = fs::read(dir.path().join(changes[1].backup.as_ref().unwrap())).unwrap();
            assert_eq!(kept, b"old pages");
            let facts = |facts: &Option<FileFacts>| {
                let facts = facts.as_ref().unwrap();
                (facts.size, facts.sha256.clone())
            };
            let of = |bytes: &[u8]| (bytes.len() as u64, sha256_hex(bytes));
            assert_eq!(facts(&changes[1].before), of(b"old pages"));
            assert_eq!(facts(&changes[1].after), of(b""));
        }
    }
}

#[test]
fn a_hive_that_is_not_as_it_should_be_after_the_edit_is_not_written() {
    let mut lost = tree(0);
    let service = lost.key_mut("ControlSet001\\Services\\viostor");
    service.values.retain(|(name, _)| name != "Type");
    let cases: [(&str, Edited); 4] = [
        ("nothing was edited", given(&hive(3))),
        ("a value beside it is gone", given(&lost.to_bytes("SYSTEM"))),
        ("it is no hive", given(b"regf and nothing else")),
        (
            "the editor failed",
            Err(HiveEditError::Child("died".into())),
        ),
    ];
    for (at, edited) in cases {
        let dir = tempfile::tempdir().unwrap();
        let mut before = FakeGuest::default();
        before.file(2, SYSTEM, hive(3));
        let applied = apply(&edit(&[]), &before, hives(hive(3)), edited, dir.path());
        assert!(applied.result.is_err(), "{at}");
        assert_eq!(applied.log, [], "{at}");
        assert!(dir.path().join("backup/SYSTEM").exists(), "{at}");
    }
}

#[test]
fn without_a_backup_or_a_hive_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = FakeGuest::default();
    before.file(2, SYSTEM, hive(3));
    // No directory can be made there.
    fs::write(dir.path().join("backup"), "in the way").unwrap();
    let applied = apply(
        &edit(&[]),
        &before,
        hives(hive(3)),
        given(&hive(0)),
        dir.path(),
    );
    assert!(matches!(applied.result, Err(ActionError::Io { .. })));
    assert_eq!(applied.log, []);

    let missing = EditHive {
        hive: HiveName::Drivers,
        ..edit(&[])
    };
    let dir = tempfile::tempdir().unwrap();
    let applied = apply(
        &missing,
        &before,
        hives(hive(3)),
        given(&hive(0)),
        dir.path(),
    );
    assert!(matches!(
        applied.result,
        Err(ActionError::NoHive("DRIVERS"))
    ));
}

#[test]
fn edits_that_fail_are_told_with_their_hive() {
    let fine = EditedHives::done([(HiveName::System, given(&hive(0)))]);
    check_edits(&fine).unwrap();
    let failed = || Err(HiveEditError::Library("full".into()));
    let edited = EditedHives::done([
        (HiveName::System, given(&hive(0))),
        (HiveName::Software, failed()),
    ]);
    assert!(edited.bytes(HiveName::System).unwrap().is_ok());
    // It stays for who writes it.
    assert!(edited.bytes(HiveName::System).unwrap().is_ok());
    assert!(edited.bytes(HiveName::Drivers).is_none());
    assert!(edited.bytes(HiveName::Software).is_none(), "not edited");
    let error = check_edits(&edited).unwrap_err();
    let of_software = matches!(
        error,
        ActionError::Edit {
            hive: "SOFTWARE",
            ..
        }
    );
    assert!(of_software, "{error}");
}

#[test]
fn files_of_the_guest_are_copied_within_their_volume() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = FakeGuest::default();
    before.file(
        1,
        "\\EFI\\Microsoft\\Boot\\bootmgfw.efi",
        b"loader".to_vec(),
    );
    before.file(1, "\\EFI\\Boot\\bootx64.efi", b"another".to_vec());
    let copy = |replaces, folder: Option<&str>| CopyInGuest {
        id: "uefi-fallback".into(),
        title: "Loader".into(),
        volume: OTHER,
        folder: folder.map(path),
        from: path("\\EFI\\Microsoft\\Boot\\bootmgfw.efi"),
        to: path("\\EFI\\Boot\\bootx64.efi"),
        size: 6,
        replaces,
    };
    let new = copy(false, Some("\\EFI\\Boot"));
    let applied = apply(&new, &before, hives(hive(3)), given(&hive(0)), dir.path());
    let written: Vec<_> = applied
        .log
        .iter()
        .map(|(how, v, to, b)| (*how, *v, to.as_str(), &b[..]))
        .collect();
    let loader = ("file", OTHER, "\\EFI\\Boot\\bootx64.efi", &b"loader"[..]);
    assert_eq!(written, [("dir", OTHER, "\\EFI\\Boot", &b""[..]), loader]);
    assert_eq!(applied.result.unwrap()[0].backup, None);

    let replacing = copy(true, None);
    let applied = apply(
        &replacing,
        &before,
        hives(hive(3)),
        given(&hive(0)),
        dir.path(),
    );
    assert_eq!(applied.log.len(), 1);
    let change = &applied.result.unwrap()[0];
    let kept = fs::read(dir.path().join(change.backup.as_ref().unwrap())).unwrap();
    assert_eq!(kept, b"another");
    assert_eq!(change.before.as_ref().unwrap().size, 7);
    assert!(replacing.describe().contains("replaced") && !new.describe().contains("replaced"));

    let verified = |guest: &FakeGuest| {
        let (hives, driver_source) = (hives(hive(3)), Memory::new([]));
        let after = Converted {
            volume: WINDOWS,
            guest,
            hives: &hives,
            driver_source: &driver_source,
        };
        replacing.verify(&after)
    };
    assert!(verified(&before).is_err());
    before.file(1, "\\EFI\\Boot\\bootx64.efi", b"loader".to_vec());
    assert_eq!(verified(&before), Ok(1));
    before.remove(1, "\\EFI\\Boot\\bootx64.efi");
    assert!(verified(&before).is_err());
}

#[test]
fn numbers_in_a_boot_sector_are_set_and_the_rest_of_it_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let sector: Vec<u8> = (0..512u32).map(|i| i as u8).collect();
    let mut before = FakeGuest::default();
    before.file(1, "$Boot", sector.clone());
    let field = |name, offset: u16, new: &[u8]| SectorField {
        name,
        offset,
        old: sector[usize::from(offset)..usize::from(offset) + new.len()].to_vec(),
        new: new.to_vec(),
    };
    let action = PatchBootSector {
        id: "boot-sector".into(),
        title: "Boot sector".into(),
        volume: OTHER,
        fields: vec![
            field("heads", 26, &[255, 0]),
            field("hidden sectors", 28, &[0, 8, 0, 0]),
        ],
    };
    let mut wanted = sector.clone();
    wanted[26..32].copy_from_slice(&[255, 0, 0, 8, 0, 0]);
    let applied = apply(
        &action,
        &before,
        hives(hive(3)),
        given(&hive(0)),
        dir.path(),
    );
    let changes = applied.result.unwrap();
    assert_eq!(
        applied.log,
        [("sector", OTHER, "\\$Boot".into(), vec![255, 0, 0, 8, 0, 0])]
    );
    let kept = fs::read(dir.path().join("backup/boot-sector")).unwrap();
    assert!(kept == sector && changes[0].backup.as_deref() == Some("backup/boot-sector"));
    let digest = |facts: &Option<FileFacts>| facts.as_ref().unwrap().sha256.clone();
    assert_eq!(digest(&changes[0].before), sha256_hex(&sector));
    assert_eq!(digest(&changes[0].after), sha256_hex(&wanted));

    // Foreseen, and compared field by field.
    let (all, driver_source) = (hives(hive(3)), Memory::new([]));
    let actions = [Action::PatchBootSector(action)];
    let seen = PreviewHives {
        before: &all,
        edited: &|_| None,
    };
    let shown = preview(&actions, seen, WINDOWS, &before, &driver_source).unwrap();
    assert!(shown.read(OTHER, &path("$Boot"), 512).unwrap() == wanted);
    let verified = |guest: &FakeGuest| {
        actions[0].verify(&Converted {
            volume: WINDOWS,
            guest,
            hives: &all,
            driver_source: &driver_source,
        })
    };
    assert!(verified(&before).is_err());
    let mut after = before.clone();
    after.file(1, "$Boot", wanted.clone());
    assert_eq!(verified(&after), Ok(0));
    wanted[28] = 63;
    after.file(1, "$Boot", wanted);
    assert!(verified(&after).unwrap_err().contains("hidden sectors"));
}

/// The files of a guest as a plan leaves them.
#[test]
fn a_preview_shows_what_the_plan_writes_and_else_what_is_there() {
    let mut guest = FakeGuest::default();
    guest
        .file(2, "\\Windows\\old.sys", b"old".to_vec())
        .compressed = true;
    guest
        .file(2, "\\Windows\\linked.sys", b"x".to_vec())
        .reparse_tag = Some(7);
    guest.file(1, "\\EFI\\loader.efi", b"loader".to_vec());
    guest.file(2, SYSTEM, b"on the disk".to_vec());
    let copy = |to: &str, replaces| FileCopy {
        to: path(to),
        from: "new.sys".into(),
        size: 3,
        replaces,
    };
    let actions = [
        Action::CopyFiles(CopyFiles {
            id: "files".into(),
            title: "copy".into(),
            folders: vec![],
            files: vec![
                copy("\\Windows\\old.sys", true),
                copy("\\Windows\\linked.sys", true),
                copy("\\Windows\\fresh.sys", false),
            ],
        }),
        Action::CopyInGuest(CopyInGuest {
            id: "copy".into(),
            title: "copy".into(),
            volume: OTHER,
            folder: None,
            from: path("\\EFI\\loader.efi"),
            to: path("\\EFI\\boot.efi"),
            size: 6,
            replaces: false,
        }),
    ];
    let driver_source = Memory::new([("new.sys".to_string(), b"new".to_vec())]);
    let mut all = hives(hive(3));
    let shown = |all: &Hives, look: &dyn Fn(&Preview<'_>)| {
        let seen = PreviewHives {
            before: all,
            edited: &|_| None,
        };
        look(&preview(&actions, seen, WINDOWS, &guest, &driver_source).unwrap());
    };
    shown(&all.clone(), &|preview| {
        for name in ["old", "linked", "fresh"] {
            let path = path(&format!("\\windows\\{name}.SYS"));
            assert_eq!(preview.read(WINDOWS, &path, 10).unwrap(), b"new", "{name}");
            assert_eq!(preview.read_at(WINDOWS, &path, 1, 9).unwrap(), b"ew");
            assert_eq!(preview.read_at(WINDOWS, &path, 1, 1).unwrap(), b"e");
            assert_eq!(preview.read_at(WINDOWS, &path, 2, 1).unwrap(), b"w");
            assert_eq!(preview.read_at(WINDOWS, &path, 3, 9).unwrap(), b"");
            let info = preview.stat(WINDOWS, &path).unwrap().unwrap();
            let plain = !info.compressed && !info.encrypted && info.reparse_tag.is_none();
            assert!(info.size == 3 && plain, "{name}: {info:?}");
            assert_eq!(
                (info.kind, info.name),
                (FileKind::File, format!("{name}.sys"))
            );
            let large = preview.read(WINDOWS, &path, 2).unwrap_err();
            assert!(matches!(large, GuestError::TooLarge { .. }), "{large}");
        }
        let copied = path("\\EFI\\boot.efi");
        assert_eq!(preview.read(OTHER, &copied, 10).unwrap(), b"loader");
        assert_eq!(preview.stat(OTHER, &copied).unwrap().unwrap().size, 6);
        // It is on no other volume, and neither are the drivers.
        for (volume, path) in [(WINDOWS, copied), (OTHER, path("\\Windows\\fresh.sys"))] {
            assert!(preview.read(volume, &path, 10).is_err(), "{path}");
            assert!(preview.stat(volume, &path).unwrap().is_none(), "{path}");
        }
        // A hive in memory is not read again, and is as large as the guest says.
        let system = path(SYSTEM);
        assert!(preview.read(WINDOWS, &system, 1 << 20).unwrap() == hive(3));
        assert!(preview.read_shared(WINDOWS, &system, 1 << 20).unwrap()[..] == hive(3)[..]);
        let shared = preview.read_shared(WINDOWS, &system, 1 << 20).unwrap();
        assert!(Arc::ptr_eq(&shared, &all.system.bytes), "no second copy");
        assert!(preview.read_shared(WINDOWS, &system, 9).is_err());
        assert_eq!(preview.stat(WINDOWS, &system).unwrap().unwrap().size, 11);
    });
    // A replayed one is: what is in memory is not what the file holds.
    all.system.replayed = true;
    shown(&all, &|preview| {
        let found = preview.read(WINDOWS, &path(SYSTEM), 1 << 20).unwrap();
        assert_eq!(found, b"on the disk");
    });
}

/// Values that decide are looked up in the hive that will be written.
#[test]
fn a_preview_has_the_edited_hives_and_empty_logs() {
    let mut guest = FakeGuest::default();
    guest.file(2, SYSTEM, hive(3));
    guest.file(2, LOG, b"old pages".to_vec());
    let driver_source = Memory::new([]);
    let software = |bytes: Vec<u8>| Hives {
        software: loaded("\\Windows\\System32\\config\\SOFTWARE", bytes),
        ..hives(hive(3))
    };
    let mut stale = hive(3);
    stale[4] ^= 1;
    base::update_checksum(&mut stale).unwrap();
    let start = |bytes: &[u8]| {
        let view = HiveView::new(bytes).unwrap();
        let key = view.key("ControlSet001\\Services\\viostor").unwrap();
        key.unwrap().dword("Start").unwrap().unwrap()
    };
    let system = edit(&[LOG]);
    let of_software = EditHive {
        hive: HiveName::Software,
        path: path("\\Windows\\System32\\config\\SOFTWARE"),
        ..edit(&[])
    };
    // The hive, what it holds, whether an editor was done with it already (it set 7), what is shown.
    let replayed = |mut all: Hives| {
        all.system.replayed = true;
        all.software.replayed = true;
        all
    };
    let cases: [(&EditHive, Hives, bool, u32); 7] = [
        (&system, hives(hive(3)), false, 0),
        (&system, hives(hive(3)), true, 7),
        (&system, replayed(hives(hive(3))), true, 7),
        (&of_software, replayed(software(hive(3))), true, 7),
        // Nothing is looked up in SOFTWARE: it is taken unchanged, unless it has to be rebuilt.
        (&of_software, software(hive(3)), true, 3),
        (&of_software, software(stale), true, 7),
        (&of_software, replayed(software(hive(3))), false, 0),
    ];
    for (i, (action, all, already, wanted)) in cases.into_iter().enumerate() {
        let seen = PreviewHives {
            before: &all,
            edited: &|_| already.then(|| hive(7).into()),
        };
        let actions = [Action::EditHive(action.clone())];
        let preview = preview(&actions, seen, WINDOWS, &guest, &driver_source).unwrap();
        let bytes = preview.read(WINDOWS, &action.path, 1 << 20).unwrap();
        assert_eq!(start(&bytes), wanted, "{i}");
        let info = preview.stat(WINDOWS, &action.path).unwrap().unwrap();
        assert_eq!(info.size, bytes.len() as u64, "{i}");
        if action.hive == HiveName::System {
            assert_eq!(preview.read(WINDOWS, &path(LOG), 10).unwrap(), b"");
        }
    }
}

/// The room that is asked for before anything is written.
#[test]
fn what_an_action_adds_is_foreseen_with_all_its_parts() {
    let hives = hives(hive(3));
    let files = CopyFiles {
        id: "files".into(),
        title: "copy".into(),
        folders: vec![path("\\a"), path("\\a\\b")],
        files: ["\\a\\b\\1", "\\a\\b\\2"]
            .map(|to| FileCopy {
                to: path(to),
                from: "new.sys".into(),
                size: 100_000,
                replaces: false,
            })
            .to_vec(),
    };
    let writes = files.writes(&hives);
    let sizes: BTreeMap<_, _> = writes
        .files
        .into_iter()
        .map(|(p, n)| (p.to_string(), n))
        .collect();
    let wanted = ["\\a\\b\\1", "\\a\\b\\2"].map(|p| (p.to_string(), 100_000));
    assert_eq!(
        (writes.folders, writes.originals, sizes),
        (Some(2), 0, wanted.into())
    );
    // Two clusters of data each, and what names them.
    assert_eq!(files.overlay_bytes(), (2 * (2 + 2) + 2) << 16);
    let edit = edit(&[]);
    let writes = edit.writes(&hives);
    let size = hives.system.bytes.len() as u64;
    assert_eq!((writes.folders, writes.originals), (None, size));
    let text = edit.edits.to_reg_text().len() as u64;
    assert!(writes.files[0].1 >= size + text, "{:?}", writes.files);
    assert!(edit.overlay_bytes() >= (3 << 16) + text);
    let absent = EditHive {
        hive: HiveName::Bcd,
        ..edit
    };
    assert_eq!(absent.writes(&hives).originals, 0);
    assert_eq!(absent.writes(&hives).files, []);
}

#[path = "each_tests.rs"]
mod each;
