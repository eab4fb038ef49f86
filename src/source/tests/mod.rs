//! Sources made by hyper2kvm, written the way each product writes them.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::vmx::Vmx;
use super::*;

mod cases;
mod packages;
mod producers;
mod written;

use packages::{one_disk, tar_of};

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, contents).unwrap();
        path
    }

    fn open(&self, name: &str) -> Result<SourceVm> {
        open(&self.path(name))
    }

    fn error(&self, name: &str) -> String {
        self.open(name).unwrap_err().to_string()
    }
}

fn names(vm: &SourceVm) -> Vec<String> {
    let name = |d: &SourceDisk| d.path.file_name().unwrap().to_string_lossy().into_owned();
    vm.disks.iter().map(name).collect()
}

// ---- plain disks and directories ----

#[test]
fn a_plain_disk_is_named_after_its_file() {
    let folder = Folder::new();
    folder.file("My VM.qcow2", "x");
    let vm = folder.open("My VM.qcow2").unwrap();
    assert_eq!((vm.kind, vm.name.as_str()), (SourceKind::Disk, "My VM"));
    assert_eq!(
        (names(&vm), vm.firmware, vm.memory_mib),
        (vec!["My VM.qcow2".into()], None, None)
    );
    assert!(
        folder
            .error("gone.vmdk")
            .ends_with("gone.vmdk does not exist")
    );
}

#[test]
fn folders() {
    let folder = Folder::new();
    folder.file(
        "vm/a.vmx",
        "displayName = \"A\"\nide0:0.fileName = \"a.vmdk\"\n",
    );
    folder.file("vm/a.vmdk", "x");
    assert_eq!(folder.open("vm").unwrap().name, "A");
    folder.file("vm/b.vmx", "displayName = \"B\"\n");
    assert!(folder.error("vm").contains("describes 2 VMs"));

    folder.file("hv/Virtual Machines/0001.vmcx", "binary");
    folder.file("hv/Virtual Hard Disks/two.vhdx", "x");
    folder.file("hv/Virtual Hard Disks/one.VHDX", "x");
    let vm = folder.open("hv").unwrap();
    assert_eq!((vm.kind, vm.name.as_str()), (SourceKind::HyperV, "hv"));
    assert_eq!(names(&vm), ["one.VHDX", "two.vhdx"]);
    assert!(vm.notes[0].contains("binary file"), "{:?}", vm.notes);
    folder.file("hv/Snapshots/x.avhdx", "x");
    assert!(folder.error("hv").contains("checkpoint"));

    fs::create_dir(folder.path("empty")).unwrap();
    assert!(folder.error("empty").contains("no disk"));
}

// ---- vmx ----

const VMX: &str = r#"#!/usr/bin/vmware
.encoding = "UTF-8"
config.version = "8"
displayName = "Büro |22A|22 |7c x"
memSize = "8192"
numvcpus = "4"
cpuid.coresPerSocket = "2"
firmware = "efi"
uefi.secureBoot.enabled = "TRUE"
vtpm.present = "TRUE"
uuid.bios = "56 4d 01 02 03 04 05 06-07 08 09 0a 0b 0c 0d 0e"
vm.genid = "1"
vm.genidX = "-2"
floppy0.present = "TRUE"
nvme0:0.fileName = "n.vmdk"
nvme0:0.present = "TRUE"
sata0:1.present = "TRUE"
sata0:1.fileName = "s.vmdk"
sata0:0.present = "TRUE"
sata0:0.deviceType = "cdrom-image"
sata0:0.fileName = "/vmfs/volumes/iso/w.iso"
ide1:0.present = "TRUE"
ide1:0.deviceType = "atapi-cdrom"
ide1:0.fileName = "auto detect"
ide0:0.fileName = "i.vmdk"
SCSI0:10.fileName = "b.vmdk"
scsi0:2.present = "TRUE"
scsi0:2.fileName = "/vmfs/volumes/5b2/win/a-000002.vmdk"
scsi0:3.present = "FALSE"
scsi0:3.fileName = "gone.vmdk"
ethernet1.present = "TRUE"
ethernet1.generatedAddress = "00:0c:29:00:00:02"
ethernet1.startConnected = "FALSE"
ethernet0.present = "TRUE"
ethernet0.virtualDev = "vmxnet3"
ethernet0.networkName = "VM Network"
ethernet0.addressType = "static"
ethernet0.address = "00:50:56:AA:BB:CC"
ethernet0.generatedAddress = "00:0c:29:00:00:01"
ethernet2.present = "FALSE"
"#;

