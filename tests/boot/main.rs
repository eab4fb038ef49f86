//! From a VM to two boots: what `convert` writes is validated by libvirt, and `boot` is run with a
//! payload of our own where Windows' boot loader would be.
//!
//! The payload is a few machine instructions, as a boot sector or as an EFI application. The guest's own
//! firmware loads it from the converted disk; it writes the marker to COM1 and powers the VM off, or
//! fails in a way a test asks for. libvirt is a session daemon of an ordinary user with all its directories
//! below a temporary one, QEMU runs under software emulation. This proves firmware, controllers, boot
//! order, XML, and the state machine of `boot`. It says nothing about Windows.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod ems;
mod in_use;
mod kinds;
mod later;
mod libvirt;
mod payload;
mod sources;
#[path = "../support/mod.rs"]
mod support;
mod sync;
mod system;
mod wire;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper2kvm::boot::MARKER;
use hyper2kvm::demo::Firmware;
use libvirt::{Libvirt, able};
use payload::{End, boot_code, guest, split_guest};
use serde_json::Value;
use sources::{Input, source};
use support::{Lab, finish, h2k, have, tool, virtio_win};

/// `convert` into a separate directory, as a VM for software emulation in a session.
fn convert(lab: &Lab, source: &Path, name: &str, more: &[&str]) -> (PathBuf, Value) {
    let out = lab.path(&format!("{name}-kvm"));
    let (source, iso) = (source.to_str().unwrap(), virtio_win().to_str().unwrap());
    let mut args = vec![
        "convert",
        source,
        "--virtio-iso",
        iso,
        "-o",
        out.to_str().unwrap(),
    ];
    args.extend(["--name", name, "--memory", "256", "--vcpus", "1"]);
    // Session daemons do not see each other's VNC ports.
    args.extend(["--graphics", "none"]);
    args.extend(["--domain-type", "qemu", "--user-network", "--json"]);
    args.extend(more);
    let report = h2k(args).expect(0).json();
    (out, report)
}

fn snapshots(disk: &str) -> String {
    String::from_utf8(tool("qemu-img", &["snapshot", "-l", disk])).unwrap()
}

/// One row of the matrix: convert, validate, define, boot twice.
fn machine(lab: &Lab, libvirt: &Libvirt, row: (Input, &str, usize)) -> PathBuf {
    let (input, storage, disks) = row;
    eprintln!("{:?} {row:?}", lab.spec.firmware);
    let uefi = lab.spec.firmware == Firmware::Uefi;
    let source = source(lab, input, disks, if uefi { "efi" } else { "bios" });
    let name = format!("{input:?}-{storage}-{disks}").to_lowercase();
    let (out, report) = convert(lab, &source, &name, &["--storage", storage]);
    let outputs = &report["outputs"];
    assert_eq!(outputs["disks"].as_array().unwrap().len(), disks);
    for key in ["bootstrap_xml", "final_xml"] {
        let path = outputs[key].as_str().unwrap();
        tool("virt-xml-validate", &[path, "domain"]);
        let xml = fs::read_to_string(path).unwrap();
        assert_eq!(xml.contains("<loader"), uefi, "{key}");
        let boot = xml.find("<boot order=\"1\"").unwrap();
        let system = xml.find(outputs["disks"][0].as_str().unwrap()).unwrap();
        let next = xml[system..].find("</disk>").unwrap() + system;
        assert!(
            system < boot && boot < next,
            "{key} boots from another disk"
        );
        if input == Input::Vmx {
            let nics = xml.matches("<interface type=\"user\"").count();
            assert_eq!(
                (nics, xml.matches("<link state=\"down\"/>").count()),
                (2, 1)
            );
            assert!(xml.contains("00:0c:29:11:22:33"));
        }
    }
    libvirt.give(lab.dir.path());
    for key in ["final_xml", "bootstrap_xml"] {
        libvirt
            .virsh(&["define", outputs[key].as_str().unwrap()])
            .expect(0);
    }
    if boots(input, storage, disks) {
        boot_twice(libvirt, &out, &name);
    }
    // The next row may be the same VM by its UUID.
    let nvram: &[&str] = if uefi { &["--nvram"] } else { &[] };
    libvirt
        .virsh(&[&["undefine", &name], nvram].concat())
        .expect(0);
    out
}

