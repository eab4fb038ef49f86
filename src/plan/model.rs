//! What a conversion will do, as data: shown by `plan`, carried out by `fix`, kept as `plan.json`.

use serde::Serialize;

use crate::actions::Action;
use crate::check::Check;
use crate::drivers::catalogue::Role;
use crate::error::Blocker;

/// Something that needs no doing because it is already so.
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
    /// Directory of the media it comes from, e.g. `w10`.
    pub folder: String,
    pub version: String,
    /// `boot` (complete package, starts with the system), `installed` (in the driver store: Windows
    /// configures it when it meets the device) or `staged` (installed by the first-boot script).
    pub placement: &'static str,
    /// Who signed its catalogue, when that is in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signer: Option<String>,
}

/// What would be done to Windows, before it is known what that leads to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Draft {
    pub actions: Vec<Action>,
    pub skipped: Vec<Skipped>,
    pub drivers: Vec<PlannedDriver>,
    pub blockers: Vec<Blocker>,
    pub warnings: Vec<String>,
}

/// What a conversion will do. Only [`super::plan`] and [`super::linux::plan`] make one, and nothing is added to
/// it afterwards.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    pub actions: Vec<Action>,
    pub skipped: Vec<Skipped>,
    pub drivers: Vec<PlannedDriver>,
    pub blockers: Vec<Blocker>,
    /// The blockers that `--accept` took, by their codes.
    pub accepted: Vec<String>,
    pub warnings: Vec<String>,
    /// What `verify` will report of the result.
    pub checks: Vec<Check>,
    /// The result will start: no blockers, nothing accepted, no check of severity "blocker" that fails.
    pub ready: bool,
    /// For a Linux guest, which has no actions.
    #[serde(skip)]
    pub linux: Option<Handover>,
}

/// How a Linux guest becomes ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handover {
    pub method: Method,
    pub why: String,
    pub steps: Vec<Step>,
}

/// Who makes a Linux guest ready.
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
