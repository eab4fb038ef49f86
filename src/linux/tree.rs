//! The files of a Linux guest, read-only, with its file systems mounted at the guest's mount
//! points.
//!
//! [`ExtTree`] reads ext2, ext3 and ext4 inside this process, and FAT below `/boot/efi`. Its crate
//! `ext4-view` has no `unsafe` and replays the journal in memory. Everything else is for the
//! [appliance](super::appliance).
//!
//! `ext4-view` allocates memory by numbers in the superblock, so those are checked first, and its
//! total reads are limited.

use std::io::{self, Cursor, Read};
use std::sync::Arc;

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use crate::block::BlockRead;
use crate::guest::{EmbeddedReader, GuestError, GuestPath, GuestRead, VolumeId};

/// The size limit of a text file in `/etc` or a list of modules.
const MAX_TEXT: u64 = 16 << 20;
/// The limit of all reads: a boot menu and a few initramfs take some hundred MiB.
const MAX_READ: u64 = 8 << 30;
const MAX_NAMES: usize = 100_000;
const MAX_FOLDER: u64 = 64 << 20;
/// The limits of Linux: PATH_MAX, and MAXSYMLINKS.
const MAX_LINK: u64 = 4096;
const MAX_LINKS: usize = 40;

#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    #[error("{path} is {size} bytes, more than the {limit} allowed here")]
    TooLarge { path: String, size: u64, limit: u64 },
    #[error("{path} cannot be read")]
    Ext {
        path: String,
        #[source]
        source: Ext4Error,
    },
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the superblock is not plausible: {0}")]
    Superblock(&'static str),
}

pub type Result<T, E = TreeError> = std::result::Result<T, E>;

/// The files of a guest. Paths are absolute, with `/`. Symbolic links are followed inside the
/// guest.
pub trait Tree {
    fn reader(&self) -> &'static str;
    /// Opens a file; `None` if it does not exist.
    fn open(&self, path: &str, limit: u64) -> Result<Option<Box<dyn Read + '_>>>;
    /// The names in a directory, sorted; empty if it does not exist.
    fn list(&self, folder: &str) -> Result<Vec<String>>;

    /// Reads a text file; bytes that are not UTF-8 are replaced.
    fn text(&self, path: &str) -> Result<Option<String>> {
        let Some(mut file) = self.open(path, MAX_TEXT)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// The first bytes of a file.
    fn head(&self, path: &str, len: u64) -> Result<Option<Vec<u8>>> {
        let Some(file) = self.open(path, u64::MAX)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(len).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }
}

/// An ext file system of one of the disks.
#[derive(Clone)]
pub struct ExtVolume {
    pub disk: usize,
    pub id: VolumeId,
    pub partuuid: Option<String>,
    /// Whether it was not unmounted: Linux has a journal to replay.
    pub unclean: bool,
    fs: Ext4,
}

impl ExtVolume {
    pub fn open(
        disk: usize,
        id: VolumeId,
        blocks: Arc<dyn BlockRead>,
        (start, len): (u64, u64),
        partuuid: Option<String>,
    ) -> Result<Self> {
        let mut head = vec![0; 2048];
        blocks.read_at(start, &mut head)?;
        let superblock = head.get(1024..2048).unwrap_or_default();
        plausible(superblock, len).map_err(TreeError::Superblock)?;
        let window = Window {
            blocks,
            start,
            len,
            left: MAX_READ,
        };
        let fs = Ext4::load(Box::new(window)).map_err(at("/"))?;
        Ok(Self {
            disk,
            id,
            partuuid,
            unclean: le32(superblock, 0x60) & 0x4 != 0,
            fs,
        })
    }

    pub fn uuid(&self) -> String {
        uuid::Uuid::from_bytes(*self.fs.uuid().as_bytes()).to_string()
    }

    pub fn label(&self) -> Option<&str> {
        self.fs.label().to_str().ok()
    }

    pub fn has(&self, path: &str) -> bool {
        matches!(self.resolved(path), Ok(Some(_)))
    }

