//! One pass of `sync`.

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::disk::copy::{self, CopyError};
use crate::disk::export::Export;
use crate::disk::refill::{Refill, Work};
use crate::disk::{BlockRead, Image, partition};
use crate::error::{Blocker, Error, Result};
use crate::files;
use crate::fix::trim::{self, DataMap};
use crate::guest::embedded;
use crate::source::{SourceDisk, SourceVm, mirror};
use crate::stop;
use crate::transfer::{Extents, Pace};
use crate::ui::Ui;
use crate::wire::Transport;

use super::super::name::safe_name;
use super::super::place::OutputPlace;
use super::changes::Now;
use super::state::{self, Pass, SyncState, SyncedDisk};

/// The source and the target of a sync.
pub struct Order {
    /// The source, as the user named it.
    pub source: PathBuf,
    pub vm: SourceVm,
    pub format: Option<String>,
    pub allow_backing: Vec<PathBuf>,
    pub folder: PathBuf,
    pub name: Option<String>,
    pub(crate) pace: Option<Pace>,
}

/// A disk whose frozen links are open.
struct Frozen {
    image: Image,
    now: Now,
    /// The size of the link that the VM writes to; unknown for an export.
    growing: Option<u64>,
}

/// Makes one pass over every disk and returns the new state.
pub fn run(order: &Order, ui: &Ui) -> Result<SyncState> {
    let (start, at) = (Instant::now(), seconds_since_1970());
    let place = OutputPlace::open(&order.folder, true)?;
    let _lock = place.lock()?;
    let folder = place.target.clone();
    ui.status("Looking", &order.source.display().to_string());
    let opened = order.vm.disks.iter().map(|disk| open(order, disk));
    let frozen: Vec<Frozen> = opened.collect::<Result<_>>()?;
    let mut state = load(order, &folder)?;
    let changed = begin(&mut state, &frozen, &folder)?;
    let mut work = Vec::new();
    for ((disk, frozen), changed) in state.disks.iter().zip(&frozen).zip(&changed) {
        let recorded = used(&frozen.image, changed, true)?.minus(&disk.done(&folder)?);
        work.push(Work {
            recorded,
            ..Work::default()
        });
    }
    check_room(&state, &folder, &work)?;
    let copied = work.iter().map(Work::bytes).sum();
    let overhead_s = start.elapsed().as_secs_f64();
    let work: Vec<(&Frozen, Work)> = frozen.iter().zip(work).collect();
    copy(order, ui, &folder, &state, &work)?;
    for frozen in &frozen {
        frozen.image.check_unchanged()?;
    }
    state.add(NewPass {
        at,
        seconds: start.elapsed().as_secs_f64(),
        overhead_s,
        copied,
        left: &|changed| left(&frozen, changed),
        bandwidth: order.pace.as_ref().map(Pace::rate),
    });
    state.save(&folder)?;
    Ok(state)
}

/// A pass that was just made. `left` is what remains for the last pass after so many changed bytes.
struct NewPass<'a> {
    at: u64,
    seconds: f64,
    overhead_s: f64,
    copied: u64,
    left: &'a dyn Fn(u64) -> u64,
    bandwidth: Option<u64>,
}

/// Bytes left for the last pass: the contents of the newest links, or for an export the changes of
/// this pass.
fn left(frozen: &[Frozen], changed: u64) -> u64 {
    let exports = match frozen.iter().any(|frozen| frozen.growing.is_none()) {
        true => changed,
        false => 0,
    };
    let growing = frozen.iter().filter_map(|frozen| frozen.growing);
    growing.fold(exports, u64::saturating_add)
}

fn seconds_since_1970() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

impl SyncState {
    /// Bytes per second that changed between the last pass and one that began at `at`.
    fn change_rate(&self, at: u64, changed: u64) -> f64 {
        let last = self.passes.last();
        last.map_or(0.0, |last| {
            changed as f64 / at.saturating_sub(last.at).max(1) as f64
        })
    }

