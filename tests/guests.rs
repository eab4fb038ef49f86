//! Guests that are not clean: each state of `docs/guests.md` is built, shown to `inspect`, and
//! converted or refused, with the message id and the exit code asserted.
//!
//! Every guest is a copy of one of a few built ones, changed with our writer or byte by byte.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod support;

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use hyper2kvm::demo::guest::layout;
use hyper2kvm::demo::{GuestSpec, Leftovers, Place, Role, WinVersion};
use hyper2kvm::disk::block::FileDisk;
use hyper2kvm::guest::ntfs3g::MountOptions;
use hyper2kvm::guest::{EmbeddedWriter, GuestPath, GuestRead, GuestWrite, VolumeId, embedded};
use hyper2kvm::registry::base::{set_clean, update_checksum};
use hyper2kvm::registry::build::Format;
use hyper2kvm::registry::marvin::marvin32;
use hyper2kvm::registry::{HiveView, KeyTree, RegData};
use serde_json::Value;
use support::{Lab, Run, TOOLS, export, h2k, have, tool, virtio_win};

/// A guest of that version, built once.
fn base(version: WinVersion) -> &'static Lab {
    static LABS: [OnceLock<Lab>; 2] = [OnceLock::new(), OnceLock::new()];
    let slot = match version {
        WinVersion::Win10 => &LABS[0],
        WinVersion::Win7 => &LABS[1],
        _ => panic!("no such base"),
    };
    slot.get_or_init(|| Lab::new(spec(version)))
}

fn spec(version: WinVersion) -> GuestSpec {
    GuestSpec {
        disk_size: 1 << 30,
        // Ready for SATA or IDE as it is, so that a fault is the one put in.
        leftovers: Leftovers::None,
        ..GuestSpec::new(version)
    }
}

/// A copy of a base to spoil.
struct Guest {
    dir: tempfile::TempDir,
    disk: PathBuf,
    spec: GuestSpec,
}

impl Guest {
    fn new(version: WinVersion) -> Self {
        let base = base(version);
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("guest.raw");
        let (from, to) = (base.raw.to_str().unwrap(), disk.to_str().unwrap());
        tool("cp", &["--sparse=always", from, to]);
        let spec = base.spec.clone();
        Self { dir, disk, spec }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn volume(&self, place: Place) -> VolumeId {
        let role = match place {
            Place::Windows => Role::Windows,
            Place::Boot => self.spec.boot_role(),
        };
        VolumeId(self.spec.partition(role).unwrap().index)
    }

    fn start(&self, role: Role) -> u64 {
        self.spec.partition(role).unwrap().start
    }

    fn change(&self, place: Place, change: impl FnOnce(&mut dyn GuestWrite, VolumeId)) {
        let disk = Arc::new(FileDisk::open_rw(&self.disk).unwrap());
        let options = MountOptions::default();
        let mut writer = Box::new(EmbeddedWriter::new(disk, &layout(&self.spec), options));
        change(writer.as_mut(), self.volume(place));
        writer.close().unwrap();
    }

    fn write(&self, place: Place, path: &str, contents: &[u8]) {
        let path = GuestPath::parse(path).unwrap();
        let folder = path.parent().filter(|p| !p.is_root());
        let missing = folder.filter(|f| !self.exists(place, f));
        self.change(place, |writer, volume| {
            if let Some(folder) = missing {
                writer.create_dir(volume, &folder).unwrap();
            }
            writer.write_file(volume, &path, contents).unwrap();
        });
    }

    fn remove(&self, place: Place, path: &str) {
        let path = GuestPath::parse(path).unwrap();
        self.change(place, |writer, volume| {
            writer.remove_file(volume, &path).unwrap();
        });
    }

    fn reader(&self) -> embedded::EmbeddedReader {
        let disk = Arc::new(FileDisk::open(&self.disk).unwrap());
        embedded::open(disk, &layout(&self.spec)).unwrap()
    }

    fn exists(&self, place: Place, path: &GuestPath) -> bool {
        let info = self.reader().stat(self.volume(place), path);
        info.unwrap().is_some()
    }

    fn read(&self, place: Place, path: &str) -> Vec<u8> {
        let path = GuestPath::parse(path).unwrap();
        self.reader()
            .read(self.volume(place), &path, 64 << 20)
            .unwrap()
    }

    fn patch(&self, offset: u64, bytes: &[u8]) {
        let mut file = fs::File::options().write(true).open(&self.disk).unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        file.write_all(bytes).unwrap();
    }

    fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut file = fs::File::open(&self.disk).unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        let mut bytes = vec![0; len];
        file.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn hive(&self, name: &str) -> Vec<u8> {
        self.read(Place::Windows, &config(name))
    }

    fn edit_hive(&self, name: &str, edit: impl FnOnce(&mut KeyTree)) {
        let mut tree = tree(&self.hive(name));
        edit(&mut tree);
        self.write(Place::Windows, &config(name), &tree.to_bytes(name));
    }

    fn bcd_path(&self) -> &'static str {
        match self.spec.boot_role() {
            Role::Esp => "EFI\\Microsoft\\Boot\\BCD",
            _ => "Boot\\BCD",
        }
    }

