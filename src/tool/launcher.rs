//! Starts children so that none outlives this process, even if it is killed by SIGKILL.
//!
//! The kernel can send a child a signal when its parent dies. But only the child can request it,
//! between fork and exec, and doing that in `pre_exec` is unsafe code. So the child is this program
//! again, as `hyper2kvm __exec PARENT_PID FLAGS -- PROGRAM ARGS...`. It requests the signal, gives
//! up its [`Privileges`] and everything denied by its [`Confinement`], and becomes the program.
//!
//! For the kernel, the "parent" is the *thread* that forked. So all children are started from one
//! thread that lives as long as the process.
//!
//! If [`enable`] was not called (unit tests, examples), children are started directly and are only
//! killed by their guards.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::io::FdFlags;
use rustix::process::{Pid, Signal};

use super::confine::{self, Confinement};
use super::pass::Passed;
use super::privileges::Privileges;

const VERB: &str = "__exec";
/// The path of this program in the child, even if its file was replaced in the meantime.
const SELF: &str = "/proc/self/exe";
/// Exit code of the launcher if it could not become the program, as in shells.
const CANNOT_EXEC: u8 = 127;

static ENABLED: OnceLock<()> = OnceLock::new();

/// Makes children start through the launcher. Only for a program whose `main` calls
/// [`run_if_asked`] first.
pub fn enable() {
    if Path::new(SELF).exists() {
        ENABLED.get_or_init(|| ());
    }
}

/// Runs the launcher if this process was started as one. Called first in `main`, with all
/// arguments. Returns `Some` if it could not become the program.
pub fn run_if_asked(args: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let mut args = args.into_iter().skip(1);
    if args.next()? != VERB {
        return None;
    }
    let error = become_program(args);
    // Directly to stderr: the parent collects it, and there is no user interface here.
    let _ = writeln!(io::stderr(), "launcher: {error}");
    Some(ExitCode::from(CANNOT_EXEC))
}

fn become_program(mut args: impl Iterator<Item = OsString>) -> io::Error {
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
    let Some(parent) = args.next().filter(|a| is_pid(a)) else {
        return invalid("no parent process id");
    };
    let Some(privileges) = args.next().as_deref().and_then(Privileges::of_arg) else {
        return invalid("unknown flag");
    };
    let mut confinement = Confinement::default();
    loop {
        match args.next() {
            Some(arg) if arg == "--" => break,
            Some(arg) => {
                if !confinement.add_arg(&arg) {
                    return invalid("no --");
                }
            }
            None => return invalid("no --"),
        }
    }
    let Some(program) = args.next() else {
        return invalid("no program");
    };
    if let Err(e) = tie_to(Some(parent)) {
        return e;
    }
    let args: Vec<OsString> = args.collect();
    let opened: Vec<OsString> = args.iter().cloned().chain(confinement.opened()).collect();
    let given_up = privileges
        .apply(&opened)
        .and_then(|()| confinement.apply(Path::new(&program), &args));
    if let Err(e) = given_up {
        return e;
    }
    #[expect(clippy::disallowed_methods, reason = "this is the wrapper")]
    Command::new(program).args(args).exec()
}

fn pid(arg: &OsStr) -> Option<Pid> {
    Pid::from_raw(arg.to_str()?.parse().ok()?)
}

fn is_pid(arg: &OsStr) -> bool {
    pid(arg).is_some()
}

/// Makes this process die with the parent whose id it was given.
pub(crate) fn tie_to(parent: Option<OsString>) -> io::Result<()> {
    let parent = parent.as_deref().and_then(pid);
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have died before the request: then the signal never arrives.
    if parent.is_none() || rustix::process::getppid() != parent {
        return Err(io::Error::other("the parent is gone"));
    }
    Ok(())
}

/// Whether children start through the launcher, and this program can therefore be its own child.
pub(crate) fn is_enabled() -> bool {
    ENABLED.get().is_some()
}

/// The command for this program again, in another role.
pub(super) fn own(verb: &str) -> Command {
    #[expect(clippy::disallowed_methods, reason = "this is the wrapper")]
    let mut command = Command::new(SELF);
    command.arg(verb).arg(std::process::id().to_string());
    command
}