#[test]
fn vmx_in_full() {
    let folder = Folder::new();
    folder.file("win.vmx", VMX);
    for disk in ["n", "s", "i", "b", "a-000002"] {
        folder.file(&format!("{disk}.vmdk"), "data");
    }
    let vm = folder.open("win.vmx").unwrap();
    assert_eq!(vm.name, "Büro \"A\" | x");
    assert_eq!(
        names(&vm),
        ["a-000002.vmdk", "b.vmdk", "s.vmdk", "i.vmdk", "n.vmdk"]
    );
    let controllers: Vec<_> = vm.disks.iter().map(|d| (d.controller, d.order)).collect();
    use Controller::*;
    assert_eq!(
        controllers,
        [
            (Scsi, (0, 2)),
            (Scsi, (0, 10)),
            (Sata, (0, 1)),
            (Ide, (0, 0)),
            (Nvme, (0, 0))
        ]
    );
    assert_eq!(
        (vm.memory_mib, vm.vcpus, vm.cores_per_socket),
        (Some(8192), Some(4), Some(2))
    );
    assert_eq!(
        (vm.firmware, vm.secure_boot, vm.tpm),
        (Some(Firmware::Uefi), true, true)
    );
    assert_eq!(
        vm.uuid.unwrap().to_string(),
        "564d0102-0304-0506-0708-090a0b0c0d0e"
    );
    assert_eq!(
        vm.serial.as_deref(),
        Some("VMware-56 4d 01 02 03 04 05 06-07 08 09 0a 0b 0c 0d 0e")
    );
    assert_eq!(
        vm.genid.unwrap().to_string(),
        "00000001-0000-0000-feff-ffffffffffff"
    );
    let nics: Vec<_> = vm
        .nics
        .iter()
        .map(|n| {
            (
                n.mac.unwrap().to_string(),
                n.model.as_deref(),
                n.network.as_deref(),
                n.connected,
            )
        })
        .collect();
    assert_eq!(
        nics,
        [
            (
                "00:50:56:aa:bb:cc".to_string(),
                Some("vmxnet3"),
                Some("VM Network"),
                true
            ),
            ("00:0c:29:00:00:02".to_string(), None, None, false),
        ]
    );
    let notes = vm.notes.join("\n");
    for want in ["CD-ROM sata0:0 (/vmfs", "CD-ROM ide1:0 (auto", "floppy"] {
        assert!(notes.contains(want), "{want}: {notes}");
    }
    assert_eq!(vm.notes.len(), 3);
}

#[test]
fn vmx_that_cannot_be_used() {
    let folder = Folder::new();
    folder.file("v.vmdk", "x");
    for (text, want) in [
        ("", "has no settings"),
        ("a = \"b\n", "line 1: a quote is not closed"),
        ("\nnonsense\n", "line 2: no `=`"),
        ("ключ = \"x\"\n", "line 1: the key"),
        ("displayName = \"x\"\n", "describes no disk"),
        (
            "scsi0:1.present = \"TRUE\"\nscsi0:1.fileName = \"gone.vmdk\"\n",
            "disk scsi0:1 of ",
        ),
        (
            "scsi0:1.present = \"TRUE\"\nscsi0:1.fileName = \"gone.vmdk\"\n",
            "gone.vmdk does not exist",
        ),
        (
            "scsi0:0.fileName = \"../v.vmdk\"\n",
            "outside its directory",
        ),
        (
            "scsi0:0.fileName = \"x\\..\\..\\v.vmdk\"\n",
            "outside its directory",
        ),
        ("scsi0:0.fileName = \"/etc/..\"\n", "outside its directory"),
    ] {
        folder.file("v.vmx", text);
        let error = folder.error("v.vmx");
        assert!(error.contains(want), "{text}: {error}");
    }
    // An absolute path means the file of that name here, never the file there.
    folder.file(
        "v.vmx",
        "scsi0:0.present = \"TRUE\"\nscsi0:0.fileName = \"/etc/passwd\"\n",
    );
    assert!(folder.error("v.vmx").contains("passwd does not exist"));
    folder.file(
        "v.vmx",
        "scsi0:0.fileName = \"C:\\VMs\\v.vmdk\"\nscsi0:1.fileName = \"old.vmdk\"\n",
    );
    let vm = folder.open("v.vmx").unwrap();
    assert_eq!(names(&vm), ["v.vmdk"]);
    assert!(
        vm.notes[0].starts_with("scsi0:1 is not marked"),
        "{:?}",
        vm.notes
    );
}

