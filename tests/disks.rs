//! VMs of several disks. Windows on one and its boot files on another are converted as one; with
//! Windows on two, the user has to choose.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use hyper2kvm::demo::{Firmware, GuestSpec, Leftovers, Role, WinVersion};
use hyper2kvm::registry::HiveView;
use serde_json::{Value, json};
use support::{
    Lab, Split, TOOLS, finish, h2k, have, keep_partitions, rename_disk, sha256, tool, virtio_win,
};

fn lab(firmware: Firmware) -> &'static (Lab, Split) {
    static LABS: [OnceLock<(Lab, Split)>; 2] = [OnceLock::new(), OnceLock::new()];
    let (slot, version) = match firmware {
        Firmware::Uefi => (&LABS[0], WinVersion::Server2022),
        Firmware::Bios => (&LABS[1], WinVersion::Win7),
    };
    slot.get_or_init(|| {
        let lab = Lab::new(GuestSpec {
            disk_size: 1 << 30,
            leftovers: Leftovers::None,
            ..GuestSpec::new(version)
        });
        if firmware == Firmware::Uefi {
            // So that the disk with the boot files needs a change.
            let esp = lab.spec.partition(Role::Esp).unwrap().start;
            let image = format!("{}@@{esp}", lab.raw.display());
            tool("mdel", &["-i", &image, "::/EFI/Boot/bootx64.efi"]);
        }
        let split = lab.split();
        (lab, split)
    })
}

/// A file of the boot partition of a raw disk, by `mtools` or `ntfscat`.
fn boot_file(lab: &Lab, raw: &Path, path: &str) -> Vec<u8> {
    let partition = lab.spec.partition(lab.spec.boot_role()).unwrap();
    match lab.spec.firmware {
        Firmware::Uefi => {
            let image = format!("{}@@{}", raw.display(), partition.start);
            tool("mtype", &["-i", &image, &format!("::/{path}")])
        }
        Firmware::Bios => {
            let volume = tempfile::NamedTempFile::new().unwrap();
            let (input, output) = (raw.display(), volume.path().display());
            tool(
                "dd",
                &[
                    &format!("if={input}"),
                    &format!("of={output}"),
                    "bs=1M",
                    "iflag=skip_bytes,count_bytes",
                    "conv=sparse,notrunc",
                    &format!("skip={}", partition.start),
                    &format!("count={}", partition.size),
                    "status=none",
                ],
            );
            tool("ntfscat", &["-f", volume.path().to_str().unwrap(), path])
        }
    }
}

fn run(verb: &str, source: &Path, out: &Path, more: &[&str]) -> support::Run {
    let iso = virtio_win().to_str().unwrap();
    let (source, out) = (source.to_str().unwrap(), out.to_str().unwrap());
    let mut args = vec![verb, source, "--virtio-iso", iso, "-o", out, "--json"];
    args.extend(["--memory", "256"]);
    if !more.contains(&"--in-place") {
        args.extend(["--format", "raw"]);
    }
    args.extend(more);
    h2k(args)
}

/// The disks of a domain in the order of the firmware, by path.
fn boot_order(xml: &str) -> Vec<PathBuf> {
    let mut order: Vec<(u32, PathBuf)> = Vec::new();
    for disk in xml.split("<disk ").skip(1) {
        let disk = disk.split("</disk>").next().unwrap();
        let attr = |name: &str| {
            let at = disk.split_once(name)?.1;
            Some(at.split('"').next()?.to_string())
        };
        if let (Some(place), Some(file)) = (attr("<boot order=\""), attr("<source file=\"")) {
            order.push((place.parse().unwrap(), file.into()));
        }
    }
    order.sort();
    order.into_iter().map(|(_, path)| path).collect()
}

