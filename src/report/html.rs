//! `report.html`: the report as one self-contained page, without scripts or external resources; all
//! text that may be from a guest is escaped.
//!
//! The boot path is drawn as chains of boxes made of list items. Before and after are side by side,
//! or below each other on a narrow screen. They can be printed, and screen readers read them in
//! order. Collapsed parts are printed in full.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use crate::actions::{Action, CopyFiles, CopyInGuest, EditHive, PatchBootSector};
use crate::boot_path::{BootPath, Step};
use crate::inspect::Severity;
use crate::plan::model::Plan;
use crate::registry::{RegData, RegOp};
use crate::types::DiskBus;
use crate::ui::{bytes, count};

use super::Report;
use super::page::{escape, head, link, now};
use crate::check::{Check, CheckState};
use crate::text::lower;

const STYLE: &str = "\
body{max-width:64rem}\
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}.pair p{margin:.5rem 0 .2rem}\
.chain{display:flex;flex-direction:column;align-items:flex-start;list-style:none;padding:0;margin:0}\
.chain li{border:1px solid;border-radius:.4rem;padding:.1rem .5rem;font-size:.875rem;max-width:100%;\
box-sizing:border-box}\
.chain li.ok{background:var(--okbg)}.chain li.bad{background:var(--badbg);font-weight:600}\
.chain li.to,.chain li.or{border:0;line-height:1;padding:0 1rem}\
.use{border:1px solid;border-radius:.4rem;padding:0 .4rem;font-size:.875rem;background:var(--okbg)}\
.verdict{font-size:1.25rem;margin:0}\
.time{display:flex;height:1.4rem;border:1px solid var(--line);border-radius:.3rem;overflow:hidden}\
.time span{min-width:2px}.t0{background:#4c78a8}.t1{background:#f58518}.t2{background:#54a24b}\
.t3{background:#9d9d9d}\
.key{display:inline-block;width:.8rem;height:.8rem;margin:0 .3rem 0 1rem}\
.facts td:first-child{width:9rem;color:color-mix(in srgb,currentColor 70%,transparent)}\
@media(max-width:40rem){body{margin:1rem auto}.pair{display:block}table,tbody,tr,td{display:block}\
tr{border-bottom:1px solid var(--line);padding:.2rem 0}td,.facts td:first-child{border:0;padding:.1rem .3rem;width:auto}\
tr:has(th){display:none}}\
@media print{body{margin:0;max-width:none}details::details-content{content-visibility:visible;\
display:block;block-size:auto}tr,.chain{break-inside:avoid}}";

