//! libguestfs' appliance with one disk attached: commands, mounted volumes, and the listed
//! directories.
//!
//! A directory is listed once and cached. Lookups use the cache, which also has the guest's own
//! spelling of a name, because ntfs-3g is case-sensitive. It presents every reparse point as a
//! symbolic link, which is never followed here.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::guestfish_boot::{Attach, launch_limit, start, tool_error};
use super::{FileInfo, FileKind, FsKind, GuestError, GuestPath, Result, VolumeId};
use crate::files::Scratch;
use crate::tool::guestfish::{Line, MAX_LINE, Reply, Shell};

/// The time limit for one command; the longest ones transfer a hive.
const LIMIT: Duration = Duration::from_secs(300);
/// The most entries of a directory; Windows has directories of some ten thousand.
const MAX_ENTRIES: usize = 1_000_000;

/// The extended attribute with the Windows attributes of a file, big endian.
pub(super) const ATTRIBUTES: &str = "system.ntfs_attrib_be";
pub(super) const HIDDEN_OR_SYSTEM: u32 = 0x6;
const DIRECTORY: u32 = 0x10;
const REPARSE_POINT: u32 = 0x400;
const COMPRESSED: u32 = 0x800;
const ENCRYPTED: u32 = 0x4000;

/// The running appliance; clones share it.
#[derive(Clone)]
pub struct Appliance(Arc<Mutex<Inner>>);

impl Appliance {
    /// Boots the appliance, which takes seconds with KVM and up to a minute without.
    pub fn start(attach: &Attach<'_>) -> Result<Self> {
        Ok(Self(Arc::new(Mutex::new(Inner::start(attach)?))))
    }

    /// Runs `work` on the appliance; it must not call this method again.
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Inner) -> Result<T>) -> Result<T> {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A name in a directory.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// The name in the guest's own case.
    pub name: String,
    pub kind: FileKind,
    pub size: u64,
    /// Whether it is a reparse point.
    pub link: bool,
}

/// Entries by lower-case name.
pub(super) type Folder = BTreeMap<String, Entry>;

/// The result of resolving a path.
pub(super) struct ResolvedPath {
    /// The path of the parent inside the appliance.
    pub parent: String,
    /// `None`: the parent exists and has no such name.
    pub entry: Option<Entry>,
    /// The path inside the appliance, in the guest's own case as far as it exists.
    pub real: String,
}

pub(super) struct Inner {
    shell: Option<Shell>,
    /// A private directory for files that go to and from the appliance.
    work: Scratch,
    files: u64,
    pub mounts: BTreeMap<VolumeId, FsKind>,
    /// Devices of volumes that are not simply a partition.
    pub(super) mapped: BTreeMap<VolumeId, ApplianceDevice>,
    folders: HashMap<String, Folder>,
}

/// The partition of that number.
pub(super) fn device(volume: VolumeId) -> String {
    match volume.partition {
        0 => "/dev/sda".to_string(),
        n => format!("/dev/sda{n}"),
    }
}

/// A block device of the appliance.
#[derive(Debug, Clone)]
pub(super) struct ApplianceDevice {
    pub path: String,
    pub size: u64,
}

pub(super) fn mount_point(volume: VolumeId) -> String {
    format!("/v{}", volume.partition)
}

impl Inner {
    fn start(attach: &Attach<'_>) -> Result<Self> {
        Ok(Self {
            work: Scratch::new()?,
            shell: Some(start(std::slice::from_ref(attach))?),
            files: 0,
            mounts: BTreeMap::new(),
            mapped: BTreeMap::new(),
            folders: HashMap::new(),
        })
    }

    pub fn run(&mut self, lines: &[Line]) -> Result<Vec<Reply>> {
        self.run_within(lines, LIMIT)
    }

    fn run_within(&mut self, lines: &[Line], limit: Duration) -> Result<Vec<Reply>> {
        let shell = self
            .shell
            .as_mut()
            .ok_or_else(|| std::io::Error::other("the appliance was shut down already"))?;
        shell.run(lines, limit).map_err(tool_error)
    }

    pub fn one(&mut self, line: Line) -> Result<Reply> {
        self.one_within(line, LIMIT)
    }

