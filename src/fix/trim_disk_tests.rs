//! Trimming of whole disks and of volumes that must stay unchanged.

use std::sync::Arc;

use super::tests::{map, ntfs, open};
use super::*;
use crate::block::{BlockRead, FileDisk};
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

/// The place of a record of the MFT of an NTFS volume.
fn record(disk: &FileDisk, volume: u64, number: u64) -> u64 {
    let mut lcn = [0; 8];
    disk.read_at(volume + 48, &mut lcn).unwrap();
    volume + u64::from_le_bytes(lcn) * 4096 + number * 1024
}

/// Replaces bytes that occur once in a record.
fn patch(disk: &FileDisk, record: u64, old: &[u8], new: &[u8]) {
    let mut bytes = [0; 1024];
    disk.read_at(record, &mut bytes).unwrap();
    let found: Vec<_> = (0..bytes.len() - old.len())
        .filter(|at| bytes[*at..at + old.len()] == *old)
        .collect();
    assert_eq!(found.len(), 1, "{found:?}");
    disk.write_at(record + found[0] as u64, new).unwrap();
}

/// The clusters that are full of a byte.
fn clusters_of(dir: &tempfile::TempDir, byte: u8) -> Vec<usize> {
    let bytes = std::fs::read(dir.path().join("disk")).unwrap();
    let full = |cluster: usize| bytes[4096 * cluster..][..4096] == [byte; 4096];
    (0..bytes.len() / 4096).filter(|n| full(*n)).collect()
}

/// The record of the first file of a volume that `testing::ntfs` made.
const FIRST_FILE: u64 = 24;

#[test]
#[expect(clippy::single_range_in_vec_init)]
fn a_page_file_in_two_pieces_is_zeroed_in_both() {
    let (dir, disk) = ntfs(&[("pagefile.sys", vec![5; PAGES])]);
    let at = clusters_of(&dir, 5)[0];
    // One run of 256 clusters; then its second half stands before the first.
    let (lcn, half) = (at as u16, 128u16);
    let old = [&[0x54, 0, 1, 0, 0][..], &u64::from(lcn).to_le_bytes()[..5]].concat();
    let first = [half.to_le_bytes(), (lcn + half).to_le_bytes()].concat();
    let second = [half.to_le_bytes(), half.wrapping_neg().to_le_bytes()].concat();
    let new = [&[0x22][..], &first, &[0x22], &second, &[0]].concat();
    patch(&disk, record(&disk, 0, FIRST_FILE), &old, &new);
    let guest = open(&disk);
    let (id, path) = (
        guest.volumes()[0].id,
        GuestPath::parse("pagefile.sys").unwrap(),
    );
    let Scratch::Clusters(clusters) = guest.scratch(id, &path).unwrap() else {
        panic!();
    };
    assert_eq!(clusters.len(), 2);
    let unneeded = unneeded(&guest, &Extents::whole(16 << 20));
    let done = trim(disk.as_ref(), &guest, &map(&[0..16 << 20])).unwrap();
    let freed = done[0].files[0].freed_bytes;
    // What shares a grain with something else stays at each end.
    assert!(freed >= PAGES as u64 - 4 * GRAIN, "{freed}");
    let left = clusters_of(&dir, 5).len() as u64 * 4096;
    assert_eq!(left, PAGES as u64 - freed);
    assert_eq!(unneeded.bytes(), done[0].freed_bytes);
}

/// A volume of a running VM is never closed; what is free then is left out of a sync all the same.
#[test]
#[expect(clippy::single_range_in_vec_init)]
fn the_free_space_of_a_volume_in_use_is_left_out_of_a_sync_and_not_zeroed() {
    let (_dir, disk) = ntfs(&[("pagefile.sys", vec![5; PAGES])]);
    let all = Extents::whole(16 << 20);
    let closed = unneeded(&open(&disk), &all).bytes();
    assert!(closed > 8 << 20, "{closed}");
    // Version 3.1 of NTFS, and the mark behind it.
    patch(&disk, record(&disk, 0, 3), &[3, 1, 0, 0], &[3, 1, 1, 0]);
    let guest = open(&disk);
    assert!(guest.volumes()[0].state.dirty);
    assert_eq!(unneeded(&guest, &all).bytes(), closed);
    let done = trim(disk.as_ref(), &guest, &map(&[0..16 << 20])).unwrap();
    let kept = done[0].kept.as_deref();
    assert_eq!(
        (kept, done[0].freed_bytes),
        (Some("it was not unmounted cleanly"), 0)
    );
}

#[test]
#[expect(clippy::single_range_in_vec_init)]
fn a_page_file_that_cannot_be_read_stays_and_says_why() {
    let (dir, disk) = ntfs(&[
        ("pagefile.sys", vec![5; PAGES]),
        ("swapfile.sys", vec![6; PAGES]),
    ]);
    disk.write_at(record(&disk, 0, FIRST_FILE), &[0; 4])
        .unwrap();
    let done = trim(disk.as_ref(), &open(&disk), &map(&[0..16 << 20])).unwrap();
    let [pages, swap] = &done[0].files[..] else {
        panic!("{done:?}");
    };
    assert!(pages.kept.is_some() && pages.freed_bytes == 0, "{pages:?}");
    assert!(swap.kept.is_none() && swap.freed_bytes > 0, "{swap:?}");
    assert_eq!(clusters_of(&dir, 5).len(), PAGES / 4096);
}

/// Two NTFS volumes of 16 MiB, each full of old data where it is free.
fn two_volumes() -> (tempfile::TempDir, Arc<FileDisk>) {
    const MIB: u32 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let mut bytes = vec![7; 33 << 20];
    bytes[..512].fill(0);
    for (i, start) in [MIB, 17 * MIB].into_iter().enumerate() {
        let entry = &mut bytes[446 + 16 * i..][..16];
        entry[4] = 7;
        entry[8..12].copy_from_slice(&(start / 512).to_le_bytes());
        entry[12..16].copy_from_slice(&(16 * MIB / 512).to_le_bytes());
        let files = [(GuestPath::parse("mine").unwrap(), vec![9; 5000])].into();
        let size = u64::from(16 * MIB);
        for (at, piece) in crate::testing::ntfs::volume(size, start / 512, &files) {
            let at = start as usize + at as usize;
            bytes[at..at + piece.len()].copy_from_slice(&piece);
        }
    }
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(&path, bytes).unwrap();
    (dir, Arc::new(FileDisk::open_rw(&path).unwrap()))
}

#[test]
#[expect(clippy::single_range_in_vec_init)]
fn a_map_that_is_damaged_keeps_no_other_volume() {
    for damaged in [0, 1] {
        let (_dir, disk) = two_volumes();
        let all = Extents::whole(33 << 20);
        let both = unneeded(&open(&disk), &all).bytes();
        assert!(both > 24 << 20, "{both}");
        let volume = [1 << 20, 17 << 20][damaged];
        disk.write_at(record(&disk, volume, 6), &[0; 1024]).unwrap();
        let guest = open(&disk);
        assert_eq!(unneeded(&guest, &all).bytes(), both / 2);
        let done = trim(disk.as_ref(), &guest, &map(&[0..33 << 20])).unwrap();
        let freed: Vec<_> = done.iter().map(|volume| volume.freed_bytes).collect();
        let mut wanted = [both / 2; 2];
        wanted[damaged] = 0;
        assert_eq!(freed, wanted);
        assert!(done[damaged].kept.is_some() && done[1 - damaged].kept.is_none());
    }
}
