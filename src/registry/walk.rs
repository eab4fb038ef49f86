//! Checks a whole hive: every bin, every cell and everything that the root key reaches.
//!
//! Specification: msuhanov/regf. The sequence numbers and the checksum are not checked (see
//! [`super::base`]), and cells that no key reaches count as free space. A conversion walks large
//! hives twice, so code that runs for each cell is inlined: the release is optimised for size. The
//! bins end at the bins size of the base block, because real files have a tail beyond it. Volatile
//! subkey fields have values from memory. Security cells are shared and form a ring. Big data
//! exists from format 1.4 on only.

use std::collections::HashMap;
use std::hint::black_box;

use super::base::{BaseBlock, FileType};
use super::cell::{BASE_BLOCK_SIZE, BIN_HEADER, Cell, INLINE, MAX_DEPTH, NONE, PAGE, SEGMENT};
use super::layout::{db, list, nk, sk, vk};

pub use super::cell::CellFault;

/// Counts from a sound hive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    pub keys: u32,
    pub values: u32,
    pub security_descriptors: u32,
    pub bins: u32,
    /// Bytes of the cells that the root key reaches.
    pub bytes: u64,
}

/// Checks the whole hive. Time and memory are limited by its size, whatever its contents.
pub fn walk(bytes: &[u8]) -> Result<Stats, CellFault> {
    let base = BaseBlock::parse(bytes).map_err(|e| base_block(0, "a hive", e))?;
    if base.file_type != FileType::Primary {
        let found = format!("a log ({:?})", base.file_type);
        return Err(base_block(28, "a hive", found));
    }
    if base.major != 1 || !(3..=6).contains(&base.minor) {
        let found = format!("format {}.{}", base.major, base.minor);
        return Err(base_block(20, "format 1.3 to 1.6", found));
    }
    let size = base.bins_size as usize;
    if size == 0 || !size.is_multiple_of(PAGE) {
        return Err(base_block(40, PAGES, format!("hive bins size {size}")));
    }
    let bins = bytes
        .get(BASE_BLOCK_SIZE..)
        .and_then(|rest| rest.get(..size))
        .ok_or_else(|| {
            let there = bytes.len().saturating_sub(BASE_BLOCK_SIZE);
            base_block(40, format!("{size} bytes of bins"), format!("only {there}"))
        })?;
    let mut walker = Walker::new(bins, base.minor);
    walker.scan_bins()?;
    walker.visit_keys(base.root_cell)?;
    walker.check_security_counts()?;
    Ok(walker.stats)
}

/// The size field before a cell's data.
const CELL_SIZE: usize = 4;
/// The requirement for the size of a bin, and for that of all bins.
const PAGES: &str = "pages of 4096 bytes within the hive";

fn base_block(offset: u64, expected: impl ToString, actual: impl ToString) -> CellFault {
    CellFault::in_file(offset, "base block", expected, actual)
}

/// Two bits for every possible start of a cell: an allocated cell starts there, and something
/// refers to it. They are stored side by side because both are read together.
struct Marks(Vec<u64>);

impl Marks {
    fn new(bins_size: usize) -> Self {
        Self(vec![0; bins_size.div_ceil(8 * 32)])
    }

    #[inline(always)]
    fn place(offset: u32) -> (usize, u32) {
        let n = offset / 8;
        ((n / 32) as usize, n % 32 * 2)
    }

    #[inline(always)]
    fn set_allocated(&mut self, offset: u32) {
        let (word, bit) = Self::place(offset);
        if let Some(word) = self.0.get_mut(word) {
            *word |= 1 << bit;
        }
    }

    #[inline(always)]
    fn is_allocated(&self, offset: u32) -> bool {
        let (word, bit) = Self::place(offset);
        match self.0.get(word) {
            Some(word) => offset.is_multiple_of(8) && word >> bit & 1 == 1,
            None => false,
        }
    }

    /// Marks a cell as referred to. Returns whether nothing referred to it before.
    #[inline(always)]
    fn visit(&mut self, offset: u32) -> bool {
        let (word, bit) = Self::place(offset);
        match self.0.get_mut(word) {
            Some(word) => {
                let old = *word;
                *word |= 2 << bit;
                old != *word
            }
            None => false,
        }
    }
}

struct PendingKey {
    cell: u32,
    parent: u32,
    depth: usize,
    hash: Option<u32>,
}

