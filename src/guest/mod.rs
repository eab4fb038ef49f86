//! Access to the file systems inside a disk: [`GuestRead`] to read, [`GuestWrite`] to change.
//!
//! The rest of the program is independent of the engine behind these traits.

pub mod confined;
pub mod embedded;
mod fat_read;
mod fat_write;
pub mod fs;
pub mod fve;
pub(crate) mod guestfish;
mod guestfish_appliance;
mod guestfish_boot;
mod guestfish_mapped;
mod guestfish_tar;
mod guestfish_write;
pub(crate) mod joined;
pub mod keys;
pub mod logfile;
pub mod ntfs3g;
mod ntfs_data;
mod ntfs_layout;
mod ntfs_read;
mod ntfs_record;
mod ntfs_state;
pub mod path;
pub(crate) mod security;
pub(crate) mod spare;
pub mod unpack;
pub mod wof;
mod writer;

#[cfg(test)]
mod tests;

pub use embedded::EmbeddedReader;
pub use guestfish_mapped::MappedReader;
pub use guestfish_write::GuestfishWriter;
pub use path::{GuestPath, PathError};
pub use writer::{EmbeddedWriter, MountedWriter};

use std::sync::Arc;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::disk::layout::Partition;
use crate::error::Errno;
use crate::memory::FileBytes;

/// The number of a disk among those of its VM, from 1 in the order of the source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct DiskId(u32);

impl DiskId {
    /// A disk that needs no number because it is the only one.
    pub const ONLY: Self = Self(0);

    /// The disk at this position of `count` disks, both from 0.
    pub fn nth(position: usize, count: usize) -> Self {
        match count {
            0 | 1 => Self::ONLY,
            _ => Self(u32::try_from(position).map_or(u32::MAX, |n| n.saturating_add(1))),
        }
    }

    /// The number for people and scripts.
    pub fn number(self) -> u32 {
        self.0.max(1)
    }

    pub fn is_only(&self) -> bool {
        *self == Self::ONLY
    }
}

/// The name of a volume of a VM: its disk and its partition index there (0 without a partition
/// table). A reader of one disk ignores the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct VolumeId {
    #[serde(skip_serializing_if = "DiskId::is_only")]
    pub disk: DiskId,
    #[serde(rename = "volume")]
    pub partition: u32,
}

impl VolumeId {
    pub const fn new(partition: u32) -> Self {
        Self::of(DiskId::ONLY, partition)
    }

    pub const fn of(disk: DiskId, partition: u32) -> Self {
        Self { disk, partition }
    }

    /// The same volume for a reader of its disk alone.
    pub const fn within(self) -> Self {
        Self::new(self.partition)
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.disk.is_only() {
            write!(f, "disk {}, ", self.disk.number())?;
        }
        write!(f, "partition {}", self.partition)
    }
}

/// The first number of volumes that are not partitions (LVM, dynamic disks).
pub const FIRST_MAPPED: u32 = 10_001;

/// The contents of a partition, determined from its first sectors and not from its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FsKind {
    Ntfs,
    Fat,
    Exfat,
    Refs,
    Bitlocker,
    Ldm,
    StorageSpaces,
    Ext,
    Xfs,
    Btrfs,
    Lvm,
    Luks,
    Swap,
    Unknown,
}

/// The facts in a volume's metadata that determine whether it may be written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VolumeState {
    /// The `$Volume` dirty flag is set, or the `$LogFile` was not closed.
    pub dirty: bool,
    /// `hiberfil.sys` has a hibernated session (Fast Startup included).
    pub hibernated: bool,
    /// `$LogFile` is of version 2.0: Windows 8 and later may keep parts of the volume in memory.
    /// This is so after Fast Startup, and while Windows runs; a clean shutdown writes version 1.1.
    pub cached: bool,
    /// `\System Volume Information` has shadow-copy stores.
    pub vss_snapshots: bool,
    /// The cluster size in bytes, 0 if unknown.
    pub cluster_size: u32,
    /// Free bytes according to the file system's own allocation map, if known.
    pub free_bytes: Option<u64>,
    /// The protectors of a BitLocker volume, if its metadata is readable.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub protectors: Vec<String>,
    /// The reason why a volume of a known kind could not be opened.
    pub unreadable: Option<String>,
    /// The reason why a BitLocker volume stays closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub closed: Option<fve::Closed>,
    /// The opened container of the file system: BitLocker, LUKS, LVM, a dynamic disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<FsKind>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    pub id: VolumeId,
    pub partition: Partition,
    pub kind: FsKind,
    pub label: Option<String>,
    pub state: VolumeState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    File,
    Dir,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileInfo {
    /// The name as stored, in the guest's own case.
    pub name: String,
    pub kind: FileKind,
    pub size: u64,
    /// Reparse tag (`IO_REPARSE_TAG_*`) if the file is a reparse point.
    pub reparse_tag: Option<u32>,
    /// Whether the data attribute is compressed with LZNT1.
    pub compressed: bool,
    /// Whether the data attribute is encrypted with EFS.
    pub encrypted: bool,
}

pub const IO_REPARSE_TAG_WOF: u32 = 0x8000_0017;

