//! Replays transaction logs over a dirty hive, in memory, as Windows does at the next load.
//!
//! A hive is dirty when the two sequence numbers of its base block differ or the base block is
//! damaged. The logs beside it have the missing changes. The rules are from the "Windows registry
//! file format specification" (msuhanov/regf) and from observing Windows with dirty hives:
//!
//! * Entry logs (Windows 8.1+): a log whose first sequence number is behind the *secondary* number
//!   of the hive is stale. Of two usable logs the one with the lower first number is replayed
//!   first, whichever file it is in. The other one continues only if it starts with exactly the
//!   next number. A gap between the hive and the first log is normal. Replay stops before the first
//!   bad entry.
//! * Page logs (up to Windows 8): the usable log with the latest timestamp, not older than the
//!   hive's.
//! * A damaged base block is replaced by the copy in the latest log, and then only that log counts.
//!
//! The result gets equal sequence numbers *above* those of the last entry, as Windows 10 does
//! (entries up to 5 gave 6/6). So no entry in the logs can appear newer than the hive.
//!
//! hyper2kvm differs from Windows in two cases. Windows replaces a hive bin that is damaged after
//! replay by an empty one. It stops in the middle of a bad page log. Both lose keys silently, so
//! such a result is not [usable](Recovery::usable) here.

use std::borrow::Cow;
use std::cmp::Reverse;

use super::base::{self, BaseBlock, FileType};
use super::hive::BASE_BLOCK_SIZE;
use super::log::{BIN_ALIGN, HEADER_SIZE, Log, LogEntry, LogError, Page, Stop, seq_ahead};
use crate::bytes::{le32, le64};

/// The only flag of the base block that is copied to a log entry.
const FLAG_KTM_LOCKED: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    #[error("the hive is {0} bytes, too short for a base block")]
    TooShort(usize),
    #[error("the base block of the hive is damaged and no log can replace it")]
    NoBaseBlock,
}

/// A log that was replayed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppliedLog {
    pub name: String,
    /// The number of entries; 1 for a page log, which is a single transaction.
    pub entries: u32,
    pub first_seq: u32,
    pub last_seq: u32,
}

/// The reason why a log was not replayed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SkipReason {
    #[error(transparent)]
    Unusable(#[from] LogError),
    #[error("its changes are already in the hive: it starts at {log}, the hive is at {hive}")]
    Stale { log: u32, hive: u32 },
    #[error("it is older than the hive")]
    OlderThanHive,
    #[error("a later log is used instead")]
    Superseded,
    #[error("it starts at {found}, but {expected} would be next")]
    Gap { expected: u32, found: u32 },
    #[error("it has no entry of its own: {0}")]
    NoEntries(Stop),
    #[error("after replay the hive bin at offset {offset:#x} is damaged")]
    BrokenBin { offset: u32 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedLog {
    pub name: String,
    pub reason: SkipReason,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplayWarning {
    #[error(
        "the base block of the hive was damaged; as Windows does, the copy in {log} was used and no \
         other log replayed"
    )]
    BaseBlockFromLog { log: String },
    #[error("{log}: {stop}; changes from there on are lost")]
    Torn { log: String, stop: Stop },
    #[error("{log} cannot be used: {reason}; changes that were only there are lost")]
    LogLost { log: String, reason: SkipReason },
    #[error(
        "the hive is clean at sequence number {hive}, but {log} continues to {last}: \
         some program saved the hive without replaying its logs, and their changes are lost"
    )]
    LogAhead { log: String, last: u32, hive: u32 },
}

/// The result of a replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovery<'b> {
    /// The hive as Windows would load it, marked clean; the original bytes if nothing was replayed.
    pub bytes: Cow<'b, [u8]>,
    pub applied: Vec<AppliedLog>,
    pub skipped: Vec<SkippedLog>,
    pub warnings: Vec<ReplayWarning>,
    pub was_dirty: bool,
    /// Whether the hive was clean or has been recovered. Otherwise `bytes` is the stale hive.
    pub usable: bool,
}

impl Recovery<'_> {
    pub fn entries(&self) -> u32 {
        self.applied.iter().map(|log| log.entries).sum()
    }
}

