//! VM descriptions through the whole program: the values of the cases in `tests/cases` and
//! `../shared/cases` in the domain XML, refusals by their exit codes, and names in other encodings.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // skips must be seen, and which case is running

mod support;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use hyper2kvm::demo::{Firmware, GuestSpec, WinVersion};
use hyper2kvm::domain::element::Element;
use serde_json::{Value, json};
use support::{Lab, Run, TOOLS, h2k, have, sha256, skip, tool, virtio_win};

/// One guest, as raw disk and as VMDK.
fn lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| {
        let mut spec = GuestSpec::new(WinVersion::Win10);
        spec.disk_size = 512 << 20;
        spec.recovery = false;
        spec.firmware = Firmware::Bios;
        let lab = Lab::new(spec);
        lab.in_format("vmdk", "", "guest.vmdk");
        lab
    })
}

fn run(verb: &str, source: &Path, folder: &Path, more: &[&str]) -> Run {
    let mut args: Vec<&OsStr> = vec![verb.as_ref(), source.as_ref(), "--json".as_ref()];
    let (iso, out) = (virtio_win(), folder.join("out"));
    if verb != "inspect" && verb != "verify" {
        args.extend([OsStr::new("--virtio-iso"), iso.as_os_str()]);
        args.extend([OsStr::new("-o"), out.as_os_str()]);
    }
    args.extend(more.iter().map(OsStr::new));
    h2k(args)
}

/// The final domain of a conversion into `out` below the directory.
fn domain(folder: &Path, source: &Path, more: &[&str]) -> (Element, Value) {
    let report = run("convert", source, folder, more).expect(0).json();
    let xml = report["outputs"]["final_xml"].as_str().unwrap();
    let domain = Element::parse(&fs::read(xml).unwrap()).unwrap();
    fs::remove_dir_all(folder.join("out")).unwrap();
    (domain, report)
}

/// The directories with cases: a file each, and the right values in `expected.json`.
fn cases() -> Vec<(String, PathBuf, Value)> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for folder in ["tests/cases", "../shared/cases"].map(|f| here.join(f)) {
        let Ok(text) = fs::read_to_string(folder.join("expected.json")) else {
            skip("cases", format!("no cases at {}", folder.display()));
            continue;
        };
        let expected: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
        for (name, want) in expected {
            found.push((name.clone(), folder.join(&name), want));
        }
    }
    assert!(found.len() >= 10);
    found
}

/// A file of a disk by any name, without another copy of its data.
fn put(disk: &Path, folder: &Path, name: &[u8]) {
    fs::hard_link(disk, folder.join(OsStr::from_bytes(name))).unwrap();
}

/// Every case, in a separate directory with the disk it names.
#[test]
fn cases_have_the_right_values() {
    if !have(&TOOLS) {
        return;
    }
    let lab = lab();
    for (n, (name, file, want)) in cases().into_iter().enumerate() {
        eprintln!("{name}");
        let folder = lab.path(&format!("case-{n}"));
        fs::create_dir(&folder).unwrap();
        let source = folder.join(&name);
        fs::copy(&file, &source).unwrap();
        for disk in ["win.vmdk", "boot.vmdk"] {
            put(&lab.path("guest.vmdk"), &folder, disk.as_bytes());
        }
        for disk in ["win.raw", "boot.raw"] {
            put(&lab.raw, &folder, disk.as_bytes());
        }
        let keys: Vec<&str> = want
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        match keys[..] {
            ["exit", "says" | "remedy"] | ["give it", "exit", "says"] => {
                refused(&folder, &source, &want);
            }
            ["name", "disk"] => named(&folder, &source, &want),
            _ => {
                let (domain, report) = domain(&folder, &source, &[]);
                described(&domain, &report, &want);
            }
        }
    }
}

