//! Makes unneeded data of a disk read as zeroes, so that it is not copied. This is free clusters,
//! page files, and a hibernation file that nobody will resume from.
//!
//! Works on the overlay, after the fix and **before** the verification. So the verified state, trim
//! included, is the copied one. A trim that removed something needed shows before a byte is copied.
//!
//! Trims only volumes whose free space map can be trusted: NTFS and FAT that were closed cleanly. A
//! volume with shadow copies stays unchanged, because they lie in clusters that its bitmap calls
//! free. So do encrypted volumes without a key, unknown volumes, and everything outside of volumes.
//! In a BitLocker volume opened with a key, the encrypted bytes of free clusters are zeroed;
//! BitLocker's own clusters are never free. Nothing smaller than a cluster of the overlay is
//! zeroed: that would make the overlay grow and the copy no smaller.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::block::BlockWrite;
use crate::disk::chain::Image;
use crate::disk::export;
use crate::error::{Error, Result};
use crate::guest::spare::Scratch;
use crate::guest::{EmbeddedReader, FsKind, GuestPath, GuestRead, Volume};
use crate::tool::qemu_img;
use crate::transfer::Extents;

/// The default cluster size of a qcow2.
const GRAIN: u64 = 64 << 10;
/// Holes smaller than this count as data, which limits the memory for the map of an image.
const SMALL_HOLE: u64 = 1 << 20;

/// Files at the root of an NTFS volume that Windows refills.
const SCRATCH: [&str; 3] = ["pagefile.sys", "swapfile.sys", "hiberfil.sys"];

/// The result for one volume, for the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeTrim {
    pub partition: u32,
    pub filesystem: FsKind,
    /// Data that is no longer copied.
    pub freed_bytes: u64,
    /// The reason why the volume is copied unchanged.
    pub kept: Option<String>,
    pub files: Vec<FileTrim>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileTrim {
    pub path: GuestPath,
    pub freed_bytes: u64,
    pub kept: Option<String>,
}

/// The ranges of an image with data.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DataMap {
    /// Sorted, at least [`SMALL_HOLE`] apart, aligned to [`GRAIN`].
    ranges: Vec<Range<u64>>,
    /// The exact number of bytes, without rounding.
    pub bytes: u64,
    /// The numbers of grains and of [`TABLE`]s with data.
    grains: Touched<GRAIN>,
    tables: Touched<TABLE>,
}

/// The range that one table of a qcow2 with clusters of [`GRAIN`] covers.
const TABLE: u64 = GRAIN / 8 * GRAIN;

/// Counts the units of `SIZE` bytes that ascending ranges touch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Touched<const SIZE: u64> {
    count: u64,
    next: u64,
}

impl<const SIZE: u64> Touched<SIZE> {
    fn add(&mut self, range: &Range<u64>) {
        let first = (range.start / SIZE).max(self.next);
        let end = range.end.div_ceil(SIZE);
        self.count += end.saturating_sub(first);
        self.next = self.next.max(end);
    }
}

impl DataMap {
    pub fn of(image: &Image) -> Result<Self> {
        let mut map = Self::default();
        data_ranges(image, &mut |range| map.add(&range))?;
        Ok(map)
    }

    /// The map of an image; its sorted `zeroed` ranges count as holes.
    pub fn without(image: &Image, zeroed: &[Range<u64>]) -> Result<Self> {
        let mut map = Self::default();
        data_ranges(image, &mut |range| map.add_without(&range, zeroed))?;
        Ok(map)
    }

    fn add_without(&mut self, range: &Range<u64>, zeroed: &[Range<u64>]) {
        let mut start = range.start;
        let first = zeroed.partition_point(|hole| hole.end <= range.start);
        for hole in zeroed[first..].iter().take_while(|h| h.start < range.end) {
            if start < hole.start {
                self.add(&(start..hole.start));
            }
            start = start.max(hole.end);
        }
        if start < range.end {
            self.add(&(start..range.end));
        }
    }

