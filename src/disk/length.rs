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

use uuid::{Uuid, uuid};

use super::detect::{Format, VHD_FIXED, VmdkExtent, read_up_to, vhd_footer};
use super::headers::{
    COWD_MAGIC, CowdHeader, PARALLELS_BLOCKS_MAGIC, ParallelsHeader, QcowHeader, QedHeader,
    SE_SPARSE_MAGIC, SeSparseHeader, VHDX_ENTRIES, VHDX_MAGIC, VdiHeader, VhdDynamic, VhdFooter,
    VhdxMetadata, VhdxMetadataTable, VhdxRegion, VhdxRegionTable, VmdkHeader, VmdkMarker,
};
use super::qcow2::{EXTENDED_L2, EXTERNAL_DATA, Header, OFFSET, Packed, SUBCLUSTERS, ZERO};
use super::remote::ReadAt;

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

/// A number of up to eight bytes, the first of which is the least significant one.
fn number(bytes: &[u8]) -> u64 {
    let bytes = bytes.iter().take(8).rev();
    bytes.fold(0, |n, byte| n << 8 | u64::from(*byte))
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
                let both = u128::from_be_bytes(entry);
                seen(i * per + n, (both >> 64) as u64, Some(both as u64));
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
    let Some(header) = QcowHeader::padded(&input.read(0, QcowHeader::LEN)?) else {
        return Ok(None);
    };
    let (bits, l2_bits, disk) = (header.cluster_bits, header.l2_bits, header.size.0);
    if !(9..=16).contains(&bits) || l2_bits > 13 {
        return Ok(None);
    }
    let entries = disk.div_ceil(1 << (bits + l2_bits));
    let shape = Tables {
        cluster: 1 << bits,
        per_table: 1 << l2_bits,
        disk,
        entry: u64::from_be_bytes,
        compressed: Some(63 - u32::from(bits)),
    };
    shape.end(input, header.l1.0, entries)
}

fn qed(input: &Input) -> io::Result<Option<u64>> {
    let Some(header) = QedHeader::padded(&input.read(0, QedHeader::LEN)?) else {
        return Ok(None);
    };
    let (cluster, clusters) = (u64::from(header.cluster), u64::from(header.table));
    if !cluster.is_power_of_two() || !(1..=16).contains(&clusters) {
        return Ok(None);
    }
    let per_table = cluster.saturating_mul(clusters) / 8;
    let shape = Tables {
        cluster,
        per_table,
        disk: header.size,
        entry: u64::from_le_bytes,
        compressed: None,
    };
    shape.end(input, header.l1, per_table)
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
    let Some(header) = VdiHeader::padded(&input.read(0, VdiHeader::LEN)?) else {
        return Ok(None);
    };
    let block = u64::from(header.block) + u64::from(header.block_extra);
    let end = block.saturating_mul(header.allocated.into());
    let end = end.saturating_add(header.data.into());
    Ok(Some(end.max(VdiHeader::LEN as u64)))
}

