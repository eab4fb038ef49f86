//! A shell script for Proxmox VE: `qm create` with the disks imported, and the switch to VirtIO.
//!
//! One script for both stages, because Proxmox moves a disk from one bus to another within a machine:
//! `sh NAME-proxmox.sh bootstrap VMID STORAGE`, then `sh NAME-proxmox.sh final VMID`. Without a first
//! boot, `final VMID STORAGE` creates the machine on VirtIO at once.
//!
//! Proxmox picks the PCI addresses itself, by the name of the device: `virtio0` is always the same, so
//! the probe sits where the boot disk will be here too. It chooses the Hyper-V enlightenments by the
//! type of the guest (`--ostype`).

use super::emit::EmitError;
use super::model::{
    Bootstrap, CpuMode, Disk, DomainType, Firmware, Graphics, Machine, NicSource, Stage,
    StorageBus, System, Video,
};
use crate::text::{quoted, shell_word};

/// What Proxmox numbers: `sata0` to `sata5` and so on.
const SATA: usize = 6;
const IDE: usize = 4;
const VIRTIO: usize = 16;
const SCSI: usize = 31;

pub fn script(m: &Machine) -> Result<String, EmitError> {
    let disks: Vec<&Disk> = boot_first(&m.disks);
    if disks.iter().any(|d| d.sector_size != 512) {
        return Err(EmitError::Missing {
            what: "disks with 4096-byte sectors",
            target: "Proxmox VE",
        });
    }
    let paths = disks.iter().map(|d| &d.path).chain(&m.driver_iso);
    if paths.into_iter().any(|p| p.to_string_lossy().contains(',')) {
        return Err(EmitError::Missing {
            what: "way to name a file with a comma in its path",
            target: "Proxmox VE",
        });
    }
    let (bus, max) = match m.bus {
        StorageBus::VirtioBlk => ("virtio", VIRTIO),
        StorageBus::VirtioScsi => ("scsi", SCSI),
        StorageBus::Sata => ("sata", SATA),
    };
    let first = match m.bootstrap {
        Bootstrap::None => None,
        Bootstrap::Sata => Some(("sata", SATA)),
        Bootstrap::Ide => Some(("ide", IDE)),
    };
    let iso = usize::from(m.driver_iso.is_some());
    for (bus, max, used) in [(bus, max, disks.len())]
        .into_iter()
        .chain(first.map(|(bus, max)| (bus, max, disks.len() + iso)))
    {
        if used > max {
            return Err(EmitError::TooManyDisks {
                bus,
                disks: disks.len(),
                max,
            });
        }
    }
    let mut text = String::from(HEAD);
    text.push_str("\ncreate() {\n");
    text.push_str(&command("qm create \"$vmid\"", &create(m)));
    text.push_str("}\n\nbootstrap() {\n");
    match first {
        None => text.push_str("  echo 'this machine needs no first boot: use final' >&2; exit 2\n"),
        Some((early, _)) => {
            text.push_str("  create\n");
            for (n, disk) in disks.iter().enumerate() {
                text.push_str(&import(early, n, disk));
            }
            let mut options = vec![
                format!("--boot order={early}0"),
                // The probe: Windows binds its driver for the very device it will boot from.
                format!(
                    "--{bus}{} \"$storage\":1,serial=h2k-probe",
                    if bus == "scsi" { disks.len() } else { 0 }
                ),
            ];
            if let Some(iso) = &m.driver_iso {
                let iso = format!("{},media=cdrom", iso.display());
                options.push(format!("--{early}{} {}", disks.len(), quoted(&iso)));
            }
            options.extend(nics(m, Stage::Bootstrap));
            text.push_str(&command("qm set \"$vmid\"", &options));
        }
    }
    text.push_str("}\n\nfinal() {\n");
    text.push_str("  if ! qm config \"$vmid\" >/dev/null 2>&1; then\n    create\n");
    for (n, disk) in disks.iter().enumerate() {
        text.push_str("  ");
        text.push_str(&import(bus, n, disk));
    }
    if let Some((early, _)) = first {
        text.push_str("  else\n    stopped\n");
        let probe = if bus == "scsi" { disks.len() } else { 0 };
        text.push_str(&format!(
            "    if serial {bus}{probe} h2k-probe; then qm unlink \"$vmid\" --idlist {bus}{probe} --force 1; fi\n"
        ));
        if m.driver_iso.is_some() {
            text.push_str(&format!("    drop {early}{}\n", disks.len()));
        }
        for (n, disk) in disks.iter().enumerate() {
            text.push_str(&format!(
                "    move {early}{n} {bus}{n} {}\n",
                shell_word(&options(disk))
            ));
        }
    }
    text.push_str("  fi\n");
    let mut options = vec![format!("--boot order={bus}0")];
    options.extend(nics(m, Stage::Final));
    text.push_str(&command("qm set \"$vmid\"", &options));
    text.push_str("}\n\n\"$stage\"\n");
    Ok(text)
}

