//! Finds in the SYSTEM hive which disks besides the system's had a drive letter.
//!
//! `MountedDevices` names the volume of a letter by disk signature and offset (MBR), or by the GUID
//! of the partition (GPT, `DMIO:ID:`). The disk of that partition, and whether it was offline or
//! read-only, is recorded below the disk's device. `Partmgr\PartitionTableCache` is a
//! `DRIVE_LAYOUT_INFORMATION_EX` (Windows 8 and later); `Attributes` has 1 for offline and 2 for
//! read-only. So letters of GPT disks cannot be determined on Windows 7. Disks that were once
//! plugged in are recorded too: the first-boot script checks which of them exist.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::bytes::le32;
use crate::firstboot::disks::{Disk, DiskId, Disks};
use crate::registry::HiveError;
use crate::registry::HiveView;
use crate::registry::hive::Key;
use crate::types::ControlSet;

const OFFLINE: u32 = 1;
const READ_ONLY: u32 = 2;
/// A hive with more is damaged or hostile.
const MAX_VALUES: usize = 1024;
const MAX_DEVICES: usize = 256;
/// The most disks in the script.
const MAX_DISKS: usize = 26;

/// Windows' record of a disk that was attached.
struct Known {
    id: DiskId,
    partitions: Vec<Uuid>,
    attributes: u32,
}

/// The disks without that of Windows itself, and notes for the user.
pub fn with_letters(
    system: &HiveView<'_>,
    set: &ControlSet,
    system_letter: Option<char>,
    notes: &mut Vec<String>,
) -> Result<Disks, HiveError> {
    let Some(mounted) = system.key("MountedDevices")? else {
        return Ok(Disks::default());
    };
    let known = known_disks(system, set)?;
    let mut letters: Vec<(char, Vec<u8>)> = Vec::new();
    let mut volumes: BTreeMap<Vec<u8>, Uuid> = BTreeMap::new();
    for (name, value) in mounted.values()?.into_iter().take(MAX_VALUES) {
        if let Some(letter) = drive_letter(&name) {
            letters.push((letter, value.data));
        } else if let Some(guid) = volume_guid(&name) {
            volumes.insert(value.data, guid);
        }
    }
    letters.sort();
    let own = letters
        .iter()
        .find(|(letter, _)| Some(*letter) == system_letter)
        .and_then(|(_, data)| disk_of(data, &known));
    let mut disks: BTreeMap<DiskId, Disk> = BTreeMap::new();
    for (letter, data) in &letters {
        let Some(id) = disk_of(data, &known) else {
            if data.starts_with(GPT) && Some(*letter) != system_letter && own.is_some() {
                notes.push(format!(
                    "the disk of drive {letter}: cannot be determined from the registry: if it comes up offline, bring it online with diskpart"
                ));
            }
            continue;
        };
        let attributes = known.iter().filter(|k| k.id == id).map(|k| k.attributes);
        // The same disk on different controllers: it was in use if it was on any of them.
        let attributes = attributes.reduce(|a, b| a & b).unwrap_or(0);
        if own == Some(id) || attributes & OFFLINE != 0 {
            continue;
        }
        let disk = disks.entry(id).or_insert_with(|| Disk {
            id,
            read_only: attributes & READ_ONLY != 0,
            letters: Vec::new(),
        });
        if let Some(volume) = volumes.get(data) {
            disk.letters.push((*letter, volume.braced()));
        }
    }
    Ok(Disks(disks.into_values().take(MAX_DISKS).collect()))
}

const GPT: &[u8] = b"DMIO:ID:";

fn disk_of(data: &[u8], known: &[Known]) -> Option<DiskId> {
    match data.strip_prefix(GPT) {
        Some(guid) => {
            let partition = Uuid::from_bytes_le(guid.try_into().ok()?);
            let disk = known.iter().find(|k| k.partitions.contains(&partition));
            disk.map(|k| k.id)
        }
        None if data.len() == 12 => Some(DiskId::Mbr(le32(data, 0)?)),
        None => None,
    }
}

