//! Preserves the disks before the switch, and restores them.
//!
//! A qcow2 disk gets an overlay that takes all writes from the switch on. It is discarded if the
//! final boot fails, and merged into the disk ([`merge`](super::merge)) if it succeeds. An internal
//! snapshot is no alternative. If the disk is itself an overlay on a source, the snapshot's data is
//! lost with the source. Raw files get a copy beside them (a reflink if the file system has them).
//! The UEFI variables get one in the output directory. All of this happens while the VM is off.
//!
//! A copy is recorded before it is made, under a free name, and is durable before the switch. It is
//! restored only if it still has the same size.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, SeekFrom as To, ioctl_ficlone, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Run;
use crate::disk::empty;
use crate::error::{Error, ErrorKind, Result};
use crate::files;
use crate::fix::journal::{sync_folder, write_durably};
use crate::fix::trusted;
use crate::stop;
use crate::timeline;
use crate::tool::confine::Confinement;
use crate::tool::{Cmd, qemu_img};

/// The name of the internal snapshot that earlier versions made.
pub const SNAPSHOT: &str = "hyper2kvm-before-final";

/// The number of bytes between two checks of the stop flag.
const CHUNK: u64 = 64 << 20;
const MAX_NVRAM: u64 = 64 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Protected {
    /// The disk is not written to: the VM runs on the overlay.
    Overlay { disk: PathBuf, overlay: PathBuf },
    /// Made by an earlier version.
    Snapshot { disk: PathBuf },
    Copy {
        disk: PathBuf,
        copy: PathBuf,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        saved: Option<Saved>,
    },
    Nvram {
        file: PathBuf,
        copy: PathBuf,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        saved: Option<Saved>,
    },
}

/// A finished copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    size_bytes: u64,
    inode: u64,
}

/// The planned protection of one disk; `None` if nothing can preserve it.
pub fn plan(disk: &Path, format: &str) -> Option<Protected> {
    let beside = |what: &str| -> PathBuf {
        let mut name = disk.as_os_str().to_owned();
        name.push(format!(".{what}-{}", uuid::Uuid::new_v4()));
        name.into()
    };
    // A block device has no space beside it.
    if !disk.is_file() {
        return None;
    }
    Some(match format {
        "qcow2" => Protected::Overlay {
            disk: disk.into(),
            overlay: beside("since-switch"),
        },
        _ => Protected::Copy {
            disk: disk.into(),
            copy: beside("before-final"),
            saved: None,
        },
    })
}

impl Run<'_> {
    /// Saves the state of the VM, which is off, before the switch.
    pub(super) fn protect(&mut self) -> Result<()> {
        let _span = timeline::span("save the VM");
        self.shut_down()?;
        // Left by a run that was killed here: possibly half a copy.
        for kept in std::mem::take(&mut self.record.protected) {
            let _ = kept.forget();
        }
        self.begin_proof();
        if !self.options.snapshot {
            return Ok(());
        }
        let mut list = Vec::new();
        for disk in self.files.production.disks() {
            list.push(plan(&disk.path, &disk.format).ok_or_else(|| {
                Error::failed(format!(
                    "{} cannot be saved before the switch",
                    disk.path.display()
                ))
                .hint("take a snapshot of it by other means, then continue with --no-snapshot")
            })?);
        }
        if let Some(file) = self.files.production.nvram().filter(|f| f.exists()) {
            let copy = self.files.folder.join("nvram.before-final");
            list.push(Protected::Nvram {
                file,
                copy,
                saved: None,
            });
        }
        for kept in &list {
            kept.refuse_taken()?;
        }
        self.record.protected = list;
        self.record.save(&self.files.folder)?;
        for kept in &mut self.record.protected {
            self.ui
                .status("Saving", "the present state of the VM, before the switch");
            kept.save()?;
        }
        Ok(())
    }
}

