//! One pass of `sync`.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::disk::Image;
use crate::disk::copy::CopyError;
use crate::disk::refill::Refill;
use crate::disk::export::Export;
use crate::disk::{BlockRead, partition};
use crate::error::{Blocker, Error, Result};
use crate::fix::trim::DataMap;
use crate::guest::{FsKind, GuestRead, embedded};
use crate::source::SourceVm;
use crate::tool::stop;
use crate::transfer::{Extents, Pace};
use crate::ui::Ui;

use super::super::name::safe_name;
use super::super::place::Place;
use super::changes;
use super::state::{self, Pass, State, SyncedDisk};

/// What is to be synced where.
pub struct Order {
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
    links: Vec<state::Link>,
    /// What a VM writes to now takes on this host.
    growing: u64,
}

/// Makes one pass over every disk and returns the state after it.
pub fn run(order: &Order, ui: &Ui) -> Result<State> {
    let start = Instant::now();
    let place = Place::open(&order.folder, true)?;
    let _lock = place.lock()?;
    let folder = place.target.clone();
    let mut frozen = Vec::new();
    ui.status("Looking", &order.source.display().to_string());
    for disk in &order.vm.disks {
        frozen.push(open(order, disk)?);
    }
    let mut state = load(order, &folder)?;
    let changed = begin(&mut state, &frozen, &folder)?;
    let mut wanted = Vec::new();
    for ((disk, frozen), changed) in state.disks.iter().zip(&frozen).zip(&changed) {
        let done = disk.journal(&folder)?;
        let done = done.map_or_else(Extents::default, |journal| journal.done().clone());
        wanted.push(used(&frozen.image, changed)?.minus(&done));
    }
    let total = wanted.iter().map(Extents::bytes).sum();
    let overhead = start.elapsed().as_secs_f64();
    ui.status("Syncing", &format!("{} that is used and not copied yet", crate::ui::bytes(total)));
    let copying = Instant::now();
    copy(order, ui, &folder, &state, &frozen, &wanted)?;
    for frozen in &frozen {
        frozen.image.check_unchanged()?;
    }
    let left = frozen.iter().map(|f| f.growing).sum();
    let changed = changed.iter().map(Extents::bytes).sum();
    let seconds = (overhead, copying.elapsed().as_secs_f64());
    note(&mut state, changed, total, left, seconds);
    state.save(&folder)?;
    Ok(state)
}

/// Adds the pass that ends now. `seconds`: before the copy, and of it.
fn note(state: &mut State, changed: u64, copied: u64, left: u64, seconds: (f64, f64)) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let at = now.map_or(0, |since| since.as_secs());
    let since = state.passes.last().map(|last| at.saturating_sub(last.at).max(1));
    let (overhead_s, copy_s) = seconds;
    state.passes.push(Pass {
        at,
        seconds: overhead_s + copy_s,
        overhead_s,
        changed,
        copied,
        left,
        change_rate: since.map_or(0.0, |since| changed as f64 / since as f64),
        projected_s: 0.0,
    });
    let projected_s = super::last::projection(state, left);
    if let Some(pass) = state.passes.last_mut() {
        pass.projected_s = projected_s;
    }
}

/// The links of a disk that nobody writes to.
fn open(order: &Order, disk: &crate::source::SourceDisk) -> Result<Frozen> {
    let shown = disk.path.display();
    if disk.packed.is_some() {
        return Err(Error::usage(format!("{shown} is packed, and no VM runs from it"))
            .hint("hyper2kvm convert does it in one go"));
    }
    let format = order.format.as_deref().or(disk.format.as_deref());
    let Some(image) = Image::open_frozen(&disk.path, format, &order.allow_backing)? else {
        let blocker = Blocker::new(
            "sync-nothing-frozen",
            format!("{shown} stands on no other image: a running VM writes to all of it"),
            "take a snapshot of the VM first (all disks, without its memory), or convert it when it is off",
        );
        return Err(Error::refused("there is nothing that can be copied now", vec![blocker]));
    };
    let links = changes::links(&image)?;
    Ok(Frozen {
        growing: size_of_newest(&disk.path),
        image,
        links,
    })
}

/// What the newest link takes on this host, with the file that a VMware delta keeps its data in.
fn size_of_newest(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let stem = path.file_stem().unwrap_or_default();
    let beside = |end: &str| {
        let mut name = stem.to_owned();
        name.push(end);
        path.with_file_name(name)
    };
    let files = [path.to_owned(), beside("-delta.vmdk"), beside("-sesparse.vmdk")];
    let sizes = files.iter().filter_map(|file| file.metadata().ok());
    sizes.map(|meta| meta.blocks().saturating_mul(512)).sum()
}

fn load(order: &Order, folder: &Path) -> Result<State> {
    if let Some(state) = State::load(folder)? {
        return Ok(state);
    }
    let name = order.name.as_deref().unwrap_or(&order.vm.name);
    let state = State::new(&safe_name(name), &order.source);
    match std::fs::read_dir(folder) {
        Ok(mut entries) if entries.next().is_some() => {
            return Err(Error::failed(format!(
                "{} holds something else than a synced VM",
                folder.display()
            ))
            .hint("choose another folder with --output-dir"));
        }
        Ok(_) => {}
        Err(_) => crate::files::create_private(folder)
            .map_err(|e| Error::failed(format!("creating {}", folder.display())).because(e))?,
    }
    Ok(state)
}

