//! Small volumes, with each kind of metadata on them, and the two ends of disks.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use hyper2kvm::block::FileDisk;
use hyper2kvm::demo::bitlocker::{self, Lock, Spec};
use hyper2kvm::demo::{Arch, GuestSpec, WinVersion, guest, pack, pe};
use hyper2kvm::guest::fve::cipher::Method;
use hyper2kvm::guest::fve::layout::{NTFS, VolumeHeader};
use hyper2kvm::guest::ntfs3g::{MountOptions, Ntfs3g};
use hyper2kvm::guest::{EmbeddedWriter, Extent, GuestPath, GuestWrite, VolumeId, wof};
use hyper2kvm::tool::Cmd;
use hyper2kvm_fuzz::disk::{Base, bare};
use hyper2kvm_fuzz::{DISK, END, FVE_PLACES, SEAL};

use crate::{Result, Seeds};

const VOLUME: VolumeId = VolumeId::new(0);
const RECORD: usize = 1024;
const RECOVERY: &str = "110000-220000-330000-440000-550000-660000-110011-220022";

fn path(text: &str) -> Result<GuestPath> {
    Ok(GuestPath::parse(text)?)
}

fn writer(image: &Path) -> Result<Box<EmbeddedWriter>> {
    let disk = Arc::new(FileDisk::open_rw(image)?);
    Ok(Box::new(EmbeddedWriter::new(
        disk,
        &bare(),
        MountOptions::default(),
    )))
}

/// Two files that take the volume's clusters in turn until their runs need an attribute list.
fn fragment(writer: &mut dyn GuestWrite) -> Result<()> {
    for round in 0..300u64 {
        for name in ["one", "two"] {
            let file = path(&format!("Windows/{name}"))?;
            if round == 0 {
                writer.write_file(VOLUME, &file, &[1; 1024])?;
            }
            let extent = Extent {
                offset: round * 1024,
                data: vec![round as u8; 1024],
            };
            writer.patch_file(VOLUME, &file, (round + 1) * 1024, &[extent])?;
        }
    }
    Ok(())
}

fn ntfs(image: &Path) -> Result<()> {
    let size = 6 << 20;
    File::create(image)?.set_len(size)?;
    Cmd::new("mkntfs")
        .args(["-F", "-Q", "-q", "-L", "Windows", "-s", "512", "-c", "1024"])
        .args(["-p", "2048", "-H", "255", "-S", "63"])
        .arg(image)
        .run()?;
    let program = pe::image(Arch::Amd64, pe::Subsystem::Native);
    let mut writer = writer(image)?;
    for dir in ["Windows", "Windows/System32", "packed"] {
        writer.create_dir(VOLUME, &path(dir)?)?;
    }
    // Enough names that the index needs blocks of its own.
    for i in 0..40 {
        let file = path(&format!("Windows/System32/config {i}"))?;
        writer.write_file(VOLUME, &file, &vec![b'c'; i * 100])?;
    }
    writer.write_file(VOLUME, &path("Windows/System32/driver.sys")?, &program)?;
    writer.write_file(VOLUME, &path("hiberfil.sys")?, &[0; 5000])?;
    fragment(writer.as_mut())?;
    writer.close()?;
    let disk = Arc::new(FileDisk::open_rw(image)?);
    let mut volume = Ntfs3g::mount(disk, 0, size, MountOptions::default())?;
    let point = wof::reparse_point(pack::ALGORITHM);
    let file = path("Windows/System32/driver.sys")?;
    volume.make_wof(&file, &pack::stream(&program), program.len() as u64, &point)?;
    let text = "The quick brown fox jumps over the lazy dog. ".repeat(3000);
    volume.make_lznt1(&path("packed/file")?, text.as_bytes())?;
    Ok(volume.unmount()?)
}

fn fat(image: &Path, kind: &str, mib: u64) -> Result<()> {
    File::create(image)?.set_len(mib << 20)?;
    Cmd::new("mkfs.fat")
        .args(["-F", kind, "-s", "1", "-i", "12345678", "-n", "SYSTEM"])
        .arg(image)
        .run()?;
    let mut writer = writer(image)?;
    for dir in ["EFI", "EFI/Microsoft", "EFI/Microsoft/Boot"] {
        writer.create_dir(VOLUME, &path(dir)?)?;
    }
    let boot = pe::image(Arch::Amd64, pe::Subsystem::EfiApplication);
    for name in ["bootmgfw.efi", "memtest.efi", "BCD"] {
        let file = path(&format!("EFI/Microsoft/Boot/{name}"))?;
        writer.write_file(VOLUME, &file, &boot)?;
    }
    Ok(writer.close()?)
}

fn ends(seeds: &Seeds, folder: &Path) -> Result<()> {
    for (name, version) in [("gpt", WinVersion::Win11), ("mbr", WinVersion::Win7)] {
        let disk = folder.join(name);
        let spec = GuestSpec::new(version);
        assert_eq!(spec.disk_size, DISK);
        guest::create_disk(&spec, &disk)?;
        let file = File::open(&disk)?;
        let mut input = vec![0; 1 + 2 * END];
        input[0] = SEAL;
        file.read_exact_at(&mut input[1..=END], 0)?;
        file.read_exact_at(&mut input[1 + END..], DISK - END as u64)?;
        seeds.write("partitions", name, &input)?;
        for (i, partition) in guest::layout(&spec).partitions.iter().enumerate() {
            let mut head = vec![0; 513];
            file.read_exact_at(&mut head[1..], partition.start_bytes)?;
            seeds.write("partitions", &format!("{name}-volume-{i}"), &head)?;
        }
    }
    Ok(())
}

