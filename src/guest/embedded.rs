//! The embedded reading engine: NTFS and FAT inside this process, without root, mount or appliance.
//!
//! A BitLocker volume that a key opens, or that is suspended, is read like any other: see
//! [`super::fve`].
//!
//! Every volume is opened once to determine its state. One that cannot be opened is still listed,
//! with the reason in its state. Opening reads a few dozen blocks per volume.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::fat_read::FatVolume;
use super::fs::{IDENTIFY_BYTES, identify, kind_of_type};
use super::fve::{self, Unlocked};
use super::keys::Keys;
use super::ntfs_read::NtfsVolume;
use super::spare::{self, Found, Scratch, Wanted};
use super::{
    FileInfo, FsKind, GuestError, GuestPath, GuestRead, Result, Volume, VolumeId, VolumeState,
};
use crate::block::BlockRead;
use crate::disk::layout::{DiskLayout, Partition, Scheme};
use crate::memory::FileBytes;

enum Engine {
    Ntfs(NtfsVolume),
    Fat(FatVolume<dyn BlockRead>),
}

/// A disk whose volumes can be read.
pub struct EmbeddedReader {
    /// The disk with the unlocked volumes in clear.
    disk: Arc<dyn BlockRead>,
    unlocked: Unlocked,
    volumes: Vec<Volume>,
    engines: BTreeMap<VolumeId, Engine>,
}

/// Opens the volumes of a disk without keys. A damaged volume does not fail the disk.
pub fn open(disk: Arc<dyn BlockRead>, layout: &DiskLayout) -> Result<EmbeddedReader> {
    open_with(disk, layout, &Keys::default())
}

/// Opens the volumes of a disk with keys for those in BitLocker.
pub fn open_with(
    disk: Arc<dyn BlockRead>,
    layout: &DiskLayout,
    keys: &Keys,
) -> Result<EmbeddedReader> {
    let (unlocked, mut locked) = unlock(disk.as_ref(), layout, keys)?;
    let disk: Arc<dyn BlockRead> = match unlocked.is_empty() {
        true => disk,
        false => Arc::new(unlocked.over(disk)),
    };
    let mut reader = EmbeddedReader {
        disk: disk.clone(),
        unlocked,
        volumes: Vec::new(),
        engines: BTreeMap::new(),
    };
    for partition in partitions(disk.as_ref(), layout) {
        let id = VolumeId::new(partition.index);
        let kind = kind(disk.as_ref(), &partition)?;
        let (engine, label, mut state) = match open_volume(&disk, &partition, kind) {
            Ok((engine, label, state)) => (engine, label, state),
            Err(error) => {
                let state = VolumeState {
                    unreadable: Some(reason(error)),
                    ..VolumeState::default()
                };
                (None, None, state)
            }
        };
        if let Some(locked) = locked.remove(&id) {
            state.protectors = locked.protectors;
            state.closed = locked.closed;
            state.container = locked.container;
            state.unreadable = locked.unreadable.or(state.unreadable);
        }
        if let Some(engine) = engine {
            reader.engines.insert(id, engine);
        }
        reader.volumes.push(Volume {
            id,
            partition,
            kind,
            label,
            state,
        });
    }
    Ok(reader)
}

/// The BitLocker volumes of a disk: the unlocked ones, and the state of each.
fn unlock(
    disk: &dyn BlockRead,
    layout: &DiskLayout,
    keys: &Keys,
) -> Result<(Unlocked, BTreeMap<VolumeId, VolumeState>)> {
    let (mut unlocked, mut states) = (Vec::new(), BTreeMap::new());
    for partition in partitions(disk, layout) {
        if kind(disk, &partition)? != FsKind::Bitlocker {
            continue;
        }
        let id = VolumeId::new(partition.index);
        let (start, len) = (partition.start_bytes, partition.size_bytes);
        let credentials = keys.for_bitlocker(id);
        let look = fve::look(disk, start, len, &credentials, keys.stretched());
        let mut state = VolumeState {
            protectors: look
                .protections
                .iter()
                .map(|p| p.name().to_string())
                .collect(),
            ..VolumeState::default()
        };
        match look.volume {
            Ok(volume) => {
                tracing::debug!(
                    "partition {id:?}: {}, unlocked by {:?}",
                    volume.cipher_name,
                    volume.by
                );
                state.container = Some(FsKind::Bitlocker);
                unlocked.push(volume);
            }
            Err((closed, reason)) => {
                state.closed = Some(closed);
                state.unreadable = Some(reason);
            }
        }
        states.insert(id, state);
    }
    Ok((Unlocked::new(unlocked), states))
}

/// The partitions of a disk; for one without a table, the whole disk as partition 0.
pub(super) fn partitions(disk: &dyn BlockRead, layout: &DiskLayout) -> Vec<Partition> {
    if layout.scheme != Scheme::None || !layout.partitions.is_empty() {
        return layout.partitions.clone();
    }
    vec![Partition {
        index: 0,
        type_id: String::new(),
        start_bytes: 0,
        size_bytes: disk.size(),
        guid: None,
        name: None,
        active: false,
    }]
}

/// The contents of a partition, from its type if that decides, otherwise from its first bytes.
pub(super) fn kind(disk: &dyn BlockRead, partition: &Partition) -> Result<FsKind> {
    if let Some(kind) = kind_of_type(partition) {
        return Ok(kind);
    }
    let available = disk.size().saturating_sub(partition.start_bytes);
    let len = (IDENTIFY_BYTES as u64)
        .min(partition.size_bytes)
        .min(available);
    let mut head = vec![0; len as usize];
    if !head.is_empty() {
        disk.read_at(partition.start_bytes, &mut head)?;
    }
    Ok(identify(&head))
}

