//! What every action of a plan can do.

use crate::drivers::media::Media;
use crate::guest::{GuestPath, GuestRead, GuestWrite, VolumeId};
use crate::inspect::Hives;
use crate::registry::HiveError;

use super::change::{Change, Saver};
use super::error::Result;
use super::merge::{Merges, Merging, Walking};
use super::preview::Preview;

/// One unit of reversion: done wholly or not at all.
pub trait Act {
    fn id(&self) -> &str;

    /// One line for people.
    fn describe(&self) -> String;

    /// The volume it names; `None`: that of Windows.
    fn volume(&self) -> Option<VolumeId> {
        None
    }

    /// What it adds to the guest, at most.
    fn writes<'a>(&'a self, hives: &'a Hives) -> Writes<'a>;

    /// What it adds to the overlay, at most: that is written in whole clusters.
    fn overlay_bytes(&self) -> u64;

    /// Puts what it will write into the preview of the guest.
    fn foresee<'a>(&'a self, preview: &mut Preview<'a>) -> Result<(), HiveError>;

    /// Reads what has to be backed up and computed before anything is written.
    fn prepare(&self, _merging: &mut Merging<'_>) -> Result<()> {
        Ok(())
    }

    /// Backs up what it replaces, and writes.
    fn apply(&self, work: &mut Work<'_>) -> Result<Vec<Change>>;

    /// Hit after it was done and recorded.
    fn fail_point(&self) -> Option<&'static str> {
        None
    }

    /// What the check of it counts.
    fn kind(&self) -> Kind;

    /// Compares the guest with what it promised. Returns how many things it compared, or the first that
    /// differs.
    fn verify(&self, after: &Converted<'_>) -> Result<usize, String>;
}

/// What an action changes; each kind is one check of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Files,
    Registry,
}

/// What an action adds to the guest.
#[derive(Default)]
pub struct Writes<'a> {
    /// Directories made for many files, which make the MFT and the indexes grow; `None` where single files are
    /// written.
    pub folders: Option<usize>,
    /// The files, and how large they are then.
    pub files: Vec<(&'a GuestPath, u64)>,
    /// Size of the originals that are kept besides.
    pub originals: u64,
}

/// The file's part of an overlay, at most.
pub(super) fn in_overlay(size: u64) -> u64 {
    size.next_multiple_of(OVERLAY_CLUSTER) + 2 * OVERLAY_CLUSTER
}

pub(super) const OVERLAY_CLUSTER: u64 = 64 << 10;

/// What actions are carried out with.
pub struct Work<'a> {
    /// The volume Windows is on.
    pub volume: VolumeId,
    pub media: &'a dyn Media,
    /// Reads the guest as it was before the fix.
    pub before: &'a dyn GuestRead,
    pub writer: Box<dyn GuestWrite>,
    pub saver: Saver,
    /// The hives that were not written yet, and may still be edited.
    pub hives: Merges,
    /// The hives that were written and are still being walked.
    pub walking: Vec<Walking>,
}

/// A guest after the fix, read anew.
pub struct Converted<'a> {
    pub volume: VolumeId,
    pub guest: &'a dyn GuestRead,
    pub hives: &'a Hives,
    pub media: &'a dyn Media,
}
