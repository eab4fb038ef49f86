//! [`Cmd`], the only code that runs another program, and [`Child`], the guard of a running one.
//!
//! By default stdin is empty. The locale is fixed, stdout is limited or passed on in chunks, and
//! the error has the tail of stderr. A child runs in its own process group. The group is killed as
//! a whole when the guard is dropped, at the time limit, and when [`stop`] is requested.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::confine::Confinement;
use super::pass::{self, Passed};
use super::privileges::Privileges;
use super::{Result, ToolError, host, launcher};
use crate::failpoint;
use crate::stop;

const STDOUT_LIMIT: usize = 64 << 20;
const STDERR_TAIL: usize = 8 << 10;
/// The interval at which the stop flag and the time limit are checked while a child is silent.
const TICK: Duration = Duration::from_millis(20);
/// The time for output after the child itself has ended. A grandchild may have inherited the pipe
/// and keep it open for ever.
const DRAIN: Duration = Duration::from_secs(3);

/// The time for which a program that is run to its end may be silent before it counts as hung.
const SILENCE: Duration = Duration::from_secs(600);
/// The variable with another limit, in seconds: for slower storage, and for the tests.
const SILENCE_VARIABLE: &str = "HYPER2KVM_TOOL_SILENCE";

/// The interval of requests to a program to end.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// The time for a program to end with this run: it may have to write data.
const PATIENCE: Duration = Duration::from_secs(30);

/// The time for which a program, or the storage daemon's socket, may be silent.
pub fn silence() -> Duration {
    let seconds = std::env::var(SILENCE_VARIABLE)
        .ok()
        .and_then(|s| s.parse().ok());
    seconds.map_or(SILENCE, Duration::from_secs)
}

/// Environment variables with keys.
static KEYS: Mutex<BTreeSet<OsString>> = Mutex::new(BTreeSet::new());

fn keys() -> MutexGuard<'static, BTreeSet<OsString>> {
    KEYS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes this environment variable from the environment of every program except hyper2kvm itself.
pub fn keep_from_tools(name: &str) {
    keys().insert(name.into());
}

/// The program and its arguments, without its environment, which may contain keys.
fn shown(command: &std::process::Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| format!("{word:?}")).collect();
    words.join(" ")
}

/// A program with its arguments, not yet running.
#[derive(Debug)]
pub struct Cmd {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    folder: Option<PathBuf>,
    stdin: Option<OwnedFd>,
    output: Option<(OwnedFd, OwnedFd)>,
    timeout: Option<Duration>,
    silence: Duration,
    stdout_limit: usize,
    accept: Vec<i32>,
    privileges: Privileges,
    confinement: Confinement,
    passed: Vec<Passed>,
    /// Whether the program is this one again, in another role.
    own: bool,
    stop: fn() -> bool,
    cancel: Option<Arc<AtomicBool>>,
}

/// The output of a program that ended with an accepted code.
#[derive(Debug)]
pub struct Output {
    /// 0, or one of the codes given to [`Cmd::accept`].
    pub code: i32,
    pub stdout: Vec<u8>,
    /// The tail of stderr, control characters removed.
    pub stderr: String,
}

