//! Commits overlays to the disks under them, with an undo log, and rolls them back.
//!
//! Several disks of a VM are one unit: all are checked before the first is written. A journal in
//! state "committing" rolls back all of them, whichever was reached.
//!
//! Works on blocks, not files. Whatever an engine changed in the overlay, the changed ranges are
//! known exactly. Their old bytes are saved and durable before the first new byte is written. So a
//! rollback restores the disk byte for byte, including file system metadata. A range with neither
//! the old nor the new contents was changed by somebody else since. Then the rollback refuses
//! before it writes anything.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::block::{BlockRead, BlockWrite};
use crate::failpoint;
use crate::files;

use super::journal::{Journal, JournalError, JournalState, UndoLog, UndoRange, sync_folder};
use super::trusted::TrustError;
use crate::text::sha256_hex;

pub const BEFORE_FILE: &str = "backup/blocks.before";
pub const AFTER_FILE: &str = "backup/blocks.after";

/// The longest range handled at once.
const CHUNK: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Untrusted(#[from] TrustError),
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: io::Error,
    },
    #[error("the journal has no undo log: the disk was never changed")]
    NothingToUndo,
    #[error(
        "{disk} has changed since the fix: {count} of {total} ranges have neither the old nor the new bytes, the first at offset {offset}"
    )]
    DiskChanged {
        disk: PathBuf,
        count: usize,
        total: usize,
        offset: u64,
    },
    #[error(
        "{disk} was changed by another program during this run: {count} of {total} ranges differ from the bytes that were read, the first at offset {offset}"
    )]
    Stale {
        disk: PathBuf,
        count: usize,
        total: usize,
        offset: u64,
    },
    #[error("the undo log is damaged: range at offset {offset} does not have the recorded digest")]
    UndoDamaged { offset: u64 },
    #[error("{disk} is {actual} bytes, the journal was written for {expected} bytes")]
    OtherDisk {
        disk: PathBuf,
        expected: u64,
        actual: u64,
    },
    #[error("range at offset {offset} does not read back as written")]
    ReadBack { offset: u64 },
}

type Result<T, E = CommitError> = std::result::Result<T, E>;

fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> CommitError {
    let doing = doing.into();
    |source| CommitError::Io { doing, source }
}

/// One disk of the journal before and after the fix; `ranges` may cover more than the differences.
pub struct Changing<'d> {
    pub before: &'d dyn BlockRead,
    pub after: &'d dyn BlockRead,
    pub ranges: &'d [(u64, u64)],
}

/// Saves the old and the new bytes of every range that differs. Makes them durable and records them
/// in the journal, for its disks in order. Returns the number of bytes that differ.
pub fn prepare(journal: &mut Journal, disks: &[Changing<'_>]) -> Result<u64> {
    let folder = journal.folder().to_path_buf();
    let backup = folder.join("backup");
    fs::create_dir_all(&backup).map_err(io_error(format!("creating {}", backup.display())))?;
    let mut logs = Vec::new();
    for (i, disk) in disks.iter().enumerate() {
        logs.push(save(&folder, i, disk)?);
    }
    sync_folder(&backup).map_err(io_error(format!("syncing {}", backup.display())))?;
    let ranges = logs.iter().flatten().flat_map(|log| &log.ranges);
    let total = ranges.map(|range| range.len).sum();
    journal.doc.set_undo(logs);
    journal.save()?;
    failpoint::hit("undo-log").map_err(io_error("saving the undo log"))?;
    Ok(total)
}

/// The file names for the saved blocks of disk `i`.
fn saved_names(i: usize) -> (String, String) {
    match i {
        0 => (BEFORE_FILE.to_string(), AFTER_FILE.to_string()),
        i => {
            let number = i + 1;
            let name = |when: &str| format!("backup/blocks-{number}.{when}");
            (name("before"), name("after"))
        }
    }
}

/// Whether the directory of a journal has saved blocks of a disk, whatever the journal states.
pub fn holds_saved_blocks(folder: &Path) -> bool {
    let entries = match fs::read_dir(folder.join("backup")) {
        Ok(entries) => entries,
        Err(e) => {
            return !matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            );
        }
    };
    let saved = |name: &str| name.starts_with("blocks") && name.ends_with(".before");
    // An unreadable entry may be one.
    entries
        .into_iter()
        .any(|entry| entry.map_or(true, |entry| saved(&entry.file_name().to_string_lossy())))
}

fn save(folder: &Path, i: usize, disk: &Changing<'_>) -> Result<Option<UndoLog>> {
    let (before, after) = saved_names(i);
    let mut old_file = Sink::create(folder.join(&before))?;
    let mut new_file = Sink::create(folder.join(&after))?;
    let mut ranges = Vec::new();
    let mut old = vec![0; CHUNK as usize];
    let mut new = vec![0; CHUNK as usize];
    for &(start, len) in disk.ranges {
        let mut offset = start;
        while offset < start + len {
            let n = CHUNK.min(start + len - offset) as usize;
            let (old, new) = (&mut old[..n], &mut new[..n]);
            disk.before
                .read_at(offset, old)
                .map_err(io_error(format!("reading the disk at {offset}")))?;
            disk.after
                .read_at(offset, new)
                .map_err(io_error(format!("reading the overlay at {offset}")))?;
            if old != new {
                old_file.write(old)?;
                new_file.write(new)?;
                ranges.push(UndoRange {
                    offset,
                    len: n as u64,
                    before_sha256: sha256_hex(old),
                    after_sha256: sha256_hex(new),
                });
            }
            offset += n as u64;
        }
    }
    old_file.close()?;
    new_file.close()?;
    Ok((!ranges.is_empty()).then_some(UndoLog {
        before,
        after,
        ranges,
    }))
}

