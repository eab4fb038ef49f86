//! The VM of a guest: what is as in the source, and what the user asked for.

use super::*;
use crate::convert::testing::machine_options;
use crate::demo::{GuestSpec, WinVersion};
use crate::domain::Stage;
use crate::firstboot::network::{self, Binding, Policy};
use crate::inspect::model::{Cidr, NetworkFacts};
use crate::testing::MemoryGuest;

fn options(nics: &[(&str, bool)]) -> MachineOptions {
    let nic = |(mac, connected): &(&str, bool)| SourceNic {
        mac: mac.parse().ok(),
        model: None,
        network: None,
        connected: *connected,
    };
    MachineOptions {
        nics: nics.iter().map(nic).collect(),
        ..machine_options()
    }
}

#[test]
fn every_nic_is_written_and_equal_macs_are_told_apart() {
    let all: Vec<String> = (0x10..0x2c)
        .map(|n| format!("00:50:56:00:00:{n:02x}"))
        .collect();
    let mut found: Vec<(&str, bool)> = all.iter().map(|mac| (mac.as_str(), true)).collect();
    found[9].1 = false;
    let written = nics(&[], &options(&found));
    let got: Vec<_> = written
        .iter()
        .map(|(nic, _)| (nic.mac.to_string(), nic.link_up))
        .collect();
    let want: Vec<_> = found.iter().map(|(m, up)| (m.to_string(), *up)).collect();
    assert_eq!(got, want);

    // The second and fourth are the first's; the third has the address that the second would get.
    let mac = "00:50:56:00:00:10";
    let pair = options(&[(mac, true), (mac, false)]);
    let taken = nics(&[], &pair)[1].0.mac.to_string();
    let same = options(&[(mac, true), (mac, false), (&taken, true), (mac, true)]);
    let written = nics(&[], &same);
    assert_eq!(written, nics(&[], &same), "the same in every run");
    let distinct: BTreeSet<_> = written.iter().map(|(nic, _)| nic.mac).collect();
    assert_eq!((written.len(), distinct.len()), (4, 4));
    let before: Vec<_> = written.iter().map(|(_, before)| before.is_some()).collect();
    assert_eq!(before, [false, true, false, true]);
    assert!(!written[1].0.link_up && written[2].0.mac.to_string() == taken);
    // Addresses that were asked for count too.
    let asked = MachineOptions {
        macs: vec![mac.parse().unwrap(); 2],
        ..options(&[])
    };
    assert_eq!(nics(&[], &asked).len(), 2);
}

fn adapter(name: &str, mac: &str) -> Adapter {
    Adapter {
        guid: "{11111111-2222-3333-4444-555555555555}".into(),
        mac: Some(mac.into()),
        name: Some(name.into()),
        dhcp: false,
        addresses: vec![Cidr {
            ip: "10.0.0.5".parse().unwrap(),
            prefix: 24,
        }],
        enabled: true,
        device: Some(format!("PCI\\X\\{name}")),
        ..Adapter::default()
    }
}

