//! Decides what to do: a pure function from facts to a list of actions.
//!
//! Planning has three steps, all without I/O. [`layout`] determines the files and registry contents
//! that the guest should have. The caller looks up which of those files exist already
//! ([`Present`]), and [`draft`] turns the difference into actions. Anything already in place
//! becomes `skipped`, so a second run plans nothing. The caller inspects and verifies the guest as
//! these actions leave it ([`crate::actions::preview`]), and examines the host ([`Foreseen`]).
//! [`plan`] then decides whether the conversion continues. A [`Plan`] is complete.
//!
//! For a Linux guest, [`linux::plan`] decides how it is made ready.

mod cleanup;
mod decide;
mod disks;
pub mod firstboot;
pub mod linux;
pub mod model;
mod oem;
pub mod outlook;
mod remaining;
mod repair;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod whole_tests;

use std::collections::{BTreeMap, BTreeSet, HashSet};

pub use decide::{After, Foreseen, plan};
pub use model::{Draft, Plan, PlannedDriver, Skipped};
pub use oem::oem_number;
pub use remaining::{Remaining, remaining};

use crate::actions::{Action, CopyFiles, CopyInGuest, EditHive, FileCopy};
use crate::drivers::catalogue::Role;
use crate::drivers::package::{self, Installation, Placement};
use crate::drivers::select::{DriverPackage, DriverSet};
use crate::error::Blocker;
use crate::guest::{GuestPath, PathError, VolumeId};
use crate::inspect::{HiveName, Hives, Inspection, LoadedBytes, WindowsFacts};
use crate::registry::{HiveError, HiveView, RegEdits, RegOp, walk};
use crate::types::{ControlSet, DiskBus};

use oem::OemNumbers;

#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("reading the registry hives")]
    Hive(#[from] HiveError),
    #[error("a file of the drivers has a name that Windows does not allow")]
    Path(#[from] PathError),
}

type Result<T, E = PlanError> = std::result::Result<T, E>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The controller of the first boot; `None` boots directly from virtio.
    pub bootstrap: Option<DiskBus>,
    /// Repair the default boot entry and the boot sector if they name a place without a partition.
    pub repair_bcd: bool,
    /// Leave the old hypervisor's services unchanged.
    pub keep_tools: bool,
    /// The bus of the second boot.
    pub storage: DiskBus,
    /// Refuse drivers without a valid catalogue instead of warning.
    pub require_signed: bool,
    /// Accept a volume that was not unmounted cleanly.
    pub force_dirty: bool,
}

/// The inputs of a draft.
pub struct Inputs<'a> {
    pub inspection: &'a Inspection,
    pub windows: &'a WindowsFacts,
    pub hives: &'a Hives,
    pub drivers: &'a DriverSet,
    /// Digest of the contents, by driver, of the packages that are installed completely.
    pub digests: &'a BTreeMap<String, String>,
    /// Numbers N for which `\Windows\INF\oemN.inf` exists.
    pub used_oem: &'a BTreeSet<u32>,
    pub options: Options,
    pub preferences: &'a firstboot::Preferences,
    /// Size of the guest agent's installer, if the driver source has one.
    pub agent_size: u64,
}

/// What exists at a path that the plan wants to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    Folder,
    /// The planned file, byte for byte.
    SameFile,
    OtherFile,
}

/// Existing files by path; a path that is not listed does not exist.
pub type Present = BTreeMap<GuestPath, At>;

/// Files that are copied to the guest together: target, path in the driver source, size.
pub struct Part {
    pub id: String,
    pub title: String,
    pub files: Vec<(GuestPath, String, u64)>,
}

/// The contents of the guest after the fix.
pub struct Layout {
    pub parts: Vec<Part>,
    pub drivers: Vec<PlannedDriver>,
    pub edits: BTreeMap<HiveName, Vec<RegOp>>,
    pub blockers: Vec<Blocker>,
    pub warnings: Vec<String>,
    /// Files of the parts that are not from a driver source.
    pub generated: Vec<firstboot::Generated>,
}

impl Layout {
    /// Every path the fix may write, with the driver source path of its contents and its size.
    pub fn files(&self) -> impl Iterator<Item = &(GuestPath, String, u64)> {
        self.parts.iter().flat_map(|p| &p.files)
    }

    /// Adds a package: one installation for each control set.
    fn install(
        &mut self,
        drivers: &DriverSet,
        package: &DriverPackage,
        installations: Vec<Installation>,
    ) {
        let mut files = Vec::new();
        for installation in installations {
            files.extend(installation.files.clone());
            add_edits(&mut self.edits, installation);
        }
        self.parts.push(Part {
            id: format!("files-{}", package.driver),
            title: format!("install the driver package {}", package.driver),
            files: with_sizes(drivers, files),
        });
        if is_boot(package) && !package.forms().modern {
            self.warnings.push(format!(
                "{} {} does not list the modern virtio device, which is what q35 machines show",
                package.driver,
                package.inf.driver_ver.version_text()
            ));
        }
    }
}

