//! The table measured on real hives, and the effect of each single change. `hivexregedit` makes the
//! changed hives, independently of hyper2kvm.

use std::path::Path;

use super::*;
use crate::registry::{KeyTree, RegData};
use crate::skip::{corpus, corpus_if_there, have};
use crate::tool::Cmd;
use crate::types::{Arch, ControlSet};

/// hivexregedit does not create the parents of a key.
fn with_parents(reg: &str) -> String {
    let mut text = String::from("Windows Registry Editor Version 5.00\n");
    for line in reg.lines() {
        if let Some(key) = line.strip_prefix('[').filter(|k| !k.starts_with('-')) {
            for (end, _) in key.match_indices('\\').skip(1) {
                text += &format!("[{}]\n\n", &key[..end]);
            }
        }
        text += &format!("{line}\n");
    }
    text
}

/// The hive with a `.reg` text merged by hivexregedit; `None` if the tool is not installed.
fn merged(hive: &[u8], reg: &str) -> Option<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let (file, text) = (dir.path().join("SYSTEM"), dir.path().join("x.reg"));
    std::fs::write(&file, hive).unwrap();
    std::fs::write(&text, with_parents(reg)).unwrap();
    let merge = Cmd::new("hivexregedit").args(["--merge", "--prefix", "X", "--"]);
    if !have(&["hivexregedit"]) {
        return None;
    }
    merge.args([&file, &text]).run().unwrap();
    Some(std::fs::read(&file).unwrap())
}

/// Registry facts as text: the part of a real hive that the boot path reads.
mod model {
    use crate::registry::{KeyTree, Value};

    pub fn text(tree: &KeyTree) -> String {
        let mut text = String::new();
        write(tree, "", &mut text);
        text
    }

    fn write(key: &KeyTree, path: &str, text: &mut String) {
        if !path.is_empty() {
            text.push_str(&format!("\n[{path}]\n"));
        }
        for (name, value) in &key.values {
            let data: Vec<String> = value.data.iter().map(|b| format!("{b:02x}")).collect();
            let shown = match (value.ty, &value.data[..]) {
                (4, [a, b, c, d]) => {
                    format!("dword:{:08x}", u32::from_le_bytes([*a, *b, *c, *d]))
                }
                (1, bytes) if plain(bytes).is_some() => format!("\"{}\"", plain(bytes).unwrap()),
                (ty, _) => format!("hex({ty:x}):{}", data.join(",")),
            };
            text.push_str(&format!("\"{name}\"={shown}\n"));
        }
        for child in key.keys.values() {
            let below = match path {
                "" => child.name.clone(),
                path => format!("{path}\\{}", child.name),
            };
            write(child, &below, text);
        }
    }

    /// A string of printable ASCII that ends in one NUL.
    fn plain(bytes: &[u8]) -> Option<String> {
        let text = bytes.strip_suffix(&[0, 0])?;
        let units = text.chunks(2).map(|pair| match pair {
            [c @ 0x20..0x7f, 0] if *c != b'"' => Some(char::from(*c)),
            _ => None,
        });
        units.collect()
    }

    pub fn tree(text: &str) -> KeyTree {
        let mut tree = KeyTree::new("ROOT");
        let mut path = "";
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(key) = line.strip_prefix('[') {
                path = key.strip_suffix(']').unwrap();
                tree.key_mut(path);
                continue;
            }
            let (name, data) = line.strip_prefix('"').unwrap().split_once("\"=").unwrap();
            let value = match data.split_once(':') {
                Some(("dword", number)) => {
                    let number = u32::from_str_radix(number, 16).unwrap();
                    Value {
                        ty: 4,
                        data: number.to_le_bytes().to_vec(),
                    }
                }
                Some((kind, bytes)) if kind.starts_with("hex(") => {
                    let bytes = bytes.split(',').filter(|b| !b.is_empty());
                    Value {
                        ty: u32::from_str_radix(&kind[4..kind.len() - 1], 16).unwrap(),
                        data: bytes.map(|b| u8::from_str_radix(b, 16).unwrap()).collect(),
                    }
                }
                _ => {
                    let text = data.trim_matches('"').encode_utf16().chain([0]);
                    Value {
                        ty: 1,
                        data: text.flat_map(u16::to_le_bytes).collect(),
                    }
                }
            };
            tree.set_value(path, name, value);
        }
        tree
    }

    pub fn hive(text: &str) -> Vec<u8> {
        tree(text).to_bytes("SYSTEM")
    }
}

