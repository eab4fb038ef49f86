//! Writes a shell script for Proxmox VE: `qm create` with the disks imported, the switch to VirtIO,
//! and the rollback.
//!
//! One script for all steps, because Proxmox moves a disk from one bus to another within a VM. It
//! finds the disks beside itself, and every step may be repeated: existing parts are kept.
//!
//! Proxmox selects the PCI addresses by the name of the device: `virtio0` is always at the same
//! one, so here too the probe has the address of the later boot disk. It chooses the Hyper-V
//! enlightenments by the type of the guest (`--ostype`). An I/O thread on SCSI needs a controller
//! for each disk (`virtio-scsi-single`), which Proxmox's own wizard also creates for Windows.

use std::path::Path;

use super::document::{EmitError, local};
use super::model::{
    CpuMode, Disk, DomainType, Firmware, Graphics, Machine, NicSource, Stage, System, Video,
};
use crate::text::{base64, quoted, shell_word};
use crate::types::DiskBus;

/// The number of devices on each bus: `sata0` to `sata5` and so on.
const SATA: usize = 6;
const IDE: usize = 4;
const VIRTIO: usize = 16;
const SCSI: usize = 31;

pub fn script(m: &Machine, folder: &Path) -> Result<String, EmitError> {
    let disks: Vec<&Disk> = system_first(&m.disks);
    let (bus, first, on_first) = places(m, &disks)?;
    let paths = disks.iter().map(|d| &d.path).chain(&m.driver_iso);
    if paths.into_iter().any(|p| p.to_string_lossy().contains(',')) {
        return Err(EmitError::Missing {
            what: "way to name a file with a comma in its path",
            target: "Proxmox VE",
        });
    }
    let mut text = HEAD.replace("@UUID@", &m.uuid.to_string());
    text.push_str("\ncreate() {\n");
    text.push_str(&command("qm create \"$vmid\"", &create(m)));
    text.push_str("}\n");
    let parts = Parts {
        m,
        disks: &disks,
        folder,
        bus,
        first,
        on_first,
    };
    text.push_str(&parts.bootstrap());
    text.push_str(&parts.last());
    text.push_str(&parts.back());
    text.push_str("\n\"$stage\"\n");
    Ok(text)
}

/// The bus of the final VM, that of the first boot, and the number of disks that fit on the latter.
fn places(
    m: &Machine,
    disks: &[&Disk],
) -> Result<(&'static str, Option<&'static str>, usize), EmitError> {
    if disks.iter().any(|d| d.sector_size != 512) {
        return Err(EmitError::Missing {
            what: "disks with 4096-byte sectors",
            target: "Proxmox VE",
        });
    }
    let places = |bus: DiskBus| {
        let max = match bus {
            DiskBus::VirtioBlk => VIRTIO,
            DiskBus::VirtioScsi => SCSI,
            DiskBus::Sata => SATA,
            DiskBus::Ide => IDE,
        };
        (bus.libvirt(), max)
    };
    let (bus, max) = places(m.bus);
    let first = m.bootstrap.map(places);
    let iso = usize::from(m.driver_iso.is_some());
    // On SCSI the probe follows the disks.
    let probe = usize::from(first.is_some() && m.bus == DiskBus::VirtioScsi);
    // Windows starts from the first disks; the others are not needed before it has VirtIO.
    let on_first = first.map_or(0, |(_, max)| disks.len().min(max - iso));
    let one_bus = first.is_some_and(|(first, _)| first == bus);
    let used = disks.len() + if one_bus { iso } else { probe };
    if used > max {
        return Err(EmitError::TooManyDisks {
            bus,
            disks: disks.len(),
            max: max - (used - disks.len()),
        });
    }
    Ok((bus, first.map(|(bus, _)| bus), on_first))
}

