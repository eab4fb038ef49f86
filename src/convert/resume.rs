//! `--resume`: the files of an interrupted copy, and what a later run needs to continue it.
//!
//! Before the first byte of a copy, [`RESUME`] is written with the options, the files of the source
//! and the decisions. Before the first range is recorded, the partial directory is made durable
//! with the fixed and verified overlays in it. Then comes [`RESUME`]. Until then it counts only as
//! long as the host runs: a short copy waits for no overlay to reach the disk. A run with
//! `--resume` takes the directory over, compares all of that with its own findings and verifies the
//! overlays again. Then it copies the ranges that the journals of the disks lack. It fixes nothing
//! again. If the Windows disk has changed, nothing can be continued; any other disk that has
//! changed is copied from its start.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::disk::copy::Record;
use crate::disk::hold::boot_id;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::files;
use crate::fix::journal;
use crate::fix::trusted::TrustedFolder;
use crate::report::DiskTrim;
use crate::text::sha256_hex;
use crate::transfer::Foundation;
use crate::ui::Ui;

use super::job::Job;
use super::output::{OutputFolder, work_file};
use super::place::untrusted;
use super::work::{RESUME, resume_file};
use crate::session::vm::VmDisks;

const SCHEMA: &str = "hyper2kvm/resume/1";
/// The beginning of a hint that the copied data is kept.
pub(super) const KEPT: &str = "what is copied is kept";

/// Options for how a disk is reached, compared or installed. They do not affect the result.
const ABOUT_THE_WAY: [&str; 12] = [
    "connections",
    "retries",
    "user",
    "password-file",
    "ssh-identity",
    "ssh-known-hosts",
    "tls-ca",
    "tls-fingerprint",
    "verify-copy",
    "connect",
    "install-to",
    "pool",
];

#[derive(Debug, Serialize, Deserialize)]
struct Document {
    schema: String,
    version: String,
    options: BTreeMap<String, Vec<String>>,
    /// Digest of the decisions.
    plan: String,
    disks: Vec<DiskRecord>,
    trim: Vec<DiskTrim>,
    /// The boot of the host on which the files are complete; `None` if they are durable.
    boot: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct DiskRecord {
    /// The identity of its files.
    source: Value,
    /// The overlay over it, relative to the partial directory.
    pub(super) overlay: Option<String>,
}

/// Starts over if a disk is unpacked first: the unpacked file was removed with the interrupted run.
pub(super) fn refuse_packed(job: &Job, folder: &mut OutputFolder) -> Result<()> {
    let packed = job.source.vm.disks.iter().any(|disk| disk.packed.is_some());
    if !packed || !folder.was_taken_over() {
        return Ok(());
    }
    tracing::warn!(
        "starting over: the disks are unpacked again, and nothing shows that they are the same"
    );
    folder.start_over()
}

/// An interrupted copy that this run continues.
pub(super) struct Resumed {
    plan: String,
    disks: Vec<DiskRecord>,
    /// Disks that have changed and are copied from their start.
    changed: BTreeSet<usize>,
    trim: Vec<DiskTrim>,
}

impl Resumed {
    /// Takes over an earlier run's files in the directory. If this run must start over, the
    /// directory is emptied.
    pub(super) fn take(
        job: &Job,
        ui: &Ui,
        folder: &mut OutputFolder,
        disks: &VmDisks,
    ) -> Result<Option<Self>> {
        if !job.output.resume {
            return Ok(None);
        }
        if !folder.was_taken_over() {
            ui.status("Resuming", "nothing: no copy was interrupted here");
            return Ok(None);
        }
        let over = |folder: &mut OutputFolder, why: &str| {
            tracing::warn!("starting over: {why}");
            folder.start_over().map(|()| None)
        };
        let doc = match Document::read(folder.path()) {
            Ok(doc) => doc,
            Err(error) => return over(folder, &error.message),
        };
        doc.refuse_other_options(&options(job))?;
        if doc.disks.len() != disks.len() {
            return over(folder, "the source has another number of disks now");
        }
        let mut changed = BTreeSet::new();
        for (i, (disk, record)) in disks.iter().zip(&doc.disks).enumerate() {
            if is_same(&record.source, &disk.image.identity()) {
                continue;
            }
            let why = format!("{} has changed since", disk.path.display());
            if disks.is_changed(disk.id) {
                return over(folder, &why);
            }
            tracing::warn!("{why}: disk {} is copied from its start", i + 1);
            changed.insert(i);
        }
        let trim = doc.trim.into_iter().filter(|trim| {
            let unchanged = disks
                .iter()
                .enumerate()
                .filter(|(i, _)| !changed.contains(i));
            unchanged
                .into_iter()
                .any(|(_, disk)| disk.path == trim.disk)
        });
        let resumed = Self {
            plan: doc.plan,
            trim: trim.collect(),
            disks: doc.disks,
            changed,
        };
        // A run that was killed at its end may have removed one.
        let mut overlays = (0..disks.len()).filter_map(|i| resumed.overlay(folder, i));
        if let Some(gone) = overlays.find(|path| !path.exists()) {
            return over(folder, &format!("{} is gone", gone.display()));
        }
        for i in &resumed.changed {
            resumed.forget(folder, *i)?;
        }
        ui.status("Resuming", &format!("{}", folder.path().display()));
        Ok(Some(resumed))
    }

