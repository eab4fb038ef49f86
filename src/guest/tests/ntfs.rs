//! NTFS written by libntfs-3g, read by hyper2kvm's reader, verified by ntfs-3g's tools and the
//! crate `ntfs`.

use std::sync::Arc;

use ::ntfs::NtfsReadSeek;
use ::ntfs::indexes::NtfsFileNameIndex;

use super::*;
use crate::block::Window;
use crate::guest::ntfs_record::{Body, MftRecord, decode_runs};
use crate::guest::{Extent, FileKind, FsKind, GuestError, GuestRead, GuestWrite, fs};

const TOOLS: &[&str] = &[
    "mkntfs",
    "ntfscat",
    "ntfsls",
    "ntfsinfo",
    "ntfscp",
    "ntfsfix",
    "ntfssecaudit",
];

pub(super) fn ready() -> bool {
    have(TOOLS) && {
        let there = crate::guest::ntfs3g::is_available();
        if !there {
            skip("libntfs-3g", "no libntfs-3g");
        }
        there
    }
}

pub(super) fn ntfscat(image: &Image, path: &str) -> Vec<u8> {
    run("ntfscat", &["-f", image.name(), path])
}

/// Fails unless `ntfsfix` without writing, which compares the MFT with its mirror and reads the
/// log, finds no fault.
pub(super) fn assert_sound(image: &Image) {
    let said = run("ntfsfix", &["--no-action", image.name()]);
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(said.contains("processed successfully"), "{said}");
}

/// The contents according to the crate `ntfs`.
fn crate_read(image: &Image, path: &GuestPath) -> Vec<u8> {
    let disk = Arc::new(FileDisk::open(&image.file).unwrap());
    let mut disk = Window::new(disk, 0, image.size);
    let mut fs = ::ntfs::Ntfs::new(&mut disk).unwrap();
    fs.read_upcase_table(&mut disk).unwrap();
    let mut file = fs.root_directory(&mut disk).unwrap();
    for part in path.parts() {
        let index = file.directory_index(&mut disk).unwrap();
        let mut finder = index.finder();
        let entry = NtfsFileNameIndex::find(&mut finder, &fs, &mut disk, part)
            .unwrap()
            .unwrap();
        let next = entry.to_file(&fs, &mut disk).unwrap();
        file = next;
    }
    let item = file.data(&mut disk, "").unwrap().unwrap();
    let attribute = item.to_attribute().unwrap();
    let mut value = attribute.value(&mut disk).unwrap();
    let mut bytes = vec![0; value.len() as usize];
    value.read_exact(&mut disk, &mut bytes).unwrap();
    bytes
}

/// The value of the first line `key: value` of `ntfsinfo`.
fn info(image: &Image, path: &str, key: &str) -> Option<String> {
    let text = run("ntfsinfo", &["-F", path, image.name()]);
    String::from_utf8_lossy(&text).lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim().to_string())
    })
}

