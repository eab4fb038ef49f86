//! OVF descriptors (DMTF DSP0243, versions 1 and 2) of VMware, VirtualBox and others.
//!
//! Elements are identified by local name, because producers choose their own prefixes. The parser
//! reads the files, the disks, and the hardware items (RASD and its 2.x forms). It also reads the
//! firmware settings of VMware (`Config`) and VirtualBox (`Firmware`).
//!
//! An item with a `bound` is a limit, not a value. One with a `configuration` belongs to these
//! deployment options only. It is added to, or replaces, an item of the same `InstanceID` (or
//! without one, of memory and CPUs) without a configuration. The chosen configuration is that of
//! the user, or else the default, or else the first.
//!
//! A disk item refers to a disk or directly to a file. The order of the items is not that of the
//! disks, which is by controller and `AddressOnParent`. `AllocationUnits` is a formula (`byte *
//! 2^20`) or an old-fashioned word.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use crate::disk::remote::{self, ReadAt};
use crate::domain::element::Element;

use super::manifest::{check_bytes, percent_decode};
use super::{
    Controller, Firmware, Options, Packed, Result, SourceDisk, SourceError, SourceKind, SourceNic,
    SourceVm, clean, read_description,
};
use crate::disk::charset::{Charset, text_of};
use crate::files::{folder_of, open_file};

/// The most items, each of which may name another; no VM has that many.
const MAX_ITEMS: usize = 4096;

/// A file of the package that backs a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OvfDisk {
    /// The relative, percent-decoded name for people.
    pub href: String,
    /// The possible names of the file. It may be percent-decoded or as written, because not every
    /// producer encodes a `%`. Each is tried as text and in the encoding of the descriptor.
    pub names: Vec<OsString>,
    pub gzip: bool,
    /// The size of the disk, in bytes.
    pub capacity: Option<u64>,
    pub format: Option<String>,
    pub controller: Controller,
    pub order: (u32, u32),
    /// Whether it is marked as the one to boot.
    pub boot: bool,
}

pub fn open(path: &Path, options: &Options) -> Result<SourceVm> {
    let bytes = read_description(path)?;
    let (mut vm, disks) = parse(path, &bytes, options)?;
    let dir = folder_of(path);
    for disk in disks {
        let outside = || SourceError::Outside {
            path: path.into(),
            reference: disk.href.clone(),
        };
        let inside = |name: &OsString| {
            crate::disk::charset::inside(dir, name).map(|file| (text_of(name.as_bytes()), file))
        };
        let first = disk.names.first().and_then(inside).ok_or_else(outside)?;
        let mut found = disk.names.iter().filter_map(inside);
        let (name, file) = found.find(|(_, file)| file.exists()).unwrap_or(first);
        let gzip = disk.gzip || is_gzip(&file);
        if !file.exists() {
            return Err(SourceError::MissingDisk {
                path: path.into(),
                disk: disk.href,
                missing: file,
            });
        }
        vm.disks.push(SourceDisk {
            name: clean(&disk.href),
            path: file,
            format: disk.format,
            controller: disk.controller,
            order: disk.order,
            packed: gzip.then_some(Packed {
                name,
                member: None,
                gzip: true,
                capacity: disk.capacity,
            }),
        });
    }
    let manifest = path.with_extension("mf");
    if manifest.exists() {
        let text = read_description(&manifest)?;
        vm.take_manifest(&text)
            .map_err(|reason| SourceError::Invalid {
                path: manifest,
                reason,
            })?;
        let own = path.file_name().map(|n| text_of(n.as_bytes()));
        check_bytes(path, &vm.manifest, &own.unwrap_or_default(), &bytes)?;
    }
    Ok(vm)
}

/// Whether a disk is compressed without a mark in the descriptor.
pub(super) fn is_gzip(file: &Path) -> bool {
    let mut magic = [0; 3];
    let read = open_file(file).and_then(|f| match remote::of(file, &f.metadata()?) {
        Some(remote) => remote.read_exact_at(&mut magic, 0),
        None => f.read_exact_at(&mut magic, 0),
    });
    read.is_ok() && magic == GZIP
}

/// The magic number of gzip with deflate, its only method.
pub(super) const GZIP: [u8; 3] = [0x1f, 0x8b, 8];

