//! Finds the copies of the metadata, checks each, compares them, and parses a valid one.
//!
//! A copy is sound if its CRC-32 matches and it names its own offset. Of three sound copies two
//! must agree, because an interrupted update leaves one behind. The volume's key later verifies the
//! chosen copy (`keys::unlock`). Every length is limited before it is used.

use flate2::Crc;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::cipher::Method;
use super::error::FveError;
use super::layout::{
    BlockHeader, CONVERTING_GUID, DatasetHeader, EntryHeader, GUID_OFFSETS, KeyHeader, MovedHeader,
    PLACES_GUID, Places, ProtectionState, ProtectorHeader, SIGNATURE, SealedHeader, StretchHeader,
    VISTA_JUMP, Validation, VolumeHeader, kind, method, role,
};
use super::protection::Protection;
use crate::block::BlockRead;
use crate::text::hex;

/// The largest size of a copy with the data after it (libbde; bitlk, "total size of the FVE area").
pub const COPY_BYTES: u64 = 64 << 10;
/// The same for Vista, before it is rounded up to clusters (dislocker, dissect).
const VISTA_COPY_BYTES: u64 = 16 << 10;
/// The part that Vista leaves in clear at the start of a volume (libbde, "Virtual sector(s)").
pub const VISTA_CLEAR: u64 = 8 << 10;
/// The most entries; no volume of Windows has more.
const MAX_ENTRIES: usize = 256;

type Result<T> = std::result::Result<T, FveError>;

/// The range of a volume on a disk.
pub struct Part<'a> {
    pub disk: &'a dyn BlockRead,
    pub start: u64,
    pub len: u64,
}

impl Part<'_> {
    /// Reads `len` bytes at `offset`, or the rest of the volume there.
    fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        let room = self.len.min(self.disk.size().saturating_sub(self.start));
        let len = room.saturating_sub(offset).min(len);
        let mut bytes = vec![0; len as usize];
        if len > 0 {
            self.disk.read_at(self.start + offset, &mut bytes)?;
        }
        Ok(bytes)
    }
}

/// Bytes encrypted with AES-256-CCM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    pub header: SealedHeader,
    pub bytes: Vec<u8>,
}

/// One protector of the volume master key.
#[derive(Clone)]
pub struct Protector {
    pub guid: [u8; 16],
    pub protection: Protection,
    pub stretch: Option<StretchHeader>,
    pub clear_key: Option<Zeroizing<[u8; 32]>>,
    pub master_key: Option<Sealed>,
}

/// The storage of the start of the volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// Encrypted at another offset.
    Moved { offset: u64, size: u64 },
    /// In clear at its own offset, with BitLocker's name. The offset of the metadata is in the boot
    /// sector and in its copy at `copy`.
    Vista {
        mirror_cluster: u64,
        metadata_cluster: u64,
        copy: u64,
    },
}

/// The metadata of a volume.
pub struct Metadata {
    pub sector_size: u64,
    pub method: Method,
    pub start: Start,
    /// Length of the volume; the bytes behind it are undefined.
    pub len: u64,
    pub copies: [u64; 3],
    pub copy_bytes: u64,
    pub protectors: Vec<Protector>,
    pub volume_key: Sealed,
    /// SHA-256 of the metadata, and the same sealed with the master key.
    pub digest: [u8; 32],
    pub vouched: Option<Sealed>,
    /// The reason why no key can open the volume in its present state.
    pub converting: Option<String>,
    /// Copies that are not used, with reasons.
    pub unsound: Vec<String>,
}

impl Metadata {
    /// Every kind once, in the order of the metadata.
    pub fn protections(&self) -> Vec<Protection> {
        let mut kinds = Vec::new();
        for protector in &self.protectors {
            if !kinds.contains(&protector.protection) {
                kinds.push(protector.protection);
            }
        }
        kinds
    }
}

/// A copy with a valid CRC-32.
struct Copy {
    offset: u64,
    header: BlockHeader,
    bytes: Vec<u8>,
    vouched: Option<Sealed>,
}

