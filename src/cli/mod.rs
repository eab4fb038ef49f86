//! The command line: one file per verb, each with its arguments and a short `run()`.

mod again;
pub mod batch;
pub mod boot;
pub mod completions;
mod confine;
mod connect;
pub mod convert;
pub mod demo;
pub mod docs;
pub mod doctor;
pub mod drivers;
pub mod inspect;
mod limits;
mod list;
pub mod man;
pub mod options;
pub mod plan;
pub mod pull;
mod readiness;
pub mod rehearse;
mod rehearse_list;
mod rehearse_options;
pub mod release;
pub mod rollback;
pub mod serve;
pub mod source;
pub mod sync;
pub mod values;
pub mod verify;
pub mod wire;

use std::process::ExitCode;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::error::{Error, ErrorKind, Result};
use crate::source::mirror;
use crate::stop;
use crate::tool::probe;
use crate::ui::{self, ProgressMode, Ui};

const EXIT_CODES: &str = "\
Exit codes:
  0    ok
  1    failed, nothing changed
  2    usage
  3    refused: this guest cannot be converted in its present state (each blocker has a remedy)
  4    not boot-ready (verify), or Windows did not come up (boot, rehearse)
  5    a host tool or permission is missing
  6    failed and rolled back
  7    failed and NOT rolled back
  70   internal error
  101-120  of several VMs, 1-20 failed (120: 20 or more); the JSON document has the number
  130  interrupted";

/// Makes a Windows VM disk boot on KVM with VirtIO.
#[derive(Debug, Parser)]
#[command(name = "hyper2kvm", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

#[derive(Debug, Args)]
struct Global {
    /// Print one JSON document on stdout and nothing else there
    #[arg(long, global = true, help_heading = "Output")]
    json: bool,
    /// How progress is shown on stderr
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        help_heading = "Output"
    )]
    progress: ProgressMode,
    /// Print more detail; repeat for a debug log
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Output")]
    verbose: u8,
    /// Print warnings and errors only
    #[arg(
        short,
        long,
        global = true,
        conflicts_with = "verbose",
        help_heading = "Output"
    )]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what is on a disk, and from which controllers Windows would boot
    Inspect(inspect::InspectArgs),
    /// Show what `convert` would do, and what blocks it; writes nothing
    Plan(Box<plan::PlanArgs>),
    /// Make a Windows disk boot on KVM: inspect, plan, fix, copy, domain XML, report
    Convert(Box<convert::ConvertArgs>),
    /// Copy disks while the VM runs; `convert --from-sync` copies the rest
    Sync(sync::SyncArgs),
    /// Check whether a disk would boot; writes nothing
    Verify(verify::VerifyArgs),
    /// Boot a converted VM twice on libvirt: bootstrap, then VirtIO
    Boot(boot::BootArgs),
    /// Try both boots first, on a throw-away overlay without a network
    Rehearse(Box<rehearse::RehearseArgs>),
    /// Copy the rest of `convert --copy later` from the source; the VM may run or be off
    Pull(pull::PullArgs),
    /// Delete a VM whose disks are still on the source: domain, output directory
    Release(release::ReleaseArgs),
    /// Keep a running VM connected to a source on another host; resume it after an outage
    Serve(serve::ServeArgs),
    /// Undo a fix made with `convert --in-place`
    Rollback(rollback::RollbackArgs),
    /// Show which drivers the catalogue and a virtio-win driver source offer, per Windows
    Drivers(drivers::DriversArgs),
    /// Build a small Windows-shaped disk and a virtio-win directory, and convert them
    Demo(demo::DemoArgs),
    /// Show whether this host is ready to convert, boot and rehearse, and what is missing
    Doctor(doctor::DoctorArgs),
    /// Print a page of the documentation
    Docs(docs::DocsArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
    /// Write the man pages
    Man(man::ManArgs),
}

/// Whether there is enough memory to read a command line. Checked before anything else.
pub fn can_start() -> bool {
    limits::has_memory_to_speak()
}

