//! Finds the driver packages for one Windows in a driver source.
//!
//! A package lies in a directory whose path ends in `<driver>/<os>/<arch>` (the ISO, and the RPM's
//! `by-driver`). In the ISO's storage-only directories, and the RPM's `by-os` and short trees, it
//! ends in `<arch>/<os>`. Only the end counts, so a driver source may be unpacked anywhere below
//! the given directory. Names compare without regard to case.
//!
//! Storage drivers are required: a missing one is an error with a remedy. Everything else that is
//! missing or broken becomes a note. A directory that the catalogue does not list for this Windows
//! is never used.

use std::collections::{BTreeMap, BTreeSet};

use super::catalogue::{Catalogue, DriverSpec, Role, VirtioDevice, Windows};
use super::driver_source::{DriverFile, DriverSource, DriverSourceError};
use super::inf::{DriverInf, InfError, ServiceInstall};
use super::pe;
use super::target::{Arch, WindowsTarget};
use crate::error::Blocker;

#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error("the driver catalogue has no entry for {windows}")]
    UnknownWindows { windows: String },
    #[error(transparent)]
    NoDriver(Box<NoDriver>),
    #[error("{driver} is not usable on {windows}: {reason}")]
    NotSigned {
        /// Name, version and directory.
        driver: String,
        windows: String,
        reason: String,
        remedy: String,
    },
    #[error("{folder}/{inf} cannot be used for {windows}")]
    Inf {
        folder: String,
        inf: String,
        windows: String,
        source: Box<InfError>,
        remedy: String,
    },
    #[error("the driver package in {folder} is incomplete: {file} is missing")]
    MissingFile { folder: String, file: String },
    #[error("{file} is not a driver image for {arch}")]
    WrongImage { file: String, arch: Arch },
    #[error("{folder}/{inf} installs no boot-start service for its device")]
    NoService { folder: String, inf: String },
    #[error("reading the driver source")]
    DriverSource(#[from] DriverSourceError),
}

/// A required driver is missing from all directories for this Windows.
#[derive(Debug, thiserror::Error)]
#[error("{driver_source} has no {driver} driver for {windows}: looked for {}, found {}", .looked_for.join(", "), list(.available))]
pub struct NoDriver {
    pub driver: String,
    pub windows: String,
    pub driver_source: String,
    pub looked_for: Vec<String>,
    /// OS directories that contain the driver for this architecture.
    pub available: Vec<String>,
    pub remedy: String,
}

fn list(items: &[String]) -> String {
    if items.is_empty() {
        "none for any Windows".to_string()
    } else {
        items.join(", ")
    }
}

impl DriverError {
    pub fn code(&self) -> &'static str {
        match self {
            DriverError::UnknownWindows { .. } => "windows-not-in-catalogue",
            DriverError::NoDriver(_) => "driver-missing",
            DriverError::NotSigned { .. } => "driver-not-signed",
            DriverError::Inf { .. } | DriverError::NoService { .. } => "driver-inf-unusable",
            DriverError::MissingFile { .. } => "driver-package-incomplete",
            DriverError::WrongImage { .. } => "driver-wrong-image",
            DriverError::DriverSource(_) => "driver-media-unreadable",
        }
    }

    pub fn remedy(&self) -> String {
        match self {
            DriverError::UnknownWindows { .. } => {
                "describe this Windows in a file and pass it with --driver-config \
                 (hyper2kvm docs drivers, \"windows\")"
                    .to_string()
            }
            DriverError::NoDriver(missing) => missing.remedy.clone(),
            DriverError::NotSigned { remedy, .. } | DriverError::Inf { remedy, .. } => {
                remedy.clone()
            }
            DriverError::MissingFile { .. }
            | DriverError::WrongImage { .. }
            | DriverError::NoService { .. }
            | DriverError::DriverSource(_) => {
                "get a fresh copy of the virtio-win ISO and pass it with --virtio-iso".to_string()
            }
        }
    }

    pub fn blocker(&self) -> Blocker {
        let mut reason = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(source) = next {
            reason.push_str(&format!(": {source}"));
            next = source.source();
        }
        Blocker::new(self.code(), reason, self.remedy())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackageFile {
    pub name: String,
    pub path_in_source: String,
    pub size: u64,
}

/// One driver, ready to be installed or staged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverPackage {
    /// The driver's name in the catalogue.
    pub driver: String,
    pub role: Role,
    pub device: Option<VirtioDevice>,
    pub required: bool,
    /// Its directory in the driver source.
    pub folder: String,
    /// The OS directory that was chosen, under its first name.
    pub os_folder: String,
    pub inf_name: String,
    pub inf: DriverInf,
    pub files: Vec<PackageFile>,
    /// The start type that replaces that of the INF.
    pub start_override: Option<u32>,
    /// Hardware ids in addition to those of the INF.
    pub pnp_ids: Vec<String>,
    /// The signer of its catalogue ([`super::signature::catalogue_signer`]).
    pub signer: Option<String>,
}

