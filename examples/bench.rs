//! Measures inspect, fix and copy on disks made here, and prints ratios.
//!
//! `cargo run --release --example bench -- [--mib N] [--rounds N] [--only NAME] [--v2v] [--dir FOLDER]
//! [--program FILE] [--json FILE] [--against FILE]`
//!
//! All rows are written to `--json` (bench.json). `--against` prints each of their values divided by that
//! of an earlier file. `--program` measures another hyper2kvm than this build.
//!
//! What is compared runs in turns within one round, so that a host that gets slower or faster in
//! between slows or speeds up both; the medians of all rounds are divided. `--mib` is the size of the
//! live data (1024; 32 is a smoke run). Every target is made durable within the time measured. The
//! source is warm in the page cache for all of them.

#![allow(clippy::print_stdout, clippy::print_stderr)] // a program of its own
#![allow(clippy::disallowed_methods)] // drives other programs itself

#[path = "bench/going_on.rs"]
mod going_on;
#[path = "bench/later.rs"]
mod later;
#[path = "../tests/support/wire.rs"]
mod servers;
#[path = "bench/wire.rs"]
mod wire;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use hyper2kvm::block::FileDisk;
use hyper2kvm::demo::virtio_win::{self, Layout};
use hyper2kvm::demo::{Arch, GuestSpec, Role, WinVersion, guest, pe};
use hyper2kvm::guest::confined;
use hyper2kvm::guest::ntfs3g::MountOptions;
use hyper2kvm::guest::{EmbeddedWriter, Extent, GuestPath, GuestWrite, VolumeId};
use hyper2kvm::{cli, registry, tool, wire as wired};
use serde_json::{Value, json};

/// Set for the copies of this program that play `hyper2kvm`; names the file for the peak memory.
const PLAY: &str = "HYPER2KVM_BENCH_PLAY";
const MIB: u64 = 1 << 20;

struct Options {
    mib: u64,
    rounds: usize,
    only: Option<String>,
    v2v: bool,
    dir: PathBuf,
    program: Option<PathBuf>,
    json: PathBuf,
    against: Option<PathBuf>,
}

