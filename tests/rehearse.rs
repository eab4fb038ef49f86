//! `rehearse`: both boots on a throw-away overlay of an unchanged source, with real libvirtd and
//! QEMU, and a payload of the tests in place of Windows' boot loader.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr, clippy::print_stdout)] // which case is running

#[path = "boot/libvirt.rs"]
#[allow(dead_code)]
mod libvirt;
#[path = "boot/payload.rs"]
#[allow(dead_code)]
mod payload;
mod support;

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hyper2kvm::boot::MARKER;
use hyper2kvm::demo::Firmware;
use libvirt::{Libvirt, able};
use payload::{End, boot_code, boot_code_on, guest};
use serde_json::Value;
use support::later::Untouched;
use support::wire::{Line, Nbdkit, Sshd};
use support::{Lab, Paused, Run, binary, finish, h2k, have, sha256, tool, virtio_win};

/// Reads sector 10 and hangs if its first byte is not 0; otherwise sets it to 1, and continues.
const ONLY_ONCE: &[u8] = &[
    0xb6, 0x00, // mov dh, 0
    0xb8, 0x01, 0x02, // mov ax: read one sector
    0xb9, 0x0b, 0x00, // mov cx, 11: cylinder 0, sector 11
    0xbb, 0x00, 0x7e, // mov bx, 7e00h
    0xcd, 0x13, // int 13h
    0x80, 0x3e, 0x00, 0x7e, 0x00, // cmp byte [7e00h], 0
    0x74, 0x03, // je first
    0xf4, // hlt
    0xeb, 0xfd, // jmp back
    0xfe, 0x06, 0x00, 0x7e, // first: inc byte [7e00h]
    0xb6, 0x00, // mov dh, 0
    0xb8, 0x01, 0x03, // mov ax: write one sector
    0xb9, 0x0b, 0x00, // mov cx, 11
    0xbb, 0x00, 0x7e, // mov bx, 7e00h
    0xcd, 0x13, // int 13h
];

/// A guest, and the libvirt of an ordinary user who may read it.
struct Stage {
    lab: Lab,
    libvirt: Libvirt,
    digest: String,
}

impl Stage {
    fn new(firmware: Firmware) -> Self {
        let (lab, libvirt) = (guest(firmware), Libvirt::new());
        libvirt.give(lab.dir.path());
        libvirt.give(virtio_win().parent().unwrap());
        let digest = sha256(&lab.raw);
        Self {
            lab,
            libvirt,
            digest,
        }
    }

    /// Puts other code into the boot sector of the source.
    fn payload(&mut self, code: &[u8]) {
        let mut disk = fs::File::options().write(true).open(&self.lab.raw).unwrap();
        disk.seek(SeekFrom::Start(0)).unwrap();
        disk.write_all(code).unwrap();
        self.digest = sha256(&self.lab.raw);
    }

    fn evidence(&self) -> PathBuf {
        self.lab.path("evidence")
    }

    /// `rehearse` as the user of that libvirt.
    fn command(&self, source: &Path, more: &[&str]) -> Command {
        let mut command = self.libvirt.command(Path::new(binary()));
        command.arg("rehearse").arg(source);
        command.arg("--virtio-iso").arg(virtio_win());
        command.arg("-o").arg(self.evidence()).args(FEW);
        command.args(["--json", "--name", "vm"]).args(more);
        if !more.contains(&"--timeout") {
            command.args(["--timeout", "60"]);
        }
        command
    }

    fn rehearse(&self, more: &[&str]) -> Run {
        finish(self.command(&self.lab.raw, more))
    }

    /// Only evidence is left, and the source is unchanged.
    #[track_caller]
    fn nothing_is_left(&self) {
        let domains = self.libvirt.virsh(&["list", "--all", "--name"]).expect(0);
        assert_eq!(domains.stdout.trim(), "", "a domain is left");
        let names = |folder: &Path| -> Vec<String> {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries
                .map(|e| e.file_name().to_string_lossy().into_owned())
                .collect()
        };
        for name in names(&self.evidence()) {
            assert!(!name.starts_with('.'), "{name} is left");
        }
        for folder in [
            "config/libvirt/qemu/nvram",
            "config/libvirt/qemu/swtpm",
            "cache/libvirt/qemu/log",
        ] {
            let left = names(&self.libvirt.dir.path().join(folder));
            let ours: Vec<_> = left.iter().filter(|n| n.contains("rehearsal")).collect();
            assert!(ours.is_empty(), "{folder}: {ours:?}");
        }
        assert_eq!(sha256(&self.lab.raw), self.digest, "the source was changed");
    }

