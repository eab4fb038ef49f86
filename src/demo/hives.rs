//! The SYSTEM, SOFTWARE and DRIVERS hives of a guest, in the shape of real ones.

use uuid::Uuid;

use super::driver_database::{self as database, DISK_DRIVE, HDC, NET, SCSI_ADAPTER, VOLUME};
use super::{
    Arch, DISK_GUID, Firmware, GuestSpec, Leftovers, MBR_SIGNATURE, Role, network, services,
};
use crate::registry::KeyTree;
use crate::registry::RegData;

/// `System32\config\SYSTEM`, or the bytes in the specification.
pub fn system(spec: &GuestSpec) -> Vec<u8> {
    match &spec.system_hive {
        Some(bytes) => bytes.clone(),
        None => system_tree(spec).to_bytes("\\SystemRoot\\System32\\Config\\SYSTEM"),
    }
}

/// `System32\config\SOFTWARE`, or the bytes in the specification.
pub fn software(spec: &GuestSpec) -> Vec<u8> {
    match &spec.software_hive {
        Some(bytes) => bytes.clone(),
        None => software_tree(spec).to_bytes("\\SystemRoot\\System32\\Config\\SOFTWARE"),
    }
}

/// `System32\config\DRIVERS`, for Windows 8.1 and later.
pub fn drivers(spec: &GuestSpec) -> Option<Vec<u8>> {
    spec.version.has_driver_database().then(|| {
        let mut root = KeyTree::new("DRIVERS");
        database::drivers(spec, &mut root);
        root.to_bytes("\\SystemRoot\\System32\\Config\\DRIVERS")
    })
}

/// A hive that only has to exist: SAM, SECURITY, DEFAULT.
pub fn placeholder(name: &str) -> Vec<u8> {
    let mut root = KeyTree::new(name);
    root.key_mut(name);
    root.to_bytes(&format!("\\SystemRoot\\System32\\Config\\{name}"))
}

pub fn system_tree(spec: &GuestSpec) -> KeyTree {
    let mut root = KeyTree::new("ROOT");
    let set = control_set(spec);
    for number in 1..=2 {
        let mut set = set.clone();
        set.name = format!("ControlSet00{number}");
        root.keys
            .insert(crate::registry::name::fold(&set.name), Box::new(set));
    }
    let current = spec.control_set;
    root.dword("Select", "Current", current);
    root.dword("Select", "Default", current);
    root.dword("Select", "Failed", 0);
    root.dword("Select", "LastKnownGood", 3 - current.clamp(1, 2));
    if spec.version.has_driver_database() {
        database::system(spec, &mut root);
    }
    hardware_config(spec, &mut root);
    mounted_devices(spec, &mut root);
    setup(&mut root);
    root
}

fn setup(root: &mut KeyTree) {
    for (name, text) in [
        ("CmdLine", ""),
        ("OsLoaderPath", "\\"),
        ("SystemPartition", "\\Device\\HarddiskVolume1"),
        ("WorkingDirectory", "C:\\WINDOWS\\Panther"),
    ] {
        root.sz("Setup", name, text);
    }
    for name in [
        "OOBEInProgress",
        "RestartSetup",
        "SetupPhase",
        "SetupType",
        "SystemSetupInProgress",
    ] {
        root.dword("Setup", name, 0);
    }
    root.dword("Setup", "SetupSupported", 1);
}

/// Writes one key for every VM that the installation has seen, by its SMBIOS UUID.
fn hardware_config(spec: &GuestSpec, root: &mut KeyTree) {
    if !spec.version.has_driver_database() {
        return;
    }
    let id = "{25194d56-caef-8737-5c44-50fe82f3ffde}";
    let key = format!("HardwareConfig\\{id}");
    let (maker, product) = match spec.leftovers {
        Leftovers::None => ("Demo", "Demo machine"),
        Leftovers::Vmware => ("VMware, Inc.", "VMware Virtual Platform"),
        Leftovers::HyperV => ("Microsoft Corporation", "Virtual Machine"),
    };
    root.sz("HardwareConfig", "LastConfig", id);
    root.dword("HardwareConfig", "LastId", 0);
    root.dword(&key, "Id", 0);
    root.sz(&key, "SystemManufacturer", maker);
    root.sz(&key, "SystemProductName", product);
}

