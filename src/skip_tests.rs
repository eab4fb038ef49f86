//! A skip observed from outside: the test program runs itself.

use std::process::{Command, Output};

use crate::skip::{has_files, skip};

const SKIPS: &str = "HYPER2KVM_TEST_SKIPS";

/// Skipped when the other test runs it.
#[test]
fn one_that_may_be_skipped() {
    if std::env::var_os(SKIPS).is_some() {
        skip("nothing", "on purpose");
    }
}

#[expect(clippy::disallowed_methods, reason = "runs this test program")]
fn run(environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    for name in [
        "HYPER2KVM_SKIP",
        "HYPER2KVM_SKIPS",
        "HYPER2KVM_REQUIRE_TOOLS",
    ] {
        command.env_remove(name);
    }
    command.arg("one_that_may_be_skipped").env(SKIPS, "1");
    command.envs(environment.iter().copied());
    command.output().unwrap()
}

#[test]
fn a_skip_is_shown_and_counted_and_fails_where_tools_are_required() {
    const LINE: &str = "the test skip_tests::one_that_may_be_skipped: on purpose\n";
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("skips");
    let list = ("HYPER2KVM_SKIPS", list.to_str().unwrap());
    let required = ("HYPER2KVM_REQUIRE_TOOLS", "1");

    let out = run(&[list]);
    assert!(out.status.success());
    let shown = String::from_utf8(out.stderr).unwrap();
    assert_eq!(shown, format!("SKIP 1: {LINE}"));

    let out = run(&[list, required]);
    assert!(!out.status.success());
    assert_eq!(std::fs::read_to_string(list.1).unwrap(), LINE);

    let out = run(&[list, required, ("HYPER2KVM_SKIP", "other nothing")]);
    assert!(out.status.success());
    assert_eq!(std::fs::read_to_string(list.1).unwrap(), LINE.repeat(2));
}

#[test]
fn an_empty_directory_is_no_corpus() {
    let folder = tempfile::tempdir().unwrap();
    assert!(!has_files(&folder.path().join("missing")));
    assert!(!has_files(folder.path()));
    std::fs::write(folder.path().join("list.txt"), "").unwrap();
    assert!(has_files(folder.path()));
}
