//! `hyper2kvm convert SOURCE --virtio-iso PATH`

use serde_json::json;

use crate::boot::install;
use crate::convert::run;
use crate::error::{Error, Result};
use crate::report::text;
use crate::tool::virsh::Virsh;
use crate::ui::Ui;

use super::boot::InstallArgs;
use super::source::FixArgs;

#[derive(Debug, clap::Args)]
pub struct ConvertArgs {
    #[command(flatten)]
    fix: FixArgs,
    #[command(flatten)]
    install: InstallArgs,
    /// libvirt that has the storage pool
    #[arg(
        long,
        value_name = "URI",
        env = "LIBVIRT_DEFAULT_URI",
        default_value = "qemu:///system"
    )]
    connect: String,
}

pub fn run(args: &ConvertArgs, ui: &Ui) -> Result<()> {
    let place = args.install.place();
    if args.fix.in_place && place.is_some() {
        return Err(Error::usage(
            "--in-place leaves the disk where it is: it cannot be moved to libvirt's folder too",
        ));
    }
    // A pool's folder may be anywhere.
    if place.is_none() {
        args.fix.confine()?;
    }
    let job = args.fix.job()?;
    if args.fix.dry_run {
        return super::plan::show(&job, ui);
    }
    let mut report = run::convert(&job, ui)?;
    if let (Some(place), Some(folder)) = (place, report.outputs.folder()) {
        let virsh = Virsh::new(&args.connect);
        let installed = install::install(folder, &place, &virsh).map_err(|e| {
            let again = crate::boot::quote(folder);
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
    ui.line(&text::conversion(&report));
    ui.document("convert", json!(report));
    Ok(())
}
