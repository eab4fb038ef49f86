//! VMs of several disks in memory, with Windows and its boot files on different ones.

use super::fake::FakeGuest;
use super::tests::ids;
use super::*;
use crate::demo::{self, GuestSpec, Role, WinVersion};
use crate::disk::layout::{GPT_BASIC_DATA, GPT_ESP, GPT_LDM_DATA, GPT_MSR};
use crate::guest::joined::JoinedReader;
use crate::registry::{RegData, RegOp};

/// A disk of a VM without its number.
struct Part {
    guest: FakeGuest,
    layout: DiskLayout,
}

impl Part {
    /// The partitions of the guest that `on` selects, with their files.
    fn of(spec: &GuestSpec, on: impl Fn(Role) -> bool) -> Self {
        let mut layout = demo::guest::layout(spec);
        let here: Vec<u32> = (spec.partitions().iter().filter(|p| on(p.role)))
            .map(|p| p.index)
            .collect();
        layout.partitions.retain(|p| here.contains(&p.index));
        let mut guest = FakeGuest::default();
        for partition in &layout.partitions {
            let kind = match partition.type_id.as_str() {
                GPT_ESP => FsKind::Fat,
                GPT_MSR => FsKind::Unknown,
                _ => FsKind::Ntfs,
            };
            guest.volume(partition.clone(), kind);
        }
        for file in demo::guest::files(spec).unwrap() {
            let volume = spec.partition(file.role).unwrap().index;
            if here.contains(&volume) {
                guest.file(volume, &file.path.to_string(), file.contents);
            }
        }
        Self { guest, layout }
    }

    fn windows(spec: &GuestSpec) -> Self {
        Self::of(spec, |role| role != spec.boot_role())
    }

    /// A separate disk for the boot files, with another identity.
    fn boot(spec: &GuestSpec) -> Self {
        Self::of(spec, |role| role == spec.boot_role()).named_otherwise(7)
    }

    fn named_otherwise(mut self, n: u32) -> Self {
        self.layout.disk_id = Some(match self.layout.scheme {
            Scheme::Mbr => format!("{n:#010x}"),
            _ => format!("00000000-0000-0000-0000-{n:012}"),
        });
        if self.layout.scheme == Scheme::Gpt {
            for partition in &mut self.layout.partitions {
                partition.guid = Some(format!("00000000-0000-0000-{n:04}-{:012}", partition.index));
            }
        }
        self
    }

    fn data(scheme: Scheme, type_id: &str) -> Self {
        let partition = super::tests::partition(1, type_id, false);
        let mut guest = FakeGuest::default();
        guest.volume(partition.clone(), FsKind::Ntfs);
        let layout = DiskLayout {
            scheme,
            sector_size: 512,
            disk_id: None,
            partitions: vec![partition],
        };
        Self { guest, layout }
    }
}

fn look(parts: &[Part], root: Option<&str>) -> Result<Inspection, InspectError> {
    let id = |i| DiskId::nth(i, parts.len());
    let readers = parts.iter().enumerate();
    let guest = JoinedReader::new(
        readers
            .map(|(i, part)| (id(i), &part.guest as &dyn GuestRead))
            .collect(),
    );
    let disks: Vec<Disk> = (parts.iter().enumerate())
        .map(|(i, part)| Disk {
            id: id(i),
            layout: part.layout.clone(),
            source: SourceFacts {
                path: format!("disk-{}.vmdk", i + 1),
                format: "vmdk".into(),
                virtual_size_bytes: 1 << 30,
            },
        })
        .collect();
    let options = InspectOptions {
        root: root.map(str::to_string),
        ..InspectOptions::default()
    };
    if let Ok(Some(roles)) = roles(&guest, &disks, root) {
        // The preliminary look at the disks agrees with the inspection.
        let seen = inspect(&guest, &disks, &options)?.inspection;
        let marked = |what: fn(&DiskFacts) -> bool| {
            let found = seen.disks.iter().find(|d| what(d));
            found.map(|d| d.index)
        };
        assert_eq!(marked(|d| d.windows), Some(roles.system.number()));
        if let Some(boot) = marked(|d| d.boot_files) {
            assert_eq!(boot, roles.boot.number());
        }
    }
    inspect(&guest, &disks, &options).map(|survey| survey.inspection)
}

fn uefi() -> GuestSpec {
    GuestSpec::new(WinVersion::Server2022)
}

fn bios() -> GuestSpec {
    GuestSpec::new(WinVersion::Win7)
}

