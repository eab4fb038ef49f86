//! Each choice of a VM that changes what is written, alone.

use super::super::emit::Emit;
use super::super::model::{Backing, Bridge, disk_serial};
use super::super::xml::to_element;
use super::*;

type Change = fn(&mut Machine);

fn tree(m: &Machine, stage: Stage) -> Element {
    to_element(m, stage, &images(m.firmware)).unwrap()
}

fn texts_of<'e>(root: &'e Element, path: &str, attribute: &str) -> Option<&'e str> {
    let element = match path {
        "" => root,
        path => root.path(path)?,
    };
    match attribute {
        "" => Some(&element.text),
        name => element.attr(name),
    }
}

/// libosinfo's ids, at the builds where one release ends and the next begins.
#[test]
fn every_windows_has_the_name_libosinfo_has_for_it() {
    for (major, minor, build, server, id) in [
        (10, 0, 10240, false, "10"),
        (10, 0, 21999, false, "10"),
        (10, 0, 22000, false, "11"),
        (10, 0, 14393, true, "2k16"),
        (10, 0, 17762, true, "2k16"),
        (10, 0, 17763, true, "2k19"),
        (10, 0, 20347, true, "2k19"),
        (10, 0, 20348, true, "2k22"),
        (10, 0, 26099, true, "2k22"),
        (10, 0, 26100, true, "2k25"),
        (6, 3, 9600, false, "8.1"),
        (6, 3, 9600, true, "2k12r2"),
        (6, 2, 9200, false, "8"),
        (6, 2, 9200, true, "2k12"),
        (6, 1, 7601, false, "7"),
        (6, 1, 7601, true, "2k8r2"),
        (6, 0, 6002, false, "vista"),
        (6, 0, 6002, true, "2k8"),
        (5, 2, 3790, false, "xp"),
        (5, 2, 3790, true, "2k3"),
        (5, 1, 2600, false, "xp"),
        (5, 0, 2195, false, "2k"),
        (5, 0, 2195, true, "2k"),
    ] {
        let facts = WindowsFacts {
            major,
            minor,
            build,
            arch: Arch::Amd64,
            server,
        };
        let expected = format!("http://microsoft.com/win/{id}");
        assert_eq!(
            facts.osinfo_id(),
            expected,
            "{major}.{minor}.{build} {server}"
        );
        let recent = (major, minor) >= (6, 2);
        assert_eq!(facts.at_least_8(), recent);
        assert_eq!(facts.nt5(), major == 5);
    }
}

fn linux(m: &mut Machine) {
    m.system = System::Linux {
        arch: Arch::Amd64,
        osinfo_id: Some("http://debian.org/debian/12".into()),
    };
}

fn nt(major: u32, minor: u32) -> impl Fn(&mut Machine) {
    move |m| (windows(m).major, windows(m).minor) = (major, minor)
}

#[test]
fn the_chipset_is_as_asked_for_else_what_the_guest_can_drive() {
    for (change, chipset, machine_type) in [
        ((|_| {}) as Change, Chipset::Q35, "q35"),
        (linux, Chipset::Q35, "q35"),
        (|m| nt(5, 2)(m), Chipset::Pc, "pc"),
        (|m| nt(6, 0)(m), Chipset::Q35, "q35"),
        (|m| m.bootstrap = Some(DiskBus::Ide), Chipset::Pc, "pc"),
        (|m| m.bootstrap = None, Chipset::Q35, "q35"),
        (
            |m| m.machine_type = Some("pc-i440fx-8.2".into()),
            Chipset::Pc,
            "pc-i440fx-8.2",
        ),
        (
            |m| {
                nt(5, 2)(m);
                m.machine_type = Some("pc-q35-8.2".into());
            },
            Chipset::Q35,
            "pc-q35-8.2",
        ),
    ] {
        let mut m = machine();
        change(&mut m);
        assert_eq!((m.chipset(), m.machine_type()), (chipset, machine_type));
    }
}

/// UEFI before Windows 8 hangs with the enlightenments, NT 5 and Linux do not know them.
#[test]
fn a_hyper_v_is_shown_to_a_windows_that_gains_from_it() {
    for (change, firmware, kvm, shown) in [
        ((|_| {}) as Change, UEFI, true, true),
        (|_| {}, BIOS, true, true),
        (|_| {}, UEFI, false, false),
        (|m| nt(6, 2)(m), UEFI, true, true),
        (|m| nt(6, 1)(m), UEFI, true, false),
        (|m| nt(6, 1)(m), BIOS, true, true),
        (|m| nt(5, 2)(m), BIOS, true, false),
        (linux, BIOS, true, false),
    ] {
        let mut m = machine();
        change(&mut m);
        m.firmware = firmware;
        if !kvm {
            m.domain_type = DomainType::Qemu;
        }
        assert_eq!(m.enlightened(), shown, "{:?} {firmware:?} {kvm}", m.system);
    }
}

