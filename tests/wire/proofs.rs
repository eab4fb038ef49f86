//! Promises about sources on the wire: the amount fetched, the memory needed, and that an
//! interrupted copy continues.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper2kvm::block::FileDisk;
use hyper2kvm::demo::{Arch, DemoVolume, ExtraFile, GuestSpec, Role, WinVersion, guest};
use hyper2kvm::guest::ntfs3g::MountOptions;
use hyper2kvm::guest::{EmbeddedWriter, GuestPath, GuestWrite, VolumeId};
use serde_json::Value;

use super::support::{
    self, Lab, Paused, Run, corpus, finish, names, processes_naming, sha256, skip, text, tree,
};
use super::{live_bytes, ready};
use crate::support::wire::{Line, Nginx, Sshd};

const MIB: u64 = 1 << 20;

/// Bytes that do not compress.
pub fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len as usize);
    while (bytes.len() as u64) < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

/// The benchmark's dirty disk, smaller: live and deleted files alternate, and there is a page file.
pub fn dirty(live: u64, deleted: u64) -> Lab {
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = 768 * MIB + 2 * (live + deleted) * MIB;
    spec.recovery = false;
    spec.pagefile_size = 32 * MIB;
    let lab = Lab::new(spec);
    let volume = VolumeId::new(lab.spec.partition(Role::Windows).unwrap().index);
    let disk = Arc::new(FileDisk::open_rw(&lab.raw).unwrap());
    let layout = guest::layout(&lab.spec);
    let mut writer = Box::new(EmbeddedWriter::new(disk, &layout, MountOptions::default()));
    let path = |name: String| GuestPath::parse(&name).unwrap();
    for i in 0..8 {
        for (name, mib) in [("live", live), ("deleted", deleted)] {
            let bytes = noise(mib * MIB / 8, i + 9);
            writer
                .write_file(volume, &path(format!("{name}{i}")), &bytes)
                .unwrap();
        }
    }
    for i in 0..8 {
        writer
            .remove_file(volume, &path(format!("deleted{i}")))
            .unwrap();
    }
    writer.close().unwrap();
    lab
}

/// A source on the wire, and the options that reach it.
struct Access {
    url: String,
    options: Vec<String>,
}

impl Access {
    fn command(&self, verb: &str, more: &[&str]) -> std::process::Command {
        let mut command = support::command(verb, Path::new(&self.url), more);
        command.args(&self.options).arg("--json");
        command
    }

    fn run(&self, verb: &str, more: &[&str]) -> Run {
        finish(self.command(verb, more))
    }
}

/// The two protocols, over a line that can be cut.
enum Host {
    Ssh(Sshd),
    Https(Nginx),
}

impl Host {
    fn both(root: &Path) -> [Self; 2] {
        [Self::Ssh(Sshd::start()), Self::Https(Nginx::start(root))]
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Ssh(_) => "ssh",
            Self::Https(_) => "https",
        }
    }

    /// A line to it, and how the file is reached over that.
    fn over_a_line(&self, file: &Path) -> (Line, Access) {
        let (port, mut url, mut options) = match self {
            Self::Ssh(host) => (host.port, host.url(file), host.options()),
            Self::Https(host) => {
                let name = file.file_name().unwrap().to_str().unwrap();
                (host.port, host.url(name), host.options())
            }
        };
        let line = Line::to(port, Duration::ZERO);
        url = url.replace(&format!(":{port}/"), &format!(":{}/", line.port));
        if let Self::Ssh(host) = self {
            // The same key, by the name of the line.
            let known = host.dir.path().join("known_hosts");
            let keys = fs::read_to_string(&known).unwrap();
            let more = keys.replace(&port.to_string(), &line.port.to_string());
            fs::write(&known, keys + &more).unwrap();
        }
        options.extend(["--retries".into(), "1".into()]);
        (line, Access { url, options })
    }
}