impl Cmd {
    /// Creates a command. A name is looked up with [`super::find`]; a path is used unchanged.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            folder: None,
            stdin: None,
            output: None,
            timeout: None,
            silence: silence(),
            stdout_limit: STDOUT_LIMIT,
            accept: Vec::new(),
            privileges: Privileges::None,
            confinement: Confinement::default(),
            passed: Vec::new(),
            own: false,
            stop: stop::requested,
            cancel: None,
        }
    }

    /// Creates a command for this program itself, in the role `verb` and with its process id as the
    /// argument. Only if the launcher is enabled.
    pub(crate) fn own(verb: &str) -> Self {
        Self {
            own: true,
            ..Self::new(verb)
        }
    }

    /// Restricts what the program may reach; by default it may reach everything that this process
    /// may.
    #[must_use]
    pub fn confined(mut self, confinement: Confinement) -> Self {
        self.confinement = confinement;
        self
    }

    /// Passes open files to the program. In its messages they are renamed to the paths that people
    /// use.
    #[must_use]
    pub fn pass(mut self, files: &[Passed]) -> Self {
        self.passed.extend_from_slice(files);
        self
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args
            .extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working directory of the program.
    #[must_use]
    pub fn folder(mut self, folder: impl AsRef<Path>) -> Self {
        self.folder = Some(folder.as_ref().to_owned());
        self
    }

    /// Sets the stdin of the program, instead of an empty one: a file, a pipe, a listening socket.
    #[must_use]
    pub fn stdin(mut self, fd: impl Into<OwnedFd>) -> Self {
        self.stdin = Some(fd.into());
        self
    }

    /// Redirects stdout and stderr: to two handles of one pipe for a conversation in which their
    /// order matters. For [`Cmd::spawn`].
    #[must_use]
    pub fn output(mut self, stdout: impl Into<OwnedFd>, stderr: impl Into<OwnedFd>) -> Self {
        self.output = Some((stdout.into(), stderr.into()));
        self
    }

    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = Some(limit);
        self
    }

    /// Multiplies the time for which the program may be silent on stdout: it prints little.
    #[must_use]
    pub fn patient(mut self, times: u32) -> Self {
        self.silence = self.silence.saturating_mul(times);
        self
    }

    /// Sets the number of bytes that [`Cmd::run`] collects before it fails.
    #[must_use]
    pub fn stdout_limit(mut self, bytes: usize) -> Self {
        self.stdout_limit = bytes;
        self
    }

    /// Exit codes besides 0 that are not a failure.
    #[must_use]
    pub fn accept(mut self, codes: &[i32]) -> Self {
        self.accept.extend(codes);
        self
    }

    /// Sets which privileges of this process the program keeps; by default none.
    #[must_use]
    pub fn privileges(mut self, privileges: Privileges) -> Self {
        self.privileges = privileges;
        self
    }

    /// Continues after [`stop`] was requested: for clean-up that must still happen.
    #[must_use]
    pub fn ignore_stop(mut self) -> Self {
        self.stop = || false;
        self
    }

    /// Kills the program when the flag is raised. That is [`ToolError::Interrupted`], as for the
    /// stop flag of the whole process.
    pub fn cancel_with(mut self, flag: Option<Arc<AtomicBool>>) -> Self {
        self.cancel = flag;
        self
    }

    /// Runs the program to its end and collects its output.
    pub fn run(self) -> Result<Output> {
        let limit = self.stdout_limit;
        let mut stdout = Vec::new();
        let mut full = false;
        let (code, stderr, tool) = self.run_until(&mut |chunk| {
            full = stdout.len() + chunk.len() > limit;
            if !full {
                stdout.extend_from_slice(chunk);
            }
            !full
        })?;
        if full {
            return Err(ToolError::TooMuchOutput { tool, limit });
        }
        Ok(Output {
            code,
            stdout,
            stderr,
        })
    }

    /// Runs the program to its end and passes on its stdout as it arrives.
    pub fn run_with(self, on_stdout: &mut dyn FnMut(&[u8])) -> Result<Output> {
        let (code, stderr, _) = self.run_until(&mut |chunk| {
            on_stdout(chunk);
            true
        })?;
        Ok(Output {
            code,
            stdout: Vec::new(),
            stderr,
        })
    }

    /// Like [`Cmd::run_with`], but kills the child when `on_stdout` returns false.
    fn run_until(self, on_stdout: &mut dyn FnMut(&[u8]) -> bool) -> Result<(i32, String, String)> {
        #[cfg(test)]
        if let Some(said) = crate::disk::stand_in::answer(&self.program, &self.args) {
            on_stdout(&said);
            return Ok((0, String::new(), String::new()));
        }
        let started = Instant::now();
        let (timeout, stop, accept) = (self.timeout, self.stop, self.accept.clone());
        let silence = self.silence;
        let mut last_output = started;
        let cancel = self.cancel.clone();
        let cancelled = || cancel.as_ref().is_some_and(|c| c.load(Ordering::SeqCst));
        let name = Path::new(&self.program)
            .file_name()
            .unwrap_or(&self.program);
        let step = self.step(&name.to_string_lossy());
        let mut child = self.start(true)?;
        let tool = child.tool.clone();
        let mut ended: Option<(ExitStatus, Instant)> = None;
        loop {
            match child.events.recv_timeout(TICK) {
                Ok(chunk) => {
                    last_output = Instant::now();
                    if !on_stdout(&chunk) {
                        child.kill();
                        return Ok((-1, String::new(), tool));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    // Both pipes are closed, so the program is about to end.
                    if ended.is_some() {
                        break;
                    }
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if stop() || cancelled() {
                return Err(stop::Interrupted.into());
            }
            if let Some(after) = timeout
                && started.elapsed() > after
            {
                return Err(ToolError::TimedOut { tool, after });
            }
            if last_output.elapsed() > silence {
                let after = silence;
                return Err(ToolError::TimedOut { tool, after });
            }
            match ended {
                None => ended = child.try_wait()?.map(|status| (status, Instant::now())),
                Some((_, when)) if when.elapsed() > DRAIN => break,
                Some(_) => {}
            }
        }
        let Some((status, _)) = ended else {
            return Err(ToolError::output(&tool, "no exit status"));
        };
        failpoint::step("after", &step).map_err(|source| ToolError::Io {
            tool: tool.clone(),
            source,
        })?;
        let stderr = child.stderr_tail();
        match status.code() {
            Some(code) if code == 0 || accept.contains(&code) => Ok((code, stderr, tool)),
            _ => Err(ToolError::Failed {
                tool,
                status,
                stderr,
            }),
        }
    }

    /// Starts the program and leaves it running, with its stdout discarded. The limits and the stop
    /// flag do not apply.
    pub fn spawn(self) -> Result<Child> {
        self.start(false)
    }

    fn command(&self) -> Result<(std::process::Command, String)> {
        let tool = Path::new(&self.program)
            .file_name()
            .unwrap_or(&self.program)
            .to_string_lossy()
            .into_owned();
        let mut command = if self.own {
            launcher::own(&tool)
        } else {
            let program = super::find(&self.program).ok_or_else(|| ToolError::NotFound {
                hint: host::hint(&tool),
                tool: tool.clone(),
            })?;
            launcher::command(&program, self.privileges, &self.confinement)
        };
        if self.privileges != Privileges::Ours {
            for name in &*keys() {
                command.env_remove(name);
            }
        }
        command
            .args(&self.args)
            .env("LC_ALL", "C")
            .envs(self.env.iter().map(|(name, value)| (name, value)));
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        Ok((command, tool))
    }

    /// The name of the call among the failpoints: the program and its subcommand.
    fn step(&self, tool: &str) -> String {
        let verb = self.args.first().and_then(|arg| arg.to_str());
        match verb.filter(|verb| verb.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')) {
            Some(verb) if !self.own => format!("{tool} {}", verb.trim_start_matches('-')),
            _ => tool.to_owned(),
        }
    }

    fn start(mut self, want_stdout: bool) -> Result<Child> {
        let (mut command, tool) = self.command()?;
        let step = self.step(&tool);
        let (stdout, stderr) = match self.output.take() {
            Some((stdout, stderr)) => (stdout.into(), stderr.into()),
            None if want_stdout => (Stdio::piped(), Stdio::piped()),
            None => (Stdio::null(), Stdio::piped()),
        };
        command
            .stdin(self.stdin.take().map_or_else(Stdio::null, Stdio::from))
            .stdout(stdout)
            .stderr(stderr)
            .process_group(0);
        tracing::debug!(command = shown(&command), "starting");
        let fail = |source| ToolError::Io {
            tool: tool.clone(),
            source,
        };
        failpoint::step("before", &step).map_err(fail)?;
        let names = self.passed.iter().map(Passed::shown_by_name).collect();
        let passed = std::mem::take(&mut self.passed);
        let mut child = launcher::spawn(command, passed).map_err(fail)?;
        let (sender, events) = mpsc::channel();
        let stderr = Arc::new(Mutex::new(Vec::new()));
        let pipes = (child.stdout.take(), child.stderr.take());
        // The guard exists before anything below can fail.
        let guard = Child {
            child,
            tool: tool.clone(),
            events,
            stderr: stderr.clone(),
            names,
            status: None,
        };
        if !want_stdout {
            failpoint::step("after", &step).map_err(fail)?;
        }
        if let Some(pipe) = pipes.0 {
            let sender = sender.clone();
            reader(move || forward(pipe, &sender)).map_err(fail)?;
        }
        if let Some(pipe) = pipes.1 {
            reader(move || {
                keep_tail(pipe, &stderr);
                // The channel is closed when both pipes are.
                drop(sender);
            })
            .map_err(fail)?;
        }
        Ok(guard)
    }
}

fn reader(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new()
        .name("pipe".into())
        .spawn(work)
        .map(drop)
}

fn forward(mut pipe: impl Read, sender: &Sender<Vec<u8>>) {
    let mut buf = vec![0; 64 << 10];
    loop {
        match pipe.read(&mut buf) {
            Ok(0) => break,
            Ok(n) => {
                if sender.send(buf[..n].to_vec()).is_err() {
                    break;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
}

fn keep_tail(mut pipe: impl Read, tail: &Mutex<Vec<u8>>) {
    let mut buf = [0; 4096];
    loop {
        match pipe.read(&mut buf) {
            Ok(0) => break,
            Ok(n) => {
                let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
                tail.extend_from_slice(&buf[..n]);
                let excess = tail.len().saturating_sub(STDERR_TAIL);
                tail.drain(..excess);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
}

/// Makes output of a program safe to print: control characters except line ends are removed, ends
/// trimmed.
pub fn clean(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .replace('\r', "\n")
        .chars()
        .filter(|&c| c == '\n' || !c.is_control())
        .collect::<String>()
        .trim()
        .to_owned()
}

/// A running program. Dropping it kills the program's whole process group.
#[derive(Debug)]
pub struct Child {
    child: std::process::Child,
    tool: String,
    /// Chunks of stdout; disconnected when stdout and stderr are both closed.
    events: Receiver<Vec<u8>>,
    stderr: Arc<Mutex<Vec<u8>>>,
    /// The names of the passed files.
    names: Vec<(String, PathBuf)>,
    status: Option<ExitStatus>,
}

impl Child {
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The exit status if the program has ended.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait().map_err(|source| ToolError::Io {
                tool: self.tool.clone(),
                source,
            })?;
        }
        Ok(self.status)
    }

    /// The last output of the program on stderr, control characters removed.
    pub fn stderr_tail(&self) -> String {
        let stderr = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        pass::with_names(clean(&stderr), &self.names)
    }

    /// Waits for the program to end; fails if its status is not 0.
    pub fn wait(&mut self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        // Most children end at once.
        let mut pause = Duration::from_micros(50);
        let status = loop {
            if let Some(status) = self.try_wait()? {
                break status;
            }
            if start.elapsed() > limit {
                return Err(ToolError::TimedOut {
                    tool: self.tool.clone(),
                    after: limit,
                });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        };
        // All of stderr has arrived when the channel is disconnected.
        while start.elapsed() < limit
            && !matches!(
                self.events.recv_timeout(DRAIN),
                Err(RecvTimeoutError::Disconnected | RecvTimeoutError::Timeout)
            )
        {}
        if status.success() {
            return Ok(());
        }
        Err(ToolError::Failed {
            tool: self.tool.clone(),
            status,
            stderr: self.stderr_tail(),
        })
    }

    /// Asks the program to end (SIGTERM, again every second) and waits. Kills it at the limit, or
    /// sooner if this run has to end. Fails if the program had already ended, had to be killed, or
    /// ended with a failure.
    pub fn close(mut self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            let limit = match stop::requested() {
                true => limit.min(PATIENCE),
                false => limit,
            };
            let left = limit.saturating_sub(start.elapsed());
            if self.try_wait()?.is_none() {
                self.signal(Signal::TERM);
            }
            match self.wait(left.min(ASK_AGAIN)) {
                Err(ToolError::TimedOut { .. }) if left > ASK_AGAIN => {}
                Err(ToolError::TimedOut { tool, .. }) => {
                    return Err(ToolError::TimedOut { tool, after: limit });
                }
                ended => return ended,
            }
        }
    }

    /// Asks the program to end (SIGTERM) without waiting for it.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Kills the program and all its descendants, and reaps it.
    pub fn kill(&mut self) {
        if matches!(self.try_wait(), Ok(Some(_))) {
            return;
        }
        self.signal(Signal::KILL);
        let _ = self.child.kill();
        self.status = self.child.wait().ok();
    }

    fn signal(&self, signal: Signal) {
        // The child is not reaped yet, so its id cannot belong to another process.
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Cmd {
        Cmd::new("sh").args(["-c", script])
    }

    #[test]
    fn collects_output() {
        let out = sh("echo out; echo err >&2; cat; echo $LC_ALL")
            .run()
            .unwrap();
        assert_eq!(
            (out.code, &*out.stdout, &*out.stderr),
            (0, &b"out\nC\n"[..], "err")
        );
        let out = Cmd::new("printf")
            .args(["%s|", "a b", "$HOME", "", "*"])
            .run()
            .unwrap();
        assert_eq!(out.stdout, b"a b|$HOME||*|");
        let out = sh("pwd; echo $X").folder("/").env("X", "y").run().unwrap();
        assert_eq!(out.stdout, b"/\ny\n");
    }

    #[test]
    fn failure_has_the_tail_of_stderr() {
        let script = "i=0; while [ $i -lt 3000 ]; do echo \"line $i\" >&2; i=$((i+1)); done; \
                      printf '\\033[31mred\\r\\n' >&2; exit 3";
        match sh(script).run().unwrap_err() {
            ToolError::Failed {
                tool,
                status,
                stderr,
            } => {
                assert_eq!((&*tool, status.code()), ("sh", Some(3)));
                assert!(stderr.len() <= STDERR_TAIL && stderr.len() > STDERR_TAIL / 2);
                assert!(stderr.ends_with("line 2999\n[31mred"), "{stderr}");
            }
            other => panic!("{other}"),
        }
        assert_eq!(sh("exit 3").accept(&[2, 3]).run().unwrap().code, 3);
        assert!(matches!(
            sh("kill -9 $$").run(),
            Err(ToolError::Failed { .. })
        ));
    }

    #[test]
    fn keys_in_the_environment_are_neither_shown_nor_inherited() {
        let cmd = sh("exit 0").env("HYPER2KVM_BATCH_KEY_0", "my secret");
        let (command, _) = cmd.command().unwrap();
        assert!(format!("{command:?}").contains("my secret"));
        let shown = shown(&command);
        assert!(!shown.contains("my secret"), "{shown}");
        assert!(shown.ends_with("\"-c\" \"exit 0\""), "{shown}");
        let removed = |cmd: Cmd| {
            let (command, _) = cmd.command().unwrap();
            let name = OsStr::new("HYPER2KVM_TEST_KEY");
            command.get_envs().any(|variable| variable == (name, None))
        };
        assert!(!removed(sh("exit 0")));
        keep_from_tools("HYPER2KVM_TEST_KEY");
        assert!(removed(sh("exit 0")));
        assert!(!removed(sh("exit 0").privileges(Privileges::Ours)));
    }

    #[test]
    fn missing_program() {
        assert!(matches!(
            Cmd::new("no-such-program-here").run(),
            Err(ToolError::NotFound { .. })
        ));
        assert!(matches!(
            Cmd::new("/no/such/program").spawn(),
            Err(ToolError::NotFound { .. })
        ));
    }

    #[test]
    fn limits() {
        let start = Instant::now();
        assert!(matches!(
            sh("sleep 60 & sleep 60")
                .timeout(Duration::from_millis(60))
                .run(),
            Err(ToolError::TimedOut { .. })
        ));
        assert!(matches!(
            sh("yes").stdout_limit(1 << 20).run(),
            Err(ToolError::TooMuchOutput { limit, .. }) if limit == 1 << 20
        ));
        let mut cmd = sh("sleep 60");
        cmd.stop = || true;
        assert!(matches!(cmd.run(), Err(ToolError::Interrupted(_))));
        // A grandchild that keeps the pipes open does not delay the end.
        assert_eq!(sh("sleep 60 & echo x").run().unwrap().stdout, b"x\n");
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn streams() {
        let mut got = Vec::new();
        let out = sh("printf 'a\\rb\\rc'")
            .run_with(&mut |chunk| got.extend_from_slice(chunk))
            .unwrap();
        assert_eq!((&*got, &*out.stdout), (&b"a\rb\rc"[..], &b""[..]));
    }

    #[test]
    fn guard_kills_and_close_checks() {
        let alive = |pid: u32| Path::new(&format!("/proc/{pid}")).exists();
        let child = sh("sleep 60; true").spawn().unwrap();
        let pid = child.id();
        assert!(alive(pid));
        drop(child);
        assert!(!alive(pid));

        let second = Duration::from_secs(5);
        let child = sh("trap 'exit 0' TERM; echo ready >&2; while :; do sleep 0.01; done")
            .spawn()
            .unwrap();
        while child.stderr_tail().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.close(second).unwrap();
        assert!(matches!(
            sh("exec sleep 60").spawn().unwrap().close(second),
            Err(ToolError::Failed { .. })
        ));
        let mut child = sh("echo why >&2; exit 4").spawn().unwrap();
        match child.wait(second).unwrap_err() {
            ToolError::Failed { stderr, status, .. } => {
                assert_eq!((&*stderr, status.code()), ("why", Some(4)));
            }
            other => panic!("{other}"),
        }
        // It ignores the first one.
        let child =
            sh("trap 'trap \"exit 0\" TERM' TERM; echo ready >&2; while :; do sleep 0.01; done");
        let child = child.spawn().unwrap();
        while child.stderr_tail().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.close(4 * second).unwrap();
        let child = sh("trap '' TERM; echo ready >&2; while :; do sleep 0.01; done")
            .spawn()
            .unwrap();
        let pid = child.id();
        while child.stderr_tail().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(matches!(
            child.close(Duration::from_millis(50)),
            Err(ToolError::TimedOut { .. })
        ));
        assert!(!alive(pid));
    }

    #[test]
    fn stdin_is_what_was_given() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"hello", 0).unwrap();
        assert_eq!(Cmd::new("cat").stdin(file).run().unwrap().stdout, b"hello");
    }
}
