use super::*;
use crate::demo::WinVersion;
use crate::inspect::fake::FakeGuest;
use crate::testing::{MemoryGuest, bootstrap, driver_source};

/// The needs of a Windows 10 plan on the Windows volume, and the guest to check.
fn planned(then: impl FnOnce(&mut FakeGuest, VolumeId, Needs)) {
    let guest = MemoryGuest::new(WinVersion::Win10);
    let prepared = guest.prepare(&driver_source(), Some(bootstrap(WinVersion::Win10)));
    let volume = prepared.basis.windows.system_volume;
    guest.look(&[], |fake, survey| {
        let hives = survey.hives.as_ref().unwrap();
        let needs = Needs::of(&prepared.plan.actions, hives, volume, fake).unwrap();
        then(&mut fake.clone(), volume, needs);
    });
}

#[test]
fn a_volume_without_room_for_what_the_plan_adds_is_a_blocker() {
    planned(|guest, volume, needs| {
        let needed = needs.volumes[&volume];
        assert!(needed > 100 << 10, "{needed}");
        for (free, blockers) in [(0, 1), (needed - 1, 1), (needed, 0), (u64::MAX, 0)] {
            guest.free = Some((volume, free));
            let found = in_guest(&needs, guest, &[]).unwrap();
            assert_eq!(found.len(), blockers, "{free}: {found:?}");
            for blocker in found {
                assert_eq!(blocker.code, "guest-space");
                assert!(blocker.reason.contains(&bytes(free)), "{blocker:?}");
                assert!(blocker.reason.contains(&bytes(needed)), "{blocker:?}");
                assert!(blocker.remedy.contains("enlarge the volume"));
            }
        }
        // An unreadable map blocks nothing.
        guest.free = None;
        assert_eq!(in_guest(&needs, guest, &[]).unwrap(), []);
    });
}

/// A replaced file frees its clusters; a compressed one may have none.
#[test]
fn a_file_takes_the_clusters_that_it_does_not_have_yet() {
    planned(|guest, volume, _| {
        let id = volume.partition;
        guest.file(id, r"\there\short.sys", vec![0; 5000]);
        guest.file(id, r"\there\long.sys", vec![0; 100_000]);
        let small = guest.file(id, r"\there\packed.sys", vec![0; 100_000]);
        small.compressed = true;
        // Compressed by CompactOS, which is a reparse point.
        let wof = guest.file(id, r"\there\wof.sys", vec![0; 100_000]);
        wof.reparse_tag = Some(0x8000_0017);
        let needed = |name: &str, size: u64| {
            let path = GuestPath::parse(&format!(r"\there\{name}")).unwrap();
            let mut needs = Needs::default();
            needs.file(guest, volume, &path, size).unwrap();
            needs.volumes[&volume]
        };
        assert_eq!(needed("new.sys", 1), CLUSTER + RECORD);
        assert_eq!(needed("short.sys", 8192), 0);
        assert_eq!(needed("short.sys", 8193), CLUSTER);
        assert_eq!(needed("long.sys", 1), 0);
        assert_eq!(needed("packed.sys", 4097), 2 * CLUSTER);
        assert_eq!(needed("wof.sys", 4097), 2 * CLUSTER);
        assert_eq!(needed("wof.sys", 100_000), 25 * CLUSTER);
        // Nothing is freed by what is replaced, and an empty file has no clusters.
        assert_eq!(needed("short.sys", 0), 0);
        assert_eq!(needed("empty.sys", 0), RECORD);
    });
}

/// The clusters of the volume, not those of most volumes.
#[test]
fn clusters_are_those_of_the_volume() {
    planned(|guest, volume, _| {
        let id = volume.partition;
        guest.file(id, r"\there\short.sys", vec![0; 5000]);
        for (size, there, wanted) in [
            (0, "new", 8192 + RECORD),
            (512, "new", 5120 + RECORD),
            (65536, "new", 65536 + RECORD),
            (0, "short", 0),
            (512, "short", 0),
        ] {
            guest.volume_mut(id).state.cluster_size = size;
            let path = GuestPath::parse(&format!(r"\there\{there}.sys")).unwrap();
            let mut needs = Needs::default();
            needs.file(guest, volume, &path, 5000).unwrap();
            assert_eq!(needs.volumes[&volume], wanted, "{size} {there}");
        }
        // Of each file what it needs is added.
        guest.volume_mut(id).state.cluster_size = 1024;
        let mut needs = Needs::default();
        for name in ["a", "b"] {
            let path = GuestPath::parse(&format!(r"\there\{name}.sys")).unwrap();
            needs.file(guest, volume, &path, 1025).unwrap();
        }
        assert_eq!(needs.volumes[&volume], 2 * (2048 + RECORD));
    });
}

