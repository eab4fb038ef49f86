//! The disk of a guest: a raw, sparse image with a partition table, file systems and files.
//!
//! The partition table is written by the `gpt` and `mbrman` crates, FAT by `fatfs`. NTFS is made by
//! `mkntfs` in a sparse file whose data is then copied to its offset. Files are written through
//! [`GuestWrite`], like those of a conversion. Nothing here can boot, because there is no boot
//! code.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use super::pe::{self, Subsystem};
use super::{
    Arch, DISK_GUID, DemoError, DemoVolume, Firmware, GuestSpec, Leftovers, MBR_SIGNATURE,
    PartitionSpec, Role, bcd, driver_database, hives, pack, services,
};
use crate::block::{FileDisk, Window};
use crate::disk::layout::{self, DiskLayout, Partition, Scheme};
use crate::guest::ntfs3g::{MountOptions, Ntfs3g};
use crate::guest::{EmbeddedWriter, GuestPath, GuestWrite, VolumeId, wof};
use crate::tool::Cmd;
use crate::tool::confine::Confinement;
use gpt::partition_types as types;

const MIB: u64 = 1 << 20;

/// Writes the whole guest to a new file.
pub fn build(spec: &GuestSpec, path: &Path) -> Result<(), DemoError> {
    create_disk(spec, path)?;
    let disk = FileDisk::open_rw(path).map_err(|source| DemoError::Io {
        path: path.to_path_buf(),
        source,
    })?;
    let options = MountOptions::default();
    let mut writer = Box::new(EmbeddedWriter::new(Arc::new(disk), &layout(spec), options));
    let written = write_files(spec, writer.as_mut());
    let closed = writer.close();
    written?;
    closed?;
    if spec.compact_os {
        compact(spec, path)?;
    }
    Ok(())
}

/// Compresses the programs, like `compact /compactos:always`.
fn compact(spec: &GuestSpec, path: &Path) -> Result<(), DemoError> {
    let partition = spec
        .partition(Role::Windows)
        .ok_or(DemoError::Spec("there is no Windows partition"))?;
    let disk = FileDisk::open_rw(path).map_err(|source| DemoError::Io {
        path: path.to_path_buf(),
        source,
    })?;
    let (start, len) = (partition.start, partition.size);
    let mut volume = Ntfs3g::mount(Arc::new(disk), start, len, MountOptions::default())?;
    let point = wof::reparse_point(pack::ALGORITHM);
    for file in files(spec)? {
        let name = file.path.name().unwrap_or_default().to_lowercase();
        let program = [".sys", ".exe", ".dll"].iter().any(|e| name.ends_with(e));
        if file.role == Role::Windows && program && name != "pagefile.sys" {
            let packed = pack::stream(&file.contents);
            let size = file.contents.len() as u64;
            volume.make_wof(&file.path, &packed, size, &point)?;
        }
    }
    Ok(volume.unmount()?)
}

/// The image with its partition table and empty file systems.
pub fn create_disk(spec: &GuestSpec, path: &Path) -> Result<(), DemoError> {
    create_table(spec, path)?;
    for partition in spec.partitions() {
        match partition.role {
            Role::Esp => format_fat(spec, path, &partition)?,
            Role::Msr => {}
            Role::SystemReserved | Role::Windows | Role::Recovery => {
                format_ntfs(spec, path, &partition)?;
            }
        }
    }
    Ok(())
}

/// The image with its partition table.
pub(crate) fn create_table(spec: &GuestSpec, path: &Path) -> Result<(), DemoError> {
    check(spec)?;
    let io = |source| DemoError::Io {
        path: path.to_path_buf(),
        source,
    };
    let file = File::create_new(path).map_err(io)?;
    file.set_len(spec.disk_size).map_err(io)?;
    match spec.firmware {
        Firmware::Uefi => write_gpt(spec, path),
        Firmware::Bios => write_mbr(spec, path),
    }
}

