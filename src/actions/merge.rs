//! Prepares hives for writing. The original goes to the backup, libhivex edits a copy in memory in
//! a confined child, and `nt-hive` reads the result back. Only blocks that differ are written.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use crate::guest::joined::KnownFile;
use crate::guest::{Extent, GuestPath, GuestRead, VolumeId};
use crate::inspect::{HiveName, Hives};
use crate::memory::FileBytes;
use crate::registry::RegEdits;
use crate::registry::confined::HiveEditError;
use crate::registry::second_reader::{self, Kept};
use crate::registry::walk;
use crate::threads::joined;
use crate::timeline;

use super::change::{FileFacts, Saver};
use super::edited::{Edit, EditedHives};
use super::error::{ActionError, Result, io_error};

/// The size limit that inspection accepts for a hive or a log.
const MAX_HIVE: u64 = 256 << 20;
const MAX_LOG: u64 = 64 << 20;

/// The hives to be edited.
pub struct Merging<'a> {
    /// A reader of the guest before the fix.
    before: &'a dyn GuestRead,
    loaded: Hives,
    jobs: Vec<MergeJob>,
}

impl<'a> Merging<'a> {
    pub fn new(before: &'a dyn GuestRead, loaded: Hives) -> Self {
        Self {
            before,
            loaded,
            jobs: Vec::new(),
        }
    }

    /// Adds a hive to edit, and reads the guest's data for it that is not in memory.
    pub(super) fn add(
        &mut self,
        name: HiveName,
        (volume, path): (VolumeId, &GuestPath),
        edits: &RegEdits,
        reset_logs: &[GuestPath],
    ) -> Result<()> {
        let loaded = self.loaded.get(name);
        let loaded = loaded.ok_or(ActionError::NoHive(name.file_name()))?;
        // For a replayed hive, the file on the disk differs from the bytes in memory.
        let original = match loaded.replayed {
            true => Some(self.before.read_shared(volume, path, MAX_HIVE)?),
            false => None,
        };
        let mut logs = Vec::new();
        for log in reset_logs {
            logs.push(LogReset {
                path: log.clone(),
                backup: format!("backup/{}", log.name().unwrap_or_default()),
                original: self.before.read(volume, log, MAX_LOG)?,
            });
        }
        let info = self.before.stat(volume, path)?;
        self.jobs.push(MergeJob {
            name,
            bytes: loaded.bytes.clone(),
            original,
            edits: edits.clone(),
            compressed: info.is_some_and(|info| info.compressed),
            logs,
        });
        Ok(())
    }

    /// Starts to back up the hives, side by side.
    pub fn back_up(self, saver: &Saver) -> Backups {
        // Hives that are not edited need not stay in memory while others are merged.
        drop(self.loaded);
        let back_up = |job: MergeJob| {
            let (name, bytes, edits) = (job.name, job.bytes.clone(), job.edits.clone());
            let saver = saver.clone();
            let thread = thread::spawn(move || {
                let (kept, before) = back_up(&job, &saver)?;
                Ok((job, kept, before))
            });
            Backup {
                name,
                bytes,
                edits,
                thread,
            }
        };
        Backups(self.jobs.into_iter().map(back_up).collect())
    }
}

/// Hives that are being backed up. Dropping this stops everything that still runs.
#[derive(Default)]
pub struct Backups(Vec<Backup>);

struct Backup {
    name: HiveName,
    bytes: Arc<FileBytes>,
    edits: RegEdits,
    thread: JoinHandle<Result<BackedUp>>,
}

/// A hive whose original is in the backup, with the values that must still be there after the edit.
type BackedUp = (MergeJob, Kept, FileFacts);

