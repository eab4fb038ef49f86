//! NTFS volumes made in this process, for tests on hosts where no program can make one. Each file is in one piece, and
//! a directory is a B-tree of at most two levels. Nothing can be written to it afterwards.
//!
//! Source: ntfs-3g's `layout.h`; the structures are declared in `guest/ntfs_layout.rs`.

use std::collections::BTreeMap;

use crate::guest::GuestPath;

const CLUSTER: usize = 4096;
const RECORD: usize = 1024;
/// An `INDX` block takes one cluster.
const BLOCK: usize = CLUSTER;
const SECTOR: usize = 512;
/// Values up to this length are in the MFT record.
const RESIDENT: usize = 400;

const ROOT: u64 = 5;
const FIRST_FILE: u64 = 24;
const IN_USE: u16 = 1;
const DIRECTORY: u16 = 2;

const STANDARD_INFORMATION: u32 = 0x10;
const FILE_NAME: u32 = 0x30;
const VOLUME_INFORMATION: u32 = 0x70;
const DATA: u32 = 0x80;
const INDEX_ROOT: u32 = 0x90;
const INDEX_ALLOCATION: u32 = 0xa0;
const BITMAP: u32 = 0xb0;

/// The files of a volume of `size` bytes in pieces, each with its offset. The rest of the volume is zeroes. `hidden` is
/// the number of sectors before it.
pub fn volume(size: u64, hidden: u32, files: &BTreeMap<GuestPath, Vec<u8>>) -> Vec<(u64, Vec<u8>)> {
    let clusters = size / CLUSTER as u64;
    let mut made = Maker {
        // Boot sectors.
        next: 2,
        pieces: Vec::new(),
        records: BTreeMap::new(),
    };
    let tree = Tree::of(files);
    let count = FIRST_FILE + tree.names.len() as u64;
    let mft = made.take((count as usize * RECORD).div_ceil(CLUSTER));
    let mirror = made.take(1);
    let bitmap_len = clusters.div_ceil(8) as usize;
    let bitmap = made.take(bitmap_len.div_ceil(CLUSTER));
    let mft_len = count as usize * RECORD;
    for (number, name, lcn, len) in [
        (0, "$MFT", mft, mft_len),
        (1, "$MFTMirr", mirror, 4 * RECORD),
        (6, "$Bitmap", bitmap, bitmap_len),
        (7, "$Boot", 0, 2 * CLUSTER),
    ] {
        let data = in_clusters(DATA, "", lcn, len);
        made.record(number, IN_USE, &[file_name(ROOT, name, len, false), data]);
    }
    let log = made.data(vec![0xff; 128 << 10]);
    made.record(
        2,
        IN_USE,
        &[file_name(ROOT, "$LogFile", 128 << 10, false), log],
    );
    for (number, name) in [
        (4, "$AttrDef"),
        (8, "$BadClus"),
        (9, "$Secure"),
        (11, "$Extend"),
    ] {
        made.record(number, IN_USE, &[file_name(ROOT, name, 0, false)]);
    }
    let mut information = vec![0; 12];
    information[8..10].copy_from_slice(&[3, 1]);
    let information = in_record(VOLUME_INFORMATION, "", &information);
    made.record(
        3,
        IN_USE,
        &[file_name(ROOT, "$Volume", 0, false), information],
    );
    let upper = (0..=u16::MAX).flat_map(|unit| upper(unit).to_le_bytes());
    let upcase = made.data(upper.collect());
    made.record(
        10,
        IN_USE,
        &[file_name(ROOT, "$UpCase", 128 << 10, false), upcase],
    );
    for (path, contents) in files {
        let attributes = [
            tree.name(path, contents.len(), false),
            made.data(contents.clone()),
        ];
        made.record(tree.number(path), IN_USE, &attributes);
    }
    for folder in tree.folders() {
        let mut attributes = vec![tree.name(&folder, 0, true)];
        attributes.extend(made.index(&tree.entries(&folder, files)));
        made.record(tree.number(&folder), IN_USE | DIRECTORY, &attributes);
    }
    made.finish((mft, mirror, bitmap), (clusters, hidden), mft_len)
}