/// Further contents of the page: facts about the new VM, and the files beside the page.
#[derive(Debug, Default)]
pub struct Extras {
    /// Label and value.
    pub machine: Vec<(&'static str, String)>,
    /// The controllers that the domain XML uses, with their purposes.
    pub in_use: Vec<(DiskBus, &'static str)>,
    /// Names of files and directories beside the page.
    pub beside: Vec<String>,
}

pub fn page(r: &Report, plan: &Plan, extras: &Extras) -> String {
    let mut h = head(&format!("{}: hyper2kvm report", r.name), STYLE);
    let _ = writeln!(h, "<h1>{}</h1>", escape(&r.name));
    summary(&mut h, r);
    next(&mut h, r);
    warnings(&mut h, r);
    machine(&mut h, r, extras);
    drivers(&mut h, plan);
    boot_path(&mut h, r, &extras.in_use);
    findings(&mut h, r);
    changes(&mut h, r, plan);
    checks(&mut h, r);
    trim(&mut h, r);
    timeline(&mut h, r);
    files(&mut h, r, extras);
    h.push_str("</body></html>\n");
    h
}

fn summary(h: &mut String, r: &Report) {
    let (class, verdict) = if r.ready {
        ("ok", "READY: read back from the converted disk")
    } else {
        ("bad", "NOT READY")
    };
    let _ = writeln!(
        h,
        "<p class=\"verdict {class}\"><strong>{verdict}</strong></p>"
    );
    let os = &r.inspection.os;
    let product = os.product_name.as_deref().unwrap_or("unknown system");
    let mut guest = product.to_string();
    if let Some(version) = &os.display_version {
        let _ = write!(guest, " {version}");
    }
    if let Some(build) = os.build {
        let _ = write!(guest, ", build {build}");
    }
    if let Some(arch) = os.arch {
        let _ = write!(guest, ", {}", lower(&arch));
    }
    let made = format!(
        "{}, in {:.1} s, by hyper2kvm {} ({} engine)",
        now(),
        r.timings.total_s,
        env!("CARGO_PKG_VERSION"),
        r.engine
    );
    let mut rows = vec![
        row("converted", &made),
        row("guest", &guest),
        row("host name", os.hostname.as_deref().unwrap_or("not set")),
        row("source", &r.inspection.source.path),
    ];
    if let Some(met) = super::text::last_pass(r) {
        rows.push(row("last pass of the sync", &met));
    }
    if !r.outputs.complete {
        rows.push(row("not copied yet", &bytes(r.bytes.left)));
    }
    let _ = writeln!(h, "<table class=\"facts\">{}</table>", rows.concat());
}

/// Renders the new VM, and the network settings of Windows.
fn machine(h: &mut String, r: &Report, extras: &Extras) {
    let adapters = &r.inspection.network.adapters;
    if extras.machine.is_empty() && adapters.is_empty() {
        return;
    }
    h.push_str("<h2>VM</h2>\n<table class=\"facts\">");
    for (label, value) in &extras.machine {
        h.push_str(&row(label, value));
    }
    for adapter in adapters {
        let list = |items: &[String]| items.join(", ");
        let text =
            |items: &[std::net::IpAddr]| items.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut value = adapter.name.clone().unwrap_or("adapter".to_string());
        if let Some(mac) = &adapter.mac {
            let _ = write!(value, ", {mac}");
        }
        let addresses: Vec<String> = adapter.addresses.iter().map(ToString::to_string).collect();
        match adapter.dhcp {
            true => value.push_str(", DHCP"),
            false => {
                let _ = write!(value, ", {}", list(&addresses));
            }
        }
        for (name, items) in [("gateway", &adapter.gateways), ("DNS", &adapter.dns)] {
            if !items.is_empty() {
                let _ = write!(value, "; {name} {}", list(&text(items)));
            }
        }
        h.push_str(&row("adapter in Windows", &value));
    }
    h.push_str("</table>\n");
}

/// Renders the drivers and their signers.
fn drivers(h: &mut String, plan: &Plan) {
    if plan.drivers.is_empty() {
        return;
    }
    h.push_str(
        "<h2>virtio-win drivers</h2>\n<table><tr><th>driver</th><th>version</th><th>directory</th>\
         <th>how</th><th>signer</th></tr>\n",
    );
    for d in &plan.drivers {
        let (class, signer) = match &d.signer {
            Some(signer) => ("", signer.as_str()),
            None => ("warn", "not signed, or not in order: see the warnings"),
        };
        let _ = writeln!(
            h,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"{class}\">{}</td></tr>",
            escape(&d.driver),
            escape(&d.version),
            escape(&d.folder),
            d.placement,
            escape(signer)
        );
    }
    h.push_str("</table>\n");
}

/// Renders everything that the conversion wrote, with links.
fn files(h: &mut String, r: &Report, extras: &Extras) {
    h.push_str("<h2>Files</h2>\n<ul>\n");
    let folder = r.outputs.folder().unwrap_or(Path::new("/"));
    let mut item = |path: &Path, shown: &str| {
        let address = escape(&link(path, folder));
        let _ = writeln!(h, "<li><a href=\"{address}\">{}</a></li>", escape(shown));
    };
    let outputs = &r.outputs;
    let xml = [&outputs.bootstrap_xml, &outputs.final_xml];
    let files = outputs.disks.iter().chain(xml.into_iter().flatten());
    for path in files.chain(&outputs.emitted) {
        let below = path.strip_prefix(folder).unwrap_or(path);
        item(path, &below.display().to_string());
    }
    for name in &extras.beside {
        item(&folder.join(name), name);
    }
    h.push_str("</ul>\n");
}

fn row(label: &str, text: &str) -> String {
    format!(
        "<tr><td>{}</td><td><code>{}</code></td></tr>",
        escape(label),
        escape(text)
    )
}

fn warnings(h: &mut String, r: &Report) {
    if r.warnings.is_empty() {
        return;
    }
    h.push_str("<h2 class=\"warn\">Warnings</h2>\n<ul>\n");
    for warning in &r.warnings {
        let _ = writeln!(h, "<li>{}</li>", escape(warning));
    }
    h.push_str("</ul>\n");
}

/// Renders one chain per controller before and after, then the steps common to all of them.
/// Controllers of the VM are marked and open; the others are collapsed.
fn boot_path(h: &mut String, r: &Report, in_use: &[(DiskBus, &str)]) {
    if r.controllers.is_empty() {
        return;
    }
    h.push_str(
        "<h2>Boot path</h2>\n<p>The controllers of this conversion have to be ready. The others are \
         alternatives, shown to compare.</p>\n",
    );
    let shared_after = shared(&r.controllers);
    let shared_before = shared(&r.controllers_before);
    for (controller, after) in &r.controllers {
        let used = in_use.iter().find(|(c, _)| c == controller);
        let (open, mark) = match used {
            Some((_, what)) => (" open", format!(" <span class=\"use\">{what}</span>")),
            None => ("", " (not used)".to_string()),
        };
        let _ = writeln!(
            h,
            "<details{open}><summary><strong>{}</strong>{mark}</summary>\n<div class=\"pair\">",
            controller.name()
        );
        if let Some(before) = r.controllers_before.get(controller) {
            chain(h, "before", before, shared_before);
        }
        chain(h, "after", after, shared_after);
        h.push_str("</div></details>\n");
    }
    let common: &[Step] = r
        .controllers
        .values()
        .next()
        .and_then(|p| p.steps.get(p.steps.len().saturating_sub(shared_after)..))
        .unwrap_or_default();
    if !common.is_empty() {
        h.push_str(
            "<details><summary>what every controller needs besides, after the fix</summary>\n",
        );
        steps(h, common);
        h.push_str("</details>\n");
    }
}

fn chain(h: &mut String, when: &str, path: &BootPath, shared: usize) {
    let (class, word) = if path.ready {
        ("ok", "ready")
    } else {
        ("bad", "not ready")
    };
    let _ = writeln!(
        h,
        "<div><p>{when}: <strong class=\"{class}\">{word}</strong></p>"
    );
    let own = path.steps.len().saturating_sub(shared);
    let (own, common) = path.steps.split_at(own);
    let mut list = own.to_vec();
    // A fault among the common steps is shown where it matters.
    list.extend(common.iter().filter(|s| !s.ok).cloned());
    let ok = common.iter().filter(|s| s.ok).count();
    if ok > 0 {
        list.push(Step {
            ok: true,
            text: format!("{ok} bus, disk and volume drivers and filters"),
        });
    }
    steps(h, &list);
    h.push_str("</div>\n");
}

fn steps(h: &mut String, steps: &[Step]) {
    h.push_str("<ol class=\"chain\">\n");
    for (i, step) in steps.iter().enumerate() {
        if i > 0 && is_alternative(&steps[..i], step) {
            h.push_str("<li class=\"or\">the same for the older form of the device:</li>\n");
        } else if i > 0 {
            h.push_str("<li class=\"to\" aria-hidden=\"true\">&darr;</li>\n");
        }
        let (class, mark) = if step.ok {
            ("ok", "&#10003;")
        } else {
            ("bad", "&#10007;")
        };
        let _ = writeln!(
            h,
            "<li class=\"{class}\">{mark} {}</li>",
            escape(&step.text)
        );
    }
    h.push_str("</ol>\n");
}

/// Whether a step checks a second id of the controller, as an alternative to the first. It does not
/// follow from the steps before.
fn is_alternative(before: &[Step], step: &Step) -> bool {
    let id = |step: &Step| step.text.starts_with("PCI\\") || step.text.contains(" PCI\\");
    id(step) && before.iter().any(id)
}

/// The number of last steps that are the same for every controller.
fn shared(paths: &BTreeMap<DiskBus, BootPath>) -> usize {
    let mut paths = paths.values();
    let Some(first) = paths.next() else { return 0 };
    paths.fold(first.steps.len(), |most, path| {
        let same = first.steps.iter().rev().zip(path.steps.iter().rev());
        most.min(same.take_while(|(a, b)| a == b).count())
    })
}

fn next(h: &mut String, r: &Report) {
    h.push_str("<h2>Next</h2>\n<pre>");
    for command in &r.next_commands {
        let _ = writeln!(h, "{}", escape(command));
    }
    h.push_str("</pre>\n");
}

fn findings(h: &mut String, r: &Report) {
    if r.inspection.findings.is_empty() {
        return;
    }
    h.push_str(
        "<h2>Findings</h2>\n<table><tr><th>severity</th><th>what</th><th>remedy</th></tr>\n",
    );
    for f in &r.inspection.findings {
        let (class, severity) = severity(f.severity);
        let _ = writeln!(
            h,
            "<tr><td class=\"{class}\">{severity}</td><td>{}</td><td>{}</td></tr>",
            escape(&f.message),
            escape(&f.remedy)
        );
    }
    h.push_str("</table>\n");
}

fn severity(severity: Severity) -> (&'static str, &'static str) {
    match severity {
        Severity::Info => ("", "info"),
        Severity::Warning => ("warn", "warning"),
        Severity::Blocker => ("bad", "blocker"),
    }
}

/// Renders every action with its state, and below it every file, key and value that it writes.
fn changes(h: &mut String, r: &Report, plan: &Plan) {
    h.push_str("<h2>What was changed</h2>\n");
    if r.actions.is_empty() {
        h.push_str("<p>Nothing: everything was already so.</p>\n");
    }
    for line in &r.actions {
        let state = serde_json::json!(line.state);
        let head = format!(
            "{}: {}",
            escape(state.as_str().unwrap_or_default()),
            escape(&line.description)
        );
        match plan.actions.iter().find(|a| a.id() == line.id) {
            Some(action) => {
                let _ = writeln!(h, "<details><summary>{head}</summary>");
                action_body(h, action);
                h.push_str("</details>\n");
            }
            None => {
                let _ = writeln!(h, "<p>{head}</p>");
            }
        }
    }
}

fn action_body(h: &mut String, action: &Action) {
    match action {
        Action::CopyFiles(CopyFiles { folders, files, .. }) => {
            h.push_str("<table><tr><th>file</th><th>from the drivers</th></tr>\n");
            for folder in folders {
                let folder = escape(&folder.to_string());
                let _ = writeln!(h, "<tr><td>{folder}</td><td>new directory</td></tr>");
            }
            for file in files {
                let _ = writeln!(
                    h,
                    "<tr><td>{}{}</td><td>{}, {}</td></tr>",
                    escape(&file.to.to_string()),
                    if file.replaces { " (replaced)" } else { "" },
                    escape(&file.from),
                    bytes(file.size)
                );
            }
            h.push_str("</table>\n");
        }
        Action::CopyInGuest(CopyInGuest { from, to, size, .. }) => {
            let _ = writeln!(
                h,
                "<p>{} to {}, {}</p>",
                escape(&from.to_string()),
                escape(&to.to_string()),
                bytes(*size)
            );
        }
        Action::PatchBootSector(PatchBootSector { volume, fields, .. }) => {
            let names: Vec<_> = fields.iter().map(|f| f.name).collect();
            let _ = writeln!(
                h,
                "<p>{} in the boot sector of {volume}</p>",
                escape(&names.join(", "))
            );
        }
        Action::EditHive(EditHive { hive, edits, .. }) => {
            h.push_str("<table><tr><th>value</th><th>data</th></tr>\n");
            let mut at = None;
            for op in &edits.ops {
                if at != Some(op.key()) {
                    at = Some(op.key());
                    let _ = writeln!(
                        h,
                        "<tr><td colspan=\"2\"><strong>{}\\{}</strong></td></tr>",
                        hive.prefix(),
                        escape(op.key())
                    );
                }
                let (name, data) = match op {
                    RegOp::CreateKey { .. } => continue,
                    RegOp::Set { name, data, .. } => (name.as_str(), escape(&shown(data))),
                    RegOp::DeleteValue { name, .. } => (name.as_str(), "removed".into()),
                    RegOp::DeleteKey { .. } => ("the key and all below it", "removed".into()),
                };
                let name = if name.is_empty() { "(default)" } else { name };
                let _ = writeln!(h, "<tr><td>{}</td><td>{data}</td></tr>", escape(name));
            }
            h.push_str("</table>\n");
        }
    }
}

/// The number of bytes of a binary value that are shown; `registry/*.reg` has all of them.
const SHOWN_BYTES: usize = 32;

fn shown(data: &RegData) -> String {
    match data {
        RegData::Sz(text) | RegData::ExpandSz(text) => text.clone(),
        RegData::Dword(n) => format!("{n} (0x{n:x})"),
        RegData::MultiSz(items) => items.join("; "),
        RegData::None(data) | RegData::Binary(data) => {
            let mut text: String = data
                .iter()
                .take(SHOWN_BYTES)
                .map(|b| format!("{b:02x} "))
                .collect();
            if data.len() > SHOWN_BYTES {
                let _ = write!(text, "... ({} bytes)", data.len());
            }
            text
        }
    }
}

fn checks(h: &mut String, r: &Report) {
    h.push_str("<h2>Checks of the finished disk</h2>\n");
    let (passed, others): (Vec<_>, Vec<_>) = r.checks.iter().partition(|c| c.ok);
    check_table(h, &others);
    if !passed.is_empty() {
        let _ = writeln!(
            h,
            "<details><summary class=\"ok\">{} passed</summary>",
            count(passed.len(), "check")
        );
        check_table(h, &passed);
        h.push_str("</details>\n");
    }
}

fn check_table(h: &mut String, checks: &[&Check]) {
    if checks.is_empty() {
        return;
    }
    h.push_str("<table>\n");
    for c in checks {
        let (class, mark) = match c.state {
            CheckState::Ok => ("ok", "ok"),
            CheckState::Fault if c.severity == Severity::Blocker => ("bad", "fault"),
            CheckState::Fault => ("warn", "warning"),
            CheckState::CouldNotRun => ("warn", "could not run"),
        };
        let _ = writeln!(
            h,
            "<tr><td class=\"{class}\">{mark}</td><td>{}</td><td>{}</td></tr>",
            escape(c.id),
            escape(&c.message)
        );
    }
    h.push_str("</table>\n");
}

fn trim(h: &mut String, r: &Report) {
    let b = &r.bytes;
    let _ = writeln!(
        h,
        "<h2>What was copied</h2>\n<p>{} of {}; {} written on this host.</p>",
        bytes(b.read),
        bytes(b.virtual_size),
        bytes(b.written)
    );
    let kept: Vec<_> = r
        .trim
        .iter()
        .flat_map(|d| d.volumes.iter().map(move |v| (d, v)))
        .filter_map(|(d, v)| v.kept.as_ref().map(|why| (d, v, why)))
        .collect();
    if kept.is_empty() {
        return;
    }
    h.push_str("<p>Copied whole:</p><ul>\n");
    for (disk, volume, why) in kept {
        let _ = writeln!(
            h,
            "<li>{}, partition {}: {}</li>",
            escape(&disk.disk.display().to_string()),
            volume.partition,
            escape(why)
        );
    }
    h.push_str("</ul>\n");
}

fn timeline(h: &mut String, r: &Report) {
    let t = &r.timings;
    let rest = (t.total_s - t.inspect_s - t.fix_s - t.copy_s).max(0.0);
    let parts = [
        ("inspect and plan", t.inspect_s),
        ("fix, trim and verify", t.fix_s),
        ("copy", t.copy_s),
        ("domains and report", rest),
    ];
    let _ = writeln!(
        h,
        "<h2>Time</h2>\n<p>{:.2} s in all</p>\n<div class=\"time\" role=\"img\" \
         aria-label=\"share of each step\">",
        t.total_s
    );
    for (i, (_, seconds)) in parts.iter().enumerate() {
        let _ = writeln!(
            h,
            "<span class=\"t{i}\" style=\"flex-grow:{:.0}\"></span>",
            seconds * 1000.0
        );
    }
    h.push_str("</div>\n<p>");
    for (i, (name, seconds)) in parts.iter().enumerate() {
        let _ = writeln!(h, "<span class=\"key t{i}\"></span>{name} {seconds:.2} s");
    }
    h.push_str("</p>\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(ready: bool, steps: &[(bool, &str)]) -> BootPath {
        BootPath {
            ready,
            service: None,
            reason: String::new(),
            steps: steps
                .iter()
                .map(|(ok, text)| Step {
                    ok: *ok,
                    text: text.to_string(),
                })
                .collect(),
            faults: Vec::new(),
        }
    }

    #[test]
    fn what_all_controllers_need_is_told_once() {
        let one = path(true, &[(true, "a"), (true, "pci"), (true, "disk")]);
        let two = path(
            false,
            &[(false, "b"), (true, "c"), (true, "pci"), (true, "disk")],
        );
        let paths = BTreeMap::from([(DiskBus::Sata, one), (DiskBus::VirtioBlk, two)]);
        assert_eq!(shared(&paths), 2);
        let mut h = String::new();
        chain(&mut h, "after", &paths[&DiskBus::VirtioBlk], 2);
        assert!(h.contains("&#10007; b"), "{h}");
        assert!(h.contains("2 bus, disk and volume drivers"), "{h}");
        assert!(!h.contains("pci"), "{h}");
    }

    #[test]
    fn an_alternative_is_not_drawn_as_what_follows() {
        let path = path(
            true,
            &[
                (true, r"PCI\VEN_1AF4&DEV_1042 is driven by viostor"),
                (true, "viostor starts at boot"),
                (false, r"no driver is bound to PCI\VEN_1AF4&DEV_1001"),
                (true, "pci starts at boot"),
            ],
        );
        let mut h = String::new();
        chain(&mut h, "after", &path, 0);
        assert_eq!(h.matches("class=\"or\"").count(), 1, "{h}");
        assert_eq!(h.matches("&darr;").count(), 2, "{h}");
        let (_, after) = h.split_once("class=\"or\"").unwrap();
        assert!(
            after.contains("DEV_1001") && !after.contains("DEV_1042"),
            "{h}"
        );
    }

    #[test]
    fn a_common_fault_is_shown_in_every_chain() {
        let one = path(false, &[(true, "a"), (false, "volmgr"), (true, "disk")]);
        let mut h = String::new();
        chain(&mut h, "after", &one, 2);
        assert!(h.contains("&#10007; volmgr"), "{h}");
        assert!(h.contains("1 bus, disk and volume drivers"), "{h}");
    }

    #[test]
    fn long_values_are_cut() {
        let text = shown(&RegData::Binary(vec![0xab; 100]));
        assert!(text.ends_with("... (100 bytes)"), "{text}");
        assert_eq!(shown(&RegData::Dword(255)), "255 (0xff)");
    }
}
