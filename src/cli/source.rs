//! Arguments that several verbs share: the disk, the drivers, and the form of the result.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::convert::job::{
    Copying, DEFAULT_ISO, DiskOptions, DriverOptions, GuestOptions, Job, OutputOptions, VmOptions,
};
use crate::convert::machine::MachineOptions;
use crate::convert::name::title;
use crate::disk::links;
use crate::disk::remote;
use crate::disk::vmware;
use crate::domain::kubevirt::{self, Reference};
use crate::domain::model::Bridge;
use crate::domain::network::Mapping;
use crate::domain::{
    CpuMode, DiskFormat, DomainType, Drivers, Emit, Graphics, MacAddr, NetworkMap, NicSource,
    Patch, Video,
};
use crate::error::{Blocker, Error, Result};
use crate::firstboot::network::Policy;
use crate::guest::keys::Keys;
use crate::ids::Accepted;
use crate::inspect::InspectOptions;
use crate::plan::firstboot::Preferences;
use crate::plan::linux::LinuxChoice;
use crate::report::Request;
use crate::session::engine::Engine;
use crate::session::{Access, Opened, SourceMachine};
use crate::source::{self, SourceError, SourceKind, SourceVm, mirror};
use crate::transfer::Pace;
use crate::types::DiskBus;

use super::confine::{self, Writes};
use super::values::{
    AccessModeArg, BootstrapArg, CopyArg, EngineArg, Switch, acceptable, kubernetes_label,
    kubernetes_name, storage,
};
use super::wire::{self, WireArgs};

#[derive(Debug, Clone, Args)]
pub struct SourceArgs {
    /// Disk image (vmdk, vhd, vhdx, vdi, qcow2, raw, block device) or VM (.vmx, .ovf, .ova, libvirt
    /// XML). Or the URL of one: ssh://, https://, nbd://, nbds://, nbd+unix://
    pub source: PathBuf,
    /// Format of the image; default: what qemu-img finds
    #[arg(long, value_name = "FORMAT", help_heading = "Source")]
    pub source_format: Option<String>,
    /// Directory in which backing files and extents may lie besides the image's own (repeatable)
    #[arg(long, value_name = "DIR", help_heading = "Source")]
    pub allow_backing: Vec<PathBuf>,
    /// How much a packed disk (OVA, gzip) may unpack to, whatever it declares and is free
    #[arg(long, value_name = "MIB", help_heading = "Source")]
    pub max_unpacked: Option<u64>,
    /// Configuration of an OVF (deployment option) to take [default: the one it marks, else its first]
    #[arg(long, value_name = "ID", help_heading = "Source")]
    pub ovf_configuration: Option<String>,
    /// Convert a disk although a newer link (snapshot delta, checkpoint, overlay) lies beside it:
    /// later writes are not in the result
    #[arg(long, help_heading = "Source")]
    pub older_link: bool,
    /// Which of several Windows to convert: its directory, e.g. '\Windows', '2:\Windows' or
    /// '1/2:\Windows'. The numbers are those of disk and partition, from 1, where the directory
    /// alone is ambiguous
    #[arg(long, help_heading = "Source")]
    pub root: Option<String>,
    /// How the guest's file systems are accessed
    #[arg(long, value_enum, default_value_t, help_heading = "Source")]
    pub engine: EngineArg,
    /// Key of an encrypted volume (BitLocker, LUKS): SELECTOR:file:PATH (for BitLocker also a .BEK file),
    /// SELECTOR:env:NAME or SELECTOR:key:KEY. SELECTOR is all, the number of a partition,
    /// DISK/PARTITION, /dev/sdaN or the UUID of a LUKS volume; KEY is a passphrase or a recovery key (repeatable)
    #[arg(long, value_name = "SELECTOR:TYPE:VALUE", display_order = 900)]
    pub key: Vec<String>,
    #[command(flatten)]
    pub wire: WireArgs,
}

