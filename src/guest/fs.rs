//! Determines the contents of a partition from its first bytes.
//!
//! A pure function from bytes to facts. Signatures follow the on-disk formats of the file systems
//! named below (NTFS and FAT boot sectors, `blkid`'s offsets for the Linux ones). LDM and Storage
//! Spaces cannot be detected from the contents, so the partition type decides there, and it comes
//! first. A dynamic disk often has a valid NTFS boot sector at the start of its partition. Writing
//! to it would still be wrong.

use super::FsKind;
use crate::bytes;
use crate::disk::bpb::{self, FatBoot, FatLabel, NtfsBoot};
use crate::disk::layout::{GPT_LDM_DATA, GPT_LDM_METADATA, GPT_STORAGE_SPACES, Partition};

/// The number of bytes at the start of a volume that [`identify`] reads: up to the btrfs
/// superblock.
pub const IDENTIFY_BYTES: usize = 0x1_0000 + 0x1000;

const MBR_LDM: &str = "0x42";
/// The GUID of BitLocker To Go (4967d63b-2e29-4ad8-8399-f6a339e3d001), whose boot sector otherwise
/// resembles FAT32.
const BITLOCKER_TO_GO: &[u8] = &[
    0x3b, 0xd6, 0x67, 0x49, 0x29, 0x2e, 0xd8, 0x4a, 0x83, 0x99, 0xf6, 0xa3, 0x39, 0xe3, 0xd0, 0x01,
];
const BITLOCKER_TO_GO_OFFSET: usize = 424;

/// The kind that follows from the partition type alone.
pub fn kind_of_type(partition: &Partition) -> Option<FsKind> {
    match partition.type_id.as_str() {
        MBR_LDM | GPT_LDM_DATA | GPT_LDM_METADATA => Some(FsKind::Ldm),
        GPT_STORAGE_SPACES => Some(FsKind::StorageSpaces),
        _ => None,
    }
}

/// The kind of a volume according to its first bytes ([`IDENTIFY_BYTES`], fewer on a small one).
pub fn identify(head: &[u8]) -> FsKind {
    let at = |offset: usize, magic: &[u8]| {
        head.get(offset..)
            .is_some_and(|rest| rest.starts_with(magic))
    };
    if at(3, b"-FVE-FS-") || at(BITLOCKER_TO_GO_OFFSET, BITLOCKER_TO_GO) {
        return FsKind::Bitlocker;
    }
    if at(3, b"NTFS    ") {
        return FsKind::Ntfs;
    }
    if at(3, b"EXFAT   ") {
        return FsKind::Exfat;
    }
    if at(3, b"ReFS\0\0\0\0") {
        return FsKind::Refs;
    }
    if at(0, b"LUKS\xba\xbe") {
        return FsKind::Luks;
    }
    if (0..4).any(|sector| at(sector * 512, b"LABELONE") && at(sector * 512 + 24, b"LVM2 001")) {
        return FsKind::Lvm;
    }
    if at(0, b"XFSB") {
        return FsKind::Xfs;
    }
    if at(0x1_0040, b"_BHRfS_M") {
        return FsKind::Btrfs;
    }
    // The signature is at the end of the first page, and pages may be larger than 4 KiB.
    if [4096, 8192, 16384, 65536]
        .iter()
        .any(|page| at(page - 10, b"SWAPSPACE2") || at(page - 10, b"SWAP-SPACE"))
    {
        return FsKind::Swap;
    }
    // Last, because a two-byte magic is weak and a Linux file system may leave an old boot sector.
    if at(1080, &[0x53, 0xef]) {
        return FsKind::Ext;
    }
    if fat(head).is_some() {
        return FsKind::Fat;
    }
    FsKind::Unknown
}

/// The width of a FAT, by the Microsoft rule: the number of clusters alone decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FatWidth {
    Fat12,
    Fat16,
    Fat32,
}

/// Facts of a FAT boot sector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FatFacts {
    pub width: FatWidth,
    pub bytes_per_sector: u32,
    pub cluster_size: u32,
    pub hidden_sectors: u32,
    pub serial: u32,
    /// The label in the boot sector; the one in the root directory is newer.
    pub label: Option<String>,
}

