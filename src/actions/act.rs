//! The interface of every action of a plan.

use crate::drivers::driver_source::DriverSource;
use crate::guest::{GuestPath, GuestRead, GuestWrite, VolumeId};
use crate::inspect::Hives;
use crate::registry::HiveError;

use super::change::{Change, Saver};
use super::error::Result;
use super::merge::{Merges, Merging, Walking};
use super::preview::Preview;

/// A unit of work that is done wholly or not at all.
pub trait Act {
    fn id(&self) -> &str;

    /// Describes the action in one line for people.
    fn describe(&self) -> String;

    /// The volume it names; `None` is that of Windows.
    fn volume(&self) -> Option<VolumeId> {
        None
    }

    /// The upper limit of what it adds to the guest.
    fn writes<'a>(&'a self, hives: &'a Hives) -> Writes<'a>;

    /// The upper limit of what it adds to the overlay, which is written in whole clusters.
    fn overlay_bytes(&self) -> u64;

    /// Adds its result to the preview of the guest.
    fn foresee<'a>(&'a self, preview: &mut Preview<'a>) -> Result<(), HiveError>;

    /// Reads and computes everything it needs before the first write.
    fn prepare(&self, _merging: &mut Merging<'_>) -> Result<()> {
        Ok(())
    }

    /// Backs up what it replaces, and writes.
    fn apply(&self, work: &mut Work<'_>) -> Result<Vec<Change>>;

    /// The failpoint after it was done and recorded.
    fn fail_point(&self) -> Option<&'static str> {
        None
    }

    /// The kind of its check.
    fn kind(&self) -> Kind;

    /// Compares the guest with its result. Returns the number of compared items, or the first
    /// difference.
    fn verify(&self, after: &Converted<'_>) -> Result<usize, String>;
}

/// The subject of an action; each kind is one check of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Files,
    Registry,
}

/// The upper limit of what an action adds to the guest.
#[derive(Default)]
pub struct Writes<'a> {
    /// Directories for many files, which make the MFT and the indexes grow; `None` if single files
    /// are written.
    pub folders: Option<usize>,
    /// The files and their sizes afterwards.
    pub files: Vec<(&'a GuestPath, u64)>,
    /// The size of the originals that are kept as well.
    pub originals: u64,
}

/// The upper limit of the file's part of an overlay.
pub(super) fn in_overlay(size: u64) -> u64 {
    size.next_multiple_of(OVERLAY_CLUSTER) + 2 * OVERLAY_CLUSTER
}

pub(super) const OVERLAY_CLUSTER: u64 = 64 << 10;

/// The resources for carrying out actions.
pub struct Work<'a> {
    /// The volume of Windows.
    pub volume: VolumeId,
    pub driver_source: &'a dyn DriverSource,
    /// A reader of the guest before the fix.
    pub before: &'a dyn GuestRead,
    pub writer: Box<dyn GuestWrite>,
    pub saver: Saver,
    /// The hives that are not written yet, and may still be edited.
    pub hives: Merges,
    /// The written hives that are still being walked.
    pub walking: Vec<Walking>,
}

/// A guest after the fix, read again.
pub struct Converted<'a> {
    pub volume: VolumeId,
    pub guest: &'a dyn GuestRead,
    pub hives: &'a Hives,
    pub driver_source: &'a dyn DriverSource,
}
