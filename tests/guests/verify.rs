//! The table of `verify`: each check shown with a disk that fails it.

use hyper2kvm::demo::WinVersion;
use hyper2kvm::registry::{KeyTree, RegData};

use crate::support::{TOOLS, have};
use crate::{Guest, SET};

#[test]
fn verify_tells_faults_apart() {
    if !have(&TOOLS) {
        return;
    }
    Guest::new(WinVersion::Win10).check("boot-path", "ok", 0);
    Guest::new(WinVersion::Win7).check("boot-path", "ok", 0);
    let services = format!("{SET}\\Services");
    let class = format!("{SET}\\Control\\Class\\{{4d36e967-e325-11ce-bfc1-08002be10318}}");
    type Edit<'e> = (&'e str, i32, &'e dyn Fn(&mut KeyTree));
    let edits: [Edit<'_>; 11] = [
        ("controller-service", 4, &|s| {
            s.dword(&format!("{services}\\storahci\\StartOverride"), "1", 3);
        }),
        ("controller-bound", 4, &|s| {
            s.remove("DriverDatabase\\DeviceIds\\PCI\\CC_010601")
                .unwrap();
        }),
        ("controller-image", 4, &|s| {
            let key = format!("{services}\\storahci");
            s.sz(&key, "ImagePath", "System32\\drivers\\gone.sys");
        }),
        ("bus-drivers", 4, &|s| {
            s.dword(&format!("{services}\\pci\\StartOverride"), "0", 3);
        }),
        ("volume-drivers", 4, &|s| {
            s.dword(&format!("{services}\\volmgr"), "Start", 4);
        }),
        ("class-filters", 4, &|s| {
            let dead = RegData::MultiSz(vec!["gonefilter".into()]);
            s.set(&class, "LowerFilters", dead);
        }),
        ("device-filters", 0, &|s| {
            let dead = RegData::MultiSz(vec!["gonefilter".into()]);
            let key = format!("{SET}\\Enum\\STORAGE\\Volume\\1");
            s.set(&key, "UpperFilters", dead);
        }),
        ("critical-boot-services", 0, &|s| {
            let key = format!("{services}\\fatal");
            s.dword(&key, "Start", 0)
                .dword(&key, "Type", 1)
                .dword(&key, "ErrorControl", 3);
        }),
        ("boot-services", 0, &|s| {
            let key = format!("{services}\\optional");
            s.dword(&key, "Start", 0)
                .dword(&key, "Type", 1)
                .dword(&key, "ErrorControl", 1);
        }),
        ("storage-rivals", 0, &|s| {
            let package = "DriverDatabase\\DriverPackages\\rival.inf_amd64_1";
            let bound = RegData::Binary(vec![1, 0xff, 0, 0]);
            s.set(
                "DriverDatabase\\DeviceIds\\PCI\\CC_010601",
                "rival.inf",
                bound,
            )
            .sz(
                "DriverDatabase\\DriverInfFiles\\rival.inf",
                "Active",
                "rival.inf_amd64_1",
            )
            .sz(
                &format!("{package}\\Descriptors\\PCI\\CC_010601"),
                "Configuration",
                "c",
            )
            .sz(&format!("{package}\\Configurations\\c"), "Service", "disk");
        }),
        ("control-sets", 4, &|s| {
            s.dword("Select", "Default", 9);
        }),
    ];
    for (id, code, edit) in edits {
        eprintln!("{id}");
        let guest = Guest::new(WinVersion::Win10);
        guest.edit_hive("SYSTEM", edit);
        guest.check(id, "fault", code);
    }
}
