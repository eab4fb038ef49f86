//! Disks and images whose end is missing: every format, truncated at every kind of place.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::Image;
use super::detect::{Format, VmdkExtent};
use super::error::ImageError;
use super::layout;
use super::length::{self, Short};
use super::partition::{LayoutError, read_layout};
use super::testing::{have, pattern, run, text, write};
use crate::block::FileDisk;
use crate::error::{Error, ErrorKind};

const MIB: u64 = 1 << 20;

/// The error has both numbers, and exit code 1.
fn short(path: &Path) -> Short {
    match Image::open_info(path, None, &[]) {
        Err(ImageError::Short { path, short, table }) => {
            let error = Error::from(ImageError::Short {
                path,
                short: short.clone(),
                table,
            });
            assert_eq!(error.kind, ErrorKind::Failed);
            for number in [short.needs, short.has] {
                assert!(error.message.contains(&number.to_string()), "{error}");
            }
            assert!(error.hints[0].contains("copy or export the disk again"));
            short
        }
        other => panic!("{}: {other:?}", path.display()),
    }
}

#[test]
fn every_format_cut_anywhere() {
    if !have(&["qemu-img"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let raw = write(folder.path(), "raw.img", &pattern(6 << 20));
    let cases: [(&str, &str, &str); 14] = [
        ("m.vmdk", "vmdk", "subformat=monolithicSparse"),
        ("s.vmdk", "vmdk", "subformat=streamOptimized"),
        ("q.qcow2", "qcow2", "cluster_size=65536"),
        ("small.qcow2", "qcow2", "cluster_size=512"),
        ("sub.qcow2", "qcow2", "extended_l2=on,cluster_size=65536"),
        ("old.qcow2", "qcow2", "compat=0.10"),
        ("q.qcow", "qcow", ""),
        ("q.qed", "qed", ""),
        ("d.vhdx", "vhdx", "block_size=1048576"),
        ("fixed.vhdx", "vhdx", "subformat=fixed,block_size=1048576"),
        ("d.vdi", "vdi", ""),
        ("d.vhd", "vpc", "force_size=on"),
        ("fixed.vhd", "vpc", "force_size=on,subformat=fixed"),
        ("p.hds", "parallels", ""),
    ];
    for (name, format, options) in cases {
        let path = folder.path().join(name);
        let target = format!("file:{}", text(&path));
        let mut args = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([text(&raw), &target]);
        run("qemu-img", &args);
        Image::open_info(&path, None, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
        let whole = path.metadata().unwrap().len();
        for cut in [
            whole - 1,
            whole - 512,
            whole - 4096,
            whole / 2,
            whole / 3,
            70_000,
        ] {
            // QEMU leaves room for a whole grain behind compressed data.
            if name == "s.vmdk" && cut > whole / 2 {
                continue;
            }
            File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(cut)
                .unwrap();
            let short = short(&path);
            assert_eq!(short.has, cut, "{name}");
            assert!(short.needs > cut, "{name}: {short}");
        }
    }
}

#[test]
fn what_need_not_be_there_is_not_missed() {
    if !have(&["qemu-img"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    // An odd size: the last cluster, grain and block are not full.
    let raw = write(folder.path(), "raw.img", &pattern((3 << 20) + 512));
    for (name, format, options) in [
        ("c.qcow2", "qcow2", &["-c"][..]),
        ("z.qcow2", "qcow2", &["-c", "-o", "compression_type=zstd"]),
        ("q.qcow2", "qcow2", &[]),
        ("meta.qcow2", "qcow2", &["-o", "preallocation=metadata"]),
        ("m.vmdk", "vmdk", &[]),
        ("s.vmdk", "vmdk", &["-o", "subformat=streamOptimized"]),
        ("d.vhdx", "vhdx", &[]),
        ("d.vdi", "vdi", &[]),
        ("d.vhd", "vpc", &["-o", "force_size=on"]),
        ("q.qed", "qed", &[]),
        ("p.hds", "parallels", &[]),
    ] {
        let path = folder.path().join(name);
        let target = format!("file:{}", text(&path));
        let mut args = vec!["convert", "-f", "raw", "-O", format];
        args.extend_from_slice(options);
        args.extend([text(&raw), &target]);
        run("qemu-img", &args);
        let image = Image::open_info(&path, None, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
        image.check().unwrap_or_else(|e| panic!("{name}: {e}"));
        // It has no data at all.
        let empty = folder.path().join(format!("empty-{name}"));
        run(
            "qemu-img",
            &["create", "-q", "-f", format, text(&empty), "100M"],
        );
        Image::open_info(&empty, None, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

fn flat(folder: &Path, sectors: u64, offset: u64) -> PathBuf {
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n\
         createType=\"monolithicFlat\"\n\nRW {sectors} FLAT \"cut-flat.vmdk\" {offset}\n\n\
         ddb.adapterType = \"lsilogic\"\n"
    );
    write(folder, "cut.vmdk", text.as_bytes())
}

#[test]
fn a_flat_extent_is_as_long_as_its_descriptor_says() {
    if !have(&["qemu-img"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let extent = File::create(folder.path().join("cut-flat.vmdk")).unwrap();
    let path = flat(folder.path(), 4_194_304, 0);
    for length in [0, 1, 2_147_483_647, 2_147_483_136, MIB] {
        extent.set_len(length).unwrap();
        let short = short(&path);
        assert_eq!((short.needs, short.has), (2_147_483_648, length));
    }
    for length in [2_147_483_648, 2_147_483_649, 3 << 30] {
        extent.set_len(length).unwrap();
        Image::open_info(&path, None, &[]).unwrap();
    }
    // It begins behind the start of the file.
    extent.set_len(2 * MIB).unwrap();
    let path = flat(folder.path(), 2048, 2049);
    let short = short(&path);
    assert_eq!((short.needs, short.has), (2 * MIB + 512, 2 * MIB));
    Image::open_info(&flat(folder.path(), 2048, 2048), None, &[]).unwrap();
}

#[test]
fn split_extents_and_data_files() {
    if !have(&["qemu-img"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let raw = write(folder.path(), "raw.img", &pattern(6 << 20));
    let path = |name: &str| folder.path().join(name);
    let convert = |target: &str, options: &str| {
        let (raw, target) = (text(&raw).to_owned(), path(target));
        let format = if text(&target).ends_with("vmdk") {
            "vmdk"
        } else {
            "qcow2"
        };
        run(
            "qemu-img",
            &[
                "convert",
                "-f",
                "raw",
                "-O",
                format,
                "-o",
                options,
                &raw,
                text(&target),
            ],
        );
    };
    let data = path("data.raw");
    convert("split.vmdk", "subformat=twoGbMaxExtentSparse");
    convert("d.qcow2", &format!("data_file={}", text(&data)));
    for (image, part) in [("split.vmdk", "split-s001.vmdk"), ("d.qcow2", "data.raw")] {
        Image::open_info(&path(image), None, &[]).unwrap();
        let part = path(part);
        let whole = part.metadata().unwrap().len();
        for cut in [whole - 512, whole / 2] {
            let file = File::options().write(true).open(&part).unwrap();
            file.set_len(cut).unwrap();
            assert_eq!(short(&path(image)).has, cut, "{image}");
        }
    }
}

/// Handwritten: QEMU reads these two formats of ESX but writes neither.
#[test]
fn extents_of_esx() {
    let folder = TempDir::new().unwrap();
    let extent = |kind: &str| VmdkExtent {
        access: "RW".into(),
        kind: kind.into(),
        sectors: 1 << 20,
        offset: None,
        name: Vec::new(),
    };
    let put = |file: &File, at: u64, bytes: &[u8]| file.write_all_at(bytes, at).unwrap();
    let path = folder.path().join("x");
    let new = || {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap()
    };
    let found = |file: &File, kind: &str| {
        let size = file.metadata().unwrap().len();
        length::extent(file, size, &extent(kind)).unwrap()
    };
    // COWD: a directory in sector 4, a table in sector 8, grains of one sector from 40.
    let file = new();
    put(&file, 0, b"COWD");
    for (at, value) in [(12, 1 << 20), (16, 1), (20, 4), (24, 256u32)] {
        put(&file, at, &value.to_le_bytes());
    }
    put(&file, 4 * 512, &8u32.to_le_bytes());
    put(&file, 8 * 512 + 400, &41u32.to_le_bytes());
    file.set_len(42 * 512).unwrap();
    assert_eq!(found(&file, "VMFSSPARSE"), None);
    file.set_len(42 * 512 - 1).unwrap();
    let short = found(&file, "vmfssparse").unwrap();
    assert_eq!((short.needs, short.has), (42 * 512, 42 * 512 - 1));

    // seSparse: grains of 8 sectors, tables of 64; the directory at 16, tables at 32, grains at 1024.
    let file = new();
    let fields = [
        (0, 0xcafe_babe),
        (2, 1 << 20),
        (3, 8),
        (4, 64),
        (16, 16),
        (17, 8),
        (18, 32),
        (19, 64),
        (24, 1024),
        (25, 4096u64),
    ];
    for (n, value) in fields {
        put(&file, 8 * n, &value.to_le_bytes());
    }
    put(&file, 16 * 512, &0x1000_0000_0000_0000u64.to_le_bytes());
    // Grain 3, whose upper bits come first in the entry.
    put(
        &file,
        32 * 512 + 80,
        &0x3003_0000_0000_0000u64.to_le_bytes(),
    );
    let end = (1024 + 4 * 8) * 512;
    file.set_len(end).unwrap();
    assert_eq!(found(&file, "SESPARSE"), None);
    file.set_len(end - 1).unwrap();
    assert_eq!(found(&file, "SESPARSE").unwrap().needs, end);
}

// ---- what is on the disk ----

fn raw(folder: &Path, size: u64) -> (PathBuf, File) {
    let path = folder.join("disk.raw");
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    file.set_len(size).unwrap();
    (path, file)
}

fn layout_short(file: &File) -> Option<Short> {
    let disk = FileDisk::from_file(file.try_clone().unwrap()).unwrap();
    match read_layout(&disk) {
        Ok(_) => None,
        Err(LayoutError::Short(short)) => Some(short),
        Err(other) => panic!("{other}"),
    }
}

fn gpt(path: &Path, sector_size: u64, last_partition: u64) {
    gpt_of(path, sector_size, last_partition, BASIC);
}

const BASIC: &str = layout::GPT_BASIC_DATA;

fn gpt_of(path: &Path, sector_size: u64, last_partition: u64, kind: &str) {
    let block = gpt::disk::LogicalBlockSize::try_from(sector_size).unwrap();
    let size = path.metadata().unwrap().len();
    let mut file = File::options().read(true).write(true).open(path).unwrap();
    let lbas = u32::try_from(size / sector_size - 1).unwrap();
    gpt::mbr::ProtectiveMBR::with_lb_size(lbas)
        .overwrite_lba0(&mut file)
        .unwrap();
    let mut disk = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(block)
        .create_from_device(file, None)
        .unwrap();
    disk.update_partitions(Default::default()).unwrap();
    disk.add_partition("a", 8 * MIB, gpt::partition_types::EFI, 0, None)
        .unwrap();
    let kind = gpt::partition_types::Type {
        guid: kind.parse().unwrap(),
        os: gpt::partition_types::OperatingSystem::None,
    };
    disk.add_partition("b", last_partition, kind, 0, None)
        .unwrap();
    disk.write().unwrap();
}

#[test]
fn a_gpt_is_whole_up_to_its_backup() {
    let folder = TempDir::new().unwrap();
    for sector_size in [512, 4096] {
        let size = 64 * MIB;
        let (path, file) = raw(folder.path(), size);
        gpt(&path, sector_size, 16 * MIB);
        // Exactly as long as its table, and enlarged.
        assert_eq!(layout_short(&file), None);
        file.set_len(96 * MIB).unwrap();
        assert_eq!(layout_short(&file), None);
        for (cut, needs) in [
            (size - 1, size),
            (size - sector_size, size),
            (size - 33 * sector_size, size),
            (30 * MIB, size),
        ] {
            file.set_len(cut).unwrap();
            let short = short(&path);
            assert_eq!((short.needs, short.has), (needs, cut), "{short}");
            // Extended to its old length, so that the end is zeroes.
            file.set_len(size).unwrap();
            if cut > size - sector_size {
                assert_eq!(layout_short(&file), None, "of the header no byte was lost");
                continue;
            }
            let found = layout_short(&file).unwrap();
            assert!(
                found
                    .what
                    .contains(&format!("at byte {}", size - sector_size))
            );
            assert_eq!((found.needs, found.has), (size, size));
            let (path, _) = raw(folder.path(), size);
            gpt(&path, sector_size, 16 * MIB);
        }
        // In the middle of a partition: the partition ends too late.
        file.set_len(20 * MIB).unwrap();
        let found = layout_short(&file).unwrap();
        assert!(found.what.starts_with("partition 2"), "{found}");
        assert!(found.needs > 24 * MIB && found.has == 20 * MIB, "{found}");
        // Neither copy of the table is sound: the MBR has the length.
        file.write_all_at(&[0xaa; 4], sector_size + 16).unwrap();
        let found = layout_short(&file).unwrap();
        assert_eq!((found.needs, found.has), (size, 20 * MIB));
    }
}

/// kind, first sector, sectors
fn mbr(file: &File, at: u64, entries: &[(u8, u32, u32)]) {
    let mut sector = [0; 512];
    for (i, (kind, start, sectors)) in entries.iter().enumerate() {
        let entry = &mut sector[446 + 16 * i..462 + 16 * i];
        entry[4] = *kind;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..16].copy_from_slice(&sectors.to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&sector, at).unwrap();
}

fn ntfs_boot(file: &File, at: u64, sectors: u64) {
    let mut sector = [0; 512];
    sector[..11].copy_from_slice(b"\xeb\x52\x90NTFS    ");
    sector[11..14].copy_from_slice(&[0, 2, 8]);
    sector[40..48].copy_from_slice(&sectors.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&sector, at).unwrap();
}

#[test]
fn an_mbr_fits_its_disk() {
    let folder = TempDir::new().unwrap();
    let (path, file) = raw(folder.path(), 16 * MIB);
    let last = (16 * MIB / 512) as u32;
    // To the last sector, and one or many further.
    mbr(&file, 0, &[(7, 2048, last - 2048)]);
    assert_eq!(layout_short(&file), None);
    for further in [1, 100_000] {
        mbr(&file, 0, &[(7, 2048, last - 2048 + further)]);
        let found = short(&path);
        let needs = 16 * MIB + 512 * u64::from(further);
        assert_eq!((found.needs, found.has), (needs, 16 * MIB));
        assert!(found.what.contains("partition 1"), "{found}");
    }
    // Not even its start exists.
    mbr(&file, 0, &[(7, last + 8, 100)]);
    assert!(short(&path).needs > 16 * MIB);
    // Rounded up to a cylinder, with a file system in it that ends in time, and one that does not.
    mbr(&file, 0, &[(7, 2048, last - 2048 + 5000)]);
    ntfs_boot(&file, MIB, u64::from(last) - 2048 - 1);
    assert_eq!(layout_short(&file), None);
    ntfs_boot(&file, MIB, u64::from(last) - 2048 + 4999);
    assert_eq!(short(&path).needs, 512 * u64::from(last + 5000));
    // The partition ends in time, and its file system does not.
    mbr(&file, 0, &[(7, 2048, last - 2048)]);
    let found = short(&path);
    assert!(found.what.contains("NTFS file system of partition 1"));
    mbr(&file, MIB, &[]);
    // A logical partition, an extended one, and a chain that leads outside.
    for (extended, logical) in [
        ((5, 8192, last - 8192), (7, 64, last)),
        ((5, 8192, last + 20_000), (7, 64, 64)),
        ((15, last, 100), (7, 64, 64)),
    ] {
        mbr(&file, 0, &[extended]);
        mbr(&file, 8192 * 512, &[logical]);
        assert!(short(&path).needs > 16 * MIB, "{extended:?}");
    }
    mbr(&file, 0, &[(5, 8192, last - 8192)]);
    mbr(&file, 8192 * 512, &[(7, 64, 64)]);
    assert_eq!(layout_short(&file), None);
    // The last sector is incomplete.
    let (path, file) = raw(folder.path(), 16 * MIB - 100);
    mbr(&file, 0, &[(7, 2048, last - 2048)]);
    assert_eq!(short(&path).has, 16 * MIB - 100);
}

#[test]
fn file_systems_that_end_too_late() {
    let folder = TempDir::new().unwrap();
    let size = 16 * MIB;
    let sectors = size / 512;
    type Writer = fn(&File, u64);
    let put = |file: &File, at: u64, bytes: &[u8]| file.write_all_at(bytes, at).unwrap();
    let kinds: [(&str, Writer); 9] = [
        ("NTFS", |f, sectors| ntfs_boot(f, 0, sectors)),
        ("FAT", |f, sectors| {
            let mut s = [0; 512];
            s[..3].copy_from_slice(b"\xeb\x58\x90");
            s[11..14].copy_from_slice(&[0, 2, 8]);
            s[32..36].copy_from_slice(&(sectors as u32).to_le_bytes());
            s[82..90].copy_from_slice(b"FAT32   ");
            f.write_all_at(&s, 0).unwrap();
        }),
        ("exFAT", |f, sectors| {
            let mut s = [0; 512];
            s[3..11].copy_from_slice(b"EXFAT   ");
            s[72..80].copy_from_slice(&sectors.to_le_bytes());
            s[108] = 9;
            f.write_all_at(&s, 0).unwrap();
        }),
        ("ReFS", |f, sectors| {
            let mut s = [0; 512];
            s[3..11].copy_from_slice(b"ReFS\0\0\0\0");
            s[24..32].copy_from_slice(&sectors.to_le_bytes());
            s[32..36].copy_from_slice(&512u32.to_le_bytes());
            f.write_all_at(&s, 0).unwrap();
        }),
        ("BitLocker", |f, sectors| {
            let mut s = [0; 512];
            s[3..11].copy_from_slice(b"-FVE-FS-");
            s[176..184].copy_from_slice(&8192u64.to_le_bytes());
            f.write_all_at(&s, 0).unwrap();
            let mut block = [0; 64];
            block[..8].copy_from_slice(b"-FVE-FS-");
            block[10] = 2;
            block[16..24].copy_from_slice(&(sectors * 512).to_le_bytes());
            f.write_all_at(&block, 8192).unwrap();
        }),
        ("ext", |f, sectors| {
            f.write_all_at(b"\x53\xef", 1024 + 56).unwrap();
            f.write_all_at(&2u32.to_le_bytes(), 1024 + 24).unwrap();
            let blocks = sectors.div_ceil(8) as u32;
            f.write_all_at(&blocks.to_le_bytes(), 1024 + 4).unwrap();
        }),
        ("XFS", |f, sectors| {
            f.write_all_at(b"XFSB", 0).unwrap();
            f.write_all_at(&4096u32.to_be_bytes(), 4).unwrap();
            f.write_all_at(&sectors.div_ceil(8).to_be_bytes(), 8)
                .unwrap();
        }),
        ("btrfs", |f, sectors| {
            f.write_all_at(b"_BHRfS_M", 0x1_0040).unwrap();
            f.write_all_at(&(sectors * 512).to_le_bytes(), 0x1_0000 + 209)
                .unwrap();
        }),
        ("LVM", |f, sectors| {
            f.write_all_at(b"LABELONE", 512).unwrap();
            f.write_all_at(&32u32.to_le_bytes(), 512 + 20).unwrap();
            f.write_all_at(&(sectors * 512).to_le_bytes(), 512 + 64)
                .unwrap();
        }),
    ];
    for (name, writer) in kinds {
        let (_, file) = raw(folder.path(), size);
        writer(&file, sectors);
        assert_eq!(layout_short(&file), None, "{name}");
        let (_, file) = raw(folder.path(), size);
        writer(&file, sectors - 8);
        assert_eq!(layout_short(&file), None, "{name}: smaller than its disk");
        writer(&file, sectors + 8);
        let found = layout_short(&file).unwrap_or_else(|| panic!("{name}"));
        assert!(found.what.contains(name), "{found}");
        assert_eq!((found.needs, found.has), (size + 4096, size), "{name}");
    }
    // Old contents are not a file system of the reserved partition.
    let (path, file) = raw(folder.path(), size);
    put(&file, 0, &[0; 512]);
    gpt(&path, 512, MIB);
    Image::open_info(&path, None, &[]).unwrap();
}

/// A boot sector of a volume that continues elsewhere, in a partition of that type.
#[test]
fn volumes_that_span_disks_are_longer_than_their_parts() {
    let folder = TempDir::new().unwrap();
    let (path, file) = raw(folder.path(), 64 * MIB);
    let sectors = (64 * MIB / 512) as u32;
    for (kind, fits) in [(0x07, false), (0x42, true), (0xfd, true)] {
        mbr(&file, 0, &[(kind, 2048, sectors - 2048)]);
        ntfs_boot(&file, MIB, 20 << 21);
        assert_eq!(layout_short(&file).is_none(), fits, "{kind:#x}");
        // The part itself is on the disk.
        mbr(&file, 0, &[(kind, 2048, sectors)]);
        assert!(layout_short(&file).is_some(), "{kind:#x}");
    }
    for (kind, fits) in [
        (BASIC, false),
        (layout::GPT_LDM_DATA, true),
        (layout::GPT_LDM_METADATA, true),
    ] {
        file.set_len(0).unwrap();
        file.set_len(64 * MIB).unwrap();
        gpt_of(&path, 512, 40 * MIB, kind);
        let disk = FileDisk::from_file(file.try_clone().unwrap()).unwrap();
        let table = read_layout(&disk).unwrap();
        let start = table.partitions.last().unwrap().start_bytes;
        ntfs_boot(&file, start, 20 << 21);
        assert_eq!(layout_short(&file).is_none(), fits, "{kind}");
    }
}

/// Missing data is not read, even for the count in a table.
#[test]
fn a_vhdx_that_ends_in_its_tables() {
    let folder = TempDir::new().unwrap();
    let (_, file) = raw(folder.path(), 4 * MIB);
    let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).unwrap();
    let id = |text: &str| uuid::Uuid::parse_str(text).unwrap().to_bytes_le();
    put(0, b"vhdxfile");
    put(192 << 10, b"regi");
    put((192 << 10) + 8, &1u32.to_le_bytes());
    put(
        (192 << 10) + 16,
        &id("8b7ca206-4790-4b9a-b8fe-575f050f886e"),
    );
    put((192 << 10) + 32, &(2 * MIB).to_le_bytes());
    put((192 << 10) + 40, &(MIB as u32).to_le_bytes());
    put(2 * MIB, b"metadata\0\0\x01\0");
    for cut in (0..=64).rev() {
        let size = 2 * MIB + cut;
        file.set_len(size).unwrap();
        let items = length::vhdx_metadata(&file, size).unwrap();
        assert_eq!(items.len(), usize::from(cut == 64), "{cut}");
    }
}

#[test]
fn a_stream_without_an_end_is_not_walked_through() {
    let folder = TempDir::new().unwrap();
    let (_, file) = raw(folder.path(), 4 << 30);
    let mut head = vec![0; 512];
    head[..4].copy_from_slice(b"KDMV");
    head[56..64].fill(0xff);
    file.write_all_at(&head, 0).unwrap();
    let start = std::time::Instant::now();
    let short = length::image(&file, 4 << 30, Format::VMDK)
        .unwrap()
        .unwrap();
    assert_eq!((short.needs, short.has), ((4 << 30) + 1536, 4 << 30));
    assert!(start.elapsed().as_secs() < 3, "{:?}", start.elapsed());
}

/// 25 times as many as the largest disk can need.
#[test]
fn first_tables_that_no_disk_has_are_not_read() {
    let folder = TempDir::new().unwrap();
    let (_, file) = raw(folder.path(), MIB);
    let mut head = vec![0; 112];
    head[..4].copy_from_slice(b"QFI\xfb");
    head[7] = 3;
    head[23] = 9;
    head[24..32].copy_from_slice(&(1u64 << 62).to_be_bytes());
    head[40..48].copy_from_slice(&512u64.to_be_bytes());
    for (entries, read) in [(4u32 << 20, true), ((4 << 20) + 1, false)] {
        head[36..40].copy_from_slice(&entries.to_be_bytes());
        file.write_all_at(&head, 0).unwrap();
        let short = length::image(&file, MIB, Format::QCOW2).unwrap();
        assert_eq!(short.is_some(), read, "{entries}");
    }
}

/// QEMU finds extents in any text, across line ends too.
#[test]
fn only_a_descriptor_we_read_is_a_descriptor() {
    if !have(&["qemu-img"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let secret = write(folder.path(), "s.raw", &pattern(1 << 20));
    let open = |text: &str| {
        let path = write(folder.path(), "d.vmdk", text.as_bytes());
        let error = Image::open_info(&path, Some("vmdk"), &[]).unwrap_err();
        assert!(matches!(error, ImageError::Damaged { .. }), "{error}");
        error.to_string()
    };
    let create = "CID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"";
    let secret = text(&secret);
    for (head, break_) in [
        (
            format!("# Disk DescriptorFile\n#{}\nversion=4", "#".repeat(600)),
            "\n",
        ),
        ("# Disk DescriptorFile\nversion=1".to_owned(), "\n"),
        ("# Disk DescriptorFile\nversion=1".to_owned(), "\r\n"),
    ] {
        for space in ["", " ", "\u{b}", "\u{c}"] {
            let error = open(&format!(
                "{head}\n{create}\n{space}RW{break_}2048 FLAT \"{secret}\" 0\n"
            ));
            assert!(error.contains("an extent nobody understands"), "{error}");
        }
    }
    for head in [
        "# Disk DescriptorFile\nversion=9",
        "# no version",
        "version=1",
    ] {
        let error = open(&format!("{head}\n{create}\nRW 2048 FLAT \"{secret}\" 0\n"));
        assert!(error.contains("neither like a VMDK"), "{error}");
    }
    // An extent that is a descriptor with an extent that only QEMU finds.
    let mut nested = vec![0; 1024];
    nested[..4].copy_from_slice(b"KDMV");
    nested[4] = 1;
    nested[28] = 1;
    let hidden = format!("{create}\nRW\n2048 FLAT \"{secret}\" 0\n");
    nested[512..512 + hidden.len()].copy_from_slice(hidden.as_bytes());
    write(folder.path(), "nested.vmdk", &nested);
    let error = open(&format!(
        "# Disk DescriptorFile\nversion=1\n{create}\nRW 2048 SPARSE \"nested.vmdk\"\n"
    ));
    assert!(error.contains("an extent that has extents"), "{error}");
}
