//! The disks of a VM, opened and inspected as one guest.
//!
//! Windows is on one disk. Its boot files may be on another. Then both are changed, each through
//! its own engine and overlay, and the firmware starts from the second. Every further disk is only
//! read.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use crate::block::{BlockRead, BlockWrite};
use crate::disk::export::Export;
use crate::disk::layout::DiskLayout;
use crate::error::{Error, Result};
use crate::guest::joined::{JoinedReader, JoinedWriter, KnownFile};
use crate::guest::ntfs3g::MountOptions;
use crate::guest::{DiskId, FsKind, GuestRead, GuestWrite, MountedWriter, VolumeId};
use crate::inspect::{self, InspectError, InspectOptions, Roles, Survey};
use crate::source::Unpacked;
use crate::threads::joined;
use crate::timeline;
use crate::ui::Ui;

use super::engine::Engine;
use super::{Disk, Session, SourceMachine, announce_appliance, refusal};

/// The disks of a VM in the order of the converted disks. The system's disk is first, the others
/// are in the order of the source. The id identifies a disk.
#[derive(Debug, Clone)]
pub struct VmDisks {
    list: Vec<Disk>,
    roles: Roles,
    pub options: InspectOptions,
    /// The source on the command line.
    path: PathBuf,
    /// Keeps unpacked disks in existence.
    _unpacked: Unpacked,
}

impl Deref for VmDisks {
    type Target = [Disk];

    fn deref(&self) -> &[Disk] {
        &self.list
    }
}

impl VmDisks {
    /// Finds Windows and its boot files on the disks, without an appliance.
    pub fn look(mut list: Vec<Disk>, of: &SourceMachine, unpacked: Unpacked) -> Result<Self> {
        let options = of.access.inspect.clone();
        let roles = match list.as_slice() {
            [] => return Err(Error::failed("the source names no disk")),
            [only] => Roles {
                system: only.id,
                boot: only.id,
            },
            several => find_roles(several, &options, &of.path)?,
        };
        list.sort_by_key(|disk| disk.id != roles.system);
        Ok(Self {
            list,
            roles,
            options,
            path: of.path.clone(),
            _unpacked: unpacked,
        })
    }

    /// With the roles told, for tests.
    #[cfg(test)]
    pub(crate) fn with_roles(list: Vec<Disk>, system: DiskId, boot: DiskId) -> Self {
        Self {
            list,
            roles: Roles { system, boot },
            options: InspectOptions::default(),
            path: PathBuf::new(),
            _unpacked: Unpacked::default(),
        }
    }

    /// Fails if the kernel uses a disk: it may write to the disk and takes no lock.
    pub fn check_kernel(&self) -> Result<()> {
        for disk in &self.list {
            disk.image.check_kernel()?;
        }
        Ok(())
    }

    /// Whether a conversion may change that disk.
    pub fn is_changed(&self, disk: DiskId) -> bool {
        disk == self.roles.system || disk == self.roles.boot
    }

    /// The disk with the system.
    pub fn system(&self) -> Result<&Disk> {
        let mut disks = self.list.iter();
        disks
            .find(|disk| self.is_system(disk.id))
            .ok_or_else(|| Error::failed("the source names no disk"))
    }

    pub fn is_system(&self, disk: DiskId) -> bool {
        disk == self.roles.system
    }

    /// The position of a disk in the firmware's boot order.
    ///
    /// Firmware that has to start from one disk may ignore the others: SeaBIOS skips virtio disks
    /// outside of a strict order, and OVMF connects only those in it. The boot manager on the first
    /// disk would then not see Windows on another. So if the two are on different disks, every disk
    /// has a position. Those that do not start keep the order of the source, because `boot.ini`
    /// counts disks.
    pub fn boot_order(&self, disk: DiskId) -> Option<u32> {
        let Roles { system, boot } = self.roles;
        if disk == boot {
            return Some(1);
        }
        let before = |other: DiskId| other != boot && other < disk;
        let count = self.list.iter().filter(|d| before(d.id)).count();
        (system != boot).then(|| u32::try_from(count).map_or(u32::MAX, |n| n.saturating_add(2)))
    }
}

fn find_roles(list: &[Disk], options: &InspectOptions, path: &Path) -> Result<Roles> {
    let mut sessions = Vec::new();
    for source in list {
        let session = Session::read(source)?;
        sessions.push((source.id, OpenDisk::Read(session)));
    }
    let vm = VmSession {
        disks: sessions,
        engine: Engine::EMBEDDED,
        options: options.clone(),
        path: path.to_path_buf(),
        known: Vec::new(),
    };
    let found = vm.roles();
    vm.close()?;
    found
}

/// A disk that is only read, or one with an overlay.
pub enum OpenDisk {
    Read(Session<dyn BlockRead>),
    Write(Session<dyn BlockWrite>),
}

