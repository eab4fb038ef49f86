//! The journal of a fix: its actions, its progress, and what is needed to undo it.
//!
//! `journal.json` is replaced as a whole (temporary file, fsync, rename, fsync of the directory).
//! So a reader sees either the old or the new state. Each state is written before the step it
//! announces.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::trusted::{TrustError, TrustedFolder};
use crate::actions::Change;
use crate::failpoint;
use crate::files::{self, order};

pub const FILE_NAME: &str = "journal.json";
pub const SCHEMA: &str = "hyper2kvm/journal/1";
/// The schema of a fix that changes several disks. A program that supports only the first schema
/// would undo one of them.
pub const SCHEMA_SEVERAL: &str = "hyper2kvm/journal/2";

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("writing {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("reading {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is not a journal of this program: {reason}")]
    Invalid { path: PathBuf, reason: String },
    /// Somebody else can have written the journal.
    #[error(transparent)]
    Untrusted(#[from] TrustError),
    #[error("{path} is another directory than it was")]
    Moved { path: PathBuf },
}

impl JournalError {
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Untrusted(e) if e.is_missing())
    }
}

/// The size limit: a journal of a whole Windows driver tree is some MiB.
const MAX_SIZE: u64 = 256 << 20;

/// The state of the whole fix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JournalState {
    /// Nothing has been written to the overlay or the disk.
    Planned,
    /// The overlay is being changed; the disk is untouched.
    Fixing,
    /// The overlay has been read back and verified; the disk is untouched.
    Verified,
    /// The disk is being changed (`--in-place`); the undo log is complete.
    Committing,
    Committed,
    RollingBack,
    RolledBack,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActionState {
    Planned,
    InProgress,
    Done,
    /// The guest already had the result of the action.
    Skipped,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JournalDocument {
    pub schema: String,
    pub version: String,
    pub state: JournalState,
    /// The disk with Windows.
    pub disk: DiskRef,
    /// Further disks of the VM that are changed in place: the one with the boot files. The state
    /// applies to all of them together.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub others: Vec<OtherDisk>,
    pub actions: Vec<ActionRecord>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub undo: Option<UndoLog>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OtherDisk {
    #[serde(flatten)]
    pub disk: DiskRef,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub undo: Option<UndoLog>,
}

impl JournalDocument {
    /// Every disk that the fix may change.
    pub fn disks(&self) -> impl Iterator<Item = &DiskRef> {
        let others = self.others.iter().map(|other| &other.disk);
        std::iter::once(&self.disk).chain(others)
    }

    /// The paths of the disks, for messages.
    pub fn names(&self) -> String {
        let names = self.disks().map(|disk| disk.path.display().to_string());
        names.collect::<Vec<_>>().join(" and ")
    }

    /// The disks that a commit changes, each with its undo log.
    pub fn changed(&self) -> Vec<(DiskRef, UndoLog)> {
        let first = std::iter::once((&self.disk, &self.undo));
        let others = self.others.iter().map(|other| (&other.disk, &other.undo));
        first
            .chain(others)
            .filter_map(|(disk, undo)| Some((disk.clone(), undo.clone()?)))
            .collect()
    }

    /// Sets the undo logs, in the order of [`Self::disks`].
    pub fn set_undo(&mut self, logs: Vec<Option<UndoLog>>) {
        let others = self.others.iter_mut().map(|other| &mut other.undo);
        for (place, log) in std::iter::once(&mut self.undo).chain(others).zip(logs) {
            *place = log;
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRef {
    #[serde(with = "crate::text::json_path")]
    pub path: PathBuf,
    pub format: String,
    pub size_bytes: u64,
    /// Whether the disk itself is changed, not a copy of it.
    pub in_place: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ActionRecord {
    pub id: String,
    pub description: String,
    pub state: ActionState,
    #[serde(default)]
    pub changes: Vec<Change>,
}

/// The original bytes of every range of the disk that a commit changes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UndoLog {
    /// A file with the bytes of all ranges in sequence, relative to the journal's directory.
    pub before: String,
    pub after: String,
    pub ranges: Vec<UndoRange>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UndoRange {
    pub offset: u64,
    pub len: u64,
    pub before_sha256: String,
    pub after_sha256: String,
}

/// A journal on disk, saved at every step.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    folder: TrustedFolder,
    pub doc: JournalDocument,
}

impl Journal {
    pub fn create(
        folder: &Path,
        disk: DiskRef,
        others: Vec<DiskRef>,
        actions: Vec<ActionRecord>,
    ) -> Result<Self, JournalError> {
        let schema = match others.is_empty() {
            true => SCHEMA,
            false => SCHEMA_SEVERAL,
        };
        let journal = Self {
            path: folder.join(FILE_NAME),
            folder: TrustedFolder::open(folder)?,
            doc: JournalDocument {
                schema: schema.to_string(),
                version: env!("CARGO_PKG_VERSION").to_string(),
                state: JournalState::Planned,
                disk,
                others: others
                    .into_iter()
                    .map(|disk| OtherDisk { disk, undo: None })
                    .collect(),
                actions,
                undo: None,
            },
        };
        journal.save()?;
        Ok(journal)
    }

    /// Loads a journal. Only the caller or root may have been able to write it or its directory.
    pub fn load(path: &Path) -> Result<Self, JournalError> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(JournalError::Invalid {
                path: path.to_path_buf(),
                reason: "it has no name".to_owned(),
            });
        };
        let parent = if parent.as_os_str().is_empty() {
            Path::new(".")
        } else {
            parent
        };
        let folder = TrustedFolder::open(parent)?;
        let file = folder.file(Path::new(name))?;
        let mut text = String::new();
        file.take(MAX_SIZE)
            .read_to_string(&mut text)
            .map_err(|source| JournalError::Read {
                path: path.to_path_buf(),
                source,
            })?;
        let doc: JournalDocument =
            serde_json::from_str(&text).map_err(|e| JournalError::Invalid {
                path: path.to_path_buf(),
                reason: e.to_string(),
            })?;
        if doc.schema != SCHEMA && doc.schema != SCHEMA_SEVERAL {
            return Err(JournalError::Invalid {
                path: path.to_path_buf(),
                reason: format!("schema is {:?}, expected {SCHEMA:?}", doc.schema),
            });
        }
        Ok(Self {
            path: path.to_path_buf(),
            folder,
            doc,
        })
    }

    /// Opens a file named by the journal, below its directory.
    pub fn open(&self, relative: &Path) -> Result<File, TrustError> {
        self.folder.file(relative)
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a disk was written that this journal can restore.
    pub fn needs_undo(&self) -> bool {
        let written = matches!(
            self.doc.state,
            JournalState::Committing | JournalState::Committed | JournalState::RollingBack
        );
        self.doc.disk.in_place && written
    }

    /// Sets and saves the state. After an error the state is unchanged.
    pub fn set_state(&mut self, state: JournalState) -> Result<(), JournalError> {
        let old = std::mem::replace(&mut self.doc.state, state);
        self.save().inspect_err(|_| {
            self.doc.state = old;
            // The journal may have got its name before the error.
            let _ = self.save();
        })
    }

    /// Records the state of an action. The caller carries the action out only after this has
    /// returned.
    pub fn mark(&mut self, id: &str, state: ActionState) -> Result<(), JournalError> {
        for action in self.doc.actions.iter_mut().filter(|a| a.id == id) {
            action.state = state;
        }
        self.save()
    }

    pub fn save(&self) -> Result<(), JournalError> {
        if !self.folder.is_at(self.folder()) {
            return Err(JournalError::Moved {
                path: self.folder().to_path_buf(),
            });
        }
        let text = format!("{:#}\n", serde_json::json!(self.doc));
        // An unfinished fix on an overlay is discarded: only a fix in place has to survive a loss
        // of power.
        let write = if self.doc.disk.in_place {
            write_durably
        } else {
            replace
        };
        write(&self.path, text.as_bytes()).map_err(|source| JournalError::Write {
            path: self.path.clone(),
            source,
        })
    }
}

/// Replaces a file durably: a crash leaves the old or the new contents, never a mixture.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut temporary = tempfile::NamedTempFile::new_in(folder)?;
    temporary.write_all(bytes)?;
    files::sync(temporary.as_file(), path)?;
    named(path, || {
        temporary.persist(path).map(drop).map_err(|e| e.error)
    })?;
    sync_folder(folder)
}

/// Replaces a file atomically, but without surviving a loss of power. The names are exchanged: a
/// rename over a file makes ext4 write the new one to disk at once.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut temporary = tempfile::NamedTempFile::new_in(folder)?;
    temporary.write_all(bytes)?;
    named(path, || {
        match files::exchange(temporary.path(), path) {
            // There is none yet, or the file system cannot exchange names.
            Err(_) => temporary.persist(path).map(drop).map_err(|e| e.error),
            // Dropping the temporary name removes the old file.
            exchanged => exchanged,
        }
    })
}

/// Runs the step in which a file gets its name.
fn named(path: &Path, rename: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let step = format!("rename of {name}");
    failpoint::step("before", &step)?;
    order::note("rename", path);
    rename()?;
    failpoint::step("after", &step)
}

/// Makes the names in a directory durable.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    files::sync(File::open(folder)?, folder)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn survives_a_round_trip_and_refuses_other_json() {
        let dir = tempfile::tempdir().unwrap();
        let disk = DiskRef {
            path: "/x".into(),
            format: "raw".into(),
            size_bytes: 1,
            in_place: true,
        };
        let actions = vec![ActionRecord {
            id: "hive-system".into(),
            description: "d".into(),
            state: ActionState::Planned,
            changes: vec![],
        }];
        let mut journal = Journal::create(dir.path(), disk.clone(), vec![], actions).unwrap();
        journal.mark("hive-system", ActionState::Done).unwrap();
        journal.set_state(JournalState::Committed).unwrap();
        let read = Journal::load(&dir.path().join(FILE_NAME)).unwrap();
        assert_eq!(read.doc.disk, disk);
        assert_eq!(read.doc.state, JournalState::Committed);
        assert_eq!(read.doc.actions[0].state, ActionState::Done);

        let other = dir.path().join("other.json");
        fs::write(&other, "{\"schema\": \"hyper2kvm/plan/1\"}").unwrap();
        assert!(matches!(
            Journal::load(&other),
            Err(JournalError::Invalid { .. })
        ));
    }

    fn disk(path: &str, in_place: bool) -> DiskRef {
        DiskRef {
            path: path.into(),
            format: "raw".into(),
            size_bytes: 1,
            in_place,
        }
    }

    #[test]
    fn a_journal_in_place_is_durable_before_it_has_its_name_and_every_step_is_saved() {
        let dir = tempfile::tempdir().unwrap();
        let folder = format!("sync {}", dir.path().file_name().unwrap().to_string_lossy());
        for in_place in [true, false] {
            order::seen();
            let action = ActionRecord {
                id: "one".into(),
                description: "d".into(),
                state: ActionState::Planned,
                changes: vec![],
            };
            let disk = disk("/x", in_place);
            let mut journal = Journal::create(dir.path(), disk, vec![], vec![action]).unwrap();
            let saved = |step: &str| {
                let wanted: &[&str] = match in_place {
                    true => &["sync journal.json", "rename journal.json", &folder],
                    false => &["rename journal.json"],
                };
                assert_eq!(order::seen(), wanted, "{step}");
                Journal::load(&dir.path().join(FILE_NAME)).unwrap().doc
            };
            assert_eq!(saved("create").state, JournalState::Planned);
            journal.mark("one", ActionState::InProgress).unwrap();
            assert_eq!(saved("mark").actions[0].state, ActionState::InProgress);
            journal.set_state(JournalState::Fixing).unwrap();
            assert_eq!(saved("state").state, JournalState::Fixing);
        }
    }

    #[test]
    fn undo_logs_belong_to_their_disks() {
        let dir = tempfile::tempdir().unwrap();
        let others = vec![disk("/boot", true), disk("/third", true)];
        let mut journal =
            Journal::create(dir.path(), disk("/windows", true), others, vec![]).unwrap();
        assert_eq!(journal.doc.schema, SCHEMA_SEVERAL);
        assert_eq!(journal.doc.names(), "/windows and /boot and /third");
        let log = |name: &str| UndoLog {
            before: name.into(),
            after: String::new(),
            ranges: vec![],
        };
        journal
            .doc
            .set_undo(vec![None, Some(log("boot")), Some(log("third"))]);
        journal.save().unwrap();
        let read = Journal::load(journal.path()).unwrap();
        let changed: Vec<_> = (read.doc.changed().into_iter())
            .map(|(disk, log)| (disk.path.display().to_string(), log.before))
            .collect();
        let wanted = [("/boot", "boot"), ("/third", "third")];
        assert_eq!(changed, wanted.map(|(a, b)| (a.to_owned(), b.to_owned())));
        let alone = Journal::create(dir.path(), disk("/windows", true), vec![], vec![]).unwrap();
        assert_eq!(alone.doc.schema, SCHEMA);
    }

    #[test]
    fn a_journal_that_is_missing_is_told_from_one_that_cannot_be_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        assert!(Journal::load(&path).unwrap_err().is_missing());
        assert!(Journal::load(Path::new("/")).is_err());
        Journal::create(dir.path(), disk("/x", true), vec![], vec![]).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        fs::set_permissions(&path, open).unwrap();
        let error = Journal::load(&path).unwrap_err();
        assert!(matches!(error, JournalError::Untrusted(_)) && !error.is_missing());
        let closed = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&path, closed).unwrap();
        let mut text: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for (schema, fine) in [
            (SCHEMA, true),
            (SCHEMA_SEVERAL, true),
            ("hyper2kvm/journal/3", false),
        ] {
            text["schema"] = schema.into();
            fs::write(&path, text.to_string()).unwrap();
            assert_eq!(Journal::load(&path).is_ok(), fine, "{schema}");
        }
    }

    /// A rollback may be run by a later version: these are the names an earlier one has written.
    #[test]
    fn a_journal_of_an_earlier_version_is_read_with_all_it_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let read = |state: &str, action: &str| {
            let text = format!(
                r#"{{
                "schema": "hyper2kvm/journal/2", "version": "0.1.0", "state": "{state}",
                "disk": {{"path": "/w", "format": "raw", "size_bytes": 7, "in_place": true}},
                "others": [{{
                    "path": "/b", "format": "qcow2", "size_bytes": 8, "in_place": true,
                    "undo": {{"before": "b2", "after": "a2", "ranges": [
                        {{"offset": 1, "len": 2, "before_sha256": "old", "after_sha256": "new"}}
                    ]}}
                }}],
                "actions": [{{
                    "id": "x", "description": "y", "state": "{action}",
                    "changes": [
                        {{"path": "\\a", "kind": "folder", "before": null, "after": null}},
                        {{"path": "\\a\\b", "kind": "file", "before": {{"size": 1, "sha256": "s"}},
                          "after": {{"size": 2, "sha256": "t"}}, "backup": "backup/files/a/b"}}
                    ]
                }}]
            }}"#
            );
            fs::write(&path, text).unwrap();
            Journal::load(&path).unwrap().doc
        };
        for (name, state) in [
            ("planned", JournalState::Planned),
            ("fixing", JournalState::Fixing),
            ("verified", JournalState::Verified),
            ("committing", JournalState::Committing),
            ("committed", JournalState::Committed),
            ("rolling-back", JournalState::RollingBack),
            ("rolled-back", JournalState::RolledBack),
        ] {
            assert_eq!(read(name, "done").state, state);
        }
        for (name, state) in [
            ("planned", ActionState::Planned),
            ("in-progress", ActionState::InProgress),
            ("done", ActionState::Done),
            ("skipped", ActionState::Skipped),
        ] {
            assert_eq!(read("fixing", name).actions[0].state, state);
        }
        let doc = read("committed", "done");
        assert_eq!(
            doc.disk,
            DiskRef {
                size_bytes: 7,
                ..disk("/w", true)
            }
        );
        assert!(doc.undo.is_none());
        let changed = doc.changed();
        let (of, log) = &changed[0];
        assert_eq!((of.format.as_str(), of.size_bytes), ("qcow2", 8));
        assert_eq!((log.before.as_str(), log.after.as_str()), ("b2", "a2"));
        let range = &log.ranges[0];
        assert_eq!((range.offset, range.len), (1, 2));
        assert_eq!(
            (range.before_sha256.as_str(), range.after_sha256.as_str()),
            ("old", "new")
        );
        let [folder, file] = &doc.actions[0].changes[..] else {
            panic!();
        };
        assert_eq!(
            (folder.backup.as_ref(), folder.after.as_ref()),
            (None, None)
        );
        let sizes = [&file.before, &file.after].map(|facts| facts.as_ref().unwrap().size);
        assert_eq!(sizes, [1, 2]);
        assert_eq!(file.backup.as_deref(), Some("backup/files/a/b"));
    }

    #[test]
    fn a_journal_is_looked_for_in_the_current_directory_too() {
        let error = Journal::load(Path::new("no-such-journal.json")).unwrap_err();
        assert!(error.is_missing(), "{error}");
        // A file of this package, and no journal.
        let error = Journal::load(Path::new("Cargo.toml")).unwrap_err();
        assert!(!error.is_missing(), "{error}");
    }

    /// Nothing is written into a directory that took the place of the journal's own.
    #[test]
    fn a_journal_whose_directory_was_exchanged_is_not_written() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("work");
        fs::create_dir(&dir).unwrap();
        let mut journal = Journal::create(&dir, disk("/x", true), vec![], vec![]).unwrap();
        fs::rename(&dir, top.path().join("elsewhere")).unwrap();
        fs::create_dir(&dir).unwrap();
        let error = journal.set_state(JournalState::Committing).unwrap_err();
        assert!(matches!(error, JournalError::Moved { .. }), "{error}");
        assert_eq!(journal.doc.state, JournalState::Planned);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn only_the_action_of_that_name_is_marked() {
        let dir = tempfile::tempdir().unwrap();
        let action = |id: &str| ActionRecord {
            id: id.into(),
            description: "d".into(),
            state: ActionState::Planned,
            changes: vec![],
        };
        let actions = ["a", "b", "c"].map(action).to_vec();
        let mut journal = Journal::create(dir.path(), disk("/x", true), vec![], actions).unwrap();
        journal.mark("b", ActionState::Done).unwrap();
        let states = journal.doc.actions.iter().map(|a| a.state);
        use ActionState::{Done, Planned};
        assert_eq!(states.collect::<Vec<_>>(), [Planned, Done, Planned]);
    }

    /// A journal that got its name before the error would tell of a state that is not so.
    #[test]
    fn the_old_state_is_saved_again_where_the_new_one_could_not_be_saved() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk("/x", false);
        let mut journal = Journal::create(dir.path(), disk, vec![], vec![]).unwrap();
        journal.set_state(JournalState::Fixing).unwrap();
        // No file can have this name.
        journal.path = dir.path().join("n".repeat(300));
        order::seen();
        let error = journal.set_state(JournalState::Committed).unwrap_err();
        assert!(matches!(error, JournalError::Write { .. }), "{error}");
        assert_eq!(order::seen().len(), 2);
        assert_eq!(journal.doc.state, JournalState::Fixing);
    }
}
