//! The files of a Linux guest through libguestfs, for everything that this process does not read:
//! XFS, btrfs, LVM, software RAID and others.
//!
//! The disks are exported by hyper2kvm's storage daemons, read-only. libguestfs finds the
//! installation and its mount points. Files are downloaded into a private directory when they are
//! opened. Paths are resolved inside the appliance, so a symbolic link never leads to this host.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::time::Duration;

use super::tree::{Result, Tree, TreeError};
use crate::files::Scratch;
use crate::guest::GuestError;
use crate::guest::guestfish::{self, Attach};
use crate::tool::guestfish::{Line, Reply, Shell};

const LIMIT: Duration = Duration::from_secs(900);
const MAX_NAMES: usize = 100_000;

/// An installation inside a running appliance.
pub struct ApplianceTree {
    shell: RefCell<Shell>,
    work: Scratch,
    /// libguestfs' name of the root file system: `/dev/rhel/root`, `btrfsvol:/dev/sda2/root`.
    pub device: String,
    pub filesystem: String,
    pub layers: Vec<&'static str>,
}

/// The installations found by the appliance.
pub enum Found {
    Tree(Box<ApplianceTree>),
    None,
    /// More than one, by device.
    Several(Vec<String>),
    /// None, and these devices are encrypted.
    Encrypted(Vec<String>),
}

/// Starts an appliance with the disks and mounts the Linux on them.
pub fn open(disks: &[Attach<'_>]) -> Result<Found> {
    let mut shell = guestfish::start(disks)?;
    let roots = lines(&mut shell, Line::new("inspect-os"))?;
    let linux = |shell: &mut Shell, root: &String| -> Result<bool> {
        let kind = lines(shell, Line::new("inspect-get-type").arg(root))?;
        Ok(kind.first().is_some_and(|k| k == "linux"))
    };
    let mut found = Vec::new();
    for root in roots {
        if linux(&mut shell, &root)? {
            found.push(root);
        }
    }
    let [root] = &found[..] else {
        if found.is_empty() {
            let luks = encrypted(&mut shell)?;
            return Ok(if luks.is_empty() {
                Found::None
            } else {
                Found::Encrypted(luks)
            });
        }
        return Ok(Found::Several(found));
    };
    let mounts: BTreeMap<String, String> =
        lines(&mut shell, Line::new("inspect-get-mountpoints").arg(root))?
            .iter()
            .filter_map(|line| line.split_once(": "))
            .map(|(place, device)| (place.to_string(), device.to_string()))
            .collect();
    // Parents sort before the directories below them.
    for (place, device) in &mounts {
        let reply = one(&mut shell, Line::new("mount-ro").arg(device).arg(place))?;
        if let Err(reason) = reply
            && place == "/"
        {
            return Err(unreadable("/", reason));
        }
    }
    let filesystem = lines(&mut shell, Line::new("vfs-type").arg(root))?;
    Ok(Found::Tree(Box::new(ApplianceTree {
        layers: layers(root),
        device: root.clone(),
        filesystem: filesystem.into_iter().next().unwrap_or_default(),
        shell: RefCell::new(shell),
        work: Scratch::new()?,
    })))
}

/// The layers between the disk and the file system, derived from libguestfs' names.
fn layers(device: &str) -> Vec<&'static str> {
    let device = device.strip_prefix("btrfsvol:").unwrap_or(device);
    let Some(name) = device.strip_prefix("/dev/") else {
        return Vec::new();
    };
    if name.starts_with("md") {
        vec!["raid"]
    } else if name.starts_with("sd") {
        Vec::new()
    } else {
        // `/dev/VG/LV`, `/dev/mapper/VG-LV`.
        vec!["lvm"]
    }
}

fn encrypted(shell: &mut Shell) -> Result<Vec<String>> {
    let devices = lines(shell, Line::new("list-filesystems"))?;
    Ok(devices
        .iter()
        .filter_map(|line| line.split_once(": "))
        .filter(|(_, kind)| kind.starts_with("crypto_LUKS"))
        .map(|(device, _)| device.to_string())
        .collect())
}

