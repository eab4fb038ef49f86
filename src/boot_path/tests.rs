//! The measured table of real hives, and what each single change does to it. The judge of the edits
//! is `hivexregedit`: it makes the changed hives.

use std::path::{Path, PathBuf};

use super::*;

fn corpus() -> PathBuf {
    std::env::var_os("HYPER2KVM_CORPUS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/corpus"),
        PathBuf::from,
    )
}

#[allow(clippy::disallowed_methods, clippy::print_stderr)]
fn corpus_hive(name: &str) -> Option<Vec<u8>> {
    let path = corpus().join(name);
    if !path.exists() {
        eprintln!("SKIP {} is not there", path.display());
        return None;
    }
    let out = std::process::Command::new("xz")
        .arg("-dc")
        .arg(&path)
        .output()
        .expect("running xz");
    assert!(out.status.success());
    Some(out.stdout)
}

/// hivexregedit does not create the parents of a key.
fn with_parents(reg: &str) -> String {
    let mut text = String::from("Windows Registry Editor Version 5.00\n");
    for line in reg.lines() {
        if let Some(key) = line.strip_prefix('[').filter(|k| !k.starts_with('-')) {
            for (end, _) in key.match_indices('\\').skip(1) {
                text += &format!("[{}]\n\n", &key[..end]);
            }
        }
        text += &format!("{line}\n");
    }
    text
}

/// The hive with a `.reg` text merged by hivexregedit; `None` when the tool is not installed.
#[allow(clippy::disallowed_methods, clippy::print_stderr)]
fn merged(hive: &[u8], reg: &str) -> Option<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let (file, text) = (dir.path().join("SYSTEM"), dir.path().join("x.reg"));
    std::fs::write(&file, hive).unwrap();
    std::fs::write(&text, with_parents(reg)).unwrap();
    let run = std::process::Command::new("hivexregedit")
        .args(["--merge", "--prefix", "X"])
        .args([&file, &text])
        .output();
    match run {
        Ok(out) => {
            let err = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success(), "hivexregedit: {err}");
            Some(std::fs::read(&file).unwrap())
        }
        Err(error) => {
            assert!(
                std::env::var_os("HYPER2KVM_REQUIRE_TOOLS").is_none(),
                "hivexregedit: {error}"
            );
            eprintln!("SKIP hivexregedit is not installed");
            None
        }
    }
}

const WIN7: &str = "win7-x86-vmware/SYSTEM.xz";
const WIN10: &str = "win10-vmware/SYSTEM.xz";

struct Guest {
    hive: Vec<u8>,
    nt: (u32, u32),
    arch: Machine,
}

impl Guest {
    fn win7() -> Option<Self> {
        Some(Self {
            hive: corpus_hive(WIN7)?,
            nt: (6, 1),
            arch: Machine::I386,
        })
    }

    fn win10() -> Option<Self> {
        Some(Self {
            hive: corpus_hive(WIN10)?,
            nt: (10, 0),
            arch: Machine::Amd64,
        })
    }

    fn with(&self, reg: &str) -> Option<Self> {
        Some(Self {
            hive: merged(&self.hive, reg)?,
            ..*self
        })
    }

    fn evaluate(&self, controller: Controller) -> BootPath {
        self.evaluate_with(controller, &|_| ImageState::Present {
            machine: Some(self.arch),
        })
    }

    fn evaluate_with(
        &self,
        controller: Controller,
        image: &dyn Fn(&GuestPath) -> ImageState,
    ) -> BootPath {
        let system = HiveView::new(&self.hive).unwrap();
        let root = GuestPath::parse("\\Windows").unwrap();
        let ctx = BootContext {
            system: &system,
            control_set: "ControlSet001",
            windows_root: &root,
            nt: self.nt,
            arch: self.arch,
            image,
        };
        evaluate(&ctx, controller)
    }
}

