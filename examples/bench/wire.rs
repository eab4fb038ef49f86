//! A disk on another host, over loopback: OpenSSH beside `sftp`, nginx with TLS, and both at a distance.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::servers::{Line, Nginx, Sshd, installed};
use super::{Disk, Lab, MIB, build, median, run, seconds};

/// Memory that the copy is going to take. A VM returns unused memory to its host within seconds, and a
/// file grows half as fast until it has that again: a distant source, which is inspected for longer, would be copied
/// into other memory than a near one. So all of it is in use, and given back piece by piece as the copy grows.
struct Warm {
    runs: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Warm {
    const PIECE: u64 = 16 * MIB;
    /// The memory released in advance.
    const FREE: u64 = 256 * MIB;

    /// `copy` is the file that is going to grow.
    fn new(bytes: u64, copy: PathBuf) -> Self {
        let mut pieces: Vec<Vec<u8>> = Vec::new();
        for _ in 0..(bytes + Self::FREE) / Self::PIECE {
            let mut piece = vec![0; Self::PIECE as usize];
            piece.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
            pieces.push(piece);
        }
        let runs = Arc::new(AtomicBool::new(true));
        let going = runs.clone();
        let thread = thread::spawn(move || {
            while going.load(Ordering::Relaxed) && !pieces.is_empty() {
                let there = fs::metadata(&copy).map(|file| file.blocks() * 512);
                let kept = there.map_or(u64::MAX, |there| bytes.saturating_sub(there));
                while pieces.len() as u64 * Self::PIECE > kept {
                    drop(std::hint::black_box(pieces.pop()));
                }
                thread::sleep(Duration::from_millis(5));
            }
        });
        Self { runs, thread }
    }

    fn end(self) {
        self.runs.store(false, Ordering::Relaxed);
        let _ = self.thread.join();
    }
}

/// The access to a disk.
struct Access {
    url: String,
    options: Vec<String>,
}

/// Over a line that takes `latency` for a round trip, or none.
fn reach_ssh(sshd: &Sshd, disk: &Path, line: Option<&Line>) -> Result<Access> {
    let mut access = Access {
        url: sshd.url(disk),
        options: sshd.options(),
    };
    if let Some(line) = line {
        let (here, there) = (sshd.port.to_string(), line.port.to_string());
        let known = fs::read_to_string(sshd.dir.path().join("known_hosts"))?;
        let file = sshd.dir.path().join("line");
        fs::write(&file, known.replace(&here, &there))?;
        access.url = access
            .url
            .replace(&format!(":{here}/"), &format!(":{there}/"));
        let last = access.options.last_mut().context("no options")?;
        *last = file.display().to_string();
    }
    Ok(access)
}

fn reach_https(nginx: &Nginx, disk: &Path, line: Option<&Line>) -> Result<Access> {
    let name = disk
        .file_name()
        .and_then(OsStr::to_str)
        .context("no name")?;
    let url = nginx.url(name);
    let port = line.map_or(nginx.port, |line| line.port);
    Ok(Access {
        url: url.replace(&format!(":{}/", nginx.port), &format!(":{port}/")),
        options: nginx.options(),
    })
}

impl Lab {
    /// Converts into a raw file, as `sftp` makes one.
    fn convert_from(&self, access: &Access) -> Result<Value> {
        let to = self.fresh("out")?;
        let mut args = vec!["convert".as_ref(), OsStr::new(&access.url)];
        args.extend(["--virtio-iso".as_ref(), self.media.as_os_str()]);
        args.extend(["--name", "vm", "--format", "raw", "-o"].map(OsStr::new));
        args.push(to.as_os_str());
        args.extend(access.options.iter().map(OsStr::new));
        Ok(self.h2k(&args)?.json)
    }

    /// MiB of live data a second while it copies.
    fn rate_from(&self, mib: u64, access: &Access) -> Result<f64> {
        let _ = fs::remove_dir_all(self.dir.join("out"));
        let copy = self.dir.join(".out.partial").join("vm.raw");
        let memory = Warm::new(mib * MIB, copy);
        let report = self.convert_from(access);
        memory.end();
        let report = report?;
        let live = report["bytes"]["read"].as_u64().context("bytes.read")?;
        Ok(live as f64 / MIB as f64 / seconds(&report, "copy_s"))
    }

