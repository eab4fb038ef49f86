//! [`Export`]: an image opened by its own storage daemon, as a block device to read or write.
//!
//! The type determines the permitted operations: `Export<dyn BlockRead>` cannot write, and QEMU
//! opened the image read-only. The daemon gets the listening socket, in which this process's
//! connection is already waiting. The socket's directory is removed before the daemon starts. So
//! nobody else can connect, and nothing is left behind however the process ends. It stays only for
//! the guestfish engine ([`DaemonAccess::User`]).
//!
//! A raw image used only by this process needs no daemon: it is read directly as a file, on another
//! host too. An overlay of this run over one of this host needs none either: it is written by
//! [`super::overlay_writer`] and read by [`super::overlay`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::cache::Cached;
use super::chain::Image;
use super::empty::create_overlay;
use super::error::ImageError;
use super::hold::Held;
use super::nbd::{Nbd, Patience};
use super::overlay::{Content, Overlay};
use super::overlay_writer::OverlayWriter;
use super::pool::{MORE, Pool};
use crate::block::{BlockRead, BlockWrite, FileDisk, file_data};
use crate::files::Scratch;
use crate::stop;
use crate::tool::qemu_img::{Depth, Part};
use crate::tool::{Child, ToolError, cmd, qsd};
use crate::transfer::Extents;

/// The name of the export on the storage daemon's socket.
pub const EXPORT: &str = "disk";
/// The unit of a qcow2's size.
const SECTOR: u64 = 512;
/// The time for a daemon to end after it has disconnected.
const FAIL_LIMIT: Duration = Duration::from_secs(5);
/// The time for it to respond after the run was asked to stop.
const STOPPING: Duration = Duration::from_millis(500);
/// The same while it writes to the source: a started write is better finished, or undone.
const STOPPING_SOURCE: Duration = Duration::from_secs(30);

type Disk = Cached<Nbd>;

#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("{} exists already", path.display())]
    Exists { path: std::path::PathBuf },
    #[error("setting up the storage daemon")]
    Setup(#[source] io::Error),
    #[error("flushing {}", path.display())]
    Flush {
        path: std::path::PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("closing {}", path.display())]
    Close {
        path: std::path::PathBuf,
        #[source]
        source: ToolError,
    },
}

impl From<ExportError> for crate::error::Error {
    fn from(e: ExportError) -> Self {
        let error = Self::failed(e.to_string());
        match e {
            ExportError::Image(e) => e.into(),
            ExportError::Exists { .. } => error,
            ExportError::Setup(source) | ExportError::Flush { source, .. } => error.because(source),
            ExportError::Close { source, .. } => error.because(source),
        }
    }
}

pub type Result<T, E = ExportError> = std::result::Result<T, E>;

/// A running storage daemon and the connection to it. [`Export::close`] closes it. Dropping it
/// kills the daemon, and then only flushed data is certain to be stored.
pub struct Export<D: ?Sized> {
    disk: Arc<D>,
    behind: Behind,
    image: Image,
    writable: bool,
    /// The directory of the socket, if others have to connect too.
    folder: Option<Scratch>,
}

/// The access to an open image.
enum Behind {
    /// The file is read directly.
    Nothing,
    Overlay(Arc<OverlayWriter>),
    Daemon(Daemon),
}

struct Daemon {
    connection: Arc<Disk>,
    process: Child,
    /// Further connections to it.
    pool: Option<Arc<Pool>>,
}

impl Daemon {
    /// Joins all its connections to one disk.
    fn pool(&mut self, more: Vec<Nbd>) -> Arc<Pool> {
        let pool = Arc::new(Pool::new(self.connection.clone(), more));
        self.pool = Some(pool.clone());
        pool
    }
}

/// The programs that may connect to the storage daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DaemonAccess {
    /// Only this process.
    Private,
    /// Other programs of this user, through [`Export::socket`].
    User,
}

impl Export<dyn BlockRead> {
    pub fn open_readonly(image: &Image) -> Result<Self> {
        Self::open_readonly_for(image, DaemonAccess::Private)
    }