pub fn read(part: &Part) -> Result<Metadata> {
    let first = part.read(0, VolumeHeader::LEN as u64)?;
    let header = VolumeHeader::read(&first)
        .ok_or_else(|| FveError::structure("volume header", 0, "its length", 512, first.len()))?;
    let sector_size = match header.bytes_per_sector {
        // Observed by cryptsetup.
        0 => 512,
        size @ (512 | 4096) => u64::from(size),
        other => {
            let field = "the sector size";
            return Err(FveError::structure(
                "volume header",
                11,
                field,
                "512 or 4096",
                other,
            ));
        }
    };
    let places = GUID_OFFSETS.iter().find_map(|at| {
        let places = Places::read(first.get(*at..)?)?;
        [PLACES_GUID, CONVERTING_GUID]
            .contains(&places.guid)
            .then_some(places)
    });
    let (copies, unsound) = match &places {
        Some(places) => find_copies(part, places.copies)?,
        None if header.jump == VISTA_JUMP && header.signature == SIGNATURE => {
            let cluster = u64::from(header.sectors_per_cluster) * sector_size;
            let place = header.metadata_cluster.saturating_mul(cluster);
            // Only the first copy is located; it names the others.
            let offsets = load(part, place)?.header.copies;
            find_copies(part, [place, offsets[1], offsets[2]])?
        }
        None => {
            let field = "the GUID before the places of the metadata";
            let expected = "one of BitLocker's at 160 or 424";
            return Err(FveError::structure(
                "volume header",
                160,
                field,
                expected,
                "another",
            ));
        }
    };
    let copy = agreed(copies)?;
    let is_converting = places.is_some_and(|p| p.guid == CONVERTING_GUID);
    let mut metadata = decode(part, &header, sector_size, copy)?;
    metadata.unsound = unsound.iter().map(ToString::to_string).collect();
    if is_converting && metadata.converting.is_none() {
        let text = "still encrypting the volume as it is written to (encrypt-on-write)";
        metadata.converting = Some(text.to_string());
    }
    Ok(metadata)
}

/// The sound copies, at least one, and the faults of the others.
fn find_copies(part: &Part, offsets: [u64; 3]) -> Result<(Vec<Copy>, Vec<FveError>)> {
    let (mut sound, mut unsound) = (Vec::new(), Vec::new());
    for (i, offset) in offsets.into_iter().enumerate() {
        let copy = load(part, offset).and_then(|copy| {
            let named = copy.header.copies[i];
            match named == offset {
                true => Ok(copy),
                false => Err(FveError::structure(
                    "metadata copy",
                    offset,
                    "its own place",
                    format!("{offset:#x}"),
                    format!("{named:#x}"),
                )),
            }
        });
        match copy {
            Ok(copy) => sound.push(copy),
            Err(error @ FveError::Io(_)) => return Err(error),
            Err(error) => unsound.push(error),
        }
    }
    match sound.is_empty() {
        true => Err(FveError::NoSoundCopy(unsound)),
        false => Ok((sound, unsound)),
    }
}

fn load(part: &Part, offset: u64) -> Result<Copy> {
    let fault = |field, expected: String, actual: String| {
        FveError::structure("metadata copy", offset, field, expected, actual)
    };
    let room = part.len.saturating_sub(offset);
    if offset < VolumeHeader::LEN as u64 || room < BlockHeader::LEN as u64 {
        let expected = format!("inside the volume of {} bytes", part.len);
        return Err(fault("its place", expected, format!("{offset:#x}")));
    }
    let mut bytes = part.read(offset, COPY_BYTES)?;
    let header = BlockHeader::read(&bytes).ok_or_else(|| {
        fault(
            "its length",
            BlockHeader::LEN.to_string(),
            bytes.len().to_string(),
        )
    })?;
    if header.signature != SIGNATURE {
        return Err(fault(
            "the signature",
            hex(&SIGNATURE),
            hex(&header.signature),
        ));
    }
    let size = match header.version {
        1 => usize::from(header.size),
        2 => usize::from(header.size) * 16,
        other => return Err(fault("the version", "1 or 2".into(), other.to_string())),
    };
    let smallest = BlockHeader::LEN + DatasetHeader::LEN;
    let largest = bytes.len().saturating_sub(Validation::LEN);
    if !(smallest..=largest).contains(&size) {
        let expected = format!("{smallest} to {largest}");
        return Err(fault("the size", expected, size.to_string()));
    }
    let after = bytes.split_off(size);
    let validation = Validation::read(&after)
        .ok_or_else(|| fault("its validation", "8 bytes".into(), after.len().to_string()))?;
    let mut crc = Crc::new();
    crc.update(&bytes);
    if crc.sum() != validation.crc32 {
        let hex = |sum: u32| format!("{sum:#010x}");
        return Err(fault("the CRC-32", hex(validation.crc32), hex(crc.sum())));
    }
    let followed = usize::from(validation.size) > Validation::LEN + EntryHeader::LEN;
    let vouched = followed
        .then(|| entries(&after[Validation::LEN..]).next())
        .flatten();
    Ok(Copy {
        offset,
        header,
        bytes,
        vouched: vouched
            .filter(|e| e.header.kind == kind::SEALED)
            .and_then(|e| sealed(e.data)),
    })
}

