//! The only module that prints.
//!
//! stdout has the result (text, or one JSON document with `--json`); everything else goes to
//! stderr. Text that may be from a guest is cleaned of control characters here, whatever the caller
//! did before.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod layout;

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use indicatif::{
    BinaryBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle,
};
use serde_json::{Value, json};

use crate::error::Error;
use crate::text;

/// Like `eprintln!`, but continues if stderr is closed.
macro_rules! err {
    ($($text:tt)*) => {{
        let _ = writeln!(io::stderr().lock(), $($text)*);
    }};
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum ProgressMode {
    /// A bar on a terminal, plain lines otherwise.
    #[default]
    Auto,
    /// A line every few seconds.
    Plain,
    /// One JSON object per line on stderr.
    Json,
    None,
}

/// The meaning of a piece of text; on a terminal that is a colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Strong,
    Good,
    Warn,
    Bad,
    Faint,
    Hint,
    /// A command or a path: its line is never broken.
    Code,
    /// No text: the column at which continuation lines begin.
    Hang,
}

impl Tone {
    fn code(self) -> Option<&'static str> {
        Some(match self {
            Self::Plain | Self::Code | Self::Hang => return None,
            Self::Hint => "36",
            Self::Strong => "1",
            Self::Good => "32",
            Self::Warn => "33",
            Self::Bad => "1;31",
            Self::Faint => "2",
        })
    }
}

/// Text in pieces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Styled(pub Vec<(Tone, String)>);

impl Styled {
    pub fn push(&mut self, tone: Tone, text: impl Into<String>) {
        self.0.push((tone, text.into()));
    }

    /// Makes continuation lines begin below the next piece.
    pub fn hang(&mut self) {
        self.push(Tone::Hang, "");
    }

    /// Appends a row of a table with two columns.
    pub fn row(&mut self, label: &str, value: impl Into<String>) {
        self.push(Tone::Faint, format!("  {label:<14}"));
        self.push(Tone::Plain, " ");
        self.hang();
        self.push(Tone::Plain, value.into() + "\n");
    }

    /// The text without colours.
    pub fn plain(&self) -> String {
        self.0.iter().map(|(_, part)| part.as_str()).collect()
    }
}

/// Whether a stream is a terminal whose user wants colours.
pub fn takes_colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
        && std::env::var_os("TERM").is_none_or(|v| v != "dumb")
}

#[derive(Debug, Clone)]
pub struct Ui {
    pub json: bool,
    /// 0 quiet, 1 normal, 2 and more verbose.
    pub verbosity: u8,
    progress: ProgressMode,
}

impl Ui {
    pub fn new(json: bool, verbosity: u8, progress: ProgressMode) -> Self {
        let terminal = io::stderr().is_terminal();
        let progress = match progress {
            ProgressMode::Auto if verbosity == 0 => ProgressMode::None,
            ProgressMode::Auto if !terminal => ProgressMode::Plain,
            other => other,
        };
        Self {
            json,
            verbosity,
            progress,
        }
    }

    /// Whether all details are printed.
    pub fn is_verbose(&self) -> bool {
        self.verbosity > 1
    }

    /// Prints the current step on stderr.
    pub fn status(&self, verb: &str, what: &str) {
        if self.progress == ProgressMode::Json {
            let line = json!({
                "version": env!("CARGO_PKG_VERSION"), "schema": "hyper2kvm/step/1",
                "step": verb, "message": clean(what),
            });
            err!("{line}");
        } else if self.verbosity > 0 {
            to_stderr(&marked(Tone::Good, &format!("{verb:>12} "), what));
        }
    }

    pub fn warn(&self, text: &str) {
        to_stderr(&marked(Tone::Warn, "warning: ", text));
    }