    /// The size of a copy of an image with this data, including the metadata of a qcow2.
    pub fn copy_size(&self, virtual_size: u64) -> u64 {
        let data = self.grains.count.saturating_add(self.tables.count);
        // One block of reference counts for 2 GiB, their table, the header, and 8 bytes for each
        // table.
        let counts = data.div_ceil(GRAIN / 2) + 2;
        let level1 = (virtual_size.div_ceil(TABLE) * 8).div_ceil(GRAIN);
        (data.saturating_add(counts).saturating_add(level1)).saturating_mul(GRAIN)
    }

    /// The ranges with data on a disk of this size, in whole grains.
    pub(crate) fn extents(&self, virtual_size: u64) -> Extents {
        let ranges = self.ranges.iter().cloned();
        ranges.map(|r| r.start..r.end.min(virtual_size)).collect()
    }

    fn add(&mut self, range: &Range<u64>) {
        self.bytes += range.end.saturating_sub(range.start);
        self.grains.add(range);
        self.tables.add(range);
        let start = range.start / GRAIN * GRAIN;
        let end = range.end.next_multiple_of(GRAIN);
        match self.ranges.last_mut() {
            Some(last) if start < last.end.saturating_add(SMALL_HOLE) => {
                last.end = last.end.max(end);
            }
            _ => self.ranges.push(start..end),
        }
    }

    fn touches(&self, range: &Range<u64>) -> bool {
        self.within(range.clone()).next().is_some()
    }

    /// The parts of a range that have data.
    fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.ranges.partition_point(|r| r.end <= range.start);
        self.ranges[first..]
            .iter()
            .take_while({
                let end = range.end;
                move |r| r.start < end
            })
            .map(move |r| r.start.max(range.start)..r.end.min(range.end))
    }
}

/// Passes every range of the image that has data to `found`, in order. For a plain file this starts
/// no program.
fn data_ranges(image: &Image, found: &mut dyn FnMut(Range<u64>)) -> Result<()> {
    let failed = || Error::failed(format!("reading the map of {}", image.path().display()));
    match export::plain_data(image, found) {
        Some(done) => done.map_err(|e| failed().because(e)),
        None => qemu_img::data_ranges(&image.spec(), found).map_err(|e| failed().because(e)),
    }
}

/// Trims every volume that allows it. `guest` must read `disk` as it is now.
pub fn trim(
    disk: &dyn BlockWrite,
    guest: &EmbeddedReader,
    data: &DataMap,
) -> Result<Vec<VolumeTrim>> {
    let mut done = Vec::new();
    for volume in guest.volumes() {
        done.push(trim_volume(disk, guest, data, volume)?);
    }
    Ok(done)
}

/// The ranges that a trim would zero after the VM is off, in whole grains. They are free space of
/// its file systems, and page files. The disk is still in use. Only ranges with data are examined.
pub(crate) fn unneeded(guest: &EmbeddedReader, data: &Extents) -> Extents {
    let mut unneeded = Extents::default();
    for volume in guest.volumes() {
        if let Some(why) = needed_in_use(volume) {
            tracing::info!("{}: its free space is copied: {why}", volume.id);
            continue;
        }
        let mut add = |range: Range<u64>| {
            let whole = range.start.next_multiple_of(GRAIN)..range.end / GRAIN * GRAIN;
            unneeded.insert(whole);
        };
        let looked = guest.free_ranges(
            volume.id,
            &|range| data.parts_of(range).next().is_some(),
            &mut |range| {
                add(range);
                Ok(())
            },
        );
        if let Err(e) = looked {
            tracing::info!("{}: the rest of its free space is copied: {e}", volume.id);
        }
        let known = volume.kind == FsKind::Ntfs && volume.state.container.is_none();
        for name in SCRATCH.iter().filter(|_| known) {
            let scratch = GuestPath::parse(name).map(|path| guest.scratch(volume.id, &path));
            if let Ok(Ok(Scratch::Clusters(clusters))) = scratch {
                clusters.into_iter().for_each(&mut add);
            }
        }
    }
    unneeded
}

