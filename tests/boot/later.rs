//! A VM that runs from its source's disk: both boots, the rollback, and a pull while the guest writes.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use hyper2kvm::boot::MARKER;
use hyper2kvm::demo::Firmware;
use serde_json::Value;

use crate::libvirt::{Libvirt, able};
use crate::payload::{End, boot_code, guest};
use crate::support::later::{Untouched, same_guest};
use crate::support::{Run, binary, finish, have, tool};
use crate::{convert, counter, overlays_since_switch, replace_payload};

fn pull(libvirt: &Libvirt, out: &Path, more: &[&str], point: &str) -> Run {
    let mut command = libvirt.command(Path::new(binary()));
    command.arg("pull").arg(out).arg("--json").args(more);
    command.env("HYPER2KVM_FAILPOINT", point);
    finish(command)
}

/// The guest's output on COM1 since the marker.
fn said(out: &Path) -> String {
    let log = fs::read(out.join("com1-final.log")).unwrap_or_default();
    let log = String::from_utf8_lossy(&log).into_owned();
    log.split_once(MARKER)
        .map_or(String::new(), |(_, rest)| rest.to_owned())
}

#[track_caller]
fn works_on(out: &Path) {
    let dots = || said(out).matches('.').count();
    let (before, begin) = (dots(), Instant::now());
    while dots() < before + 2 {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "it hangs: {}",
            said(out)
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(!said(out).contains('B'), "read back wrong: {}", said(out));
}

#[test]
fn a_vm_is_pulled_off_its_source_while_it_writes() {
    if !able() || !have(&["qemu-io"]) {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Bios), Libvirt::new());
    libvirt.give(lab.dir.path());
    let untouched = Untouched::of(&[&lab.raw]);
    let (_, plain) = convert(&lab, &lab.raw, "plain", &[]);
    let (out, report) = convert(&lab, &lab.raw, "vm", &["--copy", "later"]);
    libvirt.give(&out);
    let disk = report["outputs"]["disks"][0].as_str().unwrap();
    assert!(report["bytes"]["left"].as_u64().unwrap() > 1 << 20);
    libvirt.boot(&out, &["--stop-after", "bootstrap"]).expect(0);

    eprintln!("the rollback");
    let run = pull(&libvirt, &out, &[], "").expect(1);
    assert!(run.stderr.contains("bootstrap-done"), "{}", run.stderr);
    replace_payload(&lab, disk, &boot_code("writing", true, End::Hang));
    libvirt.boot(&out, &["--timeout", "12"]).expect(4);
    // The final boot has incremented the counter, that was undone, and the first VM increments it
    // again.
    let begin = Instant::now();
    while counter(disk) == 0 && begin.elapsed().as_secs() < 60 {
        std::thread::sleep(Duration::from_millis(300));
    }
    libvirt.virsh(&["destroy", "vm"]).expect(0);
    assert_eq!(counter(disk), 1);
    assert!(overlays_since_switch(&out).is_empty());
    untouched.check();

    eprintln!("and on to VirtIO, with what was written since merged while it runs");
    replace_payload(&lab, disk, &boot_code(MARKER, false, End::Work));
    let record = libvirt.boot(&out, &["--timeout", "120"]).expect(0).json();
    assert_eq!(record["phase"], "done");
    assert_eq!(libvirt.state("vm"), "running");
    assert!(overlays_since_switch(&out).is_empty());
    let live = |more: &[&str]| {
        libvirt
            .virsh(&[&["dumpxml", "vm"], more].concat())
            .expect(0)
            .stdout
    };
    for xml in [live(&[]), live(&["--inactive"])] {
        assert!(!xml.contains("since-switch"), "{xml}");
        assert!(
            xml.contains(&format!("<source file='{}'", lab.raw.display())),
            "{xml}"
        );
    }
    works_on(&out);

    eprintln!("killed in mid-pull, and libvirtd with it");
    let run = pull(&libvirt, &out, &["--bandwidth", "1"], "pull-copying=kill");
    assert_eq!(run.code, -1, "{}", run.stderr);
    let pid = fs::read_to_string(libvirt.dir.path().join("run/libvirt/libvirtd.pid")).unwrap();
    tool("kill", &["-KILL", pid.trim()]);
    works_on(&out);
    let pulled = pull(&libvirt, &out, &["--bandwidth", "64"], "")
        .expect(0)
        .json();
    assert_eq!(pulled["by"], "libvirt");
    works_on(&out);
    for xml in [live(&[]), live(&["--inactive"])] {
        assert!(!xml.contains("guest.raw"), "{xml}");
    }
    let report: Value =
        serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
    assert_eq!(report["outputs"]["complete"], true);
    let info = tool(
        "qemu-img",
        &["info", "-U", "--backing-chain", "--output=json", disk],
    );
    let chain: Value = serde_json::from_slice(&info).unwrap();
    assert_eq!(chain.as_array().unwrap().len(), 1);
    untouched.check();
    libvirt.virsh(&["destroy", "vm"]).expect(0);
    // Without the source, and without the settings for it.
    fs::remove_file(&lab.raw).unwrap();
    tool("qemu-img", &["check", "-q", disk]);
    assert!(!live(&["--inactive"]).contains("error_policy"));
    libvirt.virsh(&["start", "vm"]).expect(0);
    libvirt.virsh(&["destroy", "vm"]).expect(0);
    let plain = plain["outputs"]["disks"][0].as_str().unwrap();
    same_guest(Path::new(plain), Path::new(disk));
}

