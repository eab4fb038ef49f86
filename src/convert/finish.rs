//! Everything a conversion writes besides the disks: the domains, the probe disk, the report.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::check::Check;
use crate::disk::chain::Image;
use crate::disk::detect::Format;
use crate::disk::empty::create_qcow2;
use crate::domain::element::Element;
use crate::domain::emit::EmitError;
use crate::domain::xml::to_element;
use crate::domain::{
    self, DomainError, Drivers, Emit, Machine, Nic, NicSource, Patch, Stage, emit,
};
use crate::drivers::catalogue::VirtioDevice;
use crate::drivers::select::DriverSet;
use crate::error::{Blocker, Error, ErrorKind, Result};
use crate::fix::journal::ActionState;
use crate::fix::trim::DataMap;
use crate::inspect::Inspection;
use crate::plan::Draft;
use crate::plan::Plan;
use crate::plan::outlook::{DiskOutlook, Outlook};
use crate::report::{self, ActionLine, Outputs, Report, Timings};
use crate::source::mirror;
use crate::source::vm;
use crate::text;
use crate::tool::{self, Cmd};
use crate::ui::document;
use crate::wire::Transport;

use super::copy;
use super::disks::Disk;
use super::in_place::roll_back_after;
use super::job::Copying;
use super::job::Job;
use super::later;
use super::machine::{self, MachineOptions};
use super::next;
use super::output::{OutputFolder, remove_work_files, save_json};
use super::page;
use super::prepare::{Basis, Prepared};
use super::run::Run;
use super::space;
use super::steps::{Disks, point, stopped};
use crate::session::vm::VmDisks;

/// A file of the output directory that is not written yet.
pub(super) struct TextFile {
    pub(super) file: String,
    text: String,
    script: bool,
}

/// The VM as text: domain XML of each stage, and the formats of `--emit`.
pub(super) struct Domains {
    pub(super) documents: Vec<TextFile>,
    bootstrap_xml: Option<String>,
    pub(super) final_xml: String,
    pub(super) emitted: Vec<String>,
    pub(super) warnings: Vec<String>,
}

/// Renders every description of the VM without writing it, so that errors show before the disks are
/// copied. `target` is the output directory.
pub(super) fn render_domains(
    job: &Job,
    target: &Path,
    (draft, basis): (&Draft, &Basis),
    inspection: &Inspection,
    disks: &VmDisks,
) -> Result<Outlook> {
    let mut targets = Vec::new();
    let mut list = Vec::new();
    for (i, disk) in disks.iter().enumerate() {
        let image = &disk.image;
        let path = copy::target_path(job, target, i, image)?;
        let more = match disks.is_changed(disk.id) {
            true => space::added(&draft.actions),
            false => 0,
        };
        list.push(disk_outlook(job, path.clone(), image, more)?);
        let backing = later::backing(job, image, &path)?;
        let disk = Disk::new(disks, disk.id, image.clone(), inspection);
        targets.push(disk.at(path, job.copy.format, backing));
    }
    let domains = domains(job, target, basis, inspection, &targets)?;
    let outputs = domains.outputs(target, &targets);
    Ok(Outlook::new(vm::VmFacts::of(&job.source.vm), outputs, list))
}

/// The expected sizes of the copied disks. `more` is what the fix adds.
pub(super) fn disk_outlook(
    job: &Job,
    path: PathBuf,
    image: &Image,
    more: u64,
) -> Result<DiskOutlook> {
    let size = image.virtual_size();
    if job.copy.method == Copying::Later {
        return Ok(DiskOutlook::later(path, size));
    }
    if job.copy.is_in_place() {
        return Ok(DiskOutlook::in_place(path, job.copy.format, size));
    }
    // Other formats may be compressed and take less space than the data to copy.
    let data = match (image.format() == Format::RAW, image.allocated()) {
        (true, 0) => size,
        (true, allocated) => allocated,
        (false, _) => DataMap::of(image)?.bytes,
    };
    let data = data.saturating_add(more);
    Ok(DiskOutlook::copied(path, job.copy.format, size, data))
}

