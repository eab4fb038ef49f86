//! What `convert --batch` and `rehearse --batch` have in common: the list, and the reports beside it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::batch::file::{self, Kind, List, Place, Rules};
use crate::batch::report::save;
use crate::error::{Error, Result};
use crate::files::create_passage;
use crate::ui::document;

use super::options::{NAME, OUTPUT_DIR, Options, SOURCE, Shape};

/// A list that was read.
pub(super) struct ListFile {
    pub file: PathBuf,
    pub list: List,
    /// Where what is made of it goes.
    pub output: PathBuf,
}

impl ListFile {
    pub fn read(file: Option<&Path>, rules: &impl Rules, given: &Options) -> Result<Self> {
        let file = std::path::absolute(file.unwrap_or(Path::new("")))
            .map_err(|e| Error::usage("the list has no path").because(e))?;
        let text = std::fs::read_to_string(&file)
            .map_err(|e| Error::usage(format!("reading {}", file.display())).because(e))?;
        let list = file::parse(&text, rules).map_err(|e| {
            Error::usage(format!("{} is not understood: {e}", file.display()))
                .hint("hyper2kvm docs fleet describes the format")
        })?;
        let folder = folder_of(&file);
        let output = match (
            given.get(OUTPUT_DIR).and_then(|v| v.first()),
            &list.output_dir,
        ) {
            (Some(given), _) => PathBuf::from(given),
            (None, Some(said)) => folder.join(said),
            (None, None) => folder.to_path_buf(),
        };
        Ok(Self { file, list, output })
    }

    /// Paths in the list count from here.
    pub fn folder(&self) -> &Path {
        folder_of(&self.file)
    }
}

fn folder_of(file: &Path) -> &Path {
    file.parent().unwrap_or(Path::new("/"))
}

/// How an option is given in a list; an error where it is for one VM, and stands among the defaults.
pub(super) fn kind(name: &str, shape: &Shape, place: Place, what: &str) -> Result<Kind, String> {
    if place == Place::Defaults && [SOURCE, NAME, OUTPUT_DIR, "mac", "root"].contains(&name) {
        return Err(format!("`{name}` is for one {what}, not for all of them"));
    }
    Ok(match shape {
        s if s.flag => Kind::Flag,
        s if s.repeatable => Kind::Many,
        _ => Kind::One,
    })
}

/// The two forms of the report: `fleet-report.json` and `.html` beside what was made of `fleet.yaml`.
pub(super) struct Reports<'a> {
    pub list: &'a ListFile,
    /// Of the JSON document.
    pub schema: &'static str,
    /// What the names of both end in.
    pub ending: &'static str,
    /// Of the page.
    pub title: &'static str,
}

impl Reports<'_> {
    fn paths(&self) -> [PathBuf; 2] {
        let stem = self.list.file.file_stem().unwrap_or(OsStr::new("batch"));
        let stem = stem.to_string_lossy();
        ["json", "html"].map(|kind| {
            let name = format!("{stem}-{}.{kind}", self.ending);
            self.list.output.join(name)
        })
    }

    /// Refuses to replace a file of the user; looked at before the start and before anything is written.
    pub fn refuse_taken(&self) -> Result<()> {
        let written_here = |path: &Path| {
            let plain = path.symlink_metadata().is_ok_and(|m| m.is_file());
            let text = plain.then(|| std::fs::read_to_string(path).ok()).flatten();
            text.is_some_and(|text| {
                let document = serde_json::from_str::<Value>(&text);
                let schema = format!("hyper2kvm/{}/1", self.schema);
                document.is_ok_and(|d| d["schema"] == schema) || text.contains(self.title)
            })
        };
        let paths = self.paths();
        let taken = paths
            .iter()
            .find(|path| path.symlink_metadata().is_ok() && !written_here(path));
        match taken {
            Some(path) => Err(Error::failed(format!(
                "{} was not written by hyper2kvm and would be replaced by the report",
                path.display()
            ))
            .hint("move it elsewhere, or give the list another name")),
            None => Ok(()),
        }
    }

    /// Writes both, and gives the path of the page.
    pub fn save(&self, body: Value, text: &str) -> Result<PathBuf> {
        let [json, page] = self.paths();
        let failed =
            |e: std::io::Error| Error::failed(format!("writing {}", json.display())).because(e);
        self.refuse_taken()?;
        create_passage(&self.list.output).map_err(failed)?;
        let document = document(self.schema, body);
        save(&json, &format!("{document:#}\n")).map_err(failed)?;
        save(&page, text).map_err(failed)?;
        Ok(page)
    }
}