impl DriverPackage {
    /// The files that the INF names: those that Windows copies to its driver store.
    pub fn store_files(&self) -> Vec<&PackageFile> {
        let names = referenced(&self.inf_name, &self.inf);
        self.files
            .iter()
            .filter(|f| names.contains(&f.name.to_lowercase()))
            .collect()
    }

    /// The names of its driver images, in lower case.
    pub fn images(&self) -> BTreeSet<String> {
        self.inf
            .services()
            .filter_map(|s| s.binary.path.rsplit('\\').next())
            .map(str::to_lowercase)
            .collect()
    }

    /// Reads every file, and checks that the driver image is one for this architecture.
    pub fn read_files(
        &self,
        driver_source: &dyn DriverSource,
        arch: Arch,
    ) -> Result<Vec<(String, Vec<u8>)>, DriverError> {
        let images = self.images();
        let mut contents = Vec::new();
        for file in &self.files {
            let bytes = driver_source.read(&file.path_in_source)?;
            if images.contains(&file.name.to_lowercase())
                && pe::machine(&bytes) != Some(arch.pe_machine())
            {
                return Err(DriverError::WrongImage {
                    file: file.path_in_source.clone(),
                    arch,
                });
            }
            contents.push((file.name.clone(), bytes));
        }
        Ok(contents)
    }
}

/// The drivers of a driver source for one Windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverSet {
    /// The name of this Windows in the catalogue.
    pub windows: String,
    /// The OS directory of the boot storage driver.
    pub os_folder: String,
    /// By role: storage, network, the rest.
    pub packages: Vec<DriverPackage>,
    /// Notes for the user: substitutes, and optional drivers that were left out with the reason.
    pub notes: Vec<String>,
    /// The guest agent's installer in the driver source.
    pub guest_agent_msi: Option<String>,
}

impl DriverSet {
    pub fn drives(&self, device: VirtioDevice) -> bool {
        self.packages.iter().any(|p| p.device == Some(device))
    }

    /// The packages to which a disk may be attached: `viostor`, `vioscsi`, and those that a
    /// configuration adds.
    pub fn boot_storage(&self) -> impl Iterator<Item = &DriverPackage> {
        self.packages
            .iter()
            .filter(|p| p.role == Role::Storage && p.required)
    }

    pub fn package(&self, driver: &str) -> Option<&DriverPackage> {
        self.packages
            .iter()
            .find(|p| p.driver.eq_ignore_ascii_case(driver))
    }
}

/// Chooses the packages for a Windows.
pub fn select(
    driver_source: &dyn DriverSource,
    catalogue: &Catalogue,
    target: &WindowsTarget,
) -> Result<DriverSet, DriverError> {
    let windows = catalogue
        .windows_for(target)
        .ok_or_else(|| DriverError::UnknownWindows {
            windows: target.to_string(),
        })?;
    let search = Search {
        driver_source,
        catalogue,
        target,
        windows,
        folders: Folder::index(driver_source.files()),
    };
    let mut set = DriverSet {
        windows: windows.name.clone(),
        os_folder: String::new(),
        packages: Vec::new(),
        notes: Vec::new(),
        guest_agent_msi: guest_agent(driver_source.files(), target.arch),
    };
    for spec in &catalogue.drivers {
        let exists = !windows
            .without
            .iter()
            .any(|name| name.eq_ignore_ascii_case(&spec.name));
        if !exists
            || spec
                .unless
                .as_ref()
                .is_some_and(|other| set.package(other).is_some())
        {
            continue;
        }
        let found = search.driver(spec, &mut set.notes);
        match found {
            Ok(package) => {
                if spec.required && set.os_folder.is_empty() {
                    set.os_folder = package.os_folder.clone();
                }
                set.packages.push(package);
            }
            Err(error) if spec.required => return Err(error),
            // Not every driver exists for every Windows: only an existing but broken one is
            // noteworthy.
            Err(DriverError::NoDriver(_)) => {}
            Err(error) => {
                let blocker = error.blocker();
                set.notes
                    .push(format!("{} is left out: {}", spec.name, blocker.reason));
            }
        }
    }
    let mut legacy = Vec::new();
    for package in set.boot_storage() {
        let forms = package.forms();
        if forms.transitional && !forms.modern {
            legacy.push(format!(
                "{} in {} lists no modern VirtIO device: behind a PCIe root port (q35) it finds no disk",
                package.driver, package.folder
            ));
        }
    }
    set.notes.extend(legacy);
    let other = set
        .boot_storage()
        .find(|p| p.os_folder != set.os_folder)
        .map(|p| {
            format!(
                "{} comes from {}, not from {}",
                p.driver, p.folder, set.os_folder
            )
        });
    set.notes.extend(other);
    Ok(set)
}