fn number(report: &Value, name: &str) -> u64 {
    report["bytes"][name].as_u64().unwrap()
}

/// Every file of a converted disk, by name, without data that dates the conversion.
fn files(disk: &Path, work: &Path) -> BTreeMap<(u32, String), Option<Vec<u8>>> {
    let raw = work.join("as.raw");
    support::as_raw(disk, &raw);
    let files = tree(&raw);
    fs::remove_file(raw).unwrap();
    files
}

/// Fails unless both disks have the same files; a hive differs by the times of its keys only.
#[track_caller]
pub fn same_files(a: &Path, b: &Path, work: &Path) {
    let (a, b) = (files(a, work), files(b, work));
    let named = |files: &BTreeMap<(u32, String), Option<Vec<u8>>>| {
        files.keys().cloned().collect::<Vec<_>>()
    };
    assert_eq!(named(&a), named(&b));
    assert!(a.len() > 50, "{}", a.len());
    for (name, contents) in &a {
        if *contents == b[name] {
            continue;
        }
        let (Some(one), Some(other)) = (contents, &b[name]) else {
            panic!("{name:?} is a file in one only");
        };
        let differ = one.iter().zip(other).filter(|(a, b)| a != b).count();
        let hive = name.1.contains("/System32/config/");
        assert!(
            hive && one.len() == other.len() && differ < 4096,
            "{name:?}: {differ} bytes differ, of {} and {}",
            one.len(),
            other.len()
        );
    }
}

