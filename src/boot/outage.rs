//! Handles a VM whose source on another host is unreachable. QEMU has paused it, before Windows
//! would give up the disk, and it continues when the connection is restored. The process that
//! serves the source resumes it: `hyper2kvm serve`, or the rehearsal that has started the VM.

use std::time::{Duration, Instant};

use super::{Failure, Run};
use crate::error::Result;
use crate::later::serve::{self, Trouble};
use crate::tool::virsh::Tick;

/// The outages of one boot. They do not count towards the time limit for Windows.
#[derive(Default)]
pub(super) struct Outages {
    since: Option<Instant>,
    over: Duration,
}

impl Outages {
    pub(super) fn total(&self) -> Duration {
        self.over + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

/// The state of the connection in one look at the VM.
pub(super) enum Line {
    /// The VM is not waiting for its source.
    Up,
    Down,
    /// The VM waits for a source that will not return.
    Lost(Failure),
}

impl Run<'_> {
    pub(super) fn line(&self, tick: &Tick, outages: &mut Outages) -> Result<Line> {
        let uuid = self.files.uuid;
        // A full disk of this host is unrelated to the connection.
        if !tick.is_io_error() || !self.on_wire || self.virsh.is_full(uuid)? {
            let since = outages.since.take();
            outages.over += since.map_or(Duration::ZERO, |since| since.elapsed());
            return Ok(Line::Up);
        }
        if outages.since.is_none() {
            outages.since = Some(Instant::now());
            let text = format!(
                "{} is paused until its source answers again",
                self.files.name
            );
            self.ui.status("Waiting", &text);
        }
        let lost = |message: String| {
            Ok(Line::Lost(Failure {
                code: "paused",
                message,
            }))
        };
        match self.server {
            Some(server) => match server.answers() {
                Ok(()) => {
                    self.ui.status("Resuming", &self.files.name);
                    self.virsh.resume(uuid)?;
                }
                Err(Trouble::Changed(what)) => {
                    return lost(format!("its source has changed while it ran: {what}"));
                }
                Err(Trouble::Line(error)) => tracing::debug!("waiting for the source: {error}"),
            },
            None if !serve::is_served(&self.files.folder)? => {
                return lost(format!(
                    "QEMU paused the VM, because hyper2kvm serve has ended: virsh destroy {}, then run the same \
                     command again",
                    self.files.name
                ));
            }
            None => {}
        }
        let total = outages.total();
        match total > self.options.timeout {
            true => lost(format!(
                "the VM waited {} s for its source, which does not answer (see serve.log)",
                total.as_secs()
            )),
            false => Ok(Line::Down),
        }
    }
}
