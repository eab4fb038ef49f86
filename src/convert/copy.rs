//! Copies all disks of a VM. The data of every disk is measured first, and free space is checked
//! for all of them together. Then the disks are copied side by side under one progress bar. The
//! first failure stops the others. Finished ranges are recorded, so that an interrupted copy can
//! continue ([`super::resume`]).

use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use crate::block::{BlockRead, BlockWrite};
use crate::check::{Check, CheckState};
use crate::disk::ImageError;
use crate::disk::chain::Image;
use crate::disk::copy::{self, Copied, CopyError, CopyOptions, Record, TargetFormat};
use crate::disk::device::{ClaimedDevice, DeviceError};
use crate::domain::{self, DiskFormat};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::fix::trim::{self, DataMap};
use crate::guest::embedded;
use crate::inspect::Severity;
use crate::report::{Bytes, DiskTrim};
use crate::stop;
use crate::timeline;
use crate::transfer::Extents;
use crate::ui::{Ui, count};

use super::disks::Disk;
use super::in_place::absolute;
use super::job::Job;
use super::output::OutputFolder;
use super::output::work_file;
use super::resume;
use super::run::Run;
use super::steps::{Disks, Fixed, stopped};
use super::sync::Synced;
use crate::session::engine::Engine;
use crate::session::{self, Session};

/// Disks copied at a time. More than two only make the heads of a spinning disk jump; two keep a
/// link busy while one of them waits.
const AT_ONCE: usize = 2;

/// The destination of one disk.
#[derive(Clone)]
pub enum Target {
    File(PathBuf),
    /// A copy filled by the passes of a sync, and its second name in the new directory.
    Synced(Box<Synced>, PathBuf),
    Device {
        device: Arc<ClaimedDevice>,
        /// A scratch file that may be created during the copy.
        scratch: PathBuf,
    },
}

/// One disk to copy.
struct DiskCopy {
    pub image: Image,
    pub target: Target,
    /// Bytes for which the image has data.
    pub live: u64,
    /// The part of `live` that no earlier pass has copied.
    left: u64,
    /// The size of a file with that data.
    pub size: u64,
    ranges: Arc<Extents>,
    record: Record,
}

/// The reason why a disk was not copied.
struct Failure {
    error: Error,
    /// Whether the ranges copied so far are intact.
    can_be_resumed: bool,
}

impl From<CopyError> for Failure {
    fn from(error: CopyError) -> Self {
        Self {
            can_be_resumed: error.can_be_resumed(),
            error: error.into(),
        }
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        Self {
            can_be_resumed: matches!(&error, DeviceError::Copy(e) if e.can_be_resumed()),
            error: error.into(),
        }
    }
}

impl DiskCopy {
    fn copy(&self, how: &CopyOptions, progress: &mut dyn FnMut(f64)) -> Result<Copied, Failure> {
        match &self.target {
            Target::File(path) => Ok(copy::copy(&self.image, path, how, progress)?),
            Target::Synced(synced, path) => Ok(synced.finish(&self.image, path, how, progress)?),
            Target::Device { device, scratch } => Ok(Copied {
                virtual_size: self.image.virtual_size(),
                written: self.live,
                resumed: device.fill(&self.image, scratch, how, progress)?,
                shared: 0,
            }),
        }
    }

    /// Bytes that the file will still take on the host.
    fn size_left(&self) -> u64 {
        let Target::File(path) = &self.target else {
            return 0;
        };
        let there = path.symlink_metadata().map_or(0, |meta| meta.blocks());
        self.size.saturating_sub(there.saturating_mul(512))
    }
}

/// Puts an overlay over a disk without Windows and zeroes the disk's free space in it.
pub fn trimmed_overlay(source: &session::Disk, overlay: &Path) -> Result<(Image, DiskTrim)> {
    let data = DataMap::of(&source.image)?;
    let session = Session::overlay(Engine::EMBEDDED, source, overlay)?;
    let trimmed = trim_session(&session.export.disk(), &session.layout, source, &data)?;
    let overlay = session.export.image().clone();
    session.close()?;
    Ok((overlay, trimmed))
}

