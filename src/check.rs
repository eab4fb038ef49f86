//! The verdicts of checks of a finished disk, for plan, report and verify.

use serde::Serialize;

use crate::inspect::Severity;

/// The verdict of one check of the finished disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub id: &'static str,
    pub severity: Severity,
    pub ok: bool,
    /// True if `state` is [`CheckState::Ok`].
    pub state: CheckState,
    pub message: String,
    /// The location of the fact: a hive, a key, a file; empty if the message is sufficient.
    pub evidence: String,
    /// The findings that make it fail.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<&'static str>,
    /// Whether it fails and `--accept` permits that.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub accepted: bool,
}

impl Check {
    pub fn new(
        id: &'static str,
        severity: Severity,
        state: CheckState,
        message: impl Into<String>,
    ) -> Self {
        Self {
            id,
            severity,
            ok: state == CheckState::Ok,
            state,
            message: message.into(),
            evidence: String::new(),
            findings: Vec::new(),
            accepted: false,
        }
    }
}

/// The state of a check. One that could not run does not count as passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckState {
    Ok,
    Fault,
    CouldNotRun,
}

/// Whether the checks permit calling the disk ready.
pub fn is_ready(checks: &[Check]) -> bool {
    checks
        .iter()
        .all(|c| c.ok || c.severity != Severity::Blocker)
}

/// Whether the disk is ready apart from accepted faults.
pub fn is_ready_but_for_accepted(checks: &[Check]) -> bool {
    checks
        .iter()
        .all(|c| c.ok || c.accepted || c.severity != Severity::Blocker)
}
