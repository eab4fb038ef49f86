//! The state the disk and Windows were left in: what makes a conversion unsafe, and what makes its
//! result surprising.

use crate::disk::layout::{GPT_LDM_DATA, GPT_LDM_METADATA, GPT_STORAGE_SPACES, MBR_LDM};
use crate::guest::fve::Closed;
use crate::guest::fve::protection::Protection;
use crate::guest::{
    DiskId, FileInfo, FsKind, GuestPath, GuestRead, IO_REPARSE_TAG_WOF, Volume, VolumeId,
};
use crate::registry::HiveView;
use crate::registry::error::Result;
use crate::registry::hive::Key;

use super::Disk;
use super::model::{Finding, Inspection};
use super::tools::MICROSOFT_DEFENDER;

/// What the volumes and the partition tables say. `system` is the volume Windows is on; what keeps a disk
/// from being changed counts on `disks`, those with Windows and its boot files.
pub fn volumes(
    guest: &dyn GuestRead,
    disks: &[&Disk],
    system: Option<VolumeId>,
    force_dirty: bool,
    out: &mut Inspection,
) {
    let changed = |disk: DiskId| disks.iter().any(|d| d.id == disk);
    let volumes: Vec<&Volume> = guest
        .volumes()
        .iter()
        .filter(|v| changed(v.id.disk))
        .collect();
    let of_kind = |kind: FsKind| -> Vec<VolumeId> {
        let of_kind = volumes.iter().filter(|v| v.kind == kind);
        of_kind.map(|v| v.id).collect()
    };
    let of_type = |types: &[&str]| -> Vec<VolumeId> {
        let partitions = disks
            .iter()
            .flat_map(|d| d.layout.partitions.iter().map(|p| (d.id, p)));
        partitions
            .filter(|(_, p)| types.iter().any(|t| t.eq_ignore_ascii_case(&p.type_id)))
            .map(|(disk, p)| VolumeId::of(disk, p.index))
            .collect()
    };

    let opened = |kind: FsKind| -> Vec<VolumeId> {
        let inside = volumes.iter().filter(|v| v.state.container == Some(kind));
        inside.map(|v| v.id).collect()
    };
    let closed = of_kind(FsKind::Bitlocker);
    let mut bitlocker = [closed.clone(), opened(FsKind::Bitlocker)].concat();
    bitlocker.sort_unstable();
    out.bitlocker = !bitlocker.is_empty();
    let mut protectors: Vec<String> = Vec::new();
    for protector in volumes.iter().flat_map(|v| &v.state.protectors) {
        if !protectors.contains(protector) {
            protectors.push(protector.clone());
        }
    }
    match (out.bitlocker, system) {
        (false, _) => {}
        // Opened, and no Windows in it.
        (true, None) if closed.is_empty() => {}
        (true, None) => out.findings.push(closed_bitlocker(&volumes, &closed, unlocked_by(&bitlocker, &protectors))),
        (true, Some(system)) if bitlocker.contains(&system) => {
            let of_system = volumes.iter().find(|v| v.id == system);
            let is_suspended = of_system.is_some_and(|v| {
                v.state.protectors.iter().any(|p| p == Protection::ClearKey.name())
            });
            let evidence = unlocked_by(&bitlocker, &protectors);
            out.findings.push(opened_bitlocker(is_suspended, evidence));
        }
        (true, Some(_)) => out.findings.push(Finding::warning(
            "bitlocker-data",
            "a data volume is encrypted with BitLocker: Windows may ask for its recovery key on the new machine",
            "keep the recovery key at hand, or suspend BitLocker before the conversion",
            unlocked_by(&bitlocker, &protectors),
        )),
    }

    let luks = of_kind(FsKind::Luks);
    if !luks.is_empty() && system.is_none() {
        out.findings.push(Finding::blocker(
            "luks",
            because(
                "a volume is encrypted with LUKS, and no Windows is outside of it",
                not_opened(&volumes, &luks),
            ),
            "give its key with --key (the guestfish engine opens it), or decrypt it",
            list(&luks),
        ));
    }

    let mut ldm = of_kind(FsKind::Ldm);
    ldm.extend(of_type(&[MBR_LDM, GPT_LDM_METADATA, GPT_LDM_DATA]));
    ldm.sort_unstable();
    ldm.dedup();
    out.dynamic_disk = !ldm.is_empty();
    if out.dynamic_disk {
        out.findings.push(Finding::blocker(
            "dynamic-disk",
            "this is a dynamic disk (LDM): its volumes may span disks, and half of a mirror must not be changed",
            "convert it to a basic disk in the guest, or image the volumes to one",
            match opened(FsKind::Ldm).len() {
                0 => list(&ldm),
                n => format!("{}, {n} volumes on it can be read", list(&ldm)),
            },
        ));
    }

    let mut spaces = of_kind(FsKind::StorageSpaces);
    spaces.extend(of_type(&[GPT_STORAGE_SPACES]));
    if !spaces.is_empty() {
        spaces.sort_unstable();
        spaces.dedup();
        out.findings.push(Finding::blocker(
            "storage-spaces",
            "the disk is part of a Storage Spaces pool, which is not read here",
            "move the data to an ordinary disk in the guest",
            list(&spaces),
        ));
    }

    let refs = of_kind(FsKind::Refs);
    if !refs.is_empty() {
        let evidence = list(&refs);
        out.findings.push(if system.is_some() {
            Finding::info(
                "refs-data",
                "a data volume is ReFS: it is copied as it is and not looked at",
                "none needed",
                evidence,
            )
        } else {
            Finding::blocker(
                "refs",
                "a volume is ReFS, which is not read here: a Windows on it cannot be converted",
                "move Windows to NTFS",
                evidence,
            )
        });
    }

    if let Some(volume) = system.and_then(|id| volumes.iter().find(|v| v.id == id)) {
        system_volume(volume, force_dirty, out);
    }
    for volume in guest.volumes().iter().filter(|v| Some(v.id) != system) {
        if volume.kind == FsKind::Ntfs && (volume.state.hibernated || volume.state.cached) {
            out.findings.push(Finding::warning(
                "data-volume-hibernated",
                "another volume holds a hibernated session: what that Windows had open is lost when this one starts",
                "shut that Windows down completely (shutdown /s /t 0)",
                list(&[volume.id]),
            ));
        }
        if volume.kind == FsKind::Ntfs && volume.state.dirty && !volume.state.cached {
            out.findings.push(Finding::info(
                "data-volume-dirty",
                "another NTFS volume was not unmounted cleanly: Windows checks it at the next start",
                "none needed; a clean shutdown before the conversion avoids it",
                list(&[volume.id]),
            ));
        }
    }
    let snapshots: Vec<_> = volumes
        .iter()
        .filter(|v| v.state.vss_snapshots)
        .map(|v| v.id)
        .collect();
    out.vss_snapshots = !snapshots.is_empty();
    if out.vss_snapshots {
        out.findings.push(Finding::info(
            "vss-snapshots",
            "shadow copies are on the disk: the free space of their volume is copied too, because they use it",
            "delete them first if they are not needed (vssadmin delete shadows /all)",
            list(&snapshots),
        ));
    }
}

