//! The matrix: every VM that can be written, read back as XML and validated by libvirt's own tools.

mod validators;
mod variants;

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::element::Element;
use super::firmware::FirmwareImages;
use super::model::Bridge;
use super::xml::{domain_name, target_name};
use super::*;
use crate::skip::skip;
use crate::types::Arch;

const BIOS: Firmware = Firmware::Bios;
const UEFI: Firmware = Firmware::Uefi { secure_boot: false };
const SECURE: Firmware = Firmware::Uefi { secure_boot: true };

/// Major, minor, build, server, name.
const WINDOWS: [(u32, u32, u32, bool, &str); 10] = [
    (5, 1, 2600, false, "xp"),
    (6, 1, 7601, false, "7"),
    (6, 1, 7601, true, "2k8r2"),
    (6, 3, 9600, true, "2k12r2"),
    (10, 0, 14393, true, "2k16"),
    (10, 0, 17763, true, "2k19"),
    (10, 0, 19045, false, "10"),
    (10, 0, 20348, true, "2k22"),
    (10, 0, 22631, false, "11"),
    (10, 0, 26100, true, "2k25"),
];

fn disk(path: &str, boot: bool) -> Disk {
    Disk {
        path: path.into(),
        format: DiskFormat::Qcow2,
        serial: Some("h2k-0".into()),
        sector_size: 512,
        system: boot,
        boot_order: boot.then_some(1),
        size_bytes: 1 << 30,
        backing: Vec::new(),
    }
}

fn windows(machine: &mut Machine) -> &mut WindowsFacts {
    match &mut machine.system {
        System::Windows(windows) => windows,
        System::Linux { .. } => panic!("not a Windows"),
    }
}

pub(crate) fn machine() -> Machine {
    Machine {
        name: "win10".into(),
        title: None,
        uuid: Uuid::from_u128(0x564d_1234_5678_9abc_def0_1234_5678_9abc),
        serial: None,
        genid: None,
        memory_mib: 4096,
        vcpus: 4,
        topology: None,
        firmware: UEFI,
        tpm: false,
        system: System::Windows(WindowsFacts {
            major: 10,
            minor: 0,
            build: 19045,
            arch: Arch::Amd64,
            server: false,
        }),
        clock_utc: false,
        disks: vec![disk("/vm/win10.qcow2", true)],
        nics: vec![Nic::new(
            "00:0C:29:AA:BB:01".parse().unwrap(),
            NicSource::Network("default".into()),
        )],
        bus: DiskBus::VirtioBlk,
        bootstrap: Some(DiskBus::Sata),
        probe: Some("/vm/win10-probe.qcow2".into()),
        driver_iso: Some("/vm/virtio-win.iso".into()),
        cpu: CpuMode::default(),
        domain_type: DomainType::Kvm,
        nvram: Some("/vm/win10_VARS.fd".into()),
        drivers: Drivers::default(),
        emulator: None,
        serial_log: None,
        second_serial: false,
        graphics: Graphics::Vnc,
        video: Video::Vga,
        machine_type: None,
    }
}

fn images(firmware: Firmware) -> FirmwareChoice {
    match firmware {
        Firmware::Bios => FirmwareChoice::Bios,
        Firmware::Uefi { secure_boot } => FirmwareChoice::Images(FirmwareImages {
            code: "/usr/share/OVMF/OVMF_CODE_4M.fd".into(),
            code_format: "raw".into(),
            vars: "/usr/share/OVMF/OVMF_VARS_4M.fd".into(),
            vars_format: "raw".into(),
            secure_boot,
            smm: secure_boot,
        }),
    }
}

struct Case {
    label: String,
    machine: Machine,
    stage: Stage,
    xml: String,
    root: Element,
}

