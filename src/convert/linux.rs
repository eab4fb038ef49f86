//! `convert` for a Linux guest.
//!
//! If virt-v2v is installed and supports the distribution, it converts an overlay. The guest's own
//! tools make the initramfs and configure the boot loader. `--linux as-is` copies the guest on the
//! user's word. Any other guest is refused. There is one boot, because Linux accepts the new
//! controller immediately.
//!
//! hyper2kvm itself makes one change. Firmware without boot entries finds no loader on some guests;
//! there the guest's own loader is copied to `\EFI\BOOT\BOOTX64.EFI`, on the overlay.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::boot_path::{BootPath, Step};
use crate::check::{Check, CheckState};
use crate::disk::chain::Image;
use crate::disk::export::{DaemonAccess, EXPORT, Export};
use crate::disk::{BlockRead, BlockWrite, partition};
use crate::domain;
use crate::domain::element::Element;
use crate::error::{Error, ErrorKind, Result};
use crate::fix::journal::ActionState;
use crate::guest::ntfs3g::MountOptions;
use crate::guest::{EmbeddedWriter, GuestRead, GuestWrite, embedded};
use crate::inspect::linux::{LinuxFacts, LoaderCopies};
use crate::inspect::{Firmware, Inspection, Severity};
use crate::linux;
use crate::plan::linux::{Foreseen, LinuxChoice, ON_MY_WORD, describe, wanted_copies, warnings};
use crate::plan::model::Method;
use crate::plan::outlook::Outlook;
use crate::plan::{self, Plan};
use crate::report::{self, ActionLine, Bytes, Report};
use crate::source::vm;
use crate::text::quote;
use crate::tool::{self, qemu_img, virt_v2v};
use crate::ui::Ui;
use crate::wire::Transport;

use super::copy;
use super::disks::Disk;
use super::finish::{self, Domains};
use super::in_place::data_sector_size;
use super::job::Copying;
use super::job::Job;
use super::later::{self, images};
use super::machine::{self, MachineOptions};
use super::prepare;
use super::run::Run;
use super::space::{self, Needs};
use super::steps::{point, stopped};
use super::work::WORK;
use crate::session::vm::VmDisks;
use crate::session::{Names, SourceMachine, announce_appliance};

/// Completes the inspection of a Linux guest; does nothing for others.
pub fn complete(machine: &SourceMachine, inspection: &mut Inspection, ui: &Ui) -> Result<()> {
    if inspection.os.family != crate::inspect::OsFamily::Linux {
        return Ok(());
    }
    let work = Names::new();
    let disks = machine.disks(work.folder())?;
    examine(&images(&disks), machine, inspection, ui)?;
    machine.access.opened.check_unchanged()
}

/// Decides everything that `plan` and `convert` do with a Linux guest. `target` is the output
/// directory, `has` is whether this host has a program.
pub(super) fn decide(
    (job, ui): (&Job, &Ui),
    disks: &VmDisks,
    inspection: &mut Inspection,
    target: &Path,
    has: &dyn Fn(&str) -> bool,
) -> Result<(Plan, Option<Outlook>)> {
    let images = images(disks);
    examine(&images, &job.source, inspection, ui)?;
    let mut limits = later::blockers(job, &images);
    let (mut outlook, mut failed) = (None, None);
    if let Some(facts) = &inspection.linux {
        let room = space::in_folder(job, &Needs::default(), disks, target);
        let written = render_domains(job, inspection, facts, disks, target);
        match written.and_then(|outlook| room.map(|()| outlook)) {
            Err(error) if error.kind == ErrorKind::Refused => limits.extend(error.blockers),
            Err(error) => failed = Some(error),
            Ok(written) => outlook = Some(written),
        }
    }
    let seen = Foreseen {
        inspection,
        preference: job.guest.linux,
        installed: installed(job, has),
        in_place: job.copy.is_in_place(),
        copy_later: job.copy.method == Copying::Later,
        notes: machine::other_macs(&inspection.network.adapters, &job.vm.machine),
        limits,
    };
    let plan = plan::linux::plan(seen, &job.guest.accept);
    // The blockers already name what to do first.
    match failed {
        Some(error) if plan.blockers.is_empty() => Err(error),
        _ => Ok((plan, outlook)),
    }
}

