//! [`ExtentJournal`]: the ranges of a disk that are durable on the target of a copy.
//!
//! A text file that only grows. Each line is the CRC-32 of the rest, and a JSON value. The first
//! has the identity of source and target, each further one an array of `[start, length]` pairs for
//! a batch. A line is written after the target was flushed, so no line is ever durable before its
//! ranges. The lines are synced together ([`SYNC_EVERY`]): a killed process loses none, a host
//! without power those of the last moment. Before the first line, what the record relies on is made
//! durable ([`Foundation`]). However the process ends, the file has whole lines and at most torn
//! ones at its end. These are cut off when it is opened.

use std::fmt;
use std::fs::{File, Permissions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use serde_json::{Value, json};
use std::os::unix::fs::OpenOptionsExt;

use super::extents::Extents;
use crate::files;

/// The longest line: a batch has at most a few thousand ranges.
const MAX_LINE: u64 = 16 << 20;
/// The time after which a line is made durable. Each sync costs the copy the time of a flush.
const SYNC_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum JournalFault {
    #[error("writing the copy journal {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("reading the copy journal {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl JournalFault {
    pub(crate) fn into_cause(self) -> io::Error {
        match self {
            Self::Write { source, .. } | Self::Read { source, .. } => source,
        }
    }

    /// The error of the operating system.
    pub(crate) fn cause(&self) -> &io::Error {
        match self {
            Self::Write { source, .. } | Self::Read { source, .. } => source,
        }
    }
}

/// Makes durable what a record of a copy relies on.
#[derive(Clone)]
pub(crate) struct Foundation(Arc<dyn Fn() -> io::Result<()> + Send + Sync>);

impl Foundation {
    pub(crate) fn new(lay: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(lay))
    }

    pub(crate) fn lay(&self) -> io::Result<()> {
        (self.0)()
    }
}

impl fmt::Debug for Foundation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Foundation")
    }
}

/// The record of one copy, open for the next batch.
#[derive(Debug)]
pub(crate) struct ExtentJournal {
    path: PathBuf,
    file: File,
    done: Extents,
    synced: Instant,
    /// What remains to be done before the first batch.
    first: Option<First>,
}

/// The state of a record before its first batch.
#[derive(Debug)]
struct First {
    foundation: Option<Foundation>,
    /// The start of a copy after which the run ends; `None` if an earlier run has begun it.
    created: Option<Instant>,
}

/// The journal of an earlier run, and its identity of source and target.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) what: Value,
    pub(crate) journal: ExtentJournal,
}

impl ExtentJournal {
    /// Starts a new journal in place of an old one. `what` names source and target. It becomes
    /// durable with its first batch, after `foundation`. `is_all`: nothing else of the run takes long.
    pub(crate) fn create(
        path: &Path,
        what: &Value,
        (foundation, is_all): (Option<Foundation>, bool),
    ) -> Result<Self, JournalFault> {
        let journal = Self::start(path, what, Extents::default());
        let mut journal = journal.map_err(|source| JournalFault::Write {
            path: path.to_owned(),
            source,
        })?;
        journal.first = Some(First {
            foundation,
            created: is_all.then(Instant::now),
        });
        Ok(journal)
    }

    /// Starts a new journal that already contains these ranges.
    pub(crate) fn restart(path: &Path, what: &Value, done: Extents) -> Result<Self, JournalFault> {
        let restart = || {
            let journal = Self::start(path, what, done)?;
            journal.make_durable()?;
            Ok(journal)
        };
        restart().map_err(|source| JournalFault::Write {
            path: path.to_owned(),
            source,
        })
    }

