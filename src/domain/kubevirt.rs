//! Writes a KubeVirt `VirtualMachine` with a `DataVolume` for each disk, as YAML.
//!
//! Follows the API `kubevirt.io/v1`, CDI's `cdi.kubevirt.io/v1beta1` and `k8s.cni.cncf.io/v1`. The
//! disks are uploaded (`virtctl image-upload`); the probe disk of the first boot is an `emptyDisk`.
//! There is no driver ISO, because the drivers are on the converted disk. Both stages are the same
//! object with the same UUID, so applying the final one switches over.
//!
//! - `runStrategy` is `Manual`: with `Halted`, `virtctl start` makes it `Always`, and a shutdown
//!   inside Windows then starts the VM again.
//! - A volume of a class that binds to its first consumer has none during the upload. The
//!   annotation `storage.bind.immediate.requested` makes CDI bind it immediately.
//! - Only one NIC can be in the network of the pods, which assigns an address of its own.
//!
//! KubeVirt cannot express the PCI addresses (it places the root ports itself), IDE, USB 2, or a
//! clock in local time. For such a clock it requires the name of a time zone, which the user has to
//! fill in.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::document::{EmitError, local};
use super::model::{
    Bridge, Chipset, CpuMode, DomainType, Firmware, Graphics, Machine, NicSource, Stage,
};
use crate::text::{digest8, quoted};
use crate::types::DiskBus;

/// Options for the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    pub namespace: Option<String>,
    pub storage_class: Option<String>,
    /// `ReadWriteOnce` or `ReadWriteMany`; without it CDI's storage profile decides.
    pub access_mode: Option<&'static str>,
    /// Replaces CPUs and memory of the VM.
    pub instance_type: Option<Reference>,
    pub preference: Option<Reference>,
}

/// An instance type or a preference: of the cluster, or of the VM's namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    pub namespaced: bool,
    pub name: String,
}

impl std::str::FromStr for Reference {
    type Err = String;

    /// `NAME`, or `namespaced/NAME`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (namespaced, name) = match text.strip_prefix("namespaced/") {
            Some(name) => (true, name),
            None => (false, text),
        };
        match super::network::kubernetes_name(name, true) {
            true => Ok(Self {
                namespaced,
                name: name.to_owned(),
            }),
            false => Err(format!(
                "{name:?} is not a name in Kubernetes: lower case letters, digits, `-` and `.`"
            )),
        }
    }
}

impl Reference {
    fn json(&self, kind: &str) -> Value {
        let scope = if self.namespaced { "" } else { "Cluster" };
        json!({"name": self.name, "kind": format!("VirtualMachine{scope}{kind}")})
    }
}

/// The documents of one stage.
pub fn yaml(
    machine: &Machine,
    stage: Stage,
    folder: &Path,
    options: &Options,
) -> Result<String, EmitError> {
    if machine.chipset() == Chipset::Pc {
        return Err(EmitError::Missing {
            what: "i440fx machines and IDE disks",
            target: "KubeVirt",
        });
    }
    let name = object_name(&machine.name);
    let mut text = steps(machine, stage, &name, folder, options);
    for (n, disk) in machine.disks.iter().enumerate() {
        let volume = data_volume(&volume_name(&name, n), disk.size_bytes, options);
        text.push_str("---\n");
        text.push_str(&to_yaml(&volume)?);
    }
    for bridge in bridges(machine) {
        text.push_str("---\n");
        text.push_str(&to_yaml(&attachment_definition(bridge, options))?);
    }
    text.push_str("---\n");
    if !machine.clock_utc {
        text.push_str(
            "# Windows keeps its clock in local time: put `timezone: <name>` in place of\n\
             # `utc: {}` below spec.template.spec.domain.clock.\n",
        );
    }
    text.push_str(&to_yaml(&object(machine, stage, &name, options))?);
    Ok(text)
}

