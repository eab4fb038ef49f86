//! Whole guests in memory: generated ones of every kind, and ones around real hives.

mod whole;

use serde_json::json;

use super::fake::FakeGuest;
use super::*;
use crate::demo::{self, GuestSpec, Leftovers, WinVersion};
use crate::disk::layout::{GPT_BASIC_DATA, GPT_ESP, GPT_LDM_DATA, GPT_MSR, Partition};
use crate::drivers::Arch;
use crate::drivers::pe;
use crate::guest::IO_REPARSE_TAG_WOF;
use crate::registry::{KeyTree, RegData, base};
use crate::skip::corpus;
use crate::types::DiskBus;

pub(crate) fn partition(index: u32, type_id: &str, active: bool) -> Partition {
    Partition {
        index,
        type_id: type_id.into(),
        start_bytes: u64::from(index) << 20,
        size_bytes: 1 << 20,
        guid: (type_id.len() > 4).then(|| format!("00000000-0000-0000-0000-00000000000{index}")),
        name: None,
        active,
    }
}

fn layout(scheme: Scheme, guest: &FakeGuest) -> DiskLayout {
    DiskLayout {
        scheme,
        sector_size: 512,
        disk_id: (scheme == Scheme::Mbr).then(|| "0x5cbea03e".to_string()),
        partitions: guest
            .volumes()
            .iter()
            .filter(|v| v.id.partition > 0)
            .map(|v| v.partition.clone())
            .collect(),
    }
}

fn source() -> SourceFacts {
    SourceFacts {
        path: "vm.vmdk".into(),
        format: "vmdk".into(),
        virtual_size_bytes: 1 << 30,
    }
}

fn only(layout: DiskLayout) -> Disk {
    Disk {
        id: DiskId::ONLY,
        layout,
        source: source(),
    }
}

fn run(guest: &FakeGuest, scheme: Scheme) -> Result<Survey, InspectError> {
    inspect(
        guest,
        &[only(layout(scheme, guest))],
        &InspectOptions::default(),
    )
}

fn software(version: &str, build: u32, product: &str, kind: &str) -> KeyTree {
    let mut tree = KeyTree::new("ROOT");
    let key = "Microsoft\\Windows NT\\CurrentVersion";
    tree.sz(key, "CurrentVersion", version)
        .sz(key, "CurrentBuild", &build.to_string())
        .sz(key, "CurrentBuildNumber", &build.to_string())
        .sz(key, "ProductName", product)
        .sz(key, "InstallationType", kind);
    if build >= 10_240 {
        tree.dword(key, "CurrentMajorVersionNumber", 10)
            .dword(key, "CurrentMinorVersionNumber", 0)
            .dword(key, "UBR", 4317)
            .sz(key, "EditionID", "Professional")
            .sz(key, "DisplayVersion", "24H2")
            .sz(key, "ReleaseId", "2009");
    }
    tree
}

/// A SYSTEM hive that boots from SATA without changes.
fn system(product_type: &str) -> KeyTree {
    let mut tree = KeyTree::new("ROOT");
    tree.dword("Select", "Default", 2)
        .dword("Select", "Current", 1)
        .dword("ControlSet001", "unused", 1);
    let set = "ControlSet002";
    for service in [
        "pci", "acpi", "partmgr", "volmgr", "volmgrx", "mountmgr", "disk", "volsnap", "volume",
        "storahci",
    ] {
        let key = format!("{set}\\Services\\{service}");
        tree.dword(&key, "Start", 0).dword(&key, "Type", 1);
    }
    let package = "DriverDatabase\\DriverPackages\\mshdc.inf_amd64_1";
    tree.set(
        "DriverDatabase\\DeviceIds\\PCI\\CC_010601",
        "mshdc.inf",
        RegData::Binary(vec![1, 0xff, 0, 0]),
    )
    .sz(
        "DriverDatabase\\DriverInfFiles\\mshdc.inf",
        "Active",
        "mshdc.inf_amd64_1",
    )
    .sz(
        &format!("{package}\\Descriptors\\PCI\\CC_010601"),
        "Configuration",
        "inst",
    )
    .sz(
        &format!("{package}\\Configurations\\inst"),
        "Service",
        "storahci",
    )
    .sz(
        &format!("{set}\\Control\\ProductOptions"),
        "ProductType",
        product_type,
    )
    .sz(
        &format!("{set}\\Services\\Tcpip\\Parameters"),
        "NV Hostname",
        "guest\u{1b}[1m-1",
    )
    .sz(
        &format!("{set}\\Control\\Session Manager\\Environment"),
        "PROCESSOR_ARCHITECTURE",
        "AMD64",
    )
    .set(
        "MountedDevices",
        "\\DosDevices\\D:",
        RegData::Binary(
            [
                &b"DMIO:ID:"[..],
                &uuid::Uuid::parse_str("00000000-0000-0000-0000-000000000002")
                    .unwrap()
                    .to_bytes_le(),
            ]
            .concat(),
        ),
    );
    tree
}

