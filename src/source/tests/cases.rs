//! VM descriptions that were once parsed wrong, with the right values.

use super::*;

const VMX_HEAD: &str = "config.version = \"8\"\nvirtualHW.version = \"19\"\n\
    guestOS = \"windows2019srv-64\"\nmemSize = \"2048\"\nnumvcpus = \"2\"\nfirmware = \"efi\"\n\
    scsi0.present = \"TRUE\"\nscsi0.virtualDev = \"pvscsi\"\nscsi0:0.present = \"TRUE\"\n";

fn vmx(lines: &str) -> String {
    format!("{VMX_HEAD}{lines}")
}

/// The id that a Windows guest saw on both hosts, from virt-v2v's document on generation ids.
#[test]
fn generation_id_has_the_order_the_guest_sees() {
    let folder = Folder::new();
    folder.file("win.vmdk", "x");
    for (low, high, want) in [
        (
            "1234605616436508552",
            "-7373874951294615808",
            "55667788-3344-1122-00ff-eeddccbbaa99",
        ),
        ("1", "-2", "00000001-0000-0000-feff-ffffffffffff"),
        (
            "-1",
            "9223372036854775807",
            "ffffffff-ffff-ffff-ffff-ffffffffff7f",
        ),
    ] {
        folder.file(
            "v.vmx",
            vmx(&format!(
                "scsi0:0.fileName = \"win.vmdk\"\nvm.genid = \"{low}\"\nvm.genidX = \"{high}\"\n"
            )),
        );
        let vm = folder.open("v.vmx").unwrap();
        assert_eq!(vm.genid.unwrap().to_string(), want);
    }
}

#[test]
fn ten_nics_of_a_vmx() {
    let folder = Folder::new();
    folder.file("win.vmdk", "x");
    let mut text = vmx("scsi0:0.fileName = \"win.vmdk\"\n");
    for n in 0..10 {
        let connected = if n == 9 { "FALSE" } else { "TRUE" };
        text += &format!(
            "ethernet{n}.present = \"TRUE\"\nethernet{n}.addressType = \"static\"\n\
             ethernet{n}.address = \"00:50:56:00:00:1{n}\"\nethernet{n}.startConnected = \"{connected}\"\n"
        );
    }
    folder.file("v.vmx", text);
    let nics = folder.open("v.vmx").unwrap().nics;
    let got: Vec<_> = nics
        .iter()
        .map(|n| (n.mac.unwrap().to_string(), n.connected))
        .collect();
    let want: Vec<_> = (0..10)
        .map(|n| (format!("00:50:56:00:00:1{n}"), n != 9))
        .collect();
    assert_eq!(got, want);
}