    /// Writes a temporary file and renames it: there is always a complete one.
    fn start(path: &Path, what: &Value, done: Extents) -> io::Result<Self> {
        let mut beside = path.as_os_str().to_owned();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        files::removed(std::fs::remove_file(&beside))?;
        let mut file = File::options()
            .append(true)
            .read(true)
            .create_new(true)
            .open(&beside)?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        let mut text = line(what);
        if !done.is_empty() {
            text += &line(&batch(done.iter()));
        }
        file.write_all(text.as_bytes())?;
        std::fs::rename(&beside, path)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            done,
            synced: Instant::now(),
            first: None,
        })
    }

    /// Makes the file and its name durable.
    fn make_durable(&self) -> io::Result<()> {
        self.file.sync_all()?;
        File::open(files::folder_of(&self.path))?.sync_all()
    }

    /// Opens the journal of an earlier run. `None` if there is none, or if not even one line is
    /// complete.
    pub(crate) fn open(path: &Path) -> Result<Option<Opened>, JournalFault> {
        let failed = |source| JournalFault::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::options()
            .append(true)
            .read(true)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(path);
        let file = match file {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(failed)?,
        };
        let mut lines = Lines(BufReader::new(&file));
        let Some((what, mut whole)) = lines.next().map_err(failed)? else {
            return Ok(None);
        };
        let mut done = Extents::default();
        let mut batches = 0u64;
        while let Some((value, len)) = lines.next().map_err(failed)? {
            let Some(ranges) = ranges(&value) else { break };
            ranges.into_iter().for_each(|range| done.insert(range));
            whole += len;
            batches += 1;
        }
        let torn = file.metadata().map_err(failed)?.len() != whole;
        let mut journal = if torn || batches > 1 {
            Self::restart(path, &what, done)?
        } else {
            Self {
                path: path.to_owned(),
                file,
                done,
                synced: Instant::now(),
                first: None,
            }
        };
        // The earlier run may have been killed before that was durable.
        journal.first = Some(First {
            foundation: None,
            created: None,
        });
        Ok(Some(Opened { what, journal }))
    }

    /// The durable ranges of the target.
    pub(crate) fn done(&self) -> &Extents {
        &self.done
    }

    /// The same journal, with what must be durable before its next batch.
    #[must_use]
    pub(crate) fn founded_on(mut self, foundation: Option<Foundation>) -> Self {
        let created = self.first.as_ref().and_then(|first| first.created);
        self.first = Some(First {
            foundation,
            created,
        });
        self
    }

    /// Whether a copy that is finished need not be recorded: nothing of it is, and it took little time.
    pub(crate) fn is_needless(&self) -> bool {
        let created = self.first.as_ref().and_then(|first| first.created);
        created.is_some_and(|created| created.elapsed() < SYNC_EVERY)
    }

    /// Records ranges after the target was flushed. When this returns, the `last` batch is durable,
    /// and so are those before it.
    pub(crate) fn append(&mut self, ranges: &[Range<u64>], last: bool) -> Result<(), JournalFault> {
        if let Some(first) = &self.first {
            let foundation = first.foundation.as_ref();
            let laid = foundation.map_or(Ok(()), Foundation::lay);
            laid.and_then(|()| self.make_durable())
                .map_err(|source| self.fault(source))?;
            self.first = None;
        }
        if !ranges.is_empty() {
            self.add(ranges)?;
        }
        match last || self.synced.elapsed() >= SYNC_EVERY {
            true => self.sync(),
            false => Ok(()),
        }
    }

    fn add(&mut self, ranges: &[Range<u64>]) -> Result<(), JournalFault> {
        let joined: Extents = ranges.iter().cloned().collect();
        let text = line(&batch(joined.iter()));
        let before = self.file.seek(SeekFrom::End(0));
        let written = before.and_then(|before| {
            let done = self.file.write_all(text.as_bytes());
            if done.is_err() {
                // A torn line would hide the lines after it.
                self.file.set_len(before)?;
            }
            done
        });
        written.map_err(|source| self.fault(source))?;
        self.done.extend(&joined);
        Ok(())
    }

    /// Makes every line durable.
    fn sync(&mut self) -> Result<(), JournalFault> {
        let synced = self.file.sync_data();
        synced.map_err(|source| self.fault(source))?;
        self.synced = Instant::now();
        Ok(())
    }

    fn fault(&self, source: io::Error) -> JournalFault {
        JournalFault::Write {
            path: self.path.clone(),
            source,
        }
    }
}

fn batch(ranges: impl Iterator<Item = Range<u64>>) -> Value {
    ranges
        .map(|range| json!([range.start, range.end - range.start]))
        .collect()
}

fn ranges(value: &Value) -> Option<Vec<Range<u64>>> {
    let range = |pair: &Value| {
        let (start, len) = (pair.get(0)?.as_u64()?, pair.get(1)?.as_u64()?);
        Some(start..start.checked_add(len)?)
    };
    value.as_array()?.iter().map(range).collect()
}

fn line(value: &Value) -> String {
    let text = value.to_string();
    format!("{:08x} {text}\n", crc32fast::hash(text.as_bytes()))
}

struct Lines<R>(R);

impl<R: BufRead> Lines<R> {
    /// The next complete line, with its length. `None` at the end and at a torn line.
    fn next(&mut self) -> io::Result<Option<(Value, u64)>> {
        let mut text = Vec::new();
        let len = io::Read::take(&mut self.0, MAX_LINE).read_until(b'\n', &mut text)?;
        let value = text.strip_suffix(b"\n").and_then(|text| {
            let (crc, text) = text.split_at_checked(9)?;
            let crc = u32::from_str_radix(std::str::from_utf8(crc).ok()?.trim_end(), 16).ok()?;
            (crc == crc32fast::hash(text)).then_some(())?;
            serde_json::from_slice(text).ok()
        });
        Ok(value.map(|value| (value, len as u64)))
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn open(path: &Path) -> Opened {
        ExtentJournal::open(path).unwrap().unwrap()
    }

    #[test]
    fn what_was_recorded_is_there_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        assert!(ExtentJournal::open(&path).unwrap().is_none());
        let what = json!({"source": "a", "size": 1u64 << 40});
        let mut journal = ExtentJournal::create(&path, &what, (None, false)).unwrap();
        journal.append(&[0..10, 20..30], false).unwrap();
        journal.append(&[10..20], true).unwrap();
        drop(journal);
        for _ in 0..2 {
            let opened = open(&path);
            assert_eq!(opened.what, what);
            assert_eq!(opened.journal.done(), &Extents::whole(30));
        }
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // A new one discards it.
        ExtentJournal::create(&path, &what, (None, false)).unwrap();
        assert!(open(&path).journal.done().is_empty());
    }

