//! The evidence of a failed boot, and of every boot of a rehearsal: screen, domain and logs. From
//! the disk of a VM that is off, it includes the SYSTEM hive and the log of driver installations.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::{MAX_SERIAL_LOG, Run, files, proof, screen};
use crate::domain::Stage;
use crate::error::{Error, Result};
use crate::files::create_private;
use crate::fix::journal::write_durably;
use crate::fix::trusted::TrustedFolder;
use crate::threads::joined;

impl Run<'_> {
    /// Saves screen, domain and logs of a failed boot. Missing evidence is a warning: the failure
    /// itself matters more.
    pub(super) fn evidence(&mut self, stage: Stage) -> PathBuf {
        let mut missing = Vec::new();
        let folder = match self.evidence_path(stage) {
            Ok(folder) => folder,
            // Otherwise, a new name is used.
            Err(error) => {
                missing.push(error.to_string());
                let name = format!("evidence-{}-", stage.as_str());
                tempfile::Builder::new()
                    .prefix(&name)
                    .tempdir_in(&self.files.folder)
                    .map_or(self.files.folder.clone(), tempfile::TempDir::keep)
            }
        };
        match self.screenshot(&folder) {
            // The VM is off: the earlier picture of the screen is kept.
            Ok(None) => {}
            Ok(shot) => self.stage_record(stage).screenshot = shot,
            Err(error) => missing.push(format!("screenshot: {error}")),
        }
        match self.virsh.xml(self.files.uuid, true) {
            Ok(xml) => missing.extend(keep(&folder, "domain.xml", xml.as_bytes())),
            Err(error) => missing.push(format!("domain XML: {error}")),
        }
        let mut logs = vec![("com1.log", self.files.serial_log(stage))];
        let second = files::second_log(&logs[0].1);
        if second.exists() {
            logs.push(("com2.log", second));
        }
        let qemu_log = qemu_logs(&self.files.name).find(|path| path.exists());
        logs.extend(qemu_log.map(|path| ("qemu.log", path)));
        for (name, path) in logs {
            if let Err(error) = copy(&path, &folder, name) {
                missing.push(format!("{}: {error}", path.display()));
            }
        }
        self.record
            .warnings
            .extend(missing.iter().map(|m| format!("evidence missing: {m}")));
        if !self.record.evidence.contains(&folder) {
            self.record.evidence.push(folder.clone());
        }
        folder
    }

    pub(super) fn evidence_path(&self, stage: Stage) -> Result<PathBuf> {
        match &self.options.rehearsal {
            Some(folder) => evidence_folder(&folder.join(stage.as_str())),
            None => {
                let name = format!("evidence-{}", stage.as_str());
                evidence_folder(&self.files.folder.join(name))
            }
        }
    }

    pub(super) fn screenshot(&self, folder: &Path) -> Result<Option<PathBuf>> {
        if self.is_off()? {
            return Ok(None);
        }
        self.picture(folder)
    }

    /// Saves a picture without waiting for the VM's state.
    pub(super) fn picture(&self, folder: &Path) -> Result<Option<PathBuf>> {
        // virsh writes to an existing file.
        let raw = folder.join(format!(".screen.{}", uuid::Uuid::new_v4()));
        self.virsh
            .screenshot(self.files.uuid, &raw)
            .inspect_err(|_| drop(fs::remove_file(&raw)))?;
        let failed = |e: std::io::Error| Error::failed("keeping the screenshot").because(e);
        let picture = fs::read(&raw).map_err(failed)?;
        // A picture of an unknown format is kept unchanged.
        let Some(png) = screen::png(&picture) else {
            let shot = folder.join("screen");
            fs::rename(&raw, &shot).map_err(failed)?;
            return Ok(Some(shot));
        };
        let shot = folder.join("screen.png");
        write_durably(&shot, &png).map_err(failed)?;
        fs::remove_file(&raw).map_err(failed)?;
        Ok(Some(shot))
    }

    /// Saves the SYSTEM hive and the log of driver installations from the disk of a VM that is off.
    pub(super) fn guest_evidence(&mut self, folder: &Path) {
        self.end_proof();
        let reached = self.reach().map_or(Ok(()), |thread| joined(thread.join()));
        let disk = reached.and_then(|()| self.files.system_disk());
        let read = disk.and_then(|disk| {
            proof::with_disk(&self.guest_disk(disk), |survey, guest| {
                let (Some(hives), Some(windows)) = (&survey.hives, &survey.inspection.windows)
                else {
                    return Ok(vec!["no Windows on the disk".to_owned()]);
                };
                let mut missing = Vec::new();
                missing.extend(keep(folder, "SYSTEM", &hives.system.bytes));
                // A guest that never installed a driver has no such log.
                if let Some(path) = proof::setup_log_path(windows)
                    && let Ok(log) = guest.read(windows.system_volume, &path, MAX_SERIAL_LOG)
                {
                    missing.extend(keep(folder, "setupapi.dev.log", &log));
                }
                Ok(missing)
            })
        });
        let missing = read.unwrap_or_else(|e| vec![format!("the guest's disk: {e}")]);
        let lines = missing.iter().map(|m| format!("evidence missing: {m}"));
        self.record.warnings.extend(lines);
    }
}

