//! `--install-to DIR`, `--pool NAME`: the disks of an output folder go where libvirt can read them.
//!
//! A disk appears there under a name that was free: as a second link of the same file, or where the file
//! systems differ as a copy (a reflink where they can) that was made in a directory of its own and is
//! durable. Then the domain XML, the scripts and the report are changed to the new paths, the report
//! last, and only then are the originals removed. `install.json` notes what is being done, so a run that
//! was killed on the way is finished by the next one.
//!
//! Owner, mode and SELinux label are those libvirt gives to disks; it does so again at each start.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, RenameFlags, flock, linkat, renameat_with};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::access::{self, User};
use super::record::INSTALLING;
use crate::convert::in_use::{self, Held};
use crate::domain::element::Element;
use crate::domain::emit;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::files::rename_new;
use crate::fix::journal::{sync_folder, write_durably};
use crate::fix::trusted::{self, TrustedFolder};
use crate::report::OutputFile;
use crate::text::in_single_quotes;
use crate::tool::confine::Confinement;
use crate::tool::privileges::Privileges;
use crate::tool::virsh::Virsh;
use crate::tool::{self, Cmd};

/// Where the disks go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Folder(PathBuf),
    /// A storage pool of libvirt that is a folder.
    Pool(String),
}

/// What was where, and is where now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    pub from: PathBuf,
    pub to: PathBuf,
    /// The finished copy, where it is no link of the original.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    copy: Option<OutputFile>,
}

/// `install.json`.
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
}

#[derive(Debug, Default)]
pub struct Installed {
    pub moved: Vec<Moved>,
    pub warnings: Vec<String>,
}

/// Puts the disks, the probe and the UEFI variables of an output folder there. What is there already
/// stays; disks of elsewhere (block devices, `--in-place`) are left where they are.
pub fn install(folder: &Path, place: &Place, virsh: &Virsh) -> Result<Installed> {
    let folder = std::path::absolute(folder)
        .map_err(|e| Error::usage(format!("{} is not a path", folder.display())).because(e))?;
    let report_path = folder.join("report.json");
    let mut report: Value = fs::read(&report_path)
        .map_err(io_error("reading", &report_path))
        .and_then(|bytes| {
            serde_json::from_slice(&bytes).map_err(|e| {
                Error::failed(format!("{} is not understood", report_path.display())).because(e)
            })
        })?;
    let target = destination(place, virsh)?;
    let identity = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino()));
    if identity(&folder).ok() == identity(&target).ok() {
        return Err(Error::usage(format!(
            "{} is the output folder itself: its disks are there already",
            target.display()
        )));
    }
    let user = access::qemu_user(virsh.uri());
    access::check(&[target.join("disk")], user.as_ref())?;

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
        let bytes = fs::read(&path).map_err(io_error("reading", &path))?;
        let root = Element::parse(&bytes)
            .map_err(|e| Error::failed(format!("reading {}", path.display())).because(e))?;
        domains.push((path, root));
    }
    let mut state = Installing::load(&folder)?;
    for (_, root) in &domains {
        for file in files_of(root) {
            let Some(name) = file.file_name().filter(|_| file.parent() == Some(&folder)) else {
                continue;
            };
            let to = target.join(name);
            // Of an earlier run to another place nothing was changed yet: it starts over.
            state.moves.retain(|m| m.from != file || m.to == to);
            if !state.moves.iter().any(|m| m.from == file) {
                state.moves.push(Moved {
                    from: file,
                    to,
                    copy: None,
                });
            }
        }
    }
    // A script has them in JSON, and QEMU's options, besides.
    if let Some(path) = state.moves.iter().map(|m| &m.to).find(|p| {
        let text = p.to_string_lossy();
        text.contains(['"', '\\', ',', '<', '>', '&']) || text.contains(char::is_control)
    }) {
        return Err(Error::usage(format!(
            "{} has characters that scripts and options cannot hold",
            path.display()
        )));
    }
    // Nothing is touched before it is known that everything can go.
    for moved in &state.moves {
        moved.check(&report)?;
    }
    let _held = hold(&state.moves, virsh.uri())?;
    for moved in &state.moves {
        Work::remove_dead(&moved.to);
    }
    if !state.moves.is_empty() {
        state.save(&folder)?;
    }
    let mut installed = Installed::default();
    put_all(&folder, &mut state, user.as_ref(), &mut installed.warnings)?;
    let moves = &state.moves;
    for (path, root) in &mut domains {
        rewrite(root, &|old| {
            let found = moves.iter().find(|m| m.from == Path::new(old));
            found.map(|m| m.to.display().to_string())
        });
        replace(path, root.to_document().as_bytes())?;
    }
    rewrite_texts(&folder, &report, moves)?;
    rewrite_report(&folder, &mut report, moves);
    replace(&report_path, format!("{report:#}\n").as_bytes())?;
    failpoint::hit("installed").map_err(|e| Error::failed("installing").because(e))?;
    for moved in moves {
        moved.remove_original()?;
    }
    match fs::remove_file(folder.join(INSTALLING)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(io_error("removing", &folder.join(INSTALLING))(e));
        }
        _ => sync_folder(&folder).map_err(io_error("syncing", &folder))?,
    }
    if let Place::Pool(name) = place {
        virsh.pool_refresh(name)?;
    }
    installed.moved = state.moves;
    Ok(installed)
}