/// A Windows 11 on a GPT disk, in a directory that is not called Windows.
struct Shape {
    guest: FakeGuest,
    system: KeyTree,
    software: KeyTree,
}

impl Shape {
    fn windows_11() -> Self {
        let mut guest = FakeGuest::default();
        guest.volume(partition(1, GPT_ESP, false), FsKind::Fat);
        guest.volume(partition(2, GPT_BASIC_DATA, false), FsKind::Ntfs);
        guest.file(1, "EFI/Microsoft/Boot/bootmgfw.efi", pe::head(0x8664));
        guest.file(1, "EFI/BOOT/BOOTX64.EFI", pe::head(0x8664));
        guest.file(
            1,
            "EFI/Microsoft/Boot/BCD",
            boot_store("\\Win\\System32\\winload.efi"),
        );
        guest.file(2, "Win/System32/ntoskrnl.exe", pe::head(0x8664));
        guest.file(2, "Win/System32/winload.efi", pe::head(0x8664));
        for driver in [
            "pci", "acpi", "partmgr", "volmgr", "volmgrx", "mountmgr", "disk", "volsnap", "volume",
            "storahci", "ntfs",
        ] {
            let path = format!("Win/System32/drivers/{driver}.sys");
            guest.file(2, &path, pe::head(0x8664));
        }
        guest.file(2, "Windows.old/Windows/System32/config/SYSTEM", vec![]);
        Self {
            guest,
            system: system("WinNT"),
            software: software("6.3", 26_100, "Windows 10 Pro", "Client"),
        }
    }

    fn place(mut self) -> FakeGuest {
        let config = "Win/System32/config";
        let system = self.system.to_bytes("SYSTEM");
        self.guest.file(2, &format!("{config}/SYSTEM"), system);
        let software = self.software.to_bytes("SOFTWARE");
        self.guest.file(2, &format!("{config}/SOFTWARE"), software);
        self.guest
    }

    fn inspect(self) -> Inspection {
        run(&self.place(), Scheme::Gpt).unwrap().inspection
    }
}

/// A BCD whose default entry starts that loader from the boot manager's own device.
fn boot_store(loader: &str) -> Vec<u8> {
    const MANAGER: &str = "Objects\\{9dea862c-5cdd-4e70-acc1-f32b344d4795}";
    const LOADER: &str = "{733b62e5-f608-11eb-825c-c112f60133ab}";
    let mut device = vec![0; 88];
    device[16] = 5;
    let entry = format!("Objects\\{LOADER}");
    let mut store = KeyTree::new("NewStoreRoot");
    store
        .dword(&format!("{MANAGER}\\Description"), "Type", 0x1010_0002)
        .sz(&format!("{MANAGER}\\Elements\\23000003"), "Element", LOADER)
        .dword(&format!("{entry}\\Description"), "Type", 0x1020_0003)
        .sz(&format!("{entry}\\Elements\\12000002"), "Element", loader);
    for code in ["11000001", "21000001"] {
        let key = format!("{entry}\\Elements\\{code}");
        store.set(&key, "Element", RegData::Binary(device.clone()));
    }
    store.to_bytes("BCD")
}

pub(super) fn ids(inspection: &Inspection) -> Vec<&'static str> {
    inspection.findings.iter().map(|f| f.id).collect()
}

