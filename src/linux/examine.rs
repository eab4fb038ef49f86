//! Examines the disks of a VM for a Linux, and adds it to an [`Inspection`].

use std::sync::Arc;

use super::appliance::{self, ApplianceTree, Found};
use super::efi::{self, Esp};
use super::files::{self, Mount};
use super::tree::{ExtTree, ExtVolume, Tree, TreeError};
use crate::block::BlockRead;
use crate::disk::chain::Image;
use crate::disk::export::{DaemonAccess, EXPORT, Export};
use crate::disk::layout::{DiskLayout, Scheme};
use crate::disk::partition;
use crate::drivers::Arch;
use crate::error::{Error, Result};
use crate::guest::guestfish::Attach;
use crate::guest::{EmbeddedReader, FsKind, GuestError, GuestRead, embedded};
use crate::inspect::linux::{LinuxFacts, RootFacts};
use crate::inspect::{Finding, Firmware, Inspection, OsFamily, findings};
use crate::text::guest_text;
use crate::tool::{self, host};

/// The partition type for GRUB's core on a GPT disk that starts by BIOS.
const GPT_BIOS_BOOT: &str = "21686148-6449-6e6f-744e-656564454649";
/// Partition types of Linux software RAID.
const RAID: [&str; 2] = ["0xfd", "a19d880f-05fc-4d3b-a006-743f0f84911e"];
const MAX_CONFIGS: usize = 64;

/// A disk that is open to read.
pub struct OpenDisk {
    export: Export<dyn BlockRead>,
    layout: DiskLayout,
    guest: EmbeddedReader,
}

impl OpenDisk {
    pub fn open(image: &Image, access: DaemonAccess) -> Result<Self> {
        let export = Export::open_readonly_for(image, access)?;
        let disk = export.disk();
        let shown = image.path().display();
        let layout = partition::read_layout(disk.as_ref()).map_err(|e| e.of(&shown))?;
        let guest = embedded::open(disk, &layout)
            .map_err(|e| Error::failed(format!("opening the volumes of {shown}")).because(e))?;
        Ok(Self {
            export,
            layout,
            guest,
        })
    }

    fn close(self) -> Result<()> {
        drop(self.guest);
        Ok(self.export.close()?)
    }
}

/// Completes the inspection of a VM whose first disk has a Linux file system and no Windows.
/// `starting` is called before the appliance is started; without it, it is not started.
pub fn examine(
    images: &[Image],
    inspection: &mut Inspection,
    source: Option<Firmware>,
    starting: Option<&dyn Fn(&str)>,
) -> Result<()> {
    // The appliance may have to connect too.
    let access = match starting {
        Some(_) => DaemonAccess::User,
        None => DaemonAccess::Private,
    };
    let disks = (images.iter())
        .map(|image| OpenDisk::open(image, access))
        .collect::<Result<Vec<_>>>()?;
    // The finding that this is no Windows is replaced.
    inspection.findings.retain(|f| f.id != "linux");
    inspection.os.family = OsFamily::Linux;
    let looked = look(&disks, inspection, source, starting);
    for disk in disks {
        disk.close()?;
    }
    inspection
        .findings
        .sort_by_key(|f| std::cmp::Reverse(f.severity));
    looked
}

fn look(
    disks: &[OpenDisk],
    inspection: &mut Inspection,
    source: Option<Firmware>,
    starting: Option<&dyn Fn(&str)>,
) -> Result<()> {
    hibernated(disks, &mut inspection.findings)?;
    let (volumes, faults) = ext_volumes(disks)?;
    match embedded_root(disks, &volumes, &faults) {
        Choice::None(why) => {
            inspection.findings.push(no_linux(&why));
            Ok(())
        }
        Choice::Root(root, tree) => {
            if volumes.iter().any(|v| v.unclean) {
                inspection
                    .findings
                    .push(findings::LINUX_NOT_CLEAN.found("the ext4 feature needs_recovery"));
            }
            installation(disks, &tree, root, inspection, source).map_err(failed)
        }
        Choice::Several(found) => {
            inspection.findings.push(several(&found));
            Ok(())
        }
        Choice::Appliance(why) => {
            let Some(starting) = starting else {
                inspection.findings.push(
                    findings::LINUX_ROOT_UNREAD_EMBEDDED.found_with(&[&why], faults.join("; ")),
                );
                return Ok(());
            };
            if tool::find(tool::guestfish::TOOL).is_none() {
                inspection
                    .findings
                    .push(findings::LINUX_ROOT_UNREAD.found_with(
                        &[&why, &host::hint(tool::guestfish::TOOL)],
                        faults.join("; "),
                    ));
                return Ok(());
            }
            starting(&why);
            look_with_appliance(disks, inspection, source, &why)
        }
    }
}

