//! `inspect`, `plan`, `convert` and `verify` agree about a guest, including their exit codes.

use std::fs;
use std::path::PathBuf;

use hyper2kvm::demo::{DemoVolume, GuestSpec, WinVersion};
use hyper2kvm::drivers::Arch;
use hyper2kvm::inspect::Firmware;
use hyper2kvm::registry::RegData;
use serde_json::Value;

use crate::support::{Lab, Run, TOOLS, drivers_for_old_windows, h2k, have, skip, virtio_win};
use crate::{Guest, SET, find, spec};

const MANAGER: &str = "EFI\\Microsoft\\Boot\\bootmgfw.efi";
const LOADER: &str = "Objects\\{733b62e5-f608-11eb-825c-c112f60133ab}\\Elements";

/// A guest and the reason for its refusal.
struct Case {
    /// The code of the blocker.
    code: &'static str,
    /// Whether `inspect` has it as a finding of severity "blocker".
    finding: bool,
    /// A check of `verify` that fails for the source with the controllers of its first boot.
    check: &'static str,
    /// Part of the remedy.
    remedy: &'static str,
    /// Options in the remedy with which the guest is converted.
    helps: &'static [&'static str],
    guest: fn() -> Guest,
}

fn ten() -> Guest {
    Guest::new(WinVersion::Win10)
}

fn without(driver: &str) -> Guest {
    let guest = ten();
    guest.remove(
        DemoVolume::Windows,
        &format!("Windows\\System32\\drivers\\{driver}.sys"),
    );
    guest
}

const CASES: &[Case] = &[
    Case {
        code: "no-boot-manager",
        finding: true,
        check: "boot-manager",
        remedy: "bcdboot",
        helps: &[],
        guest: || {
            let guest = ten();
            guest.remove(DemoVolume::Boot, MANAGER);
            guest
        },
    },
    Case {
        code: "boot-manager-damaged",
        finding: true,
        check: "boot-manager",
        remedy: "bcdboot",
        helps: &[],
        guest: || {
            let guest = ten();
            guest.write(DemoVolume::Boot, MANAGER, b"no program");
            guest
        },
    },
    Case {
        code: "bcd-device",
        finding: true,
        check: "bcd",
        remedy: "--repair-bcd",
        helps: &["--repair-bcd"],
        guest: || {
            let guest = ten();
            guest.edit_bcd(|bcd| {
                let key = format!("{LOADER}\\11000001");
                let mut data = bcd.value(&key, "Element").unwrap().data.clone();
                data[35] ^= 0x5a;
                bcd.set(&key, "Element", RegData::Binary(data));
            });
            guest
        },
    },
    Case {
        code: "bcd-loader",
        finding: true,
        check: "bcd",
        remedy: "bcdboot",
        helps: &[],
        guest: || {
            let guest = ten();
            guest.remove(DemoVolume::Windows, "Windows\\System32\\winload.efi");
            guest
        },
    },
    Case {
        code: "default-control-set",
        finding: true,
        check: "control-sets",
        remedy: "last known good",
        helps: &[],
        guest: || {
            let guest = ten();
            guest.edit_hive("SYSTEM", |s| {
                s.dword("Select", "Default", 9);
            });
            guest
        },
    },
    // Every boot needs this one: no other --bootstrap helps.
    Case {
        code: "boot-driver-file",
        finding: false,
        check: "volume-drivers",
        remedy: "Windows needs volume on every controller",
        helps: &[],
        guest: || without("volume"),
    },
    Case {
        code: "boot-driver-file",
        finding: false,
        check: "controller-image",
        remedy: "--bootstrap none",
        helps: &["--bootstrap", "none"],
        guest: || without("storahci"),
    },
    Case {
        code: "boot-driver-missing",
        finding: false,
        check: "volume-drivers",
        remedy: "Windows needs partmgr on every controller",
        helps: &[],
        guest: || {
            let guest = ten();
            guest.edit_hive("SYSTEM", |s| {
                s.remove(&format!("{SET}\\Services\\partmgr")).unwrap();
            });
            guest
        },
    },
    Case {
        code: "bootstrap-unbound",
        finding: false,
        check: "controller-bound",
        remedy: "--bootstrap none",
        helps: &["--bootstrap", "none"],
        guest: || {
            let guest = ten();
            guest.edit_hive("SYSTEM", |s| {
                s.remove("DriverDatabase\\DeviceIds\\PCI\\CC_010601")
                    .unwrap();
            });
            guest
        },
    },
];