    fn edit_bcd(&self, edit: impl FnOnce(&mut KeyTree)) {
        let mut tree = tree(&self.read(Place::Boot, self.bcd_path()));
        edit(&mut tree);
        let bytes = tree.to_bytes_as("BCD", Format::V1_3);
        self.write(Place::Boot, self.bcd_path(), &bytes);
    }

    /// An attribute of the MFT record of a file, as an offset on the disk.
    fn attribute(&self, name: &str, kind: u32) -> u64 {
        let part = self.spec.partition(Role::Windows).unwrap();
        let boot = self.bytes(part.start, 512);
        let cluster = u64::from(boot[13]) * 512;
        let mft = u64::from_le_bytes(boot[48..56].try_into().unwrap()) * cluster + part.start;
        let wanted: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let table = self.bytes(mft, 512 << 10);
        for (n, record) in table.chunks(1024).enumerate() {
            let has_name = record.windows(wanted.len()).any(|w| w == wanted);
            if !record.starts_with(b"FILE") || !has_name {
                continue;
            }
            let mut at = usize::from(u16::from_le_bytes([record[20], record[21]]));
            loop {
                let word = |i| u32::from_le_bytes(record[i..i + 4].try_into().unwrap());
                match word(at) {
                    u32::MAX => break,
                    found if found == kind => return mft + n as u64 * 1024 + at as u64,
                    _ => at += word(at + 4) as usize,
                }
            }
        }
        panic!("no attribute {kind:#x} of {name}");
    }

    fn set_dirty_flag(&self) {
        let info = self.attribute("$Volume", 0x70);
        let content = u64::from(self.bytes(info + 20, 1)[0]);
        self.patch(info + content + 10, &[1]);
        // The first records are kept twice, and ntfs-3g compares them.
        let start = self.start(Role::Windows);
        let boot = self.bytes(start, 512);
        let cluster = u64::from(boot[13]) * 512;
        let at = |i: usize| {
            let field = boot[i..i + 8].try_into().unwrap();
            start + u64::from_le_bytes(field) * cluster
        };
        self.patch(at(56) + (info - at(48)) + content + 10, &[1]);
    }

    fn inspect(&self) -> Value {
        h2k(["inspect", self.disk.to_str().unwrap(), "--json"])
            .expect(0)
            .json()
    }

    fn run(&self, verb: &str, more: &[&str]) -> Run {
        let iso = virtio_win().to_str().unwrap();
        let disk = self.disk.to_str().unwrap();
        let out = self.path("out");
        let mut args = vec![verb, disk, "--virtio-iso", iso, "--json"];
        args.extend(["-o", out.to_str().unwrap()]);
        args.extend(more);
        h2k(args)
    }

