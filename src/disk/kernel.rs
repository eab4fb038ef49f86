//! The kernel's own use of a file or block device: a loop device over it, a mount, an array.
//!
//! None of these takes a lock that another program sees, so they are looked up.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

const BLOCK_DEVICES: &str = "/sys/block";

/// A loop device over a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoopDevice {
    pub path: PathBuf,
    /// Whether writes through it are refused, so that it cannot change the file.
    pub read_only: bool,
}

/// The loop device over the file with this device and inode number; a writable one, if there is
/// one.
pub fn loop_over(id: (u64, u64)) -> Option<LoopDevice> {
    let devices = fs::read_dir(BLOCK_DEVICES).ok()?.flatten();
    let over = devices.filter(|entry| stands_on(&entry.path(), id));
    let mut over: Vec<_> = over
        .map(|entry| LoopDevice {
            path: Path::new("/dev").join(entry.file_name()),
            read_only: fs::read_to_string(entry.path().join("ro"))
                .is_ok_and(|text| text.trim() == "1"),
        })
        .collect();
    over.sort_by_key(|device| device.read_only);
    over.into_iter().next()
}

/// Whether the block device with this directory in `/sys` is a loop device over the file.
pub fn stands_on(device: &Path, id: (u64, u64)) -> bool {
    let backing = fs::read_to_string(device.join("loop/backing_file"));
    let meta = backing.and_then(|path| fs::metadata(path.trim_end_matches('\n')));
    meta.is_ok_and(|meta| (meta.dev(), meta.ino()) == id)
}

/// Opens a block device exclusively. `None` if it is mounted, swapped to, or part of an array or a
/// volume group. Nobody can mount it while it is open.
pub fn exclusively(name: &str) -> io::Result<Option<File>> {
    let opened = File::options()
        .read(true)
        .custom_flags(OFlags::EXCL.bits().cast_signed())
        .open(name);
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::ResourceBusy => Ok(None),
        Err(e) => Err(e),
    }
}