    pub fn open_readonly_for(image: &Image, access: DaemonAccess) -> Result<Self> {
        let (disk, behind, folder): (Arc<dyn BlockRead>, _, _) = match direct(image)? {
            Some(disk) if access == DaemonAccess::Private => (disk, Behind::Nothing, None),
            _ => {
                #[cfg(test)]
                if let Some((disk, folder)) = super::stand_in::readable(image, access) {
                    return Ok(Self::stand_in(disk, image, folder));
                }
                let (daemon, folder) = start(image, false, access)?;
                (daemon.connection.clone(), Behind::Daemon(daemon), folder)
            }
        };
        Ok(Self {
            disk,
            behind,
            image: image.clone(),
            writable: false,
            folder,
        })
    }

    /// Opens the image for a copy: read through several connections, past the cache.
    pub(crate) fn open_for_copy(image: &Image) -> Result<Self> {
        let (disk, behind): (Arc<dyn BlockRead>, _) = match direct_for(image, Use::Copy)? {
            Some(disk) => (disk, Behind::Nothing),
            None => {
                #[cfg(test)]
                if let Some(disk) = super::stand_in::below(image) {
                    return Ok(Self::stand_in(disk, image, None));
                }
                let (mut daemon, more) = start_several(image, false)?;
                (daemon.pool(more), Behind::Daemon(daemon))
            }
        };
        Ok(Self {
            disk,
            behind,
            image: image.clone(),
            writable: false,
            folder: None,
        })
    }
}

impl Export<dyn BlockWrite> {
    /// Creates a qcow2 at `overlay` that takes all writes; the image itself is only read. The
    /// overlay does not name its backing file, so it is usable only with [`Export::image`].
    pub fn open_overlay(image: &Image, overlay: &Path) -> Result<Self> {
        Self::open_overlay_for(image, overlay, DaemonAccess::Private)
    }

    pub fn open_overlay_for(image: &Image, overlay: &Path, access: DaemonAccess) -> Result<Self> {
        if overlay.symlink_metadata().is_ok() {
            return Err(ExportError::Exists {
                path: overlay.into(),
            });
        }
        let below = match access {
            DaemonAccess::Private => direct_file(image)?.map(|disk| Arc::new(disk) as _),
            DaemonAccess::User => None,
        };
        #[cfg(test)]
        let below = below.or_else(|| super::stand_in::below(image));
        let image = image.with_overlay(overlay)?;
        let size = image.virtual_size();
        let failed = |e| ImageError::from_io(overlay, e);
        create_overlay(image.path(), size).map_err(failed)?;
        match below.filter(|_| size.is_multiple_of(SECTOR)) {
            Some(below) => {
                let writer = OverlayWriter::open(image.path(), below);
                let writer = Arc::new(writer.map_err(failed)?);
                Ok(Self {
                    disk: writer.clone(),
                    behind: Behind::Overlay(writer),
                    image,
                    writable: true,
                    folder: None,
                })
            }
            None => Self::open_writable_for(&image, access),
        }
    }

    /// Opens the image itself as the target of a copy. It is written through several connections,
    /// and durable after a flush even if the image is of this run.
    pub(crate) fn open_as_target(image: &Image) -> Result<Self> {
        let image = image.durable();
        let (mut daemon, more) = start_several(&image, true)?;
        Ok(Self {
            disk: daemon.pool(more),
            behind: Behind::Daemon(daemon),
            image,
            writable: true,
            folder: None,
        })
    }

    /// Opens the image itself for writing.
    pub fn open_writable(image: &Image) -> Result<Self> {
        Self::open_writable_for(image, DaemonAccess::Private)
    }

    fn open_writable_for(image: &Image, access: DaemonAccess) -> Result<Self> {
        #[cfg(test)]
        if let Some(disk) = super::stand_in::writable(image) {
            let export = Self::stand_in(disk, image, None);
            return Ok(Self {
                writable: true,
                ..export
            });
        }
        let (daemon, folder) = start(image, true, access)?;
        Ok(Self {
            disk: daemon.connection.clone(),
            behind: Behind::Daemon(daemon),
            image: image.clone(),
            writable: true,
            folder,
        })
    }
}

impl<D: ?Sized> Export<D> {
    /// A disk without a storage daemon, in tests on a host that lacks it.
    #[cfg(test)]
    fn stand_in(disk: Arc<D>, image: &Image, folder: Option<Scratch>) -> Self {
        Self {
            disk,
            behind: Behind::Nothing,
            image: image.clone(),
            writable: false,
            folder,
        }
    }

