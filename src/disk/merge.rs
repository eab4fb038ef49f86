//! Merges snapshots of VMware on a base that lies on another host.
//!
//! QEMU reads a sparse link (COWD, seSparse, those of Workstation) only over a parent that is a
//! VMDK of files. Over a raw parent every read fails, and it looks for a parent reached by NBD
//! under the name in the link. So the links, which were fetched whole, are read without a parent,
//! and their grains are written into one qcow2. The oldest link is written first, so that the
//! newest counts. The qcow2 has subclusters of one sector, because a grain may be one: ranges
//! missing from all links show the base.

use std::io;
use std::path::Path;

use super::chain::Image;
use super::detect::Format;
use super::error::{ImageError, Result};
use super::export::{Export, ExportError};
use super::hold::Held;
use super::level::{Level, MergedLink};
use crate::block::{BlockRead, BlockWrite};
use crate::stop;
use crate::tool::qemu_img::{self, Present};

/// Subclusters are a 32nd of a cluster.
const LAYOUT: &str = "cluster_size=16384,extended_l2=on";
/// The number of bytes read and written at a time.
const CHUNK: u64 = 4 << 20;

impl Image {
    /// Merges the sparse links of a chain on a base of another host into one qcow2; other chains
    /// are unchanged.
    pub(super) fn with_links_merged(mut self) -> Result<Self> {
        let base = self.levels.iter().position(Level::is_flat_remote);
        let base = base.or_else(|| self.lowest_on_wire());
        let Some(base) = base.filter(|base| *base > 0) else {
            return Ok(self);
        };
        let sparse = |level: &Level| level.format == Format::VMDK && !level.is_flat_remote();
        if !self.levels[..base].iter().all(sparse) {
            return Ok(self);
        }
        let top = self.levels[0].path.clone();
        let merged = top.with_extension("merged.qcow2");
        let links = self.levels[..base].iter();
        let present: Vec<Vec<Present>> = links
            .map(|link| {
                qemu_img::present_ranges(&link.spec())
                    .map_err(|e| ImageError::from_tool(&link.path, e))
            })
            .collect::<Result<_>>()?;
        // Opened earlier in this run: it is unchanged, or the check at the end of the run fails.
        if !merged.exists() {
            let made = self.merge(&present, &merged);
            made.inspect_err(|_| drop(std::fs::remove_file(&merged)))?;
        }
        let held = Held::open(&merged)?;
        let below = self.levels.split_off(base);
        let mut links = std::mem::take(&mut self.levels).into_iter();
        let Some(mut level) = links.next() else {
            return Err(ImageError::NotFound { path: top });
        };
        let mut present = present.into_iter();
        let mut of = |files: usize| MergedLink {
            files,
            ranges: present.next().unwrap_or_default(),
        };
        level.merged_links.push(of(level.held.len()));
        for link in links {
            level.merged_links.push(of(link.held.len()));
            level.allocated = level.allocated.saturating_add(link.allocated);
            level.extents.push(link.path);
            level.extents.extend(link.extents);
            level.held.extend(link.held);
        }
        level.merged = Some(held);
        self.levels.push(level);
        self.levels.extend(below);
        Ok(self)
    }

    /// The index of the lowest link that is a sparse VMDK of another host.
    fn lowest_on_wire(&self) -> Option<usize> {
        let level = self.levels.last()?;
        let remote = level.held().first()?.remote().is_some();
        (remote && level.format == Format::VMDK).then(|| self.levels.len() - 1)
    }

    /// Merges the links, which have these ranges.
    fn merge(&self, present: &[Vec<Present>], merged: &Path) -> Result<()> {
        let size = self.virtual_size();
        qemu_img::create_with(merged, "qcow2", size, Some(LAYOUT))
            .map_err(|e| ImageError::from_tool(merged, e))?;
        let mut image = Self::scratch(merged, size);
        // Its clusters are smaller than those of other overlays.
        image.levels[0].subformat = Some("subclusters".into());
        let target = Export::open_writable(&image).map_err(exported)?;
        let disk = target.disk();
        for (link, ranges) in self.levels.iter().zip(present).rev() {
            let alone = Self {
                levels: vec![link.clone()],
            };
            let source = Export::open_readonly(&alone).map_err(exported)?;
            let copied = copy(&*source.disk(), &*disk, ranges, size);
            copied.map_err(|e| ImageError::from_io(&link.path, e))?;
            source.close().map_err(exported)?;
        }
        drop(disk);
        target.close().map_err(exported)
    }
}

fn exported(error: ExportError) -> ImageError {
    match error {
        ExportError::Image(error) => error,
        other => ImageError::Io {
            path: "the links of a snapshot".into(),
            source: io::Error::other(other),
        },
    }
}

fn copy(
    from: &dyn BlockRead,
    to: &dyn BlockWrite,
    ranges: &[Present],
    size: u64,
) -> io::Result<()> {
    for range in ranges {
        let end = range.start.saturating_add(range.length).min(size);
        if range.zero {
            to.zero_at(range.start, end.saturating_sub(range.start))?;
            continue;
        }
        let mut at = range.start;
        while at < end {
            if stop::requested() {
                return Err(stop::Interrupted.into());
            }
            let mut part = vec![0; CHUNK.min(end - at) as usize];
            from.read_at(at, &mut part)?;
            to.write_at(at, &part)?;
            at += part.len() as u64;
        }
    }
    to.flush()
}
