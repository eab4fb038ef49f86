//! Packages with several models, services and spellings, as the demo's drivers have none.

use super::tests::{DIGEST, demo_set, placement, target};
use super::*;
use crate::drivers::select::PackageFile;
use crate::drivers::target::Arch;

fn viostor(target: &WindowsTarget) -> DriverPackage {
    demo_set(target).0.package("viostor").unwrap().clone()
}

fn system(pkg: &DriverPackage, target: &WindowsTarget) -> Vec<RegOp> {
    install(pkg, DIGEST, target, &placement(5)).unwrap().system
}

/// The data that the edits write to a value.
fn value<'o>(ops: &'o [RegOp], of: &str, named: &str) -> Option<&'o RegData> {
    ops.iter().find_map(|op| match op {
        RegOp::Set { key, name, data } if *key == of && name == named => Some(data),
        _ => None,
    })
}

/// A package with a second model in an install section of its own: another service and score.
fn two_sections(target: &WindowsTarget) -> DriverPackage {
    let mut pkg = viostor(target);
    pkg.inf.models.truncate(1);
    pkg.inf.models[0].hardware_ids = vec!["PCI\\VEN_1&DEV_A".into()];
    let mut model = pkg.inf.models[0].clone();
    model.hardware_ids = vec!["PCI\\VEN_1&DEV_B".into()];
    model.install_section = "Second".into();
    pkg.inf.models.push(model);
    let mut second = pkg.inf.installs[0].clone();
    second.name = "Second".into();
    second.feature_score = 0x33;
    second.services[0].name = "other".into();
    pkg.inf.installs.push(second);
    pkg
}

#[test]
fn each_model_has_the_service_and_the_score_of_its_own_section() {
    let w10 = target(10, 0, 19045, Arch::Amd64);
    let ops = system(&two_sections(&w10), &w10);
    for (device, score) in [("A", 0xff), ("B", 0x33)] {
        let key = format!("DriverDatabase\\DeviceIds\\PCI\\VEN_1&DEV_{device}");
        let rank = RegData::Binary(vec![1, score, 0, 0]);
        assert_eq!(value(&ops, &key, "oem5.inf"), Some(&rank), "{device}");
    }
    let w7 = target(6, 1, 7601, Arch::Amd64);
    let ops = system(&two_sections(&w7), &w7);
    for (device, service) in [("A", "viostor"), ("B", "other")] {
        let database = "ControlSet001\\Control\\CriticalDeviceDatabase";
        let key = format!("{database}\\PCI#VEN_1&DEV_{device}");
        let service = RegData::Sz(service.into());
        assert_eq!(value(&ops, &key, "Service"), Some(&service), "{device}");
    }
}

/// The configuration names the service of the device, and has the settings of all.
#[test]
fn a_helper_before_the_service_of_the_device_is_not_taken_for_it() {
    let w10 = target(10, 0, 19045, Arch::Amd64);
    let mut pkg = viostor(&w10);
    let line = AddReg {
        root: "HKR".into(),
        subkey: "Parameters".into(),
        name: "Mark".into(),
        data: Some(RegData::Dword(7)),
    };
    let services = &mut pkg.inf.installs[0].services;
    services[0].add_reg = vec![line.clone()];
    let helper = ServiceInstall {
        name: "helper".into(),
        flags: 0,
        ..services[0].clone()
    };
    services.insert(0, helper);
    let ops = system(&pkg, &w10);
    let package = "DriverDatabase\\DriverPackages\\viostor.inf_amd64_0123456789abcdef";
    let name = &pkg.inf.installs[0].name;
    let key = format!("{package}\\Configurations\\{name}");
    let own = RegData::Sz("viostor".into());
    assert_eq!(value(&ops, &key, "Service"), Some(&own));
    for service in ["helper", "viostor"] {
        let key = format!("{key}\\Services\\{service}\\Parameters");
        assert_eq!(value(&ops, &key, "Mark"), line.data.as_ref(), "{service}");
    }
}