/// The inputs of the script's functions.
struct Parts<'a> {
    m: &'a Machine,
    disks: &'a [&'a Disk],
    folder: &'a Path,
    /// The bus of the final VM.
    bus: &'static str,
    /// The bus of the first boot.
    first: Option<&'static str>,
    /// The number of disks on it; the others are on the bus of the final VM from the start.
    on_first: usize,
}

impl Parts<'_> {
    /// The device of the probe in the first boot. `virtio0` is always at the same PCI address, so
    /// Windows binds its driver for the very device from which it will boot.
    fn probe(&self) -> String {
        let n = if self.bus == "scsi" {
            self.disks.len()
        } else {
            0
        };
        format!("{}{n}", self.bus)
    }

    fn bootstrap(&self) -> String {
        let Some(early) = self.first else {
            return "\nbootstrap() {\n  echo 'this VM needs no first boot: use final' >&2; exit 2\n}\n"
                .to_owned();
        };
        let mut text = String::from("\nbootstrap() {\n  new_or_ours\n");
        for (n, disk) in self.disks.iter().enumerate() {
            let bus = if n < self.on_first { early } else { self.bus };
            text.push_str(&self.import(bus, n, disk));
        }
        let probe = self.probe();
        text.push_str(&format!(
            "  serial {probe} h2k-probe || qm set \"$vmid\" --{probe} \"$storage\":1,serial=h2k-probe\n"
        ));
        if let Some(iso) = &self.m.driver_iso {
            let file = self.path(iso);
            text.push_str(&format!(
                "  # Only for looking up a driver by hand: those Windows needs are on its disk.\n  \
                 if [ -e {file} ]; then qm set \"$vmid\" --{early}{} {file},media=cdrom; fi\n",
                self.on_first,
            ));
        }
        let mut options = vec![boot_order(self.disks, early)];
        options.extend(nics(self.m, Stage::Bootstrap));
        text.push_str(&command("qm set \"$vmid\"", &options));
        text.push_str(AFTER_BOOTSTRAP);
        text.push_str("}\n");
        text
    }

    fn last(&self) -> String {
        let bus = self.bus;
        let mut text = String::from("\nfinal() {\n  if ! exists; then\n");
        if self.first.is_some() {
            text.push_str(
                "    echo 'warning: without a first boot Windows may stop with 0x7B (INACCESSIBLE_BOOT_DEVICE):' >&2\n    \
                 echo \"  the drivers are on its disk, but it has not bound them yet; see: sh $0 bootstrap\" >&2\n",
            );
        }
        text.push_str("    new_or_ours\n  else\n    new_or_ours\n");
        if let Some(early) = self.first {
            text.push_str("    stopped\n");
            text.push_str(&format!(
                "    if [ -n \"$(volume {early}0)\" ]; then save; fi\n"
            ));
            let probe = self.probe();
            text.push_str(&format!(
                "    if serial {probe} h2k-probe; then qm unlink \"$vmid\" --idlist {probe} --force 1; fi\n"
            ));
            if self.m.driver_iso.is_some() {
                text.push_str(&format!("    drop {early}{}\n", self.on_first));
            }
            for (n, disk) in self.disks.iter().enumerate().take(self.on_first) {
                text.push_str(&format!(
                    "    move {early}{n} {bus}{n} {}\n",
                    shell_word(&options(disk, bus))
                ));
            }
        }
        text.push_str("  fi\n");
        for (n, disk) in self.disks.iter().enumerate() {
            text.push_str(&self.import(bus, n, disk));
        }
        let mut options = vec![boot_order(self.disks, bus)];
        options.extend(nics(self.m, Stage::Final));
        text.push_str(&command("qm set \"$vmid\"", &options));
        text.push_str("  echo \"next: qm start $vmid\"\n}\n");
        text
    }

    /// Returns to the snapshot made by `final`. If the storage supports none, only the disks return
    /// to their bus.
    fn back(&self) -> String {
        let Some(early) = self.first else {
            return "\nback() {\n  echo 'this VM had no first boot to go back to' >&2; exit 2\n}\n"
                .to_owned();
        };
        let mut text = String::from(
            "\nback() {\n  ours\n  stopped\n  if saved; then\n    \
             qm rollback \"$vmid\" \"$snapshot\"\n    return\n  fi\n  \
             echo 'no snapshot: the disks go back to their first bus; what Windows wrote since stays' >&2\n",
        );
        for (n, disk) in self.disks.iter().enumerate().take(self.on_first) {
            text.push_str(&format!(
                "  move {}{n} {early}{n} {}\n",
                self.bus,
                shell_word(&options(disk, early))
            ));
        }
        let mut options = vec![boot_order(self.disks, early)];
        options.extend(nics(self.m, Stage::Bootstrap));
        text.push_str(&command("qm set \"$vmid\"", &options));
        text.push_str("}\n");
        text
    }

    /// Quotes a path for the shell.
    fn path(&self, path: &Path) -> String {
        match local(path, self.folder) {
            Some(name) => format!("\"$here\"/{}", quoted(name)),
            None => quoted(&path.display().to_string()),
        }
    }

    /// Imports a disk. One that an interrupted run has already imported is kept.
    fn import(&self, bus: &str, n: usize, disk: &Disk) -> String {
        format!(
            "  import {bus}{n} {} {}\n",
            self.path(&disk.path),
            shell_word(&options(disk, bus))
        )
    }
}