/// Takes out of each journal what has changed, and notes the links of this pass. In this order: a run
/// that is killed in between finds the same changes again. Returns what has changed of each disk.
fn begin(state: &mut State, frozen: &[Frozen], folder: &Path) -> Result<Vec<Extents>> {
    if state.disks.is_empty() {
        for (i, frozen) in frozen.iter().enumerate() {
            let size = frozen.image.virtual_size();
            let disk = SyncedDisk {
                size,
                file: state::copy_name(&state.name, i),
                links: frozen.links.clone(),
            };
            Refill::create(&folder.join(&disk.file), size)?;
            disk.restart(folder, Extents::default())?;
            state.disks.push(disk);
        }
        state.save(folder)?;
        return Ok(vec![Extents::default(); frozen.len()]);
    }
    let sizes: Vec<u64> = frozen.iter().map(|f| f.image.virtual_size()).collect();
    let chains: Vec<&[state::Link]> = frozen.iter().map(|f| f.links.as_slice()).collect();
    let changed = state.take_out(folder, &sizes, &chains)?;
    for (disk, frozen) in state.disks.iter_mut().zip(frozen) {
        disk.links.clone_from(&frozen.links);
    }
    state.save(folder)?;
    Ok(changed)
}

impl State {
    /// Takes what has changed since the last pass out of the journals.
    pub(super) fn take_out(
        &self,
        folder: &Path,
        sizes: &[u64],
        chains: &[&[state::Link]],
    ) -> Result<Vec<Extents>> {
        let over = "hyper2kvm release gives the synced folder up; then sync it anew";
        if sizes.iter().ne(self.disks.iter().map(|disk| &disk.size)) {
            let blocker = Blocker::new(
                "sync-disks-changed",
                "the VM has other disks than it had, or disks of another size",
                over,
            );
            return Err(Error::refused("this is not the VM that was synced", vec![blocker]));
        }
        let mut all = Vec::new();
        for (disk, chain) in self.disks.iter().zip(chains) {
            let Some(changed) = changes::since(&disk.links, chain) else {
                let blocker = Blocker::new(
                    "sync-base-changed",
                    format!("the image at the bottom of the chain of {} was written to or replaced since the last pass", disk.file),
                    over,
                );
                return Err(Error::refused("nothing tells what has changed", vec![blocker]));
            };
            all.push((disk, changed));
        }
        for (disk, changed) in &all {
            let done = disk.journal(folder)?;
            let done = done.map_or_else(Extents::default, |journal| journal.done().clone());
            disk.restart(folder, done.minus(changed))?;
        }
        Ok(all.into_iter().map(|(_, changed)| changed).collect())
    }
}

/// What of a disk is worth copying: what it has data for or has changed, and its file systems use.
fn used(image: &Image, changed: &Extents) -> Result<Extents> {
    let size = image.virtual_size();
    let mut wanted = DataMap::of(image)?.extents(size);
    wanted.extend(changed);
    let export = Export::<dyn BlockRead>::open_readonly(image)?;
    let disk = export.disk();
    // What cannot be read as a disk is copied as it is.
    let layout = partition::read_layout(disk.as_ref());
    let guest = layout.ok().and_then(|layout| embedded::open(disk.clone(), &layout).ok());
    if let Some(guest) = guest {
        let volumes = guest.volumes().iter();
        for volume in volumes.filter(|v| matches!(v.kind, FsKind::Ntfs | FsKind::Fat)) {
            let mut free = Extents::default();
            let looked = guest.free_ranges(volume.id, &|_| true, &mut |range| {
                free.insert(range);
                Ok(())
            });
            match looked {
                Ok(_) => free.iter().for_each(|range| wanted.remove(range)),
                Err(e) => tracing::info!("{}: its free space is copied: {e}", volume.id),
            }
        }
    }
    export.close()?;
    Ok(wanted)
}

fn copy(
    order: &Order,
    ui: &Ui,
    folder: &Path,
    state: &State,
    frozen: &[Frozen],
    wanted: &[Extents],
) -> Result<()> {
    let total: u64 = wanted.iter().map(Extents::bytes).sum();
    let progress = ui.progress("Syncing", total);
    let mut before = 0;
    for ((disk, frozen), ranges) in state.disks.iter().zip(frozen).zip(wanted) {
        let journal = disk.journal(folder)?;
        let mut journal = match journal {
            Some(journal) => journal,
            None => disk.restart(folder, Extents::default())?,
        };
        let refill = Refill {
            source: &frozen.image,
            target: &folder.join(&disk.file),
            pace: order.pace.as_ref(),
            cancel: None,
        };
        let done = refill.run(ranges, &Extents::default(), &mut journal, &mut |bytes| {
            progress.set(before + bytes);
            let _ = crate::failpoint::hit("syncing");
        });
        done.map_err(kept)?;
        before += ranges.bytes();
    }
    progress.finish(total);
    Ok(())
}

/// The copy is as good as before: the same command goes on.
pub(super) fn kept(error: CopyError) -> Error {
    let interrupted = stop::requested();
    let error = Error::from(error);
    match interrupted {
        true => error,
        false => error.hint("what is copied is kept: the same command goes on"),
    }
}

/// Whether a name in the folder is of a sync.
#[expect(dead_code, reason = "for release")]
fn is_own(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.contains(".sync."))
}
