//! What the integration tests share: a laboratory with guests and drivers of our own making, the
//! program under test, and other programs as judges.

#![allow(dead_code)]
#![allow(clippy::disallowed_methods)] // the tests drive other programs themselves
#![allow(clippy::print_stderr)] // skips must be seen

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command};
use std::sync::OnceLock;

use hyper2kvm::demo::guest;
use hyper2kvm::demo::pe::{self, Subsystem};
use hyper2kvm::demo::virtio_win::{self, Layout};
use hyper2kvm::demo::{GuestSpec, Role};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Whether every program is there; where one is missing the test is skipped visibly, or fails when
/// `HYPER2KVM_REQUIRE_TOOLS` is set.
pub fn have(tools: &[&str]) -> bool {
    let missing: Vec<_> = tools
        .iter()
        .filter(|t| hyper2kvm::tool::find(t).is_none())
        .collect();
    if missing.is_empty() {
        return true;
    }
    assert!(
        std::env::var_os("HYPER2KVM_REQUIRE_TOOLS").is_none(),
        "missing tools: {missing:?}"
    );
    eprintln!("SKIP: missing tools {missing:?}");
    false
}

pub const TOOLS: [&str; 5] = [
    "qemu-img",
    "qemu-storage-daemon",
    "hivexregedit",
    "mkntfs",
    "ntfscat",
];

/// A file of the corpus, unpacked; `None` (a visible skip) without the corpus.
pub fn corpus(file: &str) -> Option<Vec<u8>> {
    let folder = std::env::var_os("HYPER2KVM_CORPUS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/corpus"),
        PathBuf::from,
    );
    let path = folder.join(format!("{file}.xz"));
    if !path.exists() {
        eprintln!("SKIP: no corpus at {}", folder.display());
        return None;
    }
    let out = Command::new("xz").arg("-dc").arg(&path).output().unwrap();
    assert!(out.status.success(), "xz -dc {}", path.display());
    Some(out.stdout)
}

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

pub fn binary() -> &'static str {
    env!("CARGO_BIN_EXE_hyper2kvm")
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
    Run {
        code: out.status.code().unwrap_or(-1),
        stdout: String::from_utf8(out.stdout).unwrap(),
        stderr: String::from_utf8(out.stderr).unwrap(),
    }
}

/// Waits until a run under a `wait` fail point got there; gives its stderr and what it said so far.
#[track_caller]
pub fn until_waiting(child: &mut Child) -> (BufReader<ChildStderr>, String) {
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("waiting") {
        assert_ne!(stderr.read_line(&mut said).unwrap(), 0, "it ended: {said}");
    }
    (stderr, said)
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
        let n = std::io::Read::read(&mut file, &mut buffer).unwrap();
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

/// The virtio-win folder of the tests, made once per test binary.
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

/// Folders as old virtio-win releases have them: for NT 5 one storage driver that knows the
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

/// A folder with one guest in it.
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

/// What is in a folder, sorted.
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
