//! Hostile input: volumes, hives, packages, INF files and Linux guests. Each run ends with a clear
//! error, or without harm, within 10 s and 512 MiB.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hyper2kvm::block::FileDisk;
use hyper2kvm::demo::{Role, hives};
use hyper2kvm::guest::GuestPath;
use hyper2kvm::guest::ntfs3g::{MountOptions, Ntfs3g};

use crate::support::{Lab, Run, TOOLS, binary, have, tool, virtio_win};
use crate::{spec, text};

/// The limit of a run with any input.
const TIME: Duration = Duration::from_secs(10);
const MEMORY: u64 = 512 << 20;

/// A run under the limits for hostile input.
pub fn bounded(args: &[&str]) -> Run {
    // The host may be busy once.
    let run = attempt(args).or_else(|| attempt(args));
    let run = run.unwrap_or_else(|| panic!("{args:?}: more than {TIME:?}, twice"));
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    for text in [&run.stdout, &run.stderr] {
        let paints = |c| matches!(c, '\u{1b}' | '\u{7}' | '\u{9b}');
        assert!(!text.contains(paints), "{text:?}");
    }
    run
}

/// `convert` within the same limits.
pub fn converted(disk: &Path, drivers: &Path, out: &Path) -> Run {
    bounded(&[
        "convert",
        text(disk),
        "--virtio-iso",
        text(drivers),
        "-o",
        text(out),
    ])
}

/// The most memory that this process or one that it started has had so far.
fn most_memory(id: u32) -> u64 {
    let folder = format!("/proc/{id}");
    let status = fs::read_to_string(format!("{folder}/status")).unwrap_or_default();
    let own = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let own = own.map_or(0, |line| {
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
        kib << 10
    });
    let threads = fs::read_dir(format!("{folder}/task")).into_iter().flatten();
    let children = threads.flatten().flat_map(|thread| {
        let list = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        let ids: Vec<u32> = list.split(' ').filter_map(|id| id.parse().ok()).collect();
        ids
    });
    children.map(most_memory).fold(own, u64::max)
}

/// `None`: it took too long and was killed. No process of the run comes near the memory.
fn attempt(args: &[&str]) -> Option<Run> {
    let start = Instant::now();
    let mut child = Command::new("prlimit")
        // For the sake of the host.
        .arg(format!("--data={}", 4 * MEMORY))
        .arg("--core=0")
        .arg(binary())
        .args(args)
        .env("NO_COLOR", "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    fn all(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
        thread::spawn(move || {
            let mut text = String::new();
            pipe.read_to_string(&mut text).unwrap();
            text
        })
    }
    let stdout = all(child.stdout.take().unwrap());
    let stderr = all(child.stderr.take().unwrap());
    let mut most = 0;
    let status = loop {
        most = most.max(most_memory(child.id()));
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > TIME {
            eprintln!("too slow: {args:?}");
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
        thread::sleep(Duration::from_millis(2));
    };
    eprintln!(
        "{:.1} s, {} MiB: {args:?}",
        start.elapsed().as_secs_f64(),
        most >> 20
    );
    let (stdout, stderr) = (stdout.join().unwrap(), stderr.join().unwrap());
    assert!(most < MEMORY, "{args:?}: {most} bytes");
    let code = status.code();
    let code = code.unwrap_or_else(|| panic!("{args:?}: {status} {stderr}"));
    Some(Run {
        code,
        stdout,
        stderr,
    })
}

/// Changes bytes of the Windows volume of a copy of the guest's disk.
pub fn damaged(lab: &Lab, name: &str, change: impl FnOnce(&mut [u8])) -> PathBuf {
    let disk = lab.path(name);
    tool("cp", &["--sparse=always", text(&lab.raw), text(&disk)]);
    let part = lab.spec.partition(Role::Windows).unwrap();
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&disk)
        .unwrap();
    // The metadata and small files lie in the first part of the volume.
    let mut bytes = vec![0; 160 << 20];
    let len = bytes.len().min(part.size as usize);
    file.read_exact_at(&mut bytes[..len], part.start).unwrap();
    let old = bytes.clone();
    change(&mut bytes[..len]);
    let pages = bytes.chunks(4096).zip(old.chunks(4096)).enumerate();
    let mut changed = 0;
    for (i, (new, _)) in pages.filter(|(_, (new, old))| new != old) {
        file.write_all_at(new, part.start + i as u64 * 4096)
            .unwrap();
        changed += 1;
    }
    assert!(changed > 0, "{name}: nothing to damage");
    disk
}

