//! What keeps a loader from starting Windows is mended by the plan, or blocks it: for each row the plan is
//! made from a guest in memory, its edits and files are put into the guest, and that is looked at again.

use crate::boot_path::Controller;
use crate::demo::guest::{self, GuestFile};
use crate::demo::pe::{self, Subsystem};
use crate::demo::virtio_win::{self, Layout};
use crate::demo::{Arch, GuestSpec, Leftovers, Role, WinVersion, hives};
use crate::disk::layout::{GPT_ESP, GPT_MSR};
use crate::drivers::Catalogue;
use crate::drivers::media::{Media, Memory};
use crate::error::Blocker;
use crate::guest::{DiskId, FsKind};
use crate::inspect::fake::FakeGuest;
use crate::inspect::{Disk, InspectOptions, SourceFacts, Survey, inspect};
use crate::plan::firstboot::Wishes;
use crate::plan::model::{Action, HiveName};
use crate::plan::{self, Options};
use crate::registry::{KeyTree, RegData, RegOp};
use crate::verify;

use super::prepare::{self, Prepared};

struct Guest {
    spec: GuestSpec,
    system: KeyTree,
    files: Vec<GuestFile>,
}

impl Guest {
    fn new(version: WinVersion) -> Self {
        let spec = GuestSpec {
            leftovers: Leftovers::Vmware,
            arch: if version.nt_at_least(6, 1) {
                Arch::Amd64
            } else {
                Arch::X86
            },
            ..GuestSpec::new(version)
        };
        let system = hives::system_tree(&spec);
        let files = guest::files(&spec).unwrap();
        Self {
            spec,
            system,
            files,
        }
    }

    fn without(&mut self, file: &str) {
        let before = self.files.len();
        let name = file.to_lowercase();
        self.files
            .retain(|f| f.path.name().is_none_or(|n| n.to_lowercase() != name));
        assert!(self.files.len() < before, "{file}");
    }

    fn look<T>(
        &self,
        more: &[(String, Vec<u8>)],
        then: impl FnOnce(&FakeGuest, &Survey) -> T,
    ) -> T {
        let layout = guest::layout(&self.spec);
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
            let contents = if path.to_lowercase().ends_with("\\config\\system") {
                self.system.to_bytes("SYSTEM")
            } else {
                file.contents.clone()
            };
            fake.file(index(file.role), &path, contents);
        }
        for (path, contents) in more {
            fake.file(index(Role::Windows), path, contents.clone());
        }
        let source = SourceFacts {
            path: "guest.raw".into(),
            format: "raw".into(),
            virtual_size_bytes: self.spec.disk_size,
        };
        let disk = Disk {
            id: DiskId::ONLY,
            layout,
            source,
        };
        let survey = inspect(&fake, &[disk], &InspectOptions::default()).unwrap();
        then(&fake, &survey)
    }

    fn prepare(&self, media: &Memory, bootstrap: Option<Controller>) -> Prepared {
        let options = Options {
            bootstrap,
            repair_bcd: false,
            keep_tools: true,
        };
        self.look(&[], |guest, survey| {
            let wishes = Wishes::default();
            prepare::prepare(
                survey,
                guest,
                media,
                &Catalogue::builtin(),
                options,
                &wishes,
            )
            .unwrap()
        })
    }

    /// Puts the plan's edits of the SYSTEM hive and its files in, and checks the result.
    fn converted(&mut self, prepared: &Prepared, media: &Memory) -> Vec<crate::report::Check> {
        self.after(prepared, media, |guest, survey, wanted| {
            verify::verify(survey, guest, wanted)
        })
    }

    /// What the plan leaves, as blockers.
    fn left(&mut self, prepared: &Prepared, media: &Memory) -> Vec<Blocker> {
        let left = self.after(prepared, media, |_, survey, wanted| {
            plan::remaining(&survey.inspection, wanted, Controller::VirtioBlk)
        });
        left.into_iter().map(|one| one.blocker).collect()
    }

    fn after<T>(
        &mut self,
        prepared: &Prepared,
        media: &Memory,
        then: impl FnOnce(&FakeGuest, &Survey, &[Controller]) -> T,
    ) -> T {
        let mut files = Vec::new();
        let media = prepared.media(media);
        for action in &prepared.plan.actions {
            match action {
                Action::EditHive {
                    hive: HiveName::System,
                    edits,
                    ..
                } => edits.ops.iter().for_each(|op| apply(&mut self.system, op)),
                Action::CopyFiles { files: copies, .. } => {
                    for copy in copies {
                        let bytes = media.read(&copy.from).unwrap();
                        files.push((copy.to.to_string(), bytes));
                    }
                }
                _ => {}
            }
        }
        let wanted = prepare::wanted(prepared);
        self.look(&files, |guest, survey| then(guest, survey, &wanted))
    }
}

