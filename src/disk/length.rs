//! Checks whether an image file is as long as its own tables require.
//!
//! QEMU reads missing data at the end of a file as zeroes, and `qemu-img check` tolerates up to a
//! missing cluster. So the end of the last block with data is computed here from the block tables
//! of each format. It is compared with the length of the file. Two parts may be absent and do not
//! count. One is the part of the last cluster behind the end of the disk. The other is the rest of
//! the last sector of compressed data.
//!
//! Invalid tables are ignored here: QEMU opens the image afterwards. In a hostile image no byte is
//! read twice, and no more tables than its disk can need.
//!
//! Specifications: as in [`super::detect`], and QEMU's `block/*.c` for seSparse, QED and Parallels.

use std::io;

use super::detect::{Format, VmdkExtent, read_up_to, vhd_type};
use super::qcow2::{EXTENDED_L2, EXTERNAL_DATA, Header, OFFSET, Packed, SUBCLUSTERS, ZERO};
use super::remote::ReadAt;
use crate::bytes;

/// Data that ends behind the end of its file or disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Short {
    /// The name of the data: `its last block`, `partition 2`.
    pub what: String,
    /// The end of the data.
    pub needs: u64,
    /// The length of the file or disk.
    pub has: u64,
}

impl std::fmt::Display for Short {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { what, needs, has } = self;
        write!(
            f,
            "{what} ends at byte {needs}, and there are only {has} bytes"
        )
    }
}

/// The largest table; no disk needs a larger one, and QEMU refuses it.
const MAX_TABLE: u64 = 256 << 20;
/// The most entries of a first table. QEMU accepts no more in a qcow2, and the largest supported
/// disk needs no more in the other formats.
const MAX_FIRST: u64 = 4 << 20;

/// Finds data of the image behind the end of the file. [`data_file`] checks external data files,
/// [`extent`] extents.
pub fn image(file: &dyn ReadAt, size: u64, format: Format) -> io::Result<Option<Short>> {
    let input = Input { file, size };
    let needs = match format.driver() {
        "qcow2" => qcow2(&input)?.map(|ends| ends.own),
        "qcow" => qcow(&input)?,
        "vpc" => vhd(&input)?,
        "vhdx" => vhdx(&input)?,
        "vdi" => vdi(&input)?,
        "qed" => qed(&input)?,
        "parallels" => parallels(&input)?,
        "vmdk" => sparse_vmdk(&input)?,
        _ => None,
    };
    Ok(input.short(needs, "its last block"))
}

/// Checks the external data file of a qcow2.
pub fn data_file(qcow2_file: &dyn ReadAt, size: u64, data_size: u64) -> io::Result<Option<Short>> {
    let input = Input {
        file: qcow2_file,
        size,
    };
    let needs = qcow2(&input)?.map_or(0, |ends| ends.data);
    Ok((needs > data_size).then(|| Short {
        what: "the data in it".into(),
        needs,
        has: data_size,
    }))
}

/// Checks an extent of a VMDK against its descriptor.
pub fn extent(part: &dyn ReadAt, size: u64, extent: &VmdkExtent) -> io::Result<Option<Short>> {
    let input = Input { file: part, size };
    let kind = extent.kind.to_ascii_uppercase();
    let needs = match kind.as_str() {
        "FLAT" | "VMFS" => {
            let sectors = extent.offset.unwrap_or(0).saturating_add(extent.sectors);
            let needs = Some(sectors.saturating_mul(512));
            return Ok(input.short(needs, "the extent its descriptor describes"));
        }
        "SPARSE" | "VMFSSPARSE" => sparse_vmdk(&input)?,
        "SESPARSE" => se_sparse(&input)?,
        _ => None,
    };
    Ok(input.short(needs, "its last grain"))
}

struct Input<'f> {
    file: &'f dyn ReadAt,
    size: u64,
}

/// The ends of data in the qcow2 and in its data file.
struct Ends {
    own: u64,
    data: u64,
}

