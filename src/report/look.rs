//! `inspect` for people: the verdict, the reason, and then the details; or one line per VM.

use std::fmt::Write as _;

use serde::Serialize;

use crate::inspect::{Inspection, OsFamily, PartitionFacts, Severity};
use crate::types::DiskBus;
use crate::ui::{self, Styled, Tone, bytes};

use super::linux;
use super::text;
use crate::text::lower;

/// The consequence of the inspection for a conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Starts on VirtIO without changes.
    Ready,
    Convertible,
    /// A finding prevents the conversion.
    Blocked,
    /// Another operating system, or none.
    NotWindows,
    /// Could not be inspected.
    Error,
}

impl Verdict {
    pub fn of(i: &Inspection) -> Self {
        let ready = |c| i.controllers.get(&c).is_some_and(|p| p.ready);
        if i.os.family != OsFamily::Windows && i.linux.is_none() {
            Self::NotWindows
        } else if i.findings.iter().any(|f| f.severity == Severity::Blocker) {
            Self::Blocked
        } else if ready(DiskBus::VirtioBlk) && ready(DiskBus::VirtioScsi) {
            Self::Ready
        } else {
            Self::Convertible
        }
    }

    fn tone(self) -> Tone {
        match self {
            Self::Ready | Self::Convertible => Tone::Good,
            Self::Blocked | Self::Error => Tone::Bad,
            Self::NotWindows => Tone::Warn,
        }
    }

    fn sentence(self) -> &'static str {
        match self {
            Self::Ready => "starts on VirtIO unchanged",
            Self::Convertible => "can be converted",
            Self::Blocked => "cannot be converted in its present state: see the remedies",
            Self::NotWindows => "not a Windows that could be found",
            Self::Error => "could not be inspected",
        }
    }
}

/// The numbers of findings: blockers, warnings, remarks.
pub fn count(i: &Inspection) -> [usize; 3] {
    [Severity::Blocker, Severity::Warning, Severity::Info]
        .map(|severity| i.findings.iter().filter(|f| f.severity == severity).count())
}

/// The controllers of the VM after a conversion with default options.
pub fn used(i: &Inspection) -> Vec<DiskBus> {
    match &i.windows {
        // There is no vioscsi for Windows XP and 2003.
        Some(windows) if windows.target.major < 6 => vec![DiskBus::Ide, DiskBus::VirtioBlk],
        _ => vec![DiskBus::Sata, DiskBus::VirtioBlk, DiskBus::VirtioScsi],
    }
}

/// Describes one VM, the most important facts first. `next` is the command for one that can be
/// converted.
pub fn inspection(i: &Inspection, next: Option<String>) -> Styled {
    let mut text = Styled::default();
    let verdict = Verdict::of(i);
    text.push(Tone::Strong, os_line(i));
    text.push(Tone::Plain, "\n");
    text.push(verdict.tone(), verdict.sentence());
    let [blockers, warnings, _] = count(i);
    for (n, word) in [(blockers, "blocker"), (warnings, "warning")] {
        if n > 0 {
            text.push(Tone::Plain, format!(", {}", ui::count(n, word)));
        }
    }
    text.push(Tone::Plain, "\n");
    let convertible = matches!(verdict, Verdict::Ready | Verdict::Convertible);
    text::next(&mut text, next.iter().filter(|_| convertible));
    findings(&mut text, i);
    if !i.controllers.is_empty() {
        text.push(Tone::Strong, "\nWould it start unchanged?");
        let mut missing = text::FAULT;
        if verdict == Verdict::Convertible {
            missing = (Tone::Warn, "not yet");
            text.push(Tone::Plain, " Not yet: convert fixes these.");
        }
        text.push(Tone::Plain, "\n");
        text::controllers(&mut text, &i.controllers, &used(i), missing);
    }
    text.push(Tone::Strong, "\nDetails\n");
    details(&mut text, i);
    text
}