fn apply(tree: &mut KeyTree, op: &RegOp) {
    match op {
        RegOp::CreateKey { key } => drop(tree.key_mut(key)),
        RegOp::Set { key, name, data } => drop(tree.set(key, name, data.clone())),
        RegOp::DeleteValue { key, name } => {
            if tree.get(key).is_some() {
                let values = &mut tree.key_mut(key).values;
                values.retain(|(n, _)| !n.eq_ignore_ascii_case(name));
            }
        }
        RegOp::DeleteKey { key } => drop(tree.remove(key)),
    }
}

fn media() -> Memory {
    let image = |port: &'static str| {
        move |arch| pe::importing(arch, Subsystem::Native, &[port, "ntoskrnl.exe"])
    };
    let mut files = virtio_win::files(Layout::Iso, &image("storport.sys"));
    // As an old release: for NT 5 one storage driver, which knows the transitional device only.
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
    Memory::new(files)
}

fn bootstrap(version: WinVersion) -> Controller {
    match version.nt_at_least(6, 0) {
        true => Controller::Sata,
        false => Controller::Ide,
    }
}

const SET: &str = "ControlSet001";

fn service(name: &str) -> String {
    format!("{SET}\\Services\\{name}")
}

type Change = fn(&mut Guest);

fn instance(guest: &mut Guest, service: &str, flags: u32) {
    let key = format!("{SET}\\Enum\\PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01\\3&1&0&20");
    let class = "{4d36e97b-e325-11ce-bfc1-08002be10318}";
    guest.system.sz(&key, "ClassGUID", class);
    guest.system.sz(&key, "Service", service);
    guest.system.dword(&key, "ConfigFlags", flags);
}

fn no_ide(guest: &mut Guest) {
    let cdd = format!("{SET}\\Control\\CriticalDeviceDatabase");
    let ids: Vec<String> = guest
        .system
        .get(&cdd)
        .unwrap()
        .keys
        .keys()
        .cloned()
        .collect();
    for id in ids {
        let lower = id.to_lowercase();
        if lower.contains("ide_channel") || lower.contains("8086") || lower.contains("cc_0101") {
            guest.system.remove(&format!("{cdd}\\{id}"));
        }
    }
}

use WinVersion::{Server2003, Server2022, Win7, Win10, Win11, Xp};