/// A disk that is an overlay on a source. It announces the next reads to the source.
struct OverSource {
    disk: Arc<dyn BlockWrite>,
    source: Image,
}

impl BlockRead for OverSource {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(offset, buf)
    }

    fn expect(&self, ranges: &[Range<u64>]) {
        self.source.expect(ranges);
    }
}

/// Trims the disk behind an open session. The guest was changed after the session was opened.
pub fn trim_session(
    disk: &Arc<dyn BlockWrite>,
    layout: &crate::disk::layout::DiskLayout,
    source: &session::Disk,
    data: &DataMap,
) -> Result<DiskTrim> {
    let read = Arc::new(OverSource {
        disk: disk.clone(),
        source: source.image.clone(),
    });
    let guest = embedded::open_with(read, layout, &source.keys)
        .map_err(|e| Error::failed("opening the volumes for the trim").because(e))?;
    Ok(DiskTrim {
        disk: source.path.clone(),
        volumes: trim::trim(disk.as_ref(), &guest, data)?,
    })
}

/// The path of disk `i` of the new VM.
pub(super) fn target_path(job: &Job, folder: &Path, i: usize, image: &Image) -> Result<PathBuf> {
    if job.copy.is_in_place() {
        return absolute(image.path());
    }
    match job.copy.devices.get(i) {
        Some(device) => absolute(device),
        None => Ok(folder.join(job.file_name(i))),
    }
}

/// Copies the disks of a Windows VM, including the fixed overlays. `decided` is what a resumed run
/// has to decide again.
pub(super) fn copy_disks(run: &Run<'_>, mut fixed: Fixed, decided: &Value) -> Result<Disks> {
    let Run {
        job, disks, folder, ..
    } = run;
    let mut arriving = Vec::new();
    for (i, disk) in disks.iter().enumerate() {
        stopped()?;
        let left = run
            .resumed
            .as_ref()
            .and_then(|resumed| resumed.overlay(folder, i));
        let image = if let Some(image) = fixed.images.get(&disk.id) {
            image.clone()
        } else if let Some(overlay) = left {
            disk.image.with_overlay(&overlay)?
        } else if job.copy.trim {
            let overlay = work_file(folder, &format!("overlay-{i}.qcow2"))?;
            let (image, trimmed) = trimmed_overlay(disk, &overlay)?;
            fixed.trim.push(trimmed);
            image
        } else {
            disk.image.clone()
        };
        arriving.push(Disk::new(disks, disk.id, image, &fixed.before));
    }
    let (targets, bytes) = to_targets(run, arriving, &fixed.trim, decided)?;
    if job.copy.verify {
        fixed.checks.push(Check::new(
            "copy-identical",
            Severity::Blocker,
            CheckState::Ok,
            format!(
                "{} compared byte for byte with the source",
                count(targets.len(), "copy")
            ),
        ));
    }
    Ok(Disks {
        targets,
        bytes,
        fixed,
    })
}

/// The target of disk `i`, and the path and format that the VM uses for it.
fn target(
    run: &Run<'_>,
    i: usize,
    disk: &Disk,
    ranges: &Extents,
) -> Result<(Target, PathBuf, DiskFormat)> {
    let (folder, file) = (&run.folder, run.job.file_name(i));
    if let Some(device) = run.devices.of_disk(i) {
        let target = Target::Device {
            device: device.clone(),
            scratch: work_file(folder, &format!("device-{i}.qcow2"))?,
        };
        return Ok((target, device.path().to_path_buf(), DiskFormat::Raw));
    }
    let source = run.disks.iter().find(|source| source.id == disk.id);
    let synced = match (&run.last, source) {
        (Some(last), Some(source)) => last.disk(run.job, source, &disk.image, ranges)?,
        _ => None,
    };
    let path = folder.path().join(&file);
    let target = match synced {
        Some(synced) => Target::Synced(Box::new(synced), path),
        None => Target::File(path),
    };
    Ok((target, folder.target().join(file), run.job.copy.format))
}

