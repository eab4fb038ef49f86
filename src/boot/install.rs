//! `--install-to DIR`, `--pool NAME`: moves the disks of an output directory to a directory that
//! libvirt can read.
//!
//! A disk gets a free name there: as a second link to the same file. On another file system it is a
//! copy (a reflink if possible) that was made in a private directory and is durable. Then the
//! domain XML, the scripts and the report are changed to the new paths, the report last. Only then
//! are the originals removed. `install.json` records the steps, so the next run finishes one that
//! was killed.
//!
//! Owner, mode and SELinux label are those that libvirt gives to disks; it sets them again at each
//! start.

pub(super) mod texts;

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::fs::{flock, linkat, openat, renameat_with};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::access::{self, User};
use super::files::trust;
use super::record::INSTALLING;
use crate::boot::in_use::{self, Held};
use crate::domain::element::Element;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::files::{self, rename_new};
use crate::fix::journal::{sync_folder, write_durably};
use crate::fix::trusted::{self, TrustedFolder};
use crate::report::OutputFile;
use crate::tool::confine::Confinement;
use crate::tool::privileges::Privileges;
use crate::tool::virsh::Virsh;
use crate::tool::{self, Cmd};
use texts::{files_of, replace, rewrite, rewrite_report, rewrite_texts};

/// The target of the disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    Folder(PathBuf),
    /// A storage pool of libvirt that is a directory.
    Pool(String),
}

/// The old and the new path of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    pub from: PathBuf,
    pub to: PathBuf,
    /// The finished copy, if it is not a link to the original.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    copy: Option<OutputFile>,
}

/// The contents of `install.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Installing {
    moves: Vec<Moved>,
}

impl Installing {
    fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(INSTALLING);
        match trusted::read(&path) {
            Err(e) if e.is_missing() => Ok(Self::default()),
            Err(e) => Err(e.into()),
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
                Error::failed(format!("{} is not understood", path.display())).because(e)
            }),
        }
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let path = folder.join(INSTALLING);
        let text = format!("{:#}\n", serde_json::json!(self));
        write_durably(&path, text.as_bytes()).map_err(io_error("writing", &path))
    }

    /// Scripts also contain the new paths in JSON and in QEMU's options.
    fn refuse_unfit_names(&self) -> Result<()> {
        let unfit = self.moves.iter().map(|m| &m.to).find(|p| {
            let text = p.to_string_lossy();
            text.contains(['"', '\\', ',', '<', '>', '&']) || text.contains(char::is_control)
        });
        match unfit {
            None => Ok(()),
            Some(path) => Err(Error::usage(format!(
                "{} has characters that scripts and options cannot contain",
                path.display()
            ))),
        }
    }

    /// The last step, after which nothing is left to continue.
    fn remove_originals(&self, folder: &Path) -> Result<()> {
        for moved in &self.moves {
            moved.remove_original()?;
            point("install-removing")?;
        }
        point("install-removed")?;
        let note = folder.join(INSTALLING);
        files::removed(fs::remove_file(&note)).map_err(io_error("removing", &note))?;
        sync_folder(folder).map_err(io_error("syncing", folder))
    }
}

#[derive(Debug, Default)]
pub struct Installed {
    pub moved: Vec<Moved>,
    pub warnings: Vec<String>,
}

/// Moves the disks, the probe and the UEFI variables of an output directory. Files already there
/// stay; disks elsewhere (block devices, `--in-place`) are not moved.
pub fn install(folder: &Path, place: &Destination, virsh: &Virsh) -> Result<Installed> {
    let mut output = Output::open(folder)?;
    let target = output.destination(place, virsh)?;
    let user = access::qemu_user(virsh.uri());
    access::check(&[target.join("disk")], user.as_ref())?;
    let (mut state, given_up) = output.moves_to(&target)?;
    state.refuse_unfit_names()?;
    // Nothing is changed before it is certain that every file can be moved.
    let nvram = output.nvram();
    for moved in &state.moves {
        moved.check(&output.report, &nvram)?;
    }
    let _held = hold(&state.moves, virsh.uri())?;
    for moved in &given_up {
        moved.take_back(&output.report);
    }
    for moved in &state.moves {
        Work::remove_dead(&moved.to);
    }
    if !state.moves.is_empty() {
        state.save(&output.folder)?;
    }
    let mut installed = Installed::default();
    put_all(&output, &mut state, user.as_ref(), &mut installed.warnings)?;
    output.name_anew(&state.moves)?;
    point("installed")?;
    state.remove_originals(&output.folder)?;
    if let Destination::Pool(name) = place {
        virsh.pool_refresh(name)?;
    }
    installed.moved = state.moves;
    Ok(installed)
}

