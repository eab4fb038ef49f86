//! libvirt's domain XML: units, topologies, boot orders, kinds of disks and interfaces.

use super::*;

#[test]
fn libvirt_domains_are_read_as_they_were_written() {
    each(|dice| {
        let folder = Folder::new();
        let document = Document::new(dice);
        let (body, want) = domain(dice, document.alphabet, folder.0.path());
        let text = document.bytes(&body);
        folder.file("v.xml", &text);
        let seed = dice.seed;
        let got = folder
            .open("v.xml")
            .unwrap_or_else(|e| panic!("HYPER2KVM_CASE={seed}: {e:?}\n{body}"));
        assert_same(&got, &want, seed, body.as_bytes());
    });
}

fn element(dice: &mut Dice, name: &str, text: &str) -> String {
    format!("<{name}>{}</{name}>\n", content(dice, text))
}

fn domain(dice: &mut Dice, alphabet: &str, folder: &Path) -> (String, SourceVm) {
    let name = dice.text(alphabet);
    let mut vm = SourceVm::new(SourceKind::Libvirt, &name);
    let mut parts = vec![
        element(dice, "name", &name),
        element(dice, "title", "another"),
    ];
    if let Some(uuid) = dice.maybe(Dice::uuid) {
        vm.uuid = Some(uuid);
        let text = match dice.below(3) {
            0 => uuid.simple().to_string(),
            1 => uuid.to_string().to_uppercase(),
            _ => uuid.to_string(),
        };
        parts.push(element(dice, "uuid", &text));
    }
    if let Some(id) = dice.maybe(Dice::uuid) {
        vm.genid = Some(id);
        parts.push(element(dice, "genid", &id.to_string()));
    }
    if let Some(serial) = dice.maybe(|d| d.text(alphabet)) {
        let entries = format!(
            "<entry name='product'>no</entry><entry{}>{}</entry>",
            attr(dice, "name", "serial"),
            content(dice, &serial)
        );
        parts.push(format!(
            "<sysinfo type='smbios'><bios/><system>{entries}</system></sysinfo>"
        ));
        vm.serial = Some(serial);
    }
    parts.push(memory(dice, &mut vm));
    parts.push(element(dice, "currentMemory", "1"));
    processors(dice, &mut vm, &mut parts);
    parts.push(firmware(dice, &mut vm));
    let mut devices = disks(dice, alphabet, folder, &mut vm);
    devices.extend(interfaces(dice, alphabet, &mut vm));
    vm.tpm = dice.coin();
    if vm.tpm {
        devices.push("<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>".into());
    }
    devices.push(
        "<disk type='file' device='cdrom'><source file='/no.iso'/><target dev='sdz'/></disk>"
            .into(),
    );
    parts.push(format!("<devices>{}</devices>", devices.concat()));
    dice.shuffle(&mut parts);
    let domain = format!(
        "<domain type='kvm' xmlns:qemu='q'>{}</domain>",
        parts.concat()
    );
    let wrapped = match dice.below(4) {
        0 => format!("<domainsnapshot><name>no</name>{domain}</domainsnapshot>"),
        _ => domain,
    };
    (wrapped, vm)
}

fn memory(dice: &mut Dice, vm: &mut SourceVm) -> String {
    let gib = 1 + dice.below(64);
    vm.memory_mib = Some(gib * 1024);
    let (unit, amount) = dice.pick(&[
        ("", gib << 20),
        ("KiB", gib << 20),
        ("k", gib << 20),
        ("MiB", gib << 10),
        ("m", gib << 10),
        ("GiB", gib),
        ("g", gib),
        ("b", gib << 30),
        ("bytes", gib << 30),
        ("KB", (gib << 30) / 1000 + 1),
    ]);
    let unit = match unit {
        "" => String::new(),
        unit => {
            let unit = dice.any_case(unit);
            attr(dice, "unit", &unit)
        }
    };
    format!(
        "<memory{unit}>{}</memory>",
        content(dice, &amount.to_string())
    )
}

fn processors(dice: &mut Dice, vm: &mut SourceVm, parts: &mut Vec<String>) {
    let mut part = |name: &str| {
        let n = 1 + dice.below(4) as u32;
        let text = if n > 1 || dice.coin() {
            attr(dice, name, &n.to_string())
        } else {
            String::new()
        };
        (n, text)
    };
    let (sockets, dies, clusters) = (part("sockets"), part("dies"), part("clusters"));
    let (cores, threads) = (part("cores"), part("threads"));
    let all = [&sockets, &dies, &clusters, &cores, &threads];
    let total: u32 = all.iter().map(|(n, _)| n).product();
    let topology = dice.coin();
    if topology {
        let mut attrs: Vec<&str> = all.iter().map(|(_, text)| text.as_str()).collect();
        dice.shuffle(&mut attrs);
        parts.push(format!(
            "<cpu mode='host-passthrough'><topology{}/></cpu>",
            attrs.concat()
        ));
        vm.cores_per_socket = Some(dies.0 * clusters.0 * cores.0);
        vm.threads_per_core = Some(threads.0);
        vm.vcpus = Some(total);
    } else {
        vm.vcpus = Some(1);
    }
    if dice.coin() {
        let count = if topology {
            total
        } else {
            1 + dice.below(64) as u32
        };
        vm.vcpus = Some(count);
        let placement = dice.pick(&["", " placement='static'"]);
        parts.push(format!(
            "<vcpu{placement}>{}</vcpu>",
            content(dice, &count.to_string())
        ));
    }
}