/// Parses the VM of an envelope without opening any file. `path` is for errors.
pub fn parse(path: &Path, bytes: &[u8], options: &Options) -> Result<(SourceVm, Vec<OvfDisk>)> {
    let parsed = Element::parse_with_encoding(bytes).map_err(|source| SourceError::Xml {
        path: path.into(),
        source,
    });
    let (root, encoding) = parsed?;
    let charset = Charset::of(encoding);
    let invalid = |reason: String| SourceError::Invalid {
        path: path.into(),
        reason,
    };
    if !root.is("Envelope") {
        return Err(invalid("it is no OVF envelope".into()));
    }
    let system = only_system(path, &root)?;
    let name = system.text_of("Name").filter(|n| !n.is_empty());
    let mut vm = SourceVm::new(
        SourceKind::Ovf,
        name.or(system.attr("id")).unwrap_or_default(),
    );
    let machine = system.first("Machine");
    if let Some(state) = machine.and_then(|m| m.attr("stateFile")) {
        return Err(SourceError::Suspended {
            path: path.into(),
            state: clean(state),
        });
    }
    firmware(system, &mut vm);
    let configuration = configuration(path, &root, options, &mut vm)?;
    let hardware = hardware(system, configuration.as_deref()).map_err(invalid)?;
    let package = Package::new(&root, charset);
    let mut disks = Vec::new();
    for item in &hardware {
        match item.kind {
            3 => {
                let count = item.quantity().and_then(|n| u32::try_from(n).ok());
                vm.vcpus = count.or(vm.vcpus);
                let cores = item.text("CoresPerSocket").or(item.text("cpu_per_socket"));
                let cores = cores.and_then(|t| t.parse().ok());
                vm.cores_per_socket = cores.or(vm.cores_per_socket);
            }
            4 => vm.memory_mib = memory_mib(item).or(vm.memory_mib),
            10 => vm.nics.push(nic(item, &mut vm.notes)),
            14..=16 => vm.note(format!("{} is left out", item.label())),
            17 => {
                let (controller, bus) = item.controller(&hardware);
                let unit = item.number("AddressOnParent").unwrap_or(u32::MAX);
                let resource = item.text("HostResource").unwrap_or_default();
                match package.backing(resource).map_err(invalid)? {
                    Some(file) => disks.push(OvfDisk {
                        controller: match controller {
                            Controller::Unknown => file.controller,
                            known => known,
                        },
                        order: (bus, unit),
                        ..file
                    }),
                    None => vm.note(format!("{} has no disk file: left out", item.label())),
                }
            }
            _ => {}
        }
        let says = |name: &str, what: &str| {
            let text = item.text(name).unwrap_or_default();
            text.to_ascii_lowercase().contains(what)
        };
        vm.tpm |= says("ResourceSubType", "vtpm") || says("Type", "tpm");
    }
    virtual_box(system, &mut vm);
    disks.sort_by_key(|d| (!d.boot, d.controller, d.order));
    Ok((vm, disks))
}

fn only_system<'r>(path: &Path, root: &'r Element) -> Result<&'r Element> {
    let mut systems = root.descendants("VirtualSystem");
    systems.extend(typed(root, "VirtualSystem"));
    match systems.as_slice() {
        [one] => Ok(one),
        [] => Err(SourceError::Invalid {
            path: path.into(),
            reason: "it has no VirtualSystem".into(),
        }),
        several => Err(SourceError::SeveralMachines {
            path: path.into(),
            count: several.len(),
        }),
    }
}

/// Reads VirtualBox's own elements: the items have neither MAC addresses nor a TPM.
fn virtual_box(system: &Element, vm: &mut SourceVm) {
    let Some(hardware) = system.first("Machine").and_then(|m| m.first("Hardware")) else {
        return;
    };
    let tpm = hardware
        .first("TrustedPlatformModule")
        .and_then(|t| t.attr("type"));
    vm.tpm |= tpm.is_some_and(|kind| !kind.eq_ignore_ascii_case("none"));
    let network = hardware.first("Network").into_iter();
    let adapters = network
        .flat_map(|n| n.all("Adapter"))
        .filter(|a| a.attr("enabled") == Some("true"));
    for (nic, adapter) in vm.nics.iter_mut().zip(adapters) {
        nic.mac = nic.mac.or_else(|| adapter.attr("MACAddress")?.parse().ok());
        nic.connected &= adapter.attr("cable") != Some("false");
    }
}

