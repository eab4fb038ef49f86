//! A VM that runs on a disk of another host: who serves it, and what an outage does to it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hyper2kvm::demo::Firmware;
use serde_json::Value;

use crate::libvirt::{Libvirt, able};
use crate::payload::{End, boot_code, guest};
use crate::support::{binary, finish, have, sha256, tool};
use crate::{convert, replace_payload};

/// The other host.
struct Nbd(Child);

impl Nbd {
    fn start(disk: &Path, socket: &Path) -> Self {
        let _ = fs::remove_file(socket);
        let mut command = Command::new("qemu-nbd");
        command.args(["-r", "-t", "-e", "16", "-f", "raw", "-x", "disk", "-k"]);
        command.arg(socket).arg(disk).stderr(Stdio::null());
        let server = Self(command.spawn().unwrap());
        until("the server", 20, || socket.exists());
        // For whoever boots and for who converts.
        fs::set_permissions(socket, fs::Permissions::from_mode(0o666)).unwrap();
        server
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

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
    /// Whoever it is that `boot` has named.
    fn named(stderr: &str) -> Self {
        let (_, rest) = stderr.split_once("by process ").expect(stderr);
        Self(rest.split(',').next().unwrap().to_owned())
    }

    fn runs(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    }

    fn ask(&self) {
        if self.runs() {
            let _ = Command::new("kill").arg(&self.0).status();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.ask();
    }
}

#[test]
#[ignore = "a minute: cargo test --test boot -- --ignored a_vm_runs_on_another_host; .ci/run has it"]
fn a_vm_runs_on_another_host_and_outlives_an_outage() {
    if !able() || !have(&["qemu-nbd"]) {
        return;
    }
    let (lab, libvirt) = (guest(Firmware::Bios), Libvirt::new());
    libvirt.give(lab.dir.path());
    let digest = sha256(&lab.raw);
    let host = tempfile::tempdir().unwrap();
    fs::set_permissions(host.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let socket = host.path().join("s");
    let nbd = Nbd::start(&lab.raw, &socket);
    let url = format!("nbd+unix:///disk?socket={}", socket.display());
    let (out, report) = convert(&lab, &PathBuf::from(&url), "vm", &["--copy", "later"]);
    libvirt.give(&out);
    let disk = report["outputs"]["disks"][0].as_str().unwrap();

    eprintln!("both boots, and who serves continues");
    let booted = libvirt.boot(&out, &["--timeout", "120"]).expect(0);
    assert_eq!(booted.json()["phase"], "done");
    let served = Served::named(&booted.stderr);
    assert!(served.runs());
    let live = out.join("vm.sock");
    assert!(live.exists());
    until("the VM has no more to do", 60, || {
        libvirt.state("vm") == "shut off"
    });
    served.ask();
    until("it ends when it is asked to", 20, || {
        !served.runs() && !live.exists()
    });

    eprintln!("an outage while the VM starts");
    let mut command = libvirt.command(Path::new(binary()));
    command.arg("serve").arg(&out);
    let log = fs::File::create(lab.path("serve.log")).unwrap();
    let mut child = command.stderr(log).spawn().unwrap();
    let serving = Served(child.id().to_string());
    until("the socket", 60, || live.exists());
    drop(nbd);
    libvirt.virsh(&["start", "vm"]).expect(0);
    let reason = || libvirt.virsh(&["domstate", "vm", "--reason"]).stdout;
    let begin = Instant::now();
    until("it is paused", 60, || reason().contains("I/O error"));
    // Windows would have given up after 20 s.
    let paused = begin.elapsed();
    assert!(paused < Duration::from_secs(30), "{paused:?}");
    let nbd = Nbd::start(&lab.raw, &socket);
    until("it is resumed, and ends on its own", 60, || {
        libvirt.state("vm") == "shut off"
    });
    let said = fs::read_to_string(lab.path("serve.log")).unwrap();
    assert!(said.contains("Resuming"), "{said}");

    eprintln!("pulled while it runs");
    replace_payload(&lab, disk, &boot_code("here", false, End::Hang));
    libvirt.virsh(&["start", "vm"]).expect(0);
    let mut command = libvirt.command(Path::new(binary()));
    command.arg("pull").arg(&out).arg("--json");
    let pulled = finish(command).expect(0).json();
    assert_eq!(
        (&pulled["by"], &pulled["bytes"]["left"]),
        (&"libvirt".into(), &0.into())
    );
    until("nobody needs it", 20, || !serving.runs());
    assert!(child.wait().unwrap().success());
    drop(serving);
    drop(nbd);
    let xml = libvirt.virsh(&["dumpxml", "vm"]).expect(0).stdout;
    assert!(!xml.contains("vm.sock"), "{xml}");
    let args = ["info", "-U", "--backing-chain", "--output=json", disk];
    let chain: Value = serde_json::from_slice(&tool("qemu-img", &args)).unwrap();
    assert_eq!(chain.as_array().unwrap().len(), 1);
    libvirt.virsh(&["destroy", "vm"]).expect(0);
    tool("qemu-img", &["check", "-q", disk]);
    assert_eq!(sha256(&lab.raw), digest);
}
