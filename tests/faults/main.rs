//! The fault matrix: runs that die before or after every action, every program and every rename; tools
//! and the NTFS writer that misbehave; input made to hurt. Whatever happens, the source is what it was
//! or can be made so again, nothing half done looks whole, and the next run succeeds.
//!
//! The table of steps in `docs/reliability.md` is made here: `HYPER2KVM_UPDATE=1 cargo test --test
//! faults` writes it, a run without compares.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

#[path = "../support/mod.rs"]
mod support;

mod bombs;
mod hostile;
mod images;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use hyper2kvm::demo::{Firmware, GuestSpec, WinVersion};
use support::{
    Lab, TOOLS, binary, finish, h2k, have, names, processes_naming, sha256, text, virtio_win,
};

fn spec() -> GuestSpec {
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = 512 << 20;
    spec.recovery = false;
    spec.firmware = Firmware::Bios;
    spec
}

fn command(lab: &Lab, more: &[&str], point: &str) -> Command {
    let mut command = Command::new(binary());
    command
        .arg("convert")
        .arg(&lab.raw)
        .arg("--virtio-iso")
        .arg(virtio_win())
        .arg("-o")
        .arg(lab.path("out"))
        .args(more)
        .env("TMPDIR", lab.path("tmp"))
        .env("HYPER2KVM_FAILPOINT", point);
    let _ = fs::create_dir(lab.path("tmp"));
    command
}

