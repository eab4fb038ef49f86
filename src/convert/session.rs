//! A source disk opened for looking at or for fixing.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::disk::block::{BlockRead, BlockWrite};
use crate::disk::chain::Image;
use crate::disk::export::{self, Export};
use crate::disk::layout::DiskLayout;
use crate::disk::partition;
use crate::error::{Blocker, Error, ErrorKind, Result};
use crate::guest::keys::Keys;
use crate::guest::{FsKind, GuestRead};
use crate::inspect::{self, InspectError, InspectOptions, OsFamily, SourceFacts, Survey};
use crate::source::SourceVm;
use crate::ui::Ui;

use super::engine::{Engine, Guest};

/// How a source image is named.
#[derive(Debug, Clone)]
pub struct Source {
    pub path: PathBuf,
    pub format: Option<String>,
    pub allow_backing: Vec<PathBuf>,
    pub root: Option<String>,
    /// Take a volume that was not unmounted cleanly.
    pub force_dirty: bool,
    /// For encrypted volumes.
    pub keys: Keys,
    pub opened: Opened,
}

impl Source {
    /// The image with its chain, checked: QEMU reads the missing end of a file as zeroes.
    pub fn image(&self) -> Result<Image> {
        let format = self.format.as_deref();
        self.opened.checked(&self.path, format, &self.allow_backing)
    }

    fn holds(&self) -> Result<Holds> {
        let session = Session::read(self, &self.image()?)?;
        let closed = [FsKind::Bitlocker, FsKind::Luks, FsKind::Lvm, FsKind::Ldm];
        let mut volumes = session.guest.reader.volumes().iter();
        let found = match session.inspect() {
            Ok(survey) if survey.inspection.os.family == OsFamily::Windows => Holds::Windows,
            // Several of them: there is one at least.
            Err(error) if error.kind == ErrorKind::Refused => Holds::Windows,
            _ if volumes.any(|v| closed.contains(&v.kind)) => Holds::Closed,
            _ => Holds::Other,
        };
        session.close()?;
        Ok(found)
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
    /// The image of that name.
    pub fn image(
        &self,
        path: &Path,
        format: Option<&str>,
        allow_backing: &[PathBuf],
    ) -> Result<Image> {
        self.with(path, format, allow_backing, |open| Ok(open.image.clone()))
    }

    fn checked(
        &self,
        path: &Path,
        format: Option<&str>,
        allow_backing: &[PathBuf],
    ) -> Result<Image> {
        self.with(path, format, allow_backing, |open| {
            if !open.checked {
                open.image.check()?;
                open.checked = true;
            }
            Ok(open.image.clone())
        })
    }

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

/// What a disk of several holds, as far as can be seen without an appliance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    Windows,
    /// Volumes that only guestfish opens: Windows may be on one.
    Closed,
    Other,
}

/// What the command line names: a disk, or a machine with its disks.
#[derive(Debug, Clone)]
pub struct SourceMachine {
    pub vm: SourceVm,
    pub path: PathBuf,
    pub format: Option<String>,
    pub allow_backing: Vec<PathBuf>,
    pub root: Option<String>,
    pub force_dirty: bool,
    pub keys: Keys,
    pub opened: Opened,
}

impl SourceMachine {
    /// Unpacks into `work` what cannot be read in place, and lists the disks, the one Windows is on
    /// first.
    pub fn disks(&self, work: &Path) -> Result<Vec<Source>> {
        let mut vm = self.vm.clone();
        if vm.is_packed() {
            std::fs::create_dir_all(work)
                .map_err(|e| Error::failed(format!("creating {}", work.display())).because(e))?;
        }
        vm.prepare(work).map_err(|e| {
            let hint = e.hint();
            let error = Error::failed(format!("unpacking {}", self.path.display())).because(e);
            hint.into_iter().fold(error, Error::hint)
        })?;
        let mut disks: Vec<Source> = vm
            .disks
            .iter()
            .map(|disk| Source {
                path: disk.path.clone(),
                format: self.format.clone().or_else(|| disk.format.clone()),
                allow_backing: self.allow_backing.clone(),
                root: self.root.clone(),
                force_dirty: self.force_dirty,
                keys: self.keys.clone(),
                opened: self.opened.clone(),
            })
            .collect();
        if disks.len() > 1 {
            let mut closed = None;
            let mut windows = None;
            for (i, disk) in disks.iter().enumerate() {
                match disk.holds()? {
                    Holds::Windows => {
                        windows = Some(i);
                        break;
                    }
                    Holds::Closed => closed = closed.or(Some(i)),
                    Holds::Other => {}
                }
            }
            if let Some(i) = windows.or(closed) {
                disks[..=i].rotate_right(1);
            }
        }
        Ok(disks)
    }
}

/// Looks at the disk Windows is on, with something to look at besides while it is open.
pub fn look<T>(
    machine: &SourceMachine,
    engine: Engine,
    ui: &Ui,
    also: impl FnOnce(&Survey, &dyn GuestRead) -> T,
) -> Result<(Engine, Survey, T)> {
    let work =
        tempfile::tempdir().map_err(|e| Error::failed("creating a temporary folder").because(e))?;
    let disks = machine.disks(work.path())?;
    let source = first(&disks)?;
    let image = source.image()?;
    let (session, survey) = open_with(engine, source, ui, |e| Session::read_by(e, source, &image))?;
    let seen = also(&survey, session.guest.reader.as_ref());
    let engine = session.engine;
    session.close()?;
    Ok((engine, survey, seen))
}

/// Opens the disk and looks at it; again with the other engine when that one sees more.
pub fn open_with<D: BlockRead + ?Sized>(
    engine: Engine,
    source: &Source,
    ui: &Ui,
    open: impl Fn(Engine) -> Result<Session<D>>,
) -> Result<(Session<D>, Survey)> {
    let open = |engine: Engine| {
        let _waiting = engine.starts_slowly().then(|| {
            ui.status(
                "Starting",
                &format!("the libguestfs appliance ({})", engine.why),
            );
            ui.waiting("Starting")
        });
        open(engine)
    };
    let session = open(engine)?;
    let survey = session.inspect()?;
    let seen = &survey.inspection;
    let Some(better) = engine.instead(seen, session.guest.reader.as_ref(), &source.keys) else {
        return Ok((session, survey));
    };
    session.close()?;
    let session = open(better)?;
    let survey = session.inspect()?;
    Ok((session, survey))
}

/// The disk Windows is on.
pub fn first(disks: &[Source]) -> Result<&Source> {
    disks
        .first()
        .ok_or_else(|| Error::failed("the source names no disk"))
}

/// One disk behind a storage daemon of ours, with its volumes.
pub struct Session<D: BlockRead + ?Sized> {
    pub export: Export<D>,
    pub layout: DiskLayout,
    pub guest: Guest,
    pub engine: Engine,
    pub facts: SourceFacts,
    root: Option<String>,
    force_dirty: bool,
}

impl Session<dyn BlockRead> {
    /// Reads inside this process.
    pub fn read(source: &Source, image: &Image) -> Result<Self> {
        Self::read_by(Engine::EMBEDDED, source, image)
    }

