//! Hives before they are written: the original to the backup, a copy in memory edited by libhivex in a confined
//! child, the result read back with `nt-hive`. Only blocks that differ are written.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use crate::guest::{Extent, GuestPath, GuestRead, VolumeId};
use crate::inspect::{HiveName, Hives};
use crate::registry::RegEdits;
use crate::registry::confined::HiveEditError;
use crate::registry::judge::{self, Kept};
use crate::registry::walk;

use super::change::{FileFacts, Saver};
use super::edited::{Edit, EditedHives};
use super::error::{ActionError, Result, io_error};

/// No hive that inspection takes is larger, and no log of one.
const MAX_HIVE: u64 = 256 << 20;
const MAX_LOG: u64 = 64 << 20;

/// The edited hives, by name.
pub type MergedHives = BTreeMap<HiveName, MergedHive>;

/// The hives that are to be edited.
pub struct Merging<'a> {
    /// Reads the guest as it is before the fix.
    before: &'a dyn GuestRead,
    loaded: Hives,
    jobs: Vec<MergeJob<'a>>,
}

impl<'a> Merging<'a> {
    pub fn new(before: &'a dyn GuestRead, loaded: Hives) -> Self {
        Self {
            before,
            loaded,
            jobs: Vec::new(),
        }
    }

    /// Reads what the guest has besides the hive in memory.
    pub(super) fn add(
        &mut self,
        name: HiveName,
        (volume, path): (VolumeId, &GuestPath),
        edits: &'a RegEdits,
        reset_logs: &[GuestPath],
    ) -> Result<()> {
        let loaded = self.loaded.get(name);
        let loaded = loaded.ok_or(ActionError::NoHive(name.file_name()))?;
        // The file on the disk: for a replayed hive that is not what is in memory.
        let original = match loaded.replayed {
            true => Some(self.before.read(volume, path, MAX_HIVE)?),
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
            edits,
            compressed: info.is_some_and(|info| info.compressed),
            logs,
        });
        Ok(())
    }

    /// Backs up and merges the hives side by side.
    pub fn run(self, saver: &Saver, edited: &EditedHives) -> Result<MergedHives> {
        // Hives that are not edited need not stay in memory while others are merged, nor those that are
        // once they are written to the backup.
        drop(self.loaded);
        let jobs = self.jobs;
        thread::scope(|scope| {
            let threads: Vec<_> = jobs
                .into_iter()
                .map(|job| scope.spawn(|| merge(job, saver, edited)))
                .collect();
            threads
                .into_iter()
                .map(|t| match t.join() {
                    Ok(result) => result.map(|hive| (hive.name, hive)),
                    Err(panic) => std::panic::resume_unwind(panic),
                })
                .collect()
        })
    }
}

fn joined<T>(thread: thread::JoinHandle<T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A hive that was written, and the walk through it that continues meanwhile.
pub struct Walking {
    hive: HiveName,
    sha256: String,
    walk: thread::JoinHandle<Walk>,
}

type Walk = std::result::Result<walk::Stats, walk::Fault>;

/// A hive that was walked before it was written.
#[derive(Debug, Clone)]
pub struct Walked {
    pub hive: HiveName,
    /// Of the bytes that were walked.
    pub sha256: String,
    pub walk: Walk,
}

impl Walking {
    pub fn join(self) -> Walked {
        Walked {
            hive: self.hive,
            sha256: self.sha256,
            walk: joined(self.walk),
        }
    }
}

struct MergeJob<'e> {
    name: HiveName,
    bytes: Arc<Vec<u8>>,
    /// What the file in the guest holds, where that is something else.
    original: Option<Vec<u8>>,
    edits: &'e RegEdits,
    compressed: bool,
    logs: Vec<LogReset>,
}

/// A hive before its edit.
struct Original {
    bytes: Arc<Vec<u8>>,
    /// What the file in the guest holds, where that is something else.
    stored: Option<Vec<u8>>,
}

impl Original {
    fn stored(&self) -> &[u8] {
        self.stored.as_ref().unwrap_or(&self.bytes)
    }
}

pub(super) struct LogReset {
    pub(super) path: GuestPath,
    pub(super) backup: String,
    pub(super) original: Vec<u8>,
}

/// An edited hive that can be written.
pub struct MergedHive {
    name: HiveName,
    backup: String,
    pub(super) size: u64,
    pub(super) extents: Vec<Extent>,
    /// Instead of the extents, for a hive that NTFS compresses: it is written as a plain file.
    pub(super) whole: Option<Vec<u8>>,
    before: FileFacts,
    /// Both are computed while files are written.
    after: thread::JoinHandle<FileFacts>,
    walk: thread::JoinHandle<Walk>,
    logs: Vec<LogReset>,
}

/// What is left of a merged hive after it was written.
pub(super) struct WrittenHive {
    /// What the hive was, and where it is kept.
    pub(super) original: (FileFacts, String),
    pub(super) facts: FileFacts,
    pub(super) logs: Vec<LogReset>,
    pub(super) walking: Walking,
}

impl MergedHive {
    /// Gives the edited hive up.
    pub(super) fn written(self) -> WrittenHive {
        let facts = joined(self.after);
        WrittenHive {
            original: (self.before, self.backup),
            walking: Walking {
                hive: self.name,
                sha256: facts.sha256.clone(),
                walk: self.walk,
            },
            facts,
            logs: self.logs,
        }
    }
}

