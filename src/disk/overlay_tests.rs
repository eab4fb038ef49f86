use std::path::PathBuf;

use super::*;
use crate::block::BlockWrite;
use crate::disk::chain::Image;
use crate::disk::empty::create_qcow2;
use crate::disk::export::{self, Export};
use crate::disk::testing::{have, pattern, write};
use crate::tool::qemu_img;

/// Writes and zeroes across all kinds of borders.
fn fill(disk: &dyn BlockWrite, size: u64) {
    const CLUSTER: u64 = 64 << 10;
    for (i, (at, len)) in [
        (0, 512),
        (3 * CLUSTER - 100, 700),
        (10 * CLUSTER, 4 * CLUSTER),
        (9 * CLUSTER, CLUSTER),
        (40 * CLUSTER + 4096, 3 * CLUSTER),
        (size - 1024, 1024),
    ]
    .into_iter()
    .enumerate()
    {
        let data = vec![i as u8 + 1; len as usize];
        disk.write_at(at, &data).unwrap();
    }
    for (at, len) in [
        (20 * CLUSTER, 8 * CLUSTER),
        (11 * CLUSTER, CLUSTER),
        (40 * CLUSTER, CLUSTER),
    ] {
        disk.zero_at(at, len).unwrap();
    }
}

struct Written {
    _folder: tempfile::TempDir,
    overlay: PathBuf,
    raw: PathBuf,
    image: Image,
}

fn written(size: u64) -> Written {
    let folder = tempfile::tempdir().unwrap();
    let raw = write(folder.path(), "disk.raw", &pattern(5 << 20));
    let file = File::options().write(true).open(&raw).unwrap();
    file.set_len(size).unwrap();
    let source = Image::open_info(&raw, Some("raw"), &[]).unwrap();
    let overlay = folder.path().join("overlay.qcow2");
    let export = Export::open_overlay(&source, &overlay).unwrap();
    fill(export.disk().as_ref(), size);
    let image = export.image().clone();
    export.close().unwrap();
    Written {
        _folder: folder,
        overlay,
        raw,
        image,
    }
}

fn opened(overlay: &Path, raw: &Path) -> io::Result<Option<Overlay>> {
    Overlay::open(overlay, Arc::new(FileDisk::open(raw)?))
}

/// QEMU verifies plain clusters, and the large ones with subclusters that large disks get.
#[test]
fn reads_what_qemu_reads() {
    if !have(&[qemu_img::TOOL, crate::tool::qsd::TOOL]) {
        return;
    }
    for size in [(6 << 20) + 4096, 300 << 30] {
        let made = written(size);
        let ours = opened(&made.overlay, &made.raw).unwrap();
        let ours = ours.expect("our own overlay is read here");
        let theirs =
            Export::<dyn BlockRead>::open_readonly_for(&made.image, export::DaemonAccess::User);
        let theirs = theirs.unwrap();
        assert!(theirs.daemon_id().is_some(), "QEMU reads for comparison");
        let through = theirs.disk();
        for start in [0, 3 << 20, size - (3 << 20)] {
            // Not on borders, and over several pieces.
            for (skip, len) in [(0, 3 << 20), (511, 200_001), (65_535, 2), (0, 0)] {
                let (mut a, mut b) = (vec![1; len], vec![2; len]);
                ours.read_at(start + skip, &mut a).unwrap();
                through.read_at(start + skip, &mut b).unwrap();
                assert!(a == b, "{size} {start} {skip} {len}");
            }
        }
        assert!(ours.read_at(size - 1, &mut [0; 2]).is_err());
        theirs.close().unwrap();

        let mut data = Vec::new();
        export::plain_data(&made.image, &mut |range| data.push(range))
            .expect("no program is needed")
            .unwrap();
        let mut mapped = Vec::new();
        qemu_img::data_ranges(&made.image.spec(), &mut |range| mapped.push(range)).unwrap();
        // QEMU also sees holes of the overlay's file.
        let parts = |ranges: Vec<Range<u64>>| {
            let whole = |range: Range<u64>| {
                let end = range.end.next_multiple_of(64 << 10);
                range.start >> 16 << 16..end.min(size)
            };
            joined(ranges.into_iter().map(whole).collect())
        };
        assert_eq!(parts(data), parts(mapped), "{size}");
        assert!(export::direct(&made.image).unwrap().is_some());
    }
}