/// Both refuse with this code, and write nothing. Returns the blocker.
#[track_caller]
fn refused_alike(case: &str, code: &str, run: impl Fn(&str) -> Run) -> Value {
    let [plan, convert] = ["plan", "convert"].map(|verb| {
        let run = run(verb);
        assert_eq!(run.code, 3, "{case}, {verb}: {}{}", run.stdout, run.stderr);
        run.json()["error"]["blockers"].clone()
    });
    assert_eq!(plan, convert, "{case}");
    let blocker = find(&plan, "code", code);
    let blocker = blocker.unwrap_or_else(|| panic!("{case}: no {code} in {plan:#}"));
    blocker.clone()
}

#[test]
fn what_convert_refuses_plan_refuses_with_the_same_words() {
    if !have(&TOOLS) {
        return;
    }
    for case in CASES {
        let name = format!("{} ({})", case.code, case.check);
        eprintln!("{name}");
        let guest = (case.guest)();
        let blocker = refused_alike(&name, case.code, |verb| guest.run(verb, &[]));
        let remedy = blocker["remedy"].as_str().unwrap();
        assert!(remedy.contains(case.remedy), "{name}: {remedy}");
        assert!(!guest.path("out").exists(), "{name}");
        let seen = guest.inspect();
        let found = find(&seen["findings"], "id", case.code);
        let severity = found.map(|f| f["severity"].as_str().unwrap());
        assert_eq!(severity, case.finding.then_some("blocker"), "{name}");
        guest.check(case.check, "fault", 4);
        if !case.helps.is_empty() {
            let (_, out) = guest.converted(case.helps);
            let disk = out.disk.to_str().unwrap();
            h2k(["verify", disk]).expect(0);
        }
    }
}

#[test]
fn what_only_keeps_windows_from_starting_can_be_accepted() {
    if !have(&TOOLS) {
        return;
    }
    for case in CASES {
        eprintln!("{} ({})", case.code, case.check);
        let guest = (case.guest)();
        // By the code of the blocker, and by the check that fails because of it.
        for (n, id) in [case.code, case.check].into_iter().enumerate() {
            if n == 1 && case.code == "default-control-set" {
                // The other checks look into the control set that is there.
                continue;
            }
            let accept = ["--accept", id, "--force"];
            if case.code == "default-control-set" {
                // Accepting one problem hides no other.
                let more = ["--bootstrap", "ide", "--machine", "q35"];
                let wrong = [&accept[..], &more].concat();
                for verb in ["plan", "convert"] {
                    guest.run(verb, &wrong).expect(2);
                }
            }
            let plan = guest.run("plan", &accept).expect(4).json();
            assert_eq!(plan["schema"], "hyper2kvm/plan/1");
            assert_eq!(plan["ready"], false);
            assert_eq!(plan["blockers"], serde_json::json!([]));
            assert_eq!(plan["accepted"], serde_json::json!([case.code]), "{id}");
            let failed = find(&plan["checks"], "id", case.check).unwrap();
            assert_eq!(
                (&failed["ok"], &failed["accepted"]),
                (&false.into(), &true.into()),
                "{failed:#}"
            );
            if n == 1 {
                continue;
            }
            let report = guest.run("convert", &accept).expect(4).json();
            assert_eq!(report["schema"], "hyper2kvm/convert/1");
            assert_eq!(report["ready"], false);
            assert_eq!(report["accepted"], plan["accepted"]);
            let failed = find(&report["checks"], "id", case.check).unwrap();
            assert_eq!(failed["accepted"], true, "{failed:#}");
            let page = fs::read_to_string(guest.path("out/report.html")).unwrap();
            assert!(page.contains("NOT READY") && page.contains(case.code));
            let disk = report["outputs"]["disks"][0].as_str().unwrap();
            assert!(fs::metadata(disk).unwrap().len() > 0);
        }
    }
}

#[test]
fn accepting_what_is_not_so_changes_nothing() {
    if !have(&TOOLS) {
        return;
    }
    let guest = ten();
    let accept = ["--accept", "no-boot-manager"];
    let plan = guest.run("plan", &accept).expect(0).json();
    assert_eq!(
        (&plan["ready"], &plan["accepted"]),
        (&true.into(), &serde_json::json!([]))
    );
    let report = guest.run("convert", &accept).expect(0).json();
    assert_eq!(report["ready"], true);
    let said = report["warnings"].to_string();
    assert!(
        said.contains("--accept no-boot-manager: this guest has no such fault"),
        "{said}"
    );
}