fn drive_letter(name: &str) -> Option<char> {
    let rest = name
        .get(..12)
        .filter(|head| head.eq_ignore_ascii_case(r"\DosDevices\"))
        .and(name.get(12..))?;
    let letter = rest.strip_suffix(':')?.chars().next()?;
    (rest.len() == 2 && letter.is_ascii_alphabetic()).then(|| letter.to_ascii_uppercase())
}

fn volume_guid(name: &str) -> Option<Uuid> {
    let inner = name.strip_prefix(r"\??\Volume{")?.strip_suffix('}')?;
    Uuid::try_parse(inner).ok()
}

fn known_disks(system: &HiveView<'_>, set: &ControlSet) -> Result<Vec<Known>, HiveError> {
    let mut known = Vec::new();
    for bus in ["SCSI", "IDE"] {
        let Some(bus) = system.key(&set.key("Enum").join(bus))? else {
            continue;
        };
        for model in bus.keys()?.into_iter().take(MAX_DEVICES) {
            if !model.name()?.to_ascii_lowercase().starts_with("disk") {
                continue;
            }
            for device in model.keys()?.into_iter().take(MAX_DEVICES) {
                if let Some(partmgr) = device.key(r"Device Parameters\Partmgr")? {
                    known.extend(known_disk(&partmgr)?);
                }
            }
        }
    }
    Ok(known)
}

fn known_disk(partmgr: &Key<'_>) -> Result<Option<Known>, HiveError> {
    let attributes = partmgr.dword("Attributes")?.unwrap_or(0);
    let table = partmgr.value("PartitionTableCache")?;
    Ok(table.and_then(|t| {
        let (id, partitions) = drive_layout(&t.data)?;
        Some(Known {
            id,
            partitions,
            attributes,
        })
    }))
}

/// Parses a `DRIVE_LAYOUT_INFORMATION_EX`: style, number of partitions, identity of the disk. From
/// byte 48 follow the partitions, 144 bytes each, with their GUID at 48.
fn drive_layout(data: &[u8]) -> Option<(DiskId, Vec<Uuid>)> {
    const ENTRIES: usize = 48;
    const ENTRY: usize = 144;
    match le32(data, 0)? {
        0 => Some((DiskId::Mbr(le32(data, 8)?), Vec::new())),
        1 => {
            let guid = |bytes: &[u8]| Some(Uuid::from_bytes_le(bytes.try_into().ok()?));
            let entries = data.get(ENTRIES..)?.chunks_exact(ENTRY);
            let partitions = entries.take(le32(data, 4)? as usize);
            Some((
                DiskId::Gpt(guid(data.get(8..24)?)?),
                partitions.filter_map(|p| guid(p.get(48..64)?)).collect(),
            ))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{KeyTree, RegData};

    const SET: &str = "ControlSet001";

    fn gpt_layout(disk: u8, partitions: &[u8]) -> Vec<u8> {
        let mut data = vec![0; 48];
        data[0] = 1;
        data[4] = partitions.len() as u8;
        data[8..24].fill(disk);
        for partition in partitions {
            let mut entry = [0; 144];
            entry[48..64].fill(*partition);
            data.extend(entry);
        }
        data
    }

    fn seen(tree: &mut KeyTree, name: &str, attributes: u32, layout: Option<Vec<u8>>) {
        let key = format!("{SET}\\Enum\\SCSI\\Disk&Ven_X\\{name}\\Device Parameters\\Partmgr");
        tree.dword(&key, "Attributes", attributes);
        if let Some(layout) = layout {
            tree.set(&key, "PartitionTableCache", RegData::Binary(layout));
        }
    }

    #[test]
    fn disks_of_letters() {
        let mbr = |disk: u8, offset: u8| [[disk; 4], [offset; 4], [0; 4]].concat();
        let gpt = |partition: u8| [GPT, &[partition; 16]].concat();
        let volume = |n: u8| Uuid::from_bytes([n; 16]);
        let mut tree = KeyTree::new("ROOT");
        let cdrom = b"\\\0?\0?\0\\\0".to_vec();
        for (name, data) in [
            ("\\DosDevices\\C:", gpt(1)),
            ("\\DosDevices\\D:", cdrom),
            ("\\DosDevices\\E:", gpt(2)),
            ("\\DosDevices\\F:", gpt(3)),
            ("\\dosdevices\\g:", mbr(7, 1)),
            ("\\DosDevices\\H:", mbr(7, 9)),
            ("\\DosDevices\\I:", gpt(5)),
            ("\\DosDevices\\J:", mbr(8, 1)),
            ("\\DosDevices\\K:", gpt(9)),
            ("\\DosDevices\\\u{e9}:", mbr(9, 1)),
        ] {
            tree.set("MountedDevices", name, RegData::Binary(data));
        }
        for (n, data) in [(3u8, gpt(3)), (4, mbr(7, 1)), (5, mbr(7, 9))] {
            let name = format!("\\??\\Volume{}", volume(n).braced());
            tree.set("MountedDevices", &name, RegData::Binary(data));
        }
        seen(&mut tree, "0", 0, Some(gpt_layout(0x10, &[1, 2])));
        seen(
            &mut tree,
            "1",
            READ_ONLY,
            Some(gpt_layout(0x20, &[0x77, 3])),
        );
        seen(&mut tree, "2", OFFLINE, Some(gpt_layout(0x30, &[5])));
        seen(&mut tree, "3", 0, None);
        let bytes = tree.to_bytes("SYSTEM");
        let mut notes = Vec::new();
        let view = HiveView::new(&bytes).unwrap();
        let disks = with_letters(&view, &ControlSet::new(1), Some('C'), &mut notes).unwrap();
        let shown: Vec<String> = disks
            .0
            .iter()
            .map(|d| {
                let letters = d.letters.iter().map(|(l, v)| format!("{l}={v}"));
                let letters: Vec<_> = letters.collect();
                format!("{} {} {}", d.id, d.read_only, letters.join(" "))
            })
            .collect();
        assert_eq!(
            shown,
            [
                format!(
                    "07070707 false G={} H={}",
                    volume(4).braced(),
                    volume(5).braced()
                ),
                "08080808 false ".to_string(),
                format!(
                    "{{20202020-2020-2020-2020-202020202020}} true F={}",
                    volume(3).braced()
                ),
            ]
        );
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].contains("K:"));
    }

    #[test]
    fn hostile_layouts() {
        for data in [
            vec![],
            vec![1, 0, 0, 0],
            [&[1u8, 0, 0, 0, 255, 255, 255, 255][..], &[0; 50]].concat(),
            vec![9; 400],
        ] {
            let found = drive_layout(&data);
            assert!(found.is_none_or(|(_, partitions)| partitions.is_empty()));
        }
    }

    /// The same disk on two controllers: the record for the controller it left does not count.
    #[test]
    fn a_disk_that_was_online_on_one_of_its_controllers_was_in_use() {
        let online = |attributes: &[u32]| {
            let mut tree = KeyTree::new("ROOT");
            let data = [GPT, &[3; 16]].concat();
            tree.set("MountedDevices", "\\DosDevices\\F:", RegData::Binary(data));
            for (n, attributes) in attributes.iter().enumerate() {
                let layout = gpt_layout(0x20, &[3]);
                seen(&mut tree, &n.to_string(), *attributes, Some(layout));
            }
            let bytes = tree.to_bytes("SYSTEM");
            let view = HiveView::new(&bytes).unwrap();
            let set = ControlSet::new(1);
            let disks = with_letters(&view, &set, Some('C'), &mut Vec::new()).unwrap();
            disks.0.iter().map(|d| d.read_only).collect::<Vec<_>>()
        };
        assert_eq!(online(&[OFFLINE]), [false; 0]);
        assert_eq!(online(&[OFFLINE, OFFLINE]), [false; 0]);
        assert_eq!(online(&[OFFLINE, 0]), [false]);
        assert_eq!(online(&[READ_ONLY, READ_ONLY]), [true]);
        assert_eq!(online(&[READ_ONLY, OFFLINE]), [false]);
        // Other bits are of no interest.
        assert_eq!(online(&[READ_ONLY | 4]), [true]);
        assert_eq!(online(&[OFFLINE | READ_ONLY]), [false; 0]);
        assert_eq!(online(&[4]), [false]);
    }

    /// The letters of a GPT disk that no record explains, and of the disk of Windows.
    fn letters(
        system_letter: Option<char>,
        names: &[(&str, u8)],
        record: impl Fn(&mut KeyTree),
    ) -> (Vec<String>, Vec<String>) {
        let mut tree = KeyTree::new("ROOT");
        for (name, partition) in names {
            let data = [GPT, &[*partition; 16]].concat();
            tree.set("MountedDevices", name, RegData::Binary(data));
        }
        record(&mut tree);
        let bytes = tree.to_bytes("SYSTEM");
        let mut notes = Vec::new();
        let view = HiveView::new(&bytes).unwrap();
        let set = ControlSet::new(1);
        let disks = with_letters(&view, &set, system_letter, &mut notes).unwrap();
        let shown = disks.0.iter().map(|d| format!("{} {}", d.id, d.read_only));
        (shown.collect(), notes)
    }

    #[test]
    fn a_disk_that_is_unknown_is_noted_unless_nothing_is_known_of_that_of_windows() {
        let names = [("\\DosDevices\\C:", 1), ("\\DosDevices\\K:", 9)];
        let known = |tree: &mut KeyTree| seen(tree, "0", 0, Some(gpt_layout(0x10, &[1])));
        let note = "the disk of drive K: cannot be determined from the registry: if it comes up offline, bring it online with diskpart";
        let none: Vec<String> = Vec::new();
        assert_eq!(
            letters(Some('C'), &names, known),
            (none.clone(), vec![note.into()])
        );
        // Windows 7 records no partitions, and of an unknown letter nothing follows.
        assert_eq!(
            letters(Some('C'), &names, |_| {}),
            (none.clone(), none.clone())
        );
        let own = "{10101010-1010-1010-1010-101010101010} false".to_string();
        assert_eq!(
            letters(None, &names, known),
            (vec![own.clone()], none.clone())
        );
        assert_eq!(letters(Some('K'), &names, known), (vec![own], none));
    }

    #[test]
    fn disks_are_looked_for_on_both_buses_and_among_disks_only() {
        let names = [("\\DosDevices\\F:", 3)];
        for (bus, model, found) in [
            ("SCSI", "DISK&Ven", true),
            ("IDE", "DiskX", true),
            ("USBSTOR", "Disk", false),
            ("SCSI", "CdRom&Ven", false),
        ] {
            let (disks, _) = letters(Some('C'), &names, |tree| {
                let key = format!("{SET}\\Enum\\{bus}\\{model}\\0\\Device Parameters\\Partmgr");
                let layout = gpt_layout(0x20, &[3]);
                tree.set(&key, "PartitionTableCache", RegData::Binary(layout));
            });
            assert_eq!(disks.len(), usize::from(found), "{bus} {model}");
        }
        for (name, letter) in [
            ("\\DosDevices\\c:", Some('C')),
            ("\\dosdevices\\Z:", Some('Z')),
            ("\\DosDevices\\1:", None),
            ("\\DosDevices\\CC:", None),
            ("\\DosDevices\\C", None),
            ("\\DosDevices\\", None),
            ("", None),
        ] {
            assert_eq!(drive_letter(name), letter, "{name}");
        }
        let id = Uuid::from_bytes([1; 16]);
        for (name, found) in [
            (format!("\\??\\Volume{}", id.braced()), Some(id)),
            (format!("\\??\\Volume{{{id}"), None),
            (format!("Volume{}", id.braced()), None),
        ] {
            assert_eq!(volume_guid(&name), found, "{name}");
        }
    }

    /// A table of MBR has the signature; of a GPT one, as many partitions as it says and holds.
    #[test]
    fn a_layout_names_the_disk_and_its_partitions() {
        let mbr = [&[0u8; 8][..], &[7, 0, 0, 1]].concat();
        assert_eq!(
            drive_layout(&mbr),
            Some((DiskId::Mbr(0x0100_0007), Vec::new()))
        );
        let of = |partitions: &[u8]| {
            partitions
                .iter()
                .map(|n| Uuid::from_bytes_le([*n; 16]))
                .collect::<Vec<_>>()
        };
        let mut gpt = gpt_layout(0x20, &[3, 4, 5]);
        let disk = DiskId::Gpt(Uuid::from_bytes_le([0x20; 16]));
        assert_eq!(drive_layout(&gpt), Some((disk, of(&[3, 4, 5]))));
        gpt[4] = 2;
        assert_eq!(drive_layout(&gpt), Some((disk, of(&[3, 4]))));
        gpt[4] = 9;
        gpt.pop();
        assert_eq!(drive_layout(&gpt), Some((disk, of(&[3, 4]))));
        gpt[0] = 2;
        assert_eq!(drive_layout(&gpt), None);
    }

    /// The letters of a disk in their order, whatever that of the records is.
    #[test]
    fn letters_are_sorted() {
        let mut tree = KeyTree::new("ROOT");
        for (letter, place) in [("Z", 1), ("E", 3), ("F", 2)] {
            let data = [[7; 4], [place; 4], [0; 4]].concat();
            let volume = format!("\\??\\Volume{}", Uuid::from_bytes([place; 16]).braced());
            for name in [format!("\\DosDevices\\{letter}:"), volume] {
                tree.set("MountedDevices", &name, RegData::Binary(data.clone()));
            }
        }
        let bytes = tree.to_bytes("SYSTEM");
        let view = HiveView::new(&bytes).unwrap();
        let disks = with_letters(&view, &ControlSet::new(1), Some('C'), &mut Vec::new()).unwrap();
        let [disk] = &disks.0[..] else {
            panic!("{} disks", disks.0.len());
        };
        let letters: Vec<_> = disk.letters.iter().map(|(letter, _)| *letter).collect();
        assert_eq!(letters, ['E', 'F', 'Z']);
        assert_eq!(disk.letters[0].1, Uuid::from_bytes([3; 16]).braced());
    }

    /// A damaged hive may have a name twice; the script stays short.
    #[test]
    fn the_first_disks_stand_for_all_of_very_many() {
        let mut tree = KeyTree::new("ROOT");
        let values = &mut tree.key_mut("MountedDevices").values;
        for disk in 0..30 {
            let data = RegData::Binary([[disk; 4], [1; 4], [0; 4]].concat());
            let name = format!("\\DosDevices\\{}:", char::from(b'A' + disk % 26));
            values.push((name, data.to_value()));
        }
        let bytes = tree.to_bytes("SYSTEM");
        let view = HiveView::new(&bytes).unwrap();
        let disks = with_letters(&view, &ControlSet::new(1), None, &mut Vec::new()).unwrap();
        assert_eq!(disks.0.len(), 26);
    }
}
