//! The state of the disk and of Windows: conditions that make a conversion unsafe or its result
//! surprising.

use crate::disk::layout::{GPT_LDM_DATA, GPT_LDM_METADATA, GPT_STORAGE_SPACES, MBR_LDM, Partition};
use crate::guest::fve::Closed;
use crate::guest::fve::protection::Protection;
use crate::guest::{
    DiskId, FileInfo, FsKind, GuestPath, GuestRead, IO_REPARSE_TAG_WOF, Volume, VolumeId,
};
use crate::registry::HiveView;
use crate::registry::error::Result;
use crate::registry::hive::Key;
use crate::types::{ControlSet, KeyPath};

use super::Disk;
use super::findings;
use super::model::{Finding, Inspection};
use super::tools::MICROSOFT_DEFENDER;

/// Findings from the volumes and the partition tables. `system` is the volume of Windows.
/// Conditions that prevent changes to a disk count on `disks`, those with Windows and its boot
/// files.
pub fn volumes(
    guest: &dyn GuestRead,
    disks: &[&Disk],
    system: Option<VolumeId>,
    force_dirty: bool,
    out: &mut Inspection,
) {
    let counted = Counted::of(guest, disks);
    bitlocker(&counted, system, out);
    luks(&counted, system, out);
    dynamic_disks(&counted, out);
    storage_spaces(&counted, out);
    refs(&counted, system, out);
    if let Some(volume) = system.and_then(|id| counted.volume(id)) {
        system_volume(volume, force_dirty, out);
    }
    for volume in guest.volumes().iter().filter(|v| Some(v.id) != system) {
        data_volume(volume, out);
    }
    let snapshots: Vec<_> = counted
        .volumes
        .iter()
        .filter(|v| v.state.vss_snapshots)
        .map(|v| v.id)
        .collect();
    out.vss_snapshots = !snapshots.is_empty();
    if out.vss_snapshots {
        out.findings
            .push(findings::VSS_SNAPSHOTS.found(list(&snapshots)));
    }
}

/// The contents of the disks that will be changed.
struct Counted<'g> {
    volumes: Vec<&'g Volume>,
    partitions: Vec<(DiskId, &'g Partition)>,
}

impl<'g> Counted<'g> {
    fn of(guest: &'g dyn GuestRead, disks: &[&'g Disk]) -> Self {
        let changed = |disk: DiskId| disks.iter().any(|d| d.id == disk);
        let volumes = guest.volumes().iter().filter(|v| changed(v.id.disk));
        let partitions = disks
            .iter()
            .flat_map(|d| d.layout.partitions.iter().map(|p| (d.id, p)));
        Self {
            volumes: volumes.collect(),
            partitions: partitions.collect(),
        }
    }

    fn volume(&self, id: VolumeId) -> Option<&'g Volume> {
        self.volumes.iter().find(|v| v.id == id).copied()
    }

    fn of_kind(&self, kind: FsKind) -> Vec<VolumeId> {
        let of_kind = self.volumes.iter().filter(|v| v.kind == kind);
        of_kind.map(|v| v.id).collect()
    }

    /// Partitions of these types.
    fn of_type(&self, types: &[&str]) -> Vec<VolumeId> {
        self.partitions
            .iter()
            .filter(|(_, p)| types.iter().any(|t| t.eq_ignore_ascii_case(&p.type_id)))
            .map(|(disk, p)| VolumeId::of(*disk, p.index))
            .collect()
    }

    /// Volumes that were read inside a container of this kind.
    fn opened(&self, kind: FsKind) -> Vec<VolumeId> {
        let inside = (self.volumes.iter()).filter(|v| v.state.container == Some(kind));
        inside.map(|v| v.id).collect()
    }

    /// The kinds of protection of the BitLocker volumes, each once.
    fn protectors(&self) -> Vec<String> {
        let mut protectors: Vec<String> = Vec::new();
        for protector in self.volumes.iter().flat_map(|v| &v.state.protectors) {
            if !protectors.contains(protector) {
                protectors.push(protector.clone());
            }
        }
        protectors
    }
}

fn sorted(mut volumes: Vec<VolumeId>) -> Vec<VolumeId> {
    volumes.sort_unstable();
    volumes.dedup();
    volumes
}

fn bitlocker(counted: &Counted<'_>, system: Option<VolumeId>, out: &mut Inspection) {
    let closed = counted.of_kind(FsKind::Bitlocker);
    let mut bitlocker = [closed.clone(), counted.opened(FsKind::Bitlocker)].concat();
    bitlocker.sort_unstable();
    out.bitlocker = !bitlocker.is_empty();
    if !out.bitlocker {
        return;
    }
    let evidence = unlocked_by(&bitlocker, &counted.protectors());
    match system {
        // Opened, but without Windows.
        None if closed.is_empty() => {}
        None => out
            .findings
            .push(closed_bitlocker(&counted.volumes, &closed, evidence)),
        Some(system) if bitlocker.contains(&system) => {
            let is_suspended = counted.volume(system).is_some_and(|v| {
                let mut protectors = v.state.protectors.iter();
                protectors.any(|p| p == Protection::ClearKey.name())
            });
            out.findings.push(opened_bitlocker(is_suspended, evidence));
        }
        Some(_) => out.findings.push(findings::BITLOCKER_DATA.found(evidence)),
    }
}

