//! Starts libguestfs' appliance, and explains why it does not start.
//!
//! The usual reasons are recognised in the output of supermin, QEMU and guestfish. The whole log is
//! kept in a file named by the error.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::{GuestError, Result};
use crate::tool::ToolError;
use crate::tool::guestfish::{Line, Shell};

/// The time limit. Without KVM, on a busy host, a start takes minutes.
const LAUNCH_SECONDS: u64 = 1200;
/// The variable with another limit, in seconds.
const LIMIT_ENV: &str = "HYPER2KVM_APPLIANCE_LIMIT";

pub(super) fn launch_limit() -> Duration {
    let wanted = std::env::var(LIMIT_ENV).ok().and_then(|s| s.parse().ok());
    Duration::from_secs(wanted.unwrap_or(LAUNCH_SECONDS))
}

/// The NBD server of the disk.
pub struct Attach<'a> {
    pub socket: &'a Path,
    pub export: &'a str,
    pub read_only: bool,
    pub sector_size: u32,
}

/// Starts a guestfish whose appliance is running and sees the disks as `/dev/sda`, `/dev/sdb`, ...
pub fn start(disks: &[Attach<'_>]) -> Result<Shell> {
    match boot(disks, false)? {
        Ok(shell) => Ok(shell),
        // Again for a full log: writing one doubles the time of a start, so the first attempt
        // writes none.
        Err(_) => boot(disks, true)?.map_err(|(log, reason)| not_started(&log, &reason, "")),
    }
}

/// The output of an appliance that did not start, and its reason.
type BootFailure = (Vec<u8>, String);

fn boot(disks: &[Attach<'_>], verbose: bool) -> Result<std::result::Result<Shell, BootFailure>> {
    let mut shell = Shell::start().map_err(tool_error)?;
    let mut lines: Vec<Line> = disks.iter().map(add).collect();
    lines.extend([
        Line::new("set-verbose").arg(verbose.to_string()),
        Line::new("run"),
        Line::new("set-verbose").arg("false"),
        // The purpose of the start.
        Line::new("list-devices"),
    ]);
    let mut log = Vec::new();
    let mut failure = None;
    let mut ready = false;
    for line in lines {
        match shell.one(line, launch_limit()) {
            Ok(Ok(output)) => {
                ready = output.starts_with(b"/dev/sda\n");
                log.extend(output);
            }
            Ok(Err(reason)) => {
                log.extend_from_slice(shell.last_failure());
                failure.get_or_insert(reason);
            }
            Err(error @ (ToolError::NotFound { .. } | ToolError::Interrupted(_))) => {
                return Err(tool_error(error));
            }
            Err(error @ ToolError::TimedOut { .. }) => {
                log.extend_from_slice(shell.unanswered());
                let longer = format!("{LIMIT_ENV}=SECONDS gives it more time");
                return Err(not_started(&log, &error.to_string(), &longer));
            }
            Err(error) => {
                log.extend_from_slice(shell.unanswered());
                return Ok(Err((log, error.to_string())));
            }
        }
    }
    if ready {
        return Ok(Ok(shell));
    }
    let reason = failure.unwrap_or_else(|| "it does not see the disk".to_string());
    Ok(Err((log, reason)))
}

fn add(disk: &Attach<'_>) -> Line {
    let add = Line::new("add")
        .arg(disk.export)
        .arg("format:raw")
        .arg("protocol:nbd")
        .arg(format!("server:unix:{}", disk.socket.display()))
        .arg(format!("readonly:{}", disk.read_only));
    if disk.sector_size == 512 {
        return add;
    }
    add.arg(format!("blocksize:{}", disk.sector_size))
}

/// Keeps the log and explains it; `otherwise` is the reason known without it.
fn not_started(log: &[u8], error: &str, otherwise: &str) -> GuestError {
    let said = String::from_utf8_lossy(log);
    let (reason, mut hint) = diagnose(&said).map_or_else(
        || (error.to_string(), otherwise.to_string()),
        |(reason, hint)| (reason.to_string(), hint.to_string()),
    );
    let kept = tempfile::Builder::new()
        .prefix("hyper2kvm-appliance-")
        .suffix(".log")
        .tempfile()
        .and_then(|file| {
            fs::write(file.path(), log)?;
            Ok(file.keep()?.1)
        });
    if let Ok(path) = kept {
        if !hint.is_empty() {
            hint.push_str("; ");
        }
        hint.push_str(&format!("the log is in {}", path.display()));
    }
    GuestError::Appliance { reason, hint }
}

/// The usual reasons why an appliance does not start; the first match counts.
fn diagnose(log: &str) -> Option<(&'static str, &'static str)> {
    let has = |words: &[&str]| words.iter().all(|word| log.contains(word));
    // In one line: a log names the kernel, and files that supermin may not read and does not need.
    let in_line = |words: &[&str]| {
        let mut lines = log.lines();
        lines.any(|line| words.iter().all(|word| line.contains(word)))
    };
    [
        (
            in_line(&["vmlinuz", "ermission denied"]),
            "the kernel of this host cannot be read",
            "Ubuntu keeps it from ordinary users: sudo chmod 0644 /boot/vmlinuz-*",
        ),
        (
            has(&["supermin", "failed to find a suitable kernel"]),
            "this host has no kernel in /boot that the appliance could boot",
            "install the distribution's kernel package, or name one with SUPERMIN_KERNEL and SUPERMIN_MODULES",
        ),
        (
            has(&["No space left on device"]),
            "no space left for the appliance",
            "LIBGUESTFS_CACHEDIR and TMPDIR set its directory (about 500 MB)",
        ),
        (
            has(&["supermin", "exited with error status"]),
            "supermin could not build the appliance",
            "libguestfs-test-tool shows why; the package with the appliance may be missing",
        ),
        (
            has(&["kernel doesn't support virtio"]),
            "the kernel of this host does not work in the appliance",
            "supermin may not know how its modules are compressed; name another kernel with SUPERMIN_KERNEL and SUPERMIN_MODULES",
        ),
        (
            has(&["Could not access KVM kernel module"]) || has(&["failed to initialize kvm"])
                || has(&["failed to initialize KVM"]),
            "/dev/kvm cannot be used",
            "allow it (group kvm), or do without: LIBGUESTFS_BACKEND_SETTINGS=force_tcg",
        ),
        (
            has(&["Cannot allocate memory"]) || has(&["cannot set up guest memory"]),
            "not enough memory for the appliance",
            "it takes about 1.3 GB; LIBGUESTFS_MEMSIZE makes it smaller",
        ),
    ]
    .into_iter()
    .find_map(|(fits, reason, hint)| fits.then_some((reason, hint)))
}

pub(super) fn tool_error(error: ToolError) -> GuestError {
    match error {
        ToolError::NotFound { tool, hint } => GuestError::MissingTool { what: tool, hint },
        error => GuestError::Io(std::io::Error::other(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // With real texts: tests/engines.
    #[test]
    fn why_it_did_not_start() {
        let denied = "supermin: error: open: /boot/vmlinuz-6.8.0: Permission denied";
        assert!(diagnose(denied).unwrap().1.contains("chmod"));
        assert_eq!(diagnose("some other reason"), None);
    }
}
