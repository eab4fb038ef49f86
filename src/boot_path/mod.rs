//! Would Windows start with its system disk on this controller?

use serde::Serialize;

/// A disk controller QEMU can show the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Controller {
    Sata,
    Ide,
    VirtioBlk,
    VirtioScsi,
}

impl Controller {
    pub const ALL: [Controller; 4] = [
        Controller::Sata,
        Controller::Ide,
        Controller::VirtioBlk,
        Controller::VirtioScsi,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Controller::Sata => "sata",
            Controller::Ide => "ide",
            Controller::VirtioBlk => "virtio-blk",
            Controller::VirtioScsi => "virtio-scsi",
        }
    }
}

/// The verdict on one controller, with the first thing that is missing as the reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BootPath {
    pub ready: bool,
    /// The driver service the chain ends in, when one was found.
    pub service: Option<String>,
    pub reason: String,
    /// Every step that was looked at, in order, for people.
    pub steps: Vec<Step>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    pub ok: bool,
    pub text: String,
}