    /// Runs a command that may take as long as the start of the appliance: a key is stretched by a
    /// million hashes.
    pub fn slow(&mut self, line: Line) -> Result<Reply> {
        self.one_within(line, launch_limit())
    }

    fn one_within(&mut self, line: Line, limit: Duration) -> Result<Reply> {
        let replies = self.run_within(&[line], limit)?;
        replies
            .into_iter()
            .next()
            .ok_or_else(|| std::io::Error::other("guestfish gave no reply").into())
    }

    /// Shuts the appliance down; an error means that writes may be lost.
    pub fn close(&mut self) -> Result<()> {
        let closed = self.run(&[Line::new("umount-all"), Line::new("shutdown")])?;
        self.mounts.clear();
        for reply in closed {
            reply.map_err(|reason| GuestError::Op {
                op: "shutting down the appliance with",
                path: "\\".to_string(),
                reason,
            })?;
        }
        match self.shell.take() {
            Some(shell) => shell.close().map_err(tool_error),
            None => Ok(()),
        }
    }

    /// The block device of a volume.
    pub fn device(&self, volume: VolumeId) -> String {
        match self.mapped.get(&volume) {
            Some(device) => device.path.clone(),
            None => device(volume),
        }
    }

    /// Mounts a volume at its mount point. The inner `Err` has the output of mount.
    pub fn mount(&mut self, volume: VolumeId, kind: FsKind, options: &str) -> Result<Reply> {
        let line = Line::new("mount-options")
            .arg(options)
            .arg(self.device(volume))
            .arg(mount_point(volume));
        let reply = self.one(line)?;
        if reply.is_ok() {
            self.mounts.insert(volume, kind);
        }
        Ok(reply)
    }

    /// An unused file name on this host.
    pub fn file(&mut self) -> PathBuf {
        self.files += 1;
        self.work.path().join(self.files.to_string())
    }

    pub(super) fn take_file(path: &Path) -> std::io::Result<Vec<u8>> {
        let bytes = fs::read(path)?;
        fs::remove_file(path)?;
        Ok(bytes)
    }

    /// Resolves a path; `None` if it or one of its parents does not exist.
    pub fn find(&mut self, volume: VolumeId, path: &GuestPath) -> Result<Option<ResolvedPath>> {
        if !self.mounts.contains_key(&volume) {
            return Err(GuestError::NoVolume(volume));
        }
        let mut place = ResolvedPath {
            parent: String::new(),
            entry: Some(Entry {
                name: String::new(),
                kind: FileKind::Dir,
                size: 0,
                link: false,
            }),
            real: mount_point(volume),
        };
        for part in path.parts() {
            match &place.entry {
                Some(entry) if entry.kind == FileKind::Dir && !entry.link => {}
                _ => return Ok(None),
            }
            let parent = place.real;
            let entry = self.folder(&parent)?.get(&part.to_lowercase()).cloned();
            let name = entry.as_ref().map_or(part.as_str(), |e| &e.name);
            place = ResolvedPath {
                real: format!("{parent}/{name}"),
                parent,
                entry,
            };
        }
        Ok(Some(place))
    }

    /// The contents of a directory of the appliance.
    pub fn folder(&mut self, real: &str) -> Result<&Folder> {
        if !self.folders.contains_key(real) {
            let folder = self.read_folder(real)?;
            self.folders.insert(real.to_string(), folder);
        }
        self.folders
            .get(real)
            .ok_or_else(|| std::io::Error::other("a listing is lost").into())
    }

    /// Updates the cache of [`Self::folder`] after a change.
    pub fn remember(&mut self, place: &ResolvedPath, entry: Option<Entry>) {
        let Some(folder) = self.folders.get_mut(&place.parent) else {
            return;
        };
        match (entry, &place.entry) {
            (Some(entry), _) => {
                folder.insert(entry.name.to_lowercase(), entry);
            }
            (None, Some(old)) => {
                folder.remove(&old.name.to_lowercase());
                self.folders.remove(&place.real);
            }
            (None, None) => {}
        }
    }