/// Keeps a VM from starting on the disks while they are moved; refuses what one uses already: a copy of it
/// would be torn.
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

/// Every file under its new name, besides the old one. When one cannot be, the others are taken back.
fn put_all(
    folder: &Path,
    state: &mut Installing,
    user: Option<&User>,
    warnings: &mut Vec<String>,
) -> Result<()> {
    for i in 0..state.moves.len() {
        let put = put(folder, state, i).and_then(|()| {
            let to = &state.moves[i].to;
            if to.exists() {
                prepare(to, user, warnings)?;
            }
            Ok(())
        });
        if let Err(error) = put {
            for moved in &state.moves {
                moved.take_back();
            }
            // Says nothing any more that is true.
            let _ = fs::remove_file(folder.join(INSTALLING));
            return Err(error);
        }
        failpoint::hit("installing").map_err(|e| Error::failed("installing").because(e))?;
    }
    Ok(())
}

fn put(folder: &Path, state: &mut Installing, i: usize) -> Result<()> {
    let Moved { from, to, .. } = state.moves[i].clone();
    if !from.exists() || state.moves[i].is_put() {
        // Put by an earlier run, or variables that libvirt makes at the first start.
        return Ok(());
    }
    let exists = || {
        Error::failed(format!("{} exists already", to.display()))
            .hint("convert with another --name, or remove it if it is of no use any more")
    };
    match linkat(CWD, &from, CWD, &to, AtFlags::empty()) {
        Ok(()) => return Ok(()),
        Err(Errno::EXIST) => return Err(exists()),
        Err(Errno::XDEV) => {}
        // No second name for a file there: its only one is changed, in one step.
        Err(_) => match renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(()),
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
    // Noted before it has its name: a run that finds it there knows whose it is.
    state.save(folder)?;
    failpoint::hit("install-copied").map_err(|e| Error::failed("installing").because(e))?;
    rename_new(&copy, &to).map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => exists(),
        _ => io_error("moving to", &to)(e),
    })?;
    let beside = to.parent().unwrap_or(Path::new("/"));
    sync_folder(beside).map_err(io_error("syncing", beside))
}

/// A directory of this user alone beside the target; locked as long as it is used, removed when dropped.
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
        // Without locks there it is no run's to remove.
        let _ = flock(&lock, FlockOperation::NonBlockingLockExclusive);
        Ok(Self { path, _lock: lock })
    }

    /// What killed runs left beside the target.
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
            // Another run may be copying there just now.
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
        // The original is still there, or the copy has its name.
        let _ = fs::remove_dir_all(&self.path);
    }
}

impl Moved {
    /// Refuses a target that somebody else has taken.
    fn check(&self, report: &Value) -> Result<()> {
        let Ok(there) = self.to.symlink_metadata() else {
            return Ok(());
        };
        let name = self.from.file_name().map(PathBuf::from).unwrap_or_default();
        // Renamed by a run that was killed before it could change the XML.
        let renamed = || {
            let list: Option<Vec<OutputFile>> = report
                .get("files")
                .and_then(|list| serde_json::from_value(list.clone()).ok());
            let disks = report["outputs"]["disks"].as_array().into_iter().flatten();
            match list {
                Some(list) => list.iter().any(|f| {
                    f.path == name && Some(f) == OutputFile::of(name.clone(), &there).as_ref()
                }),
                None => disks
                    .filter_map(Value::as_str)
                    .any(|d| Path::new(d) == self.from),
            }
        };
        if self.is_put() || (!self.from.exists() && renamed()) {
            return Ok(());
        }
        Err(
            Error::failed(format!("{} exists already", self.to.display()))
                .hint("convert with another --name, or remove it if it is of no use any more"),
        )
    }

    /// Whether the new name leads to this very file, or to the copy that was noted.
    fn is_put(&self) -> bool {
        let Ok(there) = self.to.symlink_metadata() else {
            return false;
        };
        let same = |from: fs::Metadata| (from.dev(), from.ino()) == (there.dev(), there.ino());
        self.from.symlink_metadata().is_ok_and(same)
            || self.copy.is_some() && self.copy == OutputFile::of(self.to.clone(), &there)
    }

