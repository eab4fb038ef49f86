//! The writers for others than libvirt, read back or run.

#![allow(clippy::disallowed_methods)] // shells and a stand-in for qm

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

/// A machine with two of everything, and names that a shell would take apart.
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
    if m.bootstrap == Bootstrap::None {
        stages.remove(0);
    }
    stages
        .into_iter()
        .map(|stage| (stage, to_element(m, stage, &firmware).unwrap()))
        .collect()
}

/// The output directory of the machines here.
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

/// Writes the script into a directory of its own, with a name that a shell would take apart.
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

// ---- KubeVirt ----

pub(super) fn yaml(text: &str) -> Vec<Value> {
    use serde::Deserialize;
    serde_yaml::Deserializer::from_str(text)
        .map(|d| Value::deserialize(d).unwrap())
        .collect()
}

#[test]
fn kubevirt_field_by_field() {
    let m = full();
    let texts = texts(Emit::Kubevirt, &m);
    let [first, last] = texts.as_slice() else {
        panic!("{}", texts.len())
    };
    for text in [first, last] {
        let documents = yaml(text);
        assert_eq!(documents.len(), 4, "{text}");
        for (n, (document, size)) in documents.iter().zip([1u64 << 30, 5 << 30]).enumerate() {
            assert_eq!(
                *document,
                json!({
                    "apiVersion": "cdi.kubevirt.io/v1beta1",
                    "kind": "DataVolume",
                    "metadata": {
                        "name": format!("b-ro-s---touch--tmp-oops--vm-disk-{n}"),
                        "annotations": {"cdi.kubevirt.io/storage.bind.immediate.requested": "true"},
                    },
                    "spec": {
                        "source": {"upload": {}},
                        "storage": {"resources": {"requests": {"storage": size.to_string()}}},
                    },
                })
            );
        }
        let bridge = &documents[2];
        assert_eq!(bridge["kind"], "NetworkAttachmentDefinition");
        assert_eq!(bridge["metadata"], json!({"name": "br0"}));
        let config: Value =
            serde_json::from_str(bridge["spec"]["config"].as_str().unwrap()).unwrap();
        assert_eq!(
            (&config["type"], &config["bridge"]),
            (&json!("bridge"), &json!("br0"))
        );
        assert!(
            !text.contains("containerDisk"),
            "the drivers are on the disk"
        );
    }
    let vm = &yaml(last)[3];
    let domain = &vm["spec"]["template"]["spec"]["domain"];
    for (at, want) in [
        ("/apiVersion", json!("kubevirt.io/v1")),
        ("/kind", json!("VirtualMachine")),
        ("/metadata/name", json!("b-ro-s---touch--tmp-oops--vm")),
        ("/spec/runStrategy", json!("Manual")),
        (
            "/spec/template/spec/networks",
            json!([
                {"name": "net-0", "pod": {}},
                {"name": "net-1", "multus": {"networkName": "br0"}},
            ]),
        ),
        (
            "/spec/template/spec/volumes",
            json!([
                {"name": "disk-0", "dataVolume": {"name": "b-ro-s---touch--tmp-oops--vm-disk-0"}},
                {"name": "disk-1", "dataVolume": {"name": "b-ro-s---touch--tmp-oops--vm-disk-1"}},
            ]),
        ),
    ] {
        assert_eq!(vm.pointer(at), Some(&want), "{at}");
    }
    for (at, want) in [
        ("/machine/type", json!("q35")),
        (
            "/cpu",
            json!({"sockets": 1, "cores": 4, "threads": 1, "model": "host-passthrough"}),
        ),
        ("/memory/guest", json!("4096Mi")),
        (
            "/firmware",
            json!({
                "uuid": m.uuid.to_string(),
                "serial": "VMware-56 4d",
                "bootloader": {"efi": {"secureBoot": false, "persistent": true}},
            }),
        ),
        ("/features/hyperv/spinlocks/spinlocks", json!(8191)),
        ("/features/hyperv/synictimer/direct", json!({})),
        ("/features/smm", Value::Null),
        ("/clock/timer/hpet/present", json!(false)),
        ("/devices/tpm/persistent", json!(true)),
        ("/devices/rng", json!({})),
        (
            "/devices/disks",
            json!([
                {"name": "disk-0", "disk": {"bus": "virtio"}, "cache": "none", "bootOrder": 1, "serial": "h2k-0"},
                {"name": "disk-1", "disk": {"bus": "virtio"}, "cache": "none", "serial": "h2k-1"},
            ]),
        ),
        (
            "/devices/interfaces",
            json!([
                {"name": "net-0", "model": "virtio", "macAddress": "00:0c:29:aa:bb:01", "masquerade": {}},
                {"name": "net-1", "model": "virtio", "macAddress": "00:0c:29:aa:bb:02", "state": "down", "bridge": {}},
            ]),
        ),
    ] {
        assert_eq!(domain.pointer(at).unwrap_or(&Value::Null), &want, "{at}");
    }
    // The first boot: SATA, a VirtIO probe, the drivers, a NIC Windows knows; else the same machine.
    let mut boot = yaml(first).remove(3);
    let devices = boot
        .pointer_mut("/spec/template/spec/domain/devices")
        .unwrap();
    let disks: Vec<_> = devices["disks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| {
            let bus = d.pointer("/disk/bus").or(d.pointer("/cdrom/bus")).unwrap();
            format!("{} {}", d["name"].as_str().unwrap(), bus.as_str().unwrap())
        })
        .collect();
    assert_eq!(disks, ["disk-0 sata", "disk-1 sata", "probe virtio"]);
    assert_eq!(devices["interfaces"][0]["model"], "e1000e");
    let mut vm = vm.clone();
    for document in [&mut boot, &mut vm] {
        *document.pointer_mut("/metadata/labels").unwrap() = Value::Null;
        *document.pointer_mut("/spec/template/spec/volumes").unwrap() = Value::Null;
        let devices = document
            .pointer_mut("/spec/template/spec/domain/devices")
            .unwrap();
        devices["disks"] = Value::Null;
        for nic in devices["interfaces"].as_array_mut().unwrap() {
            nic["model"] = Value::Null;
        }
    }
    assert_eq!(boot, vm);
}

