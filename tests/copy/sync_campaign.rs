//! Many passes with random writes, kills, cut lines, merged links and data that its file system does not show
//! yet: `.ci/campaign sync`.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use super::support::{Lab, Run, TOOLS, have, text, tool};
use super::sync::{command, differences, file_in, lab, link, run, write, write_differences};
use super::sync_nbd::{Server, bitmap};
use super::{MIB, noise};

const FILES: usize = 6;
/// With this seed the short campaign meets every fault.
const SHORT_SEED: u64 = 1;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

/// The VM's disk, and its form for `sync`.
struct Vm {
    lab: Lab,
    now: PathBuf,
    shown: Shown,
    made: usize,
    files: Vec<Vec<u8>>,
    seed: u64,
}

enum Shown {
    /// The links of a chain, the newest last.
    Chain(Vec<PathBuf>),
    /// An image that a server exports with the bitmap of the previous pass.
    Export {
        image: PathBuf,
        /// What the image reads as.
        applied: PathBuf,
        bitmap: usize,
    },
}

/// Without the holes.
fn copy(from: &Path, to: &Path) {
    tool("cp", &["--sparse=auto", text(from), text(to)]);
}

impl Vm {
    fn new() -> Self {
        let lab = lab();
        let files: Vec<Vec<u8>> = (0..FILES)
            .map(|i| noise(2 * MIB as usize, i as u64))
            .collect();
        for (i, data) in files.iter().enumerate() {
            write(&lab, &lab.raw, &name(i), data);
        }
        let now = lab.path("now.raw");
        copy(&lab.raw, &now);
        Self {
            shown: Shown::Chain(vec![lab.raw.clone()]),
            seed: 100,
            made: 0,
            lab,
            now,
            files,
        }
    }

    /// A number for the next file.
    fn next(&mut self) -> usize {
        self.made += 1;
        self.made
    }

    /// Starts over, as an export or a chain.
    fn show(&mut self, export: bool) {
        let n = self.next();
        let old = match &self.shown {
            Shown::Chain(links) => links.clone(),
            Shown::Export { image, applied, .. } => vec![image.clone(), applied.clone()],
        };
        old.iter().for_each(|file| fs::remove_file(file).unwrap());
        let base = self.lab.path(&format!("base-{n}.raw"));
        copy(&self.now, &base);
        if !export {
            self.shown = Shown::Chain(vec![base]);
            return;
        }
        let image = self.lab.path(&format!("image-{n}.qcow2"));
        let convert = ["convert", "-f", "raw", "-O", "qcow2", text(&base)];
        tool("qemu-img", &[&convert[..], &[text(&image)]].concat());
        bitmap(&image, "--add", "p0");
        self.shown = Shown::Export {
            image,
            applied: base,
            bitmap: 0,
        };
    }

    /// Writes files, some new and some over old ones.
    fn write(&mut self, random: &mut Random) {
        for _ in 0..1 + random.below(3) {
            let i = random.below(FILES as u64) as usize;
            self.seed += 1;
            let len = (1 + random.below(3 * MIB)) as usize;
            self.files[i] = match self.seed % 3 {
                // Clusters of one byte have a form of their own in a qcow2.
                0 => vec![0xff; len],
                _ => noise(len, self.seed),
            };
            write(&self.lab, &self.now, &name(i), &self.files[i]);
        }
    }

    /// Changes the disk to `state`: in a link over the first `keep` ones, or in place.
    fn become_like(&mut self, keep: usize, state: &Path) {
        let n = self.next();
        match &mut self.shown {
            Shown::Chain(links) => {
                let below = links[keep - 1].clone();
                let format = if keep == 1 { "raw" } else { "qcow2" };
                let new = link(&self.lab, &format!("link-{n}.qcow2"), &below, format, state);
                for gone in links.drain(keep..) {
                    fs::remove_file(gone).unwrap();
                }
                links.push(new);
            }
            Shown::Export { image, applied, .. } => {
                write_differences(&self.lab, image, "qcow2", applied, state);
                copy(state, applied);
            }
        }
    }

