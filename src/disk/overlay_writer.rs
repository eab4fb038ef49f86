//! [`OverlayWriter`]: writes changes of a plain file to a qcow2, without a storage daemon.
//!
//! Specification: `docs/interop/qcow2.rst` of QEMU. The overlay was created by [`super::empty`].
//! The first write to a part of 64 KiB copies the rest of it from below. Tables are kept in memory
//! and written by a flush: until then the file is an empty image, whatever ends the run. Nothing is
//! made durable here; that is left to code that keeps the overlay.
//!
//! The result is read back by other code ([`super::overlay`]) and by QEMU.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::clusters::Clusters;
use super::direct::read_at;
use super::empty::{FIRST_OF_LEVEL_1, overlay_shape};
use super::qcow2::{COPIED, SUBCLUSTERS, ZERO};
use crate::block::{BlockRead, BlockWrite, check_range, is_zero};
use crate::bytes::be64;

/// The unit of writing: a cluster, or a subcluster of a large one.
const PART: u64 = 64 << 10;

/// Clusters that are written at most: 64 GiB of a small disk. A fix writes some hundreds; these take 64 MiB of memory.
const MOST_PLACES: usize = 1 << 20;

pub(super) struct OverlayWriter {
    file: File,
    below: Arc<dyn BlockRead>,
    size: u64,
    state: Mutex<State>,
}

struct State {
    /// Size of a cluster in bytes.
    cluster: u64,
    /// Size of an entry of the second level in bytes.
    entry: u64,
    clusters: Clusters,
    /// The allocated clusters of the disk by number.
    places: BTreeMap<u64, Place>,
    most_places: usize,
    /// The parts that read as zeroes, one bit for each, by table and cluster. A guest decides how scattered they are:
    /// this takes 2 MiB for a TiB at most.
    zeroes: BTreeMap<u64, Vec<u32>>,
    /// The offsets of the second-level tables by their index in the first.
    tables: BTreeMap<u64, u64>,
    /// Tables with changes that are not written yet.
    changed: BTreeSet<u64>,
}

/// A cluster in the file.
#[derive(Clone, Copy)]
struct Place {
    at: u64,
    /// The written parts, one bit for each.
    written: u32,
}

/// The unit in which a table is written.
const BLOCK: u64 = 4096;

/// The location of bytes of the disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    File(u64),
    Zeroes,
    Below,
}

impl OverlayWriter {
    /// Opens an overlay that was just created over `below`.
    pub(super) fn open(overlay: &Path, below: Arc<dyn BlockRead>) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(overlay)?;
        let size = below.size();
        let (cluster, entry) = overlay_shape(size);
        let end = file.metadata()?.len() / cluster;
        Ok(Self {
            below,
            size,
            state: Mutex::new(State {
                cluster,
                entry,
                clusters: Clusters::of(&file, cluster, end)?,
                places: BTreeMap::new(),
                most_places: MOST_PLACES,
                zeroes: BTreeMap::new(),
                tables: BTreeMap::new(),
                changed: BTreeSet::new(),
            }),
            file,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, state: &State, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut rest = buf;
        for (range, content) in state.contents(offset..offset + rest.len() as u64) {
            let (now, later) = rest.split_at_mut((range.end - range.start) as usize);
            match content {
                Content::File(at) => read_at(&self.file, now, at)?,
                Content::Zeroes => now.fill(0),
                Content::Below => self.below.read_at(range.start, now)?,
            }
            rest = later;
        }
        Ok(())
    }

    /// Reads the part at that offset, with zeroes behind the end of the disk.
    fn part(&self, state: &State, start: u64) -> io::Result<Vec<u8>> {
        let mut part = vec![0; PART as usize];
        let there = (self.size - start).min(PART) as usize;
        self.read(state, start, &mut part[..there])?;
        Ok(part)
    }

    fn write(&self, state: &mut State, offset: u64, data: &[u8]) -> io::Result<()> {
        // Contiguous ranges of the file are written together.
        let mut piece: Option<(u64, Range<usize>)> = None;
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let start = at / PART * PART;
            let inside = (at - start) as usize;
            let len = (PART as usize - inside).min(data.len() - done);
            let is_whole = len as u64 == PART.min(self.size - start);
            let content = state.content(start);
            let is_new = !matches!(content, Content::File(_));
            let old = (is_new && !is_whole).then(|| self.part(state, start));
            let place = state.take(start)?;
            let this = done..done + len;
            done += len;
            if let Some(old) = old {
                let mut part = old?;
                // What was never written in the file reads as zeroes.
                if content == Content::Below && is_zero(&part) {
                    let place = place + inside as u64;
                    self.file.write_all_at(&data[this], place)?;
                    continue;
                }
                part[inside..inside + len].copy_from_slice(&data[this]);
                self.file.write_all_at(&part, place)?;
                continue;
            }
            let place = place + inside as u64;
            match &mut piece {
                Some((at, range))
                    if *at + range.len() as u64 == place && range.end == this.start =>
                {
                    range.end = this.end;
                }
                _ => {
                    let before = piece.replace((place, this));
                    self.write_piece(before, data)?;
                }
            }
        }
        self.write_piece(piece, data)
    }