/// [`super::name::name_hash`] without decoding the name.
#[inline(always)]
fn ascii_hash(name: &[u8]) -> u32 {
    let mut hash = 0u32;
    for byte in name {
        hash = hash.wrapping_mul(37);
        hash = hash.wrapping_add(u32::from(byte.to_ascii_uppercase()));
    }
    hash
}

/// Whether a name sorts after another one, ignoring case.
#[inline(always)]
fn is_after(name: &[u8], previous: &[u8]) -> bool {
    let both = name.len().min(previous.len());
    for i in 0..both {
        let (new, old) = (
            name[i].to_ascii_uppercase(),
            previous[i].to_ascii_uppercase(),
        );
        if new != old {
            return new > old;
        }
    }
    name.len() > previous.len()
}

struct Walker<'b> {
    bins: &'b [u8],
    minor: u32,
    marks: Marks,
    /// The number of keys that refer to each security cell.
    security: HashMap<u32, u32>,
    stats: Stats,
}

impl<'b> Walker<'b> {
    fn new(bins: &'b [u8], minor: u32) -> Self {
        Self {
            bins,
            minor,
            marks: Marks::new(bins.len()),
            security: HashMap::new(),
            stats: Stats::default(),
        }
    }

    #[inline(always)]
    fn raw_u32(&self, at: usize) -> Option<u32> {
        let b = self.bins.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    /// Checks that the bins follow one another to the end, and the cells in each bin too.
    fn scan_bins(&mut self) -> Result<(), CellFault> {
        let mut bin = 0usize;
        while bin < self.bins.len() {
            if self.bins.get(bin..bin + 4) != Some(b"hbin") {
                let found = self.bins.get(bin..bin + 4).unwrap_or_default();
                let found = format!("{}: the bin chain breaks", found.escape_ascii());
                return Err(CellFault::in_bins(bin as u64, "hive bin", "hbin", found));
            }
            let own_offset = self.raw_u32(bin + 4).unwrap_or(NONE) as usize;
            if own_offset != bin {
                let (own, found) = (format!("its own place {bin}"), own_offset);
                return Err(CellFault::in_bins(bin as u64, "hive bin", own, found));
            }
            let size = self.raw_u32(bin + 8).unwrap_or(0) as usize;
            let end = bin.saturating_add(size);
            if size == 0 || !size.is_multiple_of(PAGE) || end > self.bins.len() {
                let found = format!("bin size {size}");
                return Err(CellFault::in_bins(bin as u64, "hive bin", PAGES, found));
            }
            let mut cell = bin + BIN_HEADER;
            while cell < end {
                let raw = self.raw_u32(cell).unwrap_or(0).cast_signed();
                let size = raw.unsigned_abs() as usize;
                if size < 8 || !size.is_multiple_of(8) || size > end - cell {
                    let expected = format!("a multiple of 8, {} at most", end - cell);
                    let found = format!("cell size {raw}");
                    return Err(CellFault::in_bins(cell as u64, "cell", expected, found));
                }
                if raw < 0 {
                    self.marks.set_allocated(cell as u32);
                }
                cell += size;
            }
            self.stats.bins += 1;
            bin = end;
        }
        Ok(())
    }

    /// Reads a field of a cell that is used soon. Memory is slow: a walk that reads its cells one
    /// by one waits most of the time. So it reads several before it uses the first.
    #[inline(always)]
    fn ahead(&self, cell: u32, field: usize) -> u32 {
        let at = (cell as usize).saturating_add(CELL_SIZE + field);
        black_box(self.raw_u32(at).unwrap_or(NONE))
    }

    #[inline(always)]
    fn peek(&self, offset: u32, from: u32) -> Result<Cell<'b>, CellFault> {
        if !self.marks.is_allocated(offset) {
            let found = format!("{offset:#x}, where no allocated cell starts");
            return Err(CellFault::in_bins(from, "reference", "a cell", found));
        }
        let at = offset as usize;
        // Checked by scan_bins, as the mark shows.
        let size = self.raw_u32(at).unwrap_or(0).cast_signed().unsigned_abs() as usize;
        match self.bins.get(at + 4..at.saturating_add(size)) {
            Some(data) => Ok(Cell { offset, data }),
            None => {
                let expected = format!("{} bytes of bins at most", self.bins.len());
                let found = at.saturating_add(size);
                Err(CellFault::in_bins(offset, "cell", expected, found))
            }
        }
    }

