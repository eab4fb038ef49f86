//! Checks the resources that this process needs.

use std::path::Path;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{Error, Result};
use crate::ui;

/// Address space sufficient for every started program.
const ADDRESS_SPACE: u64 = 2 << 30;
/// Memory below which this program itself may be killed.
const LEAST: u64 = 512 << 20;

/// Fails without `/proc`, through which open files and child processes are reached.
pub fn need_proc() -> Result<()> {
    if Path::new("/proc/self/fd").exists() && Path::new("/proc/self/exe").exists() {
        return Ok(());
    }
    Err(Error::missing_tool("/proc is not mounted here")
        .hint("mount it (mount -t proc proc /proc); a container or chroot needs its own"))
}

/// Raises the limit of open files: a chain may have hundreds of files, each open once.
pub fn allow_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        // If that is refused, the present limit may suffice.
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: maximum,
                maximum,
            },
        );
    }
}

/// Memory below which not even the command line can be read.
const FOR_A_MESSAGE: u64 = 64 << 20;

/// Prints an error, without allocating memory, if there is too little memory for anything else.
pub fn has_memory_to_speak() -> bool {
    let enough = |limit: u64| limit >= FOR_A_MESSAGE;
    if getrlimit(Resource::As).current.is_none_or(enough) {
        return true;
    }
    let text = b"error: too little memory is allowed\n  hint: the address space is limited \
                 to less than 64 MiB (ulimit -v), 2 GiB are needed: ulimit -v unlimited\n";
    // stderr may be closed.
    let _ = rustix::io::write(rustix::stdio::stderr(), text);
    false
}

/// Fails if memory is so low that later errors could not be reported.
pub fn need_memory() -> Result<()> {
    match getrlimit(Resource::As).current {
        Some(limit) if limit < LEAST => Err(Error::missing_tool("too little memory is allowed")),
        _ => Ok(()),
    }
}

/// A possible cause of a failure: a memory limit lower than programs need.
pub fn too_little_memory() -> Option<String> {
    let limit = getrlimit(Resource::As).current?;
    (limit < ADDRESS_SPACE).then(|| {
        format!(
            "the address space is limited to {} (ulimit -v), {} are needed: ulimit -v unlimited",
            ui::bytes(limit),
            ui::bytes(ADDRESS_SPACE)
        )
    })
}
