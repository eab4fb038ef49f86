//! Checks free space before the first write. The guest's volumes need it for what the plan adds to
//! them, the output directory for the result.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::actions::Action;
use crate::block::{BlockRead, BlockWrite};
use crate::disk::export::Export;
use crate::disk::{copy, partition};
use crate::error::{Blocker, Error, Result};
use crate::fix::trim::{self, DataMap};
use crate::guest::{FileKind, FsKind, GuestError, GuestPath, GuestRead, VolumeId, embedded};
use crate::inspect::Hives;
use crate::ui::bytes;

use super::job::Copying;
use super::job::Job;
use crate::session::{Disk, Session};

/// An MFT record and its entry in the directory index.
const RECORD: u64 = 2048;
/// What NTFS needs in addition: the MFT and indexes grow in steps.
const STEPS: u64 = 256 << 10;
const CLUSTER: u64 = 4096;
/// Domain XML, reports and the probe disk.
const DOCUMENTS: u64 = 1 << 20;

/// Space that the plan needs on the guest's volumes, and in the output directory besides the copy.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    volumes: BTreeMap<VolumeId, u64>,
    /// The originals of the edited hives.
    backup: u64,
}

impl Needs {
    /// Adds up the needs of a plan. `system` is the Windows volume.
    pub(super) fn of(
        actions: &[Action],
        hives: &Hives,
        system: VolumeId,
        guest: &dyn GuestRead,
    ) -> Result<Self> {
        let mut needs = Self::default();
        for action in actions {
            let writes = action.writes(hives);
            let volume = action.volume().unwrap_or(system);
            if let Some(folders) = writes.folders {
                needs.add(guest, volume, folders as u64 * (CLUSTER + RECORD) + STEPS);
            }
            for (path, size) in writes.files {
                needs.file(guest, volume, path, size)?;
            }
            needs.backup += writes.originals;
        }
        Ok(needs)
    }

    fn add(&mut self, guest: &dyn GuestRead, volume: VolumeId, more: u64) {
        // Volumes without writes are not checked.
        if guest.volumes().iter().any(|v| v.id == volume) {
            *self.volumes.entry(volume).or_default() += more;
        }
    }

    /// Adds a file that will be `size` bytes long.
    fn file(
        &mut self,
        guest: &dyn GuestRead,
        volume: VolumeId,
        path: &GuestPath,
        size: u64,
    ) -> Result<()> {
        let cluster = cluster_size(guest, volume);
        let there = guest
            .stat(volume, path)
            .map_err(|e| Error::failed(format!("looking for {path}")).because(e))?;
        let more = match there {
            // It becomes uncompressed, and its present size on disk is unknown here.
            Some(old) if old.compressed || old.reparse_tag.is_some() => {
                size.next_multiple_of(cluster)
            }
            Some(old) if old.kind == FileKind::File => {
                (size.next_multiple_of(cluster)).saturating_sub(old.size.next_multiple_of(cluster))
            }
            _ => size.next_multiple_of(cluster) + RECORD,
        };
        self.add(guest, volume, more);
        Ok(())
    }

    /// The upper limit of what the fix writes to the overlay.
    fn written(&self) -> u64 {
        self.volumes
            .values()
            .fold(0, |sum, n| sum.saturating_add(*n))
    }
}

fn cluster_size(guest: &dyn GuestRead, volume: VolumeId) -> u64 {
    let found = guest.volumes().iter().find(|v| v.id == volume);
    match found.map_or(0, |v| v.state.cluster_size) {
        0 => CLUSTER,
        size => size.into(),
    }
}

/// The upper limit of what the fix adds to the disks' data: it writes whole clusters of the
/// overlay.
pub(super) fn added(actions: &[Action]) -> u64 {
    actions.iter().map(|action| action.overlay_bytes()).sum()
}

/// Blockers for the volumes without room for what the plan adds.
pub(super) fn in_guest(
    needs: &Needs,
    guest: &dyn GuestRead,
    disks: &[Disk],
) -> Result<Vec<Blocker>> {
    let mut blockers = Vec::new();
    for (&volume, &needed) in needs.volumes.iter().filter(|(_, needed)| **needed > 0) {
        let Some(free) = free_bytes(guest, disks, volume, needed)? else {
            continue;
        };
        if free < needed {
            blockers.push(Blocker::new(
                "guest-space",
                format!(
                    "{volume} of the guest has {} free, and the fix writes up to {} to it",
                    bytes(free),
                    bytes(needed)
                ),
                "delete files in the guest (cleanmgr, the recycle bin) or enlarge the volume, shut the guest down, and convert again",
            ));
        }
    }
    Ok(blockers)
}

/// Counts free bytes until there are `enough`. `None` if the engine cannot tell.
fn free_bytes(
    guest: &dyn GuestRead,
    disks: &[Disk],
    volume: VolumeId,
    enough: u64,
) -> Result<Option<u64>> {
    // An unreadable map blocks nothing.
    let believed = |free: Result<Option<u64>, GuestError>| match free {
        Err(GuestError::Unreadable { .. }) => Ok(None),
        free => free
            .map_err(|e| Error::failed(format!("reading the free space of {volume}")).because(e)),
    };
    if let Some(free) = believed(guest.free_bytes(volume, enough))? {
        return Ok(Some(free));
    }
    let known = |kind| matches!(kind, FsKind::Ntfs | FsKind::Fat);
    let volumes = guest.volumes().iter();
    let plain =
        |v: &&crate::guest::Volume| v.id == volume && known(v.kind) && v.state.container.is_none();
    let source = disks.iter().find(|disk| disk.id == volume.disk);
    let (Some(_), Some(source)) = (volumes.clone().find(plain), source) else {
        return Ok(None);
    };
    let session = Session::read(source)?;
    let free = session.guest.reader.free_bytes(volume.within(), enough);
    session.close()?;
    believed(free)
}