/// The control sets to write: the one that boots, and the one with which Windows last ran if it is
/// another one.
fn control_sets(windows: &WindowsFacts, system: &HiveView<'_>) -> Result<Vec<ControlSet>> {
    let mut sets = vec![windows.control_set.clone()];
    if let Some(select) = system.key("Select")?
        && let Some(current) = select.dword("Current")?
    {
        let name = ControlSet::new(current);
        if !sets.contains(&name) && system.key(&name)?.is_some() {
            sets.push(name);
        }
    }
    Ok(sets)
}

pub fn layout(inputs: &Inputs<'_>) -> Result<Layout> {
    let system = HiveView::new(&inputs.hives.system.bytes)?;
    let software = HiveView::new(&inputs.hives.software.bytes)?;
    let sets = control_sets(inputs.windows, &system)?;
    let target = &inputs.windows.target;
    let mut layout = Layout {
        parts: Vec::new(),
        drivers: Vec::new(),
        edits: BTreeMap::new(),
        blockers: inputs.inspection.blockers(),
        warnings: inputs.drivers.notes.clone(),
        generated: Vec::new(),
    };
    let database = DriversHive::of(inputs, &mut layout.warnings);
    let mut numbers = OemNumbers::new(inputs.used_oem, &system, database.view())?;
    let places = Places {
        windows: inputs.windows,
        existing: existing_services(&system, &inputs.windows.control_set, inputs.drivers)?,
    };
    for package in &inputs.drivers.packages {
        let boot = is_boot(package);
        let digest = inputs
            .digests
            .get(&package.driver)
            .filter(|_| boot || database.takes_packages());
        let placement = match digest {
            Some(_) if boot => "boot",
            Some(_) => "installed",
            None => "staged",
        };
        layout.drivers.push(planned(package, placement));
        if let Some(digest) = digest {
            let oem = numbers.number_for(&package::store_name(package, target, digest))?;
            let mut installations = Vec::new();
            for set in &sets {
                let place = places.of(set, oem)?;
                installations.push(package::install(package, digest, target, &place)?);
            }
            layout.install(inputs.drivers, package, installations);
        }
    }
    let placement = places.of(&inputs.windows.control_set, 0)?;
    let staged = package::stage_all(inputs.drivers, &placement)?;
    layout.warnings.extend(staged.notes);
    let staged_paths: Vec<GuestPath> = staged.files.iter().map(|(to, _)| to.clone()).collect();
    layout.parts.push(Part {
        id: "files-staged".to_string(),
        title: "stage all virtio drivers for the first boot".to_string(),
        files: with_sizes(inputs.drivers, staged.files),
    });
    repair::bootable(inputs, &sets, &mut layout);
    repair::boot_store(inputs, &mut layout);
    if !inputs.options.keep_tools {
        cleanup::old_hypervisor(inputs, &sets, &mut layout)?;
    }
    firstboot::add(inputs, &sets, &staged_paths, &mut layout)?;
    if target.has_driver_database() {
        mark_numbers(&system, &database, &numbers, &mut layout)?;
    }
    let device_path = match software.key("Microsoft\\Windows\\CurrentVersion")? {
        Some(key) => key.string("DevicePath")?,
        None => None,
    };
    let edit = package::device_path_edit(device_path.as_deref(), &placement);
    let of_software = layout.edits.entry(HiveName::Software).or_default();
    of_software.extend(edit);
    for ops in layout.edits.values_mut() {
        let mut seen = HashSet::new();
        ops.retain(|op| seen.insert(format!("{op:?}")));
    }
    Ok(layout)
}

/// The paths of drivers in this Windows.
struct Places<'w> {
    windows: &'w WindowsFacts,
    existing: BTreeSet<String>,
}

impl Places<'_> {
    fn of(&self, set: &ControlSet, oem: u32) -> Result<Placement, PathError> {
        let mut placement = Placement::new(set.clone(), self.windows.root.clone(), oem)?;
        if let Some(letter) = self.windows.drive_letter {
            placement.system_drive = format!("{letter}:");
        }
        placement.existing.clone_from(&self.existing);
        Ok(placement)
    }
}