/// Copies the disks to the files or devices of the job, the system disk first.
pub(super) fn to_targets(
    run: &Run<'_>,
    disks: Vec<Disk>,
    trim: &[DiskTrim],
    decided: &Value,
) -> Result<(Vec<domain::Disk>, Bytes)> {
    let Run {
        job, ui, folder, ..
    } = run;
    let (mut copies, mut targets) = (Vec::new(), Vec::new());
    for (i, disk) in disks.into_iter().enumerate() {
        let data = DataMap::of(&disk.image)?;
        let size_bytes = disk.image.virtual_size();
        let ranges = Arc::new(data.extents(size_bytes));
        let (target, path, format) = target(run, i, &disk, &ranges)?;
        targets.push(disk.at(path, format, Vec::new()));
        let what = json!({
            "source": disk.image.identity(), "size": size_bytes, "file": job.file_name(i),
        });
        copies.push(DiskCopy {
            live: data.bytes,
            left: match &target {
                Target::Synced(synced, _) => synced.left(),
                Target::File(_) | Target::Device { .. } => data.bytes,
            },
            size: data.copy_size(size_bytes),
            ranges,
            record: resume::record(folder, i, what)?,
            image: disk.image,
            target,
        });
    }
    let total = |of: fn(&DiskCopy) -> u64| copies.iter().map(of).fold(0, u64::saturating_add);
    ui.status(
        "Copying",
        &format!(
            "{} of {}",
            crate::ui::bytes(total(|c| c.left)),
            crate::ui::bytes(total(|c| c.image.virtual_size()))
        ),
    );
    let options = options(job);
    for copy in &copies {
        copy.image.announce();
    }
    let disks = copies.iter().map(|c| {
        let overlay = c.image.top().scratch.then(|| c.image.path());
        (c.image.identity(), overlay)
    });
    if run.last.is_none() {
        let _span = timeline::span("record the copy");
        // What an earlier run has recorded is durable, and stays so.
        let decided = (decided, run.resumed.is_some());
        let foundation = resume::save(job, folder, decided, disks.collect(), trim)?;
        let is_all = copies.len() == 1 && !job.copy.verify;
        for copy in &mut copies {
            copy.record.foundation = Some(foundation.clone());
            copy.record.is_all = is_all;
        }
    }
    let copied = copy_all(ui, &copies, &options)
        .and_then(|copied| unchanged(&copies).map(|()| copied))
        .map_err(|failure| kept(job, folder, failure))?;
    Ok((targets, figures(&copied, &copies)))
}

/// The figures of all copies together.
fn figures(copied: &[Copied], disks: &[DiskCopy]) -> Bytes {
    let total = |of: fn(&DiskCopy) -> u64| disks.iter().map(of).fold(0, u64::saturating_add);
    let (virtual_size, live) = (total(|d| d.image.virtual_size()), total(|d| d.live));
    Bytes {
        resumed: copied.iter().map(|c| c.resumed).sum(),
        // The ranges to copy are rounded to grains.
        shared: (copied.iter().zip(disks))
            .map(|(copied, disk)| copied.shared.min(disk.live))
            .sum(),
        virtual_size,
        read: live,
        written: copied.iter().map(|c| c.written).sum(),
        skipped: virtual_size.saturating_sub(live),
        ..Bytes::default()
    }
}

/// The options of the user for the copies.
fn options(job: &Job) -> CopyOptions {
    CopyOptions {
        format: match job.copy.format {
            DiskFormat::Qcow2 => TargetFormat::Qcow2,
            DiskFormat::Raw => TargetFormat::Raw,
        },
        compress: job.copy.compress,
        compare: job.copy.verify,
        pace: job.copy.pace.clone(),
        ..CopyOptions::default()
    }
}

/// Checks after the copy that the source is unchanged, while the copy can still be resumed. A lost
/// connection does not count as a change.
fn unchanged(disks: &[DiskCopy]) -> Result<(), Failure> {
    let mut images = disks.iter().map(|disk| &disk.image);
    let looked = images.try_for_each(Image::check_unchanged);
    looked.map_err(changed)
}

fn changed(error: ImageError) -> Failure {
    Failure {
        can_be_resumed: matches!(error, ImageError::Unreachable { .. }),
        error: error.into(),
    }
}

