//! `hivexregedit`: merging a `.reg` text into a hive file and exporting a key as text.
//!
//! It knows nothing of transaction logs: whoever merges into a dirty hive loses what its logs hold.

use std::path::Path;

use super::confine::Confinement;
use super::{Cmd, Result, ToolError};

pub const TOOL: &str = "hivexregedit";

/// Merges a `.reg` file into the hive. Its keys start with `prefix`, which stands for the root key,
/// e.g. `HKEY_LOCAL_MACHINE\SYSTEM`.
pub fn merge(hive: &Path, prefix: &str, reg: &Path) -> Result<()> {
    Cmd::new(TOOL)
        .confined(Confinement::offline())
        .args(["--merge", "--prefix", prefix, "--"])
        .args([hive, reg])
        .run()?;
    Ok(())
}

/// The key and everything below it as `.reg` text. `key` starts below the root key: `\Select`, or
/// `\` for all.
pub fn export(hive: &Path, prefix: &str, key: &str) -> Result<String> {
    let out = Cmd::new(TOOL)
        .confined(Confinement::offline())
        .args(["--export", "--prefix", prefix, "--"])
        .arg(hive)
        .arg(key)
        .stdout_limit(1 << 30)
        .run()?;
    String::from_utf8(out.stdout).map_err(|e| ToolError::output(TOOL, e))
}
