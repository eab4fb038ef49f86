//! A source disk opened for looking at or for fixing.

pub mod engine;
pub mod vm;

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
use crate::guest::{DiskId, GuestRead, GuestWrite};
use crate::inspect::{self, InspectError, InspectOptions, SourceFacts, Survey};
use crate::source::SourceVm;
use crate::stop;
use crate::tool::appliance;
use crate::ui::Ui;

use engine::{Engine, Guest, open_error};
use vm::{OpenDisk, VmDisks, VmSession};

/// A disk of the source: opened once, checked, and held as long as a clone of its image is there.
#[derive(Debug, Clone)]
pub struct Disk {
    pub id: DiskId,
    /// As the source names it.
    pub path: PathBuf,
    /// With its chain.
    pub image: Image,
    /// For its encrypted volumes.
    pub keys: Keys,
}

/// How the disks of a source are opened and read.
#[derive(Debug, Clone, Default)]
pub struct Access {
    pub format: Option<String>,
    pub allow_backing: Vec<PathBuf>,
    pub inspect: InspectOptions,
    pub keys: Keys,
    pub opened: Opened,
}

impl Access {
    /// The image of a disk; `format` is what its description says.
    pub fn image(&self, path: &Path, format: Option<&str>) -> Result<Image> {
        let format = self.format.as_deref().or(format);
        self.opened.with(path, format, &self.allow_backing, |open| {
            Ok(open.image.clone())
        })
    }

    /// The disk, and its image checked: QEMU reads the missing end of a file as zeroes.
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

/// The images of a run. Each is opened once, and held as long as a clone of this is there.
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

    /// Fails when a file that was opened was changed by somebody else since.
    pub fn check_unchanged(&self) -> Result<()> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for open in all.iter() {
            open.image.check_unchanged()?;
        }
        Ok(())
    }
}

/// What the command line names: a disk, or a VM with its disks.
#[derive(Debug, Clone)]
pub struct SourceMachine {
    /// Bytes a packed disk may unpack to, whatever it declares.
    pub max_unpacked: Option<u64>,
    /// `--engine embedded`: the libguestfs appliance is not started, whatever the disk holds.
    pub no_appliance: bool,
    pub vm: SourceVm,
    /// What the command line names.
    pub path: PathBuf,
    pub access: Access,
}

impl SourceMachine {
    /// Unpacks what cannot be read in place, and opens the disks. What is unpacked is called as if it were in
    /// `work`, which need not be there.
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

/// A directory for the names of temporary disks, made when there are some and removed in the end.
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
        // Usually it is not there.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Looks at the disks of a VM, with something to look at besides while they are open.
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

/// Tells that libguestfs' appliance is started, and why it takes long where it does.
pub fn announce_appliance(ui: &Ui, why: &str) {
    let how = appliance::without_kvm().map_or_else(String::new, |fault| {
        format!("; emulated, which takes longer: {fault}")
    });
    ui.status(
        "Starting",
        &format!("the libguestfs appliance ({why}){how}"),
    );
}

/// The fail point of the verbs that only read, which a signal ends here at the latest.
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

/// Opens a disk as it is.
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
}

impl Session<dyn BlockRead> {
    /// Reads inside this process.
    pub fn read(disk: &Disk) -> Result<Self> {
        Self::read_by(Engine::EMBEDDED, disk, &disk.image)
    }

    /// Reads `image`: that of the disk, or an overlay on it.
    pub fn read_by(engine: Engine, source: &Disk, image: &Image) -> Result<Self> {
        let export = Export::open_readonly_for(image, engine.reach())?;
        let disk = export.disk();
        Self::over(engine, export, disk, source, image)
    }
}

impl Session<dyn BlockRead> {
    /// The same disk, read as before, with an overlay that takes writes.
    pub(crate) fn with_overlay(self, export: Export<dyn BlockWrite>) -> Session<dyn BlockWrite> {
        Session {
            export,
            layout: self.layout,
            guest: self.guest,
            engine: self.engine,
            facts: self.facts,
            id: self.id,
        }
    }
}

impl Session<dyn BlockWrite> {
    /// Reads and writes go to a new overlay; the disk stays unchanged.
    pub fn overlay(engine: Engine, source: &Disk, overlay: &Path) -> Result<Self> {
        let image = &source.image;
        let export = Export::open_overlay_for(image, overlay, engine.reach())?;
        // What is below the overlay is what the guest was before the fix: no need to read it through
        // the daemon where it is a plain file.
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
        })
    }

    /// What inspection needs of the disk besides its volumes.
    pub fn disk(&self) -> inspect::Disk {
        inspect::Disk {
            id: self.id,
            layout: self.layout.clone(),
            source: self.facts.clone(),
        }
    }

    /// Ends the storage daemon and reports what went wrong with that.
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
    /// Writes to the overlay, with the engine it is read by.
    pub fn writer(&self, options: MountOptions) -> Box<dyn GuestWrite> {
        self.guest.writer(self.export.disk(), &self.layout, options)
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
                "name one with --root, as it is listed here",
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
