//! Presents a source on another host as a local directory.
//!
//! Descriptions (`.vmx`, `.ovf`, libvirt XML, VMDK descriptors) are small and are copied. The files
//! they name are looked up on the other host: relative names beside them, absolute ones at their
//! path. A disk becomes a placeholder ([`crate::disk::remote`]); its contents are not copied. So
//! all code that reads descriptions, follows chains or looks for locks and newer links works on
//! this directory.
//!
//! The names are from the other host and are hostile. Every one stays below the mirror's root,
//! which stands for the root of that host. No file of this host is ever read.
//!
//! A package's manifest is not mirrored, because comparing its digests would require fetching every
//! byte.

mod host;
mod open;
mod paths;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use crate::block::Window;
use crate::disk::compose::{Composed, Piece};
use crate::disk::remote::{self, ReadAt, Remote, RemoteFile};
use crate::disk::{detect, vmdk};
use crate::wire::{Listed, Location, WireError};

pub(crate) use host::Host;
use host::Lazy;
pub(crate) use open::{access, broken, close, fetched, open, transport, trouble};
use paths::{below, may_be_link, normal, one_name, remote_path};

use super::{MAX_DESCRIPTION, libvirt, ovf, tar, vmx};
use crate::disk::charset::{self, Name};

type Result<T, E = WireError> = std::result::Result<T, E>;

/// The size up to which a file is copied whole, because it may be a descriptor.
const SMALL: u64 = 64 << 10;
/// The most files in a mirror, however many a description names.
const MAX_FILES: usize = 4096;
/// The most files beside a disk that are checked for being built on it.
const MAX_BESIDE: usize = 64;
/// The most links of a chain; VMware allows 32 snapshots.
const MAX_DEPTH: usize = 64;
/// The depth to which a directory is listed, as on this host.
const MAX_FOLDERS: usize = 4;

/// The most frequent cause of a refusal without a reason.
const BUSY: &str = "power the VM off: a host refuses to open the disks of a VM that runs";

/// A directory being filled.
pub(crate) struct Mirror {
    host: Arc<dyn Host>,
    root: PathBuf,
    there: BTreeSet<PathBuf>,
}

impl Mirror {
    /// Creates a mirror; `root` is an empty directory that stands for the root of the other host.
    pub(crate) fn new(host: Arc<dyn Host>, root: &Path) -> Self {
        Self {
            host,
            root: root.to_owned(),
            there: BTreeSet::new(),
        }
    }

    /// Mirrors the source of the command line, and returns its local path.
    pub(crate) fn source(&mut self, at: &Location) -> Result<PathBuf> {
        if at.transport().is_export() {
            return self.export(at);
        }
        let path = self.place(at)?;
        let file = match self.host.open(at) {
            Ok(file) => file,
            Err(error) => {
                return match self.host.list(at) {
                    Ok(entries) => self
                        .directory(at, &path, entries, MAX_FOLDERS)
                        .map(|()| path),
                    Err(_) => Err(error),
                };
            }
        };
        match super::extension(&path).as_str() {
            "vmx" | "vmtx" => self.machine(at, &path, file, Self::vmx)?,
            "ovf" => self.machine(at, &path, file, Self::ovf)?,
            "xml" => self.machine(at, &path, file, Self::xml)?,
            "ova" => return self.archive(at, &path, file),
            _ => self.disk(at, &path, file, 0)?,
        }
        // Last: named files are followed, files that only lie there are not.
        let beside = self.host.list(&at.directory()).unwrap_or_default();
        self.beside(at, &path, &beside)?;
        Ok(path)
    }

    /// Mirrors an export: one raw disk with the export's name.
    fn export(&mut self, at: &Location) -> Result<PathBuf> {
        let file = self.host.open(at)?;
        let plain = |c: char| !c.is_control() && c != '/';
        let name: String = at
            .path()
            .chars()
            .map(|c| if plain(c) { c } else { '_' })
            .collect();
        let name = match name.trim_matches('.') {
            "" if at.host().is_empty() => "disk".to_owned(),
            "" => at.host().to_owned(),
            name => name.chars().take(100).collect(),
        };
        let path = self.root.join(name);
        self.placeholder(at, &path, file)?;
        Ok(path)
    }