/// Finds elements of OVF 0.9, which oVirt still writes: `<Content
/// xsi:type="ovf:VirtualSystem_Type">`.
fn typed<'a>(root: &'a Element, name: &str) -> Vec<&'a Element> {
    let mut elements = root.descendants("Content");
    elements.extend(root.descendants("Section"));
    let wanted = format!("{name}_Type");
    elements.retain(|e| {
        let kind = e.attr("type").unwrap_or_default();
        kind.rsplit(':').next() == Some(&wanted)
    });
    elements
}

fn firmware(system: &Element, vm: &mut SourceVm) {
    vm.firmware = Some(Firmware::Bios);
    // oVirt: 3 and 4 are q35 with UEFI, without and with Secure Boot.
    match system.text_of("BiosType") {
        Some("3") => vm.firmware = Some(Firmware::Uefi),
        Some("4") => {
            vm.firmware = Some(Firmware::Uefi);
            vm.secure_boot = true;
        }
        _ => {}
    }
    for config in system.descendants("Config") {
        let value = config.attr("value").unwrap_or_default();
        match config.attr("key").unwrap_or_default() {
            "firmware" if value.eq_ignore_ascii_case("efi") => {
                vm.firmware = Some(Firmware::Uefi);
            }
            "bootOptions.efiSecureBootEnabled" => {
                vm.secure_boot = value.eq_ignore_ascii_case("true");
            }
            _ => {}
        }
    }
    for firmware in system.descendants("Firmware") {
        // VirtualBox: EFI, EFI32, EFI64, EFIDUAL.
        if firmware.attr("type").is_some_and(|t| t.starts_with("EFI")) {
            vm.firmware = Some(Firmware::Uefi);
        }
    }
    if vm.firmware == Some(Firmware::Bios) {
        vm.secure_boot = false;
    }
    let machine = system.first("Machine").and_then(|m| m.attr("uuid"));
    vm.uuid = machine.and_then(|id| id.parse().ok());
}

/// The chosen deployment option, if there are any.
fn configuration(
    path: &Path,
    root: &Element,
    options: &Options,
    vm: &mut SourceVm,
) -> Result<Option<String>> {
    let sections = root.all("DeploymentOptionSection");
    let listed: Vec<&Element> = sections.flat_map(|s| s.all("Configuration")).collect();
    let ids: Vec<String> = listed
        .iter()
        .filter_map(|c| c.attr("id").map(clean))
        .collect();
    if let Some(wanted) = &options.ovf_configuration {
        if !ids.contains(wanted) {
            return Err(SourceError::NoConfiguration {
                path: path.into(),
                wanted: clean(wanted),
                known: match ids.is_empty() {
                    true => "it has none".into(),
                    false => format!("it has {}", ids.join(", ")),
                },
            });
        }
        return Ok(Some(wanted.clone()));
    }
    let default = listed
        .iter()
        .find(|c| matches!(c.attr("default"), Some("true" | "1")))
        .or(listed.first())
        .and_then(|c| c.attr("id"));
    if let Some(id) = default {
        vm.note(format!(
            "the OVF has the configurations {}: {id} is taken; --ovf-configuration names another",
            ids.join(", ")
        ));
    }
    Ok(default.map(str::to_owned))
}

/// The items of this configuration.
fn hardware<'a>(system: &'a Element, configuration: Option<&str>) -> Result<Vec<Item<'a>>, String> {
    let mut sections: Vec<&Element> = system.all("VirtualHardwareSection").collect();
    sections.extend(typed(system, "VirtualHardwareSection"));
    // There may be one for each kind of hypervisor; the first is used.
    let section = sections.first();
    let items = section.into_iter().flat_map(|s| &s.children);
    let items = items.filter_map(Item::new).filter(|item| {
        let bound = item.element.attr("bound").unwrap_or("normal");
        bound == "normal" || bound.is_empty()
    });
    let items: Vec<Item> = items.collect();
    if items.len() > MAX_ITEMS {
        return Err(format!(
            "the VM has {} items of hardware, and at most {MAX_ITEMS} are read",
            items.len()
        ));
    }
    let (mut common, mut special) = (Vec::new(), Vec::new());
    for item in items {
        match item.element.attr("configuration") {
            None => common.push(item),
            Some(ids) if configuration.is_some_and(|c| ids.split_whitespace().any(|i| i == c)) => {
                special.push(item);
            }
            Some(_) => {}
        }
    }
    let replaced = |item: &Item| {
        special.iter().any(|s: &Item| match item.kind {
            3 | 4 => s.kind == item.kind,
            _ => s.kind == item.kind && s.text("InstanceID") == item.text("InstanceID"),
        })
    };
    common.retain(|item| !replaced(item));
    common.append(&mut special);
    Ok(common)
}

