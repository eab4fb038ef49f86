//! A preview of the guest after a plan, in memory. `inspect` and `verify` read it to determine
//! whether the plan is sufficient, before anything is written.
//!
//! Files of the plan are read from the driver source. Hives that were already edited are the ones
//! that will be written; others are edited as trees and serialised. Everything else is read from
//! the guest. Directories of the plan are not listed, because no reader lists them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::drivers::driver_source::DriverSource;
use crate::guest::{
    FileInfo, FileKind, GuestError, GuestPath, GuestRead, Result, Volume, VolumeId,
};
use crate::inspect::{HiveName, Hives, LoadedBytes};
use crate::memory::FileBytes;
use crate::registry::build::Format;
use crate::registry::{BaseBlock, HiveError, HiveView, RegEdits};

enum Content<'a> {
    Bytes(Vec<u8>),
    /// A hive that the inspection has in memory.
    Shared(Arc<FileBytes>),
    /// A file of the driver source.
    DriverSource {
        path: &'a str,
        size: u64,
    },
    /// A file of the guest.
    Copy {
        from: &'a GuestPath,
        size: u64,
    },
}

struct Entry<'a> {
    path: GuestPath,
    content: Content<'a>,
    /// Whether the plan writes the file; otherwise it is only cached.
    written: bool,
}

/// The hives of the guest, and those already edited.
pub struct PreviewHives<'a> {
    pub before: &'a Hives,
    pub edited: &'a dyn Fn(HiveName) -> Option<FileBytes>,
}

pub struct Preview<'a> {
    guest: &'a dyn GuestRead,
    driver_source: &'a dyn DriverSource,
    system: VolumeId,
    hives: PreviewHives<'a>,
    entries: BTreeMap<(VolumeId, String), Entry<'a>>,
}

impl<'a> Preview<'a> {
    /// Creates a preview without any action; `system` is the volume of Windows.
    pub(super) fn new(
        hives: PreviewHives<'a>,
        system: VolumeId,
        guest: &'a dyn GuestRead,
        driver_source: &'a dyn DriverSource,
    ) -> Self {
        let before = hives.before;
        let mut preview = Self {
            guest,
            driver_source,
            system,
            hives,
            entries: BTreeMap::new(),
        };
        for name in [HiveName::System, HiveName::Software, HiveName::Drivers] {
            if let Some(loaded) = before.get(name) {
                preview.keep(system, loaded);
            }
        }
        preview
    }

    /// The guest before the fix.
    pub(super) fn guest(&self) -> &'a dyn GuestRead {
        self.guest
    }

    /// Adds a file of the driver source on the volume of Windows.
    pub(super) fn of_driver_source(&mut self, to: &GuestPath, path: &'a str, size: u64) {
        self.put(self.system, to, Content::DriverSource { path, size });
    }

    /// Adds a copy of a file of the same volume.
    pub(super) fn copied(
        &mut self,
        volume: VolumeId,
        to: &GuestPath,
        from: &'a GuestPath,
        size: u64,
    ) {
        self.put(volume, to, Content::Copy { from, size });
    }

    pub(super) fn bytes_of(&mut self, volume: VolumeId, path: &GuestPath, bytes: Vec<u8>) {
        self.put(volume, path, Content::Bytes(bytes));
    }

    /// Adds a hive with its edits.
    pub(super) fn edited(
        &mut self,
        hive: HiveName,
        volume: VolumeId,
        path: &GuestPath,
        edits: &RegEdits,
    ) -> std::result::Result<(), HiveError> {
        if let Some(loaded) = self.hives.before.get(hive) {
            let content = edited(hive, loaded, edits, self.hives.edited)?;
            self.put(volume, path, content);
        }
        Ok(())
    }

    /// Caches a hive in memory, so that it is not read again. A replayed one is not cached unless
    /// the plan writes it.
    fn keep(&mut self, volume: VolumeId, loaded: &'a LoadedBytes) {
        if !loaded.replayed {
            let entry = Entry {
                path: loaded.path.clone(),
                content: Content::Shared(loaded.bytes.clone()),
                written: false,
            };
            self.entries.insert((volume, loaded.path.key()), entry);
        }
    }

    fn put(&mut self, volume: VolumeId, path: &GuestPath, content: Content<'a>) {
        let entry = Entry {
            path: path.clone(),
            content,
            written: true,
        };
        self.entries.insert((volume, path.key()), entry);
    }

    fn entry(&self, volume: VolumeId, path: &GuestPath) -> Option<&Entry<'a>> {
        self.entries.get(&(volume, path.key()))
    }

    fn bytes<'s>(&'s self, volume: VolumeId, entry: &'s Entry<'a>) -> Result<Cow<'s, [u8]>> {
        match &entry.content {
            Content::Bytes(bytes) => Ok(Cow::Borrowed(bytes.as_slice())),
            Content::Shared(bytes) => Ok(Cow::Borrowed(bytes)),
            Content::DriverSource { path, .. } => {
                let bytes = self
                    .driver_source
                    .read(path)
                    .map_err(|e| GuestError::Unreadable {
                        path: (*path).to_string(),
                        reason: e.to_string(),
                    })?;
                Ok(Cow::Owned(bytes))
            }
            Content::Copy { from, size } => self.guest.read(volume, from, *size).map(Cow::Owned),
        }
    }
}

