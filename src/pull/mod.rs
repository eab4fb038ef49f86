//! `pull`: copies the data that only the source has, until the disks stand alone.
//!
//! While the VM runs, QEMU copies ([`running`]); otherwise this program's copy loop does. In both
//! cases the overlay itself shows what is left, so no record is needed. Flushed data is not copied
//! again, whatever ended the run. A disk stands alone when all data is in it, it names no other
//! file, and reading the chain confirms that. Only then do the domain XML and the report show it.

pub(crate) mod folder;
pub(crate) mod release;
mod room;
mod running;
pub(crate) mod serve;

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use crate::block::{BlockRead, BlockWrite};
use crate::boot;
use crate::convert::exchange;
use crate::disk::chain::Image;
use crate::disk::export::Export;
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::later::record::{LaterState, Record};
use crate::tool::qemu_img::{self, Depth};
use crate::transfer::{Checkpoint, Extents, Pace, Transfer, TransferError, Zeroes};
use crate::ui::{self, Ui};
use folder::{Domain, Folder, between_boots};

#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) folder: PathBuf,
    pub(crate) uri: String,
    /// The limit for all disks together, in MiB per second.
    pub(crate) bandwidth: Option<u64>,
}

/// The program that copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum By {
    /// QEMU, while the VM ran.
    Libvirt,
    /// This program, while the VM was off.
    Offline,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Pulled {
    #[serde(with = "crate::text::json_path")]
    pub(crate) folder: PathBuf,
    pub(crate) by: By,
    #[serde(serialize_with = "crate::text::json_path::list")]
    pub(crate) disks: Vec<PathBuf>,
    pub(crate) bytes: Bytes,
    pub(crate) seconds: f64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Bytes {
    /// Bytes copied by this run.
    pub(crate) copied: u64,
    /// Bytes left; 0 if the disks stand alone.
    pub(crate) left: u64,
}

pub(crate) fn pull(options: &Options, ui: &Ui) -> Result<Pulled> {
    let begin = Instant::now();
    exchange::repair(&options.folder)?;
    Folder::open(&options.folder)?;
    let _lock = boot::lock(&options.folder)?;
    boot::anchored(&options.folder, ui)?;
    let mut folder = Folder::open(&options.folder)?;
    let mut record = Record::load(&folder.path)?.ok_or_else(|| {
        Error::usage(format!(
            "the disks in {} were copied when it was converted",
            folder.path.display()
        ))
        .hint("pull is for what `convert --copy later` wrote")
    })?;
    let mut pulled = Pulled {
        folder: folder.path.clone(),
        by: By::Offline,
        disks: folder.disks.clone(),
        bytes: Bytes::default(),
        seconds: 0.0,
    };
    if record.state == LaterState::Alone {
        ui.status("Done", "the disks stand alone already");
        return Ok(pulled);
    }
    refuse_between_boots(&folder)?;
    record.check_source(&folder.path)?;
    if record.disks.len() != folder.disks.len() {
        return Err(Error::failed(format!(
            "later.json has {} disks, and report.json {}",
            record.disks.len(),
            folder.disks.len()
        ))
        .hint("convert again into another directory; the source is untouched"));
    }
    let domain = folder.domain(&options.uri)?;
    hit("pull-begin")?;
    let copied = match domain.as_ref().filter(|domain| domain.is_active()) {
        Some(domain) => {
            pulled.by = By::Libvirt;
            running::pull(options, ui, &folder, &record, domain)?
        }
        None => offline(options, ui, &folder, &record)?,
    };
    pulled.bytes.copied = copied;
    for disk in &folder.disks {
        check_alone(disk)?;
    }
    record.check_source(&folder.path)?;
    complete(&mut folder, &mut record, domain.as_ref())?;
    pulled.seconds = begin.elapsed().as_secs_f64();
    Ok(pulled)
}

/// Fails between the two boots of a VM: it runs from further overlays then, and returns to these
/// disks if it fails.
fn refuse_between_boots(folder: &Folder) -> Result<()> {
    match &folder.boot {
        Some(boot) if between_boots(boot) => Err(Error::failed(format!(
            "the VM is being switched to VirtIO (phase {} of boot.json), and may still be rolled back",
            boot.phase.as_str()
        ))
        .hint(format!(
            "finish that first: hyper2kvm boot {}",
            crate::text::quote(&folder.path)
        ))),
        _ => Ok(()),
    }
}

/// Updates all documents with the paths of the disks, in an order that permits repeating a killed
/// run.
fn complete(folder: &mut Folder, record: &mut Record, domain: Option<&Domain>) -> Result<()> {
    hit("pull-alone")?;
    folder.describe_alone()?;
    hit("pull-described")?;
    if let Some(domain) = domain {
        folder.define_alone(domain)?;
    }
    hit("pull-defined")?;
    folder.report_alone()?;
    hit("pull-reported")?;
    record.state = LaterState::Alone;
    record.save(&folder.path)
}

/// Reads the chain: the disk must be one image that names no other.
fn check_alone(disk: &Path) -> Result<()> {
    let levels = qemu_img::chain_length(disk).map_err(|e| {
        Error::failed(format!("reading the chain of {}", disk.display())).because(e)
    })?;
    match levels {
        1 => Ok(()),
        _ => Err(Error::failed(format!(
            "{} is still one of {levels} images",
            disk.display()
        ))
        .hint("run the same command again")),
    }
}

/// Copies while nobody uses the disks.
fn offline(options: &Options, ui: &Ui, folder: &Folder, record: &Record) -> Result<u64> {
    let mut todo = Vec::new();
    for disk in &folder.disks {
        let image = record.image(disk)?;
        image.hold_for_writing()?;
        todo.push((left(&image)?, image));
    }
    let total = todo.iter().map(|(ranges, _)| ranges.bytes()).sum();
    let sizes = (todo.iter()).map(|(ranges, image)| (image.path(), ranges.bytes()));
    // The same command continues after an interruption.
    if let Err(error) = room::check(sizes) {
        ui.warn(&format!("{error}; what is zero in it takes none"));
    }
    let progress = ui.progress("Copying", total);
    let rate = options.bandwidth.map(|mib| mib.saturating_mul(1 << 20));
    let pace = rate.map(Pace::new);
    let mut before = 0;
    ui.status("Copying", &format!("{} from the source", ui::bytes(total)));
    for (ranges, image) in todo {
        let size = ranges.bytes();
        if image.levels().len() > 1 {
            copy(&image, &ranges, pace.as_ref(), &mut |done| {
                progress.set(before + done);
            })?;
            record.check_source(&folder.path)?;
            hit("pull-copied")?;
            let path = image.path().to_owned();
            // qemu-img takes the locks that this run holds.
            drop(image);
            qemu_img::set_backing(&path, None)
                .map_err(|e| Error::failed(format!("completing {}", path.display())).because(e))?;
            // An interrupted run has left some leaks, which only waste space.
            if let Err(error) = crate::disk::copy::drop_leaks(&path) {
                tracing::info!("looking for lost clusters of {}: {error}", path.display());
            }
            sync(&path)?;
        }
        before += size;
    }
    progress.finish(total);
    Ok(total)
}

/// The ranges that only the levels below the overlay contain.
fn left(image: &Image) -> Result<Extents> {
    let mut ranges = Extents::default();
    qemu_img::mapped(&image.spec(), false, &mut |range, depth| {
        if depth == Depth::Below {
            ranges.insert(range);
        }
    })
    .map_err(|e| {
        Error::failed(format!("reading the map of {}", image.path().display())).because(e)
    })?;
    Ok(ranges)
}

/// Copies into the overlay with regular flushes: the overlay's map records what it contains.
fn copy(
    image: &Image,
    ranges: &Extents,
    pace: Option<&Pace>,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let source = Export::<dyn BlockRead>::open_readonly(&image.without_top())?;
    let target = Export::<dyn BlockWrite>::open_writable(image)?;
    hit("pull-copying")?;
    Transfer {
        source: source.disk(),
        target: target.disk(),
        ranges,
        zeroes: Zeroes::Write,
        checkpoint: Checkpoint::Target,
        pace,
        cancel: None,
    }
    .run(&mut |step| progress(step.done))
    .map_err(|error| broke_off(error, image.path()))?;
    hit("pull-flushed")?;
    target.close()?;
    Ok(source.close()?)
}

/// The error of a copy that the same command continues.
fn broke_off(error: TransferError, disk: &Path) -> Error {
    let continues = "run the same command again: what was flushed is not copied again";
    if let TransferError::Interrupted(_) = error {
        return Error::new(ErrorKind::Interrupted, "interrupted").hint(continues);
    }
    if error.is_full() {
        return Error::failed(format!("the file system of {} ran full", disk.display()))
            .because(error)
            .hint(format!("free some space there, then {continues}"));
    }
    Error::failed(format!("copying what is left of {}", disk.display()))
        .because(error)
        .hint(continues)
}

fn sync(path: &Path) -> Result<()> {
    let file = std::fs::File::options().write(true).open(path);
    file.and_then(|file| file.sync_all())
        .map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))
}

fn hit(point: &str) -> Result<()> {
    failpoint::hit(point).map_err(|e| Error::failed("pulling").because(e))
}
