//! `hyper2kvm serve OUTDIR`: holds what a running VM reads its source through.
//!
//! QEMU opens a source on this host by itself, so there is nothing to hold then; `convert --copy later` takes no
//! other.

use std::path::PathBuf;

use serde_json::json;

use crate::error::Result;
use crate::later::Record;
use crate::pull::folder::Folder;
use crate::ui::Ui;

#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// Output directory of `convert --copy later`
    folder: PathBuf,
}

pub fn run(args: &ServeArgs, ui: &Ui) -> Result<()> {
    let folder = Folder::open(&args.folder)?;
    let record = Record::left(&folder.path)?;
    let why = match &record {
        Some(record) => {
            record.check_source(&folder.path)?;
            "QEMU reads the source on this host by itself"
        }
        None => "the disks stand alone",
    };
    ui.line(&format!("nothing to serve: {why}"));
    let source = record.map_or_else(Vec::new, |record| record.files());
    let source: Vec<_> = source
        .iter()
        .map(|file| crate::text::of_path(file))
        .collect();
    ui.document("serve", json!({"serving": false, "source": source}));
    Ok(())
}
