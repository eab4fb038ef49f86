//! INF, ISO, tar, machine files, images' heads, catalogues, programs, compressed chunks.

use std::fs;
use std::path::Path;

use hyper2kvm::demo::{Arch, cat, pack, pe, virtio_win};
use hyper2kvm::guest::wof;
use hyper2kvm::tool::Cmd;
use hyper2kvm_fuzz::{SEAL, from_sectors};

use crate::{Result, Seeds};

const VMX: &str = r#".encoding = "UTF-8"
config.version = "8"
displayName = "Windows 11 |22x|22"
guestOS = "windows11-64"
firmware = "efi"
uefi.secureBoot.enabled = "TRUE"
memsize = "4096"
numvcpus = "2"
cpuid.coresPerSocket = "2"
scsi0.present = "TRUE"
scsi0.virtualDev = "pvscsi"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "disk.vmdk"
scsi0:0.deviceType = "scsi-hardDisk"
nvme0.present = "TRUE"
nvme0:1.present = "TRUE"
nvme0:1.fileName = "other-000001.vmdk"
ide1:0.present = "TRUE"
ide1:0.deviceType = "cdrom-image"
ethernet0.present = "TRUE"
ethernet0.virtualDev = "vmxnet3"
ethernet0.generatedAddress = "00:0c:29:f3:ff:de"
snapshot.numSnapshots = "1"
"#;

const OVF: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vmw="http://www.vmware.com/schema/ovf">
<References><File ovf:href="disk.vmdk" ovf:id="file1" ovf:size="1" ovf:compression="gzip"/></References>
<DiskSection><Info/><Disk ovf:capacity="60" ovf:capacityAllocationUnits="byte * 2^30" ovf:diskId="vmdisk1" ovf:fileRef="file1"/></DiskSection>
<NetworkSection><Info/><Network ovf:name="VM Network"/></NetworkSection>
<VirtualSystem ovf:id="vm"><Info/><Name>demo &amp; &#x41;</Name>
<OperatingSystemSection ovf:id="103" vmw:osType="windows9_64Guest"><Info/></OperatingSystemSection>
<VirtualHardwareSection><Info/>
<Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
<Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>4096</rasd:VirtualQuantity></Item>
<Item><rasd:Address>0</rasd:Address><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>lsilogicsas</rasd:ResourceSubType><rasd:ResourceType>6</rasd:ResourceType></Item>
<Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource><rasd:InstanceID>4</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
<Item><rasd:Connection>VM Network</rasd:Connection><rasd:InstanceID>5</rasd:InstanceID><rasd:ResourceSubType>VmxNet3</rasd:ResourceSubType><rasd:ResourceType>10</rasd:ResourceType></Item>
<vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/>
</VirtualHardwareSection></VirtualSystem></Envelope>
"#;

const MANIFEST: &str = "SHA256(disk.vmdk)= \
    e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n\
    SHA1 (a.ovf)= da39a3ee5e6b4b0d3255bfef95601890afd80709\n";

const DOMAIN: &str = r#"<domain type='kvm'><name>demo</name><memory unit='KiB'>4194304</memory>
<vcpu placement='static'>2</vcpu><cpu><topology sockets='1' cores='2' threads='1'/></cpu>
<os firmware='efi'><type arch='x86_64' machine='pc-q35-9.0'>hvm</type>
<loader readonly='yes' secure='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader></os>
<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='disk.qcow2'/>
<target dev='sda' bus='sata'/><boot order='1'/></disk>
<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/></disk>
<interface type='network'><mac address='52:54:00:12:34:56'/><source network='default'/><model type='e1000e'/></interface>
<tpm model='tpm-crb'/></devices></domain>
"#;

const VMDK: &str = r#"# Disk DescriptorFile
version=1
encoding="UTF-8"
CID=fffffffe
parentCID=ffffffff
createType="twoGbMaxExtentSparse"
RW 4192256 SPARSE "disk-s001.vmdk"
RW 2048 FLAT "disk-flat.vmdk" 128
RW 2048 ZERO
ddb.adapterType = "lsilogic"
"#;

fn infs(seeds: &Seeds) -> Result<()> {
    for (driver, os, arch) in [
        ("viostor", "w11", Arch::Amd64),
        ("vioscsi", "w7", Arch::X86),
        ("NetKVM", "w10", Arch::Amd64),
        ("Balloon", "xp", Arch::X86),
    ] {
        if let Some(inf) = virtio_win::inf(driver, os, arch) {
            seeds.write("inf", &format!("{driver}-{os}"), &inf)?;
        }
    }
    Ok(())
}