const HEAD: &str = r#"#!/bin/sh
# Creates the machine on Proxmox VE. Run it as root on a node that can read the disks:
#   sh THIS bootstrap VMID STORAGE   then start it, let Windows come up once, shut it down
#   sh THIS final VMID               moves the disks to VirtIO
# `final VMID STORAGE` without a first boot creates the machine on VirtIO at once.
# BRIDGE names another bridge than the one written here.
set -eu
stage=${1:-}
vmid=${2:-}
storage=${3:-local-lvm}
case $stage in bootstrap | final) ;; *) vmid= ;; esac
case $vmid in '' | *[!0-9]*) echo "usage: $0 bootstrap|final VMID [STORAGE]" >&2; exit 2 ;; esac

stopped() {
  case $(qm status "$vmid") in *stopped*) ;; *) echo "shut the machine down first" >&2; exit 1 ;; esac
}

# The volume of a disk: the value of its line up to the first comma.
volume() { qm config "$vmid" | sed -n "s/^$1: \([^,]*\).*/\1/p"; }

serial() { qm config "$vmid" | grep -q "^$1: .*serial=$2"; }

drop() {
  if [ -n "$(volume "$1")" ]; then qm set "$vmid" --delete "$1"; fi
}

# Detaches a disk and attaches it to another bus; what is there already is left.
move() {
  disk=$(volume "$1")
  if [ -z "$disk" ]; then return; fi
  qm set "$vmid" --delete "$1"
  qm set "$vmid" "--$2" "$disk$3"
}
"#;

fn boot_first(disks: &[Disk]) -> Vec<&Disk> {
    let boot = disks.iter().filter(|d| d.boot);
    boot.chain(disks.iter().filter(|d| !d.boot)).collect()
}

/// One option per line.
fn command(program: &str, options: &[String]) -> String {
    format!("  {program} \\\n    {}\n", options.join(" \\\n    "))
}

/// What is the same on every bus.
fn options(disk: &Disk) -> String {
    let serial = disk.serial.as_deref().unwrap_or("h2k");
    format!(",discard=on,serial={serial}")
}

fn import(bus: &str, n: usize, disk: &Disk) -> String {
    let from = format!(":0,import-from={}{}", disk.path.display(), options(disk));
    format!(
        "  qm set \"$vmid\" --{bus}{n} \"$storage\"{}\n",
        quoted(&from)
    )
}

/// Letters, digits, `-` and `.`, as Proxmox wants it.
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
    match mapped.trim_matches(['-', '.']) {
        "" => "vm".to_owned(),
        name => name.to_owned(),
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
    if m.bus == StorageBus::VirtioScsi {
        list.push("--scsihw virtio-scsi-pci".to_owned());
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

/// Proxmox wants the serial number in base64 where it is free text.
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

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let mut three = [0; 3];
        three[..chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes([0, three[0], three[1], three[2]]);
        for n in 0..4 {
            text.push(if n <= chunk.len() {
                char::from(DIGITS[(bits >> (18 - 6 * n)) as usize & 63])
            } else {
                '='
            });
        }
    }
    text
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
            let bridge = match &nic.source {
                NicSource::Bridge(name) => shell_word(name),
                // Proxmox has bridges only; this is its first one.
                NicSource::Network(_) | NicSource::User => "\"${BRIDGE:-vmbr0}\"".to_owned(),
            };
            let down = if nic.link_up { "" } else { ",link_down=1" };
            format!("--net{n} {model}={},bridge={bridge}{down}", nic.mac)
        })
        .collect()
}
