use std::path::Path;

use super::*;
use crate::demo::virtio_win::{self, Layout};
use crate::drivers::catalogue::Catalogue;
use crate::drivers::driver_source::Memory;
use crate::drivers::select::select;
use crate::drivers::target::Arch;
use crate::registry::{HiveView, RegEdits};
use crate::skip::{corpus, skip};

fn image(arch: Arch) -> Vec<u8> {
    crate::drivers::pe::head(arch.pe_machine())
}

pub(super) fn target(major: u32, minor: u32, build: u32, arch: Arch) -> WindowsTarget {
    WindowsTarget {
        major,
        minor,
        build,
        arch,
        server: false,
    }
}

pub(super) fn demo_set(target: &WindowsTarget) -> (DriverSet, Memory) {
    let driver_source = Memory::new(virtio_win::files(Layout::Iso, &image));
    let set = select(&driver_source, &Catalogue::builtin(), target).unwrap();
    (set, driver_source)
}

pub(super) fn placement(oem: u32) -> Placement {
    let windows = GuestPath::parse(r"\Windows").unwrap();
    Placement::new(crate::types::ControlSet::new(1), windows, oem).unwrap()
}

pub(super) const DIGEST: &str = "0123456789abcdef";

fn installed(driver: &str, target: &WindowsTarget) -> Installation {
    let (set, _) = demo_set(target);
    install(set.package(driver).unwrap(), DIGEST, target, &placement(5)).unwrap()
}

/// The edits of all hives and the files, as text.
fn text(installation: &Installation) -> String {
    let mut text = String::new();
    for (to, from) in &installation.files {
        text.push_str(&format!("; {to} <- {from}\n"));
    }
    for (prefix, ops) in [
        ("HKEY_LOCAL_MACHINE\\SYSTEM", &installation.system),
        ("HKEY_LOCAL_MACHINE\\SOFTWARE", &installation.software),
        ("HKEY_LOCAL_MACHINE\\DRIVERS", &installation.drivers),
    ] {
        if !ops.is_empty() {
            let mut edits = RegEdits::new(prefix);
            edits.ops = ops.clone();
            text.push_str(&edits.to_reg_text());
        }
    }
    text
}

#[test]
fn golden() {
    let w7 = target(6, 1, 7601, Arch::X86);
    let w10 = target(10, 0, 19045, Arch::Amd64);
    let w11 = target(10, 0, 26100, Arch::Amd64);
    for (name, target) in [("w7", &w7), ("w10", &w10), ("w11", &w11)] {
        for driver in ["viostor", "vioscsi"] {
            let text = text(&installed(driver, target));
            insta::assert_snapshot!(format!("{driver}-{name}"), text);
        }
    }
    insta::assert_snapshot!("netkvm-w10", text(&installed("netkvm", &w10)));
    // Of 8.1 the packages are in SYSTEM; before 8 they are staged only.
    let w81 = target(6, 3, 9600, Arch::X86);
    insta::assert_snapshot!("viorng-w81", text(&installed("viorng", &w81)));
    assert_eq!(installed("netkvm", &w7), Installation::default());
}