/// The partition table of the guest.
pub fn layout(spec: &GuestSpec) -> DiskLayout {
    let uefi = spec.firmware == Firmware::Uefi;
    let partitions = spec.partitions().into_iter().map(|p| {
        let type_id = match (uefi, p.role) {
            (true, Role::Esp) => layout::GPT_ESP,
            (true, Role::Msr) => layout::GPT_MSR,
            (true, Role::Recovery) => GPT_RECOVERY,
            (true, _) => layout::GPT_BASIC_DATA,
            (false, Role::Recovery) => "0x27",
            (false, _) => "0x07",
        };
        Partition {
            index: p.index,
            type_id: type_id.to_string(),
            start_bytes: p.start,
            size_bytes: p.size,
            guid: uefi.then(|| p.role.guid().to_string()),
            name: uefi.then(|| gpt_name(p.role).to_string()),
            active: !uefi && p.role == spec.boot_role(),
        }
    });
    DiskLayout {
        scheme: if uefi { Scheme::Gpt } else { Scheme::Mbr },
        sector_size: spec.sector_size,
        disk_id: Some(match uefi {
            true => DISK_GUID.to_string(),
            false => format!("{MBR_SIGNATURE:#010x}"),
        }),
        partitions: partitions.collect(),
    }
}

const GPT_RECOVERY: &str = "de94bba4-06d1-4d40-a16a-bfd50179d6ac";

fn gpt_name(role: Role) -> &'static str {
    match role {
        Role::Esp => "EFI system partition",
        Role::Msr => "Microsoft reserved partition",
        Role::Recovery => "",
        Role::Windows | Role::SystemReserved => "Basic data partition",
    }
}

fn check(spec: &GuestSpec) -> Result<(), DemoError> {
    let problem = if !matches!(spec.sector_size, 512 | 4096) {
        "sectors have 512 or 4096 bytes"
    } else if !spec.cluster_size.is_power_of_two()
        || !(spec.sector_size..=65536).contains(&spec.cluster_size)
    {
        "clusters have 512 to 65536 bytes, and no less than a sector"
    } else if spec.disk_size < 512 * MIB || !spec.disk_size.is_multiple_of(MIB) {
        "the disk has at least 512 MiB, and whole ones"
    } else if spec.firmware == Firmware::Uefi && !spec.version.nt_at_least(6, 0) {
        "Windows before Vista starts on BIOS only"
    } else if !(1..=2).contains(&spec.control_set) {
        "the control set is 1 or 2"
    } else {
        return Ok(());
    };
    Err(DemoError::Spec(problem))
}

fn open(path: &Path) -> Result<File, DemoError> {
    let file = File::options().read(true).write(true).open(path);
    file.map_err(|source| DemoError::Io {
        path: path.to_path_buf(),
        source,
    })
}

fn write_gpt(spec: &GuestSpec, path: &Path) -> Result<(), DemoError> {
    let table = |e: &dyn ToString| DemoError::Table(e.to_string());
    let sector = u64::from(spec.sector_size);
    let block_size = match spec.sector_size {
        4096 => gpt::disk::LogicalBlockSize::Lb4096,
        _ => gpt::disk::LogicalBlockSize::Lb512,
    };
    let mut file = open(path)?;
    let sectors = u32::try_from(spec.disk_size / sector - 1).unwrap_or(u32::MAX);
    gpt::mbr::ProtectiveMBR::with_lb_size(sectors)
        .overwrite_lba0(&mut file)
        .map_err(|e| table(&e))?;
    let mut disk = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(block_size)
        .create_from_device(file, Some(DISK_GUID))
        .map_err(|e| table(&e))?;
    let partitions: BTreeMap<u32, gpt::partition::Partition> = spec
        .partitions()
        .iter()
        .map(|p| {
            let part_type_guid = match p.role {
                Role::Esp => types::EFI,
                Role::Msr => types::MICROSOFT_RESERVED,
                Role::Recovery => types::WINDOWS_RECOVERY,
                Role::Windows | Role::SystemReserved => types::BASIC,
            };
            let partition = gpt::partition::Partition {
                part_type_guid,
                part_guid: p.role.guid(),
                first_lba: p.start / sector,
                last_lba: (p.start + p.size) / sector - 1,
                flags: 0,
                name: gpt_name(p.role).to_string(),
            };
            (p.index, partition)
        })
        .collect();
    disk.update_partitions(partitions).map_err(|e| table(&e))?;
    disk.write().map_err(|e| table(&e))?;
    Ok(())
}