fn matrix() -> Vec<Case> {
    let mut cases = Vec::new();
    for (major, minor, build, server, os) in WINDOWS {
        for firmware in [BIOS, UEFI, SECURE] {
            if (major < 6 && firmware != BIOS) || (major == 6 && firmware == SECURE) {
                continue;
            }
            for bus in [DiskBus::VirtioBlk, DiskBus::VirtioScsi] {
                for disks in 1..=2 {
                    let mut m = machine();
                    let n = cases.len();
                    m.name = format!("m{n}");
                    m.uuid = Uuid::from_u128(n as u128 + 1);
                    *windows(&mut m) = WindowsFacts {
                        major,
                        minor,
                        build,
                        arch: Arch::Amd64,
                        server,
                    };
                    (m.firmware, m.bus) = (firmware, bus);
                    m.nvram = (firmware != BIOS).then(|| format!("/vm/{n}.fd").into());
                    m.tpm = build >= 22000;
                    m.bootstrap = if major < 6 {
                        Some(DiskBus::Ide)
                    } else {
                        Some(DiskBus::Sata)
                    };
                    m.domain_type = if n % 3 == 0 {
                        DomainType::Qemu
                    } else {
                        DomainType::Kvm
                    };
                    let all = disks == 2;
                    m.drivers = Drivers {
                        agent: all,
                        balloon: all,
                        rng: all,
                        netkvm: all,
                    };
                    if all {
                        // The system disk need not be the first one.
                        m.disks.insert(0, disk("/vm/data.qcow2", false));
                        m.nics.push(Nic {
                            link_up: false,
                            ..Nic::new(
                                "00:0C:29:AA:BB:02".parse().unwrap(),
                                NicSource::Bridge(Bridge::named("br0")),
                            )
                        });
                        m.serial = Some("VMware-56 4d".into());
                        m.genid = Some(Uuid::from_u128(7));
                    }
                    for stage in [Stage::Bootstrap, Stage::Final] {
                        let xml = to_xml(&m, stage, &images(firmware)).unwrap();
                        cases.push(Case {
                            label: format!("{os} {firmware:?} {bus:?} {disks} {stage:?}"),
                            root: Element::parse(xml.as_bytes()).unwrap(),
                            machine: m.clone(),
                            stage,
                            xml,
                        });
                    }
                }
            }
        }
    }
    cases
}

fn disks_of(root: &Element) -> Vec<&Element> {
    root.path("devices").unwrap().all("disk").collect()
}

fn address(element: &Element) -> Vec<(String, String)> {
    element
        .first("address")
        .map(|a| a.attrs.clone())
        .unwrap_or_default()
}

/// Everything by which Windows identifies a PC, without the disks and the parts that depend on the
/// stage.
fn identity(root: &Element) -> Vec<String> {
    let mut facts = vec![];
    for path in [
        "uuid", "genid", "sysinfo", "os", "cpu", "clock", "features", "memory", "vcpu",
    ] {
        facts.push(format!("{path}: {:?}", root.first(path)));
    }
    let devices = root.path("devices").unwrap();
    for kind in [
        "tpm",
        "video",
        "memballoon",
        "rng",
        "channel",
        "panic",
        "controller",
    ] {
        facts.extend(devices.all(kind).map(|e| format!("{e:?}")));
    }
    for nic in devices.all("interface") {
        facts.push(format!("{:?} {:?}", nic.first("mac"), address(nic)));
    }
    facts
}

#[test]
fn both_stages_show_the_same_machine() {
    for pair in matrix().chunks(2) {
        let [first, last] = pair else { unreachable!() };
        assert_eq!((first.stage, last.stage), (Stage::Bootstrap, Stage::Final));
        assert_eq!(
            identity(&first.root),
            identity(&last.root),
            "{}",
            first.label
        );
        let mut serials: Vec<_> = disks_of(&first.root)
            .iter()
            .filter(|d| d.attr("device") == Some("disk"))
            .filter_map(|d| {
                Some((
                    d.first("source")?.attrs.clone(),
                    d.text_of("serial")?.to_owned(),
                ))
            })
            .filter(|(_, serial)| serial != "h2k-probe")
            .collect();
        serials.sort();
        let mut finals: Vec<_> = disks_of(&last.root)
            .iter()
            .filter_map(|d| {
                Some((
                    d.first("source")?.attrs.clone(),
                    d.text_of("serial")?.to_owned(),
                ))
            })
            .collect();
        finals.sort();
        assert_eq!(serials, finals, "{}", first.label);
    }
}