/// Children are killed by the kernel when their parent is, which takes a moment.
fn no_process_left(lab: &Lab) {
    let start = Instant::now();
    loop {
        let left = processes_naming(lab.dir.path());
        if left.is_empty() {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{left:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The steps of a run, in their order.
fn steps(lab: &Lab, more: &[&str]) -> Vec<String> {
    let log = lab.path("steps");
    finish(command(lab, more, &format!("*=record:{}", text(&log)))).expect(0);
    let steps = fs::read_to_string(&log).unwrap();
    fs::remove_file(&log).unwrap();
    let steps: Vec<String> = steps.lines().map(String::from).collect();
    // The journal is renamed twice per action: of those many every fifth, between the others.
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for step in &steps {
        *seen.entry(kind(step).to_owned()).or_default() += 1;
    }
    let few = |step: &&String| {
        let number: usize = step.rsplit_once('#').unwrap().1.parse().unwrap();
        seen[kind(step)] <= 12 || number == 1 || number.is_multiple_of(5)
    };
    steps.iter().filter(few).cloned().collect()
}

/// `before qemu-img info #2` is a step of the kind `qemu-img info`.
fn kind(step: &str) -> &str {
    let (_, kind) = step.split_once(' ').unwrap();
    kind.rsplit_once(" #").unwrap().0
}

/// What was seen after the kills of one kind of step.
#[derive(Default)]
struct Row {
    kills: usize,
    outcomes: std::collections::BTreeSet<&'static str>,
}

#[test]
fn killed_at_every_step() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec());
    let source = sha256(&lab.raw);
    let out = lab.path("out");
    let partial = lab.path(".out.partial");
    let mut rows: BTreeMap<(u8, String), Row> = BTreeMap::new();
    let mut note = |mode: u8, step: &str, outcome: &'static str| {
        let row = rows.entry((mode, kind(step).to_owned())).or_default();
        row.kills += 1;
        row.outcomes.insert(outcome);
    };

    let all = steps(&lab, &[]);
    assert!(all.len() > 30, "{all:?}");
    for kind in ["qemu-img", "__hive", "__ntfs", "action", "rename"] {
        assert!(all.iter().any(|s| s.contains(kind)), "{kind}: {all:?}");
    }
    fs::remove_dir_all(&out).unwrap();
    for step in &all {
        // The run before was killed too: that this one comes as far as its step shows that what the
        // other one left is no obstacle.
        let run = finish(command(&lab, &[], &format!("{step}=kill")));
        assert_eq!(run.code, -1, "{step}: {}", run.stderr);
        no_process_left(&lab);
        assert_eq!(sha256(&lab.raw), source, "{step}");
        if out.exists() {
            // Only when all of it was there.
            assert_eq!(step, "after rename of the output directory #1");
            h2k(["verify", text(&out.join("guest.qcow2"))]).expect(0);
            fs::remove_dir_all(&out).unwrap();
            note(0, step, "whole");
            continue;
        }
        note(
            0,
            step,
            if partial.exists() {
                "partial"
            } else {
                "nothing"
            },
        );
    }
    finish(command(&lab, &[], "")).expect(0);
    assert!(!partial.exists());
    assert_eq!(names(&lab.path("tmp")), [""; 0]);
    fs::remove_dir_all(&out).unwrap();

    // In place only what comes after the overlay is new.
    let all = steps(&lab, &["--in-place"]);
    h2k(["rollback", text(&out)]).expect(0);
    assert_eq!(sha256(&lab.raw), source);
    fs::remove_dir_all(&out).unwrap();
    let last = all
        .iter()
        .rposition(|s| kind(s).starts_with("action"))
        .unwrap();
    for step in &all[last..] {
        let run = finish(command(&lab, &["--in-place"], &format!("{step}=kill")));
        assert_eq!(run.code, -1, "{step}: {}", run.stderr);
        no_process_left(&lab);
        let folder = match out.exists() {
            true => &out,
            false => &partial,
        };
        if sha256(&lab.raw) == source {
            note(1, step, "untouched");
        } else {
            h2k(["rollback", text(folder)]).expect(0);
            assert_eq!(sha256(&lab.raw), source, "{step}");
            note(1, step, "rolled back");
        }
        let _ = fs::remove_dir_all(folder);
    }
    finish(command(&lab, &["--in-place"], "")).expect(0);
    h2k(["rollback", text(&out)]).expect(0);
    assert_eq!(sha256(&lab.raw), source);
    compare_table(&rows);
}

fn compare_table(rows: &BTreeMap<(u8, String), Row>) {
    const START: &str = "<!-- steps: generated by tests/faults/main.rs -->\n";
    const END: &str = "<!-- steps: end -->\n";
    let mut table =
        String::from("| killed before and after | kills | left behind |\n|---|---|---|\n");
    for ((mode, kind), row) in rows {
        let outcomes: Vec<_> = row.outcomes.iter().copied().collect();
        let meaning = outcomes.iter().map(|o| match *o {
            "nothing" => "nothing",
            "partial" => "a partial directory, removed by the next run",
            "whole" => "the whole result",
            "untouched" => "the disk as it was",
            _ => "a changed disk; `rollback` restores it byte for byte",
        });
        let meaning = meaning.collect::<Vec<_>>().join("; or ");
        let place = ["", " (`--in-place`)"][usize::from(*mode)];
        table += &format!("| {kind}{place} | {} | {meaning} |\n", row.kills);
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reliability.md");
    let page = fs::read_to_string(&file).unwrap();
    let (before, rest) = page.split_once(START).unwrap();
    let (old, after) = rest.split_once(END).unwrap();
    if std::env::var_os("HYPER2KVM_UPDATE").is_some() {
        fs::write(&file, format!("{before}{START}{table}{END}{after}")).unwrap();
        return;
    }
    // How often a tool is called depends on what else is installed.
    let facts = |table: &str| {
        let rows = table.lines().skip(2).map(|row| {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            (cells[1].to_owned(), cells[3].to_owned())
        });
        rows.collect::<Vec<_>>()
    };
    assert_eq!(
        facts(old),
        facts(&table),
        "HYPER2KVM_UPDATE=1 updates the table"
    );
}

#[test]
fn the_ntfs_writer_misbehaves() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec());
    let source = sha256(&lab.raw);
    for (action, says) in [
        ("abort", "writer crashed (signal 6)"),
        ("hang", "writer hung and was killed"),
        ("escape", "all 10 ways out are closed"),
        // It may not even send itself a signal.
        ("kill", "Operation not permitted"),
    ] {
        eprintln!("{action}");
        let point = format!("ntfs-child={action}");
        for more in [&[][..], &["--in-place"]] {
            if action == "hang" && !more.is_empty() {
                continue;
            }
            let run = finish(command(&lab, more, &point));
            assert!(run.stderr.contains(says), "{}", run.stderr);
            assert!([1, 3].contains(&run.code), "{} {}", run.code, run.stderr);
            assert_eq!(sha256(&lab.raw), source);
            assert!(!lab.path("out").exists() && !lab.path(".out.partial").exists());
            no_process_left(&lab);
        }
    }
    finish(command(&lab, &[], "")).expect(0);
}

