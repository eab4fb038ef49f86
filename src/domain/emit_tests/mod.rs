//! The writers for targets other than libvirt, with their output parsed or executed.

#![allow(clippy::disallowed_methods)] // shells and a stand-in for qm

mod kubevirt_tests;
mod proxmox_tests;
mod qemu_tests;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::element::Element;
use super::emit::{Context, EmitError, relocated, warnings};
use super::firmware::FirmwareImages;
use super::model::Bridge;
use super::tests::machine;
use super::xml::to_element;
use super::*;

pub(super) use proxmox_tests::FakeQm;

/// A VM with two of everything, and with names that a shell would split.
pub(super) fn full() -> Machine {
    let mut m = machine();
    m.name = "Büro's $(touch /tmp/oops) VM".into();
    m.disks[0].path = "/vm/it's $HOME,x.qcow2".into();
    m.disks.push(Disk {
        path: "/dev/vg/data".into(),
        format: DiskFormat::Raw,
        serial: Some("h2k-1".into()),
        sector_size: 512,
        system: false,
        boot_order: None,
        size_bytes: 5 << 30,
        backing: Vec::new(),
    });
    m.nics.push(Nic {
        link_up: false,
        ..Nic::new(
            "00:0C:29:AA:BB:02".parse().unwrap(),
            NicSource::Bridge(Bridge::named("br0")),
        )
    });
    m.serial = Some("VMware-56 4d".into());
    m.genid = Some(uuid::Uuid::from_u128(7));
    m.tpm = true;
    m.drivers = Drivers {
        agent: true,
        balloon: true,
        rng: true,
        netkvm: false,
    };
    m
}

fn domains(m: &Machine) -> Vec<(Stage, Element)> {
    let firmware = match m.firmware {
        Firmware::Bios => FirmwareChoice::Bios,
        Firmware::Uefi { secure_boot } => FirmwareChoice::Images(FirmwareImages {
            code: "/fw/CODE.fd".into(),
            code_format: "raw".into(),
            vars: "/fw/VARS.fd".into(),
            vars_format: "raw".into(),
            secure_boot,
            smm: secure_boot,
        }),
    };
    let mut stages = vec![Stage::Bootstrap, Stage::Final];
    if m.bootstrap.is_none() {
        stages.remove(0);
    }
    stages
        .into_iter()
        .map(|stage| (stage, to_element(m, stage, &firmware).unwrap()))
        .collect()
}

/// The output directory of the VMs in these tests.
const FOLDER: &str = "/vm";

pub(super) fn documents(emit: Emit, m: &Machine, options: &kubevirt::Options) -> Vec<String> {
    let context = Context {
        folder: Path::new(FOLDER),
        kubevirt: options,
    };
    let list = super::emit::documents(emit, m, &domains(m), context).unwrap();
    list.into_iter().map(|d| d.text).collect()
}

fn texts(emit: Emit, m: &Machine) -> Vec<String> {
    documents(emit, m, &kubevirt::Options::default())
}

/// Writes the script to a directory of its own, with a name that a shell would split.
fn place(script: &str, dir: &Path) -> std::path::PathBuf {
    let folder = dir.join("it's $HOME");
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join("script.sh");
    fs::write(&file, script).unwrap();
    file
}

fn sh(script: &str, args: &[&str], path: Option<&Path>) -> (bool, String) {
    let dir = tempfile::tempdir().unwrap();
    run_file(&place(script, dir.path()), args, path)
}

fn run_file(file: &Path, args: &[&str], path: Option<&Path>) -> (bool, String) {
    let mut command = Command::new("sh");
    if args == ["-n"] {
        command.arg("-n").arg(file);
    } else {
        command.arg(file).args(args);
    }
    if let Some(path) = path {
        let rest = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{rest}", path.display()));
    }
    let out = command.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    (
        out.status.success(),
        text + &String::from_utf8_lossy(&out.stderr),
    )
}

pub(super) fn yaml(text: &str) -> Vec<Value> {
    serde_yaml::from_multiple(text).unwrap()
}