    fn doctor(&self) -> Value {
        let mut command = self.libvirt.command(Path::new(binary()));
        command.args(["doctor", "--json"]);
        finish(command).json()["rehearsals"].clone()
    }
}

const FEW: [&str; 10] = [
    "--memory",
    "256",
    "--vcpus",
    "1",
    "--graphics",
    "none",
    "--domain-type",
    "qemu",
    "--connect",
    "qemu:///session",
];

fn text(folder: &Path, name: &str) -> String {
    let bytes = fs::read(folder.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn a_vm_that_comes_up_leaves_evidence_and_nothing_else() {
    if !able() {
        return;
    }
    let stage = Stage::new(Firmware::Bios);
    let run = stage.rehearse(&[]).expect(0);
    let seen = run.json();
    assert_eq!(seen["schema"], "hyper2kvm/rehearse/1");
    assert_eq!(seen["verdict"], "up", "{seen:#}");
    for name in ["bootstrap", "final"] {
        let boot = &seen["stages"][name];
        assert_eq!(boot["state"], "up");
        assert!(boot["seconds"].as_f64().is_some_and(|s| s > 0.0));
        let folder = stage.evidence().join(name);
        assert!(text(&folder, "com1.log").contains(MARKER));
        assert!(text(&folder, "screen.png").contains("PNG"));
        assert!(text(&folder, "qemu.log").contains("qemu-system"));
        let domain = text(&folder, "domain.xml");
        assert!(domain.contains("rehearsal=") && domain.contains("vm-rehearsal-"));
        let (nics, down) = ("<interface ", "<link state='down'/>");
        assert!(domain.contains(nics), "{domain}");
        assert_eq!(domain.matches(nics).count(), domain.matches(down).count());
    }
    assert!(stage.evidence().join("bootstrap/SYSTEM").is_file());
    let listed = seen["evidence"].as_array().unwrap();
    for kind in [
        "screen",
        "com1",
        "qemu-log",
        "system-hive",
        "domain",
        "report",
    ] {
        let found = listed.iter().find(|e| e["kind"] == kind);
        let path = found.and_then(|e| e["path"].as_str());
        assert!(path.is_some_and(|p| Path::new(p).is_file()), "{kind}");
    }
    assert_eq!(seen["bytes"]["fetched"], 0, "a file of this host");
    let kept: Value = serde_json::from_str(&text(&stage.evidence(), "rehearsal.json")).unwrap();
    assert_eq!(kept, seen);
    assert!(text(&stage.evidence(), "rehearsal.html").contains("data:image/png;base64,"));
    for secret in ["bootstrap/SYSTEM", "bootstrap/com1.log", "rehearsal.json"] {
        let mode = fs::metadata(stage.evidence().join(secret)).unwrap().mode();
        assert_eq!(mode & 0o077, 0, "{secret}");
    }
    stage.nothing_is_left();
    // Again, over the evidence of the first; other files beside it stay.
    fs::write(stage.evidence().join("notes.txt"), "mine").unwrap();
    stage.libvirt.give(&stage.evidence());
    stage.rehearse(&["--stop-after", "bootstrap"]).expect(0);
    assert!(!stage.evidence().join("final").exists(), "of the first run");
    assert_eq!(text(&stage.evidence(), "notes.txt"), "mine");
    stage.nothing_is_left();
}

/// Its disk is read through a server that ends with the rehearsal. While the connection is down the
/// VM is paused, and then it continues.
#[test]
fn a_vm_on_another_host_is_rehearsed_where_it_lies() {
    if !able() || !have(&["nbdkit"]) {
        return;
    }
    let stage = Stage::new(Firmware::Bios);
    let server = Nbdkit::start(&["-r", "file", stage.lab.raw.to_str().unwrap()]);
    let line = Line::to(server.port, Duration::ZERO);
    let url = format!("nbd://127.0.0.1:{}/", line.port);
    let converted = stage.lab.convert(Path::new(&url), &["--copy", "later"]);
    let converted = converted.expect(0).json()["bytes"]["fetched"]
        .as_u64()
        .unwrap();
    let before = line.carried();
    let seen = finish(stage.command(Path::new(&url), &[])).expect(0).json();
    assert_eq!(seen["verdict"], "up", "{seen:#}");
    for name in ["bootstrap", "final"] {
        assert_eq!(seen["stages"][name]["state"], "up");
    }
    // Each boot reads the sector of the payload; between them the hives and their logs are read.
    let (fetched, carried) = (
        seen["bytes"]["fetched"].as_u64().unwrap(),
        line.carried() - before,
    );
    println!("{fetched} fetched, {carried} carried, {converted} by the conversion");
    assert!(
        fetched > converted / 2 && fetched < converted + BOOTS,
        "{fetched}, {converted}"
    );
    assert!(
        carried < fetched + (1 << 20),
        "{carried} bytes came, {fetched} are counted"
    );
    stage.nothing_is_left();

    let command = stage.command(Path::new(&url), &["--stop-after", "bootstrap"]);
    let paused = Paused::at("boot-bootstrap", command);
    line.cut(true);
    let run = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(25));
            line.cut(false);
        });
        paused.go_on()
    });
    for says in ["until its source answers", "Resuming"] {
        assert!(run.stderr.contains(says), "{}", run.stderr);
    }
    assert_eq!(run.expect(0).json()["stages"]["bootstrap"]["state"], "up");
    stage.nothing_is_left();
}