/// Fails if the output directory has no room for the disks and the files beside them.
pub(super) fn in_folder(job: &Job, needs: &Needs, disks: &[Disk], target: &Path) -> Result<()> {
    let Some(folder) = target.ancestors().skip(1).find(|folder| folder.is_dir()) else {
        return Ok(());
    };
    let left = |i: usize, disk: &Disk| left(job, target, i, disk);
    match needed(job, needs, disks, copy::free_space(folder)?, &left)? {
        Some(needed) => Ok(copy::check_room(folder, needed)?),
        None => Ok(()),
    }
}

/// The bytes that the output directory needs; `None` if the `free` ones are enough for whole disks. `left` is what is
/// missing of the copy of a disk.
fn needed(
    job: &Job,
    needs: &Needs,
    disks: &[Disk],
    free: u64,
    left: &dyn Fn(usize, &Disk) -> Result<u64>,
) -> Result<Option<u64>> {
    let beside = 2 * needs.written() + needs.backup + DOCUMENTS;
    // The old and the new blocks are saved.
    let undo = 2 * needs.written() + needs.backup;
    let mut images = Vec::new();
    for (i, disk) in disks.iter().enumerate() {
        let copied = job.copy.method == Copying::Now;
        if copied && job.copy.devices.get(i).is_none() {
            images.push((i, disk));
        }
    }
    let compressed = |needed: u64| copy::least_size(needed, job.copy.compress);
    // Most directories have room for the whole disks, including tables. Then the exact size does
    // not matter.
    let most = |size: u64| size.saturating_add(size / 64).saturating_add(1 << 20);
    let whole = (images.iter()).map(|(_, disk)| most(disk.image.virtual_size()));
    let whole = compressed(whole.fold(0, u64::saturating_add));
    let tables = match job.copy.method {
        Copying::Now | Copying::InPlace => 0,
        Copying::Later => tables(disks),
    };
    let least = beside + tables + if job.copy.is_in_place() { undo } else { 0 };
    if free >= whole.saturating_add(least) {
        return Ok(None);
    }
    let mut copies = 0u64;
    for (i, disk) in images {
        copies = copies.saturating_add(left(i, disk)?);
    }
    Ok(Some(compressed(copies).saturating_add(least)))
}

/// The bytes missing of the copy of a disk.
fn left(job: &Job, target: &Path, i: usize, disk: &Disk) -> Result<u64> {
    let size = copy_size(job, disk)?;
    Ok(size.saturating_sub(taken(job, target, i)))
}

/// The space already taken by an interrupted copy of that disk. `--resume` continues it, or removes
/// it before starting over.
fn taken(job: &Job, target: &Path, i: usize) -> u64 {
    let Some(name) = target.file_name().filter(|_| job.output.resume) else {
        return 0;
    };
    let mut partial = OsString::from(".");
    partial.push(name);
    partial.push(".partial");
    let copy = target.with_file_name(partial).join(job.file_name(i));
    let there = copy.symlink_metadata().map_or(0, |meta| meta.blocks());
    there.saturating_mul(512)
}

/// The upper limit of what marking free space takes in the overlays of all disks.
fn tables(disks: &[Disk]) -> u64 {
    const ENTRY: u64 = 8;
    const CLUSTER: u64 = 64 << 10;
    let of = |disk: &Disk| disk.image.virtual_size() / CLUSTER * ENTRY;
    disks.iter().map(of).fold(0, u64::saturating_add)
}

/// The size of the copy, without what the trim will remove.
fn copy_size(job: &Job, source: &Disk) -> Result<u64> {
    let image = &source.image;
    let data = DataMap::of(image)?;
    if !job.copy.trim {
        return Ok(data.copy_size(image.virtual_size()));
    }
    let export = Export::<dyn BlockRead>::open_readonly(image)?;
    let blocks = match crate::disk::export::direct(image)? {
        Some(file) => file,
        None => export.disk(),
    };
    let shown = source.path.display();
    let layout = partition::read_layout(blocks.as_ref()).map_err(|e| e.of(&shown))?;
    let zeroed = Zeroed::default();
    // A disk that cannot be opened is not trimmed.
    if let Ok(guest) = embedded::open_with(blocks, &layout, &source.keys) {
        trim::trim(&zeroed, &guest, &data)?;
    }
    export.close()?;
    DataMap::without(image, &zeroed.ranges()).map(|map| map.copy_size(image.virtual_size()))
}

/// Records the ranges that would be zeroed.
#[derive(Default)]
struct Zeroed(Mutex<Vec<Range<u64>>>);

impl Zeroed {
    /// The ranges, sorted.
    fn ranges(self) -> Vec<Range<u64>> {
        let mut ranges = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        ranges.sort_by_key(|range| range.start);
        ranges
    }
}

impl BlockRead for Zeroed {
    fn size(&self) -> u64 {
        u64::MAX
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl BlockWrite for Zeroed {
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.push(offset..offset.saturating_add(len));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "space_tests.rs"]
mod tests;
