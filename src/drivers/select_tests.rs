use super::*;
use crate::demo::virtio_win::{self, Layout};
use crate::drivers::driver_source::Memory;

pub(super) fn image(arch: Arch) -> Vec<u8> {
    crate::drivers::pe::head(arch.pe_machine())
}

pub(super) fn demo(layout: Layout) -> Memory {
    Memory::new(virtio_win::files(layout, &image))
}

/// The demo's ISO without some of its files.
fn demo_without(gone: impl Fn(&str) -> bool) -> Memory {
    let files = virtio_win::files(Layout::Iso, &image);
    Memory::new(files.into_iter().filter(|(path, _)| !gone(path)))
}

pub(super) fn target(
    major: u32,
    minor: u32,
    build: u32,
    server: bool,
    arch: Arch,
) -> WindowsTarget {
    WindowsTarget {
        major,
        minor,
        build,
        arch,
        server,
    }
}

fn targets() -> Vec<(WindowsTarget, &'static str)> {
    use Arch::{Amd64, X86};
    vec![
        (target(6, 1, 7601, false, X86), "w7"),
        (target(6, 1, 7601, false, Amd64), "w7"),
        (target(6, 1, 7601, true, Amd64), "2k8R2"),
        (target(6, 2, 9200, false, X86), "w8"),
        (target(6, 2, 9200, false, Amd64), "w8"),
        (target(6, 2, 9200, true, Amd64), "2k12"),
        (target(6, 3, 9600, false, X86), "w8.1"),
        (target(6, 3, 9600, false, Amd64), "w8.1"),
        (target(6, 3, 9600, true, Amd64), "2k12R2"),
        (target(10, 0, 10240, false, X86), "w10"),
        (target(10, 0, 19045, false, Amd64), "w10"),
        (target(10, 0, 14393, true, Amd64), "2k16"),
        (target(10, 0, 17763, true, Amd64), "2k19"),
        (target(10, 0, 20348, true, Amd64), "2k22"),
        (target(10, 0, 22631, false, Amd64), "w11"),
        (target(10, 0, 26100, false, Amd64), "w11"),
        (target(10, 0, 26100, true, Amd64), "2k25"),
    ]
}

#[test]
fn the_demo_folder_in_both_layouts() {
    let catalogue = Catalogue::builtin();
    for layout in [Layout::Iso, Layout::Rpm] {
        let driver_source = demo(layout);
        for (target, folder) in targets() {
            let set = select(&driver_source, &catalogue, &target).unwrap();
            assert_eq!(set.os_folder, folder, "{target}");
            assert_eq!(set.notes, Vec::<String>::new(), "{target}");
            let names: Vec<&str> = set.packages.iter().map(|p| p.driver.as_str()).collect();
            assert_eq!(
                names,
                [
                    "viostor",
                    "vioscsi",
                    "netkvm",
                    "balloon",
                    "vioserial",
                    "viorng"
                ]
            );
            let boot: Vec<&str> = set.boot_storage().map(|p| p.driver.as_str()).collect();
            assert_eq!(boot, ["viostor", "vioscsi"]);
            for package in &set.packages {
                let contents = package.read_files(&driver_source, target.arch).unwrap();
                assert_eq!(contents.len(), package.files.len());
                assert!(package.files.iter().all(|f| !f.name.ends_with(".pdb")));
                assert!(package.files.iter().any(|f| f.name == package.inf_name));
            }
            assert_eq!(set.packages[0].store_files().len(), 3);
            let agent = set.guest_agent_msi.as_deref();
            match (layout, target.arch) {
                (Layout::Rpm, _) => assert_eq!(agent, None),
                (_, Arch::X86) => assert_eq!(agent, Some("guest-agent/qemu-ga-i386.msi")),
                _ => assert_eq!(agent, Some("guest-agent/qemu-ga-x86_64.msi")),
            }
        }
    }
    let arm = target(10, 0, 26100, false, Arch::Arm64);
    let set = select(&demo(Layout::Iso), &catalogue, &arm).unwrap();
    assert_eq!(set.packages[0].folder, "viostor/w11/ARM64");
}

