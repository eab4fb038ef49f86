//! Source disks, opened for reading or for a fix.

pub mod engine;
pub mod vm;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::block::{BlockRead, BlockWrite};
use crate::disk::chain::Image;
use crate::disk::export::{self, Export};
use crate::disk::layout::DiskLayout;
use crate::disk::partition;
use crate::error::{Blocker, Error, ErrorKind, Result};
use crate::failpoint;
use crate::guest::joined::JoinedReader;
use crate::guest::keys::Keys;
use crate::guest::ntfs3g::MountOptions;
use crate::guest::{DiskId, EmbeddedWriter, GuestRead, GuestWrite, MountedWriter};
use crate::inspect::{self, InspectError, InspectOptions, SourceFacts, Survey};
use crate::source::SourceVm;
use crate::stop;
use crate::tool::appliance;
use crate::ui::Ui;

use engine::{Engine, Guest, open_error};
use vm::{OpenDisk, VmDisks, VmSession};

/// A disk of the source: opened once, checked, and locked as long as a clone of its image exists.
#[derive(Debug, Clone)]
pub struct Disk {
    pub id: DiskId,
    /// The path in the source.
    pub path: PathBuf,
    /// The image with its chain.
    pub image: Image,
    /// The keys of its encrypted volumes.
    pub keys: Keys,
}

/// Options for opening and reading the disks of a source.
#[derive(Debug, Clone, Default)]
pub struct Access {
    pub format: Option<String>,
    pub allow_backing: Vec<PathBuf>,
    pub inspect: InspectOptions,
    pub keys: Keys,
    pub opened: Opened,
}

impl Access {
    /// Opens the image of a disk; `format` is the one in its description.
    pub fn image(&self, path: &Path, format: Option<&str>) -> Result<Image> {
        let format = self.format.as_deref().or(format);
        self.opened.with(path, format, &self.allow_backing, |open| {
            Ok(open.image.clone())
        })
    }

    /// Opens a disk and checks its image: QEMU reads the missing end of a file as zeroes.
    pub fn disk(&self, id: DiskId, path: &Path, format: Option<&str>) -> Result<Disk> {
        let format = self.format.as_deref().or(format);
        let image = self
            .opened
            .with(path, format, &self.allow_backing, |open| {
                if !open.checked {
                    open.image.check()?;
                    open.checked = true;
                }
                Ok(open.image.clone())
            })?;
        Ok(Disk {
            id,
            path: path.to_path_buf(),
            image,
            keys: self.keys.of_disk(id),
        })
    }
}

/// The images of a run. Each is opened once, and locked as long as a clone of this exists.
#[derive(Debug, Clone, Default)]
pub struct Opened(Arc<Mutex<Vec<OpenImage>>>);

#[derive(Debug)]
struct OpenImage {
    path: PathBuf,
    format: Option<String>,
    image: Image,
    checked: bool,
}

impl Opened {
    fn with<T>(
        &self,
        path: &Path,
        format: Option<&str>,
        allow_backing: &[PathBuf],
        then: impl FnOnce(&mut OpenImage) -> Result<T>,
    ) -> Result<T> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |open: &OpenImage| open.path == path && open.format.as_deref() == format;
        let at = match all.iter().position(known) {
            Some(at) => at,
            None => {
                all.push(OpenImage {
                    path: path.to_owned(),
                    format: format.map(str::to_owned),
                    image: Image::open_info(path, format, allow_backing)?,
                    checked: false,
                });
                all.len() - 1
            }
        };
        then(&mut all[at])
    }

    /// Fails if somebody else has changed an opened file since.
    pub fn check_unchanged(&self) -> Result<()> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for open in all.iter() {
            open.image.check_unchanged()?;
        }
        Ok(())
    }
}

/// The source on the command line: a disk, or a VM with its disks.
#[derive(Debug, Clone)]
pub struct SourceMachine {
    /// The most bytes to which a packed disk may unpack, whatever it declares.
    pub max_unpacked: Option<u64>,
    /// `--engine embedded`: the libguestfs appliance is not started, whatever the disk contains.
    pub no_appliance: bool,
    pub vm: SourceVm,
    /// The path on the command line.
    pub path: PathBuf,
    pub access: Access,
}