/// An id in another case is the same one. Every full id of a model has its short form, and one that
/// is listed anyway keeps its kind.
#[test]
fn ids_are_joined_whatever_their_case() {
    let mut pkg = viostor(&target(10, 0, 19045, Arch::Amd64));
    let model = pkg.inf.models[0].clone();
    pkg.inf.models = [
        &["PCI\\VEN_1&DEV_A&REV_1", "PCI\\VEN_1&DEV_B&REV_1"][..],
        &["pci\\ven_1&dev_b&rev_1"],
        &["PCI\\VEN_1&DEV_C&REV_1"],
        &["pci\\ven_1&dev_c"],
    ]
    .map(|ids| {
        let mut model = model.clone();
        model.hardware_ids = ids.iter().map(ToString::to_string).collect();
        model
    })
    .to_vec();
    let ids = pkg.bound_ids();
    let ids: Vec<_> = ids.iter().map(|b| (&*b.id, b.kind, b.model)).collect();
    assert_eq!(
        ids,
        [
            ("PCI\\VEN_1&DEV_A&REV_1", 1, 0),
            ("PCI\\VEN_1&DEV_B&REV_1", 3, 0),
            ("PCI\\VEN_1&DEV_C&REV_1", 1, 2),
            ("pci\\ven_1&dev_c", 1, 3),
            ("PCI\\VEN_1&DEV_A", 2, 0),
            ("PCI\\VEN_1&DEV_B", 2, 0),
        ]
    );
}

#[test]
fn the_forms_do_not_go_by_the_order_of_the_ids() {
    let mut pkg = viostor(&target(10, 0, 19045, Arch::Amd64));
    pkg.inf.models.truncate(1);
    for ids in [["1001", "1042"], ["1042", "1001"]] {
        let ids = ids.map(|id| format!("PCI\\VEN_1AF4&DEV_{id}"));
        pkg.inf.models[0].hardware_ids = ids.to_vec();
        let forms = pkg.forms();
        assert!(forms.transitional && forms.modern, "{ids:?}");
    }
}

/// An INF names its files in another case than the directory has them.
#[test]
fn files_go_to_the_same_places_whatever_their_case() {
    for target in [
        target(10, 0, 19045, Arch::Amd64),
        target(6, 1, 7601, Arch::Amd64),
    ] {
        let (set, _) = demo_set(&target);
        for name in ["viostor", "netkvm"] {
            let pkg = set.package(name).unwrap().clone();
            let mut capitals = pkg.clone();
            for file in &mut capitals.files {
                file.name = file.name.to_uppercase();
            }
            let places = |pkg: &DriverPackage| {
                let result = install(pkg, DIGEST, &target, &placement(5)).unwrap();
                let places = result.files.iter().map(|(to, _)| to.key());
                places.collect::<Vec<_>>()
            };
            assert_eq!(places(&capitals), places(&pkg), "{name} {target}");
            assert_eq!(
                places(&pkg).is_empty(),
                name == "netkvm" && target.major == 6
            );
        }
    }
}

/// Three drivers: the file of the first differs from that of the last.
#[test]
fn a_clash_is_found_with_any_package_before() {
    let (mut set, _) = demo_set(&target(10, 0, 19045, Arch::Amd64));
    set.packages.truncate(3);
    for (n, size) in [(0, 1), (2, 2)] {
        set.packages[n].files.push(PackageFile {
            name: "z.dll".into(),
            path_in_source: format!("{n}/z.dll"),
            size,
        });
    }
    let staged = stage_all(&set, &placement(0)).unwrap();
    let of = |from: &str| {
        let found = staged.files.iter().find(|(_, path)| path == from);
        found.map(|(to, _)| to.to_string())
    };
    let driver = &set.packages[2].driver;
    let shared = "\\Windows\\hyper2kvm\\drivers";
    assert_eq!(of("0/z.dll"), Some(format!("{shared}\\z.dll")));
    assert_eq!(of("2/z.dll"), Some(format!("{shared}\\{driver}\\z.dll")));
    assert_eq!(staged.notes.len(), 1);
}

#[test]
fn the_device_path_does_not_go_by_the_place_of_windows() {
    for windows in ["\\Windows", "\\WINNT", "\\Systems\\Second"] {
        let windows = GuestPath::parse(windows).unwrap();
        let at = Placement::new(ControlSet::new(1), windows, 0).unwrap();
        let path = r"%SystemRoot%\inf;%SystemRoot%\hyper2kvm\drivers";
        let op = RegOp::set(
            r"Microsoft\Windows\CurrentVersion",
            "DevicePath",
            RegData::ExpandSz(path.into()),
        );
        assert_eq!(device_path_edit(None, &at), Some(op), "{}", at.windows);
    }
}
