//! A whole Windows guest in memory, for tests of decisions. It is the output of `demo`, modified by
//! the test, inspected, planned for, and after the plan. No tool and no file is needed.

pub mod ext;
pub mod ntfs;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, LazyLock};

use crate::actions::{self, Action, CopyFiles, EditHive, EditedHives, PreviewHives};
use crate::block::{BlockWrite, FileDisk};
use crate::check::Check;
use crate::demo::guest::{self, GuestFile};
use crate::demo::pe::{self, Subsystem};
use crate::demo::virtio_win::{self, Layout};
use crate::demo::{Arch, GuestSpec, Leftovers, PartitionSpec, Role, WinVersion, hives};
use crate::disk::layout::{DiskLayout, GPT_ESP, GPT_MSR};
use crate::drivers::Catalogue;
use crate::drivers::driver_source::{DriverSource, Memory};
use crate::drivers::signature;
use crate::error::Blocker;
use crate::guest::ntfs3g::MountOptions;
use crate::guest::{
    DiskId, EmbeddedWriter, FsKind, GuestPath, GuestRead, GuestWrite, Volume, VolumeId,
};
use crate::ids::Accepted;
use crate::inspect::fake::FakeGuest;
use crate::inspect::{Disk, HiveName, Hives, InspectOptions, SourceFacts, Survey, inspect};
use crate::plan::firstboot::Preferences;
use crate::plan::{self, After, Draft, Foreseen, Options};
use crate::registry::{HiveError, HiveView, KeyTree};
use crate::types::DiskBus;
use crate::verify;

use crate::convert::prepare::{self, Basis, Prepared};

/// Bytes that do not repeat and are the same in every run.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

#[derive(Clone)]
pub struct MemoryGuest {
    pub spec: GuestSpec,
    /// The SYSTEM hive; the file of that name in `files` is ignored.
    pub system: KeyTree,
    pub files: Vec<GuestFile>,
    pub layout: DiskLayout,
    /// Applied to the bytes of the SYSTEM hive.
    pub damage: Option<fn(&mut Vec<u8>)>,
    /// Applied to the volume of Windows.
    pub volume: Option<fn(&mut Volume)>,
    /// Applied to the inspection.
    pub survey: Option<fn(&mut Survey)>,
    /// The decisions about the first boot.
    pub preferences: Preferences,
}

impl MemoryGuest {
    pub fn new(version: WinVersion) -> Self {
        let spec = GuestSpec {
            leftovers: Leftovers::Vmware,
            arch: if version.nt_at_least(6, 1) {
                Arch::Amd64
            } else {
                Arch::X86
            },
            ..GuestSpec::new(version)
        };
        Self::of(spec)
    }

    pub fn of(spec: GuestSpec) -> Self {
        Self {
            system: hives::system_tree(&spec),
            files: guest::files(&spec).unwrap(),
            layout: guest::layout(&spec),
            spec,
            damage: None,
            volume: None,
            survey: None,
            preferences: Preferences::default(),
        }
    }

    /// Removes every file of that name.
    pub fn without(&mut self, file: &str) {
        let before = self.files.len();
        let name = file.to_lowercase();
        self.files
            .retain(|f| f.path.name().is_none_or(|n| n.to_lowercase() != name));
        assert!(self.files.len() < before, "{file}");
    }

    /// The contents of the file with that name.
    pub fn file(&mut self, name: &str) -> &mut Vec<u8> {
        let named =
            |f: &&mut GuestFile| f.path.name().is_some_and(|n| n.eq_ignore_ascii_case(name));
        &mut self.files.iter_mut().find(named).unwrap().contents
    }

    /// The bytes of a file as they are on the disk.
    fn contents(&self, file: &GuestFile) -> Vec<u8> {
        let path = file.path.to_string().to_lowercase();
        if !path.ends_with("\\config\\system") {
            return file.contents.clone();
        }
        let mut bytes = self.system.to_bytes("SYSTEM");
        self.damage.iter().for_each(|damage| damage(&mut bytes));
        bytes
    }