#[test]
fn every_sector_and_cluster_size() {
    if !ready() {
        return;
    }
    let mut cases: Vec<(u64, u32, u32)> = (9..=16).map(|bits| (24, 512, 1 << bits)).collect();
    cases.extend((12..=16).map(|bits| (32, 4096, 1 << bits)));
    cases.extend([(512, 512, 128 << 10), (2048, 512, 2 << 20)]);
    for (mib, sector, cluster) in cases {
        let what = format!("{sector}/{cluster}");
        let image = Image::ntfs(mib, sector, cluster);
        let driver = noise(300_000, 7);
        let mut writer = image.writer();
        writer.create_dir(VOLUME, &path("Windows")).unwrap();
        writer
            .create_dir(VOLUME, &path("Windows/System32"))
            .unwrap();
        let file = path("Windows/System32/viostor.sys");
        writer.write_file(VOLUME, &file, &driver).unwrap();
        writer
            .write_file(VOLUME, &path("Windows/a small file.txt"), b"resident")
            .unwrap();
        writer.close().unwrap();
        assert_sound(&image);

        // Large volumes take long to hash.
        let digest = || (mib < 100 && cluster.trailing_zeros() % 2 == 0).then(|| image.digest());
        let before = digest();
        let reader = image.reader();
        let volume = &reader.volumes()[0];
        assert_eq!(volume.kind, FsKind::Ntfs, "{what}");
        assert_eq!(volume.label.as_deref(), Some("Windows"), "{what}");
        assert_eq!(volume.state.cluster_size, cluster, "{what}");
        assert_eq!(volume.state.unreadable, None, "{what}");
        assert!(!volume.state.dirty && !volume.state.hibernated, "{what}");
        let free = reader.free_bytes(VOLUME, u64::MAX).unwrap().unwrap();
        assert!(free > 0 && free < mib << 20, "{what}");
        let enough = reader.free_bytes(VOLUME, 1 << 20).unwrap().unwrap();
        assert!(
            (free.min(1 << 20)..=free).contains(&enough),
            "{what}: {enough}"
        );
        let got = reader.read(VOLUME, &file, 1 << 20).unwrap();
        assert!(got == driver, "{what}");
        assert!(ntfscat(&image, "Windows/System32/viostor.sys") == driver);
        assert!(crate_read(&image, &file) == driver, "{what}");
        let loud = path("WINDOWS/system32/VIOSTOR.SYS");
        let stat = reader.stat(VOLUME, &loud).unwrap().unwrap();
        assert_eq!(stat.name, "viostor.sys");
        assert_eq!((stat.kind, stat.size), (FileKind::File, 300_000));
        let part = reader.read_at(VOLUME, &file, 299_000, 5000).unwrap();
        assert!(part == driver[299_000..], "{what}");
        let small = path("windows/A SMALL FILE.TXT");
        assert_eq!(reader.read(VOLUME, &small, 8).unwrap(), b"resident");
        let names: Vec<_> = reader
            .list(VOLUME, &path("Windows"))
            .unwrap()
            .into_iter()
            .map(|e| (e.name, e.kind))
            .collect();
        assert_eq!(
            names,
            [
                ("System32".to_string(), FileKind::Dir),
                ("a small file.txt".to_string(), FileKind::File)
            ],
            "{what}"
        );
        drop(reader);
        assert!(digest() == before, "{what}: reading changed the image");

        let boot = fs::ntfs(&image.bytes(0, 512)).unwrap();
        assert_eq!((boot.bytes_per_sector, boot.hidden_sectors), (sector, 2048));
    }
}

#[test]
fn free_bytes_agree_with_ntfsinfo() {
    if !ready() {
        return;
    }
    for cluster in [512, 4096] {
        let image = Image::ntfs(33, 512, cluster);
        let text = run("ntfsinfo", &["-m", image.name()]);
        let text = String::from_utf8_lossy(&text).into_owned();
        let line = text.lines().find(|l| l.contains("Free Clusters")).unwrap();
        let free: u64 = line
            .split_whitespace()
            .find_map(|word| word.parse().ok())
            .unwrap();
        let got = image
            .reader()
            .free_bytes(VOLUME, u64::MAX)
            .unwrap()
            .unwrap();
        assert_eq!(got, free * u64::from(cluster));
    }
}

#[test]
fn partition_at_an_offset() {
    if !ready() {
        return;
    }
    let image = Image::ntfs(32, 512, 4096);
    let volume = image.bytes(0, 32 << 20);
    let disk_file = image.dir.path().join("disk.img");
    let mut disk = vec![0xa5; 1 << 20];
    disk.extend(&volume);
    disk.extend([0xa5; 4096]);
    std::fs::write(&disk_file, &disk).unwrap();
    let layout = layout(1 << 20, 32 << 20);
    let rw = Arc::new(FileDisk::open_rw(&disk_file).unwrap());
    let mut writer = Box::new(EmbeddedWriter::new(rw, &layout, MountOptions::default()));
    writer
        .write_file(VOLUME, &path("a.txt"), &[1; 100_000])
        .unwrap();
    writer.close().unwrap();
    let reader = embedded::open(Arc::new(FileDisk::open(&disk_file).unwrap()), &layout).unwrap();
    assert_eq!(
        reader.read(VOLUME, &path("A.TXT"), 1 << 20).unwrap(),
        [1; 100_000]
    );
    let after = std::fs::read(&disk_file).unwrap();
    assert!(after[..1 << 20].iter().all(|b| *b == 0xa5));
    assert!(after[33 << 20..].iter().all(|b| *b == 0xa5));
}