    pub fn read_by(engine: Engine, source: &Source, image: &Image) -> Result<Self> {
        let export = Export::open_readonly_for(image, engine.reach())?;
        let disk = export.disk();
        Self::over(engine, export, disk, source, image)
    }
}

impl Session<dyn BlockWrite> {
    /// Reads and writes go to a new overlay; `image` stays as it is.
    pub fn overlay(engine: Engine, source: &Source, image: &Image, overlay: &Path) -> Result<Self> {
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
        source: &Source,
        image: &Image,
    ) -> Result<Self> {
        let shown = source.path.display();
        let layout = partition::read_layout(disk.as_ref())
            .map_err(|e| Error::failed(format!("reading the partitions of {shown}")).because(e))?;
        let guest = engine.open(&export, disk, &layout, &source.keys, &shown.to_string())?;
        Ok(Self {
            engine: engine.because_of(guest.reader.as_ref()),
            export,
            layout,
            guest,
            facts: SourceFacts {
                path: source.path.display().to_string(),
                format: image.format().driver().to_string(),
                virtual_size_bytes: image.virtual_size(),
            },
            root: source.root.clone(),
            force_dirty: source.force_dirty,
        })
    }

    /// Ends the storage daemon and reports what went wrong with that.
    pub fn close(self) -> Result<()> {
        drop(self.guest);
        Ok(self.export.close()?)
    }

    pub fn inspect(&self) -> Result<Survey> {
        self.inspect_through(self.guest.reader.as_ref())
    }

    /// The same disk through another reader.
    pub fn inspect_through(&self, guest: &dyn GuestRead) -> Result<Survey> {
        let options = InspectOptions {
            root: self.root.clone(),
            force_dirty: self.force_dirty,
        };
        inspect::inspect(guest, &self.layout, self.facts.clone(), &options)
            .map_err(|e| refusal(e, &self.facts.path))
    }
}

fn refusal(error: InspectError, path: &str) -> Error {
    match error {
        InspectError::SeveralRoots { .. } => Error::refused(
            format!("{path} has more than one Windows"),
            vec![Blocker::new(
                "several-windows",
                error.to_string(),
                "name one with --root",
            )],
        ),
        InspectError::NoSuchRoot { .. } | InspectError::BadRoot(_) => Error::usage(
            error.to_string(),
        )
        .hint("--root takes a folder of the guest as found, e.g. '2:\\Windows' for partition 2"),
        InspectError::Path(source) => Error::usage("--root is not a path in a guest")
            .because(source)
            .hint("--root takes a folder like '2:\\Windows'"),
        other => Error::failed(format!("inspecting {path}")).because(other),
    }
}
