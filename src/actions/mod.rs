//! The actions on a guest: one file per action, with everything that belongs to it.
//!
//! A plan lists actions in the order in which they are carried out. Every hive is backed up before
//! the first write and edited in parallel with the others ([`Act::prepare`]). All writes go to an
//! overlay, so a failed edit changes nothing. SYSTEM is last, because it activates the drivers.

mod act;
mod boot_sector;
mod change;
mod copy_files;
mod copy_in_guest;
mod edit_hive;
pub mod edited;
mod error;
mod merge;
mod preview;

use std::ops::Deref;

use serde::Serialize;

pub use act::{Act, Converted, Kind, Work};
pub use boot_sector::PatchBootSector;
pub use change::{Change, Saver};
pub use copy_files::{CopyFiles, FileCopy};
pub use copy_in_guest::CopyInGuest;
pub use edit_hive::EditHive;
pub use edited::EditedHives;
pub use error::ActionError;
pub use merge::{Backups, Merging, Walked, Walking, check_edits};
pub use preview::{Preview, PreviewHives};

use crate::drivers::driver_source::DriverSource;
use crate::guest::{GuestRead, VolumeId};
use crate::inspect::HiveName;
use crate::registry::{HiveError, RegEdits};

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Action {
    CopyFiles(CopyFiles),
    CopyInGuest(CopyInGuest),
    PatchBootSector(PatchBootSector),
    EditHive(EditHive),
}

impl Deref for Action {
    type Target = dyn Act;

    fn deref(&self) -> &Self::Target {
        match self {
            Action::CopyFiles(action) => action,
            Action::CopyInGuest(action) => action,
            Action::PatchBootSector(action) => action,
            Action::EditHive(action) => action,
        }
    }
}

/// The hives of the actions, each with its edits.
pub fn edits(actions: &[Action]) -> impl Iterator<Item = (HiveName, &RegEdits)> {
    actions.iter().filter_map(|action| match action {
        Action::EditHive(edit) => Some((edit.hive, &edit.edits)),
        _ => None,
    })
}

/// The guest after the actions; `volume` is that of Windows. Fails if a hive to be edited cannot be
/// read from end to end.
pub fn preview<'a>(
    actions: &'a [Action],
    hives: PreviewHives<'a>,
    volume: VolumeId,
    guest: &'a dyn GuestRead,
    driver_source: &'a dyn DriverSource,
) -> Result<Preview<'a>, HiveError> {
    let mut preview = Preview::new(hives, volume, guest, driver_source);
    for action in actions {
        action.foresee(&mut preview)?;
    }
    Ok(preview)
}

#[cfg(test)]
mod tests;
