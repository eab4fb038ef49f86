//! Builds a hive from a tree of keys. The demo and the tests use it, and it rewrites hives that
//! libhivex cannot edit. Guests' hives are otherwise edited by libhivex ([`super::confined`]).
//!
//! Specification: msuhanov/regf. Output is deterministic: the timestamps are constant. Subkey lists
//! are sorted by upper-case UTF-16, because Windows finds keys by binary search. A list has about
//! 500 keys before an index root is needed. Data above 16344 bytes is divided into segments from
//! format 1.4 on. Formats written are 1.5 (system hives) and 1.3 (BCD).

use std::collections::{BTreeMap, BTreeSet};

use super::base;
use super::cell::{BASE_BLOCK_SIZE, BIN_HEADER, INLINE, MAX_DEPTH, NONE, PAGE, SEGMENT};
use super::data::RegData;
use super::error::{HiveError, Result};
use super::hive::{HiveView, Key, Value};
use super::name::{fold, name_hash};

/// 2024-01-01 00:00 UTC as FILETIME.
const TIMESTAMP: u64 = 133_485_408_000_000_000;
/// Entries of one `lh` list; Windows stops at 506, which fit in a one-page bin.
const MAX_LEAF: usize = 500;
const MAX_KEY_NAME: usize = 255;
const MAX_VALUE_NAME: usize = 16383;

/// The minor version of the format to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// BCD stores: `lf` lists, no big data.
    V1_3,
    /// System hives since XP.
    V1_5,
}

/// A key with everything below it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyTree {
    pub name: String,
    /// In the order of the hive's value list; the default value has the name `""`.
    pub values: Vec<(String, Value)>,
    /// Subkeys by the name that [`fold`] returns. Boxed: a node of the map has room for eleven.
    pub keys: BTreeMap<String, Box<KeyTree>>,
}

impl KeyTree {
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }

    /// Copies a whole hive into a tree. Class names and security descriptors are not copied.
    pub fn from_view(view: &HiveView<'_>) -> Result<Self> {
        Self::from_key(&view.root()?)
    }

    pub fn from_key(key: &Key<'_>) -> Result<Self> {
        Self::load(key, 0)
    }

    fn load(key: &Key<'_>, depth: usize) -> Result<Self> {
        if depth > MAX_DEPTH {
            return Err(HiveError::TooDeep);
        }
        let mut tree = Self::new(key.name()?);
        tree.values = key.values()?;
        tree.values.shrink_to_fit();
        for child in key.keys()? {
            let child = Self::load(&child, depth + 1)?;
            tree.keys.insert(fold(&child.name), Box::new(child));
        }
        Ok(tree)
    }

    /// The key at a `\`-separated path below this one, created if it does not exist.
    pub fn key_mut(&mut self, path: &str) -> &mut KeyTree {
        path.split('\\')
            .filter(|part| !part.is_empty())
            .fold(self, |key, part| {
                key.keys
                    .entry(fold(part))
                    .or_insert_with(|| Box::new(KeyTree::new(part)))
            })
    }

    pub fn get(&self, path: &str) -> Option<&KeyTree> {
        path.split('\\')
            .filter(|part| !part.is_empty())
            .try_fold(self, |key, part| {
                key.keys.get(&fold(part)).map(AsRef::as_ref)
            })
    }

    /// Removes a key with everything below it.
    pub fn remove(&mut self, path: &str) -> Option<KeyTree> {
        let (parent, name) = path.rsplit_once('\\').unwrap_or(("", path));
        self.get(parent)?;
        self.key_mut(parent)
            .keys
            .remove(&fold(name))
            .map(|key| *key)
    }

    pub fn value(&self, path: &str, name: &str) -> Option<&Value> {
        let values = &self.get(path)?.values;
        let name = fold(name);
        let found = values.iter().find(|(n, _)| fold(n) == name)?;
        Some(&found.1)
    }

    pub fn set(&mut self, path: &str, name: &str, data: RegData) -> &mut Self {
        self.set_value(path, name, data.to_value())
    }

    pub fn set_value(&mut self, path: &str, name: &str, value: Value) -> &mut Self {
        let values = &mut self.key_mut(path).values;
        let folded = fold(name);
        match values.iter_mut().find(|(n, _)| fold(n) == folded) {
            Some(slot) => slot.1 = value,
            None => values.push((name.to_string(), value)),
        }
        self
    }

    pub fn sz(&mut self, path: &str, name: &str, text: &str) -> &mut Self {
        self.set(path, name, RegData::Sz(text.to_string()))
    }

    pub fn dword(&mut self, path: &str, name: &str, number: u32) -> &mut Self {
        self.set(path, name, RegData::Dword(number))
    }

    /// The bytes of a clean hive of format 1.5 with this key as its root.
    pub fn to_bytes(&self, file_name: &str) -> Vec<u8> {
        self.to_bytes_as(file_name, Format::V1_5)
    }

    /// Serialises the tree in a format. Names longer than Windows allows (255 characters for a key,
    /// 16383 for a value) are truncated.
    pub fn to_bytes_as(&self, file_name: &str, format: Format) -> Vec<u8> {
        let mut writer = Writer::new(format);
        // Only reading a hive can fail.
        let root = writer.key(self, None, NONE, NONE).unwrap_or(NONE);
        writer.finish(root, file_name)
    }

    /// Copies one key without the keys below it.
    fn shallow(key: &Key<'_>) -> Result<Self> {
        let mut tree = Self::new(key.name()?);
        tree.values = key.values()?;
        tree.values.shrink_to_fit();
        Ok(tree)
    }
}