/// The static address of the guest goes to the NIC that stands for its adapter, or it is said that
/// none does.
#[test]
fn the_adapters_of_the_guest_and_the_nics_of_the_source_meet() {
    const A: &str = "00:0c:29:00:00:0a";
    const B: &str = "00:0c:29:00:00:0b";
    const C: &str = "00:0c:29:00:00:0c";
    // In: adapters of the guest, NICs of the source (the empty ones without an address), `--mac`.
    // Out: the addresses of the new VM, how many adapters are tied, notes, warnings.
    type Case<'c> = (
        &'c [&'c str],
        &'c [&'c str],
        &'c [&'c str],
        &'c [&'c str],
        [usize; 3],
    );
    let cases: [Case; 9] = [
        (&[A], &[""], &[], &[A], [1, 0, 0]),
        (&[A], &[B], &[], &[B], [1, 0, 0]),
        (&[A, B], &["", ""], &[], &[A, B], [2, 0, 2]),
        (&[A, B], &["", A], &[], &[B, A], [2, 0, 0]),
        (&[A, B], &[""], &[], &[A], [1, 1, 1]),
        (&[A, B], &[C], &[], &[C], [0, 2, 0]),
        (&[A, B], &[], &[C], &[C, B], [1, 1, 0]),
        (&[A, B], &[""], &[B], &[B], [1, 1, 0]),
        (&[A], &[B, ""], &[], &[B, A], [1, 0, 0]),
    ];
    for (guest, source, asked, want, [tied, notes, warnings]) in cases {
        let at = format!("{guest:?} {source:?} {asked:?}");
        let adapters: Vec<_> = guest.iter().map(|mac| adapter(mac, mac)).collect();
        let found: Vec<_> = source.iter().map(|mac| (*mac, true)).collect();
        let options = MachineOptions {
            macs: asked.iter().map(|m| m.parse().unwrap()).collect(),
            keep_addresses: true,
            ..options(&found)
        };
        let macs = macs(&adapters, &options);
        let got: Vec<String> = macs.iter().map(ToString::to_string).collect();
        assert_eq!(got, want, "{at}");
        let written = nics(&adapters, &options);
        let written: Vec<_> = written.iter().map(|(nic, _)| nic.mac).collect();
        assert_eq!(written, macs, "{at}");
        let facts = NetworkFacts {
            adapters: adapters.clone(),
            routes: Vec::new(),
        };
        let decision = network::decide(Policy::Preserve, &facts, &macs, true);
        assert_eq!(decision.settings.len(), tied, "{at}");
        assert_eq!(decision.notes.len(), notes, "{at}: {:?}", decision.notes);
        for settings in &decision.settings {
            match settings.binding {
                Binding::Mac(mac) => assert!(macs.contains(&mac), "{at}"),
                Binding::Only => assert!(nics(&adapters, &options)[0].0.keeps_address),
            }
        }
        let said = other_macs(&adapters, &options);
        assert_eq!(said.len(), warnings, "{at}: {said:?}");
    }
}

#[test]
fn topologies_of_the_source() {
    for (vcpus, cores, threads, want) in [
        (8, Some(4), Some(2), Some((1, 4, 2))),
        (8, Some(2), None, Some((4, 2, 1))),
        (8, Some(3), None, None),
        (8, Some(4), Some(0), Some((2, 4, 1))),
        (8, Some(u32::MAX), Some(2), None),
        (8, None, Some(2), None),
    ] {
        let options = MachineOptions {
            vcpus,
            cores_per_socket: cores,
            threads_per_core: threads,
            ..options(&[])
        };
        let got = topology(&options).map(|t| (t.sockets, t.cores, t.threads));
        assert_eq!(got, want, "{vcpus} {cores:?} {threads:?}");
    }
}

#[test]
fn portable_firmware_keeps_secure_boot() {
    for secure_boot in [false, true] {
        let mut machine = crate::domain::tests::machine();
        machine.firmware = Firmware::Uefi { secure_boot };
        let (choice, warning) = firmware(&machine, true);
        assert_eq!(choice, FirmwareChoice::Portable { secure_boot });
        assert_eq!(warning, None);
        domain::to_xml(&machine, Stage::Final, &choice).unwrap();
    }
}

/// No firmware for that chipset has the keys of Secure Boot.
#[test]
fn where_the_host_has_no_firmware_the_domain_is_portable_and_that_is_told() {
    let mut machine = crate::domain::tests::machine();
    machine.machine_type = Some("pc".into());
    for secure_boot in [true, false] {
        machine.firmware = Firmware::Uefi { secure_boot };
        let (choice, warning) = firmware(&machine, false);
        if let Some(warning) = &warning {
            assert_eq!(choice, FirmwareChoice::Portable { secure_boot });
            assert!(
                warning.contains("leaves the choice to the host"),
                "{warning}"
            );
        }
        assert!(warning.is_some() || !secure_boot);
    }
}

/// A Windows 11 with UEFI, changed, and the VM that is made for it.
fn machine_of(
    change: impl FnOnce(&mut Inspection, &mut WindowsFacts, &mut MachineOptions),
) -> Machine {
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win11));
    let mut inspection = guest.look(&[], |_, survey| survey.inspection.clone());
    let mut windows = inspection.windows.clone().unwrap();
    let mut options = options(&[]);
    change(&mut inspection, &mut windows, &mut options);
    machine(&inspection, &windows, None, &[], &options)
}

#[test]
fn windows_11_gets_a_tpm_and_others_get_one_where_it_is_asked_for() {
    for (build, server, asked, refused, want) in [
        (22000, false, false, false, true),
        (26100, false, false, false, true),
        (21999, false, false, false, false),
        (26100, true, false, false, false),
        (19045, false, true, false, true),
        (26100, false, false, true, false),
        (26100, false, true, true, false),
    ] {
        let vm = machine_of(|_, windows, options| {
            (windows.target.build, windows.target.server) = (build, server);
            (options.tpm, options.no_tpm) = (asked, refused);
        });
        assert_eq!(vm.tpm, want, "{build} {server} {asked} {refused}");
    }
}

