//! `boot`: watches both boots of a converted VM on libvirt, with a rollback.
//!
//! ```text
//!  new -> bootstrap -> bootstrap-up -> bootstrap-done -> protecting -> final -> done
//!                                            ^                          |
//!                                            +---- final-failed <- restoring
//! ```
//!
//! The phase is written to `boot.json` before its step begins ([`record`]). So a killed run can
//! continue, and a run after the end changes nothing. Windows is up when its first-boot script has
//! written [`MARKER`] to COM1, or when the guest agent answers. Between the boots the disk is read
//! ([`proof`]) and saved ([`protect`]). If the final boot fails, it is restored, and the bootstrap
//! domain is defined and started again. A domain that this program has not defined is never changed
//! ([`files::identify`]).

pub(crate) mod access;
pub(crate) mod anchor;
pub(crate) mod evidence;
pub mod files;
pub(crate) mod in_use;
pub(crate) mod install;
mod merge;
mod outage;
pub mod proof;
pub(crate) mod protect;
pub(crate) mod record;
mod rehearsal;
mod screen;
mod sourced;
mod watch;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::domain::Stage;
use crate::error::{Blocker, Error, ErrorKind, Result};
use crate::failpoint;
use crate::fix::journal::write_durably;
use crate::guest::keys::Keys;
use crate::later::{self, serve::Server};
use crate::lock::FileLock;
use crate::stop;
use crate::threads::joined;
use crate::timeline;
use crate::tool::ToolError;
use crate::tool::virsh::{DomainState, Virsh};
use crate::ui::Ui;

use files::{Domain, Files};
use install::Destination;
use outage::{Line, Outages};
use proof::Proof;
use record::{Phase, Record, StageRecord};

/// The line that the first-boot script writes to COM1 at its end.
pub const MARKER: &str = "hyper2kvm: first boot finished";
/// The lock file of an output directory.
pub(crate) const LOCK: &str = ".boot.lock";
/// The interval for repeating the request: Windows sometimes misses the power button.
const ASK_AGAIN: Duration = Duration::from_secs(60);
/// The time for which the end of a VM is polled at short intervals.
const SOON: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(100);
/// The time for which a query of the VM's state remains valid.
const FRESH: Duration = Duration::from_secs(1);
const MAX_SERIAL_LOG: u64 = 64 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// The marker, or otherwise the agent.
    Auto,
    Marker,
    Agent,
    /// The user watches the VM and shuts Windows down when it is up.
    Manual,
}

#[derive(Debug, Clone)]
pub struct Options {
    pub folder: PathBuf,
    pub uri: String,
    pub wait: Wait,
    pub timeout: Duration,
    pub shutdown_timeout: Duration,
    /// The most resets in one boot; more are a loop.
    pub max_reboots: u32,
    pub stop_after_bootstrap: bool,
    pub snapshot: bool,
    /// The keys of BitLocker volumes, for reading the disk while the VM is off.
    pub keys: Keys,
    /// The directory to which the disks are moved first.
    pub install: Option<Destination>,
    /// The evidence directory of a rehearsal ([`crate::rehearse`]), which keeps nothing of the VM.
    /// Evidence of every boot is saved, and a failed final boot is not undone.
    pub rehearsal: Option<PathBuf>,
}

/// The reason why a boot did not end with Windows up.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Failure {
    code: &'static str,
    message: String,
}

