//! Copies an image with its whole chain into one new file, and verifies the copy.
//!
//! The copy loop ([`crate::transfer`]) reads only allocated ranges of the source and does not write
//! zeroes. A qcow2 is written without QEMU. With a [`Record`] an interrupted copy continues; without
//! one the target is removed after any error.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use serde::Serialize;
use serde_json::{Value, json};

use super::chain::Image;
use super::detect::Format;
use super::direct::RawTarget;
use super::empty;
use super::error::ImageError;
use super::export::{Export, ExportError};
use super::packed_writer::PackedWriter;
use super::writer::Qcow2Writer;
use super::{reflink, tables};
use crate::block::{BlockRead, BlockWrite};
use crate::error::{Blocker, ErrorKind};
use crate::threads::joined;
use crate::timeline;
use crate::tool::spec::Spec;
use crate::tool::{ToolError, qemu_img};
use crate::transfer::{
    ExtentJournal, Extents, Foundation, JournalFault, Pace, Step, Transfer, TransferError, Zeroes,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TargetFormat {
    #[default]
    Qcow2,
    Raw,
}

impl TargetFormat {
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => Format::QCOW2.driver(),
            Self::Raw => Format::RAW.driver(),
        }
    }
}

#[derive(Debug, Clone, Default)]
pub struct CopyOptions {
    pub format: TargetFormat,
    pub compress: bool,
    /// Whether source and copy are read again and compared.
    pub compare: bool,
    /// A flag that stops the copy.
    pub cancel: Option<Arc<AtomicBool>>,
    /// The ranges of the source with data; determined if they are not given.
    pub(crate) ranges: Option<Arc<Extents>>,
    pub(crate) pace: Option<Pace>,
    pub(crate) record: Option<Record>,
}

impl CopyOptions {
    /// The same copy with a record of its progress in that file.
    #[must_use]
    pub fn recorded(mut self, path: PathBuf) -> Self {
        self.record = Some(Record {
            path,
            what: Value::Null,
            foundation: None,
            is_all: false,
        });
        self
    }
}

/// The file in which a copy records its progress.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) path: PathBuf,
    /// The identity of source and target: a record of other ones is useless.
    pub(crate) what: Value,
    /// What a later run needs besides the record.
    pub(crate) foundation: Option<Foundation>,
    /// Whether the run has nothing to do after this copy that takes long.
    pub(crate) is_all: bool,
}

impl Record {
    /// Opens the record of an earlier run, if it is of this copy and of the present target.
    pub(super) fn open(&self, target: &Value) -> Result<Option<ExtentJournal>, JournalFault> {
        let what = self.header(target);
        let left = ExtentJournal::open(&self.path)?.filter(|left| left.what == what);
        Ok(left.map(|left| left.journal.founded_on(self.foundation.clone())))
    }

    pub(super) fn create(&self, target: &Value) -> Result<ExtentJournal, JournalFault> {
        let first = (self.foundation.clone(), self.is_all);
        ExtentJournal::create(&self.path, &self.header(target), first)
    }

    fn header(&self, target: &Value) -> Value {
        json!({"schema": "hyper2kvm/copy/1", "copy": self.what, "target": target})
    }
}

