//! `virsh`: domains of one libvirt connection, by UUID, and the parsers of its output.
//!
//! Each call is a separate process, so no connection has to be kept alive and an interrupted run
//! leaves nothing behind. Waiting is `virsh event` with a short limit, followed by a query of the
//! state in the same process. An event between two calls may be missed, but the state to which it
//! led is not.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use uuid::Uuid;

use super::confine::Confinement;
use super::privileges::Privileges;
use super::{Cmd, Result, ToolError};
use crate::timeline;

const TOOL: &str = "virsh";
/// The time limit of a call; a working libvirt is faster.
const LIMIT: Duration = Duration::from_secs(120);

#[derive(Debug, Clone)]
pub struct Virsh {
    uri: String,
    ignores_stop: bool,
    /// A flag that ends a wait.
    cancel: Option<Arc<AtomicBool>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainState {
    /// Also while it is shutting down.
    Running,
    Off,
    Crashed,
    Paused,
}

/// The event during one wait, if there was one, and the state after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tick {
    /// Resets by the guest.
    pub reboots: u32,
    pub panicked: bool,
    pub state: DomainState,
    /// libvirt's name of the reason, e.g. `shutdown` or `I/O error`.
    pub reason: String,
}

impl Tick {
    /// Whether QEMU has paused it because of a disk.
    pub fn is_io_error(&self) -> bool {
        self.state == DomainState::Paused && self.reason == "I/O error"
    }
}

impl Virsh {
    pub fn new(uri: &str) -> Self {
        Self {
            uri: uri.to_owned(),
            ignores_stop: false,
            cancel: None,
        }
    }

    /// A copy that ignores the stop flag, for clean-up after the user has stopped the run.
    #[must_use]
    pub fn ignoring_stop(self) -> Self {
        Self {
            ignores_stop: true,
            ..self
        }
    }

    pub fn uri(&self) -> &str {
        &self.uri
    }

    fn cmd(&self) -> Cmd {
        // It may start the session's libvirt, which stays running and whose QEMU asks a helper for
        // a bridge.
        let (privileges, confinement) = match self.uri.contains("/session") {
            true => (Privileges::Gain, Confinement::default()),
            false => (Privileges::None, Confinement::writes_arguments()),
        };
        let cmd = Cmd::new(TOOL)
            .privileges(privileges)
            .confined(confinement)
            .args(["-q", "-c", &self.uri])
            .timeout(LIMIT)
            .cancel_with(self.cancel.clone());
        match self.ignores_stop {
            true => cmd.ignore_stop(),
            false => cmd,
        }
    }