    /// Inspects the guest, with additional files on the volume of Windows.
    pub fn look<T>(
        &self,
        more: &[(String, Vec<u8>)],
        then: impl FnOnce(&FakeGuest, &Survey) -> T,
    ) -> T {
        let layout = self.layout.clone();
        let mut fake = FakeGuest::default();
        for partition in &layout.partitions {
            let kind = match partition.type_id.as_str() {
                GPT_ESP => FsKind::Fat,
                GPT_MSR => FsKind::Unknown,
                _ => FsKind::Ntfs,
            };
            fake.volume(partition.clone(), kind);
        }
        let index = |role| self.spec.partition(role).unwrap().index;
        for file in &self.files {
            let path = file.path.to_string();
            fake.file(index(file.role), &path, self.contents(file));
        }
        for (path, contents) in more {
            fake.file(index(Role::Windows), path, contents.clone());
        }
        if let Some(change) = self.volume {
            change(fake.volume_mut(index(Role::Windows)));
        }
        let mut survey = inspect(&fake, &[self.disk()], &InspectOptions::default()).unwrap();
        if let Some(change) = self.survey {
            change(&mut survey);
        }
        then(&fake, &survey)
    }

    pub fn prepare(&self, driver_source: &Memory, bootstrap: Option<DiskBus>) -> Prepared {
        self.prepare_with(driver_source, bootstrap, |_| Accepted::default())
    }

