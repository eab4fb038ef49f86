//! `convert --copy later`: nothing is copied. The overlays of the fix become the disks of the VM
//! and stay on the source's own files.

use std::path::{Path, PathBuf};

use crate::block::BlockWrite;
use crate::boot::access;
use crate::disk::chain::Image;
use crate::disk::export::Export;
use crate::disk::hold::Held;
use crate::domain::{self, Backing, DiskFormat};
use crate::error::{Blocker, Error, Result};
use crate::later::record;
use crate::later::record::Level;
use crate::later::{self, Record, WARNING, chain, holes, wire};
use crate::report::Bytes;
use crate::tool::{self, qemu_img};
use crate::ui;

use super::copy;
use super::disks::Disk;
use super::job::{Copying, Job};
use super::output::OutputFolder;
use super::output::work_file;
use super::run::Run;
use super::steps::{Disks, Fixed, point, stopped};
use crate::session::vm::VmDisks;

/// The backing file of the disk whose overlay is at `path`; empty if the disk is copied.
pub(super) fn backing(job: &Job, image: &Image, path: &Path) -> Result<Vec<Backing>> {
    match (job.copy.method, chain::levels(image)) {
        (Copying::Later, Ok(mut levels)) => {
            put_sockets(&mut levels, path)?;
            Ok(record::backing(&levels))
        }
        _ => Ok(Vec::new()),
    }
}

fn put_sockets(levels: &mut [Level], overlay: &Path) -> Result<()> {
    record::put_sockets(levels, overlay);
    let long = wire::too_long(overlay);
    match long.filter(|_| levels.iter().any(|level| level.wire.is_some())) {
        None => Ok(()),
        Some(reason) => Err(Error::refused(
            "the source cannot stay where it is",
            vec![Blocker::new(
                "copy-later",
                reason,
                "name an output directory with a shorter path (--output-dir), or leave --copy later out",
            )],
        )),
    }
}

/// Blocks sources that cannot stay in their place.
pub(super) fn blockers(job: &Job, images: &[Image]) -> Vec<Blocker> {
    match job.copy.method {
        Copying::Now | Copying::InPlace => Vec::new(),
        Copying::Later => (images.iter())
            .filter_map(|image| chain::levels(image).err())
            .map(|blocker| *blocker)
            .collect(),
    }
}

/// Warnings for the user, in a plan and in a result.
pub(super) fn warnings(job: &Job, images: &[Image]) -> Vec<String> {
    if job.copy.method != Copying::Later {
        return Vec::new();
    }
    let mut warnings = vec![WARNING.to_owned()];
    let held = || images.iter().flat_map(Image::held);
    if held().any(Held::is_on_wire) {
        warnings.push(later::ON_WIRE.to_owned());
        return warnings;
    }
    let files: Vec<&Path> = images.iter().flat_map(Image::files).collect();
    let user = tool::find("virsh").and_then(|_| access::qemu_user("qemu:///system"));
    let closed = user.and_then(|user| {
        let file = files.iter().find(|file| access::closed(file, &user))?;
        Some((user.name, file))
    });
    if let Some((user, file)) = closed {
        warnings.push(format!(
            "QEMU of the system's libvirt runs as {user} and cannot read {}: boot prints a remedy",
            file.display()
        ));
    }
    warnings
}

/// Keeps the fixed overlays of a Windows VM as its disks, and creates an overlay for each other
/// disk.
pub(super) fn keep_fixed(run: &Run<'_>, mut fixed: Fixed) -> Result<Disks> {
    let Run {
        job, disks, folder, ..
    } = run;
    let mut kept = Vec::new();
    for (i, disk) in disks.iter().enumerate() {
        stopped()?;
        let image = match fixed.images.get(&disk.id) {
            Some(image) => image.clone(),
            None if job.copy.trim => {
                let overlay = work_file(folder, &format!("overlay-{i}.qcow2"))?;
                let (image, trimmed) = copy::trimmed_overlay(disk, &overlay)?;
                fixed.trim.push(trimmed);
                holes::mark(&image)?;
                image
            }
            None => disk.image.clone(),
        };
        kept.push(Disk::new(disks, disk.id, image, &fixed.before));
    }
    let (targets, bytes) = keep(run, kept)?;
    Ok(Disks {
        targets,
        bytes,
        fixed,
    })
}