    fn text(&self, args: &[&str]) -> Result<String> {
        let _span = timeline::span(format!("virsh {}", args[0]));
        let out = self.cmd().args(args).run()?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    fn lines(&self, args: &[&str]) -> Result<Vec<String>> {
        let text = self.text(args)?;
        let lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
        Ok(lines.map(str::to_owned).collect())
    }

    /// The names of the active networks.
    pub fn active_networks(&self) -> Result<Vec<String>> {
        self.lines(&["net-list", "--name"])
    }

    /// The UUIDs of all domains, running or not.
    pub fn uuids(&self) -> Result<Vec<Uuid>> {
        let lines = self.lines(&["list", "--all", "--uuid"])?;
        Ok(lines.iter().filter_map(|l| l.parse().ok()).collect())
    }

    /// The UUIDs of the running and paused domains.
    pub fn running(&self) -> Result<Vec<Uuid>> {
        let lines = self.lines(&["list", "--uuid"])?;
        Ok(lines.iter().filter_map(|l| l.parse().ok()).collect())
    }

    /// The UUIDs of the domains that are running, paused, or suspended to disk.
    pub fn active(&self) -> Result<Vec<Uuid>> {
        let mut lines = self.lines(&["list", "--uuid"])?;
        lines.extend(self.lines(&["list", "--all", "--with-managed-save", "--uuid"])?);
        Ok(lines.iter().filter_map(|l| l.parse().ok()).collect())
    }

    pub fn names(&self) -> Result<Vec<String>> {
        self.lines(&["list", "--all", "--name"])
    }

    /// All domains, running or not.
    pub fn domains(&self) -> Result<Vec<(Uuid, String)>> {
        let lines = self.lines(&["list", "--all", "--uuid", "--name"])?;
        Ok(lines.iter().filter_map(|line| parse_domain(line)).collect())
    }

    /// The XML of the domain's next start, or that of the running one.
    pub fn xml(&self, domain: Uuid, live: bool) -> Result<String> {
        let id = domain.to_string();
        let mut args = vec!["dumpxml", &id];
        if !live {
            args.push("--inactive");
        }
        self.text(&args)
    }

    pub fn define(&self, xml: &Path) -> Result<()> {
        let _span = timeline::span("virsh define");
        self.cmd().arg("define").arg(xml).run().map(drop)
    }

    pub fn start(&self, domain: Uuid) -> Result<()> {
        self.text(&["start", &domain.to_string()]).map(drop)
    }

    /// Asks the guest to shut down; it may take its time, or ignore this.
    pub fn shutdown(&self, domain: Uuid) -> Result<()> {
        self.text(&["shutdown", &domain.to_string()]).map(drop)
    }

    /// Resumes a paused domain.
    pub fn resume(&self, domain: Uuid) -> Result<()> {
        self.text(&["resume", &domain.to_string()]).map(drop)
    }

    /// Turns the domain off immediately.
    pub fn destroy(&self, domain: Uuid) -> Result<()> {
        self.text(&["destroy", &domain.to_string()]).map(drop)
    }

    /// Removes a domain that is off, with its UEFI variables, its TPM and its saved memory.
    pub fn undefine(&self, domain: Uuid) -> Result<()> {
        let id = domain.to_string();
        self.text(&["undefine", &id, "--nvram", "--managed-save"])
            .map(drop)
    }

    /// The XML of the next start with its passwords: to be changed and defined again.
    pub fn xml_to_change(&self, domain: Uuid) -> Result<String> {
        self.text(&[
            "dumpxml",
            &domain.to_string(),
            "--inactive",
            "--security-info",
        ])
    }

    /// Starts to commit the overlay of a running domain to the disk right below it. Never further
    /// down: without `--shallow` libvirt writes to the bottom of the chain.
    pub fn start_commit(&self, domain: Uuid, target: &str) -> Result<()> {
        let id = domain.to_string();
        self.text(&["blockcommit", &id, target, "--active", "--shallow"])
            .map(drop)
    }

    /// Switches a running domain to the disk that a commit has completed.
    pub fn pivot(&self, domain: Uuid, target: &str) -> Result<()> {
        self.text(&["blockjob", &domain.to_string(), target, "--pivot"])
            .map(drop)
    }

    /// Starts to copy the data that a disk of a running domain lacks; MiB per second, 0 for no
    /// limit.
    pub fn start_pull(&self, domain: Uuid, target: &str, bandwidth: u64) -> Result<()> {
        let (id, limit) = (domain.to_string(), bandwidth.to_string());
        self.text(&["blockpull", &id, target, "--bandwidth", &limit])
            .map(drop)
    }

    /// Changes the limit of a running job.
    pub fn limit_job(&self, domain: Uuid, target: &str, bandwidth: u64) -> Result<()> {
        let (id, limit) = (domain.to_string(), bandwidth.to_string());
        self.text(&["blockjob", &id, target, "--bandwidth", &limit])
            .map(drop)
    }

    /// The job of a disk of a running domain, if there is one.
    pub fn job(&self, domain: Uuid, target: &str) -> Result<Option<Job>> {
        self.text(&["blockjob", &domain.to_string(), target, "--raw"])
            .map(|text| parse_job(&text))
    }

    /// Makes QEMU flush its cached data of a disk. libvirt has no call for that.
    pub fn flush(&self, domain: Uuid, node: &str) -> Result<()> {
        let command = format!("qemu-io libvirt-{node}-format flush");
        self.text(&[
            "qemu-monitor-command",
            &domain.to_string(),
            "--hmp",
            &command,
        ])
        .map(drop)
    }

    /// Whether the guest agent answers.
    pub fn agent_answers(&self, domain: Uuid) -> Result<bool> {
        let asked = self.text(&[
            "qemu-agent-command",
            &domain.to_string(),
            r#"{"execute":"guest-ping"}"#,
            "--timeout",
            "3",
        ]);
        match asked {
            Ok(_) => Ok(true),
            Err(ToolError::Failed { .. }) => Ok(false),
            Err(other) => Err(other),
        }
    }

    /// Saves a picture of the screen; the format is QEMU's choice (PNG, PPM in old versions).
    pub fn screenshot(&self, domain: Uuid, file: &Path) -> Result<()> {
        self.cmd()
            .args(["screenshot", &domain.to_string()])
            .arg(file)
            .run()
            .map(drop)
    }

    /// The XML of a storage pool.
    pub fn pool_xml(&self, pool: &str) -> Result<String> {
        self.text(&["pool-dumpxml", "--", pool])
    }

    /// Makes libvirt scan a storage pool again.
    pub fn pool_refresh(&self, pool: &str) -> Result<()> {
        self.text(&["pool-refresh", "--", pool]).map(drop)
    }

    /// Whether a disk of a running domain has run out of space on this host.
    pub fn is_full(&self, domain: Uuid) -> Result<bool> {
        let errors = self.text(&["domblkerror", &domain.to_string()])?;
        Ok(errors.lines().any(|line| line.ends_with(": no space")))
    }

    /// Waits for an event, `seconds` at most, and queries the state. `None` if the domain is not
    /// defined.
    pub fn tick(&self, domain: Uuid, seconds: u32) -> Result<Option<Tick>> {
        let script =
            format!("event {domain} --all --timeout {seconds}; domstate {domain} --reason");
        self.found(domain, self.text(&[&script]))
    }

    /// Waits like [`Self::tick`], but ends early when the flag is raised.
    pub(crate) fn tick_until(
        &self,
        domain: Uuid,
        seconds: u32,
        raised: &Arc<AtomicBool>,
    ) -> Result<Option<Tick>> {
        let waiting = Self {
            cancel: Some(raised.clone()),
            ..self.clone()
        };
        match waiting.tick(domain, seconds) {
            Err(ToolError::Interrupted(_)) if raised.load(Ordering::SeqCst) => self.state(domain),
            found => found,
        }
    }

    /// The present state, without a wait; `None` if the domain is not defined.
    pub fn state(&self, domain: Uuid) -> Result<Option<Tick>> {
        self.found(
            domain,
            self.text(&["domstate", &domain.to_string(), "--reason"]),
        )
    }

    fn found(&self, domain: Uuid, text: Result<String>) -> Result<Option<Tick>> {
        let text = self.defined(domain, text)?;
        text.as_deref().map(parse_tick).transpose()
    }

    /// The present state, and the XML of the running domain or of the next start.
    pub fn look(&self, domain: Uuid) -> Result<Option<(Tick, String)>> {
        let script = format!("domstate {domain} --reason; dumpxml {domain}");
        let Some(text) = self.defined(domain, self.text(&[&script]))? else {
            return Ok(None);
        };
        match text.find("<domain").map(|at| text.split_at(at)) {
            Some((state, xml)) => Ok(Some((parse_tick(state)?, xml.to_owned()))),
            // It was undefined in between.
            None if !self.uuids()?.contains(&domain) => Ok(None),
            None => Err(ToolError::output(TOOL, "no domain XML")),
        }
    }

    /// The output about a domain; `None` if the call failed because there is none.
    fn defined(&self, domain: Uuid, text: Result<String>) -> Result<Option<String>> {
        match text {
            Err(ToolError::Failed { .. }) if !self.uuids()?.contains(&domain) => Ok(None),
            text => text.map(Some),
        }
    }
}

/// libvirt's job on a disk of a running domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    pub kind: JobKind,
    pub done: u64,
    pub end: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobKind {
    Pull,
    Commit,
    Other,
}

/// Parses the output of `blockjob --raw`, which is empty without a job.
fn parse_job(text: &str) -> Option<Job> {
    let field = |name: &str| {
        let mut fields = text.lines().filter_map(|line| line.trim().split_once('='));
        fields.find(|(key, _)| *key == name)
    };
    let number = |name: &str| field(name).and_then(|(_, value)| value.parse().ok());
    Some(Job {
        kind: match field("type")?.1 {
            "Block Pull" => JobKind::Pull,
            "Active Block Commit" => JobKind::Commit,
            _ => JobKind::Other,
        },
        done: number("cur").unwrap_or(0),
        end: number("end").unwrap_or(0),
    })
}

/// Parses a line of `list --uuid --name`.
fn parse_domain(line: &str) -> Option<(Uuid, String)> {
    let (uuid, name) = line.split_once(char::is_whitespace)?;
    Some((uuid.parse().ok()?, name.trim_start().to_owned()))
}

fn parse_tick(text: &str) -> Result<Tick> {
    let mut tick = Tick {
        reboots: 0,
        panicked: false,
        state: DomainState::Off,
        reason: String::new(),
    };
    let mut state = None;
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
        if line.starts_with("event 'reboot'") {
            tick.reboots += 1;
        } else if line.starts_with("event 'lifecycle'") {
            tick.panicked |= line.ends_with("Crashed Panicked");
        } else if let Some((word, reason)) = line.split_once(" (") {
            state = Some(match word {
                "shut off" => DomainState::Off,
                "crashed" => DomainState::Crashed,
                "paused" | "pmsuspended" => DomainState::Paused,
                "running" | "in shutdown" | "idle" | "no state" => DomainState::Running,
                _ => continue,
            });
            tick.reason = reason.trim_end_matches(')').to_owned();
        }
    }
    tick.state = state.ok_or_else(|| ToolError::output(TOOL, "no domain state"))?;
    tick.panicked |= tick.state == DomainState::Crashed || tick.reason == "panicked";
    Ok(tick)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs() {
        let text = " type=Block Pull\n bandwidth=0\n cur=96010240\n end=268435456\n";
        let (done, end) = (96_010_240, 268_435_456);
        for (text, want) in [
            (text.to_owned(), Some(JobKind::Pull)),
            (
                text.replace("Block Pull", "Active Block Commit"),
                Some(JobKind::Commit),
            ),
            (text.replace("Pull", "Copy"), Some(JobKind::Other)),
            (String::new(), None),
            ("\n".to_owned(), None),
        ] {
            let want = want.map(|kind| Job { kind, done, end });
            assert_eq!(parse_job(&text), want, "{text}");
        }
    }