/// The most memory that each process of a run had, without the pages of its program's file.
fn memory(process: u32) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    let mut left = vec![process];
    while let Some(id) = left.pop() {
        let at = format!("/proc/{id}");
        let status = fs::read_to_string(format!("{at}/status")).unwrap_or_default();
        let kib = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse().ok())
                .unwrap_or(0)
        };
        let line = fs::read(format!("{at}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let most = kib("VmHWM:").saturating_sub(kib("RssFile:")) << 10;
        all.insert(format!("{id} {line}"), most);
        for thread in fs::read_dir(format!("{at}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let children = fs::read_to_string(thread.path().join("children"));
            let children = children.unwrap_or_default();
            left.extend(children.split(' ').filter_map(|id| id.parse::<u32>().ok()));
        }
    }
    all
}

#[test]
fn a_dirty_disk_crosses_the_wire_by_its_live_bytes_alone() {
    if !ready(&[&Sshd::TOOLS[..], &Nginx::TOOLS[..]].concat()) {
        return;
    }
    let lab = dirty(80, 160);
    let local = lab.path("local");
    let options = ["-o", text(&local), "--name", "vm"];
    finish(support::command("convert", &lab.raw, &options)).expect(0);
    for host in Host::both(lab.dir.path()) {
        let name = host.name();
        let (_line, access) = host.over_a_line(&lab.raw);
        let out = lab.path(name);
        let paused = Paused::at(
            "copied",
            access.command("convert", &["-o", text(&out), "--name", "vm"]),
        );
        // All is fetched, and whoever dials is still there.
        let memory = memory(paused.id());
        let report = paused.go_on().expect(0).json();
        let (fetched, live) = (number(&report, "fetched"), live_bytes(&report));
        assert!(live < 160 * MIB, "{live} bytes live");
        assert!(
            fetched <= live / 10 * 11,
            "{name}: {fetched} bytes of {live} live ones"
        );
        same_files(
            &out.join("vm.qcow2"),
            &local.join("vm.qcow2"),
            lab.dir.path(),
        );
        let dialler = memory.iter().find(|(line, _)| line.contains("__wire"));
        assert!(dialler.is_some(), "{memory:?}");
        let all: u64 = memory.values().sum();
        assert!(all < 150 * MIB, "{name}: {all} bytes: {memory:#?}");
    }
}

#[test]
fn a_copy_over_a_line_that_was_cut_continues() {
    if !ready(&[&Sshd::TOOLS[..], &Nginx::TOOLS[..]].concat()) {
        return;
    }
    let lab = dirty(48, 16);
    let local = lab.path("local");
    let options = ["-o", text(&local), "--name", "vm"];
    finish(support::command("convert", &lab.raw, &options)).expect(0);
    let source = sha256(&lab.raw);
    for host in Host::both(lab.dir.path()) {
        let name = host.name();
        let (line, access) = host.over_a_line(&lab.raw);
        let out = lab.path(name);
        let options = ["-o", text(&out), "--name", "vm"];
        let slow = [&options[..], &["--bandwidth", "16"]].concat();
        let child = access
            .command("convert", &slow)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let journal = lab.path(&format!(".{name}.partial/.work/copy-0.journal"));
        let start = Instant::now();
        while fs::read_to_string(&journal).map_or(0, |text| text.lines().count()) < 2 {
            assert!(start.elapsed() < Duration::from_secs(60), "{name}");
            std::thread::sleep(Duration::from_millis(10));
        }
        line.cut(true);
        let output = child.wait_with_output().unwrap();
        let run = support::ended(output).expect(1);
        let said = &run.stderr;
        assert!(said.contains("on the wire: "), "{name}: {said}");
        assert!(said.contains("--resume"), "{name}: {said}");
        assert!(!out.exists(), "{name}");
        // The line is still down: an error again, and nothing is lost.
        let more = [&options[..], &["--resume"]].concat();
        access.run("convert", &more).expect(1);
        line.cut(false);
        let report = access.run("convert", &more).expect(0).json();
        let resumed = number(&report, "resumed");
        assert!(resumed >= 8 * MIB, "{name}: {resumed} bytes were kept");
        // What was kept is not fetched again.
        let (fetched, live) = (number(&report, "fetched"), live_bytes(&report));
        assert!(
            fetched + resumed <= live / 10 * 12,
            "{name}: {fetched} of {live}"
        );
        assert_eq!(report["ready"], true, "{name}");
        same_files(
            &out.join("vm.qcow2"),
            &local.join("vm.qcow2"),
            lab.dir.path(),
        );
        let left = names(lab.dir.path());
        assert!(!left.iter().any(|n| n.contains(".partial")), "{left:?}");
    }
    assert_eq!(sha256(&lab.raw), source, "the source");
    let left = processes_naming(lab.dir.path());
    assert!(!left.iter().any(|p| p.contains("__wire")), "{left:?}");
}

#[test]
fn inspect_fetches_real_hives_and_little_more() {
    if !ready(&[&Sshd::TOOLS[..], &Nginx::TOOLS[..]].concat()) {
        return;
    }
    let (Some(system), Some(software)) = (
        corpus("win7-x86-vmware/SYSTEM"),
        corpus("win7-x86-vmware/SOFTWARE"),
    ) else {
        return skip("real hives", "the corpus is not there");
    };
    let mut spec = GuestSpec::new(WinVersion::Win7);
    spec.arch = Arch::X86;
    spec.disk_size = 2 << 30;
    let hives = (system.len() + software.len()) as u64;
    (spec.system_hive, spec.software_hive) = (Some(system), Some(software));
    spec.extra_files.push(ExtraFile {
        place: DemoVolume::Windows,
        path: "Data\\noise.bin".into(),
        contents: noise(64 * MIB, 5),
    });
    let lab = Lab::new(spec);
    let facts = |document| super::facts(document);
    let here = finish(support::command("inspect", &lab.raw, &["--json"])).expect(0);
    let here = facts(here.json());
    for host in Host::both(lab.dir.path()) {
        let (_line, access) = host.over_a_line(&lab.raw);
        let there = access.run("inspect", &[]).expect(0).json();
        let fetched = number(&there, "fetched");
        assert!(
            fetched <= hives + 4 * MIB,
            "{}: {fetched} bytes for hives of {hives}",
            host.name()
        );
        assert_eq!(facts(there), here);
    }
}
