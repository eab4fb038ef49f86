//! From an inspected guest and a virtio-win medium to a plan: the reading that `plan()` itself must
//! not do.

use std::collections::{BTreeMap, BTreeSet};

use crate::boot_path::Controller;
use crate::drivers::catalogue::Catalogue;
use crate::drivers::media::Media;
use crate::drivers::package;
use crate::drivers::select::{self, DriverSet};
use crate::error::{Blocker, Error, Result};
use crate::guest::{FileKind, GuestPath, GuestRead, VolumeId};
use crate::inspect::{Hives, Inspection, Survey, WindowsFacts};
use crate::plan::{self, At, Inputs, Layout, Options, Plan, Present};

/// A plan and what it was made from.
pub struct Prepared {
    pub plan: Plan,
    pub windows: WindowsFacts,
    pub bootstrap: Option<Controller>,
    pub drivers: DriverSet,
}

/// The first boot's controller: as asked, or what this guest can have.
pub fn bootstrap(asked: Option<Option<Controller>>, windows: &WindowsFacts) -> Option<Controller> {
    asked.unwrap_or({
        if windows.sector_size != 512 {
            // QEMU's AHCI and IDE disks have 512-byte sectors and nothing else.
            None
        } else if windows.target.major < 6 {
            Some(Controller::Ide)
        } else {
            Some(Controller::Sata)
        }
    })
}

/// Refuses a guest that cannot be planned for, as one error with every blocker.
pub fn windows_or_refuse(survey: &Survey) -> Result<(&WindowsFacts, &Hives)> {
    let inspection = &survey.inspection;
    match (&inspection.windows, &survey.hives) {
        (Some(windows), Some(hives)) => Ok((windows, hives)),
        _ => {
            let mut blockers = inspection.blockers();
            if blockers.is_empty() {
                blockers.push(Blocker::new(
                    "no-windows",
                    "no Windows installation was found on this disk",
                    "name the disk Windows is installed on",
                ));
            }
            Err(refused(inspection, blockers))
        }
    }
}

pub fn refused(inspection: &Inspection, blockers: Vec<Blocker>) -> Error {
    Error::refused(
        format!("{} cannot be converted as it is", inspection.source.path),
        blockers,
    )
}

pub fn prepare(
    survey: &Survey,
    guest: &dyn GuestRead,
    media: &dyn Media,
    catalogue: &Catalogue,
    options: Options,
) -> Result<Prepared> {
    let inspection = &survey.inspection;
    let (windows, hives) = windows_or_refuse(survey)?;
    let drivers = select::select(media, catalogue, &windows.target).map_err(|e| {
        let mut blockers = inspection.blockers();
        blockers.push(e.blocker());
        refused(inspection, blockers)
    })?;
    let digests = digests(&drivers, media, inspection, windows)?;
    let used_oem = used_oem(guest, windows)?;
    let inputs = Inputs {
        inspection,
        windows,
        hives,
        drivers: &drivers,
        digests: &digests,
        used_oem: &used_oem,
        options,
    };
    let unreadable = |e| Error::failed("planning").because(e);
    let layout = plan::layout(&inputs).map_err(unreadable)?;
    let present = present(guest, windows.system_volume, &layout, media)?;
    let plan = plan::plan(&inputs, layout, &present).map_err(unreadable)?;
    Ok(Prepared {
        plan,
        windows: windows.clone(),
        bootstrap: options.bootstrap,
        drivers,
    })
}

/// The digest of each package that is installed completely; its files are checked on the way.
fn digests(
    drivers: &DriverSet,
    media: &dyn Media,
    inspection: &Inspection,
    windows: &WindowsFacts,
) -> Result<BTreeMap<String, String>> {
    let mut digests = BTreeMap::new();
    for package in drivers.boot_storage() {
        let contents = package
            .read_files(media, windows.target.arch)
            .map_err(|e| refused(inspection, vec![e.blocker()]))?;
        digests.insert(package.driver.clone(), package::digest(&contents));
    }
    Ok(digests)
}

fn used_oem(guest: &dyn GuestRead, windows: &WindowsFacts) -> Result<BTreeSet<u32>> {
    let failed = |e| Error::failed("listing the INF folder of the guest").because(e);
    let Ok(folder) = windows.root.join("INF") else {
        return Ok(BTreeSet::new());
    };
    if guest
        .stat(windows.system_volume, &folder)
        .map_err(failed)?
        .is_none()
    {
        return Ok(BTreeSet::new());
    }
    let files = guest.list(windows.system_volume, &folder).map_err(failed)?;
    Ok(files
        .iter()
        .filter_map(|f| plan::oem_number(&f.name))
        .collect())
}

/// Looks at every path the layout names, and at the folders above them.
fn present(
    guest: &dyn GuestRead,
    volume: VolumeId,
    layout: &Layout,
    media: &dyn Media,
) -> Result<Present> {
    let mut present = Present::new();
    let mut absent = BTreeSet::new();
    for (path, media_path, size) in layout.files() {
        let mut known = true;
        for folder in ancestors(path) {
            if absent.contains(&folder) {
                known = false;
                break;
            }
            if present.contains_key(&folder) {
                continue;
            }
            match stat(guest, volume, &folder)? {
                Some(FileKind::Dir) => present.insert(folder, At::Folder),
                Some(FileKind::File) => {
                    return Err(Error::failed(format!("{folder} is a file in the guest")));
                }
                None => {
                    absent.insert(folder);
                    known = false;
                    break;
                }
            };
        }
        if !known {
            continue;
        }
        let failed = |e| Error::failed(format!("reading {path} in the guest")).because(e);
        let Some(info) = guest.stat(volume, path).map_err(failed)? else {
            continue;
        };
        let at = match info.kind {
            FileKind::Dir => At::Folder,
            FileKind::File if info.size == *size && info.reparse_tag.is_none() => {
                let theirs = guest.read(volume, path, *size).map_err(failed)?;
                let ours = media.read(media_path).map_err(|e| {
                    Error::failed(format!("reading {media_path} from the drivers")).because(e)
                })?;
                if theirs == ours {
                    At::SameFile
                } else {
                    At::OtherFile
                }
            }
            FileKind::File => At::OtherFile,
        };
        present.insert(path.clone(), at);
    }
    Ok(present)
}

fn stat(guest: &dyn GuestRead, volume: VolumeId, path: &GuestPath) -> Result<Option<FileKind>> {
    let info = guest
        .stat(volume, path)
        .map_err(|e| Error::failed(format!("looking at {path} in the guest")).because(e))?;
    Ok(info.map(|i| i.kind))
}

/// The folders above a path, outermost first, without the root.
fn ancestors(path: &GuestPath) -> Vec<GuestPath> {
    let mut list = Vec::new();
    let mut next = path.parent();
    while let Some(folder) = next {
        if folder.is_root() {
            break;
        }
        next = folder.parent();
        list.push(folder);
    }
    list.reverse();
    list
}