#[test]
fn a_vm_with_bios_gets_no_tpm() {
    let vm = machine_of(|inspection, _, options| {
        inspection.firmware = Some(inspect::Firmware::Bios);
        options.tpm = true;
    });
    assert_eq!((vm.tpm, vm.firmware), (false, Firmware::Bios));
    assert_eq!(vm.nvram, None);
}

#[test]
fn the_clock_runs_as_the_guest_reads_it() {
    for utc in [false, true] {
        let vm = machine_of(|_, windows, _| windows.clock_is_utc = utc);
        assert_eq!(vm.clock_utc, utc);
    }
}

/// `boot` finds the disk by it, and Windows the licences that are bound to it.
#[test]
fn disks_are_numbered_from_that_of_the_system() {
    let disk = |name: &str| Disk {
        path: format!("/{name}").into(),
        format: domain::DiskFormat::Qcow2,
        serial: None,
        sector_size: 512,
        system: name == "a",
        boot_order: None,
        size_bytes: 1 << 30,
        backing: Vec::new(),
    };
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win11));
    let inspection = guest.look(&[], |_, survey| survey.inspection.clone());
    let windows = inspection.windows.clone().unwrap();
    let disks = [disk("a"), disk("b")];
    let vm = machine(&inspection, &windows, None, &disks, &options(&[]));
    let serials: Vec<_> = vm.disks.iter().map(|d| d.serial.as_deref()).collect();
    assert_eq!(serials, [Some(domain::SYSTEM_DISK), Some("h2k-1")]);
    assert_eq!(domain::SYSTEM_DISK, "h2k-0");
}

#[test]
fn a_vm_with_uefi_has_its_own_variables_with_and_without_secure_boot() {
    for secure_boot in [false, true] {
        let vm = machine_of(|_, _, options| {
            options.secure_boot = secure_boot;
            options.nvram = "/vm/vm_VARS.fd".into();
        });
        assert_eq!(vm.firmware, Firmware::Uefi { secure_boot });
        assert_eq!(vm.nvram.as_deref(), Some("/vm/vm_VARS.fd".as_ref()));
    }
}

/// EMS owns COM1 (docs/first-boot.md): the first boot reports on COM2.
#[test]
fn a_guest_that_keeps_com1_for_itself_gets_com2() {
    for ems in [false, true] {
        let vm = machine_of(|_, windows, _| windows.boot.ems_on_com1 = ems);
        assert_eq!(vm.second_serial, ems);
    }
}

#[test]
fn the_clock_of_a_linux_vm_runs_as_its_adjtime_says() {
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win11));
    let inspection = guest.look(&[], |_, survey| survey.inspection.clone());
    for clock_is_local in [false, true] {
        let facts = LinuxFacts {
            clock_is_local,
            ..LinuxFacts::default()
        };
        let vm = linux_machine(&inspection, &facts, &[], &options(&[]));
        assert_eq!(vm.clock_utc, !clock_is_local);
    }
}

#[test]
fn a_vm_has_the_controller_of_its_first_boot_and_then_a_probe() {
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Xp));
    let inspection = guest.look(&[], |_, survey| survey.inspection.clone());
    let windows = inspection.windows.clone().unwrap();
    for controller in [Some(DiskBus::Sata), Some(DiskBus::Ide), None] {
        let vm = machine(&inspection, &windows, controller, &[], &options(&[]));
        assert_eq!(vm.bootstrap, controller);
        assert_eq!(vm.probe.is_some(), controller.is_some(), "{controller:?}");
    }
}

#[test]
fn firmware_that_the_source_says_otherwise_than_the_guest_is_named() {
    use inspect::Firmware::{Bios, Uefi};
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    let mut inspection = guest.look(&[], |_, survey| survey.inspection.clone());
    let windows = inspection.windows.clone().unwrap();
    let mut vm = crate::source::export(std::path::Path::new("/vm"));
    for (said, found, named) in [
        (Some(Bios), Uefi, Some("the new VM has UEFI")),
        (Some(Uefi), Bios, Some("the new VM has BIOS")),
        (Some(Uefi), Uefi, None),
        (Some(Bios), Bios, None),
        (None, Bios, None),
    ] {
        (vm.firmware, inspection.firmware) = (said, Some(found));
        let warnings = disagreements(&inspection, &windows, &vm, &options(&[]));
        let shown = warnings.first().map(String::as_str);
        assert_eq!(shown.is_some(), named.is_some(), "{warnings:?}");
        assert!(
            shown
                .unwrap_or_default()
                .contains(named.unwrap_or_default())
        );
    }
}