const HEAD: &str = r#"#!/bin/sh
# Creates the VM on Proxmox VE. Run it as root on a node, from this directory or from a copy of it:
#   sh THIS bootstrap VMID STORAGE   creates it for the first boot (VMID may be `next`)
#   qm start VMID                    the first boot
#   qm terminal VMID                 until it shows "hyper2kvm: first boot finished"; Ctrl-O leaves
#   qm shutdown VMID
#   sh THIS final VMID               takes a snapshot and moves the disks to VirtIO
#   sh THIS back VMID                goes back to that snapshot
# Every step may be repeated; what an interrupted one has done is kept. `final VMID STORAGE` without a first
# boot creates the VM on VirtIO at once. BRIDGE names another bridge than vmbr0.
set -eu
stage=${1:-}
vmid=${2:-}
storage=${3:-local-lvm}
here=$(cd -- "$(dirname -- "$0")" && pwd)
snapshot=before-virtio
uuid=@UUID@
case $stage in bootstrap | final | back) ;; *) vmid= ;; esac
if [ "$vmid" = next ] && [ "$stage" != back ]; then
  vmid=$(pvesh get /cluster/nextid)
  echo "VMID $vmid"
fi
case $vmid in '' | *[!0-9]*) echo "usage: $0 bootstrap|final|back VMID|next [STORAGE]" >&2; exit 2 ;; esac
case $here in *,*) echo "$here: Proxmox VE cannot name files in a directory with a comma" >&2; exit 2 ;; esac

exists() { qm config "$vmid" >/dev/null 2>&1; }

# Refuses a VM that this script did not create.
ours() {
  if ! qm config "$vmid" | grep -q "^smbios1: .*uuid=$uuid"; then
    echo "VM $vmid is another VM: name a free VMID, or next" >&2
    exit 1
  fi
}

new_or_ours() { if exists; then ours; else create; fi; }

stopped() {
  case $(qm status "$vmid") in *stopped*) ;; *) echo "shut the VM down first: qm shutdown $vmid" >&2; exit 1 ;; esac
}

# The volume of a disk: the value of its line up to the first comma.
volume() { qm config "$vmid" | sed -n "s/^$1: \([^,]*\).*/\1/p"; }

serial() { qm config "$vmid" | grep -q "^$1: .*serial=$2"; }

saved() { qm listsnapshot "$vmid" | grep -qw -- "$snapshot"; }