/// The paths of a real driver source, with suitable invented INFs.
fn listed(paths: &str) -> Memory {
    let catalogue = Catalogue::builtin();
    let names: Vec<(String, Vec<String>)> = catalogue
        .folders
        .keys()
        .map(|os| (os.clone(), catalogue.folder_names(os)))
        .collect();
    let contents = paths.lines().filter(|l| !l.is_empty()).map(|path| {
        let parts: Vec<String> = path.to_lowercase().split('/').map(str::to_string).collect();
        let has = |names: &[&str]| parts.iter().any(|p| names.contains(&p.as_str()));
        let arch = if has(&["x86", "i386"]) {
            Arch::X86
        } else {
            Arch::Amd64
        };
        let stem = parts.last().and_then(|n| n.strip_suffix(".inf"));
        let driver = match stem {
            Some("vioser") => "vioserial",
            Some(stem) => stem,
            None => return (path.to_string(), Vec::new()),
        };
        let (os, _) = names
            .iter()
            .find(|(_, names)| names.iter().any(|n| parts.contains(n)))
            .unwrap();
        // Drivers that the demo lacks get the text of the RNG's INF, with their own file names.
        let bytes = virtio_win::inf(driver, os, arch).unwrap_or_else(|| {
            let text = virtio_win::inf("viorng", os, arch).unwrap();
            String::from_utf8(text)
                .unwrap()
                .replace("viorng", driver)
                .replace(&format!("{driver}.sys"), &format!("{driver}.cat"))
                .into_bytes()
        });
        (path.to_string(), bytes)
    });
    Memory::new(contents)
}

#[test]
fn the_real_file_lists() {
    let Some(corpus) = crate::skip::corpus_folder() else {
        return;
    };
    let catalogue = Catalogue::builtin();
    for list in ["virtio-win-iso-files.txt", "virtio-win-rpm-files.txt"] {
        let driver_source = listed(&std::fs::read_to_string(corpus.join(list)).unwrap());
        for (target, folder) in targets() {
            let set = select(&driver_source, &catalogue, &target)
                .unwrap_or_else(|e| panic!("{list} {target}: {}", e.blocker().reason));
            assert_eq!(set.os_folder, folder, "{list} {target}");
            // Substitutes only for optional drivers (there is no viogpudo for w8, only for 2k12).
            let of_boot = |n: &&String| n.contains("viostor") || n.contains("vioscsi");
            assert_eq!(set.notes.iter().find(of_boot), None, "{list} {target}");
            for driver in [
                "netkvm",
                "balloon",
                "vioserial",
                "viorng",
                "vioinput",
                "pvpanic",
            ] {
                assert!(set.package(driver).is_some(), "{list} {target} {driver}");
            }
            for package in &set.packages {
                let os = format!("/{}", package.os_folder.to_lowercase());
                assert!(
                    package.folder.to_lowercase().contains(&os),
                    "{}",
                    package.folder
                );
                assert!(!package.folder.contains("sriov"), "{}", package.folder);
                for file in &package.files {
                    let name = file.name.to_lowercase();
                    assert!(
                        !name.ends_with(".pdb") && !name.starts_with("vioprot"),
                        "{name}"
                    );
                }
            }
            // One of the two drivers for the firmware configuration device.
            assert!(set.package("qemufwcfg").is_none() || set.package("fwcfg").is_none());
            if set.os_folder == "w11" && list.contains("rpm") {
                assert!(set.package("smbus").is_some(), "only in the flat directory");
            }
        }
        // A recent driver source has nothing for these.
        for target in [
            target(5, 1, 2600, false, Arch::X86),
            target(6, 0, 6002, true, Arch::Amd64),
            target(10, 0, 22631, false, Arch::Arm64),
        ] {
            match select(&driver_source, &catalogue, &target).unwrap_err() {
                DriverError::NoDriver(missing) => {
                    assert_eq!(missing.driver, "viostor");
                    assert!(missing.remedy.starts_with("use "), "{missing}");
                }
                other => panic!("{other}"),
            }
        }
    }
}