#[test]
fn kubevirt_by_kind_of_machine() {
    let mut m = machine();
    m.firmware = Firmware::Uefi { secure_boot: true };
    m.bus = StorageBus::VirtioScsi;
    m.nics[0].source = NicSource::Network("vlan7".into());
    let vm = yaml(&texts(Emit::Kubevirt, &m)[1]).remove(1);
    let domain = &vm["spec"]["template"]["spec"]["domain"];
    assert_eq!(domain["features"]["smm"]["enabled"], true);
    assert_eq!(domain["firmware"]["bootloader"]["efi"]["secureBoot"], true);
    assert_eq!(domain["devices"]["disks"][0]["disk"]["bus"], "scsi");
    let networks = &vm["spec"]["template"]["spec"]["networks"];
    assert_eq!(networks[0]["multus"]["networkName"], "vlan7");
    m.firmware = Firmware::Bios;
    m.bootstrap = Bootstrap::Ide;
    let context = Context {
        folder: Path::new(FOLDER),
        kubevirt: &kubevirt::Options::default(),
    };
    let error = kubevirt::yaml(&m, Stage::Final, context.folder, context.kubevirt).unwrap_err();
    assert!(matches!(error, EmitError::Missing { .. }), "{error}");
}

#[test]
fn kubevirt_says_the_steps_in_their_order() {
    let m = full();
    let options = kubevirt::Options {
        namespace: Some("prod".into()),
        ..kubevirt::Options::default()
    };
    let texts = documents(Emit::Kubevirt, &m, &options);
    let steps = |text: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|l| l.strip_prefix("#   "));
        lines
            .filter_map(|l| l.split(" -n prod ").nth(1))
            .map(|l| l.split(' ').next().unwrap().to_owned())
            .collect()
    };
    assert_eq!(
        steps(&texts[0]),
        [
            "apply",
            "image-upload",
            "image-upload",
            "start",
            "console",
            "stop",
            "apply",
            "start"
        ]
    );
    assert_eq!(steps(&texts[1]), ["apply", "start"]);
    // The disk of the directory by its name alone, a device by its path.
    for image in [
        r"--image-path='it'\''s $HOME,x.qcow2'",
        "--image-path='/dev/vg/data'",
    ] {
        assert!(texts[0].contains(image), "{image}\n{}", texts[0]);
    }
    assert!(texts[0].contains("first boot finished"));
    for text in &texts {
        for document in yaml(text) {
            assert_eq!(document["metadata"]["namespace"], "prod", "{document}");
        }
    }
}