/// A VM that is started as another one loses licences, leases and encrypted volumes.
#[test]
fn what_a_vm_is_known_by_is_kept() {
    let uuid = Uuid::from_u128(7);
    let vm = machine_of(|_, _, options| {
        options.name = "name".into();
        options.title = Some("title".into());
        options.uuid = Some(uuid);
        options.serial = Some("serial".into());
        options.genid = Some(Uuid::from_u128(8));
        options.memory_mib = 1234;
        options.vcpus = 6;
        options.storage = DiskBus::VirtioScsi;
        options.machine_type = Some("q35".into());
        options.driver_iso = Some("/virtio-win.iso".into());
        options.drivers.balloon = true;
    });
    assert_eq!(
        (vm.name.as_str(), vm.title.as_deref()),
        ("name", Some("title"))
    );
    assert_eq!((vm.uuid, vm.genid), (uuid, Some(Uuid::from_u128(8))));
    assert_eq!(vm.serial.as_deref(), Some("serial"));
    assert_eq!(
        (vm.memory_mib, vm.vcpus, vm.bus),
        (1234, 6, DiskBus::VirtioScsi)
    );
    assert_eq!(vm.machine_type.as_deref(), Some("q35"));
    assert_eq!(vm.driver_iso.as_deref(), Some("/virtio-win.iso".as_ref()));
    assert!(vm.drivers.balloon && !vm.drivers.netkvm);
    // Two VMs without one are two VMs.
    let none = || machine_of(|_, _, options| options.uuid = None).uuid;
    assert_ne!(none(), none());
}

#[test]
fn a_linux_vm_has_every_device_and_a_tpm_where_it_is_asked_for() {
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win11));
    let mut inspection = guest.look(&[], |_, survey| survey.inspection.clone());
    let facts = LinuxFacts::default();
    for (firmware, tpm, no_tpm, has) in [
        (inspect::Firmware::Uefi, true, false, true),
        (inspect::Firmware::Uefi, false, false, false),
        (inspect::Firmware::Uefi, true, true, false),
        (inspect::Firmware::Bios, true, false, false),
    ] {
        inspection.firmware = Some(firmware);
        let arch = if tpm { Arch::X86 } else { Arch::Amd64 };
        inspection.os.arch = Some(arch);
        let options = MachineOptions {
            tpm,
            no_tpm,
            ..options(&[])
        };
        let vm = linux_machine(&inspection, &facts, &[], &options);
        let system = System::Linux {
            arch,
            osinfo_id: None,
        };
        assert_eq!(vm.system, system);
        assert_eq!(vm.tpm, has, "{firmware:?} {tpm} {no_tpm}");
        let Drivers {
            agent,
            balloon,
            rng,
            netkvm,
        } = vm.drivers;
        assert!(agent && balloon && rng && netkvm);
        assert!(vm.bootstrap.is_none() && vm.probe.is_none() && !vm.second_serial);
        assert_eq!(
            vm.firmware == Firmware::Bios,
            firmware == inspect::Firmware::Bios
        );
    }
}

