//! `.ova` archives, and unpacking of disks that are unreadable in place.
//!
//! An OVA is a tar of an OVF package. Opening it reads the descriptor and the manifest and only
//! locates the disks. [`prepare`] then reads each disk once, writes it, decompresses it if needed
//! and compares its digest. The written file has no name, and holes for its zeroes.

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::manifest::{Hasher, check_bytes};
use super::tar::{Member, TarError};
use super::{
    MAX_DESCRIPTION, Packed, Result, SourceDisk, SourceError, SourceKind, SourceVm, ovf, stem, tar,
    vmdk,
};
use crate::disk::charset::text_of;
use crate::files::open_file;

const COPY_BUFFER: usize = 1 << 20;

pub fn open(path: &Path, options: &super::Options) -> Result<SourceVm> {
    let mut file = open_file(path).map_err(|e| io_error("opening", path, e))?;
    let mut magic = [0; 6];
    let read = file
        .read(&mut magic)
        .map_err(|e| io_error("reading", path, e))?;
    if let Some(what) = packed_as(&magic[..read]) {
        return Err(SourceError::Unsupported {
            path: path.into(),
            what: format!("an OVA that is {what}"),
            remedy: "an OVA is a plain tar; unpack it and name the .ova or .ovf in it",
        });
    }
    let members = tar::members(&file).map_err(|error| match error {
        TarError::Io(source) => io_error("reading", path, source),
        other => invalid(path, other.to_string()),
    })?;
    let with = |extension: &str| {
        let dotted = format!(".{extension}");
        members
            .iter()
            .filter(|m| !super::is_apple_double(Path::new(&m.name)))
            .filter(move |m| m.name.to_ascii_lowercase().ends_with(&dotted))
    };
    let descriptor = match with("ovf").collect::<Vec<_>>().as_slice() {
        [] => return Err(invalid(path, "it has no .ovf".into())),
        [one] => *one,
        several => {
            return Err(SourceError::SeveralMachines {
                path: path.into(),
                count: several.len(),
            });
        }
    };
    let text = read_member(path, &mut file, descriptor)?;
    let (mut vm, disks) = ovf::parse(path, &text, options)?;
    vm.kind = SourceKind::Ova;
    if vm.name.is_empty() {
        vm.name = stem(path);
    }
    if let Some(member) = with("mf").next() {
        let bytes = read_member(path, &mut file, member)?;
        vm.take_manifest(&bytes)
            .map_err(|reason| invalid(path, format!("{}: {reason}", super::clean(&member.name))))?;
        check_bytes(path, &vm.manifest, base(&descriptor.name), &text)?;
    }
    for disk in disks {
        // Hrefs are relative to the descriptor, which may be in a directory of the archive.
        let folder = descriptor.name.strip_suffix(base(&descriptor.name));
        let wanted = |name: &OsString| {
            let name = text_of(name.as_encoded_bytes());
            format!("{}{name}", folder.unwrap_or_default())
        };
        let member = disk.names.iter().find_map(|name| {
            let wanted = wanted(name);
            let member = members.iter().find(|m| same_name(&m.name, &wanted))?;
            Some((text_of(name.as_encoded_bytes()), member))
        });
        let Some((name, member)) = member else {
            return Err(SourceError::MissingDisk {
                path: path.into(),
                missing: path.join(super::clean(&disk.href)),
                disk: super::clean(&disk.href),
            });
        };
        vm.disks.push(SourceDisk {
            name: super::clean(&disk.href),
            path: path.into(),
            format: disk.format,
            controller: disk.controller,
            order: disk.order,
            packed: Some(Packed {
                name,
                member: Some((member.offset, member.size)),
                gzip: disk.gzip || starts_with(&file, member, &ovf::GZIP),
                capacity: disk.capacity,
            }),
        });
    }
    Ok(vm)
}

/// The actual format of a file that should be a tar.
fn packed_as(magic: &[u8]) -> Option<&'static str> {
    const KINDS: [(&[u8], &str); 6] = [
        (b"\x1f\x8b", "a gzip'd archive"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\xfd7zXZ\0", "an xz'd archive"),
        (b"\x28\xb5\x2f\xfd", "a zstd'd archive"),
        (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive"),
        (b"BZh", "a bzip2'd archive"),
    ];
    let kind = KINDS.iter().find(|(start, _)| magic.starts_with(start));
    kind.map(|(_, what)| *what)
}

fn starts_with(file: &File, member: &Member, start: &[u8]) -> bool {
    let mut bytes = vec![0; start.len()];
    let read = std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, member.offset);
    member.size >= start.len() as u64 && read.is_ok() && bytes == start
}

