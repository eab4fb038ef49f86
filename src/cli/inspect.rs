//! `hyper2kvm inspect SOURCE`

use serde_json::json;

use crate::convert::linux;
use crate::convert::session::survey;
use crate::error::Result;
use crate::report::text;
use crate::ui::Ui;

use super::source::SourceArgs;

#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    #[command(flatten)]
    source: SourceArgs,
}

pub fn run(args: &InspectArgs, ui: &Ui) -> Result<()> {
    let machine = args.source.open()?;
    let mut survey = survey(&machine)?;
    linux::complete(&machine, &mut survey.inspection, ui)?;
    ui.line(&text::inspection(&survey.inspection));
    ui.document("inspect", json!(survey.inspection));
    Ok(())
}