impl SourceMachine {
    /// Opens the disks, after unpacking those that cannot be read in place. Unpacked files are
    /// named as if they were in `work`, which need not exist.
    pub fn disks(&self, work: &Path) -> Result<VmDisks> {
        let mut vm = self.vm.clone();
        vm.prepare(work, self.max_unpacked).map_err(|e| {
            let hint = e.hint();
            let error = Error::failed(format!("unpacking {}", self.path.display())).because(e);
            hint.into_iter().fold(error, Error::hint)
        })?;
        let count = vm.disks.len();
        let disks = vm.disks.iter().enumerate().map(|(i, disk)| {
            let id = DiskId::nth(i, count);
            self.access.disk(id, &disk.path, disk.format.as_deref())
        });
        let disks = disks.collect::<Result<_>>()?;
        VmDisks::look(disks, self, vm.unpacked.clone())
    }
}

/// A directory for the names of temporary disks, created on demand and removed at the end.
pub struct Names(PathBuf);

impl Default for Names {
    fn default() -> Self {
        Self::new()
    }
}

impl Names {
    pub fn new() -> Self {
        let name = format!("hyper2kvm-{}", uuid::Uuid::new_v4().simple());
        Self(std::env::temp_dir().join(name))
    }

    pub fn folder(&self) -> &Path {
        &self.0
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        // Usually it does not exist.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Inspects the disks of a VM and runs `look` on them while they are open.
pub fn look<T>(
    machine: &SourceMachine,
    engine: Engine,
    ui: &Ui,
    also: impl FnOnce(&Survey, &dyn GuestRead) -> T,
) -> Result<(Engine, Survey, T)> {
    let work = Names::new();
    let disks = machine.disks(work.folder())?;
    disks.check_kernel()?;
    let (session, survey) = VmSession::open(engine, &disks, ui, read_only)?;
    let seen = also(&survey, &session.reader());
    let engine = session.engine;
    session.close()?;
    looked()?;
    machine.access.opened.check_unchanged()?;
    Ok((engine, survey, seen))
}

/// Announces the start of libguestfs' appliance, and why it takes long if it does.
pub fn announce_appliance(ui: &Ui, why: &str) {
    let how = appliance::without_kvm().map_or_else(String::new, |fault| {
        format!("; emulated, which takes longer: {fault}")
    });
    ui.status(
        "Starting",
        &format!("the libguestfs appliance ({why}){how}"),
    );
}

/// The failpoint of the verbs that only read; a signal ends them here at the latest.
pub(crate) fn looked() -> Result<()> {
    failpoint::hit("looked").map_err(|e| Error::failed("inspecting").because(e))?;
    match stop::requested() {
        true => Err(Error::new(
            ErrorKind::Interrupted,
            "interrupted; nothing was changed",
        )),
        false => Ok(()),
    }
}

/// Opens an unmodified disk.
pub fn read_only(engine: Engine, disk: &Disk) -> Result<OpenDisk> {
    let session = Session::read_by(engine, disk, &disk.image)?;
    Ok(OpenDisk::Read(session))
}

/// One disk behind a storage daemon, with its volumes.
pub struct Session<D: BlockRead + ?Sized> {
    pub export: Export<D>,
    pub layout: DiskLayout,
    pub guest: Guest,
    pub engine: Engine,
    pub facts: SourceFacts,
    id: DiskId,
    /// A writer whose volume is mounted already.
    mounted: Cell<Option<MountedWriter>>,
}

impl Session<dyn BlockRead> {
    /// Reads inside this process.
    pub fn read(disk: &Disk) -> Result<Self> {
        Self::read_by(Engine::EMBEDDED, disk, &disk.image)
    }

    /// Reads `image`: that of the disk, or an overlay on it.
    pub fn read_by(engine: Engine, source: &Disk, image: &Image) -> Result<Self> {
        let export = Export::open_readonly_for(image, engine.access())?;
        let disk = export.disk();
        Self::over(engine, export, disk, source, image)
    }
}

impl Session<dyn BlockRead> {
    /// Adds an overlay that takes writes, and its writer if there is one already. The disk itself
    /// is read as before.
    pub(crate) fn with_overlay(
        self,
        export: Export<dyn BlockWrite>,
        mounted: Option<MountedWriter>,
    ) -> Session<dyn BlockWrite> {
        Session {
            export,
            layout: self.layout,
            guest: self.guest,
            engine: self.engine,
            facts: self.facts,
            id: self.id,
            mounted: Cell::new(mounted),
        }
    }
}

impl Session<dyn BlockWrite> {
    /// Opens the disk under a new overlay for reads and writes; the disk stays unchanged.
    pub fn overlay(engine: Engine, source: &Disk, overlay: &Path) -> Result<Self> {
        let image = &source.image;
        let export = Export::open_overlay_for(image, overlay, engine.access())?;
        // Below the overlay is the guest before the fix: a plain file need not be read through the
        // daemon.
        let below = match engine.writes_past_us() {
            false => export::direct(image)?,
            true => None,
        };
        let disk = below.unwrap_or_else(|| export.disk());
        Self::over(engine, export, disk, source, image)
    }
}

impl<D: BlockRead + ?Sized> Session<D> {
    fn over(
        engine: Engine,
        export: Export<D>,
        disk: Arc<dyn BlockRead>,
        source: &Disk,
        image: &Image,
    ) -> Result<Self> {
        let shown = source.path.display();
        let layout = partition::read_layout(disk.as_ref()).map_err(|e| e.of(&shown))?;
        let guest = engine
            .open(&export, disk, &layout, &source.keys)
            .map_err(|e| open_error(e, &shown.to_string()))?;
        Ok(Self {
            engine,
            export,
            layout,
            guest,
            facts: SourceFacts {
                path: crate::text::of_path(&source.path).into_owned(),
                format: image.format().driver().to_string(),
                virtual_size_bytes: image.virtual_size(),
            },
            id: source.id,
            mounted: Cell::default(),
        })
    }

    /// The inspection's view of the disk besides its volumes.
    pub fn disk(&self) -> inspect::Disk {
        inspect::Disk {
            id: self.id,
            layout: self.layout.clone(),
            source: self.facts.clone(),
        }
    }

    /// Stops the storage daemon and returns its errors.
    pub fn close(self) -> Result<()> {
        drop(self.guest);
        Ok(self.export.close()?)
    }

    /// Inspects this disk alone.
    pub fn inspect(&self) -> Result<Survey> {
        let guest = JoinedReader::new(vec![(self.id, self.guest.reader.as_ref())]);
        inspect::inspect(&guest, &[self.disk()], &InspectOptions::default())
            .map_err(|e| refusal(e, &self.facts.path))
    }
}

impl Session<dyn BlockWrite> {
    /// A writer to the overlay, with the engine that reads it.
    pub fn writer(&self, options: MountOptions) -> Box<dyn GuestWrite> {
        match self.mounted.take() {
            Some(mounted) => Box::new(EmbeddedWriter::from(mounted)),
            None => self.guest.writer(self.export.disk(), &self.layout, options),
        }
    }

    pub(crate) fn into_export(self) -> (Export<dyn BlockWrite>, DiskLayout) {
        (self.export, self.layout)
    }
}

pub(crate) fn refusal(error: InspectError, path: &str) -> Error {
    match error {
        InspectError::SeveralRoots { .. } => Error::refused(
            format!("{path} has more than one Windows"),
            vec![Blocker::new(
                "several-windows",
                error.to_string(),
                "name one of these with --root",
            )],
        ),
        InspectError::NoSuchRoot { .. } | InspectError::BadRoot(_) => Error::usage(
            error.to_string(),
        )
        .hint("--root takes a directory of the guest as found, e.g. '2:\\Windows' for partition 2, '1/2:\\Windows' for that of disk 1"),
        InspectError::Path(source) => Error::usage("--root is not a path in a guest")
            .because(source)
            .hint("--root takes a directory like '2:\\Windows'"),
        other => Error::failed(format!("inspecting {path}")).because(other),
    }
}

#[cfg(test)]
mod tests;
