//! `later.json`: what the disks of an output directory are on, and how the source looked.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::disk::hold::{Fingerprint, Held, Use};
use crate::disk::{Image, ImageError};
use crate::domain::Backing;
use crate::error::{Blocker, Error, Result};
use crate::fix::journal::write_durably;
use crate::fix::trusted;
use crate::text::shell_word;

pub(crate) const FILE_NAME: &str = "later.json";
const SCHEMA: &str = "hyper2kvm/later/1";

/// Whether the disks need the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    /// They are overlays on it.
    Left,
    /// Everything was pulled.
    Alone,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) schema: String,
    pub(crate) version: String,
    pub(crate) state: State,
    /// In the order of `outputs.disks` in the report.
    pub(crate) disks: Vec<Disk>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Disk {
    /// The overlay's name in the output directory.
    pub(crate) file: String,
    pub(crate) virtual_size: u64,
    /// What it is on, from the top.
    pub(crate) levels: Vec<Level>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Level {
    pub(crate) format: String,
    /// The image, its extents, its data file.
    pub(crate) files: Vec<Fingerprint>,
}

/// A chain as the domain XML names it.
pub(crate) fn backing(levels: &[Level]) -> Vec<Backing> {
    let named = |level: &Level| {
        Some(Backing {
            path: level.files.first()?.path.clone(),
            format: level.format.clone(),
        })
    };
    levels.iter().filter_map(named).collect()
}

impl Disk {
    pub(crate) fn backing(&self) -> Vec<Backing> {
        backing(&self.levels)
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
            state: State::Left,
            disks,
        }
    }

    /// The record of a directory whose disks need the source; `None` for any other.
    pub(crate) fn left(folder: &Path) -> Result<Option<Self>> {
        Ok(Self::load(folder)?.filter(|record| record.state == State::Left))
    }

    pub(crate) fn load(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FILE_NAME);
        // It names what QEMU is to open.
        let text = match trusted::read(&path) {
            Err(e) if e.is_missing() => return Ok(None),
            text => text?,
        };
        serde_json::from_slice(&text).map(Some).map_err(|e| {
            Error::failed(format!("{} is not understood", path.display()))
                .because(e)
                .hint("convert again into another directory; the source is untouched")
        })
    }

    /// Durable before it returns.
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

    /// Refuses a source that is not what it was when the VM was converted.
    pub(crate) fn check_source(&self, folder: &Path) -> Result<()> {
        let mut blockers: Vec<Blocker> = Vec::new();
        for was in self.disks.iter().flat_map(Disk::files) {
            let Some(what) = changed(was)? else { continue };
            let reason = format!("{}: {what}", was.path.display());
            if blockers.iter().all(|known| known.reason != reason) {
                blockers.push(Blocker::new("source-changed", reason, remedy(folder)));
            }
        }
        if blockers.is_empty() {
            return Ok(());
        }
        Err(Error::refused(
            "the source was changed since this VM was converted, and its disks are overlays on it",
            blockers,
        ))
    }

    /// The overlay of disk `i`, which is at `path`, with everything it is on.
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

/// What is different, when something is. A VM that runs from the file is as good as a change.
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

/// What else a disk at this path may stand on: the files of the source, where its directory is one of
/// `convert --copy later`. An empty list for any other.
pub(crate) fn allowed_below(folder: &Path) -> Result<Vec<PathBuf>> {
    Ok(Record::left(folder)?.map_or_else(Vec::new, |record| record.files()))
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
        let backing = &record.disks[0].backing()[0];
        assert_eq!((&backing.path, backing.format.as_str()), (&source, "raw"));
        record.state = State::Alone;
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

        // A writer that hides its traces.
        let old = fresh();
        let file = open();
        let modified = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(b"x", 0).unwrap();
        file.set_modified(modified).unwrap();
        assert!(reason(&old).contains("header"));

        let old = fresh();
        std::fs::rename(&source, dir.path().join("elsewhere")).unwrap();
        assert!(reason(&old).contains("gone"));
        // A backup that brings it back with its times is the same disk.
        std::fs::rename(dir.path().join("elsewhere"), &source).unwrap();
        old.check_source(dir.path()).unwrap();
    }
}
