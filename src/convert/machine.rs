//! Builds the libvirt VM of a converted guest: first from the facts of the guest, then from the
//! user's options.

use std::collections::BTreeSet;
use std::path::PathBuf;

use uuid::Uuid;

use crate::domain::{
    self, CpuMode, Descriptors, Disk, DomainType, Drivers, Firmware, FirmwareChoice, Graphics,
    MacAddr, Machine, NetworkMap, Nic, NicSource, System, Topology, Video,
};
use crate::inspect::linux::LinuxFacts;
use crate::inspect::{self, Adapter, Inspection, WindowsFacts};
use crate::source::{SourceNic, SourceVm};
use crate::text::quoted;
use crate::types::{Arch, DiskBus};

/// Everything about the VM that is not read from the guest.
#[derive(Debug, Clone)]
pub struct MachineOptions {
    pub name: String,
    /// The original name, if the safe name shows nothing of it.
    pub title: Option<String>,
    pub memory_mib: u64,
    pub vcpus: u32,
    pub storage: DiskBus,
    pub domain_type: DomainType,
    pub cpu: CpuMode,
    pub graphics: Graphics,
    pub video: Video,
    /// QEMU's machine type, if the user chose one.
    pub machine_type: Option<String>,
    /// `--mac`: addresses for the first NICs, in order.
    pub macs: Vec<MacAddr>,
    /// The NICs of the source VM.
    pub nics: Vec<SourceNic>,
    /// Attachment of the NICs whose network is not mapped.
    pub network: NicSource,
    pub network_map: NetworkMap,
    /// The first boot gives static addresses to the new NICs.
    pub keep_addresses: bool,
    /// The blank disk of the first boot.
    pub probe: PathBuf,
    /// The driver source if it is an ISO: only an ISO can be attached as a CD.
    pub driver_iso: Option<PathBuf>,
    /// The optional drivers that the guest will have.
    pub drivers: Drivers,
    pub uuid: Option<Uuid>,
    pub serial: Option<String>,
    pub genid: Option<Uuid>,
    /// The source had one, or the user requested it.
    pub tpm: bool,
    /// The user wants none, even if Windows requires it.
    pub no_tpm: bool,
    /// Enabled in the source, or by the user.
    pub secure_boot: bool,
    pub cores_per_socket: Option<u32>,
    pub threads_per_core: Option<u32>,
    pub nvram: PathBuf,
    /// The host that defines the domain selects the firmware.
    pub portable: bool,
}

pub fn machine(
    inspection: &Inspection,
    windows: &WindowsFacts,
    bootstrap: Option<DiskBus>,
    disks: &[Disk],
    options: &MachineOptions,
) -> Machine {
    let windows_11 = windows.target.build >= 22000 && !windows.target.server;
    let firmware = offered(inspection, options);
    let system = System::Windows(domain::WindowsFacts {
        major: windows.target.major,
        minor: windows.target.minor,
        build: windows.target.build,
        arch: windows.target.arch,
        server: windows.target.server,
    });
    Machine {
        tpm: (windows_11 || options.tpm) && !options.no_tpm && firmware != Firmware::Bios,
        clock_utc: windows.clock_is_utc,
        bootstrap,
        probe: bootstrap.map(|_| options.probe.clone()),
        driver_iso: options.driver_iso.clone(),
        second_serial: windows.boot.ems_on_com1,
        ..bare(inspection, system, firmware, disks, options)
    }
}

/// The firmware of the guest, with Secure Boot as in the source or as the user chose.
fn offered(inspection: &Inspection, options: &MachineOptions) -> Firmware {
    match inspection.firmware {
        Some(inspect::Firmware::Uefi) => Firmware::Uefi {
            secure_boot: options.secure_boot,
        },
        _ => Firmware::Bios,
    }
}