/// Every verb refuses it with this exit code, and prints the reason.
fn refused(folder: &Path, source: &Path, want: &Value) {
    let code = want["exit"].as_i64().unwrap() as i32;
    let mut says: Vec<&str> = Vec::new();
    if let Some(file) = want["give it"].as_str() {
        // "a NAME of less than SIZE bytes"
        let words: Vec<&str> = file.split(' ').collect();
        let disk = File::create(folder.join(words[1])).unwrap();
        disk.set_len(4096).unwrap();
        says.extend([words[5], "4096"]);
    } else if want["says"].as_str().is_some() {
        says.push("is not here");
    }
    says.extend(want["remedy"].as_str());
    for verb in ["inspect", "plan", "convert"] {
        let run = run(verb, source, folder, &[]).expect(code);
        for text in &says {
            assert!(run.stdout.contains(text), "{verb}: {text}: {}", run.stdout);
        }
        assert!(!folder.join("out").exists());
    }
}

/// The name of a VM and its disk in the encoding of the file: under their text and under those bytes.
fn named(folder: &Path, source: &Path, want: &Value) {
    let name = want["name"].as_str().unwrap();
    let disk = want["disk"].as_str().unwrap().split(',').next().unwrap();
    let text = fs::read(source).unwrap();
    let line = text
        .split(|b| *b == b'\n')
        .find(|l| l.starts_with(b"scsi0:0.fileName"));
    let bytes = line.unwrap().split(|b| *b == b'"').nth(1).unwrap();
    assert!(
        std::str::from_utf8(bytes).is_err(),
        "the case is in another encoding"
    );
    for on_disk in [disk.as_bytes(), bytes] {
        put(&lab().path("guest.vmdk"), folder, on_disk);
        let (domain, report) = domain(folder, source, &[]);
        assert_eq!(domain.text_of("title"), Some(name));
        let own = domain.text_of("name").unwrap();
        assert!(own.starts_with("vm-") && own.len() == 11, "{own}");
        let path = report["inspection"]["source"]["path"].as_str();
        let path = path.or(report["source"]["path"].as_str()).unwrap();
        match std::str::from_utf8(on_disk) {
            Ok(text) => assert!(path.ends_with(&format!("/{text}")), "{path}"),
            Err(_) => assert!(
                path.starts_with("file:///") && path.contains("/%"),
                "{path}"
            ),
        }
        fs::remove_file(folder.join(OsStr::from_bytes(on_disk))).unwrap();
    }
}

fn described(domain: &Element, report: &Value, want: &Value) {
    let topology = domain.path("cpu/topology");
    let part = |name: &str| {
        let value = topology.and_then(|t| t.attr(name)).unwrap_or("1");
        json!(value.parse::<u32>().unwrap())
    };
    let nics: Vec<&Element> = domain.first("devices").unwrap().all("interface").collect();
    let mac = |n: usize| nics[n].first("mac").unwrap().attr("address").unwrap();
    for (key, value) in want.as_object().unwrap() {
        match key.as_str() {
            "genid" => assert_eq!(json!(domain.text_of("genid")), *value),
            "vcpus" => {
                let vcpus: u32 = domain.text_of("vcpu").unwrap().parse().unwrap();
                assert_eq!(json!(vcpus), *value);
            }
            "memory_mib" => {
                let memory = domain.first("memory").unwrap();
                let unit = match memory.attr("unit") {
                    Some("KiB") => 1,
                    Some("MiB") => 1024,
                    other => panic!("{other:?}"),
                };
                let kib = memory.text.parse::<u64>().unwrap() * unit;
                assert_eq!(json!(kib / 1024), *value);
            }
            "sockets" | "cores" | "threads" => assert_eq!(part(key), *value, "{key}"),
            "nics" => assert_eq!(json!(nics.len()), *value),
            "tenth" => {
                let link = |n: usize| nics[n].first("link").and_then(|l| l.attr("state"));
                assert_eq!(link(9), Some("down"));
                assert!((0..9).all(|n| link(n) != Some("down")));
            }
            "refuse or" => {
                assert_eq!(nics.len(), 2);
                assert_ne!(mac(0), mac(1));
                let text = report["warnings"].to_string();
                assert!(
                    text.contains("NICs 1 and 2 both have the MAC address"),
                    "{text}"
                );
                for address in [mac(0), mac(1)] {
                    assert!(text.contains(address), "{address}: {text}");
                }
            }
            "why" => {}
            other => panic!("nobody checks {other:?}"),
        }
    }
}

