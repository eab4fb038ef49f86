//! From a machine to two boots: what `convert` writes is judged by libvirt, and `boot` is run with a
//! payload of our own where Windows' boot loader would be.
//!
//! The payload is a few machine instructions, as a boot sector or as an EFI application. The guest's own
//! firmware loads it from the converted disk; it writes the marker to COM1 and powers the machine off, or
//! fails in a way a test asks for. libvirt is a session daemon of an ordinary user with all its folders
//! below a temporary one, QEMU runs under software emulation. This proves firmware, controllers, boot
//! order, XML, and the state machine of `boot`. It says nothing about Windows.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod support;

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use hyper2kvm::boot::MARKER;
use hyper2kvm::demo::{Firmware, GuestSpec, Role, WinVersion};
use serde_json::Value;
use support::{Lab, Run, TOOLS, binary, finish, h2k, have, tool, virtio_win};

const NOBODY: &str = "65534";

// ---- payloads ----

#[derive(Clone, Copy)]
enum End {
    PowerOff,
    Hang,
    Reset,
    Panic,
}

/// Real mode, loaded at 7C00h with the disk in DL. `count` adds one to the first byte of sector 10.
fn boot_code(message: &str, count: bool, end: End) -> Vec<u8> {
    let mut code = vec![
        0xfa, // cli
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0x8e, 0xc0, // mov es, ax
        0x8e, 0xd0, // mov ss, ax
        0xbc, 0x00, 0x7c, // mov sp, 7c00h
        0xfc, // cld
    ];
    if count {
        for (service, more) in [(0x02, &[0xfe, 0x06, 0x00, 0x7e][..]), (0x03, &[])] {
            code.extend([
                0xb6, 0x00, // mov dh, 0
                0xb8, 0x01, service, // mov ax: read or write one sector
                0xb9, 0x0b, 0x00, // mov cx, 11: cylinder 0, sector 11
                0xbb, 0x00, 0x7e, // mov bx, 7e00h
                0xcd, 0x13, // int 13h
            ]);
            code.extend(more); // inc byte [7e00h]
        }
    }
    let tail: &[u8] = match end {
        // Sleep state S5 through the PM1a control register.
        End::PowerOff => &[0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4, 0xeb, 0xfd],
        End::Hang => &[0xf4, 0xeb, 0xfd],
        // The keyboard controller pulls the reset line.
        End::Reset => &[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd],
        // pvpanic
        End::Panic => &[0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd],
    };
    let print = 14;
    let text = 0x7c00 + code.len() + print + tail.len();
    code.push(0xbe); // mov si, text
    code.extend(u16::try_from(text).unwrap().to_le_bytes());
    code.extend([
        0xba, 0xf8, 0x03, // mov dx, 3f8h
        0xac, // next: lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x03, // jz done
        0xee, // out dx, al
        0xeb, 0xf8, // jmp next
    ]);
    code.extend(tail);
    code.extend(message.bytes());
    code.extend(b"\r\n\0");
    assert!(code.len() <= 440, "the partition table begins there");
    code.resize(440, 0);
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
    // The firmware has written to the line already.
    code.extend(format!("\r\n{MARKER}\r\n\0").bytes());
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

/// A guest with the payload in it that comes up and powers off.
fn guest(firmware: Firmware) -> Lab {
    let version = match firmware {
        Firmware::Uefi => WinVersion::Server2022,
        Firmware::Bios => WinVersion::Win10,
    };
    let mut spec = GuestSpec::new(version);
    spec.firmware = firmware;
    spec.disk_size = 1 << 30;
    let lab = Lab::new(spec);
    match firmware {
        Firmware::Bios => {
            let mut disk = fs::File::options().write(true).open(&lab.raw).unwrap();
            disk.seek(SeekFrom::Start(0)).unwrap();
            disk.write_all(&boot_code(MARKER, false, End::PowerOff))
                .unwrap();
        }
        Firmware::Uefi => {
            let payload = lab.path("payload.efi");
            fs::write(&payload, efi_application()).unwrap();
            let esp = lab.spec.partition(Role::Esp).unwrap();
            let image = format!("{}@@{}", lab.raw.display(), esp.start);
            // Windows' own loader and the fall-back: a fall-back that is another program is replaced.
            for to in [
                "::/EFI/Boot/bootx64.efi",
                "::/EFI/Microsoft/Boot/bootmgfw.efi",
            ] {
                tool(
                    "mcopy",
                    &["-o", "-i", &image, payload.to_str().unwrap(), to],
                );
            }
        }
    }
    lab
}

// ---- a libvirt of our own ----

/// The session daemon of an ordinary user, started by the first connection.
struct Libvirt {
    dir: tempfile::TempDir,
}

impl Libvirt {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("run")).unwrap();
        let libvirt = Self { dir };
        libvirt.give(libvirt.dir.path());
        libvirt
    }

    fn give(&self, path: &Path) {
        let owner = format!("{NOBODY}:{NOBODY}");
        tool("chown", &["-R", &owner, path.to_str().unwrap()]);
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--reuid={NOBODY}"))
            .arg(format!("--regid={NOBODY}"))
            .args(["--clear-groups"])
            .arg(program)
            .current_dir("/")
            .env("LC_ALL", "C")
            .env("HOME", self.dir.path())
            .env("LIBVIRT_DEFAULT_URI", "qemu:///session");
        for (name, folder) in [
            ("XDG_RUNTIME_DIR", "run"),
            ("XDG_CONFIG_HOME", "config"),
            ("XDG_CACHE_HOME", "cache"),
            ("XDG_DATA_HOME", "data"),
        ] {
            command.env(name, self.dir.path().join(folder));
        }
        command
    }

    fn virsh(&self, args: &[&str]) -> Run {
        let mut command = self.command(Path::new("virsh"));
        command.arg("-q").args(args);
        finish(command)
    }

    fn boot(&self, out: &Path, more: &[&str]) -> Run {
        let mut command = self.command(Path::new(binary()));
        command.arg("boot").arg(out).args(["--json"]).args(more);
        finish(command)
    }

    fn state(&self, name: &str) -> String {
        self.virsh(&["domstate", name])
            .expect(0)
            .stdout
            .trim()
            .into()
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        let running = self.virsh(&["list", "--uuid"]).stdout;
        for uuid in running.lines().filter(|l| !l.trim().is_empty()) {
            self.virsh(&["destroy", uuid.trim()]);
        }
        for daemon in ["libvirtd", "virtlogd"] {
            let file = self.dir.path().join(format!("run/libvirt/{daemon}.pid"));
            if let Ok(pid) = fs::read_to_string(file) {
                let _ = Command::new("kill").arg(pid.trim()).status();
            }
        }
    }
}