#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error("{0} does not exist or has no file system we can open")]
    NoVolume(VolumeId),
    #[error("{path} does not exist")]
    NotFound { path: String },
    #[error("{path} is not a {expected}")]
    WrongKind {
        path: String,
        expected: &'static str,
    },
    #[error("{path} is {size} bytes, more than the {limit} bytes allowed here")]
    TooLarge { path: String, size: u64, limit: u64 },
    #[error("{path} cannot be read: {reason}")]
    Unreadable { path: String, reason: String },
    #[error("the volume is not safe to write: {reason}")]
    Unsafe { reason: String },
    #[error("no space left on the guest's volume: writing {path}")]
    NoSpace { path: String },
    #[error("{op} {path}: {reason}")]
    Op {
        op: &'static str,
        path: String,
        reason: String,
    },
    /// The same, refused by this host.
    #[error("{op} {path}: {reason}")]
    Host {
        op: &'static str,
        path: String,
        reason: String,
        #[source]
        errno: Errno,
    },
    #[error("reading the disk")]
    Io(#[from] std::io::Error),
    #[error("{what} is not available on this host")]
    MissingTool { what: String, hint: String },
    #[error("the libguestfs appliance does not start: {reason}")]
    Appliance { reason: String, hint: String },
}

impl GuestError {
    pub fn not_found(path: &GuestPath) -> Self {
        let path = path.to_string();
        Self::NotFound { path }
    }

    pub fn wrong_kind(path: &GuestPath, expected: &'static str) -> Self {
        let path = path.to_string();
        Self::WrongKind { path, expected }
    }

    /// Refuses a file of more than `limit` bytes.
    pub fn check_size(path: &GuestPath, size: u64, limit: u64) -> Result<()> {
        match size > limit {
            true => Err(Self::TooLarge {
                path: path.to_string(),
                size,
                limit,
            }),
            false => Ok(()),
        }
    }

    /// The same fault in another operation than reading.
    fn doing(self, op: &'static str) -> Self {
        match self {
            Self::Unreadable { path, reason } => Self::Op { op, path, reason },
            Self::Host {
                path,
                reason,
                errno,
                ..
            } => Self::Host {
                op,
                path,
                reason,
                errno,
            },
            other => other,
        }
    }
}

pub type Result<T, E = GuestError> = std::result::Result<T, E>;

/// Read access to the volumes of a disk. Lookups are case-insensitive, by index, never by scanning.
pub trait GuestRead {
    /// The name of this engine for the report: `embedded` or `guestfish`.
    fn engine(&self) -> &'static str;
    fn volumes(&self) -> &[Volume];
    /// The facts of a file; `None` if it or one of its parents does not exist. Does not follow
    /// reparse points.
    fn stat(&self, volume: VolumeId, path: &GuestPath) -> Result<Option<FileInfo>>;
    /// The entries of a directory without `.`, `..`, NTFS metafiles and 8.3 duplicates.
    fn list(&self, volume: VolumeId, path: &GuestPath) -> Result<Vec<FileInfo>>;
    /// Reads up to `len` bytes from `offset`; fewer only at the end of the file.
    fn read_at(
        &self,
        volume: VolumeId,
        path: &GuestPath,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>>;
    /// Reads the whole file, or fails with [`GuestError::TooLarge`].
    fn read(&self, volume: VolumeId, path: &GuestPath, limit: u64) -> Result<Vec<u8>>;

    /// The free bytes on a volume by its own allocation map, which is read until there are
    /// `enough`. `None` if this engine cannot determine them.
    fn free_bytes(&self, _volume: VolumeId, _enough: u64) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Reads a whole file that will be kept: into huge pages, and without a copy if it is already
    /// in memory.
    fn read_shared(
        &self,
        volume: VolumeId,
        path: &GuestPath,
        limit: u64,
    ) -> Result<Arc<FileBytes>> {
        Ok(Arc::new(self.read(volume, path, limit)?.into()))
    }
}

/// A run of bytes to write inside an existing file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub data: Vec<u8>,
}

/// Write access to the volumes of a disk. It consists of plain requests and replies, so that an
/// engine may run in another process. Nothing is durable before [`GuestWrite::close`] returns `Ok`.
pub trait GuestWrite {
    /// Creates a directory; its parent must exist. Fails if the name exists. The security
    /// descriptor is that of a sibling directory, or of the parent if there is none.
    fn create_dir(&mut self, volume: VolumeId, path: &GuestPath) -> Result<()>;
    /// Creates the file (with the security descriptor of a sibling file) or replaces the contents
    /// of the existing one. That one keeps its MFT record, security descriptor, short name and
    /// attributes. One that NTFS compresses (LZNT1) keeps its security descriptor and becomes a
    /// plain file.
    fn write_file(&mut self, volume: VolumeId, path: &GuestPath, contents: &[u8]) -> Result<()>;
    /// Changes parts of an existing file and sets its size.
    fn patch_file(
        &mut self,
        volume: VolumeId,
        path: &GuestPath,
        size: u64,
        extents: &[Extent],
    ) -> Result<()>;
    /// Changes bytes of the volume's first sector, which no file system driver writes.
    fn patch_boot_sector(&mut self, volume: VolumeId, extents: &[Extent]) -> Result<()>;
    fn remove_file(&mut self, volume: VolumeId, path: &GuestPath) -> Result<()>;
    /// Removes an empty directory.
    fn remove_dir(&mut self, volume: VolumeId, path: &GuestPath) -> Result<()>;
    /// Unmounts every volume and flushes the disk.
    fn close(self: Box<Self>) -> Result<()>;
}

/// The part of a boot sector that is common to all sector sizes.
const BOOT_SECTOR: u64 = 512;

/// Refuses extents that reach past the future size of the file.
fn check_extents(op: &'static str, path: &GuestPath, size: u64, extents: &[Extent]) -> Result<()> {
    let fits = |extent: &Extent| {
        extent
            .offset
            .checked_add(extent.data.len() as u64)
            .is_some_and(|end| end <= size)
    };
    if extents.iter().all(fits) {
        return Ok(());
    }
    Err(GuestError::Op {
        op,
        path: path.to_string(),
        reason: format!("an extent reaches past the new size of {size} bytes"),
    })
}
