//! The headers of image formats, each declared once. Numbers are little-endian, except with [`Be`].
//!
//! Sources: *VHD* is Microsoft's "Virtual Hard Disk Image Format Specification" 1.0; *VHDX* is
//! [MS-VHDX]; *VDF* is VMware's "Virtual Disk Format 5.0"; *VDI* is VirtualBox's `VDICore.h`.
//! *QEMU* is its `block/NAME.c`, for formats without a public specification.

use uuid::Uuid;

use crate::bytes::{Be, layout};

pub(super) const VHD_COOKIE: [u8; 8] = *b"conectix";
const VHD_SPARSE_COOKIE: [u8; 8] = *b"cxsparse";
pub(super) const VHDX_MAGIC: [u8; 8] = *b"vhdxfile";
const VDI_SIGNATURE: u32 = 0xbeda_107f;
pub(super) const VMDK_MAGIC: [u8; 4] = *b"KDMV";
pub(super) const COWD_MAGIC: [u8; 4] = *b"COWD";
pub(super) const SE_SPARSE_MAGIC: u64 = 0xcafe_babe;
pub(super) const QED_MAGIC: [u8; 4] = *b"QED\0";
pub(super) const PARALLELS_MAGIC: [u8; 16] = *b"WithoutFreeSpace";
/// The most entries of a region table and of a metadata table (VHDX 2.2.3.1, 2.6.1.1).
pub(super) const VHDX_ENTRIES: usize = 2047;
/// The magic of a Parallels image whose table counts blocks instead of sectors.
pub(super) const PARALLELS_BLOCKS_MAGIC: [u8; 16] = *b"WithouFreSpacExt";

layout! {
    /// The last sector of a VHD; a dynamic one begins with a copy of it (VHD, "Hard Disk Footer
    /// Format").
    VhdFooter[512] {
        /// [`VHD_COOKIE`].
        0 => cookie: [u8; 8],
        /// Offset of [`VhdDynamic`]; all ones in a fixed VHD.
        16 => dynamic: Be<u64>,
        /// The program that created the file.
        28 => creator: [u8; 4],
        /// Size of the disk in bytes, now.
        48 => size: Be<u64>,
        /// The geometry, which may be smaller than the disk.
        56 => cylinders: Be<u16>,
        58 => heads: u8,
        59 => sectors_per_track: u8,
        /// 2 fixed, 3 dynamic, 4 differencing.
        60 => kind: Be<u32>,
        /// The complement of the sum of all bytes of the footer but these.
        64 => checksum: Be<u32>,
        /// Identifies the file; differencing VHDs name their parent by it.
        68 => id: [u8; 16],
    }
}

layout! {
    /// The second header of a dynamic or differencing VHD (VHD, "Dynamic Disk Header Format").
    VhdDynamic[1024] {
        /// [`VHD_SPARSE_COOKIE`].
        0 => cookie: [u8; 8],
        /// Offset of the table of blocks.
        16 => table: Be<u64>,
        /// Entries of that table.
        28 => entries: Be<u32>,
        /// Size of a block in bytes, without its bitmap.
        32 => block: Be<u32>,
        /// The parent's [`VhdFooter::id`].
        40 => parent_id: [u8; 16],
        /// The parent's name, UTF-16 with the high byte first.
        64 => parent_name: [u8; 512],
    }
}

layout! {
    /// One of the two headers of a VHDX (VHDX 2.2.2).
    VhdxHeader[80] {
        /// `head`.
        0 => signature: [u8; 4],
        /// The header with the higher number is the current one.
        8 => sequence: u64,
        /// Changes with every session that writes to the file.
        16 => file_write_id: [u8; 16],
        /// Changes with every session that writes data; children name their parent by it.
        32 => data_write_id: [u8; 16],
        /// Identifies the valid entries of the log; 0 for an empty log.
        48 => log_id: [u8; 16],
    }
}

layout! {
    /// The start of a region table (VHDX 2.2.3.1).
    VhdxRegionTable[16] {
        /// `regi`.
        0 => signature: [u8; 4],
        /// At most 2047 entries.
        8 => entries: u32,
    }
}

layout! {
    /// An entry of a region table (VHDX 2.2.3.2).
    VhdxRegion[32] {
        /// The kind of the region.
        0 => id: Uuid,
        /// Its offset in the file.
        16 => offset: u64,
        /// Its length in bytes.
        24 => len: u32,
    }
}

layout! {
    /// The start of the metadata region (VHDX 2.6.1.1).
    VhdxMetadataTable[32] {
        /// `metadata`.
        0 => signature: [u8; 8],
        /// At most 2047 entries.
        10 => entries: u16,
    }
}

layout! {
    /// An entry of the metadata table (VHDX 2.6.1.2).
    VhdxMetadata[32] {
        /// The kind of the item.
        0 => id: Uuid,
        /// Its offset in the region.
        16 => offset: u32,
        /// Its length in bytes.
        20 => len: u32,
    }
}

layout! {
    /// The start of a parent locator (VHDX 2.6.2.6.1).
    VhdxLocator[20] {
        /// Pairs of a key and a value.
        18 => entries: u16,
    }
}

layout! {
    /// A pair of a parent locator (VHDX 2.6.2.6.2). Offsets are relative to the locator; texts are
    /// UTF-16.
    VhdxLocatorEntry[12] {
        0 => key: u32,
        4 => value: u32,
        /// Length of the key in bytes.
        8 => key_len: u16,
        /// Length of the value in bytes.
        10 => value_len: u16,
    }
}