fn mounted_devices(spec: &GuestSpec, root: &mut KeyTree) {
    let id = |role: Role| -> Option<RegData> {
        let partition = spec.partition(role)?;
        let mut data;
        match spec.firmware {
            Firmware::Uefi => {
                data = b"DMIO:ID:".to_vec();
                data.extend(role.guid().to_bytes_le());
            }
            Firmware::Bios => {
                data = MBR_SIGNATURE.to_le_bytes().to_vec();
                data.extend(partition.start.to_le_bytes());
            }
        }
        Some(RegData::Binary(data))
    };
    for (role, letter) in [
        (Role::Windows, Some("C:")),
        (Role::Recovery, None),
        (Role::SystemReserved, None),
    ] {
        let Some(data) = id(role) else { continue };
        let volume = format!("\\??\\Volume{}", role.guid().braced());
        root.set("MountedDevices", &volume, data.clone());
        if let Some(letter) = letter {
            let name = format!("\\DosDevices\\{letter}");
            root.set("MountedDevices", &name, data);
        }
    }
    let cdrom = "\\??\\SCSI#CdRom&Ven_DEMO&Prod_CD01#5&1982005&0&000000#{53f5630d-b6bf-11d0-94f2-00a0c91efb8b}";
    let cdrom: Vec<u8> = cdrom.encode_utf16().flat_map(u16::to_le_bytes).collect();
    root.set("MountedDevices", "\\DosDevices\\D:", RegData::Binary(cdrom));
}

fn control_set(spec: &GuestSpec) -> KeyTree {
    let mut set = KeyTree::new("");
    services::write(spec, &mut set);
    control(spec, &mut set);
    classes(spec, &mut set);
    network::write(spec, &mut set);
    devices(spec, &mut set);
    if !spec.version.has_driver_database() {
        database::critical_devices(spec, &mut set);
    }
    for key in ["Hardware Profiles\\0001", "Policies"] {
        set.key_mut(key);
    }
    set
}

fn control(spec: &GuestSpec, set: &mut KeyTree) {
    let name = "Control\\ComputerName\\ComputerName";
    set.sz(name, "", "mnmsrvc")
        .sz(name, "ComputerName", &spec.hostname);

    let zone = "Control\\TimeZoneInformation";
    set.dword(zone, "ActiveTimeBias", 0x1a4)
        .dword(zone, "Bias", 0x1e0);
    set.dword(zone, "DaylightBias", 0xffff_ffc4)
        .dword(zone, "StandardBias", 0);
    set.sz(zone, "DaylightName", "@tzres.dll,-211");
    set.sz(zone, "StandardName", "@tzres.dll,-212");
    set.sz(zone, "TimeZoneKeyName", "Pacific Standard Time");

    let product = "Control\\ProductOptions";
    let kind = if spec.version.is_server() {
        "ServerNT"
    } else {
        "WinNT"
    };
    let suite = if spec.version.nt_at_least(6, 0) {
        vec!["Terminal Server".into()]
    } else {
        vec![]
    };
    set.sz(product, "ProductType", kind);
    set.set(product, "ProductSuite", RegData::MultiSz(suite));

    let manager = "Control\\Session Manager";
    let environment = format!("{manager}\\Environment");
    let arch = match spec.arch {
        Arch::X86 => "x86",
        Arch::Amd64 => "AMD64",
        Arch::Arm64 => "ARM64",
    };
    set.sz(&environment, "OS", "Windows_NT");
    set.sz(&environment, "PROCESSOR_ARCHITECTURE", arch);
    set.set(
        &environment,
        "windir",
        RegData::ExpandSz("%SystemRoot%".into()),
    );
    let pagefile = RegData::MultiSz(vec!["?:\\pagefile.sys".into()]);
    set.set(
        &format!("{manager}\\Memory Management"),
        "PagingFiles",
        pagefile,
    );
    set.dword(&format!("{manager}\\Power"), "HiberbootEnabled", 0);

    set.sz("Control", "SystemStartOptions", " NOEXECUTE=OPTIN");
    let windows = spec.partition(Role::Windows).map_or(1, |p| p.index);
    let boot = spec.partition(spec.boot_role()).map_or(1, |p| p.index);
    let arc = |n: u32| format!("multi(0)disk(0)rdisk(0)partition({n})");
    set.sz("Control", "FirmwareBootDevice", &arc(boot));
    set.sz("Control", "SystemBootDevice", &arc(windows));
    let firmware = match spec.firmware {
        Firmware::Bios => 1,
        Firmware::Uefi => 2,
    };
    if spec.version.has_driver_database() {
        set.dword("Control", "PEFirmwareType", firmware);
        set.dword("Control", "BootDriverFlags", 0x1c);
    }
    set.dword("Services\\partmgr\\Parameters", "SanPolicy", 1);
}

