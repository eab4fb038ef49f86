//! Read access to a hive in memory.
//!
//! The view reads only the hive bins announced by the base block, so the tail of real files is
//! ignored. It does not determine whether the hive is *dirty* (see [`super::base`]). It checks only
//! what it reads (see [`super::walk`] for the rest). It never panics, and no call does more work
//! than the size of the hive allows. Keys may form a ring, so code that traverses a whole tree must
//! [`super::walk::walk`] it first. Lists are searched in full, using their hashes, and not by
//! binary search, so a wrong order hides no key here. It does hide keys from Windows, which is why
//! the walk checks the order.

use super::base::BaseBlock;
use super::cell::{Cell, CellFault, INLINE, NONE, SEGMENT, utf16};
use super::error::{HiveError, Result};
use super::layout::{db, list, nk, vk};
use super::name::{fold, name_hash};

pub use super::cell::BASE_BLOCK_SIZE;

/// A hive's bytes as a tree of keys. Cheap to create; borrows the bytes.
#[derive(Clone, Copy)]
pub struct HiveView<'b> {
    bins: &'b [u8],
    root: u32,
    minor: u32,
}

impl<'b> HiveView<'b> {
    pub fn new(bytes: &'b [u8]) -> Result<Self> {
        let base = BaseBlock::parse(bytes)?;
        let bins = bytes
            .get(BASE_BLOCK_SIZE..)
            .and_then(|rest| rest.get(..base.bins_size as usize))
            .ok_or_else(|| HiveError::NotAHive {
                structure: "hive bins",
                offset: BASE_BLOCK_SIZE as u64,
                expected: format!("{} bytes", base.bins_size),
                actual: bytes.len().saturating_sub(BASE_BLOCK_SIZE).to_string(),
            })?;
        Ok(Self {
            bins,
            root: base.root_cell,
            minor: base.minor,
        })
    }

    /// Whether data over 16,344 bytes is divided into segments (format 1.4 and later).
    pub(super) fn has_segments(&self) -> bool {
        self.minor >= 4
    }

    pub fn root(&self) -> Result<Key<'b>> {
        Key::at(*self, self.root)
    }

    /// The key at a `\`-separated path below the root.
    pub fn key(&self, path: &str) -> Result<Option<Key<'b>>> {
        self.root()?.key(path)
    }

    fn cell(&self, offset: u32) -> Result<Cell<'b>, CellFault> {
        Cell::at(self.bins, offset)
    }

    fn value_at(&self, offset: u32) -> Result<Cell<'b>, CellFault> {
        self.cell(offset)?.expect(b"vk")
    }

    fn value_data(&self, vk: &Cell<'b>) -> Result<Value, CellFault> {
        let (size, offset, ty) = (vk.u32(vk::SIZE)?, vk.u32(vk::DATA)?, vk.u32(vk::TYPE)?);
        let len = (size & !INLINE) as usize;
        let data = if size & INLINE != 0 {
            let word = vk.slice(vk::DATA, 4)?;
            word.get(..len)
                .ok_or_else(|| {
                    CellFault::in_bins(vk.offset, "value", "4 bytes in it at most", len)
                })?
                .to_vec()
        } else if len == 0 {
            Vec::new()
        } else if len <= SEGMENT || self.minor < 4 {
            self.cell(offset)?.slice(0, len)?.to_vec()
        } else {
            self.big_data(offset, len)?
        };
        Ok(Value { ty, data })
    }

    fn big_data(&self, offset: u32, len: usize) -> Result<Vec<u8>, CellFault> {
        if len > self.bins.len() {
            let room = format!("{} bytes at most", self.bins.len());
            return Err(CellFault::in_bins(offset, "big data", room, len));
        }
        let header = self.cell(offset)?.expect(b"db")?;
        let list = self.cell(header.u32(db::LIST)?)?;
        let mut data = Vec::new();
        for i in 0..usize::from(header.u16(db::COUNT)?) {
            let left = (len - data.len()).min(SEGMENT);
            let segment = self.cell(list.u32(i * 4)?)?;
            data.extend_from_slice(segment.slice(0, left)?);
        }
        if data.len() < len {
            let expected = format!("{len} bytes");
            return Err(CellFault::in_bins(offset, "big data", expected, data.len()));
        }
        Ok(data)
    }
}

/// A registry key. Names compare case-insensitively.
#[derive(Clone)]
pub struct Key<'h> {
    hive: HiveView<'h>,
    cell: Cell<'h>,
}

/// An entry of a subkey list: the offset of the key, and the hash of its name if the list has one.
struct Entry {
    key: u32,
    hash: Option<u32>,
}

impl<'h> Key<'h> {
    fn at(hive: HiveView<'h>, offset: u32) -> Result<Self> {
        let cell = hive.cell(offset)?.expect(b"nk")?;
        Ok(Self { hive, cell })
    }

    pub fn name(&self) -> Result<String> {
        Ok(self.cell.key_name()?.to_text())
    }