    /// The finding, after its severity was asserted.
    #[track_caller]
    fn finding(&self, id: &str, severity: &str) -> Value {
        let seen = self.inspect();
        let found = find(&seen["findings"], "id", id);
        let found = found.unwrap_or_else(|| panic!("no {id} in {:#}", seen["findings"]));
        assert_eq!(found["severity"], severity, "{id}");
        for part in ["message", "remedy", "evidence"] {
            assert_ne!(found[part], "", "{id} has no {part}");
        }
        found.clone()
    }

    #[track_caller]
    fn refused(&self, id: &str) {
        self.finding(id, "blocker");
        let run = self.run("convert", &[]).expect(3);
        let error = run.json();
        let blockers = &error["error"]["blockers"];
        assert!(find(blockers, "code", id).is_some(), "{id}: {blockers:#}");
        assert!(!self.path("out").exists(), "{id}");
    }

    #[track_caller]
    fn accepted(&self, id: &str, severity: &str) {
        self.finding(id, severity);
        self.run("plan", &[]).expect(0);
    }

    fn verify(&self, code: i32) -> Value {
        let disk = self.disk.to_str().unwrap();
        let controller = ["--controller", "ide", "--controller", "sata"];
        let which = match self.spec.version {
            WinVersion::Win7 => &controller[..2],
            _ => &controller[2..],
        };
        let mut args = vec!["verify", disk, "--json"];
        args.extend(which);
        h2k(args).expect(code).json()
    }

    #[track_caller]
    fn check(&self, id: &str, state: &str, code: i32) {
        let verdict = self.verify(code);
        let check = find(&verdict["checks"], "id", id).unwrap();
        assert_eq!(check["state"], state, "{check:#}");
    }
}

fn config(name: &str) -> String {
    format!("Windows\\System32\\config\\{name}")
}

fn tree(hive: &[u8]) -> KeyTree {
    KeyTree::from_view(&HiveView::new(hive).unwrap()).unwrap()
}

fn find<'v>(list: &'v Value, key: &str, wanted: &str) -> Option<&'v Value> {
    list.as_array()?.iter().find(|item| item[key] == wanted)
}

const SET: &str = "ControlSet001";

/// Marks a hive as not saved completely.
fn dirty(mut hive: Vec<u8>) -> Vec<u8> {
    set_clean(&mut hive, 7).unwrap();
    hive[4..8].copy_from_slice(&8u32.to_le_bytes());
    update_checksum(&mut hive).unwrap();
    hive
}

/// A log in the new format with one entry that brings all bins of `hive`.
fn entry_log(hive: &[u8]) -> Vec<u8> {
    let bins = &hive[4096..];
    let mut log = hive[..512].to_vec();
    log[28..32].copy_from_slice(&6u32.to_le_bytes());
    set_clean(&mut log, 7).unwrap();
    let mut body: Vec<u8> = [0, bins.len() as u32]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect();
    body.extend(bins);
    body.resize((40 + body.len()).next_multiple_of(512) - 40, 0);
    let mut entry = b"HvLE".to_vec();
    for field in [40 + body.len() as u32, 0, 7, bins.len() as u32, 1] {
        entry.extend(field.to_le_bytes());
    }
    entry.extend(marvin32(&body).to_le_bytes());
    entry.extend(marvin32(&entry).to_le_bytes());
    log.extend(entry);
    log.extend(body);
    log
}

