//! `hyper2kvm verify DISK`

use clap::ValueEnum;
use serde_json::json;

use crate::boot_path::Controller;
use crate::convert::linux;
use crate::convert::session::look;
use crate::error::{Error, ErrorKind, Result};
use crate::inspect::{OsFamily, Severity};
use crate::report::{CheckState, text};
use crate::ui::Ui;
use crate::verify;

use super::source::SourceArgs;

#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Controller the disk must boot from (repeatable) [default: virtio-blk and virtio-scsi]
    #[arg(long, value_enum)]
    controller: Vec<ControllerArg>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ControllerArg {
    Sata,
    Ide,
    VirtioBlk,
    VirtioScsi,
}

impl From<ControllerArg> for Controller {
    fn from(arg: ControllerArg) -> Self {
        match arg {
            ControllerArg::Sata => Controller::Sata,
            ControllerArg::Ide => Controller::Ide,
            ControllerArg::VirtioBlk => Controller::VirtioBlk,
            ControllerArg::VirtioScsi => Controller::VirtioScsi,
        }
    }
}

pub fn run(args: &VerifyArgs, ui: &Ui) -> Result<()> {
    args.source.confine(None)?;
    let mut wanted: Vec<Controller> = args.controller.iter().map(|c| (*c).into()).collect();
    if wanted.is_empty() {
        wanted = vec![Controller::VirtioBlk, Controller::VirtioScsi];
    }
    let source = args.source.open()?;
    let (engine, mut survey, mut checks) =
        look(&source, args.source.reader()?, ui, |survey, guest| {
            verify::verify(survey, guest, &wanted)
        })?;
    if survey.inspection.os.family == OsFamily::Linux {
        linux::complete(&source, &mut survey.inspection, ui)?;
        checks = linux::checks(&survey.inspection, &wanted);
    }
    let ready = verify::is_ready(&checks);
    for check in &checks {
        let mark = match (check.state, check.severity) {
            (CheckState::Ok, _) => "ok",
            (CheckState::CouldNotRun, _) => "?",
            (CheckState::Fault, Severity::Blocker) => "FAULT",
            (CheckState::Fault, _) => "warn",
        };
        ui.line(&format!("{mark:>6}  {:<24} {}", check.id, check.message));
    }
    ui.line(&text::controllers(&survey.inspection.controllers));
    ui.line(if ready { "READY" } else { "NOT READY" });
    ui.document(
        "verify",
        json!({"ready": ready, "engine": engine.name(), "controllers": survey.inspection.controllers, "checks": checks}),
    );
    if ready {
        return Ok(());
    }
    let mut error = Error::new(
        ErrorKind::NotReady,
        format!("{} is not boot-ready", survey.inspection.source.path),
    );
    error.reported = true;
    Err(error.hint("hyper2kvm convert makes it ready"))
}
