//! `hyper2kvm convert --batch FILE`: many VMs, some at a time.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::time::Instant;

use crate::batch::file::{Kind, List, Rules, Section, Settings};
use crate::batch::page::page as render;
use crate::batch::report::{JobState, PAGE_TITLE, Summary};
use crate::batch::run::{self, Conversion};
use crate::convert::name::safe_name;
use crate::error::{Error, ErrorKind, Result};
use crate::ui::{Ui, count};

use super::list::{ListFile, Reports, kind};
use super::options::{self, DRY_RUN, FORCE, IN_PLACE, KEY, OUTPUT_DIR, Options, SOURCE};
use super::source::FixArgs;
use super::wire;

pub const BATCH: &str = "batch";
const SOURCE_COMMAND: &str = "source-command";

#[derive(Debug, clap::Args)]
pub struct BatchArgs {
    /// Convert every VM of a list (YAML), some at a time; other options are for all of them.
    /// The exit code is 100 + how many failed, at most 120
    #[arg(long, value_name = "FILE", conflicts_with_all = [SOURCE, "name", "mac", "root"], help_heading = "Many VMs")]
    pub batch: Option<PathBuf>,
    // clap does not miss a required option that could not be given: hence the conflicts.
    /// With --batch: VMs at a time [default: half the processors, at most 4]
    #[arg(long, value_name = "N", requires = BATCH, conflicts_with = SOURCE, value_parser = clap::value_parser!(u16).range(1..=256), help_heading = "Many VMs")]
    pub jobs: Option<u16>,
    /// With --batch: only this VM of the list: its name, or its position counted from 0, as job
    /// schedulers do. Writes no summary; the exit code is that of the VM
    #[arg(long, value_name = "VM", requires = BATCH, conflicts_with_all = ["jobs", SOURCE], help_heading = "Many VMs")]
    pub only: Option<String>,
}

/// The permitted keys of a list: the options of `convert`.
struct ConvertOptions;

impl Rules for ConvertOptions {
    fn shape(&self, name: &str, place: Section) -> Result<Kind, String> {
        let shape = options::shape(name).filter(|_| name != DRY_RUN);
        let Some(shape) = shape else {
            return Err(format!(
                "unknown option `{name}`: hyper2kvm convert --help lists them (without `--` here)"
            ));
        };
        kind(name, &shape, place, "VM")
    }

    fn check(&self, name: &str, value: &str) -> Result<(), String> {
        options::check(name, value)
    }
}

pub fn run(args: &BatchArgs, given: &Options, ui: &Ui) -> Result<()> {
    let start = Instant::now();
    let read = ListFile::read(args.batch.as_deref(), &ConvertOptions, given)?;
    let reports = Reports {
        list: &read,
        schema: BATCH,
        ending: "report",
        title: PAGE_TITLE,
    };
    let dry_run = given.contains_key(DRY_RUN);
    let mut machines = machines(&read.list, given, read.folder(), &read.output)?;
    if let Some(wanted) = &args.only {
        machines = only(machines, wanted)?;
    }
    if !dry_run && args.only.is_none() {
        reports.refuse_taken()?;
    }
    let jobs = args.jobs.map_or_else(run::default_jobs, usize::from);
    let jobs = jobs.min(machines.len());
    ui.status(
        "Converting",
        &format!("{}, {jobs} at a time", count(machines.len(), "VM")),
    );

    let lines = run::run(&machines, jobs, dry_run, ui);
    let summary = Summary::new(&read.file, jobs, start.elapsed().as_secs_f64(), lines);
    ui.styled(&summary.text());
    for line in &summary.machines {
        let named = |warning: &String| format!("{}: {warning}", line.name);
        let warnings: Vec<String> = line.warnings.iter().map(named).collect();
        ui.quiet_warnings(&warnings);
    }
    let body = summary.document();
    ui.document(BATCH, body.clone());
    let page = match dry_run || args.only.is_some() {
        true => None,
        false => Some(reports.save(body, &render(&summary, &read.output))?),
    };
    let kind = if args.only.is_some() {
        let failure = summary.machines.first().and_then(|l| l.failure.as_ref());
        let kind = failure.map(|f| ErrorKind::from_code(f.code));
        kind.or_else(|| summary.verdict())
    } else {
        summary.verdict()
    };
    let Some(kind) = kind else {
        return Ok(());
    };
    let mut error = Error::new(kind, summary.sentence());
    error.reported = true;
    if kind == ErrorKind::NotRolledBack {
        error = error.hint("the report has the command that undoes each of them");
    }
    if let Some(page) = page {
        error = error.hint(format!("the whole story: {}", page.display()));
    }
    let refused = ErrorKind::Refused.code();
    let mut failed = summary.machines.iter().filter_map(|l| l.failure.as_ref());
    let only_refused = kind == ErrorKind::SomeFailed(summary.count(JobState::Failed))
        && failed.all(|f| f.code == refused);
    Err(error.hint(match only_refused {
        true => "apply the remedies, then run the same command: it does what is not done yet",
        false => "the same command continues with what is not done yet",
    }))
}

