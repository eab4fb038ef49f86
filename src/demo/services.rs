//! The driver services of a guest: the keys under `Services`, and the `.sys` files they need.

use super::{Arch, Firmware, GuestSpec, Leftovers, WinVersion};
use crate::registry::KeyTree;
use crate::registry::RegData;

/// A driver service. `start` is its `Start` value: 0 boot, 1 system, 3 demand, 4 disabled.
#[derive(Debug, Clone)]
pub(super) struct Service {
    pub name: &'static str,
    pub start: u32,
    group: &'static str,
    tag: u32,
    inf: &'static str,
    bus_type: Option<u32>,
    /// Values of `StartOverride`, Windows 8 and later.
    overrides: &'static [(&'static str, u32)],
}

impl Service {
    fn new(name: &'static str, start: u32, group: &'static str, tag: u32) -> Self {
        Self {
            name,
            start,
            group,
            tag,
            inf: "",
            bus_type: None,
            overrides: &[],
        }
    }

    fn inf(mut self, inf: &'static str) -> Self {
        self.inf = inf;
        self
    }

    /// Makes it a StorPort or SCSI miniport: it gets `Parameters\BusType` and `PnpInterface`.
    fn miniport(mut self, bus_type: u32) -> Self {
        self.bus_type = Some(bus_type);
        self
    }

    fn overridden(mut self, overrides: &'static [(&'static str, u32)]) -> Self {
        self.overrides = overrides;
        self
    }

    pub fn file_name(&self) -> String {
        format!("{}.sys", self.name)
    }

    /// The files imported by its image.
    pub fn imports(&self, vista: bool) -> Vec<&'static str> {
        let port = match self.name.to_ascii_lowercase().as_str() {
            _ if self.bus_type.is_some() && vista => "storport.sys",
            _ if self.bus_type.is_some() => "SCSIPORT.SYS",
            "intelide" | "pciide" => "PCIIDEX.SYS",
            "atapi" | "msahci" if vista => "ataport.SYS",
            "disk" | "cdrom" => "CLASSPNP.SYS",
            _ => return KERNEL.to_vec(),
        };
        [&[port], KERNEL].concat()
    }
}

const KERNEL: &[&str] = &["ntoskrnl.exe", "HAL.dll"];