#[test]
fn volumes_that_must_not_be_written() {
    if !have(&TOOLS) || !have(&["sgdisk"]) {
        return;
    }
    eprintln!("hibernated");
    let guest = Guest::new(WinVersion::Win10);
    let mut hiberfil = vec![0; 16384];
    hiberfil[..4].copy_from_slice(b"HIBR");
    guest.write(Place::Windows, "hiberfil.sys", &hiberfil);
    guest.refused("volume-hibernated");
    guest.run("convert", &["--force-dirty-volume"]).expect(3);
    guest.check("no-blockers", "fault", 4);

    eprintln!("bitlocker");
    let guest = Guest::new(WinVersion::Win10);
    guest.patch(guest.start(Role::Windows) + 3, b"-FVE-FS-");
    guest.refused("bitlocker");
    // One metadata block with one key, protected as given.
    let start = guest.start(Role::Windows);
    let mut block = b"-FVE-FS-".to_vec();
    block.resize(112, 0);
    block.extend([80, 0, 2, 0, 8, 0]);
    block.resize(112 + 80, 0);
    guest.patch(start + 176, &0x10_0000u64.to_le_bytes());
    for (protection, named, suspended) in [
        (0x800u16, "recovery password", false),
        (0, "clear key", true),
    ] {
        block[112 + 34..112 + 36].copy_from_slice(&protection.to_le_bytes());
        guest.patch(start + 0x10_0000, &block);
        let found = guest.finding("bitlocker", "blocker");
        let text = |part: &str| found[part].as_str().unwrap().to_string();
        assert!(text("evidence").contains(named), "{found}");
        assert_eq!(text("message").contains("suspended"), suspended, "{found}");
    }
    guest.refused("bitlocker");
    guest.check("windows-found", "fault", 4);
    let verdict = guest.verify(4);
    let hive = find(&verdict["checks"], "id", "system-hive-sound").unwrap();
    assert_eq!(hive["state"], "could-not-run");
    let guest = Guest::new(WinVersion::Win10);
    guest.patch(guest.start(Role::Recovery) + 3, b"-FVE-FS-");
    guest.accepted("bitlocker-data", "warning");

    eprintln!("dynamic disk");
    let guest = Guest::new(WinVersion::Win7);
    guest.patch(446 + 4, &[0x42]);
    guest.patch(446 + 16 + 4, &[0x42]);
    guest.refused("dynamic-disk");

    eprintln!("storage spaces");
    let guest = Guest::new(WinVersion::Win10);
    let index = guest.volume(Place::Windows).0;
    let arg = format!("--typecode={index}:E75CAF8F-F680-4CEE-AFA3-B001E56EFC2D");
    tool("sgdisk", &[&arg, guest.disk.to_str().unwrap()]);
    guest.refused("storage-spaces");

    eprintln!("refs");
    let guest = Guest::new(WinVersion::Win10);
    guest.patch(guest.start(Role::Windows) + 3, b"ReFS\0\0\0\0");
    guest.refused("refs");
    let guest = Guest::new(WinVersion::Win10);
    guest.patch(guest.start(Role::Recovery) + 3, b"ReFS\0\0\0\0");
    guest.accepted("refs-data", "info");

    eprintln!("encrypted files");
    let guest = Guest::new(WinVersion::Win10);
    let data = guest.attribute("explorer.exe", 0x80);
    guest.patch(data + 12, &0x4000u16.to_le_bytes());
    guest.refused("efs");
}

#[test]
fn a_dirty_volume_is_refused_or_forced() {
    if !have(&TOOLS) {
        return;
    }
    let guest = Guest::new(WinVersion::Win10);
    guest.set_dirty_flag();
    guest.refused("volume-dirty");
    guest.check("volume-clean", "fault", 0);
    let report = guest
        .run("convert", &["--force-dirty-volume"])
        .expect(0)
        .json();
    let findings = &report["inspection"]["findings"];
    let found = find(findings, "id", "volume-dirty-forced").unwrap();
    assert_eq!(found["severity"], "warning");
    assert_eq!(report["ready"], true);
}

