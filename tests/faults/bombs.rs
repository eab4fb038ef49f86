//! Small files that declare large sizes: hives, disks, tables of images, packages, descriptions.
//! Each run ends within 10 s and 512 MiB, in all its processes, and leaves nothing.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hyper2kvm::demo::{GuestSpec, WinVersion};

use crate::hostile::{
    attributes, bounded, converted, damaged, envelope, le16, le32, linux, linux_root,
};
use crate::support::{Lab, TOOLS, binary, finish, have, names, skip, tool, virtio_win};
use crate::{no_process_left, spec, text};

/// Makes the first file with this name in a volume as large as wanted; what follows its clusters is a hole.
fn inflate(volume: &mut [u8], name: &str, size: u64) {
    const CLUSTER: u64 = 4096;
    let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let named = attributes(volume, 0x30).into_iter().find(|(_, at)| {
        let key = at + le16(volume, at + 20);
        usize::from(volume[key + 64]) * 2 == name.len() && volume[key + 66..].starts_with(&name)
    });
    let (record, _) = named.expect("no such file");
    let data = attributes(volume, 0x80).into_iter().find(|a| a.0 == record);
    let (_, at) = data.expect("a file");
    let clusters = size.div_ceil(CLUSTER);
    let (mut had, mut attribute) = (0, vec![0; 64]);
    attribute[..16].copy_from_slice(&volume[at..at + 16]);
    if volume[at + 8] == 1 {
        had = 1 + le32(volume, at + 24) as u64;
        let runs = at + le16(volume, at + 32);
        let mut end = runs;
        while volume[end] != 0 {
            end += 1 + usize::from(volume[end] & 15) + usize::from(volume[end] >> 4);
        }
        attribute.extend(&volume[runs..end]);
    }
    // A run without a place, of three bytes of length.
    attribute.push(3);
    attribute.extend(&((clusters - had) as u32).to_le_bytes()[..3]);
    attribute.resize((attribute.len() + 1).next_multiple_of(8), 0);
    let new = attribute.len();
    let mut put = |at: usize, bytes: &[u8]| attribute[at..at + bytes.len()].copy_from_slice(bytes);
    put(8, &[1]);
    put(24, &(clusters - 1).to_le_bytes());
    put(32, &64u16.to_le_bytes());
    for field in [40, 48, 56] {
        put(field, &(clusters * CLUSTER).to_le_bytes());
    }
    put(4, &(new as u32).to_le_bytes());
    // What follows in the record moves.
    let (old, used) = (le32(volume, at + 4), le32(volume, record + 24));
    volume.copy_within(at + old..record + used, at + new);
    volume[at..at + new].copy_from_slice(&attribute);
    let used = used + new - old;
    // Sectors end in check marks.
    assert!(used < 510, "the first sector of the record is full: {used}");
    volume[record + 24..record + 28].copy_from_slice(&(used as u32).to_le_bytes());
}

#[test]
fn hives_that_are_almost_all_hole() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec());
    for (mib, read) in [([511, 511, 511], false), ([159, 255, 63], true)] {
        let disk = damaged(&lab, "holes.raw", |volume| {
            for (name, mib) in ["SYSTEM", "SOFTWARE", "DEFAULT"].iter().zip(mib) {
                inflate(volume, name, mib << 20);
            }
        });
        let image = lab.path("holes.qcow2");
        let args = ["convert", "-f", "raw", "-O", "qcow2", "-c"];
        tool(
            "qemu-img",
            &[&args[..], &[text(&disk), text(&image)]].concat(),
        );
        assert!(fs::metadata(&image).unwrap().len() < 16 << 20);
        let run = bounded(&["inspect", text(&image)]);
        assert!([0, 1, 3].contains(&run.code), "{}", run.stderr);
        assert_eq!(
            !run.stdout.contains("no sound one has more than"),
            read,
            "{}",
            run.stdout
        );
        let evidence = lab.path("evidence");
        bounded(&["inspect", text(&image), "--evidence", text(&evidence)]);
        fs::remove_dir_all(evidence).unwrap();
        let out = lab.path("out");
        let run = converted(&image, virtio_win(), &out);
        assert!([0, 1, 3].contains(&run.code), "{}", run.stderr);
        let _ = fs::remove_dir_all(out);
    }
}