pub fn main() -> ExitCode {
    crate::timeline::begin();
    let cli = match parse() {
        Ok(cli) => cli,
        Err(error) => return usage_error(&error),
    };
    let verbosity = if cli.global.quiet {
        0
    } else {
        1 + cli.global.verbose
    };
    let ui = Ui::new(cli.global.json, verbosity, cli.global.progress);
    log_to_stderr(verbosity);
    if let Err(error) = stop::install() {
        ui.error(&Error::new(ErrorKind::Internal, "watching for signals").because(error));
        return ExitCode::from(ErrorKind::Internal.code());
    }
    // A panic is a bug of this program, but it must still run the guards and end in a documented
    // exit code.
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(cli.command, &ui)))
        .unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Internal,
                "internal error; please report this with the message above",
            )
            .hint("a source is only ever written with --in-place; then `hyper2kvm rollback` restores it"))
        });
    let outcome = outcome.map_err(with_trouble);
    let outcome = outcome.and_then(|()| match ui::lost_output() {
        Some(why) => Err(Error::failed("writing the result to standard output")
            .because_of(why)
            .hint("what was asked for is done; only its result could not be printed")),
        None => Ok(()),
    });
    let code = match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let error = with_remedy(error);
            ui.error(&error);
            error.exit_code()
        }
    };
    mirror::close();
    code
}

/// Adds the reason why a remote source is unreadable: its readers got only an input error.
fn with_trouble(error: Error) -> Error {
    if error.kind != ErrorKind::Failed || error.is_interrupted() {
        return error;
    }
    let Some(trouble) = mirror::trouble() else {
        return error;
    };
    let hint = trouble.hint();
    let error = error.hint(format!("on the wire: {trouble}"));
    hint.into_iter().fold(error, Error::hint)
}

/// Parses the command line. Help and usage errors are coloured by the same rule as everything else.
fn parse() -> std::result::Result<Cli, clap::Error> {
    let colour = ui::takes_colour(&std::io::stdout()) && ui::takes_colour(&std::io::stderr());
    let choice = match colour {
        true => clap::ColorChoice::Always,
        false => clap::ColorChoice::Never,
    };
    let matches = Cli::command().color(choice).try_get_matches()?;
    Cli::from_arg_matches(&matches)
}

/// Explains signals and refusals of the host, wherever they occurred.
fn with_remedy(mut error: Error) -> Error {
    if error.is_interrupted() {
        error.kind = ErrorKind::Interrupted;
        return error;
    }
    let failed = matches!(
        error.kind,
        ErrorKind::Failed | ErrorKind::Internal | ErrorKind::MissingTool
    );
    if let Some(limit) = limits::too_little_memory().filter(|_| failed) {
        // A thread that cannot be started for lack of memory panics.
        if error.kind == ErrorKind::Internal {
            error.kind = ErrorKind::Failed;
        }
        error = error.hint(limit);
    }
    const REFUSALS: [(i32, &str); 6] = [
        (
            libc::ENOSPC,
            "the file system is full: free some space, or choose another directory with --output-dir",
        ),
        (
            libc::EDQUOT,
            "the disk quota is used up: free some space, or choose another directory with --output-dir",
        ),
        (
            libc::EIO,
            "the storage of this host reports errors: see its kernel log (dmesg)",
        ),
        (
            libc::EMFILE,
            "too many files are open: allow more (ulimit -n 4096)",
        ),
        (
            libc::EROFS,
            "the file system is mounted read-only: choose another directory with --output-dir",
        ),
        (
            libc::EACCES,
            "this user may not do that: change the permissions, or run as the owner of the file",
        ),
    ];
    let causes = error.causes();
    let said = |what: &str| error.message.contains(what) || causes.iter().any(|c| c.contains(what));
    if error.kind == ErrorKind::Failed
        && (said("qemu-img") || said("qemu-storage-daemon"))
        && let Some(old) = probe::old_qemu()
    {
        error.kind = ErrorKind::MissingTool;
        return error.hint(old);
    }
    let refused = error.os_error();
    let found = REFUSALS.iter().find(|(errno, _)| refused == Some(*errno));
    let Some((errno, remedy)) = found.copied() else {
        return error;
    };
    let mut error = if error.hints.is_empty() {
        error.hint(remedy)
    } else {
        error
    };
    if errno == libc::EACCES && error.kind == ErrorKind::Failed {
        error.kind = ErrorKind::MissingTool;
    }
    error
}

