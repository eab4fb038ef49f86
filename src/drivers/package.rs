//! Determines the files and registry edits that install a driver package offline.
//!
//! For boot storage drivers this is the complete package that Windows itself records. It has a
//! service, event source, driver database with configuration and descriptors, driver store and
//! lockdown entry. Up to Windows 7 it is the service and `CriticalDeviceDatabase`. For all other
//! drivers it is the package as `pnputil /add-driver` leaves it: stored, recorded in the database,
//! not yet configured. All values are from the INF. [`stage`] and [`device_path_edit`] put plain
//! copies in a directory that Windows searches for INFs.
//!
//! Facts from real hives (a Windows 10 with `lsi_sas`, `pvscsi`, `vmci`):
//! - The four bytes under `DeviceIds` begin with the kind of id: 1 hardware, 2 compatible, 3 both.
//!   Then follow the FeatureScore (ff by default), the index among compatible ids, and 0.
//! - The first bytes of `Version` are 00ff for OEM packages, ffff for inbox ones. Then follows the
//!   `PROCESSOR_ARCHITECTURE`, 9 on amd64 (`DriverDatabase\Architecture` is 9 there too).
//! - Store directory names, string names and tokens in descriptors are lower case. The names of
//!   configurations and device ids keep the case of the INF.
//! - `HKR,"Key",,0x10` makes a key and no value.
//!
//! The ids of the catalogue are added to those of the INF. So is the short `VEN&DEV` form of every
//! full PCI id, because old packages list only the full one. Modern ids are not invented. An INF
//! that does not list `DEV_1042` belongs to a driver that does not support it, see
//! [`DriverPackage::forms`].

use std::collections::BTreeSet;

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::catalogue::Role;
use super::inf::{AddReg, InfPath, ServiceInstall, Text};
use super::select::{DriverPackage, DriverSet};
use super::target::WindowsTarget;
use crate::guest::{GuestPath, PathError};
use crate::registry::{RegData, RegOp};
use crate::text::hex;
use crate::types::{ControlSet, KeyPath};

/// The locations and numbers for a package in one guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// `ControlSet001`, from `Select\Default`.
    pub control_set: ControlSet,
    /// The Windows directory on its volume.
    pub windows: GuestPath,
    /// The number of the `oem<N>.inf`.
    pub oem: u32,
    /// hyper2kvm's directory of plain copies, below the Windows directory.
    pub staging: GuestPath,
    /// The letter that Windows gives its own volume, `C:`.
    pub system_drive: String,
    /// Services of the guest, in lower case. A driver that already drives a device, and may be
    /// newer, is kept unless Windows has to boot from the device.
    pub existing: BTreeSet<String>,
}

/// The directory for staged drivers, below the Windows directory.
const STAGING: &str = r"hyper2kvm\drivers";

impl Placement {
    pub fn new(control_set: ControlSet, windows: GuestPath, oem: u32) -> Result<Self, PathError> {
        Ok(Self {
            control_set,
            staging: windows.join(STAGING)?,
            windows,
            oem,
            system_drive: "C:".to_string(),
            existing: BTreeSet::new(),
        })
    }

    fn oem_inf(&self) -> String {
        format!("oem{}.inf", self.oem)
    }

    /// A path in the form that Windows writes to the registry to be independent of drive letters.
    fn system_root(&self, path: &GuestPath) -> String {
        let below = path
            .parts()
            .get(self.windows.parts().len()..)
            .unwrap_or_default();
        format!("%SystemRoot%\\{}", below.join("\\"))
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Installation {
    /// The name of the package in the driver store; `None` up to Windows 7.
    pub store_name: Option<String>,
    /// Target path, and path in the driver source. Without the staged copies.
    pub files: Vec<(GuestPath, String)>,
    pub system: Vec<RegOp>,
    pub software: Vec<RegOp>,
    pub drivers: Vec<RegOp>,
}

/// The forms of a virtio device in an INF.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Forms {
    pub transitional: bool,
    /// Required behind PCIe root ports, so on `q35` as libvirt configures it.
    pub modern: bool,
}

impl DriverPackage {
    pub fn forms(&self) -> Forms {
        let mut forms = Forms::default();
        for id in self.bound_ids() {
            let device = id
                .id
                .to_ascii_uppercase()
                .strip_prefix("PCI\\VEN_1AF4&DEV_")
                .and_then(|rest| u16::from_str_radix(rest.get(..4)?, 16).ok());
            match device {
                Some(0x1000..=0x103f) => forms.transitional = true,
                Some(0x1040..=0x107f) => forms.modern = true,
                _ => {}
            }
        }
        forms
    }