/// Whether every hive of a plan could be edited.
pub fn check_edits(edits: &EditedHives) -> Result<()> {
    let failed = |(hive, source): (HiveName, HiveEditError)| ActionError::Edit {
        hive: hive.file_name(),
        source,
    };
    edits.check().map_err(failed)
}

/// Backs up one hive and takes its edited copy.
fn merge(job: MergeJob<'_>, saver: &Saver, edits: &EditedHives) -> Result<MergedHive> {
    let hive = job.name.file_name();
    let backup = format!("backup/{hive}");
    let judged = |source| ActionError::Hive { hive, source };
    let edited = |source| ActionError::Edit { hive, source };
    let kept = Kept::of(&job.bytes, job.edits).map_err(judged)?;
    let edit = match edits.take(job.name) {
        Some(edit) => edit,
        None => Edit::start(job.bytes.clone(), job.edits.clone()),
    };
    // Both are given up before the edited hive is read: not in memory together with it.
    let original = Arc::new(Original {
        bytes: job.bytes,
        stored: job.original,
    });
    let (path, before, file) = thread::scope(|scope| {
        let digest = scope.spawn({
            let original = original.clone();
            move || FileFacts::of(original.stored())
        });
        let saved = saver.save(&backup, original.stored());
        drop(original);
        for log in &job.logs {
            saver.save(&log.backup, &log.original)?;
        }
        let file = edit.finished().map_err(edited)?;
        let digest = digest
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok::<_, ActionError>((saved?, digest, file))
    })?;
    let text = job.edits.to_reg_text();
    saver.save(&format!("registry/{hive}.reg"), text.as_bytes())?;
    let mut merged = file.into_bytes().map_err(edited)?;
    judge::holds(&merged, job.edits).map_err(judged)?;
    kept.check(&merged).map_err(judged)?;
    // A tail beyond the hive bins stays unchanged, so the file never shrinks.
    append_tail(&path, &mut merged)?;
    let extents = changed_blocks(&path, &merged)?;
    let size = merged.len() as u64;
    let whole = job.compressed.then(|| merged.clone());
    let merged = Arc::new(merged);
    let after = thread::spawn({
        let merged = merged.clone();
        move || FileFacts::of(&merged)
    });
    let walk = thread::spawn(move || walk::walk(&merged));
    Ok(MergedHive {
        name: job.name,
        backup,
        size,
        extents,
        whole,
        before,
        after,
        walk,
        logs: job.logs,
    })
}

/// What the file holds beyond the length of `bytes`.
fn append_tail(path: &Path, bytes: &mut Vec<u8>) -> Result<()> {
    let doing = || format!("reading {}", path.display());
    let mut file = File::open(path).map_err(io_error(doing()))?;
    io::Seek::seek(&mut file, io::SeekFrom::Start(bytes.len() as u64))
        .map_err(io_error(doing()))?;
    file.read_to_end(bytes).map_err(io_error(doing()))?;
    Ok(())
}

/// The 4 KiB blocks of `new` that differ from the file, neighbours joined.
fn changed_blocks(old: &Path, new: &[u8]) -> Result<Vec<Extent>> {
    const BLOCK: usize = 4096;
    let doing = || format!("reading {}", old.display());
    let mut file =
        io::BufReader::with_capacity(1 << 20, File::open(old).map_err(io_error(doing()))?);
    let mut extents: Vec<Extent> = Vec::new();
    let mut buffer = Vec::with_capacity(BLOCK);
    for (i, block) in new.chunks(BLOCK).enumerate() {
        buffer.clear();
        file.by_ref()
            .take(block.len() as u64)
            .read_to_end(&mut buffer)
            .map_err(io_error(doing()))?;
        if buffer == block {
            continue;
        }
        let offset = (i * BLOCK) as u64;
        match extents.last_mut() {
            Some(last) if last.offset + last.data.len() as u64 == offset => {
                last.data.extend_from_slice(block);
            }
            _ => extents.push(Extent {
                offset,
                data: block.to_vec(),
            }),
        }
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn only_changed_blocks_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("old");
        let old = vec![1u8; 5 * 4096 + 100];
        fs::write(&path, &old).unwrap();
        let mut new = old.clone();
        new[4096] = 2;
        new[3 * 4096 - 1] = 2;
        new[4 * 4096 + 5] = 2;
        new.resize(6 * 4096 + 10, 3);
        let extents = changed_blocks(&path, &new).unwrap();
        let ranges: Vec<_> = extents.iter().map(|e| (e.offset, e.data.len())).collect();
        assert_eq!(ranges, [(4096, 8192), (4 * 4096, 2 * 4096 + 10)]);
        assert!(changed_blocks(&path, &old).unwrap().is_empty());
    }

    #[test]
    fn a_tail_beyond_the_hive_bins_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("SYSTEM");
        fs::write(&path, b"old bins, and a tail").unwrap();
        let mut merged = b"new bins,".to_vec();
        append_tail(&path, &mut merged).unwrap();
        assert_eq!(merged, b"new bins, and a tail");
        // A hive that grew over its tail has none.
        let mut grown = vec![7; 30];
        append_tail(&path, &mut grown).unwrap();
        assert_eq!(grown, [7; 30]);
    }
}
