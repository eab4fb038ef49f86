//! Windows versions that need older drivers, or can do less.

use std::fs;
use std::path::Path;

use hyper2kvm::demo::{DemoVolume, GuestSpec, Role, WinVersion};
use hyper2kvm::guest::GuestPath;
use serde_json::Value;

use crate::rows::assert_refusal;
use crate::support::{Lab, TOOLS, drivers_for_old_windows, h2k, have, tool, virtio_win};
use crate::{Guest, base, find, spec};

#[test]
fn old_windows() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let driver_source = dir.path().join("virtio-win");
    drivers_for_old_windows(&driver_source);
    let driver_source = driver_source.to_str().unwrap();
    for version in [WinVersion::Xp, WinVersion::Server2003, WinVersion::Vista] {
        eprintln!("{version:?}");
        let lab = Lab::new(GuestSpec {
            disk_size: 2 << 30,
            ..spec(version)
        });
        let convert = |more: &[&str]| {
            let (disk, out) = (lab.raw.to_str().unwrap(), lab.path("out"));
            let fixed = [
                "convert",
                disk,
                "--json",
                "--virtio-iso",
                driver_source,
                "-o",
            ];
            let out = [out.to_str().unwrap()];
            h2k([&fixed[..], &out[..], more].concat())
        };
        // Current releases have nothing for them.
        assert_refusal("driver-missing", &lab.convert(&lab.raw, &[]));
        let report = convert(&[]).expect(0).json();
        let nt5 = version != WinVersion::Vista;
        let first = if nt5 { "ide" } else { "sata" };
        for (bus, ready) in [(first, true), ("virtio-blk", true), ("virtio-scsi", !nt5)] {
            assert_eq!(report["controllers"][bus]["ready"], ready, "{bus}");
        }
        let xml = fs::read_to_string(report["outputs"]["bootstrap_xml"].as_str().unwrap()).unwrap();
        assert_eq!(xml.contains("q35"), !nt5, "{xml}");
        if nt5 {
            let more = ["--force", "--storage", "virtio-scsi"];
            assert_refusal("storage-driver", &convert(&more));
            boot_sector(&lab, &report);
            let guest = Guest::of(&lab);
            if guest.exists(DemoVolume::Boot, &GuestPath::parse("boot.ini").unwrap()) {
                guest.remove(DemoVolume::Boot, "boot.ini");
            }
            guest.finding("no-boot-ini");
        }
    }
}

/// mkntfs was told 255 heads; a disk of 2 GiB is shown with 128.
fn boot_sector(lab: &Lab, report: &Value) {
    let guest = Guest::of(lab);
    guest.finding("boot-sector-heads");
    guest.check("boot-sector", "fault", 0);
    let start = guest.start(Role::Windows);
    let mut expected = guest.bytes(start, 512);
    assert_eq!(expected[26..28], [255, 0]);
    let saved = fs::read(lab.path("out/backup/boot-sector")).unwrap();
    assert_eq!(saved, expected);
    expected[26] = 128;
    let disk = report["outputs"]["disks"][0].as_str().unwrap();
    let result = lab.raw_result(Path::new(disk));
    let out = Guest {
        dir: tempfile::tempdir().unwrap(),
        disk: result,
        spec: lab.spec.clone(),
    };
    assert_eq!(out.bytes(start, 512), expected);
    out.check("boot-sector", "ok", 0);
    // Between the steps it is not known what the VM shows.
    guest.patch(start + 26, &[16, 0]);
    guest.finding("boot-sector-geometry");
}

/// The demo's drivers with a release number of their own.
fn drivers_of(release: u32, folder: &Path) {
    tool(
        "cp",
        &[
            "-r",
            virtio_win().to_str().unwrap(),
            folder.to_str().unwrap(),
        ],
    );
    for os in ["w7", "w8.1", "2k12R2"] {
        for driver in ["viostor", "vioscsi"] {
            let inf = folder.join(format!("{driver}/{os}/amd64/{driver}.inf"));
            let text = fs::read_to_string(&inf).unwrap();
            let line = text.lines().find(|l| l.trim().starts_with("DriverVer"));
            let date = line.unwrap().split(['=', ',']).nth(1).unwrap().trim();
            let nt = if os == "w7" { 61 } else { 63 };
            let new = format!("DriverVer = {date},{nt}.{release}.104.{release}00");
            fs::write(&inf, text.replace(line.unwrap(), &new)).unwrap();
        }
    }
}