    /// Last of all, and only when the file has its new name.
    fn remove_original(&self) -> Result<()> {
        let Ok(original) = self.from.symlink_metadata() else {
            return Ok(());
        };
        // A file with one name would be gone.
        if !self.is_put() || self.copy.is_none() && original.nlink() < 2 {
            return Ok(());
        }
        fs::remove_file(&self.from).map_err(io_error("removing", &self.from))
    }

    /// Gives up the new name where the original is still there.
    fn take_back(&self) {
        let linked = self.from.symlink_metadata().is_ok_and(|m| m.nlink() > 1);
        if self.is_put() && (linked || self.copy.is_some() && self.from.exists()) {
            let _ = fs::remove_file(&self.to);
        }
    }
}

/// The new paths of the disks, and what their files are now.
fn rewrite_report(folder: &Path, report: &mut Value, moves: &[Moved]) {
    if let Some(disks) = report
        .pointer_mut("/outputs/disks")
        .and_then(Value::as_array_mut)
    {
        for disk in disks {
            let mut found = moves.iter();
            let found = found.find(|m| disk.as_str().map(Path::new) == Some(&m.from));
            if let Some(moved) = found {
                *disk = moved.to.display().to_string().into();
            }
        }
    }
    let Some(files) = report.get_mut("files").and_then(Value::as_array_mut) else {
        return;
    };
    for entry in files {
        let Ok(was) = serde_json::from_value::<OutputFile>(entry.clone()) else {
            continue;
        };
        let path = folder.join(&was.path);
        let moved = moves.iter().find(|m| m.from == path);
        let (name, path) = match moved {
            Some(moved) => (moved.to.clone(), moved.to.clone()),
            None => (was.path, path),
        };
        let now = fs::metadata(&path).ok();
        if let Some(now) = now.and_then(|found| OutputFile::of(name, &found)) {
            *entry = serde_json::json!(now);
        }
    }
}

pub fn destination(place: &Place, virsh: &Virsh) -> Result<PathBuf> {
    let path = match place {
        Place::Folder(path) => path.clone(),
        Place::Pool(name) => {
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
        return Err(Error::usage(format!("{} is not a folder", path.display())));
    }
    Ok(path)
}

/// Where the pool keeps its files.
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

/// Disks and UEFI variables of a domain.
fn files_of(root: &Element) -> Vec<PathBuf> {
    let sources = root.descendants("source");
    let mut files: Vec<PathBuf> = sources
        .iter()
        .filter_map(|s| s.attr("file"))
        .map(PathBuf::from)
        .collect();
    files.extend(root.path("os/nvram").map(|n| PathBuf::from(&n.text)));
    files
}

/// Gives the disks and UEFI variables of a domain the paths that `new` has for them.
pub(super) fn rewrite(element: &mut Element, new: &dyn Fn(&str) -> Option<String>) {
    if element.is("source") {
        for (_, value) in element.attrs.iter_mut().filter(|(key, _)| key == "file") {
            if let Some(path) = new(value) {
                *value = path;
            }
        }
    }
    if element.is("nvram")
        && let Some(path) = new(&element.text)
    {
        element.text = path;
    }
    for child in &mut element.children {
        rewrite(child, new);
    }
}

const REPORT: &str = "report.html";

/// The same in what else names the disks: scripts and YAML, where paths are between single quotes, and
/// the report to look at.
fn rewrite_texts(folder: &Path, report: &Value, moved: &[Moved]) -> Result<()> {
    let emitted = report.pointer("/outputs/emitted").and_then(Value::as_array);
    let names = emitted.into_iter().flatten().filter_map(Value::as_str);
    let names = names.filter_map(|path| Path::new(path).file_name()?.to_str());
    for name in names.chain([REPORT]) {
        let path = folder.join(name);
        let mut text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            text => text.map_err(io_error("reading", &path))?,
        };
        for Moved { from, to, .. } in moved {
            // The state of a TPM lies beside the variables.
            let tpm = [from, to].map(|path| path.with_extension("tpm"));
            for [from, to] in [[from, to], [&tpm[0], &tpm[1]]] {
                let [from, to] =
                    [from, to].map(|path| in_single_quotes(&path.display().to_string()));
                text = text.replace(&from, &to);
            }
            if name != REPORT {
                for (from, to) in [(from, to), (&tpm[0], &tpm[1])] {
                    let file = from.file_name().unwrap_or_default().to_string_lossy();
                    text = emit::relocated(&text, &file, to);
                }
            }
        }
        replace(&path, text.as_bytes())?;
    }
    Ok(())
}

