//! `report.html`: the report as one self-contained page. No script, no external resource; everything
//! that may come from a guest is escaped.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::boot_path::{BootPath, Controller};
use crate::ui::clean;

use super::Report;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}\
table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ccc;padding:.3rem .5rem;\
text-align:left;vertical-align:top;overflow-wrap:anywhere}.ok{color:#0a6b2d}.bad{color:#a40000}\
code,pre{background:#f3f3f3;padding:.1rem .3rem;overflow-x:auto}@media print{body{margin:0}}\
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}code,pre{background:#2a2a2a}\
.ok{color:#6fd08c}.bad{color:#ff7b72}}";

pub fn page(r: &Report) -> String {
    let mut h = String::new();
    let title = escape(&r.name);
    let _ = write!(
        h,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>{title}: hyper2kvm report</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    );
    let (class, verdict) = if r.ready {
        ("ok", "READY: read back from the converted disk")
    } else {
        ("bad", "NOT READY")
    };
    let _ = writeln!(h, "<p class=\"{class}\"><strong>{verdict}</strong></p>");
    let os = &r.inspection.os;
    let _ = writeln!(
        h,
        "<p>{} build {}, {}; source <code>{}</code></p>",
        escape(os.product_name.as_deref().unwrap_or("unknown")),
        os.build.map_or("?".into(), |b| b.to_string()),
        escape(os.hostname.as_deref().unwrap_or("no host name")),
        escape(&r.inspection.source.path),
    );
    h.push_str("<h2>Boot path</h2>\n");
    boot_table(&mut h, &r.controllers_before, &r.controllers);
    h.push_str(
        "<h2>What was changed</h2>\n<table><tr><th>action</th><th>state</th><th>what</th></tr>\n",
    );
    for a in &r.actions {
        let state = serde_json::json!(a.state);
        let _ = writeln!(
            h,
            "<tr><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&a.id),
            escape(state.as_str().unwrap_or_default()),
            escape(&a.description)
        );
    }
    h.push_str("</table>\n<h2>Checks</h2>\n<table>\n");
    for c in &r.checks {
        let (class, mark) = if c.ok { ("ok", "ok") } else { ("bad", "fault") };
        let _ = writeln!(
            h,
            "<tr><td class=\"{class}\">{mark}</td><td>{}</td><td>{}</td></tr>",
            escape(c.id),
            escape(&c.message)
        );
    }
    h.push_str("</table>\n<h2>Findings</h2>\n<table>\n");
    for f in &r.inspection.findings {
        let severity = serde_json::json!(f.severity);
        let _ = writeln!(
            h,
            "<tr><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(severity.as_str().unwrap_or_default()),
            escape(&f.message),
            escape(&f.remedy)
        );
    }
    h.push_str("</table>\n");
    let t = &r.timings;
    let _ = writeln!(
        h,
        "<h2>Time</h2><p>inspect {:.2} s, fix {:.2} s, copy {:.2} s, total {:.2} s</p>\n<h2>Next</h2><pre>",
        t.inspect_s, t.fix_s, t.copy_s, t.total_s
    );
    for command in &r.next_commands {
        let _ = writeln!(h, "{}", escape(command));
    }
    h.push_str("</pre></body></html>\n");
    h
}

fn boot_table(
    h: &mut String,
    before: &BTreeMap<Controller, BootPath>,
    after: &BTreeMap<Controller, BootPath>,
) {
    h.push_str("<table><tr><th>controller</th><th>before</th><th>after</th></tr>\n");
    for (controller, path) in after {
        let _ = write!(h, "<tr><td>{}</td>", controller.name());
        for path in [before.get(controller), Some(path)] {
            let cell = path.map_or((String::new(), String::new()), |p| {
                let class = if p.ready { "ok" } else { "bad" };
                let word = if p.ready { "ready" } else { "not ready" };
                (
                    format!(" class=\"{class}\""),
                    format!("{word}: {}", escape(&p.reason)),
                )
            });
            let _ = write!(h, "<td{}>{}</td>", cell.0, cell.1);
        }
        h.push_str("</tr>\n");
    }
    h.push_str("</table>\n");
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
}
