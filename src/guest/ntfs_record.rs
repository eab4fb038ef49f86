//! The structures inside an NTFS MFT record and index block, as pure functions over bytes.
//!
//! The layouts are in [`super::ntfs_layout`]. No code here reads a disk. Every offset and length is
//! from the guest and is checked; all loops advance or end.

use std::fmt;

use super::fs::{le16, le32, le64};
use super::ntfs_layout::{
    AttributeHeader, FileNameHeader, FileRecord, IndexBlock, IndexEntryHeader, IndexNode,
    ListEntryHeader, NonResident, Protected, Resident, RunHeader,
};

pub const AT_ATTRIBUTE_LIST: u32 = 0x20;
pub const AT_FILE_NAME: u32 = 0x30;
pub const AT_VOLUME_NAME: u32 = 0x60;
pub const AT_VOLUME_INFORMATION: u32 = 0x70;
pub const AT_DATA: u32 = 0x80;
pub const AT_INDEX_ROOT: u32 = 0x90;
pub const AT_INDEX_ALLOCATION: u32 = 0xa0;
pub const AT_BITMAP: u32 = 0xb0;
pub const AT_REPARSE_POINT: u32 = 0xc0;
const AT_END: u32 = 0xffff_ffff;

pub const COMPRESSED: u16 = 0x00ff;
pub const ENCRYPTED: u16 = 0x4000;

pub const FILE_ATTR_REPARSE_POINT: u32 = 0x400;
pub const FILE_ATTR_COMPRESSED: u32 = 0x800;
pub const FILE_ATTR_ENCRYPTED: u32 = 0x4000;
/// Only in `$FILE_NAME`: the file has a directory index.
pub const FILE_ATTR_DIRECTORY: u32 = 0x1000_0000;

const RECORD_IN_USE: u16 = 0x0001;
const RECORD_IS_DIRECTORY: u16 = 0x0002;
const FIXUP_SECTOR: usize = 512;

/// A fault in a structure. Texts are fixed and values are numbers: no text is from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordFault {
    pub what: &'static str,
    field: Option<Found>,
}

/// A field with an invalid value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Found {
    structure: &'static str,
    offset: usize,
    expected: u64,
    actual: u64,
}

impl RecordFault {
    /// Creates a fault in a field of this structure, which must be `expected`, or up to it.
    fn field(
        what: &'static str,
        (structure, offset): (&'static str, usize),
        expected: impl TryInto<u64>,
        actual: impl TryInto<u64>,
    ) -> Self {
        Self {
            what,
            field: Some(Found {
                structure,
                offset,
                expected: expected.try_into().unwrap_or(u64::MAX),
                actual: actual.try_into().unwrap_or(u64::MAX),
            }),
        }
    }
}

impl From<&'static str> for RecordFault {
    fn from(what: &'static str) -> Self {
        Self { what, field: None }
    }
}

impl fmt::Display for RecordFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)?;
        let Some(found) = self.field else {
            return Ok(());
        };
        let Found {
            structure,
            offset,
            expected,
            actual,
        } = found;
        write!(
            f,
            " ({structure}, byte {offset}: {actual:#x}, expected {expected:#x})"
        )
    }
}

/// Checks and removes the multi-sector protection of a `FILE`, `INDX` or `RSTR` record.
pub fn fix_up(record: &mut [u8]) -> Result<(), RecordFault> {
    let head = Protected::read(record).ok_or("a record is too short")?;
    let (offset, count) = (usize::from(head.array), usize::from(head.array_len));
    let sectors = record.len() / FIXUP_SECTOR;
    // In steps of 512 bytes, whatever the sector size of the volume.
    if count != sectors + 1 || offset % 2 != 0 || offset + count * 2 > FIXUP_SECTOR - 2 {
        let what = "the update sequence array is invalid";
        return Err(RecordFault::field(what, ("record", 6), sectors + 1, count));
    }
    let usn = le16(record, offset);
    for sector in 0..sectors {
        let end = (sector + 1) * FIXUP_SECTOR - 2;
        let found = le16(record, end);
        if found != usn {
            let what = "a record was only partly written";
            return Err(RecordFault::field(what, ("record", end), usn, found));
        }
        let word = le16(record, offset + 2 + sector * 2).to_le_bytes();
        record[end..end + 2].copy_from_slice(&word);
    }
    Ok(())
}

/// A checked MFT record.
#[derive(Debug, Clone)]
pub struct MftRecord {
    head: FileRecord,
    bytes: Vec<u8>,
}

