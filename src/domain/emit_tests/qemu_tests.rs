//! The QEMU script.

use super::*;

/// Every PCI address of the XML is on the command line, and no other.
#[test]
fn qemu_has_the_slots_of_the_xml() {
    for change in [
        (|_| {}) as fn(&mut Machine),
        |m| m.bus = DiskBus::VirtioScsi,
        |m| {
            let System::Windows(w) = &mut m.system else {
                return;
            };
            (w.major, w.minor) = (6, 1);
        },
        |m| {
            m.bootstrap = Some(DiskBus::Ide);
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
                // Parts of the chipset exist by default.
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

/// Firmware and TPM are set up before QEMU starts, with the paths of the XML or the environment.
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
    // The variables of a VM that has run are kept.
    fs::write(path("my vars.fd"), "changed").unwrap();
    assert!(run_file(&file, &[], Some(dir.path())).0);
    assert_eq!(fs::read_to_string(path("my vars.fd")).unwrap(), "changed");
}

/// A comma ends a value of QEMU's options, unless there are two.
#[test]
fn commas_in_what_the_source_says_do_not_end_an_option_of_qemu() {
    let mut m = full();
    m.name = "a,readonly=on,b".into();
    m.serial = Some("VMware-56,uuid=4d".into());
    for text in texts(Emit::Qemu, &m) {
        assert!(text.contains("guest=a,,readonly=on,,b"), "{text}");
        assert!(text.contains("serial=VMware-56,,uuid=4d"), "{text}");
    }
}

fn line_of(text: &str, option: &str) -> String {
    let lines: Vec<_> = text.lines().filter(|line| line.contains(option)).collect();
    assert_eq!(lines.len(), 1, "{option} in\n{text}");
    lines[0].trim().trim_end_matches(" \\").to_owned()
}

/// Every element of the XML has its option of QEMU.
#[test]
fn qemu_has_what_the_xml_says() {
    for (change, option, line) in [
        (
            (|m| m.graphics = Graphics::Spice) as fn(&mut Machine),
            "-spice",
            "-spice port=\"${SPICE_PORT:-5900}\",addr=127.0.0.1,disable-ticketing=on",
        ),
        (|_| {}, "-vnc", "-vnc \"${VNC:-127.0.0.1:0,to=99}\""),
        (|m| m.graphics = Graphics::None, "-display", "-display none"),
        (
            |m| m.serial_log = Some("/vm/a \"$x`\\}.log".into()),
            "COM1:-",
            "-serial \"${COM1:-file:/vm/a \\\"\\$x\\`\\\\\\}.log}\"",
        ),
        (|_| {}, "COM1:-", "-serial \"${COM1:-null}\""),
        (
            |m| m.second_serial = true,
            "COM2:-",
            "-serial \"${COM2:-null}\"",
        ),
        (
            |m| m.clock_utc = true,
            "-rtc",
            "-rtc base=utc,driftfix=slew",
        ),
        (|_| {}, "-rtc", "-rtc base=localtime,driftfix=slew"),
        (|m| m.memory_mib = 3, "-m size", "-m size=3072K"),
        (
            |m| {
                m.topology = Some(Topology {
                    sockets: 2,
                    cores: 1,
                    threads: 2,
                });
            },
            "-smp",
            "-smp 4,sockets=2,cores=1,threads=2",
        ),
        (
            |m| {
                m.nics.truncate(1);
                m.nics[0].source = NicSource::Bridge(Bridge::named("br0"));
            },
            "-netdev",
            "-netdev bridge,id=net0,br=br0",
        ),
        (
            |m| {
                m.nics.truncate(1);
                m.nics[0].link_up = false;
            },
            "-netdev",
            "-netdev hubport,id=net0,hubid=0",
        ),
        (|m| m.nics.truncate(1), "-netdev", "-netdev user,id=net0"),
        (
            |m| m.firmware = Firmware::Uefi { secure_boot: true },
            "cfi.pflash01",
            "-global driver=cfi.pflash01,property=secure,value=on",
        ),
        (|_| {}, "kvm-pit", "-global kvm-pit.lost_tick_policy=delay"),
        (|_| {}, "disable_s3", "-global ICH9-LPC.disable_s3=1"),
        (
            |m| m.machine_type = Some("pc-i440fx-8.2".into()),
            "disable_s4",
            "-global PIIX4_PM.disable_s4=1",
        ),
    ] {
        let mut m = full();
        change(&mut m);
        let last = texts(Emit::Qemu, &m).pop().unwrap();
        assert_eq!(line_of(&last, option), line);
        assert!(sh(&last, &["-n"], None).0, "{last}");
    }
    let last = |m: &Machine| texts(Emit::Qemu, m).pop().unwrap();
    let mut m = full();
    assert!(line_of(&last(&m), "-machine").contains("q35,accel=kvm,vmport=off,hpet=off,smm=off"));
    assert!(!last(&m).contains("cfi.pflash01"));
    m.firmware = Firmware::Uefi { secure_boot: true };
    assert!(line_of(&last(&m), "-machine").ends_with("smm=on"));
    m.domain_type = DomainType::Qemu;
    assert!(line_of(&last(&m), "-machine").contains("accel=tcg"));
    assert!(!last(&m).contains("kvm-pit") && last(&m).contains("-cpu max"));
    let mut m = full();
    m.disks[1].sector_size = 4096;
    let data = line_of(&last(&m), "drive=disk1");
    assert!(
        data.contains(",logical_block_size=4096,physical_block_size=4096"),
        "{data}"
    );
    // On i440fx every AHCI controller is a device of its own.
    m.disks.truncate(1);
    (m.machine_type, m.bootstrap) = (Some("pc".into()), Some(DiskBus::Sata));
    let first = texts(Emit::Qemu, &m).remove(0);
    assert!(
        line_of(&first, "ich9-ahci").contains("ich9-ahci,id=sata0,bus=pci.0"),
        "{first}"
    );
    assert!(
        line_of(&first, "bootindex=1").contains("ide-hd,bus=sata0.0,"),
        "{first}"
    );
}

/// Unusual devices: an image that is only read, disks on SCSI, the agent's channel.
#[test]
fn qemu_has_the_driver_image_the_scsi_disks_and_the_agent() {
    let mut m = full();
    m.bus = DiskBus::VirtioScsi;
    let texts = texts(Emit::Qemu, &m);
    let (first, last) = (&texts[0], &texts[1]);
    let image = line_of(first, "virtio-win.iso");
    assert!(image.contains("\"read-only\":true"), "{image}");
    assert!(!image.contains("discard"), "{image}");
    assert!(line_of(first, "ide-cd").contains(",drive=disk2"), "{first}");
    assert_eq!(first.matches(",write-cache=on").count(), 3, "{first}");
    assert!(line_of(last, "scsi-id=0").contains("scsi-hd,bus=scsi0.0,channel=0,scsi-id=0,lun=0"));
    assert!(
        line_of(last, "scsi-id=1").contains(",serial=h2k-1"),
        "{last}"
    );
    assert!(line_of(last, "virtserialport").contains("name=org.qemu.guest_agent.0"));
    m.drivers.agent = false;
    assert!(!super::texts(Emit::Qemu, &m)[1].contains("virtserialport"));
}

/// The code of the firmware and the variables may be images of different formats.
#[test]
fn qemu_reads_each_image_of_the_firmware_in_its_format() {
    for (code, vars) in [("raw", "qcow2"), ("qcow2", "raw")] {
        let firmware = FirmwareChoice::Images(FirmwareImages {
            code: "/fw/CODE".into(),
            code_format: code.into(),
            vars: "/fw/VARS".into(),
            vars_format: vars.into(),
            secure_boot: false,
            smm: false,
        });
        let domain = to_element(&full(), Stage::Final, &firmware).unwrap();
        let script = qemu::script(&domain, Path::new(FOLDER));
        let drive = |unit| line_of(&script, &format!("if=pflash,unit={unit}"));
        assert!(
            drive(0).contains(&format!(",format={code},file=\"$code\"")),
            "{script}"
        );
        assert!(
            drive(1).contains(&format!(",format={vars},file=\"$nvram\"")),
            "{script}"
        );
    }
}
