//! The contents of a partition table of any kind.

use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    Gpt,
    Mbr,
    /// A file system that starts at byte 0, without a partition table.
    None,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskLayout {
    pub scheme: Scheme,
    /// The logical sector size of the table: 512 or 4096.
    pub sector_size: u32,
    /// GPT disk GUID (lower case, with dashes) or MBR signature (`0x` and 8 hex digits).
    pub disk_id: Option<String>,
    pub partitions: Vec<Partition>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// The number in Linux: GPT slot + 1; MBR primaries 1-4, logical partitions from 5.
    pub index: u32,
    /// GPT type GUID (lower case) or MBR type as `0x07`.
    #[serde(rename = "type")]
    pub type_id: String,
    pub start_bytes: u64,
    pub size_bytes: u64,
    /// GPT unique partition GUID.
    pub guid: Option<String>,
    /// GPT partition name, control characters removed.
    pub name: Option<String>,
    /// MBR active flag, or GPT legacy-boot attribute.
    pub active: bool,
}

pub const GPT_ESP: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
pub const GPT_MSR: &str = "e3c9e316-0b5c-4db8-817d-f92df00215ae";
pub const GPT_BASIC_DATA: &str = "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7";
pub const GPT_LDM_METADATA: &str = "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3";
pub const GPT_LDM_DATA: &str = "af9b60a0-1431-4f62-bc68-3311714a69ad";
/// A dynamic disk's whole range of volumes.
pub const MBR_LDM: &str = "0x42";
pub const GPT_STORAGE_SPACES: &str = "e75caf8f-f680-4cee-afa3-b001e56efc2d";
