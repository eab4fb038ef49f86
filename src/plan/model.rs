//! What a conversion will do, as data: shown by `plan`, carried out by `fix`, kept as `plan.json`.

use serde::Serialize;

use crate::drivers::catalogue::Role;
use crate::error::Blocker;
use crate::guest::{GuestPath, VolumeId};
use crate::inspect::SectorField;
use crate::registry::RegEdits;
use crate::report::Check;
use crate::report::outlook::Outlook;
use crate::ui::{bytes, count};

/// One unit of reversion: done wholly or not at all.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Action {
    /// Copies files from the virtio-win media into the guest, making the folders first.
    CopyFiles {
        id: String,
        title: String,
        folders: Vec<GuestPath>,
        files: Vec<FileCopy>,
    },
    /// Copies a file of the guest to another place on the same volume.
    CopyInGuest {
        id: String,
        title: String,
        #[serde(flatten)]
        volume: VolumeId,
        /// The folder to make first.
        folder: Option<GuestPath>,
        from: GuestPath,
        to: GuestPath,
        size: u64,
        /// Whether a different file of that name is there now.
        replaces: bool,
    },
    /// Sets numbers in the boot sector of a BIOS boot volume.
    PatchBootSector {
        id: String,
        title: String,
        #[serde(flatten)]
        volume: VolumeId,
        fields: Vec<SectorField>,
    },
    /// Merges registry edits into one hive. A hive whose transaction logs were replayed in memory is
    /// written as recovered, and `reset_logs` are emptied so that Windows cannot replay old pages over it.
    EditHive {
        id: String,
        title: String,
        hive: HiveName,
        #[serde(flatten)]
        volume: VolumeId,
        path: GuestPath,
        edits: RegEdits,
        reset_logs: Vec<GuestPath>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileCopy {
    pub to: GuestPath,
    /// Path on the virtio-win media.
    pub from: String,
    pub size: u64,
    /// Whether a different file of that name is there now.
    pub replaces: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum HiveName {
    System,
    Software,
    Drivers,
    /// The boot configuration store.
    Bcd,
}

impl HiveName {
    /// The file name, in the backup and registry folders too.
    pub fn file_name(self) -> &'static str {
        match self {
            HiveName::System => "SYSTEM",
            HiveName::Software => "SOFTWARE",
            HiveName::Drivers => "DRIVERS",
            HiveName::Bcd => "BCD",
        }
    }

    /// Where a running Windows mounts it. DRIVERS is loaded by PnP only while needed; the name is the
    /// one its own tools show.
    pub fn prefix(self) -> &'static str {
        match self {
            HiveName::System => r"HKEY_LOCAL_MACHINE\SYSTEM",
            HiveName::Software => r"HKEY_LOCAL_MACHINE\SOFTWARE",
            HiveName::Drivers => r"HKEY_LOCAL_MACHINE\DRIVERS",
            HiveName::Bcd => r"HKEY_LOCAL_MACHINE\BCD00000000",
        }
    }
}

impl Action {
    pub fn id(&self) -> &str {
        match self {
            Action::CopyFiles { id, .. }
            | Action::CopyInGuest { id, .. }
            | Action::PatchBootSector { id, .. }
            | Action::EditHive { id, .. } => id,
        }
    }

    /// The volume it names; `None`: that of Windows.
    pub fn volume(&self) -> Option<VolumeId> {
        match self {
            Action::CopyFiles { .. } => None,
            Action::CopyInGuest { volume, .. }
            | Action::PatchBootSector { volume, .. }
            | Action::EditHive { volume, .. } => Some(*volume),
        }
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        match self {
            Action::CopyFiles {
                title,
                folders,
                files,
                ..
            } => {
                let size = bytes(files.iter().map(|f| f.size).sum());
                let mut text = format!("{title}: {} ({size})", count(files.len(), "file"));
                if !folders.is_empty() {
                    text += &format!(", {}", count(folders.len(), "new folder"));
                }
                text
            }
            Action::CopyInGuest {
                title,
                from,
                to,
                replaces,
                ..
            } => format!(
                "{title}: {from} to {to}{}",
                if *replaces { ", which is replaced" } else { "" }
            ),
            Action::PatchBootSector {
                title,
                volume,
                fields,
                ..
            } => {
                let names: Vec<_> = fields.iter().map(|f| f.name).collect();
                format!("{title}: {} on {volume}", names.join(", "))
            }
            Action::EditHive {
                title,
                path,
                edits,
                reset_logs,
                ..
            } => format!(
                "{title}: {} in {path}{}",
                count(edits.ops.len(), "edit"),
                if reset_logs.is_empty() {
                    ""
                } else {
                    ", transaction logs replayed and reset"
                }
            ),
        }
    }
}

/// Something that needs no doing because it is already so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    pub id: String,
    pub title: String,
}

/// A driver the plan makes available to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedDriver {
    pub driver: String,
    pub role: Role,
    /// Folder of the media it comes from, e.g. `w10`.
    pub folder: String,
    pub version: String,
    /// `boot` (complete package, starts with the system), `installed` (in the driver store: Windows
    /// configures it when it meets the device) or `staged` (installed by the first-boot script).
    pub placement: &'static str,
    /// Who signed its catalogue, when that is in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signer: Option<String>,
}

/// What would be done to Windows, before it is known what that leads to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Draft {
    pub actions: Vec<Action>,
    pub skipped: Vec<Skipped>,
    pub drivers: Vec<PlannedDriver>,
    pub blockers: Vec<Blocker>,
    pub warnings: Vec<String>,
}

/// What a conversion will do. Only [`super::plan`] and [`super::linux::plan`] make one, and nothing is added to
/// it afterwards.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    pub actions: Vec<Action>,
    pub skipped: Vec<Skipped>,
    pub drivers: Vec<PlannedDriver>,
    pub blockers: Vec<Blocker>,
    /// The blockers that `--accept` took, by their codes.
    pub accepted: Vec<String>,
    pub warnings: Vec<String>,
    /// What `verify` will report of the result.
    pub checks: Vec<Check>,
    /// The result will start: no blockers, nothing accepted, no check of severity "blocker" that fails.
    pub ready: bool,
    /// What it leaves where; `None` where the documents of the VM cannot be written.
    #[serde(skip)]
    pub outlook: Option<Outlook>,
    /// For a Linux guest, which has no actions.
    #[serde(skip)]
    pub linux: Option<Handover>,
}

/// How a Linux guest becomes ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handover {
    pub method: Method,
    pub why: String,
    pub steps: Vec<Step>,
}

/// Who makes a Linux guest ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    VirtV2vInPlace,
    VirtV2v,
    AsIs,
}

/// A step of a hand-over: carried out on overlays of whole disks, not in one guest file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub id: &'static str,
    pub description: String,
}
