//! The origin of driver sources: addresses, the release that each Windows needs, and how to check
//! them.

use std::fmt::Write as _;
use std::path::Path;

use crate::error::{Error, Result};
use crate::ui::count;

use super::catalogue::Catalogue;
use super::driver_source::{self, DriverSource};

/// The directory in which the virtio-win project publishes its releases.
const PUBLISHED: &str = "https://fedorapeople.org/groups/virt/virtio-win/direct-downloads";

/// The current release, as one file.
pub const CURRENT: &str =
    "https://fedorapeople.org/groups/virt/virtio-win/direct-downloads/stable-virtio/virtio-win.iso";

/// The published ISO of a release to which a Windows is limited, by its last number (`173` for
/// 0.1.173).
const OLD: [(u16, &str); 2] = [
    (
        215,
        "archive-virtio/virtio-win-0.1.215-2/virtio-win-0.1.215.iso",
    ),
    (
        173,
        "archive-virtio/virtio-win-0.1.173-9/virtio-win-0.1.173.iso",
    ),
];

/// The hints for a missing driver source.
pub fn hints(default: &str) -> [String; 2] {
    [
        format!(
            "--virtio-iso PATH or HYPER2KVM_VIRTIO_ISO names a virtio-win ISO or directory; {default} is the default when it exists"
        ),
        format!(
            "get it from {CURRENT} or as package virtio-win (Fedora, RHEL); hyper2kvm drivers --where has the releases for old Windows"
        ),
    ]
}

const TAKES: &str = "--virtio-iso takes a virtio-win ISO, or a directory laid out like it or like its RPM; hyper2kvm drivers --where prints its address";

/// Opens a driver source. A directory or image without a driver of the catalogue is refused.
pub fn open(path: &Path, catalogue: &Catalogue) -> Result<Box<dyn DriverSource>> {
    let driver_source = driver_source::open(path).map_err(|e| {
        let shown = path.display();
        Error::failed(format!("opening the virtio-win drivers at {shown}"))
            .because(e)
            .hint(TAKES)
    })?;
    if !is_driver_source(driver_source.as_ref(), catalogue) {
        let files = count(driver_source.files().len(), "file");
        return Err(Error::failed(format!(
            "{} is no virtio-win driver source: {files}, and none is the INF of a driver in the catalogue",
            path.display()
        ))
        .hint(TAKES));
    }
    Ok(driver_source)
}

/// Whether a driver source has any driver of the catalogue; otherwise it is not a driver source.
pub fn is_driver_source(driver_source: &dyn DriverSource, catalogue: &Catalogue) -> bool {
    let known = |path: &str| {
        let name = path.rsplit('/').next().unwrap_or_default();
        let names = catalogue.drivers.iter().flat_map(|d| &d.inf);
        names.into_iter().any(|inf| inf.eq_ignore_ascii_case(name))
    };
    driver_source.files().iter().any(|file| known(&file.path))
}

/// The text that `drivers --where` prints.
pub fn text(catalogue: &Catalogue, default: &str) -> String {
    let mut text = format!(
        "Where virtio-win comes from\n  current   {CURRENT}\n  all       {PUBLISHED}/archive-virtio/\n  \
         packages  virtio-win on Fedora and RHEL: {default},\n            where hyper2kvm finds it without being told\n\n\
         Which release\n"
    );
    for (driver_source, names) in releases(catalogue) {
        let _ = writeln!(text, "  {driver_source}");
        for name in names {
            let _ = writeln!(text, "    {name}");
        }
        let old = OLD
            .iter()
            .find(|(n, _)| driver_source.contains(&format!("0.1.{n}")));
        let address = old.map(|(_, path)| format!("{PUBLISHED}/{path}"));
        let _ = writeln!(text, "    {}", address.as_deref().unwrap_or(CURRENT));
    }
    text.push_str(
        "\nWhat to check\n  \
         - Take it over https, from the addresses above or a distribution's package.\n  \
         - hyper2kvm drivers ISO: the row of the guest's Windows names a version.\n  \
         - hyper2kvm plan SOURCE --virtio-iso ISO: each driver is signed, by Red Hat or\n    \
         Microsoft; --require-signed refuses what is not.\n",
    );
    text
}