/// Replays `logs`, given as (name, contents) in the order LOG1, LOG2, LOG, over the hive `primary`.
pub fn recover<'b>(
    primary: &'b [u8],
    logs: &[(&str, &'b [u8])],
) -> Result<Recovery<'b>, ReplayError> {
    if primary.len() < BASE_BLOCK_SIZE {
        return Err(ReplayError::TooShort(primary.len()));
    }
    let mut plan = Replay::new(primary, logs);
    if plan.base.is_none() && plan.steps.is_empty() {
        return Err(ReplayError::NoBaseBlock);
    }
    let mut recovery = Recovery {
        bytes: Cow::Borrowed(primary),
        applied: Vec::new(),
        was_dirty: plan.is_dirty(),
        usable: !plan.is_dirty(),
        skipped: Vec::new(),
        warnings: Vec::new(),
    };
    if !plan.steps.is_empty() {
        let bytes = plan.apply(primary);
        match broken_bin(&bytes) {
            None => {
                recovery.bytes = Cow::Owned(bytes);
                recovery.applied = plan.steps.iter().map(Step::summary).collect();
                recovery.usable = true;
            }
            Some(_) if plan.base.is_none() => return Err(ReplayError::NoBaseBlock),
            Some(offset) => {
                let reason = SkipReason::BrokenBin { offset };
                for step in &plan.steps {
                    plan.skipped.push(skip(step.name, reason.clone()));
                }
            }
        }
    }
    recovery.skipped = plan.skipped;
    recovery.warnings = plan.warnings;
    Ok(recovery)
}

/// The number of log entries that would be replayed (0 for a clean hive), without doing it. A page
/// log counts as one entry.
pub fn pending(primary: &[u8], logs: &[(&str, &[u8])]) -> u32 {
    let plan = Replay::new(primary, logs);
    plan.steps.iter().map(|step| step.summary().entries).sum()
}

fn skip(name: &str, reason: SkipReason) -> SkippedLog {
    SkippedLog {
        name: name.to_string(),
        reason,
    }
}

/// The logs to replay, in order.
struct Replay<'b, 'n> {
    /// The hive's base block, if intact.
    base: Option<BaseBlock>,
    /// The timestamp at the start of the hive's bins; replaces that of a damaged base block.
    bin_time: Option<u64>,
    /// The most bytes of hive bins. Everything that grows a hive is itself in the logs, so this
    /// limits what a forged entry can request.
    limit: usize,
    steps: Vec<Step<'b, 'n>>,
    skipped: Vec<SkippedLog>,
    warnings: Vec<ReplayWarning>,
}

struct Step<'b, 'n> {
    name: &'n str,
    log: Log<'b>,
    changes: Changes<'b>,
}

