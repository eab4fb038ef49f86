//! Machine files that were read wrong once, with the right values.

use super::*;

const VMX_HEAD: &str = "config.version = \"8\"\nvirtualHW.version = \"19\"\n\
    guestOS = \"windows2019srv-64\"\nmemSize = \"2048\"\nnumvcpus = \"2\"\nfirmware = \"efi\"\n\
    scsi0.present = \"TRUE\"\nscsi0.virtualDev = \"pvscsi\"\nscsi0:0.present = \"TRUE\"\n";

fn vmx(lines: &str) -> String {
    format!("{VMX_HEAD}{lines}")
}

/// What a Windows guest saw on both hosts, by virt-v2v's document on generation ids.
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

/// The file of one name on another datastore is not the file here.
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
    // Each in folders named like those of the datastore.
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
    // What a resumed machine leaves, with and without its file.
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
    // A label nobody knows is said, and the name is taken for UTF-8.
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
    // Only the TPM is: the disks are listed.
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
