//! What `docs/fleet` shows, and its manifests and image.

use super::*;

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/fleet")
}

/// Every command of `docs/fleet/README.md` is run: hyper2kvm, sh, xargs and parallel as they are, what
/// needs a cluster or a container engine by a stand-in.
#[test]
fn what_the_documents_show() {
    if !have(&TOOLS) || !have(&["xargs"]) {
        return;
    }
    let text = fs::read_to_string(docs().join("README.md")).unwrap();
    let fleet = Fleet::new(&["guest"]);
    let raw = fleet.path("guest.raw");
    for (format, name) in [
        ("vmdk", "disk.vmdk"),
        ("vhdx", "disk.vhdx"),
        ("vmdk", "vm.vmdk"),
    ] {
        let path = fleet.path(name);
        let to = path.to_str().unwrap();
        support::tool(
            "qemu-img",
            &[
                "convert",
                "-f",
                "raw",
                "-O",
                format,
                raw.to_str().unwrap(),
                to,
            ],
        );
    }
    fs::remove_file(raw).unwrap();
    fs::write(
        fleet.path("vm.vmx"),
        "displayName = \"vm\"\nfirmware = \"efi\"\nsata0.present = \"TRUE\"\n\
         sata0:0.present = \"TRUE\"\nsata0:0.fileName = \"vm.vmdk\"\n",
    )
    .unwrap();
    std::os::unix::fs::symlink(virtio_win(), fleet.path("virtio-win.iso")).unwrap();
    let [(_, list)] = blocks(&text, "yaml").try_into().expect("one list");
    fs::write(fleet.path("fleet.yaml"), &list).unwrap();
    for file in ["slurm.sh", "parallel.sh"] {
        fs::copy(docs().join(file), fleet.path(file)).unwrap();
        support::tool("sh", &["-n", fleet.path(file).to_str().unwrap()]);
    }
    let bin = fleet.path("bin");
    fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink(binary(), bin.join("hyper2kvm")).unwrap();
    for (name, body) in [
        ("podman", ""),
        (
            "kubectl",
            "case \"$*\" in *jsonpath*) echo SuccessCriteriaMet Complete;; esac",
        ),
        ("nomad", ""),
        ("srun", "exec \"$@\""),
        // The tasks of the array, one after the other.
        (
            "sbatch",
            "shift; for i in 0 1 2; do SLURM_ARRAY_TASK_ID=$i sh -e \"$@\" || exit; done",
        ),
    ] {
        let path = bin.join(name);
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        support::tool("chmod", &["+x", path.to_str().unwrap()]);
    }
    let scripts = blocks(&text, "sh");
    assert!(scripts.len() >= 8, "{scripts:?}");
    for (_, script) in scripts {
        let mut command = Command::new("sh");
        let path = std::env::var("PATH").unwrap();
        command
            .args(["-e", "-c", &script])
            .current_dir(fleet.dir.path())
            .env("PATH", format!("{}:{path}", bin.display()));
        let run = finish(command);
        assert_eq!(run.code, 0, "{script}\n{}{}", run.stdout, run.stderr);
    }
    // xargs alone, where parallel is not installed; it is given everything to do.
    fs::remove_dir_all(fleet.path("converted")).unwrap();
    let mut command = Command::new("sh");
    let needed = ["sh", "seq", "xargs", "qemu-img", "qemu-storage-daemon"];
    for name in needed {
        let real = hyper2kvm::tool::find(name).unwrap();
        std::os::unix::fs::symlink(real, bin.join(name)).unwrap();
    }
    command
        .args(["parallel.sh", "fleet.yaml", "3", "2"])
        .current_dir(fleet.dir.path())
        .env("PATH", &bin);
    finish(command).expect(0);
    for name in ["vm", "web01", "web02"] {
        assert!(
            fleet
                .path(&format!("converted/{name}-kvm/report.json"))
                .exists(),
            "{name}"
        );
    }
}

