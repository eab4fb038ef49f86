//! Carries out the actions of a plan on the overlay.
//!
//! Order: every hive edit is prepared first, outside the guest (original to `backup/`, a copy in memory
//! edited by libhivex in a confined child, the result read back with `nt-hive`), so that a failing edit
//! changes nothing. Then files are written, then hives - SYSTEM last, because it is what makes the drivers
//! active. Only blocks of a hive that differ are written.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use crate::drivers::media::Media;
use crate::error::{Blocker, Error, ErrorKind};
use crate::failpoint;
use crate::guest::{Extent, GuestError, GuestPath, GuestRead, GuestWrite, VolumeId};
use crate::inspect::model::{Hives, LoadedBytes, SectorField};
use crate::plan::model::{Action, FileCopy, HiveName, Plan};
use crate::registry::RegEdits;
use crate::registry::confined::HiveEditError;
use crate::registry::judge::{self, JudgeError, Kept};
use crate::registry::load::log_reset;
use crate::registry::walk;
use crate::tool::host;

use super::edited::{Edit, EditedHives};
use super::journal::{
    ActionRecord, ActionState, Change, ChangeKind, FileFacts, Journal, JournalError, State,
};

#[derive(Debug, thiserror::Error)]
pub enum FixError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("changing the guest")]
    Guest(#[from] GuestError),
    #[error("editing the {hive} hive")]
    Edit {
        hive: &'static str,
        #[source]
        source: HiveEditError,
    },
    #[error("the {hive} hive is not as it should be after the edit")]
    Hive {
        hive: &'static str,
        #[source]
        source: JudgeError,
    },
    #[error("reading {path} from the virtio-win media")]
    Media {
        path: String,
        #[source]
        source: crate::drivers::media::MediaError,
    },
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: io::Error,
    },
    #[error("the hive {0} is needed by the plan but was not read")]
    NoHive(&'static str),
}

impl From<FixError> for Error {
    fn from(error: FixError) -> Self {
        let failed = || Error::failed("fixing the guest failed; the disk itself was not changed");
        match error {
            FixError::Guest(GuestError::MissingTool { what, hint }) => {
                Error::missing_tool(format!("{what} is not available on this host")).hint(hint)
            }
            FixError::Guest(e @ GuestError::Unsafe { .. }) => {
                let blocker = Blocker::new(
                    "volume-unsafe",
                    e.to_string(),
                    "start the guest on its old host, run `powercfg /h off`, shut it down completely",
                );
                Error::refused("the guest's volume cannot be written", vec![blocker])
            }
            FixError::Guest(e @ GuestError::NoSpace { .. }) => {
                let remedy = "delete files in the guest (cleanmgr, the recycle bin) or enlarge the volume, shut the guest down, and convert again";
                let blocker = Blocker::new("guest-space", e.to_string(), remedy);
                Error::refused("a volume of the guest is full", vec![blocker])
            }
            FixError::Edit {
                source: e @ HiveEditError::Missing,
                ..
            } => Error::missing_tool(e.to_string()).hint(host::hint(host::LIBHIVEX)),
            FixError::Edit {
                source: HiveEditError::Interrupted,
                ..
            } => Error::new(
                ErrorKind::Interrupted,
                "interrupted; the source is untouched",
            ),
            other => failed().because(other),
        }
    }
}

type Result<T, E = FixError> = std::result::Result<T, E>;

fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> FixError {
    let doing = doing.into();
    |source| FixError::Io { doing, source }
}

fn point(name: &str) -> Result<()> {
    failpoint::hit(name).map_err(io_error("fixing"))
}

fn step(when: &str, id: &str) -> Result<()> {
    failpoint::step(when, &format!("action {id}")).map_err(io_error("fixing"))
}

