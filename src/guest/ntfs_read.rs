//! Reads an NTFS volume: index lookups, directories, file data by runs, volume state
//! (`ntfs_state`).
//!
//! The crate `ntfs` (0.4) is not used for several reasons. It takes the first extent of a
//! fragmented attribute for all of it in two cases that are usual on Windows. Either that extent
//! stays in the base record, or the extents differ in their instance numbers. It returns stale
//! clusters behind the initialized size. It cannot read past the first extent of a fragmented
//! `$MFT`, and reads record 0 again for every record. It follows cyclic indexes and allocates index
//! blocks of any size. The tests use it as a second reader.
//!
//! The contents of files, compressed or not, are read by `ntfs_data`. Lookups compare with the
//! volume's own `$UpCase` table.

use std::cell::{OnceCell, RefCell};
use std::cmp::Ordering;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use super::fs::{self, NtfsFacts, le16};
use super::ntfs_layout::IndexRoot;
use super::ntfs_record::{
    self as rec, Body, ClusterRun, FileName, MftRecord, RecordFault, index_entries,
};
use super::{FileInfo, FileKind, GuestError, GuestPath};
use crate::block::BlockRead;

const FILE_ROOT: u64 = 5;
const FILE_UPCASE: u64 = 10;
/// The first record of user files; those below belong to NTFS itself.
const FIRST_USER_RECORD: u64 = 16;

const UPCASE_BYTES: usize = 128 << 10;
/// The size of the pieces in which the MFT is read, because neighbours are often needed together.
const MFT_CHUNK: u64 = 16 << 10;
const MFT_CHUNKS_KEPT: usize = 128;
const PATHS_KEPT: usize = 4096;
const MAX_INDEX_DEPTH: usize = 32;
const MAX_INDEX_BLOCK: u32 = 64 << 10;
const MAX_INDEX_BYTES: u64 = 256 << 20;
/// The most entries of a directory that is listed as a whole: WinSxS has some ten thousand.
const MAX_ENTRIES: usize = 500_000;
const MAX_LIST_BYTES: u64 = 1 << 20;
pub(super) const BULK: usize = 1 << 20;

const I30: &[u16] = &[b'$' as u16, b'I' as u16, b'3' as u16, b'0' as u16];

/// A fault without the path.
#[derive(Debug, thiserror::Error)]
pub enum ReadFault {
    #[error("{0}")]
    RecordFault(RecordFault),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<RecordFault> for ReadFault {
    fn from(fault: RecordFault) -> Self {
        Self::RecordFault(fault)
    }
}

impl From<&'static str> for ReadFault {
    fn from(what: &'static str) -> Self {
        Self::RecordFault(what.into())
    }
}

impl ReadFault {
    pub fn at(self, path: &GuestPath) -> GuestError {
        match self {
            Self::RecordFault(fault) => unreadable(path, fault.to_string()),
            Self::Io(error) => GuestError::Io(error),
        }
    }
}

pub(super) fn unreadable(path: &GuestPath, reason: impl Into<String>) -> GuestError {
    GuestError::Unreadable {
        path: path.to_string(),
        reason: reason.into(),
    }
}

pub(super) type Fallible<T> = Result<T, ReadFault>;

/// An attribute assembled from all records over which it is spread.
pub(super) struct Stream {
    pub flags: u16,
    pub data: StreamData,
}

pub(super) enum StreamData {
    Resident(Vec<u8>),
    Runs {
        size: u64,
        initialized: u64,
        /// As in [`Body::NonResident`].
        unit: u8,
        runs: Vec<ClusterRun>,
    },
}

impl Stream {
    pub fn size(&self) -> u64 {
        match &self.data {
            StreamData::Resident(value) => value.len() as u64,
            StreamData::Runs { size, .. } => *size,
        }
    }

    /// The clusters of the attribute; none if it lies in its MFT record.
    pub fn runs(&self) -> &[ClusterRun] {
        match &self.data {
            StreamData::Resident(_) => &[],
            StreamData::Runs { runs, .. } => runs,
        }
    }

