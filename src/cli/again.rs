//! The next command to run: the user's command line with another verb.

use std::ffi::OsString;

use crate::text::{of_path, shell_word};

/// Options that change the display, not the work.
const SHOWN_HOW: [&str; 8] = [
    "--json",
    "--quiet",
    "-q",
    "--verbose",
    "-v",
    "-vv",
    "--dry-run",
    "--evidence",
];

/// The command line of this run with the verb `to` in place of `from`; `None` if it contains a
/// secret, or another verb.
pub fn with_verb(from: &str, to: &str) -> Option<String> {
    rewritten(std::env::args_os().skip(1), from, to)
}

fn rewritten(args: impl Iterator<Item = OsString>, from: &str, to: &str) -> Option<String> {
    let mut line = vec!["hyper2kvm".to_string()];
    let mut verb = false;
    let mut skip_value = false;
    for arg in args {
        let word = of_path(arg.as_ref()).into_owned();
        if std::mem::take(&mut skip_value) {
            continue;
        }
        if !verb && word == from {
            verb = true;
            line.push(to.to_string());
            continue;
        }
        if word.split(':').nth(1) == Some("key") {
            return None;
        }
        let name = word.split('=').next().unwrap_or_default();
        if SHOWN_HOW.contains(&name) {
            skip_value = name == "--evidence" && name == word;
            continue;
        }
        line.push(shell_word(&word));
    }
    verb.then(|| line.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_with_another_verb() {
        let made = |line: &[&str]| rewritten(line.iter().map(OsString::from), "inspect", "plan");
        for (line, want) in [
            (
                &["inspect", "a b.vmdk"][..],
                Some("hyper2kvm plan 'a b.vmdk'"),
            ),
            (
                &["-v", "inspect", "inspect", "--json"],
                Some("hyper2kvm plan inspect"),
            ),
            (
                &["inspect", "--evidence", "/tmp", "x", "--root", r"\Windows"],
                Some(r"hyper2kvm plan x --root '\Windows'"),
            ),
            (
                &["inspect", "--evidence=/tmp", "x"],
                Some("hyper2kvm plan x"),
            ),
            (
                &["inspect", "x", "--key", "all:file:k"],
                Some("hyper2kvm plan x --key all:file:k"),
            ),
            (&["inspect", "x", "--key", "all:key:123"], None),
            (&["inspect", "x", "--key=all:key:123"], None),
            (&["demo", "x"], None),
        ] {
            assert_eq!(made(line).as_deref(), want, "{line:?}");
        }
    }
}
