//! Facts about the guest. Takes a [`GuestRead`], so it cannot write.
//!
//! [`inspect`] examines the partition table, the volumes and the boot files, and finds Windows. It
//! loads the hives once and reads them by direct lookups. A disk without Windows, or with one that
//! cannot be converted, is no error here: the result has a blocker. Errors are problems that the
//! caller can resolve (a choice among several installations) or that make the disk unreadable.

mod bcd;
mod boot_ini;
mod boot_sector;
mod drivers;
#[cfg(test)]
pub(crate) mod fake;
pub mod findings;
mod firmware;
mod hive_name;
mod hives;
pub mod linux;
mod locate;
pub(crate) mod model;
mod network;
mod nsi;
mod os;
mod state;
mod tools;

pub use hive_name::HiveName;
pub use model::*;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use crate::boot_path::{self, BootContext, Image, ImageState};
use crate::disk::layout::{DiskLayout, Partition, Scheme};
use crate::drivers::Catalogue;
use crate::error::{Error, ErrorKind};
use crate::guest::{
    DiskId, FIRST_MAPPED, FsKind, GuestError, GuestPath, GuestRead, PathError, VolumeId,
};
use crate::registry::{HiveError, HiveView};
use crate::text::guest_text;
use crate::types::ControlSet;
use locate::Candidate;

