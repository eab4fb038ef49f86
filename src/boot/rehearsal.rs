//! What is different in a rehearsal: evidence of what worked, and no rollback.

use super::{Failure, Run};
use crate::domain::Stage;
use crate::error::{Error, ErrorKind, Result};

impl Run<'_> {
    /// The screen of a rehearsal, in the place of the last picture: a VM may go off at any moment.
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

    /// A rehearsal has evidence of what worked, too.
    pub(super) fn rehearsal_evidence(&mut self, stage: Stage) {
        if self.options.rehearsal.is_some() {
            self.evidence(stage);
        }
    }

    /// The same from the disk of the VM, which is off.
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

    /// A final boot that failed: the throw-away disk stays as that boot has left it.
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
