//! `later.json`: the chains below the disks of an output directory, and the facts about the source.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::disk::hold::{Fingerprint, Held, Use};
use crate::disk::{Image, ImageError};
use crate::domain::Backing;
use crate::error::{Blocker, Error, Result};
use crate::fix::journal::write_durably;
use crate::fix::trusted;
use crate::text::shell_word;
use crate::tool::qemu_img;

use super::whole;
use super::wire::{OnWire, SOCKET};

pub(crate) const FILE_NAME: &str = "later.json";
const SCHEMA: &str = "hyper2kvm/later/1";

/// Whether the disks need the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum LaterState {
    /// The disks are overlays on the source.
    Left,
    /// Everything was pulled.
    Alone,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) schema: String,
    pub(crate) version: String,
    pub(crate) state: LaterState,
    /// The disks in the order of `outputs.disks` in the report.
    pub(crate) disks: Vec<Disk>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Disk {
    /// The overlay's name in the output directory.
    pub(crate) file: String,
    pub(crate) virtual_size: u64,
    /// The chain below it, from the top.
    pub(crate) levels: Vec<Level>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Level {
    pub(crate) format: String,
    /// The image, its extents, its data file.
    pub(crate) files: Vec<Fingerprint>,
    /// For a source on another host, in place of the files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) wire: Option<OnWire>,
}

/// The chain in the form of the domain XML.
pub(crate) fn backing(levels: &[Level]) -> Vec<Backing> {
    let named = |level: &Level| {
        let path = match &level.wire {
            Some(wire) => wire.socket.clone(),
            None => level.files.first()?.path.clone(),
        };
        Some(Backing {
            path,
            format: level.format.clone(),
            socket: level.wire.is_some(),
        })
    };
    levels.iter().filter_map(named).collect()
}

/// Sets the name of an overlay's backing file. Nothing else in it changes, and no other file is
/// opened.
pub(crate) fn name_below(overlay: &Path, below: &Level) -> Result<()> {
    let name = match (&below.wire, below.files.first()) {
        (Some(wire), _) => PathBuf::from(wire.backing_name()),
        (None, Some(file)) => file.path.clone(),
        (None, None) => return Ok(()),
    };
    qemu_img::set_backing(overlay, Some((&name, &below.format)))
        .map_err(|e| Error::failed(format!("completing {}", overlay.display())).because(e))
}

/// Sets the socket paths of a disk on these levels: beside its overlay.
pub(crate) fn put_sockets(levels: &mut [Level], overlay: &Path) {
    for level in levels {
        if let Some(wire) = &mut level.wire {
            wire.socket = overlay.with_extension(SOCKET);
            wire.format.clone_from(&level.format);
        }
    }
}

impl Disk {
    /// The part of the chain on another host.
    pub(crate) fn wire(&self) -> Option<&OnWire> {
        self.levels.iter().find_map(|level| level.wire.as_ref())
    }

    fn files(&self) -> impl Iterator<Item = &Fingerprint> {
        self.levels.iter().flat_map(|level| &level.files)
    }
}

impl Record {
    pub(crate) fn new(disks: Vec<Disk>) -> Self {
        Self {
            schema: SCHEMA.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state: LaterState::Left,
            disks,
        }
    }

    /// Loads the record of a directory whose disks need the source; `None` for any other.
    pub(crate) fn left(folder: &Path) -> Result<Option<Self>> {
        Ok(Self::load(folder)?.filter(|record| record.state == LaterState::Left))
    }

    pub(crate) fn load(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FILE_NAME);
        // It names the files that QEMU will open.
        let text = match trusted::read(&path) {
            Err(e) if e.is_missing() => return Ok(None),
            text => text?,
        };
        let mut record: Self = serde_json::from_slice(&text).map_err(|e| {
            Error::failed(format!("{} is not understood", path.display()))
                .because(e)
                .hint("convert again into another directory; the source is untouched")
        })?;
        let folder = std::path::absolute(folder)
            .map_err(|e| Error::failed(format!("reading {}", path.display())).because(e))?;
        for disk in &mut record.disks {
            put_sockets(&mut disk.levels, &folder.join(&disk.file));
        }
        Ok(Some(record))
    }

    /// Saves the record; it is durable when this returns.
    pub(crate) fn save(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE_NAME);
        let text = format!("{:#}\n", serde_json::json!(self));
        write_durably(&path, text.as_bytes())
            .map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))
    }

    /// Every file of the source, each once.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = (self.disks.iter().flat_map(Disk::files))
            .map(|file| file.path.clone())
            .collect();
        files.sort();
        files.dedup();
        files
    }

    /// The sources below the disks in the form that users write: files of this host, URLs.
    pub(crate) fn sources(&self) -> Vec<PathBuf> {
        let mut sources = self.files();
        for wire in self.disks.iter().filter_map(Disk::wire) {
            let url = PathBuf::from(&wire.url);
            if !sources.contains(&url) {
                sources.push(url);
            }
        }
        sources
    }

    /// Whether the source is one that QEMU cannot open itself.
    pub(crate) fn is_on_wire(&self) -> bool {
        self.disks.iter().any(|disk| disk.wire().is_some())
    }

    /// Whether a disk consists of several files of another host, or of one that QEMU does not read
    /// over NBD.
    pub(crate) fn is_composed(&self) -> bool {
        let mut wires = self.disks.iter().filter_map(Disk::wire);
        wires.any(|wire| wire.whole.is_some())
    }

    /// Updates the overlays with the present paths of the sockets. Returns the changed files.
    pub(crate) fn name_sockets(&self, folder: &Path) -> Result<Vec<&str>> {
        let mut named = Vec::new();
        for disk in self.disks.iter().filter(|disk| disk.wire().is_some()) {
            let overlay = folder.join(&disk.file);
            // It may have been moved to a pool, and still names the socket here.
            if let Some(below) = disk.levels.first().filter(|_| overlay.exists()) {
                name_below(&overlay, below)?;
                named.push(disk.file.as_str());
            }
        }
        Ok(named)
    }

    /// Connects this process to the sources on other hosts, under the names in the overlays.
    pub(crate) fn connect(&self) -> Result<()> {
        (self.disks.iter().filter_map(Disk::wire)).try_for_each(whole::connect)
    }

    /// Fails if the source has changed since the VM was converted.
    pub(crate) fn check_source(&self, folder: &Path) -> Result<()> {
        let mut blockers: Vec<Blocker> = Vec::new();
        let here = (self.disks.iter().flat_map(Disk::files))
            .map(|was| (was.path.display().to_string(), changed(was)));
        let there = (self.disks.iter().filter_map(Disk::wire))
            .map(|wire| (wire.url.clone(), whole::changed(wire)));
        for (shown, what) in here.chain(there) {
            let Some(what) = what? else { continue };
            let reason = format!("{shown}: {what}");
            if blockers.iter().all(|known| known.reason != reason) {
                blockers.push(Blocker::new("source-changed", reason, remedy(folder)));
            }
        }
        if blockers.is_empty() {
            return self.connect();
        }
        Err(Error::refused(
            "the source was changed since this VM was converted, and its disks are overlays on it",
            blockers,
        ))
    }

    /// The overlay of disk `i`, which is at `path`, with its whole chain.
    pub(crate) fn image(&self, path: &Path) -> Result<Image> {
        Ok(Image::open_info(path, Some("qcow2"), &self.files())?)
    }
}