/// Files that others import, with their own imports. The kernel and its own files are in
/// `System32`, the rest in `System32\\drivers`.
pub(super) fn libraries(version: WinVersion) -> Vec<(&'static str, Vec<&'static str>)> {
    let vista = version.nt_at_least(6, 0);
    let driver = |name, more: &[&'static str]| (name, [more, KERNEL].concat());
    let mut list = vec![
        ("ntoskrnl.exe", vec!["HAL.dll", "BOOTVID.dll", "KDCOM.dll"]),
        ("hal.dll", vec!["ntoskrnl.exe", "KDCOM.dll"]),
        ("bootvid.dll", vec!["ntoskrnl.exe", "HAL.dll"]),
        ("kdcom.dll", vec!["ntoskrnl.exe", "HAL.dll"]),
        driver(
            "drivers\\ntfs.sys",
            if vista {
                &["ksecdd.sys"]
            } else {
                &["KSecDD.sys"]
            },
        ),
        driver("drivers\\ksecdd.sys", &[]),
        driver("drivers\\wmilib.sys", &[]),
        driver("drivers\\pciidex.sys", &[]),
        driver("drivers\\classpnp.sys", &[]),
    ];
    list.push(match vista {
        true => driver("drivers\\storport.sys", &["WMILIB.SYS"]),
        false => driver("drivers\\scsiport.sys", &["WMILIB.SYS"]),
    });
    if vista {
        list.push(driver("drivers\\ataport.sys", &["PCIIDEX.SYS"]));
    }
    if version.nt_at_least(6, 1) {
        // An extension without a file.
        list[0].1.push("ext-ms-win-ntos-werkernel-l1-1-0.dll");
    }
    list
}

const OVERRIDDEN: &[(&str, u32)] = &[("0", 3)];
const OVERRIDDEN_TWICE: &[(&str, u32)] = &[("0", 3), ("1", 3)];
const OVERRIDDEN_LATER: &[(&str, u32)] = &[("1", 3)];
const NOT: &[(&str, u32)] = &[];

/// The driver services of this guest, in the state left by its own hardware.
pub(super) fn services(spec: &GuestSpec) -> Vec<Service> {
    let version = spec.version;
    let vista = version.nt_at_least(6, 0);
    let eight = version.has_driver_database();
    let ten = version.nt_at_least(10, 0);
    let vmware = spec.leftovers == Leftovers::Vmware;
    let bios = spec.firmware == Firmware::Bios;
    let unused = |name, group, tag, used| unused(spec, (name, group, tag), used);

    let mut list = vec![
        Service::new(
            "ACPI",
            0,
            if eight { "Core" } else { "Boot Bus Extender" },
            2,
        )
        .inf("acpi.inf"),
        Service::new("pci", 0, "Boot Bus Extender", 3)
            .inf("pci.inf")
            .overridden(if spec.pci_overridden { OVERRIDDEN } else { NOT }),
        Service::new("partmgr", 0, "Boot Bus Extender", 0),
        Service::new("mountmgr", 0, "System Bus Extender", 0),
        Service::new("disk", 0, "", 0).inf("disk.inf"),
        Service::new("volsnap", 0, "", 0),
        Service::new("cdrom", 1, "SCSI CDROM Class", 1).inf("cdrom.inf"),
    ];
    // BIOS guests of both hypervisors have an IDE controller.
    let ide = bios || !vista;
    list.push(unused("intelide", "System Bus Extender", 9, ide).inf("mshdc.inf"));
    list.push(unused("pciide", "System Bus Extender", 8, !vista).inf("mshdc.inf"));
    list.push(unused("atapi", "SCSI Miniport", 0x1e, ide || vmware).inf("mshdc.inf"));

    if vista {
        list.push(Service::new("volmgr", 0, "System Bus Extender", 9).inf("volmgr.inf"));
        list.push(Service::new("volmgrx", 0, "System Bus Extender", 10));
        list.push(Service::new("fltmgr", 0, "FSFilter Infrastructure", 1));
        list.push(Service::new("fvevol", 0, "", 0));
        list.push(Service::new("rdyboost", 0, "", 0));
        if spec.arch != Arch::Arm64 {
            let lsi = unused("LSI_SAS", "SCSI Miniport", 9, vmware);
            list.push(lsi.inf("lsi_sas.inf").miniport(0x0a));
        }
    } else {
        list.push(Service::new("ftdisk", 0, "System Bus Extender", 4));
        list.push(Service::new("dmio", 0, "System Bus Extender", 5));
        list.push(Service::new("dmload", 0, "System Bus Extender", 6));
        if vmware {
            list.push(Service::new("symmpi", 0, "SCSI miniport", 0x22).miniport(1));
        }
    }
    if vista && !eight {
        let msahci = Service::new("msahci", 3, "SCSI Miniport", 0);
        list.push(msahci.inf("mshdc.inf"));
    }
    if eight {
        list.extend(since_windows_8(spec));
    }
    if ten {
        list.push(Service::new("volume", 0, "", 0).inf("volume.inf"));
        list.push(Service::new("iorate", 0, "", 0));
    }
    if vmware {
        let start = if ten { 0 } else { 3 };
        list.push(Service::new("vmci", start, "System Bus Extender", 0x10).inf("oem0.inf"));
        list.push(Service::new("vm3dmp", 3, "Video", 6).inf("oem1.inf"));
        list.push(Service::new("vmhgfs", 1, "Network", 0));
    }
    if let Some(net) = net_service(spec) {
        list.push(Service::new(net, 3, "NDIS", 0));
    }
    list
}

/// A service whose device the guest may lack. Windows disables it then: by an override on 8 and
/// later, by demand start before.
fn unused(
    spec: &GuestSpec,
    (name, group, tag): (&'static str, &'static str, u32),
    used: bool,
) -> Service {
    let turned_off = match spec.version.has_driver_database() {
        true => 0,
        false => 3,
    };
    let service = Service::new(name, if used { 0 } else { turned_off }, group, tag);
    service.overridden(if used { NOT } else { OVERRIDDEN })
}

/// The storage services added in Windows 8.
fn since_windows_8(spec: &GuestSpec) -> Vec<Service> {
    let hyperv = spec.leftovers == Leftovers::HyperV;
    let unused = |name, group, tag, used| unused(spec, (name, group, tag), used);
    let storahci = Service::new("storahci", 0, "SCSI Miniport", 0x1f)
        .inf("mshdc.inf")
        .miniport(0x0b);
    vec![
        storahci.overridden(match spec.leftovers {
            Leftovers::None => NOT,
            Leftovers::Vmware => OVERRIDDEN_TWICE,
            // Only the configuration of an earlier host: removing "0" is not enough.
            Leftovers::HyperV => OVERRIDDEN_LATER,
        }),
        unused("stornvme", "SCSI Miniport", 0x20, false)
            .inf("stornvme.inf")
            .miniport(0x11),
        Service::new("spaceport", 0, "Boot Bus Extender", 0),
        Service::new("EhStorClass", 0, "PnP Filter", 1),
        unused("vmbus", "System Bus Extender", 7, hyperv).inf("wvmbus.inf"),
        unused("storvsc", "SCSI Miniport", 0x21, hyperv)
            .inf("wstorvsc.inf")
            .miniport(0x0a),
    ]
}

/// The service of the guest's network adapters.
pub(super) fn net_service(spec: &GuestSpec) -> Option<&'static str> {
    if spec.adapters.is_empty() {
        return None;
    }
    Some(match spec.leftovers {
        Leftovers::HyperV if spec.version.has_driver_database() => "netvsc",
        _ if spec.version.nt_at_least(10, 0) => "e1i65x64",
        _ if spec.version.nt_at_least(6, 1) => "e1iexpress",
        _ => "e1express",
    })
}