fn able() -> bool {
    have(&TOOLS)
        && have(&[
            "virsh",
            "libvirtd",
            "virtlogd",
            "virt-xml-validate",
            "qemu-system-x86_64",
        ])
        && have(&["setpriv", "mcopy", "qemu-io", "tar"])
        && rustix::process::geteuid().is_root()
}

// ---- sources ----

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Input {
    Plain,
    Vmx,
    Ovf,
    Ova,
}

/// The guest as a machine in a folder of its own; with two disks the empty one comes first.
fn source(lab: &Lab, input: Input, disks: usize, firmware: &str) -> PathBuf {
    let name = format!("{input:?}-{disks}").to_lowercase();
    let folder = lab.path(&name);
    fs::create_dir(&folder).unwrap();
    let file = |name: &str| folder.join(name);
    let make = |format: &str, options: &str, from: &Path, to: &Path| {
        let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
        let args = [
            "convert", "-f", "raw", "-O", format, "-o", options, from, to,
        ];
        tool("qemu-img", &args);
    };
    if input == Input::Plain {
        return lab.raw.clone();
    }
    let subformat = match input {
        Input::Vmx => "subformat=monolithicSparse",
        _ => "subformat=streamOptimized",
    };
    let mut names = vec!["system.vmdk"];
    make("vmdk", subformat, &lab.raw, &file("system.vmdk"));
    if disks == 2 {
        let data = lab.path("data.raw");
        fs::write(&data, vec![0; 16 << 20]).unwrap();
        make("vmdk", subformat, &data, &file("data.vmdk"));
        names.insert(0, "data.vmdk");
    }
    if input == Input::Vmx {
        let mut text = format!(
            ".encoding = \"UTF-8\"\nconfig.version = \"8\"\ndisplayName = \"{name}\"\n\
             firmware = \"{firmware}\"\nmemsize = \"256\"\nnumvcpus = \"1\"\n\
             uuid.bios = \"56 4d 3a 6b 00 11 22 33-44 55 66 77 88 99 aa bb\"\n\
             scsi0.present = \"TRUE\"\nscsi0.virtualDev = \"lsisas1068\"\n\
             ethernet0.present = \"TRUE\"\nethernet0.addressType = \"generated\"\n\
             ethernet0.generatedAddress = \"00:0c:29:11:22:33\"\n\
             ethernet1.present = \"TRUE\"\nethernet1.startConnected = \"FALSE\"\n\
             ethernet1.addressType = \"static\"\nethernet1.address = \"00:50:56:11:22:33\"\n"
        );
        for (i, disk) in names.iter().enumerate() {
            text += &format!("scsi0:{i}.present = \"TRUE\"\nscsi0:{i}.fileName = \"{disk}\"\n");
        }
        fs::write(file("vm.vmx"), text).unwrap();
        return file("vm.vmx");
    }
    let (mut files, mut list, mut items) = (String::new(), String::new(), String::new());
    for (i, disk) in names.iter().enumerate() {
        files += &format!(r#"<File ovf:href="{disk}" ovf:id="f{i}"/>"#);
        list += &format!(
            r#"<Disk ovf:diskId="d{i}" ovf:fileRef="f{i}" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>"#
        );
        items += &format!(
            "<Item><rasd:AddressOnParent>{i}</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/d{i}</rasd:HostResource><rasd:InstanceID>9{i}</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>"
        );
    }
    let ovf = format!(
        r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vmw="http://www.vmware.com/schema/ovf">
<References>{files}</References><DiskSection><Info/>{list}</DiskSection>
<VirtualSystem ovf:id="{name}"><Info/><Name>{name}</Name><VirtualHardwareSection><Info/>
<Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>1</rasd:VirtualQuantity></Item>
<Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>256</rasd:VirtualQuantity></Item>
<Item><rasd:Address>0</rasd:Address><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>lsilogicsas</rasd:ResourceSubType><rasd:ResourceType>6</rasd:ResourceType></Item>
{items}<vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="{firmware}"/>
</VirtualHardwareSection></VirtualSystem></Envelope>"#
    );
    fs::write(file("vm.ovf"), ovf).unwrap();
    if input == Input::Ovf {
        return file("vm.ovf");
    }
    let manifest: String = ["vm.ovf"]
        .iter()
        .chain(&names)
        .map(|name| format!("SHA256({name})= {}\n", support::sha256(&file(name))))
        .collect();
    fs::write(file("vm.mf"), manifest).unwrap();
    let mut args = vec!["-C", folder.to_str().unwrap(), "-cf"];
    let ova = file("vm.ova");
    args.extend([ova.to_str().unwrap(), "vm.ovf", "vm.mf"]);
    args.extend(&names);
    tool("tar", &args);
    ova
}

/// `convert` into a folder of its own, as a machine for software emulation in a session.
fn convert(lab: &Lab, source: &Path, name: &str, more: &[&str]) -> (PathBuf, Value) {
    let out = lab.path(&format!("{name}-kvm"));
    let (source, iso) = (source.to_str().unwrap(), virtio_win().to_str().unwrap());
    let mut args = vec![
        "convert",
        source,
        "--virtio-iso",
        iso,
        "-o",
        out.to_str().unwrap(),
    ];
    args.extend(["--name", name, "--memory", "256", "--vcpus", "1"]);
    // Several session daemons do not see which VNC ports the others take.
    args.extend(["--graphics", "none"]);
    args.extend(["--domain-type", "qemu", "--user-network", "--json"]);
    args.extend(more);
    let report = h2k(args).expect(0).json();
    (out, report)
}

fn snapshots(disk: &str) -> String {
    String::from_utf8(tool("qemu-img", &["snapshot", "-l", disk])).unwrap()
}

/// One row of the matrix: convert, validate, define, and where asked boot twice.
fn machine(lab: &Lab, libvirt: &Libvirt, row: (Input, &str, usize, bool)) {
    let (input, storage, disks, boots) = row;
    eprintln!("{:?} {row:?}", lab.spec.firmware);
    let uefi = lab.spec.firmware == Firmware::Uefi;
    let source = source(lab, input, disks, if uefi { "efi" } else { "bios" });
    let name = format!("{input:?}-{storage}-{disks}").to_lowercase();
    let (out, report) = convert(lab, &source, &name, &["--storage", storage]);
    let outputs = &report["outputs"];
    assert_eq!(outputs["disks"].as_array().unwrap().len(), disks);
    for key in ["bootstrap_xml", "final_xml"] {
        let path = outputs[key].as_str().unwrap();
        tool("virt-xml-validate", &[path, "domain"]);
        let xml = fs::read_to_string(path).unwrap();
        assert_eq!(xml.contains("<loader"), uefi, "{key}");
        let boot = xml.find("<boot order=\"1\"").unwrap();
        let system = xml.find(outputs["disks"][0].as_str().unwrap()).unwrap();
        let next = xml[system..].find("</disk>").unwrap() + system;
        assert!(
            system < boot && boot < next,
            "{key} boots from another disk"
        );
        if input == Input::Vmx {
            let nics = xml.matches("<interface type=\"user\"").count();
            assert_eq!(
                (nics, xml.matches("<link state=\"down\"/>").count()),
                (2, 1)
            );
            assert!(xml.contains("00:0c:29:11:22:33"));
        }
    }
    libvirt.give(lab.dir.path());
    for key in ["final_xml", "bootstrap_xml"] {
        libvirt
            .virsh(&["define", outputs[key].as_str().unwrap()])
            .expect(0);
    }
    if !boots {
        return;
    }
    let record = libvirt.boot(&out, &["--timeout", "150"]).expect(0).json();
    assert_eq!(record["schema"], "hyper2kvm/boot/1");
    assert_eq!(record["phase"], "done");
    for stage in ["bootstrap", "final"] {
        assert_eq!(record[stage]["up_by"], "marker", "{stage}: {record:#}");
    }
    // Windows has not run, and it is said.
    assert_eq!(record["proof"]["bound"], false);
    assert!(record["warnings"].to_string().contains("has not bound"));
    for disk in outputs["disks"].as_array().unwrap() {
        assert!(!snapshots(disk.as_str().unwrap()).contains("hyper2kvm"));
    }
    // Done is done.
    let before = fs::read(out.join("boot.json")).unwrap();
    libvirt.boot(&out, &[]).expect(0);
    assert_eq!(fs::read(out.join("boot.json")).unwrap(), before);
    let defined = libvirt
        .virsh(&["dumpxml", &name, "--inactive"])
        .expect(0)
        .stdout;
    assert!(defined.contains("stage=\"final\"") && !defined.contains("com1-"));
}

#[test]
fn bios_machines() {
    if !able() {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Bios), Libvirt::new());
    for row in [
        (Input::Plain, "virtio-blk", 1, true),
        (Input::Ovf, "virtio-scsi", 2, true),
        (Input::Vmx, "virtio-blk", 2, false),
        (Input::Ova, "virtio-scsi", 1, false),
    ] {
        machine(&lab, &libvirt, row);
    }
}