/// The copy with which another one agrees, or the only one.
fn agreed(mut copies: Vec<Copy>) -> Result<Copy> {
    let agrees = |a: &Copy| copies.iter().filter(|b| a.bytes == b.bytes).count();
    let counts: Vec<usize> = copies.iter().map(agrees).collect();
    let alone = copies.len() == 1;
    match counts.iter().position(|count| alone || *count > 1) {
        Some(i) => Ok(copies.swap_remove(i)),
        None => {
            let differs = |a: &Copy, b: &Copy| {
                let same = a.bytes.iter().zip(&b.bytes).take_while(|(a, b)| a == b);
                FveError::CopiesDiffer {
                    first: a.offset,
                    other: b.offset,
                    at: same.count() as u64,
                }
            };
            match copies.as_slice() {
                [a, b, ..] => Err(differs(a, b)),
                _ => Err(FveError::NoSoundCopy(Vec::new())),
            }
        }
    }
}

fn decode(part: &Part, volume: &VolumeHeader, sector_size: u64, copy: Copy) -> Result<Metadata> {
    let offset = copy.offset;
    let fault = |field, expected: String, actual: String| {
        FveError::structure("metadata copy", offset, field, expected, actual)
    };
    let cut = || fault("its length", "a dataset".into(), "cut short".into());
    let rest = copy.bytes.get(BlockHeader::LEN..).ok_or_else(cut)?;
    let dataset = DatasetHeader::read(rest).ok_or_else(cut)?;
    let (from, to) = (dataset.header_size as usize, dataset.size as usize);
    let listed = rest
        .get(from..to)
        .filter(|_| from >= DatasetHeader::LEN)
        .ok_or_else(|| {
            let expected = format!("{} to {}", DatasetHeader::LEN, rest.len());
            fault("the dataset's size", expected, format!("{from} to {to}"))
        })?;
    let mut protectors = Vec::new();
    let (mut volume_key, mut moved) = (None, None);
    for entry in entries(listed) {
        match (entry.header.role, entry.header.kind) {
            (role::PROTECTOR, kind::PROTECTOR) => protectors.extend(protector(entry.data)),
            (role::VOLUME_KEY, kind::SEALED) => volume_key = volume_key.or(sealed(entry.data)),
            (role::MOVED_HEADER, kind::MOVED_HEADER) => moved = MovedHeader::read(entry.data),
            _ => {}
        }
    }
    let converting = converting(&copy.header);
    let method = match Method::of(dataset.method) {
        Some(method) => method,
        None if converting.is_some() => Method::XtsAes128,
        None => {
            let expected = "0x8000 to 0x8005".to_string();
            return Err(fault(
                "the cipher",
                expected,
                format!("{:#06x}", dataset.method),
            ));
        }
    };
    let empty = Sealed {
        header: SealedHeader {
            nonce: [0; 12],
            tag: [0; 16],
        },
        bytes: Vec::new(),
    };
    let volume_key = match volume_key {
        Some(key) => key,
        None if converting.is_some() => empty,
        None => return Err(fault("the volume's key", "one".into(), "none".into())),
    };
    let vista = copy.header.version == 1;
    let cluster = u64::from(volume.sectors_per_cluster) * sector_size;
    let copy_bytes = match vista {
        true => VISTA_COPY_BYTES.next_multiple_of(cluster.max(1)),
        false => COPY_BYTES.next_multiple_of(sector_size),
    };
    let start = match vista {
        true => Start::Vista {
            mirror_cluster: copy.header.moved_to,
            metadata_cluster: volume.metadata_cluster,
            copy: volume.total_sectors.saturating_mul(sector_size),
        },
        false => moved_start(&copy.header, moved, sector_size, offset)?,
    };
    let encrypted = Some(copy.header.encrypted_bytes).filter(|n| *n > 0 && !vista);
    Ok(Metadata {
        sector_size,
        method,
        start,
        len: encrypted.unwrap_or(part.len).min(part.len) / sector_size * sector_size,
        copies: copy.header.copies,
        copy_bytes,
        protectors,
        volume_key,
        digest: Sha256::digest(&copy.bytes).into(),
        vouched: copy.vouched,
        converting,
        unsound: Vec::new(),
    })
}

