//! [`Image`]: an image file with everything it stands on, each file named and each format known.
//!
//! Every file of the chain is opened once and held ([`Held`]) until the image is dropped; whatever is
//! checked or read afterwards, by this process or by QEMU, goes through that descriptor. An image from
//! elsewhere may name any file of this host as its backing file, extent or data file, and its contents
//! would end up in the target: references that leave the folder of the named image are refused unless
//! allowed, by where the opened file really is, and so is everything that is not a plain file name
//! (`nbd://...`, `json:...`).
//!
//! The result is turned into an explicit block device tree of descriptors ([`Image::spec`]), so that
//! QEMU never decides anything itself: no probing, no file we did not look at, and file names with
//! `:`, `,` or `%` are just names. QEMU takes the extents of a vmdk from its descriptor text; it gets
//! one written anew, in which they are descriptors too.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::between;
use super::block::FileDisk;
use super::detect::{self, Detected, Format, VmdkExtent};
use super::hold::{Found, Held, Use};
use super::length::{self, Short};
use super::links;
use super::on_wire::{is_flat, joined, nbd_node, with_head, without_backing};
use super::partition::{self, LayoutError};
use super::remote::{self, ReadAt, Remote};
use super::tables;
use super::vhd;
use crate::error::{Error, ErrorKind};
use crate::source::charset::{Charset, Name};
use crate::source::vmdk;
use crate::tool::confine;
use crate::tool::pass::{self, Passed, Spec};
use crate::tool::{ToolError, qemu_img, qsd};