/// A file of the same name on another datastore is not the local file.
#[test]
fn one_file_is_not_two_disks() {
    let folder = Folder::new();
    folder.file("win.vmdk", "x");
    let other = "/vmfs/volumes/other/win/win.vmdk";
    for (first, second) in [
        ("win.vmdk", other),
        ("/vmfs/volumes/one/win/win.vmdk", other),
        ("[one] win/win.vmdk", "[other] win/win.vmdk"),
        ("D:\\a\\win.vmdk", "E:\\b\\win.vmdk"),
        ("win.vmdk", "./win.vmdk"),
        ("win.vmdk", "link.vmdk"),
        ("win.vmdk", "hard.vmdk"),
    ] {
        let _ = std::os::unix::fs::symlink("win.vmdk", folder.path("link.vmdk"));
        let _ = fs::hard_link(folder.path("win.vmdk"), folder.path("hard.vmdk"));
        folder.file(
            "v.vmx",
            vmx(&format!(
                "scsi0:0.fileName = \"{first}\"\nscsi0:1.present = \"TRUE\"\nscsi0:1.fileName = \"{second}\"\n"
            )),
        );
        let error = folder.open("v.vmx").unwrap_err();
        assert!(error.blocker().is_none(), "exit code 1");
        let text = error.to_string();
        assert!(
            text.contains(&format!("disk scsi0:1 ({second})")) && text.contains("is not here"),
            "{text}"
        );
        assert!(error.hint().unwrap().contains("DATASTORE"), "{error}");
    }
    // Two descriptors; the second was renamed and still names the data of the first.
    let descriptor = |extents: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"vmfs\"\n{extents}\n"
        )
    };
    for name in ["a-flat.vmdk", "b-flat.vmdk", "c-flat.vmdk"] {
        folder.file(name, "x");
    }
    folder.file(
        "a.vmdk",
        descriptor("RW 1 VMFS \"a-flat.vmdk\"\nRW 1 VMFS \"b-flat.vmdk\""),
    );
    let two = |second: &str| {
        folder.file("b.vmdk", descriptor(second));
        folder.file(
            "v.vmx",
            vmx("scsi0:0.fileName = \"a.vmdk\"\nscsi0:1.present = \"TRUE\"\nscsi0:1.fileName = \"b.vmdk\"\n"),
        );
        folder.open("v.vmx").map_err(|e| e.to_string())
    };
    let error = two("RW 1 VMFS \"b-flat.vmdk\"").unwrap_err();
    assert!(
        error.contains("disk scsi0:1 (b.vmdk)") && error.contains("b-flat.vmdk is disk scsi0:0"),
        "{error}"
    );
    two("RW 1 VMFS \"c-flat.vmdk\"").unwrap();
    // One disk may contain a file twice.
    two("RW 1 FLAT \"c-flat.vmdk\" 0\nRW 1 FLAT \"c-flat.vmdk\" 1").unwrap();
    // Each in directories with the names of the datastore's.
    folder.file("other/win/win.vmdk", "y");
    folder.file(
        "v.vmx",
        vmx(&format!(
            "scsi0:0.fileName = \"win.vmdk\"\nscsi0:1.present = \"TRUE\"\nscsi0:1.fileName = \"{other}\"\n"
        )),
    );
    let vm = folder.open("v.vmx").unwrap();
    let paths: Vec<_> = vm.disks.iter().map(|d| d.path.clone()).collect();
    assert_eq!(
        paths,
        [folder.path("win.vmdk"), folder.path("other/win/win.vmdk")]
    );
    // The same through libvirt and OVF.
    let disk = |dev: &str, file: &str| {
        format!("<disk><source file='{file}'/><target dev='{dev}' bus='sata'/></disk>")
    };
    let xml = format!(
        "<domain><name>x</name><devices>{}{}</devices></domain>",
        disk("sda", "win.vmdk"),
        disk("sdb", "/elsewhere/win.vmdk")
    );
    folder.file("v.xml", xml);
    assert!(folder.error("v.xml").contains("disk sdb of"));
}

#[test]
fn a_suspended_machine_is_refused() {
    let folder = Folder::new();
    folder.file("win.vmdk", "x");
    folder.file(
        "v.vmx",
        vmx(
            "scsi0:0.fileName = \"win.vmdk\"\ncheckpoint.vmState = \"win-0a1b2c3d.vmss\"\n\
             checkpoint.vmState.readOnly = \"FALSE\"\n",
        ),
    );
    let error = folder.open("v.vmx").unwrap_err();
    let blocker = error.blocker().unwrap();
    assert_eq!(blocker.code, "suspended");
    assert!(blocker.reason.contains("win-0a1b2c3d.vmss"), "{blocker:?}");
    assert!(
        blocker
            .remedy
            .starts_with("resume it and shut it down from inside")
    );
    // The leftovers of a resumed VM, with and without its file.
    folder.file(
        "v.vmx",
        vmx("scsi0:0.fileName = \"win.vmdk\"\ncheckpoint.vmState = \"\"\n"),
    );
    assert!(folder.open("v.vmx").unwrap().notes.is_empty());
    folder.file("win-0a1b2c3d.VMSS", "memory");
    let notes = folder.open("v.vmx").unwrap().notes;
    assert!(notes[0].starts_with("win-0a1b2c3d.VMSS is"), "{notes:?}");
}