#[test]
fn vmx_values() {
    for (bytes, key, want) in [
        (&b"a = \"x\"\r\nA = \"y\"\r\n"[..], "a", Some("y")),
        (b"\xef\xbb\xbfa = \"b|20|c\"", "A", Some("b |c")),
        (b"a = plain text ", "a", Some("plain text")),
        (b"a = \"\"", "a", None),
        (b"a = \"|\" ", "a", Some("|")),
        (b"a = \"|zz|4\"", "a", Some("|zz|4")),
        (
            b".encoding = \"windows-1252\"\na = \"caf\xe9 |80\"",
            "a",
            Some("café €"),
        ),
        (
            b".encoding = \"Shift_JIS\"\na = \"x\xff\"",
            "a",
            Some("x\u{fffd}"),
        ),
    ] {
        let vmx = Vmx::parse(bytes).unwrap();
        assert_eq!(vmx.get(key), want);
    }
    let vmx = Vmx::parse(b"numvcpus = \"many\"\nmemsize = \"-1\"\nethernet0.present = \"TRUE\"\nethernet0.address = \"01:00:00:00:00:00\"\nuuid.bios = \"56\"\n").unwrap();
    let (vm, _) = vmx.machine();
    assert_eq!(
        (vm.vcpus, vm.memory_mib, vm.uuid, vm.nics[0].mac),
        (Some(1), None, None, None)
    );
    assert_eq!(vm.notes.len(), 2, "{:?}", vm.notes);
}

// ---- vmdk chains ----

fn descriptor(extents: &[&str], parent: Option<&str>) -> String {
    let mut text = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentSparse\"\n".to_owned();
    for extent in extents {
        text += &format!("RW 4192256 SPARSE \"{extent}\"\n");
    }
    if let Some(parent) = parent {
        text += &format!("parentFileNameHint=\"{parent}\"\n");
    }
    text
}

fn sparse(capacity: u64, text: &str) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[..4].copy_from_slice(b"KDMV");
    bytes[12..20].copy_from_slice(&capacity.to_le_bytes());
    bytes[28..36].copy_from_slice(&1u64.to_le_bytes());
    bytes[36..44].copy_from_slice(&20u64.to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes
}

#[test]
fn vmdk_chains_are_followed_and_kept_in_their_folder() {
    let folder = Folder::new();
    folder.file("base-s001.vmdk", "x");
    folder.file("base.vmdk", descriptor(&["base-s001.vmdk"], None));
    folder.file(
        "snap.vmdk",
        descriptor(&["base-s001.vmdk"], Some("base.vmdk")),
    );
    folder.file(
        "embedded.vmdk",
        sparse(100, &descriptor(&["renamed.vmdk"], Some("snap.vmdk"))),
    );
    for good in ["base.vmdk", "snap.vmdk", "embedded.vmdk"] {
        assert_eq!(folder.open(good).unwrap().disks.len(), 1, "{good}");
    }
    let outside = "outside its directory";
    for (contents, want) in [
        (
            descriptor(&["base-s001.vmdk", "base-s002.vmdk"], None).into_bytes(),
            "base-s002.vmdk does not exist",
        ),
        (descriptor(&["/etc/passwd"], None).into_bytes(), outside),
        (descriptor(&["../x"], None).into_bytes(), outside),
        (
            descriptor(&["base-s001.vmdk"], Some("/etc/passwd")).into_bytes(),
            outside,
        ),
        (
            descriptor(&["base-s001.vmdk"], Some("gone.vmdk")).into_bytes(),
            "gone.vmdk does not exist",
        ),
        // QEMU finds the hint in a comment too.
        (
            b"# Disk DescriptorFile\n#parentFileNameHint=\"/etc/passwd\"\n".to_vec(),
            outside,
        ),
        (
            descriptor(&[], Some("bad.vmdk")).into_bytes(),
            "more than 64 snapshots",
        ),
        (sparse(100, &descriptor(&[], Some("/etc/passwd"))), outside),
        // Nor does it need the signature when it is told the format.
        (
            b"createType=\"monolithicFlat\"\nRW 1 FLAT \"/etc/passwd\" 0\n".to_vec(),
            outside,
        ),
        // Without a capacity QEMU reads the extents of the descriptor.
        (sparse(0, &descriptor(&["/etc/passwd"], None)), outside),
        (
            descriptor(&["base-s001.vmdk"; 4097], None).into_bytes(),
            "more than 4096 extents",
        ),
    ] {
        folder.file("bad.vmdk", &contents);
        let error = folder.error("bad.vmdk");
        assert!(error.contains(want), "{want}: {error}");
    }
}

// ---- libvirt ----

const DOMAIN: &str = r#"<domain type='kvm'>
  <name>old</name><uuid>0f0f0f0f-1111-2222-3333-444444444444</uuid><genid>1f0f0f0f-1111-2222-3333-444444444444</genid>
  <memory unit='KiB'>4194304</memory><vcpu>4</vcpu>
  <sysinfo type='smbios'><system><entry name='manufacturer'>x</entry><entry name='serial'>S-1</entry></system></sysinfo>
  <os firmware='efi'><type>hvm</type><firmware><feature enabled='yes' name='secure-boot'/><feature enabled='yes' name='enrolled-keys'/></firmware></os>
  <cpu><topology sockets='2' cores='2' threads='1'/></cpu>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='data.img'/><target dev='sdb' bus='sata'/></disk>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/no/such/folder/sys.qcow2'/><target dev='sdc' bus='sata'/><boot order='1'/></disk>
    <disk type='file' device='disk'><driver name='qemu' type='vmdk'/><source file='v.vmdk'/><target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/><model type='e1000'/></interface>
    <interface type='bridge'><mac address='52:54:00:00:00:02'/><source bridge='br0'/><link state='down'/></interface>
    <tpm model='tpm-crb'/>
    <hostdev/>
  </devices>