#[test]
fn the_nic_of_the_first_boot_is_one_the_guest_has_a_driver_for() {
    for (change, netkvm, first) in [
        ((|_| {}) as Change, false, "e1000e"),
        (|_| {}, true, "virtio"),
        (linux, false, "e1000e"),
        (|m| nt(6, 2)(m), false, "e1000e"),
        (|m| nt(6, 1)(m), false, "e1000"),
        (|m| nt(5, 1)(m), false, "rtl8139"),
    ] {
        let mut m = machine();
        change(&mut m);
        m.drivers.netkvm = netkvm;
        let models = [Stage::Bootstrap, Stage::Final].map(|stage| m.nic_model(stage));
        assert_eq!(models, [first, "virtio"], "{:?}", m.system);
    }
}

/// One thing said of the VM, and where it stands in the XML of which stages.
#[test]
fn what_is_said_of_the_vm_stands_in_its_xml() {
    let both = [Stage::Bootstrap, Stage::Final];
    for (change, path, attribute, value, usual) in [
        (
            (|m| m.cpu = CpuMode::HostModel) as Change,
            "cpu",
            "mode",
            "host-model",
            Some("host-passthrough"),
        ),
        (
            |m| m.cpu = CpuMode::HostModel,
            "cpu",
            "check",
            "partial",
            Some("none"),
        ),
        (
            |m| m.domain_type = DomainType::Qemu,
            "cpu",
            "mode",
            "maximum",
            Some("host-passthrough"),
        ),
        (
            |m| m.domain_type = DomainType::Qemu,
            "",
            "type",
            "qemu",
            Some("kvm"),
        ),
        (
            |m| m.domain_type = DomainType::Qemu,
            "devices/panic",
            "model",
            "isa",
            Some("hyperv"),
        ),
        (linux, "devices/panic", "model", "isa", Some("hyperv")),
        (
            linux,
            "metadata/libosinfo/os",
            "id",
            "http://debian.org/debian/12",
            Some("http://microsoft.com/win/10"),
        ),
        (
            |m| m.clock_utc = true,
            "clock",
            "offset",
            "utc",
            Some("localtime"),
        ),
        (
            |m| m.title = Some("two\r\nlines".into()),
            "title",
            "",
            "two  lines",
            None,
        ),
        (
            |m| m.genid = Some(Uuid::from_u128(7)),
            "genid",
            "",
            "00000000-0000-0000-0000-000000000007",
            None,
        ),
        (
            |m| m.serial = Some("VMware-1".into()),
            "sysinfo/system/entry",
            "",
            "VMware-1",
            None,
        ),
        (
            |m| m.serial = Some("VMware-1".into()),
            "os/smbios",
            "mode",
            "sysinfo",
            None,
        ),
        (
            |m| m.emulator = Some("/opt/qemu".into()),
            "devices/emulator",
            "",
            "/opt/qemu",
            None,
        ),
        (
            |m| m.serial_log = Some("/vm/serial.log".into()),
            "devices/serial/source",
            "path",
            "/vm/serial.log",
            None,
        ),
        (
            |m| m.serial_log = Some("/vm/serial.log".into()),
            "devices/serial/source",
            "append",
            "off",
            None,
        ),
        (
            |m| m.graphics = Graphics::None,
            "devices/graphics",
            "type",
            "",
            Some("vnc"),
        ),
        (
            |m| m.graphics = Graphics::Spice,
            "devices/graphics",
            "type",
            "spice",
            Some("vnc"),
        ),
        (
            |m| m.video = Video::Qxl,
            "devices/video/model",
            "type",
            "qxl",
            Some("vga"),
        ),
        (
            |m| m.video = Video::Virtio,
            "devices/video/model",
            "type",
            "virtio",
            Some("vga"),
        ),
        (|m| m.tpm = true, "devices/tpm", "model", "tpm-crb", None),
        (
            |m| {
                let br0 = Bridge {
                    name: "br0".into(),
                    vlan: Some(12),
                };
                m.nics[0].source = NicSource::Bridge(br0);
            },
            "devices/interface/vlan/tag",
            "id",
            "12",
            None,
        ),
        (
            |m| m.nics[0].source = NicSource::User,
            "devices/interface",
            "type",
            "user",
            Some("network"),
        ),
        (|m| m.memory_mib = 3, "memory", "", "3072", Some("4194304")),
        (
            |m| {
                m.topology = Some(Topology {
                    sockets: 2,
                    cores: 1,
                    threads: 2,
                });
            },
            "cpu/topology",
            "threads",
            "2",
            Some("1"),
        ),
    ] {
        for stage in both {
            let before = tree(&machine(), stage);
            assert_eq!(
                texts_of(&before, path, attribute),
                usual,
                "{path} {stage:?}"
            );
            let mut m = machine();
            change(&mut m);
            let after = tree(&m, stage);
            let found = texts_of(&after, path, attribute);
            let expected = Some(value).filter(|value| !value.is_empty());
            assert_eq!(found, expected, "{path} {stage:?}");
        }
    }
    // COM1 of a guest that keeps it is there besides.
    for (second_serial, ports) in [(false, &["0"][..]), (true, &["0", "1"])] {
        let mut m = machine();
        m.second_serial = second_serial;
        let root = tree(&m, Stage::Bootstrap);
        let serials = root.path("devices").unwrap().all("serial");
        let found: Vec<_> = serials
            .map(|s| texts_of(s, "target", "port").unwrap())
            .collect();
        assert_eq!(found, ports);
    }
}

