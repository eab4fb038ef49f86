//! Both engines do the same, and libguestfs' own tools agree with the result.
//!
//! Starts of the appliance are what takes the time here (software emulation): one for each guest
//! converted and one for each judge.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use hyper2kvm::demo::{Arch, Firmware, GuestSpec, WinVersion};
use hyper2kvm::disk::block::FileDisk;
use hyper2kvm::disk::partition;
use hyper2kvm::guest::{FileKind, FsKind, GuestPath, GuestRead, embedded};
use serde_json::Value;
use support::{Lab, TOOLS, export, h2k, have, tool};

const GUESTFS_TOOLS: [&str; 3] = ["guestfish", "virt-win-reg", "virt-inspector"];

fn ready() -> bool {
    have(&TOOLS) && have(&GUESTFS_TOOLS)
}

/// Like [`tool`], in libguestfs' own appliance without KVM and without libvirt.
#[track_caller]
fn guestfs(program: &str, args: &[&str]) -> String {
    let out = Command::new(program)
        .args(args)
        .env("LIBGUESTFS_BACKEND", "direct")
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

/// The converted disk as raw, and the report.
fn convert(lab: &Lab, engine: &str) -> (PathBuf, Value) {
    let report = lab
        .convert(&lab.raw, &["--engine", engine, "--format", "raw"])
        .expect(0)
        .json();
    assert_eq!(report["engine"], engine);
    assert_eq!(report["engine_why"], "asked for");
    let disk = Path::new(report["outputs"]["disks"][0].as_str().unwrap());
    // Both convert to the same place, so that their reports name the same files.
    let kept = lab.path(&format!("out-{engine}"));
    fs::rename(lab.path("out"), &kept).unwrap();
    (kept.join(disk.file_name().unwrap()), report)
}

fn equal_lines(what: &str, a: &str, b: &str) {
    for (line, (a, b)) in a.lines().zip(b.lines()).enumerate() {
        assert_eq!(a, b, "{what} line {line}");
    }
    assert_eq!(a.lines().count(), b.lines().count(), "{what}");
}

/// Every file by volume and path: its size and contents; `None` for a folder.
fn tree(disk: &Path) -> BTreeMap<(u32, String), Option<Vec<u8>>> {
    let disk = Arc::new(FileDisk::open(disk).unwrap());
    let layout = partition::read_layout(disk.as_ref()).unwrap();
    let reader = embedded::open(disk, &layout).unwrap();
    let mut tree = BTreeMap::new();
    for volume in reader.volumes() {
        if !matches!(volume.kind, FsKind::Ntfs | FsKind::Fat) {
            continue;
        }
        let mut folders = vec![GuestPath::root()];
        while let Some(folder) = folders.pop() {
            for file in reader.list(volume.id, &folder).unwrap() {
                let path = folder.join(&file.name).unwrap();
                let contents = if file.kind == FileKind::Dir {
                    folders.push(path.clone());
                    None
                } else {
                    Some(reader.read(volume.id, &path, 1 << 30).unwrap())
                };
                // Not lower case: names must have the same case.
                tree.insert((volume.id.0, path.to_slashes()), contents);
            }
        }
    }
    tree
}

fn without(mut report: Value, keys: &[&str]) -> Value {
    let object = report.as_object_mut().unwrap();
    for key in keys {
        assert!(object.remove(*key).is_some(), "no {key} in the report");
    }
    report
}

/// Converts with both engines; gives the disk guestfish made.
fn same_result(lab: &Lab) -> PathBuf {
    let (by_embedded, report) = convert(lab, "embedded");
    let (by_guestfish, other) = convert(lab, "guestfish");
    let differ = ["engine", "engine_why", "timings", "bytes"];
    assert_eq!(without(report, &differ), without(other, &differ));

    let (expected, found) = (tree(&by_embedded), tree(&by_guestfish));
    let names = |tree: &BTreeMap<(u32, String), _>| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&expected), names(&found));
    for (path, contents) in &expected {
        // Hives have a time in them; they are compared key by key.
        let is_hive = path.1.contains("/config/");
        assert!(is_hive || found[path] == *contents, "{path:?}");
    }
    let mut count = 0;
    for (hive, prefix) in HIVES {
        let [by_one, by_other] =
            ["embedded", "guestfish"].map(|engine| reg_file(lab, engine, hive));
        assert_eq!(by_one.exists(), by_other.exists(), "{hive}");
        if by_one.exists() {
            let read = |path| fs::read_to_string(path).unwrap();
            equal_lines(hive, &read(by_one), &read(by_other));
            let exported = |disk| hive_text(lab, disk, hive, prefix);
            equal_lines(hive, &exported(&by_embedded), &exported(&by_guestfish));
            count += 1;
        }
    }
    assert!(count >= 2, "{count} hives");
    let volume = lab.volume(&by_guestfish);
    tool("ntfsfix", &["--no-action", volume.to_str().unwrap()]);
    by_guestfish
}

