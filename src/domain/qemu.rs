//! Writes a QEMU command line, as a shell script: the VM of the domain XML on a host without
//! libvirt.
//!
//! It is generated from the finished domain XML, not from the model. So the devices have the same
//! PCI addresses, and Windows does not notice the difference. It converts only elements that
//! hyper2kvm writes; elements of a user's patch are left out.
//!
//! The script takes over libvirt's preparations: a copy of the UEFI variables at the first start,
//! and the software TPM. A network of libvirt becomes QEMU's own NAT, and a NIC whose link is down
//! is connected to nothing.

use std::path::Path;

use serde_json::json;

use super::document::local;
use super::element::Element;
use super::model::{Machine, NicSource};
use crate::text::{quoted, shell_word};

/// Options of the command line: the words of each, as shell text.
struct Line(Vec<String>);

impl Line {
    /// `-option value`, quoted as needed.
    fn add(&mut self, option: &str, value: impl AsRef<str>) {
        self.0
            .push(format!("{option} {}", shell_word(value.as_ref())));
    }

    fn device(&mut self, value: impl AsRef<str>) {
        self.add("-device", value);
    }

    /// Adds shell text that will be expanded.
    fn raw(&mut self, text: impl Into<String>) {
        self.0.push(text.into());
    }
}

/// The script that starts the VM of this domain XML. Its arguments are added to QEMU's. It changes
/// to its own directory: files of `folder`, the output directory, are named relative to it.
pub fn script(domain: &Element, folder: &Path) -> String {
    let mut before = Vec::new();
    let mut line = Line(Vec::new());
    let q35 = machine_type(domain).contains("q35");
    basics(domain, &mut line);
    let nvram = near(text(domain, "os/nvram"), folder);
    firmware(domain, &nvram, &mut before, &mut line);
    let none = Element::new("devices");
    let devices = domain.first("devices").unwrap_or(&none);
    for controller in devices.all("controller") {
        controller_device(controller, q35, &mut line);
    }
    for (n, disk) in devices.all("disk").enumerate() {
        disk_device(disk, n, q35, folder, &mut line);
    }
    for (n, nic) in devices.all("interface").enumerate() {
        nic_device(nic, n, q35, &mut line);
    }
    for device in &devices.children {
        other_device(device, domain, &nvram, &mut before, &mut line);
    }
    line.raw("\"$@\"");
    let emulator = devices.text_of("emulator").unwrap_or("qemu-system-x86_64");
    let mut text = String::from(
        "#!/bin/sh\n\
         # Starts the VM without libvirt. Arguments are added to the command line.\n\
         # COM1 names the first serial port (file:PATH, stdio), COM2 a second one, VNC the display.\n\
         set -eu\n\
         cd -- \"$(dirname -- \"$0\")\"\n",
    );
    for step in before {
        text.push_str(&step);
        text.push('\n');
    }
    text.push_str(&format!("exec {}", shell_word(emulator)));
    for option in line.0 {
        text.push_str(" \\\n  ");
        text.push_str(&option);
    }
    text.push('\n');
    text
}

/// A file of the output directory by its name alone, any other by its path.
fn near(path: &str, folder: &Path) -> String {
    local(Path::new(path), folder).unwrap_or(path).to_owned()
}

/// Features that the script does not support.
pub fn warnings(machine: &Machine) -> Vec<String> {
    let tagged = machine.nics.iter().filter_map(|nic| match &nic.source {
        NicSource::Bridge(bridge) => bridge.vlan.map(|vlan| (bridge, vlan)),
        _ => None,
    });
    tagged
        .map(|(bridge, vlan)| {
            format!(
                "the script connects to {} without VLAN {vlan}, which QEMU cannot set: name a bridge that is in this VLAN",
                bridge.name
            )
        })
        .collect()
}

/// Escapes commas: a single comma ends a value in QEMU's options, two are one comma.
fn escape(text: &str) -> String {
    text.replace(',', ",,")
}

fn text<'a>(root: &'a Element, path: &str) -> &'a str {
    root.path(path).map_or("", |e| e.text.as_str())
}

fn attr<'a>(root: &'a Element, path: &str, name: &str) -> &'a str {
    root.path(path).and_then(|e| e.attr(name)).unwrap_or("")
}

fn machine_type(domain: &Element) -> &str {
    attr(domain, "os/type", "machine")
}

