//! `rehearse`: watches both boots of a VM on a throw-away overlay, and leaves nothing behind.
//!
//! ```text
//!  lock -> whose UUID? -> note -> convert (a child, to an overlay) -> domain XML -> both boots -> remove
//! ```
//!
//! The source is only read. The domain has a name of its own and no network ([`domain`]).
//! Everything that will be removed is recorded before it is made ([`record`]). So the next run
//! removes what a killed one left.

pub(crate) mod batch;
mod child;
mod domain;
pub(crate) mod memory;
pub(crate) mod page;
pub(crate) mod record;
pub(crate) mod result;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;
use uuid::Uuid;

use crate::boot::access;
use crate::boot::install::{self, Destination};
use crate::boot::record::Record as BootRecord;
use crate::boot::{self, files};
use crate::convert::exchange;
use crate::domain::element::Element;
use crate::error::{Blocker, Error, ErrorKind, Result};
use crate::failpoint;
use crate::files::{create_passage, entries, open_directory};
use crate::fix::journal::write_durably;
use crate::fix::trusted;
use crate::later;
use crate::source::mirror;
use crate::tool::virsh::Virsh;
use crate::ui::{Ui, document};

use self::batch::Row;
use self::record::{Claim, Record};
use self::result::{FILE_NAME, PAGE, REPORT, Rehearsal, Verdict};

/// The output directory, below the work directory.
const OUTPUT: &str = "vm";

#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) source: PathBuf,
    pub(crate) name: String,
    /// The UUID of the VM, if its source has one.
    pub(crate) uuid: Option<Uuid>,
    /// The evidence directory.
    pub(crate) evidence: PathBuf,
    /// The directory for the overlay, if it is not the evidence directory.
    pub(crate) place: Option<Destination>,
    /// A libvirt network to which the NICs are attached; without one their links are down.
    pub(crate) network: Option<String>,
    pub(crate) convert: child::Conversion,
    /// The options of the boots. Directory and evidence are filled in later.
    pub(crate) boot: boot::Options,
}

pub(crate) use self::child::Conversion;
pub(crate) use self::page::TITLE as PAGE_TITLE;

/// Rehearses. The error beside the result is the reason why Windows did not come up, or was not
/// started.
pub(crate) fn rehearse(options: &Options, ui: &Ui) -> Result<(Rehearsal, Option<Error>)> {
    let begin = Instant::now();
    boot::local(&options.boot.uri)?;
    let virsh = Virsh::new(&options.boot.uri);
    virsh
        .uuids()
        .map_err(|e| boot::unreachable(&options.boot.uri, e))?;
    clean_up(ui);
    let evidence = evidence_directory(&options.evidence)?;
    let mut claim = Claim::take(&evidence)?;
    remove_old(&evidence)?;
    let mut rehearsal = Rehearsal::new(&options.name, &options.source, &evidence);
    let outcome = identity(options, &virsh, &mut rehearsal).and_then(|uuid| {
        let place = match &options.place {
            Some(place) => install::destination(place, &virsh)?,
            None => evidence.clone(),
        };
        let record = Record::new(&options.boot.uri, uuid, &options.name, &evidence, &place);
        claim.note(&record)?;
        let ran = point("rehearse-noted").and_then(|()| run(options, &record, &mut rehearsal, ui));
        ui.status("Removing", &record.name);
        if let Err(error) = point("rehearse-removing").and_then(|()| record.remove()) {
            let error =
                error.hint("the next rehearsal tries again; hyper2kvm doctor lists what is left");
            ui.warn(&format!("{error}: {}", error.causes().join(": ")));
            rehearsal.left.push(format!("{} ({error})", record.name));
        }
        ran
    });
    let error = outcome.err();
    rehearsal.seconds = begin.elapsed().as_secs_f64();
    let ended = conclude(&mut rehearsal, error, &evidence);
    // Anything that could not be removed stays recorded.
    if rehearsal.left.is_empty() {
        claim.done();
    }
    if ended.is_err() {
        // An empty directory is useless.
        let _ = fs::remove_dir(&evidence);
    }
    ended.map(|error| (rehearsal, error))
}