#[derive(Debug, Args)]
pub struct FixArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    /// virtio-win ISO, or a directory in ISO or RPM layout; not needed for Linux [default: /usr/share/virtio-win/virtio-win.iso]
    #[arg(long, value_name = "PATH", env = "HYPER2KVM_VIRTIO_ISO")]
    pub virtio_iso: Option<PathBuf>,
    /// Driver catalogue merged over the built-in one (YAML or JSON, repeatable)
    #[arg(long, value_name = "FILE", help_heading = "Drivers and first boot")]
    pub driver_config: Vec<PathBuf>,
    /// Disk controller of the production VM; Windows gets both VirtIO drivers
    #[arg(long, value_parser = storage(), default_value = "virtio-blk")]
    pub storage: DiskBus,
    /// Disk controller of the first boot [default: sata; ide for Windows XP and 2003; none for 4096-byte sectors]
    #[arg(long, value_enum, help_heading = "Drivers and first boot")]
    pub bootstrap: Option<BootstrapArg>,
    /// How a Linux guest is made ready
    #[arg(
        long,
        value_enum,
        default_value_t,
        help_heading = "Drivers and first boot"
    )]
    pub linux: LinuxChoice,
    /// Output directory [default: ./<name>-kvm]
    #[arg(short, long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Name of the VM [default: from the source]
    #[arg(long)]
    pub name: Option<String>,
    /// Format of the converted disk
    #[arg(long, value_enum, default_value_t = DiskFormat::Qcow2)]
    pub format: DiskFormat,
    /// Compress the converted disk (qcow2 only)
    #[arg(long, help_heading = "Disks and copying")]
    pub compress: bool,
    /// When the disks are copied; with `later` the VM can start at once, on overlays on the source
    #[arg(long, value_enum, default_value_t, help_heading = "Disks and copying")]
    pub copy: CopyArg,
    /// Fix the source disk itself instead of a copy; undo with `rollback`
    #[arg(long, conflicts_with_all = ["compress", "format"])]
    pub in_place: bool,
    /// Copy to this block device or logical volume instead of a file; one per disk, the one with Windows first
    #[arg(long, value_name = "DEV", conflicts_with_all = ["in_place", "compress", "format"], help_heading = "Disks and copying")]
    pub output_device: Vec<PathBuf>,
    /// The output devices read as zeroes (a new thin volume): write no zeroes to them
    #[arg(long, requires = "output_device", help_heading = "Disks and copying")]
    pub target_is_zero: bool,
    /// Refuse drivers that are unsigned, test-signed or changed after signing, instead of warning
    #[arg(long, help_heading = "Drivers and first boot")]
    pub require_signed: bool,
    /// What to do with the guest's IP configuration
    #[arg(long, value_enum, default_value_t)]
    pub network: Policy,
    /// Script (.cmd, .bat) that Windows runs as SYSTEM at the first boot, after hyper2kvm's own
    /// (repeatable)
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "no_firstboot",
        help_heading = "Drivers and first boot"
    )]
    pub firstboot: Vec<PathBuf>,
    /// Add no first-boot script: addresses, guest agent and staged drivers are then up to you
    #[arg(long, help_heading = "Drivers and first boot")]
    pub no_firstboot: bool,
    /// Leave the old hypervisor's guest tools unchanged: services, Run entries, scheduled tasks
    #[arg(long, help_heading = "Drivers and first boot")]
    pub keep_tools: bool,
    /// Uninstall the old hypervisor's guest tools at the first boot on VirtIO, where they are MSI packages
    #[arg(long, conflicts_with_all = ["keep_tools", "no_firstboot"], help_heading = "Drivers and first boot")]
    pub uninstall_tools: bool,
    /// Memory of the VM in MiB [default: from the source, else 4096]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(64..=16_777_216), help_heading = "VM")]
    pub memory: Option<u64>,
    /// Virtual CPUs [default: from the source, else 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "VM")]
    pub vcpus: Option<u32>,
    /// MAC address of a NIC, in order (repeatable) [default: those the guest knows]
    #[arg(long, help_heading = "Networks")]
    pub mac: Vec<MacAddr>,
    /// Host bridge to connect NICs to
    #[arg(long, conflicts_with = "libvirt_network", help_heading = "Networks")]
    pub bridge: Option<String>,
    /// libvirt network to connect NICs to [default: default]
    #[arg(long, value_name = "NAME", help_heading = "Networks")]
    pub libvirt_network: Option<String>,
    /// Connect NICs through QEMU's own NAT: for qemu:///session, without privileges
    #[arg(long, conflicts_with_all = ["bridge", "libvirt_network"], help_heading = "Networks")]
    pub user_network: bool,
    /// Target network for a network of the source: net:NAME (libvirt), br:NAME[@VLAN],
    /// nad:NAMESPACE/NAME (KubeVirt), pve:BRIDGE[@VLAN] (Proxmox VE) or none (link down);
    /// repeatable
    #[arg(long, value_name = "SOURCE=TARGET", help_heading = "Networks")]
    pub network_map: Vec<Mapping>,
    /// libvirt domain type
    #[arg(long, value_enum, default_value_t = DomainType::Kvm, help_heading = "VM")]
    pub domain_type: DomainType,
    /// CPU of the guest under KVM
    #[arg(long, value_enum, default_value_t = CpuMode::HostPassthrough, help_heading = "VM")]
    pub cpu_mode: CpuMode,
    /// Graphics server
    #[arg(long, value_enum, default_value_t = Graphics::Vnc, help_heading = "VM")]
    pub graphics: Graphics,
    /// Graphics card
    #[arg(long, value_enum, default_value_t = Video::Vga, help_heading = "VM")]
    pub video: Video,
    /// Machine type, e.g. q35, pc, pc-q35-8.2 [default: q35; pc for Windows XP and 2003]
    #[arg(long, value_name = "TYPE", help_heading = "VM")]
    pub machine: Option<String>,
    /// A TPM 2.0 [default: if the source has one, and for Windows 11]
    #[arg(long, value_enum, help_heading = "VM")]
    pub tpm: Option<Switch>,
    /// Secure Boot [default: if the source has it on]
    #[arg(long, value_enum, help_heading = "VM")]
    pub secure_boot: Option<Switch>,
    /// Write the VM for these targets too (repeatable, or separated by commas)
    #[arg(
        long,
        value_enum,
        value_name = "KIND",
        value_delimiter = ',',
        help_heading = "Other platforms"
    )]
    pub emit: Vec<Emit>,
    /// Namespace of the KubeVirt objects [default: that of kubectl]
    #[arg(long, value_name = "NAME", value_parser = kubernetes_label, help_heading = "Other platforms")]
    pub kubevirt_namespace: Option<String>,
    /// Storage class of the KubeVirt disks [default: the cluster's]
    #[arg(long, value_name = "NAME", value_parser = kubernetes_name, help_heading = "Other platforms")]
    pub kubevirt_storage_class: Option<String>,
    /// Access mode of the KubeVirt disks; live migration needs rwx [default: that of the storage
    /// class]
    #[arg(
        long,
        value_enum,
        value_name = "MODE",
        help_heading = "Other platforms"
    )]
    pub kubevirt_access_mode: Option<AccessModeArg>,
    /// KubeVirt instance type, in place of processors and memory: NAME, or namespaced/NAME
    #[arg(long, value_name = "NAME", help_heading = "Other platforms")]
    pub kubevirt_instance_type: Option<Reference>,
    /// KubeVirt preference: NAME, or namespaced/NAME
    #[arg(long, value_name = "NAME", help_heading = "Other platforms")]
    pub kubevirt_preference: Option<Reference>,
    /// Changes to the domain XML that have no option: a <domain> with only the changes
    #[arg(long, value_name = "FILE", help_heading = "VM")]
    pub xml_patch: Option<PathBuf>,
    /// Write domain XML that lets the host that defines it select the UEFI firmware
    #[arg(long, help_heading = "VM")]
    pub portable: bool,
    /// Write to an NTFS volume that was not unmounted cleanly; unfinished writes of Windows are
    /// lost
    #[arg(long, help_heading = "Disks and copying")]
    pub force_dirty_volume: bool,
    /// Make the default boot entry and the boot sector name existing partitions, where they do not
    #[arg(long, help_heading = "Drivers and first boot")]
    pub repair_bcd: bool,
    /// Convert in spite of this finding, blocker or check, if only a start of Windows is at stake.
    /// The result is NOT READY and the exit code 4 (repeatable)
    #[arg(long, value_name = "ID", value_parser = acceptable, help_heading = "Safety")]
    pub accept: Vec<String>,
    /// Replace an output directory that hyper2kvm wrote; overwrite the data on an output device
    #[arg(long)]
    pub force: bool,
    /// Copy free space, page files and hibernation files too
    #[arg(long, help_heading = "Disks and copying")]
    pub no_trim: bool,
    /// Read source and copy again after the copy and compare them
    #[arg(long, conflicts_with = "in_place", help_heading = "Disks and copying")]
    pub verify_copy: bool,
    /// Continue an interrupted copy, in the same directory or device; start over if there is none.
    /// SIGINT and SIGTERM then keep the copied data. Other options must be the same
    #[arg(long, conflicts_with = "in_place", help_heading = "Disks and copying")]
    pub resume: bool,
    /// Make the last pass of a sync in the output directory (see sync), with the VM off: copy only
    /// the rest
    #[arg(long, help_heading = "Disks and copying")]
    pub from_sync: bool,
    /// Refuse the last pass if it is expected to take more seconds; nothing is changed then
    #[arg(
        long,
        value_name = "SECONDS",
        requires = "from_sync",
        help_heading = "Disks and copying"
    )]
    pub budget: Option<u64>,
    /// Copy at most this many MiB per second, all disks and all VMs of a batch together
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1_048_576), help_heading = "Disks and copying")]
    pub bandwidth: Option<u64>,
    /// Only show the plan
    #[arg(long)]
    pub dry_run: bool,
}