#[test]
fn the_demo_has_drivers_for_the_windows_that_virtio_win_has() {
    let catalogue = Catalogue::builtin();
    let driver_source = demo(Layout::Iso);
    let mut there = Vec::new();
    for windows in &catalogue.windows {
        for arch in Arch::ALL {
            if !windows.archs.is_empty() && !windows.archs.contains(&arch) {
                continue;
            }
            // Each example is one of the Windows that its entry is for.
            let target = windows.example(arch);
            assert_eq!(catalogue.windows_for(&target).unwrap().id, windows.id);
            if select(&driver_source, &catalogue, &target).is_ok() {
                there.push((windows.id.as_str(), arch));
            }
        }
    }
    assert!(there.contains(&("windows-11", Arch::Arm64)));
    assert!(there.contains(&("windows-10", Arch::Amd64)));
    assert!(there.contains(&("windows-7", Arch::X86)));
    assert!(!there.contains(&("server-2008r2", Arch::Arm64)));
    assert!(!there.iter().any(|(id, _)| *id == "windows-xp"));
}

#[test]
fn a_missing_required_driver_is_an_error_with_a_remedy() {
    let w7 = target(6, 1, 7601, false, Arch::Amd64);
    let driver_source = demo_without(|p| p.contains("/w7/") || p.contains("/2k8R2/"));
    let error = select(&driver_source, &Catalogue::builtin(), &w7).unwrap_err();
    let blocker = error.blocker();
    assert_eq!(blocker.code, "driver-missing");
    assert_eq!(
        blocker.reason,
        "driver files in memory has no viostor driver for Windows 7 (x86_64): looked for w7, 2k8R2, found \
         2k12, 2k12R2, 2k16, 2k19, 2k22, 2k25, w10, w11, w8, w8.1"
    );
    assert_eq!(
        blocker.remedy,
        "use virtio-win 0.1.173 or older and pass it with --virtio-iso"
    );

    let driver_source = demo_without(|p| p.starts_with("vioscsi/w10/") || p.starts_with("amd64/"));
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    let error = select(&driver_source, &Catalogue::builtin(), &w10).unwrap_err();
    assert!(matches!(error, DriverError::NoDriver(e) if e.driver == "vioscsi"));

    let nt4 = target(4, 0, 1381, true, Arch::X86);
    let error = select(&driver_source, &Catalogue::builtin(), &nt4).unwrap_err();
    assert!(error.remedy().contains("--driver-config"));
}

#[test]
fn an_accepted_substitute_is_noted() {
    let s25 = target(10, 0, 26100, true, Arch::Amd64);
    let driver_source = demo_without(|p| p.contains("2k25"));
    let set = select(&driver_source, &Catalogue::builtin(), &s25).unwrap();
    assert_eq!(set.os_folder, "w11");
    assert!(
        set.notes[0].contains("has no 2k25 directory with viostor"),
        "{:?}",
        set.notes
    );
}