/// A hive with a tree of only the keys to edit. The other keys are written directly from the old
/// hive.
pub struct Sparse<'v> {
    pub tree: KeyTree,
    root: Key<'v>,
    /// The folded paths of the keys that were loaded into the tree.
    loaded: BTreeSet<String>,
}

impl<'v> Sparse<'v> {
    pub fn new(view: &HiveView<'v>) -> Result<Self> {
        let root = view.root()?;
        Ok(Self {
            tree: KeyTree::shallow(&root)?,
            root,
            loaded: BTreeSet::new(),
        })
    }

    /// Loads a key and its parents, as far as they exist.
    pub fn load(&mut self, path: &str) -> Result<()> {
        let mut key = self.root.clone();
        let mut tree = &mut self.tree;
        let mut folded = String::new();
        for part in path.split('\\').filter(|part| !part.is_empty()) {
            let Some(child) = key.key(part)? else {
                return Ok(());
            };
            folded = below(&folded, part);
            if self.loaded.insert(folded.clone()) {
                let shallow = Box::new(KeyTree::shallow(&child)?);
                tree.keys.insert(fold(part), shallow);
            }
            tree = tree.key_mut(part);
            key = child;
        }
        Ok(())
    }

    pub fn to_bytes_as(&self, file_name: &str, format: Format) -> Result<Vec<u8>> {
        let mut writer = Writer::new(format);
        let rest = Rest {
            key: self.root.clone(),
            path: String::new(),
            loaded: &self.loaded,
        };
        let root = writer.key(&self.tree, Some(&rest), NONE, NONE)?;
        Ok(writer.finish(root, file_name))
    }
}

/// The folded path of a key below another one.
fn below(path: &str, name: &str) -> String {
    match path {
        "" => fold(name),
        path => format!("{path}\\{}", fold(name)),
    }
}

/// The key of the old hive from which a key of the tree was loaded.
struct Rest<'s, 'v> {
    key: Key<'v>,
    path: String,
    loaded: &'s BTreeSet<String>,
}

/// The subkeys of a key of the old hive: those in the tree by name, and the others.
type Split<'s, 'v> = (BTreeMap<String, Rest<'s, 'v>>, Vec<(String, Rest<'s, 'v>)>);

impl<'s, 'v> Rest<'s, 'v> {
    fn children(&self) -> Result<Split<'s, 'v>> {
        let (mut in_tree, mut others) = (BTreeMap::new(), Vec::new());
        for key in self.key.keys()? {
            let name = key.name()?;
            let path = below(&self.path, &name);
            let loaded = self.loaded.contains(&path);
            let rest = Rest {
                key,
                path,
                loaded: self.loaded,
            };
            match loaded {
                true => drop(in_tree.insert(fold(&name), rest)),
                false => others.push((name, rest)),
            }
        }
        Ok((in_tree, others))
    }
}

/// A subkey of the key that is written.
enum Child<'t, 's, 'v> {
    Tree(&'t KeyTree, Option<Rest<'s, 'v>>),
    Old(String, Rest<'s, 'v>),
}

impl Child<'_, '_, '_> {
    fn name(&self) -> &str {
        match self {
            Self::Tree(tree, _) => &tree.name,
            Self::Old(name, _) => name,
        }
    }
}

