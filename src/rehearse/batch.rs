//! Runs many rehearsals, each in a child of this program, as many at a time as memory permits.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use crate::batch::report::Failure;
use crate::batch::run::{Ended, SELF, listen};
use crate::boot;
use crate::error::{ErrorKind, Result};
use crate::stop;
use crate::tool::Cmd;
use crate::tool::privileges::Privileges;
use crate::tool::virsh::Virsh;
use crate::ui::{Board, Ui};

use super::memory;
use super::result::{Rehearsal, Verdict};

/// The most VMs that run at a time.
const MOST: usize = 256;
/// The interval at which memory is checked while a VM waits for it.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// One VM to rehearse.
pub(crate) struct Vm {
    pub(crate) name: String,
    pub(crate) source: PathBuf,
    /// The evidence directory, absolute.
    pub(crate) evidence: PathBuf,
    /// The options of `rehearse`, without directory and source.
    pub(crate) args: Vec<OsString>,
    /// Secrets, which must not appear on a command line.
    pub(crate) env: Vec<(String, String)>,
    pub(crate) memory_mib: u64,
    /// The libvirt connection.
    pub(crate) uri: String,
}

/// The result of one rehearsal.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    #[serde(serialize_with = "crate::text::json_path::serialize")]
    pub(crate) source: PathBuf,
    pub(crate) seconds: f64,
    pub(crate) rehearsal: Option<Rehearsal>,
    /// The error, if there is no verdict.
    #[serde(rename = "error")]
    pub(crate) failure: Option<Failure>,
    /// The last lines on stderr of a failed one.
    pub(crate) log: Vec<String>,
}

impl Row {
    /// The row of a rehearsal with a verdict.
    pub(crate) fn of(rehearsal: Rehearsal) -> Self {
        Self {
            name: rehearsal.name.clone(),
            source: rehearsal.source.clone(),
            seconds: rehearsal.seconds,
            rehearsal: Some(rehearsal),
            failure: None,
            log: Vec::new(),
        }
    }

    fn not_started(vm: &Vm) -> Self {
        Self {
            name: vm.name.clone(),
            source: vm.source.clone(),
            seconds: 0.0,
            rehearsal: None,
            failure: None,
            log: Vec::new(),
        }
    }

    pub(crate) fn verdict(&self) -> Option<Verdict> {
        self.rehearsal.as_ref().map(|r| r.verdict)
    }

    /// The state in one word.
    pub(crate) fn state(&self) -> &'static str {
        match (self.verdict(), &self.failure) {
            (Some(verdict), _) => verdict.as_str(),
            (None, Some(failure)) if failure.code == ErrorKind::Interrupted.code() => "interrupted",
            (None, Some(_)) => "failed",
            (None, None) => "not started",
        }
    }

    pub(crate) fn urgency(&self) -> u8 {
        self.verdict().map_or(0, urgency)
    }

    /// The reason in one line.
    pub(crate) fn why(&self) -> String {
        let failure = self.failure.as_ref();
        let failure = failure.or(self.rehearsal.as_ref().and_then(|r| r.error.as_ref()));
        let parts = failure.into_iter().flat_map(|f| {
            let reasons = f.blockers.iter().filter_map(|b| b["reason"].as_str());
            let texts =
                std::iter::once(f.message.as_str()).chain(f.causes.iter().map(String::as_str));
            texts.chain(reasons).collect::<Vec<_>>()
        });
        parts.collect::<Vec<_>>().join(": ")
    }
}

/// The results of all rehearsals.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    #[serde(serialize_with = "crate::text::json_path::serialize")]
    pub(crate) file: PathBuf,
    pub(crate) total_s: f64,
    /// The largest number of rehearsals that ran at a time.
    pub(crate) most_at_a_time: usize,
    pub(crate) counts: BTreeMap<&'static str, usize>,
    #[serde(rename = "machines")]
    pub(crate) rows: Vec<Row>,
}

/// The possible states of a VM, the best first.
const STATES: [&str; 6] = [
    "up",
    "down",
    "refused",
    "failed",
    "interrupted",
    "not started",
];

impl Summary {
    pub(crate) fn new(file: &Path, total_s: f64, ran: Ran) -> Self {
        let mut counts: BTreeMap<_, _> = STATES.map(|s| (s, 0)).into();
        for row in &ran.rows {
            *counts.entry(row.state()).or_default() += 1;
        }
        Self {
            file: file.into(),
            total_s,
            most_at_a_time: ran.most_at_a_time,
            counts,
            rows: ran.rows,
        }
    }

    fn count(&self, state: &str) -> usize {
        self.counts.get(state).copied().unwrap_or(0)
    }

