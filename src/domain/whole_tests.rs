//! Whole VMs of several kinds: everything written for each of them, in every format. A root port is
//! left out of the XML; the snapshots beside `tests.rs` have them.

use std::path::Path;

use uuid::Uuid;

use super::element::Element;
use super::emit::{Context, documents, warnings};
use super::emit_tests::full;
use super::firmware::FirmwareImages;
use super::model::{Attachment, Bridge};
use super::tests::machine;
use super::xml::to_element;
use super::*;
use crate::types::Arch;

fn windows(major: u32, minor: u32, build: u32, server: bool) -> System {
    System::Windows(WindowsFacts {
        major,
        minor,
        build,
        arch: Arch::Amd64,
        server,
    })
}

fn images(format: &str, secure_boot: bool) -> FirmwareChoice {
    FirmwareChoice::Images(FirmwareImages {
        code: format!("/fw/code.{format}").into(),
        code_format: format.into(),
        vars: format!("/fw/vars.{format}").into(),
        vars_format: format.into(),
        secure_boot,
        smm: secure_boot,
    })
}

/// More disks, with the size and the serial number of their place.
fn disks(m: &mut Machine, count: usize) {
    for n in m.disks.len()..count {
        m.disks.push(Disk {
            path: format!("/vm/data-{n}.raw").into(),
            format: DiskFormat::Raw,
            serial: Some(disk_serial(n)),
            sector_size: 512,
            system: false,
            boot_order: None,
            size_bytes: (n as u64) << 30,
            backing: Vec::new(),
        });
    }
}

fn nic(last: u8, source: NicSource) -> Nic {
    Nic::new(MacAddr::qemu([0, 0, last]), source)
}

fn all_drivers(netkvm: bool) -> Drivers {
    Drivers {
        agent: true,
        balloon: true,
        rng: true,
        netkvm,
    }
}

/// Secure Boot, a TPM, everything on SCSI, and a chain below a disk.
fn eleven() -> Machine {
    let mut m = machine();
    m.name = "w11".into();
    m.title = Some("Windows\n11".into());
    m.system = windows(10, 0, 22631, false);
    m.firmware = Firmware::Uefi { secure_boot: true };
    m.tpm = true;
    m.bus = DiskBus::VirtioScsi;
    m.drivers = all_drivers(true);
    (m.graphics, m.video) = (Graphics::Spice, Video::Qxl);
    (m.second_serial, m.serial_log) = (true, Some("/vm/w11.log".into()));
    (m.vcpus, m.memory_mib, m.clock_utc) = (12, 6144, true);
    m.topology = Some(Topology {
        sockets: 3,
        cores: 2,
        threads: 2,
    });
    disks(&mut m, 2);
    m.disks[1].boot_order = Some(2);
    let level = |path: &str, format: &str, socket| Backing {
        path: path.into(),
        format: format.into(),
        socket,
    };
    m.disks[0].backing = vec![
        level("/src/top.vmdk", "vmdk", false),
        level("/run/nbd.sock", "raw", true),
    ];
    let mut mapped = nic(2, NicSource::User);
    mapped.attachment = Some(Attachment {
        namespace: "prod".into(),
        name: "lan".into(),
    });
    let bridge = |name: &str, vlan| Bridge {
        name: name.into(),
        vlan,
    };
    mapped.proxmox = Some(bridge("vmbr3", Some(30)));
    let mut down = nic(4, NicSource::Network("office".into()));
    (down.link_up, down.network) = (false, Some("VM Network".into()));
    let mut kept = nic(5, NicSource::User);
    (kept.keeps_address, kept.network) = (true, Some("VM Network".into()));
    m.nics = vec![
        nic(1, NicSource::Bridge(bridge("br0", Some(20)))),
        mapped,
        kept,
        down,
        nic(3, NicSource::Network("office".into())),
    ];
    m
}

/// Four disks on IDE, of which the driver ISO leaves three.
fn xp() -> Machine {
    let mut m = machine();
    m.name = "xp".into();
    m.system = windows(5, 1, 2600, false);
    (m.firmware, m.nvram) = (Firmware::Bios, None);
    m.bootstrap = Some(DiskBus::Ide);
    disks(&mut m, 4);
    m
}

/// Without Hyper-V on UEFI, with a disk of 4096 bytes and no display.
fn seven() -> Machine {
    let mut m = machine();
    m.name = "w7".into();
    m.system = windows(6, 1, 7601, false);
    m.cpu = CpuMode::HostModel;
    m.drivers = all_drivers(false);
    (m.graphics, m.video) = (Graphics::None, Video::Virtio);
    m.emulator = Some("/opt/qemu".into());
    m.driver_iso = None;
    disks(&mut m, 2);
    m.disks[1].sector_size = 4096;
    m.disks[1].path = "/dev/vg/data".into();
    m
}

