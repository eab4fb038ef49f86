//! The report as text: most important first, aligned.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::boot_path::{BootPath, Controller};
use crate::fix::journal::ActionState;
use crate::inspect::{Inspection, OsFamily, PartitionFacts, Severity};
use crate::plan::model::Plan;
use crate::ui::bytes;

use super::{Report, linux};

/// `inspect` for people.
pub fn inspection(i: &Inspection) -> String {
    let mut text = String::new();
    let mut row = |label: &str, value: String| {
        let _ = writeln!(text, "{label:<14} {value}");
    };
    row(
        "source",
        format!(
            "{} ({}, {})",
            i.source.path,
            i.source.format,
            bytes(i.source.virtual_size_bytes)
        ),
    );
    row(
        if i.os.family == OsFamily::Linux {
            "linux"
        } else {
            "windows"
        },
        os_line(i),
    );
    for (label, value) in i.linux.iter().flat_map(linux::rows) {
        row(label, value);
    }
    if let Some(firmware) = i.firmware {
        row("firmware", lower(&firmware));
    }
    if let (Some(root), Some(set)) = (&i.os.windows_root, &i.os.control_set) {
        row("root", format!("{root}, {set}"));
    }
    if !i.os.driver_folders.is_empty() {
        row("driver folders", i.os.driver_folders.join(", "));
    }
    for (name, hive) in [
        ("SYSTEM", &i.hives.system),
        ("SOFTWARE", &i.hives.software),
        ("DRIVERS", &i.hives.drivers),
    ] {
        if let Some(hive) = hive {
            let state = if hive.dirty {
                format!(
                    "dirty, {} log entries replayable",
                    hive.log_entries_replayable
                )
            } else {
                "clean".to_string()
            };
            row(&format!("hive {name}"), state);
        }
    }
    for service in &i.drivers.virtio {
        row(
            "driver",
            format!(
                "{} start={} override={} image {}",
                service.service,
                service.start.map_or("-".into(), |s| s.to_string()),
                service.start_override.map_or("-".into(), |s| s.to_string()),
                if service.image_present {
                    "present"
                } else {
                    "missing"
                }
            ),
        );
    }
    for adapter in &i.network.adapters {
        let addresses: Vec<_> = adapter.addresses.iter().map(ToString::to_string).collect();
        row(
            "adapter",
            format!(
                "{} {} {}",
                adapter.name.as_deref().unwrap_or("?"),
                adapter.mac.as_deref().unwrap_or("(no MAC)"),
                if adapter.dhcp {
                    "dhcp".to_string()
                } else {
                    addresses.join(", ")
                }
            ),
        );
    }
    if !i.hypervisor_tools.is_empty() {
        row("tools", i.hypervisor_tools.join(", "));
    }
    for disk in &i.disks {
        let label = |p: &PartitionFacts| p.label.clone().or(p.name.clone()).unwrap_or_default();
        let kind = |p: &PartitionFacts| match p.state.as_ref().and_then(|s| s.container) {
            Some(container) => format!("{} in {}", lower(&p.filesystem), lower(&container)),
            None => lower(&p.filesystem),
        };
        for p in &disk.partitions {
            row(
                &format!("partition {}", p.index),
                format!(
                    "{:>10} at {:>12}  {:<8} {}",
                    bytes(p.size_bytes),
                    p.start_bytes,
                    kind(p),
                    label(p)
                ),
            );
        }
        for p in &disk.volumes {
            row(
                &format!("volume {}", p.index),
                format!("{:>10}  {:<8} {}", bytes(p.size_bytes), kind(p), label(p)),
            );
        }
    }
    if !i.controllers.is_empty() {
        let _ = writeln!(text, "\nWould it start as it is?");
        text.push_str(&controllers(&i.controllers));
    }
    text.push_str(&findings(i));
    text.trim_end().to_string()
}

fn os_line(i: &Inspection) -> String {
    let os = &i.os;
    let mut parts: Vec<String> = Vec::new();
    parts.push(
        os.product_name
            .clone()
            .unwrap_or_else(|| format!("none ({})", lower(&os.family))),
    );
    parts.extend(os.display_version.clone());
    if let Some(build) = os.build {
        let revision = os.revision.map_or(String::new(), |r| format!(".{r}"));
        parts.push(format!("build {build}{revision}"));
    }
    if let Some(arch) = os.arch {
        parts.push(lower(&arch));
    }
    if let Some(host) = &os.hostname {
        parts.push(format!("\"{host}\""));
    }
    parts.join(" ")
}

/// The JSON name of a unit variant, so that text and JSON never differ.
fn lower<T: serde::Serialize>(value: &T) -> String {
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

fn findings(i: &Inspection) -> String {
    let mut sorted: Vec<_> = i.findings.iter().collect();
    sorted.sort_by_key(|f| std::cmp::Reverse(f.severity));
    let mut text = String::new();
    if !sorted.is_empty() {
        text.push_str("\nFindings\n");
    }
    for f in sorted {
        let _ = writeln!(text, "  {:<8} [{}] {}", lower(&f.severity), f.id, f.message);
        if f.severity > Severity::Info && !f.remedy.is_empty() {
            let _ = writeln!(text, "           remedy: {}", f.remedy);
        }
    }
    text
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
    for (label, xml) in [
        ("bootstrap", &r.outputs.bootstrap_xml),
        ("final", &r.outputs.final_xml),
    ] {
        if let Some(xml) = xml {
            let _ = writeln!(text, "  {label:<10} {}", xml.display());
        }
    }
    for file in &r.outputs.emitted {
        let _ = writeln!(text, "  other      {}", file.display());
    }
    if !r.next_commands.is_empty() {
        text.push_str("\nNext\n");
        for command in &r.next_commands {
            let _ = writeln!(text, "  {command}");
        }
    }
    text.trim_end().to_string()
}
