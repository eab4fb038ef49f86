//! The output folder: complete, or not there.
//!
//! Work happens in `.<folder>.partial` beside the final place, under a lock, and is renamed at the end.
//! A partial folder whose lock is free was left by a run that was killed: the next run removes it.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::fix::journal::{self, Journal, JournalError, State, sync_folder};

const LOCK: &str = ".lock";
/// Present in every complete folder of ours.
const MARK: &str = "report.json";

/// The partial folder; removed when dropped before [`OutputFolder::complete`].
pub struct OutputFolder {
    target: PathBuf,
    partial: PathBuf,
    replace: bool,
    _lock: File,
    done: bool,
}

impl OutputFolder {
    /// Whether [`OutputFolder::create`] would take this folder, as far as can be known without writing;
    /// its absolute path.
    pub fn check(target: &Path, force: bool) -> Result<PathBuf> {
        let (target, partial) = names(target)?;
        check_target(&target, force)?;
        check_partial(&partial)?;
        Ok(target)
    }

    /// Checks that `target` may be made (`force`: may replace a folder of ours) and starts the
    /// partial folder.
    pub fn create(target: &Path, force: bool) -> Result<Self> {
        let (target, partial) = names(target)?;
        let replace = check_target(&target, force)?;
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(|e| cannot_write(parent, e))?;
        }
        let lock = claim(&partial)?;
        Ok(Self {
            target,
            partial,
            replace,
            _lock: lock,
            done: false,
        })
    }

    /// Where the work happens.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Where the result will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The journal of the work, wherever the folder is by now.
    pub fn journal(&self) -> Result<Journal, JournalError> {
        Journal::load(&self.partial.join(journal::FILE_NAME))
            .or_else(|_| Journal::load(&self.target.join(journal::FILE_NAME)))
    }

    /// Renames the partial folder to its final name.
    pub fn complete(&mut self) -> Result<()> {
        let failed = |e: io::Error| {
            Error::failed(format!("completing {}", self.target.display())).because(e)
        };
        fs::remove_file(self.partial.join(LOCK)).map_err(failed)?;
        sync_folder(&self.partial).map_err(failed)?;
        let parent = self.target.parent().unwrap_or(Path::new("/"));
        let step = |when| failpoint::step(when, "rename of the output folder").map_err(failed);
        if self.replace {
            step("before")?;
            exchange(&self.partial, &self.target).map_err(failed)?;
            self.done = true;
            step("after")?;
            // The result is in place: what it replaced may be in the way, but is no failure.
            if let Err(error) = fs::remove_dir_all(&self.partial) {
                tracing::warn!("removing {}: {error}", self.partial.display());
            }
        } else {
            step("before")?;
            fs::rename(&self.partial, &self.target).map_err(failed)?;
            self.done = true;
            step("after")?;
        }
        sync_folder(parent).map_err(failed)
    }
}

impl Drop for OutputFolder {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if let Some(journal) = undo_journal(&self.partial) {
            tracing::warn!(
                "the disk was changed; undo that with: hyper2kvm rollback --journal {}",
                journal.path().display()
            );
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.partial) {
            tracing::warn!("removing {}: {error}", self.partial.display());
        }
    }
}

/// Swaps two folders, so that there is always a whole one at either name; where the file system cannot
/// do that, one after the other.
fn exchange(new: &Path, target: &Path) -> io::Result<()> {
    match renameat_with(CWD, new, CWD, target, RenameFlags::EXCHANGE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        done => return Ok(done?),
    }
    let old = new.with_extension("replaced");
    fs::rename(target, &old)?;
    if let Err(error) = fs::rename(new, target) {
        // Put back what was there; the first error is the one to report.
        let _ = fs::rename(&old, target);
        return Err(error);
    }
    fs::rename(&old, new)
}

