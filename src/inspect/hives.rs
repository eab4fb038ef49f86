//! Reads a hive and the logs beside it, once, and says whether what it has is what Windows would see.
//!
//! A hive whose bin chain is broken is refused. A dirty one is replayed from its logs; a dirty one
//! without logs is checked cell by cell and continues with a warning.

use crate::bytes::le32;
use crate::guest::{GuestError, GuestPath, GuestRead, VolumeId};
use crate::registry::hive::BASE_BLOCK_SIZE;
use crate::registry::{BaseBlock, LoadError, LoadWarning, load_hive};

use super::findings;
use super::model::{Finding, HiveState, LoadedBytes};

/// SOFTWARE hives of 150 MB are real, and SYSTEM ones of 60 MB.
const LARGE_HIVES: [(&str, u64); 2] = [("SOFTWARE", 256 << 20), ("SYSTEM", 160 << 20)];
/// All others, and every log: 30 MB are much.
const HIVE_LIMIT: u64 = 64 << 20;

/// What a hive or log of that name may hold. All that are looked at together stay below what a
/// conversion may take.
fn limit(name: &str) -> u64 {
    let large = LARGE_HIVES
        .iter()
        .find(|(hive, _)| hive.eq_ignore_ascii_case(name));
    large.map_or(HIVE_LIMIT, |(_, limit)| *limit)
}

/// A hive file that is there.
pub struct Loaded {
    pub state: HiveState,
    /// `None` when it cannot be used; then a finding says why.
    pub hive: Option<LoadedBytes>,
}

#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// Loads a hive; `None` when there is no such file.
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
    // A dirty hive was walked cell by cell by load_hive.
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

/// `file` is the hive or one of its logs.
fn too_large(path: &GuestPath, file: &str, size: u64, limit: u64) -> Finding {
    findings::HIVE_TOO_LARGE.found_with(&[&file, &(size >> 20), &(limit >> 20)], path.to_string())
}

fn damaged(path: &GuestPath, reason: String) -> Finding {
    findings::HIVE_DAMAGED.found_with(&[path], reason)
}

/// Whether the chain of hive bins is unbroken: each starts where the one before ends.
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
