//! `hyper2kvm rehearse SOURCE`, and `hyper2kvm rehearse --batch FILE`

use std::path::{Path, PathBuf};

use clap::{ArgMatches, Args, Command, FromArgMatches};
use serde_json::json;

use crate::convert::name::safe_name;
use crate::error::{Error, ErrorKind, Result};
use crate::rehearse::result::{Rehearsal, Stage, Verdict};
use crate::rehearse::{self, Conversion};
use crate::report;
use crate::ui::{Styled, Tone, Ui};

use super::boot::up_after;
use super::options::{self, DRY_RUN, FORCE, OUTPUT_DIR, Options, SOURCE};
use super::rehearse_list::{self, BATCH, ListArgs};
use super::rehearse_options::{OneArgs, definitions, objection, with_texts};
use super::source::parsed_keys;

/// Options of the rehearsal that are not for its conversion.
const NOT_FOR_CONVERT: [&str; 6] = [OUTPUT_DIR, FORCE, DRY_RUN, "install-to", "pool", "connect"];

/// One VM, or a list of them.
#[derive(Debug)]
pub enum RehearseArgs {
    One {
        one: Box<OneArgs>,
        given: Options,
    },
    /// Options besides the list apply to all its VMs.
    Batch {
        list: ListArgs,
        given: Options,
    },
}

