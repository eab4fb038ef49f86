//! `hyper2kvm rollback OUTDIR` or `rollback --journal FILE`

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::boot;
use crate::boot::in_use;
use crate::convert::{self, RestoreError, exchange, place};
use crate::disk::chain::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::fix::commit::CommitError;
use crate::fix::journal::{self, DiskRef, Journal, JournalError};
use crate::later;
use crate::lock::FileLock;
use crate::ui::{Ui, bytes};

use super::confine::{self, Writes};

#[derive(Debug, clap::Args)]
pub struct RollbackArgs {
    /// Output directory of the conversion
    #[arg(required_unless_present = "journal", conflicts_with = "journal")]
    folder: Option<PathBuf>,
    /// The journal itself, also that of an interrupted fix
    #[arg(long, value_name = "FILE")]
    journal: Option<PathBuf>,
    /// Directory in which backing files may lie besides the disk's own (repeatable)
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<PathBuf>,
    /// Restore even blocks that were changed after the fix (data written there is lost)
    #[arg(long)]
    force: bool,
}

pub fn run(args: &RollbackArgs, ui: &Ui) -> Result<()> {
    let path = match (&args.journal, &args.folder) {
        (Some(journal), _) => journal.clone(),
        (None, Some(folder)) => folder.join(journal::FILE_NAME),
        (None, None) => return Err(Error::usage("name an output directory or a journal")),
    };
    let path = std::path::absolute(&path)
        .map_err(|e| Error::usage(format!("{} is not a path", path.display())).because(e))?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    exchange::repair(folder)?;
    let _locks = folder.is_dir().then(|| Locks::take(folder)).transpose()?;
    let mut journal = Journal::load(&path).map_err(|e| match e {
        JournalError::Invalid { .. } => Error::usage(e.to_string()),
        JournalError::Untrusted(e) if !e.is_missing() => Error::from(e),
        other => Error::failed("opening the journal")
            .because(other)
            .hint("name the output directory of a conversion with --in-place, or --journal FILE"),
    })?;
    if !journal.doc.disk.in_place {
        let folder = crate::text::quote(journal.folder());
        let how = match later::Record::left(journal.folder())? {
            Some(_) => format!("hyper2kvm release {folder} discards the conversion"),
            None => format!("delete {folder} to discard the conversion"),
        };
        return Err(
            Error::failed("there is nothing to undo: the source was never changed").hint(how),
        );
    }
    let changed = journal.doc.changed().into_iter();
    let disks: Vec<DiskRef> = changed.map(|(disk, _)| disk).collect();
    let paths: Vec<String> = (disks.iter())
        .map(|disk| disk.path.display().to_string())
        .collect();
    let names = paths.join(" and ");
    ui.status("Restoring", &names);
    let mut images = Vec::new();
    // All of them, before any of them is written.
    for disk in &disks {
        let image = Image::open_info(&disk.path, Some(&disk.format), &args.allow_backing)?;
        image.hold_for_writing()?;
        in_use::refuse_suspended(&image)?;
        images.push(image);
    }
    let written = images.iter().flat_map(Image::written);
    confine::looks(&Writes {
        folder: None,
        there: written.chain([journal.folder()]).collect(),
    })?;
    let restored = convert::restore(&images, &mut journal, args.force);
    let restored = restored.map_err(|e| match e {
        RestoreError::Rollback(e) => not_restored(e, &names, disks.len() > 1),
        RestoreError::Other(e) => e,
    })?;
    ui.line(&format!(
        "{names} restored to what {} before the fix ({} of blocks)",
        if disks.len() > 1 {
            "they were"
        } else {
            "it was"
        },
        bytes(restored)
    ));
    ui.document(
        "rollback",
        json!({
            "disk": journal.doc.disk.path,
            "disks": paths,
            "restored_bytes": restored,
            "state": journal.doc.state,
        }),
    );
    Ok(())
}

/// Locks that exclude conversions and `boot` in the directory.
struct Locks {
    boot: Option<FileLock>,
    _conversion: Option<place::TargetLock>,
}

impl Locks {
    fn take(folder: &Path) -> Result<Self> {
        Ok(Self {
            _conversion: exchange::lock_of_partial(folder)?,
            boot: Some(boot::lock(folder)?),
        })
    }
}

impl Drop for Locks {
    fn drop(&mut self) {
        if let Some(lock) = self.boot.take() {
            lock.remove();
        }
    }
}

fn not_restored(error: CommitError, names: &str, several: bool) -> Error {
    let were = if several { "were" } else { "was" };
    let message = format!("{names} {were} not restored");
    match error {
        CommitError::NothingToUndo => {
            Error::failed("there is nothing to undo: the disk was never changed")
        }
        CommitError::DiskChanged { .. } => Error::new(ErrorKind::NotRolledBack, message)
            .because(error)
            .hint("Windows or a tool has written to it since; --force restores the old blocks all the same and loses what was written there"),
        CommitError::Untrusted(e) => {
            let remedy = e.remedy();
            let error = Error::new(ErrorKind::NotRolledBack, message).because(e);
            remedy.into_iter().fold(error, Error::hint)
        }
        other => Error::new(ErrorKind::NotRolledBack, message).because(other),
    }
}
