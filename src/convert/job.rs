//! Everything the user decided.

use std::path::{Path, PathBuf};

use crate::domain::{DiskFormat, Emit, Patch, kubevirt};
use crate::drivers::catalogue::Catalogue;
use crate::drivers::driver_source::DriverSource;
use crate::drivers::origin;
use crate::error::{Error, Result};
use crate::ids::Accepted;
use crate::plan::firstboot::Preferences;
use crate::plan::linux::LinuxChoice;
use crate::report::Request;
use crate::transfer::Pace;
use crate::types::DiskBus;

use super::machine::MachineOptions;
use super::name::safe_name;
use crate::session::SourceMachine;
use crate::session::engine::Engine;

/// Default path of the ISO in packages of the virtio-win project.
pub const DEFAULT_ISO: &str = "/usr/share/virtio-win/virtio-win.iso";

pub struct Job {
    pub source: SourceMachine,
    pub engine: Engine,
    pub drivers: DriverOptions,
    pub guest: GuestOptions,
    pub copy: DiskOptions,
    pub output: OutputOptions,
    pub vm: VmOptions,
    /// The command line, copied into the report unchanged.
    pub request: Request,
}

/// The origin of the drivers.
pub struct DriverOptions {
    /// The virtio-win driver source; a Linux guest needs none.
    pub source: Option<PathBuf>,
    pub config: Vec<PathBuf>,
    /// Refuse drivers without a valid catalogue instead of warning.
    pub require_signed: bool,
}

/// Changes to the guest.
pub struct GuestOptions {
    /// `None`: the user did not choose a first boot.
    pub bootstrap: Option<Option<DiskBus>>,
    /// `--repair-bcd`.
    pub repair_bcd: bool,
    /// Leave the old hypervisor's services unchanged.
    pub keep_tools: bool,
    pub firstboot: Preferences,
    /// The preferred method for Linux guests.
    pub linux: LinuxChoice,
    /// Problems at the start of Windows that do not stop the conversion.
    pub accept: Accepted,
}

/// The options of the copy.
pub struct DiskOptions {
    pub method: Copying,
    pub format: DiskFormat,
    pub compress: bool,
    /// Leave out unneeded data: free space and page files.
    pub trim: bool,
    /// Compare source and copy after the copy.
    pub verify: bool,
    pub(crate) pace: Option<Pace>,
    /// Block devices to copy to instead of files: one per disk, the Windows disk first.
    pub devices: Vec<PathBuf>,
    /// Whether the devices read as zeroes.
    pub target_is_zero: bool,
}

/// The time at which the disks are copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Copying {
    #[default]
    Now,
    /// The VM starts on overlays, `pull` copies.
    Later,
    /// Nothing is copied: the source is changed.
    InPlace,
}

/// The output directory, and which parts of an earlier run are reused.
pub struct OutputOptions {
    /// `None`: named after the VM.
    pub folder: Option<PathBuf>,
    pub force: bool,
    /// Continue an interrupted copy.
    pub resume: bool,
    /// Make the last pass of a sync.
    pub from_sync: bool,
    /// Upper limit for the last pass, in seconds.
    pub budget: Option<u64>,
}

/// The description of the VM.
pub struct VmOptions {
    /// The conversion fills in the paths.
    pub machine: MachineOptions,
    /// Further formats besides the domain XML.
    pub emit: Vec<Emit>,
    pub kubevirt: kubevirt::Options,
    pub xml_patch: Option<Patch>,
}

impl DiskOptions {
    pub fn is_in_place(&self) -> bool {
        self.method == Copying::InPlace
    }
}

impl Job {
    pub(super) fn name(&self) -> String {
        safe_name(&self.vm.machine.name)
    }

    /// The file name of disk `i` in the output directory.
    pub(super) fn file_name(&self, i: usize) -> String {
        let suffix = match i {
            0 => String::new(),
            i => format!("-{i}"),
        };
        format!("{}{suffix}.{}", self.name(), self.copy.format.as_str())
    }

    pub(super) fn target_folder(&self) -> PathBuf {
        let named = self.output.folder.clone();
        named.unwrap_or_else(|| PathBuf::from(format!("{}-kvm", self.name())))
    }

    /// The files of the source and of the images below them, as far as they can be read at this
    /// point.
    pub(super) fn source_files(&self) -> Vec<PathBuf> {
        let source = &self.source;
        let mut files = vec![source.path.clone()];
        for disk in &source.vm.disks {
            files.push(disk.path.clone());
            if let Ok(image) = (source.access).image(&disk.path, disk.format.as_deref()) {
                files.extend(image.files().map(Path::to_path_buf));
            }
        }
        files
    }
}

impl DriverOptions {
    pub fn catalogue(&self) -> Result<Catalogue> {
        let mut catalogue = Catalogue::builtin();
        for file in &self.config {
            catalogue.merge_file(file).map_err(|e| {
                Error::usage(format!("reading the driver catalogue {}", file.display()))
                    .because(e)
                    .hint("hyper2kvm docs drivers describes the format")
            })?;
        }
        Ok(catalogue)
    }

