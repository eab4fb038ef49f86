//! `hyper2kvm inspect SOURCE`

use serde_json::json;

use crate::convert::linux;
use crate::convert::session::look;
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
    let source = args.source.open()?;
    let (engine, mut survey, ()) = look(&source, args.source.reader()?, ui, |_, _| ())?;
    linux::complete(&source, &mut survey.inspection, ui)?;
    ui.line(&text::inspection(&survey.inspection));
    let mut facts = json!(survey.inspection);
    facts["engine"] = json!(engine.name());
    ui.document("inspect", facts);
    Ok(())
}
