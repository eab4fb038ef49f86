//! Volumes that must not be written, or only with a warning.

use std::sync::Arc;

use hyper2kvm::block::{BlockRead, BlockWrite, FileDisk};
use hyper2kvm::demo::bitlocker::{self, Lock, Reserved, Spec, startup_key_file};
use hyper2kvm::demo::guest::layout;
use hyper2kvm::demo::{DemoVolume, Role, WinVersion};
use hyper2kvm::guest::fve::cipher::Method;
use hyper2kvm::guest::{GuestPath, VolumeId};

use crate::support::{TOOLS, h2k, have, tool};
use crate::{Guest, config, find};

const HIBERNATED: [u8; 16384] = {
    let mut bytes = [0; 16384];
    [bytes[0], bytes[1], bytes[2], bytes[3]] = *b"HIBR";
    bytes
};

#[test]
fn hibernated_and_not_closed() {
    if !have(&TOOLS) {
        return;
    }
    eprintln!("hibernated");
    let guest = Guest::new(WinVersion::Win10);
    guest.write(DemoVolume::Windows, "hiberfil.sys", &HIBERNATED);
    guest.refused("volume-hibernated");
    guest.run("convert", &["--force-dirty-volume"]).expect(3);
    guest.check("no-blockers", "fault", 4);

    eprintln!("Fast Startup, or running");
    let guest = Guest::new(WinVersion::Win10);
    guest.open_log(Role::Windows, (2, 0));
    guest.refused("volume-cached");
    guest.run("convert", &["--force-dirty-volume"]).expect(3);
    guest.check("no-blockers", "fault", 4);

    eprintln!("another volume");
    let guest = Guest::new(WinVersion::Win10);
    guest.open_log(Role::Recovery, (2, 0));
    guest.accepted("data-volume-hibernated");
    let guest = Guest::new(WinVersion::Win10);
    guest.set_dirty_flag(Role::Recovery);
    guest.accepted("data-volume-dirty");
    let recovery = VolumeId::new(guest.spec.partition(Role::Recovery).unwrap().index);
    let guest = Guest::new(WinVersion::Win10);
    guest.change_volume(recovery, |writer, volume| {
        let path = GuestPath::parse("hiberfil.sys").unwrap();
        writer.write_file(volume, &path, &HIBERNATED).unwrap();
    });
    guest.accepted("data-volume-hibernated");
}

#[test]
fn a_dirty_volume_is_refused_or_forced() {
    if !have(&TOOLS) {
        return;
    }
    for spoil in [
        |guest: &Guest| guest.set_dirty_flag(Role::Windows),
        |guest: &Guest| guest.open_log(Role::Windows, (1, 1)),
    ] {
        let guest = Guest::new(WinVersion::Win10);
        spoil(&guest);
        guest.refused("volume-dirty");
        guest.check("volume-clean", "fault", 0);
        let plan = guest
            .run("plan", &["--force-dirty-volume"])
            .expect(0)
            .json();
        assert_eq!(plan["ready"], true, "{:#}", plan["checks"]);
        let report = guest
            .run("convert", &["--force-dirty-volume"])
            .expect(0)
            .json();
        let findings = &report["inspection"]["findings"];
        let found = find(findings, "id", "volume-dirty-forced").unwrap();
        crate::rows::assert_row("volume-dirty-forced", found);
        assert_eq!(report["ready"], true);
    }
}

/// The Windows volume in BitLocker, opened by that.
fn encrypt_windows(guest: &Guest, lock: Lock) {
    let part = guest.spec.partition(Role::Windows).unwrap();
    let disk: Arc<dyn BlockWrite> = Arc::new(FileDisk::open_rw(&guest.disk).unwrap());
    let volume = VolumeId::new(part.index);
    let places = bitlocker::reserve(disk, &layout(&guest.spec), volume).unwrap();
    let plain = guest.path("plain.raw");
    std::fs::rename(&guest.disk, &plain).unwrap();
    let (from, to) = (plain.to_str().unwrap(), guest.disk.to_str().unwrap());
    tool("cp", &["--sparse=always", from, to]);
    let plain: Arc<dyn BlockRead> = Arc::new(FileDisk::open(&plain).unwrap());
    let disk = FileDisk::open_rw(&guest.disk).unwrap();
    let spec = Spec::new(Method::XtsAes256, &[lock], places);
    bitlocker::encrypt(&plain, &disk, part.start, part.size, &spec).unwrap();
}

