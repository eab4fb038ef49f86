//! Kills and faults while a result is replaced.

use super::*;

#[test]
fn killed_while_a_result_is_replaced() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let out = lab.path("out");
    let log = lab.path("steps");
    let begin = || {
        let _ = fs::remove_dir_all(&out);
        convert(&lab.raw, &out, &["--name", "old"]).expect(0);
        fs::write(out.join("notes.txt"), "mine").unwrap();
    };
    let replace = |points: &str| {
        let mut command = command(&lab.raw, &out, &["--name", "new", "--force"]);
        command.env("HYPER2KVM_FAILPOINT", points);
        finish(command)
    };
    for without in ["", "exchange=fail,"] {
        begin();
        replace(&format!("{without}*=record:{}", text(&log))).expect(0);
        whole(&out, "new");
        let steps = fs::read_to_string(&log).unwrap();
        fs::remove_file(&log).unwrap();
        let wanted = [
            "of the output directory",
            "of the replacement",
            "of a kept file",
            "old result",
        ];
        let steps: Vec<&str> = steps
            .lines()
            .filter(|step| wanted.iter().any(|w| step.contains(w)))
            .collect();
        assert!(steps.len() >= 7, "{steps:?}");
        assert_eq!(
            !without.is_empty(),
            steps.iter().any(|s| s.contains("between"))
        );
        for step in steps {
            eprintln!("{without}{step}");
            begin();
            assert_eq!(replace(&format!("{without}{step}=kill")).code, -1);
            if without.is_empty() {
                assert!(out.join("report.json").exists(), "{step}: not in one step");
            }
            // The next run of any verb restores the result's name.
            let run = convert(&lab.raw, &out, &["--name", "new"]).expect(1);
            assert!(run.stderr.contains("out exists"), "{step}: {}", run.stderr);
            let name = match out.join("new.qcow2").exists() {
                true => "new",
                false => "old",
            };
            whole(&out, name);
            assert_eq!(
                fs::read_to_string(out.join("notes.txt")).unwrap(),
                "mine",
                "{step}"
            );
            replace("").expect(0);
            whole(&out, "new");
            assert_eq!(names(lab.dir.path()), ["guest.raw", "out"], "{step}");
            assert_eq!(
                fs::read_to_string(out.join("notes.txt")).unwrap(),
                "mine",
                "{step}"
            );
        }
    }
}

/// The result has its name: later failures undo nothing.
#[test]
fn a_fault_after_the_rename_is_a_warning() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let out = lab.path("out");
    let run = |more: &[&str], points: &str| {
        eprintln!("{more:?} {points}");
        let mut command = command(&lab.raw, &out, more);
        command.env("HYPER2KVM_FAILPOINT", points);
        finish(command)
    };
    let after = "after rename of the output directory #1=fail";
    let in_steps = format!("exchange=fail,{after}");
    for (name, more, points) in [
        ("a", &[][..], after),
        ("b", &["--force"], after),
        ("c", &["--force"], &in_steps),
    ] {
        let run = run(&[&["--name", name], more].concat(), points).expect(0);
        assert!(run.stderr.contains("loss of power"), "{}", run.stderr);
        whole(&out, name);
        assert_eq!(names(lab.dir.path()), ["guest.raw", "out"]);
    }
    // Between the two renames there is no result: the old one gets its name back at once.
    let between = "exchange=fail,between renames of the output directory #1=fail";
    run(&["--name", "d", "--force"], between).expect(1);
    whole(&out, "c");
    assert_eq!(names(lab.dir.path()), ["guest.raw", "out"]);
    // In place: what is under the partial name by then is the journal of another run.
    let before = sha256(&lab.raw);
    run(&["--in-place", "--force"], after).expect(0);
    assert_ne!(sha256(&lab.raw), before);
    h2k(["rollback", text(&out)]).expect(0);
    assert_eq!(sha256(&lab.raw), before);
}

/// The name of a result must not survive a loss of power that its files do not.
#[test]
fn files_are_synced_before_they_get_their_name() {
    if !have(&TOOLS) || Command::new("strace").arg("-V").output().is_err() {
        return;
    }
    let lab = Lab::small();
    let (out, log) = (lab.path("out"), lab.path("log"));
    // To a free name, and over an empty directory.
    for empty in [false, true] {
        if empty {
            fs::remove_dir_all(&out).unwrap();
            fs::create_dir(&out).unwrap();
        }
        let convert = command(&lab.raw, &out, &[]);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-y", "--seccomp-bpf", "-o"]).arg(&log);
        strace.args(["-e", "trace=fsync,fdatasync,renameat,renameat2"]);
        strace.arg(convert.get_program()).args(convert.get_args());
        finish(strace).expect(0);
        let calls = fs::read_to_string(&log).unwrap();
        let end = calls.find("\"out\"").expect("the rename");
        let synced = |name: &str| calls[..end].contains(&format!("/.out.partial/{name}>"));
        for file in report(&out)["files"].as_array().unwrap() {
            let name = file["path"].as_str().unwrap();
            assert!(synced(name), "{name}, empty: {empty}");
        }
        assert!(synced("report.json") && calls[..end].contains("/.out.partial>"));
    }
}

#[test]
fn without_locks_it_is_refused_before_the_start() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::small();
    let out = lab.path("out");
    let run = |points: &str| {
        let mut command = command(&lab.raw, &out, &[]);
        command.env("HYPER2KVM_FAILPOINT", points);
        finish(command)
    };
    let refused = run("flock=fail,record-lock=fail").expect(1);
    assert!(
        refused.stderr.contains("no file locks"),
        "{}",
        refused.stderr
    );
    assert!(!refused.stderr.contains("Inspecting"), "{}", refused.stderr);
    assert!(!out.exists());
    // Some network file systems have record locks only.
    run("flock=fail").expect(0);
    whole(&out, "guest");
    assert!(!names(lab.dir.path()).contains(&".out.partial".to_owned()));
}
