//! The results, for people and for programs: `report.json`, `report.html`, and text.

pub mod html;
pub mod linux;
pub mod look;
pub mod page;
pub mod text;

use serde::{Deserialize, Serialize};

use crate::boot_path::BootPath;
use crate::check::Check;
use crate::fix::journal::ActionState;
use crate::fix::trim::VolumeTrim;
use crate::inspect::Inspection;
use crate::plan::model::{Handover, Plan};
pub use crate::plan::outlook::{Outlook, Outputs};
use crate::types::DiskBus;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Timings {
    pub inspect_s: f64,
    pub fix_s: f64,
    pub copy_s: f64,
    pub total_s: f64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Bytes {
    #[serde(rename = "virtual")]
    pub virtual_size: u64,
    /// Data of the disks, without unneeded ranges.
    pub read: u64,
    /// Bytes that the copies take on this host.
    pub written: u64,
    /// The rest: free, or never written.
    pub skipped: u64,
    /// The part of `read` that an interrupted run had copied (`--resume`).
    pub resumed: u64,
    /// The part of `read` that the copies share with the source (reflinks).
    pub shared: u64,
    /// Bytes that crossed the wire.
    pub fetched: u64,
    /// Bytes that only the source has, for all disks together; 0 if everything was copied.
    pub left: u64,
}

/// The trim of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskTrim {
    #[serde(with = "crate::text::json_path")]
    pub disk: PathBuf,
    pub volumes: Vec<VolumeTrim>,
}

/// The request, by which a later run determines whether a directory equals its own result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The given options by their long names, without the output directory.
    pub options: BTreeMap<String, Vec<String>>,
    /// The files of the source and the drivers at the start. A source that is fixed in place is not
    /// included, because it changes.
    pub inputs: Vec<Input>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Input {
    #[serde(with = "crate::text::json_path")]
    pub path: PathBuf,
    pub size_bytes: u64,
    /// Milliseconds since 1970.
    pub modified_ms: u64,
    /// Determines whether a file under another path is the same one; 0 in reports of older
    /// versions.
    #[serde(default)]
    pub inode: u64,
}

impl Input {
    /// Whether it is the same unchanged file, under any path.
    pub fn is(&self, other: &Self) -> bool {
        let unchanged =
            (self.size_bytes, self.modified_ms) == (other.size_bytes, other.modified_ms);
        let named = self.path == other.path;
        let found = self.inode != 0
            && self.inode == other.inode
            && self.path.file_name() == other.path.file_name();
        unchanged && (named || found)
    }
}

/// A file at the time of the report, so that a later run can detect changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputFile {
    /// Relative to the output directory; absolute after a disk was moved elsewhere.
    #[serde(with = "crate::text::json_path")]
    pub path: PathBuf,
    pub size_bytes: u64,
    /// Nanoseconds since 1970.
    pub modified_ns: i64,
    pub inode: u64,
}

impl OutputFile {
    /// Describes a file; `None` if it is not a regular file.
    pub fn of(path: PathBuf, found: &std::fs::Metadata) -> Option<Self> {
        found.is_file().then(|| Self {
            path,
            size_bytes: found.size(),
            modified_ns: found
                .mtime()
                .saturating_mul(1_000_000_000)
                .saturating_add(found.mtime_nsec()),
            inode: found.ino(),
        })
    }
}

/// The data of one conversion. Serialises to `report.json` and to `convert --json`.
#[derive(Debug, Serialize)]
pub struct Report {
    pub name: String,
    pub engine: &'static str,
    pub engine_why: &'static str,
    /// Whether the verification of the result passed: the requested controllers are ready, and
    /// nothing was accepted that may keep Windows from starting.
    pub ready: bool,
    /// The controllers for which the disk was made ready.
    pub boots_from: Vec<DiskBus>,
    /// The identifiers that `--accept` applied to.
    pub accepted: Vec<String>,
    pub outputs: Outputs,
    /// Everything in the output directory except the report itself.
    pub files: Vec<OutputFile>,
    /// The actions in order, with skipped ones at the end.
    pub actions: Vec<ActionLine>,
    /// After the fix.
    pub controllers: BTreeMap<DiskBus, BootPath>,
    /// Before it.
    pub controllers_before: BTreeMap<DiskBus, BootPath>,
    pub checks: Vec<Check>,
    pub warnings: Vec<String>,
    pub timings: Timings,
    pub bytes: Bytes,
    /// The transport of the source.
    pub transport: &'static str,
    /// The passes of a sync, the last one, and its budget.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sync: Option<serde_json::Value>,
    /// The uncopied and the kept ranges per disk and volume.
    pub trim: Vec<DiskTrim>,
    pub next_commands: Vec<String>,
    pub request: Request,
    pub inspection: Inspection,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ActionLine {
    pub id: String,
    pub state: ActionState,
    pub description: String,
}

/// The document of `plan --json` and `plan.json`.
pub fn plan_document(
    plan: &Plan,
    outlook: Option<&Outlook>,
    inspection: &Inspection,
) -> serde_json::Value {
    let mut body = match &plan.linux {
        Some(handover) => handover_body(plan, handover, inspection),
        None => windows_body(plan, inspection),
    };
    body.insert(
        "controllers".into(),
        serde_json::json!(inspection.controllers),
    );
    if let Some(outlook) = outlook {
        outlook.add_to(&mut body);
    }
    serde_json::Value::Object(body)
}

type Body = serde_json::Map<String, serde_json::Value>;

fn body(value: serde_json::Value) -> Body {
    match value {
        serde_json::Value::Object(body) => body,
        _ => Body::new(),
    }
}

fn windows_body(plan: &Plan, inspection: &Inspection) -> Body {
    let mut document = body(serde_json::json!(plan));
    // Scripts read the same three keys of an action in every document.
    let actions = plan.actions.iter().map(|action| {
        let mut action_body = body(serde_json::json!(action));
        action_body.insert("state".into(), "planned".into());
        action_body.insert("description".into(), action.describe().into());
        serde_json::Value::Object(action_body)
    });
    let actions: Vec<_> = actions.collect();
    document.insert("actions".into(), actions.into());
    document.insert("source".into(), serde_json::json!(inspection.source));
    document.insert("os".into(), serde_json::json!(inspection.os));
    document
}

/// The body of a hand-over, with the keys of every plan.
fn handover_body(plan: &Plan, handover: &Handover, inspection: &Inspection) -> Body {
    let steps = handover.steps.iter().map(|step| ActionLine {
        id: step.id.to_string(),
        state: ActionState::Planned,
        description: step.description.clone(),
    });
    body(serde_json::json!({
        "way": handover.method,
        "way_why": handover.why,
        "actions": steps.collect::<Vec<_>>(),
        "skipped": plan.skipped,
        "drivers": plan.drivers,
        "blockers": plan.blockers,
        "accepted": plan.accepted,
        "ready": plan.ready,
        "warnings": plan.warnings,
        "source": inspection.source,
        "os": inspection.os,
        "linux": inspection.linux,
    }))
}
