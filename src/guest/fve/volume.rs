//! The layout of an unlocked volume, and reading and writing of its bytes.
//!
//! Most sectors are encrypted at their own offset. The start of the volume is stored elsewhere
//! (Windows 7 and later), or is in clear (Vista). BitLocker's own ranges are the copies of the
//! metadata and the moved start. They read as zeroes, like in Windows, and are never written.

use std::io;
use std::ops::Range;

use zeroize::Zeroizing;

use super::cipher::Cipher;
use super::error::FveError;
use super::layout::{NTFS, SIGNATURE, VolumeHeader};
use super::metadata::{Metadata, Start, VISTA_CLEAR};
use super::protection::Protection;
use crate::block::{BlockRead, BlockWrite, check_range};

/// The most bytes encrypted at a time.
const PIECE: usize = 1 << 20;

/// A volume with a known key.
pub struct Volume {
    /// The start of the partition, in bytes of the disk.
    pub start: u64,
    pub partition_len: u64,
    pub by: Protection,
    pub cipher_name: &'static str,
    len: u64,
    sector_size: u64,
    layout: Start,
    /// Ranges in the volume, ascending and disjoint.
    reserved: Vec<Range<u64>>,
    cipher: Cipher,
}

/// The storage of a part of the volume on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    /// Encrypted at that offset of the volume.
    Encrypted(u64),
    /// At its own offset, not encrypted.
    Clear,
    /// Vista's boot sector or its copy, in clear except for two fields.
    VistaBoot,
    /// BitLocker's own.
    Reserved,
}

impl Volume {
    pub fn new(
        metadata: &Metadata,
        key: &Zeroizing<Vec<u8>>,
        by: Protection,
        start: u64,
        partition_len: u64,
    ) -> Result<Self, FveError> {
        let sector_size = metadata.sector_size;
        let cipher = Cipher::new(metadata.method, key, sector_size).ok_or_else(|| {
            let (expected, at) = (metadata.method.key_bytes(), metadata.copies[0]);
            FveError::structure("volume key", at, "its length", expected, key.len())
        })?;
        Ok(Self {
            start,
            partition_len,
            by,
            cipher_name: metadata.method.name(),
            len: metadata.len,
            sector_size,
            layout: metadata.start.clone(),
            reserved: reserved(metadata)?,
            cipher,
        })
    }

    /// BitLocker's own ranges, in bytes of the disk.
    pub fn reserved(&self) -> impl Iterator<Item = Range<u64>> {
        let ranges = self.reserved.iter();
        ranges.map(|r| self.start + r.start..self.start + r.end)
    }

    /// The piece at an offset of the volume, and its end.
    fn piece(&self, at: u64) -> (Piece, u64) {
        let next = self.reserved.partition_point(|r| r.end <= at);
        let next = self.reserved.get(next);
        match self.layout {
            Start::Moved { offset, size } if at < size => {
                return (Piece::Encrypted(offset + at), size);
            }
            Start::Vista { copy, .. } => {
                if at < self.sector_size || at == copy {
                    return (Piece::VistaBoot, at + self.sector_size);
                }
                if at < VISTA_CLEAR {
                    return (Piece::Clear, VISTA_CLEAR);
                }
                let end = next.map_or(self.len, |r| r.start);
                if at < copy && copy < end {
                    return (Piece::Encrypted(at), copy);
                }
            }
            Start::Moved { .. } => {}
        }
        match next {
            Some(range) if range.contains(&at) => (Piece::Reserved, range.end),
            Some(range) => (Piece::Encrypted(at), range.start),
            None => (Piece::Encrypted(at), self.len),
        }
    }

    /// Splits whole sectors into pieces, and passes on each with its offset in the volume and its
    /// length.
    fn pieces(
        &self,
        at: u64,
        len: usize,
        mut act: impl FnMut(Piece, u64, Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let place = at + done as u64;
            let (piece, end) = self.piece(place);
            let n = (end - place).min((len - done).min(PIECE) as u64) as usize;
            act(piece, place, done..done + n)?;
            done += n;
        }
        Ok(())
    }

    /// The whole sectors around a range.
    fn sectors(&self, offset: u64, len: usize) -> io::Result<Range<u64>> {
        check_range(offset, len as u64, self.len)?;
        let end = (offset + len as u64).next_multiple_of(self.sector_size);
        Ok(offset / self.sector_size * self.sector_size..end)
    }

    pub fn read(
        &self,
        disk: &(impl BlockRead + ?Sized),
        offset: u64,
        buf: &mut [u8],
    ) -> io::Result<()> {
        let around = self.sectors(offset, buf.len())?;
        if around == (offset..offset + buf.len() as u64) {
            return self.read_sectors(disk, offset, buf);
        }
        let mut bytes = vec![0; (around.end - around.start) as usize];
        self.read_sectors(disk, around.start, &mut bytes)?;
        let skip = (offset - around.start) as usize;
        buf.copy_from_slice(&bytes[skip..skip + buf.len()]);
        Ok(())
    }