#[test]
fn states_of_windows_are_told() {
    if !have(&TOOLS) {
        return;
    }
    let guest = Guest::new(WinVersion::Win10);
    guest.write(
        Place::Windows,
        "System Volume Information\\{f3cf8f0b-0000-11ee-8c99-0242ac120002}{3808876b-c176-4e48-b7ae-04046e6cc752}",
        &[0; 4096],
    );
    guest.write(Place::Windows, "Windows\\WinSxS\\pending.xml", b"<xml/>");
    guest.edit_hive("SYSTEM", |system| {
        system
            .sz(
                &format!("{SET}\\Control\\ProductOptions"),
                "ProductType",
                "LanmanNT",
            )
            .set(
                &format!("{SET}\\Control\\Session Manager"),
                "PendingFileRenameOperations",
                RegData::MultiSz(vec![r"\??\C:\x".into()]),
            )
            .dword(&format!("{SET}\\Services\\ClusSvc"), "Start", 2)
            .dword(&format!("{SET}\\Services\\SymEFASI"), "Start", 0)
            .dword(&format!("{SET}\\Services\\SymEFASI"), "Type", 1)
            .dword("Setup", "SystemSetupInProgress", 1);
    });
    guest.edit_hive("SOFTWARE", |software| {
        software
            .dword(
                "Policies\\Microsoft\\Windows\\DeviceInstall\\Restrictions",
                "DenyUnspecified",
                1,
            )
            .key_mut(
                "Microsoft\\Windows\\CurrentVersion\\Component Based Servicing\\RebootPending",
            );
    });
    let data = guest.attribute("explorer.exe", 0x80);
    guest.patch(data + 12, &1u16.to_le_bytes());
    for (id, severity) in [
        ("vss-snapshots", "info"),
        ("pending-updates", "warning"),
        ("pending-reboot", "warning"),
        ("pending-renames", "info"),
        ("device-install-policy", "warning"),
        ("cluster-node", "warning"),
        ("domain-controller", "warning"),
        ("setup-in-progress", "warning"),
        ("antivirus", "warning"),
        ("compressed-volume", "info"),
    ] {
        guest.finding(id, severity);
    }
    let report = guest.run("convert", &[]).expect(0).json();
    assert_eq!(report["ready"], true);
    assert_eq!(report["inspection"]["pending_updates"], true);
}

/// The judge is `hivexregedit`: what it exports from the converted hive must be what it exports from
/// the recovered one after merging our `.reg` file.
#[test]
fn logs_are_replayed_before_the_edit() {
    if !have(&TOOLS) {
        return;
    }
    let guest = Guest::new(WinVersion::Win10);
    let mut recovered = Vec::new();
    for name in ["SYSTEM", "SOFTWARE", "DRIVERS"] {
        let stale = guest.hive(name);
        let mut newer = tree(&stale);
        newer.sz("Only in the log", "value", name);
        let newer = newer.to_bytes(name);
        guest.write(Place::Windows, &config(name), &dirty(stale));
        let log = config(&format!("{name}.LOG1"));
        guest.write(Place::Windows, &log, &entry_log(&newer));
        recovered.push((name, newer));
    }
    guest.finding("hive-replayed", "info");
    guest.check("hives-clean", "fault", 0);
    let report = guest.run("convert", &["--format", "raw"]).expect(0).json();
    let seen = &report["inspection"]["hives"]["system"];
    assert_eq!(seen["log_entries_replayable"], 1);
    let disk = PathBuf::from(report["outputs"]["disks"][0].as_str().unwrap());
    let out = Guest {
        dir: tempfile::tempdir().unwrap(),
        disk,
        spec: guest.spec.clone(),
    };
    for (name, newer) in recovered {
        let (expected, found) = (guest.path("expected"), guest.path("found"));
        fs::write(&expected, newer).unwrap();
        let bytes = out.hive(name);
        assert_eq!(bytes[4..8], bytes[8..12], "{name} is still dirty");
        fs::write(&found, bytes).unwrap();
        let reg = guest.path(&format!("out/registry/{name}.reg"));
        let prefix = format!("HKEY_LOCAL_MACHINE\\{name}");
        let merge = ["--merge", "--prefix", &prefix];
        let files = [expected.to_str().unwrap(), reg.to_str().unwrap()];
        tool("hivexregedit", &[&merge[..], &files[..]].concat());
        let both = [&expected, &found].map(|p| export(p, &prefix, "\\"));
        assert!(both[0] == both[1], "{name}");
        assert!(both[1].contains("Only in the log"), "{name}");
        assert_eq!(
            out.read(Place::Windows, &config(&format!("{name}.LOG1"))),
            b""
        );
    }
    out.check("hives-clean", "ok", 0);
}

