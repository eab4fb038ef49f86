//! [`Image`]: an image file with everything it stands on, each file named and each format known.
//!
//! Every level of the chain is opened by itself and without its backing file; what it refers to is
//! checked before anything opens that. An image from elsewhere may name any file of this host as
//! its backing file, extent or data file, and its contents would end up in the target: references
//! that leave the folder of the named image are refused unless allowed, and so is everything that
//! is not a plain file name (`nbd://...`, `json:...`).
//!
//! The result is turned into an explicit block device tree ([`Image::blockdev`]), so that QEMU
//! never decides anything itself: no probing, no backing file we did not look at, and file names
//! with `:`, `,` or `%` are just names.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::block::FileDisk;
use super::detect::{self, Detected, Format};
use super::length::{self, Short};
use super::partition::{self, LayoutError};
use crate::error::{Error, ErrorKind};
use crate::tool::{ToolError, qemu_img, qsd};

/// More levels than VMware (32) or anyone's nightly snapshots need.
const MAX_LEVELS: usize = 256;

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
    #[error("the name of {} is not valid UTF-8, which QEMU needs", path.display())]
    NotUtf8 { path: PathBuf },
    #[error("{} is in use by another process", path.display())]
    InUse { path: PathBuf },
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
            Self::NotUtf8 { .. } => "rename the file".into(),
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
        if stderr.contains("Failed to get") && stderr.contains("lock") {
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
#[derive(Debug, Clone, PartialEq, Eq)]
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
}

/// A disk image with its backing chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The named image first, then what it is based on. Never empty.
    levels: Vec<Level>,
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
        let mut references = References::new(&path, allow);
        let mut levels = Vec::new();
        let mut next = Some((path.clone(), format));
        while let Some((file, format)) = next {
            if levels.len() == MAX_LEVELS || !references.visit(&file) {
                return Err(ImageError::TooDeep { path });
            }
            let (level, backing) = open_level(&file, format, &references)?;
            levels.push(level);
            next = backing;
        }
        Ok(Self { levels })
    }

    /// The image with an overlay over it, as created by [`super::Export::open_overlay`].
    pub fn with_overlay(&self, overlay: &Path) -> Result<Self> {
        let path = std::path::absolute(overlay).map_err(|e| ImageError::from_io(overlay, e))?;
        utf8(&path)?;
        let mut levels = vec![Level {
            path,
            format: Format::QCOW2,
            subformat: None,
            virtual_size: self.virtual_size(),
            size: 0,
            allocated: 0,
            extents: Vec::new(),
            data_file: None,
            block_device: false,
            scratch: true,
        }];
        levels.extend_from_slice(&self.levels);
        Ok(Self { levels })
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

    /// Every file of the image, and whether it is written when the image is.
    pub fn files_to_open(&self, writable: bool) -> Vec<(PathBuf, bool)> {
        let own = |level: &Level, written: bool| {
            let files = std::iter::once(&level.path)
                .chain(&level.extents)
                .chain(&level.data_file);
            files
                .map(|file| (file.clone(), written))
                .collect::<Vec<_>>()
        };
        let levels = self.levels.iter().enumerate();
        levels
            .flat_map(|(i, level)| own(level, writable && i == 0))
            .collect()
    }

    /// The whole chain as a block device tree whose root node has the name the storage daemon
    /// exports. Only the top level is ever opened for writing.
    pub fn blockdev(&self, writable: bool) -> Value {
        let mut node = Value::Null;
        for (i, level) in self.levels.iter().enumerate().rev() {
            node = level.node(writable && i == 0, node);
        }
        node["node-name"] = qsd::NODE.into();
        node
    }

    /// The chain for `qemu-img`, read-only.
    pub fn spec(&self) -> Value {
        let mut node = self.blockdev(false);
        if let Some(map) = node.as_object_mut() {
            map.remove("node-name");
        }
        node
    }

    /// Refuses an image another process writes to; for writing, also one that others read.
    ///
    /// QEMU checks its locks itself, but an NBD export allows others whatever they like, so that
    /// for raw images there would never be a conflict.
    pub(super) fn refuse_if_in_use(&self, writable: bool) -> Result<()> {
        // An overlay of ours is known to nobody else.
        let levels = self.levels.iter().enumerate().filter(|(_, l)| !l.scratch);
        for (i, level) in levels {
            let own = std::iter::once(&level.path)
                .chain(&level.extents)
                .chain(&level.data_file);
            for path in own {
                let file = File::open(path).map_err(|e| ImageError::from_io(path, e))?;
                refuse_if_locked(&file, path, writable && i == 0)?;
            }
        }
        Ok(())
    }

    /// The file to read when it is the disk byte for byte, so that nothing has to translate.
    pub(super) fn plain_file(&self) -> Option<&Path> {
        let [level] = &self.levels[..] else {
            return None;
        };
        let whole = level.virtual_size == level.size;
        (level.format == Format::RAW && whole).then_some(&level.path)
    }

    /// Checks the metadata of every level: finds files that were cut short, which QEMU would
    /// otherwise read as zeroes.
    pub fn check(&self) -> Result<()> {
        for level in self.levels.iter().filter(|l| l.format.has_check()) {
            let result = qemu_img::check(&level.node(false, Value::Null))
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
    fn node(&self, writable: bool, backing: Value) -> Value {
        let file = |path: &Path, device: bool| {
            json!({
                "driver": if device { "host_device" } else { "file" },
                "filename": path.to_string_lossy(),
                "read-only": !writable,
                "discard": if writable { "unmap" } else { "ignore" },
            })
        };
        let mut node = json!({
            "driver": self.format.driver(),
            "read-only": !writable,
            "discard": if writable { "unmap" } else { "ignore" },
            "detect-zeroes": if writable { "unmap" } else { "off" },
            "file": file(&self.path, self.block_device),
        });
        if self.scratch {
            // How far QEMU sees at a time in what the overlay does not have: 512 MiB instead of 32.
            node["l2-cache-entry-size"] = json!(64 << 10);
        }
        if writable && self.scratch {
            node["cache"] = json!({"no-flush": true});
        }
        if let Some(data) = &self.data_file {
            node["data-file"] = file(data, false);
        }
        if self.format.has_backing() {
            // Null says: none, whatever the header names.
            node["backing"] = backing;
        }
        node
    }
}

/// Looks for the locks by which QEMU says what it does with an image: read locks on single bytes
/// of the file (`block/file-posix.c`, `RAW_LOCK_PERM_BASE`).
///
/// A lock of our own shows by which device number the kernel lists the file; `stat` gives another one on
/// btrfs. It also keeps an image that is read without QEMU ([`super::Export`]) from being written to.
pub(super) fn refuse_if_locked(file: &File, path: &Path, to_write: bool) -> Result<()> {
    const READS: u64 = 100;
    const WRITES: u64 = 101;
    let operation = if to_write {
        FlockOperation::NonBlockingLockExclusive
    } else {
        FlockOperation::NonBlockingLockShared
    };
    match flock(file, operation) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) if to_write => {
            return Err(ImageError::InUse { path: path.into() });
        }
        // Where there are no locks there is nothing to find.
        Err(_) => return Ok(()),
    }
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let _ = flock(file, FlockOperation::Unlock);
    let inode = file
        .metadata()
        .map_err(|e| ImageError::from_io(path, e))?
        .ino();
    let ranges = locked_ranges(&locks, std::process::id(), inode);
    let locked = |byte: u64| ranges.iter().any(|range| range.contains(&byte));
    if locked(WRITES) || to_write && locked(READS) {
        return Err(ImageError::InUse { path: path.into() });
    }
    Ok(())
}

