//! A VM of libvirt that writes continuously while it is synced: pull-mode backups with checkpoints,
//! with the documents of `docs/warm.md`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use hyper2kvm::demo::Firmware;
use serde_json::Value;

use crate::libvirt::{Libvirt, able};
use crate::payload::{End, boot_code, guest};
use crate::support::{Lab, binary, finish, h2k, have, tool, virtio_win};

const RUNBOOK: &str = include_str!("../../docs/warm.md");

fn until(what: &str, ready: impl Fn() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < Duration::from_secs(60), "not yet: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An image of the guest whose boot sector writes to the first track in a loop.
fn writing_guest() -> (Lab, PathBuf) {
    let lab = guest(Firmware::Bios);
    let code = lab.path("code");
    fs::write(&code, boot_code("writing", false, End::Work)).unwrap();
    let image = lab.path("vda.qcow2");
    let convert = ["convert", "-f", "raw", "-O", "qcow2"];
    let files = [lab.raw.to_str().unwrap(), image.to_str().unwrap()];
    tool("qemu-img", &[&convert[..], &files].concat());
    let write = format!("write -q -s {} 0 440", code.display());
    tool("qemu-io", &["-f", "qcow2", "-c", &write, files[1]]);
    (lab, image)
}

fn domain(image: &Path, com1: &Path) -> String {
    format!(
        "<domain type='qemu'><name>VM</name><memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/><target dev='vda' bus='virtio'/></disk>
    <serial type='file'><source path='{}'/></serial><memballoon model='none'/>
  </devices>
</domain>",
        image.display(),
        com1.display()
    )
}

/// The document of a pass as in the runbook, with paths of this test.
fn backup(pass: usize, socket: &Path, scratch: &Path) -> String {
    let start = RUNBOOK.find("<domainbackup").unwrap();
    let end = start + RUNBOOK[start..].find("</domainbackup>").unwrap();
    let text = &RUNBOOK[start..end + "</domainbackup>".len()];
    let last = format!("<incremental>pass{}</incremental>", pass - 1);
    assert!(text.contains("<incremental>pass1</incremental>"));
    let text = text
        .replace("/run/vm/backup.sock", socket.to_str().unwrap())
        .replace("/var/tmp/vda.scratch", scratch.to_str().unwrap());
    match pass {
        1 => text
            .replace("<incremental>pass1</incremental>", "")
            .replace(" exportbitmap='vda'", ""),
        _ => text.replace("<incremental>pass1</incremental>", &last),
    }
}

/// The first track, where the guest writes, as hexadecimal text.
fn track(disk: &Path) -> String {
    let args = ["-r", "-f", "qcow2", "-c", "read -v 4096 258048"];
    let dump = tool("qemu-io", &[&args[..], &[disk.to_str().unwrap()]].concat());
    let dump = String::from_utf8(dump).unwrap();
    let bytes = |line: &&str| line.starts_with('0');
    dump.lines().filter(bytes).collect::<Vec<_>>().join("\n")
}

fn last_pass(sync: &Value) -> &Value {
    sync["sync"]["passes"].as_array().unwrap().last().unwrap()
}

#[test]
fn a_vm_of_libvirt_is_synced_while_it_writes() {
    if !able() || !have(&["qemu-nbd"]) {
        return;
    }
    let ((lab, image), libvirt) = (writing_guest(), Libvirt::new());
    let (com1, socket) = (lab.path("com1.log"), lab.path("backup.sock"));
    let xml = |name: &str, text: &str| {
        fs::write(lab.path(name), text).unwrap();
        lab.path(name).to_str().unwrap().to_owned()
    };
    let define = xml("vm.xml", &domain(&image, &com1));
    libvirt.give(lab.dir.path());
    libvirt.virsh(&["define", &define]).expect(0);
    libvirt.virsh(&["start", "VM"]).expect(0);
    let marks = || fs::read(&com1).map_or(0, |log| log.iter().filter(|b| **b == b'.').count());
    until("it writes", || marks() > 0);

    let out = lab.path("out");
    let url = format!("nbd+unix:///vda?socket={}", socket.display());
    for pass in 1..=3 {
        let scratch = lab.path(&format!("scratch-{pass}"));
        let begin = xml("backup.xml", &backup(pass, &socket, &scratch));
        let point = format!("<domaincheckpoint><name>pass{pass}</name></domaincheckpoint>");
        let point = xml("checkpoint.xml", &point);
        libvirt
            .virsh(&["backup-begin", "VM", &begin, &point])
            .expect(0);
        let before = marks();
        let sync = h2k(["sync", "--json", &url, "-o", out.to_str().unwrap()]).expect(0);
        let sync = sync.json();
        let copied = last_pass(&sync)["copied"].as_u64().unwrap();
        match pass {
            1 => assert!(copied > 10 << 20, "{copied}"),
            // The first track, in units of 64 KiB.
            _ => assert!((1..=8 << 16).contains(&copied), "{pass}: {copied}"),
        }
        until("it still writes", || marks() > before);
        libvirt.virsh(&["domjobabort", "VM"]).expect(0);
    }
    // Its bitmap is saved when QEMU ends in order.
    libvirt.virsh(&["destroy", "VM", "--graceful"]).expect(0);
    let log = fs::read_to_string(&com1).unwrap();
    assert!(!log.contains('B'), "it read what it had not written");

    let _ = fs::remove_file(&socket);
    let serve = RUNBOOK.find("`qemu-nbd -r -t").unwrap() + 1;
    let serve = RUNBOOK[serve..].split('`').next().unwrap();
    let serve = serve
        .replace("/run/vm/backup.sock", socket.to_str().unwrap())
        .replace("pass2", "pass3")
        .replace("vda.qcow2", image.to_str().unwrap());
    let mut words = serve.split_whitespace();
    let server = Command::new(words.next().unwrap()).args(words).spawn();
    let _server = Server(server.unwrap());
    until("the server", || socket.exists());
    let mut command = Command::new(binary());
    command
        .args(["convert", "--json", &url, "--from-sync", "--verify-copy"])
        .args(["--budget", "600", "--name", "vm", "-o"])
        .arg(&out)
        .arg("--virtio-iso")
        .arg(virtio_win());
    let report = finish(command).expect(0).json();
    let copied = report["sync"]["last"]["copied"].as_u64().unwrap();
    let passes = report["sync"]["passes"].as_array().unwrap().len();
    assert_eq!((passes, report["ready"].as_bool()), (3, Some(true)));
    // Its writes since the third pass, and those of the fix.
    assert!((1..20 << 20).contains(&copied), "{copied}");
    let (was, is) = (track(&image), track(&out.join("vm.qcow2")));
    assert!(was == is, "the first tracks differ");
    // A byte for each sector that it wrote.
    let written = was
        .split_whitespace()
        .filter(|word| word.len() == 2 && *word != "00");
    assert!(written.count() > 200);
}