    /// Removes what is no longer of use: the overlay of a disk, and the record of its copy.
    fn forget(&self, folder: &OutputFolder, i: usize) -> Result<()> {
        let overlay = self.disks[i]
            .overlay
            .as_ref()
            .map(|name| folder.path().join(name));
        for path in overlay.into_iter().chain([journal(folder, i)?]) {
            files::removed(std::fs::remove_file(&path))
                .map_err(|e| Error::failed(format!("removing {}", path.display())).because(e))?;
        }
        Ok(())
    }

    /// The overlay of an unchanged disk.
    pub(super) fn overlay(&self, folder: &OutputFolder, i: usize) -> Option<PathBuf> {
        if self.changed.contains(&i) {
            return None;
        }
        let name = self.disks.get(i)?.overlay.as_ref()?;
        Some(folder.path().join(name))
    }

    pub(super) fn has_overlays(&self) -> bool {
        self.disks.iter().any(|disk| disk.overlay.is_some())
    }

    pub(super) fn trim(&self) -> Vec<DiskTrim> {
        self.trim.clone()
    }

    /// Fails if the decisions of this run differ from those that the overlays were made with.
    pub(super) fn check_plan(&self, decided: &Value) -> Result<()> {
        if digest(decided) == self.plan {
            return Ok(());
        }
        Err(
            Error::failed("the interrupted run decided otherwise than this one")
                .hint("drivers, scripts or this program were replaced since; without --resume the conversion starts over"),
        )
    }
}

impl Document {
    fn read(partial: &Path) -> Result<Self> {
        let folder = TrustedFolder::open(partial).map_err(untrusted)?;
        let bytes = folder.read(&resume_file()).map_err(untrusted)?;
        let doc: Self = serde_json::from_slice(&bytes)
            .map_err(|e| Error::failed(format!("{RESUME} cannot be read: {e}")))?;
        if doc.schema != SCHEMA || doc.version != env!("CARGO_PKG_VERSION") {
            return Err(Error::failed(format!(
                "the copy was begun by version {} of this program",
                doc.version
            )));
        }
        if doc.boot.is_some() && doc.boot != boot_id() {
            return Err(Error::failed(
                "the host was restarted before anything of the copy was durable",
            ));
        }
        Ok(doc)
    }

    /// Writes a new file, and gives it its name after `ready`.
    fn write(&self, path: &Path, ready: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let beside = path.with_extension("new");
        std::fs::write(&beside, format!("{:#}\n", serde_json::json!(self)))?;
        ready(&File::open(&beside)?)?;
        failpoint::step("before", "rename of resume.json")?;
        files::rename(&beside, path)?;
        failpoint::step("after", "rename of resume.json")
    }

