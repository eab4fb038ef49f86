//! Volumes that are not simply a partition: in BitLocker and LUKS, in LVM, on dynamic disks (LDM).
//!
//! The appliance opens BitLocker and LUKS with a key of `--key`, LVM and LDM automatically at its
//! start. It exposes the contents of each container as a block device. The same code as for a
//! partition identifies the file system and reads its state, through [`Remote`]. The volume of an
//! opened BitLocker or LUKS partition keeps the partition's number; logical volumes are numbered
//! from [`FIRST_MAPPED`] on. Only one disk is attached: a dynamic or logical volume that spans
//! disks stays closed.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::embedded::{self, EmbeddedReader};
use super::fs::IDENTIFY_BYTES;
use super::guestfish_appliance::{Appliance, ApplianceDevice, device};
use super::keys::Keys;
use super::{
    FIRST_MAPPED, FileInfo, FsKind, GuestError, GuestPath, GuestRead, Result, Volume, VolumeId,
    VolumeState,
};
use crate::block::{BlockRead, check_range};
use crate::disk::cache::Cached;
use crate::disk::layout::{DiskLayout, Partition, Scheme};
use crate::text::guest_text;
use crate::tool::guestfish::{Line, Reply, Secret};

/// The most volumes examined.
const MAX_VOLUMES: usize = 256;
const WRONG_KEY: &str = "No key available with this passphrase";
/// The message of cryptsetup 2.6 for a BitLocker volume with a key in clear, even if a given key is
/// right.
const SUSPENDED: &str = "Activation of partially decrypted BITLK device is not supported";
/// The UUID in a LUKS header, versions 1 and 2.
const LUKS_UUID: std::ops::Range<usize> = 168..208;

/// A block device of the appliance, for reading. It keeps the appliance running, so it must not
/// live longer than needed.
struct Remote {
    appliance: Appliance,
    device: ApplianceDevice,
}

impl BlockRead for Remote {
    fn size(&self) -> u64 {
        self.device.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.device.size)?;
        let bytes = self
            .appliance
            .with(|inner| inner.fetch(&self.device.path, offset, buf.len() as u64))
            .map_err(io::Error::other)?
            .map_err(io::Error::other)?;
        buf.copy_from_slice(&bytes);
        Ok(())
    }
}

/// The device of a mapped volume; `None` for a partition.
pub(super) fn block(appliance: &Appliance, volume: VolumeId) -> Result<Option<Arc<dyn BlockRead>>> {
    let device = appliance.with(|inner| Ok(inner.mapped.get(&volume).cloned()))?;
    Ok(device.map(|device| remote(appliance, device)))
}

fn remote(appliance: &Appliance, device: ApplianceDevice) -> Arc<dyn BlockRead> {
    Arc::new(Cached::new(Remote {
        appliance: appliance.clone(),
        device,
    }))
}

/// The layout of a device: a disk without a partition table.
const BARE: DiskLayout = DiskLayout {
    scheme: Scheme::None,
    sector_size: 512,
    disk_id: None,
    partitions: Vec::new(),
};

