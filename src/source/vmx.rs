//! VMware `.vmx` files.
//!
//! Lines of `key = "value"`. Keys compare without case; `|XX` in a value is a byte in hexadecimal
//! (a quote is `|22`); `.encoding` names the character set of the values. There is no published
//! grammar; this follows files written by VMware and the readers of libvirt and virt-v2v.
//!
//! A device exists only with `present = "TRUE"`, but old files omit that for disks. A disk path may
//! be absolute on the ESXi host (`/vmfs/volumes/...`). Then it means the file of that name beside
//! the `.vmx`, or below directories named as at the end of that path. After a snapshot, `fileName`
//! is the newest `-00000N.vmdk`, which itself names its parent. The two numbers of the generation
//! id are its bytes in little-endian order.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::{
    Controller, Firmware, Result, SourceDisk, SourceError, SourceKind, SourceNic, SourceVm,
    read_description, stem,
};
use crate::disk::charset::{Charset, on_the_old_host, without_mark};
use crate::files::folder_of;

const MAX_KEYS: usize = 20_000;

/// The values by lower-case key.
#[derive(Debug, Default)]
pub struct Vmx {
    keys: BTreeMap<String, Value>,
    charset: Charset,
    /// Whether a value was invalid in the declared encoding.
    pub lossy: bool,
    /// An unknown label in `.encoding`.
    unknown_encoding: Option<String>,
}

#[derive(Debug, Default)]
struct Value {
    text: String,
    raw: Vec<u8>,
}

/// A disk in the file.
#[derive(Debug, PartialEq, Eq)]
pub struct VmxDisk {
    pub controller: Controller,
    pub bus: u32,
    pub unit: u32,
    pub file: String,
    /// The bytes of that name in the file.
    pub raw: Vec<u8>,
    /// Whether `present = "TRUE"` is set; old files omit it, for disks and for leftovers alike.
    pub declared: bool,
}

impl VmxDisk {
    fn label(&self) -> String {
        let kind = match self.controller {
            Controller::Scsi => "scsi",
            Controller::Sata => "sata",
            Controller::Nvme => "nvme",
            _ => "ide",
        };
        format!("{kind}{}:{}", self.bus, self.unit)
    }
}

pub fn open(path: &Path) -> Result<SourceVm> {
    let bytes = read_description(path)?;
    let vmx = Vmx::parse(&bytes).map_err(|reason| SourceError::Invalid {
        path: path.into(),
        reason,
    })?;
    if let Some(state) = vmx.get("checkpoint.vmState") {
        return Err(SourceError::Suspended {
            path: path.into(),
            state: super::clean(state),
        });
    }
    let (mut vm, disks) = vmx.machine();
    if vm.name.is_empty() {
        vm.name = stem(path);
    }
    if disks.is_empty() && vmx.is_encrypted() {
        return Err(SourceError::Unsupported {
            path: path.into(),
            what: "a VM encrypted by VMware".into(),
            remedy: "remove the encryption in VMware (Workstation: VM, Settings, Options, Access \
                     Control; vCenter: the storage policy), then copy the VM again",
        });
    }
    let dir = folder_of(path);
    for disk in disks {
        let file = disk
            .locate(dir, vmx.charset)
            .ok_or_else(|| SourceError::Outside {
                path: path.into(),
                reference: disk.file.clone(),
            })?;
        if !file.exists() && !disk.declared {
            vm.note(format!(
                "{} is not marked as present and its file is not there: left out",
                disk.label()
            ));
            continue;
        }
        if !file.exists() {
            return Err(SourceError::MissingDisk {
                path: path.into(),
                disk: disk.label(),
                missing: file,
            });
        }
        vm.disks.push(SourceDisk {
            name: format!("{} ({})", disk.label(), super::clean(&disk.file)),
            path: file,
            format: Some("vmdk".into()),
            controller: disk.controller,
            order: (disk.bus, disk.unit),
            packed: None,
        });
    }
    for file in super::siblings(dir, "vmss") {
        vm.note(format!(
            "{} is what a suspended VM had in memory: if this one is suspended, resume it and shut \
             it down from inside before the conversion",
            super::clean(&file.to_string_lossy())
        ));
    }
    Ok(vm)
}

impl VmxDisk {
    /// Finds the file on this host. Of a path on the old host, the end counts: as many components
    /// as there are directories for.
    fn locate(&self, dir: &Path, charset: Charset) -> Option<PathBuf> {
        let name = self.file.replace('\\', "/");
        let Some(path) = on_the_old_host(&name) else {
            return charset.below(dir, &name, &self.raw);
        };
        let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
        if parts.contains(&"..") {
            return None;
        }
        // A backslash is no separator here, because it may be half of a character.
        let raw = self.raw.rsplit(|b| *b == b'/').next().unwrap_or_default();
        let ends = (0..parts.len()).map(|from| charset.below(dir, &parts[from..].join("/"), raw));
        let mut last = None;
        for end in ends.flatten() {
            if end.exists() {
                return Some(end);
            }
            last = Some(end);
        }
        last
    }
}