/// Older libvirt knows no format of firmware, and needs none for raw images.
#[test]
fn the_format_of_firmware_is_named_where_it_is_not_raw() {
    for (code, vars) in [("raw", "raw"), ("qcow2", "raw"), ("raw", "qcow2")] {
        let FirmwareChoice::Images(mut images) = images(UEFI) else {
            panic!();
        };
        (images.code_format, images.vars_format) = (code.into(), vars.into());
        let root = to_element(&machine(), Stage::Final, &FirmwareChoice::Images(images)).unwrap();
        let named = |format: &'static str| Some(format).filter(|f| *f != "raw");
        assert_eq!(texts_of(&root, "os/loader", "format"), named(code));
        assert_eq!(texts_of(&root, "os/nvram", "format"), named(vars));
        assert_eq!(texts_of(&root, "os/nvram", "templateFormat"), named(vars));
        assert_eq!(texts_of(&root, "os/nvram", ""), Some("/vm/win10_VARS.fd"));
    }
}

/// libvirt probes nothing: each level is named with its format, and the source keeps owner and label.
#[test]
fn a_chain_is_written_level_by_level() {
    let level = |path: &str, format: &str, socket| Backing {
        path: path.into(),
        format: format.into(),
        socket,
    };
    let mut m = machine();
    m.disks[0].backing = vec![
        level("/src/top.vmdk", "vmdk", false),
        level("/dev/vg/base", "raw", false),
        level("/run/nbd.sock", "raw", true),
    ];
    let root = tree(&m, Stage::Final);
    let disk = disks_of(&root)[0];
    let mut below = disk.first("backingStore").unwrap();
    for (kind, format, attribute, path) in [
        ("file", "vmdk", "file", "/src/top.vmdk"),
        ("block", "raw", "dev", "/dev/vg/base"),
    ] {
        assert_eq!(below.attr("type"), Some(kind));
        assert_eq!(texts_of(below, "format", "type"), Some(format));
        let source = below.first("source").unwrap();
        assert_eq!(source.attr(attribute), Some(path));
        let labels: Vec<_> = source
            .all("seclabel")
            .map(|label| (label.attr("model"), label.attr("relabel")))
            .collect();
        let keep = |model| (Some(model), Some("no"));
        assert_eq!(labels, [keep("dac"), keep("selinux")]);
        below = below.first("backingStore").unwrap();
    }
    assert_eq!(below.attr("type"), Some("network"));
    assert_eq!(texts_of(below, "source", "protocol"), Some("nbd"));
    assert_eq!(texts_of(below, "source/host", "transport"), Some("unix"));
    assert_eq!(
        texts_of(below, "source/host", "socket"),
        Some("/run/nbd.sock")
    );
    let end = below.first("backingStore").unwrap();
    assert!(end.attrs.is_empty() && end.children.is_empty(), "{end:?}");
    for key in super::super::xml::POLICIES {
        assert_eq!(texts_of(disk, "driver", key), Some("stop"), "{key}");
    }
    // A disk that stands alone has neither.
    let root = tree(&machine(), Stage::Final);
    let alone = disks_of(&root)[0];
    assert!(alone.first("backingStore").is_none());
    assert_eq!(texts_of(alone, "driver", "error_policy"), None);
    assert_eq!(texts_of(alone, "driver", "io"), Some("threads"));
}