/// The models match the corpus. `HYPER2KVM_UPDATE=1` rewrites them.
#[test]
fn the_models_are_facts_of_the_corpus() {
    for (name, file, part) in [
        ("win7-vmware", WIN7, boot_part_7 as fn(&[u8]) -> KeyTree),
        ("win10-vmware", WIN10, boot_part),
    ] {
        let Some(hive) = corpus(file) else {
            return;
        };
        let text = model::text(&part(&hive));
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/boot_path/models/{name}.reg"));
        if std::env::var_os("HYPER2KVM_UPDATE").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "{name}");
        assert_eq!(model::text(&model::tree(&text)), text, "{name}");
    }
}

const WIN7: &str = "win7-x86-vmware/SYSTEM";
const WIN10: &str = "win10-vmware/SYSTEM";

struct Guest {
    hive: Vec<u8>,
    nt: (u32, u32),
    arch: Arch,
}

impl Guest {
    /// The facts of a real hive stored here, and the hive itself if the corpus exists.
    fn windows_7() -> Vec<Self> {
        let guest = |hive| Self {
            hive,
            nt: (6, 1),
            arch: Arch::X86,
        };
        let model = model::hive(include_str!("models/win7-vmware.reg"));
        [Some(model), corpus_if_there(WIN7)]
            .into_iter()
            .flatten()
            .map(guest)
            .collect()
    }

    fn windows_10() -> Vec<Self> {
        let guest = |hive| Self {
            hive,
            nt: (10, 0),
            arch: Arch::Amd64,
        };
        let model = model::hive(include_str!("models/win10-vmware.reg"));
        [Some(model), corpus_if_there(WIN10)]
            .into_iter()
            .flatten()
            .map(guest)
            .collect()
    }

    fn with(&self, reg: &str) -> Option<Self> {
        Some(Self {
            hive: merged(&self.hive, reg)?,
            ..*self
        })
    }

    fn evaluate(&self, controller: DiskBus) -> BootPath {
        self.evaluate_with(controller, &|_| ImageState::Present {
            machine: Some(self.arch.pe_machine()),
        })
    }

    fn evaluate_with(
        &self,
        controller: DiskBus,
        image: &dyn Fn(&GuestPath) -> ImageState,
    ) -> BootPath {
        let system = HiveView::new(&self.hive).unwrap();
        let root = GuestPath::parse("\\Windows").unwrap();
        let ctx = BootContext {
            system: &system,
            control_set: &ControlSet::new(1),
            windows_root: &root,
            nt: self.nt,
            arch: self.arch,
            image: &|path| image(path).into(),
        };
        evaluate(&ctx, controller)
    }
}

fn table(guest: &Guest) -> Vec<(&'static str, bool, Option<String>, String)> {
    let row = |c: DiskBus| {
        let path = guest.evaluate(c);
        (c.name(), path.ready, path.service, path.reason)
    };
    DiskBus::ALL.into_iter().map(row).collect()
}

