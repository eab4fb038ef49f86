//! Differences of a rehearsal: it also keeps evidence of a success, and does not roll back.

use super::{Failure, Run};
use crate::domain::Stage;
use crate::error::{Error, ErrorKind, Result};

impl Run<'_> {
    /// Saves the screen of a rehearsal in place of the last picture: a VM may turn off at any
    /// moment.
    pub(super) fn glance(&mut self, stage: Stage) {
        if self.options.rehearsal.is_none() {
            return;
        }
        let shot = self
            .evidence_path(stage)
            .and_then(|folder| self.picture(&folder));
        match shot {
            Ok(None) => {}
            Ok(shot) => self.stage_record(stage).screenshot = shot,
            Err(error) => tracing::debug!("looking at the screen: {error}"),
        }
    }

    /// Saves the evidence of a success in a rehearsal.
    pub(super) fn rehearsal_evidence(&mut self, stage: Stage) {
        if self.options.rehearsal.is_some() {
            self.evidence(stage);
        }
    }

    /// Saves the evidence from the disk of the VM, which is off.
    pub(super) fn rehearsal_hives(&mut self, stage: Stage) {
        if self.options.rehearsal.is_none() {
            return;
        }
        match self.evidence_path(stage) {
            Ok(folder) => self.guest_evidence(&folder),
            Err(error) => self
                .record
                .warnings
                .push(format!("evidence missing: {error}")),
        }
    }

    /// Ends a failed final boot: the throw-away disk stays in the state of that boot.
    pub(super) fn rehearsal_failed(&mut self, failure: &Failure) -> Result<Error> {
        let folder = self.evidence(Stage::Final);
        if !self.is_off()? {
            self.virsh.destroy(self.files.uuid)?;
        }
        self.guest_evidence(&folder);
        self.record.save(&self.files.folder)?;
        let message = format!(
            "Windows did not come up on {}: {}",
            self.bus(Stage::Final),
            failure.message
        );
        Ok(Error::new(ErrorKind::NotReady, message)
            .hint(format!("evidence is in {}", folder.display())))
    }
}