/// Half of the rows, so that each firmware meets every pair of input, bus and number of disks; all of
/// them with `HYPER2KVM_ALL_BOOTS`, which takes twice as long.
fn boots(input: Input, storage: &str, disks: usize) -> bool {
    let two = matches!(input, Input::Vmx | Input::Ova);
    let half = (disks == 2) == (two == (storage == "virtio-blk"));
    half || std::env::var_os("HYPER2KVM_ALL_BOOTS").is_some()
}

fn boot_twice(libvirt: &Libvirt, out: &Path, name: &str) {
    let record = libvirt.boot(out, &["--timeout", "300"]).expect(0).json();
    assert_eq!(record["schema"], "hyper2kvm/boot/1");
    assert_eq!(record["phase"], "done");
    for stage in ["bootstrap", "final"] {
        assert_eq!(record[stage]["up_by"], "marker", "{stage}: {record:#}");
    }
    // Windows has not run, which is reported.
    assert_eq!(record["proof"]["bound"], false);
    assert!(record["warnings"].to_string().contains("has not bound"));
    assert!(overlays_since_switch(out).is_empty());
    // A finished boot is not repeated.
    let before = fs::read(out.join("boot.json")).unwrap();
    libvirt.boot(out, &[]).expect(0);
    assert_eq!(fs::read(out.join("boot.json")).unwrap(), before);
    let defined = libvirt
        .virsh(&["dumpxml", name, "--inactive"])
        .expect(0)
        .stdout;
    assert!(defined.contains("stage=\"final\"") && !defined.contains("com1-"));
}

/// Every row of one firmware and bus.
fn matrix(lab: &Lab, libvirt: &Libvirt, storage: &str) {
    for input in [Input::Plain, Input::Vmx, Input::Ovf, Input::Ova] {
        for disks in [1, 2] {
            let out = machine(lab, libvirt, (input, storage, disks));
            // Space for the next one.
            fs::remove_dir_all(out).unwrap();
        }
    }
}

#[test]
fn bios_machines() {
    if !able() {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Bios), Libvirt::new());
    for storage in ["virtio-blk", "virtio-scsi"] {
        matrix(&lab, &libvirt, storage);
    }
}

#[test]
fn uefi_machines_on_virtio_blk() {
    if !able() {
        return;
    }
    matrix(&guest(Firmware::Uefi), &Libvirt::new(), "virtio-blk");
}

#[test]
#[ignore = "minutes: cargo test --test boot -- --ignored uefi_machines_on_virtio_scsi; .ci/run has it"]
fn uefi_machines_on_virtio_scsi() {
    if !able() {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Uefi), Libvirt::new());
    matrix(&lab, &libvirt, "virtio-scsi");
    eprintln!("the guest wins over what the source says");
    let wrong = lab.path("wrong");
    fs::create_dir(&wrong).unwrap();
    let vmx = "firmware = \"bios\"\nuefi.secureBoot.enabled = \"TRUE\"\nscsi0:0.present = \"TRUE\"\nscsi0:0.fileName = \"system.raw\"\nscsi0.present = \"TRUE\"\n";
    fs::write(wrong.join("vm.vmx"), vmx).unwrap();
    fs::hard_link(&lab.raw, wrong.join("system.raw")).unwrap();
    let more = ["--source-format", "raw", "--portable"];
    let (_, report) = convert(&lab, &wrong.join("vm.vmx"), "wrong", &more);
    let warnings = report["warnings"].to_string();
    assert!(
        warnings.contains("has BIOS, but Windows is installed for UEFI"),
        "{warnings}"
    );
    let path = report["outputs"]["final_xml"].as_str().unwrap();
    tool("virt-xml-validate", &[path, "domain"]);
    let xml = fs::read_to_string(path).unwrap();
    assert!(
        xml.contains("firmware=\"efi\"") && !xml.contains("<loader") && !xml.contains("<graphics")
    );
}