/// Writes the prepared new bytes to the disks, flushes, and reads them back. `disks` are those of
/// [`JournalDocument::changed`](super::journal::JournalDocument::changed), in that order.
pub fn commit(journal: &mut Journal, disks: &[&dyn BlockWrite]) -> Result<()> {
    let disks = with_undo_logs(journal, disks)?;
    for disk in &disks {
        disk.check_still_old()?;
    }
    journal.set_state(JournalState::Committing)?;
    write_all(journal, &disks, Direction::Commit)?;
    failpoint::hit("written").map_err(io_error("writing the disk"))?;
    Ok(journal.set_state(JournalState::Committed)?)
}

/// Restores the old bytes on all disks, or writes to none if one of them cannot be restored.
/// `force` also overwrites ranges that somebody else changed since.
pub fn rollback(journal: &mut Journal, disks: &[&dyn BlockWrite], force: bool) -> Result<u64> {
    let disks = with_undo_logs(journal, disks)?;
    if !force {
        for disk in &disks {
            disk.check_unchanged(journal)?;
        }
    }
    // On a full disk no state can be saved. The old state also means that the disk is to be
    // restored.
    if let Err(error) = journal.set_state(JournalState::RollingBack) {
        let why = with_cause(&error);
        tracing::warn!("restoring the disk without a note in the journal: {why}");
    }
    write_all(journal, &disks, Direction::Rollback)?;
    if let Err(error) = journal.set_state(JournalState::RolledBack) {
        let why = with_cause(&error);
        tracing::warn!(
            "the disk is restored, but {} does not record it ({why}): another rollback does no harm",
            journal.path().display()
        );
    }
    let ranges = disks.iter().flat_map(|disk| &disk.undo.ranges);
    Ok(ranges.map(|range| range.len).sum())
}

fn with_cause(error: &JournalError) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// A changed disk and its undo log.
struct Undoable<'d> {
    path: PathBuf,
    undo: UndoLog,
    disk: &'d dyn BlockWrite,
}

fn with_undo_logs<'d>(
    journal: &Journal,
    disks: &[&'d dyn BlockWrite],
) -> Result<Vec<Undoable<'d>>> {
    let changed = journal.doc.changed();
    if changed.is_empty() || changed.len() != disks.len() {
        return Err(CommitError::NothingToUndo);
    }
    let mut found = Vec::new();
    for ((of, undo), disk) in changed.into_iter().zip(disks) {
        if disk.size() != of.size_bytes {
            return Err(CommitError::OtherDisk {
                disk: of.path,
                expected: of.size_bytes,
                actual: disk.size(),
            });
        }
        found.push(Undoable {
            path: of.path,
            undo,
            disk: *disk,
        });
    }
    Ok(found)
}

impl Undoable<'_> {
    /// Fails if the old bytes have changed. The overlay was made over them; over others, its
    /// changes would produce a mixture.
    fn check_still_old(&self) -> Result<()> {
        let strange = self.strange(|range, digest| digest == range.before_sha256)?;
        match strange.first() {
            None => Ok(()),
            Some(offset) => Err(CommitError::Stale {
                disk: self.path.clone(),
                count: strange.len(),
                total: self.undo.ranges.len(),
                offset: *offset,
            }),
        }
    }

    fn check_unchanged(&self, journal: &Journal) -> Result<()> {
        let ours = |range: &UndoRange, digest: &str| {
            digest == range.before_sha256 || digest == range.after_sha256
        };
        let mut strange = self.strange(ours)?;
        if matches!(
            journal.doc.state,
            JournalState::Committing | JournalState::RollingBack
        ) {
            strange = self.torn_by_others(journal, strange)?;
        }
        match strange.first() {
            None => Ok(()),
            Some(offset) => Err(CommitError::DiskChanged {
                disk: self.path.clone(),
                count: strange.len(),
                total: self.undo.ranges.len(),
                offset: *offset,
            }),
        }
    }

    /// Finds the ranges with a sector that is neither old nor new. A write of this program that was
    /// cut short leaves only old and new sectors.
    fn torn_by_others(&self, journal: &Journal, strange: Vec<u64>) -> Result<Vec<u64>> {
        const SECTOR: usize = 512;
        let mut found = Vec::new();
        let mut saved = Vec::new();
        for name in [&self.undo.before, &self.undo.after] {
            let mut bytes_of = BTreeMap::new();
            let mut file = journal.open(Path::new(name))?;
            let path = journal.folder().join(name);
            for_each_saved(&mut file, &path, &self.undo.ranges, |range, bytes| {
                if strange.contains(&range.offset) {
                    bytes_of.insert(range.offset, bytes.to_vec());
                }
                Ok(())
            })?;
            saved.push(bytes_of);
        }
        for range in (self.undo.ranges.iter()).filter(|r| strange.contains(&r.offset)) {
            let there = read_range(self.disk, range)?;
            let ours = match (saved[0].get(&range.offset), saved[1].get(&range.offset)) {
                (Some(old), Some(new)) => (there.chunks(SECTOR))
                    .zip(old.chunks(SECTOR).zip(new.chunks(SECTOR)))
                    .all(|(is, (old, new))| is == old || is == new),
                _ => false,
            };
            if !ours {
                found.push(range.offset);
            }
        }
        Ok(found)
    }

    /// The ranges whose contents differ from the expected ones.
    fn strange(&self, expected: impl Fn(&UndoRange, &str) -> bool) -> Result<Vec<u64>> {
        let mut strange = Vec::new();
        for range in &self.undo.ranges {
            if !expected(range, &sha256_hex(&read_range(self.disk, range)?)) {
                strange.push(range.offset);
            }
        }
        Ok(strange)
    }
}