struct Item<'a> {
    element: &'a Element,
    kind: u32,
}

impl<'a> Item<'a> {
    fn new(element: &'a Element) -> Option<Self> {
        let names = ["Item", "StorageItem", "EthernetPortItem"];
        let item = names.iter().any(|name| element.is(name));
        let kind = element.text_of("ResourceType")?.parse().ok()?;
        item.then_some(Self { element, kind })
    }

    fn text(&self, name: &str) -> Option<&'a str> {
        let written = self.element.text_of(name).or_else(|| {
            // oVirt: `InstanceId`.
            let same = |e: &&Element| {
                let local = e.name.rsplit(':').next().unwrap_or_default();
                local.eq_ignore_ascii_case(name)
            };
            self.element
                .children
                .iter()
                .find(same)
                .map(|e| e.text.as_str())
        });
        written.filter(|t| !t.is_empty())
    }

    fn number(&self, name: &str) -> Option<u32> {
        self.text(name)?.parse().ok()
    }

    fn quantity(&self) -> Option<u64> {
        self.text("VirtualQuantity")?.parse().ok()
    }

    fn label(&self) -> String {
        let name = self.text("ElementName").or(self.text("Caption"));
        clean(name.unwrap_or(match self.text("ResourceType") {
            Some("14") => "a floppy drive",
            Some("15" | "16") => "a CD-ROM drive",
            _ => "an unnamed device",
        }))
    }

    /// The controller to which this disk is attached, and its number.
    fn controller(&self, hardware: &[Item]) -> (Controller, u32) {
        let parent = self.text("Parent").and_then(|id| {
            let same = |item: &&Item| item.text("InstanceID") == Some(id);
            hardware.iter().find(same)
        });
        let Some(parent) = parent else {
            return (Controller::Unknown, 0);
        };
        let subtype = parent.text("ResourceSubType").unwrap_or_default();
        let subtype = subtype.to_ascii_lowercase();
        let kind = match parent.kind {
            5 => Controller::Ide,
            6 if subtype.contains("virtio") => Controller::Virtio,
            6 => Controller::Scsi,
            _ if subtype.contains("nvme") => Controller::Nvme,
            _ if subtype.contains("ahci") || subtype.contains("sata") => Controller::Sata,
            23 => Controller::Usb,
            _ => Controller::Unknown,
        };
        (kind, parent.number("Address").unwrap_or(0))
    }
}

fn nic(item: &Item, notes: &mut Vec<String>) -> SourceNic {
    let address = item.text("Address").or(item.text("MACAddress"));
    let mac = address.and_then(|a| a.parse().ok());
    if let (Some(address), None) = (address, mac) {
        notes.push(format!(
            "{} has no usable MAC address: {}",
            item.label(),
            clean(address)
        ));
    }
    SourceNic {
        mac,
        model: item.text("ResourceSubType").map(clean),
        network: item.text("Connection").map(clean),
        connected: ["AutomaticAllocation", "Linked", "IsPlugged"]
            .iter()
            .all(|name| {
                !item
                    .text(name)
                    .is_some_and(|t| t.eq_ignore_ascii_case("false"))
            }),
    }
}

/// The disks and files of an envelope by their possible names; the first one counts.
struct Package<'a> {
    disks: HashMap<&'a str, &'a Element>,
    /// By `fileRef`, as oVirt names them.
    disks_by_file: HashMap<&'a str, &'a Element>,
    files: HashMap<&'a str, &'a Element>,
    charset: Charset,
}