#[test]
fn hives_without_usable_logs() {
    if !have(&TOOLS) {
        return;
    }
    eprintln!("sound");
    let guest = Guest::new(WinVersion::Win10);
    let stale = dirty(guest.hive("SYSTEM"));
    guest.write(Place::Windows, &config("SYSTEM"), &stale);
    let found = guest.finding("hive-stale", "warning");
    let text = found["message"].as_str().unwrap();
    assert!(text.contains("may be missing"), "{text}");
    guest.check("logs-harmless", "fault", 0);
    let report = guest.run("convert", &[]).expect(0).json();
    assert_eq!(report["ready"], true);

    eprintln!("unsound");
    let guest = Guest::new(WinVersion::Win10);
    let mut bad = dirty(guest.hive("SYSTEM"));
    let at = bad.windows(2).skip(4096 + 200).position(|w| w == b"nk");
    let at = at.unwrap() + 4096 + 200;
    bad[at..at + 2].copy_from_slice(b"xx");
    guest.write(Place::Windows, &config("SYSTEM"), &bad);
    guest.refused("hive-damaged");

    eprintln!("logs ahead of a clean hive");
    let guest = Guest::new(WinVersion::Win10);
    let mut hive = guest.hive("SYSTEM");
    let log = entry_log(&hive);
    set_clean(&mut hive, 5).unwrap();
    guest.write(Place::Windows, &config("SYSTEM"), &hive);
    guest.write(Place::Windows, &config("SYSTEM.LOG2"), &log);
    guest.accepted("hive-log-lost", "warning");

    eprintln!("missing");
    let guest = Guest::new(WinVersion::Win10);
    guest.remove(Place::Windows, &config("SYSTEM"));
    guest.refused("hive-missing");
}

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
            Some(bytes) => guest.write(Place::Boot, fallback, bytes),
            None => guest.remove(Place::Boot, fallback),
        }
        guest.finding("uefi-fallback", "info");
        guest.check("uefi-fallback", "fault", 4);
        let report = guest.run("convert", &["--format", "raw"]).expect(0).json();
        let action = find(&report["actions"], "id", "uefi-fallback").unwrap();
        assert_eq!(action["state"], "done");
        let backup = guest.path("out/backup/files/EFI/Boot/BOOTX64.EFI");
        assert_eq!(fs::read(backup).ok().as_deref(), theirs);
        let disk = PathBuf::from(report["outputs"]["disks"][0].as_str().unwrap());
        let out = Guest { disk, ..guest };
        let both = [fallback, manager].map(|p| out.read(Place::Boot, p));
        assert_eq!(both[0], both[1]);
        out.check("uefi-fallback", "ok", 0);
    }
}

#[test]
fn in_place_the_loader_comes_back() {
    if !have(&TOOLS) {
        return;
    }
    let guest = Guest::new(WinVersion::Win10);
    guest.write(Place::Boot, "EFI\\Boot\\bootx64.efi", b"MZ another");
    let digest = support::sha256(&guest.disk);
    guest.run("convert", &["--in-place"]).expect(0);
    assert_ne!(support::sha256(&guest.disk), digest);
    h2k(["rollback", guest.path("out").to_str().unwrap()]).expect(0);
    assert_eq!(support::sha256(&guest.disk), digest);
}