fn remedy(folder: &Path) -> String {
    let folder = shell_word(&folder.display().to_string());
    format!(
        "restore the files as they were (size, time and contents), or give this VM up and convert again: hyper2kvm release {folder}"
    )
}

/// The first difference, if there is one. A VM that runs from the file counts as a change.
fn changed(was: &Fingerprint) -> Result<Option<String>> {
    let opened = Held::open(&was.path).and_then(|held| {
        held.refuse_if_vmware_has_it()?;
        held.check_kernel(Use::Read)?;
        Ok(held)
    });
    match opened {
        Ok(held) => Ok(was.difference(&held.fingerprint())),
        Err(ImageError::NotFound { .. }) => Ok(Some("it is gone".to_owned())),
        Err(ImageError::InUse { .. }) => Ok(Some(
            "another program writes to it: is the VM running on its old host?".to_owned(),
        )),
        Err(error @ (ImageError::InKernel { .. } | ImageError::VmwareLock { .. })) => {
            Ok(Some(error.to_string()))
        }
        Err(error) => Err(error.into()),
    }
}

/// Further files that a disk at this path may name. They are those of the source, if its directory
/// is one of `convert --copy later`. Otherwise the list is empty.
pub(crate) fn allowed_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let Some(record) = Record::left(folder)? else {
        return Ok(Vec::new());
    };
    record.connect()?;
    Ok(record.files())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(source: &Path) -> Record {
        let held = Held::open(source).unwrap();
        Record::new(vec![Disk {
            file: "vm.qcow2".into(),
            virtual_size: 4 << 20,
            levels: vec![Level {
                format: "raw".into(),
                files: vec![held.fingerprint()],
                wire: None,
            }],
        }])
    }

    #[test]
    fn comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::load(dir.path()).unwrap(), None);
        let source = dir.path().join("disk.raw");
        std::fs::write(&source, vec![1; 4 << 20]).unwrap();
        let mut record = record(&source);
        record.save(dir.path()).unwrap();
        assert_eq!(Record::left(dir.path()).unwrap().as_ref(), Some(&record));
        assert_eq!(
            allowed_below(dir.path()).unwrap(),
            std::slice::from_ref(&source)
        );
        let backing = &backing(&record.disks[0].levels)[0];
        assert_eq!((&backing.path, backing.format.as_str()), (&source, "raw"));
        record.state = LaterState::Alone;
        record.save(dir.path()).unwrap();
        assert_eq!(Record::left(dir.path()).unwrap(), None);
        std::fs::write(dir.path().join(FILE_NAME), "{}").unwrap();
        assert!(Record::load(dir.path()).is_err());
    }

    #[test]
    fn a_changed_source_is_refused_with_the_remedy() {
        use std::os::unix::fs::FileExt;
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("disk.raw");
        let fresh = || {
            std::fs::write(&source, vec![1; 4 << 20]).unwrap();
            record(&source)
        };
        let open = || std::fs::File::options().write(true).open(&source).unwrap();
        let reason = |record: &Record| {
            let error = record.check_source(dir.path()).unwrap_err();
            assert_eq!(error.kind, crate::error::ErrorKind::Refused);
            assert!(error.blockers[0].remedy.contains("hyper2kvm release"));
            error.blockers[0].reason.clone()
        };
        let old = fresh();
        old.check_source(dir.path()).unwrap();
        open().set_len(5 << 20).unwrap();
        assert!(reason(&old).contains("4194304 bytes long and is 5242880"));

        let old = fresh();
        let file = open();
        let modified = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(b"x", 2 << 20).unwrap();
        file.set_modified(modified + std::time::Duration::from_secs(9))
            .unwrap();
        assert!(reason(&old).contains("9 s after"), "{}", reason(&old));

        // A writer that resets the modification time.
        let old = fresh();
        let file = open();
        let modified = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(b"x", 0).unwrap();
        file.set_modified(modified).unwrap();
        assert!(reason(&old).contains("header"));

        let old = fresh();
        std::fs::rename(&source, dir.path().join("elsewhere")).unwrap();
        assert!(reason(&old).contains("gone"));
        // A backup restored with its times is the same disk.
        std::fs::rename(dir.path().join("elsewhere"), &source).unwrap();
        old.check_source(dir.path()).unwrap();
    }
}