fn write_mbr(spec: &GuestSpec, path: &Path) -> Result<(), DemoError> {
    let table = |e: &dyn ToString| DemoError::Table(e.to_string());
    let mut file = open(path)?;
    let signature = MBR_SIGNATURE.to_le_bytes();
    let mut mbr =
        mbrman::MBR::new_from(&mut file, spec.sector_size, signature).map_err(|e| table(&e))?;
    let lba = |bytes: u64| {
        u32::try_from(bytes / u64::from(spec.sector_size))
            .map_err(|_| DemoError::Spec("the disk is too large for an MBR"))
    };
    for p in spec.partitions() {
        let active = p.role == spec.boot_role();
        mbr[p.index as usize] = mbrman::MBRPartitionEntry {
            boot: if active {
                mbrman::BOOT_ACTIVE
            } else {
                mbrman::BOOT_INACTIVE
            },
            first_chs: mbrman::CHS::empty(),
            sys: if p.role == Role::Recovery { 0x27 } else { 0x07 },
            last_chs: mbrman::CHS::empty(),
            starting_lba: lba(p.start)?,
            sectors: lba(p.size)?,
        };
    }
    mbr.write_into(&mut file).map_err(|e| table(&e))
}

pub(crate) fn format_fat(
    spec: &GuestSpec,
    path: &Path,
    partition: &PartitionSpec,
) -> Result<(), DemoError> {
    let format = |source| DemoError::Format {
        role: partition.role,
        source,
    };
    let disk = Arc::new(FileDisk::open_rw(path).map_err(format)?);
    let window = Window::new(disk, partition.start, partition.size);
    let options = fatfs::FormatVolumeOptions::new()
        .fat_type(fatfs::FatType::Fat32)
        .bytes_per_sector(spec.sector_size as u16)
        .bytes_per_cluster(spec.sector_size)
        .volume_id(0x3236_0a5c)
        .volume_label(*b"SYSTEM     ");
    fatfs::format_volume(window, options).map_err(format)
}

fn format_ntfs(spec: &GuestSpec, path: &Path, partition: &PartitionSpec) -> Result<(), DemoError> {
    let format = |source| DemoError::Format {
        role: partition.role,
        source,
    };
    let label = match partition.role {
        Role::SystemReserved => "System Reserved",
        Role::Recovery => "Recovery",
        _ => "",
    };
    // The other volumes are small, and get Windows' default.
    let cluster = match partition.role {
        Role::Windows => spec.cluster_size,
        _ => spec.sector_size.max(4096),
    };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    let mut volume =
        tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new("."))).map_err(format)?;
    volume.as_file().set_len(partition.size).map_err(format)?;
    Cmd::new("mkntfs")
        .confined(Confinement::writes_arguments())
        .args(["--quick", "--force", "--quiet", "--label", label])
        .args(["--cluster-size", &cluster.to_string()])
        .args(["--sector-size", &spec.sector_size.to_string()])
        .args([
            "--partition-start",
            &(partition.start / u64::from(spec.sector_size)).to_string(),
        ])
        .args(["--heads", "255", "--sectors-per-track", "63"])
        .arg(std::path::absolute(volume.path()).map_err(format)?)
        .run()?;
    let mut image = File::options().write(true).open(path).map_err(format)?;
    copy_data(volume.as_file_mut(), &mut image, partition.start).map_err(format)
}