/// After the planned actions the disk is ready, and no check has anything to say.
#[test]
fn the_plan_mends_what_stops_a_loader() {
    let cases: &[(&str, &[WinVersion], Change)] = &[
        (
            "unchanged",
            &[Xp, Server2003, Win7, Win10, Win11, Server2022],
            |_| {},
        ),
        (
            "marked for deletion, new driver",
            &[Xp, Win7, Win10, Win11],
            |g| {
                for (value, number) in [("Start", 0), ("Type", 1), ("DeleteFlag", 1)] {
                    g.system.dword(&service("viostor"), value, number);
                }
            },
        ),
        (
            "marked for deletion, driver of Windows",
            &[Xp, Win7, Win10, Win11],
            |g| {
                g.system.dword(&service("disk"), "DeleteFlag", 1);
            },
        ),
        (
            "its file is deleted at the next start",
            &[Xp, Win7, Win10],
            |g| {
                for (value, number) in [("Start", 3), ("Type", 1)] {
                    g.system.dword(&service("viostor"), value, number);
                }
                let file = |name: &str| format!("\\??\\C:\\WINDOWS\\system32\\drivers\\{name}.sys");
                let list = ["viostor", "vioscsi", "disk"].map(|name| [file(name), String::new()]);
                g.system.set(
                    &format!("{SET}\\Control\\Session Manager"),
                    "PendingFileRenameOperations",
                    RegData::MultiSz(list.concat()),
                );
            },
        ),
        ("group of the wrong type", &[Xp, Win7, Win10], |g| {
            g.system.dword(&service("pci"), "Group", 1);
            g.system.dword(&service("disk"), "Group", 1);
        }),
        ("ErrorControl of the wrong type", &[Xp, Win7, Win10], |g| {
            g.system.sz(&service("disk"), "ErrorControl", "1");
        }),
        (
            "Start and Type of the wrong type",
            &[Xp, Win7, Win10],
            |g| {
                let old = RegData::Binary(vec![0, 0, 0, 0]);
                g.system.set(&service("disk"), "Start", old);
                g.system.sz(&service("partmgr"), "Type", "1");
            },
        ),
        ("ImagePath of the wrong type", &[Xp, Win7, Win10], |g| {
            g.system.dword(&service("disk"), "ImagePath", 1);
        }),
        ("ImagePath from SystemRoot", &[Xp, Server2003], |g| {
            for name in ["disk", "atapi"] {
                let path = format!("\\SystemRoot\\System32\\drivers\\{name}.sys");
                g.system.sz(&service(name), "ImagePath", &path);
            }
        }),
        ("ImagePath with a drive letter", &[Xp, Win7, Win10], |g| {
            let path = "\\??\\C:\\Windows\\System32\\drivers\\disk.sys";
            g.system.sz(&service("disk"), "ImagePath", path);
        }),
        ("an entry without a class", &[Xp], |g| {
            let key = format!("{SET}\\Control\\CriticalDeviceDatabase\\pci#ven_8086&dev_7010");
            let key = g.system.key_mut(&key);
            key.values.retain(|(name, _)| name != "ClassGUID");
        }),
        ("installed on SCSI", &[Xp, Server2003], no_ide),
        (
            "installed on SCSI, without the services",
            &[Xp, Server2003],
            |g| {
                no_ide(g);
                g.system.remove(&service("atapi"));
                g.system.remove(&service("intelide"));
            },
        ),
        ("a device that is switched off", &[Win7, Win10], |g| {
            instance(g, "viostor", 1)
        }),
        ("dead filters", &[Xp, Win7, Win10], |g| {
            let class = "{4d36e97d-e325-11ce-bfc1-08002be10318}";
            let key = format!("{SET}\\Control\\Class\\{class}");
            let names = RegData::MultiSz(vec!["gone".into()]);
            g.system.set(&key, "UpperFilters", names);
        }),
    ];
    let media = media();
    for (what, versions, change) in cases {
        for version in *versions {
            let mut guest = Guest::new(*version);
            change(&mut guest);
            let prepared = guest.prepare(&media, Some(bootstrap(*version)));
            assert_eq!(prepared.plan.blockers, [], "{version:?} {what}");
            let checks = guest.converted(&prepared, &media);
            let bad: Vec<_> = checks
                .iter()
                .filter(|c| !c.ok && c.id != "transitional-ids")
                .map(|c| format!("{} {}", c.id, c.message))
                .collect();
            assert_eq!(bad, [""; 0], "{version:?} {what}");
            assert!(verify::is_ready(&checks));
        }
    }
}

