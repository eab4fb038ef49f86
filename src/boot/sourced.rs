//! A VM whose disks still need their source: checks, serves and connects to the source.

use std::thread::{self, JoinHandle};

use super::{Phase, Run, access};
use crate::error::{ErrorKind, Result};
use crate::later::Record;
use crate::later::serve::{self, Left};
use crate::threads::side_by_side;
use crate::timeline;

impl Run<'_> {
    /// Checks that QEMU can read the files, that no other domain conflicts, and that the source is
    /// unchanged and served.
    pub(super) fn ready(&mut self, later: Option<&Record>) -> Result<Option<Left>> {
        let done = self.record.phase == Phase::Done;
        if !done {
            let user = access::qemu_user(&self.options.uri);
            access::check_source(&self.source, user.as_ref())?;
            access::check(&self.files.paths(), user.as_ref())?;
        }
        let folder = self.files.folder.clone();
        let check = || {
            let _span = timeline::span("look at the source");
            later.map_or(Ok(()), |later| later.check_source(&folder))
        };
        // A rehearsal serves the source itself, and stops with the VM.
        let serves = self.on_wire && self.options.rehearsal.is_none() && !done;
        if !serves || serve::is_served(&folder)? {
            let (found, checked) = side_by_side(|| self.find_domain(), check);
            checked?;
            self.absent = !found?;
            return Ok(None);
        }
        // The server checks the source before it serves it. This process connects while the VM
        // starts.
        let (found, served) = side_by_side(|| self.find_domain(), || self.serve());
        match (found, served) {
            (Ok(found), Ok(Some(served))) => {
                self.absent = !found;
                self.unreached = later.cloned();
                Ok(Some(served))
            }
            // Another process has begun to serve in the meantime.
            (Ok(found), Ok(None)) => {
                check()?;
                self.absent = !found;
                Ok(None)
            }
            (found, Err(error)) => {
                if error.kind != ErrorKind::Interrupted {
                    // The server's error, parsed from its document.
                    check()?;
                }
                found?;
                Err(error)
            }
            (Err(error), Ok(served)) => {
                if let Some(served) = served {
                    served.end();
                }
                Err(error)
            }
        }
    }

    /// Starts to serve a source on another host, which must be reachable as long as the VM runs.
    fn serve(&self) -> Result<Option<Left>> {
        let _span = timeline::span("start serve");
        let left = serve::leave(&self.files.folder, &self.options.uri)?;
        if let Some(left) = &left {
            let folder = crate::text::quote(&self.files.folder);
            self.ui.status(
                "Serving",
                &format!(
                    "the source, by process {}, which continues until hyper2kvm pull {folder} is done",
                    left.id()
                ),
            );
        }
        Ok(left)
    }

    /// Starts to connect to the source, for reading the disk while the VM is off.
    pub(super) fn begin_reaching(&mut self) {
        if let Some(later) = self.unreached.take() {
            let folder = self.files.folder.clone();
            self.reaching = Some(thread::spawn(move || {
                let _span = timeline::span("look at the source");
                later.check_source(&folder)
            }));
        }
    }

    /// The connection attempt that has to end before the disk is read.
    pub(super) fn reach(&mut self) -> Option<JoinHandle<Result<()>>> {
        self.begin_reaching();
        self.reaching.take()
    }
}
