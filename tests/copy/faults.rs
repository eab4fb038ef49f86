//! A copy that cannot continue leaves nothing, and a long one takes no more memory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hyper2kvm::demo::{Arch, DemoVolume, ExtraFile, GuestSpec, WinVersion};

use super::support::{
    self, Lab, Run, TOOLS, binary, corpus, finish, have, names, processes_naming, sha256, skip,
    text, virtio_win,
};
use super::{MIB, machine, noise};

/// `convert` of a source into `out`, as a command still to be run.
fn convert(source: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command
        .arg("convert")
        .arg(source)
        .arg("--virtio-iso")
        .arg(virtio_win())
        .arg("-o")
        .arg(out)
        .args(more);
    command
}

#[test]
fn one_disk_that_fails_stops_all() {
    if !have(&TOOLS) || !have(&["sh"]) {
        return;
    }
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = 1 << 30;
    spec.pagefile_size = 0;
    let lab = Lab::new(spec);
    let data = lab.path("data.raw");
    fs::write(&data, noise(160 * MIB as usize, 5)).unwrap();
    let xml = machine(&lab, &[&lab.raw, &data]);
    let digests = [sha256(&lab.raw), sha256(&data)];
    let before = names(lab.dir.path());
    // No file may become larger than this: the Windows disk fits, the other one does not.
    let limit = 120 * MIB;
    let limited = |command: &Command| -> Run {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", "ulimit -f \"$0\" && exec \"$@\""])
            .arg((limit / 512).to_string())
            .arg(command.get_program())
            .args(command.get_args());
        finish(shell)
    };
    let run = limited(&convert(&xml, &lab.path("out"), &[])).expect(1);
    assert!(run.stderr.contains("Copying"), "{}", run.stderr);
    assert!(run.stderr.contains("many-1.qcow2"), "{}", run.stderr);
    // The copied data can be continued after the limit is raised.
    assert!(run.stderr.contains("--resume"), "{}", run.stderr);
    std::fs::remove_dir_all(lab.path(".out.partial")).unwrap();
    assert_eq!(names(lab.dir.path()), before);
    assert!(processes_naming(lab.dir.path()).is_empty());
    assert_eq!([sha256(&lab.raw), sha256(&data)], digests);
    // The data disk failed, and only that.
    let alone = lab.path("alone");
    limited(&convert(&lab.raw, &alone, &[])).expect(0);
}

/// Unmounts when it is dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn full_in_the_middle_of_the_copy() {
    if !have(&TOOLS) || !have(&["mount", "umount"]) {
        return;
    }
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = 512 * MIB;
    spec.recovery = false;
    spec.pagefile_size = 0;
    spec.extra_files.push(ExtraFile {
        place: DemoVolume::Windows,
        path: "Data\\noise.bin".into(),
        contents: noise(70 * MIB as usize, 3),
    });
    let lab = Lab::new(spec);
    let small = lab.path("small");
    fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64m", "none"])
        .arg(&small)
        .status();
    if !mounted.is_ok_and(|s| s.success()) {
        return skip("mount", "cannot mount a small tmpfs here");
    }
    let _mounted = Mounted(small.clone());
    let digest = sha256(&lab.raw);
    // The compression ratio is unknown, so the check before the copy passes.
    let run = finish(convert(&lab.raw, &small.join("out"), &["--compress"])).expect(1);
    assert!(run.stderr.contains("Copying"), "{}", run.stderr);
    assert!(run.stderr.contains("ran full"), "{}", run.stderr);
    assert!(
        run.stderr.contains("hint: free some space"),
        "{}",
        run.stderr
    );
    // It can continue: see `a_full_disk_keeps_what_is_copied`.
    assert_eq!(names(&small), [".out.partial"]);
    assert_eq!(sha256(&lab.raw), digest);
    // Without compression the error comes before the copy, with both numbers.
    let run = finish(convert(&lab.raw, &small.join("out"), &[])).expect(1);
    assert!(run.stderr.contains("bytes free,"), "{}", run.stderr);
    assert!(run.stderr.contains("bytes needed"), "{}", run.stderr);
    assert_eq!(names(&small), [] as [&str; 0]);
}