enum Changes<'b> {
    /// At least one.
    Entries(Vec<LogEntry<'b>>),
    Pages(Vec<Page<'b>>),
}

type Named<'b, 'n> = (&'n str, Log<'b>);

fn intact_base(hive: &[u8]) -> Option<BaseBlock> {
    let base = BaseBlock::parse(hive).ok()?;
    (base.checksum_ok() && base.file_type == FileType::Primary).then_some(base)
}

/// The logs with entries newer than a clean hive.
fn logs_ahead(hive: u32, logs: &[Named]) -> Vec<ReplayWarning> {
    let mut warnings = Vec::new();
    for (name, log) in logs {
        // The base block alone is not enough: it is written before the entry.
        if let Some(last) = log.entries(usize::MAX).0.last().map(|e| e.seq)
            && seq_ahead(last, hive) > 0
        {
            warnings.push(ReplayWarning::LogAhead {
                log: name.to_string(),
                last,
                hive,
            });
        }
    }
    warnings
}

impl<'b, 'n> Replay<'b, 'n> {
    fn new(primary: &'b [u8], logs: &[(&'n str, &'b [u8])]) -> Self {
        let sizes = logs.iter().map(|(_, log)| log.len());
        let mut plan = Replay {
            base: intact_base(primary),
            bin_time: le64(primary, BASE_BLOCK_SIZE + 20),
            limit: sizes.fold(primary.len(), usize::saturating_add),
            steps: Vec::new(),
            skipped: Vec::new(),
            warnings: Vec::new(),
        };
        let mut entry_logs: Vec<Named> = Vec::new();
        let mut page_logs: Vec<Named> = Vec::new();
        let mut broken = Vec::new();
        for (name, bytes) in logs {
            match Log::parse(bytes) {
                Ok(log) if log.has_entries() => entry_logs.push((name, log)),
                Ok(log) => page_logs.push((name, log)),
                Err(error) => broken.push((*name, error)),
            }
        }
        if let Some(base) = &plan.base
            && !base.is_dirty()
        {
            plan.warnings = logs_ahead(base.primary_sequence, &entry_logs);
            return plan;
        }
        for (name, error) in broken {
            match error {
                // The normal state of the second log.
                LogError::Empty => plan.skip(name, error.into()),
                _ => plan.lose(name, error.into()),
            }
        }
        // A page log beside entry logs remains from before an upgrade of Windows.
        if entry_logs.is_empty() {
            plan.add_page_logs(page_logs);
        } else {
            plan.skip_all(page_logs, SkipReason::Superseded);
            plan.add_entry_logs(entry_logs);
        }
        if plan.base.is_none()
            && let Some(step) = plan.steps.last()
        {
            plan.warnings.push(ReplayWarning::BaseBlockFromLog {
                log: step.name.to_string(),
            });
        }
        plan
    }

    fn is_dirty(&self) -> bool {
        self.base.as_ref().is_none_or(BaseBlock::is_dirty)
    }

    fn skip(&mut self, name: &str, reason: SkipReason) {
        self.skipped.push(skip(name, reason));
    }

    fn skip_all(&mut self, logs: impl IntoIterator<Item = Named<'b, 'n>>, reason: SkipReason) {
        for (name, _) in logs {
            self.skip(name, reason.clone());
        }
    }

    /// Skips a log with changes.
    fn lose(&mut self, name: &str, reason: SkipReason) {
        self.warnings.push(ReplayWarning::LogLost {
            log: name.to_string(),
            reason: reason.clone(),
        });
        self.skip(name, reason);
    }

    /// Whether the log is behind the hive. If so, it is recorded as stale.
    fn is_stale(&mut self, name: &str, log: &Log) -> bool {
        let Some(hive) = self.base.as_ref().map(|b| b.secondary_sequence) else {
            return false;
        };
        let log = log.base.primary_sequence;
        let stale = seq_ahead(log, hive) < 0;
        if stale {
            self.skip(name, SkipReason::Stale { log, hive });
        }
        stale
    }

    fn add_entry_logs(&mut self, mut logs: Vec<Named<'b, 'n>>) {
        logs.retain(|(name, log)| !self.is_stale(name, log));
        let Some(origin) = logs.first().map(|(_, log)| log.base.primary_sequence) else {
            return;
        };
        // Relative to one of them, so that it is an order even if the numbers wrap.
        logs.sort_by_key(|(_, log)| seq_ahead(log.base.primary_sequence, origin));
        if self.base.is_none() {
            let latest = logs.len() - 1;
            self.skip_all(logs.drain(..latest), SkipReason::Superseded);
        }
        let mut next = None;
        for (name, log) in logs {
            let found = log.base.primary_sequence;
            if let Some(expected) = next
                && expected != found
            {
                self.lose(name, SkipReason::Gap { expected, found });
                continue;
            }
            let (entries, stop) = log.entries(self.limit);
            next = Some(found.wrapping_add(entries.len() as u32));
            if stop != Stop::End {
                self.warnings.push(ReplayWarning::Torn {
                    log: name.to_string(),
                    stop,
                });
            }
            if entries.is_empty() {
                self.skip(name, SkipReason::NoEntries(stop));
            } else {
                self.steps.push(Step {
                    name,
                    log,
                    changes: Changes::Entries(entries),
                });
            }
        }
    }

    fn add_page_logs(&mut self, mut logs: Vec<Named<'b, 'n>>) {
        let hive_time = match &self.base {
            Some(base) => Some(base.last_written),
            None => self.bin_time,
        };
        // Latest first; among equals LOG1, which Windows tries first.
        logs.sort_by_key(|(_, log)| Reverse(log.base.last_written));
        for (name, log) in logs {
            if self.is_stale(name, &log) {
                continue;
            }
            if hive_time.is_some_and(|t| log.base.last_written < t) {
                self.skip(name, SkipReason::OlderThanHive);
            } else if !self.steps.is_empty() {
                self.skip(name, SkipReason::Superseded);
            } else {
                match log.pages(self.limit) {
                    Ok(pages) => self.steps.push(Step {
                        name,
                        log,
                        changes: Changes::Pages(pages),
                    }),
                    Err(error) => self.lose(name, error.into()),
                }
            }
        }
    }

    /// The hive after all steps, of which there is at least one.
    fn apply(&self, primary: &[u8]) -> Vec<u8> {
        let mut bytes = primary.to_vec();
        let mut seq = self.base.as_ref().map_or(0, |b| b.primary_sequence);
        for step in &self.steps {
            put_header(&mut bytes, &step.log, self.base.is_some());
            seq = step.summary().last_seq;
            match &step.changes {
                Changes::Pages(pages) => put_pages(&mut bytes, step.log.base.bins_size, pages),
                Changes::Entries(entries) => {
                    for entry in entries {
                        put_pages(&mut bytes, entry.bins_size, &entry.pages);
                        let flags = le32(&bytes, 144).unwrap_or(0) & !FLAG_KTM_LOCKED;
                        put_u32(&mut bytes, 144, flags | entry.flags & FLAG_KTM_LOCKED);
                    }
                }
            }
        }
        let seq = seq.wrapping_add(1);
        put_u32(&mut bytes, 4, seq);
        put_u32(&mut bytes, 8, seq);
        let sum = base::checksum(&bytes);
        put_u32(&mut bytes, 508, sum);
        bytes
    }
}

impl Step<'_, '_> {
    fn summary(&self) -> AppliedLog {
        let first_seq = self.log.base.primary_sequence;
        let entries = match &self.changes {
            Changes::Entries(entries) => entries.len() as u32,
            Changes::Pages(_) => 1,
        };
        AppliedLog {
            name: self.name.to_string(),
            entries,
            first_seq,
            last_seq: first_seq.wrapping_add(entries - 1),
        }
    }
}

/// Applies the log's copy of the base block. It was made from memory, so it is the later one.
/// Version, format, root cell and timestamp are taken from it, and everything else too if the
/// hive's own is damaged.
fn put_header(bytes: &mut [u8], log: &Log, keep: bool) {
    let header = log.header();
    if keep {
        bytes[12..28].copy_from_slice(&header[12..28]);
        bytes[32..40].copy_from_slice(&header[32..40]);
    } else {
        bytes[..HEADER_SIZE].copy_from_slice(header);
        // The log has no copy of this part, which has no meaning on disk.
        bytes[HEADER_SIZE..BASE_BLOCK_SIZE].fill(0);
        put_u32(bytes, 28, 0);
    }
}

fn put_pages(bytes: &mut Vec<u8>, bins_size: u32, pages: &[Page]) {
    let end = BASE_BLOCK_SIZE + bins_size as usize;
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    for page in pages {
        let start = BASE_BLOCK_SIZE + page.offset as usize;
        // Parsing checked that the page lies inside the bins.
        bytes[start..start + page.data.len()].copy_from_slice(page.data);
    }
    put_u32(bytes, 40, bins_size);
}

fn put_u32(bytes: &mut [u8], offset: usize, value: u32) {
    bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

/// The offset of the first hive bin with a wrong header. The bins must follow each other without a
/// gap up to the end of the bins.
pub fn broken_bin(hive: &[u8]) -> Option<u32> {
    let Some(size) = le32(hive, 40) else {
        return Some(0);
    };
    let bins = hive.get(BASE_BLOCK_SIZE..).unwrap_or_default();
    let mut offset = 0;
    while offset < size {
        let header = bins.get(offset as usize..).unwrap_or_default();
        let len = le32(header, 8).filter(|len| {
            header.starts_with(b"hbin")
                && le32(header, 4) == Some(offset)
                && *len >= BIN_ALIGN
                && len.is_multiple_of(BIN_ALIGN)
                && *len <= size - offset
                && *len as usize <= header.len()
        });
        match len {
            Some(len) => offset += len,
            None => return Some(offset),
        }
    }
    None
}

#[cfg(test)]
pub(super) mod tests;