/// Linux AIO pays off on block devices only; what is in memory below /dev is none.
#[test]
fn a_file_below_dev_shm_is_no_block_device() {
    let mut m = machine();
    for (path, kind, io) in [
        ("/dev/vg/win10", "block", "native"),
        ("/dev/shm/win10.qcow2", "file", "threads"),
        ("/device/win10.qcow2", "file", "threads"),
    ] {
        m.disks[0].path = path.into();
        let root = tree(&m, Stage::Final);
        let disk = disks_of(&root)[0];
        assert_eq!(disk.attr("type"), Some(kind), "{path}");
        assert_eq!(texts_of(disk, "driver", "io"), Some(io), "{path}");
    }
}

/// Linux on SATA for good: there is no VirtIO to probe for, and so many disks as the controllers have ports.
#[test]
fn a_vm_that_stays_on_sata_has_no_probe_and_at_most_eighteen_disks() {
    let mut m = machine();
    linux(&mut m);
    m.bus = DiskBus::Sata;
    let root = tree(&m, Stage::Bootstrap);
    let targets: Vec<_> = disks_of(&root)
        .iter()
        .map(|d| texts_of(d, "target", "bus").unwrap())
        .collect();
    assert!(targets.iter().all(|bus| *bus == "sata"), "{targets:?}");
    for (disks, controllers) in [(1, 1), (6, 1), (7, 2), (18, 3)] {
        m.disks.truncate(1);
        m.disks
            .extend((1..disks).map(|n| disk(&format!("/d{n}"), false)));
        let root = tree(&m, Stage::Final);
        let found = root.path("devices").unwrap().all("controller");
        let found = found.filter(|c| c.attr("type") == Some("sata")).count();
        assert_eq!(found, controllers, "{disks}");
        let places: Vec<_> = places(&m, Stage::Final);
        assert_eq!(places.len(), disks);
    }
    m.disks.push(disk("/d18", false));
    let error = to_element(&m, Stage::Final, &images(UEFI)).unwrap_err();
    assert_eq!(
        error,
        DomainError::TooManyDisks {
            bus: "sata",
            disks: 19,
            max: 18
        }
    );
}

