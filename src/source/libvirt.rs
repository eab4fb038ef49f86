//! libvirt domain XML as a source: a VM that is moved, or was converted by other means.
//!
//! Follows <https://libvirt.org/formatdomain.html>. Paths are those of this host. A relative one,
//! or an absolute one that does not exist here, is looked up beside the XML.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::disk::remote;
use crate::domain::element::Element;

use super::{
    Controller, Firmware, Result, SourceDisk, SourceError, SourceKind, SourceNic, SourceVm, clean,
    read_description,
};
use crate::disk::charset::Charset;
use crate::files::folder_of;

/// A disk in the XML.
#[derive(Debug, PartialEq, Eq)]
pub struct XmlDisk {
    pub path: PathBuf,
    /// The same name in every spelling.
    pub names: Vec<OsString>,
    pub format: Option<String>,
    pub controller: Controller,
    pub order: (u32, u32),
    pub target: String,
}

pub fn open(path: &Path) -> Result<SourceVm> {
    open_with(path, Path::new("/var/lib/libvirt/qemu/save"))
}

/// Opens a domain XML. `saved` is the directory in which `virsh managedsave` stores the memory of a
/// domain.
pub(super) fn open_with(path: &Path, saved: &Path) -> Result<SourceVm> {
    let (mut vm, disks) = parse(path, &read_description(path)?)?;
    // With disks at these paths, it is a domain of this host.
    let state = saved.join(format!("{}.save", vm.name.replace('/', "_")));
    let here = remote::root_of(path).is_none();
    let own = |disk: &XmlDisk| here && disk.path.is_absolute() && disk.path.exists();
    if disks.iter().any(own) && state.exists() {
        return Err(SourceError::Suspended {
            path: path.into(),
            state: state.display().to_string(),
        });
    }
    for disk in disks {
        let (dir, xml) = (folder_of(path), path);
        // At its path, otherwise beside the XML; by its text, otherwise in the encoding of the XML.
        let places = disk.names.iter().flat_map(|name| {
            let path = Path::new(name);
            // libvirt writes `[datastore] folder/name` for ESXi's files.
            let elsewhere = path.is_absolute() || name.as_encoded_bytes().starts_with(b"[");
            let beside = elsewhere.then(|| path.file_name()).flatten();
            let place = remote::resolve(xml, path);
            [Some(place), beside.map(|name| dir.join(name))]
        });
        let found = places.flatten().find(|file| file.exists());
        let Some(file) = found else {
            return Err(SourceError::MissingDisk {
                path: path.into(),
                disk: disk.target,
                missing: disk.path,
            });
        };
        vm.disks.push(SourceDisk {
            name: disk.target.clone(),
            path: file,
            format: disk.format,
            controller: disk.controller,
            order: disk.order,
            packed: None,
        });
    }
    Ok(vm)
}

/// Parses the VM without opening any file. `path` is for errors.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<(SourceVm, Vec<XmlDisk>)> {
    let parsed = Element::parse_with_encoding(bytes).map_err(|source| SourceError::Xml {
        path: path.into(),
        source,
    });
    let (root, encoding) = parsed?;
    let charset = Charset::of(encoding);
    // `virsh dumpxml` of a snapshot or save image wraps the domain.
    let domain = if root.is("domain") {
        Some(&root)
    } else {
        root.first("domain")
    };
    let domain = domain.ok_or_else(|| SourceError::Invalid {
        path: path.into(),
        reason: format!("it is <{}>, not libvirt's <domain>", clean(&root.name)),
    })?;
    let name = domain.text_of("name").unwrap_or_default();
    let mut vm = SourceVm::new(SourceKind::Libvirt, name);
    vm.uuid = domain.text_of("uuid").and_then(|t| t.parse().ok());
    vm.genid = domain.text_of("genid").and_then(|t| t.parse().ok());
    vm.memory_mib = domain.first("memory").and_then(memory_mib);
    processors(domain, &mut vm);
    vm.serial = domain.path("sysinfo/system").and_then(|system| {
        let mut entries = system.all("entry");
        let entry = entries.find(|e| e.attr("name") == Some("serial"))?;
        Some(clean(&entry.text)).filter(|t| !t.is_empty())
    });
    firmware(domain, &mut vm);
    let mut disks = Vec::new();
    if let Some(devices) = domain.first("devices") {
        vm.tpm = devices.first("tpm").is_some();
        for disk in devices.all("disk") {
            let found = parse_disk(disk, charset, &mut vm);
            disks.extend(found.map_err(|what| SourceError::Unsupported {
                path: path.into(),
                what,
                remedy: NOT_A_FILE,
            })?);
        }
        vm.nics = devices.all("interface").map(nic).collect();
        let passed = devices.all("hostdev").count();
        if passed > 0 {
            vm.note(format!("{passed} host devices passed through are left out"));
        }
    }
    // A boot order takes precedence over the bus and the target name.
    disks.sort_by_key(|(order, disk)| (*order, disk.controller, disk.order));
    Ok((vm, disks.into_iter().map(|(_, disk)| disk).collect()))
}