impl MftRecord {
    pub fn parse(mut bytes: Vec<u8>) -> Result<Self, RecordFault> {
        if !bytes.starts_with(b"FILE") {
            let (expected, actual) = (le32(b"FILE", 0), le32(&bytes, 0));
            let what = "an MFT record has no FILE signature";
            return Err(RecordFault::field(
                what,
                ("MFT record", 0),
                expected,
                actual,
            ));
        }
        fix_up(&mut bytes)?;
        let invalid = "the sizes in an MFT record are invalid";
        let head = FileRecord::read(&bytes).ok_or(invalid)?;
        let used = head.used as usize;
        if used > bytes.len() {
            return Err(RecordFault::field(
                invalid,
                ("MFT record", 24),
                bytes.len(),
                used,
            ));
        }
        let first = usize::from(head.attributes);
        if first + 8 > used {
            let most = used.saturating_sub(8);
            return Err(RecordFault::field(invalid, ("MFT record", 20), most, first));
        }
        bytes.truncate(used);
        Ok(Self { head, bytes })
    }

    pub fn in_use(&self) -> bool {
        self.head.flags & RECORD_IN_USE != 0
    }

    pub fn is_dir(&self) -> bool {
        self.head.flags & RECORD_IS_DIRECTORY != 0
    }

    pub fn sequence(&self) -> u16 {
        self.head.sequence
    }

    /// Number of the record that this one extends, 0 for a base record.
    pub fn base(&self) -> u64 {
        record_number(self.head.base)
    }

    pub fn attributes(&self) -> Attributes<'_> {
        Attributes {
            record: &self.bytes,
            at: usize::from(self.head.attributes),
        }
    }

    pub fn find(&self, kind: u32, name: &[u16]) -> Result<Option<Attribute<'_>>, RecordFault> {
        for attribute in self.attributes() {
            let attribute = attribute?;
            if attribute.kind == kind && attribute.name_is(name) {
                return Ok(Some(attribute));
            }
        }
        Ok(None)
    }
}

/// The record number of a file reference, without its sequence number.
pub fn record_number(reference: u64) -> u64 {
    reference & 0xffff_ffff_ffff
}

pub struct Attributes<'r> {
    record: &'r [u8],
    at: usize,
}

impl<'r> Iterator for Attributes<'r> {
    type Item = Result<Attribute<'r>, RecordFault>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.record.get(self.at..)?;
        if rest.len() < 4 || le32(rest, 0) == AT_END {
            return None;
        }
        let len = le32(rest, 4) as usize;
        let parsed = match rest.get(..len) {
            Some(bytes) if len >= Resident::LEN => Attribute::parse(bytes),
            _ => {
                let what = "an attribute is longer than its MFT record";
                Err(RecordFault::field(what, ("attribute", 4), rest.len(), len))
            }
        };
        // After a fault the position is undefined: end here.
        self.at = match parsed {
            Ok(_) => self.at + len,
            Err(_) => self.record.len(),
        };
        Some(parsed)
    }
}

/// One attribute of one record; a large attribute may continue in other records.
#[derive(Debug, Clone)]
pub struct Attribute<'r> {
    pub kind: u32,
    pub flags: u16,
    pub instance: u16,
    name: &'r [u8],
    pub body: Body<'r>,
}

#[derive(Debug, Clone, Copy)]
pub enum Body<'r> {
    Resident(&'r [u8]),
    NonResident {
        lowest_vcn: u64,
        /// Sizes in bytes; valid only if `lowest_vcn` is 0.
        size: u64,
        initialized: u64,
        /// Clusters of a compression unit, as a power of two; 0 if nothing is compressed.
        unit: u8,
        mapping: &'r [u8],
    },
}

impl<'r> Attribute<'r> {
    fn parse(bytes: &'r [u8]) -> Result<Self, RecordFault> {
        let too_short = "an attribute is too short";
        let head = AttributeHeader::read(bytes).ok_or(too_short)?;
        let name_at = usize::from(head.name);
        let name = match usize::from(head.name_len) * 2 {
            0 => &[],
            n => bytes.get(name_at..name_at + n).ok_or_else(|| {
                let what = "an attribute name lies outside its attribute";
                RecordFault::field(what, ("attribute", 10), bytes.len(), name_at + n)
            })?,
        };
        let body = if head.non_resident == 0 {
            let head = Resident::read(bytes).ok_or(too_short)?;
            let at = usize::from(head.value);
            let end = at.saturating_add(head.len as usize);
            Body::Resident(bytes.get(at..end).ok_or_else(|| {
                let what = "an attribute value lies outside its attribute";
                RecordFault::field(what, ("attribute", 16), bytes.len(), end)
            })?)
        } else {
            let what = "a non-resident attribute is too short";
            let head = NonResident::read(bytes).ok_or_else(|| {
                RecordFault::field(what, ("attribute", 4), NonResident::LEN, bytes.len())
            })?;
            let at = usize::from(head.mapping);
            let mapping = bytes.get(at..);
            Body::NonResident {
                lowest_vcn: head.lowest_vcn,
                size: head.size,
                initialized: head.initialized,
                unit: head.unit,
                mapping: mapping
                    .ok_or_else(|| RecordFault::field(what, ("attribute", 32), bytes.len(), at))?,
            }
        };
        Ok(Self {
            kind: head.kind,
            flags: head.flags,
            instance: head.instance,
            name,
            body,
        })
    }