    pub(super) fn read_folder(&mut self, real: &str) -> Result<Folder> {
        let file = self.file();
        // NUL between names: no name can pretend to be two.
        let line = Line::new("ls0").arg(real).arg(text(&file)?);
        self.one(line)?.map_err(|reason| unreadable(real, reason))?;
        let bytes = Self::take_file(&file)?;
        // A path cannot name entries that are not text or have control characters.
        let names: Vec<&str> = bytes
            .split(|b| *b == 0)
            .filter_map(|name| std::str::from_utf8(name).ok())
            .filter(|name| !name.is_empty() && !name.chars().any(char::is_control))
            .collect();
        if names.len() > MAX_ENTRIES {
            return Err(unreadable(
                real,
                "the directory has too many entries".into(),
            ));
        }
        let (lists, single): (Vec<&str>, Vec<&str>) =
            names.into_iter().partition(|name| !name.contains('\''));
        let mut lines = Vec::new();
        let mut asked: Vec<Vec<&str>> = Vec::new();
        let head = Line::new("lstatnslist").arg(real).len();
        let mut list = String::new();
        let mut in_list = Vec::new();
        let mut len = head;
        for name in lists {
            let more = Line::new("").arg(format!("'{name}' ")).len();
            if len + more > MAX_LINE && !in_list.is_empty() {
                lines.push(Line::new("lstatnslist").arg(real).arg(&list));
                asked.push(std::mem::take(&mut in_list));
                list.clear();
                len = head;
            }
            if !list.is_empty() {
                list.push(' ');
            }
            list.push_str(&format!("'{name}'"));
            in_list.push(name);
            len += more;
        }
        if !in_list.is_empty() {
            lines.push(Line::new("lstatnslist").arg(real).arg(&list));
            asked.push(in_list);
        }
        for name in single {
            lines.push(Line::new("lstatns").arg(format!("{real}/{name}")));
            asked.push(vec![name]);
        }
        let mut folder = Folder::new();
        for (names, reply) in asked.into_iter().zip(self.run(&lines)?) {
            let output = reply.map_err(|reason| unreadable(real, reason))?;
            let stats = stats(&String::from_utf8_lossy(&output));
            if stats.len() != names.len() {
                return Err(unreadable(real, "guestfish left out some entries".into()));
            }
            for (name, stat) in names.into_iter().zip(stats) {
                let kind = stat.mode & 0o170_000;
                let entry = Entry {
                    name: name.to_string(),
                    kind: if kind == 0o040_000 {
                        FileKind::Dir
                    } else {
                        FileKind::File
                    },
                    size: if kind == 0o040_000 { 0 } else { stat.size },
                    link: kind == 0o120_000,
                };
                folder.entry(name.to_lowercase()).or_insert(entry);
            }
        }
        Ok(folder)
    }

    /// Adds attributes that only NTFS has.
    pub(super) fn describe(
        &mut self,
        volume: VolumeId,
        entries: Vec<(String, Entry)>,
    ) -> Result<Vec<FileInfo>> {
        let ntfs = self.mounts.get(&volume) == Some(&FsKind::Ntfs);
        let wanted = |entry: &Entry| ntfs && (entry.kind == FileKind::File || entry.link);
        let lines: Vec<_> = entries
            .iter()
            .filter(|(_, entry)| wanted(entry))
            .map(|(real, _)| attribute(real, ATTRIBUTES))
            .collect();
        let mut flags = self.run(&lines)?.into_iter();
        let mut infos = Vec::new();
        for (real, entry) in entries {
            let flags = if wanted(&entry) {
                let bytes = flags.next().and_then(Result::ok);
                bytes
                    .and_then(|b| b.first_chunk().map(|b| u32::from_be_bytes(*b)))
                    .unwrap_or(0)
            } else {
                0
            };
            let dir = entry.kind == FileKind::Dir || flags & DIRECTORY != 0;
            let mut reparse_tag = None;
            if entry.link || flags & REPARSE_POINT != 0 {
                let data = self.one(attribute(&real, "system.ntfs_reparse_data"))?;
                let data = data.map_err(|reason| unreadable(&real, reason))?;
                let tag = data.first_chunk().map(|b| u32::from_le_bytes(*b));
                reparse_tag = Some(
                    tag.ok_or_else(|| unreadable(&real, "a reparse point is too short".into()))?,
                );
            }
            infos.push(FileInfo {
                name: entry.name,
                kind: if dir { FileKind::Dir } else { FileKind::File },
                size: if dir { 0 } else { entry.size },
                reparse_tag,
                compressed: !dir && flags & COMPRESSED != 0,
                encrypted: !dir && flags & ENCRYPTED != 0,
            });
        }
        Ok(infos)
    }

