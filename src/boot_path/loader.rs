//! Finds the files that the boot loader loads together with a file: its imports, their imports, and
//! so on.

use std::collections::BTreeSet;

use super::{BootContext, ImageState};
use crate::guest::GuestPath;
use crate::types::Arch;

/// A file without which another cannot be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The file that imports it.
    pub importer: GuestPath,
    /// The spelling in the importer.
    pub name: String,
    /// Its path, if it exists but is unusable.
    pub path: Option<GuestPath>,
    pub state: ImageState,
}

impl Missing {
    /// `storport.sys, which \Windows\...\viostor.sys imports from, is missing`
    pub fn text(&self, arch: Arch) -> String {
        let Self { importer, name, .. } = self;
        let what = match (self.state, &self.path) {
            (ImageState::Present { machine: Some(m) }, Some(path)) => {
                format!(
                    "is for {} ({path}), Windows is {}",
                    super::pe::processor(m),
                    arch.name()
                )
            }
            (ImageState::Unreadable, Some(path)) => format!("is not a usable file ({path})"),
            _ => "is missing".to_string(),
        };
        format!("{name}, which {importer} imports from, {what}")
    }
}

/// The most files loaded with one driver; real drivers need a dozen.
const MAX_FILES: usize = 256;

/// The files of the kernel, which is loaded before any driver, from `System32`.
const KERNEL: [&str; 5] = [
    "ntoskrnl.exe",
    "hal.dll",
    "bootvid.dll",
    "kdcom.dll",
    "pshed.dll",
];

/// The missing or unusable files that `start` needs to be loaded. Files in `seen` are skipped, and
/// the examined ones are added to it.
pub fn missing_imports(
    ctx: &BootContext<'_>,
    start: &GuestPath,
    seen: &mut BTreeSet<String>,
) -> Vec<Missing> {
    let mut missing = Vec::new();
    let mut queue = vec![start.clone()];
    while let Some(importer) = queue.pop() {
        if seen.len() >= MAX_FILES {
            break;
        }
        for name in (ctx.image)(&importer).imports.iter() {
            if is_api_set(ctx, name) || !seen.insert(name.to_lowercase()) {
                continue;
            }
            match find(ctx, &importer, name) {
                Ok(path) => queue.push(path),
                Err((path, state)) => missing.push(Missing {
                    importer: importer.clone(),
                    name: name.clone(),
                    path,
                    state,
                }),
            }
        }
    }
    missing
}

/// Whether the name is an API set. Windows 7 and later look these names up in a table
/// (apisetschema.dll). No such files exist, and an extension (`ext-`) may be empty.
fn is_api_set(ctx: &BootContext<'_>, name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ctx.nt >= (6, 1) && (name.starts_with("api-") || name.starts_with("ext-"))
}

fn find(
    ctx: &BootContext<'_>,
    importer: &GuestPath,
    name: &str,
) -> Result<GuestPath, (Option<GuestPath>, ImageState)> {
    let system = ctx.windows_root.join("System32").ok();
    let drivers = ctx.windows_root.join("System32\\drivers").ok();
    let kernel = KERNEL.iter().any(|k| k.eq_ignore_ascii_case(name));
    let folders = match (kernel, ctx.nt.0 < 6) {
        (true, _) => vec![system],
        (false, true) => vec![importer.parent()],
        (false, false) => vec![importer.parent(), drivers, system],
    };
    for folder in folders.into_iter().flatten() {
        let Ok(path) = folder.join(name) else {
            continue;
        };
        return match (ctx.image)(&path).state {
            ImageState::Missing => continue,
            ImageState::Present { machine }
                if machine.is_none_or(|m| m == ctx.arch.pe_machine()) =>
            {
                Ok(path)
            }
            state => Err((Some(path), state)),
        };
    }
    Err((None, ImageState::Missing))
}
