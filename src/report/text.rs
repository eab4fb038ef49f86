//! Plan and conversion as text: the verdict and the next command first, then warnings, then the
//! rest. Inspection: [`super::look`].

use std::collections::BTreeMap;

use crate::boot_path::BootPath;
use crate::domain::Emit;
use crate::fix::journal::ActionState;
use crate::inspect::Severity;
use crate::plan::model::{Handover, Method, Plan};
use crate::types::DiskBus;
use crate::ui::{Styled, Tone, bytes, count};

use super::Report;
use crate::check::{Check, CheckState};

/// The display of a controller that is needed and not ready.
pub const FAULT: (Tone, &str) = (Tone::Bad, "NOT READY");

/// Appends one row per controller. Those that are not `used` are never shown as a fault.
pub fn controllers(
    text: &mut Styled,
    map: &BTreeMap<DiskBus, BootPath>,
    used: &[DiskBus],
    missing: (Tone, &str),
) {
    for (controller, path) in map {
        let is_used = used.contains(controller);
        let (tone, word) = match (path.ready, is_used) {
            (true, _) => (Tone::Good, "ready"),
            (false, true) => missing,
            (false, false) => (Tone::Faint, "not used"),
        };
        text.push(Tone::Plain, format!("  {:<12} ", controller.name()));
        text.push(tone, format!("{word:<9}"));
        text.push(Tone::Plain, " ");
        text.hang();
        if path.ready || is_used {
            text.push(Tone::Plain, path.reason.as_str());
        }
        text.push(Tone::Plain, "\n");
    }
}

/// Appends the failed checks, then the number of passed ones; each of those with `verbose`.
pub fn checks(text: &mut Styled, checks: &[Check], verbose: bool) {
    let (passed, others): (Vec<_>, Vec<_>) = checks.iter().partition(|c| c.ok);
    for check in &others {
        let (tone, mark) = match (check.state, check.severity) {
            (CheckState::CouldNotRun, _) => (Tone::Warn, "?"),
            (_, Severity::Blocker) => (Tone::Bad, "FAULT"),
            _ => (Tone::Warn, "warning"),
        };
        check_row(text, tone, mark, check);
    }
    if verbose {
        for check in &passed {
            check_row(text, Tone::Good, "ok", check);
        }
    } else if !passed.is_empty() {
        text.push(Tone::Good, "  ok      ");
        let passed = count(passed.len(), "check");
        text.push(Tone::Plain, format!(" {passed} passed (-v lists them)\n"));
    }
}

fn check_row(text: &mut Styled, tone: Tone, mark: &str, check: &Check) {
    text.push(tone, format!("  {mark:<8}"));
    text.push(Tone::Plain, " ");
    text.hang();
    text.push(Tone::Plain, format!("[{}] {}\n", check.id, check.message));
}

/// Appends a heading with one warning per entry.
pub fn warnings(text: &mut Styled, warnings: &[String]) {
    if warnings.is_empty() {
        return;
    }
    text.push(Tone::Warn, "\nWarnings\n");
    for warning in warnings {
        text.push(Tone::Plain, "  - ");
        text.hang();
        text.push(Tone::Plain, format!("{warning}\n"));
    }
}

/// Appends commands to copy, and comments between them.
pub fn next<'c>(text: &mut Styled, commands: impl IntoIterator<Item = &'c String>) {
    for (i, command) in commands.into_iter().enumerate() {
        if i == 0 {
            text.push(Tone::Strong, "\nNext\n");
        }
        text.push(Tone::Plain, "  ");
        let tone = match command.starts_with('#') {
            true => Tone::Faint,
            false => Tone::Code,
        };
        text.push(tone, command.as_str());
        text.push(Tone::Plain, "\n");
    }
}

/// Renders `plan` for people. `carry_out` is the command that carries out the plan.
pub fn plan(plan: &Plan, carry_out: Option<String>) -> Styled {
    match &plan.linux {
        Some(handover) => for_linux(plan, handover),
        None => for_windows(plan, carry_out),
    }
}

