//! `--in-place`: commits the proved overlay to the source disk, and takes it back when that fails.

use std::path::{Path, PathBuf};

use crate::disk::block::{BlockRead, BlockWrite};
use crate::disk::chain::Image;
use crate::disk::export::Export;
use crate::disk::partition;
use crate::domain::DiskFormat;
use crate::error::{Error, ErrorKind, Result};
use crate::fix::commit;
use crate::fix::journal::{Journal, State};
use crate::report::Bytes;
use crate::tool::qemu_img;
use crate::ui::Ui;

use super::machine::TargetDisk;
use super::run::{Disks, Fixed, stopped};
use super::session::first;
use super::vm::VmDisks;

/// Commits the proved overlay to the source disk.
pub(super) fn in_place(ui: &Ui, image: &Image, disks: &VmDisks, mut fixed: Fixed) -> Result<Disks> {
    let mut targets = Vec::new();
    // Those that stay as they are belong to the machine all the same.
    for disk in disks.iter() {
        let image = disk.image()?;
        targets.push(TargetDisk {
            path: absolute(image.path())?,
            format: in_place_format(&image)?,
            sector_size: fixed.before.sector_size(disk.id),
            system: disks.is_system(disk.id),
            boot_order: disks.boot_order(disk.id),
            size_bytes: image.virtual_size(),
        });
    }
    let overlay = disks
        .first()
        .and_then(|disk| fixed.images.get(&disk.id))
        .ok_or_else(|| Error::failed("the disk with Windows has no overlay"))?;
    let ranges = qemu_img::allocated_ranges(&overlay.spec())
        .map_err(|e| Error::failed("reading the map of the overlay").because(e))?;
    let failed = |doing: &str| {
        let doing = doing.to_string();
        move |e: commit::CommitError| Error::failed(doing).because(e)
    };
    let before = Export::<dyn BlockRead>::open_readonly(image)?;
    let after = Export::<dyn BlockRead>::open_readonly(overlay)?;
    let changed = commit::prepare(
        &mut fixed.journal,
        before.disk().as_ref(),
        after.disk().as_ref(),
        &ranges,
    )
    .map_err(failed(
        "saving the blocks to be changed; the disk was not changed",
    ))?;
    after.close()?;
    before.close()?;
    stopped()?;
    // Before the first write: then there is nothing to take back.
    first(disks)?.opened.check_unchanged()?;
    ui.status(
        "Committing",
        &format!(
            "{} to {}",
            crate::ui::bytes(changed),
            image.path().display()
        ),
    );
    // Else not even opened for writing: QEMU would touch the header of a qcow2.
    if changed != 0
        && let Err(error) = write_to_source(image, &mut fixed.journal)
    {
        return Err(roll_back_after(image, &mut fixed.journal, error));
    }
    Ok(Disks {
        targets,
        bytes: Bytes {
            virtual_size: image.virtual_size(),
            read: 0,
            written: changed,
            skipped: image.virtual_size().saturating_sub(changed),
        },
        fixed,
    })
}

pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|e| Error::failed(format!("{} has no absolute path", path.display())).because(e))
}

/// What the partition table of a disk without Windows was written for; 512 where there is none.
pub(super) fn data_sector_size(image: &Image) -> Result<u32> {
    let export = Export::<dyn BlockRead>::open_readonly(image)?;
    let layout = partition::read_layout(export.disk().as_ref());
    export.close()?;
    Ok(layout.map_or(512, |layout| layout.sector_size))
}

/// The formats KVM runs a machine from; others have to be converted.
pub(super) fn in_place_format(image: &Image) -> Result<DiskFormat> {
    match image.format().driver() {
        "qcow2" => Ok(DiskFormat::Qcow2),
        "raw" => Ok(DiskFormat::Raw),
        other => Err(Error::usage(format!(
            "--in-place works on qcow2 and raw disks, and this is {other}"
        ))
        .hint("convert without --in-place: the source is not changed then")),
    }
}

/// Commits, unless the disk is no longer what was read.
pub(super) fn write_to_source(image: &Image, journal: &mut Journal) -> Result<()> {
    image.check_unchanged()?;
    image.check_names()?;
    image.will_be_written();
    let export = Export::<dyn BlockWrite>::open_writable(image)?;
    commit::commit(journal, export.disk().as_ref())
        .map_err(|e| Error::failed("writing the disk").because(e))?;
    Ok(export.close()?)
}

/// After a failed commit: restores the disk and says which of the two it is.
pub(super) fn roll_back_after(image: &Image, journal: &mut Journal, error: Error) -> Error {
    if journal.doc.state == State::Verified {
        // The commit failed before it wrote.
        return error;
    }
    let restored = Export::<dyn BlockWrite>::open_writable(image)
        .map_err(Error::from)
        .and_then(|export| {
            commit::rollback(journal, export.disk().as_ref(), true)
                .map_err(|e| Error::failed("rolling back").because(e))?;
            Ok(export.close()?)
        });
    match restored {
        Ok(()) if error.is_interrupted() => {
            Error::new(ErrorKind::Interrupted, "interrupted; the disk was restored")
        }
        Ok(()) => Error::new(
            ErrorKind::RolledBack,
            "the fix failed and the disk was restored",
        )
        .because(error),
        Err(second) => Error::new(
            ErrorKind::NotRolledBack,
            format!("the fix failed and the disk could NOT be restored: {second}"),
        )
        .because(error)
        .hint(format!(
            "keep {} and run: hyper2kvm rollback --journal {}",
            journal.folder().display(),
            journal.path().display()
        )),
    }
}
