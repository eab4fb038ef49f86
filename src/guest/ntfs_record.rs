//! The structures inside an NTFS MFT record and index block, as pure functions over bytes.
//!
//! Layout as in ntfs-3g's `layout.h`. Nothing here reads a disk. Every offset and length comes from
//! the guest and is checked; all loops advance or end.

use super::fs::{le16, le32, le64};

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

/// What is wrong with a structure. A fixed text: the guest has no part in it.
pub type Fault = &'static str;

/// Checks and undoes the multi-sector protection of a `FILE`, `INDX` or `RSTR` record.
pub fn fix_up(record: &mut [u8]) -> Result<(), Fault> {
    let offset = usize::from(le16(record, 4));
    let count = usize::from(le16(record, 6));
    let sectors = record.len() / FIXUP_SECTOR;
    // 512-byte strides whatever the sector size of the volume.
    if count != sectors + 1 || offset % 2 != 0 || offset + count * 2 > FIXUP_SECTOR - 2 {
        return Err("the update sequence array is invalid");
    }
    let usn = le16(record, offset);
    for sector in 0..sectors {
        let end = (sector + 1) * FIXUP_SECTOR - 2;
        if le16(record, end) != usn {
            return Err("a record was only partly written");
        }
        let word = le16(record, offset + 2 + sector * 2).to_le_bytes();
        record[end..end + 2].copy_from_slice(&word);
    }
    Ok(())
}

/// A checked MFT record.
#[derive(Debug, Clone)]
pub struct Record {
    bytes: Vec<u8>,
}

impl Record {
    pub fn parse(mut bytes: Vec<u8>) -> Result<Self, Fault> {
        if !bytes.starts_with(b"FILE") {
            return Err("an MFT record has no FILE signature");
        }
        fix_up(&mut bytes)?;
        let used = le32(&bytes, 24) as usize;
        if used > bytes.len() || usize::from(le16(&bytes, 20)) + 8 > used {
            return Err("the sizes in an MFT record are invalid");
        }
        bytes.truncate(used);
        Ok(Self { bytes })
    }

    pub fn in_use(&self) -> bool {
        le16(&self.bytes, 22) & RECORD_IN_USE != 0
    }

    pub fn is_dir(&self) -> bool {
        le16(&self.bytes, 22) & RECORD_IS_DIRECTORY != 0
    }

    pub fn sequence(&self) -> u16 {
        le16(&self.bytes, 16)
    }

    /// Number of the record this one extends, 0 for a base record.
    pub fn base(&self) -> u64 {
        record_number(le64(&self.bytes, 32))
    }

    pub fn attributes(&self) -> Attributes<'_> {
        Attributes {
            record: &self.bytes,
            at: usize::from(le16(&self.bytes, 20)),
        }
    }

    pub fn find(&self, kind: u32, name: &[u16]) -> Result<Option<Attribute<'_>>, Fault> {
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
    type Item = Result<Attribute<'r>, Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.record.get(self.at..)?;
        if rest.len() < 4 || le32(rest, 0) == AT_END {
            return None;
        }
        let len = le32(rest, 4) as usize;
        let parsed = match rest.get(..len) {
            Some(bytes) if len >= 24 => Attribute::parse(bytes),
            _ => Err("an attribute is longer than its MFT record"),
        };
        // After a fault the position means nothing: end here.
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
        /// Sizes in bytes; they count only where `lowest_vcn` is 0.
        size: u64,
        initialized: u64,
        /// Clusters of a compression unit, as a power of two; 0 where nothing is compressed.
        unit: u8,
        mapping: &'r [u8],
    },
}

