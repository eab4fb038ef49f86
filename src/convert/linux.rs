//! `convert` for a Linux guest.
//!
//! virt-v2v, where it is installed and knows the distribution, converts an overlay: it has the guest's
//! own tools make the initramfs and the boot loader. `--linux as-is` copies the guest on the user's
//! word. Anything else is refused. There is one boot: Linux takes the new controller at once.
//!
//! One thing is done here: where firmware without boot entries would find no loader, the guest's own is
//! copied to `\EFI\BOOT\BOOTX64.EFI`, on the overlay.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use crate::boot::quote;
use crate::boot_path::{BootPath, Controller, Step};
use crate::disk::chain::Image;
use crate::disk::export::{EXPORT, Export, Reach};
use crate::disk::{BlockRead, BlockWrite, partition};
use crate::domain::StorageBus;
use crate::domain::element::Element;
use crate::error::{Blocker, Error, ErrorKind, Result};
use crate::fix::journal::ActionState;
use crate::guest::ntfs3g::MountOptions;
use crate::guest::{EmbeddedWriter, GuestRead, GuestWrite, embedded};
use crate::inspect::{Firmware, Inspection, Severity};
use crate::linux::{self, LinuxFacts, LoaderCopies};
use crate::report::outlook::Outlook;
use crate::report::text;
use crate::report::vm;
use crate::report::{ActionLine, Bytes, Check, CheckState, Report, Timings};
use crate::tool::{self, host, qemu_img, virt_v2v};
use crate::ui::{Styled, Tone, Ui, document};
use crate::wire::Transport;

use super::copy::{self, Arriving, Begun};
use super::devices::Devices;
use super::finish;
use super::in_place::data_sector_size;
use super::later::{self, Copying, Kept};
use super::machine::{self, MachineOptions, TargetDisk};
use super::output::OutputFolder;
use super::prepare;
use super::resume::Resumed;
use super::run::{Job, WORK, point, save_json, save_report, stopped};
use super::session::{Names, Source, SourceMachine, announce_appliance};
use super::space::{self, Needs};

/// `--linux`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wish {
    #[default]
    Auto,
    VirtV2v,
    AsIs,
}

/// Who makes the guest ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    VirtV2vInPlace,
    VirtV2v,
    AsIs,
}

/// What `convert` will do, as data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub way: Way,
    pub why: String,
    pub actions: Vec<ActionLine>,
    pub blockers: Vec<Blocker>,
    /// The blockers that `--accept` took, by their codes.
    pub accepted: Vec<String>,
    pub warnings: Vec<String>,
    pub outlook: Option<Outlook>,
}

impl Plan {
    /// For people.
    pub fn text(&self) -> Styled {
        let way = match self.way {
            Way::VirtV2vInPlace => "virt-v2v-in-place converts the guest",
            Way::VirtV2v => "virt-v2v converts the guest",
            Way::AsIs => "the guest is copied unchanged",
        };
        let mut text = Styled::default();
        text.push(Tone::Strong, format!("Linux: {way}"));
        text.push(Tone::Plain, format!(" ({})\n", self.why));
        text::warnings(&mut text, &self.warnings);
        if !self.actions.is_empty() {
            text.push(Tone::Strong, "\nActions\n");
        }
        for action in &self.actions {
            text.push(Tone::Plain, format!("  {:<22} ", action.id));
            text.hang();
            text.push(Tone::Plain, format!("{}\n", action.description));
        }
        if let Some(outlook) = &self.outlook {
            outlook.append_to(&mut text);
        }
        text
    }