#[test]
fn windows_11() {
    let survey = run(&Shape::windows_11().place(), Scheme::Gpt).unwrap();
    let inspection = survey.inspection;
    let json = serde_json::to_value(&inspection).unwrap();
    assert_eq!(
        json["os"],
        json!({
            "family": "windows", "product_name": "Windows 11 Pro", "display_version": "24H2",
            "build": 26100, "revision": 4317, "edition": "Professional",
            "installation_type": "Client", "arch": "x86_64", "control_set": "ControlSet002",
            "windows_root": "\\Win", "hostname": "guest[1m-1",
            "driver_folders": ["w11", "w10"],
        })
    );
    assert_eq!(json["firmware"], "uefi");
    assert_eq!(
        json["hives"],
        json!({
            "system": {"path": "\\Win\\System32\\config\\SYSTEM", "dirty": false, "log_entries_replayable": 0},
            "software": {"path": "\\Win\\System32\\config\\SOFTWARE", "dirty": false, "log_entries_replayable": 0},
            "drivers": null,
            "bcd": {"path": "\\EFI\\Microsoft\\Boot\\BCD", "dirty": false, "log_entries_replayable": 0},
        })
    );
    assert_eq!(json["controllers"]["sata"]["ready"], true);
    assert_eq!(json["controllers"]["sata"]["service"], "storahci");
    assert_eq!(json["controllers"]["virtio-blk"]["ready"], false);
    assert_eq!(json["disks"][0]["partitions"][1]["filesystem"], "ntfs");
    assert_eq!(json["disks"][0]["partitions"][1]["type"], GPT_BASIC_DATA);
    assert_eq!(ids(&inspection), [""; 0]);
    let facts = inspection.windows.unwrap();
    assert_eq!(facts.drive_letter, Some('D'));
    assert_eq!(facts.control_sets, [1, 2].map(ControlSet::new));
    assert_eq!(
        (facts.esp, facts.system_volume),
        (Some(VolumeId::new(1)), VolumeId::new(2))
    );
    assert!(survey.hives.is_some());
}

#[test]
fn versions_by_number() {
    // version, build, name in the hive, type -> name shown, server
    let cases = [
        (
            "6.1",
            7601,
            "Windows 7 Ultimate",
            "Client",
            "WinNT",
            "Windows 7 Ultimate",
            false,
        ),
        (
            "6.3",
            19_045,
            "Windows 10 Pro",
            "Client",
            "WinNT",
            "Windows 10 Pro",
            false,
        ),
        (
            "6.3",
            22_000,
            "Windows 10 Home",
            "Client",
            "WinNT",
            "Windows 11 Home",
            false,
        ),
        (
            "6.3",
            26_100,
            "Windows Server 2025",
            "Server Core",
            "ServerNT",
            "Windows Server 2025",
            true,
        ),
        (
            "6.3",
            20_348,
            "Windows Server 2022",
            "Server",
            "LanmanNT",
            "Windows Server 2022",
            true,
        ),
    ];
    for (version, build, product, kind, product_type, name, server) in cases {
        let shape = Shape {
            software: software(version, build, product, kind),
            system: system(product_type),
            ..Shape::windows_11()
        };
        let inspection = shape.inspect();
        assert_eq!(inspection.os.product_name.as_deref(), Some(name));
        assert_eq!(inspection.os.build, Some(build));
        let target = inspection.windows.unwrap().target;
        assert_eq!(target.server, server, "{name}");
        let expected = if build == 7601 { (6, 1) } else { (10, 0) };
        assert_eq!((target.major, target.minor), expected, "{name}");
    }
}

/// Some tools create hives without it, and `CurrentVersion` stays at 6.3.
#[test]
fn a_build_number_without_a_major_version() {
    for (build, want) in [(9600, (6, 3)), (10_240, (10, 0)), (22_631, (10, 0))] {
        let mut software = software("6.3", 9600, "Windows 10 Pro", "Client");
        let key = "Microsoft\\Windows NT\\CurrentVersion";
        software.sz(key, "CurrentBuild", &build.to_string()).sz(
            key,
            "CurrentBuildNumber",
            &build.to_string(),
        );
        let shape = Shape {
            software,
            ..Shape::windows_11()
        };
        let inspection = shape.inspect();
        let folders = inspection.os.driver_folders.clone();
        let target = inspection.windows.unwrap().target;
        assert_eq!((target.major, target.minor), want, "{build}");
        assert_eq!(folders.contains(&"w11".to_string()), build == 22_631);
    }
}

