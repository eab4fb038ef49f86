//! Runs the conversions, a limited number at a time, each in a child of this same program, and
//! reads their progress.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::convert::exchange;
use crate::error::ErrorKind;
use crate::report::Request;
use crate::stop;
use crate::tool::pass::Passed;
use crate::tool::privileges::Privileges;
use crate::tool::{Cmd, ToolError, clean};
use crate::transfer::Pace;
use crate::ui::{Board, Ui};

use super::report::{Failure, JobState, Line};

/// The path of this program, even if its file was replaced in the meantime.
pub(crate) const SELF: &str = "/proc/self/exe";
/// The time for a child to end: it may have to roll back a disk. Unfinished steps are in its
/// journal.
const STOP_LIMIT: Duration = Duration::from_secs(120);
const TICK: Duration = Duration::from_millis(50);
/// The size limit of a report, which lists every file of a large driver package and the whole
/// inspection.
const MAX_DOCUMENT: u64 = 64 << 20;
const MAX_LINE: u64 = 64 << 10;
/// The number of a failed child's lines that are kept besides its error.
const LOG_LINES: usize = 20;

/// The most conversions at a time; more keep no disk busier.
const MOST: usize = 4;

/// The number of conversions that this host, container or job supports well at a time. Each keeps
/// two CPUs busy (this program's reading and `qemu-img`, or two disks).
pub fn default_jobs() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    (processors / 2).clamp(1, MOST)
}

/// One conversion to make.
pub struct Conversion {
    pub name: String,
    pub source: PathBuf,
    /// Absolute.
    pub folder: PathBuf,
    /// The options of `convert`, without directory and source.
    pub args: Vec<OsString>,
    /// Secrets, which must not appear on a command line.
    pub env: Vec<(String, String)>,
    /// The request that it would report now; `None` if the source cannot be read.
    pub request: Box<dyn Fn() -> Option<Request> + Send + Sync>,
    /// Convert again even if the directory exists.
    pub force: bool,
}

/// Whether a VM still has to be converted.
#[derive(Debug, PartialEq, Eq)]
pub enum Done {
    /// There is no directory.
    No,
    /// The directory is complete and equals the result of this run.
    Yes,
    /// The directory exists and differs.
    Differs(String),
}

impl Conversion {
    fn line(&self, state: JobState) -> Line {
        Line::new(&self.name, &self.source, &self.folder, state)
    }