/// Disks that have moved are named by their new path in every format.
#[test]
fn relocated_files_are_named_where_they_are() {
    let mut m = full();
    m.nvram = Some("/vm/x-nvram.fd".into());
    for disk in ["/vm/a.qcow2", "/vm/it's $HOME.qcow2"] {
        m.disks[0].path = disk.into();
        let name = disk.rsplit_once('/').unwrap().1;
        for emit in [Emit::Proxmox, Emit::Qemu, Emit::Kubevirt] {
            for text in texts(emit, &m) {
                if !text.contains("image-path") && emit == Emit::Kubevirt {
                    continue;
                }
                let to = Path::new("/pool/b.qcow2");
                let moved = relocated(&text, name, to);
                assert!(moved.contains("/pool/b.qcow2"), "{emit:?}\n{moved}");
                let quoted = crate::text::in_single_quotes(name);
                assert!(!moved.contains(&quoted), "{emit:?} {name}\n{moved}");
            }
        }
    }
    // The new path may need quotes of its own.
    m.disks[0].path = "/vm/a.qcow2".into();
    let text = texts(Emit::Qemu, &m).pop().unwrap();
    let moved = relocated(&text, "a.qcow2", Path::new("/pool/it's b.qcow2"));
    let name = r#""filename":"/pool/it'\''s b.qcow2""#;
    assert!(moved.contains(name), "{moved}");
    assert!(sh(&moved, &["-n"], None).0, "{moved}");
}

/// A name that has lost characters is distinguished from others that lost the same.
#[test]
fn two_networks_have_two_names() {
    let mut m = machine();
    let networks = [
        "生产",
        "测试",
        "LAN_1",
        "LAN-1",
        "lan 1",
        "VM Network",
        "br1",
    ];
    let mut nics: Vec<Nic> = networks
        .iter()
        .enumerate()
        .map(|(n, network)| Nic {
            network: Some((*network).to_owned()),
            ..Nic::new(MacAddr::qemu([0, 1, n as u8]), NicSource::User)
        })
        .collect();
    let bridges = [
        ("br_0", None),
        ("br-0", None),
        ("br1", None),
        ("br1", Some(5)),
        ("br1-vlan5", None),
    ];
    for (n, (name, vlan)) in bridges.into_iter().enumerate() {
        let bridge = Bridge {
            vlan,
            ..Bridge::named(name)
        };
        let mac = MacAddr::qemu([0, 2, n as u8]);
        nics.push(Nic::new(mac, NicSource::Bridge(bridge)));
    }
    // The first one is in the network of the pods.
    m.nics = vec![Nic::new(MacAddr::qemu([0, 0, 0]), NicSource::User)];
    m.nics.extend(nics);
    let documents = yaml(&texts(Emit::Kubevirt, &m)[1]);
    let spec = &documents.last().unwrap()["spec"]["template"]["spec"];
    let list = spec["networks"].as_array().unwrap();
    let names: Vec<&str> = list
        .iter()
        .filter_map(|n| n["multus"]["networkName"].as_str())
        .collect();
    let distinct: std::collections::BTreeSet<&&str> = names.iter().collect();
    assert_eq!((names.len(), distinct.len()), (12, 12), "{names:?}");
    assert_eq!(names[3], "lan-1");
    assert_eq!((names[5], names[9]), ("vm-network", "br1"));
    assert!(names[0].starts_with("vm-") && names[2].starts_with("lan-1-"));
    for (n, name) in names.into_iter().enumerate() {
        assert!(name.len() <= 63 && kubevirt::object_name(name) == name);
        // Bridges are included.
        let definition = documents.iter().any(|d| d["metadata"]["name"] == *name);
        assert_eq!(definition, n >= 7, "{name}");
    }
}

/// A command to paste has each network as one word of the shell, whatever its name.
#[test]
fn networks_in_commands_are_quoted() {
    let mut m = machine();
    let nic = |n| Nic {
        network: Some("Bob's $(LAN)".to_owned()),
        ..Nic::new(MacAddr::qemu([0, 0, n]), NicSource::User)
    };
    m.nics = vec![nic(1), nic(2)];
    for (emit, want) in [
        (
            Emit::Kubevirt,
            r"--network-map 'Bob'\''s $(LAN)=nad:NAMESPACE/NAME' names",
        ),
        (
            Emit::Proxmox,
            r"--network-map 'Bob'\''s $(LAN)=pve:BRIDGE[@VLAN]' names",
        ),
    ] {
        let said = warnings(emit, &m);
        assert!(said.iter().any(|w| w.contains(want)), "{said:?}");
    }
}

