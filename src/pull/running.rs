//! The pull of a running VM: QEMU copies, libvirt manages the domain, and this program observes.
//!
//! It may end at any time. A started job continues without it. One that was lost with the VM or its
//! libvirt is started again; QEMU copies what the image still lacks.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::folder::{Domain, Folder};
use super::{Options, hit, room};
use crate::boot::files::{self, DomainDisk};
use crate::disk::named_backing;
use crate::error::{Error, ErrorKind, Result};
use crate::files::names_a_device;
use crate::later::record::{Disk, Record};
use crate::stop;
use crate::tool::qemu_img::{self, Depth};
use crate::tool::spec::Spec;
use crate::tool::virsh::{DomainState, JobKind};
use crate::ui::{self, Progress, Ui};

/// The interval between two queries of the job.
const TICK: Duration = Duration::from_millis(300);
/// The interval between two flushes, each with a check of what is left.
const FLUSH: Duration = Duration::from_secs(10);
/// The interval between two checks of a source that did not answer.
const AGAIN: Duration = Duration::from_secs(3);
/// The number of attempts for a job that disappears without completing.
const ATTEMPTS: u32 = 5;

/// Copies every disk; returns the number of bytes.
pub(super) fn pull(
    options: &Options,
    ui: &Ui,
    folder: &Folder,
    record: &Record,
    domain: &Domain,
) -> Result<u64> {
    let mut lefts = Vec::new();
    for (path, disk) in folder.disks.iter().zip(&record.disks) {
        lefts.push(left(path, disk)?);
    }
    let total = lefts.iter().sum();
    // QEMU pauses a VM whose disk is out of space.
    let sizes = folder.disks.iter().map(std::path::PathBuf::as_path);
    room::check(sizes.zip(lefts.iter().copied()))?;
    ui.status(
        "Pulling",
        &format!("{} while the VM runs", ui::bytes(total)),
    );
    let progress = ui.progress("Pulling", total);
    let mut before = 0;
    for ((path, disk), left) in folder.disks.iter().zip(&record.disks).zip(lefts) {
        let one = Pulling {
            options,
            ui,
            folder: &folder.path,
            record,
            domain,
            path,
            disk,
            progress: &progress,
            before,
            left,
        };
        one.run()?;
        before += left;
        hit("pull-copied")?;
    }
    progress.finish(total);
    Ok(total)
}

/// One disk.
struct Pulling<'a> {
    options: &'a Options,
    ui: &'a Ui,
    folder: &'a Path,
    record: &'a Record,
    domain: &'a Domain,
    path: &'a Path,
    disk: &'a Disk,
    progress: &'a Progress,
    /// Bytes copied of the previous disks.
    before: u64,
    /// Bytes that only the source had at the start.
    left: u64,
}