/// The result of a copy, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Copied {
    pub virtual_size: u64,
    /// Bytes that the target takes on the host.
    pub written: u64,
    /// Bytes copied by an earlier run.
    pub resumed: u64,
    /// Bytes shared with the source.
    pub shared: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("{} exists already", path.display())]
    Exists { path: PathBuf },
    #[error("not enough space in {}: {free} bytes free, {needed} bytes needed", folder.display())]
    NoSpace {
        folder: PathBuf,
        free: u64,
        needed: u64,
    },
    #[error("the file system of {} ran full while writing it", path.display())]
    Full { path: PathBuf },
    #[error("the copy {} is not sound: qemu-img check found {errors} errors", path.display())]
    Unsound { path: PathBuf, errors: u64 },
    #[error("the copy {} differs from its source: {what}", path.display())]
    Differs { path: PathBuf, what: String },
    #[error("raw images cannot be compressed")]
    RawCompressed,
    #[error("copying {} to {}", from.display(), to.display())]
    Transfer {
        from: PathBuf,
        to: PathBuf,
        #[source]
        source: TransferError,
    },
    #[error(transparent)]
    Journal(#[from] JournalFault),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Tool(#[from] ToolError),
    #[error("writing {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl From<CopyError> for crate::error::Error {
    fn from(e: CopyError) -> Self {
        match e {
            CopyError::Image(e) => e.into(),
            CopyError::Export(e) => e.into(),
            CopyError::Tool(e) => e.into(),
            CopyError::Transfer {
                source: TransferError::Interrupted(_),
                ..
            } => Self::new(ErrorKind::Interrupted, "interrupted"),
            e => {
                let mut error = Self::failed(e.to_string());
                match e {
                    CopyError::NoSpace { .. } | CopyError::Full { .. } => {
                        const REMEDY: &str = "free some space or choose another output directory";
                        let blocker = Blocker::new("output-space", &error.message, REMEDY);
                        error.blockers.push(blocker);
                        error = error.hint(REMEDY);
                    }
                    CopyError::RawCompressed => {
                        error.kind = ErrorKind::Usage;
                        error = error.hint("use qcow2 with compression");
                    }
                    CopyError::Io { source, .. } => error = error.because(source),
                    CopyError::Transfer { source, .. } => error = error.because(source),
                    CopyError::Journal(fault) => error = error.because(fault.into_cause()),
                    _ => {}
                }
                error
            }
        }
    }
}

pub type Result<T, E = CopyError> = std::result::Result<T, E>;

impl CopyError {
    /// Whether the same copy can continue after the connection is restored or there is space: the
    /// copied ranges are intact.
    pub(crate) fn can_be_resumed(&self) -> bool {
        let os = |e: &io::Error| {
            use io::ErrorKind as Kind;
            let kind = matches!(
                e.kind(),
                Kind::StorageFull
                    | Kind::QuotaExceeded
                    | Kind::FileTooLarge
                    | Kind::TimedOut
                    | Kind::ConnectionReset
                    | Kind::ConnectionAborted
                    | Kind::NotConnected
                    | Kind::BrokenPipe
                    | Kind::UnexpectedEof
                    | Kind::HostUnreachable
                    | Kind::NetworkUnreachable
                    | Kind::StaleNetworkFileHandle
            );
            // EIO and ESHUTDOWN: an NBD server answers with them when its connection is cut.
            kind || matches!(e.raw_os_error(), Some(libc::EIO | libc::ESHUTDOWN))
        };
        match self {
            Self::Full { .. } => true,
            Self::Transfer { source, .. } => source.cause().is_some_and(os),
            Self::Journal(fault) => os(fault.cause()),
            Self::Io { source, .. } => os(source),
            _ => false,
        }
    }

    /// Creates the error of a copy from the failed side and its error.
    pub(super) fn of(error: TransferError, from: &Path, to: &Path) -> Self {
        match error {
            e if e.is_full() => Self::Full { path: to.into() },
            source => Self::Transfer {
                from: from.into(),
                to: to.into(),
                source,
            },
        }
    }
}

/// Copies `source` to the new file `target`, and reports the fraction done (0 to 1).
/// [`check_space`] checks for free space. With a [`Record`] the file may exist. The copy then
/// continues if the record is of that file, and starts over otherwise.
pub fn copy(
    source: &Image,
    target: &Path,
    how: &CopyOptions,
    progress: &mut dyn FnMut(f64),
) -> Result<Copied> {
    let (format, compress) = (how.format, how.compress);
    if compress && format == TargetFormat::Raw {
        return Err(CopyError::RawCompressed);
    }
    let io_error = |source| CopyError::Io {
        path: target.into(),
        source,
    };
    let target = &std::path::absolute(target).map_err(io_error)?;
    let io_error = |source| CopyError::Io {
        path: target.clone(),
        source,
    };
    let ranges = ranges(source, how)?;
    let live = ranges.bytes();
    let (mut journal, unfinished) = {
        let _span = timeline::span("create the copy");
        begin(source, target, how)?
    };
    let done = journal.as_ref().map(|journal| journal.done().clone());
    let done = done.unwrap_or_default();
    let into = Into::open(
        target,
        source.virtual_size(),
        format,
        compress.then_some(&done),
    )?;
    let shared = share(source, target, how, journal.as_ref()).map_err(io_error)?;
    // No record is kept of that: an interrupted copy starts over, which costs next to nothing.
    let is_shared = shared.is_some();
    let ranges = shared.map_or(ranges, Arc::new);
    let continued = compress && matches!(into, Into::Image(_)) && !done.is_empty();
    if continued {
        clear(&ranges.minus(&done), into.disk().as_ref())
            .map_err(|e| CopyError::of(e, source.path(), target))?;
    }
    let from = Export::open_for_copy(source)?;
    let span = timeline::span("copy");
    let moved = Transfer {
        source: from.disk(),
        target: into.disk(),
        ranges: &ranges,
        zeroes: match is_shared {
            true => Zeroes::Write,
            false => Zeroes::Leave,
        },
        checkpoint: journal.as_mut().filter(|_| !is_shared).into(),
        pace: how.pace.as_ref(),
        cancel: how.cancel.clone(),
    }
    .run(&mut |step| progress(fraction(step, &ranges)))
    .map_err(|e| CopyError::of(e, source.path(), target))?;
    drop(span);
    from.close()?;
    into.close()?;
    if continued {
        // The storage daemon was killed while it wrote.
        drop_leaks(target)?;
    }
    let written = verified(target, format)?;
    compare(source, target, how)?;
    unfinished.keep();
    Ok(Copied {
        virtual_size: source.virtual_size(),
        written,
        resumed: moved.resumed,
        shared: match is_shared {
            true => live.saturating_sub(moved.written),
            false => 0,
        },
    })
}

