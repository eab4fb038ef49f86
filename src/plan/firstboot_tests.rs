//! What of the user's wishes gets into the first boot of which Windows.

use super::*;
use crate::convert::prepare;
use crate::demo::{GuestSpec, WinVersion};
use crate::drivers::Catalogue;
use crate::drivers::driver_source::{DriverSource, Memory};
use crate::inspect::model::Tool;
use crate::plan::{Action, Draft, Options};
use crate::testing::{self, MemoryGuest, driver_source};
use crate::types::DiskBus;

use WinVersion::{Server2019, Win7, Win10, Win81, Xp};

struct Planned {
    draft: Draft,
    /// Name and text of what was made here.
    generated: Vec<(String, String)>,
}

impl Planned {
    fn script(&self) -> &str {
        let script = self
            .generated
            .iter()
            .find(|(name, _)| name == firstboot::SCRIPT);
        script.map_or("", |(_, text)| text)
    }

    /// The files below the directory of the first boot.
    fn files(&self) -> Vec<String> {
        let part = self.draft.actions.iter().find_map(|action| match action {
            Action::CopyFiles(copy) if copy.id == "files-firstboot" => Some(copy),
            _ => None,
        });
        let files = part.iter().flat_map(|copy| &copy.files);
        files
            .map(|file| format!("{} {}", file.to.name().unwrap(), file.size))
            .collect()
    }
}

fn planned(
    guest: &MemoryGuest,
    driver_source: &Memory,
    options: Options,
    wishes: &Preferences,
) -> Planned {
    guest.look(&[], |fake, survey| {
        let catalogue = Catalogue::builtin();
        let drafted = prepare::draft(survey, fake, driver_source, &catalogue, (options, wishes));
        let (draft, basis) = drafted.unwrap();
        let text =
            |(name, bytes): &Generated| (name.clone(), String::from_utf8(bytes.clone()).unwrap());
        let generated = basis.generated.iter().map(text).collect();
        Planned { draft, generated }
    })
}

fn of(version: WinVersion, wishes: &Preferences) -> Planned {
    let guest = MemoryGuest::of(GuestSpec::new(version));
    let options = testing::options(Some(testing::bootstrap(version)));
    planned(&guest, &driver_source(), options, wishes)
}

/// A setting that is lost must be said. A script that is not run too, but not to the one who wanted
/// none.
#[test]
fn what_a_conversion_without_a_script_leaves_out_is_told() {
    let scripts = || vec![b"echo 1".to_vec()];
    for (version, none, user_scripts, told) in [
        (Win10, false, scripts(), &[][..]),
        (Win10, true, scripts(), &["static addresses"]),
        (Xp, false, vec![], &[]),
        (Xp, false, scripts(), &["--firstboot scripts are left out"]),
    ] {
        let wishes = Preferences {
            none,
            user_scripts,
            ..Preferences::default()
        };
        let planned = of(version, &wishes);
        let warnings = &planned.draft.warnings;
        for text in [
            "static addresses are not",
            "--firstboot scripts are left out",
        ] {
            let found = warnings.iter().any(|w| w.contains(text));
            let expected = told.iter().any(|t| text.contains(t));
            assert_eq!(found, expected, "{version:?} {none}: {warnings:?}");
        }
        let made = version != Xp && !none;
        assert_eq!(planned.script().is_empty(), !made, "{version:?} {none}");
        assert_eq!(planned.files().is_empty(), !made, "{version:?} {none}");
    }
}

/// `pnputil` learned `/add-driver` with Windows 10 and `/remove-device` with its build 19041.
#[test]
fn the_script_uses_what_pnputil_of_this_windows_knows() {
    for (version, modern, removes) in [
        (Win7, false, false),
        (Win81, false, false),
        (Server2019, true, false),
        (Win10, true, true),
    ] {
        let planned = of(version, &Preferences::default());
        let script = planned.script();
        assert_eq!(script.contains("/add-driver"), modern, "{version:?}");
        assert_eq!(script.contains("-i -a"), !modern, "{version:?}");
        assert_eq!(
            script.contains("call :ghost pnputil"),
            removes,
            "{version:?}"
        );
    }
}

#[test]
fn the_build_that_learned_to_remove_devices_does() {
    for (build, removes) in [(19040, false), (19041, true)] {
        let mut guest = MemoryGuest::of(GuestSpec::new(Win10));
        guest.survey = match build {
            19040 => Some(|survey| {
                survey.inspection.windows.as_mut().unwrap().target.build = 19040;
            }),
            _ => Some(|survey| {
                survey.inspection.windows.as_mut().unwrap().target.build = 19041;
            }),
        };
        let options = testing::options(Some(DiskBus::Sata));
        let planned = planned(&guest, &driver_source(), options, &Preferences::default());
        let found = planned.script().contains("call :ghost pnputil");
        assert_eq!(found, removes, "{build}");
    }
}