/// The named disk of each kind has a newer link beside it.
#[test]
fn an_older_link_is_refused_until_it_is_meant() {
    if !have(&TOOLS) {
        return;
    }
    let lab = lab();
    let copy = |folder: &Path, name: &str| {
        let to = folder.join(name);
        put(&lab.path("guest.vmdk"), folder, name.as_bytes());
        to
    };
    for (kind, child) in [
        ("delta", "guest-000001.vmdk"),
        ("redo", "guest.vmdk.REDO_a1b2c3"),
        ("overlay", "guest.qcow2"),
        ("checkpoint", "guest_0A1B.avhdx"),
        ("differencing", "guest.avhd"),
        ("snapshot", "{5f3e}.vdi"),
    ] {
        eprintln!("{kind}");
        let folder = lab.path(kind);
        fs::create_dir(&folder).unwrap();
        let newer = folder.join(child);
        let named = match kind {
            "delta" | "redo" => {
                let text = "# Disk DescriptorFile\nversion=1\nCID=2\nparentCID=1\ncreateType=\"vmfsSparse\"\n\
                            parentFileNameHint=\"guest.vmdk\"\nRW 1048576 VMFSSPARSE \"d-delta.vmdk\"\n";
                fs::write(&newer, text).unwrap();
                copy(&folder, "guest.vmdk")
            }
            "overlay" => {
                let base = copy(&folder, "guest.vmdk");
                let (base, newer) = (base.to_str().unwrap(), newer.to_str().unwrap());
                tool(
                    "qemu-img",
                    &[
                        "create", "-q", "-f", "qcow2", "-F", "vmdk", "-b", base, newer,
                    ],
                );
                PathBuf::from(base)
            }
            "checkpoint" => {
                let base =
                    lab.in_format("vhdx", "block_size=1048576", &format!("{kind}/guest.vhdx"));
                let id = current_header(&base)[32..48].to_vec();
                fs::write(&newer, child_vhdx(&id)).unwrap();
                base
            }
            "differencing" => {
                let base = lab.in_format("vpc", "force_size=on", &format!("{kind}/guest.vhd"));
                let mut id = vec![0; 16];
                File::open(&base)
                    .unwrap()
                    .read_exact_at(&mut id, 68)
                    .unwrap();
                fs::write(&newer, child_vhd(&id)).unwrap();
                base
            }
            _ => {
                let base = lab.in_format("vdi", "", &format!("{kind}/guest.vdi"));
                let mut head = vec![0; 1024];
                File::open(&base)
                    .unwrap()
                    .read_exact_at(&mut head, 0)
                    .unwrap();
                let id = head[392..408].to_vec();
                head[392..408].fill(7);
                head[424..440].copy_from_slice(&id);
                fs::write(&newer, head).unwrap();
                base
            }
        };
        for verb in ["inspect", "plan", "convert"] {
            let refused = run(verb, &named, &folder, &[]).expect(3).json();
            let blocker = &refused["error"]["blockers"][0];
            let text = blocker.to_string();
            assert!(text.contains(child), "the newest is named: {text}");
            assert!(
                text.contains("newer-link") && text.contains("--older-link"),
                "{text}"
            );
        }
        assert!(!folder.join("out").exists());
        let report = run("convert", &named, &folder, &["--older-link"])
            .expect(0)
            .json();
        let disk = report["outputs"]["disks"][0].as_str().unwrap();
        tool("qemu-img", &["check", "-q", disk]);
        let text = report.to_string();
        assert!(text.contains("what was written since is not in the result"));
        fs::remove_dir_all(&folder).unwrap();
    }
}