fn point(name: &str) -> Result<()> {
    failpoint::hit(name).map_err(|e| Error::failed("installing").because(e))
}

/// An output directory whose disks are moved.
struct Output {
    folder: PathBuf,
    report: Value,
    /// The domain XML files in the report.
    domains: Vec<(PathBuf, Element)>,
}

impl Output {
    fn open(folder: &Path) -> Result<Self> {
        let folder = std::path::absolute(folder)
            .map_err(|e| Error::usage(format!("{} is not a path", folder.display())).because(e))?;
        let held = trust(&folder)?
            .ok_or_else(|| Error::usage(format!("{} is not a directory", folder.display())))?;
        let path = folder.join("report.json");
        let report: Value =
            serde_json::from_slice(&held.read(Path::new("report.json"))?).map_err(|e| {
                Error::failed(format!("{} is not understood", path.display())).because(e)
            })?;
        let mut domains = Vec::new();
        for key in ["bootstrap_xml", "final_xml"] {
            let Some(name) = report
                .pointer(&format!("/outputs/{key}"))
                .and_then(Value::as_str)
                .and_then(|path| Path::new(path).file_name())
            else {
                continue;
            };
            let path = folder.join(name);
            let root = Element::parse(&held.read(Path::new(name))?)
                .map_err(|e| Error::failed(format!("reading {}", path.display())).because(e))?;
            domains.push((path, root));
        }
        Ok(Self {
            folder,
            report,
            domains,
        })
    }

    fn destination(&self, place: &Destination, virsh: &Virsh) -> Result<PathBuf> {
        let target = destination(place, virsh)?;
        let identity = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino()));
        if identity(&self.folder).ok() == identity(&target).ok() {
            return Err(Error::usage(format!(
                "{} is the output directory itself: its disks are there already",
                target.display()
            )));
        }
        Ok(target)
    }

    /// The files that the domains name.
    fn files(&self) -> impl Iterator<Item = PathBuf> {
        self.domains.iter().flat_map(|(_, root)| files_of(root))
    }

    fn nvram(&self) -> Vec<PathBuf> {
        self.domains
            .iter()
            .filter_map(|(_, root)| Some(PathBuf::from(&root.path("os/nvram")?.text)))
            .collect()
    }

    /// The files to move, and unfinished moves of an earlier run to another place.
    fn moves_to(&self, target: &Path) -> Result<(Installing, Vec<Moved>)> {
        let mut state = Installing::load(&self.folder)?;
        let mut given_up = Vec::new();
        for file in self.files() {
            let Some(name) = file
                .file_name()
                .filter(|_| file.parent() == Some(&self.folder))
            else {
                continue;
            };
            let to = target.join(name);
            // An earlier run to another place has not changed anything yet: it starts over.
            let elsewhere = |m: &mut Moved| m.from == file && m.to != to;
            for old in state.moves.extract_if(.., elsewhere) {
                old.refuse_half_way()?;
                given_up.push(old);
            }
            if !state.moves.iter().any(|m| m.from == file) {
                state.moves.push(Moved {
                    from: file,
                    to,
                    copy: None,
                });
            }
        }
        Ok((state, given_up))
    }

    /// Changes the documents to the new paths, the report last.
    fn name_anew(&mut self, moves: &[Moved]) -> Result<()> {
        for (path, root) in &mut self.domains {
            rewrite(root, &|old| {
                let found = moves.iter().find(|m| m.from == Path::new(old));
                found.map(|m| m.to.display().to_string())
            });
            replace(path, root.to_document().as_bytes())?;
        }
        rewrite_texts(&self.folder, &self.report, moves)?;
        rewrite_report(&self.folder, &mut self.report, moves);
        let report = format!("{:#}\n", self.report);
        replace(&self.folder.join("report.json"), report.as_bytes())
    }
}

/// Keeps a VM from starting on the disks while they are moved. Refuses disks in use, of which a
/// copy would be torn.
fn hold(moves: &[Moved], uri: &str) -> Result<Held> {
    let in_use = |file: &Path, user: &str| {
        Error::failed(format!("{} is in use by {user}", file.display()))
            .hint("shut the VM down first, or leave its disks where they are")
    };
    let mut held = Held::default();
    let files: Vec<PathBuf> = moves
        .iter()
        .map(|moved| moved.from.clone())
        .filter(|from| from.symlink_metadata().is_ok_and(|m| m.is_file()))
        .collect();
    for file in &files {
        if let Some(user) = held.hold(file) {
            return Err(in_use(file, &user));
        }
    }
    match (files.first(), in_use::domain_of(&files, Some(uri))) {
        (Some(file), Some(domain)) => Err(in_use(file, &domain)),
        _ => Ok(held),
    }
}

