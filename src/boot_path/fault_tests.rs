//! Guests with two faults at once, and facts that stand in a less usual place.

use super::loader_tests::{Guest, SET, SEVEN, TEN, XP, service};
use super::walk_tests::new_faults;
use super::*;
use crate::registry::RegData;

use DiskBus::{Ide, VirtioBlk};

fn multi(names: &[&str]) -> RegData {
    RegData::MultiSz(names.iter().map(ToString::to_string).collect())
}

/// A repair that sets the start type must not leave a missing file behind.
#[test]
fn a_driver_that_starts_late_and_has_no_file_has_both_faults() {
    let mut guest = Guest::new(TEN);
    guest.tree.dword(&service("disk"), "Start", 3);
    guest.files.remove("system32\\drivers\\disk.sys").unwrap();
    let faults = new_faults(&guest, VirtioBlk);
    let path = GuestPath::parse("\\Windows\\system32\\drivers\\disk.sys").unwrap();
    assert_eq!(
        faults,
        [
            BootFault::NotBootStart {
                service: "disk".into(),
                start: 3,
                start_override: None,
            },
            BootFault::Image {
                service: "disk".into(),
                path: Some(path),
                state: ImageState::Missing,
            },
        ]
    );
}

#[test]
fn every_value_of_the_wrong_type_is_named() {
    let mut guest = Guest::new(TEN);
    for value in ["Start", "ErrorControl"] {
        guest.tree.sz(&service("disk"), value, "1");
    }
    for value in ["Group", "ImagePath"] {
        guest.tree.dword(&service("disk"), value, 1);
    }
    let mut named = Vec::new();
    for fault in new_faults(&guest, VirtioBlk) {
        match fault {
            BootFault::Mistyped { service, value } if service == "disk" => named.push(value),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(named, ["Start", "ErrorControl", "Group", "ImagePath"]);
}

/// The service manager deletes a key whether it has a driver or not.
#[test]
fn a_key_that_is_marked_for_deletion_is_told_without_a_driver_too() {
    let mut guest = Guest::new(TEN);
    let key = guest.tree.key_mut(&service("disk"));
    key.values.clear();
    guest.tree.dword(&service("disk"), "DeleteFlag", 1);
    let faults = new_faults(&guest, VirtioBlk);
    let service = || "disk".to_string();
    let deleted = BootFault::Deleted { service: service() };
    let missing = BootFault::NotInstalled {
        service: service(),
        file: true,
    };
    assert_eq!(faults, [deleted, missing]);
}

#[test]
fn an_overridden_driver_is_not_said_to_start_at_boot() {
    let starts = |guest: &Guest| {
        let steps = guest.evaluate(VirtioBlk).steps;
        let text = "disk starts at boot from \\Windows\\system32\\drivers\\disk.sys";
        steps.iter().any(|step| step.ok && step.text == text)
    };
    let mut guest = Guest::new(TEN);
    assert!(starts(&guest));
    let key = format!("{}\\StartOverride", service("disk"));
    guest.tree.dword(&key, "0", 3);
    assert!(!starts(&guest));
}

/// A file that Windows deletes at its next start is missing at the one after it, whoever loads it.
#[test]
fn the_kernel_and_the_file_system_must_not_be_deleted_either() {
    for (file, name) in [
        ("system32\\ntoskrnl.exe", KERNEL),
        ("system32\\drivers\\ntfs.sys", NTFS),
        ("system32\\drivers\\disk.sys", "disk"),
    ] {
        let mut guest = Guest::new(TEN);
        let source = format!("\\??\\C:\\Windows\\{file}");
        let key = format!("{SET}\\Control\\Session Manager");
        let value = "PendingFileRenameOperations";
        guest.tree.set(&key, value, multi(&[&source, ""]));
        let path = guest.evaluate(VirtioBlk);
        let fault = BootFault::FileDeleted {
            service: name.into(),
            path: GuestPath::parse(&format!("\\Windows\\{file}")).unwrap(),
        };
        assert!(path.faults.contains(&fault), "{file}: {:?}", path.faults);
        assert!(!path.ready, "{file}");
    }
}

#[test]
fn a_missing_class_hides_no_filter_of_another() {
    for gone in [SCSI_ADAPTER, HDC] {
        let mut guest = Guest::new(TEN);
        let class = format!("{SET}\\Control\\Class");
        guest.tree.remove(&format!("{class}\\{gone}")).unwrap();
        let key = format!("{class}\\{SYSTEM}");
        guest.tree.set(&key, "LowerFilters", multi(&["gone"]));
        assert!(!guest.evaluate(VirtioBlk).ready, "{gone}");
    }
}

/// The CriticalDeviceDatabase has the class in capitals, and the key of the class has it in small
/// letters.
#[test]
fn the_class_of_the_controller_is_found_in_any_case() {
    let mut guest = Guest::new(SEVEN);
    let database = format!("{SET}\\Control\\CriticalDeviceDatabase");
    let entry = format!("{database}\\PCI#VEN_1AF4&DEV_1042");
    guest
        .tree
        .sz(&entry, "ClassGUID", &SCSI_ADAPTER.to_uppercase());
    assert!(guest.evaluate(VirtioBlk).ready);
    let key = format!("{SET}\\Control\\Class\\{SCSI_ADAPTER}");
    guest.tree.set(&key, "UpperFilters", multi(&["gone"]));
    assert!(!guest.evaluate(VirtioBlk).ready);
}

#[test]
fn of_two_drivers_for_ide_that_of_intel_is_bound() {
    for nt in [XP, SEVEN] {
        let mut guest = Guest::new(nt);
        let database = format!("{SET}\\Control\\CriticalDeviceDatabase");
        guest.tree.remove(&database).unwrap();
        let spare = |guest: &Guest| {
            let faults = guest.evaluate(Ide).faults;
            faults.into_iter().find_map(|fault| match fault {
                BootFault::NotBound { spare, .. } => Some(spare),
                _ => None,
            })
        };
        guest.file("system32\\drivers\\pciide.sys", &["ntoskrnl.exe"]);
        assert_eq!(spare(&guest), Some(Some("intelide")), "{nt:?}");
        // Windows can read a file that hyper2kvm cannot.
        let compressed = ImageState::Present { machine: None };
        let file = "system32\\drivers\\intelide.sys";
        guest.files.insert(file.into(), compressed.into());
        assert_eq!(spare(&guest), Some(Some("intelide")), "{nt:?}");
    }
}

/// The transitional form of the device is not the one of the new VM.
#[test]
fn the_driver_of_the_other_form_is_not_that_of_the_controller() {
    let mut guest = Guest::new(SEVEN);
    let database = format!("{SET}\\Control\\CriticalDeviceDatabase");
    let old = format!("{database}\\PCI#VEN_1AF4&DEV_1001");
    guest
        .tree
        .sz(&old, "Service", "oldstor")
        .sz(&old, "ClassGUID", HDC);
    let path = guest.evaluate(VirtioBlk);
    assert!(path.ready, "{}", path.reason);
    assert_eq!(path.service.as_deref(), Some("viostor"));
    // XP has that form only.
    guest.nt = XP;
    let path = guest.evaluate(VirtioBlk);
    assert_eq!(path.service.as_deref(), Some("oldstor"));
}

#[test]
fn a_device_may_be_switched_off_and_have_another_driver() {
    let mut guest = Guest::new(TEN);
    let path = "PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01\\3&1";
    let key = format!("{SET}\\Enum\\{path}");
    guest
        .tree
        .dword(&key, "ConfigFlags", 1)
        .sz(&key, "ClassGUID", SCSI_ADAPTER)
        .sz(&key, "Service", "other");
    let off = BootFault::DeviceDisabled {
        path: path.into(),
        flags: 1,
    };
    let other = BootFault::Instance {
        path: path.into(),
        service: Some("other".into()),
    };
    assert_eq!(new_faults(&guest, VirtioBlk), [off, other]);
}