type Opened = (Option<Engine>, Option<String>, VolumeState);

fn open_volume(disk: &Arc<dyn BlockRead>, partition: &Partition, kind: FsKind) -> Result<Opened> {
    let (start, len) = (partition.start_bytes, partition.size_bytes);
    let root = GuestPath::root();
    match kind {
        FsKind::Ntfs => {
            let volume =
                NtfsVolume::open(disk.clone(), start, len).map_err(|error| error.at(&root))?;
            let label = volume.label().map_err(|error| error.at(&root))?;
            let state = volume.state().map_err(|error| error.at(&root))?;
            Ok((Some(Engine::Ntfs(volume)), label, state))
        }
        FsKind::Fat => {
            let volume = FatVolume::open(disk.clone(), start, len)?;
            let state = VolumeState {
                cluster_size: volume.cluster_size(),
                ..VolumeState::default()
            };
            let label = volume.label();
            Ok((Some(Engine::Fat(volume)), label, state))
        }
        _ => Ok((None, None, VolumeState::default())),
    }
}

fn reason(error: GuestError) -> String {
    match error {
        GuestError::Unreadable { reason, .. } => reason,
        GuestError::Io(error) => error.to_string(),
        error => error.to_string(),
    }
}

impl EmbeddedReader {
    /// The BitLocker volumes that are read here, for a writer to the same disk.
    pub fn unlocked(&self) -> &Unlocked {
        &self.unlocked
    }

    fn engine_of(&self, volume: VolumeId) -> Result<&Engine> {
        self.engines
            .get(&volume)
            .ok_or(GuestError::NoVolume(volume))
    }

    /// Passes the free ranges of a volume, in bytes of the disk, to `found`. `Ok(false)` if the map
    /// of its kind is not supported.
    pub fn free_ranges(
        &self,
        volume: VolumeId,
        wanted: Wanted<'_>,
        found: Found<'_>,
    ) -> Result<bool> {
        // BitLocker's own places are never free, whatever the map of the file system shows.
        let found: Found<'_> = &mut |range| {
            let mut free = self.unlocked.without_reserved(range).into_iter();
            free.try_for_each(&mut *found)
        };
        match self.engine_of(volume)? {
            Engine::Ntfs(v) => {
                v.free_ranges(wanted, found)
                    .map_err(|e| e.at(&GuestPath::root()))?;
                Ok(true)
            }
            Engine::Fat(_) => {
                let known = self.volumes.iter().find(|v| v.id == volume);
                let partition = &known.ok_or(GuestError::NoVolume(volume))?.partition;
                let (start, len) = (partition.start_bytes, partition.size_bytes);
                spare::fat_free_ranges(self.disk.as_ref(), start, len, wanted, found)
            }
        }
    }

    /// The clusters of a file whose contents Windows recreates at every start.
    pub fn scratch(&self, volume: VolumeId, path: &GuestPath) -> Result<Scratch> {
        match self.engine_of(volume)? {
            Engine::Ntfs(v) => v.scratch(path).map_err(|e| e.at(path)),
            Engine::Fat(_) => Ok(Scratch::Absent),
        }
    }
}

impl GuestRead for EmbeddedReader {
    fn engine(&self) -> &'static str {
        "embedded"
    }

    fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    fn free_bytes(&self, volume: VolumeId, enough: u64) -> Result<Option<u64>> {
        let free = match self.engine_of(volume)? {
            Engine::Ntfs(v) => v.free_bytes(enough).map_err(|e| e.at(&GuestPath::root())),
            Engine::Fat(v) => v.free_bytes(),
        };
        free.map(Some)
    }

    fn stat(&self, volume: VolumeId, path: &GuestPath) -> Result<Option<FileInfo>> {
        match self.engine_of(volume)? {
            Engine::Ntfs(v) => v.stat(path).map_err(|e| e.at(path)),
            Engine::Fat(v) => v.stat(path),
        }
    }

    fn list(&self, volume: VolumeId, path: &GuestPath) -> Result<Vec<FileInfo>> {
        match self.engine_of(volume)? {
            Engine::Ntfs(v) => v.list(path),
            Engine::Fat(v) => v.list(path),
        }
    }

    fn read_at(
        &self,
        volume: VolumeId,
        path: &GuestPath,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        match self.engine_of(volume)? {
            Engine::Ntfs(v) => v.read_at(path, offset, len),
            Engine::Fat(v) => v.read_at(path, offset, len),
        }
    }

    fn read(&self, volume: VolumeId, path: &GuestPath, limit: u64) -> Result<Vec<u8>> {
        match self.engine_of(volume)? {
            Engine::Ntfs(v) => v.read(path, limit),
            Engine::Fat(v) => v.read(path, limit),
        }
    }

    fn read_shared(
        &self,
        volume: VolumeId,
        path: &GuestPath,
        limit: u64,
    ) -> Result<Arc<FileBytes>> {
        let bytes = match self.engine_of(volume)? {
            Engine::Ntfs(v) => v.read_kept(path, limit)?,
            Engine::Fat(v) => v.read(path, limit)?.into(),
        };
        Ok(Arc::new(bytes))
    }
}
