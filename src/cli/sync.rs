//! `hyper2kvm sync SOURCE -o OUTDIR`

use std::path::PathBuf;

use serde_json::json;

use crate::convert::sync::{self, Order, SyncState};
use crate::disk::remote;
use crate::error::{Error, Result};
use crate::source::Options;
use crate::ui::{Ui, bytes};

use super::again;
use super::confine::{self, Writes};
use super::source::{open_located, pace};
use super::wire::WireArgs;

#[derive(Debug, clap::Args)]
pub struct SyncArgs {
    /// Disk image or VM (.vmx, libvirt XML) that may be running, after a snapshot: its newest link
    pub source: PathBuf,
    /// Directory of the copies
    #[arg(short, long, value_name = "DIR")]
    output_dir: PathBuf,
    /// Name of the VM [default: from the source]
    #[arg(long)]
    name: Option<String>,
    /// Format of the image; default: what qemu-img finds
    #[arg(long, value_name = "FORMAT")]
    source_format: Option<String>,
    /// Directory in which backing files and extents may lie besides the image's own (repeatable)
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<PathBuf>,
    /// Copy at most this many MiB per second
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    bandwidth: Option<u64>,
    #[command(flatten)]
    wire: WireArgs,
}

pub fn run(args: &SyncArgs, ui: &Ui) -> Result<()> {
    let at = super::wire::location(&args.source, &args.wire)?;
    args.wire.check(at.as_ref())?;
    let path = args.wire.locate(&args.source)?;
    let folder = std::path::absolute(&args.output_dir)
        .map_err(|e| Error::usage("the output directory has no absolute path").because(e))?;
    confine::writes(&Writes {
        folder: folder.parent(),
        there: Vec::new(),
    })?;
    let vm = open_located(&path, &Options::default()).map_err(|e| {
        let hint = e.hint();
        let error = Error::failed(format!("opening {}", args.source.display())).because(e);
        hint.into_iter().fold(error, Error::hint)
    })?;
    let allowed = args.allow_backing.iter();
    let order = Order {
        allow_backing: allowed.map(|dir| remote::absolute(&path, dir)).collect(),
        source: args.source.clone(),
        vm,
        format: args.source_format.clone(),
        folder,
        name: args.name.clone(),
        pace: pace(args.bandwidth)?,
    };
    let state = sync::run(&order, ui)?;
    ui.line(&text(&state));
    ui.document("sync", json!({"sync": state.summary()}));
    Ok(())
}

fn text(state: &SyncState) -> String {
    let Some(pass) = state.passes.last() else {
        return String::new();
    };
    let next = again::with_verb("sync", "convert");
    let next = next.unwrap_or_else(|| "hyper2kvm convert SOURCE -o DIR".to_owned());
    format!(
        "pass {}: {} changed, {} copied in {:.1} s\n\
         left now: {}; changing by {} a second\n\
         the last pass would take about {:.0} s: shut the VM down, then {next} --from-sync",
        state.passes.len(),
        bytes(pass.changed),
        bytes(pass.copied),
        pass.seconds,
        bytes(pass.left),
        bytes(pass.change_rate as u64),
        pass.projected_s,
    )
}