/// Only the NIC that stands for an adapter with an address of its own is given that.
#[test]
fn a_nic_keeps_its_address_where_its_adapter_has_a_static_one() {
    const A: &str = "00:0c:29:00:00:0a";
    const B: &str = "00:0c:29:00:00:0b";
    let gone = |mut adapter: Adapter| {
        adapter.device = None;
        adapter
    };
    let by_dhcp = |mut adapter: Adapter| {
        adapter.dhcp = true;
        adapter
    };
    let empty = |mut adapter: Adapter| {
        adapter.addresses.clear();
        adapter
    };
    let one = || adapter("a", A);
    let other = || adapter("b", B);
    for (adapters, source, asked, keeps) in [
        (vec![one()], &[A][..], true, &[true][..]),
        (vec![one()], &[A], false, &[false]),
        (vec![by_dhcp(one())], &[A], true, &[false]),
        (vec![empty(one())], &[A], true, &[false]),
        // The only NIC is the only adapter, whatever its address; of two it is not known.
        (vec![one()], &[B], true, &[true]),
        (vec![by_dhcp(one())], &[B], true, &[false]),
        (
            vec![one(), gone(other())],
            &["00:0c:29:00:00:0c"],
            true,
            &[true],
        ),
        (vec![one(), other()], &["00:0c:29:00:00:0c"], true, &[false]),
        (
            vec![one()],
            &[B, "00:0c:29:00:00:0c"],
            true,
            &[false, false],
        ),
        (vec![one(), by_dhcp(other())], &[B, A], true, &[false, true]),
    ] {
        let found: Vec<_> = source.iter().map(|mac| (*mac, true)).collect();
        let options = MachineOptions {
            keep_addresses: asked,
            ..options(&found)
        };
        let nics = nics(&adapters, &options);
        let got: Vec<_> = nics.iter().map(|(nic, _)| nic.keeps_address).collect();
        assert_eq!(got, keeps, "{source:?} {asked} {adapters:?}");
    }
}

/// Windows keeps an adapter for each slot a NIC was ever in.
#[test]
fn adapters_of_one_address_are_one_nic_and_those_without_a_device_none() {
    let mut none = adapter("c", "00:0c:29:00:00:0c");
    none.device = None;
    let twice = adapter("a", "00:0c:29:00:00:0a");
    let adapters = [twice.clone(), twice, none];
    let macs = |adapters: &[Adapter]| -> Vec<String> {
        macs(adapters, &options(&[]))
            .iter()
            .map(ToString::to_string)
            .collect()
    };
    assert_eq!(macs(&adapters), ["00:0c:29:00:00:0a"]);
    // Nobody knows one: it has one all the same.
    assert_eq!(macs(&[]).len(), 1);
    assert!(nics(&[], &options(&[]))[0].0.link_up);
}

#[test]
fn a_nic_is_connected_as_its_network_is_mapped() {
    let mapped = "VM Network=net:lan".parse().unwrap();
    let mut options = options(&[("00:0c:29:00:00:0a", true), ("00:0c:29:00:00:0b", true)]);
    options.nics[0].network = Some("VM Network".into());
    options.nics[1].network = Some("other".into());
    options.network_map = NetworkMap::new(vec![mapped]).unwrap();
    let to: Vec<_> = nics(&[], &options)
        .into_iter()
        .map(|(nic, _)| nic.source)
        .collect();
    assert_eq!(to, [NicSource::Network("lan".into()), NicSource::User]);
}

#[test]
fn what_the_new_vm_has_otherwise_than_the_source_is_a_warning() {
    let guest = MemoryGuest::of(GuestSpec::new(WinVersion::Win10));
    let mut inspection = guest.look(&[], |_, survey| survey.inspection.clone());
    inspection.network.adapters.clear();
    let mut windows = inspection.windows.clone().unwrap();
    let mut vm = crate::source::export(std::path::Path::new("/vm"));
    let mut options = options(&[]);
    macro_rules! said {
        () => {
            disagreements(&inspection, &windows, &vm, &options).join("; ")
        };
    }
    assert_eq!(said!(), "");
    options.tpm = true;
    assert_eq!(said!(), "", "asked for, and there was none");
    vm.tpm = true;
    assert!(said!().contains("TPM of the new VM is empty"));
    options.secure_boot = true;
    inspection.firmware = Some(inspect::Firmware::Bios);
    assert!(said!().contains("Secure Boot is left out") && said!().contains("the TPM is left out"));
    (options.secure_boot, options.tpm, vm.tpm) = (false, false, false);
    // Clients of NT 5 use two processors.
    for (major, server, vcpus, warned) in [
        (5, false, 3, true),
        (5, false, 2, false),
        (5, true, 3, false),
        (6, false, 3, false),
    ] {
        (windows.target.major, windows.target.server, options.vcpus) = (major, server, vcpus);
        assert_eq!(
            said!().contains("2 processors"),
            warned,
            "{major} {server} {vcpus}"
        );
    }
    let nic = |network: Option<&str>, connected| SourceNic {
        mac: None,
        model: None,
        network: network.map(str::to_owned),
        connected,
    };
    vm.nics = vec![
        nic(Some("lan"), true),
        nic(Some("lan"), false),
        nic(None, true),
    ];
    let all = said!();
    assert!(
        all.contains("NIC 1 was on \"lan\"") && all.contains("NIC 2 was not connected"),
        "{all}"
    );
    assert!(!all.contains("NIC 3"), "{all}");
    let mapping = "wan=net:lan".parse().unwrap();
    options.network_map = NetworkMap::new(vec![mapping]).unwrap();
    assert!(said!().contains("no NIC was on \"wan\""), "{}", said!());
    // One whose link is down is on its network all the same; one that is mapped goes where the user says.
    for (network, link_up) in [("lan", true), ("wan", false)] {
        vm.nics = vec![nic(Some("lan"), link_up), nic(Some("wan"), false)];
        let mapping = format!("{network}=net:lan").parse().unwrap();
        options.network_map = NetworkMap::new(vec![mapping]).unwrap();
        let all = said!();
        assert!(
            !all.contains("NIC 1 was on") && !all.contains("no NIC was on"),
            "{all}"
        );
    }
}

