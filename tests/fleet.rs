//! Many machines: `convert --batch`, `inspect` of several, evidence for a support case, and what
//! `docs/fleet` says.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // skips must be seen

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hyper2kvm::block::FileDisk;
use hyper2kvm::demo::{ExtraFile, GuestSpec, Place, Role, WinVersion, guest};
use hyper2kvm::guest::ntfs3g::MountOptions;
use hyper2kvm::guest::{EmbeddedWriter, GuestPath, GuestWrite, VolumeId};
use hyper2kvm::tool::host::{self, PackageManager};
use serde_json::Value;
use support::{
    Run, TOOLS, binary, blocks, finish, h2k, have, processes_naming, sha256, virtio_win,
};

/// What a running Windows would have written, and what must never leave it.
const LOGS: [(&str, usize); 7] = [
    (r"Windows\INF\setupapi.dev.log", 3000),
    (r"Windows\INF\setupapi.setup.log", 17 << 20),
    (r"Windows\INF\oem1.pnf", 10),
    (r"Windows\System32\winevt\Logs\System.evtx", 69632),
    (r"Windows\hyper2kvm\firstboot.log", 100),
    (r"Windows\System32\config\SAM", 4096),
    (r"Windows\System32\config\SECURITY", 4096),
];

/// One guest for all tests here; every machine of a list is a copy of it.
fn guest_image() -> &'static Path {
    static GUEST: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    &GUEST
        .get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let raw = dir.path().join("guest.raw");
            let mut spec = GuestSpec::new(WinVersion::Server2022);
            for (path, size) in LOGS {
                spec.extra_files.push(ExtraFile {
                    place: Place::Windows,
                    path: path.into(),
                    contents: (0..size).map(|i| (i % 251) as u8).collect(),
                });
            }
            guest::build(&spec, &raw).unwrap();
            (dir, raw)
        })
        .1
}

/// A directory with guests and a list of them.
struct Fleet {
    dir: tempfile::TempDir,
}

