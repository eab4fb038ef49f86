//! OVF packages as directories and archives.

use std::fs;
use std::io::Write;
use std::path::Path;

use super::super::ovf::parse as ovf_parse;
use super::super::*;
use super::{Folder, names};

// ---- ovf ----

const RASD: &str =
    "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData";

fn ovf(files: &str, disks: &str, items: &str, extra: &str) -> String {
    format!(
        r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="{RASD}" xmlns:vmw="http://www.vmware.com/schema/ovf">
 <References>{files}</References>
 <DiskSection><Info>disks</Info>{disks}</DiskSection>
 <VirtualSystem ovf:id="vm-id"><Info>a machine</Info><Name>Win &amp; Co</Name>
  <VirtualHardwareSection><Info>hardware</Info>
   <Item><rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits><rasd:ElementName>2 cpus</rasd:ElementName><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>4</rasd:VirtualQuantity><vmw:CoresPerSocket ovf:required="false">2</vmw:CoresPerSocket></Item>
   <Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>4096</rasd:VirtualQuantity></Item>
   <Item><rasd:Address>0</rasd:Address><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>lsilogicsas</rasd:ResourceSubType><rasd:ResourceType>6</rasd:ResourceType></Item>
   <Item><rasd:Address>0</rasd:Address><rasd:InstanceID>4</rasd:InstanceID><rasd:ResourceSubType>vmware.sata.ahci</rasd:ResourceSubType><rasd:ResourceType>20</rasd:ResourceType></Item>
   {items}
  </VirtualHardwareSection>{extra}
 </VirtualSystem>
</Envelope>"#
    )
}

fn disk_item(resource: &str, parent: u32, address: u32) -> String {
    format!(
        "<Item><rasd:AddressOnParent>{address}</rasd:AddressOnParent><rasd:ElementName>Hard disk</rasd:ElementName><rasd:HostResource>{resource}</rasd:HostResource><rasd:InstanceID>9{parent}{address}</rasd:InstanceID><rasd:Parent>{parent}</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>"
    )
}

const VMDK_URI: &str = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";

