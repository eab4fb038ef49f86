use super::*;

fn target(nt: (u32, u32), build: u32, server: bool) -> WindowsTarget {
    WindowsTarget {
        major: nt.0,
        minor: nt.1,
        build,
        arch: Arch::Amd64,
        server,
    }
}

#[test]
fn every_windows_has_its_folder() {
    let catalogue = Catalogue::builtin();
    let cases = [
        ((5, 1), 2600, false, "windows-xp", "xp"),
        ((5, 2), 3790, true, "server-2003", "2k3"),
        ((6, 0), 6002, true, "server-2008", "2k8"),
        ((6, 0), 6002, false, "server-2008", "2k8"),
        ((6, 1), 7601, false, "windows-7", "w7"),
        ((6, 1), 7601, true, "server-2008r2", "2k8R2"),
        ((6, 2), 9200, false, "windows-8", "w8"),
        ((6, 2), 9200, true, "server-2012", "2k12"),
        ((6, 3), 9600, false, "windows-8.1", "w8.1"),
        ((6, 3), 9600, true, "server-2012r2", "2k12R2"),
        ((10, 0), 10240, false, "windows-10", "w10"),
        ((10, 0), 19045, false, "windows-10", "w10"),
        ((10, 0), 22000, false, "windows-11", "w11"),
        ((10, 0), 26100, false, "windows-11", "w11"),
        ((10, 0), 14393, true, "server-2016", "2k16"),
        ((10, 0), 17763, true, "server-2019", "2k19"),
        ((10, 0), 20348, true, "server-2022", "2k22"),
        ((10, 0), 25398, true, "server-2022", "2k22"),
        ((10, 0), 26100, true, "server-2025", "2k25"),
    ];
    for (nt, build, server, id, folder) in cases {
        let mut target = target(nt, build, server);
        if nt == (5, 1) {
            // XP x64 is NT 5.2.
            target.arch = Arch::X86;
        }
        let windows = catalogue.windows_for(&target).unwrap();
        assert_eq!(
            (windows.id.as_str(), windows.folders[0].as_str()),
            (id, folder),
            "{target}"
        );
        for folder in &windows.folders {
            assert!(catalogue.folders.contains_key(folder), "{folder} has names");
        }
    }
    assert!(
        catalogue
            .windows_for(&target((4, 0), 1381, false))
            .is_none()
    );
    // Of these there are no editions for the processor.
    for (nt, build, server, arch) in [
        ((10, 0), 20348, true, Arch::X86),
        ((6, 1), 7601, false, Arch::Arm64),
        ((5, 1), 2600, false, Arch::Amd64),
    ] {
        let mut other = target(nt, build, server);
        other.arch = arch;
        assert!(catalogue.windows_for(&other).is_none(), "{other}");
    }
    assert_eq!(
        catalogue.driver_folders(&target((10, 0), 22631, false)),
        ["w11", "w10"]
    );
    assert_eq!(catalogue.drivers[0].name, "viostor");
    assert_eq!(catalogue.drivers[1].name, "vioscsi");
    // Every device of the VM has one driver, and that a service by which it is found in a guest.
    for (device, service) in [
        (VirtioDevice::Blk, "viostor"),
        (VirtioDevice::Scsi, "vioscsi"),
        (VirtioDevice::Net, "netkvm"),
        (VirtioDevice::Balloon, "balloon"),
        (VirtioDevice::Serial, "vioserial"),
        (VirtioDevice::Rng, "viorng"),
    ] {
        assert_eq!(catalogue.service_of(device), Some(service), "{device:?}");
        let drivers = catalogue.drivers.iter();
        assert_eq!(drivers.filter(|d| d.device == Some(device)).count(), 1);
    }
    assert_eq!(catalogue.drivers[2].role, Role::Network);
    assert!(catalogue.skips("VioStor.PDB") && catalogue.skips("vioprot.inf"));
    assert!(!catalogue.skips("viostor.inf"));
}