#[test]
fn disks_are_where_they_belong() {
    for case in matrix() {
        let (m, label) = (&case.machine, &case.label);
        let disks = disks_of(&case.root);
        let bus = |d: &Element| d.first("target").unwrap().attr("bus").unwrap().to_owned();
        let boot: Vec<_> = disks.iter().filter(|d| d.first("boot").is_some()).collect();
        assert_eq!(boot.len(), 1, "{label}");
        let source = boot[0].first("source").unwrap().attr("file");
        assert_eq!(source, Some("/vm/win10.qcow2"), "{label}");
        let final_bus = match m.bus {
            DiskBus::VirtioBlk => "virtio",
            DiskBus::VirtioScsi => "scsi",
            DiskBus::Sata => "sata",
            DiskBus::Ide => "ide",
        };
        let extra = match case.stage {
            Stage::Final => {
                assert!(disks.iter().all(|d| bus(d) == final_bus), "{label}");
                0
            }
            Stage::Bootstrap => {
                let early = if m.system.nt5() { "ide" } else { "sata" };
                let on_final: Vec<_> = disks.iter().filter(|d| bus(d) == final_bus).collect();
                assert_eq!(on_final.len(), 1, "{label}");
                let probe = on_final[0].first("source").unwrap().attr("file");
                assert_eq!(probe, Some("/vm/win10-probe.qcow2"), "{label}");
                let cdroms = disks.iter().filter(|d| d.attr("device") == Some("cdrom"));
                assert_eq!(cdroms.map(|d| bus(d)).collect::<Vec<_>>(), [early]);
                assert_eq!(
                    disks.iter().filter(|d| bus(d) == early).count(),
                    m.disks.len() + 1
                );
                2
            }
        };
        assert_eq!(disks.len(), m.disks.len() + extra, "{label}");
        // No two disks share a target name or an address.
        for fact in [
            disks
                .iter()
                .map(|d| format!("{:?}", d.first("target").unwrap().attr("dev")))
                .collect::<Vec<_>>(),
            disks
                .iter()
                .map(|d| format!("{} {:?}", bus(d), address(d)))
                .collect(),
        ] {
            let mut unique = fact.clone();
            unique.sort();
            unique.dedup();
            assert_eq!(unique.len(), fact.len(), "{label}: {fact:?}");
        }
    }
}

#[test]
fn the_probe_sits_where_the_boot_disk_will_be() {
    for pair in matrix().chunks(2) {
        let find = |case: &Case, file: &str| {
            disks_of(&case.root)
                .iter()
                .find(|d| d.first("source").and_then(|s| s.attr("file")) == Some(file))
                .map(|d| address(d))
                .unwrap()
        };
        let probe = find(&pair[0], "/vm/win10-probe.qcow2");
        let boot = find(&pair[1], "/vm/win10.qcow2");
        match pair[0].machine.bus {
            DiskBus::VirtioBlk => assert_eq!(probe, boot),
            DiskBus::VirtioScsi => assert_ne!(probe, boot),
            bus => unreachable!("no Windows ends on {}", bus.name()),
        }
    }
}