/// An INF with everything that the demo's drivers lack.
#[test]
fn what_an_inf_may_add_is_recorded_where_it_belongs() {
    let w10 = target(10, 0, 19045, Arch::Arm64);
    let inf = r#"
[Version]
ClassGuid = {4D36E97B-E325-11CE-BFC1-08002BE10318}
Class = SCSIAdapter
Provider = Maker
DriverVer = 02/03/2024,1.2.3.4
[SourceDisksFiles]
x.sys = 1
tool.exe = 1
[DestinationDirs]
DefaultDestDir = 12
system = 11
lost = 24
[Manufacturer]
%M% = Models,NTarm64
[Models.NTarm64]
"Plain text" = Inst, PCI\VEN_1AF4&DEV_1042&SUBSYS_1
%Two% = Inst, PCI\VEN_1AF4&DEV_1042&REV_1
[Inst]
CopyFiles = @x.sys, system, lost
AddReg = driver
Include = pci.inf, machine.inf
FeatureScore = 80
[Inst.HW]
AddReg = hw
[Inst.Services]
AddService = X, 2, svc, log
AddService = helper, , helper_svc
AddService = x, , helper_svc
[svc]
DisplayName = Shown
ServiceType = 1
StartType = 0
ErrorControl = 3
ServiceBinary = %13%\sub\x.sys
Tag = 9
AddReg = service
[helper_svc]
DisplayName = %Two%
ServiceType = 16
StartType = 2
ErrorControl = 0
ServiceBinary = %11%\tool.exe
[system]
tool.exe
[lost]
x.sys
[driver]
HKR,,Value,1,1
HKLM,Software\X,Lost,,x
[hw]
HKR,Sub
HKR,Sub\Deep,Name,,x
[service]
HKR,Parameters,A,0x00010001,1
[log]
AddReg = log_reg
[log_reg]
HKR,,TypesSupported,0x00010001,7
[Strings]
M = "The maker"
Two = "Second"
"#;
    let (set, _) = demo_set(&target(10, 0, 19045, Arch::Amd64));
    let mut pkg = set.package("viostor").unwrap().clone();
    pkg.inf = super::super::DriverInf::parse(inf.as_bytes(), &w10).unwrap();
    pkg.inf_name = "X.INF".into();
    pkg.signer = Some("Signer".into());
    pkg.files = ["X.INF", "x.sys", "tool.exe", "other.dll"]
        .map(|name| super::super::PackageFile {
            name: name.into(),
            path_in_source: format!("m/{name}"),
            size: 1,
        })
        .to_vec();
    let mut at = placement(12);
    at.control_set = crate::types::ControlSet::new(3);
    at.system_drive = "D:".into();
    let shown = |pkg: &DriverPackage, target: &WindowsTarget| {
        let installed = install(pkg, DIGEST, target, &at).unwrap();
        let name = installed.store_name.clone();
        format!("; {name:?}\n{}", text(&installed))
    };
    insta::assert_snapshot!("unusual-boot", shown(&pkg, &w10));
    insta::assert_snapshot!("unusual-old", shown(&pkg, &target(6, 1, 7601, Arch::Arm64)));
    pkg.required = false;
    insta::assert_snapshot!("unusual-staged", shown(&pkg, &w10));
    // A service whose file is not in the package is not recorded.
    pkg.files.retain(|f| f.name != "x.sys");
    let without = install(&pkg, DIGEST, &w10, &at).unwrap();
    assert_eq!(without.system, []);
}

/// The ids that QEMU gives a device in its old and in its new form.
#[test]
fn the_form_of_a_device_is_told_by_its_number() {
    let (set, _) = demo_set(&target(10, 0, 19045, Arch::Amd64));
    for (id, transitional, modern) in [
        (r"PCI\VEN_1AF4&DEV_0FFF", false, false),
        (r"PCI\VEN_1AF4&DEV_1000", true, false),
        (r"pci\ven_1af4&dev_103f&SUBSYS_1", true, false),
        (r"PCI\VEN_1AF4&DEV_1040", false, true),
        (r"PCI\VEN_1AF4&DEV_107F", false, true),
        (r"PCI\VEN_1AF4&DEV_1080", false, false),
        (r"PCI\VEN_1AF5&DEV_1042", false, false),
        (r"PCI\VEN_1AF4&DEV_10", false, false),
        (r"ACPI\VEN_1AF4&DEV_1042", false, false),
    ] {
        let mut pkg = set.package("netkvm").unwrap().clone();
        pkg.inf.models.truncate(1);
        pkg.inf.models[0].hardware_ids = vec![id.to_string()];
        let expected = Forms {
            transitional,
            modern,
        };
        assert_eq!(pkg.forms(), expected, "{id}");
    }
}