#[test]
fn the_hive_editor_misbehaves() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec());
    let source = sha256(&lab.raw);
    for (action, says) in [
        ("abort", "hive editor crashed (signal 6)"),
        ("hang", "hive editor hung and was killed"),
        ("starve", "Cannot allocate memory"),
        ("escape", "all 10 ways out are closed"),
        // It may not even send itself a signal.
        ("kill", "Operation not permitted"),
    ] {
        eprintln!("{action}");
        for more in [&[][..], &["--in-place"]] {
            if action == "hang" && !more.is_empty() {
                continue;
            }
            let mut command = command(&lab, more, &format!("hive-child={action}"));
            command.env("HYPER2KVM_TOOL_SILENCE", "3");
            let run = finish(command).expect(1);
            assert!(run.stderr.contains(says), "{}", run.stderr);
            assert_eq!(sha256(&lab.raw), source);
            assert!(!lab.path("out").exists() && !lab.path(".out.partial").exists());
            no_process_left(&lab);
        }
    }
    finish(command(&lab, &[], "")).expect(0);
}

/// A directory with the test's programs, which come before the real ones.
fn fake(lab: &Lab, name: &str, script: &str) -> String {
    let bin = lab.path("fake").join("bin");
    let _ = fs::remove_dir_all(&bin);
    fs::create_dir_all(&bin).unwrap();
    let file = bin.join(name);
    let real = hyper2kvm::tool::find(name).unwrap();
    let script = script.replace("REAL", text(&real));
    fs::write(&file, format!("#!/bin/bash\n{script}\n")).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    format!(
        "{}:{}",
        text(&bin),
        std::env::var("PATH").unwrap_or_default()
    )
}

#[test]
fn tools_misbehave() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec()).in_qcow2();
    let source = sha256(&lab.raw);
    let tools = ["qemu-img", "qemu-storage-daemon"];
    let faults = [
        ("exits with 1", "echo no luck >&2; exit 1"),
        ("prints garbage", "head -c 5000 /dev/urandom; exit 0"),
        ("is killed", "kill -9 $$"),
        ("hangs", "exec sleep 1000"),
        (
            "is an old version",
            "echo \"$(basename \"$0\"): invalid option -- 'x'\" >&2; exit 1",
        ),
    ];
    for tool in tools {
        for (fault, script) in faults {
            eprintln!("{tool} {fault}");
            let path = fake(&lab, tool, script);
            let started = Instant::now();
            let mut command = command(&lab, &[], "");
            command
                .env("PATH", &path)
                .env("HYPER2KVM_TOOL_SILENCE", "3");
            let run = finish(command);
            assert!(matches!(run.code, 1 | 5), "{} {}", run.code, run.stderr);
            assert!(run.stderr.contains("error:"), "{}", run.stderr);
            assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
            assert!(started.elapsed() < Duration::from_secs(60));
            assert_eq!(sha256(&lab.raw), source);
            assert!(!lab.path("out").exists() && !lab.path(".out.partial").exists());
            no_process_left(&lab);
        }
    }
    finish(command(&lab, &[], "")).expect(0);
}