/// Kinds refused by name: every verb ends with the same code, and names the kind and the remedy.
#[test]
fn what_cannot_be_read_is_called_what_it_is() {
    if !have(&TOOLS) {
        return;
    }
    let lab = lab();
    let folder = lab.path("called");
    fs::create_dir(&folder).unwrap();
    let file = |name: &str, contents: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, contents).unwrap();
        path
    };
    let descriptor = |id: &str, parent: &str, lines: &str| {
        format!("# Disk DescriptorFile\nversion=1\nCID={id}\nparentCID={parent}\n{lines}\n")
            .into_bytes()
    };
    file(
        "base.vmdk",
        &descriptor("a", "ffffffff", "createType=\"vmfs\""),
    );
    let hint = "createType=\"vmfsSparse\"\nparentFileNameHint=\"base.vmdk\"";
    let rdm = "createType=\"vmfsPassthroughRawDeviceMap\"\nRW 8 VMFSRDM \"x-rdmp.vmdk\"";
    let vhdx = lab.in_format("vhdx", "block_size=1048576", "called/log.vhdx");
    put_log(&vhdx);
    let parent = lab.in_format("vhdx", "block_size=1048576", "called/parent.vhdx");
    let id = current_header(&parent)[32..48].to_vec();
    let vdi = lab.in_format("vdi", "", "called/child.vdi");
    let change = File::options().write(true).open(&vdi).unwrap();
    change.write_all_at(&[7; 16], 424).unwrap();
    for (source, says, remedy) in [
        (
            file("d.vmdk", &descriptor("b", "c", hint)),
            "content id 0000000c",
            "copy the whole chain",
        ),
        (
            file("r.vmdk", &descriptor("1", "ffffffff", rdm)),
            "raw device (RDM)",
            "vmkfstools -i",
        ),
        (
            file(
                "e.vmx",
                b"displayName = \"e\"\nencryption.keySafe = \"vmware:key/list/(x)\"\n",
            ),
            "encrypted by VMware",
            "remove the encryption",
        ),
        (
            vhdx.clone(),
            "its log contains writes",
            "qemu-img check -r all COPY.vhdx",
        ),
        (
            file("child.avhdx", &child_vhdx(&id)),
            "differencing VHDX",
            "Convert-VHD",
        ),
        (
            file("child.vhd", &child_vhd(&[3; 16])),
            "differencing VHD",
            "Merge-VHD",
        ),
        (vdi, "differencing VDI", "VBoxManage clonemedium"),
        (
            file("m.vbox", b"<VirtualBox/>"),
            "VM of VirtualBox",
            "VBoxManage export",
        ),
        (
            file("m.ova", b"PK\x03\x04zip"),
            "a zip archive",
            "unpack it",
        ),
        (
            file("n.ova", b"\xfd7zXZ\0xz"),
            "an xz'd archive",
            "unpack it",
        ),
    ] {
        for verb in ["inspect", "plan", "convert"] {
            let text = run(verb, &source, &folder, &[]).expect(1).stdout;
            for part in [says, remedy] {
                assert!(
                    text.contains(part),
                    "{verb} {}: {part}: {text}",
                    source.display()
                );
            }
        }
        assert!(!folder.join("out").exists());
    }
    // The remedy works.
    tool(
        "qemu-img",
        &["check", "-q", "-r", "all", vhdx.to_str().unwrap()],
    );
    run("inspect", &vhdx, &folder, &[]).expect(0);
    fs::remove_dir_all(&folder).unwrap();
}

fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let low = crc & 1;
            crc = (crc >> 1) ^ (0x82f6_3b78 * low);
        }
    }
    !crc
}

/// A VHDX after a crash: its log has an entry, here one that zeroes a sector beyond the tables.
/// [MS-VHDX] 2.2.2 and 2.3.
fn put_log(vhdx: &Path) {
    let file = File::options().read(true).write(true).open(vhdx).unwrap();
    let size = file.metadata().unwrap().len();
    let seal = |mut block: Vec<u8>| {
        block[4..8].fill(0);
        let sum = crc32c(&block).to_le_bytes();
        block[4..8].copy_from_slice(&sum);
        block
    };
    let mut log = 0;
    for at in [64 << 10, 128 << 10] {
        let mut header = vec![0; 4096];
        file.read_exact_at(&mut header, at).unwrap();
        header[48..64].fill(0x4c);
        log = u64::from_le_bytes(header[72..80].try_into().unwrap());
        file.write_all_at(&seal(header), at).unwrap();
    }
    let mut entry = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| entry[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"loge");
    put(8, &4096u32.to_le_bytes());
    put(16, &1u64.to_le_bytes());
    put(24, &1u32.to_le_bytes());
    put(32, &[0x4c; 16]);
    put(48, &size.to_le_bytes());
    put(56, &size.to_le_bytes());
    put(64, b"zero");
    put(72, &4096u64.to_le_bytes());
    put(80, &(size - 4096).to_le_bytes());
    put(88, &1u64.to_le_bytes());
    file.write_all_at(&seal(entry), log).unwrap();
}