impl Backups {
    /// Merges each hive as soon as it is backed up.
    pub fn merge(mut self, edited: &EditedHives) -> Merges {
        let mut merges = Merges::default();
        for backup in std::mem::take(&mut self.0) {
            let name = backup.name;
            let edit = edited.take(name);
            let edit = edit.unwrap_or_else(|| Edit::start(backup.bytes, backup.edits));
            let (done, backed_up) = mpsc::channel();
            let saved = backup.thread;
            let thread = thread::spawn(move || {
                let (job, kept, before) = joined(saved.join())?;
                // The receiver is gone if another backup has failed.
                let _ = done.send(());
                merge(job, edit, &kept, before)
            });
            merges.0.insert(name, Merge { backed_up, thread });
        }
        merges
    }
}

impl Drop for Backups {
    fn drop(&mut self) {
        for backup in std::mem::take(&mut self.0) {
            drop(backup.thread.join());
        }
    }
}

/// Hives that are being merged. Dropping this stops everything that still runs.
#[derive(Default)]
pub struct Merges(BTreeMap<HiveName, Merge>);

struct Merge {
    /// Receives a message when the original is in the backup; closed without one if that failed.
    backed_up: mpsc::Receiver<()>,
    thread: JoinHandle<Result<MergedHive>>,
}

impl Merges {
    /// Waits until the original of every hive is in the backup.
    pub fn backed_up(&mut self) -> Result<()> {
        let failed = self
            .0
            .iter()
            .find(|(_, merge)| merge.backed_up.recv().is_err());
        match failed.map(|(hive, _)| *hive) {
            Some(hive) => self.take(hive).map(drop),
            None => Ok(()),
        }
    }

    /// Waits for an edited hive and takes it out.
    pub(super) fn take(&mut self, hive: HiveName) -> Result<MergedHive> {
        let merge = self.0.remove(&hive);
        let merge = merge.ok_or(ActionError::NoHive(hive.file_name()))?;
        let _span = timeline::span(format!("wait for {}", hive.file_name()));
        joined(merge.thread.join())
    }
}

impl Drop for Merges {
    fn drop(&mut self) {
        for (_, merge) in std::mem::take(&mut self.0) {
            drop(merge.thread.join());
        }
    }
}

/// A written hive, and the walk through it that still runs.
pub struct Walking {
    hive: HiveName,
    file: KnownFile,
    walk: JoinHandle<Walk>,
}

type Walk = std::result::Result<walk::Stats, walk::CellFault>;

/// A hive that was walked before it was written.
#[derive(Debug, Clone)]
pub struct Walked {
    pub hive: HiveName,
    /// The bytes that were walked.
    pub bytes: Arc<FileBytes>,
    pub walk: Walk,
}

impl Walking {
    /// The file and its written contents.
    pub fn file(&self) -> &KnownFile {
        &self.file
    }

    pub fn join(self) -> Walked {
        Walked {
            hive: self.hive,
            bytes: self.file.bytes,
            walk: joined(self.walk.join()),
        }
    }
}

struct MergeJob {
    name: HiveName,
    bytes: Arc<FileBytes>,
    /// The contents of the file in the guest, if they differ.
    original: Option<Arc<FileBytes>>,
    edits: RegEdits,
    compressed: bool,
    logs: Vec<LogReset>,
}

impl MergeJob {
    /// The contents of the file in the guest.
    fn stored(&self) -> &[u8] {
        self.original.as_ref().unwrap_or(&self.bytes)
    }

    fn backup(&self) -> String {
        format!("backup/{}", self.name.file_name())
    }
}

pub(super) struct LogReset {
    pub(super) path: GuestPath,
    pub(super) backup: String,
    pub(super) original: Vec<u8>,
}

/// An edited hive that is ready to be written.
pub struct MergedHive {
    name: HiveName,
    backup: String,
    pub(super) bytes: Arc<FileBytes>,
    pub(super) extents: Vec<Extent>,
    /// The hive is written as a plain file because NTFS compresses the original.
    pub(super) whole: bool,
    before: FileFacts,
    /// Both are computed while files are written.
    after: JoinHandle<FileFacts>,
    walk: JoinHandle<Walk>,
    logs: Vec<LogReset>,
}

/// The facts about a merged hive after it was written.
pub(super) struct WrittenHive {
    /// The facts and the backup path of the original.
    pub(super) original: (FileFacts, String),
    pub(super) facts: FileFacts,
    pub(super) logs: Vec<LogReset>,
    pub(super) walking: Walking,
}