#[test]
fn boot_files_on_another_disk_are_found() {
    for spec in [uefi(), bios()] {
        let boot_index = spec.partition(spec.boot_role()).unwrap().index;
        let windows_index = spec.partition(Role::Windows).unwrap().index;
        let whole = look(&[Part::of(&spec, |_| true)], None).unwrap();
        for boot_first in [true, false] {
            let mut parts = vec![Part::boot(&spec), Part::windows(&spec)];
            if !boot_first {
                parts.reverse();
            }
            let (boot, system) = if boot_first { (1, 2) } else { (2, 1) };
            let i = look(&parts, None).unwrap();
            assert_eq!(i.firmware, whole.firmware);
            let expected = [&["boot-files-elsewhere"], &ids(&whole)[..]].concat();
            assert_eq!(ids(&i), expected, "{:#?}", i.findings);
            assert_eq!(i.source.path, format!("disk-{system}.vmdk"));
            let shown: Vec<_> = (i.disks.iter())
                .map(|d| (d.index, d.windows, d.boot_files))
                .collect();
            assert_eq!(shown, [(system, true, false), (boot, false, true)]);
            let windows = i.windows.unwrap();
            let volume =
                |disk: u32, partition| VolumeId::of(DiskId::nth(disk as usize - 1, 2), partition);
            assert_eq!(windows.system_volume, volume(system, windows_index));
            assert_eq!(windows.boot_disk.number(), boot);
            let found = windows.esp.or(windows.boot_volume);
            assert_eq!(found, Some(volume(boot, boot_index)));
            assert_eq!(windows.boot.store, found);
            let letter = whole.windows.as_ref().unwrap().drive_letter;
            assert_eq!(windows.drive_letter, letter);
        }
        let alone = look(&[Part::windows(&spec)], None).unwrap();
        assert!(ids(&alone).contains(&"no-boot-manager"));
    }
}

#[test]
fn the_boot_files_that_name_windows_are_taken() {
    let spec = uefi();
    let (here, other) = (|| Part::of(&spec, |_| true), || Part::boot(&spec));
    // A Windows disk whose own boot files are of another VM.
    let foreign = || {
        let mut part = here();
        let store = demo::bcd::bytes(&bios()).unwrap();
        let esp = spec.partition(Role::Esp).unwrap().index;
        part.guest.file(esp, "EFI/Microsoft/Boot/BCD", store);
        part
    };
    let stale = || {
        let mut part = Part::of(&spec, |role| role == Role::Esp).named_otherwise(9);
        let store = demo::bcd::bytes(&bios()).unwrap();
        let esp = spec.partition(Role::Esp).unwrap().index;
        part.guest.file(esp, "EFI/Microsoft/Boot/BCD", store);
        part
    };
    let cases = [
        ("own, and others that name it too", vec![other(), here()], 2),
        (
            "own that name nothing, others that do",
            vec![other(), foreign()],
            1,
        ),
        ("none names it", vec![stale(), foreign()], 2),
        (
            "of two others",
            vec![stale(), other(), Part::windows(&spec)],
            2,
        ),
        (
            "of two others, none names it",
            vec![stale(), stale(), Part::windows(&spec)],
            1,
        ),
    ];
    for (what, parts, disk) in cases {
        let i = look(&parts, None).unwrap();
        assert_eq!(i.windows.unwrap().boot_disk.number(), disk, "{what}");
    }
}

#[test]
fn a_boot_entry_is_repaired_across_disks() {
    for spec in [uefi(), bios()] {
        // Windows is on a disk with another identity than in the entry.
        let parts = [Part::boot(&spec), Part::windows(&spec).named_otherwise(3)];
        let i = look(&parts, None).unwrap();
        let finding = i.findings.iter().find(|f| f.id == "bcd-device").unwrap();
        assert!(
            finding.message.contains("not on any of the 2 disks"),
            "{}",
            finding.message
        );
        let repair = i.windows.unwrap().boot.device_repair;
        assert_eq!(repair.len(), 2);
        let partition = &parts[1].layout.partitions;
        let index = spec.partition(Role::Windows).unwrap().index;
        let partition = partition.iter().find(|p| p.index == index).unwrap();
        for op in repair {
            let RegOp::Set { data, .. } = op else {
                panic!("{op:?}")
            };
            let RegData::Binary(bytes) = data else {
                panic!("{data:?}")
            };
            match parts[1].layout.scheme {
                Scheme::Mbr => {
                    assert_eq!(bytes[32..40], partition.start_bytes.to_le_bytes());
                    assert_eq!(bytes[56..60], 3u32.to_le_bytes());
                }
                _ => {
                    let guid = |text: &Option<String>| {
                        uuid::Uuid::parse_str(text.as_ref().unwrap())
                            .unwrap()
                            .to_bytes_le()
                    };
                    assert_eq!(bytes[32..48], guid(&partition.guid));
                    assert_eq!(bytes[56..72], guid(&parts[1].layout.disk_id));
                }
            }
        }
    }
}