/// Boot files on the first disk, Windows on the second.
fn boots_from_two_disks(firmware: Firmware) {
    if !able() {
        return;
    }
    let ((lab, split), libvirt) = (split_guest(firmware), Libvirt::new());
    let source = lab.libvirt_xml("split", &[&split.boot, &split.windows]);
    let (out, _) = convert(&lab, &source, "split", &[]);
    libvirt.give(lab.dir.path());
    if firmware == Firmware::Uefi {
        return boot_twice(&libvirt, &out, "split");
    }
    // Moved between the boots; the defined domain names the old place.
    let first = ["--stop-after", "bootstrap", "--timeout", "300"];
    libvirt.boot(&out, &first).expect(0);
    let moved = lab.path("moved in between");
    fs::rename(&out, &moved).unwrap();
    libvirt.give(&moved);
    let run = libvirt
        .boot(&moved, &[&first[..], &["--progress", "plain"]].concat())
        .expect(0);
    assert!(run.stderr.contains("Moved"), "{}", run.stderr);
    let report: Value =
        serde_json::from_slice(&fs::read(moved.join("report.json")).unwrap()).unwrap();
    for disk in report["outputs"]["disks"].as_array().unwrap() {
        assert!(Path::new(disk.as_str().unwrap()).starts_with(&moved));
    }
    boot_twice(&libvirt, &moved, "split");
}

#[test]
fn a_bios_vm_with_windows_on_the_second_disk() {
    boots_from_two_disks(Firmware::Bios);
}

#[test]
fn a_uefi_vm_with_windows_on_the_second_disk() {
    boots_from_two_disks(Firmware::Uefi);
}

/// The overlays for the writes of the final boot.
fn overlays_since_switch(out: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir(out)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    all.filter(|path| path.to_str().unwrap().contains(".since-switch-"))
        .collect()
}

/// Puts other code into the boot sector of a VM that is off.
fn replace_payload(lab: &Lab, disk: &str, code: &[u8]) {
    let file = lab.path("payload.bin");
    fs::write(&file, code).unwrap();
    let write = format!("write -q -s {} 0 440", file.display());
    tool("qemu-io", &["-f", "qcow2", "-c", &write, disk]);
}

/// The first byte of sector 10, even of a running VM.
fn counter(disk: &str) -> u8 {
    let args = ["-U", "-r", "-f", "qcow2", "-c", "read -v 5120 16", disk];
    let dump = String::from_utf8(tool("qemu-io", &args)).unwrap();
    let line = dump.lines().find_map(|l| l.split_once(':')).unwrap().1;
    u8::from_str_radix(line.split_whitespace().next().unwrap(), 16).unwrap()
}