fn findings(text: &mut Styled, i: &Inspection) {
    let mut sorted: Vec<_> = i.findings.iter().collect();
    sorted.sort_by_key(|f| std::cmp::Reverse(f.severity));
    if !sorted.is_empty() {
        text.push(Tone::Strong, "\nFindings\n");
    }
    for f in sorted {
        let tone = match f.severity {
            Severity::Blocker => Tone::Bad,
            Severity::Warning => Tone::Warn,
            Severity::Info => Tone::Faint,
        };
        text.push(tone, format!("  {:<8}", lower(&f.severity)));
        text.push(Tone::Plain, " ");
        text.hang();
        text.push(Tone::Plain, format!("[{}] {}\n", f.id, f.message));
        if f.severity > Severity::Info && !f.remedy.is_empty() {
            text.push(Tone::Plain, "           remedy: ");
            text.hang();
            text.push(Tone::Plain, format!("{}\n", f.remedy));
        }
    }
}

fn details(text: &mut Styled, i: &Inspection) {
    about_the_system(text, i);
    about_the_guest(text, i);
    about_the_volumes(text, i);
}

fn about_the_system(text: &mut Styled, i: &Inspection) {
    let mut row = |label: &str, value: String| text.row(label, value);
    let source = &i.source;
    row(
        "source",
        format!(
            "{} ({}, {})",
            source.path,
            source.format,
            bytes(source.virtual_size_bytes)
        ),
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
        row("drivers for", i.os.driver_folders.join(", "));
    }
    for (name, hive) in [
        ("SYSTEM", &i.hives.system),
        ("SOFTWARE", &i.hives.software),
        ("DRIVERS", &i.hives.drivers),
    ] {
        let Some(hive) = hive else { continue };
        let state = if hive.dirty {
            let entries = ui::count(hive.log_entries_replayable, "log entry");
            format!("dirty, {entries} can be replayed")
        } else {
            "clean".to_string()
        };
        row(&format!("hive {name}"), state);
    }
}

/// Appends the guest's properties that matter to a conversion.
fn about_the_guest(text: &mut Styled, i: &Inspection) {
    let mut row = |label: &str, value: String| text.row(label, value);
    let number = |n: Option<u32>| n.map_or("-".to_string(), |n| n.to_string());
    for service in &i.drivers.virtio {
        let image = if service.image_present {
            "present"
        } else {
            "missing"
        };
        row(
            "driver",
            format!(
                "{:<10} start {} override {} image {image}",
                service.service,
                number(service.start),
                number(service.start_override),
            ),
        );
    }
    for adapter in &i.network.adapters {
        let addresses: Vec<_> = adapter.addresses.iter().map(ToString::to_string).collect();
        let addresses = if adapter.dhcp {
            "dhcp".to_string()
        } else {
            addresses.join(", ")
        };
        row(
            "adapter",
            format!(
                "{} {} {addresses}",
                adapter.name.as_deref().unwrap_or("?"),
                adapter.mac.as_deref().unwrap_or("(no MAC)"),
            ),
        );
    }
    if !i.hypervisor_tools.is_empty() {
        row("tools", i.hypervisor_tools.join(", "));
    }
}

fn about_the_volumes(text: &mut Styled, i: &Inspection) {
    let mut row = |label: &str, value: String| text.row(label, value);
    let label = |p: &PartitionFacts| p.label.clone().or(p.name.clone()).unwrap_or_default();
    let kind = |p: &PartitionFacts| match p.state.as_ref().and_then(|s| s.container) {
        Some(container) => format!("{} in {}", lower(&p.filesystem), lower(&container)),
        None => lower(&p.filesystem),
    };
    for disk in &i.disks {
        for p in &disk.partitions {
            let (size, start) = (bytes(p.size_bytes), bytes(p.start_bytes));
            row(
                &format!("partition {}", p.index),
                format!("{size:>10} at {start:>9}  {:<8} {}", kind(p), label(p)),
            );
        }
        for p in &disk.volumes {
            let size = bytes(p.size_bytes);
            row(
                &format!("volume {}", p.index),
                format!("{size:>10}  {:<8} {}", kind(p), label(p)),
            );
        }
    }
}

