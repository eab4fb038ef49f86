//! Changes the documents that name the disks to new paths.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Moved, io_error};
use crate::domain::element::Element;
use crate::domain::emit;
use crate::error::{Error, Result};
use crate::fix::journal::write_durably;
use crate::fix::trusted;
use crate::report::OutputFile;
use crate::text::in_single_quotes;

/// Disks and UEFI variables of a domain.
pub(super) fn files_of(root: &Element) -> Vec<PathBuf> {
    let sources = root.descendants("source");
    let mut files: Vec<PathBuf> = sources
        .iter()
        .filter_map(|s| s.attr("file"))
        .map(PathBuf::from)
        .collect();
    files.extend(root.path("os/nvram").map(|n| PathBuf::from(&n.text)));
    files
}

/// Replaces the paths of a domain's disks and UEFI variables by those that `new` returns.
pub(in crate::boot) fn rewrite(element: &mut Element, new: &dyn Fn(&str) -> Option<String>) {
    if element.is("source") {
        for (_, value) in element.attrs.iter_mut().filter(|(key, _)| key == "file") {
            if let Some(path) = new(value) {
                *value = path;
            }
        }
    }
    if element.is("host") {
        for (_, value) in element.attrs.iter_mut().filter(|(key, _)| key == "socket") {
            if let Some(path) = new(value) {
                *value = path;
            }
        }
    }
    if element.is("nvram")
        && let Some(path) = new(&element.text)
    {
        element.text = path;
    }
    for child in &mut element.children {
        rewrite(child, new);
    }
}

const REPORT: &str = "report.html";

/// Replaces the paths in all other files that name the disks. These are scripts and YAML, where
/// paths are in single quotes, and the HTML report.
pub(super) fn rewrite_texts(folder: &Path, report: &Value, moved: &[Moved]) -> Result<()> {
    let emitted = report.pointer("/outputs/emitted").and_then(Value::as_array);
    let names = emitted.into_iter().flatten().filter_map(Value::as_str);
    let names = names.filter_map(|path| Path::new(path).file_name()?.to_str());
    for name in names.chain([REPORT]) {
        let path = folder.join(name);
        let mut text = match trusted::read(&path) {
            Err(e) if e.is_missing() => continue,
            text => String::from_utf8(text?)
                .map_err(|e| Error::failed(format!("reading {}", path.display())).because(e))?,
        };
        for Moved { from, to, .. } in moved {
            // The TPM's state is stored beside the variables.
            let tpm = [from, to].map(|path| path.with_extension("tpm"));
            for [from, to] in [[from, to], [&tpm[0], &tpm[1]]] {
                let [from, to] =
                    [from, to].map(|path| in_single_quotes(&path.display().to_string()));
                text = text.replace(&from, &to);
            }
            if name != REPORT {
                for (from, to) in [(from, to), (&tpm[0], &tpm[1])] {
                    let file = from.file_name().unwrap_or_default().to_string_lossy();
                    text = emit::relocated(&text, &file, to);
                }
            }
        }
        replace(&path, text.as_bytes())?;
    }
    Ok(())
}

/// Replaces a file, durably before it gets its name; the mode is kept.
pub(in crate::boot) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        let mode = fs::metadata(path)?.permissions();
        write_durably(path, bytes)?;
        fs::set_permissions(path, mode)
    };
    write().map_err(io_error("writing", path))
}

/// Updates the paths of the disks, and the facts about their files.
pub(super) fn rewrite_report(folder: &Path, report: &mut Value, moves: &[Moved]) {
    if let Some(disks) = report
        .pointer_mut("/outputs/disks")
        .and_then(Value::as_array_mut)
    {
        for disk in disks {
            let mut found = moves.iter();
            let found = found.find(|m| disk.as_str().map(Path::new) == Some(&m.from));
            if let Some(moved) = found {
                *disk = moved.to.display().to_string().into();
            }
        }
    }
    let Some(files) = report.get_mut("files").and_then(Value::as_array_mut) else {
        return;
    };
    for entry in files {
        let Ok(was) = serde_json::from_value::<OutputFile>(entry.clone()) else {
            continue;
        };
        let path = folder.join(&was.path);
        let moved = moves.iter().find(|m| m.from == path);
        let (name, path) = match moved {
            Some(moved) => (moved.to.clone(), moved.to.clone()),
            None => (was.path, path),
        };
        let now = fs::metadata(&path).ok();
        if let Some(now) = now.and_then(|found| OutputFile::of(name, &found)) {
            *entry = serde_json::json!(now);
        }
    }
}
