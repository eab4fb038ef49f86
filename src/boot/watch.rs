//! Starts a boot and watches it until Windows is up or has failed.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::outage::{Line, Outages};
use super::record::StageRecord;
use super::{Domain, Failure, MARKER, MAX_SERIAL_LOG, Outcome, Run, Wait, files};
use crate::domain::Stage;
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::stop;
use crate::text::quote;
use crate::timeline;
use crate::tool::virsh::{DomainState, Tick};

/// The time for which the script may still run after the agent answers.
const AGENT_GRACE: Duration = Duration::from_secs(120);
const AGENT_INTERVAL: Duration = Duration::from_secs(5);
/// The interval between two reads of COM1's log.
const LOOK: Duration = Duration::from_millis(50);
const SHORT_LOG: u64 = 256 << 10;
/// The maximum age of the last picture of the screen in a rehearsal.
const GLANCE_INTERVAL: Duration = Duration::from_secs(5);

impl Run<'_> {
    /// Starts the domain of a stage, unless it already runs, and waits until Windows is up or has
    /// failed.
    pub(super) fn start_and_watch(&mut self, stage: Stage) -> Result<Outcome> {
        let log = self.files.serial_log(stage);
        let found = match self.absent || self.is_known_off() {
            true => None,
            false => self.virsh.look(self.files.uuid)?,
        };
        if let Some((tick, xml)) = found {
            let running = matches!(tick.state, DomainState::Running | DomainState::Paused);
            let (live, _) = files::identify(&xml)?;
            if running && live == Some(stage) && !tick.panicked {
                self.ui.status(
                    "Watching",
                    &format!("{}, which runs already", self.files.name),
                );
                return self.watch(stage, &log, Instant::now());
            }
            if tick.state == DomainState::Off
                && live == Some(stage)
                && self.stage_record(stage).started
                && marked(&log)
            {
                // It came up and was turned off while nobody watched.
                self.stage_record(stage).up_by = Some("marker".into());
                return Ok(Outcome::Up("marker"));
            }
            match tick.state {
                DomainState::Off => {}
                DomainState::Crashed => self.virsh.destroy(self.files.uuid)?,
                _ if tick.panicked => self.virsh.destroy(self.files.uuid)?,
                _ => self.shut_down()?,
            }
        }
        for old in [&log, &files::second_log(&log)] {
            if let Err(error) = fs::remove_file(old)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                return Err(
                    Error::failed(format!("removing the old {}", old.display())).because(error)
                );
            }
        }
        self.define(stage, Some(&log))?;
        if !self.is_system_disk_kept() {
            self.end_proof();
        }
        *self.stage_record(stage) = StageRecord {
            started: true,
            ..StageRecord::default()
        };
        self.record.save(&self.files.folder)?;
        self.ui.status(
            "Starting",
            &format!("{} on {}", self.files.name, self.bus(stage)),
        );
        let begin = Instant::now();
        self.off = None;
        self.virsh
            .start(self.files.uuid)
            .map_err(|e| Error::from(e).hint(self.why_not_started(stage)))?;
        self.save_proof()?;
        self.watch(stage, &log, begin)
    }

    /// Hints on what to check if libvirt does not start a domain.
    fn why_not_started(&self, stage: Stage) -> String {
        let active = self.virsh.active_networks();
        let wanted = self.files.domain(stage).map(Domain::networks);
        if let (Ok(active), Some(wanted)) = (active, wanted)
            && let Some(missing) = wanted.iter().find(|n| !active.iter().any(|a| a == *n))
        {
            return format!(
                "the network {missing} is not started: virsh -c {} net-start {}, or convert with --libvirt-network or --bridge",
                quote(Path::new(self.virsh.uri())),
                quote(Path::new(missing))
            );
        }
        format!(
            "QEMU's user must be able to reach the disks and firmware: {} and every directory above it",
            self.files.folder.display()
        )
    }

    fn say_what_is_awaited(&mut self, log: &Path) {
        if self.options.wait == Wait::Manual {
            self.ui.status(
                "Waiting",
                "for you: shut Windows down from inside when you have seen it come up",
            );
        } else if let Err(error) = File::open(log)
            && error.kind() == std::io::ErrorKind::PermissionDenied
        {
            self.record.warnings.push(format!(
                "{} cannot be read by this user: only the guest agent can show that Windows is up",
                log.display()
            ));
        }
    }

    fn watch(&mut self, stage: Stage, log: &Path, begin: Instant) -> Result<Outcome> {
        let agent_channel = self
            .files
            .domain(stage)
            .is_some_and(files::Domain::has_agent_channel);
        let ask_agent = agent_channel && matches!(self.options.wait, Wait::Auto | Wait::Agent);
        let by_marker = matches!(self.options.wait, Wait::Auto | Wait::Marker);
        let _span = timeline::span("wait for Windows");
        self.begin_reaching();
        self.say_what_is_awaited(log);
        failpoint::hit("boot-watching").map_err(|e| Error::failed("booting").because(e))?;
        let mut reboots = 0;
        let mut answered: Option<Instant> = None;
        let mut asked = Instant::now();
        let mut glanced: Option<Instant> = None;
        let mut outages = Outages::default();
        let outcome = loop {
            if stop::requested() {
                return Err(
                    Error::new(ErrorKind::Interrupted, "interrupted; the VM continues")
                        .hint("run the same command again to continue watching it"),
                );
            }
            if glanced.is_none_or(|t| t.elapsed() > GLANCE_INTERVAL) {
                self.glance(stage);
                glanced = Some(Instant::now());
            }
            let tick = self.tick(by_marker.then_some(log))?;
            reboots += tick.reboots;
            // Read after the state: when the VM is off, the log is complete.
            if by_marker && marked(log) {
                self.off = (tick.state == DomainState::Off).then(Instant::now);
                break Outcome::Up("marker");
            }
            match self.line(&tick, &mut outages)? {
                Line::Up => {}
                Line::Down => continue,
                Line::Lost(failure) => break Outcome::Failed(failure),
            }
            let waited = begin.elapsed().saturating_sub(outages.total());
            if let Some(failure) = self.failure(&tick, reboots, waited) {
                break failure;
            }
            if ask_agent && asked.elapsed() > AGENT_INTERVAL {
                if self.virsh.agent_answers(self.files.uuid)? {
                    answered.get_or_insert_with(Instant::now);
                }
                asked = Instant::now();
            }
            if answered
                .is_some_and(|t| self.options.wait == Wait::Agent || t.elapsed() > AGENT_GRACE)
            {
                break Outcome::Up("agent");
            }
        };
        let entry = self.stage_record(stage);
        entry.seconds = begin.elapsed().as_secs_f64();
        entry.reboots = reboots;
        match &outcome {
            Outcome::Up(by) => {
                entry.up_by = Some((*by).to_owned());
                let text = format!(
                    "on {} after {:.0} s ({by})",
                    self.bus(stage),
                    begin.elapsed().as_secs_f64()
                );
                self.ui.status("Up", &text);
            }
            Outcome::Failed(failure) => {
                entry.failure = Some(failure.code.to_owned());
                entry.message = Some(failure.message.clone());
            }
        }
        self.record.save(&self.files.folder)?;
        Ok(outcome)
    }

    /// Waits for an event, or for the marker in a log, 2 seconds at most.
    fn tick(&self, log: Option<&Path>) -> Result<Tick> {
        let (seen, done) = (Arc::new(AtomicBool::new(false)), AtomicBool::new(false));
        let found = thread::scope(|scope| {
            scope.spawn(|| {
                // One boot writes little. A longer log is read once a tick.
                let short = |log: &Path| fs::metadata(log).is_ok_and(|m| m.len() < SHORT_LOG);
                while !done.load(Ordering::SeqCst) {
                    if log.is_some_and(|log| short(log) && marked(log)) {
                        seen.store(true, Ordering::SeqCst);
                        return;
                    }
                    thread::sleep(LOOK);
                }
            });
            let found = self.virsh.tick_until(self.files.uuid, 2, &seen);
            done.store(true, Ordering::SeqCst);
            found
        });
        found?.ok_or_else(|| Error::failed(format!("libvirt has {} no more", self.files.name)))
    }

    /// The failure that ends the wait without the marker.
    fn failure(&self, tick: &Tick, reboots: u32, elapsed: Duration) -> Option<Outcome> {
        let failed = |code, message: String| Some(Outcome::Failed(Failure { code, message }));
        if tick.panicked {
            return failed(
                "panic",
                "Windows stopped with a stop screen (guest panic)".into(),
            );
        }
        match tick.state {
            DomainState::Off if self.options.wait == Wait::Manual && tick.reason == "shutdown" => {
                return Some(Outcome::Up("manual"));
            }
            DomainState::Off => {
                return failed(
                    "stopped",
                    format!(
                        "the VM went off without a sign of Windows ({})",
                        tick.reason
                    ),
                );
            }
            // A user may have paused it; a disk that cannot be written to does not recover.
            DomainState::Paused if tick.is_io_error() => {
                return failed(
                    "paused",
                    "QEMU paused the machine: a disk gave an I/O error".into(),
                );
            }
            _ => {}
        }
        if reboots > self.options.max_reboots {
            return failed(
                "reboot-loop",
                format!("the VM restarted {reboots} times without Windows coming up"),
            );
        }
        (elapsed > self.options.timeout).then(|| {
            Outcome::Failed(Failure {
                code: "timeout",
                message: format!("no sign of Windows in {} s", self.options.timeout.as_secs()),
            })
        })
    }
}

