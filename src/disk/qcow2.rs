//! The structures of a qcow2, each declared once.
//!
//! Source: `docs/interop/qcow2.rst` of QEMU. All numbers are big-endian.

use crate::bytes::{Be, layout};

pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bits 9 to 55 of an entry of either level: where its table or cluster is.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Of an entry of either level: exactly one entry leads there.
pub const COPIED: u64 = 1 << 63;
/// Of an entry of the second level: the cluster is compressed, and the other bits say where.
pub const COMPRESSED: u64 = 1 << 62;
/// Of an entry of the second level without subclusters: the cluster reads as zeroes, wherever it is.
pub const ZERO: u64 = 1;
/// Of an incompatible feature: clusters are in another file.
pub const EXTERNAL_DATA: u64 = 1 << 2;
/// Of an incompatible feature: entries of the second level have 16 bytes, the last eight of which are a bitmap of
/// subclusters.
pub const EXTENDED_L2: u64 = 1 << 4;
/// Parts of a cluster, with [`EXTENDED_L2`]. Of the bitmap the lower half says which are there, the upper half which
/// read as zeroes.
pub const SUBCLUSTERS: u64 = 32;

layout! {
    /// What the file begins with. Version 2 ends before `incompatible`.
    Header[104] {
        /// [`MAGIC`].
        0 => magic: [u8; 4],
        /// 2 or 3.
        4 => version: Be<u32>,
        /// Where the name of the backing file is; 0 without one.
        8 => backing: Be<u64>,
        /// Bytes of that name.
        16 => backing_len: Be<u32>,
        /// Bytes of a cluster, as a power of two.
        20 => cluster_bits: Be<u32>,
        /// Bytes of the disk.
        24 => size: Be<u64>,
        /// 0 not encrypted, 1 AES, 2 LUKS.
        32 => encryption: Be<u32>,
        /// Entries of the first level.
        36 => l1_entries: Be<u32>,
        /// Where the first level is.
        40 => l1: Be<u64>,
        /// Where the table of reference counts is.
        48 => counts: Be<u64>,
        /// Clusters of that table.
        56 => counts_clusters: Be<u32>,
        /// How many snapshots there are.
        60 => snapshots: Be<u32>,
        /// Where their list is.
        64 => snapshot_list: Be<u64>,
        /// Features that a reader must know.
        72 => incompatible: Be<u64>,
        /// Features that a reader need not know.
        80 => compatible: Be<u64>,
        /// Features that a writer that does not know them switches off.
        88 => clearing: Be<u64>,
        /// Bits of a reference count, as a power of two; 4 in version 2.
        96 => count_order: Be<u32>,
        /// Bytes of this header.
        100 => len: Be<u32>,
    }
}

impl Header {
    /// The header of a qcow2 that may be cut off; `None` of another file. What version 2 does not have is 0.
    pub fn of(head: &[u8]) -> Option<Self> {
        let mut whole = [0; Self::LEN];
        let there = head.len().min(Self::LEN);
        whole[..there].copy_from_slice(&head[..there]);
        let mut header = Self::read(&whole).filter(|header| header.magic == MAGIC)?;
        if header.version.0 < 3 {
            (header.incompatible, header.count_order) = (Be(0), Be(4));
        }
        Some(header)
    }
}

layout! {
    /// What each entry of the list of snapshots begins with; extra data, identifier and name follow.
    SnapshotHeader[40] {
        /// Where the first level of the snapshot is.
        0 => l1: Be<u64>,
        /// Its entries.
        8 => l1_entries: Be<u32>,
        /// Bytes of the identifier.
        12 => id_len: Be<u16>,
        /// Bytes of the name.
        14 => name_len: Be<u16>,
        /// Bytes of the extra data.
        36 => extra_len: Be<u32>,
    }
}
