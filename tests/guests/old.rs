//! Windows versions that need older drivers, or can do less.

use std::fs;
use std::path::Path;

use hyper2kvm::demo::WinVersion;

use crate::support::{Lab, TOOLS, drivers_for_old_windows, h2k, have, tool, virtio_win};
use crate::{base, find, spec};

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
