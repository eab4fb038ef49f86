//! Copies an image with its whole chain into one new file, and checks the copy.
//!
//! `qemu-img convert` does the work: it skips what the source does not allocate and what is zero.
//! The target never exists before and is removed again when anything goes wrong.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use serde::Serialize;
use serde_json::json;

use super::chain::{Image, ImageError};
use super::detect::Format;
use super::tables;
use crate::error::Blocker;
use crate::tool::pass::Spec;
use crate::tool::{ToolError, qemu_img};

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
    /// Reads source and copy again and compares them.
    pub compare: bool,
    /// A device to copy to reads as zeroes.
    pub target_is_zero: bool,
    /// Stops the copy when raised.
    pub cancel: Option<Arc<AtomicBool>>,
}

/// What a copy amounted to, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Copied {
    pub virtual_size: u64,
    /// What the target takes on the host.
    pub written: u64,
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
            CopyError::Tool(e) => e.into(),
            e => {
                let mut error = Self::failed(e.to_string());
                match e {
                    CopyError::NoSpace { .. } | CopyError::Full { .. } => {
                        const REMEDY: &str = "free some space or choose another output folder";
                        let blocker = Blocker::new("output-space", &error.message, REMEDY);
                        error.blockers.push(blocker);
                        error = error.hint(REMEDY);
                    }
                    CopyError::RawCompressed => {
                        error.kind = crate::error::ErrorKind::Usage;
                        error = error.hint("use qcow2 with compression");
                    }
                    CopyError::Io { source, .. } => error = error.because(source),
                    _ => {}
                }
                error
            }
        }
    }
}

pub type Result<T, E = CopyError> = std::result::Result<T, E>;

/// Copies `source` to the new file `target`, telling the fraction done (0 to 1). Whether there is room
/// is for [`check_space`] to say.
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
    let target = &std::path::absolute(target).map_err(|source| CopyError::Io {
        path: target.into(),
        source,
    })?;
    let io_error = |source| CopyError::Io {
        path: target.clone(),
        source,
    };
    // Creating the file ourselves makes sure that it is new, and that it is ours to remove.
    match File::create_new(target) {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            return Err(CopyError::Exists {
                path: target.clone(),
            });
        }
        Err(e) => return Err(io_error(e)),
    }
    let unfinished = Unfinished(Some(target));
    let options = (compress && qemu_img::has_zstd()).then_some("compression_type=zstd");
    let new_file = qemu_img::Target::File {
        path: target,
        format: format.name(),
        options,
        compress,
    };
    qemu_img::convert(&source.spec(), new_file, how.cancel.clone(), progress)
        .map_err(|e| convert_error(source, target, e))?;
    // qemu-img leaves the data in the page cache: it is written out while the copy is checked.
    let file = File::open(target).map_err(io_error)?;
    let synced = thread::scope(|scope| {
        let sync = scope.spawn(|| file.sync_all());
        check_target(target, format)?;
        sync.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            .map_err(|e| full_or(e, target))
    });
    synced?;
    if how.compare {
        let differs = qemu_img::compare(&source.spec(), &spec(target, format), how.cancel.clone())
            .map_err(|e| convert_error(source, target, e))?;
        if let Some(what) = differs {
            return Err(CopyError::Differs {
                path: target.clone(),
                what,
            });
        }
    }
    let written = file
        .metadata()
        .map_err(io_error)?
        .blocks()
        .saturating_mul(512);
    unfinished.keep();
    Ok(Copied {
        virtual_size: source.virtual_size(),
        written,
    })
}

/// Refuses when copies that take `needed` bytes will not fit into `folder`, before anything is written.
pub fn check_space(needed: u64, folder: &Path, compress: bool) -> Result<()> {
    check_room(folder, least_size(needed, compress))
}

/// How far it can be compressed nobody knows: refuse only what cannot work.
pub fn least_size(needed: u64, compress: bool) -> u64 {
    if compress { needed / 8 } else { needed }
}

/// Refuses when `needed` bytes will not fit into `folder`.
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

/// Bytes that can be written below `folder`.
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

fn check_target(target: &Path, format: TargetFormat) -> Result<()> {
    // Of a long file they take more than QEMU has for images of others.
    let counts = File::open(target)
        .and_then(|file| tables::reference_counts(&file, file.metadata()?.len()))
        .map_err(|source| CopyError::Io {
            path: target.into(),
            source,
        })?;
    match qemu_img::check(&spec(target, format), counts)? {
        Some(result) if !result.is_sound() => Err(CopyError::Unsound {
            path: target.into(),
            errors: result.errors(),
        }),
        _ => Ok(()),
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
        if crate::tool::find("qemu-img").is_none() {
            eprintln!("SKIP: qemu-img is not installed");
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
        // The unfinished file goes unless it is kept.
        Unfinished(Some(&path)).keep();
        assert!(path.exists());
        drop(Unfinished(Some(&path)));
        assert!(!path.exists());
    }
}