/// Examines the disks with the appliance; `why` is the reason for it.
fn look_with_appliance(
    disks: &[OpenDisk],
    inspection: &mut Inspection,
    source: Option<Firmware>,
    why: &str,
) -> Result<()> {
    let sockets: Vec<_> = disks.iter().map(|d| d.export.socket()).collect();
    let attach: Vec<Attach<'_>> = sockets
        .iter()
        .zip(disks)
        .filter_map(|(socket, disk)| {
            Some(Attach {
                socket: socket.as_deref()?,
                export: EXPORT,
                read_only: true,
                sector_size: disk.layout.sector_size,
            })
        })
        .collect();
    let finding = match appliance::open(&attach).map_err(failed)? {
        Found::Tree(tree) => {
            let root = appliance_root(&tree);
            return installation(disks, tree.as_ref(), root, inspection, source).map_err(failed);
        }
        Found::Several(found) => several(&found),
        Found::Encrypted(devices) => {
            findings::LINUX_ENCRYPTED.found_with(&[&devices.join(", ")], "crypto_LUKS")
        }
        Found::None => no_linux(why),
    };
    inspection.findings.push(finding);
    Ok(())
}

fn failed(error: TreeError) -> Error {
    match error {
        TreeError::Guest(GuestError::MissingTool { what, hint }) => {
            Error::missing_tool(format!("{what} is not available on this host")).hint(hint)
        }
        TreeError::Guest(GuestError::Appliance { reason, hint }) => {
            Error::missing_tool(format!("the libguestfs appliance does not start: {reason}"))
                .hint(hint)
        }
        e => Error::failed("reading the Linux guest").because(e),
    }
}

fn several(found: &[String]) -> Finding {
    findings::SEVERAL_LINUX.found_with(&[&found.join(", ")], String::new())
}

fn no_linux(why: &str) -> Finding {
    findings::NO_LINUX.found(why)
}

/// Warns about a suspended session, which would continue with the old hardware.
fn hibernated(disks: &[OpenDisk], findings: &mut Vec<Finding>) -> Result<()> {
    for (i, disk) in disks.iter().enumerate() {
        for partition in &disk.layout.partitions {
            let mut signature = [0; 10];
            let at = partition.start_bytes.saturating_add(4086);
            if partition.size_bytes < 4096
                || disk.export.disk().read_at(at, &mut signature).is_err()
            {
                continue;
            }
            if signature.starts_with(b"S1SUSPEND") || signature.starts_with(b"S2SUSPEND") {
                findings.push(findings::LINUX_HIBERNATED.found(format!(
                    "suspend image on disk {}, partition {}",
                    i + 1,
                    partition.index
                )));
            }
        }
    }
    Ok(())
}

fn ext_volumes(disks: &[OpenDisk]) -> Result<(Vec<ExtVolume>, Vec<String>)> {
    let (mut volumes, mut faults) = (Vec::new(), Vec::new());
    for (i, disk) in disks.iter().enumerate() {
        for volume in disk.guest.volumes() {
            if volume.kind != FsKind::Ext {
                continue;
            }
            let p = &volume.partition;
            let blocks: Arc<dyn BlockRead> = disk.export.disk();
            let partuuid = partuuid(&disk.layout, p.index, p.guid.as_deref());
            let opened = ExtVolume::open(
                i,
                volume.id,
                blocks,
                (p.start_bytes, p.size_bytes),
                partuuid,
            );
            match opened {
                Ok(volume) => volumes.push(volume),
                Err(error) => faults.push(format!(
                    "disk {}, partition {}: {}",
                    i + 1,
                    p.index,
                    std::error::Error::source(&error).unwrap_or(&error)
                )),
            }
        }
    }
    Ok((volumes, faults))
}