/// Creates an empty overlay on a disk, with the disk's owner and mode.
fn create_overlay(disk: &Path, overlay: &Path) -> Result<()> {
    let reading = |e: io::Error| Error::failed(format!("reading {}", disk.display())).because(e);
    let below = open_file(File::options().read(true), disk).map_err(reading)?;
    let was = below.metadata().map_err(reading)?;
    let create = || -> io::Result<()> {
        empty::create_over(overlay, &below, disk)?;
        let file = File::open(overlay)?;
        like(&file, &was)?;
        file.sync_all()?;
        sync_folder(overlay.parent().unwrap_or(Path::new("/")))
    };
    create().map_err(|e| Error::failed(format!("writing {}", overlay.display())).because(e))
}

/// Gives a new file the owner and mode of another.
fn like(file: &File, was: &fs::Metadata) -> io::Result<()> {
    // Only root can give it to another user.
    let _ = fchown(file, Some(was.uid()), Some(was.gid()));
    file.set_permissions(was.permissions())
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
    /// Fails if a file of the user has the intended name.
    pub fn refuse_taken(&self) -> Result<()> {
        match self {
            Self::Overlay { overlay: copy, .. }
            | Self::Copy { copy, .. }
            | Self::Nvram { copy, .. }
                if copy.symlink_metadata().is_ok() =>
            {
                Err(Error::failed(format!(
                    "{} exists, and what is saved before the switch would replace it",
                    copy.display()
                ))
                .hint("move it elsewhere, or continue with --no-snapshot"))
            }
            _ => Ok(()),
        }
    }

    /// Saves one file; it is durable when this returns.
    pub fn save(&mut self) -> Result<()> {
        let failed = |what: &Path, e: Error| {
            if e.kind == ErrorKind::Interrupted {
                return e;
            }
            Error::failed(format!("saving {} before the switch", what.display()))
                .because(e)
                .hint("--no-snapshot continues without: a failed switch may then leave the disk changed")
        };
        match self {
            Self::Overlay { disk, overlay } => {
                create_overlay(disk, overlay).map_err(|e| failed(disk, e))
            }
            // These are no longer made.
            Self::Snapshot { .. } => Ok(()),
            Self::Copy { disk, copy, saved } => {
                *saved = Some(copy_disk(disk, copy).map_err(|e| failed(disk, e))?);
                Ok(())
            }
            Self::Nvram { file, copy, saved } => {
                let save = || -> io::Result<Saved> {
                    let mut bytes = Vec::new();
                    let open = open_file(File::options().read(true), file)?;
                    open.take(MAX_NVRAM).read_to_end(&mut bytes)?;
                    write_durably(copy, &bytes)?;
                    Ok(Saved::of(&copy.symlink_metadata()?))
                };
                let copied =
                    save().map_err(|e| failed(file, Error::failed("copying it").because(e)));
                *saved = Some(copied?);
                Ok(())
            }
        }
    }

    /// Restores the saved state; may be repeated until [`Protected::forget`].
    pub fn restore(&self) -> Result<()> {
        match self {
            // The disk was not written to; discarding the overlay discards all writes since.
            Self::Overlay { disk, .. } => fs::metadata(disk)
                .map(drop)
                .map_err(|e| Error::failed(format!("looking for {}", disk.display())).because(e)),
            Self::Snapshot { disk } => snapshot("-a", disk),
            Self::Copy { disk, copy, saved } => put_back(disk, copy, *saved),
            Self::Nvram { file, copy, saved } => {
                let bytes = trusted::read(copy)?;
                check_size(copy, bytes.len() as u64, *saved)?;
                // Written in place: the file belongs to QEMU's user, who may have put a link there.
                let write = || -> io::Result<()> {
                    let mut open =
                        open_file(File::options().write(true).create(true).mode(0o600), file)?;
                    open.write_all(&bytes)?;
                    open.set_len(bytes.len() as u64)?;
                    open.sync_all()
                };
                write()
                    .map_err(|e| Error::failed(format!("restoring {}", file.display())).because(e))
            }
        }
    }

    /// Discards the saved state, including the contents of an overlay; a snapshot only while no VM
    /// uses the disk.
    pub fn forget(&self) -> Result<()> {
        match self {
            Self::Snapshot { disk } => snapshot("-d", disk),
            Self::Overlay { overlay: copy, .. }
            | Self::Copy { copy, .. }
            | Self::Nvram { copy, .. } => files::removed(std::fs::remove_file(copy))
                .map_err(|e| Error::failed(format!("removing {}", copy.display())).because(e)),
        }
    }

    /// The command that has the effect of [`Protected::forget`].
    pub fn forget_command(&self) -> String {
        match self {
            Self::Snapshot { disk } => {
                format!(
                    "qemu-img snapshot -d {SNAPSHOT} {}",
                    crate::text::quote(disk)
                )
            }
            Self::Overlay { overlay: copy, .. }
            | Self::Copy { copy, .. }
            | Self::Nvram { copy, .. } => format!("rm {}", crate::text::quote(copy)),
        }
    }
}