    fn links(&self) -> usize {
        match &self.shown {
            Shown::Chain(links) => links.len(),
            Shown::Export { .. } => 1,
        }
    }

    /// A snapshot with the data of the next writes, without the metadata that shows them.
    fn snapshot_that_is_behind(&mut self, random: &mut Random) {
        let frozen = self.lab.path("frozen.raw");
        copy(&self.now, &frozen);
        let i = random.below(FILES as u64) as usize;
        self.seed += 1;
        let data = noise(MIB as usize, self.seed);
        write(&self.lab, &self.now, &name(i), &data);
        let chunks: HashSet<&[u8]> = data.chunks(4096).collect();
        let changed = differences(&frozen, &self.now, 4096);
        let old = File::options().write(true).open(&frozen).unwrap();
        let mut early = 0;
        for (at, bytes) in changed {
            for (i, block) in bytes.chunks(4096).enumerate() {
                if chunks.contains(block) {
                    old.write_all_at(block, at + 4096 * i as u64).unwrap();
                    early += 1;
                }
            }
        }
        assert!(early > 0);
        self.files[i] = data;
        self.become_like(self.links(), &frozen);
    }

    /// A snapshot; more links are merged the longer the chain is.
    fn snapshot(&mut self, random: &mut Random) {
        let keep = match self.links() {
            links if links > 4 || random.below(4) == 0 => 1 + random.below(links as u64) as usize,
            links => links,
        };
        let state = self.now.clone();
        self.become_like(keep, &state);
    }

    /// The source for the program, and the server behind it.
    fn source(&self) -> (PathBuf, Option<Server>) {
        match &self.shown {
            Shown::Chain(links) => (links.last().unwrap().clone(), None),
            Shown::Export { image, bitmap, .. } => {
                let server = Server::of_image(&self.lab, image, &[&format!("p{bitmap}")]);
                (server.url("vm"), Some(server))
            }
        }
    }

    /// Later writes belong to the next pass.
    fn checkpoint(&self) {
        if let Shown::Export {
            image, bitmap: n, ..
        } = &self.shown
        {
            bitmap(image, "--add", &format!("p{}", n + 1));
        }
    }

    /// The pass is complete: its bitmap is no longer needed.
    fn passed(&mut self) {
        if let Shown::Export {
            image, bitmap: n, ..
        } = &mut self.shown
        {
            bitmap(image, "--remove", &format!("p{n}"));
            *n += 1;
        }
    }
}

/// Stops the server while the command runs, and starts it again soon or after its end.
fn cut(vm: &Vm, random: &mut Random, verb: &str, out: &Path, more: &[&str]) -> Run {
    let (url, server) = vm.source();
    let (after, back) = (random.below(600), random.below(2) == 0);
    thread::scope(|scope| {
        let cut = scope.spawn(move || {
            thread::sleep(Duration::from_millis(after));
            drop(server);
            back.then(|| vm.source().1)
        });
        let retries = match back {
            true => &[][..],
            false => &["--retries", "0"],
        };
        let run = run(verb, &url, out, &[more, retries].concat(), "");
        cut.join().unwrap();
        match back {
            true => run.expect(0),
            false => run,
        }
    })
}

fn name(i: usize) -> String {
    format!("file-{i}.bin")
}

/// Kills a run at a moment independent of the program. Returns whether it was still running.
fn killed_at(moment: u64, verb: &str, source: &Path, out: &Path, more: &[&str]) -> bool {
    let mut command = command(verb, source, out, more, "");
    let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = quiet.spawn().unwrap();
    thread::sleep(Duration::from_millis(moment));
    let _ = child.kill();
    let status = child.wait().unwrap();
    assert!(status.success() || status.code().is_none(), "{status}");
    !status.success()
}

#[test]
#[ignore = "an hour and more: .ci/campaign sync"]
fn a_campaign_of_passes() {
    if !have(&TOOLS) || !have(&["qemu-nbd", "qemu-io"]) {
        return;
    }
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| text.parse().unwrap())
    };
    let passes = number("HYPER2KVM_PASSES", 1000);
    campaign(passes, number("HYPER2KVM_SEED", 1), 8, true);
}

