//! Loads a hive as Windows would see it after its next start: read, replayed, checked.
//!
//! A clean hive is passed through. A dirty one is replayed (see [`super::recover`]) and then walked
//! cell by cell. If no log can be replayed, a sound hive is still used, with a warning, because
//! Windows would start with it too. An unsound one is an error.
//!
//! # Logs after an edit
//!
//! The edited hive is marked clean, and Windows does not read the logs of a clean hive. They must
//! be emptied nevertheless. If the hive looked dirty before Windows writes its first log
//! entry, the old pages would be replayed over the edit. The function [`log_reset`]
//! makes them **empty files**, because
//!
//! * Windows itself leaves an unused log empty: listings of real systems show `BCD.LOG1` and
//!   `BCD.LOG2` with 0 bytes beside a live `BCD.LOG`. The second log of the corpus's Windows 7
//!   hive, which Windows later loaded, is empty too;
//! * zeroing only the first sector is not enough: Windows repairs the base block of a broken log by
//!   making a new one. Then the pages behind it count again ("Base block" of the specification,
//!   notes 2 and 3);
//! * a well-formed base block without entries would have to imitate fields that differ between
//!   versions of Windows, for no gain;
//! * deleting the files would lose their security descriptors.

use std::sync::Arc;

use super::recover::{AppliedLog, ReplayError, ReplayWarning, SkippedLog, recover};
use super::walk::{CellFault, walk};
use crate::memory::FileBytes;

/// The suffixes of the logs of a hive. `.LOG` is that of XP, and of BCD stores to this day.
pub const LOG_SUFFIXES: [&str; 3] = [".LOG1", ".LOG2", ".LOG"];

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{hive} cannot be replayed")]
    Replay { hive: String, source: ReplayError },
    #[error(
        "{hive} was not saved completely, its logs do not help, and it is not sound; \
         start Windows once on the old host and shut it down"
    )]
    Unsound { hive: String, source: CellFault },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadWarning {
    #[error("{hive}: {warning}")]
    Replay {
        hive: String,
        warning: ReplayWarning,
    },
    /// The hive is used in its state on disk.
    #[error(
        "{hive} was not saved completely and no log can be replayed ({reasons}). It is sound, but \
         the latest changes to devices, services and settings may be missing"
    )]
    Stale { hive: String, reasons: String },
}

/// The result of a replay, for the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replayed {
    pub applied: Vec<AppliedLog>,
    pub skipped: Vec<SkippedLog>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedHive {
    /// The bytes to read and to edit. Marked clean, unless [`LoadWarning::Stale`] is among the
    /// warnings.
    pub bytes: Arc<FileBytes>,
    /// Whether the file on disk is dirty.
    pub dirty: bool,
    /// Log entries that are missing from the file on disk.
    pub log_entries_replayable: u32,
    /// Set if something was replayed into `bytes`.
    pub replayed: Option<Replayed>,
    pub warnings: Vec<LoadWarning>,
}

/// Reads the hive `name` and its logs. `read` gets a file name and returns `None` if the file does
/// not exist. Returns `None` if the hive itself does not exist.
pub fn load_hive<E: From<LoadError>>(
    name: &str,
    mut read: impl FnMut(&str) -> Result<Option<Arc<FileBytes>>, E>,
) -> Result<Option<LoadedHive>, E> {
    let Some(primary) = read(name)? else {
        return Ok(None);
    };
    let mut logs = Vec::new();
    for suffix in LOG_SUFFIXES {
        let log = format!("{name}{suffix}");
        if let Some(bytes) = read(&log)? {
            logs.push((log, bytes));
        }
    }
    let logs: Vec<_> = logs.iter().map(|(n, b)| (n.as_str(), &b[..])).collect();
    Ok(Some(load(name, primary, &logs)?))
}

/// Loads a hive from bytes; `logs` are (file name, contents) in the order of [`LOG_SUFFIXES`].
pub fn load(
    name: &str,
    primary: Arc<FileBytes>,
    logs: &[(&str, &[u8])],
) -> Result<LoadedHive, LoadError> {
    let hive = name.to_string();
    let replay = recover(&primary, logs).map_err(|source| LoadError::Replay {
        hive: hive.clone(),
        source,
    })?;
    if replay.was_dirty {
        walk(&replay.bytes).map_err(|source| LoadError::Unsound {
            hive: hive.clone(),
            source,
        })?;
    }
    let mut warnings: Vec<_> = replay
        .warnings
        .iter()
        .map(|warning| LoadWarning::Replay {
            hive: hive.clone(),
            warning: warning.clone(),
        })
        .collect();
    if !replay.usable {
        let reasons: Vec<_> = replay
            .skipped
            .iter()
            .map(|log| format!("{}: {}", log.name, log.reason))
            .collect();
        let reasons = match reasons.is_empty() {
            true => "there is none".to_string(),
            false => reasons.join("; "),
        };
        warnings.push(LoadWarning::Stale { hive, reasons });
    }
    let dirty = replay.was_dirty;
    let log_entries_replayable = replay.entries();
    let replayed = (log_entries_replayable > 0).then_some(Replayed {
        applied: replay.applied,
        skipped: replay.skipped,
    });
    let recovered = match replay.bytes {
        std::borrow::Cow::Owned(bytes) => Some(bytes),
        std::borrow::Cow::Borrowed(_) => None,
    };
    Ok(LoadedHive {
        bytes: recovered.map_or(primary, |bytes| Arc::new(bytes.into())),
        dirty,
        log_entries_replayable,
        replayed,
        warnings,
    })
}