    fn write_piece(&self, piece: Option<(u64, Range<usize>)>, data: &[u8]) -> io::Result<()> {
        match piece {
            Some((at, range)) => self.file.write_all_at(&data[range], at),
            None => Ok(()),
        }
    }
}

impl State {
    /// Returns the table of a cluster, and the index of the cluster in it.
    fn slot(&self, number: u64) -> (u64, usize) {
        let per_table = self.cluster / self.entry;
        (number / per_table, (number % per_table) as usize)
    }

    /// Returns the parts of a cluster that read as zeroes.
    fn zeroes_of(&self, number: u64) -> u32 {
        let (table, i) = self.slot(number);
        let all = self.zeroes.get(&table);
        all.and_then(|all| all.get(i)).copied().unwrap_or_default()
    }

    /// The location of the part at that offset.
    fn content(&self, start: u64) -> Content {
        let inside = start % self.cluster;
        let place = self.places.get(&(start / self.cluster));
        match place {
            Some(place) if place.written >> (inside / PART) & 1 == 1 => {
                Content::File(place.at + inside)
            }
            _ if self.zeroes_of(start / self.cluster) >> (inside / PART) & 1 == 1 => {
                Content::Zeroes
            }
            _ => Content::Below,
        }
    }

    /// The parts of a range with their locations; neighbours are joined.
    fn contents(&self, range: Range<u64>) -> Vec<(Range<u64>, Content)> {
        let mut all: Vec<(Range<u64>, Content)> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let start = at / PART * PART;
            let end = (start + PART).min(range.end);
            let content = match self.content(start) {
                Content::File(place) => Content::File(place + (at - start)),
                other => other,
            };
            match all.last_mut() {
                Some((last, before)) if follows(*before, last.end - last.start, content) => {
                    last.end = end;
                }
                _ => all.push((at..end, content)),
            }
            at = end;
        }
        all
    }

    /// Allocates space in the file for the part at that offset, which is about to be written.
    fn take(&mut self, start: u64) -> io::Result<u64> {
        let (number, inside) = (start / self.cluster, start % self.cluster);
        let place = match self.places.get(&number) {
            Some(place) => *place,
            None if self.places.len() >= self.most_places => {
                let most = self.most_places;
                let what = format!("more than {most} clusters of an overlay were written");
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, what));
            }
            None => Place {
                at: self.clusters.take()?,
                written: 0,
            },
        };
        let written = place.written | 1 << (inside / PART);
        self.places.insert(number, Place { written, ..place });
        let (table, i) = self.slot(number);
        if let Some(parts) = self.zeroes.get_mut(&table).and_then(|all| all.get_mut(i)) {
            *parts &= !(1 << (inside / PART));
        }
        self.changed.insert(table);
        Ok(place.at + inside)
    }

    /// Makes whole parts read as zeroes.
    fn zero(&mut self, range: Range<u64>) {
        let numbers = range.start / self.cluster..range.end.div_ceil(self.cluster);
        let placed = self.places.range(numbers).map(|(number, _)| *number);
        for number in placed.collect::<Vec<_>>() {
            let zeroed = self.parts(number, &range) as u32;
            if let Some(place) = self.places.get_mut(&number) {
                place.written &= !zeroed;
            }
        }
        let per_table = (self.cluster / self.entry) as usize;
        for number in range.start / self.cluster..range.end.div_ceil(self.cluster) {
            let (table, i) = self.slot(number);
            let zeroed = self.parts(number, &range) as u32;
            let all = self.zeroes.entry(table);
            let all = all.or_insert_with(|| vec![0; per_table]);
            if let Some(parts) = all.get_mut(i) {
                *parts |= zeroed;
            }
            self.changed.insert(table);
        }
    }

    /// The present second-level table in its stored form: its blocks by number. Most of a table of a
    /// large disk is zero, as its place in the file is; no entry becomes zero again.
    fn table(&self, i: u64) -> BTreeMap<u64, Vec<u8>> {
        let entries = self.cluster / self.entry;
        let first = i * entries;
        let mut table: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        let mut set = |number: u64, word: u64, bitmap: u64| {
            let at = (number - first) * self.entry;
            let empty = || vec![0; BLOCK as usize];
            let block = table.entry(at / BLOCK).or_insert_with(empty);
            let at = (at % BLOCK) as usize;
            for (i, half) in [word, bitmap]
                .iter()
                .take(self.entry as usize / 8)
                .enumerate()
            {
                let bytes = &mut block[at + i * 8..at + i * 8 + 8];
                let all = be64(bytes, 0).unwrap_or_default() | half;
                bytes.copy_from_slice(&all.to_be_bytes());
            }
        };
        for (number, place) in self.places.range(first..first + entries) {
            set(*number, place.at | COPIED, u64::from(place.written));
        }
        for (number, parts) in (first..).zip(self.zeroes.get(&i).into_iter().flatten()) {
            // An allocated cluster keeps its space while it reads as zeroes.
            match (self.entry, *parts) {
                (_, 0) => {}
                (8, _) => set(number, ZERO, 0),
                (_, parts) => set(number, 0, u64::from(parts) << SUBCLUSTERS),
            }
        }
        table
    }

    /// The parts of a cluster that begin in a range, one bit for each.
    fn parts(&self, number: u64, range: &Range<u64>) -> u64 {
        let part = |at: u64| at.saturating_sub(number * self.cluster).div_ceil(PART);
        let (first, end) = (part(range.start), part(range.end).min(self.cluster / PART));
        (1 << end) - (1 << first)
    }
}

