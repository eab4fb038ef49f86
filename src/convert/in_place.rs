//! `--in-place`: commits the verified overlays to the source disks, and rolls back if that fails.

use std::path::{Path, PathBuf};

use crate::block::{BlockRead, BlockWrite};
use crate::disk::chain::Image;
use crate::disk::export::{self, Export};
use crate::disk::partition;
use crate::error::{Error, ErrorKind, Result};
use crate::fix::commit::{self, Changing};
use crate::fix::journal::{DiskRef, Journal, JournalState};
use crate::report::Bytes;
use crate::text;
use crate::tool::qemu_img;

use super::disks::{Disk, in_place_format};
use super::run::Run;
use super::steps::{Disks, Fixed, stopped};
use crate::session::vm::VmDisks;

/// The disks that are changed in place, the one with Windows first.
pub(super) fn journal_disks(disks: &VmDisks, in_place: bool) -> Result<(DiskRef, Vec<DiskRef>)> {
    let of = |image: &Image| DiskRef {
        path: text::called_path(image.path()),
        format: image.format().driver().to_string(),
        size_bytes: image.virtual_size(),
        in_place,
    };
    let system = disks.system()?;
    let others = disks.iter().filter(|disk| disk.id != system.id);
    let others = others.filter(|disk| in_place && disks.is_changed(disk.id));
    let others = others.map(|disk| of(&disk.image)).collect();
    Ok((of(&system.image), others))
}

/// Commits the verified overlays to the source disks.
pub(super) fn in_place(run: &Run<'_>, mut fixed: Fixed) -> Result<Disks> {
    let Run { job, ui, disks, .. } = run;
    let mut targets = Vec::new();
    // Disks that are not changed are still disks of the VM.
    for disk in disks.iter() {
        let (path, format) = (absolute(disk.image.path())?, in_place_format(&disk.image)?);
        let disk = Disk::new(disks, disk.id, disk.image.clone(), &fixed.before);
        targets.push(disk.at(path, format, Vec::new()));
    }
    let changed = save_undo_logs(disks, &mut fixed)?;
    stopped()?;
    // Checked before the first write, when there is nothing to roll back yet.
    job.source.access.opened.check_unchanged()?;
    let images = changed_images(disks, &fixed.journal)?;
    let names: Vec<_> = (images.iter())
        .map(|image| image.path().display().to_string())
        .collect();
    if !images.is_empty() {
        let (size, names) = (crate::ui::bytes(changed), names.join(" and "));
        ui.status("Committing", &format!("{size} to {names}"));
    }
    // A disk without changes is not even opened for writing: QEMU would update the header of a
    // qcow2.
    if !images.is_empty()
        && let Err(error) = write_to_sources(&images, &mut fixed.journal)
    {
        return Err(roll_back_after(disks, &mut fixed.journal, error));
    }
    let may_change = disks.iter().filter(|disk| disks.is_changed(disk.id));
    let virtual_size: u64 = may_change.map(|disk| disk.image.virtual_size()).sum();
    Ok(Disks {
        targets,
        bytes: Bytes {
            virtual_size,
            written: changed,
            skipped: virtual_size.saturating_sub(changed),
            ..Bytes::default()
        },
        fixed,
    })
}

/// Saves the old and the new bytes of every range that the overlays change. Returns their number.
pub(super) fn save_undo_logs(disks: &VmDisks, fixed: &mut Fixed) -> Result<u64> {
    let mut opened = Vec::new();
    for disk in disks.iter().filter(|disk| disks.is_changed(disk.id)) {
        let overlay = (fixed.images.get(&disk.id))
            .ok_or_else(|| Error::failed(format!("disk {} has no overlay", disk.id.number())))?;
        let ranges = own_ranges(overlay)?;
        let before = Export::<dyn BlockRead>::open_readonly(&disk.image)?;
        let after = Export::<dyn BlockRead>::open_readonly(overlay)?;
        opened.push((before, after, ranges));
    }
    let blocks: Vec<_> = (opened.iter())
        .map(|(before, after, ranges)| (before.disk(), after.disk(), ranges))
        .collect();
    let changing: Vec<_> = (blocks.iter())
        .map(|(before, after, ranges)| Changing {
            before: before.as_ref(),
            after: after.as_ref(),
            ranges,
        })
        .collect();
    let changed = commit::prepare(&mut fixed.journal, &changing).map_err(|e| {
        Error::failed("saving the blocks to be changed; nothing was changed").because(e)
    })?;
    drop(changing);
    drop(blocks);
    for (before, after, _) in opened {
        after.close()?;
        before.close()?;
    }
    Ok(changed)
}