pub fn le16(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

pub fn le32(bytes: &[u8], at: usize) -> usize {
    le16(bytes, at) | le16(bytes, at + 2) << 16
}

/// The attributes of every MFT record that is in use: offset of the record and of the attribute.
pub fn attributes(volume: &[u8], kind: usize) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for record in (0..volume.len() - 1024).step_by(1024) {
        if !volume[record..].starts_with(b"FILE") || volume[record + 22] & 1 == 0 {
            continue;
        }
        let mut at = record + le16(volume, record + 20);
        while at + 16 < record + 1024 && le32(volume, at) != 0xffff_ffff {
            if le32(volume, at) == kind {
                found.push((record, at));
            }
            match le32(volume, at + 4) {
                0 => break,
                len => at += len,
            }
        }
    }
    found
}

#[test]
fn hostile_volumes() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec());
    const DATA: usize = 0x80;
    const USER: usize = 40;
    let user = |volume: &[u8], kind| {
        let all = attributes(volume, kind).into_iter();
        all.filter(|(record, _)| le32(volume, record + 44) >= USER)
            .collect::<Vec<_>>()
    };
    type Change<'a> = &'a dyn Fn(&mut [u8]);
    let cases: [(&str, Change<'_>); 5] = [
        ("every index block is its own child", &|volume| {
            for at in (0..volume.len() - 4096).step_by(1024) {
                if !volume[at..].starts_with(b"INDX") {
                    continue;
                }
                let vcn: [u8; 8] = volume[at + 16..at + 24].try_into().unwrap();
                let mut entry = at + 24 + le32(volume, at + 24);
                loop {
                    let len = le16(volume, entry + 8);
                    if len < 24 || entry + len > at + 4096 {
                        break;
                    }
                    // Not over the ends of sectors, which hold check marks.
                    if (entry + len - 9) / 512 == (entry + len - 1) / 512
                        && !(entry + len).is_multiple_of(512)
                    {
                        volume[entry + 12] |= 1;
                        volume[entry + len - 8..entry + len].copy_from_slice(&vcn);
                    }
                    entry += len;
                }
            }
        }),
        ("runs past the end", &|volume| {
            for (_, at) in user(volume, DATA) {
                if volume[at + 8] == 1 {
                    let run = at + le16(volume, at + 32);
                    let (length, offset) = (volume[run] & 15, volume[run] >> 4);
                    let first = run + 1 + usize::from(length);
                    volume[first..first + usize::from(offset)].fill(0x7f);
                }
            }
        }),
        ("4 GiB and more claimed", &|volume| {
            for (_, at) in user(volume, DATA) {
                match volume[at + 8] {
                    1 => volume[at + 52] = 1,
                    _ => volume[at + 16..at + 20].fill(0xff),
                }
            }
        }),
        ("records that contain each other", &|volume| {
            for (record, at) in user(volume, 0x30) {
                let own = le32(volume, record + 44) as u32;
                let parent = at + le16(volume, at + 20);
                volume[parent..parent + 4].copy_from_slice(&own.to_le_bytes());
            }
        }),
        ("attributes that do not advance", &|volume| {
            for (_, at) in user(volume, DATA) {
                volume[at + 4..at + 8].fill(0);
            }
        }),
    ];
    for (name, change) in cases {
        eprintln!("{name}");
        let disk = damaged(&lab, "hostile.raw", change);
        let run = bounded(&["inspect", text(&disk)]);
        assert!(matches!(run.code, 0 | 1 | 3), "{name}: {}", run.stderr);
        let out = lab.path("hostile-out");
        let run = converted(&disk, virtio_win(), &out);
        // Names in records are not what lookups go by: that one is harmless.
        let harmless = name == "records that contain each other";
        match run.code {
            0 if harmless => fs::remove_dir_all(&out).unwrap(),
            1 | 3 => assert!(run.stderr.contains("error:"), "{name}: {}", run.stderr),
            code => panic!("{name}: exit {code}: {}", run.stderr),
        }
        assert!(!out.exists());
        fs::remove_file(&disk).unwrap();
    }
}

