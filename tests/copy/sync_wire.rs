//! `sync` of a VM on another host whose disks are chains of VMDK files there.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::support::wire::Sshd;
use super::support::{Lab, Run, TOOLS, have, sha256, text, tool};
use super::sync::{file_in, lab, last_pass, run, write, write_differences};
use super::{MIB, noise};

const DATA: u64 = 64 * MIB;

/// A VM of two disks and what each reads as, in a directory that stands for a datastore.
struct Vm {
    lab: Lab,
    vmx: PathBuf,
    sshd: Sshd,
    options: Vec<String>,
}

impl Vm {
    fn new() -> Self {
        let lab = lab();
        write(&lab, &lab.raw, "first.bin", &noise(20 * MIB as usize, 1));
        fs::write(lab.path("data.raw"), noise(DATA as usize, 7)).unwrap();
        for (raw, base) in [("guest.raw", "vm.vmdk"), ("data.raw", "data.vmdk")] {
            let (raw, base) = (lab.path(raw), lab.path(base));
            let convert = ["convert", "-f", "raw", "-O", "vmdk"];
            tool(
                "qemu-img",
                &[&convert[..], &[text(&raw), text(&base)]].concat(),
            );
        }
        let sshd = Sshd::start();
        Self {
            vmx: lab.path("guest.vmx"),
            options: sshd.options(),
            lab,
            sshd,
        }
    }

    /// An empty link over another one.
    fn link(&self, below: &str, name: &str) -> PathBuf {
        let (below, link) = (self.lab.path(below), self.lab.path(name));
        let create = ["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b"];
        tool(
            "qemu-img",
            &[&create[..], &[text(&below), text(&link)]].concat(),
        );
        link
    }

    /// The VM writes to these from now on.
    fn runs_on(&self, links: [&str; 2]) {
        let mut vmx = "displayName = \"guest\"\nmemsize = \"2048\"\nfirmware = \"efi\"\n\
                       scsi0.present = \"TRUE\"\nscsi0.virtualDev = \"lsisas1068\"\n"
            .to_owned();
        for (i, link) in links.iter().enumerate() {
            vmx += &format!("scsi0:{i}.present = \"TRUE\"\nscsi0:{i}.fileName = \"{link}\"\n");
        }
        fs::write(&self.vmx, vmx).unwrap();
    }

    fn run(&self, verb: &str, more: &[&str]) -> Run {
        let options: Vec<&str> = self.options.iter().map(String::as_str).collect();
        let url = PathBuf::from(self.sshd.url(&self.vmx));
        run(
            verb,
            &url,
            &self.lab.path("out"),
            &[&options[..], more].concat(),
            "",
        )
    }

    /// Another state of the disk with Windows, in `link`.
    fn write(&self, link: &Path, states: [&str; 2], file: &str, bytes: &[u8]) {
        let [before, now] = states.map(|state| self.lab.path(state));
        tool("cp", &["--sparse=always", text(&before), text(&now)]);
        write(&self.lab, &now, file, bytes);
        write_differences(&self.lab, link, "vmdk", &before, &now);
    }
}

#[test]
fn a_vm_of_two_chains_is_synced_over_ssh() {
    if !have(&TOOLS) || !have(&["qemu-io"]) || !have(&Sshd::TOOLS) {
        return;
    }
    let vm = Vm::new();
    let copied = |run: Run| {
        let pass = last_pass(&run.expect(0));
        let number = |name: &str| pass[name].as_u64().unwrap();
        (number("copied"), number("left"))
    };
    // A snapshot of both.
    let one = vm.link("vm.vmdk", "vm-1.vmdk");
    let data_one = vm.link("data.vmdk", "data-1.vmdk");
    vm.runs_on(["vm-1.vmdk", "data-1.vmdk"]);
    let (first, left) = copied(vm.run("sync", &[]));
    assert!(first > DATA + 20 * MIB, "{first}");
    assert!(left < MIB, "{left}");
    // What the VM writes to both is left, and copied once it is frozen.
    vm.write(
        &one,
        ["guest.raw", "one.raw"],
        "second.bin",
        &noise(4 * MIB as usize, 2),
    );
    let write = |at: &str, byte: &str, link: &Path| {
        let write = format!("write -q -P {byte} {at} 2M");
        tool("qemu-io", &["-f", "vmdk", "-c", &write, text(link)]);
    };
    write("8M", "3", &data_one);
    let (nothing, left) = copied(vm.run("sync", &[]));
    assert_eq!(nothing, 0);
    assert!((6 * MIB..12 * MIB).contains(&left), "{left}");
    vm.link("vm-1.vmdk", "vm-2.vmdk");
    vm.link("data-1.vmdk", "data-2.vmdk");
    vm.runs_on(["vm-2.vmdk", "data-2.vmdk"]);
    let (second, _) = copied(vm.run("sync", &[]));
    assert!((6 * MIB..12 * MIB).contains(&second), "{second}");

    // The snapshots were merged into one, and there is another.
    let merged = vm.link("vm.vmdk", "merged.vmdk");
    vm.write(
        &merged,
        ["guest.raw", "merged.raw"],
        "second.bin",
        &noise(4 * MIB as usize, 2),
    );
    let top = vm.link("merged.vmdk", "top.vmdk");
    let data_top = vm.link("data-1.vmdk", "data-top.vmdk");
    vm.runs_on(["top.vmdk", "data-top.vmdk"]);
    let (again, _) = copied(vm.run("sync", &[]));
    assert!(again < 12 * MIB, "{again}");
    // Power-off.
    vm.write(
        &top,
        ["merged.raw", "top.raw"],
        "first.bin",
        &noise(5 * MIB as usize, 5),
    );
    write("20M", "4", &data_top);
    // One of the lowest links was written to: nothing tells where.
    let base = File::options()
        .write(true)
        .open(vm.lab.path("data.vmdk"))
        .unwrap();
    let was = base.metadata().unwrap().modified().unwrap();
    base.set_modified(was + Duration::from_secs(60)).unwrap();
    for (verb, more) in [
        ("sync", &[][..]),
        ("plan", &["--from-sync"]),
        ("convert", &["--from-sync"]),
    ] {
        let refused = vm.run(verb, more).expect(3);
        assert!(
            refused.stderr.contains("sync-base-changed"),
            "{}",
            refused.stderr
        );
    }
    base.set_modified(was).unwrap();

    let files = ["vm.vmdk", "merged.vmdk", "top.vmdk", "data-top.vmdk"];
    let digests = || files.map(|file| sha256(&vm.lab.path(file)));
    let before = digests();
    let more = ["--from-sync", "--verify-copy", "--budget", "600"];
    let report = vm.run("convert", &more).expect(0).json();
    assert_eq!(report["transport"], "ssh");
    assert_eq!(report["sync"]["passes"].as_array().unwrap().len(), 4);
    let last = report["sync"]["last"]["copied"].as_u64().unwrap();
    assert!((7 * MIB..30 * MIB).contains(&last), "{last}");
    assert_eq!(digests(), before);
    let disk = vm.lab.path("out/guest.qcow2");
    assert!(file_in(&vm.lab, &disk, "first.bin") == noise(5 * MIB as usize, 5));
    assert!(file_in(&vm.lab, &disk, "second.bin") == noise(4 * MIB as usize, 2));
    let mut data = noise(DATA as usize, 7);
    let mut put = |at: u64, byte: u8| data[(at * MIB) as usize..][..2 * MIB as usize].fill(byte);
    put(8, 3);
    put(20, 4);
    assert!(fs::read(vm.lab.raw_result(&vm.lab.path("out/guest-1.qcow2"))).unwrap() == data);
}
