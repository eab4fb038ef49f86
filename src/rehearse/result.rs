//! The result of a rehearsal: `rehearse --json`, and `rehearsal.json` in the evidence directory.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::batch::report::Failure;
use crate::boot::proof::Proof;
use crate::boot::record::{self, StageRecord};
use crate::error::Error;
use crate::later;

/// The document of a rehearsal in its evidence directory.
pub(crate) const FILE_NAME: &str = "rehearsal.json";
/// The same as an HTML page.
pub(crate) const PAGE: &str = "rehearsal.html";
/// The report of `convert` about the throw-away disk.
pub(crate) const REPORT: &str = "report.json";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// Windows came up on VirtIO.
    Up,
    /// Windows did not come up.
    Down,
    /// The VM was not started: this guest cannot be converted, or must not be started now.
    Refused,
}

impl Verdict {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Refused => "refused",
        }
    }
}

/// The result of one boot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Stage {
    /// `up`, `not-run`, or a failure of `boot`: `timeout`, `reboot-loop`, `panic`, `stopped`, `paused`.
    pub(crate) state: String,
    /// The time from the start of the domain to the marker, or to the failure.
    pub(crate) seconds: f64,
    pub(crate) reboots: u32,
    /// The evidence that Windows was up: `marker`, `agent` or `manual`.
    pub(crate) up_by: Option<String>,
    pub(crate) message: Option<String>,
}

impl Stage {
    pub(crate) fn of(entry: Option<&StageRecord>) -> Self {
        let Some(entry) = entry else {
            return Self::not_run();
        };
        let state = match (&entry.up_by, &entry.failure) {
            (Some(_), _) => "up",
            (None, Some(failure)) => failure,
            (None, None) => "not-run",
        };
        Self {
            state: state.to_owned(),
            seconds: entry.seconds,
            reboots: entry.reboots,
            up_by: entry.up_by.clone(),
            message: entry.message.clone(),
        }
    }