#[test]
fn every_part_of_a_plan_counts() {
    planned(|guest, volume, needs| {
        let volumes: Vec<_> = needs.volumes.keys().collect();
        assert_eq!(volumes, [&volume]);
        assert_eq!(needs.written(), needs.volumes[&volume]);
        assert!(needs.backup > 1000, "the hives are saved: {}", needs.backup);
        // More directories and files take more.
        let path = |name: &str| GuestPath::parse(name).unwrap();
        let copy = |folders: &[&str], files: &[(&str, u64)]| {
            Action::CopyFiles(crate::actions::CopyFiles {
                id: "files".into(),
                title: "copy".into(),
                folders: folders.iter().map(|name| path(name)).collect(),
                files: (files.iter())
                    .map(|(to, size)| crate::actions::FileCopy {
                        to: path(to),
                        from: "x".into(),
                        size: *size,
                        replaces: false,
                    })
                    .collect(),
            })
        };
        let hives = crate::testing::MemoryGuest::new(WinVersion::Win10)
            .look(&[], |_, survey| survey.hives.clone().unwrap());
        let needed = |actions: &[Action]| {
            let needs = Needs::of(actions, &hives, volume, guest).unwrap();
            needs.volumes[&volume]
        };
        let one = needed(&[copy(&[], &[(r"\a.sys", 5000)])]);
        assert_eq!(one, STEPS + 8192 + RECORD);
        let two = needed(&[copy(
            &[r"\a", r"\a\b"],
            &[(r"\a\b\a.sys", 1), (r"\a\b\b.sys", 1)],
        )]);
        assert_eq!(two, 2 * (CLUSTER + RECORD) + STEPS + 2 * (CLUSTER + RECORD));
        // Nobody asks about a volume that is not there.
        let elsewhere = VolumeId::new(99);
        let needs = Needs::of(&[copy(&[], &[(r"\a.sys", 1)])], &hives, elsewhere, guest).unwrap();
        assert_eq!(needs.volumes, BTreeMap::new());
        let one = copy(&[r"\a"], &[(r"\a\b.sys", 1)]);
        let two = copy(&[r"\c"], &[(r"\c\d.sys", 1), (r"\c\e.sys", 1)]);
        assert_eq!(added(std::slice::from_ref(&one)), 4 << 16);
        assert_eq!(added(std::slice::from_ref(&two)), 7 << 16);
        assert_eq!(added(&[one, two]), 11 << 16);
    });
}

/// A volume of which nobody knows the free space says nothing about the next one.
#[test]
fn every_volume_is_checked_and_every_original_is_saved() {
    let mut guest = MemoryGuest::new(WinVersion::Win10);
    guest.without("bootx64.efi");
    let prepared = guest.prepare(&driver_source(), Some(bootstrap(WinVersion::Win10)));
    let system = prepared.basis.windows.system_volume;
    guest.look(&[], |fake, survey| {
        let hives = survey.hives.as_ref().unwrap();
        let actions = &prepared.plan.actions;
        let of = |actions: &[Action]| Needs::of(actions, hives, system, fake).unwrap();
        let needs = of(actions);
        let each: Vec<u64> = actions
            .iter()
            .map(|action| of(std::slice::from_ref(action)).backup)
            .collect();
        assert_eq!(needs.backup, each.iter().sum::<u64>());
        assert!(*each.last().unwrap() < needs.backup, "{each:?}");
        assert_eq!(needs.volumes.len(), 2);
        for volume in needs.volumes.keys() {
            let mut fake = fake.clone();
            fake.free = Some((*volume, 0));
            let blockers = in_guest(&needs, &fake, &[]).unwrap();
            assert_eq!(blockers.len(), 1, "{volume}");
            assert!(blockers[0].reason.starts_with(&volume.to_string()));
        }
    });
}