/// The absolute path of the folder, and of the one the work happens in.
fn names(target: &Path) -> Result<(PathBuf, PathBuf)> {
    let target = std::path::absolute(target)
        .map_err(|e| Error::usage("the output folder has no absolute path").because(e))?;
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(Error::usage(format!(
            "{} cannot be an output folder",
            target.display()
        )));
    };
    let partial = parent.join(format!(".{}.partial", name.to_string_lossy()));
    Ok((target, partial))
}

/// Whether an existing target may be replaced; an empty folder counts as free.
fn check_target(target: &Path, force: bool) -> Result<bool> {
    let exists = target.try_exists().map_err(|e| cannot_write(target, e))?;
    if !exists {
        return Ok(false);
    }
    let empty = fs::read_dir(target)
        .map_err(|e| cannot_write(target, e))?
        .next()
        .is_none();
    if empty {
        return Ok(true);
    }
    let shown = target.display();
    if !target.join(MARK).is_file() {
        return Err(Error::failed(format!(
            "{shown} exists and is not an output folder of this program"
        ))
        .hint("choose another folder with --output-dir"));
    }
    if !force {
        return Err(Error::failed(format!("{shown} exists"))
            .hint("--force replaces it; --output-dir chooses another folder"));
    }
    if let Some(journal) = undo_journal(target) {
        return Err(Error::failed(format!(
            "{shown} holds what undoes a fix in place of {}",
            journal.doc.disk.path.display()
        ))
        .hint(format!(
            "choose another folder with --output-dir, or undo it first: hyper2kvm rollback {shown}"
        )));
    }
    Ok(true)
}

/// Refuses a partial folder that another run is writing, or that is needed to undo something.
fn check_partial(partial: &Path) -> Result<()> {
    if !partial.exists() {
        return Ok(());
    }
    // Opening the lock of another run must not create one.
    if let Ok(lock) = File::open(partial.join(LOCK))
        && let Err(TryLockError::WouldBlock) = lock.try_lock()
    {
        return Err(Error::failed(format!(
            "another conversion is writing {}",
            partial.display()
        ))
        .hint("wait for it, or choose another folder with --output-dir"));
    }
    if let Some(journal) = undo_journal(partial) {
        return Err(Error::new(
            ErrorKind::NotRolledBack,
            "an earlier fix in place was interrupted while it wrote the disk",
        )
        .hint(format!(
            "undo it first: hyper2kvm rollback --journal {}",
            journal.path().display()
        )));
    }
    Ok(())
}

fn claim(partial: &Path) -> Result<File> {
    check_partial(partial)?;
    if partial.exists() {
        tracing::info!("removing {}, left by a killed run", partial.display());
        fs::remove_dir_all(partial).map_err(|e| cannot_write(partial, e))?;
    }
    fs::create_dir(partial).map_err(|e| cannot_write(partial, e))?;
    let lock = File::create(partial.join(LOCK)).map_err(|e| cannot_write(partial, e))?;
    lock.try_lock().map_err(|e| {
        Error::failed(format!("locking {}", partial.display())).because(e.to_string())
    })?;
    Ok(lock)
}

/// The journal in a folder that is needed to undo what was done to a disk.
fn undo_journal(folder: &Path) -> Option<Journal> {
    let journal = Journal::load(&folder.join(journal::FILE_NAME)).ok()?;
    let written = matches!(
        journal.doc.state,
        State::Committing | State::Committed | State::RollingBack
    );
    (journal.doc.disk.in_place && written).then_some(journal)
}

fn cannot_write(path: &Path, error: io::Error) -> Error {
    let shown = path.display();
    if error.kind() == io::ErrorKind::PermissionDenied {
        return Error::missing_tool(format!("no permission to write {shown}"))
            .because(error)
            .hint("choose a folder you may write with --output-dir");
    }
    Error::failed(format!("cannot write {shown}"))
        .because(error)
        .hint("choose another folder with --output-dir")
}

