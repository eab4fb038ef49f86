//! `convert --copy later`: nothing is copied. The overlays of the fix become the disks of the VM, on the
//! source's own files.

use std::path::{Path, PathBuf};

use crate::block::BlockWrite;
use crate::boot::access;
use crate::disk::chain::Image;
use crate::disk::export::Export;
use crate::domain::{Backing, DiskFormat};
use crate::error::{Blocker, Error, Result};
use crate::later::record;
use crate::later::{Record, WARNING, chain, holes};
use crate::report::Bytes;
use crate::tool::{self, qemu_img};
use crate::ui::{self, Ui};

use super::copy;
use super::machine::TargetDisk;
use super::output::OutputFolder;
use super::run::{Disks, Fixed, Job, point, stopped, work_file};
use crate::session::Source;
use crate::session::vm::VmDisks;

/// When the disks are copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Copying {
    #[default]
    Now,
    /// The VM starts on overlays, `pull` copies.
    Later,
}

/// A disk that is to stay on its source.
pub(super) struct Kept {
    /// An overlay of this run on top, or the source alone.
    pub(super) image: Image,
    pub(super) sector_size: u32,
    pub(super) system: bool,
    pub(super) boot_order: Option<u32>,
}

/// What the disk of a plan will be on; empty when it is copied.
pub(super) fn backing(job: &Job, image: &Image) -> Vec<Backing> {
    match (job.copying, chain::levels(image)) {
        (Copying::Later, Ok(levels)) => record::backing(&levels),
        _ => Vec::new(),
    }
}

/// The sources that cannot stay where they are.
pub(super) fn blockers(job: &Job, images: &[Image]) -> Vec<Blocker> {
    match job.copying {
        Copying::Now => Vec::new(),
        Copying::Later => (images.iter())
            .filter_map(|image| chain::levels(image).err())
            .map(|blocker| *blocker)
            .collect(),
    }
}

/// What the user must know, of a plan and of a result.
pub(super) fn warnings(job: &Job, images: &[Image]) -> Vec<String> {
    if job.copying == Copying::Now {
        return Vec::new();
    }
    let files: Vec<&Path> = images.iter().flat_map(Image::files).collect();
    let mut warnings = vec![WARNING.to_owned()];
    let user = tool::find("virsh").and_then(|_| access::qemu_user("qemu:///system"));
    let closed = user.and_then(|user| {
        let file = files.iter().find(|file| access::closed(file, &user))?;
        Some((user.name, file))
    });
    if let Some((user, file)) = closed {
        warnings.push(format!(
            "QEMU of the system's libvirt runs as {user} and cannot read {}: boot says what helps",
            file.display()
        ));
    }
    warnings
}

/// The disks of a Windows VM: the fixed overlays, and one for each other disk.
pub(super) fn keep_fixed(
    job: &Job,
    ui: &Ui,
    folder: &OutputFolder,
    disks: &VmDisks,
    mut fixed: Fixed,
) -> Result<Disks> {
    let mut kept = Vec::new();
    for (i, disk) in disks.iter().enumerate() {
        stopped()?;
        let image = match fixed.images.get(&disk.id) {
            Some(image) => image.clone(),
            None if job.trim => {
                let overlay = work_file(folder, &format!("overlay-{i}.qcow2"))?;
                let (image, trimmed) = copy::trimmed_overlay(disk, &overlay)?;
                fixed.trim.push(trimmed);
                holes::mark(&image)?;
                image
            }
            None => disk.image()?,
        };
        kept.push(Kept {
            image,
            sector_size: fixed.before.sector_size(disk.id),
            system: disks.is_system(disk.id),
            boot_order: disks.boot_order(disk.id),
        });
    }
    let (targets, bytes) = keep(job, ui, folder, kept)?;
    Ok(Disks {
        targets,
        bytes,
        fixed,
    })
}

/// Gives each disk its overlay under its final name, and records what it is on.
pub(super) fn keep(
    job: &Job,
    ui: &Ui,
    folder: &OutputFolder,
    disks: Vec<Kept>,
) -> Result<(Vec<TargetDisk>, Bytes)> {
    let (mut targets, mut records) = (Vec::new(), Vec::new());
    let mut bytes = Bytes::default();
    for (i, disk) in disks.into_iter().enumerate() {
        let file = copy::file_name(job, i);
        let path = folder.path().join(&file);
        let levels = chain::levels(&disk.image).map_err(|blocker| {
            Error::refused("the source cannot stay where it is", vec![*blocker])
        })?;
        let image = put(folder, &disk.image, &path, i)?;
        let backing = record::backing(&levels);
        if let Some(top) = backing.first() {
            qemu_img::set_backing(&path, Some((&top.path, &top.format)))
                .map_err(|e| Error::failed(format!("completing {}", path.display())).because(e))?;
        }
        point("kept")?;
        let left = holes::left(&image)?;
        let size_bytes = image.virtual_size();
        bytes.virtual_size = bytes.virtual_size.saturating_add(size_bytes);
        bytes.left = bytes.left.saturating_add(left);
        bytes.written = bytes.written.saturating_add(allocated(&path)?);
        records.push(record::Disk {
            file: file.clone(),
            virtual_size: size_bytes,
            levels,
        });
        targets.push(TargetDisk {
            path: folder.target().join(&file),
            format: DiskFormat::Qcow2,
            sector_size: disk.sector_size,
            system: disk.system,
            boot_order: disk.boot_order,
            size_bytes,
            backing,
        });
    }
    bytes.skipped = bytes.virtual_size.saturating_sub(bytes.left);
    Record::new(records).save(folder.path())?;
    ui.status(
        "Leaving",
        &format!(
            "{} of {} on the source",
            ui::bytes(bytes.left),
            ui::bytes(bytes.virtual_size)
        ),
    );
    Ok((targets, bytes))
}

/// One overlay over the source, at `path`.
fn put(folder: &OutputFolder, image: &Image, path: &Path, i: usize) -> Result<Image> {
    let below = image.without_overlays();
    let overlays: Vec<PathBuf> = (image.levels().iter())
        .filter(|level| level.scratch)
        .map(|level| level.path.clone())
        .collect();
    let overlay = match overlays.as_slice() {
        [] => {
            let new = work_file(folder, &format!("overlay-{i}.qcow2"))?;
            let export = Export::<dyn BlockWrite>::open_overlay(&below, &new)?;
            let image = export.image().clone();
            export.close()?;
            holes::mark(&image)?;
            new
        }
        [only] => only.clone(),
        [.., lowest] => {
            let mut rest = image.clone();
            for _ in 1..overlays.len() {
                qemu_img::commit(&rest.spec_to_commit(), &mut |_| {})
                    .map_err(|e| Error::failed("merging two overlays").because(e))?;
                rest = rest.without_top();
            }
            lowest.clone()
        }
    };
    std::fs::rename(&overlay, path).map_err(|e| {
        Error::failed(format!(
            "moving {} to {}",
            overlay.display(),
            path.display()
        ))
        .because(e)
    })?;
    Ok(below.with_overlay(path)?)
}

fn allocated(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata(path)
        .map_err(|e| Error::failed(format!("looking at {}", path.display())).because(e))?;
    Ok(found.blocks().saturating_mul(512))
}

/// The images of the disks as the source has them.
pub(super) fn images(disks: &[Source]) -> Result<Vec<Image>> {
    disks.iter().map(Source::image).collect()
}