#[test]
fn values_in_the_clear() {
    let w11 = target(10, 0, 26100, Arch::Amd64);
    let result = installed("vioscsi", &w11);
    let find = |key: &str, name: &str| {
        let found = result.system.iter().find_map(|op| match op {
            RegOp::Set {
                key: k,
                name: n,
                data,
            } if k == key && n == name => Some(data.clone()),
            _ => None,
        });
        found.unwrap_or_else(|| panic!("{key} {name}"))
    };
    let sz = |s: &str| RegData::Sz(s.to_string());
    let service = r"ControlSet001\Services\vioscsi";
    let package = r"DriverDatabase\DriverPackages\vioscsi.inf_amd64_0123456789abcdef";
    let cases = [
        (service.to_string(), "Start", RegData::Dword(0)),
        (service.to_string(), "Group", sz("SCSI miniport")),
        (
            service.to_string(),
            "ImagePath",
            RegData::ExpandSz(
                r"\SystemRoot\System32\DriverStore\FileRepository\vioscsi.inf_amd64_0123456789abcdef\vioscsi.sys"
                    .to_string(),
            ),
        ),
        (service.to_string(), "Owners", RegData::MultiSz(vec!["oem5.inf".into()])),
        (
            service.to_string(),
            "DisplayName",
            sz("@oem5.inf,%Service.Desc%;Demo VirtIO SCSI pass-through controller Service"),
        ),
        (format!(r"{service}\Parameters"), "BusType", RegData::Dword(10)),
        (format!(r"{service}\Parameters\PnpInterface"), "5", RegData::Dword(1)),
        (
            r"DriverDatabase\DeviceIds\PCI\VEN_1AF4&DEV_1048&SUBSYS_11001AF4&REV_01".to_string(),
            "oem5.inf",
            RegData::Binary(vec![1, 0xff, 0, 0]),
        ),
        (
            r"DriverDatabase\DeviceIds\PCI\VEN_1AF4&DEV_1048".to_string(),
            "oem5.inf",
            RegData::Binary(vec![2, 0xff, 0, 0]),
        ),
        (package.to_string(), "", sz("oem5.inf")),
        (package.to_string(), "OemPath", sz(r"C:\Windows\hyper2kvm\drivers")),
        (package.to_string(), "SignerScore", RegData::Dword(0x0d00_0005)),
        (format!(r"{package}\Configurations\scsi_inst"), "Service", sz("vioscsi")),
        (
            format!(r"{package}\Descriptors\PCI\VEN_1AF4&DEV_1004"),
            "Description",
            sz("%device.desc%"),
        ),
        (format!(r"{package}\Strings"), "vendor", sz("hyper2kvm demo, not signed")),
    ];
    for (key, name, data) in cases {
        assert_eq!(find(&key, name), data, "{key} {name}");
    }
    assert_eq!(
        result.system[0],
        RegOp::DeleteKey {
            key: format!(r"{service}\StartOverride")
        }
    );
    assert_eq!(
        result.store_name.as_deref(),
        Some("vioscsi.inf_amd64_0123456789abcdef")
    );
    let paths: Vec<String> = result.files.iter().map(|(to, _)| to.to_string()).collect();
    let store = r"\Windows\System32\DriverStore\FileRepository\vioscsi.inf_amd64_0123456789abcdef";
    assert_eq!(
        paths,
        [
            r"\Windows\System32\drivers\vioscsi.sys".to_string(),
            format!(r"{store}\vioscsi.cat"),
            r"\Windows\System32\CatRoot\{F750E6C3-38EE-11D1-85E5-00C04FC295EE}\oem5.cat"
                .to_string(),
            format!(r"{store}\vioscsi.inf"),
            r"\Windows\INF\oem5.inf".to_string(),
            format!(r"{store}\vioscsi.sys"),
        ]
    );
}

