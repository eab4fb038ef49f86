//! Decides what `--force` may replace: the files listed in the report of an earlier result, and
//! nothing else.
//!
//! A result that somebody still needs is refused. Its disk may be in use or have changed since the
//! report (a VM ran from it). `boot` may have started the VM. It may be needed to undo a fix in
//! place, or contain the source of this very run. Files that hyper2kvm did not write are moved to
//! the new result.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, StatxAttributes, StatxFlags};
use rustix::fs::{fstat, mkdirat, openat, statat, statx, unlinkat};
use rustix::io::Errno;
use rustix::process::geteuid;
use serde_json::Value;

use crate::boot::record::{self, Phase, Record};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::files::{entries, is_directory, open_directory, rename_new_at};
use crate::fix::commit;
use crate::fix::journal::{self, Journal};
use crate::fix::trusted::{self, TrustError};
use crate::lock::{FileLock, LockError};
use crate::report::OutputFile;
use crate::text::shell_word;

use super::place::{inside, untrusted};
use super::sync;
use crate::boot::in_use::{self, Held};

/// Present in every complete result.
pub(super) const MARK: &str = "report.json";
/// Files written in addition to the report's list: the report, and files that `boot` leaves if it
/// did not start.
const OWN: [&str; 7] = [
    MARK,
    crate::boot::LOCK,
    crate::later::serve::LOCK,
    crate::later::serve::LOG,
    ".boot.json.new",
    ".boot-domain.xml",
    record::INSTALLING,
];
/// Files of results whose report has no list yet.
const UNLISTED: [&str; 4] = ["report.html", "plan.json", "journal.json", ".lock"];
const UNLISTED_FOLDERS: [&str; 3] = ["registry", "backup", "generated"];

/// What exists under the name of the output directory.
#[derive(Debug)]
pub(super) enum Situation {
    Free,
    /// An empty directory.
    Empty,
    Result(Box<Earlier>),
}

/// An earlier result that may be replaced, and the locks that keep it replaceable.
#[derive(Debug, Default)]
pub(super) struct Earlier {
    folder: PathBuf,
    /// Relative paths of the files written by hyper2kvm.
    own: BTreeSet<PathBuf>,
    /// Directories written by hyper2kvm as a whole.
    own_folders: Vec<&'static str>,
    /// Disks that were moved elsewhere; they stay there.
    pub(super) elsewhere: Vec<PathBuf>,
    boot: Option<FileLock>,
    disks: Held,
}

/// A disk of an earlier result.
struct Image {
    path: PathBuf,
    /// The disk in the report: no list, a list without it, or its entry.
    was: Option<Option<OutputFile>>,
}

/// The conditions under which a result is replaced.
pub(super) struct ReplaceOptions<'a> {
    pub(super) force: bool,
    /// Files of the source, as the user named them and as far as they are known.
    pub(super) sources: &'a [PathBuf],
    /// Whether this is the last pass of a sync, which requires a synced directory.
    pub(super) sync: bool,
    /// Whether this is the check right before the exchange. It keeps `boot` from starting the
    /// result that is about to be removed.
    pub(super) last: bool,
}