/// More levels than VMware (32) or anyone's nightly snapshots need.
const MAX_LEVELS: usize = 256;
/// What Hyper-V makes at most; VMware stops at 62 TiB. What is larger has tables that take
/// minutes to go through, and no guest.
const MAX_VIRTUAL_SIZE: u64 = 64 << 40;
const MAX_VMDK_CHECKED: u64 = 256 << 30;
/// Of a qcow2 with clusters of 64 KiB: 8 TiB in the file. Beside them QEMU needs what it always needs.
const MAX_REFERENCE_COUNTS: u64 = 256 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("{} does not exist", path.display())]
    NotFound { path: PathBuf },
    #[error("{}, which {} needs, does not exist", path.display(), needed_by.display())]
    PartMissing { path: PathBuf, needed_by: PathBuf },
    #[error("{} is a folder, not a disk image", path.display())]
    Directory { path: PathBuf },
    #[error("{} is neither a file nor a block device", path.display())]
    NotAFile { path: PathBuf },
    #[error("{} is empty (0 bytes)", path.display())]
    Empty { path: PathBuf },
    #[error("no permission to open {}", path.display())]
    Permission { path: PathBuf },
    #[error("the name of {} is not valid UTF-8, which {what} needs", path.display())]
    NotUtf8 { path: PathBuf, what: &'static str },
    #[error("{} is in use by another process", path.display())]
    InUse { path: PathBuf },
    #[error("{} is in use by {user}", path.display())]
    InKernel {
        path: PathBuf,
        user: String,
        remedy: String,
    },
    #[error("{} is locked by VMware: {} is there", path.display(), lock.display())]
    VmwareLock { path: PathBuf, lock: PathBuf },
    #[error("{} was changed by another program during this run: {what}", path.display())]
    Changed { path: PathBuf, what: String },
    #[error("{} is damaged or incomplete: {reason}", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("{} is cut short: {short}", path.display())]
    Short {
        path: PathBuf,
        short: Short,
        /// It is its partition table that says so.
        table: bool,
    },
    #[error("{} is a {what}, not a disk image", path.display())]
    Packed { path: PathBuf, what: &'static str },
    #[error("{} cannot be read: {reason}", path.display())]
    Unsupported {
        path: PathBuf,
        reason: String,
        remedy: &'static str,
    },
    #[error("unknown image format \"{name}\"")]
    UnknownFormat { name: String },
    #[error("{} refers to {target}, which is outside its folder", path.display())]
    Outside { path: PathBuf, target: String },
    #[error("{} refers to \"{target}\", which is not a file name", path.display())]
    NotAFileName { path: PathBuf, target: String },
    #[error("the backing files of {} form a loop or are more than {MAX_LEVELS}", path.display())]
    TooDeep { path: PathBuf },
    #[error(transparent)]
    Tool(#[from] ToolError),
    #[error("reading {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

pub type Result<T, E = ImageError> = std::result::Result<T, E>;

impl ImageError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::PartMissing { .. } => "copy all files of the disk into one folder".into(),
            Self::Permission { path } => format!(
                "make {} readable for this user, or run as its owner",
                path.display()
            ),
            Self::InUse { .. } => "shut the virtual machine down first".into(),
            Self::InKernel { remedy, .. } => remedy.clone(),
            Self::VmwareLock { lock, .. } => format!(
                "power the VM off in VMware; if it is off on every host, the lock was left behind: remove {}",
                lock.display()
            ),
            Self::Changed { .. } => {
                "see that no virtual machine or backup writes to it, and run this again".into()
            }
            Self::Damaged { .. } => "copy or export the disk again and compare checksums".into(),
            Self::Short { table: true, .. } => partition::SHORT_HINT.into(),
            Self::Short { table: false, .. } => {
                "copy or export the disk again and compare sizes and checksums".into()
            }
            Self::Packed { .. } => "unpack it and name the disk image inside".into(),
            Self::Unsupported { remedy, .. } => (*remedy).to_owned(),
            Self::UnknownFormat { .. } => format!("known are: {}", Format::NAMES),
            Self::Outside { .. } => "if you trust the image, allow that folder with --allow-backing, or put its files into one folder".into(),
            Self::NotAFileName { .. } => {
                "make a stand-alone copy with `qemu-img convert`, if you trust the image".into()
            }
            Self::NotFound { .. } => "check the path".into(),
            Self::Directory { .. } | Self::NotAFile { .. } => "name the disk image itself".into(),
            Self::Empty { .. } => "copy or export the disk again".into(),
            Self::NotUtf8 { .. } => "rename it, or name another output folder with -o".into(),
            Self::TooDeep { .. } => "merge the snapshots on the old host, and copy the disk again".into(),
            Self::Tool(_) | Self::Io { .. } => return None,
        })
    }

    /// Tells from an operating system error what is the matter with the file.
    pub(super) fn from_io(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound { path },
            io::ErrorKind::PermissionDenied => Self::Permission { path },
            _ => Self::Io { path, source },
        }
    }

    /// Tells from what QEMU wrote what is the matter with the image.
    pub(super) fn from_tool(path: &Path, error: ToolError) -> Self {
        let Some(stderr) = error.stderr() else {
            return Self::Tool(error);
        };
        let path = path.to_owned();
        if stderr.contains("log that needs to be replayed") {
            Self::Unsupported {
                path,
                reason: "it was not closed: its log holds writes that are not in their places yet"
                    .into(),
                remedy: "shut the VM down and copy the disk again; after a crash, replay the log on a copy: qemu-img check -r all COPY.vhdx",
            }
        } else if stderr.contains(" allocate ") {
            Self::Unsupported {
                path,
                reason: format!(
                    "its tables need more than the {} MiB of memory that QEMU has here",
                    confine::IMAGE_MEMORY >> 20
                ),
                remedy: "copy it into a format with small tables: qemu-img convert -O qcow2 IMAGE COPY",
            }
        } else if stderr.contains("Failed to get") && stderr.contains("lock") {
            Self::InUse { path }
        } else if stderr.contains("Permission denied") || stderr.contains("Operation not permitted")
        {
            Self::Permission { path }
        } else if stderr.contains("Could not open") || stderr.contains("--blockdev") {
            // The specification is of no use to the reader; the reason follows it.
            let line = stderr.lines().last().unwrap_or_default();
            let reason = line
                .rfind("}': ")
                .map_or(line, |at| &line[at + 4..])
                .to_owned();
            if reason.contains("Unsupported image type") {
                return Self::Unsupported {
                    path,
                    reason,
                    remedy: "make an ordinary disk of it with VMware: vmware-vdiskmanager -r DISK.vmdk -t 0 COPY.vmdk, \
                             or vmkfstools -i on ESXi",
                };
            }
            Self::Damaged { path, reason }
        } else if stderr.contains("Check failed") {
            let reason = stderr.lines().next().unwrap_or_default();
            let reason = reason.trim_start_matches("ERROR: ").to_owned();
            Self::Damaged { path, reason }
        } else {
            Self::Tool(error)
        }
    }
}

impl From<ImageError> for Error {
    fn from(e: ImageError) -> Self {
        let kind = match &e {
            ImageError::Permission { .. } => ErrorKind::MissingTool,
            ImageError::UnknownFormat { .. } => ErrorKind::Usage,
            ImageError::Tool(_) => {
                let ImageError::Tool(tool) = e else {
                    unreachable!()
                };
                return tool.into();
            }
            _ => ErrorKind::Failed,
        };
        let mut error = Self::new(kind, e.to_string());
        if let Some(hint) = e.hint() {
            error = error.hint(hint);
        }
        if let ImageError::Io { source, .. } = e {
            error = error.because(source);
        }
        error
    }
}