/// The loader lies on the volume of the firmware, which is small.
#[test]
fn each_volume_needs_what_is_written_to_it() {
    let mut guest = MemoryGuest::new(WinVersion::Win10);
    let loader = guest.file("bootmgfw.efi").len() as u64;
    guest.without("bootx64.efi");
    let prepared = guest.prepare(&driver_source(), Some(bootstrap(WinVersion::Win10)));
    let system = prepared.basis.windows.system_volume;
    guest.look(&[], |fake, survey| {
        let hives = survey.hives.as_ref().unwrap();
        let needs = Needs::of(&prepared.plan.actions, hives, system, fake).unwrap();
        let esp = guest.spec.partition(crate::demo::Role::Esp).unwrap().index;
        let esp = VolumeId::new(esp);
        let volumes: std::collections::BTreeSet<_> = needs.volumes.keys().copied().collect();
        assert_eq!(volumes, [system, esp].into());
        let needed = needs.volumes[&esp];
        assert!(
            (loader..loader + STEPS + (64 << 10)).contains(&needed),
            "{needed}"
        );
        assert_eq!(needs.written(), needed + needs.volumes[&system]);
    });
}

/// The undo log has the old and the new blocks, beside what the overlays have.
#[test]
fn the_output_directory_has_room_for_what_is_written_beside_the_copy() {
    let dir = tempfile::tempdir().unwrap();
    let free = copy::free_space(dir.path()).unwrap();
    let path = dir.path().join("disk.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    let mut job = super::super::testing::job(&[path], &dir.path().join("out"));
    let disks = job.source.disks(dir.path()).unwrap();
    let fits = |job: &Job, written: u64, backup: u64| {
        let needs = Needs {
            volumes: [(VolumeId::new(1), written)].into(),
            backup,
        };
        in_folder(job, &needs, &disks, &dir.path().join("a/b/out")).is_ok()
    };
    assert!(fits(&job, 0, 0));
    assert!(fits(&job, free / 3, 0));
    assert!(!fits(&job, free / 3 * 2, 0));
    assert!(!fits(&job, free / 3, free / 2));
    job.copy.method = Copying::InPlace;
    assert!(fits(&job, free / 6, 0));
    assert!(!fits(&job, free / 3, 0), "what undoes it is written too");
}

#[test]
fn a_sparse_disk_needs_what_it_holds_and_a_resumed_copy_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    let file = std::fs::File::create(&path).unwrap();
    // More than there is room for.
    file.set_len(8 << 40).unwrap();
    let target = dir.path().join("out");
    let mut job = super::super::testing::job(&[path], &target);
    job.copy.trim = false;
    let disks = job.source.disks(dir.path()).unwrap();
    in_folder(&job, &Needs::default(), &disks, &target).unwrap();
    assert_eq!(tables(&disks), (8 << 40) / (64 << 10) * 8);
    let partial = dir.path().join(".out.partial");
    std::fs::create_dir(&partial).unwrap();
    std::fs::write(partial.join("vm.qcow2"), vec![1; 1 << 20]).unwrap();
    std::fs::File::open(partial.join("vm.qcow2"))
        .unwrap()
        .sync_all()
        .unwrap();
    assert_eq!(taken(&job, &target, 0), 0, "it is removed");
    job.output.resume = true;
    assert!(taken(&job, &target, 0) >= 1 << 20);
    assert_eq!(taken(&job, &target, 1), 0);
    // A hole of the file takes nothing.
    let mut options = std::fs::File::options();
    let file = options.write(true).open(partial.join("vm.qcow2")).unwrap();
    file.set_len(1 << 30).unwrap();
    file.sync_all().unwrap();
    let blocks = taken(&job, &target, 0);
    assert!((1 << 20..2 << 20).contains(&blocks), "{blocks}");
}