fn isos(seeds: &Seeds, work: &Path) -> Result<()> {
    let folder = work.join("cd");
    for (name, bytes) in [
        ("viostor/w11/amd64/viostor.inf", &b"[Version]"[..]),
        ("viostor/w11/amd64/viostor.sys", b"MZ"),
        ("a name that is longer than a plain one.txt", b"text"),
    ] {
        let file = folder.join(name);
        fs::create_dir_all(file.parent().expect("a folder"))?;
        fs::write(file, bytes)?;
    }
    for (name, options) in [
        ("plain", &["-iso-level", "3"][..]),
        ("joliet", &["-J", "-joliet-long"]),
        ("rock", &["-R"]),
        ("all", &["-J", "-R"]),
    ] {
        let iso = work.join(name);
        Cmd::new("genisoimage")
            .args(["-quiet", "-no-pad"])
            .args(options)
            .arg("-o")
            .args([&iso, &folder])
            .run()?;
        let image = fs::read(iso)?;
        seeds.write("iso", name, &from_sectors(&image[16 * 2048..], 2048))?;
    }
    Ok(())
}

fn archives(seeds: &Seeds, work: &Path) -> Result<()> {
    let folder = work.join("ova");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("a.ovf"), "<Envelope/>")?;
    fs::write(folder.join("disk.vmdk"), "KDMV")?;
    let deep = folder.join("d".repeat(90));
    fs::create_dir_all(&deep)?;
    // In ustar the path is split, the other formats need a header of its own for it.
    fs::write(deep.join("n".repeat(90)), "name")?;
    for format in ["ustar", "gnu", "pax"] {
        let out = Cmd::new("tar")
            .args(["--format", format, "--mtime=@0", "--owner=0", "--group=0"])
            .args(["--sort=name", "-C"])
            .arg(&folder)
            .args(["-b", "1", "-cf", "-", "."])
            .run()?;
        let input = [&[SEAL][..], &out.stdout].concat();
        seeds.write("tar", format, &input)?;
    }
    Ok(())
}

fn chunks(seeds: &Seeds, work: &Path) -> Result<()> {
    let program = pe::image(Arch::Amd64, pe::Subsystem::Native);
    let data = &program[..4096.min(program.len())];
    let chunk = |kind: u8, size: usize, packed: &[u8]| {
        let mut input = vec![kind];
        input.extend((size as u16).to_le_bytes());
        input.extend(packed);
        input
    };
    seeds.write(
        "unpack",
        "xpress",
        &chunk(0, data.len(), &pack::stream(data)),
    )?;
    // A WIM resource is laid out like the stream of CompactOS: after the header, without a table
    // when it is one chunk.
    let folder = work.join("wim");
    fs::create_dir_all(&folder)?;
    let text = "All work and no play makes Jack a dull boy. ".repeat(300);
    fs::write(folder.join("file"), [text.as_bytes(), &program].concat())?;
    for (kind, name, size) in [(0, "XPRESS", "32768"), (1, "LZX", "32768")] {
        let wim = work.join(name);
        Cmd::new("wimcapture")
            .args([&folder, &wim])
            .args([
                &format!("--compress={name}"),
                &format!("--chunk-size={size}"),
            ])
            .run()?;
        let wim = fs::read(wim)?;
        let len = (text.len() + program.len()).min(32768);
        seeds.write(
            "unpack",
            &format!("wim-{name}"),
            &chunk(kind, len, &wim[208..]),
        )?;
    }
    // Two literals and a match of the rest: 0x3ffd bytes of "ab".
    let lznt1 = [0x05, 0xb0, 0x04, b'a', b'b', 0xff, 0x1f, 0, 0];
    seeds.write("unpack", "lznt1", &chunk(2, 4096, &lznt1))?;
    let mut table = wof::reparse_point(pack::ALGORITHM);
    table.extend(pack::stream(&program));
    seeds.write("unpack", "table", &chunk(3, program.len(), &table))
}

pub fn write(seeds: &Seeds) -> Result<()> {
    let dir = tempfile::tempdir()?;
    infs(seeds)?;
    isos(seeds, dir.path())?;
    archives(seeds, dir.path())?;
    chunks(seeds, dir.path())?;
    seeds.write("vmx", "full", VMX.as_bytes())?;
    seeds.write("ovf", "envelope", OVF.as_bytes())?;
    seeds.write("ovf", "manifest", MANIFEST.as_bytes())?;
    seeds.write("libvirt", "domain", DOMAIN.as_bytes())?;
    seeds.write("image_head", "vmdk", VMDK.as_bytes())?;
    for format in ["qcow2", "vmdk", "vhdx", "vpc", "vdi"] {
        let image = dir.path().join(format!("image.{format}"));
        Cmd::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(&image)
            .arg("1M")
            .run()?;
        let bytes = fs::read(&image)?;
        let tail = bytes.len().saturating_sub(512);
        let input = [&bytes[..bytes.len().min(1536)], &bytes[tail..]].concat();
        seeds.write("image_head", format, &input)?;
    }
    let program = pe::image(Arch::Amd64, pe::Subsystem::Native);
    seeds.write("pe", "amd64", &program[..1024.min(program.len())])?;
    seeds.write(
        "pe",
        "x86",
        &pe::image(Arch::X86, pe::Subsystem::Native)[..1024],
    )?;
    seeds.write("catalogue", "unsigned", &cat::unsigned(&[&program, b"inf"]))
}