    /// The report in the output directory.
    fn report(&self) -> Option<Value> {
        let mut bytes = Vec::new();
        let file = File::open(self.folder.join("report.json")).ok()?;
        BufReader::new(file.take(MAX_DOCUMENT))
            .read_to_end(&mut bytes)
            .ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Checks the output directory.
    pub fn done(&self) -> Done {
        // A conversion working there is detected by its own lock.
        if let Err(error) = exchange::repair(&self.folder) {
            tracing::debug!("{}: {error}", self.folder.display());
        }
        let report = self.folder.join("report.json");
        if self.force || !report.exists() {
            return Done::No;
        }
        let differs = |why: &str| Done::Differs(why.to_string());
        let Some(report) = self.report() else {
            return differs("its report.json cannot be read");
        };
        if report["ready"] != true {
            return differs("its report is not READY");
        }
        let disks = report["outputs"]["disks"].as_array();
        let there = |disk: &Value| disk.as_str().is_some_and(|d| Path::new(d).exists());
        if !disks.is_some_and(|disks| !disks.is_empty() && disks.iter().all(there)) {
            return differs("a disk of it is missing");
        }
        let was: Option<Request> = serde_json::from_value(report["request"].clone()).ok();
        match (was, (self.request)()) {
            (Some(was), Some(now)) => difference(&was, &now).map_or(Done::Yes, Done::Differs),
            _ => differs("it does not record what it was made from"),
        }
    }
}

/// The first difference in a few words; `None` if there is none. A file is identified by its inode,
/// not by its path.
fn difference(was: &Request, now: &Request) -> Option<String> {
    let values = |request: &Request, name: &str| request.options.get(name).cloned();
    let input = |request: &Request, path: &str| {
        let inputs = request.inputs.iter();
        inputs.clone().find(|i| i.path == Path::new(path)).cloned()
    };
    let same_file = |old: &String, new: &String| {
        let files = (input(was, old), input(now, new));
        old == new || matches!(files, (Some(old), Some(new)) if old.is(&new))
    };
    let names: BTreeSet<&String> = was.options.keys().chain(now.options.keys()).collect();
    for name in names {
        let (old, new) = (values(was, name), values(now, name));
        let same = match (&old, &new) {
            (Some(old), Some(new)) => {
                old.len() == new.len() && old.iter().zip(new).all(|(o, n)| same_file(o, n))
            }
            (None, None) => true,
            _ => false,
        };
        if !same {
            let said = |v: Option<Vec<String>>| v.map_or("not given".to_string(), |v| v.join(", "));
            let (old, new) = (said(old), said(new));
            return Some(format!(
                "it was made with other options ({name}: {old}, now {new})"
            ));
        }
    }
    for input in &now.inputs {
        if !was.inputs.iter().any(|i| i.is(input)) {
            return Some(format!("{} has changed since", input.path.display()));
        }
    }
    (was.inputs.len() != now.inputs.len()).then(|| "it was made from other files".to_string())
}

/// The current state of a VM.
#[derive(Debug, Clone, Default)]
struct Slot {
    running: bool,
    step: String,
    done: u64,
    total: u64,
}

/// The progress of all of them together.
struct Watch<'a> {
    machines: &'a [Conversion],
    slots: Mutex<Vec<Slot>>,
    finished: AtomicUsize,
    failed: AtomicUsize,
    board: Board,
    /// The file through which they share their bandwidth limit.
    pace: Option<Arc<File>>,
}

impl Watch<'_> {
    fn change(&self, i: usize, change: impl FnOnce(&mut Slot)) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get_mut(i) {
            change(slot);
        }
        let finished = self.finished.load(Ordering::SeqCst);
        let failed = self.failed.load(Ordering::SeqCst);
        let running = || (self.machines.iter().zip(slots.iter())).filter(|(_, s)| s.running);
        let text = || {
            let percent = |s: &Slot| (s.done.min(s.total) * 100).checked_div(s.total);
            let list: Vec<String> = running()
                .map(|(m, s)| match percent(s) {
                    Some(percent) => format!("{} {} {percent} %", m.name, s.step),
                    None => format!("{} {}", m.name, s.step),
                })
                .collect();
            let failed = match failed {
                0 => String::new(),
                n => format!(", {n} failed"),
            };
            let all = self.machines.len();
            format!("{finished} of {all} finished{failed}; {}", list.join(", "))
        };
        let line = || {
            let list: Vec<Value> = running()
                .map(|(m, s)| {
                    json!({"name": m.name, "step": s.step, "done_bytes": s.done, "total_bytes": s.total})
                })
                .collect();
            json!({
                "version": env!("CARGO_PKG_VERSION"), "schema": "hyper2kvm/batch-progress/1",
                "machines": self.machines.len(), "finished": finished, "failed": failed,
                "running": list,
            })
        };
        self.board.set(finished as u64, &text, &line);
    }
}