/// Logs of a hive are saved before they are emptied.
#[test]
fn logs_that_are_almost_all_hole() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec());
    let disk = damaged(&lab, "holes.raw", |volume| {
        for name in ["SYSTEM.LOG1", "SYSTEM.LOG2"] {
            inflate(volume, name, 511 << 20);
        }
    });
    let run = converted(&disk, virtio_win(), &lab.path("out"));
    assert!([0, 1, 3].contains(&run.code), "{}", run.stderr);
}

#[test]
fn disks_of_a_size_that_nobody_has() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec());
    let empty = lab.path("pib.qcow2");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&empty), "1P"],
    );
    let guest = lab.in_format("qcow2", "", "large.qcow2");
    for verb in ["inspect", "verify", "plan"] {
        let mut args = vec![verb, text(&empty)];
        if verb == "plan" {
            args.extend(["--virtio-iso", text(virtio_win())]);
        }
        let run = bounded(&args).expect(1);
        for says in ["1024 TiB", "64 TiB", "hint: shrink the disk"] {
            assert!(run.stderr.contains(says), "{}", run.stderr);
        }
    }
    let run = converted(&empty, virtio_win(), &lab.path("out")).expect(1);
    assert!(run.stderr.contains("1024 TiB") && !lab.path("out").exists());
    // The largest supported one, with a Windows at its start.
    tool("qemu-img", &["resize", "-q", text(&guest), "64T"]);
    bounded(&["inspect", text(&guest)]).expect(0);
    // qemu-img takes a second or two for 16 TiB of nothing, and the host may be busy.
    let guest = lab.in_format("qcow2", "", "less.qcow2");
    tool("qemu-img", &["resize", "-q", text(&guest), "16T"]);
    let run = converted(&guest, virtio_win(), &lab.path("out"));
    assert!([0, 1, 3].contains(&run.code), "{}", run.stderr);
}

/// A file of this length that is all hole but for its head.
fn sparse(path: &Path, head: &[u8], length: u64) {
    let mut file = File::create(path).unwrap();
    file.write_all(head).unwrap();
    file.set_len(length).unwrap();
}

