//! Writing through guestfish, in the appliance that read the disk.
//!
//! A volume is mounted for writing at its first change, after the same check of its metadata as in
//! the embedded engine. Contents are written with `upload`, which keeps the record, the security
//! descriptor and the attributes of an existing file. New files and directories need a security
//! descriptor: that of a sibling, or else of their directory. So they are written as a tar archive
//! of one member.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::sync::Arc;

use super::guestfish_appliance::{
    ATTRIBUTES, Appliance, Entry, HIDDEN_OR_SYSTEM, Inner, ResolvedPath, attribute, mount_point,
    text,
};
use super::guestfish_mapped as mapped;
use super::guestfish_tar::archive;
use super::ntfs3g::MountOptions;
use super::security;
use super::writer::check_ntfs;
use super::{
    BOOT_SECTOR, Extent, FileKind, FsKind, GuestError, GuestPath, GuestWrite, Result, VolumeId,
    check_extents, embedded,
};
use crate::block::{BlockRead, BlockWrite};
use crate::disk::layout::{DiskLayout, Partition};
use crate::tool::guestfish::Line;

/// Writes to the volumes of a disk, which must be attached writable to the appliance.
pub struct GuestfishWriter {
    appliance: Appliance,
    disk: Arc<dyn BlockWrite>,
    options: MountOptions,
    partitions: Vec<Partition>,
    writable: BTreeSet<VolumeId>,
    models: Models,
}

/// The security descriptor for new files (`false`) and directories (`true`), by parent.
type Models = HashMap<(String, bool), Vec<u8>>;

/// The most siblings whose security descriptors are read.
const MAX_SIBLINGS: usize = 64;

impl GuestfishWriter {
    pub fn new(
        appliance: Appliance,
        disk: Arc<dyn BlockWrite>,
        layout: &DiskLayout,
        options: MountOptions,
    ) -> Self {
        Self {
            partitions: embedded::partitions(disk.as_ref(), layout),
            appliance,
            disk,
            options,
            writable: BTreeSet::new(),
            models: HashMap::new(),
        }
    }

    /// Remounts a volume for writing.
    fn ready(&mut self, volume: VolumeId) -> Result<()> {
        if self.writable.contains(&volume) {
            return Ok(());
        }
        let kind = self.appliance.with(|inner| {
            let kind = inner.mounts.get(&volume).copied();
            kind.ok_or(GuestError::NoVolume(volume))
        })?;
        let options = match kind {
            FsKind::Ntfs => {
                let (disk, start, len) = self.place(volume)?;
                check_ntfs(disk, start, len, self.options)?;
                ""
            }
            _ => "utf8",
        };
        self.appliance.with(|inner| {
            let unmounted = inner.one(Line::new("umount").arg(mount_point(volume)))?;
            let mounted = match unmounted {
                Ok(_) => inner.mount(volume, kind, options)?,
                Err(reason) => Err(reason),
            };
            mounted.map(drop).map_err(|reason| GuestError::Op {
                op: "mounting for writing",
                path: "\\".to_string(),
                reason,
            })
        })?;
        self.writable.insert(volume);
        Ok(())
    }

    /// The location of a volume's bytes.
    fn place(&self, volume: VolumeId) -> Result<(Arc<dyn BlockRead>, u64, u64)> {
        if let Some(block) = mapped::block(&self.appliance, volume)? {
            let len = block.size();
            return Ok((block, 0, len));
        }
        let found = self.partitions.iter().find(|p| p.index == volume.partition);
        let partition = found.ok_or(GuestError::NoVolume(volume))?;
        Ok((
            self.disk.clone(),
            partition.start_bytes,
            partition.size_bytes,
        ))
    }

    /// Finds the path on a writable volume and runs `change` on it.
    fn change<T>(
        &mut self,
        op: &'static str,
        volume: VolumeId,
        path: &GuestPath,
        work: impl FnOnce(&mut Inner, &ResolvedPath, &Failure<'_>, &mut Models) -> Result<T>,
    ) -> Result<T> {
        self.ready(volume)?;
        let failure = Failure { op, volume, path };
        let models = &mut self.models;
        self.appliance.with(|inner| {
            let place = inner
                .find(volume, path)?
                .ok_or_else(|| failure.not_found())?;
            if place.entry.as_ref().is_some_and(|entry| entry.link) {
                return Err(failure.because("it is a reparse point".to_string()));
            }
            work(inner, &place, &failure, models)
        })
    }
}

struct Failure<'a> {
    op: &'static str,
    volume: VolumeId,
    path: &'a GuestPath,
}

