//! Descriptions of products that were once parsed wrong, or refused for the wrong reason.

use super::*;

const OVIRT: &str = r#"<?xml version='1.0' encoding='UTF-8'?>
<ovf:Envelope xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1/" xmlns:rasd="r" xmlns:xsi="i" ovf:version="4.4.0.0">
 <References><File ovf:href="IMAGES/0a-1" ovf:id="0a-1"/><File ovf:href="IMAGES/0b-2" ovf:id="0b-2"/></References>
 <Section xsi:type="ovf:NetworkSection_Type"><Info/><Network ovf:name="lan"/></Section>
 <Section xsi:type="ovf:DiskSection_Type"><Info/>
  <Disk ovf:diskId="d2" ovf:fileRef="IMAGES/0b-2" ovf:capacity="40" ovf:capacityAllocationUnits="byte * 2^30" ovf:parentRef="" ovf:format="http://www.gnome.org/~markmc/qcow-image-format.html" ovf:volume-format="COW" ovf:disk-interface="VirtIO_SCSI" ovf:boot="false"/>
  <Disk ovf:diskId="d1" ovf:fileRef="IMAGES/0a-1" ovf:capacity="60" ovf:capacityAllocationUnits="byte * 2^30" ovf:parentRef="" ovf:format="http://www.gnome.org/~markmc/qcow-image-format.html" ovf:disk-interface="VirtIO" ovf:boot="true"/>
 </Section>
 <Content ovf:id="out" xsi:type="ovf:VirtualSystem_Type">
  <Name>files1</Name><BiosType>4</BiosType>
  <Section xsi:type="ovf:VirtualHardwareSection_Type"><Info/>
   <Item><rasd:Caption>6 virtual cpu</rasd:Caption><rasd:InstanceId>1</rasd:InstanceId><rasd:ResourceType>3</rasd:ResourceType><rasd:num_of_sockets>3</rasd:num_of_sockets><rasd:cpu_per_socket>2</rasd:cpu_per_socket><rasd:VirtualQuantity>6</rasd:VirtualQuantity></Item>
   <Item><rasd:InstanceId>2</rasd:InstanceId><rasd:ResourceType>4</rasd:ResourceType><rasd:AllocationUnits>MegaBytes</rasd:AllocationUnits><rasd:VirtualQuantity>8192</rasd:VirtualQuantity></Item>
   <Item><rasd:InstanceId>d2</rasd:InstanceId><rasd:ResourceType>17</rasd:ResourceType><rasd:HostResource>IMAGES/0b-2</rasd:HostResource></Item>
   <Item><rasd:InstanceId>d1</rasd:InstanceId><rasd:ResourceType>17</rasd:ResourceType><rasd:HostResource>IMAGES/0a-1</rasd:HostResource></Item>
   <Item><rasd:InstanceId>n1</rasd:InstanceId><rasd:ResourceType>10</rasd:ResourceType><rasd:ResourceSubType>3</rasd:ResourceSubType><rasd:Connection>lan</rasd:Connection><rasd:Linked>false</rasd:Linked><rasd:MACAddress>56:6F:1A:2B:00:01</rasd:MACAddress></Item>
   <Item><rasd:ResourceType>0</rasd:ResourceType><rasd:InstanceId>t1</rasd:InstanceId><Type>tpm</Type></Item>
  </Section>
 </Content>
</ovf:Envelope>"#;

#[test]
fn ovf_of_ovirt() {
    let folder = Folder::new();
    folder.file("vm.ovf", OVIRT);
    for disk in ["IMAGES/0a-1", "IMAGES/0b-2"] {
        folder.file(disk, "x");
    }
    let vm = folder.open("vm.ovf").unwrap();
    assert_eq!(vm.name, "files1");
    assert_eq!((vm.vcpus, vm.memory_mib), (Some(6), Some(8192)));
    assert_eq!(vm.cores_per_socket, Some(2));
    assert_eq!(vm.firmware, Some(Firmware::Uefi));
    assert!(vm.secure_boot && vm.tpm);
    assert_eq!(names(&vm), ["0a-1", "0b-2"], "the disk to boot first");
    let kinds: Vec<_> = vm.disks.iter().map(|d| d.controller).collect();
    assert_eq!(kinds, [Controller::Virtio, Controller::Scsi]);
    assert_eq!(vm.disks[0].format.as_deref(), Some("qcow2"));
    let nic = &vm.nics[0];
    assert_eq!(nic.mac.unwrap().to_string(), "56:6f:1a:2b:00:01");
    assert!(!nic.connected);
    assert_eq!(vm.notes, [""; 0]);

    // A disk of a chain is recognised as one.
    folder.file(
        "vm.ovf",
        OVIRT.replacen("parentRef=\"\"", "parentRef=\"d0\"", 1),
    );
    assert!(folder.error("vm.ovf").contains("delta of another disk"));
    // A disk whose description names a location is not left out.
    let lost = OVIRT.replace(
        "<rasd:HostResource>IMAGES/0b-2",
        "<rasd:HostResource>IMAGES/0c-3",
    );
    folder.file("vm.ovf", lost);
    assert!(folder.error("vm.ovf").contains("a disk is at IMAGES/0c-3"));
}

