//! The EFI system partition of a Linux guest.
//!
//! Firmware starts a boot loader from the entries in its variables, which stay behind with the old
//! VM. A new VM finds only `\EFI\BOOT\BOOTX64.EFI`, which not every distribution installs. The
//! distribution's own loader is copied there. It is shim with the GRUB that it loads from its own
//! directory, a GRUB without shim, or systemd-boot. The file `fbx64.efi` of shim is left out:
//! beside it, shim would write boot entries and start over instead of starting GRUB.

use crate::guest::{EmbeddedReader, FileKind, FsKind, GuestPath, GuestRead, Result, VolumeId};

use crate::inspect::linux::{LoaderCopies, LoaderCopy};

const FALLBACK: &str = "EFI\\BOOT\\BOOTX64.EFI";
/// Possible loaders in a vendor's directory; the first existing one is used.
const LOADERS: [&str; 3] = ["shimx64.efi", "grubx64.efi", "systemd-bootx64.efi"];
/// Files that shim loads from its own directory.
const BESIDE_SHIM: [&str; 2] = ["grubx64.efi", "mmx64.efi"];

/// An EFI system partition with a boot loader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Esp {
    pub disk: usize,
    pub volume: VolumeId,
    pub has_fallback: bool,
    /// The copies that create a fall-back loader from the distribution's own.
    pub copies: Option<LoaderCopies>,
}

/// Finds the first one on the disks; `distribution` is the `ID` of its os-release.
pub fn find(disks: &[&EmbeddedReader], distribution: &str) -> Result<Option<Esp>> {
    for (disk, guest) in disks.iter().enumerate() {
        for volume in guest.volumes() {
            if volume.kind == FsKind::Fat
                && volume.state.unreadable.is_none()
                && let Some(esp) = look(*guest, disk, volume.id, distribution)?
            {
                return Ok(Some(esp));
            }
        }
    }
    Ok(None)
}

fn look(
    guest: &dyn GuestRead,
    disk: usize,
    volume: VolumeId,
    distribution: &str,
) -> Result<Option<Esp>> {
    let size = |path: &GuestPath| -> Result<Option<u64>> {
        let info = guest.stat(volume, path)?;
        Ok(info.filter(|i| i.kind == FileKind::File).map(|i| i.size))
    };
    let Some(efi) = folder(guest, volume, "EFI")? else {
        return Ok(None);
    };
    let fallback = parse(FALLBACK)?;
    let has_fallback = size(&fallback)?.is_some();
    let mut vendors: Vec<String> = guest
        .list(volume, &efi)?
        .into_iter()
        .filter(|f| f.kind == FileKind::Dir)
        .map(|f| f.name)
        .filter(|name| !["boot", "microsoft"].contains(&name.to_lowercase().as_str()))
        .collect();
    // The distribution's own directory first; Red Hat's is not called by its id.
    vendors.sort_by_key(|name| {
        let name = name.to_lowercase();
        name != distribution && !(distribution == "rhel" && name == "redhat")
    });
    let mut copies = None;
    for vendor in vendors {
        let Ok(from) = efi.join(&vendor) else {
            continue;
        };
        let Some((loader, loader_size)) = first_loader(&from, &size)? else {
            continue;
        };
        let boot = parse("EFI\\BOOT")?;
        let folders = match folder(guest, volume, "EFI\\BOOT")? {
            Some(_) => Vec::new(),
            None => vec![boot.clone()],
        };
        let mut list = vec![LoaderCopy {
            from: join(&from, loader)?,
            to: fallback.clone(),
            size: loader_size,
        }];
        if loader == LOADERS[0] {
            for name in BESIDE_SHIM {
                let (source, to) = (join(&from, name)?, join(&boot, name)?);
                if let Some(size) = size(&source)?
                    && self::stat_is_none(guest, volume, &to)?
                {
                    list.push(LoaderCopy {
                        from: source,
                        to,
                        size,
                    });
                }
            }
        }
        copies = Some(LoaderCopies {
            disk,
            volume,
            folders,
            copies: list,
        });
        break;
    }
    if !has_fallback && copies.is_none() {
        return Ok(None);
    }
    Ok(Some(Esp {
        disk,
        volume,
        has_fallback,
        copies: copies.filter(|_| !has_fallback),
    }))
}

fn first_loader(
    folder: &GuestPath,
    size: &dyn Fn(&GuestPath) -> Result<Option<u64>>,
) -> Result<Option<(&'static str, u64)>> {
    for name in LOADERS {
        if let Some(size) = size(&join(folder, name)?)? {
            return Ok(Some((name, size)));
        }
    }
    Ok(None)
}

fn stat_is_none(guest: &dyn GuestRead, volume: VolumeId, path: &GuestPath) -> Result<bool> {
    Ok(guest.stat(volume, path)?.is_none())
}

fn folder(guest: &dyn GuestRead, volume: VolumeId, path: &str) -> Result<Option<GuestPath>> {
    let path = parse(path)?;
    let info = guest.stat(volume, &path)?;
    Ok(info.filter(|i| i.kind == FileKind::Dir).map(|_| path))
}

fn parse(path: &str) -> Result<GuestPath> {
    GuestPath::parse(path).map_err(|e| std::io::Error::other(e).into())
}

fn join(folder: &GuestPath, name: &str) -> Result<GuestPath> {
    folder
        .join(name)
        .map_err(|e| std::io::Error::other(e).into())
}