#[test]
fn failures_are_named_and_undone() {
    if !able() {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Bios), Libvirt::new());
    let (out, report) = convert(&lab, &lab.raw, "vm", &[]);
    libvirt.give(lab.dir.path());
    let disk = report["outputs"]["disks"][0].as_str().unwrap();
    let record =
        || -> Value { serde_json::from_slice(&fs::read(out.join("boot.json")).unwrap()).unwrap() };
    let cases = [
        (End::PowerOff, "stopped", "shut off"),
        (End::Panic, "panic", "crashed"),
        (End::Reset, "reboot-loop", "shut off"),
        (End::Hang, "timeout", "running"),
    ];
    for (end, code, state) in cases {
        eprintln!("first boot: {code}");
        if code == "reboot-loop" {
            libvirt.virsh(&["destroy", "vm"]).expect(0);
        }
        replace_payload(&lab, disk, &boot_code("up, but not Windows", false, end));
        let run = libvirt
            .boot(&out, &["--timeout", "12", "--max-reboots", "2"])
            .expect(4);
        assert_eq!(run.json()["error"]["code"], 4);
        assert_eq!(record()["bootstrap"]["failure"], code, "{}", run.stderr);
        assert_eq!(record()["phase"], "bootstrap");
        assert_eq!(libvirt.state("vm"), state);
        if code == "timeout" || code == "panic" {
            let shot = record()["bootstrap"]["screenshot"].as_str().map(fs::read);
            assert!(shot.unwrap().unwrap().starts_with(b"\x89PNG"));
        }
    }
    eprintln!("watching continues");
    let id = libvirt.virsh(&["domid", "vm"]).stdout;
    libvirt.boot(&out, &["--timeout", "1"]).expect(4);
    assert_eq!(
        libvirt.virsh(&["domid", "vm"]).stdout,
        id,
        "it was restarted"
    );
    libvirt.virsh(&["destroy", "vm"]).expect(0);

    eprintln!("the first boot alone");
    let good = boot_code(MARKER, false, End::PowerOff);
    replace_payload(&lab, disk, &good);
    libvirt.boot(&out, &["--stop-after", "bootstrap"]).expect(0);
    assert_eq!(record()["phase"], "bootstrap-done");

    eprintln!("final: hangs after writing to the disk");
    replace_payload(&lab, disk, &boot_code("writing", true, End::Hang));
    let run = libvirt.boot(&out, &["--timeout", "20"]).expect(4);
    assert!(
        run.stderr.contains("as it was before the switch"),
        "{}",
        run.stderr
    );
    assert_eq!(
        (
            record()["phase"].as_str(),
            record()["final"]["failure"].as_str()
        ),
        (Some("final-failed"), Some("timeout"))
    );
    let evidence = out.join("evidence-final");
    let com1 = fs::read_to_string(evidence.join("com1.log")).unwrap();
    assert!(com1.contains("writing"), "{com1}");
    for file in ["screen.png", "domain.xml", "SYSTEM", "qemu.log"] {
        assert!(evidence.join(file).is_file(), "no {file}: {:#}", record());
    }
    let live = libvirt.virsh(&["dumpxml", "vm"]).expect(0).stdout;
    assert!(live.contains("stage=\"bootstrap\""));
    assert_eq!(libvirt.state("vm"), "running");
    // The final boot has incremented the counter, that was undone, and the first VM increments it
    // again.
    let begin = Instant::now();
    while counter(disk) == 0 && begin.elapsed().as_secs() < 60 {
        std::thread::sleep(Duration::from_millis(500));
    }
    libvirt.virsh(&["destroy", "vm"]).expect(0);
    assert_eq!(counter(disk), 1);
    assert!(overlays_since_switch(&out).is_empty());

    eprintln!("and then it works");
    replace_payload(&lab, disk, &good);
    libvirt.boot(&out, &["--timeout", "60"]).expect(0);
    assert_eq!(record()["phase"], "done");

    eprintln!("a domain of somebody else");
    let xml = out.join("foreign.xml");
    let theirs = libvirt
        .virsh(&["dumpxml", "vm", "--inactive"])
        .expect(0)
        .stdout;
    fs::write(&xml, theirs.replace("urn:hyper2kvm", "urn:other")).unwrap();
    libvirt.virsh(&["undefine", "vm"]).expect(0);
    libvirt.virsh(&["define", xml.to_str().unwrap()]).expect(0);
    let run = libvirt.boot(&out, &[]).expect(3);
    assert!(run.stderr.contains("did not define"), "{}", run.stderr);
}