    /// Prints the warnings of a result that `--quiet` hides.
    pub fn quiet_warnings<'w>(&self, warnings: impl IntoIterator<Item = &'w String>) {
        if self.verbosity == 0 && !self.json {
            for warning in warnings {
                self.warn(warning);
            }
        }
    }

    /// Prints the human result on stdout; not with `--quiet`, nor if a JSON document is printed
    /// instead.
    pub fn line(&self, text: &str) {
        let mut styled = Styled::default();
        styled.push(Tone::Plain, text);
        self.styled(&styled);
    }

    /// Prints styled text as the human result.
    pub fn styled(&self, text: &Styled) {
        if !self.json && self.verbosity > 0 {
            let stdout = io::stdout();
            let (colour, width) = (takes_colour(&stdout), layout::width(&stdout));
            out(&layout::render(text, colour, width));
        }
    }

    /// Prints text that is the result in any mode (completions, XML).
    pub fn raw(&self, text: &str) {
        out(text.trim_end_matches('\n'));
    }

    /// Prints the JSON result: `schema` and `version` first, then the keys of `body`.
    pub fn document(&self, command: &str, body: Value) {
        if self.json {
            out(&pretty(&document(command, body)));
        }
    }

    pub fn error(&self, error: &Error) {
        self.error_document(error);
        self.error_text(error);
    }

    /// Prints the error as JSON on stdout, if `--json` is set.
    pub fn error_document(&self, error: &Error) {
        if self.json && !error.reported {
            let body = json!({
                "error": {
                    "code": error.kind.code(),
                    "message": one_line(&error.message),
                    "causes": error.causes().iter().map(|c| one_line(c)).collect::<Vec<_>>(),
                    "hints": error.hints.iter().map(|h| clean(h)).collect::<Vec<_>>(),
                    "blockers": error.blockers,
                }
            });
            out(&pretty(&document("error", body)));
        }
    }

    fn error_text(&self, error: &Error) {
        let mut text = marked(Tone::Bad, "error: ", &error.message);
        let mut row = |tone: Tone, mark: &str, what: &str| {
            text.push(Tone::Plain, "\n  ");
            text.push(tone, mark);
            text.hang();
            text.push(Tone::Plain, what);
        };
        for cause in error.causes() {
            row(Tone::Plain, "caused by: ", &one_line(&cause));
        }
        for blocker in &error.blockers {
            let (code, reason) = (clean(&blocker.code), clean(&blocker.reason));
            row(Tone::Bad, "blocker ", &format!("[{code}]: {reason}"));
            row(Tone::Plain, "    remedy: ", &clean(&blocker.remedy));
        }
        for hint in &error.hints {
            row(Tone::Hint, "hint: ", &clean(hint));
        }
        to_stderr(&text);
    }

    /// Starts a progress display for one long step of `total` bytes.
    pub fn progress(&self, label: &str, total: u64) -> Progress {
        let bar = (self.progress == ProgressMode::Auto).then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let style =
                ProgressStyle::with_template("{msg:>12} [{wide_bar}] {bytes}/{total_bytes} {rate}");
            if let Ok(style) = style {
                let style = style.with_key("rate", rate_and_left);
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_message(label.to_string());
            bar
        });
        Progress {
            mode: self.progress,
            label: label.to_string(),
            total,
            skipped: 0,
            start: Instant::now(),
            last: Mutex::new(None),
            bar,
        }
    }
}

impl Ui {
    /// Starts a display of how many of `total` tasks are finished.
    pub fn board(&self, total: u64) -> Board {
        let bar = (self.progress == ProgressMode::Auto).then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("[{bar:20}] {elapsed} {wide_msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        Board {
            ui: self.clone(),
            last: Mutex::new(None),
            bar,
        }
    }
}

/// The rate and the time left; empty before the first byte, when both are unknown.
fn rate_and_left(state: &ProgressState, out: &mut dyn std::fmt::Write) {
    if state.pos() > 0 {
        let (rate, left) = (
            BinaryBytes(state.per_sec() as u64),
            HumanDuration(state.eta()),
        );
        let _ = write!(out, "{rate}/s, {left:#} left");
    }
}

