//! What each fault that no edit repairs means for the user: code, checks and what would help.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::*;
use crate::boot_path::Missing;
use crate::demo::{GuestSpec, WinVersion};
use crate::guest::GuestPath;
use crate::testing::MemoryGuest;

use DiskBus::{Ide, Sata, VirtioBlk, VirtioScsi};

fn inspection(version: WinVersion) -> Inspection {
    static KNOWN: Mutex<BTreeMap<WinVersion, Inspection>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let look = || {
        let guest = MemoryGuest::of(GuestSpec::new(version));
        guest.look(&[], |_, survey| survey.inspection.clone())
    };
    known.entry(version).or_insert_with(look).clone()
}

/// A guest whose controllers are all ready but one.
fn after(version: WinVersion, controller: DiskBus, faults: Vec<BootFault>) -> Inspection {
    let mut after = inspection(version);
    for (bus, path) in &mut after.controllers {
        path.ready = *bus != controller;
        path.faults.clear();
    }
    let path = after.controllers.get_mut(&controller).unwrap();
    path.faults = faults;
    path.reason = "the reason".into();
    after
}

fn file() -> GuestPath {
    GuestPath::parse("\\Windows\\x.sys").unwrap()
}

fn import() -> Missing {
    Missing {
        importer: file(),
        name: "storport.sys".into(),
        path: None,
        state: ImageState::Missing,
    }
}

type Of = fn(String) -> BootFault;

/// Of a service: code of the blocker, the check of a controller's driver, and words of the reason.
const OF_A_SERVICE: [(Of, &str, &str, &str); 10] = [
    (
        |service| BootFault::NotInstalled {
            service,
            file: true,
        },
        "boot-driver-missing",
        "controller-service",
        "is not installed",
    ),
    (
        |service| BootFault::NotBootStart {
            service,
            start: 3,
            start_override: None,
        },
        "boot-driver-start",
        "controller-service",
        "Start=3",
    ),
    (
        |service| BootFault::NotADriver { service, kind: 16 },
        "boot-driver-damaged",
        "controller-service",
        "Type=16",
    ),
    (
        |service| BootFault::Mistyped {
            service,
            value: "Group",
        },
        "boot-driver-damaged",
        "controller-service",
        "Group of the service",
    ),
    (
        |service| BootFault::Deleted { service },
        "boot-driver-damaged",
        "controller-service",
        "DeleteFlag",
    ),
    (
        |service| BootFault::PathForm {
            service,
            path: file(),
            decides: true,
        },
        "boot-driver-file",
        "controller-service",
        "boot loader of this Windows requires",
    ),
    (
        |service| BootFault::FileDeleted {
            service,
            path: file(),
        },
        "boot-driver-file",
        "controller-image",
        "deletes \\Windows\\x.sys",
    ),
    (
        |service| BootFault::Import {
            service,
            missing: import(),
        },
        "boot-driver-file",
        "controller-image",
        "storport.sys, which \\Windows\\x.sys imports from, is missing",
    ),
    (
        |service| BootFault::Image {
            service,
            path: Some(file()),
            state: ImageState::Missing,
        },
        "boot-driver-file",
        "controller-image",
        "\\Windows\\x.sys is missing",
    ),
    (
        |service| BootFault::Image {
            service,
            path: None,
            state: ImageState::Unreadable,
        },
        "boot-driver-file",
        "controller-image",
        "its file is not a usable driver file",
    ),
];

/// Another controller is a remedy only for a driver that is of one controller alone.
#[test]
fn a_fault_of_a_driver_is_told_by_the_check_that_looks_at_it() {
    for (fault, code, check, reason) in OF_A_SERVICE {
        for (version, service, system) in [
            (WinVersion::Win10, "storahci", None),
            (WinVersion::Win10, "pci", Some("bus-drivers")),
            (WinVersion::Win10, "ACPI", Some("bus-drivers")),
            (WinVersion::Win10, "VolMgr", Some("volume-drivers")),
            (WinVersion::Win10, "disk", Some("volume-drivers")),
            (WinVersion::Win10, "ftdisk", None),
            (WinVersion::Xp, "ftdisk", Some("volume-drivers")),
            (WinVersion::Xp, "volmgr", None),
            (WinVersion::Win10, boot_path::NTFS, Some("kernel-files")),
            (WinVersion::Win10, boot_path::KERNEL, Some("kernel-files")),
        ] {
            let after = after(version, Sata, vec![fault(service.to_string())]);
            let left = remaining(&after, &[VirtioBlk, Sata], VirtioBlk);
            let [one] = &left[..] else {
                panic!("{left:?}");
            };
            let (blocker, checks) = (&one.blocker, &one.checks);
            assert_eq!(blocker.code, code, "{service}");
            assert!(blocker.reason.contains(reason), "{blocker:?}");
            assert!(blocker.reason.contains(service), "{blocker:?}");
            assert_eq!(*checks, [system.unwrap_or(check), "boot-path"], "{service}");
            let elsewhere = blocker.remedy.contains("or convert with --bootstrap");
            assert_eq!(elsewhere, system.is_none(), "{blocker:?}");
        }
    }
}