/// Writes device setup classes, with the filters of every Windows.
fn classes(spec: &GuestSpec, set: &mut KeyTree) {
    let eight = spec.version.has_driver_database();
    let vista = spec.version.nt_at_least(6, 0);
    let key = |class: Uuid| format!("Control\\Class\\{}", class.braced());
    for (class, name) in [
        (NET, "Net"),
        (HDC, "HDC"),
        (SCSI_ADAPTER, "SCSIAdapter"),
        (DISK_DRIVE, "DiskDrive"),
        (VOLUME, "Volume"),
    ] {
        set.sz(&key(class), "Class", name);
    }
    let mut filters = |class: Uuid, side: &str, names: &[&str]| {
        let names = names.iter().map(ToString::to_string).collect();
        set.set(&key(class), side, RegData::MultiSz(names));
    };
    filters(DISK_DRIVE, "UpperFilters", &["partmgr"]);
    if eight {
        filters(DISK_DRIVE, "LowerFilters", &["EhStorClass"]);
        filters(VOLUME, "UpperFilters", &["volsnap"]);
    }
    if spec.version.nt_at_least(10, 0) {
        filters(VOLUME, "LowerFilters", &["fvevol", "iorate", "rdyboost"]);
    } else if vista {
        filters(VOLUME, "LowerFilters", &["fvevol", "rdyboost"]);
    } else {
        filters(VOLUME, "UpperFilters", &["VolSnap"]);
    }
}

/// Writes the storage devices that Windows has seen.
fn devices(spec: &GuestSpec, set: &mut KeyTree) {
    let mut add = |instance: &str, class: Uuid, service: &str, ids: &[&str]| {
        let key = format!("Enum\\{instance}");
        let ids = ids.iter().map(ToString::to_string).collect();
        set.set(&key, "HardwareID", RegData::MultiSz(ids));
        set.sz(&key, "ClassGUID", &class.braced().to_string());
        set.sz(&key, "Driver", &format!("{}\\0000", class.braced()));
        set.sz(&key, "Service", service);
        set.dword(&key, "ConfigFlags", 0);
    };
    match spec.leftovers {
        Leftovers::Vmware => {
            let nt5 = !spec.version.nt_at_least(6, 0);
            let (device, service) = if nt5 {
                ("0030", "symmpi")
            } else {
                ("0054", "LSI_SAS")
            };
            let id = format!("PCI\\VEN_1000&DEV_{device}&SUBSYS_197615AD&REV_01");
            add(
                &format!("{id}\\4&2509f6e&0&00A8"),
                SCSI_ADAPTER,
                service,
                &[id.as_str(), &id[..21]],
            );
            if spec.firmware == Firmware::Bios {
                let id = "PCI\\VEN_8086&DEV_7111&SUBSYS_197615AD&REV_01";
                let ids = &[id, "PCI\\VEN_8086&DEV_7111&CC_01018A"];
                add(&format!("{id}\\3&61aaa01&0&39"), HDC, "intelide", ids);
            }
        }
        Leftovers::HyperV if spec.version.has_driver_database() => add(
            "VMBUS\\{ba6163d9-04a1-4d29-b605-72e2ffb1dc7f}\\{f8b3781a-1e82-4818-a1c3-63d806ec15bb}",
            SCSI_ADAPTER,
            "storvsc",
            &["VMBUS\\{ba6163d9-04a1-4d29-b605-72e2ffb1dc7f}"],
        ),
        _ if spec.version.has_driver_database() => add(
            "PCI\\VEN_8086&DEV_2922&SUBSYS_11001AF4&REV_02\\3&13c0b0c5&0&FA",
            HDC,
            "storahci",
            &["PCI\\VEN_8086&DEV_2922&CC_010601"],
        ),
        _ => {}
    }
    // The disk by its identity, as in `Enum\STORAGE\Volume`.
    let disk = match spec.firmware {
        Firmware::Uefi => DISK_GUID.braced().to_string(),
        Firmware::Bios => format!("{MBR_SIGNATURE:x}"),
    };
    let start = spec.partition(Role::Windows).map_or(0, |p| p.start);
    let volume = format!("STORAGE\\Volume\\{disk}#{start:016X}");
    add(&volume, VOLUME, "volume", &["STORAGE\\Volume"]);
}