/// One image file or block device of a chain.
#[derive(Debug, Clone)]
pub struct Level {
    /// Absolute.
    pub path: PathBuf,
    pub format: Format,
    /// What the format calls its kind, e.g. `streamOptimized`.
    pub subformat: Option<String>,
    pub virtual_size: u64,
    /// Length of the file.
    pub size: u64,
    /// Bytes the file takes on the host.
    pub allocated: u64,
    /// Files of a split image besides `path`.
    pub extents: Vec<PathBuf>,
    /// External data file of a qcow2.
    pub data_file: Option<PathBuf>,
    pub block_device: bool,
    /// An overlay of ours: worth nothing once this process is gone.
    pub scratch: bool,
    /// Made by this run to stay: what was flushed must survive a loss of power.
    durable: bool,
    /// What is written to it is compressed.
    compress: bool,
    /// The open files: `path`, then the extents, then the data file. None of an overlay of ours.
    pub(super) held: Vec<Held>,
    /// What QEMU is given instead of a vmdk descriptor that names extents, or instead of a VHD's file.
    descriptor: Option<Arc<File>>,
    /// The other first sector of a VHD.
    head: Option<Arc<File>>,
    /// A fixed VHD: so many bytes of the file are the disk.
    fixed: Option<u64>,
    /// A flat VMDK on another host: its extents, joined to one raw disk.
    pub(super) flat: Option<Arc<Remote>>,
    /// What QEMU is given instead of a file on another host: with another header.
    shown: Option<Arc<Remote>>,
    /// Sparse links over such a disk: a qcow2 with the grains of all of them.
    pub(super) merged: Option<Held>,
    /// Over what it is on, where its header has a name for that which is no path.
    between: Option<Arc<File>>,
}

/// A disk image with its backing chain.
#[derive(Debug, Clone)]
pub struct Image {
    /// The named image first, then what it is based on. Never empty.
    pub(super) levels: Vec<Level>,
}

impl Image {
    /// Looks at the image and everything it refers to. `format` is what the user says it is; it is
    /// detected otherwise. `allow` lists files and folders that may be referred to besides the
    /// image's own folder.
    pub fn open_info(path: &Path, format: Option<&str>, allow: &[PathBuf]) -> Result<Self> {
        let format = format
            .map(|name| {
                Format::by_name(name).ok_or_else(|| ImageError::UnknownFormat {
                    name: name.to_owned(),
                })
            })
            .transpose()?;
        let path = std::path::absolute(path).map_err(|e| ImageError::from_io(path, e))?;
        let named = Held::open(&path)?;
        let references = References::new(&named, allow);
        let image = Self::open_levels(named, format, &references)?;
        image.held().try_for_each(Held::refuse_if_vmware_has_it)?;
        Ok(image)
    }

    fn open_levels(named: Held, format: Option<Format>, references: &References) -> Result<Self> {
        let path = named.path().to_owned();
        let mut seen = Vec::new();
        let mut levels = Vec::new();
        let mut next = Some((named, format));
        while let Some((file, format)) = next {
            if levels.len() == MAX_LEVELS || seen.contains(&file.id()) {
                return Err(ImageError::TooDeep { path });
            }
            seen.push(file.id());
            let (level, backing) = open_level(file, format, references)?;
            levels.push(level);
            next = backing;
        }
        let image = Self { levels }.with_links_merged()?;
        image.held().try_for_each(Held::refuse_if_vmware_has_it)?;
        Ok(image)
    }

    /// The image with an overlay over it, as created by [`super::Export::open_overlay`].
    pub fn with_overlay(&self, overlay: &Path) -> Result<Self> {
        let path = std::path::absolute(overlay).map_err(|e| ImageError::from_io(overlay, e))?;
        utf8(&path, "the VM's description")?;
        let mut image = Self::scratch(&path, self.virtual_size());
        image.levels.extend_from_slice(&self.levels);
        Ok(image)
    }

    /// A qcow2 of this run alone, without a backing file.
    pub(super) fn scratch(path: &Path, virtual_size: u64) -> Self {
        let levels = vec![Level::of_this_run(path, Format::QCOW2, virtual_size)];
        Self { levels }
    }

    /// A new image file of this run, which is to stay.
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

    /// The same image, for writes that must survive a loss of power.
    pub(super) fn durable(&self) -> Self {
        let mut image = self.clone();
        image.levels[0].durable = true;
        image
    }

    /// By what each file of a source is known again in a later run.
    pub(crate) fn identity(&self) -> Value {
        self.held().map(Held::identity).collect()
    }

    /// What the overlays of this run are on: the image as it was opened.
    pub(crate) fn without_overlays(&self) -> Self {
        let own = self.levels.iter().take_while(|level| level.scratch).count();
        Self {
            levels: self.levels[own..].to_vec(),
        }
    }

    /// What the top level is on.
    pub(crate) fn without_top(&self) -> Self {
        Self {
            levels: self.levels.iter().skip(1).cloned().collect(),
        }
    }

    /// The named image first, then what it is based on.
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

    pub fn format(&self) -> Format {
        self.top().format
    }

    pub fn virtual_size(&self) -> u64 {
        self.top().virtual_size
    }

    /// Bytes all files of the chain take on the host.
    pub fn allocated(&self) -> u64 {
        self.levels
            .iter()
            .fold(0, |sum, level| sum.saturating_add(level.allocated))
    }

    /// Every file the image consists of.
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

    /// What is written when the image is.
    pub fn written(&self) -> impl Iterator<Item = &Path> {
        let top = self.top();
        std::iter::once(&top.path)
            .chain(&top.extents)
            .chain(&top.data_file)
            .map(PathBuf::as_path)
    }

