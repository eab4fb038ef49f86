//! What is said of a Linux guest, and what virt-v2v is given.

use super::super::testing::job;
use super::*;
use crate::demo::WinVersion;
use crate::testing::MemoryGuest;

fn inspection(firmware: Option<Firmware>, loader: Option<bool>) -> Inspection {
    let guest = MemoryGuest::new(WinVersion::Win10);
    let mut inspection = guest.look(&[], |_, survey| survey.inspection.clone());
    inspection.windows = None;
    inspection.firmware = firmware;
    inspection.linux = Some(LinuxFacts {
        fallback_loader: loader,
        ..LinuxFacts::default()
    });
    inspection
}

fn states(checks: &[Check]) -> Vec<(&'static str, CheckState)> {
    checks.iter().map(|check| (check.id, check.state)).collect()
}

/// Whether a Linux finds its disk is not checked: it is never called ready.
#[test]
fn a_linux_is_readable_and_has_its_loader_and_more_is_not_known() {
    use CheckState::{CouldNotRun, Fault, Ok};
    let path = ("boot-path", CouldNotRun);
    for (firmware, loader, wanted) in [
        (
            Some(Firmware::Uefi),
            Some(true),
            &[("linux-readable", Ok), ("uefi-fallback", Ok), path][..],
        ),
        (
            Some(Firmware::Uefi),
            Some(false),
            &[("linux-readable", Ok), ("uefi-fallback", Fault), path],
        ),
        (
            Some(Firmware::Uefi),
            None,
            &[("linux-readable", Ok), ("uefi-fallback", Fault), path],
        ),
        (Some(Firmware::Bios), None, &[("linux-readable", Ok), path]),
        (None, None, &[("linux-readable", Ok), path]),
    ] {
        let found = checks(&inspection(firmware, loader));
        assert_eq!(states(&found), wanted, "{firmware:?} {loader:?}");
        assert!(!crate::check::is_ready(&found));
    }
    let mut unread = inspection(Some(Firmware::Uefi), Some(true));
    unread.linux = None;
    assert_eq!(states(&checks(&unread)), [("linux-readable", Fault), path]);
    assert!(linux_facts(&unread).is_err());
}

#[test]
fn a_guest_that_is_not_ready_after_its_conversion_is_no_result() {
    let made = |loader, method| ConvertedDisks {
        images: Vec::new(),
        after: inspection(Some(Firmware::Uefi), loader),
        actions: Vec::new(),
        method,
    };
    for method in [Method::AsIs, Method::VirtV2v, Method::VirtV2vInPlace] {
        let checks = verified(&made(Some(true), method)).unwrap();
        assert!(crate::check::is_ready(&checks));
        let path = checks.iter().find(|check| check.id == "boot-path").unwrap();
        assert_eq!(
            path.message.contains("on your word"),
            method == Method::AsIs
        );
        let error = verified(&made(Some(false), method)).unwrap_err();
        assert!(error.message.contains("BOOTX64.EFI is missing"), "{error}");
    }
}

/// The firmware decides which boot loader virt-v2v makes ready.
#[test]
fn virt_v2v_is_told_the_firmware_and_every_disk() {
    let overlays = ["/w/a.qcow2", "/w/b.qcow2"].map(PathBuf::from);
    for (firmware, efi) in [
        (Some(Firmware::Uefi), true),
        (Some(Firmware::Bios), false),
        (None, false),
    ] {
        let xml = source_xml("vm", &inspection(firmware, None), &overlays).unwrap();
        let domain = Element::parse(xml.as_bytes()).unwrap();
        let os = domain.first("os").unwrap();
        assert_eq!(os.attr("firmware"), efi.then_some("efi"));
        let devices = domain.first("devices").unwrap();
        let disks: Vec<_> = devices.all("disk").collect();
        let files: Vec<_> = disks
            .iter()
            .map(|d| d.first("source").unwrap().attr("file").unwrap())
            .collect();
        assert_eq!(files, ["/w/a.qcow2", "/w/b.qcow2"]);
        let names: Vec<_> = disks
            .iter()
            .map(|d| d.first("target").unwrap().attr("dev").unwrap())
            .collect();
        assert_eq!(names, ["sda", "sdb"]);
        assert_eq!(
            disks[1].first("driver").unwrap().attr("type"),
            Some("qcow2")
        );
    }
}

#[test]
fn the_vm_has_its_own_variables_beside_its_disks() {
    let mut job = job(&["/a.raw".into()], Path::new("/out"));
    job.vm.machine.name = "my vm".into();
    let options = options(&job, Path::new("/out"));
    assert_eq!(
        (options.name.as_str(), options.nvram),
        ("my-vm", "/out/my-vm-nvram.fd".into())
    );
}

#[test]
fn virt_v2v_starts_an_appliance_where_the_user_let_it() {
    use virt_v2v::{IN_PLACE, NBDKIT, V2V};
    let mut job = job(&["/a.raw".into()], Path::new("/out"));
    let (in_place, copy) = (Some(Method::VirtV2vInPlace), Some(Method::VirtV2v));
    for (there, method) in [
        (&[IN_PLACE, V2V, NBDKIT][..], in_place),
        (&[V2V, NBDKIT], copy),
        (&[IN_PLACE, NBDKIT], in_place),
        (&[IN_PLACE, V2V], None),
        (&[NBDKIT], None),
        (&[], None),
    ] {
        let mut found = |no_appliance, linux| {
            (job.source.no_appliance, job.guest.linux) = (no_appliance, linux);
            installed(&job, &|program| there.contains(&program))
        };
        assert_eq!(found(false, LinuxChoice::Auto), method, "{there:?}");
        assert_eq!(found(false, LinuxChoice::VirtV2v), method, "{there:?}");
        // Its appliance is started only where the user asks for it by name.
        assert_eq!(found(true, LinuxChoice::VirtV2v), method, "{there:?}");
        assert_eq!(found(true, LinuxChoice::Auto), None, "{there:?}");
    }
}