#[test]
fn five_thousand_files() {
    if !ready() {
        return;
    }
    let image = Image::ntfs(64, 512, 4096);
    let mut writer = image.writer();
    let dir = path("Windows");
    writer.create_dir(VOLUME, &dir).unwrap();
    let name = |i: usize| format!("a driver file with a long name {i:05}.inf");
    for i in 0..5000 {
        let file = dir.join(&name(i * 7919 % 5000)).unwrap();
        writer.write_file(VOLUME, &file, b"x").unwrap();
    }
    writer.close().unwrap();
    assert_sound(&image);
    let reader = image.reader();
    let entries = reader.list(VOLUME, &dir).unwrap();
    assert_eq!(entries.len(), 5000);
    assert!(entries.iter().enumerate().all(|(i, e)| e.name == name(i)));
    for i in (0..5000).step_by(97) {
        let file = dir.join(&name(i).to_uppercase()).unwrap();
        let stat = reader.stat(VOLUME, &file).unwrap().unwrap();
        assert_eq!((stat.name, stat.size), (name(i), 1));
    }
    for absent in ["a", "a driver file with a long name 05000.inf", "zzz", "00"] {
        let file = dir.join(absent).unwrap();
        assert_eq!(reader.stat(VOLUME, &file).unwrap(), None);
    }
    let listed = run("ntfsls", &["-f", "-p", "/Windows", image.name()]);
    let listed = String::from_utf8_lossy(&listed).into_owned();
    let listed = listed.lines().filter(|l| l.contains("a driver file"));
    assert_eq!(listed.count(), 5000);
}

#[test]
fn a_hive_is_replaced_in_place_and_patched() {
    if !ready() {
        return;
    }
    let image = Image::ntfs(96, 512, 4096);
    let hive = noise(15 << 20, 1);
    let source = image.host_file("hive", &hive);
    run("ntfscp", &["-f", image.name(), &source, "SYSTEM"]);
    let record = |image: &Image| {
        let text = run("ntfsinfo", &["-F", "SYSTEM", image.name()]);
        let text = String::from_utf8_lossy(&text).into_owned();
        text.lines()
            .find(|l| l.contains("Inode"))
            .map(str::to_string)
    };
    let inode = record(&image);

    let mut changed = noise(14 << 20, 2);
    let mut writer = image.writer();
    let file = path("system");
    writer.write_file(VOLUME, &file, &changed).unwrap();
    let extents = [
        (4096, vec![0x11; 512]),
        (1 << 20, noise(70_000, 3)),
        ((14 << 20) - 5, vec![0x22; 10]),
    ]
    .map(|(offset, data)| Extent { offset, data });
    let size = (14 << 20) + 20_000;
    writer.patch_file(VOLUME, &file, size, &extents).unwrap();
    writer.close().unwrap();

    changed.resize(size as usize, 0);
    for extent in &extents {
        let at = extent.offset as usize;
        changed[at..at + extent.data.len()].copy_from_slice(&extent.data);
    }
    assert!(ntfscat(&image, "SYSTEM") == changed);
    assert!(image.reader().read(VOLUME, &file, size).unwrap() == changed);
    assert!(crate_read(&image, &file)[..14 << 20] == changed[..14 << 20]);
    assert_eq!(record(&image), inode);
    assert!(inode.is_some());
    assert_sound(&image);

    let mut writer = image.writer();
    writer.patch_file(VOLUME, &file, 4096, &[]).unwrap();
    let past = Extent {
        offset: 4090,
        data: vec![0; 7],
    };
    assert!(writer.patch_file(VOLUME, &file, 4096, &[past]).is_err());
    writer.close().unwrap();
    assert!(ntfscat(&image, "SYSTEM") == changed[..4096]);
    let limit = image.reader().read(VOLUME, &file, 4095);
    assert!(matches!(
        limit,
        Err(GuestError::TooLarge { size: 4096, .. })
    ));
}

