//! The page of a batch: totals, and a table that can be filtered and sorted without scripts. Radio
//! buttons before the table select the rows and their order.

use std::fmt::Write as _;
use std::path::Path;

use crate::report::page::{escape, head, link, now};
use crate::ui::{bytes, count};

use super::report::{JobState, Line, Summary, TITLE};

const STYLE: &str = "\
body{max-width:76rem}\
.totals{display:flex;flex-wrap:wrap;gap:.5rem;list-style:none;padding:0}\
.totals li{border:1px solid var(--line);border-radius:.4rem;padding:.2rem .7rem}\
.totals strong{font-size:1.25rem}\
.failed,.interrupted{color:var(--bad)}.converted,.planned{color:var(--ok)}\
input[type=radio]{position:absolute;opacity:0}\
.choose{display:inline-block;border:1px solid var(--line);border-radius:1rem;padding:.1rem .8rem;\
margin:.15rem .1rem;cursor:pointer}\
input:checked+.choose{background:var(--soft);font-weight:600;border-color:currentColor}\
input:focus-visible+.choose{outline:2px solid var(--link)}\
table,tbody{display:block}tbody{display:flex;flex-direction:column}\
tr{display:grid;grid-template-columns:minmax(8rem,2fr) 7rem 5rem 6.5rem minmax(12rem,5fr);\
border-bottom:1px solid var(--line)}td,th{border:0}tr.head{order:-1}\
td p{margin:0 0 .3rem}.note{color:var(--warn)}\
@media(max-width:40rem){body{margin:1rem auto}tr{display:block;padding:.5rem 0}tr.head{display:none}\
td{display:block;padding:.05rem 0}td:nth-child(2),td:nth-child(3),td:nth-child(4){display:inline-block;\
padding-right:1rem}td:empty{display:none}}\
@media print{body{margin:0;max-width:none}tr{break-inside:avoid}.choose{display:none}}";

/// The possible orders of rows: the id of the choice, its label.
const ORDERS: [(&str, &str); 5] = [
    ("urgent", "attention first"),
    ("name", "name"),
    ("state", "state"),
    ("time", "time"),
    ("size", "written"),
];

pub(crate) fn page(summary: &Summary, folder: &Path) -> String {
    let mut h = head(TITLE, &(STYLE.to_string() + &choices_style()));
    let _ = writeln!(h, "<h1>{}</h1>", escape(&summary.sentence()));
    let _ = writeln!(
        h,
        "<p>{}: {} in {:.1} s, {} at a time; {}, hyper2kvm {}</p>",
        escape(&summary.file.display().to_string()),
        count(summary.machines.len(), "VM"),
        summary.total_s,
        summary.jobs,
        now(),
        env!("CARGO_PKG_VERSION"),
    );
    totals(&mut h, summary);
    choices(&mut h, summary);
    h.push_str(
        "<table>\n<tr class=\"head\"><th>VM</th><th>state</th><th>time</th><th>written</th><th>what</th></tr>\n",
    );
    let lines = summary.urgent_first();
    let orders = Orders::of(&lines);
    for (i, line) in lines.iter().enumerate() {
        row(&mut h, line, folder, &orders.style(i));
    }
    h.push_str("</table>\n</body></html>\n");
    h
}

fn totals(h: &mut String, summary: &Summary) {
    let machines = &summary.machines;
    let sum = |of: fn(&Line) -> u64| machines.iter().map(of).fold(0, u64::saturating_add);
    let written = sum(|l| l.bytes_written.unwrap_or(0));
    let size = sum(|l| l.bytes_virtual.unwrap_or(0));
    let warnings: usize = machines.iter().map(|l| l.warnings.len()).sum();
    h.push_str("<ul class=\"totals\">");
    for state in JobState::ALL.into_iter().filter(|s| summary.count(*s) > 0) {
        let (n, name) = (summary.count(state), state.name());
        let class = class(state);
        let _ = write!(h, "<li class=\"{class}\"><strong>{n}</strong> {name}</li>");
    }
    let _ = writeln!(
        h,
        "<li><strong>{warnings}</strong> {}</li><li><strong>{}</strong> written of {}</li></ul>",
        if warnings == 1 { "warning" } else { "warnings" },
        bytes(written),
        bytes(size)
    );
}

fn class(state: JobState) -> String {
    state.name().replace(' ', "-")
}