    /// Truncated anywhere, and with any byte changed. The result is never more than was recorded,
    /// and never less than the lines before the damage. Everything recorded next is found.
    #[test]
    fn a_torn_or_damaged_line_loses_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let mut journal = ExtentJournal::create(&path, &json!("what"), (None, false)).unwrap();
        let mut ends = vec![std::fs::metadata(&path).unwrap().len()];
        for i in 0..4u64 {
            journal.append(&[i * 100..i * 100 + 50], false).unwrap();
            ends.push(std::fs::metadata(&path).unwrap().len());
        }
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            for cut in [true, false] {
                let mut damaged = bytes.clone();
                match cut {
                    true => damaged.truncate(at),
                    false => damaged[at] ^= 1,
                }
                std::fs::write(&path, &damaged).unwrap();
                // A line is complete if its newline exists.
                let lines = ends.iter().filter(|end| **end <= at as u64).count() as u64;
                let opened = ExtentJournal::open(&path).unwrap();
                if lines == 0 {
                    assert!(opened.is_none(), "{at}");
                    continue;
                }
                let mut journal = opened.unwrap().journal;
                assert_eq!(journal.done().bytes(), (lines - 1) * 50, "{at} {cut}");
                journal.append(&[9000..9001], true).unwrap();
                let again = open(&path).journal;
                assert_eq!(again.done().bytes(), (lines - 1) * 50 + 1, "{at} {cut}");
            }
        }
    }

    #[test]
    fn the_foundation_is_laid_before_the_first_line_and_only_then() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let foundation = Foundation::new({
            let (path, lines) = (path.clone(), lines.clone());
            move || {
                let text = std::fs::read_to_string(&path)?;
                lines.lock().unwrap().push(text.lines().count());
                Ok(())
            }
        });
        let laid = || std::mem::take(&mut *lines.lock().unwrap());
        let what = json!("what");
        let create =
            || ExtentJournal::create(&path, &what, (Some(foundation.clone()), true)).unwrap();
        let mut journal = create();
        assert!(laid().is_empty());
        journal.append(&[0..5], false).unwrap();
        assert_eq!(laid(), [1]);
        journal.append(&[5..9], true).unwrap();
        assert!(laid().is_empty());
        // An earlier run has recorded: even the last batch of this one is recorded.
        let mut journal = open(&path).journal.founded_on(Some(foundation.clone()));
        journal.append(&[9..10], true).unwrap();
        assert_eq!(laid(), [2]);
        assert_eq!(open(&path).journal.done(), &Extents::whole(10));
    }

    #[test]
    fn a_record_is_needless_where_nothing_is_recorded_and_the_copy_took_no_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let mut journal = ExtentJournal::create(&path, &json!(1), (None, true)).unwrap();
        assert!(journal.is_needless());
        journal.first.as_mut().unwrap().created = Instant::now().checked_sub(SYNC_EVERY);
        assert!(!journal.is_needless());
        let mut journal = ExtentJournal::create(&path, &json!(1), (None, true)).unwrap();
        journal.append(&[0..5], false).unwrap();
        assert!(!journal.is_needless());
        // Other disks are still being copied.
        let journal = ExtentJournal::create(&path, &json!(1), (None, false)).unwrap();
        assert!(!journal.is_needless());
        // What an earlier run has recorded is continued.
        assert!(!open(&path).journal.is_needless());
    }

    #[test]
    fn nothing_is_recorded_on_a_foundation_that_cannot_be_laid() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let foundation = Foundation::new(|| Err(io::ErrorKind::StorageFull.into()));
        let mut journal =
            ExtentJournal::create(&path, &json!(1), (Some(foundation), false)).unwrap();
        for _ in 0..2 {
            let fault = journal.append(&[0..5], false).unwrap_err();
            assert_eq!(fault.cause().kind(), io::ErrorKind::StorageFull);
        }
        assert!(open(&path).journal.done().is_empty());
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("j"), dir.path().join("l"));
        ExtentJournal::create(&path, &json!(1), (None, true)).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(ExtentJournal::open(&link).is_err());
    }
}
