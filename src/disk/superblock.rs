//! The sizes that other file systems record, each layout declared once. Numbers are little-endian,
//! except with [`Be`].
//!
//! Sources: *exFAT* is Microsoft's "exFAT file system specification"; *libfsrefs* and *libbde* are
//! the format documents of those libraries; the others are Linux's headers and LVM2's `layout.h`.

use crate::bytes::{Be, layout};

layout! {
    /// The first sector of an exFAT volume (exFAT, 3.1).
    ExFatBoot[512] {
        /// Sectors of the volume.
        72 => sectors: u64,
        /// Size of a sector in bytes, as a power of two.
        108 => sector_shift: u8,
    }
}

layout! {
    /// The first sector of a ReFS volume (libfsrefs, "Volume header").
    ReFsBoot[512] {
        /// Sectors of the volume.
        24 => sectors: u64,
        /// Size of a sector in bytes.
        32 => sector_size: u32,
    }
}

layout! {
    /// The first sector of a BitLocker volume of Windows 7 and later (libbde, "Volume header").
    BitLockerBoot[512] {
        /// Offset of the first copy of [`BitLockerBlock`].
        176 => block: u64,
    }
}

layout! {
    /// The start of BitLocker's metadata (libbde, "FVE metadata block header").
    BitLockerBlock[24] {
        /// `-FVE-FS-`.
        0 => signature: [u8; 8],
        /// 2 from Windows 7 on.
        10 => version: u16,
        /// With version 2, the encrypted bytes from the start of the volume.
        16 => size: u64,
    }
}

layout! {
    /// The start of an XFS (`xfs_format.h`: `xfs_dsb`).
    Xfs[16] {
        /// `XFSB`.
        0 => magic: [u8; 4],
        /// Size of a block in bytes.
        4 => block: Be<u32>,
        /// Blocks of the file system.
        8 => blocks: Be<u64>,
    }
}

layout! {
    /// The label in the second sector of a physical volume of LVM (`label_header`).
    LvmLabel[32] {
        /// `LABELONE`.
        0 => id: [u8; 8],
        /// Offset of [`LvmVolume`] from the start of the label.
        20 => volume: u32,
    }
}

layout! {
    /// The header that the label leads to (`pv_header`).
    LvmVolume[40] {
        /// Size of the physical volume in bytes.
        32 => size: u64,
    }
}

layout! {
    /// The start of a btrfs, at 64 KiB (`btrfs_tree.h`: `btrfs_super_block`).
    Btrfs[217] {
        /// `_BHRfS_M`.
        64 => magic: [u8; 8],
        /// Size of this device in bytes; the whole array may have several.
        209 => size: u64,
    }
}

layout! {
    /// The start of an ext2, ext3 or ext4, at 1 KiB (`ext4.h`: `ext4_super_block`).
    Ext[340] {
        /// Blocks of the file system.
        4 => blocks: u32,
        /// Size of a block: 1024 shifted left by this.
        24 => block_shift: u32,
        /// 0xef53.
        56 => magic: u16,
        /// Features that a reader must support. Bit 7: `blocks_high` counts.
        96 => incompatible: u32,
        /// The upper half of `blocks`.
        336 => blocks_high: u32,
    }
}