/// The build before the first one of an entry belongs to the entry below it. Builds after the last
/// known one belong to its entry.
#[test]
fn the_first_and_the_last_build_of_an_entry_are_its_own() {
    let mut catalogue = Catalogue::builtin();
    let id = |catalogue: &Catalogue, build, server| {
        let found = catalogue.windows_for(&target((10, 0), build, server));
        found.map(|w| w.id.clone()).unwrap()
    };
    for (first, server, before, own) in [
        (22000, false, "windows-10", "windows-11"),
        (17763, true, "server-2016", "server-2019"),
        (20348, true, "server-2019", "server-2022"),
        (26100, true, "server-2022", "server-2025"),
    ] {
        assert_eq!(id(&catalogue, first - 1, server), before, "{first}");
        assert_eq!(id(&catalogue, first, server), own, "{first}");
    }
    for (server, product) in [(false, Product::Client), (true, Product::Server)] {
        let of_product = |w: &&Windows| w.nt.major == 10 && w.product == Some(product);
        let newest = catalogue.windows.iter().filter(of_product);
        let newest = newest.max_by_key(|w| w.builds.from).unwrap();
        let last = newest.builds.from.unwrap();
        for build in [last, last + 1, u32::MAX] {
            assert_eq!(id(&catalogue, build, server), newest.id, "{build}");
        }
    }
    let range = "windows: [{id: between, name: B, nt: '10.0', builds: {from: 100, to: 200}, \
                 folders: [w10], media: m}]";
    catalogue.merge_text("c.yaml", range).unwrap();
    for (build, own) in [
        (99, "windows-10"),
        (100, "between"),
        (200, "between"),
        (201, "windows-10"),
    ] {
        assert_eq!(id(&catalogue, build, false), own, "{build}");
    }
}

/// The example in the documentation is what the program accepts, and does what is said there.
#[test]
fn the_documented_example() {
    let docs = include_str!("../../docs/drivers.md");
    let (_, rest) = docs.split_once("```yaml\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let mut catalogue = Catalogue::builtin();
    catalogue.merge_text("example.yaml", example).unwrap();
    let netkvm = catalogue.driver("NETKVM").unwrap();
    assert_eq!(netkvm.start, Some(ServiceStart::System));
    assert_eq!(netkvm.inf, ["netkvm.inf"]);
    let viostor = catalogue.driver("viostor").unwrap();
    assert_eq!(viostor.pnp_ids[0].as_str(), r"PCI\VEN_1AE0&DEV_1001");
    assert!(catalogue.driver("acmestor").unwrap().required);
    let next = target((10, 0), 30000, true);
    assert_eq!(catalogue.windows_for(&next).unwrap().id, "server-next");
    assert_eq!(
        catalogue
            .windows_for(&target((10, 0), 26100, true))
            .unwrap()
            .id,
        "server-2025"
    );
    // Merging once more changes nothing.
    let before = serde_json::to_string(&catalogue).unwrap();
    catalogue.merge_text("example.yaml", example).unwrap();
    assert_eq!(serde_json::to_string(&catalogue).unwrap(), before);
}

#[test]
fn errors_name_file_and_line() {
    let cases = [
        (
            "c.yaml",
            "drivers:\n  - name: netkvm\n    strat: 1\n",
            3,
            "strat",
        ),
        (
            "c.yaml",
            "drivers:\n  - name: netkvm\n    start: soon\n",
            3,
            "soon",
        ),
        (
            "c.yaml",
            "drivers:\n  - name: new\n    inf: [x.inf]\n",
            2,
            "no role",
        ),
        (
            "c.yaml",
            "drivers:\n  - name: netkvm\n    pnp_ids:\n    - VEN_1\n",
            4,
            "hardware id",
        ),
        (
            "c.yaml",
            "vendors:\n- name: V\n  pnp_ids:\n    gone: ['PCI\\X']\n",
            4,
            "unknown driver",
        ),
        (
            "c.yaml",
            "windows:\n- {id: x, name: X, nt: '10', folders: [a], media: m}\n",
            2,
            "NT version",
        ),
        (
            "c.yaml",
            "windows:\n- {id: x, name: X, nt: '10.0', folders: [], media: m}\n",
            2,
            "no directories",
        ),
        ("c.yaml", "\n\nskip: 5\n", 3, "sequence"),
        ("c.yaml", "skip: [\n", 1, ""),
        ("c.json", "{\n\"drivers\": [\n{\"nam\": 1}]}", 3, "nam"),
        (
            "c.yaml",
            "drivers:\n- {name: x, role: other,\n   unless: nosuch}\n",
            3,
            "nosuch",
        ),
    ];
    for (file, text, line, word) in cases {
        let mut catalogue = Catalogue::builtin();
        let before = serde_json::to_string(&catalogue).unwrap();
        let error = catalogue.merge_text(file, text).unwrap_err();
        match &error {
            CatalogueError::Schema {
                line: got, message, ..
            } => {
                assert_eq!(*got, line, "{text:?}: {message}");
                assert!(message.contains(word), "{text:?}: {message}");
            }
            other => panic!("{other}"),
        }
        assert!(
            error
                .to_string()
                .starts_with(&format!("{file}, line {line}: "))
        );
        assert_eq!(
            serde_json::to_string(&catalogue).unwrap(),
            before,
            "nothing changed"
        );
    }
}

#[test]
fn a_file_from_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.json");
    std::fs::write(
        &path,
        r#"{"drivers": [{"name": "viostor", "start": "demand"}]}"#,
    )
    .unwrap();
    let mut catalogue = Catalogue::builtin();
    catalogue.merge_file(&path).unwrap();
    assert_eq!(
        catalogue.driver("viostor").unwrap().start,
        Some(ServiceStart::Demand)
    );
    let missing = catalogue.merge_file(&dir.path().join("no")).unwrap_err();
    assert!(missing.to_string().contains("/no"));
}

