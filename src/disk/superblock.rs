//! The sizes that other file systems record, each layout declared once. Numbers are little-endian,
//! except with [`Be`].
//!
//! Sources: *exFAT* is Microsoft's "exFAT file system specification"; *libfsrefs* and *libbde* are
//! the format documents of those libraries. *dissect* and *bitlk* are as in `guest::fve::layout`,
//! which has the other structures of BitLocker. The others are Linux's headers and LVM2's `layout.h`.

use crate::bytes::{Be, layout};

/// The signature of BitLocker in the volume header, in its counterpart of BitLocker To Go, and in
/// each copy of the metadata.
pub const SIGNATURE: [u8; 8] = *b"-FVE-FS-";
/// Offset of [`Places`] in the first sector, from Windows 7 on (libbde, "Volume header").
pub const PLACES_OFFSET: usize = 160;

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
    /// The offsets of the metadata copies, from Windows 7 on (libbde, "Volume header").
    Places[40] {
        /// One of two, for volumes at rest and those that encrypt on write.
        0 => guid: [u8; 16],
        /// Offsets in the volume.
        16 => copies: [u64; 3],
    }
}

layout! {
    /// The start of a copy of the metadata (libbde, "FVE metadata
    /// block header"; dissect, `FVE_INFORMATION`).
    BlockHeader[64] {
        /// [`SIGNATURE`].
        0 => signature: [u8; 8],
        /// The size of header, dataset and padding; in units of 16 bytes from Windows 7 on (bitlk).
        8 => size: u16,
        /// 1 for Vista, 2 for Windows 7 and later.
        10 => version: u16,
        /// The state of the volume.
        12 => state: u16,
        /// The next state; the same value if no conversion is in progress.
        14 => next_state: u16,
        /// From Windows 7 on: the encrypted bytes from the start of the volume.
        16 => encrypted_bytes: u64,
        /// Bytes of the conversion's log (dissect, `StateSize`).
        24 => conversion_bytes: u32,
        /// From Windows 7 on: the sectors at the start of the volume that are stored elsewhere.
        28 => moved_sectors: u32,
        /// Offsets of all copies, including this one.
        32 => copies: [u64; 3],
        /// From Windows 7 on the offset of the moved sectors; for Vista the cluster of the MFT's
        /// mirror.
        56 => moved_to: u64,
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