#[test]
fn signatures_that_old_windows_refuses() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let driver_source = dir.path().join("virtio-win");
    drivers_of(266, &driver_source);
    let plan = |disk: &Path| {
        let args = ["plan", disk.to_str().unwrap(), "--virtio-iso"];
        h2k(args
            .into_iter()
            .chain([driver_source.to_str().unwrap(), "--json"]))
    };
    let seven = plan(&base(WinVersion::Win7).raw).expect(0).json();
    let warnings = seven["warnings"].as_array().unwrap();
    let of_updates = warnings.iter().find(|w| w.to_string().contains("KB"));
    insta::assert_snapshot!(of_updates.unwrap().as_str().unwrap(), @"viostor 61.266.104.26600 in viostor/w7/amd64 is not usable on Windows 7: later drivers are signed with SHA-2 only, which needs updates KB4490628 and KB4474419 in the guest; use virtio-win 0.1.173 or older and pass it with --virtio-iso");
    let lab = Lab::new(spec(WinVersion::Win81));
    assert_refusal("driver-not-signed", &plan(&lab.raw));
}

/// What NTLDR stops at, and what the CriticalDeviceDatabase lacks, is known before anything is written.
#[test]
fn boot_ini_names_partitions() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let driver_source = dir.path().join("virtio-win");
    drivers_for_old_windows(&driver_source);
    let driver_source = driver_source.to_str().unwrap();
    let lab = Lab::new(GuestSpec {
        disk_size: 2 << 30,
        ..spec(WinVersion::Server2003)
    });
    let run = |guest: &Guest, verb: &str, more: &[&str]| {
        let (disk, out) = (guest.disk.to_str().unwrap(), guest.path("out"));
        let fixed = [verb, disk, "--json", "--virtio-iso", driver_source, "-o"];
        h2k([&fixed[..], &[out.to_str().unwrap()], more].concat())
    };
    let guest = Guest::of(&lab);
    run(&guest, "plan", &[]).expect(0);
    let ini = guest.read(DemoVolume::Boot, "boot.ini");
    let ini = String::from_utf8(ini).unwrap();
    guest.write(
        DemoVolume::Boot,
        "boot.ini",
        ini.replace("rdisk(0)", "rdisk(1)").as_bytes(),
    );
    guest.finding("boot-ini-device");
    for verb in ["plan", "convert"] {
        assert_refusal("boot-ini-device", &run(&guest, verb, &[]));
    }
    assert!(!guest.path("out").exists());
    guest.check("bcd", "fault", 4);
    run(&guest, "plan", &["--accept", "boot-ini-device"]).expect(4);
}

/// No entry of the CriticalDeviceDatabase leads to the IDE controller of the first boot: it is written where
/// the drivers are there, and refused where they are not (Microsoft's 314082).
#[test]
fn installed_on_scsi() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let driver_source = dir.path().join("virtio-win");
    drivers_for_old_windows(&driver_source);
    let driver_source = driver_source.to_str().unwrap();
    for version in [WinVersion::Xp, WinVersion::Server2003] {
        let lab = Lab::new(GuestSpec {
            disk_size: 2 << 30,
            ..spec(version)
        });
        for (files, code) in [
            (&[][..], ""),
            (&["intelide", "pciide"], "bootstrap-unbound"),
            (&["atapi"], "boot-driver-file"),
        ] {
            eprintln!("{version:?} without {files:?}");
            let guest = Guest::of(&lab);
            let database = "ControlSet001\\Control\\CriticalDeviceDatabase";
            guest.edit_hive("SYSTEM", |s| {
                for id in [
                    "PCI#VEN_8086&DEV_7010",
                    "PCI#CC_0101",
                    "Primary_IDE_Channel",
                    "Secondary_IDE_Channel",
                    "*PNP0600",
                ] {
                    let _ = s.remove(&format!("{database}\\{id}"));
                }
            });
            for file in files {
                let path = format!("Windows\\System32\\drivers\\{file}.sys");
                if guest.exists(DemoVolume::Windows, &GuestPath::parse(&path).unwrap()) {
                    guest.remove(DemoVolume::Windows, &path);
                }
            }
            let run = |verb: &str, more: &[&str]| {
                let (disk, out) = (guest.disk.to_str().unwrap(), guest.path("out"));
                let fixed = [verb, disk, "--json", "--virtio-iso", driver_source, "-o"];
                h2k([&fixed[..], &[out.to_str().unwrap()], more].concat())
            };
            if files.is_empty() {
                run("plan", &[]).expect(0);
                let report = run("convert", &[]).expect(0).json();
                assert_eq!(report["controllers"]["ide"]["ready"], true);
                continue;
            }
            for verb in ["plan", "convert"] {
                let refused = run(verb, &[]).expect(3).json();
                let blockers = refused["error"]["blockers"].clone();
                let named = find(&blockers, "code", code);
                let named = named.unwrap_or_else(|| panic!("{blockers:#}"));
                let remedy = named["remedy"].as_str().unwrap();
                assert!(remedy.contains("--bootstrap none"), "{remedy}");
            }
            assert!(!guest.path("out").exists());
            run("plan", &["--bootstrap", "none"]).expect(0);
        }
    }
}
