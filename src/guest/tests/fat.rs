//! FAT, verified by `fsck.fat` and mtools.

use super::*;
use crate::guest::{Extent, FileKind, FsKind, GuestError, GuestRead, GuestWrite, fs};

const TOOLS: &[&str] = &["mkfs.fat", "fsck.fat", "mcopy", "mdir"];

fn fat(mib: u64, args: &[&str]) -> Image {
    let image = Image::empty(mib << 20);
    let mut all = vec!["-n", "SYSTEM"];
    all.extend(args);
    all.push(image.name());
    run("mkfs.fat", &all);
    image
}

fn mcopy(image: &Image, path: &str) -> Vec<u8> {
    let to = image.dir.path().join("copied");
    let from = format!("::{path}");
    run(
        "mcopy",
        &["-n", "-o", "-i", image.name(), &from, to.to_str().unwrap()],
    );
    std::fs::read(to).unwrap()
}

fn assert_sound(image: &Image) {
    run("fsck.fat", &["-n", image.name()]);
}

#[test]
fn every_width_and_sector_size() {
    if !have(TOOLS) {
        return;
    }
    let cases: &[(u64, &[&str], fs::FatWidth)] = &[
        (8, &["-F", "12"], fs::FatWidth::Fat12),
        (32, &["-F", "16", "-s", "2"], fs::FatWidth::Fat16),
        (100, &["-F", "32", "-s", "1"], fs::FatWidth::Fat32),
        (
            33,
            &["-F", "16", "-S", "4096", "-s", "1"],
            fs::FatWidth::Fat16,
        ),
    ];
    for (mib, args, width) in cases {
        let image = fat(*mib, args);
        let facts = fs::fat(&image.bytes(0, 512)).unwrap();
        assert_eq!(facts.label.as_deref(), Some("SYSTEM"), "{args:?}");
        assert_eq!(facts.width, *width, "{args:?}");
        let mut writer = image.writer();
        let dir = path("EFI/Microsoft/Boot");
        for dir in ["EFI", "EFI/Microsoft", "EFI/Microsoft/Boot"] {
            writer.create_dir(VOLUME, &path(dir)).unwrap();
        }
        let bcd = dir.join("BCD").unwrap();
        let long = dir.join("a long file name.efi").unwrap();
        let mut contents = noise(70_000, 3);
        writer.write_file(VOLUME, &bcd, &contents).unwrap();
        writer.write_file(VOLUME, &long, b"long").unwrap();
        writer.close().unwrap();
        assert_sound(&image);
        assert!(mcopy(&image, "/EFI/Microsoft/Boot/BCD") == contents);

        let before = image.digest();
        let reader = image.reader();
        let volume = &reader.volumes()[0];
        assert_eq!(volume.kind, FsKind::Fat);
        assert_eq!(volume.label.as_deref(), Some("SYSTEM"));
        assert!(reader.free_bytes(VOLUME, u64::MAX).unwrap().unwrap() > 0);
        let loud = path("efi/microsoft/boot/bcd");
        assert!(reader.read(VOLUME, &loud, 1 << 20).unwrap() == contents);
        let part = reader.read_at(VOLUME, &loud, 65_000, 9000).unwrap();
        assert!(part == contents[65_000..]);
        let stat = reader.stat(VOLUME, &loud).unwrap().unwrap();
        assert_eq!((stat.name.as_str(), stat.size), ("BCD", 70_000));
        let names: Vec<_> = reader
            .list(VOLUME, &dir)
            .unwrap()
            .into_iter()
            .map(|e| (e.name, e.kind))
            .collect();
        assert_eq!(
            names,
            [
                ("BCD".to_string(), FileKind::File),
                ("a long file name.efi".to_string(), FileKind::File)
            ]
        );
        assert_eq!(reader.list(VOLUME, &GuestPath::root()).unwrap().len(), 1);
        drop(reader);
        assert!(image.digest() == before, "reading changed the image");

        let mut writer = image.writer();
        let extents = [
            Extent {
                offset: 10,
                data: vec![1; 600],
            },
            Extent {
                offset: 89_999,
                data: vec![2],
            },
        ];
        writer.patch_file(VOLUME, &loud, 90_000, &extents).unwrap();
        writer.write_file(VOLUME, &long, &[]).unwrap();
        writer.close().unwrap();
        contents.resize(90_000, 0);
        contents[10..610].fill(1);
        contents[89_999] = 2;
        assert_sound(&image);
        assert!(mcopy(&image, "/EFI/Microsoft/Boot/BCD") == contents);

        let mut writer = image.writer();
        writer.write_file(VOLUME, &bcd, &contents[..100]).unwrap();
        assert!(matches!(
            writer.create_dir(VOLUME, &path("efi")),
            Err(GuestError::Op { .. })
        ));
        assert!(writer.remove_dir(VOLUME, &dir).is_err(), "not empty");
        assert!(matches!(
            writer.patch_file(VOLUME, &path("EFI/none"), 1, &[]),
            Err(GuestError::NotFound { .. })
        ));
        let full = writer.write_file(VOLUME, &bcd, &vec![0; (*mib as usize) << 20]);
        assert!(matches!(full, Err(GuestError::NoSpace { .. })), "{full:?}");
        writer.remove_file(VOLUME, &long).unwrap();
        writer.close().unwrap();
        assert_sound(&image);
        assert!(mcopy(&image, "/EFI/Microsoft/Boot/BCD") == contents[..100]);
        let mut writer = image.writer();
        writer.remove_file(VOLUME, &bcd).unwrap();
        writer.remove_dir(VOLUME, &dir).unwrap();
        writer.close().unwrap();
        assert_sound(&image);
    }
}