/// Blobs that a real Windows 10 wrote for packages with a known DriverVer.
#[test]
fn version_blobs() {
    let cases = [
        (
            "{4d36e97b-e325-11ce-bfc1-08002be10318}",
            "08/02/2019,1.3.15.0",
            "00ff0900000000007be9364d25e3ce11bfc108002be1031800003b3ac548d50100000f00030001000000000000000000",
        ),
        (
            "{4D36E97D-E325-11CE-BFC1-08002BE10318}",
            "07/11/2019,9.8.16.0",
            "00ff0900000000007de9364d25e3ce11bfc108002be10318008024957b37d50100001000080009000000000000000000",
        ),
        (
            "{f2e7dd72-6468-4e36-b6f1-6488f42c1b52}",
            "04/24/2017,1.0.0.0",
            "00ff09000000000072dde7f26864364eb6f16488f42c1b5200805eb78dbcd20100000000000001000000000000000000",
        ),
    ];
    let w10 = target(10, 0, 19045, Arch::Amd64);
    let (set, _) = demo_set(&w10);
    for (guid, ver, blob) in cases {
        let mut pkg = set.packages[0].clone();
        let inf = virtio_win::inf("viostor", "w10", Arch::Amd64).unwrap();
        let inf = String::from_utf8(inf)
            .unwrap()
            .replace("01/20/2025,100.101.104.27100", ver)
            .replace("{4D36E97B-E325-11CE-BFC1-08002BE10318}", guid);
        pkg.inf = super::super::DriverInf::parse(inf.as_bytes(), &w10).unwrap();
        let result = install(&pkg, DIGEST, &w10, &placement(0)).unwrap();
        let version = result.system.iter().find_map(|op| match op {
            RegOp::Set {
                name,
                data: RegData::Binary(data),
                ..
            } if name == "Version" => Some(data),
            _ => None,
        });
        assert_eq!(hex(version.unwrap()), blob, "{ver}");
    }
}

#[test]
fn ids_beyond_the_inf() {
    let w7 = target(6, 1, 7601, Arch::Amd64);
    let (set, _) = demo_set(&w7);
    let mut pkg = set.package("vioscsi").unwrap().clone();
    pkg.pnp_ids = vec![r"PCI\VEN_1AE0&DEV_1004".to_string()];
    let ids: Vec<(String, u8)> = pkg
        .bound_ids()
        .into_iter()
        .map(|b| (b.id, b.kind))
        .collect();
    // The INF for 7 lists only the long ids.
    assert_eq!(
        ids,
        [
            (
                r"PCI\VEN_1AF4&DEV_1004&SUBSYS_00081AF4&REV_00".to_string(),
                1
            ),
            (
                r"PCI\VEN_1AF4&DEV_1048&SUBSYS_11001AF4&REV_01".to_string(),
                1
            ),
            (r"PCI\VEN_1AF4&DEV_1004".to_string(), 2),
            (r"PCI\VEN_1AF4&DEV_1048".to_string(), 2),
            (r"PCI\VEN_1AE0&DEV_1004".to_string(), 1),
        ]
    );
    assert_eq!(
        pkg.forms(),
        Forms {
            transitional: true,
            modern: true
        }
    );
    // An old driver is not bound to a modern device that it does not support.
    pkg.inf.models.truncate(1);
    assert_eq!(
        pkg.forms(),
        Forms {
            transitional: true,
            modern: false
        }
    );
    for (id, short) in [
        (
            r"PCI\VEN_1AF4&DEV_1001&SUBSYS_00021AF4",
            Some(r"PCI\VEN_1AF4&DEV_1001"),
        ),
        (r"PCI\VEN_1AF4&DEV_1001", None),
        (r"PCI\VEN_1AF4&CC_0100", None),
        (r"PCI\VEN_1AF4&CC_0100&REV_1", None),
        (r"ACPI\VEN_1AF4&DEV_1001&REV_1", None),
        (
            r"pci\ven_1af4&dev_1001&rev_1",
            Some(r"pci\ven_1af4&dev_1001"),
        ),
        (r"ACPI\QEMU0001", None),
        ("", None),
    ] {
        assert_eq!(short_id(id).as_deref(), short, "{id}");
    }
}