/// Durable before it is under its name; the mode stays.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        let mode = fs::metadata(path)?.permissions();
        write_durably(path, bytes)?;
        fs::set_permissions(path, mode)
    };
    write().map_err(io_error("writing", path))
}

/// As libvirt wants a disk. Without privileges it stays this user's, who then runs QEMU too.
fn prepare(path: &Path, user: Option<&User>, warnings: &mut Vec<String>) -> Result<()> {
    let failed = io_error("preparing", path);
    let set = || -> io::Result<()> {
        if rustix::process::geteuid().is_root()
            && let Some(user) = user
        {
            chown(path, Some(user.uid), Some(user.gid))?;
        }
        if fs::metadata(path)?.uid() == rustix::process::geteuid().as_raw()
            || rustix::process::geteuid().is_root()
        {
            fs::set_permissions(path, Permissions::from_mode(0o600))?;
        }
        Ok(())
    };
    set().map_err(failed)?;
    if Path::new("/sys/fs/selinux/enforce").exists() && tool::find("chcon").is_some() {
        let label = Cmd::new("chcon")
            .confined(Confinement::writes_arguments())
            .privileges(Privileges::Owners)
            .args(["-t", "virt_image_t", "--"])
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
mod tests {
    use super::*;

    #[test]
    fn pools() {
        let pool =
            |kind: &str, target: &str| format!("<pool type='{kind}'><name>p</name>{target}</pool>");
        let path = "<target><path>/var/lib/x y</path></target>";
        assert_eq!(
            pool_folder("p", &pool("dir", path)).unwrap(),
            Path::new("/var/lib/x y")
        );
        for xml in [pool("logical", path), pool("dir", ""), "<".to_owned()] {
            assert!(pool_folder("p", &xml).is_err(), "{xml}");
        }
    }

    fn moved(from: PathBuf, to: PathBuf) -> Installing {
        Installing {
            moves: vec![Moved {
                from,
                to,
                copy: None,
            }],
        }
    }

    /// Between file systems, and again after an interruption.
    #[test]
    fn a_file_crosses_file_systems() {
        let (here, there) = (
            tempfile::tempdir().unwrap(),
            tempfile::tempdir_in("/dev/shm"),
        );
        let Ok(there) = there else {
            eprintln!("SKIP: no /dev/shm");
            return;
        };
        let device = |path: &Path| fs::metadata(path).unwrap().dev();
        if device(here.path()) == device(there.path()) {
            eprintln!("SKIP: one file system");
            return;
        }
        let (from, to) = (here.path().join("a disk"), there.path().join("a disk"));
        fs::write(&from, "contents").unwrap();
        let dead = there
            .path()
            .join(format!(".a disk.{}.partial", uuid::Uuid::new_v4()));
        fs::create_dir(&dead).unwrap();
        fs::set_permissions(&dead, Permissions::from_mode(0o700)).unwrap();
        fs::write(dead.join("disk"), "of a killed run").unwrap();
        fs::write(there.path().join("a disk.partial"), "of the user").unwrap();
        Work::remove_dead(&to);
        let mut state = moved(from.clone(), to.clone());
        for _ in 0..2 {
            state.moves[0].check(&Value::Null).unwrap();
            put(here.path(), &mut state, 0).unwrap();
            assert!(from.exists(), "the original goes last");
            assert_eq!(fs::read_to_string(&to).unwrap(), "contents");
            state = Installing::load(here.path()).unwrap();
        }
        state.moves[0].remove_original().unwrap();
        assert!(!from.exists());
        let mut names: Vec<_> = fs::read_dir(there.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["a disk", "a disk.partial"]);
        let mut warnings = Vec::new();
        prepare(&to, None, &mut warnings).unwrap();
        assert_eq!(fs::metadata(&to).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_name_that_is_taken_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("disk"), dir.path().join("there"));
        fs::write(&from, "mine").unwrap();
        let mut state = moved(from.clone(), to.clone());
        state.moves[0].check(&Value::Null).unwrap();
        // It appears after the check.
        fs::write(&to, "another's").unwrap();
        let error = put(dir.path(), &mut state, 0).unwrap_err();
        assert!(error.message.ends_with("exists already"), "{error}");
        assert!(state.moves[0].check(&Value::Null).is_err());
        state.moves[0].take_back();
        state.moves[0].remove_original().unwrap();
        assert_eq!(fs::read_to_string(&from).unwrap(), "mine");
        assert_eq!(fs::read_to_string(&to).unwrap(), "another's");
        // Variables that are not there yet must not become those of another machine.
        fs::remove_file(&from).unwrap();
        assert!(state.moves[0].check(&Value::Null).is_err());
    }
}
