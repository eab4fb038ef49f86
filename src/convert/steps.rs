//! State that passes between two steps of a conversion.

use std::collections::BTreeMap;

use crate::check::Check;
use crate::disk::chain::Image;
use crate::domain;
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::fix::journal::Journal;
use crate::guest::DiskId;
use crate::inspect::Inspection;
use crate::report::{Bytes, DiskTrim};
use crate::stop;

use crate::session::engine::Engine;

/// The verified overlays and the facts known about them.
pub(super) struct Fixed {
    /// The images of the disks that may have been changed.
    pub(super) images: BTreeMap<DiskId, Image>,
    pub(super) journal: Journal,
    pub(super) before: Inspection,
    pub(super) after: Inspection,
    pub(super) checks: Vec<Check>,
    pub(super) trim: Vec<DiskTrim>,
    pub(super) engine: Engine,
}

/// The disks in their final state, and the figures of their copy.
pub(super) struct Disks {
    pub(super) targets: Vec<domain::Disk>,
    pub(super) bytes: Bytes,
    pub(super) fixed: Fixed,
}

pub(super) fn point(name: &str) -> Result<()> {
    failpoint::hit(name).map_err(|e| Error::failed("converting").because(e))
}

/// Fails after SIGINT or SIGTERM, checked between steps; the tool wrapper kills children.
pub(super) fn stopped() -> Result<()> {
    if stop::requested() {
        return Err(Error::new(
            ErrorKind::Interrupted,
            "interrupted; the source is untouched",
        ));
    }
    Ok(())
}