    /// The whole chain as a block device tree whose root node has the name the storage daemon
    /// exports. Only the top level is ever opened for writing.
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

    /// The chain with its two upper levels to be written: for merging the top into the one below.
    pub(crate) fn spec_to_commit(&self) -> Spec {
        self.spec_for(2)
    }

    /// The first `writable` levels are opened for writing.
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

    /// Holds the files that are written with the image as one that writes: nobody else reads them.
    pub fn hold_for_writing(&self) -> Result<()> {
        self.top().held.iter().try_for_each(Held::hold_for_writing)
    }

    /// This run writes the files of the top level from now on.
    pub fn will_be_written(&self) {
        self.top().held.iter().for_each(Held::will_be_written);
    }

    /// Whether each name still leads to the file that is held.
    pub fn check_names(&self) -> Result<()> {
        self.held().try_for_each(Held::check_name)
    }

    /// Fails when the kernel may write to a file of the image: a loop device stands on it, or it is a
    /// block device that is mounted.
    pub fn check_kernel(&self) -> Result<()> {
        self.held()
            .try_for_each(|held| held.check_kernel(Use::Read))
    }

    /// Fails when a file of the image was changed by somebody else since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        self.held().try_for_each(Held::check_unchanged)
    }

    /// The file to read when it is the disk byte for byte, so that nothing has to translate.
    pub(super) fn plain_file(&self) -> Option<&Held> {
        let [level] = &self.levels[..] else {
            return None;
        };
        let whole = level.virtual_size == level.size;
        let plain = level.format == Format::RAW && whole;
        level.held.first().filter(|_| plain)
    }

    /// Checks the metadata of every level: finds files that were cut short, which QEMU would
    /// otherwise read as zeroes.
    pub fn check(&self) -> Result<()> {
        // Of a vmdk QEMU looks whether each block ends in its file, one by one: of a large one that takes minutes,
        // and the tables were looked at when it was opened.
        let quick =
            |level: &&Level| level.format != Format::VMDK || level.virtual_size <= MAX_VMDK_CHECKED;
        let has_check = |level: &&Level| level.format.has_check() && level.flat.is_none();
        let levels = self.levels.iter().filter(has_check);
        for level in levels.filter(quick) {
            let counts = level.reference_counts()?;
            if counts > MAX_REFERENCE_COUNTS {
                // In a longer file QEMU would need more memory than it has, however sound the image is.
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

impl Level {
    /// A new file of this run; QEMU opens it by its name.
    fn of_this_run(path: &Path, format: Format, virtual_size: u64) -> Self {
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
            between: None,
        }
    }

    /// A file that was opened, before it was looked at.
    fn of(file: &Held, format: Format) -> Self {
        Self {
            path: file.path().to_owned(),
            format,
            subformat: None,
            virtual_size: 0,
            size: file.size(),
            allocated: file.allocated(),
            extents: Vec::new(),
            data_file: None,
            block_device: file.is_block_device(),
            scratch: false,
            durable: false,
            compress: false,
            held: vec![file.clone()],
            descriptor: None,
            head: None,
            fixed: None,
            flat: None,
            shown: None,
            merged: None,
            between: None,
        }
    }

    /// Whether it is a flat VMDK on another host.
    pub(super) fn is_flat_remote(&self) -> bool {
        self.flat.is_some()
    }

    /// The format in which QEMU sees the same disk when it opens the file by its name; `None` where it is
    /// given something else than the file.
    pub(crate) fn format_by_name(&self) -> Option<Format> {
        if self.flat.is_some() || self.shown.is_some() || self.merged.is_some() {
            return None;
        }
        match (&self.head, self.fixed) {
            (Some(_), _) => None,
            // The overlay is as large as the disk: the footer behind it is never seen.
            (None, Some(_)) => Some(Format::RAW),
            (None, None) => Some(self.format),
        }
    }

    /// Its open files.
    pub(crate) fn held(&self) -> &[Held] {
        &self.held
    }

    fn reference_counts(&self) -> Result<u64> {
        let counts = self.held.first().filter(|_| self.format == Format::QCOW2);
        let counts = counts.map(|held| tables::reference_counts(held.contents(), self.size));
        let counts = counts.transpose();
        Ok(counts
            .map_err(|e| ImageError::from_io(&self.path, e))?
            .unwrap_or(0))
    }

    /// The block device tree of the level, over that of what is below it. Connections for it are added to
    /// `sockets`.
    fn node(&self, writable: bool, backing: Value, sockets: &mut Vec<Passed>) -> Value {
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
            // How far QEMU sees at a time in what the overlay does not have: 512 MiB instead of 32.
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
            // Null says: none, whatever the header names.
            node["backing"] = backing;
        }
        node
    }

    /// The descriptors its node names.
    fn passed(&self, writable: bool) -> Vec<Passed> {
        // What is on another host comes through a socket.
        let here = self.held.iter().filter(|held| held.remote().is_none());
        let held = here.chain(&self.merged).map(|held| held.passed(writable));
        let descriptor = self
            .descriptor
            .iter()
            .chain(&self.head)
            .chain(&self.between);
        held.chain(descriptor.map(|file| Passed::new(file.clone(), &self.path, false)))
            .collect()
    }

    /// The level alone.
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

/// Of which size QEMU is to take the disk of a VHD.
fn show_vhd(level: &mut Level, file: &Held) -> io::Result<()> {
    match vhd::shown(file.contents(), file.size())? {
        Some(vhd::Shown::Raw(size)) => level.fixed = Some(size),
        Some(vhd::Shown::Head(bytes)) if file.remote().is_some() => {
            level.shown = file.remote().map(|remote| with_head(remote, bytes));
        }
        Some(vhd::Shown::Head(bytes)) => {
            let head = in_memory(&bytes)?;
            let text = vhd::descriptor(&pass::name(&head), &file.name(), file.size());
            level.descriptor = Some(Arc::new(in_memory(text.as_bytes())?));
            level.head = Some(Arc::new(head));
        }
        None => {}
    }
    Ok(())
}

type Backing = Option<(Held, Option<Format>)>;

fn open_level(
    file: Held,
    format: Option<Format>,
    references: &References,
) -> Result<(Level, Backing)> {
    let path = &file.path().to_owned();
    let io_error = |e| ImageError::from_io(path, e);
    let size = file.size();
    if size == 0 {
        return Err(ImageError::Empty { path: path.into() });
    }
    let format = match format {
        Some(format) => format,
        None => detected(&file)?,
    };
    let mut level = Level::of(&file, format);
    if format == Format::RAW {
        // Nothing QEMU could say about it; it counts in sectors, too.
        level.virtual_size = size.checked_next_multiple_of(512).unwrap_or(u64::MAX);
        refuse_if_huge(&level)?;
        if let Some(short) = short_by_table(&file).map_err(io_error)? {
            return Err(short_at(path, short, true));
        }
        return Ok((level, None));
    }
    if format == Format::VMDK {
        open_extents(&mut level, &file, references)?;
    }
    if level.flat.is_some() {
        return flat_level(level, &file, references);
    }
    if let Some(short) = length::image(file.contents(), size, format).map_err(io_error)? {
        return Err(short_at(path, short, false));
    }
    if format == Format::VPC && detect::no_vhd(file.contents(), size).map_err(io_error)? {
        return Err(cut_vhd(&file)?);
    }
    if detect::lost_footer(file.contents(), size, format).map_err(io_error)? {
        return Err(ImageError::Damaged {
            path: path.into(),
            reason: "the footer at its end is missing".into(),
        });
    }
    refuse_differencing(file.contents(), size, path, format)?;
    if format == Format::VPC {
        show_vhd(&mut level, &file).map_err(io_error)?;
    }
    if format == Format::QCOW2
        && let Some(fault) = tables::qcow2(file.contents(), size).map_err(io_error)?
    {
        let (path, reason) = (path.to_owned(), fault.to_string());
        return Err(match fault {
            tables::Fault::Shared { .. } => ImageError::Damaged { path, reason },
            _ => ImageError::Unsupported {
                path,
                reason,
                remedy: "copy the disk without them: qemu-img convert -O qcow2 IMAGE COPY",
            },
        });
    }
    if format == Format::QCOW2
        && let Some(name) = detect::qcow2_data_file(file.contents(), size).map_err(io_error)?
    {
        let name = Name::new(Charset::default(), &name);
        let data = references.open(path, &name)?;
        let short = length::data_file(file.contents(), size, data.size()).map_err(io_error)?;
        if let Some(short) = short {
            return Err(short_at(data.path(), short, false));
        }
        level.data_file = Some(data.path().to_owned());
        level.held.push(data);
    }

    let info = qemu_img::info(&level.spec()).map_err(|e| ImageError::from_tool(path, e))?;
    if info.encrypted {
        return Err(ImageError::Unsupported {
            path: path.into(),
            reason: "the image is encrypted".into(),
            remedy: "make a decrypted copy of the image first",
        });
    }
    level.virtual_size = info.virtual_size;
    refuse_if_huge(&level)?;
    level.allocated = info.actual_size.unwrap_or(level.allocated);
    let data = info.format_specific.map(|f| f.data).unwrap_or_default();
    level.subformat = data.create_type;
    if data.corrupt == Some(true) {
        return Err(ImageError::Damaged {
            path: path.into(),
            reason: "QEMU has marked it as corrupt".into(),
        });
    }
    if data.data_file.is_some() && level.data_file.is_none() {
        return Err(ImageError::Damaged {
            path: path.into(),
            reason: "QEMU finds a data file where its header names none".into(),
        });
    }
    if info.backing_filename.is_some() {
        level.shown = without_backing(&file, format).map_err(io_error)?;
    }
    let backing = match info.backing_filename {
        Some(name) if !name.is_empty() => {
            let name = backing_name(&name, &file, format).map_err(io_error)?;
            let file = references.open(path, &name)?;
            if remote::backing(&name.text).is_some() {
                let between = between::empty(level.virtual_size).map_err(io_error)?;
                level.between = Some(Arc::new(between));
            }
            let format = match info.backing_filename_format {
                Some(name) => {
                    Some(Format::by_name(&name).ok_or(ImageError::UnknownFormat { name })?)
                }
                None => None,
            };
            Some((file, format))
        }
        _ => None,
    };
    Ok((level, backing))
}

/// What QEMU would say of a flat VMDK: its descriptor says it all.
fn flat_level(mut level: Level, file: &Held, references: &References) -> Result<(Level, Backing)> {
    let path = file.path();
    level.virtual_size = level.flat.as_ref().map_or(0, |flat| flat.file().size());
    level.subformat = Some("flat".into());
    level.allocated = level.virtual_size;
    refuse_if_huge(&level)?;
    let parent = vmdk::parent(path, file.contents(), file.size());
    if let Some(parent) = parent.map_err(|e| ImageError::from_io(path, e))? {
        // Flat all the same: nothing of the parent shows through.
        references.open(path, &parent)?;
    }
    Ok((level, None))
}

/// The name of the backing file that QEMU found; from the image itself where its bytes are no UTF-8,
/// which QEMU does not tell, or are text in another encoding.
fn backing_name(told: &str, image: &Held, format: Format) -> io::Result<Name> {
    let (file, size) = (image.contents(), image.size());
    let own = match format {
        Format::VMDK => vmdk::parent(image.path(), file, size)?,
        _ => {
            let bytes = detect::backing_name(file, size)?;
            let bytes = bytes.filter(|bytes| std::str::from_utf8(bytes).is_err());
            bytes.map(|bytes| Name::new(Charset::default(), &bytes))
        }
    };
    Ok(own.unwrap_or_else(|| Name::new(Charset::default(), told.as_bytes())))
}

/// Before anything goes through the whole of it.
fn refuse_if_huge(level: &Level) -> Result<()> {
    if level.virtual_size <= MAX_VIRTUAL_SIZE {
        return Ok(());
    }
    Err(ImageError::Unsupported {
        path: level.path.clone(),
        reason: format!(
            "its disk has {} TiB, and at most {} TiB are converted",
            level.virtual_size >> 40,
            MAX_VIRTUAL_SIZE >> 40
        ),
        remedy: "shrink the disk on the old host: no VMware or Hyper-V disk is larger than 64 TiB",
    })
}

/// Whether a raw disk of that name is rather a damaged image, or no image at all.
fn claims_a_format(path: &Path) -> bool {
    let stem = path
        .file_stem()
        .and_then(|s| s.to_str())
        .unwrap_or_default();
    match path
        .extension()
        .and_then(|s| s.to_str())
        .map(str::to_ascii_lowercase)
    {
        // The extents of a flat vmdk are raw: `vm-flat.vmdk`, `vm-f001.vmdk`.
        Some(ext) if ext == "vmdk" => !stem
            .rsplit_once('-')
            .is_some_and(|(_, part)| part == "flat" || part.starts_with('f')),
        Some(ext) => matches!(&*ext, "qcow2" | "vhd" | "vhdx" | "vdi"),
        None => false,
    }
}

/// For names that go into text.
fn utf8<'p>(path: &'p Path, what: &'static str) -> Result<&'p str> {
    path.to_str().ok_or_else(|| ImageError::NotUtf8 {
        path: path.into(),
        what,
    })
}

/// The format of a file that nobody named.
fn detected(file: &Held) -> Result<Format> {
    let path = file.path();
    let detected = detect::detect(file.contents(), file.size());
    match detected.map_err(|e| ImageError::from_io(path, e))? {
        Detected::Image(Format::RAW) if !file.is_block_device() && named_vhd(path) => {
            Err(cut_vhd(file)?)
        }
        Detected::Image(Format::RAW) if !file.is_block_device() && claims_a_format(path) => {
            Err(ImageError::Damaged {
                path: path.into(),
                reason: "it does not hold the format its name says".into(),
            })
        }
        Detected::Image(format) => Ok(format),
        Detected::Packed(what) => Err(ImageError::Packed {
            path: path.into(),
            what,
        }),
    }
}

/// Opens the files a vmdk consists of besides the named one, and writes the descriptor that QEMU gets.
fn open_extents(level: &mut Level, file: &Held, references: &References) -> Result<()> {
    let path = file.path();
    let io_error = |e| ImageError::from_io(path, e);
    let Some(text) = detect::vmdk_descriptor(file.contents(), file.size()).map_err(io_error)?
    else {
        if detect::is_sparse_vmdk(file.contents(), file.size()).map_err(io_error)? {
            return Ok(());
        }
        // QEMU would take any text for a descriptor, and open what it names.
        return Err(ImageError::Damaged {
            path: path.into(),
            reason: "it begins neither like a VMDK nor like the descriptor of one".into(),
        });
    };
    let charset = vmdk::charset(&text);
    for extent in detect::parse_extents(&text) {
        let name = Name::new(charset, &extent.name);
        let mut part = references.open(path, &name)?;
        if let Some(remote) = part.remote()
            && !is_flat(&extent)
        {
            // QEMU opens the sparse extents of a descriptor as files and in no other way.
            remote::fetch(part.path(), remote).map_err(|e| ImageError::from_io(part.path(), e))?;
            part = references.open(path, &name)?;
        }
        refuse_nested(&part, &extent)?;
        let short = length::extent(part.contents(), part.size(), &extent);
        if let Some(short) = short.map_err(io_error)? {
            return Err(short_at(part.path(), short, false));
        }
        level.extents.push(part.path().to_owned());
        level.held.push(part);
    }
    if level
        .held
        .iter()
        .skip(1)
        .any(|part| part.remote().is_some())
    {
        level.flat = Some(joined(path, &text, &level.held[1..])?);
        return Ok(());
    }
    let names = level.held.iter().skip(1).map(Held::name);
    let text = detect::with_extents(&text, names).map_err(|line| ImageError::Damaged {
        path: path.into(),
        reason: format!("its descriptor has an extent nobody understands: {line}"),
    })?;
    level.descriptor = Some(Arc::new(in_memory(&text).map_err(io_error)?));
    Ok(())
}

fn short_at(path: &Path, short: Short, table: bool) -> ImageError {
    ImageError::Short {
        path: path.into(),
        short,
        table,
    }
}

/// What ends behind the end of a raw disk. It may be shorter than what QEMU makes of it, full sectors.
fn short_by_table(file: &Held) -> io::Result<Option<Short>> {
    let layout = match file.remote() {
        Some(remote) => partition::read_layout(&**remote),
        None => partition::read_layout(&FileDisk::from_file(file.file().try_clone()?)?),
    };
    Ok(match layout {
        Err(LayoutError::Short(short)) => Some(short),
        // Whoever reads the table comes upon it again.
        _ => None,
    })
}

fn named_vhd(path: &Path) -> bool {
    let extension = path.extension();
    extension.is_some_and(|e| e.eq_ignore_ascii_case("vhd"))
}

/// A VHD without footers is a fixed one that was cut: it begins as a raw disk does.
fn cut_vhd(file: &Held) -> Result<ImageError> {
    const FOOTER: u64 = 512;
    let (path, size) = (file.path(), file.size());
    let by_table = short_by_table(file).map_err(|e| ImageError::from_io(path, e))?;
    let short = by_table.unwrap_or_else(|| Short {
        what: "the footer of a fixed VHD".into(),
        // In the sector that was begun, or behind the last one.
        needs: match size % FOOTER {
            0 => size.saturating_add(FOOTER),
            _ => size.next_multiple_of(FOOTER),
        },
        has: size,
    });
    Ok(short_at(path, short, false))
}

/// QEMU would follow a descriptor in an extent to further files.
fn refuse_nested(part: &Held, extent: &VmdkExtent) -> Result<()> {
    let nested = detect::vmdk_descriptor(part.contents(), part.size())
        .map_err(|e| ImageError::from_io(part.path(), e))?;
    // Whatever it lists: QEMU may see more in it than we do.
    if nested.is_some() && !extent.kind.eq_ignore_ascii_case("FLAT") {
        return Err(ImageError::Damaged {
            path: part.path().into(),
            reason: "an extent that has extents itself".into(),
        });
    }
    Ok(())
}

/// A file without a name.
fn in_memory(bytes: &[u8]) -> io::Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::memfd_create("vmdk", flags)?);
    io::Write::write_all(&mut file, bytes)?;
    Ok(file)
}