impl Input<'_> {
    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        read_up_to(self.file, offset, len, self.size)
    }

    /// The start of the first data at or behind that offset; everything before is zero.
    fn data_from(&self, at: u64) -> u64 {
        self.file.data_from(at)
    }

    fn short(&self, needs: Option<u64>, what: &str) -> Option<Short> {
        let needs = needs.filter(|n| *n > self.size)?;
        Some(Short {
            what: what.into(),
            needs,
            has: self.size,
        })
    }

    /// The tables that a first table names, and its own end.
    fn first_table<const N: usize>(
        &self,
        offset: u64,
        entries: u64,
        place: impl Fn([u8; N]) -> u64,
    ) -> io::Result<Option<(Listed, u64)>> {
        if entries > MAX_FIRST {
            return Ok(None);
        }
        let mut listed = Listed::default();
        let end = self.table(offset, entries, &mut |i, entry| {
            listed.add(place(entry), i);
        })?;
        Ok(end.map(|end| (listed, end)))
    }

    /// Calls `each` with every existing entry of a table, and returns the end of the table.
    fn table<const N: usize>(
        &self,
        offset: u64,
        entries: u64,
        each: &mut dyn FnMut(u64, [u8; N]),
    ) -> io::Result<Option<u64>> {
        const CHUNK: u64 = 1 << 20;
        let Some(len) = entries.checked_mul(N as u64).filter(|l| *l <= MAX_TABLE) else {
            return Ok(None);
        };
        let Some(end) = offset.checked_add(len) else {
            return Ok(None);
        };
        let mut at = offset;
        let mut buffer = vec![0; CHUNK.min(len) as usize];
        let mut index = 0;
        while at < end.min(self.size) {
            let part = CHUNK.min(end.min(self.size) - at) as usize;
            self.file.read_exact_at(&mut buffer[..part], at)?;
            for entry in buffer[..part].chunks_exact(N) {
                if let Ok(entry) = entry.try_into() {
                    each(index, entry);
                }
                index += 1;
            }
            at += part as u64;
        }
        Ok(Some(end))
    }
}

/// Tables by their offsets in the file, with their indices.
#[derive(Default)]
struct Listed(Vec<(u64, u64)>);

impl Listed {
    /// Adds a table. 0 means that there is none, 1 that it is all zeroes.
    fn add(&mut self, at: u64, index: u64) {
        if at > 1 {
            self.0.push((at, index));
        }
    }

    /// The end of the last table.
    fn end(&self, length: u64) -> u64 {
        let last = self.0.iter().map(|(at, _)| *at).max();
        last.map_or(0, |at| at.saturating_add(length))
    }

    /// The tables without those that overlap the previous one, which do not occur in a sound image.
    fn apart(mut self, length: u64) -> impl Iterator<Item = (u64, u64)> {
        self.0.sort_unstable();
        let mut free = 0;
        self.0.into_iter().filter(move |(at, _)| {
            let apart = *at >= free;
            if apart {
                free = at.saturating_add(length);
            }
            apart
        })
    }
}

fn le32(bytes: &[u8], at: usize) -> u64 {
    bytes::le32(bytes, at).map_or(0, u64::from)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes::le64(bytes, at).unwrap_or_default()
}

fn be32(bytes: &[u8], at: usize) -> u64 {
    bytes::be32(bytes, at).map_or(0, u64::from)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes::be64(bytes, at).unwrap_or_default()
}

/// The part of the block at `index` within a disk of `disk` bytes.
fn within(index: u64, block: u64, disk: u64) -> u64 {
    block.min(disk.saturating_sub(index.saturating_mul(block)))
}

// ---- qcow2, qcow, QED: a table of tables ----

fn qcow2(input: &Input) -> io::Result<Option<Ends>> {
    let head = input.read(0, Header::LEN)?;
    let Some(header) = Header::of(&head).filter(|_| head.len() >= 72) else {
        return Ok(None);
    };
    let (bits, disk) = (u64::from(header.cluster_bits.0), header.size.0);
    let features = header.incompatible.0;
    if !(9..=21).contains(&bits) {
        return Ok(None);
    }
    let cluster = 1u64 << bits;
    let entry_size = if features & EXTENDED_L2 != 0 { 16 } else { 8 };
    let needed = disk.div_ceil(cluster / entry_size * cluster);
    let place = |entry| u64::from_be_bytes(entry) & OFFSET;
    let Some((tables, l1_end)) = input.first_table(
        header.l1.0,
        u64::from(header.l1_entries.0).min(needed),
        place,
    )?
    else {
        return Ok(None);
    };
    let (mut own, mut data) = (l1_end.max(tables.end(cluster)), 0u64);
    for (at, i) in tables.apart(cluster) {
        let mut seen = |index: u64, entry: u64, bitmap: Option<u64>| {
            let (end, packed) = cluster_end(index, entry, bitmap, bits, disk);
            if features & EXTERNAL_DATA != 0 && !packed {
                data = data.max(end);
            } else {
                own = own.max(end);
            }
        };
        if features & EXTENDED_L2 != 0 {
            let per = cluster / 16;
            input.table(at, per, &mut |n, entry: [u8; 16]| {
                let bitmap = be64(&entry, 8);
                seen(i * per + n, be64(&entry, 0), Some(bitmap));
            })?;
        } else {
            let per = cluster / 8;
            input.table(at, per, &mut |n, entry| {
                seen(i * per + n, u64::from_be_bytes(entry), None);
            })?;
        }
    }
    Ok(Some(Ends { own, data }))
}