fn children<'t, 's, 'v>(
    tree: &'t KeyTree,
    rest: Option<&Rest<'s, 'v>>,
) -> Result<Vec<Child<'t, 's, 'v>>> {
    let (mut in_tree, others) = rest.map_or_else(|| Ok(Default::default()), Rest::children)?;
    let mut children: Vec<Child<'t, 's, 'v>> = tree
        .keys
        .iter()
        .map(|(folded, child)| Child::Tree(child, in_tree.remove(folded)))
        .collect();
    children.extend(
        others
            .into_iter()
            .map(|(name, rest)| Child::Old(name, rest)),
    );
    children.sort_by_cached_key(|c| fold(c.name()).encode_utf16().collect::<Vec<u16>>());
    Ok(children)
}

/// A name as stored: one byte per character if all fit in Latin-1.
struct StoredName {
    bytes: Vec<u8>,
    compressed: bool,
    units: usize,
}

impl StoredName {
    fn new(name: &str, limit: usize) -> Self {
        let units: Vec<u16> = name.encode_utf16().take(limit).collect();
        let compressed = units.iter().all(|&unit| unit <= 0xff);
        let bytes = if compressed {
            units.iter().map(|&unit| unit as u8).collect()
        } else {
            units.iter().flat_map(|unit| unit.to_le_bytes()).collect()
        };
        Self {
            bytes,
            compressed,
            units: units.len(),
        }
    }
}

/// Lays cells out in bins.
struct Writer {
    format: Format,
    bins: Vec<u8>,
    /// The free part of the last bin.
    free: std::ops::Range<usize>,
    security: u32,
    keys: u32,
}

impl Writer {
    fn new(format: Format) -> Self {
        Self {
            format,
            bins: Vec::new(),
            free: 0..0,
            security: NONE,
            keys: 0,
        }
    }

    /// Writes a cell and returns its offset from the first bin.
    fn cell(&mut self, data: &[u8]) -> u32 {
        let size = (data.len() + 4).next_multiple_of(8);
        if self.free.len() < size {
            self.close_bin();
            self.open_bin(size);
        }
        let start = self.free.start;
        self.free.start += size;
        self.bins[start..start + 4].copy_from_slice(&(-(size as i32)).to_le_bytes());
        self.bins[start + 4..start + 4 + data.len()].copy_from_slice(data);
        start as u32
    }

    fn open_bin(&mut self, cell_size: usize) {
        let start = self.bins.len();
        let size = (BIN_HEADER + cell_size).next_multiple_of(PAGE);
        self.bins.resize(start + size, 0);
        let header = &mut self.bins[start..start + BIN_HEADER];
        header[..4].copy_from_slice(b"hbin");
        header[4..8].copy_from_slice(&(start as u32).to_le_bytes());
        header[8..12].copy_from_slice(&(size as u32).to_le_bytes());
        if start == 0 {
            header[20..28].copy_from_slice(&TIMESTAMP.to_le_bytes());
        }
        self.free = start + BIN_HEADER..start + size;
    }

    /// Makes the rest of the last bin a free cell.
    fn close_bin(&mut self) {
        let rest = self.free.clone();
        if !rest.is_empty() {
            let size = rest.len() as u32;
            self.bins[rest.start..rest.start + 4].copy_from_slice(&size.to_le_bytes());
        }
        self.free = self.bins.len()..self.bins.len();
    }

