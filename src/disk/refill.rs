//! [`Refill`]: brings an image up to date that earlier copies have filled in part.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::block::BlockWrite;
use super::chain::Image;
use super::copy::{CopyError, CopyOptions, Nothing, Result, TargetFormat, check_target, compare};
use super::detect::Format;
use super::export::Export;
use crate::tool::qemu_img;
use crate::transfer::{ExtentJournal, Extents, Pace, Transfer, Zeroes};

/// A copy into a qcow2 that is there.
pub(crate) struct Refill<'a> {
    pub(crate) source: &'a Image,
    pub(crate) target: &'a Path,
    pub(crate) pace: Option<&'a Pace>,
    pub(crate) cancel: Option<Arc<AtomicBool>>,
}

impl Refill<'_> {
    /// Makes a new, empty image that a loss of power does not take away. One that a killed run has made
    /// and not noted is replaced.
    pub(crate) fn create(path: &Path, size: u64) -> Result<()> {
        let failed = |source: io::Error| CopyError::Io {
            path: path.into(),
            source,
        };
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
        let file = File::create_new(path).map_err(failed)?;
        qemu_img::create(path, TargetFormat::Qcow2.name(), size)?;
        file.sync_all().map_err(failed)
    }

    /// Where the image holds something, zeroes included.
    pub(crate) fn allocated(path: &Path) -> Result<Extents> {
        let image = Image::open_info(path, Some(Format::QCOW2.driver()), &[])?;
        let mut held = Extents::default();
        qemu_img::data_ranges(&image.spec(), &mut |range| held.insert(range))?;
        Ok(held)
    }

    /// Copies `ranges` and zeroes `stale`. Tells the bytes done.
    pub(crate) fn run(
        &self,
        ranges: &Extents,
        stale: &Extents,
        journal: &mut ExtentJournal,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let size = self.source.virtual_size();
        let failed = |e| CopyError::of(e, self.source.path(), self.target);
        let image = Image::target(self.target, Format::QCOW2, size, false);
        let into = Export::<dyn BlockWrite>::open_as_target(&image)?;
        let from = Export::open_for_copy(self.source)?;
        Transfer {
            source: Arc::new(Nothing(size)),
            target: into.disk(),
            ranges: stale,
            zeroes: Zeroes::Write,
            journal: None,
            pace: None,
            cancel: self.cancel.clone(),
        }
        .run(&mut |_| {})
        .map_err(failed)?;
        Transfer {
            source: from.disk(),
            target: into.disk(),
            ranges,
            zeroes: Zeroes::Write,
            journal: Some(journal),
            pace: self.pace,
            cancel: self.cancel.clone(),
        }
        .run(&mut |step| progress(step.done))
        .map_err(failed)?;
        from.close()?;
        into.close()?;
        Ok(())
    }

    /// Checks the copy as one that was made in one go, and tells what it takes on the host.
    pub(crate) fn check(&self, how: &CopyOptions) -> Result<u64> {
        let failed = |source: io::Error| CopyError::Io {
            path: self.target.into(),
            source,
        };
        let file = File::open(self.target).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        check_target(self.target, TargetFormat::Qcow2)?;
        compare(self.source, self.target, how)?;
        Ok(file
            .metadata()
            .map_err(failed)?
            .blocks()
            .saturating_mul(512))
    }
}