#[test]
fn a_cyclic_chain_ends() {
    if !have(TOOLS) {
        return;
    }
    let image = fat(32, &["-F", "16", "-s", "1"]);
    let mut writer = image.writer();
    writer.create_dir(VOLUME, &path("EFI")).unwrap();
    for i in 0..15 {
        // 16 entries of a sector: "." and "..", then short names only.
        let file = path("EFI").join(&format!("F{i:02}")).unwrap();
        writer.write_file(VOLUME, &file, b"").unwrap();
    }
    writer.close().unwrap();
    // Every cluster of the table leads to cluster 2, so the directory leads to itself.
    let boot = image.bytes(0, 512);
    let table = u64::from(fs::le16(&boot, 14)) * 512;
    image.poke(table + 4, &[2, 0].repeat(8));
    let reader = image.reader();
    let listed = reader.list(VOLUME, &path("EFI"));
    assert!(matches!(listed, Err(GuestError::Unreadable { .. })));
    assert!(reader.stat(VOLUME, &path("EFI/none")).is_err());
}

#[test]
fn free_ranges() {
    if !have(TOOLS) {
        return;
    }
    let cases: &[(u64, &[&str])] = &[
        (32, &["-F", "16", "-s", "2"]),
        (100, &["-F", "32", "-s", "1"]),
        (33, &["-F", "16", "-S", "4096", "-s", "1"]),
    ];
    for (mib, args) in cases {
        let image = fat(*mib, args);
        let mut writer = image.writer();
        for i in 0..9 {
            let file = path(&format!("f{i}"));
            writer.write_file(VOLUME, &file, &noise(70_001, i)).unwrap();
        }
        for i in (0..9).step_by(3) {
            writer.remove_file(VOLUME, &path(&format!("f{i}"))).unwrap();
        }
        writer.close().unwrap();
        let reader = image.reader();
        let mut ranges = Vec::new();
        let mut find = |r| {
            ranges.push(r);
            Ok(())
        };
        assert!(reader.free_ranges(VOLUME, &|_| true, &mut find).unwrap());
        let total: u64 = ranges.iter().map(|r| r.end - r.start).sum();
        assert_eq!(
            total,
            reader.free_bytes(VOLUME, u64::MAX).unwrap().unwrap(),
            "{args:?}"
        );
        assert!(ranges.len() > 2 && ranges.windows(2).all(|w| w[0].end < w[1].start));
        // No remaining file is in them.
        for r in &ranges {
            image.poke(r.start, &vec![0; (r.end - r.start) as usize]);
        }
        assert_sound(&image);
        for i in (0..9).filter(|i| i % 3 != 0) {
            let name = format!("f{i}");
            assert_eq!(mcopy(&image, &name), noise(70_001, i), "{args:?} {name}");
        }
    }
    let mut none = |r| panic!("{r:?}");
    let tiny = fat(8, &["-F", "12"]);
    assert!(
        !tiny
            .reader()
            .free_ranges(VOLUME, &|_| true, &mut none)
            .unwrap()
    );
    // The "was unmounted cleanly" bit of entry 1.
    let dirty = fat(32, &["-F", "16", "-s", "2"]);
    let table = u64::from(fs::le16(&dirty.bytes(0, 512), 14)) * 512;
    dirty.poke(table + 3, &[0x7f]);
    let result = dirty.reader().free_ranges(VOLUME, &|_| true, &mut none);
    assert!(result.is_err(), "{result:?}");
}
