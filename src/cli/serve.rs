//! `hyper2kvm serve OUTDIR`: keeps the connection through which a running VM reads its source on
//! another host. A source on this host is opened by QEMU itself and needs no server.

use std::path::PathBuf;

use serde_json::json;

use crate::boot;
use crate::error::{Error, Result};
use crate::later::Record;
use crate::later::serve::{hit, notify};
use crate::pull::folder::Folder;
use crate::pull::serve::{End, Serving};
use crate::source::mirror;
use crate::threads::side_by_side;
use crate::ui::Ui;

use super::connect::{ConnectArgs, RECORDED};

#[derive(Debug, clap::Args)]
#[command(mut_arg("connect", |arg| arg.help(format!(
    "{RECORDED}: its QEMU gets access, and a VM that it has paused is resumed"
))))]
pub struct ServeArgs {
    /// Output directory of `convert --copy later`
    folder: PathBuf,
    #[command(flatten)]
    libvirt: ConnectArgs,
}

pub fn run(args: &ServeArgs, ui: &Ui) -> Result<()> {
    let folder = Folder::open(&args.folder)?;
    // The running command, such as the `boot` that has started this one, has done so.
    if let Some(_lock) = boot::lock_if_free(&folder.path) {
        boot::anchored(&folder.path, ui)?;
    }
    let folder = Folder::open(&folder.path)?;
    let record = Record::left(&folder.path)?;
    let sources = record.as_ref().map_or_else(Vec::new, Record::sources);
    let sources: Vec<_> = sources
        .iter()
        .map(|file| crate::text::of_path(file))
        .collect();
    let ready = || {
        notify("READY=1\n").map_err(|e| {
            Error::failed("telling that the sockets are there (NOTIFY_SOCKET)").because(e)
        })
    };
    let nothing = |why: &str| {
        ready()?;
        ui.line(&format!("nothing to serve: {why}"));
        ui.document("serve", json!({"serving": false, "source": sources}));
        Ok(())
    };
    let Some(record) = record else {
        return nothing("the disks stand alone");
    };
    if !record.is_on_wire() {
        record.check_source(&folder.path)?;
        return nothing("QEMU itself reads the source on this host");
    }
    let check = || record.check_source(&folder.path);
    let start = || Serving::start(&folder, &record, &args.libvirt.connect);
    let serving = match record.is_composed() {
        true => {
            check()?;
            // The children have connections of their own.
            mirror::close();
            start()?
        }
        // Two connections, in parallel. The sockets are announced only when both are open.
        false => {
            let (checked, started) = side_by_side(check, start);
            checked?;
            mirror::close();
            started?
        }
    };
    for socket in serving.server().sockets() {
        ui.status("Serving", &socket.display().to_string());
    }
    ready()?;
    hit("serve-ready")?;
    let (end, fetched) = serving.watch(ui)?;
    // A disk of several files is read through the mirror.
    let fetched = fetched.saturating_add(mirror::fetched());
    ui.line(match end {
        End::Asked => "ended as asked",
        End::Alone => "the disks stand alone",
        End::Released => "the directory was given up",
    });
    ui.document(
        "serve",
        json!({"serving": true, "source": sources, "bytes": {"fetched": fetched}}),
    );
    Ok(())
}
