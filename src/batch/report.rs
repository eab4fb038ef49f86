//! What became of every machine: one document, one page, one table.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::ErrorKind;
use crate::report::html::escape;
use crate::ui::bytes;

use super::run::Machine;

/// By which a page is told from a file of the user.
pub const PAGE_TITLE: &str = "<title>hyper2kvm: batch</title>";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    Converted,
    /// With `--dry-run`.
    Planned,
    /// Its folder was complete already.
    Skipped,
    Failed,
    /// Stopped half-way, and cleaned up.
    Interrupted,
    NotStarted,
}

impl State {
    const ALL: [State; 6] = [
        State::Converted,
        State::Planned,
        State::Skipped,
        State::Failed,
        State::Interrupted,
        State::NotStarted,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Converted => "converted",
            Self::Planned => "planned",
            Self::Skipped => "skipped",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
            Self::NotStarted => "not started",
        }
    }
}

/// Why a conversion failed, in its own words.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Failure {
    /// Its exit code.
    pub code: u8,
    pub message: String,
    pub causes: Vec<String>,
    pub hints: Vec<String>,
    pub blockers: Vec<Value>,
}

/// One machine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    pub name: String,
    #[serde(serialize_with = "crate::text::json_path::serialize")]
    pub source: PathBuf,
    #[serde(serialize_with = "crate::text::json_path::serialize")]
    pub output_dir: PathBuf,
    pub state: State,
    pub seconds: f64,
    pub ready: Option<bool>,
    pub bytes_virtual: Option<u64>,
    pub bytes_written: Option<u64>,
    pub disks: Vec<String>,
    pub warnings: Vec<String>,
    #[serde(rename = "error")]
    pub failure: Option<Failure>,
    /// The last lines on stderr of one that failed.
    pub log: Vec<String>,
}

impl Line {
    pub fn new(machine: &Machine, state: State) -> Self {
        Self {
            name: machine.name.clone(),
            source: machine.source.clone(),
            output_dir: machine.folder.clone(),
            state,
            seconds: 0.0,
            ready: None,
            bytes_virtual: None,
            bytes_written: None,
            disks: Vec::new(),
            warnings: Vec::new(),
            failure: None,
            log: Vec::new(),
        }
    }

    /// For `--progress json`: how this machine ended.
    pub fn event(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"), "schema": "hyper2kvm/batch-progress/1",
            "ended": {
                "name": self.name, "state": self.state, "seconds": self.seconds,
                "ready": self.ready, "warnings": self.warnings.len(), "error": self.failure,
            },
        })
    }

    /// For the progress: a verb, and what of it.
    pub fn status(&self) -> (&'static str, String) {
        match self.state {
            State::Converted => (
                "Converted",
                format!("{} in {:.0} s", self.name, self.seconds),
            ),
            State::Planned => ("Planned", self.name.clone()),
            State::Skipped => ("Skipped", format!("{}: done before", self.name)),
            State::Interrupted => ("Interrupted", self.name.clone()),
            State::NotStarted => ("Not started", self.name.clone()),
            State::Failed => ("Failed", format!("{}: {}", self.name, self.why())),
        }
    }

    /// The message with its causes.
    fn why(&self) -> String {
        let failure = self.failure.iter();
        let parts = failure.flat_map(|f| std::iter::once(&f.message).chain(&f.causes));
        parts.cloned().collect::<Vec<_>>().join(": ")
    }
}

#[derive(Debug, Serialize)]
pub struct Summary {
    /// The list of machines.
    #[serde(serialize_with = "crate::text::json_path::serialize")]
    pub file: PathBuf,
    pub jobs: usize,
    pub total_s: f64,
    pub counts: BTreeMap<State, usize>,
    /// Of those that failed, how many disks were left changed by a fix in place.
    pub not_rolled_back: usize,
    pub machines: Vec<Line>,
}

impl Summary {
    pub fn new(file: &Path, jobs: usize, total_s: f64, machines: Vec<Line>) -> Self {
        let mut counts: BTreeMap<State, usize> = State::ALL.map(|s| (s, 0)).into();
        for line in &machines {
            *counts.entry(line.state).or_default() += 1;
        }
        let stuck = |l: &&Line| {
            let code = l.failure.as_ref().map(|f| f.code);
            code == Some(ErrorKind::NotRolledBack.code())
        };
        Self {
            file: file.into(),
            jobs,
            total_s,
            counts,
            not_rolled_back: machines.iter().filter(stuck).count(),
            machines,
        }
    }

    pub fn count(&self, state: State) -> usize {
        self.counts.get(&state).copied().unwrap_or(0)
    }