#[test]
fn values_by_windows_version() {
    for case in matrix() {
        let (m, root, label) = (&case.machine, &case.root, &case.label);
        let System::Windows(w) = &m.system else {
            continue;
        };
        let uefi = m.firmware != BIOS;
        let has = |path: &str| root.path(path).is_some();
        let kvm = m.domain_type == DomainType::Kvm;
        let hyperv = kvm && !w.nt5() && (w.at_least_8() || !uefi);
        assert_eq!(has("features/hyperv"), hyperv, "{label}");
        let timers = root.path("clock").unwrap();
        let hv_timer = timers
            .all("timer")
            .any(|t| t.attr("name") == Some("hypervclock"));
        assert_eq!(hv_timer, hyperv, "{label}");
        let panic = root.path("devices/panic").map(|p| p.attr("model").unwrap());
        let want = if hyperv {
            Some("hyperv")
        } else if kvm {
            None
        } else {
            Some("isa")
        };
        assert_eq!(panic, want, "{label}");
        let machine_type = root.path("os/type").unwrap().attr("machine");
        assert_eq!(
            machine_type,
            Some(if w.nt5() { "pc" } else { "q35" }),
            "{label}"
        );
        assert_eq!(has("os/loader"), uefi, "{label}");
        assert_eq!(has("features/smm"), m.firmware == SECURE, "{label}");
        assert_eq!(has("devices/tpm"), m.tpm && uefi, "{label}");
        let cpu = root.path("cpu").unwrap().attr("mode");
        assert_eq!(
            cpu,
            Some(if kvm { "host-passthrough" } else { "maximum" }),
            "{label}"
        );
        let topology = root.path("cpu/topology").unwrap();
        assert_eq!(
            (topology.attr("sockets"), topology.attr("cores")),
            (Some("1"), Some("4"))
        );
        let nic = root
            .path("devices/interface/model")
            .unwrap()
            .attr("type")
            .unwrap();
        let want = match case.stage {
            Stage::Final => "virtio",
            Stage::Bootstrap if m.drivers.netkvm => "virtio",
            Stage::Bootstrap if w.nt5() => "rtl8139",
            Stage::Bootstrap if !w.at_least_8() => "e1000",
            Stage::Bootstrap => "e1000e",
        };
        assert_eq!(nic, want, "{label}");
        let links: Vec<_> = root
            .path("devices")
            .unwrap()
            .all("interface")
            .map(|i| i.first("link").is_some())
            .collect();
        assert_eq!(
            links,
            m.nics.iter().map(|n| !n.link_up).collect::<Vec<_>>(),
            "{label}"
        );
        assert_eq!(has("devices/channel"), m.drivers.agent, "{label}");
        assert_eq!(has("devices/rng"), m.drivers.rng, "{label}");
        let balloon = root.path("devices/memballoon").unwrap().attr("model");
        assert_eq!(
            balloon,
            Some(if m.drivers.balloon { "virtio" } else { "none" }),
            "{label}"
        );
    }
}

#[test]
fn snapshots() {
    let mut m = machine();
    insta::assert_snapshot!(
        "w10-uefi-blk-bootstrap",
        to_xml(&m, Stage::Bootstrap, &images(UEFI)).unwrap()
    );
    m.drivers = Drivers {
        agent: true,
        balloon: true,
        rng: true,
        netkvm: true,
    };
    insta::assert_snapshot!(
        "w10-uefi-blk-final",
        to_xml(&m, Stage::Final, &images(UEFI)).unwrap()
    );
    let mut m = machine();
    let w = windows(&mut m);
    (w.minor, w.major, w.build) = (1, 6, 7601);
    (m.firmware, m.bus, m.nvram) = (BIOS, DiskBus::VirtioScsi, None);
    m.disks.push(disk("/dev/vg/data", false));
    insta::assert_snapshot!(
        "w7-bios-scsi-bootstrap",
        to_xml(&m, Stage::Bootstrap, &FirmwareChoice::Bios).unwrap()
    );
    insta::assert_snapshot!(
        "w7-bios-scsi-final",
        to_xml(&m, Stage::Final, &FirmwareChoice::Bios).unwrap()
    );
}