save() {
  if saved; then return; fi
  if ! qm snapshot "$vmid" "$snapshot" --description 'before the switch to VirtIO'; then
    echo 'warning: the storage has no snapshots, so `back` will not undo what Windows writes' >&2
  fi
}

drop() {
  if [ -n "$(volume "$1")" ]; then qm set "$vmid" --delete "$1"; fi
}

# import PLACE FILE OPTIONS
import() {
  if [ -n "$(volume "$1")" ]; then return; fi
  qm set "$vmid" "--$1" "$storage:0,import-from=$2$3"
}

# move FROM TO OPTIONS: detaches a disk and attaches it to another bus; what is there already is left.
move() {
  disk=$(volume "$1")
  if [ -z "$disk" ]; then return; fi
  qm set "$vmid" --delete "$1"
  qm set "$vmid" "--$2" "$disk$3"
}
"#;

/// The end of `bootstrap`.
const AFTER_BOOTSTRAP: &str = r#"  echo "next: qm start $vmid; qm terminal $vmid, until it shows: hyper2kvm: first boot finished"
  echo "then: qm shutdown $vmid; sh $0 final $vmid"
"#;

/// Warnings about the script.
pub fn warnings(m: &Machine) -> Vec<String> {
    let unknown = m.nics.iter().enumerate().filter(|(_, nic)| {
        nic.proxmox.is_none() && !matches!(nic.source, NicSource::Bridge(_)) && nic.link_up
    });
    unknown
        .filter_map(|(n, nic)| {
            let network = nic.network.as_ref()?;
            Some(format!(
                "NIC {} was on {network:?} and is attached to vmbr0; --network-map {} names another bridge",
                n + 1,
                quoted(&format!("{network}=pve:BRIDGE[@VLAN]"))
            ))
        })
        .collect()
}

fn system_first(disks: &[Disk]) -> Vec<&Disk> {
    let system = disks.iter().filter(|d| d.system);
    system.chain(disks.iter().filter(|d| !d.system)).collect()
}

fn boot_order(disks: &[&Disk], bus: &str) -> String {
    let mut places: Vec<(u32, usize)> = (disks.iter().enumerate())
        .filter_map(|(n, disk)| Some((disk.boot_order?, n)))
        .collect();
    places.sort_unstable();
    let names: Vec<String> = places.iter().map(|(_, n)| format!("{bus}{n}")).collect();
    // A semicolon ends a command of the shell.
    let order = format!("order={}", names.join(";"));
    format!("--boot {}", shell_word(&order))
}

/// Formats a command with one option per line.
fn command(program: &str, options: &[String]) -> String {
    format!("  {program} \\\n    {}\n", options.join(" \\\n    "))
}

/// The options of a disk: an I/O thread for each one, if the controller supports it.
fn options(disk: &Disk, bus: &str) -> String {
    let serial = disk.serial.as_deref().unwrap_or("h2k");
    let thread = match bus {
        "virtio" | "scsi" => ",iothread=1",
        _ => "",
    };
    format!(",discard=on{thread},serial={serial}")
}

/// A valid name for Proxmox: letters, digits, `-` and `.`.
fn vm_name(name: &str) -> String {
    let mapped: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '.' {
                c
            } else {
                '-'
            }
        })
        .take(63)
        .collect();
    // A DNS name: no label is empty, or begins or ends with `-`.
    let labels = mapped.split('.').map(|label| label.trim_matches('-'));
    let labels: Vec<&str> = labels.filter(|label| !label.is_empty()).collect();
    match labels[..] {
        [] => "vm".to_owned(),
        _ => labels.join("."),
    }
}