    /// Whether it is neither compressed nor encrypted nor sparse.
    pub fn is_plain(&self) -> bool {
        self.flags == 0
    }
}

/// A file found by its path.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub record: u64,
    name: String,
}

/// The location of a volume's clusters, for reads on any thread.
#[derive(Clone, Copy)]
pub(super) struct VolumePlace<'a> {
    disk: &'a dyn BlockRead,
    start: u64,
    len: u64,
    cluster: u64,
}

impl VolumePlace<'_> {
    pub(super) fn read_volume(&self, at: u64, buf: &mut [u8]) -> Fallible<()> {
        at.checked_add(buf.len() as u64)
            .filter(|end| *end <= self.len)
            .ok_or("the data lies outside the partition")?;
        Ok(self.disk.read_at(self.start + at, buf)?)
    }

    /// Fills `buf` from `offset`, which must lie inside the stream. One request per run.
    pub(super) fn read_stream(&self, stream: &Stream, offset: u64, buf: &mut [u8]) -> Fallible<()> {
        let (initialized, runs) = match &stream.data {
            StreamData::Resident(value) => {
                let part = usize::try_from(offset)
                    .ok()
                    .and_then(|at| value.get(at..at.checked_add(buf.len())?))
                    .ok_or("reading past the end of a file")?;
                buf.copy_from_slice(part);
                return Ok(());
            }
            StreamData::Runs {
                initialized, runs, ..
            } => (*initialized, runs),
        };
        // Ranges that were never written read as zeroes, whatever their clusters contain.
        let valid = initialized.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (mut buf, tail) = buf.split_at_mut(valid);
        tail.fill(0);
        let cluster = self.cluster;
        let mut at = offset;
        let mut next = runs.partition_point(|run| run.end() <= at / cluster);
        while !buf.is_empty() {
            let run = runs
                .get(next)
                .ok_or("the file has fewer clusters than bytes")?;
            let end = run.end().saturating_mul(cluster);
            let n = (end - at).min(buf.len() as u64) as usize;
            let (part, rest) = buf.split_at_mut(n);
            match run.lcn {
                Some(lcn) => {
                    self.read_volume(lcn * cluster + (at - run.vcn * cluster), part)?;
                }
                None => part.fill(0),
            }
            buf = rest;
            at += n as u64;
            next += 1;
        }
        Ok(())
    }
}

/// An NTFS volume at `start` of a disk.
pub struct NtfsVolume {
    disk: Arc<dyn BlockRead>,
    start: u64,
    len: u64,
    pub(super) facts: NtfsFacts,
    mft: Stream,
    upcase: OnceCell<Vec<u16>>,
    chunks: RefCell<HashMap<u64, Vec<u8>>>,
    paths: RefCell<HashMap<String, Found>>,
}

impl NtfsVolume {
    pub fn open(disk: Arc<dyn BlockRead>, start: u64, len: u64) -> Fallible<Self> {
        let mut boot = vec![0; 512];
        disk.read_at(start, &mut boot)?;
        let facts = fs::ntfs(&boot)?;
        let mut volume = Self {
            disk,
            start,
            len,
            facts,
            mft: Stream {
                flags: 0,
                data: StreamData::Resident(Vec::new()),
            },
            upcase: OnceCell::new(),
            chunks: RefCell::default(),
            paths: RefCell::default(),
        };
        volume.open_mft()?;
        Ok(volume)
    }