fn system_volume(volume: &Volume, force_dirty: bool, out: &mut Inspection) {
    out.hibernated = volume.state.hibernated;
    out.volume_dirty = volume.state.dirty;
    if out.hibernated {
        out.findings.push(Finding::blocker(
            "volume-hibernated",
            "Windows is hibernated (Fast Startup counts): changing its disk now would damage it",
            "start the guest, run powercfg /h off, then shut it down with shutdown /s /t 0",
            format!("hiberfil.sys on {}", volume.id),
        ));
    } else if volume.state.cached {
        out.findings.push(Finding::blocker(
            "volume-cached",
            "Windows did not let go of its NTFS volume (log version 2.0: it ran when the disk was taken, or Fast Startup is on): parts of it may exist only in memory",
            "start the guest, run powercfg /h off, then shut it down with shutdown /s /t 0; --force-dirty-volume does not help here",
            format!("$LogFile on {}", volume.id),
        ));
    } else if out.volume_dirty && force_dirty {
        out.findings.push(Finding::warning(
            "volume-dirty-forced",
            "the NTFS volume of Windows was not unmounted cleanly and is written all the same: its log is thrown away, and what Windows had not finished writing is lost",
            "let Windows check the disk at the first boot, and compare what matters with a backup",
            format!("dirty flag or open $LogFile on {}", volume.id),
        ));
    } else if out.volume_dirty {
        out.findings.push(Finding::blocker(
            "volume-dirty",
            "the NTFS volume of Windows was not unmounted cleanly: writing to it could damage it",
            "start the guest, let it check the disk (chkdsk C: /f), and shut it down with shutdown /s /t 0; --force-dirty-volume writes anyway and loses what was not finished",
            format!("dirty flag or open $LogFile on {}", volume.id),
        ));
    }
}