fn firmware(dice: &mut Dice, vm: &mut SourceVm) -> String {
    let (uefi, secure, text) = match dice.below(5) {
        0 => (false, false, "<os><type>hvm</type></os>".to_owned()),
        1 => (
            true,
            false,
            "<os firmware='efi'><type>hvm</type></os>".to_owned(),
        ),
        2 => {
            let keys = dice.coin();
            let keys_on = if keys { "yes" } else { "no" };
            let text = format!(
                "<os firmware='efi'><firmware><feature enabled='yes' name='secure-boot'/>\
                 <feature name='enrolled-keys' enabled='{keys_on}'/></firmware></os>"
            );
            (true, keys, text)
        }
        3 => {
            let secure = dice.coin();
            let on = if secure { "yes" } else { "no" };
            (
                true,
                secure,
                format!(
                    "<os><loader type='pflash' secure='{on}' readonly='yes'>/x.fd</loader></os>"
                ),
            )
        }
        _ => (
            false,
            false,
            "<os><loader type='rom'>/bios.bin</loader></os>".to_owned(),
        ),
    };
    vm.firmware = Some(if uefi { Firmware::Uefi } else { Firmware::Bios });
    vm.secure_boot = secure;
    text
}

fn disks(dice: &mut Dice, alphabet: &str, folder: &Path, vm: &mut SourceVm) -> Vec<String> {
    let buses = [
        ("scsi", "sd", Controller::Scsi),
        ("virtio", "vd", Controller::Virtio),
        ("sata", "sd", Controller::Sata),
        ("ide", "hd", Controller::Ide),
        ("usb", "sd", Controller::Usb),
    ];
    let mut devices = Vec::new();
    let mut found: Vec<(u64, SourceDisk)> = Vec::new();
    for n in 0..1 + dice.below(5) {
        let (bus, prefix, controller) = dice.pick(&buses);
        // Beyond the 26th the names have two letters.
        let index = 7 * n as u32 + dice.below(7) as u32;
        let letter = |i: u32| char::from(b'a' + i as u8);
        let target = match index {
            0..26 => format!("{prefix}{}", letter(index)),
            _ => format!("{prefix}{}{}", letter(index / 26 - 1), letter(index % 26)),
        };
        let file = dice.file(alphabet, n as usize, "img");
        let path = folder.join(&file);
        fs::write(&path, "x").unwrap();
        let written = match dice.below(4) {
            0 => path.to_str().unwrap().to_owned(),
            1 => format!("/var/lib/libvirt/images/not here/{file}"),
            _ => file,
        };
        let (kind, source) = dice.pick(&[("file", "file"), ("block", "dev")]);
        let format = dice.maybe(|d| d.pick(&["raw", "qcow2", "vmdk"]).to_owned());
        let boot = dice.maybe(|d| 100 + 10 * n + d.below(9));
        let mut inside = vec![
            format!("<source{}/>", attr(dice, source, &written)),
            format!(
                "<target{}{}/>",
                attr(dice, "dev", &target),
                attr(dice, "bus", bus)
            ),
            format!(
                "<address type='drive' controller='0' unit='{}'/>",
                dice.below(9)
            ),
        ];
        if let Some(format) = &format {
            inside.push(format!(
                "<driver name='qemu'{} cache='none'/>",
                attr(dice, "type", format)
            ));
        }
        if let Some(boot) = boot {
            inside.push(format!("<boot order='{boot}'/>"));
        }
        dice.shuffle(&mut inside);
        let device = dice.pick(&["", " device='disk'", " device='lun'"]);
        devices.push(format!(
            "<disk type='{kind}'{device}>{}</disk>",
            inside.concat()
        ));
        found.push((
            boot.unwrap_or(u64::MAX),
            SourceDisk {
                name: target,
                path,
                format,
                controller,
                order: (0, index),
                packed: None,
            },
        ));
    }
    found.sort_by_key(|(boot, disk)| (*boot, disk.controller, disk.order));
    vm.disks = found.into_iter().map(|(_, disk)| disk).collect();
    dice.shuffle(&mut devices);
    devices
}

fn interfaces(dice: &mut Dice, alphabet: &str, vm: &mut SourceVm) -> Vec<String> {
    let mut devices = Vec::new();
    for _ in 0..dice.below(14) {
        let mac = dice.maybe(Dice::mac);
        let model = dice.maybe(|d| d.pick(&["virtio", "e1000e", "rtl8139"]).to_owned());
        let connected = dice.coin();
        let (kind, source) = dice.pick(&[
            ("network", "network"),
            ("bridge", "bridge"),
            ("direct", "dev"),
            ("user", ""),
        ]);
        let network = (!source.is_empty()).then(|| dice.text(alphabet));
        let mut inside = Vec::new();
        if let Some(mac) = mac {
            let text = dice.any_case(&mac.to_string());
            inside.push(format!("<mac{}/>", attr(dice, "address", &text)));
        }
        if let Some(model) = &model {
            inside.push(format!("<model{}/>", attr(dice, "type", model)));
        }
        if let Some(network) = &network {
            inside.push(format!("<source{}/>", attr(dice, source, network)));
        }
        if !connected {
            inside.push("<link state='down'/>".into());
        } else if dice.coin() {
            inside.push("<link state='up'/>".into());
        }
        dice.shuffle(&mut inside);
        devices.push(format!(
            "<interface type='{kind}'>{}</interface>",
            inside.concat()
        ));
        vm.nics.push(SourceNic {
            mac,
            model,
            network,
            connected,
        });
    }
    devices
}
