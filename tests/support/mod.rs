//! Common code of the integration tests: a laboratory with generated guests and drivers, the
//! program under test, and other programs that verify results.

#![allow(dead_code)]
#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // skips must be seen

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hyper2kvm::block::FileDisk;
use hyper2kvm::demo::guest;
use hyper2kvm::demo::pe::{self, Subsystem};
use hyper2kvm::demo::virtio_win::{self, Layout};
use hyper2kvm::demo::{Firmware, GuestSpec, Role, WinVersion};
use hyper2kvm::disk::partition;
use hyper2kvm::guest::{EmbeddedReader, FileKind, FsKind, GuestPath, GuestRead, embedded};
use serde_json::Value;
use sha2::{Digest, Sha256};

pub mod later;
#[path = "../../src/skip.rs"]
mod skip;
pub mod wire;

#[allow(unused_imports, reason = "not every test program needs the corpus")]
pub use skip::{corpus, have, skip};

pub const TOOLS: [&str; 5] = [
    "qemu-img",
    "qemu-storage-daemon",
    "hivexregedit",
    "mkntfs",
    "ntfscat",
];

/// The fenced blocks of a document with this info string, with their line numbers.
pub fn blocks(text: &str, kind: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut open: Option<(usize, bool, String)> = None;
    for (i, line) in text.lines().enumerate() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(info)) => open = Some((i + 2, info == kind, String::new())),
            (None, None) => {}
            (Some(_), Some(_)) => {
                if let Some((at, true, body)) = open.take() {
                    found.push((at, body));
                }
            }
            (Some((_, _, body)), None) => {
                body.push_str(line);
                body.push('\n');
            }
        }
    }
    assert!(open.is_none(), "a block is not closed");
    found
}

/// A finished run of the program.
pub struct Run {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| {
            panic!(
                "stdout is not one JSON document: {e}\n{}\n{}",
                self.stdout, self.stderr
            )
        })
    }

    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(
            self.code, code,
            "stdout:\n{}\nstderr:\n{}",
            self.stdout, self.stderr
        );
        self
    }
}

/// The program under test; `HYPER2KVM=FILE` names another build of it.
pub fn binary() -> &'static str {
    static PROGRAM: OnceLock<String> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let own = || env!("CARGO_BIN_EXE_hyper2kvm").to_owned();
        std::env::var("HYPER2KVM").unwrap_or_else(|_| own())
    })
}

pub fn h2k<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    let mut command = Command::new(binary());
    command.args(args);
    finish(command)
}

pub fn finish(mut command: Command) -> Run {
    let out = command
        .env_remove("HYPER2KVM_VIRTIO_ISO")
        .env("NO_COLOR", "1")
        .output()
        .unwrap();
    ended(out)
}

pub fn ended(out: Output) -> Run {
    Run {
        code: out.status.code().unwrap_or(-1),
        stdout: String::from_utf8(out.stdout).unwrap(),
        stderr: String::from_utf8(out.stderr).unwrap(),
    }
}