    /// The local path of a file of the other host.
    fn place(&self, at: &Location) -> Result<PathBuf> {
        below(&self.root, Path::new(at.path())).ok_or_else(|| {
            WireError::usage(
                format!("{at}: its path is not plain"),
                "name it without `..`",
            )
        })
    }

    /// The local path of `name` in the file at `path`: beside it, or from the root.
    fn named(&self, path: &Path, name: &str) -> Option<PathBuf> {
        let name = remote_path(name);
        match name.strip_prefix('/') {
            Some(rest) => below(&self.root, Path::new(rest)),
            None => {
                let folder = crate::files::folder_of(path)
                    .strip_prefix(&self.root)
                    .ok()?;
                below(&self.root, &normal(&folder.join(&*name))?)
            }
        }
    }

    fn failed(at: &Location, path: &Path) -> impl Fn(io::Error) -> WireError {
        let (at, path) = (at.to_string(), path.display().to_string());
        move |e| {
            WireError::host(
                &at,
                &format!("making {path}, which stands for it"),
                &e,
                "temporary files are kept in /tmp; TMPDIR names another directory",
            )
        }
    }

    /// Whether nothing exists at `path` yet, and the limit is not reached.
    fn is_new(&mut self, at: &Location, path: &Path) -> Result<bool> {
        if self.there.len() >= MAX_FILES {
            return Err(WireError::failed(
                at,
                format!("more than {MAX_FILES} files are named"),
                "name one VM or disk",
            ));
        }
        let is_new = self.there.insert(path.to_owned());
        if is_new {
            remote::show_as(path, &at.to_string());
        }
        Ok(is_new)
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        let folder = crate::files::folder_of(path);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        options.open(path)
    }

    fn placeholder(
        &mut self,
        at: &Location,
        path: &Path,
        file: Arc<dyn RemoteFile>,
    ) -> Result<Option<Arc<Remote>>> {
        if !self.is_new(at, path)? {
            return Ok(None);
        }
        let made = || {
            let placeholder = self.create(path)?;
            // The file system does not support files of that length, but the wire does.
            let _ = placeholder.set_len(file.size());
            set_modified(&placeholder, file.modified_ms());
            remote::register(&placeholder, file.clone(), false)
        };
        made().map(Some).map_err(Self::failed(at, path))
    }

    /// Copies a small file. Returns whether it is new.
    fn copy(
        &mut self,
        at: &Location,
        path: &Path,
        file: Arc<dyn RemoteFile>,
        bytes: &[u8],
    ) -> Result<bool> {
        if !self.is_new(at, path)? {
            return Ok(false);
        }
        let made = || {
            let mut copy = self.create(path)?;
            copy.write_all(bytes)?;
            set_modified(&copy, file.modified_ms());
            remote::register(&copy, file.clone(), true)
        };
        made().map_err(Self::failed(at, path))?;
        Ok(true)
    }

    /// Creates a file whose mere existence matters.
    fn mark(&mut self, at: &Location, path: &Path) -> Result<()> {
        if self.is_new(at, path)? {
            self.create(path).map_err(Self::failed(at, path))?;
        }
        Ok(())
    }