/// Renders the domain without writing it, so that errors show before the disks are copied.
fn render_domains(
    job: &Job,
    inspection: &Inspection,
    facts: &LinuxFacts,
    disks: &VmDisks,
    target: &Path,
) -> Result<Outlook> {
    let mut targets = Vec::new();
    let mut list = Vec::new();
    for (i, disk) in disks.iter().enumerate() {
        let image = &disk.image;
        let path = copy::target_path(job, target, i, image)?;
        list.push(finish::disk_outlook(job, path.clone(), image, 0)?);
        let backing = later::backing(job, image, &path)?;
        let sector_size = data_sector_size(image)?;
        let disk = Disk::of_linux(disks, disk.id, image.clone(), sector_size);
        targets.push(disk.at(path, job.copy.format, backing));
    }
    let machine = machine::linux_machine(inspection, facts, &targets, &options(job, target));
    let outputs = finish::written(job, target, &machine)?.outputs(target, &targets);
    Ok(Outlook::new(vm::VmFacts::of(&job.source.vm), outputs, list))
}

fn options(job: &Job, target: &Path) -> MachineOptions {
    let name = job.name();
    MachineOptions {
        nvram: target.join(format!("{name}-nvram.fd")),
        name,
        ..job.vm.machine.clone()
    }
}

fn examine(
    images: &[Image],
    machine: &SourceMachine,
    inspection: &mut Inspection,
    ui: &Ui,
) -> Result<()> {
    let starting = |why: &str| announce_appliance(ui, why);
    let starting: Option<&dyn Fn(&str)> = match machine.no_appliance {
        true => None,
        false => Some(&starting),
    };
    linux::examine(images, inspection, machine.vm.firmware, starting)
}

/// The virt-v2v method that this host offers and the job permits.
fn installed(job: &Job, has: &dyn Fn(&str) -> bool) -> Option<Method> {
    let programs = [
        (Method::VirtV2vInPlace, virt_v2v::IN_PLACE),
        (Method::VirtV2v, virt_v2v::V2V),
    ];
    programs
        .into_iter()
        // Both read libvirt XML through nbdkit, even if their packages do not depend on it.
        .find(|(_, program)| has(program) && has(virt_v2v::NBDKIT))
        .map(|(method, _)| method)
        // virt-v2v starts an appliance; `--engine embedded` rules that out unless the user names
        // virt-v2v.
        .filter(|_| !job.source.no_appliance || job.guest.linux == LinuxChoice::VirtV2v)
}

/// The converted disks and the facts known about them.
struct ConvertedDisks {
    images: Vec<Image>,
    after: Inspection,
    actions: Vec<ActionLine>,
    method: Method,
}

pub(super) fn convert(
    mut run: Run<'_>,
    mut inspection: Inspection,
    has: &dyn Fn(&str) -> bool,
) -> Result<Report> {
    let (job, ui) = (run.job, run.ui);
    let target = run.folder.target();
    let unexamined = inspection.clone();
    let (plan, outlook) = decide((job, ui), &run.disks, &mut inspection, target, has)?;
    let method = match &plan.linux {
        Some(handover) if plan.blockers.is_empty() => handover.method,
        _ => return Err(prepare::refused(&inspection, plan.blockers)),
    };
    let decided = report::plan_document(&plan, outlook.as_ref(), &inspection);
    begin(&mut run, &decided)?;
    point("inspected")?;
    run.clock.inspected();

    let converted = make(&run, (&unexamined, &inspection), method)?;
    point("fixed")?;
    let storage = job.vm.machine.storage;
    let made_ready = made_ready(converted.method);
    let mut checks = verified(&converted)?;
    run.clock.fixed();

    run.begin_copy()?;
    let (targets, bytes) = copy_disks(&run, &converted, &decided)?;
    let summary = run.sync_summary();
    if job.copy.verify {
        checks.push(check(
            "copy-identical",
            true,
            "the copies were compared with their sources",
        ));
    }
    run.clock.copied();
    point("copied")?;

    let facts = linux_facts(&converted.after)?;
    let options = options(job, run.folder.target());
    let machine = machine::linux_machine(&converted.after, facts, &targets, &options);
    let domains = finish::written(job, run.folder.target(), &machine)?;
    for document in &domains.documents {
        finish::write(run.folder.path(), document)?;
    }
    let final_xml = run.folder.target().join(&domains.final_xml);
    let warnings = all_warnings(&run, &converted, &domains);
    let mut report = Report {
        name: options.name.clone(),
        engine: facts.reader,
        engine_why: match converted.method {
            Method::AsIs => "a Linux guest, copied unchanged",
            Method::VirtV2v | Method::VirtV2vInPlace => "a Linux guest, converted by virt-v2v",
        },
        ready: plan.accepted.is_empty(),
        boots_from: vec![storage],
        accepted: plan.accepted.clone(),
        next_commands: vec![
            format!("virsh define {}", quote(&final_xml)),
            format!("virsh start --console {}", options.name),
        ],
        outputs: domains.outputs(run.folder.target(), &targets),
        files: Vec::new(),
        actions: converted.actions,
        controllers: BTreeMap::from([(storage, boot_path(&made_ready))]),
        controllers_before: BTreeMap::new(),
        checks,
        warnings,
        timings: run.clock.timings(),
        bytes,
        transport: Transport::File.name(),
        sync: summary,
        trim: Vec::new(),
        request: job.request.clone(),
        inspection,
    };
    finish::save_report(&mut run, &mut report, &plan)?;
    Ok(report)
}