fn be(bytes: &mut [u8], at: usize, value: u64, width: usize) {
    bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

fn le(bytes: &mut [u8], at: usize, value: u64, width: usize) {
    bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
}

/// Images whose tables QEMU reads as a whole before it answers.
#[test]
fn images_with_giant_tables() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec());
    let head = |path: &Path, length: usize| {
        let mut head = vec![0; length];
        let file = File::open(path).unwrap();
        let mut at = 0;
        while let Ok(n @ 1..) = file.read_at(&mut head[at..], at as u64) {
            at += n;
        }
        head
    };
    let mut images: Vec<PathBuf> = Vec::new();
    let mut image = |name: &str, head: &[u8], length: u64| {
        let path = lab.path(name);
        sparse(&path, head, length);
        images.push(path);
    };
    let made = |format: &str, size: &str| {
        let path = lab.path(&format!("seed.{format}"));
        let name = text(&path).to_owned();
        tool("qemu-img", &["create", "-q", "-f", format, &name, size]);
        path
    };
    let qcow2 = head(&made("qcow2", "1G"), 256 << 10);
    // L1 entries, refcount table clusters, snapshots, a header extension, a bitmap directory.
    for (name, at, width, value) in [
        ("l1-max.qcow2", 36, 4, (32 << 20) / 8),
        ("l1.qcow2", 36, 4, 0x7fff_ffff),
        ("refcounts-max.qcow2", 56, 4, 128),
        ("refcounts.qcow2", 56, 4, 0x7fff_ffff),
        ("snapshots.qcow2", 60, 4, 65_536),
        ("extension.qcow2", 116, 4, 0x7fff_fff0),
        ("header.qcow2", 100, 4, 0x7fff_fff8),
    ] {
        let mut bytes = qcow2.clone();
        be(&mut bytes, at, value, width);
        if name.starts_with("snapshots") {
            be(&mut bytes, 64, 1 << 20, 8);
        }
        image(name, &bytes, 64 << 30);
    }
    let mut vhd = head(&made("vpc", "1G"), 4096);
    be(&mut vhd, 512 + 28, (1 << 29) - 2, 4);
    be(&mut vhd, 512 + 36, 0, 4);
    let sum: u32 = vhd[512..1536].iter().map(|b| u32::from(*b)).sum();
    be(&mut vhd, 512 + 36, u64::from(!sum), 4);
    image("table.vhd", &vhd, 64 << 30);
    let file = File::options().write(true).open(lab.path("table.vhd"));
    let footer = &vhd[..512];
    file.unwrap()
        .write_all_at(footer, (64 << 30) - 512)
        .unwrap();
    let mut vdi = head(&made("vdi", "1G"), 512);
    le(&mut vdi, 384, 0x1fff_f000, 4);
    le(&mut vdi, 368, 0x1fff_f000 << 20, 8);
    image("table.vdi", &vdi, 64 << 30);
    let mut vmdk = head(&made("vmdk", "1G"), 64 << 10);
    // Capacity, grain size, entries of a grain table.
    le(&mut vmdk, 12, 0x7fff_ffff_ffff, 8);
    image("capacity.vmdk", &vmdk, 64 << 30);
    le(&mut vmdk, 12, 32 << 30, 8);
    le(&mut vmdk, 20, 1, 8);
    le(&mut vmdk, 44, 512, 4);
    image("grains.vmdk", &vmdk, 64 << 30);
    // The region table says that the block table has 2 GiB.
    let vhdx = made("vhdx", "1G");
    let mut vhdx = head(&vhdx, 4 << 20);
    let bat = [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42];
    for table in [192 << 10, 256 << 10] {
        let entry = vhdx[table..table + 4096].windows(8).position(|w| w == bat);
        let entry = table + entry.unwrap();
        le(&mut vhdx, entry + 16, 16 << 20, 8);
        le(&mut vhdx, entry + 24, 2 << 30, 4);
        le(&mut vhdx, table + 4, 0, 4);
        let sum = crc32c(&vhdx[table..table + (64 << 10)]);
        le(&mut vhdx, table + 4, u64::from(sum), 4);
    }
    image("table.vhdx", &vhdx, 64 << 30);
    // Every entry of a first table leads to one second table: hours of work for QEMU.
    let shared = lab.path("shared.qcow2");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&shared), "60T"],
    );
    tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -q 0 64k", text(&shared)],
    );
    let mut bytes = fs::read(&shared).unwrap();
    let field = |bytes: &[u8], at: usize, width: usize| {
        let field = &bytes[at..at + width];
        field.iter().fold(0, |n, byte| n << 8 | usize::from(*byte))
    };
    let (first, entries) = (field(&bytes, 40, 8), field(&bytes, 36, 4));
    let entry = bytes[first..first + 8].to_vec();
    bytes[first..first + 8 * entries].copy_from_slice(&entry.repeat(entries));
    fs::write(&shared, bytes).unwrap();
    images.push(shared);
    // 8 GB of tables, all of them zero.
    let large = lab.path("large.vmdk");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "vmdk", text(&large), "60T"],
    );
    images.push(large);
    for path in images {
        let run = bounded(&["inspect", text(&path)]);
        assert!(
            run.code <= 3,
            "{}: {} {}",
            path.display(),
            run.code,
            run.stderr
        );
        let giant = ["table.vhd", "table.vdi", "table.vhdx"];
        if giant.iter().any(|name| path.ends_with(name)) {
            let says = "its tables need more than the 448 MiB of memory";
            assert!(run.stderr.contains(says), "{}", run.stderr);
        }
        eprintln!("  {} {}", run.code, run.stderr.replace('\n', " "));
        fs::remove_file(path).unwrap();
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

/// A user of the embedded engine wants no VM on this host.
#[test]
fn embedded_starts_no_appliance_for_a_linux() {
    if !have(&["qemu-img", "qemu-storage-daemon", "mke2fs"]) {
        return;
    }
    let lab = Lab::new(GuestSpec::new(WinVersion::Win10));
    let root = linux_root(lab.dir.path(), "root");
    let disk = linux(lab.dir.path(), "linux.img", &root);
    let started = lab.path("started");
    let bin = lab.path("bin");
    fs::create_dir(&bin).unwrap();
    for program in [
        "guestfish",
        "virt-v2v",
        "virt-v2v-in-place",
        "qemu-system-x86_64",
    ] {
        let script = format!("#!/bin/sh\necho {program} >> {}\nexit 1\n", text(&started));
        fs::write(bin.join(program), script).unwrap();
        fs::set_permissions(bin.join(program), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:{}", text(&bin), std::env::var("PATH").unwrap());
    let out = lab.path("out");
    let drivers = text(virtio_win());
    let run = |engine: &str| {
        for args in [
            vec!["inspect", text(&disk)],
            vec!["plan", text(&disk), "--virtio-iso", drivers],
            vec![
                "convert",
                text(&disk),
                "--virtio-iso",
                drivers,
                "-o",
                text(&out),
            ],
        ] {
            let mut command = Command::new(binary());
            command
                .args(args)
                .args(["--engine", engine])
                .env("PATH", &path);
            let run = finish(command);
            assert!((0..=5).contains(&run.code), "{}", run.stderr);
            assert!(!out.exists());
        }
    };
    run("embedded");
    assert!(
        !started.exists(),
        "{}",
        fs::read_to_string(&started).unwrap()
    );
    // The stand-ins are the programs that would be started.
    run("guestfish");
    assert!(started.exists());
}

fn archive(path: &Path, members: &[(&str, &[u8])]) {
    let folder = tempfile::tempdir().unwrap();
    let mut args = vec!["-cf", text(path), "-C", text(folder.path())];
    for (name, bytes) in members {
        fs::write(folder.path().join(name), bytes).unwrap();
        args.push(name);
    }
    tool("tar", &args);
}

fn gzip_of_zeroes(mib: usize) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let zeroes = vec![0; 1 << 20];
    for _ in 0..mib {
        gz.write_all(&zeroes).unwrap();
    }
    gz.finish().unwrap()
}

/// A disk that unpacks to more than declared, one that fills the available space, and one that is
/// killed while unpacking.
#[test]
fn packages_that_unpack_to_much() {
    if !have(&["qemu-img", "tar"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let temporary = dir.path().join("tmp");
    fs::create_dir(&temporary).unwrap();
    let disk = gzip_of_zeroes(1500);
    let ova = |name: &str, gib: u64| {
        let path = dir.path().join(name);
        let ovf = envelope("d.img.gz", true);
        let ovf = ovf.replace(
            "ovf:capacity=\"1\"",
            &format!("ovf:capacity=\"{}\"", gib << 10),
        );
        archive(&path, &[("m.ovf", ovf.as_bytes()), ("d.img.gz", &disk)]);
        path
    };
    let inspect = |source: &Path| {
        let mut command = Command::new(binary());
        command.arg("inspect").arg(source).env("TMPDIR", &temporary);
        command
    };
    let small = ova("small.ova", 0);
    let run = finish(inspect(&small)).expect(1);
    for says in ["unpacks to more than", "0 MiB", "--max-unpacked"] {
        assert!(run.stderr.contains(says), "{}", run.stderr);
    }
    assert_eq!(names(&temporary), [""; 0]);
    let large = ova("large.ova", 100);
    // Killed in the middle.
    for wait in [100, 300, 600] {
        let mut child = inspect(&large)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(names(&temporary), [""; 0]);
    }
    // Zeroes are holes, so that they take no room.
    let start = Instant::now();
    finish(inspect(&large)).expect(0);
    assert!(start.elapsed() < Duration::from_secs(60));
    assert_eq!(names(&temporary), [""; 0]);
}

/// Descriptions and lists that are large or deep.
#[test]
fn descriptions_without_end() {
    if !have(&["qemu-img", "tar"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let open = |depth: usize, name: &str| {
        format!("<{name}>{}", "<a>".repeat(depth)) + &"</a>".repeat(depth) + &format!("</{name}>")
    };
    let wide = |name: &str| format!("<{name}>{}</{name}>", "<a b='c'/>".repeat(1_000_000));
    let mut sources = Vec::new();
    for (kind, name) in [("ovf", "Envelope"), ("xml", "domain")] {
        for (what, content) in [("deep", open(400_000, name)), ("wide", wide(name))] {
            fs::write(path(&format!("{what}.{kind}")), content).unwrap();
            sources.push(path(&format!("{what}.{kind}")));
        }
        sparse(&path(&format!("huge.{kind}")), b"<", 64 << 30);
        sources.push(path(&format!("huge.{kind}")));
    }
    fs::write(path("wide.vmx"), "a.b = \"c\"\n".repeat(1_500_000)).unwrap();
    sparse(&path("huge.vmx"), b"a = \"", 64 << 30);
    sparse(&path("huge.vmdk"), b"# Disk DescriptorFile\n", 64 << 30);
    sources.extend(["wide.vmx", "huge.vmx", "huge.vmdk"].map(path));
    // A manifest of many GB, beside a description and in an archive.
    fs::write(path("m.ovf"), envelope("d.img", false)).unwrap();
    sparse(&path("d.img"), b"", 1 << 20);
    sparse(&path("m.mf"), b"SHA256(d.img)= 00\n", 64 << 30);
    sources.push(path("m.ovf"));
    let args = ["--sparse", "-cf"];
    let archive = path("m.ova");
    let members = ["-C", text(dir.path()), "m.ovf", "m.mf", "d.img"];
    tool("tar", &[&args[..], &[text(&archive)], &members].concat());
    sources.push(archive);
    // No archives at all, though they are called so.
    for (name, head) in [("z.ova", &b"PK\x03\x04"[..]), ("x.ova", b"\xfd7zXZ\0")] {
        sparse(&path(name), head, 64 << 30);
        sources.push(path(name));
    }
    for source in sources {
        let run = bounded(&["inspect", text(&source)]);
        assert!(
            (1..=3).contains(&run.code),
            "{}: {} {}",
            source.display(),
            run.code,
            run.stderr
        );
        assert!(run.stderr.contains("error:") && run.stderr.len() < 4096);
    }
}

/// A temporary directory without space: an explicit error, and nothing left.
#[test]
fn without_room_for_temporary_files() {
    if !have(&TOOLS) || !have(&["tar", "mount"]) || !rustix::process::geteuid().is_root() {
        return;
    }
    let lab = Lab::new(spec());
    let full = lab.path("full");
    fs::create_dir(&full).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "none", text(&full)])
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        return skip("mount", "nothing can be mounted here");
    }
    let room = Room(full.clone());
    let disk = lab.in_format("vmdk", "subformat=streamOptimized", "d.vmdk");
    let ova = lab.path("m.ova");
    let ovf = envelope("d.vmdk", false).replace("ovf:capacity=\"1\"", "ovf:capacity=\"512\"");
    archive(
        &ova,
        &[
            ("m.ovf", ovf.as_bytes()),
            ("d.vmdk", &fs::read(disk).unwrap()),
        ],
    );
    let mut command = Command::new(binary());
    command.arg("inspect").arg(&ova).env("TMPDIR", &full);
    let run = finish(command).expect(1);
    assert!(
        run.stderr.contains("1 MiB") || run.stderr.contains("0 MiB"),
        "{}",
        run.stderr
    );
    assert!(run.stderr.contains("TMPDIR"), "{}", run.stderr);
    assert_eq!(names(&full), [""; 0]);
    // Without any room at all.
    let rest = vec![0; 2 << 20];
    let _ = File::create(full.join("rest")).unwrap().write_all(&rest);
    for args in [
        vec!["inspect", text(&lab.raw)],
        vec![
            "convert",
            text(&lab.raw),
            "--virtio-iso",
            text(virtio_win()),
            "-o",
            text(&lab.path("out")),
        ],
    ] {
        let mut command = Command::new(binary());
        command.args(args).env("TMPDIR", &full);
        let run = finish(command);
        assert!([0, 1].contains(&run.code), "{} {}", run.code, run.stderr);
        assert_eq!(names(&full), ["rest"]);
        if run.code == 1 {
            assert!(!lab.path("out").exists());
            assert!(run.stderr.contains("No space left"), "{}", run.stderr);
        }
    }
    drop(room);
    no_process_left(&lab);
}

struct Room(PathBuf);

impl Drop for Room {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}
