//! Identifies Windows by numbers, not by names: `ProductName` is still "Windows 10" on Windows 11,
//! and marketing names of servers depend on the language.

use crate::boot_path::ImageState;
use crate::disk::layout::{DiskLayout, Scheme};
use crate::drivers::{Arch, WindowsTarget};
use crate::guest::VolumeId;
use crate::registry::HiveView;
use crate::registry::error::Result;
use crate::text::guest_text;
use crate::types::ControlSet;

/// The control set that the boot loader uses.
pub fn control_set(system: &HiveView<'_>) -> Result<Option<ControlSet>> {
    let Some(select) = system.key("Select")? else {
        return Ok(None);
    };
    for name in ["Default", "Current"] {
        if let Some(number) = select.dword(name)? {
            let set = ControlSet::new(number);
            if system.key(&set)?.is_some() {
                return Ok(Some(set));
            }
        }
    }
    Ok(None)
}

/// The boot loader's control set and its number, if it has no services.
pub fn lost_default(system: &HiveView<'_>) -> Result<Option<(ControlSet, u32)>> {
    let Some(select) = system.key("Select")? else {
        return Ok(None);
    };
    let Some(number) = select.dword("Default")? else {
        return Ok(None);
    };
    let set = ControlSet::new(number);
    let there = system.key(&set.key("Services"))?.is_some();
    Ok((!there).then_some((set, number)))
}

/// Every control set of the hive.
pub fn control_sets(system: &HiveView<'_>) -> Result<Vec<ControlSet>> {
    let mut sets = Vec::new();
    for key in system.root()?.keys()? {
        sets.extend(ControlSet::parse(&key.name()?));
    }
    Ok(sets)
}

/// The `Windows NT\CurrentVersion` key and its neighbours.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Version {
    pub product_name: Option<String>,
    pub display_version: Option<String>,
    pub major: u32,
    pub minor: u32,
    pub build: u32,
    pub revision: Option<u32>,
    pub edition: Option<String>,
    pub installation_type: Option<String>,
    pub server: bool,
}

/// The first build of Windows 10.
const WINDOWS_10: u32 = 10_240;
/// The first build of Windows 11.
const WINDOWS_11: u32 = 22_000;

