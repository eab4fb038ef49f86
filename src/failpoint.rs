//! Named places where a run can be made to fail, wait or die: for the tests of what a fault leaves
//! behind.
//!
//! `HYPER2KVM_FAILPOINT=name=action` arms one of them. `fail` returns an error, `kill` ends the process
//! by SIGKILL, `wait` goes on when a signal asked for the end. In the confined child `abort` crashes,
//! `hang` never returns and `escape` tries what a child must not be able to do. Without the variable nothing happens. The
//! names are listed in `docs/reliability.md`.

use std::io;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, kill_process};

use crate::tool::stop;

pub const VARIABLE: &str = "HYPER2KVM_FAILPOINT";
/// A test that forgets a waiting process must not block the machine.
const LONGEST_WAIT: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Fail,
    Kill,
    Wait,
    Abort,
    Hang,
    Escape,
}

fn armed() -> Option<&'static (String, Action)> {
    static ARMED: OnceLock<Option<(String, Action)>> = OnceLock::new();
    ARMED
        .get_or_init(|| parse(&std::env::var(VARIABLE).ok()?))
        .as_ref()
}

fn parse(setting: &str) -> Option<(String, Action)> {
    let (name, action) = setting.split_once('=')?;
    let action = match action {
        "fail" => Action::Fail,
        "kill" => Action::Kill,
        "wait" => Action::Wait,
        "abort" => Action::Abort,
        "hang" => Action::Hang,
        "escape" => Action::Escape,
        _ => return None,
    };
    Some((name.to_string(), action))
}

/// Does what was asked for at this place, which is nothing as a rule.
pub fn hit(name: &str) -> io::Result<()> {
    let Some((_, action)) = armed().filter(|(armed, _)| armed == name) else {
        return Ok(());
    };
    match action {
        Action::Fail => Err(io::Error::other(format!("fail point {name}"))),
        Action::Kill => {
            kill_process(getpid(), Signal::KILL)?;
            Ok(())
        }
        Action::Abort => std::process::abort(),
        Action::Hang => loop {
            std::hint::spin_loop();
        },
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

/// Tries to get out of a confined process and tells what was possible.
fn escape() -> String {
    let tried: [(&str, bool); 6] = [
        ("read a file", std::fs::read("/etc/passwd").is_ok()),
        ("list a folder", std::fs::read_dir("/").is_ok()),
        (
            "write a file",
            std::fs::write("/tmp/hyper2kvm-escaped", "").is_ok(),
        ),
        (
            "use the network",
            std::net::UdpSocket::bind("127.0.0.1:0").is_ok(),
        ),
        (
            "start a thread",
            std::thread::Builder::new().spawn(|| ()).is_ok(),
        ),
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
            ("a=escape", Some(("a", Action::Escape))),
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