    /// `None` when all machines are done. A disk that was left changed is told before anything else.
    pub fn verdict(&self) -> Option<ErrorKind> {
        if self.not_rolled_back > 0 {
            return Some(ErrorKind::NotRolledBack);
        }
        if self.count(State::Interrupted) + self.count(State::NotStarted) > 0 {
            return Some(ErrorKind::Interrupted);
        }
        match self.count(State::Failed) {
            0 => None,
            n => Some(ErrorKind::SomeFailed(n)),
        }
    }

    /// `3 converted, 1 failed`.
    pub fn sentence(&self) -> String {
        let parts = State::ALL.iter().filter(|s| self.count(**s) > 0);
        let parts = parts.map(|s| format!("{} {}", self.count(*s), s.name()));
        parts.collect::<Vec<_>>().join(", ")
    }

    pub fn document(&self) -> Value {
        json!(self)
    }

    /// A table for people.
    pub fn text(&self) -> String {
        let width = |of: fn(&Line) -> usize| self.machines.iter().map(of).max().unwrap_or(0);
        let names = width(|l| l.name.chars().count());
        let mut text = String::new();
        for line in self.urgent_first() {
            let what = match line.state {
                State::Converted => {
                    let written = bytes(line.bytes_written.unwrap_or(0));
                    format!(
                        "{:.1} s, {written}, {}",
                        line.seconds,
                        line.output_dir.display()
                    )
                }
                State::Skipped => format!("done before: {}", line.output_dir.display()),
                State::Failed => format!("({}) {}", self.code(line), line.why()),
                _ => String::new(),
            };
            let name = &line.name;
            let _ = writeln!(text, "{:<12} {name:<names$}  {what}", line.state.name());
            for hint in line.failure.iter().flat_map(|f| &f.hints) {
                let _ = writeln!(text, "{:<12} {:names$}  hint: {hint}", "", "");
            }
            for warning in &line.warnings {
                let _ = writeln!(text, "{:<12} {:names$}  warning: {warning}", "", "");
            }
            for blocker in line.failure.iter().flat_map(|f| &f.blockers) {
                let field = |name: &str| blocker[name].as_str().unwrap_or_default().to_string();
                let (reason, remedy) = (field("reason"), field("remedy"));
                let _ = writeln!(text, "{:<12} {:names$}  {reason}; remedy: {remedy}", "", "");
            }
        }
        let _ = write!(text, "\n{} in {:.1} s", self.sentence(), self.total_s);
        text
    }

    /// What needs somebody's attention comes first.
    fn urgent_first(&self) -> Vec<&Line> {
        let mut lines: Vec<&Line> = self.machines.iter().collect();
        lines.sort_by_key(|l| std::cmp::Reverse(l.state == State::Failed));
        lines
    }

    fn code(&self, line: &Line) -> u8 {
        line.failure.as_ref().map_or(0, |f| f.code)
    }

    /// The same as one self-contained page, to be put into `folder`.
    pub fn page(&self, folder: &Path) -> String {
        let mut h = String::from(
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
             ",
        );
        h.push_str(PAGE_TITLE);
        h.push_str(
            "<style>\
             body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}\
             h1,p,td{overflow-wrap:anywhere}table{border-collapse:collapse;width:100%}\
             td,th{border-bottom:1px solid #ccc;padding:.3rem .5rem;text-align:left;vertical-align:top}\
             td:nth-child(n+2):nth-child(-n+4){white-space:nowrap}td:last-child{width:50%}\
             .failed,.interrupted{color:#a40000}.converted{color:#0a6b2d}\
             @media(max-width:40rem){table,tbody,tr,td{display:block}th{display:none}\
             td,td:last-child{border:0;padding:0;width:auto}tr{border-bottom:1px solid #ccc;padding:.5rem 0}}\
             @media print{body{margin:0;max-width:none}tr{break-inside:avoid}}\
             @media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}\
             a{color:#8ab4f8}.failed,.interrupted{color:#ff7b72}.converted{color:#6fd08c}}\
             </style></head><body>\n",
        );
        let _ = writeln!(
            h,
            "<h1>{}</h1>\n<p>{}: {} machines in {:.1} s, {} at a time</p>\n<table>\
             <tr><th>machine</th><th>state</th><th>time</th><th>written</th><th>what</th></tr>",
            escape(&self.sentence()),
            escape(&self.file.display().to_string()),
            self.machines.len(),
            self.total_s,
            self.jobs,
        );
        for line in self.urgent_first() {
            let mut what = escape(&line.why());
            for hint in line.failure.iter().flat_map(|f| &f.hints) {
                let _ = write!(what, "<br>hint: {}", escape(hint));
            }
            for blocker in line.failure.iter().flat_map(|f| &f.blockers) {
                let field = |name: &str| escape(blocker[name].as_str().unwrap_or_default());
                let _ = write!(
                    what,
                    "<br>{}<br>remedy: {}",
                    field("reason"),
                    field("remedy")
                );
            }
            for warning in &line.warnings {
                let _ = write!(what, "warning: {}<br>", escape(warning));
            }
            let name = escape(&line.name);
            let name = if matches!(line.state, State::Converted | State::Skipped) {
                let report = line.output_dir.join("report.html");
                format!("<a href=\"{}\">{name}</a>", escape(&link(&report, folder)))
            } else {
                name
            };
            let _ = writeln!(
                h,
                "<tr><td>{name}</td><td class=\"{}\">{}</td><td>{:.1} s</td><td>{}</td><td>{what}</td></tr>",
                line.state.name().replace(' ', "-"),
                line.state.name(),
                line.seconds,
                line.bytes_written.map_or(String::new(), bytes),
            );
        }
        h.push_str("</table>\n</body></html>\n");
        h
    }
}