fn by<'a>(elements: &[&'a Element], keys: &[&str]) -> HashMap<&'a str, &'a Element> {
    let mut found = HashMap::new();
    for element in elements {
        for name in keys.iter().filter_map(|key| element.attr(key)) {
            found.entry(name).or_insert(*element);
        }
    }
    found
}

impl<'a> Package<'a> {
    fn new(root: &'a Element, charset: Charset) -> Self {
        let disks = root.descendants("Disk");
        let files = root.first("References").into_iter();
        let files: Vec<&Element> = files.flat_map(|r| r.all("File")).collect();
        Self {
            disks: by(&disks, &["diskId"]),
            disks_by_file: by(&disks, &["fileRef"]),
            // oVirt: `fileRef` is the href.
            files: by(&files, &["id", "href"]),
            charset,
        }
    }

    /// The disk that an item names; `None` if it names a file.
    fn disk(
        &self,
        resource: &str,
        place: Option<(&str, &str)>,
    ) -> Result<Option<&'a Element>, String> {
        match place {
            Some(("file", _)) => Ok(None),
            Some(("disk", id)) => match self.disks.get(id) {
                Some(disk) => Ok(Some(disk)),
                None => Err(format!("disk {} is not declared", clean(id))),
            },
            // oVirt: the file's id, or FOLDER/ID as for the disk.
            _ => {
                let files = self.disks_by_file.get(resource);
                match files.or(self.disks.get(resource)) {
                    Some(disk) => Ok(Some(disk)),
                    None => Err(format!(
                        "a disk is at {}, which is not declared",
                        clean(resource)
                    )),
                }
            }
        }
    }

    /// Parses `ovf:/disk/ID` or `ovf:/file/ID`, in all observed spellings.
    fn backing(&self, resource: &str) -> Result<Option<OvfDisk>, String> {
        let place = resource
            .trim_start_matches("ovf:")
            .trim_start_matches('/')
            .split_once('/');
        let mut capacity = None;
        let (mut controller, mut boot) = (Controller::Unknown, false);
        if resource.is_empty() {
            return Ok(None);
        }
        let disk = self.disk(resource, place)?;
        let (file_id, format) = match (disk, place) {
            (Some(disk), _) => {
                let id = disk.attr("diskId").unwrap_or_default();
                (controller, boot) = interface(disk);
                if disk
                    .attr("parentRef")
                    .is_some_and(|parent| !parent.is_empty())
                {
                    return Err(format!(
                        "disk {} is a delta of another disk, which is not supported",
                        clean(id)
                    ));
                }
                let units = disk.attr("capacityAllocationUnits").unwrap_or("byte");
                let number = disk.attr("capacity").and_then(|c| c.parse::<u64>().ok());
                capacity = number
                    .zip(unit_bytes(units))
                    .and_then(|(n, unit)| n.checked_mul(unit));
                (disk.attr("fileRef"), disk.attr("format").and_then(format))
            }
            (None, Some((_, id))) => (Some(id), None),
            (None, None) => (None, None),
        };
        // A disk without a file is an empty one, created at deployment.
        let Some(file_id) = file_id.filter(|id| !id.trim().is_empty()) else {
            return Ok(None);
        };
        let file = self
            .files
            .get(file_id)
            .ok_or_else(|| format!("file {} is not declared", clean(file_id)))?;
        if file.attr("chunkSize").is_some() {
            return Err("its disk is split into chunks, which is not supported".into());
        }
        let written = file.attr("href").filter(|h| !h.is_empty());
        let written = written.ok_or_else(|| format!("file {} has no href", clean(file_id)))?;
        let decoded = percent_decode(written);
        let href = text_of(&decoded);
        let mut names = match std::str::from_utf8(&decoded) {
            Ok(text) => self.charset.spellings(text, &decoded),
            Err(_) => vec![OsString::from_vec(decoded)],
        };
        names.extend(self.charset.spellings(written, written.as_bytes()));
        if href.contains("://") {
            return Err(format!(
                "its disk is at {}, and disks are not fetched from the network",
                clean(&href)
            ));
        }
        let gzip = match file.attr("compression").unwrap_or_default() {
            "" | "identity" => false,
            "gzip" => true,
            other => return Err(format!("compression {} is not supported", clean(other))),
        };
        Ok(Some(OvfDisk {
            href,
            names,
            gzip,
            capacity,
            format,
            controller,
            order: (0, 0),
            boot,
        }))
    }
}