/// Creates all new names beside the old ones. If one fails, the others are removed again.
fn put_all(
    output: &Output,
    state: &mut Installing,
    user: Option<&User>,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let Output { folder, report, .. } = output;
    // A killed run has changed the XML already: a rollback is impossible, so the move is completed.
    let begun = output
        .files()
        .any(|file| state.moves.iter().any(|m| m.to == file));
    for i in 0..state.moves.len() {
        let put = put(folder, state, i).and_then(|()| {
            let moved = &state.moves[i];
            if moved.to.symlink_metadata().is_ok() {
                prepare(moved, report, user, warnings)?;
            }
            Ok(())
        });
        if let Err(error) = put {
            if begun {
                return Err(error.hint("run the same command again: it was interrupted half way"));
            }
            for moved in &state.moves {
                moved.take_back(report);
            }
            // Contains nothing valid any more.
            let _ = fs::remove_file(folder.join(INSTALLING));
            return Err(error);
        }
        point("installing")?;
    }
    Ok(())
}

fn put(folder: &Path, state: &mut Installing, i: usize) -> Result<()> {
    let Moved { from, to, .. } = state.moves[i].clone();
    if !from.exists() || state.moves[i].is_put() {
        // Created by an earlier run, or variables that libvirt makes at the first start.
        return Ok(());
    }
    let exists = || {
        Error::failed(format!("{} exists already", to.display()))
            .hint("convert with another --name, or remove it if it is of no use any more")
    };
    let beside = to.parent().unwrap_or(Path::new("/"));
    // The original may be removed only when the new name survives a loss of power.
    let sync = || sync_folder(beside).map_err(io_error("syncing", beside));
    let linked = match failpoint::hit("install-link") {
        Ok(()) => linkat(CWD, &from, CWD, &to, AtFlags::empty()),
        Err(_) => Err(Errno::PERM),
    };
    match linked {
        Ok(()) => return sync(),
        Err(Errno::EXIST) => return Err(exists()),
        Err(Errno::XDEV) => {}
        // The file system has no second names for a file: its only one is changed, in one step.
        Err(_) => match renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE) {
            Ok(()) => return sync(),
            Err(Errno::EXIST) => return Err(exists()),
            Err(_) => {}
        },
    }
    let work = Work::create(&to)?;
    let copy = work.path.join("disk");
    Cmd::new("cp")
        .confined(Confinement::writes_arguments())
        .args(["--reflink=auto", "--sparse=always", "--"])
        .args([&from, &copy])
        .run()
        .map_err(Error::from)?;
    let finished = || -> io::Result<OutputFile> {
        let file = File::open(&copy)?;
        file.sync_all()?;
        OutputFile::of(to.clone(), &file.metadata()?)
            .ok_or_else(|| io::Error::other("the copy is no file"))
    };
    state.moves[i].copy = Some(finished().map_err(io_error("copying to", &to))?);
    // Recorded before it gets its name, so that a run that finds it there can identify it.
    state.save(folder)?;
    point("install-copied")?;
    rename_new(&copy, &to).map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => exists(),
        _ => io_error("moving to", &to)(e),
    })?;
    sync()
}

/// A private directory beside the target; locked while it is in use, removed when dropped.
struct Work {
    path: PathBuf,
    _lock: File,
}

impl Work {
    fn create(to: &Path) -> Result<Self> {
        let mut name = std::ffi::OsString::from(".");
        name.push(to.file_name().unwrap_or_default());
        name.push(format!(".{}.partial", uuid::Uuid::new_v4()));
        let path = to.with_file_name(name);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(io_error("creating", &path))?;
        let lock = File::open(&path).map_err(io_error("opening", &path))?;
        // Without locks, no run may remove it.
        let _ = flock(&lock, FlockOperation::NonBlockingLockExclusive);
        Ok(Self { path, _lock: lock })
    }