/// Gives each disk's overlay its final name and records its backing file.
pub(super) fn keep(run: &Run<'_>, disks: Vec<Disk>) -> Result<(Vec<domain::Disk>, Bytes)> {
    let Run {
        job, ui, folder, ..
    } = run;
    let (mut targets, mut records) = (Vec::new(), Vec::new());
    let mut bytes = Bytes::default();
    for (i, mut disk) in disks.into_iter().enumerate() {
        let file = job.file_name(i);
        let path = folder.path().join(&file);
        let levels = chain::levels(&disk.image).map_err(|blocker| {
            Error::refused("the source cannot stay where it is", vec![*blocker])
        })?;
        let levels = reached(levels, folder, &file)?;
        disk.image = put(folder, &disk.image, &path, i)?;
        let left = holes::left(&disk.image)?;
        if let Some(top) = levels.first() {
            record::name_below(&path, top)?;
        }
        let backing = record::backing(&levels);
        point("kept")?;
        let size_bytes = disk.image.virtual_size();
        add_disk(&mut bytes, size_bytes, left, allocated(&path)?);
        records.push(record::Disk {
            file: file.clone(),
            virtual_size: size_bytes,
            levels,
        });
        targets.push(disk.at(folder.target().join(&file), DiskFormat::Qcow2, backing));
    }
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

/// The levels below an overlay with their sockets, beside its place in the finished result.
fn reached(mut levels: Vec<Level>, folder: &OutputFolder, file: &str) -> Result<Vec<Level>> {
    put_sockets(&mut levels, &folder.target().join(file))?;
    Ok(levels)
}

/// Counts a disk of this size, of which `left` bytes stay on the source.
fn add_disk(bytes: &mut Bytes, size: u64, left: u64, written: u64) {
    bytes.virtual_size = bytes.virtual_size.saturating_add(size);
    bytes.left = bytes.left.saturating_add(left);
    bytes.written = bytes.written.saturating_add(written);
    bytes.skipped = bytes.virtual_size.saturating_sub(bytes.left);
}

/// Creates one overlay over the source at `path`.
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

/// The images of the disks in the source.
pub(super) fn images(disks: &VmDisks) -> Vec<Image> {
    disks.iter().map(|disk| disk.image.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::output::FolderOptions;
    use super::super::testing::job;
    use super::*;
    use crate::disk::remote;
    use crate::disk::testing::Served;

    #[test]
    fn a_disk_stands_on_its_source_only_with_copy_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        let image = Image::open_info(&path, Some("raw"), &[]).unwrap();
        let mut job = job(std::slice::from_ref(&path), dir.path());
        let overlay = dir.path().join("out/vm.qcow2");
        for method in [Copying::Now, Copying::InPlace, Copying::Later] {
            job.copy.method = method;
            let later = method == Copying::Later;
            let on = backing(&job, &image, &overlay).unwrap();
            let on: Vec<_> = on
                .into_iter()
                .map(|b| (b.path, b.format, b.socket))
                .collect();
            let wanted = [(path.clone(), "raw".to_owned(), false)];
            assert_eq!(on, wanted[..usize::from(later)], "{method:?}");
            assert_eq!(blockers(&job, std::slice::from_ref(&image)), []);
            let said = warnings(&job, std::slice::from_ref(&image));
            assert_eq!(
                said.iter().any(|warning| warning == WARNING),
                later,
                "{method:?}"
            );
            assert!(later || said.is_empty());
            // libvirt cannot have it below an overlay.
            let other = image.clone().shown_as(crate::disk::detect::Format::VHDX);
            let blocked = blockers(&job, &[image.clone(), other]);
            let codes: Vec<_> = blocked.iter().map(|b| b.code.as_str()).collect();
            assert_eq!(codes, ["copy-later"][..usize::from(later)], "{method:?}");
        }
    }

    /// A VM cannot start while its source is out of reach, wherever that is among its disks.
    #[test]
    fn a_disk_on_the_wire_is_a_warning_of_a_vm_that_stays_on_its_source() {
        let (host, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let open = |path: &Path| Image::open_info(path, Some("raw"), &[]).unwrap();
        let local = host.path().join("disk.raw");
        std::fs::write(&local, vec![1; 1 << 20]).unwrap();
        let root = here.path().canonicalize().unwrap();
        remote::register_root(&root, "ssh://host");
        let path = root.join("disk.raw");
        let placeholder = std::fs::File::create(&path).unwrap();
        remote::register(&placeholder, Served::new(&local), false).unwrap();
        let images = [open(&local), open(&path)];
        let mut job = job(std::slice::from_ref(&path), host.path());
        for (method, wanted) in [
            (Copying::Now, &[][..]),
            (Copying::InPlace, &[]),
            (Copying::Later, &[WARNING, later::ON_WIRE]),
        ] {
            job.copy.method = method;
            assert_eq!(warnings(&job, &images), wanted, "{method:?}");
        }
        let said = warnings(&job, &images[..1]);
        assert!(!said.iter().any(|warning| warning == later::ON_WIRE));
    }

    /// A socket has its place beside the overlay, and its name a limit.
    #[test]
    fn a_source_on_the_wire_is_reached_beside_the_overlay_or_refused() {
        use crate::later::wire::OnWire;
        let wire: OnWire = serde_json::from_value(serde_json::json!({
            "url": "https://host/disk.raw", "size_bytes": 1, "modified_ms": 0,
            "headers_sha256": "", "access": crate::wire::Access::default(),
        }))
        .unwrap();
        let level = |is_wire: bool| Level {
            format: "raw".into(),
            files: Vec::new(),
            wire: is_wire.then(|| wire.clone()),
        };
        let long = format!("/{}/vm.qcow2", "x".repeat(200));
        for (is_wire, overlay, fine) in [
            (true, "/out/vm.qcow2", true),
            (false, long.as_str(), true),
            (true, long.as_str(), false),
        ] {
            // The one on the wire may be below another.
            let mut levels = [level(is_wire), level(is_wire)];
            levels[0].wire = None;
            let done = put_sockets(&mut levels, Path::new(overlay));
            assert_eq!(done.is_ok(), fine, "{overlay}");
            if let Err(error) = done {
                assert_eq!(error.kind, crate::error::ErrorKind::Refused);
                assert_eq!(error.blockers[0].code, "copy-later");
            } else if let Some(wire) = &levels[1].wire {
                assert_eq!(wire.socket.parent(), Some(Path::new("/out")));
                assert!(wire.socket.starts_with("/out") && wire.format == "raw");
            }
        }
        // The partial directory will have another name.
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let folder = OutputFolder::create(&target, &FolderOptions::default()).unwrap();
        assert_ne!(folder.path(), target);
        let levels = reached(vec![level(true)], &folder, "vm.qcow2").unwrap();
        let below = record::backing(&levels);
        assert!(below[0].socket && below[0].path.parent() == Some(&target));
    }

    /// A hole of an overlay takes nothing.
    #[test]
    fn an_overlay_takes_the_blocks_of_its_file_and_not_its_length() {
        use std::os::unix::fs::FileExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(1 << 30).unwrap();
        file.write_all_at(&[1; 256 << 10], 0).unwrap();
        file.sync_all().unwrap();
        let taken = allocated(&path).unwrap();
        assert!((256 << 10..1 << 20).contains(&taken), "{taken}");
        assert!(allocated(&dir.path().join("none")).is_err());
    }

    #[test]
    fn every_disk_that_stays_on_the_source_is_counted() {
        let mut bytes = Bytes::default();
        add_disk(&mut bytes, 100, 60, 7);
        add_disk(&mut bytes, 50, 5, 3);
        let expected = Bytes {
            virtual_size: 150,
            left: 65,
            written: 10,
            skipped: 85,
            ..Bytes::default()
        };
        assert_eq!(bytes, expected);
    }
}
