//! Finds the data in a chain that its frozen links did not have at the previous pass.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::disk::Image;
use crate::disk::remote::RemoteFile;
use crate::error::{Error, Result};
use crate::source::mirror;
use crate::tool::qemu_img;
use crate::transfer::Extents;

/// Granularity for the map of a large image.
const GRAIN: u64 = 64 << 10;

/// The current state of a disk.
#[derive(Debug, Clone)]
pub(super) struct Now {
    /// The links of a chain of files, the newest first. Empty for an export of an NBD server.
    pub(super) links: Vec<Link>,
    /// The dirty bitmaps of an export, if it has some.
    pub(super) dirty: Option<Extents>,
}

impl Now {
    pub(super) fn of(image: &Image) -> Result<Self> {
        let Some(file) = export(image) else {
            return Ok(Self {
                links: links(image)?,
                dirty: None,
            });
        };
        let dirty = file.dirty().map_err(|e| {
            Error::failed(format!("reading the dirty bitmaps of {}", file.shown()))
                .because_of(e)
                .hint("see that the NBD server is up and takes several clients (qemu-nbd -e 0); the same command continues")
        })?;
        let set = |ranges: Vec<(u64, u64)>| -> Extents {
            let range = |(start, len): (u64, u64)| start..start.saturating_add(len);
            ranges.into_iter().map(range).collect()
        };
        Ok(Self {
            links: Vec::new(),
            dirty: dirty.map(|ranges| set(ranges).on_grains(GRAIN, image.virtual_size())),
        })
    }

    /// The ranges that may read differently since the pass with the links `before`.
    pub(super) fn since(&self, before: &[Link]) -> Since {
        match (&self.dirty, self.links.is_empty() && before.is_empty()) {
            (Some(dirty), true) => Since::Changed(dirty.clone()),
            (None, true) => Since::NoBitmap,
            _ => since(before, &self.links).map_or(Since::OtherBase, Since::Changed),
        }
    }
}

/// What can be determined about the time since the last pass.
#[derive(Debug, PartialEq)]
pub(super) enum Since {
    Changed(Extents),
    /// The bottom link is another one, or was written to.
    OtherBase,
    /// An NBD server without a dirty bitmap.
    NoBitmap,
}

/// The NBD export behind an image, if there is one: a disk without links.
pub(super) fn export(image: &Image) -> Option<Arc<dyn RemoteFile>> {
    let [level] = image.levels() else { return None };
    let [held] = level.held() else { return None };
    let file = held.remote()?.file();
    let nbd = mirror::transport(&level.path).is_export();
    nbd.then(|| file.clone())
}

/// The current links of a chain, the newest first. Each has the ranges that the chain reads from
/// it.
fn links(image: &Image) -> Result<Vec<Link>> {
    let levels = image.links();
    let owned = match levels.iter().flatten().count() {
        // The ranges of the bottom link are never used.
        1 => vec![Extents::default(); levels.len()],
        _ => owned(image, levels.len())?,
    };
    let size = image.virtual_size();
    let mut links = Vec::new();
    for (level, owned) in levels.into_iter().zip(owned) {
        for link in level {
            let ranges = link.ranges.map(|ranges| ranges.into_iter().collect());
            links.push(Link {
                files: link.files,
                ranges: pairs(
                    &ranges
                        .unwrap_or_else(|| owned.clone())
                        .on_grains(GRAIN, size),
                ),
            });
        }
    }
    if let Some(last) = links.last_mut() {
        last.ranges = Vec::new();
    }
    Ok(links)
}

/// The ranges that the chain reads from each of its levels.
fn owned(image: &Image, levels: usize) -> Result<Vec<Extents>> {
    let mut owned = vec![Extents::default(); levels];
    qemu_img::layers(&image.spec(), &mut |range, depth| {
        // Data below the chain is in none of its links.
        if let Some(owner) = usize::try_from(depth).ok().and_then(|d| owned.get_mut(d)) {
            owner.insert(range);
        }
    })
    .map_err(|e| {
        Error::failed(format!("reading the map of {}", image.path().display())).because(e)
    })?;
    Ok(owned)
}