    /// Plans with a modified foresight; `change` returns the accepted identifiers.
    pub fn prepare_with(
        &self,
        driver_source: &Memory,
        bootstrap: Option<DiskBus>,
        change: impl FnOnce(&mut Foreseen<'_>) -> Accepted,
    ) -> Prepared {
        let options = options(bootstrap);
        self.look(&[], |guest, survey| {
            let (catalogue, preferences) = (Catalogue::builtin(), &self.preferences);
            let (draft, basis) = prepare::draft(
                survey,
                guest,
                driver_source,
                &catalogue,
                (options, preferences),
            )
            .unwrap();
            let hives = survey.hives.as_ref().unwrap();
            let mut foreseen = Foreseen {
                options,
                before: &survey.inspection,
                hives,
                volumes: guest.volumes(),
                after: self.after(&draft, &basis, (guest, hives), driver_source),
                wanted: basis.wanted(),
                signatures: signature::review(&basis.drivers, driver_source).unwrap(),
                notes: Vec::new(),
                limits: Vec::new(),
            };
            let accepted = change(&mut foreseen);
            Prepared {
                plan: plan::plan(draft, foreseen, &accepted).unwrap(),
                basis,
                edited: EditedHives::default(),
                backups: None,
                outlook: None,
            }
        })
    }

    /// The guest after the draft, as `convert` sees it before the first write.
    fn after(
        &self,
        draft: &Draft,
        basis: &Basis,
        (guest, hives): (&FakeGuest, &Hives),
        driver_source: &Memory,
    ) -> Result<After, HiveError> {
        let before = PreviewHives {
            before: hives,
            edited: &|_| None,
        };
        let volume = basis.windows.system_volume;
        let driver_source = basis.driver_source(driver_source);
        let preview = actions::preview(&draft.actions, before, volume, guest, &driver_source)?;
        let after = inspect(&preview, &[self.disk()], &InspectOptions::default()).unwrap();
        let walks = verify::walk_all(hives);
        Ok(After {
            checks: verify::predict(&after, walks, &preview, &basis.wanted()),
            inspection: after.inspection,
        })
    }

    pub fn disk(&self) -> Disk {
        let source = SourceFacts {
            path: "guest.raw".into(),
            format: "raw".into(),
            virtual_size_bytes: self.spec.disk_size,
        };
        Disk {
            id: DiskId::ONLY,
            layout: self.layout.clone(),
            source,
        }
    }

    /// Applies the plan and checks the result.
    pub fn converted(&mut self, prepared: &Prepared, driver_source: &Memory) -> Vec<Check> {
        self.apply(prepared, driver_source);
        self.verify(&prepared.basis.wanted())
    }

    pub fn verify(&self, wanted: &[DiskBus]) -> Vec<Check> {
        self.look(&[], |guest, survey| verify::verify(survey, guest, wanted))
    }

    /// The blockers that remain after the plan.
    pub fn left(&mut self, prepared: &Prepared, driver_source: &Memory) -> Vec<Blocker> {
        self.apply(prepared, driver_source);
        let wanted = prepared.basis.wanted();
        let left = self.look(&[], |_, survey| {
            plan::remaining(&survey.inspection, &wanted, DiskBus::VirtioBlk)
        });
        left.into_iter().map(|one| one.blocker).collect()
    }

    /// The disk of the guest as a sparse file: the boot partition is FAT, and the volumes of NTFS are only read.
    pub fn write(&self, path: &Path) {
        guest::create_table(&self.spec, path).unwrap();
        for partition in self.spec.partitions() {
            let mut files = BTreeMap::new();
            for file in self.files.iter().filter(|file| file.role == partition.role) {
                files.insert(file.path.clone(), self.contents(file));
            }
            match partition.role {
                Role::Esp => self.write_fat(path, &partition, &files),
                Role::Msr => {}
                _ => {
                    let hidden = partition.start / u64::from(self.spec.sector_size);
                    let disk = FileDisk::open_rw(path).unwrap();
                    let pieces = ntfs::volume(partition.size, hidden as u32, &files);
                    for (at, bytes) in pieces {
                        disk.write_at(partition.start + at, &bytes).unwrap();
                    }
                }
            }
        }
    }

    fn write_fat(
        &self,
        path: &Path,
        partition: &PartitionSpec,
        files: &BTreeMap<GuestPath, Vec<u8>>,
    ) {
        guest::format_fat(&self.spec, path, partition).unwrap();
        let disk = Arc::new(FileDisk::open_rw(path).unwrap());
        let options = MountOptions::default();
        let mut writer = Box::new(EmbeddedWriter::new(disk, &self.layout, options));
        let volume = VolumeId::new(partition.index);
        let mut made = BTreeSet::new();
        for (path, contents) in files {
            let mut folder = GuestPath::root();
            for part in path.parent().unwrap_or_default().parts() {
                folder = folder.join(part).unwrap();
                if made.insert(folder.clone()) {
                    writer.create_dir(volume, &folder).unwrap();
                }
            }
            writer.write_file(volume, path, contents).unwrap();
        }
        writer.close().unwrap();
    }

    /// Applies the plan to the guest, except to its boot files.
    pub fn apply(&mut self, prepared: &Prepared, driver_source: &Memory) {
        let driver_source = prepared.basis.driver_source(driver_source);
        for action in &prepared.plan.actions {
            match action {
                Action::EditHive(EditHive {
                    hive: HiveName::System,
                    edits,
                    ..
                }) => edits.apply(&mut self.system),
                Action::EditHive(EditHive { hive, edits, .. }) => {
                    let bytes = self.file(hive.file_name());
                    let view = HiveView::new(bytes).unwrap();
                    let mut tree = KeyTree::from_view(&view).unwrap();
                    edits.apply(&mut tree);
                    *bytes = tree.to_bytes(hive.file_name());
                }
                Action::CopyFiles(CopyFiles { files: copies, .. }) => {
                    for copy in copies {
                        self.files.push(GuestFile {
                            role: Role::Windows,
                            path: copy.to.clone(),
                            contents: driver_source.read(&copy.from).unwrap(),
                        });
                    }
                }
                _ => {}
            }
        }
    }
}

/// The default options of `convert`, with `--keep-tools`.
pub fn options(bootstrap: Option<DiskBus>) -> Options {
    Options {
        bootstrap,
        repair_bcd: false,
        keep_tools: true,
        storage: DiskBus::VirtioBlk,
        require_signed: false,
        force_dirty: false,
    }
}

/// A virtio-win driver source with drivers for every Windows.
pub fn driver_source() -> Memory {
    static FILES: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(driver_source_files);
    Memory::new(FILES.iter().cloned())
}

fn driver_source_files() -> Vec<(String, Vec<u8>)> {
    let image = |port: &'static str| {
        move |arch| pe::importing(arch, Subsystem::Native, &[port, "ntoskrnl.exe"])
    };
    let mut files = virtio_win::files(Layout::Iso, &image("storport.sys"));
    // Like an old release: for NT 5 one storage driver, which supports only the transitional
    // device.
    let old = virtio_win::files(Layout::Iso, &image("SCSIPORT.SYS"));
    for (path, bytes) in old {
        let Some(name) = path.strip_prefix("viostor/w7/x86/") else {
            continue;
        };
        let bytes = match name.ends_with(".inf") {
            true => String::from_utf8(bytes)
                .unwrap()
                .lines()
                .filter(|line| !line.contains("DEV_1042") && !line.ends_with('\\'))
                .collect::<Vec<_>>()
                .join("\r\n")
                .replace(".6.1", "")
                .into_bytes(),
            false => bytes,
        };
        files.push((format!("viostor/xp/x86/{name}"), bytes.clone()));
        files.push((format!("viostor/2k3/x86/{name}"), bytes));
    }
    files
}

/// The controller of the first boot that `convert` chooses.
pub fn bootstrap(version: WinVersion) -> DiskBus {
    match version.nt_at_least(6, 0) {
        true => DiskBus::Sata,
        false => DiskBus::Ide,
    }
}