/// A differencing VHD without data, over the parent of this id.
fn child_vhd(parent: &[u8]) -> Vec<u8> {
    let mut head = vec![0; 1536];
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"conectix");
    put(16, &512u64.to_be_bytes());
    put(60, &4u32.to_be_bytes());
    put(68, &[9; 16]);
    put(512, b"cxsparse");
    put(552, parent);
    let sum: u32 = head[..512].iter().map(|b| u32::from(*b)).sum();
    head[64..68].copy_from_slice(&(!sum).to_be_bytes());
    let footer = head[..512].to_vec();
    [head, footer].concat()
}

fn current_header(vhdx: &Path) -> Vec<u8> {
    let file = File::open(vhdx).unwrap();
    let headers = [64 << 10, 128 << 10].map(|at| {
        let mut header = vec![0; 80];
        file.read_exact_at(&mut header, at).unwrap();
        (
            header[8..16]
                .iter()
                .rev()
                .fold(0u64, |n, b| n << 8 | u64::from(*b)),
            header,
        )
    });
    headers.into_iter().max().unwrap().1
}

/// The part of a differencing VHDX that identifies its parent.
fn child_vhdx(parent: &[u8]) -> Vec<u8> {
    let guid = |text: &str| uuid::Uuid::parse_str(text).unwrap().to_bytes_le();
    let mut file = vec![0; 2 << 20];
    file[..8].copy_from_slice(b"vhdxfile");
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(64 << 10, b"head");
    put((64 << 10) + 8, &[1]);
    put((64 << 10) + 32, &[9; 16]);
    let regions = 192 << 10;
    put(regions, b"regi");
    put(regions + 8, &[1]);
    put(regions + 16, &guid("8b7ca206-4790-4b9a-b8fe-575f050f886e"));
    put(regions + 32, &(1u64 << 20).to_le_bytes());
    put(regions + 40, &(1u32 << 20).to_le_bytes());
    let table = 1 << 20;
    put(table, b"metadata");
    put(table + 10, &[1]);
    put(table + 32, &guid("a8d35f2d-b30b-454d-abf7-d3d84834ab0c"));
    put(table + 48, &(64u32 << 10).to_le_bytes());
    put(table + 52, &4096u32.to_le_bytes());
    let item = table + (64 << 10);
    put(item + 18, &[1]);
    let utf16 = |text: &str| {
        text.encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect::<Vec<_>>()
    };
    let id = uuid::Uuid::from_slice_le(parent)
        .unwrap()
        .braced()
        .to_string();
    let (key, value) = (utf16("parent_linkage"), utf16(&id));
    put(item + 20, &1024u32.to_le_bytes());
    put(item + 24, &2048u32.to_le_bytes());
    put(item + 28, &(key.len() as u16).to_le_bytes());
    put(item + 30, &(value.len() as u16).to_le_bytes());
    put(item + 1024, &key);
    put(item + 2048, &value);
    file
}

const GBK: &[u8] = b"\xb4\xc5\xc5\xcc";

fn bytes_path(folder: &Path, parts: &[&[u8]]) -> PathBuf {
    folder.join(OsStr::from_bytes(&parts.concat()))
}