/// An address that still leads there when both have moved together; absolute for what lies elsewhere.
pub(crate) fn link(path: &Path, folder: &Path) -> String {
    match path.strip_prefix(folder) {
        // `./`: a name with a colon is no address of its own.
        Ok(below) => format!("./{}", percent(below)),
        Err(_) => format!("file://{}", percent(path)),
    }
}

/// Everything but the plainest characters is written as `%XX`.
fn percent(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let mut text = String::new();
    for byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-~".contains(byte) {
            text.push(char::from(*byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

/// Writes a file so that it is whole or not there.
pub fn save(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .tempfile_in(folder)?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, state: State, code: u8) -> Line {
        let machine = Machine {
            name: name.into(),
            source: "/a b/vm.vmdk".into(),
            folder: "/out/a#b".into(),
            args: Vec::new(),
            env: Vec::new(),
            request: Box::new(|| None),
            force: false,
        };
        Line {
            failure: (code > 0).then(|| Failure {
                code,
                message: "<b>why</b>".into(),
                ..Failure::default()
            }),
            ..Line::new(&machine, state)
        }
    }

    #[test]
    fn the_exit_code_says_how_many() {
        use ErrorKind::*;
        let ok = || line("a", State::Converted, 0);
        let bad = |n: usize| vec![line("b", State::Failed, 3); n];
        for (lines, kind, code) in [
            (vec![ok(), line("s", State::Skipped, 0)], None, 0),
            ([vec![ok()], bad(1)].concat(), Some(SomeFailed(1)), 101),
            (bad(20), Some(SomeFailed(20)), 120),
            (bad(500), Some(SomeFailed(500)), 120),
            (
                [bad(3), vec![line("i", State::Interrupted, 130)]].concat(),
                Some(Interrupted),
                130,
            ),
            (
                [bad(3), vec![line("x", State::Failed, 7)]].concat(),
                Some(NotRolledBack),
                7,
            ),
        ] {
            let summary = Summary::new(Path::new("f.yaml"), 2, 1.0, lines);
            assert_eq!(summary.verdict(), kind);
            assert_eq!(summary.verdict().map_or(0, ErrorKind::code), code);
        }
    }

    #[test]
    fn text_and_page() {
        let mut lines = vec![
            line("good", State::Converted, 0),
            line("bad", State::Failed, 3),
        ];
        lines[0].warnings.push("look at the clock".into());
        let event = lines[1].event();
        assert_eq!(event["ended"]["state"], "failed");
        assert_eq!(event["ended"]["error"]["code"], 3);
        let summary = Summary::new(Path::new("f.yaml"), 2, 1.0, lines);
        let text = summary.text();
        assert!(text.contains("warning: look at the clock"), "{text}");
        assert!(text.starts_with("failed       bad   (3) "), "{text}");
        assert!(text.ends_with("1 converted, 1 failed in 1.0 s"), "{text}");
        let page = summary.page(Path::new("/out"));
        assert!(page.contains("&lt;b&gt;why") && !page.contains("<b>why"));
        assert!(page.contains("href=\"./a%23b/report.html\""), "{page}");
        let elsewhere = summary.page(Path::new("/home"));
        assert!(elsewhere.contains("href=\"file:///out/a%23b/report.html\""));
        let json = summary.document();
        assert_eq!(json["counts"]["not-started"], 0);
        assert_eq!(json["machines"][1]["error"]["code"], 3);
    }
}
