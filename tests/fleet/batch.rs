//! `convert --batch`: lists, kills, refusals.

use super::*;

#[test]
fn four_machines_then_again() {
    if !have(&TOOLS) {
        return;
    }
    let fleet = Fleet::new(&["a", "b", "c", "d"]);
    fleet.list(
        "- source: a.raw\n- source: b.raw\n  memory: 8192\n- {source: c.raw, format: raw}\n\
         - source: d.raw\n  name: other\n",
    );
    let digest = sha256(&fleet.path("a.raw"));

    // Looking first: nothing is written.
    let plan = fleet.run(&["--dry-run"]).expect(0).json();
    assert_eq!(states(&plan), ["planned"; 4]);
    assert!(fleet.out().is_empty());

    let run = fleet.run(&["--progress", "json"]).expect(0);
    let report = run.json();
    assert_eq!(report["schema"], "hyper2kvm/batch/1");
    assert_eq!(states(&report), ["converted"; 4]);
    assert_eq!(report["counts"]["converted"], 4);
    assert_eq!(
        fleet.out(),
        [
            "a-kvm",
            "b-kvm",
            "c-kvm",
            "fleet-report.html",
            "fleet-report.json",
            "other-kvm"
        ]
    );
    let saved = fs::read_to_string(fleet.path("out/fleet-report.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&saved).unwrap(), report);
    assert_eq!(sha256(&fleet.path("a.raw")), digest);
    for machine in report["machines"].as_array().unwrap() {
        assert_eq!(machine["ready"], true);
        h2k(["verify", machine["disks"][0].as_str().unwrap()]).expect(0);
    }
    let xml = fs::read_to_string(fleet.path("out/b-kvm/b-final.xml")).unwrap();
    assert!(xml.contains(">8192<") || xml.contains("8388608"), "{xml}");
    assert!(fleet.path("out/c-kvm/c.raw").exists());

    // One progress for all of them.
    let lines: Vec<Value> = run
        .stderr
        .lines()
        .filter(|l| l.contains("hyper2kvm/batch-progress/1"))
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert!(
        lines
            .iter()
            .filter_map(|l| l["running"].as_array())
            .any(|running| running.len() == 2),
        "{}",
        run.stderr
    );
    let (ended, progress): (Vec<_>, Vec<_>) = lines.iter().partition(|l| l["ended"].is_object());
    assert!(progress.iter().all(|l| l["machines"] == 4));
    assert_eq!(ended.len(), 4);
    assert!(ended.iter().all(|l| l["ended"]["state"] == "converted"));

    // Again: everything is there already, and nothing is touched.
    let digest = sha256(&fleet.converted("b"));
    let again = fleet.run(&[]).expect(0).json();
    assert_eq!(states(&again), ["skipped"; 4]);
    assert_eq!(sha256(&fleet.converted("b")), digest);
    // The new report still has what the first run said of each.
    for (now, then) in
        (again["machines"].as_array().unwrap().iter()).zip(report["machines"].as_array().unwrap())
    {
        for key in [
            "ready",
            "disks",
            "bytes_virtual",
            "bytes_written",
            "warnings",
        ] {
            assert_eq!(now[key], then[key], "{key}");
        }
    }
    // The list by another path: the files are the same.
    let link = fleet.path("link");
    std::os::unix::fs::symlink(fleet.dir.path(), &link).unwrap();
    let list = link.join("fleet.yaml");
    let linked = h2k(["convert", "--batch", list.to_str().unwrap(), "--json"]);
    assert_eq!(states(&linked.expect(0).json()), ["skipped"; 4]);

    // What differs from the directory is not skipped and not overwritten, unless asked for.
    fs::write(
        fleet.path("fleet.yaml"),
        fs::read_to_string(fleet.path("fleet.yaml"))
            .unwrap()
            .replace("memory: 8192", "memory: 4096"),
    )
    .unwrap();
    let raw = fs::File::options()
        .write(true)
        .open(fleet.path("a.raw"))
        .unwrap();
    raw.set_modified(std::time::SystemTime::now()).unwrap();
    let differs = fleet.run(&[]).expect(102).json();
    assert_eq!(states(&differs), ["failed", "failed", "skipped", "skipped"]);
    let message = |i: usize| differs["machines"][i]["error"]["message"].as_str().unwrap();
    assert!(
        message(0).contains("a.raw has changed since"),
        "{}",
        message(0)
    );
    assert!(
        message(1).contains("memory: 8192, now 4096"),
        "{}",
        message(1)
    );
    assert_eq!(sha256(&fleet.converted("b")), digest);
    let forced = fleet.run(&["--force"]).expect(0).json();
    assert_eq!(states(&forced), ["converted"; 4]);
    assert_eq!(states(&fleet.run(&[]).expect(0).json()), ["skipped"; 4]);
}

#[test]
fn a_failure_in_the_middle() {
    if !have(&TOOLS) {
        return;
    }
    let fleet = Fleet::new(&["a", "c"]);
    fs::write(fleet.path("b.raw"), vec![7; 1 << 20]).unwrap();
    fleet.names(&["a", "b", "missing", "c"]);
    let run = fleet.run(&[]).expect(102);
    let report = run.json();
    assert_eq!(
        states(&report),
        ["converted", "failed", "failed", "converted"]
    );
    assert_eq!(report["counts"]["failed"], 2);
    let error = |i: usize| &report["machines"][i]["error"];
    assert!(error(1)["message"].is_string() && error(1)["code"].as_u64() > Some(0));
    assert!(
        error(2).to_string().contains("does not exist"),
        "{}",
        error(2)
    );
    assert!(
        run.stderr.contains("2 converted, 2 failed"),
        "{}",
        run.stderr
    );
    let page = fs::read_to_string(fleet.path("out/fleet-report.html")).unwrap();
    assert!(page.contains("2 converted, 2 failed"));
    assert_eq!(
        fleet.out(),
        ["a-kvm", "c-kvm", "fleet-report.html", "fleet-report.json"]
    );

    // One of them by name or position, with the exit code of that machine.
    let only = |which: &str, code: i32| {
        let list = fleet.path("fleet.yaml");
        let line = [
            "convert",
            "--batch",
            list.to_str().unwrap(),
            "--only",
            which,
            "--json",
        ];
        h2k(line).expect(code).json()
    };
    assert_eq!(states(&only("0", 0)), ["skipped"]);
    assert_eq!(states(&only("c", 0)), ["skipped"]);
    assert_eq!(states(&only("b", 3)), ["failed"]);
    only("4", 2);

    // For people: failures first.
    let list = fleet.path("fleet.yaml");
    let text = h2k(["convert", "--batch", list.to_str().unwrap()])
        .expect(102)
        .stdout;
    assert!(text.starts_with("failed"), "{text}");
    assert!(text.contains("skipped"), "{text}");
}

fn without_boot_manager(disk: &Path) {
    let spec = GuestSpec::new(WinVersion::Server2022);
    let esp = VolumeId::new(spec.partition(Role::Esp).unwrap().index);
    let disk = Arc::new(FileDisk::open_rw(disk).unwrap());
    let layout = guest::layout(&spec);
    let mut writer = Box::new(EmbeddedWriter::new(disk, &layout, MountOptions::default()));
    let manager = GuestPath::parse("EFI\\Microsoft\\Boot\\bootmgfw.efi").unwrap();
    writer.remove_file(esp, &manager).unwrap();
    writer.close().unwrap();
}

#[test]
fn what_was_accepted_is_converted_and_counts_as_a_failure() {
    if !have(&TOOLS) {
        return;
    }
    let fleet = Fleet::new(&["good", "bad"]);
    without_boot_manager(&fleet.path("bad.raw"));
    fleet.list("- source: good.raw\n- source: bad.raw\n  accept: no-bootmanager\n");
    let run = fleet.run(&[]).expect(2);
    assert!(
        run.stderr.contains("near it: no-boot-manager"),
        "{}",
        run.stderr
    );
    assert!(fleet.out().is_empty());
    fleet.list("- source: good.raw\n- source: bad.raw\n  accept: no-boot-manager\n");
    for dry_run in [&["--dry-run"][..], &[]] {
        let report = fleet.run(dry_run).expect(101).json();
        let done = if dry_run.is_empty() {
            "converted"
        } else {
            "planned"
        };
        assert_eq!(states(&report), [done, "failed"]);
        let bad = &report["machines"][1];
        assert_eq!(
            (&bad["error"]["code"], &bad["ready"]),
            (&4.into(), &false.into()),
            "{bad:#}"
        );
        let said = bad["error"].to_string();
        assert!(
            said.contains("NOT READY: accepted no-boot-manager"),
            "{said}"
        );
    }
    assert!(fleet.converted("bad").exists());
    // It is not taken for done.
    fleet.run(&[]).expect(101);
}

/// The child has a key of the list in its environment, and so would have every program it starts.
#[test]
fn the_log_shows_no_key_of_a_list() {
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("fleet.yaml");
    fs::write(dir.path().join("no-disk.raw"), vec![0; 1 << 20]).unwrap();
    fs::write(
        &list,
        "machines: [{source: no-disk.raw, key: 'all:key:my-secret-key'}]\n",
    )
    .unwrap();
    let mut command = Command::new(binary());
    command.args(["convert", "-vv", "--batch"]).arg(&list);
    let run = finish(command);
    let log = format!("{}{}", run.stdout, run.stderr);
    assert!(log.contains("starting"), "{log}");
    assert!(log.contains("all:env:HYPER2KVM_BATCH_KEY_0"), "{log}");
    assert!(!log.contains("my-secret-key"), "{log}");
}

#[test]
fn killed_and_resumed() {
    if !have(&TOOLS) {
        return;
    }
    let fleet = Fleet::new(&["a", "b", "c", "d"]);
    fleet.names(&["a", "b", "c", "d"]);
    let mut child = fleet
        .command(&[])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // The first is done and others are under way.
    fleet.wait("first VM", |f| f.out().iter().any(|n| n.ends_with("-kvm")));
    child.kill().unwrap();
    child.wait().unwrap();
    fleet.nobody_left();
    let done: Vec<String> = fleet
        .out()
        .into_iter()
        .filter(|n| n.ends_with("-kvm"))
        .collect();
    assert!(!done.is_empty() && done.len() < 4, "{done:?}");
    let digest = sha256(&fleet.path(&format!("out/{}/report.json", done[0])));

    let report = fleet.run(&[]).expect(0).json();
    let skipped = states(&report).iter().filter(|s| **s == "skipped").count();
    assert_eq!(skipped, done.len(), "{report}");
    assert_eq!(report["counts"]["converted"], 4 - skipped);
    assert_eq!(
        sha256(&fleet.path(&format!("out/{}/report.json", done[0]))),
        digest
    );
    assert_eq!(
        fleet.out(),
        [
            "a-kvm",
            "b-kvm",
            "c-kvm",
            "d-kvm",
            "fleet-report.html",
            "fleet-report.json"
        ]
    );
}

/// `--force` replaces results of this program: neither a file that has the name of the summary, nor a directory
/// with a report of another program.
#[test]
fn force_replaces_no_file_of_the_user() {
    if !have(&TOOLS) {
        return;
    }
    let fleet = Fleet::new(&["a"]);
    fleet.names(&["a"]);
    let out = fleet.path("out");
    fs::create_dir_all(out.join("a-kvm")).unwrap();
    for name in ["fleet-report.json", "fleet-report.html"] {
        let theirs = out.join(name);
        for contents in ["mine", "{\"schema\": \"other/1\"}"] {
            fs::write(&theirs, contents).unwrap();
            let run = fleet.run(&["--force"]).expect(1);
            assert!(run.stderr.contains(name), "{}", run.stderr);
            assert!(run.stderr.contains("move it elsewhere"), "{}", run.stderr);
            assert_eq!(fs::read_to_string(&theirs).unwrap(), contents);
        }
        fs::remove_file(&theirs).unwrap();
    }
    for report in [
        "{\"schema\": \"other/1\"}",
        "{\"schema\": \"hyper2kvm/boot/1\"}",
        "mine",
    ] {
        let theirs = out.join("a-kvm/report.json");
        fs::write(&theirs, report).unwrap();
        let run = fleet.run(&["--force"]).expect(101);
        let said = &run.stdout;
        assert!(said.contains("is not an output directory"), "{said}");
        assert_eq!(fs::read_to_string(&theirs).unwrap(), report);
    }
    assert_eq!(support::names(&out.join("a-kvm")), ["report.json"]);

    // It appears while the VMs are converted.
    fs::remove_dir_all(out.join("a-kvm")).unwrap();
    for name in ["fleet-report.json", "fleet-report.html"] {
        fs::remove_file(out.join(name)).unwrap();
    }
    let mut command = fleet.command(&["--force"]);
    command.env("HYPER2KVM_FAILPOINT", "copied=wait");
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    fleet.wait("a VM under way", |f| {
        f.path("out/.a-kvm.partial/a.qcow2").exists()
    });
    let theirs = out.join("fleet-report.html");
    fs::write(&theirs, "mine").unwrap();
    support::tool("kill", &["-INT", &child.id().to_string()]);
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("was not written by hyper2kvm"), "{stderr}");
    assert_eq!(fs::read_to_string(&theirs).unwrap(), "mine");
}

#[test]
fn interrupted() {
    if !have(&TOOLS) {
        return;
    }
    let fleet = Fleet::new(&["a", "b", "c", "d"]);
    fleet.names(&["a", "b", "c", "d"]);
    let child = fleet
        .command(&[])
        .env("HYPER2KVM_FAILPOINT", "copied=wait")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Two have been copied and wait there.
    fleet.wait("two VMs under way", |f| {
        let disks = ["a", "b"].map(|n| f.path(&format!("out/.{n}-kvm.partial/{n}.qcow2")));
        disks.iter().all(|d| d.exists())
    });
    support::tool("kill", &["-INT", &child.id().to_string()]);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        states(&report),
        ["interrupted", "interrupted", "not-started", "not-started"]
    );
    fleet.nobody_left();
    assert_eq!(fleet.out(), ["fleet-report.html", "fleet-report.json"]);
}