    fn patch(&mut self, cell: u32, field: usize, value: u32) {
        let at = cell as usize + 4 + field;
        self.bins[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Writes a key and everything below it: from the tree, and from the old hive if there is one.
    fn key(
        &mut self,
        tree: &KeyTree,
        rest: Option<&Rest<'_, '_>>,
        parent: u32,
        security: u32,
    ) -> Result<u32> {
        if rest.is_some_and(|rest| rest.path.matches('\\').count() > MAX_DEPTH) {
            return Err(HiveError::TooDeep);
        }
        let name = StoredName::new(&tree.name, MAX_KEY_NAME);
        let is_root = parent == NONE;
        let mut flags: u16 = if is_root { 0x0c } else { 0 };
        if name.compressed {
            flags |= 0x20;
        }
        let children = children(tree, rest)?;
        let longest = |names: &mut dyn Iterator<Item = &str>, limit: usize| {
            let units = names.map(|name| name.encode_utf16().count()).max();
            (units.unwrap_or(0).min(limit) * 2) as u32
        };
        let longest_data = tree.values.iter().map(|(_, v)| v.data.len()).max();

        let mut nk = Cell::default();
        nk.bytes(b"nk").u16(flags).u64(TIMESTAMP).u32(0);
        nk.u32(if is_root { 0 } else { parent });
        nk.u32(children.len() as u32).u32(0).u32(NONE).u32(NONE);
        nk.u32(tree.values.len() as u32).u32(NONE);
        nk.u32(security).u32(NONE);
        nk.u32(longest(&mut children.iter().map(Child::name), MAX_KEY_NAME));
        nk.u32(0);
        nk.u32(longest(
            &mut tree.values.iter().map(|(n, _)| n.as_str()),
            MAX_VALUE_NAME,
        ));
        nk.u32(longest_data.unwrap_or(0) as u32).u32(0);
        nk.u16(name.bytes.len() as u16).u16(0).bytes(&name.bytes);
        let cell = self.cell(&nk.0);
        self.keys += 1;

        let security = if is_root {
            self.security = self.security_cell();
            self.patch(cell, 44, self.security);
            self.security
        } else {
            security
        };
        if !tree.values.is_empty() {
            let mut list = Cell::default();
            for (name, value) in &tree.values {
                list.u32(self.value(name, value));
            }
            let list = self.cell(&list.0);
            self.patch(cell, 40, list);
        }
        if !children.is_empty() {
            let mut offsets: Vec<(u32, &str)> = Vec::with_capacity(children.len());
            for child in &children {
                let offset = match child {
                    Child::Tree(tree, rest) => self.key(tree, rest.as_ref(), cell, security)?,
                    Child::Old(_, rest) => {
                        let tree = KeyTree::shallow(&rest.key)?;
                        self.key(&tree, Some(rest), cell, security)?
                    }
                };
                offsets.push((offset, child.name()));
            }
            let list = self.key_list(&offsets);
            self.patch(cell, 28, list);
        }
        Ok(cell)
    }

    fn key_list(&mut self, entries: &[(u32, &str)]) -> u32 {
        let leaves: Vec<u32> = entries
            .chunks(MAX_LEAF)
            .map(|chunk| {
                let mut leaf = Cell::default();
                leaf.bytes(match self.format {
                    Format::V1_3 => b"lf",
                    Format::V1_5 => b"lh",
                });
                leaf.u16(chunk.len() as u16);
                for &(offset, name) in chunk {
                    leaf.u32(offset);
                    leaf.u32(match self.format {
                        Format::V1_3 => name_hint(name),
                        Format::V1_5 => name_hash(name),
                    });
                }
                self.cell(&leaf.0)
            })
            .collect();
        match leaves.as_slice() {
            &[leaf] => leaf,
            leaves => {
                let mut root = Cell::default();
                root.bytes(b"ri").u16(leaves.len() as u16);
                for &leaf in leaves {
                    root.u32(leaf);
                }
                self.cell(&root.0)
            }
        }
    }

    fn value(&mut self, name: &str, value: &Value) -> u32 {
        let name = StoredName::new(name, MAX_VALUE_NAME);
        let data = value.data.as_slice();
        let size = data.len() as u32;
        let (size, data) = match data.len() {
            0..=4 => {
                let mut word = [0; 4];
                word[..data.len()].copy_from_slice(data);
                (size | INLINE, u32::from_le_bytes(word))
            }
            n if n > SEGMENT && self.format == Format::V1_5 => (size, self.big_data(data)),
            _ => (size, self.cell(data)),
        };
        let mut vk = Cell::default();
        vk.bytes(b"vk").u16(name.bytes.len() as u16);
        vk.u32(size).u32(data).u32(value.ty);
        // The default value has neither name nor flag.
        vk.u16(u16::from(name.compressed && name.units > 0)).u16(0);
        vk.bytes(&name.bytes);
        self.cell(&vk.0)
    }

    fn big_data(&mut self, data: &[u8]) -> u32 {
        let mut list = Cell::default();
        for segment in data.chunks(SEGMENT) {
            // libhivex always takes the last four bytes of a segment's cell as padding.
            let mut cell = segment.to_vec();
            cell.extend([0; 4]);
            list.u32(self.cell(&cell));
        }
        let count = data.len().div_ceil(SEGMENT) as u16;
        let list = self.cell(&list.0);
        let mut header = Cell::default();
        header.bytes(b"db").u16(count).u32(list);
        self.cell(&header.0)
    }

    /// The one security descriptor, shared by all keys: a ring of one.
    fn security_cell(&mut self) -> u32 {
        let descriptor = security_descriptor();
        let mut sk = Cell::default();
        sk.bytes(b"sk").u16(0).u32(0).u32(0).u32(0);
        sk.u32(descriptor.len() as u32).bytes(&descriptor);
        let cell = self.cell(&sk.0);
        self.patch(cell, 4, cell);
        self.patch(cell, 8, cell);
        cell
    }

    fn finish(mut self, root: u32, file_name: &str) -> Vec<u8> {
        self.patch(self.security, 12, self.keys);
        self.close_bin();
        let minor = match self.format {
            Format::V1_3 => 3,
            Format::V1_5 => 5,
        };
        let mut block = Cell::default();
        block.bytes(b"regf").u32(1).u32(1).u64(TIMESTAMP);
        block.u32(1).u32(minor).u32(0).u32(1);
        block.u32(root).u32(self.bins.len() as u32).u32(1);
        let name: Vec<u16> = file_name.encode_utf16().collect();
        for unit in &name[name.len().saturating_sub(31)..] {
            block.u16(*unit);
        }
        let mut head = block.0;
        head.resize(BASE_BLOCK_SIZE, 0);
        let sum = base::checksum(&head);
        head[508..512].copy_from_slice(&sum.to_le_bytes());
        // In place: a large hive is in memory only once.
        self.bins.splice(0..0, head);
        self.bins
    }
}

/// The first four characters, as in `lf` lists.
fn name_hint(name: &str) -> u32 {
    let stored = StoredName::new(name, 4);
    let mut hint = [0; 4];
    if stored.compressed {
        hint[..stored.bytes.len()].copy_from_slice(&stored.bytes);
    }
    u32::from_le_bytes(hint)
}

/// The bytes of a cell under construction.
#[derive(Default)]
struct Cell(Vec<u8>);

impl Cell {
    fn bytes(&mut self, data: &[u8]) -> &mut Self {
        self.0.extend_from_slice(data);
        self
    }

    fn u16(&mut self, n: u16) -> &mut Self {
        self.bytes(&n.to_le_bytes())
    }

    fn u32(&mut self, n: u32) -> &mut Self {
        self.bytes(&n.to_le_bytes())
    }

    fn u64(&mut self, n: u64) -> &mut Self {
        self.bytes(&n.to_le_bytes())
    }
}

/// Administrators own the key; SYSTEM and Administrators have full access, Users may read;
/// inherited.
fn security_descriptor() -> Vec<u8> {
    const SYSTEM: &[u32] = &[18];
    const ADMINISTRATORS: &[u32] = &[32, 544];
    const USERS: &[u32] = &[32, 545];
    const KEY_ALL_ACCESS: u32 = 0x000f_003f;
    const KEY_READ: u32 = 0x0002_0019;

    let sid = |authorities: &[u32]| {
        let mut sid = Cell::default();
        sid.bytes(&[1, authorities.len() as u8, 0, 0, 0, 0, 0, 5]);
        for &authority in authorities {
            sid.u32(authority);
        }
        sid.0
    };
    let mut entries = Cell::default();
    for (authorities, access) in [
        (SYSTEM, KEY_ALL_ACCESS),
        (ADMINISTRATORS, KEY_ALL_ACCESS),
        (USERS, KEY_READ),
    ] {
        let sid = sid(authorities);
        // ACCESS_ALLOWED_ACE, inherited by the keys below.
        entries.bytes(&[0, 2]).u16(8 + sid.len() as u16);
        entries.u32(access).bytes(&sid);
    }
    let (owner, group) = (sid(ADMINISTRATORS), sid(SYSTEM));
    let acl_size = 8 + entries.0.len();
    let mut descriptor = Cell::default();
    // Self-relative, with a DACL.
    descriptor.bytes(&[1, 0]).u16(0x8004);
    let owner_at = 20 + acl_size as u32;
    descriptor.u32(owner_at).u32(owner_at + owner.len() as u32);
    descriptor.u32(0).u32(20);
    descriptor.bytes(&[2, 0]).u16(acl_size as u16).u16(3).u16(0);
    descriptor.bytes(&entries.0).bytes(&owner).bytes(&group);
    descriptor.0
}

#[cfg(test)]
mod tests;