/// The progress of several tasks at a time.
pub struct Board {
    ui: Ui,
    last: Mutex<Option<Instant>>,
    bar: Option<ProgressBar>,
}

impl Board {
    /// Updates the display if it is due: the text is only made then.
    pub fn set(&self, done: u64, text: &dyn Fn() -> String, line: &dyn Fn() -> Value) {
        let interval = match self.ui.progress {
            ProgressMode::Auto | ProgressMode::Json => JSON_INTERVAL,
            ProgressMode::Plain => PLAIN_INTERVAL,
            ProgressMode::None => return,
        };
        let now = Instant::now();
        if let Ok(mut last) = self.last.lock() {
            if last.is_some_and(|t| now - t < interval) {
                return;
            }
            *last = Some(now);
        }
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(clean(&text()));
            }
            None if self.ui.progress == ProgressMode::Json => err!("{}", line()),
            None => err!("{:>12} {}", "Running", clean(&text())),
        }
    }

    /// Reports the end of one task: a permanent line, or an event for readers of JSON.
    pub fn ended(&self, verb: &str, what: &str, event: &Value) {
        if self.ui.progress == ProgressMode::Json {
            eprintln!("{event}");
        } else {
            self.status(verb, what);
        }
    }

    /// Prints a permanent line.
    pub fn status(&self, verb: &str, what: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.ui.status(verb, what)),
            None => self.ui.status(verb, what),
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Displays the elapsed time of a step without known progress, until it is dropped.
pub struct Waiting {
    spinner: Option<ProgressBar>,
    /// Closed when the wait is over.
    over: Option<std::sync::mpsc::Sender<()>>,
}

impl Ui {
    pub fn waiting(&self, label: &str) -> Waiting {
        let spinner = (self.progress == ProgressMode::Auto).then(|| {
            let spinner = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{msg:>12} {spinner} {elapsed}") {
                spinner.set_style(style);
            }
            spinner.set_message(label.to_string());
            spinner.enable_steady_tick(Duration::from_millis(120));
            spinner
        });
        let (interval, json) = match self.progress {
            ProgressMode::Plain => (WAITING_INTERVAL, false),
            ProgressMode::Json => (Duration::from_secs(1), true),
            _ => {
                return Waiting {
                    spinner,
                    over: None,
                };
            }
        };
        let (over, is_over) = std::sync::mpsc::channel();
        let (label, start) = (label.to_string(), Instant::now());
        // Without a thread, the wait is silent.
        let _ = std::thread::Builder::new()
            .name("waiting".into())
            .spawn(move || {
                use std::sync::mpsc::RecvTimeoutError::Timeout;
                while is_over.recv_timeout(interval) == Err(Timeout) {
                    let seconds = start.elapsed().as_secs();
                    if json {
                        err!(
                            "{}",
                            json!({
                                "version": env!("CARGO_PKG_VERSION"),
                                "schema": "hyper2kvm/progress/1",
                                "step": label, "seconds": seconds,
                            })
                        );
                    } else {
                        err!("{label:>12} {seconds} s");
                    }
                }
            });
        Waiting {
            spinner,
            over: Some(over),
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.over.take();
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
    }
}

/// The envelope of every JSON document.
pub fn document(command: &str, mut body: Value) -> Value {
    text::called_in(&mut body);
    let mut document = json!({
        "schema": format!("hyper2kvm/{command}/1"),
        "version": env!("CARGO_PKG_VERSION"),
    });
    if let (Value::Object(document), Value::Object(body)) = (&mut document, body) {
        document.extend(body);
    }
    document
}

/// The interval of lines in JSON mode: at most five per second.
const JSON_INTERVAL: Duration = Duration::from_millis(200);
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);
const WAITING_INTERVAL: Duration = Duration::from_secs(15);

