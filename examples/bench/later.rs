//! `convert --copy later` and both boots, on a small and on a large disk with the same files, local
//! and over ssh. Measures how long a VM is away, from its shutdown to its payload on the final
//! VirtIO VM.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use hyper2kvm::boot::MARKER;
use hyper2kvm::demo::{Firmware, GuestSpec, WinVersion, guest};
use hyper2kvm::guest::GuestWrite;
use hyper2kvm::tool;
use serde_json::{Map, Value, json};

use super::servers::Sshd;
use super::{Filler, Lab, MIB, PLAY, median};

const SMALL: u64 = 20 << 30;
const LARGE: u64 = 2 << 40;
/// What QEMU and libvirt need to start it without KVM, and each beside another.
const MACHINE: [&str; 11] = [
    "--copy",
    "later",
    "--memory",
    "256",
    "--vcpus",
    "1",
    "--graphics",
    "none",
    "--domain-type",
    "qemu",
    "--user-network",
];

/// The row, or `None` where there is no libvirt to boot with.
pub fn later(lab: &Lab, mib: u64) -> Result<Option<Value>> {
    let needed = [
        "virsh",
        "libvirtd",
        "virtlogd",
        "qemu-system-x86_64",
        "sshd",
        "ssh",
    ];
    if let Some(missing) = needed.iter().find(|name| tool::find(name).is_none()) {
        println!("later: not measured, {missing} is missing\n");
        return Ok(None);
    }
    let disks = [("small", SMALL), ("large", LARGE)].map(|(name, size)| {
        let disk = lab.dir.join(format!("{name}.raw"));
        build(&disk, size, mib.min(64)).map(|()| disk)
    });
    let [small, large] = disks;
    let (small, large) = (small?, large?);
    let ssh = Sshd::start();
    let libvirt = Session::new(lab, &ssh)?;
    let mut row = Map::new();
    for (name, options) in [("local", Vec::new()), ("ssh", ssh.options())] {
        let source = |disk: &Path| match options.is_empty() {
            true => disk.to_owned(),
            false => PathBuf::from(ssh.url(disk)),
        };
        let (small, large) = (source(&small), source(&large));
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for _ in 0..lab.rounds {
            a.push(away(lab, &libvirt, &small, &options)?);
            b.push(away(lab, &libvirt, &large, &options)?);
        }
        row.insert(name.into(), show(name, &a, &b));
    }
    println!();
    for disk in [small, large] {
        fs::remove_file(disk)?;
    }
    Ok(Some(Value::Object(row)))
}

/// One VM from "off" to "up on VirtIO".
#[derive(Clone, Copy)]
struct Away {
    convert: f64,
    /// The part for inspect, plan, fix, trim and verify.
    offline: f64,
    /// Until the payload has written its marker on the final machine: what `boot` does after that is not waited for.
    boot: f64,
    /// The part from each `virsh start` to the marker.
    starts: f64,
    fetched: f64,
}

fn away(lab: &Lab, libvirt: &Session, source: &Path, options: &[String]) -> Result<Away> {
    let out = libvirt.folder.join("vm");
    let mut args: Vec<&OsStr> = vec!["convert".as_ref(), source.as_ref()];
    args.extend([
        "--virtio-iso".as_ref(),
        lab.media.as_os_str(),
        "-o".as_ref(),
        out.as_ref(),
    ]);
    args.extend(MACHINE.map(OsStr::new));
    args.extend(options.iter().map(OsStr::new));
    let (convert, report) = libvirt.h2k(lab, &args)?;
    let connect = ["--connect", "qemu:///session"].map(OsStr::new);
    let mut args: Vec<&OsStr> = vec!["boot".as_ref(), out.as_ref()];
    args.extend(connect);
    let begin = SystemTime::now();
    let booted = libvirt.h2k(lab, &args);
    let written = fs::metadata(out.join("com1-final.log")).and_then(|log| log.modified());
    let mut args: Vec<&OsStr> = vec!["release".as_ref(), out.as_ref(), "--force".as_ref()];
    args.extend(connect);
    let released = libvirt.h2k(lab, &args);
    let (_, record) = booted?;
    released?;
    let boot = written?.duration_since(begin)?.as_secs_f64();
    let number = |document: &Value, path: &str| document.pointer(path).and_then(Value::as_f64);
    let of = |document: &Value, path: &str| number(document, path).unwrap_or(f64::NAN);
    Ok(Away {
        convert,
        offline: of(&report, "/timings/inspect_s") + of(&report, "/timings/fix_s"),
        boot,
        starts: of(&record, "/bootstrap/seconds") + of(&record, "/final/seconds"),
        fetched: of(&report, "/bytes/fetched"),
    })
}

fn show(name: &str, small: &[Away], large: &[Away]) -> Value {
    let of = |all: &[Away], value: fn(&Away) -> f64| median(all.iter().map(value).collect());
    println!("later, {name}: 20 GiB and 2 TiB with the same files, medians");
    let mut row = Map::new();
    type Of = fn(&Away) -> f64;
    let values: [(&str, &str, Of); 6] = [
        ("total", "off to up on VirtIO", |a| a.convert + a.boot),
        ("convert", "convert --copy later", |a| a.convert),
        ("offline", "  of it inspect to verify", |a| a.offline),
        ("boot", "boot, until the second marker", |a| a.boot),
        ("starts", "  of it start to marker", |a| a.starts),
        ("fetched", "MiB fetched by convert", |a| {
            a.fetched / MIB as f64
        }),
    ];
    for (key, text, value) in values {
        let (a, b) = (of(small, value), of(large, value));
        println!("  {text:<28} {a:7.2} {b:7.2}: {:.2}", b / a);
        row.insert(format!("{key}_20g"), json!(a));
        row.insert(format!("{key}_2t"), json!(b));
        row.insert(format!("{key}_ratio"), json!(b / a));
    }
    let more: Vec<f64> = (small.iter().chain(large))
        .map(|a| (a.convert + a.boot) / (a.convert + a.starts))
        .collect();
    let more = median(more);
    println!("  off to up, against convert and the two starts: {more:.2}");
    row.insert("total_against_work".into(), json!(more));
    Value::Object(row)
}

