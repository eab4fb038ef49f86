//! Finds the Windows installations of a VM. An installation is a top-level directory of an NTFS
//! volume, of any name, with `System32\config\SYSTEM` in it.
//!
//! `Windows.old` has a whole former system one level deeper, so it does not count. An expanded
//! WinPE is recognised by `Control\MiniNT` in its SYSTEM hive. Nothing depends on the contents of
//! program files, which cannot be read on a CompactOS guest.

use crate::guest::{FileKind, FsKind, GuestError, GuestPath, GuestRead, VolumeId};
use crate::registry::HiveView;
use crate::types::ControlSet;

use super::InspectError;
use super::findings;
use super::model::Finding;

/// A directory with a SYSTEM hive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub volume: VolumeId,
    /// The path in the guest's own case.
    pub root: GuestPath,
}

impl Candidate {
    /// The form for `--root`, if the path alone is ambiguous.
    fn name(&self) -> String {
        let VolumeId { disk, partition } = self.volume;
        match disk.is_only() {
            true => format!("{partition}:{}", self.root),
            false => format!("{}/{partition}:{}", disk.number(), self.root),
        }
    }

    pub fn config(&self, hive: &str) -> Result<GuestPath, InspectError> {
        Ok(self.root.join(&format!("System32\\config\\{hive}"))?)
    }
}

/// The candidates on all volumes.
#[derive(Debug, Default)]
pub struct Found {
    pub installations: Vec<Candidate>,
    /// Directories with `System32\ntoskrnl.exe` and no SYSTEM hive.
    pub without_hive: Vec<Candidate>,
}

/// The most entries read: a directory with more is not the root of a Windows volume.
const MAX_TOP_LEVEL: usize = 4096;
/// The size limit for hives of an expanded WinPE, which have a few MB.
const PE_HIVE_LIMIT: u64 = 64 << 20;

pub fn find(guest: &dyn GuestRead, findings: &mut Vec<Finding>) -> Result<Found, InspectError> {
    let mut found = Found::default();
    for volume in guest.volumes() {
        if volume.kind != FsKind::Ntfs {
            continue;
        }
        let top = match &volume.state.unreadable {
            Some(reason) => Err(reason.clone()),
            None => match guest.list(volume.id, &GuestPath::root()) {
                Ok(top) => Ok(top),
                Err(GuestError::Io(error)) => return Err(GuestError::Io(error).into()),
                Err(error) => Err(error.to_string()),
            },
        };
        let top = match top {
            Ok(top) => top,
            Err(reason) => {
                findings.push(findings::VOLUME_UNREADABLE.found_with(&[&volume.id], reason));
                continue;
            }
        };
        for entry in top.iter().take(MAX_TOP_LEVEL) {
            if entry.kind != FileKind::Dir || entry.reparse_tag.is_some() {
                continue;
            }
            let Ok(root) = GuestPath::root().join(&entry.name) else {
                continue;
            };
            let candidate = Candidate {
                volume: volume.id,
                root,
            };
            let has = |path: &str| -> Result<bool, InspectError> {
                let info = guest.stat(volume.id, &candidate.root.join(path)?)?;
                Ok(info.is_some_and(|i| i.kind == FileKind::File))
            };
            if has("System32\\config\\SYSTEM")? {
                found.installations.push(candidate);
            } else if has("System32\\ntoskrnl.exe")? {
                found.without_hive.push(candidate);
            }
        }
    }
    Ok(found)
}

/// The installation to convert; `None` if there is none.
pub fn choose(
    guest: &dyn GuestRead,
    mut found: Vec<Candidate>,
    wanted: Option<&str>,
) -> Result<Option<Candidate>, InspectError> {
    found.retain(|c| !is_windows_pe(guest, c));
    let names = |list: &[Candidate]| list.iter().map(Candidate::name).collect();
    if let Some(wanted) = wanted {
        let wanted_root = Wanted::parse(wanted)?;
        let mut matching = found.clone();
        matching.retain(|c| wanted_root.is(c));
        return match matching.len() {
            0 => Err(InspectError::NoSuchRoot {
                wanted: wanted.to_string(),
                found: names(&found),
            }),
            1 => Ok(matching.pop()),
            _ => Err(InspectError::SeveralRoots {
                found: names(&matching),
            }),
        };
    }
    if found.len() > 1 {
        return Err(InspectError::SeveralRoots {
            found: names(&found),
        });
    }
    Ok(found.pop())
}

/// The argument of `--root`: `\Windows`, `2:\Windows` on partition 2 of any disk, or `1/2:\Windows`
/// on that of disk 1.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    disk: Option<u32>,
    partition: Option<u32>,
    root: GuestPath,
}

impl Wanted {
    fn parse(text: &str) -> Result<Self, InspectError> {
        let bad = || InspectError::BadRoot(text.to_string());
        let number = |text: &str| text.parse::<u32>().map_err(|_| bad());
        let (volume, path) = match text.split_once(':') {
            Some((volume, path)) => (Some(volume), path),
            None => (None, text),
        };
        let (disk, partition) = match volume.map(|v| v.split_once('/').ok_or(v)) {
            None => (None, None),
            Some(Err(partition)) => (None, Some(number(partition)?)),
            Some(Ok((disk, partition))) => (Some(number(disk)?), Some(number(partition)?)),
        };
        let root = GuestPath::parse(path)?;
        if root.is_root() || disk == Some(0) {
            return Err(bad());
        }
        Ok(Self {
            disk,
            partition,
            root,
        })
    }

    fn fits(&self, volume: VolumeId) -> bool {
        self.disk.is_none_or(|n| n == volume.disk.number())
            && self.partition.is_none_or(|n| n == volume.partition)
    }

    fn is(&self, candidate: &Candidate) -> bool {
        self.fits(candidate.volume) && self.root == candidate.root
    }
}

/// Whether `--root` may mean that volume.
pub fn may_be_on(wanted: &str, volume: VolumeId) -> bool {
    Wanted::parse(wanted).is_ok_and(|wanted| wanted.fits(volume))
}

/// Whether this is a WinPE. An unreadable hive is not: it is reported when it is loaded.
fn is_windows_pe(guest: &dyn GuestRead, candidate: &Candidate) -> bool {
    let Ok(path) = candidate.config("SYSTEM") else {
        return false;
    };
    // These files make it unnecessary to read the hive of every ordinary Windows.
    let marked = ["startnet.cmd", "winpeshl.exe", "winpeshl.ini"]
        .iter()
        .filter_map(|name| candidate.root.join(&format!("System32\\{name}")).ok())
        .any(|path| matches!(guest.stat(candidate.volume, &path), Ok(Some(_))));
    if !marked {
        return false;
    }
    let Ok(bytes) = guest.read(candidate.volume, &path, PE_HIVE_LIMIT) else {
        return false;
    };
    let Ok(view) = HiveView::new(&bytes) else {
        return false;
    };
    [1, 2]
        .map(ControlSet::new)
        .iter()
        .any(|set| matches!(view.key(&set.key("Control\\MiniNT")), Ok(Some(_))))
}
