//! Every kind of VM virt-v2v's own tests take, made by hyper2kvm, from end to end: several disks on
//! all sorts of controllers, snapshots, packed disks, directories; and those that are broken.

use std::fs;
use std::path::{Path, PathBuf};

use hyper2kvm::demo::Firmware;
use serde_json::Value;

use crate::convert;
use crate::payload::guest;
use crate::support::{self, Lab, TOOLS, h2k, have, tool, virtio_win};

/// The sector in which a disk says which one it is.
const MARK: usize = 100 * 512;

/// The words at [`MARK`] of a converted disk.
fn mark(disk: &Path) -> String {
    let read = format!("read -v {MARK} 16");
    let dump = tool(
        "qemu-io",
        &["-r", "-f", "qcow2", "-c", &read, disk.to_str().unwrap()],
    );
    let dump = String::from_utf8(dump).unwrap();
    let line = dump.lines().find(|l| l.contains(':')).unwrap_or_default();
    line.rsplit("  ")
        .next()
        .unwrap_or_default()
        .trim_end_matches('.')
        .to_owned()
}

fn write_mark(format: &str, disk: &Path, word: &str) {
    let file = disk.with_extension("mark");
    fs::write(&file, word).unwrap();
    let write = format!("write -q -s {} {MARK} {}", file.display(), word.len());
    tool(
        "qemu-io",
        &["-f", format, "-c", &write, disk.to_str().unwrap()],
    );
    fs::remove_file(file).unwrap();
}

struct Kinds {
    lab: Lab,
}

impl Kinds {
    fn folder(&self, name: &str) -> PathBuf {
        let folder = self.lab.path(name);
        fs::create_dir(&folder).unwrap();
        folder
    }

    /// The guest as one image, and small disks beside it that carry their own names.
    fn image(&self, to: &Path, format: &str, options: &str) {
        let mut args = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([self.lab.raw.to_str().unwrap(), to.to_str().unwrap()]);
        tool("qemu-img", &args);
    }

    fn data(&self, to: &Path, format: &str, word: &str) {
        let mut bytes = vec![0; 8 << 20];
        bytes[MARK..MARK + word.len()].copy_from_slice(word.as_bytes());
        let raw = to.with_extension("raw");
        fs::write(&raw, bytes).unwrap();
        let (from, to) = (raw.to_str().unwrap(), to.to_str().unwrap());
        tool(
            "qemu-img",
            &["convert", "-f", "raw", "-O", format, from, to],
        );
        fs::remove_file(raw).unwrap();
    }

    fn convert(&self, source: &Path, name: &str) -> (PathBuf, Value) {
        eprintln!("{name}");
        convert(&self.lab, source, name, &[])
    }

    fn refused(&self, source: &Path, want: &str) {
        eprintln!("refused: {want}");
        let run = h2k([
            "plan",
            source.to_str().unwrap(),
            "--virtio-iso",
            virtio_win().to_str().unwrap(),
        ]);
        assert_ne!(run.code, 0);
        assert!(run.stderr.contains(want), "{want}: {}", run.stderr);
        let remedy = ["hint:", "export again"];
        let said = remedy.iter().any(|r| run.stderr.contains(r));
        assert!(said, "{}", run.stderr);
    }
}

fn disks(report: &Value) -> Vec<PathBuf> {
    let list = report["outputs"]["disks"].as_array().unwrap();
    list.iter().map(|d| d.as_str().unwrap().into()).collect()
}

const OVF: &str = r#"<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
<References><File ovf:href="DISK" ovf:id="f0"GZIP/></References>
<DiskSection><Info/><Disk ovf:diskId="d0" ovf:fileRef="f0" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/></DiskSection>
<VirtualSystem ovf:id="x"><Info/><Name>x</Name><VirtualHardwareSection><Info/>
<Item><rasd:Address>0</rasd:Address><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>AHCI</rasd:ResourceSubType><rasd:ResourceType>20</rasd:ResourceType></Item>
<Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/d0</rasd:HostResource><rasd:InstanceID>9</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
<Item><rasd:AddressOnParent>1</rasd:AddressOnParent><rasd:InstanceID>10</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>15</rasd:ResourceType></Item>
</VirtualHardwareSection></VirtualSystem></Envelope>"#;