/// Killed at the beginning of every phase, and while the VM runs: the same command continues each
/// time, and started VMs are not started again.
#[test]
fn killed_at_every_step() {
    if !able() {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Bios), Libvirt::new());
    let (out, report) = convert(&lab, &lab.raw, "vm", &[]);
    libvirt.give(lab.dir.path());
    let disk = report["outputs"]["disks"][0].as_str().unwrap();
    let phase = || -> String {
        let record: Value =
            serde_json::from_slice(&fs::read(out.join("boot.json")).unwrap()).unwrap();
        record["phase"].as_str().unwrap().to_owned()
    };
    let killed_at = |point: &str, more: &[&str]| {
        let mut command = libvirt.command(Path::new(support::binary()));
        command.arg("boot").arg(&out).args(more);
        command.env("HYPER2KVM_FAILPOINT", format!("{point}=kill"));
        let run = finish(command);
        assert_eq!(run.code, -1, "{point}: {}", run.stderr);
    };
    let going_down = boot_code(MARKER, false, End::PowerOff);
    // It stays on, so that a second start would be seen.
    replace_payload(&lab, disk, &boot_code("not yet", false, End::Hang));
    for (point, at) in [
        ("boot-bootstrap", "bootstrap"),
        ("boot-watching", "bootstrap"),
    ] {
        eprintln!("killed at {point}");
        killed_at(point, &[]);
        assert_eq!(phase(), at);
    }
    let id = libvirt.virsh(&["domid", "vm"]).expect(0).stdout;
    killed_at("boot-watching", &[]);
    assert_eq!(
        libvirt.virsh(&["domid", "vm"]).stdout,
        id,
        "it was restarted"
    );
    libvirt.virsh(&["destroy", "vm"]).expect(0);
    replace_payload(&lab, disk, &going_down);
    for (point, at) in [
        ("boot-bootstrap-up", "bootstrap-up"),
        ("boot-bootstrap-done", "bootstrap-done"),
        ("boot-protecting", "protecting"),
        ("boot-final", "final"),
    ] {
        eprintln!("killed at {point}");
        killed_at(point, &[]);
        assert_eq!(phase(), at);
    }
    let overlays = || overlays_since_switch(&out);
    let [overlay] = &overlays()[..] else {
        panic!("not saved before the switch: {:?}", overlays());
    };
    eprintln!("killed while it is put back");
    let hangs = boot_code("writing", true, End::Hang);
    replace_payload(&lab, overlay.to_str().unwrap(), &hangs);
    killed_at("boot-restoring", &["--timeout", "15"]);
    assert_eq!(phase(), "restoring");
    killed_at("boot-final-failed", &[]);
    assert_eq!(phase(), "final-failed");
    // The payload that hung was written after the switch: it is gone with the rest.
    assert_eq!(counter(disk), 0);
    eprintln!("killed while what was written since the switch goes into the disk");
    let up_and_counts = boot_code(MARKER, true, End::PowerOff);
    replace_payload(&lab, disk, &up_and_counts);
    killed_at("boot-merging", &["--timeout", "300"]);
    assert_eq!(phase(), "final");
    assert_eq!(overlays().len(), 1);
    killed_at("boot-merged", &[]);
    assert_eq!(overlays().len(), 0);
    let counted = counter(disk);
    assert!(counted > 0);
    eprintln!("and on to the end");
    let run = libvirt.boot(&out, &["--timeout", "300"]).expect(0).json();
    assert_eq!(run["phase"], "done");
    assert_eq!(counter(disk), counted);
    assert!(!snapshots(disk).contains("hyper2kvm"));
}