impl Failure<'_> {
    fn because(&self, reason: String) -> GuestError {
        let path = self.path.to_string();
        if reason.contains("No space left on device") {
            return GuestError::NoSpace { path };
        }
        let op = self.op;
        GuestError::Op { op, path, reason }
    }

    fn not_found(&self) -> GuestError {
        GuestError::not_found(self.path)
    }

    fn wrong_kind(&self, expected: &'static str) -> GuestError {
        GuestError::wrong_kind(self.path, expected)
    }
}

/// Runs the commands; fails at the first failure.
fn all(inner: &mut Inner, failure: &Failure<'_>, lines: &[Line]) -> Result<()> {
    for reply in inner.run(lines)? {
        reply.map_err(|reason| failure.because(reason))?;
    }
    Ok(())
}

/// The security descriptor for a new file or directory; `None` on FAT, which has none.
fn model<'m>(
    inner: &mut Inner,
    models: &'m mut Models,
    place: &ResolvedPath,
    kind: FileKind,
    failure: &Failure<'_>,
) -> Result<Option<&'m [u8]>> {
    if inner.mounts.get(&failure.volume) != Some(&FsKind::Ntfs) {
        return Ok(None);
    }
    let key = (place.parent.clone(), kind == FileKind::Dir);
    if !models.contains_key(&key) {
        let siblings: Vec<String> = inner
            .folder(&place.parent)?
            .values()
            .filter(|entry| entry.kind == kind && !entry.link)
            .map(|entry| format!("{}/{}", place.parent, entry.name))
            .take(MAX_SIBLINGS)
            .collect();
        let mut from = place.parent.clone();
        for sibling in siblings {
            let flags = inner.one(attribute(&sibling, ATTRIBUTES))?;
            let flags = flags.map_err(|reason| failure.because(reason))?;
            let flags = flags.first_chunk().map_or(0, |b| u32::from_be_bytes(*b));
            if flags & HIDDEN_OR_SYSTEM == 0 {
                from = sibling;
                break;
            }
        }
        let security = inner.one(attribute(&from, "system.ntfs_acl"))?;
        let security = security.map_err(|reason| failure.because(reason))?;
        models.insert(key.clone(), security);
    }
    Ok(models.get(&key).map(Vec::as_slice))
}

fn create(
    inner: &mut Inner,
    place: &ResolvedPath,
    failure: &Failure<'_>,
    (kind, contents): (FileKind, &[u8]),
    security: Option<&[u8]>,
) -> Result<()> {
    let name = failure.path.name().unwrap_or_default();
    let file = inner.file();
    fs::write(&file, archive(name, kind, security, contents)?)?;
    let line = Line::new("tar-in")
        .arg(text(&file)?)
        .arg(&place.parent)
        .arg("xattrs:true");
    let created = all(inner, failure, &[line]);
    fs::remove_file(&file)?;
    created
}

fn entry(path: &GuestPath, place: &ResolvedPath, kind: FileKind, size: u64) -> Entry {
    let name = match &place.entry {
        Some(old) => old.name.clone(),
        None => path.name().unwrap_or_default().to_string(),
    };
    Entry {
        name,
        kind,
        size,
        link: false,
    }
}

impl GuestWrite for GuestfishWriter {
    fn create_dir(&mut self, volume: VolumeId, path: &GuestPath) -> Result<()> {
        self.change(
            "creating the directory",
            volume,
            path,
            |inner, place, failure, models| {
                if place.entry.is_some() {
                    return Err(failure.because("the name is taken".to_string()));
                }
                let security = model(inner, models, place, FileKind::Dir, failure)?;
                let security = security.map(|m| security::of_new_folder(path).unwrap_or(m));
                create(inner, place, failure, (FileKind::Dir, &[]), security)?;
                inner.remember(place, Some(entry(path, place, FileKind::Dir, 0)));
                Ok(())
            },
        )
    }