    /// Mirrors a description and the disks it names.
    fn machine(
        &mut self,
        at: &Location,
        path: &Path,
        file: Arc<dyn RemoteFile>,
        disks: fn(&mut Self, &Location, &Path, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let bytes = self.host.read(at, MAX_DESCRIPTION)?;
        match self.copy(at, path, file, &bytes)? {
            true => disks(self, at, path, &bytes),
            false => Ok(()),
        }
    }

    fn vmx(&mut self, at: &Location, path: &Path, bytes: &[u8]) -> Result<()> {
        // The local reader reports errors in it.
        let Ok(description) = vmx::Vmx::parse(bytes) else {
            return Ok(());
        };
        for disk in description.machine().1 {
            let name = disk.file.replace('\\', "/");
            let Some(old) = charset::on_the_old_host(&name) else {
                self.disk_named(at, path, &disk.file, 0)?;
                continue;
            };
            // As many components as exist: the reader looks for that path first.
            let Some(place) = below(crate::files::folder_of(path), Path::new(old)) else {
                continue;
            };
            self.disk_at(at, &disk.file, &place, 0)?;
        }
        Ok(())
    }

    fn ovf(&mut self, at: &Location, path: &Path, bytes: &[u8]) -> Result<()> {
        let options = super::Options::default();
        let Ok((_, disks)) = ovf::parse(path, bytes, &options) else {
            return Ok(());
        };
        for disk in disks {
            let names = disk.names.iter().filter_map(|name| name.to_str());
            self.first(names, |mirror, name| mirror.disk_named(at, path, name, 0))?;
        }
        Ok(())
    }

    fn xml(&mut self, at: &Location, path: &Path, bytes: &[u8]) -> Result<()> {
        let Ok((_, disks)) = libvirt::parse(path, bytes) else {
            return Ok(());
        };
        for disk in disks {
            let names = disk.names.iter().filter_map(|name| name.to_str());
            self.first(names, |mirror, name| mirror.disk_named(at, path, name, 0))?;
        }
        Ok(())
    }

    /// The first existing one of several spellings.
    fn first<'n>(
        &mut self,
        names: impl Iterator<Item = &'n str>,
        mut look: impl FnMut(&mut Self, &str) -> Result<bool>,
    ) -> Result<()> {
        for name in names {
            if look(self, name)? {
                break;
            }
        }
        Ok(())
    }

    /// Mirrors a disk by its name in the file at `path`. Returns whether it exists.
    fn disk_named(&mut self, at: &Location, path: &Path, name: &str, depth: usize) -> Result<bool> {
        match self.named(path, name) {
            Some(place) => self.disk_at(at, name, &place, depth),
            // It leads out of the root; the local reader refuses it.
            None => Ok(false),
        }
    }

    fn disk_at(&mut self, at: &Location, name: &str, place: &Path, depth: usize) -> Result<bool> {
        if self.there.contains(place) {
            return Ok(true);
        }
        let Some((there, file)) = self.open_named(at, name)? else {
            return Ok(false);
        };
        self.disk(&there, place, file, depth)?;
        Ok(true)
    }

    /// Mirrors a file that the file at `at` names, if it exists.
    fn open_named(
        &self,
        at: &Location,
        name: &str,
    ) -> Result<Option<(Location, Arc<dyn RemoteFile>)>> {
        let there = at.join(&remote_path(name))?;
        match self.host.open(&there) {
            Ok(file) => Ok(Some((there, file))),
            Err(error) if error.is_not_found() => Ok(None),
            Err(WireError::Failed { at, reason, hint }) if hint.is_empty() => {
                Err(WireError::failed(at, reason, BUSY))
            }
            Err(error) => Err(error),
        }
    }

