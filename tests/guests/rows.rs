//! The text for a state is that in the table of findings, and `docs/guests.md` names a test for
//! each.

use hyper2kvm::inspect::Severity;
use hyper2kvm::inspect::findings::{FINDINGS, Text};
use serde_json::Value;

/// Whether `text` is the template with something in each `<part>`.
fn is_filled(template: &str, text: &str) -> bool {
    let Some((before, rest)) = template.split_once('<') else {
        return template == text;
    };
    let (_, after) = rest.split_once('>').unwrap();
    text.strip_prefix(before).is_some_and(|text| {
        (0..=text.len())
            .filter(|at| text.is_char_boundary(*at))
            .any(|at| is_filled(after, &text[at..]))
    })
}

#[track_caller]
pub fn assert_row(id: &str, found: &Value) {
    let is = |row: &&Text| {
        let text = |key: &str| found[key].as_str().unwrap_or_default();
        let severity = serde_json::to_value(row.severity).unwrap();
        // The loader of an entry without a partition of its own may be elsewhere too.
        let severe =
            severity == found["severity"] || (id == "bcd-loader" && found["severity"] == "warning");
        severe && is_filled(row.message, text("message")) && is_filled(row.remedy, text("remedy"))
    };
    let known = FINDINGS
        .iter()
        .filter(|row| row.id == id)
        .any(|row| is(&row));
    assert!(known, "{id} differs from the table: {found:#}");
}

/// The run ended with exit code 3 and this blocker. The remedy is that of the finding, or in the document.
#[track_caller]
pub fn assert_refusal(id: &str, run: &crate::support::Run) {
    assert_eq!(run.code, 3, "{}", run.stderr);
    let error = run.json();
    assert_eq!(error["error"]["code"], 3);
    let blockers = &error["error"]["blockers"];
    let blocker = crate::find(blockers, "code", id);
    let blocker = blocker.unwrap_or_else(|| panic!("{id}: {blockers:#}"));
    if FINDINGS.iter().any(|row| row.id == id) {
        let said = serde_json::json!({
            "severity": Severity::Blocker,
            "message": blocker["reason"],
            "remedy": blocker["remedy"],
        });
        return assert_row(id, &said);
    }
    let remedy = blocker["remedy"].as_str().unwrap();
    let cell = format!("| `{id}` | refused");
    let row = include_str!("../../docs/guests.md")
        .lines()
        .find(|line| line.contains(&cell) && line.contains(remedy));
    assert!(row.is_some(), "{id}: {remedy}");
}

/// Each row names the test that shows it, and every finding is on the page.
#[test]
fn the_document_names_the_tests() {
    let doc = include_str!("../../docs/guests.md");
    let tests = [
        include_str!("agree.rs"),
        include_str!("boot.rs"),
        include_str!("hives.rs"),
        include_str!("old.rs"),
        include_str!("several.rs"),
        include_str!("volumes.rs"),
        include_str!("windows.rs"),
    ];
    let mut rows = 0;
    for line in doc.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let ["", _, id, _, _, test, ""] = cells[..] else {
            continue;
        };
        if matches!(id, "id" | "---") {
            continue;
        }
        let (id, test) = (id.trim_matches('`'), test.trim_matches('`'));
        let (function, mention) = (format!("fn {test}("), format!("\"{id}\""));
        let shown = |file: &&str| file.contains(&function) && file.contains(&mention);
        assert!(tests.iter().any(shown), "{id}: {test}");
        rows += 1;
    }
    assert!(rows > 55, "{rows}");
}

#[test]
fn templates() {
    for (template, text, is) in [
        ("plain", "plain", true),
        ("plain", "plainer", false),
        ("<a> is <b>", "x is y", true),
        ("<a> is <b>", "x was y", false),
        ("closed<; why>", "closed", true),
        ("closed<; why>", "open; no key", false),
    ] {
        assert_eq!(is_filled(template, text), is, "{template} {text}");
    }
}
