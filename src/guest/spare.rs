//! Finds the bytes of a volume that Windows does not need. They are free clusters, and the clusters
//! of files that it refills at every start.
//!
//! Ranges are in bytes of the disk. Free clusters are those in the file system's own map (NTFS
//! `$Bitmap`, the FAT of FAT16 and FAT32). So a range never includes anything outside the clusters
//! of the volume, such as boot sectors or the end of the partition. A map that calls clusters of
//! NTFS's own metadata free is rejected as a whole. The caller has to check whether the volume as a
//! whole can be trusted (dirty, shadow copies).

use std::io;
use std::ops::Range;
use std::sync::mpsc::sync_channel;
use std::thread;

use super::fs::{FatWidth, fat, le16, le32};
use super::ntfs_read::{BULK, Fallible, NtfsVolume, Stream};
use super::ntfs_record as rec;
use super::{GuestError, GuestPath};
use crate::block::BlockRead;
use crate::disk::bpb::FatBoot;

/// Records of NTFS's own files that have clusters: $MFT, $MFTMirr, $LogFile, $AttrDef, $Bitmap,
/// $Boot, $Secure, $UpCase.
const METADATA: [u64; 8] = [0, 1, 2, 4, 6, 7, 9, 10];
const FILE_BITMAP: u64 = 6;
/// The number of bytes of a map processed at a time.
const PIECE: u64 = 64 << 10;

const WORD: usize = 8;

/// Receives the found ranges.
pub type Found<'a> = &'a mut dyn FnMut(Range<u64>) -> io::Result<()>;
/// Whether a range is of interest; pieces of the map that are not are skipped.
pub type Wanted<'a> = &'a dyn Fn(Range<u64>) -> bool;

/// A file whose contents are worthless.
#[derive(Debug, PartialEq, Eq)]
pub enum Scratch {
    Absent,
    /// The file has to stay, for this reason.
    Kept(&'static str),
    Clusters(Vec<Range<u64>>),
}

/// Joins free clusters to ranges.
struct Joiner<'a> {
    open: Range<u64>,
    found: Found<'a>,
}

impl Joiner<'_> {
    fn add(&mut self, range: Range<u64>) -> io::Result<()> {
        if self.open.end == range.start {
            self.open.end = range.end;
            return Ok(());
        }
        self.flush()?;
        self.open = range;
        Ok(())
    }

    /// Adds the free clusters of a part of a map, up to cluster `end`. `at` returns the offset of a
    /// cluster.
    fn add_unused(
        &mut self,
        first_byte: u64,
        map: &[u8],
        end: u64,
        at: impl Fn(u64) -> u64,
    ) -> io::Result<()> {
        let mut first = first_byte * 8;
        for word in map.chunks(WORD) {
            let next = first + word.len() as u64 * 8;
            match word {
                // Most of a map is uniform.
                [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff] => {}
                [0, 0, 0, 0, 0, 0, 0, 0] if next <= end => self.add(at(first)..at(next))?,
                _ => {
                    let bits = word
                        .iter()
                        .flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1));
                    let unused = (first..end).zip(bits).filter(|(_, bit)| *bit == 0);
                    for (n, _) in unused {
                        self.add(at(n)..at(n + 1))?;
                    }
                }
            }
            first = next;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let range = std::mem::take(&mut self.open);
        if range.is_empty() {
            return Ok(());
        }
        (self.found)(range)
    }
}

impl NtfsVolume {
    pub(super) fn free_ranges(&self, wanted: Wanted<'_>, found: Found<'_>) -> Fallible<()> {
        let bitmap = self.bitmap()?;
        self.check_metadata(&bitmap)?;
        let clusters = self.clusters();
        let cluster = u64::from(self.facts.cluster_size);
        let start = self.start();
        let at = |n: u64| start + n * cluster;
        let mut free = Joiner { open: 0..0, found };
        let bytes = clusters.div_ceil(8);
        let mut pieces = (0..bytes)
            .step_by(PIECE as usize)
            .filter(|byte| wanted(at(byte * 8)..at(((byte + PIECE) * 8).min(clusters))))
            .peekable();
        let mut parts = Vec::new();
        while let Some(first_byte) = pieces.next() {
            // Neighbours are read together: each read may be a round trip to another host.
            let mut end_byte = (first_byte + PIECE).min(bytes);
            while end_byte - first_byte < BULK as u64 && pieces.next_if_eq(&end_byte).is_some() {
                end_byte = (end_byte + PIECE).min(bytes);
            }
            parts.push(first_byte..end_byte);
        }
        self.expect(&bitmap, &parts);
        // The next part is read while one is processed and its free clusters are zeroed.
        let (sender, receiver) = sync_channel(1);
        let (place, map) = (self.place(), &bitmap);
        thread::scope(|scope| {
            scope.spawn(move || {
                for part in parts {
                    let mut piece = vec![0; (part.end - part.start) as usize];
                    let read = place.read_stream(map, part.start, &mut piece);
                    let failed = read.is_err();
                    // The receiver is gone after an error on its side.
                    if sender.send(read.map(|()| (part, piece))).is_err() || failed {
                        return;
                    }
                }
            });
            for part in receiver {
                let (part, piece) = part?;
                let end = (part.end * 8).min(clusters);
                free.add_unused(part.start, &piece, end, at)?;
            }
            Ok(free.flush()?)
        })
    }

    fn bitmap(&self) -> Fallible<Stream> {
        let record = self.file_record(FILE_BITMAP)?;
        let bitmap = self
            .stream(FILE_BITMAP, &record, rec::AT_DATA, &[])?
            .ok_or("$Bitmap has no data")?;
        if bitmap.size() < self.clusters().div_ceil(8) {
            return Err("$Bitmap is too short".into());
        }
        Ok(bitmap)
    }

