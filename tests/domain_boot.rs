//! Proof without Windows: the domains we write start a payload where Windows' boot loader would be.
//!
//! The payload is a few machine instructions, as a boot sector or as an EFI application. It is
//! loaded by the guest's own firmware from the system disk, writes a marker to COM1 and powers
//! the machine off. libvirt's QEMU driver runs inside `virsh` (`qemu:///embed`), under software
//! emulation, so neither a daemon nor KVM is needed; root is. What this proves is firmware,
//! controller, boot order and XML. It says nothing about Windows.
//!
//! Minutes, not seconds: `cargo test --test domain_boot -- --ignored`.

use std::io::Write;
use std::path::Path;

use hyper2kvm::domain::{
    Bootstrap, Descriptors, Disk, DiskFormat, DomainType, Drivers, Firmware, Graphics, Machine,
    Stage, StorageBus, Video, WindowsFacts, to_xml,
};
use uuid::Uuid;

const MARKER: &str = "H2K-PAYLOAD-UP";
const UEFI: Firmware = Firmware::Uefi { secure_boot: false };

/// Real mode: print to port 3F8h, then sleep state S5 through the PM1a control register at 604h.
fn boot_sector() -> Vec<u8> {
    let mut code = vec![
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xfc, // cld
        0xbe, 0x1d, 0x7c, // mov si, message
        0xba, 0xf8, 0x03, // mov dx, 3f8h
        0xac, // next: lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x03, // jz off
        0xee, // out dx, al
        0xeb, 0xf8, // jmp next
        0xba, 0x04, 0x06, // off: mov dx, 604h
        0xb8, 0x00, 0x20, // mov ax, 2000h
        0xef, // out dx, ax
        0xf4, // halt: hlt
        0xeb, 0xfd, // jmp halt
    ];
    code.extend(format!("{MARKER}\r\n\0").bytes());
    code.resize(510, 0);
    code.extend([0x55, 0xaa]);
    code
}