#[test]
fn the_users_scripts_and_the_agent_lie_beside_the_script() {
    let wishes = Preferences {
        user_scripts: vec![b"echo 1".to_vec(), b"echo two".to_vec()],
        ..Preferences::default()
    };
    let with_agent = driver_source();
    let agent = |path: &str| path.ends_with("qemu-ga-x86_64.msi");
    let size = with_agent
        .files()
        .iter()
        .find(|f| agent(&f.path))
        .unwrap()
        .size;
    let files = with_agent.files().iter().map(|f| f.path.clone());
    let without = Memory::new(
        files
            .filter(|path| !agent(path))
            .map(|path| (path.clone(), with_agent.read(&path).unwrap())),
    );
    for (driver_source, there) in [(&with_agent, true), (&without, false)] {
        let guest = MemoryGuest::of(GuestSpec::new(Win10));
        let planned = planned(
            &guest,
            driver_source,
            testing::options(Some(DiskBus::Sata)),
            &wishes,
        );
        let script = planned.script();
        let agent = format!("{} {size}", firstboot::AGENT);
        let script_file = format!("{} {}", firstboot::SCRIPT, script.len());
        let mut expected = vec![
            agent,
            script_file,
            "user-1.cmd 6".into(),
            "user-2.cmd 8".into(),
        ];
        if !there {
            expected.remove(0);
        }
        assert_eq!(planned.files(), expected);
        assert_eq!(script.contains("call :step agent"), there);
        for (name, text) in [("user-1.cmd", "echo 1"), ("user-2.cmd", "echo two")] {
            let found = planned.generated.iter().find(|(n, _)| n == name);
            assert_eq!(found.map(|(_, text)| text.as_str()), Some(text));
            assert!(script.contains(name), "{name}");
        }
        assert!(!script.contains("user-3.cmd"));
    }
}

/// Hyper-V's services are part of Windows, and what carries no product code cannot be uninstalled quietly.
#[test]
fn tools_are_uninstalled_on_request_by_their_product_codes() {
    let code = |n: u32| format!("{{0000000{n}-0000-0000-0000-000000000000}}");
    let tool = |id, product_code| Tool {
        id,
        name: "x",
        version: None,
        services: Vec::new(),
        product_code,
    };
    let installed = [
        tool("vmware-tools", Some(code(1))),
        tool("hyper-v", Some(code(2))),
        tool(
            "virtualbox-additions",
            Some(code(3).trim_matches(['{', '}']).to_string()),
        ),
        tool("xen-pv", Some("MsiExec /x".into())),
        tool("parallels-tools", None),
        tool("xen-pv", Some(code(4))),
        tool("parallels-tools", Some(code(5))),
    ];
    let codes: Vec<_> = cleanup::product_codes(&installed)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(codes, [code(1), code(3), code(4), code(5)]);
    for uninstall_tools in [false, true] {
        let mut guest = MemoryGuest::of(GuestSpec::new(Win10));
        guest.survey = Some(|survey| {
            let windows = survey.inspection.windows.as_mut().unwrap();
            windows.tools = vec![Tool {
                id: "vmware-tools",
                name: "x",
                version: None,
                services: Vec::new(),
                product_code: Some("{00000001-0000-0000-0000-000000000000}".into()),
            }];
        });
        let wishes = Preferences {
            uninstall_tools,
            ..Preferences::default()
        };
        let planned = planned(
            &guest,
            &driver_source(),
            testing::options(Some(DiskBus::Sata)),
            &wishes,
        );
        assert_eq!(planned.script().contains(&code(1)), uninstall_tools);
    }
}

/// Windows' own debugger or EMS would read what the script says on COM1.
#[test]
fn the_script_speaks_on_the_port_that_windows_leaves_free() {
    for ems in [false, true] {
        let mut guest = MemoryGuest::of(GuestSpec::new(Win10));
        if ems {
            guest.survey = Some(|survey| {
                let windows = survey.inspection.windows.as_mut().unwrap();
                windows.boot.ems_on_com1 = true;
            });
        }
        let planned = planned(
            &guest,
            &driver_source(),
            testing::options(Some(DiskBus::Sata)),
            &Preferences::default(),
        );
        assert_eq!(planned.script().contains("COM2"), ems);
        assert_eq!(planned.script().contains("COM1"), !ems);
    }
}