fn create(m: &Machine) -> Vec<String> {
    let (sockets, cores) = m
        .topology
        .map_or((1, m.vcpus), |t| (t.sockets, t.cores * t.threads));
    let mut list = vec![
        format!("--name {}", shell_word(&vm_name(&m.name))),
        format!("--ostype {}", os_type(m)),
        format!("--machine {}", m.machine_type()),
        format!("--memory {}", m.memory_mib),
        format!("--sockets {sockets} --cores {cores}"),
        format!("--smbios1 {}", smbios(m)),
        format!("--localtime {}", u8::from(!m.clock_utc)),
        format!("--agent enabled={}", u8::from(m.drivers.agent)),
        match m.second_serial {
            true => "--serial0 socket --serial1 socket --tablet 1".to_owned(),
            false => "--serial0 socket --tablet 1".to_owned(),
        },
        format!(
            "--balloon {}",
            if m.drivers.balloon { m.memory_mib } else { 0 }
        ),
    ];
    list.push(match (m.domain_type, m.cpu) {
        (DomainType::Qemu, _) => "--kvm 0 --cpu max".to_owned(),
        (DomainType::Kvm, CpuMode::HostPassthrough) => "--cpu host".to_owned(),
        (DomainType::Kvm, CpuMode::HostModel) => "--cpu x86-64-v2-AES".to_owned(),
    });
    list.push(match (m.graphics, m.video) {
        (Graphics::None, _) => "--vga none".to_owned(),
        (Graphics::Spice, _) | (_, Video::Qxl) => "--vga qxl".to_owned(),
        (Graphics::Vnc, Video::Virtio) => "--vga virtio".to_owned(),
        (Graphics::Vnc, Video::Vga) => "--vga std".to_owned(),
    });
    if let Some(genid) = m.genid {
        list.push(format!("--vmgenid {genid}"));
    }
    if m.drivers.rng {
        list.push("--rng0 source=/dev/urandom".to_owned());
    }
    if m.bus == DiskBus::VirtioScsi {
        list.push("--scsihw virtio-scsi-single".to_owned());
    }
    if let Firmware::Uefi { secure_boot } = m.firmware {
        list.push(format!(
            "--bios ovmf --efidisk0 \"$storage\":0,efitype=4m,pre-enrolled-keys={}",
            u8::from(secure_boot)
        ));
        if m.tpm {
            list.push("--tpmstate0 \"$storage\":0,version=v2.0".to_owned());
        }
    }
    list
}

/// Proxmox requires the serial number in base64 if it is free text.
fn smbios(m: &Machine) -> String {
    match &m.serial {
        None => format!("uuid={}", m.uuid),
        Some(serial) => format!(
            "uuid={},serial={},base64=1",
            m.uuid,
            base64(serial.as_bytes())
        ),
    }
}

fn os_type(m: &Machine) -> &'static str {
    let System::Windows(w) = &m.system else {
        return "l26";
    };
    match (w.major, w.minor, w.server) {
        (10.., _, false) if w.build >= 22000 => "win11",
        (10.., _, true) if w.build >= 20348 => "win11",
        (10.., ..) => "win10",
        (6, 2.., _) => "win8",
        (6, 1, _) => "win7",
        (6, _, true) => "w2k8",
        (6, _, false) => "wvista",
        (5, 2, true) => "w2k3",
        (5, 1.., _) => "wxp",
        _ => "w2k",
    }
}

fn nics(m: &Machine, stage: Stage) -> Vec<String> {
    let model = m.nic_model(stage);
    m.nics
        .iter()
        .enumerate()
        .map(|(n, nic)| {
            let bridge = match (&nic.proxmox, &nic.source) {
                (Some(bridge), _) | (None, NicSource::Bridge(bridge)) => {
                    let tag = bridge.vlan.map(|vlan| format!(",tag={vlan}"));
                    shell_word(&bridge.name) + &tag.unwrap_or_default()
                }
                // Proxmox has bridges only; this is its default one.
                (None, NicSource::Network(_) | NicSource::User) => {
                    "\"${BRIDGE:-vmbr0}\"".to_owned()
                }
            };
            let down = if nic.link_up { "" } else { ",link_down=1" };
            format!("--net{n} {model}={},bridge={bridge}{down}", nic.mac)
        })
        .collect()
}