/// The VM of a Linux guest: one boot, and every device for which any kernel has a driver.
pub fn linux_machine(
    inspection: &Inspection,
    linux: &LinuxFacts,
    disks: &[Disk],
    options: &MachineOptions,
) -> Machine {
    let firmware = offered(inspection, options);
    let system = System::Linux {
        arch: inspection.os.arch.unwrap_or(Arch::Amd64),
        osinfo_id: None,
    };
    Machine {
        tpm: options.tpm && !options.no_tpm && firmware != Firmware::Bios,
        clock_utc: !linux.clock_is_local,
        drivers: Drivers {
            agent: true,
            balloon: true,
            rng: true,
            netkvm: true,
        },
        ..bare(inspection, system, firmware, disks, options)
    }
}

fn bare(
    inspection: &Inspection,
    system: System,
    firmware: Firmware,
    disks: &[Disk],
    options: &MachineOptions,
) -> Machine {
    Machine {
        name: options.name.clone(),
        title: options.title.clone(),
        uuid: options.uuid.unwrap_or_else(Uuid::new_v4),
        serial: options.serial.clone(),
        genid: options.genid,
        memory_mib: options.memory_mib,
        vcpus: options.vcpus,
        topology: topology(options),
        firmware,
        tpm: false,
        system,
        clock_utc: true,
        disks: disks
            .iter()
            .enumerate()
            .map(|(i, disk)| Disk {
                serial: Some(domain::disk_serial(i)),
                ..disk.clone()
            })
            .collect(),
        nics: nics(&inspection.network.adapters, options)
            .into_iter()
            .map(|(nic, _)| nic)
            .collect(),
        bus: options.storage,
        bootstrap: None,
        probe: None,
        driver_iso: None,
        domain_type: options.domain_type,
        cpu: options.cpu,
        nvram: (firmware != Firmware::Bios).then(|| options.nvram.clone()),
        drivers: options.drivers,
        emulator: None,
        serial_log: None,
        second_serial: false,
        graphics: options.graphics,
        video: options.video,
        machine_type: options.machine_type.clone(),
    }
}

/// The topology of the source, if it matches the number of CPUs.
fn topology(options: &MachineOptions) -> Option<Topology> {
    let cores = options.cores_per_socket.filter(|c| *c > 0)?;
    let threads = options.threads_per_core.filter(|t| *t > 0).unwrap_or(1);
    let socket = cores.checked_mul(threads)?;
    (options.vcpus > 0 && options.vcpus.is_multiple_of(socket)).then_some(Topology {
        sockets: options.vcpus / socket,
        cores,
        threads,
    })
}

/// Warnings where the source's description and the guest disagree. The guest takes precedence,
/// because it has to start.
pub fn disagreements(
    inspection: &Inspection,
    windows: &WindowsFacts,
    vm: &SourceVm,
    options: &MachineOptions,
) -> Vec<String> {
    let mut warnings = Vec::new();
    let uefi = inspection.firmware == Some(inspect::Firmware::Uefi);
    match vm.firmware {
        Some(inspect::Firmware::Bios) if uefi => warnings.push(
            "the source VM has BIOS, but Windows is installed for UEFI: the new VM has UEFI"
                .to_string(),
        ),
        Some(inspect::Firmware::Uefi) if !uefi => warnings.push(
            "the source VM has UEFI, but Windows is installed for BIOS: the new VM has BIOS"
                .to_string(),
        ),
        _ => {}
    }
    if options.secure_boot && !uefi {
        warnings.push(
            "Secure Boot is left out: Windows is installed for BIOS and starts without it"
                .to_string(),
        );
    }
    if options.tpm && !uefi {
        warnings.push(
            "the TPM is left out: a VM with BIOS gets none, and what was sealed in it asks for a \
             recovery key"
                .to_string(),
        );
    } else if vm.tpm && options.tpm {
        warnings.push(
            "the TPM of the new VM is empty: have the BitLocker recovery key and other ways to \
             sign in than a PIN at hand"
                .to_string(),
        );
    }
    if windows.target.major < 6 && options.vcpus > 2 && !windows.target.server {
        warnings.push(format!(
            "this Windows uses 2 processors at most, and the VM has {}",
            options.vcpus
        ));
    }
    warnings.extend(other_macs(&inspection.network.adapters, options));
    for (i, nic) in vm.nics.iter().enumerate() {
        if !nic.connected {
            warnings.push(format!(
                "NIC {} was not connected: its link stays down",
                i + 1
            ));
        } else if let Some(network) = &nic.network
            && !options.network_map.maps(network)
        {
            let to = match &options.network {
                NicSource::Network(name) => format!("the libvirt network {name:?}"),
                NicSource::Bridge(bridge) => format!("the bridge {:?}", bridge.name),
                NicSource::User => "user-mode networking".to_string(),
            };
            warnings.push(format!(
                "libvirt: NIC {} was on {network:?}: it is connected to {to}; --network-map {} names another",
                i + 1,
                quoted(&format!("{network}=TARGET"))
            ));
        }
    }
    let networks: Vec<&str> = vm
        .nics
        .iter()
        .filter_map(|n| n.network.as_deref())
        .collect();
    for network in options.network_map.unused(&networks) {
        let known = match networks.is_empty() {
            true => "the source names no networks".to_string(),
            false => format!("they are on {}", networks.join(", ")),
        };
        warnings.push(format!("--network-map: no NIC was on {network:?}; {known}"));
    }
    warnings
}