/// On btrfs a raw copy of a raw source takes almost no space, and is right; elsewhere nothing is
/// shared.
#[test]
fn a_raw_copy_shares_the_blocks_of_its_source() {
    if !have(&TOOLS) || !have(&["mount", "umount"]) {
        return;
    }
    if hyper2kvm::tool::find("mkfs.btrfs").is_none() {
        return skip("mkfs.btrfs", "no mkfs.btrfs");
    }
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.disk_size = 512 * MIB;
    spec.recovery = false;
    spec.extra_files.push(ExtraFile {
        place: DemoVolume::Windows,
        path: "Data\\noise.bin".into(),
        contents: noise(60 * MIB as usize, 3),
    });
    let lab = Lab::new(spec);
    let (image, mounted) = (lab.path("btrfs.img"), lab.path("btrfs"));
    File::create(&image).unwrap().set_len(512 * MIB).unwrap();
    support::tool("mkfs.btrfs", &["-q", text(&image)]);
    fs::create_dir(&mounted).unwrap();
    let status = Command::new("mount")
        .args(["-o", "loop"])
        .args([&image, &mounted])
        .status();
    if !status.is_ok_and(|s| s.success()) {
        return skip("mount", "cannot mount a btrfs here");
    }
    let _mounted = Mounted(mounted.clone());
    let source = mounted.join("guest.raw");
    let args = ["--sparse=always", text(&lab.raw), text(&source)];
    support::tool("cp", &args);
    let digest = sha256(&source);
    let raw = ["--format", "raw", "--verify-copy", "--json"];
    let free = || {
        support::tool("sync", &["-f", text(&mounted)]);
        let free = support::tool("stat", &["-f", "-c", "%f", text(&mounted)]);
        let free = String::from_utf8(free).unwrap();
        free.trim().parse::<u64>().unwrap() * 4096
    };
    let before = free();
    let out = mounted.join("out");
    let report = finish(convert(&source, &out, &raw)).expect(0).json();
    let shared = report["bytes"]["shared"].as_u64().unwrap();
    let read = report["bytes"]["read"].as_u64().unwrap();
    assert!(shared > 60 * MIB && shared <= read, "{shared} of {read}");
    let taken = before.saturating_sub(free());
    assert!(taken < 30 * MIB, "{taken} bytes for a copy of {read}");
    assert!(report["checks"].to_string().contains("copy-identical"));
    assert_eq!(report["ready"], true);
    assert_eq!(sha256(&source), digest);
    // A qcow2 cannot share, nor can another file system.
    for (out, how) in [(mounted.join("q"), "qcow2"), (lab.path("out"), "raw")] {
        let run = finish(convert(&source, &out, &["--format", how, "--json"])).expect(0);
        assert_eq!(run.json()["bytes"]["shared"], 0);
    }
}

#[test]
fn memory_stays_below_80_mib() {
    use std::io::Read;
    if !have(&TOOLS) {
        return;
    }
    let mut spec = GuestSpec::new(WinVersion::Win7);
    spec.disk_size = 2 << 30;
    // Hives as large as real ones, if there are any.
    if let Some(software) = corpus("win7-x86-vmware/SOFTWARE") {
        spec.arch = Arch::X86;
        spec.system_hive = corpus("win7-x86-vmware/SYSTEM");
        spec.software_hive = Some(software);
    }
    let lab = Lab::new(spec);
    let mut child = convert(&lab.raw, &lab.path("out"), &[])
        .env("HYPER2KVM_FAILPOINT", "before-rename=wait")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stderr, mut said) = support::until_waiting(&mut child);
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    support::tool("kill", &["-TERM", &child.id().to_string()]);
    stderr.read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said}");
    let kib = |name: &str| -> u64 {
        let value = status.lines().find_map(|line| line.strip_prefix(name));
        value
            .and_then(|value| value.split_whitespace().next()?.parse().ok())
            .unwrap()
    };
    // Without pages of the program's own file: a build for tests has many more of them.
    let peak = kib("VmHWM:") - kib("RssFile:");
    assert!(peak < 80 << 10, "{peak} KiB at the peak");
}