/// An error if the interrupted run decided otherwise. If it made something of the guest, this run starts over.
fn begin(run: &mut Run<'_>, decided: &serde_json::Value) -> Result<()> {
    if let Some(before) = &run.resumed {
        before.check_plan(decided)?;
        if before.has_overlays() {
            tracing::warn!("starting over: what was made of the guest is not used again");
            run.folder.start_over()?;
            run.resumed = None;
        }
    }
    run.save_plan(decided.clone())
}

/// The checks of the guest after the conversion, all passed.
fn verified(converted: &ConvertedDisks) -> Result<Vec<Check>> {
    let mut checks = readable(&converted.after);
    checks.push(check("boot-path", true, &made_ready(converted.method)));
    match checks.iter().find(|c| !c.ok) {
        None => Ok(checks),
        Some(bad) => Err(Error::failed(format!(
            "the converted guest is not ready: {}",
            bad.message
        ))
        .hint("the source is untouched")),
    }
}

/// The warnings about the guest after the conversion. What the conversion has repaired no longer
/// appears.
fn all_warnings(run: &Run<'_>, converted: &ConvertedDisks, domains: &Domains) -> Vec<String> {
    let job = run.job;
    let mut warnings = warnings(&converted.after);
    if converted.method == Method::AsIs {
        warnings.push(ON_MY_WORD.to_string());
    }
    warnings.extend(machine::other_macs(
        &converted.after.network.adapters,
        &job.vm.machine,
    ));
    warnings.extend(job.source.vm.notes.clone());
    warnings.extend(domains.warnings.iter().cloned());
    warnings.extend(later::warnings(job, &images(&run.disks)));
    warnings
}

fn linux_facts(inspection: &Inspection) -> Result<&LinuxFacts> {
    let facts = inspection.linux.as_ref();
    facts.ok_or_else(|| Error::failed("the converted guest cannot be read any more"))
}

/// Carries out the plan on overlays and examines the result. The source is given as the survey found it, and as
/// it was examined.
fn make(
    run: &Run<'_>,
    (unexamined, before): (&Inspection, &Inspection),
    method: Method,
) -> Result<ConvertedDisks> {
    stopped()?;
    let Run {
        job, ui, folder, ..
    } = run;
    let sources = images(&run.disks);
    let mut converted = ConvertedDisks {
        images: sources.clone(),
        after: before.clone(),
        actions: Vec::new(),
        method,
    };
    if method != Method::AsIs {
        converted.images = hand_over(run, &sources, before, method).map_err(|e| {
            e.hint("--linux as-is copies the guest unchanged, when you know that it has the VirtIO drivers")
        })?;
        converted
            .actions
            .push(done(plan::linux::VIRT_V2V, "virt-v2v converted the guest"));
        ui.status("Verifying", "reading the result back");
        // What is repaired is not found again.
        converted.after = unexamined.clone();
        examine(&converted.images, &job.source, &mut converted.after, ui)?;
    }
    let facts = linux_facts(&converted.after)?;
    if let Some(copies) = wanted_copies(&converted.after, facts).cloned() {
        ui.status("Fixing", "the UEFI fall-back loader, on an overlay");
        let overlay = folder.path().join(WORK).join("efi.qcow2");
        let image = copy_loader(&converted.images, &copies, &overlay)?;
        if let Some(slot) = converted.images.get_mut(copies.disk) {
            *slot = image;
        }
        converted
            .actions
            .push(done(plan::linux::UEFI_FALLBACK, &describe(&copies)));
        converted.after = unexamined.clone();
        examine(&converted.images, &job.source, &mut converted.after, ui)?;
    }
    Ok(converted)
}