#[test]
fn boot_files_and_windows_apart_are_converted_as_one() {
    if !have(&TOOLS) || !have(&["mtype", "virt-xml-validate"]) {
        return;
    }
    for firmware in [Firmware::Uefi, Firmware::Bios] {
        let (lab, split) = lab(firmware);
        let before = [&split.boot, &split.windows].map(|disk| sha256(disk));
        for boot_first in [true, false] {
            eprintln!("{firmware:?}, boot files first: {boot_first}");
            let mut disks = [split.boot.as_path(), split.windows.as_path()];
            if !boot_first {
                disks.reverse();
            }
            let (boot, system) = if boot_first { (1, 2) } else { (2, 1) };
            let source = lab.libvirt_xml(&format!("vm{boot}-{firmware:?}"), &disks);
            let seen = h2k(["inspect", source.to_str().unwrap(), "--json"])
                .expect(0)
                .json();
            let shown: Vec<Value> = (seen["disks"].as_array().unwrap().iter())
                .map(|d| json!([d["index"], d["path"], d["windows"], d["boot_files"]]))
                .collect();
            assert_eq!(
                shown,
                [
                    json!([system, split.windows, true, false]),
                    json!([boot, split.boot, false, true]),
                ]
            );
            assert_eq!(seen["source"]["path"], json!(split.windows));
            let name = if firmware == Firmware::Uefi {
                "uefi"
            } else {
                "bios"
            };
            assert_eq!(seen["firmware"], name);

            let out = lab.path(&format!("out{boot}-{name}"));
            let plan = run("plan", &source, &out, &[]).expect(0).json();
            let report = run("convert", &source, &out, &[]).expect(0).json();
            let ids = |list: &Value| -> Vec<String> {
                let list = list.as_array().unwrap().iter();
                list.map(|a| a["id"].as_str().unwrap().to_string())
                    .collect()
            };
            for id in ids(&plan["actions"]) {
                assert!(ids(&report["actions"]).contains(&id), "{id}");
            }
            let made: Vec<PathBuf> = (report["outputs"]["disks"].as_array().unwrap().iter())
                .map(|d| d.as_str().unwrap().into())
                .collect();
            let (windows, boot_disk) = (&made[0], &made[1]);
            if firmware == Firmware::Uefi {
                // Done on the disk with the boot files.
                let manager = boot_file(lab, boot_disk, "EFI/Microsoft/Boot/bootmgfw.efi");
                let fallback = boot_file(lab, boot_disk, "EFI/Boot/bootx64.efi");
                assert!(!manager.is_empty());
                assert_eq!(manager, fallback);
            }
            let volume = lab.volume(windows);
            let driver = lab.ntfscat(&volume, "Windows/System32/drivers/viostor.sys");
            assert!(driver.starts_with(b"MZ"));
            for key in ["bootstrap_xml", "final_xml"] {
                let path = report["outputs"][key].as_str().unwrap();
                tool("virt-xml-validate", &[path, "domain"]);
                let xml = fs::read_to_string(path).unwrap();
                assert_eq!(
                    boot_order(&xml),
                    [boot_disk.clone(), windows.clone()],
                    "{key}"
                );
            }
            // Both together are ready; without the other disk, the missing part is named.
            let xml = report["outputs"]["final_xml"].as_str().unwrap();
            let controllers: &[&str] = match firmware {
                Firmware::Uefi => &[],
                Firmware::Bios => &["--controller", "virtio-blk"],
            };
            h2k([&["verify", xml][..], controllers].concat()).expect(0);
            h2k(["verify", out.to_str().unwrap()]).expect(0);
            let alone = h2k(["verify", windows.to_str().unwrap(), "--json"]).expect(4);
            let checks = alone.json()["checks"].clone();
            let manager = checks.as_array().unwrap().iter();
            let manager = manager.clone().find(|c| c["id"] == "boot-manager").unwrap();
            assert_eq!(manager["state"], "fault");
            fs::remove_dir_all(&out).unwrap();
        }
        let after = [&split.boot, &split.windows].map(|disk| sha256(disk));
        assert_eq!(before, after, "the source was written");
    }
}

