//! Determines what an INF would install on one particular Windows.
//!
//! [`text`] reads the file, and [`decoration`] selects the sections for the target. This module
//! gathers what offline installation needs: models, service, device settings, files, event log.
//! `Include`/`Needs`, co-installers, `DelReg` and the KMDF sections are left to Windows.
//!
//! Windows records the name of the install section with its decoration (`vmci.install.x64.NT`). So
//! the actual name is kept and not the one of the models line.

pub mod decoration;
pub mod text;

use std::collections::BTreeSet;

use serde::Serialize;

use super::target::WindowsTarget;
use crate::registry::RegData;
use decoration::{Kind, parse_number, rank};
pub use text::InfError;
use text::{Field, InfEntry, InfText, Section};

/// A text of the INF: the token as written (`%vendor%`) and its value.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Text {
    pub raw: String,
    pub value: String,
}

impl From<&Field> for Text {
    fn from(field: &Field) -> Self {
        Self {
            raw: field.raw.clone(),
            value: field.text.clone(),
        }
    }
}

impl Text {
    /// The name of the string if the text is exactly one `%name%`.
    pub fn token(&self) -> Option<&str> {
        let name = self.raw.strip_prefix('%')?.strip_suffix('%')?;
        (!name.is_empty() && !name.contains('%')).then_some(name)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Model {
    pub description: Text,
    pub manufacturer: Text,
    /// The install section for it on the target, with its decoration, as written.
    pub install_section: String,
    /// The hardware id first, then the compatible ids.
    pub hardware_ids: Vec<String>,
}

/// One line of an AddReg section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AddReg {
    /// `HKR`, `HKLM`, ... in upper case.
    pub root: String,
    pub subkey: String,
    pub name: String,
    /// `None`: only the key is created.
    pub data: Option<RegData>,
}

/// The target of a directory id of the INF.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InfPath {
    /// 10 `\Windows`, 11 `System32`, 12 `System32\drivers`, 13 the package's driver store directory.
    pub dirid: u32,
    /// The path below that directory.
    pub path: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EventLog {
    pub event_message_file: Option<String>,
    pub types_supported: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServiceInstall {
    pub name: String,
    pub flags: u32,
    pub display_name: Option<Text>,
    pub service_type: u32,
    pub start_type: u32,
    pub error_control: u32,
    pub binary: InfPath,
    pub load_order_group: Option<String>,
    pub tag: Option<u32>,
    /// Relative to the service key.
    pub add_reg: Vec<AddReg>,
    pub event_log: Option<EventLog>,
}

/// `AddService` flag: this is the service of the device itself.
const SPSVCINST_ASSOCSERVICE: u32 = 0x2;

impl ServiceInstall {
    pub fn is_device_service(&self) -> bool {
        self.flags & SPSVCINST_ASSOCSERVICE != 0
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CopyFile {
    /// The target path, including the file name.
    pub to: InfPath,
    /// The name in the driver source.
    pub source: String,
}

/// An install section for the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Install {
    /// The name with decoration, as written.
    pub name: String,
    pub services: Vec<ServiceInstall>,
    /// Relative to the device's hardware key.
    pub hw_add_reg: Vec<AddReg>,
    /// Relative to the device's software ("driver") key, and absolute ones.
    pub add_reg: Vec<AddReg>,
    pub copy_files: Vec<CopyFile>,
    /// INFs named by `Include`, which are not followed.
    pub includes: Vec<String>,
    /// The score; 0xff by default. It is part of the rank that Windows stores per device id.
    pub feature_score: u8,
}

impl Install {
    pub fn device_service(&self) -> Option<&ServiceInstall> {
        self.services.iter().find(|s| s.is_device_service())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct DriverDate {
    pub year: u16,
    pub month: u8,
    pub day: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DriverVer {
    pub date: DriverDate,
    pub version: [u16; 4],
}

impl DriverVer {
    /// Parses `mm/dd/yyyy[,w.x.y.z]`, also with dashes.
    fn parse(date: &str, version: &str) -> Option<Self> {
        let mut parts = date.split(['/', '-']).map(str::trim);
        let (month, day, year) = (
            parts.next()?.parse().ok()?,
            parts.next()?.parse().ok()?,
            parts.next()?.parse().ok()?,
        );
        let sane = parts.next().is_none()
            && (1..=12).contains(&month)
            && (1..=31).contains(&day)
            && (1601..=9999).contains(&year);
        let mut numbers = [0u16; 4];
        if !version.is_empty() {
            let mut given = version.split('.').map(str::trim);
            for (slot, text) in numbers.iter_mut().zip(&mut given) {
                *slot = text.parse().ok()?;
            }
            if given.next().is_some() {
                return None;
            }
        }
        sane.then_some(Self {
            date: DriverDate { year, month, day },
            version: numbers,
        })
    }

    /// Midnight UTC of the date in 100 ns since 1601, the format of Windows.
    pub fn filetime(&self) -> u64 {
        let DriverDate { year, month, day } = self.date;
        // Days from civil, Howard Hinnant; the epoch is moved from 1970 to 1601 at the end.
        let (y, m, d) = (i64::from(year), i64::from(month), i64::from(day));
        let y = if m <= 2 { y - 1 } else { y };
        let era = y.div_euclid(400);
        let year_of_era = y.rem_euclid(400);
        let day_of_year = (153 * (m + if m > 2 { -3 } else { 9 }) + 2) / 5 + d - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468 + 134_774;
        u64::try_from(days).unwrap_or(0) * 86_400 * 10_000_000
    }

    pub fn version_text(&self) -> String {
        let [a, b, c, d] = self.version;
        format!("{a}.{b}.{c}.{d}")
    }
}

/// An INF evaluated for one particular Windows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DriverInf {
    pub provider: Text,
    pub class: String,
    /// With braces, as written.
    pub class_guid: String,
    pub driver_ver: DriverVer,
    pub catalog: Option<String>,
    pub models: Vec<Model>,
    pub installs: Vec<Install>,
    /// Every file of `SourceDisksFiles` for this architecture, sorted.
    pub source_files: Vec<String>,
}

impl DriverInf {
    pub fn parse(bytes: &[u8], target: &WindowsTarget) -> Result<Self, InfError> {
        Reader {
            inf: InfText::parse(bytes)?,
            target,
        }
        .read()
    }

    pub fn install(&self, section: &str) -> Option<&Install> {
        self.installs
            .iter()
            .find(|i| i.name.eq_ignore_ascii_case(section))
    }

    /// The service of the first model's device.
    pub fn device_service(&self) -> Option<&ServiceInstall> {
        self.models
            .iter()
            .find_map(|m| self.install(&m.install_section)?.device_service())
    }

    pub fn services(&self) -> impl Iterator<Item = &ServiceInstall> {
        self.installs.iter().flat_map(|i| &i.services)
    }

    /// The names of the strings that descriptors refer to, with their values.
    pub fn strings(&self) -> Vec<(String, String)> {
        let mut strings = Vec::new();
        for model in &self.models {
            for text in [&model.manufacturer, &model.description] {
                if let Some(token) = text.token() {
                    strings.push((token.to_lowercase(), text.value.clone()));
                }
            }
        }
        strings.sort();
        strings.dedup();
        strings
    }
}

struct Reader<'a> {
    inf: InfText,
    target: &'a WindowsTarget,
}

impl Reader<'_> {
    fn read(&self) -> Result<DriverInf, InfError> {
        let version = self
            .inf
            .section("Version")
            .ok_or(InfError::MissingSection("Version"))?;
        let bad = |key: &str, reason: &str| InfError::Bad {
            section: "Version".to_string(),
            key: key.to_string(),
            reason: reason.to_string(),
        };
        let driver_ver = version
            .entry("DriverVer")
            .ok_or_else(|| bad("DriverVer", "it is missing"))?;
        let class_guid = version.get("ClassGuid").unwrap_or_default();
        if uuid::Uuid::try_parse(class_guid.trim_matches(['{', '}'])).is_err() {
            return Err(bad("ClassGuid", class_guid));
        }
        let (models, installs) = self.models()?;
        Ok(DriverInf {
            provider: version
                .entry("Provider")
                .and_then(|e| e.values.first())
                .map(Text::from)
                .unwrap_or_default(),
            class: version.get("Class").unwrap_or_default().to_string(),
            class_guid: class_guid.to_string(),
            driver_ver: DriverVer::parse(driver_ver.value(0), driver_ver.value(1))
                .ok_or_else(|| bad("DriverVer", driver_ver.value(0)))?,
            catalog: self.catalog(version),
            models,
            installs,
            source_files: self.source_files(),
        })
    }

    fn catalog(&self, version: &Section) -> Option<String> {
        let arch = format!("CatalogFile.nt{}", self.target.arch.inf_name());
        [arch.as_str(), "CatalogFile.nt", "CatalogFile"]
            .iter()
            .find_map(|key| version.get(key))
            .filter(|name| !name.is_empty())
            .map(str::to_string)
    }

    fn models(&self) -> Result<(Vec<Model>, Vec<Install>), InfError> {
        let manufacturers = self
            .inf
            .section("Manufacturer")
            .ok_or(InfError::MissingSection("Manufacturer"))?;
        let mut models = Vec::new();
        let mut installs: Vec<Install> = Vec::new();
        for entry in &manufacturers.entries {
            let manufacturer = entry
                .key
                .as_ref()
                .or(entry.values.first())
                .map(Text::from)
                .unwrap_or_default();
            let Some(section) = self.models_section(entry) else {
                continue;
            };
            for line in &section.entries {
                let Some(install) = self.install_section(line.value(0)) else {
                    continue;
                };
                let hardware_ids: Vec<String> = line
                    .values
                    .iter()
                    .skip(1)
                    .map(|f| f.text.clone())
                    .filter(|id| !id.is_empty())
                    .collect();
                if hardware_ids.is_empty() {
                    continue;
                }
                models.push(Model {
                    description: line.key.as_ref().map(Text::from).unwrap_or_default(),
                    manufacturer: manufacturer.clone(),
                    install_section: install.name.clone(),
                    hardware_ids,
                });
                if !installs.iter().any(|i| i.name == install.name) {
                    installs.push(self.install(line.value(0), install)?);
                }
            }
        }
        if models.is_empty() {
            return Err(InfError::NoModels {
                target: self.target.to_string(),
            });
        }
        Ok((models, installs))
    }

    /// The best models section of one manufacturer line for the target.
    fn models_section(&self, entry: &InfEntry) -> Option<&Section> {
        let base = entry.value(0);
        let decorations = entry.values.get(1..).unwrap_or_default();
        let best = decorations
            .iter()
            .filter_map(|d| rank(&d.text, self.target, Kind::Models).map(|r| (r, &d.text)))
            .max_by_key(|(r, _)| *r);
        match best {
            Some((_, decoration)) => self.inf.section(&format!("{base}.{decoration}")),
            // Without decorations a models section is for x86.
            None if rank("NT", self.target, Kind::Models).is_some() => self.inf.section(base),
            None => None,
        }
    }

    /// The install section: `name.NTarch...`, `name.NT` or `name`, whichever matches best and
    /// exists.
    fn install_section(&self, name: &str) -> Option<&Section> {
        let prefix = format!("{}.nt", name.to_ascii_lowercase());
        self.inf
            .sections()
            .iter()
            .filter_map(|section| {
                let lower = section.name.to_ascii_lowercase();
                let decoration = lower
                    .starts_with(&prefix)
                    .then(|| section.name.get(name.len() + 1..))??;
                // `name.NT.Services` is no install section.
                let numbers_only = decoration
                    .split('.')
                    .skip(1)
                    .all(|p| p.is_empty() || parse_number(p).is_some());
                let rank = rank(decoration, self.target, Kind::Install)?;
                numbers_only.then_some((rank, section))
            })
            .max_by_key(|(rank, _)| (rank.4, *rank))
            .map(|(_, section)| section)
            .or_else(|| self.inf.section(name))
    }

    /// The section with that suffix: of the decorated name, otherwise of the name in the models
    /// line.
    fn suffixed(&self, models_name: &str, install: &Section, suffix: &str) -> Option<&Section> {
        self.inf
            .section(&format!("{}.{suffix}", install.name))
            .or_else(|| self.inf.section(&format!("{models_name}.{suffix}")))
    }

    fn install(&self, models_name: &str, section: &Section) -> Result<Install, InfError> {
        let mut services = Vec::new();
        if let Some(list) = self.suffixed(models_name, section, "Services") {
            for entry in list.entries.iter().filter(|e| e.is("AddService")) {
                // `AddService = ,2` means that a device needs no driver.
                if !entry.value(0).is_empty() {
                    services.push(self.service(entry)?);
                }
            }
        }
        let hw = self.suffixed(models_name, section, "HW");
        Ok(Install {
            name: section.name.clone(),
            services,
            hw_add_reg: hw.map(|s| self.add_reg(s)).transpose()?.unwrap_or_default(),
            add_reg: self.add_reg(section)?,
            copy_files: self.copy_files(section),
            includes: section.all("Include").map(str::to_string).collect(),
            feature_score: section
                .get("FeatureScore")
                .and_then(|s| u8::from_str_radix(s.trim_start_matches("0x"), 16).ok())
                .unwrap_or(0xff),
        })
    }

    fn service(&self, entry: &InfEntry) -> Result<ServiceInstall, InfError> {
        let name = entry.value(0).to_string();
        let section_name = entry.value(2);
        let bad = |key: &str, reason: String| InfError::Bad {
            section: section_name.to_string(),
            key: key.to_string(),
            reason,
        };
        if name.contains(['\\', '/']) {
            return Err(bad("AddService", format!("{name:?} is not a service name")));
        }
        let section = self
            .inf
            .section(section_name)
            .ok_or_else(|| bad("AddService", "the service section is missing".to_string()))?;
        let number = |key: &str| {
            let text = section.get(key).unwrap_or_default();
            parse_number(text).ok_or_else(|| bad(key, format!("{text:?} is not a number")))
        };
        let binary = section.get("ServiceBinary").unwrap_or_default();
        let event_log = self
            .inf
            .section(entry.value(3))
            .map(|s| self.event_log(s))
            .transpose()?;
        Ok(ServiceInstall {
            flags: parse_number(entry.value(1)).unwrap_or(0),
            display_name: section
                .entry("DisplayName")
                .and_then(|e| e.values.first())
                .map(Text::from),
            service_type: number("ServiceType")?,
            start_type: number("StartType")?,
            error_control: number("ErrorControl")?,
            binary: parse_path(binary)
                .ok_or_else(|| bad("ServiceBinary", format!("{binary:?} is not a path")))?,
            load_order_group: section
                .get("LoadOrderGroup")
                .filter(|g| !g.is_empty())
                .map(str::to_string),
            tag: section.get("Tag").and_then(parse_number),
            add_reg: self.add_reg(section)?,
            event_log,
            name,
        })
    }

    fn event_log(&self, section: &Section) -> Result<EventLog, InfError> {
        let lines = self.add_reg(section)?;
        let find = |name: &str| {
            lines
                .iter()
                .find(|l| l.name.eq_ignore_ascii_case(name))
                .and_then(|l| l.data.as_ref())
        };
        Ok(EventLog {
            event_message_file: match find("EventMessageFile") {
                Some(RegData::Sz(text) | RegData::ExpandSz(text)) => Some(text.clone()),
                _ => None,
            },
            types_supported: match find("TypesSupported") {
                Some(RegData::Dword(n)) => Some(*n),
                _ => None,
            },
        })
    }

    /// The lines of every section that `AddReg` of this section names.
    fn add_reg(&self, section: &Section) -> Result<Vec<AddReg>, InfError> {
        let mut lines = Vec::new();
        for name in section.all("AddReg") {
            let Some(list) = self.inf.section(name) else {
                continue;
            };
            for entry in &list.entries {
                lines.extend(parse_add_reg(&list.name, entry)?);
            }
        }
        Ok(lines)
    }

    fn copy_files(&self, section: &Section) -> Vec<CopyFile> {
        let mut files = Vec::new();
        for name in section.all("CopyFiles") {
            if let Some(file) = name.strip_prefix('@') {
                files.extend(self.copy_file("DefaultDestDir", file, file));
                continue;
            }
            let Some(list) = self.inf.section(name) else {
                continue;
            };
            for entry in &list.entries {
                let to = entry.value(0);
                let source = match entry.value(1) {
                    "" => to,
                    source => source,
                };
                files.extend(self.copy_file(name, to, source));
            }
        }
        files
    }

    fn copy_file(&self, list: &str, to: &str, source: &str) -> Option<CopyFile> {
        if !is_file_name(to) || !is_file_name(source) {
            return None;
        }
        let dirs = self.inf.section("DestinationDirs")?;
        let dir = dirs.entry(list).or_else(|| dirs.entry("DefaultDestDir"))?;
        let path = match dir.value(1).trim_matches('\\') {
            "" => to.to_string(),
            sub => format!("{sub}\\{to}"),
        };
        Some(CopyFile {
            to: InfPath {
                dirid: parse_number(dir.value(0))?,
                path,
            },
            source: source.to_string(),
        })
    }

    fn source_files(&self) -> Vec<String> {
        let arch = format!("SourceDisksFiles.{}", self.target.arch.inf_name());
        let files: BTreeSet<String> = ["SourceDisksFiles", arch.as_str()]
            .iter()
            .filter_map(|name| self.inf.section(name))
            .flat_map(|s| &s.entries)
            .filter_map(|e| e.key.as_ref())
            .map(|k| k.text.clone())
            .filter(|name| is_file_name(name))
            .collect();
        files.into_iter().collect()
    }
}

fn is_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['\\', '/', ':'])
}

/// Parses `%12%\name.sys`.
fn parse_path(text: &str) -> Option<InfPath> {
    let (dirid, path) = text.strip_prefix('%')?.split_once('%')?;
    let path = path.trim_start_matches('\\');
    let clean = !path.is_empty() && path.split('\\').all(is_file_name);
    clean.then_some(InfPath {
        dirid: dirid.parse().ok()?,
        path: path.to_string(),
    })
}

const FLG_ADDREG_BINVALUETYPE: u32 = 0x0000_0001;
const FLG_ADDREG_DELVAL: u32 = 0x0000_0004;
const FLG_ADDREG_KEYONLY: u32 = 0x0000_0010;
const FLG_ADDREG_KEYONLY_COMMON: u32 = 0x0000_2000;
const FLG_ADDREG_TYPE_MASK: u32 = 0xffff_0001;
const TYPE_SZ: u32 = 0;
const TYPE_MULTI_SZ: u32 = 0x0001_0000;
const TYPE_EXPAND_SZ: u32 = 0x0002_0000;
const TYPE_DWORD: u32 = 0x0001_0001;
const TYPE_NONE: u32 = 0x0002_0001;

/// Parses `root, subkey, name, flags, value...`; `None` for deletions and types that are not
/// written.
fn parse_add_reg(section: &str, entry: &InfEntry) -> Result<Option<AddReg>, InfError> {
    let bad = |reason: String| InfError::Bad {
        section: section.to_string(),
        key: format!("line {}", entry.line),
        reason,
    };
    // A registry line has no `=` before its first comma: this is another kind of line.
    if entry.key.is_some() {
        return Ok(None);
    }
    let root = entry.value(0).to_ascii_uppercase();
    let flags = match entry.value(3) {
        "" => 0,
        text => parse_number(text).ok_or_else(|| bad(format!("{text:?} are no flags")))?,
    };
    let mut line = AddReg {
        root,
        subkey: entry.value(1).trim_matches('\\').to_string(),
        name: entry.value(2).to_string(),
        data: None,
    };
    if flags & FLG_ADDREG_DELVAL != 0 {
        return Ok(None);
    }
    if flags & (FLG_ADDREG_KEYONLY | FLG_ADDREG_KEYONLY_COMMON) != 0 {
        return Ok(Some(line));
    }
    let values: Vec<&str> = entry
        .values
        .iter()
        .skip(4)
        .map(|f| f.text.as_str())
        .collect();
    let bytes = || -> Result<Vec<u8>, InfError> {
        values
            .iter()
            .filter(|v| !v.is_empty())
            .map(|v| {
                u8::from_str_radix(v.trim_start_matches("0x"), 16)
                    .map_err(|_| bad(format!("{v:?} is not a byte")))
            })
            .collect()
    };
    let first = || values.first().copied().unwrap_or_default();
    line.data = Some(match flags & FLG_ADDREG_TYPE_MASK {
        // `HKR,key` alone creates a key.
        TYPE_SZ if line.name.is_empty() && entry.values.len() < 5 => return Ok(Some(line)),
        TYPE_SZ => RegData::Sz(first().to_string()),
        TYPE_EXPAND_SZ => RegData::ExpandSz(first().to_string()),
        TYPE_MULTI_SZ => RegData::MultiSz(
            values
                .iter()
                .filter(|v| !v.is_empty())
                .map(|v| v.to_string())
                .collect(),
        ),
        TYPE_DWORD if values.len() == 4 => {
            let bytes = bytes()?;
            let array = <[u8; 4]>::try_from(bytes.as_slice())
                .map_err(|_| bad("four bytes are needed".to_string()))?;
            RegData::Dword(u32::from_le_bytes(array))
        }
        TYPE_DWORD => RegData::Dword(
            parse_number(first()).ok_or_else(|| bad(format!("{:?} is not a number", first())))?,
        ),
        TYPE_NONE => RegData::None(bytes()?),
        FLG_ADDREG_BINVALUETYPE => RegData::Binary(bytes()?),
        _ => return Ok(None),
    });
    Ok(Some(line))
}

#[cfg(test)]
mod tests;