/// Selects one VM, by name or otherwise by position.
fn only(machines: Vec<Conversion>, wanted: &str) -> Result<Vec<Conversion>> {
    let count = machines.len();
    let position = machines
        .iter()
        .position(|m| m.name == wanted)
        .or_else(|| wanted.parse().ok().filter(|n| *n < count));
    let machine = position.and_then(|n| machines.into_iter().nth(n));
    machine.map(|m| vec![m]).ok_or_else(|| {
        Error::usage(format!("no VM {wanted:?} in the list")).hint(format!(
            "name one, or give its position, 0 to {}",
            count - 1
        ))
    })
}

/// The VMs with all decisions made, or a usage error before any of them is started.
fn machines(list: &List, given: &Options, folder: &Path, output: &Path) -> Result<Vec<Conversion>> {
    let mut machines = Vec::new();
    let mut in_place: Vec<(PathBuf, bool)> = Vec::new();
    for (i, settings) in list.machines.iter().enumerate() {
        let merged = merge(list, settings, given, folder);
        let source = merged.get(SOURCE).and_then(|v| v.first());
        let source = source.map_or("", String::as_str);
        // A URL, or the name of a `--source-command`, is not a path.
        let elsewhere = source.contains("://") || merged.contains_key(SOURCE_COMMAND);
        let source = match elsewhere {
            true => PathBuf::from(source),
            false => folder.join(source),
        };
        let at = match elsewhere {
            // It may contain a password.
            true => format!("VM {}", i + 1),
            false => format!("VM {} ({})", i + 1, source.display()),
        };
        let machine = machine(source, merged, output, &at)?;
        let changes = machine.args.iter().any(|a| a == &*format!("--{IN_PLACE}"));
        in_place.push((real(&machine.source), changes));
        machines.push(machine);
    }
    distinct(&machines, &in_place)?;
    Ok(machines)
}

/// Merges the defaults, the settings of the VM, and the command line, in ascending precedence.
pub(super) fn merge(list: &List, settings: &Settings, given: &Options, folder: &Path) -> Options {
    let mut all: BTreeMap<&String, &Option<Vec<String>>> = list.defaults.iter().collect();
    all.extend(settings);
    let mut merged = Options::new();
    for (name, values) in all {
        let Some(values) = values else { continue };
        let path = options::shape(name).is_some_and(|s| s.path) && name != SOURCE;
        let value = |v: &String| {
            if name == KEY
                && let [selector, "file", file] = v.splitn(3, ':').collect::<Vec<_>>()[..]
            {
                return format!("{selector}:file:{}", folder.join(file).display());
            }
            let full = folder.join(v);
            if path && v != "-" {
                full.to_string_lossy().into_owned()
            } else {
                v.clone()
            }
        };
        merged.insert(name.clone(), values.iter().map(value).collect());
    }
    for (name, values) in given {
        if name != OUTPUT_DIR && name != DRY_RUN {
            merged.insert(name.clone(), values.clone());
        }
    }
    merged
}

fn machine(source: PathBuf, mut merged: Options, output: &Path, at: &str) -> Result<Conversion> {
    merged.remove(SOURCE);
    let folder = merged.remove(OUTPUT_DIR).and_then(|v| v.into_iter().next());
    let (one, effective) = options::parse(&source, &merged)
        .map_err(|e| Error::usage(format!("{at}: {}", options::first_line(&e))))?;
    let remote = remote(&one.fix).map_err(|mut error| {
        error.message = format!("{at}: {}", error.message);
        error
    })?;
    let name = match remote.map_or_else(|| named(&one.fix), Ok) {
        Ok(name) => safe_name(&name),
        Err(mut error) if error.kind == ErrorKind::Usage => {
            error.message = format!("{at}: {}", error.message);
            return Err(error);
        }
        // The conversion reports that; the others continue.
        Err(_) => {
            let stem = source.file_stem().unwrap_or_default().to_string_lossy();
            safe_name(one.fix.name.as_deref().unwrap_or(&stem))
        }
    };
    let force = merged.contains_key(FORCE);
    let env = options::hide_keys(&mut merged);
    Ok(Conversion {
        env,
        folder: folder.map_or_else(|| output.join(format!("{name}-kvm")), PathBuf::from),
        force,
        args: options::arguments(&merged),
        name,
        source,
        request: Box::new(move || Some(options::request(&one.fix.job().ok()?, &effective))),
    })
}

/// The name in the description.
fn named(fix: &FixArgs) -> Result<String> {
    fix.job().map(|job| job.vm.machine.name)
}