/// Hives with cycles and impossible sizes; a computer name with terminal escapes.
#[test]
fn hostile_hives() {
    if !have(&TOOLS) {
        return;
    }
    let sound = hives::system(&spec());
    let mut cycle = sound.clone();
    let mut cells = 0;
    for at in 4096..cycle.len() - 16 {
        // Every list of subkeys leads back to the root key.
        if matches!(&cycle[at..at + 2], b"lf" | b"lh") && at % 8 == 4 {
            for i in 0..le16(&cycle, at + 2).min(500) {
                let entry = at + 4 + i * 8;
                let root: [u8; 4] = sound[36..40].try_into().unwrap();
                if entry + 4 <= cycle.len() {
                    cycle[entry..entry + 4].copy_from_slice(&root);
                    cells += 1;
                }
            }
        }
    }
    assert!(cells > 100);
    let mut huge = sound.clone();
    for at in (4096..huge.len() - 32).step_by(4) {
        if &huge[at..at + 2] == b"vk" {
            huge[at + 4..at + 8].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        }
        if &huge[at..at + 2] == b"nk" {
            huge[at + 36..at + 40].fill(0xff);
        }
    }
    for (name, hive) in [("cycle", cycle), ("huge", huge)] {
        eprintln!("{name}");
        let mut spec = spec();
        spec.system_hive = Some(hive);
        let lab = Lab::new(spec);
        let run = bounded(&["inspect", text(&lab.raw)]);
        assert!(matches!(run.code, 0 | 1 | 3), "{}", run.stderr);
        let run = converted(&lab.raw, virtio_win(), &lab.path("out"));
        assert!(
            matches!(run.code, 1 | 3),
            "{name}: {} {}",
            run.code,
            run.stderr
        );
        assert!(run.stderr.contains("error:"), "{}", run.stderr);
    }
    let mut spec = spec();
    spec.hostname = "A\u{1b}[31m\u{7}\u{1b}]0;B".into();
    let lab = Lab::new(spec);
    let run = bounded(&["inspect", text(&lab.raw)]).expect(0);
    assert!(run.stdout.contains("A[31m"), "{}", run.stdout);
}

pub fn envelope(href: &str, gzip: bool) -> String {
    let compression = ["", " ovf:compression=\"gzip\""][usize::from(gzip)];
    format!(
        "<Envelope xmlns:ovf=\"o\" xmlns:rasd=\"r\"><References><File ovf:id=\"f\" ovf:href=\"{href}\"{compression}/></References>\
         <DiskSection><Disk ovf:diskId=\"d\" ovf:fileRef=\"f\" ovf:capacity=\"1\" ovf:capacityAllocationUnits=\"byte * 2^20\"/></DiskSection>\
         <VirtualSystem ovf:id=\"x\"><VirtualHardwareSection><Item><rasd:InstanceID>1</rasd:InstanceID>\
         <rasd:ResourceType>20</rasd:ResourceType></Item><Item><rasd:AddressOnParent>0</rasd:AddressOnParent>\
         <rasd:HostResource>ovf:/disk/d</rasd:HostResource><rasd:InstanceID>2</rasd:InstanceID><rasd:Parent>1</rasd:Parent>\
         <rasd:ResourceType>17</rasd:ResourceType></Item></VirtualHardwareSection></VirtualSystem></Envelope>"
    )
}

