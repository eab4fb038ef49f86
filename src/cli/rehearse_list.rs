//! `hyper2kvm rehearse --batch FILE`: a list of VMs, and one page about them.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::FromArgMatches;

use crate::batch::file::{Kind, List, Rules, Section};
use crate::convert::name::safe_name;
use crate::error::{Error, ErrorKind, Result};
use crate::rehearse::batch::{self, Summary, Vm};
use crate::rehearse::{self, PAGE_TITLE};
use crate::ui::Ui;

use super::batch::{merge, real};
use super::list::{ListFile, Reports, kind};
use super::options::{self, DRY_RUN, FORCE, KEY, OUTPUT_DIR, Options, SOURCE};
use super::rehearse_options::{OneArgs, definitions, objection};

pub(super) const BATCH: &str = "batch";
const SCHEMA: &str = "rehearse-batch";
/// The assumed memory of a VM whose source does not specify it.
const USUAL_MEMORY_MIB: u64 = 4096;

#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Rehearse every VM of a list (YAML, as for convert), as many at a time as memory allows.
    /// Other options are for all of them. The exit code is 100 + how many did not come up, at most
    /// 120
    #[arg(long, value_name = "FILE", conflicts_with_all = [SOURCE, "name", "mac", "root"])]
    pub batch: Option<PathBuf>,
    /// With --batch: no more VMs than this at a time
    #[arg(long, value_name = "N", requires = BATCH, conflicts_with = SOURCE, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub jobs: Option<u16>,
}

/// The permitted keys of a list: the options of `rehearse`.
struct RehearseOptions;

impl Rules for RehearseOptions {
    fn shape(&self, name: &str, place: Section) -> Result<Kind, String> {
        if let Some(objection) = objection(name, &[]) {
            return Err(objection);
        }
        let shape = options::shape_in(&definitions(), name);
        let Some(shape) = shape.filter(|_| ![DRY_RUN, FORCE].contains(&name)) else {
            return Err(format!(
                "unknown option `{name}`: hyper2kvm rehearse --help lists them (without `--` here)"
            ));
        };
        kind(name, &shape, place, "VM")
    }

    fn check(&self, name: &str, value: &str) -> Result<(), String> {
        if let Some(objection) = objection(name, &[value.to_owned()]) {
            return Err(objection);
        }
        options::check_in(definitions(), name, value)
    }
}

pub(super) fn run(args: &ListArgs, given: &Options, ui: &Ui) -> Result<()> {
    let begin = Instant::now();
    if given.contains_key(DRY_RUN) {
        return Err(Error::usage("--dry-run goes with one VM")
            .hint("hyper2kvm convert --batch FILE --dry-run plans a list"));
    }
    let read = ListFile::read(args.batch.as_deref(), &RehearseOptions, given)?;
    let reports = Reports {
        list: &read,
        schema: SCHEMA,
        ending: "rehearsal",
        title: PAGE_TITLE,
    };
    let vms = vms(&read.list, given, read.folder(), &read.output)?;
    reports.refuse_taken()?;
    batch::reach(&vms)?;
    ui.status("Rehearsing", &format!("{} VMs", vms.len()));
    rehearse::clean_up(ui);
    let ran = batch::run(&vms, args.jobs.map(usize::from), ui);
    let summary = Summary::new(&read.file, begin.elapsed().as_secs_f64(), ran);
    ui.line(&summary.text());
    let body = batch::document(&summary);
    ui.document(SCHEMA, body.clone());
    let page = reports.save(body, &rehearse::page::of_list(&summary, &read.output))?;
    let Some(kind) = summary.verdict() else {
        ui.status("Written", &page.display().to_string());
        return Ok(());
    };
    let mut error = Error::new(kind, summary.sentence());
    error.reported = true;
    Err(error.hint(format!("the whole story: {}", page.display())))
}

/// The VMs with all decisions made, or a usage error before any of them is started.
fn vms(list: &List, given: &Options, folder: &Path, output: &Path) -> Result<Vec<Vm>> {
    let mut vms: Vec<Vm> = Vec::new();
    for (i, settings) in list.machines.iter().enumerate() {
        let merged = merge(list, settings, given, folder);
        let source = merged.get(SOURCE).and_then(|v| v.first());
        let source = folder.join(source.map_or("", String::as_str));
        let at = format!("VM {} ({})", i + 1, source.display());
        let vm = vm(source, merged, output, &at)?;
        if let Some(other) = vms.iter().find(|o| real(&o.evidence) == real(&vm.evidence)) {
            return Err(Error::usage(format!(
                "{at}: {} is the evidence directory of {} too",
                vm.evidence.display(),
                other.source.display()
            ))
            .hint("give one of them another `name` or `output-dir`"));
        }
        vms.push(vm);
    }
    Ok(vms)
}

