use std::os::unix::fs::FileExt;

use super::*;
use crate::disk::empty::{COUNT_BLOCK, LEVEL_1, write_qcow2};
use crate::disk::testing::{Pair, have, pattern};
use crate::testing::noise;
use crate::tool::qemu_img;

const GIB: u64 = 1 << 30;

fn open(pair: &Pair, kept: &Extents) -> PackedWriter {
    let writer = PackedWriter::open(pair.file(), pair.size, kept).unwrap();
    writer.expect("an image of hyper2kvm's")
}

/// Fails unless the image has the same bytes as the raw file in that range.
fn same(pair: &Pair, writer: &PackedWriter, at: u64, len: usize) {
    let (mut ours, mut raw) = (vec![1; len], vec![2; len]);
    writer.read_at(at, &mut ours).unwrap();
    pair.raw.read_at(at, &mut raw).unwrap();
    assert!(ours == raw, "{at}");
}

/// Clusters of every kind: text, noise, one byte, and a little noise before zeroes.
fn mixed(clusters: usize, seed: u64) -> Vec<u8> {
    let kinds = (0..clusters).map(|i| match (i as u64 * 7 + seed) % 5 {
        0 | 1 => format!("{seed} {i} ").into_bytes().repeat(CLUSTER_LEN)[..CLUSTER_LEN].to_vec(),
        2 => noise(CLUSTER_LEN, seed + i as u64 + 1),
        3 => vec![(i + 1) as u8; CLUSTER_LEN],
        _ => [noise(20_000, seed + 9), vec![0; CLUSTER_LEN - 20_000]].concat(),
    });
    kinds.collect::<Vec<_>>().concat()
}

#[test]
fn an_entry_tells_where_compressed_data_is() {
    for (at, len, entry) in [
        // Within a sector, to its end, and a byte further.
        (0x5_0000, 1, 0x4000_0000_0005_0000),
        (0x5_0000, 512, 0x4000_0000_0005_0000),
        (0x5_0000, 513, 0x4040_0000_0005_0000),
        (0x5_01ff, 2, 0x4040_0000_0005_01ff),
        (0x5_0010, 0xffff, 0x6000_0000_0005_0010),
        (0x12_3456_789a, 20, 0x4000_0012_3456_789a),
    ] {
        assert_eq!(
            Packed { at, len }.entry(CLUSTER_BITS),
            entry,
            "{at:x} {len}"
        );
        let read = packed(entry).unwrap();
        let end = (at + len).next_multiple_of(512);
        assert_eq!((read.at, read.at + read.len), (at, end));
    }
    for other in [0, COPIED | 0x5_0000, COPIED | 0x4000_0000_0005_0000] {
        assert_eq!(packed(other), None, "{other:x}");
    }
}

#[test]
fn what_was_packed_is_read_back() {
    let pair = Pair::new((9 << 20) + 4096, true);
    let writer = open(&pair, &Extents::default());
    for (at, clusters) in [(3, 20), (0, 3), (40, 1), (41, 64)] {
        pair.write(&writer, at * CLUSTER, &mixed(clusters, at));
        writer.flush().unwrap();
    }
    pair.write(&writer, 9 << 20, &pattern(4096));
    // Before the flush too, over the borders of clusters, and where nothing was written.
    same(&pair, &writer, 0, pair.size as usize);
    same(&pair, &writer, 3 * CLUSTER - 5, 200_000);
    assert!(writer.read_at(pair.size - 1, &mut [0; 2]).is_err());
    for (at, len) in [
        (0, CLUSTER_LEN),
        (2 * CLUSTER, 3 * CLUSTER_LEN),
        (30 * CLUSTER, 100),
        (30 * CLUSTER + 512, CLUSTER_LEN),
        (pair.size, 512),
    ] {
        assert!(writer.write_at(at, &vec![1; len]).is_err(), "{at} {len}");
    }
    writer.zero_at(30 * CLUSTER, 5 * CLUSTER).unwrap();
    assert!(writer.zero_at(30 * CLUSTER, 20 * CLUSTER).is_err());
    writer.flush().unwrap();
    same(&pair, &writer, 0, pair.size as usize);
}

#[test]
fn qemu_reads_what_was_packed() {
    if !have(&[qemu_img::TOOL]) || !qemu_img::has_zstd() {
        return;
    }
    // The second one in more tables than are kept in memory.
    for size in [(30 << 20) + 4096, 200 * GIB] {
        let pair = Pair::new(size, true);
        let writer = open(&pair, &Extents::default());
        std::thread::scope(|scope| {
            for worker in 0..3 {
                let (pair, writer) = (&pair, &writer);
                scope.spawn(move || {
                    for piece in (worker..7).step_by(3) {
                        let clusters = [64, 1, 30, 64, 17, 64, 2][piece as usize];
                        pair.write(writer, piece * 64 * CLUSTER, &mixed(clusters, piece));
                        if piece % 2 == 1 {
                            writer.flush().unwrap();
                        }
                    }
                });
            }
        });
        for at in (GIB..size).step_by(GIB as usize) {
            pair.write(&writer, at, &mixed(2, at >> 30));
        }
        let rest = size % CLUSTER;
        pair.write(&writer, size - rest, &vec![7; rest as usize]);
        writer.flush().unwrap();
        pair.verify();
        // Of five clusters three became nearly nothing and one a third.
        let length = writer.file.file().metadata().unwrap().len();
        assert!(size > GIB || length < 6 << 20, "{length}");
    }
}

