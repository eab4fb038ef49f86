//! What this process was given, and what it cannot do without.

use std::path::Path;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{Error, Result};
use crate::ui;

/// Address space with which every program that is started can work.
const ADDRESS_SPACE: u64 = 2 << 30;
/// With less than that this program itself may be ended for want of memory.
const LEAST: u64 = 512 << 20;

/// Open files and child processes are reached through `/proc`.
pub fn need_proc() -> Result<()> {
    if Path::new("/proc/self/fd").exists() && Path::new("/proc/self/exe").exists() {
        return Ok(());
    }
    Err(Error::missing_tool("/proc is not mounted here")
        .hint("mount it (mount -t proc proc /proc); a container or chroot needs its own"))
}

/// A chain may have hundreds of files, each open once.
pub fn allow_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        // Where that is refused, what there is may do.
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: maximum,
                maximum,
            },
        );
    }
}

/// With less than that not even the command line can be read.
const FOR_A_MESSAGE: u64 = 64 << 20;

/// Says so, without taking any memory, where there is too little for anything else.
pub fn has_memory_to_speak() -> bool {
    let enough = |limit: u64| limit >= FOR_A_MESSAGE;
    if getrlimit(Resource::As).current.is_none_or(enough) {
        return true;
    }
    let text = b"error: too little memory is allowed\n  hint: the address space is limited \
                 to less than 64 MiB (ulimit -v), 2 GiB are needed: ulimit -v unlimited\n";
    // Nobody may read it.
    let _ = rustix::io::write(rustix::stdio::stderr(), text);
    false
}

/// Fails where memory is so little that nothing could be said about it later.
pub fn need_memory() -> Result<()> {
    match getrlimit(Resource::As).current {
        Some(limit) if limit < LEAST => Err(Error::missing_tool("too little memory is allowed")),
        _ => Ok(()),
    }
}

/// What may be behind a failure: a limit on memory that is lower than what programs need.
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
