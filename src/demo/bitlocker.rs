//! BitLocker volumes made from plain NTFS ones, for the tests: every version, cipher and protector.
//!
//! The files that hide BitLocker's own ranges from NTFS are made first ([`reserve`]), as Windows
//! does. Then the volume is encrypted into another image ([`encrypt`]). Keys are the same for the
//! same specification. Other programs verify the result (`tests/engines/bitlocker/`).

use std::io;
use std::ops::Range;
use std::sync::Arc;

use aes::cipher::KeyInit;
use ccm::aead::AeadInOut;
use flate2::Crc;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::DemoError;
use crate::block::{BlockRead, BlockWrite};
use crate::disk::layout::DiskLayout;
use crate::guest::fve::cipher::Method;
use crate::guest::fve::keys::{Ccm, password_seed, recovery_seed, stretch};
use crate::guest::fve::layout::{
    BlockHeader, CONVERTING_GUID, DatasetHeader, EntryHeader, GUID_OFFSETS, KeyHeader, MovedHeader,
    PLACES_GUID, Places, ProtectorHeader, SIGNATURE, SealedHeader, StartupKeyHeader, StretchHeader,
    Validation, VolumeHeader, kind, method, role,
};
use crate::guest::fve::metadata::{self, COPY_BYTES, Part};
use crate::guest::fve::protection::Protection;
use crate::guest::fve::volume::Volume;
use crate::guest::ntfs3g::MountOptions;
use crate::guest::spare::Scratch;
use crate::guest::{EmbeddedWriter, GuestPath, GuestRead, GuestWrite, VolumeId, embedded};

/// The size of the moved start of the volume.
pub const MOVED_BYTES: u64 = 8 << 10;
const FOLDER: &str = "System Volume Information";
const MASTER_KEY: [u8; 32] = [0x5a; 32];

/// A protector of the volume.
#[derive(Debug, Clone, Copy)]
pub enum Lock<'a> {
    RecoveryPassword(&'a str),
    Password(&'a str),
    /// The key of [`startup_key_file`].
    StartupKey {
        guid: [u8; 16],
        key: [u8; 32],
    },
    /// The key is stored in clear: BitLocker is suspended, or waits for its activation.
    ClearKey,
    /// A protector that nothing here can open.
    Tpm,
}

#[derive(Debug, Clone)]
pub struct Spec<'a> {
    pub method: Method,
    pub locks: Vec<Lock<'a>>,
    pub vista: bool,
    /// Whether it has the boot sector of BitLocker To Go.
    pub to_go: bool,
    /// Whether encrypt-on-write is active.
    pub encrypts_on_write: bool,
    pub used_space_only: bool,
    /// The present and the next state: 4 and 4 for an encrypted volume.
    pub states: (u16, u16),
    /// The offsets of BitLocker's own ranges.
    pub places: Reserved,
}

/// Offsets in the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved {
    pub copies: [u64; 3],
    pub moved: u64,
}

