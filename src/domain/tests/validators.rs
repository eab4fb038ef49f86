//! libvirt's own tools validate every document.

use super::*;

/// Runs a validator; prints that it is missing, or fails if tools are required.
fn validator(program: &str, args: &[&str]) -> Option<(bool, String)> {
    #[allow(clippy::disallowed_methods)]
    let output = std::process::Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(std::process::Stdio::null())
        .output();
    match output {
        Ok(output) => {
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.push_str(&String::from_utf8_lossy(&output.stderr));
            Some((output.status.success(), text))
        }
        Err(error) => {
            skip(program, format!("{program}: {error}"));
            None
        }
    }
}

fn write_all(dir: &Path, cases: &[Case]) -> Vec<PathBuf> {
    cases
        .iter()
        .enumerate()
        .map(|(n, case)| {
            let path = dir.join(format!("{n}.xml"));
            std::fs::write(&path, &case.xml).unwrap();
            path
        })
        .collect()
}

/// Portable and unusual VMs, in addition to the matrix.
fn oddities() -> Vec<Case> {
    let mut list = Vec::new();
    let mut uuid = 0x1000;
    let mut add = |label: &str, m: Machine, choice: FirmwareChoice| {
        uuid += 1;
        for stage in [Stage::Bootstrap, Stage::Final] {
            if stage == Stage::Bootstrap && m.bootstrap.is_none() {
                continue;
            }
            let mut m = m.clone();
            m.name = label.into();
            m.uuid = Uuid::from_u128(uuid);
            let xml = to_xml(&m, stage, &choice).unwrap();
            list.push(Case {
                label: format!("{label} {stage:?}"),
                root: Element::parse(xml.as_bytes()).unwrap(),
                machine: m,
                stage,
                xml,
            });
        }
    };
    let mut m = machine();
    m.firmware = SECURE;
    m.tpm = true;
    add(
        "portable",
        m.clone(),
        FirmwareChoice::Portable { secure_boot: true },
    );
    m.nvram = None;
    m.firmware = UEFI;
    add(
        "portable-no-nvram",
        m,
        FirmwareChoice::Portable { secure_boot: false },
    );
    let mut m = machine();
    m.bootstrap = Some(DiskBus::Ide);
    (m.firmware, m.nvram) = (BIOS, None);
    m.serial_log = Some("/vm/com1.log".into());
    m.graphics = Graphics::None;
    add("ide", m.clone(), FirmwareChoice::Bios);
    m.graphics = Graphics::Spice;
    m.video = Video::Qxl;
    add("spice", m, FirmwareChoice::Bios);
    let mut m = machine();
    m.graphics = Graphics::Spice;
    m.video = Video::Virtio;
    m.disks
        .extend((0..16).map(|n| disk(&format!("/d{n}"), false)));
    add("many-blk", m.clone(), images(UEFI));
    m.bus = DiskBus::VirtioScsi;
    add("many-scsi", m, images(UEFI));
    let mut m = machine();
    m.bootstrap = None;
    m.disks[0].sector_size = 4096;
    m.name = "4kn".into();
    add("4kn", m.clone(), images(UEFI));
    m.disks[0].sector_size = 512;
    windows(&mut m).major = 5;
    m.bootstrap = Some(DiskBus::Sata);
    (m.firmware, m.nvram) = (BIOS, None);
    add("nt5-on-sata", m, FirmwareChoice::Bios);
    let mut m = machine();
    m.system = System::Linux {
        arch: Arch::Amd64,
        osinfo_id: None,
    };
    (m.bootstrap, m.probe, m.driver_iso) = (None, None, None);
    m.bus = DiskBus::Sata;
    m.disks = (0..8)
        .map(|i| disk(&format!("/vm/{i}.qcow2"), i == 0))
        .collect();
    m.name = "linux-sata".into();
    add("linux-sata", m, images(UEFI));
    list
}

/// The schema of this host's libvirt accepts every document.
#[test]
fn schema_accepts_every_domain() {
    let dir = tempfile::tempdir().unwrap();
    let cases: Vec<Case> = matrix().into_iter().chain(oddities()).collect();
    let files = write_all(dir.path(), &cases);
    let names: Vec<&str> = files.iter().map(|f| f.to_str().unwrap()).collect();
    // virt-xml-validate accepts one file per run, so a few use it and all use xmllint, which it
    // calls.
    if validator("xmllint", &["--version"]).is_none() {
        return;
    }
    for index in [0, 5, cases.len() - 1] {
        let Some((ok, text)) = validator("virt-xml-validate", &[names[index], "domain"]) else {
            return;
        };
        assert!(ok, "{}\n{text}", cases[index].label);
    }
    let schema = "/usr/share/libvirt/schemas/domain.rng";
    let args: Vec<&str> = ["--noout", "--relaxng", schema]
        .into_iter()
        .chain(names)
        .collect();
    if let Some((ok, text)) = validator("xmllint", &args) {
        let bad: Vec<&str> = text
            .lines()
            .filter(|l| !l.ends_with(" validates"))
            .collect();
        assert!(ok, "{}", bad.join("\n"));
    }
}

