//! Updates an output directory that was moved or copied: its domain XML, report and record contain
//! its old path.
//!
//! libvirt needs absolute paths, so they are changed to the present path of the directory, before
//! anything else is done. This applies only to files in the directory: disks elsewhere
//! (`--install-to`, block devices) keep their paths. Every step may be repeated after an
//! interruption; the report is changed last.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};

use super::install::texts::{replace, rewrite};
use super::record;
use crate::domain::element::Element;
use crate::error::{Error, Result};
use crate::fix::trusted;
use crate::later::wire::SOCKET;
use crate::report::OutputFile;

const REPORT: &str = "report.json";

/// Updates the paths in the directory's files. Returns the old path of the directory if it differs.
pub fn anchor(folder: &Path) -> Result<Option<PathBuf>> {
    let Some(here) = absolute(folder) else {
        return Ok(None);
    };
    let report = read(&here.join(REPORT))?;
    let Some(mut report) = report.and_then(|text| serde_json::from_slice::<Value>(&text).ok())
    else {
        return Ok(None);
    };
    let Some(was) = recorded(&report).filter(|was| *was != here && !same(was, &here)) else {
        return Ok(None);
    };
    let failed = |e: io::Error| Error::failed(format!("reading {}", here.display())).because(e);
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(&here).map_err(failed)? {
        names.insert(entry.map_err(failed)?.file_name());
    }
    let moved = Moved { was, here, names };
    for key in ["bootstrap_xml", "final_xml"] {
        moved.domain(&mut report, key)?;
    }
    moved.record()?;
    if let Some(outputs) = report.get_mut("outputs") {
        moved.value(outputs);
    }
    replace(&moved.here.join(REPORT), format!("{report:#}\n").as_bytes())?;
    Ok(Some(moved.was))
}

struct Moved {
    was: PathBuf,
    here: PathBuf,
    /// The names in the directory.
    names: BTreeSet<OsString>,
}

impl Moved {
    /// The present path of a file of the old directory.
    fn new_path(&self, old: &str) -> Option<String> {
        let below = Path::new(old).strip_prefix(&self.was).ok()?;
        let Component::Normal(first) = below.components().next()? else {
            return None;
        };
        let found = self.names.contains(first);
        found.then(|| self.at_new_place(below))
    }

    fn at_new_place(&self, below: &Path) -> String {
        self.here.join(below).display().to_string()
    }

    fn domain(&self, report: &mut Value, key: &str) -> Result<()> {
        let path = report.pointer(&format!("/outputs/{key}"));
        let path = path.and_then(Value::as_str).map(Path::new);
        let Some(name) = path.and_then(Path::file_name).map(OsStr::to_owned) else {
            return Ok(());
        };
        let path = self.here.join(&name);
        // A broken file: opening it later reports the error.
        let text = read(&path)?;
        let Some(mut root) = text.and_then(|text| Element::parse(&text).ok()) else {
            return Ok(());
        };
        let nvram = root.path("os/nvram").map(|n| n.text.clone());
        rewrite(&mut root, &|old| {
            // libvirt makes the UEFI variables at the first start: there is no file yet.
            match Path::new(old).strip_prefix(&self.was) {
                Ok(name) if nvram.as_deref() == Some(old) => Some(self.at_new_place(name)),
                // The process that serves there creates it.
                Ok(name) if name.extension() == Some(OsStr::new(SOCKET)) => {
                    Some(self.at_new_place(name))
                }
                _ => self.new_path(old),
            }
        });
        replace(&path, root.to_document().as_bytes())?;
        listed_anew(report, &self.here, &name);
        Ok(())
    }

    /// Updates the copies from before the switch, and the evidence.
    fn record(&self) -> Result<()> {
        let path = self.here.join(record::FILE_NAME);
        let text = read(&path)?;
        let Some(mut record) = text.and_then(|t| serde_json::from_slice::<Value>(&t).ok()) else {
            return Ok(());
        };
        self.value(&mut record);
        replace(&path, format!("{record:#}\n").as_bytes())
    }

    fn value(&self, value: &mut Value) {
        match value {
            Value::String(text) => {
                if let Some(new) = self.new_path(text) {
                    *text = new;
                }
            }
            Value::Array(list) => list.iter_mut().for_each(|v| self.value(v)),
            Value::Object(map) => map.values_mut().for_each(|v| self.value(v)),
            _ => {}
        }
    }
}

/// Reads a file; `None` if it does not exist. A file that others may have written must not be
/// rewritten as this user's.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match trusted::read(path) {
        Err(e) if e.is_missing() => Ok(None),
        text => Ok(Some(text?)),
    }
}

/// Updates the report's list for rewritten files of the directory.
pub(crate) fn list_anew(folder: &Path, names: &[&str]) -> Result<()> {
    let path = folder.join(REPORT);
    let report = read(&path)?;
    let Some(mut report) = report.and_then(|text| serde_json::from_slice::<Value>(&text).ok())
    else {
        return Ok(());
    };
    for name in names {
        listed_anew(&mut report, folder, OsStr::new(name));
    }
    replace(&path, format!("{report:#}\n").as_bytes())
}

/// Updates the entry of a rewritten file; the others stay unchanged.
fn listed_anew(report: &mut Value, folder: &Path, name: &OsStr) {
    let files = report.get_mut("files").and_then(Value::as_array_mut);
    let is_it = |entry: &&mut Value| entry["path"].as_str().map(OsStr::new) == Some(name);
    let entry = files.and_then(|list| list.iter_mut().find(is_it));
    let found = fs::metadata(folder.join(name)).ok();
    if let (Some(entry), Some(found)) = (entry, found)
        && let Some(now) = OutputFile::of(name.into(), &found)
    {
        *entry = json!(now);
    }
}