/// Marks the numbers of the packages as used. A real SYSTEM also marks those of the packages in
/// DRIVERS. It is unknown whether DRIVERS does the same, but a number too many there only stays
/// unused.
fn mark_numbers(
    system: &HiveView<'_>,
    database: &DriversHive<'_>,
    numbers: &OemNumbers,
    layout: &mut Layout,
) -> Result<()> {
    let given: Vec<u32> = numbers.given().iter().copied().collect();
    let mut maps = vec![(HiveName::System, system)];
    if layout.edits.contains_key(&HiveName::Drivers) {
        maps.extend(database.view().map(|view| (HiveName::Drivers, view)));
    }
    for (hive, view) in maps {
        let map = match view.key("DriverDatabase")? {
            Some(key) => key.value("OemInfMap")?.map(|v| v.data),
            None => None,
        };
        let edit = package::oem_map_edit(map.as_deref(), &given);
        layout.edits.entry(hive).or_default().extend(edit);
    }
    Ok(())
}

/// The services of the drivers that the guest already has.
fn existing_services(
    system: &HiveView<'_>,
    set: &ControlSet,
    drivers: &DriverSet,
) -> Result<BTreeSet<String>> {
    let mut existing = BTreeSet::new();
    for service in drivers.packages.iter().flat_map(|p| p.inf.services()) {
        if let Some(key) = system.key(&set.service(&service.name))?
            && key.dword("Type")?.is_some()
            && key.string("ImagePath")?.is_some()
        {
            existing.insert(service.name.to_lowercase());
        }
    }
    Ok(existing)
}

/// Whether a package is for boot storage. It must be installed completely, and no other package may
/// prevent that.
pub fn is_boot(package: &DriverPackage) -> bool {
    package.role == Role::Storage && package.required
}

/// The controllers from which a converted disk must boot. They are that of the bootstrap, and the
/// virtio ones with a driver (NT 5 has none for virtio-scsi).
pub fn wanted(bootstrap: Option<DiskBus>, drivers: &DriverSet) -> Vec<DiskBus> {
    let virtio = drivers
        .boot_storage()
        .filter_map(|package| package.device?.disk_bus());
    bootstrap.into_iter().chain(virtio).collect()
}

/// The hive in which packages that are not needed to boot are recorded.
enum DriversHive<'h> {
    /// No driver database (up to Windows 7), or no usable one.
    None,
    /// Windows 8 and 8.1 keep all packages in SYSTEM.
    System,
    Own(HiveView<'h>),
}

impl<'h> DriversHive<'h> {
    fn of(inputs: &Inputs<'h>, warnings: &mut Vec<String>) -> Self {
        let target = &inputs.windows.target;
        if !target.has_driver_database() {
            return Self::None;
        }
        if target.major < 10 {
            return Self::System;
        }
        let fault = match &inputs.hives.drivers {
            None => "was not found or cannot be read".to_string(),
            Some(loaded) => {
                let usable = walk::walk(&loaded.bytes).map_err(|e| e.to_string());
                match usable.and_then(|_| HiveView::new(&loaded.bytes).map_err(|e| e.to_string())) {
                    Ok(view) => return Self::Own(view),
                    Err(fault) => format!("is damaged ({fault})"),
                }
            }
        };
        warnings.push(format!(
            "the DRIVERS hive {fault}: the drivers that are not needed to boot are only staged, for the first boot to install"
        ));
        Self::None
    }

    fn view(&self) -> Option<&HiveView<'h>> {
        match self {
            Self::Own(view) => Some(view),
            _ => None,
        }
    }

    fn takes_packages(&self) -> bool {
        !matches!(self, Self::None)
    }
}

fn planned(package: &DriverPackage, placement: &'static str) -> PlannedDriver {
    PlannedDriver {
        driver: package.driver.clone(),
        role: package.role,
        folder: package.folder.clone(),
        version: package.inf.driver_ver.version_text(),
        placement,
        signer: None,
    }
}

/// Each target once, with its size in the driver source.
fn with_sizes(
    drivers: &DriverSet,
    files: Vec<(GuestPath, String)>,
) -> Vec<(GuestPath, String, u64)> {
    let sizes: BTreeMap<&str, u64> = drivers
        .packages
        .iter()
        .flat_map(|p| &p.files)
        .map(|f| (f.path_in_source.as_str(), f.size))
        .collect();
    let mut seen = BTreeSet::new();
    files
        .into_iter()
        .filter(|(to, _)| seen.insert(to.clone()))
        .map(|(to, from)| {
            let size = sizes.get(from.as_str()).copied().unwrap_or(0);
            (to, from, size)
        })
        .collect()
}

fn add_edits(edits: &mut BTreeMap<HiveName, Vec<RegOp>>, installation: Installation) {
    for (hive, ops) in [
        (HiveName::System, installation.system),
        (HiveName::Software, installation.software),
        (HiveName::Drivers, installation.drivers),
    ] {
        if !ops.is_empty() {
            edits.entry(hive).or_default().extend(ops);
        }
    }
}

