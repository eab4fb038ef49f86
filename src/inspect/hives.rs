//! Reads a hive and its logs once, and determines whether its contents are what Windows would see.
//!
//! A hive with a broken bin chain is refused. A dirty one is replayed from its logs. A dirty one
//! without logs is checked cell by cell, and its use causes a warning.

use crate::bytes::le32;
use crate::guest::{GuestError, GuestPath, GuestRead, VolumeId};
use crate::registry::hive::BASE_BLOCK_SIZE;
use crate::registry::{BaseBlock, LoadError, LoadWarning, load_hive};

use super::findings;
use super::model::{Finding, HiveState, LoadedBytes};

/// Limits for large hives: real SOFTWARE hives have up to 150 MB, and SYSTEM ones 60 MB.
const LARGE_HIVES: [(&str, u64); 2] = [("SOFTWARE", 256 << 20), ("SYSTEM", 160 << 20)];
/// The limit for all other hives and every log; 30 MB are unusual.
const HIVE_LIMIT: u64 = 64 << 20;

/// The size limit of a hive or log of that name. All of them together stay below the memory limit
/// of a conversion.
fn limit(name: &str) -> u64 {
    let large = LARGE_HIVES
        .iter()
        .find(|(hive, _)| hive.eq_ignore_ascii_case(name));
    large.map_or(HIVE_LIMIT, |(_, limit)| *limit)
}

/// An existing hive file.
pub struct Loaded {
    pub state: HiveState,
    /// `None` if it is unusable; a finding has the reason.
    pub hive: Option<LoadedBytes>,
}

#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// Loads a hive; `None` if the file does not exist.
pub fn load(
    guest: &dyn GuestRead,
    volume: VolumeId,
    path: &GuestPath,
    findings: &mut Vec<Finding>,
) -> Result<Option<Loaded>, GuestError> {
    let (Some(folder), Some(name)) = (path.parent(), path.name()) else {
        return Ok(None);
    };
    if guest.stat(volume, path)?.is_some_and(|i| i.encrypted) {
        findings.push(super::state::encrypted(path.to_string()));
        return Ok(Some(unusable(path, false)));
    }
    let mut logs = Vec::new();
    let loaded = load_hive(name, |file| -> Result<_, ReadError> {
        let limit = limit(file);
        let Ok(file) = folder.join(file) else {
            return Ok(None);
        };
        match guest.read_shared(volume, &file, limit) {
            Ok(bytes) => {
                if file != *path && !bytes.is_empty() {
                    logs.push(file);
                }
                Ok(Some(bytes))
            }
            Err(GuestError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    });
    let loaded = match loaded {
        Ok(None) => return Ok(None),
        Ok(Some(loaded)) => loaded,
        Err(ReadError::Load(error)) => {
            findings.push(damaged(path, chain(&error)));
            return Ok(Some(unusable(path, true)));
        }
        Err(ReadError::Guest(GuestError::TooLarge {
            path: file,
            size,
            limit,
        })) => {
            findings.push(too_large(path, &file, size, limit));
            return Ok(Some(unusable(path, false)));
        }
        Err(ReadError::Guest(error @ GuestError::Unreadable { .. })) => {
            findings.push(damaged(path, error.to_string()));
            return Ok(Some(unusable(path, false)));
        }
        Err(ReadError::Guest(error)) => return Err(error),
    };
    // load_hive has walked a dirty hive cell by cell.
    let whole = match BaseBlock::parse(&loaded.bytes) {
        Ok(_) if loaded.dirty => Ok(()),
        Ok(base) => bins_whole(&loaded.bytes, base.bins_size),
        Err(error) => Err(error.to_string()),
    };
    if let Err(fault) = whole {
        findings.push(damaged(path, fault));
        return Ok(Some(unusable(path, loaded.dirty)));
    }
    for warning in &loaded.warnings {
        findings.push(warn(path, warning));
    }
    if loaded.replayed.is_some() {
        findings.push(findings::HIVE_REPLAYED.found_with(
            &[
                path,
                &crate::ui::count(loaded.log_entries_replayable, "entry"),
            ],
            path.to_string(),
        ));
    }
    Ok(Some(Loaded {
        state: HiveState {
            path: path.clone(),
            dirty: loaded.dirty,
            log_entries_replayable: loaded.log_entries_replayable,
        },
        hive: Some(LoadedBytes {
            path: path.clone(),
            bytes: loaded.bytes,
            replayed: loaded.replayed.is_some(),
            logs,
        }),
    }))
}

fn warn(path: &GuestPath, warning: &LoadWarning) -> Finding {
    let evidence = path.to_string();
    match warning {
        LoadWarning::Stale { hive, reasons } => {
            findings::HIVE_STALE.found_with(&[hive, reasons], evidence)
        }
        LoadWarning::Replay { hive, warning } => {
            findings::HIVE_LOG_LOST.found_with(&[hive, warning], evidence)
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn unusable(path: &GuestPath, dirty: bool) -> Loaded {
    Loaded {
        state: HiveState {
            path: path.clone(),
            dirty,
            log_entries_replayable: 0,
        },
        hive: None,
    }
}

/// The finding for a file over the limit; `file` is the hive or one of its logs.
fn too_large(path: &GuestPath, file: &str, size: u64, limit: u64) -> Finding {
    findings::HIVE_TOO_LARGE.found_with(&[&file, &(size >> 20), &(limit >> 20)], path.to_string())
}

fn damaged(path: &GuestPath, reason: String) -> Finding {
    findings::HIVE_DAMAGED.found_with(&[path], reason)
}

/// Whether the chain of hive bins is unbroken: each starts at the end of the previous one.
fn bins_whole(bytes: &[u8], bins_size: u32) -> Result<(), String> {
    let bins = bytes
        .get(BASE_BLOCK_SIZE..)
        .and_then(|rest| rest.get(..bins_size as usize))
        .ok_or_else(|| {
            format!(
                "{bins_size} bytes of hive bins announced, {} bytes in the file",
                bytes.len()
            )
        })?;
    if bins.is_empty() {
        return Err("no hive bins".into());
    }
    let mut at = 0;
    while at < bins.len() {
        let field = |i: usize| le32(bins, at + i).map(|n| n as usize);
        let good = bins[at..].starts_with(b"hbin") && field(4) == Some(at);
        match field(8) {
            Some(size) if good && size >= 4096 && size % 4096 == 0 => at += size,
            _ => return Err(format!("no hive bin at byte {}", at + BASE_BLOCK_SIZE)),
        }
    }
    if at == bins.len() {
        Ok(())
    } else {
        Err("the last hive bin ends outside the hive".into())
    }
}
