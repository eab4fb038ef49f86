//! Records everything that a killed rehearsal would leave behind, before it is made.
//!
//! The lock file in the evidence directory names the domain and the work directory. A copy of it is
//! where [`leftovers`] finds it. A rehearsal has ended when nobody holds the lock: the next run
//! removes everything in the record, and `doctor` lists it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::boot::evidence::qemu_logs;
use crate::domain::element::Element;
use crate::error::{Error, Result};
use crate::files::{self, create_private};
use crate::fix::journal::write_durably;
use crate::fix::trusted::TrustedFolder;
use crate::lock::{FileLock, LockError};
use crate::tool::virsh::Virsh;

/// The lock file in the evidence directory; locked while the rehearsal runs.
pub(crate) const LOCK: &str = ".rehearsal.lock";
/// The prefix of a work directory's name, before the token.
pub(crate) const WORK: &str = ".rehearsal-";
const SCHEMA: &str = "hyper2kvm/rehearsal-record/1";
const SUFFIX: &str = "json";

/// Attribute of the metadata element that marks the domain, with the token of the rehearsal.
pub(super) const MARK: &str = "rehearsal";

/// The things to remove at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    schema: String,
    pub(crate) uri: String,
    pub(crate) uuid: Uuid,
    /// The name of the domain.
    pub(crate) name: String,
    #[serde(with = "crate::text::json_path")]
    pub(crate) evidence: PathBuf,
    #[serde(with = "crate::text::json_path")]
    pub(crate) work: PathBuf,
    /// The token in the mark of the domain.
    pub(crate) token: Uuid,
}

impl Record {
    /// Creates a record; `place` is the directory in which the work directory is created.
    pub(crate) fn new(uri: &str, uuid: Uuid, vm: &str, evidence: &Path, place: &Path) -> Self {
        let token = Uuid::new_v4();
        let short = short(token);
        Self {
            schema: SCHEMA.to_owned(),
            uri: uri.to_owned(),
            uuid,
            name: format!("{vm}-rehearsal-{short}"),
            evidence: evidence.to_owned(),
            work: place.join(format!("{WORK}{short}")),
            token,
        }
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let record: Self = serde_json::from_slice(bytes).ok()?;
        (record.schema == SCHEMA && record.is_sound()).then_some(record)
    }

    /// Whether the record is valid: only a directory with the name of a work directory is ever
    /// removed as one.
    fn is_sound(&self) -> bool {
        let name = format!("{WORK}{}", short(self.token));
        self.work.is_absolute() && self.work.file_name() == Some(OsStr::new(&name))
    }

    fn text(&self) -> String {
        format!("{:#}\n", serde_json::json!(self))
    }

    /// Removes the domain with its UEFI variables and TPM, the work directory and QEMU's log. May
    /// be repeated. A domain without the mark of this rehearsal is not changed.
    pub(crate) fn remove(&self) -> Result<()> {
        let virsh = Virsh::new(&self.uri).ignoring_stop();
        let there = || Ok::<_, Error>(virsh.uuids()?.contains(&self.uuid));
        if there()? && is_marked(&virsh.xml(self.uuid, false)?, self.token) {
            if virsh.running()?.contains(&self.uuid)
                && let Err(error) = virsh.destroy(self.uuid)
                && virsh.running()?.contains(&self.uuid)
            {
                return Err(error.into());
            }
            if let Err(error) = virsh.undefine(self.uuid)
                && there()?
            {
                return Err(error.into());
            }
        }
        files::removed(fs::remove_dir_all(&self.work))
            .map_err(|e| Error::failed(format!("removing {}", self.work.display())).because(e))?;
        // No other domain has its name. A user without permission leaves it.
        for log in qemu_logs(&self.name) {
            let _ = fs::remove_file(log);
        }
        Ok(())
    }
}

fn short(token: Uuid) -> String {
    token.simple().to_string().chars().take(8).collect()
}

/// An evidence directory locked by this run.
#[derive(Debug)]
pub(crate) struct Claim {
    lock: FileLock,
    index: Option<PathBuf>,
}

impl Claim {
    /// Locks the directory and removes the leftovers that a killed run has recorded there.
    pub(crate) fn take(evidence: &Path) -> Result<Self> {
        TrustedFolder::open(evidence)?;
        let lock = FileLock::of_directory(evidence, LOCK, || {
            let shown = evidence.display();
            Error::failed(format!("another rehearsal is at work in {shown}"))
                .hint("wait for it, or name another directory with --output-dir")
        })?;
        let note = lock
            .note()
            .map_err(|e| Error::failed(format!("locking {}", evidence.display())).because(e))?;
        if let Some(left) = Record::parse(note.as_bytes()) {
            left.remove()?;
            forget(&left);
        }
        Ok(Self { lock, index: None })
    }