    /// Rejects a map that calls the MFT free: it is damaged, whatever the dirty flag is.
    fn check_metadata(&self, bitmap: &Stream) -> Fallible<()> {
        for number in METADATA {
            let record = self.file_record(number)?;
            let Some(stream) = self.stream(number, &record, rec::AT_DATA, &[])? else {
                continue;
            };
            for run in stream.runs() {
                let Some(lcn) = run.lcn else { continue };
                let (first, last) = (lcn / 8, (lcn + run.clusters - 1) / 8);
                let mut bytes = Vec::new();
                for at in (first..=last).step_by(PIECE as usize) {
                    bytes.resize((last + 1 - at).min(PIECE) as usize, 0);
                    self.read_stream(bitmap, at, &mut bytes)?;
                    let used =
                        (at * 8..).zip(bytes.iter().flat_map(|b| (0..8).map(move |i| b >> i & 1)));
                    let mut inside = used.filter(|(n, _)| (lcn..lcn + run.clusters).contains(n));
                    if inside.any(|(_, bit)| bit == 0) {
                        return Err("$Bitmap calls clusters of the file system itself free".into());
                    }
                }
            }
        }
        Ok(())
    }

    /// The clusters of a file whose contents Windows recreates. One with a crash dump has to
    /// stay: the next start of Windows saves it from there.
    pub(super) fn scratch(&self, path: &GuestPath) -> Fallible<Scratch> {
        let Some(found) = self.find(path)? else {
            return Ok(Scratch::Absent);
        };
        let record = self.file_record(found.record)?;
        if record.is_dir() || record.find(rec::AT_REPARSE_POINT, &[])?.is_some() {
            return Ok(Scratch::Kept("it is not a plain file"));
        }
        let Some(stream) = self.stream(found.record, &record, rec::AT_DATA, &[])? else {
            return Ok(Scratch::Absent);
        };
        if !stream.is_plain() {
            return Ok(Scratch::Kept("it is compressed, encrypted or sparse"));
        }
        let cluster = u64::from(self.facts.cluster_size);
        let start = self.start();
        let clusters: Vec<_> = stream
            .runs()
            .iter()
            .filter_map(|run| {
                let at = start + run.lcn? * cluster;
                Some(at..at + run.clusters * cluster)
            })
            .collect();
        if let Some(first) = clusters.first() {
            // Read from the disk and not through the file. Dumps are written below the file system,
            // which then may treat the file as never written.
            let mut magic = [0; 8];
            self.read_volume(first.start - start, &mut magic)?;
            if matches!(&magic, b"PAGEDUMP" | b"PAGEDU64") {
                return Ok(Scratch::Kept(
                    "it contains a crash dump that Windows has not saved yet",
                ));
            }
        }
        Ok(Scratch::Clusters(clusters))
    }
}

/// The free clusters of a FAT16 or FAT32 volume. `Ok(false)` for FAT12, which is too small to
/// matter.
pub(super) fn fat_free_ranges(
    disk: &dyn BlockRead,
    start: u64,
    len: u64,
    wanted: Wanted<'_>,
    found: Found<'_>,
) -> Result<bool, GuestError> {
    let damaged = |reason: &str| GuestError::Unreadable {
        path: GuestPath::root().to_string(),
        reason: reason.to_string(),
    };
    let mut boot = vec![0; 512];
    disk.read_at(start, &mut boot)?;
    let facts = fat(&boot).ok_or_else(|| damaged("the boot sector is not one of FAT"))?;
    let (entry, clean) = match facts.width {
        FatWidth::Fat12 => return Ok(false),
        FatWidth::Fat16 => (2, 0x8000),
        FatWidth::Fat32 => (4, 0x0800_0000),
    };
    let sector = u64::from(facts.bytes_per_sector);
    let boot = FatBoot::read(&boot).ok_or_else(|| damaged("the boot sector is cut off"))?;
    let table = u64::from(boot.reserved_sectors) * sector;
    let table_len = u64::from(boot.table_sectors()) * sector;
    let root = (u64::from(boot.root_entries) * 32).div_ceil(sector) * sector;
    let data = table + u64::from(boot.tables) * table_len + root;
    let total = u64::from(boot.sectors()) * sector;
    let cluster = u64::from(facts.cluster_size);
    // Entries 0 and 1 are not clusters.
    let end = 2 + total
        .checked_sub(data)
        .ok_or_else(|| damaged("its sizes do not fit"))?
        / cluster;
    if end * entry > table_len || total > len {
        return Err(damaged("its sizes do not fit"));
    }
    let at = |n: u64| start + data + (n - 2) * cluster;
    let mut free = Joiner { open: 0..0, found };
    let mut piece = Vec::new();
    for offset in (0..end * entry).step_by(PIECE as usize) {
        let first = offset / entry;
        let count = (end - first).min(PIECE / entry);
        if offset > 0 && !wanted(at(first)..at(first + count)) {
            continue;
        }
        piece.resize((count * entry) as usize, 0);
        disk.read_at(start + table + offset, &mut piece)?;
        let value = |n: u64| match entry {
            2 => u32::from(le16(&piece, ((n - first) * 2) as usize)),
            // The upper four bits are reserved.
            _ => le32(&piece, ((n - first) * 4) as usize) & 0x0fff_ffff,
        };
        if offset == 0 && value(1) & clean == 0 {
            return Err(damaged("it was not unmounted cleanly"));
        }
        for n in first.max(2)..first + count {
            if value(n) == 0 {
                free.add(at(n)..at(n + 1))?;
            }
        }
    }
    free.flush()?;
    Ok(true)
}
