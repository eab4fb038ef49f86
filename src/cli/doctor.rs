//! `hyper2kvm doctor [--install]`

use serde_json::json;

use crate::error::{Error, ErrorKind, Result};
use crate::rehearse::record;
use crate::tool::host::{self, TOOLS};
use crate::tool::privileges::Privileges;
use crate::tool::probe::Found;
use crate::tool::{self, Cmd, ToolError};
use crate::ui::{Styled, Tone, Ui};

use super::readiness::{self, Check, Verdict};

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
    let checks = readiness::checks();
    let verdicts = readiness::verdicts(&found, &checks);
    ui.styled(&shown(&found, &checks, &verdicts, ui.is_verbose()));
    document(&found, &checks, &verdicts, ui);
    let missing: Vec<_> = found
        .iter()
        .filter(|f| f.tool.required && f.path.is_none())
        .collect();
    if missing.is_empty() {
        return match found.iter().find_map(Found::too_old) {
            Some(old) => Err(Error::missing_tool(old)),
            None => Ok(()),
        };
    }
    let names: Vec<&str> = missing.iter().map(|f| f.tool.name).collect();
    let error = Error::missing_tool(format!("missing: {}", names.join(", ")));
    let hints = missing.iter().map(|f| host::hint(f.tool.name));
    Err(match can_install() {
        true => error.hint("hyper2kvm doctor --install installs them"),
        false => hints.fold(error, Error::hint),
    })
}

/// Whether `--install` is possible: with a known package manager, and the means to become root.
pub fn can_install() -> bool {
    let root = rustix::process::geteuid().is_root() || tool::find("sudo").is_some();
    root && host::package_manager().is_some()
}

fn shown(found: &[Found], checks: &[Check], verdicts: &[Verdict], verbose: bool) -> Styled {
    let mut text = Styled::default();
    text.push(Tone::Strong, "Programs and libraries\n");
    for f in found {
        let (tone, state) = match (&f.path, f.tool.required) {
            (Some(_), _) if f.too_old().is_some() => (Tone::Bad, "TOO OLD"),
            (Some(_), _) => (Tone::Good, "ok"),
            (None, true) => (Tone::Bad, "MISSING"),
            (None, false) => (Tone::Faint, "optional"),
        };
        text.push(tone, format!("{state:>8}"));
        text.push(Tone::Plain, format!("  {:<20} ", f.tool.name));
        text.hang();
        let version = f.version.as_deref().map(number).unwrap_or_default();
        let mut detail = format!("{version:<9} {}", f.tool.purpose);
        if f.path.is_none() {
            detail = format!("{}: {}", f.tool.purpose, host::hint(f.tool.name));
        }
        if verbose {
            if let Some(oldest) = f.tool.oldest_tried {
                detail += &format!(" (oldest tried: {oldest})");
            }
            for more in f
                .path
                .iter()
                .map(|p| p.display().to_string())
                .chain(f.version.clone())
            {
                detail += &format!("; {more}");
            }
        }
        text.push(Tone::Plain, detail);
        text.push(Tone::Plain, "\n");
    }
    text.push(Tone::Strong, "\nThis host\n");
    for check in checks {
        check.append_to(&mut text);
    }
    text.push(Tone::Plain, "\n");
    for verdict in verdicts {
        verdict.append_to(&mut text);
    }
    text
}

/// The first version number of a line; OpenSSH has its own after an underscore.
fn number(line: &str) -> &str {
    let mut words = line.split([' ', '(', ')', ',', 'v', '_']);
    let is_number = |w: &&str| w.starts_with(|c: char| c.is_ascii_digit());
    words.find(is_number).unwrap_or_default()
}

fn document(found: &[Found], checks: &[Check], verdicts: &[Verdict], ui: &Ui) {
    let tools: Vec<_> = found
        .iter()
        .map(|f| {
            json!({"name": f.tool.name, "purpose": f.tool.purpose, "required": f.tool.required,
                "path": f.path, "version": f.version, "oldest_tried": f.tool.oldest_tried})
        })
        .collect();
    let missing = found.iter().filter(|f| f.path.is_none()).map(|f| f.tool);
    let ready: serde_json::Map<_, _> = verdicts
        .iter()
        .map(|v| (v.purpose().to_string(), v.json()))
        .collect();
    ui.document(
        "doctor",
        json!({"tools": tools, "install_command": host::install_command(missing),
            "checks": checks.iter().map(Check::json).collect::<Vec<_>>(), "ready": ready,
            "rehearsals": rehearsals(ui)}),
    );
}

/// Running rehearsals of this user, and the leftovers of killed ones.
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

/// Installs the missing tools; does nothing if none is missing.
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
            // The install is tried even if the index cannot be refreshed.
            Err(error) if step.iter().any(|s| s == "update") => {
                ui.warn(&format!("{}: {error}", step.join(" ")));
            }
            Err(ToolError::Interrupted(_)) => {
                return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
            }
            Err(error) => {
                return Err(Error::missing_tool(format!("{} failed", step.join(" ")))
                    .because(error)
                    .hint("run it yourself and read its output"));
            }
        }
    }
    Ok(())
}

/// apt needs a package index, which a fresh system lacks.
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

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn numbers_of_versions() {
        for (line, want) in [
            ("qemu-img version 10.0.2 (Debian 1:10.0.2+ds-2)", "10.0.2"),
            ("11.3.0", "11.3.0"),
            (
                "OpenSSH_9.2p1 Debian-2+deb12u10, OpenSSL 3.0.22 3 Nov 2026",
                "9.2p1",
            ),
            ("mkntfs v2022.10.3 (libntfs-3g)", "2022.10.3"),
            ("libntfs-3g.so.89.0.0", ""),
            ("", ""),
        ] {
            assert_eq!(number(line), want, "{line}");
        }
    }
}