#[test]
fn new_entries_take_the_security_of_a_sibling() {
    if !ready() {
        return;
    }
    let image = Image::ntfs(32, 512, 4096);
    let mut writer = image.writer();
    writer.create_dir(VOLUME, &path("drivers")).unwrap();
    writer.create_dir(VOLUME, &path("drivers/etc")).unwrap();
    writer
        .write_file(VOLUME, &path("drivers/disk.sys"), b"sibling")
        .unwrap();
    writer.close().unwrap();
    // mkntfs makes descriptors of the old kind; this moves them to $Secure.
    run("ntfssecaudit", &[image.name(), "751", "drivers"]);
    run("ntfssecaudit", &[image.name(), "750", "drivers/etc"]);
    run("ntfssecaudit", &[image.name(), "640", "drivers/disk.sys"]);
    let id = |path: &str| info(&image, path, "Security ID");
    let (dir, file) = (id("drivers/etc"), id("drivers/disk.sys"));
    assert!(dir.is_some() && file.is_some() && dir != file);

    let mut writer = image.writer();
    for name in ["viostor.sys", "a much longer driver name.sys", "UPPER.SYS"] {
        let file = path("drivers").join(name).unwrap();
        writer.write_file(VOLUME, &file, b"new").unwrap();
    }
    writer.create_dir(VOLUME, &path("drivers/new")).unwrap();
    writer
        .create_dir(VOLUME, &path("drivers/new/below"))
        .unwrap();
    writer.close().unwrap();
    assert_eq!(id("drivers/viostor.sys"), file);
    assert_eq!(id("drivers/a much longer driver name.sys"), file);
    assert_eq!(id("drivers/new"), dir);
    // Without a sibling: the descriptor of its parent.
    assert_eq!(id("drivers/new/below"), dir);
    let space = |path: &str| info(&image, path, "Namespace");
    assert_eq!(space("drivers/viostor.sys").as_deref(), Some("Win32 & DOS"));
    assert_eq!(space("drivers/UPPER.SYS").as_deref(), Some("Win32 & DOS"));
    assert_eq!(
        space("drivers/a much longer driver name.sys").as_deref(),
        Some("POSIX")
    );
    let attributes = |path: &str| info(&image, path, "File attributes");
    assert_eq!(
        attributes("drivers/viostor.sys").as_deref(),
        Some("ARCHIVE (0x00000020)")
    );
    assert!(attributes("drivers/new").unwrap().ends_with("(0x00000000)"));
    assert_sound(&image);
}

#[test]
fn old_descriptors_are_copied() {
    if !ready() {
        return;
    }
    let image = Image::ntfs(32, 512, 4096);
    let source = image.host_file("f", b"old");
    run("ntfscp", &["-f", image.name(), &source, "old.txt"]);
    let mut writer = image.writer();
    writer.write_file(VOLUME, &path("new.txt"), b"new").unwrap();
    writer.close().unwrap();
    let descriptor = |path: &str| {
        let text = run("ntfsinfo", &["-F", path, "-v", image.name()]);
        let text = String::from_utf8_lossy(&text).into_owned();
        let from = text.find("$SECURITY_DESCRIPTOR").unwrap();
        let to = text[from..].find("$DATA").unwrap();
        text[from..from + to]
            .lines()
            .filter(|l| !l.contains("instance") && !l.contains("mft record"))
            .collect::<Vec<_>>()
            .join("\n")
    };
    let new = descriptor("new.txt");
    assert!(new.contains("SID"), "{new}");
    assert_eq!(
        new.lines().skip(1).collect::<Vec<_>>(),
        descriptor("old.txt").lines().skip(1).collect::<Vec<_>>()
    );
}

/// Two files grow in turns: every cluster of each is a fragment.
#[test]
fn fragments_in_an_attribute_list() {
    if !ready() {
        return;
    }
    let image = Image::ntfs(32, 512, 512);
    let (a, b) = (path("fragmented"), path("other"));
    let contents = noise(1500 * 512, 5);
    let mut writer = image.writer();
    writer.write_file(VOLUME, &a, &contents[..2048]).unwrap();
    writer.write_file(VOLUME, &b, &[0; 2048]).unwrap();
    for at in (2048..contents.len()).step_by(512) {
        let size = at as u64 + 512;
        let extent = |data: &[u8]| Extent {
            offset: at as u64,
            data: data.to_vec(),
        };
        let part = [extent(&contents[at..at + 512])];
        writer.patch_file(VOLUME, &a, size, &part).unwrap();
        writer
            .patch_file(VOLUME, &b, size, &[extent(&[0xee; 512])])
            .unwrap();
    }
    writer.close().unwrap();
    let text = run("ntfsinfo", &["-F", "fragmented", image.name()]);
    assert!(String::from_utf8_lossy(&text).contains("$ATTRIBUTE_LIST"));
    assert!(ntfscat(&image, "fragmented") == contents);
    let reader = image.reader();
    assert!(reader.read(VOLUME, &a, 1 << 20).unwrap() == contents);
    for at in [0, 511, 2047, 100_000, contents.len() as u64 - 7] {
        let got = reader.read_at(VOLUME, &a, at, 9000).unwrap();
        let end = contents.len().min(at as usize + 9000);
        assert!(got == contents[at as usize..end], "{at}");
    }

    // Written back as one piece it keeps its record, and nothing is lost.
    let mut writer = image.writer();
    writer.write_file(VOLUME, &a, &contents[7..]).unwrap();
    writer.close().unwrap();
    assert!(ntfscat(&image, "fragmented") == contents[7..]);
    assert!(image.reader().read(VOLUME, &a, 1 << 20).unwrap() == contents[7..]);
    assert_sound(&image);
}