    fn not_run() -> Self {
        Self {
            state: "not-run".to_owned(),
            seconds: 0.0,
            reboots: 0,
            up_by: None,
            message: None,
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.state == "up"
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Stages {
    pub(crate) bootstrap: Stage,
    #[serde(rename = "final")]
    pub(crate) production: Stage,
}

/// A file of the evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Evidence {
    /// `screen`, `com1`, `com2`, `qemu-log`, `domain`, `system-hive`, `setupapi-log` or `report`.
    pub(crate) kind: String,
    /// `bootstrap` or `final`; `None` for the report.
    pub(crate) stage: Option<String>,
    #[serde(with = "crate::text::json_path")]
    pub(crate) path: PathBuf,
}

/// The files of one stage, and their kinds.
const KINDS: [(&str, &str); 8] = [
    ("screen.png", "screen"),
    ("screen", "screen"),
    ("com1.log", "com1"),
    ("com2.log", "com2"),
    ("qemu.log", "qemu-log"),
    ("domain.xml", "domain"),
    ("SYSTEM", "system-hive"),
    ("setupapi.dev.log", "setupapi-log"),
];

/// Lists the evidence in a directory.
pub(crate) fn evidence(folder: &Path) -> Vec<Evidence> {
    let mut found = Vec::new();
    for stage in ["bootstrap", "final"] {
        for (name, kind) in KINDS {
            let path = folder.join(stage).join(name);
            if path.is_file() {
                found.push(Evidence {
                    kind: kind.to_owned(),
                    stage: Some(stage.to_owned()),
                    path,
                });
            }
        }
    }
    let report = folder.join(REPORT);
    if report.is_file() {
        found.push(Evidence {
            kind: "report".to_owned(),
            stage: None,
            path: report,
        });
    }
    found
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Bytes {
    /// Bytes that crossed the wire; 0 if the source is on this host.
    pub(crate) fetched: u64,
    /// The total of all disks.
    #[serde(rename = "virtual")]
    pub(crate) virtual_size: u64,
}

/// A finding of the inspection with a severity above information.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Finding {
    pub(crate) id: String,
    pub(crate) severity: String,
    pub(crate) message: String,
    pub(crate) remedy: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Rehearsal {
    pub(crate) verdict: Verdict,
    pub(crate) name: String,
    #[serde(with = "crate::text::json_path")]
    pub(crate) source: PathBuf,
    /// The name of the rehearsal's domain, which is gone.
    pub(crate) domain: Option<String>,
    /// The SMBIOS UUID that Windows has seen.
    pub(crate) uuid: Option<Uuid>,
    pub(crate) stages: Stages,
    #[serde(with = "crate::text::json_path")]
    pub(crate) evidence_dir: PathBuf,
    pub(crate) evidence: Vec<Evidence>,
    pub(crate) bytes: Bytes,
    pub(crate) transport: Option<String>,
    pub(crate) findings: Vec<Finding>,
    /// The evidence on the disk after the first boot.
    pub(crate) proof: Option<Proof>,
    pub(crate) warnings: Vec<String>,
    /// Recommended next steps.
    pub(crate) next: Vec<String>,
    pub(crate) seconds: f64,
    /// The reason why it was refused, or Windows did not come up.
    pub(crate) error: Option<Failure>,
    /// Things that could not be removed.
    pub(crate) left: Vec<String>,
}

impl Rehearsal {
    pub(crate) fn new(name: &str, source: &Path, evidence_dir: &Path) -> Self {
        Self {
            verdict: Verdict::Refused,
            name: name.to_owned(),
            source: source.to_owned(),
            domain: None,
            uuid: None,
            stages: Stages {
                bootstrap: Stage::not_run(),
                production: Stage::not_run(),
            },
            evidence_dir: evidence_dir.to_owned(),
            evidence: Vec::new(),
            bytes: Bytes::default(),
            transport: None,
            findings: Vec::new(),
            proof: None,
            warnings: Vec::new(),
            next: Vec::new(),
            seconds: 0.0,
            error: None,
            left: Vec::new(),
        }
    }

    /// Adds the conversion's facts about the guest.
    pub(crate) fn converted(&mut self, report: &Value) {
        self.bytes = serde_json::from_value(report["bytes"].clone()).unwrap_or_default();
        self.transport = report["transport"].as_str().map(str::to_owned);
        let findings = report.pointer("/inspection/findings");
        let findings = findings.and_then(Value::as_array).into_iter().flatten();
        let known = findings.filter_map(|f| serde_json::from_value::<Finding>(f.clone()).ok());
        self.findings = known.filter(|f| f.severity != "info").collect();
        let warnings = report["warnings"].as_array().into_iter().flatten();
        let texts = warnings.filter_map(Value::as_str);
        // Its overlays are removed at the end.
        let texts = texts.filter(|text| *text != later::WARNING);
        self.warnings.extend(texts.map(str::to_owned));
    }

    /// Adds the results of the boots.
    pub(crate) fn booted(&mut self, record: &record::Record) {
        self.stages = Stages {
            bootstrap: Stage::of(record.bootstrap.as_ref()),
            production: Stage::of(record.production.as_ref()),
        };
        self.proof.clone_from(&record.proof);
        self.warnings.extend(record.warnings.iter().cloned());
    }

    /// Adds the error.
    pub(crate) fn failed(&mut self, error: &Error) {
        self.error = Some(Failure {
            code: error.kind.code(),
            message: error.message.clone(),
            causes: error.causes(),
            hints: error.hints.clone(),
            blockers: error
                .blockers
                .iter()
                .map(|blocker| serde_json::json!(blocker))
                .collect(),
        });
    }

    /// The most informative picture: that of the last stage that ran.
    pub(crate) fn picture(&self) -> Option<&Path> {
        let mut screens = self.evidence.iter().filter(|e| e.kind == "screen");
        screens.next_back().map(|e| e.path.as_path())
    }

    /// Sets the recommended next steps for the verdict.
    pub(crate) fn advise(&mut self) {
        self.next = match self.verdict {
            Verdict::Up => up(self),
            Verdict::Refused => self.remedies(),
            Verdict::Down => down(self),
        };
    }

    fn remedies(&self) -> Vec<String> {
        let failure = self.error.iter();
        let blockers = failure.clone().flat_map(|f| &f.blockers);
        let remedies = blockers.filter_map(|b| b["remedy"].as_str().map(str::to_owned));
        remedies
            .chain(failure.flat_map(|f| f.hints.iter().cloned()))
            .collect()
    }
}

fn up(rehearsal: &Rehearsal) -> Vec<String> {
    let source = crate::text::quote(&rehearsal.source);
    let name = &rehearsal.name;
    let mut next = vec!["shut the VM down where it runs now, from inside Windows".to_owned()];
    if !rehearsal.stages.production.is_up() {
        next.insert(
            0,
            "rehearse without --stop-after: VirtIO was not tried".to_owned(),
        );
    }
    next.push(format!(
        "with the options of the rehearsal: hyper2kvm convert {source} --copy later -o {name}-kvm"
    ));
    next.push(format!("hyper2kvm boot {name}-kvm"));
    next
}

fn down(rehearsal: &Rehearsal) -> Vec<String> {
    let (stage, failed) = match rehearsal.stages.bootstrap.state.as_str() {
        "up" | "not-run" => ("final", &rehearsal.stages.production),
        _ => ("bootstrap", &rehearsal.stages.bootstrap),
    };
    let screen = rehearsal.evidence_dir.join(stage).join("screen.png");
    let screen = screen.display();
    let mut next = vec![format!("see {screen} and com1.log beside it")];
    next.push(
        match failed.state.as_str() {
            "timeout" => "where Windows was still at work (updates, chkdsk), rehearse with a longer --timeout",
            "reboot-loop" => "see the stop code on the screen; hyper2kvm docs troubleshooting lists what stands behind it",
            "panic" => "find the stop code of the screen in hyper2kvm docs troubleshooting",
            "stopped" => "see in com1.log and qemu.log why the VM went off: Windows shut down, or QEMU ended",
            "paused" => "make room below the evidence directory, or see whether the disk of the source can be read",
            _ => "see the message: both boots did not end as they should",
        }
        .to_owned(),
    );
    next.push("do not move this VM yet: its source is as it was".to_owned());
    next
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A rehearsal for tests.
    pub(crate) fn rehearsal(name: &str, verdict: Verdict) -> Rehearsal {
        Rehearsal {
            verdict,
            ..Rehearsal::new(name, Path::new("/src/vm.vmx"), Path::new("/e"))
        }
    }

    #[test]
    fn states_are_those_of_the_boots() {
        let entry = |up: Option<&str>, failure: Option<&str>| StageRecord {
            up_by: up.map(str::to_owned),
            failure: failure.map(str::to_owned),
            seconds: 3.5,
            ..StageRecord::default()
        };
        for (entry, state) in [
            (None, "not-run"),
            (Some(entry(None, None)), "not-run"),
            (Some(entry(Some("marker"), None)), "up"),
            (Some(entry(None, Some("panic"))), "panic"),
            (Some(entry(None, Some("reboot-loop"))), "reboot-loop"),
        ] {
            let stage = Stage::of(entry.as_ref());
            assert_eq!(stage.state, state);
            assert_eq!(stage.is_up(), state == "up");
        }
    }

    #[test]
    fn what_to_do_names_the_stage_that_failed() {
        let mut seen = rehearsal("vm", Verdict::Down);
        seen.stages.bootstrap.state = "up".into();
        seen.stages.production.state = "timeout".into();
        seen.advise();
        assert!(
            seen.next[0].contains("/e/final/screen.png"),
            "{:?}",
            seen.next
        );
        assert!(seen.next[1].contains("--timeout"));
        seen.stages.bootstrap.state = "panic".into();
        seen.advise();
        assert!(seen.next[0].contains("/e/bootstrap/"));
        seen.verdict = Verdict::Up;
        seen.stages.production.state = "up".into();
        seen.advise();
        assert!(seen.next.iter().any(|n| n.contains("--copy later")));
    }

    #[test]
    fn findings_are_those_that_matter() {
        let mut seen = rehearsal("vm", Verdict::Up);
        let finding = |id: &str, severity: &str| serde_json::json!({"id": id, "severity": severity, "message": "m", "remedy": "r", "evidence": "e"});
        seen.converted(&serde_json::json!({
            "bytes": {"virtual": 7, "read": 1, "fetched": 5}, "transport": "ssh",
            "warnings": ["w"],
            "inspection": {"findings": [finding("a", "info"), finding("b", "warning")]},
        }));
        let ids: Vec<_> = seen.findings.iter().map(|f| f.id.as_str()).collect();
        assert_eq!(ids, ["b"]);
        assert_eq!((seen.bytes.fetched, seen.bytes.virtual_size), (5, 7));
        assert_eq!(seen.transport.as_deref(), Some("ssh"));
        assert_eq!(seen.warnings, ["w"]);
        let text = serde_json::json!(seen);
        assert_eq!(serde_json::from_value::<Rehearsal>(text).unwrap(), seen);
    }
}