impl OpenDisk {
    fn reader(&self) -> &dyn GuestRead {
        match self {
            Self::Read(session) => session.guest.reader.as_ref(),
            Self::Write(session) => session.guest.reader.as_ref(),
        }
    }

    fn disk(&self) -> inspect::Disk {
        match self {
            Self::Read(session) => session.disk(),
            Self::Write(session) => session.disk(),
        }
    }

    fn close(self) -> Result<()> {
        match self {
            Self::Read(session) => session.close(),
            Self::Write(session) => session.close(),
        }
    }
}

/// Every disk of a VM behind its own storage daemon, with its volumes.
pub struct VmSession {
    disks: Vec<(DiskId, OpenDisk)>,
    /// The engine for the disks that are changed; the embedded one reads the others.
    pub engine: Engine,
    options: InspectOptions,
    path: PathBuf,
    /// Written files that are being read back.
    known: Vec<KnownFile>,
}

/// Overlays that are being opened. Dropping this stops everything that still runs.
#[derive(Default)]
pub(crate) struct Opening(Vec<(DiskId, JoinHandle<Result<Overlay>>)>);

/// An overlay, and its writer if a volume in it is mounted already.
type Overlay = (Export<dyn BlockWrite>, Option<MountedWriter>);

impl Drop for Opening {
    fn drop(&mut self) {
        for (_, thread) in self.0.drain(..) {
            drop(thread.join());
        }
    }
}

/// An overlay whose guest was changed.
pub struct ChangedDisk {
    pub id: DiskId,
    pub export: Export<dyn BlockWrite>,
    pub layout: DiskLayout,
}

impl VmSession {
    /// Opens and inspects the disks, and again with the other engine if that one sees more. `open`
    /// opens the disks that a conversion changes.
    pub fn open(
        engine: Engine,
        disks: &VmDisks,
        ui: &Ui,
        open: impl Fn(Engine, &Disk) -> Result<OpenDisk>,
    ) -> Result<(Self, Survey)> {
        Self::open_knowing(engine, (disks, &[]), ui, open)
    }

    /// Opens the disks like [`Self::open`]; the written files that are still in memory are known.
    pub(crate) fn open_knowing(
        engine: Engine,
        (disks, known): (&VmDisks, &[KnownFile]),
        ui: &Ui,
        open: impl Fn(Engine, &Disk) -> Result<OpenDisk>,
    ) -> Result<(Self, Survey)> {
        let open_all = |engine: Engine| -> Result<Self> {
            let _waiting = engine.starts_slowly().then(|| {
                announce_appliance(ui, engine.why);
                ui.waiting("Starting")
            });
            let mut opened = Vec::new();
            for source in disks.iter() {
                let session = match disks.is_changed(source.id) {
                    true => open(engine, source)?,
                    false => OpenDisk::Read(Session::read(source)?),
                };
                opened.push((source.id, session));
            }
            Ok(Self {
                disks: opened,
                engine,
                options: disks.options.clone(),
                path: disks.path.clone(),
                known: known.to_vec(),
            })
        };
        let mut session = open_all(engine)?;
        session.engine = engine.because_of(&session.reader());
        let survey = session.inspect()?;
        let volumes = session.reader();
        let volumes = volumes.volumes().iter();
        let kinds: Vec<FsKind> = volumes
            .filter(|v| disks.is_changed(v.id.disk))
            .map(|v| v.kind)
            .collect();
        let has_key = disks
            .iter()
            .any(|d| disks.is_changed(d.id) && !d.keys.is_empty());
        let Some(better) = engine.instead(&survey.inspection, &kinds, has_key) else {
            return Ok((session, survey));
        };
        session.close()?;
        let session = open_all(better)?;
        let survey = session.inspect()?;
        Ok((session, survey))
    }

    /// Starts to open an overlay, at `path`, for every disk that will be changed and has none. The
    /// volume `system` is mounted in it.
    pub(crate) fn open_overlays(
        &self,
        (disks, system): (&VmDisks, Option<VolumeId>),
        path: impl Fn(&Disk) -> Result<PathBuf>,
    ) -> Result<Opening> {
        let options = MountOptions {
            force_dirty: self.options.force_dirty,
        };
        let mut opening = Opening::default();
        for (id, disk) in &self.disks {
            let source = disks.iter().find(|source| source.id == *id);
            let Some(source) = source.filter(|_| disks.is_changed(*id)) else {
                continue;
            };
            if let OpenDisk::Read(session) = disk {
                let (image, path) = (source.image.clone(), path(source)?);
                let volume = system.filter(|volume| volume.disk == *id);
                let direct = session.guest.direct(&session.layout);
                let open = move || {
                    let export = {
                        let _span = timeline::span("open the overlay");
                        Export::<dyn BlockWrite>::open_overlay(&image, &path)?
                    };
                    let mounted = direct.zip(volume).and_then(|(direct, volume)| {
                        let _span = timeline::span("mount the volume");
                        let writer = direct.writer(export.disk(), options);
                        writer.mount_early(volume.within())
                    });
                    Ok((export, mounted))
                };
                opening.0.push((*id, std::thread::spawn(open)));
            }
        }
        Ok(opening)
    }