/// The records of all files and directories.
struct Tree {
    names: BTreeMap<GuestPath, u64>,
    folders: Vec<GuestPath>,
}

impl Tree {
    fn of(files: &BTreeMap<GuestPath, Vec<u8>>) -> Self {
        let mut folders = BTreeMap::new();
        for path in files.keys() {
            let mut next = path.parent();
            while let Some(folder) = next.filter(|folder| !folder.is_root()) {
                next = folder.parent();
                folders.insert(folder, ());
            }
        }
        let folders: Vec<_> = folders.into_keys().collect();
        let all = files.keys().chain(&folders).cloned();
        Self {
            names: all.zip(FIRST_FILE..).collect(),
            folders,
        }
    }

    fn folders(&self) -> impl Iterator<Item = GuestPath> + '_ {
        std::iter::once(GuestPath::root()).chain(self.folders.iter().cloned())
    }

    fn number(&self, path: &GuestPath) -> u64 {
        self.names.get(path).copied().unwrap_or(ROOT)
    }

    fn name(&self, path: &GuestPath, size: usize, folder: bool) -> Vec<u8> {
        let parent = path.parent().unwrap_or_default();
        let name = path.name().unwrap_or(".");
        file_name(self.number(&parent), name, size, folder)
    }

    /// The names in a directory with their keys, in the order of the index.
    fn entries(
        &self,
        folder: &GuestPath,
        files: &BTreeMap<GuestPath, Vec<u8>>,
    ) -> Vec<(u64, Vec<u8>)> {
        let mut list = Vec::new();
        for (path, number) in &self.names {
            if path.parent().as_ref() == Some(folder) {
                let size = files.get(path).map(Vec::len);
                let name = path.name().unwrap_or_default();
                let key = file_key(self.number(folder), name, size.unwrap_or(0), size.is_none());
                list.push((name.to_owned(), *number, key));
            }
        }
        if folder.is_root() {
            let name = "$Boot".to_owned();
            list.push((name.clone(), 7, file_key(ROOT, &name, 2 * CLUSTER, false)));
        }
        list.sort_by_key(|(name, ..)| name.encode_utf16().map(upper).collect::<Vec<_>>());
        let keyed = |(_, number, key)| (number, key);
        list.into_iter().map(keyed).collect()
    }
}

struct Maker {
    next: u64,
    pieces: Vec<(u64, Vec<u8>)>,
    records: BTreeMap<u64, Vec<u8>>,
}

impl Maker {
    fn take(&mut self, clusters: usize) -> u64 {
        let at = self.next;
        self.next += clusters as u64;
        at
    }

    fn put(&mut self, bytes: Vec<u8>) -> u64 {
        let lcn = self.take(bytes.len().div_ceil(CLUSTER));
        self.pieces.push((lcn * CLUSTER as u64, bytes));
        lcn
    }

    fn data(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        let len = bytes.len();
        match len <= RESIDENT {
            true => in_record(DATA, "", &bytes),
            false => in_clusters(DATA, "", self.put(bytes), len),
        }
    }