    /// Removes the directories that killed runs left beside the target.
    fn remove_dead(to: &Path) {
        let (Some(folder), Some(name)) = (to.parent(), to.file_name().and_then(|n| n.to_str()))
        else {
            return;
        };
        let prefix = format!(".{name}.");
        let Ok(entries) = fs::read_dir(folder) else {
            return;
        };
        for entry in entries.flatten() {
            let found = entry.file_name();
            let Some(id) = found
                .to_str()
                .and_then(|n| n.strip_prefix(&prefix)?.strip_suffix(".partial"))
            else {
                continue;
            };
            let path = entry.path();
            if uuid::Uuid::parse_str(id).is_err() || TrustedFolder::open(&path).is_err() {
                continue;
            }
            // Another run may be copying there at this moment.
            let dead = File::open(&path).is_ok_and(|folder| {
                flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok()
            });
            if dead {
                let _ = fs::remove_dir_all(path);
            }
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // The original still exists, or the copy has its name.
        let _ = fs::remove_dir_all(&self.path);
    }
}

impl Moved {
    /// Refuses a target name that somebody else has taken, and a missing file. `nvram` are the
    /// paths of UEFI variables, which libvirt makes at the first start.
    fn check(&self, report: &Value, nvram: &[PathBuf]) -> Result<()> {
        let from = self.from.symlink_metadata().ok();
        if from.as_ref().is_some_and(|found| !found.is_file()) {
            return Err(
                Error::failed(format!("{} is no file itself", self.from.display()))
                    .hint("put the disk there instead of a link to it"),
            );
        }
        let Ok(there) = self.to.symlink_metadata() else {
            if from.is_some() || nvram.contains(&self.from) || nvram.contains(&self.to) {
                return Ok(());
            }
            return Err(Error::failed(format!(
                "{} is missing, and is not at {} either",
                self.from.display(),
                self.to.display()
            ))
            .hint("put it back to one of the two, or convert again"));
        };
        if self.is_it(&there, report) {
            return Ok(());
        }
        Err(
            Error::failed(format!("{} exists already", self.to.display()))
                .hint("convert with another --name, or remove it if it is of no use any more"),
        )
    }

    /// Whether a file at the new name is this one.
    fn is_it(&self, there: &fs::Metadata, report: &Value) -> bool {
        self.is(there) || self.is_renamed(there, report)
    }

    /// Whether the report lists the file at the new name, and the old name is gone. Then a run was
    /// killed after a rename, or after the original was removed.
    fn is_renamed(&self, there: &fs::Metadata, report: &Value) -> bool {
        if !there.is_file() || self.from.symlink_metadata().is_ok() {
            return false;
        }
        let name = self.from.file_name().map(PathBuf::from).unwrap_or_default();
        let list: Option<Vec<OutputFile>> = report
            .get("files")
            .and_then(|list| serde_json::from_value(list.clone()).ok());
        let mut disks = report["outputs"]["disks"].as_array().into_iter().flatten();
        match list {
            Some(list) => list.iter().any(|f| {
                // A VM may have run from the path in the report.
                f.path == self.to && f.inode == there.ino()
                    || f.path == name && Some(f) == OutputFile::of(name.clone(), there).as_ref()
            }),
            None => disks.any(|d| {
                let disk = d.as_str().map(Path::new);
                disk == Some(&self.from) || disk == Some(&self.to)
            }),
        }
    }

    /// Fails if an unfinished run to another place has left the file only there.
    fn refuse_half_way(&self) -> Result<()> {
        if self.from.symlink_metadata().is_ok() || self.to.symlink_metadata().is_err() {
            return Ok(());
        }
        let folder = self.to.parent().unwrap_or(Path::new("/"));
        Err(Error::failed(format!(
            "{} is where an earlier run moved it",
            self.to.display()
        ))
        .hint(format!(
            "finish that one first: --install-to {}",
            crate::text::quote(folder)
        )))
    }

    /// Whether the new name leads to this very file, or to the recorded copy.
    fn is_put(&self) -> bool {
        self.to
            .symlink_metadata()
            .is_ok_and(|there| self.is(&there))
    }

    fn is(&self, there: &fs::Metadata) -> bool {
        let same = |from: fs::Metadata| (from.dev(), from.ino()) == (there.dev(), there.ino());
        there.is_file() && self.from.symlink_metadata().is_ok_and(same)
            || self.copy.is_some() && self.copy == OutputFile::of(self.to.clone(), there)
    }

    /// Removes the original, as the last step, and only if the file has its new name.
    fn remove_original(&self) -> Result<()> {
        let Ok(original) = self.from.symlink_metadata() else {
            return Ok(());
        };
        // A file with a single name would be lost.
        if !self.is_put() || self.copy.is_none() && original.nlink() < 2 {
            return Ok(());
        }
        fs::remove_file(&self.from).map_err(io_error("removing", &self.from))
    }