    /// Records what will be made next; durable when this returns.
    pub(crate) fn note(&mut self, record: &Record) -> Result<()> {
        let failed = |e: io::Error| {
            Error::failed(format!("writing to {}", record.evidence.display())).because(e)
        };
        self.lock.set_note(&record.text()).map_err(failed)?;
        match enter(record) {
            Ok(path) => self.index = Some(path),
            // The evidence directory has the record, too.
            Err(error) => tracing::warn!("doctor will not know of this rehearsal: {error}"),
        }
        Ok(())
    }

    /// Ends the record after everything is removed.
    pub(crate) fn done(self) {
        if let Some(index) = self.index {
            let _ = fs::remove_file(index);
        }
        self.lock.remove();
    }
}

/// The directory with the records of this user's rehearsals.
fn index() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from);
    let state = set("XDG_STATE_HOME").filter(|p| p.is_absolute());
    let state = state.or_else(|| match rustix::process::geteuid().is_root() {
        true => Some("/var/lib".into()),
        false => Some(
            set("HOME")
                .filter(|p| p.is_absolute())?
                .join(".local/state"),
        ),
    });
    Some(state?.join("hyper2kvm/rehearsals"))
}

fn enter(record: &Record) -> io::Result<PathBuf> {
    let folder = index().ok_or_else(|| io::Error::other("HOME is not set"))?;
    create_private(&folder)?;
    let path = folder.join(format!("{}.{SUFFIX}", record.token));
    write_durably(&path, record.text().as_bytes())?;
    Ok(path)
}

fn forget(record: &Record) {
    if let Some(folder) = index() {
        let _ = fs::remove_file(folder.join(format!("{}.{SUFFIX}", record.token)));
    }
}

/// A recorded rehearsal that has not ended normally.
#[derive(Debug)]
pub(crate) struct Leftover {
    pub(crate) record: Record,
    /// Whether a process is still working on it.
    pub(crate) runs: bool,
    lock: Option<FileLock>,
}

/// All leftovers of this user. Those that are not running stay locked until they are dropped.
pub(crate) fn leftovers() -> Vec<Leftover> {
    let Some(folder) = index() else {
        return Vec::new();
    };
    let Ok(held) = TrustedFolder::open(&folder) else {
        return Vec::new();
    };
    let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
    let names = entries.map(|e| PathBuf::from(e.file_name()));
    let mut names: Vec<_> = names
        .filter(|n| n.extension().is_some_and(|e| e == SUFFIX))
        .collect();
    names.sort();
    let records = names
        .iter()
        .filter_map(|name| Record::parse(&held.read(name).ok()?));
    records.map(Leftover::of).collect()
}

impl Leftover {
    fn of(record: Record) -> Self {
        let lock = File::open(&record.evidence)
            .ok()
            .map(|folder| FileLock::take(&folder, LOCK.as_ref(), &record.evidence, false));
        let (runs, lock) = match lock {
            Some(Err(LockError::Held { .. })) => (true, None),
            Some(Ok(lock)) => (false, lock),
            _ => (false, None),
        };
        Self { record, runs, lock }
    }

    /// Removes its leftovers.
    pub(crate) fn remove(self) -> Result<()> {
        self.record.remove()?;
        forget(&self.record);
        let noted = |lock: &FileLock| Record::parse(lock.note().ok()?.as_bytes());
        if let Some(lock) = self.lock
            && noted(&lock).is_some_and(|record| record.token == self.record.token)
        {
            lock.remove();
        }
        Ok(())
    }
}

/// Whether a domain of libvirt has the mark with this token.
pub(crate) fn is_marked(xml: &str, token: Uuid) -> bool {
    let token = token.to_string();
    let marked = |root: Element| {
        let metadata = root.first("metadata");
        let marks = metadata.into_iter().flat_map(|m| m.all("conversion"));
        marks
            .into_iter()
            .any(|mark| mark.attr(MARK) == Some(token.as_str()))
    };
    Element::parse(xml.as_bytes()).is_ok_and(marked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_names_only_a_work_directory() {
        let record = Record::new(
            "qemu:///session",
            Uuid::from_u128(7),
            "vm",
            Path::new("/e"),
            Path::new("/e"),
        );
        let name = record.work.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with(WORK) && record.name.starts_with("vm-rehearsal-"));
        assert_eq!(
            Record::parse(record.text().as_bytes()),
            Some(record.clone())
        );
        for work in ["/e", "/", "/e/.rehearsal-00000000", ".rehearsal-"] {
            let planted = Record {
                work: work.into(),
                ..record.clone()
            };
            assert_eq!(Record::parse(planted.text().as_bytes()), None, "{work}");
        }
        assert_eq!(Record::parse(b"{}"), None);
        assert_eq!(Record::parse(b""), None);
    }

    #[test]
    fn a_directory_has_one_rehearsal_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let claim = Claim::take(dir.path()).unwrap();
        let error = Claim::take(dir.path()).unwrap_err();
        assert!(error.message.contains("another rehearsal"), "{error}");
        claim.done();
        assert!(!dir.path().join(LOCK).exists());
        Claim::take(dir.path()).unwrap().done();
    }
}