/// The addresses of the adapters in Windows. Windows keeps one adapter for each slot that a NIC
/// ever had; adapters with the same MAC are one NIC.
fn known_macs(adapters: &[Adapter]) -> Vec<MacAddr> {
    let mut known = BTreeSet::new();
    let adapters = adapters.iter().filter(|a| a.device.is_some());
    adapters
        .filter_map(|a| a.mac.as_deref()?.parse().ok())
        .filter(|mac| known.insert(*mac))
        .collect()
}

/// The reason why a NIC has another address than in its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Instead {
    /// Another NIC has this address.
    Taken(MacAddr),
    /// The source names none; the NIC gets the address of one of several unused adapters in
    /// Windows.
    OneOf(usize),
}

/// The NICs of the source, or else those of Windows, with their MACs, so that licences and DHCP
/// leases remain valid. `--mac` takes precedence. Without any known NIC there is one. Of equal
/// MACs, the later ones are replaced. NICs without an address in the source get those of the
/// adapters in Windows, in order.
fn nics(adapters: &[Adapter], options: &MachineOptions) -> Vec<(Nic, Option<Instead>)> {
    let known = known_macs(adapters);
    let mut found: Vec<(Option<MacAddr>, bool, Option<String>)> = if options.nics.is_empty() {
        known.iter().map(|mac| (Some(*mac), true, None)).collect()
    } else {
        let nics = options.nics.iter();
        nics.map(|nic| (nic.mac, nic.connected, nic.network.clone()))
            .collect()
    };
    for (i, mac) in options.macs.iter().enumerate() {
        match found.get_mut(i) {
            Some(nic) => nic.0 = Some(*mac),
            None => found.push((Some(*mac), true, None)),
        }
    }
    if found.is_empty() {
        found.push((None, true, None));
    }
    let mut taken: BTreeSet<MacAddr> = found.iter().filter_map(|(mac, ..)| *mac).collect();
    let free: Vec<MacAddr> = known
        .into_iter()
        .filter(|mac| !taken.contains(mac))
        .collect();
    let mut next = free.iter();
    let only = found.len() == 1;
    let mut seen = BTreeSet::new();
    let mut nics = Vec::new();
    for (mac, link_up, network) in found {
        let (mac, instead) = match mac {
            Some(mac) if seen.insert(mac) => (mac, None),
            Some(mac) => {
                let other = other_mac(options, mac, &mut taken);
                (other, Some(Instead::Taken(mac)))
            }
            None => match next.next() {
                Some(mac) => (*mac, Some(Instead::OneOf(free.len()))),
                None => (random_mac(), None),
            },
        };
        let mut nic = Nic {
            link_up,
            network,
            keeps_address: options.keep_addresses && has_static_address(adapters, mac, only),
            ..Nic::new(mac, options.network.clone())
        };
        options.network_map.apply(&mut nic);
        nics.push((nic, instead));
    }
    nics
}