/// The command for this program again, with a verb that continues after this process has ended. It
/// has its own process group, so Ctrl-C reaches only this process; its output goes to `log`.
pub(crate) fn detached(
    args: &[&OsStr],
    env: (&str, &Path),
    log: &std::fs::File,
) -> io::Result<Child> {
    #[expect(clippy::disallowed_methods, reason = "this is the wrapper")]
    let mut command = Command::new(SELF);
    command
        .args(args)
        .env(env.0, env.1)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .process_group(0)
        .spawn()
}

/// The command that runs `program`, which needs its arguments and then [`spawn`].
pub(super) fn command(
    program: &Path,
    privileges: Privileges,
    confinement: &Confinement,
) -> Command {
    #[expect(clippy::disallowed_methods, reason = "this is the wrapper")]
    let new = |program: &Path| Command::new(program);
    if ENABLED.get().is_none() {
        return new(program);
    }
    let mut command = new(Path::new(SELF));
    command
        .arg(VERB)
        .arg(std::process::id().to_string())
        .arg(privileges.arg())
        .args(confinement.args())
        .arg("--")
        .arg(program);
    command
}

type Request = (Command, Vec<Passed>, Sender<io::Result<Child>>);

/// The thread that starts children; it ends when this is dropped, and its children with it.
static SPAWNER: Mutex<Option<Sender<Request>>> = Mutex::new(None);

/// The threads from before [`renew`]. One of them started the child that connects to a source, and
/// has to live as long.
static EARLIER: Mutex<Vec<Sender<Request>>> = Mutex::new(Vec::new());

/// Replaces the thread that starts children, so that it has lost the same rights as the calling
/// thread. Must be called before the caller gives something up, while no child is running that must
/// be stopped by a signal. Limits belong to a thread. The kernel treats a thread with other limits
/// as foreign, and does not even permit killing its children.
fn renew() {
    let earlier = SPAWNER
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    let mut kept = EARLIER.lock().unwrap_or_else(PoisonError::into_inner);
    kept.extend(earlier);
}

/// Starts the command from the thread that lives as long as the process. The child inherits the
/// passed files.
pub(super) fn spawn(command: Command, passed: Vec<Passed>) -> io::Result<Child> {
    let gone = || io::Error::other("the thread that starts programs is gone");
    let (reply, answer) = mpsc::channel();
    {
        let mut spawner = SPAWNER.lock().unwrap_or_else(PoisonError::into_inner);
        let requests = match &*spawner {
            Some(requests) => requests,
            None => spawner.insert(start_spawner()?),
        };
        requests
            .send((command, passed, reply))
            .map_err(|_| gone())?;
    }
    answer.recv().map_err(|_| gone())?
}

fn start_spawner() -> io::Result<Sender<Request>> {
    let (requests, queue) = mpsc::channel::<Request>();
    std::thread::Builder::new()
        .name("spawner".into())
        .spawn(move || {
            for (command, passed, reply) in queue {
                let _ = reply.send(spawn_with(command, &passed));
            }
        })?;
    Ok(requests)
}

/// The files are inheritable only while this program starts. No other is started in the meantime,
/// because one thread starts them all.
fn spawn_with(mut command: Command, passed: &[Passed]) -> io::Result<Child> {
    let set = |flags| -> io::Result<()> {
        for file in passed {
            rustix::io::fcntl_setfd(file.file(), flags)?;
        }
        Ok(())
    };
    let child = set(FdFlags::empty()).and_then(|()| command.spawn());
    set(FdFlags::CLOEXEC)?;
    child
}

/// Calls [`confine::writes_only`] for this process and the programs that it starts later.
pub fn writes_only(below: &[PathBuf], network: bool) -> io::Result<bool> {
    renew();
    confine::writes_only(below, network)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_its_own_verb() {
        let args = |a: &[&str]| a.iter().map(OsString::from).collect::<Vec<_>>();
        assert!(run_if_asked(args(&["hyper2kvm"])).is_none());
        assert!(run_if_asked(args(&["hyper2kvm", "inspect", "__exec"])).is_none());
        // Malformed requests are rejected before this process is changed.
        for bad in [
            &["h", "__exec"] as &[&str],
            &["h", "__exec", "x"],
            &["h", "__exec", "0", "privileges", "--", "true"],
            &["h", "__exec", "1", "other", "--", "true"],
            &["h", "__exec", "1", "privileges", "true"],
            &["h", "__exec", "1", "privileges", "--"],
        ] {
            assert!(run_if_asked(args(bad)).is_some(), "{bad:?}");
        }
    }
}
