//! The page of rehearsals: a row for each VM, with the picture of its screen.
//!
//! It is a single file with embedded pictures. A picture that is too large for that is a link.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::report::page::{escape, link};
use crate::text::base64;

use super::batch::{Row, Summary};
use super::result::{Rehearsal, Stage};

/// Distinguishes a page from a file of the user.
pub(crate) const TITLE: &str = "<title>hyper2kvm: rehearsal</title>";
/// The size limit of an embedded picture.
const MAX_PICTURE: u64 = 1 << 20;
const STYLE: &str = "<style>\
    body{font:16px/1.5 system-ui,sans-serif;max-width:90rem;margin:2rem auto;padding:0 1rem}\
    h1,p,td{overflow-wrap:anywhere}table{border-collapse:collapse;width:100%}\
    td,th{border-bottom:1px solid #ccc;padding:.4rem .5rem;text-align:left;vertical-align:top}\
    td:nth-child(n+2):nth-child(-n+4){white-space:nowrap}img{width:16rem;max-width:100%;border:1px solid #ccc}\
    ul{margin:0;padding-left:1.2rem}.down,.failed{color:#a40000}.refused{color:#8a5a00}.up{color:#0a6b2d}\
    @media(max-width:40rem){table,tbody,tr,td{display:block}th{display:none}\
    td{border:0;padding:0}tr{border-bottom:1px solid #ccc;padding:.5rem 0}}\
    @media print{body{margin:0;max-width:none}tr{break-inside:avoid}}\
    @media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}\
    a{color:#8ab4f8}.down,.failed{color:#ff7b72}.refused{color:#e3b341}.up{color:#6fd08c}}\
    </style>";

/// Renders the page for `folder`.
pub(crate) fn page(title: &str, rows: &[Row], folder: &Path) -> String {
    let mut h = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">{TITLE}{STYLE}</head><body>\n\
         <h1>{}</h1>\n<table><tr><th>VM</th><th>verdict</th><th>first boot</th><th>final boot</th>\
         <th>screen</th><th>findings</th><th>what to do</th></tr>\n",
        escape(title)
    );
    let mut rows: Vec<&Row> = rows.iter().collect();
    // Rows that need attention come first.
    rows.sort_by_key(|row| row.urgency());
    for row in rows {
        match &row.rehearsal {
            Some(rehearsal) => rehearsed(&mut h, rehearsal, folder),
            None => failed(&mut h, row),
        }
    }
    h.push_str("</table>\n</body></html>\n");
    h
}

fn rehearsed(h: &mut String, rehearsal: &Rehearsal, folder: &Path) {
    let verdict = rehearsal.verdict.as_str();
    let evidence = escape(&link(&rehearsal.evidence_dir, folder));
    let _ = writeln!(
        h,
        "<tr><td><a href=\"{evidence}/\">{}</a></td><td class=\"{verdict}\">{verdict}</td><td>{}</td><td>{}</td>\
         <td>{}</td><td>{}</td><td>{}</td></tr>",
        escape(&rehearsal.name),
        stage(&rehearsal.stages.bootstrap),
        stage(&rehearsal.stages.production),
        rehearsal
            .picture()
            .map_or_else(String::new, |path| picture(path, folder)),
        list(&found(rehearsal)),
        list(&rehearsal.next),
    );
}

/// Renders a rehearsal that ended with its own error.
fn failed(h: &mut String, row: &Row) {
    let failure = row.failure.iter();
    let why = failure.clone().flat_map(|f| {
        let message = std::iter::once(&f.message);
        message.chain(&f.causes).cloned()
    });
    let hints: Vec<String> = failure.flat_map(|f| f.hints.iter().cloned()).collect();
    let state = row.state();
    let _ = writeln!(
        h,
        "<tr><td>{}</td><td class=\"failed\">{}</td><td></td><td></td><td></td><td>{}</td><td>{}</td></tr>",
        escape(&row.name),
        escape(state),
        list(&why.collect::<Vec<_>>()),
        list(&hints),
    );
}