impl Saved {
    fn of(found: &fs::Metadata) -> Self {
        Self {
            size_bytes: found.len(),
            inode: found.ino(),
        }
    }
}

/// Opens a regular file; a link is an error.
fn open_file(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = options.custom_flags(flags.bits() as i32).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no file")),
    }
}

/// Copies a disk to a free name, with its owner and mode.
fn copy_disk(disk: &Path, copy: &Path) -> Result<Saved> {
    let failed = |e: io::Error| Error::failed(format!("writing {}", copy.display())).because(e);
    let source = File::open(disk)
        .map_err(|e| Error::failed(format!("opening {}", disk.display())).because(e))?;
    let mut options = File::options();
    let target = options.write(true).create_new(true).mode(0o600).open(copy);
    let target = target.map_err(failed)?;
    let save = || -> io::Result<Saved> {
        let was = source.metadata()?;
        fill(&source, &target, was.len())?;
        like(&target, &was)?;
        target.set_modified(was.modified()?)?;
        target.sync_all()?;
        sync_folder(copy.parent().unwrap_or(Path::new("/")))?;
        Ok(Saved::of(&target.metadata()?))
    };
    save().map_err(|e| {
        let _ = fs::remove_file(copy);
        match e.kind() {
            io::ErrorKind::Interrupted => {
                Error::new(ErrorKind::Interrupted, "interrupted; the VM is off")
                    .hint("run the same command again to continue")
            }
            _ => failed(e),
        }
    })
}

/// Copies the file as a reflink, or its ranges with data.
fn fill(source: &File, target: &File, size: u64) -> io::Result<()> {
    if ioctl_ficlone(target, source).is_ok() {
        return Ok(());
    }
    target.set_len(size)?;
    let mut at = 0;
    while at < size {
        let data = match seek(source, To::Data(at)) {
            Err(Errno::NXIO) => break,
            // The file system does not support holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            found => found?,
        };
        let end = seek(source, To::Hole(data)).map_or(size, |end| end.min(size));
        at = data;
        while at < end {
            if stop::requested() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let len = CHUNK.min(end - at);
            let (mut from, mut to) = (source, target);
            from.seek(SeekFrom::Start(at))?;
            to.seek(SeekFrom::Start(at))?;
            if io::copy(&mut from.take(len), &mut to)? != len {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at += len;
        }
    }
    Ok(())
}

/// Renames in one step, so that the disk always exists.
fn put_back(disk: &Path, copy: &Path, saved: Option<Saved>) -> Result<()> {
    let failed = |e: io::Error| Error::failed(format!("restoring {}", disk.display())).because(e);
    let found = match copy.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            // A run that was killed before it could record this has already done it.
            let there = fs::metadata(disk).map_err(failed)?;
            if saved.is_none_or(|saved| saved.inode == there.ino()) {
                return Ok(());
            }
            return Err(failed(e))
                .map_err(|e| e.hint(format!("what was saved is no longer at {}", copy.display())));
        }
        found => found.map_err(failed)?,
    };
    if !found.is_file() {
        return Err(Error::failed(format!("{} is no file", copy.display())));
    }
    check_size(copy, found.len(), saved)?;
    fs::rename(copy, disk).map_err(failed)?;
    sync_folder(disk.parent().unwrap_or(Path::new("/"))).map_err(failed)
}