#[test]
fn names_in_the_encoding_of_the_vmx() {
    let (name, disk) = (b"\xb7\xfe\xce\xf1\xc6\xf7", b"\xb4\xc5\xc5\xcc.vmdk");
    let mut text = b".encoding = \"GBK\"\n".to_vec();
    text.extend(vmx("").into_bytes());
    for (key, value) in [("displayName", &name[..]), ("scsi0:0.fileName", disk)] {
        text.extend(format!("{key} = \"").bytes());
        text.extend(value);
        text.extend(b"\"\n");
    }
    let bytes: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(disk);
    for on_disk in [std::ffi::OsStr::new("磁盘.vmdk"), bytes] {
        let folder = Folder::new();
        fs::write(folder.0.path().join(on_disk), "x").unwrap();
        folder.file("v.vmx", &text);
        let vm = folder.open("v.vmx").unwrap();
        assert_eq!(vm.name, "服务器");
        assert_eq!(vm.disks[0].path, folder.0.path().join(on_disk));
        assert!(vm.notes.is_empty(), "{:?}", vm.notes);
    }
    // Two-byte characters that end in a backslash, on a path of the old host.
    let folder = Folder::new();
    folder.file("ソフト.vmdk", "x");
    let mut text = b".encoding = \"Shift_JIS\"\nscsi0:0.fileName = \"/vmfs/volumes/1/".to_vec();
    text.extend(b"\x83\x5c\x83\x74\x83\x67.vmdk\"\n");
    folder.file("v.vmx", text);
    assert_eq!(names(&folder.open("v.vmx").unwrap()), ["ソフト.vmdk"]);
    // An unknown label is reported, and the name is taken as UTF-8.
    folder.file(
        "v.vmx",
        ".encoding = \"klingon\"\nscsi0:0.fileName = \"ソフト.vmdk\"\n",
    );
    let vm = folder.open("v.vmx").unwrap();
    assert!(vm.notes[0].contains("encoding klingon"), "{:?}", vm.notes);
}

#[test]
fn an_encrypted_vmx_is_called_that() {
    let folder = Folder::new();
    let keys = "encryption.keySafe = \"vmware:key/list/(pair/(x))\"\nencryption.data = \"abc=\"\n";
    folder.file("v.vmx", format!("displayName = \"x\"\n{keys}"));
    let error = folder.open("v.vmx").unwrap_err();
    assert!(error.to_string().contains("encrypted by VMware"), "{error}");
    assert!(error.to_string().contains("remove the encryption"));
    // Only the TPM is encrypted: the disks are listed.
    folder.file("win.vmdk", "x");
    folder.file(
        "v.vmx",
        vmx(&format!("scsi0:0.fileName = \"win.vmdk\"\n{keys}")),
    );
    let vm = folder.open("v.vmx").unwrap();
    assert!(
        vm.notes[0].contains("encrypted by VMware"),
        "{:?}",
        vm.notes
    );
}

#[test]
fn a_disk_on_a_controller_that_is_off() {
    let folder = Folder::new();
    folder.file("win.vmdk", "x");
    folder.file("old.vmdk", "x");
    folder.file(
        "v.vmx",
        vmx(
            "scsi0:0.fileName = \"win.vmdk\"\nsata0.present = \"FALSE\"\nsata0:1.present = \"TRUE\"\n\
             sata0:1.fileName = \"old.vmdk\"\n",
        ),
    );
    let vm = folder.open("v.vmx").unwrap();
    assert_eq!(names(&vm), ["win.vmdk"]);
    assert!(
        vm.notes[0].contains("sata0 is switched off"),
        "{:?}",
        vm.notes
    );
}

// ---- OVF ----

const ITEMS: &str = "<Item ovf:configuration=\"big\"><rasd:InstanceID>30</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>24</rasd:VirtualQuantity></Item>\
    <Item ovf:configuration=\"medium other\"><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>8</rasd:VirtualQuantity></Item>\
    <Item ovf:configuration=\"medium\"><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>8192</rasd:VirtualQuantity></Item>\
    <Item ovf:configuration=\"big\"><rasd:AllocationUnits>byte * 2^30</rasd:AllocationUnits><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>64</rasd:VirtualQuantity></Item>\
    <Item ovf:bound=\"min\"><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>1024</rasd:VirtualQuantity></Item>\
    <Item ovf:bound=\"max\"><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>64</rasd:VirtualQuantity></Item>";

/// Four CPUs and 4096 MiB if no configuration overrides them.
fn configured(default: Option<&str>) -> String {
    let list = ["small", "medium", "big"].map(|id| {
        let mark = match default == Some(id) {
            true => " ovf:default=\"true\"",
            false => "",
        };
        format!("<Configuration ovf:id=\"{id}\"{mark}><Label>x</Label></Configuration>")
    });
    let section = format!(
        "<DeploymentOptionSection><Info>sizes</Info>{}</DeploymentOptionSection><VirtualSystem",
        list.concat()
    );
    one_disk("d.vmdk", "")
        .replace("<VirtualSystem", &section)
        .replace(
            "</VirtualHardwareSection>",
            &format!("{ITEMS}</VirtualHardwareSection>"),
        )
}

