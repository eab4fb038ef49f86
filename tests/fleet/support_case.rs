//! Evidence of a VM for a support case.

use super::*;

#[test]
fn evidence_for_a_support_case() {
    if !have(&TOOLS) || !have(&["tar"]) {
        return;
    }
    let fleet = Fleet::new(&["web"]);
    let folder = fleet.path("case");
    let source = fleet.path("web.raw");
    let line = [
        "inspect",
        source.to_str().unwrap(),
        "--evidence",
        folder.to_str().unwrap(),
    ];
    let run = h2k(line).expect(0);
    for word in ["boot key", "SECURITY", "encrypted"] {
        assert!(run.stderr.contains(word), "{word}: {}", run.stderr);
    }
    let archive = folder.join("web-evidence.tar.gz");
    let mode = |path: &Path| {
        use std::os::unix::fs::PermissionsExt;
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    };
    assert_eq!((mode(&archive), mode(&folder)), (0o600, 0o700));

    let out = fleet.path("unpacked");
    fs::create_dir(&out).unwrap();
    support::tool(
        "tar",
        &[
            "-xzf",
            archive.to_str().unwrap(),
            "-C",
            out.to_str().unwrap(),
        ],
    );
    let mut files = Vec::new();
    let mut folders = vec![out.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(
                    path.strip_prefix(&out)
                        .unwrap()
                        .to_str()
                        .unwrap()
                        .to_string(),
                );
            }
        }
    }
    files.sort();
    let has = |end: &str| files.iter().any(|f| f.ends_with(end));
    for end in [
        "WARNING.txt",
        "inspect.json",
        "manifest.json",
        "System32/config/SYSTEM",
        "System32/config/SOFTWARE",
        "EFI/Microsoft/Boot/BCD",
        "INF/setupapi.dev.log",
        "winevt/Logs/System.evtx",
        "Windows/hyper2kvm/firstboot.log",
    ] {
        assert!(has(end), "{end}: {files:#?}");
    }
    // Of a log that is too long, the end.
    let long = fs::read(out.join("partition-3/Windows/INF/setupapi.setup.log"));
    let long = long.unwrap_or_else(|_| panic!("{files:#?}"));
    assert_eq!(long.len(), 16 << 20);
    assert_eq!(long[0], ((1usize << 20) % 251) as u8);
    for end in ["/SAM", "/SECURITY", ".pnf"] {
        assert!(!has(end), "{end}: {files:#?}");
    }
    // The hive is the one of the guest, by another reader.
    let lab_volume = support::Lab {
        dir: tempfile::tempdir().unwrap(),
        spec: GuestSpec::new(WinVersion::Server2022),
        raw: source.clone(),
    };
    let volume = lab_volume.volume(&source);
    let hive = files.iter().find(|f| f.ends_with("config/SYSTEM")).unwrap();
    assert_eq!(
        fs::read(out.join(hive)).unwrap(),
        lab_volume.ntfscat(&volume, "Windows/System32/config/SYSTEM")
    );
    let manifest: Value =
        serde_json::from_slice(&fs::read(out.join("manifest.json")).unwrap()).unwrap();
    let entry = manifest["files"]
        .as_array()
        .unwrap()
        .iter()
        .find(|f| f["name"] == **hive)
        .unwrap();
    assert_eq!(entry["sha256"], *sha256(&out.join(hive)));

    // What is there is not replaced.
    let digest = sha256(&archive);
    h2k(line).expect(1);
    assert_eq!(sha256(&archive), digest);
}
