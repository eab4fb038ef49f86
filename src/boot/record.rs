//! `boot.json`: the progress of the two boots. Written before each step, so that an interrupted run
//! continues at that step.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::proof::Proof;
use super::protect::Protected;
use crate::error::{Error, Result};
use crate::fix::journal::write_durably;
use crate::fix::trusted;

pub const FILE_NAME: &str = "boot.json";
/// The file that records the steps of `--install-to`; removed at the end.
pub const INSTALLING: &str = "install.json";
const SCHEMA: &str = "hyper2kvm/boot/1";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    New,
    /// The bootstrap domain is defined, possibly running.
    Bootstrap,
    /// Windows has come up there and will be shut down.
    BootstrapUp,
    /// The VM is off, and the disk can be switched over.
    BootstrapDone,
    /// The disk is being saved.
    Protecting,
    /// The disk is saved; the final domain is defined, possibly running.
    Final,
    /// The final boot failed and the disk is being restored.
    Restoring,
    /// The disk is restored, and the bootstrap domain is defined again.
    FinalFailed,
    Done,
}

impl Phase {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Bootstrap => "bootstrap",
            Self::BootstrapUp => "bootstrap-up",
            Self::BootstrapDone => "bootstrap-done",
            Self::Protecting => "protecting",
            Self::Final => "final",
            Self::Restoring => "restoring",
            Self::FinalFailed => "final-failed",
            Self::Done => "done",
        }
    }
}

/// The result of one boot.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    pub started: bool,
    /// The evidence that Windows was up: `marker`, `agent` or `manual`.
    pub up_by: Option<String>,
    /// The reason for a failure: `timeout`, `stopped`, `panic`, `reboot-loop`, `paused`.
    pub failure: Option<String>,
    pub message: Option<String>,
    pub seconds: f64,
    pub reboots: u32,
    pub screenshot: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub schema: String,
    pub version: String,
    pub phase: Phase,
    pub uri: String,
    pub name: String,
    pub uuid: Uuid,
    pub bootstrap: Option<StageRecord>,
    /// The evidence on the disk between the boots.
    pub proof: Option<Proof>,
    #[serde(rename = "final")]
    pub production: Option<StageRecord>,
    /// The saved states from which the disks can be restored.
    pub protected: Vec<Protected>,
    pub evidence: Vec<PathBuf>,
    pub warnings: Vec<String>,
    pub next_commands: Vec<String>,
}

impl Record {
    pub fn new(uri: &str, name: &str, uuid: Uuid) -> Self {
        Self {
            schema: SCHEMA.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            phase: Phase::New,
            uri: uri.to_owned(),
            name: name.to_owned(),
            uuid,
            bootstrap: None,
            proof: None,
            production: None,
            protected: Vec::new(),
            evidence: Vec::new(),
            warnings: Vec::new(),
            next_commands: Vec::new(),
        }
    }

    /// Loads the record of an earlier run, if there is one.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FILE_NAME);
        // It determines which files are restored over which disks.
        let text = match trusted::read(&path) {
            Err(e) if e.is_missing() => return Ok(None),
            text => text?,
        };
        let record: Self = serde_json::from_slice(&text).map_err(|e| {
            Error::failed(format!("{} is not understood", path.display()))
                .because(e)
                .hint("move it away to start over: the bootstrap domain is defined again then")
        })?;
        Ok(Some(record))
    }

    /// Saves the record; it is durable when this returns.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE_NAME);
        let text = format!("{:#}\n", serde_json::json!(self));
        let write = || write_durably(&path, text.as_bytes());
        write().map_err(|e| Error::failed(format!("writing {}", path.display())).because(e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::load(dir.path()).unwrap(), None);
        let mut record = Record::new("qemu:///system", "vm", Uuid::from_u128(7));
        record.phase = Phase::Final;
        record.bootstrap = Some(StageRecord {
            up_by: Some("marker".into()),
            ..StageRecord::default()
        });
        record.save(dir.path()).unwrap();
        assert_eq!(Record::load(dir.path()).unwrap(), Some(record));
        std::fs::write(dir.path().join(FILE_NAME), "{}").unwrap();
        assert!(Record::load(dir.path()).is_err());
    }
}