#[test]
fn names_kinds_and_errors() {
    if !ready() {
        return;
    }
    let image = Image::ntfs(32, 512, 4096);
    let mut writer = image.writer();
    writer.create_dir(VOLUME, &path("dir")).unwrap();
    writer
        .write_file(VOLUME, &path("dir/Ünïcode äöü.txt"), b"1")
        .unwrap();
    writer.write_file(VOLUME, &path("file"), b"2").unwrap();
    assert!(writer.create_dir(VOLUME, &path("DIR")).is_err());
    assert!(matches!(
        writer.create_dir(VOLUME, &path("none/x")),
        Err(GuestError::NotFound { .. })
    ));
    assert!(matches!(
        writer.write_file(VOLUME, &path("dir"), b""),
        Err(GuestError::WrongKind { .. })
    ));
    assert!(matches!(
        writer.remove_file(VOLUME, &path("dir")),
        Err(GuestError::WrongKind { .. })
    ));
    assert!(matches!(
        writer.remove_dir(VOLUME, &path("file")),
        Err(GuestError::WrongKind { .. })
    ));
    assert!(
        writer.remove_dir(VOLUME, &path("dir")).is_err(),
        "not empty"
    );
    assert!(matches!(
        writer.remove_file(VOLUME, &path("nothing")),
        Err(GuestError::NotFound { .. })
    ));
    let full = writer.write_file(VOLUME, &path("huge"), &vec![1; 40 << 20]);
    assert!(matches!(full, Err(GuestError::NoSpace { .. })), "{full:?}");
    let full = writer.write_file(VOLUME, &path("FILE"), &vec![1; 40 << 20]);
    assert!(matches!(full, Err(GuestError::NoSpace { .. })), "{full:?}");
    assert!(matches!(
        writer.write_file(VolumeId::new(9), &path("x"), b""),
        Err(GuestError::NoVolume(_))
    ));
    writer.close().unwrap();
    assert_sound(&image);

    let reader = image.reader();
    let root: Vec<String> = reader
        .list(VOLUME, &GuestPath::root())
        .unwrap()
        .into_iter()
        .map(|e| e.name)
        .collect();
    assert_eq!(root, ["dir", "file"]);
    assert_eq!(reader.read(VOLUME, &path("file"), 10).unwrap(), b"2");
    assert_eq!(
        reader
            .read(VOLUME, &path("DIR/üNÏCODE ÄÖÜ.TXT"), 10)
            .unwrap(),
        b"1"
    );
    assert!(matches!(
        reader.list(VOLUME, &path("file")),
        Err(GuestError::WrongKind { .. })
    ));
    assert!(matches!(
        reader.read(VOLUME, &path("dir"), 1),
        Err(GuestError::WrongKind { .. })
    ));
    assert!(matches!(
        reader.read(VOLUME, &path("no"), 1),
        Err(GuestError::NotFound { .. })
    ));
    assert_eq!(reader.stat(VOLUME, &path("file/x")).unwrap(), None);
    assert_eq!(reader.read_at(VOLUME, &path("file"), 5, 5).unwrap(), b"");

    // Everything can be removed again.
    let mut writer = image.writer();
    writer
        .remove_file(VOLUME, &path("dir/ünïcode äöü.TXT"))
        .unwrap();
    writer.remove_dir(VOLUME, &path("dir")).unwrap();
    writer.remove_file(VOLUME, &path("FILE")).unwrap();
    writer.close().unwrap();
    let left = image.reader().list(VOLUME, &GuestPath::root()).unwrap();
    assert_eq!(left, []);
    assert_sound(&image);
}