/// The end of the data of a cluster, 0 if it has none, and whether it is compressed.
fn cluster_end(index: u64, entry: u64, bitmap: Option<u64>, bits: u64, disk: u64) -> (u64, bool) {
    let cluster = 1u64 << bits;
    if let Some(data) = Packed::of(entry, bits as u32) {
        return (data.least_end(), true);
    }
    let at = entry & OFFSET;
    let used = match bitmap {
        _ if at == 0 => return (0, false),
        // Reads as zeroes, whether it is allocated or not.
        None if entry & ZERO != 0 => return (0, false),
        None => cluster,
        // The lower half marks the allocated parts.
        Some(bitmap) => match bitmap as u32 {
            0 => return (0, false),
            there => (cluster / SUBCLUSTERS) * u64::from(32 - there.leading_zeros()),
        },
    };
    let used = used.min(within(index, cluster, disk));
    let end = if used == 0 {
        0
    } else {
        at.saturating_add(used)
    };
    (end, false)
}

fn qcow(input: &Input) -> io::Result<Option<u64>> {
    let head = input.read(0, 48)?;
    let disk = be64(&head, 24);
    let (bits, l2_bits) = match head.get(32..34) {
        Some(&[bits, l2_bits]) if (9..=16).contains(&bits) && l2_bits <= 13 => (bits, l2_bits),
        _ => return Ok(None),
    };
    let entries = disk.div_ceil(1 << (bits + l2_bits));
    let shape = Tables {
        cluster: 1 << bits,
        per_table: 1 << l2_bits,
        disk,
        entry: u64::from_be_bytes,
        compressed: Some(63 - u32::from(bits)),
    };
    shape.end(input, be64(&head, 40), entries)
}

fn qed(input: &Input) -> io::Result<Option<u64>> {
    let head = input.read(0, 64)?;
    let (cluster, clusters) = (le32(&head, 4), le32(&head, 8));
    if !cluster.is_power_of_two() || !(1..=16).contains(&clusters) {
        return Ok(None);
    }
    let per_table = cluster.saturating_mul(clusters) / 8;
    let shape = Tables {
        cluster,
        per_table,
        disk: le64(&head, 48),
        entry: u64::from_le_bytes,
        compressed: None,
    };
    shape.end(input, le64(&head, 40), per_table)
}

struct Tables {
    cluster: u64,
    per_table: u64,
    disk: u64,
    entry: fn([u8; 8]) -> u64,
    /// The number of bits by which the size of a compressed cluster is shifted, if there are any.
    compressed: Option<u32>,
}

impl Tables {
    fn end(&self, input: &Input, l1_at: u64, entries: u64) -> io::Result<Option<u64>> {
        let needed = self
            .disk
            .div_ceil(self.cluster.saturating_mul(self.per_table).max(1));
        let Some((tables, l1_end)) = input.first_table(l1_at, entries.min(needed), self.entry)?
        else {
            return Ok(None);
        };
        let length = self.per_table.saturating_mul(8);
        let mut end = l1_end.max(tables.end(length));
        for (at, i) in tables.apart(length) {
            input.table(at, self.per_table, &mut |n, entry| {
                let at = (self.entry)(entry);
                let used = within(i * self.per_table + n, self.cluster, self.disk);
                end = end.max(match self.compressed {
                    _ if at <= 1 => 0,
                    Some(shift) if at >> 63 == 1 => {
                        let offset = at & ((1u64 << shift) - 1);
                        offset.saturating_add((at >> shift) & (self.cluster - 1))
                    }
                    _ => at.saturating_add(used),
                });
            })?;
        }
        Ok(Some(end))
    }
}

// ---- one table of blocks ----