    /// The disk. All clones share one connection and one cache; none works after `close`.
    pub fn disk(&self) -> Arc<D> {
        self.disk.clone()
    }

    /// The exported image: after [`Export::open_overlay`] the overlay over its source.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The socket of the daemon's export [`EXPORT`] for other programs, with [`DaemonAccess::User`]. Their
    /// writes bypass the cache: [`Export::disk`] may then still return the old contents.
    pub fn socket(&self) -> Option<PathBuf> {
        self.folder.as_ref().map(|f| f.path().join(SOCKET))
    }

    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The daemon's process id, if there is one.
    pub fn daemon_id(&self) -> Option<u32> {
        match &self.behind {
            Behind::Daemon(daemon) => Some(daemon.process.id()),
            Behind::Nothing | Behind::Overlay(_) => None,
        }
    }

    /// Ends all writes, stops the daemon and returns its errors. Writes to an image that is not of
    /// this run are durable then.
    pub fn close(self) -> Result<()> {
        let path = self.image.path().to_owned();
        if stop::requested() && (!self.writable || self.image.top().scratch) {
            // Nothing of it is needed any more; dropping the guard kills a daemon.
            return match self.writable {
                true => Err(ExportError::Setup(stop::Interrupted.into())),
                false => Ok(()),
            };
        }
        let daemon = match self.behind {
            Behind::Nothing => return Ok(()),
            Behind::Overlay(writer) => {
                let flushed = writer.flush();
                return flushed.map_err(|source| ExportError::Flush { path, source });
            }
            Behind::Daemon(daemon) => daemon,
        };
        let flushed = if self.writable {
            daemon.connection.flush()
        } else {
            Ok(())
        };
        if let Some(pool) = &daemon.pool {
            pool.disconnect();
        }
        daemon.connection.inner().disconnect();
        let closed = daemon.process.close(cmd::silence());
        // A dead daemon explains why the flush failed, and gives more detail.
        closed.map_err(|source| ExportError::Close {
            path: path.clone(),
            source,
        })?;
        flushed.map_err(|source| ExportError::Flush { path, source })
    }
}

/// The image without a storage daemon: a plain file, or an overlay of this run over one.
pub fn direct(image: &Image) -> Result<Option<Arc<dyn BlockRead>>> {
    direct_for(image, Use::Guest)
}

/// The intended use of a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// Random reads: through one connection and its cache, on another host.
    Guest,
    /// Sequential reads by several threads, each over its own connection.
    Copy,
}

fn direct_for(image: &Image, what: Use) -> Result<Option<Arc<dyn BlockRead>>> {
    if let Some(disk) = direct_plain(image, what)? {
        return Ok(Some(disk));
    }
    let overlay = direct_overlay(image, what)?;
    Ok(overlay.map(|overlay| Arc::new(overlay) as Arc<dyn BlockRead>))
}

fn direct_plain(image: &Image, what: Use) -> Result<Option<Arc<dyn BlockRead>>> {
    let Some(remote) = image.plain_remote() else {
        let disk = direct_file(image)?;
        return Ok(disk.map(|disk| Arc::new(disk) as Arc<dyn BlockRead>));
    };
    if remote.size() != image.virtual_size() {
        return Ok(None);
    }
    Ok(Some(match what {
        Use::Guest => remote,
        Use::Copy => {
            let pool = remote.for_copy(MORE);
            Arc::new(pool.map_err(|e| ImageError::from_io(image.path(), e))?)
        }
    }))
}

fn direct_file(image: &Image) -> Result<Option<FileDisk>> {
    let Some(held) = image.plain_file().filter(|held| held.remote().is_none()) else {
        return Ok(None);
    };
    let failed = |e| ExportError::Image(ImageError::from_io(held.path(), e));
    let file = held.file().try_clone().map_err(failed)?;
    let disk = FileDisk::from_file(file).map_err(failed)?;
    Ok((disk.size() == image.virtual_size()).then_some(disk))
}

fn direct_overlay(image: &Image, what: Use) -> Result<Option<Overlay>> {
    let Some((overlay, below)) = image.scratch_over() else {
        return Ok(None);
    };
    let Some(below) = direct_plain(&below, what)? else {
        return Ok(None);
    };
    let opened = Overlay::open(overlay, below);
    Ok(opened.map_err(|e| ImageError::from_io(overlay, e))?)
}