fn read_range(disk: &dyn BlockRead, range: &UndoRange) -> Result<Vec<u8>> {
    let mut bytes = vec![0; range.len.min(CHUNK) as usize];
    disk.read_at(range.offset, &mut bytes)
        .map_err(io_error(format!("reading the disk at {}", range.offset)))?;
    Ok(bytes)
}

#[derive(Clone, Copy)]
enum Direction {
    Commit,
    Rollback,
}

impl Direction {
    fn point(self) -> &'static str {
        match self {
            Self::Commit => "committing",
            Self::Rollback => "rolling-back",
        }
    }

    fn file(self, undo: &UndoLog) -> &str {
        match self {
            Self::Commit => &undo.after,
            Self::Rollback => &undo.before,
        }
    }

    fn digest(self, range: &UndoRange) -> &str {
        match self {
            Self::Commit => &range.after_sha256,
            Self::Rollback => &range.before_sha256,
        }
    }
}

/// Writes the saved bytes of every range. Checks all digests of all disks first, then writes,
/// flushes and reads back.
fn write_all(journal: &Journal, disks: &[Undoable<'_>], direction: Direction) -> Result<()> {
    let mut opened = Vec::new();
    for disk in disks {
        // Opened once, so the checked bytes are the written ones.
        let name = direction.file(&disk.undo);
        let path = journal.folder().join(name);
        let mut saved = journal.open(Path::new(name))?;
        for_each_saved(&mut saved, &path, &disk.undo.ranges, |range, bytes| {
            if sha256_hex(bytes) == direction.digest(range) {
                Ok(())
            } else {
                Err(CommitError::UndoDamaged {
                    offset: range.offset,
                })
            }
        })?;
        opened.push((disk, saved, path));
    }
    let point = direction.point();
    for (i, (disk, mut saved, path)) in opened.into_iter().enumerate() {
        if i > 0 {
            failpoint::hit(&format!("{point}-next-disk"))
                .map_err(io_error("writing the next disk"))?;
        }
        let Undoable { undo, disk, .. } = disk;
        for_each_saved(&mut saved, &path, &undo.ranges, |range, bytes| {
            disk.write_at(range.offset, bytes)
                .and_then(|()| failpoint::hit(point))
                .map_err(io_error(format!("writing the disk at {}", range.offset)))
        })?;
        disk.flush().map_err(io_error("flushing the disk"))?;
        for range in &undo.ranges {
            if sha256_hex(&read_range(*disk, range)?) != direction.digest(range) {
                return Err(CommitError::ReadBack {
                    offset: range.offset,
                });
            }
        }
    }
    Ok(())
}

fn for_each_saved(
    file: &mut File,
    path: &Path,
    ranges: &[UndoRange],
    mut act: impl FnMut(&UndoRange, &[u8]) -> Result<()>,
) -> Result<()> {
    let reading = || format!("reading {}", path.display());
    file.seek(SeekFrom::Start(0)).map_err(io_error(reading()))?;
    let mut buffer = vec![0; CHUNK as usize];
    for range in ranges {
        let bytes = buffer
            .get_mut(..range.len as usize)
            .ok_or(CommitError::UndoDamaged {
                offset: range.offset,
            })?;
        file.read_exact(bytes).map_err(io_error(reading()))?;
        act(range, bytes)?;
    }
    Ok(())
}

struct Sink {
    file: File,
    path: PathBuf,
}

impl Sink {
    fn create(path: PathBuf) -> Result<Self> {
        let file = File::create(&path).map_err(io_error(format!("creating {}", path.display())))?;
        Ok(Self { file, path })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .map_err(io_error(format!("writing {}", self.path.display())))
    }

    fn close(self) -> Result<()> {
        files::sync(&self.file, &self.path)
            .map_err(io_error(format!("syncing {}", self.path.display())))
    }
}

#[cfg(test)]
mod tests;