/// Opens all containers and adds their contents to the volumes.
pub(super) fn open(appliance: &Appliance, volumes: &mut Vec<Volume>, keys: &Keys) -> Result<()> {
    let mut lvm = volumes.iter().any(|v| v.kind == FsKind::Lvm);
    for volume in volumes.iter_mut() {
        if !matches!(volume.kind, FsKind::Bitlocker | FsKind::Luks) {
            continue;
        }
        match unlock(appliance, volume.id, volume.kind, keys)? {
            None => {}
            Some(Err(reason)) => volume.state.unreadable = guest_text(&reason),
            Some(Ok(device)) => {
                let (kind, label, mut state) = look(appliance, volume.id, device)?;
                state.container = Some(volume.kind);
                state.protectors = std::mem::take(&mut volume.state.protectors);
                (volume.kind, volume.label, volume.state) = (kind, label, state);
                lvm |= kind == FsKind::Lvm;
            }
        }
    }
    let mut inside = Vec::new();
    if lvm {
        // The appliance did not see the contents of a volume opened just now when it started.
        ask(appliance, Line::new("lvm-scan").arg("true"))?.map_err(unlisted("logical volumes"))?;
        let found = ask(appliance, Line::new("lvs"))?.map_err(unlisted("logical volumes"))?;
        inside.extend(lines(&found).map(|path| (path, FsKind::Lvm)));
    }
    if volumes.iter().any(|v| v.kind == FsKind::Ldm) {
        // No answer: an appliance without ldmtool.
        if let Ok(found) = ask(appliance, Line::new("list-ldm-volumes"))? {
            inside.extend(lines(&found).map(|path| (path, FsKind::Ldm)));
        }
    }
    for (path, container) in inside.into_iter().take(MAX_VOLUMES) {
        let number = volumes
            .iter()
            .filter(|v| v.id.partition >= FIRST_MAPPED)
            .count() as u32;
        let id = VolumeId::new(FIRST_MAPPED + number);
        let name = path.rsplit("/dev/").next().and_then(guest_text);
        let device = sized(appliance, path)?;
        let size = device.size;
        let (kind, label, mut state) = look(appliance, id, device)?;
        state.container = Some(container);
        volumes.push(Volume {
            id,
            partition: Partition {
                index: id.partition,
                type_id: String::new(),
                start_bytes: 0,
                size_bytes: size,
                guid: None,
                name,
                active: false,
            },
            kind,
            label,
            state,
        });
    }
    Ok(())
}

fn ask(appliance: &Appliance, line: Line) -> Result<Reply> {
    appliance.with(|inner| inner.one(line))
}

fn unlisted(what: &'static str) -> impl Fn(String) -> GuestError {
    move |reason| GuestError::Op {
        op: "listing",
        path: what.to_string(),
        reason,
    }
}

/// Splits output with one path a line.
fn lines(output: &[u8]) -> impl Iterator<Item = String> {
    let text = String::from_utf8_lossy(output).into_owned();
    let lines: Vec<String> = text.lines().map(|line| line.trim().to_string()).collect();
    lines.into_iter().filter(|line| line.starts_with("/dev/"))
}

/// Tries the keys for a volume. `None` if there are none. The inner `Err` has the reason why none
/// opens it.
fn unlock(
    appliance: &Appliance,
    volume: VolumeId,
    kind: FsKind,
    keys: &Keys,
) -> Result<Option<Result<ApplianceDevice, String>>> {
    if keys.is_empty() {
        return Ok(None);
    }
    let partition = device(volume);
    let uuid = match kind {
        FsKind::Luks => luks_uuid(appliance, &partition)?,
        _ => None,
    };
    let keys = keys.matching(volume, uuid.as_deref());
    if keys.is_empty() {
        return Ok(None);
    }
    // The line with the key must not reach a guestfish that does not support the command.
    let help = ask(appliance, Line::new("help").arg("cryptsetup-open"))?;
    if !help.is_ok_and(|text| text.starts_with(b"NAME")) {
        let reason = "this libguestfs does not open encrypted volumes: 1.44 or later is needed";
        return Ok(Some(Err(reason.to_string())));
    }
    let name = format!("h2k{}", volume.partition);
    let mut reasons = Vec::new();
    for key in &keys {
        match appliance.with(|inner| inner.slow(open_line(&partition, &name, key)))? {
            Ok(_) => return Ok(Some(Ok(sized(appliance, format!("/dev/mapper/{name}"))?))),
            Err(reason) => reasons.push(reason),
        }
    }
    if reasons.iter().any(|r| r.contains(SUSPENDED)) {
        let reason = "BitLocker is suspended, and cryptsetup in the appliance opens no such volume: resume it in the guest (manage-bde -protectors -enable C:)";
        return Ok(Some(Err(reason.to_string())));
    }
    let other = reasons.into_iter().find(|r| !r.contains(WRONG_KEY));
    let wrong = || "none of the keys given with --key opens it".to_string();
    Ok(Some(Err(other.unwrap_or_else(wrong))))
}