impl Pulling<'_> {
    fn run(&self) -> Result<()> {
        let (mut attempts, mut flushed, mut waits) = (0, Instant::now(), false);
        let mut limited = false;
        loop {
            let Some(live) = self.live()? else {
                return Err(self.lost());
            };
            if live.below.is_empty() {
                return Ok(());
            }
            if stop::requested() {
                return Err(Error::new(
                    ErrorKind::Interrupted,
                    "interrupted; QEMU continues copying",
                )
                .hint("run the same command again to see it through"));
            }
            if self.waits()? {
                std::thread::sleep(TICK);
                continue;
            }
            let virsh = &self.domain.virsh;
            match virsh.job(self.domain.uuid, &live.target)? {
                // A job that ended early may have met a broken connection.
                None if attempts > 0 && !self.answers(&mut waits)? => {
                    std::thread::sleep(AGAIN);
                    continue;
                }
                None if attempts == ATTEMPTS => return Err(self.gave_up(&live)),
                None => {
                    attempts += 1;
                    limited = true;
                    let limit = self.options.bandwidth.unwrap_or(0);
                    // It may have ended, or be another program's, at this very moment: the next
                    // query shows.
                    if let Err(error) = virsh.start_pull(self.domain.uuid, &live.target, limit) {
                        tracing::info!("pulling {}: {error}", live.target);
                    }
                    hit("pull-started")?;
                }
                Some(job) if job.kind == JobKind::Pull => {
                    if !std::mem::replace(&mut limited, true) {
                        let limit = self.options.bandwidth.unwrap_or(0);
                        virsh.limit_job(self.domain.uuid, &live.target, limit)?;
                    }
                    if flushed.elapsed() > FLUSH {
                        self.flush(&live);
                        flushed = Instant::now();
                    }
                    hit("pull-copying")?;
                }
                Some(_) => {
                    return Err(Error::failed(format!(
                        "libvirt is at work on {} of the domain",
                        live.target
                    ))
                    .hint("wait for it, then run the same command again"));
                }
            }
            std::thread::sleep(TICK);
        }
    }

    /// The disk in the running domain.
    fn live(&self) -> Result<Option<DomainDisk>> {
        let xml = self.domain.virsh.xml(self.domain.uuid, true)?;
        let (_, disks) = files::identify(&xml)?;
        Ok(disks.into_iter().find(|disk| disk.path == self.path))
    }

    /// Whether the source is readable; a changed one is an error. `waits` is whether the wait was
    /// announced.
    fn answers(&self, waits: &mut bool) -> Result<bool> {
        if self.disk.wire().is_none() {
            return Ok(true);
        }
        match self.record.check_source(self.folder) {
            Ok(()) => {
                *waits = false;
                Ok(true)
            }
            Err(error) if error.kind == ErrorKind::Refused => Err(error),
            Err(error) => {
                if !std::mem::replace(waits, true) {
                    self.ui
                        .warn(&format!("waiting until the source answers again: {error}"));
                }
                Ok(false)
            }
        }
    }

    /// Whether the VM is paused until a remote source returns.
    fn waits(&self) -> Result<bool> {
        let found = self.domain.virsh.state(self.domain.uuid)?;
        let tick = found.ok_or_else(|| self.lost())?;
        match tick.state {
            DomainState::Off => Err(self.lost()),
            // `hyper2kvm serve` resumes it.
            DomainState::Paused
                if tick.is_io_error()
                    && self.disk.wire().is_some()
                    && !self.domain.virsh.is_full(self.domain.uuid)? =>
            {
                Ok(true)
            }
            DomainState::Paused if tick.is_io_error() => Err(Error::failed(
                "QEMU paused the VM: a disk, or the source, gave an I/O error",
            )
            .hint(
                "when its storage is there again: virsh resume, then run the same command again",
            )),
            _ => Ok(false),
        }
    }

    fn lost(&self) -> Error {
        Error::failed("the VM went off, and with it QEMU, which copied its disks")
            .hint("run the same command again: it continues, whether the VM runs or not")
    }

    fn gave_up(&self, live: &DomainDisk) -> Error {
        let uri = self.domain.virsh.uri();
        Error::failed(format!(
            "QEMU gave up copying to {} {ATTEMPTS} times",
            self.path.display()
        ))
        .hint(format!(
            "see why: virsh -c {uri} domblkerror {}; the log of QEMU names {}",
            self.domain.uuid, live.target
        ))
        .hint("shut the VM down and run the same command again: it copies without QEMU's help")
    }

    /// Flushes the image: its data is not copied again, whatever happens next.
    fn flush(&self, live: &DomainDisk) {
        let Some(node) = &live.node else { return };
        if let Err(error) = self.domain.virsh.flush(self.domain.uuid, node) {
            tracing::debug!("flushing {}: {error}", live.target);
        }
        match left(self.path, self.disk) {
            Ok(now) => {
                let copied = self.left.saturating_sub(now);
                self.progress.set(self.before + copied);
            }
            Err(error) => tracing::debug!("{error}"),
        }
    }
}

/// Bytes that the image of a running VM lacks, as far as it was flushed.
fn left(path: &Path, disk: &Disk) -> Result<u64> {
    let reading = || Error::failed(format!("reading the map of {}", path.display()));
    if qemu_img::chain_length(path).is_ok_and(|levels| levels == 1) {
        return Ok(0);
    }
    let mut bytes = 0u64;
    let counted = qemu_img::mapped(&spec(path, disk)?, true, &mut |range, depth| {
        if depth == Depth::Below {
            bytes = bytes.saturating_add(range.end - range.start);
        }
    });
    counted.map_err(|e| reading().because(e))?;
    Ok(bytes)
}

/// The chain by paths: QEMU of the VM has the files open and locked.
fn spec(path: &Path, disk: &Disk) -> Result<Spec> {
    let file = |path: &Path| {
        let driver = match names_a_device(path) {
            true => "host_device",
            false => "file",
        };
        json!({"driver": driver, "filename": path.to_string_lossy(), "read-only": true})
    };
    let source = disk.levels.iter().flat_map(|level| &level.files);
    let files = source.map(|file| (file.path.clone(), false));
    let mut spec = Spec::named(Value::Null, files.chain([(path.to_owned(), false)]));
    let mut node = Value::Null;
    for level in disk.levels.iter().rev() {
        let format = level.format.as_str();
        let image = match (&level.wire, level.files.first()) {
            (Some(wire), _) => {
                let name = wire.backing_name();
                node = named_backing(&name, format, disk.virtual_size, &mut spec)?;
                continue;
            }
            (None, Some(image)) => image,
            (None, None) => continue,
        };
        let mut next = json!({"driver": format, "file": file(&image.path), "read-only": true});
        if !matches!(format, "raw" | "vpc" | "vdi") {
            next["backing"] = node;
        }
        node = next;
    }
    spec.node = json!({
        "driver": "qcow2", "file": file(path), "backing": node, "read-only": true,
    });
    Ok(spec)
}
