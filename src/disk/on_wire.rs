//! Files of an image on another host: as a node of QEMU's, as one disk.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::between;
use super::compose::{Composed, Piece};
use super::detect::{self, Format, VmdkExtent};
use super::error::{ImageError, Result};
use super::hold::Held;
use super::remote::{self, ReadAt, Remote, RemoteFile};
use crate::tool::pass::Passed;
use crate::tool::spec::Spec;

/// The node of a file on another host, with a new connection. If that fails, QEMU gets a closed one
/// and reports the error.
pub(super) fn nbd_node(file: &dyn RemoteFile, sockets: &mut Vec<Passed>) -> Value {
    let connected = file.connect().or_else(|e| {
        tracing::warn!("{}: {e}", file.shown());
        UnixStream::pair().map(|(end, _)| end)
    });
    let number = connected.ok().map(|stream| {
        let stream = Arc::new(File::from(OwnedFd::from(stream)));
        let passed = Passed::new(stream, Path::new(&file.shown()), false);
        let number = passed.number();
        sockets.push(passed);
        number
    });
    json!({
        "driver": "nbd",
        "server": {"type": "fd", "str": number.unwrap_or(-1).to_string()},
        "export": file.export(),
        "read-only": true,
    })
}

/// The backing node for an image of that size that names `name` as its backing file
/// ([`remote::register_backing`]), in a format.
pub(crate) fn named_backing(name: &str, format: &str, size: u64, spec: &mut Spec) -> Result<Value> {
    let placeholder = remote::backing(name).unwrap_or_else(|| name.into());
    let held = Held::open(&placeholder)?;
    let io_error = |e| ImageError::from_io(&placeholder, e);
    let missing = || io_error(io::ErrorKind::NotFound.into());
    let remote = held.remote().ok_or_else(missing)?;
    let file = nbd_node(&**remote.file(), &mut spec.sockets);
    let empty = Arc::new(between::empty(size).map_err(io_error)?);
    let below = json!({"driver": format, "file": file, "read-only": true});
    let node = between::under(&empty, below);
    spec.passed.push(Passed::new(empty, &placeholder, false));
    Ok(node)
}

/// The file with its start replaced.
pub(super) fn with_head(remote: &Remote, head: Vec<u8>) -> Arc<Remote> {
    let (file, at) = (remote.file(), head.len() as u64);
    let rest = Piece::of(file, at, file.size().saturating_sub(at));
    Remote::new(Composed::of(vec![Piece::bytes(head), rest]))
}

/// An image on another host, with a header that names no backing file. QEMU looks for the directory
/// of a relative name even if it is given the backing node, and NBD has no directories.
pub(super) fn without_backing(file: &Held, format: Format) -> io::Result<Option<Arc<Remote>>> {
    let Some(remote) = file.remote() else {
        return Ok(None);
    };
    if !matches!(format.driver(), "qcow2" | "qcow") {
        return Ok(None);
    }
    let mut head = vec![0; 512.min(remote.file().size()) as usize];
    remote.read_exact_at(&mut head, 0)?;
    // The offset of the name, and its length.
    if let Some(name) = head.get_mut(8..20) {
        name.fill(0);
    }
    Ok(Some(with_head(remote, head)))
}

pub(super) fn is_flat(extent: &VmdkExtent) -> bool {
    matches!(&*extent.kind.to_ascii_uppercase(), "FLAT" | "VMFS")
}

/// Joins the extents of a flat VMDK on another host to one disk, because QEMU's vmdk driver does
/// not accept remote ones.
pub(super) fn joined(path: &Path, text: &[u8], parts: &[Held]) -> Result<Arc<Remote>> {
    let unsupported = |reason: &str| ImageError::Unsupported {
        path: path.into(),
        reason: reason.into(),
        remedy: "make one file of it there (vmkfstools -i DISK.vmdk COPY.vmdk on ESXi, vmware-vdiskmanager -r elsewhere), \
                 or copy its files into one directory here",
    };
    let mut parts = parts.iter();
    let mut pieces = Vec::new();
    for part in detect::layout(text) {
        let length = part.sectors().saturating_mul(512);
        let detect::Part::Extent(extent) = part else {
            pieces.push(Piece::zero(length));
            continue;
        };
        if !is_flat(&extent) {
            return Err(unsupported(
                "it is in several pieces, some of which are sparse, and those are not read over the wire",
            ));
        }
        let remote = parts.next().and_then(Held::remote);
        let remote = remote.ok_or_else(|| unsupported("one of its extents is on no other host"))?;
        let at = extent.offset.unwrap_or(0).saturating_mul(512);
        pieces.push(Piece::of(remote.file(), at, length));
    }
    Ok(Remote::new(Composed::of(pieces)))
}