impl SourceArgs {
    pub fn open(&self) -> Result<SourceMachine> {
        let keys = parsed_keys(&self.key)?;
        let at = wire::location(&self.source, &self.wire)?;
        self.wire.check(at.as_ref())?;
        let path = self.wire.locate(&self.source)?;
        let options = source::Options {
            ovf_configuration: self.ovf_configuration.clone(),
        };
        let mut vm = open_located(&path, &options).map_err(|e| {
            let shown = self.source.display();
            if let Some(blocker) = e.blocker() {
                return Error::refused(format!("{shown} cannot be converted now"), vec![blocker]);
            }
            let hint = e.hint();
            let error = Error::failed(format!("opening {shown}")).because(e);
            hint.into_iter().fold(error, Error::hint)
        })?;
        refuse_if_vmware_runs_it(&path, &vm)?;
        self.refuse_older_links(&mut vm)?;
        Ok(SourceMachine {
            max_unpacked: self.max_unpacked.map(|mib| mib.saturating_mul(1 << 20)),
            no_appliance: self.engine == EngineArg::Embedded,
            vm,
            access: Access {
                format: self.source_format.clone(),
                allow_backing: self.allowed(&path),
                inspect: InspectOptions {
                    root: self.root.clone(),
                    force_dirty: false,
                },
                keys,
                opened: Opened::default(),
            },
            path,
        })
    }

