//! Offsets of the fields in a hive's cells, counted from the start of a cell's data (after its
//! size).
//!
//! Source: msuhanov's "Windows registry file format specification", the section named at each
//! structure. All numbers are little-endian; offsets of cells count from the first hive bin.

/// A key ("Key node"), signature `nk`.
pub mod nk {
    /// u16: 0x20 if the name is stored as Latin-1.
    pub const FLAGS: usize = 2;
    pub const COMPRESSED_NAME: u16 = 0x20;
    /// u32: the cell of its parent key.
    pub const PARENT: usize = 16;
    /// u32: number of its subkeys.
    pub const SUBKEYS: usize = 20;
    /// u32: the cell of the list of subkeys.
    pub const SUBKEY_LIST: usize = 28;
    /// u32: number of its values.
    pub const VALUES: usize = 36;
    /// u32: the cell of the list of values.
    pub const VALUE_LIST: usize = 40;
    /// u32: the cell of its security descriptor.
    pub const SECURITY: usize = 44;
    /// u32: the cell of its class name.
    pub const CLASS: usize = 48;
    /// u16: length of the name in bytes.
    pub const NAME_LEN: usize = 72;
    /// u16: length of the class name in bytes.
    pub const CLASS_LEN: usize = 74;
    /// The name.
    pub const NAME: usize = 76;
}

/// A value ("Key value"), signature `vk`.
pub mod vk {
    /// u16: length of the name in bytes; 0 for the default value.
    pub const NAME_LEN: usize = 2;
    /// u32: length of the data in bytes; the highest bit means that the data is in the next field.
    pub const SIZE: usize = 4;
    /// u32: the cell of the data, or the data.
    pub const DATA: usize = 8;
    /// u32: the type, `REG_SZ` and so on.
    pub const TYPE: usize = 12;
    /// u16: 1 if the name is stored as Latin-1.
    pub const FLAGS: usize = 16;
    pub const COMPRESSED_NAME: u16 = 1;
    /// The name.
    pub const NAME: usize = 20;
}

/// A list of keys ("Index leaf", "Fast leaf", "Hash leaf", "Index root"): `li`, `lf`, `lh`, `ri`.
pub mod list {
    /// u16: number of elements that follow.
    pub const COUNT: usize = 2;
    /// The first element: a u32, the cell of a key (of a list, in an `ri`).
    pub const FIRST: usize = 4;
    /// Bytes of an element of `li` and `ri`.
    pub const PLAIN: usize = 4;
    /// Bytes of an element of `lf` and `lh`: a u32 follows the cell, a part or a hash of the key's name.
    pub const HASHED: usize = 8;
    /// Offset of the part or the hash in such an element.
    pub const HASH: usize = 4;
}

/// Data too large for one cell ("Big data"), signature `db`.
pub mod db {
    /// u16: number of segments.
    pub const COUNT: usize = 2;
    /// u32: the cell of the list of them, a u32 each.
    pub const LIST: usize = 4;
}

/// A security descriptor ("Key security"), signature `sk`.
pub mod sk {
    /// u32: the cell of the next one; they form a ring.
    pub const NEXT: usize = 4;
    /// u32: the cell of the previous one.
    pub const PREVIOUS: usize = 8;
    /// u32: number of keys that use it.
    pub const REFERENCES: usize = 12;
    /// u32: length of the descriptor in bytes.
    pub const SIZE: usize = 16;
    /// The descriptor, self-relative.
    pub const DESCRIPTOR: usize = 20;
}

/// The start of a hive or of one of its logs ("Base block"), from the start of the file.
pub mod base {
    /// u32: incremented before a write.
    pub const PRIMARY_SEQUENCE: usize = 4;
    /// u32: set to the same number after the write.
    pub const SECONDARY_SEQUENCE: usize = 8;
    /// u64: FILETIME of the last write.
    pub const LAST_WRITTEN: usize = 12;
    /// u32: 1.
    pub const MAJOR: usize = 20;
    /// u32: 3 to 6.
    pub const MINOR: usize = 24;
    /// u32: 0 a hive, 1 and 2 an old log, 6 a new one.
    pub const FILE_TYPE: usize = 28;
    /// u32: 1, direct memory load.
    pub const FORMAT: usize = 32;
    /// u32: the cell of the root key.
    pub const ROOT_CELL: usize = 36;
    /// u32: length of all bins in bytes.
    pub const BINS_SIZE: usize = 40;
    /// u32: number of sectors written together.
    pub const CLUSTERING: usize = 44;
    /// UTF-16: the tail of the path under which Windows opened the hive.
    pub const FILE_NAME: std::ops::Range<usize> = 48..112;
    /// u32: the XOR of everything before it.
    pub const CHECKSUM: usize = 508;
}
