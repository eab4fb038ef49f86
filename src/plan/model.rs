//! The plan of a conversion as data: shown by `plan`, carried out by `fix`, saved as `plan.json`.

use serde::Serialize;

use crate::actions::Action;
use crate::check::Check;
use crate::drivers::catalogue::Role;
use crate::error::Blocker;

/// A step that is not needed because its result already exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    pub id: String,
    pub title: String,
}

/// A driver the plan makes available to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedDriver {
    pub driver: String,
    pub role: Role,
    /// Directory in the driver source, e.g. `w10`.
    pub folder: String,
    pub version: String,
    /// `boot` (complete package, starts with the system), `installed` (in the driver store: Windows
    /// configures it when the device appears) or `staged` (installed by the first-boot script).
    pub placement: &'static str,
    /// The signer of its catalogue, if it is valid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signer: Option<String>,
}

/// The actions for Windows, before their effect is known.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Draft {
    pub actions: Vec<Action>,
    pub skipped: Vec<Skipped>,
    pub drivers: Vec<PlannedDriver>,
    pub blockers: Vec<Blocker>,
    pub warnings: Vec<String>,
}

/// The decisions of a conversion. Only [`super::plan`] and [`super::linux::plan`] create one, and
/// nothing is added to it afterwards.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    pub actions: Vec<Action>,
    pub skipped: Vec<Skipped>,
    pub drivers: Vec<PlannedDriver>,
    pub blockers: Vec<Blocker>,
    /// The codes of the blockers that `--accept` removed.
    pub accepted: Vec<String>,
    pub warnings: Vec<String>,
    /// The checks of `verify` for the result.
    pub checks: Vec<Check>,
    /// Whether the result will start: no blockers, nothing accepted, no failed check of severity
    /// "blocker".
    pub ready: bool,
    /// Set for a Linux guest, which has no actions.
    #[serde(skip)]
    pub linux: Option<Handover>,
}

/// The steps that make a Linux guest ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handover {
    pub method: Method,
    pub why: String,
    pub steps: Vec<Step>,
}

/// The method that makes a Linux guest ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    VirtV2vInPlace,
    VirtV2v,
    AsIs,
}

/// A step of a hand-over: carried out on overlays of whole disks, not in one guest file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub id: &'static str,
    pub description: String,
}
