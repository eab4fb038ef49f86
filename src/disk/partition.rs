//! Reads GPT and MBR partition tables into a [`DiskLayout`].
//!
//! The tables are untrusted. One that does not fit the disk is refused, because the end of the disk
//! is missing ([`super::whole`]). Overlaps are accepted; chains and tables have limits. The crates
//! `gpt` and `mbrman` are not used for reading. The first asserts the entry size and allocates
//! whatever the header requests. The second rejects the whole table for one odd entry and follows a
//! chain of any length. The tests use them to verify the result.
//!
//! The sector size is not recorded anywhere. A GPT header is found at LBA 1 of the right one. With
//! an MBR, the size under which more partitions start with a boot sector is used, 512 in doubt.
//!
//! The tables themselves are in [`super::gpt`] and [`super::mbr`].

use std::io;

use super::bpb::FatBoot;
use super::layout::{DiskLayout, Partition, Scheme};
use super::length::Short;
use super::mbr::{self, Mbr, TYPE_PROTECTIVE};
use super::sector::{is_boot_sector, read_up_to};
use super::{gpt, whole};
use crate::block::BlockRead;

const SECTOR_SIZES: [u32; 2] = [512, 4096];
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    #[error("reading the partition table")]
    Io(#[from] io::Error),
    /// The MBR announces a GPT, but neither the primary nor the backup is usable.
    #[error("the GPT is damaged, and so is its backup")]
    DamagedGpt,
    #[error("the disk is cut short: {0}")]
    Short(Short),
}

impl LayoutError {
    /// Converts it into the error for the disk with that name.
    pub fn of(self, shown: impl std::fmt::Display) -> crate::error::Error {
        let hint = match self {
            Self::Io(_) => None,
            Self::DamagedGpt => Some("repair the table on a copy, e.g. with gdisk"),
            Self::Short(_) => Some(SHORT_HINT),
        };
        let error = crate::error::Error::failed(format!("reading the partitions of {shown}"));
        hint.into_iter()
            .fold(error.because(self), crate::error::Error::hint)
    }
}

/// The remedy for a disk whose end is missing.
pub const SHORT_HINT: &str = "copy or export the disk again and compare sizes and checksums; if nothing is missing, correct \
     the partition table on a copy (gdisk: v, w)";

/// Reads the partition table. Without a table and a file system the result is [`Scheme::None`] and
/// an empty list. A file system that starts at byte 0 is one partition with index 0.
pub fn read_layout(disk: &dyn BlockRead) -> Result<DiskLayout, LayoutError> {
    let mut layout = read_claimed(disk).map_err(|error| match error {
        LayoutError::DamagedGpt => match cut_gpt(disk) {
            Ok(Some(short)) => LayoutError::Short(short),
            _ => error,
        },
        other => other,
    })?;
    if let Some(short) = whole::check(disk, &layout)? {
        return Err(LayoutError::Short(short));
    }
    layout.partitions.retain_mut(|partition| {
        let clipped = clip(partition.start_bytes, partition.size_bytes, disk.size());
        partition.size_bytes = clipped.map_or(0, |(_, size)| size);
        clipped.is_some()
    });
    Ok(layout)
}

/// Reads the table unchanged, whether or not the disk is that long.
fn read_claimed(disk: &dyn BlockRead) -> Result<DiskLayout, LayoutError> {
    let sector = read_up_to(disk, 0, 512)?;
    let mbr = Mbr::parse(&sector);
    // A boot sector has the MBR's signature too, and text in place of the table.
    let protective = mbr.as_ref().is_some_and(Mbr::is_protective);
    if !protective && is_file_system(disk, &sector)? {
        return Ok(bare_file_system(disk, &sector));
    }
    let partitions_in_mbr = mbr.as_ref().is_some_and(|m| m.used().next().is_some());
    // Without the protective entry, a GPT header is a remainder of an older table.
    if protective || !partitions_in_mbr {
        for sector_size in SECTOR_SIZES {
            if let Some(layout) = gpt::read(disk, sector_size)? {
                return Ok(layout);
            }
        }
        if protective {
            return Err(LayoutError::DamagedGpt);
        }
    }
    match mbr {
        Some(mbr) => Ok(read_mbr(disk, &mbr)?),
        None => Ok(DiskLayout {
            scheme: Scheme::None,
            sector_size: 512,
            disk_id: None,
            partitions: Vec::new(),
        }),
    }
}