#[test]
fn a_domain_is_given_up_with_its_vm() {
    if !able() {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Bios), Libvirt::new());
    libvirt.give(lab.dir.path());
    let untouched = Untouched::of(&[&lab.raw]);
    let (out, _) = convert(&lab, &lab.raw, "vm", &["--copy", "later"]);
    libvirt.give(&out);
    libvirt.boot(&out, &["--stop-after", "bootstrap"]).expect(0);
    let release = |more: &[&str]| {
        let mut command = libvirt.command(Path::new(binary()));
        command.arg("release").arg(&out).arg("--json").args(more);
        finish(command)
    };
    let run = release(&[]).expect(1);
    assert!(run.stderr.contains("was started"), "{}", run.stderr);
    assert_eq!(libvirt.state("vm"), "shut off");
    // A domain of somebody else with the same UUID is not changed.
    let theirs = libvirt
        .virsh(&["dumpxml", "vm", "--inactive"])
        .expect(0)
        .stdout;
    let foreign = lab.path("foreign.xml");
    fs::write(&foreign, theirs.replace("urn:hyper2kvm", "urn:other")).unwrap();
    libvirt.give(&foreign);
    libvirt.virsh(&["undefine", "vm"]).expect(0);
    libvirt
        .virsh(&["define", foreign.to_str().unwrap()])
        .expect(0);
    let released = release(&["--force"]).expect(0).json();
    assert_eq!(released["domain"], false);
    assert_eq!(libvirt.state("vm"), "shut off");
    assert!(!out.exists());
    libvirt.virsh(&["undefine", "vm"]).expect(0);

    let (out, report) = convert(&lab, &lab.raw, "vm", &["--copy", "later"]);
    let disk = report["outputs"]["disks"][0].as_str().unwrap();
    replace_payload(&lab, disk, &boot_code("here", false, End::Hang));
    libvirt.give(&out);
    let xml = out.join("vm-final.xml");
    libvirt.virsh(&["define", xml.to_str().unwrap()]).expect(0);
    libvirt.virsh(&["start", "vm"]).expect(0);
    let run = release(&[]).expect(1);
    assert!(run.stderr.contains("the VM runs"), "{}", run.stderr);
    assert_eq!(release(&["--force"]).expect(0).json()["domain"], true);
    assert!(
        !libvirt
            .virsh(&["list", "--all"])
            .expect(0)
            .stdout
            .contains("vm")
    );
    assert!(!out.exists());
    untouched.check();
}