/// Radio buttons for the selection and the order of VMs. Each affects the table after it.
fn choices(h: &mut String, summary: &Summary) {
    let mut choice = |group: &str, id: &str, label: &str, first: bool| {
        let checked = if first { " checked" } else { "" };
        let _ = write!(
            h,
            "<input type=\"radio\" name=\"{group}\" id=\"{group}-{id}\"{checked}>\
             <label class=\"choose\" for=\"{group}-{id}\">{label}</label>"
        );
    };
    choice("show", "all", "all", true);
    for state in JobState::ALL.into_iter().filter(|s| summary.count(*s) > 0) {
        choice("show", &class(state), state.name(), false);
    }
    if summary.machines.iter().any(|l| !l.warnings.is_empty()) {
        choice("show", "warned", "with warnings", false);
    }
    for (i, (id, label)) in ORDERS.into_iter().enumerate() {
        choice("sort", id, &format!("&darr; {label}"), i == 0);
    }
    h.push('\n');
}

fn choices_style() -> String {
    let mut style = String::new();
    let shown = JobState::ALL.map(class);
    for class in shown.iter().map(String::as_str).chain(["warned"]) {
        let _ = write!(
            style,
            "#show-{class}:checked~table tr:not(.head):not(.is-{class}){{display:none}}"
        );
    }
    for (id, _) in ORDERS {
        let _ = write!(style, "#sort-{id}:checked~table tr{{order:var(--{id})}}");
    }
    style + "table tr.head{order:-1!important}"
}

/// The position of each row in each order.
struct Orders([Vec<usize>; 5]);

impl Orders {
    fn of(lines: &[&Line]) -> Self {
        let ranks = |compare: &dyn Fn(&Line, &Line) -> std::cmp::Ordering| {
            let mut rows: Vec<usize> = (0..lines.len()).collect();
            rows.sort_by(|a, b| match (lines.get(*a), lines.get(*b)) {
                (Some(a), Some(b)) => compare(a, b),
                _ => a.cmp(b),
            });
            let mut places = vec![0; rows.len()];
            for (place, row) in rows.into_iter().enumerate() {
                if let Some(slot) = places.get_mut(row) {
                    *slot = place;
                }
            }
            places
        };
        let size = |l: &Line| l.bytes_written.unwrap_or(0);
        Self([
            ranks(&|_, _| std::cmp::Ordering::Equal),
            ranks(&|a, b| a.name.to_lowercase().cmp(&b.name.to_lowercase())),
            ranks(&|a, b| a.state.cmp(&b.state)),
            ranks(&|a, b| b.seconds.total_cmp(&a.seconds)),
            ranks(&|a, b| size(b).cmp(&size(a))),
        ])
    }

    fn style(&self, row: usize) -> String {
        let places = ORDERS.iter().zip(&self.0);
        places
            .map(|((id, _), places)| {
                format!("--{id}:{};", places.get(row).copied().unwrap_or_default())
            })
            .collect()
    }
}

fn row(h: &mut String, line: &Line, folder: &Path, style: &str) {
    let mut what = String::new();
    let mut paragraph = |class: &str, text: &str| {
        if !text.is_empty() {
            let _ = write!(what, "<p class=\"{class}\">{}</p>", escape(text));
        }
    };
    paragraph("", &line.why());
    for hint in line.failure.iter().flat_map(|f| &f.hints) {
        paragraph("", &format!("hint: {hint}"));
    }
    for blocker in line.failure.iter().flat_map(|f| &f.blockers) {
        let field = |name: &str| blocker[name].as_str().unwrap_or_default();
        paragraph("", field("reason"));
        paragraph("", &format!("remedy: {}", field("remedy")));
    }
    for warning in &line.warnings {
        paragraph("note", &format!("warning: {warning}"));
    }
    let name = escape(&line.name);
    let name = match line.state {
        JobState::Converted | JobState::Skipped => {
            let report = line.output_dir.join("report.html");
            format!("<a href=\"{}\">{name}</a>", escape(&link(&report, folder)))
        }
        _ => name,
    };
    let class = class(line.state);
    let warned = if line.warnings.is_empty() {
        ""
    } else {
        " is-warned"
    };
    let _ = writeln!(
        h,
        "<tr class=\"is-{class}{warned}\" style=\"{style}\"><td>{name}</td>\
         <td class=\"{class}\">{}</td><td>{}</td><td>{}</td><td>{what}</td></tr>",
        line.state.name(),
        match line.seconds > 0.0 {
            true => format!("{:.1} s", line.seconds),
            false => String::new(),
        },
        line.bytes_written.map_or(String::new(), bytes),
    );
}
