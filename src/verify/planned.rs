//! Compares the guest with the plan: every file byte for byte, every registry value.

use crate::actions::{Action, Converted, Kind};
use crate::check::{Check, CheckState};
use crate::inspect::Severity;
use crate::ui::count;

/// Verifies the actions; `after` is `None` if the hives are unreadable.
pub fn planned(actions: &[Action], after: Option<&Converted<'_>>) -> Vec<Check> {
    let compared = |kind| {
        let after = after.ok_or("the hives were not read")?;
        let of_kind = actions.iter().filter(|action| action.kind() == kind);
        of_kind
            .map(|action| action.verify(after))
            .sum::<Result<usize, String>>()
    };
    let check = |id, result: Result<String, String>| {
        let state = match result {
            Ok(_) => CheckState::Ok,
            Err(_) => CheckState::Fault,
        };
        let message = result.unwrap_or_else(|fault| fault);
        Check::new(id, Severity::Blocker, state, message)
    };
    let files = compared(Kind::Files).map(|n| format!("{} read back identical", count(n, "file")));
    let edits = compared(Kind::Registry).map(|n| format!("{n} registry edits read back"));
    vec![
        check("files-as-planned", files),
        check("registry-as-planned", edits),
    ]
}
