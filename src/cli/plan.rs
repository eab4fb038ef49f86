//! `hyper2kvm plan SOURCE --virtio-iso PATH`

use crate::convert::prepare;
use crate::convert::run::{self, Job, Planned};
use crate::error::{Error, ErrorKind, Result};
use crate::report::{self, text};
use crate::ui::Ui;

use super::again;
use super::source::FixArgs;

#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    #[command(flatten)]
    fix: FixArgs,
}

pub fn run(args: &PlanArgs, ui: &Ui) -> Result<()> {
    args.fix.source.confine(None)?;
    show(&args.fix.job()?, ui)
}

/// Prints the plan; blockers make it an error with exit code 3, after the plan was shown.
pub fn show(job: &Job, ui: &Ui) -> Result<()> {
    let (survey, prepared) = match run::plan_only(job, ui)? {
        Planned::Windows(survey, prepared) => (survey, prepared),
        Planned::Linux(inspection, plan) => {
            // Without facts there is no plan to show.
            if inspection.linux.is_some() {
                ui.styled(&plan.text());
            }
            if !plan.blockers.is_empty() {
                return Err(prepare::refused(&inspection, plan.blockers));
            }
            ui.document("plan", plan.document(&inspection));
            return accepted(&plan.accepted);
        }
    };
    let mut shown = text::plan(&prepared.plan, carry_out());
    if let Some(outlook) = &prepared.outlook {
        outlook.append_to(&mut shown);
    }
    ui.styled(&shown);
    ui.quiet_warnings(&prepared.plan.warnings);
    let blockers = prepared.plan.blockers.clone();
    if !blockers.is_empty() {
        return Err(prepare::refused(&survey.inspection, blockers));
    }
    ui.document(
        "plan",
        report::plan_document(
            &prepared.plan,
            prepared.outlook.as_ref(),
            &survey.inspection,
        ),
    );
    accepted(&prepared.plan.accepted)
}

/// The command that does what was planned: `plan`, or `convert --dry-run`.
fn carry_out() -> Option<String> {
    let typed = |verb| again::with_verb(verb, "convert");
    typed("plan").or_else(|| typed("convert"))
}

/// What was accepted makes the result not ready; the document says so already.
pub fn accepted(codes: &[String]) -> Result<()> {
    if codes.is_empty() {
        return Ok(());
    }
    let mut error = Error::new(
        ErrorKind::NotReady,
        format!("NOT READY: accepted {}", codes.join(", ")),
    );
    error.reported = true;
    Err(error.hint("the remedy of each is in the plan without --accept"))
}