/// The new contents of a log after its hive was edited; `None` if it can stay unchanged.
pub fn log_reset(log: &[u8]) -> Option<Vec<u8>> {
    (!log.is_empty()).then(Vec::new)
}

#[cfg(test)]
mod tests {
    use super::super::base::{set_clean, update_checksum};
    use super::super::build::KeyTree;
    use super::super::hive::HiveView;
    use super::super::recover::tests::{entry_of, log};
    use super::*;

    fn hive(value: u32) -> Vec<u8> {
        let mut tree = KeyTree::new("ROOT");
        tree.dword("Select", "Default", value);
        tree.to_bytes("SYSTEM")
    }

    /// Sets the sequence numbers 8 and 7.
    fn dirty(mut hive: Vec<u8>) -> Vec<u8> {
        set_clean(&mut hive, 7).unwrap();
        hive[4] = 8;
        update_checksum(&mut hive).unwrap();
        hive
    }

    fn run(files: &[(&str, Vec<u8>)]) -> Result<Option<LoadedHive>, LoadError> {
        load_hive("SYSTEM", |name| {
            let found = files.iter().find(|(n, _)| *n == name);
            Ok(found.map(|(_, bytes)| Arc::new(bytes.clone().into())))
        })
    }

    fn warnings(hive: &LoadedHive) -> String {
        let lines: Vec<_> = hive.warnings.iter().map(ToString::to_string).collect();
        lines.join("\n")
    }

    #[test]
    fn absent_and_clean() {
        assert_eq!(run(&[]).unwrap(), None);
        let clean = hive(1);
        let loaded = run(&[("SYSTEM", clean.clone()), ("SYSTEM.LOG1", vec![])]);
        let loaded = loaded.unwrap().unwrap();
        assert_eq!(loaded.bytes[..], clean);
        assert!(!loaded.dirty && loaded.replayed.is_none() && loaded.warnings.is_empty());
    }

    #[test]
    fn any_of_the_logs_is_replayed() {
        // The log has the whole bin, with another value in it.
        let pages = (hive(2).len() - 4096) as u32 / 4096;
        let log = log(7, pages, &[entry_of(7, pages, &hive(2)[4096..])]);
        for suffix in LOG_SUFFIXES {
            let name = format!("SYSTEM{suffix}");
            let loaded = run(&[("SYSTEM", dirty(hive(1))), (&name, log.clone())]);
            let loaded = loaded.unwrap().unwrap();
            let view = HiveView::new(&loaded.bytes).unwrap();
            let select = view.key("Select").unwrap().unwrap();
            assert_eq!(select.dword("Default").unwrap(), Some(2));
            assert!(loaded.dirty && loaded.warnings.is_empty());
            assert_eq!(loaded.log_entries_replayable, 1);
            assert_eq!(loaded.replayed.unwrap().applied[0].name, name);
        }
    }

    #[test]
    fn dirty_without_usable_logs() {
        let stale = dirty(hive(1));
        let loaded = run(&[("SYSTEM", stale.clone())]).unwrap().unwrap();
        assert!(loaded.dirty && loaded.replayed.is_none() && loaded.bytes[..] == stale);
        insta::assert_snapshot!(warnings(&loaded), @"SYSTEM was not saved completely and no log can be replayed (there is none). It is sound, but the latest changes to devices, services and settings may be missing");

        let logs = [("SYSTEM", stale.clone()), ("SYSTEM.LOG1", vec![7; 600])];
        let loaded = run(&logs).unwrap().unwrap();
        insta::assert_snapshot!(warnings(&loaded), @r"
        SYSTEM: SYSTEM.LOG1 cannot be used: the log has no base block; changes that were only there are lost
        SYSTEM was not saved completely and no log can be replayed (SYSTEM.LOG1: the log has no base block). It is sound, but the latest changes to devices, services and settings may be missing
        ");

        let mut unsound = stale.clone();
        unsound[4096 + 32..][..4].copy_from_slice(&5i32.to_le_bytes());
        assert!(matches!(
            run(&[("SYSTEM", unsound)]),
            Err(LoadError::Unsound { .. })
        ));
        let mut headless = stale;
        headless[508] ^= 1;
        assert!(matches!(
            run(&[("SYSTEM", headless)]),
            Err(LoadError::Replay { .. })
        ));
    }

    #[test]
    fn resetting_is_done_once() {
        let reset = log_reset(&[1; 512]).unwrap();
        assert!(reset.is_empty() && log_reset(&reset).is_none());
    }
}