#[test]
fn a_boot_entry_on_another_disk_is_repaired() {
    if !have(&TOOLS) || !have(&["mtype"]) {
        return;
    }
    for firmware in [Firmware::Uefi, Firmware::Bios] {
        let (lab, split) = lab(firmware);
        let windows = lab.path("renamed.raw");
        let (from, to) = (split.windows.to_str().unwrap(), windows.to_str().unwrap());
        tool("cp", &["--sparse=always", from, to]);
        rename_disk(&lab.spec, &windows, 0x0ddb_a115);
        let source = lab.libvirt_xml("renamed", &[&split.boot, &windows]);
        let out = lab.path("out-renamed");
        let report = run("convert", &source, &out, &["--repair-bcd"])
            .expect(0)
            .json();
        let findings = report["inspection"]["findings"].as_array().unwrap();
        let finding = findings.iter().find(|f| f["id"] == "bcd-device").unwrap();
        assert!(
            finding["message"]
                .as_str()
                .unwrap()
                .contains("not on any of the 2 disks"),
            "{finding}"
        );
        let bcd = match firmware {
            Firmware::Uefi => "EFI/Microsoft/Boot/BCD",
            Firmware::Bios => "Boot/BCD",
        };
        let disk = report["outputs"]["disks"][1].as_str().unwrap();
        let store = boot_file(lab, Path::new(disk), bcd);
        let loader = hyper2kvm::demo::bcd::LOADER.braced();
        let view = HiveView::new(&store).unwrap();
        let key = format!("Objects\\{loader}\\Elements\\21000001");
        let element = view.key(&key).unwrap().unwrap().value("Element");
        let bytes = element.unwrap().unwrap().data;
        let parent = match firmware {
            Firmware::Uefi => &bytes[56..60],
            Firmware::Bios => &bytes[56..60],
        };
        assert_eq!(parent, 0x0ddb_a115u32.to_le_bytes());
        // The old store is kept.
        let old = fs::read(out.join("backup/BCD")).unwrap();
        assert_eq!(old, boot_file(lab, &split.boot, bcd));
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn windows_on_two_disks_is_refused_until_one_is_named() {
    if !have(&TOOLS) {
        return;
    }
    let (lab, _) = lab(Firmware::Uefi);
    let (one, two) = (lab.path("one.raw"), lab.path("two.raw"));
    for disk in [&one, &two] {
        let (from, to) = (lab.raw.to_str().unwrap(), disk.to_str().unwrap());
        tool("cp", &["--sparse=always", from, to]);
    }
    rename_disk(&lab.spec, &two, 0x7777_7777);
    let volume = lab.spec.partition(Role::Windows).unwrap().index;
    let source = lab.libvirt_xml("two", &[&one, &two]);
    let out = lab.path("out-two");
    let both = format!("1/{volume}:\\Windows, 2/{volume}:\\Windows");
    let path = source.to_str().unwrap();
    let inspect = |more: &[&str]| h2k([&["inspect", path, "--json"], more].concat());
    let old_form = format!("{volume}:\\Windows");
    for more in [&[][..], &["--root", "\\Windows"], &["--root", &old_form]] {
        let runs = [
            inspect(more),
            h2k([&["verify", path, "--json"], more].concat()),
            run("plan", &source, &out, more),
            run("convert", &source, &out, more),
        ];
        for run in runs {
            let error = run.expect(3).json()["error"].clone();
            let blocker = &error["blockers"][0];
            assert_eq!(blocker["code"], "several-windows");
            let reason = blocker["reason"].as_str().unwrap();
            assert!(reason.ends_with(&both), "{reason}");
            assert!(blocker["remedy"].as_str().unwrap().contains("--root"));
        }
        assert!(!out.exists());
    }
    for (disk, file) in [(1, &one), (2, &two)] {
        let root = format!("{disk}/{volume}:\\Windows");
        let seen = inspect(&["--root", &root]).expect(0).json();
        assert_eq!(seen["source"]["path"], json!(file));
        assert_eq!(seen["disks"][0]["index"], disk);
        assert_eq!(seen["disks"].as_array().unwrap().len(), 2);
        let plan = run("plan", &source, &out, &["--root", &root])
            .expect(0)
            .json();
        assert_eq!(plan["source"]["path"], json!(file));
    }
    for (root, code) in [
        (format!("3/{volume}:\\Windows"), 2),
        (format!("1/{}:\\Windows", volume + 7), 2),
        (format!("0/{volume}:\\Windows"), 2),
        (format!("x/{volume}:\\Windows"), 2),
        ("1/:\\Windows".to_string(), 2),
    ] {
        inspect(&["--root", &root]).expect(code);
    }
    // A single disk is disk 1.
    let single = one.to_str().unwrap();
    let root = format!("1/{volume}:\\Windows");
    h2k(["inspect", single, "--root", &root]).expect(0);
    // The boot files of the first disk are gone, and those of the second name its Windows.
    keep_partitions(&lab.spec, &one, |role| role != Role::Esp);
    let seen = inspect(&["--root", &root]).expect(0).json();
    let marks: Vec<_> = (seen["disks"].as_array().unwrap().iter())
        .map(|d| (d["index"].clone(), d["boot_files"].clone()))
        .collect();
    assert_eq!(marks, [(json!(1), json!(false)), (json!(2), json!(true))]);
}

/// Both disks of a VM in place, with their former contents.
struct InPlace {
    lab: &'static Lab,
    originals: [PathBuf; 2],
    disks: [PathBuf; 2],
    source: PathBuf,
    out: PathBuf,
    partial: PathBuf,
}

impl InPlace {
    fn new(firmware: Firmware, name: &str) -> Self {
        let (lab, split) = lab(firmware);
        let originals = [split.boot.clone(), split.windows.clone()];
        let path = |which: &str| lab.path(&format!("{name}-{which}.raw"));
        let disks = [path("boot"), path("windows")];
        let source = lab.libvirt_xml(name, &[&disks[0], &disks[1]]);
        let this = Self {
            lab,
            originals,
            disks,
            source,
            out: lab.path(&format!("out-{name}")),
            partial: lab.path(&format!(".out-{name}.partial")),
        };
        for (from, to) in this.originals.iter().zip(&this.disks) {
            let args = [from.to_str().unwrap(), to.to_str().unwrap()];
            tool("cp", &["--sparse=always", args[0], args[1]]);
        }
        this
    }

    /// Whether the disk with the boot files and that with Windows are unchanged.
    fn same(&self) -> [bool; 2] {
        [0, 1].map(|i| {
            let qemu_img = hyper2kvm::tool::find("qemu-img").unwrap();
            let done = Command::new(qemu_img)
                .args(["compare", "-q", "-f", "raw", "-F", "raw"])
                .args([&self.originals[i], &self.disks[i]])
                .status();
            done.unwrap().success()
        })
    }

    fn convert(&self, point: &str) -> support::Run {
        let mut command = Command::new(support::binary());
        command
            .arg("convert")
            .arg(&self.source)
            .arg("--virtio-iso")
            .arg(virtio_win())
            .arg("-o")
            .arg(&self.out)
            .args(["--in-place", "--memory", "256", "--json"])
            .env("HYPER2KVM_FAILPOINT", point);
        finish(command)
    }

    fn rollback(&self, journal: &Path, more: &[&str], point: &str) -> support::Run {
        let mut command = Command::new(support::binary());
        command
            .args(["rollback", "--json", "--journal"])
            .arg(journal)
            .args(more)
            .env("HYPER2KVM_FAILPOINT", point);
        finish(command)
    }
}

#[test]
fn in_place_changes_both_disks_or_none() {
    if !have(&TOOLS) || !have(&["mtype"]) {
        return;
    }
    let vm = InPlace::new(Firmware::Uefi, "both");
    run("plan", &vm.source, &vm.out, &["--in-place"]).expect(0);
    let report = vm.convert("").expect(0).json();
    assert_eq!(vm.same(), [false, false]);
    let manager = boot_file(vm.lab, &vm.disks[0], "EFI/Microsoft/Boot/bootmgfw.efi");
    let fallback = boot_file(vm.lab, &vm.disks[0], "EFI/Boot/bootx64.efi");
    assert_eq!(manager, fallback);
    let xml = report["outputs"]["final_xml"].as_str().unwrap();
    h2k(["verify", xml]).expect(0);
    let order = boot_order(&fs::read_to_string(xml).unwrap());
    assert_eq!(order, vm.disks);

    // Somebody writes to a block of the boot files: neither disk is rolled back without --force.
    let journal = vm.out.join("journal.json");
    let doc: Value = serde_json::from_slice(&fs::read(&journal).unwrap()).unwrap();
    let offset = doc["others"][0]["undo"]["ranges"][0]["offset"].as_u64();
    let file = fs::File::options().write(true).open(&vm.disks[0]).unwrap();
    file.write_all_at(b"somebody else was here", offset.unwrap())
        .unwrap();
    let now = [&vm.disks[0], &vm.disks[1]].map(|disk| sha256(disk));
    let refused = vm.rollback(&journal, &[], "").expect(7);
    assert!(
        refused.stderr.contains("both-boot.raw has changed"),
        "{}",
        refused.stderr
    );
    assert_eq!(now, [&vm.disks[0], &vm.disks[1]].map(|disk| sha256(disk)));
    // Nor while one of them is elsewhere.
    let away = vm.lab.path("away.raw");
    fs::rename(&vm.disks[0], &away).unwrap();
    vm.rollback(&journal, &["--force"], "").expect(1);
    fs::rename(&away, &vm.disks[0]).unwrap();
    assert_eq!(now, [&vm.disks[0], &vm.disks[1]].map(|disk| sha256(disk)));
    let done = vm.rollback(&journal, &["--force"], "").expect(0).json();
    assert_eq!(vm.same(), [true, true]);
    let named: Vec<_> = (done["disks"].as_array().unwrap().iter()).collect();
    assert_eq!(named, [&json!(vm.disks[1]), &json!(vm.disks[0])]);
    fs::remove_dir_all(&vm.out).unwrap();
}

#[test]
fn failures_and_kills_between_two_disks_in_place() {
    if !have(&TOOLS) || !have(&["mtype"]) {
        return;
    }
    let vm = InPlace::new(Firmware::Uefi, "killed");
    for (point, code) in [
        ("undo-log", 1),
        ("committing-next-disk", 6),
        ("written", 6),
        ("before-rename", 6),
    ] {
        eprintln!("{point}");
        let run = vm.convert(&format!("{point}=fail")).expect(code);
        assert!(run.stderr.contains(point), "{}", run.stderr);
        assert_eq!(vm.same(), [true, true], "{point}");
        assert!(!vm.out.exists() && !vm.partial.exists(), "{point}");
    }
    for (point, written) in [
        ("undo-log", [true, true]),
        // Windows' disk is first.
        ("committing", [true, false]),
        ("committing-next-disk", [true, false]),
        ("written", [false, false]),
    ] {
        eprintln!("{point}");
        vm.convert(&format!("{point}=kill")).expect(-1);
        assert_eq!(vm.same(), written, "{point}");
        if written == [true, true] {
            continue;
        }
        let journal = vm.partial.join("journal.json");
        let next = vm.convert("").expect(7);
        assert!(
            next.stderr.contains("rollback --journal"),
            "{}",
            next.stderr
        );
        vm.rollback(&journal, &[], "rolling-back-next-disk=kill")
            .expect(-1);
        vm.rollback(&journal, &[], "").expect(0);
        assert_eq!(vm.same(), [true, true], "{point}");
    }
    // Restored: the next run starts over.
    vm.convert("").expect(0);
}

/// The boot files need no changes.
#[test]
fn in_place_leaves_a_disk_without_changes_alone() {
    if !have(&TOOLS) || !have(&["mtype"]) {
        return;
    }
    let vm = InPlace::new(Firmware::Bios, "one");
    let stamp = |disk: &Path| fs::metadata(disk).unwrap().modified().unwrap();
    let before = stamp(&vm.disks[0]);
    let report = vm.convert("").expect(0).json();
    let xml = fs::read_to_string(report["outputs"]["final_xml"].as_str().unwrap()).unwrap();
    assert_eq!(boot_order(&xml), vm.disks);
    assert_eq!(vm.same(), [true, false]);
    h2k(["rollback", vm.out.to_str().unwrap()]).expect(0);
    assert_eq!(vm.same(), [true, true]);
    assert_eq!(stamp(&vm.disks[0]), before, "not even opened for writing");
}