    /// Resolves all links of a path. `ext4-view` follows links too, but allocates as much memory
    /// for each as its inode declares.
    fn resolved(&self, path: &str) -> Result<Option<String>> {
        let mut left: Vec<String> = path.rsplit('/').map(str::to_string).collect();
        let mut place = String::new();
        let mut links = 0;
        while let Some(name) = left.pop() {
            match &*name {
                "" | "." => continue,
                ".." => {
                    place.truncate(place.rfind('/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let here = format!("{place}/{name}");
            let Some(info) = absent(self.fs.symlink_metadata(&*here)).map_err(at(&here))? else {
                return Ok(None);
            };
            if !info.is_symlink() {
                place = here;
                continue;
            }
            if info.len() > MAX_LINK {
                return Err(TreeError::TooLarge {
                    path: here,
                    size: info.len(),
                    limit: MAX_LINK,
                });
            }
            links += 1;
            let target = self.fs.read_link(&*here).map_err(at(&here))?;
            // Text that is not UTF-8 cannot be a name looked for here.
            let Some(target) = target.to_str().ok().filter(|_| links <= MAX_LINKS) else {
                return Ok(None);
            };
            if target.starts_with('/') {
                place.clear();
            }
            left.extend(target.rsplit('/').map(str::to_string));
        }
        if place.is_empty() {
            place.push('/');
        }
        Ok(Some(place))
    }
}

/// Checks the numbers that determine how much memory a reader allocates.
fn plausible(superblock: &[u8], len: u64) -> Result<(), &'static str> {
    let log_size = le32(superblock, 0x18);
    if log_size > 6 {
        return Err("the block size");
    }
    let block = 1024u64 << log_size;
    let high = u64::from(le32(superblock, 0x150));
    let high = if le32(superblock, 0x60) & 0x80 != 0 {
        high
    } else {
        0
    };
    let count = u64::from(le32(superblock, 4)) | high << 32;
    if count.checked_mul(block).is_none_or(|size| size > len) {
        return Err("its recorded size is larger than its partition");
    }
    let per_group = u64::from(le32(superblock, 0x20));
    if per_group == 0 || per_group > 8 * block || count / per_group > 1 << 20 {
        return Err("the size of its block groups");
    }
    Ok(())
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    crate::bytes::le32(bytes, at).unwrap_or_default()
}

struct Window {
    blocks: Arc<dyn BlockRead>,
    start: u64,
    len: u64,
    left: u64,
}

impl Ext4Read for Window {
    fn read(
        &mut self,
        start: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        let wanted = dst.len() as u64;
        let end = start.checked_add(wanted).filter(|end| *end <= self.len);
        let Some(left) = self.left.checked_sub(wanted) else {
            return Err("reading this file system takes too much".into());
        };
        self.left = left;
        match end.and_then(|_| self.start.checked_add(start)) {
            Some(at) => Ok(self.blocks.read_at(at, dst)?),
            None => Err("a block lies outside the partition".into()),
        }
    }
}

enum Mounted<'d> {
    Ext(ExtVolume),
    Fat(&'d EmbeddedReader, VolumeId),
}

/// File systems that this process itself reads.
pub struct ExtTree<'d> {
    /// The mounts by path, longest first.
    mounts: Vec<(String, Mounted<'d>)>,
}

impl<'d> ExtTree<'d> {
    pub fn new(root: ExtVolume) -> Self {
        Self {
            mounts: vec![(String::new(), Mounted::Ext(root))],
        }
    }

    pub fn mount(&mut self, place: &str, volume: ExtVolume) {
        self.add(place, Mounted::Ext(volume));
    }

    pub fn mount_fat(&mut self, place: &str, guest: &'d EmbeddedReader, volume: VolumeId) {
        self.add(place, Mounted::Fat(guest, volume));
    }

    fn add(&mut self, place: &str, mounted: Mounted<'d>) {
        let place = place.trim_end_matches('/').to_string();
        self.mounts.push((place, mounted));
        self.mounts
            .sort_by_key(|(place, _)| std::cmp::Reverse(place.len()));
    }

    fn find<'p>(&self, path: &'p str) -> Option<(&Mounted<'d>, &'p str)> {
        self.mounts.iter().find_map(|(place, mounted)| {
            let rest = path.strip_prefix(place.as_str())?;
            match rest {
                "" => Some((mounted, "/")),
                rest => rest.starts_with('/').then_some((mounted, rest)),
            }
        })
    }
}

impl Tree for ExtTree<'_> {
    fn reader(&self) -> &'static str {
        "embedded"
    }