/// A verb on a source, with the drivers where it needs them.
pub fn command(verb: &str, source: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.arg(verb).arg(source).args(more);
    if matches!(verb, "convert" | "plan") {
        command.arg("--virtio-iso").arg(virtio_win());
    }
    command.env_remove("HYPER2KVM_VIRTIO_ISO");
    command
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A run that stops at a failpoint.
pub struct Paused(Child);

impl Paused {
    pub fn at(point: &str, mut command: Command) -> Self {
        command
            .env("HYPER2KVM_FAILPOINT", format!("{point}=pause"))
            .env("NO_COLOR", "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stat = format!("/proc/{}/stat", child.id());
        let start = Instant::now();
        while !fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") T ")) {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("{point}: it ended ({status}): {}", said(&mut child));
            }
            assert!(start.elapsed() < Duration::from_secs(120), "{point}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self(child)
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    pub fn go_on(self) -> Run {
        tool("kill", &["-CONT", &self.0.id().to_string()]);
        ended(self.0.wait_with_output().unwrap())
    }
}

/// What a run wrote to its stderr.
pub fn said(child: &mut Child) -> String {
    let mut text = String::new();
    let _ = child.stderr.take().unwrap().read_to_string(&mut text);
    text
}

/// Waits until a run reaches a `wait` failpoint; returns its stderr and its output so far.
#[track_caller]
pub fn until_waiting(child: &mut Child) -> (BufReader<ChildStderr>, String) {
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("waiting") {
        assert_ne!(stderr.read_line(&mut said).unwrap(), 0, "it ended: {said}");
    }
    (stderr, said)
}

/// A loop device over a file; detached when it is dropped.
pub struct LoopOver(pub PathBuf);

impl LoopOver {
    /// `None`: not possible here, which is a visible skip, or a failure where tools are required.
    pub fn file(file: &Path, options: &[&str]) -> Option<Self> {
        if !have(&["losetup"]) {
            return None;
        }
        let mut losetup = Command::new("losetup");
        let losetup = losetup.args(["-f", "--show"]).args(options).arg(file);
        let out = losetup.output().unwrap();
        if out.status.success() {
            let device = String::from_utf8(out.stdout).unwrap();
            return Some(Self(device.trim().into()));
        }
        let why = String::from_utf8_lossy(&out.stderr).into_owned();
        skip("loop-devices", format!("no loop devices: {why}"));
        None
    }
}

impl Drop for LoopOver {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// A mounted file system; unmounted when it is dropped.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// `None`: not possible here, which is a visible skip.
    pub fn at(place: &Path, mut mount: Command) -> Option<Self> {
        let out = mount.arg(place).output().unwrap();
        if out.status.success() {
            return Some(Self(place.to_owned()));
        }
        let why = String::from_utf8_lossy(&out.stderr).into_owned();
        skip("mount", format!("cannot mount here: {why}"));
        None
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A new qcow2 over `base`, which is named as it is given.
pub fn create_overlay(base: &str, format: &str, path: &Path) {
    let over = ["create", "-q", "-f", "qcow2", "-F", format, "-b", base];
    tool("qemu-img", &[&over[..], &[text(path)]].concat());
}

/// Runs another program and returns its stdout.
#[track_caller]
pub fn tool(program: &str, args: &[&str]) -> Vec<u8> {
    let path = hyper2kvm::tool::find(program).unwrap_or_else(|| panic!("no {program}"));
    let out = Command::new(path).args(args).output().unwrap();
    assert!(
        out.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    out.stdout
}

pub fn sha256(path: &Path) -> String {
    let mut file = fs::File::open(path).unwrap();
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).unwrap();
        if n == 0 {
            break;
        }
        digest.update(&buffer[..n]);
    }
    digest
        .finalize()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// The virtio-win directory of the tests, made once per test binary.
pub fn virtio_win() -> &'static Path {
    static FOLDER: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    &FOLDER
        .get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().join("virtio-win");
            virtio_win::write(&root, Layout::Iso, &|arch| {
                pe::image(arch, Subsystem::Native)
            })
            .unwrap();
            (dir, root)
        })
        .1
}

/// Directories as old virtio-win releases have them: for NT 5 one storage driver that knows the
/// transitional device only.
pub fn drivers_for_old_windows(folder: &Path) {
    let (from, to) = (virtio_win().to_str().unwrap(), folder.to_str().unwrap());
    tool("cp", &["-r", from, to]);
    let put = |driver: &str, arch: &str, os: &str, edit: &dyn Fn(String) -> String| {
        let from = folder.join(format!("{driver}/w7/{arch}"));
        let to = folder.join(format!("{driver}/{os}/{arch}"));
        fs::create_dir_all(&to).unwrap();
        for file in fs::read_dir(from).unwrap().map(|f| f.unwrap().path()) {
            let name = file.file_name().unwrap();
            match file.extension().is_some_and(|e| e == "inf") {
                true => {
                    let text = fs::read_to_string(&file).unwrap();
                    fs::write(to.join(name), edit(text)).unwrap();
                }
                false => drop(fs::copy(&file, to.join(name)).unwrap()),
            }
        }
    };
    let legacy = |text: String| {
        let lines: Vec<&str> = text.lines().collect();
        let modern = |i: usize| lines[i].contains("DEV_1042") || lines[i].ends_with('\\');
        let kept = (0..lines.len()).filter(|i| !modern(*i)).map(|i| lines[i]);
        kept.collect::<Vec<_>>().join("\r\n")
    };
    put("viostor", "x86", "xp", &legacy);
    put("viostor", "x86", "2k3", &legacy);
    for driver in ["viostor", "vioscsi"] {
        put(driver, "amd64", "2k8", &|text| text.replace(".6.1", ".6.0"));
    }
}

/// A directory with one guest in it.
pub struct Lab {
    pub dir: tempfile::TempDir,
    pub spec: GuestSpec,
    pub raw: PathBuf,
}

impl Lab {
    pub fn new(spec: GuestSpec) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("guest.raw");
        guest::build(&spec, &raw).unwrap();
        Self { dir, spec, raw }
    }

    /// The same disk as a qcow2, which only QEMU reads and writes.
    #[allow(dead_code)] // not in every file of tests
    pub fn in_qcow2(mut self) -> Self {
        let image = self.path("source.qcow2");
        let convert = [
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            text(&self.raw),
            text(&image),
        ];
        let done = Command::new("qemu-img").args(convert).status().unwrap();
        assert!(done.success());
        self.raw = image;
        self
    }

    /// A guest that is converted quickly.
    pub fn small() -> Self {
        let mut spec = GuestSpec::new(WinVersion::Win10);
        spec.disk_size = 512 << 20;
        spec.recovery = false;
        spec.firmware = Firmware::Bios;
        Self::new(spec)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The guest in another format; `options` are `-o` options of `qemu-img convert`.
    pub fn in_format(&self, format: &str, options: &str, name: &str) -> PathBuf {
        let path = self.path(name);
        let mut args = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.push(self.raw.to_str().unwrap());
        args.push(path.to_str().unwrap());
        tool("qemu-img", &args);
        path
    }

    /// `convert --json` into `out` beside the guest.
    pub fn convert(&self, source: &Path, more: &[&str]) -> Run {
        let out = self.path("out");
        let mut args = vec![
            "convert",
            source.to_str().unwrap(),
            "--virtio-iso",
            virtio_win().to_str().unwrap(),
            "-o",
            out.to_str().unwrap(),
            "--json",
        ];
        args.extend(more);
        h2k(args)
    }

    /// The converted disk as raw bytes for tools that read nothing else.
    pub fn raw_result(&self, disk: &Path) -> PathBuf {
        let raw = self.path("result.raw");
        tool(
            "qemu-img",
            &[
                "convert",
                "-O",
                "raw",
                disk.to_str().unwrap(),
                raw.to_str().unwrap(),
            ],
        );
        raw
    }

    /// The Windows volume of a raw disk as a file of its own, for the ntfs-3g tools.
    pub fn volume(&self, raw: &Path) -> PathBuf {
        let part = self.spec.partition(Role::Windows).unwrap();
        let path = self.path("volume.ntfs");
        let _ = fs::remove_file(&path);
        let (skip, count) = (part.start.to_string(), part.size.to_string());
        tool(
            "dd",
            &[
                &format!("if={}", raw.display()),
                &format!("of={}", path.display()),
                "bs=1M",
                "iflag=skip_bytes,count_bytes",
                "conv=sparse",
                &format!("skip={skip}"),
                &format!("count={count}"),
                "status=none",
            ],
        );
        path
    }

    /// A file of the Windows volume, read by ntfs-3g's own tool.
    pub fn ntfscat(&self, volume: &Path, file: &str) -> Vec<u8> {
        tool("ntfscat", &["-f", volume.to_str().unwrap(), file])
    }
}

/// A key of a hive and everything below it, by `hivexregedit`.
pub fn export(hive: &Path, prefix: &str, key: &str) -> String {
    String::from_utf8(tool(
        "hivexregedit",
        &["--export", "--prefix", prefix, hive.to_str().unwrap(), key],
    ))
    .unwrap()
}

/// The guest's view of a converted disk, whatever the image consists of.
pub fn as_raw(disk: &Path, raw: &Path) {
    let fixed = ["convert", "-f", "qcow2", "-O", "raw"];
    tool("qemu-img", &[&fixed[..], &[text(disk), text(raw)]].concat());
}

/// The names in a directory, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The command lines of running programs that name `path` or have a file there open, but for this test
/// itself.
pub fn processes_naming(path: &Path) -> Vec<String> {
    let wanted = path.to_str().unwrap();
    let has_open = |process: &Path| {
        let files = fs::read_dir(process.join("fd")).into_iter().flatten();
        files
            .flatten()
            .any(|file| fs::read_link(file.path()).is_ok_and(|file| file.starts_with(path)))
    };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        if name.parse::<u32>().is_err() || name == std::process::id().to_string() {
            continue;
        }
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(wanted) || has_open(&entry.path()) {
            found.push(line);
        }
    }
    found
}