/// QEMU cannot combine these with their parents. A differencing VHD it even reads as if it had none:
/// zeroes where the parent's data should be.
fn refuse_differencing(file: &dyn ReadAt, size: u64, path: &Path, format: Format) -> Result<()> {
    let io_error = |e| ImageError::from_io(path, e);
    let refused = |kind: &str, parent: Option<String>, remedy: &'static str| {
        let parent = parent.map_or(String::new(), |p| format!(" {}", shown(&p)));
        Err(ImageError::Unsupported {
            path: path.into(),
            reason: format!(
                "it is a differencing {kind}, which QEMU cannot combine with its parent{parent}"
            ),
            remedy,
        })
    };
    match format {
        Format::VPC => {
            for offset in [0, size.saturating_sub(512)] {
                let footer = detect::read_up_to(file, offset, 512, size).map_err(io_error)?;
                if detect::vhd_type(&footer) == Some(4) {
                    return refused(
                        "VHD",
                        None,
                        "merge it with its parent first (Hyper-V: Merge-VHD)",
                    );
                }
            }
        }
        Format::VHDX => {
            let parent = links::vhdx_parent(file, size).map_err(io_error)?;
            if !parent.is_empty() {
                let name = |key: &str| {
                    parent
                        .iter()
                        .find(|(k, _)| k == key)
                        .map(|(_, v)| v.clone())
                };
                return refused(
                    "VHDX (a checkpoint's .avhdx)",
                    name("absolute_win32_path").or(name("relative_path")),
                    "delete the checkpoints in Hyper-V and wait for the merge, or make one disk of the chain with Convert-VHD",
                );
            }
        }
        Format::VDI => {
            // uuidLinkage of the header: the parent's id.
            let link = detect::read_up_to(file, 424, 16, size).map_err(io_error)?;
            if link.iter().any(|b| *b != 0) {
                return refused(
                    "VDI (a snapshot of VirtualBox)",
                    None,
                    "make one disk of the chain with VBoxManage clonemedium",
                );
            }
        }
        _ => {}
    }
    Ok(())
}