/// The storage daemon with errors injected by QEMU's own means, and one that dies in the middle.
#[test]
fn the_disk_misbehaves() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec()).in_qcow2();
    let source = sha256(&lab.raw);
    let out = lab.path("out");
    // Puts blkdebug over the image file or the overlay.
    let debug = |node: &str, event: &str, errno: u32| {
        let inject = format!(
            "{{\"driver\":\"blkdebug\",\"inject-error\":[{{\"event\":\"{event}\",\"errno\":{errno},\"once\":false}}],\"image\":{{\"driver\":\"file\""
        );
        format!(
            "args=(); for a in \"$@\"; do case $a in *{node}*) \
             a=$(sed -E 's#\\{{([^{{}}]*\"driver\":\"file\"[^{{}}]*{node}[^{{}}]*)\\}}#{inject_head}\\1}}}}#' <<<\"$a\");; \
             esac; args+=(\"$a\"); done; exec REAL \"${{args[@]}}\"",
            inject_head = inject.replace(",\"image\":{\"driver\":\"file\"", ",\"image\":{"),
        )
    };
    for (what, node, event, errno) in [
        ("the source cannot be read", "/proc/self/fd/", "read_aio", 5),
        ("the overlay cannot be written", "overlay", "write_aio", 5),
        ("the overlay has no space", "overlay", "write_aio", 28),
    ] {
        eprintln!("{what}");
        let path = fake(&lab, "qemu-storage-daemon", &debug(node, event, errno));
        let mut command = command(&lab, &[], "");
        command.env("PATH", &path);
        let run = finish(command).expect(1);
        let reason = match errno {
            5 => "Input/output error",
            _ => "No space left",
        };
        assert!(run.stderr.contains(reason), "{}", run.stderr);
        assert_eq!(sha256(&lab.raw), source);
        assert!(!out.exists() && !lab.path(".out.partial").exists());
    }
    // It dies while the overlay is written: nothing has happened.
    let run = finish(command(&lab, &[], "file-written=orphan")).expect(1);
    assert!(run.stderr.contains("error:"), "{}", run.stderr);
    assert!(!out.exists() && !lab.path(".out.partial").exists());
    // It dies while the disk itself is written: another one puts that right.
    let lab = Lab::new(spec());
    let source = sha256(&lab.raw);
    let run = finish(command(&lab, &["--in-place"], "committing=orphan")).expect(6);
    assert!(run.stderr.contains("restored"), "{}", run.stderr);
    assert_eq!(sha256(&lab.raw), source);
    no_process_left(&lab);
    finish(command(&lab, &[], "")).expect(0);
}

/// Every request of a kind fails, by QEMU's own means.
#[test]
fn the_disk_gives_errors() {
    if !have(&TOOLS) {
        return;
    }
    // A raw disk is only written by QEMU.
    let (read, written) = (Lab::new(spec()).in_qcow2(), Lab::new(spec()));
    for (kinds, more, codes) in [
        (&["read"][..], &[][..], [1, 1]),
        (&["write"], &["--in-place"], [6, 7]),
        (&["write", "write-zeroes", "read"], &["--in-place"], [1, 6]),
    ] {
        eprintln!("{kinds:?}");
        let lab = if more.is_empty() { &read } else { &written };
        let (source, out) = (sha256(&lab.raw), lab.path("out"));
        let inject: Vec<String> = kinds
            .iter()
            .map(|kind| {
                format!("{{\"event\":\"none\",\"iotype\":\"{kind}\",\"errno\":5,\"once\":false}}")
            })
            .collect();
        let script = format!(
            "args=(); for a in \"$@\"; do case $a in */proc/self/fd/*) \
             a=$(sed -E 's#\\{{([^{{}}]*\"driver\":\"file\"[^{{}}]*/proc/self/fd/[^{{}}]*)\\}}#\
             {{\"driver\":\"blkdebug\",\"inject-error\":[{}],\"image\":{{\\1}}}}#' <<<\"$a\");; \
             esac; args+=(\"$a\"); done; exec REAL \"${{args[@]}}\"",
            inject.join(",")
        );
        let real = fake(lab, "qemu-storage-daemon", &script);
        let mut command = command(lab, more, "");
        command.env("PATH", &real);
        let run = finish(command);
        assert!(codes.contains(&run.code), "{} {}", run.code, run.stderr);
        assert!(run.stderr.contains("Input/output error"), "{}", run.stderr);
        if run.code == 7 {
            finish({
                let mut rollback = Command::new(binary());
                rollback
                    .args(["rollback", "--journal"])
                    .arg(lab.path(".out.partial/journal.json"));
                rollback
            })
            .expect(0);
            fs::remove_dir_all(lab.path(".out.partial")).unwrap();
        }
        assert_eq!(sha256(&lab.raw), source);
        assert!(!out.exists() && !lab.path(".out.partial").exists());
        no_process_left(lab);
    }
    for lab in [read, written] {
        finish(command(&lab, &[], "")).expect(0);
    }
}