/// The size of a disk whose GPT has lost both copies. The protective entry of its MBR has it,
/// because it covers the whole disk. The sectors have 512 bytes, unless there are remains of a
/// header of the other size.
fn cut_gpt(disk: &dyn BlockRead) -> io::Result<Option<Short>> {
    let sector = read_up_to(disk, 0, 512)?;
    let has = disk.size();
    let Some(mbr) = Mbr::parse(&sector) else {
        return Ok(None);
    };
    let covered = mbr.entries.iter().find(|e| e.kind == TYPE_PROTECTIVE);
    let sector_size = match read_up_to(disk, 4096, 8)?.starts_with(&gpt::SIGNATURE) {
        true => 4096,
        false => 512,
    };
    let needs = covered.map_or(0, |e| {
        sector_size * (u64::from(e.start) + u64::from(e.sectors))
    });
    // More than 2 TiB do not fit into the entry.
    let known = covered.is_some_and(|e| e.sectors != u32::MAX);
    Ok((known && needs > has).then(|| Short {
        what: "the disk its MBR describes".into(),
        needs,
        has,
    }))
}

/// Clips a range to the disk; `None` if nothing of it is left.
fn clip(start: u64, size: u64, disk: u64) -> Option<(u64, u64)> {
    let size = size.min(disk.checked_sub(start)?);
    (size > 0).then_some((start, size))
}

// ---- File systems at byte 0 ----

fn is_file_system(disk: &dyn BlockRead, sector: &[u8]) -> io::Result<bool> {
    /// Signatures that other systems put on whole disks.
    const OTHERS: [(u64, &[u8]); 6] = [
        (0, b"XFSB"),
        (0, b"LUKS\xba\xbe"),
        (512, b"LABELONE"),
        (1080, b"\x53\xef"),
        (4086, b"SWAPSPACE2"),
        (0x1_0040, b"_BHRfS_M"),
    ];
    if is_boot_sector(sector) {
        return Ok(true);
    }
    // File systems that leave the first sector free do so for an MBR, which then counts.
    let has_mbr = sector.get(510..) == Some(&[0x55, 0xaa]);
    for (offset, magic) in OTHERS {
        if (offset == 0 || !has_mbr) && read_up_to(disk, offset, magic.len())? == magic {
            return Ok(true);
        }
    }
    Ok(false)
}

fn bare_file_system(disk: &dyn BlockRead, sector: &[u8]) -> DiskLayout {
    let sector_size = match FatBoot::read(sector).map(|boot| boot.bytes_per_sector) {
        Some(4096) if is_boot_sector(sector) => 4096,
        _ => 512,
    };
    DiskLayout {
        scheme: Scheme::None,
        sector_size,
        disk_id: None,
        partitions: vec![Partition {
            index: 0,
            type_id: "0x00".into(),
            start_bytes: 0,
            size_bytes: disk.size(),
            guid: None,
            name: None,
            active: false,
        }],
    }
}

fn read_mbr(disk: &dyn BlockRead, mbr: &Mbr) -> io::Result<DiskLayout> {
    let mut best: Option<(usize, u32, Vec<Partition>)> = None;
    for sector_size in SECTOR_SIZES {
        let partitions = mbr::partitions(disk, mbr, u64::from(sector_size))?;
        let mut plausible = 0;
        for partition in &partitions {
            let sector = read_up_to(disk, partition.start_bytes, 512)?;
            plausible += usize::from(is_boot_sector(&sector));
        }
        if best.as_ref().is_none_or(|(most, ..)| plausible > *most) {
            best = Some((plausible, sector_size, partitions));
        }
    }
    let (sector_size, partitions) = best.map_or((512, Vec::new()), |(_, size, p)| (size, p));
    Ok(DiskLayout {
        scheme: Scheme::Mbr,
        sector_size,
        disk_id: Some(format!("0x{:08x}", mbr.signature)),
        partitions,
    })
}

#[cfg(test)]
mod tests {
    use super::super::gpt::{crc32, partition};
    use super::super::mbr::MAX_LOGICAL;
    use super::super::testing::{have, run_input, text};
    use super::*;
    use crate::block::FileDisk;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::{Path, PathBuf};

