//! The catalogue: the directories for each Windows, and the role of each driver.
//!
//! The data is in `drivers/*.yaml`, compiled in; `--driver-config` files of the same schema (YAML
//! or JSON) are merged over it. The schema is described in `docs/drivers.md`. The catalogue repeats
//! nothing that an INF contains (ids, services, start types).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::target::{Arch, WindowsTarget};
use crate::types::{DiskBus, ServiceStart};
use crate::yaml;

const WINDOWS: &str = include_str!("../../drivers/windows.yaml");
const VIRTIO: &str = include_str!("../../drivers/virtio.yaml");
const MAX_CONFIG: u64 = 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    #[error("reading {file}")]
    Io {
        file: String,
        source: std::io::Error,
    },
    #[error("{file} is more than {MAX_CONFIG} bytes")]
    TooLarge { file: String },
    #[error("{file}, line {line}: {message}")]
    Schema {
        file: String,
        line: usize,
        message: String,
    },
}

/// The role of a driver, in processing order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Storage,
    Network,
    Memory,
    Serial,
    Rng,
    Input,
    Display,
    Panic,
    Fwcfg,
    Filesystem,
    Socket,
    Other,
}

/// A device of the VM that exists only if the guest has a driver for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VirtioDevice {
    #[serde(rename = "virtio-blk")]
    Blk,
    #[serde(rename = "virtio-scsi")]
    Scsi,
    #[serde(rename = "virtio-net")]
    Net,
    #[serde(rename = "virtio-balloon")]
    Balloon,
    #[serde(rename = "virtio-serial")]
    Serial,
    #[serde(rename = "virtio-rng")]
    Rng,
}