#[test]
fn one_that_crashes_hurts_no_other() {
    if !have(&TOOLS) {
        return;
    }
    let fleet = Fleet::new(&["a", "b"]);
    fleet.names(&["a", "b"]);
    let run = finish({
        let mut command = fleet.command(&[]);
        command.env("HYPER2KVM_FAILPOINT", "copied=kill");
        command
    })
    .expect(102);
    let report = run.json();
    assert_eq!(states(&report), ["failed", "failed"]);
    assert!(run.stdout.contains("killed by signal 9"), "{}", run.stdout);
    fleet.nobody_left();
    fleet.run(&[]).expect(0);
}

#[test]
fn refused_before_anything_starts() {
    let fleet = Fleet::new(&[]);
    for (machines, says) in [
        ("- source: x/vm.raw\n- source: y/vm.raw\n", "same directory"),
        (
            "- {source: a.raw, output-dir: o}\n- {source: b.raw, output-dir: p/../o}\n",
            "same directory",
        ),
        (
            "- {source: a.raw, name: n}\n- {source: b.raw, name: n, output-dir: o}\n",
            "same name",
        ),
        ("- source: a.raw\n  colour: red\n", "line 6 "),
        ("- source: a.raw\n  memory: lots\n", "line 6 "),
        ("- source: a.raw\n  format: raw\n  compress: true\n", "VM 1"),
    ] {
        fleet.list(machines);
        let run = fleet.run(&[]).expect(2);
        assert!(run.stderr.contains(says), "{machines}\n{}", run.stderr);
        assert_eq!(run.json()["schema"], "hyper2kvm/error/1");
        assert!(!fleet.path("out").exists());
    }
    for args in [
        vec!["convert", "--batch", "/no/such/file"],
        vec!["convert", "--batch", "x", "disk.raw"],
        vec!["convert", "disk.raw", "--jobs", "2"],
        vec!["convert", "--batch", "x", "--jobs", "0"],
        vec!["convert", "--batch", "x", "--name", "y"],
    ] {
        h2k(args).expect(2);
    }
}
