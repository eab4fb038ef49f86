//! Plan and conversion as text: most important first, aligned. Inspection: [`super::look`].

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::boot_path::{BootPath, Controller};
use crate::domain::Emit;
use crate::fix::journal::ActionState;
use crate::plan::model::Plan;
use crate::ui::bytes;

use super::Report;

/// The JSON name of a unit variant, so that text and JSON never differ.
pub(super) fn lower<T: serde::Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

pub fn controllers(map: &BTreeMap<Controller, BootPath>) -> String {
    map.iter()
        .fold(String::new(), |mut text, (controller, path)| {
            let _ = writeln!(
                text,
                "  {:<12} {:<9} {}",
                controller.name(),
                if path.ready { "ready" } else { "NOT READY" },
                path.reason
            );
            text
        })
}

/// `plan` for people.
pub fn plan(plan: &Plan) -> String {
    let mut text = String::new();
    if !plan.drivers.is_empty() {
        text.push_str("Drivers\n");
        for d in &plan.drivers {
            let _ = writeln!(
                text,
                "  {:<12} {:<10} {:<8} {:<18} {}",
                d.driver,
                lower(&d.role),
                d.folder,
                d.version,
                d.placement
            );
        }
    }
    if plan.actions.is_empty() && plan.blockers.is_empty() {
        text.push_str("Nothing to do: everything is already as it should be.\n");
    } else if !plan.actions.is_empty() {
        text.push_str("Actions\n");
    }
    for action in &plan.actions {
        let _ = writeln!(text, "  {:<22} {}", action.id(), action.describe());
    }
    for skipped in &plan.skipped {
        let _ = writeln!(text, "  {:<22} already done: {}", skipped.id, skipped.title);
    }
    for warning in &plan.warnings {
        let _ = writeln!(text, "Warning: {warning}");
    }
    text.trim_end().to_string()
}

/// The end of `convert` for people.
pub fn conversion(r: &Report) -> String {
    let mut text = String::new();
    for action in &r.actions {
        let state = match action.state {
            ActionState::Done => "done",
            ActionState::Skipped => "already",
            ActionState::Planned => "planned",
            ActionState::InProgress => "started",
        };
        let _ = writeln!(
            text,
            "  {state:<8} {:<22} {}",
            action.id, action.description
        );
    }
    let _ = writeln!(text, "\nBoot path after the fix (read back from the disk)");
    text.push_str(&controllers(&r.controllers));
    let failed: Vec<_> = r.checks.iter().filter(|c| !c.ok).collect();
    for check in failed {
        let _ = writeln!(
            text,
            "  {:<8} [{}] {}",
            lower(&check.severity),
            check.id,
            check.message
        );
    }
    for warning in &r.warnings {
        let _ = writeln!(text, "Warning: {warning}");
    }
    let _ = writeln!(
        text,
        "\n{}: inspect {:.2} s, fix {:.2} s, copy {:.2} s, total {:.2} s; {} written of {}",
        if r.ready { "READY" } else { "NOT READY" },
        r.timings.inspect_s,
        r.timings.fix_s,
        r.timings.copy_s,
        r.timings.total_s,
        bytes(r.bytes.written),
        bytes(r.bytes.virtual_size),
    );
    for disk in &r.outputs.disks {
        let _ = writeln!(text, "  disk       {}", disk.display());
    }
    if !r.outputs.complete {
        let _ = writeln!(text, "  left       {} on the source", bytes(r.bytes.left));
    }
    for (label, xml) in [
        ("bootstrap", &r.outputs.bootstrap_xml),
        ("final", &r.outputs.final_xml),
    ] {
        if let Some(xml) = xml {
            let _ = writeln!(text, "  {label:<10} {}", xml.display());
        }
    }
    for file in &r.outputs.emitted {
        let target = Emit::of_file(file).map_or("emitted", |(emit, _)| emit.target());
        let _ = writeln!(text, "  {target:<10} {}", file.display());
    }
    if !r.next_commands.is_empty() {
        text.push_str("\nNext\n");
        for command in &r.next_commands {
            let _ = writeln!(text, "  {command}");
        }
    }
    text.trim_end().to_string()
}