    /// Mirrors a disk and the images below it.
    fn disk(
        &mut self,
        at: &Location,
        path: &Path,
        file: Arc<dyn RemoteFile>,
        depth: usize,
    ) -> Result<()> {
        if depth > MAX_DEPTH {
            // The local reader of the chain refuses it.
            return Ok(());
        }
        let size = file.size();
        let reader = if size > 0 && size <= SMALL {
            let bytes = self.host.read(at, SMALL)?;
            if !self.copy(at, path, file.clone(), &bytes)? {
                return Ok(());
            }
            Remote::new(file)
        } else {
            match self.placeholder(at, path, file)? {
                Some(reader) => reader,
                None => return Ok(()),
            }
        };
        let failed = |e: io::Error| WireError::host(at, "reading it", &e, "");
        let text = detect::vmdk_descriptor(&*reader, size).map_err(failed)?;
        if let Some(text) = text {
            return self.descriptor(at, path, &text, depth);
        }
        // A snapshot of Workstation is one file, and its descriptor names the parent.
        if let Some(text) = vmdk::own_descriptor(&*reader, size).map_err(failed)? {
            return self.parent(at, path, &text, depth);
        }
        let backing = detect::backing_name(&*reader, size).map_err(failed)?;
        let data = detect::qcow2_data_file(&*reader, size);
        for name in backing.into_iter().chain(data.map_err(failed)?) {
            let name = String::from_utf8_lossy(&name).into_owned();
            // The local reader refuses protocols and the like.
            if !name.contains(':') && !name.is_empty() {
                self.disk_named(at, path, &name, depth + 1)?;
            }
        }
        Ok(())
    }

    /// Mirrors the extents of a descriptor, and its parent.
    fn descriptor(&mut self, at: &Location, path: &Path, text: &[u8], depth: usize) -> Result<()> {
        let charset = vmdk::charset(text);
        for extent in detect::parse_extents(text) {
            let name = Name::new(charset, &extent.name).text;
            let Some(place) = self.named(path, &name) else {
                continue;
            };
            if name.contains("://") || self.there.contains(&place) {
                continue;
            }
            let Some((there, file)) = self.open_named(at, &name)? else {
                continue;
            };
            self.placeholder(&there, &place, file)?;
        }
        self.parent(at, path, text, depth)
    }

    /// Mirrors the parent that a descriptor names.
    fn parent(&mut self, at: &Location, path: &Path, text: &[u8], depth: usize) -> Result<()> {
        let parent = vmdk::Descriptor::parse(text).ok().and_then(|d| d.parent);
        let Some(parent) = parent else { return Ok(()) };
        // A parent with a path of the old host is looked up beside the delta.
        let place = match parent.moved() {
            Some(last) => self.named(path, &last.text),
            None => self.named(path, &parent.text),
        };
        let Some(place) = place else { return Ok(()) };
        if !self.disk_at(at, &parent.text, &place, depth + 1)?
            && let Some(last) = parent.moved()
        {
            self.disk_at(at, &last.text, &place, depth + 1)?;
        }
        Ok(())
    }

    /// Mirrors the members of an OVA, which is a plain tar: each member is contiguous.
    fn archive(
        &mut self,
        at: &Location,
        path: &Path,
        file: Arc<dyn RemoteFile>,
    ) -> Result<PathBuf> {
        let reader = Remote::new(file.clone());
        let cursor = Window::new(reader.clone(), 0, file.size());
        let wrong = |e: &dyn std::fmt::Display| {
            WireError::failed(
                at,
                format!("it is not an OVA that can be read in place: {e}"),
                "unpack it there, and name the .ovf or the disk in it",
            )
        };
        let members = tar::members(cursor).map_err(|e| wrong(&e))?;
        let folder = path.with_extension("ova.members");
        let mut description = None;
        for member in members {
            let place = below(&folder, Path::new(&member.name));
            let Some(place) = place.filter(|place| super::extension(place) != "mf") else {
                continue;
            };
            if super::extension(&place) == "ovf" && !super::is_apple_double(&place) {
                if member.size > MAX_DESCRIPTION {
                    return Err(wrong(&"its .ovf is too large"));
                }
                let mut bytes = vec![0; member.size as usize];
                reader
                    .read_exact_at(&mut bytes, member.offset)
                    .map_err(|e| wrong(&e))?;
                self.copy(at, &place, file.clone(), &bytes)?;
                description.get_or_insert(place);
                continue;
            }
            let piece = Piece::of(&file, member.offset, member.size);
            self.placeholder(at, &place, Composed::of(vec![piece]))?;
        }
        description.ok_or_else(|| wrong(&"it has no .ovf"))
    }

