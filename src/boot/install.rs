//! `--install-to DIR`, `--pool NAME`: the disks of an output folder go where libvirt can read them.
//!
//! A disk is renamed where that is possible, else copied (as a reflink where the file systems can) to a
//! partial file and the original removed once the copy is durable. Then the domain XML, the scripts and
//! the report are changed to the new paths, the report last: a run that was killed on the way is
//! finished by the next one, which finds each disk in the old place or in the new.
//!
//! Owner, mode and SELinux label are those libvirt gives to disks; it does so again at each start.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::access::{self, User};
use crate::domain::element::Element;
use crate::domain::emit;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::text::in_single_quotes;
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    pub from: PathBuf,
    pub to: PathBuf,
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
    let mut installed = Installed::default();
    for (_, root) in &domains {
        for file in files_of(root) {
            let Some(name) = file.file_name().filter(|_| file.parent() == Some(&folder)) else {
                continue;
            };
            let moved = Moved {
                to: target.join(name),
                from: file,
            };
            if !installed.moved.contains(&moved) {
                installed.moved.push(moved);
            }
        }
    }
    // A script has them in JSON, and QEMU's options, besides.
    if let Some(path) = installed.moved.iter().map(|m| &m.to).find(|p| {
        let text = p.to_string_lossy();
        text.contains(['"', '\\', ',', '<', '>', '&']) || text.contains(char::is_control)
    }) {
        return Err(Error::usage(format!(
            "{} has characters that scripts and options cannot hold",
            path.display()
        )));
    }
    // Nothing is touched before it is known that everything can go.
    for Moved { from, to } in &installed.moved {
        if from.exists() && to.exists() {
            return Err(Error::failed(format!("{} exists already", to.display()))
                .hint("convert with another --name, or remove it if it is of no use any more"));
        }
    }
    for moved in &installed.moved {
        move_file(moved)?;
        if moved.to.exists() {
            prepare(&moved.to, user.as_ref(), &mut installed.warnings)?;
        }
        failpoint::hit("installing").map_err(|e| Error::failed("installing").because(e))?;
    }
    for (path, root) in &mut domains {
        rewrite(root, &installed.moved);
        replace(path, root.to_document().as_bytes())?;
    }
    rewrite_texts(&folder, &report, &installed.moved)?;
    if let Some(disks) = report
        .pointer_mut("/outputs/disks")
        .and_then(Value::as_array_mut)
    {
        for disk in disks {
            let moved = installed.moved.iter();
            let mut moved = moved.filter(|m| disk.as_str().map(Path::new) == Some(&m.from));
            if let Some(moved) = moved.next() {
                *disk = moved.to.display().to_string().into();
            }
        }
    }
    replace(&report_path, format!("{report:#}\n").as_bytes())?;
    if let Place::Pool(name) = place {
        virsh.pool_refresh(name)?;
    }
    Ok(installed)
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

fn rewrite(element: &mut Element, moved: &[Moved]) {
    let new = |old: &str| {
        let found = moved.iter().find(|m| m.from == Path::new(old));
        found.map(|m| m.to.display().to_string())
    };
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
        rewrite(child, moved);
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
        for Moved { from, to } in moved {
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
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    let write = || -> io::Result<()> {
        fs::write(&new, bytes)?;
        fs::set_permissions(&new, fs::metadata(path)?.permissions())?;
        File::open(&new)?.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(io_error("writing", path))
}

fn move_file(Moved { from, to }: &Moved) -> Result<()> {
    if !from.exists() {
        // Moved by an earlier run, or variables that libvirt makes at the first start.
        return Ok(());
    }
    match fs::rename(from, to) {
        Err(e) if e.kind() == io::ErrorKind::CrossesDevices => copy(from, to),
        renamed => renamed.map_err(io_error("moving to", to)),
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut partial = to.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let copied = Cmd::new("cp")
        .args(["--reflink=auto", "--sparse=always", "--"])
        .args([from, &partial])
        .run()
        .map_err(Error::from)
        .and_then(|_| {
            let finish = || -> io::Result<()> {
                File::open(&partial)?.sync_all()?;
                fs::rename(&partial, to)?;
                File::open(to.parent().unwrap_or(Path::new("/")))?.sync_all()?;
                fs::remove_file(from)
            };
            finish().map_err(io_error("moving to", to))
        });
    if copied.is_err() {
        // The original is still there.
        let _ = fs::remove_file(&partial);
    }
    copied
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
        let moved = Moved {
            from: here.path().join("a disk"),
            to: there.path().join("a disk"),
        };
        fs::write(&moved.from, "contents").unwrap();
        fs::write(there.path().join("a disk.partial"), "of a killed run").unwrap();
        for _ in 0..2 {
            move_file(&moved).unwrap();
            assert!(!moved.from.exists());
            assert_eq!(fs::read_to_string(&moved.to).unwrap(), "contents");
        }
        assert_eq!(fs::read_dir(there.path()).unwrap().count(), 1);
        let mut warnings = Vec::new();
        prepare(&moved.to, None, &mut warnings).unwrap();
        assert_eq!(fs::metadata(&moved.to).unwrap().mode() & 0o777, 0o600);
    }
}