/// Copies the ranges with data.
fn copy_data(from: &mut File, to: &mut File, offset: u64) -> io::Result<()> {
    use rustix::fs::{SeekFrom as Sparse, seek};
    let mut at = 0;
    loop {
        let start = match seek(&*from, Sparse::Data(at)) {
            Ok(start) => start,
            // No data beyond.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let end = seek(&*from, Sparse::Hole(start))?;
        from.seek(SeekFrom::Start(start))?;
        to.seek(SeekFrom::Start(offset + start))?;
        io::copy(&mut Read::by_ref(from).take(end - start), to)?;
        at = end;
    }
}

/// A file of the guest and its partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFile {
    pub role: Role,
    pub path: GuestPath,
    pub contents: Vec<u8>,
}

/// Writes all files, with any engine.
pub fn write_files(spec: &GuestSpec, writer: &mut dyn GuestWrite) -> Result<(), DemoError> {
    let mut made: BTreeSet<(VolumeId, GuestPath)> = BTreeSet::new();
    for file in files(spec)? {
        let partition = spec
            .partition(file.role)
            .ok_or(DemoError::Spec("a file has no partition to go to"))?;
        let volume = VolumeId::new(partition.index);
        let mut folder = GuestPath::root();
        let parent = file.path.parent().unwrap_or_default();
        for part in parent.parts() {
            folder = folder.join(part)?;
            if made.insert((volume, folder.clone())) {
                writer.create_dir(volume, &folder)?;
            }
        }
        writer.write_file(volume, &file.path, &file.contents)?;
    }
    Ok(())
}

/// Every file of the guest, with its contents.
pub fn files(spec: &GuestSpec) -> Result<Vec<GuestFile>, DemoError> {
    let mut list = FileList {
        spec,
        files: Vec::new(),
    };
    list.registry()?;
    list.programs()?;
    list.driver_store()?;
    list.boot()?;
    list.rest()?;
    Ok(list.files)
}

struct FileList<'s> {
    spec: &'s GuestSpec,
    files: Vec<GuestFile>,
}

