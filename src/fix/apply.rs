//! Carries out the actions of a plan on the overlay, in the plan's order, and records them in the
//! journal.

use std::io;

use crate::actions::{
    Action, ActionError, Backups, Change, EditedHives, Merging, Saver, Walking, Work,
};
use crate::drivers::driver_source::DriverSource;
use crate::error::{Blocker, Error, ErrorKind};
use crate::failpoint;
use crate::guest::{GuestError, GuestRead, GuestWrite, VolumeId};
use crate::inspect::Hives;
use crate::plan::Plan;
use crate::registry::confined::HiveEditError;
use crate::timeline;
use crate::tool::host;

use super::journal::{ActionRecord, ActionState, Journal, JournalError, JournalState};

#[derive(Debug, thiserror::Error)]
pub enum FixError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Action(#[from] ActionError),
    #[error("fixing")]
    Io(#[from] io::Error),
}

impl From<GuestError> for FixError {
    fn from(error: GuestError) -> Self {
        ActionError::from(error).into()
    }
}

impl From<FixError> for Error {
    fn from(error: FixError) -> Self {
        let failed = || Error::failed("fixing the guest failed; the disk itself was not changed");
        let error = match error {
            FixError::Action(error) => error,
            other => return failed().because(other),
        };
        match error {
            ActionError::Guest(GuestError::MissingTool { what, hint }) => {
                Error::missing_tool(format!("{what} is not available on this host")).hint(hint)
            }
            ActionError::Guest(e @ GuestError::Unsafe { .. }) => {
                let blocker = Blocker::new(
                    "volume-unsafe",
                    e.to_string(),
                    "start the guest on its old host, run `powercfg /h off`, shut it down completely",
                );
                Error::refused("the guest's volume cannot be written", vec![blocker])
            }
            ActionError::Guest(e @ GuestError::NoSpace { .. }) => {
                let remedy = "delete files in the guest (cleanmgr, the recycle bin) or enlarge the volume, shut the guest down, and convert again";
                let blocker = Blocker::new("guest-space", e.to_string(), remedy);
                Error::refused("a volume of the guest is full", vec![blocker])
            }
            ActionError::Edit {
                source: e @ HiveEditError::Missing,
                ..
            } => Error::missing_tool(e.to_string()).hint(host::hint(host::LIBHIVEX)),
            ActionError::Edit {
                source: HiveEditError::Interrupted(_),
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

fn point(name: &str) -> Result<()> {
    Ok(failpoint::hit(name)?)
}

fn step(when: &str, id: &str) -> Result<()> {
    Ok(failpoint::step(when, &format!("action {id}"))?)
}

/// The journal's records for a plan, before any action.
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

/// Starts to back up the hives of the actions.
pub fn back_up(
    actions: &[Action],
    before: &dyn GuestRead,
    hives: Hives,
    saver: &Saver,
) -> Result<Backups> {
    let mut merging = Merging::new(before, hives);
    for action in actions {
        action.prepare(&mut merging)?;
    }
    Ok(merging.back_up(saver))
}

/// The inputs of a fix.
pub struct Fix<'a> {
    pub actions: &'a [Action],
    pub volume: VolumeId,
    pub driver_source: &'a dyn DriverSource,
    /// A reader of the guest before the fix.
    pub before: &'a dyn GuestRead,
    /// The hives, if they were already edited.
    pub edited: &'a EditedHives,
    /// Keeps the originals, beside the journal.
    pub saver: Saver,
    /// The backups started while the plan was made.
    pub backups: Option<Backups>,
    pub journal: &'a mut Journal,
}

impl Fix<'_> {
    /// Applies every action through `writer` and closes it. The journal ends in [`JournalState::Fixing`]:
    /// `verify` decides whether the result is right. Other threads are still walking the written
    /// hives.
    pub fn apply(
        mut self,
        hives: Hives,
        open_writer: impl FnOnce() -> Result<Box<dyn GuestWrite>>,
    ) -> Result<Vec<Walking>> {
        self.journal.set_state(JournalState::Fixing)?;
        let backups = match self.backups.take() {
            // The merged hives replace those in memory.
            Some(backups) => {
                drop(hives);
                backups
            }
            None => back_up(self.actions, self.before, hives, &self.saver)?,
        };
        let mut hives = backups.merge(self.edited);
        // Hives are edited meanwhile; usually the volume is mounted already.
        let writer = {
            let _span = timeline::span("mount the volume");
            open_writer()?
        };
        hives.backed_up()?;
        point("backed-up")?;
        let mut work = Work {
            volume: self.volume,
            driver_source: self.driver_source,
            before: self.before,
            writer,
            saver: self.saver.clone(),
            hives,
            walking: Vec::new(),
        };
        for action in self.actions {
            self.begin(action.id())?;
            let changes = {
                let _span = timeline::span(format!("action {}", action.id()));
                action.apply(&mut work)?
            };
            self.finish(action.id(), &changes)?;
            action.fail_point().map_or(Ok(()), point)?;
        }
        self.journal.save()?;
        {
            let _span = timeline::span("close the volume");
            work.writer.close()?;
        }
        Ok(work.walking)
    }

    fn begin(&mut self, id: &str) -> Result<()> {
        step("before", id)?;
        Ok(self.journal.mark(id, ActionState::InProgress)?)
    }

    /// Enters the changes of an action into the journal, which is saved before the next one begins.
    fn finish(&mut self, id: &str, changes: &[Change]) -> Result<()> {
        for action in self.journal.doc.actions.iter_mut().filter(|a| a.id == id) {
            action.changes = changes.to_vec();
            action.state = ActionState::Done;
        }
        step("after", id)
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::actions::{CopyFiles, FileCopy};
    use crate::drivers::driver_source::Memory;
    use crate::fix::journal::{DiskRef, FILE_NAME};
    use crate::guest::{Extent, GuestPath};
    use crate::plan::Skipped;
    use crate::testing::{MemoryGuest, bootstrap, driver_source};

    type Written<T> = Result<T, GuestError>;

    /// Reads the journal from disk before each write.
    struct Watcher(PathBuf);

    impl Watcher {
        fn announced(&self, id: &str) -> Written<()> {
            let journal = Journal::load(&self.0).unwrap();
            assert_eq!(journal.doc.state, JournalState::Fixing);
            let state = |id: &str| {
                let mut actions = journal.doc.actions.iter();
                actions.find(|a| a.id == id).unwrap().state
            };
            assert_eq!(state(id), ActionState::InProgress, "{id}");
            let other = if id == "one" { "two" } else { "one" };
            let done = [ActionState::Planned, ActionState::Done][usize::from(id == "two")];
            assert_eq!(state(other), done, "{id}");
            Ok(())
        }
    }

    impl GuestWrite for Watcher {
        fn create_dir(&mut self, _: VolumeId, _: &GuestPath) -> Written<()> {
            unreachable!()
        }

        fn write_file(&mut self, _: VolumeId, path: &GuestPath, _: &[u8]) -> Written<()> {
            self.announced(path.name().unwrap())
        }

        fn patch_file(&mut self, _: VolumeId, _: &GuestPath, _: u64, _: &[Extent]) -> Written<()> {
            unreachable!()
        }

        fn patch_boot_sector(&mut self, _: VolumeId, _: &[Extent]) -> Written<()> {
            unreachable!()
        }

        fn remove_file(&mut self, _: VolumeId, _: &GuestPath) -> Written<()> {
            unreachable!()
        }

        fn remove_dir(&mut self, _: VolumeId, _: &GuestPath) -> Written<()> {
            unreachable!()
        }

        /// Until then the volume may be written to: all of it is in the journal.
        fn close(self: Box<Self>) -> Written<()> {
            let journal = Journal::load(&self.0).unwrap();
            let states = journal.doc.actions.iter().map(|a| a.state);
            let done = states.filter(|state| *state == ActionState::Done).count();
            assert_eq!((done, journal.doc.state), (2, JournalState::Fixing));
            Ok(())
        }
    }

    fn journal(dir: &Path, actions: Vec<ActionRecord>) -> Journal {
        let disk = DiskRef {
            path: "/disk".into(),
            format: "raw".into(),
            size_bytes: 1,
            in_place: false,
        };
        Journal::create(dir, disk, Vec::new(), actions).unwrap()
    }

    fn plan() -> Plan {
        let version = crate::demo::WinVersion::Win10;
        let prepared =
            MemoryGuest::new(version).prepare(&driver_source(), Some(bootstrap(version)));
        let copy = |id: &str| {
            let file = FileCopy {
                to: GuestPath::parse(&format!("\\Windows\\{id}")).unwrap(),
                from: "new.sys".into(),
                size: 3,
                replaces: false,
            };
            Action::CopyFiles(CopyFiles {
                id: id.into(),
                title: "copy".into(),
                folders: Vec::new(),
                files: vec![file],
            })
        };
        Plan {
            actions: vec![copy("one"), copy("two")],
            skipped: vec![Skipped {
                id: "three".into(),
                title: "already so".into(),
            }],
            ..prepared.plan
        }
    }

    /// Applies a plan to a guest in memory.
    fn apply(plan: &Plan, journal: &mut Journal, writer: Box<dyn GuestWrite>) -> Result<()> {
        MemoryGuest::new(crate::demo::WinVersion::Win10).look(&[], |guest, survey| {
            let fix = Fix {
                actions: &plan.actions,
                volume: survey.inspection.windows.as_ref().unwrap().system_volume,
                driver_source: &Memory::new([("new.sys".to_string(), b"new".to_vec())]),
                before: guest,
                edited: &EditedHives::default(),
                saver: Saver {
                    folder: journal.folder().to_path_buf(),
                    durably: false,
                },
                backups: None,
                journal,
            };
            let hives = survey.hives.clone().unwrap();
            fix.apply(hives, || Ok(writer)).map(drop)
        })
    }

    #[test]
    fn an_action_is_in_the_journal_before_it_writes_and_done_before_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan();
        let mut journal = journal(dir.path(), records(&plan));
        let file = dir.path().join(FILE_NAME);
        apply(&plan, &mut journal, Box::new(Watcher(file.clone()))).unwrap();
        let read = Journal::load(&file).unwrap();
        let states: Vec<_> = (read.doc.actions.iter())
            .map(|a| (a.id.as_str(), a.state, a.changes.len()))
            .collect();
        assert_eq!(
            states,
            [
                ("one", ActionState::Done, 1),
                ("two", ActionState::Done, 1),
                ("three", ActionState::Skipped, 0)
            ]
        );
    }

    #[test]
    fn the_journal_lists_what_the_plan_does_and_what_it_skips() {
        let plan = plan();
        let records: Vec<_> = (records(&plan).into_iter())
            .map(|r| (r.id, r.description, r.state, r.changes.len()))
            .collect();
        let (planned, skipped) = (ActionState::Planned, ActionState::Skipped);
        let record = |id: &str, text: &str, state| (id.to_string(), text.to_string(), state, 0);
        assert_eq!(
            records,
            [
                record("one", "copy: 1 file (3 B)", planned),
                record("two", "copy: 1 file (3 B)", planned),
                record("three", "already so", skipped),
            ]
        );
    }

    #[test]
    fn after_an_action_that_fails_nothing_more_is_done_and_the_journal_names_it() {
        let mut plan = plan();
        let Action::CopyFiles(copy) = &mut plan.actions[0] else {
            panic!();
        };
        copy.files[0].from = "gone.sys".into();
        let (seen, done, journal) = fixed(&plan, true, true);
        let error = Error::from(done.unwrap_err());
        assert_eq!(error.kind, ErrorKind::Failed);
        assert_eq!(seen, [""; 0]);
        let states: Vec<_> = journal.doc.actions.iter().map(|a| a.state).collect();
        use ActionState::{Done, InProgress, Planned, Skipped};
        assert_eq!(states, [InProgress, Planned, Skipped]);
        plan.actions.reverse();
        let (seen, _, journal) = fixed(&plan, true, true);
        assert_eq!(seen, ["write"], "and the volume is not closed as a success");
        let states: Vec<_> = journal.doc.actions.iter().map(|a| a.state).collect();
        assert_eq!(states, [Done, InProgress, Skipped]);
    }

    /// An error that the user can remedy is a refusal with a remedy.
    #[test]
    fn a_volume_that_cannot_be_written_is_refused_with_a_remedy() {
        let no_space = GuestError::NoSpace { path: "\\x".into() };
        let unsafe_volume = GuestError::Unsafe {
            reason: "it is hibernated".into(),
        };
        for (error, code) in [(no_space, "guest-space"), (unsafe_volume, "volume-unsafe")] {
            let error = Error::from(FixError::from(error));
            assert_eq!(error.kind, ErrorKind::Refused, "{code}");
            assert_eq!(error.blockers[0].code, code);
            assert!(!error.blockers[0].remedy.is_empty(), "{code}");
        }
    }

    /// Takes nothing that is written to it; its volume can be closed or not.
    struct Closing(bool, std::sync::Arc<std::sync::Mutex<Vec<&'static str>>>);

    impl Closing {
        fn note(&self, what: &'static str) -> Written<()> {
            self.1.lock().unwrap().push(what);
            Ok(())
        }
    }

    impl GuestWrite for Closing {
        fn create_dir(&mut self, _: VolumeId, _: &GuestPath) -> Written<()> {
            self.note("write")
        }

        fn write_file(&mut self, _: VolumeId, _: &GuestPath, _: &[u8]) -> Written<()> {
            self.note("write")
        }

        fn patch_file(&mut self, _: VolumeId, _: &GuestPath, _: u64, _: &[Extent]) -> Written<()> {
            self.note("write")
        }

        fn patch_boot_sector(&mut self, _: VolumeId, _: &[Extent]) -> Written<()> {
            self.note("write")
        }

        fn remove_file(&mut self, _: VolumeId, _: &GuestPath) -> Written<()> {
            unreachable!()
        }

        fn remove_dir(&mut self, _: VolumeId, _: &GuestPath) -> Written<()> {
            unreachable!()
        }

        fn close(self: Box<Self>) -> Written<()> {
            self.note("close")?;
            match self.0 {
                true => Ok(()),
                false => Err(GuestError::NoSpace { path: "\\".into() }),
            }
        }
    }

    /// Applies a plan, with or without room for the originals and a volume that closes. Returns what was
    /// written, the result and the journal.
    fn fixed(plan: &Plan, save: bool, close: bool) -> (Vec<&'static str>, Result<()>, Journal) {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = journal(dir.path(), records(plan));
        if !save {
            std::fs::write(dir.path().join("backup"), "in the way").unwrap();
        }
        let seen = std::sync::Arc::default();
        let writer = Closing(close, std::sync::Arc::clone(&seen));
        let done = apply(plan, &mut journal, Box::new(writer));
        let seen = seen.lock().unwrap().clone();
        (seen, done, journal)
    }

    #[test]
    fn the_volume_is_closed_at_the_end_and_what_cannot_be_closed_is_no_success() {
        let plan = plan();
        let (seen, done, _) = fixed(&plan, true, true);
        assert_eq!(seen, ["write", "write", "close"]);
        done.unwrap();
        let (_, done, journal) = fixed(&plan, true, false);
        let error = Error::from(done.unwrap_err());
        assert_eq!(error.blockers[0].code, "guest-space");
        assert_eq!(journal.doc.state, JournalState::Fixing);
    }

    #[test]
    fn nothing_is_written_where_the_originals_of_the_hives_cannot_be_saved() {
        let version = crate::demo::WinVersion::Win10;
        let prepared =
            MemoryGuest::new(version).prepare(&driver_source(), Some(bootstrap(version)));
        assert!(
            prepared
                .plan
                .actions
                .iter()
                .any(|a| matches!(a, Action::EditHive(_)))
        );
        let (seen, done, _) = fixed(&prepared.plan, false, true);
        assert!(done.is_err());
        assert_eq!(seen, [""; 0]);
    }

    #[test]
    fn a_missing_library_and_an_interruption_are_told_apart_from_a_failure() {
        let edit = |source| {
            let hive = "SYSTEM";
            Error::from(FixError::Action(ActionError::Edit { hive, source }))
        };
        let missing = edit(HiveEditError::Missing);
        assert_eq!(missing.kind, ErrorKind::MissingTool);
        assert!(!missing.hints.is_empty());
        let stopped = edit(HiveEditError::Interrupted(crate::stop::Interrupted));
        assert_eq!(stopped.kind, ErrorKind::Interrupted);
        let tool = GuestError::MissingTool {
            what: "libntfs-3g".into(),
            hint: "apt install it".into(),
        };
        let error = Error::from(FixError::from(tool));
        assert_eq!((error.kind, error.hints.len()), (ErrorKind::MissingTool, 1));
        let failed = edit(HiveEditError::Library("full".into()));
        assert_eq!(failed.kind, ErrorKind::Failed);
        assert!(failed.message.contains("the disk itself was not changed"));
    }
}
