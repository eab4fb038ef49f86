use std::path::Path;

use super::*;
use crate::disk::empty::{COUNT_BLOCK, LEVEL_1, create_qcow2};
use crate::disk::qcow2::COPIED;
use crate::disk::testing::{Pair, have, pattern, run};
use crate::testing::noise;
use crate::text::of_path;
use crate::tool::qemu_img;

const GIB: u64 = 1 << 30;

fn open(pair: &Pair) -> Qcow2Writer {
    let writer = Qcow2Writer::open(pair.file(), pair.size).unwrap();
    writer.expect("an image of hyper2kvm's")
}

fn write(pair: &Pair, to: &Qcow2Writer, at: u64, len: usize) {
    pair.write(to, at, &pattern(len));
}

#[test]
fn qemu_reads_what_was_written() {
    if !have(&[qemu_img::TOOL]) {
        return;
    }
    // The second one in more tables than are kept in memory.
    for size in [(6 << 20) + 4096, 200 * GIB] {
        let pair = Pair::new(size, false);
        let writer = open(&pair);
        for (at, len) in [
            (0, 512),
            (3 * CLUSTER - 100, 700),
            (10 * CLUSTER, 4 << 16),
            (9 * CLUSTER, 3 << 16),
            (40 * CLUSTER + 4096, 3 << 16),
            (size - 1024, 1024),
        ] {
            write(&pair, &writer, at, len);
        }
        for at in (GIB..size).step_by(GIB as usize) {
            write(&pair, &writer, at, 5000);
        }
        writer.zero_at(11 * CLUSTER - 5, 3 * CLUSTER).unwrap();
        pair.raw.zero_at(11 * CLUSTER - 5, 3 * CLUSTER).unwrap();
        // Read back before anything is flushed, its unwritten places too.
        let (mut ours, mut raw) = (vec![1; 6 << 20], vec![2; 6 << 20]);
        writer.read_at(0, &mut ours).unwrap();
        pair.raw.read_at(0, &mut raw).unwrap();
        assert!(ours == raw);
        writer.flush().unwrap();
        pair.verify();
        assert!(writer.write_at(size - 1, &[1, 2]).is_err());
        assert!(writer.zero_at(size, 1).is_err());
    }
}

/// Flushed data stays, whatever a kill or a loss of power leaves of the rest.
#[test]
fn an_image_is_continued_after_a_kill() {
    if !have(&[qemu_img::TOOL]) {
        return;
    }
    type Damage = fn(&File);
    let damages: [(&str, Damage); 4] = [
        ("nothing", |_| {}),
        ("counts were not written", |file| {
            let counts = vec![0; 1000];
            file.write_all_at(&counts, COUNT_BLOCK + 8).unwrap();
        }),
        ("the end was not written", |file| {
            let end = file.metadata().unwrap().len();
            file.set_len(end - 3 * CLUSTER - 100).unwrap();
        }),
        (
            "the table of counts names a block that is not there",
            |file| {
                file.write_all_at(&(1u64 << 40).to_be_bytes(), CLUSTER + 8)
                    .unwrap();
            },
        ),
    ];
    for (what, damage) in damages {
        eprintln!("{what}");
        let pair = Pair::new(2 * GIB, false);
        let writer = open(&pair);
        write(&pair, &writer, 0, 1 << 20);
        write(&pair, &writer, GIB, 100_000);
        writer.flush().unwrap();
        // Written and not recorded: its tables get to the file, but no flush ends.
        let lost = [(4 << 20, 3 << 20), (GIB + (1 << 20), 70_000)];
        for (at, len) in lost {
            write(&pair, &writer, at, len);
        }
        writer.lock().write(writer.file.file()).unwrap();
        drop(writer);
        damage(&pair.file());
        let writer = open(&pair);
        for (at, len) in lost {
            write(&pair, &writer, at, len);
        }
        write(&pair, &writer, 1 << 30, 3 << 20);
        writer.flush().unwrap();
        drop(writer);
        // Leaks after a kill would be no errors, but there are none either.
        pair.verify();
    }
}