#[test]
fn kubevirt_takes_what_the_cluster_offers() {
    let m = machine();
    let options = kubevirt::Options {
        namespace: None,
        storage_class: Some("ceph.rbd".into()),
        access_mode: Some("ReadWriteMany"),
        instance_type: Some("u1.large".parse().unwrap()),
        preference: Some("namespaced/windows.11".parse().unwrap()),
    };
    let documents = yaml(&documents(Emit::Kubevirt, &m, &options)[1]);
    let storage = &documents[0]["spec"]["storage"];
    assert_eq!(storage["storageClassName"], "ceph.rbd");
    assert_eq!(storage["accessModes"], json!(["ReadWriteMany"]));
    let spec = &documents[1]["spec"];
    assert_eq!(
        spec["instancetype"],
        json!({"name": "u1.large", "kind": "VirtualMachineClusterInstancetype"})
    );
    assert_eq!(
        spec["preference"],
        json!({"name": "windows.11", "kind": "VirtualMachinePreference"})
    );
    let domain = &spec["template"]["spec"]["domain"];
    assert!(domain.get("cpu").is_none() && domain.get("memory").is_none());
    for wrong in ["", "U1", "a/b", "namespaced/", "-x"] {
        assert!(wrong.parse::<kubevirt::Reference>().is_err(), "{wrong}");
    }
}

/// NICs of every kind: what they are attached to, and what is said of them.
#[test]
fn kubevirt_networks_follow_the_map() {
    let mut m = machine();
    let map = [
        "prod=nad:net/prod",
        "dmz=br:br1@7",
        "lan=net:lan",
        "off=none",
    ];
    let map = NetworkMap::new(map.iter().map(|m| m.parse().unwrap()).collect()).unwrap();
    m.nics = [
        Some("prod"),
        None,
        Some("dmz"),
        Some("lan"),
        Some("VM Network"),
        Some("off"),
    ]
    .into_iter()
    .enumerate()
    .map(|(n, network)| {
        let mut nic = Nic {
            network: network.map(str::to_owned),
            keeps_address: true,
            ..Nic::new(
                MacAddr::qemu([0, 0, n as u8]),
                NicSource::Network("default".into()),
            )
        };
        map.apply(&mut nic);
        nic
    })
    .collect();
    let documents = yaml(&texts(Emit::Kubevirt, &m)[1]);
    let spec = &documents.last().unwrap()["spec"]["template"]["spec"];
    assert_eq!(
        spec["networks"],
        json!([
            {"name": "net-0", "multus": {"networkName": "net/prod"}},
            {"name": "net-1", "pod": {}},
            {"name": "net-2", "multus": {"networkName": "br1-vlan7"}},
            {"name": "net-3", "multus": {"networkName": "lan"}},
            {"name": "net-4", "multus": {"networkName": "vm-network"}},
            {"name": "net-5", "multus": {"networkName": "off"}},
        ])
    );
    assert_eq!(spec["domain"]["devices"]["interfaces"][5]["state"], "down");
    assert_eq!(documents[1]["metadata"]["name"], "br1-vlan7");
    let config = documents[1]["spec"]["config"].as_str().unwrap();
    assert!(config.contains("\"vlan\":7"), "{config}");
    let said = warnings(Emit::Kubevirt, &m);
    for (n, want) in [
        (2, "static address"),
        (4, "lan, which must exist"),
        (5, "--network-map 'VM Network=nad:"),
        (6, "off, which must exist"),
    ] {
        let found = said
            .iter()
            .any(|w| w.starts_with(&format!("KubeVirt: NIC {n} ")) && w.contains(want));
        assert!(found, "NIC {n}: {want}\n{said:#?}");
    }
    assert_eq!(said.len(), 4, "{said:#?}");
}

// ---- Proxmox ----

