//! `hyper2kvm inspect SOURCE`

use serde_json::json;

use crate::convert::run;
use crate::convert::session::Session;
use crate::error::{Error, Result};
use crate::report::text;
use crate::ui::Ui;

use super::source::SourceArgs;

#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    #[command(flatten)]
    source: SourceArgs,
}

pub fn run(args: &InspectArgs, ui: &Ui) -> Result<()> {
    let work =
        tempfile::tempdir().map_err(|e| Error::failed("creating a temporary folder").because(e))?;
    let disks = args.source.open()?.disks(work.path())?;
    let source = run::first(&disks)?;
    let session = Session::read(source, &source.image()?)?;
    let survey = session.inspect()?;
    session.close()?;
    ui.line(&text::inspection(&survey.inspection));
    ui.document("inspect", json!(survey.inspection));
    Ok(())
}
