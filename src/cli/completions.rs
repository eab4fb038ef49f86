//! `hyper2kvm completions SHELL`

use clap::CommandFactory;

use crate::error::Result;
use crate::ui::Ui;

#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    shell: clap_complete::Shell,
}

pub fn run(args: &CompletionsArgs, ui: &Ui) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(
        args.shell,
        &mut super::Cli::command(),
        "hyper2kvm",
        &mut script,
    );
    ui.raw(&String::from_utf8_lossy(&script));
    Ok(())
}
