//! Exit codes, wrong usage, and verbs that need no disk.

use super::*;

/// Every exit code is documented in the help, the README and the man page, and no other.
#[test]
fn exit_codes_are_documented() {
    use hyper2kvm::error::ErrorKind::*;
    let kinds = [
        Failed,
        Usage,
        Refused,
        NotReady,
        MissingTool,
        RolledBack,
        NotRolledBack,
        Internal,
        Interrupted,
    ];
    let mut codes: Vec<u8> = kinds.iter().map(|k| k.code()).collect();
    codes.insert(0, 0);
    let readme =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let readme: Vec<u8> = readme
        .lines()
        .filter_map(|l| l.strip_prefix("| ")?.split(' ').next()?.parse().ok())
        .collect();
    assert_eq!(readme, codes, "README");
    for args in [["--help"], ["man"]] {
        let text = h2k(args).expect(0).stdout;
        let (_, list) = text
            .split_once("Exit codes:")
            .expect("a list of exit codes");
        let found: Vec<u8> = list
            .lines()
            .filter_map(|l| l.split_whitespace().next()?.parse().ok())
            .collect();
        assert_eq!(found, codes, "{args:?}");
    }
    // `match` makes this fail to compile when a kind is added.
    for kind in kinds {
        match kind {
            Failed | Usage | Refused | NotReady | MissingTool | RolledBack | NotRolledBack
            | Internal | Interrupted | SomeFailed(_) => {}
        }
    }
    // A range: one code per number of VMs that failed.
    let help = h2k(["--help"]).expect(0).stdout;
    for text in [
        &help,
        &fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap(),
    ] {
        assert!(text.contains("101-120"), "{text}");
    }
    let codes = [1, 19, 20, 21, 500].map(|n| SomeFailed(n).code());
    assert_eq!(codes, [101, 119, 120, 120, 120]);
}

#[test]
fn usage_errors() {
    for args in [
        vec!["convert"],
        vec!["convert", "x", "--memory", "lots"],
        vec!["convert", "x", "--storage", "floppy"],
        vec!["convert", "x", "--mac", "nonsense"],
        vec!["convert", "x", "--in-place", "--compress"],
        vec!["frobnicate"],
        vec!["rollback"],
    ] {
        let run = h2k(args.clone()).expect(2);
        assert!(run.stderr.starts_with("error:"), "{args:?}: {}", run.stderr);
        let mut args = args;
        args.push("--json");
        let json = h2k(args).expect(2).json();
        assert_eq!(json["schema"], "hyper2kvm/error/1");
        assert_eq!(json["error"]["code"], 2);
    }
}

#[test]
fn verbs_that_need_no_disk() {
    let drivers = h2k(["drivers"]).expect(0).stdout;
    assert!(
        drivers.contains("Windows 11") && drivers.contains("w11"),
        "{drivers}"
    );
    let json = h2k(["drivers", virtio_win().to_str().unwrap(), "--json"])
        .expect(0)
        .json();
    let rows = json["windows"].as_array().unwrap();
    let usable = |row: &&Value| row["usable"] == true;
    assert!(rows.iter().filter(usable).count() > 10, "{json}");

    let script = h2k(["completions", "bash"]).expect(0).stdout;
    assert!(script.contains("rollback"), "{script}");
    let mut bash = Command::new("bash")
        .arg("-n")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    bash.stdin
        .take()
        .unwrap()
        .write_all(script.as_bytes())
        .unwrap();
    assert!(bash.wait().unwrap().success());

    let dir = tempfile::tempdir().unwrap();
    h2k(["man", dir.path().to_str().unwrap()]).expect(0);
    for page in ["hyper2kvm.1", "hyper2kvm-convert.1", "hyper2kvm-rollback.1"] {
        let text = fs::read_to_string(dir.path().join(page)).unwrap();
        assert!(text.contains(".SH NAME"), "{page}");
    }
    if have(&TOOLS) {
        let text = h2k(["doctor"]).expect(0).stdout;
        for purpose in ["convert:  yes", "boot: ", "rehearse: "] {
            let line = format!("ready to {purpose}");
            assert!(text.lines().any(|l| l.starts_with(&line)), "{text}");
        }
        for what in [
            "libvirt daemon",
            "OVMF",
            "swtpm",
            "/dev/kvm",
            "groups",
            "nbdkit",
            "free in",
        ] {
            assert!(text.contains(what), "{what}: {text}");
        }
        let doctor = h2k(["doctor", "--json"]).expect(0).json();
        assert_eq!(doctor["ready"]["convert"]["ready"], true);
        assert_eq!(doctor["checks"].as_array().unwrap().len(), 7);
        assert_eq!(doctor["schema"], "hyper2kvm/doctor/1");
        let tools = doctor["tools"].as_array().unwrap();
        assert!(
            tools
                .iter()
                .any(|t| t["name"] == "qemu-img" && t["path"].is_string())
        );
    }
}

#[test]
fn the_demo() {
    if !have(&TOOLS) {
        return;
    }
    let lab = empty_lab();
    for (folder, more) in [("uefi", None), ("bios", Some("--bios"))] {
        let mut args = vec!["demo", folder];
        args.extend(more);
        let run = run_in(&lab, &args, &[]).expect(0);
        assert!(run.stdout.contains("READY"), "{}", run.stdout);
        assert!(lab.path(folder).join("demo-kvm/report.json").exists());
        fails_with(&lab, &args, &[], 1, &["creating"]);
        let disk = format!("{folder}/demo-kvm/demo.qcow2");
        run_in(&lab, &["verify", &disk], &[]).expect(0);
        let disk = format!("{folder}/demo.raw");
        let json = run_in(&lab, &["verify", &disk, "--json"], &[])
            .expect(4)
            .json();
        assert_eq!(json["ready"], false);
    }
}