#[test]
fn four_k_sectors() {
    let mut m = machine();
    m.disks[0].sector_size = 4096;
    assert_eq!(
        to_xml(&m, Stage::Bootstrap, &images(UEFI)),
        Err(DomainError::SectorSize {
            path: "/vm/win10.qcow2".into(),
            sector_size: 4096,
            bus: "sata"
        })
    );
    m.bootstrap = None;
    let xml = to_xml(&m, Stage::Final, &images(UEFI)).unwrap();
    let root = Element::parse(xml.as_bytes()).unwrap();
    let blockio = root.path("devices/disk/blockio").unwrap();
    assert_eq!(blockio.attr("logical_block_size"), Some("4096"));
    m.firmware = BIOS;
    let error = to_xml(&m, Stage::Final, &FirmwareChoice::Bios).unwrap_err();
    assert!(
        matches!(error, DomainError::BiosSectorSize { .. }),
        "{error}"
    );
    m.disks[0].sector_size = 520;
    let error = to_xml(&m, Stage::Final, &FirmwareChoice::Bios).unwrap_err();
    assert!(
        matches!(error, DomainError::BadSectorSize { .. }),
        "{error}"
    );
}

#[test]
fn refusals() {
    type Change = fn(&mut Machine);
    let cases: [(Change, &str); 17] = [
        (
            |m| m.machine_type = Some("virt".into()),
            "not a machine type",
        ),
        (
            |m| m.machine_type = Some("q35 ".into()),
            "not a machine type",
        ),
        (
            |m| {
                m.machine_type = Some("pc-q35-8.2".into());
                m.bootstrap = Some(DiskBus::Ide);
            },
            "no IDE controller",
        ),
        (|m| m.bootstrap = None, "no bootstrap stage"),
        (|m| m.disks.clear(), "0 disks are marked"),
        (|m| m.disks.push(disk("/b", true)), "2 disks are marked"),
        (
            |m| m.disks[0].path = "a.qcow2".into(),
            "not an absolute path",
        ),
        (
            |m| m.disks[0].path = "/a\nb".into(),
            "cannot stand in libvirt's XML",
        ),
        (|m| m.probe = Some("probe".into()), "not an absolute path"),
        (|m| m.disks[0].serial = Some("a,b".into()), "disk serial"),
        (|m| m.disks[0].serial = Some("x".repeat(21)), "disk serial"),
        (|m| m.memory_mib = 0, "no memory"),
        (|m| m.vcpus = 0, "no vCPUs"),
        (
            |m| {
                m.topology = Some(Topology {
                    sockets: 2,
                    cores: 4,
                    threads: 1,
                })
            },
            "4 vCPUs do not match 2",
        ),
        (
            |m| {
                m.topology = Some(Topology {
                    sockets: u32::MAX,
                    cores: u32::MAX,
                    threads: 4,
                })
            },
            "do not match",
        ),
        (|m| windows(m).arch = Arch::Arm64, "guest for arm64"),
        (
            |m| m.firmware = SECURE,
            "does not fit a UEFI Secure Boot guest",
        ),
    ];
    for (change, want) in cases {
        let mut m = machine();
        change(&mut m);
        let error = to_xml(&m, Stage::Bootstrap, &images(UEFI))
            .unwrap_err()
            .to_string();
        assert!(error.contains(want), "{want}: {error}");
    }
    let mut m = machine();
    m.disks
        .extend((0..16).map(|n| disk(&format!("/d{n}"), false)));
    let xml = to_xml(&m, Stage::Bootstrap, &images(UEFI)).unwrap();
    let root = Element::parse(xml.as_bytes()).unwrap();
    let sata = root
        .path("devices")
        .unwrap()
        .all("controller")
        .filter(|c| c.attr("type") == Some("sata"));
    assert_eq!(sata.count(), 3);
}

