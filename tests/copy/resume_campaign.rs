//! Copies of a disk of 4 GiB that are interrupted at any moment: how much is copied again. In
//! files, on devices, from another host, and with a full file system.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hyper2kvm::disk::copy::free_space;

use super::resume::{convert, recorded, recorded_ranges, with_data};
use super::support::wire::Sshd;
use super::support::{Lab, LoopOver, Mounted, TOOLS, finish, have, text, tool};
use super::{MIB, machine, noise, number};

const SIZE: u64 = 4 << 30;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Files,
    Devices,
    /// The source is on another host.
    Wire,
    /// The disk runs full instead of a kill.
    Full,
}

/// A guest, and a second disk with so many pieces of 8 MiB on it.
struct Copies {
    kind: Kind,
    source: PathBuf,
    bytes: u64,
    options: Vec<String>,
    folder: PathBuf,
    devices: Vec<LoopOver>,
    mounted: Option<Mounted>,
    _sshd: Option<Sshd>,
    lab: Lab,
}

impl Copies {
    /// `None`: not possible here.
    fn new(kind: Kind, pieces: u64) -> Option<Self> {
        let lab = with_data(20);
        let data = lab.path("data.raw");
        let disk = File::create(&data).unwrap();
        disk.set_len(SIZE).unwrap();
        let step = SIZE / pieces / MIB * MIB;
        for i in 0..pieces {
            disk.write_all_at(&noise(8 * MIB as usize, i + 1), i * step)
                .unwrap();
        }
        let mut copies = Self {
            kind,
            source: machine(&lab, &[&lab.raw, &data]),
            bytes: pieces * 8 * MIB,
            options: Vec::new(),
            folder: lab.path("to"),
            devices: Vec::new(),
            mounted: None,
            _sshd: None,
            lab,
        };
        fs::create_dir(&copies.folder).unwrap();
        match kind {
            Kind::Files => {}
            Kind::Devices => {
                for (name, size) in [("d0", copies.lab.spec.disk_size), ("d1", SIZE)] {
                    let file = copies.lab.path(name);
                    File::create(&file).unwrap().set_len(size).unwrap();
                    let device = LoopOver::file(&file, &[])?;
                    let named = ["--output-device".to_owned(), text(&device.0).to_owned()];
                    copies.options.extend(named);
                    copies.devices.push(device);
                }
                copies.options.push("--target-is-zero".into());
            }
            Kind::Wire => {
                let sshd = Sshd::start();
                copies.options = sshd.options();
                copies.source = sshd.url(&copies.source).into();
                copies._sshd = Some(sshd);
            }
            Kind::Full => {
                let mut mount = Command::new("mount");
                let size = format!("size={}m", copies.bytes / MIB + 400);
                mount.args(["-t", "tmpfs", "-o", &size, "none"]);
                copies.mounted = Some(Mounted::at(&copies.folder, mount)?);
            }
        }
        Some(copies)
    }

    /// Starts a copy that succeeds if it equals the source.
    fn start(&self, more: &[&str]) -> Child {
        let options = self.options.iter().map(String::as_str);
        let options = options.chain(["--verify-copy"]);
        let all: Vec<&str> = options.chain(more.iter().copied()).collect();
        let mut command = convert(&self.source, &self.folder.join("out"), &all, "");
        let log = File::create(self.lab.path("log")).unwrap();
        let quiet = command.stdout(Stdio::null()).stderr(log);
        quiet.spawn().unwrap()
    }

    fn partial(&self) -> PathBuf {
        self.folder.join(".out.partial")
    }

    /// Of the second disk.
    fn recorded(&self) -> u64 {
        match self.partial().join(".work/copy-1.journal").exists() {
            true => recorded(&self.partial(), 1),
            false => 0,
        }
    }

    /// The recorded data without holes of the source: over the wire zeroes are read too, and
    /// recorded.
    fn recorded_data(&self) -> u64 {
        let (piece, step) = (8 * MIB, SIZE / (self.bytes / (8 * MIB)) / MIB * MIB);
        let data = |at: u64| (at / step) * piece + (at % step).min(piece);
        match self.partial().join(".work/copy-1.journal").exists() {
            true => (recorded_ranges(&self.partial(), 1).into_iter())
                .map(|[start, length]| data(start + length) - data(start))
                .sum(),
            false => 0,
        }
    }

    fn written(&self) -> u64 {
        let file = match self.devices.get(1) {
            Some(device) => {
                tool("blockdev", &["--flushbufs", text(&device.0)]);
                self.lab.path("d1")
            }
            None => self.partial().join("many-1.qcow2"),
        };
        file.metadata().map_or(0, |meta| meta.blocks() * 512)
    }

