//! [`Image`]: an image file with all its backing files, each file named and each format known.
//!
//! Every file of the chain is opened once and held ([`Held`]) until the image is dropped. All later
//! checks and reads, by this process or by QEMU, use that descriptor. An untrusted image may name
//! any file of this host as its backing file, extent or data file. The contents of that file would
//! end up in the target. So references that leave the directory of the named image are refused
//! unless allowed. The real path of the opened file decides. Everything that is not a plain file
//! name (`nbd://...`, `json:...`) is refused too.
//!
//! The result becomes an explicit block device tree of descriptors ([`Image::spec`]), so that QEMU
//! decides nothing itself. It does not probe and opens no unchecked file. File names with `:`, `,`
//! or `%` have no special meaning. QEMU reads the extents of a vmdk from its descriptor text. So it
//! gets a new descriptor in which they are file descriptors too.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::detect::Format;
use super::error::{ImageError, Result};
use super::hold::{Held, Use};
use super::level::Level;
use super::remote::Remote;
use crate::tool::qemu_img::{self, Depth, Present};
use crate::tool::qsd;
use crate::tool::spec::Spec;

const MAX_VMDK_CHECKED: u64 = 256 << 30;
/// The limit for reference counts. With clusters of 64 KiB it is reached at 8 TiB in the file. QEMU
/// needs its usual memory in addition.
const MAX_REFERENCE_COUNTS: u64 = 256 << 20;

/// A disk image with its backing chain.
#[derive(Debug, Clone)]
pub struct Image {
    /// The named image first, then its backing images. Never empty.
    pub(super) levels: Vec<Level>,
}

/// The data of one link of a chain.
#[derive(Debug)]
pub(crate) struct Link {
    /// The identity of its files for a later run.
    pub(crate) files: Value,
    /// The ranges of its data, if it is read as one image with others.
    pub(crate) ranges: Option<Vec<Range<u64>>>,
}

impl Image {
    /// Puts an overlay, created by [`super::Export::open_overlay`], over the image.
    pub fn with_overlay(&self, overlay: &Path) -> Result<Self> {
        let path = std::path::absolute(overlay).map_err(|e| ImageError::from_io(overlay, e))?;
        utf8(&path, "the VM's description")?;
        let mut image = Self::scratch(&path, self.virtual_size());
        image.levels.extend_from_slice(&self.levels);
        Ok(image)
    }

    /// Describes a standalone qcow2 of this run.
    pub(super) fn scratch(path: &Path, virtual_size: u64) -> Self {
        let levels = vec![Level::of_this_run(path, Format::QCOW2, virtual_size)];
        Self { levels }
    }

    /// Describes a new image file of this run that will be kept.
    pub(super) fn target(path: &Path, format: Format, size: u64, compress: bool) -> Self {
        let level = Level {
            durable: true,
            compress,
            ..Level::of_this_run(path, format, size)
        };
        Self {
            levels: vec![level],
        }
    }

    /// The same image for writes that must survive a loss of power.
    pub(super) fn durable(&self) -> Self {
        let mut image = self.clone();
        image.levels[0].durable = true;
        image
    }

    /// The identity of each file of a source for a later run.
    pub(crate) fn identity(&self) -> Value {
        self.held().map(Held::identity).collect()
    }

    /// The image as it was opened, without the overlays of this run.
    pub(crate) fn without_overlays(&self) -> Self {
        let own = self.levels.iter().take_while(|level| level.scratch).count();
        Self {
            levels: self.levels[own..].to_vec(),
        }
    }

    /// The image without its top level.
    pub(crate) fn without_top(&self) -> Self {
        Self {
            levels: self.levels.iter().skip(1).cloned().collect(),
        }
    }

    /// The links of each level, the named image first.
    pub(crate) fn links(&self) -> Vec<Vec<Link>> {
        let known = |files: &[Held]| files.iter().map(Held::identity).collect();
        let of = |level: &Level| -> Vec<Link> {
            if level.merged_links.is_empty() {
                return vec![Link {
                    files: known(&level.held),
                    ranges: None,
                }];
            }
            let mut files = level.held.as_slice();
            let links = level.merged_links.iter().map(|link| {
                let (own, others) = files.split_at(link.files.min(files.len()));
                files = others;
                let range =
                    |present: &Present| present.start..present.start.saturating_add(present.length);
                Link {
                    files: known(own),
                    ranges: Some(link.ranges.iter().map(range).collect()),
                }
            });
            links.collect()
        };
        self.levels.iter().map(of).collect()
    }