fn run(command: Command, ui: &Ui) -> Result<()> {
    if !matches!(
        command,
        Command::Docs(_) | Command::Completions(_) | Command::Man(_)
    ) {
        limits::need_proc()?;
        limits::need_memory()?;
        limits::allow_open_files();
    }
    // `doctor` and `demo` may call sudo; `boot`, `rehearse`, `pull`, `release` and `serve` a
    // libvirt of the user with its bridge helper: they keep the user's rights.
    if !matches!(
        command,
        Command::Doctor(_)
            | Command::Demo(_)
            | Command::Boot(_)
            | Command::Rehearse(_)
            | Command::Pull(_)
            | Command::Release(_)
            | Command::Serve(_)
    ) {
        rustix::thread::set_no_new_privs(true)
            .map_err(|e| Error::failed("giving up new privileges").because(e))?;
    }
    // `doctor` installs packages, `completions` and `man` write files that everybody reads, `demo`
    // applies it after it has installed the packages it needs.
    if !matches!(
        command,
        Command::Doctor(_) | Command::Demo(_) | Command::Completions(_) | Command::Man(_)
    ) {
        crate::files::create_for_owner_only();
    }
    match command {
        Command::Inspect(args) => inspect::run(&args, ui),
        Command::Plan(args) => plan::run(&args, ui),
        Command::Convert(args) => convert::run(&args, ui),
        Command::Sync(args) => sync::run(&args, ui),
        Command::Verify(args) => verify::run(&args, ui),
        Command::Boot(args) => boot::run(&args, ui),
        Command::Rehearse(args) => rehearse::run(&args, ui),
        Command::Pull(args) => pull::run(&args, ui),
        Command::Release(args) => release::run(&args, ui),
        Command::Serve(args) => serve::run(&args, ui),
        Command::Rollback(args) => rollback::run(&args, ui),
        Command::Drivers(args) => drivers::run(&args, ui),
        Command::Demo(args) => demo::run(&args, ui),
        Command::Doctor(args) => doctor::run(&args, ui),
        Command::Docs(args) => docs::run(&args, ui),
        Command::Completions(args) => completions::run(&args, ui),
        Command::Man(args) => man::run(&args, ui),
    }
}

/// Prints clap's own text for people; with `--json` also the error document.
fn usage_error(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind as Clap;
    let _ = error.print();
    match error.kind() {
        Clap::DisplayHelp | Clap::DisplayVersion => ExitCode::SUCCESS,
        _ => {
            if std::env::args_os().any(|a| a == "--json") {
                let text = error.to_string();
                let message = text.lines().next().unwrap_or("usage").to_string();
                Ui::new(true, 0, ProgressMode::None).error_document(&Error::usage(message));
            }
            ExitCode::from(ErrorKind::Usage.code())
        }
    }
}

/// The log filter. Only this program's lines are shown: those of libraries do not help users.
fn log_level(verbosity: u8) -> &'static str {
    match verbosity {
        0 | 1 => "hyper2kvm=warn",
        2 => "hyper2kvm=info",
        _ => "hyper2kvm=debug",
    }
}

fn log_to_stderr(verbosity: u8) {
    let level = log_level(verbosity);
    let asked = std::env::var("HYPER2KVM_LOG").unwrap_or_default();
    let filter: Option<Targets> = asked.parse().ok().filter(|_| !asked.is_empty());
    let filter = filter.unwrap_or_else(|| level.parse().unwrap_or_default());
    let colours = crate::ui::takes_colour(&std::io::stderr());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        // It would panic if stderr is closed.
        .log_internal_errors(false)
        .without_time();
    // Fails only if there is already a logger.
    let _ = tracing_subscriber::registry()
        .with(lines)
        .with(filter)
        .try_init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    /// Only the most important options come first: the rest is in groups below.
    #[test]
    fn the_options_of_convert_that_matter_come_first() {
        let mut program = super::Cli::command();
        program.build();
        let convert = program.find_subcommand("convert").unwrap();
        let mut shown: Vec<_> = convert
            .get_arguments()
            .filter(|a| a.get_help_heading().is_none() && a.get_id() != "help")
            .filter(|a| a.get_long().is_some())
            .collect();
        // In the order of the help; a stable sort by group keeps that of the definitions.
        shown.sort_by_key(|a| a.get_id() == "key");
        let first: Vec<&str> = shown.iter().filter_map(|a| a.get_long()).collect();
        assert_eq!(first, super::convert::FIRST);
    }

    #[test]
    fn lines_of_libraries_are_not_shown() {
        for verbosity in 0..5 {
            let level = super::log_level(verbosity);
            assert!(
                level.starts_with("hyper2kvm=") && !level.contains(','),
                "{level}"
            );
        }
    }
}
