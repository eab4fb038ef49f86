//! What the boot loader loads with a file: the files it imports from, and theirs, to the end.

use std::collections::BTreeSet;

use super::{BootContext, ImageState};
use crate::guest::GuestPath;
use crate::types::Arch;

/// A file in the way of loading another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The file that imports from it.
    pub importer: GuestPath,
    /// As the importer spells it.
    pub name: String,
    /// Where it lies, when it is there and of no use.
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

/// Real drivers bring a dozen files along.
const MAX_FILES: usize = 256;

/// What the kernel is made of; it is loaded before any driver, from `System32`.
const KERNEL: [&str; 5] = [
    "ntoskrnl.exe",
    "hal.dll",
    "bootvid.dll",
    "kdcom.dll",
    "pshed.dll",
];

/// The files that `start` cannot be loaded without and that are missing or of no use. Files in `seen` are
/// passed over, and those that were looked at are added.
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

/// Windows 7 and later look these names up in a table (apisetschema.dll); there are no such files, and an
/// extension (`ext-`) may stand for nothing.
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