/// The ranges (offset, length) that an overlay itself contains, without starting a program if possible.
fn own_ranges(overlay: &Image) -> Result<Vec<(u64, u64)>> {
    let failed = || Error::failed("reading the map of the overlay");
    match export::own_ranges(overlay) {
        Some(own) => {
            let own = own.map_err(|e| failed().because(e))?;
            Ok(own
                .iter()
                .map(|range| (range.start, range.end - range.start))
                .collect())
        }
        None => qemu_img::allocated_ranges(&overlay.spec()).map_err(|e| failed().because(e)),
    }
}

/// The images of the disks that the journal changes, in the order of the journal.
fn changed_images(disks: &VmDisks, journal: &Journal) -> Result<Vec<Image>> {
    let mut images = Vec::new();
    for (changed, _) in journal.doc.changed() {
        let mut all = disks.iter().map(|disk| &disk.image);
        let found = all.find(|image| image.path() == changed.path);
        images.push(found.cloned().ok_or_else(|| {
            let path = changed.path.display();
            Error::failed(format!("{path} is in the journal and no disk of the VM"))
        })?);
    }
    Ok(images)
}

pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|e| Error::failed(format!("{} has no absolute path", path.display())).because(e))
}

/// The sector size for which the partition table of a disk without Windows was written; 512 if
/// there is none.
pub(super) fn data_sector_size(image: &Image) -> Result<u32> {
    let export = Export::<dyn BlockRead>::open_readonly(image)?;
    let layout = partition::read_layout(export.disk().as_ref());
    export.close()?;
    Ok(layout.map_or(512, |layout| layout.sector_size))
}

/// Commits the changes, unless a disk has changed since it was read.
fn write_to_sources(images: &[Image], journal: &mut Journal) -> Result<()> {
    for image in images {
        image.check_unchanged()?;
        image.check_names()?;
    }
    let exports = open_for_writing(images)?;
    let blocks: Vec<_> = exports.iter().map(Export::disk).collect();
    let blocks: Vec<_> = blocks.iter().map(AsRef::as_ref).collect();
    commit::commit(journal, &blocks).map_err(|e| Error::failed("writing the disk").because(e))?;
    close_all(exports)
}

fn open_for_writing(images: &[Image]) -> Result<Vec<Export<dyn BlockWrite>>> {
    let mut exports = Vec::new();
    for image in images {
        image.will_be_written();
        exports.push(Export::<dyn BlockWrite>::open_writable(image)?);
    }
    Ok(exports)
}

fn close_all(exports: Vec<Export<dyn BlockWrite>>) -> Result<()> {
    for export in exports {
        export.close()?;
    }
    Ok(())
}