#[test]
fn a_hardware_id_is_a_bus_and_an_id() {
    for (text, good) in [
        ("PCI\\VEN_1AF4&DEV_1042", true),
        ("ROOT\\a-b.c_d", true),
        ("VEN_1AF4&DEV_1042", false),
        ("PCI\\", false),
        ("\\VEN_1AF4", false),
        ("PCI\\VEN_1AF4\\x", false),
        ("PCI\\VEN 1AF4", false),
        ("P[I\\VEN_1AF4", false),
    ] {
        assert_eq!(PnpId::try_from(text.to_string()).is_ok(), good, "{text}");
    }
    let longest = format!("PCI\\{}", "x".repeat(196));
    assert!(PnpId::try_from(longest.clone()).is_ok());
    assert!(PnpId::try_from(longest + "x").is_err());
}

/// Disks of the VM are behind one of two devices.
#[test]
fn two_devices_have_disks() {
    use VirtioDevice::{Balloon, Blk, Net, Rng, Scsi, Serial};
    assert_eq!(Blk.disk_bus(), Some(DiskBus::VirtioBlk));
    assert_eq!(Scsi.disk_bus(), Some(DiskBus::VirtioScsi));
    for device in [Net, Balloon, Serial, Rng] {
        assert_eq!(device.disk_bus(), None, "{device:?}");
    }
}

/// Names are merged without regard to case; a pattern without `*` is a whole name.
#[test]
fn a_file_adds_to_what_is_known() {
    let mut catalogue = Catalogue::builtin();
    let text = "folders: {W11: [win11]}\nskip: [readme.txt]\n\
                drivers: [{name: VIOSTOR, services: [other]}]";
    let before = catalogue.folders.len();
    catalogue.merge_text("c.yaml", text).unwrap();
    assert_eq!(catalogue.folders.len(), before);
    assert!(catalogue.folder_names("w11").contains(&"win11".to_string()));
    assert!(catalogue.skips("README.TXT") && !catalogue.skips("readme.txt.sys"));
    assert_eq!(catalogue.driver("viostor").unwrap().services, ["other"]);
    assert!(catalogue.driver("viostor").unwrap().required);
    assert!(catalogue.merge_text("empty.yaml", " \n").is_ok());
}