/// Its items have no MAC addresses, on which Windows' static addresses depend.
#[test]
fn nics_of_virtualbox() {
    let folder = Folder::new();
    let nic = "<Item><rasd:InstanceID>7</rasd:InstanceID><rasd:ResourceType>10</rasd:ResourceType>\
               <rasd:ResourceSubType>E1000</rasd:ResourceSubType><rasd:Connection>NAT</rasd:Connection></Item>";
    let machine = "</VirtualHardwareSection><vbox:Machine uuid='{4f5d7c4e-0000-4000-8000-00000000000a}'><Hardware>\
        <TrustedPlatformModule type='v2_0'/><Network>\
        <Adapter slot='0' enabled='true' MACAddress='080027AABB01'/>\
        <Adapter slot='1' enabled='false' MACAddress='080027AABB02'/>\
        <Adapter slot='2' enabled='true' MACAddress='080027AABB03' cable='false'/>\
        </Network></Hardware></vbox:Machine>";
    let text = one_disk("d.vmdk", "")
        .replace("</VirtualHardwareSection>", &format!("{nic}{nic}{machine}"));
    folder.file("d.vmdk", "x");
    folder.file("v.ovf", &text);
    let vm = folder.open("v.ovf").unwrap();
    let nics: Vec<_> = vm
        .nics
        .iter()
        .map(|n| (n.mac.unwrap().to_string(), n.connected))
        .collect();
    assert_eq!(
        nics,
        [
            ("08:00:27:aa:bb:01".into(), true),
            ("08:00:27:aa:bb:03".into(), false)
        ]
    );
    assert!(vm.tpm);
    folder.file("v.ovf", text.replace("type='v2_0'", "type='None'"));
    assert!(!folder.open("v.ovf").unwrap().tpm);
}

#[test]
fn units_of_memory() {
    for (units, quantity, mib) in [
        ("byte * 2^20", 512, Some(512)),
        ("byte*1024^2", 512, Some(512)),
        ("2^30 * byte", 3, Some(3072)),
        ("byte * 10^6", 1024, Some(976)),
        ("Bytes", 1 << 30, Some(1024)),
        ("KiloBytes", 1 << 20, Some(1024)),
        ("MegaByte", 512, Some(512)),
        ("MiB", 512, Some(512)),
        ("Gibibytes", 2, Some(2048)),
        ("TB", 1, Some(1 << 20)),
        ("parsecs", 1, None),
        ("byte * 2^99", 1, None),
    ] {
        let folder = Folder::new();
        folder.file("d.vmdk", "x");
        let old = "<rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>4096";
        let new = old
            .replace("byte * 2^20", units)
            .replace("4096", &quantity.to_string());
        let text = one_disk("d.vmdk", "");
        assert!(text.contains(old));
        folder.file("v.ovf", text.replace(old, &new));
        let vm = folder.open("v.ovf").unwrap();
        assert_eq!(vm.memory_mib, mib, "{units}");
        let told = vm
            .notes
            .iter()
            .any(|n| n.contains("no memory size that is understood"));
        assert_eq!(told, mib.is_none(), "{units}: {:?}", vm.notes);
    }
}

/// The form in which people write them.
#[test]
fn vmx_values_without_quotes() {
    let folder = Folder::new();
    folder.file("d.vmdk", "x");
    folder.file(
        "v.vmx",
        "displayName = \"C# box\"  # the name\nmemSize = 3072  # 3 GB\nnumvcpus = 6\t# six\n\
         annotation = C# and more\nscsi0.present = TRUE # on\nscsi0:0.present = TRUE\n\
         scsi0:0.fileName = \"d.vmdk\" # the disk\n",
    );
    let vm = folder.open("v.vmx").unwrap();
    assert_eq!(
        (vm.name.as_str(), vm.memory_mib, vm.vcpus),
        ("C# box", Some(3072), Some(6))
    );
    let text = fs::read(folder.path("v.vmx")).unwrap();
    assert_eq!(
        Vmx::parse(&text).unwrap().get("annotation"),
        Some("C# and more")
    );
}

#[test]
fn libvirt_disks_that_are_no_files() {
    let folder = Folder::new();
    folder.file("d.img", "x");
    let file = "<disk type='file'><source file='d.img'/><target dev='vda' bus='virtio'/></disk>";
    for (kind, source) in [
        ("network", "<source protocol='rbd' name='pool/x'/>"),
        ("volume", "<source pool='default' volume='x.qcow2'/>"),
        ("nvme", "<source type='pci' namespace='1'/>"),
    ] {
        let disk = format!("<disk type='{kind}'>{source}<target dev='vdb' bus='virtio'/></disk>");
        folder.file(
            "v.xml",
            format!("<domain><name>x</name><devices>{file}{disk}</devices></domain>"),
        );
        let error = folder.error("v.xml");
        assert!(
            error.contains(&format!("disk vdb of type {kind}")),
            "{error}"
        );
        assert!(error.contains("virsh vol-download"), "{error}");
    }
}

