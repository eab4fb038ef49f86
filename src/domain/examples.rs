//! The domain XML files of the project from which this one originated, as facts. They are compared
//! device by device with the XML written here. Each difference is listed with its reason, and every
//! device here is listed.
//!
//! The files are `test-confs/62` to `66` of <https://github.com/ssahani/hyper2kvm>: Windows 10 on
//! UEFI, three times on SATA for the first boot and twice on VirtIO. (Two more there are Linux
//! guests.)

use super::element::Element;
use super::firmware::FirmwareImages;
use super::tests::machine;
use super::xml::to_element;
use super::*;

/// The path and value in the file, and the value here if it differs, with the reason.
type Fact = (
    &'static str,
    &'static str,
    Option<(&'static str, &'static str)>,
);

const SAME: Option<(&str, &str)> = None;

const IO: &str = "native AIO blocks on the sparse files we write; it is kept for block devices";
const EMULATOR: &str = "libvirt picks it: its path differs between distributions";
const PS2: &str = "libvirt gives every x86 machine a PS/2 keyboard and mouse";
const CRASH: &str = "the first boot keeps a crashed machine, so that its screen can be looked at";
const KIB: &str = "the same in KiB, the one unit virt-xml understands";
const PLAIN_CUSTOM: &str = "libvirt's default";
const ONE_NAME: &str = "both stages are one machine: Windows must not see another one";

const COMMON: &[Fact] = &[
    ("@type", "kvm", SAME),
    ("vcpu", "4", SAME),
    ("vcpu@placement", "static", SAME),
    ("os/type", "hvm", SAME),
    ("os/type@arch", "x86_64", SAME),
    ("os/loader@readonly", "yes", SAME),
    ("os/loader@type", "pflash", SAME),
    ("features/hyperv/relaxed@state", "on", SAME),
    ("features/hyperv/vapic@state", "on", SAME),
    ("features/hyperv/spinlocks@state", "on", SAME),
    ("features/hyperv/spinlocks@retries", "8191", SAME),
    ("cpu@mode", "host-passthrough", SAME),
    ("clock@offset", "localtime", SAME),
    ("clock/timer[name=hpet]@present", "no", SAME),
    ("devices/disk[device=disk]@type", "file", SAME),
    ("devices/disk[device=disk]/driver@name", "qemu", SAME),
    ("devices/disk[device=disk]/driver@type", "qcow2", SAME),
    ("devices/disk[device=disk]/driver@cache", "none", SAME),
    (
        "devices/disk[device=disk]/driver@io",
        "native",
        Some(("threads", IO)),
    ),
    ("devices/interface@type", "network", SAME),
    ("devices/interface/source@network", "default", SAME),
    ("devices/graphics@type", "spice", SAME),
    ("devices/graphics@autoport", "yes", SAME),
    ("devices/input[type=tablet]@bus", "usb", SAME),
];

const TIMERS: &[Fact] = &[
    ("clock/timer[name=rtc]@tickpolicy", "catchup", SAME),
    ("clock/timer[name=pit]@tickpolicy", "delay", SAME),
    ("on_poweroff", "destroy", SAME),
    ("on_reboot", "restart", SAME),
];

const SATA: &[Fact] = &[
    ("devices/disk[device=disk]/target@dev", "sda", SAME),
    ("devices/disk[device=disk]/target@bus", "sata", SAME),
];

const VIRTIO: &[Fact] = &[
    ("devices/disk[device=disk]/target@dev", "vda", SAME),
    ("devices/disk[device=disk]/target@bus", "virtio", SAME),
    ("devices/interface/model@type", "virtio", SAME),
    ("devices/memballoon@model", "virtio", SAME),
    ("devices/rng@model", "virtio", SAME),
    ("devices/rng/backend", "/dev/urandom", SAME),
    ("devices/rng/backend@model", "random", SAME),
];

const QXL: &[Fact] = &[
    ("devices/video/model@type", "qxl", SAME),
    (
        "devices/video/model@vram",
        "65536",
        Some(("", "libvirt's default")),
    ),
    ("devices/graphics@listen", "127.0.0.1", SAME),
];