fn absolute(folder: &Path) -> Option<PathBuf> {
    if folder.components().any(|c| c == Component::ParentDir) {
        return folder.canonicalize().ok();
    }
    std::path::absolute(folder).ok()
}

/// The path of the directory when the report was written.
fn recorded(report: &Value) -> Option<PathBuf> {
    let path = report.pointer("/outputs/final_xml")?.as_str()?;
    let folder = Path::new(path).parent()?;
    folder.is_absolute().then(|| folder.to_path_buf())
}

/// Whether two names lead to the same directory.
fn same(one: &Path, other: &Path) -> bool {
    match (one.canonicalize(), other.canonicalize()) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<domain><os><nvram>WAS/vm_VARS.fd</nvram></os><devices>\
        <disk><source file='WAS/vm.qcow2'/></disk><disk><source file='WAS/gone.qcow2'/></disk>\
        <disk><source file='/images/other.qcow2'/></disk><disk><source file='WAS2/vm.qcow2'/></disk>\
        </devices></domain>";

    fn folder(root: &Path) -> PathBuf {
        let was = root.join("was");
        fs::create_dir(&was).unwrap();
        let text = |path: &str| was.join(path).display().to_string();
        let xml = XML.replace("WAS", was.to_str().unwrap());
        fs::write(was.join("vm.xml"), xml).unwrap();
        fs::write(was.join("vm.qcow2"), "disk").unwrap();
        let disks = [text("vm.qcow2"), "/images/other.qcow2".into()];
        let report = json!({
            "outputs": {"final_xml": text("vm.xml"), "disks": disks},
            "files": [
                {"path": "vm.xml", "size_bytes": 1, "modified_ns": 1, "inode": 1},
                {"path": "vm.qcow2", "size_bytes": 1, "modified_ns": 1, "inode": 1},
            ],
            "source": text("vm.qcow2"),
        });
        fs::write(was.join(REPORT), report.to_string()).unwrap();
        let record = json!({"protected": [{"kind": "snapshot", "disk": text("vm.qcow2")}]});
        fs::write(was.join(record::FILE_NAME), record.to_string()).unwrap();
        was
    }

    fn json_of(path: PathBuf) -> Value {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn a_moved_folder_names_its_own_files() {
        let dir = tempfile::tempdir().unwrap();
        let was = folder(dir.path());
        assert_eq!(anchor(&was).unwrap(), None);
        let here = dir.path().join("it's <here>");
        fs::rename(&was, &here).unwrap();
        assert_eq!(anchor(&here).unwrap(), Some(was.clone()));
        let root = Element::parse(&fs::read(here.join("vm.xml")).unwrap()).unwrap();
        let sources = root.descendants("source");
        let files: Vec<&str> = sources.iter().filter_map(|s| s.attr("file")).collect();
        let there = |folder: &Path, name: &str| folder.join(name).display().to_string();
        assert_eq!(
            files,
            [
                &there(&here, "vm.qcow2"),
                &there(&was, "gone.qcow2"),
                "/images/other.qcow2",
                &format!("{}2/vm.qcow2", was.display()),
            ]
        );
        assert_eq!(
            root.path("os/nvram").unwrap().text,
            there(&here, "vm_VARS.fd")
        );
        let report = json_of(here.join(REPORT));
        assert_eq!(report["outputs"]["final_xml"], there(&here, "vm.xml"));
        assert_eq!(
            report["outputs"]["disks"],
            json!([there(&here, "vm.qcow2"), "/images/other.qcow2"])
        );
        // The old path is not a file of the directory.
        assert_eq!(report["source"], there(&was, "vm.qcow2"));
        let size = fs::metadata(here.join("vm.xml")).unwrap().len();
        assert_eq!(report["files"][0]["size_bytes"], size);
        assert_eq!(report["files"][1]["size_bytes"], 1, "not looked at");
        let record = json_of(here.join(record::FILE_NAME));
        assert_eq!(record["protected"][0]["disk"], there(&here, "vm.qcow2"));
        assert_eq!(anchor(&here).unwrap(), None, "once");
    }

    #[test]
    fn a_copy_stands_alone_and_a_link_is_no_move() {
        let dir = tempfile::tempdir().unwrap();
        let was = folder(dir.path());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&was, &link).unwrap();
        assert_eq!(anchor(&link).unwrap(), None);
        let copy = dir.path().join("copy");
        fs::create_dir(&copy).unwrap();
        for name in ["vm.xml", "vm.qcow2", REPORT] {
            fs::copy(was.join(name), copy.join(name)).unwrap();
        }
        let before = fs::read(was.join("vm.xml")).unwrap();
        assert_eq!(anchor(&copy.join("../copy")).unwrap(), Some(was.clone()));
        let xml = fs::read_to_string(copy.join("vm.xml")).unwrap();
        assert!(
            xml.contains(copy.join("vm.qcow2").to_str().unwrap()),
            "{xml}"
        );
        assert_eq!(fs::read(was.join("vm.xml")).unwrap(), before);
        // Killed after the XML and before the report.
        fs::copy(was.join(REPORT), copy.join(REPORT)).unwrap();
        assert_eq!(anchor(&copy).unwrap(), Some(was));
        assert_eq!(fs::read_to_string(copy.join("vm.xml")).unwrap(), xml);
    }
}
