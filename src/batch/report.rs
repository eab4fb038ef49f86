//! The results of all VMs: one document, one page, one table.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::ErrorKind;
use crate::ui::{Styled, Tone, bytes};

/// Distinguishes a page from a file of the user.
pub const PAGE_TITLE: &str = "<title>hyper2kvm: batch</title>";
pub(super) const TITLE: &str = "hyper2kvm: batch";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    Converted,
    /// The VM was only planned (`--dry-run`).
    Planned,
    /// Its directory was complete already.
    Skipped,
    Failed,
    /// Stopped in progress, and cleaned up.
    Interrupted,
    NotStarted,
}

impl JobState {
    pub(super) const ALL: [JobState; 6] = [
        JobState::Converted,
        JobState::Planned,
        JobState::Skipped,
        JobState::Failed,
        JobState::Interrupted,
        JobState::NotStarted,
    ];

    fn tone(self) -> Tone {
        match self {
            Self::Converted | Self::Planned => Tone::Good,
            Self::Skipped => Tone::Plain,
            Self::Failed | Self::Interrupted => Tone::Bad,
            Self::NotStarted => Tone::Warn,
        }
    }

    pub(super) fn name(self) -> &'static str {
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

/// The error of a failed conversion.
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

/// One VM.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    pub name: String,
    #[serde(serialize_with = "crate::text::json_path::serialize")]
    pub source: PathBuf,
    #[serde(serialize_with = "crate::text::json_path::serialize")]
    pub output_dir: PathBuf,
    pub state: JobState,
    pub seconds: f64,
    pub ready: Option<bool>,
    pub bytes_virtual: Option<u64>,
    pub bytes_written: Option<u64>,
    pub disks: Vec<String>,
    pub warnings: Vec<String>,
    #[serde(rename = "error")]
    pub failure: Option<Failure>,
    /// The last lines on stderr of a failed one.
    pub log: Vec<String>,
}

impl Line {
    /// A VM with no data but that of the list.
    pub fn new(name: &str, source: &Path, output_dir: &Path, state: JobState) -> Self {
        Self {
            name: name.to_owned(),
            source: source.to_owned(),
            output_dir: output_dir.to_owned(),
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

    /// The event for `--progress json` about the end of this VM.
    pub fn event(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"), "schema": "hyper2kvm/batch-progress/1",
            "ended": {
                "name": self.name, "state": self.state, "seconds": self.seconds,
                "ready": self.ready, "warnings": self.warnings.len(), "error": self.failure,
            },
        })
    }

    /// The progress line: a verb and its object.
    pub fn status(&self) -> (&'static str, String) {
        match self.state {
            JobState::Converted => (
                "Converted",
                format!("{} in {:.0} s", self.name, self.seconds),
            ),
            JobState::Planned => ("Planned", self.name.clone()),
            JobState::Skipped => ("Skipped", format!("{}: done before", self.name)),
            JobState::Interrupted => ("Interrupted", self.name.clone()),
            JobState::NotStarted => ("Not started", self.name.clone()),
            JobState::Failed => ("Failed", format!("{}: {}", self.name, self.why())),
        }
    }

    /// The message with its causes.
    pub(super) fn why(&self) -> String {
        let failure = self.failure.iter();
        let parts = failure.flat_map(|f| std::iter::once(&f.message).chain(&f.causes));
        parts.cloned().collect::<Vec<_>>().join(": ")
    }
}

#[derive(Debug, Serialize)]
pub struct Summary {
    /// The path of the list.
    #[serde(serialize_with = "crate::text::json_path::serialize")]
    pub file: PathBuf,
    pub jobs: usize,
    pub total_s: f64,
    pub counts: BTreeMap<JobState, usize>,
    /// The number of disks that failed VMs left changed by a fix in place.
    pub not_rolled_back: usize,
    pub machines: Vec<Line>,
}