#[test]
fn drivers_this_windows_would_not_load() {
    let change = |from: &str, to: &str| {
        let contents = virtio_win::files(Layout::Iso, &image)
            .into_iter()
            .map(|(path, bytes)| {
                let bytes = match String::from_utf8(bytes.clone()) {
                    Ok(text) => text.replace(from, to).into_bytes(),
                    Err(_) => bytes,
                };
                (path, bytes)
            });
        Memory::new(contents)
    };
    let catalogue = Catalogue::builtin();
    let newer = change("63.90.104.21500", "63.94.104.24000");
    let error = select(&newer, &catalogue, &target(6, 3, 9600, true, Arch::Amd64)).unwrap_err();
    assert_eq!(error.code(), "driver-not-signed");
    assert!(error.remedy().contains("0.1.215"));
    // The last release with a valid signature for it, and the next one.
    let of = |stamp: &str| change("63.90.104.21500", &format!("63.90.104.{stamp}"));
    let server = target(6, 3, 9600, true, Arch::Amd64);
    assert!(select(&of("21599"), &catalogue, &server).is_ok());
    let error = select(&of("21600"), &catalogue, &server).unwrap_err();
    assert_eq!(error.code(), "driver-not-signed");
    insta::assert_snapshot!("not-signed", format!("{:?}", error.blocker()));
    // Other numbers than those of virtio-win say nothing of a release.
    let foreign = change("63.90.104.21500", "63.90.103.24000");
    assert!(select(&foreign, &catalogue, &server).is_ok());
    // 32-bit Windows does not check.
    select(&newer, &catalogue, &target(6, 3, 9600, false, Arch::X86)).unwrap();

    // Like Windows 7, which accepts later ones after an update.
    let w7 = target(6, 1, 7601, false, Arch::Amd64);
    for (stamp, notes) in [("17399", 0), ("17400", 5)] {
        let driver_source = change("61.77.104.17300", &format!("61.77.104.{stamp}"));
        let set = select(&driver_source, &catalogue, &w7).unwrap();
        assert_eq!(set.notes.len(), notes, "{stamp}: {:?}", set.notes);
    }
    let newer = change("61.77.104.17300", "61.80.104.20000");
    let set = select(&newer, &catalogue, &target(6, 1, 7601, false, Arch::Amd64)).unwrap();
    insta::assert_snapshot!("signed-later", set.notes.join("\n"));

    let old = change("PCI\\VEN_1AF4&DEV_1042", "PCI\\VEN_1AF4&DEV_1001");
    let set = select(&old, &catalogue, &target(6, 1, 7601, false, Arch::Amd64)).unwrap();
    assert!(set.notes[0].contains("viostor in viostor/w7/amd64 lists no modern"));

    let demand = change("StartType      = 0", "StartType      = 3");
    let w7 = target(6, 1, 7601, false, Arch::Amd64);
    let error = select(&demand, &catalogue, &w7).unwrap_err();
    assert!(matches!(error, DriverError::NoService { .. }), "{error}");
    let mut boot = Catalogue::builtin();
    boot.merge_text(
        "c.yaml",
        "drivers: [{name: viostor, start: boot}, {name: vioscsi, start: boot}]",
    )
    .unwrap();
    let set = select(&demand, &boot, &w7).unwrap();
    assert_eq!(set.packages[0].start_override, Some(0));

    let wrong = change("NTamd64.6.3", "NTamd64.10.0");
    let error = select(&wrong, &catalogue, &target(6, 3, 9600, true, Arch::Amd64)).unwrap_err();
    assert_eq!(error.code(), "driver-inf-unusable");
}

#[test]
fn broken_packages() {
    let catalogue = Catalogue::builtin();
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    // For an optional driver, a note. For a required one, an error.
    let driver_source = demo_without(|p| p == "Balloon/w10/amd64/balloon.sys");
    let set = select(&driver_source, &catalogue, &w10).unwrap();
    assert!(set.package("balloon").is_none());
    assert_eq!(
        set.notes,
        [
            "balloon is left out: the driver package in Balloon/w10/amd64 is incomplete: \
          balloon.sys is missing"
        ]
    );
    let driver_source = demo_without(|p| p == "viostor/w10/amd64/viostor.cat");
    let error = select(&driver_source, &catalogue, &w10).unwrap_err();
    assert!(matches!(&error, DriverError::MissingFile { file, .. } if file == "viostor.cat"));

    let driver_source = Memory::new(virtio_win::files(Layout::Iso, &|_| image(Arch::X86)));
    let set = select(&driver_source, &catalogue, &w10).unwrap();
    let package = &set.packages[0];
    let error = package.read_files(&driver_source, Arch::Amd64).unwrap_err();
    assert!(matches!(error, DriverError::WrongImage { .. }));
}

/// NT 5 has no driver for virtio-scsi; the directory of a set is that of its first storage driver.
#[test]
fn a_set_has_the_drivers_that_exist_for_its_windows() {
    let xp = target(5, 1, 2600, false, Arch::X86);
    let set = select(&crate::testing::driver_source(), &Catalogue::builtin(), &xp).unwrap();
    let names: Vec<_> = set.packages.iter().map(|p| p.driver.as_str()).collect();
    assert_eq!((names, set.os_folder.as_str()), (vec!["viostor"], "xp"));
    let s25 = target(10, 0, 26100, true, Arch::Amd64);
    let gone = |p: &str| p.starts_with("viostor/2k25/") || p.starts_with("amd64/2k25/viostor");
    let set = select(&demo_without(gone), &Catalogue::builtin(), &s25).unwrap();
    let folders: Vec<_> = set.packages.iter().map(|p| p.os_folder.as_str()).collect();
    assert_eq!(folders, ["w11", "2k25", "2k25", "2k25", "2k25", "2k25"]);
    assert_eq!(set.os_folder, "w11");
    assert_eq!(
        set.notes[1],
        "vioscsi comes from vioscsi/2k25/amd64, not from w11"
    );
}

