//! `hyper2kvm plan SOURCE --virtio-iso PATH`

use crate::convert::Planned;
use crate::convert::job::Job;
use crate::convert::{self, prepare};
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

/// Prints the plan; blockers cause an error with exit code 3, after the plan was printed.
pub fn show(job: &Job, ui: &Ui) -> Result<()> {
    let Planned {
        inspection,
        plan,
        outlook,
    } = convert::plan_only(job, ui)?;
    let is_linux = plan.linux.is_some();
    // A Linux that cannot be read has no plan to print.
    if !is_linux || inspection.linux.is_some() {
        let mut shown = text::plan(&plan, carry_out());
        if let Some(outlook) = &outlook {
            outlook.append_to(&mut shown);
        }
        ui.styled(&shown);
    }
    if !is_linux {
        ui.quiet_warnings(&plan.warnings);
    }
    if !plan.blockers.is_empty() {
        return Err(prepare::refused(&inspection, plan.blockers));
    }
    ui.document(
        "plan",
        report::plan_document(&plan, outlook.as_ref(), &inspection),
    );
    accepted(&plan.accepted)
}

/// The command that carries out the plan: for `plan`, or `convert --dry-run`.
fn carry_out() -> Option<String> {
    let typed = |verb| again::with_verb(verb, "convert");
    typed("plan").or_else(|| typed("convert"))
}

/// The error for accepted problems, which make the result not ready; the document already has them.
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