/// Examines `target`, which is `name` in the open directory `parent`, and refuses what must not be
/// replaced.
pub(super) fn look(parent: &OwnedFd, target: &Path, options: &ReplaceOptions) -> Result<Situation> {
    let shown = target.display();
    let Some(folder) = open_target(parent, target)? else {
        return Ok(Situation::Free);
    };
    let reading = |e: io::Error| Error::failed(format!("reading {shown}")).because(e);
    if fs::read_dir(target).map_err(reading)?.next().is_none() {
        return Ok(Situation::Empty);
    }
    if sync::is_synced(target) {
        return match options.sync {
            true => Ok(Situation::Result(Box::new(Earlier::of(target)?))),
            false => Err(synced(target)),
        };
    }
    let Some(report) = read_report(target)? else {
        return Err(Error::failed(format!(
            "{shown} exists and is not an output directory of this program"
        ))
        .hint("choose another directory with --output-dir"));
    };
    if !options.force {
        return Err(Error::failed(format!("{shown} exists"))
            .hint("--force replaces it; --output-dir chooses another directory"));
    }
    let mut earlier = Earlier::new(target, &report);
    // The disks of the source are locked by this very run. Outside the directory, they are not
    // replaced either.
    let reads = |disk: &PathBuf| options.sources.iter().any(|s| same_file(s, disk));
    earlier.elsewhere.retain(|disk| !reads(disk));
    refuse_sources(target, options.sources)?;
    refuse_undo(target)?;
    earlier.boot = boot_lock(&folder, target, options.last)?;
    let boot = booted(target)?;
    let images = earlier.images(&report);
    earlier.refuse_used(&images, boot.as_ref())?;
    if let Some(boot) = boot.filter(|b| b.phase != Phase::New) {
        return Err(started(target, &boot));
    }
    earlier.refuse_changed(&images)?;
    Ok(Situation::Result(Box::new(earlier)))
}

/// Opens the directory. It must be neither a link nor a mount point: no rename could replace it at
/// the end.
fn open_target(parent: &OwnedFd, target: &Path) -> Result<Option<OwnedFd>> {
    let shown = target.display();
    let name = target.file_name().unwrap_or_default();
    let failed =
        |e: Errno| Error::failed(format!("looking at {shown}")).because(io::Error::from(e));
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let found = match statx(parent, name, flags, StatxFlags::BASIC_STATS) {
        Ok(found) => found,
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    match FileType::from_raw_mode(found.stx_mode.into()) {
        FileType::Directory => {}
        FileType::Symlink => {
            let real = fs::canonicalize(target).unwrap_or_default();
            let error = Error::failed(format!(
                "{shown} is a symbolic link, which the result cannot take the place of"
            ));
            return Err(if real.is_dir() {
                error.hint(format!(
                    "name the directory itself: --output-dir {}",
                    shell_word(&real.display().to_string())
                ))
            } else {
                error.hint("choose another directory with --output-dir")
            });
        }
        _ => {
            return Err(
                Error::failed(format!("{shown} exists and is not a directory"))
                    .hint("choose another directory with --output-dir"),
            );
        }
    }
    let beside = rustix::fs::fstat(parent).map_err(failed)?;
    let here = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    if found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) || here.st_dev != beside.st_dev {
        return Err(Error::failed(format!(
            "{shown} is a mount point: the result is made beside it, on another file system, and cannot take its place"
        ))
        .hint(format!(
            "choose a directory in it: --output-dir {}",
            shell_word(&target.join("vm-kvm").display().to_string())
        )));
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::empty())
        .map(Some)
        .map_err(failed)
}

/// Reads the report of an earlier result; `None` if there is none. The files it lists are removed,
/// so only the caller and root may have written it.
fn read_report(target: &Path) -> Result<Option<Value>> {
    let path = target.join(MARK);
    let bytes = match trusted::read(&path) {
        Ok(bytes) => bytes,
        Err(TrustError::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            return Err(
                Error::missing_tool(format!("no permission to read {}", path.display()))
                    .because(source)
                    .hint("run this as its owner, or choose another directory with --output-dir"),
            );
        }
        Err(e @ (TrustError::Foreign { .. } | TrustError::Writable { .. })) => {
            return Err(untrusted(e));
        }
        Err(TrustError::Io { .. } | TrustError::Link { .. } | TrustError::Kind { .. }) => {
            return Ok(None);
        }
    };
    let report = serde_json::from_slice::<Value>(&bytes).ok();
    Ok(report.filter(|r| r["schema"] == "hyper2kvm/report/1"))
}