/// Metadata and boot sector; what is encrypted is nothing but zeroes on the disk.
pub fn fve(seeds: &Seeds) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let folder = dir.path();
    let plain = folder.join("plain");
    let header = VolumeHeader {
        jump: [0xeb, 0x52, 0x90],
        signature: NTFS,
        bytes_per_sector: 512,
        sectors_per_cluster: 8,
        total_sectors: (2 << 20) / 512 - 1,
        metadata_cluster: 7,
    };
    let mut boot = vec![0; 512];
    header.write(&mut boot).ok_or("a boot sector")?;
    fs::write(&plain, boot)?;
    let image = folder.join("fve");
    File::create(&image)?.set_len(2 << 20)?;
    let locks = [Lock::ClearKey, Lock::RecoveryPassword(RECOVERY), Lock::Tpm];
    let spec = Spec::new(Method::CbcAes128Diffuser, &locks, FVE_PLACES);
    let (plain, disk) = (FileDisk::open(&plain)?, FileDisk::open_rw(&image)?);
    bitlocker::write_metadata(&plain, &disk, 0, 2 << 20, &spec)?;
    let base = Base::new(fs::read(&image)?);
    seeds.image("fve.gz", base.bytes())?;
    for (name, place, len) in [
        ("sound", 0, 16),
        ("boot", 0, 200),
        ("header", FVE_PLACES.copies[0] as usize, 112),
        ("entries", FVE_PLACES.copies[0] as usize + 112, 400),
        ("other", FVE_PLACES.copies[1] as usize, 200),
    ] {
        for kind in [1, 2] {
            let input = [&[kind][..], &base.patch(place, len)].concat();
            seeds.write("fve", &format!("{name}-{kind}"), &input)?;
        }
    }
    let all = FVE_PLACES
        .copies
        .map(|at| base.patch(at as usize, 600))
        .concat();
    seeds.write("fve", "copies", &[&[1][..], &all].concat())?;
    let file = bitlocker::startup_key_file([7; 16], &[9; 32]);
    seeds.write("fve", "bek", &[&[0][..], &file].concat())
}

pub fn write(seeds: &Seeds) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("ntfs");
    ntfs(&image)?;
    let base = Base::new(fs::read(&image)?);
    seeds.image("ntfs.gz", base.bytes())?;
    seeds.write("ntfs", "sound", &[])?;
    seeds.write("ntfs", "boot", &base.patch(0, 84))?;
    let starts = |at: usize, magic: &[u8]| base.bytes()[at..].starts_with(magic);
    let places = |magic: &'static [u8]| {
        (0..base.bytes().len())
            .step_by(RECORD)
            .filter(move |at| starts(*at, magic))
    };
    // The records of NTFS itself that are read, and the first of the rest; all extension records.
    let records = places(b"FILE").enumerate().filter(|(i, at)| {
        let extension = base.bytes()[at + 32..at + 38].iter().any(|b| *b != 0);
        matches!(i, 0 | 3 | 5 | 6 | 10) || extension
    });
    let users = places(b"FILE").filter(|at| {
        let text: Vec<u8> = base.bytes()[*at..at + RECORD]
            .iter()
            .copied()
            .filter(|b| *b != 0)
            .collect();
        [
            "hiberfil",
            "driver.sys",
            "System32",
            "one",
            "two",
            "packed",
            "file",
            "config 9",
        ]
        .iter()
        .any(|name| text.windows(name.len()).any(|w| w == name.as_bytes()))
    });
    for at in records.map(|(_, at)| at).chain(users) {
        seeds.write("ntfs", &format!("record-{at:x}"), &base.patch(at, RECORD))?;
    }
    for at in places(b"INDX") {
        seeds.write("ntfs", &format!("index-{at:x}"), &base.patch(at, RECORD))?;
    }
    for (kind, mib, which) in [("16", 6, 2u8), ("32", 34, 3)] {
        let image = dir.path().join(kind);
        fat(&image, kind, mib)?;
        let base = Base::new(fs::read(&image)?);
        seeds.image(&format!("fat{kind}.gz"), base.bytes())?;
        let head = &base.bytes()[..512];
        let number = |at: usize| usize::from(u16::from_le_bytes([head[at], head[at + 1]]));
        let table = 512 * number(14);
        let per_table = match number(22) {
            0 => number(36),
            n => n,
        };
        let root = table + 2 * 512 * per_table;
        for (name, at, len) in [
            ("boot", 0, 90),
            ("table", table, 64),
            ("root", root, 128),
            ("data", root.next_multiple_of(4096), 512),
        ] {
            let Some(patch) = base.try_patch(at, len) else {
                continue;
            };
            for kind_of_run in [which, which & 1] {
                let input = [&[kind_of_run][..], &patch].concat();
                seeds.write("fat", &format!("{kind}-{name}-{kind_of_run}"), &input)?;
            }
        }
        seeds.write("fat", &format!("{kind}-sound"), &[which])?;
    }
    ends(seeds, dir.path())
}