fn vm(source: PathBuf, mut merged: Options, output: &Path, at: &str) -> Result<Vm> {
    merged.remove(SOURCE);
    let evidence = merged.remove(OUTPUT_DIR).and_then(|v| v.into_iter().next());
    let mut line = vec!["rehearse".into()];
    line.extend(options::arguments_in(&definitions(), &merged));
    line.extend(["--".into(), source.clone().into_os_string()]);
    let parsed = definitions()
        .try_get_matches_from(line)
        .and_then(|matches| OneArgs::from_arg_matches(&matches));
    let one = parsed.map_err(|e| Error::usage(format!("{at}: {}", options::first_line(&e))))?;
    let (name, memory_mib) = match one.fix.job() {
        Ok(job) => (safe_name(&job.vm.machine.name), job.vm.machine.memory_mib),
        Err(mut error) if error.kind == ErrorKind::Usage => {
            error.message = format!("{at}: {}", error.message);
            return Err(error);
        }
        // The rehearsal reports that; the others continue.
        Err(_) => {
            let stem = source.file_stem().unwrap_or_default().to_string_lossy();
            let name = safe_name(one.fix.name.as_deref().unwrap_or(&stem));
            (name, one.fix.memory.unwrap_or(USUAL_MEMORY_MIB))
        }
    };
    let mut env = inherited_keys(&merged);
    env.extend(options::hide_keys(&mut merged));
    let evidence = evidence.map_or_else(|| output.join(format!("{name}-rehearsal")), PathBuf::from);
    let evidence = std::path::absolute(&evidence)
        .map_err(|e| Error::usage(format!("{at}: {}", evidence.display())).because(e))?;
    Ok(Vm {
        evidence,
        args: options::arguments_in(&definitions(), &merged),
        env,
        memory_mib,
        uri: one.watch.uri().to_owned(),
        name,
        source,
    })
}

/// Keys in the environment, which a child with privileges inherits only explicitly.
fn inherited_keys(merged: &Options) -> Vec<(String, String)> {
    let keys = merged.get(KEY).into_iter().flatten();
    let names = keys.filter_map(|key| match key.splitn(3, ':').collect::<Vec<_>>()[..] {
        [_, "env", name] => Some(name.to_owned()),
        _ => None,
    });
    names
        .filter_map(|name| Some((name.clone(), std::env::var(&name).ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::file;

    fn list(text: &str) -> Result<Vec<Vm>> {
        let list = file::parse(text, &RehearseOptions).map_err(Error::usage)?;
        let none = Options::new();
        vms(&list, &none, Path::new("/list"), Path::new("/out"))
    }

    #[test]
    fn a_list_has_options_of_the_conversion_and_of_the_boots() {
        let vms = list(
            "defaults: {virtio-iso: iso, timeout: 900}\nmachines:\n\
             - {source: a/web.raw, memory: 8192}\n- {source: db.raw, name: db, timeout: ~, output-dir: /x}\n",
        )
        .unwrap();
        let shown: Vec<_> = vms.iter().map(|v| (&*v.name, &*v.evidence)).collect();
        let wanted = [
            ("web", Path::new("/out/web-rehearsal")),
            ("db", Path::new("/x")),
        ];
        assert_eq!(shown, wanted);
        assert_eq!(
            vms[0].args,
            ["--memory=8192", "--timeout=900", "--virtio-iso=/list/iso"]
        );
        assert_eq!(vms[0].memory_mib, 8192);
    }

    #[test]
    fn what_does_not_go_with_a_rehearsal_is_named_before_the_start() {
        for (text, says) in [
            ("machines: [{source: a, compress: true}]", "--compress"),
            ("machines: [{source: a, format: raw}]", "--format"),
            ("machines: [{source: a, in-place: true}]", "--in-place"),
            ("machines: [{source: a, copy: later}]", "--copy"),
            ("machines: [{source: a, timeout: soon}]", "soon"),
            ("machines: [{source: a, nonsense: 1}]", "unknown option"),
            (
                "machines: [{source: a}, {source: b/a}]",
                "evidence directory",
            ),
            ("defaults: {name: x}\nmachines: [{source: a}]", "for one VM"),
        ] {
            let error = list(text).map(drop).expect_err(text);
            assert_eq!(error.kind, ErrorKind::Usage);
            assert!(error.message.contains(says), "{text}: {}", error.message);
        }
        list("machines: [{source: a, format: qcow2}]").unwrap();
    }
}
