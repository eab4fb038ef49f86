//! `qemu-storage-daemon`: serves one image over NBD on a private Unix socket.
//!
//! The daemon inherits the listening socket as its stdin, so a client may connect before the daemon
//! is ready. No polling is needed, and no other process can intervene. It has no monitor and no
//! network, and access only to the files of the image ([`Spec::confinement`]), which it gets as
//! descriptors.

use std::os::fd::OwnedFd;

use serde_json::json;

use super::spec::Spec;
use super::{Child, Cmd, Result};

pub const TOOL: &str = "qemu-storage-daemon";

/// The required node name of the exported block device.
pub const NODE: &str = "disk";

/// Freed memory that the daemon may keep: more than all requests in flight.
const KEPT: &str = "33554432";

/// Starts the daemon on a listening Unix socket. `blockdev` describes the node [`NODE`].
pub fn serve(listener: OwnedFd, blockdev: &Spec, export: &str, writable: bool) -> Result<Child> {
    let export = json!({
        "type": "nbd", "id": "export", "node-name": NODE, "name": export, "writable": writable,
    });
    Cmd::new(TOOL)
        // It allocates a buffer for each request. By default glibc returns those to the kernel
        // immediately, and half of the time is spent on page faults.
        .env("MALLOC_MMAP_THRESHOLD_", KEPT)
        .env("MALLOC_TRIM_THRESHOLD_", KEPT)
        .args(["--blockdev", &blockdev.node.to_string()])
        .args(["--nbd-server", "addr.type=fd,addr.str=0"])
        .args(["--export", &export.to_string()])
        .confined(blockdev.confinement().serving())
        .pass(&blockdev.given())
        .stdin(listener)
        .spawn()
}