/// Of several copies, the one in the highest directory is that of the release.
#[test]
fn the_guest_agent_is_that_of_the_processor_and_of_the_highest_directory() {
    let paths = [
        "old/guest-agent/qemu-ga-x86_64.msi",
        "guest-agent/QEMU-GA-x86_64.MSI",
        "a/b/guest-agent/qemu-ga-x86_64.msi",
        "guest-agent/qemu-ga-i386.msi",
        // Shorter, but deeper.
        "a/b/qemu-ga-x86_64.msi",
    ];
    let driver_source = Memory::new(paths.map(|path| (path.to_string(), vec![0])));
    let agent = |arch| guest_agent(driver_source.files(), arch);
    assert_eq!(agent(Arch::Amd64).as_deref(), Some(paths[1]));
    assert_eq!(agent(Arch::X86).as_deref(), Some(paths[3]));
    assert_eq!(agent(Arch::Arm64), None);
}

/// Two INFs for one device: the one without a driver is for a source that has no other.
#[test]
fn a_driver_is_left_out_where_the_one_it_stands_in_for_is_there() {
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    let chosen = |there: &[&str]| {
        let mut files = virtio_win::files(Layout::Iso, &image);
        for driver in there {
            for (path, bytes) in virtio_win::files(Layout::Iso, &image) {
                let Some(name) = path.strip_prefix("viorng/w10/amd64/") else {
                    continue;
                };
                let bytes = match String::from_utf8(bytes.clone()) {
                    Ok(text) => text.replace("viorng", driver).into_bytes(),
                    Err(_) => bytes,
                };
                let name = name.replace("viorng", driver);
                files.push((format!("{driver}/w10/amd64/{name}"), bytes));
            }
        }
        let set = select(&Memory::new(files), &Catalogue::builtin(), &w10).unwrap();
        let names = ["fwcfg", "qemufwcfg"];
        names.map(|name| set.package(name).is_some())
    };
    assert_eq!(chosen(&["fwcfg", "qemufwcfg"]), [true, false]);
    assert_eq!(chosen(&["qemufwcfg"]), [false, true]);
    assert_eq!(chosen(&["fwcfg"]), [true, false]);
}

/// docs/drivers.md: `archs` empty means all.
#[test]
fn a_limit_of_signatures_without_architectures_holds_for_all() {
    let mut driver_source = Vec::new();
    for (path, bytes) in virtio_win::files(Layout::Iso, &image) {
        let bytes = match String::from_utf8(bytes.clone()) {
            Ok(text) => text.replace(".104.21500", ".104.24000").into_bytes(),
            Err(_) => bytes,
        };
        driver_source.push((path, bytes));
    }
    let driver_source = Memory::new(driver_source);
    for (archs, refused) in [
        (&[][..], [true, true]),
        (&[Arch::Amd64], [false, true]),
        (&[Arch::X86], [true, false]),
    ] {
        let mut catalogue = Catalogue::builtin();
        for windows in &mut catalogue.windows {
            if let Some(last) = &mut windows.last_signed {
                last.archs = archs.to_vec();
            }
        }
        let found = [Arch::X86, Arch::Amd64].map(|arch| {
            match select(&driver_source, &catalogue, &target(6, 3, 9600, false, arch)) {
                Err(error) => error.code() == "driver-not-signed",
                Ok(_) => false,
            }
        });
        assert_eq!(found, refused, "{archs:?}");
    }
}