/// The reason why the free space of a volume in use is needed. A volume of a running VM is never
/// closed, so that alone is none.
fn needed_in_use(volume: &Volume) -> Option<String> {
    let mut closed = volume.clone();
    closed.state.dirty = false;
    untouchable(&closed)
}

/// The reason why a volume must stay unchanged.
fn untouchable(volume: &Volume) -> Option<String> {
    let state = &volume.state;
    let reason = match volume.kind {
        FsKind::Bitlocker | FsKind::Luks => "it is encrypted",
        FsKind::Ntfs | FsKind::Fat => match () {
            () if state.unreadable.is_some() => "its file system cannot be read",
            () if state.dirty => "it was not unmounted cleanly",
            () if state.hibernated => "it is hibernated",
            () if state.vss_snapshots => "it has shadow copies, whose data lies in its free space",
            () => return None,
        },
        _ => "its file system is not one whose free space is known",
    };
    Some(reason.to_string())
}

fn trim_volume(
    disk: &dyn BlockWrite,
    guest: &EmbeddedReader,
    data: &DataMap,
    volume: &Volume,
) -> Result<VolumeTrim> {
    let mut result = VolumeTrim {
        partition: volume.id.partition,
        filesystem: volume.kind,
        freed_bytes: 0,
        kept: untouchable(volume),
        files: Vec::new(),
    };
    if result.kept.is_some() {
        return Ok(result);
    }
    let doing = || format!("trimming {}", volume.id);
    let mut write_error = None;
    let mut freed = 0;
    let looked = guest.free_ranges(volume.id, &|range| data.touches(&range), &mut |range| {
        zero(disk, data, &range)
            .map(|n| freed += n)
            .inspect_err(|e| write_error = Some(e.kind()))
    });
    result.freed_bytes = freed;
    match looked {
        Ok(true) => {}
        Ok(false) => result.kept = Some("it is too small".to_string()),
        // A map that cannot be trusted costs time and nothing else.
        Err(e @ crate::guest::GuestError::Unreadable { .. }) if write_error.is_none() => {
            result.kept = Some(e.to_string());
            return Ok(result);
        }
        Err(e) => return Err(Error::failed(doing()).because(e)),
    }
    if volume.kind != FsKind::Ntfs {
        return Ok(result);
    }
    for name in SCRATCH {
        let path =
            GuestPath::parse(name).map_err(|e| Error::failed("naming a page file").because(e))?;
        let mut file = FileTrim {
            path,
            freed_bytes: 0,
            kept: None,
        };
        match guest.scratch(volume.id, &file.path) {
            Ok(Scratch::Absent) => continue,
            Ok(Scratch::Kept(why)) => file.kept = Some(why.to_string()),
            Ok(Scratch::Clusters(mut clusters)) => {
                // Zeroes in an encrypted volume decrypt to arbitrary bytes: the head of the file,
                // which identifies it, stays.
                if let Some(first) = clusters.first_mut()
                    && volume.state.container.is_some()
                {
                    first.start = (first.start + GRAIN).min(first.end);
                }
                for range in clusters {
                    file.freed_bytes +=
                        zero(disk, data, &range).map_err(|e| Error::failed(doing()).because(e))?;
                }
            }
            Err(e) => file.kept = Some(e.to_string()),
        }
        result.freed_bytes += file.freed_bytes;
        result.files.push(file);
    }
    Ok(result)
}

