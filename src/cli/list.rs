//! Common parts of `convert --batch` and `rehearse --batch`: the list, and the reports beside it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::batch::file::{self, Kind, List, Rules, Section};
use crate::batch::report::save;
use crate::error::{Error, Result};
use crate::files::create_passage;
use crate::ui::document;

use super::options::{NAME, OUTPUT_DIR, Options, SOURCE, Shape};

/// A parsed list.
pub(super) struct ListFile {
    pub file: PathBuf,
    pub list: List,
    /// The directory for the results.
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

    /// The directory to which paths in the list are relative.
    pub fn folder(&self) -> &Path {
        folder_of(&self.file)
    }
}

fn folder_of(file: &Path) -> &Path {
    file.parent().unwrap_or(Path::new("/"))
}

/// The form of an option in a list. Fails if an option for one VM is among the defaults.
pub(super) fn kind(name: &str, shape: &Shape, place: Section, what: &str) -> Result<Kind, String> {
    if place == Section::Defaults && [SOURCE, NAME, OUTPUT_DIR, "mac", "root"].contains(&name) {
        return Err(format!("`{name}` is for one {what}, not for all of them"));
    }
    Ok(match shape {
        s if s.flag => Kind::Flag,
        s if s.repeatable => Kind::Many,
        _ => Kind::One,
    })
}

/// Both formats of the report: `fleet-report.json` and `.html` beside the results of `fleet.yaml`.
pub(super) struct Reports<'a> {
    pub list: &'a ListFile,
    /// The schema of the JSON document.
    pub schema: &'static str,
    /// The common suffix of both names.
    pub ending: &'static str,
    /// The title of the page.
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

    /// Refuses to replace a file of the user; checked at the start and before anything is written.
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

    /// Writes both, and returns the path of the page.
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