    /// Ends the copy after so many recorded bytes, or so much time. Returns whether it was ended.
    fn interrupt(&self, child: &mut Child, moment: Moment) -> bool {
        let start = Instant::now();
        let due = || match moment {
            Moment::Time(after) => start.elapsed() > after,
            Moment::Recorded(bytes) => self.recorded() >= bytes,
        };
        while !due() {
            if let Some(status) = child.try_wait().unwrap() {
                let log = || fs::read_to_string(self.lab.path("log")).unwrap();
                assert!(status.success(), "{status}: {}", log());
                return false;
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        if self.kind == Kind::Full {
            let filler = self.folder.join("filler");
            // As much as there is.
            let _ = Command::new("dd")
                .args(["if=/dev/zero", "bs=1M", &format!("of={}", text(&filler))])
                .stderr(Stdio::null())
                .status();
            let status = child.wait().unwrap();
            fs::remove_file(&filler).unwrap();
            return !status.success();
        }
        child.kill().unwrap();
        !child.wait().unwrap().success()
    }

    /// One copy, interrupted at these moments and resumed. Returns the number of interruptions, and
    /// the most bytes written and not recorded.
    fn round(&self, moments: &[Moment]) -> (u64, u64) {
        let (mut interrupted, mut most) = (0, 0);
        let mut more = vec![];
        for moment in moments {
            let mut child = self.start(&more);
            if !self.interrupt(&mut child, *moment) {
                break;
            }
            interrupted += 1;
            more = vec!["--resume"];
            // A qcow2 has some tables beside the data.
            most = most.max(self.written().saturating_sub(self.recorded_data()));
        }
        let out = self.folder.join("out");
        if !out.exists() {
            let recorded = self.recorded();
            let options = self.options.iter().map(String::as_str);
            let all: Vec<&str> = options.chain(["--resume", "--verify-copy"]).collect();
            let report = finish(convert(&self.source, &out, &all, ""))
                .expect(0)
                .json();
            assert!(report["checks"].to_string().contains("copy-identical"));
            assert!(number(&report, "resumed") >= recorded, "{report}");
        }
        fs::remove_dir_all(&out).unwrap();
        // Files of a program that is just ending take space for a moment longer.
        let begin = Instant::now();
        while self.kind == Kind::Full && begin.elapsed() < Duration::from_secs(20) {
            if free_space(&self.folder).unwrap() > self.bytes + 300 * MIB {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for device in &self.devices {
            // Not with `-z`, which allocates the whole file behind the device.
            tool("blkdiscard", &[text(&device.0)]);
        }
        (interrupted, most)
    }
}

#[derive(Clone, Copy, Debug)]
enum Moment {
    Time(Duration),
    Recorded(u64),
}

/// One kill in the middle of 192 MiB.
#[test]
fn a_kill_costs_less_than_a_hundredth_of_the_disk() {
    if !have(&TOOLS) {
        return;
    }
    let copies = Copies::new(Kind::Files, 24).unwrap();
    let (kills, again) = copies.round(&[Moment::Recorded(40 * MIB)]);
    assert!(kills == 1 && again < SIZE / 100, "{kills} {again}");
}

#[ignore = "minutes: .ci/campaign runs it (part resume)"]
#[test]
fn kills_at_any_moment_cost_little() {
    if !have(&TOOLS) {
        return;
    }
    let rounds: u64 = std::env::var("HYPER2KVM_PAIRS").map_or(5, |n| n.parse().unwrap());
    let kinds = [Kind::Files, Kind::Devices, Kind::Wire, Kind::Full];
    let mut random = 7u64;
    let mut below = |limit: u64| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (random >> 33) % limit
    };
    let (mut all, mut most_of_all) = (0, 0);
    for (i, kind) in kinds.into_iter().enumerate() {
        let Some(copies) = Copies::new(kind, 192) else {
            continue;
        };
        let (mut kills, mut most) = (0, 0);
        // As many in each kind.
        let share = rounds / 4 + u64::from((i as u64) < rounds % 4);
        for _ in 0..share {
            let half = copies.bytes / 2;
            let moments = [
                Moment::Time(Duration::from_millis(below(1500))),
                Moment::Recorded(1 + below(half)),
                Moment::Recorded(half + below(half - 32 * MIB)),
            ];
            let (interrupted, again) = copies.round(match kind {
                // There must be something to go on with.
                Kind::Full => &moments[1..],
                _ => &moments[..],
            });
            kills += interrupted;
            most = most.max(again);
        }
        eprintln!(
            "resume: {kind:?}: {share} copies, {kills} interrupted, at most {:.2} MiB ({:.2} %) copied again",
            most as f64 / MIB as f64,
            most as f64 * 100.0 / SIZE as f64
        );
        all += kills;
        most_of_all = most_of_all.max(most);
    }
    let percent = most_of_all as f64 * 100.0 / SIZE as f64;
    eprintln!("resume: {all} interrupted, {percent:.2} % copied again at most");
    assert!(
        all >= rounds && most_of_all < SIZE / 100,
        "{all} {most_of_all}"
    );
}