/// Implements [`SourceVm::prepare`].
pub(super) fn prepare(vm: &mut SourceVm, work: &Path, most: Option<u64>) -> Result<()> {
    for (n, disk) in vm.disks.iter_mut().enumerate() {
        let entry = match &disk.packed {
            Some(packed) => vm.manifest.of(&packed.name),
            None => vm.manifest.of_path(&disk.path),
        };
        let mut hasher = entry.map(|e| Hasher::new(e.algorithm));
        let target = disk.packed.as_ref().map(|packed| {
            let base = base(&packed.name);
            let base = if packed.gzip {
                base.strip_suffix(".gz").unwrap_or(base)
            } else {
                base
            };
            // Numbered, because a package may use one name in two directories.
            work.join(format!("{n}-{}", super::clean(base)))
        });
        let mut unpacked = None;
        match (&disk.packed, &target) {
            (Some(packed), Some(target)) => {
                let folder = work.ancestors().find(|folder| folder.is_dir());
                let folder = folder.unwrap_or(Path::new("/"));
                let limit = Limit::of(packed, folder, most)
                    .map_err(|e| io_error("looking for space in", folder, e))?;
                unpacked = Some(unpack(&disk.path, packed, target, &limit, hasher.as_mut())?);
            }
            _ => {
                let Some(hasher) = hasher.as_mut() else {
                    continue;
                };
                let file = open_file(&disk.path).map_err(|e| io_error("opening", &disk.path, e))?;
                copy(file, &mut io::sink(), Some(hasher))
                    .map_err(|e| io_error("reading", &disk.path, e))?;
            }
        }
        if let (Some(entry), Some(hasher)) = (entry, hasher) {
            let actual = hasher.finish();
            if actual != entry.digest {
                return Err(SourceError::Checksum {
                    path: disk.path.clone(),
                    file: super::clean(&entry.file),
                    algorithm: entry.algorithm.name(),
                    expected: entry.digest.clone(),
                    actual,
                });
            }
        }
        if let (Some(target), Some(file)) = (target, unpacked) {
            let file = Arc::new(file);
            // Only this process has the file; the link is for names and messages. It is created
            // last, so a run that is killed while it unpacks leaves nothing.
            let mut folder = DirBuilder::new();
            folder
                .recursive(true)
                .mode(0o700)
                .create(work)
                .map_err(|e| io_error("creating", work, e))?;
            let open = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
            std::os::unix::fs::symlink(open, &target)
                .map_err(|e| io_error("creating", &target, e))?;
            vm.unpacked.0.push(file);
            disk.path = target;
            disk.packed = None;
            // From here on, QEMU could follow names in the image.
            vmdk::check_files(&disk.path)?;
        }
    }
    Ok(())
}

/// Unpacks to a file without a name; `target` is its name in messages.
fn unpack(
    source: &Path,
    packed: &Packed,
    target: &Path,
    limit: &Limit,
    hasher: Option<&mut Hasher>,
) -> Result<File> {
    let mut file = open_file(source).map_err(|e| io_error("opening", source, e))?;
    let (offset, size) = packed.member.unwrap_or((0, u64::MAX));
    if !packed.gzip && packed.member.is_some() && size > limit.bytes {
        return Err(limit.exceeded(source));
    }
    file.seek(SeekFrom::Start(offset))
        .map_err(|e| io_error("reading", source, e))?;
    let out = nameless(&limit.folder).map_err(|e| io_error("creating", target, e))?;
    let mut holes = Holes { file: &out, at: 0 };
    let input = file.take(size);
    let mut full = false;
    let copied = if packed.gzip {
        // The digest is of the packed file, so it is computed before decompression.
        let mut tee = Tee { input, hasher };
        let most = limit.bytes.saturating_add(1);
        let inflated = flate2::read::MultiGzDecoder::new(&mut tee).take(most);
        copy(inflated, &mut holes, None).and_then(|n| {
            full = n == most;
            match full {
                true => Ok(n),
                false => io::copy(&mut tee, &mut io::sink()),
            }
        })
    } else {
        copy(input, &mut holes, hasher)
    };
    let length = holes.at;
    match copied.and_then(|n| out.set_len(length).map(|()| n)) {
        Ok(_) if full => Err(limit.exceeded(source)),
        Ok(n) if packed.gzip || packed.member.is_none_or(|(_, size)| n == size) => Ok(out),
        Ok(_) => Err(io_error(
            "reading",
            source,
            io::ErrorKind::UnexpectedEof.into(),
        )),
        Err(error) => Err(io_error("unpacking", target, error)),
    }
}