const CURRENT: &str = "Microsoft\\Windows\\CurrentVersion";
const PROGRAMS: &str = "C:\\Program Files";

pub fn software_tree(spec: &GuestSpec) -> KeyTree {
    let mut root = KeyTree::new("ROOT");
    version_of_windows(&mut root, spec);
    root.sz(CURRENT, "ProgramFilesDir", PROGRAMS);
    root.sz(
        CURRENT,
        "CommonFilesDir",
        &format!("{PROGRAMS}\\Common Files"),
    );
    let device_path = RegData::ExpandSz("%SystemRoot%\\inf".into());
    root.set(CURRENT, "DevicePath", device_path);
    root.key_mut(&format!("{CURRENT}\\Run"));
    root.key_mut(&format!("{CURRENT}\\Uninstall"));
    if spec.version.has_driver_database() {
        let files = format!("{CURRENT}\\Setup\\PnpLockdownFiles");
        let file = format!("{files}\\%SystemRoot%/System32/drivers/storahci.sys");
        root.dword(&file, "Class", 4);
        root.set(&file, "Owners", RegData::MultiSz(vec!["mshdc.inf".into()]));
    }
    if spec.leftovers == Leftovers::Vmware {
        vmware_tools(&mut root);
    }
    for key in ["Classes", "Clients", "ODBC", "Policies\\Microsoft\\Windows"] {
        root.key_mut(key);
    }
    if spec.arch == Arch::Amd64 {
        root.key_mut("Wow6432Node\\Microsoft\\Windows\\CurrentVersion\\Uninstall");
    }
    root
}

/// Writes `Windows NT\CurrentVersion`, with the values of each version.
fn version_of_windows(root: &mut KeyTree, spec: &GuestSpec) {
    let version = spec.version;
    let facts = version.facts();
    let (major, minor) = facts.nt;
    let nt = "Microsoft\\Windows NT\\CurrentVersion";
    let build = facts.build.to_string();
    // Windows 10 and later still have 6.3 here.
    let shown = match facts.nt {
        (10, _) => "6.3".to_string(),
        _ => format!("{major}.{minor}"),
    };
    root.sz(nt, "ProductName", facts.product_name);
    root.sz(nt, "CurrentVersion", &shown);
    root.sz(nt, "CurrentBuild", &build)
        .sz(nt, "CurrentBuildNumber", &build);
    root.sz(nt, "CurrentType", "Multiprocessor Free");
    root.sz(nt, "SystemRoot", &format!("C:\\{}", spec.windows_dir));
    root.sz(nt, "RegisteredOwner", "Demo");
    if version.nt_at_least(6, 0) {
        root.sz(nt, "EditionID", facts.edition);
        let kind = if version.is_server() {
            "Server"
        } else {
            "Client"
        };
        root.sz(nt, "InstallationType", kind);
        let arch = match spec.arch {
            Arch::X86 => "x86fre",
            Arch::Amd64 => "amd64fre",
            Arch::Arm64 => "arm64fre",
        };
        let lab = format!("{build}.1.{arch}.demo_release.231201-0000");
        root.sz(nt, "BuildLabEx", &lab);
    }
    if let Some(pack) = facts.service_pack {
        root.sz(nt, "CSDVersion", pack);
    }
    if version.nt_at_least(6, 3) {
        root.dword(nt, "UBR", facts.revision);
    }
    if version.nt_at_least(10, 0) {
        root.dword(nt, "CurrentMajorVersionNumber", major);
        root.dword(nt, "CurrentMinorVersionNumber", minor);
        if let Some(release) = facts.release {
            // DisplayVersion appeared in 20H2, and ReleaseId stopped at 2009.
            let shown = facts.build >= 19042;
            root.sz(nt, "ReleaseId", if shown { "2009" } else { release });
            if shown {
                root.sz(nt, "DisplayVersion", release);
            }
        }
    }
}