/// Facts of an NTFS boot sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NtfsFacts {
    pub bytes_per_sector: u32,
    pub cluster_size: u32,
    /// The LBA of the volume for the boot code.
    pub hidden_sectors: u32,
    pub total_sectors: u64,
    pub mft_lcn: u64,
    pub record_size: u32,
    pub serial: u64,
}

const MAX_CLUSTER: u32 = 2 << 20;
const MAX_RECORD: u32 = 64 << 10;

/// Parses an NTFS boot sector; the error names the field that is out of its range.
pub fn ntfs(head: &[u8]) -> Result<NtfsFacts, &'static str> {
    let boot = NtfsBoot::read(head).ok_or("the boot sector is cut off")?;
    if boot.oem_id != *b"NTFS    " {
        return Err("the boot sector is not marked as NTFS");
    }
    let bytes_per_sector = u32::from(boot.bytes_per_sector);
    if !bytes_per_sector.is_power_of_two() || !(256..=4096).contains(&bytes_per_sector) {
        return Err("the sector size in the boot sector is invalid");
    }
    // 1..=128 sectors; above that a negative power of two (clusters of 128 KiB and more).
    let sectors_per_cluster = match boot.sectors_per_cluster {
        n @ 1..=128 if n.is_power_of_two() => u32::from(n),
        n @ 0xe1..=0xff => 1 << n.wrapping_neg(),
        _ => return Err("the cluster size in the boot sector is invalid"),
    };
    let cluster_size = bytes_per_sector
        .checked_mul(sectors_per_cluster)
        .filter(|size| *size <= MAX_CLUSTER)
        .ok_or("the cluster size in the boot sector is invalid")?;
    let record_size = match boot.clusters_per_record as i8 {
        n @ 1.. => cluster_size.checked_mul(n as u32),
        n @ -16..=-9 => Some(1 << n.unsigned_abs()),
        _ => None,
    }
    .filter(|size| size.is_power_of_two() && (512..=MAX_RECORD).contains(size))
    .ok_or("the MFT record size in the boot sector is invalid")?;
    let total_sectors = boot.total_sectors;
    if total_sectors == 0 || total_sectors > u64::MAX / u64::from(bytes_per_sector) {
        return Err("the volume size in the boot sector is invalid");
    }
    Ok(NtfsFacts {
        bytes_per_sector,
        cluster_size,
        hidden_sectors: boot.hidden_sectors,
        total_sectors,
        mft_lcn: boot.mft_lcn,
        record_size,
        serial: boot.serial,
    })
}

/// Parses a FAT boot sector; `None` if it is not plausible.
pub fn fat(head: &[u8]) -> Option<FatFacts> {
    let boot = FatBoot::read(head)?;
    let bytes_per_sector = u32::from(boot.bytes_per_sector);
    let per_cluster = u32::from(boot.sectors_per_cluster);
    let reserved = u32::from(boot.reserved_sectors);
    let fats = u32::from(boot.tables);
    let credible = boot.magic == bpb::MAGIC
        && matches!(boot.jump, 0xeb | 0xe9)
        && bytes_per_sector.is_power_of_two()
        && (512..=4096).contains(&bytes_per_sector)
        && per_cluster.is_power_of_two()
        && reserved > 0
        && (1..=2).contains(&fats)
        && (boot.driver_source == 0xf0 || boot.driver_source >= 0xf8);
    if !credible {
        return None;
    }
    let root_sectors = (u32::from(boot.root_entries) * 32).div_ceil(bytes_per_sector);
    let data = fats
        .checked_mul(boot.table_sectors())?
        .checked_add(reserved + root_sectors)
        .and_then(|meta| boot.sectors().checked_sub(meta))?;
    let width = match data / per_cluster {
        0..=4084 => FatWidth::Fat12,
        4085..=65524 => FatWidth::Fat16,
        _ => FatWidth::Fat32,
    };
    let described = FatLabel::read(head.get(boot.label_at()..)?)?;
    let label = String::from_utf8_lossy(&described.label)
        .chars()
        .filter(|c| !c.is_control() && *c != char::REPLACEMENT_CHARACTER)
        .collect::<String>();
    let label = label.trim().to_string();
    let is_described = described.signature == 0x29;
    Some(FatFacts {
        width,
        bytes_per_sector,
        cluster_size: bytes_per_sector * per_cluster,
        hidden_sectors: boot.hidden_sectors,
        serial: if is_described { described.serial } else { 0 },
        label: (is_described && !label.is_empty() && label != "NO NAME").then_some(label),
    })
}

