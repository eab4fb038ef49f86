//! `hyper2kvm convert SOURCE --virtio-iso PATH`, and `hyper2kvm convert --batch FILE`

use clap::{ArgMatches, Args, Command, FromArgMatches};
use serde_json::json;

use crate::convert::run;
use crate::error::Result;
use crate::report::text;
use crate::ui::Ui;

use super::batch::{self, BatchArgs};
use super::options::{self, Options, SOURCE};
use super::source::FixArgs;

/// One machine, or a list of them.
#[derive(Debug)]
pub enum ConvertArgs {
    One {
        fix: Box<FixArgs>,
        given: Options,
    },
    /// Options given besides the list are for all its machines.
    Batch {
        batch: BatchArgs,
        given: Options,
    },
}

impl Args for ConvertArgs {
    fn augment_args(command: Command) -> Command {
        BatchArgs::augment_args(FixArgs::augment_args(command)).mut_arg(SOURCE, |source| {
            source.required(false).required_unless_present(batch::BATCH)
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for ConvertArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let batch = BatchArgs::from_arg_matches(matches)?;
        if batch.batch.is_some() {
            return Ok(Self::Batch {
                batch,
                given: options::given(matches, false),
            });
        }
        Ok(Self::One {
            fix: Box::new(FixArgs::from_arg_matches(matches)?),
            given: options::given(matches, true),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

pub fn run(args: &ConvertArgs, ui: &Ui) -> Result<()> {
    let (fix, given) = match args {
        ConvertArgs::One { fix, given } => (fix, given),
        ConvertArgs::Batch { batch, given } => return batch::run(batch, given, ui),
    };
    let mut job = fix.job()?;
    if fix.dry_run {
        return super::plan::show(&job, ui);
    }
    job.request = options::request(&job, given);
    let report = run::convert(&job, ui)?;
    ui.line(&text::conversion(&report));
    ui.document("convert", json!(report));
    Ok(())
}