    fn is_boot(&self) -> bool {
        self.role == Role::Storage && self.required
    }

    /// Every id to which the driver is bound, those of the INF first, in its order.
    fn bound_ids(&self) -> Vec<BoundId> {
        let mut ids: Vec<BoundId> = Vec::new();
        let mut add = |id: &str, kind: u8, index: u8, model: usize| {
            let known = ids
                .iter_mut()
                .find(|known| known.id.eq_ignore_ascii_case(id));
            match known {
                Some(known) => {
                    known.kind |= kind;
                    known.index = known.index.min(index);
                }
                None => ids.push(BoundId {
                    id: id.to_string(),
                    kind,
                    index,
                    model,
                }),
            }
        };
        for (model, line) in self.inf.models.iter().enumerate() {
            for (i, id) in line.hardware_ids.iter().enumerate() {
                let compatible = u8::try_from(i.saturating_sub(1)).unwrap_or(u8::MAX);
                add(
                    id,
                    if i == 0 { HARDWARE_ID } else { COMPATIBLE_ID },
                    compatible,
                    model,
                );
            }
        }
        if self.is_boot() {
            for (model, line) in self.inf.models.iter().enumerate() {
                for id in line.hardware_ids.iter().filter_map(|id| short_id(id)) {
                    let listed = |m: &super::inf::Model| {
                        m.hardware_ids.iter().any(|h| h.eq_ignore_ascii_case(&id))
                    };
                    if !self.inf.models.iter().any(listed) {
                        add(&id, COMPATIBLE_ID, 0, model);
                    }
                }
            }
            for id in &self.pnp_ids {
                add(id, HARDWARE_ID, 0, 0);
            }
        }
        ids
    }
}

const HARDWARE_ID: u8 = 1;
const COMPATIBLE_ID: u8 = 2;

struct BoundId {
    id: String,
    kind: u8,
    index: u8,
    model: usize,
}

/// Shortens an id to `PCI\VEN_v&DEV_d`.
fn short_id(id: &str) -> Option<String> {
    let mut parts = id.split('&');
    let (vendor, device) = (parts.next()?, parts.next()?);
    let pci = vendor.to_ascii_uppercase().starts_with("PCI\\VEN_")
        && device.to_ascii_uppercase().starts_with("DEV_");
    (pci && parts.next().is_some()).then(|| format!("{vendor}&{device}"))
}

/// Digests names and contents to 16 hex digits; the order of files does not matter.
pub fn digest(contents: &[(String, Vec<u8>)]) -> String {
    let mut files: Vec<(String, &[u8])> = contents
        .iter()
        .map(|(name, bytes)| (name.to_lowercase(), bytes.as_slice()))
        .collect();
    files.sort();
    let mut hash = Sha256::new();
    for (name, bytes) in files {
        for part in [name.as_bytes(), bytes] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
    }
    hex(&hash.finalize()[..8])
}

/// The name of the package's directory in the driver store: `viostor.inf_amd64_<16 hex digits>`.
pub fn store_name(pkg: &DriverPackage, target: &WindowsTarget, digest: &str) -> String {
    format!(
        "{}_{}_{digest}",
        pkg.inf_name.to_lowercase(),
        target.arch.inf_name()
    )
}

/// Everything needed to install a package offline, for the digest of its contents.
pub fn install(
    pkg: &DriverPackage,
    digest: &str,
    target: &WindowsTarget,
    placement: &Placement,
) -> Result<Installation, PathError> {
    let builder = Builder {
        pkg,
        target,
        at: placement,
        store: store_name(pkg, target, digest),
        oem: placement.oem_inf(),
    };
    if pkg.is_boot() {
        builder.boot_driver()
    } else {
        builder.staged_driver()
    }
}

/// The plain copies of a package. They share one directory for all drivers, as in the RPM's `by-os`
/// trees: `DevicePath` names directories without their subdirectories, and one entry has to
/// suffice.
pub fn stage(
    pkg: &DriverPackage,
    placement: &Placement,
) -> Result<Vec<(GuestPath, String)>, PathError> {
    pkg.files
        .iter()
        .filter(|f| !is_documentation(&f.name))
        .map(|f| Ok((placement.staging.join(&f.name)?, f.path_in_source.clone())))
        .collect()
}

/// Copies to make, and notes about them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Staged {
    /// Target path, and path in the driver source.
    pub files: Vec<(GuestPath, String)>,
    pub notes: Vec<String>,
}