/// An archive (cpio) whose only file declares 4 GiB, followed by a GiB of zeroes: one MiB of gzip.
fn bomb() -> &'static [u8] {
    static BOMB: OnceLock<Vec<u8>> = OnceLock::new();
    BOMB.get_or_init(|| {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut header = [b'0'; 110];
        header[..6].copy_from_slice(b"070701");
        header[54..62].copy_from_slice(b"FFFFFFFF");
        header[94..102].copy_from_slice(b"00000002");
        gz.write_all(&header).unwrap();
        gz.write_all(b"a\0").unwrap();
        let zeroes = vec![0; 1 << 20];
        for _ in 0..1024 {
            gz.write_all(&zeroes).unwrap();
        }
        gz.finish().unwrap()
    })
}

#[test]
fn hostile_packages() {
    if !have(&["qemu-img", "genisoimage", "tar"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let refused = |path: &Path, says: &str| {
        let run = bounded(&["inspect", text(path)]);
        assert!(matches!(run.code, 1..=3), "{} {}", run.code, run.stdout);
        assert!(run.stderr.contains(says), "{says}: {}", run.stderr);
    };
    // A billion laughs.
    let mut laughs = String::from("<!DOCTYPE l [<!ENTITY l0 \"ha\">");
    for i in 1..10 {
        laughs += &format!("<!ENTITY l{i} \"{}\">", format!("&l{};", i - 1).repeat(10));
    }
    laughs += "]><Envelope>&l9;</Envelope>";
    refused(&file("laughs.ovf", laughs.as_bytes()), "DOCTYPE");
    refused(
        &file(
            "laughs.xml",
            laughs.replace("Envelope", "domain").as_bytes(),
        ),
        "DOCTYPE",
    );
    // A disk of 1 MiB that unpacks to a GiB.
    file("bomb.img.gz", bomb());
    refused(
        &file("bomb.ovf", envelope("bomb.img.gz", true).as_bytes()),
        "unpacks to more than",
    );
    // Names that lead out of the package.
    refused(
        &file("out.ovf", envelope("../../etc/shadow", false).as_bytes()),
        "outside",
    );
    let ova = dir.path().join("out.ova");
    file("x.ovf", envelope("../x.vmdk", false).as_bytes());
    file("x.vmdk", b"KDMV");
    tool(
        "tar",
        &[
            "-C",
            text(dir.path()),
            "-cf",
            text(&ova),
            "--transform=s,^x.vmdk,../x.vmdk,",
            "-P",
            "x.ovf",
            "x.vmdk",
        ],
    );
    // It is unpacked under a name that hyper2kvm chooses.
    refused(&ova, "damaged");
    assert!(!dir.path().join("../x.vmdk").exists());
    // An ISO with `..` for a name.
    let cd = dir.path().join("cd");
    fs::create_dir(&cd).unwrap();
    fs::write(cd.join("QQ"), "x").unwrap();
    let iso = dir.path().join("evil.iso");
    tool(
        "genisoimage",
        &["-quiet", "-J", "-R", "-o", text(&iso), text(&cd)],
    );
    let mut bytes = fs::read(&iso).unwrap();
    for (from, to) in [(&b"QQ"[..], &b".."[..]), (b"\0Q\0Q", b"\0.\0.")] {
        for at in 0..bytes.len() - 4 {
            if bytes[at..].starts_with(from) {
                bytes[at..at + to.len()].copy_from_slice(to);
            }
        }
    }
    fs::write(&iso, bytes).unwrap();
    let run = bounded(&["drivers", text(&iso)]).expect(1);
    assert!(
        run.stderr.contains("name that is not allowed"),
        "{}",
        run.stderr
    );
}

/// Text of an INF becomes a value in the guest's registry, and never a command.
#[test]
fn hostile_inf() {
    if !have(&TOOLS) {
        return;
    }
    const EVIL: &str = "\"; rm -rf / & del *.* %PATH% \u{1b}[2J";
    let lab = Lab::new(spec());
    let folder = lab.path("evil-win");
    tool("cp", &["-r", text(virtio_win()), text(&folder)]);
    let mut changed = 0;
    let mut open = vec![folder.clone()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
                continue;
            }
            if path.extension().is_none_or(|e| e != "inf") {
                continue;
            }
            let bytes = fs::read(&path).unwrap();
            let Ok(inf) = String::from_utf8(bytes) else {
                continue;
            };
            let quoted = EVIL.replace('"', "\"\"");
            let inf = inf.replace("Red Hat", &format!("{quoted} Red Hat"));
            fs::write(&path, inf).unwrap();
            changed += 1;
        }
    }
    assert!(changed > 10);
    let out = lab.path("out");
    let run = converted(&lab.raw, &folder, &out);
    if run.code == 0 {
        for entry in fs::read_dir(out.join("generated")).into_iter().flatten() {
            let path = entry.unwrap().path();
            let script = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
            assert!(!script.contains("rm -rf"), "{}: {script}", path.display());
        }
        for report in ["report.html", "guest-final.xml", "guest-bootstrap.xml"] {
            let report = fs::read_to_string(out.join(report)).unwrap();
            assert!(!report.contains('\u{1b}'), "{report}");
        }
    } else {
        assert!(matches!(run.code, 1 | 3), "{} {}", run.code, run.stderr);
        assert!(run.stderr.contains("error:"), "{}", run.stderr);
    }
}