/// The guest's own setting is kept over a second run, which finds the one of the first boot in its place.
#[test]
fn the_setting_to_put_back_is_the_guests_own() {
    let crash = "Control\\CrashControl";
    for (before, saved) in [(Some(1), 1), (Some(0), 0), (None, ABSENT)] {
        let mut guest = MemoryGuest::of(GuestSpec::new(Win10));
        let key = format!("ControlSet001\\{crash}");
        guest.system.key_mut(&key).values.clear();
        if let Some(number) = before {
            guest.system.dword(&key, "AutoReboot", number);
        }
        for _ in 0..2 {
            let prepared = guest.prepare(&driver_source(), Some(DiskBus::Sata));
            guest.apply(&prepared, &driver_source());
            let parameters = format!("ControlSet001\\Services\\{SERVICE}\\Parameters");
            let number = |key: &str| {
                let found = guest.system.value(key, "AutoReboot");
                found.and_then(|value| value.as_dword())
            };
            assert_eq!([number(&parameters), number(&key)], [Some(saved), Some(0)]);
        }
    }
}

/// A device whose driver is in place already needs no installation. The service and version of the
/// staged INF show that.
#[test]
fn each_staged_inf_stands_with_its_own_service_and_version() {
    let planned = of(Win10, &Preferences::default());
    let script = planned.script();
    for name in ["netkvm", "viostor", "balloon"] {
        let inf = format!("\\{name}.inf");
        let mut lines = script
            .lines()
            .filter(|line| line.to_lowercase().contains(&inf));
        let line = lines.next().unwrap_or_else(|| panic!("{name}"));
        assert!(line.to_lowercase().contains(&format!(" {name} ")), "{line}");
        assert!(line.contains("100."), "{line}");
    }
}

/// Without netkvm no NIC carries the old settings on.
#[test]
fn static_addresses_are_carried_over_with_the_driver_of_the_nic_only() {
    let whole = driver_source();
    let files = whole.files().iter().map(|f| f.path.clone());
    let without = Memory::new(
        files
            .filter(|path| !path.to_lowercase().contains("netkvm"))
            .map(|path| (path.clone(), whole.read(&path).unwrap())),
    );
    for (driver_source, carried) in [(&whole, true), (&without, false)] {
        let guest = MemoryGuest::of(GuestSpec::new(Win10));
        let options = testing::options(Some(DiskBus::Sata));
        let planned = planned(&guest, driver_source, options, &Preferences::default());
        assert_eq!(planned.script().contains("192.0.2.10"), carried);
        // What is lost is lost without a script too.
        let none = Preferences {
            none: true,
            ..Preferences::default()
        };
        let without_script = self::planned(&guest, driver_source, options, &none);
        for planned in [planned, without_script] {
            let warnings = &planned.draft.warnings;
            let told = warnings
                .iter()
                .any(|w| w.contains("no netkvm for this Windows"));
            assert_eq!(told, !carried, "{warnings:?}");
        }
    }
}

/// The new NICs are told apart by their addresses. With DHCP the new one still gets the old one's name,
/// and on request the network is left alone.
#[test]
fn the_wishes_for_the_network_reach_the_script() {
    let mac: MacAddr = "52:54:00:12:34:56".parse().unwrap();
    for (network, macs, address, named) in [
        (Policy::Preserve, vec![mac], true, true),
        (
            Policy::Preserve,
            vec![MacAddr::qemu([1, 2, 3])],
            true,
            false,
        ),
        (Policy::Dhcp, vec![mac], false, true),
        (Policy::Leave, vec![mac], false, false),
    ] {
        let mut guest = MemoryGuest::of(GuestSpec::new(Win10));
        guest.survey = Some(|survey| {
            let adapters = &mut survey.inspection.network.adapters;
            adapters
                .iter_mut()
                .for_each(|a| a.mac = "52:54:00:12:34:56".parse().ok());
        });
        let wishes = Preferences {
            network,
            macs,
            ..Preferences::default()
        };
        let options = testing::options(Some(DiskBus::Sata));
        let planned = planned(&guest, &driver_source(), options, &wishes);
        let script = planned.script();
        assert_eq!(script.contains("192.0.2.10"), address, "{network:?}");
        assert_eq!(script.contains("WANT=525400123456"), named, "{network:?}");
    }
}

/// With a first boot from another controller the script waits for the second one.
#[test]
fn the_script_knows_whether_there_is_a_second_boot() {
    let script = |bootstrap| {
        let guest = MemoryGuest::of(GuestSpec::new(Win10));
        let options = testing::options(bootstrap);
        let planned = planned(&guest, &driver_source(), options, &Preferences::default());
        planned.script().to_string()
    };
    let (two, one) = (script(Some(DiskBus::Sata)), script(None));
    assert_ne!(two, one);
    assert!(
        two.contains("EMULATED") && !one.contains("if defined EMULATED"),
        "{one}"
    );
}