/// Emulated, and on SATA for good.
fn linux() -> Machine {
    let mut m = machine();
    m.name = "deb".into();
    m.system = System::Linux {
        arch: Arch::Amd64,
        osinfo_id: None,
    };
    m.domain_type = DomainType::Qemu;
    m.bus = DiskBus::Sata;
    (m.bootstrap, m.probe, m.driver_iso) = (None, None, None);
    (m.firmware, m.nvram) = (Firmware::Bios, None);
    m.nics.clear();
    disks(&mut m, 5);
    m
}

/// Old machine type, SATA beside it, and more data disks than the first bus has room for.
fn server() -> Machine {
    let mut m = machine();
    m.name = "srv".into();
    m.system = windows(10, 0, 26100, true);
    m.machine_type = Some("pc-i440fx-8.2".into());
    m.genid = Some(Uuid::from_u128(9));
    m.serial = Some("S,1".into());
    m.drivers.netkvm = true;
    disks(&mut m, 12);
    (m.disks[0].boot_order, m.disks[3].boot_order) = (Some(2), Some(1));
    m
}

fn without_root_ports(domain: &Element) -> Element {
    let mut domain = domain.clone();
    for devices in domain.children.iter_mut().filter(|e| e.is("devices")) {
        let is_port = |e: &Element| e.attr("model") == Some("pcie-root-port");
        devices.children.retain(|e| !is_port(e));
    }
    domain
}

fn shown(
    m: &Machine,
    firmware: &FirmwareChoice,
    options: &kubevirt::Options,
    head: bool,
) -> String {
    let mut text = String::new();
    let mut domains = Vec::new();
    for stage in [Stage::Bootstrap, Stage::Final] {
        text.push_str(&format!("=== {}\n", stage.as_str()));
        match to_element(m, stage, firmware) {
            Ok(domain) => {
                text.push_str(&without_root_ports(&domain).to_document());
                domains.push((stage, domain));
            }
            Err(error) => text.push_str(&format!("{error}\n")),
        }
    }
    let context = Context {
        folder: Path::new("/vm"),
        kubevirt: options,
    };
    for emit in [Emit::Kubevirt, Emit::Proxmox, Emit::Qemu] {
        match documents(emit, m, &domains, context) {
            Ok(list) => {
                for document in list {
                    let shown = match document.text.split_once("\ncreate() {") {
                        Some((_, rest)) if !head => format!("...\ncreate() {{{rest}"),
                        _ => document.text,
                    };
                    text.push_str(&format!("=== {}\n{shown}", document.suffix));
                }
            }
            Err(error) => text.push_str(&format!("=== {emit:?}\n{error}\n")),
        }
        for warning in warnings(emit, m) {
            text.push_str(&format!("! {warning}\n"));
        }
    }
    text
}

#[test]
fn everything_that_is_written_for_a_vm() {
    let portable = FirmwareChoice::Portable { secure_boot: false };
    let secure = FirmwareChoice::Portable { secure_boot: true };
    let plain = kubevirt::Options::default();
    let every = kubevirt::Options {
        namespace: Some("prod".into()),
        storage_class: Some("ceph".into()),
        access_mode: Some("ReadWriteMany"),
        instance_type: Some("namespaced/u1".parse().unwrap()),
        preference: Some("windows.11".parse().unwrap()),
    };
    for (name, m, firmware, options) in [
        ("whole-full", full(), images("raw", false), &plain),
        ("whole-w11", eleven(), secure, &every),
        ("whole-xp", xp(), FirmwareChoice::Bios, &plain),
        ("whole-w7", seven(), images("qcow2", false), &plain),
        ("whole-linux", linux(), FirmwareChoice::Bios, &plain),
        ("whole-server", server(), portable, &plain),
    ] {
        let head = name == "whole-w11";
        insta::assert_snapshot!(name, shown(&m, &firmware, options, head));
    }
    let mut m = eleven();
    m.bootstrap = None;
    let last = shown(&m, &images("raw", true), &plain, false);
    insta::assert_snapshot!("whole-w11-at-once", last);
}

