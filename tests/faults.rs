//! The fault matrix: runs that die before or after every action, every program and every rename; tools
//! and the NTFS writer that misbehave; input made to hurt. Whatever happens, the source is what it was
//! or can be made so again, nothing half done looks whole, and the next run succeeds.
//!
//! The table of steps in `docs/reliability.md` is made here: `HYPER2KVM_UPDATE=1 cargo test --test
//! faults` writes it, a run without compares.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hyper2kvm::demo::{Firmware, GuestSpec, Role, WinVersion, hives};
use support::{
    Lab, Run, TOOLS, binary, finish, h2k, have, processes_naming, sha256, tool, virtio_win,
};

fn spec() -> GuestSpec {
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = 512 << 20;
    spec.recovery = false;
    spec.firmware = Firmware::Bios;
    spec
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
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

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
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
    for kind in [
        "qemu-img",
        "qemu-storage-daemon",
        "hivexregedit",
        "__ntfs",
        "action",
        "rename",
    ] {
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
            assert_eq!(step, "after rename of the output folder #1");
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
    const START: &str = "<!-- steps: generated by tests/faults.rs -->\n";
    const END: &str = "<!-- steps: end -->\n";
    let mut table =
        String::from("| killed before and after | kills | left behind |\n|---|---|---|\n");
    for ((mode, kind), row) in rows {
        let outcomes: Vec<_> = row.outcomes.iter().copied().collect();
        let meaning = outcomes.iter().map(|o| match *o {
            "nothing" => "nothing",
            "partial" => "a partial folder, removed by the next run",
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
        ("escape", "all 6 ways out are closed"),
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

/// A folder with programs of ours that come before the real ones.
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
    let lab = Lab::new(spec());
    let source = sha256(&lab.raw);
    let tools = ["qemu-img", "qemu-storage-daemon", "hivexregedit"];
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
    let lab = Lab::new(spec());
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
        ("the source cannot be read", "guest.raw", "read_aio", 5),
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
    let run = finish(command(&lab, &["--in-place"], "committing=orphan")).expect(6);
    assert!(run.stderr.contains("restored"), "{}", run.stderr);
    assert_eq!(sha256(&lab.raw), source);
    no_process_left(&lab);
    finish(command(&lab, &[], "")).expect(0);
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
         (echo >/dev/tcp/127.0.0.1/9) 2>&1 | grep -q 'socket: Permission' && echo no-network; }} \
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

/// A run under the limits for hostile input: 10 s and 512 MiB.
fn bounded(args: &[&str]) -> Run {
    const MEMORY_KIB: u64 = 512 << 10;
    // Ten on an idle machine; the tests share theirs.
    const TIME: Duration = Duration::from_secs(60);
    let start = Instant::now();
    let mut command = Command::new(binary());
    command.args(args).env("NO_COLOR", "1");
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let watch = std::thread::spawn(move || {
        let mut most = 0;
        while let Ok(text) = fs::read_to_string(&status) {
            let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"));
            let Some(line) = line else { break };
            let kib = line.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
            most = most.max(kib);
            std::thread::sleep(Duration::from_millis(5));
        }
        most
    });
    let mut err = child.stderr.take().unwrap();
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut err, &mut text).unwrap();
        text
    });
    let out = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(errors.join().unwrap()).unwrap();
    let most = watch.join().unwrap();
    assert!(start.elapsed() < TIME, "{args:?}: {:?}", start.elapsed());
    assert!(most < MEMORY_KIB, "{args:?}: {most} KiB");
    assert!(!stderr.contains("panicked"), "{stderr}");
    let stdout = String::from_utf8(out.stdout).unwrap();
    for text in [&stdout, &stderr] {
        assert!(
            !text.contains('\u{1b}') && !text.contains('\u{7}'),
            "{text:?}"
        );
    }
    Run {
        code: out.status.code().unwrap_or(-1),
        stdout,
        stderr,
    }
}

/// Changes bytes of the Windows volume of a copy of the guest's disk.
fn damaged(lab: &Lab, name: &str, change: impl FnOnce(&mut [u8])) -> PathBuf {
    let disk = lab.path(name);
    tool("cp", &["--sparse=always", text(&lab.raw), text(&disk)]);
    let part = lab.spec.partition(Role::Windows).unwrap();
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&disk)
        .unwrap();
    // The metadata and small files lie in the first part of the volume.
    let mut bytes = vec![0; 160 << 20];
    let len = bytes.len().min(part.size as usize);
    file.read_exact_at(&mut bytes[..len], part.start).unwrap();
    let old = bytes.clone();
    change(&mut bytes[..len]);
    let pages = bytes.chunks(4096).zip(old.chunks(4096)).enumerate();
    let mut changed = 0;
    for (i, (new, _)) in pages.filter(|(_, (new, old))| new != old) {
        file.write_all_at(new, part.start + i as u64 * 4096)
            .unwrap();
        changed += 1;
    }
    assert!(changed > 0, "{name}: nothing to damage");
    disk
}