/// `--pool` and `--install-to`: the disks are moved to a place that libvirt can read, and the VM
/// boots there.
#[test]
fn disks_are_installed() {
    if !able() {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Bios), Libvirt::new());
    let pool = lab.path("the pool");
    fs::create_dir(&pool).unwrap();
    let pool = pool.to_str().unwrap();
    let (out, report) = convert(
        &lab,
        &lab.raw,
        "vm",
        &["--emit", "qemu,proxmox", "--emit", "kubevirt,qemu"],
    );
    assert_eq!(report["outputs"]["emitted"].as_array().unwrap().len(), 5);
    libvirt.give(lab.dir.path());
    libvirt
        .virsh(&["pool-create-as", "images", "dir", "--target", pool])
        .expect(0);

    let run = libvirt.boot(&out, &["--pool", "no-such-pool"]).expect(1);
    assert!(run.stderr.contains("pool-list --all"), "{}", run.stderr);
    let old = out.join("vm.qcow2");
    assert!(old.exists());
    // Killed after the first of two files: the next run moves the other.
    let mut command = libvirt.command(Path::new(support::binary()));
    command.arg("boot").arg(&out).args(["--pool", "images"]);
    command.env("HYPER2KVM_FAILPOINT", "installing=kill");
    assert_eq!(finish(command).code, -1);
    // The originals are removed last.
    assert!(old.exists() && out.join("vm-probe.qcow2").exists());
    let record = libvirt
        .boot(&out, &["--pool", "images", "--timeout", "300"])
        .expect(0)
        .json();
    assert_eq!(record["phase"], "done");
    let volumes = libvirt.virsh(&["vol-list", "images"]).expect(0).stdout;
    for file in ["vm.qcow2", "vm-probe.qcow2"] {
        let path = Path::new(pool).join(file);
        assert!(path.exists() && !out.join(file).exists());
        use std::os::unix::fs::MetadataExt;
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(volumes.contains(file), "{volumes}");
    }
    let new = Path::new(pool).join("vm.qcow2").display().to_string();
    for file in [
        "vm-final.xml",
        "vm-bootstrap.xml",
        "vm-qemu-final.sh",
        "vm-proxmox.sh",
        "report.json",
    ] {
        let text = fs::read_to_string(out.join(file)).unwrap();
        assert!(
            text.contains(&new) && !text.contains(old.to_str().unwrap()),
            "{file}: {text}"
        );
    }
    // Both stages of the QEMU script run the same disks without libvirt.
    for stage in ["bootstrap", "final"] {
        run_script(&libvirt, &out, "vm", stage);
    }

    eprintln!("by convert");
    let folder = lab.path("images");
    fs::create_dir(&folder).unwrap();
    let args = [
        "--install-to",
        folder.to_str().unwrap(),
        "--connect",
        "qemu:///session",
    ];
    let (out, report) = convert(&lab, &lab.raw, "two", &args);
    let disk = report["outputs"]["disks"][0].as_str().unwrap();
    assert_eq!(Path::new(disk), folder.join("two.qcow2"));
    tool("qemu-img", &["check", disk]);
    assert!(!out.join("two.qcow2").exists());
    // An existing disk is never overwritten.
    let run = h2k([
        "convert",
        lab.raw.to_str().unwrap(),
        "--virtio-iso",
        virtio_win().to_str().unwrap(),
        "-o",
        lab.path("again").to_str().unwrap(),
        "--name",
        "two",
        "--install-to",
        folder.to_str().unwrap(),
        "--connect",
        "qemu:///session",
    ])
    .expect(1);
    assert!(run.stderr.contains("exists already"), "{}", run.stderr);
    assert!(lab.path("again/two.qcow2").exists());
}

/// Runs the QEMU script of one stage, and sees the marker on COM1.
fn run_script(libvirt: &Libvirt, out: &Path, name: &str, stage: &str) {
    eprintln!("by script: {stage}");
    let com1 = out.join(format!("script-{stage}.log"));
    let mut command = libvirt.command(Path::new("timeout"));
    command
        .arg("300")
        .arg("sh")
        .arg(out.join(format!("{name}-qemu-{stage}.sh")))
        .env("COM1", format!("file:{}", com1.display()));
    let run = finish(command);
    assert_eq!(run.code, 0, "{}{}", run.stdout, run.stderr);
    let text = fs::read_to_string(com1).unwrap();
    assert!(text.contains(MARKER), "{text}\n{}", run.stderr);
}