/// A stand-in for `qm`: it keeps the options of a VM as Proxmox shows them, records its arguments, and
/// refuses options that `qm create` and `qm set` of Proxmox VE 8 do not have.
const QM: &str = r#"#!/bin/sh
state=$(dirname "$0")
for a in "$@"; do printf '[%s]' "$a" >>"$state/calls"; done; echo >>"$state/calls"
if [ -e "$state/fail" ] && [ "$(grep -c . "$state/calls")" -ge "$(cat "$state/fail")" ]; then exit 1; fi
verb=$1; shift; vmid=$1; shift
conf=$state/$vmid.conf
drive() { # NAME VALUE: the properties a drive may have on its bus
  case $1 in virtio* | scsi*) threads=iothread ;; *) threads= ;; esac
  echo "$2" | tr ',' '\n' | sed -n 's/=.*//p' | while read -r key; do
    case $key in
      import-from | discard | serial | media | cache | ssd | $threads) ;;
      *) echo "$1: no property $key" >&2; exit 255 ;;
    esac
  done
}
net() {
  echo "$2" | tr ',' '\n' | sed -n 's/=.*//p' | while read -r key; do
    case $key in
      virtio | e1000 | e1000e | rtl8139 | bridge | tag | link_down | firewall | mtu) ;;
      *) echo "$1: no property $key" >&2; exit 255 ;;
    esac
  done
}
case $verb in
  config) cat "$conf" ;;
  status) cat "$state/status" 2>/dev/null || echo 'status: stopped' ;;
  listsnapshot)
    for s in "$state/$vmid".snap.*; do [ -e "$s" ] && echo "\`-> ${s##*.snap.}  2026-01-01 00:00:00"; done
    echo '`-> current  You are here!' ;;
  snapshot) [ ! -e "$state/no-snapshots" ] && cp "$conf" "$conf.snap"; mv "$conf.snap" "$state/$vmid.snap.$1" ;;
  rollback) cp "$state/$vmid.snap.$1" "$conf" ;;
  unlink) sed -i "/^$2:/d" "$conf" ;;
  create | set)
    if [ $verb = create ]; then [ -e "$conf" ] && exit 255; : >"$conf"; fi
    while [ $# -gt 0 ]; do
      key=${1#--}; value=$2; shift 2
      case $key in
        virtio[0-9]* | scsi[0-9]* | sata[0-5] | ide[0-3]) drive "$key" "$value" || exit 255 ;;
        net[0-9]*) net "$key" "$value" || exit 255 ;;
        name | ostype | machine | memory | sockets | cores | cpu | kvm | smbios1 | localtime | agent) ;;
        serial0 | tablet | balloon | vga | vmgenid | rng0 | bios | efidisk0 | tpmstate0 | scsihw) ;;
        boot | delete) ;;
        *) echo "Unknown option: $key" >&2; exit 255 ;;
      esac
      if [ "$key" = delete ]; then
        sed -i "s/^$value: \([^,]*\).*/unused0: \1/" "$conf"; continue
      fi
      case $value in *:0,import-from=*) value="${value%%:*}:vm-$vmid-disk-$key,${value#*,*,}" ;; esac
      case $value in *:vm-*) sed -i "/^unused0:/d" "$conf" ;; esac
      sed -i "/^$key:/d" "$conf"
      echo "$key: $value" >>"$conf"
    done ;;
  *) exit 9 ;;
esac
"#;

pub(super) struct FakeQm {
    dir: tempfile::TempDir,
    script: std::path::PathBuf,
}

impl FakeQm {
    pub(super) fn new(m: &Machine) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let qm = dir.path().join("qm");
        fs::write(&qm, QM).unwrap();
        let pvesh = dir.path().join("pvesh");
        fs::write(
            &pvesh,
            "#!/bin/sh\n[ \"$*\" = 'get /cluster/nextid' ] && echo 123\n",
        )
        .unwrap();
        for program in [&qm, &pvesh] {
            fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let script = place(&texts(Emit::Proxmox, m)[0], dir.path());
        Self { dir, script }
    }

    pub(super) fn run(&self, args: &[&str]) -> (bool, String) {
        run_file(&self.script, args, Some(self.dir.path()))
    }

    /// Where the script and the disks lie.
    fn folder(&self) -> String {
        self.script.parent().unwrap().display().to_string()
    }