const LOADER: &str = "Objects\\{733b62e5-f608-11eb-825c-c112f60133ab}\\Elements";

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
    guest.finding("bcd-text-mode", "info");
    let report = guest.run("convert", &["--format", "raw"]).expect(0).json();
    let disk = PathBuf::from(report["outputs"]["disks"][0].as_str().unwrap());
    let out = Guest { disk, ..guest };
    let found = out.path("BCD");
    fs::write(&found, out.read(Place::Boot, out.bcd_path())).unwrap();
    let text = export(&found, "X", "\\");
    assert!(text.contains("22000002") && !text.contains("16000046"));
    assert!(out.path("out/backup/BCD").exists());

    for version in [WinVersion::Win10, WinVersion::Win7] {
        eprintln!("device, {version:?}");
        let guest = Guest::new(version);
        let good = guest.read(Place::Boot, guest.bcd_path());
        guest.edit_bcd(|bcd| {
            for code in ["11000001", "21000001"] {
                let key = format!("{LOADER}\\{code}");
                let mut data = bcd.value(&key, "Element").unwrap().data.clone();
                data[35] ^= 0x5a;
                data[57] ^= 0x5a;
                bcd.set(&key, "Element", RegData::Binary(data));
            }
        });
        guest.finding("bcd-device", "warning");
        guest.check("bcd", "fault", 0);
        let plan = guest.run("plan", &[]).expect(0).json();
        assert!(find(&plan["actions"], "id", "hive-bcd").is_none());
        let repair = ["--repair-bcd", "--format", "raw"];
        let report = guest.run("convert", &repair).expect(0).json();
        let disk = PathBuf::from(report["outputs"]["disks"][0].as_str().unwrap());
        let out = Guest { disk, ..guest };
        let repaired = out.read(Place::Boot, out.bcd_path());
        assert_eq!(tree(&repaired), tree(&good), "{version:?}");
    }

    eprintln!("loaders");
    let guest = Guest::new(WinVersion::Win10);
    guest.edit_bcd(|bcd| {
        let exe = RegData::Sz("\\Windows\\system32\\winload.exe".into());
        bcd.set(&format!("{LOADER}\\12000002"), "Element", exe);
    });
    guest.accepted("bcd-loader-firmware", "warning");
    guest.accepted("bcd-loader", "warning");
    guest.edit_bcd(|bcd| {
        bcd.set(
            &format!("{LOADER}\\26000022"),
            "Element",
            RegData::Binary(vec![1]),
        );
    });
    guest.accepted("bcd-transient", "warning");
    guest.edit_bcd(|bcd| {
        let manager = "Objects\\{9dea862c-5cdd-4e70-acc1-f32b344d4795}\\Elements";
        for code in ["23000003", "24000001"] {
            bcd.remove(&format!("{manager}\\{code}")).unwrap();
        }
    });
    guest.accepted("bcd-no-default", "warning");

    eprintln!("damaged, missing");
    let guest = Guest::new(WinVersion::Win10);
    guest.write(Place::Boot, guest.bcd_path(), b"no hive");
    guest.accepted("bcd-damaged", "warning");
    let guest = Guest::new(WinVersion::Win10);
    guest.remove(Place::Boot, guest.bcd_path());
    guest.accepted("no-bcd", "warning");
    guest.check("bcd", "fault", 0);

    eprintln!("dirty");
    let guest = Guest::new(WinVersion::Win10);
    let stale = guest.read(Place::Boot, guest.bcd_path());
    let mut newer = tree(&stale);
    newer.set(
        &format!("{LOADER}\\16000046"),
        "Element",
        RegData::Binary(vec![1]),
    );
    let newer = newer.to_bytes_as("BCD", Format::V1_3);
    guest.write(Place::Boot, guest.bcd_path(), &dirty(stale));
    let log = format!("{}.LOG", guest.bcd_path());
    guest.write(Place::Boot, &log, &entry_log(&newer));
    guest.accepted("bcd-text-mode", "info");
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
    guest.accepted("gpt-blank-entry", "warning");

    eprintln!("two active");
    let guest = Guest::new(WinVersion::Win7);
    guest.patch(446 + 16, &[0x80]);
    guest.accepted("active-partition", "warning");
    guest.check("partition-table", "fault", 0);

    eprintln!("none active");
    let guest = Guest::new(WinVersion::Win7);
    guest.patch(446, &[0]);
    guest.accepted("active-partition", "warning");
    guest.check("boot-manager", "fault", 4);

    eprintln!("hidden sectors");
    let guest = Guest::new(WinVersion::Win7);
    guest.patch(guest.start(Role::SystemReserved) + 28, &[63, 0, 0, 0]);
    guest.accepted("boot-sector-hidden", "warning");
    guest.check("boot-sector", "fault", 0);
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
            s.dword("Select", "Current", 9);
        }),
    ];
    for (id, code, edit) in edits {
        eprintln!("{id}");
        let guest = Guest::new(WinVersion::Win10);
        guest.edit_hive("SYSTEM", edit);
        guest.check(id, "fault", code);
    }
}

