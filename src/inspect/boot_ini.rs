//! Checks that `boot.ini` leads to the Windows that is converted. NTLDR of Windows 2000, XP and
//! 2003 reads it.
//!
//! It names a partition by ARC path and number. `multi(0)disk(0)rdisk(1)partition(2)` is the second
//! partition of the second disk of the BIOS, whose first disk is the one it starts from.
//! `signature(X)...` names the disk by its MBR signature. `scsi(...)` is read through NTBOOTDD.SYS,
//! a copy of the driver of the old controller.

use super::findings;
use super::model::{BootFiles, Finding, Firmware};
use super::{Disk, bcd};
use crate::disk::layout::{DiskLayout, Partition};
use crate::guest::{GuestError, GuestPath, VolumeId};

/// The most bytes that NTLDR reads.
const MAX_INI: u64 = 64 << 10;
const KERNEL: &str = "System32\\ntoskrnl.exe";

/// The entry that is started without a choice.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    device: Device,
    folder: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Device {
    /// The position of the disk in the BIOS, from 0, and the number of the partition, from 1.
    Multi {
        disk: u32,
        partition: u32,
    },
    Signature {
        signature: u32,
        partition: u32,
    },
    Scsi,
}

/// Reports a default entry that does not start Windows on `place.system`.
pub fn look(place: &bcd::Location<'_>, findings: &mut Vec<Finding>) -> Result<(), GuestError> {
    let (Some(Firmware::Bios), Some(volume)) = (place.boot.firmware, place.boot.boot_volume) else {
        return Ok(());
    };
    let (Ok(path), Ok(ntldr)) = (GuestPath::parse("boot.ini"), GuestPath::parse("ntldr")) else {
        return Ok(());
    };
    // Beside a boot manager of Windows 7, NTLDR is started for an old entry.
    let bootmgr = GuestPath::parse("bootmgr").unwrap_or_default();
    if place.guest.stat(volume, &ntldr)?.is_none() || place.guest.stat(volume, &bootmgr)?.is_some()
    {
        return Ok(());
    }
    let text = match place.guest.read(volume, &path, MAX_INI) {
        Ok(bytes) => bytes,
        // firmware::findings reports that it is missing.
        Err(GuestError::Io(error)) => return Err(GuestError::Io(error)),
        Err(_) => return Ok(()),
    };
    let text = String::from_utf8_lossy(&text);
    let Some(default) = default_entry(&text) else {
        return Ok(());
    };
    let Some(entry) = Entry::parse(&default) else {
        // A boot sector in a file, for another system.
        return Ok(());
    };
    let problem = match target(place, &entry.device) {
        Err(problem) => Some(problem),
        Ok(volume) => other_folder(place, volume, &entry.folder, findings)?,
    };
    if let Some(problem) = problem {
        let right =
            right_path(place).unwrap_or_else(|| "multi(0)disk(0)rdisk(N)partition(M)".into());
        findings.push(findings::BOOT_INI_DEVICE.found_with(
            &[&problem, &right],
            format!("{path} on {volume}: {default}"),
        ));
    }
    Ok(())
}

/// `default=`, or the first system of the list.
fn default_entry(text: &str) -> Option<String> {
    let mut section = String::new();
    let (mut default, mut first) = (None, None);
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']').trim().to_ascii_lowercase();
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            continue;
        };
        let key = key.trim();
        match section.as_str() {
            "boot loader" | "flexboot" | "multiboot" if key.eq_ignore_ascii_case("default") => {
                default = Some(value.trim().to_string());
            }
            "operating systems" => {
                first.get_or_insert_with(|| key.to_string());
            }
            _ => {}
        }
    }
    default.or(first).filter(|entry| !entry.is_empty())
}

impl Entry {
    /// Parses an ARC path; `None` for any other text.
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim_matches('"');
        let (device, folder) = match text.split_once('\\') {
            Some((device, folder)) => (device, folder),
            None => (text, ""),
        };
        let device = device.trim().to_ascii_lowercase();
        let number = |name: &str, radix: u32| -> Option<u32> {
            let rest = device.split_once(&format!("{name}("))?.1;
            u32::from_str_radix(rest.split_once(')')?.0.trim(), radix).ok()
        };
        let partition = number("partition", 10);
        let device = if device.starts_with("multi(") {
            Device::Multi {
                disk: number("rdisk", 10)?,
                partition: partition?,
            }
        } else if device.starts_with("signature(") {
            Device::Signature {
                signature: number("signature", 16)?,
                partition: partition?,
            }
        } else if device.starts_with("scsi(") {
            Device::Scsi
        } else {
            return None;
        };
        Some(Self {
            device,
            folder: folder.trim().to_string(),
        })
    }
}

