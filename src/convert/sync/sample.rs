//! Checks a server's claim that ranges are unchanged.
//!
//! A dirty bitmap that began after the last pass, or was cleared since, hides earlier changes. The
//! protocol does not show when a bitmap began. So a sample of the ranges reported as unchanged is
//! compared with the copy.

use std::path::Path;

use crate::disk::detect::Format;
use crate::disk::export::Export;
use crate::disk::{BlockRead, Image};
use crate::error::{Error, Result};
use crate::transfer::Extents;

/// The size of a compared place, and the number of places.
const GRAIN: u64 = 64 << 10;
const PLACES: u64 = 64;

/// The places where the source and the copy of its unchanged ranges differ. `turn` selects other
/// places.
pub(super) fn differences(
    source: &Image,
    copy: &Path,
    unchanged: &Extents,
    turn: usize,
) -> Result<Extents> {
    let mut found = Extents::default();
    let places = places(unchanged, turn as u64);
    if places.is_empty() {
        return Ok(found);
    }
    let copy = Image::open_info(copy, Some(Format::QCOW2.driver()), &[])?;
    let ours = Export::<dyn BlockRead>::open_readonly(&copy)?;
    let theirs = Export::<dyn BlockRead>::open_readonly(source)?;
    for (at, length) in places {
        let (mut a, mut b) = (vec![0; length], vec![0; length]);
        let read = ours.disk().read_at(at, &mut a);
        read.and_then(|()| theirs.disk().read_at(at, &mut b))
            .map_err(|e| Error::failed("comparing what did not change").because(e))?;
        if a != b {
            found.insert(at..at + length as u64);
        }
    }
    ours.close()?;
    theirs.close()?;
    Ok(found)
}

/// Places spread evenly over the ranges, whatever the gaps between them.
fn places(unchanged: &Extents, turn: u64) -> Vec<(u64, usize)> {
    // Whole grains, because dirty ranges consist of grains.
    let step = (unchanged.bytes() / PLACES / GRAIN).max(1) * GRAIN;
    // With an odd number of grains, every place is reached over many turns.
    let mut next = turn.wrapping_mul(7919 * GRAIN) % step;
    let mut before = 0;
    let mut places = Vec::new();
    for range in unchanged.iter() {
        let length = range.end - range.start;
        while next < before + length {
            let at = range.start + (next - before);
            places.push((at, GRAIN.min(range.end - at) as usize));
            next += step;
        }
        before += length;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_lie_evenly_and_inside_and_move() {
        let set: Extents = [GRAIN..GRAIN * 300, GRAIN * 1000..GRAIN * 1500 + 512]
            .into_iter()
            .collect();
        let first = places(&set, 0);
        assert!((PLACES as usize..=PLACES as usize + 12).contains(&first.len()));
        for (at, length) in &first {
            let place: Extents = std::iter::once(*at..at + *length as u64).collect();
            assert_eq!(place.within(&set), place);
        }
        assert_ne!(first, places(&set, 1));
        assert!(places(&Extents::default(), 3).is_empty());
    }

    #[test]
    fn of_a_small_disk_every_grain_is_a_place() {
        const WHOLE: usize = GRAIN as usize;
        let set: Extents = [0..GRAIN * 2, GRAIN * 10..GRAIN * 11 + 512]
            .into_iter()
            .collect();
        let wanted = [
            (0, WHOLE),
            (GRAIN, WHOLE),
            (GRAIN * 10, WHOLE),
            (GRAIN * 11, 512),
        ];
        for turn in [0, 1, 5] {
            assert_eq!(places(&set, turn), wanted, "{turn}");
        }
        // Every second grain of twice as many, one further at each turn.
        let set: Extents = std::iter::once(0..GRAIN * 2 * PLACES).collect();
        for turn in [0, 1] {
            let found = places(&set, turn);
            assert_eq!(found.len(), PLACES as usize, "{turn}");
            assert_eq!(found[0], (turn * GRAIN, WHOLE));
            assert_eq!(found[1], ((turn + 2) * GRAIN, WHOLE));
        }
    }
    /// A server's word is taken only where the copy says the same.
    #[test]
    fn places_that_differ_from_the_copy_are_found_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source.raw");
        let copy = dir.path().join("copy.qcow2");
        let mut bytes = vec![7; 4 * GRAIN as usize + 512];
        std::fs::write(&source, &bytes).unwrap();
        let image = Image::open_info(&source, Some("raw"), &[]).unwrap();
        let all = Extents::whole(bytes.len() as u64);
        crate::disk::refill::Refill::create(&copy, bytes.len() as u64).unwrap();
        let fill = |from: &Image| {
            let refill = crate::disk::refill::Refill {
                source: from,
                target: &copy,
                pace: None,
                cancel: None,
            };
            let work = crate::disk::refill::Work {
                unrecorded: all.clone(),
                ..Default::default()
            };
            let journal = dir.path().join("journal");
            let mut journal = crate::transfer::ExtentJournal::restart(
                &journal,
                &serde_json::Value::Null,
                Extents::default(),
            )
            .unwrap();
            refill.run(&work, &mut journal, &mut |_| {}).unwrap();
        };
        fill(&image);
        let found = |unchanged: &Extents| differences(&image, &copy, unchanged, 0).unwrap();
        assert_eq!(found(&all), Extents::default());
        // One byte of the second grain, and the last one of all.
        bytes[GRAIN as usize + 9] = 1;
        *bytes.last_mut().unwrap() = 1;
        std::fs::write(&source, &bytes).unwrap();
        let differ: Extents = [GRAIN..2 * GRAIN, 4 * GRAIN..4 * GRAIN + 512]
            .into_iter()
            .collect();
        assert_eq!(found(&all), differ);
        let first: Extents = std::iter::once(0..GRAIN).collect();
        assert_eq!(found(&first), Extents::default());
        assert_eq!(found(&all.minus(&first)), differ);
        assert_eq!(found(&Extents::default()), Extents::default());
    }
}