impl MergedHive {
    /// Turns the hive into the facts that remain after it was written there.
    pub(super) fn written(self, volume: VolumeId, path: &GuestPath) -> WrittenHive {
        let path = path.clone();
        WrittenHive {
            original: (self.before, self.backup),
            walking: Walking {
                hive: self.name,
                file: KnownFile {
                    volume,
                    path,
                    bytes: self.bytes,
                },
                walk: self.walk,
            },
            facts: joined(self.after.join()),
            logs: self.logs,
        }
    }
}

/// Fails unless every hive of a plan could be edited.
pub fn check_edits(edits: &EditedHives) -> Result<()> {
    let failed = |(hive, source): (HiveName, HiveEditError)| ActionError::Edit {
        hive: hive.file_name(),
        source,
    };
    edits.check().map_err(failed)
}

/// Writes the original of a hive to the backup. Returns the values that must still be there after
/// the edit.
fn back_up(job: &MergeJob, saver: &Saver) -> Result<(Kept, FileFacts)> {
    let _span = timeline::span(format!("back up {}", job.name.file_name()));
    let hive = job.name.file_name();
    let kept = Kept::of(&job.bytes, &job.edits);
    let kept = kept.map_err(|source| ActionError::Hive { hive, source })?;
    thread::scope(|scope| {
        let digest = scope.spawn(|| FileFacts::of(job.stored()));
        saver.save(&job.backup(), job.stored())?;
        for log in &job.logs {
            saver.save(&log.backup, &log.original)?;
        }
        let text = job.edits.to_reg_text();
        saver.save(&format!("registry/{hive}.reg"), text.as_bytes())?;
        Ok((kept, joined(digest.join())))
    })
}

/// Takes the edited copy of a hive.
fn merge(job: MergeJob, edit: Edit, kept: &Kept, before: FileFacts) -> Result<MergedHive> {
    let hive = job.name.file_name();
    let failed = |source| ActionError::Hive { hive, source };
    let backup = job.backup();
    let file = edit.finished();
    let file = file.map_err(|source| ActionError::Edit { hive, source })?;
    let _span = timeline::span(format!("merge {hive}"));
    // The edited hive replaces the original: both would take much memory, and fresh pages are slow.
    let mut merged = Arc::unwrap_or_clone(job.original.unwrap_or(job.bytes));
    let changes = update(&mut merged, &mut file.reader());
    let (extents, bins) = changes.map_err(io_error(format!("reading the edited {hive}")))?;
    second_reader::verify(&merged[..bins], &job.edits).map_err(failed)?;
    kept.check(&merged).map_err(failed)?;
    let merged = Arc::new(merged);
    let bytes = merged.clone();
    let after = thread::spawn({
        let merged = merged.clone();
        move || {
            let _span = timeline::span(format!("digest of {hive}"));
            FileFacts::of(&merged)
        }
    });
    let walk = thread::spawn(move || {
        let _span = timeline::span(format!("walk {hive} as it will be"));
        walk::walk(&merged)
    });
    Ok(MergedHive {
        name: job.name,
        backup,
        bytes,
        extents,
        whole: job.compressed,
        before,
        after,
        walk,
        logs: job.logs,
    })
}