    /// The offset of the volume on the disk.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    pub(super) fn clusters(&self) -> u64 {
        let bytes = self.facts.total_sectors * u64::from(self.facts.bytes_per_sector);
        bytes / u64::from(self.facts.cluster_size)
    }

    /// Reads the map of the MFT. It is in the MFT itself: its later parts are found through the
    /// earlier ones.
    fn open_mft(&mut self) -> Fallible<()> {
        let at = self
            .facts
            .mft_lcn
            .checked_mul(u64::from(self.facts.cluster_size))
            .ok_or("the MFT lies outside the volume")?;
        let mut bytes = vec![0; self.facts.record_size as usize];
        self.read_volume(at, &mut bytes)?;
        let base = MftRecord::parse(bytes)?;
        self.mft = match base.find(rec::AT_DATA, &[])? {
            Some(first) => Stream {
                flags: first.flags,
                data: self.extent(&first.body, None)?,
            },
            None => return Err("the MFT has no data".into()),
        };
        let Some(list) = self.attribute_list(&base)? else {
            return Ok(());
        };
        for entry in rec::list_entries(&list, rec::AT_DATA, &[])? {
            if entry.lowest_vcn == 0 {
                continue;
            }
            let record = self.record(entry.record)?;
            let part = self.list_part(&record, 0, &entry, (rec::AT_DATA, &[]))?;
            let so_far = std::mem::replace(&mut self.mft.data, StreamData::Resident(Vec::new()));
            self.mft.data = self.extent(&part.body, Some(so_far))?;
        }
        Ok(())
    }

    /// Reads bytes of the volume; `at` is relative to its start.
    pub(super) fn read_volume(&self, at: u64, buf: &mut [u8]) -> Fallible<()> {
        self.place().read_volume(at, buf)
    }

    pub(super) fn place(&self) -> VolumePlace<'_> {
        VolumePlace {
            disk: self.disk.as_ref(),
            start: self.start,
            len: self.len,
            cluster: u64::from(self.facts.cluster_size),
        }
    }

    /// Appends a part of an attribute to the previous ones.
    fn extent(&self, body: &Body<'_>, before: Option<StreamData>) -> Fallible<StreamData> {
        match (*body, before) {
            (Body::Resident(value), None) => Ok(StreamData::Resident(value.to_vec())),
            (
                Body::NonResident {
                    lowest_vcn,
                    size,
                    initialized,
                    unit,
                    mapping,
                },
                before,
            ) => {
                let (size, initialized, unit, mut runs) = match before {
                    None => (size, initialized.min(size), unit, Vec::new()),
                    Some(StreamData::Runs {
                        size,
                        initialized,
                        unit,
                        runs,
                    }) => (size, initialized, unit, runs),
                    Some(StreamData::Resident(_)) => {
                        return Err("a resident attribute is continued".into());
                    }
                };
                rec::decode_runs(mapping, lowest_vcn, self.clusters(), &mut runs)?;
                Ok(StreamData::Runs {
                    size,
                    initialized,
                    unit,
                    runs,
                })
            }
            (Body::Resident(_), Some(_)) => Err("an attribute is continued in a record".into()),
        }
    }

    fn attribute_list(&self, base: &MftRecord) -> Fallible<Option<Vec<u8>>> {
        let Some(list) = base.find(rec::AT_ATTRIBUTE_LIST, &[])? else {
            return Ok(None);
        };
        let stream = Stream {
            flags: list.flags,
            data: self.extent(&list.body, None)?,
        };
        Ok(Some(self.read_all(
            &stream,
            MAX_LIST_BYTES,
            "the attribute list is too large",
        )?))
    }

    /// The part of an attribute that a list entry names, in the named record.
    fn list_part<'r>(
        &self,
        record: &'r MftRecord,
        base: u64,
        entry: &rec::ListEntry,
        (kind, name): (u32, &[u16]),
    ) -> Fallible<rec::Attribute<'r>> {
        if entry.record != base && (record.base() != base || !record.in_use()) {
            return Err("an attribute list leads to a record of another file".into());
        }
        for attribute in record.attributes() {
            let attribute = attribute?;
            if attribute.kind == kind
                && attribute.instance == entry.instance
                && attribute.name_is(name)
            {
                return Ok(attribute);
            }
        }
        Err("a part of an attribute is missing".into())
    }

    /// The record of a file, from the cache if it is there.
    fn record(&self, number: u64) -> Fallible<MftRecord> {
        let size = u64::from(self.facts.record_size);
        let at = number
            .checked_mul(size)
            .filter(|at| {
                at.checked_add(size)
                    .is_some_and(|end| end <= self.mft.size())
            })
            .ok_or("a file reference lies outside the MFT")?;
        let chunk_size = MFT_CHUNK.max(size);
        let chunk = at / chunk_size;
        let mut chunks = self.chunks.borrow_mut();
        if !chunks.contains_key(&chunk) {
            if chunks.len() >= MFT_CHUNKS_KEPT {
                chunks.clear();
            }
            let first = chunk * chunk_size;
            let mut bytes = vec![0; chunk_size.min(self.mft.size() - first) as usize];
            match self.read_stream(&self.mft, first, &mut bytes) {
                Ok(()) => {}
                // While the map of the MFT is still growing, the end of a piece may be unknown.
                Err(ReadFault::RecordFault(_)) => {
                    bytes.truncate(size as usize);
                    self.read_stream(&self.mft, at, &mut bytes)?;
                    return Ok(MftRecord::parse(bytes)?);
                }
                Err(error) => return Err(error),
            }
            chunks.insert(chunk, bytes);
        }
        let from = (at % chunk_size) as usize;
        let bytes = chunks
            .get(&chunk)
            .and_then(|bytes| bytes.get(from..from + size as usize))
            .ok_or("a file reference lies outside the MFT")?;
        Ok(MftRecord::parse(bytes.to_vec())?)
    }

    /// The base record to which a directory entry or a path leads.
    pub(super) fn file_record(&self, number: u64) -> Fallible<MftRecord> {
        let record = self.record(number)?;
        if !record.in_use() || record.base() != 0 {
            return Err("the directory entry leads to a record that is not in use".into());
        }
        Ok(record)
    }

    /// An attribute of a file with all its parts.
    pub(super) fn stream(
        &self,
        number: u64,
        base: &MftRecord,
        kind: u32,
        name: &[u16],
    ) -> Fallible<Option<Stream>> {
        let Some(list) = self.attribute_list(base)? else {
            return match base.find(kind, name)? {
                Some(attribute) => Ok(Some(Stream {
                    flags: attribute.flags,
                    data: self.extent(&attribute.body, None)?,
                })),
                None => Ok(None),
            };
        };
        let mut stream: Option<Stream> = None;
        for entry in rec::list_entries(&list, kind, name)? {
            let elsewhere;
            let record = if entry.record == number {
                base
            } else {
                elsewhere = self.record(entry.record)?;
                &elsewhere
            };
            let part = self.list_part(record, number, &entry, (kind, name))?;
            let flags = stream.as_ref().map_or(part.flags, |s| s.flags);
            let data = self.extent(&part.body, stream.map(|s| s.data))?;
            stream = Some(Stream { flags, data });
        }
        Ok(stream)
    }

    /// Fills `buf` from `offset`, which must lie inside the stream. One request per run.
    pub(super) fn read_stream(&self, stream: &Stream, offset: u64, buf: &mut [u8]) -> Fallible<()> {
        self.place().read_stream(stream, offset, buf)
    }

    /// Announces to the disk that parts of a stream will be read.
    pub(super) fn expect(&self, stream: &Stream, parts: &[std::ops::Range<u64>]) {
        let cluster = u64::from(self.facts.cluster_size);
        let mut places = Vec::new();
        for part in parts {
            for run in stream.runs() {
                let begin = run.vcn.saturating_mul(cluster);
                let first = part.start.max(begin);
                let end = part.end.min(run.end().saturating_mul(cluster));
                if let Some(lcn) = run.lcn.filter(|_| first < end) {
                    let inside = lcn.saturating_mul(cluster).saturating_add(first - begin);
                    let start = self.start.saturating_add(inside);
                    places.push(start..start.saturating_add(end - first));
                }
            }
        }
        self.disk.expect(&places);
    }

    pub(super) fn read_all(
        &self,
        stream: &Stream,
        limit: u64,
        too_large: &'static str,
    ) -> Fallible<Vec<u8>> {
        if stream.size() > limit {
            return Err(too_large.into());
        }
        let mut bytes = vec![0; stream.size() as usize];
        self.read_stream(stream, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn upcase(&self) -> Fallible<&[u16]> {
        if let Some(table) = self.upcase.get() {
            return Ok(table);
        }
        let record = self.file_record(FILE_UPCASE)?;
        let stream = self
            .stream(FILE_UPCASE, &record, rec::AT_DATA, &[])?
            .ok_or("$UpCase has no data")?;
        let bytes = self.read_all(&stream, UPCASE_BYTES as u64, "$UpCase is too large")?;
        let mut table: Vec<u16> = (0..=u16::MAX).collect();
        for (upper, unit) in table.iter_mut().zip(bytes.chunks_exact(2)) {
            *upper = le16(unit, 0);
        }
        Ok(self.upcase.get_or_init(|| table))
    }

    fn compare(&self, a: &[u16], b: &FileName<'_>) -> Fallible<Ordering> {
        let table = self.upcase()?;
        let upper = |unit: u16| table.get(usize::from(unit)).copied().unwrap_or(unit);
        let a = a.iter().map(|unit| upper(*unit));
        Ok(a.cmp(b.units().map(upper)))
    }

    /// The size of a directory's blocks, and the first node of its index.
    fn index_root(&self, number: u64, dir: &MftRecord) -> Fallible<(u32, Vec<u8>)> {
        let root = self
            .stream(number, dir, rec::AT_INDEX_ROOT, I30)?
            .ok_or("a directory has no index")?;
        let StreamData::Resident(root) = &root.data else {
            return Err("a directory has an invalid index".into());
        };
        let node = root.get(IndexRoot::LEN..).unwrap_or_default().to_vec();
        Ok((self.index_block_size(root)?, node))
    }

    /// Finds a name in a directory by descending its B-tree.
    fn lookup(&self, number: u64, dir: &MftRecord, name: &str) -> Fallible<Option<Found>> {
        let wanted: Vec<u16> = name.encode_utf16().collect();
        let (block_size, root) = self.index_root(number, dir)?;
        let mut node = root;
        let mut blocks: Option<Stream> = None;
        for _ in 0..MAX_INDEX_DEPTH {
            let subnode = match self.search_node(&node, &wanted)? {
                Search::Found(found) => return Ok(Some(found)),
                Search::Absent => return Ok(None),
                Search::Below(subnode) => subnode,
            };
            let stream = match &blocks {
                Some(stream) => stream,
                None => {
                    let stream = self.stream(number, dir, rec::AT_INDEX_ALLOCATION, I30)?;
                    blocks.insert(stream.ok_or("a directory lacks a part of its index")?)
                }
            };
            let unit = self.index_vcn_unit(block_size);
            let at = subnode
                .checked_mul(unit)
                .filter(|at| *at <= stream.size().saturating_sub(u64::from(block_size)))
                .ok_or("an index block lies outside its directory")?;
            let mut block = vec![0; block_size as usize];
            self.read_stream(stream, at, &mut block)?;
            node = rec::index_block(&mut block, subnode)?.to_vec();
        }
        Err("the directory index is too deep".into())
    }

    fn search_node(&self, node: &[u8], wanted: &[u16]) -> Fallible<Search> {
        for entry in index_entries(node)? {
            let entry = entry?;
            let order = match &entry.key {
                Some(key) => self.compare(wanted, key)?,
                None => Ordering::Less,
            };
            match (order, entry.key) {
                (Ordering::Greater, _) => {}
                (Ordering::Equal, Some(key)) => {
                    let record = rec::record_number(entry.reference);
                    let units: Vec<u16> = key.units().collect();
                    self.check_sequence(entry.reference)?;
                    return Ok(Search::Found(Found {
                        record,
                        name: String::from_utf16_lossy(&units),
                    }));
                }
                _ => return Ok(entry.subnode.map_or(Search::Absent, Search::Below)),
            }
        }
        Err("an index node has no end".into())
    }

    /// Checks the sequence number in a directory entry, which is that of the file at its creation.
    fn check_sequence(&self, reference: u64) -> Fallible<()> {
        let sequence = (reference >> 48) as u16;
        let record = self.file_record(rec::record_number(reference))?;
        if sequence != 0 && record.sequence() != sequence {
            return Err("the directory entry leads to a file that was deleted".into());
        }
        Ok(())
    }

    fn index_block_size(&self, root: &[u8]) -> Fallible<u32> {
        let root = IndexRoot::read(root).ok_or("a directory has an invalid index")?;
        let size = root.block_size;
        if root.kind != rec::AT_FILE_NAME
            || !size.is_power_of_two()
            || !(512..=MAX_INDEX_BLOCK).contains(&size)
        {
            return Err("a directory has an invalid index".into());
        }
        Ok(size)
    }

    /// The unit of index block numbers: clusters, or 512 bytes if clusters are larger.
    fn index_vcn_unit(&self, block_size: u32) -> u64 {
        if self.facts.cluster_size <= block_size {
            u64::from(self.facts.cluster_size)
        } else {
            512
        }
    }

    /// Finds a file; `None` if it or one of its parents does not exist.
    pub(super) fn find(&self, path: &GuestPath) -> Fallible<Option<Found>> {
        if path.is_root() {
            return Ok(Some(Found {
                record: FILE_ROOT,
                name: String::new(),
            }));
        }
        let key = path.to_string();
        if let Some(found) = self.paths.borrow().get(&key) {
            return Ok(Some(found.clone()));
        }
        let (Some(parent), Some(name)) = (path.parent(), path.name()) else {
            return Ok(None);
        };
        // As deep as GuestPath allows, which is 64.
        let Some(dir) = self.find(&parent)? else {
            return Ok(None);
        };
        let record = self.file_record(dir.record)?;
        if !record.is_dir() {
            return Ok(None);
        }
        let found = self.lookup(dir.record, &record, name)?;
        if let Some(found) = &found {
            let mut paths = self.paths.borrow_mut();
            if paths.len() >= PATHS_KEPT {
                paths.clear();
            }
            paths.insert(key, found.clone());
        }
        Ok(found)
    }

    pub fn stat(&self, path: &GuestPath) -> Fallible<Option<FileInfo>> {
        let Some(found) = self.find(path)? else {
            return Ok(None);
        };
        let record = self.file_record(found.record)?;
        let data = if record.is_dir() {
            None
        } else {
            self.stream(found.record, &record, rec::AT_DATA, &[])?
        };
        let flags = data.as_ref().map_or(0, |data| data.flags);
        Ok(Some(FileInfo {
            kind: if record.is_dir() {
                FileKind::Dir
            } else {
                FileKind::File
            },
            size: data.as_ref().map_or(0, Stream::size),
            reparse_tag: self.reparse_tag(found.record, &record)?,
            compressed: flags & rec::COMPRESSED != 0,
            encrypted: flags & rec::ENCRYPTED != 0,
            name: found.name,
        }))
    }

    pub(super) fn reparse_tag(&self, number: u64, record: &MftRecord) -> Fallible<Option<u32>> {
        let Some(stream) = self.stream(number, record, rec::AT_REPARSE_POINT, &[])? else {
            return Ok(None);
        };
        let mut tag = [0; 4];
        if stream.size() < 4 {
            return Err("a reparse point is too short".into());
        }
        self.read_stream(&stream, 0, &mut tag)?;
        Ok(Some(u32::from_le_bytes(tag)))
    }

    /// The file that must exist at `path`, with its record.
    pub(super) fn existing(&self, path: &GuestPath) -> Result<(Found, MftRecord), GuestError> {
        let found = self.find(path).map_err(|e| e.at(path))?;
        let found = found.ok_or_else(|| GuestError::not_found(path))?;
        let record = self.file_record(found.record).map_err(|e| e.at(path))?;
        Ok((found, record))
    }

    /// Entries of a directory, sorted by name. Sizes and flags are those in the directory index,
    /// which Windows updates when a file is closed through this name; `stat` reads the file itself.
    pub fn list(&self, path: &GuestPath) -> Result<Vec<FileInfo>, GuestError> {
        let (found, record) = self.existing(path)?;
        if !record.is_dir() {
            return Err(GuestError::wrong_kind(path, "directory"));
        }
        let mut entries = self
            .entries(found.record, &record)
            .map_err(|e| e.at(path))?;
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Reads the blocks in disk order and not down the tree: large reads, and no loops.
    pub(super) fn entries(&self, number: u64, dir: &MftRecord) -> Fallible<Vec<FileInfo>> {
        let (block_size, root) = self.index_root(number, dir)?;
        let mut entries = Vec::new();
        collect_entries(&root, &mut entries)?;
        let Some(blocks) = self.stream(number, dir, rec::AT_INDEX_ALLOCATION, I30)? else {
            return Ok(entries);
        };
        let bitmap = self
            .stream(number, dir, rec::AT_BITMAP, I30)?
            .ok_or("a directory lacks a part of its index")?;
        let bitmap = self.read_all(&bitmap, MAX_INDEX_BYTES / 512, "a directory is too large")?;
        if blocks.size() > MAX_INDEX_BYTES {
            return Err("a directory is too large".into());
        }
        let unit = self.index_vcn_unit(block_size);
        let step = BULK.max(block_size as usize);
        let mut chunk = Vec::new();
        for at in (0..blocks.size()).step_by(step) {
            chunk.resize((blocks.size() - at).min(step as u64) as usize, 0);
            self.read_stream(&blocks, at, &mut chunk)?;
            let first = at / u64::from(block_size);
            for (i, block) in chunk.chunks_exact_mut(block_size as usize).enumerate() {
                let index = first + i as u64;
                let byte = bitmap.get((index / 8) as usize).copied().unwrap_or(0);
                if byte >> (index % 8) & 1 == 1 {
                    let vcn = index * u64::from(block_size) / unit;
                    collect_entries(rec::index_block(block, vcn)?, &mut entries)?;
                }
            }
        }
        Ok(entries)
    }
}

enum Search {
    Found(Found),
    Absent,
    Below(u64),
}

/// Adds the entries of a node to a listing, except those that are not files of the user.
fn collect_entries(node: &[u8], entries: &mut Vec<FileInfo>) -> Fallible<()> {
    for entry in index_entries(node)? {
        let entry = entry?;
        let Some(key) = entry.key else { continue };
        if entries.len() >= MAX_ENTRIES {
            return Err("a directory has too many entries".into());
        }
        if key.is_dos() || rec::record_number(entry.reference) < FIRST_USER_RECORD {
            continue;
        }
        let units: Vec<u16> = key.units().collect();
        let attributes = key.attributes();
        let dir = attributes & rec::FILE_ATTR_DIRECTORY != 0;
        entries.push(FileInfo {
            name: String::from_utf16_lossy(&units),
            kind: if dir { FileKind::Dir } else { FileKind::File },
            size: if dir { 0 } else { key.size() },
            reparse_tag: key.reparse_tag(),
            compressed: !dir && attributes & rec::FILE_ATTR_COMPRESSED != 0,
            encrypted: !dir && attributes & rec::FILE_ATTR_ENCRYPTED != 0,
        });
    }
    Ok(())
}

#[cfg(test)]
#[path = "ntfs_read_tests.rs"]
mod tests;