#[test]
fn encrypted_volumes() {
    if !have(&TOOLS) {
        return;
    }
    let guest = Guest::new(WinVersion::Win10);
    let start = guest.start(Role::Windows);
    guest.patch(start + 3, b"-FVE-FS-");
    guest.refused("bitlocker");
    let guest = Guest::new(WinVersion::Win10);
    let part = guest.spec.partition(Role::Windows).unwrap();
    let other = Guest::new(WinVersion::Win10);
    let plain = FileDisk::open(&other.disk).unwrap();
    let rewrite = |lock: Lock, vista: bool, states: (u16, u16)| {
        let copies = [1 << 20, 2 << 20, 3 << 20];
        let places = Reserved {
            copies,
            moved: 4 << 20,
        };
        let mut spec = Spec::new(Method::CbcAes128Diffuser, &[lock], places);
        (spec.vista, spec.states) = (vista, states);
        let disk = FileDisk::open_rw(&guest.disk).unwrap();
        let (start, len) = (part.start, part.size);
        bitlocker::write_metadata(&plain, &disk, start, len, &spec).unwrap();
    };
    let startup = Lock::StartupKey {
        guid: [1; 16],
        key: [2; 32],
    };
    for vista in [false, true] {
        for (lock, named) in [(Lock::Tpm, "TPM"), (startup, "startup key")] {
            rewrite(lock, vista, (4, 4));
            let found = guest.finding("bitlocker");
            assert!(
                found["evidence"].as_str().unwrap().contains(named),
                "{found}"
            );
        }
    }
    rewrite(startup, false, (5, 1));
    guest.refused("bitlocker-converting");
    rewrite(startup, false, (4, 4));
    guest.refused("bitlocker");
    guest.check("windows-found", "fault", 4);
    let verdict = guest.verify(4);
    let hive = find(&verdict["checks"], "id", "system-hive-sound").unwrap();
    assert_eq!(hive["state"], "could-not-run");
    let guest = Guest::new(WinVersion::Win10);
    guest.patch(guest.start(Role::Recovery) + 3, b"-FVE-FS-");
    guest.accepted("bitlocker-data");
    let key = startup_key_file([1; 16], &[2; 32]);
    for (lock, id) in [
        (Lock::ClearKey, "bitlocker-suspended"),
        (startup, "bitlocker-opened"),
    ] {
        let guest = Guest::new(WinVersion::Win10);
        encrypt_windows(&guest, lock);
        std::fs::write(guest.path("key.BEK"), &key).unwrap();
        let file = format!("all:file:{}", guest.path("key.BEK").display());
        let disk = guest.disk.to_str().unwrap();
        let seen = h2k(["inspect", disk, "--json", "--key", &file])
            .expect(0)
            .json();
        crate::rows::assert_row(id, find(&seen["findings"], "id", id).unwrap());
        guest.run("plan", &["--key", &file]).expect(0);
    }

    for file in ["explorer.exe", "SYSTEM"] {
        eprintln!("encrypted: {file}");
        let guest = Guest::new(WinVersion::Win10);
        let data = guest.attribute(Role::Windows, file, 0x80);
        guest.patch(data + 12, &0x4000u16.to_le_bytes());
        guest.refused("efs");
    }
}

#[test]
fn volumes_of_another_kind() {
    if !have(&TOOLS) || !have(&["sgdisk"]) {
        return;
    }
    eprintln!("dynamic disk");
    let guest = Guest::new(WinVersion::Win7);
    guest.patch(446 + 4, &[0x42]);
    guest.patch(446 + 16 + 4, &[0x42]);
    guest.refused("dynamic-disk");
    let typed = |kind: &str| {
        let guest = Guest::new(WinVersion::Win10);
        let index = guest.volume(DemoVolume::Windows).partition;
        let arg = format!("--typecode={index}:{kind}");
        tool("sgdisk", &[&arg, guest.disk.to_str().unwrap()]);
        guest
    };
    typed("AF9B60A0-1431-4F62-BC68-3311714A69AD").refused("dynamic-disk");

    eprintln!("storage spaces");
    typed("E75CAF8F-F680-4CEE-AFA3-B001E56EFC2D").refused("storage-spaces");

    eprintln!("luks");
    let guest = Guest::new(WinVersion::Win10);
    guest.patch(guest.start(Role::Windows), b"LUKS\xba\xbe");
    guest.refused("luks");

    eprintln!("refs");
    let guest = Guest::new(WinVersion::Win10);
    guest.patch(guest.start(Role::Windows) + 3, b"ReFS\0\0\0\0");
    guest.refused("refs");
    let guest = Guest::new(WinVersion::Win10);
    guest.patch(guest.start(Role::Recovery) + 3, b"ReFS\0\0\0\0");
    guest.accepted("refs-data");
}

/// Hives, logs and drivers that NTFS compresses, in directories it compresses.
#[test]
fn compressed_by_ntfs() {
    if !have(&TOOLS) {
        return;
    }
    let guest = Guest::new(WinVersion::Win10);
    let packed = ["SYSTEM", "SOFTWARE"].map(|name| {
        let mut hive = guest.hive(name);
        hive.resize(hive.len().next_multiple_of(65536), 0);
        guest.write(DemoVolume::Windows, &config(name), &hive);
        guest.pack(name);
        (name, hive)
    });
    for (name, hive) in &packed {
        assert!(guest.hive(name) == *hive, "{name}");
    }
    let driver = "Windows\\System32\\drivers\\viostor.sys";
    guest.write(DemoVolume::Windows, driver, &[7; 65536]);
    guest.pack("viostor.sys");
    guest.finding("compressed-volume");
    let (report, out) = guest.converted(&[]);
    assert_eq!(report["ready"], true);
    for (name, hive) in &packed {
        assert!(out.hive(name) != *hive, "{name}");
    }
    assert!(out.read(DemoVolume::Windows, driver) != [7; 65536]);
    assert!(
        out.inspect()["findings"]
            .to_string()
            .find("compressed-volume")
            .is_none()
    );
}
