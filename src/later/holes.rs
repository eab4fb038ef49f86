//! Marks known holes of the source as zero clusters of the overlay, before the VM starts for the
//! first time.
//!
//! QEMU's pull reads everything that an overlay itself lacks, including holes. For a sparse disk of
//! 2 TiB with 20 GiB of data, that would be minutes of reading zeroes.

use std::ops::Range;

use crate::block::BlockWrite;
use crate::disk::chain::Image;
use crate::disk::export::{self, Export};
use crate::error::{Error, Result};
use crate::timeline;
use crate::tool::qemu_img::{self, Depth, Part};

/// QEMU's allocation unit in an overlay.
const GRAIN: u64 = 64 << 10;
/// The smallest hole that is marked: marking a smaller one costs more than reading it.
const SMALL: u64 = 1 << 20;

/// The known holes of the source that are not marked in the overlay yet, aligned to [`GRAIN`].
fn holes(image: &Image) -> Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut end = 0u64;
    let mut until = |start: u64, next: u64| {
        let hole = end.next_multiple_of(GRAIN)..start / GRAIN * GRAIN;
        if hole.start < hole.end && hole.end - hole.start >= SMALL {
            found.push(hole);
        }
        end = next;
    };
    parts(image, &mut |range, _| until(range.start, range.end))?;
    // The last one ends with the disk, whose size need not be a multiple.
    let size = image.virtual_size();
    let tail = end.next_multiple_of(GRAIN)..size;
    if tail.start < tail.end {
        found.push(tail);
    }
    Ok(found)
}

/// Marks the holes in the overlay on top of the image. The guest sees no change.
pub(crate) fn mark(image: &Image) -> Result<()> {
    let _span = timeline::span("mark holes");
    let holes = holes(image)?;
    if holes.is_empty() {
        return Ok(());
    }
    let marking = || Error::failed(format!("marking free space in {}", image.path().display()));
    let export = Export::<dyn BlockWrite>::open_writable(image)?;
    let disk = export.disk();
    for hole in holes {
        let len = hole.end - hole.start;
        disk.zero_at(hole.start, len)
            .map_err(|e| marking().because(e))?;
    }
    Ok(export.close()?)
}

/// Bytes that only the source has.
pub(crate) fn left(image: &Image) -> Result<u64> {
    let mut bytes = 0u64;
    parts(image, &mut |range, part| {
        if part == Part::Data(Depth::Below) {
            bytes = bytes.saturating_add(range.end - range.start);
        }
    })?;
    Ok(bytes)
}

/// Passes every range with data or with zeroes in the overlay to `found`, in order; without
/// starting a program if possible.
fn parts(image: &Image, found: &mut dyn FnMut(Range<u64>, Part)) -> Result<()> {
    let failed = || Error::failed(format!("reading the map of {}", image.path().display()));
    match export::plain_parts(image, found) {
        Some(done) => done.map_err(|e| failed().because(e)),
        None => qemu_img::held(&image.spec(), found).map_err(|e| failed().because(e)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_nobody_holds_is_marked_once() {
        if !crate::skip::have(&["qemu-img", "qemu-storage-daemon"]) {
            return;
        }
        const MIB: u64 = 1 << 20;
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("source.raw");
        let file = File::create(&raw).unwrap();
        file.set_len(8 * MIB).unwrap();
        for at in [0, 6 * MIB] {
            file.write_all_at(&[1; GRAIN as usize], at).unwrap();
        }
        let source = Image::open_info(&raw, Some("raw"), &[]).unwrap();
        let over = dir.path().join("over.qcow2");
        let export = Export::<dyn BlockWrite>::open_overlay(&source, &over).unwrap();
        export.disk().zero_at(2 * MIB, 2 * MIB).unwrap();
        export
            .disk()
            .write_at(5 * MIB, &[2; GRAIN as usize])
            .unwrap();
        let image = export.image().clone();
        export.close().unwrap();
        let want = [GRAIN..2 * MIB, 4 * MIB..5 * MIB, 6 * MIB + GRAIN..8 * MIB];
        assert_eq!(holes(&image).unwrap(), want);
        // QEMU sees the same.
        let mut parts = Vec::new();
        qemu_img::held(&image.spec(), &mut |range, part| parts.push((range, part))).unwrap();
        let below = Part::Data(Depth::Below);
        let want = [
            (0..GRAIN, below),
            (2 * MIB..4 * MIB, Part::Zeroes),
            (5 * MIB..5 * MIB + GRAIN, Part::Data(Depth::Top)),
            (6 * MIB..6 * MIB + GRAIN, below),
        ];
        assert_eq!(parts, want);
        mark(&image).unwrap();
        assert_eq!(holes(&image).unwrap(), []);
        assert_eq!(left(&image).unwrap(), 2 * GRAIN);
    }
}