/// Little-endian reads for parsers that have already checked the length; 0 for missing bytes.
pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    bytes::le16(bytes, at).unwrap_or_default()
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes::le32(bytes, at).unwrap_or_default()
}

pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes::le64(bytes, at).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(magics: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; IDENTIFY_BYTES];
        for (offset, magic) in magics {
            head[*offset..offset + magic.len()].copy_from_slice(magic);
        }
        head
    }

    #[test]
    fn signatures() {
        type Case = (&'static [(usize, &'static [u8])], FsKind);
        let cases: &[Case] = &[
            (&[(3, b"NTFS    ")], FsKind::Ntfs),
            (&[(3, b"-FVE-FS-")], FsKind::Bitlocker),
            (
                &[(3, b"MSWIN4.1"), (424, BITLOCKER_TO_GO)],
                FsKind::Bitlocker,
            ),
            (&[(3, b"EXFAT   ")], FsKind::Exfat),
            (&[(3, b"ReFS\0\0\0\0")], FsKind::Refs),
            (&[(0, b"LUKS\xba\xbe\0\x02")], FsKind::Luks),
            (&[(512, b"LABELONE"), (536, b"LVM2 001")], FsKind::Lvm),
            (&[(0, b"XFSB")], FsKind::Xfs),
            (&[(0x10040, b"_BHRfS_M")], FsKind::Btrfs),
            (&[(4086, b"SWAPSPACE2")], FsKind::Swap),
            (&[(1080, &[0x53, 0xef])], FsKind::Ext),
            (&[], FsKind::Unknown),
            (&[(510, &[0x55, 0xaa])], FsKind::Unknown),
        ];
        for (magics, kind) in cases {
            assert_eq!(identify(&head(magics)), *kind, "{magics:?}");
        }
        assert_eq!(identify(&[]), FsKind::Unknown);
        assert_eq!(identify(b"\xeb\x52\x90NTFS    "), FsKind::Ntfs);
    }

    #[test]
    fn partition_types() {
        let mut partition = Partition {
            index: 1,
            type_id: "0x42".into(),
            start_bytes: 0,
            size_bytes: 0,
            guid: None,
            name: None,
            active: false,
        };
        assert_eq!(kind_of_type(&partition), Some(FsKind::Ldm));
        partition.type_id = GPT_STORAGE_SPACES.into();
        assert_eq!(kind_of_type(&partition), Some(FsKind::StorageSpaces));
        partition.type_id = "0x07".into();
        assert_eq!(kind_of_type(&partition), None);
    }

    #[test]
    fn ntfs_boot_sector_ranges() {
        let mut boot = head(&[(3, b"NTFS    ")]);
        boot[11..13].copy_from_slice(&512u16.to_le_bytes());
        boot[13] = 8;
        boot[28..32].copy_from_slice(&2048u32.to_le_bytes());
        boot[40..48].copy_from_slice(&20480u64.to_le_bytes());
        boot[48..56].copy_from_slice(&4u64.to_le_bytes());
        boot[64] = 0xf6;
        let facts = ntfs(&boot).unwrap();
        assert_eq!((facts.cluster_size, facts.record_size), (4096, 1024));
        assert_eq!(facts.hidden_sectors, 2048);

        // sector size, sectors per cluster, record size -> cluster size
        let cases = [
            (512, 0xf4, 0xf6, Some(2 << 20)),
            (512, 0xf8, 0xf6, Some(128 << 10)),
            (4096, 1, 0xf4, Some(4096)),
            (512, 3, 0xf6, None),
            (512, 0, 0xf6, None),
            (512, 0xf3, 0xf6, None),
            (512, 0xe1, 0xf6, None),
            (513, 8, 0xf6, None),
            (512, 8, 0x80, None),
            (512, 8, 0x7f, None),
        ];
        for (sector, per_cluster, record, expected) in cases {
            boot[11..13].copy_from_slice(&(sector as u16).to_le_bytes());
            boot[13] = per_cluster;
            boot[64] = record;
            let got = ntfs(&boot).ok().map(|f| f.cluster_size);
            assert_eq!(got, expected, "{sector} {per_cluster:#x} {record:#x}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..1200)) {
            let _ = (identify(&bytes), ntfs(&bytes).is_ok(), fat(&bytes));
        }
    }
}