fn done(id: &str, description: &str) -> ActionLine {
    ActionLine {
        id: id.to_string(),
        state: ActionState::Done,
        description: description.to_string(),
    }
}

/// Has virt-v2v convert overlays of the disks. It opens files by name, so the images below the
/// overlays are served from the descriptors of this run.
fn hand_over(
    run: &Run<'_>,
    sources: &[Image],
    before: &Inspection,
    method: Method,
) -> Result<Vec<Image>> {
    let work = run.folder.path().join(WORK).join("virt-v2v");
    let failed = |e| Error::failed(format!("creating {}", work.display())).because(e);
    std::fs::create_dir_all(&work).map_err(failed)?;
    let name = run.job.name();
    let mut overlays = Vec::new();
    let mut served = Vec::new();
    for (i, source) in sources.iter().enumerate() {
        let overlay = work.join(format!("overlay-{i}.qcow2"));
        let below = Export::<dyn BlockRead>::open_readonly_for(source, DaemonAccess::User)?;
        let socket = below
            .socket()
            .ok_or_else(|| Error::failed("the storage daemon has no socket for virt-v2v"))?;
        qemu_img::create_over(&overlay, &socket, EXPORT, source.virtual_size())
            .map_err(|e| Error::failed("creating an overlay for virt-v2v").because(e))?;
        overlays.push(overlay);
        served.push(below);
    }
    let xml = work.join("source.xml");
    std::fs::write(&xml, source_xml(&name, before, &overlays)?).map_err(failed)?;
    let program = match method {
        Method::VirtV2vInPlace => virt_v2v::IN_PLACE,
        Method::VirtV2v | Method::AsIs => virt_v2v::V2V,
    };
    run.ui
        .status("Converting", &format!("with {program}; this takes minutes"));
    let mut said = |line: &str| tracing::info!("{program}: {line}");
    let failed =
        |e: tool::ToolError| Error::failed(format!("converting with {program}")).because(e);
    if method == Method::VirtV2vInPlace {
        virt_v2v::in_place(&xml, &mut said).map_err(failed)?;
        close_all(served)?;
        return sources
            .iter()
            .zip(&overlays)
            .map(|(source, overlay)| Ok(source.with_overlay(overlay)?))
            .collect();
    }
    let out = work.join("out");
    std::fs::create_dir_all(&out)
        .map_err(|e| Error::failed(format!("creating {}", out.display())).because(e))?;
    virt_v2v::copy(&xml, &out, &mut said).map_err(failed)?;
    close_all(served)?;
    (0..sources.len())
        .map(|i| {
            let letter = crate::domain::xml::target_name("sd", i);
            let path = out.join(format!("{name}-{letter}"));
            Ok(Image::open_info(&path, Some("qcow2"), &[])?)
        })
        .collect()
}

fn close_all(exports: Vec<Export<dyn BlockRead>>) -> Result<()> {
    Ok(exports.into_iter().try_for_each(Export::close)?)
}

/// The VM's description for virt-v2v: its disks, and the firmware, which selects the boot loader.
fn source_xml(name: &str, before: &Inspection, overlays: &[PathBuf]) -> Result<String> {
    let el = Element::new;
    let mut os = el("os");
    if before.firmware == Some(Firmware::Uefi) {
        os = os.with("firmware", "efi");
    }
    os.push(el("type").with("arch", "x86_64").text("hvm"));
    let mut devices = el("devices");
    for (i, overlay) in overlays.iter().enumerate() {
        let path = std::path::absolute(overlay)
            .map_err(|e| Error::failed("finding the overlay").because(e))?;
        let path = path
            .to_str()
            .ok_or_else(|| Error::failed("virt-v2v takes only paths that are text"))?;
        devices.push(
            el("disk")
                .with("type", "file")
                .with("device", "disk")
                .child(el("driver").with("name", "qemu").with("type", "qcow2"))
                .child(el("source").with("file", path))
                .child(
                    el("target")
                        .with("dev", crate::domain::xml::target_name("sd", i))
                        .with("bus", "scsi"),
                ),
        );
    }
    Ok(el("domain")
        .with("type", "kvm")
        .child(el("name").text(name))
        .child(el("memory").with("unit", "MiB").text("2048"))
        .child(el("vcpu").text("1"))
        .child(os)
        .child(devices)
        .to_document())
}

