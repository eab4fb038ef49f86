//! What is kept of a boot that failed: screen, domain, logs, and from the disk of a machine that is off
//! the SYSTEM hive and the log of driver installations.

use std::fs;
use std::path::{Path, PathBuf};

use super::{MAX_SERIAL_LOG, Run, files, proof, screen};
use crate::domain::Stage;
use crate::error::{Error, Result};
use crate::tool::virsh::State;

impl Run<'_> {
    /// Screen, domain and logs of a boot that failed. What cannot be had is a warning: the failure itself
    /// matters more.
    pub(super) fn evidence(&mut self, stage: Stage) -> PathBuf {
        let folder = self
            .files
            .folder
            .join(format!("evidence-{}", stage.as_str()));
        let mut missing = Vec::new();
        if let Err(error) = fs::create_dir_all(&folder) {
            missing.push(format!("{}: {error}", folder.display()));
        }
        match self.screenshot(&folder) {
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
        logs.extend(qemu_log(&self.files.name).map(|path| ("qemu.log", path)));
        for (name, path) in logs {
            if let Err(error) = fs::copy(&path, folder.join(name)) {
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

    fn screenshot(&self, folder: &Path) -> Result<Option<PathBuf>> {
        if self.tick(1)?.state == State::Off {
            return Ok(None);
        }
        let raw = folder.join("screen");
        self.virsh.screenshot(self.files.uuid, &raw)?;
        let failed = |e: std::io::Error| Error::failed("keeping the screenshot").because(e);
        let picture = fs::read(&raw).map_err(failed)?;
        // What is no picture we know is kept as it came.
        let Some(png) = screen::png(&picture) else {
            return Ok(Some(raw));
        };
        let shot = folder.join("screen.png");
        fs::write(&shot, png).map_err(failed)?;
        fs::remove_file(&raw).map_err(failed)?;
        Ok(Some(shot))
    }

    /// The SYSTEM hive and the log of driver installations, from the disk of a machine that is off.
    pub(super) fn guest_evidence(&mut self, folder: &Path) {
        let read = self.files.system_disk().and_then(|disk| {
            proof::with_disk(
                &disk.path,
                &disk.format,
                &self.options.keys,
                |survey, guest| {
                    let (Some(hives), Some(windows)) = (&survey.hives, &survey.inspection.windows)
                    else {
                        return Ok(vec!["no Windows on the disk".to_owned()]);
                    };
                    let mut missing = Vec::new();
                    missing.extend(keep(folder, "SYSTEM", &hives.system.bytes));
                    // A guest that never installed a driver has none.
                    if let Some(path) = proof::setup_log_path(windows)
                        && let Ok(log) = guest.read(windows.system_volume, &path, MAX_SERIAL_LOG)
                    {
                        missing.extend(keep(folder, "setupapi.dev.log", &log));
                    }
                    Ok(missing)
                },
            )
        });
        let missing = read.unwrap_or_else(|e| vec![format!("the guest's disk: {e}")]);
        let lines = missing.iter().map(|m| format!("evidence missing: {m}"));
        self.record.warnings.extend(lines);
    }
}

/// Writes a file of the evidence; what went wrong, if something did.
fn keep(folder: &Path, name: &str, bytes: &[u8]) -> Option<String> {
    fs::write(folder.join(name), bytes)
        .err()
        .map(|e| format!("{name}: {e}"))
}

/// Where libvirt lets QEMU write its messages: of the system's libvirt, or of this user's.
fn qemu_log(name: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let user = cache.map(|c| c.join("libvirt/qemu/log"));
    let system = PathBuf::from("/var/log/libvirt/qemu");
    user.into_iter()
        .chain([system])
        .map(|folder| folder.join(format!("{name}.log")))
        .find(|path| path.exists())
}
