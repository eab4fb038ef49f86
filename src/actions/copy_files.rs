//! Copies files from the driver source to the guest, after creating the directories.

use serde::Serialize;

use crate::guest::GuestPath;
use crate::inspect::Hives;
use crate::registry::HiveError;
use crate::ui::{bytes, count};

use super::act::{Act, Converted, Kind, OVERLAY_CLUSTER, Work, Writes, in_overlay};
use super::change::{Change, FileFacts};
use super::error::{ActionError, Result};
use super::preview::Preview;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CopyFiles {
    pub id: String,
    pub title: String,
    pub folders: Vec<GuestPath>,
    pub files: Vec<FileCopy>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileCopy {
    pub to: GuestPath,
    /// Path in the driver source.
    pub from: String,
    pub size: u64,
    /// Whether a different file of that name exists now.
    pub replaces: bool,
}

impl Act for CopyFiles {
    fn id(&self) -> &str {
        &self.id
    }

    fn describe(&self) -> String {
        let size = bytes(self.files.iter().map(|f| f.size).sum());
        let files = count(self.files.len(), "file");
        let mut text = format!("{}: {files} ({size})", self.title);
        if !self.folders.is_empty() {
            text += &format!(", {}", count(self.folders.len(), "new directory"));
        }
        text
    }

    fn writes<'a>(&'a self, _: &'a Hives) -> Writes<'a> {
        Writes {
            folders: Some(self.folders.len()),
            files: self.files.iter().map(|f| (&f.to, f.size)).collect(),
            originals: 0,
        }
    }

    fn overlay_bytes(&self) -> u64 {
        let files = self.files.iter().map(|f| in_overlay(f.size)).sum::<u64>();
        files + self.folders.len() as u64 * OVERLAY_CLUSTER
    }

    fn foresee<'a>(&'a self, preview: &mut Preview<'a>) -> Result<(), HiveError> {
        for file in &self.files {
            preview.of_driver_source(&file.to, &file.from, file.size);
        }
        Ok(())
    }

    fn apply(&self, work: &mut Work<'_>) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        for folder in &self.folders {
            work.writer.create_dir(work.volume, folder)?;
            changes.push(Change::folder(folder));
        }
        for file in &self.files {
            let contents = work.driver_source.read(&file.from).map_err(|source| {
                ActionError::DriverSource {
                    path: file.from.clone(),
                    source,
                }
            })?;
            let kept = match file.replaces {
                true => Some(work.saver.keep(work.before, work.volume, &file.to)?),
                false => None,
            };
            work.writer.write_file(work.volume, &file.to, &contents)?;
            changes.push(Change::file(&file.to, kept, FileFacts::of(&contents)));
        }
        Ok(changes)
    }

    fn fail_point(&self) -> Option<&'static str> {
        Some("file-written")
    }

    fn kind(&self) -> Kind {
        Kind::Files
    }

    fn verify(&self, after: &Converted<'_>) -> Result<usize, String> {
        for file in &self.files {
            let wanted = after.driver_source.read(&file.from);
            let wanted = wanted.map_err(|e| format!("{}: {e}", file.from))?;
            let found = after
                .guest
                .read(after.volume, &file.to, wanted.len() as u64)
                .map_err(|e| format!("{}: {e}", file.to))?;
            if found != wanted {
                return Err(format!("{} differs from {}", file.to, file.from));
            }
        }
        Ok(self.files.len())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::actions::Saver;
    use crate::drivers::driver_source::Memory;
    use crate::guest::{Extent, GuestWrite, Result, VolumeId};
    use crate::inspect::fake::FakeGuest;

    /// Records everything written to it.
    #[derive(Clone, Default)]
    struct Recorder(Arc<Mutex<Vec<Vec<u8>>>>);

    impl GuestWrite for Recorder {
        fn create_dir(&mut self, _: VolumeId, _: &GuestPath) -> Result<()> {
            unreachable!()
        }

        fn write_file(&mut self, _: VolumeId, _: &GuestPath, contents: &[u8]) -> Result<()> {
            self.0.lock().unwrap().push(contents.to_vec());
            Ok(())
        }

        fn patch_file(&mut self, _: VolumeId, _: &GuestPath, _: u64, _: &[Extent]) -> Result<()> {
            unreachable!()
        }

        fn patch_boot_sector(&mut self, _: VolumeId, _: &[Extent]) -> Result<()> {
            unreachable!()
        }

        fn remove_file(&mut self, _: VolumeId, _: &GuestPath) -> Result<()> {
            unreachable!()
        }

        fn remove_dir(&mut self, _: VolumeId, _: &GuestPath) -> Result<()> {
            unreachable!()
        }

        fn close(self: Box<Self>) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_file_that_is_replaced_is_saved_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut before = FakeGuest::default();
        before.file(1, "Windows/old.sys", b"old".to_vec());
        let copy = |name: &str, replaces| FileCopy {
            to: GuestPath::parse(&format!("Windows\\{name}")).unwrap(),
            from: "new.sys".into(),
            size: 3,
            replaces,
        };
        let action = CopyFiles {
            id: "files".into(),
            title: "copy".into(),
            folders: vec![],
            files: vec![copy("old.sys", true), copy("other.sys", false)],
        };
        let recorder = Recorder::default();
        let mut work = Work {
            volume: VolumeId::new(1),
            driver_source: &Memory::new([("new.sys".to_string(), b"new".to_vec())]),
            before: &before,
            writer: Box::new(recorder.clone()),
            saver: Saver {
                folder: dir.path().to_path_buf(),
                durably: true,
            },
            hives: crate::actions::merge::Merges::default(),
            walking: Vec::new(),
        };
        let changes = action.apply(&mut work).unwrap();
        assert_eq!(*recorder.0.lock().unwrap(), [b"new", b"new"]);
        let backup = changes[0].backup.as_deref().unwrap();
        let saved = std::fs::read(dir.path().join(backup)).unwrap();
        assert_eq!(saved, b"old");
        assert_eq!(changes[1].backup, None);
    }
}