fn luks(counted: &Counted<'_>, system: Option<VolumeId>, out: &mut Inspection) {
    let luks = counted.of_kind(FsKind::Luks);
    if !luks.is_empty() && system.is_none() {
        let why = because(not_opened(&counted.volumes, &luks));
        out.findings
            .push(findings::LUKS.found_with(&[&why], list(&luks)));
    }
}

fn dynamic_disks(counted: &Counted<'_>, out: &mut Inspection) {
    let mut ldm = counted.of_kind(FsKind::Ldm);
    ldm.extend(counted.of_type(&[MBR_LDM, GPT_LDM_METADATA, GPT_LDM_DATA]));
    let ldm = sorted(ldm);
    out.dynamic_disk = !ldm.is_empty();
    if out.dynamic_disk {
        out.findings.push(
            findings::DYNAMIC_DISK.found(match counted.opened(FsKind::Ldm).len() {
                0 => list(&ldm),
                n => format!("{}, {n} volumes on it can be read", list(&ldm)),
            }),
        );
    }
}

fn storage_spaces(counted: &Counted<'_>, out: &mut Inspection) {
    let mut spaces = counted.of_kind(FsKind::StorageSpaces);
    spaces.extend(counted.of_type(&[GPT_STORAGE_SPACES]));
    let spaces = sorted(spaces);
    if !spaces.is_empty() {
        out.findings
            .push(findings::STORAGE_SPACES.found(list(&spaces)));
    }
}

fn refs(counted: &Counted<'_>, system: Option<VolumeId>, out: &mut Inspection) {
    let refs = counted.of_kind(FsKind::Refs);
    if !refs.is_empty() {
        let evidence = list(&refs);
        out.findings.push(if system.is_some() {
            findings::REFS_DATA.found(evidence)
        } else {
            findings::REFS.found(evidence)
        });
    }
}

fn data_volume(volume: &Volume, out: &mut Inspection) {
    if volume.kind == FsKind::Ntfs && (volume.state.hibernated || volume.state.cached) {
        out.findings
            .push(findings::DATA_VOLUME_HIBERNATED.found(list(&[volume.id])));
    }
    if volume.kind == FsKind::Ntfs && volume.state.dirty && !volume.state.cached {
        out.findings
            .push(findings::DATA_VOLUME_DIRTY.found(list(&[volume.id])));
    }
}

fn system_volume(volume: &Volume, force_dirty: bool, out: &mut Inspection) {
    out.hibernated = volume.state.hibernated;
    out.volume_dirty = volume.state.dirty;
    if out.hibernated {
        out.findings
            .push(findings::VOLUME_HIBERNATED.found(format!("hiberfil.sys on {}", volume.id)));
    } else if volume.state.cached {
        out.findings
            .push(findings::VOLUME_CACHED.found(format!("$LogFile on {}", volume.id)));
    } else if out.volume_dirty && force_dirty {
        out.findings.push(
            findings::VOLUME_DIRTY_FORCED
                .found(format!("dirty flag or open $LogFile on {}", volume.id)),
        );
    } else if out.volume_dirty {
        out.findings.push(
            findings::VOLUME_DIRTY.found(format!("dirty flag or open $LogFile on {}", volume.id)),
        );
    }
}

fn unlocked_by(volumes: &[VolumeId], protectors: &[String]) -> String {
    let volumes = list(volumes);
    match protectors.is_empty() {
        true => volumes,
        false => format!("{volumes}, protected by: {}", protectors.join(", ")),
    }
}

/// BitLocker volumes that stay closed, without a Windows outside of them.
fn closed_bitlocker(volumes: &[&Volume], closed: &[VolumeId], evidence: String) -> Finding {
    let is = |wanted: Closed| {
        let mut of_them = volumes.iter().filter(|v| closed.contains(&v.id));
        of_them.any(|v| v.state.closed == Some(wanted))
    };
    let why = because(not_opened(volumes, closed));
    let text = match is(Closed::Converting) && !is(Closed::Locked) {
        true => findings::BITLOCKER_CONVERTING,
        false => findings::BITLOCKER,
    };
    text.found_with(&[&why], evidence)
}

/// An encrypted Windows that can be read and changed here.
fn opened_bitlocker(is_suspended: bool, evidence: String) -> Finding {
    if is_suspended {
        return findings::BITLOCKER_SUSPENDED.found(evidence);
    }
    findings::BITLOCKER_OPENED.found(evidence)
}

/// The reason why no key opened them, if one was tried.
fn not_opened<'a>(volumes: &[&'a Volume], closed: &[VolumeId]) -> Option<&'a str> {
    let mut closed = volumes.iter().filter(|v| closed.contains(&v.id));
    closed.find_map(|v| v.state.unreadable.as_deref())
}