    /// The directories of `--allow-backing`, on the host that has the source.
    fn allowed(&self, path: &Path) -> Vec<PathBuf> {
        let absolute = |folder: &PathBuf| remote::absolute(path, folder);
        self.allow_backing.iter().map(absolute).collect()
    }

    /// Refuses an earlier link of a chain: the VM writes to the last one, so an earlier one is old.
    fn refuse_older_links(&self, vm: &mut source::SourceVm) -> Result<()> {
        let mut blockers = Vec::new();
        for disk in vm.disks.iter().filter(|disk| disk.packed.is_none()) {
            let links = links::newer(&disk.path);
            let Some(newest) = links.last() else { continue };
            let reason = format!(
                "{} is not the newest link of its chain: {} of {} files beside it that are built on it is the newest",
                disk.path.display(),
                newest.display(),
                links.len()
            );
            if self.older_link {
                vm.notes.push(format!(
                    "{reason}; what was written since is not in the result, as asked for with --older-link"
                ));
                continue;
            }
            blockers.push(Blocker::new(
                "newer-link",
                reason,
                format!(
                    "name {} instead, or delete the snapshots on the old host and copy the disk again; --older-link takes the old state on purpose",
                    newest.display()
                ),
            ));
        }
        if blockers.is_empty() {
            return Ok(());
        }
        let shown = self.source.display();
        Err(Error::refused(
            format!("{shown} contains an old state"),
            blockers,
        ))
    }

    /// Restricts a verb that only reads: it writes only below this directory and to temporary
    /// files, and has no network. Not with a user's guestfish, as for `convert`.
    pub fn confine(&self, folder: Option<&Path>) -> Result<()> {
        // The child that connects is started with the rights that this process gives up now.
        self.wire.locate(&self.source)?;
        if self.starts_a_daemon()? {
            return Ok(());
        }
        if let Some(folder) = folder {
            // Secrets are collected there. The later writer reports a directory that cannot be
            // created.
            let _ = crate::files::create_private(folder);
        }
        confine::looks(&Writes {
            folder,
            there: self.sockets()?,
        })
    }

