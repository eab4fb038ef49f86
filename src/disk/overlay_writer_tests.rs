use std::path::PathBuf;

use super::*;
use crate::block::FileDisk;
use crate::disk::chain::Image;
use crate::disk::empty::create_overlay;
use crate::disk::export::{DaemonAccess, Export};
use crate::disk::testing::{have, pattern, run, write};
use crate::text::of_path;
use crate::tool::qemu_img;

const LARGE: u64 = 300 << 30;

struct Lab {
    folder: tempfile::TempDir,
    raw: PathBuf,
    size: u64,
}

impl Lab {
    /// A raw disk of that size with a pattern in its first and last 5 MiB.
    fn new(size: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let bytes = pattern(5 << 20);
        let raw = write(folder.path(), "disk.raw", &bytes);
        let file = File::options().write(true).open(&raw).unwrap();
        file.set_len(size).unwrap();
        file.write_all_at(&bytes, size - bytes.len() as u64)
            .unwrap();
        Self { folder, raw, size }
    }

    fn overlay(&self) -> PathBuf {
        self.folder.path().join("overlay.qcow2")
    }

    fn source(&self) -> Image {
        Image::open_info(&self.raw, Some("raw"), &[]).unwrap()
    }

    fn check(&self) {
        run(
            qemu_img::TOOL,
            &["check", "-q", "-f", "qcow2", &of_path(&self.overlay())],
        );
    }
}

/// The contents of a disk around its start and end, after the same writes to a copy of those bytes.
struct Model {
    windows: [(u64, Vec<u8>); 2],
}

impl Model {
    fn of(lab: &Lab) -> Self {
        let disk = FileDisk::open(&lab.raw).unwrap();
        let window = |at: u64| {
            let mut bytes = vec![0; 6 << 20];
            disk.read_at(at, &mut bytes).unwrap();
            (at, bytes)
        };
        Self {
            windows: [window(0), window(lab.size - (6 << 20))],
        }
    }

    fn fill(&mut self, at: u64, len: u64, byte: impl Fn(u64) -> u8) {
        for (start, bytes) in &mut self.windows {
            for i in at.max(*start)..(at + len).min(*start + bytes.len() as u64) {
                bytes[(i - *start) as usize] = byte(i - at);
            }
        }
    }

    fn assert_is(&self, disk: &dyn BlockRead, who: &str) {
        for (start, bytes) in &self.windows {
            let mut there = vec![0xee; bytes.len()];
            disk.read_at(*start, &mut there).unwrap();
            let differs = there.iter().zip(bytes).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{who} from {start}");
        }
    }
}

/// Thousands of writes and zeroes at random places: QEMU and this program's reader return the
/// contents of a model, before and after more of them. QEMU finds neither an error nor a leak.
#[test]
fn every_reader_reads_what_was_written() {
    if !have(&[qemu_img::TOOL, crate::tool::qsd::TOOL]) {
        return;
    }
    // With an incomplete last part, and in clusters of 2 MiB.
    for size in [(40 << 20) + 4096 + 512, LARGE + 512] {
        let lab = Lab::new(size);
        let mut model = Model::of(&lab);
        let mut random = size;
        let mut next = |limit: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) % limit
        };
        let export = Export::open_overlay(&lab.source(), &lab.overlay()).unwrap();
        assert_eq!(export.daemon_id(), None);
        let (disk, image) = (export.disk(), export.image().clone());
        for round in 0..400u64 {
            let len = match next(4) {
                0 => next(700) + 1,
                1 => next(64 << 10) + 1,
                2 => (next(3) + 1) << 16,
                _ => next(400 << 10) + 1,
            };
            let mut at = next((6 << 20) - len);
            if next(2) == 0 {
                at = at >> 16 << 16;
            }
            if round % 3 == 0 {
                // Sometimes up to the end of the disk.
                at = size - len - at.min(size - len) * (round % 2);
            }
            if round % 4 == 1 {
                disk.zero_at(at, len).unwrap();
                model.fill(at, len, |_| 0);
            } else {
                let byte = |i: u64| (i / 512 + round) as u8 | 1;
                let data: Vec<u8> = (0..len).map(byte).collect();
                disk.write_at(at, &data).unwrap();
                model.fill(at, len, byte);
            }
            if round % 100 == 50 {
                disk.flush().unwrap();
                lab.check();
            }
        }
        model.assert_is(disk.as_ref(), "the writer");
        assert!(disk.write_at(size - 1, &[1, 2]).is_err());
        assert!(disk.zero_at(size, 1).is_err());
        assert!(disk.read_at(size, &mut [0]).is_err());
        export.close().unwrap();
        lab.check();
        let ours = Export::open_readonly(&image).unwrap();
        assert_eq!(ours.daemon_id(), None);
        model.assert_is(ours.disk().as_ref(), "the reader");
        ours.close().unwrap();
        let qemu = Export::open_readonly_for(&image, DaemonAccess::User).unwrap();
        assert!(qemu.daemon_id().is_some());
        model.assert_is(qemu.disk().as_ref(), "QEMU");
        qemu.close().unwrap();
        // QEMU continues to write to an overlay that stays as a disk.
        let qemu = Export::open_writable(&image).unwrap();
        for (at, len) in [(100u64, 200_000u64), (3 << 20, 1 << 20)] {
            qemu.disk().write_at(at, &vec![9; len as usize]).unwrap();
            model.fill(at, len, |_| 9);
        }
        model.assert_is(qemu.disk().as_ref(), "QEMU that writes");
        qemu.close().unwrap();
        lab.check();
        let ours = Export::open_readonly(&image).unwrap();
        model.assert_is(ours.disk().as_ref(), "the reader of what QEMU wrote");
        ours.close().unwrap();
    }
}