#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// `--root` selects one.
    #[error("several Windows installations: {}", found.join(", "))]
    SeveralRoots { found: Vec<String> },
    #[error("no Windows installation at {wanted}; found: {}", listed(found))]
    NoSuchRoot { wanted: String, found: Vec<String> },
    #[error("{0} is not a Windows root: \\Windows, 2:\\Windows or 1/2:\\Windows is expected")]
    BadRoot(String),
    #[error("not a path inside the guest")]
    Path(#[from] PathError),
    #[error("the guest cannot be read")]
    Guest(#[from] GuestError),
}

impl From<InspectError> for Error {
    fn from(error: InspectError) -> Self {
        let plain = |kind, error: &InspectError| Error::new(kind, error.to_string());
        match error {
            InspectError::SeveralRoots { .. } => plain(ErrorKind::Refused, &error)
                .hint("pick one with --root, e.g. --root '2:\\Windows' for partition 2, or --root '1/2:\\Windows' for that of disk 1"),
            InspectError::NoSuchRoot { .. } | InspectError::BadRoot(_) => {
                plain(ErrorKind::Usage, &error)
            }
            InspectError::Path(source) => Error::usage("--root is not a path").because(source),
            InspectError::Guest(GuestError::MissingTool { what, hint }) => {
                Error::missing_tool(format!("{what} is not available on this host")).hint(hint)
            }
            InspectError::Guest(source) => {
                Error::failed("the guest cannot be read").because(source)
            }
        }
    }
}

fn listed(found: &[String]) -> String {
    if found.is_empty() {
        "none".to_string()
    } else {
        found.join(", ")
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InspectOptions {
    /// The Windows to convert if there are several: `\Windows`, or `2:\Windows` with the
    /// partition's number, or `1/2:\Windows` with those of disk and partition.
    pub root: Option<String>,
    /// Report an unclean volume as a warning, not as a blocker.
    pub force_dirty: bool,
}

/// A disk of the VM with its partition table and path.
#[derive(Debug, Clone)]
pub struct Disk {
    pub id: DiskId,
    pub layout: DiskLayout,
    pub source: SourceFacts,
}

fn disk_of(disks: &[Disk], id: DiskId) -> Option<&Disk> {
    disks.iter().find(|d| d.id == id)
}

/// The disks that a conversion changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Roles {
    /// The disk with Windows.
    pub system: DiskId,
    /// The disk from which the firmware starts; mostly the same.
    pub boot: DiskId,
}

/// Finds the disk with Windows and the one with its boot files. `None` if no Windows is visible.
pub fn roles(
    guest: &dyn GuestRead,
    disks: &[Disk],
    root: Option<&str>,
) -> Result<Option<Roles>, InspectError> {
    let found = locate::find(guest, &mut Vec::new())?;
    let chosen = locate::choose(guest, found.installations, root)?;
    let system = chosen.as_ref().or(found.without_hive.first());
    Ok(system.map(|c| roles_of(guest, disks, c.volume.disk)))
}

/// Whether a given `--root` may name a directory on that volume.
pub fn root_may_be_on(root: Option<&str>, volume: VolumeId) -> bool {
    root.is_none_or(|root| locate::may_be_on(root, volume))
}

/// The roles of the disks if Windows is on that one.
pub fn roles_of(guest: &dyn GuestRead, disks: &[Disk], system: DiskId) -> Roles {
    let boot = firmware::detect(guest, disks, Some(system));
    Roles {
        system,
        boot: boot.disk,
    }
}

/// Inspects the disks of a VM and, if there is one, the Windows on them. Without Windows, the first
/// disk is described.
pub fn inspect(
    guest: &dyn GuestRead,
    disks: &[Disk],
    options: &InspectOptions,
) -> Result<Survey, InspectError> {
    let mut out = empty(guest, disks);
    let Some(main) = disks.first() else {
        return Ok(Survey {
            inspection: out,
            hives: None,
        });
    };
    let found = locate::find(guest, &mut out.findings)?;
    let without_hive = found.without_hive;
    let chosen = locate::choose(guest, found.installations, options.root.as_deref())?;
    let system = chosen.as_ref().or(without_hive.first()).map(|c| c.volume);
    let main = system
        .and_then(|volume| disk_of(disks, volume.disk))
        .unwrap_or(main);
    let boot = firmware::detect(guest, disks, Some(main.id));
    let boot_disk = disk_of(disks, boot.disk).unwrap_or(main);
    put_first(&mut out, main, system.is_some(), &boot);
    let mut changed = vec![main];
    if boot_disk.id != main.id {
        changed.push(boot_disk);
    }
    state::volumes(guest, &changed, system, options.force_dirty, &mut out);
    if let [main, other] = changed[..]
        && system.is_some()
    {
        out.findings.push(findings::BOOT_FILES_ELSEWHERE.found_with(
            &[&main.id.number(), &other.id.number()],
            other.source.path.clone(),
        ));
    }
    out.firmware = boot.firmware;
    let hives = match chosen {
        Some(chosen) => {
            firmware::findings(guest, &boot_disk.layout, &boot, &mut out.findings);
            let place = ChosenWindows {
                guest,
                disks,
                system: main,
                boot_disk,
                boot: &boot,
                chosen: &chosen,
            };
            windows(&place, &mut out)?
        }
        None => {
            not_windows(guest, &main.layout, &boot, &without_hive, &mut out);
            None
        }
    };
    out.findings.sort_by_key(|f| std::cmp::Reverse(f.severity));
    Ok(Survey {
        inspection: out,
        hives,
    })
}

/// Describes the VM by that disk.
fn put_first(out: &mut Inspection, main: &Disk, is_system: bool, boot: &BootFiles) {
    out.source = main.source.clone();
    for disk in &mut out.disks {
        disk.windows = is_system && disk.index == main.id.number();
        disk.boot_files = boot.found() && disk.index == boot.disk.number();
    }
    out.disks
        .sort_by_key(|d| (d.index != main.id.number(), d.index));
}

fn disk_facts(guest: &dyn GuestRead, disk: &Disk) -> DiskFacts {
    let layout = &disk.layout;
    let facts = |p: &Partition| {
        let id = VolumeId::of(disk.id, p.index);
        let volume = guest.volumes().iter().find(|v| v.id == id);
        PartitionFacts {
            index: p.index,
            type_id: p.type_id.clone(),
            start_bytes: p.start_bytes,
            size_bytes: p.size_bytes,
            filesystem: volume.map_or(FsKind::Unknown, |v| v.kind),
            label: volume.and_then(|v| guest_text(v.label.as_deref()?)),
            name: p.name.as_deref().and_then(guest_text),
            active: p.active,
            state: volume
                .filter(|v| v.kind != FsKind::Unknown)
                .map(|v| v.state.clone()),
        }
    };
    let volumes = guest.volumes().iter().filter(|v| v.id.disk == disk.id);
    let mapped = volumes
        .map(|v| &v.partition)
        .filter(|p| p.index >= FIRST_MAPPED);
    DiskFacts {
        index: disk.id.number(),
        path: disk.source.path.clone(),
        windows: false,
        boot_files: false,
        scheme: layout.scheme,
        sector_size: layout.sector_size,
        disk_id: layout.disk_id.clone(),
        partitions: layout.partitions.iter().map(facts).collect(),
        volumes: mapped.map(facts).collect(),
    }
}

fn empty(guest: &dyn GuestRead, disks: &[Disk]) -> Inspection {
    Inspection {
        source: disks.first().map_or_else(
            || SourceFacts {
                path: String::new(),
                format: String::new(),
                virtual_size_bytes: 0,
            },
            |disk| disk.source.clone(),
        ),
        disks: disks.iter().map(|disk| disk_facts(guest, disk)).collect(),
        firmware: None,
        os: OsFacts::unknown(),
        hives: HiveFacts::default(),
        controllers: BTreeMap::new(),
        drivers: DriverFacts::default(),
        network: NetworkFacts::default(),
        hypervisor_tools: Vec::new(),
        bitlocker: false,
        hibernated: false,
        volume_dirty: false,
        vss_snapshots: false,
        dynamic_disk: false,
        compact_os: false,
        pending_updates: false,
        antivirus: Vec::new(),
        group_policy_device_restrictions: false,
        findings: Vec::new(),
        linux: None,
        windows: None,
    }
}

/// Loads the hives and reads them. `None` if they are unusable; a blocker has the reason.
fn windows(place: &ChosenWindows<'_>, out: &mut Inspection) -> Result<Option<Hives>, InspectError> {
    let ChosenWindows { guest, chosen, .. } = *place;
    out.os.family = OsFamily::Windows;
    out.os.windows_root = Some(chosen.root.clone());
    state::files(guest, chosen.volume, &chosen.root, out);
    let mut load = |name: &str| -> Result<(Option<HiveState>, Option<LoadedBytes>), InspectError> {
        let path = chosen.config(name)?;
        Ok(
            match hives::load(guest, chosen.volume, &path, &mut out.findings)? {
                Some(loaded) => (Some(loaded.state), loaded.hive),
                None => (None, None),
            },
        )
    };
    let (system_state, system) = load("SYSTEM")?;
    let (software_state, software) = load("SOFTWARE")?;
    let (drivers_state, drivers) = load("DRIVERS")?;
    let boot_place = bcd::Location {
        guest,
        disks: place.disks,
        boot: place.boot,
        system: chosen.volume,
        root: &chosen.root,
    };
    let store = bcd::look(&boot_place, &mut out.findings)?;
    boot_ini::look(&boot_place, &mut out.findings)?;
    if software_state.is_none() {
        out.findings.push(missing_hive(&chosen.config("SOFTWARE")?));
    }
    out.hives = HiveFacts {
        system: system_state,
        software: software_state,
        drivers: drivers_state,
        bcd: store.state,
    };
    let (Some(system), Some(software)) = (system, software) else {
        return Ok(None);
    };
    let hives = Hives {
        system,
        software,
        drivers,
        bcd: store.hive,
    };
    match read_hives(place, store.facts, &hives, out) {
        Ok(true) => Ok(Some(hives)),
        Ok(false) => Ok(None),
        Err(error) => {
            out.windows = None;
            out.findings
                .push(findings::HIVE_DAMAGED.found_with(&[&"a registry hive"], chain(&error)));
            Ok(None)
        }
    }
}

fn chain(error: &HiveError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn missing_hive(path: &GuestPath) -> Finding {
    findings::HIVE_MISSING.found_with(&[path], path.to_string())
}

/// The location of the chosen Windows.
struct ChosenWindows<'p> {
    guest: &'p dyn GuestRead,
    disks: &'p [Disk],
    system: &'p Disk,
    boot_disk: &'p Disk,
    boot: &'p BootFiles,
    chosen: &'p Candidate,
}

fn name_version(version: &os::Version, out: &mut Inspection) {
    out.os.product_name.clone_from(&version.product_name);
    out.os.display_version.clone_from(&version.display_version);
    out.os.edition.clone_from(&version.edition);
    out.os
        .installation_type
        .clone_from(&version.installation_type);
    out.os.build = Some(version.build);
    out.os.revision = version.revision;
}

/// The control set to inspect.
fn control_set(
    system: &HiveView<'_>,
    out: &mut Inspection,
) -> Result<Option<ControlSet>, HiveError> {
    let Some(set) = os::control_set(system)? else {
        out.findings
            .push(findings::NO_CONTROL_SET.found("SYSTEM\\Select"));
        return Ok(None);
    };
    if let Some((name, number)) = os::lost_default(system)? {
        out.findings.push(findings::DEFAULT_CONTROL_SET.found_with(
            &[&name],
            format!("SYSTEM\\Select\\Default is {number}, {set} is there"),
        ));
    }
    Ok(Some(set))
}

/// Reads all facts in the hives. `false` if they do not describe a Windows; a blocker has the
/// reason.
fn read_hives(
    place: &ChosenWindows<'_>,
    boot_facts: BootFacts,
    hives: &Hives,
    out: &mut Inspection,
) -> Result<bool, HiveError> {
    let (root, volume) = (&place.chosen.root, place.chosen.volume);
    let system = HiveView::new(&hives.system.bytes)?;
    let software = HiveView::new(&hives.software.bytes)?;
    let Some(set) = control_set(&system, out)? else {
        return Ok(false);
    };
    let cache = RefCell::new(HashMap::new());
    let image = |path: &GuestPath| -> Image {
        cache
            .borrow_mut()
            .entry(path.key())
            .or_insert_with(|| boot_path::image(place.guest, volume, path))
            .clone()
    };
    let version = os::version(&software, &system, &set)?;
    let kernel = match root.join("System32\\ntoskrnl.exe") {
        Ok(path) => image(&path).state,
        Err(_) => ImageState::Missing,
    };
    let arch = os::arch(kernel, &system, &set)?;
    out.os.control_set = Some(set.clone());
    out.os.hostname = os::hostname(&system, &set)?;
    out.os.arch = arch;
    let Some(version) = version else {
        out.findings.push(unknown_windows(
            "no version and build number in SOFTWARE\\Microsoft\\Windows NT\\CurrentVersion",
        ));
        return Ok(false);
    };
    name_version(&version, out);
    let Some(arch) = arch else {
        out.findings.push(findings::UNKNOWN_ARCHITECTURE.found_with(
            &[&version.build],
            "neither ntoskrnl.exe nor PROCESSOR_ARCHITECTURE names a known processor",
        ));
        return Ok(false);
    };

    let target = version.target(arch);
    out.os.driver_folders = Catalogue::builtin().driver_folders(&target);
    let ctx = BootContext {
        system: &system,
        control_set: &set,
        windows_root: root,
        nt: (version.major, version.minor),
        arch,
        image: &image,
    };
    out.controllers = boot_path::evaluate_all(&ctx);
    out.drivers.virtio = drivers::virtio(&ctx)?;
    out.network = network::network(&system, &set)?;
    out.antivirus = tools::antivirus(&system, &set)?;
    let tools = tools::tools(&system, &software, &set)?;
    out.hypervisor_tools = tools.iter().map(|t| t.name.to_string()).collect();
    state::hives(&system, &software, &set, out)?;
    let mut boot = boot_facts;
    boot_sector::look(
        place.guest,
        &place.boot_disk.layout,
        place.boot,
        (version.major, place.boot_disk.source.virtual_size_bytes),
        (&mut boot, &mut out.findings),
    );
    out.windows = Some(WindowsFacts {
        target,
        system_volume: volume,
        root: root.clone(),
        control_sets: os::control_sets(&system)?,
        esp: place.boot.esp,
        boot_volume: place.boot.boot_volume,
        boot,
        boot_disk: place.boot_disk.id,
        sector_size: place.system.layout.sector_size,
        clock_is_utc: os::clock_is_utc(&system, &set)?,
        drive_letter: os::drive_letter(&system, &place.system.layout, volume)?,
        san_policy: os::san_policy(&system, &set)?,
        control_set: set,
        tools,
    });
    Ok(true)
}

fn unknown_windows(evidence: &str) -> Finding {
    findings::UNKNOWN_WINDOWS.found(evidence)
}

/// Reports what the disk contains instead of Windows.
fn not_windows(
    guest: &dyn GuestRead,
    layout: &DiskLayout,
    boot: &BootFiles,
    without_hive: &[Candidate],
    out: &mut Inspection,
) {
    if let Some(candidate) = without_hive.first() {
        out.os.family = OsFamily::Windows;
        out.os.windows_root = Some(candidate.root.clone());
        let path = format!("{}\\System32\\config\\SYSTEM", candidate.root);
        out.findings
            .push(findings::HIVE_MISSING.found_with(&[&path], candidate.volume.to_string()));
        return;
    }
    let kinds = |wanted: &[FsKind]| -> Vec<FsKind> {
        let mut kinds: Vec<FsKind> = Vec::new();
        for volume in guest.volumes() {
            if wanted.contains(&volume.kind) && !kinds.contains(&volume.kind) {
                kinds.push(volume.kind);
            }
        }
        kinds
    };
    let linux = kinds(&[
        FsKind::Ext,
        FsKind::Xfs,
        FsKind::Btrfs,
        FsKind::Lvm,
        FsKind::Luks,
        FsKind::Swap,
    ]);
    let data = kinds(&[FsKind::Ntfs, FsKind::Fat, FsKind::Exfat]);
    // A Windows behind BitLocker, LDM or ReFS has already been reported.
    let hidden = !out.blockers().is_empty();
    if hidden && boot.found() {
        out.os.family = OsFamily::Windows;
    } else if !linux.is_empty() {
        out.os.family = OsFamily::Linux;
        out.findings.push(findings::LINUX.found_with(
            &[&names(&linux)],
            "no Windows directory with a SYSTEM hive on any volume",
        ));
    } else if hidden {
        // Nothing to add.
    } else if !data.is_empty() {
        out.findings.push(findings::NO_WINDOWS.found_with(
            &[&names(&data)],
            "no directory with System32\\config\\SYSTEM on any NTFS volume",
        ));
    } else if layout.scheme == Scheme::None {
        out.findings.push(
            findings::NO_PARTITION_TABLE
                .found("no GPT, MBR or known file system at the start of the disk"),
        );
    } else if layout.partitions.is_empty() {
        out.findings.push(findings::EMPTY_DISK.found(format!(
            "partition table {:?} without partitions",
            layout.scheme
        )));
    } else {
        out.findings.push(
            findings::NO_FILE_SYSTEM.found(crate::ui::count(layout.partitions.len(), "partition")),
        );
    }
}

fn names(kinds: &[FsKind]) -> String {
    let names: Vec<String> = kinds
        .iter()
        .map(|k| format!("{k:?}").to_lowercase())
        .collect();
    names.join(", ")
}

#[cfg(test)]
mod disks_tests;
#[cfg(test)]
mod tests;