    /// The attributes of a directory. Where its entries do not fit into one node, every part of
    /// them but the last precedes an entry of the root.
    fn index(&mut self, entries: &[(u64, Vec<u8>)]) -> Vec<Vec<u8>> {
        let leaf = |list: &[(u64, Vec<u8>)]| -> Vec<u8> {
            let all = list
                .iter()
                .flat_map(|(number, key)| entry(*number, key, None));
            all.chain(entry(0, &[], None)).collect()
        };
        let root = |flags: u8, entries: Vec<u8>| {
            let mut value = Vec::new();
            for field in [FILE_NAME, 1, BLOCK as u32, 1] {
                value.extend(field.to_le_bytes());
            }
            value.extend(node(16, entries.len(), 16 + entries.len(), flags));
            value.extend(entries);
            in_record(INDEX_ROOT, "$I30", &value)
        };
        let all = leaf(entries);
        if all.len() <= RESIDENT {
            return vec![root(0, all)];
        }
        let room = BLOCK - 64 - 16;
        let (mut blocks, mut above, mut part) = (Vec::new(), Vec::new(), Vec::new());
        for (number, key) in entries {
            let so_far = leaf(&part).len();
            if so_far + entry(*number, key, None).len() > room {
                above.extend(entry(*number, key, Some(blocks.len() as u64)));
                blocks.push(leaf(&std::mem::take(&mut part)));
            } else {
                part.push((*number, key.clone()));
            }
        }
        above.extend(entry(0, &[], Some(blocks.len() as u64)));
        blocks.push(leaf(&part));
        let mut bytes = Vec::new();
        for (vcn, entries) in (0u64..).zip(&blocks) {
            let mut block = head(*b"INDX", 40, BLOCK);
            block[16..24].copy_from_slice(&vcn.to_le_bytes());
            block[24..40].copy_from_slice(&node(40, entries.len(), BLOCK - 24, 0));
            block[64..64 + entries.len()].copy_from_slice(entries);
            protect(&mut block);
            bytes.extend(block);
        }
        let len = bytes.len();
        let mut used = vec![0xff; blocks.len() / 8];
        used.push((1 << (blocks.len() % 8)) - 1);
        vec![
            root(1, above),
            in_clusters(INDEX_ALLOCATION, "$I30", self.put(bytes), len),
            in_record(BITMAP, "$I30", &used),
        ]
    }

    fn record(&mut self, number: u64, flags: u16, attributes: &[Vec<u8>]) {
        let mut bytes = head(*b"FILE", 48, RECORD);
        let mut at = 56;
        bytes[16..22].copy_from_slice(&[1, 0, 1, 0, at as u8, 0]);
        bytes[22..24].copy_from_slice(&flags.to_le_bytes());
        bytes[28..32].copy_from_slice(&(RECORD as u32).to_le_bytes());
        bytes[44..48].copy_from_slice(&(number as u32).to_le_bytes());
        let first = in_record(STANDARD_INFORMATION, "", &[0; 48]);
        for (i, attribute) in std::iter::once(&first).chain(attributes).enumerate() {
            bytes[at..at + attribute.len()].copy_from_slice(attribute);
            bytes[at + 14] = i as u8;
            at += attribute.len();
        }
        bytes[at..at + 4].fill(0xff);
        bytes[24..28].copy_from_slice(&(at as u32 + 8).to_le_bytes());
        protect(&mut bytes);
        self.records.insert(number, bytes);
    }

    fn finish(
        mut self,
        (mft, mirror, bitmap): (u64, u64, u64),
        (clusters, hidden): (u64, u32),
        mft_len: usize,
    ) -> Vec<(u64, Vec<u8>)> {
        let mut table = vec![0; mft_len];
        for (number, record) in &self.records {
            let at = *number as usize * RECORD;
            table[at..at + RECORD].copy_from_slice(record);
        }
        let used = |byte: u64| {
            (0..8)
                .filter(|bit| byte * 8 + bit < self.next)
                .map(|bit| 1 << bit)
                .sum()
        };
        let map = (0..clusters.div_ceil(8)).map(used).collect();
        let sectors = clusters * (CLUSTER / SECTOR) as u64 - 1;
        let boot = boot_sector(sectors, hidden, mft, mirror);
        self.pieces.push((0, boot));
        self.pieces
            .push((mirror * CLUSTER as u64, table[..4 * RECORD].to_vec()));
        self.pieces.push((mft * CLUSTER as u64, table));
        self.pieces.push((bitmap * CLUSTER as u64, map));
        self.pieces
    }
}

fn boot_sector(sectors: u64, hidden: u32, mft: u64, mirror: u64) -> Vec<u8> {
    let mut boot = vec![0; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| boot[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xeb, 0x52, 0x90]);
    put(3, b"NTFS    ");
    put(11, &(SECTOR as u16).to_le_bytes());
    put(13, &[(CLUSTER / SECTOR) as u8]);
    put(21, &[0xf8, 0, 0, 63, 0, 255, 0]);
    put(28, &hidden.to_le_bytes());
    put(36, &[0x80, 0, 0x80, 0]);
    put(40, &sectors.to_le_bytes());
    put(48, &mft.to_le_bytes());
    put(56, &mirror.to_le_bytes());
    // A record is 2 to the power of 10, a block of an index one cluster.
    put(64, &[-10i8 as u8, 0, 0, 0, 1]);
    put(72, &0x1234_5678u64.to_le_bytes());
    put(510, &[0x55, 0xaa]);
    boot
}

