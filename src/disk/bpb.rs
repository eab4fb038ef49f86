//! The first sectors of Windows' file systems, each declared once. All numbers are little-endian.
//!
//! Sources: *FAT* is Microsoft's "FAT32 File System Specification" 1.03, section "Boot Sector and
//! BPB"; *NTFS* is `NTFS_BOOT_SECTOR` in ntfs-3g's `layout.h`.

use crate::bytes::layout;

/// The signature at the end of the first sector.
pub const MAGIC: [u8; 2] = [0x55, 0xaa];

/// Offset in the first sector (NTFS, FAT) of the count of hidden sectors.
pub const HIDDEN_SECTORS_OFFSET: u64 = 28;

layout! {
    /// The first sector of an NTFS volume (NTFS).
    NtfsBoot[512] {
        /// A jump to the boot code.
        0 => jump: [u8; 3],
        /// `NTFS    `.
        3 => oem_id: [u8; 8],
        /// 256 to 4096.
        11 => bytes_per_sector: u16,
        /// Up to 128; above that a negative power of two.
        13 => sectors_per_cluster: u8,
        /// The LBA of the volume for the boot code.
        28 => hidden_sectors: u32,
        /// Excludes the last sector, which is a copy of this one.
        40 => total_sectors: u64,
        /// Cluster of the MFT.
        48 => mft_lcn: u64,
        /// Cluster of the copy of its first records.
        56 => mirror_lcn: u64,
        /// Clusters of an MFT record; a negative value is a power of two of bytes.
        64 => clusters_per_record: u8,
        /// Clusters of an index block, in the same form.
        68 => clusters_per_index_block: u8,
        /// The displayed serial number of the volume.
        72 => serial: u64,
        /// [`MAGIC`].
        510 => magic: [u8; 2],
    }
}

layout! {
    /// The first sector of a FAT volume: the part common to all widths (FAT).
    FatBoot[512] {
        /// 0xeb or 0xe9: a jump to the boot code.
        0 => jump: u8,
        /// The formatting program; any value is valid.
        3 => oem_id: [u8; 8],
        /// 512 to 4096.
        11 => bytes_per_sector: u16,
        /// A power of two.
        13 => sectors_per_cluster: u8,
        /// Sectors before the first table, this one included.
        14 => reserved_sectors: u16,
        /// Number of copies of the table.
        16 => tables: u8,
        /// Entries of the root directory; 0 with FAT32.
        17 => root_entries: u16,
        /// Sectors of the volume; 0 if they do not fit.
        19 => sectors_16: u16,
        /// 0xf0, or 0xf8 and above.
        21 => driver_source: u8,
        /// Sectors of one table; 0 with FAT32.
        22 => table_sectors_16: u16,
        /// The LBA of the volume for the boot code.
        28 => hidden_sectors: u32,
        /// Sectors of the volume, if `sectors_16` is 0.
        32 => sectors_32: u32,
        /// Sectors of one table, with FAT32 only.
        36 => table_sectors_32: u32,
        /// [`MAGIC`].
        510 => magic: [u8; 2],
    }
}

impl FatBoot {
    pub fn sectors(&self) -> u32 {
        or_wide(self.sectors_16, self.sectors_32)
    }

    pub fn table_sectors(&self) -> u32 {
        or_wide(self.table_sectors_16, self.table_sectors_32)
    }

    /// The offset of [`FatLabel`] in the sector.
    pub fn label_at(&self) -> usize {
        match self.table_sectors_16 {
            0 => 64,
            _ => 36,
        }
    }
}

fn or_wide(narrow: u16, wide: u32) -> u32 {
    match narrow {
        0 => wide,
        n => u32::from(n),
    }
}

layout! {
    /// Follows the fields of [`FatBoot`], and with FAT32 its additional ones (FAT).
    FatLabel[26] {
        /// 0x29 if the fields below exist.
        2 => signature: u8,
        /// The displayed serial number of the volume.
        3 => serial: u32,
        /// The label, padded with spaces.
        7 => label: [u8; 11],
        /// `FAT12   ` and the like, for people.
        18 => kind: [u8; 8],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_counts_of_fat_count_where_they_are_not_zero() {
        let mut sector = [0; 512];
        sector[19] = 9;
        sector[22] = 3;
        sector[32] = 7;
        sector[36] = 8;
        let boot = FatBoot::read(&sector).unwrap();
        assert_eq!((boot.sectors(), boot.table_sectors()), (9, 3));
        assert_eq!(boot.label_at(), 36);
        sector[19] = 0;
        sector[22] = 0;
        let boot = FatBoot::read(&sector).unwrap();
        assert_eq!((boot.sectors(), boot.table_sectors()), (7, 8));
        assert_eq!(boot.label_at(), 64);
        assert_eq!(FatBoot::read(&sector[..511]), None);
    }
}
