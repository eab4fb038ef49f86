//! The state of an NTFS volume: label, dirty, hibernated, shadow copies, free space.

use super::fs::le16;
use super::logfile::{self, LogState};
use super::ntfs_layout::VolumeInformation;
use super::ntfs_read::{BULK, Fallible, NtfsVolume};
use super::ntfs_record as rec;
use super::{GuestPath, VolumeState};

const FILE_LOGFILE: u64 = 2;
const FILE_VOLUME: u64 = 3;
const FILE_BITMAP: u64 = 6;
const VOLUME_IS_DIRTY: u16 = 0x0001;
/// The store of shadow copies: `{GUID}{3808876b-c176-4e48-b7ae-04046e6cc752}`.
const VSS_STORE: &str = "}{3808876b-c176-4e48-b7ae-04046e6cc752}";

/// Counts the set bits. Most of the map of a large volume is all free or all used.
fn ones(bytes: &[u8]) -> u64 {
    const UNIT: usize = 4096;
    static FREE: [u8; UNIT] = [0; UNIT];
    static USED: [u8; UNIT] = [0xff; UNIT];
    let count = |unit: &[u8]| match unit.len() {
        len if *unit == FREE[..len] => 0,
        len if *unit == USED[..len] => len as u64 * 8,
        _ => unit.iter().map(|b| u64::from(b.count_ones())).sum(),
    };
    bytes.chunks(UNIT).map(count).sum()
}

impl NtfsVolume {
    pub fn label(&self) -> Fallible<Option<String>> {
        let record = self.file_record(FILE_VOLUME)?;
        let name = record
            .find(rec::AT_VOLUME_NAME, &[])?
            .and_then(|a| a.resident())
            .unwrap_or_default();
        let units: Vec<u16> = name.chunks_exact(2).map(|b| le16(b, 0)).collect();
        let label: String = String::from_utf16_lossy(&units)
            .chars()
            .filter(|c| !c.is_control())
            .collect();
        Ok((!label.is_empty()).then_some(label))
    }

    /// The `$Volume` flag that requests a chkdsk.
    pub fn dirty_flag(&self) -> Fallible<bool> {
        let record = self.file_record(FILE_VOLUME)?;
        let info = record
            .find(rec::AT_VOLUME_INFORMATION, &[])?
            .and_then(|a| VolumeInformation::read(a.resident()?))
            .ok_or("$Volume has no volume information")?;
        Ok(info.flags & VOLUME_IS_DIRTY != 0)
    }

    pub fn log_state(&self) -> Fallible<LogState> {
        let record = self.file_record(FILE_LOGFILE)?;
        let stream = self
            .stream(FILE_LOGFILE, &record, rec::AT_DATA, &[])?
            .ok_or("$LogFile has no data")?;
        let mut head = vec![0; stream.size().min(logfile::HEAD_BYTES as u64) as usize];
        self.read_stream(&stream, 0, &mut head)?;
        Ok(logfile::state(&head))
    }

    /// Whether `\hiberfil.sys` has a session. A file too short to determine it belongs to a volume
    /// that was mounted when Windows hibernated (the rule of ntfs-3g).
    pub fn hibernated(&self) -> Fallible<bool> {
        let path = GuestPath::parse("hiberfil.sys").unwrap_or_default();
        let Some(found) = self.find(&path)? else {
            return Ok(false);
        };
        let record = self.file_record(found.record)?;
        let Some(stream) = self.stream(found.record, &record, rec::AT_DATA, &[])? else {
            return Ok(false);
        };
        if stream.size() < 4096 {
            return Ok(true);
        }
        let mut magic = [0; 4];
        self.read_stream(&stream, 0, &mut magic)?;
        Ok(matches!(&magic, b"hibr" | b"HIBR"))
    }

    fn has_shadow_copies(&self) -> Fallible<bool> {
        let path = GuestPath::parse("System Volume Information").unwrap_or_default();
        let Some(found) = self.find(&path)? else {
            return Ok(false);
        };
        let record = self.file_record(found.record)?;
        if !record.is_dir() {
            return Ok(false);
        }
        let entries = self.entries(found.record, &record)?;
        Ok(entries
            .iter()
            .any(|e| e.name.to_ascii_lowercase().ends_with(VSS_STORE)))
    }

    /// The facts that determine whether the volume may be written. `free_bytes` is left out: it
    /// requires reading the whole `$Bitmap`, see [`Self::free_bytes`].
    pub fn state(&self) -> Fallible<VolumeState> {
        let log = self.log_state()?;
        Ok(VolumeState {
            dirty: self.dirty_flag()? || !log.is_clean(),
            cached: log == LogState::Cached,
            hibernated: self.hibernated()?,
            vss_snapshots: self.has_shadow_copies()?,
            cluster_size: self.facts.cluster_size,
            ..VolumeState::default()
        })
    }

    /// Counts the free clusters in `$Bitmap` until there are `enough` bytes.
    pub fn free_bytes(&self, enough: u64) -> Fallible<u64> {
        let record = self.file_record(FILE_BITMAP)?;
        let stream = self
            .stream(FILE_BITMAP, &record, rec::AT_DATA, &[])?
            .ok_or("$Bitmap has no data")?;
        let clusters = self.clusters();
        let bytes = clusters.div_ceil(8);
        if stream.size() < bytes {
            return Err("$Bitmap is too short".into());
        }
        let cluster = u64::from(self.facts.cluster_size);
        let mut free = 0u64;
        let mut chunk = Vec::new();
        for at in (0..bytes).step_by(BULK) {
            chunk.resize((bytes - at).min(BULK as u64) as usize, 0);
            self.read_stream(&stream, at, &mut chunk)?;
            let mut used = ones(&chunk);
            let end = at + chunk.len() as u64;
            // Some tools set bits past the last cluster, others clear them.
            if end == bytes && !clusters.is_multiple_of(8) {
                let past = chunk.last().map_or(0, |b| b >> (clusters % 8));
                used -= u64::from(past.count_ones());
            }
            let counted = (end * 8).min(clusters) - at * 8;
            free += counted.saturating_sub(used) * cluster;
            if free >= enough {
                break;
            }
        }
        Ok(free)
    }
}