/// Every condition of a VM, with what is said when it does not hold.
#[test]
fn what_is_wrong_with_a_vm_is_said_with_both_sides() {
    type Change = fn(&mut Machine);
    for (change, stage, message) in [
        (
            (|m| m.bootstrap = None) as Change,
            Stage::Bootstrap,
            "this VM has no bootstrap stage",
        ),
        (
            |m| m.disks[0].boot_order = None,
            Stage::Final,
            "0 disks are marked as the boot disk, and it must be exactly one",
        ),
        (
            |m| m.disks[0].system = false,
            Stage::Final,
            "0 disks are marked as the boot disk, and it must be exactly one",
        ),
        (
            |m| {
                disks(m, 2);
                m.disks[1].boot_order = Some(0);
            },
            Stage::Final,
            "place 0 in the boot order is not one disk's: places count from 1, each for one disk",
        ),
        (
            |m| m.disks[0].sector_size = 4096,
            Stage::Bootstrap,
            "/vm/win10.qcow2 has 4096-byte sectors, and QEMU's sata disks have 512: this disk cannot boot there",
        ),
        (
            |m| {
                (m.disks[0].sector_size, m.bus) = (4096, DiskBus::Ide);
            },
            Stage::Final,
            "/vm/win10.qcow2 has 4096-byte sectors, and QEMU's ide disks have 512: this disk cannot boot there",
        ),
        (
            |m| m.disks[0].sector_size = 513,
            Stage::Final,
            "/vm/win10.qcow2: a sector size of 513 bytes is not 512 or 4096",
        ),
        (
            |m| m.disks[0].path = "x".into(),
            Stage::Final,
            "x is not an absolute path, which libvirt requires",
        ),
        (
            |m| m.disks[0].path = "/x\u{1}".into(),
            Stage::Final,
            "\"/x\\u{1}\" cannot stand in libvirt's XML, which is text without control characters; rename it",
        ),
        (
            |m| m.disks[0].serial = Some(String::new()),
            Stage::Final,
            "disk serial \"\" is not 1 to 20 of letters, digits, blank and _ . + -",
        ),
        (
            |m| {
                m.bus = DiskBus::Sata;
                disks(m, 19);
            },
            Stage::Final,
            "19 disks on the sata bus, and at most 18 fit",
        ),
        (
            |m| {
                m.bus = DiskBus::Ide;
                disks(m, 5);
            },
            Stage::Final,
            "5 disks on the ide bus, and at most 4 fit",
        ),
        (
            |m| disks(m, 106),
            Stage::Final,
            "the VM needs 111 PCI slots, and q35 has 110",
        ),
        (
            |m| {
                m.machine_type = Some("pc".into());
                disks(m, 21);
            },
            Stage::Final,
            "the VM needs 26 PCI slots, and pc has 25",
        ),
        (
            |m| {
                m.topology = Some(Topology {
                    sockets: 1,
                    cores: 2,
                    threads: 3,
                });
            },
            Stage::Final,
            "4 vCPUs do not match 1 sockets x 2 cores x 3 threads",
        ),
        (
            |m| m.machine_type = Some("pc-q35".into()),
            Stage::Final,
            "\"pc-q35\" is not a machine type of QEMU like q35, pc or pc-q35-8.2",
        ),
        (
            |m| m.machine_type = Some("pc-q35-8,x=y".into()),
            Stage::Final,
            "\"pc-q35-8,x=y\" is not a machine type of QEMU like q35, pc or pc-q35-8.2",
        ),
        (
            |m| (m.machine_type, m.bootstrap) = (Some("q35".into()), Some(DiskBus::Ide)),
            Stage::Final,
            "q35 has no IDE controller for the first boot",
        ),
        (|m| m.memory_mib = 0, Stage::Final, "the VM has no memory"),
        (|m| m.vcpus = 0, Stage::Final, "the VM has no vCPUs"),
        (
            |m| {
                m.system = System::Linux {
                    arch: Arch::Arm64,
                    osinfo_id: None,
                };
            },
            Stage::Final,
            "a guest for arm64 does not run on an x86_64 VM",
        ),
        (
            |m| m.firmware = Firmware::Bios,
            Stage::Final,
            "the firmware chosen does not fit a BIOS guest",
        ),
        (
            |m| m.firmware = Firmware::Uefi { secure_boot: true },
            Stage::Final,
            "the firmware chosen does not fit a UEFI Secure Boot guest",
        ),
    ] {
        let mut m = machine();
        change(&mut m);
        let portable = FirmwareChoice::Portable { secure_boot: false };
        let error = to_element(&m, stage, &portable).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
    let mut m = machine();
    let error = to_element(&m, Stage::Final, &FirmwareChoice::Bios).unwrap_err();
    let message = "the firmware chosen does not fit a UEFI guest";
    assert_eq!(error.to_string(), message);
    (m.firmware, m.disks[0].sector_size) = (Firmware::Bios, 4096);
    let error = to_element(&m, Stage::Final, &FirmwareChoice::Bios).unwrap_err();
    let message =
        "/vm/win10.qcow2 has 4096-byte sectors, and only UEFI firmware boots from such a disk";
    assert_eq!(error.to_string(), message);
    // As many as fit are written, and each serial number of the longest length.
    let mut m = machine();
    disks(&mut m, 105);
    m.disks[0].serial = Some("aZ09-_.+ 1234567890x".into());
    let portable = FirmwareChoice::Portable { secure_boot: false };
    assert_eq!(to_element(&m, Stage::Final, &portable).map(drop), Ok(()));
}

/// One place is the driver ISO's or the probe's, if either is on the bus of the disks.
#[test]
fn proxmox_has_a_number_of_places_on_each_bus() {
    let script = |m: &Machine| proxmox::script(m, Path::new("/vm"));
    for (bus, bootstrap, fit, max, name) in [
        (DiskBus::VirtioBlk, Some(DiskBus::Sata), 16, 16, "virtio"),
        (DiskBus::VirtioScsi, Some(DiskBus::Sata), 30, 30, "scsi"),
        (DiskBus::VirtioScsi, None, 31, 31, "scsi"),
        (DiskBus::Sata, Some(DiskBus::Sata), 5, 5, "sata"),
        (DiskBus::Sata, None, 6, 6, "sata"),
        (DiskBus::Ide, Some(DiskBus::Ide), 3, 3, "ide"),
    ] {
        let mut m = machine();
        (m.bus, m.bootstrap) = (bus, bootstrap);
        disks(&mut m, fit);
        assert!(script(&m).is_ok(), "{bus:?} {bootstrap:?}");
        disks(&mut m, fit + 1);
        assert_eq!(
            script(&m).unwrap_err().to_string(),
            format!(
                "{} disks do not fit: Proxmox VE has {max} places on {name}, one for the driver ISO",
                fit + 1
            )
        );
    }
    let mut m = machine();
    m.disks[0].sector_size = 4096;
    let message = "Proxmox VE has no disks with 4096-byte sectors";
    assert_eq!(script(&m).unwrap_err().to_string(), message);
    m = machine();
    m.driver_iso = Some("/a,b.iso".into());
    let message = "Proxmox VE has no way to name a file with a comma in its path";
    assert_eq!(script(&m).unwrap_err().to_string(), message);
    let names = [Emit::Kubevirt, Emit::Proxmox, Emit::Qemu].map(|e| (e.name(), e.target()));
    assert_eq!(
        names,
        [
            ("kubevirt", "KubeVirt"),
            ("proxmox", "Proxmox VE"),
            ("qemu", "QEMU")
        ]
    );
}

/// The type of guest for which Proxmox tunes a VM.
#[test]
fn proxmox_knows_each_windows_by_its_own_name() {
    for (major, minor, build, server, name) in [
        (10, 0, 21999, false, "win10"),
        (10, 0, 22000, false, "win11"),
        (10, 0, 20347, true, "win10"),
        (10, 0, 20348, true, "win11"),
        (6, 3, 9600, true, "win8"),
        (6, 2, 9200, false, "win8"),
        (6, 1, 7601, true, "win7"),
        (6, 0, 6002, true, "w2k8"),
        (6, 0, 6002, false, "wvista"),
        (5, 2, 3790, true, "w2k3"),
        (5, 2, 3790, false, "wxp"),
        (5, 1, 2600, false, "wxp"),
        (5, 0, 2195, true, "w2k"),
    ] {
        let mut m = machine();
        m.system = windows(major, minor, build, server);
        let script = proxmox::script(&m, Path::new("/vm")).unwrap();
        let line = format!("--ostype {name} ");
        assert!(script.contains(&line), "{major}.{minor}.{build} {server}");
    }
}

/// Comments are commands to paste: what the source names must not end one.
#[test]
fn every_step_for_kubernetes_stays_a_comment() {
    let mut m = machine();
    m.name = "a\nrm b".into();
    m.disks[0].path = "/vm/c\nrm d.qcow2".into();
    let options = kubevirt::Options::default();
    for stage in [Stage::Bootstrap, Stage::Final] {
        let text = kubevirt::yaml(&m, stage, Path::new("/vm"), &options).unwrap();
        let (steps, _) = text.split_once("---\n").unwrap();
        assert!(steps.lines().all(|line| line.starts_with("# ")), "{steps}");
        assert!(steps.contains("'arm b-kubevirt-final.yaml'"), "{steps}");
    }
}

/// The disk of Windows is the first of the first bus and of the last, wherever the source has it.
#[test]
fn proxmox_has_the_disk_of_windows_first() {
    let mut m = machine();
    disks(&mut m, 2);
    m.disks.swap(0, 1);
    let script = proxmox::script(&m, Path::new("/vm")).unwrap();
    for line in [
        "import sata0 \"$here\"/'win10.qcow2'",
        "import sata1 \"$here\"/'data-1.raw'",
        "import virtio0 \"$here\"/'win10.qcow2'",
        "--boot order=virtio0 ",
    ] {
        assert!(script.contains(line), "{line} in\n{script}");
    }
}