    pub(super) fn file_at(&mut self, volume: VolumeId, path: &GuestPath) -> Result<(String, u64)> {
        let found = self.find(volume, path)?;
        match found.and_then(|place| Some((place.real, place.entry?))) {
            None => Err(GuestError::not_found(path)),
            Some((_, entry)) if entry.link => Err(GuestError::Unreadable {
                path: path.to_string(),
                reason: "it is a reparse point".to_string(),
            }),
            Some((_, entry)) if entry.kind == FileKind::Dir => {
                Err(GuestError::wrong_kind(path, "file"))
            }
            Some((real, entry)) => Ok((real, entry.size)),
        }
    }

    pub(super) fn download(
        &mut self,
        real: &str,
        path: &GuestPath,
        offset: u64,
        len: u64,
    ) -> Result<Vec<u8>> {
        self.fetch(real, offset, len)?
            .map_err(|reason| GuestError::Unreadable {
                path: path.to_string(),
                reason,
            })
    }

    /// Reads exactly `len` bytes of a file or a device of the appliance.
    pub fn fetch(&mut self, real: &str, offset: u64, len: u64) -> Result<Reply> {
        if len == 0 {
            return Ok(Ok(Vec::new()));
        }
        let file = self.file();
        let line = Line::new("download-offset")
            .arg(real)
            .arg(text(&file)?)
            .arg(offset.to_string())
            .arg(len.to_string());
        if let Err(reason) = self.one(line)? {
            return Ok(Err(reason));
        }
        let bytes = Self::take_file(&file)?;
        if bytes.len() as u64 != len {
            return Ok(Err(format!("{} of {len} bytes arrived", bytes.len())));
        }
        Ok(Ok(bytes))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(shell) = self.shell.take()
            && let Err(error) = shell.close()
        {
            tracing::warn!("ending guestfish: {error}");
        }
    }
}

/// Reads an extended attribute of a file from ntfs-3g.
pub(super) fn attribute(real: &str, name: &str) -> Line {
    Line::new("lgetxattr").arg(real).arg(name)
}

/// Requires UTF-8, which guestfish needs; the names of hyper2kvm's temporary files are.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| std::io::Error::other("TMPDIR is not valid text").into())
}

fn unreadable(real: &str, reason: String) -> GuestError {
    GuestError::Unreadable {
        path: real.to_string(),
        reason,
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Stat {
    mode: u32,
    size: u64,
}

/// Parses the records of `lstatns` and `lstatnslist`: one value a line, numbers only.
fn stats(output: &str) -> Vec<Stat> {
    let mut stats = Vec::new();
    for line in output.lines() {
        let Some((key, value)) = line.trim().split_once(": ") else {
            continue;
        };
        match key {
            "st_dev" => stats.push(Stat::default()),
            "st_mode" => {
                if let Some(stat) = stats.last_mut() {
                    stat.mode = value.parse().unwrap_or(0);
                }
            }
            "st_size" => {
                if let Some(stat) = stats.last_mut() {
                    stat.size = value.parse().unwrap_or(0);
                }
            }
            _ => {}
        }
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_records() {
        let one = "st_dev: 1\nst_mode: 16895\nst_size: 0\n";
        let list = format!(
            "[0] = {{\n  {one}}}\n[1] = {{\n  st_dev: 1\n  st_ino: 7\n  st_mode: 33279\n  st_size: 512\n}}\n"
        );
        let dir = Stat {
            mode: 0o40777,
            size: 0,
        };
        let file = Stat {
            mode: 0o100_777,
            size: 512,
        };
        assert_eq!(stats(one), [dir]);
        assert_eq!(stats(&list), [dir, file]);
        assert_eq!(stats("st_mode: x\nnonsense\n"), []);
    }
}
