//! Everything before Windows: boot manager, BCD, partition table, boot sector.

use std::fs;

use hyper2kvm::demo::{DemoVolume, Role, WinVersion};
use hyper2kvm::registry::RegData;
use hyper2kvm::registry::build::Format;

use crate::hives::{dirty, entry_log};
use crate::support::{TOOLS, export, h2k, have, sha256, tool};
use crate::{Guest, find, tree};

#[test]
fn the_fall_back_loader() {
    if !have(&TOOLS) {
        return;
    }
    let fallback = "EFI\\Boot\\bootx64.efi";
    let manager = "EFI\\Microsoft\\Boot\\bootmgfw.efi";
    for theirs in [Some(&b"MZ another boot manager"[..]), None] {
        let guest = Guest::new(WinVersion::Win10);
        match theirs {
            Some(bytes) => guest.write(DemoVolume::Boot, fallback, bytes),
            None => guest.remove(DemoVolume::Boot, fallback),
        }
        guest.finding("uefi-fallback");
        guest.check("uefi-fallback", "fault", 4);
        let (report, out) = guest.converted(&[]);
        let action = find(&report["actions"], "id", "uefi-fallback").unwrap();
        assert_eq!(action["state"], "done");
        let backup = guest.path("out/backup/files/EFI/Boot/BOOTX64.EFI");
        assert_eq!(fs::read(backup).ok().as_deref(), theirs);
        let both = [fallback, manager].map(|p| out.read(DemoVolume::Boot, p));
        assert_eq!(both[0], both[1]);
        out.check("uefi-fallback", "ok", 0);
    }
}

#[test]
fn boot_managers() {
    if !have(&TOOLS) {
        return;
    }
    let manager = "EFI\\Microsoft\\Boot\\bootmgfw.efi";
    let guest = Guest::new(WinVersion::Win10);
    guest.write(DemoVolume::Boot, manager, b"no program");
    guest.refused("boot-manager-damaged");
    guest.check("boot-manager", "fault", 4);
    guest.remove(DemoVolume::Boot, manager);
    guest.refused("no-boot-manager");
    guest.check("boot-manager", "fault", 4);
}

#[test]
fn in_place_the_loader_comes_back() {
    if !have(&TOOLS) {
        return;
    }
    let guest = Guest::new(WinVersion::Win10);
    guest.write(DemoVolume::Boot, "EFI\\Boot\\bootx64.efi", b"MZ another");
    let digest = sha256(&guest.disk);
    guest.run("convert", &["--in-place"]).expect(0);
    assert_ne!(sha256(&guest.disk), digest);
    h2k(["rollback", guest.path("out").to_str().unwrap()]).expect(0);
    assert_eq!(sha256(&guest.disk), digest);
}

const LOADER: &str = "Objects\\{733b62e5-f608-11eb-825c-c112f60133ab}\\Elements";

/// EMS keeps COM1: a second port in both domains, and the script's lines go there.
#[test]
fn the_emergency_console() {
    if !have(&TOOLS) {
        return;
    }
    const MANAGER: &str = "Objects\\{9dea862c-5cdd-4e70-acc1-f32b344d4795}\\Elements";
    const SETTINGS: &str = "Objects\\{0ce4991b-e6b3-4b16-b23c-5e0d9250e5d9}\\Elements";
    let serial_ports = |out: &std::path::Path| {
        ["bootstrap", "final"].map(|stage| {
            let xml = fs::read_to_string(out.join(format!("guest-{stage}.xml"))).unwrap();
            xml.matches("<serial ").count()
        })
    };
    for (keys, port) in [
        (vec![format!("{LOADER}\\260000b0")], "COM2"),
        (vec![format!("{SETTINGS}\\260000b0")], "COM2"),
        // Windows 7's default, which ends with the loader.
        (
            vec![
                format!("{MANAGER}\\16000020"),
                format!("{SETTINGS}\\16000020"),
            ],
            "COM1",
        ),
        (vec![format!("{LOADER}\\260000a0")], "COM2"),
        (Vec::new(), "COM1"),
    ] {
        let guest = Guest::new(WinVersion::Win10);
        guest.edit_bcd(|bcd| {
            for key in &keys {
                bcd.set(key, "Element", RegData::Binary(vec![1]));
            }
        });
        let second = port == "COM2";
        if keys.iter().any(|key| key.ends_with("260000a0")) {
            guest.finding("debug-com1");
        } else if second {
            guest.finding("ems-com1");
        }
        let (_, _out) = guest.converted(&[]);
        let out = guest.path("out");
        assert_eq!(serial_ports(&out), [1 + usize::from(second); 2], "{keys:?}");
        let script = fs::read_to_string(out.join("generated/firstboot.cmd")).unwrap();
        assert!(script.contains(&format!("set \"PORT={port}\"")), "{keys:?}");
    }
}