fn upper(unit: u16) -> u16 {
    let mut upper = char::from_u32(unit.into())
        .into_iter()
        .flat_map(char::to_uppercase);
    match (upper.next(), upper.next()) {
        (Some(one), None) => u16::try_from(u32::from(one)).unwrap_or(unit),
        _ => unit,
    }
}

fn file_key(parent: u64, name: &str, size: usize, folder: bool) -> Vec<u8> {
    let mut key = vec![0; 66];
    let reference = parent | 1 << 48;
    key[..8].copy_from_slice(&reference.to_le_bytes());
    let allocated = size.next_multiple_of(CLUSTER) as u64;
    key[40..48].copy_from_slice(&allocated.to_le_bytes());
    key[48..56].copy_from_slice(&(size as u64).to_le_bytes());
    let attributes: u32 = if folder { 0x1000_0000 } else { 0x20 };
    key[56..60].copy_from_slice(&attributes.to_le_bytes());
    key[64] = name.encode_utf16().count() as u8;
    key[65] = 1;
    key.extend(name.encode_utf16().flat_map(u16::to_le_bytes));
    key
}

fn file_name(parent: u64, name: &str, size: usize, folder: bool) -> Vec<u8> {
    in_record(FILE_NAME, "", &file_key(parent, name, size, folder))
}

/// An attribute whose value is in the record.
fn in_record(kind: u32, name: &str, value: &[u8]) -> Vec<u8> {
    let mut bytes = attribute(kind, name, 24);
    let at = bytes.len() as u16;
    bytes[16..20].copy_from_slice(&(value.len() as u32).to_le_bytes());
    bytes[20..22].copy_from_slice(&at.to_le_bytes());
    bytes[22] = u8::from(kind == FILE_NAME);
    bytes.extend(value);
    ended(bytes)
}

/// An attribute whose value is in one run of clusters.
fn in_clusters(kind: u32, name: &str, lcn: u64, len: usize) -> Vec<u8> {
    let mut bytes = attribute(kind, name, 64);
    let clusters = len.div_ceil(CLUSTER) as u64;
    let at = bytes.len() as u16;
    bytes[8] = 1;
    bytes[24..32].copy_from_slice(&(clusters - 1).to_le_bytes());
    bytes[32..34].copy_from_slice(&at.to_le_bytes());
    bytes[40..48].copy_from_slice(&(clusters * CLUSTER as u64).to_le_bytes());
    bytes[48..56].copy_from_slice(&(len as u64).to_le_bytes());
    bytes[56..64].copy_from_slice(&(len as u64).to_le_bytes());
    bytes.push(0x54);
    bytes.extend(&clusters.to_le_bytes()[..4]);
    bytes.extend(&lcn.to_le_bytes()[..5]);
    bytes.push(0);
    ended(bytes)
}

