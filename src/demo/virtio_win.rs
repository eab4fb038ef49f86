//! A directory with the layout of the virtio-win ISO, or of the RPM's driver tree, for the demo and
//! the tests.
//!
//! The INFs are original text with the structure of the real ones. They have decorations, directory
//! ids 12 and 13, long and short hardware ids, and UTF-16 in some. The caller provides the images;
//! catalogues list them but are not signed; installers are placeholders. No Windows would load any
//! of it.

use std::io;
use std::path::Path;

use super::cat;
use crate::drivers::target::Arch;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `viostor/w11/amd64/viostor.inf`, `amd64/w11/viostor.inf`
    Iso,
    /// `drivers/by-driver/...`, `drivers/by-os/...`, `drivers/amd64/Win11/...`
    Rpm,
}

struct Os {
    folder: &'static str,
    rpm: &'static str,
    /// The decoration of the INF's models section after the architecture.
    decoration: &'static str,
    driver_ver: &'static str,
    archs: &'static [Arch],
}

impl Os {
    /// The directory id of the driver image: 12 `System32\drivers`, 13 the driver store.
    fn dirid(&self) -> u32 {
        match self.decoration {
            ISOLATED => 13,
            _ => 12,
        }
    }
}

/// The first build of Windows 10 with isolated drivers.
const ISOLATED: &str = ".10.0...16299";

const fn os(
    folder: &'static str,
    rpm: &'static str,
    decoration: &'static str,
    driver_ver: &'static str,
    archs: &'static [Arch],
) -> Os {
    Os {
        folder,
        rpm,
        decoration,
        driver_ver,
        archs,
    }
}

const X64: &[Arch] = &[Arch::Amd64];
const BOTH: &[Arch] = &[Arch::X86, Arch::Amd64];
const WITH_ARM: &[Arch] = &[Arch::Amd64, Arch::Arm64];
const W7: &str = "09/09/2019,61.77.104.17300";
const W8: &str = "11/15/2021,62.90.104.21500";
const W81: &str = "11/15/2021,63.90.104.21500";
const W10: &str = "01/20/2025,100.101.104.27100";

const SYSTEMS: [Os; 12] = [
    os("w7", "Win7", ".6.1", W7, BOTH),
    os("2k8R2", "Win2008R2", ".6.1", W7, X64),
    os("w8", "Win8", ".6.2", W8, BOTH),
    os("2k12", "Win2012", ".6.2", W8, X64),
    os("w8.1", "Win8.1", ".6.3", W81, BOTH),
    os("2k12R2", "Win2012R2", ".6.3", W81, X64),
    os("w10", "Win10", ".10.0", W10, BOTH),
    os("2k16", "Win2016", ".10.0", W10, X64),
    os("2k19", "Win2019", ".10.0", W10, X64),
    os("2k22", "Win2022", ".10.0", W10, X64),
    os("w11", "Win11", ISOLATED, W10, WITH_ARM),
    os("2k25", "Win2025", ISOLATED, W10, X64),
];