/// QEMU's programs from a release that lacks what is asked of them.
#[test]
fn old_tools() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec()).in_qcow2();
    for name in ["qemu-img", "qemu-storage-daemon"] {
        let script = format!(
            "[ \"$1\" = --version ] && {{ echo \"{name} version 4.2.1 (old)\"; exit; }}; \
             echo \"{name}: unrecognized option\" >&2; exit 1"
        );
        let path = fake(&lab, name, &script);
        let mut convert = command(&lab, &[], "");
        convert.env("PATH", &path);
        let run = finish(convert).expect(5);
        let says = format!("{name} version 4.2.1 (old): too old, 5.2 or newer is needed");
        assert!(run.stderr.contains(&says), "{}", run.stderr);
        let mut doctor = Command::new(binary());
        doctor.arg("doctor").env("PATH", &path);
        let run = finish(doctor).expect(5);
        assert!(run.stdout.contains("TOO OLD") && run.stderr.contains(&says));
    }
}

/// What the storage daemon could reach if an image took it over.
#[test]
fn the_storage_daemon_is_confined() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec());
    let secret = lab.path("secret");
    fs::write(&secret, "top secret").unwrap();
    // "Permission denied" itself would be taken for the image's.
    let script = format!(
        "{{ cat {} && echo READ-IT; cat /etc/passwd && echo READ-THAT; touch {} && echo WROTE-IT; \
         head -c 16 {} && echo image-is-there; \
         (echo >/dev/tcp/127.0.0.1/9) 2>&1 | grep -q 'socket: Operation not permitted' && echo no-network; }} \
         2>/dev/null",
        text(&secret),
        text(&lab.path("written")),
        text(&lab.path("guest.qcow2")),
    );
    let script = format!("out=$({script}); echo \"$out\" >&2; exit 1");
    let path = fake(&lab, "qemu-storage-daemon", &script);
    // A raw image is read without the daemon.
    let image = lab.in_format("qcow2", "", "guest.qcow2");
    let mut command = Command::new(binary());
    command.arg("inspect").arg(&image).env("PATH", path);
    let run = finish(command).expect(1);
    for leak in ["READ-IT", "READ-THAT", "WROTE-IT", "root:"] {
        assert!(!run.stderr.contains(leak), "{}", run.stderr);
    }
    assert!(run.stderr.contains("image-is-there"), "{}", run.stderr);
    assert!(run.stderr.contains("no-network"), "{}", run.stderr);
}

/// What this program could do itself if a disk took it over, verb by verb.
#[test]
fn the_program_is_confined() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec());
    fs::create_dir(lab.path("tmp")).unwrap();
    let image = lab.in_format("qcow2", "", "guest.qcow2");
    let tries = |args: &[&str], point: &str| {
        let mut command = Command::new(binary());
        command
            .args(args)
            .current_dir(lab.dir.path())
            .env("TMPDIR", lab.path("tmp"))
            .env("HYPER2KVM_FAILPOINT", format!("{point}=escape"));
        let run = finish(command);
        assert!(run.stderr.contains("it can read a file"), "{}", run.stderr);
        assert!(!run.stderr.contains("write a file"), "{}", run.stderr);
        run.stderr.contains("use the network")
    };
    let (image, drivers) = (text(&image), text(virtio_win()));
    let info = "before qemu-img info #1";
    for verb in [
        &["inspect", image][..],
        &["inspect", image, "--evidence", "evidence"],
        &["verify", image],
        &["plan", image, "--virtio-iso", drivers],
    ] {
        assert!(!tries(verb, info), "{verb:?}");
    }
    // Programs that make a Linux ready may need it.
    let convert = ["convert", image, "--virtio-iso", drivers];
    assert!(tries(&convert, "inspected"));
    finish(command(&lab, &["--in-place"], "")).expect(0);
    let daemon = "before qemu-storage-daemon blockdev #1";
    assert!(!tries(&["rollback", "out"], daemon));
    h2k(["rollback", text(&lab.path("out"))]).expect(0);
}