/// Joins ranges that touch.
fn joined(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => all.push(range),
        }
    }
    all
}

/// Overwrites bytes of a file.
fn set(file: &Path, at: u64, value: &[u8]) {
    let file = File::options().write(true).open(file).unwrap();
    file.write_all_at(value, at).unwrap();
}

/// A small handmade overlay with one table: data in the first cluster.
fn by_hand(folder: &Path, name: &str) -> (PathBuf, PathBuf) {
    const CLUSTER: u64 = 64 << 10;
    let overlay = folder.join(name);
    let size = 4 * CLUSTER;
    create_qcow2(&overlay, size).unwrap();
    // The first level is the fourth cluster; its table and one cluster of data follow.
    set(&overlay, 3 * CLUSTER, &(4 * CLUSTER).to_be_bytes());
    set(&overlay, 4 * CLUSTER, &(5 * CLUSTER).to_be_bytes());
    set(&overlay, 5 * CLUSTER, &[7; CLUSTER as usize]);
    let raw = write(folder, &format!("{name}.raw"), &vec![9; size as usize]);
    (overlay, raw)
}

#[test]
fn what_is_not_understood_is_left_to_qemu() {
    const CLUSTER: u64 = 64 << 10;
    let folder = tempfile::tempdir().unwrap();
    let (overlay, raw) = by_hand(folder.path(), "fine");
    let read = opened(&overlay, &raw).unwrap().unwrap();
    let mut bytes = vec![0; 2 * CLUSTER as usize];
    read.read_at(0, &mut bytes).unwrap();
    let (own, below) = bytes.split_at(CLUSTER as usize);
    assert!(own.iter().all(|b| *b == 7) && below.iter().all(|b| *b == 9));

    let table = 4 * CLUSTER;
    let entry = |value: u64| value.to_be_bytes().to_vec();
    let cases: [(&str, u64, Vec<u8>); 14] = [
        ("magic", 0, b"X".to_vec()),
        ("version", 7, vec![2]),
        ("backing", 8, entry(0x200)),
        ("bits", 23, vec![40]),
        ("size", 24, entry(8 * CLUSTER)),
        ("encrypted", 35, vec![1]),
        ("tables", 36, vec![0xff; 4]),
        ("level-1", 40, entry(1 << 40)),
        ("snapshots", 63, vec![1]),
        ("dirty", 79, vec![1]),
        ("table-outside", 3 * CLUSTER, entry(1 << 40)),
        ("compressed", table, entry(COMPRESSED | (5 * CLUSTER))),
        ("cluster-outside", table, entry(6 * CLUSTER)),
        ("crooked", table, entry(5 * CLUSTER + 512)),
    ];
    for (name, at, value) in cases {
        let (overlay, raw) = by_hand(folder.path(), name);
        set(&overlay, at, &value);
        assert!(opened(&overlay, &raw).unwrap().is_none(), "{name}");
    }
    // A cluster of zeroes is not in the file, whatever its entry points to.
    let (overlay, raw) = by_hand(folder.path(), "zeroes");
    set(&overlay, table, &entry(ZERO | (5 * CLUSTER)));
    let read = opened(&overlay, &raw).unwrap().unwrap();
    read.read_at(0, &mut bytes).unwrap();
    assert!(bytes[..CLUSTER as usize].iter().all(|b| *b == 0));
    let empty = folder.path().join("empty");
    std::fs::write(&empty, b"QFI").unwrap();
    assert!(opened(&empty, &raw).unwrap().is_none());
}

/// Any wrong byte in the tables causes neither a panic nor a read outside the disk.
#[test]
fn any_byte_may_be_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let (overlay, raw) = by_hand(folder.path(), "hostile");
    let good = std::fs::read(&overlay).unwrap();
    let level_1 = 3 * 65_536;
    let places = (0..Header::LEN)
        .chain(level_1..level_1 + 16)
        .chain(4 * 65_536..4 * 65_536 + 40);
    let mut bytes = vec![0; 4 * 65_536];
    for at in places {
        for flip in [0x01, 0x80, 0xff] {
            set(&overlay, at as u64, &[good[at] ^ flip]);
            if let Ok(Some(read)) = opened(&overlay, &raw) {
                assert_eq!(read.size(), bytes.len() as u64);
                let _ = read.read_at(0, &mut bytes);
            }
        }
        set(&overlay, at as u64, &good[at..=at]);
    }
}