/// Counts of more than 2 GiB are in a second block.
#[test]
fn a_file_grows_over_the_end_of_a_block_of_counts() {
    if !have(&[qemu_img::TOOL]) {
        return;
    }
    for missing in 0..4 {
        let pair = Pair::new(4 * GIB, false);
        pair.file()
            .set_len(CLUSTER / 2 * CLUSTER - missing * CLUSTER)
            .unwrap();
        let writer = open(&pair);
        write(&pair, &writer, 0, 5 << 16);
        writer.flush().unwrap();
        write(&pair, &writer, GIB, 5 << 16);
        writer.flush().unwrap();
        drop(writer);
        pair.verify();
        // Recounting changes nothing.
        drop(open(&pair));
        pair.verify();
    }
}

#[test]
fn other_images_are_left_to_qemu() {
    if !have(&[qemu_img::TOOL]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.qcow2");
    let text = of_path(&path);
    let opened = |path: &Path| {
        let mut options = File::options();
        let file = options.read(true).write(true).open(path).unwrap();
        Qcow2Writer::open(file, 1 << 20).unwrap().is_some()
    };
    for options in [
        "compat=0.10",
        "cluster_size=4096",
        "lazy_refcounts=on",
        "extended_l2=on",
    ] {
        let create = ["create", "-q", "-f", "qcow2", "-o", options, &text, "1M"];
        run(qemu_img::TOOL, &create);
        assert!(!opened(&path), "{options}");
    }
    // Tables that no writer of this program produces: one cluster twice, a cluster that reads as
    // zeroes.
    for entry in [COPIED | LEVEL_1, COPIED | (5 * CLUSTER) | 1] {
        std::fs::remove_file(&path).unwrap();
        create_qcow2(&path, 1 << 20).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(8 * CLUSTER).unwrap();
        let table = (COPIED | (4 * CLUSTER)).to_be_bytes();
        file.write_all_at(&table, LEVEL_1).unwrap();
        file.write_all_at(&entry.to_be_bytes(), 4 * CLUSTER)
            .unwrap();
        assert!(!opened(&path), "{entry:x}");
    }
    std::fs::write(&path, b"QFI").unwrap();
    assert!(!opened(&path));
}

/// Fails unless the writer and the raw file have the same bytes in that range.
fn same(pair: &Pair, writer: &Qcow2Writer, at: u64, len: usize) {
    let (mut ours, mut raw) = (vec![1; len], vec![2; len]);
    writer.read_at(at, &mut ours).unwrap();
    pair.raw.read_at(at, &mut raw).unwrap();
    assert!(ours == raw, "{len} bytes at {at}");
}

fn zero(pair: &Pair, to: &Qcow2Writer, at: u64, len: u64) {
    to.zero_at(at, len).unwrap();
    pair.raw.zero_at(at, len).unwrap();
}

/// The reference count of a cluster of the file.
fn references(pair: &Pair, cluster: u64) -> u16 {
    let mut count = [0; 2];
    let at = COUNT_BLOCK + cluster * 2;
    pair.file().read_exact_at(&mut count, at).unwrap();
    u16::from_be_bytes(count)
}

#[test]
fn clusters_of_one_byte_share_a_few_bytes() {
    const LEN: usize = CLUSTER as usize;
    let pair = Pair::new(16 << 20, false);
    let writer = open(&pair);
    let length = || pair.file().metadata().unwrap().len() / CLUSTER;
    // After the first level: one of FF, and a second level.
    pair.write(&writer, 0, &[0xff; 40 * LEN]);
    writer.flush().unwrap();
    assert_eq!((length(), references(&pair, 4)), (6, 40));
    // Part of a cluster is not shared, and neither is one with another byte in it.
    let mut other = [0xff; LEN];
    other[LEN - 1] = 0xfe;
    pair.write(&writer, 60 * CLUSTER, &[0xff; LEN - 512]);
    pair.write(&writer, 61 * CLUSTER, &other);
    // After a flush, and for another byte, there is another cluster.
    pair.write(&writer, 62 * CLUSTER, &[0xff; 2 * LEN]);
    pair.write(&writer, 64 * CLUSTER, &[0xaa; LEN]);
    writer.flush().unwrap();
    assert_eq!(length(), 10);
    let counts = [6, 7, 8, 9].map(|cluster| references(&pair, cluster));
    assert_eq!(counts, [1, 1, 2, 1]);
    // What is written over them takes a place, and the rest of its cluster stays.
    pair.write(&writer, CLUSTER + 512, &[1; 512]);
    pair.write(&writer, 2 * CLUSTER, &other);
    zero(&pair, &writer, 3 * CLUSTER + 4096, 8192);
    zero(&pair, &writer, 5 * CLUSTER, 4 * CLUSTER);
    pair.write(&writer, 39 * CLUSTER, &[0xaa; LEN]);
    same(&pair, &writer, 0, 16 << 20);
    writer.flush().unwrap();
    assert_eq!(references(&pair, 4), 40 - 3 - 4 - 1);
    // What has a place keeps it.
    let before = length();
    pair.write(&writer, 2 * CLUSTER, &[0xff; LEN]);
    writer.flush().unwrap();
    assert_eq!(length(), before);
    drop(writer);
    let again = open(&pair);
    same(&pair, &again, 0, 16 << 20);
    assert_eq!(references(&pair, 4), 40 - 3 - 4 - 1);
    drop(again);
    if have(&[qemu_img::TOOL]) {
        pair.verify();
    }
}

/// A guest writes over all but one of the clusters that share their data, and then over that one.
#[test]
fn qemu_gives_a_cluster_of_one_byte_its_own_place_when_it_is_written() {
    if !have(&[qemu_img::TOOL, "qemu-io"]) {
        return;
    }
    let pair = Pair::new(16 << 20, false);
    let writer = open(&pair);
    pair.write(&writer, 0, &[0xff; 10 << 16]);
    writer.flush().unwrap();
    drop(writer);
    let image = pair.path("x.qcow2");
    for clusters in [0..9, 9..10] {
        let starts = clusters.map(|cluster| cluster * CLUSTER + 4096);
        let commands = starts.clone().map(|at| format!("write -P 7 {at} 512"));
        let commands: Vec<_> = commands.collect();
        let mut args = vec!["-f", "qcow2"];
        for command in &commands {
            args.extend(["-c", command]);
        }
        run(
            "qemu-io",
            &[&args[..], &[of_path(&image).as_ref()]].concat(),
        );
        for at in starts {
            pair.raw.write_at(at, &[7; 512]).unwrap();
        }
        pair.verify();
    }
}

/// A count has 16 bits.
#[test]
fn a_cluster_has_as_many_references_as_can_be_counted() {
    let pair = Pair::new(8 << 30, false);
    let writer = open(&pair);
    let clusters = (4 << 30) / CLUSTER + 128;
    for cluster in 0..clusters {
        let filled = writer.lock().fill(writer.file.file(), cluster, 0xff);
        assert!(filled.unwrap());
    }
    writer.flush().unwrap();
    // The second levels are in between.
    let counts: Vec<u16> = (4..20).map(|at| references(&pair, at)).collect();
    let all: u64 = counts.iter().map(|count| u64::from(*count)).sum();
    assert!(counts.contains(&u16::MAX), "{counts:?}");
    let tables = (4 << 30) / PER_ENTRY + 1;
    assert_eq!(all, clusters + tables, "{counts:?}");
}

/// Whatever is written, zeroed, flushed, and lost by a kill.
#[test]
fn any_order_of_writes_gives_the_same_bytes() {
    const CLUSTERS: u64 = 24;
    for seed in 1..30 {
        let pair = Pair::new(CLUSTERS * CLUSTER - 1024, false);
        let mut numbers = noise(4000, seed).into_iter();
        let mut next = |below: u64| {
            let two = [numbers.next().unwrap(), numbers.next().unwrap()];
            u64::from(u16::from_le_bytes(two)) % below
        };
        let mut writer = open(&pair);
        let mut lost: Vec<(u64, u64)> = Vec::new();
        for step in 0..60 {
            let unit = [CLUSTER, CLUSTER, 4096, 512][next(4) as usize];
            let at = next(pair.size / unit) * unit;
            let len = ((next(6) + 1) * unit).min(pair.size - at);
            let bytes = match next(4) {
                0 => noise(len as usize, seed * 100 + step + 1),
                1 => vec![0xff; len as usize],
                _ => vec![next(3) as u8 + 1; len as usize],
            };
            match next(10) {
                0 | 1 => zero(&pair, &writer, at, len),
                _ => pair.write(&writer, at, &bytes),
            }
            lost.push((at, len));
            match next(8) {
                0 | 1 => {
                    writer.flush().unwrap();
                    lost.clear();
                }
                2 => {
                    // A kill, which may leave tables without their counts.
                    if next(2) == 0 {
                        writer.lock().write(writer.file.file()).unwrap();
                    }
                    drop(writer);
                    writer = open(&pair);
                    for &(at, len) in &lost {
                        let mut bytes = vec![0; len as usize];
                        pair.raw.read_at(at, &mut bytes).unwrap();
                        writer.write_at(at, &bytes).unwrap();
                    }
                }
                _ => {}
            }
            same(&pair, &writer, at, len as usize);
        }
        same(&pair, &writer, 0, pair.size as usize);
        writer.flush().unwrap();
        drop(writer);
        same(&pair, &open(&pair), 0, pair.size as usize);
        if have(&[qemu_img::TOOL]) {
            pair.verify();
        }
    }
}

/// Data that a loss of power took, before its range was recorded.
#[test]
fn a_cluster_of_one_byte_may_be_lost() {
    let pair = Pair::new(8 << 20, false);
    let writer = open(&pair);
    pair.write(&writer, 0, &[0xff; 2 << 16]);
    writer.flush().unwrap();
    pair.write(&writer, 2 << 16, &[0xaa; 3 << 16]);
    writer.flush().unwrap();
    drop(writer);
    let length = pair.file().metadata().unwrap().len();
    for cut in [false, true] {
        match cut {
            false => pair
                .file()
                .write_all_at(&[0; 512], length - CLUSTER)
                .unwrap(),
            true => pair.file().set_len(length - CLUSTER).unwrap(),
        }
        let writer = open(&pair);
        zero(&pair, &writer, 2 << 16, 3 << 16);
        same(&pair, &writer, 0, 8 << 20);
        pair.write(&writer, (2 << 16) + 512, &[3; 512]);
        pair.write(&writer, 3 << 16, &[0xaa; 2 << 16]);
        writer.flush().unwrap();
        same(&pair, &writer, 0, 8 << 20);
        drop(writer);
        if have(&[qemu_img::TOOL]) {
            pair.verify();
        }
        zero(&pair, &open(&pair), (2 << 16) + 512, 512);
    }
}

#[test]
fn an_image_with_other_compressed_data_is_left_to_qemu() {
    let pair = Pair::new(8 << 20, false);
    let writer = open(&pair);
    pair.write(&writer, 0, &[0xff; 2 << 16]);
    writer.flush().unwrap();
    drop(writer);
    let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut deflate, &[[1; 1 << 15], [2; 1 << 15]].concat()).unwrap();
    pair.file()
        .write_all_at(&deflate.finish().unwrap(), 5 * CLUSTER)
        .unwrap();
    assert!(Qcow2Writer::open(pair.file(), pair.size).unwrap().is_none());
}
