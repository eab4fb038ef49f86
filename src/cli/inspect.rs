//! `hyper2kvm inspect SOURCE...`

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::convert::job::DEFAULT_ISO;
use crate::convert::linux;
use crate::convert::name::safe_name;
use crate::error::{Error, ErrorKind, Result};
use crate::evidence::{self, Archive};
use crate::inspect::{Inspection, Severity};
use crate::report::look::{self, Row};
use crate::session;
use crate::session::engine::Engine;
use crate::source::vm;
use crate::source::{self, SourceKind, find, mirror};
use crate::stop;
use crate::ui::{Ui, bytes, count, document};

use super::again;
use super::source::SourceArgs;
use super::wire::{self, WireArgs};

#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Further sources. Several, or a directory of disks and VMs, are shown as a table
    #[arg(value_name = "SOURCE")]
    more: Vec<PathBuf>,
    /// Collect registry, boot configuration and logs in DIR/<name>-evidence.tar.gz, for a support
    /// case. It contains secrets, which the program lists
    #[arg(long, value_name = "DIR")]
    evidence: Option<PathBuf>,
}

pub fn run(args: &InspectArgs, ui: &Ui) -> Result<()> {
    let sources = located(args)?;
    args.source.confine(args.evidence.as_deref())?;
    if let [source] = &sources[..]
        && is_one(source)
    {
        let seen = one(args, source, ui)?;
        let mut text = look::inspection(&seen.inspection, plan_command());
        if let Some(machine) = &seen.machine {
            machine.append_to(&mut text);
        }
        ui.styled(&text);
        let serious = seen.inspection.findings.iter();
        let serious = serious.filter(|f| f.severity > Severity::Info);
        let serious: Vec<String> = serious
            .map(|f| format!("[{}] {}; remedy: {}", f.id, f.message, f.remedy))
            .collect();
        ui.quiet_warnings(&serious);
        show(ui, seen.archive.as_ref());
        let mut facts = seen.facts();
        facts["transport"] = json!(mirror::transport(&sources[0]).name());
        facts["bytes"] = json!({"fetched": mirror::fetched()});
        if let Some(archive) = &seen.archive {
            facts["evidence"] = json!(archive);
        }
        ui.document("inspect", facts);
        return Ok(());
    }
    if args.source.root.is_some() {
        return Err(Error::usage("--root is for one disk").hint("inspect that one alone"));
    }
    several(args, &sources, ui)
}

/// The local paths of the named sources. Remote ones are connected to.
fn located(args: &InspectArgs) -> Result<Vec<PathBuf>> {
    let wire = &args.source.wire;
    let named = || std::iter::once(&args.source.source).chain(&args.more);
    let urls = named().map(|source| wire::location(source, wire));
    let urls: Vec<_> = urls.collect::<Result<_>>()?;
    let mut remote = urls.iter().flatten().peekable();
    if remote.peek().is_none() {
        wire.check(None)?;
    }
    remote.try_for_each(|at| wire.check(Some(at)))?;
    named().map(|source| wire.locate(source)).collect()
}

/// The next command, with the drivers if they are not at a default path.
fn plan_command() -> Option<String> {
    let line = again::with_verb("inspect", "plan")?;
    let named = std::env::var_os("HYPER2KVM_VIRTIO_ISO").is_some();
    Some(match named || Path::new(DEFAULT_ISO).exists() {
        true => line,
        false => format!("{line} --virtio-iso ISO    # hyper2kvm drivers --where: where from"),
    })
}

/// The inspection, and the evidence collected with it.
struct Seen {
    name: String,
    machine: Option<vm::VmFacts>,
    engine: Engine,
    inspection: Inspection,
    archive: Option<Archive>,
}

impl Seen {
    fn facts(&self) -> Value {
        let mut facts = json!(self.inspection);
        facts["engine"] = json!(self.engine.name());
        if let Some(machine) = &self.machine {
            facts["machine"] = json!(machine);
        }
        facts
    }
}

/// Whether a directory is one VM: it has a description and nothing else.
fn is_one(path: &Path) -> bool {
    if !path.is_dir() {
        return true;
    }
    let Ok(vm) = source::open(path) else {
        return false;
    };
    let below = find::below(path).unwrap_or_default();
    if below.len() <= 1 {
        return true;
    }
    // The disks of an export have no description that names them.
    let own: Vec<_> = vm.disks.iter().map(|d| &d.path).collect();
    vm.kind == SourceKind::HyperV
        && has_hyper_v_settings(path)
        && below.iter().all(|file| own.contains(&file))
}