/// `bus=...,addr=...` of a PCI address.
fn pci(element: &Element, q35: bool) -> String {
    let Some(address) = element
        .all("address")
        .find(|a| a.attr("type") == Some("pci"))
    else {
        return String::new();
    };
    let number = |name: &str| {
        let digits = address.attr(name).unwrap_or("").trim_start_matches("0x");
        u8::from_str_radix(digits, 16).unwrap_or(0)
    };
    let bus = match (number("bus"), q35) {
        (0, true) => "pcie.0".to_owned(),
        (n, _) => format!("pci.{n}"),
    };
    let multifunction = match address.attr("multifunction") {
        Some(on) => format!(",multifunction={on}"),
        None => String::new(),
    };
    format!(
        ",bus={bus},addr=0x{:x}.0x{:x}{multifunction}",
        number("slot"),
        number("function")
    )
}

fn basics(domain: &Element, line: &mut Line) {
    let kvm = domain.attr("type") == Some("kvm");
    let on = |path: &str| attr(domain, path, "state") == "on";
    let name = escape(domain.text_of("name").unwrap_or("vm"));
    line.add("-name", format!("guest={name}"));
    line.raw("-no-user-config -nodefaults");
    line.add(
        "-machine",
        format!(
            "{},accel={},vmport=off,hpet=off,smm={}",
            machine_type(domain),
            if kvm { "kvm" } else { "tcg" },
            if on("features/smm") { "on" } else { "off" },
        ),
    );
    let mut cpu = match attr(domain, "cpu", "mode") {
        "maximum" => "max".to_owned(),
        _ => "host,migratable=on".to_owned(),
    };
    if let Some(hyperv) = domain.path("features/hyperv") {
        for feature in &hyperv.children {
            match feature.name.as_str() {
                "spinlocks" => cpu.push_str(",hv-spinlocks=0x1fff"),
                "stimer" => cpu.push_str(",hv-stimer,hv-stimer-direct"),
                name => cpu.push_str(&format!(",hv-{name}")),
            }
        }
        cpu.push_str(",hv-time,hv-crash");
    }
    line.add("-cpu", cpu);
    line.add("-m", format!("size={}K", text(domain, "memory")));
    let count = |name| attr(domain, "cpu/topology", name);
    line.add(
        "-smp",
        format!(
            "{},sockets={},cores={},threads={}",
            text(domain, "vcpu"),
            count("sockets"),
            count("cores"),
            count("threads")
        ),
    );
    line.add("-uuid", text(domain, "uuid"));
    if let Some(genid) = domain.text_of("genid") {
        line.device(format!("vmgenid,guid={genid}"));
    }
    let serial = text(domain, "sysinfo/system/entry");
    if !serial.is_empty() {
        line.add("-smbios", format!("type=1,serial={}", escape(serial)));
    }
    line.add(
        "-rtc",
        format!("base={},driftfix=slew", attr(domain, "clock", "offset")),
    );
    if kvm {
        line.add("-global", "kvm-pit.lost_tick_policy=delay");
    }
    let power = if machine_type(domain).contains("q35") {
        "ICH9-LPC"
    } else {
        "PIIX4_PM"
    };
    line.add("-global", format!("{power}.disable_s3=1"));
    line.add("-global", format!("{power}.disable_s4=1"));
    line.add("-boot", "strict=on");
}

/// The images of the XML; `OVMF_CODE` and `OVMF_VARS` override them, and are required if the XML
/// leaves the choice to the host.
fn firmware(domain: &Element, nvram: &str, before: &mut Vec<String>, line: &mut Line) {
    let loader = domain.path("os/loader");
    if loader.is_none() && attr(domain, "os", "firmware") != "efi" {
        return;
    }
    let format = |path: &str| match attr(domain, path, "format") {
        "" => "raw".to_owned(),
        other => other.to_owned(),
    };
    let image = |variable: &str, path: &str| match path {
        "" => format!("${{{variable}:?name the UEFI firmware of this host}}"),
        path => format!("${{{variable}:-{}}}", shell_word(path)),
    };
    let code = image("OVMF_CODE", loader.map_or("", |l| &l.text));
    let vars = image("OVMF_VARS", attr(domain, "os/nvram", "template"));
    before.push(format!("code={code}"));
    before.push(format!("nvram={}", quoted(nvram)));
    before.push(format!("vars={vars}"));
    before.push("[ -e \"$nvram\" ] || cp -- \"$vars\" \"$nvram\"".to_owned());
    line.raw(format!(
        "-drive if=pflash,unit=0,readonly=on,format={},file=\"$code\"",
        format("os/loader")
    ));
    line.raw(format!(
        "-drive if=pflash,unit=1,format={},file=\"$nvram\"",
        format("os/nvram")
    ));
    if attr(domain, "os/loader", "secure") == "yes" {
        line.add("-global", "driver=cfi.pflash01,property=secure,value=on");
    }
}

