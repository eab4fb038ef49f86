//! A KubeVirt `VirtualMachine` with a `DataVolume` for each disk, as YAML.
//!
//! Follows the API `kubevirt.io/v1` and CDI's `cdi.kubevirt.io/v1beta1`. The disks are uploaded
//! (`virtctl image-upload`); the first boot's probe is an `emptyDisk`, its driver ISO the container disk
//! that KubeVirt publishes. Both stages are the same object with the same UUID, so applying the final
//! one switches over.
//!
//! What is lost: the PCI addresses (KubeVirt places the root ports), IDE, USB 2, and a clock in local time
//! as such: KubeVirt wants the name of a time zone, which the document leaves to its reader.

use serde_json::{Value, json};

use super::emit::EmitError;
use super::model::{
    Bootstrap, Chipset, CpuMode, DomainType, Firmware, Graphics, Machine, NicSource, Stage,
    StorageBus,
};

/// The documents of one stage.
pub fn yaml(machine: &Machine, stage: Stage) -> Result<String, EmitError> {
    if machine.chipset() == Chipset::Pc {
        return Err(EmitError::Missing {
            what: "i440fx machines and IDE disks",
            target: "KubeVirt",
        });
    }
    let name = object_name(&machine.name);
    let mut text = String::new();
    for (n, disk) in machine.disks.iter().enumerate() {
        let disk_name = volume_name(&name, n);
        let volume = json!({
            "apiVersion": "cdi.kubevirt.io/v1beta1",
            "kind": "DataVolume",
            "metadata": {"name": disk_name},
            "spec": {
                "source": {"upload": {}},
                "storage": {"resources": {"requests": {"storage": disk.size_bytes.to_string()}}},
            },
        });
        let path: String = disk.path.display().to_string();
        let path: String = path.chars().filter(|c| !c.is_control()).collect();
        text.push_str("---\n");
        text.push_str(&format!(
            "# virtctl image-upload dv {disk_name} --no-create --image-path={}\n",
            crate::text::quoted(&path)
        ));
        text.push_str(&to_yaml(&volume)?);
    }
    text.push_str("---\n");
    if !machine.clock_utc {
        text.push_str(
            "# Windows keeps its clock in local time: put `timezone: <name>` in the place of\n\
             # `utc: {}` below spec.template.spec.domain.clock.\n",
        );
    }
    text.push_str(&to_yaml(&object(machine, stage, &name))?);
    Ok(text)
}

fn to_yaml(value: &Value) -> Result<String, EmitError> {
    serde_yaml::to_string(value).map_err(|e| EmitError::Yaml(e.to_string()))
}

/// A name Kubernetes takes: lower case letters, digits and `-`, at most 50 so that ours fit behind it.
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

fn object(m: &Machine, stage: Stage, name: &str) -> Value {
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
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": {
            "name": name,
            "labels": {"hyper2kvm/stage": stage.as_str()},
        },
        "spec": {
            "runStrategy": "Halted",
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
    })
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
    let virtio = match m.bus {
        StorageBus::VirtioBlk => "virtio",
        StorageBus::VirtioScsi => "scsi",
        StorageBus::Sata => "sata",
    };
    let bus = match stage {
        Stage::Bootstrap => "sata",
        Stage::Final => virtio,
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
    if stage == Stage::Bootstrap && m.bootstrap != Bootstrap::None {
        disks.push(json!({"name": "probe", "disk": {"bus": virtio}, "serial": "h2k-probe"}));
        volumes.push(json!({"name": "probe", "emptyDisk": {"capacity": "64Mi"}}));
        disks.push(json!({"name": "drivers", "cdrom": {"bus": "sata"}}));
        volumes.push(json!({
            "name": "drivers",
            "containerDisk": {"image": "quay.io/kubevirt/virtio-container-disk"},
        }));
    }
    (disks, volumes)
}

/// One card may be in the network of the pods; the others name a network of Multus.
fn networks(m: &Machine, stage: Stage) -> (Vec<Value>, Vec<Value>) {
    let (mut interfaces, mut networks) = (Vec::new(), Vec::new());
    for (n, nic) in m.nics.iter().enumerate() {
        let name = format!("net-{n}");
        let mut interface = json!({
            "name": name,
            "model": m.nic_model(stage),
            "macAddress": nic.mac.to_string(),
        });
        let multus = match &nic.source {
            NicSource::Bridge(bridge) => Some(bridge.as_str()),
            NicSource::Network(network) if n > 0 || network != "default" => Some(network.as_str()),
            NicSource::Network(_) | NicSource::User => None,
        };
        if !nic.link_up {
            interface["state"] = "down".into();
        }
        match multus {
            Some(network) => {
                interface["bridge"] = json!({});
                networks.push(json!({"name": name, "multus": {"networkName": network}}));
            }
            None if n > 0 => {
                interface["bridge"] = json!({});
                networks.push(json!({"name": name, "multus": {"networkName": "default"}}));
            }
            None => {
                interface["masquerade"] = json!({});
                networks.push(json!({"name": name, "pod": {}}));
            }
        }
        interfaces.push(interface);
    }
    (interfaces, networks)
}
