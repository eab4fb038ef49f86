//! The child's side: applies the edits to the hive on its stdin.

use std::ffi::{CStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use super::{FAILPOINT, VERB, chain};
use crate::failpoint;
use crate::registry::edit::RegEdits;
use crate::registry::libhivex;
use crate::tool::{confine, launcher};

/// The hive: the only name this process can open. A constant, so that it lies in read-only memory.
static HIVE: &CStr = c"/proc/self/fd/0";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Runs the child if this process was started as one. Called in `main` with all arguments.
pub fn run_if_asked(args: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let mut args = args.into_iter().skip(1);
    if args.next()? != VERB {
        return None;
    }
    Some(match run(args.next(), args.next()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Directly to stderr: the parent collects it, and there is no user interface here.
            let _ = writeln!(io::stderr(), "{}", chain(&*error));
            ExitCode::FAILURE
        }
    })
}

fn run(parent: Option<OsString>, edits: Option<OsString>) -> Result<()> {
    launcher::tie_to(parent)?;
    let edits = File::open(edits.unwrap_or_default())?;
    let edits: RegEdits = serde_json::from_reader(io::BufReader::new(edits))?;
    let size = File::from(io::stdin().as_fd().try_clone_to_owned()?)
        .metadata()?
        .len();
    // All of this opens files, so it happens before they are out of reach.
    libhivex::load()?;
    // The same applies to files that the formatting of an error or a panic may read.
    let _ = std::env::current_dir();
    confine::editor(HIVE, size)?;
    failpoint::hit(FAILPOINT)?;
    libhivex::edit(HIVE, &edits)?;
    Ok(())
}