    /// The files that `--in-place` may write: the disks themselves. Opening one later reports
    /// errors.
    fn files_in_place(&self) -> Result<Vec<PathBuf>> {
        let machine = self.open()?;
        let mut files = Vec::new();
        for disk in &machine.vm.disks {
            if let Ok(image) = (machine.access).image(&disk.path, disk.format.as_deref()) {
                files.extend(image.written().map(Path::to_path_buf));
            }
        }
        Ok(files)
    }

    /// Whether guestfish may have to run: a key may be that of a LUKS volume.
    fn guestfish(&self) -> Result<bool> {
        if self.engine == EngineArg::Embedded {
            return Ok(false);
        }
        Ok(!self.key.is_empty() || Engine::choose(self.engine.into())?.starts_slowly())
    }

    /// Directories for libguestfs' sockets, whatever TMPDIR is: their names must be short.
    fn sockets(&self) -> Result<Vec<&'static Path>> {
        Ok(Vec::from_iter(
            self.guestfish()?.then_some(Path::new("/tmp")),
        ))
    }

    /// Whether a libvirt daemon for the appliance may be started, which would outlive this process
    /// and have its limits. The system starts root's.
    fn starts_a_daemon(&self) -> Result<bool> {
        Ok(!rustix::process::geteuid().is_root() && self.guestfish()?)
    }

    /// The engine for verbs that only read.
    pub fn reader(&self) -> Result<Engine> {
        Engine::choose_reader(self.engine.into())
    }
}

/// The keys of `--key`.
pub(super) fn parsed_keys(key: &[String]) -> Result<Keys> {
    let (keys, in_clear) = Keys::parse(key).map_err(|e| {
        Error::usage("a key cannot be used")
            .because(e)
            .hint("example: --key 2:file:recovery-key.txt")
    })?;
    if in_clear {
        tracing::warn!(
            "a key on the command line can be seen by every user of this host; SELECTOR:file:PATH hides it"
        );
    }
    Ok(keys)
}

/// The limit of `--bandwidth`, shared with the other VMs of a batch.
pub(super) fn pace(mib: Option<u64>) -> Result<Option<Pace>> {
    let Some(mib) = mib else { return Ok(None) };
    Pace::of_this_process(mib.saturating_mul(1 << 20))
        .map(Some)
        .map_err(|e| Error::failed("keeping to --bandwidth").because(e))
}

impl FixArgs {
    /// Combines the arguments and the source VM; arguments have precedence.
    pub fn job(&self) -> Result<Job> {
        if self.compress && self.format == DiskFormat::Raw {
            return Err(Error::usage("raw disks cannot be compressed").hint("use --format qcow2"));
        }
        self.refuse_in_place()?;
        self.refuse_foreign_to_the_copy()?;
        let accept = Accepted::parse(&self.accept)?;
        let driver_source = self.virtio_path();
        let mut source = self.source.open()?;
        source.access.inspect.force_dirty = self.force_dirty_volume;
        let machine = self.machine_options(&source.vm)?;
        let firstboot = Preferences {
            none: self.no_firstboot,
            network: self.network,
            macs: Vec::new(),
            user_scripts: self.user_scripts()?,
            uninstall_tools: self.uninstall_tools,
        };
        Ok(Job {
            source,
            engine: Engine::choose(self.source.engine.into())?,
            drivers: DriverOptions {
                source: driver_source,
                config: self.driver_config.clone(),
                require_signed: self.require_signed,
            },
            guest: GuestOptions {
                bootstrap: self.bootstrap.map(BootstrapArg::controller),
                repair_bcd: self.repair_bcd,
                keep_tools: self.keep_tools,
                firstboot,
                linux: self.linux,
                accept,
            },
            copy: self.disk_options()?,
            output: OutputOptions {
                folder: self.output_dir.clone(),
                force: self.force,
                resume: self.resume,
                from_sync: self.from_sync,
                budget: self.budget,
            },
            vm: VmOptions {
                machine,
                emit: self.emit_kinds(),
                kubevirt: self.kubevirt(),
                xml_patch: self.patch()?,
            },
            request: Request::default(),
        })
    }