const AGENT: &[Fact] = &[
    ("devices/channel@type", "unix", SAME),
    ("devices/channel/target@type", "virtio", SAME),
    (
        "devices/channel/target@name",
        "org.qemu.guest_agent.0",
        SAME,
    ),
];

struct Example {
    file: u32,
    stage: Stage,
    /// The options that the user of that file would have chosen.
    asked: fn(&mut Machine),
    facts: &'static [&'static [Fact]],
}

fn all_drivers(m: &mut Machine) {
    m.drivers = Drivers {
        agent: true,
        balloon: true,
        rng: true,
        netkvm: true,
    };
}

const EXAMPLES: [Example; 5] = [
    Example {
        file: 62,
        stage: Stage::Bootstrap,
        asked: |m| {
            m.memory_mib = 8192;
            (m.drivers.agent, m.drivers.netkvm) = (true, true);
        },
        facts: &[
            COMMON,
            TIMERS,
            SATA,
            QXL,
            AGENT,
            &[
                ("memory", "8192", Some(("8388608", KIB))),
                ("currentMemory", "8192", Some(("8388608", KIB))),
                ("os/type@machine", "q35", SAME),
                ("on_crash", "restart", Some(("preserve", CRASH))),
                ("devices/interface/model@type", "virtio", SAME),
                ("devices/controller[type=usb]@model", "qemu-xhci", SAME),
                ("devices/input[type=keyboard]@bus", "ps2", Some(("", PS2))),
                ("devices/video/model@heads", "1", SAME),
                (
                    "devices/console@type",
                    "pty",
                    Some(("", "libvirt makes it from the serial port")),
                ),
            ],
        ],
    },
    Example {
        file: 63,
        stage: Stage::Bootstrap,
        asked: |m| m.machine_type = Some("pc-q35-8.2".into()),
        facts: &[
            COMMON,
            TIMERS,
            SATA,
            QXL,
            &[
                ("memory", "4096", Some(("4194304", KIB))),
                ("currentMemory", "4096", Some(("4194304", KIB))),
                ("os/type@machine", "pc-q35-8.2", SAME),
                (
                    "os/boot@dev",
                    "hd",
                    Some(("", "the boot disk is named itself, by <boot order='1'/>")),
                ),
                ("features/hyperv@mode", "custom", Some(("", PLAIN_CUSTOM))),
                ("features/vmport@state", "off", SAME),
                ("cpu@check", "none", SAME),
                ("on_crash", "restart", Some(("preserve", CRASH))),
                (
                    "devices/emulator",
                    "/usr/bin/qemu-system-x86_64",
                    Some(("", EMULATOR)),
                ),
                ("devices/controller[type=sata]@index", "0", SAME),
                ("devices/controller[type=sata]/address@slot", "0x1f", SAME),
                (
                    "devices/controller[type=sata]/address@function",
                    "0x2",
                    SAME,
                ),
                ("devices/interface/model@type", "e1000e", SAME),
                ("devices/controller[type=usb]@model", "qemu-xhci", SAME),
                ("devices/input[type=mouse]@bus", "ps2", Some(("", PS2))),
                ("devices/input[type=keyboard]@bus", "ps2", Some(("", PS2))),
                ("devices/video/model@heads", "1", SAME),
                (
                    "devices/video/model@ram",
                    "65536",
                    Some(("", "libvirt's default")),
                ),
                (
                    "devices/sound@model",
                    "ich9",
                    Some(("", "Windows starts without; --xml-patch adds it")),
                ),
                ("devices/serial@type", "pty", SAME),
                ("devices/serial/target@port", "0", SAME),
                (
                    "devices/console/target@type",
                    "serial",
                    Some(("", "libvirt makes it from the serial port")),
                ),
            ],
        ],
    },
    Example {
        file: 64,
        stage: Stage::Bootstrap,
        asked: |m| {
            m.memory_mib = 8192;
            all_drivers(m);
        },
        facts: &[
            COMMON,
            SATA,
            QXL,
            AGENT,
            &[
                (
                    "name",
                    "windows10-fixed-sata",
                    Some(("windows10", ONE_NAME)),
                ),
                (
                    "uuid",
                    "11111111-2222-3333-4444-555555555555",
                    Some(("564d1234-5678-9abc-def0-123456789abc", ONE_NAME)),
                ),
                ("memory", "8192", Some(("8388608", KIB))),
                ("os/type@machine", "q35", SAME),
                ("features/hyperv@mode", "custom", Some(("", PLAIN_CUSTOM))),
                ("cpu@check", "none", SAME),
                ("clock/timer[name=hypervclock]@present", "yes", SAME),
                (
                    "devices/emulator",
                    "/usr/bin/qemu-system-x86_64",
                    Some(("", EMULATOR)),
                ),
                ("devices/disk[device=disk]/boot@order", "1", SAME),
                ("devices/disk[device=cdrom]/driver@type", "raw", SAME),
                ("devices/disk[device=cdrom]/target@dev", "sdb", SAME),
                ("devices/disk[device=cdrom]/target@bus", "sata", SAME),
                ("devices/controller[type=usb]@model", "qemu-xhci", SAME),
                ("devices/controller[type=pci]@model", "pcie-root", SAME),
                ("devices/controller[type=sata]@index", "0", SAME),
                ("devices/interface/model@type", "virtio", SAME),
                ("devices/rng@model", "virtio", SAME),
                ("devices/rng/backend", "/dev/urandom", SAME),
            ],
        ],
    },
    Example {
        file: 65,
        stage: Stage::Final,
        asked: |m| {
            m.memory_mib = 8192;
            all_drivers(m);
        },
        facts: &[
            COMMON,
            VIRTIO,
            QXL,
            AGENT,
            &[
                (
                    "name",
                    "windows10-fixed-virtio",
                    Some(("windows10", ONE_NAME)),
                ),
                (
                    "uuid",
                    "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
                    Some(("564d1234-5678-9abc-def0-123456789abc", ONE_NAME)),
                ),
                ("memory", "8192", Some(("8388608", KIB))),
                ("os/type@machine", "q35", SAME),
                ("features/hyperv@mode", "custom", Some(("", PLAIN_CUSTOM))),
                ("cpu@check", "none", SAME),
                ("clock/timer[name=hypervclock]@present", "yes", SAME),
                (
                    "devices/emulator",
                    "/usr/bin/qemu-system-x86_64",
                    Some(("", EMULATOR)),
                ),
                ("devices/disk[device=disk]/boot@order", "1", SAME),
                ("devices/controller[type=pci]@model", "pcie-root", SAME),
            ],
        ],
    },
    Example {
        file: 66,
        stage: Stage::Final,
        asked: |m| {
            all_drivers(m);
            m.drivers.agent = false;
            m.video = Video::Virtio;
        },
        facts: &[
            COMMON,
            TIMERS,
            VIRTIO,
            &[
                ("memory", "4096", Some(("4194304", KIB))),
                ("currentMemory", "4096", Some(("4194304", KIB))),
                ("os/type@machine", "q35", SAME),
                ("features/hyperv@mode", "custom", Some(("", PLAIN_CUSTOM))),
                ("cpu@check", "none", SAME),
                ("on_crash", "restart", SAME),
                (
                    "devices/emulator",
                    "/usr/bin/qemu-system-x86_64",
                    Some(("", EMULATOR)),
                ),
                ("devices/video/model@type", "virtio", SAME),
                ("devices/controller[type=usb]@model", "qemu-xhci", SAME),
                (
                    "devices/channel@type",
                    "spicevmc",
                    Some((
                        "",
                        "it needs SPICE's own agent in Windows; --xml-patch adds it",
                    )),
                ),
            ],
        ],
    },
];