/// Reads the bus of a disk and whether it is the one to boot; oVirt has no controllers.
fn interface(disk: &Element) -> (Controller, bool) {
    let name = disk.attr("disk-interface").unwrap_or_default();
    let controller = match name.to_ascii_lowercase().as_str() {
        "virtio_scsi" => Controller::Scsi,
        "virtio" => Controller::Virtio,
        "sata" => Controller::Sata,
        "ide" => Controller::Ide,
        _ => Controller::Unknown,
    };
    let boot = disk
        .attr("boot")
        .is_some_and(|b| b.eq_ignore_ascii_case("true"));
    (controller, boot)
}

fn format(uri: &str) -> Option<String> {
    let uri = uri.to_ascii_lowercase();
    let known = [
        ("vmdk", "vmdk"),
        ("vhdx", "vhdx"),
        ("vhd", "vpc"),
        ("virtual-pc", "vpc"),
        ("qcow2", "qcow2"),
        ("qcow", "qcow2"),
        ("vdi", "vdi"),
        ("raw", "raw"),
    ];
    let found = known.iter().find(|(part, _)| uri.contains(part))?;
    Some(found.1.to_owned())
}

fn memory_mib(item: &Item) -> Option<u64> {
    let quantity = item.quantity()?;
    let units = item.text("AllocationUnits").unwrap_or("byte * 2^20");
    let bytes = quantity.checked_mul(unit_bytes(units)?)?;
    Some(bytes >> 20).filter(|mib| *mib > 0)
}

/// Parses `byte * 2^20`, `MegaBytes`, `GB`, ...
fn unit_bytes(units: &str) -> Option<u64> {
    let units: String = units.chars().filter(|c| !c.is_whitespace()).collect();
    let units = units.to_ascii_lowercase();
    // DSP0004, annex C; both orders occur.
    let formula = units.strip_prefix("byte*").or(units.strip_suffix("*byte"));
    if let Some((base, power)) = formula.and_then(|f| f.split_once('^')) {
        return base.parse::<u64>().ok()?.checked_pow(power.parse().ok()?);
    }
    match units
        .trim_end_matches('s')
        .trim_end_matches("byte")
        .trim_end_matches('b')
    {
        "" => Some(1),
        "kilo" | "k" | "kibi" | "ki" => Some(1 << 10),
        "mega" | "m" | "mebi" | "mi" => Some(1 << 20),
        "giga" | "g" | "gibi" | "gi" => Some(1 << 30),
        "tera" | "t" | "tebi" | "ti" => Some(1 << 40),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    /// An envelope with `disks` disks, declared last first.
    fn envelope(disks: usize) -> String {
        let (mut files, mut declared, mut items) = (String::new(), String::new(), String::new());
        for n in (0..disks).rev() {
            let _ = write!(files, "<File id='f{n}' href='d{n}.vmdk'/>");
            let _ = write!(
                declared,
                "<Disk diskId='d{n}' fileRef='f{n}' capacity='{n}'/>"
            );
            let _ = write!(
                items,
                "<Item><InstanceID>{n}</InstanceID><ResourceType>17</ResourceType>\
                 <HostResource>ovf:/disk/d{n}</HostResource><AddressOnParent>{n}</AddressOnParent></Item>"
            );
        }
        format!(
            "<Envelope><References>{files}</References><DiskSection>{declared}</DiskSection>\
             <VirtualSystem id='v'><VirtualHardwareSection>{items}</VirtualHardwareSection>\
             </VirtualSystem></Envelope>"
        )
    }

    #[test]
    fn many_disks_are_read_and_too_many_refused() {
        let read = |disks| {
            let text = envelope(disks);
            parse(Path::new("x.ovf"), text.as_bytes(), &Options::default())
        };
        let (_, disks) = read(4096).unwrap();
        assert_eq!(disks.len(), 4096);
        for (n, disk) in disks.iter().enumerate() {
            assert_eq!(disk.href, format!("d{n}.vmdk"));
            assert_eq!(disk.capacity, Some(n as u64));
        }
        let error = read(4097).unwrap_err().to_string();
        for number in ["4097", "4096"] {
            assert!(error.contains(number), "{error}");
        }
    }
}
