//! What checks say of a guest: each text with its evidence.

use super::*;

/// The text and the evidence of a check of a sound guest after a change.
fn said(version: WinVersion, id: &str, change: impl FnOnce(&mut MemoryGuest)) -> [String; 2] {
    let mut guest = converted(version);
    change(&mut guest);
    let checks = guest.verify(&WANTED);
    let check = checks.into_iter().find(|check| check.id == id).unwrap();
    [check.message, check.evidence]
}

#[test]
fn a_fault_is_told_once_with_every_controller_that_has_it() {
    let key = format!("{SET}\\Services\\disk");
    let [text, evidence] = said(Win10, "volume-drivers", |g| {
        g.system.dword(&key, "Start", 4);
    });
    assert_eq!(text.matches("disk").count(), 1, "{text}");
    assert_eq!(
        evidence,
        format!("SYSTEM\\{SET}, sata, virtio-blk, virtio-scsi")
    );
    let [text, evidence] = said(Win10, "controller-service", |g| {
        g.system.dword(&service("viostor"), "Start", 3);
    });
    assert!(text.contains("viostor"), "{text}");
    assert_eq!(evidence, format!("SYSTEM\\{SET}, virtio-blk"));
    let [text, _] = said(Win7, "controller-bound", |g| {
        forget_id(g, "ven_1af4&dev_1042")
    });
    assert!(
        text.contains("no driver is bound to PCI\\VEN_1AF4&DEV_1042"),
        "{text}"
    );
}

#[test]
fn device_filters_are_told_with_their_device_and_only_dead_ones() {
    let filter = |guest: &mut MemoryGuest, n: usize, name: &str| {
        let names = RegData::MultiSz(vec!["disk".into(), name.into()]);
        let key = format!("{SET}\\Enum\\ROOT\\Device{n}\\0000");
        guest.system.set(&key, "LowerFilters", names);
    };
    let [text, _] = said(Win10, "device-filters", |g| filter(g, 1, "partmgr"));
    assert_eq!(text, "no device filter names a dead service");
    let [text, evidence] = said(Win10, "device-filters", |g| filter(g, 1, "gone"));
    assert!(text.contains("missing or disabled"), "{text}");
    assert_eq!(evidence, "ROOT\\Device1\\0000 LowerFilters: gone");
    // The first ones stand for all.
    let [_, evidence] = said(Win10, "device-filters", |g| {
        for n in 1..=9 {
            let names = RegData::MultiSz(vec!["gone".into()]);
            let key = format!("{SET}\\Enum\\A\\B{n}\\C");
            g.system.set(&key, "LowerFilters", names);
        }
    });
    let devices: Vec<_> = evidence.split("; ").collect();
    assert_eq!(devices.len(), 8, "{evidence}");
    assert_eq!(devices[7], "A\\B8\\C LowerFilters: gone");
    // A key without a driver is no service.
    let [_, evidence] = said(Win10, "device-filters", |g| {
        filter(g, 1, "hollow");
        g.system.key_mut(&service("hollow"));
    });
    assert_eq!(evidence, "ROOT\\Device1\\0000 LowerFilters: hollow");
}

#[test]
fn a_device_that_was_here_before_is_told_with_its_state_and_what_that_does() {
    let device = "PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01\\3&1&0&20";
    let key = format!("{SET}\\Enum\\{device}");
    for (service, flags, state) in [
        (Some("other"), 0, ", with the driver other"),
        (None, 0, ", without a driver"),
        (Some("viostor"), 1, " and is switched off"),
    ] {
        let [text, _] = said(Win10, "device-instances", |g| {
            let class = "{4d36e97b-e325-11ce-bfc1-08002be10318}";
            g.system.sz(&key, "ClassGUID", class);
            g.system.dword(&key, "ConfigFlags", flags);
            if let Some(service) = service {
                g.system.sz(&key, "Service", service);
            }
        });
        let wanted = format!(
            "{device} was here before{state}: Windows uses that driver again when it is in the same place"
        );
        assert_eq!(text, wanted);
    }
}

#[test]
fn rivals_and_boot_services_are_told_by_name_and_number() {
    let [text, evidence] = said(Win10, "storage-rivals", rival);
    assert!(text.starts_with("several boot-start drivers"), "{text}");
    let named = evidence.contains("viostor") && evidence.contains("vioscsi");
    assert!(
        evidence.starts_with("PCI\\VEN_1AF4&DEV_1042") && named,
        "{evidence}"
    );
    let sound = |id: &str| said(Win10, id, |_| {})[0].clone();
    let number = |text: &str| text.split(' ').next().unwrap().parse::<usize>().unwrap();
    let [more, _] = said(Win10, "boot-services", |g| {
        let key = service("another");
        for (name, value) in [("Start", 0), ("Type", 1), ("ErrorControl", 1)] {
            g.system.dword(&key, name, value);
        }
        g.system
            .sz(&key, "ImagePath", "System32\\drivers\\disk.sys");
    });
    assert_eq!(number(&more), number(&sound("boot-services")) + 1);
    // Each of them is of one kind or the other.
    let [none, one, two] = [&[][..], &["disk"], &["disk", "volmgr"]].map(|critical| {
        let [text, _] = said(Win10, "critical-boot-services", |g| {
            let services = format!("{SET}\\Services");
            for service in g.system.key_mut(&services).keys.values_mut() {
                let is_critical = critical
                    .iter()
                    .any(|c| c.eq_ignore_ascii_case(&service.name));
                service.dword("", "ErrorControl", if is_critical { 3 } else { 1 });
            }
        });
        text
    });
    assert_eq!(none, "0 boot-start drivers are there");
    assert_eq!(one, "1 boot-start driver is there");
    assert_eq!(two, "2 boot-start drivers are there");
    for (id, text) in [
        ("firmware", "uefi"),
        ("boot-manager", "the boot manager is there"),
        ("uefi-fallback", "the fall-back loader is Windows' own"),
        ("storage-rivals", "one driver for each controller"),
    ] {
        assert_eq!(sound(id), text, "{id}");
    }
    let [text, _] = said(Win7, "uefi-fallback", |_| {});
    assert_eq!(text, "not needed: BIOS");
}