/// Devices that are here and in none of the files, with the reason.
const MORE: [(&str, &str); 12] = [
    (
        "disk disk virtio",
        "the probe: without it Windows binds no VirtIO driver in the first boot",
    ),
    ("disk cdrom sata", "the driver ISO of the first boot"),
    (
        "controller pcie-root",
        "addresses are fixed, so every controller is written down",
    ),
    (
        "controller pcie-root-port",
        "a slot for each device, the same in both stages",
    ),
    (
        "controller qemu-xhci",
        "the one the tablet is on; libvirt would add one of its choice",
    ),
    (
        "controller sata",
        "the one of the chipset, which libvirt would add",
    ),
    (
        "controller virtio-serial",
        "the one the channel is on, which libvirt would add",
    ),
    ("serial", "COM1: the first-boot script reports on it"),
    (
        "memballoon none",
        "libvirt would add one; without its driver it is an unknown device",
    ),
    ("memballoon virtio", "libvirt would add one"),
    ("panic", "tells `boot` of a stop screen"),
    ("video", "its address is fixed"),
];

/// The value of `path/element[attribute=value]/element@attribute`, or the text without `@`; empty
/// if absent.
fn fact(root: &Element, selector: &str) -> String {
    let (path, attribute) = match selector.split_once('@') {
        Some((path, name)) => (path, Some(name)),
        None => (selector, None),
    };
    let mut at = root;
    for step in path.split('/').filter(|s| !s.is_empty()) {
        let (name, condition) = match step.split_once('[') {
            Some((name, rest)) => (name, rest.trim_end_matches(']').split_once('=')),
            None => (step, None),
        };
        let next = at
            .all(name)
            .find(|e| condition.is_none_or(|(key, value)| e.attr(key) == Some(value)));
        match next {
            Some(next) => at = next,
            None => return String::new(),
        }
    }
    match attribute {
        Some(name) => at.attr(name).unwrap_or("").to_owned(),
        None => at.text.clone(),
    }
}