struct Folder<'m> {
    path: &'m str,
    /// The components in lower case.
    parts: Vec<String>,
    /// The files by lower-case name.
    files: BTreeMap<String, &'m DriverFile>,
}

impl<'m> Folder<'m> {
    /// The directories with files, the shallowest first.
    fn index(files: &'m [DriverFile]) -> Vec<Self> {
        let mut folders: BTreeMap<&str, BTreeMap<String, &DriverFile>> = BTreeMap::new();
        for file in files {
            if let Some((folder, name)) = file.path.rsplit_once('/') {
                folders
                    .entry(folder)
                    .or_default()
                    .insert(name.to_lowercase(), file);
            }
        }
        let mut folders: Vec<Self> = folders
            .into_iter()
            .map(|(path, files)| Self {
                path,
                parts: path.split('/').map(str::to_lowercase).collect(),
                files,
            })
            .collect();
        folders.sort_by_key(|f| f.parts.len());
        folders
    }

    fn ends_with(&self, pattern: &[&[String]]) -> bool {
        self.parts.len() >= pattern.len()
            && self
                .parts
                .iter()
                .rev()
                .zip(pattern.iter().rev())
                .all(|(part, names)| names.contains(part))
    }

    fn inf(&self, spec: &DriverSpec) -> Option<&'m DriverFile> {
        spec.inf
            .iter()
            .find_map(|name| self.files.get(&name.to_lowercase()).copied())
    }
}

struct Search<'a> {
    driver_source: &'a dyn DriverSource,
    catalogue: &'a Catalogue,
    target: &'a WindowsTarget,
    windows: &'a Windows,
    folders: Vec<Folder<'a>>,
}