#[test]
fn uefi_machines() {
    if !able() {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Uefi), Libvirt::new());
    for row in [
        (Input::Vmx, "virtio-scsi", 2, true),
        (Input::Ova, "virtio-blk", 1, true),
        (Input::Plain, "virtio-scsi", 1, false),
        (Input::Ovf, "virtio-blk", 2, false),
    ] {
        machine(&lab, &libvirt, row);
    }
    eprintln!("the guest wins over what the source says");
    let wrong = lab.path("wrong");
    fs::create_dir(&wrong).unwrap();
    let vmx = "firmware = \"bios\"\nuefi.secureBoot.enabled = \"TRUE\"\nscsi0:0.present = \"TRUE\"\nscsi0:0.fileName = \"system.raw\"\nscsi0.present = \"TRUE\"\n";
    fs::write(wrong.join("vm.vmx"), vmx).unwrap();
    fs::hard_link(&lab.raw, wrong.join("system.raw")).unwrap();
    let more = ["--source-format", "raw", "--portable"];
    let (_, report) = convert(&lab, &wrong.join("vm.vmx"), "wrong", &more);
    let warnings = report["warnings"].to_string();
    assert!(
        warnings.contains("says BIOS, but Windows is installed for UEFI"),
        "{warnings}"
    );
    let path = report["outputs"]["final_xml"].as_str().unwrap();
    tool("virt-xml-validate", &[path, "domain"]);
    let xml = fs::read_to_string(path).unwrap();
    assert!(
        xml.contains("firmware=\"efi\"") && !xml.contains("<loader") && !xml.contains("<graphics")
    );
}

