//! Who may have written a state, and where disks are compared with their copies.

use super::*;

fn pass() -> Pass {
    Pass {
        at: 0,
        seconds: 1.0,
        overhead_s: 1.0,
        changed: 0,
        copied: 0,
        left: 0,
        change_rate: 0.0,
        projected_s: 0.0,
        bandwidth: None,
    }
}

/// Files that a state names are removed and written.
#[test]
fn a_state_that_others_can_write_is_not_believed() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    SyncState::new("vm", Path::new("/vm.vmx"))
        .save(dir.path())
        .unwrap();
    let file = dir.path().join(FILE);
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(&file, 0o666);
    assert!(SyncState::load(dir.path()).is_err());
    mode(&file, 0o644);
    SyncState::load(dir.path()).unwrap().unwrap();
    mode(dir.path(), 0o777);
    assert!(SyncState::load(dir.path()).is_err());
}

/// A difference that one sample misses is found by a later one.
#[test]
fn each_disk_is_compared_at_other_places_in_each_pass() {
    const GRAIN: u64 = 64 << 10;
    const SIZE: u64 = 128 * GRAIN;
    let dir = tempfile::tempdir().unwrap();
    let image = |name: &str, written: Option<u64>| {
        let path = dir.path().join(name);
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(SIZE).unwrap();
        if let Some(at) = written {
            std::os::unix::fs::FileExt::write_all_at(&file, &[7], at).unwrap();
        }
        Image::open_info(&path, Some("raw"), &[]).unwrap()
    };
    // Of the second disk an odd grain differs: every second one is compared.
    let images = [image("1.raw", None), image("2.raw", Some(5 * GRAIN))];
    let mut state = SyncState::new("vm", Path::new("/vm.vmx"));
    for i in 0..2 {
        let disk = SyncedDisk {
            size: SIZE,
            file: copy_name("vm", i),
            links: Vec::new(),
        };
        let copy = dir.path().join(&disk.file);
        crate::disk::refill::Refill::create(&copy, SIZE).unwrap();
        disk.restart(dir.path(), Extents::whole(SIZE)).unwrap();
        state.disks.push(disk);
    }
    let exported = Now {
        links: Vec::new(),
        dirty: Some(Extents::default()),
    };
    let now = [exported.clone(), exported];
    let images: Vec<&Image> = images.iter().collect();
    for missed in [true, false] {
        let checked = state.check_sample(
            dir.path(),
            &images,
            &now,
            &[Extents::default(), Extents::default()],
        );
        assert_eq!(checked.is_ok(), missed, "{:?}", state.passes);
        state.passes.push(pass());
    }
}