fn unlocked_by(volumes: &[VolumeId], protectors: &[String]) -> String {
    let volumes = list(volumes);
    match protectors.is_empty() {
        true => volumes,
        false => format!("{volumes}, protected by: {}", protectors.join(", ")),
    }
}

/// BitLocker volumes that stay closed, and no Windows outside of them.
fn closed_bitlocker(volumes: &[&Volume], closed: &[VolumeId], evidence: String) -> Finding {
    let is = |wanted: Closed| {
        let mut of_them = volumes.iter().filter(|v| closed.contains(&v.id));
        of_them.any(|v| v.state.closed == Some(wanted))
    };
    let reason = not_opened(volumes, closed);
    if is(Closed::Converting) && !is(Closed::Locked) {
        return Finding::blocker(
            "bitlocker-converting",
            because(
                "a volume is neither encrypted nor decrypted as a whole",
                reason,
            ),
            "start the guest, wait until manage-bde -status says 100% or 0% (a paused conversion goes on after manage-bde -resume C:), shut it down",
            evidence,
        );
    }
    Finding::blocker(
        "bitlocker",
        because(
            "a volume is encrypted with BitLocker: Windows cannot be read, let alone changed",
            reason,
        ),
        "give its recovery password, its password or its .BEK file with --key (all:file:FILE); or suspend BitLocker in the guest (manage-bde -protectors -disable C: -rc 0) and shut it down: no key is needed then",
        evidence,
    )
}

/// A Windows that is encrypted, and can be read and changed here.
fn opened_bitlocker(is_suspended: bool, evidence: String) -> Finding {
    if is_suspended {
        return Finding::warning(
            "bitlocker-suspended",
            "Windows is encrypted with BitLocker, which is suspended and stays so: whoever has the disk can read it; the TPM of the old machine is not in the new one",
            "none needed for the boots if it was suspended with -rc 0 (else Windows resumes it after the first boot and asks for the recovery password at the second); after the last boot, in the guest: manage-bde -protectors -delete C: -type TPM, manage-bde -protectors -add C: -tpm where the machine has a TPM, manage-bde -protectors -enable C:",
            evidence,
        );
    }
    Finding::warning(
        "bitlocker-opened",
        "Windows is encrypted with BitLocker and stays so: its TPM is not in the new machine, so Windows asks for the recovery key at the first boot; backup/ holds hives in clear",
        "suspend BitLocker before the conversion (manage-bde -protectors -disable C: -rc 0) so that both boots pass without it, or keep the recovery key at hand",
        evidence,
    )
}

/// Why no key opened them, when one was tried.
fn not_opened<'a>(volumes: &[&'a Volume], closed: &[VolumeId]) -> Option<&'a str> {
    let mut closed = volumes.iter().filter(|v| closed.contains(&v.id));
    closed.find_map(|v| v.state.unreadable.as_deref())
}