impl Search<'_> {
    fn driver(
        &self,
        spec: &DriverSpec,
        notes: &mut Vec<String>,
    ) -> Result<DriverPackage, DriverError> {
        let mut first_error = None;
        for (i, os) in self.windows.folders.iter().enumerate() {
            let Some(folder) = self.folder(spec, os) else {
                continue;
            };
            match self.package(spec, os, folder, notes) {
                Ok(package) => {
                    if i > 0 {
                        notes.push(format!(
                            "{} has no {} directory with {}: the one in {} is taken, which {} accepts",
                            self.driver_source.describe(),
                            self.windows.folders[0],
                            spec.name,
                            package.folder,
                            self.windows.name
                        ));
                    }
                    return Ok(package);
                }
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        Err(first_error.unwrap_or_else(|| self.no_driver(spec)))
    }

    /// The directory of a driver for an OS directory, in either layout.
    fn folder(&self, spec: &DriverSpec, os: &str) -> Option<&Folder<'_>> {
        let drivers: Vec<String> = spec.folders.iter().map(|f| f.to_lowercase()).collect();
        let os = self.catalogue.folder_names(os);
        let archs = self.arch_names();
        [
            &[drivers.as_slice(), &os, &archs][..],
            &[archs.as_slice(), &os][..],
        ]
        .iter()
        .find_map(|pattern| {
            self.folders
                .iter()
                .find(|f| f.ends_with(pattern) && f.inf(spec).is_some())
        })
    }

    fn arch_names(&self) -> Vec<String> {
        self.catalogue
            .architectures
            .get(&self.target.arch)
            .map(|names| names.iter().map(|n| n.to_lowercase()).collect())
            .unwrap_or_default()
    }

    fn package(
        &self,
        spec: &DriverSpec,
        os: &str,
        folder: &Folder<'_>,
        notes: &mut Vec<String>,
    ) -> Result<DriverPackage, DriverError> {
        let missing = |file: &str| DriverError::MissingFile {
            folder: folder.path.to_string(),
            file: file.to_string(),
        };
        let inf_file = folder
            .inf(spec)
            .ok_or_else(|| missing(&spec.inf.join(" or ")))?;
        let inf_name = file_name(&inf_file.path).to_string();
        let inf = DriverInf::parse(&self.driver_source.read(&inf_file.path)?, self.target)
            .map_err(|source| DriverError::Inf {
                folder: folder.path.to_string(),
                inf: inf_name.clone(),
                windows: self.windows.name.clone(),
                source: Box::new(source),
                remedy: self.remedy(),
            })?;
        self.check_signing(spec, folder, &inf, notes)?;
        let start = |s: &ServiceInstall| spec.start.map_or(s.start_type, |start| start as u32);
        let boots = inf.device_service().is_some_and(|s| start(s) == 0);
        if spec.required && spec.role == Role::Storage && !boots {
            return Err(DriverError::NoService {
                folder: folder.path.to_string(),
                inf: inf_name,
            });
        }
        let names = referenced(&inf_name, &inf);
        if let Some(name) = names.iter().find(|name| !folder.files.contains_key(*name)) {
            return Err(missing(name));
        }
        // A directory of one driver is used as a whole; in one of several, only the files that its
        // INF names.
        let alone = folder.files.keys().filter(|n| n.ends_with(".inf")).count() == 1;
        let files = folder
            .files
            .iter()
            .filter(|(name, _)| names.contains(*name) || (alone && !self.catalogue.skips(name)))
            .map(|(_, file)| PackageFile {
                name: file_name(&file.path).to_string(),
                path_in_source: file.path.clone(),
                size: file.size,
            })
            .collect();
        Ok(DriverPackage {
            driver: spec.name.clone(),
            role: spec.role,
            device: spec.device,
            required: spec.required,
            folder: folder.path.to_string(),
            os_folder: os.to_string(),
            inf_name,
            inf,
            files,
            start_override: spec.start.map(|s| s as u32),
            pnp_ids: spec
                .pnp_ids
                .iter()
                .map(|id| id.as_str().to_string())
                .collect(),
            signer: None,
        })
    }

    /// Checks the release, which virtio-win records in `DriverVer`: 100.101.104.27100 is 0.1.271.
    fn check_signing(
        &self,
        spec: &DriverSpec,
        folder: &Folder<'_>,
        inf: &DriverInf,
        notes: &mut Vec<String>,
    ) -> Result<(), DriverError> {
        let [_, _, generation, stamp] = inf.driver_ver.version;
        let Some(last) = &self.windows.last_signed else {
            return Ok(());
        };
        let enforced = last.archs.is_empty() || last.archs.contains(&self.target.arch);
        if generation != 104 || stamp / 100 <= last.build || !enforced {
            return Ok(());
        }
        let error = DriverError::NotSigned {
            driver: format!(
                "{} {} in {}",
                spec.name,
                inf.driver_ver.version_text(),
                folder.path
            ),
            windows: self.windows.name.clone(),
            reason: last.reason.clone(),
            remedy: self.remedy(),
        };
        if last.refuse {
            return Err(error);
        }
        notes.push(format!("{error}; {}", error.remedy()));
        Ok(())
    }

    fn remedy(&self) -> String {
        format!("use {} and pass it with --virtio-iso", self.windows.media)
    }

    fn no_driver(&self, spec: &DriverSpec) -> DriverError {
        let available = self
            .catalogue
            .folders
            .keys()
            .filter(|os| self.folder(spec, os).is_some())
            .cloned()
            .collect();
        DriverError::NoDriver(Box::new(NoDriver {
            driver: spec.name.clone(),
            windows: format!("{} ({})", self.windows.name, self.target.arch),
            driver_source: self.driver_source.describe(),
            looked_for: self.windows.folders.clone(),
            available,
            remedy: self.remedy(),
        }))
    }
}

/// Lower-case names of the INF, its catalogue and every file it copies.
fn referenced(inf_name: &str, inf: &DriverInf) -> BTreeSet<String> {
    let copies = inf
        .installs
        .iter()
        .flat_map(|i| i.copy_files.iter().map(|c| c.source.as_str()));
    std::iter::once(inf_name)
        .chain(inf.catalog.as_deref())
        .chain(inf.source_files.iter().map(String::as_str))
        .chain(copies)
        .map(str::to_lowercase)
        .collect()
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn guest_agent(files: &[DriverFile], arch: Arch) -> Option<String> {
    let wanted = match arch {
        Arch::X86 => "qemu-ga-i386.msi",
        Arch::Amd64 => "qemu-ga-x86_64.msi",
        Arch::Arm64 => "qemu-ga-aarch64.msi",
    };
    files
        .iter()
        .filter(|f| file_name(&f.path).eq_ignore_ascii_case(wanted))
        .min_by_key(|f| f.path.matches('/').count())
        .map(|f| f.path.clone())
}

#[cfg(test)]
#[path = "search_tests.rs"]
mod search_tests;
#[cfg(test)]
#[path = "select_tests.rs"]
mod tests;