fn open_line(partition: &str, name: &str, key: &Secret) -> Line {
    Line::new("cryptsetup-open")
        .arg(partition)
        .arg(name)
        .key(key)
}

fn luks_uuid(appliance: &Appliance, partition: &str) -> Result<Option<String>> {
    let head = appliance.with(|inner| inner.fetch(partition, 0, 512))?;
    Ok(head.ok().and_then(|head| {
        let text = String::from_utf8_lossy(head.get(LUKS_UUID)?).into_owned();
        Some(text.trim_end_matches('\0').to_string())
    }))
}

fn sized(appliance: &Appliance, path: String) -> Result<ApplianceDevice> {
    let size = ask(appliance, Line::new("blockdev-getsize64").arg(&path))?;
    let size = size.map_err(unlisted("the size of a device"))?;
    let size = String::from_utf8_lossy(&size).trim().parse();
    let size = size.map_err(|_| io::Error::other("the size of a device is no number"))?;
    Ok(ApplianceDevice { path, size })
}

/// Adds the contents of a device as that volume.
fn look(
    appliance: &Appliance,
    id: VolumeId,
    device: ApplianceDevice,
) -> Result<(FsKind, Option<String>, VolumeState)> {
    appliance.with(|inner| Ok(inner.mapped.insert(id, device.clone())))?;
    if device.size < IDENTIFY_BYTES as u64 {
        return Ok((FsKind::Unknown, None, VolumeState::default()));
    }
    let seen = embedded::open(remote(appliance, device), &BARE)?;
    let volume = seen.volumes().first().cloned();
    Ok(
        volume.map_or((FsKind::Unknown, None, VolumeState::default()), |v| {
            (v.kind, v.label, v.state)
        }),
    )
}

/// Reads with hyper2kvm's own code a volume that another program opened: the second reader for
/// volumes in a container.
pub struct MappedReader {
    disk: EmbeddedReader,
    volumes: Vec<Volume>,
    mapped: BTreeMap<VolumeId, EmbeddedReader>,
}

impl MappedReader {
    pub fn open(
        appliance: &Appliance,
        disk: Arc<dyn BlockRead>,
        layout: &DiskLayout,
        keys: &Keys,
    ) -> Result<Self> {
        let disk = embedded::open(disk, layout)?;
        let mut volumes = disk.volumes().to_vec();
        open(appliance, &mut volumes, keys)?;
        let mut mapped = BTreeMap::new();
        for volume in volumes.iter().filter(|v| v.state.container.is_some()) {
            if let Some(block) = block(appliance, volume.id)? {
                mapped.insert(volume.id, embedded::open(block, &BARE)?);
            }
        }
        Ok(Self {
            disk,
            volumes,
            mapped,
        })
    }

    fn at(&self, volume: VolumeId) -> (&EmbeddedReader, VolumeId) {
        match self.mapped.get(&volume) {
            Some(reader) => (reader, VolumeId::new(0)),
            None => (&self.disk, volume),
        }
    }
}

impl GuestRead for MappedReader {
    fn engine(&self) -> &'static str {
        "embedded"
    }

    fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    fn stat(&self, volume: VolumeId, path: &GuestPath) -> Result<Option<FileInfo>> {
        let (reader, volume) = self.at(volume);
        reader.stat(volume, path)
    }

    fn list(&self, volume: VolumeId, path: &GuestPath) -> Result<Vec<FileInfo>> {
        let (reader, volume) = self.at(volume);
        reader.list(volume, path)
    }

    fn read_at(
        &self,
        volume: VolumeId,
        path: &GuestPath,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        let (reader, volume) = self.at(volume);
        reader.read_at(volume, path, offset, len)
    }

    fn read(&self, volume: VolumeId, path: &GuestPath, limit: u64) -> Result<Vec<u8>> {
        let (reader, volume) = self.at(volume);
        reader.read(volume, path, limit)
    }
}
