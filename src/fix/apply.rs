//! Carries out the actions of a plan on the overlay, in the plan's order, and keeps the journal of them.

use std::io;

use crate::actions::{Action, ActionError, Change, EditedHives, Merging, Saver, Walking, Work};
use crate::drivers::media::Media;
use crate::error::{Blocker, Error, ErrorKind};
use crate::failpoint;
use crate::guest::{GuestError, GuestRead, GuestWrite, VolumeId};
use crate::inspect::Hives;
use crate::plan::Plan;
use crate::registry::confined::HiveEditError;
use crate::timeline;
use crate::tool::host;

use super::journal::{ActionRecord, ActionState, Journal, JournalError, State};

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
    pub actions: &'a [Action],
    pub volume: VolumeId,
    pub media: &'a dyn Media,
    /// Reads the guest as it is before the fix.
    pub before: &'a dyn GuestRead,
    /// The hives, where they were edited already.
    pub edited: &'a EditedHives,
    pub journal: &'a mut Journal,
}

impl Fix<'_> {
    /// Applies every action through `writer` and closes it. The journal ends in [`State::Fixing`]: `verify`
    /// decides whether the result is right. The hives that were written are still being walked.
    pub fn apply(
        mut self,
        hives: Hives,
        open_writer: impl FnOnce() -> Result<Box<dyn GuestWrite>>,
    ) -> Result<Vec<Walking>> {
        self.journal.set_state(State::Fixing)?;
        let saver = Saver {
            folder: self.journal.folder().to_path_buf(),
            durably: self.journal.doc.disk.in_place,
        };
        let mut merging = Merging::new(self.before, hives);
        for action in self.actions {
            action.prepare(&mut merging)?;
        }
        let mut hives = merging.begin(&saver, self.edited);
        // The volume is mounted while the originals are backed up, and files are written while hives are edited.
        let writer = {
            let _span = timeline::span("mount the volume");
            open_writer()?
        };
        hives.backed_up()?;
        point("backed-up")?;
        let mut work = Work {
            volume: self.volume,
            media: self.media,
            before: self.before,
            writer,
            saver,
            hives,
            walking: Vec::new(),
        };
        for action in self.actions {
            self.begin(action.id())?;
            let changes = {
                let _span = timeline::span(format!("action {}", action.id()));
                action.apply(&mut work)?
            };
            self.finish(action.id(), changes)?;
            action.fail_point().map_or(Ok(()), point)?;
        }
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

    fn finish(&mut self, id: &str, changes: Vec<Change>) -> Result<()> {
        for action in self.journal.doc.actions.iter_mut().filter(|a| a.id == id) {
            action.changes.clone_from(&changes);
        }
        self.journal.mark(id, ActionState::Done)?;
        step("after", id)
    }
}
