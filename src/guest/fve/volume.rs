//! What is where in an unlocked volume, and how its bytes are read and written.
//!
//! Most sectors are encrypted where they are. The start of the volume is kept elsewhere (Windows 7 and later), or
//! is in clear (Vista). BitLocker's own places - the copies of the metadata and the place of the moved start -
//! read as zeroes, as they do in Windows, and are never written.

use std::io;
use std::ops::Range;

use zeroize::Zeroizing;

use super::cipher::Cipher;
use super::error::FveError;
use super::layout::{NTFS, SIGNATURE, VolumeHeader};
use super::metadata::{Metadata, Start, VISTA_CLEAR};
use super::protection::Protection;
use crate::block::{BlockRead, BlockWrite, check_range};

/// The most that is encrypted in one go.
const PIECE: usize = 1 << 20;

/// A volume whose key is known.
pub struct Volume {
    /// Of the partition, in bytes of the disk.
    pub start: u64,
    pub partition_len: u64,
    pub by: Protection,
    pub cipher_name: &'static str,
    len: u64,
    sector_size: u64,
    layout: Start,
    /// In the volume, ascending and apart from each other.
    reserved: Vec<Range<u64>>,
    cipher: Cipher,
}

/// How a part of the volume lies on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    /// Encrypted at that offset of the volume.
    Encrypted(u64),
    /// Where it is, not encrypted.
    Clear,
    /// Vista's boot sector or its copy, in clear but for two fields.
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

    /// The ranges that are BitLocker's, in bytes of the disk.
    pub fn reserved(&self) -> impl Iterator<Item = Range<u64>> {
        let ranges = self.reserved.iter();
        ranges.map(|r| self.start + r.start..self.start + r.end)
    }

    /// What is at an offset of the volume, and where that ends.
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

    /// Cuts whole sectors into pieces, and hands each with its offset in the volume and its length.
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

    /// Not for two threads at a time: a write of a part of a sector reads the rest first.
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

    /// Gives a boot sector of Vista the two fields that it has in NTFS, or on the disk.
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
            // The copy at the end need not be one, and the place of the mirror is not ours to change.
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

/// BitLocker's places in ascending order: inside the volume, on whole sectors, apart from each other and from the
/// start of the volume.
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