/// A free terabyte is a few tables.
#[test]
fn zeroes_take_no_room() {
    if !have(&[qemu_img::TOOL]) {
        return;
    }
    let lab = Lab::new(2 << 40);
    create_overlay(&lab.overlay(), lab.size).unwrap();
    let below = Arc::new(FileDisk::open(&lab.raw).unwrap());
    let writer = OverlayWriter::open(&lab.overlay(), below).unwrap();
    writer.zero_at(1 << 20, lab.size - (2 << 20)).unwrap();
    writer.write_at(1 << 40, &[7; 100]).unwrap();
    writer.flush().unwrap();
    lab.check();
    use std::os::unix::fs::MetadataExt;
    let taken = lab.overlay().metadata().unwrap().blocks() * 512;
    assert!(taken < 24 << 20, "{taken}");
    let mut bytes = [1; 200];
    writer.read_at((1 << 40) - 100, &mut bytes).unwrap();
    assert_eq!(bytes[..100], [0; 100]);
    assert_eq!(bytes[100..], [7; 100]);
}

/// Before tables are written, the image is empty and shows the source.
#[test]
fn what_was_not_flushed_is_not_half_there() {
    if !have(&[qemu_img::TOOL]) {
        return;
    }
    let lab = Lab::new(8 << 20);
    let before = Model::of(&lab);
    let export = Export::open_overlay(&lab.source(), &lab.overlay()).unwrap();
    let image = export.image().clone();
    export.disk().write_at(1000, &[7; 300_000]).unwrap();
    drop(export);
    let read = Export::open_readonly(&image).unwrap();
    before.assert_is(read.disk().as_ref(), "the source");
    read.close().unwrap();
    lab.check();
}

/// A taken-over NTFS writer could write to every cluster of its volume.
#[test]
fn writes_to_more_clusters_than_a_fix_makes_are_refused() {
    let lab = Lab::new(8 << 20);
    create_overlay(&lab.overlay(), lab.size).unwrap();
    let below = Arc::new(FileDisk::open(&lab.raw).unwrap());
    let writer = OverlayWriter::open(&lab.overlay(), below).unwrap();
    assert_eq!(writer.lock().most_places, 1 << 20);
    writer.lock().most_places = 3;
    for at in [0, PART, 5 * PART] {
        writer.write_at(at, &[7]).unwrap();
    }
    let error = writer.write_at(9 * PART, &[7]).unwrap_err();
    assert!(
        error.to_string().contains("more than 3 clusters"),
        "{error}"
    );
    // Zeroes are a bit each, and clusters that are there are written on.
    writer.zero_at(9 * PART, 8 * PART).unwrap();
    writer.write_at(5 * PART + 9, &[8]).unwrap();
}