impl Domains {
    /// The paths of all results in the output directory.
    pub(super) fn outputs(&self, folder: &Path, targets: &[domain::Disk]) -> Outputs {
        let in_target = |file: &String| folder.join(file);
        Outputs {
            disks: targets.iter().map(|t| t.path.clone()).collect(),
            bootstrap_xml: self.bootstrap_xml.as_ref().map(in_target),
            final_xml: Some(in_target(&self.final_xml)),
            emitted: self.emitted.iter().map(in_target).collect(),
            report: Some(folder.join("report.json")),
            complete: targets.iter().all(|t| t.backing.is_empty()),
        }
    }
}

fn domains(
    job: &Job,
    folder: &Path,
    basis: &Basis,
    inspection: &Inspection,
    targets: &[domain::Disk],
) -> Result<Domains> {
    let name = job.name();
    let in_target = |file: String| folder.join(file);
    let options = MachineOptions {
        name: name.clone(),
        probe: in_target(format!("{name}-probe.qcow2")),
        nvram: in_target(format!("{name}-nvram.fd")),
        driver_iso: job.drivers.source.as_deref().and_then(iso),
        drivers: optional_drivers(&basis.drivers),
        ..job.vm.machine.clone()
    };
    let machine = machine::machine(
        inspection,
        &basis.windows,
        basis.bootstrap,
        targets,
        &options,
    );
    written(job, folder, &machine)
}

/// Turns a domain error into a blocker if the guest is the reason and an option helps.
fn no_domain(error: DomainError, stage: Stage) -> Error {
    let (code, remedy) = match &error {
        DomainError::Arch { .. } => (
            "guest-arch",
            "keep it on a host of its own architecture: hyper2kvm describes x86 VMs only",
        ),
        DomainError::SectorSize { .. } if stage == Stage::Bootstrap => (
            "sector-size",
            "convert with --bootstrap none: VirtIO has 4096-byte sectors",
        ),
        DomainError::SectorSize { .. } => (
            "sector-size",
            "leave --storage out: VirtIO has 4096-byte sectors",
        ),
        DomainError::BiosSectorSize { .. } | DomainError::BadSectorSize { .. } => (
            "sector-size",
            "copy the disk to one with 512-byte sectors first (in the guest, or with a partition tool)",
        ),
        DomainError::TooManyDisks { .. } | DomainError::TooManyDevices { .. } => (
            "too-many-disks",
            "convert with --storage virtio-scsi, which has room for 255 disks where this guest has its driver; else leave data disks out of the source and attach them afterwards",
        ),
        DomainError::NoIde { .. } | DomainError::MachineType { .. } => {
            return Error::usage(error.to_string())
                .hint("leave --machine out, or name a type that has the bus of --bootstrap");
        }
        DomainError::UnwritablePath { .. } => {
            return Error::usage(error.to_string()).hint(
                "choose another directory with --output-dir, or another file for --virtio-iso",
            );
        }
        _ => {
            return Error::failed(format!("writing the {} domain", stage.as_str())).because(error);
        }
    };
    let blocker = Blocker::new(code, error.to_string(), remedy);
    Error::refused("no domain can be written for this guest", vec![blocker])
}

fn not_emitted(error: EmitError, emit: Emit) -> Error {
    let name = emit.name();
    let remedy = match &error {
        EmitError::Yaml(_) => {
            return Error::failed(format!("writing the {name} document")).because(error);
        }
        EmitError::TooManyDisks { .. } => format!(
            "convert with --storage virtio-scsi and --bootstrap none, which has the most places, or leave out --emit {name}"
        ),
        EmitError::Missing { .. } => format!("leave out --emit {name}"),
    };
    let blocker = Blocker::new("emit-limit", error.to_string(), remedy);
    Error::refused(
        "the VM cannot be written for others than libvirt",
        vec![blocker],
    )
}