fn one(shell: &mut Shell, line: Line) -> Result<Reply> {
    shell
        .one(line, LIMIT)
        .map_err(|e| TreeError::Io(io::Error::other(e)))
}

fn lines(shell: &mut Shell, line: Line) -> Result<Vec<String>> {
    let reply = one(shell, line)?.map_err(|reason| unreadable("the guest", reason))?;
    Ok(String::from_utf8_lossy(&reply)
        .lines()
        .map(str::to_string)
        .filter(|line| !line.is_empty())
        .collect())
}

fn unreadable(path: &str, reason: String) -> TreeError {
    TreeError::Guest(GuestError::Unreadable {
        path: path.to_string(),
        reason,
    })
}

impl ApplianceTree {
    fn ask(&self, line: Line) -> Result<Reply> {
        // Never borrowed twice: nothing below calls this again.
        one(&mut self.shell.borrow_mut(), line)
    }

    fn is(&self, command: &str, path: &str) -> Result<bool> {
        let line = Line::new(command).arg(path).arg("followsymlinks:true");
        Ok(self.ask(line)?.is_ok_and(|said| said.starts_with(b"true")))
    }
}

impl Tree for ApplianceTree {
    fn reader(&self) -> &'static str {
        "guestfish"
    }

    fn open(&self, path: &str, limit: u64) -> Result<Option<Box<dyn Read + '_>>> {
        if !path.starts_with('/') || !self.is("is-file-opts", path)? {
            return Ok(None);
        }
        let said = self.ask(Line::new("filesize").arg(path))?;
        let said = said.map_err(|reason| unreadable(path, reason))?;
        let size: u64 = String::from_utf8_lossy(&said)
            .trim()
            .parse()
            .map_err(|_| unreadable(path, "its size is not a number".to_string()))?;
        if size > limit {
            return Err(TreeError::TooLarge {
                path: path.to_string(),
                size,
                limit,
            });
        }
        let target = self.work.path().join("file");
        let text = guestfish::text(&target)?;
        let said = self.ask(Line::new("download").arg(path).arg(text))?;
        said.map_err(|reason| unreadable(path, reason))?;
        let file = File::open(&target)?;
        std::fs::remove_file(&target)?;
        Ok(Some(Box::new(file)))
    }

    /// Only the first bytes are transferred from the appliance.
    fn head(&self, path: &str, len: u64) -> Result<Option<Vec<u8>>> {
        if !self.is("is-file-opts", path)? {
            return Ok(None);
        }
        let line = Line::new("pread").arg(path).arg(len.to_string()).arg("0");
        match self.ask(line)? {
            Ok(bytes) => Ok(Some(bytes)),
            Err(reason) => Err(unreadable(path, reason)),
        }
    }

    fn list(&self, folder: &str) -> Result<Vec<String>> {
        if !folder.starts_with('/') || !self.is("is-dir-opts", folder)? {
            return Ok(Vec::new());
        }
        let target = self.work.path().join("names");
        let line = Line::new("ls0").arg(folder).arg(guestfish::text(&target)?);
        self.ask(line)?
            .map_err(|reason| unreadable(folder, reason))?;
        let bytes = std::fs::read(&target)?;
        std::fs::remove_file(&target)?;
        let mut names: Vec<String> = bytes
            .split(|b| *b == 0)
            .filter_map(|name| std::str::from_utf8(name).ok())
            .filter(|name| !name.is_empty() && !name.chars().any(char::is_control))
            .map(str::to_string)
            .take(MAX_NAMES)
            .collect();
        names.sort();
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_by_device() {
        for (device, want) in [
            ("/dev/sda1", &[][..]),
            ("btrfsvol:/dev/sda2/root", &[]),
            ("/dev/rhel/root", &["lvm"]),
            ("/dev/mapper/rhel-root", &["lvm"]),
            ("/dev/md127", &["raid"]),
        ] {
            assert_eq!(layers(device), want, "{device}");
        }
    }
}