#[test]
fn boot_configuration() {
    if !have(&TOOLS) || !have(&["sgdisk"]) {
        return;
    }
    eprintln!("text mode");
    let guest = Guest::new(WinVersion::Win10);
    guest.edit_bcd(|bcd| {
        bcd.set(
            &format!("{LOADER}\\16000046"),
            "Element",
            RegData::Binary(vec![1]),
        );
    });
    guest.finding("bcd-text-mode");
    let (_, out) = guest.converted(&[]);
    let found = out.path("BCD");
    fs::write(&found, out.read(DemoVolume::Boot, out.bcd_path())).unwrap();
    let text = export(&found, "X", "\\");
    assert!(text.contains("22000002") && !text.contains("16000046"));
    assert!(guest.path("out/backup/BCD").exists());

    for version in [WinVersion::Win10, WinVersion::Win7] {
        eprintln!("device, {version:?}");
        let guest = Guest::new(version);
        let good = guest.read(DemoVolume::Boot, guest.bcd_path());
        guest.edit_bcd(|bcd| {
            for code in ["11000001", "21000001"] {
                let key = format!("{LOADER}\\{code}");
                let mut data = bcd.value(&key, "Element").unwrap().data.clone();
                data[35] ^= 0x5a;
                data[57] ^= 0x5a;
                bcd.set(&key, "Element", RegData::Binary(data));
            }
        });
        guest.refused("bcd-device");
        guest.check("bcd", "fault", 4);
        let (_, out) = guest.converted(&["--repair-bcd"]);
        let repaired = out.read(DemoVolume::Boot, out.bcd_path());
        assert_eq!(tree(&repaired), tree(&good), "{version:?}");
    }

    eprintln!("another Windows");
    let guest = Guest::new(WinVersion::Win10);
    guest.edit_bcd(|bcd| {
        let key = format!("{LOADER}\\21000001");
        let mut data = bcd.value(&key, "Element").unwrap().data.clone();
        data[32..48].copy_from_slice(&Role::Recovery.guid().to_bytes_le());
        bcd.set(&key, "Element", RegData::Binary(data));
    });
    guest.accepted("bcd-other-windows");

    eprintln!("loaders");
    let guest = Guest::new(WinVersion::Win10);
    guest.edit_bcd(|bcd| {
        let exe = RegData::Sz("\\Windows\\system32\\winload.exe".into());
        bcd.set(&format!("{LOADER}\\12000002"), "Element", exe);
    });
    guest.finding("bcd-loader-firmware");
    guest.refused("bcd-loader");
    guest.edit_bcd(|bcd| {
        bcd.set(
            &format!("{LOADER}\\26000022"),
            "Element",
            RegData::Binary(vec![1]),
        );
    });
    guest.accepted("bcd-transient");
    guest.edit_bcd(|bcd| {
        let manager = "Objects\\{9dea862c-5cdd-4e70-acc1-f32b344d4795}\\Elements";
        for code in ["23000003", "24000001"] {
            bcd.remove(&format!("{manager}\\{code}")).unwrap();
        }
    });
    guest.accepted("bcd-no-default");

    eprintln!("damaged, missing");
    let guest = Guest::new(WinVersion::Win10);
    guest.write(DemoVolume::Boot, guest.bcd_path(), b"no hive");
    guest.accepted("bcd-damaged");
    let guest = Guest::new(WinVersion::Win10);
    guest.remove(DemoVolume::Boot, guest.bcd_path());
    guest.refused("no-bcd");
    guest.check("bcd", "fault", 4);

    eprintln!("dirty");
    let guest = Guest::new(WinVersion::Win10);
    let stale = guest.read(DemoVolume::Boot, guest.bcd_path());
    let mut newer = tree(&stale);
    newer.set(
        &format!("{LOADER}\\16000046"),
        "Element",
        RegData::Binary(vec![1]),
    );
    let newer = newer.to_bytes_as("BCD", Format::V1_3);
    let stale = dirty(stale);
    guest.write(DemoVolume::Boot, guest.bcd_path(), &stale);
    let log = format!("{}.LOG", guest.bcd_path());
    guest.write(DemoVolume::Boot, &log, &entry_log(&newer));
    guest.accepted("hive-replayed");
    guest.accepted("bcd-text-mode");
    // The recovered store is what is edited, and the log cannot be replayed over it.
    let (_, out) = guest.converted(&[]);
    let edited = out.read(DemoVolume::Boot, out.bcd_path());
    assert_eq!(edited[4..8], edited[8..12]);
    let mut expected = tree(&newer);
    expected.remove(&format!("{LOADER}\\16000046")).unwrap();
    assert_eq!(tree(&edited), expected);
    assert_eq!(out.read(DemoVolume::Boot, &log), b"");
    for (backup, original) in [("BCD", &stale), ("BCD.LOG", &entry_log(&newer))] {
        let saved = fs::read(guest.path(&format!("out/backup/{backup}"))).unwrap();
        assert!(saved == *original, "{backup}");
    }
    out.check("hives-clean", "ok", 0);
}