    pub fn name_is(&self, name: &[u16]) -> bool {
        utf16_is(self.name, name)
    }

    pub fn resident(&self) -> Option<&'r [u8]> {
        match self.body {
            Body::Resident(value) => Some(value),
            Body::NonResident { .. } => None,
        }
    }
}

fn utf16_is(bytes: &[u8], name: &[u16]) -> bool {
    bytes.len() == name.len() * 2
        && bytes
            .chunks_exact(2)
            .zip(name)
            .all(|(b, unit)| b == unit.to_le_bytes())
}

/// A run of clusters of a file; `lcn` is `None` for a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterRun {
    pub vcn: u64,
    pub lcn: Option<u64>,
    pub clusters: u64,
}

impl ClusterRun {
    pub fn end(&self) -> u64 {
        self.vcn + self.clusters
    }
}

/// The most runs of a file, so that its map cannot fill the memory.
const MAX_RUNS: usize = 1 << 20;

/// Decodes mapping pairs and appends them to `runs`, which must end where they begin. `clusters` is
/// the size of the volume.
pub fn decode_runs(
    mut pairs: &[u8],
    lowest_vcn: u64,
    clusters: u64,
    runs: &mut Vec<ClusterRun>,
) -> Result<(), RecordFault> {
    let mut vcn = lowest_vcn;
    let mut lcn = 0i64;
    if runs.last().map_or(0, ClusterRun::end) != vcn {
        return Err("the run list has a gap".into());
    }
    while let Some((count_len, lcn_len)) = RunHeader::read(pairs).and_then(|h| h.lengths()) {
        let rest = &pairs[RunHeader::LEN..];
        let (Some(count), Some(delta)) = (
            rest.get(..count_len).and_then(int),
            rest.get(count_len..count_len + lcn_len).and_then(int),
        ) else {
            return Err("the run list is cut off".into());
        };
        let count = u64::try_from(count)
            .ok()
            .filter(|count| *count > 0)
            .ok_or("a run has an invalid length")?;
        let start = if lcn_len == 0 {
            None
        } else {
            lcn = lcn
                .checked_add(delta)
                .ok_or("a run lies outside the volume")?;
            let start = u64::try_from(lcn).map_err(|_| "a run lies outside the volume")?;
            start
                .checked_add(count)
                .filter(|end| *end <= clusters)
                .ok_or("a run lies outside the volume")?;
            Some(start)
        };
        let end = vcn
            .checked_add(count)
            .filter(|end| *end < 1 << 55)
            .ok_or("a run has an invalid length")?;
        let full = runs.len() >= MAX_RUNS;
        match runs.last_mut() {
            Some(last) if follows(last, start) => last.clusters += count,
            _ if full => return Err("the file has too many fragments".into()),
            _ => runs.push(ClusterRun {
                vcn,
                lcn: start,
                clusters: count,
            }),
        }
        vcn = end;
        pairs = &rest[count_len + lcn_len..];
    }
    Ok(())
}

fn follows(last: &ClusterRun, start: Option<u64>) -> bool {
    match (last.lcn, start) {
        (Some(lcn), Some(start)) => lcn + last.clusters == start,
        (None, None) => true,
        _ => false,
    }
}

/// A little-endian signed integer of 0 to 8 bytes.
fn int(bytes: &[u8]) -> Option<i64> {
    if bytes.len() > 8 {
        return None;
    }
    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    Some(i64::from_le_bytes(wide))
}

/// An entry of an `$ATTRIBUTE_LIST`, which locates a part of an attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListEntry {
    pub lowest_vcn: u64,
    pub record: u64,
    pub instance: u16,
}