impl Vmx {
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let bytes = &*without_mark(bytes);
        let mut raw: Vec<(String, Vec<u8>)> = Vec::new();
        for (n, line) in bytes.split(|b| *b == b'\n').enumerate() {
            let line = line.trim_ascii();
            // `#!/usr/bin/vmware` is the first line of hosted products' files.
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            if raw.len() >= MAX_KEYS {
                return Err(format!("more than {MAX_KEYS} lines"));
            }
            let error = |why: &str| format!("line {}: {why}", n + 1);
            let at = line.iter().position(|b| *b == b'=');
            let (key, value) = line.split_at(at.ok_or_else(|| error("no `=`"))?);
            let key = std::str::from_utf8(key.trim_ascii())
                .ok()
                .filter(|k| !k.is_empty() && k.is_ascii())
                .ok_or_else(|| error("the key is not plain text"))?;
            let value = value[1..].trim_ascii();
            let value = match value {
                [b'"', rest @ ..] => {
                    let end = rest.iter().position(|b| *b == b'"');
                    &rest[..end.ok_or_else(|| error("a quote is not closed"))?]
                }
                // Only handwritten files have these, with remarks behind them.
                bare => remark(bare).trim_ascii_end(),
            };
            raw.push((key.to_ascii_lowercase(), unescape(value)));
        }
        if raw.is_empty() {
            return Err("it has no settings".into());
        }
        let label = raw
            .iter()
            .find(|(key, _)| key == ".encoding")
            .map(|(_, value)| String::from_utf8_lossy(value).into_owned())
            .filter(|label| !label.trim().is_empty());
        let mut vmx = Self::default();
        if let Some(label) = label {
            match Charset::declared(&label, raw.iter().map(|(_, value)| value.as_slice())) {
                Some(charset) => vmx.charset = charset,
                None => vmx.unknown_encoding = Some(super::clean(&label)),
            }
        }
        for (key, raw) in raw {
            let (text, lossy) = vmx.charset.decode(&raw);
            vmx.lossy |= lossy;
            vmx.keys.insert(key, Value { text, raw });
        }
        Ok(vmx)
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        let value = self.keys.get(&key.to_ascii_lowercase())?;
        Some(value.text.as_str()).filter(|v| !v.is_empty())
    }

    /// Whether the VM is encrypted. `encryption.data` may have all settings, or only a TPM's.
    fn is_encrypted(&self) -> bool {
        self.get("encryption.keySafe").is_some() || self.get("encryption.data").is_some()
    }

    fn flag(&self, key: &str) -> Option<bool> {
        match self.get(key)?.to_ascii_lowercase().as_str() {
            "true" | "yes" | "1" => Some(true),
            "false" | "no" | "0" => Some(false),
            _ => None,
        }
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> Option<T> {
        self.get(key)?.trim().parse().ok()
    }

    /// Reads everything except the files, which are left to the caller.
    pub fn machine(&self) -> (SourceVm, Vec<VmxDisk>) {
        let name = self.get("displayName").unwrap_or_default();
        let mut vm = SourceVm::new(SourceKind::Vmx, name);
        if let Some(label) = &self.unknown_encoding {
            vm.note(format!(
                "the .vmx is in the encoding {label}, which is not known: names are read as UTF-8"
            ));
        } else if self.lossy {
            vm.note("some text of the .vmx is not in the encoding it declares");
        }
        vm.memory_mib = self.number("memsize");
        // VMware omits both for one CPU.
        vm.vcpus = Some(self.number("numvcpus").unwrap_or(1));
        vm.cores_per_socket = self.number("cpuid.coresPerSocket").filter(|n| *n > 0);
        vm.firmware = Some(match self.get("firmware") {
            Some(f) if f.eq_ignore_ascii_case("efi") => Firmware::Uefi,
            _ => Firmware::Bios,
        });
        vm.secure_boot = vm.firmware == Some(Firmware::Uefi)
            && self.flag("uefi.secureBoot.enabled") == Some(true);
        vm.tpm = self.flag("vtpm.present") == Some(true);
        if self.is_encrypted() {
            vm.note("the VM is encrypted by VMware: its disks may be unreadable");
        }
        if let Some(text) = self.get("uuid.bios") {
            vm.uuid = bios_uuid(text);
            match vm.uuid {
                Some(_) => vm.serial = Some(format!("VMware-{}", text.trim())),
                None => vm.note(format!("uuid.bios is not understood: {text}")),
            }
        }
        vm.genid = match (self.number("vm.genid"), self.number("vm.genidX")) {
            (Some(low), Some(high)) => Some(genid(low, high)),
            _ => None,
        };
        let disks = self.disks(&mut vm);
        self.nics(&mut vm);
        if self.flag("floppy0.present") == Some(true) {
            vm.note("the floppy drive is left out");
        }
        (vm, disks)
    }

    fn disks(&self, vm: &mut SourceVm) -> Vec<VmxDisk> {
        let mut disks = Vec::new();
        for key in self.keys.keys() {
            let Some((controller, bus, unit)) = device(key) else {
                continue;
            };
            let Some(file) = self.get(key) else { continue };
            let label = key.trim_end_matches(".filename");
            let present = self.flag(&format!("{label}.present"));
            if present == Some(false) {
                continue;
            }
            let adapter = label.split(':').next().unwrap_or_default();
            if self.flag(&format!("{adapter}.present")) == Some(false) {
                vm.note(format!(
                    "{label} ({file}) is left out: its controller {adapter} is switched off"
                ));
                continue;
            }
            let kind = self.get(&format!("{label}.deviceType")).unwrap_or("disk");
            let kind = kind.to_ascii_lowercase();
            if kind.contains("cdrom") || file.to_ascii_lowercase().ends_with(".iso") {
                vm.note(format!("CD-ROM {label} ({file}) is left out"));
            } else if !kind.contains("disk") {
                vm.note(format!("device {label} of type {kind} is left out"));
            } else {
                disks.push(VmxDisk {
                    controller,
                    bus,
                    unit,
                    file: file.to_owned(),
                    raw: self.keys[key].raw.clone(),
                    declared: present == Some(true),
                });
            }
        }
        disks.sort_by_key(|d| (d.controller, d.bus, d.unit));
        disks
    }

    fn nics(&self, vm: &mut SourceVm) {
        let mut numbers: Vec<u32> = self
            .keys
            .keys()
            .filter_map(|k| k.strip_prefix("ethernet")?.strip_suffix(".present"))
            .filter_map(|n| n.parse().ok())
            .collect();
        numbers.sort_unstable();
        for n in numbers {
            let get = |key: &str| self.get(&format!("ethernet{n}.{key}"));
            if self.flag(&format!("ethernet{n}.present")) != Some(true) {
                continue;
            }
            let fixed = get("addressType").is_some_and(|t| t.eq_ignore_ascii_case("static"));
            let (address, generated) = (get("address"), get("generatedAddress"));
            let text = if fixed {
                address.or(generated)
            } else {
                generated.or(address)
            };
            let mac = text.and_then(|t| t.parse().ok());
            if let (Some(text), None) = (text, mac) {
                vm.note(format!("ethernet{n} has no usable MAC address: {text}"));
            }
            vm.nics.push(SourceNic {
                mac,
                model: get("virtualDev").map(super::clean),
                network: get("networkName")
                    .or(get("vnet"))
                    .or(get("dvs.portgroupId"))
                    .or(get("connectionType"))
                    .map(super::clean),
                connected: self.flag(&format!("ethernet{n}.startConnected")) != Some(false),
            });
        }
    }
}