/// Zeroes the whole grains of a range that have data, and returns the number of bytes.
fn zero(disk: &dyn BlockWrite, data: &DataMap, range: &Range<u64>) -> std::io::Result<u64> {
    let whole = range.start.next_multiple_of(GRAIN)..range.end / GRAIN * GRAIN;
    let mut freed = 0;
    if whole.is_empty() {
        return Ok(freed);
    }
    for part in data.within(whole) {
        let len = part.end - part.start;
        disk.zero_at(part.start, len)?;
        freed += len;
    }
    Ok(freed)
}

#[cfg(test)]
#[path = "trim_disk_tests.rs"]
mod disk_tests;

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn map(ranges: &[Range<u64>]) -> DataMap {
        let mut map = DataMap::default();
        for range in ranges {
            map.add(range);
        }
        map
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init)]
    fn maps_are_rounded_and_joined() {
        let m = map(&[
            100..200,
            GRAIN + 1..GRAIN + 2,
            8 << 20..9 << 20,
            (9 << 20) + SMALL_HOLE..(11 << 20),
        ]);
        assert_eq!(m.bytes, 101 + (2 << 20));
        assert_eq!(
            m.ranges,
            [0..2 * GRAIN, 8 << 20..9 << 20, 10 << 20..11 << 20]
        );
        // Grains: one touched twice, a separate one, 16, 16; all below one table.
        assert_eq!((m.grains.count, m.tables.count), (34, 1));
        assert_eq!(m.copy_size(1 << 40), (34 + 1 + 3 + 1) * GRAIN);
        let parts = |r: Range<u64>| m.within(r).collect::<Vec<_>>();
        assert_eq!(parts(GRAIN..8 << 20), [GRAIN..2 * GRAIN]);
        assert_eq!(
            parts(GRAIN..(8 << 20) + 1),
            [GRAIN..2 * GRAIN, 8 << 20..(8 << 20) + 1]
        );
        assert!(!m.touches(&(2 * GRAIN..8 << 20)));
        assert!(!m.touches(&(11 << 20..u64::MAX)));
    }

    #[test]
    fn only_readable_closed_volumes_without_a_session_or_shadow_copies_are_trimmed() {
        use crate::disk::layout::Partition;
        use crate::guest::{VolumeId, VolumeState};
        let volume = |kind, change: fn(&mut VolumeState)| {
            let mut state = VolumeState::default();
            change(&mut state);
            Volume {
                id: VolumeId::new(1),
                partition: Partition {
                    index: 1,
                    type_id: "0x07".into(),
                    start_bytes: 0,
                    size_bytes: 0,
                    guid: None,
                    name: None,
                    active: false,
                },
                kind,
                label: None,
                state,
            }
        };
        type Change = fn(&mut VolumeState);
        let nothing: Change = |_| {};
        let cases: [(FsKind, Change, bool); 11] = [
            (FsKind::Ntfs, nothing, true),
            (FsKind::Fat, nothing, true),
            (FsKind::Ntfs, |s| s.dirty = true, false),
            (FsKind::Ntfs, |s| s.hibernated = true, false),
            (FsKind::Ntfs, |s| s.vss_snapshots = true, false),
            (FsKind::Ntfs, |s| s.unreadable = Some("x".into()), false),
            (FsKind::Bitlocker, nothing, false),
            (FsKind::Luks, nothing, false),
            (FsKind::Ext, nothing, false),
            (FsKind::Refs, nothing, false),
            (FsKind::Unknown, nothing, false),
        ];
        for (kind, change, trimmed) in cases {
            let volume = volume(kind, change);
            assert_eq!(untouchable(&volume).is_none(), trimmed, "{volume:?}");
            // While the VM runs, only the mark of an open volume is no reason.
            let dirty = volume.state.dirty;
            let unneeded = needed_in_use(&volume).is_none();
            assert_eq!(unneeded, trimmed || dirty, "in use: {volume:?}");
        }
        for (kind, reason) in [
            (FsKind::Luks, "it is encrypted"),
            (FsKind::Bitlocker, "it is encrypted"),
            (
                FsKind::Ext,
                "its file system is not one whose free space is known",
            ),
        ] {
            let told = untouchable(&volume(kind, nothing));
            assert_eq!(told.as_deref(), Some(reason), "{kind:?}");
        }
    }

    /// The rest of a grain beside free clusters is in use.
    #[test]
    #[expect(clippy::single_range_in_vec_init)]
    fn only_whole_grains_that_are_free_are_zeroed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let zeroed = |range: Range<u64>| {
            std::fs::write(&path, vec![1; 8 * GRAIN as usize]).unwrap();
            let disk = crate::block::FileDisk::open_rw(&path).unwrap();
            let freed = zero(&disk, &map(&[GRAIN..8 * GRAIN]), &range).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            let first = bytes.iter().position(|b| *b == 0).map(|n| n as u64);
            let count = bytes.iter().filter(|b| **b == 0).count() as u64;
            assert_eq!(count, freed, "{range:?}");
            (first, freed / GRAIN)
        };
        let at = |grain: u64| Some(grain * GRAIN);
        assert_eq!(zeroed(2 * GRAIN..4 * GRAIN), (at(2), 2));
        assert_eq!(zeroed(2 * GRAIN - 4096..4 * GRAIN + 4096), (at(2), 2));
        assert_eq!(zeroed(2 * GRAIN + 4096..4 * GRAIN), (at(3), 1));
        assert_eq!(zeroed(2 * GRAIN..4 * GRAIN - 512), (at(2), 1));
        assert_eq!(zeroed(2 * GRAIN + 1..3 * GRAIN - 1), (None, 0));
        assert_eq!(zeroed(2 * GRAIN + 1..4 * GRAIN - 1), (None, 0));
        // Ranges without data need no zeroing.
        assert_eq!(zeroed(0..2 * GRAIN), (at(1), 1));
        // What is freed in several places counts in all of them.
        let size = 40 * GRAIN;
        std::fs::write(&path, vec![1; size as usize]).unwrap();
        let disk = crate::block::FileDisk::open_rw(&path).unwrap();
        let data = map(&[0..GRAIN, 30 * GRAIN..33 * GRAIN]);
        assert_eq!(zero(&disk, &data, &(0..size)).unwrap(), 4 * GRAIN);
        let bytes = std::fs::read(&path).unwrap();
        let places = bytes.chunks(GRAIN as usize).map(|grain| grain[0]);
        let zero: Vec<_> = (0u64..)
            .zip(places)
            .filter(|(_, byte)| *byte == 0)
            .collect();
        assert_eq!(zero, [(0, 0), (30, 0), (31, 0), (32, 0)]);
    }

    #[test]
    fn what_was_zeroed_is_no_data_and_all_between_is() {
        let left = |holes: &[Range<u64>]| {
            let mut map = DataMap::default();
            for range in [10..20, 30..60] {
                map.add_without(&(range.start * GRAIN..range.end * GRAIN), holes);
            }
            (map.bytes / GRAIN, map.grains.count)
        };
        let hole = |start: u64, end: u64| start * GRAIN..end * GRAIN;
        assert_eq!(left(&[]), (40, 40));
        assert_eq!(left(&[hole(0, 10), hole(20, 30)]), (40, 40));
        assert_eq!(left(&[hole(12, 14)]), (38, 38));
        assert_eq!(left(&[hole(12, 14), hole(16, 18)]), (36, 36));
        assert_eq!(left(&[hole(5, 15), hole(18, 35), hole(50, 99)]), (18, 18));
        assert_eq!(left(&[hole(0, 99)]), (0, 0));
        // Nothing of a hole at either end counts as data.
        for (holes, range) in [
            ([hole(80, 110), hole(115, 120)], hole(110, 115)),
            ([hole(100, 110), hole(115, 130)], hole(110, 115)),
            ([hole(90, 100), hole(120, 130)], hole(100, 120)),
        ] {
            let mut map = DataMap::default();
            map.add_without(&hole(100, 120), &holes);
            assert_eq!(map.ranges, [range], "{holes:?}");
        }
    }

    /// How often each byte occurs.
    fn counts(bytes: &[u8]) -> [u64; 256] {
        let mut counts = [0; 256];
        for chunk in bytes.chunks(4096) {
            match chunk.iter().all(|byte| *byte == chunk[0]) {
                true => counts[usize::from(chunk[0])] += chunk.len() as u64,
                false => chunk
                    .iter()
                    .for_each(|byte| counts[usize::from(*byte)] += 1),
            }
        }
        counts
    }

    /// A FAT volume as a whole disk: a file that is there, and one that was deleted.
    fn fat() -> (tempfile::TempDir, std::sync::Arc<crate::block::FileDisk>) {
        use crate::block::{FileDisk, Window};
        use std::io::Write as _;
        const SIZE: u64 = 64 << 20;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        let disk = std::sync::Arc::new(FileDisk::open_rw(&path).unwrap());
        let window = || Window::new(disk.clone(), 0, SIZE);
        let options = fatfs::FormatVolumeOptions::new()
            .fat_type(fatfs::FatType::Fat32)
            .bytes_per_cluster(512);
        fatfs::format_volume(window(), options).unwrap();
        let fs = fatfs::FileSystem::new(window(), fatfs::FsOptions::new()).unwrap();
        for (name, mib, byte) in [("gone.bin", 4, 7), ("kept.bin", 2, 9), ("gone2.bin", 4, 7)] {
            let mut file = fs.root_dir().create_file(name).unwrap();
            file.write_all(&vec![byte; mib << 20]).unwrap();
        }
        fs.root_dir().remove("gone.bin").unwrap();
        fs.root_dir().remove("gone2.bin").unwrap();
        fs.unmount().unwrap();
        (dir, disk)
    }

    pub(super) fn open(disk: &std::sync::Arc<crate::block::FileDisk>) -> EmbeddedReader {
        let layout = crate::disk::partition::read_layout(disk.as_ref()).unwrap();
        crate::guest::embedded::open(disk.clone(), &layout).unwrap()
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init)]
    fn what_a_deleted_file_held_is_zeroed_and_what_is_in_use_is_not() {
        let (dir, disk) = fat();
        let before = std::fs::read(dir.path().join("disk")).unwrap();
        let data = map(&[0..64 << 20]);
        let unneeded = unneeded(&open(&disk), &Extents::whole(64 << 20));
        let done = trim(disk.as_ref(), &open(&disk), &data).unwrap();
        let [volume] = &done[..] else {
            panic!("{done:?}")
        };
        assert_eq!(
            (volume.partition, volume.filesystem, &volume.kept),
            (0, FsKind::Fat, &None)
        );
        // Most of the volume is free; both deleted files are, but for grains that are shared with others.
        assert!(volume.freed_bytes > 50 << 20, "{volume:?}");
        let after = std::fs::read(dir.path().join("disk")).unwrap();
        let (had, has) = (counts(&before), counts(&after));
        assert!(has[7] < 3 * GRAIN, "{}", has[7]);
        assert_eq!(has[9], had[9]);
        let guest = open(&disk);
        let (id, kept) = (guest.volumes()[0].id, GuestPath::parse("kept.bin").unwrap());
        assert!(guest.read(id, &kept, 4 << 20).unwrap() == vec![9; 2 << 20]);
        // What is not zeroed is as it was; what a sync leaves out is what a trim zeroes.
        let grains = before
            .chunks(GRAIN as usize)
            .zip(after.chunks(GRAIN as usize));
        for (i, (was, is)) in grains.enumerate() {
            assert!(was == is || *is == [0; GRAIN as usize], "grain {i}");
        }
        assert_eq!(unneeded.bytes(), volume.freed_bytes);
        // Where there is no data nothing is zeroed, and nothing counts.
        let (_dir, disk) = fat();
        let done = trim(disk.as_ref(), &open(&disk), &map(&[0..GRAIN])).unwrap();
        assert_eq!(done[0].freed_bytes, 0);
    }

    /// An NTFS volume of 16 MiB as a whole disk, full of old data where it is free.
    pub(super) fn ntfs(
        files: &[(&str, Vec<u8>)],
    ) -> (tempfile::TempDir, std::sync::Arc<crate::block::FileDisk>) {
        const SIZE: u64 = 16 << 20;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let named =
            |(name, bytes): &(&str, Vec<u8>)| (GuestPath::parse(name).unwrap(), bytes.clone());
        let files = files.iter().map(named).collect();
        let mut disk = vec![7; SIZE as usize];
        for (at, bytes) in crate::testing::ntfs::volume(SIZE, 0, &files) {
            let at = at as usize;
            disk[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        std::fs::write(&path, disk).unwrap();
        let disk = crate::block::FileDisk::open_rw(&path).unwrap();
        (dir, std::sync::Arc::new(disk))
    }

    const PAGES: usize = 1 << 20;

    #[test]
    #[expect(clippy::single_range_in_vec_init)]
    fn page_files_are_zeroed_but_not_a_crash_dump_and_no_file_of_the_user() {
        let page_file = |head: &[u8]| {
            let mut bytes = vec![5; PAGES];
            bytes[..head.len()].copy_from_slice(head);
            bytes
        };
        for (head, freed) in [(&b""[..], true), (b"PAGEDUMP", false), (b"PAGEDU64", false)] {
            let (dir, disk) = ntfs(&[
                ("mine.bin", vec![9; PAGES]),
                ("pagefile.sys", page_file(head)),
                ("swapfile.sys", vec![6; PAGES]),
                ("Windows\\pagefile.sys", vec![4; PAGES]),
            ]);
            let before = std::fs::read(dir.path().join("disk")).unwrap();
            let size = before.len() as u64;
            let guest = open(&disk);
            let unneeded = unneeded(&guest, &Extents::whole(size)).bytes();
            let done = trim(disk.as_ref(), &guest, &map(&[0..size])).unwrap();
            let [volume] = &done[..] else {
                panic!("{done:?}")
            };
            assert_eq!((volume.filesystem, &volume.kept), (FsKind::Ntfs, &None));
            let after = std::fs::read(dir.path().join("disk")).unwrap();
            let (had, has) = (counts(&before), counts(&after));
            let gone = |byte: u8| (had[usize::from(byte)], has[usize::from(byte)]);
            // What shares a grain with another file stays.
            let most = PAGES as u64 - 2 * GRAIN;
            let ((was, is), (was_swap, is_swap)) = (gone(5), gone(6));
            assert_eq!(was - is >= most, freed, "{head:?}");
            assert!(was_swap - is_swap >= most && (freed || was == is));
            assert!(gone(9).0 == gone(9).1 && gone(4).0 == gone(4).1);
            let (free_was, free_is) = gone(7);
            assert!(free_was > 8 << 20 && free_is < 2 * GRAIN, "{free_is}");
            let names: Vec<_> = volume
                .files
                .iter()
                .map(|file| file.path.to_string())
                .collect();
            assert_eq!(names, ["\\pagefile.sys", "\\swapfile.sys"]);
            assert_eq!(volume.files[0].kept.is_none(), freed);
            assert_eq!(volume.files[0].freed_bytes, was - is);
            assert_eq!(volume.files[1].freed_bytes, was_swap - is_swap);
            let all = (was - is) + (was_swap - is_swap) + (free_was - free_is);
            assert_eq!(volume.freed_bytes, all);
            // What a sync leaves out is the same.
            assert_eq!(unneeded, all);
        }
    }

    /// Zeroes decrypt to anything: the head tells what the file is.
    #[test]
    #[expect(clippy::single_range_in_vec_init)]
    fn the_head_of_a_page_file_stays_in_an_encrypted_volume() {
        let freed = |container, pages| {
            let (_dir, disk) = ntfs(&[("pagefile.sys", vec![5; pages])]);
            let guest = open(&disk);
            let size = map(&[0..16 << 20]);
            let mut volume = guest.volumes()[0].clone();
            volume.state.container = container;
            let freed = trim_volume(disk.as_ref(), &guest, &size, &volume).unwrap();
            freed.files[0].freed_bytes
        };
        let whole = freed(None, PAGES);
        assert!(whole <= PAGES as u64 && whole >= PAGES as u64 - 2 * GRAIN);
        assert_eq!(freed(Some(FsKind::Bitlocker), PAGES), whole - GRAIN);
        // All of a short file is its head.
        assert_eq!(freed(Some(FsKind::Bitlocker), 5000), 0);
    }

    /// A disk that cannot be zeroed.
    struct Full;

    impl crate::block::BlockRead for Full {
        fn size(&self) -> u64 {
            16 << 20
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            unreachable!()
        }
    }

    impl BlockWrite for Full {
        fn write_at(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
            unreachable!()
        }
        fn zero_at(&self, _: u64, _: u64) -> std::io::Result<()> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// A map that cannot be trusted costs time; an overlay that cannot be written is a failure.
    #[test]
    #[expect(clippy::single_range_in_vec_init)]
    fn a_damaged_map_leaves_the_volume_and_a_failed_write_ends_the_run() {
        let (dir, disk) = ntfs(&[("pagefile.sys", vec![5; PAGES])]);
        let data = map(&[0..16 << 20]);
        assert!(trim(&Full, &open(&disk), &data).is_err());
        // Only the page file has data.
        let at = std::fs::read(dir.path().join("disk")).unwrap();
        let at = at.iter().position(|byte| *byte == 5).unwrap() as u64;
        assert!(trim(&Full, &open(&disk), &map(&[at..at + (1 << 20)])).is_err());
        // The record of the map of free clusters.
        let guest = open(&disk);
        let mut bytes = vec![0; 16 << 20];
        crate::block::BlockRead::read_at(disk.as_ref(), 0, &mut bytes).unwrap();
        let lcn = u64::from_le_bytes(bytes[48..56].try_into().unwrap());
        disk.write_at(lcn * 4096 + 6 * 1024, &[0; 1024]).unwrap();
        drop(guest);
        let done = trim(disk.as_ref(), &open(&disk), &data).unwrap();
        assert!(
            done[0].kept.is_some() && done[0].freed_bytes == 0,
            "{done:?}"
        );
        assert!(done[0].files.is_empty());
    }

    #[test]
    fn a_copy_of_a_large_disk_has_its_tables() {
        let mut large = DataMap::default();
        // 4 GiB of data: 65536 grains, 8 tables, 3 blocks of reference counts with their table and the header.
        large.add(&(0..4 << 30));
        assert_eq!(large.copy_size(4 << 30), (65536 + 8 + 3 + 2 + 1) * GRAIN);
        // 16384 tables and more need a second cluster of their own table.
        assert_eq!(large.copy_size(8 << 40), (65536 + 8 + 3 + 2 + 2) * GRAIN);
        assert_eq!(
            large.copy_size((4 << 40) + 1),
            (65536 + 8 + 3 + 2 + 2) * GRAIN
        );
        assert_eq!(large.copy_size(4 << 40), (65536 + 8 + 3 + 2 + 1) * GRAIN);
        let small = map(&[0..100, 5 << 20..(5 << 20) + 100]);
        let wanted: Extents = [0..GRAIN, 5 << 20..(5 << 20) + 100].into_iter().collect();
        assert_eq!(small.extents((5 << 20) + 100), wanted);
    }
}