/// A raw disk, read by the embedded engine.
pub fn read_disk(disk: &Path) -> EmbeddedReader {
    let disk = Arc::new(FileDisk::open(disk).unwrap());
    let layout = partition::read_layout(disk.as_ref()).unwrap();
    embedded::open(disk, &layout).unwrap()
}

/// Every file by volume and path: its size and contents; `None` for a directory.
pub fn tree(disk: &Path) -> BTreeMap<(u32, String), Option<Vec<u8>>> {
    let reader = read_disk(disk);
    let mut tree = BTreeMap::new();
    for volume in reader.volumes() {
        if !matches!(volume.kind, FsKind::Ntfs | FsKind::Fat) {
            continue;
        }
        let mut folders = vec![GuestPath::root()];
        while let Some(folder) = folders.pop() {
            for file in reader.list(volume.id, &folder).unwrap() {
                let path = folder.join(&file.name).unwrap();
                let contents = if file.kind == FileKind::Dir {
                    folders.push(path.clone());
                    None
                } else {
                    Some(reader.read(volume.id, &path, 1 << 30).unwrap())
                };
                // Not lower case: names must have the same case.
                tree.insert((volume.id.partition, path.to_slashes()), contents);
            }
        }
    }
    tree
}

/// A guest whose boot files and Windows are on disks of their own.
pub struct Split {
    /// Below a directory of its own in the lab.
    pub boot: PathBuf,
    pub windows: PathBuf,
}