/// The `<disk>` elements of a stage: source, bus, name, address.
fn places(m: &Machine, stage: Stage) -> Vec<[String; 4]> {
    let xml = to_xml(m, stage, &images(UEFI)).unwrap();
    let root = Element::parse(xml.as_bytes()).unwrap();
    let disks = root.path("devices").unwrap().all("disk");
    disks
        .map(|d| {
            let source = d.path("source").unwrap().attr("file").unwrap();
            let target = d.path("target").unwrap();
            let address: Vec<String> = d
                .path("address")
                .unwrap()
                .attrs
                .iter()
                .map(|(k, v)| format!("{k}={v}"))
                .collect();
            [
                source.to_string(),
                target.attr("bus").unwrap().to_string(),
                target.attr("dev").unwrap().to_string(),
                address.join(" "),
            ]
        })
        .collect()
}

#[test]
fn data_disks_without_a_place_on_the_first_bus_are_on_virtio() {
    use std::collections::BTreeSet;
    for (bootstrap, first, fit) in [
        (Some(DiskBus::Sata), "sata", 17),
        (Some(DiskBus::Ide), "ide", 3),
    ] {
        for (storage, bus) in [
            (DiskBus::VirtioBlk, "virtio"),
            (DiskBus::VirtioScsi, "scsi"),
        ] {
            for count in [fit, fit + 1, 19] {
                let mut m = machine();
                m.bus = storage;
                m.bootstrap = bootstrap;
                m.disks = (0..count)
                    .map(|n| disk(&format!("/d{n}"), n == 0))
                    .collect();
                let before = places(&m, Stage::Bootstrap);
                let after = places(&m, Stage::Final);
                for part in [2, 3] {
                    let distinct: BTreeSet<&String> = before.iter().map(|p| &p[part]).collect();
                    assert_eq!(distinct.len(), before.len(), "{before:?}");
                }
                let data = before.iter().filter(|p| p[0].starts_with("/d"));
                let (on_first, early): (Vec<_>, Vec<_>) = data.partition(|p| p[1] == first);
                assert_eq!(on_first.len(), fit, "{count}");
                assert_eq!(early.len(), count - fit);
                for place in early {
                    assert_eq!(place[1], bus);
                    let end = after.iter().find(|p| p[0] == place[0]).unwrap();
                    assert_eq!((&end[1], &end[3]), (&place[1], &place[3]), "{count}");
                }
            }
        }
    }
}

/// The driver ISO takes a place of the first bus, and only where there is one.
#[test]
fn without_a_driver_image_all_places_of_the_first_bus_are_for_disks() {
    for (bootstrap, first, fit) in [(DiskBus::Sata, "sata", 18), (DiskBus::Ide, "ide", 4)] {
        let mut m = machine();
        m.bootstrap = Some(bootstrap);
        m.driver_iso = None;
        m.disks = (0..fit).map(|n| disk(&format!("/d{n}"), n == 0)).collect();
        let places = places(&m, Stage::Bootstrap);
        let data = places.iter().filter(|p| p[0].starts_with("/d"));
        assert_eq!(data.filter(|p| p[1] == first).count(), fit);
    }
}

#[test]
fn virtio_scsi_has_room_for_more_than_there_are_slots() {
    let mut m = machine();
    m.disks
        .extend((0..119).map(|n| disk(&format!("/d{n}"), false)));
    let error = to_xml(&m, Stage::Final, &images(UEFI)).unwrap_err();
    assert!(
        matches!(error, DomainError::TooManyDevices { .. }),
        "{error}"
    );
    m.bus = DiskBus::VirtioScsi;
    assert_eq!(places(&m, Stage::Final).len(), 120);
}