struct Driver {
    folder: &'static str,
    /// Stem of the .inf, .cat and .sys.
    stem: &'static str,
    service: &'static str,
    class: &'static str,
    guid: &'static str,
    section: &'static str,
    start: u32,
    group: &'static str,
    name: &'static str,
    /// Transitional device and its subsystem, modern device.
    devices: (&'static str, &'static str, &'static str),
    /// `BusType` of a storage driver.
    bus: Option<u32>,
}

const SCSI: (&str, &str) = ("SCSIAdapter", "{4D36E97B-E325-11CE-BFC1-08002BE10318}");
const SYSTEM: (&str, &str) = ("System", "{4d36e97d-e325-11ce-bfc1-08002be10318}");
const NET: (&str, &str) = ("Net", "{4d36e972-e325-11ce-bfc1-08002be10318}");

const DRIVERS: [Driver; 6] = [
    Driver {
        folder: "viostor",
        stem: "viostor",
        service: "viostor",
        class: SCSI.0,
        guid: SCSI.1,
        section: "scsi_inst",
        start: 0,
        group: "SCSI miniport",
        name: "VirtIO SCSI controller",
        devices: ("1001", "0002", "1042"),
        bus: Some(1),
    },
    Driver {
        folder: "vioscsi",
        stem: "vioscsi",
        service: "vioscsi",
        class: SCSI.0,
        guid: SCSI.1,
        section: "scsi_inst",
        start: 0,
        group: "SCSI miniport",
        name: "VirtIO SCSI pass-through controller",
        devices: ("1004", "0008", "1048"),
        bus: Some(10),
    },
    Driver {
        folder: "NetKVM",
        stem: "netkvm",
        service: "netkvm",
        class: NET.0,
        guid: NET.1,
        section: "kvmnet6.ndi",
        start: 3,
        group: "NDIS",
        name: "VirtIO Ethernet Adapter",
        devices: ("1000", "0001", "1041"),
        bus: None,
    },
    Driver {
        folder: "Balloon",
        stem: "balloon",
        service: "BALLOON",
        class: SYSTEM.0,
        guid: SYSTEM.1,
        section: "BALLOON_Device",
        start: 3,
        group: "",
        name: "VirtIO Balloon Driver",
        devices: ("1002", "0005", "1045"),
        bus: None,
    },
    Driver {
        folder: "vioserial",
        stem: "vioser",
        service: "VirtioSerial",
        class: SYSTEM.0,
        guid: SYSTEM.1,
        section: "VirtioSerial_Device",
        start: 3,
        group: "",
        name: "VirtIO Serial Driver",
        devices: ("1003", "0003", "1043"),
        bus: None,
    },
    Driver {
        folder: "viorng",
        stem: "viorng",
        service: "VirtRng",
        class: SYSTEM.0,
        guid: SYSTEM.1,
        section: "VirtRng_Device",
        start: 3,
        group: "Extended Base",
        name: "VirtIO RNG Device",
        devices: ("1005", "0004", "1044"),
        bus: None,
    },
];

/// Every file of the directory: path with `/`, contents. `image` provides the bytes of a driver
/// image.
pub fn files(layout: Layout, image: &dyn Fn(Arch) -> Vec<u8>) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for os in &SYSTEMS {
        for &arch in os.archs {
            for driver in &DRIVERS {
                let storage = driver.bus.is_some();
                let package = package(driver, os, arch, image);
                let folders = match layout {
                    Layout::Iso => {
                        let mut folders =
                            vec![format!("{}/{}/{}", driver.folder, os.folder, folder(arch))];
                        if storage && os.decoration.contains(".10") && arch != Arch::Arm64 {
                            folders.push(format!("{}/{}", flat_folder(arch), os.folder));
                        }
                        folders
                    }
                    Layout::Rpm => {
                        let mut folders = vec![
                            format!(
                                "drivers/by-driver/{}/{}/{}",
                                driver.folder,
                                os.folder,
                                folder(arch)
                            ),
                            format!("drivers/by-os/{}/{}", flat_folder(arch), os.folder),
                        ];
                        if storage || driver.stem == "netkvm" {
                            folders.push(format!("drivers/{}/{}", flat_folder(arch), os.rpm));
                        }
                        folders
                    }
                };
                for folder in folders {
                    let by_os = folder.contains("by-os") || folder.contains("/Win");
                    for (name, bytes) in &package {
                        // The RPM's flat directories have no symbols.
                        if !(by_os && name.ends_with(".pdb")) {
                            files.push((format!("{folder}/{name}"), bytes.clone()));
                        }
                    }
                }
            }
        }
    }
    if layout == Layout::Iso {
        for arch in ["i386", "x86_64"] {
            files.push((
                format!("guest-agent/qemu-ga-{arch}.msi"),
                placeholder(&format!("guest agent {arch}")),
            ));
        }
        files.push(("virtio-win_license.txt".into(), placeholder("licence")));
    }
    files.sort();
    files
}

/// Writes the directory and returns the paths in it.
pub fn write(
    root: &Path,
    layout: Layout,
    image: &dyn Fn(Arch) -> Vec<u8>,
) -> io::Result<Vec<String>> {
    let mut paths = Vec::new();
    for (path, bytes) in files(layout, image) {
        let file = root.join(&path);
        if let Some(parent) = file.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(&file, bytes)?;
        paths.push(path);
    }
    Ok(paths)
}

/// The INF of a driver for an OS directory, as in [`files`]; `None` for unknown names.
pub fn inf(driver: &str, os: &str, arch: Arch) -> Option<Vec<u8>> {
    let driver = DRIVERS
        .iter()
        .find(|d| d.folder.eq_ignore_ascii_case(driver))?;
    let os = SYSTEMS.iter().find(|o| o.folder.eq_ignore_ascii_case(os))?;
    Some(encode(driver, os, inf_text(driver, os, arch)))
}

fn folder(arch: Arch) -> &'static str {
    match arch {
        Arch::X86 => "x86",
        Arch::Amd64 => "amd64",
        Arch::Arm64 => "ARM64",
    }
}

