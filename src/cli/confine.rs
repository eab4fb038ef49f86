//! What this process gives up before it looks at a disk, and all the programs it starts with it: writing
//! elsewhere than it must, and the network. A kernel without the means gets the same run without it.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::failpoint;
use crate::tool::{confine, launcher};

/// Where programs keep temporary files and sockets.
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

/// Whether a program is asked for that needs the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Network {
    Kept,
    GivenUp,
}

/// Where a verb writes.
#[derive(Debug, Default)]
pub struct Writes<'p> {
    /// Made when it is not there: a rule can only be for what is there, and one for a directory above
    /// would let everything else in it be written.
    pub folder: Option<&'p Path>,
    /// What is there: devices, disks, other directories.
    pub there: Vec<&'p Path>,
}

/// From here on nothing is written but below these paths and where temporary files are.
pub fn writes(below: &Writes<'_>) -> Result<()> {
    give_up(below, Network::Kept)?;
    hit()
}

/// The same, and no network: for verbs whose programs need none.
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
        // What cannot be made is reported by whoever writes there.
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
