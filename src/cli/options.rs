//! The options of `convert` as data: all options, the given ones, and a command line made of them.
//!
//! A batch file has them as keys, and `report.json` records those with which a directory was made.
//! Both follow clap's definitions, so a new option needs no change here.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::convert::job::Job;
use crate::error::Result;
use crate::report::{Input, Request};
use crate::source::mirror;
use crate::text;
use crate::wire::Transport;

use super::boot::InstallArgs;
use super::connect::ConnectArgs;
use super::source::FixArgs;

/// Options by their long names, each with its values; a flag has the value `true`.
pub type Options = BTreeMap<String, Vec<String>>;

pub const SOURCE: &str = "source";
pub const OUTPUT_DIR: &str = "output-dir";
pub const NAME: &str = "name";
pub const FORCE: &str = "force";
pub const DRY_RUN: &str = "dry-run";
pub const IN_PLACE: &str = "in-place";
/// Options for how a copy is made, which do not affect its result.
const HOW_COPIED: [&str; 4] = ["resume", "bandwidth", "from-sync", "budget"];
/// Secrets: never on a child's command line, never in a report.
pub const KEY: &str = "key";

/// The arguments for one VM.
#[derive(Debug, clap::Args)]
#[command(mut_arg("connect", |arg| arg.help("libvirt that has the storage pool")))]
pub struct OneArgs {
    #[command(flatten)]
    pub fix: FixArgs,
    #[command(flatten)]
    pub(super) install: InstallArgs,
    #[command(flatten, next_help_heading = "Placing the disks")]
    pub(super) libvirt: ConnectArgs,
}

/// The definitions of the options alone.
fn definitions() -> Command {
    OneArgs::augment_args(Command::new("convert"))
}

fn find<'c>(command: &'c Command, name: &str) -> Option<&'c Arg> {
    command
        .get_arguments()
        .find(|a| a.get_long() == Some(name) || (name == SOURCE && a.get_id() == SOURCE))
}

/// The form of an option's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub flag: bool,
    pub repeatable: bool,
    pub path: bool,
}

/// The form of an option; `None` if it does not exist.
pub fn shape(name: &str) -> Option<Shape> {
    shape_in(&definitions(), name)
}

/// The form of another verb's option.
pub fn shape_in(command: &Command, name: &str) -> Option<Shape> {
    let arg = find(command, name)?;
    Some(Shape {
        flag: matches!(arg.get_action(), ArgAction::SetTrue),
        repeatable: matches!(arg.get_action(), ArgAction::Append),
        path: arg.get_value_parser().type_id() == TypeId::of::<PathBuf>(),
    })
}

/// Checks with clap whether the option accepts this value.
pub fn check(name: &str, value: &str) -> Result<(), String> {
    check_in(definitions(), name, value)
}

/// Checks the value of another verb's option.
pub fn check_in(command: Command, name: &str, value: &str) -> Result<(), String> {
    if name == SOURCE {
        return Ok(());
    }
    let command = command.mut_arg(SOURCE, |a| a.required(false));
    let parsed = command.try_get_matches_from(["hyper2kvm", &format!("--{name}={value}")]);
    parsed.map(drop).map_err(|e| first_line(&e))
}

/// clap's message without its prefix and the usage.
pub fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.trim_start_matches("error: ").to_string()
}

/// The given options, with relative paths made absolute. `everywhere` includes those from the
/// environment.
pub fn given(matches: &ArgMatches, everywhere: bool) -> Options {
    given_in(&definitions(), matches, everywhere)
}

/// The given options of another verb.
pub fn given_in(command: &Command, matches: &ArgMatches, everywhere: bool) -> Options {
    let mut options = Options::new();
    for arg in command.get_arguments() {
        let id = arg.get_id().as_str();
        let Some(name) = arg.get_long() else { continue };
        let counts = match matches.value_source(id) {
            Some(ValueSource::CommandLine) => true,
            Some(ValueSource::EnvVariable) => everywhere,
            _ => false,
        };
        if !counts {
            continue;
        }
        let path = arg.get_value_parser().type_id() == TypeId::of::<PathBuf>();
        let values = if matches!(arg.get_action(), ArgAction::SetTrue) {
            vec!["true".to_string()]
        } else {
            let raw = matches.get_raw(id).into_iter().flatten();
            raw.map(|value| {
                // For a password file it is standard input; a URL is not a path.
                let plain = value == "-" || value.to_string_lossy().contains("://");
                let absolute = (path && !plain).then(|| std::path::absolute(value).ok());
                let absolute = absolute.flatten();
                match absolute {
                    Some(path) => text::of_path(&path).into_owned(),
                    None => value.to_string_lossy().into_owned(),
                }
            })
            .collect()
        };
        options.insert(name.to_string(), values);
    }
    options
}

/// The equivalent arguments, without the source.
pub fn arguments(options: &Options) -> Vec<OsString> {
    arguments_in(&definitions(), options)
}

/// The equivalent arguments of another verb.
pub fn arguments_in(command: &Command, options: &Options) -> Vec<OsString> {
    let mut line = Vec::new();
    for (name, values) in options {
        let flag = shape_in(command, name).is_some_and(|s| s.flag);
        for value in values {
            line.push(if flag {
                format!("--{name}").into()
            } else {
                format!("--{name}={value}").into()
            });
        }
    }
    line
}