    /// libvirt's own driver for tests needs no daemon: it has one running domain.
    #[test]
    fn what_is_there_and_what_is_not() {
        if !crate::skip::have(&[TOOL]) {
            return;
        }
        let virsh = Virsh::new("test:///default");
        let domains = virsh.domains().unwrap();
        let [(there, name)] = domains.as_slice() else {
            panic!("{domains:?}");
        };
        assert_eq!(name, "test");
        let (tick, xml) = virsh.look(*there).unwrap().unwrap();
        assert_eq!(tick.state, DomainState::Running);
        assert!(xml.starts_with("<domain") && xml.contains("<name>test</name>"));
        assert_eq!(virsh.state(*there).unwrap().unwrap(), tick);
        let missing = Uuid::from_u128(1);
        assert!(virsh.look(missing).unwrap().is_none());
        assert!(virsh.state(missing).unwrap().is_none());
        assert!(virsh.tick(missing, 1).unwrap().is_none());
        // Without libvirt, nothing is known.
        assert!(Virsh::new("test:///no/such/file").state(missing).is_err());
        // No wait lasts after the flag is raised.
        let raised = Arc::new(AtomicBool::new(true));
        let begin = std::time::Instant::now();
        let tick = virsh.tick_until(*there, 60, &raised).unwrap().unwrap();
        assert_eq!(tick.state, DomainState::Running);
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn domains() {
        let uuid = "5a2f8a49-8f0b-4d0c-9d7f-000000000001";
        let line = format!("{uuid} a name  of two");
        let want = (uuid.parse().unwrap(), "a name  of two".to_owned());
        assert_eq!(parse_domain(&line), Some(want));
        for line in [uuid, "a name", "- name"] {
            assert_eq!(parse_domain(line), None);
        }
    }

    #[test]
    fn ticks() {
        let loop_of_one =
            "event 'reboot' for domain 'a (b'\nevents received: 1\n\nrunning (booted)\n";
        for (text, want) in [
            (
                "event loop timed out\nevents received: 0\n\nshut off (destroyed)\n",
                Some((0, false, DomainState::Off, "destroyed")),
            ),
            (
                loop_of_one,
                Some((1, false, DomainState::Running, "booted")),
            ),
            (
                "event 'lifecycle' for domain 'x': Crashed Panicked\nrunning (booted)",
                Some((0, true, DomainState::Running, "booted")),
            ),
            (
                "crashed (panicked)",
                Some((0, true, DomainState::Crashed, "panicked")),
            ),
            (
                "paused (I/O error)",
                Some((0, false, DomainState::Paused, "I/O error")),
            ),
            ("event loop timed out\n", None),
            ("", None),
        ] {
            let got = parse_tick(text).ok();
            let got = got
                .as_ref()
                .map(|t| (t.reboots, t.panicked, t.state, t.reason.as_str()));
            assert_eq!(got, want, "{text}");
        }
    }
}
