//! The output directory: the files that `--force` replaces or keeps, two runs at a time, kills
//! while a result is replaced, and permissions.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // which case is running

#[path = "../support/mod.rs"]
mod support;

mod access;
mod installed;
mod killed;
mod replaced;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{
    Lab, LoopOver, Mounted, Paused, Run, TOOLS, binary, create_overlay, finish, h2k, have, names,
    sha256, skip, text, tool, virtio_win,
};

fn command(source: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = support::command("convert", source, more);
    command.arg("-o").arg(out);
    command
}

fn convert(source: &Path, out: &Path, more: &[&str]) -> Run {
    finish(command(source, out, more))
}

/// A whole result: its disk is one that `verify` accepts.
#[track_caller]
fn whole(out: &Path, name: &str) {
    h2k(["verify", text(&out.join(format!("{name}.qcow2")))]).expect(0);
    assert!(out.join("report.json").exists());
}

struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Locks an image like a running VM.
fn hold(disk: &Path) -> Holder {
    let start = Instant::now();
    loop {
        let mut command = Command::new("qemu-io");
        let child = command
            .args(["-f", "qcow2"])
            .arg(disk)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let holder = Holder(child);
        // Who looks has the image open too: a qemu-io that comes at that moment stays without it.
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(250));
            let mut info = Command::new("qemu-img");
            if !info
                .arg("info")
                .arg(disk)
                .output()
                .unwrap()
                .status
                .success()
            {
                return holder;
            }
        }
        assert!(start.elapsed() < Duration::from_secs(60), "nobody holds it");
    }
}

/// Without a libvirt: the files are moved before it is asked.
fn install(out: &Path, to: &Path, point: &str) -> Command {
    let mut command = Command::new(binary());
    command
        .arg("boot")
        .arg(out)
        .arg("--install-to")
        .arg(to)
        .args(["--connect", "test:///default"])
        .env("HYPER2KVM_FAILPOINT", point);
    command
}

fn report(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap()
}

fn disk(out: &Path) -> PathBuf {
    report(out)["outputs"]["disks"][0].as_str().unwrap().into()
}