enum Outcome {
    Up(&'static str),
    Failed(Failure),
}

/// Runs the remaining steps. The record is on disk whatever the result. An interrupted exchange of
/// the directory must be completed before (`convert::exchange`).
pub fn boot(options: &Options, ui: &Ui) -> Result<Record> {
    boot_served(options, None, ui)
}

/// Runs [`boot`] with a source on another host that the caller serves.
pub(crate) fn boot_served(options: &Options, server: Option<&Server>, ui: &Ui) -> Result<Record> {
    local(&options.uri)?;
    let virsh = Virsh::new(&options.uri);
    let mut warnings = Vec::new();
    if let Some(place) = &options.install {
        warnings = install_first(options, place, &virsh, ui)?;
    }
    files::trust(&options.folder)?;
    let lock = match options.folder.join("report.json").is_file() {
        true => Some(lock(&options.folder)?),
        // `Files::open` reports errors.
        false => None,
    };
    anchored(&options.folder, ui)?;
    let files = Files::open(&options.folder)?;
    let later = later::Record::left(&files.folder)?;
    let source = later.as_ref().map_or_else(Vec::new, later::Record::files);
    let on_wire = later.as_ref().is_some_and(later::Record::is_on_wire);
    let record = match Record::load(&files.folder)? {
        Some(record) if record.uuid == files.uuid && record.uri == options.uri => record,
        Some(record) if record.uuid == files.uuid => {
            return Err(Error::usage(format!(
                "this VM was booted on {}, not on {}",
                record.uri, options.uri
            ))
            .hint(format!("--connect {}", record.uri)));
        }
        _ => Record::new(&options.uri, &files.name, files.uuid),
    };
    let mut record = record;
    record.warnings.extend(warnings);
    let mut run = Run {
        options,
        ui,
        virsh,
        files,
        record,
        source,
        on_wire,
        server,
        absent: false,
        off: None,
        proving: None,
        unreached: None,
        reaching: None,
    };
    let served = run.ready(later.as_ref())?;
    let outcome = run.phases();
    // The evidence found is kept if something else has failed in the meantime.
    let outcome = outcome.and(run.save_proof());
    if let Some(served) = served
        && outcome.is_err()
        && run.is_off().unwrap_or(false)
    {
        served.end();
    }
    outcome?;
    drop(lock);
    Ok(run.record)
}

/// Step 0: moves the disks. Those of a VM that was started stay in their place.
fn install_first(
    options: &Options,
    place: &Destination,
    virsh: &Virsh,
    ui: &Ui,
) -> Result<Vec<String>> {
    files::trust(&options.folder)?;
    if !options.folder.join("report.json").is_file() {
        // `Files::open` reports errors.
        return Ok(Vec::new());
    }
    let _lock = lock(&options.folder)?;
    anchored(&options.folder, ui)?;
    if let Some(record) = Record::load(&options.folder)?
        && record.phase != Phase::New
    {
        ui.status("Staying", "the VM was started: its disks are not moved");
        return Ok(Vec::new());
    }
    let installed = install::install(&options.folder, place, virsh)?;
    for moved in &installed.moved {
        ui.status("Installed", &moved.to.display().to_string());
    }
    Ok(installed.warnings)
}

pub(crate) fn anchored(folder: &Path, ui: &Ui) -> Result<()> {
    if let Some(was) = anchor::anchor(folder)? {
        let moved = format!("from {}: the paths in its files are updated", was.display());
        ui.status("Moved", &moved);
        if let Some(later) = later::Record::left(folder)? {
            let named = later.name_sockets(folder)?;
            anchor::list_anew(folder, &named)?;
        }
    }
    Ok(())
}

/// The error for a failed first call of libvirt.
pub(crate) fn unreachable(uri: &str, error: ToolError) -> Error {
    let error = Error::from(error);
    if error.kind != ErrorKind::Failed {
        return error;
    }
    Error::missing_tool(format!("cannot use libvirt at {uri}"))
        .because(error)
        .hint("is libvirtd running, and may this user connect (group libvirt)? --connect names another URI")
}

/// Refuses a remote libvirt: COM1 and the disks are files of this host.
pub(crate) fn local(uri: &str) -> Result<()> {
    let rest = uri.split_once("://").map(|(_, rest)| rest);
    if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
        return Ok(());
    }
    Err(Error::usage(format!("{uri} is not a libvirt of this host"))
        .hint("run hyper2kvm boot on the host the VM is to run on"))
}

/// Locks an output directory without waiting; `None` if another run has it.
pub(crate) fn lock_if_free(folder: &Path) -> Option<FileLock> {
    let open = fs::File::open(folder).ok()?;
    FileLock::take(&open, LOCK.as_ref(), folder, true).ok()?
}

