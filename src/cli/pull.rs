//! `hyper2kvm pull OUTDIR`

use std::path::PathBuf;

use serde_json::json;

use crate::error::Result;
use crate::pull::{self, By, Options};
use crate::ui::{self, Ui};

use super::connect::{ConnectArgs, RECORDED};

#[derive(Debug, clap::Args)]
#[command(mut_arg("connect", |arg| arg.help(RECORDED)))]
pub struct PullArgs {
    /// Output directory of `convert --copy later`
    folder: PathBuf,
    #[command(flatten)]
    libvirt: ConnectArgs,
    /// Copy at most so many MiB per second, all disks together
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    bandwidth: Option<u64>,
}

pub fn run(args: &PullArgs, ui: &Ui) -> Result<()> {
    let pulled = pull::pull(
        &Options {
            folder: args.folder.clone(),
            uri: args.libvirt.connect.clone(),
            bandwidth: args.bandwidth,
        },
        ui,
    )?;
    ui.line(&format!(
        "{} copied in {:.0} s{}; the disks stand alone:",
        ui::bytes(pulled.bytes.copied),
        pulled.seconds,
        match pulled.by {
            By::Libvirt => " while the VM ran",
            By::Offline => "",
        }
    ));
    for disk in &pulled.disks {
        ui.line(&format!("  {}", disk.display()));
    }
    ui.document("pull", json!(pulled));
    Ok(())
}