/// Checks the copy while it is made durable. Returns the bytes that it takes on the host.
fn verified(target: &Path, format: TargetFormat) -> Result<u64> {
    let _span = timeline::span("check the copy");
    let io_error = |source| CopyError::Io {
        path: target.into(),
        source,
    };
    let file = File::open(target).map_err(io_error)?;
    let synced = thread::scope(|scope| {
        let sync = scope.spawn(|| {
            let _span = timeline::span("make the copy durable");
            file.sync_all()
        });
        check_target(target, format)?;
        joined(sync.join()).map_err(|e| full_or(e, target))
    });
    synced?;
    let meta = file.metadata().map_err(io_error)?;
    Ok(meta.blocks().saturating_mul(512))
}

/// Makes a new raw copy share the blocks of its source. Returns the ranges still to be copied.
fn share(
    source: &Image,
    target: &Path,
    how: &CopyOptions,
    journal: Option<&ExtentJournal>,
) -> io::Result<Option<Extents>> {
    if how.format != TargetFormat::Raw || journal.is_some_and(|j| !j.done().is_empty()) {
        return Ok(None);
    }
    reflink::share(source, &File::options().write(true).open(target)?)
}

/// Discards ranges that an interrupted copy has written and not recorded: QEMU does not compress
/// into an existing cluster.
fn clear(ranges: &Extents, target: &dyn BlockWrite) -> Result<(), TransferError> {
    for range in ranges.iter() {
        let offset = range.start;
        let cleared = target.zero_at(offset, range.end - offset);
        cleared.map_err(|source| TransferError::Write { offset, source })?;
    }
    Ok(())
}

/// Reads both again and compares them, if requested.
pub(super) fn compare(source: &Image, target: &Path, how: &CopyOptions) -> Result<()> {
    if !how.compare {
        return Ok(());
    }
    let copy = spec(target, how.format);
    let differs = qemu_img::compare(&source.spec(), &copy, how.cancel.clone())
        .map_err(|e| convert_error(source, target, e))?;
    match differs {
        None => Ok(()),
        Some(what) => Err(CopyError::Differs {
            path: target.into(),
            what,
        }),
    }
}

pub(super) fn fraction(step: Step, ranges: &Extents) -> f64 {
    step.done as f64 / ranges.bytes().max(1) as f64
}

/// The ranges of the source with data; whole clusters if they are compressed.
pub(super) fn ranges(source: &Image, how: &CopyOptions) -> Result<Arc<Extents>> {
    let ranges = match &how.ranges {
        Some(ranges) => ranges.clone(),
        None => {
            let mut ranges = Extents::default();
            qemu_img::data_ranges(&source.spec(), &mut |range| ranges.insert(range))?;
            Arc::new(ranges)
        }
    };
    Ok(match how.compress {
        true => Arc::new(ranges.on_grains(empty::CLUSTER, source.virtual_size())),
        false => ranges,
    })
}