fn because(message: &str, reason: Option<&str>) -> String {
    match reason {
        Some(reason) => format!("{message}; {reason}"),
        None => message.to_string(),
    }
}

fn list(volumes: &[VolumeId]) -> String {
    let mut text = String::new();
    let mut at = None;
    for volume in volumes {
        if at == Some(volume.disk) {
            text += &format!(", {}", volume.partition);
        } else {
            let separator = if at.is_some() { "; " } else { "" };
            text += &format!("{separator}{volume}");
        }
        at = Some(volume.disk);
    }
    text
}

/// System files of a CompactOS installation are WOF reparse points.
const COMPACT_PROBES: [&str; 4] = [
    "System32\\ntoskrnl.exe",
    "System32\\kernel32.dll",
    "System32\\shell32.dll",
    "explorer.exe",
];

fn compressed_hive(stat: &dyn Fn(&str) -> Option<FileInfo>, root: &GuestPath) -> Option<String> {
    ["SYSTEM", "SOFTWARE"]
        .map(|name| format!("System32\\config\\{name}"))
        .into_iter()
        .find(|path| stat(path).is_some_and(|info| info.compressed))
        .map(|path| format!("{root}\\{path}"))
}

/// What the files of Windows say.
pub fn files(guest: &dyn GuestRead, volume: VolumeId, root: &GuestPath, out: &mut Inspection) {
    let stat = |path: &str| {
        let path = root.join(path).ok()?;
        guest.stat(volume, &path).ok()?
    };
    out.compact_os = COMPACT_PROBES
        .iter()
        .any(|p| stat(p).is_some_and(|i| i.reparse_tag == Some(IO_REPARSE_TAG_WOF)));
    if out.compact_os {
        out.findings.push(Finding::info(
            "compact-os",
            "system files are compressed (CompactOS): driver files that are added or replaced are not",
            "none needed",
            "WOF reparse points on system files",
        ));
    }
    let probed = |what: fn(&FileInfo) -> bool| {
        let mut found = COMPACT_PROBES
            .iter()
            .filter(|p| stat(p).is_some_and(|i| what(&i)));
        found.next().map(|p| format!("{root}\\{p}"))
    };
    if let Some(file) = probed(|i| i.encrypted) {
        out.findings.push(encrypted(file));
    }
    if let Some(file) = probed(|i| i.compressed).or_else(|| compressed_hive(&stat, root)) {
        out.findings.push(Finding::info(
            "compressed-volume",
            "files of Windows are compressed by NTFS: they are read as they are; what is written, hives included, is not compressed",
            "none needed",
            file,
        ));
    }
    if stat("WinSxS\\pending.xml").is_some() {
        out.pending_updates = true;
        out.findings.push(Finding::warning(
            "pending-updates",
            "updates wait for the next start: they run on the new machine, and may replace driver files",
            "restart the guest until no update is pending, then shut it down",
            format!("{root}\\WinSxS\\pending.xml"),
        ));
    }
}

pub fn encrypted(file: String) -> Finding {
    Finding::blocker(
        "efs",
        "files of Windows are encrypted (EFS): neither this program nor the boot loader can read them",
        "decrypt the Windows folder in the guest (cipher /d /s:C:\\Windows), then shut it down",
        file,
    )
}

/// What the hives say.
pub fn hives(
    system: &HiveView<'_>,
    software: &HiveView<'_>,
    control_set: &str,
    out: &mut Inspection,
) -> Result<()> {
    let Some(set) = system.key(control_set)? else {
        return Ok(());
    };
    pending(&set, software, out)?;
    policies(software, out)?;
    roles(&set, out)?;
    virtualization_based_security(&set, out)?;
    setup(system, out)?;
    let scanners: Vec<&str> = out
        .antivirus
        .iter()
        .map(String::as_str)
        .filter(|a| *a != MICROSOFT_DEFENDER)
        .collect();
    if !scanners.is_empty() {
        let evidence = scanners.join(", ");
        out.findings.push(Finding::warning(
            "antivirus",
            "a virus scanner with boot drivers of its own is installed: it may block the first start of new drivers",
            "if the first boot fails, convert again after pausing its self-protection",
            evidence,
        ));
    }
    Ok(())
}