/// Returns the hive with its edits. A hive without edits (a replayed one that is only written)
/// keeps its bytes.
fn edited<'a>(
    hive: HiveName,
    loaded: &LoadedBytes,
    edits: &RegEdits,
    already: &dyn Fn(HiveName) -> Option<FileBytes>,
) -> std::result::Result<Content<'a>, HiveError> {
    // No driver and no boot entry is looked up in SOFTWARE: its edits decide nothing, and it is by
    // far the largest. A replayed one still has to be clean.
    let clean = || BaseBlock::parse(&loaded.bytes).is_ok_and(|base| !base.is_dirty());
    if hive == HiveName::Software && !loaded.replayed && clean() {
        return Ok(Content::Shared(loaded.bytes.clone()));
    }
    if let Some(bytes) = already(hive) {
        return Ok(Content::Shared(Arc::new(bytes)));
    }
    let format = match hive {
        HiveName::Bcd => Format::V1_3,
        HiveName::System | HiveName::Software | HiveName::Drivers => Format::V1_5,
    };
    let bytes = edits.rewritten(&HiveView::new(&loaded.bytes)?, hive.file_name(), format)?;
    Ok(Content::Shared(Arc::new(bytes.into())))
}

impl GuestRead for Preview<'_> {
    fn engine(&self) -> &'static str {
        self.guest.engine()
    }

    fn volumes(&self) -> &[Volume] {
        self.guest.volumes()
    }

    fn stat(&self, volume: VolumeId, path: &GuestPath) -> Result<Option<FileInfo>> {
        let Some(entry) = self.entry(volume, path).filter(|e| e.written) else {
            return self.guest.stat(volume, path);
        };
        let size = match &entry.content {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Shared(bytes) => bytes.len() as u64,
            Content::DriverSource { size, .. } | Content::Copy { size, .. } => *size,
        };
        let there = self.guest.stat(volume, path)?;
        Ok(Some(match there {
            // A written file is neither compressed nor a reparse point any more.
            Some(info) => FileInfo {
                size,
                reparse_tag: None,
                compressed: false,
                ..info
            },
            None => FileInfo {
                name: entry.path.name().unwrap_or_default().to_string(),
                kind: FileKind::File,
                size,
                reparse_tag: None,
                compressed: false,
                encrypted: false,
            },
        }))
    }

    fn list(&self, volume: VolumeId, path: &GuestPath) -> Result<Vec<FileInfo>> {
        self.guest.list(volume, path)
    }

    fn read_at(
        &self,
        volume: VolumeId,
        path: &GuestPath,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        let Some(entry) = self.entry(volume, path) else {
            return self.guest.read_at(volume, path, offset, len);
        };
        let bytes = self.bytes(volume, entry)?;
        let start = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let end = start.saturating_add(len).min(bytes.len());
        Ok(bytes.get(start..end).unwrap_or_default().to_vec())
    }

    fn read(&self, volume: VolumeId, path: &GuestPath, limit: u64) -> Result<Vec<u8>> {
        let Some(entry) = self.entry(volume, path) else {
            return self.guest.read(volume, path, limit);
        };
        let bytes = self.bytes(volume, entry)?;
        GuestError::check_size(path, bytes.len() as u64, limit)?;
        Ok(bytes.into_owned())
    }

    fn read_shared(
        &self,
        volume: VolumeId,
        path: &GuestPath,
        limit: u64,
    ) -> Result<Arc<FileBytes>> {
        match self.entry(volume, path).map(|entry| &entry.content) {
            Some(Content::Shared(bytes)) => {
                GuestError::check_size(path, bytes.len() as u64, limit)?;
                Ok(bytes.clone())
            }
            _ => Ok(Arc::new(self.read(volume, path, limit)?.into())),
        }
    }
}