impl<'r> Attribute<'r> {
    fn parse(bytes: &'r [u8]) -> Result<Self, Fault> {
        let name_at = usize::from(le16(bytes, 10));
        let name = match usize::from(bytes[9]) * 2 {
            0 => &[],
            n => bytes
                .get(name_at..name_at + n)
                .ok_or("an attribute name lies outside its attribute")?,
        };
        let body = if bytes[8] == 0 {
            let at = usize::from(le16(bytes, 20));
            let value = (le32(bytes, 16) as usize)
                .checked_add(at)
                .and_then(|end| bytes.get(at..end))
                .ok_or("an attribute value lies outside its attribute")?;
            Body::Resident(value)
        } else {
            let mapping = bytes
                .get(usize::from(le16(bytes, 32))..)
                .filter(|_| bytes.len() >= 64)
                .ok_or("a non-resident attribute is too short")?;
            Body::NonResident {
                lowest_vcn: le64(bytes, 16),
                size: le64(bytes, 48),
                initialized: le64(bytes, 56),
                unit: bytes[34],
                mapping,
            }
        };
        Ok(Self {
            kind: le32(bytes, 0),
            flags: le16(bytes, 12),
            instance: le16(bytes, 14),
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
pub struct Run {
    pub vcn: u64,
    pub lcn: Option<u64>,
    pub clusters: u64,
}

impl Run {
    pub fn end(&self) -> u64 {
        self.vcn + self.clusters
    }
}

/// A file may have many runs, but not so many that its map fills the memory.
const MAX_RUNS: usize = 1 << 20;

/// Decodes mapping pairs and appends them to `runs`, which must end where they begin.
/// `clusters` is the size of the volume.
pub fn decode_runs(
    mut pairs: &[u8],
    lowest_vcn: u64,
    clusters: u64,
    runs: &mut Vec<Run>,
) -> Result<(), Fault> {
    let mut vcn = lowest_vcn;
    let mut lcn = 0i64;
    if runs.last().map_or(0, Run::end) != vcn {
        return Err("the run list has a gap");
    }
    while let Some((&head, rest)) = pairs.split_first() {
        if head == 0 {
            break;
        }
        let (count_len, lcn_len) = (usize::from(head & 15), usize::from(head >> 4));
        let (Some(count), Some(delta)) = (
            rest.get(..count_len).and_then(int),
            rest.get(count_len..count_len + lcn_len).and_then(int),
        ) else {
            return Err("the run list is cut off");
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
            _ if full => return Err("the file has too many fragments"),
            _ => runs.push(Run {
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

fn follows(last: &Run, start: Option<u64>) -> bool {
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

/// An entry of an `$ATTRIBUTE_LIST`: where a part of an attribute is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListEntry {
    pub lowest_vcn: u64,
    pub record: u64,
    pub instance: u16,
}

/// The entries of an attribute list for one attribute, by position in it.
pub fn list_entries(mut list: &[u8], kind: u32, name: &[u16]) -> Result<Vec<ListEntry>, Fault> {
    let mut found = Vec::new();
    while list.len() >= 26 {
        let len = usize::from(le16(list, 4));
        let name_at = usize::from(list[7]);
        let (Some(entry), true) = (list.get(..len), len >= 26) else {
            return Err("the attribute list is damaged");
        };
        let entry_name = match usize::from(entry[6]) * 2 {
            0 => &[],
            n => entry
                .get(name_at..name_at + n)
                .ok_or("the attribute list is damaged")?,
        };
        if le32(entry, 0) == kind && utf16_is(entry_name, name) {
            found.push(ListEntry {
                lowest_vcn: le64(entry, 8),
                record: record_number(le64(entry, 16)),
                instance: le16(entry, 24),
            });
        }
        list = &list[len..];
    }
    found.sort_by_key(|entry| entry.lowest_vcn);
    Ok(found)
}

/// The entries of an index node (the part after `$INDEX_ROOT`'s or `INDX`'s own header).
pub fn index_entries(node: &[u8]) -> Result<IndexEntries<'_>, Fault> {
    let first = le32(node, 0) as usize;
    let used = le32(node, 4) as usize;
    let entries = node
        .get(first..used)
        .ok_or("an index node has invalid sizes")?;
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
    type Item = Result<IndexEntry<'n>, Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        const ENDS: Fault = "an index entry is damaged";
        if self.entries.is_empty() {
            return None;
        }
        let all = std::mem::take(&mut self.entries);
        let len = usize::from(le16(all, 8));
        let (Some(entry), true) = (all.get(..len), len >= 16) else {
            return Some(Err(ENDS));
        };
        let flags = le16(entry, 12);
        let subnode = if flags & 1 == 0 {
            None
        } else if len >= 24 {
            Some(le64(entry, len - 8))
        } else {
            return Some(Err(ENDS));
        };
        let last = flags & 2 != 0;
        let key = if last {
            None
        } else {
            let key = entry.get(16..16 + usize::from(le16(entry, 10)));
            match key.and_then(FileName::parse) {
                Some(key) => Some(key),
                None => return Some(Err(ENDS)),
            }
        };
        if !last {
            self.entries = &all[len..];
        }
        Some(Ok(IndexEntry {
            reference: le64(entry, 0),
            key,
            subnode,
        }))
    }
}

/// A `$FILE_NAME` value.
pub struct FileName<'n> {
    value: &'n [u8],
}

impl<'n> FileName<'n> {
    pub fn parse(value: &'n [u8]) -> Option<Self> {
        let len = 66 + usize::from(*value.get(64)?) * 2;
        (value.len() >= len && len > 66).then(|| Self {
            value: &value[..len],
        })
    }

    pub fn units(&self) -> impl Iterator<Item = u16> + 'n {
        self.value[66..]
            .chunks_exact(2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
    }

    pub fn size(&self) -> u64 {
        le64(self.value, 48)
    }

    pub fn attributes(&self) -> u32 {
        le32(self.value, 56)
    }

    pub fn reparse_tag(&self) -> Option<u32> {
        (self.attributes() & FILE_ATTR_REPARSE_POINT != 0).then(|| le32(self.value, 60))
    }

    /// An 8.3 name that stands beside a long one.
    pub fn is_dos(&self) -> bool {
        self.value[65] == 2
    }
}

/// The node inside an `INDX` block, after checking and fixing the block.
pub fn index_block(block: &mut [u8], vcn: u64) -> Result<&[u8], Fault> {
    if !block.starts_with(b"INDX") {
        return Err("an index block has no INDX signature");
    }
    fix_up(block)?;
    if le64(block, 16) != vcn {
        return Err("an index block is not where it should be");
    }
    Ok(&block[24..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_lists() {
        let run = |vcn, lcn, clusters| Run { vcn, lcn, clusters };
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
            Err("the run list has a gap")
        );

        let bad: &[(&[u8], Fault)] = &[
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
            assert_eq!(got, Err(*fault), "{pairs:x?}");
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
        assert!(Record::parse(record.clone()).is_ok());
        record[1022] = 8;
        assert_eq!(
            Record::parse(record).err(),
            Some("a record was only partly written")
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
            if let Ok(record) = Record::parse(record) {
                record.attributes().for_each(drop);
            }
        }
    }
}