/// The commands to run, in order, as comments at the head of the file.
fn steps(m: &Machine, stage: Stage, name: &str, folder: &Path, options: &Options) -> String {
    let namespace = match &options.namespace {
        Some(namespace) => format!(" -n {namespace}"),
        None => String::new(),
    };
    let file = |stage: Stage| {
        let file = format!("{}-kubevirt-{}.yaml", m.name, stage.as_str());
        let file: String = file.chars().filter(|c| !c.is_control()).collect();
        quoted(&file)
    };
    let mut text = String::new();
    let mut line = |line: String| {
        let _ = writeln!(text, "# {line}");
    };
    let first = stage == Stage::Bootstrap || m.bootstrap.is_none();
    if first {
        line("In this directory, in this order:".to_owned());
        line(format!("  kubectl{namespace} apply -f {}", file(stage)));
        for (n, disk) in m.disks.iter().enumerate() {
            let path = local(&disk.path, folder)
                .map_or_else(|| disk.path.display().to_string(), str::to_owned);
            let path: String = path.chars().filter(|c| !c.is_control()).collect();
            line(format!(
                "  virtctl{namespace} image-upload dv {} --no-create --image-path={}",
                volume_name(name, n),
                quoted(&path)
            ));
        }
        line(format!("  virtctl{namespace} start {name}"));
    }
    if stage == Stage::Bootstrap {
        line(format!(
            "  virtctl{namespace} console {name}    # until it shows \"hyper2kvm: first boot finished\""
        ));
        line(format!(
            "  virtctl{namespace} stop {name}       # or shut Windows down; then the final form:"
        ));
        line(format!(
            "  kubectl{namespace} apply -f {}",
            file(Stage::Final)
        ));
        line(format!("  virtctl{namespace} start {name}"));
    } else if !first {
        line("After the first boot, with the VM off:".to_owned());
        line(format!("  kubectl{namespace} apply -f {}", file(stage)));
        line(format!("  virtctl{namespace} start {name}"));
    }
    text
}

fn data_volume(name: &str, size: u64, options: &Options) -> Value {
    let mut storage = json!({"resources": {"requests": {"storage": size.to_string()}}});
    if let Some(class) = &options.storage_class {
        storage["storageClassName"] = class.as_str().into();
    }
    if let Some(mode) = options.access_mode {
        storage["accessModes"] = json!([mode]);
    }
    json!({
        "apiVersion": "cdi.kubevirt.io/v1beta1",
        "kind": "DataVolume",
        "metadata": metadata(
            json!({
                "name": name,
                "annotations": {"cdi.kubevirt.io/storage.bind.immediate.requested": "true"},
            }),
            options,
        ),
        "spec": {"source": {"upload": {}}, "storage": storage},
    })
}

fn metadata(mut metadata: Value, options: &Options) -> Value {
    if let Some(namespace) = &options.namespace {
        metadata["namespace"] = namespace.as_str().into();
    }
    metadata
}

/// The definition of a bridge of the nodes for Multus; the bridge plugin applies the VLAN.
fn attachment_definition(bridge: &Bridge, options: &Options) -> Value {
    let name = attachment_name(bridge);
    let mut config = json!({
        "cniVersion": "0.3.1",
        "name": name,
        "type": "bridge",
        "bridge": bridge.name,
        "ipam": {},
    });
    if let Some(vlan) = bridge.vlan {
        config["vlan"] = vlan.into();
    }
    json!({
        "apiVersion": "k8s.cni.cncf.io/v1",
        "kind": "NetworkAttachmentDefinition",
        "metadata": metadata(json!({"name": name}), options),
        "spec": {"config": config.to_string()},
    })
}

/// The name of a bridge's definition. Each bridge has its own: `br_0` and `br-0` must not share a
/// name.
fn attachment_name(bridge: &Bridge) -> String {
    let name = &bridge.name;
    let short = object_name(name);
    let own = short == *name && !name.contains("-vlan");
    let name = if own { short } else { hashed(&short, name) };
    match bridge.vlan {
        Some(vlan) => format!("{name}-vlan{vlan}"),
        None => name,
    }
}

/// The name for a network without a mapping. Eight digits distinguish names that lost other
/// characters than case and spaces; `VM Network` is `vm-network`.
fn network_name(name: &str) -> String {
    let short = object_name(name);
    match short == name.to_lowercase().replace(' ', "-") {
        true => short,
        false => hashed(&short, name),
    }
}

fn hashed(short: &str, name: &str) -> String {
    let short: String = short.chars().take(41).collect();
    format!("{}-{}", short.trim_end_matches('-'), digest8(name))
}

/// The bridges to which NICs are attached, each once.
fn bridges(m: &Machine) -> Vec<&Bridge> {
    let mut bridges = Vec::new();
    for nic in &m.nics {
        if let (None, NicSource::Bridge(bridge)) = (&nic.attachment, &nic.source)
            && !bridges.contains(&bridge)
        {
            bridges.push(bridge);
        }
    }
    bridges
}

fn to_yaml(value: &Value) -> Result<String, EmitError> {
    serde_yaml::to_string(value).map_err(|e| EmitError::Yaml(e.to_string()))
}

/// A valid name for Kubernetes: lower case letters, digits and `-`, at most 50, which leaves room
/// for a suffix.
pub fn object_name(name: &str) -> String {
    let mapped: String = name
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(50)
        .collect();
    match mapped.trim_matches('-') {
        "" => "vm".to_owned(),
        name => name.to_owned(),
    }
}

