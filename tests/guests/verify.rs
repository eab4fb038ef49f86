//! The table of `verify`: each check shown with a disk that fails it.

use std::fs;
use std::path::PathBuf;

use hyper2kvm::demo::{DemoVolume, GuestSpec, WinVersion};
use hyper2kvm::registry::{KeyTree, RegData};

use crate::support::{Lab, TOOLS, drivers_for_old_windows, h2k, have};
use crate::{Guest, SET, spec};

/// What the disk of an output directory must boot from follows from its report.
#[test]
fn verify_of_an_output_folder() {
    if !have(&TOOLS) {
        return;
    }
    let verify = |path: &PathBuf, more: &[&str]| {
        let path = path.to_str().unwrap();
        h2k([&["verify", path, "--json"][..], more].concat())
    };
    // The first boot is on SATA, unless the directory says that there is none.
    for (bootstrap, code) in [("sata", 4), ("none", 0)] {
        let guest = Guest::new(WinVersion::Win10);
        let (report, out) = guest.converted(&["--bootstrap", bootstrap]);
        let folder = guest.path("out");
        let seen = verify(&folder, &[]).expect(0).json();
        assert_eq!(seen["ready"], true);
        assert_eq!(seen["controllers"], report["controllers"]);
        out.remove(
            DemoVolume::Windows,
            "Windows\\System32\\drivers\\storahci.sys",
        );
        verify(&out.disk, &[]).expect(0);
        let seen = verify(&folder, &[]).expect(code).json();
        assert_eq!(seen["ready"], code == 0, "{bootstrap}");
        // What was asked for goes first.
        verify(&folder, &["--controller", "sata"]).expect(4);
        verify(&folder, &["--controller", "virtio-blk"]).expect(0);
        // Also where it was moved.
        let moved = guest.path("moved");
        fs::rename(&folder, &moved).unwrap();
        verify(&moved, &[]).expect(code);
    }
    // No driver for virtio-scsi exists, and none is asked for.
    let dir = tempfile::tempdir().unwrap();
    let driver_source = dir.path().join("virtio-win");
    drivers_for_old_windows(&driver_source);
    let lab = Lab::new(GuestSpec {
        disk_size: 2 << 30,
        ..spec(WinVersion::Xp)
    });
    let (disk, out) = (lab.raw.to_str().unwrap(), lab.path("out"));
    let iso = driver_source.to_str().unwrap();
    h2k([
        "convert",
        disk,
        "--virtio-iso",
        iso,
        "-o",
        out.to_str().unwrap(),
    ])
    .expect(0);
    verify(&out, &[]).expect(0);
    verify(&out, &["--controller", "virtio-scsi"]).expect(4);
    // A directory that hyper2kvm did not write.
    let nothing = verify(&dir.path().to_path_buf(), &[]).expect(1);
    assert!(nothing.stderr.contains("report.json"), "{}", nothing.stderr);
}

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