/// The location of the volume's start. Header and entry both have it, and must not contradict each
/// other.
fn moved_start(
    header: &BlockHeader,
    entry: Option<MovedHeader>,
    sector_size: u64,
    offset: u64,
) -> Result<Start> {
    let size = u64::from(header.moved_sectors) * sector_size;
    let by_header = (size > 0).then_some((header.moved_to, size));
    let by_entry = entry.map(|e| (e.offset, e.size));
    let shown = |place: Option<(u64, u64)>| match place {
        Some((offset, size)) => format!("{size} bytes at {offset:#x}"),
        None => "none".to_string(),
    };
    match (by_header, by_entry) {
        (Some(a), Some(b)) if a != b => {
            let field = "the place of the volume's start";
            let (a, b) = (shown(by_header), shown(by_entry));
            Err(FveError::structure("metadata copy", offset, field, a, b))
        }
        (Some((offset, size)), _) | (None, Some((offset, size))) => {
            Ok(Start::Moved { offset, size })
        }
        (None, None) => {
            let field = "the place of the volume's start";
            Err(FveError::structure(
                "metadata copy",
                offset,
                field,
                "one",
                "none",
            ))
        }
    }
}

fn converting(header: &BlockHeader) -> Option<String> {
    let (state, next) = (
        ProtectionState::of(header.state),
        ProtectionState::of(header.next_state),
    );
    let text = match (state, next) {
        (ProtectionState::Encrypted, ProtectionState::Encrypted) => return None,
        (ProtectionState::Decrypted, ProtectionState::Decrypted) => {
            "set up, but the volume is not encrypted".to_string()
        }
        (ProtectionState::Paused, ProtectionState::Decrypted) => {
            "decrypting the volume, and paused".to_string()
        }
        (ProtectionState::Paused, _) => "encrypting the volume, and paused".to_string(),
        (_, ProtectionState::Decrypted) => "decrypting the volume".to_string(),
        (ProtectionState::Converting | ProtectionState::Decrypted, _) => {
            "encrypting the volume".to_string()
        }
        _ => "in an unknown state".to_string(),
    };
    let states = format!("state {} to {}", header.state, header.next_state);
    let done = match header.encrypted_bytes {
        0 => String::new(),
        bytes => format!(", {bytes} bytes are encrypted"),
    };
    Some(format!("{text} ({states}{done})"))
}

pub struct MetadataEntry<'a> {
    pub header: EntryHeader,
    pub data: &'a [u8],
}

/// The entries up to the first invalid one.
pub fn entries(bytes: &[u8]) -> impl Iterator<Item = MetadataEntry<'_>> {
    let mut rest = bytes;
    let next = move || {
        let header = EntryHeader::read(rest)?;
        let data = rest.get(EntryHeader::LEN..usize::from(header.size))?;
        rest = rest.get(usize::from(header.size)..)?;
        Some(MetadataEntry { header, data })
    };
    std::iter::from_fn(next).take(MAX_ENTRIES)
}

pub fn sealed(data: &[u8]) -> Option<Sealed> {
    Some(Sealed {
        header: SealedHeader::read(data)?,
        bytes: data.get(SealedHeader::LEN..)?.to_vec(),
    })
}

/// A key in clear: its purpose and its bytes.
pub fn key(data: &[u8]) -> Option<(u16, &[u8])> {
    let header = KeyHeader::read(data)?;
    Some((header.method, data.get(KeyHeader::LEN..)?))
}

fn protector(data: &[u8]) -> Option<Protector> {
    let header = ProtectorHeader::read(data)?;
    let mut protector = Protector {
        guid: header.guid,
        protection: Protection::of(header.protection),
        stretch: None,
        clear_key: None,
        master_key: None,
    };
    for property in entries(data.get(ProtectorHeader::LEN..)?) {
        let data = property.data;
        match property.header.kind {
            kind::STRETCH => protector.stretch = protector.stretch.or(StretchHeader::read(data)),
            kind::SEALED => protector.master_key = protector.master_key.or(sealed(data)),
            kind::KEY => {
                let bytes = key(data).and_then(|(_, bytes)| bytes.first_chunk::<32>());
                protector.clear_key = bytes.map(|bytes| Zeroizing::new(*bytes));
            }
            _ => {}
        }
    }
    Some(protector)
}

/// Whether this kind of stretching is supported.
pub fn stretches(header: &StretchHeader) -> bool {
    method::STRETCHED.contains(&header.method) && header.flags & method::PBKDF2 == 0
}
