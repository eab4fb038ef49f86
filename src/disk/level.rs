//! [`Level`]: one file of a chain, and the block device node QEMU gets for it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::between;
use super::detect::Format;
use super::error::{ImageError, Result};
use super::hold::Held;
use super::on_wire::nbd_node;
use super::remote::Remote;
use super::tables;
use crate::tool::pass::{self, Passed};
use crate::tool::qemu_img::Present;
use crate::tool::spec::Spec;

/// One image file or block device of a chain.
#[derive(Debug, Clone)]
pub struct Level {
    /// Absolute.
    pub path: PathBuf,
    pub format: Format,
    /// The format's name of its kind, e.g. `streamOptimized`.
    pub subformat: Option<String>,
    pub virtual_size: u64,
    /// Length of the file.
    pub size: u64,
    /// Bytes that the file takes on the host.
    pub allocated: u64,
    /// Files of a split image besides `path`.
    pub extents: Vec<PathBuf>,
    /// External data file of a qcow2.
    pub data_file: Option<PathBuf>,
    pub block_device: bool,
    /// Whether it is an overlay of this run, useless after the process has ended.
    pub scratch: bool,
    /// Whether this run made it to be kept: flushed data must survive a loss of power.
    pub(super) durable: bool,
    /// Whether writes to it are compressed.
    pub(super) compress: bool,
    /// The open files: `path`, then the extents, then the data file. None for an overlay of this
    /// run.
    pub(super) held: Vec<Held>,
    /// The file for QEMU in place of a vmdk descriptor with extents, or of a VHD's file.
    pub(super) descriptor: Option<Arc<File>>,
    /// The replacement for the first sector of a VHD.
    pub(super) head: Option<Arc<File>>,
    /// For a fixed VHD, the number of bytes of the file that are the disk.
    pub(super) fixed: Option<u64>,
    /// For a flat VMDK on another host, its extents joined to one raw disk.
    pub(super) flat: Option<Arc<Remote>>,
    /// The file for QEMU in place of a file on another host, with another header.
    pub(super) shown: Option<Arc<Remote>>,
    /// Sparse links over such a disk: a qcow2 with the grains of all of them.
    pub(super) merged: Option<Held>,
    /// Those links, the newest first.
    pub(super) merged_links: Vec<MergedLink>,
    /// An empty image over the backing image, used if this level's header names that by something
    /// other than a path.
    pub(super) between: Option<Arc<File>>,
}

/// One of several links that are read as one image.
#[derive(Debug, Clone)]
pub(super) struct MergedLink {
    /// The number of the level's files that belong to it.
    pub(super) files: usize,
    /// The ranges of its data.
    pub(super) ranges: Vec<Present>,
}

impl Level {
    /// A new file of this run; QEMU opens it by name.
    pub(super) fn of_this_run(path: &Path, format: Format, virtual_size: u64) -> Self {
        Self {
            path: path.to_owned(),
            format,
            subformat: None,
            virtual_size,
            size: 0,
            allocated: 0,
            extents: Vec::new(),
            data_file: None,
            block_device: false,
            scratch: true,
            durable: false,
            compress: false,
            held: Vec::new(),
            descriptor: None,
            head: None,
            fixed: None,
            flat: None,
            shown: None,
            merged: None,
            merged_links: Vec::new(),
            between: None,
        }
    }

    /// An opened file before it was examined.
    pub(super) fn of(file: &Held, format: Format) -> Self {
        Self {
            size: file.size(),
            allocated: file.allocated(),
            block_device: file.is_block_device(),
            scratch: false,
            held: vec![file.clone()],
            ..Self::of_this_run(file.path(), format, 0)
        }
    }

    /// Whether it is a flat VMDK on another host.
    pub(super) fn is_flat_remote(&self) -> bool {
        self.flat.is_some()
    }

    /// The format in which QEMU sees the same disk if it opens the file by name; `None` if QEMU
    /// needs something other than the file.
    pub(crate) fn format_by_name(&self) -> Option<Format> {
        if self.flat.is_some() || self.shown.is_some() || self.merged.is_some() {
            return None;
        }
        match (&self.head, self.fixed) {
            (Some(_), _) => None,
            // The overlay is as large as the disk: the footer behind it is never visible.
            (None, Some(_)) => Some(Format::RAW),
            (None, None) => Some(self.format),
        }
    }