/// QEMU's SATA and IDE disks have 512-byte sectors.
#[test]
fn a_disk_of_4096_bytes_is_where_a_bus_has_such_sectors() {
    let mut m = machine();
    m.disks.push(disk("/data", false));
    m.disks[1].sector_size = 4096;
    let named = |stage| {
        let root = tree(&m, stage);
        let disks = disks_of(&root);
        let sources = disks.iter().filter_map(|d| texts_of(d, "source", "file"));
        sources.map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(!named(Stage::Bootstrap).contains(&"/data".to_owned()));
    assert!(named(Stage::Final).contains(&"/data".to_owned()));
    // The disks behind it keep their places while it is away.
    let mut three = m.clone();
    three.disks.push(disk("/more", false));
    let place = |bus: &str, dev: &str| {
        let found = places(&three, Stage::Bootstrap);
        let of = found.into_iter().find(|p| p[0] == "/more").unwrap();
        assert_eq!((&*of[1], &*of[2]), (bus, dev));
        of[3].clone()
    };
    assert!(place("sata", "sdc").ends_with("unit=2"));
    let mut on_sata = m.clone();
    on_sata.bus = DiskBus::Sata;
    let error = to_element(&on_sata, Stage::Final, &images(UEFI)).unwrap_err();
    let expected = DomainError::SectorSize {
        path: "/data".into(),
        sector_size: 4096,
        bus: "sata",
    };
    assert_eq!(error, expected);
    // A data disk needs no firmware that boots from it; one that is first in the order does.
    m.bootstrap = None;
    (m.firmware, m.nvram) = (BIOS, None);
    assert!(to_element(&m, Stage::Final, &FirmwareChoice::Bios).is_ok());
    (m.disks[0].boot_order, m.disks[1].boot_order) = (None, Some(1));
    let error = to_element(&m, Stage::Final, &FirmwareChoice::Bios).unwrap_err();
    assert!(
        matches!(error, DomainError::BiosSectorSize { .. }),
        "{error}"
    );
}

#[test]
fn places_of_the_boot_order_are_one_disks_each() {
    for (orders, wrong) in [
        (&[Some(1), None, None][..], None),
        (&[Some(1), Some(2), Some(3)], None),
        (&[Some(1), Some(3), None], None),
        (&[Some(1), Some(2), Some(2)], Some(2)),
        (&[Some(1), Some(0), None], Some(0)),
    ] {
        let mut m = machine();
        m.disks.extend([disk("/b", false), disk("/c", false)]);
        for (disk, order) in m.disks.iter_mut().zip(orders) {
            disk.boot_order = *order;
        }
        let found = to_element(&m, Stage::Final, &images(UEFI)).err();
        let expected = wrong.map(|order| DomainError::BootOrder { order });
        assert_eq!(found, expected, "{orders:?}");
    }
}

#[test]
fn emitted_files_are_told_by_their_names() {
    for (name, expected) in [
        ("vm-proxmox.sh", Some((Emit::Proxmox, None))),
        (
            "vm-kubevirt-bootstrap.yaml",
            Some((Emit::Kubevirt, Some("bootstrap"))),
        ),
        (
            "vm-kubevirt-final.yaml",
            Some((Emit::Kubevirt, Some("final"))),
        ),
        (
            "vm-qemu-bootstrap.sh",
            Some((Emit::Qemu, Some("bootstrap"))),
        ),
        ("vm-qemu-final.sh", Some((Emit::Qemu, Some("final")))),
        ("vm-qemu.sh", None),
        ("vm-final.xml", None),
    ] {
        let found = Emit::of_file(&Path::new("/out").join(name));
        assert_eq!(found, expected, "{name}");
    }
    assert_eq!([disk_serial(0), disk_serial(12)], ["h2k-0", "h2k-12"]);
    let bridge = |vlan| Bridge {
        name: "br0".into(),
        vlan,
    };
    let shown = [bridge(None), bridge(Some(5))].map(|bridge| bridge.to_string());
    assert_eq!(shown, ["br0", "br0@5"]);
}

/// The name of a libvirt domain is at most 200 bytes, and ends between two characters.
#[test]
fn a_long_name_is_cut_between_characters() {
    assert_eq!(domain_name(&"x".repeat(201)), "x".repeat(200));
    assert_eq!(domain_name(&"x".repeat(200)), "x".repeat(200));
    let wide = domain_name(&format!("x{}", "ü".repeat(120)));
    assert_eq!(wide, format!("x{}", "ü".repeat(99)));
}

#[test]
fn a_first_boot_on_ide_wants_a_chipset_that_has_it() {
    for (asked, fits) in [
        (None, true),
        (Some("pc"), true),
        (Some("pc-i440fx-8.2"), true),
        (Some("q35"), false),
    ] {
        let mut m = machine();
        (m.firmware, m.nvram) = (BIOS, None);
        m.bootstrap = Some(DiskBus::Ide);
        m.machine_type = asked.map(str::to_owned);
        let found = to_element(&m, Stage::Bootstrap, &FirmwareChoice::Bios);
        assert_eq!(found.is_ok(), fits, "{asked:?}");
    }
    for (name, clean) in [
        (".", "vm"),
        ("..", "vm"),
        (" ", "vm"),
        ("", "vm"),
        (" a/b ", "a-b"),
    ] {
        assert_eq!(domain_name(name), clean, "{name:?}");
    }
}

/// A label of DNS has at most 63 characters.
#[test]
fn names_of_kubernetes_are_labels() {
    let name = crate::domain::network::kubernetes_name;
    let (longest, longer) = ("a".repeat(63), "a".repeat(64));
    for (text, label, labels) in [
        (&*longest, true, true),
        (&*longer, false, false),
        ("a.b", false, true),
        ("a..b", false, false),
        ("-a", false, false),
        ("a-", false, false),
        ("A", false, false),
        ("a_b", false, false),
        ("", false, false),
        ("a-1", true, true),
    ] {
        assert_eq!(
            (name(text, false), name(text, true)),
            (label, labels),
            "{text}"
        );
    }
    let many = vec!["a".repeat(62); 4].join(".");
    assert!(name(&format!("{many}.b"), true) && !name(&format!("{many}.bc"), true));
}
