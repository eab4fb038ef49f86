//! Block devices and logical volumes as the target of a copy.
//!
//! Unlike a file, a device cannot appear complete under its name. Instead, its first MiB, which has
//! the partition table, is written last. Until then it starts with a [`MARK`] of an unfinished
//! copy, followed by the name of the copy. So nothing boots from a device whose copy failed or was
//! killed, and the next run recognises it. Data behind the end of the copy is not touched.
//!
//! The device is held with `O_EXCL` from the check to the end. The kernel refuses that for a device
//! that is mounted, swapped to, or part of an array or volume group. It also prevents mounts in the
//! meantime.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustix::fs::OFlags;
use serde_json::{Value, json};

use super::chain::Image;
use super::copy::{self, CopyError, CopyOptions, Nothing, convert_error};
use super::direct::RawTarget;
use super::error::ImageError;
use super::export::{Export, ExportError};
use super::hold::{self, Held, Use};
use super::kernel;
use crate::block::{BlockRead, BlockWrite, FileDisk};
use crate::error::{Error, ErrorKind};
use crate::failpoint;
use crate::tool::pass::Passed;
use crate::tool::qemu_img;
use crate::tool::spec::Spec;
use crate::transfer::{ExtentJournal, Extents, Transfer, Zeroes};

/// The range that is written last. Also how far a device is searched for data from either end.
const HEAD: u64 = 1 << 20;
/// The start of such a device until the end of the copy.
const MARK: &[u8] = b"hyper2kvm: the copy to this device was not finished\n";
/// The length of a copy's name.
const NAME: usize = 32;

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
    #[error("{} contains the source {}", path.display(), source_file.display())]
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
                .hint("files are written into a directory: name that with --output-dir"),
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

/// The permitted operations on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Whether it will be written to, not only examined.
    pub write: bool,
    /// Whether existing data on it may be overwritten.
    pub force: bool,
    /// Whether the user guarantees that it reads as zeroes.
    pub zero: bool,
    /// Whether it may contain an unfinished copy that the user wants to continue.
    pub resume: bool,
}

/// A device claimed by this run until it is dropped.
#[derive(Debug)]
pub struct ClaimedDevice {
    path: PathBuf,
    file: Arc<File>,
    size: u64,
    /// Whether it reads as zeroes from end to end.
    blank: bool,
    /// The bytes that are written last; known after the rest is written.
    head: OnceLock<Vec<u8>>,
    /// The name of the copy in progress.
    name: OnceLock<String>,
}