    /// Its open files.
    pub(crate) fn held(&self) -> &[Held] {
        &self.held
    }

    pub(super) fn reference_counts(&self) -> Result<u64> {
        let counts = self.held.first().filter(|_| self.format == Format::QCOW2);
        let counts = counts.map(|held| tables::reference_counts(held.contents(), self.size));
        let counts = counts.transpose();
        Ok(counts
            .map_err(|e| ImageError::from_io(&self.path, e))?
            .unwrap_or(0))
    }

    /// The block device tree of the level, over that of the level below. Connections for it are
    /// added to `sockets`.
    pub(super) fn node(&self, writable: bool, backing: Value, sockets: &mut Vec<Passed>) -> Value {
        let backing = match (&self.between, backing) {
            (Some(between), below) if !below.is_null() => between::under(between, below),
            (_, backing) => backing,
        };
        if let Some(flat) = &self.flat {
            let file = nbd_node(&**flat.file(), sockets);
            return json!({"driver": "raw", "file": file, "read-only": true});
        }
        let shown = self.shown.as_ref();
        let shown = shown.map(|shown| nbd_node(&**shown.file(), sockets));
        let mut file = |held: &Held, name: String| {
            if let Some(remote) = held.remote() {
                return nbd_node(&**remote.file(), sockets);
            }
            json!({
                "driver": if held.is_block_device() { "host_device" } else { "file" },
                "filename": name,
                "read-only": !writable,
                // This process holds the locks, before QEMU starts and after it ends.
                "locking": "off",
                "discard": if writable { "unmap" } else { "ignore" },
            })
        };
        if let Some(merged) = &self.merged {
            let file = file(merged, merged.name());
            return json!({"driver": "qcow2", "file": file, "backing": backing, "read-only": true});
        }
        let own = match (self.held.first(), &self.descriptor) {
            (Some(_), _) if shown.is_some() => shown.unwrap_or_default(),
            (Some(held), Some(descriptor)) => file(held, pass::name(descriptor)),
            (Some(held), None) => file(held, held.name()),
            (None, _) => json!({
                "driver": "file",
                "filename": self.path.to_string_lossy(),
                "read-only": !writable,
                "discard": if writable { "unmap" } else { "ignore" },
            }),
        };
        let data = self.data_file.as_ref().and(self.held.last());
        let data = data.map(|held| file(held, held.name()));
        let mut node = self.format_node(own, data, backing);
        node["read-only"] = (!writable).into();
        node["discard"] = if writable { "unmap" } else { "ignore" }.into();
        let detect = writable && !self.durable;
        node["detect-zeroes"] = if detect { "unmap" } else { "off" }.into();
        if self.scratch && self.subformat.is_none() {
            // The range that QEMU handles at a time where the overlay has no data: 512 MiB instead
            // of 32.
            node["l2-cache-entry-size"] = json!(64 << 10);
        }
        if writable && self.scratch && !self.durable {
            node["cache"] = json!({"no-flush": true});
        }
        node
    }

    fn format_node(&self, file: Value, data: Option<Value>, backing: Value) -> Value {
        if let Some(size) = self.fixed {
            return json!({"driver": "raw", "file": file, "size": size});
        }
        let file = match &self.head {
            Some(_) => json!({"driver": "vmdk", "file": file, "backing": null}),
            None => file,
        };
        let mut node = json!({"driver": self.format.driver(), "file": file});
        if let Some(data) = data {
            node["data-file"] = data;
        }
        if self.format.has_backing() {
            // Null means no backing file, whatever the header names.
            node["backing"] = backing;
        }
        node
    }

    /// The descriptors that its node names.
    pub(super) fn passed(&self, writable: bool) -> Vec<Passed> {
        // A file on another host is reached through a socket.
        let here = self.held.iter().filter(|held| held.remote().is_none());
        let held = here.chain(&self.merged).map(|held| held.passed(writable));
        let descriptor = self.descriptor.iter().chain(&self.head);
        let descriptor = descriptor.chain(&self.between);
        held.chain(descriptor.map(|file| Passed::new(file.clone(), &self.path, false)))
            .collect()
    }

    /// The level without its backing image.
    pub(super) fn spec(&self) -> Spec {
        let mut sockets = Vec::new();
        Spec {
            node: self.node(false, Value::Null, &mut sockets),
            passed: self.passed(false),
            sockets,
            named: Vec::new(),
        }
    }
}