    /// The kind of error for the exit code; `None` if all came up.
    pub(crate) fn verdict(&self) -> Option<ErrorKind> {
        if self.count("interrupted") + self.count("not started") > 0 {
            return Some(ErrorKind::Interrupted);
        }
        match self.rows.len() - self.count("up") {
            0 => None,
            n => Some(ErrorKind::SomeFailed(n)),
        }
    }

    /// `3 up, 1 down`.
    pub(crate) fn sentence(&self) -> String {
        let counted = STATES.iter().filter(|s| self.count(s) > 0);
        let parts = counted.map(|s| format!("{} {s}", self.count(s)));
        parts.collect::<Vec<_>>().join(", ")
    }

    pub(crate) fn text(&self) -> String {
        let width = self.rows.iter().map(|r| r.name.chars().count()).max();
        let width = width.unwrap_or(0);
        let mut rows: Vec<&Row> = self.rows.iter().collect();
        rows.sort_by_key(|row| row.urgency());
        let mut lines: Vec<String> = rows
            .iter()
            .map(|row| {
                let line = format!("{:<12} {:<width$}  {}", row.state(), row.name, row.why());
                line.trim_end().to_owned()
            })
            .collect();
        lines.push(format!("\n{} in {:.0} s", self.sentence(), self.total_s));
        lines.join("\n")
    }
}

/// The rows in the order of the list.
pub(crate) struct Ran {
    pub(crate) rows: Vec<Row>,
    pub(crate) most_at_a_time: usize,
}

/// The waiting and the running rehearsals.
struct Queue {
    waiting: Vec<usize>,
    running: usize,
    running_mib: u64,
    most: usize,
    rows: Vec<Option<Row>>,
}

struct Work<'a> {
    vms: &'a [Vm],
    queue: Mutex<Queue>,
    changed: Condvar,
    free_at_start: u64,
    board: Board,
}

/// Fails if a libvirt is unreachable. This also starts a session's daemon: two processes that start
/// it at the same time interfere with each other.
pub(crate) fn reach(vms: &[Vm]) -> Result<()> {
    let uris: BTreeSet<&str> = vms.iter().map(|vm| vm.uri.as_str()).collect();
    for uri in uris {
        boot::local(uri)?;
        Virsh::new(uri)
            .uuids()
            .map_err(|e| boot::unreachable(uri, e))?;
    }
    Ok(())
}

/// Rehearses all VMs. `jobs` limits how many run at a time, whatever memory there is.
pub(crate) fn run(vms: &[Vm], jobs: Option<usize>, ui: &Ui) -> Ran {
    let work = Work {
        vms,
        queue: Mutex::new(Queue {
            waiting: (0..vms.len()).collect(),
            running: 0,
            running_mib: 0,
            most: 0,
            rows: vms.iter().map(|_| None).collect(),
        }),
        changed: Condvar::new(),
        free_at_start: memory::free_mib().unwrap_or(0),
        board: ui.board(vms.len() as u64),
    };
    let threads = jobs.unwrap_or(MOST).min(vms.len()).clamp(1, MOST);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| work.until_none_waits());
        }
    });
    work.board.finish();
    let queue = work
        .queue
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    let rows = queue.rows.into_iter().zip(vms);
    Ran {
        rows: rows
            .map(|(row, vm)| row.unwrap_or_else(|| Row::not_started(vm)))
            .collect(),
        most_at_a_time: queue.most,
    }
}

impl Work<'_> {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn until_none_waits(&self) {
        while let Some(i) = self.next() {
            let Some(vm) = self.vms.get(i) else { return };
            self.board.status("Rehearsing", &vm.name);
            let row = one(vm);
            let event = json!({
                "version": env!("CARGO_PKG_VERSION"), "schema": "hyper2kvm/batch-progress/1",
                "ended": {"name": row.name, "state": row.state(), "seconds": row.seconds},
            });
            let text = format!("{}: {} {}", row.name, row.state(), row.why());
            self.board.ended("Rehearsed", text.trim_end(), &event);
            let mut queue = self.queue();
            queue.running -= 1;
            queue.running_mib -= memory::need_mib(vm.memory_mib);
            if let Some(slot) = queue.rows.get_mut(i) {
                *slot = Some(row);
            }
            self.changed.notify_all();
        }
    }

    /// The next one that fits in memory; waits until one ends.
    fn next(&self) -> Option<usize> {
        let mut queue = self.queue();
        loop {
            if stop::requested() || queue.waiting.is_empty() {
                return None;
            }
            let now = memory::free_mib().unwrap_or(0);
            let need = |i: usize| {
                self.vms
                    .get(i)
                    .map_or(0, |vm| memory::need_mib(vm.memory_mib))
            };
            let fits =
                |i: &usize| memory::fits(need(*i), queue.running_mib, self.free_at_start, now);
            if let Some(at) = queue.waiting.iter().position(fits) {
                let i = queue.waiting.remove(at);
                queue.running += 1;
                queue.running_mib += need(i);
                queue.most = queue.most.max(queue.running);
                return Some(i);
            }
            queue = self
                .changed
                .wait_timeout(queue, LOOK_AGAIN)
                .map_or_else(|e| e.into_inner().0, |(queue, _)| queue);
        }
    }
}