</domain>"#;

#[test]
fn libvirt_in_full() {
    let folder = Folder::new();
    folder.file("old.xml", DOMAIN);
    for disk in ["data.img", "sys.qcow2", "v.vmdk"] {
        folder.file(disk, "x");
    }
    let vm = folder.open("old.xml").unwrap();
    assert_eq!((vm.kind, vm.name.as_str()), (SourceKind::Libvirt, "old"));
    assert_eq!(names(&vm), ["sys.qcow2", "v.vmdk", "data.img"]);
    let formats: Vec<_> = vm
        .disks
        .iter()
        .filter_map(|d| d.format.as_deref())
        .collect();
    assert_eq!(formats, ["qcow2", "vmdk", "raw"]);
    assert_eq!(
        (vm.memory_mib, vm.vcpus, vm.cores_per_socket),
        (Some(4096), Some(4), Some(2))
    );
    assert_eq!(
        (vm.firmware, vm.secure_boot, vm.tpm),
        (Some(Firmware::Uefi), true, true)
    );
    assert_eq!(vm.serial.as_deref(), Some("S-1"));
    assert!(vm.uuid.is_some() && vm.genid.is_some());
    assert_eq!(
        vm.nics
            .iter()
            .map(|n| (n.network.as_deref(), n.connected))
            .collect::<Vec<_>>(),
        [(Some("default"), true), (Some("br0"), false)]
    );
    assert_eq!(
        vm.notes,
        [
            "cdrom sda is left out",
            "1 host devices passed through are left out"
        ]
    );

    fs::remove_file(folder.path("sys.qcow2")).unwrap();
    assert!(
        folder.error("old.xml").contains("disk sdc"),
        "{}",
        folder.error("old.xml")
    );
    folder.file("old.xml", "<network/>");
    assert!(folder.error("old.xml").contains("<network>"));
    folder.file("old.xml", "<domain><name>x</name></domain>");
    assert!(folder.error("old.xml").contains("no disk"));
}

/// What we write ourselves can be read back as a source.
#[test]
fn our_own_domain_xml_is_a_source() {
    for (file, uefi) in [("w10-uefi-blk-final", true), ("w7-bios-scsi-final", false)] {
        let snapshot = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!(
            "src/domain/snapshots/hyper2kvm__domain__tests__{file}.snap"
        ));
        let text = fs::read_to_string(snapshot).unwrap();
        let xml = &text[text.find("<domain").unwrap()..];
        let (vm, disks) = libvirt::parse(Path::new("x"), xml.as_bytes()).unwrap();
        assert_eq!(vm.name, "win10");
        assert_eq!(vm.firmware == Some(Firmware::Uefi), uefi);
        assert_eq!(disks[0].path, Path::new("/vm/win10.qcow2"));
        assert_eq!((vm.memory_mib, vm.cores_per_socket), (Some(4096), Some(4)));
    }
}

// ---- no input makes a parser panic ----

proptest::proptest! {
    #[test]
    fn parsers_survive_anything(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..2000), at in 0usize..4000, byte in proptest::num::u8::ANY) {
        let _ = Vmx::parse(&bytes).map(|v| v.machine());
        let _ = crate::disk::vmdk::Descriptor::parse(&bytes);
        let _ = Manifest::parse(&bytes);
        let _ = tar::members(std::io::Cursor::new(&bytes));
        // Nearly right input goes deeper than noise.
        let text = one_disk("d.vmdk", "");
        let tar = tar_of(&[("x.ovf", text.as_bytes())]);
        for (kind, good) in [text.as_bytes(), DOMAIN.as_bytes(), VMX.as_bytes(), &tar].iter().enumerate() {
            let mut bad = good.to_vec();
            let at = at % bad.len();
            bad[at] = byte;
            bad.splice(at..at, bytes.iter().take(3).copied());
            match kind {
                0 => drop(crate::source::ovf::parse(Path::new("x"), &bad, &Options::default())),
                1 => drop(libvirt::parse(Path::new("x"), &bad)),
                2 => drop(Vmx::parse(&bad).map(|v| v.machine())),
                _ => drop(tar::members(std::io::Cursor::new(&bad))),
            }
        }
    }
}