    fn disk_options(&self) -> Result<DiskOptions> {
        Ok(DiskOptions {
            method: match self.copy {
                _ if self.in_place => Copying::InPlace,
                CopyArg::Now => Copying::Now,
                CopyArg::Later => Copying::Later,
            },
            format: self.format,
            compress: self.compress,
            trim: !self.no_trim,
            verify: self.verify_copy,
            pace: pace(self.bandwidth)?,
            devices: self.output_device.clone(),
            target_is_zero: self.target_is_zero,
        })
    }

    fn machine_options(&self, vm: &SourceVm) -> Result<MachineOptions> {
        Ok(MachineOptions {
            title: title(self.name.as_ref().unwrap_or(&vm.name)),
            name: self.name.clone().unwrap_or_else(|| vm.name.clone()),
            memory_mib: self.memory.or(vm.memory_mib).unwrap_or(4096),
            vcpus: self.vcpus.or(vm.vcpus).unwrap_or(2),
            cores_per_socket: self
                .vcpus
                .is_none()
                .then_some(vm.cores_per_socket)
                .flatten(),
            storage: self.storage,
            domain_type: self.domain_type,
            cpu: self.cpu_mode,
            graphics: self.graphics,
            video: self.video,
            macs: self.mac.clone(),
            nics: vm.nics.clone(),
            network: self.nic_source(),
            threads_per_core: self
                .vcpus
                .is_none()
                .then_some(vm.threads_per_core)
                .flatten(),
            network_map: NetworkMap::new(self.network_map.clone())
                .map_err(|e| Error::usage("--network-map").because(e))?,
            keep_addresses: self.network == Policy::Preserve && !self.no_firstboot,
            probe: PathBuf::new(),
            driver_iso: None,
            drivers: Drivers::default(),
            uuid: vm.uuid,
            serial: vm.serial.clone(),
            genid: vm.genid,
            tpm: self.tpm.map_or(vm.tpm, |s| s == Switch::On),
            no_tpm: self.tpm == Some(Switch::Off),
            secure_boot: self.secure_boot.map_or(vm.secure_boot, |s| s == Switch::On),
            machine_type: self.machine.clone(),
            nvram: PathBuf::new(),
            portable: self.portable,
        })
    }