fn controller_device(controller: &Element, q35: bool, line: &mut Line) {
    let at = pci(controller, q35);
    let index = controller.attr("index").unwrap_or("0");
    let model = controller.attr("model").unwrap_or("");
    match (controller.attr("type").unwrap_or(""), model) {
        ("pci", "pcie-root-port") => line.device(format!(
            "pcie-root-port,id=pci.{index},chassis={},port={}{at}",
            attr(controller, "target", "chassis"),
            attr(controller, "target", "port"),
        )),
        ("usb", "qemu-xhci") => line.device(format!("qemu-xhci,id=usb{at}")),
        ("usb", "piix3-uhci") => line.device(format!("piix3-usb-uhci,id=usb{at}")),
        ("usb", "ich9-ehci1") => line.device(format!("ich9-usb-ehci1,id=usb{at}")),
        ("usb", companion) => line.device(format!(
            "{},masterbus=usb.0,firstport={}{at}",
            companion.replace("ich9-", "ich9-usb-"),
            attr(controller, "master", "startport"),
        )),
        // The first of q35 is part of the chipset.
        ("sata", _) if !(q35 && index == "0") => {
            line.device(format!("ich9-ahci,id=sata{index}{at}"));
        }
        ("scsi", _) => line.device(format!("virtio-scsi-pci,id=scsi{index}{at}")),
        ("virtio-serial", _) => line.device(format!("virtio-serial-pci,id=serial{index}{at}")),
        _ => {}
    }
}

fn disk_device(disk: &Element, n: usize, q35: bool, folder: &Path, line: &mut Line) {
    let Some(source) = disk.first("source") else {
        return;
    };
    let cdrom = disk.attr("device") == Some("cdrom");
    let (driver, path) = match source.attr("dev") {
        Some(path) => ("host_device", path.to_owned()),
        None => ("file", near(source.attr("file").unwrap_or(""), folder)),
    };
    let mut file = json!({"driver": driver, "filename": path});
    let mut node = json!({"driver": attr(disk, "driver", "type"), "node-name": format!("disk{n}")});
    if cdrom {
        node["read-only"] = true.into();
        file["read-only"] = true.into();
    } else {
        let direct = json!({"direct": true, "no-flush": false});
        file["aio"] = attr(disk, "driver", "io").into();
        file["discard"] = "unmap".into();
        file["cache"] = direct.clone();
        node["discard"] = "unmap".into();
        node["cache"] = direct;
    }
    node["file"] = file;
    line.add("-blockdev", node.to_string());
    let place = |name: &str| attr(disk, "address", name);
    let bus = attr(disk, "target", "bus");
    let mut device = match bus {
        "virtio" => format!("virtio-blk-pci{}", pci(disk, q35)),
        "scsi" => format!(
            "scsi-hd,bus=scsi{}.0,channel=0,scsi-id={},lun={}",
            place("controller"),
            place("target"),
            place("unit")
        ),
        _ => {
            let kind = if cdrom { "ide-cd" } else { "ide-hd" };
            match (bus, place("controller")) {
                ("ide", _) => format!("{kind},bus=ide.{},unit={}", place("bus"), place("unit")),
                (_, "0") if q35 => format!("{kind},bus=ide.{}", place("unit")),
                (_, controller) => format!("{kind},bus=sata{controller}.{}", place("unit")),
            }
        }
    };
    device.push_str(&format!(",drive=disk{n}"));
    if !cdrom {
        device.push_str(",write-cache=on");
    }
    if let Some(serial) = disk.text_of("serial") {
        device.push_str(&format!(",serial={}", escape(serial)));
    }
    if let Some(blockio) = disk.first("blockio") {
        for (name, value) in &blockio.attrs {
            device.push_str(&format!(",{name}={value}"));
        }
    }
    if let Some(order) = disk.first("boot").and_then(|boot| boot.attr("order")) {
        device.push_str(&format!(",bootindex={}", escape(order)));
    }
    line.device(device);
}