    /// `plan --json` and `plan.json`, with the keys every plan has.
    pub fn document(&self, inspection: &Inspection) -> serde_json::Value {
        let mut body = serde_json::json!({
            "way": self.way,
            "way_why": self.why,
            "actions": self.actions,
            "skipped": [],
            "drivers": [],
            "blockers": self.blockers,
            "accepted": self.accepted,
            "ready": self.blockers.is_empty() && self.accepted.is_empty(),
            "warnings": self.warnings,
            "source": inspection.source,
            "os": inspection.os,
            "linux": inspection.linux,
            "controllers": inspection.controllers,
        });
        if let (Some(outlook), Some(body)) = (&self.outlook, body.as_object_mut()) {
            outlook.add_to(body);
        }
        body
    }
}

/// Completes an inspection that found a Linux; does nothing for others.
pub fn complete(machine: &SourceMachine, inspection: &mut Inspection, ui: &Ui) -> Result<()> {
    if inspection.os.family != crate::inspect::OsFamily::Linux {
        return Ok(());
    }
    let work = Names::new();
    let disks = machine.disks(work.folder())?;
    examine(&images(&disks)?, machine, inspection, ui)?;
    machine.opened.check_unchanged()
}

/// Everything `plan` and `convert` decide about a Linux guest. `target` is the output folder.
pub(super) fn decide_all(
    job: &Job,
    ui: &Ui,
    disks: &[Source],
    inspection: &mut Inspection,
    target: &Path,
) -> Result<Plan> {
    let images = images(disks)?;
    examine(&images, &job.source, inspection, ui)?;
    let mut plan = plan(job, inspection);
    plan.warnings.extend(machine::other_macs(
        &inspection.network.adapters,
        &job.machine,
    ));
    plan.blockers.extend(later::blockers(job, &images));
    if job.copying == Copying::Later && plan.way == Way::VirtV2v {
        plan.blockers.push(Blocker::new(
            "copy-later",
            "virt-v2v copies the disks it converts",
            "leave --copy later out, install virt-v2v-in-place, or take --linux as-is where the guest is ready",
        ));
    }
    if let Some(facts) = &inspection.linux {
        let room = space::in_folder(job, &Needs::default(), disks, target);
        let outlook = rehearse(job, inspection, facts, &images, target);
        match outlook.and_then(|outlook| room.map(|()| outlook)) {
            Err(error) if error.kind == ErrorKind::Refused => plan.blockers.extend(error.blockers),
            Err(error) if plan.blockers.is_empty() => return Err(error),
            Err(_) => {}
            Ok(outlook) => plan.outlook = Some(outlook),
        }
    }
    for blocker in job.accept.take(&mut plan.blockers) {
        plan.warnings.push(format!(
            "accepted [{}]: {}; the guest may not start",
            blocker.code, blocker.reason
        ));
        plan.accepted.push(blocker.code);
    }
    Ok(plan)
}

/// Writes the domain to nowhere: what cannot be written is known before the disks are copied.
fn rehearse(
    job: &Job,
    inspection: &Inspection,
    facts: &LinuxFacts,
    images: &[Image],
    target: &Path,
) -> Result<Outlook> {
    let mut targets = Vec::new();
    let mut list = Vec::new();
    for (i, image) in images.iter().enumerate() {
        let path = copy::target_path(job, target, i, image)?;
        list.push(finish::disk_outlook(job, path.clone(), image, 0)?);
        targets.push(TargetDisk {
            backing: later::backing(job, image, &path)?,
            path,
            format: job.format,
            sector_size: data_sector_size(image)?,
            system: i == 0,
            boot_order: (i == 0).then_some(1),
            size_bytes: image.virtual_size(),
        });
    }
    let machine = machine::linux_machine(inspection, facts, &targets, &options(job, target));
    let outputs = finish::written(job, target, &machine)?.outputs(target, &targets);
    Ok(Outlook::new(vm::Machine::of(&job.source.vm), outputs, list))
}

fn options(job: &Job, target: &Path) -> MachineOptions {
    let name = job.name();
    MachineOptions {
        nvram: target.join(format!("{name}-nvram.fd")),
        name,
        ..job.machine.clone()
    }
}