/// The header of an attribute, with its name behind it.
fn attribute(kind: u32, name: &str, header: usize) -> Vec<u8> {
    let mut bytes = vec![0; header];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[9] = name.len() as u8;
    bytes[10..12].copy_from_slice(&(header as u16).to_le_bytes());
    bytes.extend(name.encode_utf16().flat_map(u16::to_le_bytes));
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

fn ended(mut attribute: Vec<u8>) -> Vec<u8> {
    attribute.resize(attribute.len().next_multiple_of(8), 0);
    let len = attribute.len() as u32;
    attribute[4..8].copy_from_slice(&len.to_le_bytes());
    attribute
}

/// An entry of a directory; without a key the last one of a node.
fn entry(number: u64, key: &[u8], below: Option<u64>) -> Vec<u8> {
    let last = key.is_empty();
    let reference = if last { 0 } else { number | 1 << 48 };
    let mut bytes = reference.to_le_bytes().to_vec();
    let flags = u16::from(below.is_some()) | u16::from(last) << 1;
    for field in [0, key.len() as u16, flags, 0] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(key);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes.extend(below.into_iter().flat_map(u64::to_le_bytes));
    let len = bytes.len() as u16;
    bytes[8..10].copy_from_slice(&len.to_le_bytes());
    bytes
}

fn node(first: usize, entries: usize, allocated: usize, flags: u8) -> Vec<u8> {
    let fields = [first, first + entries, allocated, usize::from(flags)];
    fields
        .iter()
        .flat_map(|field| (*field as u32).to_le_bytes())
        .collect()
}

fn head(signature: [u8; 4], array: u16, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes[..4].copy_from_slice(&signature);
    bytes[4..6].copy_from_slice(&array.to_le_bytes());
    bytes[6..8].copy_from_slice(&((len / SECTOR + 1) as u16).to_le_bytes());
    bytes
}

/// Replaces the last word of every sector by the number of the write, and keeps the words in the array.
fn protect(bytes: &mut [u8]) {
    let array = usize::from(u16::from_le_bytes([bytes[4], bytes[5]]));
    bytes[array] = 1;
    for sector in 0..bytes.len() / SECTOR {
        let (end, kept) = ((sector + 1) * SECTOR - 2, array + 2 + 2 * sector);
        let word = [bytes[end], bytes[end + 1]];
        bytes[kept..kept + 2].copy_from_slice(&word);
        bytes[end..end + 2].copy_from_slice(&[1, 0]);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::sync::Arc;

    use super::*;
    use crate::disk::partition;
    use crate::guest::{GuestRead, embedded};
    use crate::testing::noise;

    /// The crate `ntfs` and the reader of this program share no code.
    #[test]
    fn two_readers_find_every_file_of_a_made_volume() {
        let mut files = BTreeMap::new();
        for i in 0..200usize {
            let len = [0, 1, 400, 401, 4096, 70_000][i % 6];
            let path = format!(r"\Folder {}\file number {i}.bin", i % 3);
            files.insert(GuestPath::parse(&path).unwrap(), noise(len, i as u64));
        }
        let size = 16 << 20;
        let mut disk = vec![0; size as usize];
        for (at, bytes) in volume(size, 2048, &files) {
            disk[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        }
        let mut cursor = Cursor::new(disk.clone());
        let mut other = ntfs::Ntfs::new(&mut cursor).unwrap();
        other.read_upcase_table(&mut cursor).unwrap();
        for (path, contents) in &files {
            let mut file = other.root_directory(&mut cursor).unwrap();
            for name in path.parts() {
                let index = file.directory_index(&mut cursor).unwrap();
                let mut finder = index.finder();
                let found =
                    ntfs::indexes::NtfsFileNameIndex::find(&mut finder, &other, &mut cursor, name);
                file = found
                    .unwrap()
                    .unwrap()
                    .to_file(&other, &mut cursor)
                    .unwrap();
            }
            let item = file.data(&mut cursor, "").unwrap().unwrap();
            let mut value = item.to_attribute().unwrap().value(&mut cursor).unwrap();
            let mut read = vec![0; value.len() as usize];
            ntfs::NtfsReadSeek::read(&mut value, &mut cursor, &mut read).unwrap();
            assert!(read == *contents, "{path}");
        }
        let layout = partition::read_layout(&disk).unwrap();
        let guest = embedded::open(Arc::new(disk), &layout).unwrap();
        let volume = &guest.volumes()[0];
        assert!(
            volume.state.unreadable.is_none() && !volume.state.dirty,
            "{volume:?}"
        );
        for (path, contents) in &files {
            assert!(
                guest.read(volume.id, path, 1 << 20).unwrap() == *contents,
                "{path}"
            );
        }
        let folder = GuestPath::parse(r"\folder 1").unwrap();
        assert_eq!(guest.list(volume.id, &folder).unwrap().len(), 67);
    }
}
