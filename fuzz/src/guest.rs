//! A Windows guest in memory, of which the hives and the boot store can be exchanged.

use std::collections::BTreeMap;

use hyper2kvm::demo::{GuestSpec, Role, WinVersion, guest};
use hyper2kvm::disk::layout::DiskLayout;
use hyper2kvm::guest::{
    FileInfo, FileKind, FsKind, GuestError, GuestPath, GuestRead, Result, Volume, VolumeId,
    VolumeState,
};

use crate::disk::Base;

pub const VERSIONS: [WinVersion; 4] = [
    WinVersion::Xp,
    WinVersion::Win7,
    WinVersion::Win81,
    WinVersion::Win11,
];
/// The files that can be exchanged, by their last component.
pub const KINDS: [&str; 4] = ["SYSTEM", "SOFTWARE", "DRIVERS", "BCD"];

type Place = (VolumeId, String);

struct Node {
    name: String,
    kind: FileKind,
    bytes: Vec<u8>,
}

pub struct Demo {
    pub layout: DiskLayout,
    volumes: Vec<Volume>,
    nodes: BTreeMap<Place, Node>,
    folders: BTreeMap<Place, Vec<Place>>,
    bases: BTreeMap<&'static str, (Place, Base)>,
}

impl Demo {
    pub fn new(version: WinVersion) -> Self {
        let spec = GuestSpec::new(version);
        let layout = guest::layout(&spec);
        let kind = |index: u32| match spec.partitions().iter().find(|p| p.index == index) {
            Some(p) if p.role == Role::Esp => FsKind::Fat,
            Some(p) if p.role == Role::Msr => FsKind::Unknown,
            _ => FsKind::Ntfs,
        };
        let volumes = layout.partitions.iter().map(|p| Volume {
            id: VolumeId::new(p.index),
            partition: p.clone(),
            kind: kind(p.index),
            label: None,
            state: VolumeState::default(),
        });
        let mut demo = Self {
            volumes: volumes.collect(),
            layout,
            nodes: BTreeMap::new(),
            folders: BTreeMap::new(),
            bases: BTreeMap::new(),
        };
        for file in guest::files(&spec).expect("a guest") {
            let partition = spec.partition(file.role).expect("its partition");
            let place = (VolumeId::new(partition.index), file.path.key());
            let name = file.path.name().unwrap_or_default();
            let config = file.path.key().contains("config\\") || name == "BCD";
            if let Some(kind) = KINDS.iter().find(|kind| config && **kind == name) {
                let base = Base::new(file.contents.clone());
                demo.bases.insert(kind, (place.clone(), base));
            }
            demo.add(place.0, &file.path, FileKind::File, file.contents);
        }
        demo
    }

    fn add(&mut self, volume: VolumeId, path: &GuestPath, kind: FileKind, bytes: Vec<u8>) {
        let place = (volume, path.key());
        let name = path.name().unwrap_or_default().to_string();
        let node = Node { name, kind, bytes };
        if self.nodes.insert(place.clone(), node).is_some() {
            return;
        }
        if let Some(parent) = path.parent() {
            let key = (volume, parent.key());
            self.folders.entry(key.clone()).or_default().push(place);
            if !self.nodes.contains_key(&key) {
                self.add(volume, &parent, FileKind::Dir, Vec::new());
            }
        }
    }

    /// That hive as it is, `None` when this Windows has none.
    pub fn hive(&'static self, kind: &str) -> Option<&'static Base> {
        self.bases.get(kind).map(|(_, base)| base)
    }

    pub fn guest<'d>(&'d self, changed: &'d BTreeMap<&str, Vec<u8>>) -> Guest<'d> {
        let places = changed.iter().filter_map(|(kind, bytes)| {
            let (place, _) = self.bases.get(kind)?;
            Some((place, &bytes[..]))
        });
        Guest {
            demo: self,
            changed: places.collect(),
        }
    }
}

pub struct Guest<'d> {
    demo: &'d Demo,
    changed: BTreeMap<&'d Place, &'d [u8]>,
}

impl Guest<'_> {
    fn find(&self, volume: VolumeId, path: &GuestPath) -> Option<(&Node, &[u8])> {
        let place = (volume, path.key());
        let node = self.demo.nodes.get(&place)?;
        let bytes = self.changed.get(&place).copied();
        Some((node, bytes.unwrap_or(&node.bytes)))
    }
}

fn info(node: &Node, bytes: &[u8]) -> FileInfo {
    FileInfo {
        name: node.name.clone(),
        kind: node.kind,
        size: bytes.len() as u64,
        reparse_tag: None,
        compressed: false,
        encrypted: false,
    }
}

impl GuestRead for Guest<'_> {
    fn engine(&self) -> &'static str {
        "memory"
    }

    fn volumes(&self) -> &[Volume] {
        &self.demo.volumes
    }

    fn stat(&self, volume: VolumeId, path: &GuestPath) -> Result<Option<FileInfo>> {
        Ok(self
            .find(volume, path)
            .map(|(node, bytes)| info(node, bytes)))
    }

    fn list(&self, volume: VolumeId, path: &GuestPath) -> Result<Vec<FileInfo>> {
        let below = self.demo.folders.get(&(volume, path.key()));
        let nodes = below.into_iter().flatten();
        Ok(nodes
            .map(|place| info(&self.demo.nodes[place], &self.demo.nodes[place].bytes))
            .collect())
    }

    fn read_at(
        &self,
        volume: VolumeId,
        path: &GuestPath,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        let Some((_, bytes)) = self.find(volume, path) else {
            return Err(GuestError::NotFound {
                path: path.to_string(),
            });
        };
        let start = usize::try_from(offset).map_or(bytes.len(), |at| at.min(bytes.len()));
        let end = start.saturating_add(len).min(bytes.len());
        Ok(bytes[start..end].to_vec())
    }

    fn read(&self, volume: VolumeId, path: &GuestPath, limit: u64) -> Result<Vec<u8>> {
        let size = self.find(volume, path).map_or(0, |(_, b)| b.len() as u64);
        if size > limit {
            return Err(GuestError::TooLarge {
                path: path.to_string(),
                size,
                limit,
            });
        }
        self.read_at(volume, path, 0, size as usize)
    }
}