fn vdi(input: &Input) -> io::Result<Option<u64>> {
    let head = input.read(0, 512)?;
    let (data, block, extra, allocated) = (
        le32(&head, 344),
        le32(&head, 376),
        le32(&head, 380),
        le32(&head, 388),
    );
    let end = (block + extra).saturating_mul(allocated);
    Ok(Some(end.saturating_add(data).max(512)))
}

fn vhd(input: &Input) -> io::Result<Option<u64>> {
    const FIXED: u32 = 2;
    const FOOTER: u64 = 512;
    let tail = input.read(input.size.saturating_sub(FOOTER), FOOTER as usize)?;
    if vhd_type(&tail) == Some(FIXED) {
        return Ok(Some(be64(&tail, 48).saturating_add(FOOTER)));
    }
    let head = input.read(0, 512)?;
    if vhd_type(&head).is_none() {
        return Ok(None);
    }
    let header_at = be64(&head, 16);
    let header = input.read(header_at, 1024)?;
    if !header.starts_with(b"cxsparse") {
        return Ok(Some(header_at.saturating_add(1024 + FOOTER)));
    }
    let (table, entries, block) = (be64(&header, 16), be32(&header, 28), be32(&header, 32));
    if !block.is_power_of_two() || block < 512 {
        return Ok(None);
    }
    let bitmap = (block / 512).div_ceil(8).next_multiple_of(512);
    let mut end = 0u64;
    let table_end = input.table(table, entries, &mut |_, entry| {
        let sector = u64::from(u32::from_be_bytes(entry));
        if sector != u64::from(u32::MAX) {
            end = end.max(sector * 512 + bitmap + block);
        }
    })?;
    // The footer exists twice; the second one follows the last block.
    let full = |table_end: u64| table_end.checked_next_multiple_of(512).unwrap_or(u64::MAX);
    Ok(table_end.map(|t| end.max(full(t)).saturating_add(FOOTER)))
}

fn parallels(input: &Input) -> io::Result<Option<u64>> {
    let head = input.read(0, 64)?;
    let (sectors, entries) = (le32(&head, 28), le32(&head, 32));
    let unit = match head.starts_with(b"WithouFreSpacExt") {
        true => sectors.saturating_mul(512),
        false => 512,
    };
    let mut end = 0u64;
    let table_end = input.table(64, entries, &mut |_, entry| {
        let at = u64::from(u32::from_le_bytes(entry));
        if at != 0 {
            end = end.max(at.saturating_mul(unit).saturating_add(sectors * 512));
        }
    })?;
    Ok(table_end.map(|t| end.max(t)))
}

// ---- VHDX ----

const BAT_REGION: &str = "2dc27766-f623-4200-9d64-115e9bfd4a08";
const METADATA_REGION: &str = "8b7ca206-4790-4b9a-b8fe-575f050f886e";
const FILE_PARAMETERS: &str = "caa16737-fa36-4d43-b3b6-33f0aa44e76b";
const VIRTUAL_SIZE: &str = "2fa54224-cd1b-4876-b211-5dbed83bf4b8";
const SECTOR_SIZE: &str = "8141bf1d-a96f-4709-ba47-f233a8faab5f";

fn guid(bytes: &[u8], at: usize) -> String {
    let field = bytes.get(at..).and_then(|b| b.first_chunk());
    field.map_or_else(String::new, |b| uuid::Uuid::from_bytes_le(*b).to_string())
}

/// The items of the metadata region of a VHDX, by their ids: offset in the file and length.
pub(super) fn vhdx_metadata(file: &dyn ReadAt, size: u64) -> io::Result<Vec<(String, u64, u64)>> {
    let input = Input { file, size };
    let Some((at, _)) = vhdx_region(&input, METADATA_REGION)? else {
        return Ok(Vec::new());
    };
    let table = input.read(at, 64 << 10)?;
    if !table.starts_with(b"metadata") {
        return Ok(Vec::new());
    }
    let count = table.get(10..).and_then(|b| b.first_chunk());
    let count = count.map_or(0, |b| usize::from(u16::from_le_bytes(*b)).min(2047));
    let items = (1..=count).map(|n| {
        let entry = table.get(32 * n..32 * n + 32).unwrap_or_default();
        let offset = at.saturating_add(le32(entry, 16));
        (guid(entry, 0), offset, le32(entry, 20))
    });
    Ok(items.collect())
}

/// The range of a region.
fn vhdx_region(input: &Input, wanted: &str) -> io::Result<Option<(u64, u64)>> {
    let regions = vhdx_regions(input)?;
    let found = regions.into_iter().find(|(id, ..)| id == wanted);
    Ok(found.map(|(_, at, length)| (at, length)))
}

