//! A guest in memory, for tests.

use std::collections::BTreeMap;

use crate::disk::layout::Partition;
use crate::guest::{
    FileInfo, FileKind, FsKind, GuestError, GuestPath, GuestRead, Result, Volume, VolumeId,
    VolumeState,
};

#[derive(Clone)]
struct Node {
    info: FileInfo,
    data: Vec<u8>,
}

/// Volumes of files; directories exist as soon as they have files.
#[derive(Clone, Default)]
pub struct FakeGuest {
    /// The free space of one volume; that of the others is unknown.
    pub free: Option<(VolumeId, u64)>,
    /// What reading the free space fails with.
    pub free_error: Option<fn() -> GuestError>,
    volumes: Vec<Volume>,
    nodes: BTreeMap<(VolumeId, String), Node>,
}

impl FakeGuest {
    pub fn volume(&mut self, partition: Partition, kind: FsKind) -> &mut Volume {
        self.volumes.push(Volume {
            id: VolumeId::new(partition.index),
            partition,
            kind,
            label: None,
            state: VolumeState::default(),
        });
        self.volumes.last_mut().unwrap()
    }

    pub fn volume_mut(&mut self, id: u32) -> &mut Volume {
        let volume = self.volumes.iter_mut().find(|v| v.id == VolumeId::new(id));
        volume.unwrap()
    }

    pub fn file(&mut self, volume: u32, path: &str, data: Vec<u8>) -> &mut FileInfo {
        let path = GuestPath::parse(path).unwrap();
        let mut parent = path.parent();
        while let Some(folder) = parent.filter(|p| !p.is_root()) {
            self.node(volume, &folder, FileKind::Dir, Vec::new());
            parent = folder.parent();
        }
        self.node(volume, &path, FileKind::File, data)
    }

    fn node(
        &mut self,
        volume: u32,
        path: &GuestPath,
        kind: FileKind,
        data: Vec<u8>,
    ) -> &mut FileInfo {
        let info = FileInfo {
            name: path.name().unwrap().to_string(),
            kind,
            size: data.len() as u64,
            reparse_tag: None,
            compressed: false,
            encrypted: false,
        };
        let key = (VolumeId::new(volume), path.key());
        if kind == FileKind::File || !self.nodes.contains_key(&key) {
            self.nodes.insert(key.clone(), Node { info, data });
        }
        &mut self.nodes.get_mut(&key).unwrap().info
    }

    pub fn remove(&mut self, volume: u32, path: &str) {
        let key = GuestPath::parse(path).unwrap().key();
        self.nodes.remove(&(VolumeId::new(volume), key)).unwrap();
    }

    fn get(&self, volume: VolumeId, path: &GuestPath) -> Result<&Node> {
        self.nodes
            .get(&(volume, path.key()))
            .ok_or_else(|| GuestError::not_found(path))
    }
}

impl GuestRead for FakeGuest {
    fn engine(&self) -> &'static str {
        "fake"
    }

    fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    fn stat(&self, volume: VolumeId, path: &GuestPath) -> Result<Option<FileInfo>> {
        Ok(self.get(volume, path).ok().map(|n| n.info.clone()))
    }

    fn list(&self, volume: VolumeId, path: &GuestPath) -> Result<Vec<FileInfo>> {
        let entries = self.nodes.iter().filter(|((v, key), _)| {
            let parent = GuestPath::parse(key).unwrap().parent();
            *v == volume && parent.as_ref() == Some(path)
        });
        Ok(entries.map(|(_, node)| node.info.clone()).collect())
    }

    fn free_bytes(&self, volume: VolumeId, enough: u64) -> Result<Option<u64>> {
        if let Some(error) = self.free_error {
            return Err(error());
        }
        let free = self.free.filter(|(of, _)| *of == volume);
        Ok(free.map(|(_, bytes)| bytes.min(enough)))
    }

    fn read_at(
        &self,
        volume: VolumeId,
        path: &GuestPath,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        let node = self.get(volume, path)?;
        if node.info.reparse_tag.is_some() {
            return Err(GuestError::Unreadable {
                path: path.to_string(),
                reason: "reparse point".into(),
            });
        }
        let start = (offset as usize).min(node.data.len());
        let end = (start + len).min(node.data.len());
        Ok(node.data[start..end].to_vec())
    }

    fn read(&self, volume: VolumeId, path: &GuestPath, limit: u64) -> Result<Vec<u8>> {
        let size = self.get(volume, path)?.data.len() as u64;
        GuestError::check_size(path, size, limit)?;
        self.read_at(volume, path, 0, size as usize)
    }
}
