//! [`Refill`]: updates an image that earlier copies have partly filled.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::chain::Image;
use super::copy::{
    CopyError, CopyOptions, Into, Nothing, Result, TargetFormat, check_target, compare,
};
use super::detect::Format;
use super::empty;
use super::export::Export;
use crate::block::{BlockRead, BlockWrite};
use crate::files;
use crate::tool::qemu_img;
use crate::transfer::{ExtentJournal, Extents, Pace, Transfer, Zeroes};

/// A copy into an existing qcow2.
pub(crate) struct Refill<'a> {
    pub(crate) source: &'a Image,
    pub(crate) target: &'a Path,
    pub(crate) pace: Option<&'a Pace>,
    pub(crate) cancel: Option<Arc<AtomicBool>>,
}

/// The steps of a refill, in this order.
#[derive(Debug, Default)]
pub(crate) struct Work {
    /// Ranges to zero: the source has no data there.
    pub(crate) stale: Extents,
    /// Ranges to copy and record.
    pub(crate) recorded: Extents,
    /// Ranges to copy without a record: the next run would copy something else there.
    pub(crate) unrecorded: Extents,
}

impl Work {
    pub(crate) fn bytes(&self) -> u64 {
        self.recorded
            .bytes()
            .saturating_add(self.unrecorded.bytes())
    }
}

impl Refill<'_> {
    /// Creates a new, empty image that survives a loss of power. One that a killed run created but
    /// did not record is replaced.
    pub(crate) fn create(path: &Path, size: u64) -> Result<()> {
        let failed = |source: io::Error| CopyError::Io {
            path: path.into(),
            source,
        };
        files::removed(std::fs::remove_file(path)).map_err(failed)?;
        let file = File::create_new(path).map_err(failed)?;
        match empty::can_create(size) {
            true => empty::write_qcow2(&file, size, false).map_err(failed)?,
            false => qemu_img::create_with(path, TargetFormat::Qcow2.name(), size, None)?,
        }
        file.sync_all().map_err(failed)
    }

    /// The ranges of the image with data.
    pub(crate) fn data(path: &Path) -> Result<Extents> {
        let image = Image::open_info(path, Some(Format::QCOW2.driver()), &[])?;
        let mut held = Extents::default();
        qemu_img::data_ranges(&image.spec(), &mut |range| held.insert(range))?;
        Ok(held)
    }

    /// Runs the steps and reports the copied bytes. Ranges copied before an error are recorded.
    pub(crate) fn run(
        &self,
        work: &Work,
        journal: &mut ExtentJournal,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let size = self.source.virtual_size();
        let into = Into::open(self.target, size, TargetFormat::Qcow2, None)?;
        let from = Export::open_for_copy(self.source)?;
        let nothing: Arc<dyn BlockRead> = Arc::new(Nothing(size));
        let recorded = work.recorded.bytes();
        let (source, target) = (from.disk(), into.disk());
        self.transfer((&nothing, &target), &work.stale, None, &mut |_| {})?;
        self.transfer((&source, &target), &work.recorded, Some(journal), progress)?;
        self.transfer((&source, &target), &work.unrecorded, None, &mut |bytes| {
            progress(recorded + bytes);
        })?;
        drop((source, target));
        from.close()?;
        into.close()?;
        Ok(())
    }

    fn transfer(
        &self,
        (source, target): (&Arc<dyn BlockRead>, &Arc<dyn BlockWrite>),
        ranges: &Extents,
        journal: Option<&mut ExtentJournal>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        if ranges.is_empty() {
            return Ok(());
        }
        let transfer = Transfer {
            source: source.clone(),
            target: target.clone(),
            ranges,
            zeroes: Zeroes::Write,
            checkpoint: journal.into(),
            pace: self.pace,
            cancel: self.cancel.clone(),
        };
        transfer
            .run(&mut |step| progress(step.done))
            .map(|_| ())
            .map_err(|e| CopyError::of(e, self.source.path(), self.target))
    }

    /// Verifies the copy like one made in a single run, and returns the bytes it takes on the host.
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