    /// Removes the new name if the original still exists, or can be restored.
    fn take_back(&self, report: &Value) {
        let there = self.to.symlink_metadata();
        if there.is_ok_and(|there| self.copy.is_none() && self.is_renamed(&there, report)) {
            let _ = rename_new(&self.to, &self.from);
            return;
        }
        let linked = self.from.symlink_metadata().is_ok_and(|m| m.nlink() > 1);
        if self.is_put() && (linked || self.copy.is_some() && self.from.exists()) {
            let _ = fs::remove_file(&self.to);
        }
    }
}

pub fn destination(place: &Destination, virsh: &Virsh) -> Result<PathBuf> {
    let path = match place {
        Destination::Folder(path) => path.clone(),
        Destination::Pool(name) => {
            let xml = virsh.pool_xml(name).map_err(|e| {
                Error::from(e).hint(format!(
                    "virsh -c {} pool-list --all names the pools",
                    virsh.uri()
                ))
            })?;
            pool_folder(name, &xml)?
        }
    };
    let path = std::path::absolute(&path)
        .map_err(|e| Error::usage(format!("{} is not a path", path.display())).because(e))?;
    if !path.is_dir() {
        return Err(Error::usage(format!(
            "{} is not a directory",
            path.display()
        )));
    }
    refuse_others(&path)?;
    Ok(path)
}

/// Refuses a directory in which others can change names. They could have the ownership of another
/// file changed, or have it written to. An ordinary user may share a directory with a group.
fn refuse_others(folder: &Path) -> Result<()> {
    let found = fs::metadata(folder).map_err(io_error("looking at", folder))?;
    let caller = rustix::process::geteuid();
    let shown = folder.display();
    let elsewhere = "or name a directory of root's, such as /var/lib/libvirt/images";
    if found.uid() != caller.as_raw() && found.uid() != 0 {
        return Err(Error::failed(format!(
            "{shown} belongs to user {}, who could exchange the disks while they are put there",
            found.uid()
        ))
        .hint("run this as that user")
        .hint(elsewhere));
    }
    let others = if caller.is_root() { 0o022 } else { 0o002 };
    // In a directory with the sticky bit nobody renames the files of others.
    if found.mode() & others != 0 && found.mode() & 0o1000 == 0 {
        return Err(Error::failed(format!(
            "{shown} can be written by others (mode {:04o})",
            found.mode() & 0o7777
        ))
        .hint(format!("chmod go-w {}", crate::text::quote(folder)))
        .hint(elsewhere));
    }
    Ok(())
}

/// The directory in which the pool keeps its files.
fn pool_folder(name: &str, xml: &str) -> Result<PathBuf> {
    let root = Element::parse(xml.as_bytes())
        .map_err(|e| Error::failed(format!("reading the pool {name}")).because(e))?;
    let kind = root.attr("type").unwrap_or("");
    match root.path("target/path") {
        Some(path) if matches!(kind, "dir" | "fs" | "netfs") => Ok(path.text.clone().into()),
        _ => Err(Error::usage(format!(
            "the pool {name} is of type {kind}, which keeps no files"
        ))
        .hint("name a pool of type dir, fs or netfs")),
    }
}

/// Gives a file the access that libvirt gives a disk. Without privileges it stays this user's, who
/// then runs QEMU too.
fn prepare(
    moved: &Moved,
    report: &Value,
    user: Option<&User>,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let path = &moved.to;
    let caller = rustix::process::geteuid();
    // What is given away is what was put there, whatever has the name by now.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::RDONLY | OFlags::CLOEXEC;
    let set = || -> io::Result<()> {
        let file = File::from(openat(CWD, path, flags, Mode::empty())?);
        let found = file.metadata()?;
        if !moved.is_it(&found, report) {
            return Err(io::Error::other("another file has its name now"));
        }
        if let Some(user) = user.filter(|_| caller.is_root()) {
            fchown(&file, Some(user.uid), Some(user.gid))?;
        }
        if found.uid() == caller.as_raw() || caller.is_root() {
            file.set_permissions(Permissions::from_mode(0o600))?;
        }
        Ok(())
    };
    set().map_err(io_error("preparing", path))?;
    if Path::new("/sys/fs/selinux/enforce").exists() && tool::find("chcon").is_some() {
        let label = Cmd::new("chcon")
            .confined(Confinement::writes_arguments())
            .privileges(Privileges::Owners)
            .args(["-h", "-t", "virt_image_t", "--"])
            .arg(path)
            .run();
        if let Err(error) = label {
            warnings.push(format!(
                "{} has no SELinux label for a disk: {error}",
                path.display()
            ));
        }
    }
    Ok(())
}

fn io_error(doing: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
    let path = path.to_path_buf();
    move |e| Error::failed(format!("{doing} {}", path.display())).because(e)
}

#[cfg(test)]
mod tests;
