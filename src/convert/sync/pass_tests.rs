//! What a pass takes for new, what it says is left, and where it may write.

use super::super::super::run::Run;
use super::super::super::testing::{Plain, ui};
use super::super::super::written_tests::{qcow2, snapshot};
use super::*;
use crate::error::ErrorKind;

fn order(folder: &Path) -> Order {
    let source = folder.join("vm.raw");
    Order {
        vm: crate::source::export(&source),
        source,
        format: None,
        allow_backing: Vec::new(),
        folder: folder.join("out"),
        name: None,
        pace: None,
    }
}

/// A VM that runs from snapshots of two raw disks, of 1 and 2 MiB.
fn running(dir: &Path) -> Order {
    let mut order = order(dir);
    order.vm.disks.clear();
    for mib in [1, 2] {
        let base = dir.join(format!("{mib}.raw"));
        std::fs::write(&base, vec![mib; usize::from(mib) << 20]).unwrap();
        let mut disk = crate::source::export(&snapshot(&base)).disks.remove(0);
        disk.format = Some("qcow2".into());
        order.vm.disks.push(disk);
    }
    order
}

/// The figures are those of all disks.
#[test]
fn a_pass_copies_every_disk_and_the_next_one_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    // A pace that is shared with other runs notes in its file that bytes were taken.
    let shared = Pace::shareable().unwrap();
    let order = Order {
        pace: Some(Pace::new(1 << 30).with(shared.try_clone().unwrap())),
        ..running(dir.path())
    };
    let folder = &order.folder;
    let copies = || ["vm.sync.qcow2", "vm-1.sync.qcow2"].map(|name| qcow2(&folder.join(name)));
    let state = run(&order, &ui()).unwrap();
    let first = &state.passes[0];
    assert_eq!((first.copied, first.changed), (3 << 20, 0));
    assert_eq!(first.bandwidth, Some(1 << 30));
    let mut noted = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&shared, &mut noted, 0).unwrap();
    assert_ne!(noted, [0; 8]);
    let newest = order.vm.disks.iter().map(|disk| size_of_newest(&disk.path));
    assert_eq!(first.left, newest.sum::<u64>());
    assert!(copies() == [vec![1; 1 << 20], vec![2; 2 << 20]]);
    // What is there is written over.
    let work = [5 << 16, 1 << 16].map(|bytes| Work {
        recorded: Extents::whole(bytes),
        ..Work::default()
    });
    assert_eq!(room(&state, folder, &work).unwrap(), 0);
    // A pass that was killed in its middle: what it recorded is there.
    let grain = 64 << 10;
    for (disk, missing) in state.disks.iter().zip([grain, 2 * grain]) {
        let all = Extents::whole(disk.size);
        assert_eq!(disk.done(folder).unwrap(), all);
        let missing = Extents::whole(missing);
        disk.restart(folder, all.minus(&missing)).unwrap();
    }
    let state = run(&order, &ui()).unwrap();
    assert_eq!((state.passes[1].copied, state.changed), (3 * grain, 0));
    for disk in &state.disks {
        assert_eq!(disk.done(folder).unwrap(), Extents::whole(disk.size));
    }
    assert!(copies() == [vec![1; 1 << 20], vec![2; 2 << 20]]);
    let kept = SyncState::load(folder).unwrap().unwrap();
    let figures = |state: &SyncState| -> Vec<_> {
        let passes = state.passes.iter();
        passes.map(|p| (p.at, p.copied, p.left)).collect()
    };
    assert_eq!(figures(&kept), figures(&state));
}