fn flat_folder(arch: Arch) -> &'static str {
    match arch {
        Arch::X86 => "i386",
        _ => folder(arch),
    }
}

fn placeholder(what: &str) -> Vec<u8> {
    format!("hyper2kvm demo: stands for the {what}\n").into_bytes()
}

fn package(
    driver: &Driver,
    os: &Os,
    arch: Arch,
    image: &dyn Fn(Arch) -> Vec<u8>,
) -> Vec<(String, Vec<u8>)> {
    let stem = driver.stem;
    let what = format!("{stem} {} {arch}", os.folder);
    let inf = encode(driver, os, inf_text(driver, os, arch));
    let image = image(arch);
    let mut files = vec![
        (format!("{stem}.cat"), cat::unsigned(&[&inf, &image])),
        (format!("{stem}.inf"), inf),
        (format!("{stem}.sys"), image),
        (
            format!("{stem}.pdb"),
            placeholder(&format!("symbols of {what}")),
        ),
    ];
    if has_tool(driver, os) {
        files.push((
            "netkvmp.exe".into(),
            placeholder(&format!("tool of {what}")),
        ));
    }
    files
}

/// UTF-16 for the NIC and for the newest storage driver, 8-bit text for the rest.
fn encode(driver: &Driver, os: &Os, text: String) -> Vec<u8> {
    if driver.stem == "netkvm" || (driver.stem == "viostor" && os.dirid() == 13) {
        [0xfeff]
            .into_iter()
            .chain(text.encode_utf16())
            .flat_map(u16::to_le_bytes)
            .collect()
    } else {
        text.into_bytes()
    }
}

/// Whether the driver is the network driver with its failover helper, added in Windows 10.
fn has_tool(driver: &Driver, os: &Os) -> bool {
    driver.stem == "netkvm" && os.decoration.starts_with(".10")
}

fn inf_text(driver: &Driver, os: &Os, arch: Arch) -> String {
    let text = [
        version(driver, os),
        models(driver, os, arch),
        install(driver, os),
        service(driver, os),
        interrupts(driver),
        strings(driver),
    ]
    .concat();
    text.replace('\n', "\r\n")
}

/// Returns `line` if `wanted`, otherwise nothing.
fn only(wanted: bool, line: impl Into<String>) -> String {
    match wanted {
        true => line.into(),
        false => String::new(),
    }
}

fn version(driver: &Driver, os: &Os) -> String {
    let Driver {
        stem, class, guid, ..
    } = driver;
    let tool = has_tool(driver, os);
    format!(
        r#"; Made by hyper2kvm for demonstration: not a real driver
[Version]
Signature   = "$Windows NT$"
Class       = {class}
ClassGUID   = {guid}
Provider    = %VENDOR%
DriverVer   = {stamp} ; stamped
CatalogFile = {stem}.cat
PnpLockdown = 1
[SourceDisksNames]
1 = %Media%,,,""
[SourceDisksFiles]
{stem}.sys = 1,,
{source}[DestinationDirs]
DefaultDestDir = {dirid}
{destination}"#,
        stamp = os.driver_ver,
        dirid = os.dirid(),
        source = only(tool, "netkvmp.exe = 1,,\n"),
        destination = only(tool, "tool_files = 11\n"),
    )
}

fn models(driver: &Driver, os: &Os, arch: Arch) -> String {
    // The x86 build for 7 has a plain architecture, like old packages.
    let decoration = match os.folder == "w7" && arch == Arch::X86 {
        true => "NTx86".to_string(),
        false => format!("NT{}{}", arch.inf_name(), os.decoration),
    };
    let section = driver.section;
    let (old, subsystem, new) = driver.devices;
    let old_id = format!("PCI\\VEN_1AF4&DEV_{old}");
    let new_id = format!("PCI\\VEN_1AF4&DEV_{new}");
    // vioscsi for 7 lists only the long ids.
    let short = |id: &str| {
        only(
            driver.stem != "vioscsi" || os.decoration != ".6.1",
            format!(", {id}"),
        )
    };
    format!(
        r"[Manufacturer]
%VENDOR% = Models,{decoration}
[Models.{decoration}]
%Device.Desc% = {section}, {old_id}&SUBSYS_{subsystem}1AF4&REV_00{old_short}
%Device.Desc% = {section}, \
    {new_id}&SUBSYS_11001AF4&REV_01{new_short}
",
        old_short = short(&old_id),
        new_short = short(&new_id),
    )
}