/// The ranges locked in the file with this inode on which process `pid` holds an flock.
fn locked_ranges(locks: &str, pid: u32, inode: u64) -> Vec<RangeInclusive<u64>> {
    // Locks side by side are listed as one.
    // `1: OFDLCK ADVISORY READ -1 fe:00:1234 101 101`; waiting locks have `->` after the number.
    let entries: Vec<Vec<&str>> = locks
        .lines()
        .map(|line| line.split_whitespace().skip(1).collect())
        .collect();
    let (pid, inode) = (pid.to_string(), format!(":{inode}"));
    let own = entries.iter().find_map(|e| match e[..] {
        ["FLOCK", _, _, holder, file, ..] if holder == pid && file.ends_with(&inode) => Some(file),
        _ => None,
    });
    entries
        .iter()
        .filter_map(|e| match e[..] {
            ["OFDLCK", _, _, _, file, start, end] if Some(file) == own => {
                Some(start.parse().ok()?..=end.parse().unwrap_or(u64::MAX))
            }
            _ => None,
        })
        .collect()
}

type Backing = Option<(PathBuf, Option<Format>)>;

fn open_level(
    path: &Path,
    format: Option<Format>,
    references: &References,
) -> Result<(Level, Backing)> {
    utf8(path)?;
    let io_error = |e| ImageError::from_io(path, e);
    let meta = path.metadata().map_err(io_error)?;
    let block_device = meta.file_type().is_block_device();
    if meta.is_dir() {
        return Err(ImageError::Directory { path: path.into() });
    }
    // Opening a pipe would wait for ever.
    if !meta.is_file() && !block_device {
        return Err(ImageError::NotAFile { path: path.into() });
    }
    let mut file = File::open(path).map_err(io_error)?;
    let size = io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(io_error)?;
    if size == 0 {
        return Err(ImageError::Empty { path: path.into() });
    }
    refuse_if_locked(&file, path, false)?;
    let format = match format {
        Some(format) => format,
        None => match detect::detect(&file, size).map_err(io_error)? {
            Detected::Image(format) => {
                if format == Format::RAW && !block_device && claims_a_format(path) {
                    if named_vhd(path) {
                        return Err(cut_vhd(&file, size, path)?);
                    }
                    return Err(ImageError::Damaged {
                        path: path.into(),
                        reason: "it does not hold the format its name says".into(),
                    });
                }
                format
            }
            Detected::Packed(what) => {
                return Err(ImageError::Packed {
                    path: path.into(),
                    what,
                });
            }
        },
    };
    let mut level = Level {
        path: path.into(),
        format,
        subformat: None,
        virtual_size: 0,
        size,
        allocated: meta.blocks().saturating_mul(512),
        extents: Vec::new(),
        data_file: None,
        block_device,
        scratch: false,
    };
    if format == Format::RAW {
        // Nothing QEMU could say about it; it counts in sectors, too.
        level.virtual_size = size.next_multiple_of(512);
        if let Some(short) = short_by_table(&file).map_err(io_error)? {
            return Err(short_at(path, short, true));
        }
        return Ok((level, None));
    }
    if format == Format::VMDK {
        level.extents = vmdk_extents(&file, size, path, references)?;
    }
    if let Some(short) = length::image(&file, size, format).map_err(io_error)? {
        return Err(short_at(path, short, false));
    }
    if format == Format::VPC && detect::no_vhd(&file, size).map_err(io_error)? {
        return Err(cut_vhd(&file, size, path)?);
    }
    if detect::lost_footer(&file, size, format).map_err(io_error)? {
        return Err(ImageError::Damaged {
            path: path.into(),
            reason: "the footer at its end is missing".into(),
        });
    }
    if format == Format::VPC {
        refuse_differencing_vhd(&file, size, path)?;
    }

    let info = qemu_img::info(&level.node(false, Value::Null))
        .map_err(|e| ImageError::from_tool(path, e))?;
    if info.encrypted {
        return Err(ImageError::Unsupported {
            path: path.into(),
            reason: "the image is encrypted".into(),
            remedy: "make a decrypted copy of the image first",
        });
    }
    level.virtual_size = info.virtual_size;
    level.allocated = info.actual_size.unwrap_or(level.allocated);
    let data = info.format_specific.map(|f| f.data).unwrap_or_default();
    level.subformat = data.create_type;
    if data.corrupt == Some(true) {
        return Err(ImageError::Damaged {
            path: path.into(),
            reason: "QEMU has marked it as corrupt".into(),
        });
    }
    if let Some(name) = data.data_file {
        let file_name = references.resolve(path, &name)?;
        let size_of = |p: &Path| p.metadata().map(|m| m.len());
        let data_size = size_of(&file_name).map_err(|e| ImageError::from_io(&file_name, e))?;
        if let Some(short) = length::data_file(&file, size, data_size).map_err(io_error)? {
            return Err(short_at(&file_name, short, false));
        }
        level.data_file = Some(file_name);
    }
    let backing = match info.backing_filename {
        Some(name) if !name.is_empty() => {
            let file = references.resolve(path, &name)?;
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

fn utf8(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| ImageError::NotUtf8 { path: path.into() })
}

fn vmdk_extents(
    file: &File,
    size: u64,
    path: &Path,
    references: &References,
) -> Result<Vec<PathBuf>> {
    let extents = detect::vmdk_extents(file, size).map_err(|e| ImageError::from_io(path, e))?;
    let mut files = Vec::new();
    for extent in extents {
        let name = references.resolve(path, &extent.name)?;
        let io_error = |e| ImageError::from_io(&name, e);
        let part = File::open(&name).map_err(io_error)?;
        let size = part.metadata().map_err(io_error)?.len();
        // QEMU would follow a descriptor in an extent to further files.
        let nested = detect::vmdk_extents(&part, size).map_err(io_error)?;
        if !nested.is_empty() && !extent.kind.eq_ignore_ascii_case("FLAT") {
            return Err(ImageError::Damaged {
                path: name,
                reason: "an extent that has extents itself".into(),
            });
        }
        if let Some(short) = length::extent(&part, size, &extent).map_err(io_error)? {
            return Err(short_at(&name, short, false));
        }
        files.push(name);
    }
    Ok(files)
}

fn short_at(path: &Path, short: Short, table: bool) -> ImageError {
    ImageError::Short {
        path: path.into(),
        short,
        table,
    }
}

/// What ends behind the end of a raw disk. It may be shorter than what QEMU makes of it, full sectors.
fn short_by_table(file: &File) -> io::Result<Option<Short>> {
    let disk = FileDisk::from_file(file.try_clone()?)?;
    Ok(match partition::read_layout(&disk) {
        Err(LayoutError::Short(short)) => Some(short),
        // Whoever reads the table comes upon it again.
        _ => None,
    })
}

fn named_vhd(path: &Path) -> bool {
    path.extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("vhd"))
}

/// A VHD without footers is a fixed one that was cut: it begins as a raw disk does.
fn cut_vhd(file: &File, size: u64, path: &Path) -> Result<ImageError> {
    const FOOTER: u64 = 512;
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

/// QEMU reads a differencing VHD as if it had no parent: zeroes where the parent's data should be.
fn refuse_differencing_vhd(file: &File, size: u64, path: &Path) -> Result<()> {
    for offset in [0, size.saturating_sub(512)] {
        let footer = detect::read_up_to(file, offset, 512, size)
            .map_err(|e| ImageError::from_io(path, e))?;
        if detect::vhd_type(&footer) == Some(4) {
            return Err(ImageError::Unsupported {
                path: path.into(),
                reason: "it is a differencing VHD, which QEMU cannot combine with its parent"
                    .into(),
                remedy: "merge it with its parent first (Hyper-V: Merge-VHD)",
            });
        }
    }
    Ok(())
}

/// Which files a chain may refer to.
struct References {
    /// Canonical files and folders.
    roots: Vec<PathBuf>,
    seen: Vec<PathBuf>,
}

impl References {
    fn new(named: &Path, allow: &[PathBuf]) -> Self {
        let is_file = named.metadata().is_ok_and(|m| m.is_file());
        // The folder as named, and the one the file really is in. What lies beside a device, or in
        // the root folder, has nothing to do with it.
        let own = [
            named.parent().map(Path::to_owned),
            named
                .canonicalize()
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
        Self {
            roots,
            seen: Vec::new(),
        }
    }

    /// False when the file was visited before.
    fn visit(&mut self, path: &Path) -> bool {
        let Ok(path) = path.canonicalize() else {
            // It does not exist: opening it will say so.
            return true;
        };
        let new = !self.seen.contains(&path);
        self.seen.push(path);
        new
    }

    /// The file `name` means in the image `path`, when it may be opened.
    fn resolve(&self, path: &Path, name: &str) -> Result<PathBuf> {
        // What QEMU would take for a protocol.
        let protocol = name
            .find([':', '/'])
            .is_some_and(|at| name.as_bytes()[at] == b':');
        if protocol || name.is_empty() || name.contains('\0') {
            return Err(ImageError::NotAFileName {
                path: path.into(),
                target: shown(name),
            });
        }
        let file = path.parent().unwrap_or(Path::new("/")).join(name);
        let real = match file.canonicalize() {
            Ok(real) => real,
            Err(e) if e.kind() == io::ErrorKind::NotFound && self.allows_missing(&file) => {
                return Err(ImageError::PartMissing {
                    path: file,
                    needed_by: path.into(),
                });
            }
            // Not even whether a file elsewhere exists is told.
            Err(_) => return Err(self.outside(path, name)),
        };
        let kind = real.metadata().map_err(|e| ImageError::from_io(&real, e))?;
        if !self.roots.iter().any(|root| real.starts_with(root)) {
            return Err(self.outside(path, name));
        }
        if !kind.is_file() && !kind.file_type().is_block_device() {
            return Err(ImageError::NotAFile { path: real });
        }
        // By the name it was given: its own references are relative to that.
        Ok(file)
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
    fn locks_of_one_file() {
        let locks = "1: OFDLCK ADVISORY  READ -1 fe:00:77 101 101\n\
                     2: FLOCK  ADVISORY  READ 5 00:2a:77 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 6 00:2a:77 0 EOF\n\
                     3: OFDLCK ADVISORY  READ -1 00:2a:77 100 101\n\
                     4: OFDLCK ADVISORY  READ -1 00:2a:77 201 EOF\n\
                     5: POSIX  ADVISORY  WRITE 9 00:2a:177 101 101\nnonsense\n\n";
        assert_eq!(locked_ranges(locks, 5, 77), [100..=101, 201..=u64::MAX]);
        assert!(locked_ranges(locks, 6, 77).is_empty());
        assert!(locked_ranges("", 5, 77).is_empty());
    }

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
        let text = "x: Failed to get shared \"write\" lock\nIs another process using it?";
        assert!(matches!(fail(text), ImageError::InUse { .. }));
        let text = "qemu-img: Could not open '/d/x': Permission denied";
        assert!(matches!(fail(text), ImageError::Permission { .. }));
        assert!(matches!(fail("qemu-img: odd"), ImageError::Tool(_)));
    }
}