/// The plain copies of all packages. If two packages have a file of the same name with different
/// sizes, the second gets its own directory, with a note: Windows does not search there
/// automatically.
pub fn stage_all(set: &DriverSet, placement: &Placement) -> Result<Staged, PathError> {
    let mut staged = Staged::default();
    let mut sizes: Vec<(String, u64)> = Vec::new();
    for pkg in &set.packages {
        let loaded = pkg.files.iter().filter(|f| !is_documentation(&f.name));
        let clash = loaded.clone().find(|f| {
            sizes
                .iter()
                .any(|(name, size)| name.eq_ignore_ascii_case(&f.name) && *size != f.size)
        });
        let place = match clash {
            None => placement.clone(),
            Some(file) => {
                staged.notes.push(format!(
                    "{} is staged in a directory of its own: its {} differs from that of another driver",
                    pkg.driver, file.name
                ));
                Placement {
                    staging: placement.staging.join(&pkg.driver)?,
                    ..placement.clone()
                }
            }
        };
        sizes.extend(loaded.map(|f| (f.name.clone(), f.size)));
        for copy in stage(pkg, &place)? {
            if !staged.files.iter().any(|(to, _)| *to == copy.0) {
                staged.files.push(copy);
            }
        }
    }
    Ok(staged)
}

fn is_documentation(name: &str) -> bool {
    let name = name.to_lowercase();
    name.ends_with(".md") || name.ends_with(".txt")
}

const CURRENT_VERSION: &str = r"Microsoft\Windows\CurrentVersion";

/// Adds the staging directory to the directories that Windows searches for INFs (SOFTWARE hive).
/// `None` if it is already there. `current` is the present value, if there is one.
pub fn device_path_edit(current: Option<&str>, placement: &Placement) -> Option<RegOp> {
    let entry = placement.system_root(&placement.staging);
    let current = current.unwrap_or(r"%SystemRoot%\inf").trim_matches(';');
    if current
        .split(';')
        .any(|part| part.trim().eq_ignore_ascii_case(&entry))
    {
        return None;
    }
    Some(RegOp::set(
        CURRENT_VERSION,
        "DevicePath",
        RegData::ExpandSz(format!("{current};{entry}")),
    ))
}

/// `DriverDatabase\OemInfMap`: one bit per `oem<N>.inf`, the most significant bit first.
pub fn oem_numbers(map: &[u8]) -> BTreeSet<u32> {
    let bits = map
        .iter()
        .flat_map(|byte| (0..8).map(move |i| byte & (0x80 >> i) != 0));
    (0u32..)
        .zip(bits)
        .filter(|(_, set)| *set)
        .map(|(n, _)| n)
        .collect()
}

/// Marks numbers as used; `None` if they already are.
pub fn oem_map_edit(current: Option<&[u8]>, numbers: &[u32]) -> Option<RegOp> {
    let before = current.unwrap_or_default();
    let mut map = before.to_vec();
    for &number in numbers {
        let index = usize::try_from(number / 8).ok()?;
        if map.len() <= index {
            map.resize(index + 1, 0);
        }
        map[index] |= 0x80 >> (number % 8);
    }
    (map != before).then(|| RegOp::set("DriverDatabase", "OemInfMap", RegData::Binary(map)))
}

