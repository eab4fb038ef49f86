//! `hyper2kvm boot OUTDIR`

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use serde_json::json;

use crate::boot::install::Destination;
use crate::boot::record::{Phase, Record, StageRecord};
use crate::boot::{self, Options, Wait};
use crate::convert::exchange;
use crate::error::Result;
use crate::guest::keys::Keys;
use crate::report::text;
use crate::ui::{Styled, Tone, Ui, count};

use super::connect::ConnectArgs;
use super::source::parsed_keys;

#[derive(Debug, clap::Args)]
pub struct BootArgs {
    /// Output directory of a conversion
    folder: PathBuf,
    #[command(flatten)]
    watch: WatchArgs,
    /// Key of a BitLocker volume, to read the results of the first boot: SELECTOR:file:PATH,
    /// SELECTOR:env:NAME or SELECTOR:key:KEY, as for convert (repeatable)
    #[arg(long, value_name = "SELECTOR:TYPE:VALUE")]
    key: Vec<String>,
    #[command(flatten)]
    install: InstallArgs,
}

/// Options for watching the boots.
#[derive(Debug, clap::Args)]
pub struct WatchArgs {
    #[command(flatten)]
    libvirt: ConnectArgs,
    /// How to detect that Windows is up
    #[arg(long, value_enum, default_value_t = WaitArg::Auto)]
    wait: WaitArg,
    /// Seconds each boot may take
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    timeout: u64,
    /// Seconds Windows may take to shut down
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    shutdown_timeout: u64,
    /// More restarts than this in one boot are a loop
    #[arg(long, value_name = "N", default_value_t = 8)]
    max_reboots: u32,
    /// Stop when this stage is done; the same command without it continues
    #[arg(long, value_enum)]
    stop_after: Option<StageArg>,
    /// Do not save the disk before the switch
    #[arg(long)]
    no_snapshot: bool,
}

impl WatchArgs {
    pub fn uri(&self) -> &str {
        &self.libvirt.connect
    }

    /// The options for a directory that is filled in later.
    pub fn options(&self, folder: PathBuf, keys: Keys, install: Option<Destination>) -> Options {
        Options {
            folder,
            uri: self.libvirt.connect.clone(),
            wait: match self.wait {
                WaitArg::Auto => Wait::Auto,
                WaitArg::Marker => Wait::Marker,
                WaitArg::Agent => Wait::Agent,
                WaitArg::Manual => Wait::Manual,
            },
            timeout: Duration::from_secs(self.timeout),
            shutdown_timeout: Duration::from_secs(self.shutdown_timeout),
            max_reboots: self.max_reboots,
            stop_after_bootstrap: self.stop_after.is_some(),
            snapshot: !self.no_snapshot,
            keys,
            install,
            rehearsal: None,
        }
    }
}

/// The target of disks that libvirt cannot read in their place.
#[derive(Debug, clap::Args)]
pub struct InstallArgs {
    /// Move the disks to this directory first, where libvirt can read them
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with = "pool",
        help_heading = "Placing the disks"
    )]
    install_to: Option<PathBuf>,
    /// Move the disks into this storage pool of libvirt first
    #[arg(long, value_name = "NAME", help_heading = "Placing the disks")]
    pool: Option<String>,
}

impl InstallArgs {
    pub fn place(&self) -> Option<Destination> {
        let folder = self.install_to.clone().map(Destination::Folder);
        folder.or_else(|| self.pool.clone().map(Destination::Pool))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WaitArg {
    /// The line of the first-boot script on COM1, or otherwise the guest agent
    Auto,
    Marker,
    Agent,
    /// You: shut Windows down from inside when it is up
    Manual,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StageArg {
    Bootstrap,
}

pub fn run(args: &BootArgs, ui: &Ui) -> Result<()> {
    let keys = parsed_keys(&args.key)?;
    let options = args
        .watch
        .options(args.folder.clone(), keys, args.install.place());
    boot::local(&options.uri)?;
    exchange::repair(&options.folder)?;
    let record = boot::boot(&options, ui)?;
    ui.styled(&text(&record));
    ui.quiet_warnings(&record.warnings);
    ui.document("boot", json!(record));
    Ok(())
}

/// Describes a successful boot; `by` is its evidence.
pub(super) fn up_after(seconds: f64, by: &str, reboots: u32) -> String {
    let restarts = count(reboots, "restart");
    format!("up after {seconds:.0} s ({by}, {restarts})")
}

fn text(record: &Record) -> Styled {
    let stage = |name: &str, entry: &Option<StageRecord>| {
        let up = entry.as_ref().and_then(|e| Some((e, e.up_by.as_ref()?)));
        match up {
            Some((e, by)) => format!("{name}: {}\n", up_after(e.seconds, by, e.reboots)),
            None => format!("{name}: not done\n"),
        }
    };
    let mut shown = Styled::default();
    if record.phase == Phase::Done {
        shown.push(Tone::Good, format!("{} is on VirtIO\n", record.name));
    }
    shown.push(Tone::Plain, stage("first boot", &record.bootstrap));
    shown.push(Tone::Plain, stage("final boot", &record.production));
    text::next(&mut shown, &record.next_commands);
    text::warnings(&mut shown, &record.warnings);
    shown
}