/// Files whose names are not UTF-8, in every kind of source, from the inspection to the rollback.
#[test]
fn names_that_are_not_utf8() {
    if !have(&TOOLS) {
        return;
    }
    let lab = lab();
    let folder = bytes_path(lab.dir.path(), &[b"names-", GBK]);
    fs::create_dir(&folder).unwrap();
    let out = lab.path("names");
    fs::create_dir(&out).unwrap();
    let file = |parts: &[&[u8]], contents: &[u8]| {
        let path = bytes_path(&folder, parts);
        fs::write(&path, contents).unwrap();
        path
    };
    put(&lab.raw, &folder, &[GBK, b"-flat.vmdk"].concat());
    put(&lab.raw, &folder, &[GBK, b".raw"].concat());
    let sectors = lab.raw.metadata().unwrap().len() / 512;
    let descriptor = |label: &str| {
        let head = format!(
            "# Disk DescriptorFile\nversion=1\nencoding=\"{label}\"\nCID=0000000a\nparentCID=ffffffff\n\
             createType=\"monolithicFlat\"\nRW {sectors} FLAT \""
        );
        [head.as_bytes(), GBK, b"-flat.vmdk\" 0\n"].concat()
    };
    // The extent by the bytes of its name, whether or not they match the label.
    for label in ["GBK", "UTF-8", "klingon"] {
        let disk = file(&[GBK, b".vmdk"], &descriptor(label));
        run("inspect", &disk, &out, &[]).expect(0);
    }
    let disk = file(&[GBK, b".vmdk"], &descriptor("GBK"));
    let vmx = [
        b".encoding = \"GBK\"\ndisplayName = \"x\"\nscsi0.present = \"TRUE\"\nscsi0:0.present = \"TRUE\"\n\
          scsi0:0.fileName = \""
            .as_slice(),
        GBK,
        b".vmdk\"\n",
    ];
    let ovf = b"<Envelope><References><File id='f' href='%B4%C5%C5%CC.vmdk'/></References><DiskSection>\
        <Disk diskId='d' fileRef='f' capacity='1'/></DiskSection><VirtualSystem id='x'><VirtualHardwareSection>\
        <Item><HostResource>/disk/d</HostResource><ResourceType>17</ResourceType></Item>\
        </VirtualHardwareSection></VirtualSystem></Envelope>";
    let xml = [
        b"<?xml version='1.0' encoding='GB18030'?><domain><name>x</name><devices><disk><driver type='raw'/>\
          <source file='"
            .as_slice(),
        GBK,
        b".raw'/><target dev='sda'/></disk></devices></domain>",
    ];
    let sources = [
        disk.clone(),
        bytes_path(&folder, &[GBK, b".raw"]),
        file(&[GBK, b".vmx"], &vmx.concat()),
        file(&[GBK, b".ovf"], ovf),
        file(&[GBK, b".xml"], &xml.concat()),
    ];
    let before = sha256(&lab.raw);
    for source in &sources {
        eprintln!("{}", source.display());
        let seen = run("inspect", source, &out, &[]).expect(0).json();
        let path = seen["source"]["path"].as_str().unwrap();
        assert!(
            path.starts_with("file:///") && path.contains("%B4%C5%C5%CC"),
            "{path}"
        );
        assert_eq!(
            hyper2kvm::text::to_path(path).parent(),
            Some(folder.as_path())
        );
        run("plan", source, &out, &[]).expect(0);
        let report = run("convert", source, &out, &[]).expect(0).json();
        let saved = fs::read(out.join("out/report.json")).unwrap();
        let saved: Value = serde_json::from_slice(&saved).unwrap();
        assert!(saved.to_string().contains("%B4%C5%C5%CC"));
        let disk = report["outputs"]["disks"][0].as_str().unwrap();
        run("verify", Path::new(disk), &out, &[]).expect(0);
        fs::remove_dir_all(out.join("out")).unwrap();
    }
    assert_eq!(sha256(&lab.raw), before, "the source is as it was");

    // The names of the result must be text.
    for verb in ["plan", "convert"] {
        let text = run(verb, &sources[1], &folder, &[]).expect(2).stdout;
        assert!(
            text.contains("output directory file:///") && text.contains("--output-dir"),
            "{text}"
        );
        assert!(!folder.join("out").exists());
    }
    // Two files of such names are two VMs.
    let other = bytes_path(&folder, &[b"\xb7\xfe.raw"]);
    fs::hard_link(&lab.raw, &other).unwrap();
    let name = |disk: &Path| {
        let (domain, _) = domain(&out, disk, &[]);
        domain.text_of("name").unwrap().to_owned()
    };
    assert_ne!(name(&sources[1]), name(&other));

    // Fixed in place, the file itself is the result, and libvirt's XML must name it.
    let disk = bytes_path(&folder, &[b"own-", GBK, b".raw"]);
    put(&lab.raw, &folder, disk.file_name().unwrap().as_bytes());
    for verb in ["plan", "convert"] {
        let text = run(verb, &disk, &out, &["--in-place"]).expect(2).stdout;
        assert!(
            text.contains("libvirt's XML") && text.contains("rename it"),
            "{text}"
        );
        assert!(!out.join("out").exists());
    }
    // If the name is text, the journal has it and the disk is restored.
    let text = lab.path("磁盘 own.raw");
    fs::copy(&lab.raw, &text).unwrap();
    run("convert", &text, &out, &["--in-place"]).expect(0);
    assert_ne!(sha256(&text), before);
    let back = h2k(["rollback".as_ref(), out.join("out").as_os_str()]).expect(0);
    assert_eq!(sha256(&text), before, "{}", back.stderr);
    assert_eq!(sha256(&lab.raw), before);
}