    const MIB: u64 = 1 << 20;

    fn disk_file(folder: &Path, size: u64) -> PathBuf {
        let path = folder.join("disk.raw");
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    fn layout(path: &Path) -> Result<DiskLayout, LayoutError> {
        read_layout(&FileDisk::open(path).unwrap())
    }

    fn patch(path: &Path, offset: u64, data: &[u8]) {
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(data, offset).unwrap();
    }

    fn brief(layout: &DiskLayout) -> Vec<(u32, u64, u64)> {
        let p = layout.partitions.iter();
        p.map(|p| (p.index, p.start_bytes, p.size_bytes)).collect()
    }

    fn write_gpt(path: &Path, sector_size: u64) {
        let block = ::gpt::disk::LogicalBlockSize::try_from(sector_size).unwrap();
        let size = path.metadata().unwrap().len();
        let mut file = File::options().read(true).write(true).open(path).unwrap();
        let lbas = u32::try_from(size / sector_size - 1).unwrap();
        ::gpt::mbr::ProtectiveMBR::with_lb_size(lbas)
            .overwrite_lba0(&mut file)
            .unwrap();
        let mut disk = ::gpt::GptConfig::new()
            .writable(true)
            .logical_block_size(block)
            .create_from_device(file, None)
            .unwrap();
        disk.update_partitions(Default::default()).unwrap();
        disk.add_partition("EFI system", 8 * MIB, ::gpt::partition_types::EFI, 0, None)
            .unwrap();
        disk.add_partition(
            "Bäsic\u{7} data",
            16 * MIB,
            ::gpt::partition_types::BASIC,
            4,
            None,
        )
        .unwrap();
        disk.write().unwrap();
    }

    #[test]
    fn gpt_of_both_sector_sizes_and_its_backup() {
        let folder = tempfile::tempdir().unwrap();
        for sector_size in [512, 4096] {
            let path = disk_file(folder.path(), 64 * MIB);
            write_gpt(&path, sector_size);
            let good = layout(&path).unwrap();
            assert_eq!(
                (good.scheme, u64::from(good.sector_size)),
                (Scheme::Gpt, sector_size)
            );
            assert_eq!(good.partitions.len(), 2);
            let (esp, data) = (&good.partitions[0], &good.partitions[1]);
            assert_eq!(esp.type_id, super::super::layout::GPT_ESP);
            assert_eq!((esp.index, esp.size_bytes, esp.active), (1, 8 * MIB, false));
            assert_eq!(data.type_id, super::super::layout::GPT_BASIC_DATA);
            assert_eq!(
                (data.index, data.size_bytes, data.active),
                (2, 16 * MIB, true)
            );
            assert_eq!(data.name.as_deref(), Some("Bäsic data"));
            assert!(data.guid.as_ref().is_some_and(|g| g.len() == 36));
            assert_eq!(good.disk_id.as_ref().map(String::len), Some(36));

            // Header, entries, or the whole primary table destroyed: the backup has the same
            // contents.
            for (offset, len) in [
                (sector_size + 40, 1),
                (2 * sector_size + 32, 1),
                (sector_size, 20_480),
            ] {
                let path = disk_file(folder.path(), 64 * MIB);
                write_gpt(&path, sector_size);
                let before = layout(&path).unwrap();
                patch(&path, offset, &vec![0xaa; len]);
                assert_eq!(layout(&path).unwrap(), before, "{offset}");
            }
            // Both destroyed.
            let path = disk_file(folder.path(), 64 * MIB);
            write_gpt(&path, sector_size);
            patch(&path, sector_size, &[0xaa; 512]);
            patch(&path, 64 * MIB - sector_size, &[0xaa; 512]);
            assert!(matches!(layout(&path), Err(LayoutError::DamagedGpt)));
            // Enlarged, with damaged primary entries: the backup is where the header records it.
            let path = disk_file(folder.path(), 64 * MIB);
            write_gpt(&path, sector_size);
            let before = layout(&path).unwrap();
            File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(96 * MIB)
                .unwrap();
            patch(&path, 2 * sector_size + 32, &[0xaa]);
            assert_eq!(layout(&path).unwrap(), before);
        }
    }

    /// Rewrites the primary header with a right checksum.
    fn forge(path: &Path, change: impl Fn(&mut [u8])) {
        let mut header = vec![0; 512];
        let file = File::options().read(true).write(true).open(path).unwrap();
        file.read_exact_at(&mut header, 512).unwrap();
        change(&mut header);
        header[16..20].fill(0);
        let crc = crc32(&header[..92]);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        file.write_all_at(&header, 512).unwrap();
        // The backup must not help.
        file.write_all_at(&[0; 512], 64 * MIB - 512).unwrap();
    }

    #[test]
    fn hostile_gpt() {
        let folder = tempfile::tempdir().unwrap();
        type Change = fn(&mut [u8]);
        let changes: [Change; 6] = [
            |h| h[80..84].fill(0xff),
            |h| h[84..88].fill(0xff),
            |h| h[84..88].fill(0),
            |h| h[72..80].fill(0xff),
            |h| h[12..16].fill(0xff),
            |h| h[32..40].fill(0),
        ];
        for (i, change) in changes.iter().enumerate() {
            let path = disk_file(folder.path(), 64 * MIB);
            write_gpt(&path, 512);
            forge(&path, change);
            assert!(matches!(layout(&path), Err(LayoutError::DamagedGpt)), "{i}");
        }
        let mut entry = vec![0; 128];
        entry[0] = 1;
        for (first, last, want) in [
            (100, 200, Some((51_200, 101 * 512))),
            (200, 100, None),
            (u64::MAX, u64::MAX, Some((u64::MAX, 512))),
            (0, u64::MAX, None),
            (100, u64::MAX - 1, Some((51_200, u64::MAX))),
            (2048, 2049, Some((MIB, 1024))),
        ] {
            entry[32..40].copy_from_slice(&u64::to_le_bytes(first));
            entry[40..48].copy_from_slice(&u64::to_le_bytes(last));
            let got = partition(&entry, 1, 512).map(|p| (p.start_bytes, p.size_bytes));
            assert_eq!(got, want, "{first}-{last}");
        }
    }

    fn entry(kind: u8, start: u32, sectors: u32) -> [u8; 16] {
        let mut e = [0; 16];
        e[4] = kind;
        e[8..12].copy_from_slice(&start.to_le_bytes());
        e[12..].copy_from_slice(&sectors.to_le_bytes());
        e
    }

    fn table(path: &Path, offset: u64, entries: &[[u8; 16]]) {
        let mut data = entries.concat();
        data.resize(64, 0);
        data.extend([0x55, 0xaa]);
        patch(path, offset + 446, &data);
    }

    #[test]
    fn mbr_with_logical_partitions() {
        if !have(&["sfdisk"]) {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = disk_file(folder.path(), 256 * MIB);
        run_input(
            "sfdisk",
            &["-q", text(&path)],
            b"label: dos\nlabel-id: 0xdeadbeef\nsize=20M,type=7,bootable\nsize=10M,type=27\n\
              type=f\nsize=30M,type=7\nsize=40M,type=c\nsize=50M,type=83\n",
        );
        let got = layout(&path).unwrap();
        assert_eq!((got.scheme, got.sector_size), (Scheme::Mbr, 512));
        assert_eq!(got.disk_id.as_deref(), Some("0xdeadbeef"));
        // Read by another program.
        let other = mbrman::MBR::read_from(&mut File::open(&path).unwrap(), 512).unwrap();
        let want: Vec<_> = other
            .iter()
            .filter(|(_, p)| p.is_used() && !p.is_extended())
            .map(|(i, p)| {
                (
                    i as u32,
                    u64::from(p.starting_lba) * 512,
                    u64::from(p.sectors) * 512,
                )
            })
            .collect();
        assert_eq!(brief(&got), want);
        assert_eq!(got.partitions.len(), 5);
        let types: Vec<_> = got.partitions.iter().map(|p| &*p.type_id).collect();
        assert_eq!(types, ["0x07", "0x27", "0x07", "0x0c", "0x83"]);
        assert!(got.partitions[0].active && !got.partitions[1].active);
    }

    #[test]
    fn mbr_sector_size_follows_the_boot_sectors() {
        let folder = tempfile::tempdir().unwrap();
        let path = disk_file(folder.path(), 64 * MIB);
        table(&path, 0, &[entry(7, 256, 1024), entry(7, 2560, 4096)]);
        let got = layout(&path).unwrap();
        assert_eq!(
            (got.sector_size, got.partitions[0].start_bytes),
            (512, 256 * 512)
        );
        patch(&path, 256 * 4096, b"\xeb\x52\x90NTFS    ");
        let got = layout(&path).unwrap();
        assert_eq!(got.sector_size, 4096);
        assert_eq!(brief(&got), [(1, MIB, 4 * MIB), (2, 10 * MIB, 16 * MIB)]);
    }

    #[test]
    fn hostile_mbr() {
        let folder = tempfile::tempdir().unwrap();
        let path = disk_file(folder.path(), 8 * MIB);
        // A chain that returns to its start, one that refers to itself, entries outside.
        table(
            &path,
            0,
            &[
                entry(5, 64, 1000),
                entry(0, u32::MAX, u32::MAX),
                entry(7, 16_000, 384),
            ],
        );
        table(&path, 64 * 512, &[entry(7, 2, 10), entry(5, 100, 10)]);
        table(&path, 164 * 512, &[entry(7, 2, 10), entry(5, 0, 10)]);
        let got = layout(&path).unwrap();
        assert_eq!(
            brief(&got),
            [
                (3, 16_000 * 512, 384 * 512),
                (5, 66 * 512, 5120),
                (6, 166 * 512, 5120)
            ]
        );
        // A long chain is truncated.
        table(&path, 0, &[entry(5, 64, 16_000)]);
        for i in 0..1000 {
            table(
                &path,
                (64 + i) * 512,
                &[entry(7, 1, 1), entry(5, i as u32 + 1, 1)],
            );
        }
        assert_eq!(
            layout(&path).unwrap().partitions.len(),
            MAX_LOGICAL as usize
        );
        // A protective entry and no GPT.
        table(&path, 0, &[entry(0xee, 1, 1000)]);
        assert!(matches!(layout(&path), Err(LayoutError::DamagedGpt)));
        // Real partitions beside the remains of a GPT.
        let path = disk_file(folder.path(), 64 * MIB);
        write_gpt(&path, 512);
        table(&path, 0, &[entry(7, 2048, 2048)]);
        assert_eq!(layout(&path).unwrap().scheme, Scheme::Mbr);
        // A GPT whose MBR was wiped.
        patch(&path, 0, &[0; 512]);
        assert_eq!(layout(&path).unwrap().scheme, Scheme::Gpt);
    }

    #[test]
    fn no_table() {
        let folder = tempfile::tempdir().unwrap();
        for size in [100, 512, 4 * MIB] {
            let path = disk_file(folder.path(), size);
            let got = layout(&path).unwrap();
            assert_eq!((got.scheme, got.partitions.len()), (Scheme::None, 0));
        }
        let fat = {
            let mut s = vec![0u8; 512];
            s[..3].copy_from_slice(b"\xeb\x58\x90");
            s[11..14].copy_from_slice(&[0, 2, 8]);
            s[82..90].copy_from_slice(b"FAT32   ");
            s[446..510].fill(b'x');
            s[510..].copy_from_slice(&[0x55, 0xaa]);
            s
        };
        for (offset, magic) in [
            (0, &b"\xeb\x52\x90NTFS    "[..]),
            (0, b"\xeb\x58\x90-FVE-FS-"),
            (0, &fat),
            (0, b"XFSB"),
            (1080, b"\x53\xef"),
        ] {
            let path = disk_file(folder.path(), 4 * MIB);
            patch(&path, offset, magic);
            let got = layout(&path).unwrap();
            assert_eq!(
                (got.scheme, brief(&got)),
                (Scheme::None, vec![(0, 0, 4 * MIB)])
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(mut data in proptest::collection::vec(0u8.., 0..20_000), ext: bool) {
            if let Some(end) = data.get_mut(510..512) {
                end.copy_from_slice(&[0x55, 0xaa]);
            }
            if ext && let Some(kind) = data.get_mut(446..451) {
                (kind[0], kind[4]) = (0, 5);
            }
            let size = data.len() as u64;
            if let Ok(layout) = read_layout(&data) {
                for p in layout.partitions {
                    proptest::prop_assert!(p.start_bytes + p.size_bytes <= size);
                }
            }
        }
    }
}