/// Of a driver that is known a file changes what it says, and leaves the rest.
#[test]
fn each_field_of_a_known_driver_can_be_said_anew() {
    let known = Catalogue::builtin().driver("netkvm").unwrap().clone();
    type Change = fn(&mut DriverSpec);
    for (said, change) in [
        ("role: other", (|d| d.role = Role::Other) as Change),
        ("device: virtio-rng", |d| {
            d.device = Some(VirtioDevice::Rng);
        }),
        ("services: [a]", |d| d.services = vec!["a".into()]),
        ("folders: [a]", |d| d.folders = vec!["a".into()]),
        ("inf: [a.inf]", |d| d.inf = vec!["a.inf".into()]),
        ("required: true", |d| d.required = true),
        ("start: system", |d| d.start = Some(ServiceStart::System)),
        ("unless: balloon", |d| d.unless = Some("balloon".into())),
        ("pnp_ids: ['PCI\\VEN_1AF4']", |d| {
            d.pnp_ids
                .extend(PnpId::try_from("PCI\\VEN_1AF4".to_string()));
        }),
    ] {
        let mut catalogue = Catalogue::builtin();
        let text = format!("drivers: [{{name: NetKVM, {said}}}]");
        catalogue.merge_text("c.yaml", &text).unwrap();
        let mut expected = known.clone();
        change(&mut expected);
        assert_ne!(expected, known, "{said}");
        assert_eq!(*catalogue.driver("netkvm").unwrap(), expected, "{said}");
        // What another file says of something else leaves it.
        let other = match said.starts_with("services") {
            true => "drivers: [{name: netkvm, required: false}]",
            false => "drivers: [{name: netkvm, services: [b]}]",
        };
        catalogue.merge_text("d.yaml", other).unwrap();
        if !said.starts_with("services") {
            expected.services = vec!["b".into()];
        }
        assert_eq!(*catalogue.driver("netkvm").unwrap(), expected, "{said}");
    }
}

/// A file with a mistake in its last line has no effect at all.
#[test]
fn a_file_that_is_refused_changes_nothing() {
    let mut catalogue = Catalogue::builtin();
    let text = "skip: ['*.new']\n\
                windows: [{id: a, name: A, nt: '10.0', folders: [w10], media: m}]\n\
                drivers: [{name: netkvm, required: true}, {name: new}]";
    assert!(catalogue.merge_text("c.yaml", text).is_err());
    assert!(!catalogue.skips("x.new"));
    assert!(!catalogue.driver("netkvm").unwrap().required);
    assert!(catalogue.windows.iter().all(|w| w.id != "a"));
}

/// The built-in data as one line for each entry: what a guest gets follows from it.
#[test]
fn the_whole_of_the_built_in_catalogue() {
    let catalogue = Catalogue::builtin();
    let mut text = String::new();
    for (arch, names) in &catalogue.architectures {
        text.push_str(&format!("arch {arch}: {}\n", names.join(" ")));
    }
    for (folder, names) in &catalogue.folders {
        text.push_str(&format!("folder {folder}: {}\n", names.join(" ")));
    }
    for pattern in &catalogue.skip {
        text.push_str(&format!("skip {pattern}\n"));
    }
    for windows in &catalogue.windows {
        text.push_str(&format!("{}\n", serde_json::to_string(windows).unwrap()));
    }
    for driver in &catalogue.drivers {
        text.push_str(&format!("{}\n", serde_json::to_string(driver).unwrap()));
    }
    insta::assert_snapshot!("builtin", text);
}

#[test]
fn a_file_that_cannot_be_merged_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.yaml");
    let merge = || Catalogue::builtin().merge_file(&path);
    for (size, fine) in [(MAX_CONFIG, true), (MAX_CONFIG + 1, false)] {
        std::fs::write(&path, " ".repeat(usize::try_from(size).unwrap())).unwrap();
        let merged = merge();
        assert_eq!(merged.is_ok(), fine, "{size}");
        if let Err(error) = merged {
            let message = format!("{} is more than 1048576 bytes", path.display());
            assert_eq!(error.to_string(), message);
        }
    }
    for (text, message) in [
        (
            "drivers: [{name: new, role: other, unless: gone}]",
            "there is no driver \"gone\"",
        ),
        (
            "drivers: [{name: new}]",
            "the new driver \"new\" has no role",
        ),
        (
            "vendors: [{name: V, pnp_ids: {gone: []}}]",
            "vendor \"V\" names the unknown driver \"gone\"",
        ),
        (
            "windows: [{id: x, name: X, nt: '10.0', folders: [], media: m}]",
            "windows \"x\" names no directories",
        ),
        (
            "windows: [{id: x, name: X, nt: '10.0', folders: [w10], media: m, without: [gone]}]",
            "there is no driver \"gone\"",
        ),
    ] {
        std::fs::write(&path, text).unwrap();
        let found = merge().unwrap_err().to_string();
        assert_eq!(found, format!("{}, line 1: {message}", path.display()));
    }
    std::fs::remove_file(&path).unwrap();
    let message = format!("reading {}", path.display());
    assert_eq!(merge().unwrap_err().to_string(), message);
}

