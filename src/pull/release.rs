//! `release`: deletes a VM whose disks are overlays on a source. The domain is turned off and
//! undefined, and the directory removed; the source is unchanged.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::folder::{Domain, Folder};
use crate::boot;
use crate::boot::in_use::{self, Held};
use crate::boot::record::Phase;
use crate::convert::exchange;
use crate::convert::sync;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::files;
use crate::later::record::{FILE_NAME, LaterState, Record};
use crate::later::serve;
use crate::later::wire::SOCKET;
use crate::report::OutputFile;
use crate::ui::Ui;

#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) folder: PathBuf,
    pub(crate) uri: String,
    /// Release even if the VM has run.
    pub(crate) force: bool,
}

/// The result of a release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Released {
    #[serde(with = "crate::text::json_path")]
    pub(crate) folder: PathBuf,
    /// Whether a domain was undefined.
    pub(crate) domain: bool,
    /// The data that is lost with it.
    pub(crate) lost: String,
    /// The files of the source, which are no longer in use.
    #[serde(serialize_with = "crate::text::json_path::list")]
    pub(crate) source: Vec<PathBuf>,
    /// Files that hyper2kvm did not write, and that still exist.
    #[serde(serialize_with = "crate::text::json_path::list")]
    pub(crate) kept: Vec<PathBuf>,
}

pub(crate) fn release(options: &Options, ui: &Ui) -> Result<Released> {
    exchange::repair(&options.folder)?;
    if sync::is_synced(&options.folder) {
        return release_synced(&options.folder, ui);
    }
    let folder = Folder::open(&options.folder)?;
    let lock = boot::lock(&folder.path)?;
    let Some(record) = Record::load(&folder.path)? else {
        return Err(nothing_to_release(&folder.path, "its disks were copied"));
    };
    if record.state == LaterState::Alone {
        return Err(nothing_to_release(&folder.path, "everything was pulled"));
    }
    let domain = folder.domain(&options.uri)?;
    let lost = lost(&folder, domain.as_ref());
    if let Some(lost) = &lost
        && !options.force
    {
        return Err(Error::failed(format!(
            "{} is not given up: {lost} is lost with it",
            folder.path.display()
        ))
        .hint("--force gives it up all the same")
        .hint(format!(
            "to keep it: hyper2kvm pull {} copies what is left",
            crate::text::quote(&folder.path)
        )));
    }
    let defined = domain.is_some();
    if let Some(domain) = domain {
        undefine(&domain, ui)?;
    }
    hit("released-domain")?;
    // Nobody else may be using the disks, under any name in libvirt.
    let mut held = Held::default();
    let disks: Vec<PathBuf> = (folder.disks.iter().filter(|disk| disk.is_file()))
        .cloned()
        .collect();
    let holder = disks.iter().find_map(|disk| held.hold(disk));
    if let Some(user) = holder.or_else(|| in_use::domain_of(&disks, Some(&options.uri))) {
        return Err(Error::failed(format!(
            "a disk in {} is in use by {user}",
            folder.path.display()
        ))
        .hint("shut it down first, then run the same command again"));
    }
    ui.status("Removing", &folder.path.display().to_string());
    let kept = remove(&folder)?;
    lock.remove();
    if kept.is_empty() {
        files::removed(fs::remove_dir(&folder.path))
            .map_err(|e| Error::failed(format!("removing {}", folder.path.display())).because(e))?;
    }
    Ok(Released {
        folder: folder.path,
        domain: defined,
        lost: lost.unwrap_or_else(|| "nothing: the VM has not run".to_owned()),
        source: record.sources(),
        kept,
    })
}

fn release_synced(folder: &Path, ui: &Ui) -> Result<Released> {
    let folder = std::path::absolute(folder)
        .map_err(|e| Error::usage(format!("{} is not a path", folder.display())).because(e))?;
    ui.status("Removing", &folder.display().to_string());
    let kept = sync::release(&folder)?;
    Ok(Released {
        folder,
        domain: false,
        lost: "the copies of the passes; the VM is not touched".to_owned(),
        source: Vec::new(),
        kept,
    })
}

fn nothing_to_release(folder: &Path, why: &str) -> Error {
    Error::usage(format!(
        "{} needs no source any more: {why}",
        folder.display()
    ))
    .hint(format!(
        "undefine its domain, if it has one, and remove it by hand: rm -r {}",
        crate::text::quote(folder)
    ))
}