/// Which files a chain may refer to.
struct References {
    /// Canonical files and folders.
    roots: Vec<PathBuf>,
}

impl References {
    fn new(named: &Held, allow: &[PathBuf]) -> Self {
        let is_file = !named.is_block_device();
        // The folder as named, and the one the file really is in. What lies beside a device, or in
        // the root folder, has nothing to do with it.
        let own = [
            named.path().parent().map(Path::to_owned),
            named
                .real()
                .ok()
                .and_then(|p| p.parent().map(Path::to_owned)),
        ];
        let roots = own
            .into_iter()
            .flatten()
            .filter_map(|folder| folder.canonicalize().ok())
            .filter(|folder| is_file && folder.parent().is_some())
            .chain(allow.iter().filter_map(|path| path.canonicalize().ok()))
            .collect();
        Self { roots }
    }

    /// Opens the file `name` means in the image `path`, when that may be. By the name it was given:
    /// its own references are relative to that.
    fn open(&self, path: &Path, name: &Name) -> Result<Held> {
        let text = &name.text;
        if let Some(placeholder) = remote::backing(text) {
            return Held::open(&placeholder);
        }
        // What QEMU would take for a protocol.
        let protocol = text
            .find([':', '/'])
            .is_some_and(|at| text.as_bytes()[at] == b':');
        if protocol || text.is_empty() || text.contains('\0') {
            return Err(ImageError::NotAFileName {
                path: path.into(),
                target: shown(text),
            });
        }
        let spellings = name.spellings().into_iter();
        let files = spellings.map(|name| remote::resolve(path, Path::new(&name)));
        let mut missing = None;
        for file in files {
            match Found::by_name(&file) {
                Ok(found) => {
                    let real = found.real().map_err(|e| ImageError::from_io(&file, e))?;
                    if !self.roots.iter().any(|root| real.starts_with(root)) {
                        return Err(self.outside(path, text));
                    }
                    return found.hold();
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    missing.get_or_insert(file);
                }
                // Not even whether a file elsewhere exists is told.
                Err(_) => return Err(self.outside(path, text)),
            }
        }
        match missing {
            Some(file) if self.allows_missing(&file) => Err(ImageError::PartMissing {
                path: file,
                needed_by: path.into(),
            }),
            _ => Err(self.outside(path, text)),
        }
    }