fn images(disks: &[Source]) -> Result<Vec<Image>> {
    disks.iter().map(Source::image).collect()
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

fn controller(storage: StorageBus) -> Controller {
    match storage {
        StorageBus::VirtioBlk => Controller::VirtioBlk,
        StorageBus::VirtioScsi => Controller::VirtioScsi,
        StorageBus::Sata => Controller::Sata,
    }
}

/// The distributions virt-v2v converts (`convert/convert_linux.ml` of version 2), by the `ID` of
/// os-release.
fn known_to_v2v(facts: &LinuxFacts) -> bool {
    const KNOWN: [&str; 16] = [
        "debian",
        "ubuntu",
        "linuxmint",
        "kali",
        "fedora",
        "rhel",
        "centos",
        "rocky",
        "almalinux",
        "ol",
        "scientific",
        "circle",
        "sles",
        "sled",
        "altlinux",
        "opensuse",
    ];
    KNOWN.contains(&facts.distribution.as_str()) || facts.distribution.starts_with("opensuse-")
}

/// Which way, and what speaks against it. Looks at the programs of this host, and at nothing else.
pub fn plan(job: &Job, inspection: &Inspection) -> Plan {
    let installed = [
        (Way::VirtV2vInPlace, virt_v2v::IN_PLACE),
        (Way::VirtV2v, virt_v2v::V2V),
    ]
    .into_iter()
    // Both read libvirt XML through nbdkit, also where the package does not require it.
    .find(|(_, program)| tool::find(program).is_some() && tool::find(virt_v2v::NBDKIT).is_some())
    .map(|(way, _)| way)
    // It starts an appliance, which --engine embedded rules out unless it is asked for by name.
    .filter(|_| !job.source.no_appliance || job.linux == Wish::VirtV2v);
    decide(job.linux, installed, inspection, job.in_place)
}

fn decide(wish: Wish, installed: Option<Way>, inspection: &Inspection, in_place: bool) -> Plan {
    let mut plan = Plan {
        way: Way::AsIs,
        why: String::new(),
        actions: Vec::new(),
        blockers: inspection.blockers(),
        accepted: Vec::new(),
        warnings: Vec::new(),
        outlook: None,
    };
    if in_place {
        plan.blockers.push(Blocker::new(
            "linux-in-place",
            "--in-place is for Windows: what virt-v2v does to a Linux disk cannot be undone from a journal",
            "leave --in-place out, or run virt-v2v-in-place yourself on a copy",
        ));
    }
    let Some(facts) = &inspection.linux else {
        plan.why = "it could not be read".to_string();
        return plan;
    };
    match method(wish, installed, facts) {
        Ok((way, why)) => (plan.way, plan.why) = (way, why),
        Err(blocker) => {
            plan.way = Way::VirtV2v;
            plan.why = "virt-v2v is what makes a Linux guest ready".to_string();
            plan.blockers.push(blocker);
        }
    }
    plan.warnings.extend(warnings(inspection));
    if plan.way == Way::AsIs {
        plan.warnings.push(ON_MY_WORD.to_string());
    } else {
        plan.actions.push(line(
            "virt-v2v",
            "virt-v2v converts an overlay: initramfs, boot loader, device names, guest agent",
        ));
    }
    if let Some(copies) = wanted_copies(inspection, facts) {
        plan.actions.push(line("uefi-fallback", &describe(copies)));
    }
    plan
}

/// What `--linux as-is` means, as a warning of plan and report.
const ON_MY_WORD: &str = "--linux as-is: the guest is copied unchanged, and whether it finds its disk on the new controller is not checked";

/// Who makes the guest ready, and why; or what is missing for that.
fn method(
    wish: Wish,
    installed: Option<Way>,
    facts: &LinuxFacts,
) -> Result<(Way, String), Blocker> {
    const YOUR_WORD: &str = "or --linux as-is, when you know that its initramfs has virtio_pci, virtio_blk and virtio_scsi and that it names its disks by UUID";
    let distribution = match facts.distribution.as_str() {
        "" => "an unnamed distribution",
        name => name,
    };
    match (wish, installed) {
        (Wish::AsIs, _) => Ok((Way::AsIs, "--linux as-is".to_string())),
        (Wish::VirtV2v, Some(way)) => Ok((way, "--linux virt-v2v".to_string())),
        (Wish::Auto, Some(way)) if known_to_v2v(facts) => {
            Ok((way, format!("it is installed and knows {distribution}")))
        }
        (Wish::Auto, Some(_)) => Err(Blocker::new(
            "linux-distribution",
            format!("virt-v2v does not know {distribution}"),
            format!("convert with --linux virt-v2v to let it try; {YOUR_WORD}"),
        )),
        (_, None) => Err(Blocker::new(
            "virt-v2v-missing",
            "virt-v2v, or nbdkit which it needs, is not installed or not wanted (--engine embedded)",
            format!("{}; {YOUR_WORD}", host::hint(virt_v2v::V2V)),
        )),
    }
}

fn warnings(inspection: &Inspection) -> Vec<String> {
    let findings = inspection.findings.iter();
    findings
        .filter(|f| f.severity == Severity::Warning)
        .map(|f| format!("{} (remedy: {})", f.message, f.remedy))
        .collect()
}

fn line(id: &str, description: &str) -> ActionLine {
    ActionLine {
        id: id.to_string(),
        state: ActionState::Planned,
        description: description.to_string(),
    }
}

/// The copies that make the guest start on firmware without boot entries.
fn wanted_copies<'i>(inspection: &Inspection, facts: &'i LinuxFacts) -> Option<&'i LoaderCopies> {
    let uefi = inspection.firmware == Some(Firmware::Uefi);
    facts.fallback.as_ref().filter(|_| uefi)
}