/// Of each disk its own copy counts.
#[test]
fn what_is_missing_of_a_copy_is_its_size_without_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out");
    let partial = dir.path().join(".out.partial");
    std::fs::create_dir(&partial).unwrap();
    let write = |path: &Path, bytes: usize| {
        std::fs::write(path, vec![1; bytes]).unwrap();
        std::fs::File::open(path).unwrap().sync_all().unwrap();
    };
    let paths = ["a", "b"].map(|name| dir.path().join(name));
    for path in &paths {
        write(path, 4 << 20);
    }
    write(&partial.join("vm-1.qcow2"), 1 << 20);
    let mut job = super::super::testing::job(&paths, &target);
    job.copy.trim = false;
    let disks = job.source.disks(dir.path()).unwrap();
    let missing = |job: &Job| [0, 1].map(|i| left(job, &target, i, &disks[i]).unwrap());
    let whole = copy_size(&job, &disks[0]).unwrap();
    assert!(whole >= 4 << 20);
    assert_eq!(missing(&job), [whole; 2]);
    job.output.resume = true;
    let taken = taken(&job, &target, 1);
    assert!(taken >= 1 << 20);
    assert_eq!(missing(&job), [whole, whole - taken]);
}

#[test]
fn what_the_output_directory_needs_is_counted_only_where_whole_disks_do_not_fit() {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let paths = [64, 128].map(|mib| dir.path().join(format!("{mib}.raw")));
    for (path, mib) in paths.iter().zip([64, 128]) {
        std::fs::File::create(path)
            .unwrap()
            .set_len(mib * MIB)
            .unwrap();
    }
    let mut job = super::super::testing::job(&paths, &dir.path().join("out"));
    let disks = job.source.disks(dir.path()).unwrap();
    let needs = Needs {
        volumes: [(VolumeId::new(1), 3 * MIB)].into(),
        backup: 2 * MIB,
    };
    let asked = std::cell::RefCell::new(Vec::new());
    let needed = |job: &Job, free: u64| {
        asked.borrow_mut().clear();
        let left = |i: usize, disk: &Disk| {
            asked
                .borrow_mut()
                .push((i, disk.image.virtual_size() / MIB));
            Ok((10 + i as u64) * MIB)
        };
        let needed = super::needed(job, &needs, &disks, free, &left).unwrap();
        (needed, asked.borrow().clone())
    };
    // Two disks with a 64th and a MiB more each; twice what is written, the originals, and a MiB.
    let beside = (2 * 3 + 2 + 1) * MIB;
    let whole = (64 + 1 + 1 + 128 + 2 + 1) * MIB + beside;
    let both = vec![(0, 64), (1, 128)];
    assert_eq!(needed(&job, whole), (None, vec![]));
    assert_eq!(
        needed(&job, whole - 1),
        (Some(21 * MIB + beside), both.clone())
    );
    job.copy.compress = true;
    assert_eq!(needed(&job, 0), (Some(21 * MIB / 8 + beside), both));
    assert_eq!(
        needed(&job, (64 + 1 + 1 + 128 + 2 + 1) * MIB / 8 + beside).0,
        None
    );
    job.copy.compress = false;
    // Devices take no room here.
    job.copy.devices = vec!["/dev/a".into()];
    assert_eq!(needed(&job, 0), (Some(11 * MIB + beside), vec![(1, 128)]));
    job.copy.devices.clear();
    job.copy.method = Copying::InPlace;
    assert_eq!(needed(&job, 0), (Some(beside + (2 * 3 + 2) * MIB), vec![]));
    job.copy.method = Copying::Later;
    let tables = (64 + 128) * MIB / (64 << 10) * 8;
    assert_eq!(needed(&job, 0), (Some(beside + tables), vec![]));
    assert_eq!(needed(&job, beside + tables), (None, vec![]));
}

