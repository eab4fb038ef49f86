//! The conversion of a rehearsal: `convert --copy later` in a child of this program. It has the
//! restrictions of a conversion; the boots that follow need more rights.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::batch::report::Failure;
use crate::batch::run::{Ended, SELF, listen};
use crate::error::{Blocker, Error, ErrorKind, Result};
use crate::tool::Cmd;
use crate::tool::privileges::Privileges;
use crate::ui::Ui;

#[derive(Debug, Clone)]
pub(crate) struct Conversion {
    pub(crate) source: PathBuf,
    /// The options of `convert`, without directory and source.
    pub(crate) args: Vec<OsString>,
    /// Secrets, which must not appear on a command line.
    pub(crate) env: Vec<(String, String)>,
}

impl Conversion {
    /// Converts to a new directory; returns the report.
    pub(crate) fn run(&self, folder: &Path, ui: &Ui) -> Result<Value> {
        let mut command = Cmd::new(SELF)
            .privileges(Privileges::Ours)
            .args(["convert", "--json", "--progress", "json"])
            .args(&self.args)
            .args(["--copy", "later", "--output-dir"])
            .arg(folder);
        for (name, value) in &self.env {
            command = command.env(name, value);
        }
        let command = command.arg("--").arg(&self.source);
        let ended = listen(command, &mut |event| {
            if let (Some(step), Some(message)) = (event["step"].as_str(), event["message"].as_str())
            {
                ui.status(step, message);
            }
        })?;
        outcome(ended)
    }
}

fn outcome(ended: Ended) -> Result<Value> {
    let Ended {
        status,
        document,
        log,
    } = ended;
    // Accepted problems may keep Windows from starting: the rehearsal shows whether they do.
    let accepted = document["accepted"].is_array() && status.code() == Some(4);
    if (status.success() || accepted) && document["outputs"].is_object() {
        return Ok(document);
    }
    let said: Option<Failure> = serde_json::from_value(document["error"].clone()).ok();
    let Some(said) = said else {
        let message = match status.signal() {
            Some(signal) => format!("the conversion was killed by signal {signal}"),
            None => format!("the conversion ended with {status} and printed nothing"),
        };
        let error = Error::failed(message);
        return Err(match log.last() {
            Some(line) => error.because_of(line),
            None => error,
        });
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let blockers = said.blockers.iter();
    let mut error = Error {
        hints: said.hints.clone(),
        blockers: blockers
            .map(|b| Blocker::new(text(&b["code"]), text(&b["reason"]), text(&b["remedy"])))
            .collect(),
        ..Error::new(ErrorKind::from_code(said.code), said.message)
    };
    if !said.causes.is_empty() {
        error = error.because_of(said.causes.join(": "));
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::process::ExitStatus;

    fn ended(code: i32, document: Value) -> Ended {
        Ended {
            status: ExitStatus::from_raw(code << 8),
            document,
            log: vec!["last words".into()],
        }
    }

    #[test]
    fn how_a_conversion_ended_is_how_the_rehearsal_ends() {
        let report = json!({"outputs": {}, "accepted": ["bcd"]});
        assert!(outcome(ended(0, report.clone())).is_ok());
        assert!(outcome(ended(4, report)).is_ok(), "accepted");
        let refused = json!({"error": {"code": 3, "message": "no", "causes": ["a", "b"], "hints": ["h"],
            "blockers": [{"code": "c", "reason": "r", "remedy": "m"}]}});
        let error = outcome(ended(3, refused)).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Refused);
        assert_eq!(error.blockers, [Blocker::new("c", "r", "m")]);
        assert_eq!(
            (error.causes(), error.hints.len()),
            (vec!["a: b".to_owned()], 1)
        );
        let error = outcome(ended(70, Value::Null)).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Failed);
        assert_eq!(error.causes(), ["last words"]);
        let killed = Ended {
            status: ExitStatus::from_raw(9),
            document: Value::Null,
            log: Vec::new(),
        };
        assert!(outcome(killed).unwrap_err().message.contains("signal 9"));
    }
}
