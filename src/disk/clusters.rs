//! [`Clusters`]: the clusters of a qcow2 that only grows, and their reference counts.
//!
//! Each cluster of the file has one user, unless compressed data shares it. A cluster is taken at the end of the file;
//! the blocks that count clusters take theirs there too.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::bytes::be64;

pub(super) struct Clusters {
    /// Size of a cluster in bytes.
    size: u64,
    /// The offsets of the blocks of reference counts.
    pub(super) blocks: Vec<u64>,
    pub(super) blocks_changed: bool,
    /// The first cluster whose count is not in the file.
    counted: u64,
    /// The end of the file, in clusters: everything before it is in use.
    pub(super) end: u64,
    /// The counts of shared clusters that are not in the file. Another cluster counts 1.
    pub(super) shared: BTreeMap<u64, u16>,
}

impl Clusters {
    /// The clusters of a file with so many, all of which are counted.
    pub(super) fn of(file: &File, size: u64, end: u64) -> io::Result<Self> {
        Ok(Self {
            size,
            // The table of counts is the second cluster of every image created here.
            blocks: read_table(file, size, size / 8)?,
            blocks_changed: false,
            counted: end,
            end,
            shared: BTreeMap::new(),
        })
    }

    /// Removes the end of the file, which nothing uses.
    pub(super) fn cut(&mut self, file: &File, end: u64) -> io::Result<()> {
        (self.end, self.counted) = (end, end);
        file.set_len(end * self.size)
    }

    /// Clusters that one block counts: 2 bytes for each.
    pub(super) fn per_block(&self) -> u64 {
        self.size / 2
    }

    /// The offset of that block of counts.
    pub(super) fn block(&mut self, block: u64) -> io::Result<u64> {
        let full = || io::Error::new(io::ErrorKind::FileTooLarge, "the table of counts is full");
        let place = usize::try_from(block).ok();
        let slot = place.and_then(|block| self.blocks.get_mut(block));
        let slot = slot.ok_or_else(full)?;
        if *slot == 0 {
            *slot = self.end * self.size;
            self.end += 1;
            self.blocks_changed = true;
        }
        Ok(*slot)
    }

    /// Allocates the next cluster of the file, and returns its offset.
    pub(super) fn take(&mut self) -> io::Result<u64> {
        self.take_run(1)
    }

    /// Allocates contiguous clusters of the file, and returns the offset of the first one.
    pub(super) fn take_run(&mut self, clusters: u64) -> io::Result<u64> {
        self.reserve(clusters)?;
        let first = self.end;
        self.end += clusters;
        Ok(first * self.size)
    }

    /// Allocates the blocks that count the next clusters, which are contiguous then.
    pub(super) fn reserve(&mut self, clusters: u64) -> io::Result<()> {
        loop {
            let first = self.end;
            for block in first / self.per_block()..(first + clusters).div_ceil(self.per_block()) {
                self.block(block)?;
            }
            // Unless a block took the first of them.
            if first == self.end {
                return Ok(());
            }
        }
    }

    /// Adds a reference to a cluster whose count is not in the file yet. `false` if it has as many
    /// as can be counted.
    pub(super) fn share(&mut self, cluster: u64) -> bool {
        let count = self.shared.entry(cluster).or_insert(1);
        let more = count.checked_add(1);
        more.map(|more| *count = more).is_some()
    }

    /// Takes a reference to a shared cluster back.
    pub(super) fn release(&mut self, file: &File, cluster: u64) -> io::Result<()> {
        if cluster >= self.counted {
            let count = self.shared.entry(cluster).or_insert(1);
            *count = count.saturating_sub(1);
            return Ok(());
        }
        let at = self.block(cluster / self.per_block())? + cluster % self.per_block() * 2;
        let mut count = [0; 2];
        file.read_exact_at(&mut count, at)?;
        let count = u16::from_be_bytes(count).saturating_sub(1);
        file.write_all_at(&count.to_be_bytes(), at)
    }

    /// Writes the counts of the allocated clusters, and extends the file to include them.
    pub(super) fn write(&mut self, file: &File) -> io::Result<()> {
        let per_block = self.per_block();
        let mut cluster = self.counted;
        while cluster < self.end {
            let block = self.block(cluster / per_block)?;
            let stop = (cluster / per_block + 1) * per_block;
            let count = |cluster| self.shared.get(&cluster).copied().unwrap_or(1);
            let counts: Vec<u8> = (cluster..stop.min(self.end))
                .flat_map(|cluster| count(cluster).to_be_bytes())
                .collect();
            file.write_all_at(&counts, block + cluster % per_block * 2)?;
            cluster = stop.min(self.end);
        }
        self.counted = self.end;
        self.shared.clear();
        // The last cluster may be written in part. Growing a file waits for pending writes to it.
        if file.metadata()?.len() < self.end * self.size {
            file.set_len(self.end * self.size)?;
        }
        if std::mem::take(&mut self.blocks_changed) {
            write_table(file, self.size, &self.blocks)?;
        }
        Ok(())
    }
}

pub(super) fn read_table(file: &File, at: u64, entries: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; (entries * 8) as usize];
    file.read_exact_at(&mut bytes, at)?;
    let entry = |bytes: &[u8]| be64(bytes, 0).unwrap_or_default();
    Ok(bytes.chunks_exact(8).map(entry).collect())
}

pub(super) fn write_table(file: &File, at: u64, entries: &[u64]) -> io::Result<()> {
    let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
    file.write_all_at(&bytes, at)
}
