//! Committing an overlay to the disk under it, with an undo log; and undoing that.
//!
//! Works on blocks, not files: whatever an engine changed in the overlay, the ranges that differ are
//! known exactly, their old bytes are saved and made durable before the first new byte is written, and
//! a rollback therefore restores the disk byte for byte, file system metadata included. A range whose
//! present contents are neither the old nor the new ones was changed by somebody else since: then the
//! rollback refuses before it writes anything.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::disk::block::{BlockRead, BlockWrite};
use crate::failpoint;

use super::journal::{Journal, JournalError, State, UndoLog, UndoRange, sha256_hex, sync_folder};
use super::trusted::TrustError;

pub const BEFORE_FILE: &str = "backup/blocks.before";
pub const AFTER_FILE: &str = "backup/blocks.after";

/// Longest range handled at once.
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
    #[error("the journal holds no undo log: the disk was never changed")]
    NothingToUndo,
    #[error(
        "the disk has changed since the fix: {count} of {total} ranges hold neither the old nor the new bytes, the first at offset {offset}"
    )]
    DiskChanged {
        count: usize,
        total: usize,
        offset: u64,
    },
    #[error(
        "the disk was changed by another program during this run: {count} of {total} ranges do not hold what was read, the first at offset {offset}"
    )]
    Stale {
        count: usize,
        total: usize,
        offset: u64,
    },
    #[error("the undo log is damaged: range at offset {offset} does not have the recorded digest")]
    UndoDamaged { offset: u64 },
    #[error("the disk is {actual} bytes, the journal was written for {expected} bytes")]
    OtherDisk { expected: u64, actual: u64 },
    #[error("range at offset {offset} does not read back as written")]
    ReadBack { offset: u64 },
}

type Result<T, E = CommitError> = std::result::Result<T, E>;

fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> CommitError {
    let doing = doing.into();
    |source| CommitError::Io { doing, source }
}