/// A last pass that is killed while it copies finds no change twice.
#[test]
fn the_copies_follow_the_source_from_the_moment_the_last_pass_copies() {
    let dir = tempfile::tempdir().unwrap();
    let order = running(dir.path());
    let folder = &order.folder;
    let mut state = run(&order, &ui()).unwrap();
    let newer = super::super::changes::Link {
        files: serde_json::json!("snapshot"),
        ranges: vec![[0, 64 << 10]],
    };
    state.disks[1].links.insert(0, newer);
    state.save(folder).unwrap();
    let bases = ["1.raw", "2.raw"].map(|name| dir.path().join(name));
    let mut job = super::super::super::testing::job(&bases, folder);
    job.output.from_sync = true;
    let ui = ui();
    let mut last = Run::open(&job, &ui).unwrap();
    let missing = || {
        let state = SyncState::load(folder).unwrap().unwrap();
        let whole = Extents::whole(2 << 20);
        let missing = whole.minus(&state.disks[1].done(folder).unwrap());
        (state.disks[1].links.len(), missing.bytes())
    };
    assert_eq!(missing(), (2, 0));
    last.begin_copy().unwrap();
    assert_eq!(missing(), (1, 64 << 10));
}

/// Two passes at a time would write the same copies.
#[test]
fn a_pass_does_not_begin_while_another_run_is_at_work() {
    let dir = tempfile::tempdir().unwrap();
    let order = running(dir.path());
    let place = OutputPlace::open(&order.folder, true).unwrap();
    let lock = place.lock().unwrap();
    let error = run(&order, &ui()).map(drop).unwrap_err();
    assert!(error.message.contains("another conversion"), "{error}");
    assert!(!order.folder.exists());
    drop(lock);
    run(&order, &ui()).unwrap();
}

#[test]
fn a_format_that_the_user_names_takes_precedence_over_that_of_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let mut order = running(dir.path());
    let disk = order.vm.disks.remove(1);
    let opened = open(&order, &disk).unwrap();
    assert_eq!(opened.growing, Some(size_of_newest(&disk.path)));
    assert_eq!(opened.image.virtual_size(), 2 << 20);
    order.format = Some("raw".into());
    let error = open(&order, &disk).map(drop).unwrap_err();
    assert_eq!(error.blockers[0].code, "sync-nothing-frozen");
}

/// A page file is of no use to the next start.
#[test]
fn a_pass_leaves_out_what_a_trim_takes_and_without_a_trim_nothing() {
    let lab = Plain::new();
    let image = Image::open_info(&lab.windows(), Some("raw"), &[]).unwrap();
    let bytes = |trimmed| {
        let used = used(&image, &Extents::default(), trimmed).unwrap();
        used.bytes()
    };
    let freed = bytes(false) - bytes(true);
    let page_file = lab.guest.spec.pagefile_size;
    assert!(
        freed >= page_file - (128 << 10) && freed < page_file + (4 << 20),
        "{freed} {page_file}"
    );
}

/// A page file is of no use to the next start.
#[test]
fn a_whole_pass_copies_nothing_that_a_trim_takes() {
    let lab = Plain::new();
    let mut order = order(&lab.path(""));
    order.vm = crate::source::export(&snapshot(&lab.windows()));
    order.vm.disks[0].format = Some("qcow2".into());
    let image = Image::open_info(&lab.windows(), Some("raw"), &[]).unwrap();
    let [whole, trimmed] =
        [false, true].map(|trimmed| used(&image, &Extents::default(), trimmed).unwrap());
    let page_file = lab.guest.spec.pagefile_size;
    assert!(whole.bytes() - trimmed.bytes() >= page_file - (128 << 10));
    drop(image);
    let state = run(&order, &ui()).unwrap();
    assert_eq!(state.passes[0].copied, trimmed.bytes());
    let done = state.disks[0].done(&order.folder).unwrap();
    assert_eq!(done, trimmed);
}

