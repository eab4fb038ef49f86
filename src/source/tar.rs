//! The member table of a tar archive, as far as an OVA needs it.
//!
//! The crate `tar` reads the headers and seeks over contents, so a large archive costs a few reads.
//! This module adds the limits. A sparse member is an error. Anything other than a regular file is
//! skipped: a link must not stand for a disk.

use std::cell::Cell;
use std::io::{self, Read, Seek, SeekFrom};

use tar::{Archive, EntryType};

const MAX_MEMBERS: usize = 10_000;
/// The most bytes of headers for one member: its header, a long name, pax records.
const MAX_HEADERS: u64 = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    pub offset: u64,
    pub size: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum TarError {
    #[error("tar header after byte {offset}: {source}")]
    Header { offset: u64, source: io::Error },
    #[error("{name} at byte {offset}: a sparse member, which an OVA cannot have")]
    Sparse { name: String, offset: u64 },
    #[error("{name} ends at byte {end} of an archive of {size} bytes: the archive is cut short")]
    Truncated { name: String, end: u64, size: u64 },
    #[error("more than {MAX_MEMBERS} members")]
    TooMany,
    #[error("no files, or not a tar archive")]
    Empty,
    #[error("reading")]
    Io(#[from] io::Error),
}

/// The regular files of the archive, in its order.
pub fn members<R: Read + Seek>(mut archive: R) -> Result<Vec<Member>, TarError> {
    let total = archive.seek(SeekFrom::End(0))?;
    archive.rewind()?;
    let left = Cell::new(MAX_HEADERS);
    let mut archive = Archive::new(Bounded {
        inner: archive,
        left: &left,
    });
    let mut list = Vec::new();
    // The end of the last known member.
    let mut offset = 0;
    for (number, entry) in archive.entries_with_seek()?.enumerate() {
        if number == MAX_MEMBERS {
            return Err(TarError::TooMany);
        }
        left.set(MAX_HEADERS);
        let mut entry = entry.map_err(|source| TarError::Header { offset, source })?;
        let (start, size) = (entry.raw_file_position(), entry.size());
        let name = crate::disk::charset::text_of(&entry.path_bytes());
        let end = start.saturating_add(size);
        if end > total {
            return Err(TarError::Truncated {
                name: super::clean(&name),
                end,
                size: total,
            });
        }
        offset = end;
        match entry.header().entry_type() {
            EntryType::Regular | EntryType::Continuous => {}
            EntryType::GNUSparse => return Err(sparse(&name, start)),
            // Links, directories, devices, comments.
            _ => continue,
        }
        if is_sparse(&mut entry).map_err(|source| TarError::Header { offset, source })? {
            return Err(sparse(&name, start));
        }
        list.push(Member {
            name,
            offset: start,
            size,
        });
    }
    match list.is_empty() {
        true => Err(TarError::Empty),
        false => Ok(list),
    }
}

fn sparse(name: &str, offset: u64) -> TarError {
    TarError::Sparse {
        name: super::clean(name),
        offset,
    }
}

/// Whether pax records mark the contents as a map and pieces (GNU tar, "Sparse Formats").
fn is_sparse<R: Read>(entry: &mut tar::Entry<'_, R>) -> io::Result<bool> {
    for record in entry.pax_extensions()?.into_iter().flatten() {
        if record?.key_bytes().starts_with(b"GNU.sparse") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A reader with a limit on headers: an archive that announces gigabytes of them is not read into
/// memory.
struct Bounded<'a, R> {
    inner: R,
    left: &'a Cell<u64>,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buf)?;
        let left = self.left.get().checked_sub(read as u64);
        self.left.set(
            left.ok_or_else(|| io::Error::other("the headers of one member take more than 1 MiB"))?,
        );
        Ok(read)
    }
}

impl<R: Seek> Seek for Bounded<'_, R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}