fn os_line(i: &Inspection) -> String {
    let os = &i.os;
    let mut parts = vec![product(i)];
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

/// The name of Windows, e.g. `Windows Server 2022 Standard 21H2`.
fn product(i: &Inspection) -> String {
    let Some(name) = i.os.product_name.clone() else {
        return match i.os.family {
            OsFamily::Windows => "Windows".to_string(),
            OsFamily::Linux => "Linux".to_string(),
            OsFamily::Unknown => "no operating system found".to_string(),
        };
    };
    match &i.os.display_version {
        Some(version) => format!("{name} {version}"),
        None => name,
    }
}

/// One line of a table of VMs.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub name: String,
    pub source: String,
    pub verdict: Verdict,
    pub windows: Option<String>,
    pub build: Option<u32>,
    pub arch: Option<String>,
    pub firmware: Option<String>,
    /// The controllers on which it would start without changes.
    pub ready: Vec<&'static str>,
    pub blockers: usize,
    pub warnings: usize,
    /// The reason why it could not be inspected.
    pub error: Option<String>,
    pub inspection: Option<Inspection>,
}

impl Row {
    pub fn new(name: String, source: String, inspection: Inspection) -> Self {
        let i = inspection;
        let [blockers, warnings, _] = count(&i);
        let ready = i.controllers.iter().filter(|(_, path)| path.ready);
        Self {
            name,
            source,
            verdict: Verdict::of(&i),
            windows: Some(product(&i)),
            build: i.os.build,
            arch: i.os.arch.map(|a| lower(&a)),
            firmware: i.firmware.map(|f| lower(&f)),
            ready: ready.map(|(c, _)| c.name()).collect(),
            blockers,
            warnings,
            error: None,
            inspection: Some(i),
        }
    }

    pub fn failed(name: String, source: String, error: String) -> Self {
        Self {
            name,
            source,
            verdict: Verdict::Error,
            windows: None,
            build: None,
            arch: None,
            firmware: None,
            ready: Vec::new(),
            blockers: 0,
            warnings: 0,
            error: Some(error),
            inspection: None,
        }
    }

    fn cells(&self) -> [String; 8] {
        let findings = match (self.error.as_ref(), self.blockers, self.warnings) {
            (Some(_), ..) => String::new(),
            (_, 0, 0) => "-".to_string(),
            (_, 0, w) => format!("{w} warn"),
            (_, b, 0) => format!("{b} block"),
            (_, b, w) => format!("{b} block, {w} warn"),
        };
        let ready = match (&self.error, self.ready.as_slice()) {
            (Some(_), _) => String::new(),
            (None, []) => "-".to_string(),
            (None, ready) => ready.join(" "),
        };
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        [
            self.name.clone(),
            lower(&self.verdict),
            // An error may be long, so it is printed below the table.
            text(&self.windows),
            self.build.map_or(String::new(), |b| b.to_string()),
            text(&self.arch),
            text(&self.firmware),
            ready,
            findings,
        ]
    }
}

const HEAD: [&str; 8] = [
    "MACHINE",
    "VERDICT",
    "SYSTEM",
    "BUILD",
    "ARCH",
    "FIRMWARE",
    "STARTS ON",
    "FINDINGS",
];