/// Converts all VMs; returns one line per VM, in the order of the list. `dry_run` only plans.
pub fn run(machines: &[Conversion], jobs: usize, dry_run: bool, ui: &Ui) -> Vec<Line> {
    let watch = Watch {
        machines,
        slots: Mutex::new(vec![Slot::default(); machines.len()]),
        finished: AtomicUsize::new(0),
        failed: AtomicUsize::new(0),
        board: ui.board(machines.len() as u64),
        pace: Pace::shareable()
            .inspect_err(|e| tracing::warn!("each VM has its own bandwidth: {e}"))
            .ok()
            .map(Arc::new),
    };
    let next = AtomicUsize::new(0);
    let lines: Mutex<Vec<Option<Line>>> = Mutex::new(machines.iter().map(|_| None).collect());
    let work = || {
        while !stop::requested() {
            let i = next.fetch_add(1, Ordering::SeqCst);
            let Some(machine) = machines.get(i) else {
                break;
            };
            let line = one(machine, i, dry_run, &watch);
            watch.finished.fetch_add(1, Ordering::SeqCst);
            if line.state == JobState::Failed {
                watch.failed.fetch_add(1, Ordering::SeqCst);
            }
            let (verb, what) = line.status();
            watch.board.ended(verb, &what, &line.event());
            watch.change(i, |slot| slot.running = false);
            let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
            lines[i] = Some(line);
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs.clamp(1, machines.len().max(1)))
            .map(|_| scope.spawn(work))
            .collect();
        for thread in threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
    watch.board.finish();
    let lines = lines.into_inner().unwrap_or_else(PoisonError::into_inner);
    let not_started = |m: &Conversion| m.line(JobState::NotStarted);
    let pairs = lines.into_iter().zip(machines);
    pairs
        .map(|(l, m)| l.unwrap_or_else(|| not_started(m)))
        .collect()
}

fn one(machine: &Conversion, i: usize, dry_run: bool, watch: &Watch) -> Line {
    let start = Instant::now();
    let mut line = match machine.done() {
        Done::Yes => skipped(machine),
        Done::Differs(why) => Line {
            failure: Some(Failure {
                code: ErrorKind::Failed.code(),
                message: format!("{} exists, and {why}", machine.folder.display()),
                hints: vec![
                    "--force replaces it (`force: true` for one VM); output-dir chooses \
                     another directory"
                        .to_string(),
                ],
                ..Failure::default()
            }),
            ..machine.line(JobState::Failed)
        },
        Done::No => {
            watch.change(i, |slot| {
                slot.running = true;
                slot.step = "starting".into();
            });
            let pace = watch.pace.as_ref();
            let ended = child(machine, dry_run, pace, &mut |event| {
                watch.change(i, |slot| {
                    if let Some(step) = event["step"].as_str() {
                        slot.step = step.to_lowercase();
                    }
                    slot.done = event["done_bytes"].as_u64().unwrap_or(0);
                    slot.total = event["total_bytes"].as_u64().unwrap_or(0);
                });
            });
            match ended {
                Ok(ended) => outcome(machine, ended, dry_run),
                Err(error) => Line {
                    failure: Some(Failure {
                        code: ErrorKind::Failed.code(),
                        message: error.to_string(),
                        ..Failure::default()
                    }),
                    ..machine.line(JobState::Failed)
                },
            }
        }
    };
    line.seconds = start.elapsed().as_secs_f64();
    line
}

/// The line of a VM that an earlier run has converted, with the data of that run.
fn skipped(machine: &Conversion) -> Line {
    let report = machine.report().unwrap_or(Value::Null);
    told(&report, machine.line(JobState::Skipped))
}

/// The line with data from a report.
fn told(report: &Value, line: Line) -> Line {
    let list = |value: &Value| -> Vec<String> {
        let items = value.as_array().into_iter().flatten();
        items
            .filter_map(|v| Some(v.as_str()?.to_string()))
            .collect()
    };
    Line {
        ready: report["ready"].as_bool(),
        bytes_written: report["bytes"]["written"].as_u64(),
        bytes_virtual: report["bytes"]["virtual"].as_u64(),
        disks: list(&report["outputs"]["disks"]),
        warnings: list(&report["warnings"]),
        ..line
    }
}

/// The exit and the output of a child.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) document: Value,
    pub(crate) log: Vec<String>,
}