pub struct Progress {
    mode: ProgressMode,
    label: String,
    total: u64,
    skipped: u64,
    start: Instant,
    last: Mutex<Option<Instant>>,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Sets the number of additional bytes that need no work.
    pub fn skipping(mut self, bytes: u64) -> Self {
        self.skipped = bytes;
        self
    }

    /// Updates the display: `done` bytes of the total are finished.
    pub fn set(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            return;
        }
        if self.is_due(Instant::now()) {
            self.show(done);
        }
    }

    /// Whether a line may be written now; it then counts as written.
    fn is_due(&self, now: Instant) -> bool {
        let interval = match self.mode {
            ProgressMode::Plain => PLAIN_INTERVAL,
            ProgressMode::Json => JSON_INTERVAL,
            _ => return false,
        };
        let Ok(mut last) = self.last.lock() else {
            return false;
        };
        let due = last.is_none_or(|t| now.saturating_duration_since(t) >= interval);
        if due {
            *last = Some(now);
        }
        due
    }

    fn show(&self, done: u64) {
        let elapsed = self.start.elapsed().as_secs_f64();
        let rate = done as f64 / elapsed.max(0.001);
        let left = (done > 0).then(|| (self.total.saturating_sub(done)) as f64 / rate);
        if self.mode == ProgressMode::Json {
            err!("{}", self.json(done, rate, left));
        } else {
            err!("{}", self.plain(done, rate, left));
        }
    }

    fn left_out(&self) -> String {
        let skipped = bytes(self.skipped);
        match FETCHED.get() {
            Some(fetched) => format!("{skipped} skipped, {} fetched", bytes(fetched())),
            None => format!("{skipped} skipped"),
        }
    }

    fn plain(&self, done: u64, rate: f64, left: Option<f64>) -> String {
        let (label, total) = (&self.label, bytes(self.total));
        let mut line = format!("{label:>12} {} of {total}", bytes(done));
        if self.skipped > 0 || FETCHED.get().is_some() {
            line += &format!(" ({})", self.left_out());
        }
        // Unknown before the first byte.
        if let Some(left) = left {
            line += &format!(", {}/s, {left:.0} s left", bytes(rate as u64));
        }
        line
    }

    /// Prints one line for a wrapper, which may want to check the version before anything else.
    fn json(&self, done: u64, rate: f64, left: Option<f64>) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"), "schema": "hyper2kvm/progress/1",
            "step": self.label, "done_bytes": done, "total_bytes": self.total,
            "skipped_bytes": self.skipped, "bytes_per_second": rate as u64,
            "seconds_left": left.map(|s| s as u64),
            "fetched_bytes": FETCHED.get().map_or(0, |fetched| fetched()),
        })
    }

    /// Ends the display with everything done; `done` is the final amount.
    pub fn finish(self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
            return;
        }
        if self.mode == ProgressMode::Json {
            let last = self.last.lock().ok().and_then(|l| *l);
            if let Some(wait) = last.and_then(|l| JSON_INTERVAL.checked_sub(l.elapsed())) {
                std::thread::sleep(wait);
            }
            self.show(done);
        }
    }
}

/// The source of the number of bytes that have crossed the wire, if a source is on another host.
static FETCHED: OnceLock<fn() -> u64> = OnceLock::new();

/// Makes progress displays include the fetched bytes.
pub fn count_fetched(fetched: fn() -> u64) {
    FETCHED.get_or_init(|| fetched);
}

/// A mark, and the text that continues beside it.
fn marked(tone: Tone, mark: &str, text: &str) -> Styled {
    let mut styled = Styled::default();
    styled.push(tone, mark);
    styled.hang();
    styled.push(Tone::Plain, one_line(text));
    styled
}

fn to_stderr(text: &Styled) {
    let stderr = io::stderr();
    let (colour, width) = (takes_colour(&stderr), layout::width(&stderr));
    err!("{}", layout::render(text, colour, width));
}

fn pretty(value: &Value) -> String {
    format!("{value:#}")
}