impl Lab {
    /// Two copies of the guest's disk: one keeps the partition with the boot files and gets another identity,
    /// the other keeps the rest.
    pub fn split(&self) -> Split {
        let (boot, windows) = (self.path("boot.raw"), self.path("windows.raw"));
        for disk in [&boot, &windows] {
            let (from, to) = (self.raw.to_str().unwrap(), disk.to_str().unwrap());
            tool("cp", &["--sparse=always", from, to]);
        }
        let role = self.spec.boot_role();
        keep_partitions(&self.spec, &boot, |r| r == role);
        keep_partitions(&self.spec, &windows, |r| r != role);
        rename_disk(&self.spec, &boot, 0xb007_0001);
        Split { boot, windows }
    }

    /// A libvirt machine with these raw disks, in order.
    pub fn libvirt_xml(&self, name: &str, disks: &[&Path]) -> PathBuf {
        let list: String = (disks.iter().zip('a'..='z'))
            .map(|(path, letter)| {
                format!(
                    "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/><target dev='sd{letter}' bus='sata'/></disk>",
                    path.display()
                )
            })
            .collect();
        let text = format!(
            "<domain type='kvm'><name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><devices>{list}</devices></domain>"
        );
        let path = self.path(&format!("{name}.xml"));
        fs::write(&path, text).unwrap();
        path
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

/// Changes both copies of a GPT: `edit` gets the disk's GUID and the entries, 128 bytes each. The crate that
/// writes the table of new guests moves entries up when one goes.
fn edit_gpt(disk: &Path, sector: u32, edit: impl Fn(&mut [u8], &mut [u8])) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(disk)
        .unwrap();
    let sector = u64::from(sector);
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    };
    let last = file.metadata().unwrap().len() / sector - 1;
    for lba in [1, last] {
        let mut header = read(lba * sector, 92);
        assert!(header.starts_with(b"EFI PART"));
        let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let (at, count) = (u64::from(number(72)), number(80));
        assert_eq!((number(12), number(84)), (92, 128));
        let mut entries = read(at * sector, count as usize * 128);
        edit(&mut header[56..72], &mut entries);
        file.write_all_at(&entries, at * sector).unwrap();
        header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
        header[16..20].fill(0);
        let crc = crc32(&header);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        file.write_all_at(&header, lba * sector).unwrap();
    }
}

/// Removes the other partitions from the table; what they hold stays.
pub fn keep_partitions(spec: &GuestSpec, disk: &Path, keep: impl Fn(Role) -> bool) {
    let gone: Vec<usize> = (spec.partitions().iter().filter(|p| !keep(p.role)))
        .map(|p| p.index as usize - 1)
        .collect();
    match spec.firmware {
        Firmware::Uefi => edit_gpt(disk, spec.sector_size, |_, entries| {
            for slot in &gone {
                entries[slot * 128..][..128].fill(0);
            }
        }),
        Firmware::Bios => {
            let file = fs::File::options().write(true).open(disk).unwrap();
            for slot in gone {
                let at = 446 + 16 * slot as u64;
                file.write_all_at(&[0; 16], at).unwrap();
            }
        }
    }
}

/// Gives the disk, and a GPT's partitions, another identity.
pub fn rename_disk(spec: &GuestSpec, disk: &Path, number: u32) {
    match spec.firmware {
        Firmware::Uefi => edit_gpt(disk, spec.sector_size, |guid, entries| {
            guid[..4].copy_from_slice(&number.to_le_bytes());
            for entry in entries.chunks_mut(128).filter(|e| e[0..16] != [0; 16]) {
                entry[16..20].copy_from_slice(&number.to_le_bytes());
            }
        }),
        Firmware::Bios => {
            let file = fs::File::options().write(true).open(disk).unwrap();
            file.write_all_at(&number.to_le_bytes(), 440).unwrap();
        }
    }
}
