//! What this process gives up before it looks at a disk, and all the programs it starts with it: writing
//! elsewhere than it must, and the network. A kernel without the means gets the same run without it.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::tool::confine;

/// Where programs keep temporary files and sockets.
fn temporary() -> Vec<PathBuf> {
    let mut below: Vec<PathBuf> = ["/var/tmp", "/run"].map(PathBuf::from).into();
    below.push(std::env::temp_dir());
    for name in [
        "XDG_RUNTIME_DIR",
        "LIBGUESTFS_CACHEDIR",
        "LIBGUESTFS_TMPDIR",
    ] {
        below.extend(std::env::var_os(name).map(PathBuf::from));
    }
    below
}

/// From here on nothing is written but below these paths and where temporary files are. Paths that are
/// yet to be made are made below one that is there.
pub fn writes<'p>(below: impl IntoIterator<Item = &'p Path>) -> Result<()> {
    let mut all = temporary();
    for path in below {
        let there = path
            .ancestors()
            .find(|p| !p.as_os_str().is_empty() && p.exists());
        all.push(there.unwrap_or(Path::new(".")).to_owned());
    }
    let enforced = confine::writes_only(&all)
        .map_err(|e| Error::failed("limiting where is written").because(e))?;
    if !enforced {
        tracing::debug!("this kernel has no landlock");
    }
    Ok(())
}

/// The same, and no network: for verbs whose programs need none.
pub fn looks<'p>(below: impl IntoIterator<Item = &'p Path>) -> Result<()> {
    writes(below)?;
    confine::offline().map_err(|e| Error::failed("giving up the network").because(e))
}