/// The releases with the systems that need them, in the order of the catalogue.
fn releases(catalogue: &Catalogue) -> Vec<(&str, Vec<&str>)> {
    let mut releases: Vec<(&str, Vec<&str>)> = Vec::new();
    for windows in &catalogue.windows {
        match releases
            .iter_mut()
            .find(|(driver_source, _)| *driver_source == windows.media)
        {
            Some((_, names)) => names.push(&windows.name),
            None => releases.push((&windows.media, vec![&windows.name])),
        }
    }
    releases
}

#[cfg(test)]
mod tests {
    use super::super::driver_source::Memory;
    use super::*;

    #[test]
    fn every_windows_has_a_release_and_every_release_an_address() {
        let catalogue = Catalogue::builtin();
        let text = text(&catalogue, "/iso");
        for windows in &catalogue.windows {
            assert!(text.contains(&windows.name), "{}", windows.name);
            if let Some(last) = &windows.last_signed {
                let known = OLD.iter().any(|(n, _)| *n == last.build);
                assert!(known, "no address for 0.1.{}", last.build);
                assert!(windows.media.contains(&format!("0.1.{}", last.build)));
            }
        }
        for (number, path) in OLD {
            assert!(text.contains(path) && path.contains(&format!("0.1.{number}")));
        }
        assert!(CURRENT.starts_with(PUBLISHED) && text.contains(CURRENT));
    }

    #[test]
    fn other_folders_are_no_driver_source() {
        let catalogue = Catalogue::builtin();
        for (path, is_source) in [
            ("viostor/w10/amd64/viostor.inf", true),
            ("NetKVM/w10/amd64/NETKVM.INF", true),
            ("etc/passwd", false),
            ("drivers/other.inf", false),
            ("viostor.inf/readme.txt", false),
        ] {
            let driver_source = Memory::new([(path.to_string(), vec![1])]);
            assert_eq!(
                is_driver_source(&driver_source, &catalogue),
                is_source,
                "{path}"
            );
        }
    }

    #[test]
    fn the_text_of_drivers_where() {
        let text = text(
            &Catalogue::builtin(),
            "/usr/share/virtio-win/virtio-win.iso",
        );
        insta::assert_snapshot!("where", text);
        insta::assert_snapshot!("hints", hints("/iso").join("\n"));
    }

    /// Files of a configuration may name a release again behind others.
    #[test]
    fn a_release_is_listed_once_with_all_that_need_it() {
        let mut catalogue = Catalogue::builtin();
        catalogue.windows.truncate(3);
        for (windows, driver_source) in catalogue.windows.iter_mut().zip(["one", "two", "one"]) {
            windows.media = driver_source.into();
            windows.name = windows.id.clone();
        }
        let ids: Vec<_> = catalogue.windows.iter().map(|w| w.id.as_str()).collect();
        let expected = [("one", vec![ids[0], ids[2]]), ("two", vec![ids[1]])];
        assert_eq!(releases(&catalogue), expected);
    }

    #[test]
    fn what_is_opened_is_a_driver_source() {
        let catalogue = Catalogue::builtin();
        let dir = tempfile::tempdir().unwrap();
        let shown = dir.path().display();
        std::fs::write(dir.path().join("a.txt"), "x").unwrap();
        let error = open(dir.path(), &catalogue).err().unwrap();
        assert_eq!(
            error.to_string(),
            format!(
                "{shown} is no virtio-win driver source: 1 file, and none is the INF of a driver in the catalogue"
            )
        );
        std::fs::write(dir.path().join("viostor.inf"), "x").unwrap();
        let driver_source = open(dir.path(), &catalogue).unwrap();
        assert_eq!(driver_source.files().len(), 2);
        assert_eq!(driver_source.describe(), format!("directory {shown}"));
        let error = open(&dir.path().join("gone"), &catalogue).err().unwrap();
        let message = format!("opening the virtio-win drivers at {shown}/gone");
        assert_eq!(error.to_string(), message);
    }
}
