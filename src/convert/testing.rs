//! Conversions in this process, for tests: what the command line would decide, on disks of the demo.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use uuid::Uuid;

use crate::block::{BlockWrite, FileDisk};
use crate::demo::guest::GuestFile;
use crate::demo::virtio_win::{self, Layout};
use crate::demo::{GuestSpec, Role, WinVersion, guest, pe};
use crate::domain::{
    CpuMode, DiskFormat, DomainType, Drivers, Graphics, NetworkMap, NicSource, Video, kubevirt,
};
use crate::drivers::driver_source::DriverSource;
use crate::guest::GuestPath;
use crate::ids::Accepted;
use crate::plan::firstboot::Preferences;
use crate::plan::linux::LinuxChoice;
use crate::report::Request;
use crate::session::engine::Engine;
use crate::session::{Access, SourceMachine};
use crate::skip::have;
use crate::source;
use crate::testing::{MemoryGuest, driver_source, ext};
use crate::types::DiskBus;
use crate::ui::{ProgressMode, Ui};

use super::job::{
    Copying, DiskOptions, DriverOptions, GuestOptions, Job, OutputOptions, VmOptions,
};
use super::machine::{self, MachineOptions};

/// The names in a directory, in order.
pub(super) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub(super) fn ui() -> Ui {
    Ui::new(false, 0, ProgressMode::None)
}

pub(super) fn machine_options() -> MachineOptions {
    MachineOptions {
        name: "vm".into(),
        title: None,
        memory_mib: 4096,
        vcpus: 8,
        storage: DiskBus::VirtioBlk,
        domain_type: DomainType::Kvm,
        cpu: CpuMode::default(),
        graphics: Graphics::default(),
        video: Video::default(),
        machine_type: None,
        macs: Vec::new(),
        nics: Vec::new(),
        network: NicSource::User,
        network_map: NetworkMap::default(),
        keep_addresses: false,
        probe: PathBuf::new(),
        driver_iso: None,
        drivers: Drivers::default(),
        uuid: Some(Uuid::nil()),
        serial: None,
        genid: None,
        tpm: false,
        no_tpm: false,
        secure_boot: false,
        cores_per_socket: None,
        threads_per_core: None,
        nvram: PathBuf::new(),
        portable: false,
    }
}

/// A job without options: the raw `disks` go to `folder`.
pub(super) fn job(disks: &[PathBuf], folder: &Path) -> Job {
    let mut vm = source::export(&disks[0]);
    for disk in &disks[1..] {
        vm.disks.extend(source::export(disk).disks);
    }
    Job {
        source: SourceMachine {
            max_unpacked: None,
            no_appliance: true,
            vm,
            path: disks[0].clone(),
            access: Access::default(),
        },
        engine: Engine::EMBEDDED,
        drivers: DriverOptions {
            source: None,
            config: Vec::new(),
            require_signed: false,
        },
        guest: GuestOptions {
            bootstrap: None,
            repair_bcd: false,
            keep_tools: true,
            firstboot: Preferences::default(),
            linux: LinuxChoice::Auto,
            accept: Accepted::default(),
        },
        copy: DiskOptions {
            method: Copying::Now,
            format: DiskFormat::Qcow2,
            compress: false,
            trim: true,
            verify: false,
            pace: None,
            devices: Vec::new(),
            target_is_zero: false,
        },
        output: OutputOptions {
            folder: Some(folder.to_path_buf()),
            force: false,
            resume: false,
            from_sync: false,
            budget: None,
        },
        vm: VmOptions {
            machine: machine_options(),
            emit: Vec::new(),
            kubevirt: kubevirt::Options::default(),
            xml_patch: None,
        },
        request: Request::default(),
    }
}

/// A Windows on one disk and data on another, which the source names first; and the drivers.
pub(super) struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    /// `None` where a program that a conversion needs is missing: the test is skipped.
    #[track_caller]
    pub(super) fn new() -> Option<Self> {
        if !have(&["mkntfs", "qemu-img", "qemu-storage-daemon"]) {
            return None;
        }
        let lab = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        guest::build(&spec(), &lab.windows()).unwrap();
        std::fs::write(lab.data(), data()).unwrap();
        let none = |arch| {
            pe::importing(
                arch,
                pe::Subsystem::Native,
                &["storport.sys", "ntoskrnl.exe"],
            )
        };
        for (path, bytes) in virtio_win::files(Layout::Iso, &none) {
            let path = lab.path("drivers").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        Some(lab)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn windows(&self) -> PathBuf {
        self.path("windows.raw")
    }

    pub(super) fn data(&self) -> PathBuf {
        self.path("data.raw")
    }

    pub(super) fn job(&self) -> Job {
        let mut job = job(&[self.data(), self.windows()], &self.path("out"));
        job.drivers.source = Some(self.path("drivers"));
        job
    }
}

/// Of the disk with Windows.
pub(super) const SIZE: u64 = 512 << 20;

pub(super) fn spec() -> GuestSpec {
    GuestSpec {
        disk_size: SIZE,
        recovery: false,
        ..GuestSpec::new(WinVersion::Win10)
    }
}

/// The contents of the data disk: no file system that a trim knows.
pub(super) fn data() -> &'static [u8] {
    static DATA: OnceLock<Vec<u8>> = OnceLock::new();
    DATA.get_or_init(|| {
        let byte = |i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8;
        (0..3 << 20).map(byte).collect()
    })
}

