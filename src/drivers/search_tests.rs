//! Directories and drivers with the less usual names, and sets that a configuration makes.

use super::tests::{demo, image, target};
use super::*;
use crate::demo::virtio_win::{self, Layout};
use crate::drivers::driver_source::Memory;

/// The demo's ISO with its directories named otherwise.
fn renamed(from: &str, to: &str) -> Memory {
    let files = virtio_win::files(Layout::Iso, &image).into_iter();
    Memory::new(
        files.map(|(path, bytes)| (format!("/{path}").replace(from, to)[1..].into(), bytes)),
    )
}

#[test]
fn an_architecture_may_have_its_other_name() {
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    let set = select(&renamed("/amd64/", "/x64/"), &Catalogue::builtin(), &w10).unwrap();
    assert_eq!(set.packages[0].folder, "viostor/w10/x64");
}

/// Without the name of the driver the architecture precedes the OS.
#[test]
fn a_directory_with_too_few_parts_is_none() {
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    let catalogue = Catalogue::builtin();
    for (folder, found) in [("amd64/w10", true), ("w10/amd64", false), ("amd64", false)] {
        // All drivers of this Windows in one directory.
        let files = virtio_win::files(Layout::Iso, &image).into_iter();
        let files = files.filter_map(|(path, bytes)| {
            let (_, name) = path.split_once("/w10/amd64/")?;
            Some((format!("{folder}/{name}"), bytes))
        });
        let set = select(&Memory::new(files), &catalogue, &w10);
        assert_eq!(set.is_ok(), found, "{folder}");
        let code = set.err().map(|error| error.code());
        assert_eq!(code, (!found).then_some("driver-missing"), "{folder}");
    }
}

#[test]
fn a_driver_that_does_not_exist_for_a_windows_is_named_in_any_case() {
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    let mut catalogue = Catalogue::builtin();
    for windows in &mut catalogue.windows {
        windows.without = vec!["VioSCSI".into()];
    }
    let set = select(&demo(Layout::Iso), &catalogue, &w10).unwrap();
    assert!(set.package("vioscsi").is_none() && set.package("viostor").is_some());
}

/// A disk is attached only to what the guest must have.
#[test]
fn an_optional_driver_of_disks_is_none_to_boot_from() {
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    let mut catalogue = Catalogue::builtin();
    let optional = "drivers: [{name: vioscsi, required: false}]";
    catalogue.merge_text("c.yaml", optional).unwrap();
    let set = select(&demo(Layout::Iso), &catalogue, &w10).unwrap();
    assert!(set.package("vioscsi").is_some());
    let boot: Vec<_> = set.boot_storage().map(|p| p.driver.as_str()).collect();
    assert_eq!(boot, ["viostor"]);
}

/// Helpers run in the kernel too.
#[test]
fn the_images_of_a_package_are_those_of_all_its_services() {
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    let set = select(&demo(Layout::Iso), &Catalogue::builtin(), &w10).unwrap();
    let mut package = set.package("viostor").unwrap().clone();
    let mut helper = package.inf.installs[0].services[0].clone();
    (helper.flags, helper.binary.path) = (0, "Deep\\Helper.SYS".into());
    package.inf.installs[0].services.push(helper);
    let images = package.images();
    assert_eq!(Vec::from_iter(images), ["helper.sys", "viostor.sys"]);
}

/// A file that an INF names is needed, whatever the catalogue skips.
#[test]
fn a_file_that_the_inf_names_is_never_skipped() {
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    let mut catalogue = Catalogue::builtin();
    catalogue.merge_text("c.yaml", "skip: ['*.sys']").unwrap();
    let set = select(&demo(Layout::Iso), &catalogue, &w10).unwrap();
    let package = set.package("viostor").unwrap();
    assert!(package.files.iter().any(|f| f.name == "viostor.sys"));
}

/// A file may stand in CopyFiles only.
#[test]
fn a_file_that_is_copied_belongs_to_the_package() {
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    let set = select(&demo(Layout::Iso), &Catalogue::builtin(), &w10).unwrap();
    let mut package = set.package("viostor").unwrap().clone();
    package.inf.source_files.clear();
    let files = package.store_files();
    let names: Vec<_> = files.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, ["viostor.cat", "viostor.inf", "viostor.sys"]);
}