#[test]
fn a_pass_writes_into_a_new_or_empty_directory_or_into_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let order = order(dir.path());
    let folder = &order.folder;
    let state = load(&order, folder).unwrap();
    assert_eq!((state.name.as_str(), state.disks.len()), ("vm", 0));
    assert!(super::super::is_synced(folder));
    // Its own, with copies in it.
    std::fs::write(folder.join("vm.sync.qcow2"), "x").unwrap();
    load(&order, folder).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    // One that a killed run began.
    std::fs::create_dir(folder).unwrap();
    std::fs::write(folder.join(".sync.json.new"), "{").unwrap();
    load(&order, folder).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    for name in ["notes.txt", "vm.sync.qcow2"] {
        std::fs::create_dir(folder).unwrap();
        std::fs::write(folder.join(name), "mine").unwrap();
        let error = load(&order, folder).unwrap_err();
        assert!(
            error.message.contains("contains no synced VM"),
            "{name}: {error}"
        );
        assert!(!super::super::is_synced(folder));
        std::fs::remove_dir_all(folder).unwrap();
    }
    let named = Order {
        name: Some("my vm".into()),
        ..order
    };
    assert_eq!(load(&named, &named.folder).unwrap().name, "my-vm");
}

#[test]
fn the_newest_link_takes_what_its_files_take() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, kib: usize| {
        let path = dir.path().join(name);
        std::fs::write(&path, vec![1; kib << 10]).unwrap();
        std::fs::File::open(&path).unwrap().sync_all().unwrap();
    };
    let size = || size_of_newest(&dir.path().join("vm-000001.vmdk")) >> 10;
    assert_eq!(size(), 0);
    write("vm-000001.vmdk", 4);
    assert_eq!(size(), 4);
    write("vm-000001-delta.vmdk", 256);
    assert_eq!(size(), 260);
    write("vm-000001-sesparse.vmdk", 512);
    assert_eq!(size(), 772);
    write("vm-000002-delta.vmdk", 512);
    assert_eq!(size(), 772);
    // A hole takes nothing.
    let file = std::fs::File::create(dir.path().join("vm-000001-sesparse.vmdk")).unwrap();
    file.set_len(1 << 30).unwrap();
    file.sync_all().unwrap();
    assert!((260..512).contains(&size()), "{}", size());
}

#[test]
fn what_is_left_is_what_the_vm_writes_to_or_of_an_export_what_changed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let frozen = |growing| Frozen {
        image: Image::open_info(&path, Some("raw"), &[]).unwrap(),
        now: Now {
            links: Vec::new(),
            dirty: None,
        },
        growing,
    };
    let left = |growing: &[Option<u64>]| {
        let all: Vec<_> = growing.iter().map(|growing| frozen(*growing)).collect();
        left(&all, 1000)
    };
    assert_eq!(left(&[Some(5), Some(7)]), 12);
    assert_eq!(left(&[None]), 1000);
    assert_eq!(left(&[None, Some(7)]), 1007);
    assert_eq!(left(&[None, None]), 1000);
    assert_eq!(left(&[]), 0);
}

#[test]
fn a_rate_of_change_is_over_the_time_since_the_pass_before() {
    let mut state = SyncState::new("vm", Path::new("/vm"));
    assert_eq!(state.change_rate(100, 5000), 0.0);
    state.project();
    let pass = |at| Pass {
        at,
        seconds: 2.0,
        overhead_s: 1.0,
        changed: 0,
        copied: 1 << 30,
        left: 1 << 30,
        change_rate: 0.0,
        projected_s: 0.0,
        bandwidth: None,
    };
    state.passes.push(pass(10));
    state.passes.push(pass(50));
    assert_eq!(state.change_rate(100, 5000), 100.0);
    // A clock that was set back.
    assert_eq!(state.change_rate(20, 5000), 5000.0);
    state.project();
    assert!(state.passes[1].projected_s > 1.0 && state.passes[0].projected_s == 0.0);
}

#[test]
fn a_disk_that_is_packed_or_has_nothing_frozen_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut order = order(dir.path());
    let mut disk = order.vm.disks.remove(0);
    std::fs::write(&disk.path, vec![0; 1 << 20]).unwrap();
    disk.packed = Some(crate::source::Packed {
        name: "disk".into(),
        member: None,
        gzip: true,
        capacity: None,
    });
    let error = open(&order, &disk).map(drop).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Usage);
    assert!(error.message.contains("packed"), "{error}");
    // A running VM writes to all of it.
    disk.packed = None;
    let error = open(&order, &disk).map(drop).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Refused);
    assert_eq!(error.blockers[0].code, "sync-nothing-frozen");
}