/// Parses `scsi0:1.filename` and similar keys in lower case.
fn device(key: &str) -> Option<(Controller, u32, u32)> {
    let place = key.strip_suffix(".filename")?;
    let (controller, place) = [
        ("scsi", Controller::Scsi),
        ("sata", Controller::Sata),
        ("ide", Controller::Ide),
        ("nvme", Controller::Nvme),
    ]
    .iter()
    .find_map(|(prefix, kind)| Some((*kind, place.strip_prefix(prefix)?)))?;
    let (bus, unit) = place.split_once(':')?;
    Some((controller, bus.parse().ok()?, unit.parse().ok()?))
}

/// A value without quotes, up to ` #`.
fn remark(value: &[u8]) -> &[u8] {
    let end = value
        .windows(2)
        .position(|w| w[0].is_ascii_whitespace() && w[1] == b'#');
    &value[..end.unwrap_or(value.len())]
}

fn unescape(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len());
    let mut rest = value;
    while let [first, tail @ ..] = rest {
        let byte = match (first, tail) {
            (b'|', [high, low, ..]) => std::str::from_utf8(&[*high, *low])
                .ok()
                .filter(|s| s.bytes().all(|b| b.is_ascii_hexdigit()))
                .and_then(|s| u8::from_str_radix(s, 16).ok()),
            _ => None,
        };
        out.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    out
}

/// Parses `56 4d ... -.. ...`: 16 bytes in the order in which SMBIOS tools print them.
fn bios_uuid(text: &str) -> Option<Uuid> {
    let digits: String = text.chars().filter(|c| !matches!(c, ' ' | '-')).collect();
    let plain = digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    Uuid::parse_str(&digits).ok().filter(|_| plain)
}

/// Builds the id from two signed 64-bit numbers: its bytes in the guest's memory, least significant
/// first. The project virt-v2v observed this on both hosts (its document on generation ids).
fn genid(low: i64, high: i64) -> Uuid {
    let bytes = u128::from(low.cast_unsigned()) | u128::from(high.cast_unsigned()) << 64;
    Uuid::from_bytes_le(bytes.to_le_bytes())
}