/// Copies the guest's boot loader to the firmware's default path, on an overlay of the disk.
fn copy_loader(images: &[Image], copies: &LoaderCopies, overlay: &Path) -> Result<Image> {
    let image = images
        .get(copies.disk)
        .ok_or_else(|| Error::failed("the EFI system partition is on none of the disks"))?;
    if let Some(folder) = overlay.parent() {
        std::fs::create_dir_all(folder)
            .map_err(|e| Error::failed(format!("creating {}", folder.display())).because(e))?;
    }
    let failed = |e| Error::failed("copying the UEFI fall-back loader").because(e);
    let export = Export::<dyn BlockWrite>::open_overlay(image, overlay)?;
    let disk = export.disk();
    let layout = partition::read_layout(disk.as_ref())
        .map_err(|e| Error::failed("reading the partitions of the overlay").because(e))?;
    let mut contents = Vec::new();
    {
        let guest = embedded::open(disk.clone(), &layout).map_err(failed)?;
        for copy in &copies.copies {
            let bytes = guest
                .read(copies.volume, &copy.from, copy.size)
                .map_err(failed)?;
            contents.push((copy.to.clone(), bytes));
        }
    }
    let options = MountOptions { force_dirty: false };
    let mut writer: Box<dyn GuestWrite> = Box::new(EmbeddedWriter::new(disk, &layout, options));
    for folder in &copies.folders {
        writer.create_dir(copies.volume, folder).map_err(failed)?;
    }
    for (to, bytes) in contents {
        writer
            .write_file(copies.volume, &to, &bytes)
            .map_err(failed)?;
    }
    writer.close().map_err(failed)?;
    let image = export.image().clone();
    export.close()?;
    Ok(image)
}

/// The checks of `verify`. None of them shows that the Linux finds its disk, so the guest is never
/// reported as ready.
pub fn checks(inspection: &Inspection) -> Vec<Check> {
    let mut checks = readable(inspection);
    checks.push(Check::new(
        "boot-path",
        Severity::Blocker,
        CheckState::CouldNotRun,
        "whether a Linux guest starts is not checked here: start it and watch its console",
    ));
    checks
}

/// Checks that the Linux is readable and that the firmware finds its boot loader.
fn readable(inspection: &Inspection) -> Vec<Check> {
    let Some(facts) = &inspection.linux else {
        let why = inspection.blockers().first().map(|b| b.reason.clone());
        return vec![check(
            "linux-readable",
            false,
            &why.unwrap_or_else(|| "the Linux on this disk cannot be read".to_string()),
        )];
    };
    let root = format!(
        "root file system {} on {}",
        facts.root.filesystem, facts.root.place
    );
    let mut checks = vec![check("linux-readable", true, &root)];
    if inspection.firmware == Some(Firmware::Uefi) {
        let there = facts.fallback_loader == Some(true);
        let text = if there {
            "\\EFI\\BOOT\\BOOTX64.EFI is there"
        } else {
            "\\EFI\\BOOT\\BOOTX64.EFI is missing"
        };
        checks.push(check("uefi-fallback", there, text));
    }
    checks
}

fn made_ready(method: Method) -> String {
    match method {
        Method::AsIs => "taken on your word (--linux as-is), not checked",
        Method::VirtV2v | Method::VirtV2vInPlace => "made ready by virt-v2v, not checked again",
    }
    .to_string()
}

fn boot_path(reason: &str) -> BootPath {
    BootPath {
        ready: true,
        service: None,
        reason: reason.to_string(),
        steps: vec![Step {
            ok: true,
            text: reason.to_string(),
        }],
        faults: Vec::new(),
    }
}

fn check(id: &'static str, ok: bool, message: &str) -> Check {
    let state = if ok {
        CheckState::Ok
    } else {
        CheckState::Fault
    };
    Check::new(id, Severity::Blocker, state, message)
}

/// Copies whole disks: the free space of Linux file systems is not read.
fn copy_disks(
    run: &Run<'_>,
    converted: &ConvertedDisks,
    decided: &serde_json::Value,
) -> Result<(Vec<domain::Disk>, Bytes)> {
    stopped()?;
    let mut disks = Vec::new();
    for (image, source) in converted.images.iter().zip(run.disks.iter()) {
        let sector_size = data_sector_size(image)?;
        disks.push(Disk::of_linux(
            &run.disks,
            source.id,
            image.clone(),
            sector_size,
        ));
    }
    match run.job.copy.method {
        Copying::Later => later::keep(run, disks),
        Copying::Now | Copying::InPlace => copy::to_targets(run, disks, &[], decided),
    }
}

#[cfg(test)]
#[path = "linux_plain_tests.rs"]
mod plain_tests;
#[cfg(test)]
#[path = "linux_tests.rs"]
mod tests;