/// The ranking data of Windows: 1 for a hardware id, 2 for a compatible one, the feature score, and
/// the index among the compatible ids. Of an id that several models list, the better index counts.
#[test]
fn a_device_id_is_recorded_with_its_place_in_the_list_of_the_model() {
    let w10 = target(10, 0, 19045, Arch::Amd64);
    let (set, _) = demo_set(&w10);
    let mut pkg = set.package("viostor").unwrap().clone();
    let model = |ids: &[&str]| {
        let mut model = pkg.inf.models[0].clone();
        model.hardware_ids = ids.iter().map(|id| format!("PCI\\{id}")).collect();
        model
    };
    pkg.inf.models = vec![
        model(&["VEN_1&DEV_A", "VEN_1&DEV_B", "VEN_1&DEV_C", "VEN_1&DEV_D"]),
        model(&["VEN_1&DEV_E", "VEN_1&DEV_D"]),
        model(&["VEN_1&DEV_B"]),
    ];
    pkg.inf.installs[0].feature_score = 0x7f;
    let result = install(&pkg, DIGEST, &w10, &placement(0)).unwrap();
    let rank = |id: &str| {
        let device = format!(r"DriverDatabase\DeviceIds\PCI\{id}");
        let found = result.system.iter().find_map(|op| match op {
            RegOp::Set {
                key,
                data: RegData::Binary(rank),
                ..
            } if *key == device => Some(rank.clone()),
            _ => None,
        });
        found.unwrap_or_else(|| panic!("{id}"))
    };
    assert_eq!(rank("VEN_1&DEV_A"), [1, 0x7f, 0, 0]);
    assert_eq!(rank("VEN_1&DEV_B"), [3, 0x7f, 0, 0]);
    assert_eq!(rank("VEN_1&DEV_C"), [2, 0x7f, 1, 0]);
    assert_eq!(rank("VEN_1&DEV_D"), [2, 0x7f, 0, 0]);
    assert_eq!(rank("VEN_1&DEV_E"), [1, 0x7f, 0, 0]);
}

/// Windows compares the class as its own setup writes it, whatever the INF has.
#[test]
fn the_class_is_in_capitals_in_one_database_and_not_in_the_other() {
    let guid = "{4d36E97b-e325-11ce-bfc1-08002be10318}";
    for (target, key, name) in [
        (
            target(6, 1, 7601, Arch::Amd64),
            r"ControlSet001\Control\CriticalDeviceDatabase\PCI#VEN_1AF4&DEV_1042",
            Some("{4D36E97B-E325-11CE-BFC1-08002BE10318}"),
        ),
        (
            target(10, 0, 19045, Arch::Amd64),
            r"DriverDatabase\DeviceIds\{4d36e97b-e325-11ce-bfc1-08002be10318}",
            None,
        ),
    ] {
        let (set, _) = demo_set(&target);
        let mut pkg = set.package("viostor").unwrap().clone();
        pkg.inf.class_guid = guid.into();
        let result = install(&pkg, DIGEST, &target, &placement(5)).unwrap();
        let there = result.system.iter().any(|op| match (op, name) {
            (RegOp::Set { key: k, data, .. }, Some(name)) => {
                k == key && *data == RegData::Sz(name.into())
            }
            (op, None) => op.key() == key,
            _ => false,
        });
        assert!(there, "{key}");
    }
}

/// The directory id in the INF determines the path of the file and of its service.
#[test]
fn a_file_goes_to_the_directory_that_the_inf_names() {
    let w10 = target(10, 0, 19045, Arch::Amd64);
    let (set, _) = demo_set(&w10);
    let store =
        r"\SystemRoot\System32\DriverStore\FileRepository\viostor.inf_amd64_0123456789abcdef";
    for (dirid, to, image_path) in [
        (10, r"\Windows\viostor.sys", r"\SystemRoot\viostor.sys"),
        (
            11,
            r"\Windows\System32\viostor.sys",
            r"System32\viostor.sys",
        ),
        (
            12,
            r"\Windows\System32\drivers\viostor.sys",
            r"System32\drivers\viostor.sys",
        ),
        (
            13,
            r"\Windows\System32\drivers\viostor.sys",
            &format!(r"{store}\viostor.sys"),
        ),
    ] {
        let mut pkg = set.package("viostor").unwrap().clone();
        for install in &mut pkg.inf.installs {
            for copy in &mut install.copy_files {
                copy.to.dirid = dirid;
            }
            for service in &mut install.services {
                service.binary.dirid = dirid;
            }
        }
        let result = install(&pkg, DIGEST, &w10, &placement(0)).unwrap();
        // The first file is the image; the driver store follows.
        assert_eq!(result.files[0].0.to_string(), to, "{dirid}");
        let path = RegData::ExpandSz(image_path.to_string());
        let service = r"ControlSet001\Services\viostor";
        let wanted = RegOp::set(service, "ImagePath", path);
        assert!(result.system.contains(&wanted), "{dirid}: {wanted:?}");
    }
}