/// A disk with a payload in place of Windows' boot loader, and with these live data.
fn build(disk: &Path, size: u64, mib: u64) -> Result<()> {
    let mut spec = GuestSpec::new(WinVersion::Win10);
    spec.firmware = Firmware::Bios;
    spec.pagefile_size = 0;
    spec.disk_size = size;
    guest::build(&spec, disk)?;
    let mut filler = Filler::of(&spec, disk)?;
    filler.large("live", mib)?;
    filler.writer.close()?;
    let file = File::options().write(true).open(disk)?;
    file.write_all_at(&payload(), 0)?;
    Ok(file.sync_all()?)
}

/// Real mode at 7C00h: writes the marker to COM1 and switches the VM off.
fn payload() -> Vec<u8> {
    let mut code = vec![
        0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0xfc, // cli; xor ax, ax; mov ds, ax; cld
        0xbe, 0x00, 0x00, // mov si, text
        0xba, 0xf8, 0x03, // mov dx, 3f8h
        0xac, 0x84, 0xc0, 0x74, 0x03, // next: lodsb; test al, al; jz off
        0xee, 0xeb, 0xf8, // out dx, al; jmp next
        0xba, 0x04, 0x06, 0xb8, 0x00, 0x20,
        0xef, // off: mov dx, 604h; mov ax, 2000h; out dx, ax
        0xf4, 0xeb, 0xfd, // halt: hlt; jmp halt
    ];
    let text = 0x7c00u16 + code.len() as u16;
    code[7..9].copy_from_slice(&text.to_le_bytes());
    code.extend(format!("{MARKER}\r\n\0").bytes());
    code
}

/// libvirt of an ordinary user with directories of its own, ended when it goes. Root has none but the system's.
struct Session {
    dir: tempfile::TempDir,
    folder: PathBuf,
    root: bool,
}

const NOBODY: u32 = 65534;

impl Session {
    fn new(lab: &Lab, ssh: &Sshd) -> Result<Self> {
        let session = Self {
            dir: tempfile::tempdir()?,
            folder: lab.dir.join("session"),
            root: rustix::process::geteuid().is_root(),
        };
        fs::create_dir(session.dir.path().join("run"))?;
        fs::create_dir(&session.folder)?;
        if session.root {
            fs::set_permissions(&lab.dir, fs::Permissions::from_mode(0o755))?;
            let owner = format!("{NOBODY}:{NOBODY}");
            let own = [session.dir.path(), &session.folder, ssh.dir.path()];
            super::run(Command::new("chown").args(["-R", &owner]).args(own))?;
        }
        session.warm()?;
        Ok(session)
    }

    fn command(&self, program: &Path) -> Command {
        if !self.root {
            return Command::new(program);
        }
        let mut command = Command::new("setpriv");
        let ids = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")];
        command.args(ids).arg("--clear-groups").arg(program);
        command
    }

    /// With directories of its own.
    fn at_home(&self, command: &mut Command) {
        command
            .current_dir("/")
            .env("HOME", self.dir.path())
            .stdin(Stdio::null());
        for (name, folder) in [
            ("XDG_RUNTIME_DIR", "run"),
            ("XDG_CONFIG_HOME", "config"),
            ("XDG_CACHE_HOME", "cache"),
            ("XDG_DATA_HOME", "data"),
        ] {
            command.env(name, self.dir.path().join(folder));
        }
    }

    /// libvirt asks a QEMU that it sees for the first time what it can do, for seconds. A host that runs VMs is past that.
    fn warm(&self) -> Result<()> {
        let virsh = tool::find("virsh").context("virsh is missing")?;
        let mut command = self.command(&virsh);
        command.args([
            "-q",
            "-c",
            "qemu:///session",
            "domcapabilities",
            "--virttype",
            "qemu",
        ]);
        self.at_home(command.stdout(Stdio::null()));
        super::run(&mut command)
    }

    /// Seconds and the document.
    fn h2k(&self, lab: &Lab, args: &[&OsStr]) -> Result<(f64, Value)> {
        let mut command = match &lab.program {
            Some(program) => self.command(program),
            None => {
                let mut command = self.command(&std::env::current_exe()?);
                command.env(PLAY, self.folder.join("peak"));
                command
            }
        };
        command.args(args).args(["--json", "--quiet"]);
        self.at_home(&mut command);
        let start = Instant::now();
        let out = command.output()?;
        let seconds = start.elapsed().as_secs_f64();
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.success(), "{args:?}: {stderr}");
        Ok((seconds, serde_json::from_slice(&out.stdout)?))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for daemon in ["libvirtd", "virtlogd"] {
            let file = self.dir.path().join(format!("run/libvirt/{daemon}.pid"));
            if let Ok(id) = fs::read_to_string(file) {
                let _ = Command::new("kill").arg(id.trim()).status();
            }
        }
    }
}