    /// Adds a pass, with the changes found by it and by passes before it that were killed.
    fn add(&mut self, made: NewPass<'_>) {
        let changed = std::mem::take(&mut self.changed);
        let pass = Pass {
            at: made.at,
            seconds: made.seconds,
            overhead_s: made.overhead_s,
            changed,
            copied: made.copied,
            left: (made.left)(changed),
            change_rate: self.change_rate(made.at, changed),
            projected_s: 0.0,
            bandwidth: made.bandwidth,
        };
        self.passes.push(pass);
        self.project();
    }

    fn project(&mut self) {
        let Some((left, limit)) = self.passes.last().map(|pass| (pass.left, pass.bandwidth)) else {
            return;
        };
        let projected_s = state::projection(self, left, limit);
        if let Some(pass) = self.passes.last_mut() {
            pass.projected_s = projected_s;
        }
    }
}

/// Opens the links of a disk that nobody writes to.
fn open(order: &Order, disk: &SourceDisk) -> Result<Frozen> {
    let shown = disk.path.display();
    if disk.packed.is_some() {
        return Err(
            Error::usage(format!("{shown} is packed, and no VM runs from it"))
                .hint("hyper2kvm convert does it in one go"),
        );
    }
    let format = order.format.as_deref().or(disk.format.as_deref());
    if mirror::transport(&disk.path).is_export() {
        let image = Image::open_info(&disk.path, format, &order.allow_backing)?;
        return Ok(Frozen {
            growing: None,
            now: Now::of(&image)?,
            image,
        });
    }
    let Some(image) = Image::open_frozen(&disk.path, format, &order.allow_backing)? else {
        let blocker = Blocker::new(
            "sync-nothing-frozen",
            format!("{shown} has no backing file: a running VM writes to all of it"),
            "take a snapshot of the VM first (all disks, without its memory), or convert it when it is off",
        );
        let what = "there is nothing that can be copied now";
        return Err(Error::refused(what, vec![blocker]));
    };
    Ok(Frozen {
        growing: Some(size_of_newest(&disk.path)),
        now: Now::of(&image)?,
        image,
    })
}

/// The size of the newest link, with the data file of a VMware delta. On another host only the
/// lengths are known.
fn size_of_newest(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let stem = path.file_stem().unwrap_or_default();
    let beside = |end: &str| {
        let mut name = stem.to_owned();
        name.push(end);
        path.with_file_name(name)
    };
    let files = [
        path.to_owned(),
        beside("-delta.vmdk"),
        beside("-sesparse.vmdk"),
    ];
    let here = mirror::transport(path) == Transport::File;
    let sizes = files.iter().filter_map(|file| file.metadata().ok());
    let size = |meta: std::fs::Metadata| match here {
        true => meta.blocks().saturating_mul(512),
        false => meta.len(),
    };
    sizes.map(size).fold(0, u64::saturating_add)
}

/// Loads the state in the directory, or creates one in an empty directory.
fn load(order: &Order, folder: &Path) -> Result<SyncState> {
    if let Some(state) = SyncState::load(folder)? {
        return Ok(state);
    }
    let failed = |e| Error::failed(format!("creating {}", folder.display())).because(e);
    files::create_passage(folder).map_err(failed)?;
    let entries = std::fs::read_dir(folder).map_err(failed)?;
    if entries.flatten().any(|e| !state::is_begun(&e.file_name())) {
        return Err(
            Error::failed(format!("{} contains no synced VM", folder.display()))
                .hint("choose an empty or new directory with --output-dir"),
        );
    }
    let name = order.name.as_deref().unwrap_or(&order.vm.name);
    let state = SyncState::new(&safe_name(name), &order.source);
    state.save(folder)?;
    Ok(state)
}