fn table(guest: &Guest) -> Vec<(&'static str, bool, Option<String>, String)> {
    let row = |c: Controller| {
        let path = guest.evaluate(c);
        (c.name(), path.ready, path.service, path.reason)
    };
    Controller::ALL.into_iter().map(row).collect()
}

#[test]
fn measured_windows_7() {
    let Some(guest) = Guest::win7() else { return };
    insta::assert_compact_debug_snapshot!(table(&guest), @r##"[("sata", false, Some("msahci"), "msahci does not start at boot (Start=3)"), ("ide", true, Some("intelide"), "PCI\\VEN_8086&DEV_7010 is driven by intelide (VEN_8086&DEV_7010 in CriticalDeviceDatabase)"), ("virtio-blk", false, None, "no driver is bound to PCI\\VEN_1AF4&DEV_1042 in the CriticalDeviceDatabase"), ("virtio-scsi", false, None, "no driver is bound to PCI\\VEN_1AF4&DEV_1048 in the CriticalDeviceDatabase")]"##);
}

#[test]
fn measured_windows_10() {
    let Some(guest) = Guest::win10() else { return };
    insta::assert_compact_debug_snapshot!(table(&guest), @r##"[("sata", true, Some("storahci"), "PCI\\VEN_8086&DEV_2922 is driven by storahci (CC_010601 in mshdc.inf)"), ("ide", true, Some("intelide"), "PCI\\VEN_8086&DEV_7010 is driven by intelide (VEN_8086&DEV_7010 in mshdc.inf)"), ("virtio-blk", false, None, "no driver is bound to PCI\\VEN_1AF4&DEV_1042 in the DriverDatabase"), ("virtio-scsi", false, None, "no driver is bound to PCI\\VEN_1AF4&DEV_1048 in the DriverDatabase")]"##);
}

/// Each single fault is found, and named in the reason.
#[test]
fn one_fault_at_a_time_windows_10() {
    let Some(guest) = Guest::win10() else { return };
    let s = r"X\ControlSet001\Services";
    let class = r"X\ControlSet001\Control\Class";
    let mshdc = r"X\DriverDatabase\DriverPackages\mshdc.inf_amd64_18632ebfbf46b676";
    use Controller::{Ide, Sata};
    let cases = [
        // Only "1" is not zero, and "0" is.
        (
            format!("[{s}\\storahci\\StartOverride]\n\"0\"=dword:00000000\n\"1\"=dword:00000003\n"),
            Sata,
            "StartOverride=3",
        ),
        (
            format!("[{s}\\storahci]\n\"Start\"=dword:00000003\n"),
            Sata,
            "Start=3",
        ),
        (
            format!("[{s}\\storahci]\n\"Type\"=dword:00000010\n"),
            Sata,
            "not a kernel driver",
        ),
        (
            format!("[{s}\\storahci]\n\"Start\"=-\n\"Type\"=-\n"),
            Sata,
            "holds no driver",
        ),
        (
            format!("[-{s}\\storahci]\n"),
            Sata,
            "storahci is not installed",
        ),
        (
            format!("[{s}\\storahci]\n\"ImagePath\"=\"..\\\\x.sys\"\n"),
            Sata,
            "not a path",
        ),
        // Hyper-V generation 2 guests have no PCI bus.
        (
            format!("[{s}\\pci\\StartOverride]\n\"0\"=dword:00000003\n"),
            Sata,
            "pci does not start",
        ),
        (
            format!("[-{s}\\volmgrx]\n"),
            Sata,
            "volmgrx is not installed",
        ),
        (
            format!("[{s}\\fvevol]\n\"Start\"=dword:00000004\n"),
            Sata,
            "LowerFilters of Volume names fvevol, which is disabled",
        ),
        (
            format!(
                "[{class}\\{{4d36e97b-e325-11ce-bfc1-08002be10318}}]\n\"UpperFilters\"=hex(7):67,00,6f,00,6e,00,65,00,00,00,00,00\n"
            ),
            Sata,
            "UpperFilters of SCSIAdapter names gone, which is not installed",
        ),
        (
            format!("[-{mshdc}\\Descriptors\\PCI\\CC_010601]\n"),
            Sata,
            "no driver is bound to PCI\\VEN_8086&DEV_2922 in the DriverDatabase (mshdc.inf staged only)",
        ),
        (
            format!("[{mshdc}\\Configurations\\msahci_Inst]\n\"Service\"=-\n"),
            Sata,
            "mshdc.inf staged only",
        ),
        (
            "[X\\DriverDatabase\\DriverInfFiles\\mshdc.inf]\n\"Active\"=-\n".into(),
            Sata,
            "mshdc.inf staged only",
        ),
        ("[-X\\DriverDatabase]\n".into(), Sata, "no driver is bound"),
        (
            format!("[{s}\\atapi]\n\"Start\"=dword:00000003\n"),
            Ide,
            "atapi does not start",
        ),
        (
            format!("[{s}\\intelide]\n\"Start\"=dword:00000003\n"),
            Ide,
            "intelide does not start",
        ),
    ];
    for (reg, controller, reason) in cases {
        let Some(changed) = guest.with(&format!("\n{reg}")) else {
            return;
        };
        let path = changed.evaluate(controller);
        assert!(!path.ready, "{reg}");
        assert!(path.reason.contains(reason), "{reg}: {}", path.reason);
        assert!(!path.faults.is_empty());
    }
}

/// `volume` came with a later build: its absence is no fault, a disabled one is.
#[test]
fn volume_driver_may_be_absent() {
    let Some(guest) = Guest::win10() else { return };
    let key = r"X\ControlSet001\Services\volume";
    let Some(absent) = guest.with(&format!("\n[-{key}]\n")) else {
        return;
    };
    assert!(absent.evaluate(Controller::Sata).ready);
    let disabled = guest
        .with(&format!("\n[{key}]\n\"Start\"=dword:00000004\n"))
        .unwrap();
    assert!(!disabled.evaluate(Controller::Sata).ready);
}

#[test]
fn images_are_looked_at() {
    let Some(guest) = Guest::win10() else { return };
    let cases = [
        (ImageState::Missing, Some("storahci.sys is missing")),
        (ImageState::Unreadable, Some("is not a usable driver file")),
        (
            ImageState::Present {
                machine: Some(Machine::I386),
            },
            Some("is for x86, Windows is x86_64"),
        ),
        (ImageState::Present { machine: None }, None),
    ];
    for (state, reason) in cases {
        let path = guest.evaluate_with(Controller::Sata, &|path| {
            if path.name() == Some("storahci.sys") {
                state
            } else {
                ImageState::Present { machine: None }
            }
        });
        assert_eq!(path.ready, reason.is_none());
        assert!(path.reason.contains(reason.unwrap_or("storahci")));
    }
}

/// The chain for viostor, for the ids given.
fn viostor_package(ids: &[&str]) -> String {
    let package = r"X\DriverDatabase\DriverPackages\oem9.inf_amd64_0011223344556677";
    let service = r"X\ControlSet001\Services\viostor";
    let mut reg = format!(
        "\n[{service}]\n\"Start\"=dword:00000000\n\"Type\"=dword:00000001\n\
         \n[X\\DriverDatabase\\DriverInfFiles\\oem9.inf]\n\"Active\"=\"oem9.inf_amd64_0011223344556677\"\n\
         \n[{package}\\Configurations\\scsi_inst]\n\"Service\"=\"viostor\"\n"
    );
    for id in ids {
        reg += &format!(
            "\n[X\\DriverDatabase\\DeviceIds\\PCI\\{id}]\n\"oem9.inf\"=hex:01,ff,00,00\n\
             \n[{package}\\Descriptors\\PCI\\{id}]\n\"Configuration\"=\"scsi_inst\"\n"
        );
    }
    reg
}

#[test]
fn virtio_needs_the_modern_id() {
    let Some(guest) = Guest::win10() else { return };
    let long = "VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01";
    let old = "VEN_1AF4&DEV_1001&SUBSYS_00021AF4&REV_00";
    for (ids, ready, faults) in [
        (&[long, old][..], true, 0),
        (&["ven_1af4&dev_1042", "ven_1af4&dev_1001"], true, 0),
        (&[long], true, 1),
        (&[old], false, 1),
        (&["VEN_1AF4&DEV_1041"], false, 2),
    ] {
        let Some(changed) = guest.with(&viostor_package(ids)) else {
            return;
        };
        let path = changed.evaluate(Controller::VirtioBlk);
        assert_eq!(path.ready, ready, "{ids:?}: {}", path.reason);
        assert_eq!(path.faults.len(), faults, "{ids:?}");
        assert!(!changed.evaluate(Controller::VirtioScsi).ready);
    }
}

/// Of two packages for the same id the one with the newer DriverVer drives the device.
#[test]
fn newest_package_wins() {
    let Some(guest) = Guest::win10() else { return };
    let package = r"X\DriverDatabase\DriverPackages\oem8.inf_amd64_7766554433221100";
    let id = "VEN_1AF4&DEV_1042";
    for (date, service) in [("ff", "other"), ("01", "viostor")] {
        let reg = viostor_package(&[id])
            + &format!(
                "\n[X\\DriverDatabase\\DriverPackages\\oem9.inf_amd64_0011223344556677]\n\"Version\"=hex:{}0f{}\n",
                "00,".repeat(31),
                ",00".repeat(16)
            )
            + &format!(
                "\n[{package}]\n\"Version\"=hex:{}{date}{}\n\
                 \n[{package}\\Configurations\\i]\n\"Service\"=\"other\"\n\
                 \n[{package}\\Descriptors\\PCI\\{id}]\n\"Configuration\"=\"i\"\n\
                 \n[X\\DriverDatabase\\DriverInfFiles\\oem8.inf]\n\"Active\"=\"oem8.inf_amd64_7766554433221100\"\n\
                 \n[X\\DriverDatabase\\DeviceIds\\PCI\\{id}]\n\"oem8.inf\"=hex:01,ff,00,00\n",
                "00,".repeat(31),
                ",00".repeat(16)
            );
        let Some(changed) = guest.with(&reg) else {
            return;
        };
        let path = changed.evaluate(Controller::VirtioBlk);
        assert_eq!(path.service.as_deref(), Some(service));
    }
}

#[test]
fn windows_7_reads_the_critical_device_database() {
    let Some(guest) = Guest::win7() else { return };
    let service = r"X\ControlSet001\services\viostor";
    let cdd = r"X\ControlSet001\Control\CriticalDeviceDatabase";
    let Some(changed) = guest.with(&format!(
        "\n[{service}]\n\"Start\"=dword:00000000\n\"Type\"=dword:00000001\n\"ImagePath\"=\"system32\\\\drivers\\\\viostor.sys\"\n\
         \n[{cdd}\\pci#ven_1af4&dev_1042]\n\"Service\"=\"viostor\"\n\
         \n[X\\ControlSet001\\services\\msahci]\n\"Start\"=dword:00000000\n"
    )) else {
        return;
    };
    assert!(changed.evaluate(Controller::VirtioBlk).ready);
    assert!(changed.evaluate(Controller::Sata).ready);
    // NT 5 has the transitional device.
    let nt5 = Guest {
        nt: (5, 2),
        ..changed
    };
    let path = nt5.evaluate(Controller::VirtioBlk);
    assert!(!path.ready && path.reason.contains("DEV_1001"));
}

/// A damaged hive gives a verdict, not a panic.
#[test]
fn damage_is_a_reason() {
    let Some(guest) = Guest::win10() else { return };
    let mut hive = guest.hive.clone();
    for (i, byte) in hive.iter_mut().enumerate().skip(8192) {
        if i % 97 == 0 {
            *byte ^= 0x5a;
        }
    }
    let guest = Guest { hive, ..guest };
    for controller in Controller::ALL {
        assert!(!guest.evaluate(controller).ready);
    }
}
