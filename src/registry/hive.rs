//! Read access to a hive in memory, over the `nt-hive` crate.
//!
//! The view looks only at the hive bins the base block announces, so the tail that real files carry
//! beyond them is ignored. Whether the hive is *dirty* is not decided here: the view shows the bytes
//! it is given.

use nt_hive::{Hive, KeyNode, NtHiveError};

#[derive(Debug, thiserror::Error)]
pub enum HiveError {
    #[error("not a registry hive: {0}")]
    NotAHive(&'static str),
    #[error("registry hive is damaged")]
    Damaged(#[source] NtHiveError),
    #[error("registry key {0} is not there")]
    NoKey(String),
}

impl From<NtHiveError> for HiveError {
    fn from(error: NtHiveError) -> Self {
        HiveError::Damaged(error)
    }
}

pub type Result<T, E = HiveError> = std::result::Result<T, E>;

pub const BASE_BLOCK_SIZE: usize = 4096;

/// A hive's bytes with the structure on top. Cheap to make; borrows the bytes.
pub struct HiveView<'b> {
    hive: Hive<&'b [u8]>,
}

impl<'b> HiveView<'b> {
    pub fn new(bytes: &'b [u8]) -> Result<Self> {
        let base = bytes
            .get(..BASE_BLOCK_SIZE)
            .ok_or(HiveError::NotAHive("shorter than its base block"))?;
        if &base[..4] != b"regf" {
            return Err(HiveError::NotAHive("no regf signature"));
        }
        let size = u32::from_le_bytes([base[40], base[41], base[42], base[43]]) as usize;
        let end = BASE_BLOCK_SIZE
            .checked_add(size)
            .ok_or(HiveError::NotAHive("hive bins size overflows"))?;
        let used = bytes
            .get(..end)
            .ok_or(HiveError::NotAHive("shorter than its hive bins size says"))?;
        Ok(Self {
            hive: Hive::without_validation(used)?,
        })
    }

    pub fn root(&self) -> Result<Key<'_>> {
        Ok(Key {
            node: self.hive.root_key_node()?,
        })
    }

    /// The key at a `\`-separated path below the root.
    pub fn key(&self, path: &str) -> Result<Option<Key<'_>>> {
        self.root()?.key(path)
    }
}

/// A registry key. Names compare case-insensitively.
#[derive(Clone)]
pub struct Key<'h> {
    node: KeyNode<'h, &'h [u8]>,
}

impl<'h> Key<'h> {
    pub fn name(&self) -> Result<String> {
        Ok(self.node.name()?.to_string_lossy())
    }

    /// The key at a `\`-separated path below this one; an empty path is the key itself.
    pub fn key(&self, path: &str) -> Result<Option<Key<'h>>> {
        let mut node = self.node.clone();
        for part in path.split('\\').filter(|p| !p.is_empty()) {
            match node.subkey(part) {
                None => return Ok(None),
                Some(next) => node = next?,
            }
        }
        Ok(Some(Key { node }))
    }

    pub fn keys(&self) -> Result<Vec<Key<'h>>> {
        let mut keys = Vec::new();
        if let Some(nodes) = self.node.subkeys() {
            for node in nodes? {
                keys.push(Key { node: node? });
            }
        }
        Ok(keys)
    }

    /// The value of that name; `""` is the default value.
    pub fn value(&self, name: &str) -> Result<Option<Value>> {
        match self.node.value(name) {
            None => Ok(None),
            Some(value) => Ok(Some(read_value(&value?)?)),
        }
    }

    pub fn values(&self) -> Result<Vec<(String, Value)>> {
        let mut values = Vec::new();
        if let Some(list) = self.node.values() {
            for value in list? {
                let value = value?;
                values.push((value.name()?.to_string_lossy(), read_value(&value)?));
            }
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

fn read_value(value: &nt_hive::KeyValue<'_, &[u8]>) -> Result<Value> {
    let ty = match value.data_type() {
        Ok(ty) => ty as u32,
        // Device properties use types such as 0xffff0012: legal, only unknown to nt-hive.
        Err(NtHiveError::UnsupportedKeyValueDataType { actual, .. }) => actual,
        Err(error) => return Err(error.into()),
    };
    Ok(Value {
        ty,
        data: value.data()?.into_vec()?,
    })
}

pub const REG_NONE: u32 = 0;
pub const REG_SZ: u32 = 1;
pub const REG_EXPAND_SZ: u32 = 2;
pub const REG_BINARY: u32 = 3;
pub const REG_DWORD: u32 = 4;
pub const REG_MULTI_SZ: u32 = 7;
pub const REG_QWORD: u32 = 11;

/// A registry value: its type and its bytes, undecoded.
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

fn utf16(data: &[u8]) -> String {
    let units: Vec<u16> = data
        .chunks_exact(2)
        .map(|b| u16::from_le_bytes([b[0], b[1]]))
        .collect();
    String::from_utf16_lossy(&units)
}