/// Each error with its code, its reason down to the source, and its remedy.
#[test]
fn what_is_wrong_with_a_driver_is_said() {
    let fresh = "get a fresh copy of the virtio-win ISO and pass it with --virtio-iso";
    let driver_source = DriverSourceError::NotFound { path: "x".into() };
    let inf = InfError::MissingSection("Version");
    let missing = |available: &[&str]| {
        DriverError::NoDriver(Box::new(NoDriver {
            driver: "viostor".into(),
            windows: "W".into(),
            driver_source: "m".into(),
            looked_for: vec!["w1".into(), "w2".into()],
            available: available.iter().map(ToString::to_string).collect(),
            remedy: "help".into(),
        }))
    };
    for (error, code, reason, remedy) in [
        (
            DriverError::UnknownWindows {
                windows: "W".into(),
            },
            "windows-not-in-catalogue",
            "the driver catalogue has no entry for W",
            "describe this Windows in a file and pass it with --driver-config (hyper2kvm docs drivers, \"windows\")",
        ),
        (
            missing(&[]),
            "driver-missing",
            "m has no viostor driver for W: looked for w1, w2, found none for any Windows",
            "help",
        ),
        (
            missing(&["a", "b"]),
            "driver-missing",
            "m has no viostor driver for W: looked for w1, w2, found a, b",
            "help",
        ),
        (
            DriverError::NotSigned {
                driver: "d 1 in f".into(),
                windows: "W".into(),
                reason: "why".into(),
                remedy: "help".into(),
            },
            "driver-not-signed",
            "d 1 in f is not usable on W: why",
            "help",
        ),
        (
            DriverError::Inf {
                folder: "f".into(),
                inf: "i.inf".into(),
                windows: "W".into(),
                source: Box::new(inf),
                remedy: "help".into(),
            },
            "driver-inf-unusable",
            "f/i.inf cannot be used for W: INF has no [Version] section",
            "help",
        ),
        (
            DriverError::MissingFile {
                folder: "f".into(),
                file: "x.sys".into(),
            },
            "driver-package-incomplete",
            "the driver package in f is incomplete: x.sys is missing",
            fresh,
        ),
        (
            DriverError::WrongImage {
                file: "f/x.sys".into(),
                arch: Arch::Amd64,
            },
            "driver-wrong-image",
            "f/x.sys is not a driver image for x86_64",
            fresh,
        ),
        (
            DriverError::NoService {
                folder: "f".into(),
                inf: "i.inf".into(),
            },
            "driver-inf-unusable",
            "f/i.inf installs no boot-start service for its device",
            fresh,
        ),
        (
            DriverError::DriverSource(driver_source),
            "driver-media-unreadable",
            "reading the driver source: x does not exist",
            fresh,
        ),
    ] {
        assert_eq!(error.blocker(), Blocker::new(code, reason, remedy));
    }
}

/// Everything about the packages of one Windows, and the notes.
#[test]
fn a_package_has_what_the_source_and_the_catalogue_say() {
    let mut catalogue = Catalogue::builtin();
    let ids = "drivers: [{name: viostor, pnp_ids: ['PCI\\VEN_1AE0&DEV_1001']}, {name: balloon, start: system}]";
    catalogue.merge_text("c.yaml", ids).unwrap();
    let mut files = virtio_win::files(Layout::Iso, &image);
    // Beside a single INF everything is used but what the catalogue skips.
    for name in ["viostor/w10/amd64/Readme.txt", "viostor/w10/amd64/x.PDB"] {
        files.push((name.into(), vec![1, 2]));
    }
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    let set = select(&Memory::new(files), &catalogue, &w10).unwrap();
    let mut text = format!(
        "{} {} {:?} {:?}\n",
        set.windows, set.os_folder, set.guest_agent_msi, set.notes
    );
    for p in &set.packages {
        let names: Vec<_> = p
            .files
            .iter()
            .map(|f| format!("{} {}", f.name, f.path_in_source))
            .collect();
        let store: Vec<_> = p.store_files().iter().map(|f| f.name.as_str()).collect();
        text.push_str(&format!(
            "{} {:?} {:?} required {} in {} ({}) {} start {:?} ids {:?} signer {:?}\n  {}\n  store {}, images {:?}\n",
            p.driver,
            p.role,
            p.device,
            p.required,
            p.folder,
            p.os_folder,
            p.inf_name,
            p.start_override,
            p.pnp_ids,
            p.signer,
            names.join(", "),
            store.join(" "),
            p.images(),
        ));
    }
    insta::assert_snapshot!("packages-w10", text);
    let drives = [VirtioDevice::Blk, VirtioDevice::Net, VirtioDevice::Rng].map(|d| set.drives(d));
    assert_eq!(drives, [true; 3]);
    assert!(set.package("NETKVM").is_some() && set.package("gone").is_none());
}