    fn read_sectors(
        &self,
        disk: &(impl BlockRead + ?Sized),
        at: u64,
        buf: &mut [u8],
    ) -> io::Result<()> {
        self.pieces(at, buf.len(), |piece, place, range| {
            let part = &mut buf[range];
            match piece {
                Piece::Reserved => part.fill(0),
                Piece::Clear => disk.read_at(self.start + place, part)?,
                Piece::VistaBoot => {
                    disk.read_at(self.start + place, part)?;
                    self.vista_boot(part, true)?;
                }
                Piece::Encrypted(from) => {
                    disk.read_at(self.start + from, part)?;
                    self.cipher.decrypt(from, part);
                }
            }
            Ok(())
        })
    }

    /// Writes a range. Not for two threads at a time: a write of a part of a sector first reads the
    /// rest.
    pub fn write(
        &self,
        disk: &(impl BlockWrite + ?Sized),
        offset: u64,
        data: &[u8],
    ) -> io::Result<()> {
        let around = self.sectors(offset, data.len())?;
        if around == (offset..offset + data.len() as u64) {
            return self.write_sectors(disk, offset, data);
        }
        let mut bytes = vec![0; (around.end - around.start) as usize];
        self.read_sectors(disk, around.start, &mut bytes)?;
        let skip = (offset - around.start) as usize;
        bytes[skip..skip + data.len()].copy_from_slice(data);
        self.write_sectors(disk, around.start, &bytes)
    }

    fn write_sectors(
        &self,
        disk: &(impl BlockWrite + ?Sized),
        at: u64,
        data: &[u8],
    ) -> io::Result<()> {
        // Before a byte is written.
        self.pieces(at, data.len(), |piece, place, range| match piece {
            Piece::Reserved => Err(refused(format!(
                "{} bytes at {place:#x} of the volume belong to BitLocker and are not written",
                range.len()
            ))),
            _ => Ok(()),
        })?;
        self.pieces(at, data.len(), |piece, place, range| {
            let mut part = data[range].to_vec();
            match piece {
                Piece::Reserved => Ok(()),
                Piece::Clear => disk.write_at(self.start + place, &part),
                Piece::VistaBoot => {
                    self.vista_boot(&mut part, false)?;
                    disk.write_at(self.start + place, &part)
                }
                Piece::Encrypted(to) => {
                    self.cipher.encrypt(to, &mut part);
                    disk.write_at(self.start + to, &part)
                }
            }
        })
    }

    /// Replaces two fields in a boot sector of Vista by their values in NTFS, or on the disk.
    fn vista_boot(&self, sector: &mut [u8], for_ntfs: bool) -> io::Result<()> {
        let Start::Vista {
            mirror_cluster,
            metadata_cluster,
            ..
        } = self.layout
        else {
            return Ok(());
        };
        let ntfs = (NTFS, mirror_cluster);
        let disk = (SIGNATURE, metadata_cluster);
        let (from, to) = if for_ntfs { (disk, ntfs) } else { (ntfs, disk) };
        let mut header = VolumeHeader::read(sector)
            .ok_or_else(|| refused("a boot sector is cut short".to_string()))?;
        if (header.signature, header.metadata_cluster) != from {
            // The copy at the end may be invalid, and the offset of the mirror must not be changed.
            return match for_ntfs {
                true => Ok(()),
                false => Err(refused(
                    "a boot sector that is not the volume's".to_string(),
                )),
            };
        }
        (header.signature, header.metadata_cluster) = to;
        let written = header.write(sector);
        written.ok_or_else(|| refused("a boot sector is cut short".to_string()))
    }
}

fn refused(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// BitLocker's ranges in ascending order: inside the volume, on whole sectors, disjoint, and apart
/// from the start of the volume.
fn reserved(metadata: &Metadata) -> Result<Vec<Range<u64>>, FveError> {
    let mut places: Vec<(u64, u64)> = metadata.copies.map(|c| (c, metadata.copy_bytes)).to_vec();
    let mut free_from = VISTA_CLEAR;
    if let Start::Moved { offset, size } = metadata.start {
        places.push((offset, size));
        free_from = size;
    }
    places.sort_unstable();
    let mut ranges = Vec::new();
    for (offset, size) in places {
        let end = offset.checked_add(size);
        let sound = end.is_some_and(|end| end <= metadata.len)
            && offset >= free_from
            && size > 0
            && offset.is_multiple_of(metadata.sector_size)
            && size.is_multiple_of(metadata.sector_size);
        if !sound {
            let expected = format!(
                "whole sectors of {} from {free_from:#x} to {:#x}, apart from the others",
                metadata.sector_size, metadata.len
            );
            let actual = format!("{size} bytes at {offset:#x}");
            let (copy, field) = (metadata.copies[0], "a place of BitLocker's own");
            return Err(FveError::structure(
                "metadata copy",
                copy,
                field,
                expected,
                actual,
            ));
        }
        free_from = offset + size;
        ranges.push(offset..free_from);
    }
    Ok(ranges)
}