    /// Mirrors locks of a running VM, and files that may be built on a disk.
    fn beside(&mut self, at: &Location, path: &Path, entries: &[Listed]) -> Result<()> {
        let folder = crate::files::folder_of(path).to_owned();
        let own = entries.iter().find(|e| e.name == at.file_name());
        let since = own.and_then(|e| e.modified).unwrap_or(0);
        let mut looked = 0;
        for entry in entries {
            let Some(place) = one_name(&folder, &entry.name) else {
                continue;
            };
            let there = at.directory().with_path(&format!(
                "{}/{}",
                at.directory().path().trim_end_matches('/'),
                entry.name
            ));
            let kind = super::extension(&place);
            if entry.name.starts_with(".lck-") || kind == "vmss" {
                self.mark(&there, &place)?;
            } else if kind == "lck" {
                self.lock(&there, &place, entry)?;
            } else if !entry.is_directory
                && looked < MAX_BESIDE
                && entry.name != at.file_name()
                && entry.size != Some(0)
                // An overlay is written after its base, or in the same second.
                && (entry.modified.unwrap_or(u64::MAX) >= since || entry.size <= Some(SMALL))
                && may_be_link(path, &entry.name)
            {
                looked += 1;
                self.listed(&there, &place, entry)?;
            }
        }
        Ok(())
    }

    /// Workstation's locks are directories with a file per holder.
    fn lock(&mut self, there: &Location, place: &Path, entry: &Listed) -> Result<()> {
        if !entry.is_directory {
            return self.mark(there, place);
        }
        let holders = self.host.list(there).map_or(1, |entries| entries.len());
        match holders {
            0 => Ok(()),
            _ => self.mark(there, &place.join("holder")),
        }
    }

    /// Mirrors a file of a directory: a small description is copied, any other file is opened at
    /// its first read.
    fn listed(&mut self, at: &Location, place: &Path, entry: &Listed) -> Result<()> {
        let lazy = || Arc::new(Lazy::new(self.host.clone(), at, entry));
        let file: Arc<dyn RemoteFile> = match entry.size {
            Some(_) => lazy(),
            // A page of a web server lists only names.
            None => self.host.open(at).unwrap_or_else(|_| lazy()),
        };
        let size = file.size();
        let description = matches!(
            super::extension(place).as_str(),
            "vmx" | "vmtx" | "ovf" | "xml"
        );
        let limit = if description { MAX_DESCRIPTION } else { SMALL };
        if size == 0 || size > limit {
            return self.placeholder(at, place, file).map(drop);
        }
        match self.host.read(at, limit) {
            Ok(bytes) => self.copy(at, place, file, &bytes).map(drop),
            // Opening it reports why it is unreadable.
            Err(_) => self.placeholder(at, place, file).map(drop),
        }
    }

    fn directory(
        &mut self,
        at: &Location,
        path: &Path,
        entries: Vec<Listed>,
        depth: usize,
    ) -> Result<()> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(Self::failed(at, path))?;
        for entry in entries {
            let Some(place) = one_name(path, &entry.name) else {
                continue;
            };
            let there = at.with_path(&format!(
                "{}/{}",
                at.path().trim_end_matches('/'),
                entry.name
            ));
            if super::extension(&place) == "lck" {
                self.lock(&there, &place, &entry)?;
            } else if entry.is_directory && depth > 1 {
                // An inaccessible directory only hides its own contents.
                if let Ok(entries) = self.host.list(&there) {
                    self.directory(&there, &place, entries, depth - 1)?;
                }
            } else if !entry.is_directory {
                self.listed(&there, &place, &entry)?;
            }
        }
        Ok(())
    }
}

fn set_modified(file: &File, ms: u64) {
    if ms > 0 {
        let _ = file.set_modified(UNIX_EPOCH + Duration::from_millis(ms));
    }
}