fn nic_device(nic: &Element, n: usize, q35: bool, line: &mut Line) {
    let backend = match nic.attr("type") {
        _ if nic.first("link").is_some() => format!("hubport,id=net{n},hubid={n}"),
        Some("bridge") => format!(
            "bridge,id=net{n},br={}",
            escape(attr(nic, "source", "bridge"))
        ),
        _ => format!("user,id=net{n}"),
    };
    line.add("-netdev", backend);
    let model = match attr(nic, "model", "type") {
        "virtio" => "virtio-net-pci",
        other => other,
    };
    line.device(format!(
        "{model},netdev=net{n},mac={}{}",
        attr(nic, "mac", "address"),
        pci(nic, q35)
    ));
}

fn other_device(
    device: &Element,
    domain: &Element,
    nvram: &str,
    before: &mut Vec<String>,
    line: &mut Line,
) {
    let at = pci(device, machine_type(domain).contains("q35"));
    let model = device.attr("model").unwrap_or("");
    match device.name.as_str() {
        "serial" if attr(device, "target", "port") == "1" => line.raw("-serial \"${COM2:-null}\""),
        "serial" => match attr(device, "source", "path") {
            "" => line.raw("-serial \"${COM1:-null}\""),
            path => line.raw(format!("-serial \"${{COM1:-file:{}}}\"", in_quotes(path))),
        },
        "channel" => {
            before.push("run=${XDG_RUNTIME_DIR:-/run}".to_owned());
            line.raw(format!(
                "-chardev socket,id=agent,server=on,wait=off,path=\"$run\"/{}.agent",
                text(domain, "uuid")
            ));
            line.device(format!(
                "virtserialport,bus=serial0.0,nr=1,chardev=agent,name={}",
                attr(device, "target", "name")
            ));
        }
        "input" => line.device("usb-tablet,bus=usb.0"),
        "tpm" => tpm(Path::new(nvram), before, line),
        "graphics" => match device.attr("type") {
            Some("spice") => {
                line.raw("-spice port=\"${SPICE_PORT:-5900}\",addr=127.0.0.1,disable-ticketing=on")
            }
            _ => line.raw("-vnc \"${VNC:-127.0.0.1:0,to=99}\""),
        },
        "video" => {
            if domain.path("devices/graphics").is_none() {
                line.add("-display", "none");
            }
            line.device(match attr(device, "model", "type") {
                "qxl" => format!("qxl-vga{at}"),
                "virtio" => format!("virtio-vga{at}"),
                _ => format!("VGA,vgamem_mb=16{at}"),
            });
        }
        "memballoon" if model == "virtio" => line.device(format!("virtio-balloon-pci{at}")),
        "rng" => {
            line.add("-object", "rng-random,id=rng0,filename=/dev/urandom");
            line.device(format!("virtio-rng-pci,rng=rng0{at}"));
        }
        "panic" if model == "isa" => line.device("pvpanic"),
        _ => {}
    }
}

/// The TPM's state is stored beside the UEFI variables; swtpm ends with QEMU.
fn tpm(nvram: &Path, before: &mut Vec<String>, line: &mut Line) {
    let state = nvram.with_extension("tpm").display().to_string();
    before.push(format!("tpm={}", quoted(&state)));
    before.push("mkdir -p -- \"$tpm\"".to_owned());
    // As a daemon it runs in another directory.
    before.push("state=$(cd -- \"$tpm\" && pwd)".to_owned());
    before.push(
        "swtpm socket --tpm2 --daemon --terminate --tpmstate dir=\"$state\" \
         --ctrl type=unixio,path=\"$state/control\""
            .to_owned(),
    );
    line.raw("-chardev socket,id=tpm,path=\"$tpm\"/control");
    line.add("-tpmdev", "emulator,id=tpm0,chardev=tpm");
    line.device("tpm-crb,tpmdev=tpm0");
}

/// Escapes text between double quotes of the shell, within `${...}`.
fn in_quotes(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if matches!(c, '"' | '\\' | '$' | '`' | '}') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}