layout! {
    /// The first sector of a VDI (VDI, `VDIPREHEADER` and `VDIHEADER1PLUS`).
    VdiHeader[512] {
        /// [`VDI_SIGNATURE`].
        64 => signature: u32,
        /// Offset of the data.
        344 => data: u32,
        /// Size of the disk in bytes.
        368 => size: u64,
        /// Size of a block in bytes.
        376 => block: u32,
        /// Bytes before the data of each block.
        380 => block_extra: u32,
        /// Blocks of the disk.
        384 => blocks: u32,
        /// Blocks in the file.
        388 => allocated: u32,
        /// Identifies the file.
        392 => id: [u8; 16],
        /// Identifies the parent of a differencing image.
        424 => parent_id: [u8; 16],
    }
}

layout! {
    /// The header of a hosted sparse extent, and of its footer (VDF, "Hosted Sparse Extents"). Sizes
    /// and offsets are in sectors.
    VmdkHeader[512] {
        /// [`VMDK_MAGIC`].
        0 => magic: [u8; 4],
        4 => version: u32,
        /// Bit 16: grains are compressed.
        8 => flags: u32,
        /// Size of the disk; 0 if the embedded descriptor names other files.
        12 => capacity: u64,
        /// Size of a grain.
        20 => grain: u64,
        /// Offset of the embedded descriptor; 0 without one.
        28 => descriptor: u64,
        /// Size of the descriptor.
        36 => descriptor_len: u64,
        /// Entries of a grain table.
        44 => per_table: u32,
        /// Offset of the grain directory; all ones if the footer has it.
        56 => directory: u64,
        /// Sectors before the first grain.
        64 => overhead: u64,
    }
}

layout! {
    /// The header of a sparse extent of ESX (QEMU, vmdk: `VMDK3Header`). Sizes and offsets are in
    /// sectors.
    CowdHeader[28] {
        /// [`COWD_MAGIC`].
        0 => magic: [u8; 4],
        /// Size of the disk.
        12 => capacity: u32,
        /// Size of a grain.
        16 => grain: u32,
        /// Offset of the grain directory.
        20 => directory: u32,
        /// Entries of the grain directory.
        24 => tables: u32,
    }
}

layout! {
    /// What precedes a compressed grain, or stands alone between grains (VDF, "Stream-Optimized
    /// Compressed Sparse Extents").
    VmdkMarker[16] {
        /// The grain's first sector on the disk; for a marker alone the length of what it announces,
        /// in sectors.
        0 => value: u64,
        /// Length of the compressed grain in bytes; 0 for a marker alone.
        8 => len: u32,
    }
}

layout! {
    /// The first header of a space-efficient sparse extent (QEMU, vmdk: `VMDKSESparseConstHeader`).
    /// Sizes and offsets are in sectors.
    SeSparseHeader[208] {
        /// [`SE_SPARSE_MAGIC`].
        0 => magic: u64,
        /// Size of the disk.
        16 => capacity: u64,
        /// Size of a grain.
        24 => grain: u64,
        /// Size of a grain table.
        32 => table: u64,
        /// Offset of the grain directory.
        128 => directory: u64,
        /// Size of the grain directory.
        136 => directory_len: u64,
        /// Offset of the grain tables.
        144 => tables: u64,
        /// Offset of the grains.
        192 => data: u64,
    }
}

layout! {
    /// The header of a qcow version 1 (QEMU, qcow: `QCowHeader`).
    QcowHeader[48] {
        /// As in a qcow2.
        0 => magic: [u8; 4],
        /// 1.
        4 => version: Be<u32>,
        /// Size of the disk in bytes.
        24 => size: Be<u64>,
        /// Size of a cluster in bytes, as a power of two.
        32 => cluster_bits: u8,
        /// Entries of a second table, as a power of two.
        33 => l2_bits: u8,
        /// Offset of the first table.
        40 => l1: Be<u64>,
    }
}

layout! {
    /// The header of a QED (QEMU, `docs/interop/qed_spec.txt`).
    QedHeader[64] {
        /// [`QED_MAGIC`].
        0 => magic: [u8; 4],
        /// Size of a cluster in bytes.
        4 => cluster: u32,
        /// Clusters of a table.
        8 => table: u32,
        /// Offset of the first table.
        40 => l1: u64,
        /// Size of the disk in bytes.
        48 => size: u64,
        /// Offset of the backing file's name; 0 without one.
        56 => backing: u32,
        /// Length of that name in bytes.
        60 => backing_len: u32,
    }
}

layout! {
    /// The header of a Parallels image (QEMU, `docs/interop/parallels.txt`). The table follows.
    ParallelsHeader[64] {
        /// [`PARALLELS_MAGIC`] or [`PARALLELS_BLOCKS_MAGIC`].
        0 => magic: [u8; 16],
        /// Sectors of a block.
        28 => block: u32,
        /// Entries of the table.
        32 => entries: u32,
    }
}

impl VhdDynamic {
    /// Parses the header, whose end may be missing; `None` for anything else.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        Self::padded(bytes).filter(|header| header.cookie == VHD_SPARSE_COOKIE)
    }
}

impl VdiHeader {
    /// Parses the header, whose end may be missing; `None` for another file.
    pub fn of(head: &[u8]) -> Option<Self> {
        Self::padded(head).filter(|header| header.signature == VDI_SIGNATURE)
    }
}

impl VmdkHeader {
    /// Parses the header, whose end may be missing; `None` for another file.
    pub fn of(head: &[u8]) -> Option<Self> {
        Self::padded(head).filter(|header| header.magic == VMDK_MAGIC)
    }
}