#[test]
fn kubernetes_manifests() {
    let manifest = docs().join("kubernetes.yaml");
    let text = fs::read_to_string(&manifest).unwrap();
    let documents: Vec<Value> = serde_yaml::from_multiple(&text).unwrap();
    let of = |kind: &str| documents.iter().find(|d| d["kind"] == kind).expect(kind);

    // The restricted profile, and more than that.
    let job = &of("Job")["spec"];
    let pod = &job["template"]["spec"];
    let container = &pod["containers"][0];
    for (value, wanted) in [
        (&job["completionMode"], "Indexed".into()),
        (&pod["securityContext"]["runAsNonRoot"], Value::Bool(true)),
        (
            &pod["securityContext"]["seccompProfile"]["type"],
            "RuntimeDefault".into(),
        ),
        (&pod["automountServiceAccountToken"], Value::Bool(false)),
        (
            &container["terminationMessagePolicy"],
            "FallbackToLogsOnError".into(),
        ),
        (
            &container["securityContext"]["allowPrivilegeEscalation"],
            Value::Bool(false),
        ),
        (
            &container["securityContext"]["readOnlyRootFilesystem"],
            Value::Bool(true),
        ),
        (
            &container["securityContext"]["capabilities"]["drop"][0],
            "ALL".into(),
        ),
    ] {
        assert_eq!(*value, wanted);
    }
    assert!(!text.contains("hostPath") && !text.contains("/dev/"));

    // The list in it is one, with as many VMs as there are completions.
    let dir = tempfile::tempdir().unwrap();
    let list = of("ConfigMap")["data"]["fleet.yaml"].as_str().unwrap();
    let path = dir.path().join("fleet.yaml");
    fs::write(&path, list).unwrap();
    let line = [
        "convert",
        "--batch",
        path.to_str().unwrap(),
        "--dry-run",
        "--json",
    ];
    let machines = job["completions"].as_u64().unwrap();
    let report = h2k(line)
        .expect(100 + i32::try_from(machines).unwrap())
        .json();
    assert_eq!(report["counts"]["failed"], machines);

    // By a validator of others, which must find a fault when there is one.
    let installed = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target/kubernetes-validate/bin/kubernetes-validate");
    // `.ci/run` on another host may have left it without the Python it needs.
    let works = |path: &PathBuf| {
        Command::new(path)
            .arg("--version")
            .output()
            .is_ok_and(|out| out.status.success())
    };
    let installed = Some(installed).filter(works);
    let Some(validator) = installed.or_else(|| hyper2kvm::tool::find("kubernetes-validate")) else {
        return support::skip(
            "kubernetes-validate",
            "no kubernetes-validate (pip install kubernetes-validate)",
        );
    };
    let validate = |version: &str, file: &Path| {
        let mut command = Command::new(&validator);
        command.args(["--strict", "-k", version]).arg(file);
        finish(command)
    };
    for version in ["1.29", "1.37"] {
        let run = validate(version, &manifest);
        assert_eq!(run.code, 0, "{version}: {}{}", run.stdout, run.stderr);
    }
    let wrong = dir.path().join("wrong.yaml");
    fs::write(&wrong, text.replace("runAsNonRoot", "runAsNonRoots")).unwrap();
    assert_ne!(validate("1.37", &wrong).code, 0);
}

/// The image has what the program needs, and nothing that asks for privileges.
#[test]
fn the_container_image() {
    let text = fs::read_to_string(docs().join("Containerfile")).unwrap();
    let steps: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
    let steps = steps.join("\n");
    for tool in host::TOOLS.iter().filter(|t| t.required) {
        // libntfs-3g89 for `ntfs-3g`: the library is enough where nobody makes demonstration guests.
        let package = match tool.name {
            // In the backports that the image takes QEMU from.
            "qemu-storage-daemon" => "qemu-utils",
            _ => tool.package(PackageManager::Apt),
        };
        assert!(steps.contains(package), "{}: {package}", tool.name);
    }
    let user = steps.lines().find_map(|l| l.strip_prefix("USER ")).unwrap();
    let id: u32 = user.split(':').next().unwrap().parse().expect("a number");
    assert_ne!(id, 0);
    let kubernetes = fs::read_to_string(docs().join("kubernetes.yaml")).unwrap();
    assert!(kubernetes.contains(&format!("runAsUser: {id}\n")));
    let cargo =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    let oldest = cargo
        .lines()
        .find_map(|l| l.strip_prefix("rust-version = "))
        .unwrap();
    assert!(
        text.contains(&format!("rust:{}-", oldest.trim_matches('"'))),
        "{oldest}"
    );
}
