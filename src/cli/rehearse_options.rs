//! The options of `rehearse` for one VM: those of `convert` and `boot`, except those about a copy.

use clap::{Args, Command};

use super::boot::{InstallArgs, WatchArgs};
use super::options::IN_PLACE;
use super::source::FixArgs;

/// Options of `convert` about a copy or about the source itself: a rehearsal has neither.
pub(super) const FOREIGN: [&str; 8] = [
    IN_PLACE,
    "output-device",
    "target-is-zero",
    "compress",
    "verify-copy",
    "from-sync",
    "resume",
    "copy",
];

pub(super) const FORMAT: &str = "format";

/// The arguments for one VM.
#[derive(Debug, clap::Args)]
pub struct OneArgs {
    #[command(flatten)]
    pub(super) fix: FixArgs,
    #[command(flatten)]
    pub(super) watch: WatchArgs,
    #[command(flatten)]
    pub(super) install: InstallArgs,
    /// libvirt network to connect NICs to, with their links up [default: none, every link is down]
    #[arg(long, value_name = "NAME")]
    pub(super) rehearsal_network: Option<String>,
}

/// The definitions of the options alone.
pub(super) fn definitions() -> Command {
    with_texts(OneArgs::augment_args(Command::new("rehearse")))
}

/// Adapts the texts of `convert`'s options; those that cannot be used are hidden.
pub(super) fn with_texts(command: Command) -> Command {
    let shown = command
        .mut_arg("output_dir", |arg| {
            arg.help("Evidence directory [default: ./<name>-rehearsal]")
        })
        .mut_arg("install_to", |arg| {
            arg.help("Keep the throw-away overlay below this directory, where libvirt can read it")
        })
        .mut_arg("pool", |arg| {
            arg.help("Keep the throw-away overlay in this storage pool of libvirt")
        })
        .mut_arg("stop_after", |arg| {
            arg.help("Stop when this stage is done: VirtIO is not tried then")
        })
        .mut_arg("no_snapshot", |arg| arg.hide(true))
        .mut_arg("force", |arg| arg.hide(true))
        .mut_arg("format", |arg| arg.hide(true));
    let foreign = |name: &str| FOREIGN.contains(&name);
    let ids: Vec<_> = shown
        .get_arguments()
        .filter(|arg| arg.get_long().is_some_and(foreign))
        .map(|arg| arg.get_id().clone())
        .collect();
    ids.into_iter().fold(shown, |command, id| {
        command.mut_arg(id, |arg| arg.hide(true))
    })
}

/// The reason why an option cannot be used, if there is one.
pub(super) fn objection(name: &str, values: &[String]) -> Option<String> {
    if FOREIGN.contains(&name) {
        return Some(format!(
            "--{name} does not go with a rehearsal: it copies nothing and changes no source"
        ));
    }
    (name == FORMAT && values.iter().any(|v| v != "qcow2"))
        .then(|| "--format does not go with a rehearsal: its overlay is qcow2".to_owned())
}
