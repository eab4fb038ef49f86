//! The KubeVirt documents, field by field.

use super::*;

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
    // The first boot: SATA, a VirtIO probe, the drivers, a NIC that Windows supports; otherwise the
    // same VM.
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
    m.bus = DiskBus::VirtioScsi;
    m.nics[0].source = NicSource::Network("vlan7".into());
    let vm = yaml(&texts(Emit::Kubevirt, &m)[1]).remove(1);
    let domain = &vm["spec"]["template"]["spec"]["domain"];
    assert_eq!(domain["features"]["smm"]["enabled"], true);
    assert_eq!(domain["firmware"]["bootloader"]["efi"]["secureBoot"], true);
    assert_eq!(domain["devices"]["disks"][0]["disk"]["bus"], "scsi");
    let networks = &vm["spec"]["template"]["spec"]["networks"];
    assert_eq!(networks[0]["multus"]["networkName"], "vlan7");
    m.firmware = Firmware::Bios;
    m.bootstrap = Some(DiskBus::Ide);
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
    // A disk of the directory by its name alone, a device by its path.
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

/// NICs of every kind: the networks to which they are attached, and the warnings.
/// A network of the cluster replaces the bridge, which then needs no definition.
#[test]
fn kubevirt_defines_no_bridge_that_is_not_used() {
    let mut m = machine();
    m.nics[0].source = NicSource::Bridge(Bridge::named("br0"));
    m.nics[0].network = Some("prod".into());
    let kinds = |m: &Machine| {
        let documents = yaml(&texts(Emit::Kubevirt, m)[1]);
        let kinds = documents.iter().filter_map(|d| d["kind"].as_str());
        kinds.map(str::to_owned).collect::<Vec<_>>()
    };
    let definition = "NetworkAttachmentDefinition";
    assert_eq!(kinds(&m), ["DataVolume", definition, "VirtualMachine"]);
    let map = vec!["prod=nad:net/prod".parse().unwrap()];
    NetworkMap::new(map).unwrap().apply(&mut m.nics[0]);
    assert_eq!(kinds(&m), ["DataVolume", "VirtualMachine"]);
}

/// A name that was cut has room for a suffix, like every other one.
#[test]
fn kubevirt_cuts_the_names_of_networks() {
    let mut m = machine();
    m.nics[0].source = NicSource::Network("a_".repeat(40));
    let documents = yaml(&texts(Emit::Kubevirt, &m)[1]);
    let spec = &documents.last().unwrap()["spec"]["template"]["spec"];
    let name = &spec["networks"][0]["multus"]["networkName"];
    let name = name.as_str().unwrap();
    let short = "a-".repeat(20) + "a-";
    assert!(name.starts_with(&short) && name.len() == 50, "{name}");
}

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

#[test]
fn kubevirt_has_what_the_vm_has() {
    let domain = |m: &Machine, n: usize| {
        let documents = yaml(&texts(Emit::Kubevirt, m)[n]);
        let vm = documents.last().unwrap().clone();
        vm.pointer("/spec/template/spec/domain").unwrap().clone()
    };
    for (change, at, want) in [
        (
            (|m| m.cpu = CpuMode::HostModel) as fn(&mut Machine),
            "/cpu/model",
            json!("host-model"),
        ),
        (
            |m| m.domain_type = DomainType::Qemu,
            "/cpu/model",
            Value::Null,
        ),
        (
            |m| (m.firmware, m.nvram) = (Firmware::Bios, None),
            "/firmware/bootloader",
            json!({"bios": {}}),
        ),
        (
            |m| (m.firmware, m.nvram) = (Firmware::Bios, None),
            "/devices/tpm",
            Value::Null,
        ),
        (
            |m| m.firmware = Firmware::Uefi { secure_boot: true },
            "/features/smm/enabled",
            json!(true),
        ),
        (
            |m| m.firmware = Firmware::Uefi { secure_boot: true },
            "/firmware/bootloader/efi/secureBoot",
            json!(true),
        ),
        (
            |m| m.graphics = Graphics::None,
            "/devices/autoattachGraphicsDevice",
            json!(false),
        ),
        (|_| {}, "/devices/autoattachGraphicsDevice", json!(true)),
        (|_| {}, "/devices/autoattachMemBalloon", json!(true)),
        (
            |m| m.drivers.balloon = false,
            "/devices/autoattachMemBalloon",
            json!(false),
        ),
        (|m| m.drivers.rng = false, "/devices/rng", Value::Null),
        (
            |m| m.domain_type = DomainType::Qemu,
            "/clock/timer/hyperv/present",
            json!(false),
        ),
        (|_| {}, "/clock/timer/hyperv/present", json!(true)),
    ] {
        let mut m = full();
        change(&mut m);
        for n in 0..2 {
            let found = domain(&m, n);
            assert_eq!(found.pointer(at).unwrap_or(&Value::Null), &want, "{at}");
        }
    }
    // SATA has 512-byte sectors only: such a disk is there after the first boot.
    let mut m = full();
    m.disks[1].sector_size = 4096;
    let disks = |n: usize| {
        domain(&m, n)["devices"]["disks"]
            .as_array()
            .unwrap()
            .clone()
    };
    let names = |list: &[Value]| {
        let names = list.iter().map(|d| d["name"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    assert_eq!(names(&disks(0)), ["disk-0", "probe"]);
    let last = disks(1);
    assert_eq!(names(&last), ["disk-0", "disk-1"]);
    assert_eq!(last[0]["blockSize"], Value::Null);
    assert_eq!(
        last[1]["blockSize"],
        json!({"custom": {"logical": 4096, "physical": 4096}})
    );
}

/// The network of the pods hands out an address of its own.
#[test]
fn kubevirt_warns_of_an_address_and_of_a_network_that_must_exist() {
    let mut m = machine();
    m.nics[0].source = NicSource::User;
    for (keeps, warned) in [(false, 0), (true, 1)] {
        m.nics[0].keeps_address = keeps;
        let found = warnings(Emit::Kubevirt, &m);
        assert_eq!(found.len(), warned, "{found:?}");
        assert!(found.iter().all(|w| w.contains("keeps its static address")));
    }
    let named = |network: &str| NicSource::Network(network.into());
    for (source, warned) in [
        (named("office"), true),
        (named("default"), false),
        (NicSource::Bridge(Bridge::named("br0")), false),
    ] {
        let mut m = machine();
        m.nics[0].source = source;
        let found = warnings(Emit::Kubevirt, &m);
        let exists = found
            .iter()
            .any(|w| w.contains("must exist before the VM starts"));
        assert_eq!(exists, warned, "{found:?}");
    }
}

/// KubeVirt wants the name of a time zone, which only the reader knows.
#[test]
fn kubevirt_names_the_time_zone_of_a_clock_in_local_time() {
    for (clock_utc, told) in [(false, true), (true, false)] {
        let mut m = full();
        m.clock_utc = clock_utc;
        for text in texts(Emit::Kubevirt, &m) {
            assert_eq!(text.contains("timezone"), told, "{text}");
        }
    }
    let mut m = full();
    m.bootstrap = None;
    let texts = texts(Emit::Kubevirt, &m);
    let [only] = &texts[..] else {
        panic!("{}", texts.len());
    };
    assert!(!only.contains("After the first boot"), "{only}");
    assert_eq!(only.matches(" start ").count(), 1, "{only}");
}