/// Restores the old blocks on all images, in the order of the journal.
pub fn restore(images: &[Image], journal: &mut Journal, force: bool) -> Result<u64, RestoreError> {
    let exports = open_for_writing(images)?;
    let blocks: Vec<_> = exports.iter().map(Export::disk).collect();
    let blocks: Vec<_> = blocks.iter().map(AsRef::as_ref).collect();
    let restored = commit::rollback(journal, &blocks, force);
    let closed = close_all(exports);
    let restored = restored?;
    closed?;
    Ok(restored)
}

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Rollback(#[from] commit::CommitError),
    #[error(transparent)]
    Other(#[from] Error),
}

/// Rolls back after a failed commit. The error states whether the disks were restored.
pub(super) fn roll_back_after(disks: &VmDisks, journal: &mut Journal, error: Error) -> Error {
    if journal.doc.state == JournalState::Verified {
        // The commit failed before it wrote.
        return error;
    }
    let restored = changed_images(disks, journal)
        .map_err(RestoreError::from)
        .and_then(|images| restore(&images, journal, true));
    rolled_back(journal, error, restored)
}

/// The error of a commit that failed, with the outcome of its rollback.
fn rolled_back(journal: &Journal, error: Error, restored: Result<u64, RestoreError>) -> Error {
    let it = match journal.doc.changed().len() {
        0 | 1 => "the disk was",
        _ => "the disks were",
    };
    match restored {
        Ok(_) if error.is_interrupted() => Error::new(
            ErrorKind::Interrupted,
            format!("interrupted; {it} restored"),
        ),
        Ok(_) => Error::new(
            ErrorKind::RolledBack,
            format!("the fix failed and {it} restored"),
        )
        .because(error),
        Err(second) => Error::new(
            ErrorKind::NotRolledBack,
            format!("the fix failed and {it} NOT restored: {second}"),
        )
        .because(error)
        .hint(format!(
            "keep {} and run: hyper2kvm rollback --journal {}",
            journal.folder().display(),
            journal.path().display()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::testing::job;
    use crate::fix::journal::{UndoLog, UndoRange};
    use crate::guest::DiskId;

    /// Three raw disks; `system` and `boot` are their numbers in the source.
    fn disks(folder: &Path, system: usize, boot: usize) -> VmDisks {
        let paths: Vec<_> = (0..3u64).map(|i| folder.join(format!("{i}.raw"))).collect();
        for (i, path) in paths.iter().enumerate() {
            std::fs::write(path, vec![0; (i + 1) << 20]).unwrap();
        }
        let disks = job(&paths, folder).source.disks(folder).unwrap();
        let id = |i| DiskId::nth(i, 3);
        let mut list = disks.to_vec();
        list.sort_by_key(|disk| disk.id != id(system));
        VmDisks::with_roles(list, id(system), id(boot))
    }

    #[test]
    fn the_journal_names_the_disk_with_windows_and_in_place_that_with_its_boot_files() {
        let dir = tempfile::tempdir().unwrap();
        let name = |i: u64| dir.path().join(format!("{i}.raw"));
        for (system, boot, in_place, others) in [
            (0, 0, true, &[][..]),
            (1, 0, true, &[0]),
            (1, 2, true, &[2]),
            (1, 0, false, &[]),
        ] {
            let disks = disks(dir.path(), system, boot);
            let (first, more) = journal_disks(&disks, in_place).unwrap();
            let at = format!("{system} {boot} {in_place}");
            assert_eq!(first.path, name(system as u64), "{at}");
            assert_eq!(
                (first.size_bytes, first.format.as_str()),
                ((system as u64 + 1) << 20, "raw")
            );
            assert!(
                more.iter()
                    .chain([&first])
                    .all(|disk| disk.in_place == in_place),
                "{at}"
            );
            let more: Vec<_> = more.into_iter().map(|disk| disk.path).collect();
            assert_eq!(
                more,
                others.iter().map(|i| name(*i)).collect::<Vec<_>>(),
                "{at}"
            );
        }
    }

    fn journal(folder: &Path, disks: &VmDisks) -> Journal {
        let (first, more) = journal_disks(disks, true).unwrap();
        let mut journal = Journal::create(folder, first, more, vec![]).unwrap();
        let log = UndoLog {
            before: commit::BEFORE_FILE.into(),
            after: commit::AFTER_FILE.into(),
            ranges: vec![UndoRange {
                offset: 0,
                len: 512,
                before_sha256: String::new(),
                after_sha256: String::new(),
            }],
        };
        journal.doc.set_undo(vec![Some(log.clone()), Some(log)]);
        journal
    }

    #[test]
    fn the_disks_that_are_written_are_those_of_the_journal_in_its_order() {
        let dir = tempfile::tempdir().unwrap();
        let disks = disks(dir.path(), 1, 0);
        let mut journal = journal(dir.path(), &disks);
        let paths = |journal: &Journal| {
            let images = changed_images(&disks, journal)?;
            Ok::<_, Error>(
                images
                    .iter()
                    .map(|i| i.path().to_path_buf())
                    .collect::<Vec<_>>(),
            )
        };
        let names = |list: [u64; 2]| list.map(|i| dir.path().join(format!("{i}.raw")));
        assert_eq!(paths(&journal).unwrap(), names([1, 0]));
        // One of them did not change.
        journal.doc.undo = None;
        assert_eq!(paths(&journal).unwrap(), names([0, 0])[..1]);
        for other in ["/elsewhere.raw", "/elsewhere/0.raw"] {
            journal.doc.others[0].disk.path = other.into();
            let error = paths(&journal).unwrap_err();
            assert!(error.message.contains(other), "{error}");
        }
    }

    #[test]
    fn a_commit_that_failed_is_undone_or_it_is_said_how() {
        let dir = tempfile::tempdir().unwrap();
        let disks = disks(dir.path(), 1, 0);
        let mut journal = journal(dir.path(), &disks);
        // Nothing was written yet.
        journal.doc.state = JournalState::Verified;
        let error = roll_back_after(&disks, &mut journal, Error::usage("why"));
        assert_eq!(
            (error.kind, error.message.as_str()),
            (ErrorKind::Usage, "why")
        );
        // The saved blocks are gone.
        for state in [JournalState::Committing, JournalState::Committed] {
            journal.doc.state = state;
            let error = roll_back_after(&disks, &mut journal, Error::failed("why"));
            assert_eq!(error.kind, ErrorKind::NotRolledBack, "{state:?}");
            assert!(error.message.contains("disks were NOT restored"), "{error}");
            let path = journal.path().display().to_string();
            let hint = &error.hints[0];
            assert!(
                hint.contains("rollback --journal") && hint.contains(&path),
                "{hint}"
            );
            assert!(
                error.causes().iter().any(|cause| cause.contains("why")),
                "{error:?}"
            );
        }
    }

    #[test]
    fn what_was_rolled_back_is_told_by_its_kind_and_an_interruption_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        let disks = disks(dir.path(), 1, 0);
        let mut journal = journal(dir.path(), &disks);
        let stop = || Error::new(ErrorKind::Interrupted, "stop");
        let lost = || Err(commit::CommitError::NothingToUndo.into());
        for (disks, it) in [(2, "the disks were"), (1, "the disk was")] {
            for (error, restored, kind, says) in [
                (
                    Error::failed("why"),
                    Ok(5),
                    ErrorKind::RolledBack,
                    "the fix failed and",
                ),
                (stop(), Ok(5), ErrorKind::Interrupted, "interrupted;"),
                (
                    stop(),
                    lost(),
                    ErrorKind::NotRolledBack,
                    "the fix failed and",
                ),
                (
                    Error::failed("why"),
                    lost(),
                    ErrorKind::NotRolledBack,
                    "the fix failed and",
                ),
            ] {
                let is_lost = restored.is_err();
                let error = rolled_back(&journal, error, restored);
                assert_eq!(error.kind, kind, "{error}");
                assert!(
                    error.message.starts_with(&format!("{says} {it} ")),
                    "{error}"
                );
                assert_eq!(error.message.contains("NOT restored"), is_lost, "{error}");
                assert_eq!(error.hints.len(), usize::from(is_lost));
            }
            assert_eq!(journal.doc.changed().len(), disks);
            journal.doc.undo = None;
        }
    }

    /// The sectors of a disk are those for which its table was written.
    #[test]
    fn a_disk_has_the_sectors_of_its_partition_table() {
        use crate::demo::{GuestSpec, WinVersion, guest};
        let dir = tempfile::tempdir().unwrap();
        let sectors = |name: &str| {
            let image = Image::open_info(&dir.path().join(name), Some("raw"), &[]).unwrap();
            data_sector_size(&image).unwrap()
        };
        for sector_size in [512, 4096] {
            let spec = GuestSpec {
                sector_size,
                ..GuestSpec::new(WinVersion::Win10)
            };
            let name = format!("{sector_size}.raw");
            guest::create_table(&spec, &dir.path().join(&name)).unwrap();
            assert_eq!(sectors(&name), sector_size);
        }
        std::fs::write(dir.path().join("none.raw"), vec![0; 1 << 20]).unwrap();
        assert_eq!(sectors("none.raw"), 512);
    }

    /// The result would be a mixture of what was read and what is there.
    #[test]
    fn a_disk_that_is_another_than_was_read_is_not_written() {
        for (which, replaced) in [(0, false), (1, false), (0, true), (1, true)] {
            another_is_not_written(which, replaced);
        }
    }

    /// `replaced`: another file has its name.
    fn another_is_not_written(which: usize, replaced: bool) {
        let dir = tempfile::tempdir().unwrap();
        let disks = disks(dir.path(), 1, 0);
        let mut journal = journal(dir.path(), &disks);
        let images = changed_images(&disks, &journal).unwrap();
        let path = images[which].path().to_path_buf();
        let len = std::fs::read(&path).unwrap().len();
        if replaced {
            std::fs::rename(&path, path.with_extension("old")).unwrap();
        }
        std::fs::write(&path, vec![1; len]).unwrap();
        let error = write_to_sources(&images, &mut journal).unwrap_err();
        let said = error.to_string();
        let named = said.contains(path.to_str().unwrap());
        assert!(named && (said.contains("changed") || replaced), "{said}");
        assert_eq!(journal.doc.state, JournalState::Planned);
    }
}