/// Windows sets up helpers when the device appears.
#[test]
fn of_a_staged_package_only_the_service_of_the_device_is_recorded() {
    let w10 = target(10, 0, 19045, Arch::Amd64);
    let (set, _) = demo_set(&w10);
    let mut pkg = set.package("netkvm").unwrap().clone();
    pkg.inf.installs[0].services[0].name = "NetKVM".into();
    let own = pkg.inf.installs[0].services[0].clone();
    let helper = ServiceInstall {
        name: "helper".into(),
        flags: 0,
        ..own.clone()
    };
    pkg.inf.installs[0].services.push(helper);
    let services = |existing: &[&str]| {
        let mut at = placement(0);
        at.existing = existing.iter().map(ToString::to_string).collect();
        let result = install(&pkg, DIGEST, &w10, &at).unwrap();
        let key = r"ControlSet001\Services\";
        let names = result
            .system
            .iter()
            .filter_map(|op| op.key().strip_prefix(key));
        let names = names.filter_map(|name| name.split('\\').next());
        names.map(str::to_lowercase).collect::<BTreeSet<_>>()
    };
    let of_device = |names: &BTreeSet<String>| names.contains(&own.name.to_lowercase());
    let names = services(&[]);
    assert!(of_device(&names) && !names.contains("helper"), "{names:?}");
    // A driver that already drives the device is kept.
    assert!(!of_device(&services(&["netkvm"])));
}

#[test]
fn start_types_of_the_catalogue() {
    let w10 = target(10, 0, 19045, Arch::Amd64);
    let (set, _) = demo_set(&w10);
    let mut pkg = set.packages[0].clone();
    pkg.start_override = Some(3);
    // A helper, which is not the service of the device, starts as the INF specifies.
    let mut helper = pkg.inf.installs[0].services[0].clone();
    (helper.name, helper.flags, helper.start_type) = ("helper".into(), 0, 2);
    pkg.inf.installs[0].services.push(helper);
    let result = install(&pkg, DIGEST, &w10, &placement(0)).unwrap();
    for (service, start) in [("viostor", 3), ("helper", 2)] {
        let key = format!(r"ControlSet001\Services\{service}");
        let edit = RegOp::set(key, "Start", RegData::Dword(start));
        assert!(result.system.contains(&edit), "{service}");
    }
}

/// A package whose CopyFiles omits the image still gets it at the path in the service.
#[test]
fn the_image_is_always_copied() {
    let w10 = target(10, 0, 19045, Arch::Amd64);
    let (set, _) = demo_set(&w10);
    let mut pkg = set.packages[0].clone();
    let whole = install(&pkg, DIGEST, &w10, &placement(0)).unwrap();
    pkg.inf.installs[0].copy_files.clear();
    let result = install(&pkg, DIGEST, &w10, &placement(0)).unwrap();
    assert_eq!(result.files, whole.files);
}

#[test]
fn digests_and_names() {
    let file = |name: &str, bytes: &[u8]| (name.to_string(), bytes.to_vec());
    let a = digest(&[file("a.inf", b"1"), file("b.sys", b"2")]);
    assert_eq!(a.len(), 16);
    assert_eq!(a, digest(&[file("B.SYS", b"2"), file("a.inf", b"1")]));
    assert_ne!(a, digest(&[file("a.inf", b"12"), file("b.sys", b"")]));
    assert_ne!(a, digest(&[file("a.inf", b"1"), file("c.sys", b"2")]));
    assert_ne!(digest(&[file("a", b"bc")]), digest(&[file("ab", b"c")]));
    // SHA-256 over each name and its contents, with their lengths: guests have it in their registry.
    assert_eq!(digest(&[file("A.inf", b"1")]), "6dd42b141554e132");
}