/// Renders one line per VM, in the given order, and notes about those that need them.
pub fn table(rows: &[Row]) -> Styled {
    let mut cells: Vec<[String; 8]> = rows.iter().map(Row::cells).collect();
    // Two VMs with one name are distinguished by their paths.
    for (i, row) in rows.iter().enumerate() {
        if rows
            .iter()
            .enumerate()
            .any(|(j, r)| i != j && r.name == row.name)
        {
            cells[i][0].clone_from(&row.source);
        }
    }
    let widths: [usize; 8] = std::array::from_fn(|column| {
        let longest = cells.iter().map(|row| row[column].chars().count()).max();
        longest.unwrap_or(0).max(HEAD[column].len())
    });
    let mut text = Styled::default();
    let mut line = |cells: &[String; 8], verdict: Tone, rest: Tone| {
        let last = cells.iter().rposition(|c| !c.is_empty()).unwrap_or(0);
        for (column, (cell, width)) in cells.iter().zip(widths).enumerate().take(last + 1) {
            let tone = if column == 1 { verdict } else { rest };
            let width = if column == last { 0 } else { width + 2 };
            text.push(tone, format!("{cell:<width$}"));
        }
        text.push(Tone::Plain, "\n");
    };
    line(&HEAD.map(str::to_string), Tone::Strong, Tone::Strong);
    for (row, cells) in rows.iter().zip(&cells) {
        line(cells, row.verdict.tone(), Tone::Plain);
    }
    let mut notes = Styled::default();
    for row in rows {
        if let Some(error) = &row.error {
            notes.push(Tone::Bad, format!("{}: ", row.name));
            notes.push(Tone::Plain, format!("{error}\n"));
        }
        let findings = row.inspection.iter().flat_map(|i| &i.findings);
        for f in findings.filter(|f| f.severity == Severity::Blocker) {
            notes.push(Tone::Bad, format!("{}: ", row.name));
            notes.push(Tone::Plain, format!("[{}] {}\n", f.id, f.message));
            notes.push(Tone::Plain, "  remedy: ");
            notes.hang();
            notes.push(Tone::Plain, format!("{}\n", f.remedy));
        }
    }
    if !notes.0.is_empty() {
        text.push(Tone::Plain, "\n");
        text.0.extend(notes.0);
    }
    let mut sum = String::new();
    for verdict in [
        Verdict::Ready,
        Verdict::Convertible,
        Verdict::Blocked,
        Verdict::NotWindows,
        Verdict::Error,
    ] {
        let n = rows.iter().filter(|r| r.verdict == verdict).count();
        if n > 0 {
            let comma = if sum.is_empty() { "" } else { ", " };
            let _ = write!(sum, "{comma}{n} {}", lower(&verdict));
        }
    }
    text.push(Tone::Strong, format!("\n{sum}"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [
            Row::failed("a".into(), "/a".into(), "no such disk".into()),
            Row {
                windows: Some("Windows 10 Pro 22H2".into()),
                build: Some(19045),
                ready: vec!["sata"],
                warnings: 2,
                error: None,
                verdict: Verdict::Convertible,
                ..Row::failed("a-long-name".into(), "/b".into(), String::new())
            },
        ];
        let text = table(&rows);
        let plain = text.plain();
        let lines: Vec<&str> = plain.lines().collect();
        for (line, column, cell) in [
            (1, "MACHINE", "a "),
            (1, "VERDICT", "error"),
            (2, "VERDICT", "convertible "),
            (2, "SYSTEM", "Windows 10 Pro 22H2 "),
            (2, "BUILD", "19045 "),
            (2, "STARTS ON", "sata "),
            (2, "FINDINGS", "2 warn"),
        ] {
            let at = lines[0].find(column).unwrap();
            assert!(lines[line][at..].starts_with(cell), "{column}\n{plain}");
        }
        assert!(plain.contains("\na: no such disk\n"), "{plain}");
        assert!(plain.ends_with("\n1 convertible, 1 error"), "{plain}");
        let bad = (Tone::Bad, "error".to_string());
        assert!(text.0.contains(&bad), "{text:?}");
        assert!(lines.iter().all(|l| l.trim_end() == *l), "{plain}");
        let mut twice = rows.clone();
        twice[0].name = "a-long-name".into();
        let plain = table(&twice).plain();
        assert!(
            plain.contains("\n/a ") && plain.contains("\n/b "),
            "{plain}"
        );
    }
}