/// A storage daemon of this run joins its files, and ends with it too.
#[test]
fn a_disk_of_several_files_on_another_host_is_rehearsed() {
    if !able() || !have(&Sshd::TOOLS) {
        return;
    }
    let (stage, ssh) = (Stage::new(Firmware::Bios), Sshd::start());
    let disk = stage.lab.path("split.vmdk");
    let (from, to) = (stage.lab.raw.to_str().unwrap(), disk.to_str().unwrap());
    let split = "subformat=twoGbMaxExtentFlat";
    tool(
        "qemu-img",
        &["convert", "-O", "vmdk", "-o", split, from, to],
    );
    let untouched = Untouched::of(&[&disk, &stage.lab.path("split-f001.vmdk")]);
    stage.libvirt.give(ssh.dir.path());
    let options = ssh.options();
    let more: Vec<&str> = options.iter().map(String::as_str).collect();
    let seen = finish(stage.command(ssh.url(&disk).as_ref(), &more));
    let seen = seen.expect(0).json();
    assert_eq!(seen["verdict"], "up", "{seen:#}");
    let fetched = seen["bytes"]["fetched"].as_u64().unwrap();
    assert!(0 < fetched && fetched < 64 << 20, "{fetched}");
    stage.nothing_is_left();
    untouched.check();
}

/// The bytes that both boots of the payload, and the examination between them, may read from the
/// source.
const BOOTS: u64 = 4 << 20;

#[ignore = "minutes: cargo test --test rehearse -- --ignored; .ci/campaign rehearsals has it"]
#[test]
fn a_uefi_vm_leaves_no_variables() {
    if !able() {
        return;
    }
    let stage = Stage::new(Firmware::Uefi);
    let run = stage.rehearse(&["--storage", "virtio-scsi", "--portable"]);
    assert_eq!(run.expect(0).json()["verdict"], "up");
    stage.nothing_is_left();
}

/// The name of each outcome; nothing of it is left.
fn ends(cases: &[(&str, End, &str, &[&str])]) {
    if !able() {
        return;
    }
    let mut stage = Stage::new(Firmware::Bios);
    for (message, end, state, more) in cases {
        eprintln!("{state}");
        stage.payload(&boot_code(message, false, *end));
        let seen = stage.rehearse(more).expect(4).json();
        assert_eq!(seen["schema"], "hyper2kvm/rehearse/1");
        assert_eq!(seen["verdict"], "down");
        assert_eq!(seen["stages"]["bootstrap"]["state"], *state, "{seen:#}");
        assert_eq!(seen["stages"]["final"]["state"], "not-run");
        assert_eq!(seen["error"]["code"], 4);
        assert!(seen["next"].as_array().is_some_and(|n| !n.is_empty()));
        let folder = stage.evidence().join("bootstrap");
        assert!(text(&folder, "screen.png").contains("PNG"), "{state}");
        assert_eq!(
            text(&folder, "com1.log").contains("here"),
            message.contains("here")
        );
        assert!(folder.join("SYSTEM").is_file());
        stage.nothing_is_left();
    }
}

#[test]
fn a_vm_that_hangs_is_a_timeout() {
    ends(&[("here", End::Hang, "timeout", &["--timeout", "8"])]);
}

#[test]
fn a_vm_that_panics_is_a_panic() {
    ends(&[("here", End::Panic, "panic", &[])]);
}

