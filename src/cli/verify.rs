//! `hyper2kvm verify DISK`, and of an output directory.
//!
//! The disk must boot from the controllers in the options. Without any, those of the directory's
//! report count, otherwise the VirtIO controllers with a driver: Windows XP and 2003 have none for
//! virtio-scsi.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::check::Check;
use crate::convert::linux;
use crate::error::{Error, ErrorKind, Result};
use crate::inspect::{Inspection, OsFamily, Severity, Survey};
use crate::later;
use crate::report::text;
use crate::session::look;
use crate::source::mirror;
use crate::types::DiskBus;
use crate::ui::{Styled, Tone, Ui};
use crate::verify;

use super::source::SourceArgs;
use super::wire;

#[derive(Debug, clap::Args)]
#[command(mut_arg("source", |source| source.help(
    "Disk image, VM (.vmx, .ovf, .ova, libvirt XML), or output directory of a conversion"
)))]
pub struct VerifyArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Controller from which the disk must boot (repeatable). [default: those in the report of an
    /// output directory; for a disk virtio-blk, and virtio-scsi except for Windows XP and 2003]
    #[arg(long, value_enum)]
    controller: Vec<DiskBus>,
}

pub fn run(args: &VerifyArgs, ui: &Ui) -> Result<()> {
    // Connects to a source on another host, so it comes before this process gives up the network.
    let is_folder = wire::location(&args.source.source, &args.source.wire)?.is_none()
        && args.source.source.is_dir();
    let below = match is_folder {
        true => later::record::allowed_below(&args.source.source)?,
        false => Vec::new(),
    };
    args.source.confine(None)?;
    let asked: Vec<DiskBus> = args.controller.clone();
    let mut named = args.source.clone();
    let mut reported = Vec::new();
    if is_folder {
        (named.source, reported) = folder(&args.source.source)?;
        named.allow_backing.extend(below);
    }
    let wanted = |survey: &Survey| {
        [&asked, &reported]
            .into_iter()
            .find(|list| !list.is_empty())
            .cloned()
            .unwrap_or_else(|| by_guest(survey))
    };
    let source = named.open()?;
    let is_result = args.source.source.is_dir();
    let mut needed = Vec::new();
    let (engine, mut survey, mut checks) = look(&source, named.reader()?, ui, |survey, guest| {
        needed = wanted(survey);
        verify::verify(survey, guest, &needed)
    })?;
    if survey.inspection.os.family == OsFamily::Linux {
        linux::complete(&source, &mut survey.inspection, ui)?;
        checks = linux::checks(&survey.inspection);
    }
    let ready = crate::check::is_ready(&checks);
    let inspection = &survey.inspection;
    ui.styled(&shown(ready, &checks, inspection, &needed, ui.is_verbose()));
    let failed: Vec<String> = checks
        .iter()
        .filter(|c| !c.ok)
        .map(|c| format!("[{}] {}", c.id, c.message))
        .collect();
    ui.quiet_warnings(&failed);
    ui.document(
        "verify",
        json!({
            "ready": ready,
            "engine": engine.name(),
            "controllers": survey.inspection.controllers,
            "checks": checks,
            "transport": mirror::transport(&source.path).name(),
            "bytes": {"fetched": mirror::fetched()},
        }),
    );
    if ready {
        return Ok(());
    }
    let mut error = Error::new(
        ErrorKind::NotReady,
        format!("{} is not boot-ready", survey.inspection.source.path),
    );
    error.reported = true;
    Err(error.hint(remedy(&survey.inspection, &checks, is_result)))
}

/// The verdict, the obstacles, and the controllers.
fn shown(
    ready: bool,
    checks: &[Check],
    inspection: &Inspection,
    needed: &[DiskBus],
    verbose: bool,
) -> Styled {
    let mut shown = Styled::default();
    match ready {
        true => shown.push(Tone::Good, "READY"),
        false => shown.push(Tone::Bad, "NOT READY"),
    }
    shown.push(Tone::Plain, format!(": {}\n\n", inspection.source.path));
    text::checks(&mut shown, checks, verbose);
    if !inspection.controllers.is_empty() {
        shown.push(Tone::Strong, "\nControllers\n");
        text::controllers(&mut shown, &inspection.controllers, needed, text::FAULT);
    }
    shown
}

/// Checks of the changes that a conversion makes: if only these fail, `convert` makes the disk
/// ready.
const WRITTEN_BY_CONVERT: [&str; 4] = [
    "boot-path",
    "controller-bound",
    "controller-service",
    "controller-image",
];

/// The remedy for a disk that is not ready; never a command that would refuse the disk.
fn remedy(inspection: &Inspection, checks: &[Check], is_result: bool) -> String {
    let mut findings = inspection.findings.iter();
    if let Some(finding) = findings.find(|f| f.severity == Severity::Blocker) {
        return format!("[{}] {}", finding.id, finding.remedy);
    }
    if is_result {
        return "convert the source again, into another directory or with --force".to_string();
    }
    let mut failed = checks
        .iter()
        .filter(|c| !c.ok && c.severity == Severity::Blocker);
    if inspection.os.family == OsFamily::Windows
        && failed.all(|c| WRITTEN_BY_CONVERT.contains(&c.id))
    {
        return "hyper2kvm convert makes it ready".to_string();
    }
    "each fault above names what is missing; hyper2kvm docs troubleshooting, by symptom".to_string()
}

fn by_guest(survey: &Survey) -> Vec<DiskBus> {
    match &survey.inspection.windows {
        Some(windows) if windows.target.major < 6 => vec![DiskBus::VirtioBlk],
        _ => vec![DiskBus::VirtioBlk, DiskBus::VirtioScsi],
    }
}

/// The disk to verify in an output directory, and the controllers for which it was converted.
fn folder(folder: &Path) -> Result<(PathBuf, Vec<DiskBus>)> {
    let path = folder.join("report.json");
    let no_report = || {
        Error::failed(format!("reading {}", path.display()))
            .hint("name a disk, or an output directory of convert")
    };
    let bytes = fs::read(&path).map_err(|e| no_report().because(e))?;
    let report: Value = serde_json::from_slice(&bytes).map_err(|e| no_report().because(e))?;
    let here = |path: &str| {
        // The directory may have been moved since.
        let recorded = PathBuf::from(path);
        let moved = recorded.file_name().map(|name| folder.join(name));
        moved.filter(|path| path.exists()).unwrap_or(recorded)
    };
    let disks = report["outputs"]["disks"].as_array();
    let disks: Vec<&str> = disks
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let source = match (&disks[..], report["outputs"]["final_xml"].as_str()) {
        ([disk], _) => here(disk),
        // Windows may be on any of them.
        ([_, _, ..], Some(xml)) => here(xml),
        _ => return Err(no_report()),
    };
    let boots_from = report["boots_from"].as_array();
    let wanted = boots_from.into_iter().flatten().filter_map(Value::as_str);
    Ok((source, wanted.filter_map(DiskBus::by_name).collect()))
}