/// Saves the old and the new bytes of every range that differs, durably, and records them in the
/// journal. `ranges` may cover more than what differs. Returns the number of bytes that differ.
pub fn prepare(
    journal: &mut Journal,
    before: &dyn BlockRead,
    after: &dyn BlockRead,
    ranges: &[(u64, u64)],
) -> Result<u64> {
    let folder = journal.folder().to_path_buf();
    let backup = folder.join("backup");
    fs::create_dir_all(&backup).map_err(io_error(format!("creating {}", backup.display())))?;
    let mut old_file = Sink::create(folder.join(BEFORE_FILE))?;
    let mut new_file = Sink::create(folder.join(AFTER_FILE))?;
    let mut log = Vec::new();
    let mut old = vec![0; CHUNK as usize];
    let mut new = vec![0; CHUNK as usize];
    let mut total = 0;
    for &(start, len) in ranges {
        let mut offset = start;
        while offset < start + len {
            let n = CHUNK.min(start + len - offset) as usize;
            let (old, new) = (&mut old[..n], &mut new[..n]);
            before
                .read_at(offset, old)
                .map_err(io_error(format!("reading the disk at {offset}")))?;
            after
                .read_at(offset, new)
                .map_err(io_error(format!("reading the overlay at {offset}")))?;
            if old != new {
                old_file.write(old)?;
                new_file.write(new)?;
                total += n as u64;
                log.push(UndoRange {
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
    sync_folder(&backup).map_err(io_error(format!("syncing {}", backup.display())))?;
    journal.doc.undo = (!log.is_empty()).then(|| UndoLog {
        before: BEFORE_FILE.to_string(),
        after: AFTER_FILE.to_string(),
        ranges: log,
    });
    journal.save()?;
    failpoint::hit("undo-log").map_err(io_error("saving the undo log"))?;
    Ok(total)
}

/// Writes the prepared new bytes to the disk, flushes, and reads them back.
pub fn commit(journal: &mut Journal, disk: &dyn BlockWrite) -> Result<()> {
    let undo = undo_log(journal, disk)?;
    check_still_old(&undo, disk)?;
    journal.set_state(State::Committing)?;
    let point = "committing";
    write_ranges(journal, &undo.after, &undo.ranges, disk, point, |r| {
        &r.after_sha256
    })?;
    failpoint::hit("written").map_err(io_error("writing the disk"))?;
    Ok(journal.set_state(State::Committed)?)
}

/// Restores the old bytes. With `force`, also over ranges that somebody else changed since.
pub fn rollback(journal: &mut Journal, disk: &dyn BlockWrite, force: bool) -> Result<u64> {
    let undo = undo_log(journal, disk)?;
    if !force {
        check_unchanged(&undo, disk)?;
    }
    journal.set_state(State::RollingBack)?;
    let point = "rolling-back";
    write_ranges(journal, &undo.before, &undo.ranges, disk, point, |r| {
        &r.before_sha256
    })?;
    journal.set_state(State::RolledBack)?;
    Ok(undo.ranges.iter().map(|r| r.len).sum())
}

fn undo_log(journal: &Journal, disk: &dyn BlockWrite) -> Result<UndoLog> {
    let expected = journal.doc.disk.size_bytes;
    if disk.size() != expected {
        return Err(CommitError::OtherDisk {
            expected,
            actual: disk.size(),
        });
    }
    journal.doc.undo.clone().ok_or(CommitError::NothingToUndo)
}

/// The overlay was made over these bytes: over others, what it changes would be a mixture.
fn check_still_old(undo: &UndoLog, disk: &dyn BlockWrite) -> Result<()> {
    let mut strange = Vec::new();
    for range in &undo.ranges {
        if sha256_hex(&read_range(disk, range)?) != range.before_sha256 {
            strange.push(range.offset);
        }
    }
    match strange.first() {
        None => Ok(()),
        Some(&offset) => Err(CommitError::Stale {
            count: strange.len(),
            total: undo.ranges.len(),
            offset,
        }),
    }
}

fn check_unchanged(undo: &UndoLog, disk: &dyn BlockWrite) -> Result<()> {
    let mut strange = Vec::new();
    for range in &undo.ranges {
        let digest = sha256_hex(&read_range(disk, range)?);
        if digest != range.before_sha256 && digest != range.after_sha256 {
            strange.push(range.offset);
        }
    }
    match strange.first() {
        None => Ok(()),
        Some(&offset) => Err(CommitError::DiskChanged {
            count: strange.len(),
            total: undo.ranges.len(),
            offset,
        }),
    }
}

fn read_range(disk: &dyn BlockRead, range: &UndoRange) -> Result<Vec<u8>> {
    let mut bytes = vec![0; range.len.min(CHUNK) as usize];
    disk.read_at(range.offset, &mut bytes)
        .map_err(io_error(format!("reading the disk at {}", range.offset)))?;
    Ok(bytes)
}

/// Writes the saved bytes of every range: checks all digests first, then writes, flushes and reads
/// back.
fn write_ranges(
    journal: &Journal,
    file: &str,
    ranges: &[UndoRange],
    disk: &dyn BlockWrite,
    point: &str,
    digest: impl Fn(&UndoRange) -> &String,
) -> Result<()> {
    // Opened once: what was checked is what is written.
    let path = journal.folder().join(file);
    let mut saved = journal.open(Path::new(file))?;
    for_each_saved(&mut saved, &path, ranges, |range, bytes| {
        if sha256_hex(bytes) == *digest(range) {
            Ok(())
        } else {
            Err(CommitError::UndoDamaged {
                offset: range.offset,
            })
        }
    })?;
    for_each_saved(&mut saved, &path, ranges, |range, bytes| {
        disk.write_at(range.offset, bytes)
            .and_then(|()| failpoint::hit(point))
            .map_err(io_error(format!("writing the disk at {}", range.offset)))
    })?;
    disk.flush().map_err(io_error("flushing the disk"))?;
    for range in ranges {
        if sha256_hex(&read_range(disk, range)?) != *digest(range) {
            return Err(CommitError::ReadBack {
                offset: range.offset,
            });
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
        self.file
            .sync_all()
            .map_err(io_error(format!("syncing {}", self.path.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::block::FileDisk;
    use crate::fix::journal::DiskRef;

    fn image(path: &Path, seed: u8) -> Vec<u8> {
        let bytes: Vec<u8> = (0..3u32 << 20)
            .map(|i| (i.wrapping_mul(31) >> 7) as u8 ^ seed)
            .collect();
        fs::write(path, &bytes).unwrap();
        bytes
    }

    fn setup(dir: &Path) -> (Journal, Vec<u8>, Vec<u8>) {
        let old = image(&dir.join("disk"), 0);
        let mut new = old.clone();
        new[5000..9000].fill(0xee);
        new[(2 << 20) - 10..(2 << 20) + 10].fill(0xdd);
        fs::write(dir.join("overlay"), &new).unwrap();
        let disk = DiskRef {
            path: dir.join("disk"),
            format: "raw".into(),
            size_bytes: old.len() as u64,
            in_place: true,
        };
        let mut journal = Journal::create(dir, disk, vec![]).unwrap();
        let before = FileDisk::open(&dir.join("disk")).unwrap();
        let after = FileDisk::open(&dir.join("overlay")).unwrap();
        let ranges = [(0, 65536), (65536, 65536), ((2 << 20) - 65536, 131072)];
        prepare(&mut journal, &before, &after, &ranges).unwrap();
        (journal, old, new)
    }

    #[test]
    fn commit_and_rollback_are_exact() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, old, new) = setup(dir.path());
        let disk = FileDisk::open_rw(&dir.path().join("disk")).unwrap();
        commit(&mut journal, &disk).unwrap();
        assert_eq!(fs::read(dir.path().join("disk")).unwrap(), new);
        assert_eq!(journal.doc.state, State::Committed);
        rollback(&mut journal, &disk, false).unwrap();
        assert_eq!(fs::read(dir.path().join("disk")).unwrap(), old);
        // Twice is the same as once.
        rollback(&mut journal, &disk, false).unwrap();
        assert_eq!(fs::read(dir.path().join("disk")).unwrap(), old);
    }

    #[test]
    fn nothing_is_committed_over_what_another_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _, _) = setup(dir.path());
        let disk = FileDisk::open_rw(&dir.path().join("disk")).unwrap();
        disk.write_at(6000, b"somebody else").unwrap();
        let now = fs::read(dir.path().join("disk")).unwrap();
        let error = commit(&mut journal, &disk).unwrap_err();
        assert!(
            matches!(
                error,
                CommitError::Stale {
                    count: 1,
                    total: 2,
                    ..
                }
            ),
            "{error}"
        );
        assert_eq!(fs::read(dir.path().join("disk")).unwrap(), now);
        assert_ne!(journal.doc.state, State::Committing, "nothing to roll back");
    }

    #[test]
    fn a_disk_changed_by_others_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, old, _) = setup(dir.path());
        let disk = FileDisk::open_rw(&dir.path().join("disk")).unwrap();
        commit(&mut journal, &disk).unwrap();
        disk.write_at(6000, b"somebody else").unwrap();
        let now = fs::read(dir.path().join("disk")).unwrap();
        let error = rollback(&mut journal, &disk, false).unwrap_err();
        assert!(
            matches!(error, CommitError::DiskChanged { count: 1, .. }),
            "{error}"
        );
        assert_eq!(fs::read(dir.path().join("disk")).unwrap(), now);
        rollback(&mut journal, &disk, true).unwrap();
        assert_eq!(fs::read(dir.path().join("disk")).unwrap(), old);
    }

    #[test]
    fn a_damaged_undo_log_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _, new) = setup(dir.path());
        let disk = FileDisk::open_rw(&dir.path().join("disk")).unwrap();
        commit(&mut journal, &disk).unwrap();
        let log = dir.path().join(BEFORE_FILE);
        let mut bytes = fs::read(&log).unwrap();
        bytes[100] ^= 1;
        fs::write(&log, bytes).unwrap();
        let error = rollback(&mut journal, &disk, false).unwrap_err();
        assert!(matches!(error, CommitError::UndoDamaged { .. }), "{error}");
        assert_eq!(fs::read(dir.path().join("disk")).unwrap(), new);
    }
}