/// A plain file of this host, and the contents of this run's overlay over it.
pub(super) struct Differences {
    pub(super) file: File,
    pub(super) data: Extents,
    pub(super) zeroes: Extents,
}

/// The plain file and the overlay; `None` for any other image.
pub(super) fn differences(image: &Image) -> io::Result<Option<Differences>> {
    let below = match image.scratch_over() {
        Some((_, below)) => below,
        None => image.clone(),
    };
    let Some(held) = below.plain_file().filter(|held| held.remote().is_none()) else {
        return Ok(None);
    };
    let file = held.file().try_clone()?;
    let mut differences = Differences {
        file,
        data: Extents::default(),
        zeroes: Extents::default(),
    };
    if image.scratch_over().is_none() {
        return Ok(Some(differences));
    }
    let Some(overlay) = direct_overlay(image, Use::Guest).map_err(io::Error::other)? else {
        return Ok(None);
    };
    for (range, content) in overlay.parts(0..image.virtual_size()) {
        match content {
            Some(Content::Data(_)) => differences.data.insert(range),
            Some(Content::Zeroes) => differences.zeroes.insert(range),
            None => {}
        }
    }
    Ok(Some(differences))
}

/// Passes every range with data of an image that is read without a storage daemon to `found`, in
/// order. `None` if the image needs a daemon.
pub fn plain_data(image: &Image, found: &mut dyn FnMut(Range<u64>)) -> Option<io::Result<()>> {
    plain_parts(image, &mut |range, part| {
        if part != Part::Zeroes {
            found(range);
        }
    })
}

/// The same, with the zeroes that the image itself contains.
pub(crate) fn plain_parts(
    image: &Image,
    found: &mut dyn FnMut(Range<u64>, Part),
) -> Option<io::Result<()>> {
    let size = image.virtual_size();
    if let Some(plain) = Plain::of(image) {
        let mut found = |range| found(range, Part::Data(Depth::Top));
        return Some(plain.data(0..size, &mut found));
    }
    let (_, below) = image.scratch_over()?;
    let below = Plain::of(&below)?;
    match direct_overlay(image, Use::Guest) {
        Ok(overlay) => {
            let overlay = overlay?;
            let mut parts = overlay.parts(0..size);
            Some(parts.try_for_each(|(range, content)| match content {
                Some(content) => {
                    found(
                        range,
                        match content {
                            Content::Data(_) => Part::Data(Depth::Top),
                            Content::Zeroes => Part::Zeroes,
                        },
                    );
                    Ok(())
                }
                None => below.data(range, &mut |range| {
                    found(range, Part::Data(Depth::Below));
                }),
            }))
        }
        Err(error) => Some(Err(io::Error::other(error))),
    }
}

/// The ranges that an overlay of this run itself contains, zeroes included. `None` if it is not over a plain file.
pub(crate) fn own_ranges(overlay: &Image) -> Option<io::Result<Extents>> {
    let mut own = Extents::default();
    let found = plain_parts(overlay, &mut |range, part| {
        if part != Part::Data(Depth::Below) {
            own.insert(range);
        }
    });
    Some(found?.map(|()| own))
}

/// A file that is the disk byte for byte.
enum Plain {
    Here(Held),
    /// On another host, where no part is known to be a hole.
    Elsewhere,
}

impl Plain {
    fn of(image: &Image) -> Option<Self> {
        if let Some(remote) = image.plain_remote() {
            return (remote.size() == image.virtual_size()).then_some(Self::Elsewhere);
        }
        let held = image.plain_file().filter(|held| held.remote().is_none());
        held.cloned().map(Self::Here)
    }

    /// Passes the ranges of a part that have data to `found`.
    fn data(&self, part: Range<u64>, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        match self {
            Self::Here(held) => file_data(held.file(), part, found),
            Self::Elsewhere => {
                found(part);
                Ok(())
            }
        }
    }
}

type Started = (Daemon, Option<Scratch>);

fn start(image: &Image, writable: bool, access: DaemonAccess) -> Result<Started> {
    let (daemon, _, folder) = start_with(image, writable, access, 0)?;
    Ok((daemon, folder))
}

