//! Reads the restart pages of an NTFS `$LogFile` to determine whether the volume was closed
//! properly.
//!
//! The rule is that of ntfs-3g (`ntfs_check_logfile`, `ntfs_is_logfile_clean`). The newer of the
//! two restart pages counts. The log is dirty if it has a client in use and the "volume is clean"
//! bit is not set. An all-`0xFF` log was emptied after a clean close. A page of version 2.0 means
//! that Windows 8+ may keep metadata elsewhere (Fast Startup). When it closes the volume it writes
//! 1.1.

use super::ntfs_layout::{RestartArea, RestartPage};

/// The number of bytes that [`state`] reads; both restart pages lie within it for every page size.
pub const HEAD_BYTES: usize = 128 << 10;

const SECTOR: usize = 512;
const NO_CLIENT: u16 = 0xffff;
const VOLUME_IS_CLEAN: u16 = 0x0002;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogState {
    /// Emptied: there is nothing to replay.
    Empty,
    Clean,
    /// Not closed: Windows would replay it.
    Dirty,
    /// Log version 2.0: Windows may keep cached metadata for a fast start.
    Cached,
    /// Neither empty nor with a valid restart page.
    Damaged,
}

impl LogState {
    pub fn is_clean(self) -> bool {
        matches!(self, Self::Empty | Self::Clean)
    }
}

struct Restart {
    lsn: u64,
    version: (u16, u16),
    open: bool,
}

/// The state of a log that begins with `head`.
pub fn state(head: &[u8]) -> LogState {
    let mut empty = true;
    let mut newest: Option<Restart> = None;
    let mut found = 0;
    // A restart page begins at 0 or, the second one, at the page size: a power of two.
    let starts = std::iter::once(0).chain((9..17).map(|bits| 1usize << bits));
    for start in starts {
        let Some(sector) = head.get(start..start + SECTOR) else {
            break;
        };
        if sector.starts_with(&[0xff; 4]) {
            if empty {
                continue;
            }
            break;
        }
        empty = false;
        if sector.starts_with(b"RCRD") {
            break;
        }
        if let Some(page) = restart(&head[start..]) {
            if newest.as_ref().is_none_or(|old| page.lsn > old.lsn) {
                newest = Some(page);
            }
            found += 1;
            if found == 2 {
                break;
            }
        }
    }
    match newest {
        _ if empty => LogState::Empty,
        None => LogState::Damaged,
        Some(page) if page.version == (2, 0) => LogState::Cached,
        Some(page) if page.open => LogState::Dirty,
        Some(_) => LogState::Clean,
    }
}

/// Parses one restart page; `None` if it is invalid.
fn restart(page: &[u8]) -> Option<Restart> {
    let head = RestartPage::read(page)?;
    let checked = head.signature == *b"CHKD";
    if !checked && head.signature != *b"RSTR" {
        return None;
    }
    let size = usize::try_from(head.page_size).ok()?;
    let records = head.record_page_size;
    if !size.is_power_of_two() || size < SECTOR || !records.is_power_of_two() || records < 512 {
        return None;
    }
    let mut page = page.get(..size)?.to_vec();
    let area = usize::from(head.area);
    let version = (head.major, head.minor);
    // The fields read below must lie before the first fixup word at 510.
    let place = RestartPage::LEN..=510 - RestartArea::LEN;
    if !matches!(version, (1, 1) | (2, 0)) || area % 8 != 0 || !place.contains(&area) {
        return None;
    }
    // chkdsk leaves a page without an update sequence array.
    if !(checked && head.array_len == 0) {
        super::ntfs_record::fix_up(&mut page).ok()?;
    }
    let area = RestartArea::read(page.get(area..)?)?;
    let in_use = area.in_use;
    if in_use != NO_CLIENT && in_use >= area.clients {
        return None;
    }
    Some(Restart {
        lsn: if checked { head.checked_lsn } else { area.lsn },
        version,
        open: in_use != NO_CLIENT && area.flags & VOLUME_IS_CLEAN == 0,
    })
}

/// A restart page as Windows writes it, for tests with a log in a given state.
#[cfg(test)]
pub(super) fn restart_page(lsn: u64, version: (u16, u16), in_use: u16, flags: u16) -> Vec<u8> {
    const AREA: u16 = 48;
    let mut page = vec![0u8; 4096];
    let head = RestartPage {
        signature: *b"RSTR",
        array: RestartPage::LEN as u16,
        array_len: 9,
        checked_lsn: 0,
        page_size: 4096,
        record_page_size: 4096,
        area: AREA,
        minor: version.1,
        major: version.0,
    };
    head.write(&mut page).unwrap();
    let area = RestartArea {
        lsn,
        clients: 1,
        free: NO_CLIENT,
        in_use,
        flags,
    };
    area.write(&mut page[usize::from(AREA)..]).unwrap();
    page[30..32].copy_from_slice(&7u16.to_le_bytes());
    for end in (510..4096).step_by(512) {
        page[end..end + 2].copy_from_slice(&7u16.to_le_bytes());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_pages_count_and_the_newer_wins() {
        let clean = |lsn| restart_page(lsn, (1, 1), 0, VOLUME_IS_CLEAN);
        let open = |lsn| restart_page(lsn, (1, 1), 0, 0);
        let closed = |lsn| restart_page(lsn, (1, 1), NO_CLIENT, 0);
        let cached = |lsn| restart_page(lsn, (2, 0), 0, VOLUME_IS_CLEAN);
        let torn = |lsn| {
            let mut page = open(lsn);
            page[510] ^= 0xff;
            page
        };
        let cases: Vec<(Vec<Vec<u8>>, LogState)> = vec![
            (vec![vec![0xff; HEAD_BYTES]], LogState::Empty),
            (vec![], LogState::Empty),
            (vec![vec![0; 8192]], LogState::Damaged),
            (vec![clean(5), clean(5)], LogState::Clean),
            (vec![closed(5), closed(5)], LogState::Clean),
            (vec![open(5), open(5)], LogState::Dirty),
            (vec![clean(5), open(6)], LogState::Dirty),
            (vec![clean(6), open(5)], LogState::Clean),
            (vec![open(5), clean(6)], LogState::Clean),
            (vec![cached(5), cached(5)], LogState::Cached),
            (vec![clean(5), cached(6)], LogState::Cached),
            (vec![clean(5), torn(9)], LogState::Clean),
            (vec![torn(5), torn(9)], LogState::Damaged),
            (vec![open(5), vec![0xff; 4096]], LogState::Dirty),
        ];
        for (i, (pages, expected)) in cases.into_iter().enumerate() {
            assert_eq!(state(&pages.concat()), expected, "case {i}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(
            at in 0usize..600,
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..64),
        ) {
            let mut log = restart_page(5, (1, 1), 0, 0);
            log.extend(restart_page(6, (1, 1), 0, 0));
            for (i, byte) in bytes.iter().enumerate() {
                log[at + i] = *byte;
            }
            state(&log);
            state(&bytes);
        }
    }
}