#[test]
fn partition_tables() {
    if !have(&TOOLS) || !have(&["sgdisk"]) {
        return;
    }
    eprintln!("blank GPT entry");
    let guest = Guest::new(WinVersion::Win10);
    let disk = guest.disk.to_str().unwrap();
    // Swaps the entries of the ESP and the MSR, then removes the latter.
    tool("sgdisk", &["--transpose=1:2", disk]);
    tool("sgdisk", &["--delete=1", disk]);
    guest.accepted("gpt-blank-entry");

    eprintln!("two active");
    let guest = Guest::new(WinVersion::Win7);
    guest.patch(446 + 16, &[0x80]);
    guest.accepted("active-partition");
    guest.check("partition-table", "fault", 0);

    eprintln!("none active");
    let guest = Guest::new(WinVersion::Win7);
    guest.patch(446, &[0]);
    guest.finding("active-partition");
    guest.refused("no-boot-manager");
    guest.check("boot-manager", "fault", 4);

    eprintln!("hidden sectors");
    let guest = Guest::new(WinVersion::Win7);
    guest.patch(guest.start(Role::SystemReserved) + 28, &[63, 0, 0, 0]);
    guest.accepted("boot-sector-hidden");
    guest.check("boot-sector", "fault", 0);
    let plan = guest.run("plan", &["--force"]).expect(0).json();
    assert!(find(&plan["actions"], "id", "boot-sector").is_none());
    // Only once that volume has to be written, it must not be in use.
    let unclean = Guest::new(WinVersion::Win7);
    unclean.patch(unclean.start(Role::SystemReserved) + 28, &[63, 0, 0, 0]);
    unclean.set_dirty_flag(Role::SystemReserved);
    unclean.run("plan", &[]).expect(0);
    for verb in ["plan", "convert"] {
        let refused = unclean.run(verb, &["--repair-bcd"]).expect(3).json();
        let blocker = find(&refused["error"]["blockers"], "code", "volume-unsafe").unwrap();
        assert!(
            blocker["reason"]
                .as_str()
                .unwrap()
                .contains("not unmounted cleanly"),
            "{blocker}"
        );
    }
    let forced = ["--repair-bcd", "--force-dirty-volume"];
    unclean.run("plan", &forced).expect(0);
    let sector = guest.bytes(guest.start(Role::SystemReserved), 512);
    let (report, out) = guest.converted(&["--repair-bcd"]);
    assert_eq!(report["ready"], true);
    let saved = fs::read(guest.path("out/backup/boot-sector")).unwrap();
    assert_eq!(saved, sector);
    let mut expected = sector;
    expected[28..32].copy_from_slice(&2048u32.to_le_bytes());
    assert_eq!(out.bytes(out.start(Role::SystemReserved), 512), expected);
    out.check("boot-sector", "ok", 0);
}