/// Fails if the size of a copy has changed. Records of earlier versions have no size.
fn check_size(copy: &Path, size: u64, saved: Option<Saved>) -> Result<()> {
    match saved {
        Some(saved) if saved.size_bytes != size => Err(Error::failed(format!(
            "{} has {size} bytes, and {} were saved",
            copy.display(),
            saved.size_bytes
        ))
        .hint("it was changed since: nothing is put back from it")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skip::have;

    #[test]
    fn a_disk_comes_back() {
        if !have(&["qemu-img"]) {
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
        crate::disk::empty::create_qcow2(&disk, 1 << 20).unwrap();
        write(1);
        let mut copy = plan(&raw, "raw").unwrap();
        // The second time over the remains of an interrupted run.
        copy.save().unwrap();
        copy.forget().unwrap();
        copy.save().unwrap();
        // Made by an earlier version.
        let old = Protected::Snapshot { disk: disk.clone() };
        snapshot("-c", &disk).unwrap();
        write(2);
        std::fs::write(&raw, vec![2; 1 << 20]).unwrap();
        assert_eq!(first(), 2);
        for kept in [&old, &copy] {
            kept.restore().unwrap();
            kept.restore().unwrap();
        }
        assert_eq!(first(), 1);
        assert_eq!(std::fs::read(&raw).unwrap()[0], 1);
        old.forget().unwrap();
        copy.forget().unwrap();
        assert!(old.restore().is_err(), "the snapshot is gone");
        assert_eq!(plan(Path::new("/dev/null"), "raw"), None);
    }

    /// On a standalone disk, and on one over a source elsewhere.
    #[test]
    fn an_overlay_takes_what_is_written_since() {
        if !have(&["qemu-img", "qemu-io"]) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let far = tempfile::tempdir().unwrap();
        let source = far.path().join("old, 1.raw");
        fs::write(&source, vec![1; 1 << 20]).unwrap();
        let io = |disk: &Path, command: &str| {
            let run = Cmd::new("qemu-io").args(["-f", "qcow2", "-c", command]);
            let said = run.arg(disk).run().unwrap().stdout;
            String::from_utf8_lossy(&said).into_owned()
        };
        for (name, below) in [("alone.qcow2", None), ("later, 2.qcow2", Some(&source))] {
            let disk = dir.path().join(name);
            empty::create_qcow2(&disk, 1 << 20).unwrap();
            let below = below.map(|source| (source.as_path(), "raw"));
            qemu_img::set_backing(&disk, below).unwrap();
            io(&disk, "write -P 1 0 1M");
            let before = fs::read(&disk).unwrap();
            fs::set_permissions(&disk, std::os::unix::fs::PermissionsExt::from_mode(0o640))
                .unwrap();
            let mut kept = plan(&disk, "qcow2").unwrap();
            kept.save().unwrap();
            let Protected::Overlay { overlay, .. } = kept.clone() else {
                panic!("{kept:?}");
            };
            let mode = fs::metadata(&overlay).unwrap().mode();
            assert_eq!(mode & 0o777, 0o640);
            io(&overlay, "write -P 2 64k 64k");
            assert!(
                fs::read(&disk).unwrap() == before,
                "{name}: it was written to"
            );
            kept.restore().unwrap();
            kept.forget().unwrap();
            assert!(!overlay.exists());
            let said = io(&disk, "read -P 1 0 1M");
            assert!(!said.contains("fail"), "{name}: {said}");
        }
        assert!(fs::read(&source).unwrap() == vec![1; 1 << 20]);
    }

    /// Other files beside a disk are left alone, and only the saved state is restored.
    #[test]
    fn a_copy_replaces_nothing_and_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("disk.raw");
        let contents = |byte: u8| {
            let file = File::create(&raw).unwrap();
            file.set_len(64 << 20).unwrap();
            let mut bytes = vec![byte; 1 << 20];
            bytes[9] = 9;
            for at in [0, 32 << 20] {
                std::os::unix::fs::FileExt::write_all_at(&file, &bytes, at).unwrap();
            }
        };
        contents(1);
        fs::set_permissions(&raw, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
        let before = fs::read(&raw).unwrap();
        let (theirs, victim) = ("disk.raw.before-final", dir.path().join("victim"));
        fs::write(dir.path().join(theirs), "theirs").unwrap();
        fs::write(&victim, "theirs").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join("disk.raw.partial")).unwrap();
        let mut kept = plan(&raw, "raw").unwrap();
        kept.save().unwrap();
        let Protected::Copy { copy, saved, .. } = &kept else {
            panic!("{kept:?}");
        };
        let (copy, saved) = (copy.clone(), saved.unwrap());
        let there = fs::metadata(&copy).unwrap();
        assert_eq!((saved.size_bytes, there.mode() & 0o777), (64 << 20, 0o640));
        assert!(there.blocks() * 512 <= fs::metadata(&raw).unwrap().blocks() * 512 + (1 << 20));
        for name in [theirs, "victim"] {
            assert_eq!(fs::read_to_string(dir.path().join(name)).unwrap(), "theirs");
        }
        assert!(kept.save().is_err(), "its name is taken");
        contents(2);
        // A possible state after a loss of power.
        let whole = dir.path().join("whole");
        fs::copy(&copy, &whole).unwrap();
        File::create(&copy).unwrap();
        let error = kept.restore().unwrap_err();
        assert!(
            error.message.contains("0 bytes, and 67108864 were saved"),
            "{error}"
        );
        fs::rename(&whole, &copy).unwrap();
        kept.restore().unwrap();
        assert!(fs::read(&raw).unwrap() == before);
        // It has its name by now; and without a copy nothing can be restored.
        let mut again = plan(&raw, "raw").unwrap();
        again.save().unwrap();
        again.restore().unwrap();
        again.restore().unwrap();
        let other = dir.path().join("other");
        fs::write(&other, "another disk").unwrap();
        fs::rename(&other, &raw).unwrap();
        assert!(again.restore().is_err());
    }

    #[test]
    fn variables_come_back_through_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let (file, copy) = (
            dir.path().join("vars.fd"),
            dir.path().join("nvram.before-final"),
        );
        let victim = dir.path().join("victim");
        fs::write(&victim, "theirs").unwrap();
        std::os::unix::fs::symlink(&victim, &copy).unwrap();
        fs::write(&file, "before").unwrap();
        let mut kept = Protected::Nvram {
            file: file.clone(),
            copy: copy.clone(),
            saved: None,
        };
        let error = kept.refuse_taken().unwrap_err();
        assert!(
            error.message.contains("nvram.before-final exists"),
            "{error}"
        );
        // The file may appear after that check.
        kept.save().unwrap();
        fs::write(&file, "changed since").unwrap();
        kept.restore().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "before");
        fs::write(&copy, "").unwrap();
        assert!(kept.restore().is_err());
        assert_eq!(fs::read_to_string(&file).unwrap(), "before");
        fs::write(&copy, "before").unwrap();
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(&victim, &file).unwrap();
        assert!(kept.restore().is_err());
        assert_eq!(fs::read_to_string(&victim).unwrap(), "theirs");
    }
}