/// Opens the target, as an empty image or with the data of an earlier run, and the record of the
/// copy.
fn begin<'t>(
    source: &Image,
    target: &'t Path,
    how: &CopyOptions,
) -> Result<(Option<ExtentJournal>, Unfinished<'t>)> {
    let io_error = |source| CopyError::Io {
        path: target.into(),
        source,
    };
    if let Some(record) = &how.record
        && let Ok(left) = target.symlink_metadata()
    {
        let journal = record.open(&known_by(&left)).ok().flatten();
        if let Some(journal) = journal.filter(|journal| !journal.done().is_empty()) {
            return Ok((Some(journal), Unfinished(None)));
        }
        std::fs::remove_file(target).map_err(io_error)?;
    }
    // Created here, so that it is certainly new and may be removed.
    let file = match File::create_new(target) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            return Err(CopyError::Exists {
                path: target.into(),
            });
        }
        Err(e) => return Err(io_error(e)),
    };
    let unfinished = Unfinished(how.record.is_none().then_some(target));
    match how.format {
        TargetFormat::Raw => file.set_len(source.virtual_size()).map_err(io_error)?,
        TargetFormat::Qcow2 => {
            let (size, zstd) = (source.virtual_size(), how.compress && qemu_img::has_zstd());
            if empty::can_create(size) && how.compress == zstd {
                empty::write_qcow2(&file, size, zstd).map_err(|e| full_or(e, target))?;
            } else {
                let options = zstd.then_some("compression_type=zstd");
                qemu_img::create_with(target, how.format.name(), size, options)
                    .map_err(|e| convert_error(source, target, e))?;
            }
        }
    }
    let meta = file.metadata().map_err(io_error)?;
    let record = how.record.as_ref();
    let journal = record.map(|record| record.create(&known_by(&meta)));
    Ok((journal.transpose()?, unfinished))
}

/// The identity of a target file is its inode: it has only ever been in the partial directory.
fn known_by(meta: &std::fs::Metadata) -> Value {
    json!({"inode": meta.ino()})
}

/// The opened target of the copy.
pub(super) enum Into {
    File(Arc<dyn BlockWrite>),
    /// Behind a storage daemon.
    Image(Export<dyn BlockWrite>),
}

impl Into {
    /// Opens an existing target. An image made by hyper2kvm needs no storage daemon. Of a compressed
    /// one only the recorded ranges stay.
    pub(super) fn open(
        target: &Path,
        size: u64,
        format: TargetFormat,
        compressed: Option<&Extents>,
    ) -> Result<Self> {
        let io_error = |source| CopyError::Io {
            path: target.into(),
            source,
        };
        let file = File::options().read(true).write(true).open(target);
        let file = file.map_err(io_error)?;
        if format == TargetFormat::Raw {
            return Ok(Self::File(Arc::new(RawTarget::new(file, size))));
        }
        let writer: Option<Arc<dyn BlockWrite>> = match compressed {
            None => Qcow2Writer::open(file, size).map(|w| w.map(|w| Arc::new(w) as _)),
            Some(done) => PackedWriter::open(file, size, done).map(|w| w.map(|w| Arc::new(w) as _)),
        }
        .map_err(io_error)?;
        if let Some(writer) = writer {
            return Ok(Self::File(writer));
        }
        let image = Image::target(target, Format::QCOW2, size, compressed.is_some());
        Ok(Self::Image(Export::<dyn BlockWrite>::open_as_target(
            &image,
        )?))
    }

    pub(super) fn disk(&self) -> Arc<dyn BlockWrite> {
        match self {
            Self::File(file) => file.clone(),
            Self::Image(export) => export.disk(),
        }
    }

    pub(super) fn close(self) -> Result<()> {
        match self {
            Self::File(_) => Ok(()),
            Self::Image(export) => Ok(export.close()?),
        }
    }
}

/// Fails if copies of `needed` bytes do not fit into `folder`, before anything is written.
pub fn check_space(needed: u64, folder: &Path, compress: bool) -> Result<()> {
    check_room(folder, least_size(needed, compress))
}

/// The least space for a copy. The compression ratio is unknown, so only the impossible is refused.
pub fn least_size(needed: u64, compress: bool) -> u64 {
    if compress { needed / 8 } else { needed }
}

/// Fails if `needed` bytes do not fit into `folder`.
pub fn check_room(folder: &Path, needed: u64) -> Result<()> {
    let free = free_space(folder)?;
    if free < needed {
        return Err(CopyError::NoSpace {
            folder: folder.into(),
            free,
            needed,
        });
    }
    Ok(())
}