/// The data written by the VM, if it has run; `None` if nothing is lost.
fn lost(folder: &Folder, domain: Option<&Domain>) -> Option<String> {
    if domain.is_some_and(Domain::is_active) {
        return Some("the VM runs: what it has in memory and has written".to_owned());
    }
    let phase = folder.boot.as_ref().map(|boot| boot.phase);
    if phase.is_some_and(|phase| phase != Phase::New) {
        return Some("the VM was started: what it has written since".to_owned());
    }
    let listed = folder.listed();
    let changed = folder.disks.iter().find(|disk| {
        let name = disk.strip_prefix(&folder.path).unwrap_or(disk);
        let was = listed.iter().find(|was| was.path == name);
        let found = fs::metadata(disk).ok();
        let now = found.and_then(|found| OutputFile::of(name.to_owned(), &found));
        now.is_some() && now.as_ref() != was
    });
    changed.map(|disk| {
        format!(
            "{} was written to: what a VM, or a pull that was not finished, has written",
            disk.display()
        )
    })
}

fn undefine(domain: &Domain, ui: &Ui) -> Result<()> {
    if domain.is_active() {
        ui.status("Stopping", "the domain");
        domain.virsh.destroy(domain.uuid)?;
    }
    Ok(domain.virsh.undefine(domain.uuid)?)
}

/// Removes the files of hyper2kvm, the record and the report last, so that a killed run can be
/// repeated. Returns the files of somebody else.
fn remove(folder: &Folder) -> Result<Vec<PathBuf>> {
    let failed = |path: &Path, e: io::Error| {
        Error::failed(format!("removing {}", path.display())).because(e)
    };
    let mut last = folder.xml().to_vec();
    last.extend([FILE_NAME, "report.json"].map(|name| folder.path.join(name)));
    let own = folder.own_files();
    for path in own.iter().filter(|path| !last.contains(path)) {
        files::removed(fs::remove_file(path)).map_err(|e| failed(path, e))?;
        hit("releasing")?;
    }
    let mut kept = Vec::new();
    let entries = fs::read_dir(&folder.path).map_err(|e| failed(&folder.path, e))?;
    for entry in entries {
        let path = entry.map_err(|e| failed(&folder.path, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_dir = path.symlink_metadata().is_ok_and(|found| found.is_dir());
        match of_boot(&name) {
            true if is_dir => fs::remove_dir_all(&path).map_err(|e| failed(&path, e))?,
            true => fs::remove_file(&path).map_err(|e| failed(&path, e))?,
            // Directories of the conversion are empty by now.
            false if is_dir => remove_empty(&path, &mut kept),
            false if !last.contains(&path) && name != boot::LOCK => kept.push(path),
            false => {}
        }
    }
    for path in &last {
        files::removed(fs::remove_file(path)).map_err(|e| failed(path, e))?;
    }
    Ok(kept)
}

fn remove_empty(folder: &Path, kept: &mut Vec<PathBuf>) {
    let below = fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in below {
        let path = entry.path();
        if path.symlink_metadata().is_ok_and(|found| found.is_dir()) {
            remove_empty(&path, kept);
        }
    }
    if fs::remove_dir(folder).is_err() {
        kept.push(folder.to_owned());
    }
}

/// Whether `boot` or libvirt leaves a file of that name beside those of the conversion.
fn of_boot(name: &str) -> bool {
    let named = [
        "boot.json",
        ".boot.json.new",
        ".boot-domain.xml",
        "install.json",
        "nvram.before-final",
        serve::LOCK,
        serve::LOG,
    ];
    let served = |end: &str| {
        name.strip_suffix(end)
            .is_some_and(|name| name.ends_with('.'))
    };
    let log = |prefix: &str| name.starts_with(prefix) && name.ends_with(".log");
    named.contains(&name)
        || name.starts_with("evidence-bootstrap")
        || name.starts_with("evidence-final")
        || log("com1-")
        || log("com2-")
        || served(SOCKET)
        || served("ask")
        || name.ends_with("-nvram.fd")
        || name.contains(".qcow2.since-switch-")
}

fn hit(point: &str) -> Result<()> {
    failpoint::hit(point).map_err(|e| Error::failed("giving the VM up").because(e))
}