    fn config(&self) -> BTreeSet<String> {
        let text = fs::read_to_string(self.dir.path().join("100.conf")).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    pub(super) fn calls(&self) -> String {
        fs::read_to_string(self.dir.path().join("calls")).unwrap()
    }
}

fn lines(list: &[&str]) -> BTreeSet<String> {
    list.iter().map(|l| (*l).to_owned()).collect()
}

#[test]
fn proxmox_script_creates_and_switches() {
    let mut m = full();
    m.disks[0].path = "/vm/it's $HOME.qcow2".into();
    let qm = FakeQm::new(&m);
    assert!(qm.run(&["-n"]).0);
    let (ok, text) = qm.run(&["bootstrap", "100", "zfs"]);
    assert!(ok, "{text}");
    assert!(text.contains("qm terminal 100"), "{text}");
    // Whatever is in a name or path stays one argument, and the disk is looked for beside the script.
    assert!(
        qm.calls().contains(&format!(
            "[zfs:0,import-from={}/it's $HOME.qcow2,discard=on,serial=h2k-0]",
            qm.folder()
        )),
        "{}",
        qm.calls()
    );
    assert!(!Path::new("/tmp/oops").exists());
    let common = lines(&[
        "name: B-ro-s---touch--tmp-oops--VM",
        "ostype: win10",
        "machine: q35",
        "memory: 4096",
        "sockets: 1",
        "cores: 4",
        "cpu: host",
        "localtime: 1",
        "agent: enabled=1",
        "serial0: socket",
        "tablet: 1",
        "balloon: 4096",
        "vga: std",
        "vmgenid: 00000000-0000-0000-0000-000000000007",
        "rng0: source=/dev/urandom",
        "bios: ovmf",
        "efidisk0: zfs:0,efitype=4m,pre-enrolled-keys=0",
        "tpmstate0: zfs:0,version=v2.0",
        "smbios1: uuid=564d1234-5678-9abc-def0-123456789abc,serial=Vk13YXJlLTU2IDRk,base64=1",
    ]);
    let with = |more: &[&str]| common.union(&lines(more)).cloned().collect::<BTreeSet<_>>();
    let first = qm.config();
    for line in with(&[
        "sata0: zfs:vm-100-disk-sata0,discard=on,serial=h2k-0",
        "sata1: zfs:vm-100-disk-sata1,discard=on,serial=h2k-1",
        "virtio0: zfs:1,serial=h2k-probe",
        "boot: order=sata0",
        "net0: e1000e=00:0c:29:aa:bb:01,bridge=vmbr0",
        "net1: e1000e=00:0c:29:aa:bb:02,bridge=br0,link_down=1",
    ]) {
        assert!(first.contains(&line), "{line}\n{first:#?}");
    }
    fs::write(qm.dir.path().join("status"), "status: running\n").unwrap();
    let (ok, text) = qm.run(&["final", "100"]);
    assert!(!ok && text.contains("shut the VM down"), "{text}");
    fs::remove_file(qm.dir.path().join("status")).unwrap();
    let production = with(&[
        "virtio0: zfs:vm-100-disk-sata0,discard=on,iothread=1,serial=h2k-0",
        "virtio1: zfs:vm-100-disk-sata1,discard=on,iothread=1,serial=h2k-1",
        "boot: order=virtio0",
        "net0: virtio=00:0c:29:aa:bb:01,bridge=vmbr0",
        "net1: virtio=00:0c:29:aa:bb:02,bridge=br0,link_down=1",
    ]);
    // The second time there is nothing left to move.
    for _ in 0..2 {
        let (ok, text) = qm.run(&["final", "100"]);
        assert!(ok, "{text}");
        assert_eq!(qm.config(), production);
    }
    assert_eq!(
        qm.calls().matches("[snapshot]").count(),
        1,
        "{}",
        qm.calls()
    );
    let (ok, text) = qm.run(&["back", "100"]);
    assert!(ok, "{text}");
    assert_eq!(
        qm.config(),
        first,
        "the rollback ends where the first boot was"
    );
    for args in [&[][..], &["final"], &["final", "x"], &["delete", "100"]] {
        let (ok, text) = qm.run(args);
        assert!(!ok && text.contains("usage:"), "{args:?}: {text}");
    }
}

#[test]
fn proxmox_without_a_first_boot_and_refusals() {
    let mut m = machine();
    m.bootstrap = Bootstrap::None;
    m.bus = StorageBus::VirtioScsi;
    (m.firmware, m.nvram) = (Firmware::Bios, None);
    let qm = FakeQm::new(&m);
    let (ok, text) = qm.run(&["bootstrap", "100"]);
    assert!(!ok && text.contains("needs no first boot"), "{text}");
    let (ok, text) = qm.run(&["final", "100"]);
    assert!(ok, "{text}");
    let config = qm.config();
    for line in [
        "scsi0: local-lvm:vm-100-disk-scsi0,discard=on,iothread=1,serial=h2k-0",
        "scsihw: virtio-scsi-single",
        "boot: order=scsi0",
    ] {
        assert!(config.contains(line), "{line}\n{config:#?}");
    }
    m.bootstrap = Bootstrap::Sata;
    for n in 0..5 {
        let mut more = m.disks[0].clone();
        (more.path, more.system, more.boot_order) = (format!("/d{n}").into(), false, None);
        m.disks.push(more);
    }
    let script = |m: &Machine| proxmox::script(m, Path::new(FOLDER));
    for n in 5..30 {
        let mut more = m.disks[1].clone();
        more.path = format!("/d{n}").into();
        m.disks.push(more);
    }
    // The probe of the first boot has a place too.
    let error = script(&m).unwrap_err().to_string();
    assert!(error.contains("30 places on scsi"), "{error}");
    m.disks.truncate(30);
    assert!(script(&m).is_ok());
    m.bus = StorageBus::Sata;
    assert!(script(&m).is_err());
    m.bus = StorageBus::VirtioScsi;
    m.disks.truncate(1);
    m.disks[0].sector_size = 4096;
    assert!(script(&m).is_err());
    m.disks[0].sector_size = 512;
    m.disks[0].path = "/a,b".into();
    assert!(script(&m).is_err());
}

/// Data disks without a place on the first bus are on the final one from the start.
#[test]
fn proxmox_has_more_disks_than_the_first_bus() {
    for (bus, name, probe) in [
        (StorageBus::VirtioBlk, "virtio", "virtio0"),
        (StorageBus::VirtioScsi, "scsi", "scsi9"),
    ] {
        let mut m = full();
        m.bus = bus;
        m.disks.truncate(1);
        m.disks[0].path = "/vm/a.qcow2".into();
        for n in 1..9 {
            let mut more = m.disks[0].clone();
            more.path = format!("/vm/d{n}.qcow2").into();
            (more.system, more.boot_order) = (false, None);
            more.serial = Some(format!("h2k-{n}"));
            m.disks.push(more);
        }
        let iso = m.driver_iso.is_some();
        let fit = if iso { 5 } else { 6 };
        let qm = FakeQm::new(&m);
        let (ok, text) = qm.run(&["bootstrap", "100"]);
        assert!(ok, "{text}");
        let first = qm.config();
        let place = |bus: &str, n: usize, from: &str, thread: &str| {
            format!("{bus}{n}: local-lvm:vm-100-disk-{from}{n},discard=on{thread},serial=h2k-{n}")
        };
        let thread = ",iothread=1";
        for n in 0..9 {
            let line = match n < fit {
                true => place("sata", n, "sata", ""),
                false => place(name, n, name, thread),
            };
            assert!(first.contains(&line), "{line}\n{first:#?}");
        }
        let probe = format!("{probe}: local-lvm:1,serial=h2k-probe");
        assert!(first.contains(&probe), "{probe}\n{first:#?}");
        let (ok, text) = qm.run(&["final", "100"]);
        assert!(ok, "{text}");
        let last = qm.config();
        for n in 0..9 {
            let line = place(name, n, if n < fit { "sata" } else { name }, thread);
            assert!(last.contains(&line), "{line}\n{last:#?}");
        }
        assert!(
            !last
                .iter()
                .any(|l| l.starts_with("sata") || l.contains("h2k-probe"))
        );
        assert!(qm.run(&["back", "100"]).0);
        assert_eq!(qm.config(), first);
    }
}

#[test]
fn proxmox_goes_on_after_an_interruption() {
    let m = full();
    let mut m = Machine {
        driver_iso: None,
        ..m
    };
    m.disks[0].path = "/vm/a.qcow2".into();
    let whole = FakeQm::new(&m);
    assert!(whole.run(&["bootstrap", "100"]).0);
    let calls = whole.calls().lines().count();
    for fail in 1..=calls {
        let qm = FakeQm::new(&m);
        fs::write(qm.dir.path().join("fail"), fail.to_string()).unwrap();
        // A look that fails is taken for "no", so some runs end well.
        let _ = qm.run(&["bootstrap", "100"]);
        fs::remove_file(qm.dir.path().join("fail")).unwrap();
        let (ok, text) = qm.run(&["bootstrap", "100"]);
        assert!(ok, "{fail}: {text}");
        assert_eq!(qm.config(), whole.config(), "stopped at call {fail}");
    }
}

#[test]
fn proxmox_names_and_snapshots() {
    let mut m = full();
    m.disks[0].path = "/vm/a.qcow2".into();
    let qm = FakeQm::new(&m);
    let (ok, text) = qm.run(&["bootstrap", "next"]);
    assert!(ok && text.contains("VMID 123"), "{text}");
    assert!(qm.dir.path().join("123.conf").exists());
    // Another VM under that number is never touched.
    fs::write(qm.dir.path().join("100.conf"), "smbios1: uuid=other\n").unwrap();
    for verb in ["bootstrap", "final", "back"] {
        let (ok, text) = qm.run(&[verb, "100"]);
        assert!(!ok && text.contains("another VM"), "{verb}: {text}");
        assert_eq!(qm.config().len(), 1, "{verb}");
    }
    // Without snapshots the disks go back to their bus.
    fs::remove_file(qm.dir.path().join("100.conf")).unwrap();
    fs::write(qm.dir.path().join("no-snapshots"), "").unwrap();
    assert!(qm.run(&["bootstrap", "100"]).0);
    let (ok, text) = qm.run(&["final", "100"]);
    assert!(ok && text.contains("no snapshots"), "{text}");
    let (ok, text) = qm.run(&["back", "100"]);
    assert!(
        ok && text.contains("what Windows wrote since stays"),
        "{text}"
    );
    let config = qm.config();
    for line in [
        "sata0: local-lvm:vm-100-disk-sata0,discard=on,serial=h2k-0",
        "boot: order=sata0",
    ] {
        assert!(config.contains(line), "{line}\n{config:#?}");
    }
    // No first boot at all: said, and done.
    let qm = FakeQm::new(&m);
    let (ok, text) = qm.run(&["final", "100"]);
    assert!(ok && text.contains("0x7B"), "{text}");
}

#[test]
fn proxmox_networks_follow_the_map() {
    let mut m = machine();
    let map = ["a=pve:vmbr7@20", "b=br:br1@30", "c=none"];
    let map = NetworkMap::new(map.iter().map(|m| m.parse().unwrap()).collect()).unwrap();
    m.nics = ["a", "b", "c", "d"]
        .into_iter()
        .enumerate()
        .map(|(n, network)| {
            let mut nic = Nic {
                network: Some(network.into()),
                ..Nic::new(
                    MacAddr::qemu([0, 0, n as u8]),
                    NicSource::Network("default".into()),
                )
            };
            map.apply(&mut nic);
            nic
        })
        .collect();
    let qm = FakeQm::new(&m);
    let (ok, text) = qm.run(&["final", "100"]);
    assert!(ok, "{text}");
    let config = qm.config();
    for line in [
        "net0: virtio=52:54:00:00:00:00,bridge=vmbr7,tag=20",
        "net1: virtio=52:54:00:00:00:01,bridge=br1,tag=30",
        "net2: virtio=52:54:00:00:00:02,bridge=vmbr0,link_down=1",
        "net3: virtio=52:54:00:00:00:03,bridge=vmbr0",
    ] {
        assert!(config.contains(line), "{line}\n{config:#?}");
    }
    let said = warnings(Emit::Proxmox, &m);
    assert!(
        said.len() == 1 && said[0].contains("--network-map 'd=pve:"),
        "{said:#?}"
    );
    let said = warnings(Emit::Qemu, &m);
    assert!(said.len() == 1 && said[0].contains("VLAN 30"), "{said:#?}");
}

/// Disks that have moved are named by their new path in every form.
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
}