fn volume_name(machine: &str, n: usize) -> String {
    format!("{machine}-disk-{n}")
}

fn object(m: &Machine, stage: Stage, name: &str, options: &Options) -> Value {
    let (disks, volumes) = disks(m, stage, name);
    let (interfaces, networks) = networks(m, stage);
    let (sockets, cores, threads) = m
        .topology
        .map_or((1, m.vcpus, 1), |t| (t.sockets, t.cores, t.threads));
    let mut cpu = json!({"sockets": sockets, "cores": cores, "threads": threads});
    if m.domain_type == DomainType::Kvm {
        cpu["model"] = match m.cpu {
            CpuMode::HostPassthrough => "host-passthrough",
            CpuMode::HostModel => "host-model",
        }
        .into();
    }
    let mut devices = json!({
        "disks": disks,
        "interfaces": interfaces,
        "inputs": [{"name": "tablet", "type": "tablet", "bus": "usb"}],
        "autoattachGraphicsDevice": m.graphics != Graphics::None,
        "autoattachMemBalloon": m.drivers.balloon,
    });
    if m.drivers.rng {
        devices["rng"] = json!({});
    }
    if m.tpm && m.firmware != Firmware::Bios {
        devices["tpm"] = json!({"persistent": true});
    }
    let mut object = json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": metadata(
            json!({"name": name, "labels": {"hyper2kvm/stage": stage.as_str()}}),
            options,
        ),
        "spec": {
            "runStrategy": "Manual",
            "template": {
                "metadata": {"labels": {"kubevirt.io/domain": name}},
                "spec": {
                    "domain": {
                        "machine": {"type": m.machine_type()},
                        "cpu": cpu,
                        "memory": {"guest": format!("{}Mi", m.memory_mib)},
                        "firmware": firmware(m),
                        "features": features(m),
                        "clock": {
                            "utc": {},
                            "timer": {
                                "rtc": {"tickPolicy": "catchup"},
                                "pit": {"tickPolicy": "delay"},
                                "hpet": {"present": false},
                                "hyperv": {"present": m.enlightened()},
                            },
                        },
                        "devices": devices,
                    },
                    "networks": networks,
                    "volumes": volumes,
                },
            },
        },
    });
    if let Some(instance_type) = &options.instance_type {
        // KubeVirt refuses a VM that itself sets what its instance type sets.
        object["spec"]["instancetype"] = instance_type.json("Instancetype");
        let domain = object.pointer_mut("/spec/template/spec/domain");
        if let Some(domain) = domain.and_then(Value::as_object_mut) {
            domain.remove("cpu");
            domain.remove("memory");
        }
    }
    if let Some(preference) = &options.preference {
        object["spec"]["preference"] = preference.json("Preference");
    }
    object
}

fn firmware(m: &Machine) -> Value {
    let mut firmware = json!({"uuid": m.uuid.to_string()});
    if let Some(serial) = &m.serial {
        firmware["serial"] = serial.as_str().into();
    }
    firmware["bootloader"] = match m.firmware {
        Firmware::Bios => json!({"bios": {}}),
        Firmware::Uefi { secure_boot } => {
            json!({"efi": {"secureBoot": secure_boot, "persistent": true}})
        }
    };
    firmware
}

fn features(m: &Machine) -> Value {
    let mut features = json!({"acpi": {}, "apic": {}});
    if m.firmware == (Firmware::Uefi { secure_boot: true }) {
        features["smm"] = json!({"enabled": true});
    }
    if m.enlightened() {
        features["hyperv"] = json!({
            "relaxed": {}, "vapic": {}, "spinlocks": {"spinlocks": 8191}, "vpindex": {},
            "runtime": {}, "synic": {}, "synictimer": {"direct": {}}, "frequencies": {},
            "tlbflush": {}, "ipi": {},
        });
    }
    features
}