/// Keeps the partial directory if a later run can use it, and adds that to the error.
fn kept(job: &Job, folder: &OutputFolder, failure: Failure) -> Error {
    let Failure {
        error,
        can_be_resumed,
    } = failure;
    if job.output.from_sync {
        return error
            .hint("the synced directory is kept: the same command continues, or sync again");
    }
    // With `--resume`, the user wants to keep every copied byte.
    let stopped = job.output.resume && (error.is_interrupted() || stop::requested());
    folder.keep(can_be_resumed || stopped);
    match folder.is_kept() {
        true => error.hint(format!(
            "{}: the same command with --resume continues, without it the next run starts over",
            resume::KEPT
        )),
        false => error,
    }
}

/// Copies every disk, or fails: the first failure stops the rest.
fn copy_all(ui: &Ui, disks: &[DiskCopy], options: &CopyOptions) -> Result<Vec<Copied>, Failure> {
    let files = disks.iter().filter_map(|d| match &d.target {
        Target::File(path) => Some((path.parent()?, d.size_left())),
        Target::Synced(..) | Target::Device { .. } => None,
    });
    let needed = files.clone().map(|(_, n)| n).fold(0, u64::saturating_add);
    if let Some((folder, _)) = files.clone().next() {
        copy::check_space(needed, folder, options.compress)?;
    }
    let sum = |of: &dyn Fn(&DiskCopy) -> u64| disks.iter().map(of).fold(0, u64::saturating_add);
    let left = sum(&|d| d.left);
    let skipped = sum(&|d| d.image.virtual_size().saturating_sub(d.live));
    let progress = ui.progress("Copying", left).skipping(skipped);
    let done: Vec<AtomicU64> = disks.iter().map(|_| AtomicU64::new(0)).collect();
    let cancel = Arc::new(AtomicBool::new(false));
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<Result<Copied, Failure>>>> =
        Mutex::new(disks.iter().map(|_| None).collect());

    let work = || {
        while !cancel.load(Ordering::SeqCst) {
            let i = next.fetch_add(1, Ordering::SeqCst);
            let Some(disk) = disks.get(i) else { break };
            let options = CopyOptions {
                cancel: Some(cancel.clone()),
                ranges: Some(disk.ranges.clone()),
                record: Some(disk.record.clone()),
                ..options.clone()
            };
            let result = disk.copy(&options, &mut |fraction| {
                let bytes = (fraction * disk.left as f64) as u64;
                done[i].store(bytes, Ordering::Relaxed);
                progress.set(done.iter().map(|d| d.load(Ordering::Relaxed)).sum());
                // No error can be returned from here: the only choices are to wait or to abort.
                let _ = failpoint::hit("copying");
            });
            if result.is_err() {
                cancel.store(true, Ordering::SeqCst);
            }
            let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
            results[i] = Some(result);
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE.min(disks.len()))
            .map(|_| scope.spawn(work))
            .collect();
        for thread in threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
    outcome(results.into_inner().unwrap_or_else(PoisonError::into_inner)).inspect(|_| {
        progress.finish(left);
    })
}

/// Returns all copies, or the error that caused the others to stop.
fn outcome(results: Vec<Option<Result<Copied, Failure>>>) -> Result<Vec<Copied>, Failure> {
    let mut copies = Vec::new();
    let mut first: Option<Failure> = None;
    for result in results.into_iter().flatten() {
        match result {
            Ok(copied) => copies.push(copied),
            Err(failure) => {
                let is_cause = |f: &Failure| f.error.kind != ErrorKind::Interrupted;
                let better = first
                    .as_ref()
                    .is_none_or(|f| !is_cause(f) && is_cause(&failure));
                if better {
                    first = Some(failure);
                }
            }
        }
    }
    first.map_or(Ok(copies), Err)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::super::{output, testing};
    use super::*;

    #[test]
    fn the_cause_is_reported_and_not_what_it_stopped() {
        let copied = Copied {
            virtual_size: 1,
            written: 1,
            resumed: 0,
            shared: 0,
        };
        let failure = |error, can_be_resumed| {
            Some(Err(Failure {
                error,
                can_be_resumed,
            }))
        };
        let stopped = || failure(Error::new(ErrorKind::Interrupted, "stopped"), false);
        let full = || failure(Error::failed("full"), true);
        assert!(outcome(vec![Some(Ok(copied))]).is_ok_and(|all| all == [copied]));
        for results in [
            vec![stopped(), full(), None],
            vec![full(), stopped()],
            vec![Some(Ok(copied)), full()],
        ] {
            let Err(failure) = outcome(results) else {
                panic!("one of them failed");
            };
            assert_eq!(failure.error.message, "full");
            assert!(failure.can_be_resumed);
        }
    }

    /// The files are of use to a later run where nothing is wrong with them, or the user stopped.
    #[test]
    fn an_interrupted_copy_is_kept_where_it_can_be_continued() {
        let interrupted = || Error::new(ErrorKind::Interrupted, "stopped");
        for (error, can, resume, from_sync, is_kept, hints) in [
            (Error::failed("line is down"), true, false, false, true, 1),
            (
                Error::failed("disk is damaged"),
                false,
                true,
                false,
                false,
                0,
            ),
            (interrupted(), false, false, false, false, 0),
            (interrupted(), false, true, false, true, 1),
            (Error::failed("line is down"), true, true, true, false, 1),
        ] {
            let at = format!("{error} {can} {resume} {from_sync}");
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("out");
            let mut job = testing::job(&[dir.path().join("disk.raw")], &target);
            (job.output.resume, job.output.from_sync) = (resume, from_sync);
            let folder = OutputFolder::create(&target, &output::FolderOptions::default()).unwrap();
            let failure = Failure {
                error,
                can_be_resumed: can,
            };
            let kind = failure.error.kind;
            let error = kept(&job, &folder, failure);
            assert_eq!((error.kind, error.hints.len()), (kind, hints), "{at}");
            assert_eq!(folder.is_kept(), is_kept, "{at}");
            let said = error
                .hints
                .iter()
                .any(|hint| hint.starts_with(resume::KEPT));
            assert_eq!(said, is_kept, "{at}");
        }
    }

    #[test]
    fn a_source_that_has_changed_is_no_copy_to_continue() {
        let (path, what) = (PathBuf::from("a"), String::new());
        let lost = ImageError::Unreachable { path, what };
        assert!(changed(lost).can_be_resumed, "the copy itself is whole");
        let dir = tempfile::tempdir().unwrap();
        let paths = ["a", "b"].map(|name| dir.path().join(name));
        for path in &paths {
            std::fs::write(path, vec![0; 1 << 20]).unwrap();
        }
        let copies = paths.each_ref().map(|path| DiskCopy {
            image: Image::open_info(path, Some("raw"), &[]).unwrap(),
            target: Target::File(path.with_extension("out")),
            live: 5,
            left: 5,
            size: 1 << 20,
            ranges: Arc::default(),
            record: Record {
                path: path.with_extension("journal"),
                what: Value::Null,
                foundation: None,
                is_all: false,
            },
        });
        unchanged(&copies).map_err(|failure| failure.error).unwrap();
        // What is there of a copy is not needed again.
        assert_eq!(copies[0].size_left(), 1 << 20);
        std::fs::write(dir.path().join("a.out"), vec![1; 512 << 10]).unwrap();
        let file = std::fs::File::open(dir.path().join("a.out")).unwrap();
        file.sync_all().unwrap();
        assert!(copies[0].size_left() <= 512 << 10);
        assert_eq!(copies[1].size_left(), 1 << 20);
        // A hole of the file takes nothing yet.
        let file = std::fs::File::create(dir.path().join("a.out")).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 256 << 10], 0).unwrap();
        file.sync_all().unwrap();
        let left = copies[0].size_left();
        assert!((512 << 10..=768 << 10).contains(&left), "{left}");
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&vec![1; 4 << 20], 0).unwrap();
        file.sync_all().unwrap();
        assert_eq!(copies[0].size_left(), 0, "more than it needs is there");
        std::fs::write(&paths[1], vec![1; 1 << 20]).unwrap();
        let failure = unchanged(&copies).unwrap_err();
        assert!(!failure.can_be_resumed);
        assert!(
            failure
                .error
                .to_string()
                .contains(paths[1].to_str().unwrap())
        );
    }

    #[test]
    fn a_copy_is_made_as_the_user_wants_it() {
        let mut job = testing::job(&["/a.raw".into()], Path::new("/out"));
        let of = |job: &Job| {
            let options = options(job);
            let pace = options.pace.map(|pace| pace.rate());
            (options.format, options.compress, options.compare, pace)
        };
        assert_eq!(of(&job), (TargetFormat::Qcow2, false, false, None));
        job.copy.compress = true;
        assert_eq!(of(&job), (TargetFormat::Qcow2, true, false, None));
        (job.copy.compress, job.copy.verify) = (false, true);
        job.copy.pace = Some(crate::transfer::Pace::new(5 << 20));
        assert_eq!(of(&job), (TargetFormat::Qcow2, false, true, Some(5 << 20)));
        job.copy.format = DiskFormat::Raw;
        assert_eq!(of(&job).0, TargetFormat::Raw);
    }

    /// A raw disk of a MiB, and its copy.
    fn to_copy(folder: &Path, name: &str, target: &str) -> DiskCopy {
        let path = folder.join(name);
        std::fs::write(&path, vec![name.as_bytes()[0]; 1 << 20]).unwrap();
        DiskCopy {
            image: Image::open_info(&path, Some("raw"), &[]).unwrap(),
            target: Target::File(folder.join(target)),
            live: 1 << 20,
            left: 1 << 20,
            size: 1 << 20,
            ranges: Arc::new(Extents::whole(1 << 20)),
            record: Record {
                path: path.with_extension("journal"),
                what: Value::Null,
                foundation: None,
                is_all: false,
            },
        }
    }

    #[test]
    fn every_disk_is_copied_or_the_first_failure_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let how = CopyOptions {
            format: TargetFormat::Raw,
            ..CopyOptions::default()
        };
        let names = ["a", "b", "c", "d", "e"];
        let copies = names.map(|name| to_copy(dir.path(), name, &format!("{name}.out")));
        let copied = copy_all(&testing::ui(), &copies, &how)
            .map_err(|f| f.error)
            .unwrap();
        assert_eq!(copied.len(), 5);
        for name in names {
            let read = std::fs::read(dir.path().join(format!("{name}.out"))).unwrap();
            assert!(read == vec![name.as_bytes()[0]; 1 << 20], "{name}");
        }
        // A directory is in the way of the first two: the next ones are not begun.
        for name in ["a", "b"] {
            std::fs::create_dir(dir.path().join(format!("{name}.new"))).unwrap();
        }
        let copies = names.map(|name| to_copy(dir.path(), name, &format!("{name}.new")));
        let failure = copy_all(&testing::ui(), &copies, &how)
            .map(drop)
            .unwrap_err();
        assert_eq!(failure.error.kind, ErrorKind::Failed);
        for name in ["c", "d", "e"] {
            assert!(!dir.path().join(format!("{name}.new")).exists(), "{name}");
        }
        // A directory that is not there has no room.
        let copies = names.map(|name| to_copy(dir.path(), name, &format!("nowhere/{name}.new")));
        let failure = copy_all(&testing::ui(), &copies, &how)
            .map(drop)
            .unwrap_err();
        assert!(!failure.can_be_resumed);
        assert_eq!(failure.error.kind, ErrorKind::Failed);
        // More than any file system has room for.
        let mut copies = [to_copy(dir.path(), "a", "more.out")];
        copies[0].size = u64::MAX;
        let failure = copy_all(&testing::ui(), &copies, &how)
            .map(drop)
            .unwrap_err();
        assert_eq!(failure.error.blockers[0].code, "output-space");
        assert!(!dir.path().join("more.out").exists());
    }

    #[test]
    fn a_copy_that_fails_stops_the_one_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut copies = ["a", "b"].map(|name| to_copy(dir.path(), name, &format!("{name}.out")));
        // The first would take ten seconds; a directory is in the way of the other.
        let len = 10 << 20;
        let long = dir.path().join("long");
        std::fs::write(&long, vec![1; len as usize]).unwrap();
        copies[0].image = Image::open_info(&long, Some("raw"), &[]).unwrap();
        copies[0].ranges = Arc::new(Extents::whole(len));
        (copies[0].live, copies[0].left, copies[0].size) = (len, len, len);
        std::fs::create_dir(dir.path().join("b.out")).unwrap();
        let how = CopyOptions {
            format: TargetFormat::Raw,
            pace: Some(crate::transfer::Pace::new(1 << 20)),
            ..CopyOptions::default()
        };
        let copied = copy_all(&testing::ui(), &copies, &how).map(drop);
        assert_eq!(copied.unwrap_err().error.kind, ErrorKind::Failed);
        let begun = std::fs::read(dir.path().join("a.out")).unwrap_or_default();
        let left = begun.iter().filter(|byte| **byte == 0).count();
        assert!(begun.is_empty() || left > 0, "it is complete");
    }

    /// A compressed copy may take an eighth.
    #[test]
    fn the_disks_of_a_vm_need_room_together_and_less_where_they_are_compressed() {
        let dir = tempfile::tempdir().unwrap();
        let free = rustix::fs::statvfs(dir.path()).unwrap();
        let free = free.f_bavail * free.f_frsize;
        let full = |part: u64, compress: bool| {
            let mut copies = ["a", "b"].map(|name| to_copy(dir.path(), name, "in/the/way/of.out"));
            for copy in &mut copies {
                (copy.size, copy.target) = (part, Target::File(dir.path().join("none")));
            }
            // In the way of a copy that has room.
            std::fs::create_dir_all(dir.path().join("none")).unwrap();
            let how = CopyOptions {
                format: TargetFormat::Raw,
                compress,
                ..CopyOptions::default()
            };
            let copied = copy_all(&testing::ui(), &copies, &how);
            !copied.map(drop).unwrap_err().error.blockers.is_empty()
        };
        assert!(!full(free / 4, false), "half of what is free");
        assert!(full(free / 4 * 3, false), "each of the two would fit");
        assert!(!full(free / 4 * 3, true));
        assert!(full(free * 5, true));
    }

    #[test]
    fn the_figures_of_a_copy_are_those_of_all_its_disks() {
        let dir = tempfile::tempdir().unwrap();
        let mut disks = ["a", "b"].map(|name| to_copy(dir.path(), name, "out"));
        (disks[0].live, disks[0].left) = (700, 7);
        (disks[1].live, disks[1].left) = (50, 5);
        let copied = [(600, 30, 800), (40, 4, 10)].map(|(written, resumed, shared)| Copied {
            virtual_size: 1 << 20,
            written,
            resumed,
            shared,
        });
        let expected = Bytes {
            virtual_size: 2 << 20,
            read: 750,
            skipped: (2 << 20) - 750,
            written: 640,
            resumed: 34,
            // No more than there is.
            shared: 710,
            ..Bytes::default()
        };
        assert_eq!(figures(&copied, &disks), expected);
    }

    #[test]
    fn a_disk_goes_to_its_device_or_file_or_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        let image = Image::open_info(&path, Some("raw"), &[]).unwrap();
        let out = Path::new("/out");
        let mut job = testing::job(std::slice::from_ref(&path), out);
        let places = |job: &Job| [0, 1].map(|i| target_path(job, out, i, &image).unwrap());
        let files = ["/out/vm.qcow2", "/out/vm-1.qcow2"].map(PathBuf::from);
        assert_eq!(places(&job), files);
        job.copy.devices = vec!["/dev/vg/windows".into(), "/dev/vg/data".into()];
        assert_eq!(
            places(&job),
            ["/dev/vg/windows", "/dev/vg/data"].map(PathBuf::from)
        );
        // Another program reads the domain elsewhere.
        job.copy.devices = vec!["dev/windows".into(), "dev/data".into()];
        let here = std::env::current_dir().unwrap();
        assert_eq!(
            places(&job),
            ["dev/windows", "dev/data"].map(|name| here.join(name))
        );
        job.copy.method = super::super::job::Copying::InPlace;
        assert_eq!(places(&job), [path.clone(), path]);
    }
}
