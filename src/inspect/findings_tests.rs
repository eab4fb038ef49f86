use super::*;
use crate::ids::{IDS, Kind};
use std::path::Path;

fn page() -> (std::path::PathBuf, String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/guests.md");
    let text = std::fs::read_to_string(&path).unwrap();
    (path, text)
}

fn word(severity: Severity) -> &'static str {
    match severity {
        Severity::Blocker => "blocker",
        Severity::Warning => "warning",
        Severity::Info => "info",
    }
}

/// `HYPER2KVM_UPDATE=1` writes the list.
#[test]
fn the_page_lists_every_finding() {
    const BEGIN: &str = "<!-- findings -->\n";
    const END: &str = "<!-- /findings -->";
    let (path, text) = page();
    let cell = |text: &str| text.replace(['<', '>'], "*");
    let mut list = String::from("| id | severity | message | remedy |\n|---|---|---|---|\n");
    for row in FINDINGS {
        let (severity, message) = (word(row.severity), cell(row.message));
        let remedy = cell(row.remedy);
        list += &format!("| `{}` | {severity} | {message} | {remedy} |\n", row.id);
    }
    let (head, rest) = text.split_once(BEGIN).unwrap();
    let (found, tail) = rest.split_once(END).unwrap();
    if std::env::var_os("HYPER2KVM_UPDATE").is_some() {
        std::fs::write(&path, format!("{head}{BEGIN}{list}{END}{tail}")).unwrap();
        return;
    }
    assert!(
        found == list,
        "HYPER2KVM_UPDATE=1 writes the list of {path:?}"
    );
}

#[test]
fn the_table_has_the_identifiers_of_findings_in_their_order() {
    let mut rows: Vec<&str> = FINDINGS.iter().map(|row| row.id).collect();
    rows.dedup();
    let of_ids: Vec<&str> = IDS
        .iter()
        .filter(|id| matches!(id.kind, Kind::Finding | Kind::FindingAndCheck))
        .map(|id| id.id)
        .collect();
    assert_eq!(rows, of_ids);
}

#[test]
fn every_text_names_a_remedy_and_fits_into_a_table() {
    for row in FINDINGS {
        for text in [row.message, row.remedy] {
            assert!(!text.is_empty(), "{}", row.id);
            assert!(!text.ends_with('.'), "{}: {text}", row.id);
            assert!(!text.contains(['|', '*', '\n']), "{}: {text}", row.id);
            let count = |c| text.matches(c).count();
            assert_eq!(count('<'), count('>'), "{}: {text}", row.id);
        }
    }
}

/// The actions in the handwritten tables above the list agree with the severities.
#[test]
fn the_page_agrees_with_the_severities() {
    let (_, text) = page();
    let mut seen = 0;
    for line in text.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let ["", _, id, what, _, _, ""] = cells[..] else {
            continue;
        };
        if matches!(id, "id" | "---") {
            continue;
        }
        let id = id.trim_matches('`');
        let severity = match what.split(|c: char| !c.is_alphabetic()).next() {
            Some("refused") => Severity::Blocker,
            Some("warned") => Severity::Warning,
            Some("told") => Severity::Info,
            other => panic!("{id}: {other:?}"),
        };
        let mut rows = FINDINGS.iter().filter(|row| row.id == id);
        match crate::ids::find(id).map(|id| id.kind) {
            Some(Kind::Blocker) => assert_eq!(severity, Severity::Blocker, "{id}"),
            Some(_) => assert!(rows.any(|row| row.severity == severity), "{id}"),
            None => panic!("{id} is not in IDS"),
        }
        seen += 1;
    }
    assert!(seen > 55, "{seen}");
}

#[test]
fn parts_are_filled_in_in_their_order() {
    let text = Text {
        id: "x",
        severity: Severity::Info,
        message: "<a> and <b>: done",
        remedy: "look at <c>",
    };
    let found = text.found_with(&[&1, &"two", &3], "here");
    assert_eq!(found.message, "1 and two: done");
    assert_eq!(found.remedy, "look at 3");
    assert_eq!(found.evidence, "here");
}

/// Names in a guest can contain a `<`: inserted parts are not scanned again.
#[test]
fn a_part_is_not_a_place() {
    let text = Text {
        id: "x",
        severity: Severity::Info,
        message: "<a> is gone",
        remedy: "none",
    };
    assert_eq!(text.found_with(&[&"<b>"], "").message, "<b> is gone");
}

#[test]
#[should_panic(expected = "parts without a place")]
fn a_part_too_many_is_noticed() {
    let text = FINDINGS[0];
    let _ = text.found_with(&[&"more"], "");
}