/// The journal's records of a plan, before anything is done.
pub fn records(plan: &Plan) -> Vec<ActionRecord> {
    let record = |id: &str, description: String, state| ActionRecord {
        id: id.to_string(),
        description,
        state,
        changes: Vec::new(),
    };
    plan.actions
        .iter()
        .map(|a| record(a.id(), a.describe(), ActionState::Planned))
        .chain(
            plan.skipped
                .iter()
                .map(|s| record(&s.id, s.title.clone(), ActionState::Skipped)),
        )
        .collect()
}

/// What the fix works on.
pub struct Fix<'a> {
    pub plan: &'a Plan,
    pub volume: VolumeId,
    pub media: &'a dyn Media,
    /// Reads the guest as it is before the fix.
    pub before: &'a dyn GuestRead,
    /// The hives, where they were edited already.
    pub edited: &'a EditedHives,
    pub journal: &'a mut Journal,
}

impl Fix<'_> {
    /// Applies every action through `writer` and closes it. The journal ends in [`State::Fixing`]: that
    /// the result is right is for `verify` to say. The hives that were written are still being walked.
    pub fn apply(
        mut self,
        hives: Hives,
        open_writer: impl FnOnce() -> Result<Box<dyn GuestWrite>>,
    ) -> Result<Vec<Walking>> {
        self.journal.set_state(State::Fixing)?;
        let mut prepared = self.prepare_hives(hives)?;
        point("backed-up")?;
        let mut writer = open_writer()?;
        for action in &self.plan.actions {
            if let Action::CopyFiles {
                id, folders, files, ..
            } = action
            {
                self.begin(id)?;
                let changes = self.copy_files(writer.as_mut(), folders, files)?;
                self.finish(id, changes)?;
                point("file-written")?;
            }
        }
        for action in &self.plan.actions {
            if let Action::CopyInGuest {
                id,
                volume,
                folder,
                from,
                to,
                replaces,
                ..
            } = action
            {
                self.begin(id)?;
                if let Some(folder) = folder {
                    writer.create_dir(*volume, folder)?;
                }
                let change = self.copy_in_guest(writer.as_mut(), *volume, from, to, *replaces)?;
                self.finish(id, vec![change])?;
            }
        }
        for action in &self.plan.actions {
            if let Action::PatchBootSector {
                id, volume, fields, ..
            } = action
            {
                self.begin(id)?;
                let change = self.patch_boot_sector(writer.as_mut(), *volume, fields)?;
                self.finish(id, vec![change])?;
            }
        }
        let mut walking = Vec::new();
        for action in &self.plan.actions {
            if let Action::EditHive {
                id,
                hive,
                volume,
                path,
                ..
            } = action
            {
                let hive = prepared
                    .remove(hive)
                    .ok_or(FixError::NoHive(hive.file_name()))?;
                self.begin(id)?;
                let (changes, walk) = self.write_hive(writer.as_mut(), *volume, path, hive)?;
                walking.push(walk);
                self.finish(id, changes)?;
                point("hive-written")?;
            }
        }
        writer.close()?;
        Ok(walking)
    }

    fn begin(&mut self, id: &str) -> Result<()> {
        step("before", id)?;
        Ok(self.journal.mark(id, ActionState::InProgress)?)
    }

    fn finish(&mut self, id: &str, changes: Vec<Change>) -> Result<()> {
        for action in self.journal.doc.actions.iter_mut().filter(|a| a.id == id) {
            action.changes.clone_from(&changes);
        }
        self.journal.mark(id, ActionState::Done)?;
        step("after", id)
    }

    fn copy_files(
        &self,
        writer: &mut dyn GuestWrite,
        folders: &[GuestPath],
        files: &[FileCopy],
    ) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        for folder in folders {
            writer.create_dir(self.volume, folder)?;
            changes.push(Change {
                path: folder.to_string(),
                kind: ChangeKind::Folder,
                before: None,
                after: None,
                backup: None,
            });
        }
        for file in files {
            let contents = self
                .media
                .read(&file.from)
                .map_err(|source| FixError::Media {
                    path: file.from.clone(),
                    source,
                })?;
            let (before, backup) = if file.replaces {
                let original = self.before.read(self.volume, &file.to, MAX_REPLACED)?;
                let backup = format!("backup/files/{}", file.to.to_slashes());
                self.saver().save(&backup, &original)?;
                (Some(FileFacts::of(&original)), Some(backup))
            } else {
                (None, None)
            };
            writer.write_file(self.volume, &file.to, &contents)?;
            changes.push(Change {
                path: file.to.to_string(),
                kind: ChangeKind::File,
                before,
                after: Some(FileFacts::of(&contents)),
                backup,
            });
        }
        Ok(changes)
    }

    fn copy_in_guest(
        &self,
        writer: &mut dyn GuestWrite,
        volume: VolumeId,
        from: &GuestPath,
        to: &GuestPath,
        replaces: bool,
    ) -> Result<Change> {
        let contents = self.before.read(volume, from, MAX_REPLACED)?;
        let (before, backup) = if replaces {
            let original = self.before.read(volume, to, MAX_REPLACED)?;
            let backup = format!("backup/files/{}", to.to_slashes());
            self.saver().save(&backup, &original)?;
            (Some(FileFacts::of(&original)), Some(backup))
        } else {
            (None, None)
        };
        writer.write_file(volume, to, &contents)?;
        Ok(Change {
            path: to.to_string(),
            kind: ChangeKind::File,
            before,
            after: Some(FileFacts::of(&contents)),
            backup,
        })
    }

    fn patch_boot_sector(
        &self,
        writer: &mut dyn GuestWrite,
        volume: VolumeId,
        fields: &[SectorField],
    ) -> Result<Change> {
        let path = GuestPath::parse("$Boot").unwrap_or_default();
        let original = self.before.read_at(volume, &path, 0, 512)?;
        let backup = "backup/boot-sector".to_string();
        self.saver().save(&backup, &original)?;
        let mut sector = original.clone();
        let mut extents = Vec::new();
        for field in fields {
            let offset = usize::from(field.offset);
            // Planned from this very sector; a shorter one is refused by the writer.
            if let Some(bytes) = sector.get_mut(offset..offset + field.new.len()) {
                bytes.copy_from_slice(&field.new);
            }
            extents.push(Extent {
                offset: field.offset.into(),
                data: field.new.clone(),
            });
        }
        writer.patch_boot_sector(volume, &extents)?;
        Ok(Change {
            path: path.to_string(),
            kind: ChangeKind::File,
            before: Some(FileFacts::of(&original)),
            after: Some(FileFacts::of(&sector)),
            backup: Some(backup),
        })
    }

    fn saver(&self) -> Saver {
        Saver {
            folder: self.journal.folder().to_path_buf(),
            durably: self.journal.doc.disk.in_place,
        }
    }

    /// Backs up and merges every hive the plan edits, the hives side by side.
    fn prepare_hives(&self, hives: Hives) -> Result<BTreeMap<HiveName, PreparedHive>> {
        let Hives {
            system,
            software,
            drivers,
            bcd,
        } = hives;
        let mut loaded =
            BTreeMap::from([(HiveName::System, system), (HiveName::Software, software)]);
        loaded.extend(drivers.map(|d| (HiveName::Drivers, d)));
        loaded.extend(bcd.map(|b| (HiveName::Bcd, b)));
        let mut jobs = Vec::new();
        for action in &self.plan.actions {
            if let Action::EditHive {
                hive,
                volume,
                path,
                edits,
                reset_logs,
                ..
            } = action
            {
                let bytes = loaded
                    .remove(hive)
                    .ok_or(FixError::NoHive(hive.file_name()))?;
                jobs.push(self.merge_job((*hive, *volume), path, bytes, edits, reset_logs)?);
            }
        }
        // Whatever is not edited need not stay in memory while others are merged.
        drop(loaded);
        let saver = self.saver();
        thread::scope(|scope| {
            let threads: Vec<_> = jobs
                .into_iter()
                .map(|job| scope.spawn(|| merge(job, &saver, self.edited)))
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

    /// Reads what the guest has besides the hive in memory.
    fn merge_job<'e>(
        &self,
        (name, volume): (HiveName, VolumeId),
        path: &GuestPath,
        loaded: LoadedBytes,
        edits: &'e RegEdits,
        reset_logs: &[GuestPath],
    ) -> Result<MergeJob<'e>> {
        // The file as it is on the disk: for a replayed hive that is not what is in memory.
        let original = if loaded.replayed {
            Some(self.before.read(volume, path, MAX_HIVE)?)
        } else {
            None
        };
        let mut logs = Vec::new();
        for log in reset_logs {
            logs.push(LogReset {
                path: log.clone(),
                backup: format!("backup/{}", log.name().unwrap_or_default()),
                original: self.before.read(volume, log, MAX_LOG)?,
            });
        }
        Ok(MergeJob {
            name,
            bytes: loaded.bytes,
            original,
            edits,
            compressed: self
                .before
                .stat(volume, path)?
                .is_some_and(|info| info.compressed),
            logs,
        })
    }

    fn write_hive(
        &self,
        writer: &mut dyn GuestWrite,
        volume: VolumeId,
        path: &GuestPath,
        hive: PreparedHive,
    ) -> Result<(Vec<Change>, Walking)> {
        match &hive.whole {
            Some(bytes) => writer.write_file(volume, path, bytes)?,
            None => writer.patch_file(volume, path, hive.size, &hive.extents)?,
        }
        let after = joined(hive.after);
        let walking = Walking {
            hive: hive.name,
            sha256: after.sha256.clone(),
            walk: hive.walk,
        };
        let mut changes = vec![Change {
            path: path.to_string(),
            kind: ChangeKind::File,
            before: Some(hive.before),
            after: Some(after),
            backup: Some(hive.backup),
        }];
        for log in &hive.logs {
            let Some(reset) = log_reset(&log.original) else {
                continue;
            };
            writer.write_file(volume, &log.path, &reset)?;
            changes.push(Change {
                path: log.path.to_string(),
                kind: ChangeKind::File,
                before: Some(FileFacts::of(&log.original)),
                after: Some(FileFacts::of(&reset)),
                backup: Some(log.backup.clone()),
            });
        }
        Ok((changes, walking))
    }
}