#[test]
fn measured_windows_7() {
    for guest in Guest::windows_7() {
        insta::allow_duplicates! {
            insta::assert_compact_debug_snapshot!(table(&guest), @r##"[("sata", false, Some("msahci"), "msahci does not start at boot (Start=3)"), ("ide", true, Some("intelide"), "PCI\\VEN_8086&DEV_7010 is driven by intelide (VEN_8086&DEV_7010 in CriticalDeviceDatabase)"), ("virtio-blk", false, None, "no driver is bound to PCI\\VEN_1AF4&DEV_1042 in the CriticalDeviceDatabase"), ("virtio-scsi", false, None, "no driver is bound to PCI\\VEN_1AF4&DEV_1048 in the CriticalDeviceDatabase")]"##);
        }
    }
}

#[test]
fn measured_windows_10() {
    for guest in Guest::windows_10() {
        insta::allow_duplicates! {
            insta::assert_compact_debug_snapshot!(table(&guest), @r##"[("sata", true, Some("storahci"), "PCI\\VEN_8086&DEV_2922 is driven by storahci (CC_010601 in mshdc.inf)"), ("ide", true, Some("intelide"), "PCI\\VEN_8086&DEV_7010 is driven by intelide (VEN_8086&DEV_7010 in mshdc.inf)"), ("virtio-blk", false, None, "no driver is bound to PCI\\VEN_1AF4&DEV_1042 in the DriverDatabase"), ("virtio-scsi", false, None, "no driver is bound to PCI\\VEN_1AF4&DEV_1048 in the DriverDatabase")]"##);
        }
    }
}

/// The part of a Windows 10 hive that the boot path reads: small enough to be changed and written
/// quickly.
fn boot_part(hive: &[u8]) -> KeyTree {
    let mut paths = vec![
        "DriverDatabase\\DriverInfFiles\\mshdc.inf".to_string(),
        MSHDC.to_string(),
    ];
    for id in ["CC_010601", "CC_0101", "VEN_8086&DEV_7010"] {
        paths.push(format!("DriverDatabase\\DeviceIds\\PCI\\{id}"));
    }
    let services = [
        "pci",
        "acpi",
        "partmgr",
        "volmgr",
        "volmgrx",
        "mountmgr",
        "disk",
        "volsnap",
        "volume",
        "storahci",
        "intelide",
        "pciide",
        "atapi",
        "EhStorClass",
        "fvevol",
        "iorate",
        "rdyboost",
    ];
    part(hive, &paths, &services)
}

/// The same part of a Windows 7 hive.
fn boot_part_7(hive: &[u8]) -> KeyTree {
    let paths = [
        "PCI#CC_0101",
        "PCI#CC_010601",
        "PCI#VEN_8086&DEV_7010",
        "Primary_IDE_Channel",
        "Secondary_IDE_Channel",
    ]
    .map(|id| format!("ControlSet001\\Control\\CriticalDeviceDatabase\\{id}"));
    let services = [
        "pci", "acpi", "partmgr", "volmgr", "volmgrx", "mountmgr", "disk", "volsnap", "msahci",
        "intelide", "pciide", "atapi", "fvevol", "rdyboost",
    ];
    part(hive, &paths, &services)
}

/// Leaves out data that no boot depends on, such as the plan of ReadyBoost.
fn prune(key: &mut KeyTree) {
    key.values.retain(|(_, value)| value.data.len() < 4096);
    key.keys.values_mut().for_each(|key| prune(key));
}

fn part(hive: &[u8], paths: &[String], services: &[&str]) -> KeyTree {
    let view = HiveView::new(hive).unwrap();
    let mut tree = KeyTree::new("ROOT");
    let services = services
        .iter()
        .map(|service| format!("{SERVICES}\\{service}"));
    for path in paths.iter().cloned().chain(services) {
        let key = view.key(&path).unwrap().unwrap();
        let mut key = KeyTree::from_key(&key).unwrap();
        prune(&mut key);
        *tree.key_mut(&path) = key;
    }
    for (guid, _) in CLASSES {
        let path = format!("ControlSet001\\Control\\Class\\{guid}");
        let key = view.key(&path).unwrap().unwrap();
        tree.key_mut(&path).values = key.values().unwrap();
    }
    tree
}

const SERVICES: &str = "ControlSet001\\Services";
const MSHDC: &str = "DriverDatabase\\DriverPackages\\mshdc.inf_amd64_18632ebfbf46b676";

fn dword(tree: &mut KeyTree, service: &str, name: &str, value: u32) {
    tree.dword(&format!("{SERVICES}\\{service}"), name, value);
}

fn drop_value(tree: &mut KeyTree, key: &str, name: &str) {
    tree.key_mut(key).values.retain(|(n, _)| n != name);
}

/// Each single fault is found and named in the reason.
#[test]
fn one_fault_at_a_time() {
    use DiskBus::{Ide, Sata};
    type Change = fn(&mut KeyTree);
    for guest in Guest::windows_10() {
        let whole = boot_part(&guest.hive);
        let cases: [(&str, DiskBus, Change); 19] = [
            // Only "1" is not zero, and "0" is.
            (
                "storahci does not start at boot (Start=0, but StartOverride=3)",
                Sata,
                |t| {
                    dword(t, "storahci\\StartOverride", "0", 0);
                    dword(t, "storahci\\StartOverride", "1", 3);
                },
            ),
            ("storahci does not start at boot (Start=3)", Sata, |t| {
                dword(t, "storahci", "Start", 3);
            }),
            ("storahci is not a kernel driver (Type=16)", Sata, |t| {
                dword(t, "storahci", "Type", 0x10);
            }),
            (
                "the service key storahci exists but has no driver",
                Sata,
                |t| {
                    t.key_mut("ControlSet001\\Services\\storahci")
                        .values
                        .clear();
                },
            ),
            ("the driver storahci is not installed", Sata, |t| {
                t.remove("ControlSet001\\Services\\storahci");
            }),
            ("the ImagePath of storahci is not a path", Sata, |t| {
                t.sz(
                    "ControlSet001\\Services\\storahci",
                    "ImagePath",
                    "..\\x.sys",
                );
            }),
            // Hyper-V generation 2 guests have no PCI bus.
            (
                "pci does not start at boot (Start=0, but StartOverride=3)",
                Sata,
                |t| {
                    dword(t, "pci\\StartOverride", "0", 3);
                },
            ),
            ("the driver volmgrx is not installed", Sata, |t| {
                t.remove("ControlSet001\\Services\\volmgrx");
            }),
            ("volume does not start at boot (Start=4)", Sata, |t| {
                dword(t, "volume", "Start", 4);
            }),
            (
                "LowerFilters of Volume names fvevol, which is disabled: stop 0x7B",
                Sata,
                |t| {
                    dword(t, "fvevol", "Start", 4);
                },
            ),
            (
                "LowerFilters of Volume names iorate, which is disabled: stop 0x7B",
                Ide,
                |t| {
                    dword(t, "iorate\\StartOverride", "2", 4);
                },
            ),
            (
                "UpperFilters of hdc names gone, which is not installed: stop 0x7B",
                Sata,
                |t| {
                    let key = format!("ControlSet001\\Control\\Class\\{HDC}");
                    t.set(&key, "UpperFilters", RegData::MultiSz(vec!["gone".into()]));
                },
            ),
            (
                "no driver is bound to PCI\\VEN_8086&DEV_2922 in the DriverDatabase (mshdc.inf staged only)",
                Sata,
                |t| {
                    t.remove(&format!("{MSHDC}\\Descriptors\\PCI\\CC_010601"));
                },
            ),
            (
                "no driver is bound to PCI\\VEN_8086&DEV_2922 in the DriverDatabase (mshdc.inf staged only)",
                Sata,
                |t| {
                    drop_value(
                        t,
                        &format!("{MSHDC}\\Configurations\\msahci_Inst"),
                        "Service",
                    );
                },
            ),
            (
                "no driver is bound to PCI\\VEN_8086&DEV_2922 in the DriverDatabase (mshdc.inf staged only)",
                Sata,
                |t| {
                    drop_value(t, "DriverDatabase\\DriverInfFiles\\mshdc.inf", "Active");
                },
            ),
            (
                "no driver is bound to PCI\\VEN_8086&DEV_2922 in the DriverDatabase (mshdc.inf staged only)",
                Sata,
                |t| {
                    let ids = vec!["PCI\\VEN_8086&DEV_2922".to_string()];
                    let key = format!("{MSHDC}\\Configurations\\msahci_Inst");
                    t.set(&key, "ExcludeIds", RegData::MultiSz(ids));
                },
            ),
            (
                "no driver is bound to PCI\\VEN_8086&DEV_2922 in the DriverDatabase",
                Sata,
                |t| {
                    t.remove("DriverDatabase");
                },
            ),
            ("atapi does not start at boot (Start=3)", Ide, |t| {
                dword(t, "atapi", "Start", 3);
            }),
            // pciide would work, but the more specific id decides.
            ("intelide does not start at boot (Start=3)", Ide, |t| {
                dword(t, "intelide", "Start", 3);
                t.remove("ControlSet001\\Services\\pciide\\StartOverride");
            }),
        ];
        let evaluate = |tree: &KeyTree, controller| {
            let hive = tree.to_bytes("SYSTEM");
            Guest { hive, ..guest }.evaluate(controller)
        };
        assert!(evaluate(&whole, Sata).ready && evaluate(&whole, Ide).ready);
        for (reason, controller, change) in cases {
            let mut tree = whole.clone();
            change(&mut tree);
            let path = evaluate(&tree, controller);
            assert_eq!((path.ready, path.reason.as_str()), (false, reason));
            assert_eq!(path.faults.len(), 1, "{reason}");
            assert_eq!(path.steps.iter().filter(|s| !s.ok).count(), 1);
        }
        // `volume` appeared in a build after NT 6.2: its absence is no fault.
        let mut tree = whole.clone();
        tree.remove("ControlSet001\\Services\\volume");
        assert!(evaluate(&tree, Sata).ready);
        // A filter that starts late is ignored.
        dword(&mut tree, "fvevol", "Start", 1);
        assert!(evaluate(&tree, Sata).ready);
    }
}

/// Without a driver for the real id, the class decides.
#[test]
fn ide_by_class() {
    for guest in Guest::windows_10() {
        let mut tree = boot_part(&guest.hive);
        tree.remove("DriverDatabase\\DeviceIds\\PCI\\VEN_8086&DEV_7010");
        let hive = tree.to_bytes("SYSTEM");
        let path = Guest { hive, ..guest }.evaluate(DiskBus::Ide);
        assert_eq!(path.service.as_deref(), Some("pciide"));
        assert_eq!(
            path.reason,
            "pciide does not start at boot (Start=0, but StartOverride=3)"
        );
    }
}

/// Windows XP on IDE: no DriverDatabase, other bus drivers, and channels that may be unknown.
#[test]
fn nt_5_on_ide() {
    let mut tree = KeyTree::new("ROOT");
    for service in [
        "pci", "ftdisk", "partmgr", "mountmgr", "disk", "intelide", "atapi",
    ] {
        dword(&mut tree, service, "Start", 0);
        dword(&mut tree, service, "Type", 1);
    }
    let cdd = "ControlSet001\\Control\\CriticalDeviceDatabase";
    let bind = |tree: &mut KeyTree, id: &str, service: &str| {
        tree.sz(&format!("{cdd}\\{id}"), "Service", service).sz(
            &format!("{cdd}\\{id}"),
            "ClassGUID",
            HDC,
        );
    };
    bind(&mut tree, "pci#ven_8086&dev_7010", "intelide");
    let evaluate = |tree: &KeyTree, controller| {
        let guest = Guest {
            hive: tree.to_bytes("SYSTEM"),
            nt: (5, 1),
            arch: Arch::X86,
        };
        guest.evaluate(controller)
    };
    let path = evaluate(&tree, DiskBus::Ide);
    assert!(!path.ready);
    assert!(
        matches!(&path.faults[..], [BootFault::NotBound { ids, decides: true, spare: Some("atapi") }] if ids[1] == "Primary_IDE_Channel")
    );
    bind(&mut tree, "Primary_IDE_Channel", "atapi");
    let path = evaluate(&tree, DiskBus::Ide);
    assert!(path.ready && path.faults.is_empty(), "{}", path.reason);
    assert!(!evaluate(&tree, DiskBus::Sata).ready);
    // On i440fx the virtio disk is the transitional one.
    bind(&mut tree, "PCI#VEN_1AF4&DEV_1001", "viostor");
    dword(&mut tree, "viostor", "Start", 0);
    dword(&mut tree, "viostor", "Type", 1);
    assert!(evaluate(&tree, DiskBus::VirtioBlk).ready);
    dword(&mut tree, "ftdisk", "Start", 4);
    assert!(!evaluate(&tree, DiskBus::VirtioBlk).ready);
}

#[test]
fn images_are_looked_at() {
    for guest in Guest::windows_10() {
        let cases = [
            (ImageState::Missing, Some("storahci.sys is missing")),
            (ImageState::Unreadable, Some("is not a usable driver file")),
            (
                ImageState::Present {
                    machine: Some(Arch::X86.pe_machine()),
                },
                Some("is for x86, Windows is x86_64"),
            ),
            (ImageState::Present { machine: None }, None),
        ];
        for (state, reason) in cases {
            let path = guest.evaluate_with(DiskBus::Sata, &|path| {
                if path.name() == Some("storahci.sys") {
                    state
                } else {
                    ImageState::Present { machine: None }
                }
            });
            assert_eq!(path.ready, reason.is_none());
            assert!(path.reason.contains(reason.unwrap_or("storahci")));
        }
    }
}

const VIOSTOR: &str = "oem9.inf_amd64_0011223344556677";

/// The chain for viostor, with the given ids.
fn with_viostor(tree: &mut KeyTree, ids: &[&str]) {
    let package = format!("DriverDatabase\\DriverPackages\\{VIOSTOR}");
    dword(tree, "viostor", "Start", 0);
    dword(tree, "viostor", "Type", 1);
    tree.sz(
        "DriverDatabase\\DriverInfFiles\\oem9.inf",
        "Active",
        VIOSTOR,
    )
    .sz(
        &format!("{package}\\Configurations\\scsi_inst"),
        "Service",
        "viostor",
    );
    for id in ids {
        tree.sz(
            &format!("DriverDatabase\\DeviceIds\\PCI\\{id}"),
            "oem9.inf",
            "",
        )
        .sz(
            &format!("{package}\\Descriptors\\PCI\\{id}"),
            "Configuration",
            "scsi_inst",
        );
    }
}

const MODERN: &str = "VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01";
const TRANSITIONAL: &str = "VEN_1AF4&DEV_1001&SUBSYS_00021AF4&REV_00";

#[test]
fn virtio_needs_the_modern_id() {
    for guest in Guest::windows_10() {
        for (ids, ready, faults) in [
            (&[MODERN, TRANSITIONAL][..], true, 0),
            (&["ven_1af4&dev_1042", "ven_1af4&dev_1001"], true, 0),
            (&[MODERN], true, 1),
            (&[TRANSITIONAL], false, 1),
            // The id of the network adapter.
            (&["VEN_1AF4&DEV_1041"], false, 2),
        ] {
            let mut tree = boot_part(&guest.hive);
            with_viostor(&mut tree, ids);
            let changed = Guest {
                hive: tree.to_bytes("SYSTEM"),
                ..guest
            };
            let path = changed.evaluate(DiskBus::VirtioBlk);
            assert_eq!(path.ready, ready, "{ids:?}: {}", path.reason);
            assert_eq!(path.faults.len(), faults, "{ids:?}");
            assert!(!changed.evaluate(DiskBus::VirtioScsi).ready);
        }
    }
}

/// The same chain merged into the real hive by hivexregedit.
#[test]
fn virtio_chain_in_a_merged_hive() {
    for guest in Guest::windows_10() {
        let (db, id) = ("X\\DriverDatabase", MODERN);
        let Some(changed) = guest.with(&format!(
        "\n[X\\{SERVICES}\\viostor]\n\"Start\"=dword:00000000\n\"Type\"=dword:00000001\n\
         \n[{db}\\DriverInfFiles\\oem9.inf]\n\"Active\"=\"{VIOSTOR}\"\n\
         \n[{db}\\DeviceIds\\PCI\\{id}]\n\"oem9.inf\"=hex:01,ff,00,00\n\
         \n[{db}\\DriverPackages\\{VIOSTOR}\\Descriptors\\PCI\\{id}]\n\"Configuration\"=\"scsi_inst\"\n\
         \n[{db}\\DriverPackages\\{VIOSTOR}\\Configurations\\scsi_inst]\n\"Service\"=\"viostor\"\n"
    )) else {
        continue;
    };
        let path = changed.evaluate(DiskBus::VirtioBlk);
        assert!(path.ready, "{}", path.reason);
        assert_eq!(path.service.as_deref(), Some("viostor"));
    }
}

/// Of two packages for the same id, Windows uses the one with the newer DriverVer.
#[test]
fn newest_package_wins() {
    for guest in Guest::windows_10() {
        let mut tree = boot_part(&guest.hive);
        let id = "VEN_1AF4&DEV_1042";
        let mut package = |inf: &str, service: &str, date: u64| {
            let name = format!("{inf}_amd64_0123456789abcdef");
            let key = format!("DriverDatabase\\DriverPackages\\{name}");
            let mut version = vec![0; 48];
            version[24..32].copy_from_slice(&date.to_le_bytes());
            tree.set(&key, "Version", RegData::Binary(version))
                .sz(&format!("{key}\\Configurations\\i"), "Service", service)
                .sz(
                    &format!("{key}\\Descriptors\\PCI\\{id}"),
                    "Configuration",
                    "i",
                )
                .sz(
                    &format!("DriverDatabase\\DriverInfFiles\\{inf}"),
                    "Active",
                    &name,
                )
                .sz(&format!("DriverDatabase\\DeviceIds\\PCI\\{id}"), inf, "");
            Guest {
                hive: tree.to_bytes("SYSTEM"),
                ..guest
            }
            .evaluate(DiskBus::VirtioBlk)
            .service
        };
        assert_eq!(package("oem8.inf", "old", 0x0100).as_deref(), Some("old"));
        assert_eq!(package("oem9.inf", "new", 0x01ff).as_deref(), Some("new"));
        assert_eq!(package("oem7.inf", "older", 0x00ff).as_deref(), Some("new"));
    }
}

#[test]
fn windows_7_reads_the_critical_device_database() {
    for guest in Guest::windows_7() {
        let service = r"X\ControlSet001\services\viostor";
        let cdd = r"X\ControlSet001\Control\CriticalDeviceDatabase";
        let Some(changed) = guest.with(&format!(
        "\n[{service}]\n\"Start\"=dword:00000000\n\"Type\"=dword:00000001\n\"ImagePath\"=\"system32\\\\drivers\\\\viostor.sys\"\n\
         \n[{cdd}\\pci#ven_1af4&dev_1042]\n\"Service\"=\"viostor\"\n\"ClassGUID\"=\"{SCSI_ADAPTER}\"\n\
         \n[X\\ControlSet001\\services\\msahci]\n\"Start\"=dword:00000000\n"
    )) else {
        continue;
    };
        assert!(changed.evaluate(DiskBus::VirtioBlk).ready);
        assert!(changed.evaluate(DiskBus::Sata).ready);
        // NT 5 has the transitional device.
        let nt5 = Guest {
            nt: (5, 2),
            ..changed
        };
        let path = nt5.evaluate(DiskBus::VirtioBlk);
        assert!(!path.ready && path.reason.contains("DEV_1001"));
    }
}

/// A damaged hive produces a verdict, not a panic.
#[test]
fn damage_is_a_reason() {
    for guest in Guest::windows_10() {
        let mut hive = guest.hive.clone();
        for (i, byte) in hive.iter_mut().enumerate().skip(8192) {
            if i % 97 == 0 {
                *byte ^= 0x5a;
            }
        }
        let guest = Guest { hive, ..guest };
        for controller in DiskBus::ALL {
            let path = guest.evaluate(controller);
            assert!(!path.ready);
            let damaged = path.faults.iter().find_map(|fault| match fault {
                BootFault::Damaged(text) => Some(text),
                _ => None,
            });
            if let Some(text) = damaged {
                let told = format!("the SYSTEM hive cannot be read: {text}");
                assert!(path.steps.iter().any(|s| !s.ok && s.text == told), "{told}");
            }
        }
    }
}