/// The volume an entry names, or the reason why there is none.
fn target(place: &bcd::Location<'_>, device: &Device) -> Result<VolumeId, String> {
    let in_order = bios_order(place.disks, place.boot);
    let (disk, number) = match device {
        Device::Multi { disk, partition } => {
            let found = usize::try_from(*disk).ok().and_then(|i| in_order.get(i));
            let what = || {
                let count = match in_order.len() {
                    1 => "the VM has one disk".to_string(),
                    n => format!("the VM has {n} disks"),
                };
                format!("names disk rdisk({disk}), and {count}")
            };
            (found.ok_or_else(what)?, *partition)
        }
        Device::Signature {
            signature,
            partition,
        } => {
            let id = format!("{signature:#010x}");
            let same = |d: &&&Disk| d.layout.disk_id.as_deref() == Some(id.as_str());
            let found = in_order.iter().find(same);
            let what = || format!("names a disk with the signature {id}, and there is none");
            (found.ok_or_else(what)?, *partition)
        }
        Device::Scsi => {
            return Err(
                "uses the scsi() form, which needs the controller of the old VM".to_string(),
            );
        }
    };
    let index = usize::try_from(number).unwrap_or(0).checked_sub(1);
    let partitions = arc_order(&disk.layout);
    match index.and_then(|i| partitions.get(i)) {
        Some(partition) => Ok(VolumeId::of(disk.id, partition.index)),
        None => Err(format!(
            "names partition({number}) of a disk with {} partitions",
            partitions.len()
        )),
    }
}

/// The disks in the order of the BIOS. The boot disk is first; the new VM has the others in the
/// order of the source.
fn bios_order<'d>(disks: &'d [Disk], boot: &BootFiles) -> Vec<&'d Disk> {
    let mut all: Vec<&Disk> = disks.iter().collect();
    all.sort_by_key(|disk| (disk.id != boot.disk, disk.id));
    all
}

/// Primary partitions in the order of the table, then logical ones; empty entries do not count.
fn arc_order(layout: &DiskLayout) -> Vec<&Partition> {
    let mut all: Vec<&Partition> = layout.partitions.iter().collect();
    all.sort_by_key(|partition| partition.index);
    all
}

/// Reports another Windows as a fact, and a directory without one as a problem.
fn other_folder(
    place: &bcd::Location<'_>,
    volume: VolumeId,
    folder: &str,
    findings: &mut Vec<Finding>,
) -> Result<Option<String>, GuestError> {
    let named = GuestPath::parse(folder).unwrap_or_default();
    if volume == place.system && named == *place.root {
        return Ok(None);
    }
    let kernel = named.join(KERNEL).unwrap_or_default();
    if !matches!(place.guest.stat(volume, &kernel), Ok(Some(_))) {
        return Ok(Some(format!(
            "starts \\{folder} on {volume}, which is no Windows"
        )));
    }
    findings
        .push(findings::BCD_OTHER_WINDOWS.found_with(&[&volume], format!("boot.ini: \\{folder}")));
    Ok(None)
}

/// The path that would start the converted Windows.
fn right_path(place: &bcd::Location<'_>) -> Option<String> {
    let order = bios_order(place.disks, place.boot);
    let disk = order.iter().position(|d| d.id == place.system.disk)?;
    let partitions = arc_order(&order.get(disk)?.layout);
    let number = (partitions.iter()).position(|p| p.index == place.system.partition)? + 1;
    Some(format!(
        "multi(0)disk(0)rdisk({disk})partition({number}){}",
        place.root
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_entry() {
        let ini = "[boot loader]\r\ntimeout=30\r\ndefault = multi(0)disk(0)rdisk(0)partition(1)\\WINDOWS\r\n[operating systems]\r\nC:\\CMDCONS\\BOOTSECT.DAT=\"Recovery\" /cmdcons\r\n";
        assert_eq!(
            default_entry(ini).as_deref(),
            Some("multi(0)disk(0)rdisk(0)partition(1)\\WINDOWS")
        );
        let list = "[Operating Systems]\nmulti(0)disk(0)rdisk(1)partition(2)\\WINNT=\"2000\"\nother=\"x\"\n";
        assert_eq!(
            default_entry(list).as_deref(),
            Some("multi(0)disk(0)rdisk(1)partition(2)\\WINNT")
        );
        assert_eq!(default_entry("nothing\n[boot loader]\ntimeout=3"), None);
    }

    #[test]
    fn arc_paths() {
        let parse = |text: &str| Entry::parse(text).map(|e| (e.device, e.folder));
        let multi = |disk, partition| Device::Multi { disk, partition };
        let of = |device, folder: &str| Some((device, folder.to_string()));
        for (text, parsed) in [
            (
                "multi(0)disk(0)rdisk(1)partition(2)\\WINNT",
                of(multi(1, 2), "WINNT"),
            ),
            (
                "MULTI(0)DISK(0)RDISK(0)PARTITION(1)\\Windows",
                of(multi(0, 1), "Windows"),
            ),
            (
                "signature(8b467c12)disk(1)rdisk(0)partition(2)\\WINDOWS",
                of(
                    Device::Signature {
                        signature: 0x8b46_7c12,
                        partition: 2,
                    },
                    "WINDOWS",
                ),
            ),
            (
                "scsi(0)disk(0)rdisk(0)partition(1)\\WINDOWS",
                of(Device::Scsi, "WINDOWS"),
            ),
            ("C:\\CMDCONS\\BOOTSECT.DAT", None),
            ("multi(0)disk(0)rdisk(x)partition(1)\\W", None),
            ("multi(0)disk(0)rdisk(99999999999)partition(1)", None),
        ] {
            assert_eq!(parse(text), parsed, "{text}");
        }
    }
}