/// A file of the host that must stay closed: opening it blocks for ever.
pub fn trap(path: &Path) {
    tool("mkfifo", &[text(path)]);
}

/// A symbolic link or a junction, as Windows stores it.
fn link_to(target: &str, junction: bool) -> Vec<u8> {
    let name: Vec<u8> = target.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let len = (name.len() as u16).to_le_bytes();
    let mut data = [[0, 0], len, len, [0, 0]].concat();
    if !junction {
        data.extend(0u32.to_le_bytes());
    }
    data.extend(name);
    let tag: u32 = if junction { 0xa000_0003 } else { 0xa000_000c };
    let mut point = tag.to_le_bytes().to_vec();
    point.extend((data.len() as u32).to_le_bytes());
    point.extend(data);
    point
}

/// Links in the guest's file system that name files of the host, and junctions where files are put.
#[test]
fn links_out_of_windows() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec());
    let part = lab.spec.partition(Role::Windows).unwrap();
    let host = lab.path("host");
    fs::create_dir(&host).unwrap();
    trap(&host.join("SYSTEM"));
    let outside = text(&host);
    let back = outside.replace('/', "\\");
    let up = format!("..\\..\\..\\..\\..\\..\\..\\..{back}");
    type Change<'a> = &'a dyn Fn(&mut Ntfs3g);
    let path = |text: &str| GuestPath::parse(text).unwrap();
    let hive = path("Windows/System32/config/SYSTEM");
    let link = |volume: &mut Ntfs3g, target: &str| {
        volume
            .make_wof(&hive, b"", 0, &link_to(target, false))
            .unwrap();
    };
    let junction = |volume: &mut Ntfs3g, place: &str, target: &str| {
        volume.create_dir(&path(place)).unwrap();
        volume
            .make_reparse(&path(place), &link_to(target, true))
            .unwrap();
    };
    let cases: [(&str, &str, Change<'_>); 5] = [
        ("an absolute path", "[hive-damaged]", &|v| {
            link(v, &format!("{outside}/SYSTEM"))
        }),
        ("a path of NT", "[hive-damaged]", &|v| {
            link(v, &format!("\\??\\C:\\{up}\\SYSTEM"))
        }),
        ("a path upwards", "[hive-damaged]", &|v| {
            link(v, &format!("{up}\\SYSTEM"))
        }),
        (
            "a junction where files are put",
            "a directory on the way is a link",
            &|v| {
                junction(v, "Windows/hyper2kvm", &format!("\\??\\C:\\{up}"));
            },
        ),
        ("a second Windows behind a junction", "", &|v| {
            junction(v, "Windows.old", &format!("\\??\\{outside}"));
        }),
    ];
    for (name, says, change) in cases {
        eprintln!("{name}");
        let disk = lab.path("links.raw");
        tool("cp", &["--sparse=always", text(&lab.raw), text(&disk)]);
        let blocks = Arc::new(FileDisk::open_rw(&disk).unwrap());
        let mut volume =
            Ntfs3g::mount(blocks, part.start, part.size, MountOptions::default()).unwrap();
        change(&mut volume);
        volume.unmount().unwrap();
        let run = bounded(&["inspect", text(&disk)]);
        assert!(matches!(run.code, 0 | 1 | 3), "{name}: {}", run.stderr);
        let out = lab.path("links-out");
        let run = converted(&disk, virtio_win(), &out);
        if says.is_empty() {
            assert_eq!(run.code, 0, "{name}: {}", run.stderr);
            fs::remove_dir_all(&out).unwrap();
        } else {
            assert!(
                matches!(run.code, 1 | 3),
                "{name}: {} {}",
                run.code,
                run.stdout
            );
            assert!(run.stderr.contains(says), "{name}: {}", run.stderr);
            assert!(!out.exists());
        }
        assert_eq!(fs::read_dir(&host).unwrap().count(), 1);
    }
}