/// Writes VMware Tools: their installer, and the programs they start.
fn vmware_tools(root: &mut KeyTree) {
    let key = format!("{CURRENT}\\Uninstall\\{{FE2F6A2C-196E-4210-9C04-2B1BC21F07EF}}");
    root.sz(&key, "DisplayName", "VMware Tools");
    root.sz(&key, "DisplayVersion", "12.3.5.22544099");
    root.sz(&key, "Publisher", "VMware, Inc.");
    let place = format!("{PROGRAMS}\\VMware\\VMware Tools\\");
    root.sz(&key, "InstallLocation", &place);
    let command = "MsiExec.exe /X{FE2F6A2C-196E-4210-9C04-2B1BC21F07EF}";
    root.set(&key, "UninstallString", RegData::ExpandSz(command.into()));
    root.dword(&key, "WindowsInstaller", 1);
    scheduled_task(root, &format!("{place}update.exe"));
    let run = format!("{CURRENT}\\Run");
    let tool = format!("\"{place}vmtoolsd.exe\" -n vmusr");
    root.sz(&run, "VMware User Process", &tool);
    root.sz("VMware, Inc.\\VMware Tools", "InstallPath", &place);
}

/// Writes a task of the hypervisor's tools to the index of the task scheduler.
fn scheduled_task(root: &mut KeyTree, program: &str) {
    let cache = "Microsoft\\Windows NT\\CurrentVersion\\Schedule\\TaskCache";
    let id = "{0D1C2B3A-4958-6776-8594-A3B2C1D0E0F1}";
    let path = "\\VMware Tools update";
    let mut actions = vec![3, 0, 0x0c, 0, 0, 0];
    actions.extend("Author".encode_utf16().flat_map(u16::to_le_bytes));
    actions.extend(program.encode_utf16().flat_map(u16::to_le_bytes));
    let task = format!("{cache}\\Tasks\\{id}");
    root.sz(&task, "Path", path);
    root.set(&task, "Actions", RegData::Binary(actions));
    root.sz(&format!("{cache}\\Tree{path}"), "Id", id);
    root.key_mut(&format!("{cache}\\Logon\\{id}"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::{WinVersion, guest};
    use crate::disk::layout::{GPT_ESP, GPT_MSR};
    use crate::guest::DiskId;
    use crate::guest::FsKind;
    use crate::inspect::fake::FakeGuest;
    use crate::inspect::{Disk, InspectOptions, SourceFacts, inspect};
    use crate::registry::HiveView;
    use crate::registry::walk::walk;
    use crate::types::DiskBus;

    fn every_spec() -> impl Iterator<Item = GuestSpec> {
        let leftovers = [Leftovers::None, Leftovers::Vmware, Leftovers::HyperV];
        WinVersion::ALL.into_iter().flat_map(move |version| {
            leftovers.into_iter().map(move |leftovers| GuestSpec {
                leftovers,
                ..GuestSpec::new(version)
            })
        })
    }

    #[test]
    fn every_hive_is_sound_and_deterministic() {
        for spec in every_spec() {
            let hives = [
                Some(system(&spec)),
                Some(software(&spec)),
                drivers(&spec),
                Some(placeholder("SAM")),
            ];
            for hive in hives.iter().flatten() {
                walk(hive).unwrap_or_else(|e| panic!("{spec:?}: {e}"));
                nt_hive::Hive::new(hive.as_slice()).unwrap();
            }
            assert_eq!(hives[0].as_ref(), Some(&system(&spec)));
        }
    }

    /// Finds the driver for a device id by separate code.
    fn driver_of(view: &HiveView<'_>, eight: bool, id: &str) -> Option<String> {
        if !eight {
            let id = id.replace('\\', "#");
            let key = format!("ControlSet001\\Control\\CriticalDeviceDatabase\\{id}");
            return view.key(&key).unwrap()?.string("Service").unwrap();
        }
        let ids = view
            .key(&format!("DriverDatabase\\DeviceIds\\{id}"))
            .unwrap()?;
        let inf = ids.values().unwrap().first()?.0.clone();
        let inf = view
            .key(&format!("DriverDatabase\\DriverInfFiles\\{inf}"))
            .unwrap()?;
        let package = inf.string("Active").unwrap()?;
        let package = view
            .key(&format!("DriverDatabase\\DriverPackages\\{package}"))
            .unwrap()?;
        let descriptor = package.key(&format!("Descriptors\\{id}")).unwrap()?;
        let section = descriptor.string("Configuration").unwrap()?;
        let section = package
            .key(&format!("Configurations\\{section}"))
            .unwrap()?;
        section.string("Service").unwrap()
    }

    #[test]
    fn boot_devices_lead_to_their_drivers() {
        for spec in every_spec() {
            let bytes = system(&spec);
            let view = HiveView::new(&bytes).unwrap();
            let eight = spec.version.has_driver_database();
            let vista = spec.version.nt_at_least(6, 0);
            let ahci = match (eight, vista) {
                (true, _) => Some("storahci"),
                (_, true) => Some("msahci"),
                _ => None,
            };
            for (id, driver) in [
                ("PCI\\CC_010601", ahci),
                ("PCI\\CC_0101", Some("pciide")),
                ("PCI\\VEN_8086&DEV_7010", Some("intelide")),
                ("Primary_IDE_Channel", Some("atapi")),
                ("PCI\\VEN_1AF4&DEV_1001", None),
                // Staged, and not bound.
                ("PCI\\VEN_15AD&DEV_07C0", None),
            ] {
                let found = driver_of(&view, eight, id);
                assert_eq!(found.as_deref(), driver, "{:?} {id}", spec.version);
            }
            let cdd = "ControlSet001\\Control\\CriticalDeviceDatabase";
            assert_eq!(view.key(cdd).unwrap().is_none(), eight);
            assert_eq!(view.key("DriverDatabase").unwrap().is_some(), eight);
        }
    }

    #[test]
    fn overrides_are_those_of_the_hardware() {
        for (version, leftovers, start, overrides) in [
            (
                WinVersion::Win10,
                Leftovers::Vmware,
                0,
                Some(vec!["0", "1"]),
            ),
            (WinVersion::Win11, Leftovers::HyperV, 0, Some(vec!["1"])),
            (WinVersion::Server2025, Leftovers::None, 0, None),
        ] {
            let spec = GuestSpec {
                leftovers,
                control_set: 2,
                ..GuestSpec::new(version)
            };
            let bytes = system(&spec);
            let view = HiveView::new(&bytes).unwrap();
            let select = view.key("Select").unwrap().unwrap();
            assert_eq!(select.dword("Default").unwrap(), Some(2));
            assert_eq!(select.dword("LastKnownGood").unwrap(), Some(1));
            for set in ["ControlSet001", "ControlSet002"] {
                let key = format!("{set}\\Services\\storahci");
                let service = view.key(&key).unwrap().unwrap();
                assert_eq!(service.dword("Start").unwrap(), Some(start));
                let found = service.key("StartOverride").unwrap().map(|key| {
                    let values = key.values().unwrap();
                    values.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
                });
                let expected = overrides
                    .as_ref()
                    .map(|names| names.iter().map(ToString::to_string).collect::<Vec<_>>());
                assert_eq!(found, expected, "{version:?}");
            }
        }
        let seven = system(&GuestSpec::new(WinVersion::Win7));
        let seven = HiveView::new(&seven).unwrap();
        let service = seven
            .key("ControlSet001\\Services\\msahci")
            .unwrap()
            .unwrap();
        assert_eq!(service.dword("Start").unwrap(), Some(3));
    }

    #[test]
    fn windows_11_says_10_and_its_build_tells() {
        let bytes = software(&GuestSpec::new(WinVersion::Win11));
        let view = HiveView::new(&bytes).unwrap();
        let key = view
            .key("Microsoft\\Windows NT\\CurrentVersion")
            .unwrap()
            .unwrap();
        let text = |name: &str| key.string(name).unwrap().unwrap_or_default();
        assert_eq!(text("ProductName"), "Windows 10 Pro");
        assert_eq!(text("CurrentBuild"), "22631");
        assert_eq!(text("DisplayVersion"), "23H2");
        assert_eq!(text("InstallationType"), "Client");
    }

    /// The program's own inspection of every guest in memory.
    #[test]
    fn inspection_sees_what_the_specification_says() {
        for spec in every_spec() {
            let layout = guest::layout(&spec);
            let mut fake = FakeGuest::default();
            for partition in &layout.partitions {
                let kind = match partition.type_id.as_str() {
                    GPT_ESP => FsKind::Fat,
                    GPT_MSR => FsKind::Unknown,
                    _ => FsKind::Ntfs,
                };
                fake.volume(partition.clone(), kind);
            }
            for file in guest::files(&spec).unwrap() {
                let index = spec.partition(file.role).unwrap().index;
                fake.file(index, &file.path.to_string(), file.contents);
            }
            let disk = Disk {
                id: DiskId::ONLY,
                layout,
                source: SourceFacts {
                    path: "demo".into(),
                    format: "raw".into(),
                    virtual_size_bytes: spec.disk_size,
                },
            };
            let options = InspectOptions::default();
            let survey = inspect(&fake, &[disk], &options).unwrap();
            let seen = survey.inspection;
            let what = format!("{:?} {:?}", spec.version, spec.leftovers);
            let facts = spec.version.facts();
            assert_eq!(seen.blockers(), [], "{what}");
            assert_eq!(seen.firmware, Some(spec.firmware), "{what}");
            assert_eq!(seen.os.build, Some(facts.build), "{what}");
            assert_eq!(seen.os.arch, Some(spec.arch), "{what}");
            assert_eq!(seen.os.hostname.as_deref(), Some("DEMO-GUEST"), "{what}");
            assert_eq!(seen.os.control_set.as_deref(), Some("ControlSet001"));

            // Bootstrap controllers in the state left by the hardware; virtio never.
            let ready = |controller| seen.controllers[&controller].ready;
            let reason = |controller| seen.controllers[&controller].reason.clone();
            let eight = spec.version.has_driver_database();
            let sata = eight && spec.leftovers == Leftovers::None;
            let ide = spec.firmware == Firmware::Bios;
            let sata_reason = reason(DiskBus::Sata);
            assert_eq!(ready(DiskBus::Sata), sata, "{what}: {sata_reason}");
            let ide_reason = reason(DiskBus::Ide);
            assert_eq!(ready(DiskBus::Ide), ide, "{what}: {ide_reason}");
            assert!(!ready(DiskBus::VirtioBlk) && !ready(DiskBus::VirtioScsi));
            let vmware = seen.hypervisor_tools.iter().any(|t| t.contains("VMware"));
            assert_eq!(vmware, spec.leftovers == Leftovers::Vmware, "{what}");
            if spec.version.nt_at_least(10, 0) {
                let mac = seen.network.adapters.iter().map(|a| a.mac.clone());
                let expected = Some("00:0c:29:f3:ff:de".to_string());
                assert_eq!(mac.collect::<Vec<_>>(), [expected], "{what}");
            }
        }
    }
}