    fn open(&self, path: &str, limit: u64) -> Result<Option<Box<dyn Read + '_>>> {
        let too_large = |size| TreeError::TooLarge {
            path: path.to_string(),
            size,
            limit,
        };
        match self.find(path) {
            None => Ok(None),
            Some((Mounted::Ext(volume), path)) => {
                let Some(place) = volume.resolved(path)? else {
                    return Ok(None);
                };
                let Some(file) = absent(volume.fs.open(&*place)).map_err(at(path))? else {
                    return Ok(None);
                };
                let size = file.metadata().len();
                if size > limit && limit != u64::MAX {
                    return Err(too_large(size));
                }
                Ok(Some(Box::new(ExtFile(file))))
            }
            Some((Mounted::Fat(guest, volume), path)) => {
                let Ok(path) = GuestPath::parse(path) else {
                    return Ok(None);
                };
                match guest.stat(*volume, &path)? {
                    Some(info) if info.kind == crate::guest::FileKind::File => {
                        let limit = limit.min(MAX_FOLDER);
                        let bytes = guest.read(*volume, &path, limit)?;
                        Ok(Some(Box::new(Cursor::new(bytes))))
                    }
                    _ => Ok(None),
                }
            }
        }
    }

    fn list(&self, folder: &str) -> Result<Vec<String>> {
        let mut names = match self.find(folder) {
            None => Vec::new(),
            Some((Mounted::Ext(volume), path)) => list_ext(volume, path)?,
            Some((Mounted::Fat(guest, volume), path)) => {
                let Ok(path) = GuestPath::parse(path) else {
                    return Ok(Vec::new());
                };
                match guest.list(*volume, &path) {
                    Ok(infos) => infos.into_iter().map(|i| i.name).collect(),
                    Err(GuestError::NotFound { .. } | GuestError::WrongKind { .. }) => Vec::new(),
                    Err(error) => return Err(error.into()),
                }
            }
        };
        names.sort();
        Ok(names)
    }
}

fn list_ext(volume: &ExtVolume, path: &str) -> Result<Vec<String>> {
    let failed = at(path);
    let Some(place) = volume.resolved(path)? else {
        return Ok(Vec::new());
    };
    let Some(info) = absent(volume.fs.metadata(&*place)).map_err(&failed)? else {
        return Ok(Vec::new());
    };
    if info.len() > MAX_FOLDER {
        return Err(TreeError::TooLarge {
            path: path.to_string(),
            size: info.len(),
            limit: MAX_FOLDER,
        });
    }
    let Some(entries) = absent(volume.fs.read_dir(&*place)).map_err(&failed)? else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    for entry in entries.take(MAX_NAMES) {
        let entry = entry.map_err(&failed)?;
        // Text that is not UTF-8 cannot be a name looked for here.
        if let Ok(name) = entry.file_name().as_str()
            && !matches!(name, "." | "..")
            && !name.chars().any(char::is_control)
        {
            names.push(name.to_string());
        }
    }
    Ok(names)
}

fn at(path: &str) -> impl Fn(Ext4Error) -> TreeError + '_ {
    move |source| TreeError::Ext {
        path: path.to_string(),
        source,
    }
}

fn absent<T>(result: Result<T, Ext4Error>) -> Result<Option<T>, Ext4Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(
            Ext4Error::NotFound
            | Ext4Error::NotADirectory
            | Ext4Error::IsADirectory
            | Ext4Error::IsASpecialFile
            | Ext4Error::TooManySymlinks,
        ) => Ok(None),
        Err(error) => Err(error),
    }
}

struct ExtFile(ext4_view::File);

impl Read for ExtFile {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read_bytes(buf).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::block::FileDisk;
    use crate::tool::Cmd;

    /// A file system made by `mke2fs` from a directory.
    fn image(dir: &Path, size: &str, options: &[&str]) -> Option<FileDisk> {
        if !crate::skip::have(&["mke2fs"]) {
            return None;
        }
        let folder = dir.join("root");
        std::fs::create_dir_all(folder.join("etc")).unwrap();
        std::fs::create_dir_all(folder.join("usr/lib")).unwrap();
        std::fs::write(folder.join("usr/lib/os-release"), "ID=test\n").unwrap();
        std::os::unix::fs::symlink("../usr/lib/os-release", folder.join("etc/os-release")).unwrap();
        std::os::unix::fs::symlink("/etc/loop", folder.join("etc/loop")).unwrap();
        std::os::unix::fs::symlink("../../../../../../etc/passwd", folder.join("etc/up")).unwrap();
        // Too long to be stored in its inode.
        let long = format!("{}/usr/lib/os-release", "/usr/..".repeat(20));
        std::os::unix::fs::symlink(long, folder.join("etc/long")).unwrap();
        std::fs::write(folder.join("big"), vec![7; 3 << 20]).unwrap();
        let file = dir.join("fs.img");
        let mut args = vec!["-q", "-F"];
        args.extend(options);
        args.extend(["-d", folder.to_str().unwrap(), file.to_str().unwrap(), size]);
        Cmd::new("mke2fs").args(args).run().unwrap();
        Some(FileDisk::open(&file).unwrap())
    }