fn has_hyper_v_settings(folder: &Path) -> bool {
    let folders = [folder.to_path_buf(), folder.join("Virtual Machines")];
    let entries = folders.iter().filter_map(|f| std::fs::read_dir(f).ok());
    entries.flatten().flatten().any(|e| {
        let path = e.path();
        path.extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("vmcx"))
    })
}

fn one(args: &InspectArgs, path: &Path, ui: &Ui) -> Result<Seen> {
    let source = SourceArgs {
        source: path.to_path_buf(),
        // The remedies are already carried out.
        wire: WireArgs::default(),
        ..args.source.clone()
    };
    let machine = source.open()?;
    let name = machine.vm.name.clone();
    let (engine, mut survey, archive) =
        session::look(&machine, source.reader()?, ui, |survey, guest| {
            let folder = args.evidence.as_ref()?;
            let body = document("inspect", json!(survey.inspection));
            let collected = evidence::collect(guest, survey, body, folder, &safe_name(&name));
            Some(collected)
        })?;
    let archive = archive.transpose().map_err(|e| {
        Error::failed("collecting evidence")
            .because(e)
            .hint("--evidence takes a directory; an archive that is there already is not replaced")
    })?;
    linux::complete(&machine, &mut survey.inspection, ui)?;
    Ok(Seen {
        name,
        machine: vm::VmFacts::of(&machine.vm),
        engine,
        inspection: survey.inspection,
        archive,
    })
}

fn show(ui: &Ui, archive: Option<&Archive>) {
    let Some(archive) = archive else { return };
    let taken = archive.files.iter().filter(|f| f.taken_bytes > 0).count();
    ui.line(&format!(
        "\nEvidence: {} ({}, {})",
        archive.path.display(),
        count(taken, "file"),
        bytes(archive.size_bytes)
    ));
    for line in archive.warning.lines() {
        ui.warn(line);
    }
}

/// Prints a table; a source that cannot be inspected is a row of it.
fn several(args: &InspectArgs, named: &[PathBuf], ui: &Ui) -> Result<()> {
    let mut sources = Vec::new();
    for path in named {
        if is_one(path) {
            sources.push(path.clone());
            continue;
        }
        let below = find::below(path)
            .map_err(|e| Error::failed(format!("looking into {}", path.display())).because(e))?;
        if below.is_empty() {
            return Err(
                Error::failed(format!("no disk image and no VM below {}", path.display()))
                    .hint("name the images themselves"),
            );
        }
        sources.extend(below);
    }
    let mut rows = Vec::new();
    let mut archives = Vec::new();
    for path in &sources {
        if stop::requested() {
            return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
        }
        let shown = crate::text::of_path(path).into_owned();
        ui.status("Inspecting", &shown);
        rows.push(match one(args, path, ui) {
            Ok(seen) => {
                archives.extend(seen.archive);
                Row::new(seen.name, shown, seen.inspection)
            }
            Err(error) if error.is_interrupted() => return Err(error),
            Err(error) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let mut text = error.to_string();
                for cause in error.causes() {
                    text.push_str(&format!(": {cause}"));
                }
                Row::failed(name.into_owned(), shown, text)
            }
        });
    }
    ui.styled(&look::table(&rows));
    for archive in &archives {
        show(ui, Some(archive));
    }
    let mut verdicts: BTreeMap<String, usize> = BTreeMap::new();
    for row in &rows {
        let verdict = json!(row.verdict);
        *verdicts
            .entry(verdict.as_str().unwrap_or_default().to_string())
            .or_default() += 1;
    }
    let mut body = json!({
        "counts": verdicts,
        "machines": rows,
        "bytes": {"fetched": mirror::fetched()},
    });
    if args.evidence.is_some()
        && let Some(body) = body.as_object_mut()
    {
        body.insert(
            "evidence".into(),
            Value::from_iter(archives.iter().map(|a| json!(a))),
        );
    }
    ui.document("inspect-list", body);
    let failed = rows.iter().filter(|r| r.error.is_some()).count();
    if failed == 0 {
        return Ok(());
    }
    let mut error = Error::new(
        ErrorKind::SomeFailed(failed),
        format!("{failed} of {} could not be inspected", rows.len()),
    );
    error.reported = true;
    Err(error)
}