fn describe(copies: &LoaderCopies) -> String {
    let list = copies.copies.iter();
    let list: Vec<String> = list.map(|c| format!("{} to {}", c.from, c.to)).collect();
    format!(
        "make the guest's boot loader the UEFI fall-back: {}",
        list.join(", ")
    )
}

/// The disks as they are to be copied, and what is known of them.
struct Made {
    images: Vec<Image>,
    after: Inspection,
    actions: Vec<ActionLine>,
    way: Way,
}

/// A conversion that was begun before the guest was known.
pub(super) struct Started<'a> {
    pub(super) devices: &'a Devices,
    pub(super) resumed: Option<&'a Resumed>,
    pub(super) at: Instant,
}

pub(super) fn convert(
    job: &Job,
    ui: &Ui,
    mut folder: OutputFolder,
    disks: &[Source],
    mut inspection: Inspection,
    from: Started<'_>,
) -> Result<Report> {
    let Started {
        devices,
        mut resumed,
        at: start,
    } = from;
    let plan = decide_all(job, ui, disks, &mut inspection, folder.target())?;
    if !plan.blockers.is_empty() {
        return Err(prepare::refused(&inspection, plan.blockers));
    }
    let decided = plan.document(&inspection);
    if let Some(before) = resumed {
        before.check_plan(&decided)?;
        if before.has_overlays() {
            tracing::warn!("starting over: what was made of the guest is not used again");
            folder.start_over()?;
            resumed = None;
        }
    }
    save_json(
        &folder.path().join("plan.json"),
        document("plan", decided.clone()),
    )?;
    point("inspected")?;
    let inspect_s = start.elapsed().as_secs_f64();

    let fix_start = Instant::now();
    let made = make(job, ui, &folder, disks, &inspection, &plan)?;
    point("fixed")?;
    let storage = controller(job.machine.storage);
    let made_ready = made_ready(made.way);
    let mut checks = readable(&made.after);
    checks.push(check("boot-path", true, &made_ready));
    if let Some(bad) = checks.iter().find(|c| !c.ok) {
        return Err(
            Error::failed(format!("the converted guest is not ready: {}", bad.message))
                .hint("the source is untouched"),
        );
    }
    let fix_s = fix_start.elapsed().as_secs_f64();

    let copy_start = Instant::now();
    let begun = Begun {
        folder: &folder,
        devices,
        resumed,
        decided: &decided,
    };
    let (targets, bytes) = copy_disks(job, ui, &made, &begun)?;
    if job.verify_copy {
        checks.push(check(
            "copy-identical",
            true,
            "the copies were compared with their sources",
        ));
    }
    let copy_s = copy_start.elapsed().as_secs_f64();
    point("copied")?;

    let facts = linux_facts(&made.after)?;
    let options = options(job, folder.target());
    let machine = machine::linux_machine(&made.after, facts, &targets, &options);
    let domains = finish::written(job, folder.target(), &machine)?;
    for document in &domains.documents {
        finish::write(folder.path(), document)?;
    }
    let final_xml = folder.target().join(&domains.final_xml);
    // What the conversion has mended is no warning any more.
    let mut warnings = warnings(&made.after);
    if made.way == Way::AsIs {
        warnings.push(ON_MY_WORD.to_string());
    }
    warnings.extend(machine::other_macs(
        &made.after.network.adapters,
        &job.machine,
    ));
    warnings.extend(job.source.vm.notes.clone());
    warnings.extend(domains.warnings.iter().cloned());
    warnings.extend(later::warnings(job, &images(disks)?));
    let mut report = Report {
        name: options.name.clone(),
        engine: facts.reader,
        engine_why: match made.way {
            Way::AsIs => "a Linux guest, copied unchanged",
            Way::VirtV2v | Way::VirtV2vInPlace => "a Linux guest, converted by virt-v2v",
        },
        ready: plan.accepted.is_empty(),
        boots_from: vec![storage],
        accepted: plan.accepted.clone(),
        next_commands: vec![
            format!("virsh define {}", quote(&final_xml)),
            format!("virsh start --console {}", options.name),
        ],
        outputs: domains.outputs(folder.target(), &targets),
        files: Vec::new(),
        actions: made.actions,
        controllers: BTreeMap::from([(storage, boot_path(&made_ready))]),
        controllers_before: BTreeMap::new(),
        checks,
        warnings,
        timings: Timings {
            inspect_s,
            fix_s,
            copy_s,
            total_s: start.elapsed().as_secs_f64(),
        },
        bytes,
        transport: Transport::File.name(),
        trim: Vec::new(),
        request: job.request.clone(),
        inspection,
    };
    // Windows' plan has edits to show; here the actions say it all.
    save_report(
        job,
        &mut folder,
        devices,
        &mut report,
        &crate::plan::Plan::default(),
    )?;
    Ok(report)
}