/// Runs one conversion to its end. When this process is asked to stop, so is the child, which gets
/// the time to clean up.
fn child(
    machine: &Conversion,
    dry_run: bool,
    pace: Option<&Arc<File>>,
    on_event: &mut dyn FnMut(&Value),
) -> Result<Ended, ToolError> {
    let mut command = Cmd::new(SELF)
        .privileges(Privileges::Ours)
        .args(["convert", "--json", "--progress", "json"])
        .args(&machine.args)
        .arg("--output-dir")
        .arg(&machine.folder);
    if dry_run {
        command = command.arg("--dry-run");
    }
    for (name, value) in &machine.env {
        command = command.env(name, value);
    }
    if let Some(file) = pace {
        let passed = Passed::new(file.clone(), Path::new("bandwidth"), true);
        command = command.env(Pace::VARIABLE, passed.name()).pass(&[passed]);
    }
    listen(command.arg("--").arg(&machine.source), on_event)
}

/// Runs this same program to its end, and reads its progress.
pub(crate) fn listen(command: Cmd, on_event: &mut dyn FnMut(&Value)) -> Result<Ended, ToolError> {
    let io_error = |source| ToolError::Io {
        tool: "hyper2kvm".into(),
        source,
    };
    let stdout = tempfile::tempfile().map_err(io_error)?;
    let (reader, writer) = io::pipe().map_err(io_error)?;
    let mut child = command
        .output(stdout.try_clone().map_err(io_error)?, writer)
        .spawn()?;
    let (sender, lines) = mpsc::channel();
    std::thread::Builder::new()
        .name("progress".into())
        .spawn(move || forward_lines(reader, &sender))
        .map_err(io_error)?;

    let mut log = VecDeque::new();
    let mut asked: Option<Instant> = None;
    let status = loop {
        match lines.recv_timeout(TICK) {
            Ok(line) => take(&line, &mut log, on_event),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                if let Some(status) = child.try_wait()? {
                    break status;
                }
                // No more output will arrive, but the child has not ended.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        match asked {
            None if stop::requested() => {
                child.terminate();
                asked = Some(Instant::now());
            }
            Some(when) if when.elapsed() > STOP_LIMIT => child.kill(),
            _ => {}
        }
    };
    for line in lines.try_iter() {
        take(&line, &mut log, on_event);
    }
    Ok(Ended {
        status,
        document: document(stdout).unwrap_or(Value::Null),
        log: log.into(),
    })
}

fn forward_lines(pipe: impl Read, sender: &Sender<String>) {
    let mut pipe = BufReader::new(pipe);
    loop {
        let mut line = Vec::new();
        match Read::by_ref(&mut pipe)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
        {
            Ok(0) | Err(_) => return,
            Ok(_) if sender.send(clean(&line)).is_err() => return,
            Ok(_) => {}
        }
    }
}

/// Sends progress to the board, any other line to the log.
fn take(line: &str, log: &mut VecDeque<String>, on_event: &mut dyn FnMut(&Value)) {
    match serde_json::from_str::<Value>(line) {
        Ok(event) if event["schema"].is_string() => on_event(&event),
        _ => {
            log.push_back(line.to_string());
            if log.len() > LOG_LINES {
                log.pop_front();
            }
        }
    }
}