    /// Waits for the overlays. After that their disks can be written to.
    pub(crate) fn take_overlays(&mut self, mut opening: Opening) -> Result<()> {
        for (id, thread) in opening.0.drain(..) {
            let (export, mounted) = joined(thread.join())?;
            let at = self.disks.iter().position(|(disk, _)| *disk == id);
            if let Some(at) = at {
                let (_, disk) = self.disks.remove(at);
                let disk = match disk {
                    OpenDisk::Read(session) => {
                        OpenDisk::Write(session.with_overlay(export, mounted))
                    }
                    written => written,
                };
                self.disks.insert(at, (id, disk));
            }
        }
        Ok(())
    }

    /// The volumes of all disks.
    pub fn reader(&self) -> JoinedReader<'_> {
        let disks = self.disks.iter();
        let disks = disks.map(|(id, disk)| (*id, disk.reader())).collect();
        JoinedReader::new(disks).knowing(&self.known)
    }

    /// A writer to the disks that have an overlay. The readers are invalid after it was closed.
    pub fn writer(&self, options: MountOptions) -> Box<dyn GuestWrite> {
        let writable = self.disks.iter().filter_map(|(id, disk)| match disk {
            OpenDisk::Write(session) => Some((*id, session.writer(options))),
            OpenDisk::Read(_) => None,
        });
        Box::new(JoinedWriter::new(writable.collect()))
    }

    pub fn inspect(&self) -> Result<Survey> {
        self.inspect_through(&self.reader())
    }

    /// Inspects the same disks through another reader.
    pub fn inspect_through(&self, guest: &dyn GuestRead) -> Result<Survey> {
        inspect::inspect(guest, &self.facts(), &self.options).map_err(|e| self.refusal(e))
    }

    fn facts(&self) -> Vec<inspect::Disk> {
        self.disks.iter().map(|(_, disk)| disk.disk()).collect()
    }

    fn refusal(&self, error: InspectError) -> Error {
        let path = match self.disks.as_slice() {
            [(_, only)] => only.disk().source.path,
            _ => self.path.display().to_string(),
        };
        refusal(error, &path)
    }

    /// The disk with Windows and the one with its boot files. If neither is visible: the first disk
    /// with a volume that only guestfish opens, or the first of all.
    fn roles(&self) -> Result<Roles> {
        let (guest, disks) = (self.reader(), self.facts());
        let closed = [FsKind::Bitlocker, FsKind::Luks, FsKind::Lvm, FsKind::Ldm];
        let volumes = guest.volumes().iter().filter(|v| closed.contains(&v.kind));
        let closed: Vec<VolumeId> = volumes.map(|v| v.id).collect();
        let root = self.options.root.as_deref();
        match inspect::roles(&guest, &disks, root) {
            Ok(Some(roles)) => return Ok(roles),
            Ok(None) => {}
            // It may name a directory on one of those volumes.
            Err(InspectError::NoSuchRoot { .. }) if !closed.is_empty() => {}
            Err(error) => return Err(self.refusal(error)),
        }
        let named = closed
            .iter()
            .find(|volume| inspect::root_may_be_on(root, **volume));
        let first = self.disks.first().map(|(id, _)| *id).unwrap_or_default();
        let system = named.or(closed.first()).map_or(first, |volume| volume.disk);
        Ok(inspect::roles_of(&guest, &disks, system))
    }

    /// Stops every storage daemon and returns their errors.
    pub fn close(self) -> Result<()> {
        let mut outcome = Ok(());
        for (_, disk) in self.disks {
            outcome = outcome.and(disk.close());
        }
        outcome
    }

    /// Closes the disks that were only read, and returns the overlays. Data that the engine wrote
    /// past our connections is visible through them.
    pub fn into_changed(self) -> Result<Vec<ChangedDisk>> {
        let mut changed = Vec::new();
        for (id, disk) in self.disks {
            match disk {
                OpenDisk::Read(session) => session.close()?,
                OpenDisk::Write(session) => {
                    let (mut export, layout) = session.into_export();
                    if self.engine.writes_past_us() {
                        let image = export.image().clone();
                        export.close()?;
                        export = Export::<dyn BlockWrite>::open_writable(&image)?;
                    }
                    changed.push(ChangedDisk { id, export, layout });
                }
            }
        }
        Ok(changed)
    }
}