#[test]
fn data_cannot_be_accepted_and_an_unknown_id_is_a_usage_error() {
    if !have(&TOOLS) {
        return;
    }
    let guest = ten();
    for (id, says) in [
        ("volume-dirty", "cannot be accepted: "),
        ("volume-hibernated", "cannot be accepted: "),
        ("registry-as-planned", "cannot be accepted: "),
        ("no-bootmanager", "near it: no-boot-manager"),
        ("nonsense", "hyper2kvm docs guests lists"),
    ] {
        for verb in ["plan", "convert"] {
            let run = guest.run(verb, &["--accept", id]).expect(2);
            assert!(run.stderr.contains(says), "{id}: {}", run.stderr);
            assert_eq!(run.json()["error"]["code"], 2);
        }
        assert!(!guest.path("out").exists());
    }
    // A second fault beside the accepted one still refuses.
    let guest = without("volume");
    guest.remove(DemoVolume::Boot, MANAGER);
    let accept = ["--accept", "boot-driver-file"];
    let blocker = refused_alike("two", "no-boot-manager", |verb| guest.run(verb, &accept));
    assert!(blocker["reason"].as_str().unwrap().contains("boot manager"));
}

/// A libvirt domain of this guest and so many empty disks.
fn with_data_disks(guest: &Guest, count: usize) -> PathBuf {
    let mut disks = String::new();
    for n in 0..=count {
        let path = match n {
            0 => guest.disk.clone(),
            n => {
                let path = guest.path(&format!("data-{n}.raw"));
                fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
                path
            }
        };
        disks.push_str(&format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/>\
             <source file='{}'/><target dev='sd{n}' bus='scsi'/></disk>",
            path.display()
        ));
    }
    let xml = guest.path("vm.xml");
    let text = format!(
        "<domain type='kvm'><name>vm</name><memory unit='MiB'>1024</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64'>hvm</type></os><devices>{disks}</devices></domain>"
    );
    fs::write(&xml, text).unwrap();
    xml
}

fn run_on(
    source: &std::path::Path,
    out: &std::path::Path,
    driver_source: &str,
    verb: &str,
    more: &[&str],
) -> Run {
    let (source, out) = (source.to_str().unwrap(), out.to_str().unwrap());
    let fixed = [
        verb,
        source,
        "--virtio-iso",
        driver_source,
        "-o",
        out,
        "--json",
    ];
    h2k([&fixed[..], more].concat())
}

#[test]
fn more_disks_than_the_first_bus_has_places() {
    if !have(&TOOLS) {
        return;
    }
    let guest = ten();
    let xml = with_data_disks(&guest, 20);
    let driver_source = virtio_win().to_str().unwrap();
    let out = guest.path("out");
    let run = |verb: &str, more: &[&str]| run_on(&xml, &out, driver_source, verb, more);
    // Proxmox has 16 places on virtio and 6 on SATA; the remedy gives 31.
    let proxmox = ["--emit", "proxmox"];
    let blocker = refused_alike("proxmox", "emit-limit", |verb| run(verb, &proxmox));
    let remedy = blocker["remedy"].as_str().unwrap();
    for option in [
        "--storage virtio-scsi",
        "--bootstrap none",
        "leave out --emit proxmox",
    ] {
        assert!(remedy.contains(option), "{remedy}");
    }
    let helps = [
        "--storage",
        "virtio-scsi",
        "--bootstrap",
        "none",
        "--emit",
        "proxmox",
    ];
    run("plan", &helps).expect(0);
    run("plan", &[]).expect(0);
    let report = run("convert", &[]).expect(0).json();
    assert_eq!(report["ready"], true);
    assert_eq!(report["outputs"]["disks"].as_array().unwrap().len(), 21);
    let bootstrap = fs::read_to_string(report["outputs"]["bootstrap_xml"].as_str().unwrap());
    let bootstrap = bootstrap.unwrap();
    // No driver ISO: 18 places on SATA, then VirtIO, besides the probe.
    assert_eq!(bootstrap.matches("bus=\"sata\"").count(), 18);
    assert_eq!(bootstrap.matches("bus=\"virtio\"").count(), 3 + 1);
}

