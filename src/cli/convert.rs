//! `hyper2kvm convert SOURCE --virtio-iso PATH`

use serde_json::json;

use crate::convert::run;
use crate::error::Result;
use crate::report::text;
use crate::ui::Ui;

use super::source::FixArgs;

#[derive(Debug, clap::Args)]
pub struct ConvertArgs {
    #[command(flatten)]
    fix: FixArgs,
}

pub fn run(args: &ConvertArgs, ui: &Ui) -> Result<()> {
    args.fix.confine()?;
    let job = args.fix.job()?;
    if args.fix.dry_run {
        return super::plan::show(&job, ui);
    }
    let report = run::convert(&job, ui)?;
    ui.line(&text::conversion(&report));
    ui.document("convert", json!(report));
    Ok(())
}