/// The regions of the first valid region table: id, offset, length.
fn vhdx_regions(input: &Input) -> io::Result<Vec<(String, u64, u64)>> {
    for table_at in [192 << 10, 256 << 10] {
        let table = input.read(table_at, 64 << 10)?;
        if table.starts_with(b"regi") {
            let entries = table.get(16..).unwrap_or_default().chunks_exact(32);
            let count = le32(&table, 8).min(2047) as usize;
            let entry = |e: &[u8]| (guid(e, 0), le64(e, 16), le32(e, 24));
            return Ok(entries.take(count).map(entry).collect());
        }
    }
    Ok(Vec::new())
}

fn vhdx(input: &Input) -> io::Result<Option<u64>> {
    // [MS-VHDX] 2.5.1.1: present, and partly present over a parent.
    const PRESENT: [u64; 2] = [6, 7];
    let Some((bat, _)) = vhdx_region(input, BAT_REGION)? else {
        // The tables are in the first 320 KiB, the regions after them.
        let headers = input.read(0, 8)?.starts_with(b"vhdxfile") && input.size < 1 << 20;
        return Ok(headers.then_some(1 << 20));
    };
    let metadata = vhdx_metadata(input.file, input.size)?;
    let item = |id: &str, len: usize| -> io::Result<Vec<u8>> {
        match metadata.iter().find(|(found, ..)| found == id) {
            Some((_, at, _)) => input.read(*at, len),
            None => Ok(Vec::new()),
        }
    };
    let block = le32(&item(FILE_PARAMETERS, 8)?, 0);
    let disk = le64(&item(VIRTUAL_SIZE, 8)?, 0);
    let sector = le32(&item(SECTOR_SIZE, 4)?, 0);
    let regions = vhdx_regions(input)?.into_iter();
    let ends = regions.map(|(_, at, length)| at.saturating_add(length));
    let end_of_regions = ends.max().unwrap_or(0);
    if !block.is_power_of_two() || block < 1 << 20 || disk == 0 || sector == 0 {
        return Ok(Some(end_of_regions));
    }
    // After so many blocks there is an entry for a bitmap of sectors.
    let ratio = (sector << 23) / block;
    let blocks = disk.div_ceil(block);
    let entries = blocks + (blocks - 1) / ratio.max(1);
    let mut end = end_of_regions;
    input.table(bat, entries, &mut |i, entry| {
        let entry = u64::from_le_bytes(entry);
        let payload = (i + 1) % (ratio + 1) != 0;
        if payload && PRESENT.contains(&(entry & 7)) {
            let used = within(i - i / (ratio + 1), block, disk);
            end = end.max((entry & !0xf_ffff).saturating_add(used));
        }
    })?;
    Ok(Some(end))
}

// ---- VMDK ----

/// A hosted sparse image (`KDMV`) or one of ESX (`COWD`).
fn sparse_vmdk(input: &Input) -> io::Result<Option<u64>> {
    const COMPRESSED: u64 = 1 << 16;
    const AT_END: u64 = u64::MAX;
    let mut head = input.read(0, 512)?;
    if head.starts_with(b"COWD") {
        let (disk, grain) = (le32(&head, 12), le32(&head, 16));
        let grains = Grains {
            directory: le32(&head, 20),
            tables: le32(&head, 24),
            per_table: 4096,
            grain,
            disk,
            packed: false,
        };
        return grains.end(input);
    }
    if !head.starts_with(b"KDMV") {
        return Ok(None);
    }
    if le64(&head, 56) == AT_END {
        // The footer has the same header with the offset of the directory.
        let footer = input.read(input.size.saturating_sub(1024), 512)?;
        if !footer.starts_with(b"KDMV") {
            return stream_end(input, le64(&head, 64)).map(Some);
        }
        head = footer;
    }
    let (disk, grain, per_table) = (le64(&head, 12), le64(&head, 20), le32(&head, 44));
    let tables = match per_table.checked_mul(grain) {
        Some(sectors) if sectors > 0 => disk.div_ceil(sectors),
        _ => return Ok(None),
    };
    let packed = le32(&head, 8) & COMPRESSED != 0;
    let grains = Grains {
        directory: le64(&head, 56),
        tables,
        per_table,
        grain,
        disk,
        packed,
    };
    grains.end(input)
}