/// Creates the copies at the first pass, and records the changes at each later one.
fn begin(state: &mut SyncState, frozen: &[Frozen], folder: &Path) -> Result<Vec<Extents>> {
    if !state.disks.is_empty() {
        let sizes: Vec<u64> = frozen.iter().map(|f| f.image.virtual_size()).collect();
        let disks: Vec<Now> = frozen.iter().map(|f| f.now.clone()).collect();
        let changed = state.changes(&sizes, &disks)?;
        let images: Vec<&Image> = frozen.iter().map(|f| &f.image).collect();
        state.check_sample(folder, &images, &disks, &changed)?;
        state.follow(folder, &changed, &disks)?;
        return Ok(changed);
    }
    for (i, frozen) in frozen.iter().enumerate() {
        let size = frozen.image.virtual_size();
        let disk = SyncedDisk {
            size,
            file: state::copy_name(&state.name, i),
            links: frozen.now.links.clone(),
        };
        Refill::create(&folder.join(&disk.file), size)?;
        disk.restart(folder, Extents::default())?;
        state.disks.push(disk);
    }
    state.save(folder)?;
    Ok(vec![Extents::default(); frozen.len()])
}

/// Fails if the target has no room for the new data.
fn check_room(state: &SyncState, folder: &Path, work: &[Work]) -> Result<()> {
    Ok(copy::check_room(folder, room(state, folder, work)?)?)
}

/// Bytes of the new data, without those that replace others.
fn room(state: &SyncState, folder: &Path, work: &[Work]) -> Result<u64> {
    let mut needed = 0u64;
    for (disk, work) in state.disks.iter().zip(work) {
        let there = Refill::data(&folder.join(&disk.file))?;
        let new = work.recorded.minus(&there).bytes();
        needed = needed.saturating_add(new);
    }
    Ok(needed)
}

/// The ranges of a disk to copy: those with data or with changes. `trimmed` leaves out what a trim
/// of the disk would remove.
pub(super) fn used(image: &Image, changed: &Extents, trimmed: bool) -> Result<Extents> {
    let mut wanted = DataMap::of(image)?.extents(image.virtual_size());
    wanted.extend(changed);
    if !trimmed {
        return Ok(wanted);
    }
    let export = Export::<dyn BlockRead>::open_readonly(image)?;
    let disk = export.disk();
    // A disk whose contents are unreadable is copied unchanged.
    let layout = partition::read_layout(disk.as_ref());
    let guest = layout
        .ok()
        .and_then(|layout| embedded::open(disk.clone(), &layout).ok());
    let unneeded = guest.map(|guest| trim::unneeded(&guest, &wanted));
    drop(disk);
    export.close()?;
    Ok(match unneeded {
        Some(unneeded) => wanted.minus(&unneeded),
        None => wanted,
    })
}

fn copy(
    order: &Order,
    ui: &Ui,
    folder: &Path,
    state: &SyncState,
    work: &[(&Frozen, Work)],
) -> Result<()> {
    let total: u64 = work.iter().map(|(_, work)| work.bytes()).sum();
    let shown = crate::ui::bytes(total);
    ui.status(
        "Syncing",
        &format!("{shown} that is used and not copied yet"),
    );
    let progress = ui.progress("Syncing", total);
    let mut before = 0;
    for (disk, (frozen, work)) in state.disks.iter().zip(work) {
        let mut journal = match disk.journal(folder)? {
            Some(journal) => journal,
            None => disk.restart(folder, Extents::default())?,
        };
        let refill = Refill {
            source: &frozen.image,
            target: &folder.join(&disk.file),
            pace: order.pace.as_ref(),
            cancel: None,
        };
        let done = refill.run(work, &mut journal, &mut |bytes| {
            progress.set(before + bytes);
        });
        done.map_err(kept)?;
        before += work.bytes();
    }
    progress.finish(total);
    Ok(())
}

/// Adds that the copied data is kept and that the same command continues.
fn kept(error: CopyError) -> Error {
    let error = Error::from(error);
    match error.is_interrupted() || stop::requested() {
        true => error,
        false => error.hint("what is copied is kept: the same command continues"),
    }
}

#[cfg(test)]
#[path = "pass_tests.rs"]
mod tests;
