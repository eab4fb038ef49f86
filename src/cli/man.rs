//! `hyper2kvm man [FOLDER]`: the man pages, one per verb, made from the same definitions as `--help`.

use std::path::PathBuf;

use clap::CommandFactory;

use crate::error::{Error, Result};
use crate::ui::Ui;

#[derive(Debug, clap::Args)]
pub struct ManArgs {
    /// Folder for one page per command; without it the main page goes to stdout
    folder: Option<PathBuf>,
}

pub fn run(args: &ManArgs, ui: &Ui) -> Result<()> {
    let failed = |e: std::io::Error| Error::failed("writing the man pages").because(e);
    match &args.folder {
        Some(folder) => {
            std::fs::create_dir_all(folder).map_err(failed)?;
            clap_mangen::generate_to(super::Cli::command(), folder).map_err(failed)
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(super::Cli::command())
                .render(&mut page)
                .map_err(failed)?;
            ui.raw(&String::from_utf8_lossy(&page));
            Ok(())
        }
    }
}