fn linux_facts(inspection: &Inspection) -> Result<&LinuxFacts> {
    let facts = inspection.linux.as_ref();
    facts.ok_or_else(|| Error::failed("the converted guest cannot be read any more"))
}

/// Carries out the plan on overlays and examines what came of it.
fn make(
    job: &Job,
    ui: &Ui,
    folder: &OutputFolder,
    disks: &[Source],
    before: &Inspection,
    plan: &Plan,
) -> Result<Made> {
    stopped()?;
    let sources = images(disks)?;
    let mut made = Made {
        images: sources.clone(),
        after: before.clone(),
        actions: Vec::new(),
        way: plan.way,
    };
    if plan.way != Way::AsIs {
        let work = folder.path().join(WORK).join("virt-v2v");
        made.images = hand_over(job, ui, &work, &sources, before, plan.way).map_err(|e| {
            e.hint("--linux as-is copies the guest unchanged, when you know that it has the VirtIO drivers")
        })?;
        made.actions
            .push(done("virt-v2v", "virt-v2v converted the guest"));
        ui.status("Verifying", "reading the result back");
        examine(&made.images, &job.source, &mut made.after, ui)?;
    }
    let facts = linux_facts(&made.after)?;
    if let Some(copies) = wanted_copies(&made.after, facts).cloned() {
        ui.status("Fixing", "the UEFI fall-back loader, on an overlay");
        let overlay = folder.path().join(WORK).join("efi.qcow2");
        let image = copy_loader(&made.images, &copies, &overlay)?;
        if let Some(slot) = made.images.get_mut(copies.disk) {
            *slot = image;
        }
        made.actions.push(done("uefi-fallback", &describe(&copies)));
        examine(&made.images, &job.source, &mut made.after, ui)?;
    }
    Ok(made)
}