    fn refuse_other_options(&self, now: &BTreeMap<String, Vec<String>>) -> Result<()> {
        let names: BTreeSet<&String> = self.options.keys().chain(now.keys()).collect();
        let mut error: Option<Error> = None;
        for name in names {
            let (was, is) = (self.options.get(name), now.get(name));
            if was == is {
                continue;
            }
            let said = |v: Option<&Vec<String>>| match v {
                Some(values) if values.as_slice() == ["true"] => "given".to_owned(),
                Some(values) => values.join(", "),
                None => "not given".to_owned(),
            };
            let line = format!("--{name}: {} then, {} now", said(was), said(is));
            let so_far = error.take().unwrap_or_else(|| {
                Error::usage("the interrupted copy was begun with other options")
            });
            error = Some(so_far.hint(line));
        }
        match error {
            None => Ok(()),
            Some(error) => Err(error
                .hint("give the same options again; without --resume the conversion starts over")),
        }
    }
}

fn options(job: &Job) -> BTreeMap<String, Vec<String>> {
    let mut options = job.request.options.clone();
    options.retain(|name, _| !ABOUT_THE_WAY.contains(&name.as_str()));
    options
}

/// Whether two lists name the same files with the same contents, as far as can be determined.
fn is_same(was: &Value, now: &Value) -> bool {
    let (Some(was), Some(now)) = (was.as_array(), now.as_array()) else {
        return false;
    };
    let same = |(was, now): (&Value, &Value)| {
        let (mut was, mut now) = (was.clone(), now.clone());
        // Bytes written to a device are counted since the host started.
        if was["writes"][0] != now["writes"][0] {
            for side in [&mut was, &mut now] {
                side["writes"] = Value::Null;
            }
        }
        was == now
    };
    was.len() == now.len() && !now.is_empty() && was.iter().zip(now).all(same)
}

fn digest(decided: &Value) -> String {
    sha256_hex(decided.to_string().as_bytes())
}

fn journal(folder: &OutputFolder, i: usize) -> Result<PathBuf> {
    work_file(folder, &format!("copy-{i}.journal"))
}

/// The path at which the copy of disk `i` records its progress.
pub(super) fn record(folder: &OutputFolder, i: usize, what: Value) -> Result<Record> {
    Ok(Record {
        path: journal(folder, i)?,
        what,
        foundation: None,
        is_all: false,
    })
}

/// Writes the record: after this, a copy can be resumed. Until its foundation is laid, that holds
/// only as long as the host runs; with `durably` it is laid at once.
pub(super) fn save(
    job: &Job,
    folder: &OutputFolder,
    (decided, durably): (&Value, bool),
    disks: Vec<(Value, Option<&Path>)>,
    trim: &[DiskTrim],
) -> Result<Foundation> {
    let below = |path: &Path| {
        let relative = path.strip_prefix(folder.path()).ok()?;
        relative.to_str().map(str::to_owned)
    };
    let doc = Document {
        schema: SCHEMA.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        options: options(job),
        plan: digest(decided),
        disks: disks
            .into_iter()
            .map(|(source, overlay)| DiskRecord {
                source,
                overlay: overlay.and_then(below),
            })
            .collect(),
        trim: trim.to_vec(),
        boot: boot_id(),
    };
    let path = work_file(folder, RESUME)?;
    let failed =
        |e: std::io::Error| Error::failed(format!("writing {}", path.display())).because(e);
    let contents = folder.contents().map_err(failed)?;
    let is_temporary = doc.boot.is_some() && !durably;
    if is_temporary {
        doc.write(&path, |_| Ok(())).map_err(failed)?;
    }
    let to = path.clone();
    let doc = Document { boot: None, ..doc };
    let laid = Mutex::new(false);
    let foundation = Foundation::new(move || {
        // Several disks may begin to record at the same time.
        let mut laid = laid.lock().unwrap_or_else(PoisonError::into_inner);
        if !*laid {
            contents.sync()?;
            doc.write(&to, |file| files::sync(file, &to.with_extension("new")))?;
            // Makes every name created above durable.
            to.parent().map_or(Ok(()), journal::sync_folder)?;
            *laid = true;
        }
        Ok(())
    });
    if !is_temporary {
        foundation.lay().map_err(failed)?;
    }
    Ok(foundation)
}

#[cfg(test)]
#[path = "resume_tests.rs"]
mod tests;