/// A missing close is logged, but the written data is there.
#[test]
fn dropping_the_writer_unmounts() {
    if !ready() {
        return;
    }
    let image = Image::ntfs(32, 512, 4096);
    let mut writer = image.writer();
    writer.write_file(VOLUME, &path("x"), b"kept").unwrap();
    drop(writer);
    assert_eq!(ntfscat(&image, "x"), b"kept");
    assert_sound(&image);
}

/// An MFT record of 1024 bytes with these attributes, protected as on disk.
fn build_record(attributes: &[Vec<u8>]) -> Vec<u8> {
    let mut record = vec![0u8; 56];
    record[..4].copy_from_slice(b"FILE");
    for (at, word) in [(4, 48u16), (6, 3), (16, 1), (18, 1), (20, 56), (22, 1)] {
        record[at..at + 2].copy_from_slice(&word.to_le_bytes());
    }
    for attribute in attributes {
        record.extend(attribute);
    }
    record.extend([0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    let used = record.len() as u32;
    record[24..28].copy_from_slice(&used.to_le_bytes());
    record[28..32].copy_from_slice(&1024u32.to_le_bytes());
    record.resize(1024, 0);
    record[48..50].copy_from_slice(&[7, 0]);
    for (end, word) in [(510, 50), (1022, 52)] {
        record.copy_within(end..end + 2, word);
        record[end..end + 2].copy_from_slice(&[7, 0]);
    }
    record
}

/// The `$MFT` of a long-used volume: its map begins in record 0 and continues in record 15.
#[test]
fn mft_with_an_attribute_list() {
    if !ready() {
        return;
    }
    let image = Image::ntfs(32, 512, 4096);
    let name = |i: usize| path(&format!("file number {i}"));
    let mut writer = image.writer();
    for i in 0..200 {
        writer.write_file(VOLUME, &name(i), &noise(i, 8)).unwrap();
    }
    writer.close().unwrap();

    let boot = fs::ntfs(&image.bytes(0, 512)).unwrap();
    let mft = boot.mft_lcn * 4096;
    let base = MftRecord::parse(image.bytes(mft, 1024)).unwrap();
    let data = base.find(0x80, &[]).unwrap().unwrap();
    let Body::NonResident { size, mapping, .. } = data.body else {
        panic!("$MFT is never resident");
    };
    let mut runs = Vec::new();
    decode_runs(mapping, 0, u64::MAX, &mut runs).unwrap();
    // 32 records stay in the first part.
    let clusters: Vec<(u64, u64)> = runs
        .iter()
        .flat_map(|run| (0..run.clusters).map(|i| (run.vcn + i, run.lcn.unwrap() + i)))
        .collect();
    assert!(clusters.len() > 40);
    let part = |lowest: usize, clusters: &[(u64, u64)]| {
        let mut attribute = vec![0u8; 64];
        let mut previous = 0;
        for (_, lcn) in clusters.chunk_by(|a, b| a.1 + 1 == b.1).map(|c| c[0]) {
            let run = clusters.iter().skip_while(|c| c.1 != lcn);
            let len = run.zip(lcn..).take_while(|(c, l)| c.1 == *l).count() as u32;
            attribute.push(0x44);
            attribute.extend(len.to_le_bytes());
            attribute.extend((lcn as i32 - previous).to_le_bytes());
            previous = lcn as i32;
        }
        attribute.push(0);
        attribute.resize(attribute.len().next_multiple_of(8), 0);
        let len = attribute.len() as u32;
        attribute[..4].copy_from_slice(&0x80u32.to_le_bytes());
        attribute[4..8].copy_from_slice(&len.to_le_bytes());
        attribute[8] = 1;
        attribute[14] = lowest as u8;
        attribute[16] = lowest as u8;
        attribute[32] = 64;
        if lowest == 0 {
            attribute[48..56].copy_from_slice(&size.to_le_bytes());
            attribute[56..64].copy_from_slice(&size.to_le_bytes());
        }
        attribute
    };
    let mut list = vec![0u8; 24];
    for (lowest, record) in [(0u8, 0u8), (8, 15)] {
        let mut entry = [0u8; 32];
        entry[0] = 0x80;
        entry[4] = 32;
        entry[7] = 26;
        entry[8] = lowest;
        entry[16] = record;
        entry[24] = lowest;
        list.extend(entry);
    }
    let len = list.len() as u32;
    list[..4].copy_from_slice(&0x20u32.to_le_bytes());
    list[4..8].copy_from_slice(&len.to_le_bytes());
    list[16..20].copy_from_slice(&(len - 24).to_le_bytes());
    list[20] = 24;
    image.poke(mft, &build_record(&[list, part(0, &clusters[..8])]));
    image.poke(mft + 15 * 1024, &build_record(&[part(8, &clusters[8..])]));

    let reader = image.reader();
    assert_eq!(reader.volumes()[0].state.unreadable, None);
    for i in 0..200 {
        let got = reader.read(VOLUME, &name(i), 1 << 20).unwrap();
        assert!(got == noise(i, 8), "{i}");
    }
}

#[test]
fn free_ranges_and_scratch_files() {
    if !ready() {
        return;
    }
    use crate::guest::spare::Scratch;
    for cluster in [512, 4096, 65536] {
        let image = Image::ntfs(40, 512, cluster);
        let mut writer = image.writer();
        for i in 0..30 {
            let path = GuestPath::parse(&format!("f{i}")).unwrap();
            writer.write_file(VOLUME, &path, &noise(70_001, i)).unwrap();
        }
        for i in (0..30).step_by(3) {
            let path = GuestPath::parse(&format!("f{i}")).unwrap();
            writer.remove_file(VOLUME, &path).unwrap();
        }
        let page = GuestPath::parse("pagefile.sys").unwrap();
        writer
            .write_file(VOLUME, &page, &noise(300_000, 99))
            .unwrap();
        writer.close().unwrap();

        let reader = image.reader();
        let mut ranges = Vec::new();
        let looked = reader
            .free_ranges(VOLUME, &|_| true, &mut |r| {
                ranges.push(r);
                Ok(())
            })
            .unwrap();
        assert!(looked && ranges.len() > 5, "{ranges:?}");
        let total: u64 = ranges.iter().map(|r| r.end - r.start).sum();
        assert_eq!(
            total,
            reader.free_bytes(VOLUME, u64::MAX).unwrap().unwrap(),
            "clusters of {cluster}"
        );
        assert!(ranges.windows(2).all(|w| w[0].end < w[1].start));
        // Ranges without interest are not reported.
        reader
            .free_ranges(VOLUME, &|_| false, &mut |r| panic!("{r:?}"))
            .unwrap();

        let Scratch::Clusters(clusters) = reader.scratch(VOLUME, &page).unwrap() else {
            panic!("the page file has clusters");
        };
        let contents: Vec<u8> = clusters
            .iter()
            .flat_map(|r| image.bytes(r.start, (r.end - r.start) as usize))
            .collect();
        assert!(contents.starts_with(&noise(300_000, 99)));
        let none = GuestPath::parse("swapfile.sys").unwrap();
        assert_eq!(reader.scratch(VOLUME, &none).unwrap(), Scratch::Absent);
        // A crash dump is written to the clusters, past the file system.
        for (magic, kept) in [
            (b"PAGEDU64", true),
            (b"PAGEDUMP", true),
            (b"PAGEFILE", false),
        ] {
            image.poke(clusters[0].start, magic);
            let found = image.reader().scratch(VOLUME, &page).unwrap();
            assert_eq!(matches!(found, Scratch::Kept(_)), kept, "{found:?}");
        }
    }
}

#[test]
fn a_bitmap_that_calls_metadata_free_is_not_believed() {
    if !ready() {
        return;
    }
    let image = Image::ntfs(16, 512, 4096);
    // The location of the map itself, found by its contents: the last free range ends with the
    // volume.
    let volume = crate::guest::ntfs_read::NtfsVolume::open(
        Arc::new(FileDisk::open(&image.file).unwrap()),
        0,
        image.size,
    )
    .unwrap();
    let record = volume.file_record(6).unwrap();
    let stream = volume
        .stream(6, &record, crate::guest::ntfs_record::AT_DATA, &[])
        .unwrap()
        .unwrap();
    let at = stream.runs()[0].lcn.unwrap() * 4096;
    let first = image.bytes(at, 1);
    assert_ne!(first, [0], "the boot sector is in use");
    image.poke(at, &[0]);
    let result = image
        .reader()
        .free_ranges(VOLUME, &|_| true, &mut |r| panic!("{r:?}"));
    assert!(
        matches!(result, Err(GuestError::Unreadable { .. })),
        "{result:?}"
    );
}
