//! The guestfish engine: the guest's file systems are mounted in libguestfs' appliance, a small VM,
//! and never on this host.
//!
//! One appliance serves one disk, for reading and then for writing; it is attached to our storage
//! daemon over NBD, so it sees the same overlay as everything else and opens no image file itself. A
//! folder is listed once and remembered; lookups are answered from that, as is the guest's own
//! spelling of a name, because ntfs-3g is case-sensitive. What a volume says about its state is read
//! by the same code as in the embedded engine, from the disk itself.
//!
//! ntfs-3g shows every reparse point as a symbolic link, which is never followed here. It reads
//! LZNT1-compressed files, the embedded engine does not.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::{
    FileInfo, FileKind, FsKind, GuestError, GuestPath, GuestRead, Result, Volume, VolumeId,
    embedded,
};
use crate::disk::block::BlockRead;
use crate::disk::layout::DiskLayout;
use crate::tool::ToolError;
use crate::tool::guestfish::{Line, MAX_LINE, Reply, Shell, TOOL};

/// Without KVM, on a busy machine, a start takes minutes.
const LAUNCH_LIMIT: Duration = Duration::from_secs(1200);
/// For one command; the longest ones move a hive.
const LIMIT: Duration = Duration::from_secs(300);
/// Entries of a folder; Windows has folders of some ten thousand.
const MAX_ENTRIES: usize = 1_000_000;

/// The Windows attributes of a file, big endian.
pub(super) const ATTRIBUTES: &str = "system.ntfs_attrib_be";
pub(super) const HIDDEN_OR_SYSTEM: u32 = 0x6;
const DIRECTORY: u32 = 0x10;
const REPARSE_POINT: u32 = 0x400;
const COMPRESSED: u32 = 0x800;
const ENCRYPTED: u32 = 0x4000;

/// The running appliance; clones share it.
#[derive(Clone)]
pub struct Appliance(Rc<RefCell<Inner>>);

/// Where the disk is served over NBD.
pub struct Attach<'a> {
    pub socket: &'a Path,
    pub export: &'a str,
    pub read_only: bool,
    pub sector_size: u32,
}

impl Appliance {
    /// Boots the appliance, which takes seconds with KVM and up to a minute without.
    pub fn start(attach: &Attach<'_>) -> Result<Self> {
        Ok(Self(Rc::new(RefCell::new(Inner::start(attach)?))))
    }

    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Inner) -> Result<T>) -> Result<T> {
        // Never borrowed twice: no call below comes back here.
        work(&mut self.0.borrow_mut())
    }
}

/// A name in a folder.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// In the guest's own case.
    pub name: String,
    pub kind: FileKind,
    pub size: u64,
    /// A reparse point.
    pub link: bool,
}

/// Entries by lower-case name.
pub(super) type Folder = BTreeMap<String, Entry>;

/// Where a path leads to.
pub(super) struct Place {
    /// The path of the parent inside the appliance.
    pub parent: String,
    /// `None`: the parent exists and has no such name.
    pub entry: Option<Entry>,
    /// The path inside the appliance, in the guest's own case where it exists.
    pub real: String,
}

pub(super) struct Inner {
    shell: Option<Shell>,
    /// Private; what goes in and out of the appliance.
    work: tempfile::TempDir,
    files: u64,
    pub mounts: BTreeMap<VolumeId, FsKind>,
    folders: HashMap<String, Folder>,
}

pub(super) fn mount_point(volume: VolumeId) -> String {
    format!("/v{}", volume.0)
}

pub(super) fn device(volume: VolumeId) -> String {
    match volume.0 {
        0 => "/dev/sda".to_string(),
        n => format!("/dev/sda{n}"),
    }
}

impl Inner {
    fn start(attach: &Attach<'_>) -> Result<Self> {
        Ok(Self {
            work: private_folder()?,
            shell: Some(shell(std::slice::from_ref(attach))?),
            files: 0,
            mounts: BTreeMap::new(),
            folders: HashMap::new(),
        })
    }

    pub fn run(&mut self, lines: &[Line]) -> Result<Vec<Reply>> {
        let shell = self
            .shell
            .as_mut()
            .ok_or_else(|| std::io::Error::other("the appliance was shut down already"))?;
        shell.run(lines, LIMIT).map_err(tool_error)
    }