/// System-class drivers decorate their install section, the others do not.
fn section(driver: &Driver) -> String {
    let decoration = only(driver.class == "System", ".NT");
    format!("{}{decoration}", driver.section)
}

fn install(driver: &Driver, os: &Os) -> String {
    let stem = driver.stem;
    let (net, tool) = (stem == "netkvm", has_tool(driver, os));
    format!(
        "[{section}]\n{characteristics}CopyFiles = driver_files{tool_files}\n[driver_files]\n{stem}.sys,,,2\n{tool}{ndi}",
        section = section(driver),
        characteristics = only(net, "Characteristics = 0x84\nAddReg = ndi_reg\n"),
        tool_files = only(tool, ", tool_files"),
        tool = only(tool, "[tool_files]\nnetkvmp.exe,,,2\n"),
        ndi = only(
            net,
            r#"[ndi_reg]
HKR, Ndi, Service, 0, "netkvm"
HKR, Ndi\Interfaces, UpperRange, 0, "ndis5"
"#
        ),
    )
}

fn service(driver: &Driver, os: &Os) -> String {
    let Driver {
        stem,
        service,
        start,
        group,
        ..
    } = driver;
    let dirid = os.dirid();
    let message_file = match *stem {
        "netkvm" => "netevent.dll",
        _ => "IoLogMsg.dll",
    };
    let bus = driver.bus.map_or_else(String::new, |bus| {
        format!(
            r#"HKR, "Parameters\PnpInterface", "5", %REG_DWORD%, 0x00000001
HKR, "Parameters", "BusType", %REG_DWORD%, {bus:#010x}
"#
        )
    });
    format!(
        r#"[{section}.Services]
AddService = {service}, %ASSOC%, service_inst, event_log
[service_inst]
{name}ServiceType    = %KERNEL_DRIVER%
StartType      = {start}
ErrorControl   = 1
ServiceBinary  = %{dirid}%\{stem}.sys
{group}AddReg         = service_reg
[service_reg]
{bus}{remapping}[event_log]
AddReg = event_log_reg
[event_log_reg]
HKR,,EventMessageFile,%REG_EXPAND_SZ%,"%%SystemRoot%%\System32\{message_file}"
HKR,,TypesSupported,%REG_DWORD%,7
"#,
        section = section(driver),
        name = only(*stem != "viostor", "DisplayName    = %Service.Desc%\n"),
        group = only(!group.is_empty(), format!("LoadOrderGroup = {group}\n")),
        remapping = only(
            dirid == 13,
            "HKR, \"Parameters\", DmaRemappingCompatible,0x00010001,0\n"
        ),
    )
}

/// Message-signaled interrupts.
fn interrupts(driver: &Driver) -> String {
    let policy = r#"HKR, "Interrupt Management\Affinity Policy",, 0x00000010
HKR, "Interrupt Management\Affinity Policy", DevicePolicy, 0x00010001, 5
"#;
    format!(
        r#"[{section}.HW]
AddReg = msi_reg
[msi_reg]
HKR, "Interrupt Management",, 0x00000010
HKR, "{msi}",, 0x00000010
HKR, "{msi}", MSISupported, 0x00010001, 1
HKR, "{msi}", MessageNumberLimit, 0x00010001, 256
{policy}"#,
        section = section(driver),
        msi = r"Interrupt Management\MessageSignaledInterruptProperties",
        policy = only(driver.bus.is_some(), policy),
    )
}

fn strings(driver: &Driver) -> String {
    let name = driver.name;
    format!(
        r#"[Strings]
VENDOR = "hyper2kvm demo, not signed"
Media = "Demo {name} installation disk"
Device.Desc = "Demo {name}"
Service.Desc = "Demo {name} Service"
REG_EXPAND_SZ = 0x00020000
REG_DWORD = 0x00010001
KERNEL_DRIVER = 1
ASSOC = 0x00000002
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_every_time_and_written_as_listed() {
        let image = |arch: Arch| arch.name().as_bytes().to_vec();
        let dir = tempfile::tempdir().unwrap();
        for layout in [Layout::Iso, Layout::Rpm] {
            let files = files(layout, &image);
            assert_eq!(files, super::files(layout, &image));
            let paths = write(dir.path(), layout, &image).unwrap();
            assert_eq!(paths.len(), files.len());
            for (path, bytes) in &files {
                assert_eq!(&std::fs::read(dir.path().join(path)).unwrap(), bytes);
            }
            let mut names = paths.clone();
            names.dedup();
            assert_eq!(names.len(), paths.len());
        }
    }
}