fn pending(set: &Key<'_>, software: &HiveView<'_>, out: &mut Inspection) -> Result<()> {
    let current = "Microsoft\\Windows\\CurrentVersion";
    for key in [
        "Component Based Servicing\\RebootPending",
        "WindowsUpdate\\Auto Update\\RebootRequired",
    ] {
        let path = format!("{current}\\{key}");
        if software.key(&path)?.is_some() {
            out.pending_updates = true;
            out.findings.push(Finding::warning(
                "pending-reboot",
                "Windows waits for a restart to finish an update: it finishes on the new machine, with restarts of its own",
                "restart the guest once more before the conversion",
                format!("SOFTWARE\\{path}"),
            ));
        }
    }
    let renames = match set.key("Control\\Session Manager")? {
        Some(key) => key.value("PendingFileRenameOperations")?,
        None => None,
    };
    // Beyond the terminators there is at least one operation.
    if renames.is_some_and(|v| v.data.iter().any(|b| *b != 0)) {
        out.pending_updates = true;
        out.findings.push(Finding::info(
            "pending-renames",
            "files wait to be renamed or deleted at the next start",
            "none needed",
            "Session Manager\\PendingFileRenameOperations",
        ));
    }
    Ok(())
}

fn policies(software: &HiveView<'_>, out: &mut Inspection) -> Result<()> {
    let path = "Policies\\Microsoft\\Windows\\DeviceInstall\\Restrictions";
    let Some(key) = software.key(path)? else {
        return Ok(());
    };
    let mut active = Vec::new();
    for name in [
        "DenyUnspecified",
        "DenyDeviceIDs",
        "DenyDeviceClasses",
        "DenyInstanceIDs",
    ] {
        if key.dword(name)?.is_some_and(|v| v != 0) {
            active.push(name);
        }
    }
    if !active.is_empty() {
        out.group_policy_device_restrictions = true;
        out.findings.push(Finding::warning(
            "device-install-policy",
            "a group policy restricts device installation: Windows may refuse the new disk and network devices",
            "exempt the virtio devices (PCI\\VEN_1AF4) from the policy before the conversion",
            format!("SOFTWARE\\{path}: {}", active.join(", ")),
        ));
    }
    Ok(())
}

fn roles(set: &Key<'_>, out: &mut Inspection) -> Result<()> {
    if let Some(cluster) = set.key("Services\\ClusSvc")?
        && cluster.dword("Start")?.is_some_and(|s| s < 4)
    {
        out.findings.push(Finding::warning(
            "cluster-node",
            "this is a failover cluster node: shared disks are not part of this image",
            "evict the node first, or attach the shared disks to the new machine by hand",
            "Services\\ClusSvc",
        ));
    }
    let product = match set.key("Control\\ProductOptions")? {
        Some(key) => key.string("ProductType")?,
        None => None,
    };
    if product.is_some_and(|p| p.eq_ignore_ascii_case("LanmanNT")) {
        out.findings.push(Finding::warning(
            "domain-controller",
            "this is a domain controller: never run the old and the new machine at the same time",
            "keep the old machine off for good; other domain controllers must be reachable at first boot",
            "ProductOptions\\ProductType is LanmanNT",
        ));
    }
    Ok(())
}