/// Parses the options and the source like `convert` itself, and returns the options that it would
/// report.
pub fn parse(source: &Path, options: &Options) -> Result<(OneArgs, Options), clap::Error> {
    let mut line = vec![OsString::from("convert")];
    line.extend(arguments(options));
    line.extend([OsString::from("--"), source.into()]);
    let matches = definitions().try_get_matches_from(line)?;
    Ok((OneArgs::from_arg_matches(&matches)?, given(&matches, true)))
}

/// The request for the report.
pub fn request(job: &Job, options: &Options) -> Request {
    let mut options = options.clone();
    for name in [OUTPUT_DIR, FORCE, DRY_RUN].iter().chain(&HOW_COPIED) {
        options.remove(*name);
    }
    for key in options.get_mut(KEY).into_iter().flatten() {
        // Only the volume for which there was a key.
        key.truncate(key.find(':').unwrap_or(0));
    }
    let mut files: Vec<PathBuf> = job.drivers.source.iter().cloned().collect();
    files.extend(job.drivers.config.iter().cloned());
    // The job has the contents of these, not their paths.
    for name in ["firstboot", "xml-patch"] {
        let paths = options.get(name).into_iter().flatten();
        files.extend(paths.map(PathBuf::from));
    }
    let mut inputs = Vec::new();
    if !job.copy.is_in_place() {
        let source = &job.source;
        // On another host it has no local file; its disks show whether it changed.
        if mirror::transport(&source.path) == Transport::File {
            files.push(source.path.clone());
        }
        for disk in &source.vm.disks {
            let open = || {
                let image = source.access.image(&disk.path, disk.format.as_deref());
                image.ok().filter(|_| disk.packed.is_none())
            };
            match open() {
                Some(image) => inputs.extend(image.held().map(|held| Input {
                    path: text::called_path(held.path()),
                    size_bytes: held.size(),
                    modified_ms: held.modified_ms(),
                    inode: held.inode(),
                })),
                // Packed, or not convertible: the conversion reports the reason.
                None => files.push(disk.path.clone()),
            }
        }
    }
    inputs.extend(files.iter().filter_map(|f| input(f)));
    inputs.sort();
    inputs.dedup();
    Request { options, inputs }
}

fn input(path: &Path) -> Option<Input> {
    let path = std::path::absolute(path).ok()?;
    let meta = path.metadata().ok()?;
    let modified = meta.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(Input {
        size_bytes: meta.len(),
        modified_ms: u64::try_from(modified.as_millis()).unwrap_or(u64::MAX),
        inode: meta.ino(),
        path,
    })
}

/// Moves keys in the options themselves to environment variables, whose names are returned with
/// them.
pub fn hide_keys(options: &mut Options) -> Vec<(String, String)> {
    let mut hidden = Vec::new();
    for key in options.get_mut(KEY).into_iter().flatten() {
        if let [selector, "key", value] = key.splitn(3, ':').collect::<Vec<_>>()[..] {
            let name = format!("HYPER2KVM_BATCH_KEY_{}", hidden.len());
            let shown = format!("{selector}:env:{name}");
            hidden.push((name, value.to_string()));
            *key = shown;
        }
    }
    hidden
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_hidden() {
        let keys = ["all:key:123-456:x", "2:file:/k", "/dev/sda1:key:p"];
        let mut options: Options = [(KEY.to_string(), keys.map(String::from).to_vec())].into();
        let hidden = hide_keys(&mut options);
        let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
        assert_eq!(
            hidden,
            [
                pair("HYPER2KVM_BATCH_KEY_0", "123-456:x"),
                pair("HYPER2KVM_BATCH_KEY_1", "p")
            ]
        );
        assert_eq!(
            options[KEY],
            [
                "all:env:HYPER2KVM_BATCH_KEY_0",
                "2:file:/k",
                "/dev/sda1:env:HYPER2KVM_BATCH_KEY_1"
            ]
        );
    }

    #[test]
    fn options_go_round() {
        let line = [
            "convert",
            "--format=raw",
            "--mac=52:54:00:00:00:01",
            "--mac=52:54:00:00:00:02",
            "--force",
            "--virtio-iso=/iso",
            "--name=-x",
            "vm.vmdk",
        ];
        let matches = definitions().try_get_matches_from(line).unwrap();
        let options = given(&matches, false);
        assert_eq!(options["mac"].len(), 2);
        assert_eq!(options["force"], ["true"]);
        assert!(!options.contains_key("storage"), "a default was not given");
        let (again, effective) = parse(Path::new("-vm.vmdk"), &options).unwrap();
        assert_eq!(effective, options);
        assert_eq!(again.fix.source.source, Path::new("-vm.vmdk"));
        assert_eq!(again.fix.name.as_deref(), Some("-x"));
        assert!(again.fix.force && again.fix.mac.len() == 2);
    }

    #[test]
    fn shapes_and_values() {
        let of = |name| shape(name).map(|s| (s.flag, s.repeatable, s.path));
        for (name, shape) in [
            ("format", Some((false, false, false))),
            ("compress", Some((true, false, false))),
            ("mac", Some((false, true, false))),
            ("virtio-iso", Some((false, false, true))),
            ("firstboot", Some((false, true, true))),
            ("source", Some((false, false, true))),
            ("json", None),
            ("", None),
        ] {
            assert_eq!(of(name), shape, "{name}");
        }
        assert_eq!(check("memory", "4096"), Ok(()));
        assert!(check("memory", "lots").unwrap_err().contains("lots"));
        assert!(check("storage", "floppy").is_err());
    }
}
