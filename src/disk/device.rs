//! Block devices and logical volumes as the target of a copy.
//!
//! A device cannot appear whole under its name as a file can. What takes the place of that: its first
//! MiB, which holds the partition table, is written last, and until then it starts with a [`MARK`]
//! that says so. A copy that failed or was killed is a device that nothing boots from and that the next
//! run knows for what it is. What lies beyond the end of the copy is not touched.
//!
//! The device is held with `O_EXCL` from the check to the end: the kernel refuses that for what is
//! mounted, swapped to, or part of an array or volume group, and lets nobody mount it meanwhile.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustix::fs::OFlags;
use serde_json::json;

use super::block::{BlockRead, FileDisk};
use super::chain::{Image, ImageError};
use super::copy::{CopyError, CopyOptions, convert_error};
use super::export::{Export, ExportError};
use super::hold::{self, Held, Use};
use super::kernel;
use crate::error::{Error, ErrorKind};
use crate::tool::pass::{Passed, Spec};
use crate::tool::qemu_img;

/// What is written last. Also how far a device is looked at, from either end, for data.
const HEAD: u64 = 1 << 20;
/// What such a device starts with until the end.
const MARK: &[u8] = b"hyper2kvm: the copy to this device was not finished\n";

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("{} is not a block device below /dev", path.display())]
    NotADevice { path: PathBuf },
    #[error("{} is in use: mounted, or part of an array or a volume group", path.display())]
    Busy { path: PathBuf },
    #[error("no permission to write {}", path.display())]
    Permission { path: PathBuf },
    #[error("{} is too small: {size} bytes, {needed} bytes needed", path.display())]
    TooSmall {
        path: PathBuf,
        size: u64,
        needed: u64,
    },
    #[error("{} is not empty", path.display())]
    NotEmpty { path: PathBuf },
    #[error("{} does not read as zeroes", path.display())]
    NotZero { path: PathBuf },
    #[error("{} holds the source {}", path.display(), source_file.display())]
    IsSource { path: PathBuf, source_file: PathBuf },
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error("accessing {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

pub type Result<T, E = DeviceError> = std::result::Result<T, E>;

impl From<DeviceError> for Error {
    fn from(e: DeviceError) -> Self {
        let text = e.to_string();
        match e {
            DeviceError::Image(e) => e.into(),
            DeviceError::Export(e) => e.into(),
            DeviceError::Copy(e) => e.into(),
            DeviceError::Io { source, .. } => Self::failed(text).because(source),
            DeviceError::NotADevice { .. } => Self::usage(text)
                .hint("files are written into a folder: name that with --output-dir"),
            DeviceError::Busy { .. } => {
                Self::failed(text).hint("unmount it, or name another device")
            }
            DeviceError::Permission { .. } => Self::new(ErrorKind::MissingTool, text)
                .hint("run as root or as a member of the group that owns it"),
            DeviceError::TooSmall { .. } => {
                Self::failed(text).hint("make it larger (lvextend), or name another device")
            }
            DeviceError::NotEmpty { .. } => {
                Self::failed(text).hint("--force overwrites what is on it")
            }
            DeviceError::NotZero { .. } => {
                Self::failed(text).hint("leave --target-is-zero out: zeroes are then written")
            }
            DeviceError::IsSource { .. } => {
                Self::usage(text).hint("--in-place changes the source itself")
            }
        }
    }
}

/// What may be done with a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// It will be written to, and not only looked at.
    pub write: bool,
    /// Whatever is on it may go.
    pub force: bool,
    /// The user says that it reads as zeroes.
    pub zero: bool,
}

/// A device that is ours until this goes.
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    file: Arc<File>,
    size: u64,
    /// What comes last; known once the rest is there.
    head: OnceLock<Vec<u8>>,
}