/// Puts other code into the boot sector of a machine that is off.
fn replace_payload(lab: &Lab, disk: &str, code: &[u8]) {
    let file = lab.path("payload.bin");
    fs::write(&file, code).unwrap();
    let write = format!("write -q -s {} 0 440", file.display());
    tool("qemu-io", &["-f", "qcow2", "-c", &write, disk]);
}

/// The first byte of sector 10, also of a running machine.
fn counter(disk: &str) -> u8 {
    let args = ["-U", "-r", "-f", "qcow2", "-c", "read -v 5120 16", disk];
    let dump = String::from_utf8(tool("qemu-io", &args)).unwrap();
    let line = dump.lines().find_map(|l| l.split_once(':')).unwrap().1;
    u8::from_str_radix(line.split_whitespace().next().unwrap(), 16).unwrap()
}

#[test]
fn failures_are_named_and_undone() {
    if !able() {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Bios), Libvirt::new());
    let (out, report) = convert(&lab, &lab.raw, "vm", &[]);
    libvirt.give(lab.dir.path());
    let disk = report["outputs"]["disks"][0].as_str().unwrap();
    let record =
        || -> Value { serde_json::from_slice(&fs::read(out.join("boot.json")).unwrap()).unwrap() };
    let cases = [
        (End::PowerOff, "stopped", "shut off"),
        (End::Panic, "panic", "crashed"),
        (End::Reset, "reboot-loop", "shut off"),
        (End::Hang, "timeout", "running"),
    ];
    for (end, code, state) in cases {
        eprintln!("first boot: {code}");
        if code == "reboot-loop" {
            libvirt.virsh(&["destroy", "vm"]).expect(0);
        }
        replace_payload(&lab, disk, &boot_code("up, but not Windows", false, end));
        let run = libvirt
            .boot(&out, &["--timeout", "12", "--max-reboots", "2"])
            .expect(4);
        assert_eq!(run.json()["error"]["code"], 4);
        assert_eq!(record()["bootstrap"]["failure"], code, "{}", run.stderr);
        assert_eq!(record()["phase"], "bootstrap");
        assert_eq!(libvirt.state("vm"), state);
        if code == "timeout" || code == "panic" {
            let shot = record()["bootstrap"]["screenshot"].as_str().map(fs::read);
            assert!(shot.unwrap().unwrap().starts_with(b"\x89PNG"));
        }
    }
    eprintln!("watching goes on");
    let id = libvirt.virsh(&["domid", "vm"]).stdout;
    libvirt.boot(&out, &["--timeout", "1"]).expect(4);
    assert_eq!(
        libvirt.virsh(&["domid", "vm"]).stdout,
        id,
        "it was restarted"
    );
    libvirt.virsh(&["destroy", "vm"]).expect(0);

    eprintln!("the first boot alone");
    let good = boot_code(MARKER, false, End::PowerOff);
    replace_payload(&lab, disk, &good);
    libvirt.boot(&out, &["--stop-after", "bootstrap"]).expect(0);
    assert_eq!(record()["phase"], "bootstrap-done");

    eprintln!("final: hangs after writing to the disk");
    replace_payload(&lab, disk, &boot_code("writing", true, End::Hang));
    let run = libvirt.boot(&out, &["--timeout", "20"]).expect(4);
    assert!(
        run.stderr.contains("as it was before the switch"),
        "{}",
        run.stderr
    );
    assert_eq!(
        (
            record()["phase"].as_str(),
            record()["final"]["failure"].as_str()
        ),
        (Some("final-failed"), Some("timeout"))
    );
    let evidence = out.join("evidence-final");
    let com1 = fs::read_to_string(evidence.join("com1.log")).unwrap();
    assert!(com1.contains("writing"), "{com1}");
    for file in ["screen.png", "domain.xml", "SYSTEM", "qemu.log"] {
        assert!(evidence.join(file).is_file(), "no {file}: {:#}", record());
    }
    let live = libvirt.virsh(&["dumpxml", "vm"]).expect(0).stdout;
    assert!(live.contains("stage=\"bootstrap\""));
    assert_eq!(libvirt.state("vm"), "running");
    // The final boot has counted one, that was undone, and the first machine counts again.
    let begin = std::time::Instant::now();
    while counter(disk) == 0 && begin.elapsed().as_secs() < 60 {
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
    libvirt.virsh(&["destroy", "vm"]).expect(0);
    assert_eq!(counter(disk), 1);
    assert!(!snapshots(disk).contains("hyper2kvm"));

    eprintln!("and then it works");
    replace_payload(&lab, disk, &good);
    libvirt.boot(&out, &["--timeout", "60"]).expect(0);
    assert_eq!(record()["phase"], "done");

    eprintln!("a domain of somebody else");
    let xml = out.join("foreign.xml");
    let theirs = libvirt
        .virsh(&["dumpxml", "vm", "--inactive"])
        .expect(0)
        .stdout;
    fs::write(&xml, theirs.replace("urn:hyper2kvm", "urn:other")).unwrap();
    libvirt.virsh(&["undefine", "vm"]).expect(0);
    libvirt.virsh(&["define", xml.to_str().unwrap()]).expect(0);
    let run = libvirt.boot(&out, &[]).expect(3);
    assert!(run.stderr.contains("did not define"), "{}", run.stderr);
}