/// Runs one to its end.
fn one(vm: &Vm) -> Row {
    let begin = Instant::now();
    let mut command = Cmd::new(SELF)
        .privileges(Privileges::Gain)
        .args(["rehearse", "--json", "--progress", "json"])
        .args(&vm.args)
        .arg("--output-dir")
        .arg(&vm.evidence);
    for (name, value) in &vm.env {
        command = command.env(name, value);
    }
    let command = command.arg("--").arg(&vm.source);
    let row = match listen(command, &mut |_| {}) {
        Ok(ended) => row(vm, ended),
        Err(error) => Row {
            failure: Some(Failure {
                code: ErrorKind::Failed.code(),
                message: error.to_string(),
                ..Failure::default()
            }),
            ..Row::not_started(vm)
        },
    };
    Row {
        seconds: begin.elapsed().as_secs_f64(),
        ..row
    }
}

fn row(vm: &Vm, ended: Ended) -> Row {
    let Ended {
        status,
        document,
        log,
    } = ended;
    if let Ok(rehearsal) = serde_json::from_value::<Rehearsal>(document.clone()) {
        return Row {
            name: vm.name.clone(),
            ..Row::of(rehearsal)
        };
    }
    let said = serde_json::from_value(document["error"].clone()).ok();
    let failure = said.unwrap_or_else(|| {
        let message = match status.signal() {
            Some(signal) => format!("the rehearsal was killed by signal {signal}"),
            None => format!("the rehearsal ended with {status} and printed nothing"),
        };
        Failure {
            code: ErrorKind::Failed.code(),
            message,
            hints: vec!["what it left is removed by the next rehearsal".to_owned()],
            ..Failure::default()
        }
    });
    Row {
        failure: Some(failure),
        log,
        ..Row::not_started(vm)
    }
}

/// The document of a batch.
pub(crate) fn document(summary: &Summary) -> Value {
    json!(summary)
}

/// Sorts refused and failed ones before those that came up.
fn urgency(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Down => 1,
        Verdict::Refused => 2,
        Verdict::Up => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rehearse::result::tests::rehearsal;

    fn summary(rows: Vec<Row>) -> Summary {
        let ran = Ran {
            rows,
            most_at_a_time: 2,
        };
        Summary::new(Path::new("fleet.yaml"), 61.0, ran)
    }

    fn failed(code: u8) -> Row {
        let vm = Vm {
            name: "bad".into(),
            source: "/bad".into(),
            evidence: "/e".into(),
            args: Vec::new(),
            env: Vec::new(),
            memory_mib: 1,
            uri: String::new(),
        };
        Row {
            failure: Some(Failure {
                code,
                message: "why".into(),
                ..Failure::default()
            }),
            ..Row::not_started(&vm)
        }
    }

    #[test]
    fn the_exit_code_is_how_many_did_not_come_up() {
        let row = |verdict| Row::of(rehearsal("vm", verdict));
        for (rows, kind) in [
            (vec![row(Verdict::Up)], None),
            (
                vec![
                    row(Verdict::Up),
                    row(Verdict::Down),
                    row(Verdict::Refused),
                    failed(1),
                ],
                Some(ErrorKind::SomeFailed(3)),
            ),
            (
                vec![row(Verdict::Down), failed(130)],
                Some(ErrorKind::Interrupted),
            ),
        ] {
            assert_eq!(summary(rows).verdict(), kind);
        }
    }

    #[test]
    fn what_failed_comes_first() {
        let rows = vec![Row::of(rehearsal("good", Verdict::Up)), failed(1)];
        let text = summary(rows).text();
        assert!(text.starts_with("failed       bad   why"), "{text}");
        assert!(text.ends_with("1 up, 1 failed in 61 s"), "{text}");
    }

    #[test]
    fn a_child_that_died_is_a_row() {
        let ended = Ended {
            status: std::process::ExitStatus::from_raw(9),
            document: Value::Null,
            log: vec!["last".into()],
        };
        let vm = Vm {
            name: "n".into(),
            source: "/s".into(),
            evidence: "/e".into(),
            args: Vec::new(),
            env: Vec::new(),
            memory_mib: 1,
            uri: String::new(),
        };
        let row = row(&vm, ended);
        assert_eq!(row.state(), "failed");
        assert!(row.why().contains("signal 9") && row.log == ["last"]);
    }
}
