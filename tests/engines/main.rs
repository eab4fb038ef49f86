//! Both engines produce the same result, and libguestfs' own tools agree with it.
//!
//! Starts of the appliance take most of the time here (software emulation): one for each converted
//! guest and one for each tool that verifies it.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod apart;
mod appliance;
mod bitlocker;
mod dynamic;
mod opened;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use hyper2kvm::demo::{Arch, Firmware, GuestSpec, Role, WinVersion};
use hyper2kvm::guest::{GuestPath, GuestRead, VolumeId};
use serde_json::Value;
use support::{
    Lab, TOOLS, drivers_for_old_windows, export, h2k, have, read_disk, tool, tree, virtio_win,
};

const GUESTFS_TOOLS: [&str; 5] = [
    "guestfish",
    "virt-win-reg",
    "virt-inspector",
    "virt-ls",
    "virt-cat",
];

fn ready() -> bool {
    have(&TOOLS) && have(&GUESTFS_TOOLS)
}

/// Like [`tool`], in libguestfs' own appliance without KVM and without libvirt.
#[track_caller]
fn guestfs(program: &str, args: &[&str]) -> String {
    String::from_utf8(guestfs_bytes(program, args)).unwrap()
}

#[track_caller]
fn guestfs_bytes(program: &str, args: &[&str]) -> Vec<u8> {
    let out = Command::new(program)
        .args(args)
        .envs(hyper2kvm::tool::appliance::environment())
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    out.stdout
}

/// A `PATH` with a guestfish that counts before it runs the real one, for [`starts`]; each starts one
/// appliance at most.
fn counted(lab: &Lab) -> OsString {
    let folder = lab.path("counted");
    fs::create_dir_all(&folder).unwrap();
    let real = hyper2kvm::tool::find("guestfish").unwrap();
    let (real, log) = (real.display(), lab.path("starts"));
    let script = format!(
        "#!/bin/sh\necho >> '{}'\nexec '{real}' \"$@\"\n",
        log.display()
    );
    let file = folder.join("guestfish");
    fs::write(&file, script).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    let mut path = folder.into_os_string();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap());
    path
}

/// Starts since the last call.
fn starts(lab: &Lab) -> usize {
    let log = fs::read(lab.path("starts")).unwrap_or_default();
    let _ = fs::remove_file(lab.path("starts"));
    log.len()
}

