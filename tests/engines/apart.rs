//! Boot files and Windows on different disks, by both engines.

use std::fs;
use std::path::{Path, PathBuf};

use hyper2kvm::demo::{Firmware, GuestSpec, Leftovers, Role, WinVersion};

use crate::support::{self, Lab, TOOLS, have, tool, virtio_win};
use crate::{counted, starts, tree};

/// One appliance for each of the two disks.
#[test]
#[ignore = "over a minute of two appliances: cargo test --test engines -- --ignored boot_files"]
fn boot_files_and_windows_apart_by_both_engines() {
    if !have(&TOOLS) || !have(&["guestfish", "mdel"]) {
        return;
    }
    let lab = Lab::new(GuestSpec {
        disk_size: 1 << 30,
        firmware: Firmware::Uefi,
        leftovers: Leftovers::None,
        ..GuestSpec::new(WinVersion::Server2022)
    });
    // Something to do on the disk with the boot files.
    let esp = lab.spec.partition(Role::Esp).unwrap().start;
    let image = format!("{}@@{esp}", lab.raw.display());
    tool("mdel", &["-i", &image, "::/EFI/Boot/bootx64.efi"]);
    let split = lab.split();
    let source = lab.libvirt_xml("apart", &[&split.boot, &split.windows]);
    let [embedded, guestfish] = ["embedded", "guestfish"].map(|engine| {
        let disks = convert(&lab, &source, engine);
        let appliances = if engine == "guestfish" { 2 } else { 0 };
        assert_eq!(starts(&lab), appliances, "{engine}");
        disks.map(|disk| tree(&disk))
    });
    for (which, (a, b)) in ["Windows", "boot files"]
        .iter()
        .zip(embedded.iter().zip(&guestfish))
    {
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        for (file, contents) in a {
            assert_eq!(contents, &b[file], "{which}: {file:?}");
        }
    }
    let [windows, boot] = &guestfish;
    let has = |tree: &std::collections::BTreeMap<(u32, String), _>, path: &str| {
        tree.keys().any(|(_, name)| name.eq_ignore_ascii_case(path))
    };
    assert!(has(windows, "Windows/System32/drivers/viostor.sys"));
    assert!(has(boot, "EFI/Boot/bootx64.efi"));
}

/// The disk with Windows and that with the boot files.
fn convert(lab: &Lab, source: &Path, engine: &str) -> [PathBuf; 2] {
    let out = lab.path("out");
    let mut command = std::process::Command::new(support::binary());
    command
        .args(["convert", source.to_str().unwrap(), "--json", "-o"])
        .args([out.to_str().unwrap(), "--engine", engine])
        .args(["--format", "raw", "--memory", "256", "--virtio-iso"])
        .arg(virtio_win())
        .env("PATH", counted(lab));
    let report = support::finish(command).expect(0).json();
    assert_eq!(report["engine"], engine);
    let kept = lab.path(&format!("out-{engine}"));
    fs::rename(&out, &kept).unwrap();
    let disks = report["outputs"]["disks"].as_array().unwrap();
    [0, 1].map(|i| {
        let name = Path::new(disks[i].as_str().unwrap()).file_name().unwrap();
        kept.join(name)
    })
}