fn document(mut stdout: File) -> Option<Value> {
    let mut bytes = Vec::new();
    stdout.seek(SeekFrom::Start(0)).ok()?;
    stdout.take(MAX_DOCUMENT).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn outcome(machine: &Conversion, ended: Ended, dry_run: bool) -> Line {
    let Ended {
        status,
        document,
        log,
    } = ended;
    if status.success() && document.is_object() {
        let state = match dry_run {
            true => JobState::Planned,
            false => JobState::Converted,
        };
        return told(&document, machine.line(state));
    }
    let error = &document["error"];
    let code = status.code().and_then(|c| u8::try_from(c).ok());
    if code == Some(ErrorKind::NotReady.code()) && document["accepted"].is_array() {
        return not_ready(machine, &document, dry_run);
    }
    let failure = if error.is_object() {
        serde_json::from_value(error.clone()).unwrap_or_default()
    } else {
        let message = match (status.signal(), code) {
            (Some(signal), _) => format!("the conversion was killed by signal {signal}"),
            (None, Some(code)) => {
                format!("the conversion ended with {code} without an error message")
            }
            (None, None) => "the conversion ended in an unknown way".to_string(),
        };
        Failure {
            code: code.unwrap_or(ErrorKind::Failed.code()),
            message,
            hints: vec!["what it left is removed by the next run".to_string()],
            ..Failure::default()
        }
    };
    let interrupted = failure.code == ErrorKind::Interrupted.code();
    Line {
        failure: Some(failure),
        log,
        ..machine.line(if interrupted {
            JobState::Interrupted
        } else {
            JobState::Failed
        })
    }
}

/// A VM converted despite accepted problems: the directory exists, but it counts as a failure.
fn not_ready(machine: &Conversion, document: &Value, dry_run: bool) -> Line {
    let codes = document["accepted"].as_array().into_iter().flatten();
    let codes: Vec<&str> = codes.filter_map(Value::as_str).collect();
    let done = match dry_run {
        true => "planned",
        false => "converted",
    };
    let line = Line {
        failure: Some(Failure {
            code: ErrorKind::NotReady.code(),
            message: format!("{done}, and NOT READY: accepted {}", codes.join(", ")),
            ..Failure::default()
        }),
        ..machine.line(JobState::Failed)
    };
    told(document, line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Input;

    fn request(format: &str, modified_ms: u64) -> Request {
        Request {
            options: [("format".to_string(), vec![format.to_string()])].into(),
            inputs: vec![Input {
                path: "/vm.vmdk".into(),
                size_bytes: 1,
                modified_ms,
                inode: 7,
            }],
        }
    }

    #[test]
    fn done_means_complete_and_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("vm.qcow2");
        let mut machine = Conversion {
            name: "vm".into(),
            source: "/vm.vmdk".into(),
            folder: dir.path().into(),
            args: Vec::new(),
            env: Vec::new(),
            request: Box::new(|| Some(request("qcow2", 5))),
            force: false,
        };
        let report = |ready: bool, request: &Request| {
            let text = json!({"ready": ready, "outputs": {"disks": [disk]}, "request": request});
            std::fs::write(dir.path().join("report.json"), text.to_string()).unwrap();
        };
        assert_eq!(machine.done(), Done::No);
        report(true, &request("qcow2", 5));
        let differs = |machine: &Conversion, says: &str| match machine.done() {
            Done::Differs(why) => assert!(why.contains(says), "{why}"),
            other => panic!("{other:?}"),
        };
        differs(&machine, "disk of it is missing");
        std::fs::write(&disk, "").unwrap();
        assert_eq!(machine.done(), Done::Yes);
        report(false, &request("qcow2", 5));
        differs(&machine, "READY");
        report(true, &request("raw", 5));
        differs(&machine, "format: raw, now qcow2");
        report(true, &request("qcow2", 4));
        differs(&machine, "/vm.vmdk has changed since");
        // The same file under another path is the same; another file with the same name is not.
        let elsewhere = |inode: u64| {
            let mut request = request("qcow2", 5);
            request.inputs[0].path = "/mnt/other/vm.vmdk".into();
            request.inputs[0].inode = inode;
            request
        };
        report(true, &elsewhere(7));
        assert_eq!(machine.done(), Done::Yes);
        report(true, &elsewhere(8));
        differs(&machine, "/vm.vmdk has changed since");
        machine.force = true;
        assert_eq!(machine.done(), Done::No);
        machine.force = false;
        std::fs::write(dir.path().join("report.json"), "{").unwrap();
        differs(&machine, "cannot be read");
    }

    #[test]
    fn events_and_log() {
        let mut log = VecDeque::new();
        let mut steps = Vec::new();
        for i in 0..30 {
            take(&format!("warning: {i}"), &mut log, &mut |_| {
                panic!("no event")
            });
        }
        take(
            "{\"schema\":\"hyper2kvm/progress/1\",\"step\":\"Copying\"}",
            &mut log,
            &mut |event| steps.push(event["step"].to_string()),
        );
        assert_eq!((log.len(), log[0].as_str()), (LOG_LINES, "warning: 10"));
        assert_eq!(steps, ["\"Copying\""]);
    }
}
