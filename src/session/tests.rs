//! Sources opened without a program: raw disks, and what is refused.

use super::*;

#[test]
fn an_image_is_opened_and_checked_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let access = Access::default();
    access.image(&path, Some("raw")).unwrap();
    let first = access.disk(DiskId::ONLY, &path, Some("raw")).unwrap();
    // A second opening would notice that the name is gone.
    std::fs::remove_file(&path).unwrap();
    let again = access.disk(DiskId::ONLY, &path, Some("raw")).unwrap();
    assert_eq!(first.image.virtual_size(), again.image.virtual_size());
    let opened = access.opened.0.lock().unwrap();
    assert_eq!((opened.len(), opened[0].checked), (1, true));
}

/// Raw disks, of which those in `luks` are encrypted as a whole.
fn machine(folder: &Path, count: usize, luks: &[usize]) -> SourceMachine {
    let mut vm = crate::source::export(&folder.join("0"));
    for i in 0..count {
        let path = folder.join(i.to_string());
        let mut bytes = vec![0; 1 << 20];
        if luks.contains(&i) {
            bytes[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
        }
        std::fs::write(&path, bytes).unwrap();
        if i > 0 {
            vm.disks.extend(crate::source::export(&path).disks);
        }
    }
    SourceMachine {
        max_unpacked: None,
        no_appliance: true,
        vm,
        path: folder.join("0"),
        access: Access::default(),
    }
}

/// Windows may be on one that this process cannot open.
#[test]
fn the_system_is_taken_to_be_on_the_first_disk_or_on_the_first_that_is_encrypted() {
    let id = |i: usize, count: usize| DiskId::nth(i, count);
    for (count, luks, root, system) in [
        (1, &[][..], None, 0),
        (1, &[0], None, 0),
        (3, &[], None, 0),
        (3, &[1], None, 1),
        (3, &[1, 2], None, 1),
        // Named by the user.
        (3, &[1, 2], Some("3/0:\\Windows"), 2),
    ] {
        let at = format!("{count} {luks:?} {root:?}");
        let folder = tempfile::tempdir().unwrap();
        let mut machine = machine(folder.path(), count, luks);
        machine.access.inspect.root = root.map(str::to_owned);
        let work = Names::new();
        let disks = machine.disks(work.folder()).unwrap();
        assert_eq!(disks.system().unwrap().id, id(system, count), "{at}");
        assert_eq!(
            disks[0].path,
            folder.path().join(system.to_string()),
            "{at}"
        );
        // The others keep the order of the source.
        let mut order: Vec<usize> = (0..count).filter(|i| *i != system).collect();
        order.insert(0, system);
        let found: Vec<_> = disks.iter().map(|disk| disk.id).collect();
        let wanted: Vec<_> = order.into_iter().map(|i| id(i, count)).collect();
        assert_eq!(found, wanted, "{at}");
        assert!(disks.is_system(id(system, count)) && disks.is_changed(id(system, count)));
    }
    let folder = tempfile::tempdir().unwrap();
    let mut none = machine(folder.path(), 1, &[]);
    none.vm.disks.clear();
    assert!(none.disks(folder.path()).is_err());
}

#[test]
fn the_firmware_starts_from_the_disk_with_the_boot_files_and_boot_ini_counts_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let machine = machine(folder.path(), 4, &[]);
    let disks = machine.disks(folder.path()).unwrap();
    let id = |i: usize| DiskId::nth(i, 4);
    for (system, boot, wanted) in [
        (0, 0, [Some(1), None, None, None]),
        (2, 2, [None, None, Some(1), None]),
        (1, 0, [Some(1), Some(2), Some(3), Some(4)]),
        (0, 1, [Some(2), Some(1), Some(3), Some(4)]),
        (0, 3, [Some(2), Some(3), Some(4), Some(1)]),
    ] {
        let mut list = disks.to_vec();
        list.sort_by_key(|disk| disk.id != id(system));
        let disks = VmDisks::with_roles(list, id(system), id(boot));
        let order = [0, 1, 2, 3].map(|i| disks.boot_order(id(i)));
        assert_eq!(order, wanted, "{system} {boot}");
        let changed = [0, 1, 2, 3].map(|i| disks.is_changed(id(i)));
        assert_eq!(changed, [0, 1, 2, 3].map(|i| i == system || i == boot));
        let systems = [0, 1, 2, 3].map(|i| disks.is_system(id(i)));
        assert_eq!(systems, [0, 1, 2, 3].map(|i| i == system));
    }
}

