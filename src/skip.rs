//! The rule for tests with missing prerequisites: programs, the corpus, a file system of their own.
//!
//! Such a test is reported and counted: `SKIP 2: the test NAME: WHY` on standard error, where
//! libtest does not hide it, and as a line of the file that `HYPER2KVM_SKIPS` names. With
//! `HYPER2KVM_REQUIRE_TOOLS` the test fails instead, unless `HYPER2KVM_SKIP` names what is missing.
//! The integration tests include this file.

#![allow(dead_code, reason = "no test program needs all of it")]

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

static SKIPPED: AtomicUsize = AtomicUsize::new(0);

/// Reports that the test ends here. `what` is the word with which `HYPER2KVM_SKIP` permits it.
#[track_caller]
pub fn skip(what: &str, why: impl Display) {
    assert!(is_allowed(what), "{why}: HYPER2KVM_SKIP={what} allows it");
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("unnamed");
    let line = format!("the test {test}: {why}\n");
    // Not by `eprintln!`: libtest hides that.
    let _ = std::io::stderr().write_all(format!("SKIP {count}: {line}").as_bytes());
    if let Some(list) = std::env::var_os("HYPER2KVM_SKIPS") {
        let mut list = File::options()
            .append(true)
            .create(true)
            .open(list)
            .unwrap();
        list.write_all(line.as_bytes()).unwrap();
    }
}

/// Whether a test may run without that.
fn is_allowed(what: &str) -> bool {
    let named = std::env::var("HYPER2KVM_SKIP").unwrap_or_default();
    std::env::var_os("HYPER2KVM_REQUIRE_TOOLS").is_none()
        || named.split(' ').any(|word| word == what)
}

fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(tool))
        .find(|file| file.is_file())
}

/// Whether every program exists; otherwise the test is skipped.
#[track_caller]
pub fn have(tools: &[&str]) -> bool {
    // A script that calls another program, which Debian 12 does not install with it.
    let validates = tools.contains(&"virt-xml-validate");
    let missing: Vec<&str> = (tools.iter())
        .chain(validates.then_some(&"xmllint"))
        .filter(|tool| find(tool).is_none())
        .copied()
        .collect();
    if let Some(first) = missing.first() {
        skip(first, format!("missing tools: {}", missing.join(", ")));
    }
    missing.is_empty()
}

/// The directory of the corpus; without one the test is skipped.
#[track_caller]
pub fn corpus_folder() -> Option<PathBuf> {
    let folder = folder();
    if !has_files(&folder) {
        skip("corpus", format!("no corpus at {}", folder.display()));
        return None;
    }
    Some(folder)
}

pub(crate) fn has_files(folder: &Path) -> bool {
    let mut entries = std::fs::read_dir(folder).into_iter().flatten();
    entries.next().is_some()
}

fn folder() -> PathBuf {
    std::env::var_os("HYPER2KVM_CORPUS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/corpus"),
        PathBuf::from,
    )
}

/// A file of the corpus, unpacked; without it the test is skipped.
#[track_caller]
pub fn corpus(name: &str) -> Option<Vec<u8>> {
    let bytes = corpus_if_there(name);
    if bytes.is_none() {
        let folder = folder();
        skip("corpus", format!("no {name} in {}", folder.display()));
    }
    bytes
}

/// A file of the corpus for a test that has other cases too. Its absence is a failure if everything
/// is required, and otherwise no skip.
#[track_caller]
pub fn corpus_if_there(name: &str) -> Option<Vec<u8>> {
    static UNPACKED: Mutex<BTreeMap<String, Vec<u8>>> = Mutex::new(BTreeMap::new());
    let path = folder().join(format!("{name}.xz"));
    if !path.is_file() {
        assert!(is_allowed("corpus"), "no {}", path.display());
        return None;
    }
    let mut unpacked = UNPACKED.lock().unwrap();
    let bytes = unpacked.entry(name.into()).or_insert_with(|| unpack(&path));
    Some(bytes.clone())
}

#[allow(
    clippy::disallowed_methods,
    reason = "the library may be the test's subject"
)]
fn unpack(path: &Path) -> Vec<u8> {
    let out = Command::new("xz").arg("-dc").arg(path).output().unwrap();
    assert!(out.status.success(), "xz -dc {}", path.display());
    out.stdout
}