/// The name of a remote VM: no connection is made before its turn.
fn remote(fix: &FixArgs) -> Result<Option<String>> {
    let args = &fix.source;
    let at = wire::location(&args.source, &args.wire)?;
    args.wire.check(at.as_ref())?;
    let Some(at) = at else { return Ok(None) };
    fix.refuse_in_place()?;
    if args.wire.password_file.as_deref() == Some(Path::new("-")) {
        return Err(
            Error::usage("standard input cannot be the password of the VMs of a list")
                .hint("name a file with `password-file`, readable for its owner only"),
        );
    }
    let stem = Path::new(at.file_name()).file_stem().unwrap_or_default();
    let name = match stem.to_string_lossy() {
        stem if stem.is_empty() => at.host().to_owned(),
        stem => stem.into_owned(),
    };
    Ok(Some(fix.name.clone().unwrap_or(name)))
}

/// Refuses VMs that would interfere with each other.
fn distinct(machines: &[Conversion], sources: &[(PathBuf, bool)]) -> Result<()> {
    let folders: Vec<PathBuf> = machines.iter().map(|m| real(&m.folder)).collect();
    for (i, one) in machines.iter().enumerate() {
        for (j, other) in machines.iter().enumerate().skip(i + 1) {
            let both = format!("VMs {} and {}", i + 1, j + 1);
            if folders[i].starts_with(&folders[j]) || folders[j].starts_with(&folders[i]) {
                return Err(Error::usage(format!(
                    "{both} would be written to the same directory, {}",
                    one.folder.display()
                ))
                .hint("give one of them another `name` or `output-dir`"));
            }
            if one.name == other.name {
                return Err(Error::usage(format!(
                    "{both} have the same name, {}: libvirt could not distinguish them",
                    one.name
                ))
                .hint("give one of them another `name`"));
            }
            let ((first, changed), (second, changed_too)) = (&sources[i], &sources[j]);
            if first == second && (*changed || *changed_too) {
                return Err(Error::usage(format!(
                    "{both} are the same disk, and one of them is fixed in place"
                )));
            }
        }
    }
    Ok(())
}

/// The target of a path that need not exist yet. Links in the existing part are resolved, and `..`
/// in the rest is removed.
pub(super) fn real(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            part => {
                plain.push(part);
                if let Ok(real) = plain.canonicalize() {
                    plain = real;
                }
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::file;

    fn list(text: &str) -> Result<Vec<Conversion>> {
        let list = file::parse(text, &ConvertOptions).map_err(Error::usage)?;
        machines(
            &list,
            &Options::new(),
            Path::new("/list"),
            Path::new("/out"),
        )
    }

    #[test]
    fn options_and_paths() {
        let machines = list(
            "defaults: {virtio-iso: iso, format: raw, compress: ~}\nmachines:\n\
             - source: a/web.vmdk\n- {source: /b/db.vmx, name: db, format: ~, output-dir: ../x}\n",
        )
        .unwrap();
        let shown: Vec<_> = machines.iter().map(|m| (&*m.name, &*m.folder)).collect();
        assert_eq!(
            shown,
            [
                ("web", Path::new("/out/web-kvm")),
                ("db", Path::new("/list/../x"))
            ]
        );
        assert_eq!(machines[0].source, Path::new("/list/a/web.vmdk"));
        assert_eq!(machines[0].args, ["--format=raw", "--virtio-iso=/list/iso"]);
        assert_eq!(machines[1].args, ["--name=db", "--virtio-iso=/list/iso"]);
    }

    #[test]
    fn what_is_refused() {
        let two = |a: &str, b: &str| {
            format!(
                "defaults: {{virtio-iso: i}}\nmachines:\n- {{source: {a}}}\n- {{source: {b}}}\n"
            )
        };
        for (text, says) in [
            (two("a/vm.vmdk", "b/vm.vmdk"), "same directory"),
            (
                two("a, output-dir: x/y", "b, output-dir: x/z/../y"),
                "same directory",
            ),
            (
                two("a, output-dir: x", "b, output-dir: x/y"),
                "same directory",
            ),
            (
                two("a, output-dir: x, name: n", "b, output-dir: y, name: n"),
                "same name",
            ),
            (two("a, name: x, in-place: true", "a, name: y"), "same disk"),
            (
                two("a, in-place: true, compress: true", "b"),
                "VM 1 (/list/a)",
            ),
            (
                two("a, bridge: x, libvirt-network: y", "b"),
                "VM 1 (/list/a)",
            ),
            (
                two("a, format: raw, compress: true", "b"),
                "cannot be compressed",
            ),
            (two("a, dry-run: true", "b"), "unknown option `dry-run`"),
            (two("a, json: true", "b"), "unknown option `json`"),
            (
                "defaults: {name: x}\nmachines: [{source: a}]".into(),
                "for one VM",
            ),
        ] {
            let error = list(&text).map(drop).expect_err(&text);
            assert_eq!(error.kind, ErrorKind::Usage);
            assert!(error.message.contains(says), "{text}: {}", error.message);
        }
    }
}