impl Device {
    /// Takes the device for a copy of `image`, or says why it cannot be had. Writes nothing.
    pub fn claim(path: &Path, image: &Image, terms: Terms) -> Result<Self> {
        let io_error = |source| DeviceError::Io {
            path: path.into(),
            source,
        };
        let absolute = std::path::absolute(path).map_err(io_error)?;
        let path = absolute.as_path();
        let io_error = |source: io::Error| match source.kind() {
            io::ErrorKind::ResourceBusy => DeviceError::Busy { path: path.into() },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                DeviceError::Permission { path: path.into() }
            }
            _ => DeviceError::Io {
                path: path.into(),
                source,
            },
        };
        let meta = path.metadata().map_err(io_error)?;
        if !meta.file_type().is_block_device() || !path.starts_with("/dev") {
            return Err(DeviceError::NotADevice { path: path.into() });
        }
        for held in image.held() {
            if is_same(meta.rdev(), held).map_err(io_error)? {
                return Err(DeviceError::IsSource {
                    path: path.into(),
                    source_file: held.path().into(),
                });
            }
        }
        let file = File::options()
            .read(true)
            .write(terms.write)
            .custom_flags(OFlags::EXCL.bits().cast_signed())
            .open(path)
            .map_err(io_error)?;
        let free = match terms.write {
            true => hold::lock_for_writing(&file),
            false => hold::lock(&file, Use::Write),
        };
        if !free.map_err(io_error)? {
            return Err(ImageError::InUse { path: path.into() }.into());
        }
        let disk = FileDisk::from_file(file.try_clone().map_err(io_error)?).map_err(io_error)?;
        let (size, needed) = (disk.size(), image.virtual_size());
        if size < needed {
            return Err(DeviceError::TooSmall {
                path: path.into(),
                size,
                needed,
            });
        }
        match contents(&disk).map_err(io_error)? {
            Contents::Zeroes => {}
            _ if terms.zero => return Err(DeviceError::NotZero { path: path.into() }),
            Contents::Data if !terms.force => {
                return Err(DeviceError::NotEmpty { path: path.into() });
            }
            Contents::Data | Contents::Unfinished => {}
        }
        Ok(Self {
            path: path.into(),
            file: Arc::new(file),
            size,
            head: OnceLock::new(),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// Copies everything but the start, and makes it durable. `scratch` is the name of a file that may
    /// be made.
    pub fn fill(
        &self,
        source: &Image,
        scratch: &Path,
        how: &CopyOptions,
        progress: &mut dyn FnMut(f64),
    ) -> Result<()> {
        self.mark()?;
        let (from, head) = self.without_head(source, scratch)?;
        let target = Passed::new(self.file.clone(), &self.path, true);
        let to = json!({
            "driver": "host_device",
            "filename": target.name(),
            "locking": "off",
            "discard": "unmap",
        });
        let to = Spec {
            node: json!({"driver": "raw", "size": source.virtual_size(), "file": to}),
            passed: vec![target],
            sockets: Vec::new(),
            named: Vec::new(),
        };
        let target = qemu_img::Target::Existing {
            spec: &to,
            zero: how.target_is_zero,
        };
        let tool_error = |e| DeviceError::from(convert_error(source, &self.path, e));
        qemu_img::convert(&from.spec(), target, how.cancel.clone(), progress)
            .map_err(tool_error)?;
        if how.compare
            && let Some(what) =
                qemu_img::compare(&from.spec(), &to, how.cancel.clone()).map_err(tool_error)?
        {
            return Err(CopyError::Differs {
                path: self.path.clone(),
                what,
            }
            .into());
        }
        self.head.get_or_init(|| head);
        self.file.sync_all().map_err(|e| self.io_error(e))
    }

    /// The source under an overlay in which its start is that of an unfinished copy, and the start.
    /// (A `raw` node with an offset would say the same, but QEMU 10 takes what its image has from a
    /// backing file for zeroes.)
    fn without_head(&self, source: &Image, scratch: &Path) -> Result<(Image, Vec<u8>)> {
        let export = Export::open_overlay(source, scratch)?;
        let disk = export.disk();
        let mut head = vec![0; source.virtual_size().min(HEAD) as usize];
        disk.read_at(0, &mut head)
            .and_then(|()| disk.write_at(0, &unfinished(head.len())))
            .map_err(|source| DeviceError::Io {
                path: scratch.into(),
                source,
            })?;
        let image = export.image().clone();
        export.close()?;
        Ok((image, head))
    }

    /// Writes the start, and with it the partition table: from now on this is a disk.
    pub fn finish(&self) -> Result<()> {
        let Some(head) = self.head.get() else {
            return Ok(());
        };
        // The sector with the mark is the very last.
        let (mark, rest) = head.split_at(head.len().min(512));
        self.file
            .write_all_at(rest, mark.len() as u64)
            .and_then(|()| self.file.sync_all())
            .and_then(|()| self.file.write_all_at(mark, 0))
            .and_then(|()| self.file.sync_all())
            .map_err(|e| self.io_error(e))
    }

    /// Makes it a device whose copy was not finished.
    pub fn mark(&self) -> Result<()> {
        self.file
            .write_all_at(&unfinished(self.size.min(HEAD) as usize), 0)
            .and_then(|()| self.file.sync_all())
            .map_err(|e| self.io_error(e))
    }

    fn io_error(&self, source: io::Error) -> DeviceError {
        DeviceError::Io {
            path: self.path.clone(),
            source,
        }
    }
}

/// The start of a device whose copy was not finished.
fn unfinished(len: usize) -> Vec<u8> {
    let mut head = MARK.to_vec();
    head.resize(len, 0);
    head
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    Zeroes,
    /// Left by a run of ours.
    Unfinished,
    Data,
}

/// What is on a device, going by its start and its end: partition tables and file systems are there.
fn contents(disk: &dyn BlockRead) -> io::Result<Contents> {
    let len = disk.size().min(HEAD);
    let mut bytes = vec![0; len as usize];
    disk.read_at(0, &mut bytes)?;
    if bytes.starts_with(MARK) {
        return Ok(Contents::Unfinished);
    }
    let mut zeroes = bytes.iter().all(|b| *b == 0);
    disk.read_at(disk.size() - len, &mut bytes)?;
    zeroes &= bytes.iter().all(|b| *b == 0);
    Ok(if zeroes {
        Contents::Zeroes
    } else {
        Contents::Data
    })
}

/// Whether the device is the file, a partition of it, the disk it is a partition of, or a loop device
/// over it.
fn is_same(device: u64, held: &Held) -> io::Result<bool> {
    let system = |number: u64| {
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()
    };
    let meta = held.file().metadata()?;
    let Some(ours) = system(device) else {
        return Ok(held.is_block_device() && meta.rdev() == device);
    };
    if held.is_block_device() {
        return Ok(system(meta.rdev())
            .is_some_and(|theirs| ours.starts_with(&theirs) || theirs.starts_with(&ours)));
    }
    Ok(kernel::stands_on(&ours, (meta.dev(), meta.ino())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_a_device() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("device");
        let case = |bytes: &[(u64, &[u8])]| {
            let file = File::create(&path).unwrap();
            file.set_len(5 << 20).unwrap();
            for (at, bytes) in bytes {
                file.write_all_at(bytes, *at).unwrap();
            }
            contents(&FileDisk::open(&path).unwrap()).unwrap()
        };
        assert_eq!(case(&[]), Contents::Zeroes);
        // Not looked at: what a thick volume held once does not matter.
        assert_eq!(case(&[(2 << 20, b"x")]), Contents::Zeroes);
        assert_eq!(case(&[(HEAD - 1, b"x")]), Contents::Data);
        assert_eq!(case(&[((5 << 20) - 512, b"EFI PART")]), Contents::Data);
        // Whatever else was copied already.
        let copied: [(u64, &[u8]); 2] = [(0, MARK), ((5 << 20) - 512, b"EFI PART")];
        assert_eq!(case(&copied), Contents::Unfinished);
    }

    #[test]
    fn files_are_no_devices() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [0; 512]).unwrap();
        let image = Image::open_info(&path, None, &[]).unwrap();
        let terms = Terms {
            write: false,
            force: true,
            zero: false,
        };
        for path in [&path, Path::new("/dev/null"), Path::new("/dev")] {
            let error = Device::claim(path, &image, terms).unwrap_err();
            assert!(matches!(error, DeviceError::NotADevice { .. }), "{error}");
            assert_eq!(Error::from(error).kind, ErrorKind::Usage);
        }
    }
}