#[test]
fn oem_map() {
    let set = |bytes: &[u8]| oem_numbers(bytes).into_iter().collect::<Vec<_>>();
    assert_eq!(set(&[0xe0]), [0, 1, 2]);
    assert_eq!(set(&[0xff, 0xf0]).len(), 12);
    let edit = |current: Option<&[u8]>, n: &[u32]| match oem_map_edit(current, n) {
        Some(RegOp::Set {
            data: RegData::Binary(map),
            ..
        }) => Some(map),
        None => None,
        other => panic!("{other:?}"),
    };
    assert_eq!(edit(Some(&[0xff, 0xf0]), &[12, 13]), Some(vec![0xff, 0xfc]));
    assert_eq!(edit(Some(&[0xe0]), &[9]), Some(vec![0xe0, 0x40]));
    assert_eq!(edit(None, &[0]), Some(vec![0x80]));
    assert_eq!(edit(Some(&[0xff]), &[7]), None);
}

#[test]
fn device_path() {
    let at = placement(0);
    let value = |current| match device_path_edit(current, &at) {
        Some(RegOp::Set {
            data: RegData::ExpandSz(text),
            ..
        }) => Some(text),
        None => None,
        other => panic!("{other:?}"),
    };
    let ours = r"%SystemRoot%\hyper2kvm\drivers";
    let default = format!(r"%SystemRoot%\inf;{ours}");
    assert_eq!(value(None), Some(default.clone()));
    assert_eq!(value(Some(r"%SystemRoot%\inf;")), Some(default.clone()));
    assert_eq!(value(Some(&default)), None);
    assert_eq!(value(Some(r"C:\x; %systemroot%\HYPER2KVM\drivers")), None);
}

#[test]
fn staging() {
    let w10 = target(10, 0, 19045, Arch::Amd64);
    let (mut set, _) = demo_set(&w10);
    let Staged {
        files: staged,
        notes,
    } = stage_all(&set, &placement(0)).unwrap();
    assert!(notes.is_empty());
    assert_eq!(staged.len(), 6 * 3 + 1);
    assert!(staged.iter().any(|(to, from)| {
        to.to_string() == r"\Windows\hyper2kvm\drivers\netkvm.inf"
            && from == "NetKVM/w10/amd64/netkvm.inf"
    }));
    // Documentation for people stays in the driver source.
    for name in ["README.md", "license.TXT"] {
        let path_in_source = format!("NetKVM/w10/amd64/{name}");
        set.packages[2].files.push(super::super::PackageFile {
            name: name.into(),
            path_in_source,
            size: 10,
        });
    }
    assert_eq!(stage_all(&set, &placement(0)).unwrap().files, staged);
    // The same file name twice: shared if the size is the same, otherwise kept apart.
    let shared = super::super::PackageFile {
        name: "WdfCoInstaller01011.dll".into(),
        path_in_source: "a/WdfCoInstaller01011.dll".into(),
        size: 10,
    };
    for pkg in &mut set.packages[2..5] {
        pkg.files.push(shared.clone());
    }
    set.packages[4].files.last_mut().unwrap().size = 11;
    // Windows treats both spellings as one name.
    set.packages[4].files.last_mut().unwrap().name = "wdfcoinstaller01011.dll".into();
    let Staged {
        files: staged,
        notes,
    } = stage_all(&set, &placement(0)).unwrap();
    assert_eq!(notes.len(), 1);
    let dlls: Vec<String> = staged
        .iter()
        .map(|(to, _)| to.to_string())
        .filter(|to| to.ends_with(".dll"))
        .collect();
    assert_eq!(
        dlls,
        [
            r"\Windows\hyper2kvm\drivers\WdfCoInstaller01011.dll",
            r"\Windows\hyper2kvm\drivers\vioserial\wdfcoinstaller01011.dll",
        ]
    );
}