#[test]
fn a_data_disk_that_cannot_be_read_is_refused_before_anything_is_written() {
    if !have(&TOOLS) {
        return;
    }
    let guest = ten();
    let xml = with_data_disks(&guest, 2);
    let damaged = guest.path("data-2.raw");
    fs::write(&damaged, b"QFI\xfb\0\0\0\x03 no more of it").unwrap();
    let text = fs::read_to_string(&xml).unwrap();
    let (head, tail) = text.split_at(text.rfind("type='raw'").unwrap());
    fs::write(&xml, format!("{head}{}", tail.replacen("raw", "qcow2", 1))).unwrap();
    let out = guest.path("out");
    let driver_source = virtio_win().to_str().unwrap();
    let codes = ["plan", "convert"].map(|verb| run_on(&xml, &out, driver_source, verb, &[]).code);
    assert_eq!(codes, [1, 1]);
}

#[test]
fn guests_no_domain_can_be_written_for() {
    if !have(&TOOLS) {
        return;
    }
    let arm = Lab::new(GuestSpec {
        arch: Arch::Arm64,
        ..spec(WinVersion::Win11)
    });
    let driver_source = virtio_win().to_str().unwrap();
    let out = arm.path("out");
    let blocker = refused_alike("ARM64", "guest-arch", |verb| {
        run_on(&arm.raw, &out, driver_source, verb, &[])
    });
    assert!(blocker["remedy"].as_str().unwrap().contains("x86"));
    let usage = run_on(
        &arm.raw,
        &out,
        driver_source,
        "plan",
        &["--accept", "guest-arch"],
    );
    assert_eq!(usage.code, 2);

    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("virtio-win");
    drivers_for_old_windows(&old);
    let old = old.to_str().unwrap();
    let xp = Lab::new(GuestSpec {
        disk_size: 2 << 30,
        ..spec(WinVersion::Xp)
    });
    let out = xp.path("out");
    let kubevirt = ["--emit", "kubevirt"];
    let blocker = refused_alike("KubeVirt", "emit-limit", |verb| {
        run_on(&xp.raw, &out, old, verb, &kubevirt)
    });
    assert_eq!(blocker["remedy"], "leave out --emit kubevirt");
    assert!(!out.exists());
    // The user's options do not go together: a usage error in both.
    for verb in ["plan", "convert"] {
        run_on(&xp.raw, &out, old, verb, &["--machine", "q35"]).expect(2);
    }
    for verb in ["plan", "convert"] {
        run_on(&xp.raw, &out, old, verb, &[]).expect(0);
    }
}

#[test]
fn an_output_folder_that_is_taken() {
    if !have(&TOOLS) {
        return;
    }
    let guest = ten();
    fs::create_dir(guest.path("out")).unwrap();
    fs::write(guest.path("out/theirs"), "1").unwrap();
    let said = ["plan", "convert"].map(|verb| {
        let run = guest.run(verb, &[]).expect(1);
        run.json()["error"]["message"].clone()
    });
    assert_eq!(said[0], said[1]);
}

#[test]
fn a_volume_of_the_guest_without_room() {
    if !have(&TOOLS) {
        return;
    }
    for (place, left, code) in [
        (DemoVolume::Windows, 1 << 20, 3),
        // What is asked for, and not much more.
        (DemoVolume::Windows, 3 << 20, 0),
        (DemoVolume::Boot, 0, 3),
    ] {
        eprintln!("{left} bytes free");
        let guest = ten();
        if place == DemoVolume::Boot {
            // There is something to write to it.
            guest.remove(DemoVolume::Boot, "EFI\\Boot\\bootx64.efi");
        }
        guest.fill(place, left);
        let runs = ["plan", "convert"].map(|verb| guest.run(verb, &[]));
        for run in &runs {
            assert_eq!(run.code, code, "{}", run.stderr);
        }
        if code == 3 {
            let blockers = |run: &Run| run.json()["error"]["blockers"].clone();
            assert_eq!(blockers(&runs[0]), blockers(&runs[1]));
            crate::rows::assert_refusal("guest-space", &runs[0]);
            assert!(!guest.path("out").exists());
        }
    }
}

/// A file system of its own, gone with the value.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        crate::support::tool("umount", &[self.0.to_str().unwrap()]);
    }
}

