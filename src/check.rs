//! The verdict of a check of a finished disk: what plan, report and verify speak of.

use serde::Serialize;

use crate::inspect::Severity;

/// The verdict of a check that looked at the finished disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub id: &'static str,
    pub severity: Severity,
    pub ok: bool,
    /// `ok` is the same as `state` being [`CheckState::Ok`].
    pub state: CheckState,
    pub message: String,
    /// Where it was read: a hive, a key, a file; empty when the message says it all.
    pub evidence: String,
    /// The findings it fails because of.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<&'static str>,
    /// It fails, and `--accept` took that.
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

/// A check that could not run says nothing about the disk, so it does not count as passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckState {
    Ok,
    Fault,
    CouldNotRun,
}

/// Whether the checks allow to call the disk ready.
pub fn is_ready(checks: &[Check]) -> bool {
    checks
        .iter()
        .all(|c| c.ok || c.severity != Severity::Blocker)
}

/// The same, where a fault was accepted before the fix.
pub fn is_ready_but_for_accepted(checks: &[Check]) -> bool {
    checks
        .iter()
        .all(|c| c.ok || c.accepted || c.severity != Severity::Blocker)
}
