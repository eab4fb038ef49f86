//! BitLocker volumes ("full volume encryption", FVE) opened in this process, for reading and
//! writing.
//!
//! This layer is below the file systems: [`Unlocked::over`] is the disk with the unlocked volumes
//! in clear and everything else unchanged. So the NTFS reader, the confined NTFS writer, the trim
//! and the rollback need no support for encryption. Written data is encrypted again. A volume stays
//! as encrypted, as locked or as suspended as before. The metadata of a volume is read and never
//! written.
//!
//! The format is described by libyal's libbde ("BitLocker Drive Encryption (BDE) format"),
//! cryptsetup's bitlk, dislocker and dissect.fve; see [`layout`]. Vista stores the copy of its boot
//! sector in clear behind the last sector of NTFS. The moved start of a volume is encrypted for its
//! new offset.

pub mod cipher;
pub mod error;
pub mod keys;
pub mod layout;
pub mod metadata;
pub mod protection;
pub mod volume;

#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use crate::block::{BlockRead, BlockWrite, check_range};
use error::FveError;
use keys::{Credential, Stretched};
use metadata::Part;
use protection::Protection;
use volume::Volume;

/// The reason why a volume stays closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Closed {
    /// No key was given, or none that opens it.
    Locked,
    /// No kind of key that a user can give opens it.
    NoUsableProtector,
    /// Partly encrypted.
    Converting,
    /// Its metadata is damaged or of an unknown kind.
    Unreadable,
}

/// The result of examining a volume.
pub struct Look {
    pub protections: Vec<Protection>,
    pub volume: Result<Volume, (Closed, String)>,
}

/// Reads the metadata of the volume at that offset and tries the keys on it.
pub fn look(
    disk: &dyn BlockRead,
    start: u64,
    len: u64,
    credentials: &[Credential],
    stretched: &Stretched,
) -> Look {
    let part = Part { disk, start, len };
    let metadata = match metadata::read(&part) {
        Ok(metadata) => metadata,
        Err(error) => {
            return Look {
                protections: Vec::new(),
                volume: Err((Closed::Unreadable, error.reason())),
            };
        }
    };
    for text in &metadata.unsound {
        tracing::warn!("one copy of BitLocker's metadata is not used: {text}");
    }
    let volume = open(&metadata, &part, credentials, stretched).map_err(|error| {
        let closed = match &error {
            FveError::Converting(_) => Closed::Converting,
            FveError::Locked { protectors } if !protectors.iter().any(|p| p.takes_key()) => {
                Closed::NoUsableProtector
            }
            FveError::Locked { .. } | FveError::WrongKeys { .. } | FveError::Mistyped(_) => {
                Closed::Locked
            }
            _ => Closed::Unreadable,
        };
        (closed, error.reason())
    });
    Look {
        protections: metadata.protections(),
        volume,
    }
}

fn open(
    metadata: &metadata::Metadata,
    part: &Part,
    credentials: &[Credential],
    stretched: &Stretched,
) -> Result<Volume, FveError> {
    if let Some(state) = &metadata.converting {
        return Err(FveError::Converting(state.clone()));
    }
    let unlocked = keys::unlock(metadata, credentials, stretched)?;
    Volume::new(metadata, &unlocked.key, unlocked.by, part.start, part.len)
}

/// The unlocked volumes of a disk.
#[derive(Clone, Default)]
pub struct Unlocked(Arc<Vec<Volume>>);

impl Unlocked {
    pub fn new(mut volumes: Vec<Volume>) -> Self {
        volumes.sort_by_key(|v| v.start);
        Self(Arc::new(volumes))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The disk with the unlocked volumes in clear.
    pub fn over<D: ?Sized>(&self, disk: Arc<D>) -> InClear<D> {
        InClear {
            disk,
            volumes: self.clone(),
            writing: Mutex::new(()),
        }
    }

    /// Removes BitLocker's own ranges from a range of the disk.
    pub fn without_reserved(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut left = vec![range];
        for reserved in self.0.iter().flat_map(Volume::reserved) {
            left = left
                .into_iter()
                .flat_map(|r| {
                    [
                        r.start..r.end.min(reserved.start),
                        r.start.max(reserved.end)..r.end,
                    ]
                })
                .filter(|r| r.start < r.end)
                .collect();
        }
        left
    }

    /// The unlocked volume at an offset of the disk, if any, and the end of that range.
    fn at(&self, offset: u64, size: u64) -> (Option<&Volume>, u64) {
        let end = |v: &Volume| v.start.saturating_add(v.partition_len);
        let next = self.0.iter().find(|v| offset < end(v));
        match next {
            Some(volume) if offset >= volume.start => (Some(volume), end(volume)),
            Some(volume) => (None, volume.start),
            None => (None, size.max(offset.saturating_add(1))),
        }
    }

    /// Splits a range of the disk at the borders of the unlocked volumes.
    fn each(
        &self,
        offset: u64,
        len: usize,
        size: u64,
        mut act: impl FnMut(Option<&Volume>, u64, Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        check_range(offset, len as u64, size)?;
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let (volume, end) = self.at(at, size);
            let n = (end - at).min((len - done) as u64) as usize;
            act(volume, at, done..done + n)?;
            done += n;
        }
        Ok(())
    }
}

/// A disk whose unlocked volumes are read and written in clear.
pub struct InClear<D: ?Sized> {
    volumes: Unlocked,
    writing: Mutex<()>,
    disk: Arc<D>,
}

impl<D: BlockRead + ?Sized> BlockRead for InClear<D> {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.volumes.is_empty() {
            return self.disk.read_at(offset, buf);
        }
        let len = buf.len();
        self.volumes
            .each(offset, len, self.size(), |volume, at, range| {
                let part = &mut buf[range];
                match volume {
                    Some(volume) => volume.read(self.disk.as_ref(), at - volume.start, part),
                    None => self.disk.read_at(at, part),
                }
            })
    }
}

impl<D: BlockWrite + ?Sized> BlockWrite for InClear<D> {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.volumes.is_empty() {
            return self.disk.write_at(offset, data);
        }
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.volumes
            .each(offset, data.len(), self.size(), |volume, at, range| {
                let part = &data[range];
                match volume {
                    Some(volume) => volume.write(self.disk.as_ref(), at - volume.start, part),
                    None => self.disk.write_at(at, part),
                }
            })
    }

    /// Zeroes in an unlocked volume are written encrypted: nothing is deallocated there.
    fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.volumes.is_empty() {
            return self.disk.zero_at(offset, len);
        }
        check_range(offset, len, self.size())?;
        let mut at = offset;
        while at < offset + len {
            let (volume, end) = self.volumes.at(at, self.size());
            let n = (end - at).min(offset + len - at);
            if volume.is_none() {
                self.disk.zero_at(at, n)?;
                at += n;
            } else {
                let n = n.min(1 << 20);
                self.write_at(at, &vec![0; n as usize])?;
                at += n;
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }
}