/// Writes to stdout. A closed pipe (`| head`) is the reader's choice, not an error; any other
/// failure is.
fn out(text: &str) {
    let mut stdout = io::stdout().lock();
    let written = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    if let Err(error) = written
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        LOST.get_or_init(|| error.to_string());
    }
}

/// The reason why the result was not written to stdout.
static LOST: OnceLock<String> = OnceLock::new();

/// Returns the reason why the result was not written to stdout, if it was not.
pub fn lost_output() -> Option<&'static str> {
    LOST.get().map(String::as_str)
}

/// Removes characters that could control a terminal: control characters and bidirectional
/// overrides.
pub fn clean(text: &str) -> String {
    text::called(text)
        .chars()
        .filter(|c| !steers_terminal(*c))
        .collect()
}

/// Joins the several lines of a program's output.
fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    clean(&lines.collect::<Vec<_>>().join("; "))
}

fn steers_terminal(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Formats `1536` as `1.5 KiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Formats `1 file`, `2 files`, `3 entries`.
pub fn count(n: impl TryInto<u64>, word: &str) -> String {
    let n = n.try_into().unwrap_or(u64::MAX);
    let vowel = |c: char| "aeiou".contains(c);
    match word.strip_suffix('y') {
        _ if n == 1 => format!("1 {word}"),
        Some(stem) if !stem.ends_with(vowel) => format!("{n} {stem}ies"),
        _ if word.ends_with(['s', 'x']) => format!("{n} {word}es"),
        _ => format!("{n} {word}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plurals() {
        for (n, word, text) in [
            (0, "file", "0 files"),
            (1, "file", "1 file"),
            (2, "entry", "2 entries"),
            (2, "key", "2 keys"),
            (2, "process", "2 processes"),
        ] {
            assert_eq!(count(n, word), text);
        }
    }

    #[test]
    fn guest_text_cannot_steer_the_terminal() {
        assert_eq!(clean("a\x1b[31mb\r\nc\u{202e}d"), "a[31mbcd");
        assert_eq!(one_line("error: a\nerror: b\r\n"), "error: a; error: b");
    }

    #[test]
    fn byte_units() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 40), "3.0 TiB");
    }

    #[test]
    fn progress_lines() {
        let progress = Ui::new(false, 1, ProgressMode::Json)
            .progress("Copying", 100)
            .skipping(900);
        let line = progress.json(25, 50.0, Some(1.5)).to_string();
        assert!(line.starts_with("{\"version\":\""), "{line}");
        // Another test may have connected to a remote source.
        assert!(
            line.contains(
                "\"step\":\"Copying\",\"done_bytes\":25,\"total_bytes\":100,\
                 \"skipped_bytes\":900,\"bytes_per_second\":50,\"seconds_left\":1,\"fetched_bytes\":"
            ),
            "{line}"
        );
        assert_eq!(
            progress.plain(25, 50.0, Some(1.5)),
            "     Copying 25 B of 100 B (900 B skipped), 50 B/s, 2 s left"
        );
        assert_eq!(
            progress.plain(0, 0.0, None),
            "     Copying 0 B of 100 B (900 B skipped)"
        );
    }

    #[test]
    fn not_too_many_lines() {
        for (mode, wanted) in [
            (ProgressMode::Json, 50),
            (ProgressMode::Plain, 2),
            (ProgressMode::None, 0),
        ] {
            let progress = Ui::new(false, 1, mode).progress("Copying", 100);
            let start = Instant::now();
            let ticks = (0..10_000).map(|ms| start + Duration::from_millis(ms));
            let lines = ticks.filter(|now| progress.is_due(*now)).count();
            assert_eq!(lines, wanted, "{mode:?} in 10 s");
        }
    }

    #[test]
    fn documents_start_with_schema_and_version() {
        let text = document("inspect", json!({"a": 1})).to_string();
        assert!(
            text.starts_with("{\"schema\":\"hyper2kvm/inspect/1\",\"version\":"),
            "{text}"
        );
    }
}
