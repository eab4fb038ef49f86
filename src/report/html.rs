//! `report.html`: the report as one self-contained page. No script, no external resource; everything
//! that may come from a guest is escaped.
//!
//! The boot path is drawn as chains of boxes made of list items: before and after stand side by side,
//! or below each other on a narrow screen; they print, and are read aloud in order. What is folded away on the screen is printed in full.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::boot_path::{BootPath, Controller, Step};
use crate::inspect::Severity;
use crate::plan::model::{Action, Plan};
use crate::registry::{RegData, RegOp};
use crate::ui::{bytes, clean};

use super::{CheckState, Report};

const STYLE: &str = "\
:root{--line:#c8c8c8;--soft:#f3f3f3;--ok:#0a6b2d;--bad:#a40000;--okbg:#e6f4ea;--badbg:#fdecea}
@media(prefers-color-scheme:dark){:root{--line:#555;--soft:#2a2a2a;--ok:#6fd08c;--bad:#ff8a80;\
--okbg:#16321f;--badbg:#3b1a18}body{background:#181818;color:#ddd}}
body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}
h1,h2,h3,td,th,li,p,code{overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}
td,th{border-bottom:1px solid var(--line);padding:.3rem .5rem;text-align:left;vertical-align:top}
.ok{color:var(--ok)}.bad{color:var(--bad)}
code,pre{background:var(--soft);padding:.1rem .3rem}pre{white-space:pre-wrap;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}.pair p{margin:.5rem 0 .2rem}
.chain{display:flex;flex-direction:column;align-items:flex-start;list-style:none;padding:0;margin:0}
.chain li{border:1px solid;border-radius:.4rem;padding:.1rem .5rem;font-size:.875rem;max-width:100%;\
box-sizing:border-box}
.chain li.ok{background:var(--okbg)}.chain li.bad{background:var(--badbg);font-weight:600}
.chain li.to{border:0;line-height:1;padding:0 1rem}
.time{display:flex;height:1.4rem;border:1px solid var(--line);border-radius:.3rem;overflow:hidden}
.time span{min-width:2px}.t0{background:#4c78a8}.t1{background:#f58518}.t2{background:#54a24b}\
.t3{background:#9d9d9d}
.key{display:inline-block;width:.8rem;height:.8rem;margin:0 .3rem 0 1rem}
summary{cursor:pointer}
@media(max-width:40rem){body{margin:1rem auto}.pair{display:block}table,tbody,tr,td{display:block}\
tr{border-bottom:1px solid var(--line)}td{border:0;padding:.1rem .3rem}tr:has(th){display:none}}
@media print{body{margin:0;max-width:none}details::details-content{content-visibility:visible;\
display:block;block-size:auto}tr,.chain{break-inside:avoid}}";

pub fn page(r: &Report, plan: &Plan) -> String {
    let mut h = String::new();
    let title = escape(&r.name);
    let _ = writeln!(
        h,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <link rel=\"icon\" href=\"data:,\">\
         <title>{title}: hyper2kvm report</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>"
    );
    summary(&mut h, r);
    warnings(&mut h, r);
    boot_path(&mut h, r);
    next(&mut h, r);
    findings(&mut h, r);
    changes(&mut h, r, plan);
    checks(&mut h, r);
    trim(&mut h, r);
    timeline(&mut h, r);
    h.push_str("</body></html>\n");
    h
}

fn summary(h: &mut String, r: &Report) {
    let (class, verdict) = if r.ready {
        ("ok", "READY: read back from the converted disk")
    } else {
        ("bad", "NOT READY")
    };
    let _ = writeln!(h, "<p class=\"{class}\"><strong>{verdict}</strong></p>");
    let os = &r.inspection.os;
    let build = os.build.map(|b| format!(", build {b}")).unwrap_or_default();
    let host = os.hostname.as_deref();
    let _ = writeln!(
        h,
        "<table>{}{}{}{}</table>",
        row(
            "guest",
            &format!(
                "{}{build}",
                os.product_name.as_deref().unwrap_or("unknown system")
            )
        ),
        row("host name", host.unwrap_or("not set")),
        row("source", &r.inspection.source.path),
        r.outputs
            .disks
            .iter()
            .map(|d| row("disk", &d.display().to_string()))
            .collect::<String>(),
    );
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
    h.push_str("<h2>Warnings</h2>\n<ul>\n");
    for warning in &r.warnings {
        let _ = writeln!(h, "<li>{}</li>", escape(warning));
    }
    h.push_str("</ul>\n");
}

/// One chain per controller before and after, then once what all of them need.
fn boot_path(h: &mut String, r: &Report) {
    if r.controllers.is_empty() {
        return;
    }
    h.push_str(
        "<h2>Boot path</h2>\n<p>Those that the domain XML of this conversion uses have to be ready; \
         the others are shown to compare.</p>\n",
    );
    let shared_after = shared(&r.controllers);
    let shared_before = shared(&r.controllers_before);
    for (controller, after) in &r.controllers {
        let _ = writeln!(h, "<h3>{}</h3>\n<div class=\"pair\">", controller.name());
        if let Some(before) = r.controllers_before.get(controller) {
            chain(h, "before", before, shared_before);
        }
        chain(h, "after", after, shared_after);
        h.push_str("</div>\n");
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
    // A fault among what all need is shown where it strikes.
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
        if i > 0 {
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

/// How many steps at the end are the same for every controller.
fn shared(paths: &BTreeMap<Controller, BootPath>) -> usize {
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
        Severity::Warning => ("", "warning"),
        Severity::Blocker => ("bad", "blocker"),
    }
}

/// Every action with its state, and below it every file, key and value it writes.
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
        Action::CopyFiles { folders, files, .. } => {
            h.push_str("<table><tr><th>file</th><th>from the drivers</th></tr>\n");
            for folder in folders {
                let folder = escape(&folder.to_string());
                let _ = writeln!(h, "<tr><td>{folder}</td><td>new folder</td></tr>");
            }
            for file in files {
                let _ = writeln!(
                    h,
                    "<tr><td>{}{}</td><td>{}, {} bytes</td></tr>",
                    escape(&file.to.to_string()),
                    if file.replaces { " (replaced)" } else { "" },
                    escape(&file.from),
                    file.size
                );
            }
            h.push_str("</table>\n");
        }
        Action::CopyInGuest { from, to, size, .. } => {
            let _ = writeln!(
                h,
                "<p>{} to {}, {size} bytes</p>",
                escape(&from.to_string()),
                escape(&to.to_string())
            );
        }
        Action::PatchBootSector { volume, fields, .. } => {
            let names: Vec<_> = fields.iter().map(|f| f.name).collect();
            let _ = writeln!(
                h,
                "<p>{} in the boot sector of {volume}</p>",
                escape(&names.join(", "))
            );
        }
        Action::EditHive { hive, edits, .. } => {
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

/// More than this of a binary value tells people nothing; `registry/*.reg` has it whole.
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
    h.push_str("<h2>Checks of the finished disk</h2>\n<table>\n");
    for c in &r.checks {
        let (class, mark) = match c.state {
            CheckState::Ok => ("ok", "ok"),
            CheckState::Fault => ("bad", "fault"),
            CheckState::CouldNotRun => ("bad", "could not run"),
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

/// For element text and quoted attributes.
pub fn escape(text: &str) -> String {
    clean(text)
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
        .replace('\'', "&#39;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_text_is_escaped() {
        assert_eq!(
            escape("<script>\"x\"&'y'\u{1b}</script>"),
            "&lt;script&gt;&quot;x&quot;&amp;&#39;y&#39;&lt;/script&gt;"
        );
    }

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
        let paths = BTreeMap::from([(Controller::Sata, one), (Controller::VirtioBlk, two)]);
        assert_eq!(shared(&paths), 2);
        let mut h = String::new();
        chain(&mut h, "after", &paths[&Controller::VirtioBlk], 2);
        assert!(h.contains("&#10007; b"), "{h}");
        assert!(h.contains("2 bus, disk and volume drivers"), "{h}");
        assert!(!h.contains("pci"), "{h}");
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