fn for_linux(plan: &Plan, handover: &Handover) -> Styled {
    let method = match handover.method {
        Method::VirtV2vInPlace => "virt-v2v-in-place converts the guest",
        Method::VirtV2v => "virt-v2v converts the guest",
        Method::AsIs => "the guest is copied unchanged",
    };
    let mut text = Styled::default();
    text.push(Tone::Strong, format!("Linux: {method}"));
    text.push(Tone::Plain, format!(" ({})\n", handover.why));
    warnings(&mut text, &plan.warnings);
    if !handover.steps.is_empty() {
        text.push(Tone::Strong, "\nActions\n");
    }
    for step in &handover.steps {
        text.push(Tone::Plain, format!("  {:<22} ", step.id));
        text.hang();
        text.push(Tone::Plain, format!("{}\n", step.description));
    }
    text
}

fn for_windows(plan: &Plan, carry_out: Option<String>) -> Styled {
    let mut text = Styled::default();
    plan_verdict(&mut text, plan);
    if plan.blockers.is_empty() {
        next(&mut text, &carry_out);
    }
    warnings(&mut text, &plan.warnings);
    if !plan.drivers.is_empty() {
        text.push(Tone::Strong, "\nDrivers\n");
    }
    let width = plan.drivers.iter().map(|d| d.folder.len()).max();
    let width = width.unwrap_or_default();
    for d in &plan.drivers {
        let (driver, version, folder) = (&d.driver, &d.version, &d.folder);
        let row = format!("  {driver:<10} {version:<17} {folder:<width$} ");
        text.push(Tone::Plain, row);
        text.hang();
        let signer = d.signer.as_ref().map(|s| format!(", signed by {s}"));
        let signer = signer.unwrap_or_default();
        text.push(Tone::Plain, format!("{}{signer}\n", d.placement));
    }
    if plan.actions.is_empty() && plan.blockers.is_empty() {
        text.push(Tone::Plain, "\nNothing to change in the guest.\n");
    } else if !plan.actions.is_empty() {
        text.push(Tone::Strong, "\nActions\n");
    }
    for action in &plan.actions {
        row(&mut text, action.id(), &action.describe());
    }
    for skipped in &plan.skipped {
        let what = format!("already done: {}", skipped.title);
        row(&mut text, &skipped.id, &what);
    }
    text
}

fn plan_verdict(text: &mut Styled, plan: &Plan) {
    let (tone, verdict) = if !plan.blockers.is_empty() {
        let blockers = count(plan.blockers.len(), "blocker");
        (Tone::Bad, format!("NOT READY to convert: {blockers}"))
    } else if !plan.accepted.is_empty() {
        let accepted = plan.accepted.join(", ");
        (Tone::Bad, format!("NOT READY: accepted {accepted}"))
    } else {
        let actions = count(plan.actions.len(), "action");
        (Tone::Good, format!("READY to convert: {actions}"))
    };
    text.push(tone, verdict);
    text.push(Tone::Plain, "\n");
}

fn row(text: &mut Styled, label: &str, what: &str) {
    text.push(Tone::Plain, format!("  {label:<16} "));
    text.hang();
    text.push(Tone::Plain, format!("{what}\n"));
}

