//! Problems that keep a loader from starting Windows are repaired by the plan or block it. Each row
//! plans for a guest in memory, applies the plan's edits and files to that guest, and inspects it
//! again.

use crate::demo::WinVersion;
use crate::registry::RegData;
use crate::testing::{MemoryGuest as Guest, bootstrap, driver_source};

const SET: &str = "ControlSet001";

fn service(name: &str) -> String {
    format!("{SET}\\Services\\{name}")
}

type Change = fn(&mut Guest);

fn instance(guest: &mut Guest, service: &str, flags: u32) {
    let key = format!("{SET}\\Enum\\PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01\\3&1&0&20");
    let class = "{4d36e97b-e325-11ce-bfc1-08002be10318}";
    guest.system.sz(&key, "ClassGUID", class);
    guest.system.sz(&key, "Service", service);
    guest.system.dword(&key, "ConfigFlags", flags);
}

fn no_ide(guest: &mut Guest) {
    let cdd = format!("{SET}\\Control\\CriticalDeviceDatabase");
    let ids: Vec<String> = guest
        .system
        .get(&cdd)
        .unwrap()
        .keys
        .keys()
        .cloned()
        .collect();
    for id in ids {
        let lower = id.to_lowercase();
        if lower.contains("ide_channel") || lower.contains("8086") || lower.contains("cc_0101") {
            guest.system.remove(&format!("{cdd}\\{id}"));
        }
    }
}

use WinVersion::{Server2003, Server2022, Win7, Win10, Win11, Xp};

/// After the planned actions the disk is ready and every check passes.
#[test]
fn the_plan_mends_what_stops_a_loader() {
    let cases: &[(&str, &[WinVersion], Change)] = &[
        (
            "unchanged",
            &[Xp, Server2003, Win7, Win10, Win11, Server2022],
            |_| {},
        ),
        (
            "marked for deletion, new driver",
            &[Xp, Win7, Win10, Win11],
            |g| {
                for (value, number) in [("Start", 0), ("Type", 1), ("DeleteFlag", 1)] {
                    g.system.dword(&service("viostor"), value, number);
                }
            },
        ),
        (
            "marked for deletion, driver of Windows",
            &[Xp, Win7, Win10, Win11],
            |g| {
                g.system.dword(&service("disk"), "DeleteFlag", 1);
            },
        ),
        (
            "its file is deleted at the next start",
            &[Xp, Win7, Win10],
            |g| {
                for (value, number) in [("Start", 3), ("Type", 1)] {
                    g.system.dword(&service("viostor"), value, number);
                }
                let file = |name: &str| format!("\\??\\C:\\WINDOWS\\system32\\drivers\\{name}.sys");
                let list = ["viostor", "vioscsi", "disk"].map(|name| [file(name), String::new()]);
                g.system.set(
                    &format!("{SET}\\Control\\Session Manager"),
                    "PendingFileRenameOperations",
                    RegData::MultiSz(list.concat()),
                );
            },
        ),
        ("group of the wrong type", &[Xp, Win7, Win10], |g| {
            g.system.dword(&service("pci"), "Group", 1);
            g.system.dword(&service("disk"), "Group", 1);
        }),
        ("ErrorControl of the wrong type", &[Xp, Win7, Win10], |g| {
            g.system.sz(&service("disk"), "ErrorControl", "1");
        }),
        (
            "Start and Type of the wrong type",
            &[Xp, Win7, Win10],
            |g| {
                let old = RegData::Binary(vec![0, 0, 0, 0]);
                g.system.set(&service("disk"), "Start", old);
                g.system.sz(&service("partmgr"), "Type", "1");
            },
        ),
        ("ImagePath of the wrong type", &[Xp, Win7, Win10], |g| {
            g.system.dword(&service("disk"), "ImagePath", 1);
        }),
        ("ImagePath from SystemRoot", &[Xp, Server2003], |g| {
            for name in ["disk", "atapi"] {
                let path = format!("\\SystemRoot\\System32\\drivers\\{name}.sys");
                g.system.sz(&service(name), "ImagePath", &path);
            }
        }),
        ("ImagePath with a drive letter", &[Xp, Win7, Win10], |g| {
            let path = "\\??\\C:\\Windows\\System32\\drivers\\disk.sys";
            g.system.sz(&service("disk"), "ImagePath", path);
        }),
        ("an entry without a class", &[Xp], |g| {
            let key = format!("{SET}\\Control\\CriticalDeviceDatabase\\pci#ven_8086&dev_7010");
            let key = g.system.key_mut(&key);
            key.values.retain(|(name, _)| name != "ClassGUID");
        }),
        ("installed on SCSI", &[Xp, Server2003], no_ide),
        (
            "installed on SCSI, without the services",
            &[Xp, Server2003],
            |g| {
                no_ide(g);
                g.system.remove(&service("atapi"));
                g.system.remove(&service("intelide"));
            },
        ),
        ("a device that is switched off", &[Win7, Win10], |g| {
            instance(g, "viostor", 1)
        }),
        ("dead filters", &[Xp, Win7, Win10], |g| {
            let class = "{4d36e97d-e325-11ce-bfc1-08002be10318}";
            let key = format!("{SET}\\Control\\Class\\{class}");
            let names = RegData::MultiSz(vec!["gone".into()]);
            g.system.set(&key, "UpperFilters", names);
        }),
    ];
    let driver_source = driver_source();
    for (what, versions, change) in cases {
        for version in *versions {
            let mut guest = Guest::new(*version);
            change(&mut guest);
            let prepared = guest.prepare(&driver_source, Some(bootstrap(*version)));
            assert_eq!(prepared.plan.blockers, [], "{version:?} {what}");
            let checks = guest.converted(&prepared, &driver_source);
            let bad: Vec<_> = checks
                .iter()
                .filter(|c| !c.ok && c.id != "transitional-ids")
                .map(|c| format!("{} {}", c.id, c.message))
                .collect();
            assert_eq!(bad, [""; 0], "{version:?} {what}");
            assert!(crate::check::is_ready(&checks));
        }
    }
}