#[test]
fn only_the_processor_is_unknown() {
    let mut shape = Shape::windows_11();
    shape
        .guest
        .file(2, "Win/System32/ntoskrnl.exe", pe::head(0x1c4));
    let inspection = shape.inspect();
    assert_eq!(inspection.os.build, Some(26_100));
    assert_eq!(ids(&inspection), ["unknown-architecture"]);
    assert!(inspection.findings[0].message.contains("build 26100"));
}

#[test]
fn compact_os_takes_the_processor_from_the_registry() {
    let mut shape = Shape::windows_11();
    shape
        .guest
        .file(2, "Win/System32/ntoskrnl.exe", vec![])
        .reparse_tag = Some(IO_REPARSE_TAG_WOF);
    shape
        .guest
        .file(2, "Win/System32/drivers/storahci.sys", pe::head(0x8664))
        .reparse_tag = Some(IO_REPARSE_TAG_WOF);
    let inspection = shape.inspect();
    assert!(inspection.compact_os);
    assert_eq!(inspection.windows.unwrap().target.arch, Arch::Amd64);
    assert!(inspection.controllers[&DiskBus::Sata].ready);
}

type Change = fn(&mut Shape);

/// Each state is found, with the severity that determines whether to continue.
#[test]
fn states() {
    use Severity::{Blocker, Info, Warning};
    let cases: [(&str, Severity, Change); 17] = [
        ("volume-hibernated", Blocker, |s| {
            s.guest.volume_mut(2).state.hibernated = true;
        }),
        ("volume-dirty", Blocker, |s| {
            s.guest.volume_mut(2).state.dirty = true;
        }),
        ("bitlocker-data", Warning, |s| {
            s.guest
                .volume(partition(3, GPT_BASIC_DATA, false), FsKind::Bitlocker);
        }),
        ("dynamic-disk", Blocker, |s| {
            s.guest
                .volume(partition(3, GPT_LDM_DATA, false), FsKind::Unknown);
        }),
        ("storage-spaces", Blocker, |s| {
            s.guest
                .volume(partition(3, GPT_BASIC_DATA, false), FsKind::StorageSpaces);
        }),
        ("refs-data", Info, |s| {
            s.guest
                .volume(partition(3, GPT_BASIC_DATA, false), FsKind::Refs);
        }),
        ("vss-snapshots", Info, |s| {
            s.guest.volume_mut(2).state.vss_snapshots = true;
        }),
        ("pending-updates", Warning, |s| {
            s.guest.file(2, "Win/WinSxS/pending.xml", vec![]);
        }),
        ("pending-reboot", Warning, |s| {
            s.software.key_mut(
                "Microsoft\\Windows\\CurrentVersion\\Component Based Servicing\\RebootPending",
            );
        }),
        ("pending-renames", Info, |s| {
            let files = vec!["\\??\\C:\\x".to_string(), String::new()];
            s.system.set(
                "ControlSet002\\Control\\Session Manager",
                "PendingFileRenameOperations",
                RegData::MultiSz(files),
            );
        }),
        ("device-install-policy", Warning, |s| {
            let key = "Policies\\Microsoft\\Windows\\DeviceInstall\\Restrictions";
            s.software.dword(key, "DenyUnspecified", 1);
        }),
        ("antivirus", Warning, |s| {
            let key = "ControlSet002\\Services\\CSAgent";
            s.system.dword(key, "Start", 1).dword(key, "Type", 2);
        }),
        ("cluster-node", Warning, |s| {
            s.system
                .dword("ControlSet002\\Services\\ClusSvc", "Start", 2);
        }),
        ("domain-controller", Warning, |s| {
            s.system = system("LanmanNT")
        }),
        ("no-bcd", Blocker, |s| {
            s.guest.remove(1, "EFI/Microsoft/Boot/BCD")
        }),
        ("no-boot-manager", Blocker, |s| {
            s.guest.remove(1, "EFI/Microsoft/Boot/bootmgfw.efi");
        }),
        ("no-control-set", Blocker, |s| {
            s.system.remove("Select");
        }),
    ];
    for (id, severity, change) in cases {
        let mut shape = Shape::windows_11();
        change(&mut shape);
        let inspection = shape.inspect();
        let finding = inspection.findings.iter().find(|f| f.id == id);
        let finding = finding.unwrap_or_else(|| panic!("{id}: {:?}", ids(&inspection)));
        assert_eq!(finding.severity, severity, "{id}");
        assert!(!finding.remedy.is_empty() && !finding.evidence.is_empty());
        assert_eq!(
            inspection.blockers().is_empty(),
            severity != Blocker,
            "{id}"
        );
    }
}

