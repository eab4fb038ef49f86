//! Types shared by several directories: one for each thing, with its names in different formats.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A processor architecture, with its names in different formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Arch {
    #[serde(rename = "x86")]
    X86,
    #[serde(rename = "x86_64")]
    Amd64,
    #[serde(rename = "arm64")]
    Arm64,
}

impl Arch {
    pub const ALL: [Arch; 3] = [Arch::X86, Arch::Amd64, Arch::Arm64];

    /// The name in INF decorations (`NTamd64`) and driver store directory names, lower case.
    pub fn inf_name(self) -> &'static str {
        match self {
            Arch::X86 => "x86",
            Arch::Amd64 => "amd64",
            Arch::Arm64 => "arm64",
        }
    }

    /// The name in JSON documents.
    pub fn name(self) -> &'static str {
        match self {
            Arch::X86 => "x86",
            Arch::Amd64 => "x86_64",
            Arch::Arm64 => "arm64",
        }
    }

    /// `PROCESSOR_ARCHITECTURE_*`, as in the `Version` value of a driver package.
    pub fn processor(self) -> u16 {
        match self {
            Arch::X86 => 0,
            Arch::Amd64 => 9,
            Arch::Arm64 => 12,
        }
    }

    /// The architecture of PE images with that `IMAGE_FILE_MACHINE_*`.
    pub fn of_pe(machine: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.pe_machine() == machine)
    }

    /// `IMAGE_FILE_MACHINE_*` of the architecture's PE images.
    pub fn pe_machine(self) -> u16 {
        match self {
            Arch::X86 => 0x014c,
            Arch::Amd64 => 0x8664,
            Arch::Arm64 => 0xaa64,
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The firmware that starts a system: of a source, of a disk, of a Linux root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    Uefi,
    Bios,
}

/// A disk controller that QEMU can emulate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBus {
    Sata,
    Ide,
    VirtioBlk,
    VirtioScsi,
}

impl DiskBus {
    pub const ALL: [DiskBus; 4] = [
        DiskBus::Sata,
        DiskBus::Ide,
        DiskBus::VirtioBlk,
        DiskBus::VirtioScsi,
    ];

    pub fn name(self) -> &'static str {
        match self {
            DiskBus::Sata => "sata",
            DiskBus::Ide => "ide",
            DiskBus::VirtioBlk => "virtio-blk",
            DiskBus::VirtioScsi => "virtio-scsi",
        }
    }

    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.name() == name)
    }

    /// `bus` of a disk in libvirt; the names of KubeVirt and Proxmox VE too.
    pub fn libvirt(self) -> &'static str {
        match self {
            DiskBus::Sata => "sata",
            DiskBus::Ide => "ide",
            DiskBus::VirtioBlk => "virtio",
            DiskBus::VirtioScsi => "scsi",
        }
    }

    /// The PCI functions as which it can appear; for virtio the modern one, then the transitional
    /// one.
    pub fn devices(self) -> Vec<PciId> {
        let pci = |vendor, device, subsystem, revision, class| PciId {
            vendor,
            device,
            subsystem,
            revision,
            class,
        };
        match self {
            DiskBus::Sata => vec![pci(0x8086, 0x2922, 0x1100_1af4, 2, 0x01_0601)],
            DiskBus::Ide => vec![pci(0x8086, 0x7010, 0x1100_1af4, 0, 0x01_0180)],
            DiskBus::VirtioBlk => vec![
                pci(0x1af4, 0x1042, 0x1100_1af4, 1, 0x01_0000),
                pci(0x1af4, 0x1001, 0x0002_1af4, 0, 0x01_0000),
            ],
            DiskBus::VirtioScsi => vec![
                pci(0x1af4, 0x1048, 0x1100_1af4, 1, 0x01_0000),
                pci(0x1af4, 0x1004, 0x0008_1af4, 0, 0x01_0000),
            ],
        }
    }
}

/// A service start type, as a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceStart {
    Boot = 0,
    System = 1,
    Auto = 2,
    Demand = 3,
    Disabled = 4,
}

/// A PCI function as QEMU presents it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciId {
    pub vendor: u16,
    pub device: u16,
    /// Subsystem device in the high half, subsystem vendor in the low one: `SUBSYS_00021AF4`.
    pub subsystem: u32,
    pub revision: u8,
    /// Class, subclass and programming interface: `0x010601`.
    pub class: u32,
}

impl PciId {
    /// The ids that Windows looks for, most specific first (Microsoft, "Identifiers for PCI
    /// Devices").
    pub fn ids(&self) -> Vec<String> {
        let short = format!("VEN_{:04X}&DEV_{:04X}", self.vendor, self.device);
        let full = format!("{short}&SUBSYS_{:08X}", self.subsystem);
        let class = format!("CC_{:06X}", self.class);
        let base_class = format!("CC_{:04X}", self.class >> 8);
        vec![
            format!("{full}&REV_{:02X}", self.revision),
            full,
            format!("{short}&{class}"),
            format!("{short}&{base_class}"),
            format!("{short}&REV_{:02X}", self.revision),
            short,
            format!("VEN_{:04X}&{class}", self.vendor),
            format!("VEN_{:04X}&{base_class}", self.vendor),
            format!("VEN_{:04X}", self.vendor),
            class,
            base_class,
        ]
    }
}

