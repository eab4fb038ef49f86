//! An output directory that was moved or copied: its domain XML and report have the paths of where it was.
//!
//! libvirt needs absolute paths, so they are changed to where the directory lies now, before anything else
//! is done. A file is followed only when it is here and not there any more: the original of a copy, or
//! disks that were moved elsewhere (`--install-to`), stay what they are.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::install::{self, Moved};
use crate::domain::element::Element;
use crate::error::Result;

/// Anchors the files of the directory there. Returns where it was, when that was elsewhere.
pub fn anchor(folder: &Path) -> Result<Option<PathBuf>> {
    let Ok(folder) = std::path::absolute(folder) else {
        return Ok(None);
    };
    let report_path = folder.join("report.json");
    // What is wrong with the directory is said by who opens it.
    let report = fs::read(&report_path).ok();
    let Some(report) = report.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok()) else {
        return Ok(None);
    };
    let Some(was) = recorded(&report).filter(|was| *was != folder && !same(was, &folder)) else {
        return Ok(None);
    };
    let mut domains = Vec::new();
    let mut moved: Vec<Moved> = Vec::new();
    for key in ["bootstrap_xml", "final_xml"] {
        let Some(path) = output(&report, key).and_then(|p| Some(folder.join(p.file_name()?))) else {
            continue;
        };
        let Some(root) = fs::read(&path).ok().and_then(|b| Element::parse(&b).ok()) else {
            return Ok(None);
        };
        for from in install::files_of(&root) {
            let Some(name) = from.file_name().filter(|_| from.parent() == Some(&was)) else {
                continue;
            };
            let to = folder.join(name);
            let nvram = root.path("os/nvram").is_some_and(|n| Path::new(&n.text) == from);
            // libvirt makes the UEFI variables at the first start.
            let here = to.exists() || nvram;
            if here && !from.exists() && !moved.iter().any(|m| m.from == from) {
                moved.push(Moved { from, to });
            }
        }
        domains.push((path, root));
    }
    if moved.is_empty() {
        return Ok(None);
    }
    install::name_anew(&folder, domains, report, &moved)?;
    Ok(Some(was))
}

fn output(report: &Value, key: &str) -> Option<PathBuf> {
    let path = report.pointer(&format!("/outputs/{key}"))?.as_str()?;
    Some(path.into())
}

/// Where the directory was when the report was written.
fn recorded(report: &Value) -> Option<PathBuf> {
    output(report, "final_xml")?.parent().map(Path::to_path_buf)
}

/// Another name of the same directory.
fn same(one: &Path, other: &Path) -> bool {
    match (one.canonicalize(), other.canonicalize()) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}
