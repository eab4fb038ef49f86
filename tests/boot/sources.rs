//! Generated VMs to convert, in every form of source.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{self, Lab, tool};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    Plain,
    Vmx,
    Ovf,
    Ova,
}

/// The guest as a VM in a separate directory; with two disks the empty one comes first.
pub fn source(lab: &Lab, input: Input, disks: usize, firmware: &str) -> PathBuf {
    if input == Input::Plain && disks == 1 {
        return lab.raw.clone();
    }
    let name = format!("{input:?}-{disks}").to_lowercase();
    let folder = lab.path(&name);
    if let Some(made) = made(&folder) {
        return made;
    }
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
        // One image is one disk: two of them need the domain XML of a libvirt.
        fs::write(file("data.raw"), vec![0; 16 << 20]).unwrap();
        let disk = |path: &Path, target: &str| {
            format!(
                "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/><target dev='{target}' bus='sata'/></disk>",
                path.display()
            )
        };
        let text = format!(
            "<domain type='kvm'><name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><devices>{}{}</devices></domain>",
            disk(&file("data.raw"), "sda"),
            disk(&lab.raw, "sdb")
        );
        fs::write(file("vm.xml"), text).unwrap();
        return file("vm.xml");
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

/// The source that an earlier row has made in that directory.
fn made(folder: &Path) -> Option<PathBuf> {
    ["vm.vmx", "vm.ova", "vm.ovf", "vm.xml"]
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.exists())
}