/// Whether content directly follows `len` bytes of other content.
fn follows(before: Content, len: u64, content: Content) -> bool {
    match (before, content) {
        (Content::File(first), Content::File(at)) => first + len == at,
        (before, content) => before == content,
    }
}

impl BlockRead for OverlayWriter {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        self.read(&self.lock(), offset, buf)
    }

    fn expect(&self, ranges: &[Range<u64>]) {
        self.below.expect(ranges);
    }
}

impl BlockWrite for OverlayWriter {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len() as u64, self.size)?;
        self.write(&mut self.lock(), offset, data)
    }

    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.size)?;
        let end = offset + len;
        // The last part ends with the disk.
        let whole_end = match end == self.size {
            true => end.next_multiple_of(PART),
            false => end / PART * PART,
        };
        let whole = offset.next_multiple_of(PART)..whole_end;
        let mut state = self.lock();
        let borders = match whole.start < whole.end {
            true => [offset..whole.start, whole.end.min(end)..end],
            false => [offset..end, end..end],
        };
        for border in borders.into_iter().filter(|border| !border.is_empty()) {
            let zeroes = vec![0; (border.end - border.start) as usize];
            self.write(&mut state, border.start, &zeroes)?;
        }
        if whole.start < whole.end {
            state.zero(whole);
        }
        Ok(())
    }

    /// Writes the tables.
    fn flush(&self) -> io::Result<()> {
        let mut state = self.lock();
        let changed = std::mem::take(&mut state.changed);
        let level_1 = FIRST_OF_LEVEL_1 * state.cluster;
        for i in changed {
            let at = match state.tables.get(&i) {
                Some(at) => *at,
                None => {
                    let at = state.clusters.take()?;
                    state.tables.insert(i, at);
                    at
                }
            };
            for (block, bytes) in state.table(i) {
                self.file.write_all_at(&bytes, at + block * BLOCK)?;
            }
            let entry = (at | COPIED).to_be_bytes();
            self.file.write_all_at(&entry, level_1 + i * 8)?;
        }
        state.clusters.write(&self.file)
    }
}

#[cfg(test)]
#[path = "overlay_writer_tests.rs"]
mod tests;
