//! `hyper2kvm convert SOURCE --virtio-iso PATH`, and `hyper2kvm convert --batch FILE`

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};
use serde_json::json;

use crate::boot::install;
use crate::convert;
use crate::error::{Error, Result};
use crate::report::text;
use crate::tool::virsh::Virsh;
use crate::ui::Ui;

use super::batch::{self, BatchArgs};
use super::options::{self, OneArgs, Options, SOURCE};

/// One VM, or a list of them.
#[derive(Debug)]
pub enum ConvertArgs {
    One {
        one: Box<OneArgs>,
        given: Options,
    },
    /// Options besides the list apply to all its VMs.
    Batch {
        batch: BatchArgs,
        given: Options,
    },
}

/// The options shown first in `convert -h`.
pub const FIRST: [&str; 10] = [
    "virtio-iso",
    "storage",
    "output-dir",
    "name",
    "format",
    "in-place",
    "network",
    "force",
    "dry-run",
    "key",
];

/// Assigns a group to an option that has none and is not among the first.
fn grouped(arg: Arg) -> Arg {
    let first = arg.get_long().is_none_or(|long| FIRST.contains(&long));
    match first || arg.get_help_heading().is_some() {
        true => arg,
        false => arg.help_heading("More"),
    }
}

impl Args for ConvertArgs {
    fn augment_args(command: Command) -> Command {
        let command = BatchArgs::augment_args(OneArgs::augment_args(command));
        command.mut_args(grouped).mut_arg(SOURCE, |source| {
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
            one: Box::new(OneArgs::from_arg_matches(matches)?),
            given: options::given(matches, true),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

pub fn run(args: &ConvertArgs, ui: &Ui) -> Result<()> {
    let (args, given) = match args {
        ConvertArgs::One { one, given } => (one, given),
        ConvertArgs::Batch { batch, given } => return batch::run(batch, given, ui),
    };
    let place = args.install.place();
    if args.fix.in_place && place.is_some() {
        return Err(Error::usage(
            "--in-place leaves the disk where it is: it cannot be moved to libvirt's directory too",
        ));
    }
    let virsh = Virsh::new(&args.libvirt.connect);
    let folder = place
        .as_ref()
        .map(|place| install::destination(place, &virsh));
    args.fix.confine(folder.transpose()?.as_deref())?;
    let mut job = args.fix.job()?;
    if args.fix.dry_run {
        return super::plan::show(&job, ui);
    }
    job.request = options::request(&job, given);
    let mut report = convert::convert(&job, ui)?;
    if let (Some(place), Some(folder)) = (place, report.outputs.folder()) {
        let _lock = crate::boot::lock(folder)?;
        let installed = install::install(folder, &place, &virsh).map_err(|e| {
            let again = crate::text::quote(folder);
            e.hint(format!(
                "the conversion is complete: hyper2kvm boot {again} --install-to DIR tries again"
            ))
        })?;
        for moved in installed.moved {
            for disk in &mut report.outputs.disks {
                if *disk == moved.from {
                    disk.clone_from(&moved.to);
                }
            }
        }
        report.warnings.extend(installed.warnings);
    }
    ui.styled(&text::conversion(&report, ui.is_verbose()));
    ui.quiet_warnings(&report.warnings);
    ui.document("convert", json!(report));
    super::plan::accepted(&report.accepted)
}