/// The addresses of the new VM's NICs. An unknown address is random in each run.
pub fn macs(adapters: &[Adapter], options: &MachineOptions) -> Vec<MacAddr> {
    let nics = nics(adapters, options);
    nics.into_iter().map(|(nic, _)| nic.mac).collect()
}

/// Warnings about NICs whose address belongs to another one, or that got one of several possible
/// ones.
pub fn other_macs(adapters: &[Adapter], options: &MachineOptions) -> Vec<String> {
    let nics = nics(adapters, options);
    let first = |mac| nics.iter().position(|(nic, _)| nic.mac == mac);
    let warning = |(i, (nic, instead)): (usize, &(Nic, Option<Instead>))| {
        let n = i + 1;
        Some(match (*instead)? {
            Instead::Taken(mac) => format!(
                "NICs {} and {n} both have the MAC address {mac}: NIC {n} gets {} instead; Windows takes it \
                 for a new adapter, without its old IP settings",
                first(mac).map_or(1, |n| n + 1),
                nic.mac
            ),
            Instead::OneOf(1) => return None,
            Instead::OneOf(adapters) => format!(
                "the source says no MAC address for NIC {n}, and Windows knows {adapters} adapters that no \
                 other NIC is: it gets {}, and the IP settings of that adapter; --mac names another",
                nic.mac
            ),
        })
    };
    nics.iter().enumerate().filter_map(warning).collect()
}

/// A replacement for an address in use. It is the same in every run for one VM.
fn other_mac(options: &MachineOptions, mac: MacAddr, taken: &mut BTreeSet<MacAddr>) -> MacAddr {
    let vm = options.uuid.unwrap_or_default();
    for n in 0u32.. {
        let text = format!("{vm} {mac} {n}");
        let [a, b, c, ..] = *Uuid::new_v5(&Uuid::NAMESPACE_OID, text.as_bytes()).as_bytes();
        let other = MacAddr::qemu([a, b, c]);
        if taken.insert(other) {
            return other;
        }
    }
    random_mac()
}

/// Whether the adapter of a NIC has a static address. `only` means that there is no other NIC: a
/// single adapter then belongs to it, whatever its address.
fn has_static_address(adapters: &[Adapter], mac: MacAddr, only: bool) -> bool {
    let found = adapters.iter().filter(|a| a.device.is_some());
    let only = only && found.count() == 1;
    adapters.iter().any(|adapter| {
        let same = adapter.mac.as_deref().and_then(|m| m.parse().ok()) == Some(mac);
        let same = same || (only && adapter.device.is_some());
        same && !adapter.dhcp && !adapter.addresses.is_empty()
    })
}

/// A random address with QEMU's prefix.
fn random_mac() -> MacAddr {
    let random = Uuid::new_v4();
    let [a, b, c, ..] = *random.as_bytes();
    MacAddr::qemu([a, b, c])
}

/// Selects firmware of this host. If none fits, the XML is portable and there is a warning.
pub fn firmware(machine: &Machine, portable: bool) -> (FirmwareChoice, Option<String>) {
    let Firmware::Uefi { secure_boot } = machine.firmware else {
        return (FirmwareChoice::Bios, None);
    };
    if portable {
        return (FirmwareChoice::Portable { secure_boot }, None);
    }
    match Descriptors::of_host().and_then(|d| d.pick(machine.firmware, machine.chipset())) {
        Ok(choice) => (choice, None),
        Err(error) => (
            FirmwareChoice::Portable { secure_boot },
            Some(format!(
                "{error}; the domain XML leaves the choice to the host that defines it ({})",
                error.hint()
            )),
        ),
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