/// Bytes of free space below `folder`.
pub fn free_space(folder: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(folder).map_err(|e| CopyError::Io {
        path: folder.into(),
        source: e.into(),
    })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn full_or(error: io::Error, target: &Path) -> CopyError {
    let path = target.into();
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => CopyError::Full { path },
        _ => CopyError::Io {
            path,
            source: error,
        },
    }
}

pub(super) fn convert_error(source: &Image, target: &Path, error: ToolError) -> CopyError {
    match error.stderr() {
        Some(text)
            if text.contains("No space left on device") || text.contains("Disk quota exceeded") =>
        {
            CopyError::Full {
                path: target.into(),
            }
        }
        Some(text) if text.contains("lock") => ImageError::from_tool(source.path(), error).into(),
        _ => error.into(),
    }
}

fn spec(target: &Path, format: TargetFormat) -> Spec {
    let node = json!({
        "driver": format.name(),
        "file": {"driver": "file", "filename": target.to_string_lossy()},
    });
    Spec::named(node, [(target.to_owned(), false)])
}

/// The size of a file's reference counts; those of a long file exceed QEMU's memory limit for
/// foreign images.
fn reference_counts(target: &Path) -> Result<u64> {
    File::open(target)
        .and_then(|file| tables::reference_counts(&file, file.metadata()?.len()))
        .map_err(|source| CopyError::Io {
            path: target.into(),
            source,
        })
}

/// Frees clusters of a standalone qcow2 that interrupted writes have allocated without using them.
pub(crate) fn drop_leaks(target: &Path) -> Result<()> {
    Ok(qemu_img::drop_leaks(target, reference_counts(target)?)?)
}

/// Checks the metadata of a copy; a raw one has none.
pub(super) fn check_target(target: &Path, format: TargetFormat) -> Result<()> {
    if format == TargetFormat::Raw {
        return Ok(());
    }
    let counts = reference_counts(target)?;
    match qemu_img::check(&spec(target, format), counts)? {
        Some(result) if !result.is_sound() => Err(CopyError::Unsound {
            path: target.into(),
            errors: result.errors(),
        }),
        _ => Ok(()),
    }
}

/// A disk of zeroes.
pub(super) struct Nothing(pub(super) u64);

impl BlockRead for Nothing {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }
}

/// Removes the file unless it is kept.
struct Unfinished<'a>(Option<&'a Path>);

impl Unfinished<'_> {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.0
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "the unfinished copy stays behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn space_is_compared() {
        let folder = tempfile::tempdir().unwrap();
        check_room(folder.path(), 1).unwrap();
        let e = check_room(folder.path(), u64::MAX).unwrap_err();
        let CopyError::NoSpace { free, needed, .. } = e else {
            panic!("{e}");
        };
        assert!(free > 0 && needed == u64::MAX);
        let text = e.to_string();
        assert!(text.contains(&free.to_string()) && text.contains(&needed.to_string()));
        assert!(Error::from(e).hints[0].contains("space"));
    }

    #[test]
    fn what_went_wrong() {
        use std::os::unix::process::ExitStatusExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.raw");
        std::fs::write(&path, [0; 512]).unwrap();
        if !crate::skip::have(&["qemu-img"]) {
            return;
        }
        let image = Image::open_info(&path, None, &[]).unwrap();
        let fail = |stderr: &str| {
            let error = ToolError::Failed {
                tool: "qemu-img".into(),
                status: std::process::ExitStatus::from_raw(256),
                stderr: stderr.into(),
            };
            convert_error(&image, Path::new("/out/y"), error)
        };
        assert!(matches!(
            fail("qemu-img: error while writing at byte 0: No space left on device"),
            CopyError::Full { .. }
        ));
        assert!(matches!(
            fail("qemu-img: x: Failed to get \"write\" lock"),
            CopyError::Image(ImageError::InUse { .. })
        ));
        assert!(matches!(
            fail("qemu-img: error while reading at byte 0: Input/output error"),
            CopyError::Tool(_)
        ));
        // The unfinished file is removed unless it is kept.
        Unfinished(Some(&path)).keep();
        assert!(path.exists());
        drop(Unfinished(Some(&path)));
        assert!(!path.exists());
    }
}