impl FileList<'_> {
    fn add(&mut self, role: Role, path: &str, contents: Vec<u8>) -> Result<(), DemoError> {
        let path = GuestPath::parse(path)?;
        self.files.push(GuestFile {
            role,
            path,
            contents,
        });
        Ok(())
    }

    fn windows(&mut self, path: &str, contents: Vec<u8>) -> Result<(), DemoError> {
        let path = format!("{}\\{path}", self.spec.windows_dir);
        self.add(Role::Windows, &path, contents)
    }

    fn is_nt5(&self) -> bool {
        !self.spec.version.nt_at_least(6, 0)
    }

    fn registry(&mut self) -> Result<(), DemoError> {
        let spec = self.spec;
        let mut hives = vec![
            ("SYSTEM", hives::system(spec)),
            ("SOFTWARE", hives::software(spec)),
        ];
        if let Some(drivers) = hives::drivers(spec) {
            hives.push(("DRIVERS", drivers));
        }
        for name in ["DEFAULT", "SAM", "SECURITY"] {
            hives.push((name, hives::placeholder(name)));
        }
        for (name, bytes) in hives {
            // XP has lower-case names, and one log.
            let (name, logs) = match self.is_nt5() {
                true => (name.to_lowercase(), &["LOG"][..]),
                false => (name.to_string(), &["LOG1", "LOG2"][..]),
            };
            let path = format!("System32\\config\\{name}");
            for log in logs {
                self.windows(&format!("{path}.{log}"), Vec::new())?;
            }
            self.windows(&path, bytes)?;
        }
        Ok(())
    }

    fn programs(&mut self) -> Result<(), DemoError> {
        let arch = self.spec.arch;
        let vista = !self.is_nt5();
        self.windows("System32\\ntdll.dll", pe::image(arch, Subsystem::Native))?;
        for (name, imports) in services::libraries(self.spec.version) {
            let image = pe::importing(arch, Subsystem::Native, &imports);
            self.windows(&format!("System32\\{name}"), image)?;
        }
        for name in ["explorer.exe", "System32\\cmd.exe", "System32\\svchost.exe"] {
            self.windows(name, pe::image(arch, Subsystem::Gui))?;
        }
        for service in services::services(self.spec) {
            let path = format!("System32\\drivers\\{}", service.file_name());
            let image = pe::importing(arch, Subsystem::Native, &service.imports(vista));
            self.windows(&path, image)?;
        }
        let tcpip = pe::image(arch, Subsystem::Native);
        self.windows("System32\\drivers\\tcpip.sys", tcpip)?;
        if self.spec.leftovers == Leftovers::Vmware {
            let path = "Program Files\\VMware\\VMware Tools\\vmtoolsd.exe";
            self.add(Role::Windows, path, pe::image(arch, Subsystem::Gui))?;
        }
        Ok(())
    }

    fn driver_store(&mut self) -> Result<(), DemoError> {
        let arch = self.spec.arch;
        let inf = |name: &str| {
            let text =
                format!("; {name}\r\n[Version]\r\nSignature=\"$WINDOWS NT$\"\r\nProvider=Demo\r\n");
            text.into_bytes()
        };
        if self.is_nt5() {
            return self.windows("inf\\mshdc.inf", inf("mshdc.inf"));
        }
        for package in driver_database::store(self.spec) {
            let published = package.published;
            self.windows(&format!("INF\\{published}"), inf(&published))?;
            for file in package.files {
                let contents = match file.ends_with(".sys") {
                    true => pe::image(arch, Subsystem::Native),
                    false => inf(&file),
                };
                let folder = &package.folder;
                let path = format!("System32\\DriverStore\\FileRepository\\{folder}\\{file}");
                self.windows(&path, contents)?;
            }
        }
        Ok(())
    }

    fn boot(&mut self) -> Result<(), DemoError> {
        let spec = self.spec;
        let boot = spec.boot_role();
        let Some(bcd) = bcd::bytes(spec) else {
            let ini = format!(
                "[boot loader]\r\ntimeout=30\r\ndefault=multi(0)disk(0)rdisk(0)partition(1)\\{0}\r\n\
                 [operating systems]\r\nmulti(0)disk(0)rdisk(0)partition(1)\\{0}=\"Windows\" /fastdetect\r\n",
                spec.windows_dir
            );
            self.add(boot, "boot.ini", ini.into_bytes())?;
            self.add(boot, "ntldr", vec![0xe9; 4096])?;
            return self.add(boot, "NTDETECT.COM", vec![0xe9; 4096]);
        };
        let (extension, loader) = match spec.firmware {
            Firmware::Uefi => {
                let manager = pe::image(spec.arch, Subsystem::EfiApplication);
                let fallback = match spec.arch {
                    Arch::X86 => "bootia32.efi",
                    Arch::Amd64 => "bootx64.efi",
                    Arch::Arm64 => "bootaa64.efi",
                };
                self.add(boot, &format!("EFI\\Boot\\{fallback}"), manager.clone())?;
                self.add(boot, "EFI\\Microsoft\\Boot\\bootmgfw.efi", manager)?;
                self.add(boot, "EFI\\Microsoft\\Boot\\BCD", bcd)?;
                ("efi", Subsystem::BootApplication)
            }
            Firmware::Bios => {
                self.add(boot, "bootmgr", vec![0xe9; 4096])?;
                self.add(boot, "Boot\\BCD", bcd)?;
                ("exe", Subsystem::BootApplication)
            }
        };
        for name in ["winload", "winresume"] {
            let path = format!("System32\\{name}.{extension}");
            self.windows(&path, pe::image(spec.arch, loader))?;
        }
        Ok(())
    }

    fn rest(&mut self) -> Result<(), DemoError> {
        let spec = self.spec;
        if spec.pagefile_size > 0 {
            let contents = vec![0xa5; spec.pagefile_size as usize];
            self.add(Role::Windows, "pagefile.sys", contents)?;
        }
        let ini = b"[.ShellClassInfo]\r\n".to_vec();
        for folder in ["Users\\Public", "ProgramData", "Program Files"] {
            self.add(
                Role::Windows,
                &format!("{folder}\\desktop.ini"),
                ini.clone(),
            )?;
        }
        if spec.recovery {
            let image = b"MSWIM\0\0\0".repeat(512);
            self.add(Role::Recovery, "Recovery\\WindowsRE\\winre.wim", image)?;
        }
        for file in &spec.extra_files {
            let role = match file.place {
                DemoVolume::Windows => Role::Windows,
                DemoVolume::Boot => spec.boot_role(),
            };
            self.add(role, &file.path, file.contents.clone())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::demo::{ExtraFile, WinVersion};
    use crate::guest::GuestRead;

    #[test]
    fn specifications_that_cannot_be() {
        let dir = tempfile::tempdir().unwrap();
        let good = GuestSpec::new(WinVersion::Win10);
        let xp_on_uefi = GuestSpec {
            firmware: Firmware::Uefi,
            ..GuestSpec::new(WinVersion::Xp)
        };
        for bad in [
            GuestSpec {
                sector_size: 1024,
                ..good.clone()
            },
            GuestSpec {
                cluster_size: 3000,
                ..good.clone()
            },
            GuestSpec {
                sector_size: 4096,
                cluster_size: 512,
                ..good.clone()
            },
            GuestSpec {
                disk_size: 1 << 20,
                ..good.clone()
            },
            xp_on_uefi,
        ] {
            let result = create_disk(&bad, &dir.path().join("x"));
            assert!(matches!(result, Err(DemoError::Spec(_))), "{bad:?}");
        }
        assert!(!dir.path().join("x").exists());
    }

    #[test]
    fn files_are_complete_and_named_once() {
        for version in WinVersion::ALL {
            let spec = GuestSpec::new(version);
            let files = files(&spec).unwrap();
            let mut seen = HashSet::new();
            for file in &files {
                let key = (file.role as u8, file.path.clone());
                assert!(seen.insert(key), "{version:?} {}", file.path);
            }
            let mut expected = vec![
                "Windows\\System32\\config\\system",
                "windows\\system32\\ntoskrnl.exe",
                "windows\\system32\\drivers\\atapi.sys",
                "windows\\explorer.exe",
                "pagefile.sys",
            ];
            if version.has_driver_database() {
                expected.push("Windows\\System32\\config\\DRIVERS");
                expected.push("Windows\\System32\\drivers\\storahci.sys");
                expected.push("Windows\\INF\\oem3.inf");
            }
            for path in expected {
                let path = GuestPath::parse(path).unwrap();
                assert!(files.iter().any(|f| f.path == path), "{version:?} {path}");
            }
        }
    }

    fn have_mkntfs() -> bool {
        require("mkntfs")
    }

    fn require(tool: &str) -> bool {
        crate::skip::have(&[tool])
    }

    /// The reader, which shares no code with the writer, returns every file unchanged.
    #[test]
    fn a_guest_reads_back() {
        if !have_mkntfs() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let eleven = GuestSpec::new(WinVersion::Win11);
        let cases = [
            GuestSpec {
                extra_files: vec![ExtraFile {
                    place: DemoVolume::Boot,
                    path: "EFI\\extra\\note.txt".into(),
                    contents: b"note".to_vec(),
                }],
                ..eleven.clone()
            },
            GuestSpec {
                sector_size: 4096,
                cluster_size: 65536,
                ..eleven
            },
            GuestSpec {
                arch: Arch::X86,
                cluster_size: 512,
                ..GuestSpec::new(WinVersion::Win7)
            },
            GuestSpec::new(WinVersion::Xp),
        ];
        for (n, spec) in cases.iter().enumerate() {
            let path = dir.path().join(format!("{n}.img"));
            build(spec, &path).unwrap();
            let disk = FileDisk::open(&path).unwrap();
            let reader = crate::guest::embedded::open(Arc::new(disk), &layout(spec)).unwrap();
            for volume in reader.volumes() {
                let state = &volume.state;
                assert!(state.unreadable.is_none() && !state.dirty, "{volume:?}");
            }
            for file in files(spec).unwrap() {
                let volume = VolumeId::new(spec.partition(file.role).unwrap().index);
                let read = reader.read(volume, &file.path, 64 * MIB).unwrap();
                assert!(read == file.contents, "{:?} {}", spec.version, file.path);
            }
        }
    }

    /// ntfs-3g's and dosfstools' own programs find no fault.
    #[test]
    fn other_programs_accept_the_file_systems() {
        if !["mkntfs", "ntfsfix", "ntfscat", "fsck.fat"]
            .into_iter()
            .all(require)
        {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let spec = GuestSpec {
            disk_size: 512 * MIB,
            ..GuestSpec::new(WinVersion::Server2022)
        };
        let path = dir.path().join("guest.img");
        build(&spec, &path).unwrap();
        let extract = |role: Role| {
            let partition = spec.partition(role).unwrap();
            let to = dir.path().join(format!("{role:?}"));
            let mut image = File::open(&path).unwrap();
            image.seek(SeekFrom::Start(partition.start)).unwrap();
            let mut file = File::create(&to).unwrap();
            io::copy(&mut image.take(partition.size), &mut file).unwrap();
            to
        };
        let windows = extract(Role::Windows);
        Cmd::new("ntfsfix")
            .arg("--no-action")
            .arg(&windows)
            .run()
            .unwrap();
        let hive = Cmd::new("ntfscat")
            .arg("--force")
            .arg(&windows)
            .arg("Windows/System32/config/SYSTEM")
            .run()
            .unwrap();
        assert!(hive.stdout == hives::system(&spec));
        let esp = extract(Role::Esp);
        Cmd::new("fsck.fat").arg("-n").arg(&esp).run().unwrap();
    }

    #[test]
    fn partition_tables_and_file_systems() {
        if !have_mkntfs() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let ten = GuestSpec::new(WinVersion::Win10);
        let seven = GuestSpec::new(WinVersion::Win7);
        let cases = [
            ten.clone(),
            GuestSpec {
                sector_size: 4096,
                cluster_size: 65536,
                ..ten
            },
            GuestSpec {
                cluster_size: 512,
                ..seven.clone()
            },
            GuestSpec {
                system_reserved: false,
                sector_size: 4096,
                ..seven
            },
        ];
        for (n, spec) in cases.iter().enumerate() {
            let path = dir.path().join(format!("{n}.img"));
            create_disk(spec, &path).unwrap();
            let metadata = path.metadata().unwrap();
            assert_eq!(metadata.len(), spec.disk_size);
            assert!(metadata.blocks() * 512 < 100 * MIB, "sparse");
            if spec.firmware == Firmware::Uefi && spec.sector_size == 512 && require("sgdisk") {
                let output = Cmd::new("sgdisk").arg("--verify").arg(&path).run().unwrap();
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(text.contains("No problems found"), "{text}");
            }
            let mut image = File::open(&path).unwrap();
            for p in spec.partitions() {
                image.seek(SeekFrom::Start(p.start)).unwrap();
                let mut boot = [0; 512];
                image.read_exact(&mut boot).unwrap();
                let u16_at = |at: usize| u16::from_le_bytes([boot[at], boot[at + 1]]);
                match p.role {
                    Role::Msr => assert_eq!(boot, [0; 512]),
                    Role::Esp => assert_eq!(&boot[82..87], b"FAT32"),
                    role => {
                        assert_eq!(&boot[3..7], b"NTFS", "{role:?}");
                        let hidden = u64::from(u16_at(28)) | u64::from(u16_at(30)) << 16;
                        assert_eq!(hidden * u64::from(spec.sector_size), p.start);
                        assert_eq!(u32::from(u16_at(11)), spec.sector_size);
                    }
                }
            }
        }
    }
}