#[test]
fn a_vm_that_restarts_and_restarts_is_a_loop() {
    let more = &["--max-reboots", "2"];
    ends(&[("here", End::Reset, "reboot-loop", more)]);
}

#[test]
fn a_vm_that_never_prints_is_a_timeout() {
    ends(&[("", End::Hang, "timeout", &["--timeout", "8"])]);
}

#[test]
fn a_vm_that_goes_off_is_stopped() {
    ends(&[("here", End::PowerOff, "stopped", &[])]);
}

/// The VM comes up from the emulated controller, and not from VirtIO: the BIOS names the disk
/// differently there.
#[test]
fn a_vm_that_comes_up_only_once_is_down() {
    if !able() {
        return;
    }
    let mut stage = Stage::new(Firmware::Bios);
    stage.payload(&boot_code_on(0x3f8, ONLY_ONCE, MARKER, End::PowerOff));
    let seen = stage.rehearse(&["--timeout", "8"]).expect(4).json();
    assert_eq!(seen["stages"]["bootstrap"]["state"], "up", "{seen:#}");
    assert_eq!(seen["stages"]["final"]["state"], "timeout");
    assert_eq!(seen["verdict"], "down");
    assert!(stage.evidence().join("final/SYSTEM").is_file());
    stage.nothing_is_left();
}

#[test]
fn what_a_killed_rehearsal_left_is_removed_by_the_next() {
    if !able() {
        return;
    }
    let mut stage = Stage::new(Firmware::Bios);
    stage.payload(&boot_code("still here", false, End::Hang));
    let mut command = stage.command(&stage.lab.raw, &[]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let begin = Instant::now();
    let running = || {
        let list = stage.libvirt.virsh(&["list", "--name"]).stdout;
        list.contains("vm-rehearsal-")
    };
    while !running() {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "it never started"
        );
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        std::thread::sleep(Duration::from_millis(200));
    }
    let listed = stage.doctor();
    assert_eq!(listed[0]["state"], "running", "{listed}");
    let busy = stage.rehearse(&[]).expect(1);
    assert!(busy.stderr.contains("another rehearsal"), "{}", busy.stderr);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(running(), "the domain outlives the run that was killed");
    let listed = stage.doctor();
    assert_eq!(listed.as_array().map(Vec::len), Some(1));
    assert_eq!(listed[0]["state"], "left", "{listed}");
    let work = listed[0]["work"].as_str().unwrap();
    assert!(Path::new(work).is_dir());
    // A domain of somebody else is not changed.
    let other = stage.lab.path("other.xml");
    fs::write(
        &other,
        OTHER.replace("UUID", "5a3c1c9e-0000-4000-8000-000000000001"),
    )
    .unwrap();
    stage
        .libvirt
        .virsh(&["define", other.to_str().unwrap()])
        .expect(0);
    stage.payload(&boot_code(MARKER, false, End::PowerOff));
    stage.rehearse(&[]).expect(0);
    assert!(!Path::new(work).exists());
    assert_eq!(stage.doctor(), Value::Array(Vec::new()));
    assert_eq!(stage.libvirt.state("other"), "shut off");
    stage.libvirt.virsh(&["undefine", "other"]).expect(0);
    stage.nothing_is_left();
}

/// After a kill at every named place, the next run removes the leftovers.
#[ignore = "minutes: cargo test --test rehearse -- --ignored; .ci/campaign rehearsals has it"]
#[test]
fn killed_at_every_step_of_a_rehearsal() {
    if !able() {
        return;
    }
    let stage = Stage::new(Firmware::Bios);
    for point in [
        "rehearse-noted",
        "rehearse-converted",
        "rehearse-defined",
        "boot-bootstrap",
        "boot-watching",
        "boot-bootstrap-up",
        "boot-final",
        "boot-done",
        "rehearse-removing",
    ] {
        eprintln!("killed at {point}");
        let mut command = stage.command(&stage.lab.raw, &[]);
        command.env("HYPER2KVM_FAILPOINT", format!("{point}=kill"));
        assert_eq!(finish(command).code, -1, "{point}");
        assert_eq!(stage.doctor()[0]["state"], "left", "{point}");
        // Refused immediately, but the leftovers are removed.
        let mut command = stage.command(&stage.lab.raw, &[]);
        command.env("HYPER2KVM_FAILPOINT", "rehearse-noted=fail");
        finish(command).expect(1);
        assert_eq!(stage.doctor(), Value::Array(Vec::new()), "{point}");
        stage.nothing_is_left();
    }
    eprintln!("what cannot be removed is said, and stays noted");
    let mut command = stage.command(&stage.lab.raw, &[]);
    command.env("HYPER2KVM_FAILPOINT", "rehearse-removing=fail");
    let seen = finish(command).expect(0).json();
    assert_eq!(seen["left"].as_array().map(Vec::len), Some(1), "{seen:#}");
    assert_eq!(stage.doctor()[0]["state"], "left");
    stage.rehearse(&["--stop-after", "bootstrap"]).expect(0);
    stage.nothing_is_left();
}