fn disks(m: &Machine, stage: Stage, name: &str) -> (Vec<Value>, Vec<Value>) {
    let bus = match (stage, m.bus) {
        // KubeVirt has no IDE.
        (Stage::Bootstrap, _) | (_, DiskBus::Ide) => "sata",
        (Stage::Final, bus) => bus.libvirt(),
    };
    let (mut disks, mut volumes) = (Vec::new(), Vec::new());
    for (n, disk) in m.disks.iter().enumerate() {
        if stage == Stage::Bootstrap && disk.sector_size != 512 {
            continue;
        }
        let mut entry = json!({"name": format!("disk-{n}"), "disk": {"bus": bus}, "cache": "none"});
        if let Some(order) = disk.boot_order {
            entry["bootOrder"] = order.into();
        }
        if let Some(serial) = &disk.serial {
            entry["serial"] = serial.as_str().into();
        }
        if disk.sector_size != 512 {
            entry["blockSize"] =
                json!({"custom": {"logical": disk.sector_size, "physical": disk.sector_size}});
        }
        disks.push(entry);
        volumes.push(
            json!({"name": format!("disk-{n}"), "dataVolume": {"name": volume_name(name, n)}}),
        );
    }
    if stage == Stage::Bootstrap && m.bootstrap.is_some() {
        disks.push(
            json!({"name": "probe", "disk": {"bus": m.bus.libvirt()}, "serial": "h2k-probe"}),
        );
        volumes.push(json!({"name": "probe", "emptyDisk": {"capacity": "64Mi"}}));
    }
    (disks, volumes)
}

/// The network of the cluster to which a NIC is attached.
#[derive(Debug, PartialEq, Eq)]
enum Network {
    Pod,
    /// A `NetworkAttachmentDefinition`, with its namespace where it has one.
    Multus(String),
}

/// The network of each NIC. The first one without a mapping is in the network of the pods.
fn attached(m: &Machine) -> Vec<Network> {
    let mut pod = false;
    let written: Vec<String> = bridges(m).into_iter().map(attachment_name).collect();
    // With the networks that they replace.
    let mut guessed: Vec<(String, String)> = Vec::new();
    let mut guess = |network: &str| {
        let short = network_name(network);
        let other = |(name, of): &(String, String)| *name == short && of != network;
        let taken = written.contains(&short) || guessed.iter().any(other);
        let name = if taken {
            hashed(&short, network)
        } else {
            short
        };
        guessed.push((name.clone(), network.to_owned()));
        Network::Multus(name)
    };
    m.nics
        .iter()
        .map(|nic| match (&nic.attachment, &nic.source) {
            (Some(attachment), _) => Network::Multus(attachment.to_string()),
            (None, NicSource::Bridge(bridge)) => Network::Multus(attachment_name(bridge)),
            (None, NicSource::Network(network)) if network != "default" => guess(network),
            (None, NicSource::Network(_) | NicSource::User) if !pod => {
                pod = true;
                Network::Pod
            }
            (None, NicSource::Network(_) | NicSource::User) => {
                guess(nic.network.as_deref().unwrap_or("network"))
            }
        })
        .collect()
}

fn networks(m: &Machine, stage: Stage) -> (Vec<Value>, Vec<Value>) {
    let (mut interfaces, mut networks) = (Vec::new(), Vec::new());
    for (n, (nic, network)) in m.nics.iter().zip(attached(m)).enumerate() {
        let name = format!("net-{n}");
        let mut interface = json!({
            "name": name,
            "model": m.nic_model(stage),
            "macAddress": nic.mac.to_string(),
        });
        if !nic.link_up {
            interface["state"] = "down".into();
        }
        match network {
            Network::Multus(network) => {
                interface["bridge"] = json!({});
                networks.push(json!({"name": name, "multus": {"networkName": network}}));
            }
            Network::Pod => {
                interface["masquerade"] = json!({});
                networks.push(json!({"name": name, "pod": {}}));
            }
        }
        interfaces.push(interface);
    }
    (interfaces, networks)
}

/// Warnings about NICs that will have no network, or need one that must exist first.
pub fn warnings(m: &Machine) -> Vec<String> {
    let mut warnings = Vec::new();
    for (n, (nic, network)) in m.nics.iter().zip(attached(m)).enumerate() {
        let n = n + 1;
        let map = match &nic.network {
            Some(network) => {
                let map = quoted(&format!("{network}=nad:NAMESPACE/NAME"));
                format!("--network-map {map}")
            }
            None => "--bridge NAME, a bridge of the nodes,".to_owned(),
        };
        match network {
            Network::Pod if nic.keeps_address => warnings.push(format!(
                "NIC {n} keeps its static address and would reach nothing in the network of the pods: {map} attaches it to the network this address belongs to"
            )),
            Network::Multus(name) => {
                let written = nic.attachment.is_none()
                    && matches!(nic.source, NicSource::Bridge(_));
                let named = nic.attachment.is_some();
                if !written && !named {
                    warnings.push(format!(
                        "NIC {n} is attached to the NetworkAttachmentDefinition {name}, which must exist before the VM starts; {map} names another"
                    ));
                }
            }
            Network::Pod => {}
        }
    }
    warnings
}