/// A file without a name, so that nothing of it remains however this process ends.
fn nameless(folder: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::TMPFILE;
    match rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // The file system does not support them (NFS, some FUSE).
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {
            tempfile::NamedTempFile::new_in(folder).map(tempfile::NamedTempFile::into_file)
        }
        Err(e) => Err(e.into()),
    }
}

/// The limit for unpacking a disk.
struct Limit {
    bytes: u64,
    declared: Option<u64>,
    free: u64,
    folder: PathBuf,
}

impl Limit {
    /// The smaller of the disk's declared size and the free space less a tenth, unless the user
    /// sets more.
    fn of(packed: &Packed, folder: &Path, most: Option<u64>) -> io::Result<Self> {
        /// An image is never much larger than its disk, whatever its format adds.
        const TABLES: u64 = 64 << 20;
        let space = rustix::fs::statvfs(folder)?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        let declared = packed.capacity.map_or(u64::MAX, |capacity| {
            capacity.saturating_add(capacity / 8).saturating_add(TABLES)
        });
        let bytes = declared.min(free - free / 10);
        Ok(Self {
            bytes: most.map_or(bytes, |most| most.max(bytes)),
            declared: packed.capacity,
            free,
            folder: folder.into(),
        })
    }

    fn exceeded(&self, path: &Path) -> SourceError {
        SourceError::Bomb {
            path: path.into(),
            limit: self.bytes >> 20,
            declared: self
                .declared
                .map_or("no size at all".into(), |c| format!("{} MiB", c >> 20)),
            free: self.free >> 20,
            folder: self.folder.clone(),
        }
    }
}

/// Writes a file sequentially, with zeroes as holes.
struct Holes<'f> {
    file: &'f File,
    at: u64,
}

impl Write for Holes<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        const BLOCK: usize = 64 << 10;
        for block in buffer.chunks(BLOCK) {
            if block.iter().any(|byte| *byte != 0) {
                self.file.write_all_at(block, self.at)?;
            }
            self.at += block.len() as u64;
        }
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Tee<'a, R> {
    input: R,
    hasher: Option<&'a mut Hasher>,
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(buffer)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..n]);
        }
        Ok(n)
    }
}

fn copy(input: impl Read, out: &mut impl Write, hasher: Option<&mut Hasher>) -> io::Result<u64> {
    let mut tee = Tee { input, hasher };
    let mut buffer = vec![0; COPY_BUFFER];
    let mut total = 0;
    loop {
        match tee.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(n) => {
                out.write_all(&buffer[..n])?;
                total += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn read_member(path: &Path, file: &mut File, member: &Member) -> Result<Vec<u8>> {
    if member.size > MAX_DESCRIPTION {
        return Err(SourceError::TooLarge {
            path: path.join(super::clean(&member.name)),
            size: member.size,
            limit: MAX_DESCRIPTION,
        });
    }
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(member.offset))
        .and_then(|_| file.take(member.size).read_to_end(&mut bytes))
        .map_err(|e| io_error("reading", path, e))?;
    Ok(bytes)
}

fn base(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

fn same_name(member: &str, wanted: &str) -> bool {
    let plain = |name: &str| name.trim_start_matches("./").to_owned();
    plain(member) == plain(wanted)
}

fn invalid(path: &Path, reason: String) -> SourceError {
    SourceError::Invalid {
        path: path.into(),
        reason,
    }
}

fn io_error(what: &'static str, path: &Path, source: io::Error) -> SourceError {
    SourceError::Io {
        what,
        path: path.into(),
        source,
    }
}
