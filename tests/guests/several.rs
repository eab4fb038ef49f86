//! VMs of several disks: the rows of "Several disks".

use std::fs;
use std::path::Path;

use hyper2kvm::demo::WinVersion;

use crate::rows::{assert_refusal, assert_row};
use crate::support::{Run, TOOLS, h2k, have, rename_disk, tool, virtio_win};
use crate::{base, find};

fn run(verb: &str, source: &Path, out: &Path, more: &[&str]) -> Run {
    let iso = virtio_win().to_str().unwrap();
    let (source, out) = (source.to_str().unwrap(), out.to_str().unwrap());
    let fixed = [verb, source, "--virtio-iso", iso, "-o", out, "--json"];
    h2k([&fixed[..], more].concat())
}

#[test]
fn boot_files_on_another_disk() {
    if !have(&TOOLS) {
        return;
    }
    for version in [WinVersion::Win10, WinVersion::Win7] {
        let lab = base(version);
        let split = lab.split();
        let source = lab.libvirt_xml("apart", &[&split.boot, &split.windows]);
        let seen = h2k(["inspect", source.to_str().unwrap(), "--json"]).expect(0);
        let seen = seen.json();
        let found = find(&seen["findings"], "id", "boot-files-elsewhere").unwrap();
        assert_row("boot-files-elsewhere", found);
        let out = lab.path("out-apart");
        let plan = run("plan", &source, &out, &[]).expect(0).json();
        assert_eq!(plan["ready"], true);
        let report = run("convert", &source, &out, &[]).expect(0).json();
        assert_eq!(report["ready"], true);
        h2k(["verify", out.to_str().unwrap()]).expect(0);
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn windows_on_two_disks() {
    if !have(&TOOLS) {
        return;
    }
    let lab = base(WinVersion::Win10);
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = ["one.raw", "two.raw"].map(|name| dir.path().join(name));
    for disk in [&one, &two] {
        let (from, to) = (lab.raw.to_str().unwrap(), disk.to_str().unwrap());
        tool("cp", &["--sparse=always", from, to]);
    }
    rename_disk(&lab.spec, &two, 0x7777_7777);
    let source = lab.libvirt_xml("twice", &[&one, &two]);
    let out = dir.path().join("out");
    for verb in ["plan", "convert"] {
        assert_refusal("several-windows", &run(verb, &source, &out, &[]));
    }
    h2k(["inspect", source.to_str().unwrap(), "--json"]).expect(3);
    assert!(!out.exists());
    run("plan", &source, &out, &["--root", "2/3:\\Windows"]).expect(0);
}