#[test]
fn a_pass_that_failed_is_continued_by_the_same_command() {
    let io = |kind: std::io::ErrorKind| CopyError::Io {
        path: "/x".into(),
        source: kind.into(),
    };
    let error = kept(io(std::io::ErrorKind::StorageFull));
    assert!(
        error.hints.iter().any(|hint| hint.contains("continues")),
        "{error:?}"
    );
}

/// Ranges that read as zeroes now may be data in the copy.
#[test]
fn a_pass_copies_what_has_data_and_what_has_changed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 1 << 20], 8 << 20).unwrap();
    let image = Image::open_info(&path, Some("raw"), &[]).unwrap();
    let changed: Extents = std::iter::once(40 << 20..41 << 20).collect();
    for trimmed in [false, true] {
        let used = used(&image, &changed, trimmed).unwrap();
        assert_eq!(changed.minus(&used).bytes(), 0, "{trimmed}");
        let data: Extents = std::iter::once(8 << 20..9 << 20).collect();
        assert_eq!(data.minus(&used).bytes(), 0, "{trimmed}");
        assert!(used.bytes() < 8 << 20, "{trimmed}");
    }
}

#[test]
fn a_pass_takes_over_the_changes_of_those_that_were_killed() {
    let mut state = SyncState::new("vm", Path::new("/vm"));
    state.changed = 700;
    let made = |at, copied| NewPass {
        at,
        seconds: 3.0,
        overhead_s: 1.0,
        copied,
        left: &|changed| changed + 1,
        bandwidth: Some(5 << 20),
    };
    state.add(made(10, 64 << 20));
    let first = state.passes[0].clone();
    assert_eq!((first.at, first.changed, first.left), (10, 700, 701));
    assert_eq!(
        (first.copied, first.seconds, first.overhead_s),
        (64 << 20, 3.0, 1.0)
    );
    assert_eq!((first.change_rate, first.bandwidth), (0.0, Some(5 << 20)));
    assert!(first.projected_s > 4.0, "{first:?}");
    assert_eq!(state.changed, 0);
    state.changed = 400;
    state.add(made(60, 0));
    let second = &state.passes[1];
    assert_eq!((second.changed, second.change_rate), (400, 8.0));
    assert_eq!(state.passes[0], first);
}

/// A full file system would stop the pass in its middle.
#[test]
fn a_pass_that_the_target_has_no_room_for_is_refused_before_it_copies() {
    let dir = tempfile::tempdir().unwrap();
    let free = copy::free_space(dir.path()).unwrap();
    let mut state = SyncState::new("vm", Path::new("/vm.vmx"));
    for i in 0..2 {
        let file = state::copy_name("vm", i);
        Refill::create(&dir.path().join(&file), 1 << 40).unwrap();
        state.disks.push(SyncedDisk {
            size: 1 << 40,
            file,
            links: Vec::new(),
        });
    }
    let work = |bytes: u64| Work {
        recorded: Extents::whole(bytes),
        ..Work::default()
    };
    let fits = |first: u64, second: u64| {
        check_room(&state, dir.path(), &[work(first), work(second)]).is_ok()
    };
    assert!(fits(0, 0) && fits(free / 4, free / 4));
    assert!(!fits(free * 2, 0) && !fits(0, free * 2));
    assert!(!fits(free / 3 * 2, free / 3 * 2), "both together");
    let needed = room(&state, dir.path(), &[work(1 << 20), work(3 << 16)]);
    assert_eq!(needed.unwrap(), (1 << 20) + (3 << 16));
}