/// Of several directories for one driver the shallowest; of two INFs in one, what each names.
#[test]
fn a_directory_of_several_drivers_gives_each_its_own_files() {
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    let mut files = virtio_win::files(Layout::Iso, &image);
    let of = |files: &[(String, Vec<u8>)], driver: &str| {
        let set = select(&Memory::new(files.to_vec()), &Catalogue::builtin(), &w10).unwrap();
        let package = set.package(driver).unwrap().clone();
        let names: Vec<_> = package.files.iter().map(|f| f.name.clone()).collect();
        (package.folder, names)
    };
    let copy = |files: &mut Vec<(String, Vec<u8>)>, from: &str, to: &str| {
        let found: Vec<_> = files
            .iter()
            .filter_map(|(path, bytes)| Some((path.strip_prefix(from)?.to_string(), bytes.clone())))
            .collect();
        assert!(!found.is_empty(), "{from}");
        files.extend(
            found
                .into_iter()
                .map(|(name, bytes)| (format!("{to}{name}"), bytes)),
        );
    };
    copy(
        &mut files,
        "viostor/w10/amd64/",
        "deep/er/viostor/w10/amd64/",
    );
    assert_eq!(of(&files, "viostor").0, "viostor/w10/amd64");
    // The directory of the driver precedes that of all drivers, wherever it lies.
    files.retain(|(path, _)| !path.starts_with("viostor/w10/amd64/"));
    assert_eq!(of(&files, "viostor").0, "deep/er/viostor/w10/amd64");
    files.retain(|(path, _)| !path.starts_with("deep/"));
    let (folder, names) = of(&files, "viostor");
    assert_eq!(folder, "amd64/w10");
    assert_eq!(names, ["viostor.cat", "viostor.inf", "viostor.sys"]);
    assert_eq!(of(&files, "vioscsi").0, "vioscsi/w10/amd64");
}

#[test]
fn a_substitute_and_a_mixed_source_are_noted() {
    let s22 = target(10, 0, 20348, true, Arch::Amd64);
    let folders = Catalogue::builtin()
        .windows_for(&s22)
        .unwrap()
        .folders
        .clone();
    let mixed = demo_without(|p| p.starts_with("vioscsi/2k22/") || p.starts_with("amd64/2k22/"));
    let set = select(&mixed, &Catalogue::builtin(), &s22).unwrap();
    let used = set.package("vioscsi").unwrap().folder.clone();
    assert_eq!(used, format!("vioscsi/{}/amd64", folders[1]));
    assert_eq!(
        set.notes,
        [
            format!(
                "driver files in memory has no 2k22 directory with vioscsi: the one in {used} is taken, which {} accepts",
                set.windows
            ),
            format!("vioscsi comes from {used}, not from 2k22"),
        ]
    );
}

#[test]
fn the_image_of_another_processor_is_refused_by_its_name_only() {
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    let driver_source = demo(Layout::Iso);
    let set = select(&driver_source, &Catalogue::builtin(), &w10).unwrap();
    let package = set.package("netkvm").unwrap();
    let contents = package.read_files(&driver_source, Arch::Amd64).unwrap();
    for (name, bytes) in &contents {
        let file = package.files.iter().find(|f| f.name == *name).unwrap();
        assert_eq!(driver_source.read(&file.path_in_source).unwrap(), *bytes);
        assert_eq!(file.size, bytes.len() as u64);
    }
    let error = package.read_files(&driver_source, Arch::Arm64).unwrap_err();
    assert_eq!(
        error.to_string(),
        "NetKVM/w10/amd64/netkvm.sys is not a driver image for arm64"
    );
}

/// The disk of Windows needs a driver that starts at boot; nothing else does.
#[test]
fn only_a_required_driver_of_disks_must_start_at_boot() {
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    for (text, code) in [
        ("drivers: [{name: viorng, role: storage}]", None),
        ("drivers: [{name: netkvm, required: true}]", None),
        (
            "drivers: [{name: viorng, role: storage, required: true}]",
            Some("driver-inf-unusable"),
        ),
    ] {
        let mut catalogue = Catalogue::builtin();
        catalogue.merge_text("c.yaml", text).unwrap();
        let found = select(&demo(Layout::Iso), &catalogue, &w10);
        assert_eq!(found.err().map(|e| e.code()), code, "{text}");
    }
}