/// Writes the verdict and the documents to the evidence directory. A failure unrelated to the guest
/// is an error.
fn conclude(
    rehearsal: &mut Rehearsal,
    error: Option<Error>,
    evidence: &Path,
) -> Result<Option<Error>> {
    rehearsal.verdict = match error.as_ref().map(|e| e.kind) {
        None => Verdict::Up,
        Some(ErrorKind::NotReady) => Verdict::Down,
        Some(ErrorKind::Refused) => Verdict::Refused,
        Some(_) => {
            return match error {
                Some(error) => Err(error),
                None => Ok(None),
            };
        }
    };
    if let Some(error) = &error {
        rehearsal.failed(error);
    }
    rehearsal.evidence = result::evidence(evidence);
    rehearsal.advise();
    let failed =
        |e: io::Error| Error::failed(format!("writing to {}", evidence.display())).because(e);
    let text = format!("{:#}\n", document("rehearse", json!(rehearsal)));
    write_durably(&evidence.join(FILE_NAME), text.as_bytes()).map_err(failed)?;
    let title = format!(
        "Rehearsal of {}: {}",
        rehearsal.name,
        rehearsal.verdict.as_str()
    );
    let page = page::page(&title, &[Row::of(rehearsal.clone())], evidence);
    write_durably(&evidence.join(PAGE), page.as_bytes()).map_err(failed)?;
    Ok(error)
}

/// Removes the leftovers of this user's killed rehearsals.
pub(crate) fn clean_up(ui: &Ui) {
    for left in record::leftovers() {
        if left.runs {
            continue;
        }
        let name = left.record.name.clone();
        ui.status("Removing", &format!("what was left of {name}"));
        if let Err(error) = left.remove() {
            let causes = error.causes().join(": ");
            ui.warn(&format!(
                "{name}, of a run that was killed, is still there: {error}: {causes}"
            ));
        }
    }
}

/// The UUID of the rehearsal. It is that of the VM, because Windows ties its hardware configuration
/// and its activation to it. It is another one if this host has a domain with it.
fn identity(options: &Options, virsh: &Virsh, rehearsal: &mut Rehearsal) -> Result<Uuid> {
    let Some(uuid) = options.uuid else {
        return Ok(Uuid::new_v4());
    };
    if !virsh.uuids()?.contains(&uuid) {
        return Ok(uuid);
    }
    if virsh.running()?.contains(&uuid) {
        let reason = format!("a domain with the UUID of this VM, {uuid}, runs on this host");
        let remedy = "shut that domain down first (virsh shutdown), or rehearse on another host";
        return Err(Error::refused(
            format!("{} is not rehearsed", options.name),
            vec![Blocker::new("vm-runs", reason, remedy)],
        ));
    }
    let other = Uuid::new_v4();
    rehearsal.warnings.push(format!(
        "this host has a domain with the UUID {uuid}, which is off: the rehearsal had the UUID {other}, so Windows saw \
         another VM and may have asked to be activated"
    ));
    Ok(other)
}