impl ClaimedDevice {
    /// Claims the device for a copy of `image`, or fails with the reason why it is unavailable.
    /// Writes nothing.
    pub fn claim(path: &Path, image: &Image, options: DeviceOptions) -> Result<Self> {
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
            .write(options.write)
            .custom_flags(OFlags::EXCL.bits().cast_signed())
            .open(path)
            .map_err(io_error)?;
        let free = match options.write {
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
        let contents = contents(&disk).map_err(io_error)?;
        match contents {
            Contents::Zeroes => {}
            Contents::Unfinished if options.resume => {}
            _ if options.zero => return Err(DeviceError::NotZero { path: path.into() }),
            Contents::Data if !options.force => {
                return Err(DeviceError::NotEmpty { path: path.into() });
            }
            Contents::Data | Contents::Unfinished => {}
        }
        Ok(Self {
            path: path.into(),
            file: Arc::new(file),
            size,
            blank: options.zero && contents == Contents::Zeroes,
            head: OnceLock::new(),
            name: OnceLock::new(),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Copies everything except the start, makes it durable, and returns the bytes that an earlier
    /// run had copied. `scratch` is the name of a file that may be created.
    pub(crate) fn fill(
        &self,
        source: &Image,
        scratch: &Path,
        how: &CopyOptions,
        progress: &mut dyn FnMut(f64),
    ) -> Result<u64> {
        let (mut journal, name, zeroes) = self.begin(how)?;
        let size = source.virtual_size();
        let from = Export::open_for_copy(source)?;
        let mut head = vec![0; size.min(HEAD) as usize];
        let read = from.disk().read_at(0, &mut head);
        read.map_err(|source| self.io_error(source))?;
        let mut rest = Extents::whole(size);
        rest.remove(0..head.len() as u64);
        let data = copy::ranges(source, how)?.within(&rest);
        let file = self.file.try_clone();
        let file = file.map_err(|source| self.io_error(source))?;
        let target: Arc<dyn BlockWrite> = Arc::new(RawTarget::new(file, size));
        let failed = |e| CopyError::of(e, source.path(), &self.path);
        if zeroes == Zeroes::Write {
            Transfer {
                source: Arc::new(Nothing(size)),
                target: target.clone(),
                ranges: &rest.minus(&data),
                zeroes,
                checkpoint: journal.as_mut().into(),
                pace: None,
                cancel: how.cancel.clone(),
            }
            .run(&mut |_| progress(0.0))
            .map_err(failed)?;
        }
        let moved = Transfer {
            source: from.disk(),
            target,
            ranges: &data,
            zeroes,
            checkpoint: journal.as_mut().into(),
            pace: how.pace.as_ref(),
            cancel: how.cancel.clone(),
        }
        .run(&mut |step| progress(copy::fraction(step, &data)))
        .map_err(failed)?;
        from.close()?;
        if how.compare {
            self.compare(source, scratch, how, &name)?;
        }
        self.head.get_or_init(|| head);
        self.file.sync_all().map_err(|e| self.io_error(e))?;
        Ok(moved.resumed)
    }

    /// Marks the device, unless the record of an earlier run is of the very copy that is on it.
    /// Returns the name of the copy and the handling of zeroes.
    fn begin(&self, how: &CopyOptions) -> Result<(Option<ExtentJournal>, String, Zeroes)> {
        if let Some(record) = &how.record
            && let Some(name) = self.copy_on_it()?
        {
            for zeroes in [Zeroes::Write, Zeroes::Leave] {
                if let Some(journal) = record.open(&known_by(&name, zeroes)).ok().flatten() {
                    self.name.get_or_init(|| name.clone());
                    return Ok((Some(journal), name, zeroes));
                }
            }
        }
        let zeroes = match self.blank {
            true => Zeroes::Leave,
            false => Zeroes::Write,
        };
        let name = uuid::Uuid::new_v4().simple().to_string();
        self.name.get_or_init(|| name.clone());
        self.mark()?;
        let record = how.record.as_ref();
        let journal = record.map(|record| record.create(&known_by(&name, zeroes)));
        let journal = journal.transpose().map_err(CopyError::from)?;
        Ok((journal, name, zeroes))
    }

    /// The name of the unfinished copy on the device.
    fn copy_on_it(&self) -> Result<Option<String>> {
        let mut start = [0; MARK.len() + NAME];
        if self.size < start.len() as u64 {
            return Ok(None);
        }
        let read = self.file.read_exact_at(&mut start, 0);
        read.map_err(|e| self.io_error(e))?;
        let name = start
            .strip_prefix(MARK)
            .and_then(|name| str::from_utf8(name).ok());
        let is_name = |name: &&str| name.bytes().all(|b| b.is_ascii_hexdigit());
        Ok(name.filter(is_name).map(str::to_owned))
    }

    fn compare(&self, source: &Image, scratch: &Path, how: &CopyOptions, name: &str) -> Result<()> {
        let from = self.without_head(source, scratch, name)?;
        let target = Passed::new(self.file.clone(), &self.path, true);
        let to = json!({
            "driver": "host_device",
            "filename": target.name(),
            "locking": "off",
        });
        let to = Spec {
            node: json!({"driver": "raw", "size": source.virtual_size(), "file": to}),
            passed: vec![target],
            sockets: Vec::new(),
            named: Vec::new(),
        };
        let differs = qemu_img::compare(&from.spec(), &to, how.cancel.clone())
            .map_err(|e| DeviceError::from(convert_error(source, &self.path, e)))?;
        match differs {
            None => Ok(()),
            Some(what) => Err(CopyError::Differs {
                path: self.path.clone(),
                what,
            }
            .into()),
        }
    }

    /// The source under an overlay whose start is that of an unfinished copy.
    fn without_head(&self, source: &Image, scratch: &Path, name: &str) -> Result<Image> {
        let _ = std::fs::remove_file(scratch);
        let export = Export::open_overlay(source, scratch)?;
        let head = source.virtual_size().min(HEAD) as usize;
        let written = export.disk().write_at(0, &unfinished(head, name));
        written.map_err(|source| DeviceError::Io {
            path: scratch.into(),
            source,
        })?;
        let image = export.image().clone();
        export.close()?;
        Ok(image)
    }

    /// Writes the start, and with it the partition table: this makes the device a disk.
    pub fn finish(&self) -> Result<()> {
        let Some(head) = self.head.get() else {
            return Ok(());
        };
        // The sector with the mark is the very last one.
        let (mark, rest) = head.split_at(head.len().min(512));
        self.file
            .write_all_at(rest, mark.len() as u64)
            .and_then(|()| self.file.sync_all())
            .and_then(|()| failpoint::hit("device-start"))
            .and_then(|()| self.file.write_all_at(mark, 0))
            .and_then(|()| self.file.sync_all())
            .map_err(|e| self.io_error(e))
    }

    /// Marks the device as an unfinished copy.
    pub fn mark(&self) -> Result<()> {
        let name = self.name.get().map_or("", String::as_str);
        self.file
            .write_all_at(&unfinished(self.size.min(HEAD) as usize, name), 0)
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

/// The start of a device with an unfinished copy.
fn unfinished(len: usize, name: &str) -> Vec<u8> {
    let mut head = [MARK, name.as_bytes()].concat();
    head.resize(len.max(MARK.len()), 0);
    head
}

fn known_by(name: &str, zeroes: Zeroes) -> Value {
    json!({"device": name, "blank": zeroes == Zeroes::Leave})
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    Zeroes,
    /// Left by an earlier run of hyper2kvm.
    Unfinished,
    Data,
}

/// The contents of a device according to its start and its end, where partition tables and file
/// systems are.
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

/// Whether the device is the file, a partition of it, its whole disk, or a loop device over it.
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
impl ClaimedDevice {
    /// A file in the place of a device, which `fill` has left with this start to be written.
    pub(crate) fn of_file(path: &Path, file: File, head: Option<&[u8]>) -> Self {
        Self {
            path: path.into(),
            size: file.metadata().unwrap().len(),
            file: Arc::new(file),
            blank: false,
            head: head.map_or_else(OnceLock::new, |head| OnceLock::from(head.to_vec())),
            name: OnceLock::new(),
        }
    }
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
        // Not examined: the old contents of a thick volume do not matter.
        assert_eq!(case(&[(2 << 20, b"x")]), Contents::Zeroes);
        assert_eq!(case(&[(HEAD - 1, b"x")]), Contents::Data);
        assert_eq!(case(&[((5 << 20) - 512, b"EFI PART")]), Contents::Data);
        // Even if everything else was copied already.
        let copied: [(u64, &[u8]); 2] = [(0, MARK), ((5 << 20) - 512, b"EFI PART")];
        assert_eq!(case(&copied), Contents::Unfinished);
    }

    #[test]
    fn files_are_no_devices() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [0; 512]).unwrap();
        let image = Image::open_info(&path, None, &[]).unwrap();
        let options = DeviceOptions {
            write: false,
            force: true,
            zero: false,
            resume: false,
        };
        for path in [&path, Path::new("/dev/null"), Path::new("/dev")] {
            let error = ClaimedDevice::claim(path, &image, options).unwrap_err();
            assert!(matches!(error, DeviceError::NotADevice { .. }), "{error}");
            assert_eq!(Error::from(error).kind, ErrorKind::Usage);
        }
    }
}
