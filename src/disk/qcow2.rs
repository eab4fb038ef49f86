//! The structures of a qcow2, each declared once.
//!
//! Source: `docs/interop/qcow2.rst` of QEMU. All numbers are big-endian.

use crate::bytes::{Be, layout};

pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bits 9 to 55 of an entry of either level: the offset of its table or cluster.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Flag in an entry of either level: exactly one entry leads there.
pub const COPIED: u64 = 1 << 63;
/// Flag in an entry of the second level: the cluster is compressed, and the other bits locate it.
pub const COMPRESSED: u64 = 1 << 62;
/// Flag in an entry of the second level without subclusters: the cluster reads as zeroes, whether
/// it is allocated or not.
pub const ZERO: u64 = 1;
/// Incompatible feature: clusters are in another file.
pub const EXTERNAL_DATA: u64 = 1 << 2;
/// Incompatible feature: byte 104 of the header is the type of compression.
pub const COMPRESSION_TYPE: u64 = 1 << 3;
/// That type for zstd.
pub const ZSTD: u8 = 1;
/// Incompatible feature: entries of the second level have 16 bytes, the last eight of which are a
/// bitmap of subclusters.
pub const EXTENDED_L2: u64 = 1 << 4;
/// Parts of a cluster, with [`EXTENDED_L2`]. The lower half of the bitmap marks allocated ones, the
/// upper half those that read as zeroes.
pub const SUBCLUSTERS: u64 = 32;

/// The unit in which an entry gives the length of compressed data.
const SECTOR: u64 = 512;

/// Offset and length of compressed data in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packed {
    pub(super) at: u64,
    pub(super) len: u64,
}

impl Packed {
    /// The bit of an entry from which the number of further sectors stands.
    fn shift(cluster_bits: u32) -> u32 {
        62 - (cluster_bits - 8)
    }

    /// The entry of the second level. It tells where the data begins, and how many sectors the
    /// data goes into besides the first one.
    pub(super) fn entry(self, cluster_bits: u32) -> u64 {
        let more = (self.at + self.len - 1) / SECTOR - self.at / SECTOR;
        COMPRESSED | more << Self::shift(cluster_bits) | self.at
    }

    /// The range that an entry describes, up to the end of its last sector; `None` for an entry of
    /// other data.
    pub(super) fn of(entry: u64, cluster_bits: u32) -> Option<Self> {
        let shift = Self::shift(cluster_bits);
        let at = entry & ((1 << shift) - 1);
        let more = (entry & (COMPRESSED - 1)) >> shift;
        let len = (more + 1) * SECTOR - at % SECTOR;
        (entry & COMPRESSED != 0).then_some(Self { at, len })
    }

    /// The last byte that is certainly used: at least one of the last sector is.
    pub(super) fn least_end(self) -> u64 {
        self.at + self.len - (SECTOR - 1)
    }
}

layout! {
    /// The start of the file. Version 2 ends before `incompatible`.
    Header[104] {
        /// [`MAGIC`].
        0 => magic: [u8; 4],
        /// 2 or 3.
        4 => version: Be<u32>,
        /// Offset of the backing file's name; 0 without one.
        8 => backing: Be<u64>,
        /// Length of that name in bytes.
        16 => backing_len: Be<u32>,
        /// Size of a cluster in bytes, as a power of two.
        20 => cluster_bits: Be<u32>,
        /// Size of the disk in bytes.
        24 => size: Be<u64>,
        /// 0 not encrypted, 1 AES, 2 LUKS.
        32 => encryption: Be<u32>,
        /// Entries of the first level.
        36 => l1_entries: Be<u32>,
        /// Offset of the first level.
        40 => l1: Be<u64>,
        /// Offset of the table of reference counts.
        48 => counts: Be<u64>,
        /// Clusters of that table.
        56 => counts_clusters: Be<u32>,
        /// Number of snapshots.
        60 => snapshots: Be<u32>,
        /// Offset of their list.
        64 => snapshot_list: Be<u64>,
        /// Features that a reader must support.
        72 => incompatible: Be<u64>,
        /// Features that a reader need not support.
        80 => compatible: Be<u64>,
        /// Features that a writer without support for them must clear.
        88 => clearing: Be<u64>,
        /// Bits of a reference count, as a power of two; 4 in version 2.
        96 => count_order: Be<u32>,
        /// Length of this header in bytes.
        100 => len: Be<u32>,
    }
}

impl Header {
    /// Parses the header of a qcow2 that may be truncated; `None` for another file. Fields that
    /// version 2 lacks are 0.
    pub fn of(head: &[u8]) -> Option<Self> {
        let mut header = Self::padded(head).filter(|header| header.magic == MAGIC)?;
        if header.version.0 < 3 {
            (header.incompatible, header.count_order) = (Be(0), Be(4));
        }
        Some(header)
    }
}

layout! {
    /// The start of each entry in the list of snapshots; extra data, identifier and name follow.
    SnapshotHeader[40] {
        /// Offset of the first level of the snapshot.
        0 => l1: Be<u64>,
        /// Its entries.
        8 => l1_entries: Be<u32>,
        /// Length of the identifier in bytes.
        12 => id_len: Be<u16>,
        /// Length of the name in bytes.
        14 => name_len: Be<u16>,
        /// Length of the extra data in bytes.
        36 => extra_len: Be<u32>,
    }
}
