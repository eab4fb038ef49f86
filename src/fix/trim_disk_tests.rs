//! Trimming of whole disks and of volumes that must stay unchanged.

use std::sync::Arc;

use super::tests::{map, ntfs, open};
use super::*;
use crate::block::FileDisk;
use crate::demo::{GuestSpec, WinVersion};
use crate::guest::VolumeState;
use crate::testing::MemoryGuest;

const PAGES: usize = 1 << 20;

/// Free space of every volume is trimmed, each by its own map, and no other file of any of them changes.
#[test]
#[expect(clippy::single_range_in_vec_init)]
fn every_volume_of_a_disk_is_trimmed_and_only_the_page_file_changes() {
    const SIZE: u64 = 512 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let guest = MemoryGuest::of(GuestSpec {
        disk_size: SIZE,
        ..GuestSpec::new(WinVersion::Win10)
    });
    guest.write(&path);
    let disk = Arc::new(FileDisk::open_rw(&path).unwrap());
    let reader = open(&disk);
    let unneeded = unneeded(&reader, &Extents::whole(SIZE));
    let contents = |reader: &EmbeddedReader| -> Vec<_> {
        let read = |file: &crate::demo::guest::GuestFile| {
            let id = guest.spec.partition(file.role).unwrap().index;
            let volume = crate::guest::VolumeId::new(id);
            reader.read(volume, &file.path, 256 << 20).unwrap()
        };
        guest.files.iter().map(read).collect()
    };
    let before = contents(&reader);
    let done = trim(disk.as_ref(), &reader, &map(&[0..SIZE])).unwrap();
    let mut freed = 0;
    for (volume, trimmed) in reader.volumes().iter().zip(&done) {
        assert_eq!(
            (trimmed.partition, trimmed.filesystem),
            (volume.id.partition, volume.kind)
        );
        let known = matches!(volume.kind, FsKind::Fat | FsKind::Ntfs);
        assert_eq!(trimmed.kept.is_none(), known, "{trimmed:?}");
        // Most of a volume is free, and nothing outside of it.
        let size = volume.partition.size_bytes;
        let most = trimmed.freed_bytes > size / 2 && trimmed.freed_bytes <= size;
        assert_eq!(most, known, "{trimmed:?} of {size}");
        freed += trimmed.freed_bytes;
    }
    let trimmed = done.iter().filter(|volume| volume.kept.is_none());
    assert!(trimmed.count() >= 2, "{done:?}");
    assert_eq!(unneeded.bytes(), freed);
    let after = contents(&open(&disk));
    let changed: Vec<_> = (guest.files.iter().zip(before.iter().zip(&after)))
        .filter(|(_, (before, after))| before != after)
        .map(|(file, _)| file.path.to_string())
        .collect();
    // Windows refills it.
    assert_eq!(changed, ["\\pagefile.sys"]);
}

/// Free space of these volumes may hold data that is needed.
#[test]
#[expect(clippy::single_range_in_vec_init)]
fn a_volume_that_must_stay_is_not_written_and_says_why() {
    type Change = fn(&mut VolumeState);
    let cases: [(Change, &str); 5] = [
        (|s| s.dirty = true, "it was not unmounted cleanly"),
        (|s| s.hibernated = true, "it is hibernated"),
        (
            |s| s.vss_snapshots = true,
            "it has shadow copies, whose data lies in its free space",
        ),
        (
            |s| s.unreadable = Some("x".into()),
            "its file system cannot be read",
        ),
        (
            |s| {
                s.unreadable = Some("x".into());
                s.dirty = true;
            },
            "its file system cannot be read",
        ),
    ];
    let (dir, disk) = ntfs(&[("pagefile.sys", vec![5; PAGES])]);
    let before = std::fs::read(dir.path().join("disk")).unwrap();
    let guest = open(&disk);
    for (change, why) in cases {
        let mut volume = guest.volumes()[0].clone();
        change(&mut volume.state);
        let all = map(&[0..16 << 20]);
        let done = trim_volume(disk.as_ref(), &guest, &all, &volume).unwrap();
        assert_eq!(done.kept.as_deref(), Some(why));
        assert_eq!((done.freed_bytes, done.files.len()), (0, 0), "{why}");
    }
    assert!(std::fs::read(dir.path().join("disk")).unwrap() == before);
}

#[test]
#[expect(clippy::single_range_in_vec_init)]
fn a_hibernation_file_that_nobody_resumes_from_is_zeroed() {
    let (dir, disk) = ntfs(&[
        ("HIBERFIL.SYS", vec![3; PAGES]),
        ("mine.bin", vec![9; PAGES]),
    ]);
    let done = trim(disk.as_ref(), &open(&disk), &map(&[0..16 << 20])).unwrap();
    let files: Vec<_> = (done[0].files.iter())
        .map(|file| (file.path.to_string(), file.kept.as_deref()))
        .collect();
    assert_eq!(files, [("\\hiberfil.sys".to_string(), None)]);
    let most = PAGES as u64 - 2 * GRAIN;
    assert!(done[0].files[0].freed_bytes >= most, "{done:?}");
    let bytes = std::fs::read(dir.path().join("disk")).unwrap();
    let left = |byte: u8| bytes.iter().filter(|b| **b == byte).count();
    assert!(left(3) <= 2 * GRAIN as usize && left(9) >= PAGES);
}

/// The free space of FAT12 is not looked for: it is at most a few MiB.
#[test]
#[expect(clippy::single_range_in_vec_init)]
fn a_small_volume_of_fat_is_kept_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let size = 1 << 20;
    std::fs::write(&path, vec![7; size as usize]).unwrap();
    let disk = Arc::new(FileDisk::open_rw(&path).unwrap());
    let options = fatfs::FormatVolumeOptions::new().fat_type(fatfs::FatType::Fat12);
    fatfs::format_volume(crate::block::Window::new(disk.clone(), 0, size), options).unwrap();
    let before = std::fs::read(&path).unwrap();
    let done = trim(disk.as_ref(), &open(&disk), &map(&[0..size])).unwrap();
    let [volume] = &done[..] else {
        panic!("{done:?}");
    };
    assert_eq!(volume.kept.as_deref(), Some("it is too small"));
    assert_eq!(volume.freed_bytes, 0);
    assert!(std::fs::read(&path).unwrap() == before);
}