#[test]
fn an_output_folder_without_room() {
    if !have(&TOOLS) || !have(&["mount", "umount"]) {
        return;
    }
    let guest = ten();
    let small = guest.path("small");
    fs::create_dir(&small).unwrap();
    let mount = hyper2kvm::tool::find("mount").unwrap();
    let mounted = std::process::Command::new(mount)
        .args(["-t", "tmpfs", "-o", "size=64m", "none"])
        .arg(&small)
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        return skip("mount", "cannot mount a small tmpfs here");
    }
    let _mounted = Mounted(small.clone());
    // Data that no trim takes out.
    let bytes: Vec<u8> = (0..40u32 << 20)
        .map(|i| (i.wrapping_mul(0x9e37_79b1) >> 13) as u8)
        .collect();
    guest.write(DemoVolume::Windows, "data.bin", &bytes);
    let out = small.join("out");
    let driver_source = virtio_win().to_str().unwrap();
    let run = |verb: &str, more: &[&str]| run_on(&guest.disk, &out, driver_source, verb, more);
    let mut codes = Vec::new();
    for filler in [60u64, 30, 0] {
        fs::write(small.join("filler"), vec![1; (filler << 20) as usize]).unwrap();
        let runs = ["plan", "convert"].map(|verb| run(verb, &[]));
        let [plan, convert] = [0, 1].map(|i| runs[i].code);
        assert_eq!(
            plan, convert,
            "{filler}: {}{}",
            runs[0].stderr, runs[1].stderr
        );
        codes.push(plan);
        if plan != 0 {
            for run in &runs {
                let error = run.json()["error"].clone();
                assert_eq!(error["blockers"][0]["code"], "output-space");
                let said = error["message"].as_str().unwrap().to_string();
                assert!(said.contains("bytes needed"), "{said}");
            }
            assert_eq!(crate::support::names(&small), ["filler"]);
        }
    }
    assert_eq!(codes, [1, 1, 0]);
}

/// Every Windows the catalogue has drivers for, with both firmwares.
#[test]
fn the_test_matrix_agrees() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("virtio-win");
    drivers_for_old_windows(&old);
    let old = old.to_str().unwrap();
    use WinVersion::{
        Server2003, Server2008R2, Server2012R2, Server2016, Server2019, Server2022, Server2025,
        Vista, Win7, Win10, Win11, Win81, Xp,
    };
    for version in [
        Xp,
        Server2003,
        Vista,
        Win7,
        Server2008R2,
        Win81,
        Server2012R2,
        Win10,
        Server2016,
        Server2019,
        Win11,
        Server2022,
        Server2025,
    ] {
        let nt5 = matches!(version, Xp | Server2003);
        let firmwares: &[Firmware] = match version.nt_at_least(6, 2) {
            true => &[Firmware::Bios, Firmware::Uefi],
            false => &[Firmware::Bios],
        };
        for firmware in firmwares {
            let what = format!("{version:?} {firmware:?}");
            eprintln!("{what}");
            let lab = Lab::new(GuestSpec {
                firmware: *firmware,
                disk_size: 2 << 30,
                // As a VMware guest is, and not made ready for the test.
                ..GuestSpec::new(version)
            });
            let out = lab.path("out");
            let run = |verb: &str| run_on(&lab.raw, &out, old, verb, &[]);
            let plan = run("plan").expect(0).json();
            assert_eq!(plan["ready"], true, "{what}: {:#}", plan["checks"]);
            let report = run("convert").expect(0).json();
            assert_eq!(report["ready"], true, "{what}");
            // The prediction equals the result that was read back.
            for foreseen in plan["checks"].as_array().unwrap() {
                let id = foreseen["id"].as_str().unwrap();
                let read = find(&report["checks"], "id", id).unwrap();
                assert_eq!(
                    read["state"], foreseen["state"],
                    "{what}: {read:#} {foreseen:#}"
                );
            }
            let disk = report["outputs"]["disks"][0].as_str().unwrap();
            let bus = ["--controller", "virtio-blk"];
            let first = ["--controller", if nt5 { "ide" } else { "sata" }];
            h2k([&["verify", disk][..], &bus, &first].concat()).expect(0);
            let source = lab.raw.to_str().unwrap();
            h2k([&["verify", source][..], &bus].concat()).expect(4);
        }
    }
}