/// A chain and an export, with a kill, a cut line and a snapshot that is behind in each.
#[test]
fn a_short_campaign_of_passes() {
    if !have(&TOOLS) || !have(&["qemu-nbd", "qemu-io"]) {
        return;
    }
    campaign(4, SHORT_SEED, 2, false);
}

/// Shuts the VM down every `every` passes: the result equals its contents. Chains and exports
/// alternate. `any_moment` also kills runs at moments that no seed reproduces.
fn campaign(passes: u64, seed: u64, every: u64, any_moment: bool) {
    let mut random = Random(seed);
    let mut vm = Vm::new();
    let (mut kills, mut cuts, mut behind, mut cutovers) = (0, 0, 0, 0);
    let out = vm.lab.path("out");
    let name_it = &["--name", "guest"][..];
    for pass in 1..=passes {
        if pass % every == 1 {
            vm.show(cutovers % 2 == 1);
        }
        let export = matches!(vm.shown, Shown::Export { .. });
        vm.write(&mut random);
        if random.below(3) == 0 {
            vm.snapshot_that_is_behind(&mut random);
            behind += 1;
        } else {
            vm.snapshot(&mut random);
        }
        vm.checkpoint();
        if !export {
            // What the VM writes from then on is in the newest link.
            vm.write(&mut random);
            let state = vm.now.clone();
            vm.become_like(vm.links(), &state);
        }
        if export && random.below(2) == 0 {
            cut(&vm, &mut random, "sync", &out, name_it);
            cuts += 1;
        }
        let (source, server) = vm.source();
        if random.below(2) == 0 {
            let killed = run("sync", &source, &out, name_it, "copy-recorded=kill");
            kills += u64::from(killed.code != 0);
        }
        if any_moment && pass % 2 == 0 {
            let moment = random.below(700);
            kills += u64::from(killed_at(moment, "sync", &source, &out, name_it));
        }
        run("sync", &source, &out, name_it, "").expect(0);
        drop(server);
        vm.passed();
        if !pass.is_multiple_of(every) && pass != passes {
            continue;
        }
        if export {
            vm.write(&mut random);
            let state = vm.now.clone();
            vm.become_like(1, &state);
        }
        let more = &["--from-sync", "--verify-copy", "--name", "guest"][..];
        if export && random.below(2) == 0 {
            cut(&vm, &mut random, "convert", &out, more);
            cuts += 1;
        }
        if out.join("sync.json").exists() {
            let (source, _server) = vm.source();
            let points = ["copy-recorded=kill", "copied=kill", "before-rename=kill"];
            if let Some(point) = points.get(random.below(4) as usize) {
                run("convert", &source, &out, more, point).expect(-1);
                kills += 1;
            }
            if any_moment {
                let moment = random.below(2500);
                kills += u64::from(killed_at(moment, "convert", &source, &out, more));
            }
        }
        if out.join("sync.json").exists() {
            let (source, _server) = vm.source();
            run("convert", &source, &out, more, "").expect(0);
        }
        for (i, data) in vm.files.iter().enumerate() {
            let found = file_in(&vm.lab, &out.join("guest.qcow2"), &name(i));
            assert!(found == *data, "pass {pass}: {} is another", name(i));
        }
        fs::remove_dir_all(&out).unwrap();
        cutovers += 1;
        if cutovers % 5 == 0 || passes < 50 {
            eprintln!(
                "{pass} passes, {cutovers} last passes, {behind} behind, {cuts} cut, {kills} killed, 0 lost"
            );
        }
    }
    assert!(
        kills > 0 && cuts > 0 && behind > 0,
        "{kills} {cuts} {behind}"
    );
    eprintln!(
        "{passes} passes, {cutovers} last passes, {behind} behind, {cuts} cut, {kills} killed, 0 lost"
    );
}
