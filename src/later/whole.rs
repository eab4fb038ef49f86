//! A disk on another host in several files, or in a format that QEMU does not read over NBD.
//! Examples are a chain of snapshots, a VMDK in pieces, and a VHDX.
//!
//! ```text
//!  QEMU --socket beside the overlay--> storage daemon, the chain as one raw disk --> child that dials --> host
//! ```
//!
//! The chain is opened like in a conversion, and one storage daemon exports its contents. So the VM
//! sees one raw disk, whatever the source consists of, and libvirt needs no driver for it.

use std::collections::HashMap;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::wire::{LONG, OnWire, Whole};
use crate::block::BlockRead;
use crate::disk::export::{DaemonAccess, EXPORT, Export};
use crate::disk::hold::Held;
use crate::disk::nbd::{Nbd, Patience};
use crate::disk::remote::{self, Doubt, RemoteFile};
use crate::disk::{Image, ImageError};
use crate::error::{Error, Result};
use crate::source::mirror;
use crate::tool::{Child, qsd};
use crate::wire::Access;

/// The time for the daemon to open the chain: each link needs a connection.
const OPENING: Duration = Duration::from_secs(90);

/// Connects this run to a disk under the name in its overlay.
pub(super) fn connect(was: &OnWire) -> Result<()> {
    let name = was.backing_name();
    let placeholder = match &was.whole {
        None => was.open(LONG)?,
        // It is registered already, with a daemon that serves it.
        Some(_) if remote::backing(&name).is_some() => return Ok(()),
        Some(whole) => placeholder(was, whole)?,
    };
    remote::register_backing(&name, &placeholder);
    Ok(())
}

/// The first difference on the other host, if there is one.
pub(super) fn changed(was: &OnWire) -> Result<Option<String>> {
    match &was.whole {
        Some(whole) => Ok(look(was, whole, LONG)?.err()),
        None => was.changed(),
    }
}

/// Describes the disk of an image, if a later run can open it by the URL of its first file.
pub(super) fn of(image: &Image) -> Result<OnWire, String> {
    let mut files = Vec::new();
    for held in image.held() {
        let part = part(held)?;
        let known = |file: &OnWire| file.url == part.url;
        if !files.iter().any(known) {
            files.push(part);
        }
    }
    let mut files = files.into_iter();
    let mut named = files.next().ok_or("is no file")?;
    named.whole = Some(Whole {
        format: image.format().driver().to_owned(),
        size_bytes: image.virtual_size(),
        more: files.collect(),
    });
    Ok(named)
}

fn part(held: &Held) -> Result<OnWire, String> {
    if held.origin().is_none() {
        return Err("is partly on this host and partly on another".into());
    }
    let part = OnWire::of(held)?;
    let at = part
        .location()
        .map_err(|e| format!("cannot be named: {e}"))?;
    // A member of an archive has no URL of its own.
    if Path::new(at.path()).file_name() != held.path().file_name() {
        return Err(
            "is packed in an archive there, so nothing can start from it where it is".into(),
        );
    }
    Ok(part)
}

/// Opens the present image, or returns the first difference.
fn look(was: &OnWire, whole: &Whole, patience: Duration) -> Result<Result<Image, String>> {
    let path = match was.open(patience) {
        Ok(path) => path,
        Err(error) if error.is_not_found() => return Ok(Err("it is gone".into())),
        Err(error) => return Err(error.into()),
    };
    let root = remote::root_of(&path).into_iter().collect::<Vec<_>>();
    let image = match Image::open_info(&path, Some(&whole.format), &root) {
        Ok(image) => image,
        // It could be opened when it was converted.
        Err(error) => match error {
            ImageError::Tool(_) | ImageError::Io { .. } | ImageError::Permission { .. } => {
                return Err(error.into());
            }
            error => return Ok(Err(error.to_string())),
        },
    };
    if image.virtual_size() != whole.size_bytes {
        let (was, now) = (whole.size_bytes, image.virtual_size());
        return Ok(Err(format!("its disk had {was} bytes and has {now} now")));
    }
    let mut seen = HashMap::new();
    for held in image.held() {
        let url = held.origin().map(|remote| remote.file().shown());
        seen.insert(url.unwrap_or_default(), held);
    }
    for file in was.files() {
        let Some(held) = seen.remove(&file.url) else {
            return Ok(Err(format!("{} does not belong to it any more", file.url)));
        };
        if let Some(what) = file.differs(held)? {
            return Ok(Err(match file.url == was.url {
                true => what,
                false => format!("{}: {what}", file.url),
            }));
        }
    }
    match seen.into_keys().next() {
        Some(url) => Ok(Err(format!("{url} belongs to it now"))),
        None => Ok(Ok(image)),
    }
}