/// The converted disk as raw, and the report.
fn convert(lab: &Lab, driver_source: &Path, engine: &str) -> (PathBuf, Value) {
    let (raw, out) = (lab.raw.to_str().unwrap(), lab.path("out"));
    let mut args = vec!["convert", raw, "--json", "-o", out.to_str().unwrap()];
    args.extend(["--engine", engine, "--format", "raw", "--virtio-iso"]);
    args.push(driver_source.to_str().unwrap());
    let mut command = Command::new(support::binary());
    command.args(args).env("PATH", counted(lab));
    let report = support::finish(command).expect(0).json();
    assert_eq!(report["engine"], engine);
    // The same one reads and writes.
    assert_eq!(starts(lab), usize::from(engine == "guestfish"));
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

/// Attributes and security descriptor of every file of the Windows volume, by ntfs-3g's own tool.
fn security(lab: &Lab, disk: &Path) -> BTreeMap<String, String> {
    audit(&lab.volume(disk))
}

fn audit(volume: &Path) -> BTreeMap<String, String> {
    let text = tool("ntfssecaudit", &["-rv", volume.to_str().unwrap(), "/"]);
    let text = String::from_utf8_lossy(&text).replacen("Recursive file check\n", "", 1);
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    let mut shared: BTreeMap<String, String> = BTreeMap::new();
    for block in text.split("\n\n").filter(|b| b.contains("Security key : ")) {
        let mut lines = block.trim_start().lines();
        let name = lines.next().unwrap().to_string();
        // A descriptor is the file's own ("none"), or shared by files; then it is shown once.
        let key = lines.next().unwrap().split(' ').nth(3).unwrap().to_string();
        let (dump, facts): (Vec<&str>, Vec<&str>) = lines.partition(|l| l.starts_with("      "));
        let words = dump.iter().flat_map(|line| line.split_whitespace().skip(1));
        let dump: String = words.collect();
        let mut dump = dump.trim_end_matches('0').to_string();
        if key != "none" {
            let first = shared.entry(key).or_insert_with(|| dump.clone());
            dump = first.clone();
        }
        // The owner and the group are in the descriptor.
        let attributes = facts.into_iter().find(|f| f.starts_with("Windows attrib"));
        files.insert(name, format!("{}\n{dump}", attributes.unwrap_or_default()));
    }
    // Not those that NTFS keeps for itself.
    files.retain(|name, _| !name.contains("/$"));
    assert!(files.len() > 50, "{text}");
    files
}

fn without(mut report: Value, keys: &[&str]) -> Value {
    let object = report.as_object_mut().unwrap();
    for key in keys {
        assert!(object.remove(*key).is_some(), "no {key} in the report");
    }
    report
}

/// Converts with both engines; gives the disk guestfish made.
/// The access control list, as `ntfssecaudit` shows it.
const FOR_ADMINISTRATORS: [&str; 3] = [
    // A list of two entries: full rights for SYSTEM, and for Administrators.
    "0200340002000000",
    "1400ff011f00010100000000000512000000",
    "1800ff011f0001020000000000052000000020020000",
];

fn same_result(lab: &Lab, driver_source: &Path) -> PathBuf {
    let (by_embedded, report) = convert(lab, driver_source, "embedded");
    let (by_guestfish, other) = convert(lab, driver_source, "guestfish");
    // `bytes` counts what the copy had to write: NTFS drivers choose other clusters.
    // `request` says which engine was asked for, `files` when each was written.
    let differ = [
        "engine",
        "engine_why",
        "timings",
        "bytes",
        "request",
        "files",
    ];
    assert_eq!(report["bytes"]["virtual"], other["bytes"]["virtual"]);
    assert_eq!(without(report, &differ), without(other, &differ));

    let (expected, found) = (tree(&by_embedded), tree(&by_guestfish));
    let names = |tree: &BTreeMap<(u32, String), _>| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&expected), names(&found));
    for (path, contents) in &expected {
        // Hives have a time in them; they are compared key by key.
        let is_hive = path.1.contains("/config/");
        assert!(is_hive || found[path] == *contents, "{path:?}");
    }
    let (expected, found) = (security(lab, &by_embedded), security(lab, &by_guestfish));
    assert_eq!(
        expected.keys().collect::<Vec<_>>(),
        found.keys().collect::<Vec<_>>()
    );
    for (file, said) in &expected {
        equal_lines(file, said, &found[file]);
        // SYSTEM and Administrators, nothing inherited; below it the same.
        if file.to_ascii_lowercase().contains("/hyper2kvm") {
            for part in FOR_ADMINISTRATORS {
                assert!(said.contains(part), "{file}: {said}");
            }
        }
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
            let converted = exported(&by_guestfish);
            equal_lines(hive, &exported(&by_embedded), &converted);
            // By hand, with what virt-win-reg runs: it has no name for DRIVERS.
            let untouched = lab.path("untouched");
            fs::write(&untouched, hive_file(lab, &lab.raw, hive)).unwrap();
            let (untouched_path, reg) = (
                untouched.to_str().unwrap(),
                reg_file(lab, "guestfish", hive),
            );
            let merge = ["--merge", "--prefix", prefix, untouched_path];
            tool(
                "hivexregedit",
                &[&merge[..], &[reg.to_str().unwrap()]].concat(),
            );
            equal_lines(hive, &converted, &export(&untouched, prefix, "\\"));
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

/// A hive of the guest as text, by hivex.
fn hive_text(lab: &Lab, disk: &Path, hive: &str, prefix: &str) -> String {
    let copy = lab.path("hive");
    fs::write(&copy, hive_file(lab, disk, hive)).unwrap();
    export(&copy, prefix, "\\")
}

/// A hive of the guest, by ntfs-3g.
fn hive_file(lab: &Lab, disk: &Path, hive: &str) -> Vec<u8> {
    let volume = lab.volume(disk);
    // XP names its hives in lower case, and ntfscat knows one case only.
    let name = match lab.spec.version {
        WinVersion::Xp => hive.to_lowercase(),
        _ => hive.to_string(),
    };
    let file = format!("/{}/System32/config/{name}", lab.spec.windows_dir);
    lab.ntfscat(&volume, &file)
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

/// The verdict of `verify` through the appliance, compared with that without. `inspect` is part of
/// every report, and in `dynamic.rs`.
fn same_verdict(disk: &Path) {
    let seen = |engine: &str| {
        let report = h2k([
            "verify",
            disk.to_str().unwrap(),
            "--json",
            "--engine",
            engine,
        ]);
        let report = report.expect(0).json();
        assert_eq!(report["engine"], engine);
        without(report, &["engine"])
    };
    assert_eq!(seen("embedded"), seen("guestfish"));
}

/// The guests in sequence; `cargo test` runs two such lists in parallel.
fn all_the_same(guests: &[(WinVersion, Arch, Firmware)]) {
    if !ready() {
        return;
    }
    for (version, arch, firmware) in guests {
        eprintln!("{version:?} {arch:?} {firmware:?}");
        same_result(&lab(*version, *arch, *firmware), virtio_win());
    }
}

#[test]
#[ignore = "minutes: cargo test --test engines -- --ignored clients_on_uefi; .ci/run has it"]
fn clients_on_uefi() {
    all_the_same(&[
        (WinVersion::Win10, Arch::Amd64, Firmware::Uefi),
        (WinVersion::Win11, Arch::Amd64, Firmware::Uefi),
    ]);
}

#[test]
#[ignore = "minutes: cargo test --test engines -- --ignored servers; .ci/run has it"]
fn servers() {
    all_the_same(&[(WinVersion::Server2022, Arch::Amd64, Firmware::Uefi)]);
    if ready() {
        let lab = lab(WinVersion::Server2012R2, Arch::Amd64, Firmware::Bios);
        let converted = same_result(&lab, virtio_win());
        same_verdict(&converted);
    }
}

#[test]
fn windows_xp() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let driver_source = dir.path().join("virtio-win");
    drivers_for_old_windows(&driver_source);
    same_result(
        &lab(WinVersion::Xp, Arch::X86, Firmware::Bios),
        &driver_source,
    );
}

/// Windows 7, and by hand: our registry files merged by `virt-win-reg` into the untouched guest give
/// the registry of the converted one; libguestfs sees the VM we see.
#[test]
fn bios_windows_7_and_libguestfs_tools() {
    if !ready() {
        return;
    }
    let lab = lab(WinVersion::Win7, Arch::Amd64, Firmware::Bios);
    let converted = same_result(&lab, virtio_win());

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

    fn of_disk<'a>(disk: &'a str, args: &[&'a str]) -> Vec<&'a str> {
        [&["--format=raw", "-a", disk], args].concat()
    }
    let seen = guestfs(
        "virt-inspector",
        &of_disk(disk, &["--no-icon", "--no-applications"]),
    );
    let ours = h2k(["inspect", disk, "--json"]).expect(0).json();
    assert_eq!(ours["engine"], "embedded");
    for element in ["product_name", "arch", "hostname"] {
        let value = ours["os"][element].as_str().unwrap();
        let wanted = format!("<{element}>{value}</{element}>");
        assert!(seen.contains(&wanted), "{wanted} in {seen}");
    }
    for (element, value) in [("major_version", 6), ("minor_version", 1)] {
        let wanted = format!("<{element}>{value}</{element}>");
        assert!(seen.contains(&wanted), "{wanted} in {seen}");
    }
    // The drivers: the same names and the same bytes as we see.
    let folder = "/Windows/System32/drivers";
    let listed = guestfs("virt-ls", &of_disk(disk, &[folder]));
    let reader = read_disk(&converted);
    let volume = VolumeId::new(lab.spec.partition(Role::Windows).unwrap().index);
    let path = |text: &str| GuestPath::parse(text).unwrap();
    let files = reader
        .list(volume, &path(&folder.replace('/', "\\")))
        .unwrap();
    let mut names: Vec<_> = files.into_iter().map(|f| f.name).collect();
    let mut theirs: Vec<_> = listed.lines().map(str::to_string).collect();
    names.sort();
    theirs.sort();
    assert_eq!(theirs, names);
    for service in ["viostor", "vioscsi"] {
        let installed = ours["drivers"]["virtio"].as_array().unwrap();
        assert!(
            installed.iter().any(|d| d["service"] == service),
            "{installed:?}"
        );
        assert!(names.contains(&format!("{service}.sys")), "{names:?}");
    }
    let mut args = of_disk(disk, &[]);
    let files = ["viostor.sys", "vioscsi.sys"].map(|name| format!("{folder}/{name}"));
    args.extend(files.iter().map(String::as_str));
    let bytes = guestfs_bytes("virt-cat", &args);
    let read = |file: &String| {
        let file = path(&file.replace('/', "\\"));
        reader.read(volume, &file, 1 << 30).unwrap()
    };
    assert!(bytes == files.iter().flat_map(read).collect::<Vec<_>>());
}
