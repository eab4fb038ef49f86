//! `hyper2kvm docs [TOPIC]`: the pages of `docs/`, built in, so that pages named in hints are
//! available wherever the program is.

use crate::error::{Error, Result};
use crate::ui::{Styled, Tone, Ui};

#[derive(Debug, clap::Args)]
pub struct DocsArgs {
    /// Page to print, e.g. troubleshooting; without it the pages are listed
    topic: Option<String>,
}

macro_rules! pages {
    ($($topic:literal: $file:literal,)*) => {
        /// Each topic with its page.
        pub const PAGES: &[(&str, &str)] = &[$(($topic, include_str!(concat!("../../", $file)))),*];
    };
}

pages! {
    "readme": "README.md",
    "runbook": "docs/runbook.md",
    "troubleshooting": "docs/troubleshooting.md",
    "cli": "docs/cli.md",
    "boot-path": "docs/boot-path.md",
    "guests": "docs/guests.md",
    "linux": "docs/linux.md",
    "drivers": "docs/drivers.md",
    "machines": "docs/machines.md",
    "first-boot": "docs/first-boot.md",
    "boot": "docs/boot.md",
    "rehearsal": "docs/rehearsal.md",
    "later": "docs/later.md",
    "warm": "docs/warm.md",
    "wire": "docs/wire.md",
    "fleet": "docs/fleet/README.md",
    "engines": "docs/engines.md",
    "reliability": "docs/reliability.md",
    "security": "docs/security.md",
    "performance": "docs/performance.md",
    "architecture": "docs/architecture.md",
    "contributing": "docs/contributing.md",
    "glossary": "docs/glossary.md",
    "releasing": "docs/releasing.md",
    "changelog": "docs/changelog.md",
}

pub fn run(args: &DocsArgs, ui: &Ui) -> Result<()> {
    let Some(topic) = &args.topic else {
        let mut text = Styled::default();
        for (topic, page) in PAGES {
            text.row(topic, title(page));
        }
        text.push(Tone::Plain, "\nhyper2kvm docs TOPIC prints a page\n");
        ui.styled(&text);
        return Ok(());
    };
    let page = page(topic).ok_or_else(|| {
        let topics: Vec<&str> = PAGES.iter().map(|(topic, _)| *topic).collect();
        Error::usage(format!("there is no page {topic:?}"))
            .hint(format!("the topics: {}", topics.join(", ")))
    })?;
    ui.raw(page);
    Ok(())
}

/// Finds a page by its topic or file name.
fn page(topic: &str) -> Option<&'static str> {
    let wanted = topic.to_lowercase();
    let name = wanted.trim_start_matches("docs/").trim_end_matches(".md");
    let name = name.trim_end_matches("/readme");
    let found = PAGES.iter().find(|(topic, _)| *topic == name);
    found.map(|(_, page)| *page)
}

fn title(page: &str) -> &str {
    let first = page.lines().find(|l| l.starts_with("# "));
    first.unwrap_or_default().trim_start_matches("# ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_has_a_topic_and_a_title() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        for entry in std::fs::read_dir(root.join("docs")).unwrap().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|e| e == "md") {
                let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
                assert!(page(&name).is_some(), "hyper2kvm docs {name}");
            }
        }
        for (topic, text) in PAGES {
            assert!(!title(text).is_empty(), "{topic}");
        }
    }

    #[test]
    fn a_page_by_any_name() {
        for name in ["guests", "docs/guests.md", "Guests", "guests.md"] {
            assert!(page(name).unwrap().contains("# Guests"), "{name}");
        }
        assert!(page("docs/fleet/README.md").unwrap().contains("# Many VMs"));
        assert!(page("README.md").unwrap().contains("# hyper2kvm"));
        assert_eq!(page("nothing"), None);
    }

    /// Everything that the program refers to is available to a user who has only the program.
    #[test]
    fn hints_name_topics_not_files() {
        let mut left = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
        let mut topics = 0;
        while let Some(folder) = left.pop() {
            for entry in std::fs::read_dir(folder).unwrap().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    left.push(path);
                    continue;
                }
                let text = std::fs::read_to_string(&path).unwrap();
                for line in text.lines().map(str::trim) {
                    let shown = line.contains("hint(") || line.starts_with('"');
                    let named = shown && line.contains("docs/") && line.contains(".md");
                    let tables = path.ends_with("cli/docs.rs") || line.contains("join(");
                    assert!(!named || tables, "{}: {line}", path.display());
                    for (_, rest) in line
                        .match_indices("hyper2kvm docs ")
                        .map(|(at, m)| (at, &line[at + m.len()..]))
                    {
                        let name = rest
                            .split(|c: char| !c.is_alphanumeric() && c != '-')
                            .next();
                        let name = name.unwrap_or_default();
                        if !line.starts_with("//") && name != "TOPIC" && !name.is_empty() {
                            topics += 1;
                            assert!(page(name).is_some(), "{}: {line}", path.display());
                        }
                    }
                }
            }
        }
        assert!(topics > 5, "{topics}");
    }
}