#[test]
fn deployment_options_of_an_ovf() {
    let folder = Folder::new();
    folder.file("d.vmdk", "x");
    for (default, asked, want) in [
        (Some("medium"), None, (8, 8192)),
        (Some("big"), None, (24, 65_536)),
        (None, None, (4, 4096)),
        (None, Some("small"), (4, 4096)),
        (Some("medium"), Some("big"), (24, 65_536)),
        (Some("big"), Some("medium"), (8, 8192)),
    ] {
        folder.file("x.ovf", configured(default));
        let options = Options {
            ovf_configuration: asked.map(str::to_owned),
        };
        let vm = open_with(&folder.path("x.ovf"), &options).unwrap();
        let got = (vm.vcpus.unwrap(), vm.memory_mib.unwrap());
        assert_eq!(got, want, "{default:?} {asked:?}");
        let said = vm.notes.iter().any(|n| n.contains("small, medium, big"));
        assert_eq!(said, asked.is_none(), "{:?}", vm.notes);
    }
    let options = Options {
        ovf_configuration: Some("huge".into()),
    };
    let error = open_with(&folder.path("x.ovf"), &options).unwrap_err();
    assert!(
        error.to_string().contains("it has small, medium, big"),
        "{error}"
    );
    // Bounds without configurations.
    let bounds = one_disk("d.vmdk", "").replace(
        "</VirtualHardwareSection>",
        &format!("{ITEMS}</VirtualHardwareSection>"),
    );
    folder.file("x.ovf", bounds);
    let vm = folder.open("x.ovf").unwrap();
    assert_eq!((vm.vcpus, vm.memory_mib), (Some(4), Some(4096)));
    assert!(vm.notes.is_empty(), "{:?}", vm.notes);
}

#[test]
fn names_in_an_ovf_that_are_not_encoded() {
    let folder = Folder::new();
    for (href, file) in [
        ("50%.vmdk", "50%.vmdk"),
        ("a%20b.vmdk", "a b.vmdk"),
        ("a%2xb.vmdk", "a%2xb.vmdk"),
        ("literal%20name.vmdk", "literal%20name.vmdk"),
        ("%E7%A3%81.vmdk", "磁.vmdk"),
    ] {
        folder.file(file, "x");
        let text = one_disk(href, "");
        folder.file("x.ovf", &text);
        assert_eq!(names(&folder.open("x.ovf").unwrap()), [file], "{href}");
        folder.file("x.ova", tar_of(&[("x.ovf", text.as_bytes()), (file, b"x")]));
        assert!(folder.open("x.ova").is_ok(), "{href}");
        fs::remove_file(folder.path(file)).unwrap();
    }
    // An empty reference is a disk created at deployment.
    folder.file("d.vmdk", "x");
    let two = one_disk("d.vmdk", "").replace(
        "</VirtualHardwareSection>",
        "<Item><rasd:ElementName>Second</rasd:ElementName><rasd:HostResource>ovf:/disk/d2</rasd:HostResource><rasd:InstanceID>77</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item></VirtualHardwareSection>",
    );
    for empty in ["ovf:fileRef=\"\"", "ovf:fileRef=\" \"", ""] {
        let disk = format!("<DiskSection><Disk ovf:capacity=\"1\" ovf:diskId=\"d2\" {empty}/>");
        folder.file("x.ovf", two.replace("<DiskSection>", &disk));
        let vm = folder.open("x.ovf").unwrap();
        assert_eq!(vm.notes, ["Second has no disk file: left out"], "{empty}");
    }
    // A saved state of VirtualBox.
    let saved = one_disk("d.vmdk", "").replace(
        "</VirtualSystem>",
        "<vbox:Machine xmlns:vbox=\"x\" stateFile=\"{1}.sav\"/></VirtualSystem>",
    );
    folder.file("x.ovf", saved);
    assert_eq!(
        folder.open("x.ovf").unwrap_err().blocker().unwrap().code,
        "suspended"
    );
}