fn done(id: &str, description: &str) -> ActionLine {
    ActionLine {
        state: ActionState::Done,
        ..line(id, description)
    }
}

/// Has virt-v2v convert overlays of the disks. It opens files by their names, so what is below the overlays
/// is served from the descriptors this run holds.
fn hand_over(
    job: &Job,
    ui: &Ui,
    work: &Path,
    sources: &[Image],
    before: &Inspection,
    way: Way,
) -> Result<Vec<Image>> {
    let failed = |e| Error::failed(format!("creating {}", work.display())).because(e);
    std::fs::create_dir_all(work).map_err(failed)?;
    let name = job.name();
    let mut overlays = Vec::new();
    let mut served = Vec::new();
    for (i, source) in sources.iter().enumerate() {
        let overlay = work.join(format!("overlay-{i}.qcow2"));
        let below = Export::<dyn BlockRead>::open_readonly_for(source, Reach::User)?;
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
    let program = match way {
        Way::VirtV2vInPlace => virt_v2v::IN_PLACE,
        Way::VirtV2v | Way::AsIs => virt_v2v::V2V,
    };
    ui.status("Converting", &format!("with {program}; this takes minutes"));
    let mut said = |line: &str| tracing::info!("{program}: {line}");
    let failed =
        |e: tool::ToolError| Error::failed(format!("converting with {program}")).because(e);
    if way == Way::VirtV2vInPlace {
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

/// The machine for virt-v2v: its disks, and the firmware, which decides about the boot loader.
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

/// Copies the guest's boot loader to where firmware looks, on an overlay of the disk.
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

/// The checks of `verify`. Whether a Linux finds its disk is none of them, so it is never called ready.
pub fn checks(inspection: &Inspection) -> Vec<Check> {
    let mut checks = readable(inspection);
    checks.push(Check::new(
        "boot-path",
        Severity::Blocker,
        CheckState::CouldNotRun,
        "whether a Linux guest starts is not checked here: start it and look at its console",
    ));
    checks
}

/// Whether the Linux can be read, and firmware finds its boot loader.
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

fn made_ready(way: Way) -> String {
    match way {
        Way::AsIs => "taken on your word (--linux as-is), not checked",
        Way::VirtV2v | Way::VirtV2vInPlace => "made ready by virt-v2v, not checked again",
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

/// Copies the disks as they are: free space is known of no Linux file system here.
fn copy_disks(
    job: &Job,
    ui: &Ui,
    made: &Made,
    begun: &Begun<'_>,
) -> Result<(Vec<TargetDisk>, Bytes)> {
    stopped()?;
    if job.copying == Copying::Later {
        let kept: Result<Vec<Kept>> = (made.images.iter().enumerate())
            .map(|(i, image)| {
                Ok(Kept {
                    image: image.clone(),
                    sector_size: data_sector_size(image)?,
                    system: i == 0,
                    boot_order: (i == 0).then_some(1),
                })
            })
            .collect();
        return later::keep(job, ui, begun.folder, kept?);
    }
    let mut disks = Vec::new();
    for (i, image) in made.images.iter().enumerate() {
        disks.push(Arriving {
            image: image.clone(),
            sector_size: data_sector_size(image)?,
            system: i == 0,
            boot_order: (i == 0).then_some(1),
        });
    }
    copy::to_targets(job, ui, disks, &[], begun)
}