#[test]
fn a_source_that_was_changed_meanwhile_is_noticed_on_every_disk() {
    for changed in 0..3 {
        let folder = tempfile::tempdir().unwrap();
        let machine = machine(folder.path(), 3, &[]);
        let _disks = machine.disks(folder.path()).unwrap();
        machine.access.opened.check_unchanged().unwrap();
        let path = folder.path().join(changed.to_string());
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let error = machine.access.opened.check_unchanged().unwrap_err();
        assert!(
            error.to_string().contains(path.to_str().unwrap()),
            "{error}"
        );
    }
}

/// A format of the command line is for every disk, whatever its description says.
#[test]
fn an_image_is_another_one_in_another_format() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let access = Access {
        format: Some("raw".into()),
        ..Access::default()
    };
    for said in [Some("vmdk"), None, Some("raw")] {
        let image = access.image(&path, said).unwrap();
        assert_eq!(image.format().driver(), "raw");
    }
    assert_eq!(access.opened.0.lock().unwrap().len(), 1);
    let other = folder.path().join("other.img");
    std::fs::write(&other, vec![0; 1 << 20]).unwrap();
    access.image(&other, None).unwrap();
    assert_eq!(access.opened.0.lock().unwrap().len(), 2);
}

#[test]
fn what_the_user_named_wrongly_is_told_from_what_failed() {
    let found = vec!["2:\\Windows".to_owned(), "3:\\Windows".to_owned()];
    let several = InspectError::SeveralRoots {
        found: found.clone(),
    };
    let error = refusal(several, "/vm");
    assert_eq!(error.kind, ErrorKind::Refused);
    assert_eq!(error.blockers[0].code, "several-windows");
    assert!(
        error.blockers[0].reason.contains("3:\\Windows"),
        "{error:?}"
    );
    let wanted = "4:\\Windows".to_owned();
    for wrong in [
        InspectError::NoSuchRoot { wanted, found },
        InspectError::BadRoot("x".into()),
        crate::guest::GuestPath::parse("..")
            .map_err(InspectError::Path)
            .unwrap_err(),
    ] {
        let error = refusal(wrong, "/vm");
        assert_eq!(error.kind, ErrorKind::Usage, "{error}");
        assert!(
            error.hints.iter().any(|hint| hint.contains("--root")),
            "{error:?}"
        );
    }
    let unreadable = crate::guest::GuestError::Unreadable {
        path: "\\x".into(),
        reason: "bad sector".into(),
    };
    let error = refusal(InspectError::Guest(unreadable), "/vm");
    assert_eq!(error.kind, ErrorKind::Failed);
    assert!(error.to_string().contains("/vm"), "{error}");
}

#[test]
fn the_names_of_a_run_are_its_own_and_go_with_it() {
    let (one, other) = (Names::new(), Names::new());
    assert_ne!(one.folder(), other.folder());
    std::fs::create_dir(one.folder()).unwrap();
    std::fs::write(one.folder().join("disk"), "x").unwrap();
    let there = one.folder().to_path_buf();
    drop(one);
    assert!(!there.exists());
}

#[test]
fn a_key_that_names_a_disk_is_for_that_disk() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(folder.path(), 2, &[]);
    let (keys, _) = Keys::parse(&["2/1:key:secret".to_owned()]).unwrap();
    machine.access.keys = keys;
    let disks = machine.disks(folder.path()).unwrap();
    let has = disks.iter().map(|disk| !disk.keys.is_empty());
    assert_eq!(has.collect::<Vec<_>>(), [false, true]);
}