fn joined<T>(thread: thread::JoinHandle<T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A hive that was written, and the walk through it that goes on meanwhile.
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

/// No hive that inspection takes is larger, and no log of one.
const MAX_HIVE: u64 = 256 << 20;
const MAX_LOG: u64 = 64 << 20;
/// Files of ours are drivers; nothing near this size is replaced.
const MAX_REPLACED: u64 = 256 << 20;

/// Writes files below the journal's folder.
struct Saver {
    folder: PathBuf,
    durably: bool,
}

impl Saver {
    fn save(&self, relative: &str, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.folder.join(relative);
        let doing = || format!("writing {}", path.display());
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_error(doing()))?;
        }
        let mut file = File::create(&path).map_err(io_error(doing()))?;
        io::Write::write_all(&mut file, bytes).map_err(io_error(doing()))?;
        if self.durably {
            file.sync_all().map_err(io_error(doing()))?;
        }
        Ok(path)
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

struct LogReset {
    path: GuestPath,
    backup: String,
    original: Vec<u8>,
}

struct PreparedHive {
    name: HiveName,
    backup: String,
    size: u64,
    extents: Vec<Extent>,
    /// Instead of the extents, for a hive that NTFS compresses: it is written as a plain file.
    whole: Option<Vec<u8>>,
    before: FileFacts,
    /// Both are computed while files are written.
    after: thread::JoinHandle<FileFacts>,
    walk: thread::JoinHandle<Walk>,
    logs: Vec<LogReset>,
}

/// Whether every hive of a plan could be edited.
pub fn check_edits(edits: &EditedHives) -> Result<()> {
    let failed = |(hive, source): (HiveName, HiveEditError)| FixError::Edit {
        hive: hive.file_name(),
        source,
    };
    edits.check().map_err(failed)
}

/// Backs up one hive and takes its edited copy.
fn merge(job: MergeJob<'_>, saver: &Saver, edits: &EditedHives) -> Result<PreparedHive> {
    let hive = job.name.file_name();
    let backup = format!("backup/{hive}");
    let judged = |source| FixError::Hive { hive, source };
    let edited = |source| FixError::Edit { hive, source };
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
        Ok::<_, FixError>((saved?, digest, file))
    })?;
    let text = job.edits.to_reg_text();
    saver.save(&format!("registry/{hive}.reg"), text.as_bytes())?;
    let mut merged = file.into_bytes().map_err(edited)?;
    judge::holds(&merged, job.edits).map_err(judged)?;
    kept.check(&merged).map_err(judged)?;
    // A tail beyond the hive bins stays as it is, so the file never shrinks.
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
    Ok(PreparedHive {
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
    use crate::drivers::media::Memory;
    use crate::fix::journal::DiskRef;
    use crate::inspect::fake::FakeGuest;

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

    /// Keeps what is written to it.
    #[derive(Default)]
    struct Recorder(Vec<(GuestPath, Vec<u8>)>);

    type Written = crate::guest::Result<()>;

    impl GuestWrite for Recorder {
        fn create_dir(&mut self, _: VolumeId, _: &GuestPath) -> Written {
            Ok(())
        }

        fn write_file(&mut self, _: VolumeId, path: &GuestPath, contents: &[u8]) -> Written {
            self.0.push((path.clone(), contents.to_vec()));
            Ok(())
        }

        fn patch_file(&mut self, _: VolumeId, _: &GuestPath, _: u64, _: &[Extent]) -> Written {
            unreachable!()
        }

        fn patch_boot_sector(&mut self, _: VolumeId, _: &[Extent]) -> Written {
            unreachable!()
        }

        fn remove_file(&mut self, _: VolumeId, _: &GuestPath) -> Written {
            unreachable!()
        }

        fn remove_dir(&mut self, _: VolumeId, _: &GuestPath) -> Written {
            unreachable!()
        }

        fn close(self: Box<Self>) -> Written {
            Ok(())
        }
    }

    #[test]
    fn a_file_that_is_replaced_is_saved_first() {
        let dir = tempfile::tempdir().unwrap();
        let disk = DiskRef {
            path: dir.path().join("disk"),
            format: "raw".into(),
            size_bytes: 0,
            in_place: true,
        };
        let mut journal = Journal::create(dir.path(), disk, vec![], vec![]).unwrap();
        let mut before = FakeGuest::default();
        before.file(1, "Windows/old.sys", b"old".to_vec());
        let copy = |name: &str, replaces| FileCopy {
            to: GuestPath::parse(&format!("Windows\\{name}")).unwrap(),
            from: "new.sys".into(),
            size: 3,
            replaces,
        };
        let plan = Plan {
            actions: vec![],
            skipped: vec![],
            drivers: vec![],
            blockers: vec![],
            accepted: vec![],
            warnings: vec![],
            checks: vec![],
            ready: true,
            outlook: None,
            linux: None,
        };
        let fix = Fix {
            plan: &plan,
            volume: VolumeId::new(1),
            media: &Memory::new([("new.sys".to_string(), b"new".to_vec())]),
            before: &before,
            edited: &EditedHives::default(),
            journal: &mut journal,
        };
        let mut writer = Recorder::default();
        let files = [copy("old.sys", true), copy("other.sys", false)];
        let changes = fix.copy_files(&mut writer, &[], &files).unwrap();
        let written: Vec<_> = writer.0.iter().map(|(_, bytes)| &bytes[..]).collect();
        assert_eq!(written, [b"new", b"new"]);
        let backup = changes[0].backup.as_deref().unwrap();
        assert_eq!(fs::read(dir.path().join(backup)).unwrap(), b"old");
        assert_eq!(changes[1].backup, None);
    }
}