#[test]
fn a_disk_gzipped_without_a_word() {
    let folder = Folder::new();
    let packed = {
        use std::io::Write;
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(b"contents of a disk").unwrap();
        encoder.finish().unwrap()
    };
    for name in ["d.vmdk", "d.vmdk.gz"] {
        let text = one_disk(name, "");
        folder.file("x.ovf", &text);
        folder.file(name, &packed);
        folder.file(
            "x.ova",
            tar_of(&[("x.ovf", text.as_bytes()), (name, &packed)]),
        );
        for source in ["x.ovf", "x.ova"] {
            let mut vm = folder.open(source).unwrap();
            let work = folder.path(&format!("work-{source}-{name}"));
            fs::create_dir(&work).unwrap();
            vm.prepare(&work, None).unwrap();
            let disk = fs::read(&vm.disks[0].path).unwrap();
            assert_eq!(disk, b"contents of a disk", "{source}");
        }
    }
}

#[test]
fn archives_that_are_no_tar_and_files_of_macos() {
    let folder = Folder::new();
    for (start, what) in [
        (&b"PK\x03\x04rest"[..], "a zip archive"),
        (b"\xfd7zXZ\0rest", "an xz'd archive"),
        (b"\x28\xb5\x2f\xfdrest", "a zstd'd archive"),
        (b"BZh9rest", "a bzip2'd archive"),
        (b"\x1f\x8b\x08rest", "a gzip'd archive"),
    ] {
        folder.file("x.ova", start);
        let error = folder.error("x.ova");
        assert!(
            error.contains(what) && error.contains("unpack it"),
            "{error}"
        );
    }
    let text = one_disk("d.vmdk", "");
    folder.file(
        "x.ova",
        tar_of(&[
            ("._x.ovf", b"Mac OS X"),
            ("x.ovf", text.as_bytes()),
            ("._x.mf", b"\0\0"),
            ("._d.vmdk", b"Mac OS X"),
            ("d.vmdk", b"x"),
        ]),
    );
    assert_eq!(folder.open("x.ova").unwrap().disks.len(), 1);
    for (name, contents) in [
        ("m/x.ovf", text.as_str()),
        ("m/._x.ovf", "Mac"),
        ("m/d.vmdk", "x"),
    ] {
        folder.file(name, contents);
    }
    assert_eq!(folder.open("m").unwrap().disks.len(), 1);
}

#[test]
fn manifests_as_producers_write_them() {
    use std::fmt::Write;
    let folder = Folder::new();
    let sha = |data: &[u8]| {
        let mut hasher = manifest::Hasher::new(manifest::Algorithm::Sha256);
        hasher.update(data);
        hasher.finish()
    };
    let text = one_disk("a%20b.vmdk", "");
    folder.file("x.ovf", &text);
    folder.file("a b.vmdk", "contents");
    for name in ["a b.vmdk", "a%20b.vmdk", "./a b.vmdk"] {
        for (contents, good) in [(&b"contents"[..], true), (b"damage", false)] {
            let mut lines = format!("SHA256(x.ovf)= {}\n", sha(text.as_bytes()));
            writeln!(lines, "SHA256({name})= {}", sha(contents)).unwrap();
            folder.file("x.mf", &lines);
            let mut vm = folder.open("x.ovf").unwrap();
            assert!(vm.notes.is_empty(), "{:?}", vm.notes);
            let checked = vm.prepare(Path::new("/nonexistent"), None);
            assert_eq!(checked.is_ok(), good, "{name}");
            let archive = tar_of(&[
                ("x.ovf", text.as_bytes()),
                ("x.mf", lines.as_bytes()),
                ("a b.vmdk", b"contents"),
            ]);
            folder.file("x.ova", archive);
            let work = tempfile::tempdir().unwrap();
            let checked = folder.open("x.ova").unwrap().prepare(work.path(), None);
            assert_eq!(checked.is_ok(), good, "{name}");
        }
    }
    // One unreadable line is a warning, and the others count.
    let wrong = format!("SHA256(x.ovf)= 00\nSHA256(a b.vmdk)= {}\n", sha(b"damage"));
    folder.file("x.mf", wrong);
    let mut vm = folder.open("x.ovf").unwrap();
    assert!(
        vm.notes[0].starts_with("line 1 of the manifest"),
        "{:?}",
        vm.notes
    );
    assert!(vm.prepare(Path::new("/nonexistent"), None).is_err());
}