/// The entries of an attribute list for one attribute, in order of position.
pub fn list_entries(
    mut list: &[u8],
    kind: u32,
    name: &[u16],
) -> Result<Vec<ListEntry>, RecordFault> {
    let mut found = Vec::new();
    let damaged = "the attribute list is damaged";
    while let Some(head) = ListEntryHeader::read(list) {
        let (len, name_at) = (usize::from(head.len), usize::from(head.name));
        let (Some(entry), true) = (list.get(..len), len >= ListEntryHeader::LEN) else {
            let at = ("attribute list entry", 4);
            return Err(RecordFault::field(damaged, at, list.len(), len));
        };
        let entry_name = match usize::from(head.name_len) * 2 {
            0 => &[],
            n => entry.get(name_at..name_at + n).ok_or_else(|| {
                let at = ("attribute list entry", 7);
                RecordFault::field(damaged, at, len, name_at + n)
            })?,
        };
        if head.kind == kind && utf16_is(entry_name, name) {
            found.push(ListEntry {
                lowest_vcn: head.lowest_vcn,
                record: record_number(head.record),
                instance: head.instance,
            });
        }
        list = &list[len..];
    }
    found.sort_by_key(|entry| entry.lowest_vcn);
    Ok(found)
}

/// The entries of an index node (the part after `$INDEX_ROOT`'s or `INDX`'s own header).
pub fn index_entries(node: &[u8]) -> Result<IndexEntries<'_>, RecordFault> {
    let what = "an index node has invalid sizes";
    let head = IndexNode::read(node).ok_or(what)?;
    let entries = node
        .get(head.first as usize..head.end as usize)
        .ok_or_else(|| RecordFault::field(what, ("index node", 4), node.len(), head.end))?;
    Ok(IndexEntries { entries })
}

pub struct IndexEntries<'n> {
    entries: &'n [u8],
}

/// One directory entry. The last one of a node has no key.
pub struct IndexEntry<'n> {
    pub reference: u64,
    pub key: Option<FileName<'n>>,
    pub subnode: Option<u64>,
}

impl<'n> Iterator for IndexEntries<'n> {
    type Item = Result<IndexEntry<'n>, RecordFault>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.entries.is_empty() {
            return None;
        }
        let all = std::mem::take(&mut self.entries);
        Some(IndexEntry::parse(all).map(|(entry, rest)| {
            self.entries = rest;
            entry
        }))
    }
}

impl<'n> IndexEntry<'n> {
    /// Parses the entry at the start of `all`, and returns the rest.
    fn parse(all: &'n [u8]) -> Result<(Self, &'n [u8]), RecordFault> {
        let damaged = "an index entry is damaged";
        let fault = |offset, expected: usize, actual: usize| {
            RecordFault::field(damaged, ("index entry", offset), expected, actual)
        };
        let head = IndexEntryHeader::read(all).ok_or_else(|| fault(0, 16, all.len()))?;
        let len = usize::from(head.len);
        let (Some(entry), true) = (all.get(..len), len >= IndexEntryHeader::LEN) else {
            return Err(fault(8, all.len(), len));
        };
        let subnode = match head.flags & 1 {
            0 => None,
            _ if len >= IndexEntryHeader::LEN + 8 => Some(le64(entry, len - 8)),
            _ => return Err(fault(8, IndexEntryHeader::LEN + 8, len)),
        };
        let last = head.flags & 2 != 0;
        let key = if last {
            None
        } else {
            let key_len = usize::from(head.key_len);
            let key = entry.get(IndexEntryHeader::LEN..IndexEntryHeader::LEN + key_len);
            let key = key.and_then(FileName::parse);
            Some(key.ok_or_else(|| fault(10, len - IndexEntryHeader::LEN, key_len))?)
        };
        let rest = if last { &[] } else { &all[len..] };
        let entry = Self {
            reference: head.reference,
            key,
            subnode,
        };
        Ok((entry, rest))
    }
}

/// A `$FILE_NAME` value.
pub struct FileName<'n> {
    head: FileNameHeader,
    name: &'n [u8],
}

impl<'n> FileName<'n> {
    pub fn parse(value: &'n [u8]) -> Option<Self> {
        let head = FileNameHeader::read(value)?;
        let name = &value[FileNameHeader::LEN..];
        let name = name.get(..usize::from(head.name_len) * 2)?;
        (!name.is_empty()).then_some(Self { head, name })
    }

    pub fn units(&self) -> impl Iterator<Item = u16> + 'n {
        self.name
            .chunks_exact(2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
    }

    pub fn size(&self) -> u64 {
        self.head.size
    }

    pub fn attributes(&self) -> u32 {
        self.head.attributes
    }

    pub fn reparse_tag(&self) -> Option<u32> {
        (self.attributes() & FILE_ATTR_REPARSE_POINT != 0).then_some(self.head.reparse_tag)
    }

