//! Keeping the disks as they are before the switch, and putting them back.
//!
//! qcow2 disks get an internal snapshot, raw files a copy beside them (a reflink where the file system
//! has them), and the UEFI variables a copy in the output folder. All of it while the machine is off.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Error, Result};
use crate::tool::confine::Confinement;
use crate::tool::privileges::Privileges;
use crate::tool::{Cmd, qemu_img};

/// The internal snapshot of ours.
pub const SNAPSHOT: &str = "hyper2kvm-before-final";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Protected {
    Snapshot { disk: PathBuf },
    Copy { disk: PathBuf, copy: PathBuf },
    Nvram { file: PathBuf, copy: PathBuf },
}

/// What will keep one disk; `None` when nothing can.
pub fn plan(disk: &Path, format: &str) -> Option<Protected> {
    if format == "qcow2" {
        return Some(Protected::Snapshot { disk: disk.into() });
    }
    // A block device has no room beside it.
    disk.is_file().then(|| {
        let mut copy = disk.as_os_str().to_owned();
        copy.push(".before-final");
        Protected::Copy {
            disk: disk.into(),
            copy: copy.into(),
        }
    })
}

fn qcow2(disk: &Path) -> Result<OsString> {
    let file = disk
        .to_str()
        .ok_or_else(|| Error::failed(format!("{} is not valid UTF-8", disk.display())))?;
    Ok(qemu_img::json_name(&json!({
        "driver": "qcow2", "file": {"driver": "file", "filename": file}
    })))
}

fn snapshot(action: &str, disk: &Path) -> Result<()> {
    Cmd::new(qemu_img::TOOL)
        .confined(Confinement::to_arguments())
        .args(["snapshot", action, SNAPSHOT])
        .arg(qcow2(disk)?)
        .run()?;
    Ok(())
}

impl Protected {
    /// Refuses a file of the user under a name that is about to be used.
    pub fn refuse_taken(&self) -> Result<()> {
        let names = match self {
            Self::Snapshot { .. } => Vec::new(),
            Self::Copy { copy, .. } => vec![copy.clone(), partial(copy)],
            Self::Nvram { copy, .. } => vec![copy.clone()],
        };
        let taken = names.iter().find(|path| path.symlink_metadata().is_ok());
        match taken {
            None => Ok(()),
            Some(path) => Err(Error::failed(format!(
                "{} exists, and what is saved before the switch would replace it",
                path.display()
            ))
            .hint("move it elsewhere, or go on with --no-snapshot")),
        }
    }

    /// Saves; what an interrupted run saved is replaced.
    pub fn save(&self) -> Result<()> {
        let failed = |what: &Path, e: Error| {
            Error::failed(format!("saving {} before the switch", what.display()))
                .because(e)
                .hint("--no-snapshot goes on without: a failed switch may then leave the disk changed")
        };
        match self {
            Self::Snapshot { disk } => {
                // There is none, usually.
                let _ = snapshot("-d", disk);
                snapshot("-c", disk).map_err(|e| failed(disk, e))
            }
            Self::Copy { disk, copy } => {
                let partial = partial(copy);
                let copied = Cmd::new("cp")
                    .confined(Confinement::writes_arguments())
                    .privileges(Privileges::Owners)
                    .args(["-p", "--reflink=auto", "--sparse=always", "--"])
                    .args([disk, &partial])
                    .run()
                    .map_err(Error::from)
                    .and_then(|_| rename(&partial, copy));
                copied.map_err(|e| {
                    let _ = std::fs::remove_file(&partial);
                    failed(disk, e)
                })
            }
            Self::Nvram { file, copy } => std::fs::copy(file, copy)
                .map(drop)
                .map_err(|e| failed(file, Error::failed("copying it").because(e))),
        }
    }

    /// Puts back; may be repeated until [`Protected::forget`].
    pub fn restore(&self) -> Result<()> {
        match self {
            Self::Snapshot { disk } => snapshot("-a", disk),
            Self::Copy { disk, copy } => {
                if copy.exists() {
                    rename(copy, disk)?;
                }
                Ok(())
            }
            // Written in place: the file belongs to QEMU's user.
            Self::Nvram { file, copy } => std::fs::read(copy)
                .and_then(|bytes| std::fs::write(file, bytes))
                .map_err(|e| Error::failed(format!("restoring {}", file.display())).because(e)),
        }
    }

    /// Gives up what was saved; fails while a machine uses the disk.
    pub fn forget(&self) -> Result<()> {
        match self {
            Self::Snapshot { disk } => snapshot("-d", disk),
            Self::Copy { copy, .. } | Self::Nvram { copy, .. } => {
                match std::fs::remove_file(copy) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                        Err(Error::failed(format!("removing {}", copy.display())).because(e))
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    /// The command that does what [`Protected::forget`] does.
    pub fn forget_command(&self) -> String {
        match self {
            Self::Snapshot { disk } => {
                format!("qemu-img snapshot -d {SNAPSHOT} {}", super::quote(disk))
            }
            Self::Copy { copy, .. } | Self::Nvram { copy, .. } => {
                format!("rm {}", super::quote(copy))
            }
        }
    }
}

fn partial(copy: &Path) -> PathBuf {
    copy.with_extension("partial")
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to)
        .map_err(|e| Error::failed(format!("renaming {}", from.display())).because(e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tool;

    #[test]
    fn a_disk_comes_back() {
        if tool::find("qemu-img").is_none() {
            eprintln!("SKIP: no qemu-img");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("disk, 1.raw");
        std::fs::write(&raw, vec![1; 1 << 20]).unwrap();
        let disk = dir.path().join("disk, 1.qcow2");
        let write = |byte: u8| {
            let data = dir.path().join("data");
            std::fs::write(&data, vec![byte; 1 << 20]).unwrap();
            Cmd::new("qemu-img")
                .args(["convert", "-n", "-f", "raw", "-O", "qcow2"])
                .args([&data, &disk])
                .run()
                .unwrap();
        };
        let first = || {
            let back = dir.path().join("back");
            Cmd::new("qemu-img")
                .args(["convert", "-f", "qcow2", "-O", "raw"])
                .args([&disk, &back])
                .run()
                .unwrap();
            std::fs::read(back).unwrap()[0]
        };
        qemu_img::create(&disk, "qcow2", 1 << 20).unwrap();
        write(1);
        let qcow2 = plan(&disk, "qcow2").unwrap();
        let copy = plan(&raw, "raw").unwrap();
        for taken in ["disk, 1.raw.before-final", "disk, 1.raw.partial"] {
            let theirs = dir.path().join(taken);
            std::fs::write(&theirs, "theirs").unwrap();
            let error = copy.refuse_taken().unwrap_err();
            assert!(error.message.contains(taken), "{error}");
            std::fs::remove_file(theirs).unwrap();
        }
        copy.refuse_taken().unwrap();
        qcow2.refuse_taken().unwrap();
        for kept in [&qcow2, &copy] {
            // The second time over what an interrupted run left.
            kept.save().unwrap();
            kept.save().unwrap();
        }
        write(2);
        std::fs::write(&raw, vec![2; 1 << 20]).unwrap();
        assert_eq!(first(), 2);
        for kept in [&qcow2, &copy] {
            kept.restore().unwrap();
            kept.restore().unwrap();
        }
        assert_eq!(first(), 1);
        assert_eq!(std::fs::read(&raw).unwrap()[0], 1);
        qcow2.forget().unwrap();
        copy.forget().unwrap();
        assert!(qcow2.restore().is_err(), "the snapshot is gone");
        assert_eq!(plan(Path::new("/dev/null"), "raw"), None);
    }
}