    /// The key at a `\`-separated path below this one; an empty path is this key.
    pub fn key(&self, path: &str) -> Result<Option<Key<'h>>> {
        let mut key = self.clone();
        for part in path.split('\\').filter(|p| !p.is_empty()) {
            match key.subkey(part)? {
                None => return Ok(None),
                Some(next) => key = next,
            }
        }
        Ok(Some(key))
    }

    fn subkey(&self, name: &str) -> Result<Option<Key<'h>>> {
        // Other characters are converted by Windows' own tables, so their hashes cannot be trusted.
        let hash = name.is_ascii().then(|| name_hash(name));
        let folded = fold(name);
        for entry in self.entries()? {
            if entry.hash.is_some() && hash.is_some() && entry.hash != hash {
                continue;
            }
            let key = Key::at(self.hive, entry.key)?;
            if key.cell.key_name()?.matches(&folded) {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }

    pub fn keys(&self) -> Result<Vec<Key<'h>>> {
        self.entries()?
            .iter()
            .map(|entry| Key::at(self.hive, entry.key))
            .collect()
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        let subkeys = self.cell.u32(nk::SUBKEY_LIST)?;
        let mut entries = Vec::new();
        if subkeys == NONE || self.cell.u32(nk::SUBKEYS)? == 0 {
            return Ok(entries);
        }
        let cell = self.hive.cell(subkeys)?;
        if cell.slice(0, 2)? == b"ri" {
            for i in 0..usize::from(cell.u16(list::COUNT)?) {
                let leaf = self.hive.cell(cell.u32(list::FIRST + i * list::PLAIN)?)?;
                self.add_leaf(&leaf, &mut entries)?;
            }
        } else {
            self.add_leaf(&cell, &mut entries)?;
        }
        Ok(entries)
    }

    fn add_leaf(&self, leaf: &Cell<'_>, entries: &mut Vec<Entry>) -> Result<(), CellFault> {
        // An index root may name one leaf many times; the hive cannot have more keys than this.
        let most = self.hive.bins.len() / 80;
        let count = usize::from(leaf.u16(list::COUNT)?);
        if entries.len() + count > most {
            let (room, found) = (format!("room for {most}"), entries.len() + count);
            return Err(CellFault::in_bins(leaf.offset, "subkeys", room, found));
        }
        let (step, hashed) = match leaf.slice(0, 2)? {
            b"lh" => (list::HASHED, true),
            b"lf" => (list::HASHED, false),
            b"li" => (list::PLAIN, false),
            other => {
                let (expected, found) = ("lh, lf or li", other.escape_ascii());
                return Err(CellFault::in_bins(
                    leaf.offset,
                    "list of subkeys",
                    expected,
                    found,
                ));
            }
        };
        for i in 0..count {
            let at = list::FIRST + i * step;
            entries.push(Entry {
                key: leaf.u32(at)?,
                hash: if hashed {
                    Some(leaf.u32(at + list::HASH)?)
                } else {
                    None
                },
            });
        }
        Ok(())
    }

    fn value_cells(&self) -> Result<Vec<Cell<'h>>> {
        let count = self.cell.u32(nk::VALUES)? as usize;
        if count == 0 {
            return Ok(Vec::new());
        }
        let list = self.hive.cell(self.cell.u32(nk::VALUE_LIST)?)?;
        let offsets = list.slice(0, count.saturating_mul(4))?;
        offsets
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .map(|offset| Ok(self.hive.value_at(offset)?))
            .collect()
    }

    /// The value of that name; `""` is the default value.
    pub fn value(&self, name: &str) -> Result<Option<Value>> {
        let folded = fold(name);
        for vk in self.value_cells()? {
            if vk.value_name()?.matches(&folded) {
                return Ok(Some(self.hive.value_data(&vk)?));
            }
        }
        Ok(None)
    }

    pub fn values(&self) -> Result<Vec<(String, Value)>> {
        let mut values = Vec::new();
        let mut room = self.hive.bins.len();
        for vk in self.value_cells()? {
            let value = self.hive.value_data(&vk)?;
            // Many values may name the same cell.
            room = room.checked_sub(value.data.len()).ok_or_else(|| {
                let (left, len) = (format!("{room} bytes left"), value.data.len());
                CellFault::in_bins(vk.offset, "values of a key", left, len)
            })?;
            values.push((vk.value_name()?.to_text(), value));
        }
        Ok(values)
    }

    /// A REG_SZ or REG_EXPAND_SZ value as text.
    pub fn string(&self, name: &str) -> Result<Option<String>> {
        Ok(self.value(name)?.and_then(|v| v.as_string()))
    }

    pub fn dword(&self, name: &str) -> Result<Option<u32>> {
        Ok(self.value(name)?.and_then(|v| v.as_dword()))
    }

    /// A REG_MULTI_SZ value (or a REG_SZ one as a list of one).
    pub fn multi(&self, name: &str) -> Result<Option<Vec<String>>> {
        Ok(self.value(name)?.and_then(|v| v.as_multi()))
    }
}

pub const REG_NONE: u32 = 0;
pub const REG_SZ: u32 = 1;
pub const REG_EXPAND_SZ: u32 = 2;
pub const REG_BINARY: u32 = 3;
pub const REG_DWORD: u32 = 4;
pub const REG_MULTI_SZ: u32 = 7;

/// A registry value: its type and its undecoded bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    pub ty: u32,
    pub data: Vec<u8>,
}

impl Value {
    pub fn as_dword(&self) -> Option<u32> {
        match (self.ty, self.data.as_slice()) {
            (REG_DWORD, &[a, b, c, d]) => Some(u32::from_le_bytes([a, b, c, d])),
            _ => None,
        }
    }

    pub fn as_string(&self) -> Option<String> {
        matches!(self.ty, REG_SZ | REG_EXPAND_SZ).then(|| {
            let text = utf16(&self.data);
            text.split('\0').next().unwrap_or_default().to_string()
        })
    }

    pub fn as_multi(&self) -> Option<Vec<String>> {
        match self.ty {
            REG_MULTI_SZ => Some(
                utf16(&self.data)
                    .split('\0')
                    .take_while(|s| !s.is_empty())
                    .map(str::to_string)
                    .collect(),
            ),
            _ => self.as_string().map(|s| vec![s]),
        }
    }
}