#[test]
fn machines_of_every_kind() {
    if !have(&TOOLS) || !have(&["qemu-io", "gzip", "tar", "virt-xml-validate"]) {
        return;
    }
    let kinds = Kinds {
        lab: guest(Firmware::Bios),
    };

    // Four controllers, the system disk last but one, three NICs, a CD-ROM, a floppy.
    let folder = kinds.folder("many");
    let list = [
        ("scsi0:0", "scsi.vmdk"),
        ("sata0:0", "sata.vmdk"),
        ("ide0:0", "system.vmdk"),
        ("nvme0:0", "nvme.vmdk"),
    ];
    let mut vmx = String::from(
        ".encoding = \"windows-1252\"\nconfig.version = \"8\"\ndisplayName = \"a |22quoted|22 name\"\nfirmware = \"bios\"\n\
         scsi0.present = \"TRUE\"\nsata0.present = \"TRUE\"\nnvme0.present = \"TRUE\"\n\
         ide1:0.present = \"TRUE\"\nide1:0.deviceType = \"cdrom-image\"\nide1:0.fileName = \"install.iso\"\n\
         floppy0.present = \"TRUE\"\n",
    );
    for n in 0..3 {
        vmx += &format!(
            "ethernet{n}.present = \"TRUE\"\nethernet{n}.addressType = \"static\"\nethernet{n}.address = \"00:50:56:00:00:0{n}\"\n"
        );
    }
    for (place, file) in list {
        vmx += &format!("{place}.present = \"TRUE\"\n{place}.fileName = \"{file}\"\n");
        match file {
            "system.vmdk" => {
                kinds.image(&folder.join(file), "vmdk", "subformat=twoGbMaxExtentSparse")
            }
            _ => kinds.data(&folder.join(file), "vmdk", file),
        }
    }
    fs::write(folder.join("vm.vmx"), vmx).unwrap();
    let (out, report) = kinds.convert(&folder.join("vm.vmx"), "many");
    let marks: Vec<String> = disks(&report).iter().skip(1).map(|d| mark(d)).collect();
    assert_eq!(marks, ["scsi.vmdk", "sata.vmdk", "nvme.vmdk"]);
    assert_eq!(report["ready"], true);
    let warnings = report["warnings"].to_string();
    assert!(warnings.to_lowercase().contains("cd-rom"), "{warnings}");
    let xml = fs::read_to_string(out.join("many-final.xml")).unwrap();
    let macs: Vec<_> = (0..3)
        .filter(|n| xml.contains(&format!("00:50:56:00:00:0{n}")))
        .collect();
    assert_eq!(macs.len(), 3);
    assert_eq!(xml.matches("<disk ").count(), 4);
    tool(
        "virt-xml-validate",
        &[out.join("many-final.xml").to_str().unwrap(), "domain"],
    );

    // What was written after the snapshot is part of the VM.
    let folder = kinds.folder("snapshot");
    kinds.image(
        &folder.join("system.vmdk"),
        "vmdk",
        "subformat=monolithicSparse",
    );
    let base = folder.join("system.vmdk");
    let top = folder.join("system-000001.vmdk");
    write_mark("vmdk", &base, "base");
    let create = [
        "create",
        "-q",
        "-f",
        "vmdk",
        "-F",
        "vmdk",
        "-b",
        "system.vmdk",
        top.to_str().unwrap(),
    ];
    tool("qemu-img", &create);
    write_mark("vmdk", &top, "snapshot");
    fs::write(
        folder.join("vm.vmx"),
        "scsi0.present = \"TRUE\"\nscsi0:0.present = \"TRUE\"\nscsi0:0.fileName = \"system-000001.vmdk\"\n",
    )
    .unwrap();
    let (_, report) = kinds.convert(&folder, "snapshot");
    assert_eq!(mark(&disks(&report)[0]), "snapshot");
    fs::rename(&base, folder.join("elsewhere")).unwrap();
    kinds.refused(&folder.join("vm.vmx"), "system.vmdk");

    // A packed disk in an archive, with the manifest of an old exporter; then the same, damaged.
    let folder = kinds.folder("packed");
    let disk = folder.join("system.vmdk");
    kinds.image(&disk, "vmdk", "subformat=streamOptimized");
    tool("gzip", &["-1", "-k", disk.to_str().unwrap()]);
    let write_ovf = |disk: &str, gzip: &str| {
        let text = OVF.replace("DISK", disk).replace("GZIP", gzip);
        fs::write(folder.join("vm.ovf"), text).unwrap();
    };
    write_ovf("system.vmdk.gz", " ovf:compression=\"gzip\"");
    let manifest = |digest: &dyn Fn(&str) -> String, disk: &str| {
        let text = format!(
            "SHA256(vm.ovf)= {}\nSHA256({disk})= {}\n",
            digest("vm.ovf"),
            digest(disk)
        );
        fs::write(folder.join("vm.mf"), text).unwrap();
    };
    let sha256 = |name: &str| support::sha256(&folder.join(name));
    let archive = |name: &str, disk: &str| {
        let ova = kinds.lab.path(name);
        let (to, from) = (ova.to_str().unwrap(), folder.to_str().unwrap());
        tool("tar", &["-C", from, "-cf", to, "vm.ovf", "vm.mf", disk]);
        ova
    };
    manifest(&sha256, "system.vmdk.gz");
    let ova = archive("packed.ova", "system.vmdk.gz");
    let (out, report) = kinds.convert(&ova, "packed-ova");
    assert_eq!(report["ready"], true);
    let dropped = report["warnings"].to_string().to_lowercase();
    assert!(dropped.contains("a cd-rom drive is left out"), "{dropped}");
    assert!(
        fs::read_to_string(out.join("packed-ova-final.xml"))
            .unwrap()
            .matches("<disk ")
            .count()
            == 1
    );
    let whole = fs::metadata(&ova).unwrap().len();
    fs::File::options()
        .write(true)
        .open(&ova)
        .unwrap()
        .set_len(whole / 2)
        .unwrap();
    kinds.refused(&ova, "packed.ova");

    // The unpacked directory is a source too, and is checked in place.
    write_ovf("system.vmdk", "");
    manifest(&sha256, "system.vmdk");
    let (_, report) = kinds.convert(&folder, "directory");
    assert_eq!(report["ready"], true);
    manifest(&|_| "0".repeat(64), "system.vmdk");
    kinds.refused(&folder, "is damaged");
    let bad = archive("bad.ova", "system.vmdk");
    kinds.refused(&bad, "is damaged");
    fs::remove_file(folder.join("vm.mf")).unwrap();
    fs::remove_file(&disk).unwrap();
    kinds.refused(&folder.join("vm.ovf"), "is missing");

    // A Hyper-V export: the disks, and what its settings file does not tell.
    let folder = kinds.folder("hyperv");
    fs::create_dir_all(folder.join("Virtual Machines")).unwrap();
    fs::create_dir_all(folder.join("Virtual Hard Disks")).unwrap();
    fs::write(folder.join("Virtual Machines/1.vmcx"), b"binary").unwrap();
    kinds.image(&folder.join("Virtual Hard Disks/system.vhdx"), "vhdx", "");
    kinds.data(
        &folder.join("Virtual Hard Disks/data.vhdx"),
        "vhdx",
        "data.vhdx",
    );
    let (_, report) = kinds.convert(&folder, "hyperv");
    assert_eq!(disks(&report).len(), 2);
    assert_eq!(mark(&disks(&report)[1]), "data.vhdx");
    assert!(
        report["warnings"]
            .to_string()
            .contains("undocumented format")
    );
    fs::write(folder.join("Virtual Hard Disks/system_1.avhdx"), b"x").unwrap();
    kinds.refused(&folder, "checkpoint");
}