/// Replaces the start of `bytes` by the contents of `new`. Returns the 4 KiB blocks that differ,
/// with neighbours joined, and the number of bytes read. A tail behind the hive bins stays in
/// `bytes`: the file never shrinks.
fn update(bytes: &mut FileBytes, new: &mut dyn Read) -> io::Result<(Vec<Extent>, usize)> {
    const BLOCK: usize = 4096;
    let mut extents: Vec<Extent> = Vec::new();
    let mut chunk = vec![0; 256 * BLOCK];
    let mut at = 0;
    loop {
        let len = fill(new, &mut chunk)?;
        if len == 0 {
            return Ok((extents, at));
        }
        let before = bytes.len();
        bytes.grow(at + len);
        for (old, new) in bytes[at..at + len]
            .chunks_mut(BLOCK)
            .zip(chunk.chunks(BLOCK))
        {
            let new = &new[..old.len()];
            if old != new || at + new.len() > before {
                old.copy_from_slice(new);
                let offset = at as u64;
                match extents.last_mut() {
                    Some(last) if last.offset + last.data.len() as u64 == offset => {
                        last.data.extend_from_slice(new);
                    }
                    _ => extents.push(Extent {
                        offset,
                        data: new.to_vec(),
                    }),
                }
            }
            at += new.len();
        }
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut dyn Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buf.len() {
        match file.read(&mut buf[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a byte at a time, and is interrupted before each; ends, or fails.
    struct Slow(Vec<u8>, bool, bool);

    impl Read for Slow {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            match (self.1, self.0.pop()) {
                (true, byte) => {
                    self.0.extend(byte);
                    Err(io::ErrorKind::Interrupted.into())
                }
                (false, Some(byte)) => {
                    buf[0] = byte;
                    Ok(1)
                }
                (false, None) if self.2 => Err(io::ErrorKind::BrokenPipe.into()),
                (false, None) => Ok(0),
            }
        }
    }

    #[test]
    fn a_read_that_is_interrupted_goes_on_and_one_that_fails_ends() {
        for (fails, wanted) in [(false, Ok(3)), (true, Err(io::ErrorKind::BrokenPipe))] {
            let mut slow = Slow(vec![3, 2, 1], false, fails);
            let mut buf = [0; 5];
            let found = fill(&mut slow, &mut buf).map_err(|e| e.kind());
            assert_eq!((found, buf), (wanted, [1, 2, 3, 0, 0]));
        }
    }

    fn updated(old: &[u8], mut new: &[u8]) -> (Vec<u8>, Vec<(u64, usize)>, usize) {
        let mut bytes = FileBytes::from(old.to_vec());
        let (extents, len) = update(&mut bytes, &mut new).unwrap();
        for extent in &extents {
            let start = extent.offset as usize;
            assert_eq!(bytes[start..start + extent.data.len()], extent.data);
        }
        let ranges = extents.iter().map(|e| (e.offset, e.data.len())).collect();
        (bytes.to_vec(), ranges, len)
    }

    #[test]
    fn only_changed_blocks_are_written() {
        let old = vec![1u8; 5 * 4096 + 100];
        let mut new = old.clone();
        new[4096] = 2;
        new[3 * 4096 - 1] = 2;
        new[4 * 4096 + 5] = 2;
        new.resize(6 * 4096 + 10, 3);
        let (bytes, ranges, len) = updated(&old, &new);
        assert_eq!(ranges, [(4096, 8192), (4 * 4096, 2 * 4096 + 10)]);
        assert_eq!((bytes, len), (new, 6 * 4096 + 10));
        assert_eq!(updated(&old, &old), (old.clone(), vec![], old.len()));
    }

    /// More than is read at once, and the new part is zero.
    #[test]
    fn a_hive_that_grew_by_zeroes_is_written_to_its_end() {
        let old = vec![1u8; 2 << 20];
        let mut new = old.clone();
        new.resize((2 << 20) + 8192, 0);
        new[(1 << 20) - 1] = 2;
        new[1 << 20] = 2;
        let (bytes, ranges, _) = updated(&old, &new);
        assert_eq!(ranges, [((1 << 20) - 4096, 8192), (2 << 20, 8192)]);
        assert_eq!(bytes, new);
    }

    #[test]
    fn a_tail_beyond_the_hive_bins_is_kept() {
        let (merged, ranges, len) = updated(b"old bins, and a tail", b"new bins,");
        assert_eq!(merged, b"new bins, and a tail");
        assert_eq!((ranges, len), (vec![(0, 9)], 9));
        // A hive that grew over its tail has none.
        let (grown, ..) = updated(b"old bins, and a tail", &[7; 30]);
        assert_eq!(grown, [7; 30]);
    }
}