#[test]
fn flags_of_the_document() {
    let mut shape = Shape::windows_11();
    shape.guest.volume_mut(2).state.hibernated = true;
    shape.guest.volume_mut(2).state.vss_snapshots = true;
    shape.guest.file(2, "Win/WinSxS/pending.xml", vec![]);
    let key = "ControlSet002\\Services\\WinDefend";
    shape.system.dword(key, "Start", 2).dword(key, "Type", 16);
    let key = "ControlSet002\\Services\\viostor";
    shape.system.dword(key, "Start", 0).dword(key, "Type", 1);
    shape.system.dword(&format!("{key}\\StartOverride"), "1", 3);
    let json = serde_json::to_value(shape.inspect()).unwrap();
    for (flag, value) in [
        ("hibernated", true),
        ("vss_snapshots", true),
        ("pending_updates", true),
        ("volume_dirty", false),
        ("bitlocker", false),
        ("dynamic_disk", false),
        ("compact_os", false),
        ("group_policy_device_restrictions", false),
    ] {
        assert_eq!(json[flag], value, "{flag}");
    }
    assert_eq!(json["antivirus"], json!(["Microsoft Defender"]));
    assert_eq!(
        json["drivers"]["virtio"],
        json!([{"service": "viostor", "start": 0, "start_override": 3, "image_present": false}])
    );
}

#[test]
fn damaged_and_missing_hives() {
    let config = "Win/System32/config";
    let clean = Shape::windows_11().system.to_bytes("SYSTEM");
    let mut broken_bin = clean.clone();
    broken_bin[4096 + 4] ^= 1;
    let mut dirty = clean.clone();
    dirty[4] ^= 1;
    base::update_checksum(&mut dirty).unwrap();
    let mut dirty_unsound = dirty.clone();
    dirty_unsound[4096 + 32..4096 + 36].copy_from_slice(&5i32.to_le_bytes());
    for (bytes, id, usable) in [
        (broken_bin, "hive-damaged", false),
        (b"regf".to_vec(), "hive-damaged", false),
        (vec![], "hive-damaged", false),
        (clean[..clean.len() - 1].to_vec(), "hive-damaged", false),
        (dirty, "hive-stale", true),
        (dirty_unsound, "hive-damaged", false),
    ] {
        let mut guest = Shape::windows_11().place();
        guest.file(2, &format!("{config}/SYSTEM"), bytes);
        let survey = run(&guest, Scheme::Gpt).unwrap();
        assert_eq!(ids(&survey.inspection), [id]);
        assert_eq!(survey.hives.is_some(), usable, "{id}");
        assert_eq!(survey.inspection.windows.is_some(), usable);
        assert_eq!(survey.inspection.os.family, OsFamily::Windows);
    }
    for hive in ["SYSTEM", "SOFTWARE"] {
        let mut guest = Shape::windows_11().place();
        guest.remove(2, &format!("{config}/{hive}"));
        let survey = run(&guest, Scheme::Gpt).unwrap();
        assert_eq!(ids(&survey.inspection), ["hive-missing"], "{hive}");
        assert!(survey.hives.is_none());
    }
}

