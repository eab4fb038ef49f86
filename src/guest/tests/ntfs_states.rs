//! NTFS volumes and files in special states: dirty, hibernated, compressed, encrypted.

use super::ntfs::*;
use super::*;
use crate::guest::ntfs3g::Ntfs3g;
use crate::guest::wof::{self, Algorithm};
use crate::guest::{Extent, GuestError, GuestRead, GuestWrite, IO_REPARSE_TAG_WOF, fs, logfile};

/// The offset of a resident attribute or of its header in an MFT record on the volume.
fn attribute_at(image: &Image, record: u64, kind: u32) -> u64 {
    let boot = fs::ntfs(&image.bytes(0, 512)).unwrap();
    let size = u64::from(boot.record_size);
    let start = boot.mft_lcn * u64::from(boot.cluster_size) + record * size;
    let bytes = image.bytes(start, size as usize);
    let mut at = usize::from(fs::le16(&bytes, 20));
    loop {
        let (found, len) = (fs::le32(&bytes, at), fs::le32(&bytes, at + 4));
        assert!(found <= kind && len > 0, "no such attribute");
        if found == kind {
            return start + at as u64;
        }
        at += len as usize;
    }
}

fn record_of(image: &Image, path: &str) -> u64 {
    let text = run("ntfsinfo", &["-F", path, image.name()]);
    let text = String::from_utf8_lossy(&text).into_owned();
    let line = text.lines().find(|l| l.contains("mft record")).unwrap();
    let word = line.split("mft record ").nth(1).unwrap();
    word.split_whitespace().next().unwrap().parse().unwrap()
}