    /// Takes a cell that may have only one reference; this also rules out cycles.
    fn take(&mut self, offset: u32, from: u32) -> Result<Cell<'b>, CellFault> {
        let cell = self.peek(offset, from)?;
        if !self.marks.visit(offset) {
            let found = format!("{offset:#x}, which is in use elsewhere");
            return Err(CellFault::in_bins(
                from,
                "reference",
                "a cell of its own",
                found,
            ));
        }
        self.stats.bytes += cell.data.len() as u64 + 4;
        Ok(cell)
    }

    fn visit_keys(&mut self, root: u32) -> Result<(), CellFault> {
        let mut pending = vec![PendingKey {
            cell: root,
            parent: NONE,
            depth: 0,
            hash: None,
        }];
        while let Some(key) = pending.pop() {
            self.visit_key(&key, &mut pending)?;
        }
        Ok(())
    }

    fn visit_key(
        &mut self,
        key: &PendingKey,
        pending: &mut Vec<PendingKey>,
    ) -> Result<(), CellFault> {
        let nk = self.take(key.cell, key.parent)?.expect(b"nk")?;
        if key.depth > MAX_DEPTH {
            let most = format!("{MAX_DEPTH} levels at most");
            return Err(CellFault::in_bins(key.cell, "key", most, key.depth));
        }
        let parent = nk.u32(nk::PARENT)?;
        if key.parent != NONE && parent != key.parent {
            let (expected, found) = (format!("parent {:#x}", key.parent), format!("{parent:#x}"));
            return Err(CellFault::in_bins(key.cell, "key", expected, found));
        }
        let name_len = usize::from(nk.u16(nk::NAME_LEN)?);
        nk.slice(nk::NAME, name_len)?;
        if name_len == 0 && key.parent != NONE {
            return Err(CellFault::in_bins(key.cell, "key", "a name", "none"));
        }
        let class = nk.u32(nk::CLASS)?;
        let class_len = usize::from(nk.u16(nk::CLASS_LEN)?);
        if class != NONE && class_len > 0 {
            self.take(class, key.cell)?.slice(0, class_len)?;
        }
        self.visit_security(nk.u32(nk::SECURITY)?, key.cell)?;
        self.visit_values(nk.u32(nk::VALUES)?, nk.u32(nk::VALUE_LIST)?, key.cell)?;

        let count = nk.u32(nk::SUBKEYS)?;
        if count > 0 {
            let first = pending.len();
            self.visit_list(nk.u32(nk::SUBKEY_LIST)?, key, pending, true)?;
            self.check_order(&pending[first..])?;
            let found = pending.len() - first;
            if found != count as usize {
                let expected = format!("{count} subkeys");
                return Err(CellFault::in_bins(
                    key.cell,
                    "list of a key",
                    expected,
                    found,
                ));
            }
        }
        self.stats.keys += 1;
        Ok(())
    }

    fn visit_list(
        &mut self,
        list: u32,
        key: &PendingKey,
        pending: &mut Vec<PendingKey>,
        may_be_root: bool,
    ) -> Result<(), CellFault> {
        let cell = self.take(list, key.cell)?;
        let count = usize::from(cell.u16(list::COUNT)?);
        let (step, hashed) = match cell.slice(0, 2)? {
            b"lh" => (list::HASHED, true),
            b"lf" => (list::HASHED, false),
            b"li" => (list::PLAIN, false),
            b"ri" if may_be_root => {
                for i in 0..count {
                    self.visit_list(
                        cell.u32(list::FIRST + i * list::PLAIN)?,
                        key,
                        pending,
                        false,
                    )?;
                }
                return Ok(());
            }
            other => {
                let (expected, found) = ("lh, lf, li or ri", other.escape_ascii());
                return Err(CellFault::in_bins(list, "list of subkeys", expected, found));
            }
        };
        for i in 0..count {
            let at = list::FIRST + i * step;
            pending.push(PendingKey {
                cell: cell.u32(at)?,
                parent: key.cell,
                depth: key.depth + 1,
                hash: if hashed {
                    Some(cell.u32(at + list::HASH)?)
                } else {
                    None
                },
            });
        }
        Ok(())
    }

    /// Checks the order of subkeys. Windows finds a key by binary search and by hash, so it cannot
    /// find one in the wrong place. Names that are not ASCII pass: their upper case depends on
    /// Windows' tables.
    fn check_order(&self, keys: &[PendingKey]) -> Result<(), CellFault> {
        for key in keys {
            self.ahead(key.cell, 0);
            self.ahead(key.cell, nk::NAME);
        }
        let mut previous: Option<&'b [u8]> = None;
        for key in keys {
            let nk = self.peek(key.cell, key.parent)?.expect(b"nk")?;
            let name = nk.key_name()?.as_ascii();
            if let (Some(name), Some(hash)) = (name, key.hash)
                && ascii_hash(name) != hash
            {
                let expected = format!("hash {:#x} of the name", ascii_hash(name));
                let found = format!("{hash:#x}");
                return Err(CellFault::in_bins(
                    key.cell,
                    "list of subkeys",
                    expected,
                    found,
                ));
            }
            if let (Some(name), Some(previous)) = (name, previous)
                && !is_after(name, previous)
            {
                let expected = format!("a name after {}", previous.escape_ascii());
                let found = name.escape_ascii();
                return Err(CellFault::in_bins(
                    key.cell,
                    "list of subkeys",
                    expected,
                    found,
                ));
            }
            previous = name;
        }
        Ok(())
    }

    fn visit_values(&mut self, count: u32, list: u32, key: u32) -> Result<(), CellFault> {
        if count == 0 {
            return Ok(());
        }
        let list = self.take(list, key)?;
        let listed = (count as usize).min(list.data.len() / 4);
        for i in 0..listed {
            self.ahead(list.u32(i * 4)?, 0);
        }
        for i in 0..listed {
            let data = self.ahead(list.u32(i * 4)?, vk::DATA);
            self.ahead(data, 0);
        }
        for i in 0..count as usize {
            let offset = list.u32(i.saturating_mul(4))?;
            let vk = self.take(offset, list.offset)?.expect(b"vk")?;
            vk.slice(vk::NAME, usize::from(vk.u16(vk::NAME_LEN)?))?;
            self.visit_data(vk.u32(vk::SIZE)?, vk.u32(vk::DATA)?, offset)?;
            self.stats.values += 1;
        }
        Ok(())
    }

    fn visit_data(&mut self, size: u32, data: u32, vk: u32) -> Result<(), CellFault> {
        if size & INLINE != 0 {
            return match size ^ INLINE {
                0..=4 => Ok(()),
                n => Err(CellFault::in_bins(vk, "value", "4 bytes in it at most", n)),
            };
        }
        let size = size as usize;
        if size == 0 {
            return Ok(());
        }
        let cell = self.take(data, vk)?;
        if size <= SEGMENT || self.minor < 4 {
            return cell.slice(0, size).map(drop);
        }
        let cell = cell.expect(b"db")?;
        let count = usize::from(cell.u16(db::COUNT)?);
        if count != size.div_ceil(SEGMENT) {
            let expected = format!("{} segments for {size} bytes", size.div_ceil(SEGMENT));
            return Err(CellFault::in_bins(cell.offset, "big data", expected, count));
        }
        let list = self.take(cell.u32(db::LIST)?, cell.offset)?;
        let mut left = size;
        for i in 0..count {
            let segment = self.take(list.u32(i * 4)?, list.offset)?;
            let len = left.min(SEGMENT);
            segment.slice(0, len)?;
            left -= len;
        }
        Ok(())
    }

    /// Checks a security cell once, and its neighbours in the ring, whether a key refers to them or
    /// not.
    fn visit_security(&mut self, first: u32, key: u32) -> Result<(), CellFault> {
        if let Some(count) = self.security.get_mut(&first) {
            *count += 1;
            return Ok(());
        }
        let mut from = key;
        let mut offset = first;
        let mut users = 1;
        while !self.security.contains_key(&offset) {
            let sk = self.take(offset, from)?.expect(b"sk")?;
            sk.slice(sk::DESCRIPTOR, sk.u32(sk::SIZE)? as usize)?;
            let next = sk.u32(sk::NEXT)?;
            let back = self.peek(next, offset)?.expect(b"sk")?.u32(sk::PREVIOUS)?;
            if back != offset {
                let expected = format!("the next one to lead back to {offset:#x}");
                let found = format!("{back:#x}");
                return Err(CellFault::in_bins(
                    offset,
                    "ring of security cells",
                    expected,
                    found,
                ));
            }
            self.security.insert(offset, users);
            self.stats.security_descriptors += 1;
            users = 0;
            from = offset;
            offset = next;
        }
        if offset != first {
            let (expected, found) = (format!("an end at {first:#x}"), format!("{offset:#x}"));
            return Err(CellFault::in_bins(
                from,
                "ring of security cells",
                expected,
                found,
            ));
        }
        Ok(())
    }

    fn check_security_counts(&self) -> Result<(), CellFault> {
        for (&offset, &users) in &self.security {
            let stored = self.peek(offset, offset)?.u32(sk::REFERENCES)?;
            if stored < users {
                let expected = format!("{users} keys that use it");
                return Err(CellFault::in_bins(
                    offset,
                    "security cell",
                    expected,
                    stored,
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;
    use crate::registry::KeyTree;
    use crate::registry::RegData;
    use crate::registry::differences::deep_eq;
    use crate::registry::hive::HiveView;
    use crate::registry::name::name_hash;
    use crate::skip::corpus;

    fn sample() -> KeyTree {
        let mut tree = KeyTree::new("ROOT");
        for i in 0..40 {
            tree.dword(&format!("A\\k{i}"), "n", i);
        }
        tree.sz("B\\C", "text", "some text");
        tree.set("B", "big", RegData::Binary(vec![7; 40_000]));
        tree
    }

    fn find(bytes: &[u8], what: &[u8]) -> usize {
        let found = bytes.windows(what.len()).position(|w| w == what);
        found.expect("the sample holds it")
    }

    #[test]
    fn counts() {
        let stats = walk(&sample().to_bytes("SAMPLE")).unwrap();
        assert_eq!((stats.keys, stats.values), (44, 42));
        assert_eq!(stats.security_descriptors, 1);
        assert!(stats.bytes > 40_000);
    }

    #[test]
    fn a_tail_beyond_the_bins_is_ignored() {
        let mut bytes = sample().to_bytes("SAMPLE");
        let stats = walk(&bytes).unwrap();
        bytes.extend([0xaa; 5000]);
        assert_eq!(walk(&bytes).unwrap(), stats);
    }

    /// Each change causes one fault, which must be found and be the expected one.
    #[test]
    fn faults() {
        type Breakage = fn(&mut Vec<u8>);
        assert_eq!(ascii_hash(b"Select"), name_hash("sELECT"));
        let cases: [(&str, Breakage); 17] = [
            ("expected 512 bytes", |b| b.truncate(100)),
            ("of bins, found only", |b| b.truncate(b.len() - 1)),
            ("a log (NewLog)", |b| b[28] = 6),
            ("format 1.2", |b| b[24] = 2),
            ("bin chain breaks", |b| {
                // Not the first bin: a chain that breaks in the middle.
                let second = 4096 + u32::from_le_bytes(b[4104..4108].try_into().unwrap());
                b[second as usize] = b'x';
            }),
            ("its own place 0, found 1", |b| b[4096 + 4] = 1),
            ("bin size", |b| b[4096 + 8] = 1),
            ("cell size", |b| b[4096 + 32] = 0xfd),
            ("no allocated cell", |b| b[36] = 40),
            ("no allocated cell", |b| {
                let list = find(b, b"lh");
                b[list + 4..list + 8].fill(0xff);
            }),
            ("a name after", |b| {
                // The same key twice.
                let list = find(b, b"lh");
                b.copy_within(list + 4..list + 12, list + 12);
            }),
            ("subkeys, found", |b| {
                let list = find(b, b"lh");
                b[list + 2] -= 1;
            }),
            ("too short", |b| {
                let key = find(b, b"nk");
                b[key + 72..key + 74].fill(0xff);
            }),
            ("segments for", |b| {
                let header = find(b, b"db");
                b[header + 2] += 1;
            }),
            ("of the name, found", |b| {
                let list = find(b, b"lh");
                b[list + 8] ^= 1;
            }),
            ("a name after", |b| {
                // Swap the first two entries of a list.
                let list = find(b, b"lh");
                let first = b[list + 4..list + 12].to_vec();
                b.copy_within(list + 12..list + 20, list + 4);
                b[list + 12..list + 20].copy_from_slice(&first);
            }),
            ("keys that use it, found", |b| {
                let security = find(b, b"sk");
                b[security + 12] = 1;
            }),
        ];
        for (expected, break_it) in cases {
            let mut bytes = sample().to_bytes("SAMPLE");
            break_it(&mut bytes);
            let fault = walk(&bytes).expect_err(expected).to_string();
            assert!(fault.contains(expected), "{expected}: {fault}");
        }
    }

    #[test]
    fn a_key_below_itself_is_a_fault() {
        let mut tree = KeyTree::new("R");
        tree.key_mut("a\\b");
        let mut bytes = tree.to_bytes("R");
        // Make the list of `a` hold `a` instead of `b`: the first list written belongs to `a`.
        let lists: Vec<usize> = (0..bytes.len() - 1)
            .filter(|&i| &bytes[i..i + 2] == b"lh")
            .collect();
        let [of_a, of_root] = lists[..] else {
            panic!("{lists:?}")
        };
        bytes.copy_within(of_root + 4..of_root + 12, of_a + 4);
        let fault = walk(&bytes).unwrap_err().to_string();
        assert!(fault.contains("in use elsewhere"), "{fault}");
    }

    #[test]
    fn differences() {
        let a = sample();
        let mut b = sample();
        b.name = "OTHER".into();
        b.remove("A\\k7");
        b.dword("A\\k8", "N", 99).dword("new\\key", "x", 1);
        b.sz("B\\C", "more", "x");
        let (a, b) = (a.to_bytes("A"), b.to_bytes("B"));
        let (a, b) = (HiveView::new(&a).unwrap(), HiveView::new(&b).unwrap());
        assert_eq!(deep_eq(&a, &a).unwrap(), []);
        let lines: Vec<String> = deep_eq(&a, &b)
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect();
        insta::assert_snapshot!(lines.join("\n"), @r#"
        [A\\k7] only in the first
        [A\\k8] "n": Some(Value { ty: 4, data: [8, 0, 0, 0] }) / Some(Value { ty: 4, data: [99, 0, 0, 0] })
        [B\\C] "more": None / Some(Value { ty: 1, data: [120, 0, 0, 0] })
        [new] only in the second
        "#);
        assert_eq!(deep_eq(&b, &a).unwrap().len(), lines.len());
    }

    /// All real hives are sound, including the dirty ones: their missing changes are in the logs.
    #[test]
    fn real_hives() {
        let cases = [
            ("bcd/BCD", 132, 103, false),
            ("bcd/BCD-winpe", 66, 46, false),
            ("logs-NewDirtyHive1/NewDirtyHive", 5, 2, true),
            ("logs-NewDirtyHive1/RecoveredHive_Windows10", 5, 1, false),
            ("logs-OldDirtyHive/OldDirtyHive", 5003, 0, true),
            ("logs-ntuser/transactions_NTUSER.DAT", 2590, 4119, true),
            ("win10-vmware/SYSTEM", 43211, 90307, true),
            ("win7-x86-vmware/SYSTEM", 30756, 73456, false),
        ];
        for (name, keys, values, dirty) in cases {
            let Some(mut bytes) = corpus(name) else {
                continue;
            };
            let stats = walk(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!((stats.keys, stats.values), (keys, values), "{name}");
            assert_eq!(
                BaseBlock::parse(&bytes).unwrap().is_dirty(),
                dirty,
                "{name}"
            );

            // A bin chain that breaks in the middle.
            let middle = (bytes.len() / 2) & !(PAGE - 1);
            let bin = (0..=middle)
                .rev()
                .step_by(PAGE)
                .find(|&at| bytes.get(at..at + 4) == Some(b"hbin"));
            bytes[bin.expect("a bin")] = 0;
            let fault = walk(&bytes).expect_err(name).to_string();
            assert!(fault.contains("bin chain"), "{name}: {fault}");
        }
    }

    /// A rebuilt large hive has the same keys and values.
    #[test]
    fn a_real_hive_rebuilt_is_equal() {
        let Some(bytes) = corpus("logs-ntuser/transactions_NTUSER.DAT") else {
            return;
        };
        let view = HiveView::new(&bytes).unwrap();
        let rebuilt = KeyTree::from_view(&view).unwrap().to_bytes("NTUSER.DAT");
        walk(&rebuilt).unwrap();
        let differences = deep_eq(&view, &HiveView::new(&rebuilt).unwrap());
        assert_eq!(differences.unwrap(), []);
    }

    proptest::proptest! {
        /// The walk ends whatever is broken, and a hive that passes it can be read in full.
        #[test]
        fn damage_never_panics(
            changes in proptest::collection::vec((0usize..80_000, proptest::num::u8::ANY), 1..6)
        ) {
            static SOUND: LazyLock<Vec<u8>> = LazyLock::new(|| sample().to_bytes("SAMPLE"));
            let mut bytes = SOUND.clone();
            for (at, byte) in changes {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            let view = HiveView::new(&bytes);
            if let Some(root) = view.as_ref().ok().and_then(|view| view.root().ok()) {
                for key in root.keys().unwrap_or_default() {
                    let _ = (key.name(), key.values(), key.keys(), key.key("k7"));
                }
            }
            if walk(&bytes).is_ok() {
                KeyTree::from_view(&view.unwrap()).unwrap();
            }
        }
    }
}
