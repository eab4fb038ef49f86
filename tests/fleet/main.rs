//! Many VMs: `convert --batch`, `inspect` of several, evidence for a support case, and the contents
//! of `docs/fleet`.

#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // skips must be seen

#[path = "../support/mod.rs"]
mod support;

mod batch;
mod documents;
mod support_case;
mod tables;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hyper2kvm::block::FileDisk;
use hyper2kvm::demo::{DemoVolume, ExtraFile, GuestSpec, Role, WinVersion, guest};
use hyper2kvm::guest::ntfs3g::MountOptions;
use hyper2kvm::guest::{EmbeddedWriter, GuestPath, GuestWrite, VolumeId};
use hyper2kvm::tool::host::{self, PackageManager};
use serde_json::Value;
use support::{
    Run, TOOLS, binary, blocks, finish, h2k, have, processes_naming, sha256, virtio_win,
};

/// Files that a running Windows would have written, and files that must never be collected.
const LOGS: [(&str, usize); 7] = [
    (r"Windows\INF\setupapi.dev.log", 3000),
    (r"Windows\INF\setupapi.setup.log", 17 << 20),
    (r"Windows\INF\oem1.pnf", 10),
    (r"Windows\System32\winevt\Logs\System.evtx", 69632),
    (r"Windows\hyper2kvm\firstboot.log", 100),
    (r"Windows\System32\config\SAM", 4096),
    (r"Windows\System32\config\SECURITY", 4096),
];

/// One guest for all tests here; every VM of a list is a copy of it.
fn guest_image() -> &'static Path {
    static GUEST: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    &GUEST
        .get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let raw = dir.path().join("guest.raw");
            let mut spec = GuestSpec::new(WinVersion::Server2022);
            for (path, size) in LOGS {
                spec.extra_files.push(ExtraFile {
                    place: DemoVolume::Windows,
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

    /// Writes `fleet.yaml` with these VMs.
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