fn unsafe_reason(image: &Image) -> String {
    let before = image.digest();
    let mut writer = image.writer();
    let result = writer.write_file(VOLUME, &path("x"), b"x");
    writer.close().unwrap();
    assert!(image.digest() == before, "a refusal changed the volume");
    match result {
        Err(GuestError::Unsafe { reason }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn dirty_volumes_are_refused() {
    if !ready() {
        return;
    }
    // The flag in $Volume.
    let image = Image::ntfs(32, 512, 4096);
    let flags = attribute_at(&image, 3, 0x70) + 24 + 10;
    image.poke(flags, &[1]);
    assert!(image.reader().volumes()[0].state.dirty);
    assert!(unsafe_reason(&image).contains("marked dirty"));

    // The log, by its restart pages.
    for (version, flags, reason) in [
        ((1, 1), 0, "not clean"),
        ((2, 0), 2, "Fast Startup"),
        ((9, 9), 2, "damaged"),
    ] {
        let image = Image::ntfs(32, 512, 4096);
        let mut log = logfile::restart_page(5, version, 0, flags);
        log.extend(logfile::restart_page(5, version, 0, flags));
        let mut writer = image.writer();
        let data = Extent {
            offset: 0,
            data: log,
        };
        let size = image.reader();
        let size = size.stat(VOLUME, &path("$LogFile")).unwrap().unwrap().size;
        writer
            .patch_file(VOLUME, &path("$LogFile"), size, &[data])
            .unwrap();
        writer.close().unwrap();
        assert!(image.reader().volumes()[0].state.dirty, "{reason}");
        let got = unsafe_reason(&image);
        assert!(got.contains(reason), "{got}");
        // The library agrees.
        let disk = Arc::new(FileDisk::open_rw(&image.file).unwrap());
        let mounted = Ntfs3g::mount(disk.clone(), 0, image.size, MountOptions::default());
        assert!(matches!(mounted, Err(GuestError::Unsafe { .. })));
        let force = MountOptions { force_dirty: true };
        let mut writer = Box::new(EmbeddedWriter::new(disk, &image.layout(), force));
        let forced = writer.write_file(VOLUME, &path("x"), b"x");
        writer.close().unwrap();
        // Metadata that Windows keeps in memory cannot be discarded.
        assert_eq!(forced.is_ok(), version != (2, 0), "{reason}: {forced:?}");
    }
}

#[test]
fn hibernation_and_shadow_copies() {
    if !ready() {
        return;
    }
    for (magic, hibernated) in [
        (b"hibr", true),
        (b"HIBR", true),
        (b"wake", false),
        (b"\0\0\0\0", false),
    ] {
        let image = Image::ntfs(32, 512, 4096);
        let mut contents = vec![0; 8192];
        contents[..4].copy_from_slice(magic);
        let mut writer = image.writer();
        writer
            .write_file(VOLUME, &path("hiberfil.sys"), &contents)
            .unwrap();
        writer.close().unwrap();
        let state = image.reader().volumes()[0].state.clone();
        assert_eq!(state.hibernated, hibernated, "{magic:?}");
        assert!(!state.dirty && !state.vss_snapshots);
        if hibernated {
            assert!(unsafe_reason(&image).contains("hibernated"));
        } else {
            let mut writer = image.writer();
            writer.write_file(VOLUME, &path("x"), b"x").unwrap();
            writer.close().unwrap();
        }
    }
    let image = Image::ntfs(32, 512, 4096);
    let mut writer = image.writer();
    let dir = path("System Volume Information");
    writer.create_dir(VOLUME, &dir).unwrap();
    let only = dir.join("{3808876b-c176-4e48-b7ae-04046e6cc752}").unwrap();
    writer.write_file(VOLUME, &only, b"").unwrap();
    writer.close().unwrap();
    assert!(!image.reader().volumes()[0].state.vss_snapshots);
    let mut writer = image.writer();
    let store = dir
        .join("{5de50b2c-0000-0000-0000-000000000000}{3808876B-C176-4e48-b7ae-04046e6cc752}")
        .unwrap();
    writer.write_file(VOLUME, &store, b"").unwrap();
    writer.close().unwrap();
    assert!(image.reader().volumes()[0].state.vss_snapshots);
}

#[test]
fn wof_files_are_named_and_replaced_whole() {
    if !ready() {
        return;
    }
    let image = Image::ntfs(32, 512, 4096);
    let mut writer = image.writer();
    for name in ["wof.dll", "link"] {
        writer.write_file(VOLUME, &path(name), &[7; 5000]).unwrap();
    }
    writer.close().unwrap();
    let disk = Arc::new(FileDisk::open_rw(&image.file).unwrap());
    let mut volume = Ntfs3g::mount(disk, 0, image.size, MountOptions::default()).unwrap();
    let point = wof::reparse_point(Algorithm::Xpress4K);
    volume
        .make_wof(&path("wof.dll"), &noise(9000, 4), 70_000, &point)
        .unwrap();
    let mut point = 0xa000_000cu32.to_le_bytes().to_vec();
    point.extend([0; 20]);
    point[4] = 16;
    volume.make_wof(&path("link"), b"", 5000, &point).unwrap();
    volume.unmount().unwrap();

    let reader = image.reader();
    let stat = reader.stat(VOLUME, &path("wof.dll")).unwrap().unwrap();
    assert_eq!(stat.reparse_tag, Some(IO_REPARSE_TAG_WOF));
    assert_eq!(stat.size, 70_000);
    let listed = reader.list(VOLUME, &GuestPath::root()).unwrap();
    let listed = listed.iter().find(|e| e.name == "wof.dll").unwrap();
    assert_eq!(listed.reparse_tag, Some(IO_REPARSE_TAG_WOF));
    match reader.read(VOLUME, &path("wof.dll"), 1 << 20) {
        Err(GuestError::Unreadable { reason, .. }) => {
            assert!(reason.contains("CompactOS"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    assert!(reader.read_at(VOLUME, &path("link"), 0, 10).is_err());

    let mut writer = image.writer();
    let extents = [Extent {
        offset: 0,
        data: vec![1],
    }];
    let patched = writer.patch_file(VOLUME, &path("wof.dll"), 70_000, &extents);
    assert!(patched.is_err(), "a patch of a WOF file");
    assert!(writer.write_file(VOLUME, &path("link"), b"no").is_err());
    let plain = noise(66_000, 9);
    writer.write_file(VOLUME, &path("wof.dll"), &plain).unwrap();
    writer.close().unwrap();
    let reader = image.reader();
    let stat = reader.stat(VOLUME, &path("wof.dll")).unwrap().unwrap();
    assert_eq!((stat.reparse_tag, stat.size), (None, 66_000));
    assert!(reader.read(VOLUME, &path("wof.dll"), 1 << 20).unwrap() == plain);
    assert!(ntfscat(&image, "wof.dll") == plain);
    let text = run("ntfsinfo", &["-F", "wof.dll", image.name()]);
    let text = String::from_utf8_lossy(&text).into_owned();
    for gone in ["REPARSE", "WofCompressedData", "SPARSE"] {
        assert!(!text.contains(gone), "{gone}: {text}");
    }
    assert_sound(&image);
}

#[test]
fn compressed_encrypted_sparse_and_uninitialized_data() {
    if !ready() {
        return;
    }
    let image = Image::ntfs(32, 512, 4096);
    let mut writer = image.writer();
    for name in ["lzx", "efs", "valid"] {
        let file = path(name);
        writer.write_file(VOLUME, &file, &[0x5a; 40_000]).unwrap();
    }
    writer.close().unwrap();
    for (name, flag) in [("lzx", 0x0001u16), ("efs", 0x4000)] {
        let at = attribute_at(&image, record_of(&image, name), 0x80);
        image.poke(at + 12, &flag.to_le_bytes());
    }
    // Windows leaves clusters behind the valid length unchanged.
    let at = attribute_at(&image, record_of(&image, "valid"), 0x80);
    image.poke(at + 56, &10_000u64.to_le_bytes());

    let reader = image.reader();
    for (name, what) in [("lzx", "LZNT1"), ("efs", "EFS")] {
        let stat = reader.stat(VOLUME, &path(name)).unwrap().unwrap();
        assert_eq!(stat.compressed, name == "lzx");
        assert_eq!(stat.encrypted, name == "efs");
        match reader.read(VOLUME, &path(name), 1 << 20) {
            Err(GuestError::Unreadable { reason, .. }) => assert!(reason.contains(what)),
            other => panic!("{other:?}"),
        }
    }
    let mut expected = vec![0x5a; 10_000];
    expected.resize(40_000, 0);
    assert!(reader.read(VOLUME, &path("valid"), 1 << 20).unwrap() == expected);
    let tail = reader.read_at(VOLUME, &path("valid"), 9_990, 20).unwrap();
    assert_eq!(tail, expected[9_990..10_010]);
    assert!(ntfscat(&image, "valid") == expected);
}