    /// MiB a second that `sftp` moves; the target is durable then.
    fn sftp(&self, sshd: &Sshd, disk: &Path) -> Result<f64> {
        let to = self.dir.join("fetched.raw");
        let options = sshd.options();
        let url = sshd.url(disk);
        let host = url.trim_start_matches("ssh://").split(':').next();
        let memory = Warm::new(fs::metadata(disk)?.len(), to.clone());
        let start = Instant::now();
        run(Command::new("sftp")
            .args(["-q", "-P", &sshd.port.to_string(), "-i", &options[1]])
            .args(["-o", &format!("UserKnownHostsFile={}", options[3])])
            .arg(format!("{}:{}", host.context("no host")?, disk.display()))
            .arg(&to))?;
        let fetched = File::open(&to)?;
        fetched.sync_all()?;
        let taken = start.elapsed().as_secs_f64();
        memory.end();
        let mib = fetched.metadata()?.len() as f64 / MIB as f64;
        fs::remove_file(to)?;
        Ok(mib / taken)
    }
}

/// What crosses the wire of a disk with many times as much deleted data, to what is live.
fn share(lab: &Lab, mib: u64, rows: &mut Map<String, Value>) -> Result<()> {
    let disk = lab.dir.join("deleted.raw");
    build(Disk::Deleted, mib.min(256), &disk)?;
    let (sshd, nginx) = (Sshd::start(), Nginx::start(&lab.dir));
    for (name, access) in [
        ("ssh", reach_ssh(&sshd, &disk, None)?),
        ("https", reach_https(&nginx, &disk, None)?),
    ] {
        let bytes = lab.convert_from(&access)?["bytes"].clone();
        let number = |what: &str| bytes[what].as_u64().unwrap_or(0) as f64;
        let share = number("fetched") / number("read");
        println!("  {name}: fetched / live           {share:7.3}  (at most 1.1)");
        rows.insert(format!("{name}_fetched_to_live"), share.into());
    }
    fs::remove_file(disk)?;
    Ok(())
}

/// Ratios of rates: to `sftp` in pairs, and at a distance to none, all in turns within one round.
pub fn wire(lab: &Lab, mib: u64) -> Result<Value> {
    ensure!(
        installed(&[&Sshd::TOOLS[..], &Nginx::TOOLS, &["sftp"]].concat()),
        "this row needs sshd, ssh, sftp, nginx and openssl"
    );
    println!("wire: over loopback, MiB of live data a second, and of the whole file for sftp");
    let mut rows = Map::new();
    share(lab, mib, &mut rows)?;
    let disk = lab.dir.join("full.raw");
    build(Disk::Full, mib, &disk)?;
    let (sshd, nginx) = (Sshd::start(), Nginx::start(&lab.dir));
    let (mut ours, mut theirs, mut pairs, mut https) = (vec![], vec![], vec![], vec![]);
    const DISTANCES: [u64; 3] = [0, 20, 60];
    let mut far: [[Vec<f64>; 3]; 2] = Default::default();
    for _ in 0..lab.rounds {
        let rate = lab.rate_from(mib, &reach_ssh(&sshd, &disk, None)?)?;
        let sftp = lab.sftp(&sshd, &disk)?;
        pairs.push(rate / sftp);
        ours.push(rate);
        theirs.push(sftp);
        https.push(lab.rate_from(mib, &reach_https(&nginx, &disk, None)?)?);
        for (i, milliseconds) in DISTANCES.into_iter().enumerate() {
            let latency = Duration::from_millis(milliseconds);
            let line = Line::to(sshd.port, latency);
            far[0][i].push(lab.rate_from(mib, &reach_ssh(&sshd, &disk, Some(&line))?)?);
            let line = Line::to(nginx.port, latency);
            far[1][i].push(lab.rate_from(mib, &reach_https(&nginx, &disk, Some(&line))?)?);
        }
    }
    let (ours, theirs, pairs) = (median(ours), median(theirs), median(pairs));
    println!("  ssh                          {ours:7.1}");
    println!(
        "  sftp                         {theirs:7.1}: ssh is {pairs:.2} times that (at least 0.9)"
    );
    let https = median(https);
    println!("  https                        {https:7.1}");
    rows.extend([
        ("ssh_mib_s".to_owned(), json!(ours)),
        ("sftp_mib_s".to_owned(), json!(theirs)),
        ("ssh_to_sftp".to_owned(), json!(pairs)),
        ("https_mib_s".to_owned(), json!(https)),
    ]);
    for ((name, direct), rates) in [("ssh", ours), ("https", https)].into_iter().zip(far) {
        let rates = rates.map(median);
        for (milliseconds, rate) in DISTANCES.into_iter().zip(rates) {
            let (to_none, to_direct) = (rate / rates[0], rate / direct);
            println!(
                "  {name}, {milliseconds:2} ms                  {rate:7.1}: {to_none:.2} of that at 0 ms, \
                 {to_direct:.2} of that without the proxy"
            );
            rows.insert(format!("{name}_{milliseconds}_ms_mib_s"), rate.into());
            rows.insert(format!("{name}_{milliseconds}_ms_to_0"), to_none.into());
        }
    }
    println!();
    fs::remove_file(disk)?;
    Ok(Value::Object(rows))
}
