//! The documents and the report page: what they show is run, and what is generated is up to date.
//!
//! Every command shown is run. A fenced block marked `sh` in README.md or `docs/` is run by a shell, in one
//! directory per document, with disks and machines made by hyper2kvm under the names the documents use
//! (`docs/fleet/` by `tests/fleet/`, `docs/linux.md` by `tests/linux.rs`). Programs that act on other hosts,
//! build or need a VM are stood in for: those check that what they are given is there.
//! hyper2kvm itself is real, but for the verbs that install packages or need a libvirtd (`tests/boot/` runs
//! those), and for sources on other hosts (`tests/wire/`): of these the arguments are checked. Commands and options named in the text go through the
//! program's own parser. Blocks marked `text` are for other hosts, or output.
//!
//! `HYPER2KVM_UPDATE=1 cargo test --test docs` updates the generated documents.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

#[path = "../support/mod.rs"]
mod support;

mod commands;
mod generated;
mod packages;
mod pages;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{CommandFactory, Parser};
use hyper2kvm::cli::Cli;
use hyper2kvm::demo::{GuestSpec, WinVersion};
use hyper2kvm::tool::host::PackageManager;
use serde_json::Value;
use support::{Lab, TOOLS, binary, blocks, have, tool, virtio_win};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README.md and every page in `docs/` and `docs/fleet/`.
fn documents() -> Vec<PathBuf> {
    let mut documents: Vec<PathBuf> = fs::read_dir(root().join("docs"))
        .unwrap()
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "md"))
        .collect();
    documents.push(root().join("README.md"));
    documents.push(root().join("docs/fleet/README.md"));
    documents.sort();
    documents
}