    /// The levels: the named image first, then its backing images.
    pub fn levels(&self) -> &[Level] {
        &self.levels
    }

    /// The named image.
    pub fn top(&self) -> &Level {
        &self.levels[0]
    }

    pub fn path(&self) -> &Path {
        &self.top().path
    }

    /// The same file with another format, for tests of what depends on that.
    #[cfg(test)]
    pub(crate) fn shown_as(mut self, format: Format) -> Self {
        self.levels[0].format = format;
        self
    }

    pub fn format(&self) -> Format {
        self.top().format
    }

    pub fn virtual_size(&self) -> u64 {
        self.top().virtual_size
    }

    /// Bytes that all files of the chain take on the host.
    pub fn allocated(&self) -> u64 {
        self.levels
            .iter()
            .fold(0, |sum, level| sum.saturating_add(level.allocated))
    }

    /// Every file of the image.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.levels.iter().flat_map(|level| {
            std::iter::once(&level.path)
                .chain(&level.extents)
                .chain(&level.data_file)
                .map(PathBuf::as_path)
        })
    }

    /// Every file of the image that is not an overlay of this run, open.
    pub fn held(&self) -> impl Iterator<Item = &Held> {
        self.levels.iter().flat_map(|level| &level.held)
    }

    /// The files that are written when the image is.
    pub fn written(&self) -> impl Iterator<Item = &Path> {
        let top = self.top();
        std::iter::once(&top.path)
            .chain(&top.extents)
            .chain(&top.data_file)
            .map(PathBuf::as_path)
    }

    /// The whole chain as a block device tree for the storage daemon, whose export is the root
    /// node. Only the top level is ever opened for writing.
    pub fn blockdev(&self, writable: bool) -> Spec {
        let mut spec = self.spec_for(usize::from(writable));
        if writable && self.top().compress {
            spec.node = json!({"driver": "compress", "file": spec.node});
        }
        spec.node["node-name"] = qsd::NODE.into();
        spec
    }

    /// The chain for `qemu-img`, read-only.
    pub fn spec(&self) -> Spec {
        self.spec_for(0)
    }

    /// The chain with its two upper levels writable, for merging the top into the one below.
    pub(crate) fn spec_to_commit(&self) -> Spec {
        self.spec_for(2)
    }

    /// The chain with the first `writable` levels opened for writing.
    fn spec_for(&self, writable: usize) -> Spec {
        let mut node = Value::Null;
        let mut sockets = Vec::new();
        for (i, level) in self.levels.iter().enumerate().rev() {
            node = level.node(i < writable, node, &mut sockets);
        }
        let levels = self.levels.iter().enumerate();
        Spec {
            node,
            sockets,
            passed: levels
                .flat_map(|(i, level)| level.passed(i < writable))
                .collect(),
            named: self
                .levels
                .iter()
                .enumerate()
                .filter(|(_, level)| level.scratch)
                .map(|(i, level)| (level.path.clone(), i < writable))
                .collect(),
        }
    }

    /// Locks the files that are written with the image for writing: nobody else can read them.
    pub fn hold_for_writing(&self) -> Result<()> {
        self.top().held.iter().try_for_each(Held::hold_for_writing)
    }

    /// Records that this run writes to the files of the top level from now on.
    pub fn will_be_written(&self) {
        self.top().held.iter().for_each(Held::will_be_written);
    }

    /// Fails unless each name still leads to the held file.
    pub fn check_names(&self) -> Result<()> {
        self.held().try_for_each(Held::check_name)
    }

    /// Fails if the kernel may write to a file of the image. Then a loop device uses it, or it is a
    /// mounted block device.
    pub fn check_kernel(&self) -> Result<()> {
        self.held()
            .try_for_each(|held| held.check_kernel(Use::Read))
    }

    /// Fails if somebody else has changed a file of the image since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        self.held().try_for_each(Held::check_unchanged)
    }

    /// The file that is the disk byte for byte, if there is one; no format has to be decoded.
    pub(super) fn plain_file(&self) -> Option<&Held> {
        let [level] = &self.levels[..] else {
            return None;
        };
        let whole = level.virtual_size == level.size;
        let plain = level.format == Format::RAW && whole;
        level.held.first().filter(|_| plain)
    }

    /// An overlay of this run, and the image below it.
    pub(super) fn scratch_over(&self) -> Option<(&Path, Self)> {
        let top = self.top();
        let below = self.without_top();
        let own = top.scratch && top.format == Format::QCOW2 && !below.levels.is_empty();
        own.then_some((top.path.as_path(), below))
    }

    /// Checks the metadata of every level. This finds truncated files, which QEMU would otherwise
    /// read as zeroes.
    pub fn check(&self) -> Result<()> {
        // For a vmdk, QEMU checks one by one whether each block ends in its file. For a large one
        // that takes minutes, and the tables were checked when it was opened.
        let quick =
            |level: &&Level| level.format != Format::VMDK || level.virtual_size <= MAX_VMDK_CHECKED;
        let has_check = |level: &&Level| level.format.has_check() && level.flat.is_none();
        let levels = self.levels.iter().filter(has_check);
        for level in levels.filter(quick) {
            let counts = level.reference_counts()?;
            if counts > MAX_REFERENCE_COUNTS {
                // In a longer file QEMU would need more memory than it has, even if the image is
                // sound.
                tracing::info!(
                    "{} is not checked: the reference counts of its clusters take {counts} bytes of memory",
                    level.path.display()
                );
                continue;
            }
            let result = qemu_img::check(&level.spec(), 0)
                .map_err(|e| ImageError::from_tool(&level.path, e))?;
            if let Some(result) = result
                && !result.is_sound()
            {
                return Err(ImageError::Damaged {
                    path: level.path.clone(),
                    reason: format!("qemu-img check found {} errors", result.errors()),
                });
            }
        }
        Ok(())
    }
}