/// A driver source may name its files in any case.
#[test]
fn an_inf_in_capitals_is_installed_as_the_driver_it_is() {
    let whole = driver_source();
    let files = whole.files().iter().map(|f| f.path.clone());
    let driver_source = Memory::new(files.map(|path| {
        let bytes = whole.read(&path).unwrap();
        (path.replace("netkvm.inf", "NetKVM.INF"), bytes)
    }));
    let guest = MemoryGuest::of(GuestSpec::new(Win10));
    let options = testing::options(Some(DiskBus::Sata));
    let planned = planned(&guest, &driver_source, options, &Preferences::default());
    let mut lines = planned.script().lines();
    let line = lines.find(|line| line.contains("\\NetKVM.INF")).unwrap();
    assert!(line.contains(" netkvm "), "{line}");
}

/// The record of a GPT disk with one partition.
fn table_of(disk: u8, partition: &[u8]) -> RegData {
    let mut table = vec![0; 192];
    (table[0], table[4]) = (1, 1);
    table[8..24].fill(disk);
    table[96..112].copy_from_slice(partition);
    RegData::Binary(table)
}

#[test]
fn a_disk_that_windows_does_not_know_is_told() {
    for known in [true, false] {
        let mut guest = MemoryGuest::of(GuestSpec::new(Win10));
        let own = guest.system.value("MountedDevices", "\\DosDevices\\C:");
        let own = own.unwrap().data[8..].to_vec();
        let devices = "ControlSet001\\Enum\\SCSI\\Disk&Ven_X";
        let key = |n: u8| format!("{devices}\\{n}\\Device Parameters\\Partmgr");
        let table = "PartitionTableCache";
        guest.system.set(&key(0), table, table_of(0x10, &own));
        let other = if known { 9 } else { 8 };
        guest
            .system
            .set(&key(1), table, table_of(0x20, &[other; 16]));
        let data = [&b"DMIO:ID:"[..], &[9; 16]].concat();
        let data = RegData::Binary(data);
        guest.system.set("MountedDevices", "\\DosDevices\\K:", data);
        let options = testing::options(Some(DiskBus::Sata));
        let planned = planned(&guest, &driver_source(), options, &Preferences::default());
        let told = |w: &String| w.contains("the disk of drive K:");
        let warnings = &planned.draft.warnings;
        assert_eq!(warnings.iter().any(told), !known, "{warnings:?}");
    }
}

/// Windows' records of its disks are those of the control set that boots.
#[test]
fn disks_are_brought_online_by_the_records_of_the_control_set_that_boots() {
    for set in [1, 2] {
        let mut guest = MemoryGuest::of(GuestSpec {
            control_set: 2,
            ..GuestSpec::new(Win10)
        });
        let letter = [&b"DMIO:ID:"[..], &[3; 16]].concat();
        let key =
            format!("ControlSet00{set}\\Enum\\SCSI\\Disk&Ven_X\\0\\Device Parameters\\Partmgr");
        guest
            .system
            .set(
                "MountedDevices",
                "\\DosDevices\\F:",
                RegData::Binary(letter),
            )
            .set(&key, "PartitionTableCache", table_of(0x20, &[3; 16]));
        let options = testing::options(Some(DiskBus::Sata));
        let planned = planned(&guest, &driver_source(), options, &Preferences::default());
        let found = planned
            .script()
            .contains("20202020-2020-2020-2020-202020202020");
        assert_eq!(found, set == 2, "{set}");
    }
}

/// Each control set gets its own setting back.
#[test]
fn the_setting_of_each_control_set_is_kept_beside_its_own_service() {
    let mut guest = MemoryGuest::of(GuestSpec::new(Win10));
    let mut second = guest.system.get("ControlSet001").unwrap().clone();
    second.name = "ControlSet002".into();
    *guest.system.key_mut("ControlSet002") = second;
    guest.system.dword("Select", "Current", 2);
    let sets = [("ControlSet001", 1), ("ControlSet002", 0)];
    for (set, number) in sets {
        let key = format!("{set}\\Control\\CrashControl");
        guest.system.dword(&key, "AutoReboot", number);
    }
    let prepared = guest.prepare(&driver_source(), Some(DiskBus::Sata));
    guest.apply(&prepared, &driver_source());
    for (set, number) in sets {
        let key = format!("{set}\\Services\\{SERVICE}\\Parameters");
        let found = guest.system.value(&key, "AutoReboot").unwrap();
        assert_eq!(found.as_dword(), Some(number), "{set}");
    }
}
