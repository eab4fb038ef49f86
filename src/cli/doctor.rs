//! `hyper2kvm doctor [--install]`

use serde_json::json;

use crate::error::{Error, ErrorKind, Result};
use crate::rehearse::record;
use crate::tool::host::{self, Found, TOOLS};
use crate::tool::privileges::Privileges;
use crate::tool::{Cmd, ToolError};
use crate::ui::Ui;

#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Install what is missing with the distribution's package manager
    #[arg(long)]
    install: bool,
    /// With --install: the optional tools too
    #[arg(long, requires = "install")]
    all: bool,
}

pub fn run(args: &DoctorArgs, ui: &Ui) -> Result<()> {
    if args.install {
        install(ui, &|tool| tool.required || args.all)?;
    }
    let found: Vec<Found> = TOOLS.iter().map(host::Tool::probe).collect();
    report(&found, ui);
    let missing: Vec<&str> = found
        .iter()
        .filter(|f| f.tool.required && f.path.is_none())
        .map(|f| f.tool.name)
        .collect();
    if missing.is_empty() {
        return match found.iter().find_map(Found::too_old) {
            Some(old) => Err(Error::missing_tool(old)),
            None => Ok(()),
        };
    }
    Err(
        Error::missing_tool(format!("missing: {}", missing.join(", ")))
            .hint("hyper2kvm doctor --install installs them"),
    )
}

fn report(found: &[Found], ui: &Ui) {
    for f in found {
        let state = match (&f.path, f.tool.required) {
            (Some(_), _) if f.too_old().is_some() => "TOO OLD",
            (Some(_), _) => "ok",
            (None, true) => "MISSING",
            (None, false) => "optional",
        };
        let mut detail = match &f.path {
            Some(path) => f
                .version
                .clone()
                .unwrap_or_else(|| path.display().to_string()),
            None => host::hint(f.tool.name),
        };
        if let Some(oldest) = f.tool.oldest_tried {
            detail += &format!(" (oldest tried: {oldest})");
        }
        ui.line(&format!(
            "{state:>8}  {:<22} {:<45} {detail}",
            f.tool.name, f.tool.purpose
        ));
    }
    let tools: Vec<_> = found
        .iter()
        .map(|f| {
            json!({"name": f.tool.name, "purpose": f.tool.purpose, "required": f.tool.required,
                "path": f.path, "version": f.version, "oldest_tried": f.tool.oldest_tried})
        })
        .collect();
    let missing = found
        .iter()
        .filter(|f| f.path.is_none())
        .map(|f| f.tool)
        .collect::<Vec<_>>();
    let rehearsals = rehearsals(ui);
    ui.document(
        "doctor",
        json!({"tools": tools, "install_command": host::install_command(missing), "rehearsals": rehearsals}),
    );
}

/// Rehearsals of this user that run, and what killed ones have left.
fn rehearsals(ui: &Ui) -> Vec<serde_json::Value> {
    let mut list = Vec::new();
    for found in record::leftovers() {
        let record = &found.record;
        let (state, more) = match found.runs {
            true => ("running", ""),
            false => ("left", ": the next hyper2kvm rehearse removes it"),
        };
        ui.line(&format!(
            "{state:>8}  rehearsal {} on {} ({}), {}{more}",
            record.name,
            record.uri,
            record.uuid,
            record.work.display()
        ));
        list.push(
            json!({"state": state, "domain": record.name, "uuid": record.uuid, "connect": record.uri,
            "work": crate::text::of_path(&record.work), "evidence_dir": crate::text::of_path(&record.evidence)}),
        );
    }
    list
}

/// Installs the missing tools; nothing happens when none is missing.
pub fn install(ui: &Ui, wanted: &dyn Fn(&host::Tool) -> bool) -> Result<()> {
    let missing: Vec<_> = TOOLS
        .iter()
        .filter(|t| wanted(t) && t.find().is_none())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|t| t.name).collect();
    let Some(command) = host::install_command(missing) else {
        return Err(Error::missing_tool(format!(
            "missing: {}; no install command is known for this distribution",
            names.join(", ")
        )));
    };
    for step in with_privileges(with_index(command)) {
        ui.status("Installing", &step.join(" "));
        let Some((program, args)) = step.split_first() else {
            continue;
        };
        let done = Cmd::new(program)
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .privileges(Privileges::Gain)
            .run();
        match done {
            Ok(_) => {}
            // An index that cannot be refreshed is no reason not to try the install.
            Err(error) if step.iter().any(|s| s == "update") => {
                ui.warn(&format!("{}: {error}", step.join(" ")));
            }
            Err(ToolError::Interrupted) => {
                return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
            }
            Err(error) => {
                return Err(Error::missing_tool(format!("{} failed", step.join(" ")))
                    .because(error)
                    .hint("run it yourself and look at its output"));
            }
        }
    }
    Ok(())
}

/// apt needs a package index, which a fresh machine does not have.
fn with_index(command: Vec<String>) -> Vec<Vec<String>> {
    let update = (command.first().is_some_and(|c| c == "apt-get"))
        .then(|| vec!["apt-get".to_string(), "update".to_string()]);
    update.into_iter().chain([command]).collect()
}

fn with_privileges(steps: Vec<Vec<String>>) -> Vec<Vec<String>> {
    if rustix::process::geteuid().is_root() {
        return steps;
    }
    steps
        .into_iter()
        .map(|step| ["sudo".to_string()].into_iter().chain(step).collect())
        .collect()
}