#[test]
fn hostile_names_and_paths() {
    let nasty = "a&b<c>\"d'e\u{1}\u{7f}/../\nf]]>\u{ffff}";
    let mut m = machine();
    m.name = nasty.into();
    m.disks[0].path = "/vm/a&b<c>\"d'e/ü.qcow2".into();
    m.nics[0].source = NicSource::Network(nasty.into());
    m.serial = Some(nasty.into());
    let xml = to_xml(&m, Stage::Final, &images(UEFI)).unwrap();
    assert!(
        xml.chars()
            .all(|c| c == '\n' || !c.is_control() || c == '\u{7f}')
    );
    let root = Element::parse(xml.as_bytes()).unwrap();
    assert_eq!(root.text_of("name"), Some("a&b<c>\"d'e-..-f]]>"));
    let source = root.path("devices/disk/source").unwrap();
    assert_eq!(source.attr("file"), Some("/vm/a&b<c>\"d'e/ü.qcow2"));
    for (name, want) in [
        ("", "vm"),
        ("..", "vm"),
        (" \t ", "vm"),
        ("  x ", "x"),
        ("a/b", "a-b"),
    ] {
        assert_eq!(domain_name(name), want);
    }
    assert_eq!(domain_name(&"é".repeat(300)).len(), 200);
}

#[test]
fn target_names() {
    for (n, want) in [
        (0, "vda"),
        (25, "vdz"),
        (26, "vdaa"),
        (51, "vdaz"),
        (52, "vdba"),
        (702, "vdaaa"),
    ] {
        assert_eq!(target_name("vd", n), want);
    }
}

/// A build that requires SMM is protected by it, whether its variables have keys or not
/// (docs/interop/firmware.json of QEMU: `requires-smm`).
#[test]
fn firmware_that_needs_smm_is_secure_with_and_without_keys() {
    for (firmware, smm) in [(UEFI, false), (UEFI, true), (SECURE, true)] {
        let mut m = machine();
        m.firmware = firmware;
        let FirmwareChoice::Images(mut images) = images(firmware) else {
            panic!("{firmware:?}");
        };
        images.smm = smm;
        let xml = to_xml(&m, Stage::Final, &FirmwareChoice::Images(images)).unwrap();
        let root = Element::parse(xml.as_bytes()).unwrap();
        let secure = root.path("os/loader").unwrap().attr("secure");
        assert_eq!(secure, smm.then_some("yes"), "{firmware:?}");
        assert_eq!(root.path("features/smm").is_some(), smm, "{firmware:?}");
    }
}

/// Keys enable Secure Boot for a guest that never had it, and their absence disables it.
#[test]
fn firmware_with_other_keys_than_the_guest_had_is_refused() {
    for (guest, firmware, fits) in [
        (UEFI, images(UEFI), true),
        (SECURE, images(SECURE), true),
        (UEFI, images(SECURE), false),
        (SECURE, images(UEFI), false),
        (UEFI, FirmwareChoice::Portable { secure_boot: true }, false),
        (
            SECURE,
            FirmwareChoice::Portable { secure_boot: false },
            false,
        ),
        (UEFI, FirmwareChoice::Bios, false),
        (BIOS, images(UEFI), false),
    ] {
        let mut m = machine();
        m.firmware = guest;
        let written = to_xml(&m, Stage::Final, &firmware);
        assert_eq!(written.is_ok(), fits, "{guest:?} {firmware:?}");
    }
}

/// Firmware that checks signatures keeps its keys in memory that only SMM can write.
#[test]
fn portable_xml_has_smm_exactly_with_secure_boot() {
    for secure_boot in [false, true] {
        let mut m = machine();
        m.firmware = Firmware::Uefi { secure_boot };
        let portable = FirmwareChoice::Portable { secure_boot };
        for stage in [Stage::Bootstrap, Stage::Final] {
            let xml = to_xml(&m, stage, &portable).unwrap();
            let root = Element::parse(xml.as_bytes()).unwrap();
            let smm = root.path("features/smm").and_then(|smm| smm.attr("state"));
            assert_eq!(smm, secure_boot.then_some("on"), "{stage:?}");
        }
    }
}