/// The PARTUUID that Linux derives for MBR disks: signature and number.
fn partuuid(layout: &DiskLayout, index: u32, guid: Option<&str>) -> Option<String> {
    match (guid, layout.scheme) {
        (Some(guid), _) => Some(guid.to_lowercase()),
        (None, Scheme::Mbr) => {
            let signature = layout.disk_id.as_deref()?.strip_prefix("0x")?;
            Some(format!("{}-{index:02x}", signature.to_lowercase()))
        }
        _ => None,
    }
}

enum Choice<'d> {
    Root(RootFacts, ExtTree<'d>),
    Several(Vec<String>),
    /// The reason why this process cannot read it.
    Appliance(String),
    /// Everything was read, and there is none.
    None(String),
}

fn embedded_root<'d>(
    disks: &'d [OpenDisk],
    volumes: &[ExtVolume],
    faults: &[String],
) -> Choice<'d> {
    let is_root = |v: &&ExtVolume| {
        (v.has("/etc/os-release") || v.has("/usr/lib/os-release") || v.has("/etc/fstab"))
            && (v.has("/sbin") || v.has("/usr/sbin"))
    };
    let roots: Vec<&ExtVolume> = volumes.iter().filter(is_root).collect();
    let place = |v: &ExtVolume| format!("disk {}, partition {}", v.disk + 1, v.id.partition);
    let root = match &roots[..] {
        [] => {
            let why = format!(
                "the root file system is not on a plain ext4 partition ({})",
                kinds(disks)
            );
            return if faults.is_empty() && !disks.iter().any(has_others) {
                Choice::None(why)
            } else {
                Choice::Appliance(why)
            };
        }
        [root] => *root,
        _ => return Choice::Several(roots.iter().map(|v| place(v)).collect()),
    };
    let mut tree = ExtTree::new(root.clone());
    let fstab = match tree.text("/etc/fstab") {
        Ok(text) => files::fstab(&text.unwrap_or_default()),
        Err(error) => {
            return Choice::Appliance(format!("the root file system has a fault ({error})"));
        }
    };
    for mount in &fstab {
        if !["/boot", "/usr", "/boot/efi", "/efi"].contains(&mount.place.as_str()) {
            continue;
        }
        if let Some(volume) = volumes.iter().find(|v| is_device(v, mount)) {
            tree.mount(&mount.place, volume.clone());
        } else if mount.place.ends_with("efi") || mount.kind == "vfat" {
            if let Some((guest, volume)) = esp(disks) {
                tree.mount_fat(&mount.place, guest, volume);
            }
        } else {
            return Choice::Appliance(format!(
                "{} is on {} ({})",
                mount.place, mount.device, mount.kind
            ));
        }
    }
    let facts = RootFacts {
        place: place(root),
        filesystem: "ext4".to_string(),
        layers: Vec::new(),
    };
    Choice::Root(facts, tree)
}

/// Whether a root file system may be on a volume that this process cannot read.
fn has_others(disk: &OpenDisk) -> bool {
    let kinds = [FsKind::Xfs, FsKind::Btrfs, FsKind::Lvm, FsKind::Luks];
    let volumes = disk.guest.volumes();
    volumes.iter().any(|v| {
        kinds.contains(&v.kind) || RAID.contains(&v.partition.type_id.to_lowercase().as_str())
    })
}