/// Reading from another host.
impl Image {
    /// The remote file that is the disk byte for byte, if there is one.
    pub(super) fn plain_remote(&self) -> Option<Arc<Remote>> {
        let [level] = &self.levels[..] else {
            return None;
        };
        match &level.flat {
            Some(flat) => Some(flat.clone()),
            None => self.plain_file()?.remote().cloned(),
        }
    }

    /// Announces to a source on another host that it will be copied.
    pub fn prepare(&self) {
        let levels = self.levels.iter();
        let files = levels.flat_map(|level| {
            let held = level.held.iter().filter_map(Held::remote);
            held.chain(&level.flat)
        });
        files.for_each(|file| file.file().prepare());
    }

    /// Announces to a disk on another host the ranges that are read next, so that they are fetched
    /// ahead.
    pub(crate) fn expect(&self, ranges: &[Range<u64>]) {
        if let Some(remote) = self.plain_remote() {
            let lengths = ranges
                .iter()
                .map(|range| (range.start, range.end - range.start));
            remote.file().expect(&lengths.collect::<Vec<_>>());
        }
    }

    /// Announces to a source on another host the ranges that will be copied, so that exactly these
    /// are fetched ahead.
    pub fn announce(&self) {
        let Some((base, above)) = self.levels.split_last() else {
            return;
        };
        let file = match &base.flat {
            Some(flat) => Some(flat),
            None => base.held.first().and_then(Held::remote),
        };
        let Some(file) = file.filter(|_| above.iter().all(|level| level.scratch)) else {
            return;
        };
        if base.format != Format::RAW && base.flat.is_none() {
            return;
        }
        // Ranges in an overlay are not read from there.
        let wanted = |depth| above.is_empty() || depth == Depth::Below;
        let mut ranges = Vec::new();
        let mapped = qemu_img::mapped(&self.spec(), false, &mut |range, depth| {
            if wanted(depth) {
                ranges.push((range.start, range.end.saturating_sub(range.start)));
            }
        });
        match mapped {
            Ok(()) => file.file().expect(&ranges),
            Err(e) => tracing::debug!("nothing is fetched ahead: {e}"),
        }
    }
}

/// Requires UTF-8 for a name that becomes part of text.
fn utf8<'p>(path: &'p Path, what: &'static str) -> Result<&'p str> {
    path.to_str().ok_or_else(|| ImageError::NotUtf8 {
        path: path.into(),
        what,
    })
}
