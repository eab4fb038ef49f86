//! Named places at which a run can be made to fail, wait or die: for tests of recovery.
//!
//! `HYPER2KVM_FAILPOINT=name=action` arms one of them. `fail` returns an error, and `kill` ends the
//! process by SIGKILL. `wait` continues after a signal has requested the end. `pause` stops the
//! process (SIGSTOP) until it is continued. In a confined child `abort` crashes, and `hang` never
//! returns. `starve` allocates all memory and continues, and `escape` tries actions that must be
//! impossible for a child. `orphan` kills the children of this process and continues. `start:FILE`
//! runs a program with all present restrictions of this process, and continues. Several are
//! separated by commas.
//!
//! In addition to named places there are steps: before and after every action, every program and
//! every rename, e.g. `before qemu-img info #2`. `*=record:FILE` appends the names of all places
//! that a run passes to FILE; each can be armed like any other. Without the variable nothing
//! happens. The names are listed in `docs/reliability.md`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpid, kill_process};

use crate::stop;

pub const VARIABLE: &str = "HYPER2KVM_FAILPOINT";
/// The limit of a wait: a test that forgets a waiting process must not block the host.
const LONGEST_WAIT: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Fail,
    Kill,
    Wait,
    Pause,
    Abort,
    Hang,
    Starve,
    Escape,
    Orphan,
    Start(PathBuf),
    Record(PathBuf),
}

fn armed() -> &'static [(String, Action)] {
    static ARMED: OnceLock<Vec<(String, Action)>> = OnceLock::new();
    ARMED.get_or_init(|| {
        let setting = std::env::var(VARIABLE).unwrap_or_default();
        setting.split(',').filter_map(parse).collect()
    })
}

fn parse(setting: &str) -> Option<(String, Action)> {
    let (name, action) = setting.split_once('=')?;
    let action = match action {
        "fail" => Action::Fail,
        "kill" => Action::Kill,
        "wait" => Action::Wait,
        "pause" => Action::Pause,
        "abort" => Action::Abort,
        "hang" => Action::Hang,
        "starve" => Action::Starve,
        "escape" => Action::Escape,
        "orphan" => Action::Orphan,
        other => match other.strip_prefix("start:") {
            Some(program) => Action::Start(program.into()),
            None => Action::Record(other.strip_prefix("record:")?.into()),
        },
    };
    Some((name.to_string(), action))
}

/// A step of the work; `when` is `before` or `after`. Repeated steps are numbered.
pub fn step(when: &str, what: &str) -> io::Result<()> {
    static SEEN: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());
    if armed().is_empty() {
        return Ok(());
    }
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    let name = format!("{when} {what}");
    let number = seen.entry(name.clone()).or_default();
    *number += 1;
    let name = format!("{name} #{number}");
    for (_, action) in armed() {
        if let Action::Record(file) = action {
            let mut file = File::options().append(true).create(true).open(file)?;
            writeln!(file, "{name}")?;
        }
    }
    drop(seen);
    hit(&name)
}

/// Carries out the action that the environment sets for this point, usually none.
pub fn hit(name: &str) -> io::Result<()> {
    let Some((_, action)) = armed().iter().find(|(armed, _)| armed == name) else {
        return Ok(());
    };
    match action {
        Action::Fail => Err(io::Error::other(format!("fail point {name}"))),
        Action::Kill => {
            kill_process(getpid(), Signal::KILL)?;
            Ok(())
        }
        Action::Pause => {
            kill_process(getpid(), Signal::STOP)?;
            Ok(())
        }
        Action::Abort => std::process::abort(),
        Action::Hang => loop {
            std::hint::spin_loop();
        },
        Action::Starve => {
            starve();
            Ok(())
        }
        Action::Record(_) => Ok(()),
        Action::Start(program) => {
            #[expect(
                clippy::disallowed_methods,
                reason = "the wrapper would take more away"
            )]
            let mut command = std::process::Command::new(program);
            command.stdin(std::process::Stdio::null()).status()?;
            Ok(())
        }
        Action::Orphan => {
            for thread in std::fs::read_dir("/proc/self/task")? {
                let children = std::fs::read_to_string(thread?.path().join("children"))?;
                for child in children.split_whitespace() {
                    if let Some(pid) = child.parse().ok().and_then(Pid::from_raw) {
                        kill_process(pid, Signal::KILL)?;
                    }
                }
            }
            Ok(())
        }
        Action::Escape => Err(io::Error::other(escape())),
        Action::Wait => {
            tracing::warn!("fail point {name}: waiting");
            let start = Instant::now();
            while !stop::requested() && start.elapsed() < LONGEST_WAIT {
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        }
    }
}

/// Allocates memory until only little is left. Only with a memory limit.
fn starve() {
    let mut size = 1 << 30;
    while size >= 4 << 10 {
        let mut memory = Vec::<u8>::new();
        match memory.try_reserve_exact(size) {
            Ok(()) => std::mem::forget(memory),
            Err(_) => size /= 2,
        }
    }
}

fn writable(path: &str) -> bool {
    File::options().write(true).open(path).is_ok()
}

fn starts(program: &str) -> bool {
    #[expect(clippy::disallowed_methods, reason = "it must not be possible")]
    let mut command = std::process::Command::new(program);
    command.status().is_ok()
}

/// Tries to escape from a confined process, and lists what was possible.
fn escape() -> String {
    let tried: [(&str, bool); 10] = [
        ("read a file", std::fs::read("/etc/passwd").is_ok()),
        ("list a directory", std::fs::read_dir("/").is_ok()),
        (
            "write a file",
            std::fs::write("/tmp/hyper2kvm-escaped", "").is_ok(),
        ),
        (
            "change the kernel's settings",
            writable("/proc/sys/kernel/core_pattern"),
        ),
        (
            "write to a device",
            writable("/dev/mem") || writable("/dev/kmsg") || writable("/dev/null"),
        ),
        (
            "use the network",
            std::net::UdpSocket::bind("127.0.0.1:0").is_ok(),
        ),
        (
            "use a Unix socket",
            std::os::unix::net::UnixDatagram::unbound().is_ok(),
        ),
        (
            "start a thread",
            std::thread::Builder::new().spawn(|| ()).is_ok(),
        ),
        ("start a program", starts("/bin/true")),
        (
            "signal its parent",
            rustix::process::getppid()
                .is_some_and(|parent| rustix::process::test_kill_process(parent).is_ok()),
        ),
    ];
    let out: Vec<_> = tried
        .iter()
        .filter(|(_, out)| *out)
        .map(|(what, _)| *what)
        .collect();
    match out.is_empty() {
        true => format!("all {} ways out are closed", tried.len()),
        false => format!("it can {}", out.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings() {
        for (setting, parsed) in [
            ("copied=kill", Some(("copied", Action::Kill))),
            ("copied=wait", Some(("copied", Action::Wait))),
            ("a=fail", Some(("a", Action::Fail))),
            ("copied", None),
            ("a=abort", Some(("a", Action::Abort))),
            ("a=hang", Some(("a", Action::Hang))),
            ("a=starve", Some(("a", Action::Starve))),
            ("*=record:/x", Some(("*", Action::Record("/x".into())))),
            ("a=escape", Some(("a", Action::Escape))),
            ("a=start:/x", Some(("a", Action::Start("/x".into())))),
            ("copied=explode", None),
            ("", None),
        ] {
            let parsed = parsed.map(|(n, a)| (n.to_string(), a));
            assert_eq!(parse(setting), parsed, "{setting}");
        }
        // Not armed in the unit tests.
        hit("copied").unwrap();
    }
}