    fn open(disk: FileDisk) -> Result<ExtVolume> {
        let len = disk.size();
        ExtVolume::open(0, VolumeId::new(0), Arc::new(disk), (0, len), None)
    }

    #[test]
    fn ext_2_3_4() {
        for options in [
            &["-t", "ext2"][..],
            &["-t", "ext3"],
            &["-t", "ext4", "-L", "here"],
        ] {
            let dir = tempfile::tempdir().unwrap();
            let Some(disk) = image(dir.path(), "16m", options) else {
                return;
            };
            let volume = open(disk).unwrap();
            assert!(!volume.unclean && volume.has("/etc/os-release"));
            assert_eq!(volume.uuid().len(), 36);
            let tree = ExtTree::new(volume);
            let text = |path: &str| tree.text(path).unwrap();
            for link in ["/etc/os-release", "/etc/long", "/etc/../etc//./long"] {
                assert_eq!(text(link).as_deref(), Some("ID=test\n"), "{link}");
            }
            assert_eq!(tree.list("/").unwrap(), ["big", "etc", "lost+found", "usr"]);
            for none in [
                "/etc/loop",
                "/etc/up",
                "/etc",
                "/nothing",
                "/big/x",
                "relative",
            ] {
                assert_eq!(text(none), None, "{none}");
            }
            assert_eq!(
                tree.list("/etc").unwrap(),
                ["long", "loop", "os-release", "up"]
            );
            assert!(tree.list("/no").unwrap().is_empty());
            assert!(tree.open("/big", 1 << 20).is_err());
            assert_eq!(tree.head("/big", 10).unwrap().unwrap(), [7; 10]);
            let mut big = Vec::new();
            let mut file = tree.open("/big", 1 << 30).unwrap().unwrap();
            file.read_to_end(&mut big).unwrap();
            assert_eq!(big.len(), 3 << 20);
        }
    }

    /// A link whose inode declares a target of gigabytes (found by fuzzing).
    #[test]
    fn hostile_link() {
        let dir = tempfile::tempdir().unwrap();
        let Some(disk) = image(dir.path(), "16m", &["-t", "ext4"]) else {
            return;
        };
        drop(disk);
        let file = dir.path().join("fs.img");
        let command = "set_inode_field /etc/long size 0x69000000";
        let args = ["-w", "-R", command, file.to_str().unwrap()];
        Cmd::new("debugfs").args(args).run().unwrap();
        let tree = ExtTree::new(open(FileDisk::open(&file).unwrap()).unwrap());
        for path in ["/etc/long", "/etc/long/below"] {
            let error = tree.text(path).unwrap_err();
            let TreeError::TooLarge { size, .. } = error else {
                panic!("{error}");
            };
            assert_eq!(size, 0x6900_0000);
            assert!(tree.list(path).is_err());
        }
    }

    /// Numbers in the superblock that would make a reader allocate gigabytes, or never end.
    #[test]
    fn hostile_superblocks() {
        let dir = tempfile::tempdir().unwrap();
        let Some(disk) = image(dir.path(), "16m", &["-t", "ext4", "-O", "^metadata_csum"]) else {
            return;
        };
        drop(disk);
        let good = std::fs::read(dir.path().join("fs.img")).unwrap();
        for (at, value) in [
            (0x18, u32::MAX),
            (0x04, u32::MAX),
            (0x150, u32::MAX),
            (0x20, 0),
            (0x20, u32::MAX),
            (0x14, u32::MAX),
            (0x28, 0),
            (0xe0, u32::MAX),
        ] {
            let mut bad = good.clone();
            bad[1024 + at..1024 + at + 4].copy_from_slice(&value.to_le_bytes());
            let file = dir.path().join("bad.img");
            std::fs::write(&file, bad).unwrap();
            // An immediate error, or nothing that matters: never a crash.
            if let Ok(volume) = open(FileDisk::open(&file).unwrap()) {
                let tree = ExtTree::new(volume);
                let _ = tree.text("/etc/os-release");
                let _ = tree.list("/");
            }
        }
        // Every byte of the metadata at the start, in turn.
        let disk = dir.path().join("fuzz.img");
        for at in (1024..64 << 10).step_by(509) {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            std::fs::write(&disk, bad).unwrap();
            if let Ok(volume) = open(FileDisk::open(&disk).unwrap()) {
                let tree = ExtTree::new(volume);
                let _ = tree.text("/etc/os-release");
                let _ = tree.list("/");
            }
        }
    }
}