/// A disk with one ext4 file system made of a directory.
pub fn linux(lab: &Path, name: &str, root: &Path) -> PathBuf {
    let disk = lab.join(name);
    let args = [
        "-q",
        "-F",
        "-t",
        "ext4",
        "-d",
        text(root),
        text(&disk),
        "64m",
    ];
    tool("mke2fs", &args);
    disk
}

pub fn linux_root(lab: &Path, name: &str) -> PathBuf {
    let root = lab.join(name);
    for folder in ["etc", "usr/sbin", "usr/lib"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::write(
        root.join("etc/os-release"),
        "ID=evil\nPRETTY_NAME=\"Evil \u{1b}[31m\u{7}Linux\"\n",
    )
    .unwrap();
    root
}

/// A table of file systems and a host name that are files of the host.
#[test]
fn links_out_of_linux() {
    if !have(&["qemu-img", "qemu-storage-daemon", "mke2fs"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let host = dir.path().join("host");
    fs::create_dir_all(&host).unwrap();
    fs::write(host.join("hostname"), "HOST-SECRET").unwrap();
    trap(&host.join("fstab"));
    let root = linux_root(dir.path(), "root");
    let up = format!("../../../../../../../..{}", text(&host));
    symlink(host.join("fstab"), root.join("etc/fstab")).unwrap();
    symlink(format!("{up}/hostname"), root.join("etc/hostname")).unwrap();
    symlink("usr/sbin", root.join("sbin")).unwrap();
    let disk = linux(dir.path(), "links.img", &root);
    let run = bounded(&["inspect", text(&disk)]);
    assert!(!run.stdout.contains("HOST-SECRET") && !run.stderr.contains("HOST-SECRET"));
    assert!(run.stdout.contains("Linux"), "{}", run.stdout);
    let out = dir.path().join("out");
    let run = bounded(&["convert", text(&disk), "-o", text(&out)]);
    assert_eq!(run.code, 3, "{}", run.stdout);
    assert!(
        run.stderr.contains("error:") && !out.exists(),
        "{}",
        run.stderr
    );
}