/// Drafts actions for the difference between the layout and what exists.
pub fn draft(inputs: &Inputs<'_>, layout: Layout, present: &Present) -> Result<Draft> {
    let mut draft = Draft {
        blockers: layout.blockers,
        warnings: layout.warnings,
        drivers: layout.drivers,
        ..Draft::default()
    };
    let mut made = BTreeSet::new();
    for part in layout.parts {
        copy_files(&mut draft, part, present, &mut made);
    }
    uefi_fallback(&mut draft, inputs.windows);
    draft.actions.extend(repair::boot_sector(inputs));
    // SYSTEM is last: its services make Windows load the files.
    for hive in [
        HiveName::Bcd,
        HiveName::Software,
        HiveName::Drivers,
        HiveName::System,
    ] {
        let Some(loaded) = inputs.hives.get(hive) else {
            continue;
        };
        // Recovered hives are written even without an edit, so that the guest is left in one state.
        // The boot store is left to Windows.
        let ops = match layout.edits.get(&hive) {
            Some(ops) => ops.as_slice(),
            None if loaded.replayed && hive != HiveName::Bcd => &[],
            None => continue,
        };
        let volume = match hive {
            HiveName::Bcd => inputs.windows.boot.store,
            HiveName::System | HiveName::Software | HiveName::Drivers => {
                Some(inputs.windows.system_volume)
            }
        };
        if let Some(volume) = volume {
            edit_hive(&mut draft, hive, volume, loaded, ops)?;
        }
    }
    Ok(draft)
}

/// Adds the files of a part that do not exist yet.
fn copy_files(draft: &mut Draft, part: Part, present: &Present, made: &mut BTreeSet<GuestPath>) {
    let Part {
        id,
        title,
        files: wanted,
    } = part;
    let mut files = Vec::new();
    let mut folders = Vec::new();
    for (to, from, size) in wanted {
        match present.get(&to) {
            Some(At::SameFile) => continue,
            Some(At::Folder) => draft.blockers.push(Blocker::new(
                "path-taken",
                format!("{to} is a directory in the guest, a driver file belongs there"),
                "move it away inside the guest, then convert again",
            )),
            at => {
                folders.extend(missing_folders(&to, present, made));
                files.push(FileCopy {
                    replaces: at.is_some(),
                    to,
                    from,
                    size,
                });
            }
        }
    }
    if files.is_empty() {
        draft.skipped.push(Skipped { id, title });
    } else {
        draft.actions.push(Action::CopyFiles(CopyFiles {
            id,
            title,
            folders,
            files,
        }));
    }
}

fn uefi_fallback(draft: &mut Draft, windows: &WindowsFacts) {
    let (id, title) = (
        "uefi-fallback".to_string(),
        "make Windows' boot manager the UEFI fall-back loader".to_string(),
    );
    match &windows.boot.fallback {
        Some(fallback) => draft.actions.push(Action::CopyInGuest(CopyInGuest {
            id,
            title,
            volume: fallback.volume,
            folder: fallback.folder.clone(),
            from: fallback.from.clone(),
            to: fallback.to.clone(),
            size: fallback.size,
            replaces: fallback.replaces,
        })),
        None if windows.esp.is_some() => draft.skipped.push(Skipped { id, title }),
        None => {}
    }
}

fn edit_hive(
    draft: &mut Draft,
    hive: HiveName,
    volume: VolumeId,
    loaded: &LoadedBytes,
    ops: &[RegOp],
) -> Result<()> {
    let id = format!("hive-{}", hive.file_name().to_lowercase());
    let title = format!("edit the {} hive", hive.file_name());
    let all = RegEdits {
        prefix: hive.prefix().to_string(),
        ops: ops.to_vec(),
    };
    let view = HiveView::new(&loaded.bytes)?;
    let edits = all.pending(&view.root()?)?;
    if edits.ops.is_empty() && !loaded.replayed {
        draft.skipped.push(Skipped { id, title });
    } else {
        draft.actions.push(Action::EditHive(EditHive {
            id,
            title,
            hive,
            volume,
            path: loaded.path.clone(),
            edits,
            // Old pages must not be replayed over the edit, whether or not they applied before it.
            reset_logs: loaded.logs.clone(),
        }));
    }
    Ok(())
}

/// The directories above `path` that neither exist nor are planned yet, outermost first.
fn missing_folders(
    path: &GuestPath,
    present: &Present,
    made: &mut BTreeSet<GuestPath>,
) -> Vec<GuestPath> {
    let mut missing = Vec::new();
    let mut next = path.parent();
    while let Some(folder) = next {
        if folder.is_root() || present.contains_key(&folder) || !made.insert(folder.clone()) {
            break;
        }
        next = folder.parent();
        missing.push(folder);
    }
    missing.reverse();
    missing
}
