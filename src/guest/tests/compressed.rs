//! Compressed files: packed by wimlib and by libntfs-3g, read by hyper2kvm's reader.

use std::sync::Arc;

use super::ntfs::{assert_sound, ntfscat, ready};
use super::*;
use crate::guest::ntfs3g::Ntfs3g;
use crate::guest::wof::{self, Algorithm};
use crate::guest::{GuestError, GuestRead, GuestWrite, fs};

/// Data to compress: code, text, zeroes and noise.
fn mixture() -> Vec<u8> {
    let mut data = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let code = data.len() / 2;
    data = data.split_off(code);
    data.truncate(300_000);
    data.extend(b"the quick brown fox ".repeat(3000));
    data.extend([0; 100_000]);
    data.extend(noise(70_001, 11));
    data
}

fn assert_reads(image: &Image, name: &str, expected: &[u8]) {
    let reader = image.reader();
    let whole = reader.read(VOLUME, &path(name), 1 << 20).unwrap();
    assert!(whole == expected, "{name}");
    for (at, len) in [
        (0, 512),
        (4095, 2),
        (65_530, 70_000),
        (expected.len() - 3, 9),
    ] {
        let part = reader.read_at(VOLUME, &path(name), at as u64, len).unwrap();
        let end = (at + len).min(expected.len());
        assert!(part == expected[at..end], "{name} {at} {len}");
    }
    assert!(matches!(
        reader.read(VOLUME, &path(name), 5000),
        Err(GuestError::TooLarge { .. })
    ));
}

/// The output of wimlib: a WIM resource has the layout of CompactOS' stream.
fn wim_stream(data: &[u8], algorithm: Algorithm) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("in");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("file"), data).unwrap();
    let wim = dir.path().join("out.wim");
    let kind = match algorithm {
        Algorithm::Lzx => "LZX",
        _ => "XPRESS",
    };
    run(
        "wimcapture",
        &[
            folder.to_str().unwrap(),
            wim.to_str().unwrap(),
            &format!("--compress={kind}"),
            &format!("--chunk-size={}", algorithm.chunk_size()),
        ],
    );
    let wim = std::fs::read(wim).unwrap();
    let at = |at: usize| usize::try_from(fs::le64(&wim, at)).unwrap();
    let size = |at_: usize| at(at_) & ((1 << 56) - 1);
    let table = &wim[at(48 + 8)..][..size(48)];
    let base = at(48 + 8);
    let entry = (0..table.len() / 50)
        .map(|i| base + i * 50)
        .find(|entry| wim[entry + 7] & 2 == 0)
        .unwrap();
    assert_eq!(wim[entry + 7] & 4, 4, "not compressed");
    assert_eq!(at(entry + 16), data.len());
    wim[at(entry + 8)..][..size(entry)].to_vec()
}

#[test]
fn wof_files_compressed_by_wimlib() {
    if !ready() || !have(&["wimcapture"]) {
        return;
    }
    let data = mixture();
    let image = Image::ntfs(64, 512, 4096);
    let algorithms = [
        Algorithm::Xpress4K,
        Algorithm::Lzx,
        Algorithm::Xpress8K,
        Algorithm::Xpress16K,
    ];
    let streams = algorithms.map(|a| wim_stream(&data, a));
    let name = |a: Algorithm| path(&format!("{a:?}"));
    let mut writer = image.writer();
    for algorithm in algorithms {
        writer.write_file(VOLUME, &name(algorithm), b"").unwrap();
    }
    writer.close().unwrap();
    let disk = Arc::new(FileDisk::open_rw(&image.file).unwrap());
    let mut volume = Ntfs3g::mount(disk, 0, image.size, MountOptions::default()).unwrap();
    for (algorithm, packed) in algorithms.into_iter().zip(&streams) {
        assert!(packed.len() < data.len() * 3 / 4);
        let point = wof::reparse_point(algorithm);
        volume
            .make_wof(&name(algorithm), packed, data.len() as u64, &point)
            .unwrap();
    }
    volume.unmount().unwrap();
    assert_sound(&image);
    for algorithm in algorithms {
        assert_reads(&image, &format!("{algorithm:?}"), &data);
    }
    // Damage is an error or wrong bytes, never a panic.
    for (algorithm, packed) in algorithms.into_iter().zip(&streams) {
        let chunks = wof::Chunks {
            algorithm,
            size: data.len() as u64,
            packed: packed.len() as u64,
        };
        let (from, len) = chunks.table_part(0).unwrap();
        let (at, len) = chunks.place(0, &packed[from as usize..][..len]).unwrap();
        let chunk = &packed[at as usize..][..len];
        for i in (0..chunk.len()).step_by(37) {
            let mut bad = chunk.to_vec();
            bad[i] ^= 1 << (i % 8);
            let _ = algorithm.unpack(bad, algorithm.chunk_size() as usize);
            let _ = algorithm.unpack(chunk[..i].to_vec(), algorithm.chunk_size() as usize);
        }
    }
}

#[test]
fn lznt1_files_compressed_by_ntfs_3g() {
    if !ready() {
        return;
    }
    let data = mixture();
    for cluster in [512, 4096] {
        let image = Image::ntfs(64, 512, cluster);
        let mut writer = image.writer();
        writer.create_dir(VOLUME, &path("packed")).unwrap();
        writer.close().unwrap();
        let disk = Arc::new(FileDisk::open_rw(&image.file).unwrap());
        let mut volume = Ntfs3g::mount(disk, 0, image.size, MountOptions::default()).unwrap();
        volume.make_lznt1(&path("packed/file"), &data).unwrap();
        volume.unmount().unwrap();
        let reader = image.reader();
        let stat = reader.stat(VOLUME, &path("packed/file")).unwrap().unwrap();
        assert!(stat.compressed);
        assert_reads(&image, "packed/file", &data);
        assert!(ntfscat(&image, "packed/file") == data);
        assert_sound(&image);

        // A new plain file replaces it, because every file written here is plain.
        let mut writer = image.writer();
        let patch = writer.patch_file(VOLUME, &path("packed/file"), 5, &[]);
        assert!(patch.is_err(), "a patch of a compressed file");
        let new = noise(100_000, 3);
        for name in ["packed/file", "packed/new"] {
            writer.write_file(VOLUME, &path(name), &new).unwrap();
        }
        writer.close().unwrap();
        for name in ["packed/file", "packed/new"] {
            let stat = image.reader().stat(VOLUME, &path(name)).unwrap().unwrap();
            assert!(!stat.compressed, "{name}");
            assert!(ntfscat(&image, name) == new);
        }
        assert_eq!(
            image.reader().list(VOLUME, &path("packed")).unwrap().len(),
            2
        );
        let stat = run("ntfsinfo", &["-F", "packed", image.name()]);
        let stat = String::from_utf8(stat).unwrap();
        assert!(stat.contains("COMPRESSED"), "{stat}");
        assert_sound(&image);
    }
}