impl Summary {
    pub fn new(file: &Path, jobs: usize, total_s: f64, machines: Vec<Line>) -> Self {
        let mut counts: BTreeMap<JobState, usize> = JobState::ALL.map(|s| (s, 0)).into();
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

    pub fn count(&self, state: JobState) -> usize {
        self.counts.get(&state).copied().unwrap_or(0)
    }

    /// The kind of error; `None` if all VMs are done. A disk that was left changed has precedence.
    pub fn verdict(&self) -> Option<ErrorKind> {
        if self.not_rolled_back > 0 {
            return Some(ErrorKind::NotRolledBack);
        }
        if self.count(JobState::Interrupted) + self.count(JobState::NotStarted) > 0 {
            return Some(ErrorKind::Interrupted);
        }
        match self.count(JobState::Failed) {
            0 => None,
            n => Some(ErrorKind::SomeFailed(n)),
        }
    }

    /// `3 converted, 1 failed`.
    pub fn sentence(&self) -> String {
        let parts = JobState::ALL.iter().filter(|s| self.count(**s) > 0);
        let parts = parts.map(|s| format!("{} {}", self.count(*s), s.name()));
        parts.collect::<Vec<_>>().join(", ")
    }

    pub fn document(&self) -> Value {
        json!(self)
    }

    /// A table for people.
    pub fn text(&self) -> Styled {
        let names = self.machines.iter().map(|l| l.name.chars().count()).max();
        let names = names.unwrap_or(0);
        let mut text = Styled::default();
        for line in self.urgent_first() {
            let what = match line.state {
                JobState::Converted => {
                    let written = bytes(line.bytes_written.unwrap_or(0));
                    format!(
                        "{:.1} s, {written}, {}",
                        line.seconds,
                        line.output_dir.display()
                    )
                }
                JobState::Skipped => format!("done before: {}", line.output_dir.display()),
                JobState::Failed => format!("({}) {}", self.code(line), line.why()),
                _ => String::new(),
            };
            text.push(line.state.tone(), format!("{:<12}", line.state.name()));
            text.push(Tone::Plain, format!(" {:<names$}  ", line.name));
            text.hang();
            text.push(Tone::Plain, what + "\n");
            let mut below = |tone: Tone, mark: &str, what: &str| {
                text.push(Tone::Plain, format!("{:<12} {:names$}  ", "", ""));
                text.hang();
                text.push(tone, mark);
                text.push(Tone::Plain, format!("{what}\n"));
            };
            for hint in line.failure.iter().flat_map(|f| &f.hints) {
                below(Tone::Hint, "hint: ", hint);
            }
            for warning in &line.warnings {
                below(Tone::Warn, "warning: ", warning);
            }
            for blocker in line.failure.iter().flat_map(|f| &f.blockers) {
                let field = |name: &str| blocker[name].as_str().unwrap_or_default();
                below(Tone::Plain, "", field("reason"));
                below(Tone::Plain, "remedy: ", field("remedy"));
            }
        }
        let sum = format!("\n{} in {:.1} s", self.sentence(), self.total_s);
        text.push(Tone::Strong, sum);
        text
    }

    /// Rows that need attention come first.
    pub(super) fn urgent_first(&self) -> Vec<&Line> {
        let mut lines: Vec<&Line> = self.machines.iter().collect();
        lines.sort_by_key(|l| std::cmp::Reverse(l.state == JobState::Failed));
        lines
    }

    fn code(&self, line: &Line) -> u8 {
        line.failure.as_ref().map_or(0, |f| f.code)
    }
}

/// Writes a file so that it is either complete or absent.
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
    use super::super::page;
    use super::*;

    fn line(name: &str, state: JobState, code: u8) -> Line {
        Line {
            failure: (code > 0).then(|| Failure {
                code,
                message: "<b>why</b>".into(),
                ..Failure::default()
            }),
            ..Line::new(
                name,
                Path::new("/a b/vm.vmdk"),
                Path::new("/out/a#b"),
                state,
            )
        }
    }

    #[test]
    fn the_exit_code_says_how_many() {
        use ErrorKind::*;
        let ok = || line("a", JobState::Converted, 0);
        let bad = |n: usize| vec![line("b", JobState::Failed, 3); n];
        for (lines, kind, code) in [
            (vec![ok(), line("s", JobState::Skipped, 0)], None, 0),
            ([vec![ok()], bad(1)].concat(), Some(SomeFailed(1)), 101),
            (bad(20), Some(SomeFailed(20)), 120),
            (bad(500), Some(SomeFailed(500)), 120),
            (
                [bad(3), vec![line("i", JobState::Interrupted, 130)]].concat(),
                Some(Interrupted),
                130,
            ),
            (
                [bad(3), vec![line("x", JobState::Failed, 7)]].concat(),
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
            line("good", JobState::Converted, 0),
            line("bad", JobState::Failed, 3),
        ];
        lines[0].warnings.push("look at the clock".into());
        let event = lines[1].event();
        assert_eq!(event["ended"]["state"], "failed");
        assert_eq!(event["ended"]["error"]["code"], 3);
        let summary = Summary::new(Path::new("f.yaml"), 2, 1.0, lines);
        let text = summary.text().plain();
        assert!(text.contains("warning: look at the clock"), "{text}");
        assert!(text.starts_with("failed       bad   (3) "), "{text}");
        assert!(text.ends_with("1 converted, 1 failed in 1.0 s"), "{text}");
        let page = page::page(&summary, Path::new("/out"));
        assert!(page.contains(PAGE_TITLE), "a later run knows it by that");
        assert!(page.contains("<strong>1</strong> failed"), "{page}");
        assert!(page.contains("<strong>1</strong> warning<"), "{page}");
        assert!(page.contains("#show-failed:checked~table"), "{page}");
        // Attention first; by name, `bad` comes before `good`.
        let rows: Vec<&str> = page.lines().filter(|l| l.contains("class=\"is-")).collect();
        assert!(
            rows[0].contains("is-failed\"") && rows[0].contains("--name:0;"),
            "{page}"
        );
        assert!(rows[1].contains("is-converted is-warned") && rows[1].contains("--name:1;"));
        assert!(page.contains("&lt;b&gt;why") && !page.contains("<b>why"));
        assert!(page.contains("href=\"./a%23b/report.html\""), "{page}");
        let elsewhere = page::page(&summary, Path::new("/home"));
        assert!(elsewhere.contains("href=\"file:///out/a%23b/report.html\""));
        let json = summary.document();
        assert_eq!(json["counts"]["not-started"], 0);
        assert_eq!(json["machines"][1]["error"]["code"], 3);
    }
}