fn refuse_sources(target: &Path, sources: &[PathBuf]) -> Result<()> {
    match inside(target, sources) {
        Some(source) => Err(Error::failed(format!(
            "{} lies in {}, which would be replaced by the result",
            source.display(),
            target.display()
        ))
        .hint("choose another directory with --output-dir, or move the source out of it first")),
        None => Ok(()),
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    identity(a).is_some() && identity(a) == identity(b)
}

fn refuse_undo(target: &Path) -> Result<()> {
    let shown = target.display();
    let path = target.join(journal::FILE_NAME);
    match Journal::load(&path) {
        Ok(journal) if journal.needs_undo() => Err(Error::failed(format!(
            "{shown} holds what undoes a fix in place of {}",
            journal.doc.names()
        ))
        .hint(format!(
            "choose another directory with --output-dir, or undo it first: hyper2kvm rollback {}",
            shell_word(&target.display().to_string())
        ))),
        Ok(_) => Ok(()),
        // Saved blocks beside it may be needed, whatever the journal states.
        Err(error) if commit::holds_saved_blocks(target) => {
            Err(Error::failed(format!(
                "{shown} contains saved blocks of a disk ({}), and its journal cannot be used",
                commit::BEFORE_FILE
            ))
            .because(error)
            .hint("choose another directory with --output-dir, or remove this one by hand if no disk has to be restored from it"))
        }
        Err(_) => Ok(()),
    }
}

fn boot_lock(folder: &OwnedFd, target: &Path, create: bool) -> Result<Option<FileLock>> {
    FileLock::take_patiently(folder, crate::boot::LOCK.as_ref(), target, create).map_err(
        |e| match e {
            LockError::Held { .. } => Error::failed(format!(
                "hyper2kvm boot, pull or rollback is at work in {}",
                target.display()
            ))
            .hint("wait for it, or choose another directory with --output-dir"),
            other => Error::failed(format!("locking {}", target.display())).because(other),
        },
    )
}

/// The record of `boot`, if there is one.
fn booted(target: &Path) -> Result<Option<Record>> {
    Record::load(target).map_err(|e| {
        Error::failed(format!(
            "{} was booted, and its record cannot be used",
            target.display()
        ))
        .because(e)
        .hint("choose another directory with --output-dir, or remove this one by hand")
    })
}

fn synced(target: &Path) -> Error {
    let shown = shell_word(&target.display().to_string());
    Error::failed(format!(
        "{} contains the copy of a VM that is being synced",
        target.display()
    ))
    .hint(format!(
        "hyper2kvm convert SOURCE -o {shown} --from-sync makes the last pass, once the VM is off"
    ))
    .hint(format!(
        "hyper2kvm release {shown} gives the copy up; --output-dir chooses another directory"
    ))
}

/// The error for a VM that has started: Windows has written to its disk, and no copy of that
/// exists.
fn started(target: &Path, boot: &Record) -> Error {
    let shown = target.display();
    let switched = matches!(
        boot.phase,
        Phase::Protecting | Phase::Final | Phase::Restoring | Phase::Done
    );
    let what = match switched {
        true => "the VM is past its switch to VirtIO",
        false => "hyper2kvm boot has started the VM",
    };
    Error::failed(format!(
        "{shown} is not replaced: {what} (phase {} of boot.json)",
        boot.phase.as_str()
    ))
    .hint("choose another directory with --output-dir")
    .hint(format!(
        "if the VM is of no use any more: virsh -c {} destroy {}; virsh -c {} undefine --nvram {}; rm -r {}",
        shell_word(&boot.uri),
        shell_word(&boot.name),
        shell_word(&boot.uri),
        shell_word(&boot.name),
        shell_word(&target.display().to_string())
    ))
}

impl Earlier {
    fn new(target: &Path, report: &Value) -> Self {
        let mut earlier = Self {
            folder: target.to_path_buf(),
            own: OWN.iter().map(PathBuf::from).collect(),
            ..Self::default()
        };
        match listed(report) {
            Some(list) => earlier.own.extend(list.into_keys()),
            None => {
                earlier.own.extend(UNLISTED.iter().map(PathBuf::from));
                earlier.own_folders = UNLISTED_FOLDERS.to_vec();
                let name = report["name"].as_str().unwrap_or_default();
                earlier.own.insert(format!("{name}-probe.qcow2").into());
                let outputs = &report["outputs"];
                let lists = [&outputs["disks"], &outputs["emitted"]];
                let lists = lists.into_iter().filter_map(Value::as_array).flatten();
                let single = [&outputs["bootstrap_xml"], &outputs["final_xml"]];
                for path in lists.chain(single).filter_map(Value::as_str) {
                    let path = Path::new(path);
                    // The directory may have been renamed since; disks moved out of it are
                    // elsewhere.
                    if let Some(name) = path.file_name().filter(|n| target.join(n).exists()) {
                        earlier.own.insert(name.into());
                    }
                }
            }
        }
        earlier.own.retain(|path| plain(path));
        for disk in disks(report) {
            if disk.parent() != Some(target) && disk.is_file() {
                earlier.elsewhere.push(disk);
            }
        }
        earlier
    }

    /// The disks of the result: those in the directory by their list entry, and those that were
    /// moved.
    fn images(&self, report: &Value) -> Vec<Image> {
        let list = listed(report);
        let entry = |path: &Path| list.as_ref().map(|list| list.get(path).cloned());
        let disks = disks(report);
        let names: BTreeSet<_> = disks.iter().filter_map(|d| d.file_name()).collect();
        let is_image = |path: &Path| {
            let known = |e: &std::ffi::OsStr| ["qcow2", "raw", "img", "fd"].iter().any(|k| e == *k);
            path.file_name().is_some_and(|name| names.contains(name))
                || path.extension().is_some_and(known)
        };
        let here = self.own.iter().filter(|path| is_image(path));
        let here = here.map(|path| Image {
            path: self.folder.join(path),
            was: entry(path),
        });
        let elsewhere = self.elsewhere.iter().map(|path| Image {
            path: path.clone(),
            was: entry(path),
        });
        here.chain(elsewhere).collect()
    }

    /// Refuses a result with a disk in use by a running VM or a storage program.
    fn refuse_used(&mut self, images: &[Image], boot: Option<&Record>) -> Result<()> {
        let by_hand = |file: &Path, user: &str| {
            Error::failed(format!("{} is in use by {user}", file.display()))
                .hint("choose another directory with --output-dir")
                .hint("shut the VM down first; if it is of no use any more, undefine it and remove its directory by hand")
        };
        let files: Vec<PathBuf> = images
            .iter()
            .map(|image| image.path.clone())
            .filter(|path| path.symlink_metadata().is_ok_and(|m| m.is_file()))
            .collect();
        let mut held = Held::default();
        for file in &files {
            if let Some(user) = held.hold(file) {
                return Err(by_hand(file, &user));
            }
        }
        if let Some(domain) = in_use::domain_of(&files, boot.map(|b| b.uri.as_str()))
            && let Some(file) = files.first()
        {
            return Err(by_hand(file, &domain));
        }
        self.disks = held;
        Ok(())
    }

    /// Refuses a result with a disk that somebody has written to since the report.
    fn refuse_changed(&self, images: &[Image]) -> Result<()> {
        let report = fs::metadata(self.folder.join(MARK)).ok();
        for Image { path, was } in images {
            // The user removed it: nothing is lost.
            let Ok(found) = path.symlink_metadata() else {
                continue;
            };
            let changed = match was {
                _ if !found.is_file() => Some("is no regular file any more".to_owned()),
                Some(was) => was.as_ref().and_then(|was| difference(was, &found)),
                None => report
                    .as_ref()
                    .filter(|report| found.mtime() > report.mtime())
                    .map(|_| "was written to".to_owned()),
            };
            if let Some(how) = changed {
                return Err(Error::failed(format!(
                    "{} has changed since its report was written: it {how}",
                    path.display()
                ))
                .hint("choose another directory with --output-dir")
                .hint(format!(
                    "if that disk is of no use any more, remove it by hand: rm {}",
                    shell_word(&path.display().to_string())
                )));
            }
        }
        Ok(())
    }

    fn is_own(&self, relative: &Path) -> bool {
        self.own.contains(relative)
            || self
                .own_folders
                .iter()
                .any(|folder| relative.starts_with(folder))
    }

    /// Whether hyper2kvm created a directory: it contains at least one of its files.
    fn is_own_folder(&self, relative: &Path) -> bool {
        self.own.iter().any(|path| path.starts_with(relative))
            || self
                .own_folders
                .iter()
                .any(|folder| relative.starts_with(folder))
    }

    /// Opens a directory created by hyper2kvm. A directory of another user, who could exchange its
    /// contents, is left untouched.
    fn own_directory(
        &self,
        folder: &OwnedFd,
        relative: &Path,
        found: &Stat,
    ) -> io::Result<Option<OwnedFd>> {
        if !is_directory(found) || !self.is_own_folder(relative) {
            return Ok(None);
        }
        let name = relative.file_name().unwrap_or_default();
        let fd = open_directory(folder, Path::new(name))?;
        let owner = fstat(&fd)?.st_uid;
        Ok((owner == 0 || owner == geteuid().as_raw()).then_some(fd))
    }

    /// The files not written by hyper2kvm, as relative paths; a directory without any file of
    /// hyper2kvm is listed as a whole.
    pub(super) fn unknown(&self) -> io::Result<Vec<PathBuf>> {
        self.unknown_in(&open_directory(CWD, &self.folder)?)
    }

    /// The same as [`Self::unknown`], for the current path of the directory.
    fn unknown_in(&self, folder: &OwnedFd) -> io::Result<Vec<PathBuf>> {
        let mut unknown = Vec::new();
        self.add_unknown(folder, Path::new(""), &mut unknown)?;
        unknown.sort();
        Ok(unknown)
    }

    fn add_unknown(
        &self,
        folder: &OwnedFd,
        below: &Path,
        unknown: &mut Vec<PathBuf>,
    ) -> io::Result<()> {
        for (name, found) in entries(folder)? {
            let relative = below.join(name);
            if let Some(own) = self.own_directory(folder, &relative, &found)? {
                self.add_unknown(&own, &relative, unknown)?;
            } else if !is_file(&found) || !self.is_own(&relative) {
                unknown.push(relative);
            }
        }
        Ok(())
    }

    /// Refuses user files that have the name of a file of the new result.
    pub(super) fn refuse_collisions(&self, new: &Path) -> Result<Vec<PathBuf>> {
        let unknown = self
            .unknown()
            .map_err(|e| Error::failed(format!("reading {}", self.folder.display())).because(e))?;
        for path in &unknown {
            if new.join(path).symlink_metadata().is_ok() {
                return Err(Error::failed(format!(
                    "{} was not written by hyper2kvm, and the new result has a file of that name",
                    self.folder.join(path).display()
                ))
                .hint("move it elsewhere, or choose another directory with --output-dir"));
            }
        }
        Ok(unknown)
    }

    /// Clears the old directory (of this inode) after the exchange. The user's files move to the
    /// new directory, then the old one is removed. Files that cannot be moved stay in it. Nothing
    /// is opened by path, because another user may own a directory on the way.
    pub(super) fn clear(&mut self, old: &Path, inode: u64, new: &Path) -> io::Result<()> {
        // Their names no longer lead to them. On NFS and FUSE an open file would stay in the
        // directory under another name.
        self.boot = None;
        self.disks = Held::default();
        let (from, to) = (open_directory(CWD, old)?, open_directory(CWD, new)?);
        if fstat(&from)?.st_ino != inode {
            let shown = old.display();
            return Err(io::Error::other(format!("{shown} is another directory")));
        }
        for path in self.unknown_in(&from)? {
            failpoint::step("before", "move of a kept file")?;
            let name = Path::new(path.file_name().unwrap_or_default());
            let to = parent_in(&to, &path, true)?;
            let moved = parent_in(&from, &path, false)
                .and_then(|from| rename_new_at(&from, name, &to, name));
            if let Err(error) = moved {
                tracing::warn!("moving {} to {}: {error}", path.display(), new.display());
            } else {
                failpoint::step("after", "move of a kept file")?;
            }
        }
        failpoint::step("before", "removal of the old result")?;
        self.remove_own(&from, Path::new(""))?;
        // Removed last: if this run is killed before, the next run finds here which files it has to
        // remove.
        match unlinkat(&from, MARK, AtFlags::empty()) {
            Err(Errno::NOENT) => {}
            removed => removed?,
        }
        drop(from);
        fs::remove_dir(old)
    }

    fn remove_own(&self, folder: &OwnedFd, below: &Path) -> io::Result<()> {
        for (name, found) in entries(folder)? {
            let relative = below.join(&name);
            if let Some(own) = self.own_directory(folder, &relative, &found)? {
                self.remove_own(&own, &relative)?;
                drop(own);
                // Files that could not be moved are still there.
                let _ = unlinkat(folder, &name, AtFlags::REMOVEDIR);
            } else if is_file(&found) && self.is_own(&relative) && relative != Path::new(MARK) {
                unlinkat(folder, &name, AtFlags::empty())?;
            }
        }
        Ok(())
    }

    /// Reads an earlier result from any path; it lists nothing of a directory without a report.
    pub(super) fn of(folder: &Path) -> Result<Self> {
        if let Some(state) = sync::SyncState::load(folder)? {
            let own = OWN.iter().map(PathBuf::from).chain(state.files());
            return Ok(Self {
                folder: folder.to_path_buf(),
                own: own.collect(),
                ..Self::default()
            });
        }
        Ok(match read_report(folder)? {
            Some(report) => Self::new(folder, &report),
            None => Self {
                folder: folder.to_path_buf(),
                own: [crate::boot::LOCK.into()].into(),
                ..Self::default()
            },
        })
    }
}

/// Opens the parent directory of a relative path. `create` makes a missing one, for the caller
/// alone.
fn parent_in(folder: &OwnedFd, relative: &Path, create: bool) -> io::Result<OwnedFd> {
    let mut fd = folder.try_clone()?;
    for name in relative.parent().into_iter().flat_map(Path::components) {
        if create {
            match mkdirat(&fd, name.as_os_str(), Mode::RWXU) {
                Err(Errno::EXIST) => {}
                made => made?,
            }
        }
        fd = open_directory(&fd, name.as_ref())?;
    }
    Ok(fd)
}

fn is_file(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
}

fn disks(report: &Value) -> Vec<PathBuf> {
    let disks = report["outputs"]["disks"].as_array().into_iter().flatten();
    disks.filter_map(Value::as_str).map(PathBuf::from).collect()
}

/// The file list of a report, by path; `None` for a report written before lists existed.
fn listed(report: &Value) -> Option<BTreeMap<PathBuf, OutputFile>> {
    let list: Vec<OutputFile> = serde_json::from_value(report.get("files")?.clone()).ok()?;
    Some(list.into_iter().map(|f| (f.path.clone(), f)).collect())
}

fn difference(was: &OutputFile, found: &fs::Metadata) -> Option<String> {
    let now = OutputFile::of(was.path.clone(), found)?;
    if now.size_bytes != was.size_bytes {
        return Some(format!(
            "has {} bytes, not {}",
            now.size_bytes, was.size_bytes
        ));
    }
    if now.modified_ns != was.modified_ns {
        return Some("was written to".to_owned());
    }
    (now.inode != was.inode).then(|| "is another file".to_owned())
}

/// Whether a relative path stays below its start.
fn plain(path: &Path) -> bool {
    !path.as_os_str().is_empty() && path.components().all(|c| matches!(c, Component::Normal(_)))
}

#[cfg(test)]
#[path = "replace_tests.rs"]
mod tests;