/// Renders every description of the VM.
pub(super) fn written(job: &Job, folder: &Path, machine: &Machine) -> Result<Domains> {
    let name = &machine.name;
    let (firmware, warning) = machine::firmware(machine, job.vm.machine.portable);
    let mut warnings = Vec::from_iter(warning);
    warnings.extend(vlan_warning(machine));
    let mut stages = vec![Stage::Final];
    if machine.bootstrap.is_some() {
        stages.insert(0, Stage::Bootstrap);
    }
    let mut domains = Vec::new();
    for stage in stages {
        let element = to_element(machine, stage, &firmware).map_err(|e| no_domain(e, stage))?;
        let element = match &job.vm.xml_patch {
            Some(patch) => patched(patch, &element, stage)?,
            None => element,
        };
        domains.push((stage, element));
    }
    let mut documents: Vec<TextFile> = domains
        .iter()
        .map(|(stage, element)| TextFile {
            file: format!("{name}-{}.xml", stage.as_str()),
            text: element.to_document(),
            script: false,
        })
        .collect();
    let mut emitted = Vec::new();
    for emit in &job.vm.emit {
        warnings.extend(emit::warnings(*emit, machine));
        let context = emit::Context {
            folder,
            kubevirt: &job.vm.kubevirt,
        };
        let list = emit::documents(*emit, machine, &domains, context)
            .map_err(|e| not_emitted(e, *emit))?;
        for document in list {
            let file = format!("{name}{}", document.suffix);
            emitted.push(file.clone());
            documents.push(TextFile {
                file,
                text: document.text,
                script: document.script,
            });
        }
    }
    let bootstrap = machine.bootstrap.is_some();
    Ok(Domains {
        documents,
        bootstrap_xml: bootstrap.then(|| format!("{name}-bootstrap.xml")),
        final_xml: format!("{name}-final.xml"),
        emitted,
        warnings,
    })
}

fn vlan_warning(machine: &Machine) -> Option<String> {
    let tagged = |nic: &Nic| match &nic.source {
        NicSource::Bridge(bridge) => bridge.vlan.is_some(),
        _ => false,
    };
    machine.nics.iter().any(tagged).then(|| {
        "libvirt: a VLAN on a bridge of the kernel needs libvirt 11.0 and a bridge with VLAN filtering; older ones \
         take it on Open vSwitch only"
            .to_string()
    })
}

/// Returns the patched domain after validating it against libvirt's schema.
fn patched(patch: &Patch, domain: &Element, stage: Stage) -> Result<Element> {
    let failed = |e: Error| {
        Error::usage(format!("patching the {} domain", stage.as_str()))
            .because(e)
            .hint("hyper2kvm docs machines describes what --xml-patch takes")
    };
    let element = patch
        .apply(domain, stage)
        .map_err(|e| failed(Error::failed(e.to_string())))?;
    if let Some(missing) = [VALIDATE, XMLLINT].iter().find(|t| tool::find(t).is_none()) {
        tracing::warn!("{missing} is not installed: only libvirt will check the patch");
        return Ok(element);
    }
    let work = tempfile::tempdir()
        .map_err(|e| Error::failed("creating a temporary directory").because(e))?;
    let file = work.path().join("domain.xml");
    std::fs::write(&file, element.to_document())
        .map_err(|e| Error::failed(format!("writing {}", file.display())).because(e))?;
    Cmd::new(VALIDATE)
        .arg(&file)
        .arg("domain")
        .run()
        .map_err(|e| failed(e.into()))?;
    Ok(element)
}

/// libvirt's validator.
const VALIDATE: &str = "virt-xml-validate";
/// The program that the validator calls; Debian 12 installs one without the other.
const XMLLINT: &str = "xmllint";

pub(super) fn write(folder: &Path, document: &TextFile) -> Result<()> {
    let path = folder.join(&document.file);
    let write = || -> std::io::Result<()> {
        std::fs::write(&path, &document.text)?;
        if document.script {
            std::fs::set_permissions(&path, Permissions::from_mode(0o700))?;
        }
        Ok(())
    };
    write().map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))
}

/// Writes the domain XML and the report, and gives the directory its final name.
pub(super) fn finish(mut run: Run<'_>, prepared: &Prepared, disks: Disks) -> Result<Report> {
    let timings = run.clock.timings();
    match complete(&mut run, prepared, disks, timings) {
        // The disk is written already: it must not be left without a directory that can undo it.
        Err(error) if run.job.copy.is_in_place() => Err(match run.folder.journal() {
            Ok(mut journal) => roll_back_after(&run.disks, &mut journal, error),
            Err(lost) => Error::new(
                ErrorKind::NotRolledBack,
                format!("the fix failed and the disk could NOT be restored: {lost}"),
            )
            .because(error),
        }),
        outcome => outcome,
    }
}