    /// Refuses options that are incompatible with `--copy later`, which makes overlays, or
    /// `--from-sync`, which continues existing copies.
    fn refuse_foreign_to_the_copy(&self) -> Result<()> {
        let later = self.copy == CopyArg::Later;
        let (option, why) = match self.from_sync {
            true => ("--from-sync", "continues with the copies of a sync"),
            false if later => ("--copy later", "copies nothing now"),
            false => return Ok(()),
        };
        let given = [
            ("--copy later", self.from_sync && later),
            ("--in-place", self.in_place),
            ("--output-device", !self.output_device.is_empty()),
            ("--format raw", self.format == DiskFormat::Raw),
            ("--compress", self.compress),
            ("--verify-copy", self.verify_copy && later),
            ("--resume", self.resume),
        ];
        let stdin = self.source.wire.password_file.as_deref() == Some(Path::new("-"));
        if later && stdin {
            return Err(Error::usage(
                "--copy later leaves the source to be read again, and a password from standard input is gone then",
            )
            .hint("--password-file FILE names a file that only its owner can read"));
        }
        match given.into_iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((other, _)) => Err(Error::usage(format!(
                "{option} {why}, so it does not go with {other}"
            ))
            .hint(format!("leave {other} out, or {option}"))),
        }
    }

    /// Restricts writes to the output's parent directory, the named devices, `place` and temporary
    /// files.
    pub fn confine(&self, place: Option<&Path>) -> Result<()> {
        self.refuse_in_place()?;
        self.refuse_foreign_to_the_copy()?;
        self.source.wire.locate(&self.source.source)?;
        if self.source.starts_a_daemon()? {
            return Ok(());
        }
        if self.dry_run {
            return self.source.confine(None);
        }
        let disks = match self.in_place {
            true => self.source.files_in_place()?,
            false => Vec::new(),
        };
        let output = self.output_dir.as_deref().and_then(Path::parent);
        let output = output.filter(|p| !p.as_os_str().is_empty());
        let there = self.output_device.iter().chain(&disks);
        confine::writes(&Writes {
            folder: Some(output.unwrap_or(Path::new("."))),
            there: there
                .map(PathBuf::as_path)
                .chain(place)
                .chain(self.source.sockets()?)
                .collect(),
        })
    }

    /// Refuses `--in-place` for a remote source: nothing is written on another host.
    pub fn refuse_in_place(&self) -> Result<()> {
        let at = wire::location(&self.source.source, &self.source.wire)?;
        match at.filter(|_| self.in_place) {
            None => Ok(()),
            Some(at) => Err(Error::usage(format!(
                "--in-place writes the source, and nothing is written on another host: {at}"
            ))
            .hint("leave --in-place out: the result is then a copy on this host")),
        }
    }

    fn emit_kinds(&self) -> Vec<Emit> {
        let mut kinds: Vec<Emit> = Vec::new();
        for &kind in &self.emit {
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        kinds
    }

    fn kubevirt(&self) -> kubevirt::Options {
        kubevirt::Options {
            namespace: self.kubevirt_namespace.clone(),
            storage_class: self.kubevirt_storage_class.clone(),
            access_mode: self.kubevirt_access_mode.map(|mode| match mode {
                AccessModeArg::Rwo => "ReadWriteOnce",
                AccessModeArg::Rwx => "ReadWriteMany",
            }),
            instance_type: self.kubevirt_instance_type.clone(),
            preference: self.kubevirt_preference.clone(),
        }
    }

    fn patch(&self) -> Result<Option<Patch>> {
        let Some(path) = &self.xml_patch else {
            return Ok(None);
        };
        let wrong = || Error::usage(format!("reading the patch {}", path.display()));
        let bytes = std::fs::read(path).map_err(|e| wrong().because(e))?;
        let patch = Patch::parse(&bytes).map_err(|e| {
            wrong()
                .because(e)
                .hint("hyper2kvm docs machines describes what --xml-patch takes")
        })?;
        Ok(Some(patch))
    }

    fn user_scripts(&self) -> Result<Vec<Vec<u8>>> {
        let read = |path: &PathBuf| {
            let shown = path.display();
            let kind = path.extension().unwrap_or_default().to_ascii_lowercase();
            if kind != "cmd" && kind != "bat" {
                return Err(
                    Error::usage(format!("{shown} is neither a .cmd nor a .bat file"))
                        .hint("start other programs from a .cmd file"),
                );
            }
            std::fs::read(path)
                .map_err(|e| Error::usage(format!("reading the script {shown}")).because(e))
        };
        self.firstboot.iter().map(read).collect()
    }

    /// The path of the drivers.
    pub fn virtio_path(&self) -> Option<PathBuf> {
        let default = || Some(PathBuf::from(DEFAULT_ISO)).filter(|path| path.exists());
        self.virtio_iso.clone().or_else(default)
    }

    pub fn nic_source(&self) -> NicSource {
        if self.user_network {
            return NicSource::User;
        }
        match (&self.bridge, &self.libvirt_network) {
            (Some(bridge), _) => NicSource::Bridge(Bridge::named(bridge)),
            (None, Some(network)) => NicSource::Network(network.clone()),
            (None, None) => NicSource::Network("default".to_string()),
        }
    }
}

/// Opens what a source was located at: the disk of an NBD server, or a file.
pub(super) fn open_located(
    path: &Path,
    options: &source::Options,
) -> Result<SourceVm, SourceError> {
    match mirror::transport(path).is_export() {
        true => Ok(source::export(path)),
        false => source::open_with(path, options),
    }
}

/// Refuses the description of a running VM, which VMware locks too.
fn refuse_if_vmware_runs_it(source: &Path, vm: &SourceVm) -> Result<()> {
    if vm.kind != SourceKind::Vmx {
        return Ok(());
    }
    let descriptions = match std::fs::read_dir(source) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => vec![source.to_owned()],
    };
    let vmx = |path: &PathBuf| matches!(path.extension(), Some(e) if e == "vmx" || e == "vmtx");
    for path in descriptions.into_iter().filter(vmx) {
        let meta = path.metadata();
        let meta =
            meta.map_err(|e| Error::failed(format!("opening {}", path.display())).because(e))?;
        vmware::refuse_if_locked(&path, meta.ino())?;
    }
    Ok(())
}