    /// The driver source if the user named one. Whether a missing one is an error depends on the
    /// guest.
    pub(super) fn source_if_named(&self) -> Result<Option<Box<dyn DriverSource>>> {
        self.source.as_ref().map(|_| self.source()).transpose()
    }

    pub fn source(&self) -> Result<Box<dyn DriverSource>> {
        let Some(path) = &self.source else {
            let error = Error::usage("no virtio-win drivers were named");
            return Err(origin::hints(DEFAULT_ISO)
                .into_iter()
                .fold(error, Error::hint));
        };
        origin::open(path, &self.catalogue()?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::job;
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn files_are_named_after_the_vm_and_numbered_from_its_second_disk() {
        let mut job = job(&["/a.raw".into(), "/b.raw".into()], Path::new("/out"));
        job.vm.machine.name = "my vm".into();
        let names = |job: &Job| [0, 1, 10].map(|i| job.file_name(i));
        assert_eq!(
            names(&job),
            ["my-vm.qcow2", "my-vm-1.qcow2", "my-vm-10.qcow2"]
        );
        job.copy.format = DiskFormat::Raw;
        assert_eq!(names(&job)[1], "my-vm-1.raw");
        assert_eq!(job.target_folder(), Path::new("/out"));
        job.output.folder = None;
        assert_eq!(job.target_folder(), Path::new("my-vm-kvm"));
    }

    #[test]
    fn every_file_of_the_catalogue_is_read_and_the_last_one_counts() {
        let dir = tempfile::tempdir().unwrap();
        let mut job = job(&["/a.raw".into()], Path::new("/out"));
        let files = ["a.yaml", "b.yaml"].map(|name| dir.path().join(name));
        for file in &files {
            std::fs::write(file, "nonsense: [").unwrap();
        }
        for (i, file) in files.iter().enumerate() {
            job.drivers.config = files.to_vec();
            job.drivers.config[1 - i] = dir.path().join("empty.yaml");
            std::fs::write(&job.drivers.config[1 - i], "{}").unwrap();
            let error = job.drivers.catalogue().map(drop).unwrap_err();
            assert!(error.message.contains(file.to_str().unwrap()), "{error}");
        }
    }

    /// None of them is replaced by the result.
    #[test]
    fn the_files_of_the_source_are_its_description_its_disks_and_what_they_stand_on() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = ["a.raw", "b.raw"].map(|name| dir.path().join(name));
        std::fs::write(&a, vec![0; 1 << 20]).unwrap();
        let mut job = job(&[a.clone(), b.clone()], dir.path());
        job.source.path = dir.path().join("vm.vmx");
        let below = dir.path().join("below.raw");
        std::fs::write(&below, vec![0; 1 << 20]).unwrap();
        let snapshot = super::super::written_tests::snapshot(&below);
        let mut vm = crate::source::export(&snapshot);
        vm.disks[0].format = Some("qcow2".into());
        job.source.vm.disks.extend(vm.disks);
        let files = job.source_files();
        // One that cannot be opened is the source's all the same.
        for file in [&job.source.path, &a, &b, &snapshot, &below] {
            assert!(files.contains(file), "{file:?} {files:?}");
        }
    }

    /// Its drivers may be known to the user only.
    #[test]
    fn a_driver_of_the_users_own_catalogue_makes_a_directory_a_driver_source() {
        let dir = tempfile::tempdir().unwrap();
        let (driver_source, config) = (dir.path().join("media"), dir.path().join("own.yaml"));
        std::fs::create_dir(&driver_source).unwrap();
        std::fs::write(driver_source.join("owndisk.inf"), "[Version]\n").unwrap();
        let text = "drivers:\n  - { name: owndisk, role: other, folders: [owndisk], inf: [owndisk.inf] }\n";
        std::fs::write(&config, text).unwrap();
        let mut job = job(&["/a.raw".into()], Path::new("/out"));
        job.drivers.source = Some(driver_source);
        let error = job.drivers.source().map(drop).unwrap_err();
        assert!(
            error.message.contains("no virtio-win driver source"),
            "{error}"
        );
        job.drivers.config = vec![config];
        let files = job.drivers.source().unwrap().files().len();
        assert_eq!(files, 1);
        assert!(job.drivers.source_if_named().unwrap().is_some());
    }

    #[test]
    fn drivers_are_asked_for_where_none_were_named() {
        let mut job = job(&["/a.raw".into()], Path::new("/out"));
        assert!(job.drivers.source_if_named().unwrap().is_none());
        let error = job.drivers.source().map(drop).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Usage);
        assert!(!error.hints.is_empty());
        job.drivers.source = Some("/no/such.iso".into());
        assert!(job.drivers.source_if_named().is_err());
        job.drivers.config = vec!["/no/such.yaml".into()];
        let error = job.drivers.catalogue().map(drop).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Usage);
        assert!(error.message.contains("/no/such.yaml"), "{error}");
    }
}