fn le16(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn le32(bytes: &[u8], at: usize) -> usize {
    le16(bytes, at) | le16(bytes, at + 2) << 16
}

/// The attributes of every MFT record that is in use: offset of the record and of the attribute.
fn attributes(volume: &[u8], kind: usize) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for record in (0..volume.len() - 1024).step_by(1024) {
        if !volume[record..].starts_with(b"FILE") || volume[record + 22] & 1 == 0 {
            continue;
        }
        let mut at = record + le16(volume, record + 20);
        while at + 16 < record + 1024 && le32(volume, at) != 0xffff_ffff {
            if le32(volume, at) == kind {
                found.push((record, at));
            }
            match le32(volume, at + 4) {
                0 => break,
                len => at += len,
            }
        }
    }
    found
}

#[test]
fn hostile_volumes() {
    if !have(&TOOLS) {
        return;
    }
    let lab = Lab::new(spec());
    const DATA: usize = 0x80;
    const USER: usize = 40;
    let user = |volume: &[u8], kind| {
        let all = attributes(volume, kind).into_iter();
        all.filter(|(record, _)| le32(volume, record + 44) >= USER)
            .collect::<Vec<_>>()
    };
    type Change<'a> = &'a dyn Fn(&mut [u8]);
    let cases: [(&str, Change<'_>); 5] = [
        ("every index block is its own child", &|volume| {
            for at in (0..volume.len() - 4096).step_by(1024) {
                if !volume[at..].starts_with(b"INDX") {
                    continue;
                }
                let vcn: [u8; 8] = volume[at + 16..at + 24].try_into().unwrap();
                let mut entry = at + 24 + le32(volume, at + 24);
                loop {
                    let len = le16(volume, entry + 8);
                    if len < 24 || entry + len > at + 4096 {
                        break;
                    }
                    // Not over the ends of sectors, which hold check marks.
                    if (entry + len - 9) / 512 == (entry + len - 1) / 512
                        && !(entry + len).is_multiple_of(512)
                    {
                        volume[entry + 12] |= 1;
                        volume[entry + len - 8..entry + len].copy_from_slice(&vcn);
                    }
                    entry += len;
                }
            }
        }),
        ("runs past the end", &|volume| {
            for (_, at) in user(volume, DATA) {
                if volume[at + 8] == 1 {
                    let run = at + le16(volume, at + 32);
                    let (length, offset) = (volume[run] & 15, volume[run] >> 4);
                    let first = run + 1 + usize::from(length);
                    volume[first..first + usize::from(offset)].fill(0x7f);
                }
            }
        }),
        ("4 GiB and more claimed", &|volume| {
            for (_, at) in user(volume, DATA) {
                match volume[at + 8] {
                    1 => volume[at + 52] = 1,
                    _ => volume[at + 16..at + 20].fill(0xff),
                }
            }
        }),
        ("records that contain each other", &|volume| {
            for (record, at) in user(volume, 0x30) {
                let own = le32(volume, record + 44) as u32;
                let parent = at + le16(volume, at + 20);
                volume[parent..parent + 4].copy_from_slice(&own.to_le_bytes());
            }
        }),
        ("attributes that do not advance", &|volume| {
            for (_, at) in user(volume, DATA) {
                volume[at + 4..at + 8].fill(0);
            }
        }),
    ];
    for (name, change) in cases {
        eprintln!("{name}");
        let disk = damaged(&lab, "hostile.raw", change);
        let run = bounded(&["inspect", text(&disk)]);
        assert!(matches!(run.code, 0 | 1 | 3), "{name}: {}", run.stderr);
        let out = lab.path("hostile-out");
        let drivers = text(virtio_win());
        let run = bounded(&[
            "convert",
            text(&disk),
            "--virtio-iso",
            drivers,
            "-o",
            text(&out),
        ]);
        // Names in records are not what lookups go by: that one is harmless.
        let harmless = name == "records that contain each other";
        match run.code {
            0 if harmless => fs::remove_dir_all(&out).unwrap(),
            1 | 3 => assert!(run.stderr.contains("error:"), "{name}: {}", run.stderr),
            code => panic!("{name}: exit {code}: {}", run.stderr),
        }
        assert!(!out.exists());
        fs::remove_file(&disk).unwrap();
    }
}

/// Hives with cycles and sizes out of this world; a computer name that paints the terminal.
#[test]
fn hostile_hives() {
    if !have(&TOOLS) {
        return;
    }
    let sound = hives::system(&spec());
    let mut cycle = sound.clone();
    let mut cells = 0;
    for at in 4096..cycle.len() - 16 {
        // Every list of subkeys leads back to the root key.
        if matches!(&cycle[at..at + 2], b"lf" | b"lh") && at % 8 == 4 {
            for i in 0..le16(&cycle, at + 2).min(500) {
                let entry = at + 4 + i * 8;
                let root: [u8; 4] = sound[36..40].try_into().unwrap();
                if entry + 4 <= cycle.len() {
                    cycle[entry..entry + 4].copy_from_slice(&root);
                    cells += 1;
                }
            }
        }
    }
    assert!(cells > 100);
    let mut huge = sound.clone();
    for at in (4096..huge.len() - 32).step_by(4) {
        if &huge[at..at + 2] == b"vk" {
            huge[at + 4..at + 8].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        }
        if &huge[at..at + 2] == b"nk" {
            huge[at + 36..at + 40].fill(0xff);
        }
    }
    for (name, hive) in [("cycle", cycle), ("huge", huge)] {
        eprintln!("{name}");
        let mut spec = spec();
        spec.system_hive = Some(hive);
        let lab = Lab::new(spec);
        let run = bounded(&["inspect", text(&lab.raw)]);
        assert!(matches!(run.code, 0 | 1 | 3), "{}", run.stderr);
        let run = bounded(&[
            "convert",
            text(&lab.raw),
            "--virtio-iso",
            text(virtio_win()),
            "-o",
            text(&lab.path("out")),
        ]);
        assert!(
            matches!(run.code, 1 | 3),
            "{name}: {} {}",
            run.code,
            run.stderr
        );
        assert!(run.stderr.contains("error:"), "{}", run.stderr);
    }
    let mut spec = spec();
    spec.hostname = "A\u{1b}[31m\u{7}\u{1b}]0;B".into();
    let lab = Lab::new(spec);
    let run = bounded(&["inspect", text(&lab.raw)]).expect(0);
    assert!(run.stdout.contains("A[31m"), "{}", run.stdout);
}

fn envelope(href: &str, gzip: bool) -> String {
    let compression = ["", " ovf:compression=\"gzip\""][usize::from(gzip)];
    format!(
        "<Envelope xmlns:ovf=\"o\" xmlns:rasd=\"r\"><References><File ovf:id=\"f\" ovf:href=\"{href}\"{compression}/></References>\
         <DiskSection><Disk ovf:diskId=\"d\" ovf:fileRef=\"f\" ovf:capacity=\"1\" ovf:capacityAllocationUnits=\"byte * 2^20\"/></DiskSection>\
         <VirtualSystem ovf:id=\"x\"><VirtualHardwareSection><Item><rasd:InstanceID>1</rasd:InstanceID>\
         <rasd:ResourceType>20</rasd:ResourceType></Item><Item><rasd:AddressOnParent>0</rasd:AddressOnParent>\
         <rasd:HostResource>ovf:/disk/d</rasd:HostResource><rasd:InstanceID>2</rasd:InstanceID><rasd:Parent>1</rasd:Parent>\
         <rasd:ResourceType>17</rasd:ResourceType></Item></VirtualHardwareSection></VirtualSystem></Envelope>"
    )
}

#[test]
fn hostile_packages() {
    if !have(&["qemu-img", "genisoimage", "tar"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let refused = |path: &Path, says: &str| {
        let run = bounded(&["inspect", text(path)]);
        assert!(matches!(run.code, 1..=3), "{} {}", run.code, run.stdout);
        assert!(run.stderr.contains(says), "{says}: {}", run.stderr);
    };
    // A billion laughs.
    let mut laughs = String::from("<!DOCTYPE l [<!ENTITY l0 \"ha\">");
    for i in 1..10 {
        laughs += &format!("<!ENTITY l{i} \"{}\">", format!("&l{};", i - 1).repeat(10));
    }
    laughs += "]><Envelope>&l9;</Envelope>";
    refused(&file("laughs.ovf", laughs.as_bytes()), "");
    refused(
        &file(
            "laughs.xml",
            laughs.replace("Envelope", "domain").as_bytes(),
        ),
        "",
    );
    // A disk of 1 MiB that unpacks to 4 GiB.
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let zeroes = vec![0; 1 << 20];
    for _ in 0..4096 {
        gz.write_all(&zeroes).unwrap();
    }
    file("bomb.img.gz", &gz.finish().unwrap());
    refused(
        &file("bomb.ovf", envelope("bomb.img.gz", true).as_bytes()),
        "unpacks to more than",
    );
    // Names that lead out of the package.
    refused(
        &file("out.ovf", envelope("../../etc/shadow", false).as_bytes()),
        "outside",
    );
    let ova = dir.path().join("out.ova");
    file("x.ovf", envelope("../x.vmdk", false).as_bytes());
    file("x.vmdk", b"KDMV");
    tool(
        "tar",
        &[
            "-C",
            text(dir.path()),
            "-cf",
            text(&ova),
            "--transform=s,^x.vmdk,../x.vmdk,",
            "-P",
            "x.ovf",
            "x.vmdk",
        ],
    );
    refused(&ova, "");
    // Backing files: a secret and a URL.
    for backing in [
        "/etc/shadow",
        "https://192.0.2.1/x.raw",
        "nbd://192.0.2.1/x",
    ] {
        let image = dir.path().join("evil.qcow2");
        tool(
            "qemu-img",
            &[
                "create",
                "-q",
                "-u",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                backing,
                text(&image),
                "64M",
            ],
        );
        refused(&image, "");
        fs::remove_file(&image).unwrap();
    }
    // An ISO with `..` for a name.
    let cd = dir.path().join("cd");
    fs::create_dir(&cd).unwrap();
    fs::write(cd.join("QQ"), "x").unwrap();
    let iso = dir.path().join("evil.iso");
    tool(
        "genisoimage",
        &["-quiet", "-J", "-R", "-o", text(&iso), text(&cd)],
    );
    let mut bytes = fs::read(&iso).unwrap();
    for (from, to) in [(&b"QQ"[..], &b".."[..]), (b"\0Q\0Q", b"\0.\0.")] {
        for at in 0..bytes.len() - 4 {
            if bytes[at..].starts_with(from) {
                bytes[at..at + to.len()].copy_from_slice(to);
            }
        }
    }
    fs::write(&iso, bytes).unwrap();
    let run = bounded(&["drivers", text(&iso)]).expect(1);
    assert!(
        run.stderr.contains("name that is not allowed"),
        "{}",
        run.stderr
    );
}

/// Text of an INF ends up in the guest's registry as a value and nowhere as a command.
#[test]
fn hostile_inf() {
    if !have(&TOOLS) {
        return;
    }
    const EVIL: &str = "\"; rm -rf / & del *.* %PATH% \u{1b}[2J";
    let lab = Lab::new(spec());
    let folder = lab.path("evil-win");
    tool("cp", &["-r", text(virtio_win()), text(&folder)]);
    let mut changed = 0;
    let mut open = vec![folder.clone()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
                continue;
            }
            if path.extension().is_none_or(|e| e != "inf") {
                continue;
            }
            let bytes = fs::read(&path).unwrap();
            let Ok(inf) = String::from_utf8(bytes) else {
                continue;
            };
            let quoted = EVIL.replace('"', "\"\"");
            let inf = inf.replace("Red Hat", &format!("{quoted} Red Hat"));
            fs::write(&path, inf).unwrap();
            changed += 1;
        }
    }
    assert!(changed > 10);
    let out = lab.path("out");
    let run = bounded(&[
        "convert",
        text(&lab.raw),
        "--virtio-iso",
        text(&folder),
        "-o",
        text(&out),
    ]);
    if run.code == 0 {
        for entry in fs::read_dir(out.join("generated")).into_iter().flatten() {
            let path = entry.unwrap().path();
            let script = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
            assert!(!script.contains("rm -rf"), "{}: {script}", path.display());
        }
        for report in ["report.html", "guest-final.xml", "guest-bootstrap.xml"] {
            let report = fs::read_to_string(out.join(report)).unwrap();
            assert!(!report.contains('\u{1b}'), "{report}");
        }
    } else {
        assert!(matches!(run.code, 1 | 3), "{} {}", run.code, run.stderr);
        assert!(run.stderr.contains("error:"), "{}", run.stderr);
    }
}
