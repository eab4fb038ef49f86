//! Input that cannot be converted: a clear error with a remedy, the documented exit code, and nothing
//! left behind.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

#[path = "../support/mod.rs"]
mod support;

mod disks;
mod host;
mod program;

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use hyper2kvm::demo::{DemoVolume, ExtraFile, GuestSpec, Role, WinVersion, hives};
use serde_json::Value;
use support::{
    Lab, Run, TOOLS, binary, finish, h2k, have, processes_naming, sha256, skip, tool, virtio_win,
};

/// Runs the program with its temporary files in a directory that must be empty afterwards.
fn run_in(lab: &Lab, args: &[&str], env: &[(&str, &OsStr)]) -> Run {
    let tmp = lab.path("tmp");
    fs::create_dir_all(&tmp).unwrap();
    let mut command = Command::new(support::binary());
    command
        .args(args)
        .current_dir(lab.dir.path())
        .env("TMPDIR", &tmp);
    command.envs(env.iter().copied());
    let run = support::finish(command);
    let left: Vec<_> = fs::read_dir(&tmp).unwrap().collect();
    assert!(
        left.is_empty(),
        "temporary files left by {args:?}: {left:?}"
    );
    run
}

fn listing(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n != "tmp")
        .collect();
    names.sort();
    names
}

/// The command must fail with `code` and print each of `says`, for people and as JSON alike.
#[track_caller]
fn fails_with(lab: &Lab, args: &[&str], env: &[(&str, &OsStr)], code: i32, says: &[&str]) {
    let before = listing(lab.dir.path());
    let human = run_in(lab, args, env).expect(code);
    assert_eq!(human.stdout, "", "{args:?}: an error is no result");
    let mut json_args = args.to_vec();
    json_args.push("--json");
    let json = run_in(lab, &json_args, env).expect(code).json();
    assert_eq!(json["schema"], "hyper2kvm/error/1", "{json}");
    assert_eq!(json["error"]["code"], code, "{json}");
    let text = human.stderr.trim_end();
    eprintln!("{text}\n");
    for word in says {
        assert!(text.contains(word), "{args:?}: no {word:?} in:\n{text}");
    }
    // The last line is the remedy.
    let last = text.lines().last().unwrap_or_default().trim_start();
    assert!(
        last.starts_with("hint:") || last.starts_with("remedy:"),
        "{args:?} ends without a remedy:\n{text}"
    );
    assert_plain(text);
    assert_eq!(listing(lab.dir.path()), before, "{args:?} left something");
    // The kernel ends children right after us, not before.
    let mut running = processes_naming(lab.dir.path());
    for _ in 0..20 {
        if running.is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        running = processes_naming(lab.dir.path());
    }
    assert!(running.is_empty(), "{args:?} left {running:?}");
}

/// No `{:?}` of internal types, no panic, no backtrace.
#[track_caller]
fn assert_plain(text: &str) {
    for debug in [
        "Some(",
        "None",
        "Err(",
        "Ok(",
        "Os {",
        "kind:",
        "panicked",
        "RUST_BACKTRACE",
        "Error {",
        "\\\\?\\",
        "\\u{",
    ] {
        assert!(!text.contains(debug), "{debug:?} in:\n{text}");
    }
}

/// `convert` and `inspect` of a disk that is not one.
#[track_caller]
fn unreadable(lab: &Lab, name: &str, code: i32, says: &[&str]) {
    eprintln!("== {name}");
    fails_with(lab, &["inspect", name], &[], code, says);
    let driver_source = virtio_win().to_str().unwrap();
    for verb in ["convert", "plan"] {
        fails_with(
            lab,
            &[verb, name, "--virtio-iso", driver_source],
            &[],
            code,
            says,
        );
    }
}

/// `inspect` shows what there is; `convert` refuses.
#[track_caller]
fn not_convertible(lab: &Lab, name: &str, says: &[&str], shows: &[&str]) {
    eprintln!("== {name}");
    let shown = run_in(lab, &["inspect", name], &[]).expect(0).stdout;
    for word in shows {
        assert!(shown.contains(word), "no {word:?} in:\n{shown}");
    }
    assert_plain(&shown);
    let digest = sha256(&lab.path(name));
    let json = run_in(lab, &["inspect", name, "--json"], &[])
        .expect(0)
        .json();
    assert_eq!(json["schema"], "hyper2kvm/inspect/1");
    let driver_source = virtio_win().to_str().unwrap();
    for verb in ["convert", "plan"] {
        let args = [verb, name, "--virtio-iso", driver_source];
        fails_with(lab, &args, &[], 3, says);
    }
    assert_eq!(sha256(&lab.path(name)), digest);
}

fn small(version: WinVersion) -> GuestSpec {
    let mut spec = GuestSpec::new(version);
    spec.disk_size = 512 << 20;
    spec.recovery = false;
    spec
}

/// A directory for cases that need no guest.
fn empty_lab() -> Lab {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("guest.raw");
    Lab {
        dir,
        spec: small(WinVersion::Win10),
        raw,
    }
}

fn path(lab: &Lab, name: &str) -> String {
    lab.path(name).to_str().unwrap().to_string()
}