/// A new driver has its name where nothing else is said; a new Windows precedes the known ones.
#[test]
fn a_new_driver_and_a_new_windows_stand_in_their_places() {
    let mut catalogue = Catalogue::builtin();
    let text = "drivers: [{name: Mine, role: network}, {name: late, role: storage, required: true}]\n\
                windows: [{id: a, name: A, nt: '10.0', folders: [w10], media: m}, \
                {id: windows-10, name: B, nt: '6.9', folders: [w8], media: n}]\n\
                vendors: [{name: V, pnp_ids: {mine: ['PCI\\X', 'PCI\\X']}}]";
    let before = catalogue.clone();
    catalogue.merge_text("c.yaml", text).unwrap();
    assert_eq!(
        catalogue.driver("mine"),
        Some(&DriverSpec {
            name: "Mine".into(),
            role: Role::Network,
            device: None,
            services: Vec::new(),
            folders: vec!["Mine".into()],
            inf: vec!["Mine.inf".into()],
            required: false,
            start: None,
            unless: None,
            pnp_ids: vec![PnpId::try_from("PCI\\X".to_string()).unwrap()],
        })
    );
    let names: Vec<_> = catalogue.drivers.iter().map(|d| d.name.as_str()).collect();
    assert_eq!(names[..5], ["viostor", "vioscsi", "late", "netkvm", "Mine"]);
    let ids = |c: &Catalogue| c.windows.iter().map(|w| w.id.clone()).collect::<Vec<_>>();
    assert_eq!(
        ids(&catalogue),
        [&["a".to_string()], &ids(&before)[..]].concat()
    );
    let ten = catalogue
        .windows
        .iter()
        .find(|w| w.id == "windows-10")
        .unwrap();
    assert_eq!((&*ten.name, ten.nt.minor), ("B", 9));
    assert_eq!(
        catalogue
            .windows_for(&target((10, 0), 19045, false))
            .unwrap()
            .id,
        "a"
    );
    assert_eq!(catalogue.driver_folders(&target((4, 0), 1, false)), [""; 0]);
    assert_eq!(catalogue.folder_names("none"), ["none"]);
}

#[test]
fn a_new_driver_has_all_that_its_file_says() {
    let mut catalogue = Catalogue::builtin();
    let text = "drivers: [{name: a, role: storage, device: virtio-scsi, services: [b, c], \
                folders: [d], inf: [e.inf, f.inf], required: true, start: demand, \
                unless: viostor, pnp_ids: ['PCI\\X']}]";
    catalogue.merge_text("c.yaml", text).unwrap();
    let list = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let expected = DriverSpec {
        name: "a".into(),
        role: Role::Storage,
        device: Some(VirtioDevice::Scsi),
        services: list(&["b", "c"]),
        folders: list(&["d"]),
        inf: list(&["e.inf", "f.inf"]),
        required: true,
        start: Some(ServiceStart::Demand),
        unless: Some("viostor".into()),
        pnp_ids: vec![PnpId::try_from("PCI\\X".to_string()).unwrap()],
    };
    assert_eq!(catalogue.driver("a"), Some(&expected));
}

#[test]
fn the_names_of_a_directory_are_found_in_any_case() {
    let catalogue = Catalogue::builtin();
    assert_eq!(catalogue.folder_names("W11"), ["w11", "win11"]);
    assert_eq!(
        catalogue.folder_names("2K8r2"),
        ["2k8r2", "win2008r2"],
        "as the RPM has it"
    );
}

#[test]
fn a_file_without_contents_adds_nothing() {
    let before = Catalogue::builtin();
    for text in ["", " \n", "\n\n  \n"] {
        let mut catalogue = before.clone();
        catalogue.merge_text("c.yaml", text).unwrap();
        assert_eq!(catalogue.drivers, before.drivers, "{text:?}");
        assert_eq!(catalogue.windows, before.windows, "{text:?}");
    }
}
