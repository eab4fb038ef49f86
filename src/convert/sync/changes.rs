//! What a chain holds that its frozen links did not hold at the pass before.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::disk::Image;
use crate::error::{Error, Result};
use crate::tool::qemu_img;
use crate::transfer::Extents;

/// The map of a large image is kept on borders of this.
const GRAIN: u64 = 64 << 10;

/// A chain as it is now: its links, the newest first, each with the ranges in which it is what is read.
pub(super) fn links(image: &Image) -> Result<Vec<Link>> {
    let files = image.link_identities();
    let mut owned = vec![Extents::default(); files.len()];
    qemu_img::layers(&image.spec(), &mut |range, depth| {
        // What is deeper than the chain is there in none of its links.
        if let Some(owner) = usize::try_from(depth).ok().and_then(|d| owned.get_mut(d)) {
            owner.insert(range);
        }
    })
    .map_err(|e| {
        Error::failed(format!("reading the map of {}", image.path().display())).because(e)
    })?;
    let last = files.len().saturating_sub(1);
    let size = image.virtual_size();
    let links = files.into_iter().zip(owned).enumerate();
    let link = |(i, (files, owned)): (usize, (Value, Extents))| Link {
        files,
        ranges: match i == last {
            true => Vec::new(),
            false => pairs(&owned.on_grains(GRAIN, size)),
        },
    };
    Ok(links.map(link).collect())
}

fn pairs(set: &Extents) -> Vec<[u64; 2]> {
    set.iter().map(|r| [r.start, r.end - r.start]).collect()
}

fn ranges(link: &Link) -> impl Iterator<Item = Range<u64>> + '_ {
    let range = |[start, len]: &[u64; 2]| Some(*start..start.checked_add(*len)?);
    link.ranges.iter().filter_map(range)
}

/// Where the chain may read otherwise now than it did with the links of the pass before. `None`: the link
/// at its bottom is another one.
///
/// Both chains stand on the links that they have in common. Above those, either may hold something.
pub(super) fn since(before: &[Link], now: &[Link]) -> Option<Extents> {
    let pairs = before.iter().rev().zip(now.iter().rev());
    let common = pairs.take_while(|(a, b)| a.files == b.files).count();
    if common == 0 {
        return None;
    }
    let above = |chain: &[Link]| -> Extents {
        let links = &chain[..chain.len() - common];
        links.iter().flat_map(ranges).collect()
    };
    let mut changed = above(now);
    changed.extend(&above(before));
    Some(changed)
}

/// One link of a chain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Link {
    /// By what its files are known again.
    pub(super) files: Value,
    /// Where it is what the chain reads as, in `[start, length]` pairs. Not kept for the last link.
    pub(super) ranges: Vec<[u64; 2]>,
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init)]
mod tests {
    use serde_json::json;

    use super::*;

    fn link(name: &str, ranges: &[[u64; 2]]) -> Link {
        Link {
            files: json!(name),
            ranges: ranges.to_vec(),
        }
    }

    #[test]
    fn what_lies_above_the_common_links_may_have_changed() {
        let base = || link("base", &[]);
        let a = || link("a", &[[0, 10]]);
        let b = || link("b", &[[20, 10]]);
        let merged = || link("a+b", &[[0, 10], [20, 10]]);
        let set = |ranges: &[Range<u64>]| Some(ranges.iter().cloned().collect::<Extents>());
        type Chain = Vec<Link>;
        let cases: Vec<(Chain, Chain, Option<Extents>)> = vec![
            (vec![base()], vec![base()], set(&[])),
            // A new link.
            (vec![base()], vec![a(), base()], set(&[0..10])),
            (vec![a(), base()], vec![b(), a(), base()], set(&[20..30])),
            (vec![a(), base()], vec![a(), base()], set(&[])),
            // Reverted, and merged.
            (vec![b(), a(), base()], vec![a(), base()], set(&[20..30])),
            (
                vec![b(), a(), base()],
                vec![merged(), base()],
                set(&[0..10, 20..30]),
            ),
            // The base was written to, or is another one.
            (vec![base()], vec![link("other", &[])], None),
            (vec![a(), base()], vec![a(), link("base+", &[])], None),
            (vec![a(), base()], vec![], None),
        ];
        for (before, now, changed) in cases {
            assert_eq!(since(&before, &now), changed, "{before:?} {now:?}");
        }
    }
}