/// An unpacked source may have its names in any case, as those who copied it have them.
#[test]
fn a_source_with_its_names_in_capitals_has_the_same_packages() {
    let files = virtio_win::files(Layout::Iso, &image);
    let capitals = |files: &[(String, Vec<u8>)]| {
        Memory::new(
            files
                .iter()
                .map(|(path, bytes)| (path.to_uppercase(), bytes.clone())),
        )
    };
    for (target, folder) in targets() {
        let plain = select(&Memory::new(files.clone()), &Catalogue::builtin(), &target).unwrap();
        let driver_source = capitals(&files);
        let set = select(&driver_source, &Catalogue::builtin(), &target).unwrap();
        assert_eq!((set.os_folder.as_str(), &set.notes), (folder, &vec![]));
        let shown = |set: &DriverSet| -> Vec<_> {
            let package = |p: &DriverPackage| {
                let files = p.files.iter().map(|f| f.name.to_lowercase());
                (p.driver.clone(), files.collect::<Vec<_>>())
            };
            set.packages.iter().map(package).collect()
        };
        assert_eq!(shown(&set), shown(&plain), "{target}");
        for (package, plain) in set.packages.iter().zip(&plain.packages) {
            assert_eq!(package.store_files().len(), plain.store_files().len());
            package.read_files(&driver_source, target.arch).unwrap();
            // The name of an image is that of its service in any case.
            let other = match target.arch {
                Arch::X86 => Arch::Amd64,
                _ => Arch::X86,
            };
            let error = package.read_files(&driver_source, other).unwrap_err();
            assert!(matches!(error, DriverError::WrongImage { .. }), "{error}");
        }
    }
}

/// Windows tells no names apart by their case.
#[test]
fn a_pattern_is_that_of_names_in_any_case() {
    let mut catalogue = Catalogue::builtin();
    let text = "skip: ['*.ABC', 'Begin*', 'Whole.Txt']";
    catalogue.merge_text("c.YAML", text).unwrap();
    for (name, skipped) in [
        ("x.abc", true),
        ("X.Abc", true),
        ("x.abcd", false),
        ("BEGINNING", true),
        ("a begin", false),
        ("whole.TXT", true),
        ("whole.txt2", false),
    ] {
        assert_eq!(catalogue.skips(name), skipped, "{name}");
    }
    let json = r#"{"skip": ["of-json"]}"#;
    catalogue.merge_text("c.JSON", json).unwrap();
    assert!(catalogue.skips("OF-JSON"));
}

/// A directory that only looks like that of the driver, and the error of the best one.
#[test]
fn a_directory_without_the_inf_is_passed_over_and_the_best_one_is_named() {
    let w10 = target(10, 0, 19045, false, Arch::Amd64);
    let mut files = virtio_win::files(Layout::Iso, &image);
    files.push(("viostor/w10/AMD64/readme.txt".into(), vec![1]));
    let nested = |files: &mut Vec<(String, Vec<u8>)>| {
        for (path, _) in files.iter_mut() {
            if let Some(name) = path.strip_prefix("viostor/w10/amd64/") {
                *path = format!("below/viostor/w10/amd64/{name}");
            }
        }
    };
    nested(&mut files);
    let set = select(&Memory::new(files), &Catalogue::builtin(), &w10).unwrap();
    let folder = &set.package("viostor").unwrap().folder;
    assert_eq!(folder, "below/viostor/w10/amd64");
    // Of Server 2025, whose drivers may be those of 11, each directory lacks another file.
    let s25 = target(10, 0, 26100, true, Arch::Amd64);
    let files = virtio_win::files(Layout::Iso, &image).into_iter();
    let left = files.filter(|(path, _)| match path.strip_prefix("viostor/") {
        Some(rest) => {
            let best = rest.starts_with("2k25/") && !rest.ends_with(".cat");
            best || rest.starts_with("w11/") && !rest.ends_with(".sys")
        }
        None => !path.starts_with("amd64/"),
    });
    let error = select(&Memory::new(left), &Catalogue::builtin(), &s25).unwrap_err();
    let DriverError::MissingFile { folder, file } = &error else {
        panic!("{error}");
    };
    assert_eq!(
        (folder.as_str(), file.as_str()),
        ("viostor/2k25/amd64", "viostor.cat")
    );
}