/// Reads the numbers of CPUs. `<vcpu>` has their number, otherwise the topology; without both there
/// is one. Dies and clusters are parts of a socket and count as cores.
fn processors(domain: &Element, vm: &mut SourceVm) {
    let topology = domain.path("cpu/topology");
    let part = |name: &str| -> Option<u32> {
        let part = topology?
            .attr(name)
            .map_or(Some(1), |n| n.trim().parse().ok());
        part.filter(|n| *n > 0)
    };
    let product = |names: &[&str]| {
        let mut parts = names.iter().map(|name| part(name));
        parts.try_fold(1u32, |n, part| n.checked_mul(part?))
    };
    vm.cores_per_socket = product(&["dies", "clusters", "cores"]);
    vm.threads_per_core = part("threads");
    let vcpu = domain.first("vcpu");
    let written: Option<u32> = vcpu.and_then(|v| v.text.parse().ok());
    let on: Option<u32> = vcpu.and_then(|v| v.attr("current")?.trim().parse().ok());
    if let (Some(on), Some(all)) = (on, written)
        && on < all
    {
        vm.note(format!(
            "{on} of its {all} processors were switched on: all are; --vcpus sets another number"
        ));
    }
    let all = product(&["sockets", "dies", "clusters", "cores", "threads"]);
    vm.vcpus = Some(written.or(all).unwrap_or(1));
}

fn firmware(domain: &Element, vm: &mut SourceVm) {
    let Some(os) = domain.first("os") else { return };
    let loader = os.first("loader");
    let flash = loader.is_some_and(|l| l.attr("type") == Some("pflash"));
    let uefi = flash || os.attr("firmware") == Some("efi");
    vm.firmware = Some(if uefi { Firmware::Uefi } else { Firmware::Bios });
    let feature = |name: &str| {
        let mut features = os.first("firmware")?.all("feature");
        let feature = features.find(|f| f.attr("name") == Some(name))?;
        Some(feature.attr("enabled") == Some("yes"))
    };
    let secure = loader.is_some_and(|l| l.attr("secure") == Some("yes"));
    // A secure loader with an empty variable store enforces nothing.
    vm.secure_boot = uefi
        && feature("secure-boot").unwrap_or(secure)
        && feature("enrolled-keys").unwrap_or(true);
}

const NOT_A_FILE: &str = "copy it to a file and name that in the XML: virsh vol-download for a volume of a pool, \
    qemu-img convert for one on the network; or take the disk out of the XML";

/// Parses a disk; `Err` for one whose data would be missing.
fn parse_disk(
    disk: &Element,
    charset: Charset,
    vm: &mut SourceVm,
) -> Result<Option<(u32, XmlDisk)>, String> {
    let target = disk.first("target");
    let dev = clean(target.and_then(|t| t.attr("dev")).unwrap_or("?"));
    let device = disk.attr("device").unwrap_or("disk");
    if device != "disk" && device != "lun" {
        vm.note(format!("{} {dev} is left out", clean(device)));
        return Ok(None);
    }
    let source = disk.first("source");
    let path = source.and_then(|s| s.attr("file").or(s.attr("dev")));
    let Some(path) = path.filter(|p| !p.is_empty()) else {
        let kind = clean(disk.attr("type").unwrap_or("file"));
        return Err(format!("disk {dev} of type {kind}"));
    };
    let controller = match target.and_then(|t| t.attr("bus")).unwrap_or_default() {
        "scsi" => Controller::Scsi,
        "virtio" => Controller::Virtio,
        "sata" => Controller::Sata,
        "ide" => Controller::Ide,
        "usb" => Controller::Usb,
        _ => Controller::Unknown,
    };
    let boot = disk
        .first("boot")
        .and_then(|b| b.attr("order")?.parse().ok());
    let format = disk.first("driver").and_then(|d| d.attr("type"));
    let disk = XmlDisk {
        path: path.into(),
        names: charset.spellings(path, path.as_bytes()),
        format: format.map(clean),
        controller,
        order: (0, target_index(&dev)),
        target: dev,
    };
    Ok(Some((boot.unwrap_or(u32::MAX), disk)))
}

/// Converts a target name to an index: `vdb` is 1, `vdaa` is 26.
fn target_index(dev: &str) -> u32 {
    let letters = dev.as_bytes().get(2..).unwrap_or_default();
    let index = letters.iter().try_fold(0u32, |n, byte| {
        let digit = byte.is_ascii_lowercase().then(|| byte - b'a' + 1)?;
        n.checked_mul(26)?.checked_add(u32::from(digit))
    });
    index.and_then(|n| n.checked_sub(1)).unwrap_or(u32::MAX)
}

fn nic(interface: &Element) -> SourceNic {
    let attr = |element: &str, name: &str| interface.first(element).and_then(|e| e.attr(name));
    let source = interface.first("source");
    let network = source.and_then(|s| s.attr("network").or(s.attr("bridge")).or(s.attr("dev")));
    SourceNic {
        mac: attr("mac", "address").and_then(|t| t.parse().ok()),
        model: attr("model", "type").map(clean),
        network: network.map(clean),
        connected: attr("link", "state") != Some("down"),
    }
}

/// Converts a size like libvirt's `virScaleInteger`: without regard to case, `k` and `KiB` are
/// 1024, `KB` is 1000.
fn memory_mib(memory: &Element) -> Option<u64> {
    let value: u64 = memory.text.parse().ok()?;
    let unit = memory.attr("unit").unwrap_or("KiB").to_ascii_lowercase();
    let bytes = match unit.as_str() {
        "b" | "byte" | "bytes" => 1,
        unit => {
            let (letter, rest) = unit.split_at_checked(1)?;
            let power = 1 + "kmgtpe".find(letter)?;
            let base: u64 = match rest {
                "" | "ib" => 1024,
                "b" => 1000,
                _ => return None,
            };
            base.checked_pow(u32::try_from(power).ok()?)?
        }
    };
    Some(value.checked_mul(bytes)? >> 20).filter(|mib| *mib > 0)
}
