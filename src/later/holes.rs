//! Known holes of the source become zero clusters of the overlay, before the VM starts for the first time.
//!
//! QEMU's pull reads all that an overlay does not hold itself, holes too: of a sparse disk of 2 TiB with 20 GiB
//! in it that would be minutes of reading zeroes.

use std::ops::Range;

use crate::block::BlockWrite;
use crate::disk::chain::Image;
use crate::disk::export::{self, Export};
use crate::error::{Error, Result};
use crate::timeline;
use crate::tool::qemu_img::{self, Depth};

/// What QEMU allocates in an overlay at a time.
const GRAIN: u64 = 64 << 10;
/// Smaller holes are left: marking them costs more than reading them.
const SMALL: u64 = 1 << 20;

/// The ranges of a disk that read as zeroes for a reason known without reading: the overlay or the source
/// says so. On borders of [`GRAIN`].
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
    mapped(image, &mut |range, _| until(range.start, range.end))?;
    // The last one ends with the disk, whose size need not be a multiple.
    let size = image.virtual_size();
    let tail = end.next_multiple_of(GRAIN)..size;
    if tail.start < tail.end {
        found.push(tail);
    }
    Ok(found)
}

/// Marks them in the overlay on top of the image. What the guest sees stays unchanged.
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

/// Bytes that only the source holds.
pub(crate) fn left(image: &Image) -> Result<u64> {
    let mut bytes = 0u64;
    mapped(image, &mut |range, depth| {
        if depth == Depth::Below {
            bytes = bytes.saturating_add(range.end - range.start);
        }
    })?;
    Ok(bytes)
}

/// Tells every range with data, in order, and whether the top image has it; without a program where that can be.
fn mapped(image: &Image, found: &mut dyn FnMut(Range<u64>, Depth)) -> Result<()> {
    let failed = || Error::failed(format!("reading the map of {}", image.path().display()));
    match export::plain_data(image, found) {
        Some(done) => done.map_err(|e| failed().because(e)),
        None => qemu_img::mapped(&image.spec(), false, found).map_err(|e| failed().because(e)),
    }
}
