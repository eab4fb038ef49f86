//! Applies the hive edits of a plan to copies in memory while the plan is evaluated. So the plan is
//! evaluated on the very hives that will be written, and no hive is edited twice.
//!
//! Each hive has a thread and a child process ([`crate::registry::confined`]). A caller waits only
//! for the hive it needs.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::inspect::{HiveName, Hives};
use crate::memory::FileBytes;
use crate::registry::RegEdits;
use crate::registry::confined::{HiveEditError, HiveFile};
use crate::threads::joined;
use crate::timeline;

pub(super) type Edited = Result<HiveFile, HiveEditError>;

/// Edited hives, and those that are still being edited.
#[derive(Default)]
pub struct EditedHives(Mutex<BTreeMap<HiveName, Edit>>);

/// A hive being edited.
pub(super) enum Edit {
    Running(JoinHandle<Edited>),
    Done(Edited),
}

/// The memory limit for hives while the plan is evaluated; those of real guests take less.
const EARLY: usize = 448 << 20;

impl EditedHives {
    /// Starts to edit the hives of the actions; very large ones are left for later.
    pub fn of<'e>(edits: impl Iterator<Item = (HiveName, &'e RegEdits)>, hives: &Hives) -> Self {
        let loaded = [HiveName::System, HiveName::Software, HiveName::Drivers];
        let loaded = loaded.iter().filter_map(|name| hives.get(*name));
        let held: usize = loaded.map(|hive| hive.bytes.len()).sum();
        let mut all = BTreeMap::new();
        // The plan waits for SYSTEM alone.
        let mut edits: Vec<_> = edits.collect();
        edits.sort_by_key(|(hive, _)| *hive != HiveName::System);
        for (hive, edits) in edits {
            if let Some(loaded) = hives.get(hive)
                && held + loaded.bytes.len() <= EARLY
            {
                all.insert(hive, Edit::start(loaded.bytes.clone(), edits.clone()));
            }
        }
        Self(Mutex::new(all))
    }

    /// The edited hive; `None` if it is not edited or the edit failed.
    pub fn bytes(&self, hive: HiveName) -> Option<io::Result<FileBytes>> {
        let edited = self.take(hive)?.finished();
        let bytes = edited.as_ref().ok().map(HiveFile::bytes);
        self.all().insert(hive, Edit::Done(edited));
        bytes
    }

    /// Takes a hive out; `None` if it is not edited.
    pub(super) fn take(&self, hive: HiveName) -> Option<Edit> {
        self.all().remove(&hive)
    }

    /// Waits for all of them and consumes them. Returns the first failed edit and its error.
    pub fn check(&self) -> Result<(), (HiveName, HiveEditError)> {
        let all = std::mem::take(&mut *self.all());
        for (hive, edit) in all {
            edit.finished().map_err(|error| (hive, error))?;
        }
        Ok(())
    }

    /// Hives that were edited elsewhere.
    #[cfg(test)]
    pub(super) fn done(edited: impl IntoIterator<Item = (HiveName, Edited)>) -> Self {
        let done = |(hive, edited)| (hive, Edit::Done(edited));
        Self(Mutex::new(edited.into_iter().map(done).collect()))
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<HiveName, Edit>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Edit {
    /// Starts to edit a hive.
    pub(super) fn start(bytes: Arc<FileBytes>, edits: RegEdits) -> Self {
        Self::Running(thread::spawn(move || {
            let _span = timeline::span(format!("edit {}", edits.prefix));
            let mut file = HiveFile::new(&bytes)?;
            // The thread must not keep it in memory.
            drop(bytes);
            file.edit(&edits).map(|()| file)
        }))
    }

    pub(super) fn finished(self) -> Edited {
        match self {
            Edit::Done(edited) => edited,
            Edit::Running(thread) => joined(thread.join()),
        }
    }
}