    fn write_file(&mut self, volume: VolumeId, path: &GuestPath, contents: &[u8]) -> Result<()> {
        self.change("writing", volume, path, |inner, place, failure, models| {
            if matches!(&place.entry, Some(e) if e.kind == FileKind::Dir) {
                return Err(failure.wrong_kind("file"));
            }
            if place.entry.is_none() {
                let security = model(inner, models, place, FileKind::File, failure)?;
                create(inner, place, failure, (FileKind::File, contents), security)?;
            } else {
                let file = inner.file();
                fs::write(&file, contents)?;
                let line = Line::new("upload").arg(text(&file)?).arg(&place.real);
                let uploaded = all(inner, failure, &[line]);
                fs::remove_file(&file)?;
                uploaded?;
            }
            let size = contents.len() as u64;
            inner.remember(place, Some(entry(path, place, FileKind::File, size)));
            Ok(())
        })
    }

    fn patch_file(
        &mut self,
        volume: VolumeId,
        path: &GuestPath,
        size: u64,
        extents: &[Extent],
    ) -> Result<()> {
        const OP: &str = "changing";
        check_extents(OP, path, size, extents)?;
        self.change(OP, volume, path, |inner, place, failure, _| {
            let old = match &place.entry {
                None => return Err(failure.not_found()),
                Some(e) if e.kind == FileKind::Dir => return Err(failure.wrong_kind("file")),
                Some(e) => e.size,
            };
            let resize = Line::new("truncate-size")
                .arg(&place.real)
                .arg(size.to_string());
            let mut lines = Vec::new();
            // First, so that a lack of space shows before the first byte is written.
            if size > old {
                lines.push(resize.clone());
            }
            let mut files = Vec::new();
            for extent in extents.iter().filter(|e| !e.data.is_empty()) {
                let file = inner.file();
                fs::write(&file, &extent.data)?;
                lines.push(
                    Line::new("upload-offset")
                        .arg(text(&file)?)
                        .arg(&place.real)
                        .arg(extent.offset.to_string()),
                );
                files.push(file);
            }
            if size < old {
                lines.push(resize);
            }
            let changed = all(inner, failure, &lines);
            for file in files {
                fs::remove_file(file)?;
            }
            changed?;
            inner.remember(place, Some(entry(path, place, FileKind::File, size)));
            Ok(())
        })
    }

    fn patch_boot_sector(&mut self, volume: VolumeId, extents: &[Extent]) -> Result<()> {
        const OP: &str = "changing the boot sector of";
        let path = &GuestPath::root();
        check_extents(OP, path, BOOT_SECTOR, extents)?;
        self.ready(volume)?;
        let failure = Failure {
            op: OP,
            volume,
            path,
        };
        self.appliance.with(|inner| {
            for extent in extents {
                let file = inner.file();
                fs::write(&file, &extent.data)?;
                let line = Line::new("upload-offset")
                    .arg(text(&file)?)
                    .arg(inner.device(volume))
                    .arg(extent.offset.to_string());
                let written = all(inner, &failure, &[line]);
                fs::remove_file(&file)?;
                written?;
            }
            Ok(())
        })
    }

    fn remove_file(&mut self, volume: VolumeId, path: &GuestPath) -> Result<()> {
        self.change("removing", volume, path, |inner, place, failure, _| {
            match &place.entry {
                None => return Err(failure.not_found()),
                Some(e) if e.kind == FileKind::Dir => return Err(failure.wrong_kind("file")),
                Some(_) => {}
            }
            all(inner, failure, &[Line::new("rm").arg(&place.real)])?;
            inner.remember(place, None);
            Ok(())
        })
    }

    fn remove_dir(&mut self, volume: VolumeId, path: &GuestPath) -> Result<()> {
        self.change(
            "removing the directory",
            volume,
            path,
            |inner, place, failure, _| {
                match &place.entry {
                    None => return Err(failure.not_found()),
                    Some(e) if e.kind == FileKind::File => {
                        return Err(failure.wrong_kind("directory"));
                    }
                    Some(_) => {}
                }
                all(inner, failure, &[Line::new("rmdir").arg(&place.real)])?;
                inner.remember(place, None);
                Ok(())
            },
        )
    }

    /// Unmounts everything and shuts the appliance down, which ends its reader too.
    fn close(self: Box<Self>) -> Result<()> {
        self.appliance.with(Inner::close)?;
        self.disk.flush().map_err(GuestError::Io)
    }
}