fn complete(
    run: &mut Run<'_>,
    prepared: &Prepared,
    disks: Disks,
    timings: Timings,
) -> Result<Report> {
    let sync = run.sync_summary();
    point("copied")?;
    let mut report = describe(run.job, &run.folder, prepared, disks)?;
    report.timings = timings;
    report.sync = sync;
    save_report(run, &mut report, &prepared.plan)?;
    Ok(report)
}

/// Writes domain XML and probe disk and returns the report.
fn describe(job: &Job, folder: &OutputFolder, prepared: &Prepared, disks: Disks) -> Result<Report> {
    let name = job.name();
    let Disks {
        targets,
        bytes,
        fixed,
    } = disks;
    let domains = domains(
        job,
        folder.target(),
        &prepared.basis,
        &fixed.after,
        &targets,
    )?;
    let outputs = domains.outputs(folder.target(), &targets);
    let mut warnings = prepared.plan.warnings.clone();
    warnings.extend(domains.warnings);
    for document in &domains.documents {
        write(folder.path(), document)?;
    }
    if domains.bootstrap_xml.is_some() {
        let probe = folder.path().join(format!("{name}-probe.qcow2"));
        create_qcow2(&probe, PROBE_SIZE)
            .map_err(|e| Error::failed("creating the probe disk").because(e))?;
    }
    let actions = fixed
        .journal
        .doc
        .actions
        .iter()
        .map(|a| ActionLine {
            id: a.id.clone(),
            state: a.state,
            description: a.description.clone(),
        })
        .collect::<Vec<_>>();
    debug_assert!(actions.iter().all(|a| a.state != ActionState::InProgress));
    Ok(Report {
        name: name.clone(),
        engine: fixed.engine.name(),
        engine_why: fixed.engine.why,
        ready: is_ready(&fixed.checks, &prepared.plan.accepted),
        boots_from: prepared.basis.wanted(),
        accepted: prepared.plan.accepted.clone(),
        next_commands: next::commands(&name, folder.target(), &outputs),
        outputs,
        files: Vec::new(),
        actions,
        controllers: fixed.after.controllers.clone(),
        controllers_before: fixed.before.controllers.clone(),
        checks: fixed.checks,
        warnings,
        timings: Timings::default(),
        bytes,
        transport: Transport::File.name(),
        sync: None,
        trim: fixed.trim,
        request: job.request.clone(),
        inspection: fixed.before,
    })
}

/// Whether every check passed and nothing was accepted: what was accepted may keep Windows from starting.
fn is_ready(checks: &[Check], accepted: &[String]) -> bool {
    crate::check::is_ready(checks) && accepted.is_empty()
}

/// Blank, and large enough for Windows to recognise it as a disk.
const PROBE_SIZE: u64 = 64 << 20;

fn iso(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    path.is_file().then_some(path)
}

/// The devices for which the guest has drivers. Staged drivers count: Windows installs them at the
/// first boot, before the final stage.
fn optional_drivers(drivers: &DriverSet) -> Drivers {
    Drivers {
        agent: drivers.drives(VirtioDevice::Serial),
        balloon: drivers.drives(VirtioDevice::Balloon),
        rng: drivers.drives(VirtioDevice::Rng),
        netkvm: drivers.drives(VirtioDevice::Net),
    }
}

/// Writes both forms of the report, and gives the directory its final name.
pub(super) fn save_report(run: &mut Run<'_>, report: &mut Report, plan: &Plan) -> Result<()> {
    let Run {
        job,
        folder,
        devices,
        ..
    } = run;
    report.warnings.extend(folder.notes()?);
    report.transport = mirror::transport(&job.source.path).name();
    report.bytes.fetched = mirror::fetched();
    let extras = page::extras(job, folder.path(), report);
    let page = text::called(&report::html::page(report, plan, &extras)).into_owned();
    let path = folder.path().join("report.html");
    std::fs::write(&path, page)
        .map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))?;
    remove_work_files(folder.path())?;
    report.files = folder.settle()?;
    save_json(
        &folder.path().join("report.json"),
        document("report", serde_json::json!(report)),
    )?;
    point("before-rename")?;
    stopped()?;
    // Last check that the source is unchanged before the result appears.
    job.source.access.opened.check_unchanged()?;
    devices.finish()?;
    point("devices-finished")
        .and_then(|()| folder.complete())
        .inspect_err(|_| devices.give_up())
}

#[cfg(test)]
#[path = "finish_tests.rs"]
mod tests;
