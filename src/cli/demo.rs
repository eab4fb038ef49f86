//! `hyper2kvm demo [--install]`: builds a small Windows-shaped disk and a virtio-win directory, and runs
//! the real conversion on them.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use clap::Parser;

use crate::demo::pe::{self, Subsystem};
use crate::demo::virtio_win::{self, Layout};
use crate::demo::{GuestSpec, WinVersion, guest};
use crate::error::{Error, Result};
use crate::files;
use crate::inspect::Firmware;
use crate::tool::host;
use crate::ui::Ui;

use super::{convert, doctor};

#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// Install missing host tools first
    #[arg(long)]
    install: bool,
    /// A BIOS guest on an MBR disk instead of UEFI on GPT
    #[arg(long)]
    bios: bool,
    /// Directory to build in and convert to; it must not exist
    #[arg(default_value = "hyper2kvm-demo")]
    folder: PathBuf,
}

/// A minimal command line that runs the real verb with its own defaults.
#[derive(Debug, Parser)]
struct ConvertLine {
    #[command(flatten)]
    args: convert::ConvertArgs,
}

pub fn run(args: &DemoArgs, ui: &Ui) -> Result<()> {
    let needed = |tool: &host::Tool| tool.required || tool.name == "mkntfs";
    if args.install {
        doctor::install(ui, &needed)?;
    }
    let missing: Vec<&str> = host::TOOLS
        .iter()
        .filter(|t| needed(t) && t.find().is_none())
        .map(|t| t.name)
        .collect();
    if !missing.is_empty() {
        return Err(
            Error::missing_tool(format!("missing: {}", missing.join(", "))).hint(
                match doctor::can_install() {
                    true => "hyper2kvm demo --install installs them",
                    false => "hyper2kvm doctor names the packages",
                },
            ),
        );
    }
    files::create_for_owner_only();
    let passage = std::fs::Permissions::from_mode(files::PASSAGE);
    let created = std::fs::create_dir(&args.folder)
        .and_then(|()| std::fs::set_permissions(&args.folder, passage));
    created.map_err(|e| {
        Error::failed(format!("creating {}", args.folder.display()))
            .because(e)
            .hint("the demo needs a directory of its own: remove it, or name another one")
    })?;
    let disk = args.folder.join("demo.raw");
    let drivers = args.folder.join("virtio-win");
    ui.status(
        "Building",
        &format!("a Windows-shaped guest, {}", disk.display()),
    );
    let mut spec = GuestSpec::new(WinVersion::Server2022);
    if args.bios {
        spec.firmware = Firmware::Bios;
    }
    guest::build(&spec, &disk).map_err(|e| Error::failed("building the guest").because(e))?;
    virtio_win::write(&drivers, Layout::Iso, &|arch| {
        pe::image(arch, Subsystem::Native)
    })
    .map_err(|e| Error::failed("building the virtio-win directory").because(e))?;
    let line = ConvertLine::try_parse_from([
        "convert".as_ref(),
        disk.as_os_str(),
        "--virtio-iso".as_ref(),
        drivers.as_os_str(),
        "--output-dir".as_ref(),
        args.folder.join("demo-kvm").as_os_str(),
    ])
    .map_err(|e| Error::usage(e.to_string()))?;
    convert::run(&line.args, ui)
}
