//! `hyper2kvm release OUTDIR`, for every kind of directory.

use std::path::PathBuf;

use serde_json::json;

use crate::error::Result;
use crate::pull::release::{self, Options};
use crate::ui::Ui;

use super::connect::{ConnectArgs, RECORDED};

#[derive(Debug, clap::Args)]
#[command(mut_arg("connect", |arg| arg.help(RECORDED)))]
pub struct ReleaseArgs {
    /// Output directory of `convert --copy later`, or of `sync`
    folder: PathBuf,
    #[command(flatten)]
    libvirt: ConnectArgs,
    /// Release even if the VM has run: the data it has written is lost
    #[arg(long)]
    force: bool,
}

pub fn run(args: &ReleaseArgs, ui: &Ui) -> Result<()> {
    let options = Options {
        folder: args.folder.clone(),
        uri: args.libvirt.connect.clone(),
        force: args.force,
    };
    let released = release::release(&options, ui)?;
    ui.line(&format!("{} is given up", released.folder.display()));
    ui.line(&format!("lost: {}", released.lost));
    for file in &released.source {
        ui.line(&format!("nothing stands on {} any more", file.display()));
    }
    for path in &released.kept {
        ui.warn(&format!(
            "kept, since hyper2kvm did not write it: {}",
            path.display()
        ));
    }
    ui.document("release", json!(released));
    Ok(())
}