fn kinds(disks: &[OpenDisk]) -> String {
    let mut kinds: Vec<String> = Vec::new();
    for volume in disks.iter().flat_map(|d| d.guest.volumes()) {
        let kind = format!("{:?}", volume.kind).to_lowercase();
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds.join(", ")
}

fn esp(disks: &[OpenDisk]) -> Option<(&EmbeddedReader, crate::guest::VolumeId)> {
    let path = crate::guest::GuestPath::parse("EFI").ok()?;
    disks.iter().find_map(|disk| {
        let volume = disk.guest.volumes().iter().find(|v| {
            v.kind == FsKind::Fat && matches!(disk.guest.stat(v.id, &path), Ok(Some(_)))
        })?;
        Some((&disk.guest, volume.id))
    })
}

/// Whether an entry of fstab refers to this volume.
fn is_device(volume: &ExtVolume, mount: &Mount) -> bool {
    let device = mount.device.as_str();
    let uuid = device
        .strip_prefix("UUID=")
        .or_else(|| device.strip_prefix("/dev/disk/by-uuid/"));
    let label = device
        .strip_prefix("LABEL=")
        .or_else(|| device.strip_prefix("/dev/disk/by-label/"));
    if let Some(uuid) = uuid {
        return uuid.trim_matches('"').eq_ignore_ascii_case(&volume.uuid());
    }
    if let Some(label) = label {
        return volume.label() == Some(label.trim_matches('"'));
    }
    if let Some(id) = device.strip_prefix("PARTUUID=") {
        let id = id.trim_matches('"').to_lowercase();
        return volume.partuuid.as_deref() == Some(id.as_str());
    }
    // `/dev/sdb2`: the second partition of the second disk.
    let name = ["/dev/sd", "/dev/vd", "/dev/hd", "/dev/xvd"]
        .iter()
        .find_map(|prefix| device.strip_prefix(prefix));
    let Some(name) = name else { return false };
    let mut chars = name.chars();
    let letter = chars.next().filter(char::is_ascii_lowercase);
    let disk = letter.map(|c| (c as u8 - b'a') as usize);
    disk == Some(volume.disk) && chars.as_str().parse() == Ok(volume.id.partition)
}

fn appliance_root(tree: &ApplianceTree) -> RootFacts {
    RootFacts {
        place: guest_text(&tree.device).unwrap_or_default(),
        filesystem: guest_text(&tree.filesystem).unwrap_or_default(),
        layers: tree.layers.clone(),
    }
}

/// Reads all facts from the files of the guest.
fn installation(
    disks: &[OpenDisk],
    tree: &dyn Tree,
    root: RootFacts,
    inspection: &mut Inspection,
    source: Option<Firmware>,
) -> Result<(), TreeError> {
    let release = match tree.text("/etc/os-release")? {
        Some(text) => Some(text),
        None => tree.text("/usr/lib/os-release")?,
    };
    let release = files::os_release(&release.unwrap_or_default());
    let field = |name: &str| release.get(name).and_then(|v| guest_text(v));
    let words = |name: &str| field(name).unwrap_or_default();
    let os = &mut inspection.os;
    os.product_name = field("PRETTY_NAME").or_else(|| field("NAME"));
    os.display_version = field("VERSION_ID");
    os.arch = arch(tree)?;
    os.hostname = tree
        .text("/etc/hostname")?
        .and_then(|t| guest_text(t.lines().next()?));
    let mounts = files::fstab(&tree.text("/etc/fstab")?.unwrap_or_default());
    let mut facts = LinuxFacts {
        distribution: words("ID").to_lowercase(),
        like: words("ID_LIKE")
            .split_whitespace()
            .map(str::to_lowercase)
            .collect(),
        version: field("VERSION_ID"),
        reader: tree.reader(),
        device_names: files::hardware_names(&mounts)
            .iter()
            .filter_map(|name| guest_text(name))
            .collect(),
        interfaces: interfaces(tree)?,
        clock_is_local: tree
            .text("/etc/adjtime")?
            .is_some_and(|t| t.lines().any(|l| l.trim() == "LOCAL")),
        sector_size: disks.first().map_or(512, |d| d.layout.sector_size),
        root,
        ..LinuxFacts::default()
    };
    let readers: Vec<&EmbeddedReader> = disks.iter().map(|d| &d.guest).collect();
    let esp = efi::find(&readers, &facts.distribution)?;
    facts.fallback_loader = esp.as_ref().map(|e| e.has_fallback);
    facts.fallback = esp.as_ref().and_then(|e| e.copies.clone());
    inspection.firmware = Some(firmware(
        disks,
        esp.as_ref(),
        source,
        &mut inspection.findings,
    ));
    if tree.head("/usr/bin/vmtoolsd", 1)?.is_some() {
        inspection
            .hypervisor_tools
            .push("open-vm-tools".to_string());
    }
    if tree.head("/usr/sbin/VBoxService", 1)?.is_some() {
        inspection
            .hypervisor_tools
            .push("VirtualBox Guest Additions".to_string());
    }
    findings(&facts, inspection);
    inspection.linux = Some(facts);
    Ok(())
}

/// The architecture, from a program that every Linux has.
fn arch(tree: &dyn Tree) -> Result<Option<Arch>, TreeError> {
    for program in ["/usr/bin/env", "/bin/sh", "/bin/busybox", "/sbin/init"] {
        let Some(head) = tree.head(program, 20)? else {
            continue;
        };
        if head.starts_with(b"\x7fELF") && head.get(5) == Some(&1) {
            return Ok(match head.get(18..20) {
                Some([0x3e, 0]) => Some(Arch::Amd64),
                Some([3, 0]) => Some(Arch::X86),
                Some([0xb7, 0]) => Some(Arch::Arm64),
                _ => None,
            });
        }
    }
    Ok(None)
}

fn interfaces(tree: &dyn Tree) -> Result<Vec<(String, String)>, TreeError> {
    let mut paths = vec!["/etc/network/interfaces".to_string()];
    for folder in [
        "/etc/network/interfaces.d",
        "/etc/netplan",
        "/etc/sysconfig/network-scripts",
        "/etc/sysconfig/network",
        "/etc/NetworkManager/system-connections",
        "/etc/systemd/network",
    ] {
        let names = tree.list(folder)?;
        paths.extend(
            names
                .iter()
                .take(MAX_CONFIGS)
                .map(|n| format!("{folder}/{n}")),
        );
    }
    let mut found = Vec::new();
    for path in paths {
        let name = path.rsplit('/').next().unwrap_or_default();
        if path.contains("/sysconfig/") && !name.starts_with("ifcfg-") {
            continue;
        }
        if let Some(text) = tree.text(&path)? {
            let file = guest_text(&path).unwrap_or_default();
            let names = files::interfaces(&path, &text);
            found.extend(names.into_iter().map(|n| (n, file.clone())));
        }
    }
    Ok(found)
}

/// The firmware, from the existing boot loaders; with both kinds, that of the source VM.
fn firmware(
    disks: &[OpenDisk],
    esp: Option<&Esp>,
    source: Option<Firmware>,
    findings: &mut Vec<Finding>,
) -> Firmware {
    let bios = disks.first().is_some_and(|disk| {
        let mut sector = [0; 512];
        let read = disk.export.disk().read_at(0, &mut sector);
        let code = sector.get(..440).is_some_and(|c| c.iter().any(|b| *b != 0));
        let place = match disk.layout.scheme {
            Scheme::Gpt => disk
                .layout
                .partitions
                .iter()
                .any(|p| p.type_id == GPT_BIOS_BOOT),
            Scheme::Mbr | Scheme::None => true,
        };
        read.is_ok() && code && place
    });
    match (esp.is_some(), bios) {
        (true, false) => Firmware::Uefi,
        (false, true) => Firmware::Bios,
        (true, true) if source == Some(Firmware::Uefi) => Firmware::Uefi,
        (true, true) => Firmware::Bios,
        (false, false) => {
            findings.push(findings::LINUX_NO_BOOT_LOADER.found(
                "the first sector has no code, no FAT volume has \\EFI with a loader we know",
            ));
            match source {
                Some(Firmware::Uefi) => Firmware::Uefi,
                _ => Firmware::Bios,
            }
        }
    }
}

fn findings(facts: &LinuxFacts, inspection: &mut Inspection) {
    let out = &mut inspection.findings;
    if inspection.os.arch == Some(Arch::Arm64) {
        out.push(findings::LINUX_ARCH.found("ELF header of /usr/bin/env"));
    }
    out.push(
        findings::LINUX_FREE_SPACE
            .found(format!("{} on {}", facts.root.filesystem, facts.root.place)),
    );
    if facts.fallback_loader == Some(false) && inspection.firmware == Some(Firmware::Uefi) {
        out.push(findings::UEFI_FALLBACK_LINUX.found("EFI system partition"));
    }
    if !facts.device_names.is_empty() {
        out.push(
            findings::LINUX_DEVICE_NAME.found_with(&[&facts.device_names.join(", ")], "/etc/fstab"),
        );
    }
    let mut files: Vec<&str> = facts.interfaces.iter().map(|(_, f)| f.as_str()).collect();
    files.dedup();
    if !files.is_empty() {
        let names: Vec<&str> = facts.interfaces.iter().map(|(n, _)| n.as_str()).collect();
        out.push(findings::LINUX_INTERFACE_NAME.found_with(&[&names.join(", ")], files.join(", ")));
    }
}