/// A TPM in both boots; and Secure Boot with enrolled keys, proved by the firmware refusing an
/// unsigned loader.
#[test]
fn tpm_and_secure_boot() {
    if !able() || !have(&["swtpm", "swtpm_setup"]) {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Uefi), Libvirt::new());
    let (out, report) = convert(&lab, &lab.raw, "tpm", &["--tpm", "on", "--emit", "qemu"]);
    libvirt.give(lab.dir.path());
    let xml = fs::read_to_string(report["outputs"]["final_xml"].as_str().unwrap()).unwrap();
    assert!(xml.contains("<tpm model=\"tpm-crb\">") && !xml.contains("secure=\"yes\""));
    let record = libvirt.boot(&out, &["--timeout", "300"]).expect(0).json();
    assert_eq!(record["phase"], "done");
    let com1 = fs::read_to_string(out.join("com1-final.log")).unwrap();
    assert!(com1.contains(MARKER));
    // The same without libvirt, with the variables libvirt has made.
    run_script(&libvirt, &out, "tpm", "final");

    let (out, report) = convert(
        &lab,
        &lab.raw,
        "secure",
        &["--tpm", "on", "--secure-boot", "on"],
    );
    libvirt.give(lab.dir.path());
    for key in ["bootstrap_xml", "final_xml"] {
        let path = report["outputs"][key].as_str().unwrap();
        tool("virt-xml-validate", &[path, "domain"]);
        let xml = fs::read_to_string(path).unwrap();
        assert!(
            xml.contains("secure=\"yes\"") && xml.contains("<smm state=\"on\"/>"),
            "{xml}"
        );
    }
    let log = |path: &str| {
        let bytes = fs::read(out.join(path)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    std::thread::scope(|scope| {
        let boot = scope.spawn(|| libvirt.boot(&out, &["--timeout", "600"]));
        while !boot.is_finished() && !log("com1-bootstrap.log").contains("Access Denied") {
            std::thread::sleep(Duration::from_millis(300));
        }
        // No more output will arrive.
        libvirt.virsh(&["destroy", "secure"]);
        boot.join().unwrap().expect(4);
    });
    let evidence = log("evidence-bootstrap/com1.log");
    assert!(!evidence.contains(MARKER));
    assert!(evidence.contains("Access Denied"), "{evidence}");
}

/// `--xml-patch`, and changes by virt-xml: `boot` accepts both.
#[test]
fn domains_can_be_changed() {
    if !able() {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Bios), Libvirt::new());
    let patch = lab.path("patch.xml");
    let give_patch = |text: &str| {
        fs::write(
            &patch,
            format!("<domain xmlns:p='urn:hyper2kvm:patch:1'>{text}</domain>"),
        )
        .unwrap();
    };
    let convert_args = |name: &str| {
        let out = lab.path(name).display().to_string();
        let list = [
            "convert",
            lab.raw.to_str().unwrap(),
            "--virtio-iso",
            virtio_win().to_str().unwrap(),
            "-o",
            &out,
            "--name",
            "bad",
            "--xml-patch",
            patch.to_str().unwrap(),
        ];
        list.map(str::to_owned)
    };
    for (text, want) in [
        ("<nonsense/>", "nonsense"),
        ("<uuid>1</uuid>", "changes <uuid>"),
        (
            "<devices><disk p:where='target/@dev=xyz' p:op='remove'/></devices>",
            "no such element",
        ),
        ("<devices>", "not well-formed"),
    ] {
        give_patch(text);
        let run = h2k(convert_args("bad")).expect(2);
        assert!(run.stderr.contains(want), "{text}: {}", run.stderr);
        assert!(!lab.path("bad").exists());
    }
    give_patch(
        "<iothreads>1</iothreads><devices><disk p:where='target/@dev=vda'><driver queues='2'/></disk><watchdog p:stage='final' model='i6300esb' action='reset'/></devices>",
    );
    let more = [
        "--xml-patch",
        patch.to_str().unwrap(),
        "--machine",
        "pc-q35-7.2",
    ];
    let (out, report) = convert(&lab, &lab.raw, "vm", &more);
    let [first, last] = ["bootstrap_xml", "final_xml"]
        .map(|key| PathBuf::from(report["outputs"][key].as_str().unwrap()));
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    assert!(read(&last).contains("queues=\"2\"") && read(&last).contains("<watchdog"));
    assert!(read(&first).contains("<iothreads>1<") && !read(&first).contains("<watchdog"));
    assert!(read(&first).contains("machine=\"pc-q35-7.2\""));
    if have(&["virt-xml"]) {
        for path in [&first, &last] {
            let mut command = std::process::Command::new("sh");
            command.args([
                "-c",
                r#"virt-xml --connect test:///default --edit --memory 320 --print-xml <"$1" >"$1.new" && mv "$1.new" "$1""#,
                "sh",
            ]);
            command.arg(path);
            let run = finish(command).expect(0);
            let xml = read(path);
            assert!(
                xml.contains("<memory unit=\"KiB\">327680<"),
                "{}{xml}",
                run.stderr
            );
            tool("virt-xml-validate", &[path.to_str().unwrap(), "domain"]);
        }
    }
    libvirt.give(lab.dir.path());
    let record = libvirt.boot(&out, &["--timeout", "300"]).expect(0).json();
    assert_eq!(record["phase"], "done");
    let live = libvirt
        .virsh(&["dumpxml", "vm", "--inactive"])
        .expect(0)
        .stdout;
    assert!(
        live.contains("<watchdog") && live.contains("queues='2'"),
        "{live}"
    );
}