/// A name fit for files and libvirt: letters, digits, `.`, `_`, `-`; never empty or hidden.
pub fn safe_name(name: &str) -> String {
    let mapped: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') {
                c
            } else {
                '-'
            }
        })
        .take(64)
        .collect();
    let trimmed = mapped.trim_matches(['-', '.']);
    if !trimmed.is_empty() {
        trimmed.to_string()
    } else if name.is_ascii() {
        "vm".to_string()
    } else {
        // Two names in another script are two VMs.
        use sha2::Digest as _;
        let digest = sha2::Sha256::digest(name.as_bytes());
        let hex: String = digest.iter().take(4).map(|b| format!("{b:02x}")).collect();
        format!("vm-{hex}")
    }
}

/// The name itself, where nothing of it is in the safe one.
pub fn title(name: &str) -> Option<String> {
    let lost = !name.is_ascii() && !name.contains(|c: char| c.is_ascii_alphanumeric() || c == '_');
    lost.then(|| name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("vm-kvm");
        let names = || {
            let mut names: Vec<_> = fs::read_dir(dir.path())
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        let folder = OutputFolder::create(&target, false).unwrap();
        fs::write(folder.path().join("x"), "1").unwrap();
        assert_eq!(names(), [".vm-kvm.partial"]);
        let second = OutputFolder::create(&target, false).err().unwrap();
        assert!(second.message.contains("another conversion"), "{second}");
        drop(folder);
        assert!(names().is_empty());

        // What a killed run leaves is removed by the next.
        fs::create_dir(dir.path().join(".vm-kvm.partial")).unwrap();
        fs::write(dir.path().join(".vm-kvm.partial/.lock"), "").unwrap();
        fs::write(dir.path().join(".vm-kvm.partial/half"), "").unwrap();
        let mut folder = OutputFolder::create(&target, false).unwrap();
        assert!(!folder.path().join("half").exists());
        fs::write(folder.path().join(MARK), "{}").unwrap();
        folder.complete().unwrap();
        assert_eq!(names(), ["vm-kvm"]);

        let again = OutputFolder::create(&target, false).err().unwrap();
        assert_eq!(again.kind, ErrorKind::Failed);
        let mut folder = OutputFolder::create(&target, true).unwrap();
        fs::write(folder.path().join("new"), "").unwrap();
        folder.complete().unwrap();
        assert_eq!(names(), ["vm-kvm"]);
        assert!(target.join("new").exists() && !target.join(MARK).exists());

        // A folder that is not ours is never replaced.
        assert!(OutputFolder::create(&target, true).is_err());
    }

    #[test]
    fn an_undo_log_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("vm-kvm");
        let disk = journal::DiskRef {
            path: "/disk".into(),
            format: "raw".into(),
            size_bytes: 1,
            in_place: true,
        };
        for (state, kept) in [
            (State::Verified, false),
            (State::RolledBack, false),
            (State::Committing, true),
        ] {
            let folder = OutputFolder::create(&target, false).unwrap();
            let partial = folder.path().to_path_buf();
            let mut journal = Journal::create(&partial, disk.clone(), vec![]).unwrap();
            journal.set_state(state).unwrap();
            drop(folder);
            assert_eq!(partial.exists(), kept, "{state:?}");
        }
        let error = OutputFolder::create(&target, true).err().unwrap();
        assert_eq!(error.kind, ErrorKind::NotRolledBack);
    }

    #[test]
    fn names() {
        for (name, safe) in [
            ("vm", "vm"),
            ("my vm/../x", "my-vm-..-x"),
            ("...", "vm"),
            ("äö", "vm-6641ae9e"),
            ("服务器", "vm-2388cbc6"),
            ("服务器 2", "2"),
            ("---", "vm"),
            ("", "vm"),
            ("-rf", "rf"),
        ] {
            assert_eq!(safe_name(name), safe);
            let hashed = safe.len() == 11 && safe.starts_with("vm-");
            assert_eq!(title(name), hashed.then(|| name.to_string()));
        }
    }
}