/// A difference between files for people does not hide one between files that are loaded.
#[test]
fn a_package_whose_readme_and_driver_differ_has_its_own_directory() {
    let w10 = target(10, 0, 19045, Arch::Amd64);
    let (mut set, _) = demo_set(&w10);
    set.packages.truncate(2);
    for (pkg, size) in set.packages.iter_mut().zip([1, 2]) {
        for name in ["a.txt", "z.dll"] {
            let file = super::super::PackageFile {
                name: name.into(),
                path_in_source: format!("{size}/{name}"),
                size,
            };
            pkg.files.insert(0, file.clone());
            pkg.files.sort_by(|a, b| a.name.cmp(&b.name));
        }
    }
    let staged = stage_all(&set, &placement(0)).unwrap();
    let places: Vec<_> = staged
        .files
        .iter()
        .filter(|(_, from)| from.ends_with("z.dll"))
        .map(|(to, from)| (to.to_string(), from.as_str()))
        .collect();
    assert_eq!(
        places,
        [
            (r"\Windows\hyper2kvm\drivers\z.dll".to_string(), "1/z.dll"),
            (
                r"\Windows\hyper2kvm\drivers\vioscsi\z.dll".to_string(),
                "2/z.dll"
            ),
        ]
    );
    assert_eq!(
        staged.notes,
        [
            "vioscsi is staged in a directory of its own: its z.dll differs from that of another driver"
        ]
    );
    // A file for people alone is no difference.
    for pkg in &mut set.packages {
        pkg.files.retain(|f| f.name != "z.dll");
    }
    assert_eq!(stage_all(&set, &placement(0)).unwrap().notes, [""; 0]);
}

fn run(program: &str, args: &[&std::ffi::OsStr]) -> Option<Vec<u8>> {
    #[expect(
        clippy::disallowed_methods,
        reason = "a test compares with the real tool"
    )]
    let output = std::process::Command::new(program).args(args).output();
    match output {
        Ok(output) => {
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{program}: {stderr}");
            Some(output.stdout)
        }
        Err(error) => {
            skip(program, format!("{program}: {error}"));
            None
        }
    }
}

/// hivexregedit merges the edits into real hives, and every one of them is then found there.
#[test]
fn merged_into_real_hives() {
    for (hive, target) in [
        ("win10-vmware/SYSTEM", target(10, 0, 18363, Arch::Amd64)),
        ("win7-x86-vmware/SYSTEM", target(6, 1, 7601, Arch::X86)),
    ] {
        let Some(bytes) = corpus(hive) else {
            return;
        };
        let (set, driver_source) = demo_set(&target);
        let dir = tempfile::tempdir().unwrap();
        let mut edits = RegEdits::new("HKEY_LOCAL_MACHINE\\SYSTEM");
        for (oem, pkg) in (12..).zip(set.boot_storage()) {
            let digest = digest(&pkg.read_files(&driver_source, target.arch).unwrap());
            let result = install(pkg, &digest, &target, &placement(oem)).unwrap();
            edits.ops.extend(result.system);
        }
        let (system, reg) = (dir.path().join("SYSTEM"), dir.path().join("edits.reg"));
        std::fs::write(&system, bytes).unwrap();
        std::fs::write(&reg, edits.to_reg_text()).unwrap();
        let args: [&Path; 5] = [
            Path::new("--merge"),
            Path::new("--prefix"),
            Path::new("HKEY_LOCAL_MACHINE\\SYSTEM"),
            &system,
            &reg,
        ];
        if run("hivexregedit", &args.map(Path::as_os_str)).is_none() {
            return;
        }
        let bytes = std::fs::read(&system).unwrap();
        let view = HiveView::new(&bytes).unwrap();
        assert_eq!(edits.pending(&view.root().unwrap()).unwrap().ops, []);
    }
}