/// Recorded data stays, whatever a kill or a loss of power leaves of the rest.
#[test]
fn a_compressed_image_is_continued_after_a_kill() {
    if !have(&[qemu_img::TOOL]) || !qemu_img::has_zstd() {
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
        ("data was not written", |file| {
            let end = file.metadata().unwrap().len();
            let zeroes = vec![0; 3 << 16];
            file.write_all_at(&zeroes, end - 3 * CLUSTER).unwrap();
        }),
    ];
    for (what, damage) in damages {
        eprintln!("{what}");
        let pair = Pair::new(2 * GIB + 512, true);
        let writer = open(&pair, &Extents::default());
        let recorded = [(0, 30), (GIB, 5)];
        for (at, clusters) in recorded {
            pair.write(&writer, at, &mixed(clusters, at >> 30));
        }
        pair.write(&writer, 2 * GIB, &[5; 512]);
        writer.flush().unwrap();
        let ended = pair.file().metadata().unwrap().len();
        let ranges = recorded.map(|(at, clusters)| at..at + clusters as u64 * CLUSTER);
        let end = 2 * GIB..2 * GIB + 512;
        let kept: Extents = ranges.into_iter().chain([end]).collect();
        // Written and not recorded: its tables get to the file, but no flush ends.
        let lost = [(4 << 20, 48), (GIB + (1 << 20), 13)];
        for (at, clusters) in lost {
            pair.write(&writer, at, &mixed(clusters, 3));
        }
        writer.lock().write(writer.file.file()).unwrap();
        drop(writer);
        damage(&pair.file());
        let writer = open(&pair, &kept);
        let length = pair.file().metadata().unwrap().len();
        assert!(length <= ended, "{length}: what was lost takes no room");
        // The same clusters are free again.
        for (at, clusters) in lost {
            pair.write(&writer, at, &mixed(clusters, 4));
        }
        pair.write(&writer, 1 << 29, &mixed(64, 6));
        writer.flush().unwrap();
        same(&pair, &writer, 0, 8 << 20);
        drop(writer);
        pair.verify();
    }
}

/// Counts of more than 2 GiB are in a second block.
#[test]
fn compressed_data_goes_over_the_end_of_a_block_of_counts() {
    if !have(&[qemu_img::TOOL]) || !qemu_img::has_zstd() {
        return;
    }
    for missing in 0..6 {
        let pair = Pair::new(4 * GIB, true);
        // The last cluster of the disk is there, and near the end of what the first block counts.
        let file = pair.file();
        let last = (CLUSTER / 2 - missing - 1) * CLUSTER;
        file.set_len(last + CLUSTER).unwrap();
        for (at, entry) in [(LEVEL_1 + 7 * 8, 4 * CLUSTER), (5 * CLUSTER - 8, last)] {
            let entry = (COPIED | entry).to_be_bytes();
            file.write_all_at(&entry, at).unwrap();
        }
        let writer = open(&pair, &Extents::whole(4 * GIB));
        for piece in 0..6 {
            pair.write(&writer, piece * 8 * CLUSTER, &mixed(5, 2 * piece));
        }
        writer.flush().unwrap();
        pair.write(&writer, GIB, &mixed(5, 1));
        writer.flush().unwrap();
        drop(writer);
        pair.verify();
        // Recounting changes nothing.
        drop(open(&pair, &Extents::whole(4 * GIB)));
        pair.verify();
    }
}

#[test]
fn an_image_that_is_not_compressed_here_is_left_to_qemu() {
    let folder = tempfile::tempdir().unwrap();
    let opened = |compressed: bool, entry: u64| {
        let path = folder.path().join(format!("{compressed} {entry:x}"));
        let mut options = File::options();
        let options = options.read(true).write(true).create_new(true);
        let file = options.open(&path).unwrap();
        write_qcow2(&file, 1 << 20, compressed).unwrap();
        file.set_len(8 * CLUSTER).unwrap();
        let table = (COPIED | (4 * CLUSTER)).to_be_bytes();
        file.write_all_at(&table, LEVEL_1).unwrap();
        file.write_all_at(&entry.to_be_bytes(), 4 * CLUSTER)
            .unwrap();
        let writer = PackedWriter::open(file, 1 << 20, &Extents::whole(1 << 20));
        writer.unwrap().is_some()
    };
    let at = |at| Packed { at, len: 600 }.entry(CLUSTER_BITS);
    assert!(opened(true, 0));
    assert!(opened(true, at(5 * CLUSTER)));
    assert!(!opened(false, 0), "without the type of compression");
    assert!(!opened(true, at(8 * CLUSTER - 10)), "beyond the end");
    assert!(!opened(true, COPIED | at(5 * CLUSTER)));
}