/// A unicast MAC address; written in lower case with colons.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr([u8; 6]);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    #[error("{0:?} is not a MAC address like 52:54:00:12:34:56")]
    Syntax(String),
    #[error("{0} is a multicast or all-zero address, which a NIC cannot have")]
    NotUnicast(String),
}

impl MacAddr {
    pub fn new(octets: [u8; 6]) -> Result<Self, MacError> {
        let mac = Self(octets);
        if octets[0] & 1 != 0 || octets == [0; 6] {
            return Err(MacError::NotUnicast(mac.to_string()));
        }
        Ok(mac)
    }

    /// Creates an address with QEMU's own prefix.
    pub fn qemu([a, b, c]: [u8; 3]) -> Self {
        Self([0x52, 0x54, 0, a, b, c])
    }

    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddr {
    type Err = MacError;

    /// Parses colons, dashes (as Windows prints it) or nothing between the octets.
    fn from_str(text: &str) -> Result<Self, MacError> {
        let error = || MacError::Syntax(text.chars().take(40).collect());
        let digits: String = match text.len() {
            12 => text.to_owned(),
            17 => {
                let separator = text.as_bytes()[2];
                let placed = text.bytes().skip(2).step_by(3).all(|b| b == separator);
                if !placed || !matches!(separator, b':' | b'-') {
                    return Err(error());
                }
                text.chars().filter(|c| *c != separator as char).collect()
            }
            _ => return Err(error()),
        };
        if digits.len() != 12 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(error());
        }
        let value = u64::from_str_radix(&digits, 16).map_err(|_| error())?;
        let [_, _, octets @ ..] = value.to_be_bytes();
        Self::new(octets)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for MacAddr {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A control set of a SYSTEM hive, `ControlSet001`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct ControlSet(String);

impl ControlSet {
    pub fn new(number: u32) -> Self {
        Self(format!("ControlSet{number:03}"))
    }

    /// Parses the name of a key at the root of a hive; Windows assigns the three digits.
    pub fn parse(name: &str) -> Option<Self> {
        let (head, digits) = name.split_at_checked("ControlSet".len())?;
        let numbered = digits.len() == 3 && digits.bytes().all(|b| b.is_ascii_digit());
        (head.eq_ignore_ascii_case("ControlSet") && numbered)
            .then(|| Self(format!("ControlSet{digits}")))
    }

    /// A key below it.
    pub fn key(&self, below: &str) -> KeyPath {
        KeyPath(self.0.clone()).join(below)
    }

    /// The key of a service.
    pub fn service(&self, name: &str) -> KeyPath {
        self.key("Services").join(name)
    }
}

impl Deref for ControlSet {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for ControlSet {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ControlSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A key below the root of a hive: names with a backslash between them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct KeyPath(String);

impl KeyPath {
    pub fn new(path: impl Into<String>) -> Self {
        Self(path.into())
    }

    pub fn join(&self, below: &str) -> Self {
        Self(format!("{}\\{below}", self.0))
    }
}

impl Deref for KeyPath {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<KeyPath> for String {
    fn from(path: KeyPath) -> Self {
        path.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_sets_and_the_keys_below_them() {
        let set = ControlSet::new(2);
        assert_eq!(&*set, "ControlSet002");
        assert_eq!(&*set.service("disk"), r"ControlSet002\Services\disk");
        assert_eq!(&*set.key("Enum").join("PCI"), r"ControlSet002\Enum\PCI");
        for (name, known) in [
            ("controlset002", true),
            ("ControlSet02", false),
            ("ControlSet0002", false),
            ("ControlSetÜ1", false),
            ("CurrentControlSet", false),
            ("Select", false),
        ] {
            let parsed = ControlSet::parse(name);
            assert_eq!(parsed, known.then(|| set.clone()), "{name}");
        }
    }

    #[test]
    fn mac_addresses() {
        for (text, want) in [
            ("00:0C:29:aa:BB:01", Some("00:0c:29:aa:bb:01")),
            ("00-50-56-00-00-01", Some("00:50:56:00:00:01")),
            ("005056000001", Some("00:50:56:00:00:01")),
            ("01:00:5e:00:00:01", None),
            ("00:00:00:00:00:00", None),
            ("00:50-56:00-00:01", None),
            ("00:50:56:00:00", None),
            ("0:050:56:00:00:01", None),
            ("+05056000001", None),
            ("é:50:56:00:00:01", None),
            ("éééééé", None),
            ("", None),
        ] {
            let got = text.parse::<MacAddr>().ok().map(|m| m.to_string());
            assert_eq!(got.as_deref(), want, "{text}");
        }
    }
}