fn vhd(input: &Input) -> io::Result<Option<u64>> {
    const FOOTER: u64 = VhdFooter::LEN as u64;
    let tail = input.read(input.size.saturating_sub(FOOTER), VhdFooter::LEN)?;
    if let Some(footer) = vhd_footer(&tail)
        && footer.kind.0 == VHD_FIXED
    {
        return Ok(Some(footer.size.0.saturating_add(FOOTER)));
    }
    let Some(head) = vhd_footer(&input.read(0, VhdFooter::LEN)?) else {
        return Ok(None);
    };
    let header_at = head.dynamic.0;
    let Some(header) = VhdDynamic::of(&input.read(header_at, VhdDynamic::LEN)?) else {
        let header_end = header_at.saturating_add(VhdDynamic::LEN as u64);
        return Ok(Some(header_end.saturating_add(FOOTER)));
    };
    let (entries, block) = (u64::from(header.entries.0), u64::from(header.block.0));
    if !block.is_power_of_two() || block < 512 {
        return Ok(None);
    }
    let bitmap = (block / 512).div_ceil(8).next_multiple_of(512);
    let mut end = 0u64;
    let table_end = input.table(header.table.0, entries, &mut |_, entry| {
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
    let Some(header) = ParallelsHeader::padded(&input.read(0, ParallelsHeader::LEN)?) else {
        return Ok(None);
    };
    let (sectors, entries) = (u64::from(header.block), u64::from(header.entries));
    let unit = match header.magic == PARALLELS_BLOCKS_MAGIC {
        true => sectors.saturating_mul(512),
        false => 512,
    };
    let mut end = 0u64;
    let table_at = ParallelsHeader::LEN as u64;
    let table_end = input.table(table_at, entries, &mut |_, entry| {
        let at = u64::from(u32::from_le_bytes(entry));
        if at != 0 {
            end = end.max(at.saturating_mul(unit).saturating_add(sectors * 512));
        }
    })?;
    Ok(table_end.map(|t| end.max(t)))
}

// ---- VHDX ----

const BAT_REGION: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA_REGION: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");
const FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const VIRTUAL_SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
const SECTOR_SIZE: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");

/// The items of the metadata region of a VHDX, by their ids: offset in the file and length.
pub(super) fn vhdx_metadata(file: &dyn ReadAt, size: u64) -> io::Result<Vec<(Uuid, u64, u64)>> {
    let input = Input { file, size };
    let Some(VhdxRegion { offset: at, .. }) = vhdx_region(&input, METADATA_REGION)? else {
        return Ok(Vec::new());
    };
    let table = input.read(at, 64 << 10)?;
    let header = VhdxMetadataTable::read(&table);
    let Some(header) = header.filter(|header| header.signature == *b"metadata") else {
        return Ok(Vec::new());
    };
    let count = usize::from(header.entries).min(VHDX_ENTRIES);
    let entries = table.chunks_exact(VhdxMetadata::LEN);
    let entries = entries.skip(1).take(count).filter_map(VhdxMetadata::read);
    let place = |item: VhdxMetadata| {
        let offset = at.saturating_add(item.offset.into());
        (item.id, offset, item.len.into())
    };
    Ok(entries.map(place).collect())
}

/// The range of a region.
fn vhdx_region(input: &Input, wanted: Uuid) -> io::Result<Option<VhdxRegion>> {
    let regions = vhdx_regions(input)?;
    Ok(regions.into_iter().find(|region| region.id == wanted))
}

/// The regions of the first valid region table.
fn vhdx_regions(input: &Input) -> io::Result<Vec<VhdxRegion>> {
    for table_at in [192 << 10, 256 << 10] {
        let table = input.read(table_at, 64 << 10)?;
        let header = VhdxRegionTable::read(&table);
        if let Some(header) = header.filter(|header| header.signature == *b"regi") {
            let entries = table[VhdxRegionTable::LEN..].chunks_exact(VhdxRegion::LEN);
            let count = (header.entries as usize).min(VHDX_ENTRIES);
            return Ok(entries.take(count).filter_map(VhdxRegion::read).collect());
        }
    }
    Ok(Vec::new())
}

fn vhdx(input: &Input) -> io::Result<Option<u64>> {
    // [MS-VHDX] 2.5.1.1: present, and partly present over a parent.
    const PRESENT: [u64; 2] = [6, 7];
    let Some(bat) = vhdx_region(input, BAT_REGION)? else {
        // The tables are in the first 320 KiB, the regions after them.
        let headers = input.read(0, VHDX_MAGIC.len())? == VHDX_MAGIC && input.size < 1 << 20;
        return Ok(headers.then_some(1 << 20));
    };
    let metadata = vhdx_metadata(input.file, input.size)?;
    let item = |id: Uuid, len: usize| -> io::Result<u64> {
        match metadata.iter().find(|(found, ..)| *found == id) {
            Some((_, at, _)) => Ok(number(&input.read(*at, len)?)),
            None => Ok(0),
        }
    };
    let block = item(FILE_PARAMETERS, 4)?;
    let disk = item(VIRTUAL_SIZE, 8)?;
    let sector = item(SECTOR_SIZE, 4)?;
    let regions = vhdx_regions(input)?.into_iter();
    let ends = regions.map(|region| region.offset.saturating_add(region.len.into()));
    let end_of_regions = ends.max().unwrap_or(0);
    if !block.is_power_of_two() || block < 1 << 20 || disk == 0 || sector == 0 {
        return Ok(Some(end_of_regions));
    }
    // After so many blocks there is an entry for a bitmap of sectors.
    let ratio = (sector << 23) / block;
    let blocks = disk.div_ceil(block);
    let entries = blocks + (blocks - 1) / ratio.max(1);
    let mut end = end_of_regions;
    input.table(bat.offset, entries, &mut |i, entry| {
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

/// The part of a [`VmdkMarker`] that precedes the data of a compressed grain.
const BEFORE_DATA: u64 = 12;

/// A hosted sparse image (`KDMV`) or one of ESX (`COWD`).
fn sparse_vmdk(input: &Input) -> io::Result<Option<u64>> {
    const COMPRESSED: u32 = 1 << 16;
    const AT_END: u64 = u64::MAX;
    let head = input.read(0, VmdkHeader::LEN)?;
    if let Some(header) = CowdHeader::padded(&head).filter(|h| h.magic == COWD_MAGIC) {
        let grains = Grains {
            directory: header.directory.into(),
            tables: header.tables.into(),
            per_table: 4096,
            grain: header.grain.into(),
            disk: header.capacity.into(),
            packed: false,
        };
        return grains.end(input);
    }
    let Some(mut header) = VmdkHeader::of(&head) else {
        return Ok(None);
    };
    if header.directory == AT_END {
        // The footer has the same header with the offset of the directory.
        let footer = input.read(input.size.saturating_sub(1024), VmdkHeader::LEN)?;
        match VmdkHeader::of(&footer) {
            Some(footer) => header = footer,
            None => return stream_end(input, header.overhead).map(Some),
        }
    }
    let (disk, grain, per_table) = (header.capacity, header.grain, header.per_table.into());
    let tables = match grain.checked_mul(per_table) {
        Some(sectors) if sectors > 0 => disk.div_ceil(sectors),
        _ => return Ok(None),
    };
    let packed = header.flags & COMPRESSED != 0;
    let grains = Grains {
        directory: header.directory,
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
            let marker = VmdkMarker::padded(&input.read(last_grain * 512, VmdkMarker::LEN)?);
            let len = marker.map_or(0, |marker| u64::from(marker.len));
            end = end.max(last_grain * 512 + BEFORE_DATA + len);
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
        let marker = VmdkMarker::padded(&input.read(at, VmdkMarker::LEN)?);
        // The end of the stream, or nothing: a hole is not traversed sector by sector.
        let Some(marker) = marker.filter(|marker| (marker.value, marker.len) != (0, 0)) else {
            break;
        };
        let piece = match marker.len {
            0 => marker.value.saturating_mul(512).saturating_add(512),
            len => (BEFORE_DATA + u64::from(len)).next_multiple_of(512),
        };
        at = at.saturating_add(piece);
    }
    Ok(at.max(input.size).saturating_add(FOOTER))
}

fn se_sparse(input: &Input) -> io::Result<Option<u64>> {
    let sane = 1..=1 << 12;
    let header = SeSparseHeader::padded(&input.read(0, SeSparseHeader::LEN)?);
    let Some(header) = header.filter(|h| {
        h.magic == SE_SPARSE_MAGIC && sane.contains(&h.grain) && sane.contains(&h.table)
    }) else {
        return Ok(None);
    };
    let (disk, grain, table) = (header.capacity, header.grain, header.table);
    let bytes = |sectors: u64| sectors.saturating_mul(512);
    let (directory, length) = (bytes(header.directory), bytes(header.directory_len));
    let (tables, data) = (bytes(header.tables), bytes(header.data));
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