/// The end of `convert` for people.
pub fn conversion(r: &Report, verbose: bool) -> Styled {
    let mut text = Styled::default();
    let (tone, verdict) = match r.ready {
        true => (Tone::Good, "READY"),
        false => (Tone::Bad, "NOT READY"),
    };
    text.push(tone, verdict);
    text.push(
        Tone::Plain,
        format!(
            ": {} written of {} in {:.1} s\n",
            bytes(r.bytes.written),
            bytes(r.bytes.virtual_size),
            r.timings.total_s,
        ),
    );
    if let Some(met) = last_pass(r) {
        text.push(Tone::Faint, format!("  {:<10} ", "last pass"));
        text.hang();
        text.push(Tone::Plain, format!("{met}\n"));
    }
    outputs(&mut text, r);
    next(&mut text, &r.next_commands);
    if verbose || r.checks.iter().any(|c| !c.ok) {
        text.push(Tone::Strong, "\nChecks of the finished disk\n");
        checks(&mut text, &r.checks, verbose);
    }
    warnings(&mut text, &r.warnings);
    if verbose {
        text.push(Tone::Strong, "\nBoot path, read back from the disk\n");
        controllers(&mut text, &r.controllers, &r.boots_from, FAULT);
        actions(&mut text, r);
        let t = &r.timings;
        let times = format!(
            "\ninspect {:.2} s, fix {:.2} s, copy {:.2} s, total {:.2} s\n",
            t.inspect_s, t.fix_s, t.copy_s, t.total_s
        );
        text.push(Tone::Faint, times);
    }
    text
}

/// The duration of the last pass of a sync, and the expected one.
pub(super) fn last_pass(r: &Report) -> Option<String> {
    let sync = r.sync.as_ref()?;
    let last = &sync["last"];
    let seconds = last["seconds"].as_f64()?;
    let copied = bytes(last["copied"].as_u64()?);
    let expected = last["projected_s"].as_f64()?;
    let kept = match sync["within_budget"].as_bool() {
        Some(true) => "the budget was",
        Some(false) => "too long for the budget of",
        None => "",
    };
    let budget = sync["budget_s"]
        .as_u64()
        .map_or(String::new(), |budget| format!("; {kept} {budget} s"));
    Some(format!(
        "{copied} copied, {seconds:.1} s in all, {expected:.1} s expected{budget}"
    ))
}

fn output_file(text: &mut Styled, label: &str, path: &std::path::Path) {
    text.push(Tone::Faint, format!("  {label:<10} "));
    text.push(Tone::Code, path.display().to_string());
    text.push(Tone::Plain, "\n");
}

fn outputs(text: &mut Styled, r: &Report) {
    for disk in &r.outputs.disks {
        output_file(text, "disk", disk);
    }
    if !r.outputs.complete {
        text.push(Tone::Warn, format!("  {:<10} ", "left"));
        let left = bytes(r.bytes.left);
        text.push(Tone::Plain, format!("{left} on the source\n"));
    }
    let mut file = |label: &str, path: &std::path::Path| output_file(text, label, path);
    for (label, path) in [
        ("bootstrap", &r.outputs.bootstrap_xml),
        ("final", &r.outputs.final_xml),
    ] {
        path.iter().for_each(|path| file(label, path));
    }
    for path in &r.outputs.emitted {
        let target = Emit::of_file(path).map_or("emitted", |(emit, _)| emit.target());
        file(target, path);
    }
    if let Some(folder) = r.outputs.folder() {
        file("report", &folder.join("report.html"));
    }
    let ready = |c: &&DiskBus| r.controllers.get(c).is_some_and(|p| p.ready);
    let starts: Vec<&str> = r
        .boots_from
        .iter()
        .filter(ready)
        .map(|c| c.name())
        .collect();
    if !starts.is_empty() {
        text.push(Tone::Faint, format!("  {:<10} ", "starts on"));
        text.push(Tone::Plain, format!("{}\n", starts.join(", ")));
    }
}

fn actions(text: &mut Styled, r: &Report) {
    if !r.actions.is_empty() {
        text.push(Tone::Strong, "\nActions\n");
    }
    for action in &r.actions {
        let (tone, state) = match action.state {
            ActionState::Done => (Tone::Good, "done"),
            ActionState::Skipped => (Tone::Faint, "already"),
            ActionState::Planned => (Tone::Plain, "planned"),
            ActionState::InProgress => (Tone::Warn, "started"),
        };
        text.push(tone, format!("  {state:<8} "));
        text.hang();
        let what = format!("{}: {}\n", action.id, action.description);
        text.push(Tone::Plain, what);
    }
}