/// Writes `Services` below a control set.
pub(super) fn write(spec: &GuestSpec, set: &mut KeyTree) {
    let eight = spec.version.has_driver_database();
    for (n, service) in services(spec).iter().enumerate() {
        let key = format!("Services\\{}", service.name);
        // The forms of ImagePath that occur side by side.
        let folder = match (eight, n % 3) {
            (true, 0..=1) => "System32\\drivers",
            (_, 0) => "system32\\DRIVERS",
            // The loader of NT 5 supports no other form.
            (_, 1) => "system32\\drivers",
            _ if !spec.version.nt_at_least(6, 0) => "System32\\drivers",
            _ => "\\SystemRoot\\System32\\drivers",
        };
        let critical = u32::from(service.start == 0 && service.bus_type != Some(0x0a));
        set.dword(&key, "ErrorControl", if critical == 1 { 3 } else { 1 });
        if !service.group.is_empty() {
            set.sz(&key, "Group", service.group);
        }
        let path = format!("{folder}\\{}", service.file_name());
        set.set(&key, "ImagePath", RegData::ExpandSz(path));
        set.dword(&key, "Start", service.start);
        set.dword(&key, "Type", 1);
        if service.tag != 0 {
            set.dword(&key, "Tag", service.tag);
        }
        if eight && !service.inf.is_empty() {
            let owners = vec![service.inf.to_string()];
            set.set(&key, "Owners", RegData::MultiSz(owners));
        }
        if let Some(bus_type) = service.bus_type {
            set.dword(&format!("{key}\\Parameters"), "BusType", bus_type);
            set.dword(&format!("{key}\\Parameters\\PnpInterface"), "5", 1);
        }
        if eight {
            for &(name, start) in service.overrides {
                set.dword(&format!("{key}\\StartOverride"), name, start);
            }
        }
    }
    // The boot loader loads it by this name, whatever its start type.
    set.dword("Services\\Ntfs", "ErrorControl", 1)
        .dword("Services\\Ntfs", "Start", if eight { 3 } else { 1 })
        .dword("Services\\Ntfs", "Type", 2)
        .sz("Services\\Ntfs", "Group", "Boot File System");
    if spec.leftovers == Leftovers::Vmware {
        let place = r"C:\Program Files\VMware\VMware Tools";
        for (name, file) in [
            ("VMTools", "vmtoolsd.exe"),
            ("VGAuthService", r"VMware VGAuth\VGAuthService.exe"),
        ] {
            let key = format!("Services\\{name}");
            let image = RegData::ExpandSz(format!("\"{place}\\{file}\""));
            set.set(&key, "ImagePath", image);
            set.dword(&key, "Type", 0x10).dword(&key, "Start", 2);
        }
    }
    if spec.leftovers == Leftovers::Vmware && eight {
        // Keys without a driver: only the remains of an installer, or nothing at all.
        let msi = RegData::MultiSz(vec!["MSI".into()]);
        set.set("Services\\pvscsi", "vwdk.installers", msi.clone());
        set.set("Services\\vmxnet3ndis6", "vwdk.installers", msi);
        set.key_mut("Services\\iaStorAV");
    }
}