/// The same in long mode, in the smallest PE32+ file the firmware loads.
fn efi_application() -> Vec<u8> {
    let mut code = vec![
        0xfc, // cld
        0x48, 0x8d, 0x35, 0x19, 0x00, 0x00, 0x00, // lea rsi, [message]
        0x66, 0xba, 0xf8, 0x03, // mov dx, 3f8h
        0xac, // next: lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x03, // jz off
        0xee, // out dx, al
        0xeb, 0xf8, // jmp next
        0x66, 0xba, 0x04, 0x06, // off: mov dx, 604h
        0x66, 0xb8, 0x00, 0x20, // mov ax, 2000h
        0x66, 0xef, // out dx, ax
        0xf4, // halt: hlt
        0xeb, 0xfd, // jmp halt
    ];
    code.extend(format!("{MARKER}\r\n\0").bytes());
    code.resize(0x200, 0);

    let mut pe = vec![0u8; 0x200];
    let mut put = |at: usize, bytes: &[u8]| pe[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(0x3c, &0x40u32.to_le_bytes());
    put(0x40, b"PE\0\0");
    put(0x44, &0x8664u16.to_le_bytes()); // x86-64
    put(0x46, &1u16.to_le_bytes()); // sections
    put(0x54, &240u16.to_le_bytes()); // size of the optional header
    put(0x56, &0x22u16.to_le_bytes()); // executable, large addresses
    let optional = 0x58;
    put(optional, &0x20bu16.to_le_bytes()); // PE32+
    put(optional + 4, &0x200u32.to_le_bytes()); // size of code
    put(optional + 16, &0x1000u32.to_le_bytes()); // entry point
    put(optional + 20, &0x1000u32.to_le_bytes()); // base of code
    put(optional + 32, &0x1000u32.to_le_bytes()); // section alignment
    put(optional + 36, &0x200u32.to_le_bytes()); // file alignment
    put(optional + 56, &0x2000u32.to_le_bytes()); // size of image
    put(optional + 60, &0x200u32.to_le_bytes()); // size of headers
    put(optional + 68, &10u16.to_le_bytes()); // EFI application
    put(optional + 108, &16u32.to_le_bytes()); // data directories
    let section = optional + 240;
    put(section, b".text");
    put(section + 8, &0x200u32.to_le_bytes()); // size in memory
    put(section + 12, &0x1000u32.to_le_bytes()); // address
    put(section + 16, &0x200u32.to_le_bytes()); // size in the file
    put(section + 20, &0x200u32.to_le_bytes()); // offset in the file
    put(section + 36, &0x6000_0020u32.to_le_bytes()); // code, execute, read
    pe.extend(code);
    pe
}

fn write_disk(path: &Path, firmware: Firmware) {
    let mut file = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .unwrap();
    file.set_len(64 << 20).unwrap();
    if firmware == Firmware::Bios {
        file.write_all(&boot_sector()).unwrap();
        return;
    }
    fatfs::format_volume(&mut file, fatfs::FormatVolumeOptions::new()).unwrap();
    let volume = fatfs::FileSystem::new(&mut file, fatfs::FsOptions::new()).unwrap();
    let boot = volume.root_dir().create_dir("EFI").unwrap();
    let boot = boot.create_dir("BOOT").unwrap();
    let mut application = boot.create_file("BOOTX64.EFI").unwrap();
    application.write_all(&efi_application()).unwrap();
}

fn machine(dir: &Path, firmware: Firmware, bus: StorageBus, bootstrap: Bootstrap) -> Machine {
    let disk = |name: &str, boot| Disk {
        path: dir.join(name),
        format: DiskFormat::Raw,
        serial: None,
        sector_size: 512,
        boot,
    };
    let drivers = Drivers {
        agent: true,
        balloon: true,
        rng: true,
        netkvm: true,
    };
    Machine {
        name: "payload".into(),
        uuid: Uuid::from_u128(1),
        serial: None,
        genid: None,
        memory_mib: 256,
        vcpus: 1,
        topology: None,
        firmware,
        tpm: false,
        windows: WindowsFacts {
            major: 10,
            minor: 0,
            build: 19045,
            arch: "x86_64".into(),
            server: false,
        },
        clock_utc: false,
        // The system disk is not the first one.
        disks: vec![disk("data.raw", false), disk("system.raw", true)],
        nics: vec![],
        bus,
        bootstrap,
        probe: Some(dir.join("probe.qcow2")),
        driver_iso: Some(dir.join("drivers.iso")),
        domain_type: DomainType::Qemu,
        nvram: (firmware == UEFI).then(|| dir.join("vars.fd")),
        drivers,
        emulator: None,
        serial_log: Some(dir.join("com1.log")),
        graphics: Graphics::None,
        video: Video::Vga,
    }
}

#[allow(clippy::disallowed_methods)]
fn run(program: &str, args: &[&str]) -> Option<String> {
    let output = std::process::Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(std::process::Stdio::null())
        .output()
        .ok()?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Some(text)
}

/// Both stages of one machine; the second one over the domain the first one left.
#[allow(clippy::print_stderr)]
fn boots_twice(firmware: Firmware, bus: StorageBus, bootstrap: Bootstrap) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let m = machine(dir, firmware, bus, bootstrap);
    let tools = ["virsh", "qemu-system-x86_64", "qemu-img"];
    let firmware = Descriptors::of_host().and_then(|d| d.pick(m.firmware, m.chipset()));
    let missing = tools.iter().find(|t| run(t, &["--version"]).is_none());
    let (None, true, Ok(firmware)) = (missing, rustix::process::geteuid().is_root(), firmware)
    else {
        assert!(
            std::env::var_os("HYPER2KVM_REQUIRE_TOOLS").is_none(),
            "libvirt, QEMU, OVMF and root are required"
        );
        eprintln!("SKIP needs libvirt, QEMU, OVMF and root");
        return;
    };
    write_disk(&dir.join("system.raw"), m.firmware);
    // An empty disk: a firmware that starts from it gets nowhere.
    std::fs::write(dir.join("data.raw"), vec![0; 1 << 20]).unwrap();
    std::fs::write(dir.join("drivers.iso"), vec![0; 1 << 20]).unwrap();
    let probe = dir.join("probe.qcow2");
    run(
        "qemu-img",
        &["create", "-f", "qcow2", probe.to_str().unwrap(), "16M"],
    )
    .unwrap();
    // No virtlogd and no cgroups without a host's libvirt.
    let root = dir.join("libvirt");
    std::fs::create_dir_all(root.join("etc")).unwrap();
    std::fs::write(
        root.join("etc/qemu.conf"),
        "stdio_handler = \"file\"\nuser = \"root\"\ngroup = \"root\"\nremember_owner = 0\n\
         namespaces = []\ncgroup_controllers = []\n",
    )
    .unwrap();
    for stage in [Stage::Bootstrap, Stage::Final] {
        let file = dir.join(format!("{}.xml", stage.as_str()));
        std::fs::write(&file, to_xml(&m, stage, &firmware).unwrap()).unwrap();
        let script = format!(
            "define {}; start payload; event payload --event lifecycle --timeout 120; destroy payload",
            file.display()
        );
        let uri = format!("qemu:///embed?root={}", root.display());
        let output = run("virsh", &["-q", "-c", &uri, &script]).unwrap();
        let log = std::fs::read_to_string(dir.join("com1.log")).unwrap_or_default();
        assert!(log.contains(MARKER), "{stage:?} {bus:?}: {output}\n{log}");
        assert!(
            output.contains("Shutdown Finished"),
            "{stage:?} {bus:?}: {output}"
        );
        std::fs::remove_file(dir.join("com1.log")).unwrap();
    }
}

#[test]
#[ignore = "boots machines under software emulation"]
fn bios() {
    for bus in [StorageBus::VirtioBlk, StorageBus::VirtioScsi] {
        boots_twice(Firmware::Bios, bus, Bootstrap::Sata);
    }
}

#[test]
#[ignore = "boots machines under software emulation"]
fn bios_from_ide() {
    boots_twice(Firmware::Bios, StorageBus::VirtioBlk, Bootstrap::Ide);
}

#[test]
#[ignore = "boots machines under software emulation"]
fn uefi() {
    for bus in [StorageBus::VirtioBlk, StorageBus::VirtioScsi] {
        boots_twice(UEFI, bus, Bootstrap::Sata);
    }
}
