//! Disks in use by a domain of libvirt: running, and suspended to disk, when no process holds them.

use std::path::Path;

use crate::convert;
use crate::libvirt::{Libvirt, able};
use crate::support::{Lab, Run, binary, finish, sha256, tool, virtio_win};

/// Runs as the user whose libvirt it is.
fn run(libvirt: &Libvirt, args: &[&str]) -> Run {
    let mut command = libvirt.command(Path::new(binary()));
    command.args(args);
    finish(command)
}

fn start(libvirt: &Libvirt, out: &Path, name: &str) {
    let xml = out.join(format!("{name}-final.xml"));
    libvirt.virsh(&["define", xml.to_str().unwrap()]).expect(0);
    libvirt.virsh(&["start", name]).expect(0);
}

#[test]
fn a_disk_of_a_domain_is_not_replaced_and_not_written() {
    if !able() {
        return;
    }
    let (lab, libvirt) = (Lab::small(), Libvirt::new());
    let before = sha256(&lab.raw);
    let (result, _) = convert(&lab, &lab.raw, "vm", &[]);
    let (fixed, _) = convert(&lab, &lab.raw, "fixed", &["--in-place"]);
    let drivers = lab.path("drivers");
    let [from, to] = [virtio_win(), &drivers].map(|path| path.to_str().unwrap());
    tool("cp", &["-r", from, to]);
    libvirt.give(lab.dir.path());
    let disk = result.join("vm.qcow2");
    let was = sha256(&lab.raw);
    assert_ne!(was, before);
    let raw = lab.raw.to_str().unwrap();
    let refused = |args: &[&str], says: &str| {
        let run = run(&libvirt, args).expect(1);
        assert!(run.stderr.contains(says), "{args:?} {says}: {}", run.stderr);
        assert!(run.stderr.contains("hint:"), "{}", run.stderr);
        assert!(disk.exists() && result.join("report.json").exists());
        assert_eq!(sha256(&lab.raw), was);
    };
    let (out, undo) = (result.to_str().unwrap(), fixed.to_str().unwrap());
    let other = lab.path("other");
    let other = other.to_str().unwrap();
    let force = [
        "convert",
        raw,
        "--name",
        "vm",
        "--force",
        "-o",
        out,
        "--virtio-iso",
        to,
    ];
    let in_place = [
        "convert",
        raw,
        "--in-place",
        "-o",
        other,
        "--virtio-iso",
        to,
    ];

    eprintln!("running");
    start(&libvirt, &result, "vm");
    refused(&force, "vm.qcow2 is in use by");
    libvirt.virsh(&["managedsave", "vm"]).expect(0);
    eprintln!("suspended to disk");
    refused(&force, "is in use by the domain");
    libvirt.virsh(&["managedsave-remove", "vm"]).expect(0);

    eprintln!("a disk that is fixed in place");
    start(&libvirt, &fixed, "fixed");
    refused(&in_place, "is in use");
    refused(&["rollback", undo], "is in use");
    libvirt.virsh(&["managedsave", "fixed"]).expect(0);
    for args in [&in_place[..], &["rollback", undo]] {
        refused(args, "suspended to disk");
        refused(args, "managedsave-remove");
    }
    libvirt.virsh(&["managedsave-remove", "fixed"]).expect(0);
    run(&libvirt, &["rollback", undo]).expect(0);
    assert_eq!(sha256(&lab.raw), before);
}
