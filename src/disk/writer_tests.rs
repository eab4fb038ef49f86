use std::path::Path;

use super::*;
use crate::disk::empty::{COUNT_BLOCK, LEVEL_1, create_qcow2};
use crate::disk::qcow2::COPIED;
use crate::disk::testing::{Pair, have, pattern, run};
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