#[test]
fn what_is_not_a_windows() {
    type Build = fn(&mut FakeGuest);
    let cases: [(&str, OsFamily, Scheme, Build); 8] = [
        ("linux", OsFamily::Linux, Scheme::Gpt, |g| {
            g.volume(partition(1, GPT_ESP, false), FsKind::Fat);
            g.volume(partition(2, GPT_BASIC_DATA, false), FsKind::Xfs);
        }),
        ("linux", OsFamily::Linux, Scheme::None, |g| {
            g.volume(partition(0, "none", false), FsKind::Ext);
        }),
        ("no-windows", OsFamily::Unknown, Scheme::Mbr, |g| {
            g.volume(partition(1, "0x07", false), FsKind::Ntfs);
            g.file(1, "data/x", vec![]);
        }),
        (
            "no-partition-table",
            OsFamily::Unknown,
            Scheme::None,
            |_| {},
        ),
        ("empty-disk", OsFamily::Unknown, Scheme::Gpt, |_| {}),
        ("no-file-system", OsFamily::Unknown, Scheme::Mbr, |g| {
            g.volume(partition(1, "0x07", false), FsKind::Unknown);
        }),
        ("bitlocker", OsFamily::Windows, Scheme::Gpt, |g| {
            g.volume(partition(1, GPT_ESP, false), FsKind::Fat);
            g.volume(partition(2, GPT_BASIC_DATA, false), FsKind::Bitlocker);
            g.file(1, "EFI/Microsoft/Boot/bootmgfw.efi", vec![]);
        }),
        ("hive-missing", OsFamily::Windows, Scheme::Mbr, |g| {
            g.volume(partition(1, "0x07", true), FsKind::Ntfs);
            g.file(1, "Windows/System32/ntoskrnl.exe", vec![]);
        }),
    ];
    for (id, family, scheme, build) in cases {
        let mut guest = FakeGuest::default();
        build(&mut guest);
        let survey = run(&guest, scheme).unwrap();
        assert_eq!(ids(&survey.inspection), [id]);
        assert_eq!(survey.inspection.blockers().len(), 1, "{id}");
        assert_eq!(survey.inspection.os.family, family, "{id}");
        assert!(survey.hives.is_none() && survey.inspection.controllers.is_empty());
    }
}

#[test]
fn several_installations() {
    let mut guest = Shape::windows_11().place();
    guest.volume(partition(3, GPT_BASIC_DATA, false), FsKind::Ntfs);
    for (volume, root) in [(2, "WINNT"), (3, "Win")] {
        guest.file(volume, &format!("{root}/System32/config/SYSTEM"), vec![]);
    }
    // An expanded WinPE is not counted.
    let mut pe = KeyTree::new("ROOT");
    pe.key_mut("ControlSet001\\Control\\MiniNT");
    guest.file(3, "PE/System32/startnet.cmd", vec![]);
    guest.file(3, "PE/System32/config/SYSTEM", pe.to_bytes("SYSTEM"));
    let pick = |root: Option<&str>| {
        let options = InspectOptions {
            root: root.map(str::to_string),
            ..InspectOptions::default()
        };
        match inspect(&guest, &[only(layout(Scheme::Gpt, &guest))], &options) {
            Ok(survey) => survey.inspection.os.windows_root.unwrap().to_string(),
            Err(error) => error.to_string(),
        }
    };
    for (root, answer) in [
        (
            None,
            r"several Windows installations: 2:\Win, 2:\WINNT, 3:\Win",
        ),
        (
            Some(r"\win"),
            r"several Windows installations: 2:\Win, 3:\Win",
        ),
        (Some(r"2:\win"), r"\Win"),
        (Some("/winnt"), r"\WINNT"),
        // The only disk is the first one.
        (Some(r"1/3:\Win"), r"\Win"),
        (
            Some(r"2/3:\Win"),
            r"no Windows installation at 2/3:\Win; found: 2:\Win, 2:\WINNT, 3:\Win",
        ),
        (
            Some(r"0/3:\Win"),
            r"0/3:\Win is not a Windows root: \Windows, 2:\Windows or 1/2:\Windows is expected",
        ),
        (
            Some(r"\Windows"),
            r"no Windows installation at \Windows; found: 2:\Win, 2:\WINNT, 3:\Win",
        ),
        (
            Some(r"C:\Windows"),
            r"C:\Windows is not a Windows root: \Windows, 2:\Windows or 1/2:\Windows is expected",
        ),
        (
            Some(""),
            r" is not a Windows root: \Windows, 2:\Windows or 1/2:\Windows is expected",
        ),
    ] {
        assert_eq!(pick(root), answer, "{root:?}");
    }
}

pub(super) fn survey_demo(spec: &GuestSpec) -> Survey {
    let layout = demo::guest::layout(spec);
    let mut guest = FakeGuest::default();
    for partition in &layout.partitions {
        let kind = match partition.type_id.as_str() {
            GPT_ESP => FsKind::Fat,
            GPT_MSR => FsKind::Unknown,
            _ => FsKind::Ntfs,
        };
        guest.volume(partition.clone(), kind);
    }
    for file in demo::guest::files(spec).unwrap() {
        let volume = spec.partition(file.role).unwrap().index;
        guest.file(volume, &file.path.to_string(), file.contents);
    }
    inspect(&guest, &[only(layout)], &InspectOptions::default()).unwrap()
}