// ---- QEMU ----

/// Every PCI address of the XML is on the command line, and no other.
#[test]
fn qemu_has_the_slots_of_the_xml() {
    for change in [
        (|_| {}) as fn(&mut Machine),
        |m| m.bus = StorageBus::VirtioScsi,
        |m| {
            let System::Windows(w) = &mut m.system else {
                return;
            };
            (w.major, w.minor) = (6, 1);
        },
        |m| {
            m.bootstrap = Bootstrap::Ide;
            (m.firmware, m.nvram, m.tpm) = (Firmware::Bios, None, false);
            m.disks.truncate(1);
        },
        |m| (m.graphics, m.video) = (Graphics::None, Video::Virtio),
        |m| m.domain_type = DomainType::Qemu,
    ] {
        let mut m = full();
        change(&mut m);
        for ((stage, domain), text) in domains(&m).iter().zip(texts(Emit::Qemu, &m)) {
            assert!(sh(&text, &["-n"], None).0, "{text}");
            let number = |a: &Element, name: &str| {
                u8::from_str_radix(a.attr(name).unwrap().trim_start_matches("0x"), 16).unwrap()
            };
            let mut wanted: Vec<String> = domain
                .descendants("address")
                .iter()
                .filter(|a| a.attr("type") == Some("pci"))
                .map(|a| {
                    let bus = match number(a, "bus") {
                        0 if m.chipset() == Chipset::Q35 => "pcie.0".to_owned(),
                        n => format!("pci.{n}"),
                    };
                    let (slot, function) = (number(a, "slot"), number(a, "function"));
                    format!("bus={bus},addr=0x{slot:x}.0x{function:x}")
                })
                // Parts of the chipset are there without being asked for.
                .filter(|a| !a.ends_with("=0x1f.0x2") && a != "bus=pci.0,addr=0x1.0x1")
                .collect();
            let mut found: Vec<String> = text
                .lines()
                .filter_map(|line| {
                    let (_, rest) = line.split_once(",bus=pci")?;
                    let end = rest
                        .match_indices([',', ' '])
                        .nth(1)
                        .map_or(rest.len(), |(i, _)| i);
                    Some(format!("bus=pci{}", &rest[..end]))
                })
                .collect();
            wanted.sort();
            found.sort();
            assert_eq!(found, wanted, "{stage:?}\n{text}");
            let disks = domain.first("devices").unwrap().all("disk").count();
            assert_eq!(text.matches("-blockdev").count(), disks, "{text}");
            assert_eq!(text.matches("bootindex=1").count(), 1);
            assert!(
                text.contains(r#""filename":"it'\''s $HOME,x.qcow2""#),
                "{text}"
            );
            assert_eq!(text.contains("hv-spinlocks"), m.enlightened(), "{text}");
        }
    }
}

/// Firmware and TPM are set up before QEMU starts, from where the XML or the environment says.
#[test]
fn qemu_script_prepares_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut m = full();
    m.nvram = Some(path("my vars.fd"));
    m.emulator = Some(path("qemu"));
    m.firmware = Firmware::Uefi { secure_boot: true };
    for (name, body) in [
        (
            "qemu",
            "#!/bin/sh\nfor a in \"$@\"; do echo \"[$a]\"; done\n",
        ),
        ("swtpm", "#!/bin/sh\necho \"swtpm $*\"\n"),
    ] {
        fs::write(path(name), body).unwrap();
        fs::set_permissions(path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::write(path("template"), "vars").unwrap();
    let portable = FirmwareChoice::Portable { secure_boot: true };
    let domain = to_element(&m, Stage::Final, &portable).unwrap();
    let script = qemu::script(&domain, dir.path());
    let elsewhere = qemu::script(&domain, Path::new("/elsewhere"));
    assert!(elsewhere.contains(&format!("nvram='{}'", path("my vars.fd").display())));
    let (ok, text) = sh(&script, &[], Some(dir.path()));
    assert!(!ok && text.contains("OVMF_CODE"), "{text}");
    let template = path("template");
    let script = script.replace(
        "set -eu\n",
        &format!(
            "set -eu\nOVMF_CODE=/code.fd OVMF_VARS={}\n",
            template.display()
        ),
    );
    let file = path("script.sh");
    fs::write(&file, &script).unwrap();
    let (ok, text) = run_file(&file, &["-S"], Some(dir.path()));
    assert!(ok, "{text}");
    for want in [
        "swtpm socket --tpm2 --daemon",
        "[if=pflash,unit=0,readonly=on,format=raw,file=/code.fd]",
        "[-S]",
        "[guest=Büro's $(touch -tmp-oops) VM]",
        "[type=1,serial=VMware-56 4d]",
    ] {
        assert!(text.contains(want), "{want}\n{text}");
    }
    assert_eq!(fs::read_to_string(path("my vars.fd")).unwrap(), "vars");
    assert!(path("my vars.tpm").is_dir());
    // The variables of a machine that has run are kept.
    fs::write(path("my vars.fd"), "changed").unwrap();
    assert!(run_file(&file, &[], Some(dir.path())).0);
    assert_eq!(fs::read_to_string(path("my vars.fd")).unwrap(), "changed");
}

/// What has lost characters in its name is told from others that lost the same.
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
        // Those of bridges are written.
        let definition = documents.iter().any(|d| d["metadata"]["name"] == *name);
        assert_eq!(definition, n >= 7, "{name}");
    }
}

/// What is offered for pasting is one word of the shell, whatever the network is called.
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

#[test]
fn proxmox_names_are_names_of_dns() {
    for (name, want) in [
        ("Dr. No", "Dr.No"),
        ("a.-b-.c", "a.b.c"),
        ("..a..b..", "a.b"),
        ("- . -", "vm"),
        ("win-2019", "win-2019"),
    ] {
        let mut m = machine();
        m.name = name.to_owned();
        let script = &texts(Emit::Proxmox, &m)[0];
        let line = format!("--name {want} ");
        assert!(script.contains(&line), "{name}: {script}");
    }
}