impl Args for RehearseArgs {
    fn augment_args(command: Command) -> Command {
        let command = ListArgs::augment_args(with_texts(OneArgs::augment_args(command)));
        command.mut_arg(SOURCE, |source| {
            source.required(false).required_unless_present(BATCH)
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for RehearseArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let list = ListArgs::from_arg_matches(matches)?;
        if list.batch.is_some() {
            return Ok(Self::Batch {
                list,
                given: options::given_in(&definitions(), matches, false),
            });
        }
        Ok(Self::One {
            one: Box::new(OneArgs::from_arg_matches(matches)?),
            given: options::given_in(&definitions(), matches, true),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

pub fn run(args: &RehearseArgs, ui: &Ui) -> Result<()> {
    match args {
        RehearseArgs::One { one, given } => {
            refuse_foreign(given)?;
            run_one(one, given, ui)
        }
        RehearseArgs::Batch { list, given } => {
            refuse_foreign(given)?;
            rehearse_list::run(list, given, ui)
        }
    }
}

fn refuse_foreign(given: &Options) -> Result<()> {
    let objections = given.iter().filter_map(|(n, v)| objection(n, v));
    match objections.into_iter().next() {
        Some(objection) => Err(Error::usage(objection)
            .hint("leave it out here, and give it to hyper2kvm convert afterwards")),
        None => Ok(()),
    }
}

fn run_one(one: &OneArgs, given: &Options, ui: &Ui) -> Result<()> {
    let job = match one.fix.job() {
        Err(error) if error.kind == ErrorKind::Refused => return Err(refused(one, error, ui)),
        job => job?,
    };
    if one.fix.dry_run {
        one.fix.confine(None)?;
        return super::plan::show(&job, ui);
    }
    let (name, uuid) = (safe_name(&job.vm.machine.name), job.vm.machine.uuid);
    // The conversion opens the source again.
    drop(job);
    let mut for_convert = given.clone();
    for_convert.retain(|option, _| {
        options::shape(option).is_some() && !NOT_FOR_CONVERT.contains(&option.as_str())
    });
    let env = options::hide_keys(&mut for_convert);
    let keys = parsed_keys(&one.fix.source.key)?;
    let wanted = rehearse::Options {
        source: one.fix.source.source.clone(),
        uuid,
        evidence: evidence(one, &name),
        name,
        place: one.install.place(),
        network: one.rehearsal_network.clone(),
        convert: Conversion {
            source: one.fix.source.source.clone(),
            args: options::arguments(&for_convert),
            env,
        },
        boot: one.watch.options(PathBuf::new(), keys, None),
    };
    let (rehearsal, error) = rehearse::rehearse(&wanted, ui)?;
    ui.styled(&text(&rehearsal));
    ui.document("rehearse", json!(rehearsal));
    match error {
        None => Ok(()),
        Some(mut error) => {
            error.reported = true;
            Err(error)
        }
    }
}

fn evidence(one: &OneArgs, name: &str) -> PathBuf {
    let default = || PathBuf::from(format!("{name}-rehearsal"));
    one.fix.output_dir.clone().unwrap_or_else(default)
}

/// Reports a source that is refused before anything is known about it.
fn refused(one: &OneArgs, mut error: Error, ui: &Ui) -> Error {
    let source = &one.fix.source.source;
    let stem = source.file_stem().unwrap_or_default().to_string_lossy();
    let name = safe_name(one.fix.name.as_deref().unwrap_or(&stem));
    let mut rehearsal = Rehearsal::new(&name, source, &evidence(one, &name));
    rehearsal.failed(&error);
    rehearsal.advise();
    ui.document("rehearse", json!(rehearsal));
    error.reported = true;
    error
}

/// The verdict and the next command first, as for every verb.
fn text(rehearsal: &Rehearsal) -> Styled {
    let stage = |stage: &Stage| match stage.state.as_str() {
        "not-run" => "not run".to_owned(),
        "up" => {
            let by = stage.up_by.as_deref().unwrap_or_default();
            up_after(stage.seconds, by, stage.reboots)
        }
        state => format!("{state} after {:.0} s", stage.seconds),
    };
    let mut text = Styled::default();
    let tone = match rehearsal.verdict {
        Verdict::Up => Tone::Good,
        Verdict::Down | Verdict::Refused => Tone::Bad,
    };
    text.push(tone, rehearsal.verdict.as_str().to_uppercase());
    text.push(Tone::Plain, format!(": {}\n", rehearsal.name));
    text.row("first boot", stage(&rehearsal.stages.bootstrap));
    text.row("final boot", stage(&rehearsal.stages.production));
    text.row("evidence", shown(&rehearsal.evidence_dir));
    for left in &rehearsal.left {
        text.row("left behind", left);
    }
    let steps: Vec<_> = rehearsal.next.iter().map(|step| step_of(step)).collect();
    report::text::next(&mut text, &steps);
    for finding in &rehearsal.findings {
        let (severity, id) = (&finding.severity, &finding.id);
        text.push(Tone::Plain, format!("\n{severity} [{id}]: "));
        text.hang();
        text.push(Tone::Plain, format!("{}\n", finding.message));
    }
    report::text::warnings(&mut text, &rehearsal.warnings);
    text
}

/// A command to copy, or a comment.
fn step_of(step: &str) -> String {
    match step.starts_with("hyper2kvm ") || step.starts_with("virsh ") {
        true => step.to_owned(),
        false => format!("# {step}"),
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &[&str]) -> Result<RehearseArgs, clap::Error> {
        let command = RehearseArgs::augment_args(Command::new("rehearse"));
        let matches = command.try_get_matches_from([&["rehearse"], line].concat())?;
        RehearseArgs::from_arg_matches(&matches)
    }

    #[test]
    fn options_about_a_copy_or_the_source_are_usage_errors() {
        for line in [
            &["d.raw", "--in-place"][..],
            &["d.raw", "--output-device", "/dev/x"],
            &["d.raw", "--format", "raw"],
            &["d.raw", "--compress"],
            &["d.raw", "--verify-copy"],
            &["d.raw", "--copy", "later"],
            &["d.raw", "--copy", "now"],
            &["d.raw", "--from-sync"],
            &["d.raw", "--resume"],
            &["--batch", "l.yaml", "--compress"],
            &["--batch", "l.yaml", "d.raw"],
            &[],
        ] {
            let Ok(args) = parse(line) else { continue };
            let (RehearseArgs::One { given, .. } | RehearseArgs::Batch { given, .. }) = &args;
            let error = refuse_foreign(given).expect_err(&format!("{line:?}"));
            assert_eq!(error.kind, ErrorKind::Usage);
        }
        let fine = [
            "d.raw",
            "--format",
            "qcow2",
            "--timeout",
            "5",
            "--storage",
            "virtio-scsi",
        ];
        let RehearseArgs::One { given, .. } = parse(&fine).unwrap() else {
            panic!("one VM");
        };
        refuse_foreign(&given).unwrap();
        assert_eq!(given["timeout"], ["5"]);
    }
}