    /// Whether this is an 8.3 name beside a long one.
    pub fn is_dos(&self) -> bool {
        self.head.namespace == 2
    }
}

/// The node inside an `INDX` block, after checking and restoring the block.
pub fn index_block(block: &mut [u8], vcn: u64) -> Result<&[u8], RecordFault> {
    if !block.starts_with(b"INDX") {
        let (expected, actual) = (le32(b"INDX", 0), le32(block, 0));
        let what = "an index block has no INDX signature";
        return Err(RecordFault::field(
            what,
            ("index block", 0),
            expected,
            actual,
        ));
    }
    fix_up(block)?;
    let own = IndexBlock::read(block)
        .ok_or("an index block is too short")?
        .vcn;
    if own != vcn {
        let what = "an index block is not where it should be";
        return Err(RecordFault::field(what, ("index block", 16), vcn, own));
    }
    Ok(&block[IndexBlock::LEN..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_lists() {
        let run = |vcn, lcn, clusters| ClusterRun { vcn, lcn, clusters };
        // Two runs with a backward step, a hole between, then contiguous ones that merge.
        let mut runs = Vec::new();
        let pairs = [
            0x21, 0x18, 0x34, 0x56, 0x01, 0x10, 0x11, 0x08, 0xf0, 0x11, 0x02, 0x08, 0x00, 0xff,
        ];
        decode_runs(&pairs, 0, 1 << 20, &mut runs).unwrap();
        let second = 0x5634 - 0x10;
        assert_eq!(
            runs,
            [
                run(0, Some(0x5634), 0x18),
                run(0x18, None, 0x10),
                run(0x28, Some(second), 0x0a),
            ]
        );
        assert_eq!(
            decode_runs(&[0x11, 1, 1], 0x99, 1 << 20, &mut runs),
            Err("the run list has a gap".into())
        );

        let bad: &[(&[u8], &'static str)] = &[
            (&[0x11, 1], "the run list is cut off"),
            (&[0xff, 1, 1], "the run list is cut off"),
            (&[0x01, 0], "a run has an invalid length"),
            (&[0x01, 0x80], "a run has an invalid length"),
            (&[0x10, 1], "a run has an invalid length"),
            (&[0x11, 1, 0x80], "a run lies outside the volume"),
            (&[0x11, 2, 0x63], "a run lies outside the volume"),
            (
                &[0x08, 255, 255, 255, 255, 255, 255, 255, 127],
                "a run has an invalid length",
            ),
        ];
        for (pairs, fault) in bad {
            let got = decode_runs(pairs, 0, 100, &mut Vec::new());
            assert_eq!(got, Err((*fault).into()), "{pairs:x?}");
        }
    }

    #[test]
    fn torn_record_is_noticed() {
        let mut record = vec![0u8; 1024];
        record[..4].copy_from_slice(b"FILE");
        for (at, word) in [(4, 48u16), (6, 3), (20, 56), (24, 128), (48, 9), (50, 1)] {
            record[at..at + 2].copy_from_slice(&word.to_le_bytes());
        }
        record[56..60].copy_from_slice(&AT_END.to_le_bytes());
        record[510] = 9;
        record[1022] = 9;
        assert!(MftRecord::parse(record.clone()).is_ok());
        record[1022] = 8;
        assert_eq!(
            MftRecord::parse(record.clone()).unwrap_err().to_string(),
            "a record was only partly written (record, byte 1022: 0x8, expected 0x9)"
        );
        record[1022] = 9;
        record[24..28].copy_from_slice(&2048u32.to_le_bytes());
        assert_eq!(
            MftRecord::parse(record).unwrap_err().to_string(),
            "the sizes in an MFT record are invalid (MFT record, byte 24: 0x800, expected 0x400)"
        );
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400),
        ) {
            let _ = decode_runs(&bytes, 0, 1 << 30, &mut Vec::new());
            let _ = list_entries(&bytes, AT_DATA, &[]);
            if let Ok(entries) = index_entries(&bytes) {
                entries.for_each(drop);
            }
            let _ = FileName::parse(&bytes).map(|n| n.units().count());
            let mut record = vec![0u8; 1024];
            record[..4].copy_from_slice(b"FILE");
            for (at, word) in [(4, 48u16), (6, 3), (20, 56), (24, 1000)] {
                record[at..at + 2].copy_from_slice(&word.to_le_bytes());
            }
            record[56..56 + bytes.len()].copy_from_slice(&bytes);
            if let Ok(record) = MftRecord::parse(record) {
                record.attributes().for_each(drop);
            }
        }
    }
}