#[test]
fn domains_of_esxi_and_of_this_host() {
    let folder = Folder::new();
    let disk = folder.file("win.vmdk", "x");
    let domain = |file: &str| {
        format!(
            "<domain type='vmware'><name>w/in</name><vcpu current='2'>8</vcpu><devices><disk type='file'>\
                 <source file='{file}'/><target dev='sda' bus='scsi'/></disk></devices></domain>"
        )
    };
    folder.file("v.xml", domain("[datastore1] win/win.vmdk"));
    let vm = folder.open("v.xml").unwrap();
    assert_eq!(names(&vm), ["win.vmdk"]);
    assert_eq!(vm.vcpus, Some(8));
    assert!(
        vm.notes[0].starts_with("2 of its 8 processors"),
        "{:?}",
        vm.notes
    );

    // The memory of a domain that was saved and not shut down.
    let saved = folder.path("save");
    folder.file("save/w_in.save", "memory");
    let open = |file: &str| libvirt::open_with(&folder.file("v.xml", domain(file)), &saved);
    open("win.vmdk").unwrap();
    let error = open(disk.to_str().unwrap()).unwrap_err();
    assert_eq!(error.blocker().unwrap().code, "suspended");
    assert!(error.to_string().contains("w_in.save"), "{error}");
    fs::remove_file(folder.path("save/w_in.save")).unwrap();
    open(disk.to_str().unwrap()).unwrap();
}

#[test]
fn a_saved_machine_of_hyper_v() {
    let folder = Folder::new();
    folder.file("hv/Virtual Hard Disks/a.vhd", "x");
    open(&folder.path("hv")).unwrap();
    folder.file("hv/Virtual Machines/4F5D/4F5D.vsv", "memory");
    let error = open(&folder.path("hv")).unwrap_err();
    assert_eq!(error.blocker().unwrap().code, "suspended");
}

#[test]
fn descriptions_that_are_not_read_name_what_is() {
    let folder = Folder::new();
    for (file, says) in [
        ("m.vbox", "VBoxManage export"),
        ("m.VMCX", "directory of the export"),
        ("m.xva", "vdi-export"),
        ("m.pvs", ".hds"),
    ] {
        folder.file(file, "x");
        assert!(
            folder.error(file).contains(says),
            "{file}: {}",
            folder.error(file)
        );
    }
    folder.file(
        "m.vmx",
        "ide1:0.present = \"TRUE\"\nide1:0.fileName = \"cd.iso\"\n",
    );
    assert!(
        folder
            .error("m.vmx")
            .contains("CD-ROM ide1:0 (cd.iso) is left out")
    );
}

#[test]
fn vmdks_that_point_at_objects_and_devices() {
    let folder = Folder::new();
    for (extent, says) in [
        ("RW 8 VMFS \"vsan://4f5d7c4e-1\"", "vSAN or vVols"),
        ("RW 8 OBJECT \"vvol://x\"", "vmkfstools -i"),
        ("RW 8 VMFSRDM \"d-rdm.vmdk\"", "raw device"),
        ("RW 8 VMFSRAW \"/vmfs/devices/disks/x\"", "raw device"),
    ] {
        let text =
            format!("# Disk DescriptorFile\nversion=1\nCID=1\ncreateType=\"vmfs\"\n{extent}\n");
        folder.file("d.vmdk", text);
        assert!(
            folder.error("d.vmdk").contains(says),
            "{}",
            folder.error("d.vmdk")
        );
    }
}

/// The parent of a clone has a path of the old host. Its content id confirms that the local file is
/// the right one.
#[test]
fn a_parent_on_the_old_host() {
    let folder = Folder::new();
    let text = |cid: &str, parent: &str, hint: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID={cid}\nparentCID={parent}\ncreateType=\"vmfs\"\n{hint}\n"
        )
    };
    folder.file("base.vmdk", text("0a1b2c3d", "ffffffff", ""));
    for path in [
        "/vmfs/volumes/5f3e/master/base.vmdk",
        "D:\\VMs\\master\\base.vmdk",
        "/home/x/vmware/base.vmdk",
    ] {
        let hint = format!("parentFileNameHint=\"{path}\"");
        folder.file("d.vmdk", text("2", "0a1b2c3d", &hint));
        folder.open("d.vmdk").unwrap();
        // Another disk of that name, and one that cannot be identified.
        folder.file("d.vmdk", text("2", "0a1b2c3e", &hint));
        assert!(folder.error("d.vmdk").contains("content id"), "{path}");
        folder.file("d.vmdk", text("2", "ffffffff", &hint));
        folder.open("d.vmdk").unwrap_err();
    }
}