impl Fleet {
    fn new(names: &[&str]) -> Self {
        let fleet = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        for name in names {
            support::tool(
                "cp",
                &[
                    "--sparse=always",
                    guest_image().to_str().unwrap(),
                    fleet.path(&format!("{name}.raw")).to_str().unwrap(),
                ],
            );
        }
        fleet
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes `fleet.yaml` with these machines.
    fn list(&self, machines: &str) {
        let text = format!(
            "defaults:\n  virtio-iso: {}\noutput-dir: out\nmachines:\n{machines}",
            virtio_win().display()
        );
        fs::write(self.path("fleet.yaml"), text).unwrap();
    }

    fn names(&self, names: &[&str]) {
        let lines: String = names
            .iter()
            .map(|n| format!("- source: {n}.raw\n"))
            .collect();
        self.list(&lines);
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command
            .args(["convert", "--batch"])
            .arg(self.path("fleet.yaml"))
            .args(["--json", "--jobs", "2"])
            .args(more);
        command
    }

    fn run(&self, more: &[&str]) -> Run {
        finish(self.command(more))
    }

    /// Names in the output directory, hidden ones included.
    fn out(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path("out")) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn converted(&self, name: &str) -> PathBuf {
        self.path(&format!("out/{name}-kvm/{name}.qcow2"))
    }

    #[track_caller]
    fn wait(&self, what: &str, until: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !until(self) {
            assert!(
                start.elapsed() < Duration::from_secs(100),
                "no {what}: {:?}",
                self.out()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[track_caller]
    fn nobody_left(&self) {
        self.wait("end of the children", |f| {
            processes_naming(f.dir.path()).is_empty()
        });
    }
}

fn states(document: &Value) -> Vec<&str> {
    let machines = document["machines"].as_array().unwrap();
    machines
        .iter()
        .map(|m| m["state"].as_str().unwrap())
        .collect()
}

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
    fleet.wait("first machine", |f| {
        f.out().iter().any(|n| n.ends_with("-kvm"))
    });
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

    // It appears while the machines are converted.
    fs::remove_dir_all(out.join("a-kvm")).unwrap();
    for name in ["fleet-report.json", "fleet-report.html"] {
        fs::remove_file(out.join(name)).unwrap();
    }
    let mut command = fleet.command(&["--force"]);
    command.env("HYPER2KVM_FAILPOINT", "copied=wait");
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    fleet.wait("a machine under way", |f| {
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
    fleet.wait("two machines under way", |f| {
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
        (
            "- source: a.raw\n  format: raw\n  compress: true\n",
            "machine 1",
        ),
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

#[test]
fn a_table_of_machines() {
    if !have(&TOOLS) {
        return;
    }
    let fleet = Fleet::new(&["web", "db"]);
    // A snapshot: its base is not a machine of its own.
    support::tool(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            fleet.path("db.raw").to_str().unwrap(),
            fleet.path("snapshot.qcow2").to_str().unwrap(),
        ],
    );
    fs::write(fleet.path("garbage.vmdk"), vec![1; 4096]).unwrap();
    fs::write(fleet.path("notes.txt"), "x").unwrap();
    let folder = fleet.dir.path().to_str().unwrap();
    let list = h2k(["inspect", folder, "--json"]).expect(101).json();
    assert_eq!(list["schema"], "hyper2kvm/inspect-list/1");
    let rows: Vec<_> = list["machines"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| (r["name"].as_str().unwrap(), r["verdict"].as_str().unwrap()))
        .collect();
    assert_eq!(
        rows,
        [
            ("garbage.vmdk", "error"),
            ("snapshot", "convertible"),
            ("web", "convertible")
        ]
    );
    let web = &list["machines"][2];
    assert_eq!(
        (&web["arch"], &web["firmware"]),
        (&"x86_64".into(), &"uefi".into())
    );
    assert!(list["machines"][0]["error"].is_string());

    // The same document as for one alone.
    let one = h2k(["inspect", fleet.path("web.raw").to_str().unwrap(), "--json"])
        .expect(0)
        .json();
    assert_eq!(one["schema"], "hyper2kvm/inspect/1");
    for key in ["os", "controllers", "findings", "hives"] {
        assert_eq!(one[key], web["inspection"][key], "{key}");
    }

    let text = h2k(["inspect", folder]).expect(101).stdout;
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines[0].starts_with("MACHINE ") && lines[3].starts_with("web "),
        "{text}"
    );
    let column = lines[0].find("VERDICT").unwrap();
    assert!(lines[3][column..].starts_with("convertible"), "{text}");
    assert!(text.contains("1 error"), "{text}");
    assert!(!text.contains('\u{1b}'), "colours into a pipe");

    // One description, or one disk of Hyper-V, hides nothing that lies beside it.
    for name in ["only.vmx", "only.vhdx"] {
        let beside = fleet.path("beside");
        fs::create_dir(&beside).unwrap();
        let disk = |name: &str| {
            let to = beside.join(name);
            let (from, to) = (fleet.path("web.raw"), to.to_str().unwrap().to_string());
            let format = if name.ends_with("vhdx") {
                "vhdx"
            } else {
                "vmdk"
            };
            let from = from.to_str().unwrap();
            support::tool(
                "qemu-img",
                &["convert", "-f", "raw", "-O", format, from, &to],
            );
        };
        disk("other.vmdk");
        if name == "only.vmx" {
            disk("mine.vmdk");
            let text = "displayName = \"only\"\nsata0.present = \"TRUE\"\n\
                        sata0:0.present = \"TRUE\"\nsata0:0.fileName = \"mine.vmdk\"\n";
            fs::write(beside.join(name), text).unwrap();
        } else {
            disk(name);
        }
        let list = h2k(["inspect", beside.to_str().unwrap(), "--json"])
            .expect(0)
            .json();
        let names: Vec<_> = (list["machines"].as_array().unwrap().iter())
            .map(|r| r["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["only", "other"], "{name}");
        fs::remove_dir_all(&beside).unwrap();
    }

    // What a description says of the VM is part of the document; a disk says nothing.
    fs::write(
        fleet.path("web.vmx"),
        "displayName = \"web\"\nmemsize = \"6144\"\nvtpm.present = \"TRUE\"\n\
         sata0.present = \"TRUE\"\nsata0:0.present = \"TRUE\"\nsata0:0.fileName = \"web.vmdk\"\n\
         ethernet0.present = \"TRUE\"\nethernet0.networkName = \"prod\"\n",
    )
    .unwrap();
    let (raw, vmdk) = (fleet.path("web.raw"), fleet.path("web.vmdk"));
    let (raw, vmdk) = (raw.to_str().unwrap(), vmdk.to_str().unwrap());
    support::tool(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "vmdk", raw, vmdk],
    );
    let vmx = fleet.path("web.vmx");
    let machine = h2k(["inspect", vmx.to_str().unwrap(), "--json"])
        .expect(0)
        .json();
    assert_eq!(machine["machine"]["memory_mib"], 6144);
    assert_eq!(machine["machine"]["nics"][0]["network"], "prod");
    assert_eq!(machine["machine"]["tpm"], true);
    assert!(one.get("machine").is_none());
    let text = h2k(["inspect", vmx.to_str().unwrap()]).expect(0).stdout;
    assert!(text.contains("6144 MiB") && text.contains("prod"), "{text}");
    let plan = |more: &[&str]| {
        let (vmx, iso) = (vmx.to_str().unwrap(), support::virtio_win());
        let args = ["plan", vmx, "--virtio-iso", iso.to_str().unwrap()];
        h2k([&args[..], more].concat()).expect(0)
    };
    let planned = plan(&["--json", "--emit", "proxmox"]).json();
    assert_eq!(planned["machine"], machine["machine"]);
    let ends = |value: &Value, end: &str| value.as_str().unwrap().ends_with(end);
    assert!(ends(&planned["outputs"]["disks"][0], "web-kvm/web.qcow2"));
    assert!(ends(
        &planned["outputs"]["emitted"][0],
        "web-kvm/web-proxmox.sh"
    ));
    assert!(planned["estimate"]["seconds_at_most"].as_u64() > Some(1));
    let text = plan(&[]).stdout;
    for part in ["6144 MiB", "prod", "web-final.xml", "Time: at most"] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    fs::remove_file(vmx).unwrap();

    // Several named ones, all good; the most important first when it is one.
    let named = ["web.raw", "snapshot.qcow2"].map(|n| fleet.path(n).to_str().unwrap().to_string());
    h2k(["inspect", &named[0], &named[1]]).expect(0);
    let text = h2k(["inspect", &named[0]]).expect(0).stdout;
    let order = [
        "Windows Server 2022",
        "can be converted",
        "Would it start",
        "Details",
    ];
    let places: Vec<_> = order.iter().map(|w| text.find(w).expect(w)).collect();
    assert!(places.is_sorted(), "{text}");
    h2k(["inspect", &named[0], &named[1], "--root", r"\Windows"]).expect(2);
    fs::create_dir(fleet.path("empty")).unwrap();
    h2k(["inspect", fleet.path("empty").to_str().unwrap()]).expect(1);
}

#[test]
fn colours_on_a_terminal_only() {
    if !have(&TOOLS) || !have(&["script"]) {
        return;
    }
    let fleet = Fleet::new(&["web"]);
    let line = format!("{} inspect {}", binary(), fleet.path("web.raw").display());
    let on_terminal = |no_color: &str| {
        let out = Command::new("script")
            .args(["-qec", &line, "/dev/null"])
            .env("TERM", "xterm")
            .env("NO_COLOR", no_color)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        String::from_utf8(out.stdout).unwrap()
    };
    let colours = on_terminal("");
    assert!(
        colours.contains("\u{1b}[32mcan be converted"),
        "{colours:?}"
    );
    assert!(!on_terminal("1").contains('\u{1b}'));
}

/// What a person at a terminal of 80 columns sees of inspect, plan, convert and verify.
#[test]
fn a_terminal_of_80_columns() {
    if !have(&TOOLS) || !have(&["script"]) {
        return;
    }
    let fleet = Fleet::new(&["web"]);
    let (raw, out) = (fleet.path("web.raw"), fleet.path("shown"));
    let (raw, out) = (raw.to_str().unwrap(), out.to_str().unwrap());
    let iso = support::virtio_win().to_str().unwrap();
    let on_terminal = |arguments: &str| {
        let line = format!("stty cols 80; {} {arguments}", binary());
        let run = Command::new("script")
            .args(["-qec", &line, "/dev/null"])
            .env("TERM", "xterm")
            .env("NO_COLOR", "1")
            .env("HYPER2KVM_VIRTIO_ISO", iso)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8(run.stdout).unwrap().replace('\r', "\n");
        let short = |l: &&str| l.chars().count() > 80 && !l.contains('/');
        assert_eq!(text.lines().find(short), None, "{arguments}");
        text
    };
    let text = on_terminal(&format!("inspect {raw}"));
    assert!(
        text.contains("convert fixes these") && text.contains("not used"),
        "{text}"
    );
    assert!(!text.contains("NOT READY"), "{text}");
    assert!(text.contains(&format!("hyper2kvm plan {raw}")), "{text}");
    let text = on_terminal(&format!("plan {raw} -o {out}"));
    assert!(
        text.contains(&format!("hyper2kvm convert {raw} -o {out}")),
        "{text}"
    );
    let text = on_terminal(&format!("convert {raw} -o {out} --progress none"));
    let place = |what: &str| text.find(what).unwrap_or_else(|| panic!("{what}: {text}"));
    let order = ["READY: ", "Next", "hyper2kvm boot", "Warnings"].map(place);
    assert!(
        order.is_sorted() && !text.contains("files-viostor"),
        "{text}"
    );
    // The whole directory, and what it says besides.
    let text = on_terminal(&format!("verify {out}"));
    assert!(
        text.contains("READY: ") && text.contains("checks passed"),
        "{text}"
    );

    // Into a pipe lines stay whole; quiet runs say what went wrong, or nothing.
    let verbose = h2k([
        "convert",
        raw,
        "--virtio-iso",
        iso,
        "-o",
        out,
        "--force",
        "-v",
    ])
    .expect(0);
    assert!(
        verbose.stdout.contains("files-viostor"),
        "{}",
        verbose.stdout
    );
    assert!(verbose.stdout.lines().any(|l| l.chars().count() > 80));
    let quiet = h2k([
        "convert",
        raw,
        "--virtio-iso",
        iso,
        "-o",
        out,
        "--force",
        "-q",
    ])
    .expect(0);
    assert_eq!(quiet.stdout, "");
    let warned = quiet.stderr.lines().all(|l| l.starts_with("warning: "));
    assert!(
        warned && quiet.stderr.contains("is not signed"),
        "{}",
        quiet.stderr
    );
    assert_eq!(h2k(["verify", out, "-q"]).expect(0).stderr, "");
    let failed = h2k(["verify", raw, "-q"]).expect(4);
    assert_eq!(failed.stdout, "");
    assert!(
        failed.stderr.contains("warning: [boot-path]"),
        "{}",
        failed.stderr
    );
    assert!(
        failed.stderr.contains("convert makes it ready"),
        "{}",
        failed.stderr
    );
}

#[test]
fn evidence_for_a_support_case() {
    if !have(&TOOLS) || !have(&["tar"]) {
        return;
    }
    let fleet = Fleet::new(&["web"]);
    let folder = fleet.path("case");
    let source = fleet.path("web.raw");
    let line = [
        "inspect",
        source.to_str().unwrap(),
        "--evidence",
        folder.to_str().unwrap(),
    ];
    let run = h2k(line).expect(0);
    for word in ["boot key", "SECURITY", "encrypted"] {
        assert!(run.stderr.contains(word), "{word}: {}", run.stderr);
    }
    let archive = folder.join("web-evidence.tar.gz");
    let mode = |path: &Path| {
        use std::os::unix::fs::PermissionsExt;
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    };
    assert_eq!((mode(&archive), mode(&folder)), (0o600, 0o700));

    let out = fleet.path("unpacked");
    fs::create_dir(&out).unwrap();
    support::tool(
        "tar",
        &[
            "-xzf",
            archive.to_str().unwrap(),
            "-C",
            out.to_str().unwrap(),
        ],
    );
    let mut files = Vec::new();
    let mut folders = vec![out.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(
                    path.strip_prefix(&out)
                        .unwrap()
                        .to_str()
                        .unwrap()
                        .to_string(),
                );
            }
        }
    }
    files.sort();
    let has = |end: &str| files.iter().any(|f| f.ends_with(end));
    for end in [
        "WARNING.txt",
        "inspect.json",
        "manifest.json",
        "System32/config/SYSTEM",
        "System32/config/SOFTWARE",
        "EFI/Microsoft/Boot/BCD",
        "INF/setupapi.dev.log",
        "winevt/Logs/System.evtx",
        "Windows/hyper2kvm/firstboot.log",
    ] {
        assert!(has(end), "{end}: {files:#?}");
    }
    // Of a log that is too long, the end.
    let long = fs::read(out.join("partition-3/Windows/INF/setupapi.setup.log"));
    let long = long.unwrap_or_else(|_| panic!("{files:#?}"));
    assert_eq!(long.len(), 16 << 20);
    assert_eq!(long[0], ((1usize << 20) % 251) as u8);
    for end in ["/SAM", "/SECURITY", ".pnf"] {
        assert!(!has(end), "{end}: {files:#?}");
    }
    // The hive is the one of the guest, by another reader.
    let lab_volume = support::Lab {
        dir: tempfile::tempdir().unwrap(),
        spec: GuestSpec::new(WinVersion::Server2022),
        raw: source.clone(),
    };
    let volume = lab_volume.volume(&source);
    let hive = files.iter().find(|f| f.ends_with("config/SYSTEM")).unwrap();
    assert_eq!(
        fs::read(out.join(hive)).unwrap(),
        lab_volume.ntfscat(&volume, "Windows/System32/config/SYSTEM")
    );
    let manifest: Value =
        serde_json::from_slice(&fs::read(out.join("manifest.json")).unwrap()).unwrap();
    let entry = manifest["files"]
        .as_array()
        .unwrap()
        .iter()
        .find(|f| f["name"] == **hive)
        .unwrap();
    assert_eq!(entry["sha256"], *sha256(&out.join(hive)));

    // What is there is not replaced.
    let digest = sha256(&archive);
    h2k(line).expect(1);
    assert_eq!(sha256(&archive), digest);
}

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/fleet")
}

/// Every command of `docs/fleet/README.md` is run: hyper2kvm, sh, xargs and parallel as they are, what
/// needs a cluster or a container engine by a stand-in.
#[test]
fn what_the_documents_show() {
    if !have(&TOOLS) || !have(&["xargs"]) {
        return;
    }
    let text = fs::read_to_string(docs().join("README.md")).unwrap();
    let fleet = Fleet::new(&["guest"]);
    let raw = fleet.path("guest.raw");
    for (format, name) in [
        ("vmdk", "disk.vmdk"),
        ("vhdx", "disk.vhdx"),
        ("vmdk", "vm.vmdk"),
    ] {
        let path = fleet.path(name);
        let to = path.to_str().unwrap();
        support::tool(
            "qemu-img",
            &[
                "convert",
                "-f",
                "raw",
                "-O",
                format,
                raw.to_str().unwrap(),
                to,
            ],
        );
    }
    fs::remove_file(raw).unwrap();
    fs::write(
        fleet.path("vm.vmx"),
        "displayName = \"vm\"\nfirmware = \"efi\"\nsata0.present = \"TRUE\"\n\
         sata0:0.present = \"TRUE\"\nsata0:0.fileName = \"vm.vmdk\"\n",
    )
    .unwrap();
    std::os::unix::fs::symlink(virtio_win(), fleet.path("virtio-win.iso")).unwrap();
    let [(_, list)] = blocks(&text, "yaml").try_into().expect("one list");
    fs::write(fleet.path("fleet.yaml"), &list).unwrap();
    for file in ["slurm.sh", "parallel.sh"] {
        fs::copy(docs().join(file), fleet.path(file)).unwrap();
        support::tool("sh", &["-n", fleet.path(file).to_str().unwrap()]);
    }
    let bin = fleet.path("bin");
    fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink(binary(), bin.join("hyper2kvm")).unwrap();
    for (name, body) in [
        ("podman", ""),
        (
            "kubectl",
            "case \"$*\" in *jsonpath*) echo SuccessCriteriaMet Complete;; esac",
        ),
        ("nomad", ""),
        ("srun", "exec \"$@\""),
        // The tasks of the array, one after the other.
        (
            "sbatch",
            "shift; for i in 0 1 2; do SLURM_ARRAY_TASK_ID=$i sh -e \"$@\" || exit; done",
        ),
    ] {
        let path = bin.join(name);
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        support::tool("chmod", &["+x", path.to_str().unwrap()]);
    }
    let scripts = blocks(&text, "sh");
    assert!(scripts.len() >= 8, "{scripts:?}");
    for (_, script) in scripts {
        let mut command = Command::new("sh");
        let path = std::env::var("PATH").unwrap();
        command
            .args(["-e", "-c", &script])
            .current_dir(fleet.dir.path())
            .env("PATH", format!("{}:{path}", bin.display()));
        let run = finish(command);
        assert_eq!(run.code, 0, "{script}\n{}{}", run.stdout, run.stderr);
    }
    // xargs alone, where parallel is not installed; it is given everything to do.
    fs::remove_dir_all(fleet.path("converted")).unwrap();
    let mut command = Command::new("sh");
    let needed = ["sh", "seq", "xargs", "qemu-img", "qemu-storage-daemon"];
    for name in needed {
        let real = hyper2kvm::tool::find(name).unwrap();
        std::os::unix::fs::symlink(real, bin.join(name)).unwrap();
    }
    command
        .args(["parallel.sh", "fleet.yaml", "3", "2"])
        .current_dir(fleet.dir.path())
        .env("PATH", &bin);
    finish(command).expect(0);
    for name in ["vm", "web01", "web02"] {
        assert!(
            fleet
                .path(&format!("converted/{name}-kvm/report.json"))
                .exists(),
            "{name}"
        );
    }
}

#[test]
fn kubernetes_manifests() {
    let manifest = docs().join("kubernetes.yaml");
    let text = fs::read_to_string(&manifest).unwrap();
    let documents: Vec<Value> = serde_yaml::Deserializer::from_str(&text)
        .map(|d| serde::Deserialize::deserialize(d).unwrap())
        .collect();
    let of = |kind: &str| documents.iter().find(|d| d["kind"] == kind).expect(kind);

    // The restricted profile, and more than that.
    let job = &of("Job")["spec"];
    let pod = &job["template"]["spec"];
    let container = &pod["containers"][0];
    for (value, wanted) in [
        (&job["completionMode"], "Indexed".into()),
        (&pod["securityContext"]["runAsNonRoot"], Value::Bool(true)),
        (
            &pod["securityContext"]["seccompProfile"]["type"],
            "RuntimeDefault".into(),
        ),
        (&pod["automountServiceAccountToken"], Value::Bool(false)),
        (
            &container["terminationMessagePolicy"],
            "FallbackToLogsOnError".into(),
        ),
        (
            &container["securityContext"]["allowPrivilegeEscalation"],
            Value::Bool(false),
        ),
        (
            &container["securityContext"]["readOnlyRootFilesystem"],
            Value::Bool(true),
        ),
        (
            &container["securityContext"]["capabilities"]["drop"][0],
            "ALL".into(),
        ),
    ] {
        assert_eq!(*value, wanted);
    }
    assert!(!text.contains("hostPath") && !text.contains("/dev/"));

    // The list in it is one, with as many machines as there are completions.
    let dir = tempfile::tempdir().unwrap();
    let list = of("ConfigMap")["data"]["fleet.yaml"].as_str().unwrap();
    let path = dir.path().join("fleet.yaml");
    fs::write(&path, list).unwrap();
    let line = [
        "convert",
        "--batch",
        path.to_str().unwrap(),
        "--dry-run",
        "--json",
    ];
    let machines = job["completions"].as_u64().unwrap();
    let report = h2k(line)
        .expect(100 + i32::try_from(machines).unwrap())
        .json();
    assert_eq!(report["counts"]["failed"], machines);

    // By a validator of others, which must find a fault when there is one.
    let installed = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target/kubernetes-validate/bin/kubernetes-validate");
    // `.ci/run` on another machine may have left it without the Python it needs.
    let works = |path: &PathBuf| {
        Command::new(path)
            .arg("--version")
            .output()
            .is_ok_and(|out| out.status.success())
    };
    let installed = Some(installed).filter(works);
    let Some(validator) = installed.or_else(|| hyper2kvm::tool::find("kubernetes-validate")) else {
        return support::skip(
            "kubernetes-validate",
            "no kubernetes-validate (pip install kubernetes-validate)",
        );
    };
    let validate = |version: &str, file: &Path| {
        let mut command = Command::new(&validator);
        command.args(["--strict", "-k", version]).arg(file);
        finish(command)
    };
    for version in ["1.29", "1.37"] {
        let run = validate(version, &manifest);
        assert_eq!(run.code, 0, "{version}: {}{}", run.stdout, run.stderr);
    }
    let wrong = dir.path().join("wrong.yaml");
    fs::write(&wrong, text.replace("runAsNonRoot", "runAsNonRoots")).unwrap();
    assert_ne!(validate("1.37", &wrong).code, 0);
}

/// The image has what the program needs, and nothing that asks for privileges.
#[test]
fn the_container_image() {
    let text = fs::read_to_string(docs().join("Containerfile")).unwrap();
    let steps: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
    let steps = steps.join("\n");
    for tool in host::TOOLS.iter().filter(|t| t.required) {
        // libntfs-3g89 for `ntfs-3g`: the library is enough where nobody makes demonstration guests.
        let package = match tool.name {
            // In the backports that the image takes QEMU from.
            "qemu-storage-daemon" => "qemu-utils",
            _ => tool.package(PackageManager::Apt),
        };
        assert!(steps.contains(package), "{}: {package}", tool.name);
    }
    let user = steps.lines().find_map(|l| l.strip_prefix("USER ")).unwrap();
    let id: u32 = user.split(':').next().unwrap().parse().expect("a number");
    assert_ne!(id, 0);
    let kubernetes = fs::read_to_string(docs().join("kubernetes.yaml")).unwrap();
    assert!(kubernetes.contains(&format!("runAsUser: {id}\n")));
    let cargo =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    let oldest = cargo
        .lines()
        .find_map(|l| l.strip_prefix("rust-version = "))
        .unwrap();
    assert!(
        text.contains(&format!("rust:{}-", oldest.trim_matches('"'))),
        "{oldest}"
    );
}