/// Locks an output directory, on which one run at a time works.
pub(crate) fn lock(folder: &Path) -> Result<FileLock> {
    FileLock::of_directory(folder, LOCK, || {
        let shown = folder.display();
        Error::failed(format!("another hyper2kvm is at work in {shown}")).hint("wait for it")
    })
}

struct Run<'a> {
    options: &'a Options,
    ui: &'a Ui,
    virsh: Virsh,
    files: Files,
    record: Record,
    /// The files below the disks after `convert --copy later`.
    source: Vec<PathBuf>,
    /// Whether they are on another host.
    on_wire: bool,
    /// The server of the source, if the caller provides it.
    server: Option<&'a Server>,
    /// Whether libvirt had no domain of that UUID, and none was defined since.
    absent: bool,
    /// The time at which the VM was seen to be off; this run has not started it since.
    off: Option<Instant>,
    /// The running examination of the disk between the boots.
    proving: Option<JoinHandle<Result<Proof>>>,
    /// The source to which this process has no connection yet, and the connection attempt.
    unreached: Option<later::Record>,
    reaching: Option<JoinHandle<Result<()>>>,
}

impl Run<'_> {
    fn phases(&mut self) -> Result<()> {
        if self.record.phase == Phase::FinalFailed {
            // Queried again, because the bootstrap VM may be running.
            self.shut_down()?;
            self.enter(Phase::BootstrapDone)?;
        }
        loop {
            match self.record.phase {
                Phase::New if self.files.bootstrap.is_none() => self.enter(Phase::BootstrapDone)?,
                Phase::New => self.enter(Phase::Bootstrap)?,
                Phase::Bootstrap => match self.start_and_watch(Stage::Bootstrap)? {
                    Outcome::Up(_) => {
                        self.rehearsal_evidence(Stage::Bootstrap);
                        self.enter(Phase::BootstrapUp)?;
                    }
                    Outcome::Failed(failure) => return Err(self.bootstrap_failed(&failure)?),
                },
                Phase::BootstrapUp => {
                    self.shut_down()?;
                    self.begin_proof();
                    self.rehearsal_hives(Stage::Bootstrap);
                    if self.options.stop_after_bootstrap {
                        self.end_proof();
                    }
                    self.enter(Phase::BootstrapDone)?;
                }
                Phase::BootstrapDone if self.options.stop_after_bootstrap => return Ok(()),
                Phase::BootstrapDone => {
                    self.record.production = None;
                    self.enter(Phase::Protecting)?;
                }
                Phase::Protecting => {
                    self.protect()?;
                    self.enter(Phase::Final)?;
                }
                Phase::Final => match self.start_and_watch(Stage::Final)? {
                    Outcome::Up(_) => {
                        self.rehearsal_evidence(Stage::Final);
                        self.finish()?;
                    }
                    Outcome::Failed(failure) if self.options.rehearsal.is_some() => {
                        return Err(self.rehearsal_failed(&failure)?);
                    }
                    Outcome::Failed(failure) => {
                        self.give_up_final(&failure)?;
                        self.enter(Phase::Restoring)?;
                    }
                },
                Phase::Restoring => return Err(self.restore()?),
                Phase::FinalFailed | Phase::Done => return Ok(()),
            }
        }
    }

    fn enter(&mut self, phase: Phase) -> Result<()> {
        self.record.phase = phase;
        self.record.save(&self.files.folder)?;
        failpoint::hit(&format!("boot-{}", phase.as_str()))
            .map_err(|e| Error::failed("booting").because(e))
    }

    /// Whether libvirt has the domain. One of that UUID or name must have been defined by hyper2kvm
    /// for this directory.
    fn find_domain(&self) -> Result<bool> {
        let connecting = |e| unreachable(&self.options.uri, e);
        let refuse = |reason: String, remedy: &str| {
            Err(Error::refused(
                format!("the domain {} is not touched", self.files.name),
                vec![Blocker::new("foreign-domain", reason, remedy)],
            ))
        };
        let domains = self.virsh.domains().map_err(connecting)?;
        if domains.iter().all(|(uuid, _)| *uuid != self.files.uuid) {
            if domains.iter().any(|(_, name)| *name == self.files.name) {
                return refuse(
                    format!("libvirt has another VM of the name {:?}", self.files.name),
                    "convert with another --name",
                );
            }
            return Ok(false);
        }
        let (stage, disks) = files::identify(&self.virsh.xml(self.files.uuid, false)?)?;
        if stage.is_none() {
            return refuse(
                format!(
                    "libvirt has a VM of the UUID {} that this program did not define",
                    self.files.uuid
                ),
                "undefine it, or change <uuid> in both XML files of the output directory",
            );
        }
        let ours = self.files.system_disk()?.path;
        // The directory was moved since it was defined: it is defined again before the next start.
        let left_behind = |disk: &Path| disk.file_name() == ours.file_name() && !disk.exists();
        let named = |d: &files::DomainDisk| {
            left_behind(&d.path) || d.below.iter().any(|below| left_behind(below))
        };
        let moved = || Ok::<_, Error>(disks.iter().any(named) && self.is_off()?);
        if !disks.iter().any(|d| d.stands_on(&ours)) && !moved()? {
            return refuse(
                format!(
                    "the VM libvirt has runs from another disk than {}",
                    ours.display()
                ),
                "it comes from another conversion: undefine it, or continue with that one",
            );
        }
        Ok(true)
    }

    /// Whether a recent query has shown that it is off.
    fn is_known_off(&self) -> bool {
        self.off.is_some_and(|seen| seen.elapsed() < FRESH)
    }

    /// Whether the domain is off, or not defined.
    fn is_off(&self) -> Result<bool> {
        let found = self.virsh.state(self.files.uuid)?;
        Ok(found.is_none_or(|tick| tick.state == DomainState::Off))
    }

    fn stage_record(&mut self, stage: Stage) -> &mut StageRecord {
        let slot = match stage {
            Stage::Bootstrap => &mut self.record.bootstrap,
            Stage::Final => &mut self.record.production,
        };
        slot.get_or_insert_default()
    }

    fn bus(&self, stage: Stage) -> &'static str {
        match (stage, self.files.production.bus()) {
            (Stage::Bootstrap, _) => "the emulated controller",
            (Stage::Final, bus) => bus.name(),
        }
    }

    /// Defines the domain of a stage unchanged, or with COM1 logged to a file.
    fn define(&mut self, stage: Stage, log: Option<&Path>) -> Result<()> {
        let domain = self
            .files
            .domain(stage)
            .ok_or_else(|| Error::failed("this VM has no bootstrap domain"))?;
        self.files.still_there()?;
        self.absent = false;
        let Some(log) = log else {
            return Ok(self.virsh.define(&domain.path)?);
        };
        let path = self.files.folder.join(".boot-domain.xml");
        // Never through a file that somebody else put there.
        let overlays = match stage {
            Stage::Final => self.overlays(),
            Stage::Bootstrap => Vec::new(),
        };
        write_durably(&path, domain.watched(log, &overlays).as_bytes())
            .map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))?;
        let defined = self.virsh.define(&path);
        // It is only a copy; libvirt has its own by now.
        let _ = fs::remove_file(&path);
        Ok(defined?)
    }

    /// Asks Windows to shut down, and waits until it has. Never turns the VM off.
    fn shut_down(&mut self) -> Result<()> {
        if self.is_known_off() {
            return Ok(());
        }
        let begin = Instant::now();
        let mut asked: Option<Instant> = None;
        let mut outages = Outages::default();
        loop {
            // It may turn off immediately: an event before the wait would be missed.
            let found = match asked {
                Some(at) if at.elapsed() > SOON => self.virsh.tick(self.files.uuid, 1)?,
                _ => self.virsh.state(self.files.uuid)?,
            };
            let Some(tick) = found.filter(|tick| tick.state != DomainState::Off) else {
                self.off = Some(Instant::now());
                return Ok(());
            };
            // Windows receives nothing in the meantime.
            if let Line::Lost(failure) = self.line(&tick, &mut outages)? {
                return Err(Error::new(ErrorKind::NotReady, failure.message));
            }
            if asked.is_none_or(|t| t.elapsed() > ASK_AGAIN) {
                self.ui.status("Stopping", &self.files.name);
                // Windows may turn it off at this very moment.
                if let Err(error) = self.virsh.shutdown(self.files.uuid) {
                    tracing::info!("asking for a shutdown: {error}");
                }
                asked = Some(Instant::now());
            }
            if begin.elapsed().saturating_sub(outages.total()) > self.options.shutdown_timeout {
                return Err(Error::new(
                    ErrorKind::NotReady,
                    format!("Windows has not shut down in {} s", self.options.shutdown_timeout.as_secs()),
                )
                .hint(format!("shut it down from inside (virt-viewer -c {} {}), then run the same command again", self.options.uri, self.files.name)));
            }
            if stop::requested() {
                return Err(Error::new(
                    ErrorKind::Interrupted,
                    "interrupted; the VM continues",
                ));
            }
            thread::sleep(LOOK);
        }
    }

    /// Starts to examine the disk of the VM, which is off, unless that was done. Meanwhile the
    /// switch is prepared.
    fn begin_proof(&mut self) {
        let is_wanted = self.record.bootstrap.is_some() && self.record.proof.is_none();
        if !is_wanted || self.proving.is_some() {
            return;
        }
        let bus = self.files.production.bus();
        let keys = self.options.keys.clone();
        let source = self.source.clone();
        let reaching = self.reach();
        let found = self.files.system_disk().map(|disk| {
            let disk = self.guest_disk(disk);
            (disk.path, disk.format)
        });
        let look = move || {
            let _span = timeline::span("look at the disk");
            let (path, format) = found?;
            reaching.map_or(Ok(()), |thread| joined(thread.join()))?;
            let disk = proof::GuestDisk {
                path,
                format,
                keys: &keys,
                source: &source,
            };
            proof::read(&disk, bus)
        };
        self.proving = Some(thread::spawn(look));
    }

    /// Waits for the examination, and records its result.
    fn save_proof(&mut self) -> Result<()> {
        if self.proving.is_none() {
            return Ok(());
        }
        self.end_proof();
        self.record.save(&self.files.folder)
    }

    /// Waits for the examination and discards its result.
    fn end_proof(&mut self) {
        let Some(proving) = self.proving.take() else {
            return;
        };
        let bus = self.files.production.bus();
        match joined(proving.join()) {
            Ok(proof) => {
                self.record.warnings.extend(proof.doubts(bus));
                self.record.proof = Some(proof);
            }
            Err(error) => {
                let causes = error.causes().join(": ");
                self.record.warnings.push(format!(
                    "the disk could not be read between the boots: {error}{}{causes}",
                    if causes.is_empty() { "" } else { ": " }
                ));
            }
        }
        for warning in &self.record.warnings {
            self.ui.warn(warning);
        }
    }

    /// A disk to read while the VM is off, in the state that the VM has left.
    fn guest_disk(&self, disk: files::DomainDisk) -> proof::GuestDisk<'_> {
        let overlays = self.overlays();
        let over = overlays.into_iter().find(|(below, _)| *below == disk.path);
        proof::GuestDisk {
            path: over.map_or(disk.path, |(_, overlay)| overlay),
            format: disk.format,
            keys: &self.options.keys,
            source: &self.source,
        }
    }

    fn finish(&mut self) -> Result<()> {
        self.merge_overlays()?;
        // From the next start on it is the domain of the output directory, without this log.
        self.define(Stage::Final, None)?;
        let off = self.is_off()?;
        let mut left = Vec::new();
        for kept in std::mem::take(&mut self.record.protected) {
            if !off || kept.forget().is_err() {
                left.push(kept);
            }
        }
        self.record.next_commands = if left.is_empty() {
            Vec::new()
        } else {
            let when = "# when the VM is off and you are content, give up the rollback:".to_owned();
            std::iter::once(when)
                .chain(left.iter().map(protect::Protected::forget_command))
                .collect()
        };
        self.record.protected = left;
        self.enter(Phase::Done)
    }

    fn bootstrap_failed(&mut self, failure: &Failure) -> Result<Error> {
        let folder = self.evidence(Stage::Bootstrap);
        let rehearsal = self.options.rehearsal.is_some();
        let off = self.is_off()?;
        if (rehearsal && !off) || failure.code == "reboot-loop" {
            self.virsh.destroy(self.files.uuid)?;
        }
        if self.is_off()? {
            self.guest_evidence(&folder);
        }
        self.record.save(&self.files.folder)?;
        let error = Error::new(
            ErrorKind::NotReady,
            format!(
                "Windows did not come up in the first boot: {}",
                failure.message
            ),
        )
        .hint(format!("evidence is in {}", folder.display()));
        Ok(if failure.code == "timeout" && !rehearsal {
            error.hint(format!(
                "the VM is left running: watch it (virt-viewer -c {} {}), or run the same command again to wait longer",
                self.options.uri, self.files.name
            ))
        } else {
            error
        })
    }

    /// Saves evidence while the VM still exists, then turns it off.
    fn give_up_final(&mut self, failure: &Failure) -> Result<()> {
        self.ui.warn(&format!(
            "{} on {}: going back",
            failure.message,
            self.bus(Stage::Final)
        ));
        let folder = self.evidence(Stage::Final);
        if !self.is_off()? {
            self.virsh.destroy(self.files.uuid)?;
        }
        self.guest_evidence(&folder);
        Ok(())
    }

    /// Restores everything, and starts the bootstrap VM again. Returns the error of the run.
    fn restore(&mut self) -> Result<Error> {
        if !self.is_off()? {
            // Only a run that was killed here leaves it running.
            self.virsh.destroy(self.files.uuid)?;
        }
        for kept in &self.record.protected {
            kept.restore().map_err(|e| {
                Error::new(ErrorKind::NotRolledBack, "the final boot failed, and the disk could not be put back")
                    .because(e)
                    .hint("run the same command again; boot.json lists what the disks can be put back from")
            })?;
        }
        let bootstrap = self.files.bootstrap.is_some();
        // libvirt's definition names the overlay, which is removed.
        self.define(
            match bootstrap {
                true => Stage::Bootstrap,
                false => Stage::Final,
            },
            None,
        )?;
        let protected = !self.record.protected.is_empty();
        let message = self
            .record
            .production
            .as_ref()
            .and_then(|p| p.message.clone());
        self.enter(Phase::FinalFailed)?;
        for kept in std::mem::take(&mut self.record.protected) {
            if let Err(error) = kept.forget() {
                self.record
                    .warnings
                    .push(format!("{error}; remove it: {}", kept.forget_command()));
            }
        }
        self.record.save(&self.files.folder)?;
        let mut error = Error::new(
            ErrorKind::NotReady,
            format!(
                "Windows did not come up on {}: {}",
                self.bus(Stage::Final),
                message.unwrap_or_else(|| "the boot failed".into())
            ),
        );
        error = error.hint(if protected {
            "the disk is as it was before the switch"
        } else {
            "the disk was not saved before the switch (--no-snapshot)"
        });
        if bootstrap {
            match self.virsh.start(self.files.uuid) {
                Ok(()) => error = error.hint("the VM of the first boot is defined and runs again"),
                Err(e) => {
                    error = error.hint(format!(
                        "the VM of the first boot is defined again, but does not start: {e}"
                    ))
                }
            }
        }
        if let Some(folder) = self.record.evidence.last() {
            error = error.hint(format!("evidence is in {}", folder.display()));
        }
        Ok(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host() {
        for (uri, want) in [
            ("qemu:///system", true),
            ("qemu+unix:///system?socket=/run/x", true),
            ("qemu+ssh://host/system", false),
            ("qemu", false),
        ] {
            assert_eq!(local(uri).is_ok(), want, "{uri}");
        }
    }
}