#[test]
fn a_fault_that_is_of_no_driver_has_a_code_of_its_own() {
    let ids = || vec!["PCI\\VEN_1AF4&DEV_1042".to_string(), "other".to_string()];
    let unbound = |decides| BootFault::NotBound {
        ids: ids(),
        decides,
        spare: None,
    };
    let filter = |decides| BootFault::DeadFilter {
        class: "DiskDrive",
        list: "LowerFilters",
        service: "gone".into(),
        decides,
    };
    for (controller, fault, code, checks, remedy) in [
        (
            VirtioScsi,
            unbound(true),
            "virtio-unbound",
            &["controller-bound", "boot-path"][..],
            "--virtio-iso",
        ),
        (
            Sata,
            filter(true),
            "class-filters",
            &["class-filters", "boot-path"],
            "remove the filter",
        ),
        (
            Sata,
            BootFault::Damaged("x".into()),
            "hive-damaged",
            &["boot-path"],
            "shut it down cleanly",
        ),
        // Advice explains nothing: the controller is named as a whole.
        (Sata, unbound(false), "boot-path", &["boot-path"], "repair"),
        (Sata, filter(false), "boot-path", &["boot-path"], "repair"),
        (
            Sata,
            BootFault::IdleOverride {
                service: "disk".into(),
                value: 3,
            },
            "boot-path",
            &["boot-path"],
            "repair",
        ),
        (
            Sata,
            BootFault::Instance {
                path: "PCI\\x".into(),
                service: None,
            },
            "boot-path",
            &["boot-path"],
            "repair",
        ),
        (
            Sata,
            BootFault::DeviceDisabled {
                path: "PCI\\x".into(),
                flags: 1,
            },
            "boot-path",
            &["boot-path"],
            "repair",
        ),
        (
            Sata,
            BootFault::PathForm {
                service: "disk".into(),
                path: file(),
                decides: false,
            },
            "boot-path",
            &["boot-path"],
            "repair",
        ),
    ] {
        let after = after(WinVersion::Win10, controller, vec![fault.clone()]);
        let left = remaining(&after, &[controller], VirtioBlk);
        let [one] = &left[..] else {
            panic!("{left:?}");
        };
        assert_eq!(one.blocker.code, code, "{fault:?}");
        assert_eq!(one.checks, checks, "{fault:?}");
        assert!(one.blocker.remedy.contains(remedy), "{one:?}");
    }
}

/// A first boot from another controller, or none, as far as that one is ready.
#[test]
fn the_other_ways_to_a_first_boot_are_those_that_are_ready() {
    let all = [Sata, Ide, VirtioBlk, VirtioScsi];
    for (controller, production, ready, expected) in [
        (
            Sata,
            VirtioBlk,
            &all[..],
            "--bootstrap ide or --bootstrap none",
        ),
        (Ide, VirtioBlk, &all, "--bootstrap sata or --bootstrap none"),
        (Ide, VirtioScsi, &[VirtioScsi], "--bootstrap none"),
        (Ide, VirtioBlk, &[VirtioScsi], ""),
        (Sata, VirtioBlk, &[Ide], "--bootstrap ide"),
        // Without a driver for the disk that stays there is nothing else to start from.
        (VirtioBlk, VirtioBlk, &all, ""),
    ] {
        let fault = BootFault::Deleted {
            service: "x".into(),
        };
        let mut after = after(WinVersion::Win7, controller, vec![fault]);
        for (bus, path) in &mut after.controllers {
            path.ready = *bus != controller && ready.contains(bus);
        }
        let left = remaining(&after, &[controller], production);
        let remedy = &left[0].blocker.remedy;
        let found = remedy
            .split_once("or convert with ")
            .map_or("", |(_, rest)| rest);
        assert_eq!(found, expected, "{controller:?} {ready:?}: {remedy}");
    }
    let unbound = BootFault::NotBound {
        ids: Vec::new(),
        decides: true,
        spare: None,
    };
    let mut after = after(WinVersion::Win7, Sata, vec![unbound]);
    let remedy = |after: &Inspection| {
        let left = remaining(after, &[Sata], VirtioBlk);
        left[0].blocker.remedy.clone()
    };
    assert_eq!(
        remedy(&after),
        "convert with --bootstrap ide or --bootstrap none"
    );
    after
        .controllers
        .values_mut()
        .for_each(|path| path.ready = false);
    assert!(remedy(&after).ends_with("no other --bootstrap would do"));
}