/// The grains of a sparse extent; all but `tables` and `per_table` in sectors.
struct Grains {
    directory: u64,
    tables: u64,
    per_table: u64,
    grain: u64,
    disk: u64,
    packed: bool,
}

impl Grains {
    /// The end of the last grain.
    fn end(&self, input: &Input) -> io::Result<Option<u64>> {
        let &Self {
            directory,
            tables,
            per_table,
            grain,
            disk,
            packed,
        } = self;
        let sane = (1..=4096).contains(&per_table) && (1..=1 << 17).contains(&grain);
        let Some(directory) = directory.checked_mul(512).filter(|_| sane) else {
            return Ok(None);
        };
        let length = per_table * 4;
        let needed = disk.div_ceil(per_table * grain);
        let place = |entry| u64::from(u32::from_le_bytes(entry)) * 512;
        let Some((found, end)) = input.first_table(directory, tables.min(needed), place)? else {
            return Ok(None);
        };
        let mut end = end.max(found.end(length));
        let mut last_grain = 0;
        let mut data = 0;
        for (at, i) in found.apart(length) {
            // A large empty disk has GiB of tables, all of them holes.
            if at >= data {
                data = input.data_from(at);
            }
            if at.saturating_add(length) <= data {
                continue;
            }
            input.table(at, per_table, &mut |n, entry| {
                let at = u64::from(u32::from_le_bytes(entry));
                // 1 means zeroes.
                if at > 1 {
                    let used = within(i * per_table + n, grain, disk);
                    last_grain = last_grain.max(at);
                    end = end.max(if packed { 0 } else { (at + used) * 512 });
                }
            })?;
        }
        if packed && last_grain > 0 {
            // Compressed data is preceded by its sector (8 bytes) and its length (4).
            let marker = input.read(last_grain * 512, 12)?;
            end = end.max(last_grain * 512 + 12 + le32(&marker, 8));
        }
        Ok(Some(end))
    }
}

/// The least length of a stream-optimised image without a footer: up to the end of the truncated
/// piece and of the footer.
fn stream_end(input: &Input, overhead: u64) -> io::Result<u64> {
    const FOOTER: u64 = 3 * 512;
    let mut at = overhead.saturating_mul(512).max(512);
    while at < input.size {
        let marker = input.read(at, 16)?;
        let (value, length) = (le64(&marker, 0), le32(&marker, 8));
        if (value, length) == (0, 0) {
            // The end of the stream, or nothing: a hole is not traversed sector by sector.
            break;
        }
        let piece = match length {
            0 => value.saturating_mul(512).saturating_add(512),
            length => (12 + length).next_multiple_of(512),
        };
        at = at.saturating_add(piece);
    }
    Ok(at.max(input.size).saturating_add(FOOTER))
}

fn se_sparse(input: &Input) -> io::Result<Option<u64>> {
    const MAGIC: u64 = 0xcafe_babe;
    let head = input.read(0, 208)?;
    let field = |n: usize| le64(&head, 8 * n);
    let (disk, grain, table) = (field(2), field(3), field(4));
    if field(0) != MAGIC || !(1..=1 << 12).contains(&grain) || !(1..=1 << 12).contains(&table) {
        return Ok(None);
    }
    let bytes = |sectors: u64| sectors.saturating_mul(512);
    let (directory, length) = (bytes(field(16)), bytes(field(17)));
    let (tables, data) = (bytes(field(18)), bytes(field(24)));
    let per_table = bytes(table) / 8;
    let needed = disk.div_ceil(per_table * grain);
    let place = |entry| {
        let entry = u64::from_le_bytes(entry);
        match entry >> 32 {
            0x1000_0000 => tables.saturating_add((entry & 0xffff_ffff) * bytes(table)),
            _ => 0,
        }
    };
    let Some((found, end)) = input.first_table(directory, needed.min(length / 8), place)? else {
        return Ok(None);
    };
    let mut end = end.max(found.end(bytes(table)));
    for (at, i) in found.apart(bytes(table)) {
        input.table(at, per_table, &mut |n, entry| {
            let entry = u64::from_le_bytes(entry);
            if entry >> 60 == 3 {
                let number = (entry >> 48 & 0xfff) | (entry & 0xffff_ffff_ffff) << 12;
                let used = within(i * per_table + n, grain, disk);
                let at = data.saturating_add(number.saturating_mul(bytes(grain)));
                end = end.max(at.saturating_add(bytes(used)));
            }
        })?;
    }
    Ok(Some(end))
}