/// QEMU on this host opens the chain; the other targets get one file.
#[test]
fn a_disk_that_needs_its_source_is_named_to_those_who_copy_it() {
    for (emit, named) in [
        (Emit::Kubevirt, true),
        (Emit::Proxmox, true),
        (Emit::Qemu, false),
    ] {
        let mut m = full();
        let says = |m: &Machine| {
            warnings(emit, m)
                .iter()
                .any(|w| w.contains("hyper2kvm pull"))
        };
        assert!(!says(&m), "{emit:?}");
        // Whichever disk it is.
        for n in [1, 0] {
            m.disks[n].backing.push(Backing {
                path: "/src/a.vmdk".into(),
                format: "vmdk".into(),
                socket: false,
            });
            assert_eq!(says(&m), named, "{emit:?} {n}");
        }
    }
}

/// Two NICs on one bridge and two on one network: each is named as often as it needs to be.
#[test]
fn nics_that_share_a_network_are_told_as_one_network() {
    let mut m = machine();
    let bridge = || {
        NicSource::Bridge(Bridge {
            vlan: Some(7),
            ..Bridge::named("br0")
        })
    };
    let nic = |n, source| Nic::new(MacAddr::qemu([0, 0, n]), source);
    let office = || NicSource::Network("office".into());
    m.nics = vec![
        nic(1, office()),
        nic(2, bridge()),
        nic(3, bridge()),
        nic(4, office()),
    ];
    let documents = yaml(&texts(Emit::Kubevirt, &m)[1]);
    let named = |d: &&Value| d["kind"] == "NetworkAttachmentDefinition";
    let definitions: Vec<_> = documents.iter().filter(named).collect();
    assert_eq!(definitions.len(), 1, "{definitions:?}");
    let spec = &documents.last().unwrap()["spec"]["template"]["spec"];
    let networks: Vec<_> = (spec["networks"].as_array().unwrap().iter())
        .map(|n| n["multus"]["networkName"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(networks, ["office", "br0-vlan7", "br0-vlan7", "office"]);
    let said = warnings(Emit::Qemu, &m);
    let vlan = |w: &&String| w.contains("connects to br0 without VLAN 7");
    assert_eq!(said.iter().filter(vlan).count(), 2, "{said:?}");
    let map = ["a=net:x", "a=pve:vmbr0", "b=none"].map(|text| text.parse().unwrap());
    let map = NetworkMap::new(map.to_vec()).unwrap();
    assert_eq!(map.unused(&[]), ["a", "b"]);
}

#[test]
fn scripts_are_run_and_documents_are_read() {
    let m = full();
    for (emit, script, suffixes) in [
        (Emit::Proxmox, true, &["-proxmox.sh"][..]),
        (
            Emit::Kubevirt,
            false,
            &["-kubevirt-bootstrap.yaml", "-kubevirt-final.yaml"],
        ),
        (Emit::Qemu, true, &["-qemu-bootstrap.sh", "-qemu-final.sh"]),
    ] {
        let context = Context {
            folder: Path::new(FOLDER),
            kubevirt: &kubevirt::Options::default(),
        };
        let mut m = m.clone();
        m.disks[0].path = "/vm/a.qcow2".into();
        let list = super::emit::documents(emit, &m, &domains(&m), context).unwrap();
        let found: Vec<_> = list.iter().map(|d| (&*d.suffix, d.script)).collect();
        let expected: Vec<_> = suffixes.iter().map(|suffix| (*suffix, script)).collect();
        assert_eq!(found, expected);
        for document in &list {
            let file = format!("/vm/x{}", document.suffix);
            assert_eq!(Emit::of_file(Path::new(&file)).map(|(e, _)| e), Some(emit));
        }
    }
}