/// Starts a daemon with further connections, if the server keeps them consistent.
fn start_several(image: &Image, writable: bool) -> Result<(Daemon, Vec<Nbd>)> {
    let (daemon, more, _) = start_with(image, writable, DaemonAccess::Private, MORE)?;
    Ok((daemon, more))
}

fn start_with(
    image: &Image,
    writable: bool,
    access: DaemonAccess,
    more: usize,
) -> Result<(Daemon, Vec<Nbd>, Option<Scratch>)> {
    if writable {
        image.hold_for_writing()?;
    }
    let (listener, streams, folder) = socket(access, 1 + more).map_err(ExportError::Setup)?;
    let mut streams = streams.into_iter();
    let stream = streams.next().ok_or_else(|| {
        ExportError::Setup(io::Error::other("no connection to the storage daemon"))
    })?;
    let mut daemon = qsd::serve(listener.into(), &image.blockdev(writable), EXPORT, writable)
        .map_err(ImageError::from)?;
    let patience = Patience {
        silence: crate::tool::cmd::silence(),
        stopping: match writable && !image.top().scratch {
            true => STOPPING_SOURCE,
            false => STOPPING,
        },
    };
    match Nbd::handshake(stream, EXPORT, patience) {
        Ok(nbd) if writable && nbd.is_read_only() => Err(ExportError::Setup(io::Error::other(
            "the storage daemon exports the image read-only",
        ))),
        Ok(nbd) => {
            let several = !writable || nbd.can_be_several();
            let more: io::Result<Vec<Nbd>> = streams
                .filter(|_| several)
                .map(|stream| Nbd::handshake(stream, EXPORT, patience))
                .collect();
            let daemon = Daemon {
                connection: Arc::new(Cached::new(nbd)),
                process: daemon,
                pool: None,
            };
            Ok((daemon, more.map_err(ExportError::Setup)?, folder))
        }
        // The daemon disconnects if it cannot open the image, and then prints the reason.
        Err(e) if stop::requested() => Err(ExportError::Setup(e)),
        Err(e) => match daemon.wait(FAIL_LIMIT) {
            Err(error @ ToolError::Failed { .. }) => {
                Err(ImageError::from_tool(image.path(), error).into())
            }
            _ => Err(ExportError::Setup(e)),
        },
    }
}

const SOCKET: &str = "nbd";

/// Creates a listening socket with so many connections waiting in it. Its name is removed, unless
/// others have to connect; then it is in a directory that only this user can enter.
fn socket(
    access: DaemonAccess,
    connections: usize,
) -> io::Result<(UnixListener, Vec<UnixStream>, Option<Scratch>)> {
    let folder = Scratch::new()?;
    // The path of a socket may have 107 bytes; this one is short, whatever the directory.
    let handle = File::open(folder.path())?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", handle.as_raw_fd());
    let listener = UnixListener::bind(&path)?;
    let streams = (0..connections).map(|_| UnixStream::connect(&path));
    let streams = streams.collect::<io::Result<Vec<_>>>()?;
    if access == DaemonAccess::User {
        return Ok((listener, streams, Some(folder)));
    }
    folder.close()?;
    Ok((listener, streams, None))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_plain_file_tells_where_its_data_is() {
        let file = tempfile::tempfile().unwrap();
        let size = 64 << 20;
        file.set_len(size).unwrap();
        let data = |file: &File, size: u64| {
            let mut ranges = Vec::new();
            file_data(file, 0..size, &mut |range| ranges.push(range)).unwrap();
            ranges
        };
        assert_eq!(data(&file, size), []);
        assert_eq!(data(&file, 0), []);
        for at in [0, 8 << 20, size - 4096] {
            file.write_all_at(&[1; 4096], at).unwrap();
        }
        let ranges = data(&file, size);
        let holds = |at: u64| ranges.iter().any(|range| range.contains(&at));
        for at in [0, 4095, 8 << 20, size - 1] {
            assert!(holds(at), "{at} {ranges:?}");
        }
        // On a file system that supports holes, as temporary files of a test are.
        assert!(!holds(32 << 20), "{ranges:?}");
        assert!(ranges.iter().all(|range| range.end <= size));
    }
}