/// A blocker before anything is written, with this id, in these words, and with a remedy that helps.
#[test]
fn what_cannot_be_mended_blocks_the_plan() {
    let cases: &[(&[WinVersion], Change, &str, &str, &str)] = &[
        (
            &[Win7, Win10, Win11],
            |g| g.without("storport.sys"),
            "boot-driver-file",
            "viostor: storport.sys, which",
            "sfc /scannow",
        ),
        (
            &[Xp, Server2003],
            |g| g.without("scsiport.sys"),
            "boot-driver-file",
            "SCSIPORT.SYS, which",
            "sfc /scannow",
        ),
        (
            &[Xp, Win7, Win10],
            |g| g.without("ntfs.sys"),
            "boot-driver-file",
            "tfs.sys is missing",
            "sfc /scannow",
        ),
        (
            &[Xp, Win7, Win10],
            |g| g.without("classpnp.sys"),
            "boot-driver-file",
            "CLASSPNP.SYS, which",
            "sfc /scannow",
        ),
        (
            &[Xp, Server2003],
            |g| {
                no_ide(g);
                g.without("intelide.sys");
                g.without("pciide.sys");
            },
            "bootstrap-unbound",
            "no driver of this Windows is bound to the ide controller",
            "--bootstrap none",
        ),
        (
            &[Xp],
            |g| g.without("pciidex.sys"),
            "boot-driver-file",
            "PCIIDEX.SYS, which",
            "--bootstrap none",
        ),
        (
            &[Win10],
            |g| g.without("storahci.sys"),
            "boot-driver-file",
            "storahci.sys is missing",
            "--bootstrap none",
        ),
        (
            &[Win10],
            |g| drop(g.system.remove(&service("volmgrx"))),
            "boot-driver-missing",
            "volmgrx",
            "Windows needs volmgrx on every controller",
        ),
    ];
    let media = media();
    for (versions, change, id, message, remedy) in cases {
        for version in *versions {
            let mut guest = Guest::new(*version);
            change(&mut guest);
            let prepared = guest.prepare(&media, Some(bootstrap(*version)));
            let blockers = guest.left(&prepared, &media);
            let found = blockers.iter().find(|b| b.reason.contains(message));
            let found = found.unwrap_or_else(|| panic!("{version:?} {message}: {blockers:?}"));
            assert_eq!(found.code, *id, "{version:?} {message}");
            assert!(found.remedy.contains(remedy), "{found:?}");
            // No other bus helps where every boot needs the driver.
            let shared = !remedy.contains("bootstrap");
            assert!(!shared || !found.remedy.contains("bootstrap"), "{found:?}");
        }
    }
}

/// A disk that needs no IDE controller is not held up by one.
#[test]
fn straight_to_virtio_needs_no_ide() {
    let media = media();
    let mut guest = Guest::new(Xp);
    no_ide(&mut guest);
    guest.without("pciidex.sys");
    let prepared = guest.prepare(&media, None);
    assert_eq!(prepared.plan.blockers, []);
    let checks = guest.converted(&prepared, &media);
    assert!(verify::is_ready(&checks), "{checks:?}");
}

/// A device that was set up on an older KVM host with another driver is named in the plan and in the checks.
#[test]
fn a_device_of_an_older_host_is_a_warning() {
    let media = media();
    for version in [Win7, Win10] {
        let mut guest = Guest::new(version);
        instance(&mut guest, "other", 0);
        let prepared = guest.prepare(&media, Some(bootstrap(version)));
        let named = "PCI\\VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01\\3&1&0&20";
        assert_eq!(prepared.plan.blockers, []);
        assert!(prepared.plan.warnings.iter().any(|w| w.contains(named)));
        let checks = guest.converted(&prepared, &media);
        let check = checks.iter().find(|c| c.id == "device-instances").unwrap();
        assert!(!check.ok && check.message.contains(named), "{check:?}");
        assert!(verify::is_ready(&checks));
    }
}