struct Builder<'a> {
    pkg: &'a DriverPackage,
    target: &'a WindowsTarget,
    at: &'a Placement,
    /// The package's name in the driver store.
    store: String,
    /// `oem5.inf`
    oem: String,
}

const DIRID_WINDOWS: u32 = 10;
const DIRID_SYSTEM32: u32 = 11;
const DIRID_DRIVERS: u32 = 12;
const DIRID_STORE: u32 = 13;

impl Builder<'_> {
    fn boot_driver(&self) -> Result<Installation, PathError> {
        let database = self.target.has_driver_database();
        let mut result = Installation {
            files: self.copies()?,
            ..Installation::default()
        };
        for service in self.services() {
            self.service(service, &mut result.system);
        }
        if database {
            result.files.extend(self.store_files()?);
            self.device_ids(&mut result.system);
            self.package_keys(true, &mut result.system);
            self.configured(&mut result.system);
            self.lockdown(&mut result.software);
            result.store_name = Some(self.store.clone());
        } else {
            self.critical_devices(&mut result.system);
            let catalog = self.pkg.inf.catalog.as_deref().unwrap_or_default();
            let files = self.pkg.store_files();
            if let Some(file) = files.iter().find(|f| f.name.eq_ignore_ascii_case(catalog)) {
                let to = self.catalogues()?.join(&file.name)?;
                result.files.push((to, file.path_in_source.clone()));
            }
        }
        Ok(result)
    }

    /// The package in the driver store, with its service but without configurations: Windows
    /// configures it when the device appears. Windows records `netkvm` in the same form
    /// (lxc/distrobuilder `driver_netkvm.go`).
    fn staged_driver(&self) -> Result<Installation, PathError> {
        let mut result = Installation::default();
        if !self.target.has_driver_database() {
            return Ok(result);
        }
        result.files = self.store_files()?;
        result.store_name = Some(self.store.clone());
        // The separate hive was added in 8.1, where SYSTEM is still read for all drivers.
        let ops = if self.target.major >= 10 {
            &mut result.drivers
        } else {
            &mut result.system
        };
        self.device_ids(ops);
        self.package_keys(false, ops);
        // Only the device's own service: Windows sets up helpers.
        let services = self.services().filter(|s| {
            s.is_device_service() && !self.at.existing.contains(&s.name.to_lowercase())
        });
        for service in services {
            let name = service.binary.path.rsplit('\\').next().unwrap_or_default();
            let files = &self.pkg.files;
            let source = files.iter().find(|f| f.name.eq_ignore_ascii_case(name));
            // A service without its file is worse than none.
            if let (Some(to), Some(from)) = (self.guest_path(&service.binary)?, source) {
                result.files.push((to, from.path_in_source.clone()));
                self.service(service, &mut result.system);
            }
        }
        Ok(result)
    }

    fn services(&self) -> impl Iterator<Item = &ServiceInstall> {
        let mut seen = BTreeSet::new();
        self.pkg
            .inf
            .services()
            .filter(move |s| seen.insert(s.name.to_lowercase()))
    }

    /// The path of an INF's path in the guest's file system.
    fn guest_path(&self, path: &InfPath) -> Result<Option<GuestPath>, PathError> {
        let dir = match path.dirid {
            DIRID_WINDOWS => self.at.windows.clone(),
            DIRID_SYSTEM32 => self.at.windows.join("System32")?,
            // A file that runs from the driver store gets a second copy where every tool looks for
            // it.
            DIRID_DRIVERS | DIRID_STORE => self.at.windows.join(r"System32\drivers")?,
            _ => return Ok(None),
        };
        dir.join(&path.path).map(Some)
    }

    /// The files that CopyFiles of the INF copies outside the driver store.
    fn copies(&self) -> Result<Vec<(GuestPath, String)>, PathError> {
        let mut files: Vec<(GuestPath, String)> = Vec::new();
        for install in &self.pkg.inf.installs {
            for copy in &install.copy_files {
                let source = self
                    .pkg
                    .files
                    .iter()
                    .find(|f| f.name.eq_ignore_ascii_case(&copy.source));
                if let (Some(to), Some(from)) = (self.guest_path(&copy.to)?, source)
                    && !files.iter().any(|(known, _)| *known == to)
                {
                    files.push((to, from.path_in_source.clone()));
                }
            }
        }
        // The service's image is copied to the path in the service, whatever CopyFiles contains.
        for binary in self.services().map(|s| &s.binary) {
            let name = binary.path.rsplit('\\').next().unwrap_or_default();
            let source = self
                .pkg
                .files
                .iter()
                .find(|f| f.name.eq_ignore_ascii_case(name));
            if let (Some(to), Some(from)) = (self.guest_path(binary)?, source)
                && !files.iter().any(|(known, _)| *known == to)
            {
                files.push((to, from.path_in_source.clone()));
            }
        }
        Ok(files)
    }

    fn store_files(&self) -> Result<Vec<(GuestPath, String)>, PathError> {
        let folder = self
            .at
            .windows
            .join(r"System32\DriverStore\FileRepository")?
            .join(&self.store)?;
        let mut files = Vec::new();
        let catalog = self.pkg.inf.catalog.as_deref().unwrap_or_default();
        for file in self.pkg.store_files() {
            files.push((folder.join(&file.name)?, file.path_in_source.clone()));
            if file.name.eq_ignore_ascii_case(catalog) {
                let name = format!("oem{}.cat", self.at.oem);
                files.push((self.catalogues()?.join(&name)?, file.path_in_source.clone()));
            }
            if file.name.eq_ignore_ascii_case(&self.pkg.inf_name) {
                let inf = self.at.windows.join("INF")?.join(&self.oem)?;
                files.push((inf, file.path_in_source.clone()));
            }
        }
        Ok(files)
    }

    /// The directory in which code integrity looks for the signatures of files without embedded
    /// ones.
    fn catalogues(&self) -> Result<GuestPath, PathError> {
        let folder = r"System32\CatRoot\{F750E6C3-38EE-11D1-85E5-00C04FC295EE}";
        self.at.windows.join(folder)
    }

    fn image_path(&self, binary: &InfPath) -> String {
        let path = &binary.path;
        match binary.dirid {
            DIRID_WINDOWS => format!("\\SystemRoot\\{path}"),
            DIRID_SYSTEM32 => format!("System32\\{path}"),
            DIRID_STORE if self.target.has_driver_database() => format!(
                "\\SystemRoot\\System32\\DriverStore\\FileRepository\\{}\\{path}",
                self.store
            ),
            _ => format!("System32\\drivers\\{path}"),
        }
    }

    fn service(&self, service: &ServiceInstall, ops: &mut Vec<RegOp>) {
        let services = self.at.control_set.key("Services");
        let key = services.join(&service.name);
        let database = self.target.has_driver_database();
        let start = self
            .pkg
            .start_override
            .filter(|_| service.is_device_service())
            .unwrap_or(service.start_type);
        ops.push(RegOp::DeleteKey {
            key: key.join("StartOverride").into(),
        });
        let mut set = |name: &str, data| ops.push(RegOp::set(key.clone(), name, data));
        set("Type", RegData::Dword(service.service_type));
        set("Start", RegData::Dword(start));
        set("ErrorControl", RegData::Dword(service.error_control));
        if let Some(group) = &service.load_order_group {
            set("Group", RegData::Sz(group.clone()));
        }
        set(
            "ImagePath",
            RegData::ExpandSz(self.image_path(&service.binary)),
        );
        if let Some(name) = &service.display_name {
            set("DisplayName", RegData::Sz(self.display_name(name)));
        }
        if database {
            set("Owners", RegData::MultiSz(vec![self.oem.clone()]));
        }
        if let Some(tag) = service.tag {
            set("Tag", RegData::Dword(tag));
        }
        add_reg(&service.add_reg, &key, ops);
        if let Some(log) = &service.event_log {
            let key = services.join("EventLog\\System").join(&service.name);
            if let Some(file) = &log.event_message_file {
                let data = RegData::ExpandSz(file.clone());
                ops.push(RegOp::set(key.clone(), "EventMessageFile", data));
            }
            if let Some(types) = log.types_supported {
                ops.push(RegOp::set(key, "TypesSupported", RegData::Dword(types)));
            }
        }
    }

    /// Returns `@oem5.inf,%name%;text` if the INF is stored under that name, otherwise only the
    /// text.
    fn display_name(&self, text: &Text) -> String {
        match text.token() {
            Some(_) if self.target.has_driver_database() => {
                format!("@{},{};{}", self.oem, text.raw, text.value)
            }
            _ => text.value.clone(),
        }
    }

    fn device_ids(&self, ops: &mut Vec<RegOp>) {
        let root = KeyPath::new(r"DriverDatabase\DeviceIds");
        let score = |model: usize| {
            self.pkg
                .inf
                .models
                .get(model)
                .and_then(|m| self.pkg.inf.install(&m.install_section))
                .map_or(0xff, |install| install.feature_score)
        };
        for id in self.pkg.bound_ids() {
            let rank = vec![id.kind, score(id.model), id.index, 0];
            ops.push(RegOp::set(
                root.join(&id.id),
                self.oem.as_str(),
                RegData::Binary(rank),
            ));
        }
        ops.push(RegOp::set(
            root.join(&self.pkg.inf.class_guid.to_lowercase()),
            self.oem.as_str(),
            RegData::None(Vec::new()),
        ));
    }

    fn package_key(&self) -> KeyPath {
        KeyPath::new(r"DriverDatabase\DriverPackages").join(&self.store)
    }

    /// `DriverInfFiles` and the package's own values, which every package in the store has.
    fn package_keys(&self, configured: bool, ops: &mut Vec<RegOp>) {
        let inf = &self.pkg.inf;
        let key = KeyPath::new(r"DriverDatabase\DriverInfFiles").join(&self.oem);
        let mut set = |name: &str, data| ops.push(RegOp::set(key.clone(), name, data));
        set("", RegData::MultiSz(vec![self.store.clone()]));
        set("Active", RegData::Sz(self.store.clone()));
        if configured {
            let names = inf.installs.iter().map(|i| i.name.clone()).collect();
            set("Configurations", RegData::MultiSz(names));
        }
        let key = self.package_key();
        let mut set = |name: &str, data| ops.push(RegOp::set(key.clone(), name, data));
        set("", RegData::Sz(self.oem.clone()));
        if let Some(catalog) = &inf.catalog {
            set("Catalog", RegData::Sz(catalog.clone()));
        }
        set("InfName", RegData::Sz(self.pkg.inf_name.to_lowercase()));
        let oem_path = format!("{}{}", self.at.system_drive, self.at.staging);
        set("OemPath", RegData::Sz(oem_path));
        set("Provider", RegData::Sz(inf.provider.value.clone()));
        if let Some(signer) = &self.pkg.signer {
            set("SignerName", RegData::Sz(signer.clone()));
        }
        set("SignerScore", RegData::Dword(SIGNER_SCORE));
        set("StatusFlags", RegData::Dword(STATUS_FLAGS));
        set("Version", RegData::Binary(self.version()));
    }

    fn version(&self) -> Vec<u8> {
        let inf = &self.pkg.inf;
        let guid = uuid::Uuid::try_parse(inf.class_guid.trim_matches(['{', '}']));
        let mut blob = vec![0x00, 0xff];
        blob.extend(self.target.arch.processor().to_le_bytes());
        blob.extend([0; 4]);
        // The parser has already checked the GUID.
        blob.extend(guid.unwrap_or_default().to_bytes_le());
        blob.extend(inf.driver_ver.filetime().to_le_bytes());
        for part in inf.driver_ver.version.iter().rev() {
            blob.extend(part.to_le_bytes());
        }
        blob.extend([0; 8]);
        blob
    }

    /// The settings of each install section, and the section for each id.
    fn configured(&self, ops: &mut Vec<RegOp>) {
        let package = self.package_key();
        for install in &self.pkg.inf.installs {
            let key = package.join("Configurations").join(&install.name);
            let mut set = |name: &str, data| ops.push(RegOp::set(key.clone(), name, data));
            set("ConfigFlags", RegData::Dword(0));
            set("ConfigScope", RegData::Dword(7));
            if !install.includes.is_empty() {
                set("IncludedInfs", RegData::MultiSz(install.includes.clone()));
            }
            if let Some(service) = install.device_service() {
                set("Service", RegData::Sz(service.name.clone()));
            }
            add_reg(&install.hw_add_reg, &key.join("Device"), ops);
            add_reg(&install.add_reg, &key.join("Driver"), ops);
            for service in &install.services {
                let key = key.join("Services").join(&service.name);
                add_reg(&service.add_reg, &key, ops);
            }
        }
        for id in self.pkg.bound_ids() {
            let Some(model) = self.pkg.inf.models.get(id.model) else {
                continue;
            };
            let key = package.join("Descriptors").join(&id.id);
            let mut set = |name: &str, text: String| {
                ops.push(RegOp::set(key.clone(), name, RegData::Sz(text)));
            };
            set("Configuration", model.install_section.clone());
            set("Description", token_or_value(&model.description));
            set("Manufacturer", token_or_value(&model.manufacturer));
        }
        for (name, value) in self.pkg.inf.strings() {
            ops.push(RegOp::set(
                package.join("Strings"),
                name,
                RegData::Sz(value),
            ));
        }
    }

    fn lockdown(&self, ops: &mut Vec<RegOp>) {
        for service in self.services() {
            let dirid = service.binary.dirid;
            if !matches!(dirid, DIRID_DRIVERS | DIRID_STORE) {
                continue;
            }
            let image = &service.binary.path;
            // The slashes belong to the key's name.
            let key = format!(
                "{CURRENT_VERSION}\\Setup\\PnpLockdownFiles\\%SystemRoot%/System32/drivers/{}",
                image.replace('\\', "/")
            );
            let source = format!(
                "%SystemRoot%\\System32\\DriverStore\\FileRepository\\{}\\{image}",
                self.store
            );
            ops.push(RegOp::set(key.as_str(), "Class", RegData::Dword(4)));
            let owners = RegData::MultiSz(vec![self.oem.clone()]);
            ops.push(RegOp::set(key.as_str(), "Owners", owners));
            ops.push(RegOp::set(key, "Source", RegData::ExpandSz(source)));
        }
    }

    /// `CriticalDeviceDatabase`, with which NT 5 to 6.1 find the driver of the boot controller.
    fn critical_devices(&self, ops: &mut Vec<RegOp>) {
        for id in self.pkg.bound_ids() {
            let service = self
                .pkg
                .inf
                .models
                .get(id.model)
                .and_then(|m| self.pkg.inf.install(&m.install_section)?.device_service());
            let Some(service) = service else {
                continue;
            };
            let database = self.at.control_set.key("Control\\CriticalDeviceDatabase");
            let key = database.join(&id.id.replace('\\', "#"));
            let guid = RegData::Sz(self.pkg.inf.class_guid.to_uppercase());
            ops.push(RegOp::set(key.clone(), "ClassGUID", guid));
            ops.push(RegOp::set(
                key,
                "Service",
                RegData::Sz(service.name.clone()),
            ));
        }
    }
}

/// The signer of packages from Microsoft's hardware portal, as Windows records it.
const SIGNER_SCORE: u32 = 0x0d00_0005;
const STATUS_FLAGS: u32 = 0x12;

fn token_or_value(text: &Text) -> String {
    match text.token() {
        Some(token) => format!("%{}%", token.to_lowercase()),
        None => text.value.clone(),
    }
}

/// Applies the `HKR` lines below a key.
fn add_reg(lines: &[AddReg], key: &KeyPath, ops: &mut Vec<RegOp>) {
    for line in lines.iter().filter(|l| l.root == "HKR") {
        let key = match line.subkey.as_str() {
            "" => key.clone(),
            subkey => key.join(subkey),
        };
        ops.push(match &line.data {
            Some(data) => RegOp::set(key, line.name.as_str(), data.clone()),
            None => RegOp::CreateKey { key: key.into() },
        });
    }
}

#[cfg(test)]
#[path = "install_tests.rs"]
mod install_tests;
#[cfg(test)]
#[path = "package_tests.rs"]
mod tests;