/// Killed at moments spread over a whole run; `HYPER2KVM_PAIRS` is their number (`.ci/campaign
/// rehearsals`).
#[ignore = "minutes: cargo test --test rehearse -- --ignored; .ci/campaign rehearsals has it"]
#[test]
fn killed_at_any_moment() {
    if !able() {
        return;
    }
    let stage = Stage::new(Firmware::Bios);
    let kills = std::env::var("HYPER2KVM_PAIRS")
        .ok()
        .and_then(|n| n.parse().ok());
    let kills: u32 = kills.unwrap_or(3);
    let begin = Instant::now();
    stage.rehearse(&[]).expect(0);
    let whole = begin.elapsed();
    let mut ended = 0;
    for n in 0..kills {
        let mut command = stage.command(&stage.lab.raw, &[]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        std::thread::sleep(whole.mul_f64(f64::from(n) / f64::from(kills)));
        let _ = child.kill();
        ended += u32::from(child.wait().unwrap().success());
        let mut command = stage.command(&stage.lab.raw, &[]);
        command.env("HYPER2KVM_FAILPOINT", "rehearse-noted=fail");
        finish(command).expect(1);
        assert_eq!(stage.doctor(), Value::Array(Vec::new()), "kill {n}");
        stage.nothing_is_left();
    }
    println!("{kills} kills: {ended} came too late");
}

const OTHER: &str = "<domain type='qemu'><name>other</name><uuid>UUID</uuid><memory unit='MiB'>64</memory>\
    <os><type arch='x86_64' machine='q35'>hvm</type></os></domain>";
const ITS_UUID: &str = "564d1234-5678-9abc-def0-123456789abc";

#[test]
fn a_vm_whose_uuid_this_host_knows() {
    if !able() {
        return;
    }
    let stage = Stage::new(Firmware::Bios);
    let source = stage.lab.path("source.xml");
    let disk = stage.lab.raw.display();
    let more = format!(
        "<devices><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/>\
         <target dev='sda' bus='sata'/></disk></devices></domain>"
    );
    let xml = OTHER.replace("UUID", ITS_UUID);
    fs::write(&source, xml.replace("</domain>", &more)).unwrap();
    let other = stage.lab.path("other.xml");
    fs::write(&other, &xml).unwrap();
    stage.libvirt.give(stage.lab.dir.path());
    let virsh = |args: &[&str]| stage.libvirt.virsh(args).expect(0);
    virsh(&["define", other.to_str().unwrap()]);

    eprintln!("it is off: another UUID, and that is said");
    let run = finish(stage.command(&source, &["--stop-after", "bootstrap"])).expect(0);
    let seen = run.json();
    assert_ne!(seen["uuid"], ITS_UUID);
    assert!(seen["warnings"].to_string().contains(ITS_UUID), "{seen:#}");
    let used = text(&stage.evidence(), "bootstrap/domain.xml");
    assert!(!used.contains(ITS_UUID) && used.contains(seen["uuid"].as_str().unwrap()));
    assert_eq!(stage.libvirt.state("other"), "shut off");

    eprintln!("it runs: refused");
    virsh(&["start", "other"]);
    let run = finish(stage.command(&source, &[])).expect(3);
    let seen = run.json();
    assert_eq!(
        (&seen["verdict"], &seen["error"]["code"]),
        (&"refused".into(), &3.into())
    );
    assert_eq!(seen["error"]["blockers"][0]["code"], "vm-runs");
    assert!(run.stderr.contains(ITS_UUID), "{}", run.stderr);
    assert_eq!(stage.libvirt.state("other"), "running");
    virsh(&["destroy", "other"]);
    virsh(&["undefine", "other"]);

    eprintln!("nobody has it: it is kept");
    let run = finish(stage.command(&source, &["--stop-after", "bootstrap"])).expect(0);
    assert_eq!(run.json()["uuid"], ITS_UUID);
    stage.nothing_is_left();
}

#[test]
fn a_list_becomes_one_page() {
    if !able() {
        return;
    }
    let stage = Stage::new(Firmware::Bios);
    let dead = stage.lab.path("dead.raw");
    support::tool(
        "cp",
        &[
            "--sparse=always",
            stage.lab.raw.to_str().unwrap(),
            dead.to_str().unwrap(),
        ],
    );
    let code = boot_code("here", false, End::Panic);
    let digest = || sha256(&dead);
    let mut disk = fs::File::options().write(true).open(&dead).unwrap();
    disk.write_all(&code).unwrap();
    drop(disk);
    let before = digest();
    let good = stage
        .lab
        .raw
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    let list = stage.lab.path("fleet.yaml");
    let iso = virtio_win().display();
    fs::write(
        &list,
        format!(
            "output-dir: out\ndefaults:\n  virtio-iso: {iso}\n  memory: 256\n  vcpus: 1\n  graphics: none\n  domain-type: qemu\n\
             machines:\n  - {{source: {good}, name: good}}\n  - {{source: dead.raw, name: dead}}\n  - {{source: none.raw, name: none}}\n"
        ),
    )
    .unwrap();
    stage.libvirt.give(stage.lab.dir.path());
    let mut command = stage.libvirt.command(Path::new(binary()));
    command.arg("rehearse").arg("--batch").arg(&list);
    command.args(["--connect", "qemu:///session", "--json", "--timeout", "60"]);
    let run = finish(command).expect(102);
    let seen = run.json();
    assert_eq!(seen["schema"], "hyper2kvm/rehearse-batch/1");
    let states: Vec<_> = seen["machines"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["rehearsal"]["verdict"].clone())
        .collect();
    assert_eq!(
        states,
        [Value::from("up"), Value::from("down"), Value::Null],
        "{seen:#}\n{}",
        run.stderr
    );
    assert_eq!(seen["machines"][2]["error"]["code"], 1);
    assert_eq!(digest(), before);
    let page = text(&stage.lab.path("out"), "fleet-rehearsal.html");
    assert_eq!(
        page.matches("data:image/png;base64,").count(),
        2,
        "a picture of each that ran"
    );
    for says in [
        "./dead-rehearsal/",
        "./good-rehearsal/",
        "panic after",
        "none.raw",
        // The findings, and the remedies.
        "the catalogue (.cat) is not signed",
        "Windows did not come up in the first boot",
        "find the stop code of the screen",
        "shut the VM down where it runs now",
    ] {
        assert!(page.contains(says), "{says}: {page}");
    }
    let up = page.lines().find(|row| row.contains(">good<")).unwrap();
    assert_eq!(
        up.matches(" s</td>").count(),
        2,
        "seconds to each marker: {up}"
    );
    assert!(
        page.find(">dead<") < page.find(">good<"),
        "what failed comes first"
    );
    stage.nothing_is_left();
}

#[test]
fn what_does_not_go_with_a_rehearsal_is_a_usage_error() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let out = dir.path().join("evidence");
    for more in [
        &["--in-place"][..],
        &["--output-device", "/dev/null"],
        &["--format", "raw"],
        &["--compress"],
        &["--verify-copy"],
        &["--copy", "later"],
        &["--copy", "now"],
        &["--from-sync"],
        &["--resume"],
    ] {
        let mut args = vec!["rehearse", "--json", disk.to_str().unwrap(), "-o"];
        args.push(out.to_str().unwrap());
        args.extend(more);
        let run = h2k(args).expect(2);
        assert_eq!(run.json()["error"]["code"], 2, "{more:?}");
        assert!(!out.exists(), "{more:?}");
    }
}

#[test]
fn a_directory_of_the_user_is_not_taken() {
    if !able() {
        return;
    }
    let stage = Stage::new(Firmware::Bios);
    fs::create_dir(stage.evidence()).unwrap();
    fs::write(stage.evidence().join("letter.txt"), "mine").unwrap();
    stage.libvirt.give(&stage.evidence());
    let run = stage.rehearse(&[]).expect(1);
    assert!(run.stderr.contains("--output-dir"), "{}", run.stderr);
    assert_eq!(text(&stage.evidence(), "letter.txt"), "mine");
    assert_eq!(fs::read_dir(stage.evidence()).unwrap().count(), 1);
}