impl VirtioDevice {
    /// The bus of its disks.
    pub fn disk_bus(self) -> Option<DiskBus> {
        match self {
            Self::Blk => Some(DiskBus::VirtioBlk),
            Self::Scsi => Some(DiskBus::VirtioScsi),
            Self::Net | Self::Balloon | Self::Serial | Self::Rng => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Product {
    Client,
    Server,
}

/// An NT version such as `10.0`; quoted in the file because it is not a decimal number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct NtVersion {
    pub major: u32,
    pub minor: u32,
}

impl TryFrom<String> for NtVersion {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parse = || {
            let (major, minor) = text.split_once('.')?;
            Some(Self {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
            })
        };
        parse().ok_or_else(|| format!("{text:?} is not an NT version such as \"10.0\""))
    }
}

/// A hardware id, `PCI\VEN_1AF4&DEV_1001`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct PnpId(String);

impl PnpId {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for PnpId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let good = |part: &str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'&' | b'-' | b'.'))
        };
        match text.split_once('\\') {
            Some((bus, id)) if text.len() <= 200 && good(bus) && good(id) => Ok(Self(text)),
            _ => Err(format!(
                "{text:?} is not a hardware id such as PCI\\VEN_1AF4&DEV_1001"
            )),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Builds {
    pub from: Option<u32>,
    pub to: Option<u32>,
}

/// The last virtio-win release whose drivers this Windows loads without further measures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LastSigned {
    /// The release: 173 for 0.1.173, as in the last part of `DriverVer` times 100.
    pub build: u16,
    /// The architectures that enforce it; empty means all.
    #[serde(default)]
    pub archs: Vec<Arch>,
    /// Refuse later drivers, or only warn.
    pub refuse: bool,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Windows {
    pub id: String,
    pub name: String,
    pub nt: NtVersion,
    #[serde(default)]
    pub builds: Builds,
    #[serde(default)]
    pub product: Option<Product>,
    /// Empty means any.
    #[serde(default)]
    pub archs: Vec<Arch>,
    /// OS directories, the best first.
    pub folders: Vec<String>,
    /// The recommended release if a driver source has no driver, as the end of "use ...".
    pub media: String,
    #[serde(default)]
    pub last_signed: Option<LastSigned>,
    /// Required drivers that do not exist for this Windows.
    #[serde(default)]
    pub without: Vec<String>,
}

impl Windows {
    /// A Windows for which this entry is meant: its first build, or the last one of that NT
    /// version.
    #[cfg(test)]
    pub fn example(&self, arch: Arch) -> WindowsTarget {
        let NtVersion { major, minor } = self.nt;
        let usual = match (major, minor, self.product) {
            (10, 0, Some(Product::Server)) => 14393,
            (10, 0, _) => 19045,
            (6, 3, _) => 9600,
            (6, 2, _) => 9200,
            (6, 1, _) => 7601,
            (6, 0, _) => 6003,
            (5, 2, _) => 3790,
            _ => 2600,
        };
        WindowsTarget {
            major,
            minor,
            build: self.builds.from.or(self.builds.to).unwrap_or(usual),
            arch,
            server: self.product == Some(Product::Server),
        }
    }

    fn fits(&self, target: &WindowsTarget) -> bool {
        let product = if target.server {
            Product::Server
        } else {
            Product::Client
        };
        (self.nt.major, self.nt.minor) == (target.major, target.minor)
            && self.builds.from.is_none_or(|from| target.build >= from)
            && self.builds.to.is_none_or(|to| target.build <= to)
            && self.product.is_none_or(|p| p == product)
            && (self.archs.is_empty() || self.archs.contains(&target.arch))
    }
}

/// A driver as a file describes it. In a `--driver-config`, only the name is required.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DriverEntry {
    name: String,
    role: Option<Role>,
    device: Option<VirtioDevice>,
    services: Option<Vec<String>>,
    folders: Option<Vec<String>>,
    inf: Option<Vec<String>>,
    required: Option<bool>,
    start: Option<ServiceStart>,
    unless: Option<String>,
    #[serde(default)]
    pnp_ids: Vec<PnpId>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DriverSpec {
    pub name: String,
    pub role: Role,
    /// The device of the VM that it drives.
    pub device: Option<VirtioDevice>,
    /// The present and former names of its service, for finding it in a guest.
    pub services: Vec<String>,
    /// Directory names in the driver source, the best first.
    pub folders: Vec<String>,
    pub inf: Vec<String>,
    /// Whether a guest without it cannot be converted.
    pub required: bool,
    /// The start type that replaces that of the INF.
    pub start: Option<ServiceStart>,
    /// The driver that makes this one unnecessary.
    pub unless: Option<String>,
    /// Hardware ids bound to the driver in addition to those of its INF.
    pub pnp_ids: Vec<PnpId>,
}

/// Hardware ids of a vendor's own devices, per driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vendor {
    name: String,
    pnp_ids: BTreeMap<String, Vec<PnpId>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Document {
    architectures: BTreeMap<Arch, Vec<String>>,
    folders: BTreeMap<String, Vec<String>>,
    windows: Vec<Windows>,
    drivers: Vec<DriverEntry>,
    vendors: Vec<Vendor>,
    skip: Vec<String>,
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct Catalogue {
    pub architectures: BTreeMap<Arch, Vec<String>>,
    /// Further names of an OS directory, by its first name.
    pub folders: BTreeMap<String, Vec<String>>,
    pub windows: Vec<Windows>,
    /// The drivers by role, then in the order of the files.
    pub drivers: Vec<DriverSpec>,
    /// File names that are never copied; `*` at either end matches any text.
    pub skip: Vec<String>,
}

impl Catalogue {
    /// The catalogue compiled into the program.
    ///
    /// # Panics
    /// Never: a test parses the same text.
    pub fn builtin() -> Self {
        static BUILTIN: LazyLock<Catalogue> = LazyLock::new(|| {
            let mut catalogue = Catalogue::default();
            for (name, text) in [("virtio.yaml", VIRTIO), ("windows.yaml", WINDOWS)] {
                catalogue
                    .merge_text(name, text)
                    .expect("the built-in catalogue is valid");
            }
            catalogue
        });
        BUILTIN.clone()
    }

    /// Merges a YAML or (by its extension) JSON file over the present entries.
    pub fn merge_file(&mut self, path: &Path) -> Result<(), CatalogueError> {
        let file = path.display().to_string();
        let io = |source| CatalogueError::Io {
            file: file.clone(),
            source,
        };
        let size = std::fs::metadata(path).map_err(io)?.len();
        if size > MAX_CONFIG {
            return Err(CatalogueError::TooLarge { file });
        }
        let text = std::fs::read_to_string(path).map_err(io)?;
        self.merge_text(&file, &text)
    }

    /// Merges text; a `file` that ends in `.json` is parsed as JSON. After an error nothing is
    /// changed.
    pub fn merge_text(&mut self, file: &str, text: &str) -> Result<(), CatalogueError> {
        let schema = |line: usize, message: String| CatalogueError::Schema {
            file: file.to_string(),
            line: line.max(1),
            message,
        };
        let document: Document = if file.to_lowercase().ends_with(".json") {
            serde_json::from_str(text).map_err(|e| schema(e.line(), e.to_string()))?
        } else if text.trim().is_empty() {
            Document::default()
        } else {
            yaml::parse(text).map_err(|e| schema(e.line, e.message))?
        };
        let mut merged = self.clone();
        merged
            .merge(document)
            .map_err(|(name, message)| schema(line_of(text, &name), message))?;
        *self = merged;
        Ok(())
    }

    /// Merges a document. An error names the word that caused it, so that its line can be found.
    fn merge(&mut self, document: Document) -> Result<(), (String, String)> {
        for (arch, names) in document.architectures {
            extend(self.architectures.entry(arch).or_default(), names);
        }
        for (folder, names) in document.folders {
            let key = self
                .folders
                .keys()
                .find(|k| k.eq_ignore_ascii_case(&folder))
                .cloned()
                .unwrap_or(folder);
            extend(self.folders.entry(key).or_default(), names);
        }
        // New entries precede the old ones, so that they take precedence; known ones keep their
        // place.
        let mut new = Vec::new();
        for windows in document.windows {
            if windows.folders.is_empty() {
                let message = format!("windows {:?} names no directories", windows.id);
                return Err((windows.id, message));
            }
            match self.windows.iter_mut().find(|w| w.id == windows.id) {
                Some(old) => *old = windows,
                None => new.push(windows),
            }
        }
        self.windows.splice(0..0, new);
        for entry in document.drivers {
            self.merge_driver(entry)?;
        }
        for vendor in document.vendors {
            for (name, ids) in vendor.pnp_ids {
                match self.driver_mut(&name) {
                    Some(driver) => extend(&mut driver.pnp_ids, ids),
                    None => {
                        let message =
                            format!("vendor {:?} names the unknown driver {name:?}", vendor.name);
                        return Err((name, message));
                    }
                }
            }
        }
        extend(&mut self.skip, document.skip);
        self.drivers.sort_by_key(|d| d.role);
        self.check_names()
    }

    fn check_names(&self) -> Result<(), (String, String)> {
        let known = |name: &String| self.driver(name).is_some();
        let unless = self.drivers.iter().filter_map(|d| d.unless.as_ref());
        let without = self.windows.iter().flat_map(|w| &w.without);
        match unless.chain(without).find(|name| !known(name)) {
            Some(name) => Err((name.clone(), format!("there is no driver {name:?}"))),
            None => Ok(()),
        }
    }

    fn merge_driver(&mut self, entry: DriverEntry) -> Result<(), (String, String)> {
        let Some(driver) = self.driver_mut(&entry.name) else {
            let missing = |what: &str| {
                let message = format!("the new driver {:?} has no {what}", entry.name);
                (entry.name.clone(), message)
            };
            self.drivers.push(DriverSpec {
                role: entry.role.ok_or_else(|| missing("role"))?,
                device: entry.device,
                services: entry.services.unwrap_or_default(),
                folders: entry.folders.unwrap_or_else(|| vec![entry.name.clone()]),
                inf: entry
                    .inf
                    .unwrap_or_else(|| vec![format!("{}.inf", entry.name)]),
                required: entry.required.unwrap_or(false),
                start: entry.start,
                unless: entry.unless,
                pnp_ids: entry.pnp_ids,
                name: entry.name,
            });
            return Ok(());
        };
        if let Some(role) = entry.role {
            driver.role = role;
        }
        driver.device = entry.device.or(driver.device);
        if let Some(services) = entry.services {
            driver.services = services;
        }
        if let Some(folders) = entry.folders {
            driver.folders = folders;
        }
        if let Some(inf) = entry.inf {
            driver.inf = inf;
        }
        if let Some(required) = entry.required {
            driver.required = required;
        }
        driver.start = entry.start.or(driver.start);
        driver.unless = entry.unless.or(driver.unless.take());
        extend(&mut driver.pnp_ids, entry.pnp_ids);
        Ok(())
    }

    pub fn driver(&self, name: &str) -> Option<&DriverSpec> {
        self.drivers
            .iter()
            .find(|d| d.name.eq_ignore_ascii_case(name))
    }

    /// The present name of the service that drives a device.
    pub fn service_of(&self, device: VirtioDevice) -> Option<&str> {
        let driver = self.drivers.iter().find(|d| d.device == Some(device))?;
        driver.services.first().map(String::as_str)
    }

    fn driver_mut(&mut self, name: &str) -> Option<&mut DriverSpec> {
        self.drivers
            .iter_mut()
            .find(|d| d.name.eq_ignore_ascii_case(name))
    }

    /// The first entry that matches a Windows.
    pub fn windows_for(&self, target: &WindowsTarget) -> Option<&Windows> {
        self.windows.iter().find(|w| w.fits(target))
    }

    /// The OS directories for a Windows, the best first, under their first names.
    pub fn driver_folders(&self, target: &WindowsTarget) -> Vec<String> {
        self.windows_for(target)
            .map(|w| w.folders.clone())
            .unwrap_or_default()
    }

    /// An OS directory's first name and all others, lower case.
    pub fn folder_names(&self, folder: &str) -> Vec<String> {
        let aliases = self
            .folders
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(folder))
            .map(|(_, aliases)| aliases.as_slice())
            .unwrap_or_default();
        std::iter::once(folder)
            .chain(aliases.iter().map(String::as_str))
            .map(str::to_lowercase)
            .collect()
    }

    pub fn skips(&self, name: &str) -> bool {
        let name = name.to_lowercase();
        self.skip.iter().any(|pattern| {
            let pattern = pattern.to_lowercase();
            match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
                (Some(end), _) => name.ends_with(end),
                (None, Some(start)) => name.starts_with(start),
                (None, None) => name == pattern,
            }
        })
    }
}

fn extend<T: PartialEq>(list: &mut Vec<T>, more: Vec<T>) {
    for item in more {
        if !list.contains(&item) {
            list.push(item);
        }
    }
}

/// The first line with a word, as a guess for the position of an error.
fn line_of(text: &str, word: &str) -> usize {
    text.lines()
        .position(|line| line.contains(word))
        .map_or(1, |i| i + 1)
}

#[cfg(test)]
#[path = "catalogue_tests.rs"]
mod tests;