const NOBODY: u32 = 65534;

/// A real libvirt with its QEMU driver defines every document. It adds no PCI device and moves
/// none, and accepts the final stage over the bootstrap of the same name and UUID.
#[test]
fn libvirt_defines_every_domain() {
    let dir = tempfile::tempdir().unwrap();
    let mut cases: Vec<Case> = matrix()
        .into_iter()
        .chain(oddities())
        // Debian's QEMU, for one, is built without Spice in its main package.
        .filter(|case| case.machine.graphics != Graphics::Spice)
        .collect();
    if std::env::var_os("HYPER2KVM_REQUIRE_TOOLS").is_none() {
        // A third suffices during development: one pair of stages in three.
        let mut n = 0;
        cases.retain(|case| {
            n += u32::from(case.stage == Stage::Bootstrap);
            n % 3 == 1 || !case.machine.name.starts_with('m')
        });
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let tpm = std::env::split_paths(&path).any(|dir| dir.join("swtpm_setup").exists());
    if !tpm {
        skip(
            "swtpm_setup",
            "swtpm_setup is missing: VMs are defined without their TPM",
        );
    }
    for case in &mut cases {
        // Build hosts lack KVM, and libvirt checks the domain type against the host.
        case.xml = case
            .xml
            .replace("<domain type=\"kvm\">", "<domain type=\"qemu\">")
            .replace(
                "mode=\"host-passthrough\" check=\"none\" migratable=\"on\"",
                "mode=\"maximum\"",
            );
        if let (false, Some((before, after))) = (tpm, case.xml.split_once("    <tpm ")) {
            let (_, after) = after.split_once("</tpm>\n").unwrap();
            case.xml = format!("{before}{after}");
        }
    }
    let files = write_all(dir.path(), &cases);
    let uri = format!("qemu:///embed?root={}", dir.path().join("root").display());
    let script: Vec<String> = files
        .iter()
        .zip(&cases)
        .map(|(file, case)| format!("define {}; dumpxml {}", file.display(), case.machine.name))
        .collect();
    let script = script.join("; ");
    let virsh = ["virsh", "-q", "-c", &uri, &script];
    // The user may not open /dev/kvm. If it exists and does not work, libvirt 9 queries QEMU again
    // for every document, for most of a minute.
    let validated = match rustix::process::geteuid().is_root() {
        true => {
            let home = format!("HOME={}", dir.path().display());
            let folders = ["CACHE_HOME", "CONFIG_HOME", "DATA_HOME", "RUNTIME_DIR"];
            let folders = folders.map(|name| format!("XDG_{name}={}/{name}", dir.path().display()));
            for path in files.iter().map(PathBuf::as_path).chain([dir.path()]) {
                std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
            }
            let id = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")];
            let mut args: Vec<&str> = id.iter().map(String::as_str).collect();
            args.extend(["--clear-groups", "env", &home]);
            args.extend(folders.iter().map(String::as_str));
            args.extend(virsh);
            validator("virsh", &["--version"]).and_then(|_| validator("setpriv", &args))
        }
        false => validator(virsh[0], &virsh[1..]),
    };
    let Some((ok, text)) = validated else {
        return;
    };
    let errors: Vec<&str> = text.lines().filter(|l| l.starts_with("error:")).collect();
    assert!(ok && errors.is_empty(), "{}", errors.join("\n"));
    let (documents, mut defined) = (text.split_inclusive("</domain>"), 0);
    let pci = |root: &Element| {
        let mut all: Vec<_> = root
            .descendants("address")
            .into_iter()
            .filter(|a| a.attr("type") == Some("pci") && a.attr("multifunction").is_none())
            .map(|a| a.attrs.clone())
            .collect();
        all.sort();
        all
    };
    for (case, document) in cases.iter().zip(documents) {
        let root = Element::parse(document.trim().as_bytes()).unwrap();
        assert_eq!(pci(&root), pci(&case.root), "{}", case.label);
        let want = case.machine.uuid.to_string();
        assert_eq!(root.text_of("uuid"), Some(want.as_str()), "{}", case.label);
        let mark = root.path("metadata/conversion").unwrap();
        assert_eq!(
            mark.attr("stage"),
            Some(case.stage.as_str()),
            "{}",
            case.label
        );
        defined += 1;
    }
    assert_eq!(defined, cases.len());
}