    pub fn one(&mut self, line: Line) -> Result<Reply> {
        let replies = self.run(&[line])?;
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

    /// Mounts a volume at its place. `Err` inside: what mount said.
    pub fn mount(&mut self, volume: VolumeId, kind: FsKind, options: &str) -> Result<Reply> {
        let line = Line::new("mount-options")
            .arg(options)
            .arg(device(volume))
            .arg(mount_point(volume));
        let reply = self.one(line)?;
        if reply.is_ok() {
            self.mounts.insert(volume, kind);
        }
        Ok(reply)
    }

    /// A name of a file on this host that nothing uses yet.
    pub fn file(&mut self) -> PathBuf {
        self.files += 1;
        self.work.path().join(self.files.to_string())
    }

    fn take_file(path: &Path) -> std::io::Result<Vec<u8>> {
        let bytes = fs::read(path)?;
        fs::remove_file(path)?;
        Ok(bytes)
    }

    /// `None` when the path or one of its parents does not exist.
    pub fn find(&mut self, volume: VolumeId, path: &GuestPath) -> Result<Option<Place>> {
        if !self.mounts.contains_key(&volume) {
            return Err(GuestError::NoVolume(volume));
        }
        let mut place = Place {
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
            place = Place {
                real: format!("{parent}/{name}"),
                parent,
                entry,
            };
        }
        Ok(Some(place))
    }

    /// What is in a folder of the appliance.
    pub fn folder(&mut self, real: &str) -> Result<&Folder> {
        if !self.folders.contains_key(real) {
            let folder = self.read_folder(real)?;
            self.folders.insert(real.to_string(), folder);
        }
        self.folders
            .get(real)
            .ok_or_else(|| std::io::Error::other("a listing is lost").into())
    }

    /// What [`Self::folder`] is to say from now on, where it was asked before.
    pub fn remember(&mut self, place: &Place, entry: Option<Entry>) {
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

    fn read_folder(&mut self, real: &str) -> Result<Folder> {
        let file = self.file();
        // NUL between names: no name can pretend to be two.
        let line = Line::new("ls0").arg(real).arg(text(&file)?);
        self.one(line)?.map_err(|reason| unreadable(real, reason))?;
        let bytes = Self::take_file(&file)?;
        // A path cannot name what is not text or has control characters.
        let names: Vec<&str> = bytes
            .split(|b| *b == 0)
            .filter_map(|name| std::str::from_utf8(name).ok())
            .filter(|name| !name.is_empty() && !name.chars().any(char::is_control))
            .collect();
        if names.len() > MAX_ENTRIES {
            return Err(unreadable(real, "the folder has too many entries".into()));
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

    /// Adds what only NTFS knows about files.
    fn describe(
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

    fn file_at(&mut self, volume: VolumeId, path: &GuestPath) -> Result<(String, u64)> {
        let found = self.find(volume, path)?;
        match found.and_then(|place| Some((place.real, place.entry?))) {
            None => Err(GuestError::NotFound {
                path: path.to_string(),
            }),
            Some((_, entry)) if entry.link => Err(GuestError::Unreadable {
                path: path.to_string(),
                reason: "it is a reparse point".to_string(),
            }),
            Some((_, entry)) if entry.kind == FileKind::Dir => Err(GuestError::WrongKind {
                path: path.to_string(),
                expected: "file",
            }),
            Some((real, entry)) => Ok((real, entry.size)),
        }
    }

    fn download(&mut self, real: &str, path: &GuestPath, offset: u64, len: u64) -> Result<Vec<u8>> {
        if len == 0 {
            return Ok(Vec::new());
        }
        let file = self.file();
        let line = Line::new("download-offset")
            .arg(real)
            .arg(text(&file)?)
            .arg(offset.to_string())
            .arg(len.to_string());
        let failed = |reason| GuestError::Unreadable {
            path: path.to_string(),
            reason,
        };
        self.one(line)?.map_err(failed)?;
        let bytes = Self::take_file(&file)?;
        if bytes.len() as u64 != len {
            return Err(failed(format!("{} of {len} bytes arrived", bytes.len())));
        }
        Ok(bytes)
    }
}

/// An appliance with these disks as `/dev/sda`, `/dev/sdb`, ..., and nothing mounted.
pub fn shell(disks: &[Attach<'_>]) -> Result<Shell> {
    match boot(disks, false)? {
        Ok(shell) => Ok(shell),
        // Again for a full log: writing one doubles the time of a start, so a good one has none.
        Err(_) => boot(disks, true)?.map_err(|(log, reason)| not_started(&log, &reason)),
    }
}

/// A folder that only this user can enter.
pub fn private_folder() -> std::io::Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("hyper2kvm-")
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir()
}

/// What an appliance that did not start printed, and the reason it gave.
type BootFailure = (Vec<u8>, String);

fn boot(disks: &[Attach<'_>], verbose: bool) -> Result<std::result::Result<Shell, BootFailure>> {
    let mut shell = Shell::start().map_err(tool_error)?;
    let mut lines: Vec<Line> = disks.iter().map(add).collect();
    lines.extend([
        Line::new("set-verbose").arg(verbose.to_string()),
        Line::new("run"),
        Line::new("set-verbose").arg("false"),
        // What the start was for.
        Line::new("list-devices"),
    ]);
    let mut log = Vec::new();
    let mut failure = None;
    let mut ready = false;
    for line in lines {
        match shell.one(line, LAUNCH_LIMIT) {
            Ok(Ok(output)) => {
                ready = output.starts_with(b"/dev/sda\n");
                log.extend(output);
            }
            Ok(Err(reason)) => {
                log.extend_from_slice(shell.last_failure());
                failure.get_or_insert(reason);
            }
            Err(error @ (ToolError::NotFound { .. } | ToolError::Interrupted)) => {
                return Err(tool_error(error));
            }
            Err(error @ ToolError::TimedOut { .. }) => {
                log.extend_from_slice(shell.unanswered());
                return Err(not_started(&log, &error.to_string()));
            }
            Err(error) => {
                log.extend_from_slice(shell.unanswered());
                return Ok(Err((log, error.to_string())));
            }
        }
    }
    if ready {
        return Ok(Ok(shell));
    }
    let reason = failure.unwrap_or_else(|| "it does not see the disk".to_string());
    Ok(Err((log, reason)))
}

fn add(disk: &Attach<'_>) -> Line {
    let add = Line::new("add")
        .arg(disk.export)
        .arg("format:raw")
        .arg("protocol:nbd")
        .arg(format!("server:unix:{}", disk.socket.display()))
        .arg(format!("readonly:{}", disk.read_only));
    if disk.sector_size == 512 {
        return add;
    }
    add.arg(format!("blocksize:{}", disk.sector_size))
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

/// Reads what ntfs-3g offers as an extended attribute of a file.
pub(super) fn attribute(real: &str, name: &str) -> Line {
    Line::new("lgetxattr").arg(real).arg(name)
}

/// guestfish takes text; the names of our temporary files are that.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| std::io::Error::other("TMPDIR is not valid text").into())
}

pub(super) fn tool_error(error: ToolError) -> GuestError {
    match error {
        ToolError::NotFound { tool, hint } => GuestError::MissingTool { what: tool, hint },
        error => GuestError::Io(std::io::Error::other(error)),
    }
}

fn unreadable(real: &str, reason: String) -> GuestError {
    GuestError::Unreadable {
        path: real.to_string(),
        reason,
    }
}

/// Keeps the log and says what it means.
fn not_started(log: &[u8], error: &str) -> GuestError {
    let said = String::from_utf8_lossy(log);
    let (reason, mut hint) = diagnose(&said).map_or_else(
        || (error.to_string(), String::new()),
        |(reason, hint)| (reason.to_string(), hint.to_string()),
    );
    let kept = tempfile::Builder::new()
        .prefix("hyper2kvm-appliance-")
        .suffix(".log")
        .tempfile()
        .and_then(|file| {
            fs::write(file.path(), log)?;
            Ok(file.keep()?.1)
        });
    if let Ok(path) = kept {
        if !hint.is_empty() {
            hint.push_str("; ");
        }
        hint.push_str(&format!("the log is in {}", path.display()));
    }
    GuestError::Appliance { reason, hint }
}

/// The usual reasons why an appliance does not start, the first that fits.
fn diagnose(log: &str) -> Option<(&'static str, &'static str)> {
    let has = |words: &[&str]| words.iter().all(|word| log.contains(word));
    let kernel = "the kernel of this host cannot be read";
    [
        (
            has(&["supermin", "vmlinuz", "ermission denied"]),
            kernel,
            "Ubuntu keeps it from ordinary users: sudo chmod 0644 /boot/vmlinuz-*",
        ),
        (
            has(&["supermin", "failed to find a suitable kernel"]),
            "this host has no kernel in /boot that the appliance could boot",
            "install the distribution's kernel package, or name one with SUPERMIN_KERNEL and SUPERMIN_MODULES",
        ),
        (
            has(&["supermin", "exited with error status"]),
            "supermin could not build the appliance",
            "libguestfs-test-tool shows why; the package with the appliance may be missing",
        ),
        (
            has(&["No space left on device"]),
            "no space left for the appliance",
            "LIBGUESTFS_CACHEDIR and TMPDIR say where it goes (about 500 MB)",
        ),
        (
            has(&["Could not access KVM kernel module"]) || has(&["failed to initialize kvm"]),
            "/dev/kvm cannot be used",
            "allow it (group kvm), or do without: LIBGUESTFS_BACKEND_SETTINGS=force_tcg",
        ),
        (
            has(&["Cannot allocate memory"]) || has(&["cannot set up guest memory"]),
            "not enough memory for the appliance",
            "it takes about 1.3 GB; LIBGUESTFS_MEMSIZE makes it smaller",
        ),
    ]
    .into_iter()
    .find_map(|(fits, reason, hint)| fits.then_some((reason, hint)))
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Stat {
    mode: u32,
    size: u64,
}

/// The records in what `lstatns` and `lstatnslist` print: one value a line, numbers only.
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

/// A disk whose volumes are read in the appliance.
pub struct GuestfishReader {
    appliance: Appliance,
    volumes: Vec<Volume>,
}

/// Mounts every NTFS and FAT volume read-only in the appliance. A volume that cannot be mounted does
/// not fail the disk.
pub fn open(
    appliance: Appliance,
    disk: Arc<dyn BlockRead>,
    layout: &DiskLayout,
) -> Result<GuestfishReader> {
    let mut volumes = embedded::open(disk, layout)?.volumes().to_vec();
    appliance.with(|inner| {
        let feature = inner.one(Line::new("feature-available").arg("ntfs3g"))?;
        let ntfs = matches!(&feature, Ok(answer) if answer.starts_with(b"true"));
        for volume in &mut volumes {
            let options = match volume.kind {
                FsKind::Ntfs if !ntfs => return Err(no_ntfs()),
                FsKind::Ntfs => "ro",
                FsKind::Fat => "ro,utf8",
                _ => continue,
            };
            let made = inner.one(Line::new("mkmountpoint").arg(mount_point(volume.id)))?;
            let mounted = match made {
                Ok(_) => inner.mount(volume.id, volume.kind, options)?,
                Err(reason) => Err(reason),
            };
            if let Err(reason) = mounted {
                if reason.contains("unknown filesystem type") {
                    return Err(no_ntfs());
                }
                volume.state.unreadable.get_or_insert(reason);
            }
        }
        Ok(())
    })?;
    Ok(GuestfishReader { appliance, volumes })
}

fn no_ntfs() -> GuestError {
    GuestError::MissingTool {
        what: "NTFS in the libguestfs appliance".to_string(),
        hint: "install ntfs-3g (Debian, Ubuntu, openSUSE) or libguestfs-winsupport (RHEL), or use --engine embedded".to_string(),
    }
}

impl GuestRead for GuestfishReader {
    fn engine(&self) -> &'static str {
        TOOL
    }

    fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    fn stat(&self, volume: VolumeId, path: &GuestPath) -> Result<Option<FileInfo>> {
        self.appliance.with(|inner| {
            let Some(place) = inner.find(volume, path)? else {
                return Ok(None);
            };
            let Some(entry) = place.entry else {
                return Ok(None);
            };
            Ok(inner.describe(volume, vec![(place.real, entry)])?.pop())
        })
    }

    fn list(&self, volume: VolumeId, path: &GuestPath) -> Result<Vec<FileInfo>> {
        self.appliance.with(|inner| {
            let not_found = || GuestError::NotFound {
                path: path.to_string(),
            };
            let place = inner.find(volume, path)?.ok_or_else(not_found)?;
            let entry = place.entry.ok_or_else(not_found)?;
            if entry.kind != FileKind::Dir {
                return Err(GuestError::WrongKind {
                    path: path.to_string(),
                    expected: "directory",
                });
            }
            let entries: Vec<_> = inner
                .folder(&place.real)?
                .values()
                .map(|entry| (format!("{}/{}", place.real, entry.name), entry.clone()))
                .collect();
            inner.describe(volume, entries)
        })
    }

    fn read_at(
        &self,
        volume: VolumeId,
        path: &GuestPath,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        self.appliance.with(|inner| {
            let (real, size) = inner.file_at(volume, path)?;
            let len = (len as u64).min(size.saturating_sub(offset));
            inner.download(&real, path, offset, len)
        })
    }

    fn read(&self, volume: VolumeId, path: &GuestPath, limit: u64) -> Result<Vec<u8>> {
        self.appliance.with(|inner| {
            let (real, size) = inner.file_at(volume, path)?;
            if size > limit {
                return Err(GuestError::TooLarge {
                    path: path.to_string(),
                    size,
                    limit,
                });
            }
            inner.download(&real, path, 0, size)
        })
    }
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

    #[test]
    fn why_it_did_not_start() {
        for (log, hint) in [
            (
                "supermin: error: open: /boot/vmlinuz-6.8.0: Permission denied",
                "chmod",
            ),
            (
                "supermin: failed to find a suitable kernel (host_cpu=x86_64).",
                "SUPERMIN_KERNEL",
            ),
            (
                "libguestfs: error: /usr/bin/supermin exited with error status 1",
                "libguestfs-test-tool",
            ),
            (
                "Could not access KVM kernel module: Permission denied",
                "force_tcg",
            ),
        ] {
            assert!(diagnose(log).unwrap().1.contains(hint), "{log}");
        }
        assert_eq!(diagnose("some other reason"), None);
    }
}