    fn allows_missing(&self, file: &Path) -> bool {
        file.parent()
            .and_then(|folder| folder.canonicalize().ok())
            .is_some_and(|folder| self.roots.iter().any(|root| folder.starts_with(root)))
    }

    fn outside(&self, path: &Path, name: &str) -> ImageError {
        ImageError::Outside {
            path: path.into(),
            target: shown(name),
        }
    }
}

fn shown(name: &str) -> String {
    crate::tool::clean(name.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_claim_a_format() {
        for (name, want) in [
            ("a.vmdk", true),
            ("a-flat.vmdk", false),
            ("a-f001.vmdk", false),
            ("a.b-c.VMDK", true),
            ("a.vhdx", true),
            ("a.img", false),
            ("disk", false),
        ] {
            assert_eq!(claims_a_format(Path::new(name)), want, "{name}");
        }
    }

    #[test]
    fn reasons_without_specification() {
        let fail = |stderr: &str| {
            use std::os::unix::process::ExitStatusExt;
            let error = ToolError::Failed {
                tool: "qemu-img".into(),
                status: std::process::ExitStatus::from_raw(256),
                stderr: stderr.into(),
            };
            ImageError::from_tool(Path::new("/d/x"), error)
        };
        let text = "qemu-img: Could not open 'json:{\"a\":{}}': File truncated";
        assert!(
            matches!(fail(text), ImageError::Damaged { reason, .. } if reason == "File truncated")
        );
        let text = "qemu-img: Could not open 'json:{}': Unsupported image type 'custom'";
        assert!(matches!(fail(text), ImageError::Unsupported { .. }));
        let text = "x: Failed to get shared \"write\" lock\nIs another process using it?";
        assert!(matches!(fail(text), ImageError::InUse { .. }));
        let text = "qemu-img: Could not open '/d/x': Permission denied";
        assert!(matches!(fail(text), ImageError::Permission { .. }));
        assert!(matches!(fail("qemu-img: odd"), ImageError::Tool(_)));
    }
}