fn opened(was: &OnWire, whole: &Whole, patience: Duration) -> Result<Image> {
    look(was, whole, patience)?.map_err(|what| Error::failed(format!("{}: {what}", was.url)))
}

/// The whole disk for this process and the programs it starts.
struct Served {
    shown: String,
    size: u64,
    modified_ms: u64,
    image: Image,
    export: Mutex<Option<Export<dyn BlockRead>>>,
}

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Served({})", self.shown)
    }
}

impl RemoteFile for Served {
    fn shown(&self) -> String {
        self.shown.clone()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn modified_ms(&self) -> u64 {
        self.modified_ms
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let mut slot = self.export.lock().unwrap_or_else(PoisonError::into_inner);
        let export = match slot.take() {
            Some(export) => export,
            None => Export::open_readonly_for(&self.image, DaemonAccess::User)
                .map_err(io::Error::other)?,
        };
        let socket = slot.insert(export).socket();
        UnixStream::connect(socket.unwrap_or_default())
    }

    fn export(&self) -> &str {
        EXPORT
    }

    fn check_unchanged(&self) -> Result<(), Doubt> {
        let mut origins = self.image.held().filter_map(Held::origin);
        origins.try_for_each(|remote| remote.file().check_unchanged())
    }
}

/// The local placeholder of the whole disk.
fn placeholder(was: &OnWire, whole: &Whole) -> Result<PathBuf> {
    let image = opened(was, whole, LONG)?;
    let failed = |e: io::Error| Error::failed(format!("reading {}", was.url)).because(e);
    let root = remote::root_of(image.path())
        .ok_or_else(|| Error::failed(format!("{} is on no other host", was.url)))?;
    let file = tempfile::Builder::new().prefix(".whole-").tempfile_in(root);
    let (file, path) = file.map_err(failed)?.keep().map_err(|e| failed(e.error))?;
    // The file system does not support files of that length, but the wire does.
    let _ = file.set_len(whole.size_bytes);
    let served = Served {
        shown: was.url.clone(),
        size: whole.size_bytes,
        modified_ms: was.modified_ms,
        image,
        export: Mutex::new(None),
    };
    remote::register(&file, Arc::new(served), false).map_err(failed)?;
    Ok(path)
}

/// A storage daemon with the whole disk on the socket beside the overlay.
pub(super) struct Daemon {
    child: Mutex<Child>,
    /// Keeps its files open, and the children that connect running.
    image: Image,
}

impl Daemon {
    pub(super) fn start(was: &OnWire, whole: &Whole) -> Result<Self> {
        let shown = was.socket.display();
        let failed = |e: io::Error| Error::failed(format!("listening at {shown}")).because(e);
        let image = opened(was, whole, Access::default().patience)?;
        let listener = listen(&was.socket).map_err(failed)?;
        let stream = UnixStream::connect(&was.socket).map_err(failed)?;
        // Without a name, like a served file of the other host.
        let child = qsd::serve(listener.into(), &image.blockdev(false), "", false)
            .map_err(ImageError::from)?;
        let patience = Patience {
            silence: OPENING,
            stopping: Duration::from_millis(500),
        };
        Nbd::handshake(stream, "", patience).map_err(failed)?;
        Ok(Self {
            child: Mutex::new(child),
            image,
        })
    }

    /// The reason why it has ended.
    pub(super) fn ended(&self) -> Option<Error> {
        let dead = mirror::broken(self.image.path()).map(Error::from);
        dead.or_else(|| {
            let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
            let ended = child.try_wait().is_ok_and(|status| status.is_none());
            (!ended).then(|| Error::failed(format!("{} ended: {}", qsd::TOOL, child.stderr_tail())))
        })
    }
}

/// Creates a socket that only this user can reach, from its creation on.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let private = tempfile::Builder::new()
        .prefix(".serve-")
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(directory)?;
    let handle = File::open(private.path())?;
    let name = format!("/proc/self/fd/{}/s", handle.as_raw_fd());
    let listener = UnixListener::bind(&name)?;
    std::fs::set_permissions(private.path().join("s"), Permissions::from_mode(0o600))?;
    std::fs::rename(private.path().join("s"), path)?;
    Ok(listener)
}