pub(super) fn one_disk(href: &str, attrs: &str) -> String {
    ovf(
        &format!(r#"<File ovf:href="{href}" ovf:id="file1" {attrs}/>"#),
        &format!(
            r#"<Disk ovf:capacity="1" ovf:diskId="d1" ovf:fileRef="file1" ovf:format="{VMDK_URI}"/>"#
        ),
        &disk_item("ovf:/disk/d1", 3, 0),
        "",
    )
}

#[test]
fn ovf_in_full() {
    let folder = Folder::new();
    let text = ovf(
        r#"<File ovf:href="b%20c.vmdk" ovf:id="f1"/><File ovf:href="a.vmdk" ovf:id="f2"/><File ovf:href="sub/s.vhdx" ovf:id="f3"/>"#,
        &format!(r#"<Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:format="{VMDK_URI}"/><Disk ovf:diskId="d2" ovf:fileRef="f2" ovf:format="{VMDK_URI}"/><Disk ovf:diskId="d4" ovf:capacity="10"/>"#),
        &[
            disk_item("ovf:/file/f3", 4, 0),
            disk_item("ovf:/disk/d2", 3, 1),
            disk_item("/disk/d1", 3, 0),
            disk_item("ovf:/disk/d4", 3, 2),
            "<Item><rasd:ElementName>CD/DVD drive 1</rasd:ElementName><rasd:ResourceType>15</rasd:ResourceType></Item>".into(),
            "<Item><rasd:Address>00:50:56:01:02:03</rasd:Address><rasd:AutomaticAllocation>true</rasd:AutomaticAllocation><rasd:Connection>VM Network</rasd:Connection><rasd:ResourceSubType>VmxNet3</rasd:ResourceSubType><rasd:ResourceType>10</rasd:ResourceType></Item>".into(),
            "<EthernetPortItem><epasd:AutomaticAllocation>false</epasd:AutomaticAllocation><epasd:ResourceType>10</epasd:ResourceType></EthernetPortItem>".into(),
            "<Item><rasd:ResourceSubType>vmware.vtpm</rasd:ResourceSubType><rasd:ResourceType>1</rasd:ResourceType></Item>".into(),
            r#"<vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/><vmw:Config vmw:key="bootOptions.efiSecureBootEnabled" vmw:value="true"/>"#.into(),
        ]
        .concat(),
        "",
    );
    folder.file("x.ovf", &text);
    for disk in ["b c.vmdk", "a.vmdk", "sub/s.vhdx"] {
        folder.file(disk, "data");
    }
    let vm = folder.open("x.ovf").unwrap();
    assert_eq!((vm.kind, vm.name.as_str()), (SourceKind::Ovf, "Win & Co"));
    assert_eq!(names(&vm), ["b c.vmdk", "a.vmdk", "s.vhdx"]);
    let formats: Vec<_> = vm.disks.iter().map(|d| d.format.as_deref()).collect();
    assert_eq!(formats, [Some("vmdk"), Some("vmdk"), None]);
    assert_eq!(
        (vm.memory_mib, vm.vcpus, vm.cores_per_socket),
        (Some(4096), Some(4), Some(2))
    );
    assert_eq!(
        (vm.firmware, vm.secure_boot, vm.tpm),
        (Some(Firmware::Uefi), true, true)
    );
    assert_eq!(vm.nics.len(), 2);
    assert_eq!(vm.nics[0].mac.unwrap().to_string(), "00:50:56:01:02:03");
    assert_eq!(vm.nics[0].network.as_deref(), Some("VM Network"));
    assert_eq!((vm.nics[1].mac, vm.nics[1].connected), (None, false));
    assert_eq!(
        vm.notes,
        [
            "Hard disk has no disk file: left out",
            "CD/DVD drive 1 is left out"
        ]
    );
    // The same directory, named explicitly.
    assert_eq!(folder.open("").unwrap().disks.len(), 3);
}

#[test]
fn ovf_of_virtualbox() {
    let folder = Folder::new();
    folder.file("d.vmdk", "x");
    let text = one_disk("d.vmdk", "").replace(
        "</VirtualSystem>",
        r#"<vbox:Machine xmlns:vbox="http://www.virtualbox.org/ovf/machine" uuid="{0f0f0f0f-1111-2222-3333-444444444444}" name="w"><Hardware><Firmware type="EFI"/></Hardware></vbox:Machine></VirtualSystem>"#,
    );
    folder.file("x.ovf", text);
    let vm = folder.open("x.ovf").unwrap();
    assert_eq!(vm.firmware, Some(Firmware::Uefi));
    assert_eq!(
        vm.uuid.unwrap().to_string(),
        "0f0f0f0f-1111-2222-3333-444444444444"
    );
}

#[test]
fn ovf_that_cannot_be_used() {
    let folder = Folder::new();
    folder.file("d.vmdk", "x");
    let good = one_disk("d.vmdk", "");
    for (text, want) in [
        ("<a/>".into(), "no OVF envelope"),
        ("<Envelope/>".into(), "no VirtualSystem"),
        (
            "<Envelope><VirtualSystem/><VirtualSystem/></Envelope>".into(),
            "2 VMs",
        ),
        (
            format!("<!DOCTYPE x [<!ENTITY a 'b'>]>{good}"),
            "is not understood",
        ),
        (one_disk("gone.vmdk", ""), "gone.vmdk does not exist"),
        (one_disk("../d.vmdk", ""), "outside its directory"),
        (one_disk("%2e%2e/d.vmdk", ""), "outside its directory"),
        (one_disk("/etc/passwd", ""), "outside its directory"),
        (one_disk("..\\d.vmdk", ""), "outside its directory"),
        (one_disk("d%00.vmdk", ""), "outside its directory"),
        (one_disk("d%f", ""), "d%f does not exist"),
        (
            one_disk("http://host/d.vmdk", ""),
            "not fetched from the network",
        ),
        (
            one_disk("d.vmdk", r#"ovf:chunkSize="100""#),
            "split into chunks",
        ),
        (
            one_disk("d.vmdk", r#"ovf:compression="zstd""#),
            "compression zstd",
        ),
        (
            good.replace("ovf:/disk/d1", "ovf:/disk/d7"),
            "disk d7 is not declared",
        ),
        (
            good.replace(r#"ovf:id="file1""#, r#"ovf:id="file7""#),
            "file file1 is not declared",
        ),
        (
            good.replace(
                r#"ovf:diskId="d1""#,
                r#"ovf:diskId="d1" ovf:parentRef="d0""#,
            ),
            "delta",
        ),
    ] {
        folder.file("x.ovf", &text);
        let error = folder.error("x.ovf");
        assert!(error.contains(want), "{want}: {error}");
    }
}

#[test]
fn ovf_memory_units() {
    for (units, quantity, want) in [
        ("byte * 2^20", "4096", Some(4096)),
        ("byte*2^30", "4", Some(4096)),
        ("MegaBytes", "4096", Some(4096)),
        ("GB", "4", Some(4096)),
        ("byte", "4294967296", Some(4096)),
        ("byte * 2^99", "1", None),
        ("byte * 2^60", "99999999", None),
        ("furlongs", "1", None),
        ("byte * 2^20", "-1", None),
    ] {
        let text = one_disk("d.vmdk", "")
            .replace("byte * 2^20</", &format!("{units}</"))
            .replace(
                ">4096</rasd:VirtualQuantity>",
                &format!(">{quantity}</rasd:VirtualQuantity>"),
            );
        let (vm, _) = ovf_parse(Path::new("x"), text.as_bytes(), &Options::default()).unwrap();
        assert_eq!(vm.memory_mib, want, "{units} {quantity}");
    }
}

// ---- ova ----

/// One tar header and its padded contents, in the form of `tar --format=ustar`.
fn tar_member(name: impl AsRef<[u8]>, kind: u8, data: &[u8]) -> Vec<u8> {
    let mut header = [0u8; 512];
    let name = name.as_ref();
    header[..name.len()].copy_from_slice(name);
    header[100..108].copy_from_slice(b"0000644\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    finish(header, data)
}

fn finish(mut header: [u8; 512], data: &[u8]) -> Vec<u8> {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut bytes = header.to_vec();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

pub(super) fn tar_of(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes: Vec<u8> = members
        .iter()
        .flat_map(|(n, d)| tar_member(n, b'0', d))
        .collect();
    bytes.extend([0; 1024]);
    bytes
}

fn digest(algorithm: manifest::Algorithm, data: &[u8]) -> String {
    let mut hasher = manifest::Hasher::new(algorithm);
    hasher.update(data);
    hasher.finish()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

const DISK: &[u8] = b"not really a disk, but long enough to be hashed";

fn manifest_for(algorithm: manifest::Algorithm, files: &[(&str, &[u8])]) -> String {
    let line = |(name, data): &(&str, &[u8])| {
        format!(
            "{}({name})= {}\n",
            algorithm.name(),
            digest(algorithm, data)
        )
    };
    files.iter().map(line).collect()
}

#[test]
fn ova_is_unpacked_and_verified() {
    use manifest::Algorithm::*;
    let text = one_disk("d.vmdk", "");
    for algorithm in [Sha1, Sha256, Sha512] {
        let folder = Folder::new();
        let mf = manifest_for(algorithm, &[("x.ovf", text.as_bytes()), ("d.vmdk", DISK)]);
        folder.file(
            "x.ova",
            tar_of(&[
                ("x.ovf", text.as_bytes()),
                ("x.mf", mf.as_bytes()),
                ("d.vmdk", DISK),
            ]),
        );
        let mut vm = folder.open("x.ova").unwrap();
        assert_eq!(vm.kind, SourceKind::Ova);
        let (offset, size) = vm.disks[0].packed.as_ref().unwrap().member.unwrap();
        assert_eq!((offset % 512, size), (0, DISK.len() as u64));
        fs::create_dir(folder.path("work")).unwrap();
        vm.prepare(&folder.path("work"), None).unwrap();
        assert!(vm.disks[0].packed.is_none());
        assert_eq!(names(&vm), ["0-d.vmdk"]);
        assert_eq!(fs::read(&vm.disks[0].path).unwrap(), DISK);

        // One bit in the disk, then one in the descriptor.
        let mut bad = tar_of(&[
            ("x.ovf", text.as_bytes()),
            ("x.mf", mf.as_bytes()),
            ("d.vmdk", DISK),
        ]);
        bad[usize::try_from(offset).unwrap()] ^= 1;
        folder.file("x.ova", &bad);
        let mut vm = folder.open("x.ova").unwrap();
        fs::create_dir(folder.path("work2")).unwrap();
        let error = vm
            .prepare(&folder.path("work2"), None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("d.vmdk of") && error.contains(algorithm.name()),
            "{error}"
        );
        assert_eq!(fs::read_dir(folder.path("work2")).unwrap().count(), 0);
        bad[512] ^= 1;
        folder.file("x.ova", &bad);
        assert!(!folder.error("x.ova").is_empty());
        let changed = text.replace("Win &amp; Co", "Win &amp; C0");
        folder.file(
            "x.ova",
            tar_of(&[
                ("x.ovf", changed.as_bytes()),
                ("x.mf", mf.as_bytes()),
                ("d.vmdk", DISK),
            ]),
        );
        assert!(folder.error("x.ova").contains("x.ovf of"));
    }
}

#[test]
fn gzipped_disks() {
    let folder = Folder::new();
    let text = one_disk("d.vmdk.gz", r#"ovf:compression="gzip""#);
    let packed = gzip(DISK);
    let mf = manifest_for(manifest::Algorithm::Sha256, &[("d.vmdk.gz", &packed)]);
    folder.file(
        "x.ova",
        tar_of(&[
            ("x.ovf", text.as_bytes()),
            ("x.mf", mf.as_bytes()),
            ("d.vmdk.gz", &packed),
        ]),
    );
    folder.file("dir/x.ovf", &text);
    folder.file("dir/x.mf", &mf);
    folder.file("dir/d.vmdk.gz", &packed);
    for (n, source) in ["x.ova", "dir/x.ovf"].iter().enumerate() {
        let mut vm = folder.open(source).unwrap();
        let work = folder.path(&format!("work{n}"));
        fs::create_dir(&work).unwrap();
        vm.prepare(&work, None).unwrap();
        assert_eq!(names(&vm), ["0-d.vmdk"], "{source}");
        assert_eq!(fs::read(&vm.disks[0].path).unwrap(), DISK);
    }
    folder.file("dir/d.vmdk.gz", &packed[..packed.len() - 9]);
    let mut vm = folder.open("dir/x.ovf").unwrap();
    let work = folder.path("work9");
    fs::create_dir(&work).unwrap();
    assert!(
        vm.prepare(&work, None)
            .unwrap_err()
            .to_string()
            .starts_with("unpacking")
    );
    assert_eq!(fs::read_dir(&work).unwrap().count(), 0);
}

/// The name of a disk in the encoding of its source host: in the archive, its manifest and the
/// descriptor.
#[test]
fn names_that_are_not_utf8_in_a_package() {
    use std::os::unix::ffi::OsStrExt;
    let name = b"\xb4\xc5\xc5\xcc.vmdk";
    let manifest = |data: &[u8]| {
        let sum = digest(manifest::Algorithm::Sha256, data);
        [
            b"SHA256(".as_slice(),
            name,
            format!(")= {sum}\n").as_bytes(),
        ]
        .concat()
    };
    let encoded = one_disk("%B4%C5%c5%CC.vmdk", "").into_bytes();
    let declared = one_disk("NAME.vmdk", "")
        .replace("UTF-8", "GBK")
        .into_bytes();
    let at = declared.windows(9).position(|w| w == b"NAME.vmdk").unwrap();
    let declared = [&declared[..at], name, &declared[at + 9..]].concat();
    for text in [encoded, declared] {
        let folder = Folder::new();
        let work = folder.path("work");
        fs::create_dir(&work).unwrap();
        let on_disk = folder.0.path().join(std::ffi::OsStr::from_bytes(name));
        fs::write(&on_disk, DISK).unwrap();
        folder.file("x.ovf", &text);
        for (data, good) in [(DISK, true), (b"other", false)] {
            let members = [
                tar_member("x.ovf", b'0', &text),
                tar_member("x.mf", b'0', &manifest(data)),
                tar_member(name, b'0', DISK),
                vec![0; 1024],
            ];
            folder.file("x.ova", members.concat());
            folder.file("x.mf", manifest(data));
            for file in ["x.ova", "x.ovf"] {
                let mut vm = folder.open(file).unwrap();
                if file == "x.ovf" {
                    assert_eq!(vm.disks[0].path, on_disk);
                }
                let prepared = vm.prepare(&work, None);
                assert_eq!(prepared.is_ok(), good, "{file}: {prepared:?}");
            }
        }
    }
}

#[test]
fn a_folder_is_verified_in_place() {
    let folder = Folder::new();
    let text = one_disk("sub/d.vmdk", "");
    folder.file("x.ovf", &text);
    folder.file("sub/d.vmdk", DISK);
    folder.file(
        "x.mf",
        manifest_for(
            manifest::Algorithm::Sha256,
            &[("x.ovf", text.as_bytes()), ("sub/d.vmdk", DISK)],
        ),
    );
    let mut vm = folder.open("x.ovf").unwrap();
    vm.prepare(Path::new("/nonexistent"), None).unwrap();
    folder.file("sub/d.vmdk", b"damaged");
    assert!(
        vm.prepare(Path::new("/nonexistent"), None)
            .unwrap_err()
            .to_string()
            .contains("is damaged")
    );
}

#[test]
fn ova_that_cannot_be_used() {
    let text = one_disk("d.vmdk", "");
    let ovf = ("x.ovf", text.as_bytes());
    let whole = tar_of(&[ovf, ("d.vmdk", DISK)]);
    let mut torn = whole.clone();
    torn.truncate(whole.len() - 1024 - 512 + 10);
    let mut broken = whole.clone();
    broken[3] ^= 0xff;
    let mut link = tar_member("x.ovf", b'0', text.as_bytes());
    link.extend(tar_member("d.vmdk", b'2', b""));
    let mut gnu_sparse = tar_member("x.ovf", b'0', text.as_bytes());
    gnu_sparse.extend(tar_member("d.vmdk", b'S', DISK));
    let escape = one_disk("../d.vmdk", "");
    let folder = Folder::new();
    for (bytes, want) in [
        (Vec::new(), "no files"),
        (b"hello".to_vec(), "failed to read entire block"),
        (gzip(&whole), "a gzip'd archive"),
        (torn, "cut short"),
        (
            broken,
            "tar header after byte 0: archive header checksum mismatch",
        ),
        (link, "d.vmdk does not exist"),
        (gnu_sparse, "sparse entry"),
        (tar_of(&[("d.vmdk", DISK)]), "no .ovf"),
        (tar_of(&[ovf, ("y.ovf", b"")]), "2 VMs"),
        (tar_of(&[ovf]), "d.vmdk does not exist"),
        (
            tar_of(&[("x.ovf", escape.as_bytes()), ("d.vmdk", DISK)]),
            "d.vmdk does not exist",
        ),
    ] {
        folder.file("x.ova", &bytes);
        let error = folder.error("x.ova");
        assert!(error.contains(want), "{want}: {error}");
    }
    // A member with a path that leads upwards is unpacked under its last component, in the work
    // directory only.
    folder.file(
        "x.ova",
        tar_of(&[("x.ovf", escape.as_bytes()), ("../d.vmdk", DISK)]),
    );
    let mut vm = folder.open("x.ova").unwrap();
    fs::create_dir(folder.path("work")).unwrap();
    vm.prepare(&folder.path("work"), None).unwrap();
    assert_eq!(vm.disks[0].path, folder.path("work/0-d.vmdk"));
}

#[test]
fn tar_dialects() {
    let long = format!("{}/d.vmdk", "x".repeat(150));
    let mut gnu = tar_member("././@LongLink", b'L', format!("{long}\0").as_bytes());
    gnu.extend(tar_member("short", b'0', DISK));
    let record = |key: &str, value: &str| {
        let body = format!(" {key}={value}\n");
        let length = (1..)
            .find(|n: &usize| n.to_string().len() + body.len() == *n)
            .unwrap();
        format!("{length}{body}")
    };
    let mut pax = tar_member("g", b'g', record("comment", "x").as_bytes());
    pax.extend(tar_member(
        "p",
        b'x',
        (record("path", &long) + &record("size", &DISK.len().to_string())).as_bytes(),
    ));
    let mut header = [0u8; 512];
    header[..5].copy_from_slice(b"short");
    header[156] = b'0';
    header[124..136].fill(b'0');
    header[257..265].copy_from_slice(b"ustar\x0000");
    // Only the pax record has the size.
    pax.extend(finish(header, DISK));
    let mut prefix = [0u8; 512];
    prefix[..6].copy_from_slice(b"d.vmdk");
    prefix[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, DISK.len() as u8]);
    prefix[156] = b'0';
    prefix[257..265].copy_from_slice(b"ustar\x0000");
    prefix[345..495].fill(b'x');
    for bytes in [gnu, pax, finish(prefix, DISK)] {
        let offset = bytes.len() as u64 - 512;
        let members = tar::members(std::io::Cursor::new(&bytes)).unwrap();
        assert_eq!(
            members,
            [tar::Member {
                name: long.clone(),
                offset,
                size: DISK.len() as u64
            }]
        );
    }
    for (field, want) in [
        (&b"7777777777777777777777777"[..12], "cut short"),
        (&[0xff; 12][..], "size overflow"),
        (b"not a number", "numeric field was not a number"),
    ] {
        let mut header = [0u8; 512];
        header[0] = b'x';
        header[124..136].copy_from_slice(field);
        let error = tar::members(std::io::Cursor::new(finish(header, DISK))).unwrap_err();
        assert!(error.to_string().contains(want), "{want}: {error}");
    }
}

/// A long name would be read into memory.
#[test]
fn a_long_name_has_a_limit() {
    for kind in [b'L', b'x'] {
        let mut bytes = tar_member("long", kind, &vec![b'x'; 2 << 20]);
        bytes.extend(tar_member("d.vmdk", b'0', DISK));
        let error = tar::members(std::io::Cursor::new(&bytes)).unwrap_err();
        assert!(error.to_string().contains("more than 1 MiB"), "{error}");
    }
}

/// GNU tar's own archives, in the formats it can write.
#[test]
fn archives_of_gnu_tar() {
    let folder = Folder::new();
    let name = format!("{}.vmdk", "d".repeat(120));
    folder.file("x.ovf", one_disk(&name, ""));
    folder.file(&name, DISK);
    for format in ["gnu", "pax", "posix"] {
        #[allow(clippy::disallowed_methods)]
        let status = std::process::Command::new("tar")
            .args([
                "-C",
                folder.0.path().to_str().unwrap(),
                &format!("--format={format}"),
            ])
            .args([
                "-cf",
                folder.path("x.ova").to_str().unwrap(),
                "./x.ovf",
                &format!("./{name}"),
            ])
            .status();
        assert!(status.expect("tar").success());
        let vm = folder.open("x.ova").unwrap();
        assert_eq!(vm.disks.len(), 1, "{format}");
    }
}

/// The message contains the limit and both numbers; no named file is left.
#[test]
fn unpacking_has_a_limit_and_leaves_no_name() {
    let folder = Folder::new();
    let text = one_disk("d.vmdk.gz", r#"ovf:compression="gzip""#);
    let mut disk = DISK.to_vec();
    disk.resize(64 << 20, 0);
    let packed = gzip(&disk);
    folder.file(
        "x.ova",
        tar_of(&[("x.ovf", text.as_bytes()), ("d.vmdk.gz", &packed)]),
    );
    let work = folder.path("work");
    fs::create_dir(&work).unwrap();
    let mut vm = folder.open("x.ova").unwrap();
    vm.disks[0].packed.as_mut().unwrap().capacity = Some(0);
    let mut bomb = vm.clone();
    disk.resize((64 << 20) + 1, 0);
    folder.file(
        "x.ova",
        tar_of(&[("x.ovf", text.as_bytes()), ("d.vmdk.gz", &gzip(&disk))]),
    );
    let mut larger = folder.open("x.ova").unwrap();
    larger.disks[0].packed.as_mut().unwrap().capacity = Some(0);
    bomb.disks.clone_from(&larger.disks);
    let error = bomb.prepare(&work, None).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("more than 64 MiB: it is declared as 0 MiB, and "),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("--max-unpacked"));
    assert_eq!(fs::read_dir(&work).unwrap().count(), 0);
    larger.prepare(&work, Some(65 << 20)).unwrap();
    let meta = fs::metadata(&larger.disks[0].path).unwrap();
    assert_eq!(meta.len(), disk.len() as u64);
    let (links, blocks) = {
        use std::os::unix::fs::MetadataExt;
        (meta.nlink(), meta.blocks())
    };
    assert!(links == 0 && blocks * 512 < 1 << 20, "{links} {blocks}");
}
