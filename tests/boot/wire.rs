//! A VM that runs on disks of another host: its server, and the effects of outages and kills.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use hyper2kvm::boot::MARKER;
use hyper2kvm::demo::Firmware;
use serde_json::Value;

use crate::libvirt::{Libvirt, able};
use crate::payload::{End, boot_code, boot_code_on, guest, link_over, read_sector};
use crate::support::later::{Untouched, same_guest};
use crate::support::wire::Sshd;
use crate::support::{Lab, Paused, binary, finish, have, text, tool};
use crate::{convert, counter, replace_payload};

/// Longer than Windows waits for a disk, and than a read waits for the connection.
const OUTAGE: Duration = Duration::from_secs(30);

/// A sector behind the last partition, which only the source has until it is pulled.
const ON_SOURCE: u32 = ((1 << 30) - (512 << 10)) / 512;

#[track_caller]
fn until(what: &str, seconds: u64, ready: impl Fn() -> bool) {
    let begin = Instant::now();
    while !ready() {
        assert!(begin.elapsed() < Duration::from_secs(seconds), "{what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The `serve` of a directory, ended with the test.
struct Served(String);

impl Served {
    /// Finds the server that `boot` has left running.
    fn of(out: &Path) -> Self {
        Self(Self::find(out).expect("somebody serves"))
    }

    fn find(out: &Path) -> Option<String> {
        let id = |entry: fs::DirEntry| {
            let words = fs::read(entry.path().join("cmdline")).ok()?;
            let words = String::from_utf8_lossy(&words).into_owned();
            let serves =
                words.contains("\0serve\0") && words.contains(&format!("\0{}\0", text(out)));
            serves.then(|| entry.file_name().into_string().unwrap())
        };
        let mut all = fs::read_dir("/proc").unwrap().flatten();
        all.find_map(id)
    }

    fn runs(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    }

    fn signal(&self, name: &str) {
        if self.runs() {
            let _ = Command::new("kill").args([name, &self.0]).status();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.signal("-TERM");
    }
}

/// A libvirt, and another host with a VM of two disks: a chain that has to be joined, and one file.
struct Stage {
    lab: Lab,
    libvirt: Libvirt,
    ssh: Sshd,
    xml: PathBuf,
    untouched: Untouched,
}

impl Stage {
    fn new() -> Self {
        let (lab, libvirt, ssh) = (guest(Firmware::Bios), Libvirt::new(), Sshd::start());
        let (delta, data) = (link_over(&lab), lab.path("data.raw"));
        let at = ON_SOURCE * 512;
        assert_eq!(lab.spec.disk_size, 1 << 30);
        let write = format!("write -q -P 7 {at} 64k");
        tool("qemu-io", &["-f", "qcow2", "-c", &write, text(&delta)]);
        tool(
            "qemu-img",
            &["create", "-q", "-f", "raw", text(&data), "64M"],
        );
        tool(
            "qemu-io",
            &["-f", "raw", "-c", "write -q -P 3 8M 4M", text(&data)],
        );
        let xml = lab.libvirt_xml("two", &[&delta, &data]);
        let vm = fs::read_to_string(&xml).unwrap();
        let raw = format!("type='raw'/><source file='{}'", text(&delta));
        fs::write(&xml, vm.replace(&raw, &raw.replace("raw", "qcow2"))).unwrap();
        libvirt.give(lab.dir.path());
        let untouched = Untouched::of(&[&lab.raw, &delta, &data]);
        Self {
            lab,
            libvirt,
            ssh,
            xml,
            untouched,
        }
    }

    /// The VM on its source, and the disks of a conversion with a copy.
    fn converted(&self) -> (PathBuf, Vec<PathBuf>, Vec<PathBuf>) {
        let disks = |report: &Value| -> Vec<PathBuf> {
            let disks = report["outputs"]["disks"].as_array().unwrap();
            disks
                .iter()
                .map(|disk| disk.as_str().unwrap().into())
                .collect()
        };
        let (_, plain) = convert(&self.lab, &self.xml, "plain", &[]);
        let mut more = vec!["--copy", "later"];
        let options = self.ssh.options();
        more.extend(options.iter().map(String::as_str));
        let url = PathBuf::from(self.ssh.url(&self.xml));
        let (out, report) = convert(&self.lab, &url, "vm", &more);
        // With the key that was named.
        self.libvirt.give(self.ssh.dir.path());
        self.libvirt.give(&out);
        (out, disks(&report), disks(&plain))
    }

    fn command(&self, verb: &str, out: &Path, more: &[&str]) -> Command {
        let mut command = self.libvirt.command(Path::new(binary()));
        command.arg(verb).arg(out).args(more);
        command
    }

    fn serve(&self, out: &Path) -> (Served, Child) {
        let mut command = self.command("serve", out, &[]);
        let log = fs::File::create(self.lab.path("serve.log")).unwrap();
        let child = command.stderr(log).spawn().unwrap();
        let serving = Served(child.id().to_string());
        until("the sockets", 60, || {
            self.serve_log().matches("Serving").count() == 2
        });
        (serving, child)
    }

    /// Puts other code into the boot sector of the VM, which is off.
    fn payload(&self, out: &Path, disk: &Path, code: &[u8]) {
        let own = Served::find(out).is_none().then(|| self.serve(out));
        replace_payload(&self.lab, text(disk), code);
        if let Some((served, mut child)) = own {
            served.signal("-TERM");
            assert!(child.wait().unwrap().success());
        }
    }

    fn serve_log(&self) -> String {
        fs::read_to_string(self.lab.path("serve.log")).unwrap_or_default()
    }

    /// The disks name no other file, and the guest sees the same as after a plain conversion.
    #[track_caller]
    fn stands_alone(&self, disks: &[PathBuf], plain: &[PathBuf]) {
        for disk in disks {
            let args = ["info", "--backing-chain", "--output=json", text(disk)];
            let chain: Value = serde_json::from_slice(&tool("qemu-img", &args)).unwrap();
            assert_eq!(chain.as_array().unwrap().len(), 1);
            is_sound(disk);
        }
        same_guest(&plain[0], &disks[0]);
        let second = [text(&plain[1]), text(&disks[1])];
        tool("qemu-img", &[&["compare", "-q"][..], &second].concat());
        self.untouched.check();
    }
}

/// Checks a disk alone: its source is not served.
#[track_caller]
fn is_sound(disk: &Path) {
    let file = serde_json::json!({"driver": "file", "filename": text(disk)});
    let image = serde_json::json!({"driver": "qcow2", "file": file, "backing": null});
    tool("qemu-img", &["check", "-q", &format!("json:{image}")]);
}

fn reason(libvirt: &Libvirt) -> String {
    libvirt.virsh(&["domstate", "vm", "--reason"]).stdout
}

#[ignore = "two minutes: cargo test --test boot -- --ignored a_vm_runs_on_another_host; .ci/run has it"]
#[test]
fn a_vm_runs_on_another_host_and_outlives_outages() {
    if !able() || !have(&Sshd::TOOLS) {
        return;
    }
    let mut stage = Stage::new();
    let (out, disks, plain) = stage.converted();
    let system = disks[0].as_path();
    let live = out.join("vm.sock");

    eprintln!("who serves is killed in the first boot");
    stage.payload(
        &out,
        system,
        &boot_code("reading", false, End::Read(ON_SOURCE)),
    );
    let command = stage.command("boot", &out, &["--json", "--timeout", "90"]);
    let paused = Paused::at("boot-watching", command);
    Served::of(&out).signal("-KILL");
    let run = paused.go_on().expect(4);
    assert!(
        run.stderr.contains("hyper2kvm serve has ended"),
        "{}",
        run.stderr
    );
    stage.libvirt.virsh(&["destroy", "vm"]).expect(0);
    disks.iter().for_each(|disk| is_sound(disk));

    eprintln!("the line is down while it boots");
    stage.payload(&out, system, &boot_code(MARKER, false, End::PowerOff));
    let command = stage.command("boot", &out, &["--stop-after", "bootstrap"]);
    finish(command).expect(0);
    let reads = boot_code_on(0x3f8, &read_sector(ON_SOURCE), MARKER, End::PowerOff);
    stage.payload(&out, system, &reads);
    let command = stage.command("boot", &out, &["--json", "--timeout", "60"]);
    let paused = Paused::at("boot-final", command);
    stage.ssh.stop();
    let (ssh, libvirt, begin) = (&mut stage.ssh, &stage.libvirt, Instant::now());
    let (booted, took) = std::thread::scope(|scope| {
        scope.spawn(|| {
            until("it is paused", 90, || reason(libvirt).contains("I/O error"));
            std::thread::sleep(OUTAGE.saturating_sub(begin.elapsed()));
            ssh.again();
        });
        (paused.go_on(), begin.elapsed())
    });
    let booted = booted.expect(0);
    assert!(took > OUTAGE, "{took:?}");
    assert_eq!(booted.json()["phase"], "done");
    let said = fs::read_to_string(out.join("serve.log")).unwrap();
    for (says, log) in [
        ("is paused until its source answers", &booted.stderr),
        ("Resuming", &said),
    ] {
        assert!(log.contains(says), "{log}");
    }
    until("the VM has no more to do", 60, || {
        stage.libvirt.state("vm") == "shut off"
    });
    let served = Served::of(&out);
    served.signal("-TERM");
    until("it ends when it is asked to", 20, || {
        !served.runs() && !live.exists()
    });

    eprintln!("pulled while it runs");
    let (serving, mut child) = stage.serve(&out);
    stage.payload(&out, system, &boot_code("here", false, End::Hang));
    stage.libvirt.virsh(&["start", "vm"]).expect(0);
    let pulled = finish(stage.command("pull", &out, &["--json"]));
    let pulled = pulled.expect(0).json();
    assert_eq!(pulled["by"], "libvirt");
    assert_eq!(pulled["bytes"]["left"], 0);
    until("nobody needs it", 20, || !serving.runs());
    assert!(child.wait().unwrap().success());
    assert_eq!(stage.libvirt.state("vm"), "running");
    let xml = stage.libvirt.virsh(&["dumpxml", "vm"]).expect(0).stdout;
    assert!(!xml.contains(".sock"), "{xml}");
    stage.ssh.stop();
    stage.libvirt.virsh(&["destroy", "vm"]).expect(0);
    stage.stands_alone(&disks, &plain);
}

/// `HYPER2KVM_PAIRS` is the number of kills; the VM reads continuously.
#[ignore = "minutes: HYPER2KVM_PAIRS=3 cargo test --test boot -- --ignored serves_killed; .ci/campaign serves has it"]
#[test]
fn serves_killed_at_any_moment() {
    // `.ci/run` runs the ignored tests of this file.
    let kills = std::env::var("HYPER2KVM_PAIRS").ok();
    let kills: u32 = kills.and_then(|n| n.parse().ok()).unwrap_or(1);
    if !able() || !have(&Sshd::TOOLS) {
        return;
    }
    let stage = Stage::new();
    let (out, disks, plain) = stage.converted();
    let system = disks[0].as_path();
    stage.payload(
        &out,
        system,
        &boot_code("reading", true, End::Read(ON_SOURCE)),
    );
    let xml = out.join("vm-final.xml");
    stage.libvirt.virsh(&["define", text(&xml)]).expect(0);
    let (mut paused, mut counted) = (0, 0);
    for n in 0..kills {
        let (serving, mut child) = stage.serve(&out);
        // Its writes are there after each start.
        let now = u32::from(counter(text(system)));
        assert!(
            now == counted || now == (counted + 1) % 256,
            "{counted}, {now}"
        );
        counted = now;
        stage.libvirt.virsh(&["start", "vm"]).expect(0);
        std::thread::sleep(Duration::from_millis(u64::from(n % 17) * 200));
        serving.signal("-KILL");
        child.wait().unwrap();
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(2) && !reason(&stage.libvirt).contains("I/O") {
            std::thread::sleep(Duration::from_millis(100));
        }
        paused += u32::from(reason(&stage.libvirt).contains("I/O error"));
        stage.libvirt.virsh(&["destroy", "vm"]).expect(0);
        disks.iter().for_each(|disk| is_sound(disk));
    }
    // Once more, up to the end.
    let (_serving, mut child) = stage.serve(&out);
    stage.libvirt.virsh(&["start", "vm"]).expect(0);
    until("it reads", 30, || {
        u32::from(counter(text(system))) != counted
    });
    finish(stage.command("pull", &out, &[])).expect(0);
    assert!(child.wait().unwrap().success());
    stage.libvirt.virsh(&["destroy", "vm"]).expect(0);
    stage.stands_alone(&disks, &plain);
    eprintln!("{kills} kills: {paused} VMs were paused, and {counted} starts counted");
}