impl<'a> Spec<'a> {
    pub fn new(method: Method, locks: &[Lock<'a>], places: Reserved) -> Self {
        Self {
            method,
            locks: locks.to_vec(),
            vista: false,
            to_go: false,
            encrypts_on_write: false,
            used_space_only: true,
            states: (4, 4),
            places,
        }
    }

    fn volume_key(&self) -> Zeroizing<Vec<u8>> {
        let bytes = (0..self.method.key_bytes()).map(|i| (i * 37 + 11) as u8);
        Zeroizing::new(bytes.collect())
    }
}

/// Creates the files whose clusters BitLocker then uses.
pub fn reserve(
    disk: Arc<dyn BlockWrite>,
    layout: &DiskLayout,
    volume: VolumeId,
) -> Result<Reserved, DemoError> {
    let path = |i: usize| {
        let name = format!("FVE2.{{e40ad34d-dae9-4bc7-95bd-b16218c10f72}}.{}", i + 1);
        GuestPath::parse(&format!("{FOLDER}/{name}"))
    };
    let sizes = [COPY_BYTES, COPY_BYTES, COPY_BYTES, MOVED_BYTES];
    let mut writer = Box::new(EmbeddedWriter::new(
        disk.clone(),
        layout,
        MountOptions::default(),
    ));
    let folder = GuestPath::parse(FOLDER)?;
    let reader = embedded::open(disk.clone(), layout)?;
    if reader.stat(volume, &folder)?.is_none() {
        writer.create_dir(volume, &folder)?;
    }
    for (i, size) in sizes.into_iter().enumerate() {
        writer.write_file(volume, &path(i)?, &vec![0; size as usize])?;
    }
    writer.close()?;
    let reader = embedded::open(disk, layout)?;
    let known = reader.volumes().iter().find(|v| v.id == volume);
    let start = known
        .ok_or(DemoError::Spec("no such volume"))?
        .partition
        .start_bytes;
    let mut offsets = [0; 4];
    for (i, offset) in offsets.iter_mut().enumerate() {
        let Scratch::Clusters(clusters) = reader.scratch(volume, &path(i)?)? else {
            return Err(DemoError::Spec("a file of BitLocker has no clusters"));
        };
        let [clusters] = &clusters[..] else {
            return Err(DemoError::Spec("a file of BitLocker is in pieces"));
        };
        *offset = clusters.start - start;
    }
    let [copies @ .., moved] = offsets;
    Ok(Reserved { copies, moved })
}

/// Encrypts the plain volume at that offset of a disk to the same offset of another one.
pub fn encrypt(
    plain: &Arc<dyn BlockRead>,
    disk: &dyn BlockWrite,
    start: u64,
    len: u64,
    spec: &Spec,
) -> io::Result<()> {
    write_metadata(plain.as_ref(), disk, start, len, spec)?;
    let part = Part { disk, start, len };
    let metadata = metadata::read(&part).map_err(io::Error::other)?;
    let by = Protection::ClearKey;
    let volume = Volume::new(&metadata, &spec.volume_key(), by, start, len);
    let volume = volume.map_err(io::Error::other)?;

    let mut own: Vec<Range<u64>> = volume
        .reserved()
        .map(|r| r.start - start..r.end - start)
        .collect();
    own.sort_by_key(|r| r.start);
    let free = match spec.used_space_only {
        true => free(plain, start, len)?,
        false => Vec::new(),
    };
    let mut skipped = [own, free].concat();
    skipped.sort_by_key(|r| r.start);
    let mut at = 0;
    skipped.push(len..len);
    for skip in skipped {
        let mut bytes = vec![0; 1 << 20];
        while at < skip.start {
            let n = (skip.start - at).min(bytes.len() as u64) as usize;
            plain.read_at(start + at, &mut bytes[..n])?;
            volume.write(disk, at, &bytes[..n])?;
            at += n as u64;
        }
        at = at.max(skip.end);
    }
    disk.flush()
}

/// Writes the unencrypted parts of a volume with that specification, without its contents.
pub fn write_metadata(
    plain: &dyn BlockRead,
    disk: &dyn BlockWrite,
    start: u64,
    len: u64,
    spec: &Spec,
) -> io::Result<()> {
    let mut boot = vec![0; 512];
    plain.read_at(start, &mut boot)?;
    let cut = || io::Error::other("a structure of BitLocker is cut short");
    let header = VolumeHeader::read(&boot).ok_or_else(cut)?;
    let copy = copy(spec, &header, len).ok_or_else(cut)?;
    for place in spec.places.copies {
        disk.write_at(start + place, &copy)?;
    }
    let boot = boot_sector(spec, &header, &boot).ok_or_else(cut)?;
    disk.write_at(start, &boot)
}

/// The free clusters of NTFS.
fn free(plain: &Arc<dyn BlockRead>, start: u64, len: u64) -> io::Result<Vec<Range<u64>>> {
    let partition = crate::disk::layout::Partition {
        index: 1,
        type_id: "0x07".into(),
        start_bytes: start,
        size_bytes: len,
        guid: None,
        name: None,
        active: false,
    };
    let layout = DiskLayout {
        scheme: crate::disk::layout::Scheme::Mbr,
        sector_size: 512,
        disk_id: None,
        partitions: vec![partition],
    };
    let reader = embedded::open(plain.clone(), &layout).map_err(io::Error::other)?;
    let mut ranges = Vec::new();
    reader
        .free_ranges(VolumeId::new(1), &|_| true, &mut |range| {
            ranges.push(range.start - start..range.end - start);
            Ok(())
        })
        .map_err(io::Error::other)?;
    Ok(ranges)
}

fn boot_sector(spec: &Spec, ntfs: &VolumeHeader, plain: &[u8]) -> Option<Vec<u8>> {
    if spec.vista {
        let mut boot = plain.to_vec();
        let cluster = u64::from(ntfs.sectors_per_cluster) * u64::from(ntfs.bytes_per_sector);
        let header = VolumeHeader {
            signature: SIGNATURE,
            metadata_cluster: spec.places.copies[0] / cluster,
            ..ntfs.clone()
        };
        header.write(&mut boot)?;
        return Some(boot);
    }
    let mut boot = vec![0; 512];
    let header = VolumeHeader {
        jump: [0xeb, 0x58, 0x90],
        signature: if spec.to_go { *b"MSWIN4.1" } else { SIGNATURE },
        bytes_per_sector: ntfs.bytes_per_sector,
        sectors_per_cluster: ntfs.sectors_per_cluster,
        total_sectors: 0,
        metadata_cluster: 0,
    };
    header.write(&mut boot)?;
    let places = Places {
        guid: if spec.encrypts_on_write {
            CONVERTING_GUID
        } else {
            PLACES_GUID
        },
        copies: spec.places.copies,
    };
    places.write(&mut boot[GUID_OFFSETS[usize::from(spec.to_go)]..])?;
    boot[510..].copy_from_slice(&[0x55, 0xaa]);
    Some(boot)
}

/// A copy of the metadata with the data after it.
fn copy(spec: &Spec, ntfs: &VolumeHeader, len: u64) -> Option<Vec<u8>> {
    let entries = dataset(spec)?;
    let size = (DatasetHeader::LEN + entries.len()) as u32;
    let number = spec.method.number();
    let dataset = DatasetHeader {
        size,
        version: 1,
        header_size: DatasetHeader::LEN as u32,
        end: size,
        guid: [0x22; 16],
        next_nonce: 100,
        method: number,
        method_copy: if spec.vista { 0 } else { number },
        created: 133_000_000_000_000_000,
    };
    let whole = (BlockHeader::LEN + size as usize).next_multiple_of(16);
    let sector = u64::from(ntfs.bytes_per_sector);
    let header = BlockHeader {
        signature: SIGNATURE,
        size: if spec.vista { whole } else { whole / 16 } as u16,
        version: if spec.vista { 1 } else { 2 },
        state: spec.states.0,
        next_state: spec.states.1,
        encrypted_bytes: if spec.vista { 0 } else { len },
        conversion_bytes: 0,
        moved_sectors: if spec.vista {
            0
        } else {
            (MOVED_BYTES / sector) as u32
        },
        copies: spec.places.copies,
        moved_to: if spec.vista {
            ntfs.metadata_cluster
        } else {
            spec.places.moved
        },
    };
    let mut bytes = vec![0; whole];
    header.write(&mut bytes)?;
    dataset.write(&mut bytes[BlockHeader::LEN..])?;
    let from = BlockHeader::LEN + DatasetHeader::LEN;
    bytes[from..from + entries.len()].copy_from_slice(&entries);

    let mut crc = Crc::new();
    crc.update(&bytes);
    let digest = key_entry(method::DIGEST, &Sha256::digest(&bytes))?;
    let sealed = sealed(&MASTER_KEY, 99, &digest)?;
    let place = if spec.vista {
        COPY_BYTES / 4
    } else {
        COPY_BYTES
    };
    let validation = Validation {
        size: (place as usize - whole) as u16,
        version: header.version,
        crc32: crc.sum(),
    };
    let mut after = vec![0; Validation::LEN];
    validation.write(&mut after)?;
    after.extend(entry(role::PROPERTY, kind::SEALED, 1, &sealed)?);
    bytes.extend(after);
    bytes.resize(place as usize, 0);
    Some(bytes)
}

fn dataset(spec: &Spec) -> Option<Vec<u8>> {
    let text: Vec<u8> = "TEST C: 1/1/2026\0"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    let mut entries = entry(role::DESCRIPTION, kind::TEXT, 1, &text)?;
    for (i, lock) in spec.locks.iter().enumerate() {
        entries.extend(protector(i as u8 + 1, lock)?);
    }
    let key = key_entry(spec.method.number(), &spec.volume_key())?;
    let key = sealed(&MASTER_KEY, 98, &key)?;
    entries.extend(entry(role::VOLUME_KEY, kind::SEALED, 1, &key)?);
    if !spec.vista {
        let moved = MovedHeader {
            offset: spec.places.moved,
            size: MOVED_BYTES,
        };
        let mut bytes = vec![0; MovedHeader::LEN];
        moved.write(&mut bytes)?;
        entries.extend(entry(role::MOVED_HEADER, kind::MOVED_HEADER, 1, &bytes)?);
    }
    Some(entries)
}

fn protector(count: u8, lock: &Lock) -> Option<Vec<u8>> {
    let mut guid = [count; 16];
    let master = key_entry(method::MASTER_KEY, &MASTER_KEY)?;
    let opened_by = |key: &[u8; 32]| {
        entry(
            role::PROPERTY,
            kind::SEALED,
            1,
            &sealed(key, count, &master)?,
        )
    };
    let stretched = |seed: &[u8; 32]| {
        let header = StretchHeader {
            method: method::STRETCHED[0],
            flags: 0,
            salt: [count; 16],
        };
        let key = stretch(seed, header.salt);
        let mut bytes = vec![0; StretchHeader::LEN];
        header.write(&mut bytes)?;
        let kept = sealed(
            &MASTER_KEY,
            count + 50,
            &key_entry(method::STRETCHED[0], &key[..])?,
        )?;
        bytes.extend(entry(role::PROPERTY, kind::SEALED, 1, &kept)?);
        Some(
            [
                entry(role::PROPERTY, kind::STRETCH, 1, &bytes)?,
                opened_by(&key)?,
            ]
            .concat(),
        )
    };
    let (protection, properties) = match lock {
        Lock::RecoveryPassword(text) => (0x800, stretched(&*recovery_seed(text)?.ok()?)?),
        Lock::Password(text) => (0x2000, stretched(&password_seed(text))?),
        Lock::StartupKey { guid: id, key } => {
            guid = *id;
            (0x200, opened_by(key)?)
        }
        Lock::ClearKey => {
            let open = [0xc3; 32];
            (
                0,
                [key_entry(method::MASTER_KEY, &open)?, opened_by(&open)?].concat(),
            )
        }
        Lock::Tpm => (0x100, entry(role::PROPERTY, 6, 1, &[0x77; 100])?),
    };
    let header = ProtectorHeader {
        guid,
        changed: 133_000_000_000_000_000,
        protection,
    };
    let mut bytes = vec![0; ProtectorHeader::LEN];
    header.write(&mut bytes)?;
    bytes.extend(properties);
    entry(role::PROTECTOR, kind::PROTECTOR, 1, &bytes)
}

fn entry(role: u16, kind: u16, version: u16, data: &[u8]) -> Option<Vec<u8>> {
    let size = u16::try_from(EntryHeader::LEN + data.len()).ok()?;
    let mut bytes = vec![0; EntryHeader::LEN];
    EntryHeader {
        size,
        role,
        kind,
        version,
    }
    .write(&mut bytes)?;
    bytes.extend(data);
    Some(bytes)
}

fn key_entry(method: u16, key: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = vec![0; KeyHeader::LEN];
    KeyHeader { method, flags: 0 }.write(&mut bytes)?;
    bytes.extend(key);
    entry(role::PROPERTY, kind::KEY, 1, &bytes)
}

fn sealed(key: &[u8; 32], count: u8, text: &[u8]) -> Option<Vec<u8>> {
    let nonce = [0, 1, 2, 3, 4, 5, 6, 7, count, 0, 0, 0];
    let mut text = text.to_vec();
    let cipher = Ccm::new_from_slice(key).ok()?;
    let buffer = text.as_mut_slice().into();
    let tag = cipher
        .encrypt_inout_detached(&nonce.into(), b"", buffer)
        .ok()?;
    let mut bytes = vec![0; SealedHeader::LEN];
    SealedHeader {
        nonce,
        tag: tag.into(),
    }
    .write(&mut bytes)?;
    bytes.extend(text);
    Some(bytes)
}

/// The `.BEK` file of a startup key.
pub fn startup_key_file(guid: [u8; 16], key: &[u8; 32]) -> Vec<u8> {
    let made = || {
        let mut data = vec![0; StartupKeyHeader::LEN];
        StartupKeyHeader {
            guid,
            changed: 133_000_000_000_000_000,
        }
        .write(&mut data)?;
        let name: Vec<u8> = "ExternalKey\0"
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect();
        data.extend(entry(role::PROPERTY, kind::TEXT, 1, &name)?);
        data.extend(key_entry(method::STARTUP_KEY, key)?);
        let listed = entry(role::STARTUP_KEY, kind::STARTUP_KEY, 1, &data)?;
        let size = (DatasetHeader::LEN + listed.len()) as u32;
        let header = DatasetHeader {
            size,
            version: 1,
            header_size: DatasetHeader::LEN as u32,
            end: size,
            guid,
            next_nonce: 1,
            method: 0,
            method_copy: 0,
            created: 133_000_000_000_000_000,
        };
        let mut bytes = vec![0; DatasetHeader::LEN];
        header.write(&mut bytes)?;
        bytes.extend(listed);
        Some(bytes)
    };
    made().unwrap_or_default()
}