fn main() -> ExitCode {
    if let Some(code) = tool::launcher::run_if_asked(std::env::args_os()) {
        return code;
    }
    if let Some(code) = confined::run_if_asked(std::env::args_os()) {
        return code;
    }
    if let Some(code) = wired::run_if_asked(std::env::args_os()) {
        return code;
    }
    if let Some(code) = registry::confined::run_if_asked(std::env::args_os()) {
        return code;
    }
    if let Some(file) = std::env::var_os(PLAY) {
        tool::launcher::enable();
        let code = cli::main();
        let _ = fs::write(file, peak_kib().to_string());
        return code;
    }
    match options().and_then(|o| bench(&o)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options> {
    let mut options = Options {
        mib: 1024,
        rounds: 5,
        only: None,
        v2v: false,
        dir: std::env::temp_dir(),
        program: None,
        json: "bench.json".into(),
        against: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--mib" => options.mib = value()?.parse()?,
            "--rounds" => options.rounds = value()?.parse()?,
            "--only" => options.only = Some(value()?),
            "--dir" => options.dir = value()?.into(),
            "--program" => options.program = Some(fs::canonicalize(value()?)?),
            "--json" => options.json = value()?.into(),
            "--against" => options.against = Some(value()?.into()),
            "--v2v" => options.v2v = true,
            other => bail!("unknown argument {other}"),
        }
    }
    ensure!(options.rounds > 0 && options.mib >= 8, "too small");
    Ok(options)
}

/// The most memory a process had until it ended, to within its last milliseconds.
fn watched(status: &str) -> u64 {
    let mut most = 0;
    loop {
        match peak_of(status) {
            0 => return most,
            kib => most = kib,
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// The most memory this process ever had.
fn peak_kib() -> u64 {
    peak_of("/proc/self/status")
}

fn peak_of(status: &str) -> u64 {
    let status = fs::read_to_string(status).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn bench(options: &Options) -> Result<()> {
    // Before the minutes that follow.
    let against = options.against.as_ref().map(|file| -> Result<Value> {
        let text = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("reading {}", file.display()))
    });
    let against = against.transpose()?;
    let dir = tempfile::Builder::new()
        .prefix("h2k-bench-")
        .tempdir_in(&options.dir)?;
    let lab = Lab {
        dir: dir.path().to_path_buf(),
        media: dir.path().join("virtio-win"),
        rounds: options.rounds,
        v2v: options.v2v && tool::find("virt-v2v").is_some(),
        program: options.program.clone(),
    };
    virtio_win::write(&lab.media, Layout::Iso, &|arch| {
        pe::image(arch, pe::Subsystem::Native)
    })?;
    println!("{}", machine());
    println!(
        "rounds: {}, live data: {} MiB\n",
        options.rounds, options.mib
    );
    let wanted = |name: &str| options.only.as_deref().is_none_or(|o| o == name);
    let mut rows = serde_json::Map::new();
    if wanted("fix") {
        rows.insert("fix".into(), fix(&lab)?);
    }
    for (name, disk) in [
        ("deleted", Disk::Deleted),
        ("full", Disk::Full),
        ("many", Disk::Many),
        ("sparse", Disk::Sparse),
    ] {
        if wanted(name) {
            rows.insert(name.into(), copy(&lab, name, disk, options.mib)?);
        }
    }
    type Row = fn(&Lab, u64) -> Result<Value>;
    let more: [(&str, Row); 4] = [
        ("wire", wire::wire),
        ("journal", going_on::journal),
        ("resumed", going_on::resumed),
        ("last", going_on::last_pass),
    ];
    for (name, row) in more {
        if wanted(name) {
            rows.insert(name.into(), row(&lab, options.mib)?);
        }
    }
    if wanted("later")
        && let Some(row) = later::later(&lab, options.mib)?
    {
        rows.insert("later".into(), row);
    }
    let rows = json!({
        "schema": "hyper2kvm/bench/1",
        "version": env!("CARGO_PKG_VERSION"),
        "machine": machine(),
        "program": options.program,
        "live_mib": options.mib,
        "rounds": options.rounds,
        "rows": rows,
    });
    fs::write(&options.json, format!("{rows:#}\n"))
        .with_context(|| format!("writing {}", options.json.display()))?;
    println!("written to {}", options.json.display());
    if let Some(old) = against {
        compare(&rows["rows"], &old["rows"]);
    }
    Ok(())
}

/// Every value of a row divided by that of the same row of an earlier run.
fn compare(new: &Value, old: &Value) {
    println!(
        "\n{:<10} {:<16} {:>9} {:>9} {:>6}",
        "", "", "old", "new", "ratio"
    );
    for (name, row) in new.as_object().into_iter().flatten() {
        for (what, value) in row.as_object().into_iter().flatten() {
            let (Some(new), Some(old)) = (value.as_f64(), old[name][what].as_f64()) else {
                continue;
            };
            println!(
                "{name:<10} {what:<16} {old:>9.3} {new:>9.3} {:>6.2}",
                new / old
            );
        }
    }
}

/// Processors, memory and load.
fn machine() -> String {
    let first = |file: &str, key: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(key).map(str::to_owned));
        line.unwrap_or_default()
            .trim_start_matches([' ', '\t', ':'])
            .to_string()
    };
    let cpus = std::thread::available_parallelism().map_or(0, |n| n.get());
    format!(
        "{cpus} x {}, memory {}, load {}",
        first("/proc/cpuinfo", "model name"),
        first("/proc/meminfo", "MemTotal"),
        first("/proc/loadavg", "")
    )
}

struct Lab {
    dir: PathBuf,
    media: PathBuf,
    rounds: usize,
    v2v: bool,
    program: Option<PathBuf>,
}

/// One run of the program.
struct Run {
    seconds: f64,
    peak_mib: f64,
    json: Value,
}

impl Lab {
    /// The program that is measured.
    fn command(&self) -> Result<Command> {
        Ok(match &self.program {
            Some(program) => Command::new(program),
            None => {
                let mut command = Command::new(std::env::current_exe()?);
                command.env(PLAY, self.peak());
                command
            }
        })
    }

    /// The file for its peak memory.
    fn peak(&self) -> PathBuf {
        self.dir.join("peak")
    }

    fn h2k(&self, args: &[&OsStr]) -> Result<Run> {
        let start = Instant::now();
        let child = self
            .command()?
            .args(args)
            .args(["--json", "--quiet"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let of_others = self.program.is_some().then(|| {
            let status = format!("/proc/{}/status", child.id());
            std::thread::spawn(move || watched(&status))
        });
        let out = child.wait_with_output()?;
        let seconds = start.elapsed().as_secs_f64();
        let watched = of_others.and_then(|thread| thread.join().ok());
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.success(), "{args:?}: {stderr}");
        Ok(Run {
            seconds,
            peak_mib: match watched {
                Some(kib) => kib as f64 / 1024.0,
                None => fs::read_to_string(self.peak())?.parse::<f64>()? / 1024.0,
            },
            json: serde_json::from_slice(&out.stdout)?,
        })
    }

    /// One conversion more: the programs it starts, and when each step began and ended, in milliseconds.
    fn traced(&self, disk: &Path) -> Result<(usize, Vec<Value>)> {
        let steps = self.dir.join("steps");
        let out = self
            .command()?
            .env("HYPER2KVM_LOG", "hyper2kvm::timeline=debug")
            .env(
                "HYPER2KVM_FAILPOINT",
                format!("*=record:{}", steps.display()),
            )
            .args([
                "convert".as_ref(),
                disk.as_os_str(),
                "--virtio-iso".as_ref(),
            ])
            .args([self.media.as_os_str(), "-o".as_ref()])
            .arg(self.fresh("out")?)
            .stdin(Stdio::null())
            .output()?;
        let log = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.success(), "{log}");
        let steps = fs::read_to_string(&steps)?;
        let program = |line: &&str| {
            let what = line.strip_prefix("before ").unwrap_or_default();
            !what.is_empty() && !what.starts_with("action ") && !what.starts_with("rename ")
        };
        let span = |line: &str| {
            let (_, line) = line.split_once("timeline: ")?;
            let mut parts = line.splitn(3, ' ');
            let mut number = || parts.next()?.parse::<f64>().ok();
            let (from, to) = (number()?, number()?);
            Some(json!([from, to, parts.next()?]))
        };
        let mut timeline: Vec<Value> = log.lines().filter_map(span).collect();
        timeline.sort_by(|a, b| f64::total_cmp(&number(a, 0), &number(b, 0)));
        Ok((steps.lines().filter(program).count(), timeline))
    }

    fn inspect(&self, disk: &Path) -> Result<Run> {
        self.h2k(&["inspect".as_ref(), disk.as_ref()])
    }

    fn convert(&self, disk: &Path, to: &Path, more: &[&str]) -> Result<Run> {
        let args = self.conversion(disk, to);
        let mut args: Vec<&OsStr> = args.iter().map(AsRef::as_ref).collect();
        args.extend(more.iter().map(OsStr::new));
        self.h2k(&args)
    }

    /// `convert` of a disk, as arguments.
    fn conversion(&self, disk: &Path, to: &Path) -> Vec<OsString> {
        let mut args = vec!["convert".into(), disk.into()];
        args.extend(["--virtio-iso".into(), (&self.media).into()]);
        args.extend(["-o".into(), to.into()]);
        args
    }

    /// `qemu-img convert` with these options, and the seconds it took.
    fn qemu_img(&self, options: &[&str], from: &Path, to: &Path) -> Result<f64> {
        let start = Instant::now();
        run(Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .args(options)
            .args([from, to]))?;
        durable(to)?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn virt_v2v(&self, from: &Path, to: &Path) -> Result<f64> {
        fs::create_dir_all(to)?;
        let start = Instant::now();
        run(Command::new("virt-v2v")
            .env("LIBGUESTFS_BACKEND", "direct")
            .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
            .env("VIRTIO_WIN", &self.media)
            .args(["-i", "disk"])
            .arg(from)
            .args(["-o", "local", "-of", "qcow2", "-os"])
            .arg(to))?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// An empty folder for one result.
    fn fresh(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        Ok(path)
    }
}

fn durable(file: &Path) -> Result<()> {
    Ok(File::open(file)?.sync_all()?)
}

fn number(row: &Value, i: usize) -> f64 {
    row[i].as_f64().unwrap_or_default()
}

fn run(command: &mut Command) -> Result<()> {
    let out = command.stdin(Stdio::null()).output()?;
    let stderr = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{command:?}: {stderr}");
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn seconds(report: &Value, name: &str) -> f64 {
    report["timings"][name].as_f64().unwrap_or(f64::NAN)
}

/// Inspect, and everything up to the copy, on a small disk with hives as large as real ones.
fn fix(lab: &Lab) -> Result<Value> {
    let mut spec = GuestSpec::new(WinVersion::Win7);
    spec.arch = Arch::X86;
    spec.system_hive = corpus("win7-x86-vmware/SYSTEM")?;
    spec.software_hive = corpus("win7-x86-vmware/SOFTWARE")?;
    let real = spec.system_hive.is_some() && spec.software_hive.is_some();
    let disk = lab.dir.join("guest.raw");
    guest::build(&spec, &disk)?;
    let (mut inspect, mut before_copy, mut peak) = (Vec::new(), Vec::new(), 0f64);
    for _ in 0..lab.rounds {
        let run = lab.inspect(&disk)?;
        inspect.push(run.seconds);
        peak = peak.max(run.peak_mib);
        let run = lab.convert(&disk, &lab.fresh("out")?, &[])?;
        before_copy.push(seconds(&run.json, "inspect_s") + seconds(&run.json, "fix_s"));
        peak = peak.max(run.peak_mib);
    }
    let (programs, timeline) = lab.traced(&disk)?;
    let hives = if real {
        "real hives"
    } else {
        "hives made here, no corpus"
    };
    println!("fix: Windows 7 on 2 GiB, {hives}");
    let inspect = median(inspect);
    println!("  inspect                      {inspect:7.3} s");
    let ours = median(before_copy);
    println!("  inspect+plan+fix+trim+verify {ours:7.3} s");
    println!("  peak memory                  {peak:7.1} MiB");
    println!("  programs started             {programs:5}");
    if lab.v2v {
        match lab.virt_v2v(&disk, &lab.fresh("v2v")?) {
            Ok(v2v) => println!(
                "  virt-v2v {v2v:.1} s: {:.0} times as long as our fix",
                v2v / ours
            ),
            Err(e) => println!("  virt-v2v: {e:#}"),
        }
    }
    println!();
    fs::remove_file(disk)?;
    Ok(json!({
        "real_hives": real,
        "inspect_s": inspect,
        "before_copy_s": ours,
        "peak_mib": peak,
        "programs": programs,
        "timeline": timeline,
    }))
}

/// A file of the corpus (`HYPER2KVM_CORPUS`), unpacked.
fn corpus(file: &str) -> Result<Option<Vec<u8>>> {
    let folder = std::env::var_os("HYPER2KVM_CORPUS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/corpus"),
        PathBuf::from,
    );
    let path = folder.join(format!("{file}.xz"));
    if !path.exists() {
        return Ok(None);
    }
    let out = Command::new("xz").arg("-dc").arg(&path).output()?;
    ensure!(out.status.success(), "xz -dc {}", path.display());
    Ok(Some(out.stdout))
}

#[derive(Clone, Copy)]
enum Disk {
    /// As much page file as live data, and three times as much deleted data.
    Deleted,
    /// 90 % of the volume is live data.
    Full,
    /// Many small files.
    Many,
    /// 2 TiB with almost nothing written.
    Sparse,
}

fn copy(lab: &Lab, name: &str, kind: Disk, mib: u64) -> Result<Value> {
    let disk = lab.dir.join(format!("{name}.raw"));
    build(kind, mib, &disk)?;
    // What is left of it is the live data: the floor of any copy.
    let floor = lab.dir.join("floor.raw");
    let first = lab.convert(&disk, &lab.fresh("out")?, &[])?;
    let converted = first.json["outputs"]["disks"][0]
        .as_str()
        .context("no disk")?;
    run(Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw", converted])
        .arg(&floor))?;

    let target = lab.dir.join("target.qcow2");
    let (mut ours, mut plain, mut least, mut peak) = (Vec::new(), Vec::new(), Vec::new(), 0f64);
    let mut copy_only = Vec::new();
    let mut compressed = (Vec::new(), Vec::new());
    for _ in 0..lab.rounds {
        let run = lab.convert(&disk, &lab.fresh("out")?, &[])?;
        ours.push(run.seconds);
        copy_only.push(seconds(&run.json, "copy_s"));
        peak = peak.max(run.peak_mib);
        plain.push(lab.qemu_img(&[], &disk, &target)?);
        fs::remove_file(&target)?;
        least.push(lab.qemu_img(&["-W", "-m", "8"], &floor, &target)?);
        fs::remove_file(&target)?;
        if let Disk::Full = kind {
            compressed.0.push(
                lab.convert(&disk, &lab.fresh("out")?, &["--compress"])?
                    .seconds,
            );
            let zstd = ["-c", "-o", "compression_type=zstd", "-W", "-m", "8"];
            compressed.1.push(lab.qemu_img(&zstd, &floor, &target)?);
            fs::remove_file(&target)?;
        }
    }
    let mib_of = |what: &str| first.json["bytes"][what].as_u64().unwrap_or(0) / MIB;
    let (ours, plain, least) = (median(ours), median(plain), median(least));
    println!(
        "{name}: {} MiB, of which {} MiB are live",
        mib_of("virtual"),
        mib_of("read")
    );
    println!("  convert, everything          {ours:7.2} s, peak memory {peak:.1} MiB");
    let copy_only = median(copy_only);
    println!("    of it the copy             {copy_only:7.2} s");
    println!(
        "  qemu-img convert             {plain:7.2} s: {:.2} times ours",
        plain / ours
    );
    println!(
        "  qemu-img, live data only     {least:7.2} s: ours is {:.2} times that",
        ours / least
    );
    let compressed = (median(compressed.0), median(compressed.1));
    if let Disk::Full = kind {
        let ratio = compressed.0 / compressed.1;
        println!("  convert --compress           {:7.2} s", compressed.0);
        println!(
            "  qemu-img -c, live data only  {:7.2} s: ours is {ratio:.2} times that",
            compressed.1
        );
    }
    if lab.v2v {
        match lab.virt_v2v(&disk, &lab.fresh("v2v")?) {
            Ok(v2v) => println!(
                "  virt-v2v                     {v2v:7.2} s: {:.1} times ours",
                v2v / ours
            ),
            Err(e) => println!("  virt-v2v: {e:#}"),
        }
    }
    println!();
    fs::remove_file(&floor)?;
    fs::remove_file(disk)?;
    Ok(json!({
        "virtual_mib": mib_of("virtual"),
        "live_mib": mib_of("read"),
        "convert_s": ours,
        "copy_s": copy_only,
        "plain_s": plain,
        "floor_s": least,
        "to_floor": ours / least,
        "compress_s": compressed.0,
        "compress_floor_s": compressed.1,
        "peak_mib": peak,
    }))
}

/// Bytes that do not compress.
fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len as usize + 8);
    while (bytes.len() as u64) < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes
}

/// The unit in which a large file is written, in MiB.
const STEP: u64 = 8;

/// The contents of a large file there.
fn step(at: u64, mib: u64) -> Vec<u8> {
    noise(mib * MIB, at + 1)
}

fn build(kind: Disk, mib: u64, disk: &Path) -> Result<()> {
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.pagefile_size = 0;
    // Room for the other partitions.
    let around = 1024;
    spec.disk_size = match kind {
        Disk::Deleted => (mib * 6 + around) * MIB,
        Disk::Full => (mib * 10 / 9 + 700) * MIB,
        Disk::Many => (mib * 2 + around) * MIB,
        Disk::Sparse => 2 << 40,
    };
    guest::build(&spec, disk)?;
    let mut filler = Filler::of(&spec, disk)?;
    match kind {
        Disk::Deleted => {
            filler.large("pagefile.sys", mib)?;
            // Live and deleted files alternate on the disk.
            for i in 0..4 {
                filler.large(&format!("live{i}"), mib / 4)?;
                filler.large(&format!("deleted{i}"), mib * 3 / 4)?;
            }
            for i in 0..4 {
                let path = GuestPath::parse(&format!("deleted{i}"))?;
                filler.writer.remove_file(filler.volume, &path)?;
            }
        }
        Disk::Full => filler.large("live", mib)?,
        Disk::Many => {
            let folder = |i| GuestPath::parse(&format!("folder{}", i / 1000));
            for i in 0..mib * MIB / (16 << 10) {
                if i % 1000 == 0 {
                    filler.writer.create_dir(filler.volume, &folder(i)?)?;
                }
                let path = folder(i)?.join(&format!("file{i}"))?;
                filler
                    .writer
                    .write_file(filler.volume, &path, &noise(12 << 10, i))?;
            }
        }
        Disk::Sparse => filler.large("live", mib.min(64))?,
    }
    Ok(filler.writer.close()?)
}

struct Filler {
    volume: VolumeId,
    writer: Box<EmbeddedWriter>,
}

impl Filler {
    /// Writes to the volume with Windows.
    fn of(spec: &GuestSpec, disk: &Path) -> Result<Self> {
        let part = spec.partition(Role::Windows).context("no Windows volume")?;
        Ok(Self {
            volume: VolumeId::new(part.index),
            writer: Box::new(EmbeddedWriter::new(
                Arc::new(FileDisk::open_rw(disk)?),
                &guest::layout(spec),
                MountOptions::default(),
            )),
        })
    }

    /// A file too large to hold in memory.
    fn large(&mut self, name: &str, mib: u64) -> Result<()> {
        let path = GuestPath::parse(name)?;
        self.writer.write_file(self.volume, &path, &[])?;
        for at in (0..mib).step_by(STEP as usize) {
            let len = (mib - at).min(STEP) * MIB;
            let extent = Extent {
                offset: at * MIB,
                data: step(at, len / MIB),
            };
            self.writer
                .patch_file(self.volume, &path, at * MIB + len, &[extent])?;
        }
        Ok(())
    }
}