#[test]
fn where_the_source_says_half_a_topology_there_is_none() {
    let of = |vcpus, cores, threads| {
        let options = MachineOptions {
            vcpus,
            cores_per_socket: cores,
            threads_per_core: threads,
            ..options(&[])
        };
        topology(&options)
    };
    assert!(of(8, Some(0), Some(2)).is_none());
    assert!(of(0, Some(4), Some(2)).is_none());
    assert!(of(8, Some(4), Some(2)).is_some());
}

/// Each option of the VM in its place.
#[test]
fn a_vm_is_as_its_guest_and_all_options_say() {
    let vm = machine_of(|_, _, options| {
        *options = MachineOptions {
            name: "name".into(),
            title: Some("title".into()),
            memory_mib: 1234,
            vcpus: 12,
            storage: DiskBus::VirtioScsi,
            domain_type: DomainType::Qemu,
            cpu: CpuMode::HostModel,
            graphics: Graphics::Spice,
            video: Video::Qxl,
            machine_type: Some("q35".into()),
            macs: vec!["52:54:00:00:00:07".parse().unwrap()],
            nics: options.nics.clone(),
            network: NicSource::Network("net".into()),
            network_map: NetworkMap::default(),
            keep_addresses: true,
            probe: "/vm/probe.qcow2".into(),
            driver_iso: Some("/virtio-win.iso".into()),
            drivers: Drivers {
                agent: true,
                balloon: false,
                rng: true,
                netkvm: false,
            },
            uuid: Some(Uuid::from_u128(7)),
            serial: Some("serial".into()),
            genid: Some(Uuid::from_u128(8)),
            tpm: false,
            no_tpm: false,
            secure_boot: true,
            cores_per_socket: Some(3),
            threads_per_core: Some(2),
            nvram: "/vm/nvram.fd".into(),
            portable: true,
        };
    });
    insta::assert_snapshot!("machine", format!("{vm:#?}"));
}

/// Windows takes it for a new adapter: the user has to know which.
#[test]
fn of_nics_with_one_address_each_but_the_first_gets_another_and_that_is_told() {
    let one = "52:54:00:00:00:01";
    let other = "52:54:00:00:00:02";
    let found = [other, one, one, one].map(|mac| (mac, true));
    let options = MachineOptions {
        uuid: Some(Uuid::nil()),
        ..options(&found)
    };
    let macs: Vec<_> = macs(&[], &options)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(macs[..2], [other, one]);
    let new = &macs[2..];
    assert!(
        new[0] != new[1]
            && new
                .iter()
                .all(|mac| mac.starts_with("52:54:00:") && mac != one)
    );
    let said = other_macs(&[], &options);
    assert_eq!(said.len(), 2, "{said:?}");
    for (said, (n, mac)) in said.iter().zip([(3, &new[0]), (4, &new[1])]) {
        let wanted =
            format!("NICs 2 and {n} both have the MAC address {one}: NIC {n} gets {mac} instead;");
        assert!(said.starts_with(&wanted), "{said}");
    }
    // Another VM with the same addresses gets others: both may be on one network.
    let other_vm = MachineOptions {
        uuid: Some(Uuid::from_u128(1)),
        ..options.clone()
    };
    assert!(
        super::macs(&[], &other_vm)[2..]
            .iter()
            .all(|mac| !new.contains(&mac.to_string()))
    );
    // The same in every run.
    let again: Vec<_> = super::macs(&[], &options)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(again, macs);
}