#[test]
fn old_windows() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let media = dir.path().join("virtio-win");
    drivers_for_old_windows(&media);
    let media = media.to_str().unwrap();
    for version in [WinVersion::Xp, WinVersion::Server2003, WinVersion::Vista] {
        eprintln!("{version:?}");
        let lab = Lab::new(spec(version));
        let convert = |more: &[&str]| {
            let (disk, out) = (lab.raw.to_str().unwrap(), lab.path("out"));
            let fixed = ["convert", disk, "--json", "--virtio-iso", media, "-o"];
            let out = [out.to_str().unwrap()];
            h2k([&fixed[..], &out[..], more].concat())
        };
        // Current media have nothing for them.
        let error = lab.convert(&lab.raw, &[]).expect(3).json();
        let text = error.to_string();
        assert!(
            text.contains("driver-missing") && text.contains("0.1.173"),
            "{text}"
        );
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
            let error = convert(&more).expect(3).json();
            let blockers = &error["error"]["blockers"];
            assert!(
                find(blockers, "code", "storage-driver").is_some(),
                "{blockers}"
            );
            let seen = h2k(["inspect", lab.raw.to_str().unwrap(), "--json"]);
            let seen = seen.expect(0).json();
            assert!(find(&seen["findings"], "id", "boot-sector-heads").is_some());
        }
    }
}

/// Folders as old virtio-win releases have them: for NT 5 one storage driver that knows the
/// transitional device only.
fn drivers_for_old_windows(folder: &Path) {
    let (from, to) = (virtio_win().to_str().unwrap(), folder.to_str().unwrap());
    tool("cp", &["-r", from, to]);
    let put = |driver: &str, arch: &str, os: &str, edit: &dyn Fn(String) -> String| {
        let from = folder.join(format!("{driver}/w7/{arch}"));
        let to = folder.join(format!("{driver}/{os}/{arch}"));
        fs::create_dir_all(&to).unwrap();
        for file in fs::read_dir(from).unwrap().map(|f| f.unwrap().path()) {
            let name = file.file_name().unwrap();
            match file.extension().is_some_and(|e| e == "inf") {
                true => {
                    let text = fs::read_to_string(&file).unwrap();
                    fs::write(to.join(name), edit(text)).unwrap();
                }
                false => drop(fs::copy(&file, to.join(name)).unwrap()),
            }
        }
    };
    let legacy = |text: String| {
        let lines: Vec<&str> = text.lines().collect();
        let modern = |i: usize| lines[i].contains("DEV_1042") || lines[i].ends_with('\\');
        let kept = (0..lines.len()).filter(|i| !modern(*i)).map(|i| lines[i]);
        kept.collect::<Vec<_>>().join("\r\n")
    };
    put("viostor", "x86", "xp", &legacy);
    put("viostor", "x86", "2k3", &legacy);
    for driver in ["viostor", "vioscsi"] {
        put(driver, "amd64", "2k8", &|text| text.replace(".6.1", ".6.0"));
    }
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
    let media = dir.path().join("virtio-win");
    drivers_of(266, &media);
    let plan = |disk: &Path| {
        let args = ["plan", disk.to_str().unwrap(), "--virtio-iso"];
        h2k(args.into_iter().chain([media.to_str().unwrap(), "--json"]))
    };
    let seven = plan(&base(WinVersion::Win7).raw).expect(0).json();
    let warnings = seven["warnings"].to_string();
    assert!(warnings.contains("KB4474419"), "{warnings}");
    let lab = Lab::new(spec(WinVersion::Win81));
    let error = plan(&lab.raw).expect(3).json();
    let text = error.to_string();
    assert!(
        text.contains("0xC0000428") && text.contains("0.1.215"),
        "{text}"
    );
}