fn reg_file(lab: &Lab, engine: &str, hive: &str) -> PathBuf {
    lab.path(&format!("out-{engine}/registry/{hive}.reg"))
}

/// A hive of the guest as text, by ntfs-3g and hivex.
fn hive_text(lab: &Lab, disk: &Path, hive: &str, prefix: &str) -> String {
    let volume = lab.volume(disk);
    let copy = lab.path("hive");
    let file = format!("/Windows/System32/config/{hive}");
    fs::write(&copy, lab.ntfscat(&volume, &file)).unwrap();
    export(&copy, prefix, "\\")
}

const HIVES: [(&str, &str); 3] = [
    ("SYSTEM", "HKEY_LOCAL_MACHINE\\SYSTEM"),
    ("SOFTWARE", "HKEY_LOCAL_MACHINE\\SOFTWARE"),
    ("DRIVERS", "HKEY_LOCAL_MACHINE\\DRIVERS"),
];

fn lab(version: WinVersion, arch: Arch, firmware: Firmware) -> Lab {
    let mut spec = GuestSpec::new(version);
    spec.disk_size = 1 << 30;
    spec.arch = arch;
    spec.firmware = firmware;
    Lab::new(spec)
}

#[test]
fn uefi_windows_10() {
    if !ready() {
        return;
    }
    let lab = lab(WinVersion::Win10, Arch::Amd64, Firmware::Uefi);
    same_result(&lab);
}

/// Windows 7, and by hand: our registry files merged by `virt-win-reg` into the untouched guest give
/// the registry of the converted one; libguestfs sees the machine we see.
#[test]
fn bios_windows_7_and_libguestfs_tools() {
    if !ready() {
        return;
    }
    let lab = lab(WinVersion::Win7, Arch::Amd64, Firmware::Bios);
    let converted = same_result(&lab);

    let by_hand = lab.path("by-hand.raw");
    fs::copy(&lab.raw, &by_hand).unwrap();
    let by_hand = by_hand.to_str().unwrap();
    let mut args = vec!["--merge".to_string(), by_hand.to_string()];
    for (hive, _) in HIVES {
        let reg = reg_file(&lab, "guestfish", hive);
        if reg.exists() {
            args.push(reg.display().to_string());
        }
    }
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    guestfs("virt-win-reg", &args);
    for (name, prefix) in &HIVES[..2] {
        let merged = hive_text(&lab, Path::new(by_hand), name, prefix);
        equal_lines(name, &hive_text(&lab, &converted, name, prefix), &merged);
    }

    let disk = converted.to_str().unwrap();
    let key = "HKLM\\SYSTEM\\ControlSet001\\Services\\viostor";
    let shown = guestfs("virt-win-reg", &[disk, key]);
    for line in ["\"Start\"=dword:00000000", "\"Group\"=hex(1):"] {
        assert!(shown.contains(line), "{line} in {shown}");
    }

    let seen = guestfs("virt-inspector", &["--no-icon", "--format=raw", "-a", disk]);
    let ours = h2k(["inspect", disk, "--json"]).expect(0).json();
    for element in ["product_name", "arch", "hostname"] {
        let value = ours["os"][element].as_str().unwrap();
        let wanted = format!("<{element}>{value}</{element}>");
        assert!(seen.contains(&wanted), "{wanted} in {seen}");
    }
}