fn stage(stage: &Stage) -> String {
    match stage.state.as_str() {
        "not-run" => "not run".to_owned(),
        "up" => format!("{:.0} s", stage.seconds),
        state => format!("{} after {:.0} s", escape(state), stage.seconds),
    }
}

/// Lists why it failed, the findings of the inspection, and the warnings.
fn found(rehearsal: &Rehearsal) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(failure) = &rehearsal.error {
        lines.push(failure.message.clone());
        lines.extend(failure.causes.iter().cloned());
        let reasons = failure.blockers.iter().filter_map(|b| b["reason"].as_str());
        lines.extend(reasons.map(str::to_owned));
    }
    let findings = rehearsal.findings.iter();
    lines.extend(findings.map(|f| format!("{}: {}", f.id, f.message)));
    lines.extend(rehearsal.warnings.iter().cloned());
    lines.extend(rehearsal.left.iter().map(|l| format!("left behind: {l}")));
    lines
}

fn list(lines: &[String]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let items: String = lines
        .iter()
        .map(|line| format!("<li>{}</li>", escape(line)))
        .collect();
    format!("<ul>{items}</ul>")
}

fn picture(path: &Path, folder: &Path) -> String {
    let address = escape(&link(path, folder));
    let read = || -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = File::open(path).ok()?;
        file.take(MAX_PICTURE + 1).read_to_end(&mut bytes).ok()?;
        let fits = bytes.len() as u64 <= MAX_PICTURE && bytes.starts_with(b"\x89PNG");
        fits.then_some(bytes)
    };
    let source = read().map_or_else(
        || address.clone(),
        |bytes| format!("data:image/png;base64,{}", base64(&bytes)),
    );
    format!("<a href=\"{address}\"><img alt=\"the screen\" src=\"{source}\"></a>")
}

/// Renders the page of a list.
pub(crate) fn of_list(summary: &Summary, folder: &Path) -> String {
    let title = format!("{} of {} VMs", summary.sentence(), summary.rows.len());
    page(&title, &summary.rows, folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rehearse::result::tests::rehearsal;
    use crate::rehearse::result::{Evidence, Verdict};

    #[test]
    fn a_row_has_verdict_seconds_and_picture() {
        let dir = tempfile::tempdir().unwrap();
        let screen = dir.path().join("vm-rehearsal/final/screen.png");
        std::fs::create_dir_all(screen.parent().unwrap()).unwrap();
        std::fs::write(&screen, b"\x89PNG picture").unwrap();
        let mut good = rehearsal("good<b>", Verdict::Up);
        good.stages.bootstrap.state = "up".into();
        good.stages.bootstrap.seconds = 41.6;
        good.evidence.push(Evidence {
            kind: "screen".into(),
            stage: Some("final".into()),
            path: screen.clone(),
        });
        good.next = vec!["go <on>".into()];
        let mut bad = rehearsal("bad", Verdict::Down);
        bad.stages.bootstrap.state = "reboot-loop".into();
        bad.warnings = vec!["<script>".into()];
        let rows = [Row::of(good), Row::of(bad)];
        let page = page("2 VMs", &rows, dir.path());
        assert!(page.contains(TITLE) && page.contains("good&lt;b&gt;"));
        assert!(page.contains("42 s") && page.contains("reboot-loop after 0 s"));
        assert!(
            page.contains("data:image/png;base64,iVBORyBwaWN0dXJl"),
            "{page}"
        );
        assert!(page.contains("./vm-rehearsal/final/screen.png"));
        assert!(page.contains("go &lt;on&gt;") && !page.contains("<script>"));
        let (down, up) = (page.find("bad").unwrap(), page.find("good").unwrap());
        assert!(down < up, "what failed comes first");
        // Other files are not embedded.
        std::fs::write(&screen, b"<svg onload=x>").unwrap();
        assert!(!super::picture(&screen, dir.path()).contains("data:"));
    }
}
