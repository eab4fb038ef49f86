//! What a conversion leaves besides the disk: the domains, the probe disk, the report.

use std::path::{Path, PathBuf};

use crate::boot::quote;
use crate::domain::{Bootstrap, Drivers, Stage};
use crate::error::{Error, Result};
use crate::fix::journal::ActionState;
use crate::report::{ActionLine, Outputs, Report, Timings};
use crate::tool::qemu_img;
use crate::verify;

use super::machine::{self, MachineOptions};
use super::output::OutputFolder;
use super::prepare::Prepared;
use super::run::{Disks, Job};

/// Domain XML, probe disk and the report.
pub(super) fn finish(
    job: &Job,
    folder: &OutputFolder,
    prepared: &Prepared,
    disks: Disks,
) -> Result<Report> {
    let name = job.name();
    let Disks {
        targets,
        bytes,
        fixed,
    } = disks;
    let in_target = |file: String| folder.target().join(file);
    let options = MachineOptions {
        name: name.clone(),
        probe: in_target(format!("{name}-probe.qcow2")),
        nvram: in_target(format!("{name}-nvram.fd")),
        driver_iso: job.media_path.as_deref().and_then(iso),
        drivers: optional_drivers(prepared),
        ..job.machine.clone()
    };
    let machine = machine::machine(
        &fixed.after,
        &prepared.windows,
        prepared.bootstrap,
        &targets,
        &options,
    );
    let (firmware, warning) = machine::firmware(&machine, options.portable);
    let mut warnings = prepared.plan.warnings.clone();
    warnings.extend(warning);
    let final_xml = format!("{name}-final.xml");
    machine::write_xml(
        &machine,
        Stage::Final,
        &firmware,
        &folder.path().join(&final_xml),
    )?;
    let bootstrap_xml = if machine.bootstrap == Bootstrap::None {
        None
    } else {
        let file = format!("{name}-bootstrap.xml");
        machine::write_xml(
            &machine,
            Stage::Bootstrap,
            &firmware,
            &folder.path().join(&file),
        )?;
        let probe = folder.path().join(format!("{name}-probe.qcow2"));
        qemu_img::create(&probe, "qcow2", PROBE_SIZE)
            .map_err(|e| Error::failed("creating the probe disk").because(e))?;
        Some(in_target(file))
    };
    let outputs = Outputs {
        disks: targets.iter().map(|t| t.path.clone()).collect(),
        bootstrap_xml,
        final_xml: Some(in_target(final_xml)),
        report: Some(folder.target().join("report.json")),
    };
    let actions = fixed
        .journal
        .doc
        .actions
        .iter()
        .map(|a| ActionLine {
            id: a.id.clone(),
            state: a.state,
            description: a.description.clone(),
        })
        .collect::<Vec<_>>();
    debug_assert!(actions.iter().all(|a| a.state != ActionState::InProgress));
    Ok(Report {
        name: name.clone(),
        engine: fixed.engine.name(),
        engine_why: fixed.engine.why,
        ready: verify::is_ready(&fixed.checks),
        next_commands: next_commands(&name, folder.target(), &outputs),
        outputs,
        actions,
        controllers: fixed.after.controllers.clone(),
        controllers_before: fixed.before.controllers.clone(),
        checks: fixed.checks,
        warnings,
        timings: Timings::default(),
        bytes,
        trim: fixed.trim,
        inspection: fixed.before,
    })
}

/// Small, blank, and large enough for Windows to take it for a disk.
const PROBE_SIZE: u64 = 64 << 20;

fn iso(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    path.is_file().then_some(path)
}

/// A driver that is only staged is installed by Windows at the first boot, so its device may be there
/// in the final stage.
fn optional_drivers(prepared: &Prepared) -> Drivers {
    let has = |name: &str| {
        prepared
            .plan
            .drivers
            .iter()
            .any(|d| d.driver.eq_ignore_ascii_case(name))
    };
    Drivers {
        agent: has("vioser") || has("vioserial"),
        balloon: has("balloon"),
        rng: has("viorng"),
        netkvm: has("netkvm"),
    }
}

fn next_commands(name: &str, folder: &Path, outputs: &Outputs) -> Vec<String> {
    let mut commands = vec![
        format!("hyper2kvm boot {}", quote(folder)),
        "# or step by step:".to_string(),
    ];
    if let Some(xml) = &outputs.bootstrap_xml {
        commands.push(format!("virsh define {}", quote(xml)));
        commands.push(format!("virsh start {name}"));
        commands.push("# let Windows start once, shut it down, then switch to VirtIO:".to_string());
    }
    if let Some(xml) = &outputs.final_xml {
        commands.push(format!("virsh define {}", quote(xml)));
        commands.push(format!("virsh start {name}"));
    }
    commands
}