/// Creates the directory for it. An existing one of another user is not written to.
fn evidence_folder(path: &Path) -> Result<PathBuf> {
    let trusted = || TrustedFolder::open(path).map(drop);
    match trusted() {
        Err(e) if e.is_missing() => {
            create_private(path)
                .map_err(|e| Error::failed(format!("creating {}", path.display())).because(e))?;
            trusted()?;
        }
        done => done?,
    }
    Ok(path.to_path_buf())
}

/// Writes a file of the evidence in place of an earlier one, not through it. Returns the error, if
/// any.
fn keep(folder: &Path, name: &str, bytes: &[u8]) -> Option<String> {
    write_durably(&folder.join(name), bytes)
        .err()
        .map(|e| format!("{name}: {e}"))
}

/// Copies a log in the same manner.
fn copy(log: &Path, folder: &Path, name: &str) -> io::Result<()> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut log = File::options()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(log)?;
    if !log.metadata()?.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    io::copy(&mut log, &mut new)?;
    new.persist(folder.join(name))?;
    Ok(())
}

/// The paths of QEMU's log files: of this user's libvirt, and of the system's.
pub(crate) fn qemu_logs(name: &str) -> impl Iterator<Item = PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let user = cache.map(|c| c.join("libvirt/qemu/log"));
    let system = PathBuf::from("/var/log/libvirt/qemu");
    let name = format!("{name}.log");
    user.into_iter()
        .chain([system])
        .map(move |folder| folder.join(&name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn nothing_is_written_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (victim, log) = (dir.path().join("victim"), dir.path().join("com1-final.log"));
        fs::write(&victim, "theirs").unwrap();
        fs::write(&log, "said").unwrap();
        let folder = evidence_folder(&dir.path().join("evidence-final")).unwrap();
        for name in ["com1.log", "domain.xml"] {
            symlink(&victim, folder.join(name)).unwrap();
        }
        copy(&log, &folder, "com1.log").unwrap();
        assert_eq!(keep(&folder, "domain.xml", b"<domain/>"), None);
        assert_eq!(fs::read_to_string(&victim).unwrap(), "theirs");
        let kept = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
        assert_eq!(
            (kept("com1.log"), kept("domain.xml")),
            ("said".into(), "<domain/>".into())
        );
        // A log that became a link is not the VM's output.
        fs::remove_file(&log).unwrap();
        symlink(&victim, &log).unwrap();
        assert!(copy(&log, &folder, "com1.log").is_err());
        assert_eq!(kept("com1.log"), "said");
        // The directory itself, if others can write to it or it is a link.
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(evidence_folder(&folder).is_err());
        let link = dir.path().join("evidence-bootstrap");
        symlink(dir.path(), &link).unwrap();
        assert!(evidence_folder(&link).is_err());
    }
}