pub fn version(
    software: &HiveView<'_>,
    system: &HiveView<'_>,
    control_set: &ControlSet,
) -> Result<Option<Version>> {
    let Some(key) = software.key("Microsoft\\Windows NT\\CurrentVersion")? else {
        return Ok(None);
    };
    let text = |name: &str| -> Result<Option<String>> {
        Ok(key.string(name)?.as_deref().and_then(guest_text))
    };
    let number =
        |name: &str| -> Result<Option<u32>> { Ok(text(name)?.and_then(|t| t.parse().ok())) };
    let Some(build) = number("CurrentBuildNumber")?.or(number("CurrentBuild")?) else {
        return Ok(None);
    };
    let (major, minor) = match key.dword("CurrentMajorVersionNumber")? {
        Some(major) => (
            major,
            key.dword("CurrentMinorVersionNumber")?.unwrap_or_default(),
        ),
        // `CurrentVersion` stays at 6.3 in all later versions.
        None if build >= WINDOWS_10 => (10, 0),
        None => match text("CurrentVersion")?.as_deref().and_then(parse_version) {
            Some(version) => version,
            None => return Ok(None),
        },
    };
    let product_type = system
        .key(&control_set.key("Control\\ProductOptions"))?
        .map(|k| k.string("ProductType"))
        .transpose()?
        .flatten();
    let installation_type = text("InstallationType")?;
    let server = match &product_type {
        Some(t) => !t.eq_ignore_ascii_case("WinNT"),
        None => installation_type
            .as_deref()
            .is_some_and(|t| t.starts_with("Server")),
    };
    let mut product_name = text("ProductName")?;
    if build >= WINDOWS_11 && !server {
        product_name = product_name.map(|n| n.replacen("Windows 10", "Windows 11", 1));
    }
    let service_pack = text("CSDVersion")?.map(|t| t.replacen("Service Pack ", "SP", 1));
    Ok(Some(Version {
        product_name,
        display_version: text("DisplayVersion")?
            .or(text("ReleaseId")?)
            .or(service_pack),
        major,
        minor,
        build,
        revision: key.dword("UBR")?,
        edition: text("EditionID")?,
        installation_type,
        server,
    }))
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The architecture, from the kernel's file, or from the environment if the file is compressed.
pub fn arch(
    kernel: ImageState,
    system: &HiveView<'_>,
    control_set: &ControlSet,
) -> Result<Option<Arch>> {
    if let ImageState::Present {
        machine: Some(machine),
    } = kernel
    {
        return Ok(Arch::of_pe(machine));
    }
    let key = control_set.key("Control\\Session Manager\\Environment");
    let name = match system.key(&key)? {
        Some(key) => key.string("PROCESSOR_ARCHITECTURE")?,
        None => None,
    };
    Ok(
        match name.unwrap_or_default().to_ascii_lowercase().as_str() {
            "x86" => Some(Arch::X86),
            "amd64" => Some(Arch::Amd64),
            "arm64" => Some(Arch::Arm64),
            _ => None,
        },
    )
}

impl Version {
    pub fn target(&self, arch: Arch) -> WindowsTarget {
        WindowsTarget {
            major: self.major,
            minor: self.minor,
            build: self.build,
            arch,
            server: self.server,
        }
    }
}

/// The DNS name, which is not truncated to 15 characters, or the NetBIOS name.
pub fn hostname(system: &HiveView<'_>, control_set: &ControlSet) -> Result<Option<String>> {
    let places = [
        ("Services\\Tcpip\\Parameters", "NV Hostname"),
        ("Services\\Tcpip\\Parameters", "Hostname"),
        ("Control\\ComputerName\\ComputerName", "ComputerName"),
    ];
    for (path, name) in places {
        if let Some(key) = system.key(&control_set.key(path))?
            && let Some(found) = key.string(name)?.as_deref().and_then(guest_text)
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Whether the hardware clock runs in UTC (set manually on PCs that share it with Linux).
pub fn clock_is_utc(system: &HiveView<'_>, control_set: &ControlSet) -> Result<bool> {
    let key = control_set.key("Control\\TimeZoneInformation");
    let Some(key) = system.key(&key)? else {
        return Ok(false);
    };
    // A QWORD on some systems, following old advice; Windows accepts both.
    Ok(key
        .value("RealTimeIsUniversal")?
        .is_some_and(|v| v.data.first().is_some_and(|b| *b != 0)))
}

/// The policy of Windows for disks that are new to it.
pub fn san_policy(system: &HiveView<'_>, control_set: &ControlSet) -> Result<Option<u32>> {
    let key = control_set.key("Services\\partmgr\\Parameters");
    match system.key(&key)? {
        Some(key) => key.dword("SanPolicy"),
        None => Ok(None),
    }
}

/// The letter that the running Windows gives a partition, from `MountedDevices`: MBR disks by
/// signature and start, GPT partitions as `DMIO:ID:` and their GUID.
pub fn drive_letter(
    system: &HiveView<'_>,
    layout: &DiskLayout,
    volume: VolumeId,
) -> Result<Option<char>> {
    let Some(partition) = layout
        .partitions
        .iter()
        .find(|p| p.index == volume.partition)
    else {
        return Ok(None);
    };
    let Some(mounted) = system.key("MountedDevices")? else {
        return Ok(None);
    };
    let wanted = match layout.scheme {
        Scheme::Gpt => {
            let guid = partition.guid.as_deref().map(uuid::Uuid::try_parse);
            let Some(Ok(guid)) = guid else {
                return Ok(None);
            };
            [b"DMIO:ID:", &guid.to_bytes_le()[..]].concat()
        }
        Scheme::Mbr => {
            let signature = layout
                .disk_id
                .as_deref()
                .and_then(|id| id.strip_prefix("0x"));
            let Some(signature) = signature.and_then(|s| u32::from_str_radix(s, 16).ok()) else {
                return Ok(None);
            };
            [
                &signature.to_le_bytes()[..],
                &partition.start_bytes.to_le_bytes()[..],
            ]
            .concat()
        }
        Scheme::None => return Ok(None),
    };
    for letter in 'A'..='Z' {
        if let Some(value) = mounted.value(&format!("\\DosDevices\\{letter}:"))?
            && value.data == wanted
        {
            return Ok(Some(letter));
        }
    }
    Ok(None)
}
