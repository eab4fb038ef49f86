//! Determines the installed version of a tool from its output, and whether it is too old.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::confine::Confinement;
use super::host::{Kind, TOOLS, Tool};
use super::{Cmd, clean};

impl Tool {
    /// Looks the tool up and reads its version.
    pub fn probe(&'static self) -> Found {
        let path = self.find();
        let version = match (&self.kind, &path) {
            (Kind::Program(args), Some(path)) => version_line(path, args),
            (Kind::Library, Some(path)) => path
                .canonicalize()
                .ok()
                .and_then(|p| Some(clean(p.file_name()?.as_encoded_bytes()))),
            _ => None,
        };
        Found {
            tool: self,
            path,
            version,
        }
    }
}

/// The result of [`Tool::probe`].
#[derive(Debug)]
pub struct Found {
    pub tool: &'static Tool,
    /// `None` if it is not installed.
    pub path: Option<PathBuf>,
    pub version: Option<String>,
}

fn version_line(path: &Path, args: &[&str]) -> Option<String> {
    let out = Cmd::new(path)
        .confined(Confinement::writes_arguments())
        .args(args)
        .timeout(Duration::from_secs(10))
        .run()
        .ok()?;
    [clean(&out.stdout), out.stderr]
        .iter()
        .flat_map(|text| text.lines())
        .map(str::trim)
        .find(|line| !line.is_empty())
        .map(str::to_owned)
}

/// The oldest QEMU whose storage daemon supports the required options: `--export` with `node-name`.
const QEMU: (u32, u32) = (5, 2);

impl Found {
    /// The message about a program that is too old to be used.
    pub fn too_old(&self) -> Option<String> {
        let line = self.version.as_deref()?;
        let ours = ["qemu-img", "qemu-storage-daemon"].contains(&self.tool.name);
        let old = ours && qemu_version(line)? < QEMU;
        old.then(|| format!("{line}: too old, {}.{} or newer is needed", QEMU.0, QEMU.1))
    }
}

/// Parses `qemu-img version 7.2.9 (Debian ...)`.
pub(super) fn qemu_version(line: &str) -> Option<(u32, u32)> {
    let (_, rest) = line.split_once("version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The message about the first QEMU program that is too old.
pub fn old_qemu() -> Option<String> {
    TOOLS.iter().take(2).find_map(|tool| tool.probe().too_old())
}