/// The plan has a blocker with this id, this text and a remedy that helps.
#[test]
fn what_cannot_be_mended_blocks_the_plan() {
    let cases: &[(&[WinVersion], Change, &str, &str, &str)] = &[
        (
            &[Win7, Win10, Win11],
            |g| g.without("storport.sys"),
            "boot-driver-file",
            "viostor: storport.sys, which",
            "sfc /scannow",
        ),
        (
            &[Xp, Server2003],
            |g| g.without("scsiport.sys"),
            "boot-driver-file",
            "SCSIPORT.SYS, which",
            "sfc /scannow",
        ),
        (
            &[Xp, Win7, Win10],
            |g| g.without("ntfs.sys"),
            "boot-driver-file",
            "tfs.sys is missing",
            "sfc /scannow",
        ),
        (
            &[Xp, Win7, Win10],
            |g| g.without("classpnp.sys"),
            "boot-driver-file",
            "CLASSPNP.SYS, which",
            "sfc /scannow",
        ),
        (
            &[Xp, Server2003],
            |g| {
                no_ide(g);
                g.without("intelide.sys");
                g.without("pciide.sys");
            },
            "bootstrap-unbound",
            "no driver of this Windows is bound to the ide controller",
            "--bootstrap none",
        ),
        (
            &[Xp],
            |g| g.without("pciidex.sys"),
            "boot-driver-file",
            "PCIIDEX.SYS, which",
            "--bootstrap none",
        ),
        (
            &[Win10],
            |g| g.without("storahci.sys"),
            "boot-driver-file",
            "storahci.sys is missing",
            "--bootstrap none",
        ),
        (
            &[Win10],
            |g| drop(g.system.remove(&service("volmgrx"))),
            "boot-driver-missing",
            "volmgrx",
            "Windows needs volmgrx on every controller",
        ),
    ];
    let driver_source = driver_source();
    for (versions, change, id, message, remedy) in cases {
        for version in *versions {
            let mut guest = Guest::new(*version);
            change(&mut guest);
            let prepared = guest.prepare(&driver_source, Some(bootstrap(*version)));
            let blockers = guest.left(&prepared, &driver_source);
            let found = blockers.iter().find(|b| b.reason.contains(message));
            let found = found.unwrap_or_else(|| panic!("{version:?} {message}: {blockers:?}"));
            assert_eq!(found.code, *id, "{version:?} {message}");
            assert!(found.remedy.contains(remedy), "{found:?}");
            // No other bus helps if every boot needs the driver.
            let shared = !remedy.contains("bootstrap");
            assert!(!shared || !found.remedy.contains("bootstrap"), "{found:?}");
        }
    }
}

/// A missing IDE driver does not block a disk that needs no IDE controller.
#[test]
fn straight_to_virtio_needs_no_ide() {
    let driver_source = driver_source();
    let mut guest = Guest::new(Xp);
    no_ide(&mut guest);
    guest.without("pciidex.sys");
    let prepared = guest.prepare(&driver_source, None);
    assert_eq!(prepared.plan.blockers, []);
    let checks = guest.converted(&prepared, &driver_source);
    assert!(crate::check::is_ready(&checks), "{checks:?}");
}

/// A device that an older KVM host set up with another driver appears in the plan and in the
/// checks.
#[test]
fn a_device_of_an_older_host_is_a_warning() {
    let driver_source = driver_source();
    for version in [Win7, Win10] {
        let mut guest = Guest::new(version);
        instance(&mut guest, "other", 0);
        let prepared = guest.prepare(&driver_source, Some(bootstrap(version)));
        let named = "PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01\\3&1&0&20";
        assert_eq!(prepared.plan.blockers, []);
        assert!(prepared.plan.warnings.iter().any(|w| w.contains(named)));
        let checks = guest.converted(&prepared, &driver_source);
        let check = checks.iter().find(|c| c.id == "device-instances").unwrap();
        assert!(!check.ok && check.message.contains(named), "{check:?}");
        assert!(crate::check::is_ready(&checks));
    }
}