/// A Windows that is converted already, on one disk, and data on another, which the source names first.
pub(super) struct Plain {
    lab: Lab,
    pub(super) guest: MemoryGuest,
}

impl Deref for Plain {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

impl Plain {
    pub(super) fn new() -> Self {
        Self::with(|_| {})
    }

    /// `change` is made to the guest after it was converted.
    pub(super) fn with(change: impl FnOnce(&mut MemoryGuest)) -> Self {
        let driver_source = driver_source();
        let mut guest = MemoryGuest::of(spec());
        let adapters = guest.look(&[], |_, survey| survey.inspection.network.adapters.clone());
        guest.preferences.macs = machine::macs(&adapters, &machine_options());
        let prepared = guest.prepare(&driver_source, Some(DiskBus::Sata));
        guest.apply(&prepared, &driver_source);
        change(&mut guest);
        let dir = tempfile::tempdir().unwrap();
        let lab = Self {
            lab: Lab { dir },
            guest,
        };
        for file in driver_source.files() {
            let path = lab.path("drivers").join(&file.path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, driver_source.read(&file.path).unwrap()).unwrap();
        }
        lab.guest.write(&lab.windows());
        std::fs::write(lab.data(), data()).unwrap();
        lab
    }

    /// The same with its boot files on a disk of their own; the source names that disk first, and Windows last.
    pub(super) fn split(change: impl FnOnce(&mut MemoryGuest)) -> Self {
        let mut lab = Self::with(change);
        let all = std::mem::take(&mut lab.guest.files);
        let (boot, rest) = (all.into_iter()).partition(|file| file.role == Role::Esp);
        for (files, path) in [(boot, lab.boot()), (rest, lab.windows())] {
            std::fs::remove_file(&path).ok();
            lab.guest.files = files;
            lab.guest.write(&path);
        }
        lab
    }

    pub(super) fn boot(&self) -> PathBuf {
        self.path("boot.raw")
    }

    /// The job for the disks of [`Self::split`].
    pub(super) fn split_job(&self) -> Job {
        let disks = [self.boot(), self.data(), self.windows()];
        let source = job(&disks, &self.path("out")).source;
        Job {
            source,
            ..self.job()
        }
    }

    pub(super) fn job(&self) -> Job {
        let mut job = self.lab.job();
        // Whatever firmware this host has.
        job.vm.machine.portable = true;
        // QEMU checks a qcow2 after the copy.
        job.copy.format = DiskFormat::Raw;
        job
    }
}

/// A Debian on one disk, which starts from UEFI and lacks the fall-back loader, and data on another.
pub(super) struct Linux {
    lab: Lab,
}

impl Deref for Linux {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

/// The loaders of Debian: shim, and what it loads.
pub(super) const LOADERS: [&str; 3] = ["shimx64.efi", "grubx64.efi", "mmx64.efi"];

impl Linux {
    pub(super) fn new() -> Self {
        Self::with(&[])
    }

    /// `more` are files of its EFI system partition.
    pub(super) fn with(more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lab = Self { lab: Lab { dir } };
        let mut guest = MemoryGuest::of(spec());
        let own = LOADERS.map(|name| format!(r"\EFI\debian\{name}"));
        let paths = own.iter().map(String::as_str).chain(more.iter().copied());
        let file = |path: &str| GuestFile {
            role: Role::Esp,
            path: GuestPath::parse(path).unwrap(),
            contents: format!("contents of {path}").into_bytes(),
        };
        guest.files = paths.map(file).collect();
        guest.write(&lab.linux());
        let root = format!(
            "UUID={} / ext4 defaults 0 1\n/dev/sda3 none swap sw 0 0\n",
            ext::UUID
        );
        let volume = ext::volume(&[
            (
                "/etc/os-release",
                "ID=debian\nPRETTY_NAME=\"Debian 12\"\nVERSION_ID=\"12\"\n",
            ),
            ("/etc/fstab", &root),
            ("/etc/hostname", "box\n"),
            (
                "/etc/network/interfaces",
                "auto ens33\niface ens33 inet dhcp\n",
            ),
            ("/sbin/init", "init"),
            (
                "/usr/bin/env",
                "\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0",
            ),
        ]);
        let at = spec().partition(Role::Windows).unwrap().start;
        let disk = FileDisk::open_rw(&lab.linux()).unwrap();
        disk.write_at(at, &volume).unwrap();
        drop(disk);
        std::fs::write(lab.data(), data()).unwrap();
        lab
    }

    pub(super) fn linux(&self) -> PathBuf {
        self.path("linux.raw")
    }

    /// Copied as it is, on the word of the user.
    pub(super) fn job(&self) -> Job {
        let mut job = job(&[self.linux(), self.data()], &self.path("out"));
        job.guest.linux = LinuxChoice::AsIs;
        // As of the jobs for Windows.
        job.vm.machine.portable = true;
        job.copy.format = DiskFormat::Raw;
        job
    }
}