// ---- libvirt ----

#[test]
fn processors_of_libvirt() {
    for (xml, want) in [
        (
            "<cpu><topology sockets='1' cores='4' threads='2'/></cpu>",
            (8, Some(4), Some(2)),
        ),
        (
            "<vcpu>8</vcpu><cpu><topology sockets='2' cores='2' threads='2'/></cpu>",
            (8, Some(2), Some(2)),
        ),
        (
            "<cpu><topology sockets='1' dies='2' cores='3' threads='1'/></cpu>",
            (6, Some(6), Some(1)),
        ),
        (
            "<cpu><topology sockets='1' dies='2' clusters='2' cores='2' threads='2'/></cpu>",
            (16, Some(8), Some(2)),
        ),
        ("<vcpu placement='static'> 6 </vcpu>", (6, None, None)),
        ("", (1, None, None)),
        (
            "<cpu><topology sockets='0' cores='4' threads='2'/></cpu>",
            (1, Some(4), Some(2)),
        ),
        (
            "<cpu><topology sockets='4294967295' cores='4' threads='2'/></cpu>",
            (1, Some(4), Some(2)),
        ),
    ] {
        let text = format!("<domain><name>x</name>{xml}</domain>");
        let (vm, _) = libvirt::parse(Path::new("x"), text.as_bytes()).unwrap();
        let got = (vm.vcpus.unwrap(), vm.cores_per_socket, vm.threads_per_core);
        assert_eq!(got, want, "{xml}");
    }
}

#[test]
fn memory_of_libvirt() {
    for (unit, value, mib) in [
        ("KiB", 4_194_304u64, 4096),
        ("k", 4_194_304, 4096),
        ("K", 4_194_304, 4096),
        ("kib", 4_194_304, 4096),
        ("KB", 4_194_304, 4000),
        ("MiB", 4096, 4096),
        ("m", 4096, 4096),
        ("MB", 4096, 3906),
        ("GiB", 4, 4096),
        ("G", 4, 4096),
        ("gb", 4, 3814),
        ("TiB", 1, 1 << 20),
        ("PiB", 1, 1 << 30),
        ("b", 4 << 30, 4096),
        ("bytes", 4 << 30, 4096),
    ] {
        let text = format!("<domain><memory unit='{unit}'>{value}</memory></domain>");
        let (vm, _) = libvirt::parse(Path::new("x"), text.as_bytes()).unwrap();
        assert_eq!(vm.memory_mib, Some(mib), "{unit}");
    }
}

// ---- VMDK ----

#[test]
fn vmdks_that_hold_no_readable_data() {
    let folder = Folder::new();
    for (line, what, remedy) in [
        ("createType=\"vmfsRawDeviceMap\"", "RDM", "vmkfstools -i"),
        ("createType=\"vmfsPassthroughRawDeviceMap\"", "RDM", "LUN"),
        ("createType=\"fullDevice\"", "RDM", "LUN"),
        (
            "encryptionKeys=\"vmware:key/list/(x)\"",
            "encrypted by VMware",
            "remove",
        ),
    ] {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\n{line}\nRW 8 VMFSRDM \"x-rdm.vmdk\"\n"
        );
        folder.file("x.vmdk", text);
        let error = folder.error("x.vmdk");
        assert!(error.contains(what) && error.contains(remedy), "{error}");
    }
}

#[test]
fn a_delta_over_another_parent() {
    let folder = Folder::new();
    let text = |cid: &str, parent: &str, hint: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID={cid}\nparentCID={parent}\ncreateType=\"vmfs\"\n{hint}\n"
        )
    };
    folder.file("base.vmdk", text("0a1b2c3d", "ffffffff", ""));
    let delta = |id: &str| text("2", id, "parentFileNameHint=\"base.vmdk\"");
    folder.file("d.vmdk", delta("A1B2C3D"));
    folder.open("d.vmdk").unwrap();
    folder.file("d.vmdk", delta("deadbeef"));
    let error = folder.error("d.vmdk");
    assert!(
        error.contains("deadbeef") && error.contains("0a1b2c3d"),
        "{error}"
    );
    let error = folder.open("d.vmdk").unwrap_err();
    assert!(error.hint().unwrap().contains("whole chain"));
}