/// A chain of links with names that are not UTF-8: deltas of VMware with `encoding`, overlays of
/// QEMU.
#[test]
fn chains_of_names_that_are_not_utf8() {
    if !have(&TOOLS) {
        return;
    }
    let lab = lab();
    let folder = lab.path("chains");
    fs::create_dir(&folder).unwrap();
    let base = bytes_path(&folder, &[GBK, b".vmdk"]);
    fs::copy(lab.path("guest.vmdk"), &base).unwrap();
    let create = |format: &str, name: &[u8], backing: &Path| {
        let child = bytes_path(&folder, &[name]);
        let done = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", format, "-F", "vmdk", "-b"])
            .arg(backing)
            .arg(&child)
            .status();
        assert!(done.unwrap().success());
        child
    };
    for (format, child) in [("qcow2", b"o.qcow2".as_slice()), ("vmdk", b"d.vmdk")] {
        let child = create(format, child, &base);
        run("inspect", &child, &folder, &[]).expect(0);
        let text = run("inspect", &base, &folder, &[]).expect(3).stdout;
        assert!(
            text.contains(child.file_name().unwrap().to_str().unwrap()),
            "{text}"
        );
        let report = run("convert", &child, &folder, &[]).expect(0).json();
        run(
            "verify",
            Path::new(report["outputs"]["disks"][0].as_str().unwrap()),
            &folder,
            &[],
        )
        .expect(0);
        fs::remove_dir_all(folder.join("out")).unwrap();
        fs::remove_file(&child).unwrap();
    }
    // The parent by its text, in a descriptor in GBK that is kept in the image.
    let child = create("vmdk", b"d.vmdk", &base);
    edit_descriptor(&child, |text| {
        let text = text.replacen("version=1\n", "version=1\nencoding=\"GBK\"\n", 1);
        assert!(text.contains("encoding"));
        text
    });
    fs::rename(&base, folder.join("磁盘.vmdk")).unwrap();
    run("inspect", &child, &folder, &[]).expect(0);
    // By a path of the old host.
    edit_descriptor(&child, |text| {
        let hint = text.find("parentFileNameHint").unwrap();
        let end = hint + text[hint..].find('\n').unwrap();
        let moved = "parentFileNameHint=\"/vmfs/volumes/5f3e/master/\u{fffd}.vmdk\"";
        format!("{}{moved}{}", &text[..hint], &text[end..])
    });
    run("inspect", &child, &folder, &[]).expect(0);
}

/// Changes the descriptor inside a VMDK of QEMU; U+FFFD stands for the name in GBK.
fn edit_descriptor(image: &Path, edit: impl Fn(String) -> String) {
    const AT: usize = 512;
    const ROOM: usize = 20 * 512;
    let mut bytes = fs::read(image).unwrap();
    let area = &bytes[AT..AT + ROOM];
    let end = area.iter().position(|b| *b == 0).unwrap();
    let mut text = Vec::new();
    let old: Vec<u8> = area[..end].to_vec();
    // As latin letters, so that nothing is lost.
    let old: String = old.iter().copied().map(char::from).collect();
    for c in edit(old).chars() {
        match u8::try_from(c) {
            Ok(byte) => text.push(byte),
            Err(_) => text.extend(GBK),
        }
    }
    assert!(text.len() < ROOM);
    text.resize(ROOM, 0);
    bytes[AT..AT + ROOM].copy_from_slice(&text);
    fs::write(image, bytes).unwrap();
}