/// The name of a device in [`MORE`].
fn kind(device: &Element) -> String {
    let attr = |name| device.attr(name).unwrap_or("");
    match device.name.as_str() {
        "disk" => {
            let bus = device.first("target").and_then(|t| t.attr("bus"));
            format!("disk {} {}", attr("device"), bus.unwrap_or(""))
        }
        "controller" => match attr("model") {
            "" => format!("controller {}", attr("type")),
            model => format!("controller {model}"),
        },
        "memballoon" => format!("memballoon {}", attr("model")),
        name => name.to_owned(),
    }
}

#[test]
fn the_examples_can_be_reproduced() {
    let mut missed = Vec::new();
    for example in EXAMPLES {
        let mut m = machine();
        m.name = "windows10".into();
        m.graphics = Graphics::Spice;
        m.video = Video::Qxl;
        (example.asked)(&mut m);
        let images = FirmwareChoice::Images(FirmwareImages {
            code: "/usr/share/edk2/ovmf/OVMF_CODE.fd".into(),
            code_format: "raw".into(),
            vars: "/usr/share/edk2/ovmf/OVMF_VARS.fd".into(),
            vars_format: "raw".into(),
            secure_boot: false,
            smm: false,
        });
        let ours = to_element(&m, example.stage, &images).unwrap();
        let facts: Vec<&Fact> = example.facts.iter().copied().flatten().collect();
        for (selector, theirs, difference) in &facts {
            let want = difference.map_or(*theirs, |(ours, reason)| {
                assert!(!reason.is_empty());
                ours
            });
            let found = fact(&ours, selector);
            if found != want {
                missed.push(format!(
                    "{} {selector}: they have {theirs:?}, we {found:?} and not {want:?}",
                    example.file
                ));
            }
        }
        // Every option is covered: what the file does not have is in the table above.
        let devices = ours.first("devices").unwrap();
        for device in &devices.children {
            let named = facts.iter().any(|(selector, ..)| {
                let Some(step) = selector.strip_prefix("devices/") else {
                    return false;
                };
                let step = step.split(['/', '@']).next().unwrap();
                let (name, condition) = match step.split_once('[') {
                    Some((name, rest)) => (name, rest.trim_end_matches(']').split_once('=')),
                    None => (step, None),
                };
                device.name == name
                    && condition.is_none_or(|(key, value)| device.attr(key) == Some(value))
            });
            let listed = MORE.iter().any(|(more, reason)| {
                assert!(!reason.is_empty());
                kind(device) == *more
            });
            if !named && !listed {
                missed.push(format!("{}: we also have {}", example.file, kind(device)));
            }
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}