/// Ranges that a trim takes out are not copied.
#[test]
fn the_size_of_a_copy_is_that_of_its_data_without_what_is_trimmed() {
    let lab = super::super::testing::Plain::new();
    let mut job = lab.job();
    let disks = job.source.disks(&lab.path("work")).unwrap();
    let page_file = lab.guest.spec.pagefile_size;
    let trimmed = copy_size(&job, &disks[0]).unwrap();
    job.copy.trim = false;
    let whole = copy_size(&job, &disks[0]).unwrap();
    assert_eq!(
        whole,
        DataMap::of(&disks[0].image)
            .unwrap()
            .copy_size(disks[0].image.virtual_size())
    );
    let freed = whole - trimmed;
    assert!(
        freed >= page_file - (128 << 10) && freed < page_file + (4 << 20),
        "{freed} {page_file}"
    );
    // The data disk has no file system.
    let len = super::super::testing::data().len() as u64;
    let data = [true, false].map(|trim| {
        job.copy.trim = trim;
        copy_size(&job, &disks[1]).unwrap()
    });
    assert!(data[0] == data[1] && data[0] > len, "{data:?}");
}

/// An engine that does not count is no reason to know nothing of a plain volume.
#[test]
fn free_space_is_counted_on_the_disk_where_the_engine_does_not_tell() {
    let lab = super::super::testing::Plain::new();
    let job = super::super::testing::job(&[lab.windows()], &lab.path("out"));
    let disks = job.source.disks(&lab.path("work")).unwrap();
    lab.guest.look(&[], |fake, survey| {
        let id = survey.inspection.windows.as_ref().unwrap().system_volume;
        let mut fake = fake.clone();
        let windows = lab
            .guest
            .spec
            .partition(crate::demo::Role::Windows)
            .unwrap();
        let free = free_bytes(&fake, &disks, id, u64::MAX).unwrap().unwrap();
        assert!((windows.size / 2..windows.size).contains(&free), "{free}");
        for (kind, container, told) in [
            (FsKind::Ntfs, None, true),
            (FsKind::Fat, None, true),
            (FsKind::Ntfs, Some(FsKind::Bitlocker), false),
            (FsKind::Ext, None, false),
        ] {
            let volume = fake.volume_mut(id.partition);
            (volume.kind, volume.state.container) = (kind, container);
            let found = free_bytes(&fake, &disks, id, u64::MAX).unwrap();
            assert_eq!(found.is_some(), told, "{kind:?} {container:?}");
        }
        assert_eq!(free_bytes(&fake, &[], id, u64::MAX).unwrap(), None);
    });
}

/// Any other error may be one of the disk, which a fix would meet too.
#[test]
fn an_unreadable_map_of_free_space_blocks_nothing_and_another_error_is_told() {
    let unreadable = || GuestError::Unreadable {
        path: "$Bitmap".into(),
        reason: "damaged".into(),
    };
    let failed = || GuestError::Op {
        op: "reading",
        path: "$Bitmap".into(),
        reason: "no answer".into(),
    };
    planned(|guest, volume, needs| {
        guest.free_error = Some(unreadable);
        assert_eq!(in_guest(&needs, guest, &[]).unwrap(), []);
        guest.free_error = Some(failed);
        let error = in_guest(&needs, guest, &[]).unwrap_err();
        let said = format!("reading the free space of {volume}");
        assert_eq!(error.message, said);
    });
}

/// The numbers of volumes are those of their disk.
#[test]
fn free_space_of_a_volume_is_counted_on_the_disk_it_lies_on() {
    use crate::guest::DiskId;
    let lab = super::super::testing::Plain::new();
    let mut disks = lab.job().source.disks(&lab.path("work")).unwrap().to_vec();
    lab.guest.look(&[], |fake, survey| {
        let system = survey.inspection.windows.as_ref().unwrap().system_volume;
        let mut fake = fake.clone();
        let id = |i| VolumeId {
            disk: DiskId::nth(i, 2),
            partition: system.partition,
        };
        fake.volume_mut(system.partition).id = id(1);
        let windows = lab
            .guest
            .spec
            .partition(crate::demo::Role::Windows)
            .unwrap();
        for _ in 0..2 {
            let free = free_bytes(&fake, &disks, id(1), u64::MAX).unwrap().unwrap();
            assert!((windows.size / 2..windows.size).contains(&free), "{free}");
            disks.reverse();
        }
        // The guest has no such volume on its first disk.
        assert_eq!(free_bytes(&fake, &disks, id(0), u64::MAX).unwrap(), None);
    });
}