fn because(reason: Option<&str>) -> String {
    reason.map_or_else(String::new, |reason| format!("; {reason}"))
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

/// System files that are WOF reparse points in a CompactOS installation.
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

/// Findings from the files of Windows.
pub fn files(guest: &dyn GuestRead, volume: VolumeId, root: &GuestPath, out: &mut Inspection) {
    let stat = |path: &str| {
        let path = root.join(path).ok()?;
        guest.stat(volume, &path).ok()?
    };
    out.compact_os = COMPACT_PROBES
        .iter()
        .any(|p| stat(p).is_some_and(|i| i.reparse_tag == Some(IO_REPARSE_TAG_WOF)));
    if out.compact_os {
        out.findings
            .push(findings::COMPACT_OS.found("WOF reparse points on system files"));
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
        out.findings.push(findings::COMPRESSED_VOLUME.found(file));
    }
    if stat("WinSxS\\pending.xml").is_some() {
        out.pending_updates = true;
        out.findings
            .push(findings::PENDING_UPDATES.found(format!("{root}\\WinSxS\\pending.xml")));
    }
}

pub fn encrypted(file: String) -> Finding {
    findings::EFS.found(file)
}

/// Findings from the hives.
pub fn hives(
    system: &HiveView<'_>,
    software: &HiveView<'_>,
    control_set: &ControlSet,
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
        out.findings.push(findings::ANTIVIRUS.found(evidence));
    }
    Ok(())
}

fn pending(set: &Key<'_>, software: &HiveView<'_>, out: &mut Inspection) -> Result<()> {
    let current = KeyPath::new("Microsoft\\Windows\\CurrentVersion");
    for key in [
        "Component Based Servicing\\RebootPending",
        "WindowsUpdate\\Auto Update\\RebootRequired",
    ] {
        let path = current.join(key);
        if software.key(&path)?.is_some() {
            out.pending_updates = true;
            out.findings
                .push(findings::PENDING_REBOOT.found(format!("SOFTWARE\\{path}")));
        }
    }
    let renames = match set.key("Control\\Session Manager")? {
        Some(key) => key.value("PendingFileRenameOperations")?,
        None => None,
    };
    // Apart from the terminators there is at least one operation.
    if renames.is_some_and(|v| v.data.iter().any(|b| *b != 0)) {
        out.pending_updates = true;
        out.findings
            .push(findings::PENDING_RENAMES.found("Session Manager\\PendingFileRenameOperations"));
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
        out.findings.push(
            findings::DEVICE_INSTALL_POLICY
                .found(format!("SOFTWARE\\{path}: {}", active.join(", "))),
        );
    }
    Ok(())
}

fn roles(set: &Key<'_>, out: &mut Inspection) -> Result<()> {
    if let Some(cluster) = set.key("Services\\ClusSvc")?
        && cluster.dword("Start")?.is_some_and(|s| s < 4)
    {
        out.findings
            .push(findings::CLUSTER_NODE.found("Services\\ClusSvc"));
    }
    let product = match set.key("Control\\ProductOptions")? {
        Some(key) => key.string("ProductType")?,
        None => None,
    };
    if product.is_some_and(|p| p.eq_ignore_ascii_case("LanmanNT")) {
        out.findings
            .push(findings::DOMAIN_CONTROLLER.found("ProductOptions\\ProductType is LanmanNT"));
    }
    Ok(())
}

/// `Mandatory` stops the loader if the hypervisor of Windows does not start (Microsoft, "Enable
/// memory integrity"). Without it, Windows starts without that protection.
fn virtualization_based_security(set: &Key<'_>, out: &mut Inspection) -> Result<()> {
    let Some(key) = set.key("Control\\DeviceGuard")? else {
        return Ok(());
    };
    let is_set = |name| -> Result<bool> { Ok(key.dword(name)?.unwrap_or(0) != 0) };
    if is_set("EnableVirtualizationBasedSecurity")? && is_set("Mandatory")? {
        out.findings
            .push(findings::VBS_MANDATORY.found("Control\\DeviceGuard: Mandatory"));
    }
    Ok(())
}

/// `SYSTEM\Setup`: an unfinished setup, upgrade or sysprep.
fn setup(system: &HiveView<'_>, out: &mut Inspection) -> Result<()> {
    let Some(key) = system.key("Setup")? else {
        return Ok(());
    };
    if key.dword("SystemSetupInProgress")?.unwrap_or(0) != 0 {
        out.findings
            .push(findings::SETUP_IN_PROGRESS.found("SYSTEM\\Setup\\SystemSetupInProgress"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::layout::{DiskLayout, Partition, Scheme};
    use crate::inspect::fake::FakeGuest;
    use crate::inspect::model::SourceFacts;

    /// The findings for a disk with one volume of that kind, opened or not, with Windows on it or
    /// not.
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