/// Runs everything from the source to both boots.
fn run(options: &Options, record: &Record, rehearsal: &mut Rehearsal, ui: &Ui) -> Result<()> {
    rehearsal.domain = Some(record.name.clone());
    rehearsal.uuid = Some(record.uuid);
    let failed =
        |e: io::Error| Error::failed(format!("creating {}", record.work.display())).because(e);
    create_passage(&record.work).map_err(failed)?;
    let folder = record.work.join(OUTPUT);
    let report = options.convert.run(&folder, ui)?;
    rehearsal.converted(&report);
    point("rehearse-converted")?;
    let kept = fs::copy(folder.join(REPORT), record.evidence.join(REPORT));
    kept.map_err(|e| Error::failed("keeping the report").because(e))?;
    if report
        .pointer("/inspection/os/family")
        .and_then(|f| f.as_str())
        == Some("linux")
    {
        let reason = "this is a Linux guest: nothing in it reports on COM1 that it is up";
        let remedy = "start its final domain by hand (hyper2kvm docs linux)";
        return Err(Error::refused(
            format!("{} is not rehearsed", options.name),
            vec![Blocker::new("linux-rehearsal", reason, remedy)],
        ));
    }
    rewrite_domains(&folder, options, record, rehearsal)?;
    point("rehearse-defined")?;
    let mut boots = options.boot.clone();
    boots.folder = folder.clone();
    boots.rehearsal = Some(record.evidence.clone());
    // A throw-away disk need not be saved.
    boots.snapshot = false;
    let server = match later::Record::left(&folder)? {
        Some(left) if left.is_on_wire() => {
            let uri = &options.boot.uri;
            Some(later::serve::Server::start(
                &folder,
                &left,
                access::owner(uri),
            )?)
        }
        _ => None,
    };
    let outcome = exchange::repair(&boots.folder)
        .and_then(|()| boot::boot_served(&boots, server.as_ref(), ui));
    if let Some(server) = &server {
        let more = server.fetched().saturating_add(mirror::fetched());
        rehearsal.bytes.fetched = rehearsal.bytes.fetched.saturating_add(more);
    }
    if let Ok(Some(booted)) = BootRecord::load(&folder) {
        rehearsal.booted(&booted);
    }
    outcome.map(drop).map_err(|error| match error.kind {
        ErrorKind::Interrupted => Error::new(
            ErrorKind::Interrupted,
            "interrupted; the source is untouched, and the rehearsal is removed",
        ),
        _ => error,
    })
}

/// Turns both domains of the directory into those of the rehearsal.
fn rewrite_domains(
    folder: &Path,
    options: &Options,
    record: &Record,
    rehearsal: &mut Rehearsal,
) -> Result<()> {
    for path in files::domain_files(folder)? {
        let failed =
            |e: anyhow::Error| Error::failed(format!("rewriting {}", path.display())).because(e);
        let mut root = Element::parse(&trusted::read(&path)?).map_err(|e| failed(e.into()))?;
        for what in domain::rehearsed(&mut root, record, options.network.as_deref()) {
            let line = format!("left out of the rehearsal: {what}");
            if !rehearsal.warnings.contains(&line) {
                rehearsal.warnings.push(line);
            }
        }
        write_durably(&path, root.to_document().as_bytes()).map_err(|e| failed(e.into()))?;
    }
    Ok(())
}

/// Prepares the evidence directory, which QEMU's user must be able to pass through: empty, or of an
/// earlier rehearsal.
fn evidence_directory(path: &Path) -> Result<PathBuf> {
    let failed = |e: io::Error| Error::failed(format!("creating {}", path.display())).because(e);
    let path = std::path::absolute(path)
        .map_err(|e| Error::usage(format!("{} is not a path", path.display())).because(e))?;
    let there = path.symlink_metadata().is_ok();
    create_passage(&path).map_err(failed)?;
    let path = path.canonicalize().map_err(failed)?;
    if there {
        let held = open_directory(rustix::fs::CWD, &path).map_err(failed)?;
        let names = entries(&held).map_err(failed)?;
        let marks = |name: &str| name == record::LOCK || name == FILE_NAME;
        let marked = names.iter().any(|(n, _)| n.to_str().is_some_and(marks));
        let written = |name: &str| OLD.contains(&name);
        let only_ours = names.iter().all(|(n, _)| n.to_str().is_some_and(written));
        if !marked && !only_ours {
            return Err(Error::failed(format!(
                "{} exists and is not the directory of a rehearsal",
                path.display()
            ))
            .hint("--output-dir names another directory"));
        }
    }
    Ok(path)
}

/// The files that a rehearsal writes to its evidence directory.
const OLD: [&str; 5] = ["bootstrap", "final", REPORT, PAGE, FILE_NAME];

/// Removes the evidence of an earlier rehearsal. Other files of the user stay.
fn remove_old(evidence: &Path) -> Result<()> {
    let removed = |path: &Path| match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    };
    for name in OLD {
        let path = evidence.join(name);
        removed(&path)
            .map_err(|e| Error::failed(format!("removing {}", path.display())).because(e))?;
    }
    Ok(())
}

fn point(name: &str) -> Result<()> {
    failpoint::hit(name).map_err(|e| Error::failed("rehearsing").because(e))
}