/// `Mandatory` keeps the loader from going on when the hypervisor of Windows does not start (Microsoft,
/// "Enable memory integrity"); without it Windows starts without that protection.
fn virtualization_based_security(set: &Key<'_>, out: &mut Inspection) -> Result<()> {
    let Some(key) = set.key("Control\\DeviceGuard")? else {
        return Ok(());
    };
    let is_set = |name| -> Result<bool> { Ok(key.dword(name)?.unwrap_or(0) != 0) };
    if is_set("EnableVirtualizationBasedSecurity")? && is_set("Mandatory")? {
        out.findings.push(Finding::warning(
            "vbs-mandatory",
            "virtualization-based security is mandatory: Windows stops at boot on a machine without nested virtualization",
            "run it on a host that offers nested virtualization to its guests (CPU host-passthrough), or set Control\\DeviceGuard Mandatory to 0 before the conversion",
            "Control\\DeviceGuard: Mandatory",
        ));
    }
    Ok(())
}

/// `SYSTEM\Setup`: a setup, upgrade or sysprep that is not finished.
fn setup(system: &HiveView<'_>, out: &mut Inspection) -> Result<()> {
    let Some(key) = system.key("Setup")? else {
        return Ok(());
    };
    if key.dword("SystemSetupInProgress")?.unwrap_or(0) != 0 {
        out.findings.push(Finding::warning(
            "setup-in-progress",
            "Windows setup is not finished (a sysprepped image looks like this too): the first boot continues it",
            "expected for a template; otherwise let setup finish before the conversion",
            "SYSTEM\\Setup\\SystemSetupInProgress",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::layout::{DiskLayout, Partition, Scheme};
    use crate::inspect::fake::FakeGuest;
    use crate::inspect::model::SourceFacts;

    /// What is said of a disk with one volume of that kind, opened or not, with Windows on it or not.
    fn codes(kind: FsKind, container: Option<FsKind>, system: bool) -> Vec<(&'static str, String)> {
        let layout = DiskLayout {
            scheme: Scheme::Mbr,
            sector_size: 512,
            disk_id: None,
            partitions: Vec::new(),
        };
        let partition = Partition {
            index: 2,
            type_id: "0x07".into(),
            start_bytes: 0,
            size_bytes: 0,
            guid: None,
            name: None,
            active: false,
        };
        let mut guest = FakeGuest::default();
        let volume = guest.volume(partition, kind);
        volume.state.container = container;
        if container.is_none() {
            volume.state.unreadable = Some("no key opens it".into());
        }
        let source = SourceFacts {
            path: String::new(),
            format: String::new(),
            virtual_size_bytes: 0,
        };
        let disk = Disk {
            id: DiskId::ONLY,
            layout,
            source,
        };
        let mut out = super::super::empty(&guest, std::slice::from_ref(&disk));
        let system = system.then_some(VolumeId::new(2));
        volumes(&guest, &[&disk], system, false, &mut out);
        assert_eq!(
            out.bitlocker,
            kind == FsKind::Bitlocker || container == Some(FsKind::Bitlocker)
        );
        let found = out.findings.into_iter();
        found
            .map(|f| {
                let why = f.message.split_once("; ").map_or("", |(_, why)| why);
                (f.id, format!("{:?} {} {why}", f.severity, f.evidence))
            })
            .collect()
    }

    #[test]
    fn volumes_in_containers() {
        use FsKind::{Bitlocker, Luks, Lvm, Ntfs};
        for (kind, container, system, id, says) in [
            (
                Bitlocker,
                None,
                false,
                "bitlocker",
                "Blocker partition 2 no key opens it",
            ),
            (
                Luks,
                None,
                false,
                "luks",
                "Blocker partition 2 no key opens it",
            ),
            (
                Ntfs,
                Some(Bitlocker),
                true,
                "bitlocker-opened",
                "Warning partition 2 backup/ holds hives in clear",
            ),
        ] {
            assert_eq!(codes(kind, container, system), [(id, says.to_string())]);
        }
        for container in [Luks, Lvm] {
            assert_eq!(codes(Ntfs, Some(container), true), []);
        }
        assert_eq!(codes(Ntfs, Some(Bitlocker), false), []);
    }
}