#[test]
fn windows_on_two_disks_is_for_the_user_to_choose() {
    let spec = uefi();
    let parts = [
        Part::of(&spec, |_| true),
        Part::data(Scheme::Gpt, GPT_BASIC_DATA),
        Part::of(&spec, |_| true).named_otherwise(4),
    ];
    let volume = spec.partition(Role::Windows).unwrap().index;
    let both = format!("1/{volume}:\\Windows, 3/{volume}:\\Windows");
    for root in [
        None,
        Some("\\Windows".to_string()),
        Some(format!("{volume}:\\Windows")),
    ] {
        let error = look(&parts, root.as_deref()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("several Windows installations: {both}"),
            "{root:?}"
        );
    }
    for disk in [1, 3] {
        let root = format!("{disk}/{volume}:\\Windows");
        let i = look(&parts, Some(&root)).unwrap();
        assert_eq!(i.source.path, format!("disk-{disk}.vmdk"));
        let order: Vec<_> = i.disks.iter().map(|d| d.index).collect();
        assert_eq!(order, if disk == 1 { [1, 2, 3] } else { [3, 1, 2] });
        // Each has its own boot files.
        assert_eq!(i.windows.unwrap().boot_disk.number(), disk);
    }
    let error = look(&parts, Some(&format!("2/{volume}:\\Windows"))).unwrap_err();
    assert!(matches!(error, InspectError::NoSuchRoot { .. }), "{error}");
    assert!(error.to_string().ends_with(&format!("found: {both}")));
}

#[test]
fn only_disks_that_are_changed_have_blockers() {
    let spec = uefi();
    let dynamic = || Part::data(Scheme::Gpt, GPT_LDM_DATA);
    let i = look(&[dynamic(), Part::of(&spec, |_| true)], None).unwrap();
    assert!(i.blockers().is_empty(), "{:#?}", i.findings);
    let mut boot = Part::boot(&spec);
    boot.layout.partitions.extend(dynamic().layout.partitions);
    let last = boot.layout.partitions.last_mut().unwrap();
    last.index = 9;
    let i = look(&[boot, Part::windows(&spec)], None).unwrap();
    let found = i.findings.iter().find(|f| f.id == "dynamic-disk").unwrap();
    assert_eq!(found.evidence, "disk 1, partition 9");
}

/// `boot.ini` counts disks: first the boot disk, then the others in order.
#[test]
fn boot_ini_on_a_vm_of_several_disks() {
    let spec = GuestSpec::new(WinVersion::Server2003);
    let with = |default: &str| {
        let mut part = Part::of(&spec, |_| true);
        let volume = spec.partition(spec.boot_role()).unwrap().index;
        let ini = format!("[boot loader]\r\ndefault={default}\r\n[operating systems]\r\n");
        part.guest.file(volume, "boot.ini", ini.into_bytes());
        part
    };
    let data = || Part::data(Scheme::Mbr, "0x07");
    let said = |parts: &[Part]| {
        let seen = look(parts, None).unwrap();
        let found = seen.findings.iter().find(|f| f.id == "boot-ini-device");
        found.map(|f| f.message.clone())
    };
    let on = |n: u32, p: u32| {
        format!(
            "multi(0)disk(0)rdisk({n})partition({p})\\{}",
            spec.windows_dir
        )
    };
    // The disk with boot files and Windows is rdisk(0), whatever its position in the source.
    assert_eq!(said(&[with(&on(0, 1)), data()]), None);
    assert_eq!(said(&[data(), with(&on(0, 1))]), None);
    let missing = said(&[with(&on(1, 1))]).unwrap();
    assert!(
        missing.contains("rdisk(1), and the VM has one disk"),
        "{missing}"
    );
    // A data disk exists, without a Windows on it.
    let data_only = said(&[with(&on(1, 1)), data()]).unwrap();
    assert!(data_only.contains("which is no Windows"), "{data_only}");
    let third = said(&[with(&on(2, 1)), data()]).unwrap();
    assert!(third.contains("the VM has 2 disks"), "{third}");
    let partition = said(&[with(&on(0, 2))]).unwrap();
    assert!(
        partition.contains("partition(2) of a disk with 1 partitions"),
        "{partition}"
    );
    let scsi = said(&[with("scsi(0)disk(0)rdisk(0)partition(1)\\WINDOWS")]).unwrap();
    assert!(scsi.contains("scsi() form"), "{scsi}");
    let folder = said(&[with("multi(0)disk(0)rdisk(0)partition(1)\\WINNT.OLD")]).unwrap();
    assert!(folder.contains("WINNT.OLD"), "{folder}");
    let id = Part::of(&spec, |_| true).layout.disk_id.unwrap();
    let signed = |id: &str| {
        format!(
            "signature({})disk(0)rdisk(0)partition(1)\\{}",
            &id[2..],
            spec.windows_dir
        )
    };
    assert_eq!(said(&[with(&signed(&id))]), None);
    assert!(
        said(&[with(&signed("0xdeadbeef"))])
            .unwrap()
            .contains("0xdeadbeef")
    );
}