/// The second pass adds nothing where nothing has changed.
#[test]
fn the_copies_are_created_once_and_followed_from_then_on() {
    let dir = tempfile::tempdir().unwrap();
    let frozen: Vec<_> = (1..3u64)
        .map(|mib| {
            let path = dir.path().join(format!("{mib}.raw"));
            std::fs::write(&path, vec![1; (mib << 20) as usize]).unwrap();
            let image = Image::open_info(&path, Some("raw"), &[]).unwrap();
            Frozen {
                now: Now::of(&image).unwrap(),
                image,
                growing: Some(0),
            }
        })
        .collect();
    let mut state = SyncState::new("vm", Path::new("/vm.vmx"));
    let changed = begin(&mut state, &frozen, dir.path()).unwrap();
    assert_eq!(changed, [Extents::default(), Extents::default()]);
    let read = SyncState::load(dir.path()).unwrap().unwrap();
    assert_eq!(serde_json::json!(read), serde_json::json!(state));
    let told: Vec<_> = (state.disks.iter())
        .map(|disk| (disk.file.as_str(), disk.size, disk.links.len()))
        .collect();
    assert_eq!(
        told,
        [
            ("vm.sync.qcow2", 1 << 20, 1),
            ("vm-1.sync.qcow2", 2 << 20, 1)
        ]
    );
    for disk in &state.disks {
        assert_eq!(disk.done(dir.path()).unwrap(), Extents::default());
        assert!(disk.journal(dir.path()).unwrap().is_some());
    }
    state.disks[0]
        .restart(dir.path(), Extents::whole(1 << 20))
        .unwrap();
    let changed = begin(&mut state, &frozen, dir.path()).unwrap();
    assert_eq!(changed, [Extents::default(), Extents::default()]);
    assert_eq!(
        state.disks[0].done(dir.path()).unwrap(),
        Extents::whole(1 << 20)
    );
    // A snapshot of the second disk has data that its copy lacks.
    let mut newer: Vec<_> = frozen.iter().map(|f| f.now.clone()).collect();
    let link = super::super::changes::Link {
        files: serde_json::json!("snapshot"),
        ranges: vec![[0, 64 << 10]],
    };
    newer[1].links.insert(0, link);
    let mut frozen = frozen;
    for (frozen, now) in frozen.iter_mut().zip(&newer) {
        frozen.now = now.clone();
    }
    let whole = Extents::whole(2 << 20);
    state.disks[1].restart(dir.path(), whole.clone()).unwrap();
    let changed = begin(&mut state, &frozen, dir.path()).unwrap();
    let grain = Extents::whole(64 << 10);
    assert_eq!(changed, [Extents::default(), grain.clone()]);
    assert_eq!(
        state.disks[1].done(dir.path()).unwrap(),
        whole.minus(&grain)
    );
    assert_eq!(state.disks[1].links, newer[1].links);
    assert_eq!(state.changed, 64 << 10);
    // Another disk of the same name.
    let error = begin(&mut state, &frozen[..1], dir.path()).unwrap_err();
    assert_eq!(error.blockers[0].code, "sync-disks-changed");
}

/// A dirty bitmap that began too late hides what was written before it.
#[test]
fn the_claim_of_a_server_is_compared_with_the_copy_before_a_pass() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    let mut frozen = [Frozen {
        image: Image::open_info(&path, Some("raw"), &[]).unwrap(),
        now: Now {
            links: Vec::new(),
            dirty: Some(Extents::default()),
        },
        growing: None,
    }];
    let mut state = SyncState::new("vm", Path::new("/vm.vmx"));
    begin(&mut state, &frozen, dir.path()).unwrap();
    // The copy is empty, and nothing of it is recorded.
    begin(&mut state, &frozen, dir.path()).unwrap();
    let whole = Extents::whole(1 << 20);
    state.disks[0].restart(dir.path(), whole.clone()).unwrap();
    let error = begin(&mut state, &frozen, dir.path()).unwrap_err();
    assert_eq!(error.blockers[0].code, "sync-bitmap-late");
    frozen[0].now.dirty = Some(whole.clone());
    let changed = begin(&mut state, &frozen, dir.path()).unwrap();
    assert_eq!(changed, [whole]);
    assert_eq!(state.disks[0].done(dir.path()).unwrap(), Extents::default());
}
