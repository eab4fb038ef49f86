//! Restricts this process, and all the programs it starts, before it reads a disk: no writes except
//! where needed, and no network. A kernel without these features runs the same steps without the
//! restrictions.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::failpoint;
use crate::tool::{confine, launcher};

/// Directories for programs' temporary files and sockets.
fn temporary() -> Vec<PathBuf> {
    let mut below = vec![PathBuf::from("/var/tmp"), std::env::temp_dir()];
    for name in [
        "XDG_RUNTIME_DIR",
        "LIBGUESTFS_CACHEDIR",
        "LIBGUESTFS_TMPDIR",
    ] {
        below.extend(std::env::var_os(name).map(PathBuf::from));
    }
    below
}

/// Whether a program that needs the network may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Network {
    Kept,
    GivenUp,
}

/// The paths to which a verb writes.
#[derive(Debug, Default)]
pub struct Writes<'p> {
    /// Created if it does not exist, because a rule needs an existing path. One for its parent
    /// would permit writing to everything else there.
    pub folder: Option<&'p Path>,
    /// Existing paths: devices, disks, other directories.
    pub there: Vec<&'p Path>,
}

/// Restricts writes to these paths and those of temporary files.
pub fn writes(below: &Writes<'_>) -> Result<()> {
    give_up(below, Network::Kept)?;
    hit()
}

/// Restricts writes, and denies the network: for verbs whose programs need none.
pub fn looks(below: &Writes<'_>) -> Result<()> {
    give_up(below, Network::GivenUp)?;
    confine::offline().map_err(|e| Error::failed("giving up the network").because(e))?;
    hit()
}

fn hit() -> Result<()> {
    failpoint::hit("confined").map_err(|e| Error::failed("restricting this program").because(e))
}

fn give_up(below: &Writes<'_>, network: Network) -> Result<()> {
    if let Some(folder) = below.folder {
        // The later writer reports a path that cannot be created.
        let _ = crate::files::create_passage(folder);
    }
    let mut all = temporary();
    for path in below.folder.iter().chain(&below.there) {
        if is_root_folder(path) {
            return Err(Error::usage(
                "the output directory would lie in / itself, where nothing else could be protected from writes",
            )
            .hint("name one that lies in another directory, e.g. -o /var/tmp/NAME"));
        }
        all.push(path.to_path_buf());
    }
    all.retain(|path| !is_root_folder(path));
    let enforced = launcher::writes_only(&all, network == Network::Kept)
        .map_err(|e| Error::failed("restricting write access").because(e))?;
    if !enforced {
        tracing::debug!("this kernel has no landlock");
    }
    Ok(())
}

fn is_root_folder(path: &Path) -> bool {
    path.canonicalize()
        .is_ok_and(|path| path.parent().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_folder_by_any_name() {
        for (path, root) in [
            ("/", true),
            ("/usr/..", true),
            ("/usr", false),
            ("/no/such", false),
        ] {
            assert_eq!(is_root_folder(Path::new(path)), root, "{path}");
        }
    }
}