fn pairs(set: &Extents) -> Vec<[u64; 2]> {
    set.iter().map(|r| [r.start, r.end - r.start]).collect()
}

fn ranges(link: &Link) -> impl Iterator<Item = Range<u64>> + '_ {
    let range = |[start, len]: &[u64; 2]| Some(*start..start.checked_add(*len)?);
    link.ranges.iter().filter_map(range)
}

/// The ranges in which the chain may read differently than with the links of the previous pass.
/// `None` if the bottom link is another one.
///
/// Both chains stand on the links that they have in common. Any link above those, in either chain,
/// may have changed data.
fn since(before: &[Link], now: &[Link]) -> Option<Extents> {
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
    /// The identity of its files.
    pub(super) files: Value,
    /// The ranges that the chain reads from this link, as `[start, length]` pairs. Not kept for the
    /// last link.
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
    fn an_export_tells_by_its_bitmaps_and_is_no_chain() {
        let now = |links: &[Link], dirty: Option<Range<u64>>| Now {
            links: links.to_vec(),
            dirty: dirty.map(|range| [range].into_iter().collect()),
        };
        let chain = [link("base", &[])];
        let changed = Since::Changed([0..10].into_iter().collect());
        assert_eq!(now(&[], Some(0..10)).since(&[]), changed);
        assert_eq!(now(&[], None).since(&[]), Since::NoBitmap);
        // A chain that became an export, and the reverse.
        assert_eq!(now(&[], Some(0..10)).since(&chain), Since::OtherBase);
        assert_eq!(now(&chain, None).since(&[]), Since::OtherBase);
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

    /// The VM writes clusters, and dirty ranges consist of grains. Of the bottom link all is frozen.
    #[test]
    fn links_are_told_with_the_grains_that_they_hold() {
        use crate::block::BlockWrite;
        use crate::disk::export::Export;
        let dir = tempfile::tempdir().unwrap();
        let (base, snapshot) = (dir.path().join("base.raw"), dir.path().join("snap.qcow2"));
        std::fs::write(&base, vec![1; 4 << 20]).unwrap();
        let below = Image::open_info(&base, Some("raw"), &[]).unwrap();
        let export = Export::<dyn BlockWrite>::open_overlay(&below, &snapshot).unwrap();
        export.disk().write_at((3 << 16) + 512, &[9; 512]).unwrap();
        export.close().unwrap();
        super::super::super::written_tests::name_base(&snapshot, &base);
        let alone = Now::of(&below).unwrap();
        assert_eq!((alone.links.len(), &alone.dirty), (1, &None));
        let image = Image::open_info(&snapshot, Some("qcow2"), &[]).unwrap();
        let now = Now::of(&image).unwrap();
        let ranges: Vec<_> = now.links.iter().map(|link| link.ranges.clone()).collect();
        assert_eq!(ranges, [vec![[3 << 16, 1 << 16]], vec![]]);
        assert_eq!(now.links[1], alone.links[0]);
        let changed: Extents = [3 << 16..4 << 16].into_iter().collect();
        assert_eq!(now.since(&alone.links), Since::Changed(changed));
    }

    /// A later pass reads what an earlier one wrote.
    #[test]
    fn ranges_of_a_link_are_kept_as_starts_and_lengths() {
        let set: Extents = [2..5, 10..11].into_iter().collect();
        assert_eq!(pairs(&set), [[2, 3], [10, 1]]);
        let link = link("a", &pairs(&set));
        assert_eq!(ranges(&link).collect::<Vec<_>>(), [2..5, 10..11]);
        // One that ends nowhere holds nothing.
        let damaged = Link {
            ranges: vec![[u64::MAX, 2], [1, 1]],
            ..link
        };
        assert_eq!(ranges(&damaged).collect::<Vec<_>>(), [1..2]);
    }
}