/// Whether the log of COM1 or that of COM2 has the marker as a line of its own.
fn marked(log: &Path) -> bool {
    use std::io::Read;
    [log, &files::second_log(log)].iter().any(|log| {
        let mut bytes = Vec::new();
        let read = File::open(log).and_then(|f| f.take(MAX_SERIAL_LOG).read_to_end(&mut bytes));
        read.is_ok() && has_marker(&bytes)
    })
}

fn has_marker(log: &[u8]) -> bool {
    log.split(|b| matches!(b, b'\n' | b'\r'))
        .any(|line| line.trim_ascii() == MARKER.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers() {
        for (log, want) in [
            ("hyper2kvm: first boot finished\r\n", true),
            ("BdsDxe: starting\r\n hyper2kvm: first boot finished", true),
            ("echo hyper2kvm: first boot finished\n", false),
            ("hyper2kvm: first boot fin", false),
            ("", false),
        ] {
            assert_eq!(has_marker(log.as_bytes()), want, "{log}");
        }
    }

    #[test]
    fn the_marker_counts_on_either_port() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("com1-final.log");
        fs::write(&log, "SAC>").unwrap();
        assert!(!marked(&log));
        fs::write(dir.path().join("com2-final.log"), format!("{MARKER}\r\n")).unwrap();
        assert!(marked(&log));
    }
}