/// The controllers of this conversion count, each that is not ready; what two of them say alike is said
/// once.
#[test]
fn each_fault_of_the_wanted_controllers_is_named_once() {
    let deleted = |service: &str| BootFault::Deleted {
        service: service.into(),
    };
    let mut after = after(
        WinVersion::Win10,
        Sata,
        vec![deleted("pci"), deleted("disk")],
    );
    for bus in [VirtioBlk, VirtioScsi, Ide] {
        let path = after.controllers.get_mut(&bus).unwrap();
        path.ready = bus == Ide;
        path.faults = vec![deleted("pci"), deleted(bus.name())];
    }
    let left = remaining(&after, &[VirtioBlk, Sata, Ide], VirtioBlk);
    let reasons: Vec<_> = left.iter().map(|one| one.blocker.reason.as_str()).collect();
    assert_eq!(
        reasons,
        ["pci", "virtio-blk", "disk"]
            .map(|service| format!("the service {service} is marked for deletion (DeleteFlag)"))
    );
}

#[test]
fn a_file_for_another_processor_is_told_with_that_of_windows() {
    let fault = BootFault::Import {
        service: "viostor".into(),
        missing: Missing {
            path: Some(file()),
            state: ImageState::Present {
                machine: Some(Arch::Arm64.pe_machine()),
            },
            ..import()
        },
    };
    for (arch, name) in [
        (Some(Arch::X86), "Windows is x86"),
        (Some(Arch::Amd64), "Windows is x86_64"),
        (None, "Windows is x86_64"),
    ] {
        let mut after = after(WinVersion::Win7, VirtioBlk, vec![fault.clone()]);
        after.os.arch = arch;
        let left = remaining(&after, &[VirtioBlk], VirtioBlk);
        let reason = &left[0].blocker.reason;
        assert!(reason.ends_with(name), "{reason}");
    }
}

/// Each fault of a driver of the controller and of one of every boot: reason and remedy in full.
#[test]
fn what_is_said_of_each_fault_that_stays() {
    let mut text = String::new();
    let mut say = |version, controller, fault: BootFault| {
        let mut after = after(version, controller, vec![fault.clone()]);
        // Another way is proposed only where one is ready.
        after.controllers.get_mut(&VirtioScsi).unwrap().ready = false;
        let left = remaining(&after, &[controller], VirtioBlk);
        for one in left {
            let Blocker {
                code,
                reason,
                remedy,
            } = one.blocker;
            text.push_str(&format!(
                "{code} {:?}\n  {reason}\n  {remedy}\n",
                one.checks
            ));
        }
    };
    for (of, ..) in OF_A_SERVICE {
        for service in ["storahci", "Pci", "acpi", "volmgr", "Ntfs", "the kernel"] {
            say(WinVersion::Win10, Sata, of(service.into()));
        }
    }
    for state in [
        ImageState::Missing,
        ImageState::Unreadable,
        ImageState::Present { machine: None },
    ] {
        for path in [None, Some(file())] {
            let service = "viostor".into();
            say(
                WinVersion::Win7,
                VirtioBlk,
                BootFault::Image {
                    service,
                    path,
                    state,
                },
            );
        }
    }
    for controller in [Sata, Ide, VirtioBlk, VirtioScsi] {
        say(
            WinVersion::Win7,
            controller,
            BootFault::NotBound {
                ids: vec!["FIRST".into(), "SECOND".into()],
                decides: true,
                spare: None,
            },
        );
    }
    say(
        WinVersion::Win10,
        Sata,
        BootFault::DeadFilter {
            class: "hdc",
            list: "UpperFilters",
            service: "gone".into(),
            decides: true,
        },
    );
    say(WinVersion::Win10, Sata, BootFault::Damaged("why".into()));
    // Advice alone: what the boot path says is the reason.
    say(
        WinVersion::Win10,
        Ide,
        BootFault::IdleOverride {
            service: "x".into(),
            value: 3,
        },
    );
    insta::assert_snapshot!("every-fault", text);
}
